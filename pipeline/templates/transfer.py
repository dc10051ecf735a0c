"""Coordinates of a template on a target, and what the template does not say. Lengths in Å.

Letters: L target length (nt), P residues in common, 3 xyz.
"""

import numpy as np

from pipeline.structure.geometry import double_helix, find_stems, rmsd, rotation_onto
from pipeline.structure.rigid import relax

#: Covered residues on each side by which a piece of the de novo trace is fitted.
_FLANK = 3
#: Å RMSD of a helix from an ideal one up to which it stays rigid. A torn one would pull at itself for ever, and throw
#: what it is bonded to ever further off.
_WHOLE = 2.0


def transfer(partner_L: np.ndarray, xyz_M3: np.ndarray) -> np.ndarray:
    """Copy C1' along an alignment: [L, 3] Å, NaN where the template has no residue or an unresolved one.

    Args:
        partner_L: [L] template residue at every target residue, -1 = none.
        xyz_M3: [M, 3] Å of the template, NaN where unresolved.
    """
    xyz_L3 = np.full((len(partner_L), 3), np.nan)
    aligned = partner_L >= 0
    xyz_L3[aligned] = xyz_M3[partner_L[aligned]]
    return xyz_L3


def complete(copied_L3: np.ndarray, novo_L3: np.ndarray) -> np.ndarray:
    """Fill gaps and ends of a partial trace from a de novo one.

    Every missing piece is cut out of the de novo trace, fitted on the residues beside it, and bent so that it meets
    both ends.

    Args:
        copied_L3: [L, 3] Å, NaN where missing; at least one residue is there.
        novo_L3: [L, 3] Å.

    Returns:
        [L, 3] float64, Å.
    """
    known_L = np.isfinite(copied_L3).all(axis=1)
    xyz_L3 = np.array(copied_L3, dtype=np.float64)
    for start, stop in _runs(~known_L):
        xyz_L3[start:stop] = _fitted_piece(copied_L3, known_L, novo_L3, start, stop)
    return xyz_L3


def refine(xyz_L3: np.ndarray, copied_L: np.ndarray, pairs: list[tuple[int, int]]) -> np.ndarray:
    """Mend torn steps and clashes; helices outside the copied part stay rigid, if bending left them whole.

    Args:
        xyz_L3: [L, 3] Å.
        copied_L: [L] bool, residues that come from the template.
        pairs: 0-based nested pairs that the target is expected to form.

    Returns:
        [L, 3] float64, Å, centred on the origin.
    """
    stems = [stem for stem in find_stems(len(xyz_L3), pairs) if not copied_L[stem.residues].any()]
    ideal = [double_helix(stem.pairs).reshape(-1, 3) for stem in stems]
    whole = [rmsd(xyz_L3[stem.residues], shape) < _WHOLE for stem, shape in zip(stems, ideal, strict=True)]
    return relax(xyz_L3, [stem.residues for stem, kept in zip(stems, whole, strict=True) if kept])


def _runs(mask_L: np.ndarray) -> list[tuple[int, int]]:
    """Stretches of True as (start, stop)."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask_L.astype(np.int8), [0]])))
    return [(int(start), int(stop)) for start, stop in edges.reshape(-1, 2)]


def _fitted_piece(copied_L3: np.ndarray, known_L: np.ndarray, novo_L3: np.ndarray, start: int, stop: int) -> np.ndarray:
    """[stop - start, 3] Å of the de novo trace, turned as the known residues beside it and bent to meet them."""
    left = [i for i in range(max(start - _FLANK, 0), start) if known_L[i]]
    right = [i for i in range(stop, min(stop + _FLANK, len(copied_L3))) if known_L[i]]
    beside = np.array(left + right)
    fixed_P3, mobile_P3 = copied_L3[beside], novo_L3[beside]
    turn = rotation_onto(mobile_P3 - mobile_P3.mean(axis=0), fixed_P3 - fixed_P3.mean(axis=0))
    turned_L3 = novo_L3 @ turn
    piece = turned_L3[start:stop]
    share = (np.arange(start, stop) - start + 1.0)[:, None] / (stop - start + 1.0)
    at_left = copied_L3[start - 1] - turned_L3[start - 1] if left else None
    at_right = copied_L3[stop] - turned_L3[stop] if right else None
    if at_left is None or at_right is None:
        return piece + (at_left if at_left is not None else at_right)
    return piece + (1.0 - share) * at_left + share * at_right
