"""Separable convolutions and their options."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from models.layers.sepconv import DepthwiseConv, MultiKernelConv, SeparableConv, SqueezeExcitation, conv1d


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
@pytest.mark.parametrize(("groups", "dilation"), [(1, 1), (6, 1), (1, 3), (6, 2)])
def test_conv1d_equals_torch_with_all_gradients(groups: int, dilation: int, device: str):
    torch.manual_seed(0)
    x_BLD, weight, bias = torch.randn(2, 11, 6), torch.randn(6, 6 // groups, 5), torch.randn(6)
    args = [t.requires_grad_() for t in (x_BLD, weight, bias)]
    found = conv1d(*(t.to(device) for t in args), padding=4, dilation=dilation).cpu()
    expected = F.conv1d(x_BLD.transpose(1, 2), weight, bias, padding=4, dilation=dilation, groups=groups).transpose(
        1, 2
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for grad, wanted in zip(
        torch.autograd.grad(found.square().sum(), args), torch.autograd.grad(expected.square().sum(), args), strict=True
    ):
        torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("glu", [False, True])
@pytest.mark.parametrize("multi_kernel", [False, True])
@pytest.mark.parametrize("squeeze", [False, True])
def test_a_separable_convolution_has_kernel_and_channel_weights_apart(glu: bool, multi_kernel: bool, squeeze: bool):
    width, kernel = 12, 7
    depthwise = sum(k * width + width for k in ((3, 5, 7) if multi_kernel else (kernel,)))
    pointwise = (width * width + width) * (2 if glu else 1)
    gate = (width * 3 + 3) + (3 * width + width) if squeeze else 0
    module = SeparableConv(width, kernel=kernel, glu=glu, multi_kernel=multi_kernel, squeeze=squeeze)
    assert sum(p.numel() for p in module.parameters()) == depthwise + pointwise + gate


def test_without_gate_and_biases_it_is_k_c_plus_c_c_weights():
    module = SeparableConv(12, kernel=7, glu=False)
    assert sum(p.numel() for name, p in module.named_parameters() if "bias" not in name) == 7 * 12 + 12 * 12


def test_three_kernels_run_as_one_and_are_their_mean():
    torch.manual_seed(0)
    layer, x_BLD = MultiKernelConv(6, kernel=7), torch.randn(2, 15, 6)
    assert [branch.kernel for branch in layer.branches] == [3, 5, 7]
    expected = torch.stack([branch(x_BLD) for branch in layer.branches]).mean(0)
    torch.testing.assert_close(layer(x_BLD), expected, rtol=1e-5, atol=1e-6)
    layer(x_BLD).square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in layer.parameters())


def test_a_kernel_too_small_for_three_is_refused():
    with pytest.raises(ValueError, match="multi_kernel: got kernel 3"):
        SeparableConv(4, kernel=3, multi_kernel=True)


OPTIONS = [dict(zip(("multi_kernel", "glu", "squeeze"), on, strict=True)) for on in itertools.product([0, 1], repeat=3)]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_padding_does_not_reach_a_separable_convolution(options: dict):
    torch.manual_seed(0)
    layer, x_BLD = SeparableConv(8, kernel=5, **options), torch.randn(1, 11, 8)
    mask_BL = torch.ones(1, 11, dtype=torch.bool)
    padded = layer(F.pad(x_BLD, (0, 0, 0, 20), value=torch.inf), F.pad(mask_BL, (0, 20)))
    torch.testing.assert_close(padded[:, :11], layer(x_BLD, mask_BL), rtol=1e-5, atol=1e-6)


def test_squeeze_scales_whole_channels_by_a_gate_below_one():
    torch.manual_seed(0)
    x_BLD, mask_BL = torch.randn(2, 9, 8), torch.ones(2, 9, dtype=torch.bool)
    gate_BLD = SqueezeExcitation(8)(x_BLD, mask_BL) / x_BLD
    torch.testing.assert_close(gate_BLD, gate_BLD[:, :1].expand_as(gate_BLD), rtol=1e-4, atol=1e-5)
    assert ((gate_BLD > 0) & (gate_BLD < 1)).all()


def test_squeeze_survives_sums_that_half_precision_cannot_hold():
    layer, x_BLD = SqueezeExcitation(4), torch.full((1, 4000, 4), 60.0)
    with torch.autocast("cpu", dtype=torch.float16):
        found = layer(x_BLD.half(), torch.ones(1, 4000, dtype=torch.bool))
    assert found.isfinite().all()
    assert found.dtype == torch.float16


@pytest.mark.parametrize(("reverse", "seen"), [(False, range(5, 9)), (True, range(8, 12))])
def test_a_causal_convolution_sees_one_side(reverse: bool, seen: range):
    layer, x_BLD = DepthwiseConv(2, kernel=4, causal=True), torch.randn(1, 20, 2, requires_grad=True)
    found = layer(x_BLD, reverse=reverse)
    assert found.shape == x_BLD.shape
    grad = torch.autograd.grad(found[0, 8].sum(), x_BLD)[0]
    assert grad[0].abs().sum(-1).nonzero().flatten().tolist() == list(seen)


def test_an_even_kernel_is_refused_where_it_would_shift():
    with pytest.raises(ValueError, match="got kernel 4"):
        DepthwiseConv(3, kernel=4)
