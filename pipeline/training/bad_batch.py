"""A batch that training left out, saved with all that its step needs to be run again: ``rna replay``.

bad/0007-step-00000003.pt      the newest ones of a fold; each about as large as the network's weights

The first number counts them: after a rollback a lower step, or the same one, comes again, and clocks jump. The last 32
bytes are the sha256 of all others.
"""

import hashlib
import io
import pickle
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from models.interface import RnaInputs
from pipeline.batch import RnaBatch
from pipeline.errors import DataError
from pipeline.stage import write_bytes

_FORMAT = 1
_KEEP = 4
_NAME = re.compile(r"(\d{4,})-step-(\d{8,})\.pt")
_DIGEST_BYTES = 32


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
        """Write ``<number>-step-<step>.pt`` atomically, then remove all but the newest few."""
        tree = {item.name: getattr(self, item.name) for item in fields(self)}
        tree["batches"] = [(batch.ids, tuple(batch.inputs), *batch[2:]) for batch in self.batches]
        tree["weights"] = {name: tensor.detach().cpu() for name, tensor in self.weights.items()}
        buffer = io.BytesIO()  # on a full disk torch.save hides the system's error
        torch.save({"format": _FORMAT, **tree}, buffer)
        number = next(iter(_numbered(folder)), 0) + 1
        path = folder / f"{number:04d}-step-{self.step:08d}.pt"
        data = buffer.getvalue()
        write_bytes(path, data + hashlib.sha256(data).digest())
        for old in list(_numbered(folder).values())[_KEEP:]:
            old.unlink()
        return path


def find_bad_batches(folder: Path) -> dict[int, Path]:
    """Step -> the last file that was saved of it, the last one first; files of other names are none of ours."""
    found: dict[int, Path] = {}
    for path in _numbered(folder).values():
        found.setdefault(_named(path)[1], path)
    return found


def _numbered(folder: Path) -> dict[int, Path]:
    """Number -> file, the last one first."""
    paths = [path for path in folder.glob("*.pt") if _NAME.fullmatch(path.name) and path.is_file()]
    return dict(sorted(((_named(path)[0], path) for path in paths), reverse=True))


def _named(path: Path) -> tuple[int, int]:
    """Number and step in a file's name."""
    found = _NAME.fullmatch(path.name)
    assert found
    return int(found[1]), int(found[2])


def load_bad_batch(path: Path) -> BadBatch:
    """Read a saved batch; nothing but tensors and plain values is ever loaded.

    Raises:
        DataError: the file is not what training wrote.
    """
    others = ", ".join(str(step) for step, other in find_bad_batches(path.parent).items() if other != path)
    hint = f"make replay STEP=<one of {others}>" if others else "make train saves the next one that it meets"
    try:
        data = path.read_bytes()
    except OSError as err:
        raise DataError(f"{path}: cannot be read: {err.strerror}. Next: check its permissions, or {hint}.") from err
    if hashlib.sha256(data[:-_DIGEST_BYTES]).digest() != data[-_DIGEST_BYTES:]:
        raise DataError(f"{path}: damaged: {len(data):,} bytes without their sha256. Next: {hint}; remove this file.")
    try:
        tree = torch.load(io.BytesIO(data), weights_only=True, map_location="cpu")
        if tree.pop("format") != _FORMAT:
            raise ValueError("another format")
        batches = [RnaBatch(ids, RnaInputs(*inputs), *rest) for ids, inputs, *rest in tree.pop("batches")]
        return BadBatch(batches=batches, **tree)
    except (RuntimeError, pickle.UnpicklingError, ValueError, TypeError, KeyError, AttributeError) as err:
        raise DataError(
            f"{path}: no batch as this version saves it ({type(err).__name__}). Next: {hint}; remove this file."
        ) from err
