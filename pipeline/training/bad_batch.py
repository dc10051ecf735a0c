"""A batch that the guard ordered out, saved with all that its step needs to be run again: ``rna replay``.

bad/step-00000003.pt      the newest ones of a fold; each about as large as the network's weights
"""

import io
import os
import pickle
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.interface import RnaInputs
from pipeline.batch import RnaBatch
from pipeline.errors import DataError
from pipeline.stage import fsync

_FORMAT = 1
_KEEP = 4


@dataclass(kw_only=True)
class BadBatch:
    """One step that went wrong."""

    seen: str  # what the guard saw
    step: int
    place: list[int]  # [epoch, batch of the epoch]
    loss: float
    grad_norm: float
    precision: str
    scale: float  # of the loss
    weight: float  # of the batch in the loss
    batches: list[RnaBatch]  # micro-batches, on the CPU
    weights: Mapping[str, Tensor]  # of the network
    weights_step: int  # what they are of: this step, or the last good checkpoint where this step's were lost
    random: dict[str, Tensor]  # before the step
    meta: dict[str, Any] = field(default_factory=dict)  # of the run, as in a checkpoint

    def save(self, folder: Path) -> Path:
        """Write ``step-XXXXXXXX.pt`` atomically, then remove all but the newest few."""
        tree = {item.name: getattr(self, item.name) for item in fields(self)}
        tree["batches"] = [(batch.ids, tuple(batch.inputs), *batch[2:]) for batch in self.batches]
        tree["weights"] = {name: tensor.detach().cpu() for name, tensor in self.weights.items()}
        buffer = io.BytesIO()  # on a full disk torch.save hides the system's error
        torch.save({"format": _FORMAT, **tree}, buffer)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"step-{self.step:08d}.pt"
        part = path.with_name(f".{path.name}.part-{os.getpid()}")
        try:
            part.write_bytes(buffer.getvalue())
            fsync(part)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        for old in list(find_bad_batches(folder).values())[_KEEP:]:
            old.unlink()
        return path


def find_bad_batches(folder: Path) -> dict[int, Path]:
    """Step -> file of every batch that was saved, the last one first: after a rollback that is not the highest step."""
    paths = sorted(folder.glob("step-*.pt"), key=lambda path: path.stat().st_mtime_ns, reverse=True)
    return {int(path.stem.removeprefix("step-")): path for path in paths}


def load_bad_batch(path: Path) -> BadBatch:
    """Read a saved batch; nothing but tensors and plain values is ever loaded.

    Raises:
        DataError: the file is not what was written.
    """
    try:
        tree = torch.load(path, weights_only=True, map_location="cpu")
        if tree.pop("format") != _FORMAT:
            raise ValueError("another format")
        batches = [RnaBatch(ids, RnaInputs(*inputs), *rest) for ids, inputs, *rest in tree.pop("batches")]
        return BadBatch(batches=batches, **tree)
    except (
        OSError,
        RuntimeError,
        EOFError,
        pickle.UnpicklingError,
        ValueError,
        TypeError,
        KeyError,
        AttributeError,
    ) as e:
        raise DataError(f"{path}: cannot be read ({type(e).__name__}); expected a saved batch. Next: --step.") from e
