"""Hyena's filter and sizes against HyenaDNA's."""

import math

import pytest
import torch

from models.hyena import HyenaFilter, HyenaOperator
from models.interface import RnaModel
from models.layers.long_conv import fft_conv_ref
from models.registry import create_model
from pipeline.config import load_config


def make_filter(*, l_max: int = 64, shift: float = 0.05, directions: int = 1) -> HyenaFilter:
    torch.manual_seed(0)
    return HyenaFilter(10, directions=directions, l_max=l_max, width=16, features=5, shift=shift)


def published(preset: str, **heads: int) -> RnaModel:
    """The network of one of HyenaDNA's sizes, as its TOML has it, without storage."""
    with torch.device("meta"):
        return create_model("hyena", **load_config(preset).model.kwargs, **heads)


@pytest.mark.parametrize(
    ("preset", "parameters"),
    [
        ("hyenadna_tiny_1k", 436_096),
        ("hyenadna_tiny_1k_d256", 1_641_088),
        ("hyenadna_small_32k", 3_277_568),
        ("hyenadna_medium_160k", 6_550_528),
        ("hyenadna_large_1m", 6_550_528),
    ],
)
def test_a_hyenadna_toml_has_the_published_number_of_parameters_and_the_head_comes_on_top(preset: str, parameters: int):
    def count(**heads: int) -> int:
        return sum(p.numel() for p in published(preset, **heads).parameters())

    width = load_config(preset).model.kwargs["width"]
    assert count(num_channels=0) == parameters
    assert count(num_channels=2) == parameters + 2 * width + 2


def test_a_hyenadna_filter_has_the_published_number_of_parameters():
    operator = next(m for m in published("hyenadna_tiny_1k").modules() if isinstance(m, HyenaOperator))
    assert sum(p.numel() for p in operator.filters.parameters()) + operator.skip_ND.numel() == 17_088


def test_the_filter_is_the_published_formula():
    """t in 0 … 1 over l_max, z = [t, cos f w, -sin f w], sine network, exponential window plus shift."""
    length, module = 64, make_filter()
    t = torch.linspace(0, 1, length)[:, None]
    w = 2 * math.pi * torch.arange(length)[:, None] / length
    f = torch.linspace(1e-4, 1, 2)
    x = torch.cat([t, torch.cos(f * w), -torch.sin(f * w)], dim=-1)
    for layer in module.hidden:
        x = torch.sin(10.0 * layer(x))
    decay = torch.linspace(math.log(1e-2) / 1.5, math.log(1e-2) / 0.3, 10).abs()
    expected = module.out(x) * (torch.exp(-t * decay) + 0.05)
    torch.testing.assert_close(module(length)[0], expected.t(), rtol=1e-5, atol=1e-6)


def test_the_window_decays_from_one_to_the_published_ends():
    module = make_filter(shift=0.0)
    window = torch.exp(-module.decay_D)
    assert window[0] == pytest.approx(0.046, abs=1e-3)
    assert window[-1] == pytest.approx(2.2e-7, rel=0.05)


def test_a_shorter_sequence_gets_the_beginning_of_the_same_filter():
    module = make_filter()
    torch.testing.assert_close(module(20)[0], module(64)[0][:, :20], rtol=1e-5, atol=1e-6)


def test_a_sequence_beyond_l_max_continues_the_filter():
    module = make_filter(l_max=64, shift=0.0)
    longer = module(200)[0]
    torch.testing.assert_close(longer[:, :64], module(64)[0], rtol=1e-5, atol=1e-6)
    assert longer[:, 64:].abs().max() < longer[:, :64].abs().max()


def test_initial_weights_are_hyenadnas():
    """Nothing noticed when `_reset_like_hyenadna` was taken out."""
    torch.manual_seed(0)
    model = create_model("hyena", width=64, depth=8, l_max=64)
    spreads = {name: p.std().item() for name, p in model.named_parameters() if name.endswith("weight")}
    closing = [x for name, x in spreads.items() if name.endswith(("mixer.out.weight", "feed_forward.3.weight"))]
    opening = [x for name, x in spreads.items() if name.endswith(("mixer.into.weight", "feed_forward.1.weight"))]
    assert [len(closing), len(opening)] == [16, 16]
    assert closing == pytest.approx([0.02 / 4] * 16, rel=0.1)  # over the root of twice the depth
    assert opening == pytest.approx([0.02] * 16, rel=0.1)
    assert spreads["embedding.tokens.weight"] == pytest.approx(0.02, rel=0.2)
    skips = torch.cat([p.flatten() for name, p in model.named_parameters() if name.endswith("skip_ND")])
    assert [skips.mean().item(), skips.std().item()] == pytest.approx([0, 1], abs=0.2)
    assert all(p.abs().max() == 0 for name, p in model.named_parameters() if name.endswith(("into.bias", "out.bias")))


