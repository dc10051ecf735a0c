"""Scores of numbers against closed forms, numpy and scipy."""

import math

import numpy as np
import pytest
from scipy import stats

from submissions.number_scores import (
    SCORES,
    average_ranks,
    each_column,
    in_short,
    mean_absolute_error,
    pearson,
    r_squared,
    root_mean_square_error,
    spearman,
)


def draw(rng, count=200):
    truth_N = rng.gamma(2.0, 3.0, count)
    return truth_N + rng.normal(0, 2.0, count), truth_N


def test_scores_are_those_of_numpy_and_scipy(rng):
    prediction_N, truth_N = draw(rng)
    off_N = prediction_N - truth_N
    assert root_mean_square_error(prediction_N, truth_N) == pytest.approx(np.linalg.norm(off_N) / math.sqrt(len(off_N)))
    assert mean_absolute_error(prediction_N, truth_N) == pytest.approx(np.abs(off_N).mean())
    assert r_squared(prediction_N, truth_N) == pytest.approx(1 - (off_N**2).mean() / truth_N.var())
    assert pearson(prediction_N, truth_N) == pytest.approx(stats.pearsonr(prediction_N, truth_N).statistic)
    assert spearman(prediction_N, truth_N) == pytest.approx(stats.spearmanr(prediction_N, truth_N).statistic)


def test_ties_share_the_mean_of_their_ranks(rng):
    prediction_N, truth_N = (rng.integers(0, 5, 100).astype(float) for _ in range(2))
    assert np.allclose(average_ranks(truth_N), stats.rankdata(truth_N))
    assert spearman(prediction_N, truth_N) == pytest.approx(stats.spearmanr(prediction_N, truth_N).statistic)


def test_the_mean_explains_nothing_and_the_truth_all(rng):
    _, truth_N = draw(rng)
    assert r_squared(np.full(len(truth_N), truth_N.mean()), truth_N) == pytest.approx(0.0)
    assert [score(truth_N, truth_N) for score in SCORES.values()] == pytest.approx([0.0, 0.0, 1.0, 1.0, 1.0])


@pytest.mark.parametrize("unit", [1e-150, 1e-9, 1e6, 1e150])
def test_scores_without_a_unit_do_not_depend_on_it(unit, rng):
    prediction_N, truth_N = draw(rng)
    for score in (r_squared, pearson, spearman):
        assert score(unit * prediction_N, unit * truth_N) == pytest.approx(score(prediction_N, truth_N))


def test_any_rising_curve_keeps_the_ranks(rng):
    prediction_N, truth_N = draw(rng)
    assert spearman(np.exp(prediction_N), truth_N) == pytest.approx(spearman(prediction_N, truth_N))


@pytest.mark.parametrize(
    ("prediction", "truth", "defined"),
    [
        ([], [], []),
        ([1.0], [2.0], ["RMSE", "MAE"]),
        ([0.1, 0.1, 0.1], [1.0, 2.0, 3.0], ["RMSE", "MAE", "R²"]),
        ([1.0, 2.0, 3.0], [0.3, 0.3, 0.3], ["RMSE", "MAE"]),
    ],
)
def test_what_does_not_vary_has_no_correlation(prediction, truth, defined):
    pair = np.array(prediction, dtype=float), np.array(truth, dtype=float)
    assert [name for name, score in SCORES.items() if not math.isnan(score(*pair))] == defined


def test_each_column_counts_where_it_was_measured(rng):
    prediction_NC, truth_NC = rng.normal(size=(2, 50, 2))
    truth_NC[:20, 1] = np.nan
    rows = each_column(prediction_NC, truth_NC)
    assert [row["measured"] for row in rows] == [50, 30]
    assert rows[1]["RMSE"] == pytest.approx(root_mean_square_error(prediction_NC[20:, 1], truth_NC[20:, 1]))
    assert rows[0]["MAE"] == pytest.approx(mean_absolute_error(prediction_NC[:, 0], truth_NC[:, 0]))


def test_means_are_over_the_columns_that_have_a_score(rng):
    prediction_NC, truth_NC = rng.normal(size=(2, 50, 3))
    truth_NC[:, 2] = 1.5
    rows = each_column(prediction_NC, truth_NC)
    told = in_short(prediction_NC, truth_NC)
    assert told["mean R²"] == pytest.approx((rows[0]["R²"] + rows[1]["R²"]) / 2)
    assert math.isnan(rows[2]["R²"])
    assert list(told) == ["mean R²", "mean Pearson", "mean Spearman"]
    assert list(in_short(prediction_NC[:, :1], truth_NC[:, :1])) == ["MAE", "R²", "Pearson", "Spearman"]
