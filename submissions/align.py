"""Sequence-independent TM-score of C1' traces: which residue faces which is found from the shapes. Lengths in Å.

What US-align does by default for RNA: five first guesses of the alignment (gapless threading, secondary structure,
superposed fragments, superposition with secondary structure, threading of the longest fragment), each improved by
dynamic programming in the superposition of the alignment before; the best is searched thoroughly, pairs that stay far
apart are dropped, and the rest is scored with the reference's d0 and length. Residue names matter: the secondary
structure is that of residues which can pair. An alignment that was searched before is not searched again.

The steps of a pair are Python and what loops over residues is compiled: all in one, it took twice as long to compile.

Letters: X residues of the model, Y of the reference, N pairs of traces, 3 xyz.

Source:
    Zhang and Skolnick 2005, Nucleic Acids Res. 33:2302; Gong et al. 2019, Bioinformatics 35:4459; Zhang et al. 2022,
    Nat. Methods 19:1109 (defaults of `USalign -atom " C1'"`).
"""

from collections.abc import Sequence

import numpy as np

from pipeline.compiled import copy, njit
from submissions.dynamic import Workspace, align_by, columns, moved_by, paired, workspace
from submissions.first_guesses import Shapes, first_guess, secondary
from submissions.seed_search import FAR, MOTION, NEAR, search
from submissions.tm_score import centred, counts, d0_rna, in_threads, joined, resolved

#: What `evaluate` and reports call this code.
ENGINE = "built-in sequence-independent alignment"

_MIN_RESIDUES = 3  # of each side; with fewer the score is 0, as in the competition
_COARSE = 40  # pairs between the starts of seeds while alignments are compared; US-align: simplify_step
_REMEMBERED = 512  # alignments whose search is remembered, a power of two
_GAP = -0.6  # of the first of two rounds of dynamic programming; the second has none

#: Of all traces of one side, one behind the other: [T, 3] Å, [T] residues that are there, [T] codes of their names, and
#: [N + 1] where each trace begins and the last ends.
_Side = tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]
#: d0, near, farthest and step of `search`.
_Measures = tuple[float, float, float, int]

_CODES = np.zeros(256, dtype=np.uint8)  # of letters; 0 pairs with nothing
_CODES[np.frombuffer(b"ACGUTacgut", dtype=np.uint8)] = 1, 2, 3, 4, 4, 1, 2, 3, 4, 4


def tm_aligns(pairs: Sequence[tuple[np.ndarray, np.ndarray, str, str]]) -> np.ndarray:
    """TM-scores of pairs of traces, each by the alignment that its shape suggests, normalised by the native's residues.

    A pair of 1,460 nt takes 1.4 s of a thread, one of 2,400 nt 11 s; from there it grows with the fourth power, as many
    fragments are superposed and each superposition is aligned.

    Args:
        pairs: (model, native, names of the model, names of the native): traces [X, 3] and [Y, 3] Å, NaN or a sentinel
            where missing; X and Y letters, of which others than A, C, G, U and T pair with nothing.

    Returns:
        [N] float64 in [0, 1]; 0 if one of the two has fewer than three residues.

    Raises:
        ValueError: a trace is not [L, 3], or has not as many names as residues.
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
            raise ValueError(f"tm_aligns: got {got}; expected [L, 3] and L names")
    xyz_T3, offsets = joined([xyz_L3 for xyz_L3, _ in traces])
    letters = "".join(names for _, names in traces).encode("ascii", errors="replace")
    return xyz_T3, resolved(xyz_T3), _CODES[np.frombuffer(letters, dtype=np.uint8)], offsets


def _align_all(models: _Side, natives: _Side, scales: np.ndarray, share: np.ndarray, scores: np.ndarray) -> None:
    """Scores of the pairs in `share`; each is aligned by one thread, so their number changes nothing."""
    for pair in share:
        x, x_names = _one(models, pair)
        y, y_names = _one(natives, pair)
        if min(len(x_names), len(y_names)) >= _MIN_RESIDUES:
            scores[pair] = _align(x, y, x_names, y_names, scales[pair])


def _one(side: _Side, pair: int) -> tuple[np.ndarray, np.ndarray]:
    """[3, R] float32 about the centre and [R] codes of one trace's residues that are there."""
    xyz_T3, there_T, names_T, offsets = side
    start, end = offsets[pair], offsets[pair + 1]
    return centred(xyz_T3, there_T, start, end), names_T[start:end][there_T[start:end]]


