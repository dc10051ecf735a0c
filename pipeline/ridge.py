"""Numbers by counting words: ridge regression on k-mers, length and, where all have one length, the letter at a place.

How hard the weights are pulled to zero is chosen for each number on the folds that it is fitted on: on parts of these,
each told by the rest (`pipeline.bayes.cut_folds`).

Letters: N sequences, n some of them, C numbers, V features, P penalties, T letters of all sequences.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.sparse import csr_matrix, hstack, vstack

from pipeline.kmers import count_words, in_parts, longest_words, places_in
from pipeline.labels import letters_of

#: Most words of the longest k: 4-mers of RNA, 2-mers of proteins; and most pairs of a place and a letter.
MOST_FEATURES = 512
#: What is chosen among: squares of the standardised weights cost so much, in units of the squared error of a sequence.
PENALTIES_P = np.logspace(-1, 6, 15)

_AT_ONCE = 4096  # sequences whose features are dense together
_TELLERS = 8  # most parts that choose a penalty


@dataclass(frozen=True)
class View:
    """What is seen of a sequence."""

    letters: str  #: other letters are seen as none
    span: int  #: so many first places are seen by themselves; 0 where the lengths differ

    @classmethod
    def of(cls, sequences: Sequence[str], alphabet: str) -> "View":
        """Places are seen if all sequences are of one length.

        >>> View.of(["ACGU", "AAGU"], "ACGUN"), View.of(["ACG", "AAGU"], "ACGUN").span
        (View(letters='ACGU', span=4), 0)
        """
        letters, lengths = letters_of(alphabet), {len(sequence) for sequence in sequences}
        span = lengths.pop() if len(lengths) == 1 else 0
        return cls(letters, span if span * len(letters) <= MOST_FEATURES else 0)

    @property
    def longest(self) -> int:
        """Letters of the longest words."""
        return longest_words(len(self.letters), MOST_FEATURES)

    def features(self, sequences: Sequence[str]) -> csr_matrix:
        """[N, V] float32: length, counts of all words up to the longest, and the letter at each place."""
        return vstack([self._features(part) for part in in_parts(sequences)], format="csr")

    def _features(self, sequences: Sequence[str]) -> csr_matrix:
        lengths_N1 = np.array([[len(sequence)] for sequence in sequences], dtype=np.float32).reshape(-1, 1)
        words = [count_words(sequences, self.letters, k) for k in range(1, self.longest + 1)]
        return hstack([csr_matrix(lengths_N1), *words, self._at_places(sequences)], format="csr")

    def _at_places(self, sequences: Sequence[str]) -> csr_matrix:
        """[N, V] float32: 1 for the letter at each of the first places."""
        text = "".join(sequence[: self.span].ljust(self.span) for sequence in sequences)
        letter_NS = places_in(self.letters, text).reshape(len(sequences), self.span)
        row_T, place_T = np.nonzero(letter_NS >= 0)
        column_T = place_T * len(self.letters) + letter_NS[row_T, place_T]
        ones_T = np.ones(len(row_T), dtype=np.float32)
        return csr_matrix((ones_T, (row_T, column_T)), shape=(len(sequences), self.span * len(self.letters)))


@dataclass(frozen=True, kw_only=True)
class Model:
    """What predicts the numbers of a sequence."""

    view: View
    weights_CV: np.ndarray  #: float64, of the features as they are
    level_C: np.ndarray  #: float64, added
    low_C: np.ndarray  #: float64: the lowest number that was learned from; no prediction is below it
    high_C: np.ndarray  #: float64: the highest
    penalty_C: np.ndarray  #: float64, as chosen

    def predict(self, sequences: Sequence[str]) -> np.ndarray:
        """[N, C] float64, in the units of the data."""
        said_NC = np.concatenate([self.view.features(part) @ self.weights_CV.T for part in in_parts(sequences)])
        return np.clip(said_NC + self.level_C, self.low_C, self.high_C)


class _Moments(NamedTuple):
    """Sums over some sequences, of which everything that is fitted is made."""

    rows: np.ndarray  #: a scalar
    x_V: np.ndarray
    y_C: np.ndarray
    xx_VV: np.ndarray
    xy_VC: np.ndarray


class Ridge:
    """Fits to the sequences outside a fold.

    Args:
        sequences: N of them.
        truth_NC: [N, C] float, NaN = not measured.
        fold_N: [N] the fold of each.
        part_N: [N] the part of each; a fold is some of the parts.
        view: what is seen of a sequence.
    """

    def __init__(
        self, sequences: Sequence[str], truth_NC: np.ndarray, fold_N: np.ndarray, part_N: np.ndarray, view: View
    ) -> None:
        self._view, self._features_NV = view, view.features(sequences)
        self._truth_NC, self._fold_N = truth_NC, fold_N
        self._part_N = part_N
        parts = np.unique(part_N).tolist()
        measured_NC = np.isfinite(truth_NC)
        patterns, of_C = np.unique(measured_NC, axis=1, return_inverse=True)
        self._groups = [np.flatnonzero(of_C.ravel() == group) for group in range(patterns.shape[1])]
        self._moments = [{part: self._sum(columns, part_N == part) for part in parts} for columns in self._groups]

    def _sum(self, columns: np.ndarray, here_N: np.ndarray) -> _Moments:
        """Sums over the sequences of a part in which these columns, all or none of them, were measured."""
        rows = np.flatnonzero(here_N & np.isfinite(self._truth_NC[:, columns[0]]))
        width = self._features_NV.shape[1]
        xx_VV, xy_VC = np.zeros((width, width)), np.zeros((width, len(columns)))
        x_V, y_C = np.zeros(width), self._truth_NC[np.ix_(rows, columns)].sum(axis=0)
        for low in range(0, len(rows), _AT_ONCE):
            some = rows[low : low + _AT_ONCE]
            x_nV = self._features_NV[some].toarray().astype(np.float64)
            x_V += x_nV.sum(axis=0)
            xx_VV += x_nV.T @ x_nV
            xy_VC += x_nV.T @ self._truth_NC[np.ix_(some, columns)]
        return _Moments(np.array(len(rows)), x_V, y_C, xx_VV, xy_VC)

    def fit(self, fold: int) -> Model:
        """The model of a fold, from all others; where these lack a number, 0 is predicted of it."""
        width, total = self._features_NV.shape[1], self._truth_NC.shape[1]
        weights_CV, level_C, penalty_C = np.zeros((total, width)), np.zeros(total), np.full(total, np.inf)
        others_N = self._fold_N != fold
        outside = np.unique(self._part_N[others_N]).tolist()
        for columns, moments in zip(self._groups, self._moments, strict=True):
            parts = [moments[part] for part in outside]
            if sum(int(part.rows) for part in parts):
                best_C = self._choose(columns, moments, outside)
                fitted_PVC, level_PC = _solve(parts)
                take = best_C, np.arange(len(columns))
                weights_CV[columns] = fitted_PVC[best_C, :, take[1]]
                level_C[columns], penalty_C[columns] = level_PC[take], PENALTIES_P[best_C]
        low_C, high_C = self._span(others_N)
        fitted = {"weights_CV": weights_CV, "level_C": level_C, "penalty_C": penalty_C}
        return Model(view=self._view, low_C=low_C, high_C=high_C, **fitted)

    def _choose(self, columns: np.ndarray, moments: dict[int, _Moments], outside: list[int]) -> np.ndarray:
        """Place of the penalty of each column under which these parts, each told by the rest, are predicted best."""
        error_PC = np.zeros((len(PENALTIES_P), len(columns)))
        for told in outside[:: -(-len(outside) // _TELLERS)]:
            rest = [moments[other] for other in outside if other != told]
            rows = np.flatnonzero((self._part_N == told) & np.isfinite(self._truth_NC[:, columns[0]]))
            if sum(int(part.rows) for part in rest) and rows.size:
                weights_PVC, level_PC = _solve(rest)
                for place, (weights_VC, level_C) in enumerate(zip(weights_PVC, level_PC, strict=True)):
                    said_nC = self._features_NV[rows] @ weights_VC + level_C
                    error_PC[place] += np.square(said_nC - self._truth_NC[np.ix_(rows, columns)]).sum(axis=0)
        best_C: np.ndarray = len(PENALTIES_P) - 1 - np.argmin(error_PC[::-1], axis=0)  # of equals the strongest
        return best_C

    def _span(self, here_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """[C] lowest and highest number of some sequences; 0 where there is none."""
        truth_nC = self._truth_NC[here_N]
        known_C = np.isfinite(truth_nC).any(axis=0)
        low_C = np.where(np.isfinite(truth_nC), truth_nC, np.inf).min(axis=0, initial=np.inf)
        high_C = np.where(np.isfinite(truth_nC), truth_nC, -np.inf).max(axis=0, initial=-np.inf)
        return np.where(known_C, low_C, 0.0), np.where(known_C, high_C, 0.0)


def _solve(parts: Sequence[_Moments]) -> tuple[np.ndarray, np.ndarray]:
    """[P, V, C] weights and [P, C] levels of every penalty, of standardised features, the level itself free."""
    total = _Moments(*(np.sum(part, axis=0) for part in zip(*parts, strict=True)))
    mean_V, mean_C = total.x_V / total.rows, total.y_C / total.rows
    inner_VV = total.xx_VV - total.rows * np.outer(mean_V, mean_V)
    spread_V = np.sqrt(np.maximum(np.diag(inner_VV) / total.rows, 0.0))
    seen_V = spread_V > 1e-6 * (np.abs(mean_V) + 1e-6)  # a feature that never changes says nothing
    unit_V = np.where(seen_V, 1.0 / np.where(seen_V, spread_V, 1.0), 0.0)
    along_VC = (total.xy_VC - np.outer(mean_V, total.y_C)) * unit_V[:, None]
    value_V, vector_VV = np.linalg.eigh(inner_VV * np.outer(unit_V, unit_V))
    turned_VC = vector_VV.T @ along_VC
    shrunk_PVC = turned_VC / (np.maximum(value_V, 0.0)[:, None] + PENALTIES_P[:, None, None])
    weights_PVC = (vector_VV @ shrunk_PVC) * unit_V[:, None]
    return weights_PVC, mean_C - np.einsum("v,pvc->pc", mean_V, weights_PVC)
