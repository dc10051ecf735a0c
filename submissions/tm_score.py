"""TM-score of C1' traces whose residues are matched by number, as US-align's ``-TMscore 1`` gives it. Lengths in Å.

The score is the largest over all superpositions of ``1/Lref * sum 1 / (1 + (d_i / d0)^2)``. It is searched from every
fragment of L, L/2, L/4 … 4 residues: superpose the fragment, collect the residues that come near, superpose those, and
so on until the set stays the same. Which set follows is a function of the set before alone, so a set that was met
already is not followed twice: same result, a fraction of the work.

Letters: L residues, M candidates, R references, N pairs of traces, T residues of all pairs together, 3 xyz.

Source:
    Zhang and Skolnick 2004, Proteins 57:702; RNA: Gong et al. 2019, Bioinformatics 35:4459; search: TMscore8_search of
    US-align (Zhang et al. 2022, Nat. Methods 19:1109).
"""

import math
from collections.abc import Sequence

import numpy as np

from pipeline.compiled import njit, prange

#: d0 below 30 residues: (longest length, d0 in Å). Source: US-align, parameter_set4final_C3prime.
_D0_SHORT = ((11, 0.3), (15, 0.4), (19, 0.5), (23, 0.6), (29, 0.7))
#: What `evaluate` and reports call this code.
ENGINE = "built-in residue-matched search"

_MIN_RESOLVED = 3  # with fewer residues in common the score is 0, as in the competition
_SHORTEST_SEED = 4  # residues; US-align: L_ini_min
_SEED_LENGTHS = 6  # US-align: n_init_max
_ITERATIONS = 20  # US-align: n_it
_NEAR, _FAR = 4.5, 8.0  # Å: d0 is clipped to these for collecting residues; US-align: d0_search


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


def tm_score(predicted_L3: np.ndarray, reference_L3: np.ndarray) -> float:
    """TM-score of one trace, normalised by the reference's resolved residues.

    Args:
        predicted_L3: [L, 3] Å; NaN where missing.
        reference_L3: [L, 3] Å, same residues; NaN where not resolved.

    Returns:
        Score in [0, 1]; 0 if fewer than three residues are in common.

    Raises:
        ValueError: the shapes differ or are not [L, 3].

    >>> line = np.arange(60.0)[:, None] * np.array([3.0, 1.0, 0.5])
    >>> round(tm_score(line + 7.0, line), 6)
    1.0
    """
    return float(tm_scores([(predicted_L3, reference_L3)])[0])


def tm_scores(pairs: Sequence[tuple[np.ndarray, np.ndarray]]) -> np.ndarray:
    """TM-scores of many pairs of traces, of any lengths, in parallel.

    Args:
        pairs: (predicted [L, 3], reference [L, 3]) Å, as in `tm_score`.

    Returns:
        [N] float64 in [0, 1].

    Raises:
        ValueError: the shapes of a pair differ or are not [L, 3].
    """
    mobile, fixed, lengths, scales = [], [], [], []
    for predicted_L3, reference_L3 in pairs:
        if predicted_L3.shape != reference_L3.shape or predicted_L3.ndim != 2 or predicted_L3.shape[1] != 3:
            raise ValueError(f"tm_score: got {predicted_L3.shape} and {reference_L3.shape}; expected [L, 3] twice")
        resolved_L = np.isfinite(reference_L3).all(axis=1)
        common_L = resolved_L & np.isfinite(predicted_L3).all(axis=1)
        mobile.append(_centred(predicted_L3[common_L]))
        fixed.append(_centred(reference_L3[common_L]))
        lengths.append(int(resolved_L.sum()))
        scales.append(d0_rna(max(lengths[-1], 1)))
    if not pairs:
        return np.zeros(0)
    offsets = np.concatenate([[0], np.cumsum([part.shape[1] for part in mobile])]).astype(np.int64)
    order = np.argsort(np.diff(offsets), kind="stable")[::-1].astype(np.int64)  # long ones first: threads end together
    mobile_3T, fixed_3T = np.concatenate(mobile, axis=1), np.concatenate(fixed, axis=1)
    return _search_all(mobile_3T, fixed_3T, offsets, np.array(lengths), np.array(scales), order)


def tm_matrix(candidates_ML3: np.ndarray, references_RL3: np.ndarray) -> np.ndarray:
    """TM-scores of every candidate against every reference of one target.

    Args:
        candidates_ML3: [M, L, 3] Å.
        references_RL3: [R, L, 3] Å.

    Returns:
        [M, R] float64 in [0, 1].
    """
    pairs = [(candidate, reference) for candidate in candidates_ML3 for reference in references_RL3]
    return tm_scores(pairs).reshape(len(candidates_ML3), len(references_RL3))


