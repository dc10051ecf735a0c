"""Structure evaluation: the best candidate counts, floors stand beside it, and tables that do not fit are refused."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from pipeline import runlog
from pipeline.competitions.rna3d import RNA3D
from pipeline.errors import DataError
from pipeline.paths import Paths
from pipeline.structure.assembly import trace_from_pairs
from submissions import align, engines, usalign
from submissions import tm_score as matching
from submissions.engines import choose_engine
from submissions.structure_scores import describe, evaluate_structure, trivial_shapes
from submissions.tm_score import tm_score
from tests.submissions.trace_cases import folded, moved, tm_align, usalign_script


def _row(target: str, key: str, number: int, xyz_L3: np.ndarray) -> dict[str, object]:
    lists = [[None if np.isnan(value) else float(value) for value in column] for column in xyz_L3.T]
    return {"sequence_id": target, key: number} | dict(zip("xyz", lists, strict=True))


@pytest.fixture
def truth(rng: np.random.Generator) -> dict[str, np.ndarray]:
    """Two known targets, of which the second has two conformations."""
    pairs = [(i, 39 - i) for i in range(17)]
    return {
        "1SCL_A": trace_from_pairs(40, pairs, rng)[None],
        "R1117v2": np.stack([trace_from_pairs(33, [], rng), trace_from_pairs(33, [(3, 30), (4, 29)], rng)]),
    }


def _write(
    folder: Path, truth: dict[str, np.ndarray], predicted: dict[str, np.ndarray], **extra: object
) -> tuple[Paths, Path]:
    paths = Paths(comp="rna3d", root=folder)
    paths.clean("references").parent.mkdir(parents=True)
    known = [_row(name, "conformer", r + 1, xyz) for name, all_ in truth.items() for r, xyz in enumerate(all_)]
    pl.DataFrame(known).write_parquet(paths.clean("references"))
    rows = [_row(name, "candidate", m + 1, xyz) for name, all_ in predicted.items() for m, xyz in enumerate(all_)]
    pl.DataFrame([row | extra for row in rows]).write_parquet(folder / "oof.parquet")
    return paths, folder / "oof.parquet"


def test_the_truth_among_the_candidates_scores_one(tmp_path: Path, truth: dict[str, np.ndarray]) -> None:
    predicted = {
        "1SCL_A": np.stack([np.cumsum(np.ones((40, 3)), axis=0), truth["1SCL_A"][0] + 9.0]),
        "R1117v2": np.stack([truth["R1117v2"][1] - 4.0, np.cumsum(np.ones((33, 3)), axis=0)]),
    }
    paths, table = _write(tmp_path, truth, predicted, confidence=0.5)
    scores = evaluate_structure(paths, competition=RNA3D, predictions=table)
    assert scores["score"] == pytest.approx(1.0)
    assert [row["candidate"] for row in scores["targets"]] == [2, 1]
    assert [row["references"] for row in scores["targets"]] == [1, 2]
    assert scores["first_candidate"] < 0.7
    assert json.loads(json.dumps(scores, allow_nan=False)) == scores


def test_known_sequences_name_the_residues(tmp_path: Path, truth: dict[str, np.ndarray]) -> None:
    """Their letters decide which residues can pair, and with that US-align's alignment."""
    predicted = {"1SCL_A": trivial_shapes(40)["random walks"]}
    paths, table = _write(tmp_path, {"1SCL_A": truth["1SCL_A"]}, predicted)
    sequence = "GGCC" * 10
    pl.DataFrame({"sequence_id": ["1SCL_A"], "sequence": [sequence]}).write_parquet(paths.clean("test"))
    independent = evaluate_structure(paths, competition=RNA3D, predictions=table)["sequence_independent"]
    expected = max(tm_align(trace, truth["1SCL_A"][0], sequence, sequence) for trace in predicted["1SCL_A"])
    assert independent["unnamed"] == []
    assert independent["score"] == pytest.approx(expected)


def test_floors_are_those_of_the_trivial_shapes(tmp_path: Path, truth: dict[str, np.ndarray]) -> None:
    paths, table = _write(tmp_path, {"a": truth["1SCL_A"]}, {"a": truth["1SCL_A"]})
    floors = evaluate_structure(paths, competition=RNA3D, predictions=table)["floors"]
    for name, shapes in trivial_shapes(40).items():
        assert floors[name] == pytest.approx(max(tm_score(shape, truth["1SCL_A"][0]) for shape in shapes))
    assert floors["straight line"] < floors["hairpin"]


