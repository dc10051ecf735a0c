"""Folds in turn, asked to stop at any moment and by a clock: predictions in time, nothing lost, every code said."""

import errno
import json
import math
import os
import shutil
import signal
from contextlib import nullcontext, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pyarrow.parquet as pq
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from models.interface import RnaInputs, RnaOutputs
from pipeline import inference, predict, train, train_folds
from pipeline.errors import ConfigError, DataError, StoppedError
from pipeline.jobs import survey, worker
from pipeline.paths import Paths
from pipeline.runlog import read_status
from pipeline.runs import predicted_unfinished, warn_of_unfinished
from pipeline.stage import Report
from pipeline.train_folds import Budget
from pipeline.training import stop
from pipeline.training.stop import StopRequest
from tests.pipeline import tiny
from tests.pipeline.clock import Clock, watched

pytestmark = pytest.mark.usefixtures("known_model")

ENDLESS = {"epochs": 100_000, "save_every": 100}


def fit(paths: Paths, config=None, *, run: str = tiny.RUN, folds=(0,), **options: Any) -> list[Report]:
    reports: list[Report] = []
    settings = {"competition": tiny.TINY, "split": tiny.SPLIT, "show": reports.append, **options}
    train_folds.run(config or tiny.config(), paths=paths, run=run, folds=folds, **settings)
    return reports


def tables(paths: Paths, run: str = tiny.RUN) -> list[bytes]:
    return [paths.oof(run, 0).read_bytes(), paths.test(run, 0).read_bytes()]


def test_every_fold_is_trained_and_predicted_in_turn(paths):
    reports = fit(paths, folds=(0, 1))
    assert [report.stage for report in reports] == ["train", "predict"] * 2
    assert {report.status for report in fit(paths, folds=(0, 1))} == {"current"}
    rows = survey(paths.root)
    assert [(row["fold"], row["state"], row["exit_code"], row["percent"]) for row in rows] == [
        (0, "done", 0, 100.0),
        (1, "done", 0, 100.0),
    ]


def test_the_best_metric_is_told_at_the_end(paths, capsys):
    """The bar with it vanished: "train: done in 22.5 s" and two paths were all that stayed."""
    (report, _) = fit(paths)
    best, step = report.facts["metric"], report.facts["best_step"]
    assert f"{tiny.RUN} fold0: best MAE {best:.4f} at step {step}\n" in capsys.readouterr().err


def test_a_missing_fold_table_is_told_before_pairs_are_computed(paths, monkeypatch):
    """make train SPLIT=sim80_k7 computed base-pair probabilities for three minutes, then said that."""
    monkeypatch.setattr(train_folds.bpp, "run", lambda *_: pytest.fail("began"))
    config = tiny.config()
    config = replace(config, model=replace(config.model, kwargs={**config.model.kwargs, "use_bpp": True}))
    with pytest.raises(DataError, match=r"no fold table\. Next: make folds"):
        fit(paths, config, split="sim80_k7")


@pytest.mark.parametrize(
    ("kwargs", "settings", "sentence"),
    [
        ({"widht": 3}, {}, "no argument 'widht'. Did you mean 'width'"),
        ({"width": math.nan}, {}, r"width: got nan \(float\); expected int"),
        ({}, {"focal_gamma": 2.0}, r"focal_gamma = 2\.0 means nothing"),
    ],
)
def test_settings_without_sense_are_told_before_pairs_are_computed(paths, monkeypatch, kwargs, settings, sentence):
    """They were told after minutes of pairing; of NaN came "Out of range float values are not JSON compliant"."""
    monkeypatch.setattr(train_folds.bpp, "run", lambda *_: pytest.fail("began"))
    config = tiny.config(**settings)
    config = replace(config, model=replace(config.model, kwargs={**config.model.kwargs, "use_bpp": True, **kwargs}))
    with pytest.raises(ConfigError, match=sentence):
        fit(paths, config)
    assert not paths.run_dir(tiny.RUN).exists()


def test_settings_without_sense_end_all_processes_together(paths, monkeypatch):
    """With NPROC=2 the second one left while the first still looked, which then said "stopped (SIGTERM)", code 75."""
    met: list[Any] = []
    second = SimpleNamespace(is_main=False, size=2, together=lambda work: met.append(work) or work())
    monkeypatch.setattr(train_folds, "join", lambda **_: nullcontext(second))
    with pytest.raises(ConfigError, match="focal_gamma"):
        fit(paths, tiny.config(focal_gamma=2.0))
    assert len(met) == 1


