"""Sequence-independent TM-score of C1' traces: which residue faces which is found from the shapes. Lengths in Å.

What US-align does by default for RNA: five first guesses of the alignment (gapless threading, secondary structure,
superposed fragments, superposition with secondary structure, threading of the longest fragment), each improved by
dynamic programming in the superposition of the alignment before; the best is searched thoroughly, pairs that stay far
apart are dropped, and the rest is scored with the reference's d0 and length. Residue names matter: the secondary
structure is that of residues which can pair.

An alignment that was searched before is not searched again, and distances, scores and cells of the dynamic programme
are computed along anti-diagonals in SIMD.

Letters: X residues of the model, Y of the reference, N pairs of traces, 3 xyz.

Source:
    Zhang and Skolnick 2005, Nucleic Acids Res. 33:2302; Gong et al. 2019, Bioinformatics 35:4459; Zhang et al. 2022,
    Nat. Methods 19:1109 (defaults of `USalign -atom " C1'"`).
"""

from collections.abc import Sequence

import numpy as np

from pipeline.compiled import njit
from submissions.seed_search import (
    FAR,
    LANES,
    MOTION,
    NEAR,
    NOWHERE,
    SUMS,
    apart,
    best_motions,
    cell,
    fused,
    lined_up,
    pair_terms,
    search,
    take_motion,
)
from submissions.tm_score import centred, counts, d0_rna, in_threads, joined, resolved

#: What `evaluate` and reports call this code.
ENGINE = "built-in sequence-independent alignment"

_MIN_RESIDUES = 3  # of each side; with fewer the score is 0, as in the competition
_COARSE = 40  # pairs between the starts of seeds while alignments are compared; US-align: simplify_step
_PAIRED = (12.5, 15.0)  # Å between residues of a pair: US-align's limits for C3', which it takes for C1' as well
_BREAK = 4.25  # Å: longer steps end a fragment, at first; US-align: dcu0
_REMEMBERED = 512  # alignments whose search is remembered, a power of two
_FOUND = 6  # row of a block, behind its pairs, where their sums begin; the score follows
_ANYWHERE = 1e29  # Å^2: any pair is nearer, but for those that fill up a block
_GAP = -0.6  # of the first of two rounds of dynamic programming; the second has none
_GAP_STRUCTURE = -1.0  # where secondary structure counts
_BONUS = 0.5  # for equal secondary structure, beside a similarity in (0, 1]
_MATCH, _GAP_IN_X = 1, 2  # bits of how a cell's value came about; a gap in y has none
_NO_MARKS = np.zeros(0, dtype=np.uint8)
_MOST_CHOICES = 2**25  # bytes of choices, beyond which there is one lane only

#: Of all traces of one side, one behind the other: [T, 3] Å, [T] residues that are there, [T] codes of their names, and
#: [N + 1] where each trace begins and the last ends.
_Side = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
#: Sums, room and motions of `LANES` superpositions, as `best_motions` takes them; a block of pairs with what is found.
_Tables = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]

_CODES = np.zeros(256, dtype=np.uint8)  # of letters; 0 pairs with nothing
_CODES[np.frombuffer(b"ACGUTacgut", dtype=np.uint8)] = 1, 2, 3, 4, 4, 1, 2, 3, 4, 4


def tm_align(model_X3: np.ndarray, native_Y3: np.ndarray, model_names: str, native_names: str) -> float:
    """TM-score of one trace by the alignment that its shape suggests, normalised by the reference's resolved residues.

    Args:
        model_X3: [X, 3] Å; NaN, or a sentinel, where missing.
        native_Y3: [Y, 3] Å; NaN, or a sentinel, where not resolved. X and Y may differ.
        model_names: X letters; other letters than A, C, G, U and T pair with nothing.
        native_names: Y letters.

    Returns:
        Score in [0, 1]; 0 if one of the two has fewer than three residues.

    Raises:
        ValueError: a trace is not [L, 3], or has not as many names as residues.
    """
    return float(tm_aligns([(model_X3, native_Y3, model_names, native_names)])[0])


