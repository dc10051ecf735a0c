"""The causal convolution against its definition, in both directions."""

import sys
from types import ModuleType

import pytest
import torch

from models.layers import kernels
from models.layers.causal_conv import causal_conv, causal_conv_ref


def arguments(length: int, *, width: int = 6, kernel: int = 4, dtype: torch.dtype = torch.float64):
    rng = torch.Generator().manual_seed(length)
    sizes = ((2, length, width), (width, kernel), (width,))
    return [torch.randn(*size, generator=rng, dtype=dtype).requires_grad_() for size in sizes]


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize(("length", "kernel"), [(1, 4), (2, 4), (3, 4), (9, 1), (9, 3), (30, 4)])
def test_outputs_and_all_gradients_equal_the_definition(length, kernel, reverse):
    args = arguments(length, kernel=kernel)
    found, expected = (run(*args, reverse=reverse) for run in (causal_conv, causal_conv_ref))
    torch.testing.assert_close(found, expected)
    grads = (torch.autograd.grad(y.square().sum(), args) for y in (found, expected))
    for found_grad, expected_grad in zip(*grads, strict=True):
        torch.testing.assert_close(found_grad, expected_grad)


def test_the_definition_is_the_sum_over_what_came_before():
    x_BLD, weight_DK, bias_D = arguments(9, kernel=3)
    by_hand = bias_D + weight_DK[:, 2] * x_BLD[:, 5] + weight_DK[:, 1] * x_BLD[:, 4] + weight_DK[:, 0] * x_BLD[:, 3]
    torch.testing.assert_close(causal_conv_ref(x_BLD, weight_DK, bias_D)[:, 5], by_hand)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_position_sees_itself_and_one_side(reverse):
    x_BLD, *rest = arguments(12)
    seen_BL = torch.autograd.grad(causal_conv(x_BLD, *rest, reverse=reverse)[:, 6].sum(), x_BLD)[0].abs().sum(-1) > 0
    expected = range(6, 10) if reverse else range(3, 7)
    assert seen_BL[0].nonzero().flatten().tolist() == list(expected)


@pytest.mark.parametrize(
    ("length", "width", "kernel", "dtype", "taken"),
    [
        (9, 16, 4, torch.float32, True),
        (9, 16, 2, torch.bfloat16, True),
        (9, 12, 4, torch.float32, False),  # rows that it would load beyond their end
        (9, 16, 5, torch.float32, False),
        (9, 16, 4, torch.float64, False),
        (1, 16, 4, torch.float32, False),  # "requires strides (dout.stride(0) and dout.stride(2)) to be multiples of 8"
    ],
)
@pytest.mark.parametrize("autocast", [False, True])
def test_the_package_gets_what_it_can_take_and_nothing_else(length, width, kernel, dtype, taken, autocast, monkeypatch):
    """A stand-in for causal-conv1d, as on a GPU that has it; nothing noticed when it was given everything."""
    seen = []

    def theirs(x, weight, bias):
        seen.append(x.dtype)
        return causal_conv_ref(x.transpose(1, 2), weight, bias).transpose(1, 2).to(x.dtype)

    package = ModuleType("causal_conv1d")
    package.causal_conv1d_fn = theirs
    monkeypatch.setitem(sys.modules, "causal_conv1d", package)
    monkeypatch.setattr(kernels, "path", lambda *_: "causal-conv1d")
    args = [x.detach() for x in arguments(length, width=width, kernel=kernel, dtype=dtype)]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        found = [causal_conv(*args, reverse=reverse) for reverse in (False, True)]
    assert seen == ([torch.bfloat16 if autocast else dtype] * 2 if taken else [])
    for y_BLD, reverse in zip(found, (False, True), strict=True):
        tolerance = 0.05 if torch.bfloat16 in (y_BLD.dtype, dtype) else 1e-5
        expected = causal_conv_ref(*args, reverse=reverse)
        torch.testing.assert_close(y_BLD.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
@pytest.mark.parametrize(("length", "width"), [(1, 8), (177, 64), (30, 12)])
def test_on_a_gpu_it_gives_the_same_in_every_type(dtype, length, width):
    args = [x.detach().cuda() for x in arguments(length, width=width, dtype=torch.float32)]
    with torch.autocast("cuda", dtype=torch.float16, enabled=dtype == torch.float16):
        for reverse in (False, True):
            found, expected = causal_conv(*args, reverse=reverse), causal_conv_ref(*args, reverse=reverse)
            assert found.dtype == dtype
            tolerance = 1e-2 if dtype == torch.float16 else 1e-5
            torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)
