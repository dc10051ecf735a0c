"""Separable convolution: mix along the sequence channel by channel, then mix the channels.

Letters: B batch, L length, D width, K kernel.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.masked import zero_pads


def conv1d(x_BLD: Tensor, weight: Tensor, bias: Tensor | None, *, padding: int, dilation: int = 1) -> Tensor:
    """Convolve along the sequence, the channels staying last.

    Args:
        x_BLD: [B, L, D]; zero under the padding.
        weight: [D_out, D_in or 1, K]; with 1, each channel has its own kernel.
        bias: [D_out] or None.
        padding: zeros at both ends.
        dilation: distance between the kernel's elements.

    Returns:
        [B, L + 2 padding - dilation (K - 1), D_out].
    """
    groups = x_BLD.shape[-1] // weight.shape[1]
    # [B, D, 1, L] with channels last in memory is [B, L, D] as it lies: 2 to 4 times faster on the CPU than conv1d
    image = x_BLD.transpose(1, 2).unsqueeze(2)
    image = F.conv2d(image, weight.unsqueeze(2), bias, padding=(0, padding), dilation=(1, dilation), groups=groups)
    return image.squeeze(2).transpose(1, 2)


class DepthwiseConv(nn.Module):
    """One kernel a channel; symmetric, or causal and then usable in either direction."""

    def __init__(self, width: int, *, kernel: int, causal: bool = False) -> None:
        super().__init__()
        if not causal and kernel % 2 == 0:
            raise ValueError(f"convolution: got kernel {kernel}; expected an odd one, which keeps the length.")
        self.kernel, self.causal = kernel, causal
        bound = 1 / math.sqrt(kernel)
        self.weight_D1K = nn.Parameter(torch.empty(width, 1, kernel).uniform_(-bound, bound))
        self.bias_D = nn.Parameter(torch.empty(width).uniform_(-bound, bound))

    def forward(self, x_BLD: Tensor, *, reverse: bool = False) -> Tensor:
        """Convolve `x_BLD`, zero under the padding: same shape.

        With ``causal``, position i sees i - K + 1 … i, or i … i + K - 1 with `reverse`.
        """
        if not self.causal:
            return conv1d(x_BLD, self.weight_D1K, self.bias_D, padding=self.kernel // 2)
        weight_D1K = self.weight_D1K.flip(-1) if reverse else self.weight_D1K
        both_ends = conv1d(x_BLD, weight_D1K, self.bias_D, padding=self.kernel - 1)
        length = x_BLD.shape[1]
        return both_ends[:, -length:] if reverse else both_ends[:, :length]


class SeparableConv(nn.Module):
    """Depthwise convolution, then a gated linear unit across the channels."""

    def __init__(self, width: int, *, kernel: int) -> None:
        super().__init__()
        self.depthwise = DepthwiseConv(width, kernel=kernel)
        self.pointwise = nn.Linear(width, 2 * width)

    def forward(self, x_BLD: Tensor, mask_BL: Tensor) -> Tensor:
        """[B, L, D] to [B, L, D]; padding reaches nothing."""
        return F.glu(self.pointwise(self.depthwise(zero_pads(x_BLD, mask_BL))), dim=-1)
