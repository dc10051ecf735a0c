"""TM-score: laws that hold for any trace, a slow twin, and US-align's own numbers on the shared models."""

from collections.abc import Callable
from pathlib import Path

import numba
import numpy as np
import polars as pl
import pytest

from pipeline.structure.assembly import trace_from_pairs
from pipeline.structure.geometry import Frame, helix_strand, rotation_onto
from submissions.tm_score import d0_rna, tm_matrix, tm_score, tm_scores


def _trace(length: int, rng: np.random.Generator) -> np.ndarray:
    """A compact walk with C1' steps."""
    steps = rng.standard_normal((length, 3))
    return np.cumsum(5.9 * steps / np.linalg.norm(steps, axis=1, keepdims=True), axis=0)


def _rotation(rng: np.random.Generator) -> np.ndarray:
    return rotation_onto(*rng.standard_normal((2, 8, 3)))


@pytest.mark.parametrize("length", [3, 4, 5, 17, 80, 200])
def test_a_trace_scores_one_against_itself(length: int, rng: np.random.Generator) -> None:
    trace = _trace(length, rng)
    assert tm_score(trace, trace) == pytest.approx(1.0, abs=1e-9)


@pytest.mark.parametrize("length", [12, 75, 160])
def test_rigid_motions_change_nothing(length: int, rng: np.random.Generator) -> None:
    reference = _trace(length, rng)
    predicted = reference + 3.0 * rng.standard_normal(reference.shape)
    score = tm_score(predicted, reference)
    assert 0.0 < score < 1.0
    moved = tm_score(predicted @ _rotation(rng) + 500.0, reference @ _rotation(rng) - 80.0)
    assert moved == pytest.approx(score, abs=2e-4)


def test_a_mirror_image_scores_below_one() -> None:
    trace = trace_from_pairs(60, [(i, 59 - i) for i in range(26)], np.random.default_rng(5))
    assert tm_score(trace, trace) == pytest.approx(1.0)
    assert tm_score(trace * [1.0, 1.0, -1.0], trace) < 0.5


def test_noise_lowers_the_score(rng: np.random.Generator) -> None:
    reference = _trace(100, rng)
    noise = rng.standard_normal(reference.shape)
    scores = [tm_score(reference + size * noise, reference) for size in (0.0, 1.0, 3.0, 6.0)]
    assert scores == sorted(scores, reverse=True)


def test_residues_missing_in_the_prediction_cost_their_share(rng: np.random.Generator) -> None:
    reference = _trace(90, rng)
    predicted = reference.copy()
    predicted[:30] = np.nan
    assert tm_score(predicted, reference) == pytest.approx(60 / 90)


def test_residues_missing_in_the_reference_shorten_it(rng: np.random.Generator) -> None:
    reference = _trace(90, rng)
    noisy = reference + rng.standard_normal(reference.shape)
    cut = reference.copy()
    cut[40:55] = np.nan
    kept = np.isfinite(cut[:, 0])
    assert tm_score(noisy, cut) == pytest.approx(tm_score(noisy[kept], reference[kept]))
    assert tm_score(reference, cut) == pytest.approx(1.0)


@pytest.mark.parametrize("sentinel", [-1e18, -1e6, 1e6, 1e30])
def test_sentinels_are_missing_residues(sentinel: float, rng: np.random.Generator) -> None:
    reference = _trace(50, rng)
    blank, marked = reference.copy(), reference.copy()
    blank[20:30], marked[20:30] = np.nan, sentinel
    assert tm_score(marked, reference) == tm_score(blank, reference) < 0.81
    assert tm_score(reference, marked) == tm_score(reference, blank) == pytest.approx(1.0)


@pytest.mark.parametrize("resolved", [0, 1, 2])
def test_two_residues_in_common_score_nothing(resolved: int, rng: np.random.Generator) -> None:
    trace = _trace(20, rng)
    few = trace.copy()
    few[resolved:] = np.nan
    assert tm_score(few, trace) == tm_score(trace, few) == 0.0


