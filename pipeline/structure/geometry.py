"""C1' geometry of RNA in numpy: A-form helices, handedness, and a trace for a given secondary structure.

Part of the core: numpy only, so that scoring can build its floors from the same helices.

Lengths in Å. Letters: L length (nt), P placed pairs of a helix, D draws, S rigid bodies, M their padded size, 3 xyz.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

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
_TORN = 0.7  # Å of a violation that rigid helices may leave
_DRAWS = 24  # random placements tried for a helix that is not stacked on another
_PAIR_WIDTH = 18.0  # Å that a helix which is not placed yet may bridge
_NEAR = 1  # residues at most between the strands of helices that stack across a pseudoknot
_ROUNDS = 600  # of sharing the strain of rings
_THICK = 18.0  # Å between the axes of helices side by side
_LARGEST_STACKED = 14  # nt on the shorter side of an internal loop across which the helix goes on

#: Log-odds that neighbours in a branched loop stack on one axis, by the residues between them, and how much better the
#: 3' side of the closing helix is than its 5' side. Estimates from the branched loops of the same chains: neighbours
#: with 0 or 1 residues between them on the 3' side are stacked in 5 of 5, on the 5' side in 1 of 3.
_STACK_ODDS = (2.0, 1.0, 0.3, -0.7)
_SIDE_ODDS = 1.0

#: C1' of a four-residue loop in the frame of its closing pair, Å: median of 94 loops of the same chains (59 GNRA).
_TETRALOOP = np.array([[6.10, 3.94, 3.07], [3.01, 6.45, 9.12], [0.0, 8.03, 5.23], [-0.10, 10.81, 0.90]])


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

    def place(self, local_P3: np.ndarray) -> np.ndarray:
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


class Placed(NamedTuple):
    """A loop in place: where its helices stand, and the C1' of each gap, [G, 3] Å (None = still to be closed)."""

    branches: list[Frame]
    gaps: list[np.ndarray | None]


class Arranger(Protocol):
    """Says how the helices around a loop stand."""

    def draw(self, closing: Stem, branches: list[Stem], inner: Frame, rng: np.random.Generator) -> Placed | None:
        """The loop that a helix closes (`inner` is the frame of its last pair), or None for the general rules."""


@dataclass(frozen=True)
class _Link:
    """Unpaired residues between two helices that follow each other around a loop, 5' to 3'."""

    left: Stem
    right: Stem
    gap: int


def trace_from_pairs(
    length: int,
    pairs: list[tuple[int, int]],
    rng: np.random.Generator,
    *,
    arranger: Arranger | None = None,
    crossing: Sequence[Stem] = (),
) -> np.ndarray:
    """A plausible C1' trace for a secondary structure: rigid A-form helices, closed loops, no gross clashes.

    Helices are stacked on one axis across bulges and internal loops, and in branched loops where they are neighbours;
    which of them is drawn at random. The others are placed at random where they fit best. Equal generators give equal
    traces; different ones give different arrangements of the same structure.

    Args:
        length: residues, nt.
        pairs: 0-based ``(i, j)`` with ``i < j``, nested.
        rng: source of the arrangement.
        arranger: knows how the helices around some loops stand; the rules above hold for the others.
        crossing: helices between loops, of unpaired residues, each in one: where the 3' end of a strand is followed at
            once by another helix, the two stack (H-type pseudoknots, 180° kissing loops, paranemic crossovers), and
            the rings that this closes are closed with the least strain.

    Returns:
        [L, 3] float64, Å, centred on the origin.

    Raises:
        ValueError: the pairs are not nested, or out of range.

    >>> trace_L3 = trace_from_pairs(12, [(0, 11), (1, 10), (2, 9), (3, 8)], np.random.default_rng(0))
    >>> bool(np.allclose(np.linalg.norm(trace_L3[:4] - trace_L3[:7:-1], axis=1), 10.58, atol=0.05))
    True
    """
    assembly = _Assembly(length, find_stems(length, pairs), rng, arranger, crossing)
    assembly.place_stems()
    assembly.close_rings()
    assembly.fill_gaps()
    return relax(assembly.xyz_L3, assembly.bodies())


