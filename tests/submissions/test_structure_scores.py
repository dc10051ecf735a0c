"""Structure evaluation: the best candidate counts, floors stand beside it, and tables that do not fit are refused."""

import json
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from pipeline.competitions.rna3d import RNA3D
from pipeline.errors import DataError
from pipeline.paths import Paths
from pipeline.structure.geometry import trace_from_pairs
from submissions.align import tm_align
from submissions.structure_scores import describe, evaluate_structure, trivial_shapes
from submissions.tm_score import tm_score


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
    with pytest.raises(DataError, match=r"nowhere.parquet: missing"):
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
