"""C1' geometry of RNA in numpy: A-form helices and where they stand, handedness, rotations, what is alike.

Part of the core: numpy only, so that scoring can build its floors from the same helices.

Lengths in Å. Letters: L length (nt), P placed pairs of a helix, M traces, 3 xyz.
"""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

#: A-form double helix of C1' atoms: least squares over 230 helices of at least five pairs (1,487 pairs) in 182 RNA
#: chains of the PDB, 0.76 Å RMSD. Fibre models give 2.81 Å and 32.7° (Arnott et al. 1973); folded RNA is more compact.
RISE = 2.60  # Å along the axis a step
TWIST = math.radians(32.83)  # right-handed turn a step
RADIUS = 8.48  # Å from the axis
PAIR_ANGLE = math.radians(74.63)  # from a C1' to its partner's, around the axis
PAIR_SHIFT = -2.47  # Å from a C1' to its partner's, along the axis

#: Distance of neighbouring C1' below which they are pushed apart, Å (2 % of those in the same chains are nearer).
SHORTEST_STEP = 5.0
#: Typical distance of neighbouring C1' outside helices, Å (same chains: median 5.55, a tenth above 7.6).
STEP = 5.9
#: The lDDT counts the distances below this one, Å, kept within each of these tolerances, Å.
LDDT_RADIUS = 30.0
LDDT_TOLERANCES = (0.5, 1.0, 2.0, 4.0)
#: (predicted, known) traces -> TM-score of each pair; the roof hands in `submissions.tm_score.tm_scores`.
Scorer = Callable[[Sequence[tuple[np.ndarray, np.ndarray]]], np.ndarray]
#: d0 below 30 residues: (longest length, d0 in Å). Source: US-align, parameter_set4final_C3prime.
_D0_SHORT = ((11, 0.3), (15, 0.4), (19, 0.5), (23, 0.6), (29, 0.7))


def helix_strand(length: int, *, first: int = 0) -> np.ndarray:
    """One strand of an ideal A-form helix along the z axis.

    Args:
        length: residues, nt.
        first: step at which the strand starts; equal steps of two calls coincide.

    Returns:
        [L, 3] float64, Å.

    >>> steps = np.linalg.norm(np.diff(helix_strand(9), axis=0), axis=1)
    >>> steps.round(2).tolist()
    [5.45, 5.45, 5.45, 5.45, 5.45, 5.45, 5.45, 5.45]
    """
    step_L = np.arange(first, first + length)
    return _on_cylinder(TWIST * step_L, RISE * step_L)


def double_helix(pairs: int, *, first: int = 0) -> np.ndarray:
    """Both strands of an ideal A-form helix along the z axis; ``[0, k]`` pairs with ``[1, k]``.

    Args:
        pairs: base pairs.
        first: step of the first pair, as in `helix_strand`.

    Returns:
        [2, P, 3] float64, Å: the strand that runs 5'-3' with z, and the partners (5'-3' against z).

    >>> strand_P3, partner_P3 = double_helix(4)
    >>> np.linalg.norm(strand_P3 - partner_P3, axis=1).round(1).tolist()
    [10.6, 10.6, 10.6, 10.6]
    """
    step_P = np.arange(first, first + pairs)
    partner_P3 = _on_cylinder(TWIST * step_P + PAIR_ANGLE, RISE * step_P + PAIR_SHIFT)
    return np.stack([helix_strand(pairs, first=first), partner_P3])


def _on_cylinder(angle_L: np.ndarray, z_L: np.ndarray) -> np.ndarray:
    return np.stack([RADIUS * np.cos(angle_L), RADIUS * np.sin(angle_L), z_L], axis=-1)


def handedness(xyz_L3: np.ndarray) -> np.ndarray:
    """Local chirality of a trace: sine of the dihedral angle of four consecutive C1'.

    Args:
        xyz_L3: [..., L, 3] Å; NaN where unresolved.

    Returns:
        [..., L - 3] in [-1, 1]: positive where the trace turns like a right-handed helix; a mirror image changes the
        sign. NaN where one of the four is unresolved or three lie on a line.

    >>> bool((handedness(helix_strand(8)) > 0.2).all()), bool((handedness(-helix_strand(8)) < -0.2).all())
    (True, True)
    """
    bond_L3 = np.diff(xyz_L3, axis=-2)
    first, middle, last = bond_L3[..., :-2, :], bond_L3[..., 1:-1, :], bond_L3[..., 2:, :]
    normal_in, normal_out = np.cross(first, middle), np.cross(middle, last)
    size = np.linalg.norm(normal_in, axis=-1) * np.linalg.norm(normal_out, axis=-1)
    height = np.linalg.norm(middle, axis=-1) * np.sum(first * normal_out, axis=-1)
    return np.divide(height, size, out=np.full_like(size, np.nan), where=size > 1e-9)


