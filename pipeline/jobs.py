"""Training as a job: started in the background, looked at, followed and stopped.

A job is one `rna train`: its folder is the fold's, or the run's where it trains all folds. While it works it holds
``.job`` there, a lock that dies with its process, and training holds ``.lock`` in the fold's folder. Nothing else
says that a process is alive: a number in a file may be another program's by now.
"""

import contextlib
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from glob import glob
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from rich.text import Text

from pipeline.errors import BusyError, ConfigError, DataError, PipelineError, StoppedError
from pipeline.paths import Paths
from pipeline.runlog import duration, read_status, say, score_text
from pipeline.training.stop import JOB, already_at_work, lock_holder, run_lock

_START = ".start"  # held by who starts a job in the background, until that trains
_LOG = "run.log"
_TRACES = (JOB, ".lock", _START, _LOG, "status.json")  # what a start leaves that ends before anything is begun
_POLL_S = 0.1
_BEGIN_S = 20.0  # after it took the lock, a job that still reads its tables is left to itself
_STOP_S = 40.0
_DISPENSABLE = ("loss", "memory", "%", "nt/s", "last sign", "metric", "pid")  # in a narrow terminal, in this order
_TAIL_BYTES = 65_536  # of a log, in which its last lines are looked for
_COLORS = {"running": "green", "done": "green", "stopped": "yellow", "lost": "red", "failed": "red", "diverged": "red"}


def job_folder(paths: Paths, run: str, fold: int | None) -> Path:
    """Where the job of a fold (None = of all folds in turn) keeps its lock and its log."""
    return paths.run_dir(run) if fold is None else paths.fold_dir(run, fold)


@contextlib.contextmanager
def at_work(folder: Path) -> Iterator[None]:
    """Hold a job's folder, from before its first file is read until its last one is written.

    A start that is refused leaves nothing behind where nothing was begun before; of one in the background, whose
    sentence nobody may have seen, log and status stay until `start` has shown them.

    Raises:
        StoppedError: another process holds it.
    """
    with run_lock(folder, name=JOB):
        try:
            yield
        except (PipelineError, OSError):
            if not ((folder / _LOG).exists() or (folder.parent / _LOG).exists()):
                _forget(folder)
            raise


def _forget(folder: Path) -> None:
    """Remove the traces of starts that were refused, and the folders that are empty then; for who holds the lock."""
    for fold in folder.glob("fold*"):
        with contextlib.suppress(BusyError), run_lock(fold, name=JOB):
            _forget(fold)
    if not folder.is_dir() or any(path.name not in _TRACES for path in folder.iterdir()):  # it may have been moved
        return
    if lock_holder(folder) is not None:  # of one that began it without the job's lock
        return
    with contextlib.suppress(OSError):  # the first folder that is not empty stays, and all above it
        for name in _TRACES:
            (folder / name).unlink(missing_ok=True)
        for each in (folder, *folder.parents):
            each.rmdir()
            if each.name == "runs":
                return


def worker(folder: Path) -> int | None:
    """Process at work in a job's folder, or starting one there; None if there is none, 0 if it cannot be said which."""
    pid = _at_work(folder)
    return lock_holder(folder, name=_START) if pid is None else pid


def require_idle(folder: Path) -> None:
    """Refuse a job before its processes start: each of them would take seconds, and say something else in the end.

    Raises:
        BusyError: a process is at work in the folder.
    """
    pid = _at_work(folder)
    if pid is not None:
        raise already_at_work(folder, pid)


def _at_work(folder: Path) -> int | None:
    holders = (lock_holder(folder, name=JOB), lock_holder(folder))
    return next((pid for pid in holders if pid is not None), None)


# --- start ---


def start(arguments: Sequence[str], *, folder: Path) -> int:
    """Start `rna` in a session of its own, and wait until it trains or has failed.

    It outlives the terminal: it ignores hang-ups, reads nothing and writes to ``run.log`` in its folder.

    Args:
        arguments: of the program: verb and options.
        folder: of the job.

    Returns:
        0 if it is at work or was finished before, else its exit code, after its own last words.

    Raises:
        StoppedError: a process is at work in the folder already; or this one was asked to stop before its job trained,
            which is stopped then.
    """
    pid = worker(folder)
    if pid is not None:
        raise already_at_work(folder, pid)
    with run_lock(folder, name=_START):
        process, begin = _start(arguments, folder)
        try:
            with _signal_set(signal.SIGTERM, signal.default_int_handler):  # make stop asks like Ctrl-C does
                code = _wait_for_begin(process, folder)
        except KeyboardInterrupt:
            process.terminate()
            process.wait()
            with run_lock(folder, name=JOB):
                _forget(folder)
            raise StoppedError(
                f"{folder}: stopped while it was started in the background. Next: the same command again."
            ) from None
        if code is not None:
            with (folder / _LOG).open() as handle:
                handle.seek(begin)
                say(handle.read().rstrip())
            with run_lock(folder, name=JOB):
                _forget(folder)
            return code
    process.returncode = 0  # it lives on: not to be warned of when this object goes
    say(f"training in the background as process {process.pid}; it goes on when this terminal closes")
    say(f"  its log   {folder / _LOG}")
    for what, how in (("follow", "make logs FOLLOW=1"), ("all runs", "make status"), ("stop", "make stop")):
        say(f"  {what:<9} {how}")
    return 0


