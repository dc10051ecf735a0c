"""Soft thresholds over positions and over pairs, and the network made of them."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.drsn import ShrinkageBlock
from models.layers.shrinkage import Shrinkage
from models.registry import create_model
from tests.models.cases import SMALL, batch, outputs

SIZES = {"positions": (30,), "pairs": (12, 12)}
every_shrinkage = pytest.mark.parametrize(
    ("shrink", "size"), [(shrink, size) for shrink in ("channel", "shared") for size in SIZES.values()], ids=str
)


def layer_and_input(shrink: str, size: tuple[int, ...]) -> tuple[Shrinkage, Tensor, Tensor]:
    torch.manual_seed(0)
    layer = Shrinkage(8, shrink=shrink)
    return layer, torch.randn(3, *size, 8) * torch.rand(3, *[1] * len(size), 8), torch.ones(3, *size, dtype=torch.bool)


def spread(threshold_BD: Tensor, size: tuple[int, ...]) -> Tensor:
    return threshold_BD.view(3, *[1] * len(size), -1)


@every_shrinkage
def test_shrinkage_is_soft_thresholding(shrink: str, size: tuple[int, ...]):
    layer, x, mask = layer_and_input(shrink, size)
    tau = spread(layer.threshold(x, mask), size)
    found = layer(x, mask)
    torch.testing.assert_close(found, x.sign() * (x.abs() - tau).clamp(min=0))
    assert (found.abs() <= x.abs()).all()
    assert (found * x >= 0).all()
    assert (found[x.abs() <= tau] == 0).all()
    assert (found == 0).any()
    assert (found != 0).any()


@every_shrinkage
@pytest.mark.parametrize("gain", [1.0, 1e4], ids=["as-built", "saturated"])
def test_a_threshold_lies_between_zero_and_the_mean_magnitude(shrink: str, size: tuple[int, ...], gain: float):
    layer, x, mask = layer_and_input(shrink, size)
    with torch.no_grad():
        layer.level[-1].weight.mul_(gain)
    tau_BD, mean_BD = layer.threshold(x, mask), x.abs().flatten(1, -2).mean(1)
    assert tau_BD.shape == (3, 8 if shrink == "channel" else 1)
    assert (tau_BD >= 0).all()
    assert (tau_BD < (mean_BD if shrink == "channel" else mean_BD.mean(-1, keepdim=True))).all()
    assert (layer(x, mask).flatten(1, -2) != 0).any(1).all() or shrink == "shared"


def test_a_shared_threshold_is_one_number_a_sequence_and_others_differ_by_channel():
    for shrink, distinct in (("shared", 1), ("channel", 8)):
        layer, x, mask = layer_and_input(shrink, (30,))
        assert [len(row.unique()) for row in layer.threshold(x, mask)] == [distinct] * 3


@every_shrinkage
def test_at_a_fixed_gate_shrinkage_scales_with_its_input(shrink: str, size: tuple[int, ...]):
    layer, x, mask = layer_and_input(shrink, size)
    with torch.no_grad():
        layer.level[-1].weight.zero_()
    for scale in (0.125, 8.0, -4.0):
        torch.testing.assert_close(layer(scale * x, mask), scale * layer(x, mask), rtol=1e-5, atol=1e-6)


@every_shrinkage
def test_gradients_flow_through_the_input_and_through_the_threshold(shrink: str, size: tuple[int, ...]):
    layer, x, mask = layer_and_input(shrink, size)
    x.requires_grad_()
    found = layer(x, mask)
    found.square().sum().backward()
    assert all(p.grad is not None and p.grad.abs().max() > 0 for p in layer.parameters())
    # what is thresholded away still moves the threshold, through the mean magnitude
    assert x.grad is not None
    assert (x.grad[found == 0] != 0).all()


@pytest.mark.parametrize("shrink", ["channel", "shared"])
def test_padding_moves_no_threshold(shrink: str):
    layer, x, mask = layer_and_input(shrink, (20,))
    padded, padded_mask = F.pad(x, (0, 0, 0, 20), value=torch.inf), F.pad(mask, (0, 20))
    torch.testing.assert_close(layer.threshold(padded, padded_mask), layer.threshold(x, mask))
    layer, x, mask = layer_and_input(shrink, (9, 9))
    padded, padded_mask = F.pad(x, (0, 0, 0, 5, 0, 5), value=5.0), F.pad(mask, (0, 5, 0, 5))
    torch.testing.assert_close(layer.threshold(padded, padded_mask), layer.threshold(x, mask))


def test_dilation_doubles_from_block_to_block_and_starts_again():
    """Nothing noticed when every block had dilation 1."""
    model, impulse = create_model("drsn", width=4, depth=4, kernel=3, dilations=3), torch.zeros(1, 21, 4)
    impulse[:, 10] = 1
    for index, distance in enumerate([1, 2, 4, 1]):
        for conv in model.get_submodule(f"blocks.{index}.convs").children():
            felt_L = (conv(impulse) - conv(0 * impulse)).abs().amax((0, 2))
            assert felt_L.nonzero().flatten().tolist() == [10 - distance, 10, 10 + distance]


def test_a_block_is_norm_relu_and_convolution_twice_then_shrinkage_and_the_input():
    """Nothing noticed when the ReLU was left out."""
    torch.manual_seed(0)
    block, x_BLD = ShrinkageBlock(8, kernel=3, dilation=2, shrink="channel", dropout=0.3).eval(), torch.randn(2, 11, 8)
    mask_BL, y_BLD = torch.ones(2, 11, dtype=torch.bool), x_BLD
    for norm, conv in zip(block.norms, block.convs, strict=True):
        y_BLD = conv(norm(y_BLD).clamp(min=0))
    torch.testing.assert_close(block(x_BLD, mask_BL), x_BLD + block.shrinkage(y_BLD, mask_BL))


def test_without_shrinkage_a_block_is_a_residual_one_of_fewer_parameters():
    torch.manual_seed(0)
    block, x_BLD = ShrinkageBlock(8, kernel=3, dilation=1, shrink="none", dropout=0.0), torch.randn(2, 11, 8)
    mask_BL, y_BLD = torch.ones(2, 11, dtype=torch.bool), x_BLD
    for norm, conv in zip(block.norms, block.convs, strict=True):
        y_BLD = conv(norm(y_BLD).clamp(min=0))
    torch.testing.assert_close(block(x_BLD, mask_BL), x_BLD + y_BLD)
    shrinking = ShrinkageBlock(8, kernel=3, dilation=1, shrink="channel", dropout=0.0)
    assert sorted(set(shrinking.state_dict()) - set(block.state_dict()))[0].startswith("shrinkage.level.")


def test_a_stack_over_pairs_changes_distances_and_leaves_them_symmetric():
    kwargs = SMALL["drsn"] | {"num_channels": 0, "num_distance_bins": 5, "pair_depth": 2, "pair_width": 8}
    torch.manual_seed(0)
    model, inputs = create_model("drsn", **kwargs).eval(), batch([14, 9])
    logits = outputs(model, inputs)["distance_logits_BLLK"]
    torch.testing.assert_close(logits, logits.transpose(1, 2), rtol=1e-6, atol=1e-6)
    with torch.no_grad():
        model.get_submodule("heads.distances.track").weight.zero_()
    assert (outputs(model, inputs)["distance_logits_BLLK"] - logits).abs().max() > 1e-2


def test_a_stack_over_pairs_that_no_head_reads_is_refused():
    with pytest.raises(ValueError, match="pair_depth 2 and no head"):
        create_model("drsn", pair_depth=2)


class OfSignals(nn.Module):
    """Which of four waves a signal [B, L] holds: three blocks and a mean."""

    def __init__(self, width: int, shrink: str) -> None:
        super().__init__()
        self.stem = nn.Conv1d(1, width, 5, padding=2)
        block = partial(ShrinkageBlock, width, kernel=5, shrink=shrink, dropout=0.0)
        self.blocks = nn.ModuleList(block(dilation=2**i) for i in range(3))
        self.norm, self.out = nn.LayerNorm(width), nn.Linear(width, 4)

    def forward(self, signal_BL: Tensor) -> Tensor:
        x_BLD = self.stem(signal_BL[:, None]).transpose(1, 2)
        for block in self.blocks:
            x_BLD = block(x_BLD, torch.ones_like(signal_BL, dtype=torch.bool))
        return self.out(self.norm(x_BLD).mean(1))


def errors_on_noisy_signals(width: int, shrink: str, *, seed: int) -> float:
    """Share of 2,048 signals that are taken for the wrong wave, after 100 steps on 1,024 others."""
    draw = torch.Generator().manual_seed(seed)
    waves = torch.randn(4, 16, generator=draw)
    waves /= waves.square().mean(1, keepdim=True).sqrt()

    def signals(count: int) -> tuple[Tensor, Tensor]:
        wave_N, at_N = (torch.randint(most, (count,), generator=draw) for most in (4, 48))
        noise_NL = 0.5 * torch.randn(count, 64, generator=draw)
        return noise_NL.scatter_add(1, at_N[:, None] + torch.arange(16), waves[wave_N]), wave_N

    torch.manual_seed(seed)
    model = OfSignals(width, shrink)
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    (train_NL, train_N), (test_NL, test_N) = signals(1024), signals(2048)
    for _ in range(100):
        some = torch.randint(1024, (32,), generator=draw)
        optimizer.zero_grad()
        F.cross_entropy(model(train_NL[some]), train_N[some]).backward()
        optimizer.step()
    with torch.no_grad():
        return float((model(test_NL).argmax(1) != test_N).float().mean())


@pytest.mark.slow
def test_on_noisy_signals_shrinkage_errs_less_than_a_residual_network_that_is_no_smaller():
    """By more than a standard error over three seeds; models/README.md has more numbers, and where it does not."""
    sizes = [sum(p.numel() for p in OfSignals(*kind).parameters()) for kind in ((16, "channel"), (17, "none"))]
    assert sizes == [8632, 9184]
    shrinking, residual = (
        torch.tensor([errors_on_noisy_signals(*kind, seed=seed) for seed in range(3)])
        for kind in ((16, "channel"), (17, "none"))
    )
    times = (residual / shrinking).log()
    assert times.mean() > times.std() / len(times) ** 0.5


@pytest.mark.parametrize("pool", ["mean", "max", "attention", "gru"])
def test_forty_one_classes_are_learned(pool: str):
    """The antibiotic-resistance diary's task in small: each sequence has a letter that it holds most of."""
    torch.manual_seed(0)
    model = create_model("drsn", **SMALL["drsn"], num_channels=0, num_classes=41, pool=pool, dropout=0)
    inputs = batch([25] * 16)
    labels_B = F.one_hot(inputs.tokens_BL, 4).sum(1).argmax(1) * 10
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(40):
        loss = F.cross_entropy(outputs(model, inputs)["class_logits_BC"], labels_B)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert (outputs(model, inputs)["class_logits_BC"].argmax(1) == labels_B).float().mean() > 0.9
