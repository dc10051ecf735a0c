"""Many runs of one configuration: settings x seeds x folds, on as many processes and machines as share the folder.

A job is an ordinary run, so it resumes, and its lock keeps two workers off the same one: starting the same sweep again,
here or on another machine, takes the jobs that nobody does. The global batch is the configuration's unless it is swept.
"""

import contextlib
import hashlib
import itertools
import json
import math
import statistics
import time
import tomllib
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from rich.table import Table

from pipeline import train
from pipeline.competitions.base import Competition
from pipeline.config import load_config
from pipeline.errors import BusyError, ConfigError, DivergedError, StoppedError
from pipeline.paths import Paths
from pipeline.runlog import say
from pipeline.stage import Report, write_json
from pipeline.training.metrics import metric_name
from pipeline.training.stop import StopRequest, lock_holder, run_lock

_CONFIDENCE = 0.95
_POLL_S = 1.0  # between two looks at a job that another process does
_WORKER, _TURN = ".worker-", ".turn"  # locks: a worker's, with a random name; and that of who counts trials
TAG = "sweep-"  # a run of a sweep is <config>+sweep-<name>-<cell>-s<seed>.<split>; ensembles leave it out

Settings = tuple[tuple[str, Any], ...]


@dataclass(frozen=True, kw_only=True)
class Axis:
    """One setting and what it may be: some values, or a range that only a study can search."""

    key: str
    values: list[Any] = field(default_factory=list)
    low: float | None = None
    high: float | None = None
    log: bool = False


@dataclass(frozen=True, kw_only=True)
class Job:
    """One training run of a sweep."""

    cell: Settings
    seed: int
    fold: int


@dataclass(frozen=True, kw_only=True)
class Sweep:
    """What all jobs of a sweep have in common."""

    name: str
    model: str  # a configuration's name or path
    overrides: tuple[str, ...]
    competition: Competition
    paths: Paths
    split: str
    seeds: int
    folds: tuple[int, ...]
    deadline: float | None = None  # on the monotonic clock

    @property
    def folder(self) -> Path:
        return self.paths.home / "sweeps" / self.name

    def jobs(self, cell: Settings) -> list[Job]:
        """Every seed and fold of a cell; seeds count up from the configuration's."""
        first = load_config(self.model, self.overrides).train.seed
        return [Job(cell=cell, seed=first + k, fold=fold) for k in range(self.seeds) for fold in self.folds]

    def run_name(self, job: Job) -> str:
        """Folder of a job's run; the same settings always give the same one."""
        text = json.dumps([self.overrides, job.cell])
        cell = hashlib.sha256(text.encode()).hexdigest()[:8]
        return f"{Path(self.model).stem}+{TAG}{self.name}-{cell}-s{job.seed}.{self.split}"

    def metric(self, job: Job) -> float | None:
        """Best validation metric of a job, trained now if need be; None where training diverged.

        Raises:
            BusyError: another process is at it.
            StoppedError: asked to stop, or the time budget is spent.
        """
        settings = [f"{key}={_toml(value)}" for key, value in job.cell]
        config = load_config(self.model, [*self.overrides, *settings, f"train.seed={job.seed}"])
        budget = None if self.deadline is None else max(0.0, self.deadline - time.monotonic())
        try:
            report = train.run(
                config,
                competition=self.competition,
                paths=self.paths,
                run=self.run_name(job),
                split=self.split,
                fold=job.fold,
                time_budget=budget,
            )
        except DivergedError as err:
            say(str(err))
            return None
        return report.facts["metric"]

    def awaited_metric(self, job: Job) -> float | None:
        """As `metric`, but a job that another process does is waited for, as long as there is time."""
        waits = False
        while True:
            try:
                return self.metric(job)
            except BusyError as err:
                if self.deadline is not None and time.monotonic() >= self.deadline:
                    raise
                if not waits:
                    say(f"{err} Here its result is waited for.")
                waits = True
                time.sleep(_POLL_S)


def parse_axis(text: str) -> Axis:
    """One ``section.key=[value, …]`` or ``section.key={low = …, high = …, log = true}``, as TOML.

    Raises:
        ConfigError: neither.

    >>> parse_axis("train.lr=[1e-3, 2e-3]").values
    [0.001, 0.002]
    """
    key, _, raw = text.partition("=")
    try:
        (value,) = tomllib.loads(f"v = {raw}").values()
    except ValueError:
        value = None
    if isinstance(value, list) and value:
        return Axis(key=key.strip(), values=value)
    if _is_range(value):
        return Axis(key=key.strip(), **value)
    raise ConfigError(
        f"OVER={text!r}: expected section.key=[value, ...] or section.key={{low=..., high=..., log=true}}, as TOML, "
        "numbers with low below high, and with log above 0. Next: make sweep OVER='train.lr=[1e-3,2e-3]' (no spaces)."
    )