def rotation_onto(mobile_P3: np.ndarray, fixed_P3: np.ndarray) -> np.ndarray:
    """Proper rotation that brings centred points closest to their partners, for any number of point sets at once.

    Args:
        mobile_P3: [..., P, 3] centred on the origin; rows of zeros (padding) count for nothing.
        fixed_P3: [..., P, 3] centred on the origin, rows paired with `mobile_P3`.

    Returns:
        [..., 3, 3] rotations without reflection: ``mobile_P3 @ rotation`` lies on `fixed_P3`.

    Source:
        Kabsch 1976, Acta Cryst. A32:922.
    """
    left, _, right = np.linalg.svd(np.swapaxes(mobile_P3, -1, -2) @ fixed_P3)
    left[..., -1] *= np.sign(np.linalg.det(left @ right))[..., None]
    return left @ right


@dataclass(frozen=True)
class Stem:
    """Uninterrupted base pairs ``(i + k, j - k)``, ``0 <= k < pairs``, 0-based."""

    i: int
    j: int
    pairs: int

    @property
    def inner(self) -> tuple[int, int]:
        """The last pair, which closes the loop inside."""
        return self.i + self.pairs - 1, self.j - self.pairs + 1

    @property
    def residues(self) -> np.ndarray:
        """Its first strand, then the partners in the same order."""
        own = np.arange(self.pairs)
        return np.concatenate([self.i + own, self.j - own])


def find_stems(length: int, pairs: list[tuple[int, int]]) -> list[Stem]:
    """Stacks of consecutive base pairs, outermost pair first, sorted by position.

    Args:
        length: residues, nt.
        pairs: 0-based ``(i, j)`` with ``i < j``, nested, each residue in at most one.

    Raises:
        ValueError: a pair is out of range, used twice, crosses another or joins neighbours.

    >>> find_stems(14, [(0, 13), (1, 12), (3, 11)])
    [Stem(i=0, j=13, pairs=2), Stem(i=3, j=11, pairs=1)]
    """
    partner = _partners(length, pairs)
    found: list[Stem] = []
    for i, j in sorted(pairs):
        last = found[-1] if found else None
        if last and (i, j) == (last.i + last.pairs, last.j - last.pairs):
            found[-1] = Stem(last.i, last.j, last.pairs + 1)
        else:
            found.append(Stem(i, j, 1))
    open_ends: list[int] = []
    for i in range(length):
        if partner[i] > i:
            open_ends.append(partner[i])
        elif partner[i] >= 0 and open_ends.pop() != i:
            raise ValueError(f"pair {(int(partner[i]), i)} crosses another; expected nested pairs")
    return found


def _partners(length: int, pairs: list[tuple[int, int]]) -> np.ndarray:
    partner = np.full(length, -1)
    for i, j in pairs:
        if not 0 <= i < j - 1 < length - 1:
            raise ValueError(f"pair {(i, j)}: expected 0 <= i, i + 1 < j, j < {length}")
        if partner[i] >= 0 or partner[j] >= 0:
            raise ValueError(f"pair {(i, j)}: one of its residues has a partner already")
        partner[i], partner[j] = j, i
    return partner


@dataclass(frozen=True)
class Frame:
    """Where a helix stands: its first pair is at step 0 of `double_helix`, turned by `axes` and shifted by `origin`."""

    axes: np.ndarray
    origin: np.ndarray

    @classmethod
    def fitted(cls, ideal_P3: np.ndarray, atoms_P3: np.ndarray) -> "Frame":
        """The frame in which ideal points lie closest to others, paired by row, by least squares."""
        centre_ideal, centre = ideal_P3.mean(axis=0), atoms_P3.mean(axis=0)
        axes = rotation_onto(ideal_P3 - centre_ideal, atoms_P3 - centre)
        return cls(axes, centre - centre_ideal @ axes)

    def place(self, local_P3: np.ndarray) -> np.ndarray:
        """Points given in the coordinates of this frame, where they stand in space."""
        return local_P3 @ self.axes + self.origin

    def local(self, xyz_P3: np.ndarray) -> np.ndarray:
        """Points in the coordinates of this frame: the inverse of `place`."""
        return (xyz_P3 - self.origin) @ self.axes.T

    def relative(self, other: "Frame") -> "Frame":
        """This frame as seen from another."""
        return Frame(self.axes @ other.axes.T, other.local(self.origin))

    def within(self, other: "Frame") -> "Frame":
        """The frame that is seen as this one from another: the inverse of `relative`."""
        return Frame(self.axes @ other.axes, other.place(self.origin))

    def along(self, steps: int) -> "Frame":
        """The frame of the pair that is so many steps further on the same helix."""
        sin, cos = math.sin(TWIST * steps), math.cos(TWIST * steps)
        turn = np.array([[cos, sin, 0.0], [-sin, cos, 0.0], [0.0, 0.0, 1.0]])
        return Frame(turn @ self.axes, self.place(np.array([0.0, 0.0, RISE * steps])))

    def flipped(self) -> "Frame":
        """The same pair with the strands exchanged: the helix runs the other way (its dyad axis turns it by 180°)."""
        dyad = np.array([math.cos(PAIR_ANGLE / 2), math.sin(PAIR_ANGLE / 2), 0.0])
        return Frame((2.0 * np.outer(dyad, dyad) - np.eye(3)) @ self.axes, self.place(np.array([0.0, 0.0, PAIR_SHIFT])))


