"""Candidates from pairing alone: many assemblies of drawn structures, ranked by the TM-score that they promise.

What was tried and left out, over 182 chains of the PDB: a potential of C1' distances by separation, learned from known
structures against assemblies, moved the best of five by 0.001; drawing the strands of pseudoknots together lowered it,
with the true pairs even, from 0.288 to 0.278 on the 33 chains of at least 30 nt that have one. Helices between loops
that stack on what follows them raised the best of all assemblies, on the 6 chains that have a stable one, from 0.336 to
0.347; with less stable ones too (-6 kcal/mol, two hairpins of any kind) it fell, on 33 chains, from 0.327 to 0.307.

Letters: M assemblies, L length (nt), F features, 3 xyz; lengths in Å.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from pipeline.structure.assembly import trace_from_pairs
from pipeline.structure.geometry import Stem, find_stems, similarity
from pipeline.structure.motifs import MotifArranger, MotifLibrary
from pipeline.structure.rings import crossing_stacks
from pipeline.structure.secondary import crossing_helices

Pairs = list[tuple[int, int]]

_ARRANGEMENTS = 5  # assemblies of each structure, the last by the general rules alone if no loops pair
_ASSEMBLED_RESIDUES = 24_000  # nt in all assemblies together: longer chains get fewer
_TEMPERATURE = 0.7  # of the loops drawn, but for the first assembly of each structure
_NOVELTY = 0.3  # of TM-score that a candidate loses against another one for being a copy of those already taken
_PENALTY = 1e-3  # of the ridge regression, per target
_LENGTHS = (15, 400)  # nt: lengths beyond those of the chains that the weights were fitted to count as these
#: What each feature of an assembly adds to its expected TM-score: ridge regression over 40 assemblies of each of 159
#: chains of the PDB, whose loops came from other clusters of sequences.
WEIGHTS = (
    *(-0.2676, -0.05952, 0.1346, -0.06301, 0.2336, 0.0771, 0.07353),
    *(-0.05535, 0.223, -0.02652, -1.053, 0.4111, -0.39, -0.2807),
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
    crossing = [_crossing(sequence, pairs) for pairs, _ in structures]
    found = []
    for turn in range(turns):
        for (pairs, pairing), between in zip(structures, crossing, strict=True):
            arranger.start(rng, temperature=_TEMPERATURE if turn else 0.0)
            plain = turn == _ARRANGEMENTS - 1 and not between
            arranged = None if plain else arranger
            xyz_L3 = trace_from_pairs(len(sequence), pairs, rng, arranger=arranged, crossing=between)
            known = 0.0 if plain or not arranger.costs else float(np.exp(-np.mean(arranger.costs) / 2))
            crossed = sum(stem.pairs for stem in between)
            found.append(Assembly(xyz_L3, pairs, pairing, known, len(arranger.costs), crossed))
    return found


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
    """[M, F] what the expected TM-score is computed from, in the order of `WEIGHTS`."""
    length = len(assemblies[0].xyz_L3)
    spread_M = np.array([np.sqrt(np.mean(np.sum((a.xyz_L3 - a.xyz_L3.mean(axis=0)) ** 2, axis=1))) for a in assemblies])
    pairing_M = np.array([each.pairing for each in assemblies])
    familiar_M = np.array([each.familiarity for each in assemblies])
    log_length_M = np.full(len(assemblies), np.log(np.clip(length, *_LENGTHS)))
    compact_M = np.minimum(spread_M / (5.5 * length**0.33), 3.0)  # radius of gyration of folded RNA
    alike_M = alike_MM.mean(axis=1)
    columns = [
        np.ones(len(assemblies)),
        pairing_M,
        pairing_M**2,
        familiar_M,
        familiar_M * pairing_M,
        np.array([len(each.pairs) for each in assemblies]) / length,
        compact_M,
        compact_M**2,
        log_length_M,
        log_length_M**2,
        np.array([each.loops for each in assemblies]) / length,
        alike_M,
        alike_M * pairing_M,
        np.array([each.crossing for each in assemblies]) / length,
    ]
    return np.stack(columns, axis=1)


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
    penalty_F = np.full(len(mean_F), _PENALTY * share_N.sum())
    penalty_F[0] = 0.0
    weight_F = np.linalg.solve(
        (scaled_NF * share_N[:, None]).T @ scaled_NF + np.diag(penalty_F), scaled_NF.T @ (share_N * tm_N)
    )
    weight_F = weight_F / spread_F
    weight_F[0] -= weight_F @ mean_F
    return weight_F