def test_unresolved_residues_shorten_the_reference(tmp_path: Path, truth: dict[str, np.ndarray]) -> None:
    cut = truth["1SCL_A"].copy()
    cut[0, :10] = np.nan
    paths, table = _write(tmp_path, {"1SCL_A": cut}, {"1SCL_A": truth["1SCL_A"]})
    row = evaluate_structure(paths, competition=RNA3D, predictions=table)["targets"][0]
    assert (row["length"], row["resolved"]) == (40, 30)
    assert row["score"] == pytest.approx(1.0)


def test_targets_without_a_known_structure_are_named_not_scored(tmp_path: Path, truth: dict[str, np.ndarray]) -> None:
    paths, table = _write(tmp_path, {"1SCL_A": truth["1SCL_A"]}, truth)
    scores = evaluate_structure(paths, competition=RNA3D, predictions=table)
    assert scores["without_reference"] == ["R1117v2"]
    assert [row["sequence_id"] for row in scores["targets"]] == ["1SCL_A"]


def test_the_bar_moves_with_every_part_of_the_targets(
    tmp_path: Path, truth: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Two targets of 4,640 nt, scored for half an hour, said nothing until all was done."""
    monkeypatch.setattr(runlog, "_PLAIN_INTERVAL_S", 0.0)
    paths, table = _write(tmp_path, truth, truth)
    whole = evaluate_structure(paths, competition=RNA3D, predictions=table)
    assert "score: 2/2 targets" in capsys.readouterr().err
    monkeypatch.setattr(engines, "_WORK", 1.0)
    assert evaluate_structure(paths, competition=RNA3D, predictions=table) == whole
    assert "score: 1/2 targets" in capsys.readouterr().err


def test_the_means_are_those_of_the_rows(tmp_path: Path, truth: dict[str, np.ndarray]) -> None:
    predicted = {name: trivial_shapes(all_.shape[1])["random walks"] for name, all_ in truth.items()}
    paths, table = _write(tmp_path, truth, predicted)
    scores = evaluate_structure(paths, competition=RNA3D, predictions=table)
    assert scores["score"] == pytest.approx(np.mean([row["score"] for row in scores["targets"]]))
    assert scores["score"] == pytest.approx(scores["floors"]["random walks"])
    assert sum(group["targets"] for group in scores["by_length"]) == 2
    independent = scores["sequence_independent"]
    assert independent["score"] == pytest.approx(independent["floors"]["random walks"])
    assert independent["unnamed"] == sorted(truth)
    text = describe(scores)
    assert f"sequence-independent: {independent['score']:.4f}" in text
    assert f"{scores['score']:.4f}" in text
    assert "residue-matched" in text
    assert "1SCL_A" in text


@pytest.mark.parametrize("length", [3, 5, 9, 200])
def test_trivial_shapes_are_finite_and_of_the_asked_length(length: int) -> None:
    for shapes in trivial_shapes(length).values():
        assert shapes.shape[1:] == (length, 3)
        assert np.isfinite(shapes).all()


def test_a_prediction_of_another_length_is_refused(tmp_path: Path, truth: dict[str, np.ndarray]) -> None:
    paths, table = _write(tmp_path, truth, {"1SCL_A": truth["1SCL_A"][:, :30]})
    with pytest.raises(DataError, match="1SCL_A has 30 residues, its reference 40"):
        evaluate_structure(paths, competition=RNA3D, predictions=table)


@pytest.mark.parametrize("nothing", [np.nan, -1e18, -1e6])
def test_a_null_or_a_sentinel_in_a_prediction_is_refused(
    tmp_path: Path, truth: dict[str, np.ndarray], nothing: float
) -> None:
    torn = truth["1SCL_A"].copy()
    torn[0, 4] = nothing
    paths, table = _write(tmp_path, truth, {"1SCL_A": torn})
    with pytest.raises(DataError, match="1SCL_A has a coordinate that is null or not finite"):
        evaluate_structure(paths, competition=RNA3D, predictions=table)


def test_predictions_of_other_targets_are_refused(tmp_path: Path, truth: dict[str, np.ndarray]) -> None:
    paths, table = _write(tmp_path, truth, {"R9999": truth["1SCL_A"]})
    with pytest.raises(DataError, match="none of its 1 targets has a known structure"):
        evaluate_structure(paths, competition=RNA3D, predictions=table)


def test_a_missing_table_is_named(tmp_path: Path, truth: dict[str, np.ndarray]) -> None:
    paths, _ = _write(tmp_path, truth, truth)
    with pytest.raises(DataError, match=r"nowhere.parquet: no such file"):
        evaluate_structure(paths, competition=RNA3D, predictions=tmp_path / "nowhere.parquet")


def test_a_damaged_table_is_refused(tmp_path: Path, truth: dict[str, np.ndarray]) -> None:
    paths, table = _write(tmp_path, truth, truth)
    table.write_bytes(table.read_bytes()[:200])
    with pytest.raises(DataError, match=r"oof.parquet: not a readable parquet file"):
        evaluate_structure(paths, competition=RNA3D, predictions=table)


def test_a_candidate_without_coordinates_is_refused(tmp_path: Path, truth: dict[str, np.ndarray]) -> None:
    paths, table = _write(tmp_path, truth, truth)
    empty = pl.when(pl.col("sequence_id") != "1SCL_A").then(pl.col("x")).alias("x")
    pl.read_parquet(table).with_columns(empty).write_parquet(table)
    with pytest.raises(DataError, match="1SCL_A has lists of different lengths"):
        evaluate_structure(paths, competition=RNA3D, predictions=table)


@pytest.mark.parametrize(
    ("column", "said"),
    [
        (pl.lit(["?"] * 40).alias("x"), r"candidate, x, y, z cannot be read .conversion from `(str|list\[str\])`"),
        # polars 1 makes a list of the number
        (pl.lit(1.0).alias("z"), "cannot be read .casting from Float64 to list|1SCL_A has lists of different lengths"),
    ],
)
def test_columns_that_are_no_lists_of_numbers_are_one_sentence(
    tmp_path: Path, truth: dict[str, np.ndarray], column: pl.Expr, said: str
) -> None:
    """They were tracebacks: could not convert string to float; object of type 'float' has no len()."""
    paths, table = _write(tmp_path, truth, truth)
    pl.read_parquet(table).with_columns(column).write_parquet(table)
    with pytest.raises(DataError, match=said) as caught:
        evaluate_structure(paths, competition=RNA3D, predictions=table)
    assert "\n" not in str(caught.value)


def test_odd_types_beside_the_coordinates_do_not_matter(tmp_path: Path, truth: dict[str, np.ndarray]) -> None:
    """A source that is a number or null and a sequence that is null were tracebacks."""
    paths, table = _write(tmp_path, truth, truth)
    single = pl.col("x", "y", "z").cast(pl.List(pl.Float32))
    pl.read_parquet(table).with_columns(single, pl.lit(5).alias("source")).write_parquet(table)
    nameless = pl.DataFrame({"sequence_id": ["1SCL_A"], "sequence": pl.Series([None], dtype=pl.String)})
    nameless.write_parquet(paths.clean("test"))
    scores = evaluate_structure(paths, competition=RNA3D, predictions=table)
    assert scores["score"] == pytest.approx(1.0, abs=1e-5)
    assert [row["templates"] for row in scores["targets"]] == [0, 0]


# ---------------------------------------------------------------------------------------------- copies of a chain


def _assembly(tmp_path: Path, *, copies: list[int] | None, lengths: list[int] | None) -> tuple[Paths, Path]:
    """A target of two copies of one chain and a third chain, predicted with the two copies exchanged."""
    sequence = "GGACUUCGGUCC" * 2 + "ACGUACGUA"
    parts = [moved(folded(12, 1)[0], 2), moved(folded(12, 1)[0], 3), moved(folded(9, 4)[0], 5)]
    truth, exchanged = np.concatenate(parts), np.concatenate([parts[1], parts[0], parts[2]])
    paths, table = _write(tmp_path, {"9XYZ": truth[None]}, {"9XYZ": moved(exchanged, 6)[None]})
    test = pl.DataFrame({"sequence_id": ["9XYZ"], "sequence": [sequence]})
    test.with_columns(pl.Series("chain_lengths", [lengths], dtype=pl.List(pl.Int32))).write_parquet(paths.clean("test"))
    known = pl.read_parquet(paths.clean("references"))
    known.with_columns(
        pl.Series("chain", [None if copies is None else ["A"] * 24 + ["B"] * 9], dtype=pl.List(pl.String)),
        pl.Series("copy", [copies], dtype=pl.List(pl.Int32)),
    ).write_parquet(paths.clean("references"))
    return paths, table


_TWO = [1] * 12 + [2] * 12 + [1] * 9


@pytest.mark.parametrize(("copies", "lengths"), [(_TWO, None), (None, [12, 12, 9]), (_TWO, [12, 12, 9])])
def test_exchanged_copies_cost_nothing_when_residues_are_matched(
    tmp_path: Path, copies: list[int] | None, lengths: list[int] | None
) -> None:
    paths, table = _assembly(tmp_path, copies=copies, lengths=lengths)
    scores = evaluate_structure(paths, competition=RNA3D, predictions=table)
    assert scores["score"] == pytest.approx(1.0, abs=1e-5)
    assert scores["targets"][0]["copies"] == 3
    assert scores["sequence_independent"]["score"] < 0.9  # part 1's metric knows one chain
    assert (
        describe(scores).splitlines()[1].startswith("1 of 1 targets have copies of a chain, in the order that scores")
    )
    assert "an upper bound, as part 2's metric pairs them by shape (US-align -mm 1)" in describe(scores)


@pytest.mark.parametrize(("copies", "lengths"), [(None, None), ([1] * 33, [12, 12, 9]), (None, [12, 12])])
def test_what_is_not_known_to_be_copies_keeps_its_order(
    tmp_path: Path, copies: list[int] | None, lengths: list[int] | None
) -> None:
    paths, table = _assembly(tmp_path, copies=copies, lengths=lengths)
    scores = evaluate_structure(paths, competition=RNA3D, predictions=table)
    assert scores["score"] < 0.9
    assert scores["targets"][0]["copies"] == 0


# ------------------------------------------------------------------------------------------------------- engines


def test_the_program_scores_the_predictions_and_says_so(
    tmp_path: Path, truth: dict[str, np.ndarray], monkeypatch: pytest.MonkeyPatch
) -> None:
    """US-align gives the two numbers; the floors stay the built-in code's, and both are named."""
    paths, table = _write(tmp_path, truth, truth)
    plain = evaluate_structure(paths, competition=RNA3D, predictions=table)
    monkeypatch.setenv("PATH", str(usalign_script(tmp_path / "bin", matched=0.25, aligned=0.75).parent), prepend=":")
    scores = evaluate_structure(
        paths, competition=RNA3D, predictions=table, engine=choose_engine("usalign", where="evaluate")
    )
    independent = scores["sequence_independent"]
    assert (scores["score"], independent["score"]) == (0.25, 0.75)
    assert (scores["engine"], independent["engine"]) == (usalign.ENGINE, usalign.ENGINE)
    assert (scores["floor_engine"], independent["floor_engine"]) == (matching.ENGINE, align.ENGINE)
    assert (scores["floors"], independent["floors"]) == (plain["floors"], plain["sequence_independent"]["floors"])
    assert f"(candidate 1 alone 0.2500); {usalign.ENGINE}\n" in describe(scores)
    assert f"; {matching.ENGINE}\n" in describe(scores)


@pytest.mark.parametrize(("name", "installed", "used"), [("auto", True, True), ("auto", False, False)])
def test_auto_takes_the_program_where_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str, installed: bool, used: bool
) -> None:
    program = usalign_script(tmp_path / "bin", matched=0.5, aligned=0.5)
    monkeypatch.setenv("PATH", str(program.parent) if installed else "")
    engine = choose_engine(name, where="evaluate")
    assert engine.program == (program if used else None)
    assert engine.matched_by == (usalign.ENGINE if used else matching.ENGINE)


def test_candidates_from_templates_are_counted_where_the_table_tells(
    tmp_path: Path, truth: dict[str, np.ndarray]
) -> None:
    paths, table = _write(tmp_path, truth, truth)
    assert [row["templates"] for row in evaluate_structure(paths, competition=RNA3D, predictions=table)["targets"]] == [
        None,
        None,
    ]
    known = pl.read_parquet(table).with_columns(
        source=pl.when(pl.col("candidate") == 2).then(pl.lit("templates.sim80_k5")).otherwise(pl.lit("denovo.s"))
    )
    known.write_parquet(table)
    rows = evaluate_structure(paths, competition=RNA3D, predictions=table)["targets"]
    assert {row["sequence_id"]: row["templates"] for row in rows} == {"1SCL_A": 0, "R1117v2": 1}