class _Assembly:
    """Helices placed one after the other, from the 5' end and from the outside in."""

    def __init__(
        self,
        length: int,
        stems: list[Stem],
        rng: np.random.Generator,
        arranger: Arranger | None,
        crossing: Sequence[Stem],
    ) -> None:
        self.length, self.stems, self.rng, self.arranger = length, stems, rng, arranger
        self.xyz_L3 = np.full((length, 3), np.nan)
        self.body_L = np.full(length, -1)
        self._frames: dict[Stem, Frame] = {}
        self._at = {stem.i: stem for stem in stems}
        self._stacks = crossing_stacks(crossing, stems)
        self._joined: list[tuple[Stem, Stem]] = []

    def place_stems(self) -> None:
        """Give every helix its place: the outside loop first, then each loop that a placed helix closes."""
        loops: list[Stem | None] = [None]
        while loops:
            closing = loops.pop()
            branches = self._branches(closing)
            if closing and self._crossed(closing):
                self._place_crossed(closing, branches)
            elif not (closing and self._arranged(closing, branches)):
                self._place_by_rule(closing, branches)
            if closing and not branches and np.isnan(self.xyz_L3[closing.inner[0] + 1, 0]):
                self._fill_hairpin(closing)
            loops.extend(reversed(branches))

    def _crossed(self, closing: Stem) -> bool:
        """Whether another loop's strand stacks on the inner end of a helix."""
        return any(stack.stem == closing and stack.inside for stack in self._stacks)

    def _place_crossed(self, closing: Stem, branches: list[Stem]) -> None:
        """The helix between loops goes on; others are put where there is room."""
        for stack in self._stacks:
            if stack.stem == closing and stack.crossing not in self._frames:
                self._put(stack.crossing, stack.seen_from_stem().within(self._frames[closing]), body=len(self._frames))
        for stem in branches:
            placed = [each for each in self._stacks if each.stem == stem and each.crossing in self._frames]
            if placed:
                self._put(stem, placed[0].frame.within(self._frames[placed[0].crossing]), body=len(self._frames))
            else:
                self._try_places(stem, self._ties(stem, closing, branches))

    def _place_by_rule(self, closing: Stem | None, branches: list[Stem]) -> None:
        if closing and len(branches) == 1:
            self._place_across(closing, branches[0])
        else:
            self._place_branches(closing, branches)

    def _arranged(self, closing: Stem, branches: list[Stem]) -> bool:
        """Place a loop as the arranger says; False if it says nothing."""
        inner = self._frames[closing].along(closing.pairs - 1)
        placed = self.arranger.draw(closing, branches, inner, self.rng) if self.arranger else None
        if placed is None:
            return False
        for stem, frame in zip(branches, placed.branches, strict=True):
            self._put(stem, frame, body=len(self._frames), beside=closing)
        starts = [closing.inner[0], *(stem.j for stem in branches)]
        for start, xyz_G3 in zip(starts, placed.gaps, strict=True):
            if xyz_G3 is not None:
                self.xyz_L3[start + 1 : start + 1 + len(xyz_G3)] = xyz_G3
        return True

    def _branches(self, closing: Stem | None) -> list[Stem]:
        residue, end = (closing.inner[0] + 1, closing.inner[1]) if closing else (0, self.length)
        branches = []
        while residue < end:
            stem = self._at.get(residue)
            if stem:
                branches.append(stem)
            residue = stem.j + 1 if stem else residue + 1
        return branches

    def _place_across(self, closing: Stem, stem: Stem) -> None:
        """Internal loop or bulge: the helix goes on, as if the shorter side were paired and the rest looped out."""
        gaps = stem.i - closing.inner[0] - 1, closing.inner[1] - stem.j - 1
        shared = min(gaps)
        if shared > _LARGEST_STACKED:
            self._place_branches(closing, [stem])
            return
        inner = self._frames[closing].along(closing.pairs - 1)
        self._put(stem, inner.along(1 + shared), body=int(self.body_L[closing.i]), beside=closing)
        for strand, gap in enumerate(gaps):
            low = shared if gap == shared else (shared + 1) // 2
            for step in range(1, shared + 1):
                outer_side = closing.inner[0] + step if strand == 0 else closing.inner[1] - step
                inner_side = stem.i - (shared + 1 - step) if strand == 0 else stem.j + (shared + 1 - step)
                residue = outer_side if step <= low else inner_side
                self.xyz_L3[residue] = inner.place(double_helix(1, first=step)[strand, 0])

    def _place_branches(self, closing: Stem | None, branches: list[Stem]) -> None:
        links = self._links(closing, branches)
        stacked = self._choose_stacks(links, closing)
        first = [link.right if link.left == closing else link.left for link in stacked if closing in _ends(link)]
        for stem in first + [stem for stem in branches if stem not in first]:
            for link in stacked:
                if stem in _ends(link) and (link.left in self._frames or link.right in self._frames):
                    self._stack(stem, link, closing)
                    break
            else:
                self._try_places(stem, self._ties(stem, closing, branches))

    @staticmethod
    def _links(closing: Stem | None, branches: list[Stem]) -> list[_Link]:
        """Neighbours around a loop, the closing helix first and last."""
        links = [_Link(left, right, right.i - left.j - 1) for left, right in itertools.pairwise(branches)]
        if closing and branches:
            links.insert(0, _Link(closing, branches[0], branches[0].i - closing.inner[0] - 1))
            links.append(_Link(branches[-1], closing, closing.inner[1] - branches[-1].j - 1))
        return links

    def _choose_stacks(self, links: list[_Link], closing: Stem | None) -> list[_Link]:
        """Draw which neighbours stack: likelier the fewer residues lie between, each helix end at most once."""
        odds = [(_STACK_ODDS[link.gap], link) for link in links if link.gap < len(_STACK_ODDS)]
        odds = [(value + _SIDE_ODDS * ((link.right == closing) - (link.left == closing)), link) for value, link in odds]
        drawn = [(value + float(self.rng.logistic()), link) for value, link in odds]
        chosen: list[_Link] = []
        for value, link in sorted(drawn, key=lambda item: -item[0]):
            if value > 0 and not any(set(_ends(link)) & set(_ends(other)) for other in chosen):
                chosen.append(link)
        return chosen

    def _stack(self, stem: Stem, link: _Link, closing: Stem | None) -> None:
        """Put a helix on the axis of its neighbour, and the residues between on the strand that goes on."""
        other = link.left if stem == link.right else link.right
        body = int(self.body_L[other.i])
        if other == closing:
            inner = self._frames[other].along(other.pairs - 1)
            strand = 0 if link.left == closing else 1
            self._put(stem, inner.along(1 + link.gap), body=body, beside=other)
            for step in range(1, link.gap + 1):
                residue = other.inner[0] + step if strand == 0 else other.inner[1] - step
                self.xyz_L3[residue] = inner.place(double_helix(1, first=step)[strand, 0])
            return
        frame = self._frames[other]
        self._put(stem, frame.along(-(1 + link.gap)).flipped(), body=body, beside=other)
        for step in range(1, link.gap + 1):
            residue, strand = (other.j + step, 1) if other == link.left else (other.i - step, 0)
            self.xyz_L3[residue] = frame.place(double_helix(1, first=-step)[strand, 0])

    def _ties(self, stem: Stem, closing: Stem | None, branches: list[Stem]) -> list[tuple[int, int, float]]:
        """What holds a helix: (own residue, placed residue, longest distance in Å), at most one on each side."""
        ring = [*branches, closing] if closing else branches
        ties = []
        for direction in (-1, 1):
            reach, place = 0.0, branches.index(stem)
            here = stem.i if direction < 0 else stem.j
            while 0 <= (place := place + direction) < len(ring) or (closing and place == -1):
                other = ring[place]
                if other == closing:
                    near = far = other.inner[0] if direction < 0 else other.inner[1]
                else:
                    near, far = (other.j, other.i) if direction < 0 else (other.i, other.j)
                reach += STEP * abs(here - near)
                if other in self._frames:
                    ties.append((stem.i if direction < 0 else stem.j, near, reach))
                    break
                reach, here = reach + _PAIR_WIDTH, far
        return ties

    def _try_places(self, stem: Stem, ties: list[tuple[int, int, float]]) -> None:
        """Put a helix where, of some random places, it clashes least and its linkers reach."""
        body = len(self._frames)
        if not ties:
            self._put(stem, Frame(np.eye(3), np.zeros(3)), body=body)
            return
        axes_D33 = _random_rotations(_DRAWS, self.rng)
        direction_D3 = _random_rotations(_DRAWS, self.rng)[:, 0]
        ends = {stem.i: double_helix(1)[0, 0], stem.j: double_helix(1)[1, 0]}
        own, placed, reach = ties[0]
        origin_D3 = self.xyz_L3[placed] + min(reach, 6 * STEP) * direction_D3 - ends[own] @ axes_D33
        cost_D = self._clashes(double_helix(stem.pairs).reshape(-1, 3) @ axes_D33 + origin_D3[:, None])
        for own, placed, reach in ties:
            gap_D = np.linalg.norm(ends[own] @ axes_D33 + origin_D3 - self.xyz_L3[placed], axis=-1)
            cost_D += np.maximum(gap_D - reach, 0.0)
        best = int(np.argmin(cost_D))
        self._put(stem, Frame(axes_D33[best], origin_D3[best]), body=body)

    def _clashes(self, atoms_DM3: np.ndarray) -> np.ndarray:
        taken_P3 = self.xyz_L3[self.body_L >= 0]
        near_P = np.linalg.norm(taken_P3 - atoms_DM3.mean(axis=(0, 1)), axis=1) < 60.0 + RISE * atoms_DM3.shape[1]
        between = np.linalg.norm(atoms_DM3[:, ::2, None] - taken_P3[near_P], axis=-1)
        return np.sum(np.maximum(12.0 - between, 0.0), axis=(1, 2))

    def _put(self, stem: Stem, frame: Frame, *, body: int, beside: Stem | None = None) -> None:
        own = np.arange(stem.pairs)
        strand_P3, partner_P3 = frame.place(double_helix(stem.pairs))
        self.xyz_L3[stem.i + own], self.xyz_L3[stem.j - own] = strand_P3, partner_P3
        self.body_L[stem.i + own], self.body_L[stem.j - own] = body, body
        self._frames[stem] = frame
        if beside:
            self._joined.append((beside, stem))

    def close_rings(self) -> None:
        """Put in the helices between loops, and share what does not fit among all joints of the helices."""
        if not self._stacks:
            return
        self._put_crossing()
        joints = [(left, right, self._frames[right].relative(self._frames[left])) for left, right in self._joined]
        joints += [(stack.crossing, stack.stem, stack.frame) for stack in self._stacks]
        self.stems = sorted(self._frames, key=lambda stem: stem.i)
        moved_L3 = _least_strain(self.xyz_L3, self.stems, joints)
        in_stem = np.zeros(self.length, dtype=bool)
        in_stem[np.concatenate([stem.residues for stem in self.stems])] = True
        for stem in self.stems:
            old, frame = self._frames[stem], _fitted_frame(stem, moved_L3)
            for residue in self._attached(stem, in_stem):
                self.xyz_L3[residue] = frame.place(old.local(self.xyz_L3[residue]))
            self._put(stem, frame, body=int(self.body_L[stem.i]))
        for stack in self._stacks:
            self.body_L[self.body_L == self.body_L[stack.stem.i]] = self.body_L[stack.crossing.i]

    def _put_crossing(self) -> None:
        """Place the helices between loops on what they stack on, and forget the loops that they are made of."""
        for stack in self._stacks:
            for strand in np.split(stack.crossing.residues, 2):
                self._clear_loop(int(strand.min()), int(strand.max()))
        for stack in self._stacks:
            if stack.crossing not in self._frames:
                frame = stack.seen_from_stem().within(self._frames[stack.stem])
                self._put(stack.crossing, frame, body=len(self._frames))

    def _clear_loop(self, first: int, last: int) -> None:
        """Forget where the residues around a strand were put, as far as they are in no helix."""
        while first > 0 and self.body_L[first - 1] < 0:
            first -= 1
        while last < self.length - 1 and self.body_L[last + 1] < 0:
            last += 1
        loose = np.arange(first, last + 1)
        self.xyz_L3[loose[self.body_L[loose] < 0]] = np.nan

    def _attached(self, stem: Stem, in_stem: np.ndarray) -> list[int]:
        """Placed residues between helices that are nearer in sequence to this one."""
        found = []
        for end, step in ((stem.i, -1), (stem.inner[0], 1), (stem.inner[1], -1), (stem.j, 1)):
            own = []
            residue = end + step
            while 0 <= residue < self.length and not in_stem[residue]:
                own.append(residue)
                residue += step
            near = len(own) if not 0 <= residue < self.length else (len(own) + (step > 0)) // 2
            found += [each for each in own[:near] if np.isfinite(self.xyz_L3[each, 0])]
        return found

    def _fill_hairpin(self, stem: Stem) -> None:
        """Four residues as in most tetraloops; of longer loops, the ends stacked on the helix."""
        inner, (left, right) = self._frames[stem].along(stem.pairs - 1), stem.inner
        size = right - left - 1
        if size == len(_TETRALOOP):
            self.xyz_L3[left + 1 : right] = inner.place(_TETRALOOP)
            return
        for step in range(1, 1 + (size > 2) + (size > 6)):
            self.xyz_L3[left + step] = inner.place(double_helix(1, first=step)[0, 0])
        for step in range(1, 1 + (size > 2) + (size > 5) + (size > 7)):
            self.xyz_L3[right - step] = inner.place(double_helix(1, first=step)[1, 0])

    def fill_gaps(self) -> None:
        """Give the other unpaired residues places between the helices, and stacked on the ends of the chain."""
        if not self.stems:
            self.xyz_L3[:] = helix_strand(self.length)
            return
        first, last = self.stems[0], max(self.stems, key=lambda stem: stem.j)
        for stem, strand, residues in (
            (first, 0, range(first.i - 1, -1, -1)),
            (last, 1, range(last.j + 1, self.length)),
        ):
            for step, residue in enumerate(residues, start=1):
                self.xyz_L3[residue] = self._frames[stem].place(double_helix(1, first=-step)[strand, 0])
        placed = np.flatnonzero(np.isfinite(self.xyz_L3[:, 0]))
        for left, right in itertools.pairwise(placed.tolist()):
            if right - left > 1:
                start, end = self.xyz_L3[left], self.xyz_L3[right]
                self.xyz_L3[left + 1 : right] = _arc(start, end, right - left - 1, self._outward(left, right))

    def _outward(self, left: int, right: int) -> np.ndarray:
        """Away from the two helices that a loop joins, with some noise so that loops do not coincide."""
        near = np.concatenate([self.xyz_L3[max(left - 3, 0) : left + 1], self.xyz_L3[right : right + 4]])
        near = near[np.isfinite(near[:, 0])]
        middle = (self.xyz_L3[left] + self.xyz_L3[right]) / 2
        return middle - near.mean(axis=0) + 0.3 * self.rng.standard_normal(3)

    def bodies(self) -> list[np.ndarray]:
        """Residues of each set of helices that moves as one."""
        return [np.flatnonzero(self.body_L == body) for body in np.unique(self.body_L[self.body_L >= 0])]


