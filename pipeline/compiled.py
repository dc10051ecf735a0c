"""numba's compiler, with threads of its own.

Left to itself numba shares OpenMP with torch and sets the number of torch's threads, and with it the last digits of
every sum; its work queue leaves torch alone.

numba takes compiled code from its cache as long as the function's own file is the same, also when a function of another
file that it calls has changed. So the cache lies in a folder named after the contents of all files that compile.
Where there is no place for it, or what it holds is damaged, functions are compiled anew.
"""

import contextlib
import hashlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numba
from numba import prange
from numba.core import event

from pipeline.runlog import say

numba.config.THREADING_LAYER = "workqueue"  # type: ignore[attr-defined]


def cache_folder(home: Path) -> Path:
    """Folder of compiled code that fits the present sources of the packages in `home`."""
    digest = hashlib.sha256()
    for path in sorted(
        each for package in ("folds", "pipeline", "submissions") for each in (home / package).rglob("*.py")
    ):
        text = path.read_bytes()
        if path.name == "compiled.py" or b"from pipeline.compiled import" in text:
            digest.update(text)
    return home / "pipeline" / "__pycache__" / f"numba-{digest.hexdigest()[:16]}"


def njit(**options: Any) -> Callable[[Callable[..., Any]], Any]:
    """`numba.njit` with a cache that may be missing, damaged, or on a full disk."""

    def compiled(function: Callable[..., Any]) -> Any:
        try:
            made = numba.njit(**options)(function)
        except RuntimeError:  # package and home take no file
            return numba.njit(**{**options, "cache": False})(function)
        if hasattr(made, "_cache"):  # not the plain function, as NUMBA_DISABLE_JIT=1 has it
            made._cache._guard_against_spurious_io_errors = lambda: _forgiving(made._cache)
        return made

    return compiled


class _Patience(event.Listener):
    """Says once in a process that it compiles, when that has taken `AFTER` seconds: nothing else is seen meanwhile."""

    AFTER = 3.0

    def __init__(self) -> None:
        self.starts: list[float] = []  # of the functions that wait for what they call
        self.said = False

    def on_start(self, event: Any) -> None:
        self.starts.append(time.monotonic())

    def on_end(self, event: Any) -> None:
        seconds = time.monotonic() - self.starts[0]
        self.starts.pop()
        if seconds > self.AFTER and not self.said:
            self.said = True
            say("compiling for this machine, once: up to a minute")


event.register("numba:compile", _Patience())


@contextlib.contextmanager
def _forgiving(cache: Any) -> Iterator[None]:
    """What fails here was not in the cache, or is not saved: numba's own guard, which is for Windows alone."""
    try:
        yield
    except Exception:  # what a power cut left of a pickle may raise anything
        with contextlib.suppress(OSError):
            cache.flush()


if not numba.config.CACHE_DIR and os.access(Path(__file__).parent, os.W_OK):  # type: ignore[attr-defined]
    numba.config.CACHE_DIR = str(cache_folder(Path(__file__).parents[1]))  # type: ignore[attr-defined]


@njit(cache=True)
def copy(source: Any, target: Any) -> None:
    """Write all of `source`, [L], to the first places of `target`.

    ``target[: len(source)] = source`` takes numba seconds to compile, again in whatever calls it: it brings all that
    words a message for lengths that differ.
    """
    for place in range(len(source)):
        target[place] = source[place]


__all__ = ["copy", "njit", "prange"]
