"""The search that both kinds of TM-score end with: the superposition of paired points with the largest score.

Every fragment of L, L/2, L/4 … 4 pairs is superposed, the pairs that come near are collected, those are superposed, and
so on until the set stays the same. Which set follows is a function of the set before alone, so a set that was met
already is not followed twice: same result, a fraction of the work. Sets take their steps `LANES` at a time, in SIMD.

What belongs to lanes lies in flat tables with rows of `LANES` numbers, at constant distances, so that the compiler sees
that rows do not overlap. Sums are float64, motions and passes over the pairs float32. Lengths in Å. Letters: L pairs,
3 xyz.

Source:
    TMscore8_search of US-align (Zhang et al. 2022, Nat. Methods 19:1109).
"""

import math
from typing import Any

import numpy as np
from numba.extending import intrinsic

from pipeline.compiled import njit

#: Sets of pairs that are handled side by side: a SIMD register of float32 at its widest.
LANES = 16
#: Numbers that describe a set of pairs: count, sums of both sides, sums of their products.
SUMS = 16
#: Numbers of a rigid motion: rotation (row-major), shift.
MOTION = 12
#: d0 is clipped to these for collecting residues, Å. Source: US-align, d0_search.
NEAR, FAR = 4.5, 8.0

_SHORTEST_SEED = 4  # pairs; US-align: L_ini_min
_SEED_LENGTHS = 6  # US-align: n_init_max
_STEPS = 20  # after which a seed is left; US-align: n_it
NOWHERE = 1e15  # Å: a partner there is never near, adds nothing to a score, and its square is finite in float32
_CUTOFF, _FOUND = MOTION, MOTION + 1  # rows of the table of a pass, behind the motions: cut-off; sums and score
_CHUNK = 512  # pairs whose sums stay in float32
_NAMES = 2048  # places for the names of sets, at first


def _fused(typing: Any, a: Any, b: Any, c: Any) -> Any:
    """Type and code of `fused`."""
    return a(a, b, c), lambda context, builder, signature, values: builder.fma(*values)


#: a * b + c, rounded once, of three numbers of one type. With it passes over pairs are fast without ``fastmath``, whose
#: freedoms the compiler takes anew wherever a function is inlined: the last digits, and at times the alignment that was
#: chosen, differed between a process that compiles and one that loads compiled code.
fused: Any = intrinsic(_fused)


@njit(cache=True, forceinline=True)
def cell(row: int, lane: int) -> np.uint64:
    """Where a lane's number lies in a table; unsigned, as a signed index keeps a loop from becoming SIMD."""
    return np.uint64(row * LANES) + np.uint64(lane)


