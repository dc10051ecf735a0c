"""Templates: the date gate holds, alignments are optimal, copied residues stay, expected scores are honest."""

import itertools
import json
import re
import shutil
from collections.abc import Callable
from dataclasses import asdict, replace
from datetime import date, timedelta
from functools import cache
from pathlib import Path

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from folds import ensemble
from pipeline.competitions.ribonanza import RIBONANZA
from pipeline.competitions.rna3d import RNA3D
from pipeline.errors import ConfigError, DataError
from pipeline.paths import Paths
from pipeline.schema import ALPHABET, encode
from pipeline.stage import sha256_file, write_json
from pipeline.structure.assembly import trace_from_pairs
from pipeline.structure.geometry import helix_strand
from pipeline.templates import predict, search
from pipeline.templates.align import Costs, align_all, letter_scores, state_scores
from pipeline.templates.gate import allowed, allowed_mask, released_by
from pipeline.templates.msa import find_alignments, read_profiles
from pipeline.templates.pairs import pairs_from_trace
from pipeline.templates.ranker import Calibration, Ranker, reliability
from pipeline.templates.search import FEATURES, Library, Target, find_matches
from pipeline.templates.transfer import complete, refine, transfer
from submissions.tm_score import tm_scores

DAYS = st.dates(date(2000, 1, 1), date(2025, 12, 31))
HAIRPIN = [(i, 25 - i) for i in range(10)]
BRANCHED = [(i, 39 - i) for i in range(5)] + [(6 + i, 19 - i) for i in range(5)] + [(22 + i, 34 - i) for i in range(4)]


def folded(rng: np.random.Generator, pairs: list[tuple[int, int]], length: int) -> str:
    """A random sequence that can form the pairs."""
    letters = rng.choice(list(ALPHABET), size=length)
    for i, j in pairs:
        letters[[i, j]] = list(("GC", "CG", "AU", "UA")[rng.integers(4)])
    return "".join(letters)


def mutated(rng: np.random.Generator, sequence: str, pairs: list[tuple[int, int]], share: float) -> str:
    """A relative: some letters changed, the pairs kept."""
    other = folded(rng, pairs, len(sequence))
    partner = dict(pairs) | {j: i for i, j in pairs}
    letters = list(sequence)
    for i in range(len(letters)):
        if rng.random() < share:
            letters[i] = other[i]
            if i in partner:
                letters[partner[i]] = other[partner[i]]
    return "".join(letters)


@cache
def family_library() -> tuple[list[str], list[str], list[np.ndarray]]:
    """Twelve chains of two families."""
    rng = np.random.default_rng(7)
    ids, sequences, traces = [], [], []
    for family, (pairs, length) in enumerate(((HAIRPIN, 26), (BRANCHED, 40))):
        root, shape_L3 = folded(rng, pairs, length), trace_from_pairs(length, pairs, rng)
        for member in range(6):
            ids.append(f"T{family}{member}_A")
            sequences.append(mutated(rng, root, pairs, 0.3))
            traces.append(shape_L3 + 0.1 * rng.standard_normal(shape_L3.shape))
    return ids, sequences, traces


@cache
def undated_library() -> Library:
    ids, sequences, traces = family_library()
    return Library.of(ids, sequences, traces, dates=[None] * 12, folds=[-1] * 12)


# --- the gate ---


@given(cutoff=DAYS, released=DAYS)
def test_a_target_may_use_what_was_released_up_to_its_cutoff(cutoff: date, released: date) -> None:
    assert allowed(cutoff, released) == (released <= cutoff)
    assert allowed(None, released)
    assert not allowed(cutoff, None)


@given(cutoff=st.none() | DAYS, days=st.lists(st.none() | DAYS, max_size=8))
def test_the_gate_for_many_is_the_gate_for_each(cutoff: date | None, days: list[date | None]) -> None:
    dates_N = np.array([day or "NaT" for day in days], dtype="datetime64[D]")
    assert allowed_mask(cutoff, dates_N).tolist() == [allowed(cutoff, day) for day in days]


