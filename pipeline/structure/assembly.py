"""A C1' trace for a secondary structure: helices placed around loops, rings closed, loops filled.

Part of the core: no torch, so that scoring can build its floors from the same helices. Where numbers are from "the
182 chains", those are the chains that the helix of `pipeline.structure.geometry` was fitted to.

Lengths in Å. Letters: L length (nt), P placed pairs of a helix, D draws, M residues of a helix, G of a gap, 3 xyz.
"""

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple, Protocol

import numpy as np

from pipeline.structure.geometry import RISE, STEP, Frame, Scaffold, Stem, double_helix, find_stems, helix_strand
from pipeline.structure.rigid import relax
from pipeline.structure.rings import close_rings, crossing_stacks, ring_gaps

_DRAWS = 24  # random placements tried for a helix that is not stacked on another
_PAIR_WIDTH = 18.0  # Å that a helix which is not placed yet may bridge
_LARGEST_STACKED = 14  # nt on the shorter side of an internal loop across which the helix goes on

#: Log-odds that neighbours in a branched loop stack on one axis, by the residues between them, and how much better the
#: 3' side of the closing helix is than its 5' side. Estimates from the branched loops of the 182 chains: neighbours
#: with 0 or 1 residues between them on the 3' side are stacked in 5 of 5, on the 5' side in 1 of 3.
_STACK_ODDS = (2.0, 1.0, 0.3, -0.7)
_SIDE_ODDS = 1.0

#: C1' of a four-residue loop in the frame of its closing pair, Å: median of 94 loops of the 182 chains (59 GNRA).
_TETRALOOP = np.array([[6.10, 3.94, 3.07], [3.01, 6.45, 9.12], [0.0, 8.03, 5.23], [-0.10, 10.81, 0.90]])


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
    assembly = _Assembly(length, pairs, rng, arranger, crossing)
    assembly.place_stems()
    close_rings(assembly, assembly.stacks)
    assembly.fill_gaps()
    return relax(assembly.xyz_L3, assembly.bodies())


def gaps_of_rings(
    length: int, pairs: list[tuple[int, int]], rng: np.random.Generator, *, arranger: Arranger, crossing: Sequence[Stem]
) -> dict[Stem, float]:
    """How far rings are from closing, Å RMS of each helix between loops, before what does not fit is shared.

    The arguments are those of `trace_from_pairs`, and so are the places of the helices.
    """
    assembly = _Assembly(length, pairs, rng, arranger, crossing)
    assembly.place_stems()
    return ring_gaps(assembly, assembly.stacks)


