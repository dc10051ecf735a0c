"""Pair track: features of every pair of positions, updated along the stack, from which attention reads its bias.

A pair is directed, (i, j) is not (j, i): the chain has a direction. All of it runs in float32 with every product's
factors or result normalised: the outer product and the triangle product are where RibonanzaNet's architecture
overflows in half precision. Letters: B batch, L length, D width, P pair channel, H head.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.attention import NUM_PAIR_FEATURES, RelativePosition, channels_first, pair_features
from models.layers.blocks import FeedForward
from models.layers.dropout import Dropout
from models.layers.precision import at_least_float32

_TRANSITION = 2  # hidden over outer width


class PairStart(nn.Module):
    """First pair features: signed distance along the chain, and base pairing."""

    def __init__(self, pair_width: int, *, use_bpp: bool) -> None:
        super().__init__()
        self.position = RelativePosition(pair_width)
        self.pairing = nn.Linear(NUM_PAIR_FEATURES, pair_width, bias=False) if use_bpp else None

    def forward(self, mask_BL: Tensor, bpp_BLL: Tensor | None) -> Tensor:
        """[B, L, L, P] float32; pairs with padding mean nothing."""
        pair_LLP = self.position(mask_BL.shape[1]).permute(1, 2, 0).contiguous()
        if self.pairing is None or bpp_BLL is None:
            return pair_LLP.expand(mask_BL.shape[0], -1, -1, -1)
        with torch.autocast(mask_BL.device.type, enabled=False):
            return pair_LLP + self.pairing(pair_features(bpp_BLL).permute(0, 2, 3, 1).to(pair_LLP.dtype))


class OuterProduct(nn.Module):
    """From hidden layers to pairs: a bilinear form of two normalised projections for each channel.

    Source: outer product mean, AlphaFold 2 (Jumper et al. 2021, algorithm 10), with one sequence. Where this differs:
    the P² products of a pair are never stored, the weights meet the first factor before the second does.
    """

    def __init__(self, width: int, *, pair_width: int) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(width)
        self.factors = nn.Linear(width, 2 * pair_width)
        self.weigh = nn.Linear(pair_width, pair_width**2, bias=False)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """[B, L, D] to [B, L, L, P]."""
        left_BLP, right_BLP = self.factors(self.norm(x_BLD)).chunk(2, dim=-1)
        batch, length, pair_width = left_BLP.shape
        weighed = self.weigh(left_BLP).view(batch, length * pair_width, pair_width) / math.sqrt(pair_width)
        return (weighed @ right_BLP.mT).view(batch, length, pair_width, length).transpose(2, 3)


class TriangleMultiplication(nn.Module):
    """What the pairs (i, k) and (j, k) say of (i, j), and what (k, i) and (k, j) do.

    Source: AlphaFold 2 (Jumper et al. 2021, algorithms 11 and 12). Where this differs: one step instead of two, half
    of the channels along outgoing edges and half along incoming ones, for half the time and memory.
    """

    def __init__(self, pair_width: int) -> None:
        super().__init__()
        if pair_width % 2:
            raise ValueError(f"pair track: got pair_width {pair_width}; expected an even one, half for each triangle.")
        self.norm_in = nn.LayerNorm(pair_width)
        self.factors = nn.Linear(pair_width, 4 * pair_width, bias=False)  # two factors and their gates
        self.norm_out = nn.LayerNorm(pair_width)
        self.gate = nn.Linear(pair_width, pair_width)
        self.out = nn.Linear(pair_width, pair_width)

    def forward(self, pair_BLLP: Tensor, real_BLL: Tensor) -> Tensor:
        """[B, L, L, P] to [B, L, L, P]; padding reaches no pair of real positions."""
        normed_BLLP = self.norm_in(pair_BLLP)
        left_BPLL, right_BPLL = F.glu(channels_first(self.factors, normed_BLLP), dim=1).chunk(2, dim=1)
        left_BPLL = torch.where(real_BLL.unsqueeze(1), left_BPLL, 0)  # as third position, padding counts nothing
        (out_i, in_i), (out_j, in_j) = left_BPLL.chunk(2, dim=1), right_BPLL.chunk(2, dim=1)
        # a sum, not a mean, over up to L third positions: the norm makes them one
        triangles_BPLL = torch.cat([out_i @ out_j.mT, in_i.mT @ in_j], dim=1)
        mixed_BLLP = self.out(self.norm_out(triangles_BPLL.permute(0, 2, 3, 1)))
        return torch.sigmoid(self.gate(normed_BLLP)) * mixed_BLLP


class PairUpdate(nn.Module):
    """Outer product, triangle multiplication and a feed-forward network, each added to the pair features.

    Memory in training is about ``80 B L² P`` bytes an update, ``26 B L² P`` without triangles: 596 and 224 MiB for B 8,
    L 177, P 32. Gradient checkpointing keeps ``4 B L² P`` of it.

    Args:
        width: D.
        pair_width: P, even.
        triangle: whether pairs exchange what they know; time O(L³).
        dropout: share dropped of each branch's output, the same for all first positions.
    """

    def __init__(self, width: int, *, pair_width: int, triangle: bool, dropout: float) -> None:
        super().__init__()
        self.outer = OuterProduct(width, pair_width=pair_width)
        self.triangle = TriangleMultiplication(pair_width) if triangle else None
        self.transition = FeedForward(pair_width, expand=_TRANSITION, gelu="none")
        self.dropout = Dropout(dropout)

    def forward(self, pair_BLLP: Tensor, x_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        """[B, L, L, P] to [B, L, L, P] float32, in view of the hidden layer [B, L, D]."""
        with torch.autocast(x_BLD.device.type, enabled=False):
            pair_BLLP = pair_BLLP + self._drop(self.outer(at_least_float32(x_BLD)))
            if self.triangle is not None:
                real_BLL = mask_BL.unsqueeze(1) & mask_BL.unsqueeze(2)
                pair_BLLP = pair_BLLP + self._drop(self.triangle(pair_BLLP, real_BLL))
            return pair_BLLP + self._drop(self.transition(pair_BLLP))

    def _drop(self, branch_BLLP: Tensor) -> Tensor:
        if not self.training or self.dropout.share == 0.0:
            return branch_BLLP
        return branch_BLLP * self.dropout(torch.ones_like(branch_BLLP[:, :1]))


class PairBlock(nn.Module):
    """A block whose attention reads pair features, after an update of those or none.

    Args:
        block: called as ``block(x_BLD, mask_BL, pair_BLLP)``.
        update: of the pair features, before the block.
    """

    def __init__(self, block: nn.Module, update: PairUpdate | None) -> None:
        super().__init__()
        self.block, self.update = block, update

    def forward(
        self, state: tuple[Tensor, Tensor], mask_BL: Tensor, _bias: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Hidden layer [B, L, D] and pair features [B, L, L, P] to the same."""
        x_BLD, pair_BLLP = state
        if self.update is not None:
            pair_BLLP = self.update(pair_BLLP, x_BLD, mask_BL)
        return self.block(x_BLD, mask_BL, pair_BLLP), pair_BLLP
