"""Folds in turn, asked to stop at any moment and by a clock: predictions in time, nothing lost, every code said."""

import json
import os
import shutil
import signal
import threading
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq
import pytest

from pipeline import predict, train_folds
from pipeline.cli import warn_of_unfinished
from pipeline.errors import ConfigError, StoppedError
from pipeline.jobs import predicted_unfinished, survey, worker
from pipeline.paths import Paths
from pipeline.runlog import read_status
from pipeline.stage import Report
from pipeline.train_folds import Budget
from pipeline.training.stop import StopRequest
from tests.pipeline import tiny

ENDLESS = {"epochs": 100_000, "save_every": 100}


@pytest.fixture(autouse=True)
def known_model(monkeypatch) -> None:
    tiny.register(monkeypatch)


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    paths = Paths(comp="tiny", root=tmp_path / "artifacts")
    tiny.write_values(paths)
    return paths


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


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # the signal came between open and its `with`
def test_a_signal_at_any_moment_leaves_with_75_and_the_end_has_the_same_bits(paths):
    """While arrays are built, in steps, in saves, in validation, between training and predictions, in predictions."""
    started = time.monotonic()
    fit(paths, run=f"whole.{tiny.SPLIT}")
    span, stopped, folder = time.monotonic() - started, 0, paths.fold_dir(tiny.RUN, 0)
    for moment in range(16):
        if moment < 4:
            shutil.rmtree(paths.arrays_dir)
        timer = threading.Timer(span * (moment + 0.5) / 16, os.kill, (os.getpid(), signal.SIGTERM))
        with StopRequest(), suppress(StoppedError):  # theirs is a signal that comes when all is done
            timer.start()
            try:
                fit(paths, restart=moment % 4 == 0)
            except StoppedError:
                stopped += 1
            timer.join()
        assert worker(folder) is None
        assert read_status(folder).get("state") != "running"
        assert not list(paths.root.rglob(".*part-*"))
    assert stopped > 4
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


# --- time budget ---


def test_a_budget_leaves_time_for_predictions_which_are_marked_and_made_again(paths, capsys):
    config = tiny.config(**ENDLESS)
    started = time.monotonic()
    with pytest.raises(StoppedError, match="its best weights so far have predicted") as stopped:
        fit(paths, config, budget=Budget(seconds=5.0))
    assert time.monotonic() - started < 5.0
    assert stopped.value.exit_code == 75
    said = capsys.readouterr().err
    assert f"{tiny.RUN} fold0: training until" in said
    assert "kept for predictions" in said
    folder = paths.fold_dir(tiny.RUN, 0)
    assert (read_status(folder)["state"], read_status(folder)["exit_code"]) == ("stopped", 75)
    assert pq.read_table(paths.oof(tiny.RUN, 0)).num_rows == 32
    assert predicted_unfinished(folder)
    warn_of_unfinished(paths, [tiny.RUN])
    assert "fold0 predicted before the training was finished" in capsys.readouterr().err

    step = read_status(folder)["step"]
    with pytest.raises(StoppedError):
        fit(paths, config, budget=Budget(seconds=3.0))
    assert read_status(folder)["step"] > step


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


def test_the_budget_is_for_all_folds(paths):
    """The second fold is not begun with what the first one left, and says so."""
    with pytest.raises(StoppedError, match=r"fold0.*the time budget is spent before the training is finished"):
        fit(paths, tiny.config(**ENDLESS), folds=(0, 1), budget=Budget(seconds=3.0))
    assert not paths.fold_dir(tiny.RUN, 1).exists()
    late = Budget(seconds=600.0, started=time.monotonic() - 599.9)
    with pytest.raises(StoppedError, match=r"fold1: .* of the time budget are left.*not begun"):
        fit(paths, folds=(1,), budget=late)


def test_a_budget_that_predictions_alone_would_use_up_is_refused(paths, monkeypatch):
    monkeypatch.setattr(predict, "estimate", lambda *_, **__: 5.0)
    with pytest.raises(ConfigError, match=r"predictions alone may take .*a larger --time-budget"):
        fit(paths, budget=Budget(seconds=6.0))


def test_the_reserve_grows_with_the_predictions_and_has_a_floor():
    budget = Budget(seconds=8 * 3600.0)
    assert budget.reserve(1.0) == 120.0
    assert budget.reserve(760.0) == 1.5 * 760.0
    assert Budget(seconds=20.0).reserve(0.1) == 2.0


@pytest.mark.parametrize("kind", ["values", "structure"])
def test_the_estimate_covers_what_predictions_take(kind, tmp_path):
    competition = tiny.TINY if kind == "values" else tiny.TINY3D
    paths = Paths(comp=competition.name, root=tmp_path)
    (tiny.write_values if kind == "values" else tiny.write_structures)(paths, count=6, tests=2)
    config = tiny.config(epochs=1, data={"max_length": 24})
    expected = predict.estimate(config, competition=competition, paths=paths, split=tiny.SPLIT, fold=0)
    fit(paths, config, competition=competition)
    for path in (paths.oof(tiny.RUN, 0), paths.test(tiny.RUN, 0)):
        path.unlink()
    report = predict.run(competition=competition, paths=paths, run=tiny.RUN, fold=0)
    assert 0 < expected < 20 * report.seconds + 0.1
    assert train_folds.Budget(seconds=600).reserve(expected) > report.seconds