def test_the_two_sides_have_different_filters():
    after, before = make_filter(directions=2)(30)
    assert not torch.allclose(after, before, atol=1e-3)


@pytest.mark.parametrize("bidirectional", [False, True])
def test_the_operator_of_order_two_is_gate_convolution_gate(bidirectional: bool):
    torch.manual_seed(1)
    layer = HyenaOperator(
        4, order=2, bidirectional=bidirectional, l_max=64, filter_width=8, filter_features=5, filter_shift=0.0
    )
    x_BLD, mask_BL = torch.randn(2, 13, 4), torch.ones(2, 13, dtype=torch.bool)
    outer, inner, v = layer.short(layer.into(x_BLD)).chunk(3, dim=-1)
    kernels = layer.filters(13)
    v = fft_conv_ref(v * inner, kernels[0], kernels[1] if bidirectional else None, layer.skip_ND[0])
    expected = layer.out((outer * v).float())
    torch.testing.assert_close(layer(x_BLD, mask_BL), expected, rtol=1e-5, atol=1e-5)


def test_products_of_gates_that_half_precision_does_not_hold_stay_finite():
    """Projections of 300 were held, and their product was infinite before the first long convolution."""
    torch.manual_seed(1)
    layer = HyenaOperator(4, order=2, bidirectional=True, l_max=64, filter_width=8, filter_features=5, filter_shift=0.0)
    with torch.no_grad():
        layer.into.bias.fill_(300.0)
        layer.short.weight_D1K.copy_(torch.tensor([0.0, 1.0, 0.0]))
    x_BLD, mask_BL = torch.randn(2, 13, 4), torch.ones(2, 13, dtype=torch.bool)
    with torch.autocast("cpu", dtype=torch.float16):
        found = layer(x_BLD, mask_BL)
    expected = layer(x_BLD, mask_BL)
    assert (found - expected).abs().max() < 0.01 * expected.abs().max()


def test_in_higher_orders_the_last_gate_comes_first_and_the_first_without_a_convolution():
    """As in the published loop over reversed gates; nothing noticed when they were taken in order."""
    torch.manual_seed(1)
    layer = HyenaOperator(4, order=3, bidirectional=True, l_max=64, filter_width=8, filter_features=5, filter_shift=0.0)
    x_BLD, mask_BL = torch.randn(2, 13, 4), torch.ones(2, 13, dtype=torch.bool)
    outer, second, third, v = layer.short(layer.into(x_BLD)).chunk(4, dim=-1)
    after, before = (kernel_DL.chunk(2) for kernel_DL in layer.filters(13))
    for i, gate in enumerate((third, second)):
        v = fft_conv_ref(v * gate, after[i], before[i], layer.skip_ND[i])
    torch.testing.assert_close(layer(x_BLD, mask_BL), layer.out((outer * v).float()), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "kwargs", [{"kernel": 9}, {"stem_kernel": 9}, {"use_bpp": True}, {"gru_head": True}, {"coordinates": True}]
)
def test_causal_refuses_what_looks_at_both_sides(kwargs: dict):
    causal = {"bidirectional": False, "kernel": 0, "stem_kernel": 0, "width": 8, "depth": 1}
    create_model("hyena", **causal)
    with pytest.raises(ValueError, match="both sides"):
        create_model("hyena", **(causal | kwargs))


@pytest.mark.parametrize("kwargs", [{"l_max": 1}, {"filter_features": 4}, {"filter_features": 1}, {"order": 1}])
def test_filters_that_cannot_be_are_refused(kwargs: dict):
    with pytest.raises(ValueError, match=r"Hyena"):
        create_model("hyena", width=8, depth=1, **kwargs)
