"""Structure prediction: A-form geometry, nested structures, and candidates from pairing and from distances."""

import itertools
from collections.abc import Callable, Iterable
from pathlib import Path

import numpy as np
import pytest

from models.heads import distance_bins
from pipeline.competitions.rna3d import RNA3D
from pipeline.structure.assembly import trace_from_pairs
from pipeline.structure.fold3d import candidates_from_distogram, draw_structures
from pipeline.structure.geometry import double_helix, find_stems, handedness, helix_strand, rotation_onto
from pipeline.structure.rigid import close_pairs, fit_helices, relax
from pipeline.structure.secondary import nested_pairs, probable_pairs, stacking_pairs
from tests.pipeline.dot_bracket import pairs_of

TRNA = "GCGGAUUUAGCUCAGUUGGGAGAGCGCCAGACUGAAGAUCUGGAGGUCCUGUGUUCGAUCCACAGAAUUCGCACCA"
CLOVERLEAF = "(((((((..((((........)))).((((.........)))).....(((((.......))))))))))))...."
SHAPES = {
    "hairpin": "((((((....))))))",
    "no pairs": "......................",
    "bulge": "((((((..((((((....))))))))))))",
    "internal loop": "((((((...(((((......)))))....)))))).....",
    "tight loops": "(.)((.))((..))",
    "lone pairs": "(..(..(..(...)..)..)..)",
    "three-way": "((((((..((((((....))))))..((((((.....))))))..))))))",
    "neighbours": "((((....))))((((....))))..((((....))))",
    "cloverleaf": CLOVERLEAF,
}


def _bpp(dots: str, probability: float = 0.95) -> np.ndarray:
    bpp_LL = np.zeros((len(dots), len(dots)), dtype=np.float32)
    for i, j in pairs_of(dots):
        bpp_LL[i, j] = bpp_LL[j, i] = probability
    return bpp_LL


def _rmsd(mobile: np.ndarray, fixed: np.ndarray) -> float:
    mobile, fixed = mobile - mobile.mean(axis=0), fixed - fixed.mean(axis=0)
    return float(np.sqrt(np.mean(np.sum((mobile @ rotation_onto(mobile, fixed) - fixed) ** 2, axis=1))))


def _logits(trace: np.ndarray, *, bins: int = 31, width: float = 1.5) -> np.ndarray:
    """What a network that knows the trace's distances to within `width` Å would say."""
    distance_LL1 = np.linalg.norm(trace[:, None] - trace, axis=-1)[..., None]
    centres = np.array(distance_bins(bins).centres)
    return (-(((np.minimum(distance_LL1, centres[-1]) - centres) / width) ** 2) / 2).astype(np.float32)


# --- geometry ---


def test_an_ideal_helix_has_the_distances_of_a_form_rna() -> None:
    strand, partner = double_helix(12)
    assert np.allclose(np.linalg.norm(strand - partner, axis=1), 10.6, atol=0.1)
    assert np.allclose(np.linalg.norm(np.diff(strand, axis=0), axis=1), 5.45, atol=0.05)
    # medians over helices of the PDB, three steps apart: within a strand, across the minor and the major groove
    assert np.linalg.norm(strand[3] - strand[0]) == pytest.approx(15.0, abs=0.6)
    assert np.linalg.norm(strand[3] - partner[0]) == pytest.approx(10.8, abs=0.6)
    assert np.linalg.norm(strand[0] - partner[3]) == pytest.approx(17.8, abs=0.6)


def test_handedness_tells_a_helix_from_its_mirror_image(rng: np.random.Generator) -> None:
    helix = helix_strand(10) @ rotation_onto(*rng.standard_normal((2, 8, 3))) + 40.0
    assert (handedness(helix) > 0.2).all()
    assert np.allclose(handedness(-helix), -handedness(helix))


