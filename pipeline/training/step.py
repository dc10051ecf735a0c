"""Forward and backward of one batch: the same in training, in the search for a NaN's origin, and in `rna replay`."""

import contextlib
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from models.interface import RnaInputs, RnaModel, RnaOutputs
from pipeline.batch import RnaBatch
from pipeline.training.failures import is_anomaly
from pipeline.training.losses import Loss
from pipeline.training.precision import Precision


class Taken(NamedTuple):
    """One batch, on its way through a step."""

    place: list[int]  # [epoch, batch of the epoch]
    batches: list[RnaBatch]  # micro-batches
    weight: float  # of all of them in the loss
    tokens: int
    passes: int = 0  # that every process has to make, see `forward_backward`

    @property
    def ids(self) -> list[str]:
        """Of its sequences."""
        return [name for batch in self.batches for name in batch.ids]


def forward_backward(
    model: RnaModel,
    loss: Loss,
    batches: Sequence[RnaBatch],
    *,
    weight: float,
    precision: Precision,
    scaler: torch.amp.GradScaler,
    device: torch.device,
    passes: int = 0,
) -> tuple[float, bool]:
    """Gradients of all micro-batches together, from none.

    Args:
        model: the network, on `device`.
        loss: what it is trained with.
        batches: the micro-batches.
        weight: of all of them in the loss.
        precision: of the forward pass.
        scaler: whose scale the gradients carry.
        device: where to compute.
        passes: forward and backward passes that a sharded network needs of every process, some of which may have
            fewer micro-batches: they make up for them with a nucleotide that counts for nothing. Every parameter then
            has a gradient in every pass, and anomaly mode is off, for none may break off alone. 0 = not sharded.

    Returns:
        The loss of the whole batch, and whether the backward pass ran to its end: torch's anomaly mode breaks it off
        at the first NaN, where without it the NaN arrives in the gradients.
    """
    model.zero_grad(set_to_none=True)
    total = torch.zeros((), device=device)
    scaler.scale(total)  # makes the scale: a share without a sequence has nothing else to scale
    intact = True
    with torch.autograd.set_detect_anomaly(False) if passes else contextlib.nullcontext():
        for batch in batches:
            on_device = batch.to(device)
            with precision.autocast(device):
                outputs = model(on_device.inputs)
            part = loss.total(outputs, on_device) / (weight or 1.0)
            total += part.detach()
            if passes or not part.requires_grad:  # structures without a pair to learn from give none
                part = part + _nothing_of(outputs)
            intact = _backward(scaler.scale(part)) and intact
        for _ in range(passes - len(batches)):
            with precision.autocast(device):
                outputs = model(_one_nucleotide(model, device))
            _backward(scaler.scale(_nothing_of(outputs)))
    return float(total), intact


def _backward(part: Tensor) -> bool:
    """Whether it ran to its end."""
    try:
        part.backward()
    except RuntimeError as err:
        if not is_anomaly(err):
            raise
        return False
    return True


def _one_nucleotide(model: RnaModel, device: torch.device) -> RnaInputs:
    tokens_BL = torch.zeros(1, 1, dtype=torch.int64, device=device)
    bpp_BLL = torch.zeros(1, 1, 1, device=device) if model.uses_bpp else None
    features_BLF = torch.zeros(1, 1, model.num_features, device=device)
    return RnaInputs(tokens_BL, torch.ones_like(tokens_BL, dtype=torch.bool), bpp_BLL, features_BLF)


def _nothing_of(outputs: RnaOutputs) -> Tensor:
    """0, with a gradient of 0 for everything that the outputs were made of."""
    return torch.cat([output.flatten()[:0] for output in outputs if output is not None]).sum()
