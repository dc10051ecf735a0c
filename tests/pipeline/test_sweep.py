"""A sweep does every job once, resumes, shares its work, and ranks only what can be told apart."""

import hashlib
import itertools
import json
import math
import os
import re
import signal
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from models import registry
from pipeline.errors import BusyError, ConfigError, DataError, StoppedError
from pipeline.paths import Paths
from pipeline.stage import Report
from pipeline.sweep import jobs, stage, study
from pipeline.sweep.jobs import Axis, Job, Settings, Sweep, grid, parse_axis
from pipeline.sweep.ranking import describe, summarise
from pipeline.training.stop import run_lock
from tests.pipeline import tiny

CONFIG = """
[model]
name = "tiny"
[data]
max_length = 40
[train]
epochs = 1
batch_size = 16
lr = 1e-2
"""


@pytest.fixture
def small(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Sweep:
    tiny.register(monkeypatch)
    assert "tiny" in registry.list_models()
    paths = Paths(comp="tiny", root=tmp_path / "artifacts")
    tiny.write_values(paths, count=32)
    config = tmp_path / "tiny.toml"
    config.write_text(CONFIG)
    shared = {"competition": tiny.TINY, "paths": paths, "split": tiny.SPLIT, "folds": (0,)}
    return Sweep(name="lr", model=str(config), overrides=(), seeds=2, **shared)


def results(**cells: list[float | None]) -> dict[Job, float | None]:
    return {
        Job(cell=(("train.lr", name),), seed=seed, fold=0): value
        for name, values in cells.items()
        for seed, value in enumerate(values)
    }


def test_a_sweep_trains_every_cell_with_every_seed_and_the_second_time_nothing(small: Sweep):
    axes = [parse_axis("train.lr=[1e-4, 1e-2]")]
    first = stage.run(small, axes)
    runs = sorted(path.name for path in (small.paths.home / "runs").iterdir())
    assert len(runs) == 4
    assert all(name.startswith("tiny+sweep-lr-") and name.endswith(small.split) for name in runs)
    written = {path: path.stat().st_mtime_ns for path in (small.paths.home / "runs").rglob("*.safetensors")}
    second = stage.run(small, axes)
    assert {path: path.stat().st_mtime_ns for path in written} == written
    assert second.facts["cells"] == first.facts["cells"]
    assert [row["n"] for row in first.facts["cells"]] == [2, 2]
    best = first.facts["cells"][0]
    assert best["cell"] == (("train.lr", 1e-2),)
    assert json.loads(first.outputs["results"].read_text())["cells"][0]["mean"] == best["mean"]


def test_a_sweep_says_what_each_job_tries_and_what_to_do_with_the_best(small: Sweep, capsys: pytest.CaptureFixture):
    """Its runs are named by a digest, and 'x+sweep-flip-530209db-s2026' told nobody which cell it was."""
    report = stage.run(
        replace(small, overrides=("train.epochs=1",)),
        [parse_axis("train.lr=[1e-2]"), parse_axis('train.schedule=["cosine"]')],
    )
    told = " ".join(capsys.readouterr().err.split())
    assert "sweep lr: job 2 of 2: lr 0.01, schedule cosine, seed 2027, fold 0" in told
    settings = 'train.epochs=1 train.lr=0.01 train.schedule="cosine"'
    where = f"COMP=tiny MODEL={small.model} SPLIT={small.split}"
    assert report.facts["next"] == f"make train-all {where} TAG=lr SET='{settings}'"
    assert report.facts["next"] in " ".join(map(str, describe(report.facts)))


def test_a_run_that_diverged_is_not_trained_again_when_the_sweep_goes_on(
    small: Sweep, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture
):
    """Each start of the same sweep trained it until it diverged once more."""
    monkeypatch.setattr(tiny.Fault, "forward", lambda _, x_BLD: x_BLD * math.nan)
    axes = [parse_axis("train.lr=[1e-2]")]
    first = stage.run(small, axes).facts["cells"]
    assert [row["diverged"] for row in first] == [2]
    monkeypatch.setattr(jobs.train, "run", lambda *_, **__: pytest.fail("it was trained again"))
    assert stage.run(small, axes).facts["cells"] == first
    told = " ".join(capsys.readouterr().err.split())
    assert told.count("this run diverged before, and counts as such. Next: move this folder away") == 2


def test_settings_in_another_order_are_the_same_runs(small: Sweep):
    """SET="a b" and SET="b a" trained everything twice, although they were taken for the same sweep."""
    cell = (("train.lr", 1e-3), ("train.dropout", 0.1))
    one = replace(small, overrides=("train.epochs=1", "train.batch_size=8"))
    other = replace(small, overrides=one.overrides[::-1])
    job, turned = Job(cell=cell, seed=1, fold=0), Job(cell=cell[::-1], seed=1, fold=0)
    assert one.run_name(job) == one.run_name(turned) == other.run_name(job)
    digest = hashlib.sha256(json.dumps([one.overrides, cell]).encode()).hexdigest()[:8]
    before = f"tiny+sweep-lr-{digest}-s1.{small.split}"
    small.paths.run_dir(before).mkdir(parents=True)
    assert one.run_name(job) == before, "as the version before named it"


def test_a_sweep_that_is_refused_leaves_no_trace(small: Sweep):
    """Without clean tables `make evaluate RUN=…` then named "tiny+sweep-lr-b6212ddb-s2026.sim80_k2" as a run."""
    small.paths.clean("train").unlink()
    with pytest.raises(DataError, match="no clean table"):
        stage.run(small, [Axis(key="train.lr", values=[1e-3])])
    assert not (small.paths.home / "runs").exists()
    assert not small.folder.exists()


def test_a_job_that_another_process_does_is_left_to_it(small: Sweep):
    job = small.jobs((("train.lr", 1e-3),))[0]
    with run_lock(small.paths.fold_dir(small.run_name(job), 0)):
        report = stage.run(small, [Axis(key="train.lr", values=[1e-3])])
    assert report.facts["busy"] == 1
    assert report.facts["cells"][0]["n"] == 1


def test_the_last_of_several_workers_has_the_whole_table(small: Sweep, monkeypatch: pytest.MonkeyPatch):
    """Each of two workers left out what the other one did, and results.json was that of whoever wrote last."""
    seen: list[Job] = []

    def metric(_self: Sweep, job: Job) -> float:
        seen.append(job)
        if len(seen) == 1:
            raise BusyError("process 1 is at work here. Next: wait.")
        return 0.5

    monkeypatch.setattr(Sweep, "metric", metric)
    found = stage.run(small, [parse_axis("train.lr=[1e-3, 1e-2]")])
    assert seen[-1] == seen[0]
    assert [row["n"] for row in found.facts["cells"]] == [2, 2]
    assert found.facts["busy"] == 0


def test_a_signal_between_two_jobs_is_a_stop_too(small: Sweep, monkeypatch: pytest.MonkeyPatch):
    """It ended the process: exit code 143 and no sentence, where a signal in a job gave 75."""
    monkeypatch.setattr(Sweep, "metric", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
    with pytest.raises(StoppedError, match=r"stopped \(SIGTERM\)"):
        stage.run(small, [parse_axis("train.lr=[1e-3, 1e-2]")])


def test_a_study_stops_at_its_number_of_trials_and_goes_on_from_them(small: Sweep):
    pytest.importorskip("optuna")
    axes = [parse_axis("train.lr={low=1e-4, high=1e-1, log=true}")]
    assert len(stage.run(small, axes, trials=2).facts["cells"]) == 2
    before = set((small.paths.home / "runs").iterdir())
    again = stage.run(small, axes, trials=3)
    assert len(again.facts["cells"]) == 3
    assert before < set((small.paths.home / "runs").iterdir())
    assert all(1e-4 <= row["cell"][0][1] <= 1e-1 for row in again.facts["cells"])


def test_a_trial_that_diverges_does_so_once(small: Sweep, monkeypatch: pytest.MonkeyPatch):
    """For the table in the end, and where its cell was proposed again, it was trained until it diverged again."""
    pytest.importorskip("optuna")
    asked: list[Job] = []
    monkeypatch.setattr(Sweep, "metric", lambda _, job: asked.append(job))
    report = stage.run(small, [Axis(key="train.lr", values=[0.5])], trials=2)
    assert sorted(job.seed for job in asked) == [2026, 2027]
    assert [(row["n"], row["diverged"]) for row in report.facts["cells"]] == [(0, 2)]


def test_a_study_whose_last_line_was_torn_goes_on(small: Sweep):
    """A full disk tore it, the next start wrote behind it, and every later one ended with a JSONDecodeError."""
    pytest.importorskip("optuna")
    axes, log = [parse_axis("train.lr={low=1e-4, high=1e-1, log=true}")], small.folder / "study.log"
    stage.run(small, axes, trials=1)
    log.write_bytes(log.read_bytes()[:-25])
    assert len(stage.run(small, axes, trials=2).facts["cells"]) == 2
    log.write_text("{\n" + log.read_text())
    with pytest.raises(DataError, match=r"study\.log: damaged \(JSONDecodeError.* Next: take another NAME"):
        stage.run(small, axes, trials=2)


def test_a_lock_of_optunas_that_a_killed_worker_left_holds_nobody_up(
    small: Sweep, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """In a relative folder it pointed nowhere, and "It is taking longer than 10.0 seconds to acquire the lock file" was
    said for ever, by a process that spun."""
    pytest.importorskip("optuna")
    monkeypatch.setattr(Sweep, "metric", lambda *_: 0.5)
    monkeypatch.chdir(tmp_path)
    here = replace(small, paths=replace(small.paths, root=small.paths.root.relative_to(tmp_path)))
    here.folder.mkdir(parents=True)
    (here.folder / "study.log.lock").symlink_to(here.folder / "study.log")
    assert len(stage.run(here, [parse_axis("train.lr=[1e-3]")], trials=1).facts["cells"]) == 1


def test_a_second_worker_waits_for_the_last_trial_of_a_living_one_and_takes_over_that_of_a_dead_one(
    small: Sweep, monkeypatch: pytest.MonkeyPatch
):
    """It asked for a trial more than TRIALS; before that, the first worker died with "ValueError: Cannot tell a FAIL
    trial".
    """
    pytest.importorskip("optuna")
    axes, found = [parse_axis("train.lr={low=1e-4, high=1e-1, log=true}")], list[Report]()
    cells, locks = list[Settings](), list[Path]()

    def dies_when_it_is_waited_for(message: str) -> None:
        if "0 of 1 trials are done, the others at work elsewhere" in message:
            assert len(cells) == 1
            locks[0].unlink()

    def metric(_self: Sweep, job: Job) -> float:
        cells.append(job.cell)
        if len(cells) == 1:
            locks.extend(small.folder.glob(".worker-*"))
            found.append(stage.run(small, axes, trials=1))
            raise KeyboardInterrupt  # a dead worker tells nothing more
        return 0.5

    monkeypatch.setattr(study, "say", dies_when_it_is_waited_for)
    monkeypatch.setattr(study, "POLL_S", 0.0)
    monkeypatch.setattr(Sweep, "metric", metric)
    with pytest.raises(KeyboardInterrupt):
        stage.run(small, axes, trials=1)
    assert len(set(cells)) == 1
    assert [row["n"] for row in found[0].facts["cells"]] == [2]


def test_workers_that_begin_at_once_do_as_many_trials_as_were_asked_for(small: Sweep, monkeypatch: pytest.MonkeyPatch):
    optuna = pytest.importorskip("optuna")
    axes, begin = [parse_axis("train.lr={low=1e-4, high=1e-1, log=true}")], threading.Barrier(3)
    counted = study._require_same

    def together(*args: Any) -> None:
        begin.wait()
        counted(*args)

    monkeypatch.setattr(study, "POLL_S", 0.0)
    monkeypatch.setattr(study, "_require_same", together)
    monkeypatch.setattr(stage, "_write", lambda *_: small.folder)  # its part bears the process's number: one here
    monkeypatch.setattr(Sweep, "metric", lambda *_: 0.5)
    with ThreadPoolExecutor(3) as pool:
        reports = list(pool.map(lambda _: stage.run(small, axes, trials=4), range(3)))
    assert [len(report.facts["cells"]) for report in reports] == [4, 4, 4]
    backend = optuna.storages.journal.JournalFileBackend(str(small.folder / "study.log"))
    kept = optuna.load_study(study_name=small.name, storage=optuna.storages.JournalStorage(backend))
    assert [trial.state for trial in kept.trials] == [optuna.trial.TrialState.COMPLETE] * 4


def test_a_worker_that_waits_for_others_ends_with_its_time(small: Sweep, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("optuna")
    axes, seen = [parse_axis("train.lr=[1e-3]")], list[Job]()

    def metric(_self: Sweep, job: Job) -> float:
        seen.append(job)
        if len(seen) == 1:
            with pytest.raises(StoppedError, match=r"0 of 1 trials are done, .*; the time budget is spent\. Next: "):
                stage.run(replace(small, deadline=0.0), axes, trials=1)
        return 0.5

    monkeypatch.setattr(Sweep, "metric", metric)
    assert stage.run(small, axes, trials=1).facts["cells"][0]["n"] == 2


def test_a_job_of_a_trial_that_another_process_does_is_waited_for(small: Sweep, monkeypatch: pytest.MonkeyPatch):
    """A worker left with exit code 75 there, and its trial was lost."""
    busy = iter([BusyError("somebody"), 0.5])

    def metric(_self: Sweep, _job: Job) -> float:
        found = next(busy)
        if isinstance(found, float):
            return found
        raise found

    monkeypatch.setattr("pipeline.training.stop.POLL_S", 0.0)
    monkeypatch.setattr(Sweep, "metric", metric)
    assert small.awaited_metric(small.jobs(())[0]) == 0.5


def test_what_a_killed_worker_left_is_proposed_again(small: Sweep, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("optuna")
    axes = [parse_axis("train.lr={low=1e-4, high=1e-1, log=true}")]
    seen: list[float] = []

    def die(_self: Sweep, job: Job) -> float | None:
        seen.append(job.cell[0][1])
        raise KeyboardInterrupt

    with monkeypatch.context() as killed:
        killed.setattr(Sweep, "metric", die)
        with pytest.raises(KeyboardInterrupt):
            stage.run(small, axes, trials=1)
    dead = small.folder / ".worker-0123456789ab"  # as SIGKILL leaves it, which lets nobody clean up
    dead.write_text("1\n")
    assert stage.run(small, axes, trials=1).facts["cells"][0]["cell"][0][1] == seen[0]
    assert not list(small.folder.glob(".worker-*"))


def test_a_study_is_not_mixed_with_another_of_its_name(small: Sweep):
    """It said "Cannot set different distribution kind to the same parameter name" and left with exit code 1."""
    pytest.importorskip("optuna")
    stage.run(small, [parse_axis("train.lr=[1e-3]")], trials=1)
    with pytest.raises(ConfigError, match=r"begun with other settings: over .* another NAME"):
        stage.run(small, [parse_axis("train.lr=[1e-3, 2e-3]")], trials=1)


def test_a_damaged_table_is_made_anew(small: Sweep):
    axes = [parse_axis("train.lr=[1e-3]")]
    cells = stage.run(small, axes).facts["cells"]
    (small.folder / "results.json").write_text('{"asked": ')
    assert stage.run(small, axes).facts["cells"] == cells
    assert json.loads((small.folder / "results.json").read_text())["cells"]


def test_a_grid_grows_and_does_not_replace_the_table_of_another(small: Sweep):
    """The same NAME with another OVER replaced results.json without a word."""
    stage.run(small, [parse_axis("train.lr=[1e-3]")])
    assert len(stage.run(small, [parse_axis("train.lr=[1e-3, 2e-3]")]).facts["cells"]) == 2
    table = (small.folder / "results.json").read_bytes()
    for other in ("train.lr=[1e-3]", "train.batch_size=[8]"):
        with pytest.raises(ConfigError, match=r"begun with other settings: over .* another NAME"):
            stage.run(small, [parse_axis(other)])
    assert (small.folder / "results.json").read_bytes() == table


def test_a_seed_is_no_setting(small: Sweep):
    """Cells of different seeds had equal results: a job's own seed replaced them."""
    with pytest.raises(ConfigError, match="SEEDS"):
        stage.run(small, [parse_axis("train.seed=[1, 2]")])


def test_cells_whose_intervals_overlap_share_a_rank():
    rows = summarise(results(a=[0.10, 0.11, 0.12], b=[0.11, 0.12, 0.13], c=[0.50, 0.51, 0.52]))
    assert [row["cell"][0][1] for row in rows] == ["a", "b", "c"]
    assert [row["rank"] for row in rows] == [1, 1, 3]


def test_no_two_cells_whose_intervals_overlap_have_different_ranks(rng):
    """The third overlapped the second, which shared the first one's rank, and was ranked below it all the same."""
    chain = {"a": [0.10, 0.11, 0.12], "b": [0.125, 0.135, 0.145], "c": [0.15, 0.16, 0.17], "d": [0.9, 0.91, 0.92]}
    assert [row["rank"] for row in summarise(results(**chain))] == [1, 1, 1, 4]
    wide = {"a": [0.1, 0.1001], "b": [0.3, 0.3001], "c": [0.1, 0.9]}
    assert [row["rank"] for row in summarise(results(**wide))] == [1, 1, 1], "the widest is last, and overlaps both"
    for _ in range(50):
        cells = {f"c{k}": list(rng.normal(rng.uniform(0, 2), rng.uniform(0.01, 0.3), 3)) for k in range(6)}
        rows = summarise(results(**cells))
        for one, other in itertools.combinations(rows, 2):
            apart = one["high"] < other["low"] or other["high"] < one["low"]
            assert apart or one["rank"] == other["rank"]
            assert one["rank"] <= other["rank"], "best mean first"


def test_the_interval_is_students():
    row = summarise(results(a=[1.0, 2.0, 3.0]))[0]
    assert row["mean"] == 2.0
    assert row["sd"] == 1.0
    assert row["high"] - row["mean"] == pytest.approx(4.302653 / 3**0.5, rel=1e-6)  # t(0.975, 2 degrees of freedom)


def test_a_paired_difference_can_be_sure_where_the_spread_between_seeds_is_wide():
    rows = summarise(results(a=[0.1, 0.5, 0.9, 0.3], b=[0.11, 0.511, 0.91, 0.309]))
    assert rows[1]["rank"] == 1
    assert rows[1]["p"] < 0.001


def test_p_is_told_for_what_it_is_where_the_first_was_chosen_of_many(rng):
    """Of eight cells that were all alike, 43 % of sweeps showed a p below 0.05, and nothing said of how many pairs."""

    def told(count: int) -> tuple[list[float], str]:
        cells = summarise(results(**{f"c{k}": list(rng.normal(size=3)) for k in range(count)}))
        facts = {"cells": cells, "busy": 0, "metric": "MAE", "next": ""}
        return [row["p"] for row in cells[1:]], " ".join(map(str, describe(facts)[1:]))

    sweeps = [told(8) for _ in range(100)]
    assert sum(min(p) < 0.05 for p, _ in sweeps) > 25
    assert sum(min(p) < 0.05 / 28 for p, _ in sweeps) < 10
    assert "the first was chosen of 8: sure below 0.0018, not below 0.05" in sweeps[0][1]
    assert "chosen" not in told(2)[1]


def test_one_result_and_a_diverged_run_get_no_rank():
    rows = {row["cell"][0][1]: row for row in summarise(results(one=[0.1], lost=[0.05, None, 0.06], fine=[0.2, 0.21]))}
    assert rows["one"]["rank"] is None
    assert rows["lost"]["rank"] is None
    assert rows["lost"]["diverged"] == 1
    assert rows["fine"]["rank"] is not None


def test_the_table_shows_what_a_study_proposed_in_four_digits():
    shown = Console(width=120)
    cell = (("train.lr", 0.00014017187955925534), ("train.batch_size", 16), ("train.precision", "bf16"))
    with shown.capture() as printed:
        cells = summarise({Job(cell=cell, seed=1, fold=0): 0.5})
        shown.print(*describe({"cells": cells, "busy": 2, "metric": "MAE", "next": ""}))
    assert "best MAE of each run in validation, lower is better" in printed.get()
    assert re.search(r"- +lr 0\.0001402, batch_size 16, precision bf16 +1 +0\.50000 +- +-", printed.get())
    assert "2 jobs are at work elsewhere" in " ".join(printed.get().split())


def test_the_table_shows_digits_that_count_whatever_the_unit():
    shown = Console(width=120)
    with shown.capture() as printed:
        cells = summarise(results(a=[2e-12, 2.5e-12, 3e-12]))
        shown.print(*describe({"cells": cells, "busy": 0, "metric": "RMSE", "next": ""}))
    assert re.search(r" 3 +2\.5e-12 +5e-13 +1\.\d+e-12 … 3\.\d+e-12", printed.get())


def test_intervals_of_two_results_are_said_to_be_wide():
    """Two seeds apart by 0.02, with sd of 0.0006 and 0.005, shared a rank, and nothing said why."""
    two = {
        "cells": summarise(results(a=[0.2721, 0.2713], b=[0.2954, 0.2882])),
        "busy": 0,
        "metric": "MCRMSE",
        "next": "",
    }
    assert [row["rank"] for row in two["cells"]] == [1, 1]
    assert "9 sd wide" in " ".join(map(str, describe(two)))
    row = summarise(results(a=[0.0, 1.0]))[0]
    assert row["high"] - row["mean"] == pytest.approx(9 * row["sd"], rel=0.01)
    three = {"cells": summarise(results(a=[0.1, 0.2, 0.3])), "busy": 0, "metric": "MCRMSE", "next": ""}
    assert "sd wide" not in " ".join(map(str, describe(three)))


def test_the_grid_is_every_combination():
    cells = grid([Axis(key="a", values=[1, 2]), Axis(key="b", values=["x"])])
    assert cells == [(("a", 1), ("b", "x")), (("a", 2), ("b", "x"))]


@pytest.mark.parametrize(
    "text",
    [
        *("train.lr", "train.lr=3", "train.lr=[]", "train.lr={low=1}", "train.lr=[1", "x={a=1}"),
        *("x={low=1e-2, high=1e-4}", 'x={low="a", high=1}', "x={low=0, high=1, log=true}", "x={low=0, high=inf}"),
    ],
)
def test_an_axis_that_is_none_is_refused(text: str):
    with pytest.raises(ConfigError, match=r"expected section\.key"):
        parse_axis(text)


def test_a_range_without_a_study_and_a_typo_are_refused_before_any_job(small: Sweep):
    with pytest.raises(ConfigError, match="a range needs a study"):
        stage.run(small, [parse_axis("train.lr={low=1e-4, high=1e-2}")])
    with pytest.raises(ConfigError, match="Did you mean 'lr'"):
        stage.run(small, [parse_axis("train.lrr=[1e-4]")])
    with pytest.raises(ConfigError, match=r"no argument 'widht'\. Did you mean 'width'"):  # said by its first job
        stage.run(small, [parse_axis("model.kwargs.widht=[16]")])
    assert not (small.paths.home / "runs").exists()
