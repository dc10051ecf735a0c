"""Mamba layers against their definition, and the laws of two directions."""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.blocks import EncoderBlock
from models.layers.checkpointing import run_blocks
from models.layers.mamba import BidirectionalMamba, MambaDirection
from models.layers.selective_scan import selective_scan_ref


def direction() -> MambaDirection:
    torch.manual_seed(3)
    return MambaDirection(32, inner=12, state=6)


def real(batch: int, length: int) -> Tensor:
    return torch.ones(batch, length, dtype=torch.bool)


def by_definition(layer: MambaDirection, x_BLE: Tensor) -> Tensor:
    """Mamba-1's equations in float64, operation by operation."""
    weights = {name: p.double() for name, p in layer.named_parameters()}
    x_BEL = F.pad(x_BLE.double().transpose(1, 2), (3, 0))
    x_BEL = F.silu(F.conv1d(x_BEL, weights["conv.weight_D1K"], weights["conv.bias_D"], groups=x_BLE.shape[-1]))
    x_BLE = x_BEL.transpose(1, 2)
    low_BLR, B_BLN, C_BLN = (x_BLE @ weights["select.weight"].t()).split([2, 6, 6], dim=-1)
    delta_BLE = F.softplus(low_BLR @ weights["step.weight"].t() + weights["step.bias"])
    return selective_scan_ref(x_BLE, delta_BLE, -torch.exp(weights["A_log_EN"]), B_BLN, C_BLN, weights["D_E"])


def test_a_direction_equals_mamba_1_in_float64_with_all_gradients():
    layer = direction()
    x_BLE = torch.randn(3, 37, 12, requires_grad=True)
    found, expected = layer(x_BLE, real(3, 37), reverse=False), by_definition(layer, x_BLE)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    wanted = [x_BLE, *layer.parameters()]
    weight = torch.randn(3, 37, 12)
    for grad, other in zip(
        torch.autograd.grad(found, wanted, weight), torch.autograd.grad(expected, wanted, weight.double()), strict=True
    ):
        torch.testing.assert_close(grad, other, rtol=1e-5, atol=1e-4)


def test_the_reverse_direction_is_the_same_layer_on_the_reversed_sequence():
    layer, x_BLE = direction(), torch.randn(2, 20, 12)
    forwards = layer(x_BLE.flip(1), real(2, 20), reverse=False).flip(1)
    torch.testing.assert_close(layer(x_BLE, real(2, 20), reverse=True), forwards)


def test_a_direction_is_causal():
    layer, x_BLE = direction(), torch.randn(1, 20, 12)
    changed = x_BLE.clone()
    changed[:, 11] += 1
    before, after = (layer(x, real(1, 20), reverse=False) for x in (x_BLE, changed))
    assert torch.equal(before[:, :11], after[:, :11])
    assert (before[:, 11:] != after[:, 11:]).any(-1).all()


def test_tied_directions_turn_the_output_with_the_input_and_own_ones_do_not():
    x_BLD = torch.randn(2, 15, 8)
    for tied in (True, False):
        torch.manual_seed(0)
        layer = BidirectionalMamba(8, state=4, expand=2, tie_directions=tied)
        turned = layer(x_BLD.flip(1), real(2, 15)).flip(1)
        assert torch.allclose(layer(x_BLD, real(2, 15)), turned, atol=1e-5) == tied


def test_initial_values_are_those_of_mamba_1():
    layer = direction()
    step_E = F.softplus(layer.step.bias)
    assert layer.rank == math.ceil(32 / 16)
    assert ((step_E > 0.99e-3) & (step_E < 1.01e-1)).all()
    assert layer.step.weight.abs().max() <= layer.rank**-0.5
    torch.testing.assert_close(torch.exp(layer.A_log_EN), torch.arange(1.0, 7.0).expand(12, 6))
    assert (layer.D_E == 1).all()


def test_steps_and_decays_are_bounded_whatever_the_parameters_say():
    layer, x_BLE = direction(), torch.randn(1, 30, 12)
    with torch.no_grad():
        layer.step.bias.fill_(1e6)
        layer.A_log_EN.fill_(-100.0)
    found = layer(x_BLE, real(1, 30), reverse=False)
    found.sum().backward()
    assert found.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


class Perceptron(nn.Sequential):
    """What stood in the published RibonanzaMamba where its state space should be."""

    def forward(self, x_BLD: Tensor, mask_BL: Tensor, bias_BHLL: Tensor | None) -> Tensor:
        return super().forward(x_BLD)


def copy_accuracy(mixer: Callable[[], nn.Module], *, updates: int) -> float:
    """Share of right answers after training on selective copying: three letters among noise, asked for at the end."""
    torch.manual_seed(0)
    embedding, head = nn.Embedding(4, 32), nn.Linear(32, 2)
    blocks = nn.ModuleList(EncoderBlock(mixer(), width=32, kernel=0, expand=2, dropout=0.0) for _ in range(2))
    layers = nn.ModuleList([embedding, blocks, head])
    optimizer = torch.optim.AdamW(layers.parameters(), lr=4e-3)
    for update in range(updates + 1):
        answers_B3 = torch.randint(0, 2, (64, 3))
        tokens_BL = torch.zeros(64, 16, dtype=torch.long)  # noise
        places_B3 = torch.rand(64, 13).argsort(1)[:, :3].sort(1).values
        tokens_BL.scatter_(1, places_B3, answers_B3 + 1)
        tokens_BL[:, 13:] = 3  # the question
        logits_B32 = head(run_blocks(list(blocks), embedding(tokens_BL), real(64, 16), None, every=0))[:, 13:]
        if update == updates:
            break
        optimizer.zero_grad()
        F.cross_entropy(logits_B32.flatten(0, 1), answers_B3.flatten()).backward()
        optimizer.step()
    return float((logits_B32.argmax(-1) == answers_B3).float().mean())


def test_mamba_copies_selectively_and_a_perceptron_cannot():
    assert copy_accuracy(lambda: BidirectionalMamba(32, state=8, expand=2, tie_directions=False), updates=250) > 0.95
    assert copy_accuracy(lambda: Perceptron(nn.Linear(32, 64), nn.GELU(), nn.Linear(64, 32)), updates=250) < 0.65
