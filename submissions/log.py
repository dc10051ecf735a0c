"""``submissions/LOG.md``: one line per evaluated run, failures too, never the same result twice."""

import contextlib
import datetime
import fcntl
import os
from dataclasses import astuple, dataclass, fields
from pathlib import Path

from pipeline.stage import write_text

#: What a new log starts with; lines of the table follow.
TITLE = """# Log of evaluated runs

One line per result, written by `make evaluate`; those without floors are steps on the way, added by hand. Scores are
out of fold by the organisers' metric, floors are fitted on the other folds of the same split. The epoch that predicts
was chosen by its score on that same fold, which flatters a score a little. `data`, `config` and `commit` are the first
digits of what the result came from.

"""


_IDENTITY = ("comp", "name", "split", "folds", "metric", "score", "data")


@dataclass(frozen=True, kw_only=True)
class LogEntry:
    """A line of the log; every field is a column."""

    date: str
    comp: str
    name: str
    split: str
    folds: str
    metric: str
    score: str
    floors: str
    data: str
    config: str
    commit: str
    note: str = ""

    def line(self) -> str:
        """The entry as a row of a Markdown table."""
        return _row(astuple(self))

    def same_result(self, cells: list[str]) -> bool:
        """Whether a row of the log tells the same score of the same run and data."""
        beside = dict(zip((field.name for field in fields(self)), cells, strict=False))
        return all(beside.get(name) == _clean(getattr(self, name)) for name in _IDENTITY)


def append(path: Path, entry: LogEntry) -> bool:
    """Add an entry to a log, unless it is there; the file is made when absent.

    Returns:
        whether a line was added.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = os.open(path.parent, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # some file systems have no locks: one evaluation at a time needs none
            fcntl.flock(folder, fcntl.LOCK_EX)  # or the line of one that ends at the same time is lost
        text = path.read_text() if path.exists() else TITLE + header()
        rows = [[cell.strip() for cell in line.strip().strip("|").split(" | ")] for line in text.splitlines()]
        if any(entry.same_result(cells) for cells in rows):
            return False
        write_text(path, text.rstrip("\n") + "\n" + entry.line())
        return True
    finally:
        os.close(folder)


def header() -> str:
    """The first two lines of the table."""
    names = tuple(field.name for field in fields(LogEntry))
    return _row(names) + _row(("---",) * len(names))


def today() -> str:
    """Date in UTC, as the log writes it."""
    return datetime.datetime.now(datetime.UTC).date().isoformat()


def _row(cells: tuple[str, ...]) -> str:
    return "| " + " | ".join(map(_clean, cells)) + " |\n"


def _clean(cell: str) -> str:
    return " ".join(cell.replace("|", "/").split())
