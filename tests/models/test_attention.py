"""Attention and its bias."""

import pytest
import torch

from models.layers.attention import Attention, PairBias, RelativePosition, pair_features
from models.registry import create_model


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
    assert features[:, 2].tolist() == [1, 1, 1, 0, -1, -1, -1]
    expected = position.out(torch.nn.functional.gelu(position.hidden(features[0])))  # distance +3
    torch.testing.assert_close(position(4)[:, 3, 0], expected)


def test_pair_features_are_zero_where_nothing_pairs_and_see_stacked_pairs():
    bpp_BLL = torch.zeros(1, 8, 8)
    bpp_BLL[0, 1, 6] = bpp_BLL[0, 6, 1] = 1.0
    probability, logarithm, stacked = pair_features(bpp_BLL)[0]
    assert torch.equal(probability, bpp_BLL[0])
    assert logarithm[1, 6] == pytest.approx(1.0)
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
