"""Faults that happen once: each is put in, the run started again, and its end compared with that of one left alone."""

import contextlib
import errno
import itertools
import os
import pickle
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from pipeline.errors import PipelineError, StoppedError
from pipeline.paths import Paths
from pipeline.training.checkpoint import CheckpointStore
from pipeline.training.stop import run_lock
from tests.faults.kills import fit
from tests.pipeline import tiny

WHOLE, RUN = f"whole.{tiny.SPLIT}", f"faulty.{tiny.SPLIT}"
_AT = 6  # forward pass of twelve steps in which it happens


@contextlib.contextmanager
def in_forward(act: Callable[[], Any], *, at: int = _AT) -> Iterator[None]:
    """Call a function in one forward pass of training."""
    count = itertools.count(1)

    def inject(x_BLD: Tensor) -> Tensor:
        if next(count) == at:
            act()
        return x_BLD

    with mock.patch.object(tiny.Fault, "inject", staticmethod(inject)):
        yield


def raising(error: BaseException) -> Callable[[], Any]:
    def act() -> None:
        raise error

    return act


def sends(number: int) -> Callable[[], Any]:
    return lambda: os.kill(os.getpid(), number)


def ends_with(paths: Paths, **options: Any) -> str:
    """How a run ended: its error's exit code and sentence."""
    try:
        fit(paths, RUN, options.pop("config", tiny.config()), **options)
    except PipelineError as err:
        said = str(err).removeprefix(f"{paths.fold_dir(RUN, 0)}").removeprefix("/checkpoints").removeprefix(": ")
        return f"exit code {err.exit_code}: {said.split(' Next: ')[0]}"
    return "went on"


def signal_in_step(number: signal.Signals) -> Callable[[Paths], str]:
    def fault(paths: Paths) -> str:
        with in_forward(sends(number)):
            return ends_with(paths)

    return fault


def full_disk(paths: Paths) -> str:
    count, write = itertools.count(1), Path.write_bytes

    def full(path: Path, data: bytes) -> int:
        if next(count) >= 8:
            raise OSError(errno.ENOSPC, "No space left on device", str(path))
        return write(path, data)

    with mock.patch.object(Path, "write_bytes", full):
        return ends_with(paths)


def out_of_memory(paths: Paths) -> str:
    with in_forward(raising(torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB"))):
        return ends_with(paths)


def device_lost(paths: Paths) -> str:
    with in_forward(raising(torch.AcceleratorError("CUDA error: an illegal memory access was encountered"))):
        return ends_with(paths)


def clock_set_back(paths: Paths) -> str:
    with contextlib.suppress(StoppedError):
        fit(paths, RUN, tiny.config(), max_steps=8)
    for age, path in enumerate(CheckpointStore(paths.fold_dir(RUN, 0) / "checkpoints").steps().values()):
        os.utime(path, (1e9 + age, 1e9 + age))  # the newest step looks oldest
    with mock.patch("time.time", side_effect=itertools.count(1.7e9, -3600).__next__):  # an hour back at every look
        return ends_with(paths)


def torn_metrics(paths: Paths) -> str:
    with contextlib.suppress(StoppedError):
        fit(paths, RUN, tiny.config(), max_steps=5)
    with (paths.fold_dir(RUN, 0) / "metrics.jsonl").open("a") as handle:
        handle.write('{"event": "step", "step": 6, "epoch": 1}\n{"event": "st')
    return ends_with(paths)


def second_run(paths: Paths) -> str:
    with run_lock(paths.fold_dir(RUN, 0)):
        return ends_with(paths).replace(str(os.getpid()), "<pid>")


def other_settings(paths: Paths) -> str:
    with contextlib.suppress(StoppedError):
        fit(paths, RUN, tiny.config(), max_steps=5)
    return ends_with(paths, config=tiny.config(lr=0.5))


class Malicious:
    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple:
        return (os.system, (f"touch {self.marker}",))


def malicious_checkpoint(paths: Paths) -> str:
    """A pickle that runs a program, with every digest right."""
    with contextlib.suppress(StoppedError):
        fit(paths, RUN, tiny.config(), max_steps=8)
    store, marker = CheckpointStore(paths.fold_dir(RUN, 0) / "checkpoints"), paths.root / "marker"
    step, newest = next(iter(store.steps().items()))
    whole = store.load_newest()
    assert whole is not None
    evil = pickle.dumps(Malicious(marker), protocol=2)
    with mock.patch("pipeline.training.checkpoint._state_bytes", return_value=evil):
        kept = {key: value for key, value in whole.meta.items() if key not in ("files", "format", "step")}
        store.save(step, weights=whole.weights, training=whole.training, state={}, meta=kept)
    said = ends_with(paths)
    assert not marker.exists()
    assert (store.folder / "bad" / newest.name / "reason.txt").is_file()
    return f"refused and set aside, {said}"


#: fault -> how it is put in, the function that does it, what its answer has to begin with
FAULTS: dict[str, tuple[str, Callable[[Paths], str], str]] = {
    "SIGTERM": ("in a step", signal_in_step(signal.SIGTERM), "exit code 75"),
    "SIGINT": ("in a step", signal_in_step(signal.SIGINT), "exit code 75"),
    "SIGHUP": ("in a step", signal_in_step(signal.SIGHUP), "exit code 75"),
    "disk full": ("ENOSPC from the third save on", full_disk, "exit code 5"),
    "out of memory": ("raised in a forward pass", out_of_memory, "exit code 5"),
    "GPU lost": ("CUDA error raised in a forward pass", device_lost, "exit code 75"),
    "clock set back": ("time stamps of checkpoints reversed; an hour at every look", clock_set_back, "went on"),
    "torn metrics.jsonl": ("half a line at its end", torn_metrics, "went on"),
    "second run in the folder": ("its lock held", second_run, "exit code 75"),
    "other settings": ("learning rate changed between two starts", other_settings, "exit code 2"),
    "malicious checkpoint": ("a pickle that runs a program", malicious_checkpoint, "refused"),
}


def check(name: str, paths: Paths) -> dict[str, Any]:
    """Put one fault in, start again, compare; the whole run must be there as `WHOLE`."""
    how, fault, expected = FAULTS[name]
    said = fault(paths)
    assert said.startswith(expected), f"{name}: {said}; expected {expected}"
    fit(paths, RUN, tiny.config())
    same = tiny.final_bytes(paths, RUN) == tiny.final_bytes(paths, WHOLE)
    return {"fault": name, "how": how, "happened": said, "equal": same}
