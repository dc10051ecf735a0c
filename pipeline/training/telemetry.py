"""What a training run tells while it works: bar, metrics.jsonl and status.json."""

import contextlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from pipeline import runlog
from pipeline.errors import DataError, StoppedError
from pipeline.memory import peak_memory_mib
from pipeline.stage import write_text
from pipeline.training.trackers import OpenTracker, Tracker

_ROWS = 2000  # "step" rows of a whole run in metrics.jsonl, at most
_STATUS_INTERVAL_S = 5.0
_STATES = {75: "stopped", 4: "diverged"}  # by exit code
_KEPT = ("metric", "best_metric")  # of the status that an earlier process left


@dataclass(kw_only=True)
class _Interval:
    """What happened since the last "step" row."""

    started: float = field(default_factory=time.monotonic)
    trained: float = field(default_factory=time.monotonic)  # when its last step ended
    loss_sum: float = 0.0
    loss_weight: float = 0.0
    tokens: int = 0
    grad_norm: float = 0.0  # the largest


class Telemetry:
    """The voice of one training process; open while it trains.

    It is there to be looked at: where a status or a tracker cannot be written, training goes on with a warning.

    Args:
        folder: of the fold; metrics.jsonl and status.json lie there.
        label: of the progress bar.
        steps: of the whole run.
        first_step: where this process begins.
        metric: what to call the validation metric.
        work: step -> all that is to be done until then, in any unit, of which the time left is told; None = steps.
        trackers: who else listens, by name.
        meta: of the run, for the trackers.
    """

    def __init__(
        self,
        folder: Path,
        *,
        label: str,
        steps: int,
        first_step: int,
        metric: str,
        work: Callable[[int], float] | None = None,
        trackers: Mapping[str, OpenTracker] | None = None,
        meta: Mapping[str, Any] | None = None,
    ) -> None:
        self.log = runlog.MetricsLog(folder / "metrics.jsonl")
        self._folder, self._metric_name, self._warned = folder, metric, False
        self._work = work or float
        self._openers, self._meta, self._trackers = trackers or {}, meta or {}, dict[str, Tracker]()
        self._steps, self._first_step, self._row_every = steps, first_step, max(1, steps // _ROWS)
        self._bar, self._shown = runlog.Bar(label, total=steps, unit="steps", timed=False), 0
        self._started, self._said, self._interval = time.monotonic(), -_STATUS_INTERVAL_S, _Interval()
        before = runlog.read_status(folder)
        self._state: dict[str, Any] = {key: before[key] for key in _KEPT if key in before}
        self._state |= {"step": first_step, "steps": steps, "pid": os.getpid()}

    def __enter__(self) -> "Telemetry":
        for name, open_tracker in self._openers.items():
            with self._guarded(name):
                self._trackers[name] = open_tracker(self._folder, self._meta, self._first_step)
        self._bar.__enter__()
        self._show(self._first_step)
        self.set_state("running")
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, _: TracebackType | None) -> None:
        self._bar.__exit__()
        self._tell_trackers(lambda tracker: tracker.close())
        self.log.close()
        if err is None:
            self.set_state("done", exit_code=0)
        else:
            self.set_state(**outcome(err))

    def set_state(self, state: str, **facts: Any) -> None:
        """Write status.json now."""
        self._state |= {"state": state, "memory_mib": round(peak_memory_mib()), **gpu_memory(), **facts}
        try:
            runlog.write_status(self._folder, self._state)
        except OSError as err:
            if not self._warned:
                runlog.warn(f"{self._folder}: status.json cannot be written: {err.strerror}; training goes on")
            self._warned = True
        self._said = time.monotonic()

    def step(self, *, step: int, epoch: int, loss: float, weight: float, norm: float, lr: float, tokens: int) -> None:
        """Tell of one update; a row in the log for every interval."""
        interval = self._interval
        interval.loss_sum += loss * weight
        interval.loss_weight += weight
        interval.tokens += tokens
        interval.trained = time.monotonic()
        interval.grad_norm = max(interval.grad_norm, norm)
        if step % self._row_every == 0:
            self._write_row(step=step, epoch=epoch, lr=lr)
        self._show(step, note=self._note())
        self._state |= {"step": step, "epoch": epoch}
        if time.monotonic() - self._said >= _STATUS_INTERVAL_S:
            self.set_state("running")

    def epoch(self, *, step: int, epoch: int, train_loss: float, metric: float, best: bool, **facts: Any) -> None:
        """Tell of a finished epoch; `facts` are the other values of the validation, and times."""
        self._interval.started += time.monotonic() - self._interval.trained  # validation is no training
        memory = {"memory_mib": round(peak_memory_mib()), **gpu_memory()}
        row = {"step": step, "epoch": epoch, "train_loss": train_loss, "metric": metric, "best": best}
        self.log.write("epoch", **row, **facts, **memory)
        self._state |= {"metric": _finite(metric)}
        if best:
            self._state |= {"best_metric": metric}
        self.set_state("running")
        values = {"train_loss": train_loss, "metric": metric, **facts.get("valid", {})}
        self._track({f"epoch/{name}": value for name, value in values.items()}, step=step)

    def _show(self, step: int, *, note: str = "") -> None:
        """Move the bar to a step; over steps that a rollback repeats it stands still."""
        self._bar.advance(max(0, step - self._shown), note=note)
        self._shown = max(step, self._shown)

    def _write_row(self, *, step: int, epoch: int, lr: float) -> None:
        interval = self._interval
        now = interval.trained
        mean = interval.loss_sum / interval.loss_weight if interval.loss_weight else 0.0
        rate = interval.tokens / max(now - interval.started, 1e-9)
        row = {"step": step, "epoch": epoch, "loss": mean, "lr": lr, "tokens_per_s": round(rate, 1)}
        self.log.write("step", **row, grad_norm=interval.grad_norm)
        self._interval = _Interval(started=now, trained=now)
        first, left = self._first_step, self._work(self._steps) - self._work(step)
        done = self._work(max(step, first + 1)) - self._work(first)  # a rollback may go back to before the first step
        eta = (now - self._started) * left / max(done, 1.0)
        self._state |= row | {"eta_s": round(eta, 1)}
        shown = {"loss": mean, "lr": lr, "tokens_per_s": rate, "grad_norm": interval.grad_norm}
        self._track({f"train/{name}": value for name, value in shown.items()}, step=step)

    def _track(self, values: Mapping[str, float], *, step: int) -> None:
        finite = {name: value for name, value in values.items() if math.isfinite(value)}
        self._tell_trackers(lambda tracker: tracker.log(finite, step=step))

    def _tell_trackers(self, tell: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self._trackers.items()):
            with self._guarded(name):
                tell(tracker)

    @contextlib.contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        """What a tracker does; one that cannot is warned of and left out from then on."""
        try:
            yield
        except StoppedError:  # a signal's
            raise
        except Exception as err:  # somebody else's program may raise anything, and training is worth more
            self._trackers.pop(name, None)
            runlog.warn(f"TRACK={name}: {type(err).__name__}: {err}; it is left out, training goes on")

    def _note(self) -> str:
        state = self._state
        if "loss" not in state:
            return ""
        metric = f"{self._metric_name} {runlog.score_text(state['metric'])} " if state.get("metric") is not None else ""
        memory = state.get("gpu_memory_mib", state["memory_mib"]) / 1024
        rate = f"lr {state['lr']:.1e} {state['tokens_per_s']:,.0f} nt/s"
        return f"loss {state['loss']:.4f} {metric}{rate} {memory:.1f} GiB, {runlog.duration(state['eta_s'])} left"


