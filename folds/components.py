"""Connected components by union-find: the root of a component is its smallest index, whatever the order of the links.

Letters: N nodes, P pairs, R rows of a block of distances.
"""

import numpy as np

from folds.edit_distance import UNKNOWN, most_edits
from pipeline.compiled import njit


@njit(cache=True)
def _find(parent_N: np.ndarray, node: int) -> int:
    while parent_N[node] != node:
        parent_N[node] = parent_N[parent_N[node]]
        node = parent_N[node]
    return node


@njit(cache=True)
def _unite(parent_N: np.ndarray, first: int, second: int) -> None:
    first, second = _find(parent_N, first), _find(parent_N, second)
    parent_N[max(first, second)] = min(first, second)


@njit(cache=True)
def unite_relatives(
    parent_N: np.ndarray,
    first_P: np.ndarray,
    second_P: np.ndarray,
    distances_P: np.ndarray,
    lengths_N: np.ndarray,
    percent: int,
) -> None:
    """Join, in place, the ends of the pairs that are at least `percent` % identical by their distances."""
    for pair in range(first_P.size):
        one, two = lengths_N[first_P[pair]], lengths_N[second_P[pair]]
        if distances_P[pair] <= most_edits(min(one, two), max(one, two), percent):
            _unite(parent_N, first_P[pair], second_P[pair])


@njit(cache=True)
def unite_pairs(parent_N: np.ndarray, first_P: np.ndarray, second_P: np.ndarray) -> None:
    """Join the two ends of every pair, in place."""
    for pair in range(first_P.size):
        _unite(parent_N, first_P[pair], second_P[pair])


@njit(cache=True)
def unite_rows(parent_N: np.ndarray, first: int, distances_RN: np.ndarray, lengths_N: np.ndarray, percent: int) -> None:
    """Join row ``first + r`` and column j, in place, where they are at least `percent` % identical.

    Args:
        parent_N: int64.
        first: index of the first row.
        distances_RN: [R, N] uint16, edits, as `folds.edit_distance.distance_rows` gives them.
        lengths_N: int64, nt, rising.
        percent: least identity.
    """
    for row in range(distances_RN.shape[0]):
        for other in range(first + row + 1, distances_RN.shape[1]):
            edits = distances_RN[row, other]
            if edits != UNKNOWN and edits <= most_edits(lengths_N[first + row], lengths_N[other], percent):
                _unite(parent_N, first + row, other)


@njit(cache=True)
def find_roots(parent_N: np.ndarray) -> np.ndarray:
    """Root of every node, [N] int64."""
    roots_N = np.empty_like(parent_N)
    for node in range(parent_N.size):
        roots_N[node] = _find(parent_N, node)
    return roots_N