def _is_range(value: Any) -> bool:
    if not isinstance(value, dict) or not {"low", "high"} <= value.keys() <= {"low", "high", "log"}:
        return False
    low, high, log = value["low"], value["high"], value.get("log", False)
    numbers = all(type(end) in (int, float) and math.isfinite(end) for end in (low, high))
    return type(log) is bool and numbers and low < high and (low > 0 or not log)


def grid(axes: Sequence[Axis]) -> list[Settings]:
    """Every combination of the axes' values.

    Raises:
        ConfigError: an axis is a range, which has no values to go through, or is given twice.
    """
    keys = [axis.key for axis in axes]
    if len(set(keys)) < len(keys):
        raise ConfigError(
            f"OVER: a setting is given twice: {', '.join(sorted(keys))}. Next: once, with all its values."
        )
    for axis in axes:
        if not axis.values:
            raise ConfigError(f"OVER {axis.key}: a range needs a study. Next: TRIALS=<number>, or list values.")
    return [tuple(zip(keys, values, strict=True)) for values in itertools.product(*(axis.values for axis in axes))]


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
        load_config(sweep.model, [*sweep.overrides, *(f"{key}={_toml(value)}" for key, value in cell)])
    _require_same_table(sweep, axes)
    results: dict[Job, float | None] = {}
    search = _study(sweep, axes, trials, results) if trials else _walk(sweep, cells, results)
    busy = 0
    with StopRequest():  # also between jobs, and while one is waited for
        for seen_busy in search:
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
        told = f"{_label(job.cell)}, seed {job.seed}, fold {job.fold}"
        say(f"sweep {sweep.name}: job {count} of {len(jobs)}: {told}")
        if not _take(sweep, job, results):
            busy.append(job)
        say(f"sweep {sweep.name}: {count} of {len(jobs)} jobs seen, {len(busy)} at work elsewhere")
        yield len(busy)
    if busy:
        yield len([job for job in busy if not _take(sweep, job, results)])


def _train_all(sweep: Sweep, cell: Settings) -> str:
    """What makes runs of a cell that ensembles take: the sweep's own have no predictions."""
    settings = " ".join([*sweep.overrides, *(f"{key}={_toml(value)}" for key, value in cell)])
    where = f"COMP={sweep.paths.comp} MODEL={sweep.model} SPLIT={sweep.split}"
    return f"make train-all {where} TAG={sweep.name} SET='{settings}'"


def _take(sweep: Sweep, job: Job, results: dict[Job, float | None]) -> bool:
    """Do a job, unless another process is at it."""
    try:
        results[job] = sweep.metric(job)
    except BusyError as err:
        say(f"{err} It is left to that process.")
        return False
    return True


def _study(sweep: Sweep, axes: Sequence[Axis], trials: int, results: dict[Job, float | None]) -> Iterator[int]:
    """Let Optuna propose cells until `trials` are done by all workers together; yields 0 after each."""
    try:
        import optuna
        from optuna.storages import JournalStorage
        from optuna.storages.journal import JournalFileBackend
    except ImportError as err:
        raise ConfigError(
            "TRIALS needs Optuna, which is not installed. Next: pip install optuna, or list values."
        ) from err
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sweep.folder.mkdir(parents=True, exist_ok=True)
    storage = JournalStorage(JournalFileBackend(str(sweep.folder / "study.log")))  # a file, fit for network folders
    study = optuna.create_study(study_name=sweep.name, storage=storage, load_if_exists=True)
    _require_same(study, sweep, axes)
    states = optuna.trial.TrialState
    me = f"{_WORKER}{uuid.uuid4().hex[:12]}"
    with _signed(sweep.folder, me):
        while (proposed := _next_trial(study, states, sweep, axes, trials, me)) is not None:
            trial, cell = proposed
            say(f"sweep {sweep.name}: trial {trial.number}: {_label(cell)}")
            metrics = {job: sweep.awaited_metric(job) for job in sweep.jobs(cell)}
            results |= metrics
            finite = [value for value in metrics.values() if value is not None]
            study.tell(trial, statistics.fmean(finite) if len(finite) == len(metrics) else math.inf)
            yield 0
    for done in study.get_trials(deepcopy=False, states=(states.COMPLETE,)):  # also what other workers did
        cell = tuple((key, value) for key, value in done.user_attrs["cell"])
        results |= {job: sweep.awaited_metric(job) for job in sweep.jobs(cell)}
    yield 0


