"""What needs no network to say about classes: their frequencies, k-mer counts, and the most similar other sequence.

Each is fitted on the sequences outside the fold that it predicts. A classifier that does not beat the best of them has
learned less than counting knows. How far counts and neighbours are to be believed, one number each, is learned on those
other folds as well, from what each is told by the rest of them; without that, multinomial naive Bayes is far too sure.
Of two or three folds the rest is too little (of three: log loss 0.49 where all others give 0.33, on five families of
RNA), so there each is told by all others, the predicted fold among them.

Letters: N sequences, n some of them, K classes, V words (k-mers), F folds, T letters of all sequences.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

import numpy as np
from scipy.sparse import csr_matrix

from pipeline.classes import Classes, log_losses
from pipeline.schema import ALPHABET, AMINO_ACIDS

#: Most words of naive Bayes: 6-mers of RNA, 3-mers of proteins.
BAYES_WORDS = 8192
#: Most words by which neighbours are found: 4-mers of RNA, 2-mers of proteins.
NEIGHBOUR_WORDS = 512
#: Pairs of sequences that are compared; of more, the sequences to copy from are thinned evenly.
#: 400 million, 20,000 sequences with each other, take 3 s on one thread.
MOST_PAIRS = 400_000_000

_LEARN_FROM = 20_000  # sequences by which a floor is tuned
_AT_ONCE = 512


def predict_floors(
    sequences: Sequence[str], truth_NK: np.ndarray, fold_N: np.ndarray, classes: Classes
) -> dict[str, np.ndarray]:
    """Floor -> [N, K] float64 probabilities, each fold predicted from the others.

    Args:
        sequences: N labelled sequences, in the letters of `classes`.
        truth_NK: [N, K] bool.
        fold_N: [N] fold that holds a sequence out.
        classes: names, kind and alphabet.
    """
    letters = ALPHABET if classes.is_nucleic else AMINO_ACIDS
    k_bayes, k_near = (_longest_words(len(letters), most) for most in (BAYES_WORDS, NEIGHBOUR_WORDS))
    known = _Known(truth_NK, fold_N, exclusive=classes.exclusive)
    frequent_NK = np.empty(truth_NK.shape)
    for fold in known.folds:
        frequent_NK[fold_N == fold] = known.frequencies({fold})
    bayes = NaiveBayes(count_words(sequences, letters, k_bayes), known)
    near = Neighbours(count_words(sequences, letters, k_near), known)
    among = f" among 1 in {near.step}" if near.step > 1 else ""
    return {
        "class frequencies": frequent_NK,
        f"naive Bayes, {k_bayes}-mers": _tuned(bayes, known),
        f"nearest neighbour, {k_near}-mers{among}": _tuned(near, known),
    }


class _Known:
    """The truth, and what it says of the classes without some of the folds."""

    def __init__(self, truth_NK: np.ndarray, fold_N: np.ndarray, *, exclusive: bool) -> None:
        self.truth_NK, self.fold_N, self.exclusive = truth_NK, fold_N, exclusive
        self.folds: list[int] = np.unique(fold_N).tolist()

    def without(self, folds: set[int]) -> np.ndarray:
        """[N] bool: sequences of other folds."""
        return ~np.isin(self.fold_N, list(folds))

    def frequencies(self, folds: set[int]) -> np.ndarray:
        """[K] share of every class without some folds, counted with one more of each kind."""
        truth_nK = self.truth_NK[self.without(folds)]
        return (truth_nK.sum(axis=0) + 1.0) / (len(truth_nK) + (truth_nK.shape[1] if self.exclusive else 2))


class _Floor(Protocol):
    """Evidence for classes, from the sequences outside some folds."""

    def evidence(self, rows_n: np.ndarray, without: set[int]) -> np.ndarray:
        """[n, K] for the sequences at some places, all of one fold."""

    def mix(self, frequent_nK: np.ndarray, evidence_nK: np.ndarray, factor: float) -> np.ndarray:
        """[n, K] probabilities: class frequencies where `factor` is 0, and what the evidence says where it is 1."""


# --------------------------------------------------------------------------------------------------------------- words


def _longest_words(letters: int, most: int) -> int:
    """The longest k for which there are at most so many k-mers.

    >>> _longest_words(4, 8192), _longest_words(20, 8192), _longest_words(20, 512)
    (6, 3, 2)
    """
    return max(k for k in range(1, 9) if letters**k <= most or k == 1)


def count_words(sequences: Sequence[str], letters: str, k: int) -> csr_matrix:
    """[N, V] float32: how often each k-mer occurs, those with other letters left out; V = len(letters) ** k.

    >>> count_words(["ACACNA", "G"], "ACGU", 2).toarray()[:, [1, 4]].tolist()
    [[2.0, 1.0], [0.0, 0.0]]
    """
    lengths_N = np.fromiter(map(len, sequences), dtype=np.int64, count=len(sequences))
    place = np.full(256, -1)
    place[np.frombuffer(letters.encode(), dtype=np.uint8)] = np.arange(len(letters))
    token_T = place[np.frombuffer("".join(sequences).encode(), dtype=np.uint8)]
    start_T = np.flatnonzero(np.arange(len(token_T)) + k <= np.repeat(np.cumsum(lengths_N), lengths_N))
    parts_TK = np.stack([token_T[start_T + shift] for shift in range(k)], axis=1)
    known_T = (parts_TK >= 0).all(axis=1)
    word_T = parts_TK[known_T] @ len(letters) ** np.arange(k)[::-1]
    owner_T = np.repeat(np.arange(len(sequences)), lengths_N)[start_T[known_T]]
    ones_T = np.ones(len(word_T), dtype=np.float32)
    return csr_matrix((ones_T, (owner_T, word_T)), shape=(len(sequences), len(letters) ** k))


# ------------------------------------------------------------------------------------------------------ naive Bayes


class NaiveBayes:
    """Multinomial naive Bayes with add-one smoothing; of several labels, each class against the rest."""

    def __init__(self, words_NV: csr_matrix, known: _Known) -> None:
        self._words_NV, self._known = words_NV, known
        sums = [self._sums(known.fold_N == fold) for fold in known.folds]
        self._inside_FKV, self._all_FV = (np.stack(parts) for parts in zip(*sums, strict=True))

    def _sums(self, here_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[K, V] words in the sequences of each class, and [V] in all."""
        words_nV = self._words_NV[here_N]
        truth_nK = self._known.truth_NK[here_N].astype(np.float64)
        return (words_nV.T @ truth_nK).T, np.asarray(words_nV.sum(axis=0), dtype=np.float64).ravel()

    def evidence(self, rows_n: np.ndarray, without: set[int]) -> np.ndarray:
        """[n, K] log probability of the words in each class; of several labels, less that in the rest."""
        here_F = ~np.isin(self._known.folds, list(without))
        inside_KV, all_V = self._inside_FKV[here_F].sum(axis=0), self._all_FV[here_F].sum(axis=0)
        weight_KV = _log_shares(inside_KV)
        if not self._known.exclusive:
            weight_KV = weight_KV - _log_shares(all_V - inside_KV)
            truth_nK = self._known.truth_NK[self._known.without(without)]
            weight_KV[truth_nK.all(axis=0) | ~truth_nK.any(axis=0)] = 0.0  # nothing to compare with
        return self._words_NV[rows_n] @ weight_KV.T

    def mix(self, frequent_nK: np.ndarray, evidence_nK: np.ndarray, factor: float) -> np.ndarray:
        """[n, K] probabilities; factor 1 takes all words for independent."""
        if not self._known.exclusive:
            odds_nK = np.log(frequent_nK / (1 - frequent_nK)) + factor * evidence_nK
            return 1.0 / (1.0 + np.exp(-np.clip(odds_nK, -50.0, 50.0)))
        log_nK = np.log(frequent_nK) + factor * evidence_nK
        share_nK = np.exp(log_nK - log_nK.max(axis=1, keepdims=True))
        return share_nK / share_nK.sum(axis=1, keepdims=True)


