"""A run that is stopped, killed, poisoned or started twice ends as if nothing had happened, or says why not."""

import fcntl
import itertools
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import threading
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest.mock import ANY

import numpy as np
import polars as pl
import pytest
import torch
from torch import Tensor

from pipeline import network, train
from pipeline.config import RunConfig, load_config
from pipeline.errors import ConfigError, DataError, DivergedError, StoppedError, StorageError
from pipeline.paths import Paths
from pipeline.runlog import read_metrics
from pipeline.stage import commit
from pipeline.training import initial, loop
from pipeline.training.checkpoint import CheckpointStore, load_checkpoint
from pipeline.training.stop import SIGNALS, StopRequest, run_lock
from tests.pipeline import tiny
from tests.pipeline.clock import watched
from tests.pipeline.tiny import at_calls, fit, rows_of

pytestmark = pytest.mark.usefixtures("known_model")


def fit_to_the_end(paths: Paths, config: RunConfig | None = None, **options: Any) -> int:
    """Start the run again until it is finished; returns how often."""
    for count in itertools.count(1):
        try:
            fit(paths, config, **options)
        except StoppedError:
            continue
        return count
    raise AssertionError


def store_of(paths: Paths, run: str = tiny.RUN) -> CheckpointStore:
    return CheckpointStore(paths.fold_dir(run, 0) / "checkpoints")


def status_of(paths: Paths) -> dict[str, Any]:
    return json.loads((paths.fold_dir(tiny.RUN, 0) / "status.json").read_text())


# --- a run ---


def test_training_learns_more_than_the_median(paths):
    report = fit(paths, tiny.config(epochs=12, batch_size=4, lr=3e-2, model={"width": 16, "dropout": 0.0}))
    assert report.status == "built"
    assert report.facts["steps"] == report.facts["updates"] == 96
    truth = 0.25  # mean absolute deviation of the four letters' levels from their median
    assert report.facts["metric"] < 0.7 * truth


def test_the_log_tells_the_whole_run(paths):
    report = fit(paths)
    (start,) = rows_of(paths, "start")
    assert start["config"]["train"]["seed"] == 7
    assert start["precision_reason"] == "auto: no CUDA device (cpu)"
    assert start["data"].keys() == {"examples", "folds"}
    assert (start["commit"], start["command"]) == (commit(), sys.argv)
    assert (start["train"], start["valid"]) == (32, 25)
    assert [row["step"] for row in rows_of(paths, "step")] == list(range(1, 13))
    epochs = rows_of(paths, "epoch")
    assert [row["step"] for row in epochs] == [4, 8, 12]
    assert set(epochs[0]["valid"]) == set(tiny.TARGETS)
    assert min(row["metric"] for row in epochs) == report.facts["metric"]
    (done,) = rows_of(paths, "done")
    assert done["guard"] == {"overflows": 0, "skips": 0, "skips_in_a_row": 0, "rollbacks": 0}
    assert status_of(paths)["state"] == "done"
    assert {"loss", "lr", "tokens_per_s", "eta_s", "memory_mib", "pid"} <= status_of(paths).keys()


def test_a_finished_run_is_not_done_again(paths):
    first = fit(paths)
    before = {path: path.stat().st_mtime_ns for path in paths.fold_dir(tiny.RUN, 0).rglob("*") if path.name != ".lock"}
    second = fit(paths)
    assert (first.status, second.status) == ("built", "current")
    assert second.facts == first.facts
    assert second.outputs == first.outputs
    assert all(path.stat().st_mtime_ns == when for path, when in before.items())


@pytest.mark.parametrize("which", ["newest", "best"])
def test_a_finished_run_that_was_damaged_is_mended(paths, which):
    """It was "up to date", and its predictions ended with "does not have its sha256", every time."""
    fit(paths)
    store = store_of(paths)
    expected = store.load_newest().weights
    path = next(iter(store.steps().values())) if which == "newest" else store.best_folder()
    damaged = bytearray((path / "model.safetensors").read_bytes())
    damaged[-1] ^= 1
    (path / "model.safetensors").write_bytes(damaged)
    fit(paths)
    weights = store.load_newest().weights
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())
    assert (store.folder / "bad" / path.name / "reason.txt").exists()


def test_a_finished_run_whose_last_word_was_lost_gets_its_status_corrected(paths):
    fit(paths)
    path = paths.fold_dir(tiny.RUN, 0) / "status.json"
    path.write_text(json.dumps(status_of(paths) | {"state": "running"}))
    assert fit(paths).status == "current"
    assert status_of(paths)["state"] == "done"


def test_a_checkpoint_knows_its_run(paths):
    fit(paths)
    meta = store_of(paths).newest_meta()
    assert (meta["run"], meta["competition"], meta["split"], meta["fold"]) == (tiny.RUN, "tiny", tiny.SPLIT, 0)
    assert meta["config"]["model"]["name"] == "tiny"
    assert json.loads((paths.fold_dir(tiny.RUN, 0) / "config.json").read_text())["config"] == meta["config"]