@dataclass(frozen=True)
class Stack:
    """A helix between loops, and one that goes on with it: where the other stands, seen from the first."""

    crossing: Stem
    stem: Stem
    frame: Frame
    inside: bool  # at the end of the other one that closes a loop

    def seen_from_stem(self) -> Frame:
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


def _fitted_frame(stem: Stem, xyz_L3: np.ndarray) -> Frame:
    ideal_P3, atoms_P3 = double_helix(stem.pairs).reshape(-1, 3), xyz_L3[stem.residues]
    centre_ideal, centre = ideal_P3.mean(axis=0), atoms_P3.mean(axis=0)
    axes = rotation_onto(ideal_P3 - centre_ideal, atoms_P3 - centre)
    return Frame(axes, centre - centre_ideal @ axes)


def _least_strain(xyz_L3: np.ndarray, stems: list[Stem], joints: list[tuple[Stem, Stem, Frame]]) -> np.ndarray:
    """Helices moved as rigid bodies until neighbours stand to each other as they should as nearly as all can.

    Every round moves the residues to the mean of where each joint (two helices, and the second as seen from the first)
    wants them, pulls the chain together, from a third of the rounds on pushes helices apart that run through each
    other, and fits each helix back.
    """
    ideal = {stem: double_helix(stem.pairs).reshape(-1, 3) for stem in stems}
    bodies = _Shapes(len(xyz_L3), [stem.residues for stem in stems], [ideal[stem] for stem in stems])
    wanted = _Shapes(
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


def _ends(link: _Link) -> tuple[Stem, Stem]:
    return link.left, link.right


def _random_rotations(count: int, rng: np.random.Generator) -> np.ndarray:
    """[D, 3, 3] rotations, uniform."""
    w, x, y, z = (quaternion := rng.standard_normal((4, count))) / np.linalg.norm(quaternion, axis=0)
    rows = [
        [1 - 2 * (y * y + z * z), 2 * (x * y - w * z), 2 * (x * z + w * y)],
        [2 * (x * y + w * z), 1 - 2 * (x * x + z * z), 2 * (y * z - w * x)],
        [2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x * x + y * y)],
    ]
    return np.array(rows).transpose(2, 0, 1)


