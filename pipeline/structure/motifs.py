"""Loops of known structures, from which new ones are assembled: how helices stand to each other, and what is between.

A loop is kept in the frame of the helix that closes it: the frames of the helices that leave it and the C1' between
them. Its name is the number of unpaired residues between neighbours around it, as (4,) for a tetraloop, (3, 2) for an
internal loop, (0, 3, 1) for a three-way junction.

Letters: L length (nt), P pairs of a helix, G residues of a gap, 3 xyz; lengths in Å.
"""

import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.structure.assembly import Placed
from pipeline.structure.geometry import Frame, Stem, double_helix, find_stems
from pipeline.structure.secondary import nested_pairs, without_lone_pairs
from pipeline.templates.pairs import pairs_from_trace

_FITTED = 5  # pairs next to the loop that its helix is fitted to
_FURTHEST_FIT = 2.0  # Å RMSD of those pairs from an ideal helix
_LARGEST_MISFIT = 4  # residues more or less that a loop may have, all gaps together
_GAP_COST, _LETTER_COST = 1.0, 0.5  # of a residue too many or too few, and of another letter

_UNKNOWN_COST = 6.0  # of a loop that the library has nothing like

#: First branch of a tight four-way junction beside the helix that closes it, antiparallel: angle and origin. Of those
#: that leave 7.1 Å to both crossing strands and 6 Å between the stacks, nearest to the mean of the junctions with gaps
#: (0, 1, 2, 0) in 1NBS, 1U9S and 2A64, which are 8 to 11° from antiparallel: 130°, (19.6, -2.0, 6.5).
_BESIDE = math.radians(151.0), np.array([20.67, 0.69, 2.08])
_CROSSOVER_GAPS = {4: 3, 6: 6}  # helices -> most unpaired residues in all gaps
_CROSSOVER_COST, _ISOMER_COST = 1.0, 1.5


@dataclass(frozen=True)
class Motif:
    """A loop of a known structure, in the frame of the last pair of the helix that closes it."""

    strands: tuple[str, ...]  # letters of each gap with the paired residue on either side
    gaps: tuple[np.ndarray, ...]  # [G, 3] Å of each gap
    branches: tuple[Frame, ...]

    def seen_from_branch(self) -> "Motif":
        """The same loop with its first branch as the helix that closes it."""
        inner = self.branches[0].flipped()
        here = Frame(np.eye(3), np.zeros(3))
        turned = (*self.branches[1:], here.flipped())
        strands, gaps = (*self.strands[1:], self.strands[0]), (*self.gaps[1:], self.gaps[0])
        return Motif(strands, tuple(inner.local(gap) for gap in gaps), tuple(each.relative(inner) for each in turned))

    def fits(self, strands: Sequence[str]) -> float:
        """How unlike another loop it is: residues too many or too few, and, where gaps are equal, other letters."""
        cost = 0.0
        for own, other in zip(self.strands, strands, strict=True):
            if len(own) == len(other):
                cost += _LETTER_COST * sum(a != b for a, b in zip(own, other, strict=True))
            else:
                cost += _GAP_COST * abs(len(own) - len(other)) + _LETTER_COST * 2
        return cost

    def place(self, inner: Frame, strands: Sequence[str]) -> Placed:
        """The loop on a helix: gaps of another size are left open."""
        gaps = [
            inner.place(xyz_G3) if len(own) == len(other) else None
            for xyz_G3, own, other in zip(self.gaps, self.strands, strands, strict=True)
        ]
        return Placed([frame.within(inner) for frame in self.branches], gaps)


class MotifLibrary:
    """Loops of known structures, by the number of helices that leave them.

    Args:
        loops: as `find_loops` gives them; none from a structure that is newer than allowed, or held out.
    """

    def __init__(self, loops: Iterable[Motif]) -> None:
        self._loops: dict[int, list[Motif]] = {}
        for motif in loops:
            for _ in range(len(motif.strands)):
                self._loops.setdefault(len(motif.branches), []).append(motif)
                motif = motif.seen_from_branch() if motif.branches else motif

    def __len__(self) -> int:
        return sum(len(loops) for loops in self._loops.values())

    def similar(self, strands: Sequence[str]) -> list[tuple[float, Motif]]:
        """Loops with as many branches and about as many residues: (cost, loop), the most alike first."""
        found = []
        for motif in self._loops.get(len(strands) - 1, ()):
            sizes = [abs(len(own) - len(other)) for own, other in zip(motif.strands, strands, strict=True)]
            if sum(sizes) <= (_LARGEST_MISFIT if len(strands) > 1 else 0):
                found.append((motif.fits(strands), motif))
        return sorted(found, key=lambda item: item[0])


