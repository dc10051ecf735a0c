"""What needs no network to say about classes: their frequencies, k-mer counts, and the most similar other sequence.

Each is fitted on the sequences outside the fold that it predicts. A classifier that does not beat the best of them has
learned less than counting knows. How far counts and neighbours are to be believed is learned on those other folds as
well, see `pipeline.bayes`.

Letters: N sequences, n some of them, K classes, V words (k-mers), P parts of `pipeline.bayes.Known`.
"""

from collections.abc import Sequence

import numpy as np
from scipy.sparse import csr_matrix

from pipeline.bayes import MOST_WORDS, Known, NaiveBayes, tuned
from pipeline.kmers import count_words, longest_words
from pipeline.labels import Classes, letters_of

#: Most words by which neighbours are found: 4-mers of RNA, 2-mers of proteins.
NEIGHBOUR_WORDS = 512
#: Pairs of sequences that are compared; of more, the sequences to copy from are thinned evenly.
#: 400 million, 20,000 sequences with each other, take 3 s on one thread.
MOST_PAIRS = 400_000_000

_AT_ONCE = 512


def predict_floors(
    sequences: Sequence[str], truth_NK: np.ndarray, fold_N: np.ndarray, cluster_N: np.ndarray, classes: Classes
) -> dict[str, np.ndarray]:
    """Floor -> [N, K] float64 probabilities, each fold predicted from the others.

    Args:
        sequences: N labelled sequences, in the letters of `classes`.
        truth_NK: [N, K] bool.
        fold_N: [N] fold that holds a sequence out.
        cluster_N: [N] its relatives, see `pipeline.bayes.Known`.
        classes: names, kind and alphabet.
    """
    letters = letters_of(classes.alphabet)
    k_bayes, k_near = (longest_words(len(letters), most) for most in (MOST_WORDS, NEIGHBOUR_WORDS))
    known = Known(truth_NK, fold_N, cluster_N, exclusive=classes.exclusive)
    frequent_NK = np.empty(truth_NK.shape)
    for fold in known.folds:
        frequent_NK[fold_N == fold] = known.frequencies(known.parts_of(fold))
    bayes = NaiveBayes(count_words(sequences, letters, k_bayes), known)
    near = Neighbours(count_words(sequences, letters, k_near), known)
    among = f" among 1 in {near.step}" if near.step > 1 else ""
    return {
        "class frequencies": frequent_NK,
        f"naive Bayes, {k_bayes}-mers": tuned(bayes, known),
        f"nearest neighbour, {k_near}-mers{among}": tuned(near, known),
    }


class Neighbours:
    """Labels of the sequence whose word counts point most nearly the same way."""

    def __init__(self, words_NV: csr_matrix, known: Known) -> None:
        self._known = known
        length_N = np.sqrt(np.asarray(words_NV.multiply(words_NV).sum(axis=1)).ravel())
        unit_NV = (words_NV.toarray() / np.maximum(length_N, 1e-9)[:, None]).astype(np.float32)
        self._alike_NP = np.full((len(unit_NV), len(known.parts)), -1.0, dtype=np.float32)
        self._near_NP = np.zeros(self._alike_NP.shape, dtype=np.int64)
        self.step = max(1, -(-(len(unit_NV) ** 2) // MOST_PAIRS))  # of the sequences to copy from, every so many
        for place, part in enumerate(known.parts):
            others, mine = np.flatnonzero(known.part_N != part), np.flatnonzero(known.part_N == part)[:: self.step]
            for low in range(0, len(others), _AT_ONCE):
                some = others[low : low + _AT_ONCE]
                alike_nm = unit_NV[some] @ unit_NV[mine].T
                best_n = np.argmax(alike_nm, axis=1)
                self._alike_NP[some, place] = alike_nm[np.arange(len(some)), best_n]
                self._near_NP[some, place] = mine[best_n]

    def evidence(self, rows_n: np.ndarray, without: set[int]) -> np.ndarray:
        """[n, K] labels of the nearest."""
        allowed_P = ~np.isin(self._known.parts, list(without))
        best_n = np.argmax(np.where(allowed_P, self._alike_NP[rows_n], -2.0), axis=1)
        return self._known.truth_NK[self._near_NP[rows_n, best_n]].astype(np.float64)

    def mix(self, frequent_nK: np.ndarray, evidence_nK: np.ndarray, factor: float) -> np.ndarray:
        """[n, K] probabilities; factor 1 believes the neighbour alone."""
        return factor * evidence_nK + (1.0 - factor) * frequent_nK