@pytest.mark.shared
def test_no_official_target_is_newer_than_its_block_of_ids_says(shared_data: Callable[[str], Path]) -> None:
    table = pl.read_parquet(shared_data("stanford-rna-3d-folding") / "official_train_sequences.parquet")
    told = table.select("target_id", pl.col("temporal_cutoff").str.to_date()).iter_rows()
    known = [(by, day) for name, day in told if (by := released_by(name))]
    assert len(known) == 725
    assert all(day <= by for by, day in known)


@settings(max_examples=40, deadline=None)
@given(cutoff=DAYS, days=st.lists(st.none() | DAYS, min_size=12, max_size=12), number=st.integers(0, 11))
def test_no_template_is_newer_than_its_targets_cutoff(cutoff: date, days: list[date | None], number: int) -> None:
    """Every template that the gate lets through is found, and none that it does not."""
    sequences = family_library()[1]
    library = replace(undated_library(), dates_N=np.array([day or "NaT" for day in days], dtype="datetime64[D]"))
    target = Target.of("query", sequences[number], cutoff=cutoff)
    found = {match.template for match in find_matches(target, library, np.ones(12, dtype=bool))}
    assert found == {n for n, day in enumerate(days) if day is not None and day <= cutoff}


@pytest.mark.parametrize("name", ["9g4p", "9G4P", "9G4P_X"])
def test_no_template_is_of_its_targets_own_entry(name: str) -> None:
    """Part 2 gives as cutoff of a test target the day on which its entry was released, so that the entry passed."""
    day = np.full(12, date(2025, 7, 30), dtype="datetime64[D]")
    ids = tuple(f"9g4{letter}_A" for letter in "PpQRSTUVWXYZ")
    library, sequence = replace(undated_library(), dates_N=day, ids=ids), family_library()[1][0]
    every, folds = np.ones(12, dtype=bool), {None: set(range(12)), date(2025, 7, 30): set(range(2, 12))}
    for cutoff, expected in folds.items():
        found = find_matches(Target.of(name, sequence, cutoff=cutoff), library, every)
        assert {match.template for match in found} == expected


# --- alignment ---


def slow_score(scores_LM: np.ndarray, costs: Costs, mode: str) -> float:
    """The best alignment among all there are."""
    rows, columns = scores_LM.shape

    def gap(count: int) -> float:
        return costs.gap_open + costs.gap_extend * count if count else 0.0

    def end(a: int, b: int) -> float:
        if a and b:
            return min(costs.end_extend * a + gap(b), costs.end_extend * b + gap(a))
        return costs.end_extend * (a + b)

    best = 0.0 if mode == "local" else -costs.end_extend * (rows + columns)
    for size in range(1, min(rows, columns) + 1):
        for i in itertools.combinations(range(rows), size):
            for j in itertools.combinations(range(columns), size):
                value = sum(scores_LM[a, b] for a, b in zip(i, j, strict=True))
                for k in range(size - 1):
                    value -= gap(i[k + 1] - i[k] - 1) + gap(j[k + 1] - j[k] - 1)
                if mode == "global":
                    value -= end(i[0], j[0]) + end(rows - 1 - i[-1], columns - 1 - j[-1])
                best = max(best, value)
    return float(best)


@pytest.mark.parametrize("mode", ["global", "local"])
def test_alignments_are_the_best_of_all(rng: np.random.Generator, mode: str) -> None:
    costs = Costs(gap_open=1.0, gap_extend=0.3, end_extend=0.15)
    for _ in range(30):
        rows, sizes = int(rng.integers(1, 6)), rng.integers(1, 6, 4)
        letters_L4 = letter_scores(rng.dirichlet(np.ones(4), rows), costs)
        states_L3 = state_scores(rng.dirichlet(np.ones(3), rows), costs)
        tokens_T, state_T = rng.integers(0, 4, sizes.sum()), rng.integers(0, 3, sizes.sum())
        offsets = np.concatenate([[0], np.cumsum(sizes)])
        score_N, partner_NL = align_all(letters_L4, states_L3, tokens_T, state_T, offsets, mode=mode, costs=costs)
        for n in range(4):
            part = slice(offsets[n], offsets[n + 1])
            scores_LM = letters_L4[:, tokens_T[part]] + states_L3[:, state_T[part]]
            assert score_N[n] == pytest.approx(slow_score(scores_LM, costs, mode), abs=1e-5)
            aligned = partner_NL[n][partner_NL[n] >= 0]
            assert (np.diff(aligned) > 0).all()
            assert (aligned < sizes[n]).all()


