"""Alignments by dynamic programming: the residue of x that faces each of y, where both lie. Lengths in Å.

Distances, similarities and cells of the tables are computed along anti-diagonals, in SIMD; so are several
superpositions side by side, where asked.

Letters: X and Y residues of the two traces, P pairs of an alignment, 3 xyz.

Source:
    NWDP_TM of US-align (Zhang et al. 2022, Nat. Methods 19:1109).
"""

import numpy as np

from pipeline.compiled import njit
from submissions.seed_search import lined_up

_MATCH, _GAP_IN_X = 1, 2  # bits of how a cell's value came about; a gap in y has none

#: Of `workspace`: three diagonals of values, two of values after a gap, one of similarities, all choices.
Workspace = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]


@njit(cache=True, error_model="numpy", nogil=True)
def workspace(count_x: int, count_y: int, lanes: int) -> Workspace:
    """Room for `fill`, for so many residues of x and of y."""
    width = (count_x + 1) * lanes
    return (
        lined_up(3 * width),
        lined_up(2 * width),
        lined_up(width),
        np.zeros((count_x + count_y + 1) * width, dtype=np.uint8),
    )


@njit(cache=True, error_model="numpy", nogil=True)
def align_by(
    moved: np.ndarray,
    y_back: np.ndarray,
    inverse: float,
    bonus: float,
    gap: float,
    x_marks: np.ndarray,
    y_marks_back: np.ndarray,
    space: Workspace,
    chosen: np.ndarray,
) -> None:
    """Best alignment of one superposition by dynamic programming, written to `chosen`; arguments as of `fill`."""
    fill(moved, y_back, 1, inverse, bonus, gap, x_marks, y_marks_back, space)
    trace_back(space[3], moved.shape[1], y_back.shape[1], 0, 1, chosen)


@njit(cache=True, error_model="numpy")
def fill(
    moved: np.ndarray,
    y_back: np.ndarray,
    lanes: int,
    inverse: float,
    bonus: float,
    gap: float,
    x_marks: np.ndarray,
    y_marks_back: np.ndarray,
    space: Workspace,
) -> None:
    """Tables of the dynamic programme: free gaps at the ends, a gap charged where it opens after a match.

    The cells of an anti-diagonal do not depend on each other, nor do several superpositions side by side (lanes): all
    of them are one step of SIMD loops.

    Args:
        moved: [3, X * lanes] float32 Å, x in the frame of y; lanes of a residue side by side.
        y_back: [3, Y * lanes] float32 Å, in reverse order.
        lanes: superpositions.
        inverse: 1 / d0^2 of the similarity 1 / (1 + (d / d0)^2); negative for none.
        bonus: added to the similarity where the marks agree; with one lane only.
        gap: at most 0.
        x_marks: [X] uint8.
        y_marks_back: [Y] uint8, in reverse order.
        space: of `workspace`; its last part receives how the value of every cell came about.

    Source:
        US-align, NWDP_TM.
    """
    values, opened, row, choices = space
    count_x, count_y = moved.shape[1] // lanes, y_back.shape[1] // lanes
    width = (count_x + 1) * lanes
    xs, ys = moved.reshape(-1), y_back.reshape(-1)
    values[:] = 0
    opened[:] = 0
    for k in range(2, count_x + count_y + 1):
        low, high = max(1, k - count_y), min(count_x, k - 1)
        size, start, back = (high - low + 1) * lanes, low * lanes, count_y - k + low
        if inverse >= 0.0:
            _similarity(
                xs, moved.shape[1], start - lanes, ys, y_back.shape[1], back * lanes, np.float32(inverse), size, row
            )
        else:
            row[:size] = 0
        if bonus > 0.0:
            _add_bonus(x_marks, low - 1, y_marks_back, back, np.float32(bonus), size, row)
        before, now, place = ((k + 1) % 3) * width + start - lanes, (k % 3) * width, k * width + start
        old, new = ((k + 1) % 2) * width + start - lanes, (k % 2) * width
        _choose(
            values, before, now + start, opened, old, new + start, lanes, row, np.float32(gap), choices, place, size
        )
        _clear(opened, new, k * lanes, lanes, width)
        _clear(values, now, k * lanes, lanes, width)


@njit(cache=True, error_model="numpy")
def _clear(values: np.ndarray, start: int, end: int, lanes: int, width: int) -> None:
    """Zero the cells of a diagonal before the first residue of x and, if there is one, of y."""
    values[start : start + lanes] = 0
    if end < width:
        values[start + end : start + end + lanes] = 0


