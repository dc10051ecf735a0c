"""Relatives across the folds of splits: every pair of designs, or some designs with all.

Letters: N sequences sorted by length, Q those that are compared with all others, S splits, P `PERCENTS`.
"""

from collections.abc import Iterator
from typing import NamedTuple

import numpy as np

from folds.edit_distance import UNKNOWN, Packed, distance_rows, most_edits, pair_distances, share_identical
from pipeline.compiled import njit
from pipeline.runlog import Bar

#: Cross-fold pairs are counted from these identities on, %.
PERCENTS = (80, 70, 60)

_AT_ONCE = 1 << 21  # pairs: about 150 MiB of indices and distances


class Survey(NamedTuple):
    """Relatives across folds, split by split."""

    pairs: np.ndarray  #: [1] int64, pairs that were compared
    counts_SP: np.ndarray  #: int64, cross-fold pairs of at least each of `PERCENTS`
    highest_S: np.ndarray  #: float64, highest cross-fold identity
    worst_S2: np.ndarray  #: int64, a pair that reaches it
    best_SN: np.ndarray  #: float64, identity of `nearest_SN`; -1 = there is none
    nearest_SN: np.ndarray  #: int64, most identical scored sequence of another fold, of scored sequences; or -1


def compare(packed: Packed, folds_SN: np.ndarray, scored_N: np.ndarray, *, queries: np.ndarray | None) -> Survey:
    """Compare all pairs of designs, or some designs with all, and survey what lies across folds.

    Args:
        packed: N designs, sorted by length.
        folds_SN: [S, N] int64.
        scored_N: [N] bool; only scored sequences have, and are, nearest neighbours.
        queries: places of the sequences to compare with all others; None = all.
    """
    splits, total = folds_SN.shape
    survey = Survey(
        pairs=np.zeros(1, np.int64),
        counts_SP=np.zeros((splits, len(PERCENTS)), np.int64),
        highest_S=np.full(splits, -1.0),
        worst_S2=np.full((splits, 2), -1),
        best_SN=np.full((splits, total), -1.0),
        nearest_SN=np.full((splits, total), -1),
    )
    with Bar("compare across folds", total=total if queries is None else len(queries), unit="sequences") as bar:
        for rows_R, distances_RN in _rows(packed, queries):
            _enter(rows_R, distances_RN, packed.lengths_N, folds_SN, scored_N, survey)
            bar.advance(len(rows_R))
    return survey


def _rows(packed: Packed, queries: np.ndarray | None) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Rows of distances with their places; every pair once, `UNKNOWN` elsewhere."""
    total = packed.lengths_N.size
    if queries is None:
        for first, distances_RN in distance_rows(packed, np.arange(total)):
            yield np.arange(first, first + len(distances_RN)), distances_RN
        return
    step = max(1, _AT_ONCE // total)
    for low in range(0, len(queries), step):
        some = queries[low : low + step]
        distances = pair_distances(packed, np.repeat(some, total), np.tile(np.arange(total), len(some)))
        distances_RN = distances.reshape(len(some), total).astype(np.uint16)
        for row, query in enumerate(some):
            distances_RN[row, queries[queries <= query]] = UNKNOWN
        yield some, distances_RN


@njit(cache=True)
def _enter(
    rows_R: np.ndarray,
    distances_RN: np.ndarray,
    lengths_N: np.ndarray,
    folds_SN: np.ndarray,
    scored_N: np.ndarray,
    survey: Survey,
) -> None:
    """Enter rows of distances into a survey. Of equally near neighbours the one with the smaller place counts."""
    for row in range(rows_R.size):
        here = rows_R[row]
        for other in range(lengths_N.size):
            edits = distances_RN[row, other]
            if edits == UNKNOWN:
                continue
            survey.pairs[0] += 1
            short, long = lengths_N[here], lengths_N[other]
            if short > long:
                short, long = long, short
            alike = share_identical(edits, short, long)
            both = scored_N[here] and scored_N[other]
            for split in range(folds_SN.shape[0]):
                if folds_SN[split, here] == folds_SN[split, other]:
                    continue
                for place, percent in enumerate(PERCENTS):
                    survey.counts_SP[split, place] += edits <= most_edits(short, long, percent)
                if alike > survey.highest_S[split]:
                    survey.highest_S[split] = alike
                    survey.worst_S2[split, 0], survey.worst_S2[split, 1] = here, other
                if both:
                    _keep_nearest(survey, split, here, other, alike)
                    _keep_nearest(survey, split, other, here, alike)


@njit(cache=True)
def _keep_nearest(survey: Survey, split: int, one: int, two: int, alike: float) -> None:
    best = survey.best_SN[split, one]
    if alike > best or (alike == best and two < survey.nearest_SN[split, one]):
        survey.best_SN[split, one], survey.nearest_SN[split, one] = alike, two