def test_a_sequence_aligns_with_itself_residue_by_residue(rng: np.random.Generator) -> None:
    sequence = folded(rng, BRANCHED, 40)
    target = Target.of("query", sequence)
    tokens_L = encode(sequence)
    _, partner_NL = align_all(
        letter_scores(target.profile_L4, Costs()),
        state_scores(target.states, Costs()),
        tokens_L,
        np.zeros(40, dtype=np.uint8),
        np.array([0, 40]),
        mode="global",
        costs=Costs(),
    )
    assert partner_NL[0].tolist() == list(range(40))


# --- geometry ---


@pytest.mark.parametrize(("pairs", "length"), [(HAIRPIN, 26), (BRANCHED, 40)])
def test_pairs_of_a_fold_are_read_from_its_trace(
    rng: np.random.Generator, pairs: list[tuple[int, int]], length: int
) -> None:
    sequence = folded(rng, pairs, length)
    partner_L = pairs_from_trace(sequence, trace_from_pairs(length, pairs, rng))
    assert {(i, int(j)) for i, j in enumerate(partner_L) if j > i} >= set(pairs)
    assert (partner_L[partner_L[partner_L >= 0]] == np.flatnonzero(partner_L >= 0)).all()


def test_a_line_has_no_pairs_and_unresolved_residues_have_none(rng: np.random.Generator) -> None:
    line_L3 = np.arange(20)[:, None] * np.array([5.9, 0.0, 0.0])
    assert (pairs_from_trace("GC" * 10, line_L3) < 0).all()
    trace_L3 = trace_from_pairs(26, HAIRPIN, rng)
    trace_L3[:13] = np.nan
    assert (pairs_from_trace(folded(rng, HAIRPIN, 26), trace_L3) < 0).all()


def test_missing_pieces_come_from_the_other_trace_and_the_rest_stays(rng: np.random.Generator) -> None:
    """Where both traces are one shape, turned and shifted, the gaps are filled as they were."""
    whole_L3 = trace_from_pairs(40, BRANCHED, rng)
    turn, _ = np.linalg.qr(rng.standard_normal((3, 3)))
    turn *= np.sign(np.linalg.det(turn))
    copied_L3 = whole_L3 @ turn + 50.0
    for gap in (slice(0, 4), slice(12, 20), slice(37, 40)):
        copied_L3[gap] = np.nan
    filled_L3 = complete(copied_L3, whole_L3)
    np.testing.assert_allclose(filled_L3, whole_L3 @ turn + 50.0, atol=1e-6)
    known_L = np.isfinite(copied_L3[:, 0])
    assert (filled_L3[known_L] == copied_L3[known_L]).all()


def test_a_piece_that_is_too_short_for_its_gap_is_drawn_out_evenly() -> None:
    line_L3 = 5.9 * np.arange(20)[:, None] * np.array([0.6, 0.0, 0.8])
    copied_L3 = line_L3 + 3.0
    copied_L3[12:] += [5.4, 0.0, 7.2]
    copied_L3[8:12] = np.nan
    steps = np.linalg.norm(np.diff(complete(copied_L3, line_L3), axis=0), axis=1)
    np.testing.assert_allclose(steps, 5.9 + np.where((np.arange(19) >= 7) & (np.arange(19) < 12), 9.0 / 5, 0.0))


def test_torn_chains_and_clashes_are_mended(rng: np.random.Generator) -> None:
    trace_L3 = np.delete(trace_from_pairs(40, BRANCHED, rng), slice(18, 21), axis=0)
    trace_L3[10] = trace_L3[30] + 0.5
    mended_L3 = refine(trace_L3, np.ones(37, dtype=bool), [])
    steps = np.linalg.norm(np.diff(mended_L3, axis=0), axis=1)
    assert steps.min() > 4.9
    assert steps.max() < 7.0
    apart = np.linalg.norm(mended_L3[:, None] - mended_L3, axis=-1)
    assert apart[np.triu_indices(37, 2)].min() > 4.9