def best_tm(candidates_ML3: np.ndarray, references_RL3: np.ndarray) -> tuple[float, int]:
    """The competition's score of a target: the best candidate against the reference that suits it best.

    Args:
        candidates_ML3: [M, L, 3] Å.
        references_RL3: [R, L, 3] Å.

    Returns:
        The score, and the 0-based candidate that reached it (the first of equals).
    """
    best_M = tm_matrix(candidates_ML3, references_RL3).max(axis=1)
    return float(best_M.max()), int(best_M.argmax())


def _centred(xyz_L3: np.ndarray) -> np.ndarray:
    """[3, L] float64 about the centre: sums of squares lose fewer digits, and columns are read with SIMD."""
    xyz_L3 = xyz_L3.astype(np.float64)
    return np.ascontiguousarray((xyz_L3 - xyz_L3.mean(axis=0)).T) if len(xyz_L3) else np.zeros((3, 0))


@njit(cache=True, parallel=True)
def _search_all(
    mobile_3T: np.ndarray,
    fixed_3T: np.ndarray,
    offsets: np.ndarray,
    lengths: np.ndarray,
    scales: np.ndarray,
    order: np.ndarray,
) -> np.ndarray:
    """[N] best scores; each pair is searched by one thread, so the result does not depend on their number."""
    scores = np.zeros(len(lengths))
    for slot in prange(len(order)):
        pair = order[slot]
        start, end = offsets[pair], offsets[pair + 1]
        if end - start >= _MIN_RESOLVED:
            mobile, fixed = mobile_3T[:, start:end].copy(), fixed_3T[:, start:end].copy()
            scores[pair] = _search(mobile, fixed, scales[pair]) / lengths[pair]
    return scores


@njit(cache=True, error_model="numpy")
def _search(mobile: np.ndarray, fixed: np.ndarray, d0: float) -> float:
    """Largest sum of 1 / (1 + (d / d0)^2) over the superpositions that the seeds lead to."""
    count = mobile.shape[1]
    near = min(max(d0, _NEAR), _FAR)
    keys, seen = _set_keys(count), np.zeros(_table_size(count), dtype=np.uint64)
    prefix = _prefix_sums(mobile, fixed)
    sums, motion = np.zeros(17), np.zeros(12)
    best, filled, length = 0.0, 0, count
    for level in range(_SEED_LENGTHS):
        length = count >> level
        if level == _SEED_LENGTHS - 1 or length < _SHORTEST_SEED:
            length = min(_SHORTEST_SEED, count)
        for start in range(count - length + 1):
            sums[:] = prefix[start + length] - prefix[start]
            cutoff = near - 1.0
            for _ in range(_ITERATIONS + 1):
                _best_motion(sums, motion)
                score, name = _collect(mobile, fixed, motion, d0, cutoff, keys, sums)
                cutoff = near + 1.0
                best = max(best, score)
                new = _remember(seen, name)
                if not new:
                    break
                filled += 1
                if 2 * filled > len(seen):  # a crowded table gets slow; forgetting costs time, not exactness
                    seen[:] = 0
                    filled = 0
        if length <= _SHORTEST_SEED:
            break
    return best


@njit(cache=True, error_model="numpy")
def _prefix_sums(mobile: np.ndarray, fixed: np.ndarray) -> np.ndarray:
    """[L + 1, 17] running sums of what `_best_motion` needs; a fragment's sums are one difference."""
    prefix = np.zeros((mobile.shape[1] + 1, 17))
    for i in range(mobile.shape[1]):
        prefix[i + 1] = prefix[i]
        prefix[i + 1, 0] += 1.0
        for a in range(3):
            prefix[i + 1, 1 + a] += mobile[a, i]
            prefix[i + 1, 4 + a] += fixed[a, i]
            prefix[i + 1, 16] += mobile[a, i] ** 2 + fixed[a, i] ** 2
            for b in range(3):
                prefix[i + 1, 7 + 3 * a + b] += mobile[a, i] * fixed[b, i]
    return prefix


