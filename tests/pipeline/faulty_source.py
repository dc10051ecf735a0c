"""Batches with a fault; a module of its own, because workers import it and torch takes seconds."""

import os
import signal
import time
from pathlib import Path

from pipeline.packing import Packed
from pipeline.training.loader import BatchSource, Place


class Faulty(BatchSource):
    """Goes wrong at one batch, once or always."""

    how = ""
    once: Path | None = None
    hung: Path | None = None  #: who hangs writes his number here before

    def __call__(self, place: Place) -> list[Packed]:
        if self.how and place[:2] == (0, 3) and not (self.once and self.once.exists()):
            if self.once:
                self.once.touch()
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            elif self.how == "exit":
                os._exit(3)
            elif self.how == "hang":
                if self.hung:
                    self.hung.write_text(str(os.getpid()))
                time.sleep(24 * 3600)
            else:
                raise OSError("the file is gone")
        return super().__call__(place)
