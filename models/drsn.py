"""Deep residual shrinkage network: convolutions whose outputs are soft-thresholded at a level learned per sequence.

Small activations are noise and become zero; how small is small is computed from the sequence itself. One stack runs
over positions; another, for distances and coordinates, over pairs of them. Letters: B batch, L length (nt), D width
(channel), P pair channel, K kernel.

Source: Zhao et al. 2020, IEEE Trans. Industrial Informatics 16:4681. Where this differs: one output per nucleotide
(stride 1, growing dilation instead), the mean excludes padding, and layer norm replaces batch norm, so that a
prediction does not depend on its batch.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.encoder import RnaEncoder
from models.interface import RnaInputs
from models.layers.checkpointing import run_blocks
from models.layers.distogram import PairEmbedding
from models.layers.dropout import Dropout
from models.layers.masked import zero_pads
from models.layers.sepconv import conv1d
from models.layers.shrinkage import Shrink, Shrinkage
from models.registry import refuse_without_effect, register_model

_PAIR_KERNEL = 3


class ShrinkageBlock(nn.Module):
    """Norm, ReLU and convolution, twice; shrinkage; residual.

    Args:
        width: D.
        kernel: in nt, odd.
        dilation: distance between the kernel's elements.
        shrink: a threshold for each channel, one that all share, or none: a residual block.
        dropout: share dropped of the branch's output.
        axes: 1 = over positions, 2 = over pairs.
    """

    def __init__(
        self, width: int, *, kernel: int, dilation: int, shrink: Shrink, dropout: float, axes: int = 1
    ) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.convs = nn.ModuleList(DenseConv(width, kernel=kernel, dilation=dilation, axes=axes) for _ in range(2))
        self.shrinkage = None if shrink == "none" else Shrinkage(width, shrink=shrink)
        self.dropout = Dropout(dropout)

    def forward(self, x_BLD: Tensor, mask_BL: Tensor, bias_BHLL: Tensor | None = None) -> Tensor:
        """[B, L, D] to itself, or [B, L, L, D] with a mask [B, L, L]; the attention's bias is not used."""
        y_BLD = x_BLD
        for norm, conv in zip(self.norms, self.convs, strict=True):
            y_BLD = conv(zero_pads(F.relu(norm(y_BLD)), mask_BL))
        return x_BLD + self.dropout(y_BLD if self.shrinkage is None else self.shrinkage(y_BLD, mask_BL))


class DenseConv(nn.Module):
    """Convolution that mixes all channels and keeps the length."""

    def __init__(self, width: int, *, kernel: int, dilation: int, axes: int) -> None:
        super().__init__()
        if kernel % 2 == 0:
            raise ValueError(f"convolution: got kernel {kernel}; expected an odd one, which keeps the length.")
        self.padding, self.dilation = dilation * (kernel // 2), dilation
        bound = 1 / math.sqrt(width * kernel**axes)
        # [D, D, K] or [D, D, K, K]
        self.weight = nn.Parameter(torch.empty(width, width, *[kernel] * axes).uniform_(-bound, bound))
        self.bias_D = nn.Parameter(torch.zeros(width))

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Convolve [B, L, D] or [B, L, L, D], zero under the padding: same shape."""
        if x_BLD.ndim == 3:
            return conv1d(x_BLD, self.weight, self.bias_D, padding=self.padding, dilation=self.dilation)
        image = x_BLD.permute(0, 3, 1, 2)
        image = F.conv2d(image, self.weight, self.bias_D, padding=self.padding, dilation=self.dilation)
        return image.permute(0, 2, 3, 1)


@register_model
class Drsn(RnaEncoder):
    """Stack of shrinkage blocks with growing dilation; for distances and coordinates, a second one over pairs.

    Memory of the second stack in training is about ``33 B L² P`` bytes a block: 230 MiB for B 8, L 170, P 32.

    Args:
        width: channels.
        depth: blocks, of two convolutions each.
        kernel: of the convolutions, in nt, odd.
        dilations: block i has dilation 2^(i mod dilations).
        shrink: a threshold for each channel, one that all share, or none: a residual network to compare with.
        pair_depth: blocks over pairs of positions, with a 3×3 kernel, before the heads that predict pairs; 0 = none.
        pair_width: channels of these.
        dropout: share dropped of each block's output.
        **common: what every network takes, see `RnaEncoder`.
    """

    name = "drsn"

    def __init__(
        self,
        *,
        width: int = 128,
        depth: int = 12,
        kernel: int = 5,
        dilations: int = 4,
        shrink: Shrink = "channel",
        pair_depth: int = 0,
        pair_width: int = 32,
        dropout: float = 0.1,
        **common: Any,
    ) -> None:
        if dilations < 1:
            raise ValueError(f"drsn: got dilations {dilations}; expected at least 1.")
        if pair_depth and not (common.get("num_distance_bins") or common.get("coordinates")):
            raise ValueError(f"drsn: got pair_depth {pair_depth} and no head for distances or coordinates to read it.")

        def blocks(count: int, channels: int, **kinds: int) -> nn.ModuleList:
            return nn.ModuleList(
                ShrinkageBlock(channels, dilation=2 ** (i % dilations), shrink=shrink, dropout=dropout, **kinds)
                for i in range(count)
            )

        super().__init__(width, kernel, pair_width if pair_depth else 0, **common)
        if not pair_depth:
            refuse_without_effect(self, "without blocks over pairs (pair_depth)", pair_width=pair_width)
        self.blocks = blocks(depth, width, kernel=kernel)
        self.pairs = PairEmbedding(width, pair_width=pair_width, use_bpp=self.uses_bpp) if pair_depth else None
        self.pair_blocks = blocks(pair_depth, pair_width, kernel=_PAIR_KERNEL, axes=2)

    def _encode(self, inputs: RnaInputs) -> tuple[Tensor, Tensor | None]:
        x_BLD, _ = super()._encode(inputs)
        if self.pairs is None:
            return x_BLD, None
        mask_BLL = inputs.mask_BL.unsqueeze(1) & inputs.mask_BL.unsqueeze(2)
        pair_BLLP = self.pairs(x_BLD, inputs.bpp_BLL)
        pair_BLLP = run_blocks(list(self.pair_blocks), pair_BLLP, mask_BLL, every=self.checkpoint_every)
        return x_BLD, pair_BLLP
