"""``submissions/ledger.jsonl``: what was sent to Kaggle, by sha256. One line an event; the last line of a tag holds.

A line is written before a file is sent: a run that is killed in between leaves a trace that the next one looks up.
"""

import contextlib
import fcntl
import json
import os
import time
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

from pipeline.errors import DataError
from pipeline.runlog import cut_torn_tail

State = Literal["sent", "listed", "scored", "failed"]


@dataclass(frozen=True, kw_only=True)
class Sent:
    """One submission: what it was, and how far it is known to have come."""

    comp: str
    sha256: str
    tag: str  # in the submission's description, by which it is found in Kaggle's list
    file: str
    state: State = "sent"
    ref: int | None = None
    public: str = ""
    private: str = ""

    def now(self, state: State, **facts: Any) -> "Sent":
        """The same submission, further on."""
        return replace(self, state=state, **facts)


def append(path: Path, sent: Sent) -> None:
    """Add a line, on the disk before this returns; two at a time wait for each other, where the disk gives locks."""
    path.parent.mkdir(parents=True, exist_ok=True)
    row = {"time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())} | asdict(sent)
    with path.open("a") as handle:
        with contextlib.suppress(OSError):  # some file systems have no locks: one upload at a time needs none
            fcntl.flock(handle, fcntl.LOCK_EX)  # or one would cut, as torn, what the other has just written
        cut_torn_tail(path)
        handle.write(json.dumps(row) + "\n")
        handle.flush()
        os.fsync(handle.fileno())


def find(path: Path, *, comp: str, sha256: str) -> Sent | None:
    """The last submission of these bytes that did not fail, or None.

    Raises:
        DataError: a line is not what this program writes.
    """
    latest: dict[str, Sent] = {}
    lines = path.read_text().splitlines() if path.exists() else []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            row.pop("time")
            latest[row["tag"]] = Sent(**row)
        except (ValueError, TypeError, KeyError) as err:
            if number == len(lines):  # torn by a killed run
                break
            raise DataError(f"{path}: line {number} is no entry ({err!r}). Next: restore or remove that line.") from err
    same = [sent for sent in latest.values() if (sent.comp, sent.sha256) == (comp, sha256) and sent.state != "failed"]
    return same[-1] if same else None
