"""Candidates from pairing alone: many assemblies of drawn structures, ranked by the TM-score that they promise.

What was tried and left out, over 182 chains of the PDB: a potential of C1' distances by separation, learned from known
structures against assemblies, moved the best of five by 0.001; drawing the strands of pseudoknots together lowered it,
with the true pairs even, from 0.288 to 0.278 on the 33 chains of at least 30 nt that have one. Helices between loops
that stack on what follows them raised the best of all assemblies, on the 6 chains that have a stable one, from 0.336 to
0.347; with less stable ones too (-6 kcal/mol, two hairpins of any kind) it fell, on 33 chains, from 0.327 to 0.307.

Letters: M assemblies, L length (nt), F features, 3 xyz; lengths in Å.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from pipeline.structure.assembly import gaps_of_rings, trace_from_pairs
from pipeline.structure.geometry import Stem, find_stems, similarity
from pipeline.structure.motifs import MotifArranger, MotifLibrary
from pipeline.structure.rings import crossing_stacks
from pipeline.structure.secondary import crossing_helices, pair_across_junctions

Pairs = list[tuple[int, int]]

_ARRANGEMENTS = 8  # assemblies of each structure, the last by the general rules alone if no loops pair
_ASSEMBLED_RESIDUES = 48_000  # nt in all assemblies together: longer chains get fewer
_TEMPERATURE = 0.7  # of the loops drawn, but for the first assembly of each structure
_STARTS = 4  # of the search for the ways in which junctions stack; the first two are one way for all
_TRIED_RESIDUES = 100_000  # nt placed in one such search; longer chains try fewer ways
_STRAIN = 5.0  # Å of the gap that a draw takes like one unit of a loop's cost
_WORSE = 10.0  # Å of the mean gap by which another structure's rings may be nearer to closing
_OPEN = 40.0  # Å of a ring's gap from which it is left open in every second assembly: two helices side by side
_NOVELTY = 0.1  # of TM-score that a candidate loses against another one for being a copy of those already taken
_NEIGHBOURS = 8  # most alike assemblies: many that agree are seldom all wrong
PENALTY = 1e-2  # of the ridge regression, per target
_LENGTHS = (15, 400)  # nt: lengths beyond those of the chains that the weights were fitted to count as these
#: What each feature of an assembly adds to its expected TM-score: ridge regression over 96 assemblies of each of 159
#: chains of the PDB, whose loops came from other clusters of sequences. The mean likenesses are left out (0): without a
#: library, assemblies are more alike than those. Mean best of five, out of fold over 182 chains, by weights that never
#: saw the fold: 0.328 without deviations, neighbours and elongation, 0.334 with them, of 40 assemblies; 0.337 of 96.
WEIGHTS = (
    *(0.0134, 0.0531, -0.0087),
    *(0.4235, -0.1913, 0.1706, -0.087, 0.5491, -0.0095, -0.0357, -2.8085, 0.0, 0.0, -0.2605, 0.0, -0.0046),
    *(-0.034, 0.0934, -0.0345, 0.119, -0.0133, 0.0394, -0.0453, -0.4979, 0.1035, -0.1034, -0.1409, 0.102, 0.0593),
)


@dataclass(frozen=True)
class Assembly:
    """One arrangement of one secondary structure."""

    xyz_L3: np.ndarray  # Å
    pairs: Pairs
    pairing: float  # expected share of residues whose pairing is right
    familiarity: float  # 0 to 1: how like those of known structures its loops are
    loops: int  # closed by helices
    crossing: int = 0  # pairs between loops


def assemble(
    sequence: str,
    structures: Sequence[tuple[Pairs, float]],
    *,
    library: MotifLibrary | None,
    rng: np.random.Generator,
) -> list[Assembly]:
    """Arrange each structure several times, with loops of known structures where there are such.

    Args:
        sequence: letters A, C, G, U.
        structures: nested pairs, and the expected share of residues whose pairing is right.
        library: loops that may be used; None = the general rules.
        rng: source of the arrangements.

    Returns:
        All assemblies, the most alike loops of each structure first.
    """
    arranger = MotifArranger(library or MotifLibrary([]), sequence)
    turns = int(np.clip(_ASSEMBLED_RESIDUES // (len(sequence) * len(structures)), 1, _ARRANGEMENTS))
    plans = _plans(sequence, structures, arranger, rng)
    found = []
    for turn in range(turns):
        for plan in plans:
            way, between = _drawn(plan.ways, rng if turn else None), plan.crossing
            pairs, pairing = plan.pairs, plan.pairing
            arranger.start(rng, temperature=_TEMPERATURE if turn else 0.0, ways=way.stacked)
            if turn % 2:
                between = [helix for helix in between if way.gaps.get(helix, 0.0) < _OPEN]
            plain = turn == _ARRANGEMENTS - 1 and not between
            arranged = None if plain else arranger
            xyz_L3 = trace_from_pairs(len(sequence), pairs, rng, arranger=arranged, crossing=between)
            known = 0.0 if plain or not arranger.costs else float(np.exp(-np.mean(arranger.costs) / 2))
            crossed = sum(stem.pairs for stem in between)
            found.append(Assembly(xyz_L3, pairs, pairing, known, len(arranger.costs), crossed))
    return found


@dataclass(frozen=True)
class _Ways:
    """How tight four-way junctions stack, and how far the rings are from closing then."""

    stacked: dict[Stem, int] = field(default_factory=dict)
    gaps: dict[Stem, float] = field(default_factory=dict)  # of helices between loops, Å

    @property
    def gap(self) -> float:
        """Mean over the rings, Å."""
        return float(np.mean([*self.gaps.values()])) if self.gaps else 0.0


@dataclass(frozen=True)
class _Plan:
    """A secondary structure, and what is known of its arrangement."""

    pairs: Pairs
    pairing: float
    crossing: list[Stem]
    ways: list[_Ways]  # the nearest to closing first; none where no junction of a ring can choose

    def mean_gap(self, rings: int) -> float:
        """Å over so many rings, those that it does not have counted as open."""
        found = len(self.crossing)
        return (self.ways[0].gap * found + _OPEN * (rings - found)) / rings if self.ways else np.inf


def _plans(
    sequence: str, structures: Sequence[tuple[Pairs, float]], arranger: MotifArranger, rng: np.random.Generator
) -> list[_Plan]:
    """One for each structure; where tight junctions make rings, those whose rings stay open give way to the best."""
    plans = []
    for pairs, pairing in structures:
        pairs = pair_across_junctions(sequence, pairs)
        crossing = _crossing(sequence, pairs)
        ways = _closing_ways(len(sequence), pairs, crossing, arranger, rng) if crossing else []
        plans.append(_Plan(pairs, pairing, crossing, ways))
    most = max(len(plan.crossing) for plan in plans)
    gaps = [plan.mean_gap(most) for plan in plans]
    best = int(np.argmin(gaps))
    return [plans[best] if gap > gaps[best] + _WORSE else plan for plan, gap in zip(plans, gaps, strict=True)]


def _closing_ways(
    length: int, pairs: Pairs, crossing: list[Stem], arranger: MotifArranger, rng: np.random.Generator
) -> list[_Ways]:
    """Ways in which no other way of a single junction brings rings nearer to closing, the nearest first.

    A ring of two crossovers, two turns of a helix and a kiss closes by 0.8 Å if both junctions stack as they should;
    the other three ways leave 57 Å or more.
    """
    seed, left = int(rng.integers(2**32)), max(_TRIED_RESIDUES // length, 1)

    def tried(ways: dict[Stem, int] | None) -> _Ways:
        nonlocal left
        left -= 1
        arranger.start(np.random.default_rng(seed), temperature=0.0, ways=ways)
        gaps = gaps_of_rings(length, pairs, np.random.default_rng(seed), arranger=arranger, crossing=crossing)
        return _Ways(dict(arranger.ways), gaps)

    first = tried(None)
    junctions, found = list(first.stacked), [first]
    if not junctions or not first.gaps:
        return []
    for start in range(_STARTS):
        drawn = rng.integers(2, size=len(junctions)) if start > 1 else np.full(len(junctions), start)
        best, kept = tried(dict(zip(junctions, drawn.tolist(), strict=True))), 0
        while kept < len(junctions) and left > 0:  # until none was turned in a whole round
            junction = junctions[kept]
            other = tried(best.stacked | {junction: 1 - best.stacked[junction]})
            best, kept = (other, 0) if other.gap < best.gap - 1e-6 else (best, kept + 1)
        if best.stacked not in [other.stacked for other in found]:
            found.append(best)
    return sorted(found, key=lambda each: each.gap)


def _drawn(found: list[_Ways], rng: np.random.Generator | None) -> _Ways:
    """One of them, much likelier the nearer its rings are to closing; without a generator the first."""
    if not found:
        return _Ways()
    gap = np.array([each.gap for each in found])
    return found[int(np.argmax(rng.gumbel(size=len(gap)) - gap / _STRAIN if rng else -gap))]


def _crossing(sequence: str, pairs: Pairs) -> list[Stem]:
    """Helices between loops that have something to stack on."""
    helices = [Stem(*each) for each in crossing_helices(sequence, pairs)]
    stacked = {stack.crossing for stack in crossing_stacks(helices, find_stems(len(sequence), pairs))}
    return [helix for helix in helices if helix in stacked]


def choose_assemblies(
    assemblies: Sequence[Assembly], *, count: int, weights_F: np.ndarray | None = None
) -> tuple[list[int], np.ndarray]:
    """Take the assembly that promises most, then those that promise much and are unlike what is taken.

    Args:
        assemblies: of one sequence, at least one.
        count: how many to take; fewer if there are not so many.
        weights_F: of the features, as `fit_weights` gives them; None = fitted to 159 chains of the PDB.

    Returns:
        Places, the most promising first, and [M] the TM-score expected of every assembly, in [0, 1].
    """
    alike_MM = similarity([each.xyz_L3 for each in assemblies])
    weights_F = np.array(WEIGHTS) if weights_F is None else weights_F
    expected_M = np.clip(features(assemblies, alike_MM) @ weights_F, 0.0, 1.0)
    chosen = [int(np.argmax(expected_M))]
    while len(chosen) < min(count, len(assemblies)):
        worth_M = expected_M - _NOVELTY * alike_MM[:, chosen].max(axis=1)
        worth_M[chosen] = -np.inf
        chosen.append(int(np.argmax(worth_M)))
    return [chosen[m] for m in np.argsort(-expected_M[chosen], kind="stable")], expected_M


def features(assemblies: Sequence[Assembly], alike_MM: np.ndarray) -> np.ndarray:
    """[M, F] what the expected TM-score is computed from, in the order of `WEIGHTS`.

    What tells targets apart need not tell the assemblies of one target apart: of all that differs among these, the mean
    and the deviation from it have weights of their own.
    """
    length = len(assemblies[0].xyz_L3)
    pairing_M = np.array([each.pairing for each in assemblies])
    familiar_M = np.array([each.familiarity for each in assemblies])
    axes_M3 = np.array([np.linalg.eigvalsh(np.cov(each.xyz_L3.T, bias=True)) for each in assemblies])
    square_M = np.maximum(axes_M3.sum(axis=1), 1e-9)
    compact_M = np.minimum(np.sqrt(square_M) / (5.5 * length**0.33), 3.0)  # radius of gyration of folded RNA
    alike_M = alike_MM.mean(axis=1)
    own = [
        pairing_M,
        pairing_M**2,
        familiar_M,
        familiar_M * pairing_M,
        np.array([len(each.pairs) for each in assemblies]) / length,
        compact_M,
        compact_M**2,
        np.array([each.loops for each in assemblies]) / length,
        alike_M,
        alike_M * pairing_M,
        np.array([each.crossing for each in assemblies]) / length,
        np.sort(alike_MM, axis=1)[:, -_NEIGHBOURS - 1 :].mean(axis=1),
        axes_M3[:, -1] / square_M,  # 1 on a line, 1/3 in a ball
    ]
    own_MF = np.stack(own, axis=1)
    log_length = np.log(np.clip(length, *_LENGTHS))
    mean_MF = np.tile([1.0, log_length, log_length**2, *own_MF.mean(axis=0)], (len(assemblies), 1))
    return np.hstack([mean_MF, own_MF - own_MF.mean(axis=0)])


def fit_weights(features_NF: np.ndarray, tm_N: np.ndarray, owner_N: np.ndarray) -> np.ndarray:
    """Ridge regression of the TM-score, every target counting the same.

    Args:
        features_NF: [N, F] of the assemblies of all targets, as `features` gives them.
        tm_N: [N] TM-scores.
        owner_N: [N] number of the target that an assembly is of, from 0.

    Returns:
        [F] weights for `choose_assemblies`.
    """
    share_N = 1.0 / np.bincount(owner_N)[owner_N]
    mean_F = np.average(features_NF, axis=0, weights=share_N)
    mean_F[0] = 0.0  # the constant
    spread_F = np.sqrt(np.average((features_NF - mean_F) ** 2, axis=0, weights=share_N))
    spread_F = np.where(spread_F > 1e-9, spread_F, 1.0)
    scaled_NF = (features_NF - mean_F) / spread_F
    penalty_F = np.full(len(mean_F), PENALTY * share_N.sum())
    penalty_F[0] = 0.0
    weight_F = np.linalg.solve(
        (scaled_NF * share_N[:, None]).T @ scaled_NF + np.diag(penalty_F), scaled_NF.T @ (share_N * tm_N)
    )
    weight_F = weight_F / spread_F
    weight_F[0] -= weight_F @ mean_F
    return weight_F
