"""Convolutions, masks, dropout, thresholds and heads: the laws of small parts."""

import itertools

import pytest
import torch
import torch.nn.functional as F

from models.drsn import Shrinkage
from models.heads import PackedGru, ValuesHead, distance_bins
from models.layers.dropout import Dropout
from models.layers.masked import masked_mean, zero_pads
from models.layers.sepconv import DepthwiseConv, SeparableConv, conv1d


@pytest.mark.parametrize(("groups", "dilation"), [(1, 1), (6, 1), (1, 3), (6, 2)])
def test_conv1d_equals_torch_with_all_gradients(groups: int, dilation: int):
    torch.manual_seed(0)
    x_BLD, weight, bias = torch.randn(2, 11, 6), torch.randn(6, 6 // groups, 5), torch.randn(6)
    args = [t.requires_grad_() for t in (x_BLD, weight, bias)]
    found = conv1d(*args, padding=4, dilation=dilation)
    expected = F.conv1d(x_BLD.transpose(1, 2), weight, bias, padding=4, dilation=dilation, groups=groups).transpose(
        1, 2
    )
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    for grad, wanted in zip(
        torch.autograd.grad(found.square().sum(), args), torch.autograd.grad(expected.square().sum(), args), strict=True
    ):
        torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-4)


def test_a_separable_convolution_has_kernel_and_channel_weights_apart():
    width, kernel = 12, 7
    expected = (kernel * width + width) + (2 * width * width + 2 * width)
    assert sum(p.numel() for p in SeparableConv(width, kernel=kernel).parameters()) == expected


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


def test_pads_are_zeroed_even_if_they_are_not_finite():
    x_BLD = torch.tensor([[[1.0], [torch.nan], [torch.inf]]], requires_grad=True)
    mask_BL = torch.tensor([[True, False, False]])
    zeroed = zero_pads(x_BLD, mask_BL)
    zeroed.sum().backward()
    assert zeroed.flatten().tolist() == [1.0, 0.0, 0.0]
    assert x_BLD.grad is not None
    assert x_BLD.grad.flatten().tolist() == [1.0, 0.0, 0.0]
    assert masked_mean(x_BLD, mask_BL).item() == 1.0


def test_dropout_keeps_the_mean_and_drops_its_share():
    torch.manual_seed(0)
    layer, x = Dropout(0.3), torch.ones(300, 1001, requires_grad=True)
    dropped = layer(x)
    dropped.sum().backward()
    assert (dropped == 0).float().mean().item() == pytest.approx(0.3, abs=0.005)
    assert dropped.mean().item() == pytest.approx(1.0, abs=0.01)
    assert dropped.unique().numel() == 2
    assert torch.equal(x.grad, dropped)
    assert torch.equal(layer.eval()(x), x)


def test_dropout_follows_torchs_seed():
    layer, x = Dropout(0.5), torch.ones(1000)
    masks = []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        masks.append(layer(x))
    assert torch.equal(masks[0], masks[1])
    assert not torch.equal(masks[0], masks[2])


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_share_that_is_none_is_refused(share: float):
    with pytest.raises(ValueError, match="dropout"):
        Dropout(share)


@pytest.mark.parametrize("shrink", ["channel", "shared"])
def test_shrinkage_is_soft_thresholding_below_the_mean_magnitude(shrink: str):
    torch.manual_seed(0)
    layer, x_BLD = Shrinkage(8, shrink=shrink), torch.randn(3, 30, 8)
    mask_BL = torch.ones(3, 30, dtype=torch.bool)
    tau = layer.threshold(x_BLD, mask_BL)
    mean = x_BLD.abs().mean(1, keepdim=True)
    assert tau.shape == (3, 1, 8 if shrink == "channel" else 1)
    assert (tau >= 0).all()
    assert (tau < (mean if shrink == "channel" else mean.mean(-1, keepdim=True))).all()
    expected = x_BLD.sign() * (x_BLD.abs() - tau).clamp(min=0)
    torch.testing.assert_close(layer(x_BLD, mask_BL), expected)
    assert (expected == 0).any()


def test_thresholds_do_not_move_when_padding_doubles_the_length():
    torch.manual_seed(0)
    layer, x_BLD = Shrinkage(8, shrink="channel"), torch.randn(2, 20, 8)
    mask_BL = torch.ones(2, 20, dtype=torch.bool)
    padded, padded_mask = F.pad(x_BLD, (0, 0, 0, 20), value=5.0), F.pad(mask_BL, (0, 20))
    torch.testing.assert_close(layer.threshold(padded, padded_mask), layer.threshold(x_BLD, mask_BL))


def test_distance_bins_are_equal_between_four_and_sixty_and_open_beyond():
    edges, centres = distance_bins(30)
    assert (len(edges), len(centres)) == (29, 30)
    assert (edges[0], edges[-1]) == (4.0, 60.0)
    steps = [b - a for a, b in itertools.pairwise(centres)]
    assert steps == pytest.approx([2.0] * 29)
    assert all(low < c < high for (low, high), c in zip(itertools.pairwise(edges), centres[1:-1], strict=True))


def test_fewer_than_three_distance_bins_are_refused():
    with pytest.raises(ValueError, match="distance_bins: got 2"):
        distance_bins(2)


def test_a_gru_needs_an_even_width():
    with pytest.raises(ValueError, match="even"):
        PackedGru(7)


def test_values_under_the_padding_are_zero():
    mask_BL = torch.tensor([[True, True, False]])
    values_BLC = ValuesHead(4, num_channels=2)(torch.randn(1, 3, 4), mask_BL)
    assert (values_BLC[0, 2] == 0).all()
    assert (values_BLC[0, :2] != 0).all()