def test_sequences_of_the_held_out_fold_do_not_train(paths, inject, capsys):
    """A run of one step was said to have "1 steps, 1 epochs"."""
    config = tiny.config(epochs=1, batch_size=999)
    shapes = []
    inject(lambda x_BLD: shapes.append(x_BLD.shape[0]) or x_BLD)
    fit(paths, config)
    assert shapes == [32]
    assert "fold0: 1 step, 1 epoch\n" in capsys.readouterr().err


def test_patience_ends_a_run_that_gets_no_better(paths):
    """Was after one epoch more than were asked for: the best one and three others."""
    still = {"epochs": 50, "lr": 1e-12, "ema_decay": 0.0, "schedule": "constant", "model": {"dropout": 0.0}}
    assert fit(paths, tiny.config(**still, patience=2)).facts["epochs"] == 3
    assert fit(paths, tiny.config(**still, patience=2)).status == "current"


def test_micro_batches_give_the_steps_of_the_whole_batch(paths):
    """32 = 2 x 16 to 1e-5 over 20 steps."""
    tiny.write_values(paths, count=256)
    losses = {}
    for micro in (0, 16, 5):
        run = f"m{micro}.{tiny.SPLIT}"
        fit(paths, tiny.config(model={"dropout": 0.0}, epochs=5, batch_size=32, micro_batch=micro), run=run)
        losses[micro] = [row["loss"] for row in rows_of(paths, "step", run)]
    assert len(losses[0]) == 20
    np.testing.assert_allclose(losses[16], losses[0], atol=1e-5)
    np.testing.assert_allclose(losses[5], losses[0], atol=1e-5)


def test_structures_train_to_a_lower_loss_than_equal_bins(tmp_path):
    paths = Paths(comp="tiny3d", root=tmp_path)
    tiny.write_structures(paths)
    report = fit(paths, tiny.config(epochs=20, batch_size=4, data={"max_length": 24}), competition=tiny.TINY3D)
    assert report.facts["metric"] < np.log(network.NUM_DISTANCE_BINS) - 0.3


def test_a_run_begins_with_the_weights_of_another(paths):
    first = fit(paths)
    config = tiny.config(epochs=1, lr=1e-12, ema_decay=0.0)
    config = replace(config, model=replace(config.model, init=str(first.outputs["checkpoint"])))
    second = fit(paths, config, run=f"more.{tiny.SPLIT}")
    assert second.facts["metric"] == pytest.approx(first.facts["metric"], abs=1e-6)


def test_each_fold_begins_with_its_own_checkpoint_of_a_run(paths, capsys):
    """One checkpoint for all folds had seen what four of five held out."""
    for fold in (0, 1):
        fit(paths, fold=fold)
    config = tiny.config(epochs=1)
    config = replace(config, model=replace(config.model, init=str(paths.run_dir(tiny.RUN))))
    for fold in (0, 1):
        fit(paths, config, run=f"more.{tiny.SPLIT}", fold=fold)
        folder = paths.fold_dir(f"more.{tiny.SPLIT}", fold)
        assert read_metrics(folder / "metrics.jsonl")[0]["initial"]["fold"] == fold
    assert "not out of fold" not in capsys.readouterr().err


def test_a_run_that_has_no_such_fold_to_begin_with_is_refused(paths):
    fit(paths, fold=1)
    config = tiny.config(epochs=1)
    config = replace(config, model=replace(config.model, init=str(paths.run_dir(tiny.RUN))))
    with pytest.raises(ConfigError, match="expected a run's folder with this fold in it, or a checkpoint's"):
        fit(paths, config, run=f"more.{tiny.SPLIT}")


def test_what_the_initial_weights_began_with_has_seen_the_held_out_fold_too(paths, capsys):
    """Fold 1, then fold 0, then fold 0 again: the last one was not warned of."""
    first = fit(paths, fold=1)
    for number, run in enumerate(("second", "third")):
        config = tiny.config(epochs=1)
        config = replace(config, model=replace(config.model, init=str(first.outputs["checkpoint"])))
        first = fit(paths, config, run=f"{run}.{tiny.SPLIT}")
        told = capsys.readouterr().err
        assert told.count("trained with fold 1 of 'sim80_k2' held out, so it has seen sequences of fold 0") == 1, number


def test_initial_weights_may_move_once_a_run_has_begun(paths, tmp_path):
    first = fit(paths)
    config = tiny.config(epochs=2)
    config = replace(config, model=replace(config.model, init=str(first.outputs["checkpoint"])))
    with pytest.raises(StoppedError):
        fit(paths, config, run=f"more.{tiny.SPLIT}", max_steps=1)
    moved = replace(config, model=replace(config.model, init="elsewhere"))
    with pytest.raises(ConfigError, match="ALLOW_CHANGES=1"):
        fit(paths, moved, run=f"more.{tiny.SPLIT}")
    assert fit(paths, moved, run=f"more.{tiny.SPLIT}", allow_changes=True).facts["steps"] == 8
    none = replace(config, model=replace(config.model, init=""))
    with pytest.raises(ConfigError, match=r"leave config\.model\.init as it was"):
        fit(paths, none, run=f"more.{tiny.SPLIT}", allow_changes=True)