def _arc(start: np.ndarray, end: np.ndarray, count: int, outward: np.ndarray) -> np.ndarray:
    """[count, 3] points about `STEP` apart on a circular arc between two points; on a line where they are too far."""
    chord = float(np.linalg.norm(end - start))
    along = (end - start) / max(chord, 1e-9)
    share = np.arange(1, count + 1) / (count + 1)
    steps = count + 1
    if chord >= steps * STEP * 0.999:
        return start + share[:, None] * (end - start)
    half = _half_angle(chord, steps)
    aside = outward - along * (outward @ along)
    if np.linalg.norm(aside) < 1e-6:
        aside = np.cross(along, np.eye(3)[np.argmin(np.abs(along))])
    aside = aside / np.linalg.norm(aside)
    radius = STEP / (2 * math.sin(half / steps))
    centre = (start + end) / 2 - aside * radius * math.cos(half)
    angle = (2 * share - 1) * half
    return centre + radius * (np.sin(angle)[:, None] * along + np.cos(angle)[:, None] * aside)


def _half_angle(chord: float, steps: int) -> float:
    """Half the angle of an arc of `steps` chords of `STEP` between points `chord` apart, by bisection."""
    low, high = 1e-6, math.pi * (1 - 1e-6)
    for _ in range(50):
        half = (low + high) / 2
        if math.sin(half) / math.sin(half / steps) * STEP > chord:
            low = half
        else:
            high = half
    return low


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
    shapes = _Shapes(len(xyz_L3), bodies, [xyz_L3[body] for body in bodies])
    close, worst = np.empty((2, 0), dtype=np.int64), 0.0
    for turn in range(rounds):
        if turn % 10 == 0:
            close = close_pairs(xyz_L3, clash + 3.0)
            close = close[:, (close[1] - close[0] > 1) & ~shapes.same_body(close)]
        move_L3, worst = _corrections(xyz_L3, close, longest=longest, clash=clash)
        if worst < 0.05:
            break
        xyz_L3 = shapes.restore(xyz_L3 + shapes.boost_L1 * move_L3)
    return xyz_L3, worst


