"""What a run says while it works: progress on a terminal, plain lines elsewhere, metrics as JSON lines, its status."""

import contextlib
import errno
import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sized
from pathlib import Path
from typing import Any, TextIO, TypeVar

from rich.console import Console, RenderableType
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    SpinnerColumn,
    Task,
    TextColumn,
    TimeRemainingColumn,
)
from rich.table import Column
from rich.text import Text

from pipeline.commands import complete
from pipeline.stage import write_json


def fill_standard_streams() -> None:
    """Point standard streams that are closed (``>&-``) at nothing.

    Otherwise the next file that is opened, a checkpoint say, gets the stream's number and all that is said to it.
    """
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        if getattr(sys, name) is None:
            null = os.open(os.devnull, os.O_RDWR)  # the lowest number that is free, so it may be the right one
            os.dup2(null, number)
            if null != number:
                os.close(null)
            else:
                os.set_inheritable(number, True)
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))  # noqa: SIM115 (stays open)


fill_standard_streams()

#: Everything a person reads goes through this console; tests and workers may replace it.
console = Console(stderr=True, highlight=False, soft_wrap=True)

#: Results go to standard output; in a file or a pipe no line of a table has to be broken.
output = Console(highlight=False, soft_wrap=True, width=None if sys.stdout.isatty() else 400)

_PLAIN_INTERVAL_S = 15.0
_BAR_WIDTH = 8  # characters that a bar has at least
_Item = TypeVar("_Item")


def rate_text(rate: float) -> str:
    """How many a second, with digits where they are few.

    >>> rate_text(412.3), rate_text(0.0417)
    ('412/s', '0.042/s')
    """
    return f"{rate:.0f}/s" if rate >= 10 else f"{rate:.2g}/s"


class Bar:
    """Progress of one loop: a live bar on a terminal, at most one plain line per interval elsewhere.

    Args:
        label: in front of it.
        total: units of the whole loop, if that is known.
        unit: what is counted.
        timed: show the time left, by what was counted; False where the notes tell it by another measure.

    >>> with Bar("clean", total=10, unit="rows") as bar:
    ...     bar.advance(10, note="0 duplicates")
    """

    def __init__(self, label: str, *, total: int | None = None, unit: str = "", timed: bool = True) -> None:
        self.label, self.total, self.unit = label, total, unit
        self._done, self._note, self._said = 0, "", time.monotonic()
        self._live = console.is_terminal
        whole, rest = Column(no_wrap=True), Column(no_wrap=True, ratio=1, width=_BAR_WIDTH)
        name = _LabelColumn("{task.description}", table_column=Column())
        columns = (SpinnerColumn(), name, BarColumn(None, table_column=rest), MofNCompleteColumn(table_column=whole))
        tail = (TextColumn(unit), *([TimeRemainingColumn(compact=True, table_column=whole)] if timed else []))
        self._progress = _NotedProgress(*columns, *tail, console=console, transient=True, expand=True)
        self._task = self._progress.add_task(label, total=total, note="")

    def __enter__(self) -> "Bar":
        if self._live:
            self._progress.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._live:  # rich 13 ends also a bar that it did not draw, with an empty line
            self._progress.stop()

    def advance(self, count: int = 1, *, note: str = "") -> None:
        """Count more work as done and, if given, show a short note with the bar."""
        self._done += count
        self._note = note or self._note
        self._progress.update(self._task, advance=count, note=self._note)
        if not self._live and time.monotonic() - self._said >= _PLAIN_INTERVAL_S:
            self._said = time.monotonic()
            of_total = f"/{self.total}" if self.total is not None else ""
            console.print(f"{self.label}: {self._done}{of_total} {self.unit} {self._note}".rstrip(), markup=False)


class _LabelColumn(TextColumn):
    """What a narrow terminal cuts first: the numbers say more."""

    def render(self, task: Task) -> Text:
        text = super().render(task)
        text.no_wrap, text.overflow = True, "ellipsis"
        return text


class _NotedProgress(Progress):
    """A bar with its note in a line below, where 80 columns hold it whole."""

    def get_renderables(self) -> Iterable[RenderableType]:
        yield self.make_tasks_table(self.tasks)
        for task in self.tasks:
            if task.fields["note"]:
                yield Text(f"  {task.fields['note']}", overflow="ellipsis", no_wrap=True)


def track(items: Iterable[_Item], label: str, *, unit: str = "") -> Iterator[_Item]:
    """Iterate with a progress bar; `items` without a length are counted up."""
    with Bar(label, total=len(items) if isinstance(items, Sized) else None, unit=unit) as bar:
        for item in items:
            yield item
            bar.advance()


def say(message: str) -> None:
    """Print one line for the person in front of the run (stderr, without markup)."""
    console.print(complete(message), markup=False)


def warn(message: str) -> None:
    """Print one line that asks for attention."""
    console.print(f"warning: {complete(message)}", style="yellow" if console.is_terminal else None, markup=False)


class Unbreakable:
    """A text stream whose reader may go: what is said to a closed terminal or a full disk is lost, the run is not.

    Writing to a terminal that was closed raises OSError (EIO), also in a process that was told to survive that. Of
    letters that a stream's encoding does not have (±, …) the numbers are written.
    """

    def __init__(self, stream: TextIO) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        """Write what can be written."""
        with contextlib.suppress(OSError):
            try:
                self._stream.write(text)
            except UnicodeEncodeError as err:
                self._stream.write(text.encode(err.encoding, "backslashreplace").decode(err.encoding))
        return len(text)

    def flush(self) -> None:
        """Flush what can be flushed."""
        with contextlib.suppress(OSError):
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