def test_a_helix_that_was_torn_to_bridge_a_gap_is_bent_back_with_the_rest() -> None:
    """Held rigid, its steps of 43 Å threw the chain 1e37 Å apart: the match leaves out a domain of its template."""
    pairs = [(k, 26 - k) for k in range(8)] + [(9, 17), (10, 16)]
    copied_L3, there = np.full((27, 3), np.nan), [2, 7, 12, 13, 14, 23]
    copied_L3[there] = helix_strand(27)[there]
    copied_L3[:8] += [0.0, 250.0, 0.0]
    xyz_L3 = complete(copied_L3, trace_from_pairs(27, pairs, np.random.default_rng(0)))
    assert np.linalg.norm(xyz_L3[10] - xyz_L3[9]) > 40.0
    steps = np.linalg.norm(np.diff(refine(xyz_L3, np.isin(np.arange(27), there), pairs), axis=0), axis=1)
    assert steps.max() < 8.0


def test_transfer_copies_along_the_alignment_and_leaves_gaps() -> None:
    xyz_M3 = helix_strand(5)
    xyz_M3[3] = np.nan
    copied_L3 = transfer(np.array([-1, 0, 2, 3]), xyz_M3)
    assert np.isnan(copied_L3[:, 0]).tolist() == [True, False, False, True]
    assert (copied_L3[1:3] == xyz_M3[[0, 2]]).all()


# --- search ---


def test_a_relative_is_found_before_strangers_and_its_fold_is_copied() -> None:
    ids, sequences, traces = family_library()
    library = Library.of(ids, sequences, traces, dates=[None] * 12, folds=range(12))
    for number, (sequence, trace_L3) in enumerate(zip(sequences, traces, strict=True)):
        matches = find_matches(Target.of("query", sequence), library, library.folds_N != number)
        assert all(match.features_F.shape == (len(FEATURES),) for match in matches)
        assert number not in {match.template for match in matches}
        best = max(matches, key=lambda match: match.features_F[1])
        assert best.template // 6 == number // 6
        assert tm_scores([(best.xyz_L3, trace_L3)])[0] > 0.5


def test_of_a_large_library_relatives_and_chains_of_like_length_are_aligned(
    monkeypatch: pytest.MonkeyPatch, rng: np.random.Generator
) -> None:
    library, sequences = undated_library(), family_library()[1]
    target = Target.of("query", sequences[8])
    shared_N = library.shared_words(target.tokens)
    words = [{sequence[k : k + 6] for k in range(len(sequence) - 5)} for sequence in sequences]
    assert shared_N.tolist() == [len(words[8] & other) for other in words]
    monkeypatch.setattr(search, "_ALIGNED", 2)
    found = {match.template for match in find_matches(target, library, np.ones(12, dtype=bool))}
    most = set(np.argsort(-shared_N / np.sqrt(library.lengths), kind="stable")[:2].tolist())
    assert most <= found
    assert found - most <= {6, 7}  # the first of those that are as long as the target


def test_features_are_finite_for_any_target(rng: np.random.Generator) -> None:
    library = undated_library()
    for length in (1, 3, 4, 11, 90):
        target = Target.of("query", "".join(rng.choice(list(ALPHABET), size=length)))
        matches = list(find_matches(target, library, np.ones(12, dtype=bool)))
        assert bool(matches) == (length > 1)
        for match in matches:
            assert np.isfinite(match.features_F).all()
            assert np.isfinite(match.xyz_L3).all()
            assert match.xyz_L3.shape == (length, 3)


# --- expected scores ---


