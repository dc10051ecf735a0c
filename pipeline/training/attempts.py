"""Attempts that die without progress, counted: what a signal ends each time is not begun again for ever.

A process that dies of a fault in a compiled kernel says nothing, and one that lost its device leaves with 75: a loop
around the command would go on until somebody looks. What is killed from outside (SIGKILL, power, a process of several
that was) is warned of and begun again: that the machine is taken away is no fault of the run.
"""

import contextlib
import faulthandler
import json
import os
import shutil
import signal
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pipeline.config import RunConfig
from pipeline.errors import CrashedError, LostDeviceError
from pipeline.runlog import read_dict, read_status, say, warn
from pipeline.stage import versions, write_json
from pipeline.training.checkpoint import CheckpointStore
from pipeline.training.distributed import LostProcessError

FOLDER = "attempts"  #: in a fold's, while an attempt is made or after one that died
MOST = 3  #: attempts that die of themselves without a newer checkpoint between them
_ENVIRONMENT = ("RNA_", "CUDA_", "OMP_")  # beginnings of the variables that may cure it
_FATAL = (signal.SIGSEGV, signal.SIGABRT, signal.SIGBUS, signal.SIGFPE, signal.SIGILL)
_NAMES = {signal.strsignal(number): number.name for number in _FATAL}
_SILENT, _DEVICE, _PROCESS = "SIGKILL or power lost", "a lost device", "a lost process"
_FROM_OUTSIDE = (_SILENT, _PROCESS)


@contextlib.contextmanager
def counted(folder: Path, *, config: RunConfig, processes: int, restart: bool) -> Iterator[None]:
    """One attempt to train and predict a fold, by the process that writes; those before it that died are counted.

    Other settings, packages, processes or variables of the environment begin to count anew, as a newer checkpoint does.

    Args:
        folder: of the fold; the caller holds its lock.
        config: of the run.
        processes: that train together.
        restart: an earlier run is set aside, and its attempts with it.

    Raises:
        CrashedError: `MOST` attempts died of themselves without a newer checkpoint.
    """
    home, setting = folder / FOLDER, _setting(config, processes)
    before = {} if restart else read_dict(home / "count.json")
    is_same = before.get("setting") == setting and before.get("checkpoint") == _newest(folder)
    ends = [*before["ends"], *_unsaid(folder, before)] if is_same else []
    if _is_over(ends):
        raise _crashed(folder, ends)
    if len(ends) >= MOST:
        warn(
            f"{_told(folder, ends)}. Next: see whether memory ran out (dmesg), and lower train.micro_batch; where "
            "machines are taken away, train.save_every."
        )
    here = {"setting": setting, "checkpoint": _newest(folder), "ends": ends}
    _begin(home, here | {"pid": os.getpid()})
    try:
        with traced(folder):
            yield
    except BaseException as err:
        end = _end(folder, err)
        ends += [end] if end else []
        if not ends or _newest(folder) != here["checkpoint"]:
            shutil.rmtree(home, ignore_errors=True)
            raise
        with contextlib.suppress(OSError):
            write_json(home / "count.json", here)
        if _is_over(ends):
            raise _crashed(folder, ends) from err
        raise
    shutil.rmtree(home, ignore_errors=True)


@contextlib.contextmanager
def traced(folder: Path) -> Iterator[None]:
    """Let a signal that ends this process write where it was: Python's stack, in a file of the process's number.

    Where a program around this one has asked for that already (pytest, a notebook), it stays as it is. Where whoever
    started Python has (PYTHONFAULTHANDLER), the stack goes to the file as well, as there is one place for it alone.
    """
    with contextlib.ExitStack() as stack:
        if _is_asked() or not faulthandler.is_enabled():
            with contextlib.suppress(OSError):  # a read-only disk, a full one: nothing is counted there
                (folder / FOLDER).mkdir(parents=True, exist_ok=True)
                handle = stack.enter_context((folder / FOLDER / f"{os.getpid()}.txt").open("w"))
                faulthandler.enable(handle)
                stack.callback(*(faulthandler.enable, 2) if _is_asked() else (faulthandler.disable,))
                if _is_asked():
                    say(f"PYTHONFAULTHANDLER: while this fold trains, the stack is written to {handle.name}")
        yield


