"""Deep residual shrinkage network: convolutions whose outputs are soft-thresholded at a level learned per sequence.

Small activations are noise and become zero; how small is small is computed from the sequence itself. Letters: B batch,
L length (nt), D width (channel).

Source: Zhao et al. 2020, IEEE Trans. Industrial Informatics 16:4681. Where this differs: one output per nucleotide
(stride 1, growing dilation instead), the mean excludes padding, and layer norm replaces batch norm, so that a
prediction does not depend on its batch.
"""

import math
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.encoder import RnaEncoder
from models.layers.dropout import Dropout
from models.layers.masked import masked_mean, zero_pads
from models.layers.precision import at_least_float32
from models.layers.sepconv import conv1d
from models.registry import register_model

Shrink = Literal["channel", "shared"]


class Shrinkage(nn.Module):
    """Soft thresholding between zero and the mean magnitude of the sequence.

    Args:
        width: D.
        shrink: a threshold for each channel, or one for all.
    """

    def __init__(self, width: int, *, shrink: Shrink) -> None:
        super().__init__()
        hidden = max(1, width // 4)
        self.shrink = shrink
        self.level = nn.Sequential(
            nn.Linear(width, hidden),
            nn.LayerNorm(hidden),
            nn.ReLU(),
            nn.Linear(hidden, width if shrink == "channel" else 1),
        )

    def forward(self, x_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        """[B, L, D] to [B, L, D] float32: every number moved towards zero by the threshold, and not across it."""
        with torch.autocast(x_BLD.device.type, enabled=False):
            x_BLD = at_least_float32(x_BLD)
            threshold_B1D = self.threshold(x_BLD, mask_BL)
            return x_BLD - torch.clamp(x_BLD, min=-threshold_B1D, max=threshold_B1D)

    def threshold(self, x_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        """[B, 1, D or 1], at least 0 and below the mean magnitude."""
        mean_BD = masked_mean(x_BLD.abs(), mask_BL)
        share_BD = torch.sigmoid(self.level(mean_BD))
        if self.shrink == "shared":
            mean_BD = mean_BD.mean(-1, keepdim=True)
        return (share_BD * mean_BD).unsqueeze(1)


class ShrinkageBlock(nn.Module):
    """Norm, ReLU and convolution, twice; shrinkage; residual."""

    def __init__(self, width: int, *, kernel: int, dilation: int, shrink: Shrink, dropout: float) -> None:
        super().__init__()
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.convs = nn.ModuleList(DenseConv(width, kernel=kernel, dilation=dilation) for _ in range(2))
        self.shrinkage = Shrinkage(width, shrink=shrink)
        self.dropout = Dropout(dropout)

    def forward(self, x_BLD: Tensor, mask_BL: Tensor, bias_BHLL: Tensor | None = None) -> Tensor:
        """[B, L, D] to [B, L, D]; the attention's bias is not used."""
        y_BLD = x_BLD
        for norm, conv in zip(self.norms, self.convs, strict=True):
            y_BLD = conv(zero_pads(F.relu(norm(y_BLD)), mask_BL))
        return x_BLD + self.dropout(self.shrinkage(y_BLD, mask_BL))


class DenseConv(nn.Module):
    """Convolution that mixes all channels and keeps the length."""

    def __init__(self, width: int, *, kernel: int, dilation: int) -> None:
        super().__init__()
        if kernel % 2 == 0:
            raise ValueError(f"convolution: got kernel {kernel}; expected an odd one, which keeps the length.")
        self.dilation = dilation
        bound = 1 / math.sqrt(width * kernel)
        self.weight_DDK = nn.Parameter(torch.empty(width, width, kernel).uniform_(-bound, bound))
        self.bias_D = nn.Parameter(torch.zeros(width))

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Convolve `x_BLD`, zero under the padding: same shape."""
        padding = self.dilation * (self.weight_DDK.shape[-1] // 2)
        return conv1d(x_BLD, self.weight_DDK, self.bias_D, padding=padding, dilation=self.dilation)


@register_model
class Drsn(RnaEncoder):
    """Stack of shrinkage blocks with growing dilation.

    Args:
        width: channels.
        depth: blocks, of two convolutions each.
        kernel: of the convolutions, in nt, odd.
        dilations: block i has dilation 2^(i mod dilations).
        shrink: a threshold for each channel, or one that all share.
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
        dropout: float = 0.1,
        **common: Any,
    ) -> None:
        if dilations < 1:
            raise ValueError(f"drsn: got dilations {dilations}; expected at least 1.")
        super().__init__(width, kernel, **common)
        self.blocks = nn.ModuleList(
            ShrinkageBlock(width, kernel=kernel, dilation=2 ** (i % dilations), shrink=shrink, dropout=dropout)
            for i in range(depth)
        )
