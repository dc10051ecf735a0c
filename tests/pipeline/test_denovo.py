"""De novo assembly: loops of known structures are found, turned and placed; nothing held out or later is used."""

from datetime import date

import numpy as np
import polars as pl
import pytest

from pipeline.competitions.ribonanza import RIBONANZA
from pipeline.competitions.rna3d import RNA3D
from pipeline.errors import ConfigError, DataError
from pipeline.paths import Paths
from pipeline.schema import ALPHABET
from pipeline.structure import predict
from pipeline.structure.assembly import trace_from_pairs
from pipeline.structure.denovo import PENALTY, WEIGHTS, Assembly, assemble, choose_assemblies, features, fit_weights
from pipeline.structure.geometry import Frame, double_helix, find_stems, rotation_onto, similarity
from pipeline.structure.motifs import MotifArranger, MotifLibrary, find_loops
from submissions.tm_score import tm_score, tm_scores
from tests.pipeline.dot_bracket import pairs_of

CLOVERLEAF = "(((((((..((((........)))).((((.........)))).....(((((.......))))))))))))...."
INTERNAL = "((((((...((((((.....))))))....))))))"
TILE = "((((((((((((....))))))((((((....))))))..((((((....))))))((((((....))))))((((((....))))))..))))))"
CROSSING = "((((((((((((....))))))((((((....))))))((((((....))))))))))))"


def folded(dots: str, rng: np.random.Generator) -> str:
    """A sequence that pairs as told and, between, in no other way."""
    letters = rng.choice(list("A"), size=len(dots))
    for i, j in pairs_of(dots):
        letters[[i, j]] = list(("GC", "CG")[rng.integers(2)])
    return "".join(letters)


def known(dots: str, seed: int) -> tuple[str, np.ndarray]:
    rng = np.random.default_rng(seed)
    return folded(dots, rng), trace_from_pairs(len(dots), pairs_of(dots), rng)


def assembled(dots: str, sequence: str, library: MotifLibrary, seed: int) -> np.ndarray:
    rng = np.random.default_rng(seed)
    arranger = MotifArranger(library, sequence)
    arranger.start(rng, temperature=0.0)
    return trace_from_pairs(len(dots), pairs_of(dots), rng, arranger=arranger)


# -- frames and loops


def test_relative_and_within_are_each_others_inverse(rng: np.random.Generator) -> None:
    one, other = (Frame(rotation_onto(*rng.standard_normal((2, 9, 3))), rng.standard_normal(3)) for _ in range(2))
    back = one.relative(other).within(other)
    assert np.allclose(back.axes, one.axes)
    assert np.allclose(back.origin, one.origin)
    points = rng.standard_normal((5, 3))
    assert np.allclose(one.local(one.place(points)), points)


def test_every_loop_of_a_structure_is_found_with_its_gaps() -> None:
    sequence, trace = known(CLOVERLEAF, 1)
    gaps = sorted(tuple(len(strand) - 2 for strand in loop.strands) for loop in find_loops(sequence, trace))
    assert gaps == [(2, 1, 5, 0), (7,), (8,), (9,)]


def test_a_structure_without_pairs_or_residues_has_no_loops() -> None:
    assert find_loops("AAAAAA", np.full((6, 3), np.nan)) == []
    assert find_loops("AAAAAA", np.arange(18.0).reshape(6, 3)) == []


def test_a_loop_with_an_unresolved_residue_is_left_out() -> None:
    sequence, trace = known(INTERNAL, 2)
    trace[7] = np.nan
    assert [len(loop.branches) for loop in find_loops(sequence, trace)] == [0]


def test_seeing_a_loop_from_every_branch_in_turn_ends_where_it_began() -> None:
    (loop,) = [each for each in find_loops(*known(CLOVERLEAF, 3)) if each.branches]
    turned = loop
    for _ in range(len(loop.strands)):
        turned = turned.seen_from_branch()
    assert turned.strands == loop.strands
    for again, first in zip(turned.branches, loop.branches, strict=True):
        assert np.allclose(again.axes, first.axes)
        assert np.allclose(again.origin, first.origin)


