"""Helices between loops: what they stack on, and the rings that they close with the least strain.

Lengths in Å. Letters: L length (nt), P pairs of a helix, S helices, 3 xyz.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.structure.geometry import STEP, Frame, Scaffold, Stem, double_helix
from pipeline.structure.rigid import RigidBodies, close_pairs

_NEAR = 1  # residues at most between the strands of helices that stack across a pseudoknot
_ROUNDS = 600  # of sharing the strain of rings
_THICK = 18.0  # Å between the axes of helices side by side


@dataclass(frozen=True)
class Stack:
    """A helix between loops, and one that goes on with it: where the other stands, seen from the first."""

    crossing: Stem
    stem: Stem
    frame: Frame
    inside: bool  # at the end of the other one that closes a loop

    def seen_from_stem(self) -> Frame:
        """Where the helix between loops stands, seen from the other."""
        return Frame(np.eye(3), np.zeros(3)).relative(self.frame)


def crossing_stacks(crossing: Sequence[Stem], stems: Sequence[Stem]) -> list[Stack]:
    """What goes on with helices between loops: those whose strand follows a 3' end, at most one residue later.

    Args:
        crossing: helices of unpaired residues of different loops.
        stems: nested helices.
    """
    outer, inner = {stem.i: stem for stem in stems}, {stem.inner[1]: stem for stem in stems}
    found = []
    for own in crossing:
        for end in own.inner[0], own.j:
            for gap in range(_NEAR + 1):
                follows = end + gap + 1
                here = Frame(np.eye(3), np.zeros(3))
                here = here.along(own.pairs + gap) if end == own.inner[0] else here.along(-1 - gap).flipped()
                if follows in outer:
                    found.append(Stack(own, outer[follows], here, inside=False))
                    break
                if follows in inner:
                    stem = inner[follows]
                    if end - own.pairs > stem.inner[0]:  # a residue at least bridges the groove
                        found.append(Stack(own, stem, here.flipped().along(1 - stem.pairs), inside=True))
                    break
    return found


def ring_gaps(scaffold: Scaffold, stacks: Sequence[Stack]) -> dict[Stem, float]:
    """How far apart the two helices that a helix between loops goes on with want it, Å RMS: 0 where the ring closes.

    Args:
        scaffold: every nested helix in place.
        stacks: as `crossing_stacks` gives them; helices that stack on one other alone close no ring.
    """
    wanted: dict[Stem, list[np.ndarray]] = {}
    for stack in stacks:
        frame = stack.seen_from_stem().within(scaffold.frames[stack.stem])
        wanted.setdefault(stack.crossing, []).append(frame.place(double_helix(stack.crossing.pairs)))
    return {
        stem: float(np.sqrt(np.mean(np.sum((places[0] - places[1]) ** 2, axis=-1))))
        for stem, places in wanted.items()
        if len(places) == 2
    }


def close_rings(scaffold: Scaffold, stacks: Sequence[Stack]) -> None:
    """Put in the helices between loops, and share what does not fit among all joints of the helices.

    Args:
        scaffold: every nested helix in place; it is changed.
        stacks: as `crossing_stacks` gives them; of none, nothing is done.
    """
    if not stacks:
        return
    _put_crossing(scaffold, stacks)
    joints = [(left, right, scaffold.frames[right].relative(scaffold.frames[left])) for left, right in scaffold.joined]
    joints += [(stack.crossing, stack.stem, stack.frame) for stack in stacks]
    stems = sorted(scaffold.frames, key=lambda stem: stem.i)
    moved_L3 = _least_strain(scaffold.xyz_L3, stems, joints)
    in_stem = np.zeros(len(scaffold.body_L), dtype=bool)
    in_stem[np.concatenate([stem.residues for stem in stems])] = True
    for stem in stems:
        old, frame = scaffold.frames[stem], _fitted(stem, moved_L3)
        for residue in _attached(scaffold, stem, in_stem):
            scaffold.xyz_L3[residue] = frame.place(old.local(scaffold.xyz_L3[residue]))
        scaffold.put(stem, frame, body=int(scaffold.body_L[stem.i]))
    for stack in stacks:
        scaffold.body_L[scaffold.body_L == scaffold.body_L[stack.stem.i]] = scaffold.body_L[stack.crossing.i]


def _put_crossing(scaffold: Scaffold, stacks: Sequence[Stack]) -> None:
    """Place the helices between loops on what they stack on, and forget the loops that they are made of."""
    for stack in stacks:
        for strand in np.split(stack.crossing.residues, 2):
            _clear_loop(scaffold, int(strand.min()), int(strand.max()))
    for stack in stacks:
        if stack.crossing not in scaffold.frames:
            scaffold.put(stack.crossing, stack.seen_from_stem().within(scaffold.frames[stack.stem]))


def _clear_loop(scaffold: Scaffold, first: int, last: int) -> None:
    """Forget where the residues around a strand were put, as far as they are in no helix."""
    while first > 0 and scaffold.body_L[first - 1] < 0:
        first -= 1
    while last < len(scaffold.body_L) - 1 and scaffold.body_L[last + 1] < 0:
        last += 1
    loose = np.arange(first, last + 1)
    scaffold.xyz_L3[loose[scaffold.body_L[loose] < 0]] = np.nan


def _attached(scaffold: Scaffold, stem: Stem, in_stem: np.ndarray) -> list[int]:
    """Placed residues between helices that are nearer in sequence to this one."""
    length, found = len(scaffold.body_L), []
    for end, step in ((stem.i, -1), (stem.inner[0], 1), (stem.inner[1], -1), (stem.j, 1)):
        own = []
        residue = end + step
        while 0 <= residue < length and not in_stem[residue]:
            own.append(residue)
            residue += step
        near = len(own) if not 0 <= residue < length else (len(own) + (step > 0)) // 2
        found += [each for each in own[:near] if np.isfinite(scaffold.xyz_L3[each, 0])]
    return found


def _fitted(stem: Stem, xyz_L3: np.ndarray) -> Frame:
    return Frame.fitted(double_helix(stem.pairs).reshape(-1, 3), xyz_L3[stem.residues])


def _least_strain(xyz_L3: np.ndarray, stems: list[Stem], joints: list[tuple[Stem, Stem, Frame]]) -> np.ndarray:
    """Helices moved as rigid bodies until neighbours stand to each other as they should as nearly as all can.

    Every round moves the residues to the mean of where each joint (two helices, and the second as seen from the first)
    wants them, pulls the chain together, from a third of the rounds on pushes helices apart that run through each
    other, and fits each helix back.
    """
    ideal = {stem: double_helix(stem.pairs).reshape(-1, 3) for stem in stems}
    bodies = RigidBodies(len(xyz_L3), [stem.residues for stem in stems], [ideal[stem] for stem in stems])
    wanted = RigidBodies(
        len(xyz_L3),
        [np.concatenate([left.residues, right.residues]) for left, right, _ in joints],
        [np.concatenate([ideal[left], frame.place(ideal[right])]) for left, right, frame in joints],
    )
    paired = np.flatnonzero(bodies.body_L >= 0)
    ends = np.flatnonzero(bodies.body_L[paired[1:]] != bodies.body_L[paired[:-1]])
    chain, longest = np.stack([paired[ends], paired[ends + 1]]), STEP * (paired[ends + 1] - paired[ends])
    counted_L1 = np.bincount(wanted.residues, minlength=len(xyz_L3))[:, None]
    pairs = np.concatenate([stem.residues.reshape(2, -1) for stem in stems], axis=1)
    apart_SS, close = _not_neighbours(stems, joints), np.empty((2, 0), dtype=np.int64)
    xyz_L3 = np.where(np.isfinite(xyz_L3), xyz_L3, 0.0)
    for turn in range(_ROUNDS):
        axis_P3, goal_L3 = xyz_L3[pairs].mean(axis=0), np.zeros_like(xyz_L3)
        np.add.at(goal_L3, wanted.residues, wanted.placed(xyz_L3))
        goal_L3 = np.where(counted_L1 > 0, goal_L3 / np.maximum(counted_L1, 1), xyz_L3)
        _move_to(goal_L3, chain, goal_L3[chain], most=longest)
        if turn >= _ROUNDS // 3 and turn % 10 == 0:
            close = close_pairs(axis_P3, _THICK + 3.0)
            close = close[:, apart_SS[tuple(bodies.body_L[pairs[0, close]])]]
        for strand in pairs:
            _move_to(goal_L3, strand[close], axis_P3[close], least=_THICK)
        xyz_L3 = bodies.restore(goal_L3)
    return xyz_L3


def _move_to(
    goal_L3: np.ndarray,
    residues: np.ndarray,
    points: np.ndarray,
    *,
    least: float = 0.0,
    most: np.ndarray | float = np.inf,
) -> None:
    """Move residues, in place, as half of what brings their points to a distance between two, Å, takes of each."""
    between = points[1] - points[0]
    distance = np.maximum(np.linalg.norm(between, axis=1), 1e-6)
    move = (0.5 * (np.clip(distance, least, most) - distance) / distance)[:, None] * between
    np.add.at(goal_L3, residues[0], -move)
    np.add.at(goal_L3, residues[1], move)


def _not_neighbours(stems: list[Stem], joints: list[tuple[Stem, Stem, Frame]]) -> np.ndarray:
    """[S, S] bool: helices that are more than two joints apart."""
    place = {stem: number for number, stem in enumerate(stems)}
    joined = np.eye(len(stems), dtype=np.int64)
    for left, right, _ in joints:
        joined[place[left], place[right]] = joined[place[right], place[left]] = 1
    return joined @ joined == 0