class MotifArranger:
    """Draws loops of a library for the loops of one sequence.

    Args:
        library: where loops are taken from.
        sequence: letters A, C, G, U.
    """

    def __init__(self, library: MotifLibrary, sequence: str) -> None:
        self._library, self._sequence, self._temperature = library, sequence, 0.0
        self._similar: dict[tuple[str, ...], list[tuple[float, Motif]]] = {}
        self._preferred = 0
        self.costs: list[float] = []
        self._known: dict[Stem, int] = {}
        self.ways: dict[Stem, int] = {}

    def start(self, rng: np.random.Generator, *, temperature: float, ways: Mapping[Stem, int] | None = None) -> None:
        """Begin a trace: forget the costs, and draw how four-way junctions prefer to stack in all of it.

        Args:
            rng: source of the preference.
            temperature: of the draws that follow, in units of a loop's cost; 0 takes the most alike.
            ways: in which of its two ways the tight four-way junction that a helix closes stacks, where that is known;
                after the trace, `ways` holds them and those of the others that the library has nothing nearer to.
        """
        self._temperature, self._preferred, self.costs = temperature, int(rng.integers(2)), []
        self._known, self.ways = dict(ways or {}), dict(ways or {})

    def draw(self, closing: Stem, branches: list[Stem], inner: Frame, rng: np.random.Generator) -> Placed | None:
        """A loop for the helices around it, in place; None if there is nothing like it."""
        ends = [(closing.inner[0], branches[0].i if branches else closing.inner[1])]
        ends += [(left.j, right.i) for left, right in itertools.pairwise(branches)]
        if branches:
            ends.append((branches[-1].j, closing.inner[1]))
        strands = tuple(self._sequence[start : end + 1] for start, end in ends)
        if strands not in self._similar:
            self._similar[strands] = self._library.similar(strands)
        crossovers = self._crossovers(strands, way=self._known.get(closing))
        if len(crossovers) > 1 and crossovers[self._preferred][0] <= min(
            (cost for cost, _ in self._similar[strands]), default=np.inf
        ):
            self.ways[closing] = self._preferred
        similar = crossovers if closing in self._known else self._similar[strands] + crossovers
        if not similar:
            self.costs.append(_UNKNOWN_COST)
            return None
        cost = np.array([cost for cost, _ in similar])
        drawn = int(np.argmin(cost - self._temperature * rng.gumbel(size=len(similar))))
        self.costs.append(similar[drawn][0])
        return similar[drawn][1].place(inner, strands)

    def _crossovers(self, strands: tuple[str, ...], *, way: int | None) -> list[tuple[float, Motif]]:
        """Tight junctions of four or six helices: stacks that lie side by side, in one way or in all there are."""
        gaps = sum(len(strand) - 2 for strand in strands)
        if gaps > _CROSSOVER_GAPS.get(len(strands), -1):
            return []
        cost = _CROSSOVER_COST + _GAP_COST * gaps
        ways = [(*_LEFT, _AHEAD), (_AHEAD, *_RIGHT)] if len(strands) == 4 else [(*_LEFT, _AHEAD, *_RIGHT)]
        empty = tuple(np.empty((0, 3)) for _ in strands)
        return [
            (
                cost + _ISOMER_COST * (len(ways) > 1 and number not in (way, self._preferred)),
                Motif(("",) * len(strands), empty, each),
            )
            for number, each in enumerate(ways)
            if way is None or number == way
        ]


def _crossover_frames() -> tuple[Frame, tuple[Frame, Frame], tuple[Frame, Frame]]:
    """The helix stacked on the closing one, and the stacks on its left and on its right, each of two helices.

    The right one is the left one as its own first helix sees it.
    """
    (angle, origin), here = _BESIDE, Frame(np.eye(3), np.zeros(3))
    cos, sin = math.cos(angle), math.sin(angle)
    beside = Frame(np.array([[cos, sin, 0.0], [sin, -cos, 0.0], [0.0, 0.0, -1.0]]), origin)
    ahead, inner = here.along(1), beside.flipped()
    return ahead, (beside, inner.along(1)), (ahead.relative(inner), here.flipped().relative(inner))


_AHEAD, _LEFT, _RIGHT = _crossover_frames()


def find_loops(sequence: str, xyz_L3: np.ndarray) -> list[Motif]:
    """Every loop of a structure that a helix closes and whose helices and gaps are resolved and regular.

    Args:
        sequence: letters A, C, G, U.
        xyz_L3: [L, 3] Å, NaN where unresolved.
    """
    partner_L = pairs_from_trace(sequence, xyz_L3)
    i_K = np.flatnonzero(partner_L > np.arange(len(partner_L)))
    length = len(sequence)
    pairs = without_lone_pairs(nested_pairs(length, i_K, partner_L[i_K], np.ones(len(i_K))))
    stems = find_stems(length, pairs)
    at, found = {stem.i: stem for stem in stems}, []
    for closing in stems:
        inner = _fit(xyz_L3, closing, last=True)
        branches, gaps, residue = [], [[closing.inner[0]]], closing.inner[0] + 1
        while residue < closing.inner[1]:
            gaps[-1].append(residue)
            if residue in at:
                branches.append(at[residue])
                residue = at[residue].j
                gaps.append([residue])
            residue += 1
        gaps[-1].append(closing.inner[1])
        frames = [_fit(xyz_L3, stem, last=False) for stem in branches]
        between = [xyz_L3[gap[1:-1]] for gap in gaps]
        if inner is None or any(frame is None for frame in frames) or not all(np.isfinite(g).all() for g in between):
            continue
        strands = tuple("".join(sequence[k] for k in gap) for gap in gaps)
        local = tuple(inner.local(xyz_G3) for xyz_G3 in between)
        found.append(Motif(strands, local, tuple(frame.relative(inner) for frame in frames if frame)))
    return found


def _fit(xyz_L3: np.ndarray, stem: Stem, *, last: bool) -> Frame | None:
    """Frame of a helix at its last or first pair, fitted to the pairs that are nearest; None if it is not regular."""
    size = min(stem.pairs, _FITTED)
    step_P = np.arange(stem.pairs - size, stem.pairs) if last else np.arange(size)
    ideal_P3 = double_helix(size, first=1 - size if last else 0).reshape(-1, 3)
    atoms_P3 = np.concatenate([xyz_L3[stem.i + step_P], xyz_L3[stem.j - step_P]])
    if not np.isfinite(atoms_P3).all():
        return None
    frame = Frame.fitted(ideal_P3, atoms_P3)
    misfit = math.sqrt(np.mean(np.sum((frame.place(ideal_P3) - atoms_P3) ** 2, axis=1)))
    return frame if misfit < _FURTHEST_FIT else None
