"""The Fourier convolution against the sum itself."""

import pytest
import torch

from models.layers.long_conv import fft_conv, fft_conv_ref


def arguments(length: int, *, both: bool, dtype: torch.dtype):
    torch.manual_seed(length)
    u, after, before, skip = (
        torch.randn(*shape, dtype=dtype).requires_grad_() for shape in ((2, length, 3), (3, length), (3, length), (3,))
    )
    return [u, after, before if both else None, skip]


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("both", [False, True], ids=["causal", "both-sides"])
@pytest.mark.parametrize("length", [1, 2, 31, 64, 100])
def test_outputs_and_all_gradients_equal_the_sum(length: int, both: bool, dtype: torch.dtype, tolerance: float):
    args = arguments(length, both=both, dtype=dtype)
    found, expected = fft_conv(*args), fft_conv_ref(*args)
    assert found.dtype == dtype
    assert (found - expected).abs().max() < tolerance * expected.abs().max()
    weight = torch.randn(found.shape, dtype=dtype)
    inputs = [x for x in args if x is not None]
    grads = torch.autograd.grad(found, inputs, weight), torch.autograd.grad(expected, inputs, weight.double())
    for grad, wanted in zip(*grads, strict=True):
        assert (grad - wanted).abs().max() <= tolerance * wanted.abs().max()


def test_the_kernel_over_what_comes_after_is_not_used_at_lag_zero():
    u, after, before, skip = arguments(16, both=True, dtype=torch.float64)
    grad_DL = torch.autograd.grad(fft_conv(u, after, before, skip).sum(), before)[0]
    assert grad_DL[:, 0].abs().max() < 1e-12
    assert (grad_DL[:, 1:].abs() > 1e-6).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_input_is_convolved_in_float32(dtype: torch.dtype):
    u, after, before, skip = (x.detach() for x in arguments(200, both=True, dtype=torch.float32))
    u = (100 * u.abs()).to(dtype)  # its mean alone would overflow a half-precision transform
    with torch.autocast("cpu", dtype=dtype):
        found = fft_conv(u, after, before, skip)
    expected = fft_conv_ref(u, after, before, skip)
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()