def test_the_ranker_learns_a_smooth_function_and_the_calibration_its_scale(rng: np.random.Generator) -> None:
    features_NF = rng.standard_normal((3000, 4))
    true_N = 1 / (1 + np.exp(-features_NF[:, 0] - 0.5 * features_NF[:, 1] * features_NF[:, 2]))
    tm_N = np.clip(true_N + 0.05 * rng.standard_normal(3000), 0, 1)
    ranker = Ranker.fit(features_NF[:2000], tm_N[:2000], np.arange(2000) // 20)
    calibration = Calibration.fit(ranker.predict(features_NF[:2000]), tm_N[:2000])
    expected_N = calibration.expected(ranker.predict(features_NF[2000:]))
    told = reliability(expected_N, tm_N[2000:])
    assert told["correlation"] > 0.95
    assert told["calibration_error"] < 0.03
    kept = json.loads(json.dumps(asdict(ranker), default=np.ndarray.tolist))
    again = Ranker(**{name: np.array(values) for name, values in kept.items()})
    assert (again.predict(features_NF) == ranker.predict(features_NF)).all()


@given(st.lists(st.tuples(st.floats(-5, 5), st.floats(0, 1)), min_size=1, max_size=80))
def test_a_calibration_never_falls_and_keeps_the_mean(points: list[tuple[float, float]]) -> None:
    score_N, tm_N = np.array(points).T
    calibration = Calibration.fit(score_N, tm_N, least=1)
    assert (np.diff(calibration.expected(np.linspace(-6, 6, 50))) >= -1e-12).all()
    assert (np.diff(calibration.tm_K) > 0).all()
    assert calibration.tm_K.min() - 1e-9 <= tm_N.mean() <= calibration.tm_K.max() + 1e-9


# --- alignments of relatives ---


def test_profiles_mix_the_own_letter_with_the_relatives(tmp_path: Path) -> None:
    (tmp_path / "R1.MSA.fasta").write_text(">R1\nGAC\n>a\nGaaUC\n>b\n-UN\n")
    files = find_alignments(tmp_path, ["R1", "R2"])
    profile_L4 = read_profiles(files, {"R1": "GAC", "R2": "A"})["R1"]
    np.testing.assert_allclose(profile_L4.sum(axis=1), 1.0)
    np.testing.assert_allclose(profile_L4[1], [0.5 + 0.5 / 3, 0, 0, 0.5 * 2 / 3])
    table = pl.DataFrame({"target_id": ["R1", "R2"], "msa": [["GAC", "GaaUC", "-UN"], None]})
    table.write_parquet(tmp_path / "msa.parquet")
    again = read_profiles(find_alignments(tmp_path / "msa.parquet", ["R1"]), {"R1": "GAC"})["R1"]
    assert (again == profile_L4).all()


@pytest.mark.parametrize(
    "text",
    [
        b">R1\nGNC\n>a RNA 5'->3' of x > y\nGUC\n",  # "row 2 has 0 aligned columns": cut at every >
        b">R1\r\nGNC\r\n>caf\xe9\r\nGUC\r\n",  # "not readable as FASTA"
    ],
)
def test_titles_may_hold_any_sign_and_a_target_odd_letters(tmp_path: Path, text: bytes) -> None:
    """Where a target has a letter other than ACGU, its alignment was "of another sequence"."""
    (tmp_path / "R1.MSA.fasta").write_bytes(text)
    profile_L4 = read_profiles(find_alignments(tmp_path, ["R1"]), {"R1": "GAC"})["R1"]
    np.testing.assert_allclose(profile_L4, [[0, 0, 1, 0], [0.5, 0, 0, 0.5], [0, 1, 0, 0]])


def test_an_alignment_of_another_sequence_is_left_out_with_a_warning(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "R1.MSA.fasta").write_text(">R1\nGACU\n>a\nGACC\n")
    assert read_profiles(find_alignments(tmp_path, ["R1"]), {"R1": "GAC"}) == {}
    assert "1 alignments are of another sequence than their target's" in capsys.readouterr().err


def test_a_damaged_alignment_is_refused(tmp_path: Path) -> None:
    (tmp_path / "R1.MSA.fasta").write_text(">R1\nGAC\n>a\nGACC\n")
    with pytest.raises(DataError, match=r"R1\.MSA\.fasta \(R1\): row 2 has 4 aligned columns; expected 3"):
        read_profiles(find_alignments(tmp_path, ["R1"]), {"R1": "GAC"})
    with pytest.raises(DataError, match="no such folder"):
        find_alignments(tmp_path / "absent", ["R1"])


# --- the run ---

FOLDS = 3
SPLIT = "sim80_k3"
RUN = predict.run_name(SPLIT)


def write_tables(paths: Paths, *, cutoff: date | None = date(2020, 1, 1), newest: date = date(2019, 1, 1)) -> None:
    """Families of which each fold holds two members; one test target of each, and one that may use nothing."""
    rng = np.random.default_rng(3)
    rows, test = [], []
    for family in range(4):
        pairs, length = ((HAIRPIN, 26), (BRANCHED, 40))[family % 2]
        root, shape_L3 = folded(rng, pairs, length), trace_from_pairs(length, pairs, rng)
        for member in range(2 * FOLDS):
            xyz_L3 = shape_L3 + 0.1 * rng.standard_normal(shape_L3.shape)
            rows.append(
                {
                    "sequence_id": f"f{family}m{member}",
                    "sequence": mutated(rng, root, pairs, 0.5),
                    "temporal_cutoff": None if member % 2 else newest - timedelta(days=member),
                    "scored": True,
                    **{axis: xyz_L3[:, k].tolist() for k, axis in enumerate("xyz")},
                    "fold": member % FOLDS,
                }
            )
        test.append(
            {"sequence_id": f"q{family}", "sequence": mutated(rng, root, pairs, 0.5), "temporal_cutoff": cutoff}
        )
    test.append({"sequence_id": "q9", "sequence": "GGGAAACCC", "temporal_cutoff": date(1990, 1, 1)})
    train = pl.DataFrame(rows, schema_overrides={"temporal_cutoff": pl.Date}).sort("sequence_id")
    tables = {"train": train.drop("fold"), "later": train.drop("fold").clear()}
    tables["test"] = pl.DataFrame(test, schema_overrides={"temporal_cutoff": pl.Date})
    folds = train.select("sequence_id", pl.col("fold").cast(pl.UInt8), pl.col("sequence_id").alias("cluster"))
    for path, table in [(paths.clean(name), table) for name, table in tables.items()] + [
        (paths.fold_table(SPLIT), folds)
    ]:
        path.parent.mkdir(parents=True, exist_ok=True)
        table.write_parquet(path)


def run(paths: Paths) -> dict:
    return predict.run(paths, competition=RNA3D, split=SPLIT, score=tm_scores).facts


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Paths, dict]:
    paths = Paths(comp="rna3d", root=tmp_path_factory.mktemp("templates"))
    write_tables(paths)
    return paths, run(paths)