def tm_aligns(pairs: Sequence[tuple[np.ndarray, np.ndarray, str, str]]) -> np.ndarray:
    """Sequence-independent TM-scores of many pairs of traces, in parallel.

    A pair of 1,460 nt takes 1.4 s of a thread, one of 2,400 nt 11 s; from there it grows with the fourth power, as many
    fragments are superposed and each superposition is aligned.

    Args:
        pairs: (model, native, names of the model, names of the native), as in `tm_align`.

    Returns:
        [N] float64 in [0, 1].

    Raises:
        ValueError: as in `tm_align`.
    """
    if not pairs:
        return np.zeros(0)
    models = _side([(pair[0], pair[2]) for pair in pairs])
    natives = _side([(pair[1], pair[3]) for pair in pairs])
    model_lengths, native_lengths = (counts(there_T, offsets) for _, there_T, _, offsets in (models, natives))
    scales = np.array([d0_rna(max(int(length), 1)) for length in native_lengths])
    scores = np.zeros(len(pairs))

    def work(share: np.ndarray) -> None:
        _align_all(models, natives, scales, share, scores)

    in_threads(work, model_lengths * native_lengths)
    return np.minimum(scores, 1.0)


def _side(traces: Sequence[tuple[np.ndarray, str]]) -> _Side:
    """The traces of one side one behind the other."""
    for xyz_L3, names in traces:
        if xyz_L3.ndim != 2 or xyz_L3.shape[1] != 3 or len(names) != len(xyz_L3):
            got = f"a trace {xyz_L3.shape} and {len(names)} names"
            raise ValueError(f"tm_align: got {got}; expected [L, 3] and L names")
    xyz_T3, offsets = joined([xyz_L3 for xyz_L3, _ in traces])
    letters = "".join(names for _, names in traces).encode("ascii", errors="replace")
    return xyz_T3, resolved(xyz_T3), _CODES[np.frombuffer(letters, dtype=np.uint8)], offsets


@njit(cache=True, nogil=True)
def _align_all(models: _Side, natives: _Side, scales: np.ndarray, share: np.ndarray, scores: np.ndarray) -> None:
    """Scores of the pairs in `share`; each is aligned by one thread, so their number changes nothing."""
    for pair in share:
        x, x_names = _one(models, pair)
        y, y_names = _one(natives, pair)
        if min(len(x_names), len(y_names)) >= _MIN_RESIDUES:
            scores[pair] = _align(x, y, x_names, y_names, scales[pair])


@njit(cache=True)
def _one(side: _Side, pair: int) -> tuple[np.ndarray, np.ndarray]:
    """[3, R] float32 about the centre and [R] codes of one trace's residues that are there."""
    xyz_T3, there_T, names_T, offsets = side
    start, end = offsets[pair], offsets[pair + 1]
    return centred(xyz_T3, there_T, start, end), names_T[start:end][there_T[start:end]]


@njit(cache=True, error_model="numpy")
def _align(x: np.ndarray, y: np.ndarray, x_names: np.ndarray, y_names: np.ndarray, final_d0: float) -> float:
    """Score of one pair: the alignment is the best by the measures of the search, its score by the final ones."""
    shorter = min(x.shape[1], y.shape[1])
    d0 = (0.168 if shorter <= 19 else 1.24 * (shorter - 15.0) ** (1.0 / 3.0) - 1.8) + 0.8
    near, farthest = min(max(d0, NEAR), FAR), 1.5 * shorter**0.3 + 3.5
    chosen = _best_alignment(x, y, _secondary(x, x_names), _secondary(y, y_names), d0, near, farthest)
    mobile, fixed = _paired(x, y, chosen)
    if mobile.shape[1] == 0:
        return 0.0
    motion = np.empty(MOTION)
    search(mobile, fixed, d0, near, farthest, 1, motion)
    apart = _moved(mobile, motion) - fixed
    kept = np.flatnonzero(apart[0] ** 2 + apart[1] ** 2 + apart[2] ** 2 <= farthest * farthest)
    if len(kept) == 0:
        return 0.0
    final_near = min(max(final_d0, NEAR), FAR)
    score = search(_columns(mobile, kept), _columns(fixed, kept), final_d0, final_near, np.inf, 1, motion)
    return score / y.shape[1]


@njit(cache=True, error_model="numpy")
def _best_alignment(
    x: np.ndarray, y: np.ndarray, x_marks: np.ndarray, y_marks: np.ndarray, d0: float, near: float, farthest: float
) -> np.ndarray:
    """[Y] int64: the residue of x that faces each of y, or -1; the best that five first guesses lead to."""
    count = y.shape[1]
    measures = (d0, near, farthest)
    memory = (np.zeros(_REMEMBERED, dtype=np.uint64), np.empty((_REMEMBERED, MOTION + 1)))
    shapes = (x, y, np.ascontiguousarray(y[:, ::-1]), x_marks, np.ascontiguousarray(y_marks[::-1]))
    space = _workspace(x.shape[1], count, 1)
    guess, found, chosen = np.full(count, -1), np.full(count, -1), np.full(count, -1)
    motion, best = np.empty(MOTION), -1.0
    worth = 0.1 if min(x.shape[1], count) <= 40 else 0.4  # US-align: ddcc
    for start in range(5):
        _guess(start, shapes, d0, near, chosen, space, guess)
        score = _search_alignment(x, y, guess, measures, memory, motion)
        if score > best:
            best = score
            chosen[:] = guess
        if start == 0 or score > (0.2 if start == 1 else worth) * best:
            rounds = 2 if start == 2 or start == 4 else 30
            score = _improve(shapes, motion, start == 4, rounds, measures, memory, space, found)
            if score > best:
                best = score
                chosen[:] = found
    return chosen