def test_a_head_begins_no_other_that_is_read_in_other_units(paths, capsys):
    """What a head gave as values was read in deviations, and logits as either."""
    config = tiny.config().model
    config = replace(config, init=str(fit(paths).outputs["checkpoint"]))
    meta = {"competition": "tiny", "split": tiny.SPLIT, "fold": 0}
    for said, more in (("", {}), ("values", {"units": {}}), ("numbers", {"numbers": {}}), ("logits", {"classes": {}})):
        facts = initial.load_initial(network.build_model(config, tiny.TINY), config, meta | more)
        assert facts["fresh"] == ([] if not said else ["heads.per_base"])
        told = " ".join(capsys.readouterr().err.split())
        assert ("heads that give values as they are do not begin others, of" in told) is bool(said)
        assert said in told


def test_a_run_on_structures_begins_with_weights_trained_on_reactivities(paths, tmp_path):
    first = fit(paths)
    other = Paths(comp="tiny3d", root=tmp_path / "artifacts")
    tiny.write_structures(other)
    config = tiny.config(epochs=1, lr=1e-12, weight_decay=0.0, ema_decay=0.0, batch_size=4, model={"coordinates": True})
    config = replace(config, model=replace(config.model, init=str(first.outputs["checkpoint"])))
    with pytest.raises(StoppedError):
        fit(other, config, competition=tiny.TINY3D, max_steps=1)
    fit(other, config, competition=tiny.TINY3D)
    starts = rows_of(other, "start")
    assert len(starts) == 2  # the run that goes on still says where it came from
    for row in starts:
        assert row["initial"] == {
            "run": tiny.RUN,
            "fold": 0,
            "step": first.facts["best_step"],
            "backbone": 1.0,
            "loaded": ["convolution", "embedding"],
            "fresh": ["heads.distances", "heads.placed"],
            "ignored": ["heads.per_base"],
            "trained_on": [{"competition": "tiny", "split": tiny.SPLIT, "fold": 0, "folds": ANY}],
        }
    source = load_checkpoint(first.outputs["checkpoint"]).weights
    last = CheckpointStore(other.fold_dir(tiny.RUN, 0) / "checkpoints").load_newest().weights
    for name in ("embedding.weight", "convolution.weight"):
        torch.testing.assert_close(last[name], source[name], rtol=0, atol=1e-6)


def test_the_head_for_coordinates_is_left_out_where_there_are_none_to_learn():
    config = tiny.config(model={"coordinates": True})
    assert set(train.build_model(config.model, tiny.TINY).heads) == {"per_base"}
    assert set(train.build_model(config.model, tiny.TINY3D).heads) == {"distances", "placed"}


def test_targets_that_teach_nothing_neither_train_nor_validate(tmp_path):
    """Of what has no date, or one after a test target's cutoff, nothing is learned, wherever its fold is."""
    paths = Paths(comp="tiny3d", root=tmp_path)
    tiny.write_structures(paths)
    table = pl.read_parquet(paths.clean("train"))
    nothing = ["R003", "R004"]  # of fold 1 and of fold 0
    table.with_columns(teaches=~pl.col("sequence_id").is_in(nothing)).write_parquet(paths.clean("train"))
    config = tiny.config()
    model = train.build_model(config.model, tiny.TINY3D)
    for fold in (0, 1):
        data, _ = train.load_data(config, model, competition=tiny.TINY3D, paths=paths, split=tiny.SPLIT, fold=fold)
        learned = {data.examples.ids_N[n].decode() for n in (*data.train, *data.valid)}
        assert learned == set(table["sequence_id"]) - set(nothing)


def test_coordinates_train_to_a_lower_loss(tmp_path):
    paths = Paths(comp="tiny3d", root=tmp_path)
    tiny.write_structures(paths)
    config = tiny.config(epochs=20, batch_size=4, data={"max_length": 24}, model={"coordinates": True})
    fit(paths, config, competition=tiny.TINY3D)
    first, *_, last = rows_of(paths, "epoch")
    for term in ("distance", "frame", "tm", "confidence"):
        assert last["valid"][term] < 0.9 * first["valid"][term]


def test_initial_weights_are_needed_for_the_beginning_only(paths):
    """Was: ConfigError when the checkpoint that a run began with was removed before the run was resumed."""
    first = fit(paths)
    config = tiny.config(epochs=1)
    config = replace(config, model=replace(config.model, init=str(first.outputs["checkpoint"])))
    with pytest.raises(StoppedError):
        fit(paths, config, run=f"more.{tiny.SPLIT}", max_steps=2)
    shutil.rmtree(first.outputs["checkpoint"])
    assert fit(paths, config, run=f"more.{tiny.SPLIT}").status == "built"