def test_d0_grows_with_length() -> None:
    d0 = [d0_rna(length) for length in range(1, 5000)]
    assert d0 == sorted(d0)
    assert d0_rna(29) == 0.7 < d0_rna(30) < 0.8


def test_no_length_has_no_d0() -> None:
    with pytest.raises(ValueError, match="got length 0; expected at least 1"):
        d0_rna(0)


@pytest.mark.parametrize("degenerate", ["line", "point", "far"])
def test_degenerate_predictions_score_low_and_finite(degenerate: str, rng: np.random.Generator) -> None:
    reference = _trace(50, rng)
    predicted = {
        "line": np.arange(50.0)[:, None] * np.array([5.9, 0.0, 0.0]),
        "point": np.full((50, 3), 4.0),
        "far": 9999.0 * rng.standard_normal((50, 3)),
    }[degenerate]
    assert 0.0 < tm_score(predicted, reference) < 0.3


def test_the_best_candidate_against_the_best_reference_counts(rng: np.random.Generator) -> None:
    references = np.stack([_trace(40, rng) for _ in range(3)])
    candidates = np.stack([_trace(40, rng), references[2] + 0.1, _trace(40, rng)])
    scores = tm_matrix(candidates, references)
    assert scores.shape == (3, 3)
    assert scores.argmax() == 1 * 3 + 2
    assert scores.max() == pytest.approx(1.0)


def test_pairs_are_scored_the_same_alone_and_together(rng: np.random.Generator) -> None:
    pairs = [(_trace(length, rng), _trace(length, rng)) for length in (9, 64, 31, 3)]
    assert tm_scores(pairs).tolist() == [tm_score(*pair) for pair in pairs]
    assert tm_scores([]).shape == (0,)


def test_the_number_of_threads_changes_nothing(rng: np.random.Generator) -> None:
    pairs = [(_trace(length, rng), _trace(length, rng)) for length in range(5, 40)]
    together = tm_scores(pairs)
    before = numba.get_num_threads()
    numba.set_num_threads(1)
    try:
        assert tm_scores(pairs).tolist() == together.tolist()
    finally:
        numba.set_num_threads(before)


def test_unequal_traces_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got \(4, 3\) and \(5, 3\)"):
        tm_score(np.zeros((4, 3)), np.zeros((5, 3)))


