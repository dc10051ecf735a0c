"""A run goes on under other settings only where that was asked for and does no harm, and says what is different."""

import copy
import dataclasses
import errno
import re
import subprocess
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from models.registry import list_models
from pipeline import cli, predict, train
from pipeline.competitions import get_competition
from pipeline.config import RunConfig, config_from_dict, list_configs, load_config
from pipeline.errors import ConfigError, DataError, StoppedError
from pipeline.labels import Classes
from pipeline.paths import Paths
from pipeline.training import announce, optim, resume, state
from pipeline.training.checkpoint import CheckpointStore
from tests.pipeline import tiny
from tests.pipeline.tiny import fit, rows_of

pytestmark = pytest.mark.usefixtures("known_model")

LONGER = f"longer.{tiny.SPLIT}"


@pytest.fixture
def said(monkeypatch) -> list[str]:
    lines: list[str] = []
    for module in (train, announce):
        monkeypatch.setattr(module, "say", lines.append)
    monkeypatch.setattr(resume, "warn", lines.append)
    return lines


def begin(paths: Paths, config: RunConfig | None = None, *, steps: int = 5) -> None:
    with pytest.raises(StoppedError):
        fit(paths, config, max_steps=steps)


@pytest.mark.parametrize("steps", [5, None], ids=["stopped", "finished"])
def test_a_run_with_more_epochs_ends_as_one_that_had_them_from_the_start(paths, steps):
    """At a constant rate: other schedules are those of the longer run from the change on."""
    short, long = (tiny.config(schedule="constant", epochs=epochs) for epochs in (2, 3))
    fit(paths, long, run=LONGER)
    if steps:
        begin(paths, short, steps=steps)
    else:
        fit(paths, short)
    report = fit(paths, long, allow_changes=True)
    assert (report.status, report.facts["epochs"]) == ("built", 3)
    assert tiny.final_bytes(paths) == tiny.final_bytes(paths, LONGER)
    assert fit(paths, long).status == "current", "the settings that it ended with are its own now"


def test_every_change_is_said_and_logged_and_a_jump_of_the_learning_rate_with_it(paths, said):
    begin(paths)
    fit(paths, tiny.config(epochs=6, patience=4, save_every=2), allow_changes=True)
    told = "\n".join(said)
    assert "config.train.epochs 3 -> 6: the learning rate follows the schedule of the longer run" in told
    assert "the next update's learning rate 6.55e-03 -> 9.51e-03" in told
    assert "config.train.patience 0 -> 4" in told
    assert {row["key"] for row in rows_of(paths, "changed")} == {
        "config.train.epochs",
        "config.train.patience",
        "config.train.save_every",
    }
    assert {row["step"] for row in rows_of(paths, "changed")} == {5}


HARMLESS = {
    "patience": 3,
    "save_every": 1,
    "max_skips": 1,
    "max_rollbacks": 1,
    "micro_batch": 4,
    "gradient_checkpointing": 1,
    "spike_threshold": 50.0,
}


@pytest.mark.parametrize("name", HARMLESS)
def test_a_harmless_change_needs_the_flag_and_gets_through_with_it(paths, name):
    begin(paths)
    changed = tiny.config(**{name: HARMLESS[name]})
    with pytest.raises(ConfigError, match=rf"config\.train\.{name} .*Next: --allow-changes \(make: ALLOW_CHANGES=1\)"):
        fit(paths, changed)
    assert fit(paths, changed, allow_changes=True).facts["steps"] == 12


@pytest.mark.parametrize(
    "changes",
    [
        {"lr": 0.5},
        {"seed": 1},
        {"batch_size": 4},
        {"epochs": 2},
        {"precision": "bf16"},
        {"ema_decay": 0.5},
        {"model": {"width": 12}},
        {"data": {"flip": 0.5}},
    ],
    ids=lambda changes: next(iter(changes)),
)
def test_a_change_that_makes_another_run_of_it_is_refused_with_the_flag_too(paths, changes):
    begin(paths)
    before = {path: path.read_bytes() for path in paths.fold_dir(tiny.RUN, 0).rglob("*") if path.is_file()}
    with pytest.raises(
        ConfigError, match=r"this run was begun with other settings .*Next: leave config\.\S+ as it was .* in SET\)"
    ):
        fit(paths, tiny.config(**{"patience": 9, **changes}), allow_changes=True)
    assert all(path.read_bytes() == data for path, data in before.items())