def test_initial_weights_that_have_seen_the_held_out_fold_are_said(paths, monkeypatch):
    said: list[str] = []
    monkeypatch.setattr(initial, "warn", said.append)
    config = tiny.config(epochs=1)
    config = replace(config, model=replace(config.model, init=str(fit(paths).outputs["checkpoint"])))
    fit(paths, config, run=f"same.{tiny.SPLIT}", fold=0)
    assert said == []
    fit(paths, config, run=f"other.{tiny.SPLIT}", fold=1)
    assert len(said) == 1
    assert "it has seen sequences of fold 1: scores of this run are not out of fold" in said[0]


def test_initial_weights_of_a_split_of_the_same_name_of_other_data_are_said(paths, monkeypatch):
    """The warning contradicted itself: trained with fold 0 of 'sim80_k2' held out, so it has seen fold 0."""
    said: list[str] = []
    monkeypatch.setattr(initial, "warn", said.append)
    config = tiny.config(epochs=1)
    config = replace(config, model=replace(config.model, init=str(fit(paths).outputs["checkpoint"])))
    seen = [each | {"folds": "others"} for each in initial.has_seen(initial.read_meta(Path(config.model.init)))]
    monkeypatch.setattr(initial, "has_seen", lambda _meta: seen)
    fit(paths, config, run=f"same.{tiny.SPLIT}")
    assert len(said) == 1
    assert "fold 0 of 'sim80_k2' of other data held out, so it may have seen sequences of fold 0" in said[0]


# --- refusals ---


def test_a_changed_setting_is_refused_with_a_diff(paths):
    fit(paths)
    with pytest.raises(
        ConfigError, match=r"config\.train\.lr 0\.01 -> 0\.02; config\.train\.seed 7 -> 8\. Next: .* TAG="
    ):
        fit(paths, tiny.config(lr=0.02, seed=8))


def test_a_changed_fold_table_is_refused(paths):
    fit(paths, max_steps=None)
    table = paths.fold_table(tiny.SPLIT)
    ids = [f"s{k:04d}" for k in range(64)]
    tiny.write_table(table, {"sequence_id": ids, "fold": np.array([k % 4 for k in range(64)], dtype=np.uint8)})
    with pytest.raises(ConfigError, match=r"data\.folds \w+ -> \w+\. Next: make data folds if a table was damaged"):
        fit(paths)


def test_changed_data_are_refused(paths):
    with pytest.raises(StoppedError):
        fit(paths, max_steps=1)
    tiny.write_values(paths, seed=2)
    with pytest.raises(ConfigError, match=r"data\.examples train-\w+ -> train-\w+"):
        fit(paths)


def test_a_restart_sets_the_earlier_run_aside(paths):
    fit(paths)
    assert fit(paths, tiny.config(lr=0.02), restart=True).status == "built"
    aside = paths.fold_dir(tiny.RUN, 0) / "set-aside-1"
    assert CheckpointStore(aside / "checkpoints").newest_meta()["config"]["train"]["lr"] == 0.01
    aside.rename(aside.with_name("set-aside-2"))
    fit(paths, restart=True)  # was FileExistsError where the first of two folders had been removed
    assert sorted(path.name for path in aside.parent.glob("set-aside-*")) == ["set-aside-2", "set-aside-3"]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": {"widht": 3}}, r"\[model\] .*no argument 'widht'. Did you mean 'width'"),
        # were a traceback of torch when it was built, one in the first step, and the words of a TypeError
        ({"model": {"width": -3}}, r"\[model\] model .*: width: got -3; expected 1 or more"),
        ({"model": {"width": 0}}, r"\[model\] model .*: width: got 0; expected 1 or more"),
        ({"model": {"num_channels": 3}}, r"num_channels follows from the competition"),
        ({"model": {"use_bpp": True}}, "make bpp"),
        ({"data": {"min_signal_to_noise": 1e9}}, "leaves no training sequence"),
    ],
)
def test_settings_that_make_no_sense_are_refused_before_anything_is_written(paths, changes, message):
    with pytest.raises((ConfigError, DataError), match=message):
        fit(paths, tiny.config(**changes))
    assert [path.name for path in paths.fold_dir(tiny.RUN, 0).iterdir()] == [".lock"]


def test_weights_that_do_not_fit_are_refused(paths):
    first = fit(paths)
    config = tiny.config(model={"width": 12})
    for init in (str(first.outputs["checkpoint"]), "nowhere"):
        wrong = replace(config, model=replace(config.model, init=init))
        with pytest.raises(ConfigError, match="expected a run's folder with this fold in it, or a checkpoint's"):
            fit(paths, wrong, run=f"wrong.{tiny.SPLIT}")


