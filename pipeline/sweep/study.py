"""A study: Optuna proposes cells, several workers that share a folder take turns, and the dead are replaced."""

import contextlib
import json
import math
import statistics
import time
import uuid
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from pipeline.errors import BusyError, ConfigError, DataError, StoppedError
from pipeline.runlog import cut_torn_tail, say
from pipeline.sweep.jobs import Axis, Job, Settings, Sweep, asked_for, label, refuse_changes
from pipeline.training.stop import POLL_S, lock_holder, run_lock

#: Locks: a worker's, with a random name; that of who counts trials; that of who reads or writes the log.
_WORKER, _TURN, _LOG = ".worker-", ".turn", ".log"


def run_study(sweep: Sweep, axes: Sequence[Axis], trials: int, results: dict[Job, float | None]) -> Iterator[int]:
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
    log = sweep.folder / "study.log"  # a file, fit for network folders
    lock: Any = _LogLock(sweep.folder)
    with _turn(sweep.folder, name=_LOG):  # others' lines are whole then: who was killed, or had no disk left, tore one
        cut_torn_tail(log)
    try:
        storage = JournalStorage(JournalFileBackend(str(log), lock_obj=lock))
        study = optuna.create_study(study_name=sweep.name, storage=storage, load_if_exists=True)
    except (json.JSONDecodeError, KeyError) as err:
        raise DataError(
            f"{log}: damaged ({type(err).__name__}: {err}). Next: take another NAME, or move this file away; runs "
            "that are trained stay, and a new study takes their metrics where it proposes the same values."
        ) from err
    _require_same(study, sweep, axes)
    states = optuna.trial.TrialState
    me = f"{_WORKER}{uuid.uuid4().hex[:12]}"
    with _signed(sweep.folder, me):
        while (proposed := _next_trial(study, states, sweep, axes, trials, me)) is not None:
            trial, cell = proposed
            say(f"sweep {sweep.name}: trial {trial.number}: {label(cell)}")
            metrics = _metrics(sweep, cell, results)
            finite = [value for value in metrics if value is not None]
            study.tell(trial, statistics.fmean(finite) if len(finite) == len(metrics) else math.inf)
            yield 0
    for done in study.get_trials(deepcopy=False, states=(states.COMPLETE,)):  # also what other workers did
        _metrics(sweep, tuple((key, value) for key, value in done.user_attrs["cell"]), results)
    yield 0


def _metrics(sweep: Sweep, cell: Settings, results: dict[Job, float | None]) -> list[float | None]:
    """Of all jobs of a cell, taken into `results`; what is there stays: one that diverged would do so again."""
    jobs = sweep.jobs(cell)
    results |= {job: sweep.awaited_metric(job) for job in jobs if job not in results}
    return [results[job] for job in jobs]


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
        time.sleep(POLL_S)


class _LogLock:
    """What Optuna asks for, as a lock that dies with its process: those that it brings stay where one was killed."""

    def __init__(self, folder: Path) -> None:
        self._folder, self._held = folder, contextlib.ExitStack()

    def acquire(self) -> bool:
        self._held.enter_context(_turn(self._folder, name=_LOG))
        return True

    def release(self) -> None:
        self._held.close()


@contextlib.contextmanager
def _turn(folder: Path, *, name: str = _TURN) -> Iterator[None]:
    """One worker at a time, each as soon as it can."""
    while True:
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(run_lock(folder, name=name))
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
    asked = asked_for(sweep, axes)
    refuse_changes(sweep, study.user_attrs.get("asked", asked), asked)
    study.set_user_attr("asked", asked)


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
