"""What a sweep is made of: axes of settings, the cells they span, and a training run for every cell, seed and fold."""

import hashlib
import itertools
import json
import math
import time
import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from pipeline import train
from pipeline.competitions.base import Competition
from pipeline.config import load_config
from pipeline.errors import ConfigError, DivergedError
from pipeline.jobs import at_work
from pipeline.paths import Paths
from pipeline.runlog import read_status, say
from pipeline.runs import SWEEP
from pipeline.training.stop import in_turn

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
        """Folder of a job's run: the same settings give the same one, whatever their order."""
        name = self._run_name(job, sorted(self.overrides), sorted(job.cell))
        as_given = self._run_name(job, self.overrides, job.cell)  # as versions before this one named it
        is_earlier = self.paths.run_dir(as_given).is_dir() and not self.paths.run_dir(name).is_dir()
        return as_given if is_earlier else name

    def _run_name(self, job: Job, overrides: Sequence[str], cell: Sequence[tuple[str, Any]]) -> str:
        digest = hashlib.sha256(json.dumps([overrides, cell]).encode()).hexdigest()[:8]
        return f"{Path(self.model).stem}+{SWEEP}{self.name}-{digest}-s{job.seed}.{self.split}"

    def metric(self, job: Job) -> float | None:
        """Best validation metric of a job, trained now if need be; None where training diverged, now or before.

        Raises:
            BusyError: another process is at it.
            StoppedError: asked to stop, or the time budget is spent.
        """
        config = load_config(self.model, [*self.overrides, *overrides(job.cell), f"train.seed={job.seed}"])
        budget = None if self.deadline is None else max(0.0, self.deadline - time.monotonic())
        run = self.run_name(job)
        folder = self.paths.fold_dir(run, job.fold)
        if read_status(folder).get("state") == "diverged":
            say(f"{folder}: this run diverged before, and counts as such. Next: move this folder away to try it again.")
            return None
        where: dict[str, Any] = {"competition": self.competition, "paths": self.paths, "run": run, "split": self.split}
        try:
            with at_work(folder):
                report = train.run(config, **where, fold=job.fold, time_budget=budget)
        except DivergedError as err:
            say(str(err))
            return None
        return report.facts["metric"]

    def awaited_metric(self, job: Job) -> float | None:
        """As `metric`, but a job that another process does is waited for, as long as there is time."""
        return in_turn(partial(self.metric, job), deadline=self.deadline, what="its result is")


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
            f"OVER: a setting is given twice: {', '.join(sorted(keys))}. Next: give it once, with all its values."
        )
    for axis in axes:
        if not axis.values:
            raise ConfigError(f"OVER {axis.key}: a range needs a study. Next: TRIALS=<number>, or list values.")
    return [tuple(zip(keys, values, strict=True)) for values in itertools.product(*(axis.values for axis in axes))]


def asked_for(sweep: Sweep, axes: Sequence[Axis]) -> dict[str, Any]:
    """What a sweep is about, as JSON keeps it: only seeds and the number of trials may be others when it goes on."""
    return {
        "model": Path(sweep.model).stem,
        "set": sorted(sweep.overrides),
        "split": sweep.split,
        "folds": list(sweep.folds),
        "over": {axis.key: axis.values or [axis.low, axis.high, axis.log] for axis in axes},
    }


def refuse_changes(sweep: Sweep, begun: Mapping[str, Any], asked: Mapping[str, Any]) -> None:
    """Raise ConfigError with every difference between what a sweep was begun with and what is asked for now."""
    changed = [f"{key} {begun[key]} -> {asked[key]}" for key in asked if begun[key] != asked[key]]
    if changed:
        raise ConfigError(
            f"{sweep.folder}: this sweep was begun with other settings: {', '.join(changed)}. "
            "Next: give the same settings again, or another NAME."
        )


def label(cell: Settings) -> str:
    """A cell for people.

    >>> label((("train.lr", 0.00312345), ("model.init", "")))
    'lr 0.003123, init ""'
    """
    shown = ((key.rpartition(".")[2], f"{value:.4g}" if isinstance(value, float) else value) for key, value in cell)
    return ", ".join(f"{name} {value}" if value != "" else f'{name} ""' for name, value in shown)


def overrides(cell: Settings) -> list[str]:
    """A cell's settings as `load_config` takes them: JSON is TOML for what a setting can be."""
    return [f"{key}={json.dumps(value)}" for key, value in cell]