@njit(cache=True, error_model="numpy")
def trace_back(choices: np.ndarray, count_x: int, count_y: int, lane: int, lanes: int, chosen: np.ndarray) -> None:
    """[Y] residues of x along the way that `choices` tell from the last cell."""
    chosen[:] = -1
    i, j, width = count_x, count_y, count_x + 1
    while i > 0 and j > 0:
        choice = choices[((i + j) * width + i) * lanes + lane]
        if choice & _MATCH:
            chosen[j - 1] = i - 1
            i, j = i - 1, j - 1
        elif choice & _GAP_IN_X:
            j -= 1
        else:
            i -= 1


# Offsets below are unsigned: a signed index may count from the end, which keeps a loop from becoming SIMD.


@njit(cache=True, error_model="numpy")
def _similarity(
    xs: np.ndarray,
    x_width: int,
    x_start: int,
    ys: np.ndarray,
    y_width: int,
    y_start: int,
    inverse: np.float32,
    size: int,
    row: np.ndarray,
) -> None:
    """1 / (1 + (d / d0)^2) along an anti-diagonal."""
    one = np.float32(1.0)
    x0, x1, x2 = np.uint64(x_start), np.uint64(x_start + x_width), np.uint64(x_start + 2 * x_width)
    y0, y1, y2 = np.uint64(y_start), np.uint64(y_start + y_width), np.uint64(y_start + 2 * y_width)
    for place in range(size):
        i = np.uint64(place)
        a, b, c = xs[x0 + i] - ys[y0 + i], xs[x1 + i] - ys[y1 + i], xs[x2 + i] - ys[y2 + i]
        row[i] = one / (one + (a * a + b * b + c * c) * inverse)


@njit(cache=True, error_model="numpy")
def _add_bonus(
    x_marks: np.ndarray,
    x_start: int,
    y_marks: np.ndarray,
    y_start: int,
    bonus: np.float32,
    size: int,
    row: np.ndarray,
) -> None:
    """More similarity where the marks agree."""
    x0, y0 = np.uint64(x_start), np.uint64(y_start)
    for place in range(size):
        i = np.uint64(place)
        row[i] += bonus if x_marks[x0 + i] == y_marks[y0 + i] else np.float32(0.0)


@njit(cache=True, error_model="numpy")
def _choose(
    values: np.ndarray,
    before_start: int,
    now_start: int,
    opened: np.ndarray,
    above_start: int,
    new_start: int,
    lanes: int,
    row: np.ndarray,
    gap: np.float32,
    choices: np.ndarray,
    choice_start: int,
    size: int,
) -> None:
    """Values along an anti-diagonal, those for what follows a gap that opens there, and how they came about.

    A match wins a tie.
    """
    before, now, chosen = np.uint64(before_start), np.uint64(now_start), np.uint64(choice_start)
    above, beside, new = np.uint64(above_start), np.uint64(above_start + lanes), np.uint64(new_start)
    for place in range(size):
        i = np.uint64(place)
        match, up, left = values[before + i] + row[i], opened[above + i], opened[beside + i]
        side = max(up, left)
        values[now + i] = max(match, side)
        opened[new + i] = side if match < side else match + gap
        choices[chosen + i] = np.uint8(match >= side) | (np.uint8(left >= up) << np.uint8(1))


@njit(cache=True, error_model="numpy", nogil=True)
def paired(x: np.ndarray, y: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[3, P] of both sides of an alignment."""
    places = np.flatnonzero(chosen >= 0)
    return columns(x, chosen[places]), columns(y, places)


@njit(cache=True, error_model="numpy", nogil=True)
def columns(xyz: np.ndarray, places: np.ndarray) -> np.ndarray:
    """[3, P] float32: some columns of a trace."""
    taken = np.empty((3, len(places)), dtype=np.float32)
    for axis in range(3):
        for k in range(len(places)):
            taken[axis, k] = xyz[axis, places[k]]
    return taken


@njit(cache=True, error_model="numpy", nogil=True)
def moved_by(xyz: np.ndarray, motion: np.ndarray) -> np.ndarray:
    """[3, L] float32 after a motion."""
    moved = np.empty_like(xyz)
    xs, ys, zs = xyz[0], xyz[1], xyz[2]
    for axis in range(3):
        a, b, c = np.float32(motion[3 * axis]), np.float32(motion[3 * axis + 1]), np.float32(motion[3 * axis + 2])
        shift, row = np.float32(motion[9 + axis]), moved[axis]
        for i in range(len(xs)):
            row[i] = a * xs[i] + b * ys[i] + c * zs[i] + shift
    return moved
