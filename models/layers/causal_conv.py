"""Convolutions along the sequence with a kernel for each channel, the causal one in either direction.

Letters: B batch, L length, D width, K kernel.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from models.layers import kernels

_WIDTHS = (2, 3, 4)  # kernels that causal-conv1d has


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
    # on a GPU cuDNN alone takes that, and may compile a plan for each new length; PyTorch's own kernel wants a copy,
    # and fails at 2^31 numbers, of which the result may have more than the image
    channels_first = image.is_cuda and groups > 1 and image.numel() <= kernels.ADDRESSED // 2
    image = image.contiguous() if channels_first else image
    image = F.conv2d(image, weight.unsqueeze(2), bias, padding=(0, padding), dilation=(1, dilation), groups=groups)
    y_BLD = image.squeeze(2).transpose(1, 2)
    return y_BLD.contiguous() if channels_first else y_BLD


def causal_conv(x_BLD: Tensor, weight_DK: Tensor, bias_D: Tensor, *, reverse: bool = False) -> Tensor:
    """Convolve so that position i sees i - K + 1 … i, or i … i + K - 1 with `reverse`.

    Args:
        x_BLD: [B, L, D].
        weight_DK: [D, K]; the last element meets the position itself.
        bias_D: [D].
        reverse: see what comes after instead of before.

    Returns:
        [B, L, D], under autocast in its type.
    """
    # theirs loads eight channels at a time, and refuses a single position for strides that mean nothing there
    fits = weight_DK.shape[1] in _WIDTHS and x_BLD.shape[2] % 8 == 0 and x_BLD.shape[1] > 1
    if fits and x_BLD.dtype != torch.float64:
        path = kernels.path("causal_conv1d", x_BLD.device)
        if path != "reference":
            return OPERATOR.kernels[path].run(x_BLD, weight_DK, bias_D, reverse=reverse)
    weight_D1K = (weight_DK.flip(-1) if reverse else weight_DK).unsqueeze(1)
    both_ends = conv1d(x_BLD, weight_D1K, bias_D, padding=weight_DK.shape[1] - 1)
    length = x_BLD.shape[1]
    return both_ends[:, -length:] if reverse else both_ends[:, :length]


def causal_conv_ref(x_BLD: Tensor, weight_DK: Tensor, bias_D: Tensor, *, reverse: bool = False) -> Tensor:
    """The definition, one element of the kernel after the other in float64: the twin of `causal_conv`."""
    x_BLD, weight_DK, bias_D = (x.double() for x in (x_BLD, weight_DK, bias_D))
    y_BLD = bias_D.expand_as(x_BLD)
    for back in range(min(weight_DK.shape[1], x_BLD.shape[1])):
        ends = (0, 0, 0, back) if reverse else (0, 0, back, 0)
        seen_BLD = x_BLD[:, back:] if reverse else x_BLD[:, : x_BLD.shape[1] - back]
        y_BLD = y_BLD + weight_DK[:, -1 - back] * F.pad(seen_BLD, ends)
    return y_BLD


def _load() -> str:
    from causal_conv1d import __version__, causal_conv1d_fn  # noqa: F401

    return f"causal-conv1d {__version__}"


def _run(x_BLD: Tensor, weight_DK: Tensor, bias_D: Tensor, *, reverse: bool) -> Tensor:
    """Theirs wants [B, D, L], which may lie as [B, L, D], and knows one direction."""
    from causal_conv1d import causal_conv1d_fn

    kind = x_BLD.device.type
    if torch.is_autocast_enabled(kind):
        x_BLD = x_BLD.to(torch.get_autocast_dtype(kind))

    def convolve(x_BLD: Tensor) -> Tensor:
        x_BLD = x_BLD.flip(1) if reverse else x_BLD.contiguous()
        y_BLD = causal_conv1d_fn(x_BLD.transpose(1, 2), weight_DK.contiguous(), bias_D).transpose(1, 2)
        return y_BLD.flip(1) if reverse else y_BLD

    return kernels.over_batch(convolve, x_BLD, size=x_BLD.shape[1] * x_BLD.shape[2])


def _example() -> dict[str, Tensor]:
    rng = torch.Generator().manual_seed(0)
    sizes = {"x": (2, 70, 40), "weight": (40, 4), "bias": (40,)}
    return {name: torch.randn(*size, generator=rng) for name, size in sizes.items()}


OPERATOR = kernels.Operator(
    kernels={"causal-conv1d": kernels.Kernel("cuda", _load, _run, repeatable=False)},
    reference=causal_conv_ref,
    example=_example,
)
