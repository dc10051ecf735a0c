"""What a training run tells while it works: bar, metrics.jsonl and status.json."""

import json
import math
import os
import time
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from pipeline import runlog
from pipeline.errors import DataError
from pipeline.stage import write_json

_ROWS = 2000  # "step" rows of a whole run in metrics.jsonl, at most
_STATUS_INTERVAL_S = 2.0


@dataclass(kw_only=True)
class _Interval:
    """What happened since the last "step" row."""

    started: float = field(default_factory=time.monotonic)
    loss_sum: float = 0.0
    loss_weight: float = 0.0
    tokens: int = 0
    grad_norm: float = 0.0  # the largest


class Telemetry:
    """The voice of one training process; open while it trains.

    Args:
        folder: of the fold; metrics.jsonl and status.json lie there.
        label: of the progress bar.
        steps: of the whole run.
        first_step: where this process begins.
        metric: what to call the validation metric.
    """

    def __init__(self, folder: Path, *, label: str, steps: int, first_step: int, metric: str) -> None:
        self.log = runlog.MetricsLog(folder / "metrics.jsonl")
        self._status_path, self._metric_name = folder / "status.json", metric
        self._steps, self._first_step, self._row_every = steps, first_step, max(1, steps // _ROWS)
        self._bar, self._shown = runlog.Bar(label, total=steps, unit="steps"), 0
        self._started, self._said, self._interval = time.monotonic(), -_STATUS_INTERVAL_S, _Interval()
        self._state: dict[str, Any] = {"step": first_step, "steps": steps, "pid": os.getpid()}

    def __enter__(self) -> "Telemetry":
        self._bar.__enter__()
        self._show(self._first_step)
        self.set_state("running")
        return self

    def __exit__(self, kind: type[BaseException] | None, err: BaseException | None, _: TracebackType | None) -> None:
        self._bar.__exit__()
        self.log.close()
        if err is None:
            self.set_state("done", exit_code=0)
        else:
            code = getattr(err, "exit_code", 1)
            states = {75: "stopped", 4: "diverged"}
            self.set_state(states.get(code, "failed"), exit_code=code, message=str(err))

    def set_state(self, state: str, **facts: Any) -> None:
        """Write status.json now."""
        self._state |= {"state": state, "memory_mib": round(runlog.peak_memory_mib()), **gpu_memory(), **facts}
        write_json(self._status_path, self._state | {"updated": round(time.time(), 1)})
        self._said = time.monotonic()

    def step(self, *, step: int, epoch: int, loss: float, weight: float, norm: float, lr: float, tokens: int) -> None:
        """Tell of one update; a row in the log for every interval."""
        interval = self._interval
        interval.loss_sum += loss * weight
        interval.loss_weight += weight
        interval.tokens += tokens
        interval.grad_norm = max(interval.grad_norm, norm)
        if step % self._row_every == 0:
            self._write_row(step=step, epoch=epoch, lr=lr)
        self._show(step, note=self._note())

    def epoch(self, *, step: int, epoch: int, train_loss: float, metric: float, best: bool, **facts: Any) -> None:
        """Tell of a finished epoch; `facts` are the other values of the validation, and times."""
        memory = {"memory_mib": round(runlog.peak_memory_mib()), **gpu_memory()}
        row = {"step": step, "epoch": epoch, "train_loss": train_loss, "metric": metric, "best": best}
        self.log.write("epoch", **row, **facts, **memory)
        self._state |= {"metric": _finite(metric)}
        if best:
            self._state |= {"best_metric": metric}
        self.set_state("running")

    def _show(self, step: int, *, note: str = "") -> None:
        """Move the bar to a step; over steps that a rollback repeats it stands still."""
        self._bar.advance(max(0, step - self._shown), note=note)
        self._shown = max(step, self._shown)

    def _write_row(self, *, step: int, epoch: int, lr: float) -> None:
        interval, now = self._interval, time.monotonic()
        mean = interval.loss_sum / interval.loss_weight if interval.loss_weight else 0.0
        rate = interval.tokens / max(now - interval.started, 1e-9)
        row = {"step": step, "epoch": epoch, "loss": mean, "lr": lr, "tokens_per_s": round(rate, 1)}
        self.log.write("step", **row, grad_norm=interval.grad_norm)
        self._interval = _Interval(started=now)
        eta = (now - self._started) / max(step - self._first_step, 1) * (self._steps - step)
        self._state |= row | {"eta_s": round(eta, 1)}
        if now - self._said >= _STATUS_INTERVAL_S:
            self.set_state("running")

    def _note(self) -> str:
        state = self._state
        if "loss" not in state:
            return ""
        metric = f"{self._metric_name} {state['metric']:.4f} " if state.get("metric") is not None else ""
        eta = "" if runlog.console.is_terminal else f" {state['eta_s']:.0f} s left"
        return f"loss {state['loss']:.4f} {metric}lr {state['lr']:.1e} {state['tokens_per_s']:,.0f} nt/s{eta}"


def drop_rows_after(path: Path, *, step: int, epoch: int) -> None:
    """Forget what a killed run logged beyond its last checkpoint: these steps come again.

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

    part = path.with_name(f".{path.name}.part-{os.getpid()}")
    part.write_text("".join(json.dumps(row) + "\n" for row in rows if stays(row)))
    part.replace(path)


def settle_status(folder: Path) -> None:
    """Correct the status of a finished run that was killed before it could say so."""
    path = folder / "status.json"
    try:
        status = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):  # not there, no JSON or no text
        status = {}
    if status.get("state") != "done":
        write_json(path, status | {"state": "done", "exit_code": 0, "updated": round(time.time(), 1)})


def gpu_memory() -> dict[str, int]:
    """Peak memory that torch allocated on the CUDA device, MiB; empty without one."""
    if not torch.cuda.is_available():
        return {}
    return {"gpu_memory_mib": round(torch.cuda.max_memory_allocated() / 2**20)}


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