def test_every_fold_gets_tables_like_a_networks(finished: tuple[Paths, dict]) -> None:
    paths, facts = finished
    held_out = dict(pl.read_parquet(paths.fold_table(SPLIT)).select("sequence_id", "fold").iter_rows())
    for fold in range(FOLDS):
        oof = pl.read_parquet(paths.oof(RUN, fold))
        assert oof.columns == ["sequence_id", "fold", "candidate", "confidence", "x", "y", "z"]
        assert oof.equals(oof.sort("sequence_id", "candidate"))
        assert all(held_out[name] == fold for name in oof["sequence_id"])
        assert oof["confidence"].is_between(0, 1).all()
        assert oof["x"].list.eval(pl.element().is_finite()).list.all().all()
        assert "fold" not in pl.read_parquet(paths.test(RUN, fold)).columns
    assert facts["oof"]["best_of_five"] > 0.5
    assert facts["test"]["templates"]["q9"] == {"usable": 0, "best": "none", "expected": 0.0}
    assert len(predict.describe(facts)) == 4 + 5


def test_test_candidates_are_dealt_to_the_folds_without_copies(finished: tuple[Paths, dict]) -> None:
    paths, _ = finished
    tables = [pl.read_parquet(paths.test(RUN, fold)) for fold in range(FOLDS)]
    dealt = pl.concat(tables).filter(pl.col("sequence_id") == "q0")
    assert dealt.height == 12  # templates with a date; none is used twice
    assert dealt["x"].list.get(0).n_unique() == dealt.height
    best = [table.filter(pl.col("sequence_id") == "q0")["confidence"].max() for table in tables]
    assert best == sorted(best, reverse=True)


def test_an_ensemble_takes_the_run_as_it_is(finished: tuple[Paths, dict]) -> None:
    paths, facts = finished
    report = ensemble.run(paths, competition=RNA3D, name="pool", runs=[RUN], split=SPLIT)
    assert report.facts["test_rows"] == 4 * 5
    assert report.facts["oof_rows"] == sum(pl.read_parquet(paths.oof(RUN, fold)).height for fold in range(FOLDS))
    assert facts["oof"]["with_template"] == 20  # of 24: the cutoffs of four are before all dates of the other folds