@njit(cache=True, error_model="numpy")
def _guess(
    start: int,
    shapes: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray],
    d0: float,
    near: float,
    chosen: np.ndarray,
    space: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray],
    guess: np.ndarray,
) -> None:
    """Write one of five first guesses; the fourth starts from `chosen`, the best alignment so far."""
    x, y, y_back, x_marks, y_marks_back = shapes
    if start == 0:
        shorter = min(x.shape[1], y.shape[1])
        _thread(x, y, 0, x.shape[1], 0, y.shape[1], max(shorter // 2, 5), d0, near, -1.0, guess)
    elif start == 1:
        _dynamic(x, y_back, -1.0, 1.0, _GAP_STRUCTURE, x_marks, y_marks_back, space, guess)
    elif start == 2:
        _superpose_fragments(x, y, y_back, d0, near, guess)
    elif start == 3:
        motion = np.empty(MOTION)
        mobile, fixed = _paired(x, y, chosen)
        tables = _tables()
        terms = pair_terms(mobile, fixed)
        for k in range(SUMS):
            tables[0][cell(k, 0)] = terms[:, k].sum()
        best_motions(tables[0], tables[1], tables[2])
        take_motion(tables[2], 0, motion)
        inverse = 1.0 / (d0 + 1.5) ** 2
        _dynamic(_moved(x, motion), y_back, inverse, _BONUS, _GAP_STRUCTURE, x_marks, y_marks_back, space, guess)
    else:
        _thread_fragments(x, y, d0, near, guess)


# --------------------------------------------------------------------------------------------------- first guesses


@njit(cache=True, error_model="numpy")
def _secondary(xyz: np.ndarray, names: np.ndarray) -> np.ndarray:
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


@njit(cache=True, error_model="numpy")
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
            stretches[lane] = x_start + first + low + lane, y_start + first, last - first
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


@njit(cache=True, error_model="numpy")
def _superpose_fragments(
    x: np.ndarray, y: np.ndarray, y_back: np.ndarray, d0: float, near: float, guess: np.ndarray
) -> None:
    """The best alignment in the superposition of a short or a long fragment of x on one of y. Source: get_initial5."""
    count_x, count_y = x.shape[1], y.shape[1]
    lanes = LANES if (count_x + count_y) * count_x * LANES < _MOST_CHOICES else 1
    space, tables, scores = _workspace(count_x, count_y, lanes), _tables(), np.empty(LANES)
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
        _fill(moved, y_lanes, lanes, 1.0 / (d0 + 1.5) ** 2, 0.0, 0.0, _NO_MARKS, _NO_MARKS, space)
        for lane in range(len(batch)):
            _trace_back(space[3], count_x, count_y, lane, lanes, found[lane])
            pair = _paired(x, y, found[lane])
            start, size = lane * count_y, pair[0].shape[1]
            mobile[:, start : start + size], fixed[:, start : start + size] = pair
            faced[lane] = start, start, size
        _quick_scores(mobile, fixed, faced[: len(batch)], d0, near, tables, scores)
        for lane in range(len(batch)):
            if scores[lane] > best:
                best = scores[lane]
                guess[:] = found[lane]


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


@njit(cache=True, error_model="numpy")
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


@njit(cache=True, error_model="numpy")
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


# --------------------------------------------------------------------------------------------------------- improvement


@njit(cache=True, error_model="numpy")
def _improve(
    shapes: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray],
    motion: np.ndarray,
    without_gap_only: bool,
    rounds: int,
    measures: tuple[float, float, float],
    memory: tuple[np.ndarray, np.ndarray],
    space: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray],
    chosen: np.ndarray,
) -> float:
    """Align in the superposition `motion`, superpose that alignment, and so on; write the best and return its score.

    Source: US-align, DP_iter.
    """
    x, y, y_back, x_marks, y_marks_back = shapes
    found, best, before = np.empty(y.shape[1], dtype=np.int64), -1.0, 0.0
    inverse = 1.0 / measures[0] ** 2
    for gap in (_GAP, 0.0):
        if without_gap_only and gap != 0.0:
            continue
        for iteration in range(rounds):
            _dynamic(_moved(x, motion), y_back, inverse, 0.0, gap, x_marks, y_marks_back, space, found)
            score = _search_alignment(x, y, found, measures, memory, motion)
            if score > best:
                best = score
                chosen[:] = found
            if iteration > 0 and abs(score - before) < 1e-6 * min(x.shape[1], y.shape[1]):
                break
            before = score
    return best


