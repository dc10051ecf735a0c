"""The pair track: what its parts compute, what they never do, and where it stands in a network."""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.encoder import BlockEncoder
from models.layers.pair import OuterProduct, PairBlock, PairStart, PairUpdate, TriangleMultiplication
from models.registry import create_model

WIDTH, PAIR = 12, 6


def randomised(module: nn.Module) -> nn.Module:
    """A module with all parameters moved off their initial values."""
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return module


def update(*, triangle: bool = True) -> nn.Module:
    torch.manual_seed(0)
    return randomised(PairUpdate(WIDTH, pair_width=PAIR, triangle=triangle, dropout=0.0))


def test_the_outer_product_is_a_weighted_sum_over_all_products_of_a_pair():
    torch.manual_seed(0)
    layer, x_BLD = randomised(OuterProduct(WIDTH, pair_width=PAIR)), torch.randn(2, 7, WIDTH)
    left, right = layer.factors(layer.norm(x_BLD)).chunk(2, dim=-1)
    products = torch.einsum("bic,bjd->bijcd", left, right)
    weight = layer.weigh.weight.view(PAIR, PAIR, PAIR)  # channel, second factor's component, first factor's
    expected = torch.einsum("bijcd,pdc->bijp", products, weight) / PAIR**0.5
    torch.testing.assert_close(layer(x_BLD), expected, rtol=1e-4, atol=1e-5)