def test_two_runs_are_identical_and_a_third_is_current(finished: tuple[Paths, dict], tmp_path: Path) -> None:
    paths, _ = finished
    again = Paths(comp="rna3d", root=tmp_path)
    write_tables(again)
    run(again)
    for fold in range(FOLDS):
        assert sha256_file(again.oof(RUN, fold)) == sha256_file(paths.oof(RUN, fold))
        assert sha256_file(again.test(RUN, fold)) == sha256_file(paths.test(RUN, fold))
    assert predict.run(paths, competition=RNA3D, split=SPLIT, score=tm_scores).status == "current"


def test_alignments_that_a_run_was_given_are_kept_until_it_is_told_otherwise(
    finished: tuple[Paths, dict], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """`make train-all` made templates anew without the alignments that `make templates-predict MSA=…` had used."""
    paths = Paths(comp="rna3d", root=tmp_path)
    shutil.copytree(finished[0].home, paths.home, ignore=shutil.ignore_patterns("runs"))
    made = []

    def stage(name: str, *, inputs: dict, manifest: Path, notes: dict | None, **_: object) -> None:
        made.append(sum(label.startswith("msa/") for label in inputs))
        write_json(manifest, {"facts": {}, "inputs": dict.fromkeys(inputs), **({"notes": notes} if notes else {})})

    monkeypatch.setattr(predict, "run_stage", stage)
    alignments = tmp_path / "msa.parquet"
    pl.DataFrame({"target_id": ["R1"], "msa": [["GAC"]]}).write_parquet(alignments)
    manifest = paths.run_dir(RUN) / "templates-predict.manifest.json"
    for msa in (None, alignments, None, Path("none"), None, alignments):
        predict.run(paths, competition=RNA3D, split=SPLIT, score=tm_scores, msa=msa)
    assert made == [0, 1, 1, 0, 0, 1]
    alignments.unlink()
    with pytest.raises(
        DataError, match=rf"of {re.escape(str(alignments))}, which is not there; .* MSA=<folder>, or MSA=none"
    ):
        predict.run(paths, competition=RNA3D, split=SPLIT, score=tm_scores)
    write_json(manifest, {"facts": {}, "inputs": {"msa/all": None}})  # of the versions before
    with pytest.raises(
        DataError, match=r"made with alignments; expected them again\. Next: make templates-predict COMP="
    ):
        predict.run(paths, competition=RNA3D, split=SPLIT, score=tm_scores)


def test_the_library_and_ranker_of_a_run_give_the_same_test_tables_elsewhere(
    finished: tuple[Paths, dict], tmp_path: Path
) -> None:
    paths, _ = finished
    bare = Paths(comp="rna3d", root=tmp_path)
    bare.clean("test").parent.mkdir(parents=True)
    bare.clean("test").write_bytes(paths.clean("test").read_bytes())
    predict.apply(bare, competition=RNA3D, split=SPLIT, source=paths.run_dir(RUN))
    for fold in range(FOLDS):
        assert sha256_file(bare.test(RUN, fold)) == sha256_file(paths.test(RUN, fold))


def test_elsewhere_no_target_is_begun_when_the_time_is_up(finished: tuple[Paths, dict], tmp_path: Path) -> None:
    paths, _ = finished
    bare = Paths(comp="rna3d", root=tmp_path)
    bare.clean("test").parent.mkdir(parents=True)
    bare.clean("test").write_bytes(paths.clean("test").read_bytes())
    facts = predict.apply(bare, competition=RNA3D, split=SPLIT, source=paths.run_dir(RUN), seconds=0.0).facts
    assert facts["left_out"] == sorted(pl.read_parquet(bare.clean("test"))["sequence_id"])
    assert f"0 of {facts['targets']} targets predicted" in predict.describe(facts)[0]
    assert pl.read_parquet(bare.test(RUN, 0)).height == 0


def test_elsewhere_the_date_gate_holds_for_targets_that_nobody_has_seen(
    finished: tuple[Paths, dict], tmp_path: Path
) -> None:
    """The cutoff is that of the test table there, not of the one here."""
    paths, _ = finished
    bare = Paths(comp="rna3d", root=tmp_path)
    bare.clean("test").parent.mkdir(parents=True)
    hidden = pl.read_parquet(paths.clean("test")).with_columns(temporal_cutoff=pl.lit(date(1990, 1, 1)))
    hidden.write_parquet(bare.clean("test"))
    told = predict.apply(bare, competition=RNA3D, split=SPLIT, source=paths.run_dir(RUN)).facts["test"]["templates"]
    assert {(each["usable"], each["best"]) for each in told.values()} == {(0, "none")}
    assert all(pl.read_parquet(bare.test(RUN, fold)).height == 0 for fold in range(FOLDS))


def test_templates_newer_than_all_cutoffs_leave_the_test_targets_without_any(tmp_path: Path) -> None:
    paths = Paths(comp="rna3d", root=tmp_path)
    write_tables(paths, cutoff=date(2018, 6, 1))
    told = run(paths)["test"]["templates"]
    assert {each["best"] for each in told.values()} == {"none"}
    assert pl.read_parquet(paths.test(RUN, 0)).height == 0


def test_a_chain_from_elsewhere_that_is_the_held_out_target_is_no_template_for_it(tmp_path: Path) -> None:
    """The same structures under other names would be found by every target out of fold."""
    paths = Paths(comp="rna3d", root=tmp_path)
    write_tables(paths)
    before = run(paths)
    train = pl.read_parquet(paths.clean("train"))
    copies = train.select(
        pl.concat_str(pl.lit("9ABC_"), "sequence_id").alias("template_id"),
        "sequence",
        pl.lit(date(2001, 1, 1)).alias("released"),
        pl.lit(2.0).alias("resolution"),
        *"xyz",
    )
    path = paths.home / "templates" / "library.parquet"
    path.parent.mkdir(parents=True)
    copies.write_parquet(path)
    after = run(paths)
    assert after["library"]["library"] == train.height
    assert after["oof"]["best_of_five"] < 0.99
    assert after["oof"]["best_of_five"] < before["oof"]["best_of_five"] + 0.1


def test_other_competitions_and_other_folds_are_refused(finished: tuple[Paths, dict], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="ribonanza is not about structures"):
        predict.run(finished[0], competition=RIBONANZA, split=SPLIT, score=tm_scores)
    paths = Paths(comp="rna3d", root=tmp_path)
    write_tables(paths)
    pl.read_parquet(paths.fold_table(SPLIT)).head(5).write_parquet(paths.fold_table(SPLIT))
    with pytest.raises(DataError, match="a fold table from other data"):
        run(paths)


def test_two_folds_are_enough(tmp_path: Path) -> None:
    paths = Paths(comp="rna3d", root=tmp_path)
    write_tables(paths)
    table = pl.read_parquet(paths.fold_table(SPLIT))
    table.with_columns(pl.col("fold") % 2).write_parquet(paths.fold_table(SPLIT))
    assert run(paths)["oof"]["best_of_five"] > 0.4


def test_no_usable_template_at_all_is_refused(tmp_path: Path) -> None:
    paths = Paths(comp="rna3d", root=tmp_path)
    write_tables(paths)
    train = pl.read_parquet(paths.clean("train")).with_columns(temporal_cutoff=pl.lit(date(1980, 1, 1)))
    lone = train.with_columns(temporal_cutoff=pl.lit(date(1980, 1, 1)) + pl.duration(days=-pl.int_range(pl.len())))
    lone.head(1).write_parquet(paths.clean("train"))
    pl.read_parquet(paths.fold_table(SPLIT)).head(1).write_parquet(paths.fold_table(SPLIT))
    with pytest.raises(DataError, match="fewer than two folds have a training target with a usable template"):
        run(paths)


def test_templates_that_cover_less_than_half_of_every_target_are_refused(tmp_path: Path) -> None:
    """It said: ValueError: number sections must be larger than 0."""
    paths = Paths(comp="rna3d", root=tmp_path)
    write_tables(paths)
    train = pl.read_parquet(paths.clean("train"))
    train.with_columns(
        pl.concat_list(pl.col(axis).list.head(10), pl.lit([None] * 30, pl.List(pl.Float64)))
        .list.head(pl.col(axis).list.len())
        .alias(axis)
        for axis in "xyz"
    ).write_parquet(paths.clean("train"))
    with pytest.raises(DataError, match="no training target has a template that covers 50% of it"):
        run(paths)