def _align(x: np.ndarray, y: np.ndarray, x_names: np.ndarray, y_names: np.ndarray, final_d0: float) -> float:
    """Score of one pair: the alignment is the best by the measures of the search, its score by the final ones."""
    shorter = min(x.shape[1], y.shape[1])
    d0 = (0.168 if shorter <= 19 else 1.24 * (shorter - 15.0) ** (1.0 / 3.0) - 1.8) + 0.8
    near, farthest = min(max(d0, NEAR), FAR), 1.5 * shorter**0.3 + 3.5
    chosen = _best_alignment(x, y, secondary(x, x_names), secondary(y, y_names), d0, near, farthest)
    mobile, fixed = paired(x, y, chosen)
    if mobile.shape[1] == 0:
        return 0.0
    motion = np.empty(MOTION)
    search(mobile, fixed, d0, near, farthest, 1, motion)
    kept = _within(moved_by(mobile, motion), fixed, farthest)
    if len(kept) == 0:
        return 0.0
    final_near = min(max(final_d0, NEAR), FAR)
    score = search(columns(mobile, kept), columns(fixed, kept), final_d0, final_near, np.inf, 1, motion)
    return score / y.shape[1]


@njit(cache=True, error_model="numpy", nogil=True)
def _within(moved: np.ndarray, fixed: np.ndarray, farthest: float) -> np.ndarray:
    """[K] int64: the pairs that lie at most so far apart."""
    kept = np.empty(moved.shape[1], dtype=np.int64)
    count = 0
    for k in range(moved.shape[1]):
        a, b, c = moved[0, k] - fixed[0, k], moved[1, k] - fixed[1, k], moved[2, k] - fixed[2, k]
        if np.float64(a) ** 2 + np.float64(b) ** 2 + np.float64(c) ** 2 <= farthest * farthest:
            kept[count] = k
            count += 1
    return kept[:count]


def _best_alignment(
    x: np.ndarray, y: np.ndarray, x_marks: np.ndarray, y_marks: np.ndarray, d0: float, near: float, farthest: float
) -> np.ndarray:
    """[Y] int64: the residue of x that faces each of y, or -1; the best that five first guesses lead to."""
    count = y.shape[1]
    measures = (d0, near, farthest, _COARSE)
    memory = (np.zeros(_REMEMBERED, dtype=np.uint64), np.empty((_REMEMBERED, MOTION + 1)))
    shapes = (x, y, np.ascontiguousarray(y[:, ::-1]), x_marks, np.ascontiguousarray(y_marks[::-1]))
    space = workspace(x.shape[1], count, 1)
    guess, found, chosen = np.full(count, -1), np.full(count, -1), np.full(count, -1)
    motion, best = np.empty(MOTION), -1.0
    worth = 0.1 if min(x.shape[1], count) <= 40 else 0.4  # US-align: ddcc
    for start in range(5):
        first_guess(start, shapes, d0, near, chosen, space, guess)
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


@njit(cache=True, error_model="numpy", nogil=True)
def _improve(
    shapes: Shapes,
    motion: np.ndarray,
    without_gap_only: bool,
    rounds: int,
    measures: _Measures,
    memory: tuple[np.ndarray, np.ndarray],
    space: Workspace,
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
            align_by(moved_by(x, motion), y_back, inverse, 0.0, gap, x_marks, y_marks_back, space, found)
            score = _search_alignment(x, y, found, measures, memory, motion)
            if score > best:
                best = score
                copy(found, chosen)
            if iteration > 0 and abs(score - before) < 1e-6 * min(x.shape[1], y.shape[1]):
                break
            before = score
    return best


@njit(cache=True, error_model="numpy", nogil=True)
def _search_alignment(
    x: np.ndarray,
    y: np.ndarray,
    chosen: np.ndarray,
    measures: _Measures,
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
        copy(results[slot, :MOTION], motion)
        return results[slot, MOTION]
    mobile, fixed = paired(x, y, chosen)
    if mobile.shape[1] == 0:
        return -1.0
    score = search(mobile, fixed, measures[0], measures[1], measures[2], measures[3], motion)
    names[slot] = name
    copy(motion, results[slot])
    results[slot, MOTION] = score
    return score
