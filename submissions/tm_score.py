"""TM-score of C1' traces whose residues are matched by number, as US-align's ``-TMscore 1`` gives it. Lengths in Å.

The score is the largest over all superpositions of ``1/Lref * sum 1 / (1 + (d_i / d0)^2)``, searched as
`submissions.seed_search` says.

Letters: L residues, M candidates, R references, N pairs of traces, T residues of all pairs together, 3 xyz.

Source:
    Zhang and Skolnick 2004, Proteins 57:702; RNA: Gong et al. 2019, Bioinformatics 35:4459; search: TMscore8_search of
    US-align (Zhang et al. 2022, Nat. Methods 19:1109).
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numba
import numpy as np

from pipeline.compiled import njit
from pipeline.schema import MIN_RESOLVED, SENTINEL
from pipeline.structure.geometry import d0_rna
from submissions.seed_search import FAR, MOTION, NEAR, search

#: What `evaluate` and reports call this code.
ENGINE = "built-in residue-matched search"

_SHARES = 16  # of the work, a thread: the last ones to end do not keep the others waiting


def tm_score(predicted_L3: np.ndarray, reference_L3: np.ndarray) -> float:
    """TM-score of one trace, normalised by the reference's resolved residues.

    Args:
        predicted_L3: [L, 3] Å; NaN, or the competitions' sentinels, where missing.
        reference_L3: [L, 3] Å, same residues; NaN, or a sentinel, where not resolved.

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
    for predicted_L3, reference_L3 in pairs:
        if predicted_L3.shape != reference_L3.shape or predicted_L3.ndim != 2 or predicted_L3.shape[1] != 3:
            raise ValueError(f"tm_score: got {predicted_L3.shape} and {reference_L3.shape}; expected [L, 3] twice")
    if not pairs:
        return np.zeros(0)
    predicted_T3, offsets = joined([predicted_L3 for predicted_L3, _ in pairs])
    reference_T3, _ = joined([reference_L3 for _, reference_L3 in pairs])
    known_T = resolved(reference_T3)
    common_T, lengths = known_T & resolved(predicted_T3), counts(known_T, offsets)
    d0 = np.array([d0_rna(max(int(length), 1)) for length in lengths])
    scores = np.zeros(len(pairs))

    def work(share: np.ndarray) -> None:
        _search_all(predicted_T3, reference_T3, common_T, offsets, lengths, d0, share, scores)

    in_threads(work, counts(common_T, offsets) ** 2)
    return np.minimum(scores, 1.0)


def joined(traces: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """[T, 3] float64 of all traces one behind the other, and [N + 1] where each begins and the last ends."""
    offsets = np.cumsum([0, *map(len, traces)], dtype=np.int64)
    return np.concatenate(traces).astype(np.float64, copy=False), offsets


def counts(chosen_T: np.ndarray, offsets: np.ndarray) -> np.ndarray:
    """[N] how many residues of each trace are chosen."""
    return np.diff(np.concatenate([[0], np.cumsum(chosen_T)])[offsets])


def in_threads(work: Callable[[np.ndarray], None], sizes: np.ndarray) -> None:
    """Call compiled code that lets go of the interpreter's lock on shares of the work, in as many threads as numba has.

    Args:
        work: gets the numbers of the pieces of a share, int64; called once for each share.
        sizes: [N] how long each piece takes, in any unit; long ones are dealt out first and evenly.
    """
    order = np.argsort(sizes, kind="stable")[::-1].astype(np.int64)
    threads = min(numba.get_num_threads(), len(order))
    if threads <= 1:
        work(order)
        return
    shares = min(_SHARES * threads, len(order))
    with ThreadPoolExecutor(threads) as pool:
        for _ in pool.map(work, [order[first::shares].copy() for first in range(shares)]):
            pass


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


def resolved(xyz_L3: np.ndarray) -> np.ndarray:
    """[L] bool: the residues whose place is known, neither NaN nor a sentinel (-1e18 of part 1, -1e6 of part 2).

    What is as far off on the other side is no place either: no molecule reaches there, nor do the digits of float32.
    """
    return (np.abs(xyz_L3) < -SENTINEL).all(axis=1)  # NaN is not


@njit(cache=True, nogil=True)
def centred(xyz_T3: np.ndarray, chosen_T: np.ndarray, start: int, end: int) -> np.ndarray:
    """[3, R] float32, the chosen residues of one trace about their centre: products lose fewer digits."""
    kept = start + np.flatnonzero(chosen_T[start:end])
    columns = np.empty((3, len(kept)), dtype=np.float32)
    for axis in range(3):
        centre = 0.0
        for place in kept:
            centre += xyz_T3[place, axis]
        centre /= max(len(kept), 1)
        for r, place in enumerate(kept):
            columns[axis, r] = xyz_T3[place, axis] - centre
    return columns


def _search_all(
    predicted_T3: np.ndarray,
    reference_T3: np.ndarray,
    common_T: np.ndarray,
    offsets: np.ndarray,
    lengths: np.ndarray,
    scales: np.ndarray,
    share: np.ndarray,
    scores: np.ndarray,
) -> None:
    """Best scores of the pairs in `share`; each is searched by one thread, so their number changes nothing."""
    motion = np.empty(MOTION)
    for pair in share:
        mobile = centred(predicted_T3, common_T, offsets[pair], offsets[pair + 1])
        fixed = centred(reference_T3, common_T, offsets[pair], offsets[pair + 1])
        if mobile.shape[1] >= MIN_RESOLVED:
            near = min(max(scales[pair], NEAR), FAR)
            scores[pair] = search(mobile, fixed, scales[pair], near, np.inf, 1, motion) / lengths[pair]
