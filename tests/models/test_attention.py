"""Attention and its bias, whole and in groups of rows, and at lengths beyond those of training."""

import math
from collections.abc import Callable

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, library
from torch.utils._python_dispatch import TorchDispatchMode

from models.interface import RnaInputs, RnaModel
from models.layers import attention
from models.layers.attention import Attention, BiasRows, PairBias, RelativePosition, pair_features
from models.registry import create_model

LENGTH = 45
MASK_BL = torch.arange(LENGTH) < torch.tensor([[LENGTH], [LENGTH - 11]])
#: what attention's bias may come from
BIASES = ["mask", "distance", "bpp", "pairs"]


class Largest(TorchDispatchMode):
    """Remembers the size of the largest tensor that any operation gives."""

    def __init__(self) -> None:
        super().__init__()
        self.numel = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        found = func(*args, **(kwargs or {}))
        for x in found if isinstance(found, (tuple, list)) else [found]:
            if isinstance(x, Tensor):
                self.numel = max(self.numel, x.untyped_storage().nbytes() // x.element_size())
        return found


def attended(kind: str, *, dtype: torch.dtype = torch.float32) -> tuple[Tensor, list[Tensor]]:
    """Attention's answer to a random batch with that kind of bias, and the gradients of all that took part."""
    torch.manual_seed(0)
    x_BLD = torch.randn(2, LENGTH, 8, requires_grad=True)
    layer = Attention(8, num_heads=2, pair_width=3 if kind == "pairs" else 0)
    make_bias, sources = bias_of(kind)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype != torch.float32):
        y_BLD = layer(x_BLD, MASK_BL, make_bias())
    return y_BLD, list(
        torch.autograd.grad(y_BLD[MASK_BL].float().square().sum(), [x_BLD, *layer.parameters(), *sources])
    )


def bias_of(kind: str) -> tuple[Callable[[], Tensor | BiasRows | None], list[Tensor]]:
    """What makes an attention bias of that kind for `MASK_BL`, and what its gradients go to."""
    if kind == "mask":
        return lambda: None, []
    if kind == "pairs":
        pair_BLLP = torch.randn(2, LENGTH, LENGTH, 3, requires_grad=True)
        return lambda: pair_BLLP, [pair_BLLP]
    bias = PairBias(2, use_bpp=kind == "bpp")
    if kind == "distance":
        return lambda: bias(MASK_BL, None), list(bias.parameters())
    bpp_BLL = torch.rand(2, LENGTH, LENGTH, requires_grad=True)
    return lambda: bias(MASK_BL, bpp_BLL), [*bias.parameters(), bpp_BLL]


