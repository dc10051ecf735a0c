"""The choice among traces: trust follows the distances of a network, and no two are alike as long as that can be."""

import numpy as np
import pytest
import torch

from models.heads import distance_bins
from pipeline.structure.assembly import trace_from_pairs
from pipeline.structure.choice import expected_lddt, most_trusted
from pipeline.structure.geometry import rotation_onto
from pipeline.training.traces import lddt

BINS = 200  # 0.28 Å


@pytest.fixture
def rng() -> np.random.Generator:
    return np.random.default_rng(4)


def hairpin(length: int = 30) -> np.ndarray:
    pairs = [(k, length - 1 - k) for k in range(length // 2 - 3)]
    return trace_from_pairs(length, pairs, np.random.default_rng(2))


def certain(xyz_L3: np.ndarray, *, bins: int = BINS, strength: float = 200.0) -> np.ndarray:
    """Logits of a network that knows all distances: [L, L, K]."""
    distance_LL = np.linalg.norm(xyz_L3[:, None] - xyz_L3[None], axis=-1)
    bin_LL = np.searchsorted(distance_bins(bins).edges, distance_LL, side="right")
    return strength * np.eye(bins)[bin_LL]


def test_a_certain_network_expects_the_lddt(rng):
    true_L3 = hairpin()
    traces_NL3 = np.stack([true_L3 + noise * rng.standard_normal(true_L3.shape) for noise in (0.0, 0.5, 1.0, 3.0)])
    expected = [np.mean(lddt(torch.tensor(xyz_L3), torch.tensor(true_L3)).numpy()) for xyz_L3 in traces_NL3]
    np.testing.assert_allclose(expected_lddt(certain(true_L3), traces_NL3), expected, atol=0.03)


def test_trust_is_the_lddt_that_distances_drawn_within_their_bins_have_on_average(rng):
    logits_LLK, trace_L3 = 2 * rng.standard_normal((7, 7, 32)), 6 * rng.standard_normal((7, 3))
    chance_LLK = torch.softmax(torch.tensor(logits_LLK + logits_LLK.swapaxes(0, 1)) / 2, dim=2).numpy()
    edges = distance_bins(32).edges
    drawn_KU = edges[0] + (edges[1] - edges[0]) * (np.arange(-1, 31)[:, None] + (np.arange(2000) + 0.5) / 2000)
    kept_LL, counted_LL = np.zeros((2, 7, 7))
    for i, j in zip(*np.nonzero(~np.eye(7, dtype=bool)), strict=True):
        near_KU, off_KU = drawn_KU < 30.0, abs(drawn_KU - np.linalg.norm(trace_L3[i] - trace_L3[j]))
        counted_LL[i, j] = chance_LLK[i, j] @ near_KU.mean(axis=1)
        kept_KU = near_KU * np.mean([off_KU < most for most in (0.5, 1.0, 2.0, 4.0)], axis=0)
        kept_LL[i, j] = chance_LLK[i, j] @ kept_KU.mean(axis=1)
    expected = np.mean(kept_LL.sum(axis=1) / counted_LL.sum(axis=1))
    assert expected_lddt(logits_LLK, trace_L3[None])[0] == pytest.approx(expected, abs=1e-3)


def test_a_network_that_knows_nothing_prefers_nothing_that_is_near_the_truth(rng):
    true_L3 = hairpin()
    blind = np.zeros((30, 30, 32))
    right, wrong = expected_lddt(blind, np.stack([true_L3, true_L3[rng.permutation(30)]]))
    assert right == pytest.approx(wrong, abs=0.02)


def test_trust_does_not_follow_the_frame_and_lies_between_zero_and_one(rng):
    true_L3, logits_LLK = hairpin(), rng.standard_normal((30, 30, 32))
    axes_33 = rotation_onto(rng.standard_normal((5, 3)), rng.standard_normal((5, 3)))
    one, other = expected_lddt(logits_LLK, np.stack([true_L3, true_L3 @ axes_33 + 7.0]))
    assert one == pytest.approx(other, abs=1e-6)
    assert 0 < one < 1
    assert expected_lddt(logits_LLK, np.zeros((1, 30, 3)))[0] >= 0
    assert expected_lddt(logits_LLK, 1e4 * rng.standard_normal((1, 30, 3)))[0] == 0


def test_a_single_residue_has_no_surroundings():
    assert expected_lddt(np.zeros((1, 1, 32)), np.zeros((2, 1, 3))).tolist() == [0.0, 0.0]


def test_the_most_trusted_that_are_unlike_come_first(rng):
    base_L3 = hairpin()
    turned_L3 = base_L3 @ rotation_onto(rng.standard_normal((5, 3)), rng.standard_normal((5, 3))) + 30.0
    other_L3, third_L3 = (base_L3 + 9 * rng.standard_normal(base_L3.shape) for _ in range(2))
    pool_NL3 = np.stack([third_L3, base_L3, turned_L3, other_L3])
    xyz_ML3, confidence_M = most_trusted(pool_NL3, np.array([0.1, 0.9, 0.8, 0.3]), count=3)
    np.testing.assert_array_equal(xyz_ML3, np.stack([base_L3, other_L3, third_L3]))
    assert confidence_M.tolist() == [0.9, 0.3, 0.1]


def test_likes_fill_up_what_unlikes_leave_in_the_order_of_trust():
    pool_NL3 = np.stack([hairpin() + shift for shift in (0.0, 1.0, 2.0)])
    xyz_ML3, confidence_M = most_trusted(pool_NL3, np.array([0.1, 0.5, 0.3]), count=2)
    np.testing.assert_array_equal(xyz_ML3, pool_NL3[[1, 2]])
    assert confidence_M.tolist() == [0.5, 0.3]