def test_a_turned_loop_is_the_same_loop_in_space() -> None:
    """Built from either end, an internal loop with its two helices is one shape."""
    sequence, trace = known(INTERNAL, 4)
    (loop,) = [each for each in find_loops(sequence, trace) if each.branches]
    here = Frame(np.eye(3), np.zeros(3))
    turned = loop.seen_from_branch()
    one = np.concatenate([here.place(double_helix(1)[0]), loop.branches[0].place(double_helix(1)[0]), *loop.gaps])
    ends = [frame.place(double_helix(1)[0]) for frame in (turned.branches[0].flipped(), here.flipped())]
    other = np.concatenate([*ends, turned.gaps[1], turned.gaps[0]])
    apart = [np.linalg.norm(each[:, None] - each, axis=-1) for each in (one, other)]
    assert np.allclose(*apart, atol=1e-6)


def test_a_structure_whose_loops_are_known_is_rebuilt() -> None:
    sequence, trace = known(CLOVERLEAF, 5)
    rebuilt = assembled(CLOVERLEAF, sequence, MotifLibrary(find_loops(sequence, trace)), seed=6)
    assert tm_score(rebuilt[:72], trace[:72]) > 0.9
    assert tm_score(assembled(CLOVERLEAF, sequence, MotifLibrary([]), seed=6)[:72], trace[:72]) < 0.9


def test_likeness_prefers_size_then_letters() -> None:
    sequence, trace = known(INTERNAL, 7)
    (loop,) = [each for each in find_loops(sequence, trace) if each.branches]
    other_letter = (loop.strands[0][:-2] + "U" + loop.strands[0][-1], loop.strands[1])
    shorter = (loop.strands[0][:-2] + loop.strands[0][-1], loop.strands[1])
    assert 0.0 == loop.fits(loop.strands) < loop.fits(other_letter) < loop.fits(shorter)
    placed = loop.place(Frame(np.eye(3), np.zeros(3)), shorter)
    assert placed.gaps[0] is None
    assert placed.gaps[1] is not None


@pytest.mark.parametrize("dots", [CROSSING, TILE])
def test_stacks_of_a_tight_junction_lie_side_by_side(dots: str) -> None:
    trace = assembled(dots, folded(dots, np.random.default_rng(8)), MotifLibrary([]), seed=8)
    axis = []
    for stem in find_stems(len(dots), pairs_of(dots)):
        ideal, atoms = double_helix(stem.pairs).reshape(-1, 3), trace[stem.residues]
        axis.append(rotation_onto(ideal - ideal.mean(axis=0), atoms - atoms.mean(axis=0))[2])
    assert (np.abs(np.array(axis) @ axis[0]) > 0.8).all(), "all helices are parallel or antiparallel"


# -- ranking


def test_similarity_is_symmetric_one_for_copies_and_blind_to_motion(rng: np.random.Generator) -> None:
    one, other = (trace_from_pairs(len(CLOVERLEAF), pairs_of(CLOVERLEAF), np.random.default_rng(k)) for k in (0, 1))
    moved = one @ rotation_onto(*rng.standard_normal((2, 9, 3))) + 50.0
    alike = similarity([one, other, moved])
    assert np.allclose(alike, alike.T)
    assert alike[0, 2] == pytest.approx(1.0)
    assert alike[0, 1] == pytest.approx(alike[2, 1])
    assert alike[0, 1] <= tm_score(other, one) + 1e-6 < 1.0


def test_the_regression_finds_the_weights_that_made_the_scores(rng: np.random.Generator) -> None:
    table, weights = rng.standard_normal((400, len(WEIGHTS))), rng.standard_normal(len(WEIGHTS))
    table[:, 0] = 1.0
    found = fit_weights(table, table @ weights, np.repeat(np.arange(40), 10))
    shrunk = weights[1:] / (1 + PENALTY)  # independent features, all alike
    assert np.allclose(found[1:], shrunk, atol=0.02)


def test_chosen_assemblies_are_different_and_the_first_promises_most() -> None:
    sequence = folded(CLOVERLEAF, np.random.default_rng(1))
    structures = [(pairs_of(CLOVERLEAF), 0.9), (pairs_of(CLOVERLEAF)[:11], 0.6)]
    found = assemble(sequence, structures, library=None, rng=np.random.default_rng(2))
    chosen, expected = choose_assemblies(found, count=5)
    assert len(set(chosen)) == 5
    assert expected[chosen[0]] == expected.max()
    assert (np.diff(expected[chosen]) <= 0).all()
    assert features(found, similarity([each.xyz_L3 for each in found])).shape == (len(found), len(WEIGHTS))