def test_handedness_of_a_line_or_a_gap_is_nan() -> None:
    line = np.arange(5.0)[:, None] * np.ones(3)
    assert np.isnan(handedness(line)).all()
    helix = helix_strand(8)
    helix[4] = np.nan
    assert np.isnan(handedness(helix)).tolist() == [False, True, True, True, True]


@pytest.mark.parametrize("shape", SHAPES)
def test_a_trace_has_the_chain_and_the_helices_of_its_structure(shape: str) -> None:
    dots, pairs = SHAPES[shape], pairs_of(SHAPES[shape])
    for seed in range(3):
        trace = trace_from_pairs(len(dots), pairs, np.random.default_rng(seed))
        assert trace.shape == (len(dots), 3)
        assert np.isfinite(trace).all()
        steps = np.linalg.norm(np.diff(trace, axis=0), axis=1)
        assert 4.5 < steps.min() <= steps.max() < 7.6
        apart = np.linalg.norm(trace[:, None] - trace, axis=-1)[np.triu_indices(len(dots), 2)]
        assert apart.min() > 3.5
        for stem in find_stems(len(dots), pairs):
            own = np.arange(stem.pairs)
            both = np.concatenate([trace[stem.i + own], trace[stem.j - own]])
            assert _rmsd(both, double_helix(stem.pairs).reshape(-1, 3)) < 0.5


def test_helices_of_a_trace_are_right_handed() -> None:
    trace = trace_from_pairs(len(TRNA), pairs_of(CLOVERLEAF), np.random.default_rng(1))
    for stem in find_stems(len(TRNA), pairs_of(CLOVERLEAF)):
        assert (handedness(trace[stem.i : stem.i + stem.pairs]) > 0.1).all()


def test_equal_generators_give_equal_traces_and_others_do_not() -> None:
    first, again, other = (
        trace_from_pairs(len(TRNA), pairs_of(CLOVERLEAF), np.random.default_rng(seed)) for seed in (3, 3, 4)
    )
    assert np.array_equal(first, again)
    assert _rmsd(first, other) > 2.0


def test_a_helix_goes_on_across_a_symmetric_internal_loop() -> None:
    trace = trace_from_pairs(40, pairs_of("((((((((...((((((......))))))...))))))))"), np.random.default_rng(0))
    stems = np.r_[0:8, 11:17, 23:29, 32:40]
    helix = double_helix(17)
    ideal = np.concatenate([helix[0, :8], helix[0, 11:17], helix[1, 11:17][::-1], helix[1, :8][::-1]])
    assert _rmsd(trace[stems], ideal) < 0.1


def test_neighbouring_hairpins_can_stack_on_one_axis() -> None:
    """Two arms without a residue between them are, in some draw, one continuous helix."""
    dots = "((((((....))))))((((((....))))))"
    helix = double_helix(12)
    # the second arm's strand runs on where the first arm's partner strand ends
    ideal = np.concatenate([helix[0, 6:], helix[1, 6:][::-1], helix[1, :6][::-1], helix[0, :6]])
    arms = np.r_[0:6, 10:16, 16:22, 26:32]
    apart = [_rmsd(trace_from_pairs(32, pairs_of(dots), np.random.default_rng(s))[arms], ideal) for s in range(4)]
    assert min(apart) < 0.1


