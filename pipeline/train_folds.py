"""Folds one after the other: train, then predict; within a time budget, early enough for the predictions."""

import contextlib
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

from pipeline import bpp, jobs, predict, train
from pipeline.competitions.base import Competition
from pipeline.config import RunConfig
from pipeline.dataset import require_fold_table
from pipeline.errors import BusyError, ConfigError, CrashedError, LostDeviceError, StoppedError
from pipeline.paths import Paths
from pipeline.runlog import duration, read_status, say, write_status
from pipeline.stage import Report
from pipeline.training import attempts
from pipeline.training.checkpoint import CheckpointStore
from pipeline.training.distributed import World, join
from pipeline.training.settings import require_sense
from pipeline.training.stop import StopRequest
from pipeline.training.telemetry import outcome, tell_status
from pipeline.training.trackers import OpenTracker

#: Predictions are given this many times the time that a sample of them took.
_SAFETY = 1.5
#: Seconds kept for them at least, for checkpoints and tables to be written; of a small budget, this share.
_LEAST_S, _LEAST_SHARE = 120.0, 0.1


@dataclass(frozen=True, kw_only=True)
class Budget:
    """A span of time that training and predictions of all folds have to fit into."""

    seconds: float
    started: float = field(default_factory=lambda: time.monotonic())

    def left(self) -> float:
        return self.started + self.seconds - time.monotonic()

    def reserve(self, prediction_s: float) -> float:
        """Seconds to keep for predictions that are expected to take so long."""
        return max(_SAFETY * prediction_s, min(_LEAST_S, _LEAST_SHARE * self.seconds))


def run(
    config: RunConfig,
    *,
    competition: Competition,
    paths: Paths,
    run: str,
    split: str,
    folds: Sequence[int],
    show: Callable[[Report], None],
    beforehand: Callable[[], None] = lambda: None,
    budget: Budget | None = None,
    max_steps: int | None = None,
    restart: bool = False,
    allow_changes: bool = False,
    trackers: Mapping[str, OpenTracker] | None = None,
) -> None:
    """Train and predict some folds in turn; base-pair probabilities first, if the network uses them.

    All that comes first is the first fold's work: its job is held meanwhile, so that it can be seen and stopped.

    Where torchrun started several processes, each of them calls this: they train together, and the first does the rest.

    Args:
        config: of the run.
        competition: what is predicted.
        paths: where tables and runs are.
        run: its name.
        split: name of the fold table.
        folds: to hold out, one after the other.
        show: takes the report of every stage as it ends.
        beforehand: what else is done first, once the settings are known to make sense.
        budget: training stops early enough for the predictions of what is there by then.
        max_steps: stop, resumable, after so many steps of a fold.
        restart: set earlier runs aside.
        allow_changes: go on with runs whose settings changed in ways that do them no harm.
        trackers: who else listens to the training.

    Raises:
        ConfigError: the budget is too small for the predictions alone, and what `pipeline.train.run` raises.
        CrashedError: it died several times without a newer checkpoint (`pipeline.training.attempts`).
        StoppedError: asked to stop; or the budget is spent, and the best weights so far have predicted.
    """
    with StopRequest() as stop, join(timeout=config.train.process_timeout) as world:
        # before probabilities, which take minutes
        world.together(partial(require_sense, config, competition, paths=paths))
        how: dict[str, Any] = {"max_steps": max_steps, "restart": restart, "allow_changes": allow_changes}
        if not world.is_main:  # trains with process 0, which does all the rest
            where: dict[str, Any] = {"competition": competition, "paths": paths, "run": run, "split": split}
            for fold in folds:
                with attempts.traced(paths.fold_dir(run, fold)):
                    train.run(config, **where, fold=fold, **how, world=world)
            return
        begins: dict[str, Any] = {"config": config, "processes": world.size, "restart": restart}
        for fold in folds:
            folder = paths.fold_dir(run, fold)
            with _status_told(folder):
                if fold == folds[0]:
                    beforehand()
                    if config.model.kwargs.get("use_bpp"):
                        require_fold_table(paths.fold_table(split))  # probabilities take minutes
                        show(bpp.run_in_turn(paths, time_budget=None if budget is None else max(0.0, budget.left())))
                with attempts.counted(folder, **begins):
                    job = _Fold(config, competition, paths, run, split, fold, show, world)
                    limit = None if budget is None else job.training_time(budget, restart=restart or allow_changes)
                    unfinished = job.train(stop, limit, **how, trackers=trackers)
                    job.predict()
                    if unfinished is not None:
                        raise unfinished


