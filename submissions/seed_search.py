"""The search that both kinds of TM-score end with: the superposition of paired points with the largest score.

Every fragment of L, L/2, L/4 … 4 pairs is superposed, the pairs that come near are collected, those are superposed, and
so on until the set stays the same. Which set follows is a function of the set before alone, so a set that was met
already is not followed twice: same result, a fraction of the work.

Points are [3, L] float32 about a common centre, so that one pass over the pairs runs in SIMD; superpositions are solved
in float64. Lengths in Å. Letters: L pairs, 3 xyz.

Source:
    TMscore8_search of US-align (Zhang et al. 2022, Nat. Methods 19:1109).
"""

import math

import numpy as np

from pipeline.compiled import njit

#: Numbers that describe a set of pairs: count, sums of both sides, of their products, of their squared lengths.
SUMS = 17
#: Numbers of a rigid motion: rotation (row-major), shift.
MOTION = 12
#: d0 is clipped to these for collecting residues, Å. Source: US-align, d0_search.
NEAR, FAR = 4.5, 8.0

_SHORTEST_SEED = 4  # pairs; US-align: L_ini_min
_SEED_LENGTHS = 6  # US-align: n_init_max
_WIDE = 16  # points that a SIMD step takes at most
_NOWHERE = 1e15  # Å: a partner there is never near, adds nothing to a score, and its square is finite in float32
_ITERATIONS = 20  # US-align: n_it


@njit(cache=True, error_model="numpy")
def search(
    mobile: np.ndarray, fixed: np.ndarray, d0: float, near: float, farthest: float, step: int, motion: np.ndarray
) -> float:
    """Largest sum of 1 / (1 + (d / d0)^2) over the superpositions that the seeds lead to.

    Args:
        mobile: [3, L] float32 Å, C order, L >= 1.
        fixed: [3, L] float32 Å, C order.
        d0: scale, Å.
        near: cut-off for collecting pairs, Å.
        farthest: pairs farther apart than this add nothing to the score, Å.
        step: between the starts of seeds, pairs.
        motion: [12] float64, receives the best motion.

    Returns:
        The sum, not divided by a length.
    """
    count = mobile.shape[1]
    inverse, limit = 1.0 / (d0 * d0), farthest * farthest
    first, later = near - 1.0, near + 1.0
    seen = np.zeros(_table_size(count, step), dtype=np.uint64)
    prefix = prefix_sums(mobile, fixed)
    mobile, fixed = _padded(mobile, 0.0), _padded(fixed, _NOWHERE)
    sums, tried = np.empty(SUMS), np.empty(MOTION)
    best, filled = -1.0, 0
    for level in range(_SEED_LENGTHS):
        length = count >> level
        if level == _SEED_LENGTHS - 1 or length < _SHORTEST_SEED:
            length = min(_SHORTEST_SEED, count)
        last = count - length
        start = 0
        while True:
            sums[:] = prefix[start + length] - prefix[start]
            cutoff = first
            for _ in range(_ITERATIONS + 1):
                best_motion(sums, tried)
                score = _collect(mobile, fixed, count, tried, inverse, cutoff, limit, sums)
                cutoff = later
                if score > best:
                    best = score
                    motion[:] = tried
                if not _remember(seen, _name(sums)):
                    break
                filled += 1
                if 2 * filled > len(seen):  # a crowded table gets slow; forgetting costs time, not exactness
                    seen[:] = 0
                    filled = 0
            if start >= last:
                break
            start = min(start + step, last)
        if length <= _SHORTEST_SEED:
            break
    return best


