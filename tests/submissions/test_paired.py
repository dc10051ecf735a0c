import json

import numpy as np
import polars as pl
import pytest
from rich.console import Console
from scipy import stats

from folds import ensemble
from pipeline.competitions import get_competition
from pipeline.tables import OofBatch
from submissions import evaluate, report
from submissions.breakdown import Groups
from submissions.paired import BLOCKS, Paired, _interval, tell_difference
from tests.chain_tables import SPLIT, TARGETS, make_paths, write_run, write_values_data

RIBONANZA = get_competition("ribonanza")
LENGTH = 5


def differences(tmp_path, errors: dict[str, np.ndarray], *, cluster: list[str] | None = None, lost=()) -> dict:
    """Sets of predictions with one error for each sequence of `LENGTH` nt, compared with the first set."""
    count = len(next(iter(errors.values())))
    ids = [f"s{number:04d}" for number in range(count)]
    table = pl.DataFrame({"sequence_id": ids, "cluster": cluster or ids})
    table.write_parquet(tmp_path / "folds.parquet")
    truth_TC = np.full((count * LENGTH, len(TARGETS)), 0.5, dtype=np.float32)
    nothing = np.zeros(count, dtype=bool)
    batch = OofBatch(
        rows=table.select("sequence_id"),
        lengths_N=np.full(count, LENGTH),
        predictions={name: truth_TC + np.repeat(error_N, LENGTH)[:, None] for name, error_N in errors.items()},
        missing={name: nothing | (np.isin(np.arange(count), lost) if name == "b" else False) for name in errors},
    )
    batch.predictions[list(errors)[-1]][batch.spread(batch.missing[list(errors)[-1]])] = np.nan
    paired = Paired(RIBONANZA, tmp_path / "folds.parquet", list(errors))
    paired.add(batch, truth_TC)
    return paired.differences(next(iter(errors)))


def test_interval_of_a_mean_is_students(tmp_path, rng):
    """The mean absolute error of sequences of one length is a mean, of which the jackknife is exact."""
    a_N, b_N = rng.random((2, 40))
    found = differences(tmp_path, {"a": a_N, "b": b_N})["b"]
    expected = stats.ttest_rel(b_N, a_N)
    assert found["value"] == pytest.approx((b_N - a_N).mean(), abs=1e-6)
    assert (found["low"], found["high"]) == pytest.approx(tuple(expected.confidence_interval(0.95)), abs=1e-6)


def test_a_score_without_a_block_is_that_of_all_others(rng):
    """With a block's errors added instead, intervals of means over alike blocks stay the same."""
    block_T, (prediction_TC, truth_TC) = rng.integers(0, 4, 60), rng.random((2, 60, len(TARGETS)))
    groups = Groups(RIBONANZA)
    groups.add_positions(block_T, prediction_TC, truth_TC)
    expected = [abs(prediction_TC - truth_TC)[block_T != block].mean() for block in range(4)]
    assert groups.scores_without() == pytest.approx(expected)


def test_relatives_count_once(tmp_path, rng):
    a_N, b_N = rng.random((2, 30))
    alone = differences(tmp_path, {"a": a_N, "b": b_N})
    names = [f"c{number:02d}" for number in range(30)]
    twice = {"a": np.tile(a_N, 2), "b": np.tile(b_N, 2)}
    assert differences(tmp_path, twice, cluster=names * 2)["b"] == pytest.approx(alone["b"], abs=1e-6)
    apart = differences(tmp_path, twice)["b"]
    assert apart["high"] - apart["low"] < 0.8 * (alone["b"]["high"] - alone["b"]["low"])


def test_many_clusters_share_blocks_and_cover_as_many_sequences(tmp_path, rng):
    a_N, b_N = rng.random((2, 10 * BLOCKS))
    found = differences(tmp_path, {"a": a_N, "b": b_N})["b"]
    low, high = stats.ttest_rel(b_N, a_N).confidence_interval(0.95)
    assert found["high"] - found["low"] == pytest.approx(high - low, rel=0.2)


