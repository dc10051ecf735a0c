"""Forward and backward of one batch: the same in training, in the search for a NaN's origin, and in `rna replay`."""

from collections.abc import Sequence
from typing import NamedTuple

import torch

from models.interface import RnaModel
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

    Returns:
        The loss of the whole batch, and whether the backward pass ran to its end: torch's anomaly mode breaks it off
        at the first NaN, where without it the NaN arrives in the gradients.
    """
    model.zero_grad(set_to_none=True)
    total = torch.zeros((), device=device)
    scaler.scale(total)  # makes the scale: a share without a sequence has nothing else to scale
    intact = True
    for batch in batches:
        on_device = batch.to(device)
        with precision.autocast(device):
            outputs = model(on_device.inputs)
        part = loss.total(outputs, on_device) / (weight or 1.0)
        total += part.detach()
        try:
            scaler.scale(part).backward()
        except RuntimeError as err:
            if not is_anomaly(err):
                raise
            intact = False
    return float(total), intact
