"""Convolution with a kernel as long as the sequence, through the Fourier transform.

On a CPU it is compiled from ``csrc/long_conv.cpp``; elsewhere, in float64 and where there is no compiler it is plain
PyTorch. Letters: B batch, L length, D width, C channels of one block, N points of the transform (a power of two >= L),
X any leading sizes, κ the kernel over all lags.
"""

import functools
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, library
from torch.autograd.function import once_differentiable

from models.layers import extension, kernels
from models.layers.kernels import Kernel, Operator
from models.layers.precision import at_least_float32

# In plain PyTorch: up to so many points (B D N) the transform is taken at once, as the calls cost more than the work,
_PLAIN_POINTS = {"cpu": 1 << 19}
_BLOCK_POINTS = {"cpu": 1 << 18}  # and beyond them so many at a time: 2 MiB, which stays in a CPU's cache
_ELSEWHERE = 1 << 24  # both on other devices: a block is 128 MiB


def fft_conv(u_BLD: Tensor, after_DL: Tensor, before_DL: Tensor | None, skip_D: Tensor) -> Tensor:
    """Long convolution, causal or in both directions.

    ``y_i = skip u_i + sum_{j<=i} after_{i-j} u_j + sum_{j>i} before_{j-i} u_j``; lag 0 is counted once, so
    ``before_0`` is not used. Runs in float32 (float64 if given that): half-precision transforms overflow at the mean
    and take only some lengths. `models.layers.kernels` chooses with what. In plain PyTorch, long inputs go through an
    operator that keeps no spectra, short ones through plain transforms. Each can be differentiated once.

    Args:
        u_BLD: [B, L, D], zero under the padding.
        after_DL: [D, L] float32 kernel over what came before a position.
        before_DL: [D, L] kernel over what comes after it; None = causal.
        skip_D: [D] weight of the input itself.

    Returns:
        [B, L, D], float32 or float64.
    """
    args = [x if x is None else at_least_float32(x) for x in (u_BLD, after_DL, before_DL, skip_D)]
    exact = any(x is not None and x.dtype == torch.float64 for x in args)  # which plain PyTorch alone keeps
    path = "reference" if exact else kernels.path("long_conv", u_BLD.device)
    if path != "reference":
        return OPERATOR.kernels[path].run(*args)
    # a compiler sees the operator alone: one graph for all lengths
    kept = not torch.compiler.is_compiling() and _short(u_BLD)
    return (_Plain.apply if kept else _long_conv)(*args)


def fft_conv_ref(u_BLD: Tensor, after_DL: Tensor, before_DL: Tensor | None, skip_D: Tensor) -> Tensor:
    """The sum itself in float64, L² products: the twin of `fft_conv`, same arguments."""
    u_BLD, after_DL, skip_D = u_BLD.double(), after_DL.double(), skip_D.double()
    length = u_BLD.shape[1]
    lag_LL = torch.arange(length)[:, None] - torch.arange(length)
    kernel_DLL = after_DL[:, lag_LL.clamp(min=0)] * (lag_LL >= 0)
    if before_DL is not None:
        kernel_DLL = kernel_DLL + before_DL.double()[:, (-lag_LL).clamp(min=0)] * (lag_LL < 0)
    return torch.einsum("dij,bjd->bid", kernel_DLL, u_BLD) + skip_D * u_BLD


def _points(length: int) -> int:
    return 1 << (length - 1).bit_length()


def _short(like_BLD: Tensor) -> bool:
    batch, length, width = like_BLD.shape
    return batch * width * _points(length) <= _PLAIN_POINTS.get(like_BLD.device.type, _ELSEWHERE)


class _Plain(torch.autograd.Function):
    """Real transforms of twice the length, all channels at once; both spectra are kept for the way back.

    Autograd alone would go back through complex transforms of twice the length, which take twice as long.
    """

    @staticmethod
    def forward(ctx: Any, u_BLD: Tensor, after_DL: Tensor, before_DL: Tensor | None, skip_D: Tensor) -> Tensor:
        u, kernel = _spectra(u_BLD, after_DL, before_DL, skip_D)
        ctx.save_for_backward(u, kernel)
        ctx.length, ctx.both = u_BLD.shape[1], before_DL is not None
        return _channels_last(u * kernel, ctx.length)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BLD: Tensor) -> tuple[Tensor | None, ...]:
        return _plain_backward(grad_BLD, *ctx.saved_tensors, both=ctx.both)


