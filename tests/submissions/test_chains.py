"""Copies of a chain may stand for each other: the best order counts."""

from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from submissions import chains
from submissions.chains import permuted
from submissions.tm_score import tm_score
from tests.submissions.trace_cases import folded, moved, seeds

few = settings(max_examples=10, deadline=None, derandomize=True)


def _complex(copies: int, length: int, seed: int) -> np.ndarray:
    """[C, L, 3]: copies of one chain at places of no symmetry."""
    trace, _ = folded(length, seed)
    return np.stack([moved(trace, seed + copy) for copy in range(copies)])


def tm_permuted(predicted: np.ndarray, reference: np.ndarray, names: list[str]) -> float:
    return tm_score(permuted(predicted, reference, names), reference)


@few
@given(st.integers(2, 4), seeds)
def test_the_order_of_copies_costs_nothing(copies: int, seed: int) -> None:
    placed = _complex(copies, 20, seed)
    order = np.random.default_rng(seed).permutation(copies)
    predicted, reference = moved(placed[order].reshape(-1, 3), seed), placed.reshape(-1, 3)
    assert tm_permuted(predicted, reference, ["A" * 20] * copies) == pytest.approx(1.0, abs=1e-5)


@few
@given(st.integers(2, 4), st.floats(0.0, 10.0), seeds)
def test_no_order_of_the_copies_scores_more_than_the_chosen_one(copies: int, noise: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    placed = _complex(copies, 12, seed)
    noisy = placed[rng.permutation(copies)] + noise * rng.standard_normal(placed.shape)
    reference = placed.reshape(-1, 3)
    every = [tm_score(noisy[list(order)].reshape(-1, 3), reference) for order in permutations(range(copies))]
    assert tm_permuted(noisy.reshape(-1, 3), reference, ["A" * 12] * copies) == max(every)


@few
@given(st.integers(3, 5), st.floats(0.0, 10.0), seeds)
def test_laid_copies_are_put_nearly_as_well_as_by_trying_every_order(copies: int, noise: float, seed: int) -> None:
    rng = np.random.default_rng(seed)
    placed = _complex(copies, 12, seed)
    noisy = (placed[rng.permutation(copies)] + noise * rng.standard_normal(placed.shape)).reshape(-1, 3)
    reference, names = placed.reshape(-1, 3), ["A" * 12] * copies
    best = tm_permuted(noisy, reference, names)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(chains, "_BRUTE", 0)
        assert best - 0.01 <= tm_permuted(noisy, reference, names) <= best


@pytest.mark.parametrize("missing", ["prediction", "reference"])
def test_copies_with_missing_residues_find_their_places(missing: str) -> None:
    placed = _complex(8, 12, 5)
    predicted, reference = placed[::-1].reshape(-1, 3).copy(), placed.reshape(-1, 3).copy()
    (predicted if missing == "prediction" else reference)[30:50] = np.nan
    found = permuted(predicted, reference, ["G" * 12] * 8)
    assert tm_score(found, reference) == pytest.approx(76 / 96 if missing == "prediction" else 1.0, abs=1e-4)
    assert np.array_equal(np.sort(found, axis=None), np.sort(predicted, axis=None), equal_nan=True)


def test_eight_copies_are_found_without_trying_every_order() -> None:
    placed = _complex(8, 12, 5)
    predicted = moved(placed[::-1].reshape(-1, 3), 6)
    assert tm_permuted(predicted, placed.reshape(-1, 3), ["G" * 12] * 8) == pytest.approx(1.0, abs=1e-5)
    assert tm_score(predicted, placed.reshape(-1, 3)) < 0.6


def test_other_chains_keep_their_places() -> None:
    placed = _complex(2, 15, 1).reshape(-1, 3)
    swapped = np.concatenate([placed[15:], placed[:15]])
    assert tm_permuted(swapped, placed, ["A" * 15, "C" * 15]) == tm_score(swapped, placed) < 0.9


def test_one_chain_is_scored_as_it_is() -> None:
    (predicted, names), (reference, _) = folded(30, 1), folded(30, 2)
    assert tm_permuted(predicted, reference, [names]) == tm_score(predicted, reference)


def test_chains_that_do_not_make_up_the_trace_are_refused() -> None:
    with pytest.raises(ValueError, match=r"chains of 5 residues, traces \(6, 3\)"):
        permuted(np.zeros((6, 3)), np.zeros((6, 3)), ["AAAAA"])