def test_changed_data_are_refused_with_the_flag_too(paths):
    begin(paths)
    tiny.write_values(paths, seed=2)
    with pytest.raises(ConfigError, match=r"data\.examples"):
        fit(paths, allow_changes=True)


def test_the_flag_without_a_run_is_refused(paths):
    with pytest.raises(ConfigError, match="no run was begun here that could be changed"):
        fit(paths, allow_changes=True)


def test_a_run_begun_by_a_toml_that_has_changed_since_is_told_what_it_takes_to_go_on(paths):
    """An update moved a preset to another optimiser: TAG and RESTART were all that was offered, both from step 0.

    With folds not begun yet ALLOW_CHANGES had no way on: "no run was begun here that could be changed".
    """
    begin(paths)
    with pytest.raises(ConfigError) as caught:
        fit(paths, tiny.config(lr=0.5, optimizer="muon", epochs=4))
    told = re.search(r"Next: the same command with (.*) in SET \(--set\) and ALLOW_CHANGES=1", str(caught.value))
    overrides = told.group(1).split()
    assert overrides == ["train.epochs=3", "train.lr=0.01", 'train.optimizer="adamw"']
    before = config_from_dict(tomllib.loads("\n".join(["model.name='tiny'", *overrides])), where="SET").train
    assert (before.epochs, before.lr, before.optimizer) == (3, 0.01, "adamw")
    assert fit(paths, allow_changes=True).facts["steps"] == 12
    assert fit(paths, allow_changes=True, fold=1).status == "built", "make train-all goes on to the other folds"


@pytest.mark.parametrize("place", ["data", "network"])
def test_what_no_setting_can_undo_offers_none(paths, place, monkeypatch):
    begin(paths)
    if place == "data":
        tiny.write_values(paths, seed=2)
    else:
        monkeypatch.setattr(CheckpointStore, "newest_meta", _with_setting_that_is_gone(CheckpointStore.newest_meta))
    with pytest.raises(ConfigError) as caught:
        fit(paths)
    assert " in SET" not in str(caught.value)


def _with_setting_that_is_gone(newest_meta):
    def changed(store: CheckpointStore) -> dict:
        meta = copy.deepcopy(newest_meta(store))
        meta["config"]["model"]["kwargs"]["gone"] = 3
        return meta

    return changed


# --- other code ---


@pytest.mark.parametrize("part", ["network", "optimiser", "counters"])
def test_a_checkpoint_of_other_code_is_refused_in_a_sentence(paths, part, monkeypatch):
    """RuntimeError: Missing key(s) in state_dict; ValueError: a different number of parameter groups."""
    config = tiny.config(optimizer="muon")
    begin(paths, config)
    if part == "network":
        monkeypatch.setattr(tiny, "Fault", lambda: torch.nn.Linear(8, 8))
    elif part == "optimiser":
        monkeypatch.setattr(optim, "hidden_apart", lambda _model, groups: [g | {"orthogonal": False} for g in groups])
    else:
        monkeypatch.setattr(state.Progress, "from_dict", lambda tree: state.Progress(**tree, counter=3))
    before = CheckpointStore(paths.fold_dir(tiny.RUN, 0) / "checkpoints").newest_meta()
    with pytest.raises(
        DataError, match=r"step-0*5: does not fit today's code \(.+\); .* Next: take the code that wrote"
    ):
        fit(paths, config)
    monkeypatch.undo()
    tiny.register(monkeypatch)
    assert CheckpointStore(paths.fold_dir(tiny.RUN, 0) / "checkpoints").newest_meta() == before
    assert fit(paths, config).facts["steps"] == 12


def test_predictions_by_other_code_are_refused_in_a_sentence(paths, monkeypatch):
    fit(paths, tiny.config(epochs=1))
    monkeypatch.setattr(tiny, "Fault", lambda: torch.nn.Linear(8, 8))
    with pytest.raises(DataError, match=r"does not fit today's code .*Missing key.*fault\.weight"):
        predict.run(competition=tiny.TINY, paths=paths, run=tiny.RUN, fold=0)


def test_more_patience_opens_a_run_that_had_lost_it(paths):
    config = {"epochs": 20, "lr": 1e-12, "ema_decay": 0.0, "schedule": "constant", "model": {"dropout": 0.0}}
    ended = fit(paths, tiny.config(**config, patience=1)).facts["epochs"]
    again = fit(paths, tiny.config(**config, patience=3), allow_changes=True).facts["epochs"]
    assert ended < again < 20


