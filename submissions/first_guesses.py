"""Five first guesses of how two traces face each other, from their shapes and secondary structure. Lengths in Å.

Gapless threading, secondary structure, superposed fragments, superposition with secondary structure, threading of the
longest fragment. Which of two is better is told by a quick score: three superpositions of its pairs.

Letters: X residues of the model, Y of the reference, L of either, 3 xyz.

Source:
    get_initial, get_initial_ss, get_initial5, get_initial_ssplus and get_initial_fgt of US-align (Zhang et al. 2022,
    Nat. Methods 19:1109).
"""

import numpy as np

from pipeline.compiled import copy, njit
from submissions.dynamic import Workspace, align_by, fill, moved_by, paired, trace_back, workspace
from submissions.seed_search import (
    LANES,
    MOTION,
    NOWHERE,
    SUMS,
    apart,
    best_motions,
    cell,
    fused,
    lined_up,
    pair_terms,
    take_motion,
)

_PAIRED = (12.5, 15.0)  # Å between residues of a pair: US-align's limits for C3', which it takes for C1' as well
_BREAK = 4.25  # Å: longer steps end a fragment, at first; US-align: dcu0
_FOUND = 6  # row of a block, behind its pairs, where their sums begin; the score follows
_ANYWHERE = 1e29  # Å^2: any pair is nearer, but for those that fill up a block
_GAP_STRUCTURE = -1.0  # where secondary structure counts
_BONUS = 0.5  # for equal secondary structure, beside a similarity in (0, 1]
_NO_MARKS = np.zeros(0, dtype=np.uint8)
_MOST_CHOICES = 2**25  # bytes of choices, beyond which there is one lane only

#: x and y, [3, X] and [3, Y] float32, y in reverse order; secondary structure of x, and of y in reverse order, uint8.
Shapes = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]
#: Sums, room and motions of `LANES` superpositions, as `best_motions` takes them; a block of pairs with what is found.
_Tables = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