class _Assembly(Scaffold):
    """Helices placed one after the other, from the 5' end and from the outside in (see `trace_from_pairs`)."""

    def __init__(
        self,
        length: int,
        pairs: list[tuple[int, int]],
        rng: np.random.Generator,
        arranger: Arranger | None,
        crossing: Sequence[Stem],
    ) -> None:
        super().__init__(length)
        stems = find_stems(length, pairs)
        self.stacks = crossing_stacks(crossing, stems)
        self._rng, self._arranger = rng, arranger
        self._at = {stem.i: stem for stem in stems}

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
        return any(stack.stem == closing and stack.inside for stack in self.stacks)

    def _place_crossed(self, closing: Stem, branches: list[Stem]) -> None:
        """The helix between loops goes on; others are put where there is room."""
        for stack in self.stacks:
            if stack.stem == closing and stack.crossing not in self.frames:
                self.put(stack.crossing, stack.seen_from_stem().within(self.frames[closing]))
        for stem in branches:
            placed = [each for each in self.stacks if each.stem == stem and each.crossing in self.frames]
            if placed:
                self.put(stem, placed[0].frame.within(self.frames[placed[0].crossing]))
            else:
                self._try_places(stem, self._ties(stem, closing, branches))

    def _place_by_rule(self, closing: Stem | None, branches: list[Stem]) -> None:
        if closing and len(branches) == 1:
            self._place_across(closing, branches[0])
        else:
            self._place_branches(closing, branches)

    def _arranged(self, closing: Stem, branches: list[Stem]) -> bool:
        """Place a loop as the arranger says; False if it says nothing."""
        inner = self.frames[closing].along(closing.pairs - 1)
        placed = self._arranger.draw(closing, branches, inner, self._rng) if self._arranger else None
        if placed is None:
            return False
        for stem, frame in zip(branches, placed.branches, strict=True):
            self.put(stem, frame, beside=closing)
        starts = [closing.inner[0], *(stem.j for stem in branches)]
        for start, xyz_G3 in zip(starts, placed.gaps, strict=True):
            if xyz_G3 is not None:
                self.xyz_L3[start + 1 : start + 1 + len(xyz_G3)] = xyz_G3
        return True

    def _branches(self, closing: Stem | None) -> list[Stem]:
        residue, end = (closing.inner[0] + 1, closing.inner[1]) if closing else (0, len(self.xyz_L3))
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
        inner = self.frames[closing].along(closing.pairs - 1)
        self.put(stem, inner.along(1 + shared), body=int(self.body_L[closing.i]), beside=closing)
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
                if stem in _ends(link) and (link.left in self.frames or link.right in self.frames):
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
        drawn = [(value + float(self._rng.logistic()), link) for value, link in odds]
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
            inner = self.frames[other].along(other.pairs - 1)
            strand = 0 if link.left == closing else 1
            self.put(stem, inner.along(1 + link.gap), body=body, beside=other)
            self._go_on(inner, strand, other.inner[strand], link.gap)
            return
        frame, strand = self.frames[other], int(other == link.left)
        self.put(stem, frame.along(-(1 + link.gap)).flipped(), body=body, beside=other)
        self._go_on(frame, strand, (other.i, other.j)[strand], link.gap, outwards=True)

    def _go_on(self, frame: Frame, strand: int, residue: int, count: int, *, outwards: bool = False) -> None:
        """Stack unpaired residues on one strand of a helix's pair, which `frame` is of and `residue` belongs to."""
        side = -1 if outwards else 1  # steps of the helix go inwards
        onwards = side if strand == 0 else -side  # and those of the second strand against the chain
        for step in range(1, count + 1):
            self.xyz_L3[residue + onwards * step] = frame.place(double_helix(1, first=side * step)[strand, 0])

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
                if other in self.frames:
                    ties.append((stem.i if direction < 0 else stem.j, near, reach))
                    break
                reach, here = reach + _PAIR_WIDTH, far
        return ties

    def _try_places(self, stem: Stem, ties: list[tuple[int, int, float]]) -> None:
        """Put a helix where, of some random places, it clashes least and its linkers reach."""
        if not ties:
            self.put(stem, Frame(np.eye(3), np.zeros(3)))
            return
        axes_D33 = _random_rotations(_DRAWS, self._rng)
        direction_D3 = _random_rotations(_DRAWS, self._rng)[:, 0]
        ends = {stem.i: double_helix(1)[0, 0], stem.j: double_helix(1)[1, 0]}
        own, placed, reach = ties[0]
        origin_D3 = self.xyz_L3[placed] + min(reach, 6 * STEP) * direction_D3 - ends[own] @ axes_D33
        cost_D = self._clashes(double_helix(stem.pairs).reshape(-1, 3) @ axes_D33 + origin_D3[:, None])
        for own, placed, reach in ties:
            gap_D = np.linalg.norm(ends[own] @ axes_D33 + origin_D3 - self.xyz_L3[placed], axis=-1)
            cost_D += np.maximum(gap_D - reach, 0.0)
        best = int(np.argmin(cost_D))
        self.put(stem, Frame(axes_D33[best], origin_D3[best]))

    def _clashes(self, atoms_DM3: np.ndarray) -> np.ndarray:
        taken_P3 = self.xyz_L3[self.body_L >= 0]
        near_P = np.linalg.norm(taken_P3 - atoms_DM3.mean(axis=(0, 1)), axis=1) < 60.0 + RISE * atoms_DM3.shape[1]
        between = np.linalg.norm(atoms_DM3[:, ::2, None] - taken_P3[near_P], axis=-1)
        return np.sum(np.maximum(12.0 - between, 0.0), axis=(1, 2))

    def _fill_hairpin(self, stem: Stem) -> None:
        """Four residues as in most tetraloops; of longer loops, the ends stacked on the helix."""
        inner, (left, right) = self.frames[stem].along(stem.pairs - 1), stem.inner
        size = right - left - 1
        if size == len(_TETRALOOP):
            self.xyz_L3[left + 1 : right] = inner.place(_TETRALOOP)
            return
        self._go_on(inner, 0, left, (size > 2) + (size > 6))
        self._go_on(inner, 1, right, (size > 2) + (size > 5) + (size > 7))

    def fill_gaps(self) -> None:
        """Give the other unpaired residues places between the helices, and stacked on the ends of the chain."""
        if not self.frames:
            self.xyz_L3[:] = helix_strand(len(self.xyz_L3))
            return
        first, last = min(self.frames, key=lambda stem: stem.i), max(self.frames, key=lambda stem: stem.j)
        self._go_on(self.frames[first], 0, first.i, first.i, outwards=True)
        self._go_on(self.frames[last], 1, last.j, len(self.xyz_L3) - 1 - last.j, outwards=True)
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
        return middle - near.mean(axis=0) + 0.3 * self._rng.standard_normal(3)


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