def _start(arguments: Sequence[str], folder: Path) -> tuple[subprocess.Popen, int]:
    """The process, and where in the log its words begin."""
    with (folder / _LOG).open("a") as handle:
        handle.write(f"=== {time.strftime('%Y-%m-%d %H:%M:%S')} rna {shlex.join(arguments)}\n")
        handle.flush()
        begin = handle.tell()
        with _signal_set(signal.SIGHUP, signal.SIG_IGN):  # the process ignores it for its whole life, as under nohup
            process = subprocess.Popen(
                [sys.executable, "-m", "pipeline", *arguments],
                stdin=subprocess.DEVNULL,
                stdout=handle,
                stderr=subprocess.STDOUT,
                start_new_session=True,
                env={**os.environ, "PYTHONUNBUFFERED": "1"},
            )
    return process, begin


def _wait_for_begin(process: subprocess.Popen, folder: Path) -> int | None:
    """Exit code of a job that ended, or None once it trains or has been at it for a while."""
    give_up = float("inf")
    while (code := process.poll()) is None:
        if time.monotonic() >= give_up or _trains(folder):
            return None
        if give_up == float("inf") and _at_work(folder) is not None:
            give_up = time.monotonic() + _BEGIN_S
        time.sleep(_POLL_S)
    return code


def _trains(folder: Path) -> bool:
    """Whether the process at work has said of a fold that it is running; of several that is the first of them."""
    pid = _at_work(folder)
    found = (read_status(each) for each in (folder, *folder.glob("fold*")))
    return any(pid is not None and status.get("pid") == pid and status.get("state") == "running" for status in found)


@contextlib.contextmanager
def _signal_set(number: signal.Signals, handler: Any) -> Iterator[None]:
    before = signal.signal(number, handler)
    try:
        yield
    finally:
        signal.signal(number, before)


# --- stop ---


def stop(folder: Path, *, patience: float = _STOP_S) -> str:
    """Ask a job to stop, and wait until it has let go of its folder.

    Args:
        folder: of the job.
        patience: seconds.

    Returns:
        What became of it, a sentence.

    Raises:
        ConfigError: the process at work trains this fold and others; nothing is stopped.
        StoppedError: it is still at work after that time.
    """
    pid, above = worker(folder), lock_holder(folder.parent, name=JOB)
    if pid is None:
        return _nothing_to_stop(folder, above)
    if above is not None:
        raise ConfigError(
            f"{folder}: process {above or '(unknown)'} trains all folds of this run in turn, this one now; nothing was "
            "stopped. Next: make stop ALL=1 ends it; the same make train-all or train-bg goes on from there."
        )
    asked, give_up = 0, time.monotonic() + patience
    while pid is not None:
        if pid and not asked:  # who has just begun tells its number a moment later
            asked = pid
            _terminate(pid, folder)
        if time.monotonic() >= give_up:
            raise _still_at_work(folder, asked, patience)
        time.sleep(_POLL_S)
        pid = worker(folder)
    return _last_words(folder, asked)


def _still_at_work(folder: Path, asked: int, patience: float) -> StoppedError:
    if not asked:
        return StoppedError(
            f"{folder}: at work, but which process cannot be said here (another machine or container?); nobody was "
            "asked. Next: stop it where it was started."
        )
    return StoppedError(
        f"{folder}: process {asked} was asked to stop and is still at work after {patience:.0f} s. Next: wait for its "
        f"step to end; kill -9 {asked} loses what came after the last checkpoint."
    )