def _next_trial(
    study: Any, states: Any, sweep: Sweep, axes: Sequence[Axis], trials: int, me: str
) -> tuple[Any, Settings] | None:
    """A trial for this worker, and its cell; None once `trials` are done by all workers together.

    One worker at a time counts and asks, so that they never begin one too many. While the last ones are at work
    elsewhere it waits: what a worker leaves behind that dies is taken over.

    Raises:
        StoppedError: the time is up.
    """
    waits = False
    while True:
        with _turn(sweep.folder):
            _requeue(study, states, sweep.folder)
            counted = study.get_trials(deepcopy=False, states=(states.COMPLETE, states.RUNNING))
            if len(counted) < trials:
                trial = study.ask()
                trial.set_user_attr("worker", me)
                cell = tuple((axis.key, _suggest(trial, axis)) for axis in axes)
                trial.set_user_attr("cell", [list(item) for item in cell])
                return trial, cell
        done = sum(trial.state == states.COMPLETE for trial in counted)
        if done >= trials:
            return None
        told = f"sweep {sweep.name}: {done} of {trials} trials are done, the others at work elsewhere"
        if sweep.deadline is not None and time.monotonic() >= sweep.deadline:
            raise StoppedError(f"{told}; the time budget is spent. Next: the same command again.")
        if not waits:
            say(f"{told}; their results are waited for")
        waits = True
        time.sleep(_POLL_S)


@contextlib.contextmanager
def _turn(folder: Path) -> Iterator[None]:
    """One worker at a time, each as soon as it can."""
    while True:
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(run_lock(folder, name=_TURN))
            except BusyError:
                continue
            yield
            return


@contextlib.contextmanager
def _signed(folder: Path, me: str) -> Iterator[None]:
    """Hold a worker's lock, by which others know that it lives; those that killed workers left behind are removed."""
    with run_lock(folder, name=me):
        for path in folder.glob(f"{_WORKER}*"):
            if lock_holder(folder, name=path.name) is None:
                path.unlink(missing_ok=True)
        try:
            yield
        finally:
            (folder / me).unlink(missing_ok=True)


def _require_same(study: Any, sweep: Sweep, axes: Sequence[Axis]) -> None:
    """A study goes on with what it was begun with; seeds and the number of trials may change."""
    asked = _asked(sweep, axes)
    _refuse_changes(sweep, study.user_attrs.get("asked", asked), asked)
    study.set_user_attr("asked", asked)


def _require_same_table(sweep: Sweep, axes: Sequence[Axis]) -> None:
    """A sweep replaces its own table alone: of the same settings, with the same values at least."""
    path = sweep.folder / "results.json"
    asked = _asked(sweep, axes)
    begun = asked | (json.loads(path.read_text()).get("asked", {}) if path.is_file() else {})
    over, now = begun["over"], asked["over"]
    if over.keys() == now.keys() and all(value in now[key] for key in over for value in over[key]):
        begun["over"] = now
    _refuse_changes(sweep, begun, asked)


def _asked(sweep: Sweep, axes: Sequence[Axis]) -> dict[str, Any]:
    return {
        "model": Path(sweep.model).stem,
        "set": sorted(sweep.overrides),
        "split": sweep.split,
        "folds": list(sweep.folds),
        "over": {axis.key: axis.values or [axis.low, axis.high, axis.log] for axis in axes},
    }