def _log_shares(counts_KV: np.ndarray) -> np.ndarray:
    return np.log((counts_KV + 1.0) / (counts_KV + 1.0).sum(axis=1, keepdims=True))


# ------------------------------------------------------------------------------------------------ nearest neighbour


class Neighbours:
    """Labels of the sequence whose word counts point most nearly the same way."""

    def __init__(self, words_NV: csr_matrix, known: _Known) -> None:
        self._known = known
        length_N = np.sqrt(np.asarray(words_NV.multiply(words_NV).sum(axis=1)).ravel())
        unit_NV = (words_NV.toarray() / np.maximum(length_N, 1e-9)[:, None]).astype(np.float32)
        self._alike_NF = np.full((len(unit_NV), len(known.folds)), -1.0, dtype=np.float32)
        self._near_NF = np.zeros(self._alike_NF.shape, dtype=np.int64)
        self.step = max(1, -(-(len(unit_NV) ** 2) // MOST_PAIRS))  # of the sequences to copy from, every so many
        for place, fold in enumerate(known.folds):
            others, mine = np.flatnonzero(known.fold_N != fold), np.flatnonzero(known.fold_N == fold)[:: self.step]
            for low in range(0, len(others), _AT_ONCE):
                some = others[low : low + _AT_ONCE]
                alike_nm = unit_NV[some] @ unit_NV[mine].T
                best_n = np.argmax(alike_nm, axis=1)
                self._alike_NF[some, place] = alike_nm[np.arange(len(some)), best_n]
                self._near_NF[some, place] = mine[best_n]

    def evidence(self, rows_n: np.ndarray, without: set[int]) -> np.ndarray:
        """[n, K] labels of the nearest."""
        allowed_F = ~np.isin(self._known.folds, list(without))
        best_n = np.argmax(np.where(allowed_F, self._alike_NF[rows_n], -2.0), axis=1)
        return self._known.truth_NK[self._near_NF[rows_n, best_n]].astype(np.float64)

    def mix(self, frequent_nK: np.ndarray, evidence_nK: np.ndarray, factor: float) -> np.ndarray:
        """[n, K] probabilities; factor 1 believes the neighbour alone."""
        return factor * evidence_nK + (1.0 - factor) * frequent_nK


# ------------------------------------------------------------------------------------------------------------- tuning


def _tuned(floor: _Floor, known: _Known) -> np.ndarray:
    """[N, K] predictions with the factor that is best on the other folds; the log loss is convex in it.

    Its limit is below 1: what was always right on n sequences may be wrong once in n + 2.
    """
    tuned_NK = np.empty(known.truth_NK.shape)
    for fold in known.folds:
        rows_n, frequent_nK, evidence_nK = _told_by_the_rest(floor, known, fold)
        truth_nK = known.truth_NK[rows_n]

        def loss(factor: float, told: tuple[np.ndarray, ...] = (frequent_nK, evidence_nK, truth_nK)) -> float:
            said_nK = floor.mix(told[0], told[1], factor)
            return float(log_losses(said_nK, told[2], exclusive=known.exclusive).mean())

        factor = _least(loss, high=1.0 - 1.0 / (len(rows_n) + 2))
        mine = np.flatnonzero(known.fold_N == fold)
        tuned_NK[mine] = floor.mix(known.frequencies({fold})[None], floor.evidence(mine, {fold}), factor)
    return tuned_NK


def _told_by_the_rest(floor: _Floor, known: _Known, fold: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Places, frequencies and evidence of the sequences of the other folds, each from the rest of them."""
    step = max(1, -(-int((known.fold_N != fold).sum()) // _LEARN_FROM))
    rows, frequent, evidence = [], [], []
    for other in known.folds:
        if other != fold:
            without = {other, fold} if len(known.folds) > 3 else {other}
            some = np.flatnonzero(known.fold_N == other)[::step]
            rows.append(some)
            frequent.append(np.repeat(known.frequencies(without)[None], len(some), axis=0))
            evidence.append(floor.evidence(some, without))
    return np.concatenate(rows), np.concatenate(frequent), np.concatenate(evidence)


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