@pytest.mark.parametrize("unit", [0.001, 1000.0])
def test_a_run_that_chose_its_best_epoch_by_the_metric_goes_on_by_it(unit):
    """Its metric, in the units of the data, was compared with deviations: every later epoch was the best, or none."""
    begun = dataclasses.asdict(state.Progress(step=8, best_metric=2 * unit, best_step=4, stale_epochs=1))
    del begun["best_choice"]  # as older checkpoints are
    progress = state.Progress.from_dict(begun)
    assert [progress.enter(metric * unit, choice) for metric, choice in [(2.5, 0.1), (1.5, 0.9), (1.6, 0.1)]] == [
        False,
        True,
        False,
    ]
    assert (progress.best_metric, progress.best_step, progress.stale_epochs) == (1.5 * unit, 8, 1)


# --- the network's arguments ---


def test_a_checkpoint_knows_every_argument_of_its_network(paths):
    fit(paths, tiny.config(model={"width": 12}))
    meta = CheckpointStore(paths.fold_dir(tiny.RUN, 0) / "checkpoints").newest_meta()
    assert meta["config"]["model"]["kwargs"] == {"width": 12, "dropout": 0.1, "use_bpp": False, "coordinates": False}


def test_a_default_that_changed_in_the_code_is_noticed(paths, monkeypatch):
    begin(paths)
    monkeypatch.setitem(tiny.TinyModel.__init__.__kwdefaults__, "dropout", 0.5)
    with pytest.raises(ConfigError, match=r"config\.model\.kwargs\.dropout 0\.1 -> 0\.5"):
        fit(paths)


@pytest.mark.parametrize(
    ("setting", "refused"),
    [({}, ""), ({"width": 9}, r"model\.kwargs\.width 8 -> 9"), ({"dropout": 0.0}, "dropout 0.1 -> 0.0")],
)
def test_a_setting_that_is_new_in_the_code_is_at_its_default_in_a_run_that_was_begun_before(paths, setting, refused):
    """After an update of the code every run was refused: "config.data.crop (absent) -> 0; … num_classes 0 -> (absent)".

    And one whose own setting changed as well is still refused.
    """
    begin(paths)
    store = CheckpointStore(paths.fold_dir(tiny.RUN, 0) / "checkpoints")
    newest = store.load_newest()
    old = copy.deepcopy({key: value for key, value in newest.meta.items() if key not in ("files", "format")})
    for name in ("width", "use_bpp"):
        del old["config"]["model"]["kwargs"][name]
    del old["config"]["train"]["warmup"]
    old["config"]["model"]["kwargs"]["gone"] = 0
    store.save(old.pop("step"), weights=newest.weights, training=newest.training, state=newest.state, meta=old)
    if refused:
        with pytest.raises(ConfigError, match=refused):
            fit(paths, tiny.config(model=setting))
    else:
        assert fit(paths).status == "built"
        assert rows_of(paths, "start")[1]["resumed_step"] > 0


@pytest.mark.parametrize("name", list_configs())
def test_the_settings_a_checkpoint_keeps_build_the_network_of_its_toml(name):
    config = load_config(name)
    task: tuple = (tiny.TINY,)
    if "pool" in config.model.kwargs:  # of classes
        task = (get_competition("labelled"), Classes(("a", "b"), (1, 1), True, "ACGUN"))
    with torch.device("meta"):
        model = train.build_model(config.model, *task)
        kept = config_from_dict(train.resolved_config(config, model), where="kept")
        again = train.build_model(kept.model, *task)
    assert {key: tensor.shape for key, tensor in again.state_dict().items()} == {
        key: tensor.shape for key, tensor in model.state_dict().items()
    }
    assert kept.train == config.train
    assert kept.model.kwargs.items() >= config.model.kwargs.items()


def test_the_range_of_figures_is_no_setting(tmp_path):
    """A run that was begun when all targets of a set shared one would have been refused."""
    wanted = {"facts": {"metric": "MAE", "shown_ranges": [[0.0, 1.0]]}}
    assert resume.require_same(wanted, {"facts": {"metric": "MAE", "shown_range": [0.0, 2.0]}}, where=tmp_path) == []
    with pytest.raises(ConfigError, match=r"facts\.metric RMSE -> MAE\. Next"):
        resume.require_same(wanted, {"facts": {"metric": "RMSE", "shown_range": [0.0, 2.0]}}, where=tmp_path)


def test_every_network_has_a_config():
    assert {load_config(name).model.name for name in list_configs()} >= set(list_models()) - {"tiny"}


