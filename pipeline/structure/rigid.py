"""Rigid bodies of a chain, such as helices: fitted back where their residues went, and the chain relaxed between them.

Lengths in Å. Letters: L length (nt), K close pairs, P pairs, S rigid bodies, M their padded size, 3 xyz.
"""

import math

import numpy as np

from pipeline.compiled import njit
from pipeline.structure.geometry import SHORTEST_STEP, Stem, double_helix, rotation_onto

_TORN = 0.7  # Å of a violation that rigid helices may leave


def relax(
    xyz_L3: np.ndarray,
    bodies: list[np.ndarray],
    *,
    longest: float = 6.8,
    clash: float = 5.5,
    rounds: int = 400,
) -> np.ndarray:
    """Pull neighbours to bonding distance and push clashes apart while helices stay rigid.

    Position-based dynamics: every round moves single residues by their violations, then fits each rigid body back.
    Where that leaves the chain torn, because rigid bodies cannot be joined, a few rounds bend them.

    Args:
        xyz_L3: [L, 3] Å, finite.
        bodies: residues of each rigid body; its shape is taken from `xyz_L3`.
        longest: distance of neighbours that is allowed, Å (a seventh of those in the same chains are longer).
        clash: distance below which others are pushed apart, Å (0.05 contacts a residue are nearer in the same chains).
        rounds: most rounds; fewer where nothing is violated any more.

    Returns:
        [L, 3] float64, Å, centred on the origin.

    Source:
        Müller et al. 2005 (shape matching) and 2007 (position-based dynamics).
    """
    xyz_L3 = xyz_L3 - xyz_L3.mean(axis=0)
    xyz_L3, worst = _settle(xyz_L3, bodies, longest=longest, clash=clash, rounds=rounds)
    if worst > _TORN:
        xyz_L3, _ = _settle(xyz_L3, [], longest=longest, clash=clash, rounds=rounds // 8)
    return xyz_L3 - xyz_L3.mean(axis=0)


def _settle(
    xyz_L3: np.ndarray, bodies: list[np.ndarray], *, longest: float, clash: float, rounds: int
) -> tuple[np.ndarray, float]:
    """The trace after so many rounds, and the largest violation, Å."""
    shapes = RigidBodies(len(xyz_L3), bodies, [xyz_L3[body] for body in bodies])
    close, worst = np.empty((2, 0), dtype=np.int64), 0.0
    for turn in range(rounds):
        if turn % 10 == 0:
            close = close_pairs(xyz_L3, clash + 3.0)
            close = close[:, (close[1] - close[0] > 1) & ~shapes.same_body(close)]
        move_L3, worst = _corrections(xyz_L3, close, longest, clash)
        if worst < 0.05:
            break
        xyz_L3 = shapes.restore(xyz_L3 + shapes.boost_L1 * move_L3)
    return xyz_L3, worst


@njit(cache=True)
def _corrections(xyz_L3: np.ndarray, close_2K: np.ndarray, longest: float, clash: float) -> tuple[np.ndarray, float]:
    """Summed moves that halve each violation, of neighbours and of close pairs, and the largest violation, Å."""
    bonds = len(xyz_L3) - 1
    left_P = np.concatenate((np.arange(bonds), close_2K[0]))
    right_P = np.concatenate((np.arange(1, bonds + 1), close_2K[1]))
    pull_P3, move_L3, worst = np.empty((len(left_P), 3)), np.zeros_like(xyz_L3), 0.0
    for p in range(len(left_P)):
        square = 0.0
        for axis in range(3):
            pull_P3[p, axis] = xyz_L3[right_P[p], axis] - xyz_L3[left_P[p], axis]
            square += pull_P3[p, axis] ** 2
        distance = max(math.sqrt(square), 1e-6)
        too_far = max(distance - longest, 0.0) if p < bonds else 0.0
        too_near = max((SHORTEST_STEP if p < bonds else clash) - distance, 0.0)
        worst = max(worst, too_far + too_near)
        for axis in range(3):
            pull_P3[p, axis] = 0.5 * (too_far - too_near) * pull_P3[p, axis] / distance
            move_L3[left_P[p], axis] += pull_P3[p, axis]
    for p in range(len(left_P)):
        for axis in range(3):
            move_L3[right_P[p], axis] -= pull_P3[p, axis]
    return move_L3, worst


def close_pairs(xyz_L3: np.ndarray, cutoff: float) -> np.ndarray:
    """Pairs of residues nearer than a cut-off, by a sweep along the longest axis.

    Args:
        xyz_L3: [L, 3] Å, finite.
        cutoff: Å.

    Returns:
        [2, pairs] int64, first < second, sorted.
    """
    spread = int(np.argmax(np.ptp(xyz_L3, axis=0)))
    pairs = _sweep(xyz_L3, np.argsort(xyz_L3[:, spread], kind="stable"), spread, cutoff)
    return pairs[:, np.lexsort(pairs[::-1])]


@njit(cache=True)
def _sweep(xyz_L3: np.ndarray, order_L: np.ndarray, spread: int, cutoff: float) -> np.ndarray:
    """[2, pairs] int64, first < second: those nearer than the cut-off, of residues in the order of one axis."""
    first, second = [0], [0]
    for place in range(len(order_L)):
        here = order_L[place]
        for ahead in range(place + 1, len(order_L)):
            there = order_L[ahead]
            if xyz_L3[there, spread] - xyz_L3[here, spread] >= cutoff:
                break
            square = 0.0
            for axis in range(3):
                square += (xyz_L3[there, axis] - xyz_L3[here, axis]) ** 2
            if square < cutoff**2:
                first.append(min(here, there))
                second.append(max(here, there))
    return np.stack((np.array(first[1:]), np.array(second[1:])))


def fit_helices(xyz_L3: np.ndarray, stems: list[Stem]) -> tuple[np.ndarray, float]:
    """Replace the paired residues of a trace by ideal right-handed helices, each fitted where the residues were.

    Args:
        xyz_L3: [L, 3] Å, finite.
        stems: at least one, as `find_stems` gives them.

    Returns:
        [L, 3] Å, and the RMSD of the paired residues before and after, Å: larger for the mirror image of a fold.
    """
    bodies = [stem.residues for stem in stems]
    ideal = [double_helix(stem.pairs).reshape(-1, 3) for stem in stems]
    fitted_L3 = RigidBodies(len(xyz_L3), bodies, ideal).restore(xyz_L3)
    moved = np.concatenate(bodies)
    return fitted_L3, float(np.sqrt(np.mean(np.sum((fitted_L3[moved] - xyz_L3[moved]) ** 2, axis=1))))


class RigidBodies:
    """Rigid bodies, padded to one size so that all of them are fitted at once.

    Args:
        length: residues of the chain, nt.
        bodies: residues of each; one residue may be in several.
        shapes: [residues, 3] Å of each, wherever it stands.

    Attributes:
        residues: those of all bodies, one after the other.
        body_L: [L] number of the last body that a residue is in, -1 = in none.
        boost_L1: [L, 1] factor on the move of a residue, so that bodies follow as fast as single residues.
    """

    def __init__(self, length: int, bodies: list[np.ndarray], shapes: list[np.ndarray]) -> None:
        size = max((len(body) for body in bodies), default=1)
        self._index_SM = np.zeros((len(bodies), size), dtype=np.int64)
        self._real_SM = np.zeros((len(bodies), size), dtype=bool)
        self._shape_SM3 = np.zeros((len(bodies), size, 3))
        self.body_L = np.full(length, -1)
        for number, (body, shape) in enumerate(zip(bodies, shapes, strict=True)):
            self._index_SM[number, : len(body)] = body
            self._real_SM[number, : len(body)] = True
            self._shape_SM3[number, : len(body)] = shape - shape.mean(axis=0)
            self.body_L[body] = number
        size_S = np.maximum(self._real_SM.sum(axis=1), 1)
        self._share_SM1 = self._real_SM[..., None] / size_S[:, None, None]
        self.residues = self._index_SM[self._real_SM]
        # A body follows the mean of its residues' moves: a pull on one of them is diluted by their number.
        self.boost_L1 = np.where(self.body_L >= 0, 3.0, 1.0)[:, None]

    def _centred(self, xyz_L3: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        here_SM3 = xyz_L3[self._index_SM]
        centre_S13 = np.sum(here_SM3 * self._share_SM1, axis=1, keepdims=True)
        return (here_SM3 - centre_S13) * self._real_SM[..., None], centre_S13

    def same_body(self, pairs: np.ndarray) -> np.ndarray:
        """[pairs] bool: whether both of [2, pairs] residues are in one body."""
        return (self.body_L[pairs[0]] == self.body_L[pairs[1]]) & (self.body_L[pairs[0]] >= 0)

    def restore(self, xyz_L3: np.ndarray) -> np.ndarray:
        """Each body back to its shape, where its residues were moved to."""
        xyz_L3, placed = xyz_L3.copy(), self.placed(xyz_L3)
        xyz_L3[self.residues] = placed
        return xyz_L3

    def placed(self, xyz_L3: np.ndarray) -> np.ndarray:
        """Where the residues of all bodies, one after the other, are in these shapes."""
        moved_SM3, centre_S13 = self._centred(xyz_L3)
        return (self._shape_SM3 @ rotation_onto(self._shape_SM3, moved_SM3) + centre_S13)[self._real_SM]