@njit(cache=True)
def lined_up(count: int) -> np.ndarray:
    """[count] float32 zeros that begin where a SIMD register's worth of memory does."""
    room = np.zeros(count + LANES, dtype=np.float32)
    start = (-room.ctypes.data // 4) % LANES
    return room[start : start + count]


@njit(cache=True, error_model="numpy", nogil=True)
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
    pairs = pair_terms(mobile, fixed)
    narrow, enough = _padded(pairs), min(3, len(pairs))
    sets, waiting = _seeds(pairs, step, near - 1.0)
    seen, filled = np.zeros(_NAMES, dtype=np.uint64), 0
    lanes, found = lined_up((_FOUND + SUMS + 1) * LANES), np.zeros((SUMS + 1) * LANES)
    names = np.empty(LANES, dtype=np.uint64)
    best = -1.0
    while waiting > 0:
        present, waiting = waiting, 0
        for first in range(0, present, LANES):
            sums = sets[first // LANES]
            best_motions(sums, found, lanes)
            for lane in range(LANES):
                lanes[cell(_CUTOFF, lane)] = sums[cell(SUMS, lane)] ** 2
            _collect(narrow, 1.0 / (d0 * d0), farthest * farthest, lanes, found)
            _name_all(found, names)
            for lane in range(min(LANES, present - first)):
                if found[cell(SUMS, lane)] > best:
                    best = found[cell(SUMS, lane)]
                    take_motion(lanes, lane, motion)
                steps = sums[cell(SUMS + 1, lane)]
                if found[lane] < enough:  # US-align, too, goes on with half an Å more
                    _put(sums, lane, sums[cell(SUMS, lane)] + 0.5, steps, sets, waiting)
                    waiting += 1
                elif steps < _STEPS and _remember(seen, names[lane]):
                    _put(found, lane, near + 1.0, steps + 1.0, sets, waiting)
                    waiting += 1
                    filled += 1
                    if 2 * filled > len(seen):
                        seen = _larger(seen)
    return best


@njit(cache=True, error_model="numpy")
def take_motion(motions: np.ndarray, lane: int, motion: np.ndarray) -> None:
    """Copy a lane's motion to `motion`, [12] float64."""
    for k in range(MOTION):
        motion[k] = motions[cell(k, lane)]


@njit(cache=True, error_model="numpy")
def _put(sums: np.ndarray, lane: int, cutoff: float, steps: float, sets: np.ndarray, place: int) -> None:
    """Copy a lane's set to a place in the queue, with the cut-off for what comes near it and the steps so far."""
    block, there = sets[place // LANES], place % LANES
    for k in range(SUMS):
        block[cell(k, there)] = sums[cell(k, lane)]
    block[cell(SUMS, there)], block[cell(SUMS + 1, there)] = cutoff, steps


@njit(cache=True, error_model="numpy")
def pair_terms(mobile: np.ndarray, fixed: np.ndarray) -> np.ndarray:
    """[L, 16] float64: what each pair adds to a set's sums."""
    terms = np.empty((mobile.shape[1], SUMS))
    for i in range(mobile.shape[1]):
        row = terms[i]
        x, y, z = np.float64(mobile[0, i]), np.float64(mobile[1, i]), np.float64(mobile[2, i])
        u, v, w = np.float64(fixed[0, i]), np.float64(fixed[1, i]), np.float64(fixed[2, i])
        row[0], row[1], row[2], row[3], row[4], row[5], row[6] = 1.0, x, y, z, u, v, w
        row[7], row[8], row[9], row[10], row[11], row[12] = x * u, x * v, x * w, y * u, y * v, y * w
        row[13], row[14], row[15] = z * u, z * v, z * w
    return terms


@njit(cache=True, error_model="numpy")
def _padded(pairs: np.ndarray) -> np.ndarray:
    """The same in float32, and one more pair that comes never near if their number is odd."""
    count = len(pairs)
    narrow = np.zeros((count + count % 2, SUMS), dtype=np.float32)
    narrow[-1, 4:7] = NOWHERE
    for i in range(count):
        for k in range(SUMS):
            narrow[i, k] = pairs[i, k]
    return narrow


@njit(cache=True, error_model="numpy")
def _seeds(pairs: np.ndarray, step: int, cutoff: float) -> tuple[np.ndarray, int]:
    """Tables of the sums of all fragments that the search starts from, and how many these are."""
    count = len(pairs)
    before = np.zeros((count + 1, SUMS))
    for i in range(count):
        for k in range(SUMS):
            before[i + 1, k] = before[i, k] + pairs[i, k]
    sets = np.zeros((_SEED_LENGTHS * (count // step + 2) // LANES + 1, (SUMS + 2) * LANES))
    filled = 0
    for level in range(_SEED_LENGTHS):
        length = count >> level
        if level == _SEED_LENGTHS - 1 or length < _SHORTEST_SEED:
            length = min(_SHORTEST_SEED, count)
        start, last = 0, count - length
        while True:
            for k in range(SUMS):
                sets[filled // LANES, cell(k, filled % LANES)] = before[start + length, k] - before[start, k]
            sets[filled // LANES, cell(SUMS, filled % LANES)] = cutoff
            filled += 1
            if start >= last:
                break
            start = min(start + step, last)
        if length <= _SHORTEST_SEED:
            break
    return sets, filled


@njit(cache=True, error_model="numpy")
def _larger(seen: np.ndarray) -> np.ndarray:
    """A table of twice the size with the same names."""
    larger = np.zeros(2 * len(seen), dtype=np.uint64)
    for name in seen:
        if name != 0:
            _remember(larger, name)
    return larger


@njit(cache=True, error_model="numpy")
def _name_all(sums: np.ndarray, names: np.ndarray) -> None:
    """Each lane's set gets a name: of its sums, as the same set always gives the same digits."""
    digits = sums.view(np.uint64)
    for lane in range(LANES):
        name = digits[lane] * np.uint64(0x9E3779B97F4A7C15) + digits[cell(1, lane)] * np.uint64(0xBF58476D1CE4E5B9)
        name += digits[cell(4, lane)] * np.uint64(0x94D049BB133111EB) + digits[cell(7, lane)]
        names[np.uint64(lane)] = (name ^ (name >> np.uint64(31))) * np.uint64(0x9E3779B97F4A7C15)


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
def _collect(pairs: np.ndarray, inverse: float, limit: float, lanes: np.ndarray, sums: np.ndarray) -> None:
    """One pass over all pairs: each lane's score, and the sums of the pairs that come near, written to `sums`.

    Args:
        pairs: [even, 16] float32 of `_padded`.
        inverse: 1 / d0^2.
        limit: squared distance, Å^2, up to which a pair counts in the score.
        lanes: motions, and squared distances below which a pair is near, Å^2; room for what is found.
        sums: [17 * LANES] float64, receives the sums and the score.
    """
    scale, outer, one, zero = np.float32(inverse), np.float32(limit), np.float32(1.0), np.float32(0.0)
    sums[:] = 0.0
    for start in range(0, len(pairs), _CHUNK):
        lanes[_FOUND * LANES :] = 0.0
        for place in range(start, min(start + _CHUNK, len(pairs)), 2):
            i, j = np.uint64(place), np.uint64(place + 1)
            x, y, z, u, v, w = pairs[i, 1], pairs[i, 2], pairs[i, 3], pairs[i, 4], pairs[i, 5], pairs[i, 6]
            x_, y_, z_, u_, v_, w_ = pairs[j, 1], pairs[j, 2], pairs[j, 3], pairs[j, 4], pairs[j, 5], pairs[j, 6]
            for lane in range(LANES):
                first, second = apart(lanes, lane, x, y, z, u, v, w), apart(lanes, lane, x_, y_, z_, u_, v_, w_)
                near = one if first < lanes[cell(_CUTOFF, lane)] else zero
                near_ = one if second < lanes[cell(_CUTOFF, lane)] else zero
                for k in range(SUMS):
                    more = fused(near_, pairs[j, np.uint64(k)], lanes[cell(_FOUND + k, lane)])
                    lanes[cell(_FOUND + k, lane)] = fused(near, pairs[i, np.uint64(k)], more)
                a, b = fused(first, scale, one), fused(second, scale, one)  # one division for both: 1 / a + 1 / b
                both = (b if first <= outer else zero) + (a if second <= outer else zero)
                lanes[cell(_FOUND + SUMS, lane)] += both / (a * b)
        for place in range((SUMS + 1) * LANES):
            sums[place] += lanes[_FOUND * LANES + place]


@njit(cache=True, forceinline=True)
def apart(
    motions: np.ndarray,
    lane: int,
    x: np.float32,
    y: np.float32,
    z: np.float32,
    u: np.float32,
    v: np.float32,
    w: np.float32,
) -> np.float32:
    """Squared distance of a pair after a lane's motion, Å^2."""
    m = motions
    a = fused(m[cell(0, lane)], x, fused(m[cell(1, lane)], y, fused(m[cell(2, lane)], z, m[cell(9, lane)] - u)))
    b = fused(m[cell(3, lane)], x, fused(m[cell(4, lane)], y, fused(m[cell(5, lane)], z, m[cell(10, lane)] - v)))
    c = fused(m[cell(6, lane)], x, fused(m[cell(7, lane)], y, fused(m[cell(8, lane)], z, m[cell(11, lane)] - w)))
    return fused(a, a, fused(b, b, c * c))


@njit(cache=True, error_model="numpy")
def best_motions(sums: np.ndarray, room: np.ndarray, motions: np.ndarray) -> None:
    """Rotations (row-major) and shifts that bring the sets that `sums` describes closest to their partners.

    Largest eigenvalue of the traceless 4 x 4 quaternion matrix by Halley's method from above, eigenvector from the
    adjugate's longest row. A lane whose set is empty gets no numbers.

    Args:
        sums: [16 * LANES or more] float64.
        room: [4 * LANES or more] float64, overwritten.
        motions: [12 * LANES or more] float32 or float64, receives the motions.

    Source:
        Theobald 2005, Acta Cryst. A61:478; Liu, Agrafiotis and Theobald 2010, J. Comput. Chem. 31:1561.
    """
    for lane in range(LANES):
        a, b, c, d, e, f, g, h, i, j, square, det = _quaternion_matrix(sums, lane)
        room[cell(0, lane)] = 1.0000001 * math.sqrt(3.0 * square)  # no sum of three singular values is above
        room[cell(1, lane)] = -2.0 * square
        room[cell(2, lane)] = -8.0 * det
        room[cell(3, lane)] = _determinant(a, b, c, d, e, f, g, h, i, j)
    _top_eigenvalues(room)
    for lane in range(LANES):
        top = room[cell(0, lane)]
        a, b, c, d, e, f, g, h, i, j, _, _ = _quaternion_matrix(sums, lane)
        w, x, y, z = _longest_row(a - top, b, c, d, e - top, f, g, h - top, i, j - top)
        r0, r1, r2 = w * w + x * x - y * y - z * z, 2.0 * (x * y - w * z), 2.0 * (x * z + w * y)
        r3, r4, r5 = 2.0 * (x * y + w * z), w * w - x * x + y * y - z * z, 2.0 * (y * z - w * x)
        r6, r7, r8 = 2.0 * (x * z - w * y), 2.0 * (y * z + w * x), w * w - x * x - y * y + z * z
        part = 1.0 / sums[cell(0, lane)]
        x, y, z = sums[cell(1, lane)] * part, sums[cell(2, lane)] * part, sums[cell(3, lane)] * part
        u, v, w = sums[cell(4, lane)] * part, sums[cell(5, lane)] * part, sums[cell(6, lane)] * part
        motions[cell(0, lane)], motions[cell(1, lane)], motions[cell(2, lane)] = r0, r1, r2
        motions[cell(3, lane)], motions[cell(4, lane)], motions[cell(5, lane)] = r3, r4, r5
        motions[cell(6, lane)], motions[cell(7, lane)], motions[cell(8, lane)] = r6, r7, r8
        motions[cell(9, lane)] = u - (r0 * x + r1 * y + r2 * z)
        motions[cell(10, lane)] = v - (r3 * x + r4 * y + r5 * z)
        motions[cell(11, lane)] = w - (r6 * x + r7 * y + r8 * z)


@njit(cache=True, error_model="numpy", forceinline=True)
def _quaternion_matrix(sums: np.ndarray, lane: int) -> tuple[float, ...]:
    """Upper triangle a b c d, e f g, h i, j of the matrix; sum of squares and determinant of the covariance."""
    part = 1.0 / sums[cell(0, lane)]
    x, y, z = sums[cell(1, lane)], sums[cell(2, lane)], sums[cell(3, lane)]
    u, v, w = sums[cell(4, lane)] * part, sums[cell(5, lane)] * part, sums[cell(6, lane)] * part
    xx, xy, xz = sums[cell(7, lane)] - x * u, sums[cell(8, lane)] - x * v, sums[cell(9, lane)] - x * w
    yx, yy, yz = sums[cell(10, lane)] - y * u, sums[cell(11, lane)] - y * v, sums[cell(12, lane)] - y * w
    zx, zy, zz = sums[cell(13, lane)] - z * u, sums[cell(14, lane)] - z * v, sums[cell(15, lane)] - z * w
    square = xx * xx + xy * xy + xz * xz + yx * yx + yy * yy + yz * yz + zx * zx + zy * zy + zz * zz
    det = xx * (yy * zz - yz * zy) - xy * (yx * zz - yz * zx) + xz * (yx * zy - yy * zx)
    diagonal = xx + yy + zz, xx - yy - zz, yy - xx - zz, zz - xx - yy
    b, c, d, f, g, i = yz - zy, zx - xz, xy - yx, xy + yx, zx + xz, yz + zy
    return diagonal[0], b, c, d, diagonal[1], f, g, diagonal[2], i, diagonal[3], square, det


@njit(cache=True, error_model="numpy")
def _top_eigenvalues(room: np.ndarray) -> None:
    """Largest root of x^4 + c2 x^2 + c1 x + c0, from a bound in the first of the four rows, c2, c1 and c0 behind it."""
    for _ in range(30):
        moving = 0
        for lane in range(LANES):
            top, c2 = room[cell(0, lane)], room[cell(1, lane)]
            c1, c0 = room[cell(2, lane)], room[cell(3, lane)]
            square = top * top
            value = (square + c2) * square + c1 * top + c0
            slope = (4.0 * square + 2.0 * c2) * top + c1
            below = slope * slope - value * (6.0 * square + c2)  # the second derivative's half
            move = value * slope / below if below != 0.0 else 0.0
            room[cell(0, lane)] = top - move
            moving += abs(move) > 1e-9 * abs(top)
        if moving == 0:
            break


@njit(cache=True, error_model="numpy", forceinline=True)
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


@njit(cache=True, error_model="numpy", forceinline=True)
def _longest_row(
    a: float, b: float, c: float, d: float, e: float, f: float, g: float, h: float, i: float, j: float
) -> tuple[float, float, float, float]:
    """Unit row of the adjugate of that matrix; if it is singular, the vector that it sends to zero."""
    hj, gi, gh = h * j - i * i, f * j - g * i, f * i - g * h
    cj, ci, cg = c * j - d * i, c * i - d * h, c * g - d * f
    ae, af, ag, bf, bg = a * e - b * b, a * f - b * c, a * g - b * d, b * f - c * e, b * g - d * e
    a00, a11 = e * hj - f * gi + g * gh, a * hj - c * cj + d * ci
    a22, a33 = j * ae - g * ag + d * bg, h * ae - f * af + c * bf
    a01, a02, a03 = -(b * hj - f * cj + g * ci), b * gi - e * cj + g * cg, -(b * gh - e * ci + f * cg)
    a12, a13, a23 = -(a * gi - b * cj + d * cg), a * gh - b * ci + c * cg, -(i * ae - f * ag + c * bg)
    w, x, y, z = a00, a01, a02, a03
    longest = abs(a00)
    w, x, y, z = (a01, a11, a12, a13) if abs(a11) > longest else (w, x, y, z)
    longest = abs(a11) if abs(a11) > longest else longest
    w, x, y, z = (a02, a12, a22, a23) if abs(a22) > longest else (w, x, y, z)
    longest = abs(a22) if abs(a22) > longest else longest
    w, x, y, z = (a03, a13, a23, a33) if abs(a33) > longest else (w, x, y, z)
    norm = math.sqrt(w * w + x * x + y * y + z * z)
    if norm == 0.0:  # all points in one place: any rotation will do
        return 1.0, 0.0, 0.0, 0.0
    part = 1.0 / norm
    return w * part, x * part, y * part, z * part
