"""Scores of predicted numbers, each over all sequences at once and over every measured one.

What has no value is NaN, "undefined" in words: everything of nothing, R² where all truths are the same, correlations
where truths or predictions are. Means over columns are over those that are defined.

Letters: N sequences, C columns.
"""

import math

import numpy as np
import polars as pl

from pipeline.runlog import score_text


def root_mean_square_error(prediction_N: np.ndarray, truth_N: np.ndarray) -> float:
    """In the units of the data."""
    return float(np.sqrt(np.square(prediction_N - truth_N).mean())) if len(truth_N) else math.nan


def mean_absolute_error(prediction_N: np.ndarray, truth_N: np.ndarray) -> float:
    """In the units of the data."""
    return float(np.abs(prediction_N - truth_N).mean()) if len(truth_N) else math.nan


def r_squared(prediction_N: np.ndarray, truth_N: np.ndarray) -> float:
    """Share of the truth's variance that is predicted: 1 at best, 0 for its mean everywhere, below 0 for worse.

    >>> r_squared(np.array([1.0, 2.0, 2.0]), np.array([1.0, 2.0, 3.0])), r_squared(np.array([1.0]), np.array([1.0]))
    (0.5, nan)
    """
    if not _varies(truth_N):
        return math.nan
    return float(1.0 - np.square(prediction_N - truth_N).sum() / np.square(truth_N - truth_N.mean()).sum())


def pearson(prediction_N: np.ndarray, truth_N: np.ndarray) -> float:
    """Correlation of prediction and truth."""
    if not (_varies(prediction_N) and _varies(truth_N)):
        return math.nan
    one_N, two_N = (values_N - values_N.mean() for values_N in (prediction_N, truth_N))
    one_N, two_N = one_N / np.abs(one_N).max(), two_N / np.abs(two_N).max()  # of whatever size: no square is lost
    return float(np.clip(one_N @ two_N / math.sqrt((one_N @ one_N) * (two_N @ two_N)), -1.0, 1.0))


def spearman(prediction_N: np.ndarray, truth_N: np.ndarray) -> float:
    """Correlation of the ranks; equals share the mean of theirs.

    >>> round(spearman(np.array([0.1, 0.2, 0.2, 9.0]), np.array([1.0, 2.0, 3.0, 4.0])), 4)
    0.9487
    """
    return pearson(average_ranks(prediction_N), average_ranks(truth_N))


def average_ranks(values_N: np.ndarray) -> np.ndarray:
    """[N] float64 ranks from 1; equals have the mean of theirs.

    >>> average_ranks(np.array([0.5, 0.1, 0.5])).tolist()
    [2.5, 1.0, 2.5]
    """
    return pl.Series(values_N).rank("average").to_numpy()


def _varies(values_N: np.ndarray) -> bool:
    return len(values_N) > 1 and bool(np.ptp(values_N) > 0)


#: Name -> score of one column.
SCORES = {
    "RMSE": root_mean_square_error,
    "MAE": mean_absolute_error,
    "R²": r_squared,
    "Pearson": pearson,
    "Spearman": spearman,
}
#: Those that tell how well a column is told apart from its mean, whatever its unit.
_WITHOUT_UNIT = ("R²", "Pearson", "Spearman")


def each_column(prediction_NC: np.ndarray, truth_NC: np.ndarray) -> list[dict[str, float]]:
    """``measured``, how many sequences were, and all `SCORES` of each column."""
    rows = []
    for prediction_N, truth_N in zip(prediction_NC.T.astype(np.float64), truth_NC.T, strict=True):
        here_N = np.isfinite(truth_N)
        pair = prediction_N[here_N], truth_N[here_N]
        rows.append({"measured": int(here_N.sum())} | {name: score(*pair) for name, score in SCORES.items()})
    return rows


def in_short(prediction_NC: np.ndarray, truth_NC: np.ndarray) -> dict[str, float]:
    """Name -> score, the columns of every table of scores beside the error: of several columns, means of theirs."""
    rows = each_column(prediction_NC, truth_NC)
    if len(rows) == 1:
        return {name: rows[0][name] for name in SCORES if name != "RMSE"}
    return {f"mean {name}": _mean_defined([row[name] for row in rows]) for name in _WITHOUT_UNIT}


def tell(value: float | None, name: str = "") -> str:
    """A score in words: with as many digits as its unit needs, or, of those without a unit, four decimals.

    >>> tell(None), tell(0.000012, "MAE"), tell(0.000012, "mean R²")
    ('undefined', '1.2e-05', '0.0000')
    """
    if value is None:
        return "undefined"
    return f"{value:.4f}" if name.removeprefix("mean ") in _WITHOUT_UNIT else score_text(value)


def _mean_defined(values: list[float]) -> float:
    known = [value for value in values if not math.isnan(value)]
    return sum(known) / len(known) if known else math.nan
