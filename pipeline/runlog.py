"""What a run says while it works: progress on a terminal, plain lines elsewhere, and metrics as JSON lines."""

import json
import math
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sized
from pathlib import Path
from typing import Any, TypeVar

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
)

#: Everything a person reads goes through this console; tests and workers may replace it.
console = Console(stderr=True, highlight=False, soft_wrap=True)

#: Results go to standard output; where that is no terminal, tables get a width that holds them.
output = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 120)

_PLAIN_INTERVAL_S = 15.0
_Item = TypeVar("_Item")


class Bar:
    """Progress of one loop: a live bar on a terminal, at most one plain line per interval elsewhere.

    >>> with Bar("clean", total=10, unit="rows") as bar:
    ...     bar.advance(10, note="0 duplicates")
    """

    def __init__(self, label: str, *, total: int | None = None, unit: str = "") -> None:
        self.label, self.total, self.unit = label, total, unit
        self._done, self._note, self._said = 0, "", time.monotonic()
        self._live = console.is_terminal
        columns = (SpinnerColumn(), TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
        tail = (TextColumn(unit), TimeRemainingColumn(), TextColumn("{task.fields[note]}"))
        self._progress = Progress(*columns, *tail, console=console, transient=True, disable=not self._live)
        self._task = self._progress.add_task(label, total=total, note="")

    def __enter__(self) -> "Bar":
        self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._progress.stop()

    def advance(self, count: int = 1, *, note: str = "") -> None:
        """Count more work as done and, if given, show a short note behind the bar."""
        self._done += count
        self._note = note or self._note
        self._progress.update(self._task, advance=count, note=self._note)
        if not self._live and time.monotonic() - self._said >= _PLAIN_INTERVAL_S:
            self._said = time.monotonic()
            of_total = f"/{self.total}" if self.total is not None else ""
            console.print(f"{self.label}: {self._done}{of_total} {self.unit} {self._note}".rstrip(), markup=False)


def track(items: Iterable[_Item], label: str, *, total: int | None = None, unit: str = "") -> Iterator[_Item]:
    """Iterate with a progress bar."""
    if total is None and isinstance(items, Sized):
        total = len(items)
    with Bar(label, total=total, unit=unit) as bar:
        for item in items:
            yield item
            bar.advance()


def say(message: str) -> None:
    """Print one line for the person in front of the run (stderr, without markup)."""
    console.print(message, markup=False)


def warn(message: str) -> None:
    """Print one line that asks for attention."""
    console.print(f"warning: {message}", style="yellow" if console.is_terminal else None, markup=False)


class MetricsLog:
    """Append-only JSON lines, one event each, flushed at once. Non-finite numbers become null beside a flag."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        _cut_torn_tail(path)
        self.path = path
        self._handle = path.open("a")

    def write(self, event: str, **values: Any) -> None:
        """Append ``{"event": …, "time": …, **values}``."""
        row = {"event": event, "time": round(time.time(), 3)} | _finite(values)
        self._handle.write(json.dumps(row, allow_nan=False) + "\n")
        self._handle.flush()

    def close(self) -> None:
        self._handle.close()


def _cut_torn_tail(path: Path) -> None:
    """Cut a half-written last line, as a killed run leaves it, so that the next line does not run into it."""
    lines = path.read_bytes() if path.exists() else b""
    whole = lines.rfind(b"\n") + 1
    if whole < len(lines):
        with path.open("r+b") as handle:
            handle.truncate(whole)


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics log; a torn last line, as a killed run leaves it, is dropped.

    Raises:
        ValueError: a line before the last one is not JSON (somebody edited the file).
    """
    lines = path.read_text().split("\n") if path.exists() else []
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as err:
            if number == len(lines):
                break
            raise ValueError(f"{path}: line {number} is not JSON: {line[:60]!r}") from err
    return rows


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    clean: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, float) and not math.isfinite(value):
            clean[key], clean[f"{key}_nonfinite"] = None, str(value)
        else:
            clean[key] = value
    return clean


def peak_memory_mib() -> float:
    """Largest resident memory of this process so far, MiB."""
    import resource

    status = Path("/proc/self/status")
    if status.exists():  # on Linux ru_maxrss begins with the peak of the process that started this one
        high_water = next((line for line in status.read_text().splitlines() if line.startswith("VmHWM:")), None)
        if high_water:
            return int(high_water.split()[1]) / 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (1024 if sys.platform != "darwin" else 1024**2)
