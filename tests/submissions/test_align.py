"""Sequence-independent TM-score: laws that hold for any trace, and US-align's own numbers on the shared models."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from submissions.align import tm_aligns
from submissions.score_traces import Pair, read_pairs
from submissions.tm_score import tm_score
from tests.submissions.trace_cases import folded, moved, seeds, tm_align

few = settings(max_examples=12, deadline=None)
lengths = st.integers(5, 70)


@few
@given(lengths, seeds)
def test_a_trace_scores_one_against_itself(length: int, seed: int) -> None:
    trace, names = folded(length, seed)
    assert tm_align(trace, trace, names, names) == pytest.approx(1.0, abs=1e-5)


@few
@given(st.integers(20, 70), seeds)
def test_rigid_motions_change_next_to_nothing(length: int, seed: int) -> None:
    native, names = folded(length, seed)
    model = native + 2.0 * np.random.default_rng(seed).standard_normal(native.shape)
    score = tm_align(model, native, names, names)
    assert 0.0 < score <= 1.0
    assert tm_align(moved(model, seed), moved(native, seed + 1), names, names) == pytest.approx(score, abs=0.03)


@few
@given(st.integers(30, 60), seeds)
def test_a_mirror_image_scores_below_one(length: int, seed: int) -> None:
    trace, names = folded(length, seed)
    assert tm_align(trace * [1.0, 1.0, -1.0], trace, names, names) < 0.7


@few
@given(st.integers(30, 70), st.integers(1, 9), seeds)
def test_residue_numbers_do_not_count(length: int, cut: int, seed: int) -> None:
    """Cut off at both ends and numbered anew, the rest still finds its place; residue matching does not see it."""
    native, names = folded(length, seed)
    part, letters = native[cut : length - 3], names[cut : length - 3]
    expected = (length - 3 - cut) / length
    assert tm_align(moved(part, seed), native, letters, names) == pytest.approx(expected, abs=0.02)
    renumbered = np.full_like(native, np.nan)
    renumbered[: len(part)] = part
    assert tm_score(renumbered, native) < expected


def _odd_traces(length: int, rng: np.random.Generator) -> list[np.ndarray]:
    """[L, 3] Å: random, a point, a line, nothing resolved, two residues, a hairpin, coordinates at a file's limits."""
    two = rng.standard_normal((length, 3))
    two[2:] = np.nan
    return [
        5.0 * rng.standard_normal((length, 3)),
        np.zeros((length, 3)),
        np.arange(length)[:, None] * np.ones(3),
        np.full((length, 3), -1e18),
        two,
        folded(length, length)[0],
        np.clip(9000.0 * rng.standard_normal((length, 3)), -999.999, 9999.999),
    ]


@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 6, 9, 21])
def test_odd_shapes_of_any_two_lengths_and_names_have_a_score(length: int, rng: np.random.Generator) -> None:
    pairs = [
        (model, native, "".join(rng.choice(list("ACGUTNacgu-"), length)), "N" * other)
        for other in (1, 3, 4, 7, 12)
        for model in _odd_traces(length, rng)
        for native in _odd_traces(other, rng)
    ]
    scores = tm_aligns(pairs)
    assert ((scores >= 0.0) & (scores <= 1.0)).all()
    few = [min(np.isfinite(x).all(axis=1).sum(), np.isfinite(y).all(axis=1).sum()) < 3 for x, y, *_ in pairs]
    assert (scores[np.array(few)] == 0.0).all()


@few
@given(st.integers(30, 60), seeds)
def test_missing_residues_cost_their_share_of_the_native(length: int, seed: int) -> None:
    native, names = folded(length, seed)
    model, short = native.copy(), native.copy()
    model[:10] = np.nan
    short[length - 8 :] = -1e18
    assert tm_align(model, native, names, names) == pytest.approx((length - 10) / length, abs=1e-4)
    assert tm_align(native, short, names, names) == pytest.approx(1.0, abs=1e-4)


@pytest.mark.parametrize("resolved", [0, 1, 2])
def test_two_residues_score_nothing(resolved: int) -> None:
    trace, names = folded(20, 1)
    rest = trace.copy()
    rest[resolved:] = np.nan
    assert tm_align(rest, trace, names, names) == tm_align(trace, rest, names, names) == 0.0


def test_pairs_are_scored_the_same_alone_and_together() -> None:
    pairs = []
    for length in (9, 44, 3, 61):
        (model, names), (native, _) = folded(length, length), folded(length, length + 1)
        pairs.append((model, native, names, names))
    assert tm_aligns(pairs).tolist() == [tm_align(*pair) for pair in pairs]
    assert tm_aligns([]).shape == (0,)


@pytest.mark.parametrize("shape", ["line", "point", "far"])
def test_degenerate_models_score_low_and_finite(shape: str) -> None:
    native, names = folded(50, 3)
    model = {
        "line": np.arange(50.0)[:, None] * np.array([5.9, 0.0, 0.0]),
        "point": np.full((50, 3), 4.0),
        "far": 9999.0 * np.random.default_rng(0).standard_normal((50, 3)),
    }[shape]
    assert 0.0 <= tm_align(model, native, names, names) < 0.4


def test_names_that_do_not_fit_are_refused() -> None:
    trace, names = folded(12, 0)
    with pytest.raises(ValueError, match=r"got a trace \(12, 3\) and 11 names"):
        tm_align(trace, trace, names[1:], names)


@pytest.mark.shared
def test_usalign_is_reproduced_on_the_shared_models(shared_data: Callable[[str], Path]) -> None:
    """The shorter is not always the lower score of the two modes, in US-align's own numbers: no law between them."""
    home = shared_data("tm-score")
    expected = pl.read_parquet(home / "models.parquet").sort("model_id")
    pairs = read_pairs(home)
    by_length = sorted(range(len(pairs)), key=lambda place: len(pairs[place].names))
    chosen = by_length[:: len(by_length) // 60]
    stored = expected["tm_usalign_c1_seqindep"].to_numpy()[chosen]
    difference = tm_aligns([_free(pairs[place]) for place in chosen]) - stored
    assert np.abs(difference).max() <= 0.0002
    stored_all = expected["tm_usalign_c1_seqindep"].to_numpy() - expected["tm_usalign_c1_byresi"].to_numpy()
    assert stored_all.min() < -0.01


@pytest.mark.shared
def test_residue_names_matter(shared_data: Callable[[str], Path]) -> None:
    pairs = read_pairs(shared_data("tm-score"))[::40]
    named = tm_aligns([_free(pair) for pair in pairs])
    nameless = tm_aligns([(pair.model_L3, pair.native_L3, *["N" * len(pair.names)] * 2) for pair in pairs])
    assert np.abs(named - nameless).max() > 0.005


def _free(pair: Pair) -> tuple[np.ndarray, np.ndarray, str, str]:
    return pair.model_L3, pair.native_L3, pair.names, pair.names
