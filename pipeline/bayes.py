"""Naive Bayes of words, and how far it is to be believed.

That, one number, is learned on the folds that it is fitted on, from what each is told by the rest of them: multinomial
naive Bayes left to itself is far too sure. Of two or three folds the rest is too little, so there folds are cut into
parts of whole clusters, and each part is told by the rest of all. Of three folds, five families of RNA have a log loss
of 0.49 by the rest of the folds, and of 0.337 by four parts of each (2, 3, 6 and 8: 0.349, 0.337, 0.334, 0.334).

Letters: N sequences, n some of them, K classes, V words (k-mers), P parts: the folds, or pieces of them.
"""

from collections.abc import Callable
from typing import Protocol

import numpy as np
from scipy.sparse import csr_matrix

from pipeline.labels import log_losses

#: Most words: 6-mers of RNA, 3-mers of proteins.
MOST_WORDS = 8192

_PIECES = 4  # parts of a fold, where there are no more than three
_LEARN_FROM = 20_000  # sequences by which the belief in the counts is tuned


def cut_folds(fold_N: np.ndarray, cluster_N: np.ndarray) -> np.ndarray:
    """[N] int64 parts that tell each other what is learned: the folds or, of up to three, pieces of whole clusters.

    >>> cut_folds(np.array([0, 0, 0, 1, 1]), np.array(["a", "b", "b", "c", "d"])).tolist()
    [0, 1, 1, 6, 7]
    """
    pieces = 1 if len(np.unique(fold_N)) > 3 else _PIECES
    return fold_N.astype(np.int64) * pieces + np.unique(cluster_N, return_inverse=True)[1] % pieces


class Known:
    """The truth, and what it says of the classes without some parts.

    Args:
        truth_NK: [N, K] bool.
        fold_N: [N] fold that holds a sequence out.
        cluster_N: [N] its relatives, which stay in one part.
        exclusive: whether a sequence has one class.
    """

    def __init__(self, truth_NK: np.ndarray, fold_N: np.ndarray, cluster_N: np.ndarray, *, exclusive: bool) -> None:
        self.truth_NK, self.fold_N, self.exclusive = truth_NK, fold_N, exclusive
        self.folds: list[int] = np.unique(fold_N).tolist()
        self.part_N = cut_folds(fold_N, cluster_N)
        self.parts: list[int] = np.unique(self.part_N).tolist()

    def parts_of(self, fold: int) -> set[int]:
        """Parts that a fold consists of."""
        return set(self.part_N[self.fold_N == fold].tolist())

    def without(self, parts: set[int]) -> np.ndarray:
        """[N] bool: sequences of other parts."""
        return ~np.isin(self.part_N, list(parts))

    def frequencies(self, parts: set[int]) -> np.ndarray:
        """[K] share of every class without some parts, counted with one more of each kind."""
        truth_nK = self.truth_NK[self.without(parts)]
        return (truth_nK.sum(axis=0) + 1.0) / (len(truth_nK) + (truth_nK.shape[1] if self.exclusive else 2))


class Floor(Protocol):
    """Evidence for classes, from the sequences outside some parts."""

    def evidence(self, rows_n: np.ndarray, without: set[int]) -> np.ndarray:
        """[n, K] for the sequences at some places, all of the parts that are left out."""

    def mix(self, frequent_nK: np.ndarray, evidence_nK: np.ndarray, factor: float) -> np.ndarray:
        """[n, K] probabilities: class frequencies where `factor` is 0, and what the evidence says where it is 1."""