def _refuse_changes(sweep: Sweep, begun: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    changed = [f"{key} {begun[key]} -> {asked[key]}" for key in asked if begun[key] != asked[key]]
    if changed:
        raise ConfigError(
            f"{sweep.folder}: this sweep was begun with other settings: {', '.join(changed)}. "
            "Next: the same settings again, or another NAME."
        )


def _requeue(study: Any, states: Any, folder: Path) -> None:
    """Propose again what a killed worker left behind; its finished jobs are found finished.

    For who has the turn. The trials are read before and after the locks: a worker may tell its last one and leave.
    """

    def running() -> list[tuple[Any, str]]:
        found = study.get_trials(deepcopy=False, states=(states.RUNNING,))
        return [(trial, trial.user_attrs.get("worker", "nobody")) for trial in found]  # was killed before it signed

    dead = {worker for _, worker in running() if lock_holder(folder, name=worker) is None}
    for trial, worker in running():
        if worker in dead:
            study.tell(trial.number, state=states.FAIL)
            study.enqueue_trial(trial.params)


def _suggest(trial: Any, axis: Axis) -> Any:
    if axis.values:
        return trial.suggest_categorical(axis.key, axis.values)
    if isinstance(axis.low, int) and isinstance(axis.high, int):
        return trial.suggest_int(axis.key, axis.low, axis.high, log=axis.log)
    return trial.suggest_float(axis.key, axis.low, axis.high, log=axis.log)


def summarise(results: Mapping[Job, float | None]) -> list[dict[str, Any]]:
    """Mean, spread and rank of every cell, best first; lower metrics are better.

    A cell is ranked below another only if their 95 % intervals of the mean do not overlap; those that overlap share a
    rank, also by way of a third one. A cell with fewer than two results, or with one that diverged, has none.

    Returns:
        One dict a cell: ``cell``, ``n``, ``diverged``, ``mean``, ``sd``, ``low``, ``high``, ``rank``, and ``p``: of a
        paired t-test against the first over the seeds and folds that both have.
    """
    rows = [_summarise_cell(cell, results) for cell in dict.fromkeys(job.cell for job in results)]
    rows.sort(key=lambda row: (row["diverged"] > 0, math.inf if row["mean"] is None else row["mean"]))
    for row in rows:
        row["p"] = _paired_p(rows[0]["cell"], row["cell"], results) if row is not rows[0] else None
        row["rank"] = None
    ranked = sorted((row for row in rows if row["low"] is not None and not row["diverged"]), key=lambda row: row["low"])
    rank, reach = 1, -math.inf
    for place, row in enumerate(ranked, start=1):
        if row["low"] > reach:
            rank = place
        row["rank"], reach = rank, max(reach, row["high"])
    return rows


def _summarise_cell(cell: Settings, results: Mapping[Job, float | None]) -> dict[str, Any]:
    everything = [value for job, value in results.items() if job.cell == cell]
    values = [value for value in everything if value is not None]
    row: dict[str, Any] = {"cell": cell, "n": len(values), "diverged": len(everything) - len(values)}
    row |= {"mean": statistics.fmean(values) if values else None, "sd": None, "low": None, "high": None}
    if len(values) > 1:
        from scipy import stats

        row["sd"] = statistics.stdev(values)
        half = float(stats.t.ppf((1 + _CONFIDENCE) / 2, len(values) - 1)) * row["sd"] / math.sqrt(len(values))
        row |= {"low": row["mean"] - half, "high": row["mean"] + half}
    return row


def _paired_p(first: Settings, other: Settings, results: Mapping[Job, float | None]) -> float | None:
    def of(cell: Settings) -> dict[tuple[int, int], float]:
        return {(job.seed, job.fold): v for job, v in results.items() if job.cell == cell and v is not None}

    ours, theirs = of(first), of(other)
    shared = sorted(ours.keys() & theirs.keys())
    differences = [theirs[key] - ours[key] for key in shared]
    if len(shared) < 2 or (spread := statistics.stdev(differences)) == 0:
        return None
    from scipy import stats

    t = statistics.fmean(differences) / (spread / math.sqrt(len(shared)))
    return float(2 * stats.t.sf(abs(t), len(shared) - 1))


def describe(facts: Mapping[str, Any]) -> list[Any]:
    """What `run` found, for a person."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("rank", "settings", "n", "mean", "sd", "95 % interval", "p against the first"):
        table.add_column(column, justify="left" if column == "settings" else "right")
    for row in facts["cells"]:
        interval = "-" if row["low"] is None else f"{row['low']:.5f} … {row['high']:.5f}"
        lost = f" ({row['diverged']} diverged)" if row["diverged"] else ""
        numbers = ["-" if row[key] is None else f"{row[key]:.5f}" for key in ("mean", "sd")]
        p = "" if row["p"] is None else f"{row['p']:.3f}"
        rank = "-" if row["rank"] is None else str(row["rank"])
        table.add_row(rank, _label(row["cell"]), f"{row['n']}{lost}", *numbers, interval, p)
    notes = [f"best {facts['metric']} of each run in validation, lower is better"]
    notes += ["cells whose intervals overlap share a rank; - = one result is no interval, or a run diverged"]
    if any(row["n"] == 2 for row in facts["cells"]):
        notes.append("of two results an interval is 9 sd wide to each side, of three 2.5 (SEEDS=3), of five 1.2")
    if facts["next"]:
        notes.append(f"the first of them on all folds, with predictions: {facts['next']}")
    if facts["busy"]:
        notes.append(f"{facts['busy']} jobs are at work elsewhere; run the sweep again for the whole table")
    return [table, *notes]


def _write(sweep: Sweep, axes: Sequence[Axis], results: Mapping[Job, float | None]) -> Path:
    path = sweep.folder / "results.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    jobs = [{"cell": job.cell, "seed": job.seed, "fold": job.fold, "metric": value} for job, value in results.items()]
    write_json(path, {"asked": _asked(sweep, axes), "cells": summarise(results), "jobs": jobs})
    return path


def _label(cell: Iterable[tuple[str, Any]]) -> str:
    shown = ((key.rpartition(".")[2], f"{value:.4g}" if isinstance(value, float) else value) for key, value in cell)
    return ", ".join(f"{name} {value}" for name, value in shown)


def _toml(value: Any) -> str:
    """A value as an override's right-hand side: JSON is TOML for what a setting can be."""
    return json.dumps(value)