# --- where it is computed ---


def test_another_number_of_threads_is_warned_of_on_the_cpu(paths, said):
    threads = torch.get_num_threads()
    begin(paths)
    try:
        torch.set_num_threads(threads + 1)
        begin(paths, steps=2)
    finally:
        torch.set_num_threads(threads)
    warnings = [line for line in said if "will not end with the same bits" in line]
    assert len(warnings) == 1
    assert f"threads {threads} -> {threads + 1}" in warnings[0]
    fit(paths)
    meta = CheckpointStore(paths.fold_dir(tiny.RUN, 0) / "checkpoints").newest_meta()
    assert meta["environment"]["threads"] == threads, "the one that the run was begun with"


def test_the_same_environment_is_not_warned_of(paths, said):
    begin(paths, steps=2)
    begin(paths, steps=2)
    assert not any("bits" in line for line in said)


# --- the command line ---


def test_a_run_may_be_changed_under_its_own_name_where_that_was_asked_for(tmp_path, capsys):
    """--set without --tag is refused otherwise: it would begin another run under the name of this one."""
    words = ["train", "--artifacts", str(tmp_path), "--model", "hyena", "--set", "train.epochs=99"]
    assert cli.run_verb(words) == ConfigError.exit_code
    assert "name the variant" in capsys.readouterr().err
    assert cli.run_verb([*words, "--allow-changes"]) == DataError.exit_code, "there is no data in an empty folder"


def test_make_hands_the_flag_on():
    root = Path(__file__).resolve().parents[2]
    words = ["make", "-n", "train", "PY=python3", "SET=train.epochs=99", "ALLOW_CHANGES=1"]
    done = subprocess.run(words, cwd=root, capture_output=True, text=True, check=True)
    assert "--set 'train.epochs=99'" in done.stdout
    assert "--allow-changes" in done.stdout


def test_folds_of_one_run_with_different_settings_are_told_apart_as_the_second_begins(paths, said):
    """SET changed between two folds and TAG did not: an ensemble took both as one network without a word."""
    fit(paths, tiny.config(epochs=1))
    fit(paths, tiny.config(epochs=1, save_every=0), fold=1)
    assert not [line for line in said if "fold" in line and "other settings" in line]
    fit(paths, tiny.config(epochs=2, lr=1e-3), fold=1, restart=True)
    (line,) = [line for line in said if "other settings" in line]
    assert line.startswith(f"{tiny.RUN} fold1: fold0 of this run was trained with other settings: config.train.epochs ")
    assert "config.train.epochs 1 -> 2; config.train.lr 0.01 -> 0.001; scores and ensembles" in line


def test_a_fold_that_this_user_may_not_read_keeps_nobody_from_training_another(paths, monkeypatch):
    """It ended with "Permission denied" for the sake of a warning."""

    def refuse() -> None:
        raise PermissionError(errno.EACCES, "Permission denied")

    paths.fold_dir(tiny.RUN, 0).mkdir(parents=True)
    monkeypatch.setattr(resume, "CheckpointStore", lambda _: SimpleNamespace(newest_meta=refuse))
    assert fit(paths, tiny.config(epochs=1), fold=1).status == "built"


def test_folds_whose_size_decides_their_epochs_differ_in_nothing_else(paths, said, monkeypatch):
    monkeypatch.setattr("pipeline.config.AUTO_STEPS", 8)
    monkeypatch.setattr("pipeline.config.AUTO_EPOCHS", 1)
    fit(paths, tiny.config(epochs=1))
    fit(paths, tiny.config(epochs="auto"), fold=1)
    assert CheckpointStore(paths.fold_dir(tiny.RUN, 1) / "checkpoints").newest_meta()["config"]["train"]["epochs"] == 2
    assert not [line for line in said if "other settings" in line]


def test_a_run_that_goes_on_where_its_bits_cannot_be_met_is_told_what_is_other(paths, said, monkeypatch):
    begin(paths, steps=3)
    begin(paths, steps=5)
    assert not [line for line in said if "goes on with" in line]
    monkeypatch.setattr(torch, "get_num_threads", lambda: 99)
    fit(paths)
    (line,) = [line for line in said if "goes on with" in line]
    assert re.fullmatch(rf"{tiny.RUN} fold0: goes on with threads \d+ -> 99: as good a run, but sums round .*", line)
    assert torch.__version__.startswith(resume.environment(torch.device("cpu"))["torch"])
