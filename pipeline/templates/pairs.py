"""Base pairs read from the geometry of a C1' trace. Letters: L length (nt), K pairs, 3 xyz; lengths in Å."""

import numpy as np

from pipeline.schema import CANONICAL_PAIRS
from pipeline.structure.geometry import double_helix
from pipeline.structure.rigid import close_pairs

#: C1'-C1' of a helix's pair (10.6 Å in the ideal one) and what is taken for one.
_SHORTEST, _LONGEST = 8.8, 12.4
#: RMSD of two stacked pairs from the ideal helix up to which they count as stacked.
_STACKED_RMSD = 1.6


def pairs_from_trace(sequence: str, xyz_L3: np.ndarray) -> np.ndarray:
    """Canonical pairs that stack on another one as in an A-form helix, pseudoknots too.

    Args:
        sequence: letters A, C, G, U.
        xyz_L3: [L, 3] Å, NaN where unresolved.

    Returns:
        [L] int64: 0-based partner of every residue, -1 = none.
    """
    partner_L = np.full(len(sequence), -1)
    known = np.flatnonzero(np.isfinite(xyz_L3).all(axis=1))
    if len(known) < 2:
        return partner_L
    found = known[close_pairs(xyz_L3[known], _LONGEST)]
    found = found[:, found[1] - found[0] > 3]
    distance_K = np.linalg.norm(xyz_L3[found[0]] - xyz_L3[found[1]], axis=1)
    candidates = {
        (int(i), int(j)) for i, j in found[:, distance_K > _SHORTEST].T if sequence[i] + sequence[j] in CANONICAL_PAIRS
    }
    ranked = []
    for i, j in sorted(candidates):
        misfits = [_misfit(xyz_L3, a, b) for a, b in ((i, j), (i - 1, j + 1)) if {(a, b), (a + 1, b - 1)} <= candidates]
        if misfits and min(misfits) < _STACKED_RMSD:
            ranked.append((sum(misfits) / len(misfits) - 0.5 * len(misfits), i, j))
    for _, i, j in sorted(ranked):
        if partner_L[i] < 0 and partner_L[j] < 0:
            partner_L[i], partner_L[j] = j, i
    return partner_L


def _misfit(xyz_L3: np.ndarray, i: int, j: int) -> float:
    """Difference of the distances among pairs (i, j) and (i + 1, j - 1) from those in an ideal helix, Å RMS."""
    four = xyz_L3[[i, i + 1, j, j - 1]]
    if not np.isfinite(four).all():
        return np.inf
    ideal = double_helix(2).reshape(-1, 3)
    a, b = np.triu_indices(4, 1)
    difference = np.linalg.norm(four[a] - four[b], axis=1) - np.linalg.norm(ideal[a] - ideal[b], axis=1)
    return float(np.sqrt(np.mean(difference**2)))
