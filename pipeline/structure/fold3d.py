"""Candidates for the C1' trace of a sequence, from pairing probabilities and, if there is a network, its distances.

Without distances, nested structures are drawn from the pairing probabilities, assembled from A-form helices and the
loops of known structures, and those that promise most are kept (`pipeline.structure.denovo`). With
distances, such assemblies and a multidimensional scaling of the expected distances are the starts of a descent on the
network's own likelihood; the likeliest traces that differ from each other are kept.

Letters: M candidates, L length (nt), P pairs of residues, K distance bins or candidate pairs, Q restraints, 3 xyz.
"""

import math
from dataclasses import dataclass

import numpy as np

from pipeline.compiled import njit, prange
from pipeline.structure.assembly import trace_from_pairs
from pipeline.structure.choice import pair_probabilities
from pipeline.structure.denovo import Assembly, Pairs, assemble, choose_assemblies
from pipeline.structure.geometry import (
    LDDT_RADIUS,
    SHORTEST_STEP,
    double_helix,
    find_stems,
    handedness,
    rmsd,
    sum_over_pairs,
)
from pipeline.structure.motifs import MotifLibrary
from pipeline.structure.rigid import fit_helices, relax
from pipeline.structure.secondary import nested_pairs, probable_pairs, stacking_pairs, without_lone_pairs

#: Noise on the log-odds of a stem when a further structure is drawn, how much it grows where the draw is not new, and
#: how often. Mean best-of-5 TM-score over 182 chains: 0.286 with these, 0.275 with five times the likeliest structure.
_NOISE, _NOISE_GROWTH, _DRAWS = 2.0, 1.5, 4

#: With distances: candidates that stay assemblies, so that a weak network does no harm; of a sequence shorter than
#: `_SHORT` nt all but one, since TM-score's d0 is then finer (0.3 to 0.7 Å) than the bins (1.9 Å).
_ASSEMBLED, _SHORT = 2, 30
_STRUCTURES = 8, 12  # drawn where there are no distances: for long chains, and for short ones
_DRAWN_RESIDUES = 12_000  # nt in all of those
_ARRANGEMENTS = 4  # assemblies of each structure that the network judges
_ARRANGED_RESIDUES = 1_000  # nt in all of them; longer chains get fewer
_JITTER = 2.0  # Å on the scaled start

_DESCENT_STEPS = 300
_FIRST_MOVE, _LAST_MOVE = 1.0, 0.05  # Å a step
_PAIRS_A_STEP = 80_000  # of all P; more are taken in turns
_DISTANCE_WEIGHT = 10.0  # of the likelihood, per residue, against springs of 1 / Å^2
_LONGEST = 7.5  # Å between neighbours: 90 % of those in 182 chains of the PDB
_CLASH = 4.5  # Å: 0.02 contacts a residue are nearer in the same chains
_RAREST = 1e-4  # probability of a bin, so that no distance is forbidden

_DIFFERENT = 2.0  # Å RMSD by which a candidate differs from those before it, if enough do
_CONTRADICTED = 0.02  # a pair is dropped if the network gives less than this to distances near that of a pair
_AGREEING_BINS = 2  # bins on each side that count as agreeing: about 4 Å, lDDT's widest tolerance


