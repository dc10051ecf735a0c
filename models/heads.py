"""From hidden layers to what a competition asks for.

Letters: B batch, L length, D width, C channel or class, K bin, P pair.
"""

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import PackedSequence, pack_padded_sequence, pad_packed_sequence

from models.interface import RnaInputs, RnaOutputs
from models.layers.coordinates import CoordinateHead
from models.layers.distogram import DistanceHead
from models.layers.masked import masked_mean, zero_pads
from models.layers.precision import at_least_float32

Pool = Literal["mean", "max", "attention", "gru"]

DISTANCE_RANGE = (4.0, 60.0)  # Å; C1'–C1' is 5.4 between neighbours and 10.4 in a Watson–Crick pair
NUM_LDDT_BINS = 20  # of the lDDT that a network expects of its coordinates, from 0 to 1
HEADS = "heads."  # how the names of the parameters begin that belong to a task; all else is the network's backbone


def is_head(name: str) -> bool:
    """Whether a parameter of a network belongs to its task, by name."""
    return name.startswith(HEADS)


class DistanceBins(NamedTuple):
    """Where distance bins end and what each stands for, in Å."""

    edges: list[float]  # K - 1; bin k holds edges[k-1] <= distance < edges[k], the first and last are open
    centres: list[float]  # K; half a bin beyond the edge for the two open bins


def distance_bins(num_bins: int) -> DistanceBins:
    """Equal bins over `DISTANCE_RANGE`, with an open one at each end.

    Raises:
        ValueError: fewer than three bins.

    >>> distance_bins(4)
    DistanceBins(edges=[4.0, 32.0, 60.0], centres=[-10.0, 18.0, 46.0, 74.0])
    """
    if num_bins < 3:
        raise ValueError(f"distance_bins: got {num_bins}; expected at least 3.")
    low, high = DISTANCE_RANGE
    step = (high - low) / (num_bins - 2)
    edges = [low + step * k for k in range(num_bins - 1)]
    return DistanceBins(edges, [edges[0] - step / 2, *(edge + step / 2 for edge in edges)])


def expected_lddt(logits_BLK: Tensor) -> Tensor:
    """LDDT that a network expects of each nucleotide: [..., K] logits over equal bins to [...] in (0, 1)."""
    bins = logits_BLK.shape[-1]
    centre_K = (torch.arange(bins, device=logits_BLK.device) + 0.5) / bins
    return logits_BLK.float().softmax(-1) @ centre_K


class Heads(nn.Module):
    """All heads of a network; each argument is described in `RnaEncoder`."""

    def __init__(
        self,
        width: int,
        *,
        num_channels: int,
        num_distance_bins: int,
        num_classes: int,
        coordinates: bool,
        use_bpp: bool,
        gru_head: bool,
        pool: Pool,
        pair_width: int,
    ) -> None:
        super().__init__()
        self.values = ValuesHead(width, num_channels=num_channels, gru=gru_head) if num_channels else None
        self.distances = (
            DistanceHead(width, num_bins=num_distance_bins, use_bpp=use_bpp, track_width=pair_width)
            if num_distance_bins
            else None
        )
        self.classes = ClassHead(width, num_classes=num_classes, pool=pool) if num_classes else None
        self.coordinates = (
            CoordinateHead(width, num_bins=NUM_LDDT_BINS, use_bpp=use_bpp, track_width=pair_width)
            if coordinates
            else None
        )

    def forward(self, x_BLD: Tensor, inputs: RnaInputs, pair_BLLP: Tensor | None = None) -> RnaOutputs:
        """Predict from the last hidden layer and, where the network has them, its pair features."""
        mask_BL, bpp_BLL = inputs.mask_BL, inputs.bpp_BLL
        placed = None if self.coordinates is None else self.coordinates(x_BLD, mask_BL, bpp_BLL, pair_BLLP)
        return RnaOutputs(
            values_BLC=None if self.values is None else self.values(x_BLD, mask_BL),
            distance_logits_BLLK=None if self.distances is None else self.distances(x_BLD, bpp_BLL, pair_BLLP),
            class_logits_BC=None if self.classes is None else self.classes(x_BLD, mask_BL),
            c1_xyz_BL3=None if placed is None else placed.xyz_BL3,
            lddt_logits_BLK=None if placed is None else placed.lddt_logits_BLK,
        )