def _corrections(xyz_L3: np.ndarray, close: np.ndarray, *, longest: float, clash: float) -> tuple[np.ndarray, float]:
    """Summed moves that halve each violation, and the largest violation, Å."""
    chain = np.stack([np.arange(len(xyz_L3) - 1), np.arange(1, len(xyz_L3))])
    left, right = np.concatenate([chain, close], axis=1)
    between = xyz_L3[right] - xyz_L3[left]
    distance = np.maximum(np.linalg.norm(between, axis=1), 1e-6)
    bonded = np.arange(len(left)) < chain.shape[1]
    too_far = np.where(bonded, np.maximum(distance - longest, 0.0), 0.0)
    too_near = np.maximum(np.where(bonded, SHORTEST_STEP, clash) - distance, 0.0)
    pull = 0.5 * (too_far - too_near)[:, None] * between / distance[:, None]
    move_L3 = np.zeros_like(xyz_L3)
    np.add.at(move_L3, left, pull)
    np.add.at(move_L3, right, -pull)
    return move_L3, float(np.max(too_far + too_near, initial=0.0))


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
    fitted_L3 = _Shapes(len(xyz_L3), bodies, ideal).restore(xyz_L3)
    moved = np.concatenate(bodies)
    return fitted_L3, float(np.sqrt(np.mean(np.sum((fitted_L3[moved] - xyz_L3[moved]) ** 2, axis=1))))