def _spectra(u_BLD: Tensor, after_DL: Tensor, before_DL: Tensor | None, skip_D: Tensor) -> tuple[Tensor, Tensor]:
    """Of the input and of κ with the skip at its lag 0, [D, B or 1, N + 1]."""
    length, points = u_BLD.shape[1], _points(u_BLD.shape[1])
    kernel_DT = F.pad(after_DL, (0, 2 * points - length))  # nothing wraps around
    if before_DL is not None:  # negative lags stand at the end of the circle
        kernel_DT[:, 2 * points - length + 1 :] = before_DL[:, 1:].flip(-1)
    kernel_DT[:, 0].add_(skip_D)
    return torch.fft.rfft(_channels_first(u_BLD), 2 * points), torch.fft.rfft(kernel_DT).unsqueeze(1)


def _plain_backward(grad_BLD: Tensor, u: Tensor, kernel: Tensor, *, both: bool) -> tuple[Tensor | None, ...]:
    length, size = grad_BLD.shape[1], 2 * (u.shape[-1] - 1)
    grad = torch.fft.rfft(_channels_first(grad_BLD), size)
    lags_DT = torch.fft.irfft((grad * u.conj()).sum(1), size)
    before_DL = F.pad(lags_DT[:, size - length + 1 :].flip(-1), (1, 0)) if both else None
    return (
        _channels_last(grad * kernel.conj(), length),
        lags_DT[:, :length].contiguous(),
        before_DL,
        lags_DT[:, 0].clone(),
    )


def _channels_first(x_BLD: Tensor) -> Tensor:
    """[D, B, L]; as one matrix, which the library transposes two to four times as fast."""
    if x_BLD.stride(1) == 1:  # they are
        return x_BLD.permute(2, 0, 1).contiguous()
    return x_BLD.reshape(-1, x_BLD.shape[2]).t().contiguous().view(-1, *x_BLD.shape[:2])


def _channels_last(spectrum: Tensor, length: int) -> Tensor:
    """[B, L, D] of a spectrum [D, B, N + 1]."""
    x_DBL = torch.fft.irfft(spectrum, 2 * (spectrum.shape[-1] - 1))[..., :length].contiguous()
    return x_DBL.flatten(1).t().contiguous().view(*x_DBL.shape[1:], -1)


class _Ring:
    """Polynomials modulo x^N = i, in which N complex points hold a real convolution of length L <= N.

    What wraps around comes back times i: a lag of -m, put as -i at N - m, falls on the real part where it belongs and
    on the imaginary part where it does not. The values of such a polynomial at the N roots of i are the transform of
    its coefficients times x_n = exp(2πi n / 4N), and reversing all lags conjugates them.

    Source: right-angle circular convolution (Nussbaumer 1981).
    """

    def __init__(self, like_BLD: Tensor) -> None:
        batch, self.length, width = like_BLD.shape
        self.points = _points(self.length)
        block = max(1, _BLOCK_POINTS.get(like_BLD.device.type, _ELSEWHERE) // max(1, batch * self.points))
        self.spans = [slice(first, first + block) for first in range(0, width, block)]
        turns = torch.arange(self.points, device=like_BLD.device, dtype=torch.float64) / (4 * self.points)
        twist = torch.polar(torch.ones_like(turns), 2 * math.pi * turns)
        self.twist = twist.to(like_BLD.dtype.to_complex())
        self.untwist = self.twist.conj().resolve_conj()

    def sequence(self, x_BLC: Tensor) -> Tensor:
        """Values of sequences at the roots, [B, C, N]."""
        return self._values(self._padded(x_BLC.transpose(1, 2)))

    def kernel(self, after_CL: Tensor, before_CL: Tensor | None, skip_C: Tensor) -> Tensor:
        """Values of κ at the roots, [C, N]."""
        kernel_CN = self._padded(after_CL)
        kernel_CN[:, 0] += skip_C
        if before_CL is not None:
            kernel_CN = torch.complex(kernel_CN, self._padded(before_CL[:, 1:]).flip(-1).neg_())
        return self._values(kernel_CN)

    def coefficients(self, value_XN: Tensor) -> Tensor:
        """Values at the roots to complex coefficients."""
        return torch.fft.ifft(value_XN).mul_(self.untwist)

    def _values(self, x_XN: Tensor) -> Tensor:
        return torch.fft.fft(x_XN * self.twist)

    def _padded(self, x_XL: Tensor) -> Tensor:
        return F.pad(x_XL, (0, self.points - x_XL.shape[-1]))


def _empty_like(*inputs: Tensor | None) -> list[Tensor]:
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs if x is not None]


