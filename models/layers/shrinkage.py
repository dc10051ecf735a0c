"""Soft thresholding at a level that is learned per sequence, over positions or pairs of positions.

Letters: B batch, L length, D width. Shapes are written for positions; for pairs, L stands for L, L.
"""

from typing import Literal

import torch
from torch import Tensor, nn

from models.layers.masked import masked_mean
from models.layers.precision import at_least_float32

Shrink = Literal["channel", "shared", "none"]


class Shrinkage(nn.Module):
    """Soft thresholding between zero and the mean magnitude of the sequence.

    Args:
        width: D.
        shrink: a threshold for each channel, or one for all.

    Source: Zhao et al. 2020, IEEE Trans. Industrial Informatics 16:4681, RSBU-CW and RSBU-CS. Where this differs: the
    mean excludes padding, and layer norm replaces batch norm.
    """

    def __init__(self, width: int, *, shrink: Shrink) -> None:
        super().__init__()
        hidden = max(4, width // 4)  # layer norm leaves only signs of two numbers, and nothing of one
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
            threshold_BD = self.threshold(x_BLD, mask_BL)
            threshold_BLD = threshold_BD.view(len(x_BLD), *[1] * (x_BLD.ndim - 2), -1)
            return x_BLD - torch.clamp(x_BLD, min=-threshold_BLD, max=threshold_BLD)

    def threshold(self, x_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        """[B, D or 1], at least 0 and below the mean magnitude, so that no channel vanishes."""
        mean_BD = masked_mean(x_BLD.abs(), mask_BL)
        # a sigmoid reaches 1 in float32
        share_BD = torch.sigmoid(self.level(mean_BD)).clamp(max=1 - torch.finfo(mean_BD.dtype).eps)
        return share_BD * (mean_BD if self.shrink == "channel" else mean_BD.mean(-1, keepdim=True))