class ValuesHead(nn.Module):
    """One value per nucleotide and channel, in float32, zero under the padding."""

    def __init__(self, width: int, *, num_channels: int, gru: bool = False) -> None:
        super().__init__()
        self.gru = PackedGru(width) if gru else None
        self.linear = nn.Linear(width, num_channels)

    def forward(self, x_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        """[B, L, D] to [B, L, C]."""
        with torch.autocast(x_BLD.device.type, enabled=False):
            x_BLD = at_least_float32(x_BLD)
            if self.gru is not None:
                x_BLD = x_BLD + self.gru(x_BLD, mask_BL)
            return zero_pads(self.linear(x_BLD), mask_BL)


class ClassHead(nn.Module):
    """One value per sequence and class, in float32, whatever the padding.

    Args:
        width: D.
        num_classes: C.
        pool: how the positions become one vector, see `RnaEncoder`.
    """

    def __init__(self, width: int, *, num_classes: int, pool: Pool) -> None:
        super().__init__()
        self.pool = pool
        # of zeros: attention starts as the mean
        self.query_D = nn.Parameter(torch.zeros(width)) if pool == "attention" else None
        self.gru = PackedGru(width) if pool == "gru" else None
        self.linear = nn.Linear(width, num_classes)

    def forward(self, x_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        """[B, L, D] to [B, C]."""
        with torch.autocast(x_BLD.device.type, enabled=False):
            return self.linear(self._pool(zero_pads(at_least_float32(x_BLD), mask_BL), mask_BL))

    def _pool(self, x_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        if self.gru is not None:
            return self.gru.last(x_BLD, mask_BL)
        if self.pool == "max":
            return torch.where(mask_BL.unsqueeze(-1), x_BLD, torch.finfo(x_BLD.dtype).min).amax(1)
        if self.query_D is None:
            return masked_mean(x_BLD, mask_BL)
        score_BL = torch.where(mask_BL, x_BLD @ self.query_D, torch.finfo(x_BLD.dtype).min)
        return (score_BL.softmax(-1).unsqueeze(1) @ x_BLD).squeeze(1)


class PackedGru(nn.Module):
    """Bidirectional GRU that never steps onto the padding, which has to stand on the right."""

    def __init__(self, width: int) -> None:
        super().__init__()
        if width % 2:
            raise ValueError(f"GRU head: got width {width}; expected an even one, half for each direction.")
        self.gru = nn.GRU(width, width // 2, batch_first=True, bidirectional=True)

    def forward(self, x_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        """States at every position: [B, L, D] to [B, L, D]."""
        states = self.gru(_pack(x_BLD, mask_BL))[0]
        return pad_packed_sequence(states, batch_first=True, total_length=x_BLD.shape[1])[0]

    def last(self, x_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        """States after the last step of either direction: [B, L, D] to [B, D]."""
        return torch.cat(self.gru(_pack(x_BLD, mask_BL))[1].unbind(0), dim=-1)


def _pack(x_BLD: Tensor, mask_BL: Tensor) -> PackedSequence:
    mask_BL = mask_BL.cpu()
    if not mask_BL[:, 0].all() or (mask_BL[:, 1:] > mask_BL[:, :-1]).any():
        raise ValueError("GRU head: got a mask with padding before a nucleotide; expected it on the right alone.")
    return pack_padded_sequence(x_BLD, mask_BL.sum(1), batch_first=True, enforce_sorted=False)