class Silence:
    """In place of the telemetry, in a process that is not the first of several that train one run together."""

    def __init__(self) -> None:
        self.log = runlog.MetricsLog(Path(os.devnull))

    def __enter__(self) -> "Silence":
        return self

    def __exit__(self, *_: object) -> None:
        self.log.close()

    def step(self, **_: object) -> None:
        """Say nothing."""

    def epoch(self, **_: object) -> None:
        """Say nothing."""


def drop_rows_after(path: Path, *, step: int, epoch: int) -> None:
    """Forget what a killed run logged beyond its last checkpoint: these steps come again.

    What it logged before it saved that checkpoint stays, also of higher steps: a rollback took it back from there, and
    a batch that was left out there does not come again.

    Args:
        path: metrics.jsonl; a torn last line is dropped too.
        step: of the checkpoint.
        epoch: that the checkpoint is in.

    Raises:
        DataError: a line before the last one is not JSON.
    """
    try:
        rows = runlog.read_metrics(path)
    except ValueError as err:
        raise DataError(f"{err}. Next: move the file away; training goes on without it.") from err

    def stays(row: dict[str, Any]) -> bool:
        return row.get("step", 0) <= step and not (row["event"] == "epoch" and row["epoch"] >= epoch)

    saved = [place for place, row in enumerate(rows) if row["event"] == "checkpoint" and row["step"] == step]
    until = saved[-1] if saved else 0  # a run may have been killed before it could log its checkpoint
    if rows:
        kept = [row for place, row in enumerate(rows) if place < until or stays(row)]
        write_text(path, "".join(json.dumps(row) + "\n" for row in kept))


def outcome(err: BaseException) -> dict[str, Any]:
    """State, exit code and message of a run that an error ended."""
    code = getattr(err, "exit_code", 1)
    return {"state": _STATES.get(code, "failed"), "exit_code": code, "message": str(err)}


def settle_status(folder: Path) -> None:
    """Correct the status of a finished run that was killed before it could say so."""
    status = runlog.read_status(folder)
    if status.get("state") != "done":
        tell_status(folder, status | {"state": "done", "exit_code": 0})


def tell_status(folder: Path, status: Mapping[str, Any]) -> None:
    """Replace a fold's status, where that is possible: it is there to be looked at, and work is done without."""
    try:
        runlog.write_status(folder, status)
    except OSError as err:
        runlog.warn(f"{folder}: status.json cannot be written: {err.strerror}")


def gpu_memory() -> dict[str, int]:
    """Peak memory that torch allocated on the CUDA device, MiB; empty without one."""
    if not torch.cuda.is_available():
        return {}
    return {"gpu_memory_mib": round(torch.cuda.max_memory_allocated() / 2**20)}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