@dataclass(frozen=True)
class _Fold:
    """One fold of a run, trained and predicted."""

    config: RunConfig
    competition: Competition
    paths: Paths
    run: str
    split: str
    fold: int
    show: Callable[[Report], None]
    world: World

    @property
    def folder(self) -> Path:
        return self.paths.fold_dir(self.run, self.fold)

    def training_time(self, budget: Budget, *, restart: bool) -> float | None:
        """Seconds that training may take; None for a fold that is trained already.

        Raises:
            ConfigError: the whole budget has no time for more than the predictions.
            StoppedError: what other folds left of it has none.
        """
        newest = CheckpointStore(self.folder / "checkpoints").newest_meta()
        if newest is not None and newest["progress"]["finished"] and not restart:
            return None
        prediction_s = predict.estimate(
            self.config, competition=self.competition, paths=self.paths, split=self.split, fold=self.fold
        )
        kept = budget.reserve(prediction_s)
        limit = budget.left() - kept
        label = f"{self.run} fold{self.fold}"
        if limit <= 0:
            what = f"{label}: {duration(budget.left())} of the time budget are left, and predictions alone may take "
            what += duration(kept)
            if kept >= budget.seconds:
                raise ConfigError(f"{what}. Next: give a larger BUDGET (--time-budget), or none.")
            raise StoppedError(f"{what}; it is not begun. Next: the same command again begins with it.")
        until = duration(budget.seconds - kept)
        say(f"{label}: training until {until}, {duration(kept)} kept for predictions (expected: {prediction_s:.1f} s)")
        return limit

    def train(
        self,
        stop: StopRequest,
        limit: float | None,
        *,
        max_steps: int | None,
        restart: bool,
        allow_changes: bool,
        trackers: Mapping[str, OpenTracker] | None,
    ) -> StoppedError | None:
        """Train to the end, or until the limit: then the error to end with, once predictions are written."""
        deadline = None if limit is None else time.monotonic() + limit
        try:
            self.show(
                train.run(
                    self.config,
                    competition=self.competition,
                    paths=self.paths,
                    run=self.run,
                    split=self.split,
                    fold=self.fold,
                    max_steps=max_steps,
                    time_budget=limit,
                    restart=restart,
                    allow_changes=allow_changes,
                    trackers=trackers,
                    world=self.world,
                )
            )
        except StoppedError as err:
            if isinstance(err, LostDeviceError) or stop.signalled or deadline is None or time.monotonic() < deadline:
                raise
            say(str(err))
            return StoppedError(
                f"{self.folder}: the time budget is spent before the training is finished; its best weights so far "
                "have predicted. Next: the same command goes on from there and predicts again."
            )
        return None

    def predict(self) -> None:
        facts = {"state": "running", "phase": "predicting", "pid": os.getpid()}
        with contextlib.suppress(OSError):  # a finished run may lie on a read-only disk
            write_status(self.folder, read_status(self.folder) | facts)
        self.show(predict.run(competition=self.competition, paths=self.paths, run=self.run, fold=self.fold))


@contextlib.contextmanager
def _status_told(folder: Path) -> Iterator[None]:
    """Hold a fold's folder, and leave in its status how the work ended; a start that was refused leaves it alone."""
    with jobs.at_work(folder):
        before = read_status(folder)
        try:
            yield
            now = read_status(folder)
            if now.get("state") != "done":
                tell_status(folder, _without_phase(now) | {"state": "done", "exit_code": 0})
        except BusyError:  # the status is the other process's
            raise
        except BaseException as err:
            now = read_status(folder)
            if now != before or not before or isinstance(err, CrashedError):
                with contextlib.suppress(OSError):  # a full disk, say: must not hide why the run ends
                    write_status(folder, _without_phase(now) | {"pid": os.getpid()} | outcome(err))
            raise


def _without_phase(status: dict) -> dict:
    return {key: value for key, value in status.items() if key not in ("phase", "message")}