def rmsd(mobile_P3: np.ndarray, fixed_P3: np.ndarray) -> float:
    """Root mean square distance of paired points after superposition, Å."""
    moved_P3 = Frame.fitted(mobile_P3, fixed_P3).place(mobile_P3)
    return float(np.sqrt(np.mean(np.sum((moved_P3 - fixed_P3) ** 2, axis=1))))


class Scaffold:
    """Helices that stand in place, and the residues that are placed with them.

    Args:
        length: residues, nt.

    Attributes:
        xyz_L3: [L, 3] float64, Å; NaN where a residue has no place yet.
        body_L: [L] number of the rigid body that a paired residue belongs to; -1 = in no helix that is placed.
        frames: where each helix stands.
        joined: helices, and those that were put beside them: what they are to each other is worth keeping.
    """

    def __init__(self, length: int) -> None:
        self.xyz_L3 = np.full((length, 3), np.nan)
        self.body_L = np.full(length, -1)
        self.frames: dict[Stem, Frame] = {}
        self.joined: list[tuple[Stem, Stem]] = []

    def put(self, stem: Stem, frame: Frame, *, body: int | None = None, beside: Stem | None = None) -> None:
        """Give a helix its place, or another one.

        Args:
            stem: the helix.
            frame: where it stands.
            body: what it moves with; None = a body of its own, for a helix that is new.
            beside: the helix that it was placed by.
        """
        body = len(self.frames) if body is None else body
        own = np.arange(stem.pairs)
        strand_P3, partner_P3 = frame.place(double_helix(stem.pairs))
        self.xyz_L3[stem.i + own], self.xyz_L3[stem.j - own] = strand_P3, partner_P3
        self.body_L[stem.i + own], self.body_L[stem.j - own] = body, body
        self.frames[stem] = frame
        if beside:
            self.joined.append((beside, stem))

    def bodies(self) -> list[np.ndarray]:
        """Residues of each set of helices that moves as one."""
        return [np.flatnonzero(self.body_L == body) for body in np.unique(self.body_L[self.body_L >= 0])]


def sum_over_pairs(i_K: np.ndarray, j_K: np.ndarray, value_K: np.ndarray, length: int) -> np.ndarray:
    """[L] float64: for each residue, the sum of the values of the pairs that it is in.

    >>> sum_over_pairs(np.array([0, 0]), np.array([2, 3]), np.array([0.5, 0.25]), 4).tolist()
    [0.75, 0.0, 0.5, 0.25]
    """
    return np.bincount(i_K, value_K, length) + np.bincount(j_K, value_K, length)


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


def similarity(traces: Sequence[np.ndarray]) -> np.ndarray:
    """TM-score of every two traces as least squares superpose them: below the true one, and fast.

    Args:
        traces: M traces of the same chain, [L, 3] Å, finite.

    Returns:
        [M, M] in (0, 1], 1 on the diagonal. d0 is not below 2 Å, so that short chains are told apart smoothly.
    """
    centred_ML3 = np.stack([xyz_L3 - xyz_L3.mean(axis=0) for xyz_L3 in traces])
    count, length = centred_ML3.shape[:2]
    alike_MM = np.eye(count)
    scale = max(d0_rna(length), 2.0)
    for m in range(count - 1):
        others_ML3 = centred_ML3[m + 1 :]
        moved_ML3 = others_ML3 @ rotation_onto(others_ML3, np.broadcast_to(centred_ML3[m], others_ML3.shape))
        square_ML = np.sum((moved_ML3 - centred_ML3[m]) ** 2, axis=-1)
        alike_MM[m, m + 1 :] = alike_MM[m + 1 :, m] = np.mean(1.0 / (1.0 + square_ML / scale**2), axis=1)
    return alike_MM