@library.custom_op("rna::long_conv", mutates_args=())
def _long_conv(u_BLD: Tensor, after_DL: Tensor, before_DL: Tensor | None, skip_D: Tensor) -> Tensor:
    if _short(u_BLD):
        return _channels_last(torch.mul(*_spectra(u_BLD, after_DL, before_DL, skip_D)), u_BLD.shape[1])
    ring, [y_BLD] = _Ring(u_BLD), _empty_like(u_BLD)
    for span in ring.spans:
        kernel = ring.kernel(after_DL[span], None if before_DL is None else before_DL[span], skip_D[span])
        y_BCN = ring.coefficients(ring.sequence(u_BLD[..., span]).mul_(kernel)).real
        y_BLD[..., span] = y_BCN[..., : ring.length].transpose(1, 2)
    return y_BLD


@library.custom_op("rna::long_conv_backward", mutates_args=())
def _long_conv_backward(
    grad_BLD: Tensor, u_BLD: Tensor, after_DL: Tensor, before_DL: Tensor | None, skip_D: Tensor
) -> list[Tensor]:
    """Gradients of all inputs in their order; correlation is convolution with the conjugate spectrum."""
    if _short(u_BLD):
        spectra = _spectra(u_BLD, after_DL, before_DL, skip_D)
        return [x for x in _plain_backward(grad_BLD, *spectra, both=before_DL is not None) if x is not None]
    ring, grads = _Ring(u_BLD), _empty_like(u_BLD, after_DL, before_DL, skip_D)
    for span in ring.spans:
        kernel = ring.kernel(after_DL[span], None if before_DL is None else before_DL[span], skip_D[span])
        grad = ring.sequence(grad_BLD[..., span])
        kappa_CN = ring.coefficients(ring.sequence(u_BLD[..., span]).conj_physical_().mul_(grad).sum(0))
        grad_BCN = ring.coefficients(grad.mul_(kernel.conj_physical_())).real
        grads[0][..., span] = grad_BCN[..., : ring.length].transpose(1, 2)
        grads[1][span] = kappa_CN.real[:, : ring.length]
        grads[-1][span] = kappa_CN.real[:, 0]
        if before_DL is not None:
            grads[2][span, 0] = 0
            grads[2][span, 1:] = kappa_CN.imag.flip(-1)[:, : ring.length - 1].neg()
    return grads


def _fake_output(u_BLD: Tensor, *_: Tensor | None) -> Tensor:
    return _empty_like(u_BLD)[0]


def _fake_gradients(grad_BLD: Tensor, *inputs: Tensor | None) -> list[Tensor]:
    return _empty_like(*inputs)


def _save(ctx: Any, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _register(forward: Any, backward: Any) -> None:
    """Tell autograd and compilers what a pair of operators does: once differentiable, gradients like the inputs."""

    def differentiate(ctx: Any, grad_BLD: Tensor) -> tuple[Tensor | None, ...]:
        inputs = ctx.saved_tensors
        grads = iter(backward(grad_BLD, *inputs))
        return tuple(None if x is None else next(grads) for x in inputs)

    def refuse(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError("The long convolution: trying to differentiate twice.")

    library.register_fake(forward, _fake_output)
    library.register_fake(backward, _fake_gradients)
    library.register_autograd(forward, differentiate, setup_context=_save)
    library.register_autograd(backward, refuse)


_register(_long_conv, _long_conv_backward)


@functools.cache
def _load_compiled() -> str:
    usable, reason = extension.load("long_conv")
    if not usable:
        raise RuntimeError(reason)
    _register(torch.ops.rna_conv.forward.default, torch.ops.rna_conv.backward.default)
    return reason


def _run_compiled(*args: Tensor | None) -> Tensor:
    return torch.ops.rna_conv.forward(*args)


def _example() -> dict[str, Tensor]:
    """Neither positions nor channels fill the compiled kernel's last tile, of 4, 8 or 16."""
    generator = torch.Generator().manual_seed(0)
    shapes = {"u": (2, 41, 21), "after": (21, 41), "before": (21, 41), "skip": (21,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


OPERATOR = Operator(
    kernels={"compiled": Kernel("cpu", _load_compiled, _run_compiled)},
    reference=fft_conv_ref,
    example=_example,
    options=({},),
)