@pytest.mark.parametrize("replaced", [False, True], ids=["moved", "moved, and another run in its place"])
def test_a_folder_that_is_moved_under_a_run_keeps_its_checkpoints_and_gets_no_double(paths, inject, tmp_path, replaced):
    """Was: the rest of the training, and its status, went into a new folder of the old name, without its tables."""
    fit(paths, run=f"whole.{tiny.SPLIT}")
    whole, elsewhere = tiny.final_bytes(paths, f"whole.{tiny.SPLIT}"), replace(paths, root=tmp_path / "elsewhere")
    folder, count = paths.fold_dir(tiny.RUN, 0), itertools.count(1)

    def move(x_BLD: Tensor) -> Tensor:
        if next(count) == 5:
            paths.root.rename(elsewhere.root)
            if replaced:
                folder.mkdir(parents=True)
                (folder / ".lock").touch()
        return x_BLD

    inject(move)
    with pytest.raises(StorageError, match=r"fold0: moved, removed or replaced .*; step 6 is not saved"):
        fit(paths)
    inject(None)
    assert replaced == paths.root.exists()
    assert not (folder / "checkpoints").exists()
    assert list(store_of(elsewhere).steps()) == [4, 3]
    fit(elsewhere)
    assert tiny.final_bytes(elsewhere) == whole


def test_a_lock_that_somebody_deletes_ends_no_run(paths, inject):
    inject(lambda x_BLD: (paths.fold_dir(tiny.RUN, 0) / ".lock").unlink(missing_ok=True) or x_BLD)
    assert fit(paths).facts["steps"] == 12


def test_a_second_run_in_the_same_folder_is_refused_by_pid(paths):
    folder = paths.fold_dir(tiny.RUN, 0)
    with run_lock(folder), pytest.raises(StoppedError, match=f"process {os.getpid()} is already at work here"):
        fit(paths)
    with run_lock(folder):
        pass


# --- stopped and resumed ---

RESUMABLE = {
    "fp32": {},
    "bf16": {"precision": "bf16"},
    "fp16": {"precision": "fp16"},
    "accumulated": {"micro_batch": 3, "ema_decay": 0.0},
    "one loader worker": {"workers": 1},
    "flipped and cropped": {"data": {"flip": 0.5, "max_length": 25}, "save_every": 0},
}


@pytest.mark.parametrize("changes", RESUMABLE.values(), ids=RESUMABLE)
def test_a_run_stopped_after_every_step_ends_with_the_same_bits(paths, changes):
    config = tiny.config(**changes)
    fit(paths, config, run=f"whole.{tiny.SPLIT}")
    assert fit_to_the_end(paths, config, max_steps=1) == 13
    assert tiny.final_bytes(paths) == tiny.final_bytes(paths, f"whole.{tiny.SPLIT}")
    assert [row["step"] for row in rows_of(paths, "step")] == list(range(1, 13))
    assert [row["step"] for row in rows_of(paths, "epoch")] == [4, 8, 12]


def test_a_spent_time_budget_stops_before_the_next_step(paths):
    with pytest.raises(StoppedError, match=r"stopped at step 0 of 12 \(the time budget is spent\); the state is saved"):
        fit(paths, time_budget=0.0)
    assert status_of(paths)["state"] == "stopped"
    assert status_of(paths)["exit_code"] == 75
    fit(paths)


@pytest.mark.parametrize("number", SIGNALS)
def test_a_signal_in_a_step_stops_after_it(paths, inject, number, usual_signals):
    count = itertools.count(1)

    def send(x_BLD: Tensor) -> Tensor:
        if next(count) == 5:
            os.kill(os.getpid(), number)
        return x_BLD

    inject(send)
    with pytest.raises(StoppedError, match=rf"stopped at step 5 of 12 \({number.name}\)"):
        fit(paths)
    inject(None)
    fit(paths, run=f"whole.{tiny.SPLIT}")
    fit(paths)
    assert tiny.final_bytes(paths) == tiny.final_bytes(paths, f"whole.{tiny.SPLIT}")


def test_a_signal_in_the_validation_stops_and_the_epoch_is_validated_later(paths):
    fit(paths, run=f"whole.{tiny.SPLIT}")

    def send(predicted: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        os.kill(os.getpid(), signal.SIGTERM)
        return tiny.TINY.error_sums(predicted, truth)

    config = tiny.config(micro_batch=2)  # several validation batches
    fit(paths, config, run=f"whole2.{tiny.SPLIT}")
    with pytest.raises(StoppedError, match="stopped at step 4 of 12"):
        fit(paths, config, competition=replace(tiny.TINY, error_sums=send))
    assert rows_of(paths, "epoch") == []
    fit(paths, config)
    assert tiny.final_bytes(paths) == tiny.final_bytes(paths, f"whole2.{tiny.SPLIT}")


def test_handlers_are_put_back_and_an_ignored_hang_up_stays_ignored():
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)]
    signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with StopRequest() as stop:
            os.kill(os.getpid(), signal.SIGHUP)
            assert stop.reason() is None
            os.kill(os.getpid(), signal.SIGTERM)
            assert stop.reason() == "SIGTERM"
    finally:
        signal.signal(signal.SIGHUP, before[2])
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)] == before


