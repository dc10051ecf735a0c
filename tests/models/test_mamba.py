"""Both versions of Mamba against their definition, and the laws of two directions."""

import math
from collections.abc import Callable
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers import mamba
from models.layers.blocks import EncoderBlock
from models.layers.checkpointing import run_blocks
from models.layers.mamba import BidirectionalMamba, Mamba2Direction, MambaDirection

VERSIONS = pytest.mark.parametrize("version", [1, 2])
HALF = pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)


def block(version: int, *, tied: bool = False, width: int = 16, head_width: int = 8) -> BidirectionalMamba:
    torch.manual_seed(3)
    return BidirectionalMamba(width, state=6, expand=2, tie_directions=tied, version=version, head_width=head_width)


def real(batch: int, length: int) -> Tensor:
    return torch.ones(batch, length, dtype=torch.bool)


def relative(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected number."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).abs().max() / expected.abs().max())


def by_definition(layer: BidirectionalMamba, x_LD: Tensor) -> Tensor:
    """The block on one sequence without padding, position by position in float64, written from the papers."""
    weights = {name: p.double() for name, p in layer.named_parameters()}
    inner = weights["out.weight"].shape[1]
    projected = x_LD.double() @ weights["into.weight"].t()
    x_LE, gate_LE = projected[:, :inner], projected[:, inner : 2 * inner]
    scan = scan_1_by_definition if "directions.0.select.weight" in weights else scan_2_by_definition
    own = projected[:, 2 * inner :].chunk(len(layer.directions), dim=-1)  # B, C and step of version 2
    y_LE = torch.zeros_like(x_LE)
    for index, turned in ((0, False), (len(layer.directions) - 1, True)):
        prefix = f"directions.{index}."
        parameters = {name.removeprefix(prefix): w for name, w in weights.items() if name.startswith(prefix)}
        signal = torch.cat([x_LE, own[index]], dim=-1)
        y_LE = y_LE + (scan(parameters, signal.flip(0), inner).flip(0) if turned else scan(parameters, signal, inner))
    gated = y_LE / 2 * gate_LE * torch.sigmoid(gate_LE)
    centred = gated - gated.mean(-1, keepdim=True)
    normed = centred / (centred.square().mean(-1, keepdim=True) + 1e-5).sqrt()
    return (normed * weights["norm.weight"] + weights["norm.bias"]) @ weights["out.weight"].t()


def convolved(weights: dict[str, Tensor], x_LF: Tensor) -> Tensor:
    """SiLU of a convolution over a position and the three before it."""
    rows = []
    for t in range(len(x_LF)):
        row = weights["conv.bias_D"]
        for k in range(max(0, 3 - t), 4):
            row = row + weights["conv.weight_D1K"][:, 0, k] * x_LF[t - 3 + k]
        rows.append(row * torch.sigmoid(row))
    return torch.stack(rows)


def scan_1_by_definition(weights: dict[str, Tensor], x_LE: Tensor, inner: int) -> Tensor:
    A_EN, rank = -weights["A_log_EN"].exp(), weights["step.weight"].shape[1]
    h_EN, rows = torch.zeros_like(A_EN), []
    for x_E in convolved(weights, x_LE):
        low_R, B_N, C_N = (weights["select.weight"] @ x_E).split([rank, A_EN.shape[1], A_EN.shape[1]])
        delta_E1 = torch.log1p((weights["step.weight"] @ low_R + weights["step.bias"]).exp()).unsqueeze(1)
        h_EN = (delta_E1 * A_EN).exp() * h_EN + delta_E1 * B_N * x_E.unsqueeze(1)
        rows.append(h_EN @ C_N + weights["D_E"] * x_E)
    return torch.stack(rows)


def scan_2_by_definition(weights: dict[str, Tensor], signal_LF: Tensor, inner: int) -> Tensor:
    A_H, state = -weights["A_log_H"].exp(), (weights["conv.bias_D"].shape[0] - inner) // 2
    mixed_LF = convolved(weights, signal_LF[:, : inner + 2 * state])
    h_HPN, rows = signal_LF.new_zeros(len(A_H), inner // len(A_H), state), []
    for mixed_F, step_H in zip(mixed_LF, signal_LF[:, inner + 2 * state :], strict=True):
        x_E, B_N, C_N = mixed_F.split([inner, state, state])
        x_HP = x_E.view(len(A_H), -1)
        delta_H = torch.log1p((step_H + weights["step_bias_H"]).exp())
        h_HPN = (delta_H * A_H).exp().view(-1, 1, 1) * h_HPN + delta_H.view(-1, 1, 1) * x_HP.unsqueeze(2) * B_N
        rows.append((h_HPN @ C_N + weights["D_H"].unsqueeze(1) * x_HP).flatten())
    return torch.stack(rows)


@VERSIONS
@pytest.mark.parametrize("tied", [False, True])
def test_a_ragged_batch_equals_the_definition_with_all_gradients(version: int, tied: bool):
    layer, lengths = block(version, tied=tied), (67, 40, 1)  # neither is a multiple of a chunk
    x_BLD = torch.randn(3, 71, 16, requires_grad=True)
    mask_BL = torch.arange(71) < torch.tensor(lengths).unsqueeze(1)
    weight_BLD = torch.randn(3, 71, 16) * mask_BL.unsqueeze(-1)
    wanted = [x_BLD, *layer.parameters()]
    found = layer(x_BLD, mask_BL)
    expected = [by_definition(layer, x_LD[:n]) for x_LD, n in zip(x_BLD, lengths, strict=True)]
    for y_LD, other_LD in zip(found, expected, strict=True):
        assert relative(y_LD[: len(other_LD)], other_LD) < 1e-5
    loss = sum((y_LD * weight_LD[: len(y_LD)]).sum() for y_LD, weight_LD in zip(expected, weight_BLD, strict=True))
    grads = torch.autograd.grad(found, wanted, weight_BLD)
    for grad, other, name in zip(
        grads, torch.autograd.grad(loss, wanted), ["x", *dict(layer.named_parameters())], strict=True
    ):
        assert relative(grad, other) < 1e-5, name


def causal(version: int) -> tuple[nn.Module, Callable[..., Tensor], int]:
    """One direction, a call of it with one input, and that input's width."""
    torch.manual_seed(3)
    if version == 1:
        first = MambaDirection(32, inner=16, state=6)
        return first, first, 16
    second = Mamba2Direction(16, state=6, head_width=8)
    return second, lambda x, mask, reverse: second(x[..., :16], x[..., 16:], mask, reverse=reverse), 16 + 12 + 2


@VERSIONS
def test_the_reverse_direction_is_the_same_layer_on_the_reversed_sequence(version: int):
    _, layer, width = causal(version)
    x_BLF = torch.randn(2, 20, width)
    forwards = layer(x_BLF.flip(1), real(2, 20), reverse=False).flip(1)
    torch.testing.assert_close(layer(x_BLF, real(2, 20), reverse=True), forwards)


def influence(function: Callable[[Tensor], Tensor], x_BLF: Tensor) -> Tensor:
    """[L, L]: whether output position i depends on input position j."""
    jacobian = torch.autograd.functional.jacobian(lambda x: function(x)[0].sum(-1), x_BLF)
    return jacobian[:, 0].abs().sum(-1) > 0


@VERSIONS
def test_a_directions_influence_is_triangular_and_that_of_both_is_full(version: int):
    _, layer, width = causal(version)
    x_BLF, every = torch.randn(1, 14, width), torch.ones(14, 14, dtype=torch.bool)
    assert torch.equal(influence(lambda x: layer(x, real(1, 14), reverse=False), x_BLF), every.tril())
    assert torch.equal(influence(lambda x: layer(x, real(1, 14), reverse=True), x_BLF), every.triu())
    both = block(version)
    assert torch.equal(influence(lambda x: both(x, real(1, 14)), torch.randn(1, 14, 16)), every)


@VERSIONS
def test_tied_directions_turn_the_output_with_the_input_and_own_ones_do_not(version: int):
    x_BLD = torch.randn(2, 15, 16)
    for tied in (True, False):
        layer = block(version, tied=tied)
        turned = layer(x_BLD.flip(1), real(2, 15)).flip(1)
        assert torch.allclose(layer(x_BLD, real(2, 15)), turned, atol=1e-5) == tied


def test_initial_values_are_those_of_mamba_1():
    torch.manual_seed(3)
    layer = MambaDirection(32, inner=12, state=6)
    step_E = F.softplus(layer.step.bias)
    assert layer.rank == math.ceil(32 / 16)
    assert ((step_E > 0.99e-3) & (step_E < 1.01e-1)).all()
    assert layer.step.weight.abs().max() <= layer.rank**-0.5
    torch.testing.assert_close(torch.exp(layer.A_log_EN), torch.arange(1.0, 7.0).expand(12, 6))
    assert (layer.D_E == 1).all()


def test_initial_values_are_those_of_mamba_2():
    torch.manual_seed(3)
    layer = Mamba2Direction(800, state=6, head_width=4)
    step_H, decay_H = F.softplus(layer.step_bias_H), layer.A_log_H.exp()
    assert ((step_H > 0.99e-3) & (step_H < 1.01e-1)).all()
    assert ((decay_H >= 1) & (decay_H <= 16)).all()
    assert 7.5 < decay_H.mean() < 9.5  # uniform, not log-uniform
    assert (layer.D_H == 1).all()


def test_weights_of_version_1_keep_their_names():
    own = ("conv.weight_D1K", "conv.bias_D", "select.weight", "step.weight", "step.bias", "A_log_EN", "D_E")
    names = {
        "into.weight",
        "norm.weight",
        "norm.bias",
        "out.weight",
        *(f"directions.{i}.{n}" for i in (0, 1) for n in own),
    }
    assert set(block(1).state_dict()) == names


@VERSIONS
@pytest.mark.parametrize(("bias", "log"), [(1e6, -100.0), (1e6, 50.0), (-1e6, -100.0)])
def test_steps_and_decays_are_bounded_whatever_the_parameters_say(
    version: int, bias: float, log: float, monkeypatch: pytest.MonkeyPatch
):
    seen: list[tuple[Tensor, ...]] = []

    def watched(scan: Callable[..., Tensor], *args: Tensor, reverse: bool) -> Tensor:
        seen.append(args)
        return scan(*args, reverse=reverse)

    for name in ("selective_scan", "ssd"):
        monkeypatch.setattr(mamba, name, partial(watched, getattr(mamba, name)))
    layer, call, width = causal(version)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            if name in ("step.bias", "step_bias_H"):
                parameter.fill_(bias)
            if name.startswith("A_log"):
                parameter.fill_(log)
    found = call(torch.randn(1, 30, width), real(1, 30), reverse=False)
    found.sum().backward()
    ((_, delta, A, *_),) = seen
    assert delta.min() >= 0
    assert delta.max() <= 10
    assert A.max() <= -0.99e-4
    assert found.isfinite().all()
    assert all(p.grad is None or p.grad.isfinite().all() for p in layer.parameters())


@VERSIONS
@HALF
def test_autocast_stays_near_float32_and_finite(version: int, dtype: torch.dtype):
    layer, x_BLD = block(version), torch.randn(2, 70, 16)
    expected = layer(x_BLD, real(2, 70))
    expected_grads = torch.autograd.grad(expected.square().mean(), list(layer.parameters()))
    with torch.autocast("cpu", dtype=dtype):
        found = layer(x_BLD, real(2, 70))
        huge = layer(100 * x_BLD, real(2, 70))
    grads = torch.autograd.grad(found.float().square().mean(), list(layer.parameters()))
    near = 16 * torch.finfo(dtype).eps
    assert found.dtype == dtype
    assert relative(found, expected) < near
    assert max(relative(g, e) for g, e in zip(grads, expected_grads, strict=True)) < near
    assert huge.isfinite().all()


@VERSIONS
def test_gradient_checkpointing_changes_no_gradient(version: int):
    blocks = nn.ModuleList(EncoderBlock(block(version), width=16, kernel=0, expand=2, dropout=0.2) for _ in range(2))
    x_BLD, grads = torch.randn(2, 30, 16, requires_grad=True), []
    for every in (0, 1):
        torch.manual_seed(5)
        y_BLD = run_blocks(list(blocks), x_BLD, real(2, 30), None, every=every)
        grads.append(torch.autograd.grad(y_BLD.square().sum(), [x_BLD, *blocks.parameters()]))
    for kept, recomputed in zip(*grads, strict=True):
        assert torch.equal(kept, recomputed)


@pytest.mark.parametrize(("width", "better"), [(40, 64), (80, 96), (1, 32)])
def test_widths_that_do_not_divide_into_heads_are_refused_with_the_next_that_does(width: int, better: int):
    with pytest.raises(ValueError, match=f"Next: width {better},"):
        BidirectionalMamba(width, state=4, expand=2, tie_directions=True, version=2)
    BidirectionalMamba(better, state=4, expand=2, tie_directions=True, version=2)


def test_other_versions_are_refused():
    with pytest.raises(ValueError, match="got version 3; expected 1 or 2"):
        block(3)


class Perceptron(nn.Sequential):
    """What stood in the published RibonanzaMamba where its state space should be."""

    def __init__(self, hidden: int) -> None:
        super().__init__(nn.Linear(32, hidden), nn.GELU(), nn.Linear(hidden, 32))

    def forward(self, x_BLD: Tensor, mask_BL: Tensor, bias_BHLL: Tensor | None) -> Tensor:
        return super().forward(x_BLD)


def copy_accuracy(mixer: Callable[[], nn.Module], *, updates: int) -> float:
    """Share of right answers after training on selective copying: three letters among noise, asked for at the end."""
    torch.manual_seed(0)
    embedding, head = nn.Embedding(4, 32), nn.Linear(32, 2)
    blocks = nn.ModuleList(EncoderBlock(mixer(), width=32, kernel=0, expand=2, dropout=0.0) for _ in range(2))
    layers = nn.ModuleList([embedding, blocks, head])
    optimizer = torch.optim.AdamW(layers.parameters(), lr=4e-3)

    def answered(batch: int) -> tuple[Tensor, Tensor]:
        answers_B3 = torch.randint(0, 2, (batch, 3))
        tokens_BL = torch.zeros(batch, 16, dtype=torch.long)  # noise
        places_B3 = torch.rand(batch, 13).argsort(1)[:, :3].sort(1).values
        tokens_BL.scatter_(1, places_B3, answers_B3 + 1)
        tokens_BL[:, 13:] = 3  # the question
        y_BLD = run_blocks(list(blocks), embedding(tokens_BL), real(batch, 16), None, every=0)
        return head(y_BLD)[:, 13:], answers_B3

    for _ in range(updates):
        logits_B32, answers_B3 = answered(32)
        optimizer.zero_grad()
        F.cross_entropy(logits_B32.flatten(0, 1), answers_B3.flatten()).backward()
        optimizer.step()
    with torch.no_grad():
        logits_B32, answers_B3 = answered(1000)
    return float((logits_B32.argmax(-1) == answers_B3).float().mean())


def copier(version: int) -> BidirectionalMamba:
    return BidirectionalMamba(32, state=8, expand=2, tie_directions=False, version=version, head_width=16)


@VERSIONS
def test_mamba_copies_selectively(version: int):
    assert copy_accuracy(lambda: copier(version), updates=200) > 0.95


def test_a_perceptron_of_the_same_size_cannot_copy_selectively():
    sizes = [sum(p.numel() for p in layer.parameters()) for layer in (copier(1), copier(2), Perceptron(168))]
    assert max(sizes) == sizes[2] < 1.05 * sizes[0]
    assert copy_accuracy(lambda: Perceptron(168), updates=200) < 0.6