def _is_asked() -> bool:
    """Whether Python itself was told to write the stack: -X faulthandler, -X dev or a variable of the environment."""
    return bool("faulthandler" in sys._xoptions or os.environ.get("PYTHONFAULTHANDLER") or sys.flags.dev_mode)


def _setting(config: RunConfig, processes: int) -> dict[str, Any]:
    """What may decide whether it dies, as JSON gives it back."""
    environment = {name: value for name, value in os.environ.items() if name.startswith(_ENVIRONMENT)}
    found = {"config": asdict(config), "processes": processes, "versions": versions(), "environment": environment}
    return json.loads(json.dumps(found, default=str))


def _newest(folder: Path) -> list[int]:
    """Step and epoch of the newest checkpoint; before there is one, of that with which a run begins."""
    meta = CheckpointStore(folder / "checkpoints").newest_meta()
    return [0, 0] if meta is None else [meta["step"], meta["progress"]["epoch"]]


def _begin(home: Path, count: dict[str, Any]) -> None:
    with contextlib.suppress(OSError):
        for path in _traces(home):
            path.unlink()
        write_json(home / "count.json", count)


def _traces(home: Path) -> list[Path]:
    """Of processes that a signal ended."""
    return sorted(path for path in home.glob("*.txt") if path.stat().st_size)


def _unsaid(folder: Path, before: dict[str, Any]) -> list[str]:
    """How the last attempt ended, if it could not say so itself."""
    return [_placed(folder, _signal(folder) or _SILENT, before["pid"])] if "pid" in before else []


def _end(folder: Path, err: BaseException) -> str | None:
    """How this attempt ended, if it died; None where it was asked to stop, or failed with a sentence of its own."""
    kind = _DEVICE if isinstance(err, LostDeviceError) else _PROCESS if isinstance(err, LostProcessError) else None
    kind = _signal(folder) or kind
    return kind and _placed(folder, kind, os.getpid())


def _signal(folder: Path) -> str | None:
    """Name of the signal that ended a process of the last attempt; faulthandler writes what it is called."""
    for path in _traces(folder / FOLDER):
        first = path.read_text(errors="replace").partition("\n")[0].replace("-", " ")
        return next((name for said, name in _NAMES.items() if said and said in first), "a fatal error")
    return None


def _placed(folder: Path, kind: str, pid: int) -> str:
    status = read_status(folder)
    seen = f"after step {status['step']}" if status.get("pid") == pid and "step" in status else "before its first step"
    return f"{kind} {seen}"


def _is_over(ends: Sequence[str]) -> bool:
    return sum(not end.startswith(_FROM_OUTSIDE) for end in ends) >= MOST


def _told(folder: Path, ends: Sequence[str]) -> str:
    told = ", ".join(f"{end} ({count} times)" if count > 1 else end for end, count in Counter(ends).items())
    logs = [*_traces(folder / FOLDER), *filter(Path.is_file, (folder / "run.log", folder.parent / "run.log"))]
    where = f"; see {', '.join(map(str, logs))}" if logs else ""
    return (
        f"{folder}: the last {len(ends)} attempts died with no newer checkpoint than that of step "
        f"{_newest(folder)[0]}: {told}{where}"
    )


def _crashed(folder: Path, ends: Sequence[str]) -> CrashedError:
    device = any(end.startswith(_DEVICE) for end in ends)
    advice = (
        "look for Xid lines in dmesg; CUDA_LAUNCH_BLOCKING=1 names the operation"
        if device
        else "RNA_KERNELS=reference does without compiled kernels"
    )
    return CrashedError(
        f"{_told(folder, ends)}. Next: {advice}; with other settings or packages, or without the folder "
        f"{folder / FOLDER}, it is tried again."
    )
