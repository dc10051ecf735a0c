"""Masks and dropout: the laws of small parts."""

from functools import partial

import pytest
import torch

from models.layers.checkpointing import run_blocks
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


def test_the_mean_of_no_position_is_zero_and_has_no_gradient():
    """0 / 0: one row of padding alone made distances NaN in drsn, and with them every gradient of the batch."""
    x_BLD = torch.ones(2, 3, 1, requires_grad=True)
    mean_BD = masked_mean(x_BLD, torch.tensor([[True, False, True], [False] * 3]))
    mean_BD.sum().backward()
    assert mean_BD.flatten().tolist() == [1.0, 0.0]
    assert x_BLD.grad is not None
    assert x_BLD.grad.flatten().tolist() == [0.5, 0.0, 0.5, 0.0, 0.0, 0.0]


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


@pytest.mark.parametrize(("every", "runs"), [(0, 1), (1, 2), (2, 2), (5, 2)])
def test_gradient_checkpointing_runs_each_block_again(every: int, runs: int):
    """Nothing noticed when `run_blocks` kept all activations whatever it was asked: equal gradients are no proof."""
    blocks, run = [torch.nn.Linear(4, 4) for _ in range(3)], []
    for block in blocks:
        block.register_forward_pre_hook(lambda block, _: run.append(block))
    run_blocks(blocks, torch.randn(2, 4), every=every).sum().backward()
    assert [run.count(block) for block in blocks] == [runs] * 3


@pytest.mark.parametrize("every", [0, 1])
def test_dropout_compiles_whole_and_drops_the_same(every: int):
    """Each dropout on the CPU broke a compiled training step: "Unsupported: Tensor.random_ op"."""
    blocks, weight = [torch.nn.Linear(8, 8), Dropout(0.3), torch.nn.Linear(8, 8), Dropout(0.3)], torch.randn(4, 8)
    x, grads = torch.randn(4, 8, requires_grad=True), []
    for wrap in (lambda run: run, partial(torch.compile, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(0)
        found = wrap(lambda x: run_blocks(blocks, x, every=every))(x)
        grads.append(torch.autograd.grad(found, x, weight)[0])
    assert torch.equal(*grads)


def test_nearly_everything_can_be_dropped():
    """A share that rounds to 1 ended in "ZeroDivisionError: division by zero"."""
    assert Dropout(0.999999)(torch.ones(1000)).isfinite().all()


@pytest.mark.parametrize("share", [-0.1, 1.0])
def test_a_share_that_is_none_is_refused(share: float):
    with pytest.raises(ValueError, match="dropout"):
        Dropout(share)