@pytest.mark.parametrize("budget", [None, Budget(seconds=600.0)])
def test_a_finished_run_on_a_read_only_disk_is_current(paths, read_only, capsys, budget):
    """It said "…/fold0/.job: Read-only file system" and left with exit code 5, though there was nothing to do."""
    fit(paths)
    capsys.readouterr()
    read_only(paths.root)
    assert [report.status for report in fit(paths, budget=budget)] == ["current", "current"]
    assert capsys.readouterr().err == ""


def test_an_unfinished_run_on_a_read_only_disk_is_refused_by_the_system(paths, read_only):
    with suppress(StoppedError):
        fit(paths, max_steps=5)
    read_only(paths.root)
    with pytest.raises(OSError, match="Read-only file system"):
        fit(paths)


def test_a_full_disk_is_told_with_its_place_and_a_run_that_did_not_begin_leaves_no_trace(paths, monkeypatch):
    """It said "No space left on device. Next: check the path", and did not say which, and left an empty run behind."""
    fit(paths)  # the arrays are there
    write = Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        write(path, b"")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(Path, "write_bytes", full)
    with pytest.raises(OSError, match="No space left on device") as caught:
        fit(paths, run=f"other.{tiny.SPLIT}")
    assert str(caught.value.filename).endswith("config.json")
    assert not paths.run_dir(f"other.{tiny.SPLIT}").exists()


def test_a_signal_while_gradients_are_switched_waits_until_somebody_polls(monkeypatch):
    """It was raised in torch.no_grad().__exit__: gradients stayed off, and the next step said "element 0 of tensors
    does not require grad".
    """
    switch = torch.set_grad_enabled

    def signalled(mode: bool) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        switch(mode)

    with StopRequest() as stop:
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(torch, "set_grad_enabled", signalled)
        assert torch.is_grad_enabled()
        assert stop.reason() == "SIGTERM"