def _nothing_to_stop(folder: Path, above: int | None) -> str:
    status, folds = read_status(folder), [fold for fold in sorted(folder.glob("fold*")) if worker(fold) is not None]
    hint = ""
    if above is not None:
        hint = f" Next: make stop ALL=1 stops process {above or '(unknown)'}, which trains all folds in turn."
    elif folds:
        numbers = ", ".join(fold.name.removeprefix("fold") for fold in folds)
        hint = f" Next: make stop FOLD=<one of {numbers}>, which are jobs of their own."
    elif not status:
        hint = " Next: make status shows all runs; MODEL, SPLIT, FOLD and TAG say which one is meant."
    state = _state(folder, status)[0] if status else "never begun"
    is_told = status or not any(map(_is_fold, folder.glob("fold*")))  # else each fold has a state of its own
    return f"{folder}: nothing is running here{f' ({state})' if is_told and not folds else ''}.{hint}"


def _last_words(folder: Path, pid: int) -> str:
    """What a job that ended left behind."""
    statuses = [read_status(each) for each in (folder, *sorted(folder.glob("fold*")))]
    ours = max((one for one in statuses if one.get("pid") == pid), key=lambda one: one["updated"], default={})
    told = f"step {ours['step']} of {ours['steps']}" if "steps" in ours else "before its first step"
    if "exit_code" in ours:
        told = f"exit code {ours['exit_code']}, {told}"
    return (
        f"{folder}: process {pid or '(unknown)'} has stopped ({told}). Next: the same make train or train-bg, SET and "
        "all, goes on."
    )


def _terminate(pid: int, folder: Path) -> None:
    """Send SIGTERM to the process that holds a folder; a halted one (Ctrl-Z) would not see it before it is continued.

    So are those that train together with it: each has a session of its own, and all wait for every one of them.
    """
    meeting = _meeting(pid)
    sent = _send(pid, signal.SIGTERM, signal.SIGCONT, provided=lambda _: worker(folder) == pid)
    for path in Path("/proc").glob("[0-9]*") if sent and meeting else ():
        _send(int(path.name), signal.SIGCONT, provided=lambda other: _meeting(other) == meeting)


def _send(pid: int, *numbers: signal.Signals, provided: Callable[[int], bool]) -> bool:
    """Send signals to a process, never to a later one of the same number.

    Args:
        pid: its number.
        numbers: of the signals.
        provided: whether the process that has the number now is the one that is meant.

    Returns:
        Whether they were sent.
    """
    with contextlib.suppress(ProcessLookupError), contextlib.ExitStack() as stack:
        send: Callable[[int], None] = partial(os.kill, pid)
        try:
            descriptor = os.pidfd_open(pid)
        except ProcessLookupError:
            return False
        except (AttributeError, OSError):  # not Linux, or one before 5.3, or a container that forbids it
            pass
        else:
            stack.callback(os.close, descriptor)
            send = partial(signal.pidfd_send_signal, descriptor)
        if provided(pid):  # so the descriptor is that process's
            for number in numbers:
                send(number)
            return True
    return False


def _meeting(pid: int) -> set[bytes]:
    """Where a process meets those that train together with it, as its environment tells; empty for one alone."""
    with contextlib.suppress(OSError):  # it has ended, is another user's, or there is no /proc
        words = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
        if any(word.startswith(b"RANK=") for word in words):
            return {word for word in words if word.startswith((b"MASTER_ADDR=", b"MASTER_PORT="))}
    return set()


# --- logs ---


def find_log(paths: Paths, run: str, fold: int | None) -> Path:
    """The log that was begun last of those that tell of a fold: its own, or that of all folds in turn.

    Raises:
        DataError: there is none.
    """
    folders = {job_folder(paths, run, fold), job_folder(paths, run, None)}
    logs = [folder / _LOG for folder in folders if (folder / _LOG).is_file()]
    if not logs:
        raise DataError(
            f"{job_folder(paths, run, fold)}: no {_LOG}: nothing was started here in the background. "
            "Next: make train-bg, or make status for all runs."
        )
    return max(logs, key=lambda path: path.stat().st_mtime)


def last_lines(log: Path, *, count: int) -> str:
    """The end of a log, at most so many lines."""
    with log.open("rb") as handle:
        size = handle.seek(0, os.SEEK_END)
        handle.seek(max(0, size - _TAIL_BYTES))
        return "\n".join(handle.read().decode(errors="replace").splitlines()[-count:])


def follow(log: Path) -> Iterator[str]:
    """What is written to a log from now on, until its job has ended."""
    with log.open(errors="replace") as handle:
        handle.seek(0, os.SEEK_END)
        while True:
            ended = worker(log.parent) is None  # asked before the last read, so that no last word is lost
            text = handle.read()
            if text:
                yield text
            if ended:
                return
            time.sleep(_POLL_S)


# --- status ---