class NaiveBayes:
    """Multinomial naive Bayes with add-one smoothing; of several labels, each class against the rest."""

    def __init__(self, words_NV: csr_matrix, known: Known) -> None:
        self._words_NV, self._known = words_NV, known
        sums = [self._sums(known.part_N == part) for part in known.parts]
        self._inside_PKV, self._all_PV = (np.stack(each) for each in zip(*sums, strict=True))

    def _sums(self, here_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[K, V] words in the sequences of each class, and [V] in all."""
        words_nV = self._words_NV[here_N]
        truth_nK = self._known.truth_NK[here_N].astype(np.float64)
        return (words_nV.T @ truth_nK).T, np.asarray(words_nV.sum(axis=0), dtype=np.float64).ravel()

    def evidence(self, rows_n: np.ndarray, without: set[int]) -> np.ndarray:
        """[n, K] log probability of the words in each class; of several labels, less that in the rest."""
        return self._words_NV[rows_n] @ self.weights(without).T

    def weights(self, without: set[int]) -> np.ndarray:
        """[K, V] what each word adds to the evidence, from the sequences outside some parts."""
        here_P = ~np.isin(self._known.parts, list(without))
        inside_KV, all_V = self._inside_PKV[here_P].sum(axis=0), self._all_PV[here_P].sum(axis=0)
        weight_KV = _log_shares(inside_KV)
        if not self._known.exclusive:
            weight_KV = weight_KV - _log_shares(all_V - inside_KV)
            truth_nK = self._known.truth_NK[self._known.without(without)]
            weight_KV[truth_nK.all(axis=0) | ~truth_nK.any(axis=0)] = 0.0  # nothing to compare with
        return weight_KV

    def mix(self, frequent_nK: np.ndarray, evidence_nK: np.ndarray, factor: float) -> np.ndarray:
        """[n, K] probabilities; factor 1 takes all words for independent."""
        return mix(frequent_nK, evidence_nK, factor, exclusive=self._known.exclusive)


def mix(frequent_nK: np.ndarray, evidence_nK: np.ndarray, factor: float, *, exclusive: bool) -> np.ndarray:
    """[n, K] probabilities from the shares of the classes and so much of the evidence of words."""
    if not exclusive:
        odds_nK = np.log(frequent_nK / (1 - frequent_nK)) + factor * evidence_nK
        return 1.0 / (1.0 + np.exp(-np.clip(odds_nK, -50.0, 50.0)))
    log_nK = np.log(frequent_nK) + factor * evidence_nK
    share_nK = np.exp(log_nK - log_nK.max(axis=1, keepdims=True))
    return share_nK / share_nK.sum(axis=1, keepdims=True)


def _log_shares(counts_KV: np.ndarray) -> np.ndarray:
    return np.log((counts_KV + 1.0) / (counts_KV + 1.0).sum(axis=1, keepdims=True))


# --------------------------------------------------------------------------------------------------------------- tuning


def tuned(floor: Floor, known: Known) -> np.ndarray:
    """[N, K] predictions of every fold with the factor that is best on the others."""
    tuned_NK = np.empty(known.truth_NK.shape)
    for fold in known.folds:
        mine, own = np.flatnonzero(known.fold_N == fold), known.parts_of(fold)
        factor = learn_factor(floor, known, fold)
        tuned_NK[mine] = floor.mix(known.frequencies(own)[None], floor.evidence(mine, own), factor)
    return tuned_NK


def learn_factor(floor: Floor, known: Known, fold: int) -> float:
    """How far evidence is to be believed in a fold: as is best on the others; the log loss is convex in it.

    Its limit is below 1: what was always right on n sequences may be wrong once in n + 2. It is 0 where the others have
    labels in no two parts.
    """
    told = told_by_the_rest(floor, known, fold)
    if told is None:
        return 0.0
    rows_n, frequent_nK, evidence_nK = told
    truth_nK = known.truth_NK[rows_n]

    def loss(factor: float) -> float:
        said_nK = floor.mix(frequent_nK, evidence_nK, factor)
        return float(log_losses(said_nK, truth_nK, exclusive=known.exclusive).mean())

    return _least(loss, high=1.0 - 1.0 / (len(rows_n) + 2))


def told_by_the_rest(floor: Floor, known: Known, fold: int) -> tuple[np.ndarray, np.ndarray, np.ndarray] | None:
    """Places, frequencies and evidence of the sequences of the other folds, each part's from the rest; None if none."""
    step, own = max(1, -(-int((known.fold_N != fold).sum()) // _LEARN_FROM)), known.parts_of(fold)
    told = []
    for part in known.parts:
        without = own | {part}
        if part not in own and known.without(without).any():
            some = np.flatnonzero(known.part_N == part)[::step]
            frequent_nK = np.repeat(known.frequencies(without)[None], len(some), axis=0)
            told.append((some, frequent_nK, floor.evidence(some, without)))
    if not told:
        return None
    rows_n, frequent_nK, evidence_nK = (np.concatenate(each) for each in zip(*told, strict=True))
    return rows_n, frequent_nK, evidence_nK


def _least(loss: Callable[[float], float], *, high: float) -> float:
    """Where a convex function of [0, high] is least, to 1e-4, by golden section."""
    low, share = 0.0, (5**0.5 - 1) / 2
    inner = [high - share * (high - low), low + share * (high - low)]
    values = [loss(at) for at in inner]
    while high - low > 1e-4:
        if values[0] <= values[1]:
            high, inner[1], values[1] = inner[1], inner[0], values[0]
            inner[0] = high - share * (high - low)
            values[0] = loss(inner[0])
        else:
            low, inner[0], values[0] = inner[0], inner[1], values[1]
            inner[1] = low + share * (high - low)
            values[1] = loss(inner[1])
    return (low + high) / 2