@pytest.mark.parametrize("sizes", [[300] * 2 + [2] * 50, [600, 300] + [1] * 100, [300] * 3 + [2] * 50])
def test_the_interval_holds_the_truth_also_where_few_families_hold_nearly_everything(rng, sizes):
    """With 51 degrees of freedom, of which two large ones decided, it held the truth in 77 % of cases, not in 95 %."""
    counts_B, held = np.array(sizes), 0
    for _ in range(300):
        sums_B = rng.normal(size=len(sizes)) * counts_B  # of differences; the truth is 0
        without_B = (sums_B.sum() - sums_B) / (counts_B.sum() - counts_B)
        told = _interval(sums_B.sum() / counts_B.sum(), without_B, counts_B)
        held += told["low"] <= 0 <= told["high"]
    assert held / 300 > 0.9


def test_one_family_that_holds_everything_gives_no_interval():
    told = _interval(0.1, np.array([0.1, np.nan]), np.array([100, 0]))
    assert told["value"] == 0.1
    assert np.isnan([told["low"], told["high"]]).all()


def test_only_sequences_that_all_predict_are_compared(tmp_path, rng):
    a_N, b_N = rng.random((2, 12))
    found = differences(tmp_path, {"a": a_N, "b": b_N}, lost=(0, 7))["b"]
    kept_N = np.delete(b_N - a_N, (0, 7))
    assert found["value"] == pytest.approx(kept_N.mean(), abs=1e-6)


def test_one_cluster_has_no_interval(tmp_path, rng):
    found = differences(tmp_path, dict(zip("ab", rng.random((2, 4)), strict=True)), cluster=["c"] * 4)["b"]
    assert np.isfinite(found["value"])
    assert np.isnan([found["low"], found["high"]]).all()


def test_evaluation_compares_the_ensemble_and_every_run_with_the_best_run(tmp_path, rng):
    paths = make_paths(tmp_path)
    write_values_data(paths, rng)
    runs = ["good.sim80_k3", "poor.sim80_k3"]
    for run, noise in zip(runs, (0.1, 0.4), strict=True):
        write_run(paths, run, rng, noise=dict.fromkeys(TARGETS, noise))
    ensemble.run(paths, competition=RIBONANZA, name="all", runs=runs, split=SPLIT)
    facts = evaluate.run(paths, competition=RIBONANZA, split=SPLIT, name="all").facts
    scores = {run: facts["runs"][run]["score"] for run in runs}
    assert facts["best_run"] == runs[0]
    assert "difference" not in facts["runs"][runs[0]]
    poor = facts["runs"][runs[1]]["difference"]
    assert poor["value"] == pytest.approx(scores[runs[1]] - scores[runs[0]])
    assert 0 < poor["low"] < poor["value"] < poor["high"]
    assert facts["difference"]["value"] == pytest.approx(facts["score"] - scores[runs[0]])
    console = Console(width=200)
    with console.capture() as captured:
        console.print(evaluate.describe(facts))
    assert f"{poor['value']:+.4f} [{poor['low']:+.4f}, {poor['high']:+.4f}]" in captured.get()
    assert json.loads((paths.ensemble_dir("all") / "scores.json").read_text())["best_run"] == runs[0]
    report.run(paths, competition=RIBONANZA, name="all")
    page = (paths.ensemble_dir("all") / "report.html").read_text()
    assert f'<td class="number">{tell_difference(poor)}</td>' in page


def test_a_run_alone_is_compared_with_nothing(tmp_path, rng):
    paths = make_paths(tmp_path)
    write_values_data(paths, rng)
    write_run(paths, "only.sim80_k3", rng, noise=dict.fromkeys(TARGETS, 0.2))
    ensemble.run(paths, competition=RIBONANZA, name="all", runs=["only.sim80_k3"], split=SPLIT)
    for subject in ({"name": "all"}, {"run": "only.sim80_k3"}):
        facts = evaluate.run(paths, competition=RIBONANZA, split=SPLIT, **subject).facts
        assert "best_run" not in facts
        assert "difference" not in facts