@njit(cache=True, error_model="numpy")
def _set_keys(count: int) -> np.ndarray:
    """A random 63-bit number a residue: their sum names a set of residues. Source: splitmix64."""
    keys = np.empty(count, dtype=np.int64)
    state = np.uint64(0)
    for i in range(count):
        state += np.uint64(0x9E3779B97F4A7C15)
        mixed = (state ^ (state >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
        mixed = (mixed ^ (mixed >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
        keys[i] = np.int64((mixed ^ (mixed >> np.uint64(31))) >> np.uint64(1))
    return keys


@njit(cache=True, error_model="numpy")
def _table_size(count: int) -> int:
    size = 256
    while size < 16 * count:
        size *= 2
    return size


@njit(cache=True, error_model="numpy")
def _remember(seen: np.ndarray, name: np.uint64) -> bool:
    """Put a set's name into the table; False if it was there."""
    name |= np.uint64(1)  # 0 marks an empty place
    mask = np.uint64(len(seen) - 1)
    place = (name >> np.uint64(20)) & mask
    while seen[place] != 0:
        if seen[place] == name:
            return False
        place = (place + np.uint64(1)) & mask
    seen[place] = name
    return True


@njit(cache=True, error_model="numpy")
def _collect(
    mobile: np.ndarray,
    fixed: np.ndarray,
    motion: np.ndarray,
    d0: float,
    cutoff: float,
    keys: np.ndarray,
    sums: np.ndarray,
) -> tuple[float, np.uint64]:
    """Score of a motion, name of the set of residues within the cut-off, and that set's sums (written to `sums`).

    The cut-off grows by half an Å until three residues are within, as US-align's does.
    """
    score, name = _collect_once(mobile, fixed, motion, 1.0 / (d0 * d0), cutoff * cutoff, keys, sums)
    while sums[0] < 3.0:
        cutoff += 0.5
        score, name = _collect_once(mobile, fixed, motion, 1.0 / (d0 * d0), cutoff * cutoff, keys, sums)
    return score, np.uint64(name)


@njit(cache=True, fastmath=True, error_model="numpy")
def _collect_once(
    mobile: np.ndarray,
    fixed: np.ndarray,
    motion: np.ndarray,
    inverse: float,
    limit: float,
    keys: np.ndarray,
    sums: np.ndarray,
) -> tuple[float, int]:
    """One pass without branches, so that the compiler uses SIMD for all of its sums."""
    r00, r01, r02, r10, r11, r12 = motion[0], motion[1], motion[2], motion[3], motion[4], motion[5]
    r20, r21, r22, t0, t1, t2 = motion[6], motion[7], motion[8], motion[9], motion[10], motion[11]
    score, name, n, sx, sy, sz, ux, uy, uz = 0.0, 0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    xx, xy, xz, yx, yy, yz, zx, zy, zz, square = 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0
    for i in range(mobile.shape[1]):
        x, y, z, u, v, w = mobile[0, i], mobile[1, i], mobile[2, i], fixed[0, i], fixed[1, i], fixed[2, i]
        a = r00 * x + r01 * y + r02 * z + t0 - u
        b = r10 * x + r11 * y + r12 * z + t1 - v
        c = r20 * x + r21 * y + r22 * z + t2 - w
        distance = a * a + b * b + c * c
        score += 1.0 / (1.0 + distance * inverse)
        inside = 1.0 if distance < limit else 0.0
        name += keys[i] if distance < limit else 0
        n += inside
        kx, ky, kz = inside * x, inside * y, inside * z
        sx += kx
        sy += ky
        sz += kz
        ux += inside * u
        uy += inside * v
        uz += inside * w
        xx += kx * u
        xy += kx * v
        xz += kx * w
        yx += ky * u
        yy += ky * v
        yz += ky * w
        zx += kz * u
        zy += kz * v
        zz += kz * w
        square += kx * x + ky * y + kz * z + inside * (u * u + v * v + w * w)
    sums[0], sums[1], sums[2], sums[3], sums[4], sums[5], sums[6] = n, sx, sy, sz, ux, uy, uz
    sums[7], sums[8], sums[9], sums[10], sums[11] = xx, xy, xz, yx, yy
    sums[12], sums[13], sums[14], sums[15], sums[16] = yz, zx, zy, zz, square
    return score, name


@njit(cache=True, error_model="numpy")
def _best_motion(sums: np.ndarray, motion: np.ndarray) -> None:
    """Rotation (row-major) and shift that bring the set that `sums` describes closest to its partners.

    Largest eigenvalue of the 4 x 4 quaternion matrix by Newton's method from above, eigenvector from its adjugate.

    Source:
        Theobald 2005, Acta Cryst. A61:478; Liu, Agrafiotis and Theobald 2010, J. Comput. Chem. 31:1561.
    """
    n = sums[0]
    mx, my, mz, fx, fy, fz = sums[1] / n, sums[2] / n, sums[3] / n, sums[4] / n, sums[5] / n, sums[6] / n
    sxx, sxy, sxz = sums[7] - n * mx * fx, sums[8] - n * mx * fy, sums[9] - n * mx * fz
    syx, syy, syz = sums[10] - n * my * fx, sums[11] - n * my * fy, sums[12] - n * my * fz
    szx, szy, szz = sums[13] - n * mz * fx, sums[14] - n * mz * fy, sums[15] - n * mz * fz
    bound = 0.5 * (sums[16] - n * (mx * mx + my * my + mz * mz + fx * fx + fy * fy + fz * fz))
    k = np.empty((4, 4))
    k[0, 0], k[1, 1] = sxx + syy + szz, sxx - syy - szz
    k[2, 2], k[3, 3] = syy - sxx - szz, szz - sxx - syy
    k[0, 1] = k[1, 0] = syz - szy
    k[0, 2] = k[2, 0] = szx - sxz
    k[0, 3] = k[3, 0] = sxy - syx
    k[1, 2] = k[2, 1] = sxy + syx
    k[1, 3] = k[3, 1] = szx + sxz
    k[2, 3] = k[3, 2] = syz + szy
    w, x, y, z = _top_eigenvector(k, bound)
    motion[0], motion[1], motion[2] = w * w + x * x - y * y - z * z, 2 * (x * y - w * z), 2 * (x * z + w * y)
    motion[3], motion[4], motion[5] = 2 * (x * y + w * z), w * w - x * x + y * y - z * z, 2 * (y * z - w * x)
    motion[6], motion[7], motion[8] = 2 * (x * z - w * y), 2 * (y * z + w * x), w * w - x * x - y * y + z * z
    motion[9] = fx - (motion[0] * mx + motion[1] * my + motion[2] * mz)
    motion[10] = fy - (motion[3] * mx + motion[4] * my + motion[5] * mz)
    motion[11] = fz - (motion[6] * mx + motion[7] * my + motion[8] * mz)


@njit(cache=True, error_model="numpy")
def _top_eigenvector(k: np.ndarray, bound: float) -> tuple[float, float, float, float]:
    """Unit eigenvector of the largest eigenvalue of a traceless symmetric 4 x 4 matrix, `bound` or a little less."""
    c2 = 0.0
    for i in range(4):
        for j in range(4):
            c2 -= 0.5 * k[i, j] * k[i, j]
    c1 = -_minor(k, 0, 0) - _minor(k, 1, 1) - _minor(k, 2, 2) - _minor(k, 3, 3)
    c0 = 0.0
    for j in range(4):
        c0 += k[0, j] * (1 - 2 * (j & 1)) * _minor(k, 0, j)
    top = bound
    for _ in range(50):
        square = top * top
        slope = (4.0 * square + 2.0 * c2) * top + c1
        if slope == 0.0:
            break
        step = ((square + c2) * square + c1 * top + c0) / slope
        top -= step
        if abs(step) <= 1e-11 * abs(top):
            break
    for i in range(4):
        k[i, i] -= top
    row, longest = 0, 0.0
    for i in range(4):  # the adjugate is a multiple of v v^T: its longest row has the largest diagonal element
        size = abs(_minor(k, i, i))
        if size > longest:
            row, longest = i, size
    w, x = (1 - 2 * (row & 1)) * _minor(k, row, 0), (1 - 2 * ((row + 1) & 1)) * _minor(k, row, 1)
    y, z = (1 - 2 * (row & 1)) * _minor(k, row, 2), (1 - 2 * ((row + 1) & 1)) * _minor(k, row, 3)
    norm = math.sqrt(w * w + x * x + y * y + z * z)
    if norm == 0.0:  # all points in one place: any rotation will do
        return 1.0, 0.0, 0.0, 0.0
    return w / norm, x / norm, y / norm, z / norm


@njit(cache=True, error_model="numpy")
def _minor(k: np.ndarray, row: int, column: int) -> float:
    """Determinant without a row and a column; cyclic order of the others keeps its sign."""
    r0, r1, r2 = (row + 1) & 3, (row + 2) & 3, (row + 3) & 3
    c0, c1, c2 = (column + 1) & 3, (column + 2) & 3, (column + 3) & 3
    return (
        k[r0, c0] * (k[r1, c1] * k[r2, c2] - k[r1, c2] * k[r2, c1])
        - k[r0, c1] * (k[r1, c0] * k[r2, c2] - k[r1, c2] * k[r2, c0])
        + k[r0, c2] * (k[r1, c0] * k[r2, c1] - k[r1, c1] * k[r2, c0])
    )
