"""Asking a run to stop, and being asked: signals, time budget, one run a folder."""

import contextlib
import errno
import fcntl
import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import ClassVar, TextIO, TypeVar

from pipeline.errors import BusyError, StoppedError, StorageError
from pipeline.runlog import say

Done = TypeVar("Done")

#: Between two looks at what another process does, s.
POLL_S = 1.0
#: Name of the lock that a job holds in its folder: that of a fold, or of a run where it trains all folds.
JOB = ".job"
#: Signals that ask for a stop; the last three are how batch systems (Slurm, LSF, Grid Engine) tell of a limit to come.
SIGNALS = (signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2, signal.SIGXCPU)
_REFUSED = (errno.EROFS, errno.EACCES, errno.EPERM)
_NO_LOCKS = (errno.ENOSYS, errno.EOPNOTSUPP, errno.ENOLCK)  # of file systems, such as Lustre mounted without flock
_LOCK_TRIES, _LOCK_NAP_S = 25, 0.02  # a look at a lock (`lock_holder`) holds it for microseconds


class StopRequest:
    """A request that a signal or the clock makes and that every loop polls.

    Until somebody polls for the first time - while packages are imported, arrays built, tables hashed - a signal ends
    the work where it is with StoppedError. From then on it lets the step end and the state be saved. A second signal
    acts as if nobody listened. Requests nest: a signal is everybody's who is inside. A hang-up that was ignored when
    the run began (nohup) stays ignored.

    Args:
        time_budget: seconds until the clock asks; None = never.

    >>> with StopRequest(time_budget=3600) as stop:
    ...     assert stop.reason() is None
    """

    _open: ClassVar[list["StopRequest"]] = []  # outermost first; signals are the process's, and so is this list

    def __init__(self, *, time_budget: float | None = None) -> None:
        self._deadline = None if time_budget is None else time.monotonic() + time_budget
        self._received: signal.Signals | None = None
        self._polled = False
        self._before: dict[signal.Signals, object] = {}

    def __enter__(self) -> "StopRequest":
        if threading.current_thread() is threading.main_thread():
            self._received = self._open[-1]._received if self._open else None
            self._open.append(self)
            for number in SIGNALS:
                if number is not signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._on_signal)
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)  # type: ignore[arg-type]
        if self._before:
            self._open.remove(self)

    def _on_signal(self, number: int, frame: FrameType | None) -> None:
        if self._received is signal.SIGXCPU is signal.Signals(number):  # Linux sends it again every second
            return
        if self._received is not None:
            signal.signal(number, signal.SIG_DFL)
            os.kill(os.getpid(), number)
        for request in self._open:
            request._received = signal.Signals(number)
        if not (self._polled or _in_a_door(frame)):
            raise StoppedError(
                f"stopped ({signal.Signals(number).name}); nothing is half-written. Next: the same command again."
            )

    @property
    def signalled(self) -> bool:
        """Whether a signal came; asking this is not polling."""
        return self._received is not None

    def defer(self) -> None:
        """From here on a signal waits until somebody polls."""
        self._polled = True

    def reason(self) -> str | None:
        """Why the run has to stop now, or None."""
        self.defer()
        if self._received is not None:
            return self._received.name
        if self._deadline is not None and time.monotonic() >= self._deadline:
            return "the time budget is spent"
        return None


def _in_a_door(frame: FrameType | None) -> bool:
    """Whether a signal came while torch's modes or these handlers were set, put back or asked.

    An error there leaves them half-changed: gradients stayed off for the rest of the process. Where torch asks a mode
    what an operator does, an error from nowhere can end in its C++, which aborts the process.
    """
    while frame is not None:
        module, name = frame.f_globals.get("__name__", ""), frame.f_code.co_name  # generated code has none
        if name in ("__enter__", "__exit__") and (module == __name__ or module.startswith("torch.")):
            return True
        if name in ("__torch_function__", "__torch_dispatch__"):
            return True
        frame = frame.f_back
    return False


@contextlib.contextmanager
def run_lock(folder: Path, *, name: str = ".lock") -> Iterator[Callable[[], bool]]:
    """Hold a folder for one process; the lock dies with its process.

    Where nothing can be written, on a read-only disk or in another user's folder, there is nothing to hold.

    Args:
        folder: is made if it is not there.
        name: of the lock's file; a folder can have several locks.

    Yields:
        What says whether the folder of that name is still the one that is held, and was not moved, removed or replaced.

    Raises:
        BusyError: another process holds it; the message names its pid.
        StorageError: the file system has no locks.
    """
    while True:
        try:
            opened = _open(folder, name)
        except OSError as err:
            if err.errno not in _REFUSED or not folder.is_dir() or os.access(folder, os.W_OK):
                raise
            yield folder.is_dir
            return
        with opened as handle:
            if not _lock(handle.fileno(), folder):
                raise already_at_work(folder, lock_holder(folder, name=name))
            if not _is_still(handle, folder / name):
                continue
            with contextlib.suppress(OSError):  # a full disk: the lock holds without a number
                handle.truncate(0)
                handle.write(f"{os.getpid()}\n")
                handle.flush()
            yield lambda: _is_still(handle, folder / name) or (folder.is_dir() and not (folder / name).exists())
            return


