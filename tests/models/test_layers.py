"""Masks and dropout: the laws of small parts."""

import pytest
import torch

from models.layers.dropout import Dropout
from models.layers.masked import masked_mean, zero_pads


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