def _tm_score_ref(predicted: np.ndarray, reference: np.ndarray) -> float:
    """US-align's search, step by step, with an SVD for each superposition: the slow twin."""
    length = len(reference)
    d0 = d0_rna(length)
    near, best = min(max(d0, 4.5), 8.0), 0.0
    fragments = dict.fromkeys(min(length, max(4, length // 2**level)) for level in (*range(5), length))
    for fragment in fragments:
        for start in range(length - fragment + 1):
            chosen, cutoff = np.arange(start, start + fragment), near - 1.0
            for _ in range(21):
                centre, target = predicted[chosen].mean(axis=0), reference[chosen].mean(axis=0)
                rotation = rotation_onto(predicted[chosen] - centre, reference[chosen] - target)
                distance = np.linalg.norm((predicted - centre) @ rotation + target - reference, axis=1)
                best = max(best, float(np.sum(1 / (1 + (distance / d0) ** 2))) / length)
                within = cutoff
                while np.sum(distance < within) < 3:
                    within += 0.5
                before, chosen = chosen, np.flatnonzero(distance < within)
                if np.array_equal(before, chosen) and cutoff > near:
                    break
                cutoff = near + 1.0
    return best


@pytest.mark.parametrize("length", [8, 35, 61])
def test_the_search_equals_its_slow_twin(length: int, rng: np.random.Generator) -> None:
    reference = _trace(length, rng)
    for predicted in (_trace(length, rng), reference + 4.0 * rng.standard_normal(reference.shape)):
        assert tm_score(predicted, reference) == pytest.approx(_tm_score_ref(predicted, reference), abs=1e-6)


@pytest.mark.parametrize("length", range(3, 11))
def test_short_chains_score_as_by_the_slow_twin(length: int, rng: np.random.Generator) -> None:
    """Subsets that US-align leaves out are left out here: its score is the competition's, not the optimum."""
    reference = _trace(length, rng)
    for predicted in (_trace(length, rng), reference + 2.0 * rng.standard_normal(reference.shape)):
        assert tm_score(predicted, reference) == pytest.approx(_tm_score_ref(predicted, reference), abs=1e-5)


def _odd(shape: str, trace_L3: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """A trace that no molecule has, [L, 3] Å."""
    length = len(trace_L3)
    if shape == "mirrored":
        return trace_L3 * [1.0, 1.0, -1.0]
    if shape == "reversed":
        return trace_L3[::-1]
    if shape == "shuffled":
        return rng.permutation(trace_L3)
    if shape == "flat":
        return trace_L3 * [1.0, 1.0, 0.0]
    if shape == "line":
        return np.arange(length)[:, None] * np.array([5.9, 0.0, 0.0])
    if shape == "point":
        return np.zeros((length, 3))
    turned = trace_L3 @ _rotation(rng) + 30.0
    first = np.arange(length) % 2 == 0 if shape == "interleaved" else np.arange(length) < length // 2
    return np.where(first[:, None], trace_L3, turned)


@pytest.mark.parametrize("side", ["predicted", "known"])
@pytest.mark.parametrize(
    "shape", ["mirrored", "reversed", "shuffled", "flat", "line", "point", "interleaved", "two domains"]
)
def test_odd_shapes_score_as_by_the_slow_twin(shape: str, side: str, rng: np.random.Generator) -> None:
    trace = trace_from_pairs(26, [(i, 25 - i) for i in range(10)], rng)
    odd = _odd(shape, trace, rng)
    pair = (odd, trace) if side == "predicted" else (trace, odd)
    assert tm_score(*pair) == pytest.approx(_tm_score_ref(*pair), abs=1e-5)


def test_the_score_is_no_less_than_that_of_the_global_superposition(rng: np.random.Generator) -> None:
    reference = helix_strand(70)
    predicted = reference + 5.0 * rng.standard_normal(reference.shape)
    distance = np.linalg.norm(Frame.fitted(predicted, reference).place(predicted) - reference, axis=1)
    assert tm_score(predicted, reference) >= np.mean(1 / (1 + (distance / d0_rna(70)) ** 2)) - 1e-12


@pytest.mark.shared
def test_usalign_is_reproduced_on_the_shared_models(shared_data: Callable[[str], Path]) -> None:
    home = shared_data("tm-score")
    models = pl.read_parquet(home / "models.parquet").sort("model_id").sample(400, seed=7)
    natives = _by_key(pl.read_parquet(home / "native_traces.parquet"), ["benchmark", "target"])
    traces = _by_key(pl.read_parquet(home / "model_traces.parquet"), ["model_id"])
    pairs = [
        _same_residues(traces[(row["model_id"],)], natives[row["benchmark"], row["target"]])
        for row in models.iter_rows(named=True)
    ]
    difference = tm_scores(pairs) - models["tm_usalign_c1_byresi"].to_numpy()
    assert np.abs(difference).mean() <= 0.0002
    assert np.mean(difference < -0.002) <= 0.001
    assert difference.max() <= 0.005


def _by_key(traces: pl.DataFrame, key: list[str]) -> dict[tuple, pl.DataFrame]:
    return {name: part for name, part in traces.group_by(key, maintain_order=True)}


def _same_residues(model: pl.DataFrame, native: pl.DataFrame) -> tuple[np.ndarray, np.ndarray]:
    length = max(int(model["resid"].to_numpy().max()), int(native["resid"].to_numpy().max())) + 1
    both = np.full((2, length, 3), np.nan)
    for slot, part in enumerate((model, native)):
        both[slot, part["resid"].to_numpy()] = part.select("x", "y", "z").to_numpy()
    return both[0], both[1]
