"""Separable convolution: mix along the sequence channel by channel, then mix the channels.

Letters: B batch, L length, D width, K kernel.
"""

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.causal_conv import causal_conv, conv1d
from models.layers.masked import masked_mean, zero_pads
from models.layers.precision import at_least_float32


class DepthwiseConv(nn.Module):
    """One kernel a channel; symmetric, or causal and then usable in either direction."""

    def __init__(self, width: int, *, kernel: int, causal: bool = False) -> None:
        super().__init__()
        if not causal and kernel % 2 == 0:
            raise ValueError(f"convolution: got kernel {kernel}; expected an odd one, which keeps the length.")
        self.kernel, self.causal = kernel, causal
        self.operators = ("causal_conv1d",) if causal else ()
        bound = 1 / math.sqrt(kernel)
        self.weight_D1K = nn.Parameter(torch.empty(width, 1, kernel).uniform_(-bound, bound))
        self.bias_D = nn.Parameter(torch.empty(width).uniform_(-bound, bound))

    def forward(self, x_BLD: Tensor, *, reverse: bool = False) -> Tensor:
        """Convolve `x_BLD`, zero under the padding: same shape.

        With ``causal``, position i sees i - K + 1 … i, or i … i + K - 1 with `reverse`.
        """
        if not self.causal:
            return conv1d(x_BLD, self.weight_D1K, self.bias_D, padding=self.kernel // 2)
        return causal_conv(x_BLD, self.weight_D1K.squeeze(1), self.bias_D, reverse=reverse)


class MultiKernelConv(nn.Module):
    """Mean of three depthwise convolutions, with kernels K, K - 2 and K - 4: 7 gives 3, 5 and 7.

    Run as one convolution with the mean of the kernels, padded to K: the same result at a third of the cost.
    """

    def __init__(self, width: int, *, kernel: int) -> None:
        super().__init__()
        if kernel < 5:
            raise ValueError(f"multi_kernel: got kernel {kernel}; expected 5 or more, for kernel - 4 is used too.")
        self.branches = nn.ModuleList(DepthwiseConv(width, kernel=k) for k in (kernel - 4, kernel - 2, kernel))
        self.kernel = kernel

    def forward(self, x_BLD: Tensor) -> Tensor:
        """Convolve `x_BLD`, zero under the padding: same shape."""
        convs = [cast(DepthwiseConv, branch) for branch in self.branches]
        weights = [F.pad(conv.weight_D1K, [(self.kernel - conv.kernel) // 2] * 2) for conv in convs]
        weight_D1K, bias_D = torch.stack(weights).mean(0), torch.stack([conv.bias_D for conv in convs]).mean(0)
        return conv1d(x_BLD, weight_D1K, bias_D, padding=self.kernel // 2)


class SqueezeExcitation(nn.Module):
    """Scale each channel by a gate that is computed from the means of all over the sequence.

    Source: Hu et al. 2018, reduction 4; the mean excludes padding.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        hidden = max(1, width // 4)
        self.gate = nn.Sequential(nn.Linear(width, hidden), nn.SiLU(), nn.Linear(hidden, width), nn.Sigmoid())

    def forward(self, x_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        """[B, L, D] to [B, L, D]."""
        # a sum over a long sequence overflows float16
        return x_BLD * self.gate(masked_mean(at_least_float32(x_BLD), mask_BL)).unsqueeze(1)


class SeparableConv(nn.Module):
    """Depthwise convolution, then a linear layer across the channels.

    Args:
        width: D.
        kernel: in nt, odd.
        multi_kernel: the mean of three kernels, see `MultiKernelConv`.
        glu: gate the linear layer's output by a second one: 2 D² weights; otherwise D².
        squeeze: scale the result's channels by a gate on the whole sequence, see `SqueezeExcitation`.
    """

    def __init__(
        self, width: int, *, kernel: int, multi_kernel: bool = False, glu: bool = True, squeeze: bool = False
    ) -> None:
        super().__init__()
        self.depthwise = (MultiKernelConv if multi_kernel else DepthwiseConv)(width, kernel=kernel)
        self.pointwise = nn.Linear(width, 2 * width if glu else width)
        self.glu = glu
        self.squeeze = SqueezeExcitation(width) if squeeze else None

    def forward(self, x_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        """[B, L, D] to [B, L, D]; padding reaches nothing."""
        x_BLD = self.pointwise(self.depthwise(zero_pads(x_BLD, mask_BL)))
        if self.glu:
            x_BLD = F.glu(x_BLD, dim=-1)
        return x_BLD if self.squeeze is None else self.squeeze(x_BLD, mask_BL)
