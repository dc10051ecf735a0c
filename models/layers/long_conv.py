"""Convolution with a kernel as long as the sequence, through the Fourier transform.

Letters: B batch, L length, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.layers.precision import at_least_float32


def fft_conv(u_BLD: Tensor, after_DL: Tensor, before_DL: Tensor | None, skip_D: Tensor) -> Tensor:
    """Long convolution, causal or in both directions.

    ``y_i = skip u_i + sum_{j<=i} after_{i-j} u_j + sum_{j>i} before_{j-i} u_j``; lag 0 is counted once, so
    ``before_0`` is not used. Runs in float32 (float64 if given that): half-precision transforms overflow at the mean
    and take only some lengths.

    Args:
        u_BLD: [B, L, D], zero under the padding.
        after_DL: [D, L] float32 kernel over what came before a position.
        before_DL: [D, L] kernel over what comes after it; None = causal.
        skip_D: [D] weight of the input itself.

    Returns:
        [B, L, D], float32 or float64.
    """
    with torch.autocast(u_BLD.device.type, enabled=False):
        u_BLD = at_least_float32(u_BLD)
        length = u_BLD.shape[1]
        size = 1 << (2 * length - 1).bit_length()  # a power of two >= 2L: nothing wraps around
        kernel_DT = F.pad(after_DL, (0, size - length))
        if before_DL is not None:  # negative lags stand at the end of the circle
            kernel_DT = kernel_DT + F.pad(before_DL[:, 1:].flip(-1), (size - length + 1, 0))
        spectrum = torch.fft.rfft(u_BLD.transpose(1, 2), size) * torch.fft.rfft(kernel_DT, size)
        y_BDL = torch.fft.irfft(spectrum, size)[..., :length]
        return y_BDL.transpose(1, 2) + skip_D * u_BLD


def fft_conv_ref(u_BLD: Tensor, after_DL: Tensor, before_DL: Tensor | None, skip_D: Tensor) -> Tensor:
    """The sum itself in float64, L² products: the twin of `fft_conv`, same arguments."""
    u_BLD, after_DL, skip_D = u_BLD.double(), after_DL.double(), skip_D.double()
    length = u_BLD.shape[1]
    lag_LL = torch.arange(length)[:, None] - torch.arange(length)
    kernel_DLL = after_DL[:, lag_LL.clamp(min=0)] * (lag_LL >= 0)
    if before_DL is not None:
        kernel_DLL = kernel_DLL + before_DL.double()[:, (-lag_LL).clamp(min=0)] * (lag_LL < 0)
    return torch.einsum("dij,bjd->bid", kernel_DLL, u_BLD) + skip_D * u_BLD