class _Shapes:
    """Rigid bodies, padded to one size so that all of them are fitted at once."""

    def __init__(self, length: int, bodies: list[np.ndarray], shapes: list[np.ndarray]) -> None:
        size = max((len(body) for body in bodies), default=1)
        self.index_SM = np.zeros((len(bodies), size), dtype=np.int64)
        self.real_SM = np.zeros((len(bodies), size), dtype=bool)
        self.shape_SM3 = np.zeros((len(bodies), size, 3))
        self.body_L = np.full(length, -1)
        for number, (body, shape) in enumerate(zip(bodies, shapes, strict=True)):
            self.index_SM[number, : len(body)] = body
            self.real_SM[number, : len(body)] = True
            self.shape_SM3[number, : len(body)] = shape - shape.mean(axis=0)
            self.body_L[body] = number
        self.residues = self.index_SM[self.real_SM]
        # A body follows the mean of its residues' moves: a pull on one of them is diluted by their number.
        self.boost_L1 = np.where(self.body_L >= 0, 3.0, 1.0)[:, None]

    def _centred(self, xyz_L3: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        weight = self.real_SM[..., None] / np.maximum(self.real_SM.sum(axis=1), 1)[:, None, None]
        centre_S13 = np.sum(xyz_L3[self.index_SM] * weight, axis=1, keepdims=True)
        return (xyz_L3[self.index_SM] - centre_S13) * self.real_SM[..., None], centre_S13

    def same_body(self, pairs: np.ndarray) -> np.ndarray:
        return (self.body_L[pairs[0]] == self.body_L[pairs[1]]) & (self.body_L[pairs[0]] >= 0)

    def restore(self, xyz_L3: np.ndarray) -> np.ndarray:
        """Each body back to its shape, where its residues were moved to."""
        xyz_L3, placed = xyz_L3.copy(), self.placed(xyz_L3)
        xyz_L3[self.residues] = placed
        return xyz_L3

    def placed(self, xyz_L3: np.ndarray) -> np.ndarray:
        """Where the residues of all bodies, one after the other, are in these shapes."""
        moved_SM3, centre_S13 = self._centred(xyz_L3)
        return (self.shape_SM3 @ rotation_onto(self.shape_SM3, moved_SM3) + centre_S13)[self.real_SM]


def close_pairs(xyz_L3: np.ndarray, cutoff: float) -> np.ndarray:
    """Pairs of residues nearer than a cut-off, by a sweep along the longest axis.

    Args:
        xyz_L3: [L, 3] Å, finite.
        cutoff: Å.

    Returns:
        [2, pairs] int64, first < second, sorted.
    """
    spread = int(np.argmax(np.ptp(xyz_L3, axis=0)))
    order_L = np.argsort(xyz_L3[:, spread], kind="stable")
    sorted_L3, found = xyz_L3[order_L], []
    for offset in range(1, len(order_L)):
        ahead = sorted_L3[offset:] - sorted_L3[:-offset]
        candidate = np.flatnonzero(ahead[:, spread] < cutoff)
        if not candidate.size:
            break
        near = candidate[np.sum(ahead[candidate] ** 2, axis=1) < cutoff**2]
        found.append(np.stack([order_L[near], order_L[near + offset]]))
    pairs = np.sort(np.concatenate([np.empty((2, 0), dtype=np.int64), *found], axis=1), axis=0)
    return pairs[:, np.lexsort(pairs[::-1])]


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
    scale = max(0.6 * np.sqrt(max(length, 30) - 0.5) - 2.5, 2.0)
    for m in range(count - 1):
        others_ML3 = centred_ML3[m + 1 :]
        moved_ML3 = others_ML3 @ rotation_onto(others_ML3, np.broadcast_to(centred_ML3[m], others_ML3.shape))
        square_ML = np.sum((moved_ML3 - centred_ML3[m]) ** 2, axis=-1)
        alike_MM[m, m + 1 :] = alike_MM[m + 1 :, m] = np.mean(1.0 / (1.0 + square_ML / scale**2), axis=1)
    return alike_MM