@contextlib.contextmanager
def alone_in(folder: Path, *, what: str, name: str = ".lock") -> Iterator[bool]:
    """Hold a folder as `run_lock` does, when those that hold it now have let it go.

    Args:
        folder: is made if it is not there.
        what: the others do, for who waits: "writes arrays".
        name: of the lock's file.

    Yields:
        Whether nobody else works in it: False where the disk has no locks.
    """
    waits = False
    while True:
        with contextlib.ExitStack() as stack:
            try:
                stack.enter_context(run_lock(folder, name=name))
            except BusyError:
                if not waits:
                    say(f"{folder}: another process {what}; it is waited for")
                waits = True
                continue
            except StorageError:
                yield False
                return
            yield True
            return


def in_turn(work: Callable[[], Done], *, deadline: float | None, what: str) -> Done:
    """Work that another process may be at: it is waited for then.

    Args:
        work: raises BusyError where one is.
        deadline: on the monotonic clock; None = never.
        what: is waited for, for who waits: "its result is".

    Raises:
        BusyError: the time is up before the other one is done; and what `work` raises.
    """
    waits = False
    while True:
        try:
            return work()
        except BusyError as err:
            if deadline is not None and time.monotonic() >= deadline:
                raise
            if not waits:
                say(f"{err} Here {what} waited for.")
            waits = True
            time.sleep(POLL_S)


def _open(folder: Path, name: str) -> TextIO:
    while True:
        folder.mkdir(parents=True, exist_ok=True)
        with contextlib.suppress(FileNotFoundError):  # a start that was refused removed the folder in between
            return (folder / name).open("a+")


def _is_still(handle: TextIO, path: Path) -> bool:
    """Whether an open file is the one of that name, and not one that was removed before its lock was let go."""
    try:
        return os.path.samestat(os.fstat(handle.fileno()), path.stat())
    except FileNotFoundError:
        return False


def lock_holder(folder: Path, *, name: str = ".lock") -> int | None:
    """Process that holds a folder's lock now; None if nobody does, 0 if it cannot be said who.

    The number in the file is believed of a process that has the file open: one that was killed leaves its number
    behind, and the next holder takes a moment to write its own.
    """
    path = folder / name
    try:
        with path.open() as handle:
            try:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                told = handle.read().strip()
                return int(told) if told.isdigit() and _has_open(int(told), path) else 0
            except OSError as err:
                if err.errno not in _NO_LOCKS:  # where nobody can hold one, nobody does
                    raise
    except (FileNotFoundError, NotADirectoryError):
        pass
    return None


def _has_open(pid: int, path: Path) -> bool:
    """Whether a process has a file open; where the system does not tell (no /proc, another user's), it is believed."""
    if not Path("/proc/self/fd").is_dir():
        return True
    try:
        descriptors = list(Path(f"/proc/{pid}/fd").iterdir())
    except PermissionError:
        return True
    except FileNotFoundError:
        return False
    for descriptor in descriptors:
        with contextlib.suppress(OSError):  # closed meanwhile
            if os.path.samefile(descriptor, path):
                return True
    return False


def already_at_work(folder: Path, pid: int | None) -> BusyError:
    """The refusal of a second process in a folder: of a fold, of a run with all its folds, or of another stage."""
    stops = f"kill {pid}" if pid else "end its process"
    if folder.parent.name == "runs" or lock_holder(folder.parent, name=JOB) is not None:
        stops = "make stop ALL=1"
    elif folder.parent.parent.name == "runs":
        stops = f"make stop FOLD={folder.name.removeprefix('fold')}"
    return BusyError(
        f"{folder}: process {pid or '(unknown)'} is already at work here. Next: wait for it or stop it ({stops}); "
        "then run again."
    )


def _lock(descriptor: int, folder: Path) -> bool:
    for _ in range(_LOCK_TRIES):  # counted, not timed: a busy machine may sleep through any time between two of them
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            time.sleep(_LOCK_NAP_S)
        except OSError as err:
            if err.errno not in _NO_LOCKS:
                raise
            raise StorageError(
                f"{folder}: its file system gives no locks ({err.strerror}), without which two processes could work in "
                "one folder. Next: ARTIFACTS=<folder on another disk>, or have it mounted with flock."
            ) from err
    return False