class MetricsLog:
    """Append-only JSON lines, one event each, on their way at once. Non-finite numbers become null beside a flag.

    What a full disk does not take is kept and written with a later row: a log line is no reason to end a run.
    """

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        cut_torn_tail(path)
        self.path, self._waiting, self._warned = path, b"", False
        self._handle = path.open("ab", buffering=0)

    def write(self, event: str, **values: Any) -> None:
        """Append ``{"event": …, "time": …, **values}``."""
        row = {"event": event, "time": round(time.time(), 3)} | _finite(values)
        self._waiting += (json.dumps(row, allow_nan=False) + "\n").encode()
        try:
            while self._waiting:
                self._waiting = self._waiting[self._handle.write(self._waiting) :]
        except OSError as err:
            if not self._warned:
                warn(f"{self.path}: {err.strerror}; rows are kept and written when that is possible again")
            self._warned = True

    def close(self) -> None:
        self._handle.close()


def cut_torn_tail(path: Path) -> None:
    """Cut a half-written last line, as a killed run leaves it, so that the next line does not run into it.

    One that lacks its end alone, as an editor may leave it, gets it.
    """
    lines = path.read_bytes() if path.exists() else b""
    tail = lines[lines.rfind(b"\n") + 1 :]
    if not tail:
        return
    with path.open("r+b") as handle:
        try:
            json.loads(tail)
            handle.seek(len(lines))
            handle.write(b"\n")
        except ValueError:
            handle.truncate(len(lines) - len(tail))


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics log; a torn last line, as a killed run leaves it, is dropped.

    Raises:
        ValueError: a line before the last one is no JSON row (somebody edited the file, or the disk lost a part of it).
    """
    lines = path.read_text(errors="replace").split("\n") if path.exists() else []
    rows = []
    for number, line in enumerate(lines, start=1):
        if not line:
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError:
            row = None
        if isinstance(row, dict) and "event" in row:
            rows.append(row)
        elif number < len(lines):
            raise ValueError(f"{path}: line {number} is not JSON with an event: {line[:60]!r}")
    return rows


def read_status(folder: Path) -> dict[str, Any]:
    """What a run last said of itself in its folder's status.json; empty where it said nothing that can be read."""
    return read_dict(folder / "status.json")


def read_dict(path: Path) -> dict[str, Any]:
    """What a JSON file says, empty where it says nothing that can be read."""
    try:
        said = json.loads(path.read_text())
    except (OSError, ValueError):  # not there, no JSON or no text
        return {}
    return said if isinstance(said, dict) else {}


def write_status(folder: Path, status: Mapping[str, Any]) -> None:
    """Replace a run's status.json; every one says when it was written.

    Raises:
        OSError: it cannot be written. A folder that was moved away under a run is not made again.
    """
    if not folder.is_dir():
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), str(folder))
    told = {key: complete(value) if key == "message" else value for key, value in status.items()}
    write_json(folder / "status.json", told | {"updated": round(time.time(), 1)})


def duration(seconds: float) -> str:
    """A time span for people.

    >>> duration(27_660), duration(185), duration(9.4)
    ('7 h 41 min', '3 min 5 s', '9 s')
    """
    whole = max(0, round(seconds))
    minutes, rest = divmod(whole, 60)
    if minutes >= 60:
        return f"{minutes // 60} h {minutes % 60} min"
    return f"{minutes} min {rest} s" if minutes else f"{rest} s"


def amount(count: int, noun: str) -> str:
    """So many of something, for people.

    >>> amount(1, "batch"), amount(1200, "batch"), amount(2, "class"), amount(0, "file")
    ('1 batch', '1,200 batches', '2 classes', '0 files')
    """
    ending = "" if count == 1 else "es" if noun.endswith(("tch", "ss")) else "s"
    return f"{count:,} {noun}{ending}"


def size_text(size: int) -> str:
    """Bytes for people, in the unit that suits them.

    >>> [size_text(size) for size in (700, 200 * 2**10, 3 * 2**20 + 2**19, 47 * 2**20, 22 * 2**30)]
    ['700 bytes', '200 KiB', '3.5 MiB', '47 MiB', '22.0 GiB']
    """
    if size >= 2**30:
        return f"{size / 2**30:,.1f} GiB"
    if size >= 2**20:
        return f"{size / 2**20:.{1 if size < 10 * 2**20 else 0}f} MiB"
    return f"{size / 2**10:.0f} KiB" if size >= 2**10 else f"{size} bytes"


def score_text(value: float, digits: int = 4) -> str:
    """A score for people: so many decimals, or, of one that is all but lost in them, significant digits.

    >>> score_text(0.19604), score_text(12.5), score_text(0.00003142)
    ('0.1960', '12.5000', '3.142e-05')
    """
    fixed = f"{value:,.{digits}f}"
    return f"{value:.{digits}g}" if 0 < abs(value) < 10 ** (1 - digits) else fixed


def spread_text(spread: float, *, mean: float) -> str:
    """The spread of scores for people, in the decimals that their mean has.

    >>> spread_text(9.94e-07, mean=0.6931), spread_text(2.5e-06, mean=0.00003142)
    ('0.0000', '2.5e-06')
    """
    return f"{spread:,.4f}" if abs(mean) >= 1e-3 else score_text(spread)


def _finite(values: Mapping[str, Any]) -> dict[str, Any]:
    clean: dict[str, Any] = {}
    for key, value in values.items():
        if isinstance(value, Mapping):
            clean[key] = _finite(value)
        elif isinstance(value, float) and not math.isfinite(value):
            clean[key], clean[f"{key}_nonfinite"] = None, str(value)
        else:
            clean[key] = value
    return clean
