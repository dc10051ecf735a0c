"""Scores of predicted classes, over all sequences at once: nothing here is a mean of the values of batches.

What has no value is NaN, "undefined" in words: recall, F1, AUROC and average precision of a class without positives,
AUROC and average precision of one without negatives, precision of a class that is never decided for, MCC where all
answers or all truths are the same. Averages over classes are over those that are defined. The log loss itself is
`pipeline.labels.log_losses`.

Letters: N sequences, K classes, T decisions, P points of a curve, B bins.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from submissions.number_scores import average_ranks

#: Bins of equal width in which probabilities are compared with frequencies.
BINS = 15


# ---------------------------------------------------------------------------------------------------------- decisions


def decide(probabilities_NK: np.ndarray, *, exclusive: bool, thresholds: np.ndarray | float = 0.5) -> np.ndarray:
    """[N, K] bool: the most probable class (the first of equals); of several labels, those that reach a threshold.

    Args:
        probabilities_NK: [N, K].
        exclusive: whether each sequence has exactly one class.
        thresholds: [K] or [N, K], of several labels.
    """
    if not exclusive:
        return probabilities_NK >= thresholds
    return np.argmax(probabilities_NK, axis=1)[:, None] == np.arange(probabilities_NK.shape[1])


def best_threshold(score_N: np.ndarray, truth_N: np.ndarray) -> float:
    """The threshold with the highest F1, halfway to the next lower score; 0.5 where nothing is positive.

    >>> best_threshold(np.array([0.9, 0.6, 0.2]), np.array([True, True, False]))
    0.4
    """
    if not truth_N.any():
        return 0.5
    step = _steps(score_N, truth_N)
    f1_P = 2 * step.positives_P / (step.reached_P + truth_N.sum())
    best = int(np.argmax(f1_P))
    below = step.score_P[best + 1] if best + 1 < len(f1_P) else step.score_P[best]
    return float((step.score_P[best] + below) / 2)


def learn_thresholds(probabilities_NK: np.ndarray, truth_NK: np.ndarray) -> np.ndarray:
    """[K] float64: `best_threshold` of every class."""
    pairs = zip(probabilities_NK.T.astype(np.float64), truth_NK.T, strict=True)
    return np.array([best_threshold(score_N, truth_N) for score_N, truth_N in pairs])


def crossed_thresholds(probabilities_NK: np.ndarray, truth_NK: np.ndarray, fold_N: np.ndarray) -> np.ndarray:
    """[N, K] float64: for the sequences of a fold, thresholds learned on all other folds; 0.5 if there are none."""
    crossed_NK = np.full(truth_NK.shape, 0.5)
    for fold in np.unique(fold_N):
        others_N = fold_N != fold
        if others_N.any():
            crossed_NK[~others_N] = learn_thresholds(probabilities_NK[others_N], truth_NK[others_N])
    return crossed_NK


# ------------------------------------------------------------------------------------------------------------- counts


class Counts(NamedTuple):
    """Decisions beside the truth, of each class or of all together."""

    true_positive: np.ndarray
    false_positive: np.ndarray
    false_negative: np.ndarray
    true_negative: np.ndarray

    @property
    def support(self) -> np.ndarray:
        return self.true_positive + self.false_negative

    def together(self) -> "Counts":
        """Sums over the classes: what "micro" averages are of."""
        return Counts(*(counts_K.sum(keepdims=True) for counts_K in self))


def count(decided_NK: np.ndarray, truth_NK: np.ndarray) -> Counts:
    """[K] int64 of each kind."""
    kinds = (decided_NK & truth_NK, decided_NK & ~truth_NK, ~decided_NK & truth_NK, ~decided_NK & ~truth_NK)
    return Counts(*(kind_NK.sum(axis=0) for kind_NK in kinds))


def precision(counts: Counts) -> np.ndarray:
    """[K]: share of the decisions for a class that are right."""
    return _ratio(counts.true_positive, counts.true_positive + counts.false_positive)


def recall(counts: Counts) -> np.ndarray:
    """[K]: share of a class that is found."""
    return _ratio(counts.true_positive, counts.support)


def f1(counts: Counts) -> np.ndarray:
    """[K]: harmonic mean of precision and recall; 0 for a class that has positives and is never decided for."""
    found_K = _ratio(2 * counts.true_positive, counts.support + counts.true_positive + counts.false_positive)
    return np.where(counts.support > 0, found_K, np.nan)


def matthews(counts: Counts) -> np.ndarray:
    """[K]: correlation of decision and truth, each class against the rest."""
    tp, fp, fn, tn = (counts_K.astype(np.float64) for counts_K in counts)
    return _ratio(tp * tn - fp * fn, np.sqrt((tp + fp) * (tp + fn) * (tn + fp) * (tn + fn)))


def averages(counts: Counts) -> dict[str, dict[str, float]]:
    """Precision, recall and F1 over the classes: macro (each class counts once), weighted by support, and micro (each
    decision counts once, as if all classes were one)."""
    told: dict[str, dict[str, float]] = {"macro": {}, "weighted": {}, "micro": {}}
    for name, score in {"precision": precision, "recall": recall, "f1": f1}.items():
        told["macro"][name] = mean_defined(score(counts))
        told["weighted"][name] = mean_defined(score(counts), weight_K=counts.support)
        told["micro"][name] = float(score(counts.together())[0])
    return told


def mean_defined(values_K: np.ndarray, *, weight_K: np.ndarray | None = None) -> float:
    """Mean of what is not NaN; NaN if nothing is, or nothing that is has weight."""
    here_K = ~np.isnan(values_K)
    weights = np.ones(int(here_K.sum())) if weight_K is None else weight_K[here_K].astype(np.float64)
    return float((values_K[here_K] * weights).sum() / weights.sum()) if weights.sum() > 0 else math.nan


def median_defined(values_K: np.ndarray) -> dict[str, Any]:
    """``median`` of what is not NaN (NaN if nothing is), of how many ``classes``, and how many are ``left_out``.

    >>> median_defined(np.array([0.5, np.nan, 0.9, 0.6]))
    {'median': 0.6, 'classes': 3, 'left_out': 1}
    """
    known = values_K[~np.isnan(values_K)]
    median = float(np.median(known)) if known.size else math.nan
    return {"median": median, "classes": known.size, "left_out": values_K.size - known.size}


def confusion(decided_NK: np.ndarray, truth_NK: np.ndarray) -> np.ndarray:
    """[K, K] int64: sequences by true class (row) and decided class (column)."""
    classes = truth_NK.shape[1]
    cell_N = np.argmax(truth_NK, axis=1) * classes + np.argmax(decided_NK, axis=1)
    return np.bincount(cell_N, minlength=classes**2).reshape(classes, classes)


def matthews_of_classes(confusion_KK: np.ndarray) -> float:
    """Correlation of decided and true class over all classes at once; of two classes, `matthews` of either.

    Source: Gorodkin 2004, Comput. Biol. Chem. 28:367.
    """
    counts_KK = confusion_KK.astype(np.float64)
    true_K, decided_K, total = counts_KK.sum(axis=1), counts_KK.sum(axis=0), counts_KK.sum()
    along = np.trace(counts_KK) * total - true_K @ decided_K
    return float(_ratio(along, np.sqrt((total**2 - decided_K @ decided_K) * (total**2 - true_K @ true_K))))


# ------------------------------------------------------------------------------------------------------------- ranking


class _Steps(NamedTuple):
    """Distinct scores from the highest on, and what reaches each."""

    score_P: np.ndarray
    reached_P: np.ndarray  #: int64, sequences with at least this score
    positives_P: np.ndarray  #: int64, positives among them


def _steps(score_N: np.ndarray, truth_N: np.ndarray) -> _Steps:
    order = np.argsort(-score_N, kind="stable")
    score_N, truth_N = score_N[order], truth_N[order]
    last_P = np.append(np.flatnonzero(np.diff(score_N)), len(score_N) - 1)  # equal scores are one step
    return _Steps(score_N[last_P], last_P + 1, np.cumsum(truth_N)[last_P])


def auroc(score_N: np.ndarray, truth_N: np.ndarray) -> float:
    """Chance that a positive has a higher score than a negative, equals counted half; NaN without one of the two.

    >>> auroc(np.array([0.1, 0.4, 0.4, 0.8]), np.array([False, False, True, True]))
    0.875
    """
    positives = int(truth_N.sum())
    negatives = len(truth_N) - positives
    if not positives or not negatives:
        return math.nan
    return float((average_ranks(score_N)[truth_N].sum() - positives * (positives + 1) / 2) / (positives * negatives))


def average_precision(score_N: np.ndarray, truth_N: np.ndarray) -> float:
    """Mean of the precision at every positive, in steps, not interpolated; NaN without positives or negatives."""
    if truth_N.all() or not truth_N.any():
        return math.nan
    step = _steps(score_N, truth_N)
    gained_P = np.diff(step.positives_P, prepend=0)
    return float((gained_P * step.positives_P / step.reached_P).sum() / truth_N.sum())


def curve(score_N: np.ndarray, truth_N: np.ndarray) -> dict[str, np.ndarray]:
    """[P] false positive rate, recall and precision at every distinct score, from the highest on."""
    step = _steps(score_N, truth_N)
    negatives_P = step.reached_P - step.positives_P
    return {
        "false_positive_rate": _ratio(negatives_P, len(truth_N) - truth_N.sum()),
        "recall": _ratio(step.positives_P, truth_N.sum()),
        "precision": step.positives_P / step.reached_P,
    }


# --------------------------------------------------------------------------------------------------------- calibration


def reliability(stated_T: np.ndarray, right_T: np.ndarray) -> list[dict[str, float]]:
    """Stated probabilities beside what came true, for each of `BINS` that is not empty.

    Returns:
        Rows of ``low`` (edge of the bin), ``stated`` and ``right`` (means), and ``count``.
    """
    bin_T = np.clip((stated_T * BINS).astype(np.intp), 0, BINS - 1)
    count_B = np.bincount(bin_T, minlength=BINS)
    stated_B, right_B = (np.bincount(bin_T, weights=each_T, minlength=BINS) for each_T in (stated_T, right_T))
    return [
        {
            "low": b / BINS,
            "stated": stated_B[b] / count_B[b],
            "right": right_B[b] / count_B[b],
            "count": int(count_B[b]),
        }
        for b in np.flatnonzero(count_B)
    ]


def calibration_error(rows: Sequence[Mapping[str, float]]) -> float:
    """Mean distance of stated from true over the rows of `reliability`, weighted by their counts; 0 is best.

    Source: Naeini et al. 2015, AAAI, "expected calibration error".
    """
    total = sum(row["count"] for row in rows)
    return float(sum(abs(row["stated"] - row["right"]) * row["count"] for row in rows) / total) if total else math.nan


def stated_and_right(probabilities_NK: np.ndarray, truth_NK: np.ndarray, *, exclusive: bool) -> list[dict[str, float]]:
    """`reliability` of the most probable class; of several labels, of every probability."""
    if not exclusive:
        return reliability(probabilities_NK.astype(np.float64).ravel(), truth_NK.ravel())
    best_N = np.argmax(probabilities_NK, axis=1)[:, None]
    stated_N, right_N = (np.take_along_axis(each_NK, best_N, axis=1)[:, 0] for each_NK in (probabilities_NK, truth_NK))
    return reliability(stated_N.astype(np.float64), right_N)


# ------------------------------------------------------------------------------------------------------------- in short


def in_short(
    probabilities_NK: np.ndarray, truth_NK: np.ndarray, decided_NK: np.ndarray, *, exclusive: bool
) -> dict[str, float]:
    """Name -> score, the columns of every table of scores beside the log loss.

    Accuracy: share of sequences with every class right. Macro: the mean over the classes; MCC of exclusive ones is of
    all at once. Median AUROC: over the classes, where a sequence may have several, as DeepSEA's is told.
    """
    counts = count(decided_NK, truth_NK)
    together = matthews_of_classes(confusion(decided_NK, truth_NK)) if exclusive else mean_defined(matthews(counts))
    right_N, auroc_K = (decided_NK == truth_NK).all(axis=1), each_class(auroc, probabilities_NK, truth_NK)
    return {
        "accuracy": float(right_N.mean()) if len(right_N) else math.nan,
        "macro F1": mean_defined(f1(counts)),
        "MCC" if exclusive else "macro MCC": together,
        "macro AUROC": mean_defined(auroc_K),
        **({} if exclusive else {"median AUROC": median_defined(auroc_K)["median"]}),
        "macro average precision": mean_defined(each_class(average_precision, probabilities_NK, truth_NK)),
    }


def per_class(
    probabilities_NK: np.ndarray, truth_NK: np.ndarray, decided_NK: np.ndarray, thresholds_NK: np.ndarray
) -> dict[str, np.ndarray]:
    """Name -> [K]: every score of each class against the rest, as decided, and its F1 at learned thresholds."""
    counts = count(decided_NK, truth_NK)
    return {
        "support": counts.support,
        "decided": counts.true_positive + counts.false_positive,
        "precision": precision(counts),
        "recall": recall(counts),
        "f1": f1(counts),
        "mcc": matthews(counts),
        "auroc": each_class(auroc, probabilities_NK, truth_NK),
        "average_precision": each_class(average_precision, probabilities_NK, truth_NK),
        "f1_at_threshold": f1(count(probabilities_NK >= thresholds_NK, truth_NK)),
    }


def each_class(score: Any, probabilities_NK: np.ndarray, truth_NK: np.ndarray) -> np.ndarray:
    """[K]: a score of each class's probabilities."""
    return np.array([score(*pair) for pair in zip(probabilities_NK.T, truth_NK.T, strict=True)])


def _ratio(above: Any, below: Any) -> np.ndarray:
    """Quotient, NaN where nothing is divided by."""
    with np.errstate(invalid="ignore", divide="ignore"):
        return np.where(np.asarray(below) > 0, np.asarray(above, dtype=np.float64) / np.asarray(below), np.nan)
