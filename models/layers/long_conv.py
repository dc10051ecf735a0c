"""Convolution with a kernel as long as the sequence, through the Fourier transform.

Letters: B batch, L length, D width, C channels of one block, N points of the transform (a power of two >= L), R rows
and S columns of N, X any leading sizes, κ the kernel over all lags.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, library
from torch.autograd.function import once_differentiable

from models.layers.precision import at_least_float32

# Up to so many points (B D N) the plain transform is taken: there the calls cost more than the work.
_PLAIN_POINTS = {"cpu": 1 << 19}
_BLOCK_POINTS = {"cpu": 1 << 18}  # transformed at a time: 2 MiB, which stays in a CPU's cache
_ELSEWHERE = 1 << 24  # both on other devices: a block is 128 MiB
_SPLIT_POINTS = 1 << 17  # from here a CPU transform is taken as rows and columns
_LANES = 16  # channels copied at a time: a cache line of float32
_GAP = 16  # complex numbers between rows: columns a power of two apart share cache sets (1.5 to 4 times slower)


def fft_conv(u_BLD: Tensor, after_DL: Tensor, before_DL: Tensor | None, skip_D: Tensor) -> Tensor:
    """Long convolution, causal or in both directions.

    ``y_i = skip u_i + sum_{j<=i} after_{i-j} u_j + sum_{j>i} before_{j-i} u_j``; lag 0 is counted once, so
    ``before_0`` is not used. Runs in float32 (float64 if given that): half-precision transforms overflow at the mean
    and take only some lengths. Long inputs go through an operator that keeps no spectra; short ones through plain
    transforms. Either can be differentiated once.

    Args:
        u_BLD: [B, L, D], zero under the padding.
        after_DL: [D, L] float32 kernel over what came before a position.
        before_DL: [D, L] kernel over what comes after it; None = causal.
        skip_D: [D] weight of the input itself.

    Returns:
        [B, L, D], float32 or float64.
    """
    u_BLD = at_least_float32(u_BLD)
    # a compiler sees the operator alone: one graph for all lengths
    kept = not torch.compiler.is_compiling() and _short(u_BLD)
    return (_Plain.apply if kept else _long_conv)(u_BLD, after_DL, before_DL, skip_D)


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

    From `_SPLIT_POINTS` on a CPU, n = r S + s: transforms of the columns, a twist, transforms of the rows. The spectrum
    stays in the order in which it comes out, which products do not mind.

    Source: right-angle circular convolution (Nussbaumer 1981); four-step transform (Bailey 1990).
    """

    def __init__(self, like_BLD: Tensor) -> None:
        batch, length, width = like_BLD.shape
        cpu = like_BLD.device.type == "cpu"
        self.points = _points(length)
        bits = self.points.bit_length() - 1
        # short columns, long rows: 2^8 x 2^12 for a million points
        self.rows = 1 << (2 * bits // 5) if cpu and self.points >= _SPLIT_POINTS else 1
        self.columns = self.points // self.rows
        limit = _BLOCK_POINTS.get(like_BLD.device.type, _ELSEWHERE)
        self.part = min(width, max(1, limit // (batch * self.points)))  # channels transformed at a time
        self.block = min(width, max(self.part, _LANES))  # channels copied at a time
        self.turned_NC = like_BLD.new_empty(self.points, self.block) if cpu else None
        # exp(2πi (r S + s) / 4N): the part of r goes on the columns, the part of s into the factors between the steps
        count = self.points if self.rows == 1 else self.rows
        n = torch.arange(max(count, self.columns), device=like_BLD.device, dtype=torch.float64)
        self.twist = _unit(n[:count] / (4 * count), like_BLD.dtype)
        if self.rows > 1:
            self.twist = self.twist[:, None]
            self.between_SR = _unit(n[: self.columns, None] * (0.25 - n[: self.rows]) / self.points, like_BLD.dtype)
            self.between_RS = self.between_SR.t().conj().resolve_conj().contiguous()
        self.untwist = self.twist.conj().resolve_conj()

    def slab(self, like_BLD: Tensor, batch: int = 1) -> Tensor:
        """Room for one block of channels, [batch, C, N]."""
        return like_BLD.new_empty(batch, self.block, self.points)

    def load(self, x_BCL: Tensor, slab_BCN: Tensor) -> Tensor:
        """Copy a block of channels to rows of N with zeros at the end; returns its part of the slab."""
        length, slab_BCN = x_BCL.shape[-1], slab_BCN[:, : x_BCL.shape[1]]
        if self.turned_NC is None or x_BCL.stride(-1) == 1:
            slab_BCN[..., :length] = x_BCL
            slab_BCN[..., length:] = 0
            return slab_BCN
        turned_NC = self.turned_NC[:, : x_BCL.shape[1]]
        for x_CL, slab_CN in zip(x_BCL, slab_BCN, strict=True):  # cache lines, then the library's transposition: 3-5x
            turned_NC[:length] = x_CL.t()
            turned_NC[length:] = 0
            slab_CN.copy_(turned_NC.t())
        return slab_BCN

    def spectrum(self, x_XN: Tensor) -> Tensor:
        """Real or complex coefficients to values at the roots, in this ring's own order."""
        if self.rows == 1:
            return torch.fft.fft(x_XN * self.twist)
        spectra = []
        for x_RS in x_XN.reshape(-1, self.rows, self.columns):
            x_RS = torch.fft.fft(torch.mul(x_RS, self.twist, out=_gapped(self.between_RS)), dim=0)
            x_SR = torch.mul(x_RS.t(), self.between_SR, out=_gapped(self.between_SR))
            spectra.append(torch.fft.fft(x_SR, dim=0).t())
        return _stack(spectra, x_XN.shape)

    def coefficients(self, value_XN: Tensor) -> Tensor:
        """What `spectrum` undoes: values at the roots to complex coefficients."""
        if self.rows == 1:
            return torch.fft.ifft(value_XN).mul_(self.untwist)
        found = []
        for value_RS in value_XN.reshape(-1, self.rows, self.columns):
            x_RS = torch.mul(torch.fft.ifft(value_RS), self.between_RS, out=_gapped(self.between_RS))
            found.append(torch.fft.ifft(x_RS, dim=0).mul_(self.untwist).contiguous())
        return _stack(found, value_XN.shape)


def _unit(turns: Tensor, dtype: torch.dtype) -> Tensor:
    """exp(2πi turns) as complex numbers of that real dtype, rounded once."""
    return torch.polar(torch.ones_like(turns), 2 * math.pi * turns).to(dtype.to_complex())


def _gapped(like_RS: Tensor) -> Tensor:
    return like_RS.new_empty(like_RS.shape[0], like_RS.shape[1] + _GAP)[:, : like_RS.shape[1]]


def _stack(rows: list[Tensor], shape: torch.Size) -> Tensor:
    return (rows[0] if len(rows) == 1 else torch.stack(rows)).view(shape)


def _kernel(ring: _Ring, after_CN: Tensor, later_CN: Tensor | None) -> Tensor:
    """Spectrum of κ; `later` holds before_1, before_2, ... from its start."""
    return ring.spectrum(after_CN if later_CN is None else torch.complex(after_CN, later_CN.flip(-1).neg_()))


def _empty_like(*inputs: Tensor | None) -> list[Tensor]:
    return [torch.empty_like(x, memory_format=torch.contiguous_format) for x in inputs if x is not None]


@library.custom_op("rna::long_conv", mutates_args=())
def _long_conv(u_BLD: Tensor, after_DL: Tensor, before_DL: Tensor | None, skip_D: Tensor) -> Tensor:
    if _short(u_BLD):
        return _channels_last(torch.mul(*_spectra(u_BLD, after_DL, before_DL, skip_D)), u_BLD.shape[1])
    ring, [y_BLD] = _Ring(u_BLD), _empty_like(u_BLD)
    slab_BCN, after_1CN = ring.slab(u_BLD, u_BLD.shape[0]), ring.slab(u_BLD)
    later_1CN = ring.slab(u_BLD)  # pages that are not touched take no memory
    for first in range(0, u_BLD.shape[2], ring.block):
        span = slice(first, first + ring.block)
        u_BCN = ring.load(u_BLD[..., span].transpose(1, 2), slab_BCN)
        after_CN = ring.load(after_DL[None, span], after_1CN)[0]
        later_CN = None if before_DL is None else ring.load(before_DL[None, span, 1:], later_1CN)[0]
        after_CN[:, 0] += skip_D[span]
        for i in range(0, u_BCN.shape[1], ring.part):
            part = slice(i, i + ring.part)
            product = ring.spectrum(u_BCN[:, part])
            product *= _kernel(ring, after_CN[part], None if later_CN is None else later_CN[part])
            u_BCN[:, part] = ring.coefficients(product).real
        y_BLD[..., span] = u_BCN[..., : u_BLD.shape[1]].transpose(1, 2)
    return y_BLD


@library.custom_op("rna::long_conv_backward", mutates_args=())
def _long_conv_backward(
    grad_BLD: Tensor, u_BLD: Tensor, after_DL: Tensor, before_DL: Tensor | None, skip_D: Tensor
) -> list[Tensor]:
    """Gradients of all inputs in their order; correlation is convolution with the conjugate spectrum."""
    if _short(u_BLD):
        spectra = _spectra(u_BLD, after_DL, before_DL, skip_D)
        return [x for x in _plain_backward(grad_BLD, *spectra, both=before_DL is not None) if x is not None]
    ring, length = _Ring(u_BLD), u_BLD.shape[1]
    grads = _empty_like(u_BLD, after_DL, before_DL, skip_D)
    slabs = [ring.slab(u_BLD, n) for n in (u_BLD.shape[0], u_BLD.shape[0], 1)]
    later_1CN = ring.slab(u_BLD)  # pages that are not touched take no memory
    for first in range(0, u_BLD.shape[2], ring.block):
        span = slice(first, first + ring.block)
        u_BCN = ring.load(u_BLD[..., span].transpose(1, 2), slabs[0])
        grad_BCN = ring.load(grad_BLD[..., span].transpose(1, 2), slabs[1])
        after_CN = ring.load(after_DL[None, span], slabs[2])[0]
        later_CN = None if before_DL is None else ring.load(before_DL[None, span, 1:], later_1CN)[0]
        after_CN[:, 0] += skip_D[span]
        for i in range(0, u_BCN.shape[1], ring.part):
            part = slice(i, i + ring.part)
            kernel = _kernel(ring, after_CN[part], None if later_CN is None else later_CN[part]).conj_physical_()
            grad = ring.spectrum(grad_BCN[:, part])
            u = ring.spectrum(u_BCN[:, part]).conj_physical_().mul_(grad)
            kappa_CN = ring.coefficients(u[0] if len(u) == 1 else u.sum(0))
            after_CN[part] = kappa_CN.real
            if later_CN is not None:
                later_CN[part] = kappa_CN.imag.flip(-1).neg_()
            grad_BCN[:, part] = ring.coefficients(grad.mul_(kernel)).real
        grads[0][..., span] = grad_BCN[..., :length].transpose(1, 2)
        grads[1][span] = after_CN[:, :length]
        grads[-1][span] = after_CN[:, 0]
        if later_CN is not None:
            grads[2][span, 0] = 0
            grads[2][span, 1:] = later_CN[:, : length - 1]
    return grads


@_long_conv.register_fake
def _(u_BLD: Tensor, after_DL: Tensor, before_DL: Tensor | None, skip_D: Tensor) -> Tensor:
    return _empty_like(u_BLD)[0]


@_long_conv_backward.register_fake
def _(grad_BLD: Tensor, u_BLD: Tensor, after_DL: Tensor, before_DL: Tensor | None, skip_D: Tensor) -> list[Tensor]:
    return _empty_like(u_BLD, after_DL, before_DL, skip_D)


def _save(ctx: Any, inputs: tuple[Tensor | None, ...], output: Tensor) -> None:
    ctx.save_for_backward(*inputs)


def _differentiate(ctx: Any, grad_BLD: Tensor) -> tuple[Tensor | None, ...]:
    inputs = ctx.saved_tensors
    grads = iter(_long_conv_backward(grad_BLD, *inputs))
    return tuple(None if x is None else next(grads) for x in inputs)


_long_conv.register_autograd(_differentiate, setup_context=_save)
