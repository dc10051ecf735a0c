"""What needs no network to say about numbers: their means, ridge regression on words, and the most similar sequence.

Each is fitted on the sequences outside the fold that it predicts.

Letters: N sequences, n some of them, C columns.
"""

from collections.abc import Sequence

import numpy as np

from pipeline.bayes import Known, told_by_the_rest
from pipeline.kmers import count_words, longest_words
from pipeline.labels import Numbers, letters_of
from pipeline.ridge import Ridge, View
from submissions.class_floors import NEIGHBOUR_WORDS, Neighbours


class _Measured(Known):
    """Numbers, and what is to be expected of them without some parts."""

    def __init__(self, truth_NC: np.ndarray, fold_N: np.ndarray, cluster_N: np.ndarray) -> None:
        super().__init__(truth_NC, fold_N, cluster_N, exclusive=False)

    def frequencies(self, parts: set[int]) -> np.ndarray:
        """[C] mean of every column without some parts; 0 where nothing was measured."""
        truth_nC = self.truth_NK[self.without(parts)]
        there_nC = np.isfinite(truth_nC)
        return np.where(there_nC, truth_nC, 0.0).sum(axis=0) / np.maximum(there_nC.sum(axis=0), 1)


def predict_floors(
    sequences: Sequence[str], truth_NC: np.ndarray, fold_N: np.ndarray, cluster_N: np.ndarray, numbers: Numbers
) -> dict[str, np.ndarray]:
    """Floor -> [N, C] float64, each fold predicted from the others.

    Arguments are those of `submissions.class_floors.predict_floors`; of `truth_NC`, NaN = not measured.
    """
    known, letters = _Measured(truth_NC, fold_N, cluster_N), letters_of(numbers.alphabet)
    view, k_near = View.of(sequences, numbers.alphabet), longest_words(len(letters), NEIGHBOUR_WORDS)
    ridge = Ridge(sequences, truth_NC, fold_N, known.part_N, view)
    near = Neighbours(count_words(sequences, letters, k_near), known)
    mean_NC, ridge_NC, near_NC = np.empty((3, *truth_NC.shape))
    for fold in known.folds:
        mine = np.flatnonzero(fold_N == fold)
        mean_NC[mine] = known.frequencies(known.parts_of(fold))
        ridge_NC[mine] = ridge.fit(fold).predict([sequences[at] for at in mine.tolist()])
        near_NC[mine] = _like_the_nearest(near, known, fold, mine)
    places = " and places" if view.span else ""
    among = f" among 1 in {near.step}" if near.step > 1 else ""
    return {
        "mean": mean_NC,
        f"ridge, {view.longest}-mers{places}": ridge_NC,
        f"nearest neighbour, {k_near}-mers{among}": near_NC,
    }


def _like_the_nearest(near: Neighbours, known: _Measured, fold: int, mine: np.ndarray) -> np.ndarray:
    """[n, C] of a fold: the mean, and so much of the neighbour's difference from it as is best on the other folds."""
    mean_C = known.frequencies(known.parts_of(fold))
    told = told_by_the_rest(near, known, fold)
    if told is None:
        return np.repeat(mean_C[None], len(mine), axis=0)
    rows_n, mean_nC, copied_nC = told
    truth_nC = known.truth_NK[rows_n]
    both_nC = np.isfinite(truth_nC) & np.isfinite(copied_nC)
    off_nC, true_nC = (np.where(both_nC, each_nC - mean_nC, 0.0) for each_nC in (copied_nC, truth_nC))
    along_C, across_C = (off_nC * true_nC).sum(axis=0), np.square(off_nC).sum(axis=0)
    share_C = np.clip(along_C / np.where(across_C > 0, across_C, 1.0), 0.0, 1.0)
    copied_nC = near.evidence(mine, known.parts_of(fold))
    return mean_C + share_C * (np.where(np.isfinite(copied_nC), copied_nC, mean_C) - mean_C)
