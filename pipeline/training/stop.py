"""Asking a run to stop, and being asked: signals, time budget, one run a folder."""

import contextlib
import fcntl
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from types import FrameType

from pipeline.errors import StoppedError

_SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP)


class StopRequest:
    """A flag that a signal or the clock sets and that every loop polls.

    The first signal lets the step end and the state be saved; the second one acts as if nobody listened. A hang-up
    that was ignored when the run began (nohup) stays ignored.

    >>> with StopRequest(time_budget=3600) as stop:
    ...     assert stop.reason() is None
    """

    def __init__(self, *, time_budget: float | None = None) -> None:
        self._deadline = None if time_budget is None else time.monotonic() + time_budget
        self._received: signal.Signals | None = None
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            for number in _SIGNALS:
                if number is not signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]

    def _on_signal(self, number: int, _frame: FrameType | None) -> None:
        if self._received is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        self._received = signal.Signals(number)

    def reason(self) -> str | None:
        """Why the run has to stop now, or None."""
        if self._received is not None:
            return self._received.name
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return "the time budget is spent"
        return None


@contextlib.contextmanager
def run_lock(folder: Path) -> Iterator[None]:
    """Hold a folder for one process; the lock dies with its process.

    Raises:
        StoppedError: another process holds it; the message names its pid.
    """
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("a+") as handle:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            handle.seek(0)
            raise StoppedError(
                f"{folder}: process {handle.read().strip() or '(unknown)'} is already at work here. "
                "Next: wait for it or stop it; then run again."
            ) from None
        handle.truncate(0)
        handle.write(f"{os.getpid()}\n")
        handle.flush()
        yield
