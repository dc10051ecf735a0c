"""Which traces of a pool are kept, by how right a network's distances say that they are.

Letters: N traces of the pool, M kept ones, L length (nt), P pairs of residues, K distance bins, 3 xyz; lengths in Å.
"""

import numpy as np

from pipeline.structure.geometry import LDDT_RADIUS, LDDT_TOLERANCES, similarity, sum_over_pairs

_COPY = 0.8  # likeness: 1 Å in chains of up to 60 nt, 1.7 Å at 100 nt


def pair_probabilities(logits_LLK: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """First and second residues, ``i < j``, row by row of the upper triangle, and [P, K] float32 of their distance.

    Args:
        logits_LLK: [L, L, K] over the bins; the mean of both orders of a pair counts.
    """
    i_P, j_P = np.triu_indices(len(logits_LLK), 1)
    probability_PK = ((logits_LLK[i_P, j_P] + logits_LLK[j_P, i_P]) / 2).astype(np.float32)
    probability_PK -= probability_PK.max(axis=1, keepdims=True)
    np.exp(probability_PK, out=probability_PK)
    probability_PK /= probability_PK.sum(axis=1, keepdims=True)
    return i_P, j_P, probability_PK


def expected_lddt(logits_LLK: np.ndarray, xyz_NL3: np.ndarray) -> np.ndarray:
    """LDDT that a distribution of distances expects of each trace, whoever made it.

    Of 73 held-out chains and two networks that were trained on 145 others, it correlates with the lDDT: by 0.60 to 0.76
    over traces made of helices, by 0.74 to 0.90 over the networks' own coordinates.

    Args:
        logits_LLK: [L, L, K] over the bins of `models.heads.distance_bins`; within a bin all distances are equal.
        xyz_NL3: [N, L, 3] Å.

    Returns:
        [N] float64 in [0, 1]; 0 for a single residue.
    """
    from models.heads import distance_bins  # imports torch, which structures without a network do not need

    length, bins = logits_LLK.shape[0], logits_LLK.shape[2]
    i_P, j_P, probability_PK = pair_probabilities(logits_LLK)
    below_PK = np.zeros((len(i_P), bins + 1), dtype=np.float32)
    np.cumsum(probability_PK, axis=1, out=below_PK[:, 1:])
    edges = distance_bins(bins).edges
    width = edges[1] - edges[0]

    def chance_below(distance_P: np.ndarray) -> np.ndarray:
        place_P = np.clip((np.minimum(distance_P, LDDT_RADIUS) - edges[0]) / width + 1, 0, bins)
        bin_P = np.minimum(place_P.astype(np.int64), bins - 1)[:, None]
        low_P, high_P = (np.take_along_axis(below_PK, bin_P + k, axis=1)[:, 0] for k in (0, 1))
        return low_P + (place_P - bin_P[:, 0]) * (high_P - low_P)

    def share(xyz_L3: np.ndarray) -> float:
        distance_P = np.linalg.norm(xyz_L3[i_P] - xyz_L3[j_P], axis=1)
        kept = [chance_below(distance_P + near) - chance_below(distance_P - near) for near in LDDT_TOLERANCES]
        kept_L, counted_L = (sum_over_pairs(i_P, j_P, of_P, length) for of_P in (np.mean(kept, axis=0), near_P))
        return float(np.mean(kept_L / np.maximum(counted_L, 1e-9)))

    near_P = chance_below(np.full(len(i_P), LDDT_RADIUS))
    return np.array([share(xyz_L3) for xyz_L3 in xyz_NL3])


def most_trusted(xyz_NL3: np.ndarray, confidence_N: np.ndarray, *, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The most trusted traces, none of them a copy of another as long as there are enough; the most trusted first.

    Args:
        xyz_NL3: [N, L, 3] Å, N >= `count`.
        confidence_N: [N].
        count: M.

    Returns:
        [M, L, 3] Å and [M].
    """
    alike_NN = similarity(list(xyz_NL3))
    chosen: list[int] = []
    spare: list[int] = []
    for n in np.argsort(-confidence_N, kind="stable").tolist():
        is_new = len(chosen) < count and (alike_NN[n, chosen] < _COPY).all()
        (chosen if is_new else spare).append(n)
    kept = sorted(chosen + spare[: count - len(chosen)], key=lambda n: -confidence_N[n])
    return xyz_NL3[kept], confidence_N[kept]
