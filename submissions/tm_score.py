"""TM-score of C1' traces whose residues are matched by number, as US-align's ``-TMscore 1`` gives it. Lengths in Å.

The score is the largest over all superpositions of ``1/Lref * sum 1 / (1 + (d_i / d0)^2)``, searched as
`submissions.seed_search` says.

Letters: L residues, M candidates, R references, N pairs of traces, T residues of all pairs together, 3 xyz.

Source:
    Zhang and Skolnick 2004, Proteins 57:702; RNA: Gong et al. 2019, Bioinformatics 35:4459; search: TMscore8_search of
    US-align (Zhang et al. 2022, Nat. Methods 19:1109).
"""

import math
from collections.abc import Sequence

import numba
import numpy as np

from pipeline.compiled import njit, prange
from submissions.seed_search import FAR, MOTION, NEAR, search

#: d0 below 30 residues: (longest length, d0 in Å). Source: US-align, parameter_set4final_C3prime.
_D0_SHORT = ((11, 0.3), (15, 0.4), (19, 0.5), (23, 0.6), (29, 0.7))
#: What `evaluate` and reports call this code.
ENGINE = "built-in residue-matched search"

_MIN_RESOLVED = 3  # with fewer residues in common the score is 0, as in the competition


def d0_rna(length: int) -> float:
    """Distance scale of the RNA TM-score, Å.

    Args:
        length: resolved residues of the reference, nt.

    Raises:
        ValueError: no residue.

    Source:
        US-align, parameter_set4final_C3prime.

    >>> d0_rna(11), d0_rna(12), d0_rna(29)
    (0.3, 0.4, 0.7)
    >>> round(d0_rna(30), 4), round(d0_rna(100), 4)
    (0.7588, 3.485)
    """
    if length < 1:
        raise ValueError(f"d0_rna: got length {length}; expected at least 1 residue")
    for longest, d0 in _D0_SHORT:
        if length <= longest:
            return d0
    return 0.6 * math.sqrt(length - 0.5) - 2.5


def tm_score(predicted_L3: np.ndarray, reference_L3: np.ndarray) -> float:
    """TM-score of one trace, normalised by the reference's resolved residues.

    Args:
        predicted_L3: [L, 3] Å; NaN where missing.
        reference_L3: [L, 3] Å, same residues; NaN where not resolved.

    Returns:
        Score in [0, 1]; 0 if fewer than three residues are in common.

    Raises:
        ValueError: the shapes differ or are not [L, 3].

    >>> line = np.arange(60.0)[:, None] * np.array([3.0, 1.0, 0.5])
    >>> round(tm_score(line + 7.0, line), 6)
    1.0
    """
    return float(tm_scores([(predicted_L3, reference_L3)])[0])


def tm_scores(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """TM-scores of many pairs of traces, of any lengths, in parallel.

    Args:
        pairs: (predicted [L, 3], reference [L, 3]) Å, as in `tm_score`.

    Returns:
        [N] float64 in [0, 1].

    Raises:
        ValueError: the shapes of a pair differ or are not [L, 3].
    """
    mobile, fixed, lengths, scales = [], [], [], []
    for predicted_L3, reference_L3 in pairs:
        if predicted_L3.shape != reference_L3.shape or predicted_L3.ndim != 2 or predicted_L3.shape[1] != 3:
            raise ValueError(f"tm_score: got {predicted_L3.shape} and {reference_L3.shape}; expected [L, 3] twice")
        resolved_L = np.isfinite(reference_L3).all(axis=1)
        common_L = resolved_L & np.isfinite(predicted_L3).all(axis=1)
        mobile.append(_centred(predicted_L3[common_L]))
        fixed.append(_centred(reference_L3[common_L]))
        lengths.append(int(resolved_L.sum()))
        scales.append(d0_rna(max(lengths[-1], 1)))
    if not pairs:
        return np.zeros(0)
    offsets = np.concatenate([[0], np.cumsum([part.shape[1] for part in mobile])]).astype(np.int64)
    mobile_3T, fixed_3T = np.concatenate(mobile, axis=1), np.concatenate(fixed, axis=1)
    order = deal_by_length(np.diff(offsets))
    return np.minimum(_search_all(mobile_3T, fixed_3T, offsets, np.array(lengths), np.array(scales), order), 1.0)


def deal_by_length(lengths: np.ndarray) -> np.ndarray:
    """Order of work in which every thread's share, a run of neighbours, holds long and short alike.

    Args:
        lengths: [N] residues of each piece of work.

    Returns:
        [N] int64, the pieces.
    """
    order = np.argsort(lengths, kind="stable")[::-1].astype(np.int64)
    threads = numba.get_num_threads()
    return np.concatenate([order[first::threads] for first in range(threads)])


def tm_matrix(candidates_ML3: np.ndarray, references_RL3: np.ndarray) -> np.ndarray:
    """TM-scores of every candidate against every reference of one target.

    Args:
        candidates_ML3: [M, L, 3] Å.
        references_RL3: [R, L, 3] Å.

    Returns:
        [M, R] float64 in [0, 1].
    """
    pairs = [(candidate, reference) for candidate in candidates_ML3 for reference in references_RL3]
    return tm_scores(pairs).reshape(len(candidates_ML3), len(references_RL3))


def best_tm(candidates_ML3: np.ndarray, references_RL3: np.ndarray) -> tuple[float, int]:
    """The competition's score of a target: the best candidate against the reference that suits it best.

    Args:
        candidates_ML3: [M, L, 3] Å.
        references_RL3: [R, L, 3] Å.

    Returns:
        The score, and the 0-based candidate that reached it (the first of equals).
    """
    best_M = tm_matrix(candidates_ML3, references_RL3).max(axis=1)
    return float(best_M.max()), int(best_M.argmax())


def _centred(xyz_L3: np.ndarray) -> np.ndarray:
    """[3, L] float32 about the centre: sums of squares lose fewer digits, and columns are read with SIMD."""
    if not len(xyz_L3):
        return np.zeros((3, 0), dtype=np.float32)
    xyz_L3 = xyz_L3.astype(np.float64)
    return np.ascontiguousarray((xyz_L3 - xyz_L3.mean(axis=0)).T, dtype=np.float32)


@njit(cache=True, parallel=True)
def _search_all(
    mobile_3T: np.ndarray,
    fixed_3T: np.ndarray,
    offsets: np.ndarray,
    lengths: np.ndarray,
    scales: np.ndarray,
    order: np.ndarray,
) -> np.ndarray:
    """[N] best scores; each pair is searched by one thread, so the result does not depend on their number."""
    scores = np.zeros(len(lengths))
    for slot in prange(len(order)):
        pair = order[slot]
        start, end = offsets[pair], offsets[pair + 1]
        if end - start >= _MIN_RESOLVED:
            mobile, fixed = mobile_3T[:, start:end].copy(), fixed_3T[:, start:end].copy()
            near = min(max(scales[pair], NEAR), FAR)
            motion = np.empty(MOTION)
            scores[pair] = search(mobile, fixed, scales[pair], near, np.inf, 1, motion) / lengths[pair]
    return scores