@pytest.fixture
def in_groups(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Call it to let every sequence's rows go in groups of 7, which divides no length here."""

    def switch() -> None:
        monkeypatch.setattr(attention, "WHOLE_LENGTH", 0)
        monkeypatch.setattr(attention, "_GROUP_ELEMENTS_CPU", 2 * 2 * 7 * LENGTH)

    return switch


@pytest.mark.parametrize("kind", BIASES)
def test_attention_in_groups_of_rows_equals_attention_with_all_gradients(kind: str, in_groups: Callable[[], None]):
    """Base-pair probabilities got none in groups: whoever asked for one had what came through the embedding alone."""
    expected, gradients = attended(kind)
    in_groups()
    found, found_gradients = attended(kind)
    torch.testing.assert_close(found[MASK_BL], expected[MASK_BL], rtol=1e-5, atol=1e-5)
    for grad, wanted in zip(found_gradients, gradients, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", BIASES)
def test_attention_in_groups_of_rows_equals_attention_without_gradients(kind: str, in_groups: Callable[[], None]):
    torch.manual_seed(0)
    layer, x_BLD = Attention(8, num_heads=2, pair_width=3 if kind == "pairs" else 0), torch.randn(2, LENGTH, 8)
    make_bias, _ = bias_of(kind)
    with torch.no_grad():
        expected = layer(x_BLD, MASK_BL, make_bias())
        in_groups()
        torch.testing.assert_close(layer(x_BLD, MASK_BL, make_bias()), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("kind", BIASES)
def test_groups_of_rows_keep_to_the_precision_of_autocast(
    kind: str, in_groups: Callable[[], None], monkeypatch: pytest.MonkeyPatch
):
    expected, _ = attended(kind, dtype=torch.bfloat16)
    in_groups()
    attend = F.scaled_dot_product_attention

    def watched(*args: Tensor, attn_mask: Tensor) -> Tensor:
        # nothing noticed when the backward pass computed the bias again without autocast
        assert attn_mask.dtype == (torch.bool if kind == "mask" else torch.bfloat16)
        return attend(*args, attn_mask=attn_mask)

    monkeypatch.setattr(F, "scaled_dot_product_attention", watched)
    found, gradients = attended(kind, dtype=torch.bfloat16)
    assert found.dtype == torch.bfloat16
    torch.testing.assert_close(found[MASK_BL], expected[MASK_BL], rtol=0.05, atol=0.02)
    assert all(grad.isfinite().all() for grad in gradients)


def test_gradients_of_many_groups_are_added_up_in_float32(monkeypatch: pytest.MonkeyPatch):
    """Every row gives every value 1/L of its gradient: in bfloat16 the sum of so small numbers stops at a half."""
    length, dtype = 600, torch.bfloat16
    monkeypatch.setattr(attention, "_GROUP_ELEMENTS_CPU", length)
    q, k, v = (torch.zeros(1, 1, length, 1, dtype=dtype, requires_grad=True) for _ in range(3))
    bias = BiasRows(torch.zeros(1, 2 * length - 1), None, torch.ones(1, length, dtype=torch.bool), None)
    with torch.autocast("cpu", dtype=dtype):
        y = attention._AttentionInGroups.apply(q, k, v, *bias)
    y.backward(torch.ones_like(y))
    assert v.grad is not None
    torch.testing.assert_close(v.grad, torch.ones_like(v), rtol=0.01, atol=0)


def test_groups_of_rows_make_nothing_of_length_times_length(in_groups: Callable[[], None]):
    with Largest() as whole:
        attended("distance")
    in_groups()
    with Largest() as grouped:
        attended("distance")
    assert whole.numel >= 2 * 2 * LENGTH**2
    assert grouped.numel == (2 * LENGTH - 1) * 32  # hidden units of the network on the distance


@pytest.mark.parametrize(("start", "stop"), [(0, 9), (0, 1), (3, 7), (8, 9)])
def test_rows_of_a_bias_are_rows_of_the_whole(start: int, stop: int, monkeypatch: pytest.MonkeyPatch):
    torch.manual_seed(0)
    bias, bpp_BLL, mask_BL = PairBias(2, use_bpp=True), torch.rand(2, 9, 9), torch.ones(2, 9, dtype=torch.bool)
    features = pair_features(bpp_BLL)
    torch.testing.assert_close(pair_features(bpp_BLL, start, stop), features[:, :, start:stop], rtol=0, atol=0)
    whole_BHLL = bias(mask_BL, bpp_BLL)
    monkeypatch.setattr(attention, "WHOLE_LENGTH", 8)
    rows = bias(mask_BL, bpp_BLL)
    assert isinstance(rows, BiasRows)
    torch.testing.assert_close(rows.rows(start, stop), whole_BHLL[:, :, start:stop])


@pytest.mark.parametrize(("start", "stop"), [(0, 9), (0, 1), (3, 7), (8, 9)])
def test_rows_of_a_table_of_distances_are_its_windows_with_their_gradients(start: int, stop: int):
    table_HT, weight_HRL = torch.randn(2, 17, requires_grad=True), torch.randn(2, stop - start, 9)
    distance_RL = torch.arange(start, stop).unsqueeze(1) - torch.arange(9)
    expected = table_HT[:, 8 - distance_RL]  # from distance 8 down
    found = attention._rows_of_table(table_HT, start, stop)
    torch.testing.assert_close(found, expected, rtol=0, atol=0)
    grads = (torch.autograd.grad(rows, table_HT, weight_HRL)[0] for rows in (found, expected))
    torch.testing.assert_close(*grads)
    library.opcheck(torch.ops.rna.rows_of_table.default, (table_HT, start, stop))


@pytest.mark.parametrize("kind", BIASES)
def test_what_stands_under_the_padding_reaches_no_answer(kind: str):
    torch.manual_seed(0)
    layer, x_BLD = Attention(8, num_heads=2, pair_width=3 if kind == "pairs" else 0), torch.randn(2, LENGTH, 8)
    make_bias, _ = bias_of(kind)
    other_BLD = torch.where(MASK_BL.unsqueeze(-1), x_BLD, 99.0)
    found, expected = (layer(x, MASK_BL, make_bias())[MASK_BL] for x in (other_BLD, x_BLD))
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("every", [0, 1])
@pytest.mark.parametrize("pair_width", [0, 4])
def test_groups_of_rows_go_with_gradient_checkpointing(every: int, pair_width: int, in_groups: Callable[[], None]):
    def gradients() -> list[Tensor]:
        torch.manual_seed(0)
        model = create_model("transformer_sepconv", width=8, depth=2, num_heads=2, dropout=0.2, pair_width=pair_width)
        model.set_gradient_checkpointing(every)
        values_BLC = model(RnaInputs(torch.ones_like(MASK_BL, dtype=torch.int64), MASK_BL)).values_BLC
        assert values_BLC is not None
        return list(torch.autograd.grad(values_BLC.square().sum(), list(model.parameters())))

    expected = gradients()
    in_groups()
    for grad, wanted in zip(gradients(), expected, strict=True):
        torch.testing.assert_close(grad, wanted, rtol=1e-3, atol=1e-5)


def test_the_position_bias_depends_on_the_signed_distance_alone_at_every_length():
    torch.manual_seed(0)
    position = RelativePosition(3)
    short, long = position(7), position(300)
    torch.testing.assert_close(long[:, :7, :7], short)
    torch.testing.assert_close(long[:, 5:12, 5:12], short)
    assert (short[:, 0, 3] != short[:, 3, 0]).any()


def test_a_symmetric_position_bias_ignores_the_sign():
    torch.manual_seed(0)
    bias = RelativePosition(3, symmetric=True)(9)
    torch.testing.assert_close(bias, bias.transpose(1, 2))


def test_rows_of_the_position_bias_are_queries():
    position = RelativePosition(2)
    features = position._features(4)  # distances 3 … -3
    near = torch.tensor([3.0, 2, 1, 0, 1, 2, 3])
    signs = torch.tensor([1.0, 1, 1, 0, -1, -1, -1])
    torch.testing.assert_close(features, torch.stack([torch.log(1 + near), 2 / (1 + near), signs], dim=-1))
    expected = position.out(torch.nn.functional.gelu(position.hidden(features[0])))  # distance +3
    torch.testing.assert_close(position(4)[:, 3, 0], expected)


def test_pair_features_are_zero_where_nothing_pairs_and_see_stacked_pairs():
    bpp_BLL = torch.zeros(1, 8, 8)
    bpp_BLL[0, 1, 6] = bpp_BLL[0, 6, 1] = 1.0
    probability, logarithm, stacked = pair_features(bpp_BLL)[0]
    assert torch.equal(probability, bpp_BLL[0])
    assert logarithm[1, 6] == pytest.approx(1.0)
    bpp_BLL[0, 3, 4] = 1e-3  # where probabilities begin to count
    assert pair_features(bpp_BLL)[0, 1, 3, 4] == pytest.approx(math.log(2) / math.log(1001))
    assert sorted(stacked.nonzero().tolist()) == [[0, 7], [2, 5], [5, 2], [7, 0]]
    assert stacked[2, 5] == pytest.approx(0.5)


def test_the_bias_is_position_plus_weighted_pair_features_and_closes_padded_keys():
    torch.manual_seed(0)
    bias = PairBias(2, use_bpp=True)
    bpp_BLL = torch.rand(2, 6, 6)
    mask_BL = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    found = bias(mask_BL, bpp_BLL)
    assert bias.weight_HF is not None
    expected = bias.position(6) + torch.einsum("hf,bfij->bhij", bias.weight_HF, pair_features(bpp_BLL))
    torch.testing.assert_close(found[..., :4], expected[..., :4])
    assert (found[1, ..., 4:] == torch.finfo(torch.float32).min).all()


@pytest.mark.parametrize("length", [1, 7, 8, 177])
def test_rows_of_an_aligned_bias_begin_at_multiples_of_8_with_the_same_numbers_and_gradients(length: int):
    bias_BHRL = torch.randn(2, 3, 5, length, requires_grad=True)
    aligned = attention._align(bias_BHRL)
    assert all(stride % 8 == 0 for stride in aligned.stride()[:-1])
    assert aligned.stride(-1) == 1
    assert torch.equal(aligned, bias_BHRL)
    weight = torch.randn_like(bias_BHRL)
    (grad,) = torch.autograd.grad(aligned, bias_BHRL, weight)
    assert torch.equal(grad, weight)


def test_heads_start_from_one_that_ignores_pairing_to_one_that_looks_at_the_partner():
    bias, bpp_BLL = PairBias(4, use_bpp=True), torch.zeros(1, 8, 8)
    bpp_BLL[0, 1, 6] = bpp_BLL[0, 6, 1] = 1.0
    paired_HLL = (bias(torch.ones(1, 8, dtype=torch.bool), bpp_BLL)[0] - bias.position(8)).detach()
    torch.testing.assert_close(paired_HLL[:, 1, 6], torch.tensor([0.0, 2.0, 4.0, 6.0]))
    assert paired_HLL.abs().sum((1, 2)).tolist() == pytest.approx([0, 4, 8, 12], abs=1e-4)  # the partners alone


def test_attention_is_softmax_of_scaled_products_plus_bias():
    torch.manual_seed(0)
    layer, x_BLD = Attention(8, num_heads=2), torch.randn(2, 5, 8)
    bias_BHLL = torch.randn(2, 2, 5, 5)
    q, k, v = layer.qkv(x_BLD).view(2, 5, 3, 2, 4).unbind(2)
    weights = torch.softmax(torch.einsum("bihd,bjhd->bhij", q, k) / 2 + bias_BHLL, -1)
    expected = layer.out(torch.einsum("bhij,bjhd->bihd", weights, v).reshape(2, 5, 8))
    mask_BL = torch.ones(2, 5, dtype=torch.bool)
    torch.testing.assert_close(layer(x_BLD, mask_BL, bias_BHLL), expected)


def test_a_width_that_heads_do_not_divide_is_refused():
    with pytest.raises(ValueError, match="width 10 is not a multiple of num_heads 4"):
        create_model("transformer_sepconv", width=10, num_heads=4)


def test_a_pattern_with_other_letters_is_refused():
    with pytest.raises(ValueError, match="pattern: got 'MXA'"):
        create_model("ribonanza_mamba", pattern="MXA")


def paired(length: int, rng: torch.Generator, *, size: int = 8) -> tuple[RnaInputs, Tensor]:
    """Random sequences in which all positions, or all but one, pair at random with probability 0.9; and partners."""
    tokens_BL = torch.randint(0, 4, (size, length), generator=rng)
    order_BL = torch.rand((size, length), generator=rng).argsort(1)
    left, right = order_BL[:, : length // 2], order_BL[:, length - length // 2 :]
    partner_BL = torch.full((size, length), -1).scatter(1, left, right).scatter(1, right, left)
    bpp_BLL = 0.9 * (partner_BL.unsqueeze(2) == torch.arange(length)).float()
    return RnaInputs(tokens_BL, torch.ones_like(tokens_BL, dtype=torch.bool), bpp_BLL), partner_BL


def three_to_the_left(inputs: RnaInputs, partner_BL: Tensor) -> Tensor:
    return F.pad(inputs.tokens_BL, (3, 0), value=-1)[:, :-3]


def complement_of_the_partner(inputs: RnaInputs, partner_BL: Tensor) -> Tensor:
    return torch.where(partner_BL < 0, -1, 3 - inputs.tokens_BL.gather(1, partner_BL.clamp(min=0)))


@pytest.mark.parametrize(
    ("task", "steps", "kwargs"),
    [
        (three_to_the_left, 200, {}),
        (three_to_the_left, 100, {"pair_width": 8}),
        (complement_of_the_partner, 50, {"use_bpp": True}),
    ],
)
def test_what_is_learned_up_to_48_nt_holds_at_200_and_457(task: Callable, steps: int, kwargs: dict[str, int | bool]):
    """No convolution: attention alone carries it."""
    torch.manual_seed(0)
    rng = torch.Generator().manual_seed(1)
    kwargs |= {"width": 32, "depth": 2, "num_heads": 4, "kernel": 0, "ffn_expand": 2, "dropout": 0.0}
    model = create_model("transformer_sepconv", num_channels=4, **kwargs)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    for _ in range(steps):
        inputs, partner_BL = paired(int(torch.randint(16, 49, (), generator=rng)), rng)
        optimizer.zero_grad()
        F.cross_entropy(logits(model, inputs), task(inputs, partner_BL), ignore_index=-1).backward()
        optimizer.step()
    shares = {}
    for length in (48, 200, 457):
        inputs, partner_BL = paired(length, rng, size=2)
        wanted = task(inputs, partner_BL)
        shares[length] = (logits(model, inputs).argmax(1) == wanted)[wanted >= 0].float().mean().item()
    assert shares[48] > 0.95
    assert min(shares[200], shares[457]) >= 0.9 * shares[48]


def logits(model: RnaModel, inputs: RnaInputs) -> Tensor:
    values_BLC = model(inputs).values_BLC
    assert values_BLC is not None
    return values_BLC.transpose(1, 2)