@njit(cache=True, error_model="numpy")
def _padded(xyz: np.ndarray, value: float) -> np.ndarray:
    """The same points, and so many more that a SIMD loop has no rest: 85 ns a pass of 77 points became 60 ns."""
    count = xyz.shape[1]
    wide = np.full((3, (count + _WIDE - 1) // _WIDE * _WIDE), np.float32(value), dtype=np.float32)
    for axis in range(3):
        for place in range(count):
            wide[axis, place] = xyz[axis, place]
    return wide


@njit(cache=True, error_model="numpy")
def prefix_sums(mobile: np.ndarray, fixed: np.ndarray) -> np.ndarray:
    """[L + 1, 17] running sums of what `best_motion` needs; a fragment's sums are one difference."""
    prefix = np.zeros((mobile.shape[1] + 1, SUMS))
    for i in range(mobile.shape[1]):
        before, row = prefix[i], prefix[i + 1]
        x, y, z = np.float64(mobile[0, i]), np.float64(mobile[1, i]), np.float64(mobile[2, i])
        u, v, w = np.float64(fixed[0, i]), np.float64(fixed[1, i]), np.float64(fixed[2, i])
        row[0] = before[0] + 1.0
        row[1], row[2], row[3] = before[1] + x, before[2] + y, before[3] + z
        row[4], row[5], row[6] = before[4] + u, before[5] + v, before[6] + w
        row[7], row[8], row[9] = before[7] + x * u, before[8] + x * v, before[9] + x * w
        row[10], row[11], row[12] = before[10] + y * u, before[11] + y * v, before[12] + y * w
        row[13], row[14], row[15] = before[13] + z * u, before[14] + z * v, before[15] + z * w
        row[16] = before[16] + x * x + y * y + z * z + u * u + v * v + w * w
    return prefix


@njit(cache=True, error_model="numpy")
def _table_size(count: int, step: int) -> int:
    size = 256
    while size * step < 16 * count:
        size *= 2
    return size


@njit(cache=True, error_model="numpy")
def _name(sums: np.ndarray) -> np.uint64:
    """A set's name: its sums, of which the same set always gives the same digits."""
    digits = sums.view(np.uint64)
    name = digits[1] * np.uint64(0x9E3779B97F4A7C15) + digits[4]
    name = name * np.uint64(0xBF58476D1CE4E5B9) + digits[7]
    name = name * np.uint64(0x94D049BB133111EB) + digits[11]
    name = (name ^ (name >> np.uint64(31))) * np.uint64(0x9E3779B97F4A7C15) + digits[0]
    return (name ^ (name >> np.uint64(29))) * np.uint64(0xBF58476D1CE4E5B9)


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
    count: int,
    motion: np.ndarray,
    inverse: float,
    cutoff: float,
    limit: float,
    sums: np.ndarray,
) -> float:
    """Score of a motion, and the sums of the pairs within the cut-off (written to `sums`).

    The cut-off grows by half an Å until three pairs are within (or all, of fewer), as US-align's does.
    """
    width = mobile.shape[1]
    score = collect(mobile, 0, fixed, 0, width, motion, inverse, cutoff * cutoff, limit, sums)
    while sums[0] < 3.0 and sums[0] < count:
        cutoff += 0.5
        score = collect(mobile, 0, fixed, 0, width, motion, inverse, cutoff * cutoff, limit, sums)
    return score


@njit(cache=True, fastmath={"reassoc", "nsz", "contract", "arcp"}, error_model="numpy")
def collect(
    mobile: np.ndarray,
    mobile_start: int,
    fixed: np.ndarray,
    fixed_start: int,
    count: int,
    motion: np.ndarray,
    inverse: float,
    near: float,
    limit: float,
    sums: np.ndarray,
) -> float:
    """One pass over `count` pairs, without branches: the score of a motion, and the sums of the pairs that come near.

    Args:
        mobile: [3, ≥ mobile_start + count] float32 Å.
        mobile_start: its first point.
        fixed: [3, ≥ fixed_start + count] float32 Å.
        fixed_start: the first point's partner.
        count: pairs.
        motion: [12] of `mobile`.
        inverse: 1 / d0^2.
        near: squared distance, Å^2, below which a pair is near.
        limit: squared distance, Å^2, up to which a pair counts in the score.
        sums: [17] float64, receives the sums over the near pairs.
    """
    r00, r01, r02 = np.float32(motion[0]), np.float32(motion[1]), np.float32(motion[2])
    r10, r11, r12 = np.float32(motion[3]), np.float32(motion[4]), np.float32(motion[5])
    r20, r21, r22 = np.float32(motion[6]), np.float32(motion[7]), np.float32(motion[8])
    t0, t1, t2 = np.float32(motion[9]), np.float32(motion[10]), np.float32(motion[11])
    scale, inner, outer = np.float32(inverse), np.float32(near), np.float32(limit)
    one, zero = np.float32(1.0), np.float32(0.0)
    score, n, sx, sy, sz, ux, uy, uz = zero, zero, zero, zero, zero, zero, zero, zero
    xx, xy, xz, yx, yy, yz, zx, zy, zz, square = zero, zero, zero, zero, zero, zero, zero, zero, zero, zero
    mobile_end, fixed_end = mobile_start + count, fixed_start + count
    xs, ys, zs = (
        mobile[0][mobile_start:mobile_end],
        mobile[1][mobile_start:mobile_end],
        mobile[2][mobile_start:mobile_end],
    )
    us, vs, ws = fixed[0][fixed_start:fixed_end], fixed[1][fixed_start:fixed_end], fixed[2][fixed_start:fixed_end]
    for i in range(count):
        x, y, z, u, v, w = xs[i], ys[i], zs[i], us[i], vs[i], ws[i]
        a = r00 * x + r01 * y + r02 * z + t0 - u
        b = r10 * x + r11 * y + r12 * z + t1 - v
        c = r20 * x + r21 * y + r22 * z + t2 - w
        distance = a * a + b * b + c * c
        score += one / (one + distance * scale) if distance <= outer else zero
        inside = one if distance < inner else zero
        n += inside
        kx, ky, kz = inside * x, inside * y, inside * z
        ku, kv, kw = inside * u, inside * v, inside * w
        sx += kx
        sy += ky
        sz += kz
        ux += ku
        uy += kv
        uz += kw
        xx += kx * u
        xy += kx * v
        xz += kx * w
        yx += ky * u
        yy += ky * v
        yz += ky * w
        zx += kz * u
        zy += kz * v
        zz += kz * w
        square += kx * x + ky * y + kz * z + ku * u + kv * v + kw * w
    sums[0], sums[1], sums[2], sums[3], sums[4], sums[5], sums[6] = n, sx, sy, sz, ux, uy, uz
    sums[7], sums[8], sums[9], sums[10], sums[11] = xx, xy, xz, yx, yy
    sums[12], sums[13], sums[14], sums[15], sums[16] = yz, zx, zy, zz, square
    return np.float64(score)


@njit(cache=True, error_model="numpy")
def best_motion(sums: np.ndarray, motion: np.ndarray) -> None:
    """Rotation (row-major) and shift that bring the set that `sums` describes closest to its partners.

    Largest eigenvalue of the traceless 4 x 4 quaternion matrix by Halley's method from above, eigenvector from the
    adjugate's longest row.

    Source:
        Theobald 2005, Acta Cryst. A61:478; Liu, Agrafiotis and Theobald 2010, J. Comput. Chem. 31:1561.
    """
    part = 1.0 / sums[0]
    mx, my, mz = sums[1] * part, sums[2] * part, sums[3] * part
    fx, fy, fz = sums[4] * part, sums[5] * part, sums[6] * part
    sxx, sxy, sxz = sums[7] - sums[1] * fx, sums[8] - sums[1] * fy, sums[9] - sums[1] * fz
    syx, syy, syz = sums[10] - sums[2] * fx, sums[11] - sums[2] * fy, sums[12] - sums[2] * fz
    szx, szy, szz = sums[13] - sums[3] * fx, sums[14] - sums[3] * fy, sums[15] - sums[3] * fz
    bound = 0.5 * (sums[16] - sums[1] * mx - sums[2] * my - sums[3] * mz - sums[4] * fx - sums[5] * fy - sums[6] * fz)
    b, c, d = syz - szy, szx - sxz, sxy - syx
    f, g, i = sxy + syx, szx + sxz, syz + szy
    ka, ke, kh, kj = sxx + syy + szz, sxx - syy - szz, syy - sxx - szz, szz - sxx - syy
    square = sxx * sxx + sxy * sxy + sxz * sxz + syx * syx + syy * syy + syz * syz + szx * szx + szy * szy + szz * szz
    det = sxx * (syy * szz - syz * szy) - sxy * (syx * szz - syz * szx) + sxz * (syx * szy - syy * szx)
    top = _top_eigenvalue(bound, -2.0 * square, -8.0 * det, _determinant(ka, b, c, d, ke, f, g, kh, i, kj))
    qw, qx, qy, qz = _longest_row(ka - top, b, c, d, ke - top, f, g, kh - top, i, kj - top)
    motion[0], motion[1], motion[2] = (
        qw * qw + qx * qx - qy * qy - qz * qz,
        2.0 * (qx * qy - qw * qz),
        2.0 * (qx * qz + qw * qy),
    )
    motion[3], motion[4], motion[5] = (
        2.0 * (qx * qy + qw * qz),
        qw * qw - qx * qx + qy * qy - qz * qz,
        2.0 * (qy * qz - qw * qx),
    )
    motion[6], motion[7], motion[8] = (
        2.0 * (qx * qz - qw * qy),
        2.0 * (qy * qz + qw * qx),
        qw * qw - qx * qx - qy * qy + qz * qz,
    )
    motion[9] = fx - (motion[0] * mx + motion[1] * my + motion[2] * mz)
    motion[10] = fy - (motion[3] * mx + motion[4] * my + motion[5] * mz)
    motion[11] = fz - (motion[6] * mx + motion[7] * my + motion[8] * mz)


@njit(cache=True, error_model="numpy")
def _top_eigenvalue(bound: float, c2: float, c1: float, c0: float) -> float:
    """Largest root of x^4 + c2 x^2 + c1 x + c0, which is `bound` or less."""
    top = bound
    for _ in range(30):
        square = top * top
        value = (square + c2) * square + c1 * top + c0
        slope = (4.0 * square + 2.0 * c2) * top + c1
        bend = 6.0 * square + c2  # half of the second derivative
        below = slope * slope - value * bend
        if below == 0.0:
            break
        move = value * slope / below
        top -= move
        if abs(move) <= 1e-9 * abs(top):
            break
    return top


@njit(cache=True, error_model="numpy")
def _determinant(
    a: float, b: float, c: float, d: float, e: float, f: float, g: float, h: float, i: float, j: float
) -> float:
    """Of the symmetric matrix with the upper triangle a b c d, e f g, h i, j."""
    return (
        (a * e - b * b) * (h * j - i * i)
        - (a * f - b * c) * (f * j - g * i)
        + (a * g - b * d) * (f * i - g * h)
        + (b * f - c * e) * (c * j - d * i)
        - (b * g - d * e) * (c * i - d * h)
        + (c * g - d * f) * (c * g - d * f)
    )


@njit(cache=True, error_model="numpy")
def _longest_row(
    a: float, b: float, c: float, d: float, e: float, f: float, g: float, h: float, i: float, j: float
) -> tuple[float, float, float, float]:
    """Unit row of the adjugate of that matrix; if it is singular, the vector that it sends to zero."""
    hj, gi, gh = h * j - i * i, f * j - g * i, f * i - g * h
    cj, ci, cg = c * j - d * i, c * i - d * h, c * g - d * f
    ae, af, ag = a * e - b * b, a * f - b * c, a * g - b * d
    a00, a11 = e * hj - f * gi + g * gh, a * hj - c * cj + d * ci
    a22, a33 = j * ae - g * ag + d * (b * g - d * e), h * ae - f * af + c * (b * f - c * e)
    a01, a02, a03 = -(b * hj - f * cj + g * ci), b * gi - e * cj + g * cg, -(b * gh - e * ci + f * cg)
    a12, a13, a23 = -(a * gi - b * cj + d * cg), a * gh - b * ci + c * cg, -(i * ae - f * ag + c * (b * g - d * e))
    s0, s1, s2, s3 = abs(a00), abs(a11), abs(a22), abs(a33)
    if s0 >= s1 and s0 >= s2 and s0 >= s3:
        w, x, y, z = a00, a01, a02, a03
    elif s1 >= s2 and s1 >= s3:
        w, x, y, z = a01, a11, a12, a13
    elif s2 >= s3:
        w, x, y, z = a02, a12, a22, a23
    else:
        w, x, y, z = a03, a13, a23, a33
    norm = math.sqrt(w * w + x * x + y * y + z * z)
    if norm == 0.0:  # all points in one place: any rotation will do
        return 1.0, 0.0, 0.0, 0.0
    return w / norm, x / norm, y / norm, z / norm