@pytest.mark.parametrize(
    ("pairs", "sentence"),
    [
        ([(0, 10), (5, 15)], "crosses another"),
        ([(0, 10), (0, 12)], "has a partner already"),
        ([(4, 5)], "expected 0 <= i, i [+] 1 < j"),
        ([(3, 20)], "j < 20"),
        ([(-1, 8)], "expected 0 <= i"),
    ],
)
def test_pairs_that_are_no_nested_structure_are_refused(pairs: list[tuple[int, int]], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        trace_from_pairs(20, pairs, np.random.default_rng(0))


def test_a_rotation_onto_another_set_is_proper(rng: np.random.Generator) -> None:
    mobile, fixed = rng.standard_normal((2, 6, 9, 3))
    assert np.allclose(np.linalg.det(rotation_onto(mobile, fixed)), 1.0)


def test_close_pairs_are_those_of_a_full_comparison(rng: np.random.Generator) -> None:
    xyz = 15.0 * rng.standard_normal((120, 3))
    i, j = np.triu_indices(120, 1)
    near = np.linalg.norm(xyz[i] - xyz[j], axis=1) < 9.0
    assert np.array_equal(close_pairs(xyz, 9.0), np.stack([i[near], j[near]]))


def test_relaxation_closes_the_chain_and_keeps_helices_rigid() -> None:
    strand, partner = double_helix(8)
    loop = np.linspace(strand[-1], partner[-1], 6)[1:-1] * [1.6, 1.6, 1.0]
    torn = (
        np.concatenate([strand, loop, partner[::-1]]) + np.r_[np.zeros((8, 3)), np.full((4, 3), 9.0), np.zeros((8, 3))]
    )
    body = np.r_[0:8, 12:20]
    tidy = relax(torn, [body])
    assert _rmsd(tidy[body], torn[body]) < 1e-6
    steps = np.linalg.norm(np.diff(tidy, axis=0), axis=1)
    assert steps.max() < 6.9 < np.linalg.norm(np.diff(torn, axis=0), axis=1).max()


def test_helices_fit_a_fold_better_than_its_mirror_image() -> None:
    pairs = pairs_of(CLOVERLEAF)
    trace = trace_from_pairs(len(TRNA), pairs, np.random.default_rng(2))
    stems = find_stems(len(TRNA), pairs)
    assert fit_helices(trace, stems)[1] < 0.5 < 1.0 < fit_helices(-trace, stems)[1]


# --- secondary structure ---


def test_the_nested_structure_is_the_best_of_all(rng: np.random.Generator) -> None:
    length = 12
    for _ in range(20):
        candidates = [(i, j) for i, j in itertools.combinations(range(length), 2) if j - i > 3]
        chosen = sorted(candidates[k] for k in rng.choice(len(candidates), 7, replace=False))
        probability = rng.uniform(0.2, 0.9, 7)
        i, j = np.array(chosen).T
        paired = np.bincount(i, probability, length) + np.bincount(j, probability, length)
        gain = 2 * probability - np.maximum(1 - paired, 0)[i] - np.maximum(1 - paired, 0)[j]
        subsets = itertools.chain(*(itertools.combinations(range(7), size) for size in range(8)))
        best = max(_total(subset, gain) for subset in subsets if _is_nested([chosen[k] for k in subset]))
        found = nested_pairs(length, i, j, probability)
        assert _is_nested(found)
        assert _total([chosen.index(pair) for pair in found], gain) == pytest.approx(best, abs=1e-5)


def _total(subset: Iterable[int], gain: np.ndarray) -> float:
    return float(sum(gain[k] for k in subset))


def _is_nested(pairs: list[tuple[int, int]]) -> bool:
    flat = [residue for pair in pairs for residue in pair]
    crossing = any(a < c < b < d for (a, b), (c, d) in itertools.permutations(pairs, 2))
    return len(set(flat)) == len(flat) and not crossing


@pytest.mark.parametrize("shape", SHAPES)
def test_a_certain_structure_is_found_again(shape: str) -> None:
    pairs = [(i, j) for i, j in pairs_of(SHAPES[shape]) if j - i > 3]
    found = nested_pairs(len(SHAPES[shape]), *probable_pairs(_bpp(SHAPES[shape])))
    assert found == pairs


def test_stacking_finds_the_arms_of_a_stable_hairpin() -> None:
    sequence = "AAAA" + "GGGCACC" + "GAAA" + "GGUGCCC" + "AAAA"
    found = nested_pairs(len(sequence), *stacking_pairs(sequence))
    assert found == [(4 + k, 21 - k) for k in range(7)]


def test_stacking_leaves_a_sequence_that_cannot_pair_alone() -> None:
    assert not stacking_pairs("A" * 50)[0].size


def test_drawn_structures_differ_where_they_can(rng: np.random.Generator) -> None:
    bpp = _bpp(CLOVERLEAF, 0.6)
    drawn = draw_structures(len(CLOVERLEAF), *probable_pairs(bpp), count=5, rng=rng)
    assert drawn[0] == pairs_of(CLOVERLEAF)
    assert len({tuple(pairs) for pairs in drawn}) == 5


# --- candidates ---


@pytest.mark.parametrize("length", [1, 2, 3, 4, 7, 30])
@pytest.mark.parametrize("given", ["nothing", "bpp", "distances", "both"])
def test_candidates_are_finite_centred_and_sorted_whatever_is_given(length: int, given: str) -> None:
    sequence = (TRNA + TRNA)[:length]
    bpp = np.zeros((length, length), dtype=np.float32) if given in ("bpp", "both") else None
    logits = np.zeros((length, length, 31), dtype=np.float32) if given in ("distances", "both") else None
    xyz, confidence = candidates_from_distogram(logits, sequence=sequence, bpp_LL=bpp, seed=1)
    assert xyz.shape == (5, length, 3)
    assert np.isfinite(xyz).all()
    assert np.allclose(xyz.mean(axis=1), 0.0, atol=1e-6)
    assert ((confidence >= 0) & (confidence <= 1)).all()
    assert (np.diff(confidence) <= 0).all()


@pytest.mark.parametrize("count", [1, 2, 7])
@pytest.mark.parametrize("length", [20, 40])
def test_as_many_candidates_come_as_were_asked_for(count: int, length: int) -> None:
    flat = np.zeros((length, length, 31), dtype=np.float32)
    xyz, confidence = candidates_from_distogram(flat, sequence=TRNA[:length], bpp_LL=None, count=count, seed=1)
    assert (len(xyz), len(confidence)) == (count, count)


@pytest.mark.parametrize("with_distances", [False, True])
def test_equal_seeds_give_equal_candidates_and_others_do_not(with_distances: bool) -> None:
    trace = trace_from_pairs(len(TRNA), pairs_of(CLOVERLEAF), np.random.default_rng(0))
    logits = _logits(trace, width=6.0) if with_distances else None
    first, again, other = (
        candidates_from_distogram(logits, sequence=TRNA, bpp_LL=_bpp(CLOVERLEAF, 0.7), seed=seed) for seed in (5, 5, 6)
    )
    assert np.array_equal(first[0], again[0])
    assert np.array_equal(first[1], again[1])
    assert not np.allclose(first[0], other[0])


def test_candidates_of_a_branched_molecule_differ_from_each_other() -> None:
    xyz, _ = candidates_from_distogram(None, sequence=TRNA, bpp_LL=_bpp(CLOVERLEAF, 0.7), seed=2)
    assert min(_rmsd(a, b) for a, b in itertools.combinations(xyz, 2)) > 1.0


@pytest.mark.parametrize("with_bpp", [False, True])
def test_known_distances_give_the_fold_and_not_its_mirror_image(with_bpp: bool) -> None:
    trace = trace_from_pairs(len(TRNA), pairs_of(CLOVERLEAF), np.random.default_rng(8))
    bpp = _bpp(CLOVERLEAF) if with_bpp else None
    xyz, confidence = candidates_from_distogram(_logits(trace), sequence=TRNA, bpp_LL=bpp, seed=3)
    assert _rmsd(xyz[0], trace) < 2.0
    assert _rmsd(xyz[0], -trace) > 5.0
    assert confidence[0] > 0.9


def test_distances_overrule_a_helix_that_they_contradict() -> None:
    trace = trace_from_pairs(len(TRNA), [], np.random.default_rng(0))  # one long strand, nothing paired
    xyz, _ = candidates_from_distogram(_logits(trace), sequence=TRNA, bpp_LL=_bpp(CLOVERLEAF), seed=3)
    assert np.linalg.norm(xyz[0, 0] - xyz[0, 71]) > 100.0


def test_a_network_that_knows_nothing_leaves_the_assemblies_among_the_candidates() -> None:
    flat = np.zeros((len(TRNA), len(TRNA), 31), dtype=np.float32)
    xyz, _ = candidates_from_distogram(flat, sequence=TRNA, bpp_LL=_bpp(CLOVERLEAF), seed=4)
    own = np.arange(7)
    arm = np.concatenate([own, 71 - own])
    ideal = double_helix(7).reshape(-1, 3)
    assert sum(_rmsd(candidate[arm], ideal) < 0.2 for candidate in xyz) >= 2


def test_confidence_without_distances_grows_with_the_certainty_of_pairing() -> None:
    first = [
        candidates_from_distogram(None, sequence=TRNA, bpp_LL=_bpp(CLOVERLEAF, sure), seed=0)[1][0]
        for sure in (0.3, 0.6, 0.95)
    ]
    assert 0.0 < first[0] < first[1] < first[2] < 1.0


def test_a_chain_of_thousands_is_folded(rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pipeline.structure.fold3d._STRUCTURES", (2, 2))  # two assemblies of each, not eight of three
    monkeypatch.setattr("pipeline.structure.denovo._ASSEMBLED_RESIDUES", 8_000)
    sequence = "".join(rng.choice(list("ACGU"), 2000))
    xyz, _ = candidates_from_distogram(None, sequence=sequence, bpp_LL=None, count=1, seed=0)
    steps = np.linalg.norm(np.diff(xyz[0], axis=0), axis=1)
    assert 4.0 < steps.min() <= steps.max() < 9.0


@pytest.mark.parametrize(
    ("logits", "bpp", "sentence"),
    [
        (np.zeros((4, 4, 31)), None, r"logits_LLK is \(4, 4, 31\); expected L = 5"),
        (np.zeros((5, 5)), None, r"logits_LLK is \(5, 5\)"),
        (np.full((5, 5, 31), np.nan), None, "logits_LLK holds a value that is not finite"),
        (None, np.zeros((5, 4)), r"bpp_LL is \(5, 4\)"),
        (None, np.full((5, 5), np.inf), "bpp_LL holds a value that is not finite"),
    ],
)
def test_arrays_that_do_not_fit_are_refused(logits: np.ndarray | None, bpp: np.ndarray | None, sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        candidates_from_distogram(logits, sequence="GGACC", bpp_LL=bpp, seed=0)


def test_an_empty_sequence_is_refused() -> None:
    with pytest.raises(ValueError, match="empty sequence"):
        candidates_from_distogram(None, sequence="", bpp_LL=None, seed=0)


@pytest.mark.shared
def test_folding_from_sequence_alone_beats_every_trivial_shape_on_the_shared_targets(
    shared_data: Callable[[str], Path], tmp_path: Path
) -> None:
    import polars as pl

    from submissions.structure_scores import trivial_shapes
    from submissions.tm_score import tm_matrix

    out = {table: tmp_path / f"{table}.parquet" for table in RNA3D.tables}
    RNA3D.clean(RNA3D.raw_files(shared_data("stanford-rna-3d-folding")), out)
    train = pl.read_parquet(out["train"]).filter(pl.col("sequence").str.len_chars().is_between(30, 200))
    scores: dict[str, list[float]] = {}
    for row in train.sample(12, seed=1).iter_rows(named=True):
        truth = np.array([row[axis] for axis in "xyz"], dtype=float).T[None]
        folded, _ = candidates_from_distogram(None, sequence=row["sequence"], bpp_LL=None, seed=0)
        for name, traces in ({"folded": folded} | trivial_shapes(len(row["sequence"]))).items():
            scores.setdefault(name, []).append(float(tm_matrix(traces, truth).max()))
    mean = {name: float(np.mean(values)) for name, values in scores.items()}
    folded_mean = mean.pop("folded")
    assert folded_mean > 1.2 * max(mean.values()), (folded_mean, mean)