def test_a_batch_systems_time_limit_that_is_told_every_second_counts_once():
    with StopRequest() as stop:
        assert stop.reason() is None
        for _ in range(3):
            os.kill(os.getpid(), signal.SIGXCPU)
        assert stop.reason() == "SIGXCPU"


def test_a_signal_at_any_moment_leaves_the_handlers_as_they_were():
    """One that came while they were put back raised there: they stayed, and the next request began as signalled."""
    before = signal.getsignal(signal.SIGTERM)

    def work() -> None:
        with StopRequest():
            len("")

    with StopRequest():
        moments = watched(work)
    for moment in range(1, moments + 1):
        with StopRequest() as outer:
            with suppress(StoppedError):
                watched(work, at=moment)
            assert outer.signalled
            assert [outer] == StopRequest._open
        assert signal.getsignal(signal.SIGTERM) == before


def test_a_signal_in_code_of_no_module_stops_like_any_other():
    """Dataclasses, say, are generated code: KeyError: '__name__', exit code 1, in one of twelve predictions."""
    with StopRequest() as stop, pytest.raises(StoppedError, match=r"stopped \(SIGTERM\)"):
        exec("send()", {"send": lambda: os.kill(os.getpid(), signal.SIGTERM)})
    assert stop.signalled


def test_outside_the_main_thread_signals_are_left_alone():
    reasons = []

    def work() -> None:
        with StopRequest(time_budget=0.0) as stop:
            reasons.append(stop.reason())

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert reasons == ["the time budget is spent"]


@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"), MemoryError()], ids=type
)
def test_out_of_memory_saves_and_says_what_to_do(error, paths, inject):
    count = itertools.count(1)

    def exhaust(x_BLD: Tensor) -> Tensor:
        torch.rand(3)  # random numbers that the failed step used up
        if next(count) == 6:
            raise error
        return x_BLD

    def draw(x_BLD: Tensor) -> Tensor:
        torch.rand(3)
        return x_BLD

    inject(exhaust)
    with pytest.raises(StorageError, match=r"out of memory at step 6 with micro-batches of 8 .*micro_batch=4"):
        fit(paths)
    assert store_of(paths).newest_meta()["step"] == 5
    inject(draw)
    fit(paths)
    fit(paths, run=f"whole.{tiny.SPLIT}")
    assert tiny.final_bytes(paths) == tiny.final_bytes(paths, f"whole.{tiny.SPLIT}")