def candidates_from_distogram(
    logits_LLK: np.ndarray | None,
    *,
    sequence: str,
    bpp_LL: np.ndarray | None,
    count: int = 5,
    seed: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Fold a sequence: several traces, the most trusted first.

    Args:
        logits_LLK: [L, L, K] a network's logits over the bins of `models.heads.distance_bins`; None = assemble from
            pairing alone.
        sequence: letters A, C, G, U.
        bpp_LL: [L, L] base-pair probabilities; None = stems by stacking energy.
        count: candidates, M.
        seed: of all that is drawn; equal seeds give equal candidates.

    Returns:
        [M, L, 3] float64, Å, each centred on the origin, and [M] float64 confidences in [0, 1]: without distances the
        expected TM-score, with distances the expected share of near pairs whose distance is right within about 4 Å.

    Raises:
        ValueError: an array does not fit the sequence, or holds a value that is not finite.
    """
    length = len(sequence)
    _check(logits_LLK, bpp_LL, length)
    rng = np.random.default_rng(seed)
    likely = stacking_pairs(sequence) if bpp_LL is None else probable_pairs(bpp_LL)
    distances = None if logits_LLK is None or length < 4 else _Distances.of(logits_LLK)
    if distances:
        likely = distances.without_contradicted(*likely)
    if distances is None:
        found = assemble_drawn(sequence, likely, count=count, library=None, rng=rng)
        chosen, expected_M = choose_assemblies(found, count=count)
        xyz_ML3, confidence_M = np.stack([found[m].xyz_L3 for m in chosen]), expected_M[chosen]
    else:
        structures = draw_structures(length, *likely, count=count, rng=rng)
        pool = _assemblies(distances, structures, rng)
        assembled = _choose(pool, min(_ASSEMBLED if length >= _SHORT else count, count - 1))
        refined = _choose(_refined(distances, structures, pool, rng), count - len(assembled))
        xyz_ML3 = np.stack([trace.xyz_L3 for trace in assembled + refined])
        confidence_M = np.array([distances.agreement(xyz_L3) for xyz_L3 in xyz_ML3])
    order = np.argsort(-confidence_M, kind="stable")
    return xyz_ML3[order], confidence_M[order]


def assemble_drawn(
    sequence: str,
    likely: tuple[np.ndarray, np.ndarray, np.ndarray],
    *,
    count: int,
    library: MotifLibrary | None,
    rng: np.random.Generator,
) -> list[Assembly]:
    """Assemblies of structures drawn from pairing probabilities.

    Args:
        sequence: letters A, C, G, U.
        likely: candidate pairs: first residues, second residues, probabilities, each [K].
        count: assemblies at least.
        library: loops of known structures that may be used.
        rng: source of structures and arrangements.
    """
    drawn = int(np.clip(_DRAWN_RESIDUES // len(sequence), *_STRUCTURES))
    structures = draw_structures(len(sequence), *likely, count=max(count, drawn), rng=rng)
    weighed = [(pairs, _pairing_confidence(len(sequence), pairs, *likely)) for pairs in structures]
    return assemble(sequence, weighed, library=library, rng=rng)


def _check(logits_LLK: np.ndarray | None, bpp_LL: np.ndarray | None, length: int) -> None:
    if length < 1:
        raise ValueError("candidates_from_distogram: empty sequence; expected at least one letter")
    for name, array in (("logits_LLK", logits_LLK), ("bpp_LL", bpp_LL)):
        if array is None:
            continue
        if array.shape[:2] != (length, length) or array.ndim != (3 if name == "logits_LLK" else 2):
            raise ValueError(f"candidates_from_distogram: {name} is {array.shape}; expected L = {length}")
        if not np.isfinite(array).all():
            raise ValueError(f"candidates_from_distogram: {name} holds a value that is not finite")


def draw_structures(
    length: int, i_K: np.ndarray, j_K: np.ndarray, probability_K: np.ndarray, *, count: int, rng: np.random.Generator
) -> list[Pairs]:
    """The most accurate nested structure and others that noise on the stems' log-odds gives, as different as possible.

    Args:
        length: nt.
        i_K: [K] first residues of candidate pairs.
        j_K: [K] second residues.
        probability_K: [K] in [0, 1].
        count: structures wanted.
        rng: source of the noise.

    Returns:
        `count` lists of 0-based pairs.
    """
    clipped_K = np.clip(probability_K, 1e-6, 1 - 1e-6)
    odds_K = np.log(clipped_K / (1 - clipped_K))
    found = [without_lone_pairs(nested_pairs(length, i_K, j_K, probability_K))]
    while len(found) < count:
        noise = _NOISE
        for _ in range(_DRAWS):
            shift_K = rng.standard_normal(2 * length)[i_K + j_K]  # pairs of one stem share i + j
            shifted_K = 1 / (1 + np.exp(-(odds_K + noise * shift_K)))
            pairs = without_lone_pairs(nested_pairs(length, i_K, j_K, shifted_K))
            if pairs not in found:
                break
            noise *= _NOISE_GROWTH
        found.append(pairs)
    return found


def _pairing_confidence(
    length: int, pairs: Pairs, i_K: np.ndarray, j_K: np.ndarray, probability_K: np.ndarray
) -> float:
    """Expected share of residues whose partner, or lack of one, is right."""
    paired_L = sum_over_pairs(i_K, j_K, probability_K, length)
    right_L = np.clip(1.0 - paired_L, 0.0, 1.0)
    known = dict(zip(zip(i_K.tolist(), j_K.tolist(), strict=True), probability_K.tolist(), strict=True))
    for pair in pairs:
        right_L[list(pair)] = known.get(pair, 0.0)
    return float(right_L.mean())


@dataclass(frozen=True)
class _Distances:
    """What a network says of the distances of all pairs ``i < j``, row by row of the upper triangle."""

    length: int
    i_P: np.ndarray
    j_P: np.ndarray
    probability_PK: np.ndarray  # float32
    energy_PK: np.ndarray  # float32: minus its logarithm
    centres_K: np.ndarray  # Å, evenly spaced

    @staticmethod
    def of(logits_LLK: np.ndarray) -> "_Distances":
        from models.heads import distance_bins  # imports torch, which folding from pairing alone does not need

        i_P, j_P, probability_PK = pair_probabilities(logits_LLK)
        energy_PK = -np.log(np.maximum(probability_PK, _RAREST))
        centres_K = np.array(distance_bins(logits_LLK.shape[2]).centres)
        return _Distances(len(logits_LLK), i_P, j_P, probability_PK, energy_PK, centres_K)

    @property
    def bin_width(self) -> float:
        return float(self.centres_K[1] - self.centres_K[0])

    def place(self, i: np.ndarray, j: np.ndarray) -> np.ndarray:
        """Row of a pair ``i < j``."""
        return i * self.length - i * (i + 1) // 2 + j - i - 1

    def without_contradicted(
        self, i_K: np.ndarray, j_K: np.ndarray, probability_K: np.ndarray
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Candidate pairs to whose distance the network gives some probability."""
        near_K = np.abs(self.centres_K - np.linalg.norm(np.subtract(*double_helix(1)))) < 1.5 * self.bin_width
        kept = self.probability_PK[self.place(i_K, j_K)][:, near_K].sum(axis=1) >= _CONTRADICTED
        return i_K[kept], j_K[kept], probability_K[kept]

    def scaled(self) -> np.ndarray:
        """[L, 3] Å: classical multidimensional scaling of the expected distances; which mirror image is chance."""
        square_LL = np.zeros((self.length, self.length))
        square_LL[self.i_P, self.j_P] = (self.probability_PK @ np.maximum(self.centres_K, 4.0)) ** 2
        square_LL += square_LL.T
        square_LL -= square_LL.mean(axis=0)
        square_LL -= square_LL.mean(axis=1, keepdims=True)
        value_L, vector_LL = np.linalg.eigh(-square_LL / 2)
        return vector_LL[:, -3:] * np.sqrt(np.maximum(value_L[-3:], 1.0))

    def nll(self, xyz_L3: np.ndarray) -> float:
        """Mean negative log-likelihood of a trace's distances."""
        distance_P = np.linalg.norm(xyz_L3[self.i_P] - xyz_L3[self.j_P], axis=1)
        bin_P = np.rint((distance_P - self.centres_K[0]) / self.bin_width).astype(np.int64)
        bin_P = np.clip(bin_P, 0, len(self.centres_K) - 1)
        return float(self.energy_PK[np.arange(len(bin_P)), bin_P].mean())

    def agreement(self, xyz_L3: np.ndarray) -> float:
        """Expected share of pairs, of those nearer than 30 Å and no neighbours, within about 4 Å of the truth."""
        distance_P = np.linalg.norm(xyz_L3[self.i_P] - xyz_L3[self.j_P], axis=1)
        counted = np.flatnonzero((distance_P < LDDT_RADIUS) & (self.j_P - self.i_P > 2))
        if not counted.size:
            return 0.0
        bin_P = np.rint((distance_P[counted] - self.centres_K[0]) / self.bin_width).astype(np.int64)
        mass_PK = np.zeros((len(counted), len(self.centres_K) + 1))
        np.cumsum(self.probability_PK[counted], axis=1, out=mass_PK[:, 1:])
        top = len(self.centres_K)
        low_P, high_P = np.clip([bin_P - _AGREEING_BINS, bin_P + _AGREEING_BINS + 1], 0, top)
        rows = np.arange(len(counted))
        return float(np.clip(np.mean(mass_PK[rows, high_P] - mass_PK[rows, low_P]), 0.0, 1.0))


@dataclass(frozen=True)
class _Trace:
    """A possible candidate."""

    xyz_L3: np.ndarray  # Å
    pairs: Pairs
    nll: float  # mean negative log-likelihood of its distances


def _assemblies(distances: _Distances, structures: list[Pairs], rng: np.random.Generator) -> list[_Trace]:
    """Several arrangements of helices for each structure; fewer for long chains."""
    found = []
    for pairs in structures * max(1, min(_ARRANGEMENTS, _ARRANGED_RESIDUES // distances.length)):
        xyz_L3 = trace_from_pairs(distances.length, pairs, rng)
        found.append(_Trace(xyz_L3, pairs, distances.nll(xyz_L3)))
    return found


def _refined(
    distances: _Distances, structures: list[Pairs], pool: list[_Trace], rng: np.random.Generator
) -> list[_Trace]:
    """Descents from the likeliest assemblies and from as many scalings of the expected distances."""
    scaled_L3 = distances.scaled()
    starts = [(trace.xyz_L3, trace.pairs) for trace in _choose(pool, len(structures))]
    for number, pairs in enumerate(structures):
        jitter_L3 = (_JITTER if number else 0.0) * rng.standard_normal(scaled_L3.shape)
        starts.append((_right_handed(scaled_L3 + jitter_L3, pairs), pairs))
    found = []
    for xyz_L3, (_, pairs) in zip(_descend(distances, starts), starts, strict=True):
        helices = [stem.residues for stem in find_stems(distances.length, pairs)]
        xyz_L3 = relax(xyz_L3, helices, longest=_LONGEST, clash=_CLASH, rounds=100)
        found.append(_Trace(xyz_L3, pairs, distances.nll(xyz_L3)))
    return found


def _right_handed(xyz_L3: np.ndarray, pairs: Pairs) -> np.ndarray:
    """Of a trace and its mirror image, the one that right-handed helices fit, with the helices put in."""
    stems = find_stems(len(xyz_L3), pairs)
    images = [xyz_L3 - xyz_L3.mean(axis=0), -(xyz_L3 - xyz_L3.mean(axis=0))]
    if not stems:
        return max(images, key=lambda image: float(np.nanmean(np.append(handedness(image), 0.0))))
    fitted = [fit_helices(image, stems) for image in images]
    return min(fitted, key=lambda fit: fit[1])[0]


def _descend(distances: _Distances, starts: list[tuple[np.ndarray, Pairs]]) -> np.ndarray:
    """[M, L, 3] Å: every start after the descent on the likelihood."""
    springs = [_helix_springs(distances.length, pairs) for _, pairs in starts]
    return _descend_all(
        np.stack([xyz_L3 for xyz_L3, _ in starts]),
        distances.energy_PK,
        float(distances.centres_K[0]),
        distances.bin_width,
        np.concatenate(springs),
        np.cumsum([0, *(len(part) for part in springs)]),
    )


def _helix_springs(length: int, pairs: Pairs) -> np.ndarray:
    """[Q, 3] (first residue, second residue, distance in Å) of residues up to six steps apart in one helix."""
    rows = [np.zeros((0, 3))]
    for residue_P in (stem.residues for stem in find_stems(length, pairs)):
        size = len(residue_P) // 2
        shape_P3, step_P = double_helix(size).reshape(-1, 3), np.tile(np.arange(size), 2)
        a, b = np.triu_indices(2 * size, 1)
        near = np.abs(step_P[a] - step_P[b]) <= 6
        a, b = a[near], b[near]
        distance = np.linalg.norm(shape_P3[a] - shape_P3[b], axis=1)
        rows.append(np.stack([residue_P[a], residue_P[b], distance], axis=1))
    return np.concatenate(rows)


@njit(cache=True, parallel=True)
def _descend_all(
    starts_ML3: np.ndarray,
    nll_PK: np.ndarray,
    first_centre: float,
    bin_width: float,
    springs_Q3: np.ndarray,
    offsets: np.ndarray,
) -> np.ndarray:
    """Adam on every start by itself: likelihood, helix springs, chain and clashes."""
    final_ML3 = starts_ML3.copy()
    for m in prange(len(starts_ML3)):
        springs = springs_Q3[offsets[m] : offsets[m + 1]]
        xyz = final_ML3[m]
        mean, square, force = np.zeros_like(xyz), np.zeros_like(xyz), np.zeros_like(xyz)
        turns = max(1, len(nll_PK) // _PAIRS_A_STEP)
        for step in range(_DESCENT_STEPS):
            force[:] = 0.0
            _pair_forces(xyz, nll_PK, first_centre, bin_width, force, step % turns, turns)
            _spring_forces(xyz, springs, force)
            done = (step + 1) / _DESCENT_STEPS
            rate = _LAST_MOVE + 0.5 * (_FIRST_MOVE - _LAST_MOVE) * (1.0 + math.cos(math.pi * done))
            for i in range(len(xyz)):
                for a in range(3):
                    mean[i, a] = 0.9 * mean[i, a] + 0.1 * force[i, a]
                    square[i, a] = 0.98 * square[i, a] + 0.02 * force[i, a] ** 2
                    size = math.sqrt(square[i, a] / (1.0 - 0.98 ** (step + 1))) + 1e-6
                    xyz[i, a] += rate * mean[i, a] / (1.0 - 0.9 ** (step + 1)) / size
    return final_ML3


@njit(cache=True, error_model="numpy")
def _pair_forces(
    xyz: np.ndarray,
    nll_PK: np.ndarray,
    first_centre: float,
    bin_width: float,
    force: np.ndarray,
    turn: int,
    turns: int,
) -> None:
    """Add the forces of the likelihood, which is linear between bin centres, of the chain and of clashes.

    Every `turns`-th pair is visited and counts so many times.
    """
    length, last = len(xyz), nll_PK.shape[1] - 1
    scale = turns * _DISTANCE_WEIGHT / length
    for i in range(length):
        row = i * length - i * (i + 1) // 2 - i - 1
        start = i + 1 + (turn - (row + i + 1)) % turns
        for j in range(start, length, turns):
            x, y, z = xyz[j, 0] - xyz[i, 0], xyz[j, 1] - xyz[i, 1], xyz[j, 2] - xyz[i, 2]
            distance = math.sqrt(x * x + y * y + z * z) + 1e-6
            place = (distance - first_centre) / bin_width
            push = 0.0
            if 0.0 < place < last:
                k = int(place)
                push = -scale * (nll_PK[row + j, k + 1] - nll_PK[row + j, k]) / bin_width
            if j - i == 1:
                push += 4.0 * turns * (max(SHORTEST_STEP - distance, 0.0) - max(distance - _LONGEST, 0.0))
            elif distance < _CLASH:
                push += 2.0 * turns * (_CLASH - distance)
            push /= distance
            force[i, 0] -= push * x
            force[i, 1] -= push * y
            force[i, 2] -= push * z
            force[j, 0] += push * x
            force[j, 1] += push * y
            force[j, 2] += push * z


@njit(cache=True, error_model="numpy")
def _spring_forces(xyz: np.ndarray, springs: np.ndarray, force: np.ndarray) -> None:
    for q in range(len(springs)):
        i, j = int(springs[q, 0]), int(springs[q, 1])
        x, y, z = xyz[j, 0] - xyz[i, 0], xyz[j, 1] - xyz[i, 1], xyz[j, 2] - xyz[i, 2]
        distance = math.sqrt(x * x + y * y + z * z) + 1e-6
        push = (springs[q, 2] - distance) / distance
        force[i, 0] -= push * x
        force[i, 1] -= push * y
        force[i, 2] -= push * z
        force[j, 0] += push * x
        force[j, 1] += push * y
        force[j, 2] += push * z


def _choose(pool: list[_Trace], count: int) -> list[_Trace]:
    """The likeliest traces, each different from those before it as long as there are such."""
    chosen: list[_Trace] = []
    spare: list[_Trace] = []
    for trace in sorted(pool, key=lambda trace: trace.nll):
        new = all(rmsd(trace.xyz_L3, other.xyz_L3) > _DIFFERENT for other in chosen)
        (chosen if new and len(chosen) < count else spare).append(trace)
    return chosen + spare[: count - len(chosen)]