def test_features_part_what_tells_targets_apart_from_what_tells_their_assemblies_apart() -> None:
    sequence = folded(CLOVERLEAF, np.random.default_rng(1))
    structures = [(pairs_of(CLOVERLEAF), 0.9), (pairs_of(CLOVERLEAF)[:11], 0.6)]
    found = assemble(sequence, structures, library=None, rng=np.random.default_rng(2))
    table = features(found, similarity([each.xyz_L3 for each in found]))
    own = (len(WEIGHTS) - 3) // 2
    means, deviations = table[:, :-own], table[:, -own:]
    assert np.ptp(means, axis=0).max() == 0.0
    assert np.abs(deviations.mean(axis=0)).max() < 1e-9
    assert (np.ptp(deviations, axis=0) > 0).sum() >= own - 1, "all but the pairs between loops, of which there are none"


def test_the_last_feature_is_1_on_a_line_and_a_third_in_a_ball(rng: np.random.Generator) -> None:
    line = np.outer(np.arange(300.0), [1.0, 2.0, 2.0])
    ball = rng.standard_normal((3000, 3)) * 10.0
    for xyz_L3, elongation in ((line, 1.0), (ball, 1 / 3)):
        found = [Assembly(xyz_L3, [], 0.5, 0.5, 1)]
        assert features(found, np.ones((1, 1)))[0, (len(WEIGHTS) + 3) // 2 - 1] == pytest.approx(elongation, abs=0.04)


# -- the stage

SPLIT = "sim80_k2"


@pytest.fixture
def paths(tmp_path) -> Paths:
    """Six training hairpins with internal loops in two folds, a later one, and two test targets."""
    paths = Paths(comp="rna3d", root=tmp_path / "artifacts")
    rows = []
    for number in range(7):
        sequence, trace = known(INTERNAL, number)
        rows.append([f"{number}ABC_A", sequence, None, *trace.T.astype(np.float32).tolist()])
    schema = {"sequence_id": pl.String, "sequence": pl.String, "temporal_cutoff": pl.Date}
    schema |= dict.fromkeys("xyz", pl.List(pl.Float32))
    table = pl.DataFrame(rows, schema=schema, orient="row").with_columns(scored=pl.lit(True))
    test = table.head(2).select(
        pl.Series("sequence_id", ["Q1", "Q2"]), "sequence", temporal_cutoff=pl.lit(date(2022, 5, 27))
    )
    fold = pl.Series("fold", [k % 2 for k in range(6)], dtype=pl.UInt8)
    tables = {
        paths.clean("train"): table.head(6),
        paths.clean("later"): table.tail(1).with_columns(temporal_cutoff=pl.lit(date(2024, 1, 1))),
        paths.clean("test"): test,
        paths.fold_table(SPLIT): table.head(6).select("sequence_id", fold, cluster="sequence_id"),
    }
    for path, each in tables.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        each.write_parquet(path)
    return paths


def test_the_stage_writes_tables_that_ensembles_take(paths: Paths) -> None:
    report = predict.run(paths, competition=RNA3D, split=SPLIT, score=tm_scores)
    assert report.facts["oof"]["targets"] == 6
    for fold in range(2):
        oof = pl.read_parquet(paths.oof(predict.run_name(SPLIT), fold))
        assert oof.select("sequence_id", "candidate").rows() == [
            (f"{k}ABC_A", m) for k in range(fold, 6, 2) for m in range(1, 6)
        ]
        assert oof["confidence"].is_between(0.0, 1.0).all()
    test = [pl.read_parquet(paths.test(predict.run_name(SPLIT), fold)) for fold in range(2)]
    assert [each["sequence_id"].to_list() for each in test] == [["Q1"] * 3 + ["Q2"] * 3, ["Q1"] * 2 + ["Q2"] * 2]
    assert predict.run(paths, competition=RNA3D, split=SPLIT, score=tm_scores).status == "current"


def test_where_all_score_the_same_the_stage_still_ends_well(paths: Paths) -> None:
    """Of an easy set, or one of equal targets, it ended in a traceback: a correlation of NaN is no JSON."""
    report = predict.run(paths, competition=RNA3D, split=SPLIT, score=lambda pairs: np.full(len(pairs), 0.5))
    assert report.facts["oof"]["correlation"] == 0.0


def test_what_teaches_must_lie_in_two_folds(paths: Paths) -> None:
    """After all its work it ended in a traceback: "need at least one array to concatenate"."""
    table = pl.read_parquet(paths.clean("train"))
    table.with_columns(teaches=pl.Series([k % 2 == 1 for k in range(6)])).write_parquet(paths.clean("train"))
    with pytest.raises(
        DataError, match=r"that teach are all in fold 1 of sim80_k2; expected two folds or more\. Next: "
    ):
        predict.run(paths, competition=RNA3D, split=SPLIT, score=tm_scores)


def test_what_was_learned_predicts_the_same_where_there_is_no_training_data(paths: Paths, tmp_path) -> None:
    predict.run(paths, competition=RNA3D, split=SPLIT, score=tm_scores)
    elsewhere = Paths(comp="rna3d", root=tmp_path / "elsewhere")
    elsewhere.clean("test").parent.mkdir(parents=True)
    elsewhere.clean("test").write_bytes(paths.clean("test").read_bytes())
    name = predict.run_name(SPLIT)
    predict.apply(elsewhere, competition=RNA3D, split=SPLIT, source=paths.run_dir(name))
    for fold in range(2):
        assert pl.read_parquet(elsewhere.test(name, fold)).equals(pl.read_parquet(paths.test(name, fold)))


def test_elsewhere_a_target_too_long_or_too_late_is_left_out_and_the_others_are_not(paths: Paths) -> None:
    predict.run(paths, competition=RNA3D, split=SPLIT, score=tm_scores)
    name, test = predict.run_name(SPLIT), pl.read_parquet(paths.clean("test"))
    long = test.head(1).with_columns(sequence_id=pl.lit("Q0"), sequence=pl.lit("A" * (predict.LONGEST + 1)))
    pl.concat([test, long]).write_parquet(paths.clean("test"))
    elsewhere = Paths(comp="rna3d", root=paths.root.parent / "elsewhere")
    elsewhere.clean("test").parent.mkdir(parents=True)
    elsewhere.clean("test").write_bytes(paths.clean("test").read_bytes())
    learned = {"competition": RNA3D, "split": SPLIT, "source": paths.run_dir(name)}
    report = predict.apply(elsewhere, **learned)
    assert report.facts == {"targets": 3, "left_out": ["Q0"]}
    for fold in range(2):
        assert pl.read_parquet(elsewhere.test(name, fold)).equals(pl.read_parquet(paths.test(name, fold)))
    report = predict.apply(elsewhere, **learned, seconds=0.0)
    assert report.facts == {"targets": 3, "left_out": ["Q0", "Q1", "Q2"]}
    assert predict.describe(report.facts) == ["0 of 3 targets predicted; left out: Q0, Q1, Q2"]
    assert pl.read_parquet(elsewhere.test(name, 0)).height == 0


def test_loops_come_from_other_folds_and_from_before_the_cutoff(paths: Paths) -> None:
    from pipeline.templates.collection import collect

    folds = {f"{k}ABC_A": k % 2 for k in range(6)}
    loops = predict._Loops.of(collect(paths)[0], folds)
    each = len(find_loops(*known(INTERNAL, 0)))
    turned = each + 1  # the internal loop is there from both sides
    assert len(loops.usable(held_out=0, cutoff=None)) == 3 * turned
    assert len(loops.usable(held_out=None, cutoff=None)) == 7 * turned
    by_cutoff = len(loops.usable(held_out=None, cutoff=date(2022, 5, 27)))
    assert by_cutoff == 6 * turned - turned * ("0ABC_A" in folds), "the later one, and one without a date, are not used"
    own = len(loops.usable(held_out=None, cutoff=date(2022, 5, 27), entry="3ABC"))
    assert own == by_cutoff - turned, "part 2's cutoff of a test target is the day of its own entry's release"
    assert len(loops.usable(held_out=None, cutoff=None, entry="3ABC")) == 7 * turned


def test_a_sequence_too_long_is_refused_in_one_sentence(paths: Paths) -> None:
    long = "".join(np.random.default_rng(0).choice(list(ALPHABET), predict.LONGEST + 1))
    target = predict._Target(target_id="R9", sequence=long, cutoff=None, likely=(np.zeros(0, int),) * 3)
    with pytest.raises(DataError, match=r"R9: 10,001 nt; expected at most 10,000\. Next: "):
        predict._assemblies(target, predict._Loops(known=[]), held_out=None)


def test_values_and_foreign_fold_tables_are_refused(paths: Paths) -> None:
    with pytest.raises(ConfigError, match="not about structures"):
        predict.run(paths, competition=RIBONANZA, split=SPLIT, score=tm_scores)
    table = pl.read_parquet(paths.fold_table(SPLIT))
    table.head(5).write_parquet(paths.fold_table(SPLIT))
    with pytest.raises(DataError, match="a fold table from other data"):
        predict.run(paths, competition=RNA3D, split=SPLIT, score=tm_scores)