@njit(cache=True, error_model="numpy")
def _search_alignment(
    x: np.ndarray,
    y: np.ndarray,
    chosen: np.ndarray,
    measures: tuple[float, float, float],
    memory: tuple[np.ndarray, np.ndarray],
    motion: np.ndarray,
) -> float:
    """Score and best motion of an alignment; one that was searched before is looked up."""
    names, results = memory
    name = np.uint64(1)
    for place in chosen:
        name = (name ^ np.uint64(place + 1)) * np.uint64(0x9E3779B97F4A7C15)
        name ^= name >> np.uint64(29)
    name |= np.uint64(1)  # 0 marks an empty place
    slot = name >> np.uint64(32) & np.uint64(_REMEMBERED - 1)
    if names[slot] == name:
        motion[:] = results[slot, :MOTION]
        return results[slot, MOTION]
    mobile, fixed = _paired(x, y, chosen)
    if mobile.shape[1] == 0:
        return -1.0
    score = search(mobile, fixed, measures[0], measures[1], measures[2], _COARSE, motion)
    names[slot] = name
    results[slot, :MOTION] = motion
    results[slot, MOTION] = score
    return score


@njit(cache=True, error_model="numpy")
def _workspace(count_x: int, count_y: int, lanes: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Room for `_fill`: three diagonals of values, two of values after a gap, one of similarities, all choices."""
    width = (count_x + 1) * lanes
    return (
        lined_up(3 * width),
        lined_up(2 * width),
        lined_up(width),
        np.zeros((count_x + count_y + 1) * width, dtype=np.uint8),
    )


@njit(cache=True, error_model="numpy")
def _dynamic(
    moved: np.ndarray,
    y_back: np.ndarray,
    inverse: float,
    bonus: float,
    gap: float,
    x_marks: np.ndarray,
    y_marks_back: np.ndarray,
    space: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray],
    chosen: np.ndarray,
) -> None:
    """Best alignment of one superposition by dynamic programming, written to `chosen`; arguments as of `_fill`."""
    _fill(moved, y_back, 1, inverse, bonus, gap, x_marks, y_marks_back, space)
    _trace_back(space[3], moved.shape[1], y_back.shape[1], 0, 1, chosen)


@njit(cache=True, error_model="numpy")
def _fill(
    moved: np.ndarray,
    y_back: np.ndarray,
    lanes: int,
    inverse: float,
    bonus: float,
    gap: float,
    x_marks: np.ndarray,
    y_marks_back: np.ndarray,
    space: tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray],
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
        space: of `_workspace`; its last part receives how the value of every cell came about.

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
def _trace_back(choices: np.ndarray, count_x: int, count_y: int, lane: int, lanes: int, chosen: np.ndarray) -> None:
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


@njit(cache=True, error_model="numpy")
def _paired(x: np.ndarray, y: np.ndarray, chosen: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[3, P] of both sides of an alignment."""
    places = np.flatnonzero(chosen >= 0)
    return _columns(x, chosen[places]), _columns(y, places)


@njit(cache=True, error_model="numpy")
def _columns(xyz: np.ndarray, places: np.ndarray) -> np.ndarray:
    taken = np.empty((3, len(places)), dtype=np.float32)
    for axis in range(3):
        for k in range(len(places)):
            taken[axis, k] = xyz[axis, places[k]]
    return taken


@njit(cache=True, error_model="numpy")
def _moved(xyz: np.ndarray, motion: np.ndarray) -> np.ndarray:
    """[3, L] float32 after a motion."""
    moved = np.empty_like(xyz)
    xs, ys, zs = xyz[0], xyz[1], xyz[2]
    for axis in range(3):
        a, b, c = np.float32(motion[3 * axis]), np.float32(motion[3 * axis + 1]), np.float32(motion[3 * axis + 2])
        shift, row = np.float32(motion[9 + axis]), moved[axis]
        for i in range(len(xs)):
            row[i] = a * xs[i] + b * ys[i] + c * zs[i] + shift
    return moved