def test_out_of_memory_in_the_validation_is_not_told_as_a_step_beyond_the_last(paths):
    def exhaust(predicted: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        raise MemoryError

    with pytest.raises(StorageError, match=r"out of memory in the validation after step 4 with .*the state is saved"):
        fit(paths, tiny.config(epochs=1), competition=replace(tiny.TINY, error_sums=exhaust))
    fit(paths, tiny.config(epochs=1))


def test_out_of_memory_between_the_passes_and_the_update_resumes_with_the_same_bits(paths, monkeypatch):
    """Was: saved with the random numbers of the failed step used up, so that the run went on with others."""
    count, measure = itertools.count(1), loop.gradients

    def exhaust(parameters: list[torch.nn.Parameter]) -> list[Tensor]:
        if next(count) == 2 * 5 + 1:  # measured, then clipped
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return measure(parameters)

    with monkeypatch.context() as patch:
        patch.setattr(loop, "gradients", exhaust)
        with pytest.raises(StorageError, match=r"out of memory at step 6 .* the state is saved"):
            fit(paths)
    assert store_of(paths).newest_meta()["step"] == 5
    fit(paths)
    fit(paths, run=f"whole.{tiny.SPLIT}")
    assert tiny.final_bytes(paths) == tiny.final_bytes(paths, f"whole.{tiny.SPLIT}")


def test_a_run_goes_on_with_loader_workers_it_began_without(paths):
    fit(paths, run=f"whole.{tiny.SPLIT}")
    with pytest.raises(StoppedError):
        fit(paths, max_steps=6)
    fit(paths, tiny.config(workers=2), allow_changes=True)
    assert tiny.final_bytes(paths) == tiny.final_bytes(paths, f"whole.{tiny.SPLIT}")


def test_a_torn_last_line_and_rows_beyond_the_checkpoint_are_dropped(paths):
    with pytest.raises(StoppedError):
        fit(paths, max_steps=5)
    with (paths.fold_dir(tiny.RUN, 0) / "metrics.jsonl").open("a") as handle:
        handle.write('{"event": "step", "step": 6, "epoch": 1}\n{"event": "st')
    fit(paths)
    assert [row["step"] for row in rows_of(paths, "step")] == list(range(1, 13))


def test_a_damaged_newest_checkpoint_costs_steps_not_the_result(paths):
    fit(paths, run=f"whole.{tiny.SPLIT}")
    with pytest.raises(StoppedError):
        fit(paths, max_steps=8)
    newest = next(iter(store_of(paths).steps().values()))
    data = bytearray((newest / "training.safetensors").read_bytes())
    data[-1] ^= 1
    (newest / "training.safetensors").write_bytes(data)
    fit(paths)
    assert tiny.final_bytes(paths) == tiny.final_bytes(paths, f"whole.{tiny.SPLIT}")


def test_damage_to_every_checkpoint_is_not_met_by_a_silent_restart(paths):
    with pytest.raises(StoppedError):
        fit(paths, max_steps=3)
    for path in store_of(paths).steps().values():
        (path / "state.pt").write_bytes(b"")
    for _ in range(2):
        with pytest.raises(StorageError, match="every checkpoint is damaged"):
            fit(paths)
    assert fit(paths, restart=True).status == "built"


KILLED_RUN = """
import itertools, json, os, signal, sys
from pathlib import Path
from models.registry import register_model
from pipeline import runlog, train
from pipeline.paths import Paths
from pipeline.runlog import read_metrics
from tests.pipeline import before_fork, tiny

register_model(tiny.TinyModel)
runlog.console.quiet = True
paths = Paths(comp="tiny", root=Path(sys.argv[1]))

def fit(run):
    options = dict(competition=tiny.TINY, paths=paths, split=tiny.SPLIT, fold=0)
    return train.run(tiny.config(), run=run, **options)

def killed_at(place, number):
    count = itertools.count(1)
    def die(*_):
        if next(count) == number:
            os.kill(os.getpid(), signal.SIGKILL)
    if place == "forward":
        tiny.Fault.inject = staticmethod(lambda x_BLD: (die(), x_BLD)[1])
    else:
        call = getattr(os, place)
        setattr(os, place, lambda *args, **options: (die(), call(*args, **options))[1])

def twice():
    os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)

def in_child(place, number):
    pid = os.fork()
    if pid == 0:
        if place == "twice":
            tiny.Fault.inject = staticmethod(lambda x_BLD: (twice(), x_BLD)[1])
        elif place:
            killed_at(place, number)
        fit("killed.sim80_k2" if place else "whole.sim80_k2")
        os._exit(0)
    return os.waitpid(pid, 0)[1]

# in a child too: gradients of a torch that is built for CUDA have threads, which a child cannot go on with
assert in_child("", 0) == 0
assert "polars" not in sys.modules, "a child of its threads hangs"
places = [("forward", 1), ("fsync", 1), ("rename", 1)]  # first batch, first save
places += [("forward", n) for n in (2, 3, 5)] + [("fsync", n) for n in (3, 6, 7, 8, 9)]
places += [("rename", n) for n in (1, 2)]
signals = [in_child(*place) for place in places]
second = in_child("twice", 0)
fit("killed.sim80_k2")
print(json.dumps({"signals": signals, "second": second, "polars": "polars" in sys.modules}))
"""


def test_a_run_killed_again_and_again_ends_with_the_same_bits(paths):
    """SIGKILL in the first batch, in a step, in a save before and after its rename, in the removal of an old one."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    root = Path(__file__).resolve().parents[2]
    done = subprocess.run(
        [sys.executable, "-c", KILLED_RUN, str(paths.root)], cwd=root, env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    seen = json.loads(done.stdout)
    assert set(seen["signals"]) == {signal.SIGKILL}
    assert seen["second"] == signal.SIGTERM, "a second signal ends the process at once"
    assert not seen["polars"], "training must run where polars is not installed"
    assert tiny.final_bytes(paths, "killed.sim80_k2") == tiny.final_bytes(paths, "whole.sim80_k2")
    folder = paths.fold_dir("killed.sim80_k2", 0)
    assert not list(folder.rglob(".part-*"))
    with (folder / ".lock").open() as handle:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # died with its process


# --- NaN and inf ---


class SquareRoot(torch.autograd.Function):
    """Identity whose gradient is not finite: a backward pass that breaks while the loss is fine."""

    @staticmethod
    def forward(_ctx: Any, x: Tensor) -> Tensor:
        return x.clone()

    @staticmethod
    def backward(_ctx: Any, grad: Tensor) -> Tensor:
        return grad * float("nan")


def nan_forward(x_BLD: Tensor) -> Tensor:
    return x_BLD * float("nan")


@pytest.mark.parametrize(
    ("fault", "seen", "phase"),
    [(nan_forward, "nonfinite_loss", "forward"), (SquareRoot.apply, "nonfinite_grad", "backward")],
)
def test_a_bad_batch_is_named_and_skipped(paths, inject, fault, seen, phase):
    inject(at_calls(fault, {3, 4}))  # call 4 is the replay of call 3
    report = fit(paths)
    assert (report.facts["steps"], report.facts["updates"]) == (12, 11)
    assert report.facts["guard"] == {"overflows": 0, "skips": 1, "skips_in_a_row": 0, "rollbacks": 0}
    (row,) = rows_of(paths, "guard")
    assert (row["seen"], row["answer"], row["step"], row["phase"], row["module"]) == (seen, "skip", 3, phase, "fault")
    assert len(row["ids"]) == row["sequences"] == 8
    assert row["largest_target"] > 0
    assert row["activations"]
    last = store_of(paths).load_newest()
    assert all(torch.isfinite(tensor).all() for tensor in (*last.weights.values(), *last.training.values()))


def test_a_resumed_run_skips_what_the_uninterrupted_one_skipped(paths, inject):
    """The same batch is bad each time: it depends on the data, not on the process."""

    def bad_for_long(x_BLD: Tensor) -> Tensor:
        return x_BLD * (float("nan") if x_BLD.shape[1] == 37 else 1.0)

    inject(bad_for_long)
    config = tiny.config(batch_size=2, data={"length_bucket": 0})
    whole = fit(paths, config, run=f"whole.{tiny.SPLIT}")
    assert 0 < whole.facts["guard"]["skips"] < 24
    fit_to_the_end(paths, config, max_steps=7)
    assert tiny.final_bytes(paths) == tiny.final_bytes(paths, f"whole.{tiny.SPLIT}")


def test_an_overflow_that_only_fp16_has_ends_in_fp32(paths, inject):
    """A model that overflows under fp16: training finishes in fp32, all weights finite."""

    def outer(x_BLD: Tensor) -> Tensor:
        big = x_BLD + 300.0
        return x_BLD + (big * big).mean(dim=-1, keepdim=True) * 1e-6  # 300 * 300 > 65504, the largest fp16

    inject(outer)
    report = fit(paths, tiny.config(precision="fp16", max_skips=2))
    assert report.facts["guard"]["rollbacks"] == 1
    assert [row["answer"] for row in rows_of(paths, "guard")] == ["skip", "skip", "roll_back"]
    (row,) = rows_of(paths, "rollback")
    assert (row["precision"], row["to_step"]) == ("fp32", 0)
    last = store_of(paths).load_newest()
    assert last.meta["precision"] == "fp32"
    assert all(torch.isfinite(tensor).all() for tensor in last.weights.values())
    assert len(rows_of(paths, "done")) == 1


def test_an_overflow_of_the_loss_scale_halves_it_and_goes_on(paths, inject):
    class Steep(torch.autograd.Function):
        @staticmethod
        def forward(_ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(_ctx: Any, grad: Tensor) -> Tensor:
            return torch.where(grad.abs() > 20, float("inf"), grad)

    inject(Steep.apply)
    report = fit(paths, tiny.config(precision="fp16", max_skips=0))
    guard = report.facts["guard"]
    assert guard["overflows"] > 0
    assert (guard["skips"], guard["rollbacks"]) == (0, 0)
    assert report.facts["updates"] == 12 - guard["overflows"]
    assert {row["seen"] for row in rows_of(paths, "guard")} == {"scaler_overflow"}


def test_what_no_fallback_cures_stops_with_a_reason(paths, inject):
    inject(nan_forward)
    with pytest.raises(
        DivergedError, match=r"nonfinite loss \(fp32\), first in the forward of fault; batch s\d+, .* 2 rollb"
    ):
        fit(paths, tiny.config(max_skips=1, max_rollbacks=2))
    assert len(rows_of(paths, "rollback")) == 2
    assert (status_of(paths)["state"], status_of(paths)["exit_code"]) == ("diverged", 4)
    assert store_of(paths).newest_meta()["progress"]["updates"] == 0
    report = paths.fold_dir(tiny.RUN, 0) / "diverged.md"
    told = [line for line in report.read_text().splitlines() if line.startswith("|")]
    assert len(told) == 2 + len(rows_of(paths, "guard")) + len(rows_of(paths, "rollback"))
    assert re.search(
        r"\| 1 \| nonfinite_loss \| fp32 \| nan \| nan \| forward \| fault \| s\d+, .* \| 0001-step-", told[2]
    )
    assert "rolled back to step 0" in report.read_text()
    inject(None)
    fit(paths, tiny.config(max_skips=1, max_rollbacks=2))
    assert not report.exists()


def test_weights_that_explode_never_reach_average_or_checkpoint(paths):
    """It ended with "0 batches left out and 1 rollback": those of the rollbacks were not counted."""
    with pytest.raises(DivergedError, match=r"nonfinite weights .*finite gradients.*; 2 batches left out and 1 rollb"):
        fit(paths, tiny.config(lr=1e37, weight_decay=0.0, schedule="constant", max_rollbacks=1))
    last = store_of(paths).load_newest()
    assert all(torch.isfinite(tensor).all() for tensor in last.training.values())


def test_the_log_says_what_the_networks_operators_run_on_and_why(paths, monkeypatch):
    monkeypatch.setenv("RNA_KERNELS", "reference")
    fit(paths, replace(tiny.config(epochs=1), model=load_config("tiny_ribonanza_mamba").model))
    (start,) = rows_of(paths, "start")
    assert start["kernels"] == (
        "causal_conv1d: reference (RNA_KERNELS=reference asks for plain PyTorch); "
        "selective_scan: reference (RNA_KERNELS=reference asks for plain PyTorch)"
    )
