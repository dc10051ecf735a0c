"""Expected TM-score of a match: a small regression and a monotone calibration, both in numpy.

Letters: N matches, F features, Q terms of the quadratic expansion, K knots of the calibration.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.structure.candidate_tables import correlation

_RIDGE = 1e-3  # per example, on standardised features
_CLIP = 4.0  # standard deviations
#: How much more a match counts, the better it is: good templates are rare, and they are what is looked for.
_STRESS = 10.0


@dataclass(frozen=True, kw_only=True)
class Ranker:
    """Ridge regression on features, their squares and products."""

    mean_F: np.ndarray
    scale_F: np.ndarray
    weight_Q: np.ndarray

    @staticmethod
    def fit(features_NF: np.ndarray, tm_N: np.ndarray, groups_N: np.ndarray) -> "Ranker":
        """Learn from matches whose TM-score is known.

        Args:
            features_NF: [N, F] as `pipeline.templates.search.FEATURES` names them.
            tm_N: [N] in [0, 1].
            groups_N: [N] which matches are of one target; every target counts the same.
        """
        _, group_N, count = np.unique(groups_N, return_inverse=True, return_counts=True)
        weight_N = (1.0 + _STRESS * tm_N**2) / count[group_N]
        weight_N /= weight_N.sum()
        mean_F, scale_F = features_NF.mean(axis=0), features_NF.std(axis=0) + 1e-6
        terms_NQ = _quadratic(features_NF, mean_F, scale_F)
        penalty_QQ = _RIDGE * np.eye(terms_NQ.shape[1])
        left_QQ = (terms_NQ * weight_N[:, None]).T @ terms_NQ + penalty_QQ
        weight_Q = np.linalg.solve(left_QQ, (terms_NQ * weight_N[:, None]).T @ tm_N)
        return Ranker(mean_F=mean_F, scale_F=scale_F, weight_Q=weight_Q)

    def predict(self, features_NF: np.ndarray) -> np.ndarray:
        """[N] scores to rank by: about the TM-score, too high for the best ones."""
        return _quadratic(features_NF, self.mean_F, self.scale_F) @ self.weight_Q


def _quadratic(features_NF: np.ndarray, mean_F: np.ndarray, scale_F: np.ndarray) -> np.ndarray:
    standard_NF = np.clip((features_NF - mean_F) / scale_F, -_CLIP, _CLIP)
    i, j = np.triu_indices(standard_NF.shape[1])
    return np.hstack([np.ones((len(standard_NF), 1)), standard_NF, standard_NF[:, i] * standard_NF[:, j]])


@dataclass(frozen=True, kw_only=True)
class Calibration:
    """A non-decreasing map of scores onto expected TM-scores, linear between its knots."""

    score_K: np.ndarray
    tm_K: np.ndarray

    @staticmethod
    def fit(score_N: np.ndarray, tm_N: np.ndarray, *, least: int = 20) -> "Calibration":
        """Isotonic regression by pooling adjacent violators, on means of at least `least` neighbours.

        Source:
            Barlow et al. 1972, Statistical inference under order restrictions.
        """
        order = np.argsort(score_N, kind="stable")
        parts = np.array_split(order, max(1, len(order) // least))
        blocks: list[list[float]] = []  # sum of scores, sum of TM, count
        for part in parts:
            blocks.append([float(score_N[part].sum()), float(tm_N[part].sum()), float(len(part))])
            while len(blocks) > 1 and blocks[-2][1] / blocks[-2][2] >= blocks[-1][1] / blocks[-1][2]:
                last = blocks.pop()
                blocks[-1] = [a + b for a, b in zip(blocks[-1], last, strict=True)]
        score_K, tm_K = np.array([[block[0] / block[2], block[1] / block[2]] for block in blocks]).T
        return Calibration(score_K=score_K, tm_K=np.clip(tm_K, 0.0, 1.0))

    def expected(self, score_N: np.ndarray) -> np.ndarray:
        """[N] expected TM-scores in [0, 1]."""
        return np.interp(score_N, self.score_K, self.tm_K)


def reliability(expected_N: np.ndarray, tm_N: np.ndarray) -> dict[str, Any]:
    """How honest expected TM-scores are.

    Args:
        expected_N: [N] predicted out of fold.
        tm_N: [N] found.

    Returns:
        JSON-able: ``correlation``, ``mean_error`` (expected minus found), ``mean_absolute_error``,
        ``calibration_error`` (mean over the bins of their absolute error) and ``bins``, five of equal counts, as
        (matches, expected, found).
    """
    parts = np.array_split(np.argsort(expected_N, kind="stable"), min(5, len(tm_N)))
    rows = [(len(part), float(expected_N[part].mean()), float(tm_N[part].mean())) for part in parts]
    return {
        "correlation": round(correlation(expected_N, tm_N), 4),
        "mean_error": round(float(np.mean(expected_N - tm_N)), 4),
        "mean_absolute_error": round(float(np.mean(np.abs(expected_N - tm_N))), 4),
        "calibration_error": round(sum(n * abs(e - f) for n, e, f in rows) / len(tm_N), 4),
        "bins": [[n, round(e, 4), round(f, 4)] for n, e, f in rows],
    }