def test_triangles_go_over_every_real_third_position_along_both_kinds_of_edges():
    torch.manual_seed(0)
    layer, pair_BLLP = randomised(TriangleMultiplication(PAIR)), torch.randn(2, 7, 7, PAIR)
    mask_BL = torch.arange(7) < torch.tensor([[7], [5]])
    found = layer(pair_BLLP, mask_BL.unsqueeze(1) & mask_BL.unsqueeze(2))
    for row, length in enumerate([7, 5]):
        z = layer.norm_in(pair_BLLP[row, :length, :length])
        a, b = F.glu(F.linear(z, layer.factors.weight), dim=-1).chunk(2, dim=-1)
        half = PAIR // 2
        outgoing = torch.einsum("ikp,jkp->ijp", a[..., :half], b[..., :half])
        incoming = torch.einsum("kip,kjp->ijp", a[..., half:], b[..., half:])
        expected = torch.sigmoid(layer.gate(z)) * layer.out(layer.norm_out(torch.cat([outgoing, incoming], dim=-1)))
        torch.testing.assert_close(found[row, :length, :length], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("triangle", [False, True])
def test_padding_reaches_no_pair_of_real_positions(triangle: bool):
    layer, pair_BLLP, x_BLD = update(triangle=triangle), torch.randn(1, 11, 11, PAIR), torch.randn(1, 11, WIDTH)
    mask_BL = torch.arange(11).unsqueeze(0) < 8
    alone = layer(pair_BLLP[:, :8, :8], x_BLD[:, :8], mask_BL[:, :8])
    torch.testing.assert_close(layer(pair_BLLP, x_BLD, mask_BL)[:, :8, :8], alone, rtol=1e-5, atol=1e-5)


def test_a_triangle_lets_a_third_position_matter_and_nothing_else_does():
    """The pair (2, 7) is told of the pair (2, 4) through position 4, the common third one, only by triangles."""
    for triangle in (False, True):
        layer, mask_BL = update(triangle=triangle), torch.ones(1, 9, dtype=torch.bool)
        pair_BLLP, x_BLD = torch.randn(1, 9, 9, PAIR, requires_grad=True), torch.randn(1, 9, WIDTH)
        grad = torch.autograd.grad(layer(pair_BLLP, x_BLD, mask_BL)[0, 2, 7].sum(), pair_BLLP)[0][0]
        seen = {tuple(index) for index in grad.abs().sum(-1).nonzero().tolist()}
        through = {(2, k) for k in range(9)} | {(7, k) for k in range(9)}
        through |= {(k, 2) for k in range(9)} | {(k, 7) for k in range(9)}
        assert seen == (through if triangle else {(2, 7)})


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_huge_hidden_layers_leave_the_pair_track_finite_and_in_float32(dtype: torch.dtype):
    """RibonanzaNet's outer product of the same hidden layer, as it stands there, overflows."""
    layer, mask_BL = update(), torch.ones(1, 30, dtype=torch.bool)
    x_BLD = (300 * torch.randn(1, 30, WIDTH)).requires_grad_()
    pair_BLLP = (300 * torch.randn(1, 30, 30, PAIR)).requires_grad_()
    expected = layer(pair_BLLP, x_BLD, mask_BL)
    with torch.autocast("cpu", dtype=dtype):
        found = layer(pair_BLLP, x_BLD, mask_BL)
        theirs = torch.einsum("bid,bjc->bijcd", x_BLD.to(dtype), x_BLD.to(dtype))
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    found.square().sum().backward()
    for grad in [x_BLD.grad, pair_BLLP.grad, *(parameter.grad for parameter in layer.parameters())]:
        assert grad is not None
        assert grad.isfinite().all()
    assert theirs.isfinite().all() == (dtype == torch.bfloat16)


def test_dropout_is_shared_by_all_first_positions():
    torch.manual_seed(0)
    layer, start = PairUpdate(WIDTH, pair_width=PAIR, triangle=False, dropout=0.5), torch.zeros(1, 8, 8, PAIR)
    nn.init.zeros_(layer.transition[-1].weight)
    nn.init.zeros_(layer.transition[-1].bias)
    dropped_LLP = layer(start, torch.randn(1, 8, WIDTH), torch.ones(1, 8, dtype=torch.bool))[0] == 0
    assert torch.equal(dropped_LLP, dropped_LLP[:1].expand_as(dropped_LLP))
    assert dropped_LLP.any()
    assert not dropped_LLP.all()


@pytest.mark.parametrize(("triangle", "numbers"), [(True, 20), (False, 6.5)])
def test_an_update_keeps_as_many_numbers_for_the_backward_pass_as_it_says(triangle: bool, numbers: float):
    kept: dict[int, int] = {}

    def keep(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    layer, pair_BLLP = update(triangle=triangle), torch.randn(1, 64, 64, PAIR, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(keep, lambda x: x):
        layer.train()(pair_BLLP, torch.randn(1, 64, WIDTH), torch.ones(1, 64, dtype=torch.bool))
    assert sum(kept.values()) / (4 * pair_BLLP.numel()) == pytest.approx(numbers, abs=0.5)


def test_the_start_tells_the_directions_of_the_chain_apart_and_stays_the_same_at_every_length():
    torch.manual_seed(0)
    start, mask_BL = PairStart(PAIR, use_bpp=False), torch.ones(2, 40, dtype=torch.bool)
    pair_BLLP = start(mask_BL, None)
    assert (pair_BLLP[0, 3, 9] != pair_BLLP[0, 9, 3]).any()
    torch.testing.assert_close(start(mask_BL[:, :12], None), pair_BLLP[:, 20:32, 20:32])


@pytest.mark.parametrize(
    ("name", "kwargs", "updates"),
    [
        ("transformer_sepconv", {"depth": 5, "pair_every": 2}, [0, 2, 4]),
        ("transformer_sepconv", {"depth": 3, "pair_every": 1}, [0, 1, 2]),
        ("ribonanza_mamba", {"depth": 12, "pattern": "MMA", "pair_every": 2}, [2, 8]),
    ],
)
def test_pair_features_are_updated_before_every_nth_attention(name: str, kwargs: dict, updates: list[int]):
    with torch.device("meta"):
        model = create_model(name, width=12, num_heads=2, pair_width=4, **kwargs)
    assert isinstance(model, BlockEncoder)
    blocks = [block for block in model.blocks if isinstance(block, PairBlock)]
    assert len(blocks) == kwargs["depth"]
    assert [i for i, block in enumerate(blocks) if block.update is not None] == updates
    assert model.pair_bias is None


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"pair_width": 5}, "got pair_width 5; expected an even one"),
        ({"pair_width": 4, "pattern": "M"}, "got pair_every 2, 0 blocks with attention; expected 1 or more of each"),
        ({"pair_width": 4, "pair_every": 0}, "got pair_every 0, 4 blocks with attention"),
    ],
)
def test_a_pair_track_that_nothing_would_read_or_update_is_refused(kwargs: dict, message: str):
    with pytest.raises(ValueError, match=message):
        create_model("ribonanza_mamba", **kwargs)
