"""Time and moments that a test chooses: what it claims must not depend on how fast or how busy a machine is."""

import os
import signal
import sys
import time
from collections.abc import Callable
from types import FrameType, ModuleType
from typing import Any

import pytest

from pipeline.training.loop import Trainer


class Clock:
    """Stands in modules in place of `time`, and stands still until somebody moves it.

    Args:
        patch: puts the modules right again.
        *modules: whose `time` this is from now on.
    """

    sleep = staticmethod(time.sleep)

    def __init__(self, patch: pytest.MonkeyPatch, *modules: ModuleType) -> None:
        self.now = 0.0
        for module in modules:
            patch.setattr(module, "time", self)

    def monotonic(self) -> float:
        """Seconds, as far as they were made to pass."""
        return self.now

    def move_by_steps(self, patch: pytest.MonkeyPatch, seconds: float) -> None:
        """Every step of a training takes so long from now on."""
        step = Trainer._step

        def timed(trainer: Trainer) -> None:
            self.now += seconds
            step(trainer)

        patch.setattr(Trainer, "_step", timed)


def watched(work: Callable[[], Any], *, at: int | None = None) -> int:
    """Places that some work passes at which Python hears signals; at one of them comes a SIGTERM.

    They are where a function is entered, and where one that is written in C is left.
    """
    passed = 0

    def look(_frame: FrameType, event: str, _what: Any) -> None:
        nonlocal passed
        if event in ("call", "c_return"):
            passed += 1
            if passed == at:
                os.kill(os.getpid(), signal.SIGTERM)

    sys.setprofile(look)
    try:
        work()
    finally:
        sys.setprofile(None)
    return passed
