"""The choice of five: what other runs offer counts, and a run that lowers the score is kept in reserve."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from folds import ensemble
from folds.candidates import choose_candidates
from pipeline.competitions import get_competition
from pipeline.paths import Paths
from pipeline.stage import Report
from tests.chain_tables import SPLIT, make_paths, write, write_structure_data, write_structure_run

RNA3D = get_competition("rna3d")


def closeness(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """A score that no likeness of whole traces tells: how near the first residue is."""
    return np.array([1.0 / (1.0 + np.sum((a[0] - b[0]) ** 2)) for a, b in pairs])


def join(paths: Paths) -> Report:
    return ensemble.run(paths, runs=["even.s", "rare.s"], competition=RNA3D, split=SPLIT, name="all", score=closeness)


def put(paths: Paths, run: str, far: list[float], rng: np.random.Generator, *, turn: int | None = None) -> None:
    """Random candidates whose first residue is so far from the truth, Å, in an order that no confidence tells.

    With a turn, only of every second target, and the run says of which; of the others all are far off.
    """
    train = pl.read_parquet(paths.clean("train"))
    known = {
        row[0]: np.array(row[1:])
        for row in train.select("sequence_id", *(pl.col(a).list.first() for a in "xyz")).iter_rows()
    }
    for fold in range(2):
        rows = []
        for row in pl.read_parquet(paths.oof(run, fold)).iter_rows(named=True):
            number = list(known).index(row["sequence_id"])
            knows = turn is None or number // 2 % 2 == turn
            trace_L3 = rng.normal(0.0, 20.0, size=(len(row["x"]), 3))
            trace_L3[0] = known[row["sequence_id"]] + [
                far[(row["candidate"] + number) % len(far)] if knows else 9.0,
                0,
                0,
            ]
            rows.append(
                row | {"confidence": 0.9 if knows else 0.1} | dict(zip("xyz", trace_L3.T.tolist(), strict=True))
            )
        write(pl.DataFrame(rows, schema=pl.read_parquet_schema(paths.oof(run, fold))), paths.oof(run, fold))


@pytest.fixture
def paths(tmp_path: Path, rng: np.random.Generator) -> Paths:
    """Run rare has one perfect candidate of five, run even five that are worth more than the mean of those."""
    paths = make_paths(tmp_path, "rna3d")
    write_structure_data(paths, rng, targets=12)
    for run, noise in (("even.s", [1.0] * 5), ("rare.s", [0.0, 9.0, 9.0, 9.0, 9.0])):
        write_structure_run(paths, run, rng, confidences=[0.5] * 5)
        put(paths, run, noise, rng)
    return paths


def test_a_run_without_which_the_five_are_better_is_kept_in_reserve(paths: Paths) -> None:
    """It took the even ones, 0.375 against 0.378 for structures: what expects most is not what lifts the best."""
    report = join(paths)
    assert report.facts["policy"]["spare"] == ["even.s"]
    assert report.facts["taken_from_oof"] == {"rare.s": 60}
    assert max(report.facts["policy"]["best_of_five"].values()) == 1.0
    assert "mean over the targets that teach" in str(ensemble.describe(report.facts).caption)
    assert all(source.startswith("rare") for source in report.facts["taken_from"])


def test_a_run_in_reserve_fills_up_what_the_others_leave_open(paths: Paths) -> None:
    oof = pl.read_parquet(paths.oof("rare.s", 0))
    first = oof["sequence_id"][0]
    write(oof.filter((pl.col("sequence_id") != first) | (pl.col("candidate") <= 3)), paths.oof("rare.s", 0))
    taken = pl.read_parquet(join(paths).outputs["oof"]).filter(pl.col("sequence_id") == first)
    assert taken["source"].value_counts().sort("source").rows() == [("even.s", 2), ("rare.s", 3)]
    assert taken["candidate"].to_list() == [1, 2, 3, 4, 5]


def test_both_runs_are_used_where_each_knows_other_targets(paths: Paths, rng: np.random.Generator) -> None:
    for turn, run in enumerate(("even.s", "rare.s")):
        put(paths, run, [0.0, 9.0, 9.0, 9.0, 9.0], rng, turn=turn)
    assert join(paths).facts["policy"]["spare"] == []


def table(traces: list[np.ndarray], confidences: list[float]) -> pl.DataFrame:
    return pl.DataFrame(
        {
            "sequence_id": ["R1"] * len(traces),
            "candidate": range(1, len(traces) + 1),
            "confidence": confidences,
            **{axis: [each[:, k].tolist() for each in traces] for k, axis in enumerate("xyz")},
        }
    )


def test_what_another_run_says_too_is_expected_to_be_better(rng: np.random.Generator) -> None:
    one, two, other = np.cumsum(rng.normal(0.0, 4.0, size=(3, 40, 3)), axis=1)
    runs = {"a/fold0": table([one], [0.5]), "a/fold1": table([two], [0.5]), "b/fold0": table([two, other], [0.4, 0.1])}
    weights = {"a": [0.0, 1.0, 0.0, 0.0, 0.2], "b": [0.0, 1.0, 0.0, 0.0, 0.0]}
    chosen = choose_candidates(runs, weights=weights, novelty=0.0)
    assert chosen["source"][0] == "a/fold1"
    assert chosen["confidence"][0] == pytest.approx(0.7)
    alone = choose_candidates({name: runs[name] for name in ("a/fold0", "a/fold1")}, weights=weights, novelty=0.0)
    assert alone["confidence"].to_list() == [0.5, 0.5], "folds of one run do not second each other"
    spared = choose_candidates(runs, weights=weights, novelty=0.0, spare=["b"])
    assert spared["confidence"].to_list()[:2] == [0.5, 0.5], "a run in reserve has no voice"
