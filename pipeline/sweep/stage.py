"""Many runs of one configuration: settings x seeds x folds, on as many processes and machines as share the folder.

A job is an ordinary run, so it resumes, and its lock keeps two workers off the same one: starting the same sweep again,
here or on another machine, takes the jobs that nobody does. The global batch is the configuration's unless it is swept.
"""

import contextlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from pipeline.config import load_config
from pipeline.errors import BusyError, ConfigError
from pipeline.runlog import say
from pipeline.stage import Report, write_json
from pipeline.sweep.jobs import Axis, Job, Settings, Sweep, asked_for, grid, label, overrides, refuse_changes
from pipeline.sweep.ranking import summarise
from pipeline.sweep.study import run_study
from pipeline.training.metrics import metric_name
from pipeline.training.settings import require_sense
from pipeline.training.stop import StopRequest


def run(sweep: Sweep, axes: Sequence[Axis], *, trials: int = 0) -> Report:
    """Do the jobs that are left, then write and return the table.

    Args:
        sweep: what the jobs have in common.
        axes: the settings that vary.
        trials: 0 goes through the grid; otherwise so many cells that Optuna proposes, all workers together.

    Returns:
        ``built``; output: results.json; facts: ``cells`` as `summarise` gives them, ``busy``: jobs others are at,
        ``metric``: its name, ``next``: the command that trains the first cell on all folds,
        empty without a cell.

    Raises:
        ConfigError: axes or settings make no sense, the name is another sweep's, or Optuna is needed and missing.
        StoppedError: asked to stop; what is done is kept.
    """
    started = time.monotonic()
    if any(axis.key == "train.seed" for axis in axes):
        raise ConfigError("OVER train.seed: every cell is trained with several seeds. Next: SEEDS=<number>.")
    cells = grid([replace(axis, values=axis.values or [axis.low]) for axis in axes] if trials else axes)
    for cell in cells:  # a typo is answered before the first job
        config = load_config(sweep.model, [*sweep.overrides, *overrides(cell)])
        require_sense(config, sweep.competition, paths=sweep.paths)
    _require_same_table(sweep, axes)
    results: dict[Job, float | None] = {}
    steps = run_study(sweep, axes, trials, results) if trials else _walk(sweep, cells, results)
    busy = 0
    with StopRequest():  # also between jobs, and while one is waited for
        for seen_busy in steps:
            busy = seen_busy
            path = _write(sweep, axes, results)
    rows = summarise(results)
    facts = {"cells": rows, "busy": busy, "metric": metric_name(sweep.competition)}
    facts["next"] = _train_all(sweep, rows[0]["cell"]) if rows else ""
    seconds = time.monotonic() - started
    return Report(stage="sweep", status="built", outputs={"results": path}, facts=facts, seconds=seconds)


def _walk(sweep: Sweep, cells: Sequence[Settings], results: dict[Job, float | None]) -> Iterator[int]:
    """Do the grid's jobs, seed by seed, so that a table over few seeds is complete early; yields how many are busy.

    Those that others were at are looked at again in the end: of several workers the last one has the whole table.
    """
    jobs = [job for cell in cells for job in sweep.jobs(cell)]
    jobs.sort(key=lambda job: (job.seed, job.fold))
    busy: list[Job] = []
    for count, job in enumerate(jobs, start=1):
        told = f"{label(job.cell)}, seed {job.seed}, fold {job.fold}"
        say(f"sweep {sweep.name}: job {count} of {len(jobs)}: {told}")
        if not _take(sweep, job, results):
            busy.append(job)
        say(f"sweep {sweep.name}: {count} of {len(jobs)} jobs seen, {len(busy)} at work elsewhere")
        yield len(busy)
    if busy:
        yield len([job for job in busy if not _take(sweep, job, results)])


def _take(sweep: Sweep, job: Job, results: dict[Job, float | None]) -> bool:
    """Do a job, unless another process is at it."""
    try:
        results[job] = sweep.metric(job)
    except BusyError as err:
        say(f"{err} It is left to that process.")
        return False
    return True


def _train_all(sweep: Sweep, cell: Settings) -> str:
    """What makes runs of a cell that ensembles take: the sweep's own have no predictions."""
    settings = " ".join([*sweep.overrides, *overrides(cell)])
    where = f"COMP={sweep.paths.comp} MODEL={sweep.model} SPLIT={sweep.split}"
    return f"make train-all {where} TAG={sweep.name} SET='{settings}'"


def _require_same_table(sweep: Sweep, axes: Sequence[Axis]) -> None:
    """A sweep replaces its own table alone: of the same settings, with the same values at least."""
    path = sweep.folder / "results.json"
    asked = asked_for(sweep, axes)
    begun = asked
    with contextlib.suppress(OSError, ValueError):  # no table yet, or a damaged one: it is made anew from the runs
        begun = asked | json.loads(path.read_text()).get("asked", {})
    over, now = begun["over"], asked["over"]
    if over.keys() == now.keys() and all(value in now[key] for key in over for value in over[key]):
        begun["over"] = now
    refuse_changes(sweep, begun, asked)


def _write(sweep: Sweep, axes: Sequence[Axis], results: Mapping[Job, float | None]) -> Path:
    path = sweep.folder / "results.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    jobs = [{"cell": job.cell, "seed": job.seed, "fold": job.fold, "metric": value} for job, value in results.items()]
    write_json(path, {"asked": asked_for(sweep, axes), "cells": summarise(results), "jobs": jobs})
    return path