def first_guess(
    start: int,
    shapes: Shapes,
    d0: float,
    near: float,
    chosen: np.ndarray,
    space: Workspace,
    guess: np.ndarray,
) -> None:
    """Write one of five first guesses; the fourth starts from `chosen`, the best alignment so far."""
    x, y, y_back, x_marks, y_marks_back = shapes
    if start == 0:
        shorter = min(x.shape[1], y.shape[1])
        _thread(x, y, 0, x.shape[1], 0, y.shape[1], max(shorter // 2, 5), d0, near, -1.0, guess)
    elif start == 1:
        align_by(x, y_back, -1.0, 1.0, _GAP_STRUCTURE, x_marks, y_marks_back, space, guess)
    elif start == 2:
        _superpose_fragments(x, y, y_back, d0, near, guess)
    elif start == 3:
        moved, inverse = moved_by(x, _superposed(*paired(x, y, chosen))), 1.0 / (d0 + 1.5) ** 2
        align_by(moved, y_back, inverse, _BONUS, _GAP_STRUCTURE, x_marks, y_marks_back, space, guess)
    else:
        _thread_fragments(x, y, d0, near, guess)


@njit(cache=True, error_model="numpy", nogil=True)
def _superposed(mobile: np.ndarray, fixed: np.ndarray) -> np.ndarray:
    """[12] motion that brings [3, P] closest to its partners."""
    motion, tables, terms = np.empty(MOTION), _tables(), pair_terms(mobile, fixed)
    for k in range(SUMS):
        tables[0][cell(k, 0)] = terms[:, k].sum()
    best_motions(tables[0], tables[1], tables[2])
    take_motion(tables[2], 0, motion)
    return motion


@njit(cache=True, error_model="numpy", nogil=True)
def secondary(xyz: np.ndarray, names: np.ndarray) -> np.ndarray:
    """[L] uint8: 0 unpaired, 1 paired with a later residue, 2 with an earlier one.

    Stacks of at least two pairs of residues that can pair and lie at a pair's distance; later stacks overwrite earlier
    ones, and a stack that reaches the third last residue counts as a single pair, as in US-align.
    """
    count = xyz.shape[1]
    marks = np.zeros(count, dtype=np.uint8)
    for i in range(count - 2):
        for j in range(i + 3, count):
            if not _pairs(xyz, names, i, j) or not _pairs(xyz, names, i + 1, j - 1):
                continue
            if i > 0 and j + 1 < count and _pairs(xyz, names, i - 1, j + 1):
                continue
            size = 0
            while i + size < count - 3 and j - size > 0 and i + size < j - size:
                if not _pairs(xyz, names, i + size, j - size):
                    break
                size += 1
            if i + size >= count - 3:
                size = 1
            marks[i : i + size] = 1
            marks[j - size + 1 : j + 1] = 2
    return marks


@njit(cache=True, error_model="numpy")
def _pairs(xyz: np.ndarray, names: np.ndarray, i: int, j: int) -> bool:
    """Whether two residues are A-U, G-C or G-U and as far apart as pairs are."""
    low, high = min(names[i], names[j]), max(names[i], names[j])
    if not ((low == 1 and high == 4) or (low == 2 and high == 3) or (low == 3 and high == 4)):
        return False
    a, b, c = xyz[0, i] - xyz[0, j], xyz[1, i] - xyz[1, j], xyz[2, i] - xyz[2, j]
    return _PAIRED[0] ** 2 < a * a + b * b + c * c < _PAIRED[1] ** 2


# ------------------------------------------------------------------------------------------- threading, quick scores


@njit(cache=True, error_model="numpy", nogil=True)
def _thread(
    x: np.ndarray,
    y: np.ndarray,
    x_start: int,
    x_count: int,
    y_start: int,
    y_count: int,
    least: int,
    d0: float,
    near: float,
    best: float,
    guess: np.ndarray,
) -> float:
    """Slide a stretch of x along one of y without gaps, at least `least` residues in touch; keep the last best."""
    place, found = least - y_count, False
    stretches, scores, tables = np.empty((LANES, 3), dtype=np.int64), np.empty(LANES), _tables()
    for low in range(least - y_count, x_count - least + 1, LANES):
        used = min(LANES, x_count - least + 1 - low)
        for lane in range(used):
            first, last = max(0, -low - lane), min(y_count, x_count - low - lane)
            stretches[lane, 0], stretches[lane, 1] = x_start + first + low + lane, y_start + first
            stretches[lane, 2] = last - first
        _quick_scores(x, y, stretches[:used], d0, near, tables, scores)
        for lane in range(used):
            if scores[lane] >= best:
                best, place, found = scores[lane], low + lane, True
    if found or best < 0.0:
        guess[:] = -1
        for j in range(max(0, -place), min(y_count, x_count - place)):
            guess[y_start + j] = x_start + j + place
    return best


@njit(cache=True, error_model="numpy")
def _tables() -> _Tables:
    return (
        np.zeros(SUMS * LANES),
        np.zeros(4 * LANES),
        lined_up(MOTION * LANES),
        lined_up((_FOUND + SUMS + 1) * LANES),
    )


@njit(cache=True, error_model="numpy")
def _quick_scores(
    x: np.ndarray,
    y: np.ndarray,
    stretches: np.ndarray,
    d0: float,
    near: float,
    tables: _Tables,
    scores: np.ndarray,
) -> None:
    """Best sum of three superpositions: of all pairs, of those within `near`, and of those within a little more.

    Args:
        x: [3, X] float32 Å.
        y: [3, Y] float32 Å.
        stretches: [at most LANES, 3] first residue of x, its partner in y, residues that face each other.
        d0: scale, Å.
        near: cut-off, Å.
        tables: of `_tables`.
        scores: [LANES], receives the sums.

    Source: US-align, get_score_fast.
    """
    sums, room, motions, block = tables
    inverse, inner, used = 1.0 / (d0 * d0), near * near, len(stretches)
    motions[:] = 0.0
    for lane in range(used):
        _collect(x, y, stretches[lane], motions, lane, inverse, np.inf, block, sums)
    best_motions(sums, room, motions)
    for lane in range(used):
        scores[lane] = _collect(x, y, stretches[lane], motions, lane, inverse, inner, block, sums)
    for limit in (inner, inner + 1.0):
        for lane in range(used):
            if sums[lane] < min(3, stretches[lane, 2]):
                reach = _reach(x, y, stretches[lane], motions, lane, limit)
                _collect(x, y, stretches[lane], motions, lane, inverse, reach, block, sums)
        best_motions(sums, room, motions)
        for lane in range(used):
            if sums[lane] < stretches[lane, 2]:  # else all are within, and that motion has been tried
                score = _collect(x, y, stretches[lane], motions, lane, inverse, inner + 1.0, block, sums)
                scores[lane] = max(scores[lane], score)


@njit(cache=True, error_model="numpy")
def _reach(x: np.ndarray, y: np.ndarray, stretch: np.ndarray, motions: np.ndarray, lane: int, limit: float) -> float:
    """Squared distance within which three pairs lie (infinite if there are fewer), `limit` or more, Å^2."""
    x_start, y_start, count = stretch
    first, second, third = np.inf, np.inf, np.inf
    for i in range(x_start, x_start + count):
        j = i - x_start + y_start
        distance = float(apart(motions, lane, x[0, i], x[1, i], x[2, i], y[0, j], y[1, j], y[2, j]))
        if distance < first:
            first, second, third = distance, first, second
        elif distance < second:
            second, third = distance, second
        elif distance < third:
            third = distance
    return max(limit, 1.00001 * third + 1e-6)  # a little more: `_collect` leaves out the limit


@njit(cache=True, error_model="numpy")
def _collect(
    x: np.ndarray,
    y: np.ndarray,
    stretch: np.ndarray,
    motions: np.ndarray,
    lane: int,
    inverse: float,
    near: float,
    block: np.ndarray,
    sums: np.ndarray,
) -> float:
    """One pass over a stretch, without branches: the score of a lane's motion; its sums of the near pairs to `sums`.

    Args:
        x: [3, X] float32 Å.
        y: [3, Y] float32 Å.
        stretch: first residue of x, its partner in y, residues.
        motions: [12 * LANES] float32, of x.
        lane: which.
        inverse: 1 / d0^2.
        near: squared distance, Å^2, below which a pair is near.
        block: of `_tables`, overwritten.
        sums: [16 * LANES] float64.
    """
    scale, inner = np.float32(inverse), np.float32(min(near, _ANYWHERE))
    one, zero = np.float32(1.0), np.float32(0.0)
    block[_FOUND * LANES :] = zero
    for start in range(0, stretch[2], LANES):
        _take_block(x, y, stretch, start, block)
        for k in range(LANES):
            p, q, r = block[cell(0, k)], block[cell(1, k)], block[cell(2, k)]
            u, v, w = block[cell(3, k)], block[cell(4, k)], block[cell(5, k)]
            distance = apart(motions, lane, p, q, r, u, v, w)
            block[cell(_FOUND + SUMS, k)] += one / fused(distance, scale, one)
            inside = one if distance < inner else zero
            block[cell(_FOUND, k)] += inside
            for a in range(3):
                point = inside * block[cell(a, k)]
                block[cell(_FOUND + 1 + a, k)] += point
                block[cell(_FOUND + 4 + a, k)] += inside * block[cell(3 + a, k)]
                for b in range(3):
                    block[cell(_FOUND + 7 + 3 * a + b, k)] = fused(
                        point, block[cell(3 + b, k)], block[cell(_FOUND + 7 + 3 * a + b, k)]
                    )
    _add_lanes(block)
    for k in range(SUMS):
        sums[cell(k, lane)] = block[cell(_FOUND + k, 0)]
    return np.float64(block[cell(_FOUND + SUMS, 0)])


@njit(cache=True, error_model="numpy")
def _take_block(x: np.ndarray, y: np.ndarray, stretch: np.ndarray, start: int, block: np.ndarray) -> None:
    """Copy the next `LANES` pairs of a stretch to the first six rows of `block`; pairs beyond its end are nowhere."""
    used = min(LANES, stretch[2] - start)
    x_start, y_start = stretch[0] + start, stretch[1] + start
    for axis in range(3):
        xs, ys = x[axis][x_start : x_start + used], y[axis][y_start : y_start + used]
        for k in range(used):
            block[cell(axis, k)] = xs[k]
            block[cell(3 + axis, k)] = ys[k]
        for k in range(used, LANES):
            block[cell(axis, k)] = 0.0
            block[cell(3 + axis, k)] = NOWHERE


@njit(cache=True, error_model="numpy")
def _add_lanes(block: np.ndarray) -> None:
    """Add up the `LANES` lanes of every sum and of the score, always in the same order, in the first of them."""
    for row in range(_FOUND, _FOUND + SUMS + 1):
        for k in range(8):
            block[cell(row, k)] += block[cell(row, 8 + k)]
        for k in range(4):
            block[cell(row, k)] += block[cell(row, 4 + k)]
        block[cell(row, 0)] += block[cell(row, 2)]
        block[cell(row, 0)] += block[cell(row, 1)] + block[cell(row, 3)]


# ----------------------------------------------------------------------------------------------------------- fragments


@njit(cache=True, error_model="numpy", nogil=True)
def _superpose_fragments(
    x: np.ndarray, y: np.ndarray, y_back: np.ndarray, d0: float, near: float, guess: np.ndarray
) -> None:
    """The best alignment in the superposition of a short or a long fragment of x on one of y. Source: get_initial5."""
    count_x, count_y = x.shape[1], y.shape[1]
    lanes = LANES if (count_x + count_y) * count_x * LANES < _MOST_CHOICES else 1
    space, tables, scores = workspace(count_x, count_y, lanes), _tables(), np.empty(LANES)
    y_lanes, moved = _in_lanes(y_back, lanes), lined_up(3 * count_x * lanes).reshape(3, -1)
    mobile, fixed = np.empty((3, lanes * count_y), dtype=np.float32), np.empty((3, lanes * count_y), dtype=np.float32)
    found, faced = np.empty((lanes, count_y), dtype=np.int64), np.zeros((lanes, 3), dtype=np.int64)
    places = _fragment_places(count_x, count_y)
    best = 0.0
    for first in range(0, len(places), lanes):
        batch = places[first : first + lanes]
        tables[2][:] = 0.0
        for lane in range(len(batch)):
            _collect(x, y, batch[lane], tables[2], lane, 1.0, np.inf, tables[3], tables[0])
        best_motions(tables[0], tables[1], tables[2])
        _move_in_lanes(x, tables[2], lanes, moved)
        fill(moved, y_lanes, lanes, 1.0 / (d0 + 1.5) ** 2, 0.0, 0.0, _NO_MARKS, _NO_MARKS, space)
        for lane in range(len(batch)):
            trace_back(space[3], count_x, count_y, lane, lanes, found[lane])
            pair = paired(x, y, found[lane])
            start, size = lane * count_y, pair[0].shape[1]
            for axis in range(3):
                copy(pair[0][axis], mobile[axis, start:])
                copy(pair[1][axis], fixed[axis, start:])
            faced[lane, 0], faced[lane, 1], faced[lane, 2] = start, start, size
        _quick_scores(mobile, fixed, faced[: len(batch)], d0, near, tables, scores)
        for lane in range(len(batch)):
            if scores[lane] > best:
                best = scores[lane]
                copy(found[lane], guess)


@njit(cache=True, error_model="numpy")
def _fragment_places(count_x: int, count_y: int) -> np.ndarray:
    """[P, 3] starts of the fragments of x and of y, and their length."""
    shorter, jump_x, jump_y = min(count_x, count_y), _jump(count_x), _jump(count_y)
    places = []
    for size in (min(20, shorter // 3), min(100, shorter // 2)):
        for i in range(0, count_x - size + 1, jump_x):
            for j in range(0, count_y - size + 1, jump_y):
                places.append((i, j, size))  # noqa: PERF401
    return np.array(places)


@njit(cache=True, error_model="numpy")
def _in_lanes(xyz: np.ndarray, lanes: int) -> np.ndarray:
    """[3, L * lanes]: every point `lanes` times."""
    wide = lined_up(3 * xyz.shape[1] * lanes).reshape(3, -1)
    for axis in range(3):
        for place in range(xyz.shape[1]):
            wide[axis, place * lanes : (place + 1) * lanes] = xyz[axis, place]
    return wide


@njit(cache=True, error_model="numpy")
def _move_in_lanes(xyz: np.ndarray, motions: np.ndarray, lanes: int, wide: np.ndarray) -> None:
    """Write [3, L * lanes]: every point after each lane's motion."""
    for axis in range(3):
        row, first, second, third = wide[axis], 3 * axis, 3 * axis + 1, 3 * axis + 2
        for place in range(xyz.shape[1]):
            x, y, z, start = xyz[0, place], xyz[1, place], xyz[2, place], np.uint64(place * lanes)
            for lane in range(lanes):
                turned = (
                    motions[cell(first, lane)] * x + motions[cell(second, lane)] * y + motions[cell(third, lane)] * z
                )
                row[start + np.uint64(lane)] = turned + motions[cell(9 + axis, lane)]


@njit(cache=True, error_model="numpy")
def _jump(count: int) -> int:
    """Residues between the starts of fragments."""
    jump = 45 if count > 250 else 35 if count > 200 else 25 if count > 150 else 15
    return min(jump, count // 3)


def _thread_fragments(x: np.ndarray, y: np.ndarray, d0: float, near: float, guess: np.ndarray) -> None:
    """Slide the longest unbroken fragment of one side, its middle if that is all, along the other side."""
    count_x, count_y = x.shape[1], y.shape[1]
    x_start, x_size = _longest_fragment(x)
    y_start, y_size = _longest_fragment(y)
    use_x = x_size < y_size or (x_size == y_size and count_x <= count_y)
    use_y = x_size > y_size or (x_size == y_size and count_x >= count_y)
    shorter, best = min(count_x, count_y), -1.0
    if use_x:
        if x_size == shorter:
            x_start, x_size = x_start + int(shorter * 0.1), int(shorter * 0.89) - int(shorter * 0.1) + 1
        least = max(int(min(x_size, count_y) / 2.5), 3)
        best = _thread(x, y, x_start, x_size, 0, count_y, least, d0, near, best, guess)
    if use_y:
        if y_size == shorter:
            y_start, y_size = y_start + int(shorter * 0.1), int(shorter * 0.89) - int(shorter * 0.1) + 1
        least = max(int(min(count_x, y_size) / 2.5), 3)
        _thread(x, y, 0, count_x, y_start, y_size, least, d0, near, best, guess)


@njit(cache=True, error_model="numpy", nogil=True)
def _longest_fragment(xyz: np.ndarray) -> tuple[int, int]:
    """Start and length of the longest run of short steps; what is short grows by a tenth until four are in a run."""
    count = xyz.shape[1]
    needed, step = min(count // 3, 4), _BREAK
    while True:
        start, longest, begin = 0, 0, 0
        for i in range(1, count + 1):
            joined = False
            if i < count:
                a, b, c = xyz[0, i] - xyz[0, i - 1], xyz[1, i] - xyz[1, i - 1], xyz[2, i] - xyz[2, i - 1]
                joined = a * a + b * b + c * c < step * step
            if not joined:
                if i - begin > longest:
                    start, longest = begin, i - begin
                begin = i
        if longest >= needed:
            return start, longest
        step *= 1.1