def test_a_signal_while_torch_asks_a_mode_waits_until_somebody_polls():
    """Raised while `plan` counted, in about one place of twenty, it ended in torch's C++: Aborted, exit code 134."""

    class Signalled(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            os.kill(os.getpid(), signal.SIGTERM)
            return func(*args, **(kwargs or {}))

    with StopRequest() as stop:
        with Signalled():
            made = torch.ones(2)
        assert made.tolist() == [1.0, 1.0]
        assert stop.reason() == "SIGTERM"


# the signal may come between open and its `with`, or while an object is removed; it is remembered then
@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")
@pytest.mark.filterwarnings("ignore:Exception ignored in:pytest.PytestUnraisableExceptionWarning")
def test_a_signal_at_any_moment_leaves_with_75_and_the_end_has_the_same_bits(paths):
    """While arrays are built, in steps, in saves, in validation, between training and predictions, in predictions."""
    fit(paths, run=f"whole.{tiny.SPLIT}")
    shutil.rmtree(paths.arrays_dir)
    calls, stopped, folder = watched(partial(fit, paths)), 0, paths.fold_dir(tiny.RUN, 0)
    for moment in range(16):
        if moment < 4:
            shutil.rmtree(paths.arrays_dir, ignore_errors=True)
        with StopRequest(), suppress(StoppedError):  # theirs is a signal that comes when all is done
            try:
                again = moment % 4 == 0 or moment > 8
                watched(partial(fit, paths, restart=again), at=round(calls * (moment + 0.5) / 16))
            except StoppedError:
                stopped += 1
        assert worker(folder) is None
        assert read_status(folder).get("state") != "running"
        assert not list(paths.root.rglob(".*part-*"))
    assert stopped > 10
    fit(paths)
    assert tables(paths) == tables(paths, f"whole.{tiny.SPLIT}")


def test_a_signal_between_training_and_predictions_keeps_the_training(paths):
    def show(report: Report) -> None:
        if report.stage == "train":
            os.kill(os.getpid(), signal.SIGTERM)

    with pytest.raises(StoppedError, match="SIGTERM"):
        fit(paths, show=show)
    assert read_status(paths.fold_dir(tiny.RUN, 0))["state"] == "stopped"
    assert [report.status for report in fit(paths)] == ["current", "built"]


def test_a_signal_in_the_predictions_leaves_nothing_half_written(paths, monkeypatch):
    forward = tiny.TinyModel.forward

    def signalled(self, inputs):
        os.kill(os.getpid(), signal.SIGTERM)
        return forward(self, inputs)

    fit(paths)
    folder = paths.fold_dir(tiny.RUN, 0)
    expected = tables(paths)
    for path in (paths.oof(tiny.RUN, 0), paths.test(tiny.RUN, 0)):
        path.unlink()
    monkeypatch.setattr(tiny.TinyModel, "forward", signalled)
    with pytest.raises(StoppedError, match=r"stopped \(SIGTERM\); nothing is half-written"):
        fit(paths)
    monkeypatch.setattr(tiny.TinyModel, "forward", forward)
    assert not [path.name for path in folder.iterdir() if "oof" in path.suffixes or "part" in path.name]
    assert survey(paths.root)[0]["state"] == "stopped"
    fit(paths)
    assert tables(paths) == expected


def test_a_start_that_is_refused_leaves_what_was_done_before_and_nothing_else(paths):
    table = paths.fold_table(tiny.SPLIT)
    folds = table.read_bytes()
    table.unlink()
    with pytest.raises(DataError, match="make folds"):
        fit(paths)
    assert not (paths.home / "runs").exists()
    table.write_bytes(folds)
    with pytest.raises(ConfigError, match="no argument 'widht'"):
        fit(paths, tiny.config(model={"widht": 9}))
    assert survey(paths.root) == []
    fit(paths)
    with pytest.raises(ConfigError, match="other settings"):
        fit(paths, tiny.config(lr=0.5))
    assert [row["state"] for row in survey(paths.root)] == ["done"]


def test_a_signal_while_the_end_is_told_leaves_no_run_that_says_it_is_at_work(paths, monkeypatch):
    """All was done, the status said "running", and make status showed a run that was lost."""
    tell = train_folds.tell_status

    def signalled(*told: Any) -> None:
        os.kill(os.getpid(), signal.SIGTERM)
        tell(*told)

    with monkeypatch.context() as patch:
        patch.setattr(train_folds, "tell_status", signalled)
        with pytest.raises(StoppedError):
            fit(paths)
    assert survey(paths.root)[0]["state"] == "stopped"
    assert {report.status for report in fit(paths)} == {"current"}
    assert survey(paths.root)[0]["state"] == "done"


# --- time budget ---


@pytest.fixture
def clock(monkeypatch) -> Clock:
    """A step takes an eighth of a second, and predictions are expected to take a whole one."""
    clock = Clock(monkeypatch, train_folds, stop)
    clock.move_by_steps(monkeypatch, 0.125)
    monkeypatch.setattr(predict, "estimate", lambda *_, **__: 1.0)
    return clock


def test_a_budget_leaves_time_for_predictions_which_are_marked_and_made_again(paths, clock, capsys):
    config = tiny.config(**ENDLESS)
    with pytest.raises(StoppedError, match="its best weights so far have predicted") as stopped:
        fit(paths, config, budget=Budget(seconds=5.0))
    assert clock.now == 3.5, "half a second more than they are expected to take is kept"
    assert stopped.value.exit_code == 75
    said = capsys.readouterr().err
    assert f"{tiny.RUN} fold0: training until 4 s, 2 s kept for predictions (expected: 1.0 s)" in said
    folder = paths.fold_dir(tiny.RUN, 0)
    assert (read_status(folder)["state"], read_status(folder)["exit_code"]) == ("stopped", 75)
    assert pq.read_table(paths.oof(tiny.RUN, 0)).num_rows == 32
    assert predicted_unfinished(folder)
    warn_of_unfinished(paths, [tiny.RUN])
    assert "fold0 predicted before the training was finished" in capsys.readouterr().err

    assert read_status(folder)["step"] == 28
    with pytest.raises(StoppedError):
        fit(paths, config, budget=Budget(seconds=3.0))
    assert read_status(folder)["step"] == 40


def test_predictions_of_a_finished_training_are_not_marked_even_with_the_same_weights(paths):
    """A run whose best epoch was found before it was interrupted predicts twice with one checkpoint."""
    config = tiny.config(lr=1e-12, schedule="constant", ema_decay=0.0, model={"dropout": 0.0})
    with suppress(StoppedError):
        fit(paths, config, max_steps=5)
    folder = paths.fold_dir(tiny.RUN, 0)
    run = {"competition": tiny.TINY, "paths": paths, "run": tiny.RUN, "fold": 0}
    predict.run(**run)
    assert predicted_unfinished(folder)
    fit(paths, config)
    assert not predicted_unfinished(folder)
    assert "unfinished" not in json.loads((folder / "predict-oof.manifest.json").read_text())["params"]


def test_a_finished_training_within_the_budget_is_no_stop(paths):
    reports = fit(paths, folds=(0, 1), budget=Budget(seconds=600.0))
    assert [report.stage for report in reports] == ["train", "predict"] * 2


def test_the_budget_is_for_all_folds(paths, clock):
    """The second fold is not begun with what the first one left, and says so."""
    with pytest.raises(StoppedError, match=r"fold0.*the time budget is spent before the training is finished"):
        fit(paths, tiny.config(**ENDLESS), folds=(0, 1), budget=Budget(seconds=3.0))
    assert not paths.fold_dir(tiny.RUN, 1).exists()
    late = Budget(seconds=600.0, started=clock.now - 599.9)
    with pytest.raises(StoppedError, match=r"fold1: .* of the time budget are left.*not begun"):
        fit(paths, folds=(1,), budget=late)


def test_what_comes_first_is_seen_stopped_and_counted_as_work_of_the_first_fold(paths, clock):
    """A job in the background held nothing while pairs were computed: its terminal waited, and `status` was empty."""
    seen = []

    def beforehand():
        (row,) = survey(paths.root)
        seen.append((row["fold"], row["state"], row["phase"], row["pid"]))
        clock.now += 599.9

    with pytest.raises(StoppedError, match=r"fold1: 0 s of the time budget are left.*not begun"):
        fit(paths, folds=(1, 0), beforehand=beforehand, budget=Budget(seconds=600.0))
    assert seen == [(1, "running", "preparing", os.getpid())]
    assert not paths.fold_dir(tiny.RUN, 0).exists()


def test_settings_without_sense_are_told_before_anything_that_takes_minutes(paths):
    """`make train-all COMP=rna3d MODEL=<typo>` predicted without networks first."""
    config = tiny.config(model={"width": -1})
    with pytest.raises(ConfigError, match="width"):
        fit(paths, config, beforehand=lambda: pytest.fail("begun"))


def test_a_budget_that_predictions_alone_would_use_up_is_refused(paths, monkeypatch):
    monkeypatch.setattr(predict, "estimate", lambda *_, **__: 5.0)
    with pytest.raises(ConfigError, match=r"predictions alone may take .*a larger BUDGET"):
        fit(paths, budget=Budget(seconds=6.0))


def test_the_reserve_grows_with_the_predictions_and_has_a_floor():
    budget = Budget(seconds=8 * 3600.0)
    assert budget.reserve(1.0) == 120.0
    assert budget.reserve(760.0) == 1.5 * 760.0
    assert Budget(seconds=20.0).reserve(0.1) == 2.0


@pytest.mark.parametrize("kind", ["values", "structure"])
def test_the_estimate_covers_what_predictions_take(kind, tmp_path, monkeypatch):
    """On a clock by which the network takes a millisecond for a nucleotide."""
    competition = tiny.TINY if kind == "values" else tiny.TINY3D
    paths = Paths(comp=competition.name, root=tmp_path)
    (tiny.write_values if kind == "values" else tiny.write_structures)(paths, count=16, tests=5)
    config = tiny.config(epochs=1, data={"max_length": 24})
    run = {"competition": competition, "paths": paths}
    monkeypatch.setattr(inference, "BATCH_TOKENS", 200)
    train.run(config, competition=competition, paths=paths, run=tiny.RUN, split=tiny.SPLIT, fold=0)
    clock, forward = Clock(monkeypatch, predict), tiny.TinyModel.forward

    def timed(model: tiny.TinyModel, inputs: RnaInputs) -> RnaOutputs:
        clock.now += 1e-3 * inputs.tokens_BL.numel()
        return forward(model, inputs)

    monkeypatch.setattr(tiny.TinyModel, "forward", timed)
    expected, begun = predict.estimate(config, **run, split=tiny.SPLIT, fold=0), clock.now
    predict.run(**run, run=tiny.RUN, fold=0)
    assert expected == pytest.approx(clock.now - begun, rel=0.2)
    assert Budget(seconds=10.0).reserve(expected) > clock.now - begun