def survey(artifacts: Path) -> list[dict[str, Any]]:
    """One row for every fold of every run of every competition below a folder, sorted by where it is.

    Those of rehearsals (`make kernel-check`) are left out.

    Returns:
        Rows with competition, run, fold, state, steps, percent, metric, best_metric, loss, tokens_per_s, eta_s,
        memory_mib, pid (of a living process, else null) and age_s (since it last gave a sign of life).
    """
    rehearsed = artifacts / "kernel-check"
    folders = sorted(each for each in _folds(artifacts) if rehearsed not in each.parents and _is_fold(each))
    return [_row(each, artifacts) for each in folders]


def _folds(artifacts: Path) -> Iterator[Path]:
    """What may be one, below a folder and the links in it; what a run at work removes meanwhile is passed over."""
    for top in (artifacts, *filter(Path.is_symlink, artifacts.glob("*"))):
        for home, names, _ in os.walk(top):
            if "runs" in names:
                names.remove("runs")
                yield from (Path(home, "runs", fold) for fold in glob("*/fold*", root_dir=Path(home, "runs")))


def _is_fold(folder: Path) -> bool:
    is_named = folder.name.removeprefix("fold").isdecimal()  # a copy that somebody made is none
    return is_named and folder.is_dir() and (bool(read_status(folder)) or worker(folder) is not None)


def _row(folder: Path, artifacts: Path) -> dict[str, Any]:
    status = read_status(folder)
    state, pid = _state(folder, status)
    step, steps = status.get("step", 0), status.get("steps")
    is_own = "updated" in status and (not pid or pid == status.get("pid"))  # not what an earlier process left
    copied = ("metric", "best_metric", "loss", "tokens_per_s", "exit_code", "message")
    return {
        "competition": str(folder.parents[2].relative_to(artifacts)),
        "run": folder.parent.name,
        "fold": int(folder.name.removeprefix("fold")),
        "state": state,
        "phase": _phase(status, pid) if state == "running" else None,
        "step": step,
        "steps": steps,
        "percent": round(100 * step / steps, 1) if steps else None,
        **{key: status.get(key) for key in copied},
        "eta_s": status.get("eta_s") if state == "running" else None,
        "memory_mib": status.get("gpu_memory_mib", status.get("memory_mib")),
        "pid": pid,
        "age_s": round(max(0.0, time.time() - status["updated"])) if is_own else None,  # clocks jump
    }


def _state(folder: Path, status: dict[str, Any]) -> tuple[str, int | None]:
    """What a fold's job is doing, and its process if it lives: the lock is believed, not the file."""
    pid = worker(folder)
    if pid is not None:
        return "running", pid
    state = str(status.get("state", "lost"))
    return ("lost" if state == "running" else state), None


def _phase(status: dict[str, Any], pid: int | None) -> str:
    return str(status.get("phase", "training")) if status.get("pid") == pid else "preparing"


def status_table(rows: Sequence[dict[str, Any]], *, width: int) -> Table:
    """The survey for people; where a terminal has no room for all columns, the least telling ones are left out."""
    for count in range(len(_DISPENSABLE) + 1):
        table = _table(rows, without=_DISPENSABLE[:count])
        if Console(width=10_000).measure(table).maximum <= width:
            break
    return table


def _table(rows: Sequence[dict[str, Any]], *, without: Sequence[str]) -> Table:
    table = Table(box=None, pad_edge=False, padding=(0, 1), header_style="bold")
    for name in ("competition", "run", "fold", "state"):
        table.add_column(name, overflow="fold")
    for name in _numbers(rows[0]):
        if name not in without:
            table.add_column(name, justify="right")
    for row in rows:
        phase = "" if row["phase"] in (None, "training") else f": {row['phase']}"
        state = Text(row["state"] + phase, style=_COLORS.get(row["state"], ""))
        numbers = [text for name, text in _numbers(row).items() if name not in without]
        table.add_row(row["competition"], row["run"], str(row["fold"]), state, *numbers)
    return table


def _numbers(row: dict[str, Any]) -> dict[str, str]:
    """Column -> text; empty where the run says nothing of it."""

    def shown(key: str, show: Callable[[Any], str]) -> str:
        return "" if row[key] is None else show(row[key])

    return {
        "step": shown("steps", lambda steps: f"{row['step']}/{steps}"),
        "%": shown("percent", "{:.0f}".format),
        "metric": shown("metric", score_text),
        "best": shown("best_metric", score_text),
        "loss": shown("loss", "{:.4f}".format),
        "nt/s": shown("tokens_per_s", "{:,.0f}".format),
        "left": shown("eta_s", duration),
        "memory": shown("memory_mib", lambda mib: f"{mib / 1024:.1f} GiB"),
        "pid": shown("pid", str),
        "last sign": shown("age_s", duration),
    }
