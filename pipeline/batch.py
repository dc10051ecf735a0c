"""A padded batch as the network takes it.

Letters: B batch, L padded length (nt), C target or class, K base pairs of a batch.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from models.interface import RnaInputs
from pipeline.dataset import ExampleSet, RnaExample
from pipeline.packing import Packed, read_packed


class RnaBatch(NamedTuple):
    """A padded batch: what the network takes, and what its output is compared with.

    Base-pair probabilities stay sparse until `to` brings the batch to its device: the dense matrices of 256 sequences
    of 177 nt are 32 MB, some forty times the rest of the batch.
    """

    ids: tuple[str, ...]
    inputs: RnaInputs
    target_BLC: Tensor | None = None  # float32, NaN = not measured or padded
    weight_BC: Tensor | None = None  # float32 >= 0, NaN = no such profile
    pairs_3K: Tensor | None = None  # int32: position in the batch, i, j, each pair once; until `to` made bpp_BLL of it
    p_K: Tensor | None = None  # float32
    label_BC: Tensor | None = None  # bool, or float32 or float64, see `RnaExample`

    def to(self, device: torch.device) -> "RnaBatch":
        """The same batch on a device, its pairs as matrices there; from pinned memory without waiting."""

        if device.type == "cpu" and self.pairs_3K is None:
            return self

        def move(tensor: Tensor | None) -> Tensor | None:
            if tensor is None or device.type == "cpu":
                return tensor
            return tensor.pin_memory().to(device, non_blocking=True)

        inputs = RnaInputs(*(move(tensor) for tensor in self.inputs))  # type: ignore[arg-type]
        target_BLC, weight_BC, pairs_3K, p_K, label_BC = (move(tensor) for tensor in self[2:])
        if pairs_3K is not None and p_K is not None:
            inputs = inputs._replace(bpp_BLL=_dense(pairs_3K, p_K, inputs.tokens_BL.shape))
        return RnaBatch(self.ids, inputs, target_BLC, weight_BC, label_BC=label_BC)


def make_batch(
    examples: ExampleSet, indices: np.ndarray, *, change: Callable[[RnaExample, int], RnaExample] | None = None
) -> RnaBatch:
    """Read examples, change them (`pipeline.augment`), and pad them into one batch."""
    return unpack(read_packed(examples, indices, change=change))


def unpack(packed: Packed) -> RnaBatch:
    """The tensors of a packed batch."""
    mask_BL = np.arange(packed.tokens_BL.shape[1]) < packed.lengths_B[:, None]
    inputs = RnaInputs(torch.from_numpy(packed.tokens_BL).long(), torch.from_numpy(mask_BL))
    if packed.features_BLF is not None:
        inputs = inputs._replace(features_BLF=torch.from_numpy(packed.features_BLF))
    arrays = (packed.target_BLC, packed.weight_BC, packed.pairs_3K, packed.p_K, packed.label_BC)
    return RnaBatch(packed.ids, inputs, *(None if array is None else torch.from_numpy(array) for array in arrays))


def _dense(pairs_3K: Tensor, p_K: Tensor, shape: torch.Size) -> Tensor:
    """One scatter for the whole batch: [B, L, L] float32, symmetric."""
    b_K, i_K, j_K = pairs_3K.long()
    bpp_BLL = p_K.new_zeros((*shape, shape[1]))
    bpp_BLL[b_K, i_K, j_K] = p_K
    bpp_BLL[b_K, j_K, i_K] = p_K
    return bpp_BLL
