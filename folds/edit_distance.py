"""Least edit distance of one sequence laid anywhere within another, 64 pairs at a time.

Myers' bit-vector algorithm keeps one column of the dynamic-programming matrix as two bits per pattern letter, 64
letters to a word. Here the same word of `LANES` pairs lies side by side, so that one vector instruction advances
several pairs; that is nine times as fast as one pair after the other (0.08 against 0.7 µs per pair of 103 nt, one
thread, AVX-512) and needs no early stop.

Letters: N sequences, T letters of all sequences, W words of a pattern, K lanes, G groups of K texts, P pairs.

Source:
    Myers 1999, J. ACM 46:395 (bit-vector, approximate matching); carries between words as in Hyyrö 2003, Nordic J.
    Computing 10:29. We differ in laying pairs side by side and in a fifth text letter that matches nothing, which pads
    texts to one length: it cannot lower the least distance, since dropping a pattern letter costs no more than
    replacing it.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from pipeline.compiled import njit, prange
from pipeline.errors import DataError
from pipeline.schema import encode

#: Pairs that are advanced together; 8, 16, 32 and 64 took 0.58, 0.17, 0.11 and 0.08 µs per pair.
LANES = 64

#: A design shorter than this, nt, lies in a long one by chance: of random ones, 23 % of 15 nt do within 4,000 nt at
#: 80 % identity, 0.005 % of 30 nt, none of 40 nt (41,000 pairs each). So it may not lie free in a longer one.
MIN_INFIX = 40

#: Distance of a pair that was not computed.
UNKNOWN = np.iinfo(np.uint16).max

#: Longest sequence: distances are kept in 16 bits.
MAX_LENGTH = UNKNOWN - 1

_NO_LETTER = 4
_ROWS_AT_ONCE = 256
_WORD = 64
_ZERO = np.uint64(0)
_ONE = np.uint64(1)
_TOP = np.uint64(_WORD - 1)


class Packed(NamedTuple):
    """Sequences as the kernels read them."""

    tokens_T: np.ndarray  #: uint8
    offsets_N: np.ndarray  #: [N + 1] int64, first letter of each sequence
    lengths_N: np.ndarray  #: int64, nt
    masks_W4: np.ndarray  #: uint64, bit i of a word is set where letter i of the pattern is that letter
    words_N: np.ndarray  #: [N + 1] int64, first word of each sequence


def pack(sequences: Sequence[str]) -> Packed:
    """Encode normalised sequences for the distance kernels.

    Raises:
        DataError: an empty sequence, or one longer than `MAX_LENGTH`.
    """
    lengths_N = np.fromiter((len(sequence) for sequence in sequences), dtype=np.int64, count=len(sequences))
    if lengths_N.size and (lengths_N.min() < 1 or lengths_N.max() > MAX_LENGTH):
        raise DataError(
            f"sequences of {lengths_N.min():,} to {lengths_N.max():,} nt; the comparison takes 1 to {MAX_LENGTH:,} nt. "
            "Next: leave the others out."
        )
    return pack_tokens(encode("".join(sequences)), lengths_N)


def pack_tokens(tokens_T: np.ndarray, lengths_N: np.ndarray) -> Packed:
    """As `pack`, of the letters of all sequences in one row."""
    offsets_N = np.concatenate([[0], np.cumsum(lengths_N)])
    words_N = np.concatenate([[0], np.cumsum((lengths_N + _WORD - 1) // _WORD)])
    masks_W4 = _letter_masks(tokens_T, offsets_N, words_N)
    return Packed(tokens_T, offsets_N, lengths_N, masks_W4, words_N)


@njit(cache=True)
def _letter_masks(tokens_T: np.ndarray, offsets_N: np.ndarray, words_N: np.ndarray) -> np.ndarray:
    masks_W4 = np.zeros((words_N[-1], 4), np.uint64)
    for index in range(offsets_N.size - 1):
        for place in range(offsets_N[index + 1] - offsets_N[index]):
            letter = tokens_T[offsets_N[index] + place]
            masks_W4[words_N[index] + place // _WORD, letter] |= _ONE << np.uint64(place % _WORD)
    return masks_W4


@njit(cache=True)
def _least(
    masks_W4K: np.ndarray, lengths_K: np.ndarray, text_LK: np.ndarray, column_2WK: np.ndarray, least_K: np.ndarray
) -> None:
    """Lay the pattern of every lane in its text; `column_2WK` is scratch, `least_K` (int32) takes the distances.

    All patterns have the same number of words W; a lane of another length gives a number without meaning.
    """
    words = masks_W4K.shape[0]
    up_K, down_K = np.empty(LANES, np.uint64), np.empty(LANES, np.uint64)
    top_K, tail_K = np.full(LANES, _TOP), np.empty(LANES, np.uint64)
    score_K = np.empty(LANES, np.int32)
    for lane in range(LANES):
        tail_K[lane] = np.uint64(lengths_K[lane] - 1) & _TOP
        score_K[lane] = least_K[lane] = lengths_K[lane]
    column_2WK[0, :words], column_2WK[1, :words] = ~_ZERO, _ZERO
    for place in range(text_LK.shape[0]):
        up_K[:], down_K[:] = _ZERO, _ZERO
        for word in range(words):
            bit_K = tail_K if word == words - 1 else top_K
            for lane in range(LANES):
                letter = text_LK[place, lane]
                odd = _ZERO - np.uint64(letter & 1)
                high = _ZERO - np.uint64((letter >> 1) & 1)
                known = np.uint64(letter >> 2) - _ONE
                low_pair = masks_W4K[word, 0, lane] ^ ((masks_W4K[word, 0, lane] ^ masks_W4K[word, 1, lane]) & odd)
                high_pair = masks_W4K[word, 2, lane] ^ ((masks_W4K[word, 2, lane] ^ masks_W4K[word, 3, lane]) & odd)
                equal = (low_pair ^ ((low_pair ^ high_pair) & high)) & known
                rises, falls = column_2WK[0, word, lane], column_2WK[1, word, lane]
                from_left = equal | falls
                equal |= down_K[lane]
                stays = (((equal & rises) + rises) ^ rises) | equal
                up, down = falls | ~(stays | rises), rises & stays
                carried_up, carried_down = up_K[lane], down_K[lane]
                up_K[lane], down_K[lane] = (up >> bit_K[lane]) & _ONE, (down >> bit_K[lane]) & _ONE
                up, down = (up << _ONE) | carried_up, (down << _ONE) | carried_down
                column_2WK[0, word, lane], column_2WK[1, word, lane] = down | ~(from_left | up), up & from_left
        for lane in range(LANES):
            score_K[lane] += np.int32(up_K[lane]) - np.int32(down_K[lane])
            least_K[lane] = min(least_K[lane], score_K[lane])


@njit(cache=True)
def _lay_pattern(packed: Packed, index: int, lane: int, masks_W4K: np.ndarray) -> None:
    first = packed.words_N[index]
    for word in range(packed.words_N[index + 1] - first):
        for letter in range(4):
            masks_W4K[word, letter, lane] = packed.masks_W4[first + word, letter]


@njit(cache=True)
def _lay_text(packed: Packed, index: int, lane: int, text_LK: np.ndarray) -> None:
    first, length = packed.offsets_N[index], packed.lengths_N[index]
    for place in range(text_LK.shape[0]):
        text_LK[place, lane] = packed.tokens_T[first + place] if place < length else np.uint8(_NO_LETTER)


def pair_distances(packed: Packed, first_P: np.ndarray, second_P: np.ndarray) -> np.ndarray:
    """Least edit distance of the shorter of each pair within the longer; at equal length the better of both ways.

    Args:
        packed: N sequences.
        first_P: [P] int, index of a sequence.
        second_P: [P] int.

    Returns:
        [P] int32, edits.
    """
    swap_P = packed.lengths_N[first_P] > packed.lengths_N[second_P]
    short_P, long_P = np.where(swap_P, second_P, first_P), np.where(swap_P, first_P, second_P)
    words_P = packed.words_N[short_P + 1] - packed.words_N[short_P]
    order_P = np.lexsort((packed.lengths_N[long_P], words_P))
    starts_G = _group_starts(words_P[order_P])
    sorted_P = _pair_groups(packed, short_P[order_P], long_P[order_P], starts_G)
    distances_P = np.empty(len(short_P), np.int32)
    distances_P[order_P] = sorted_P
    return distances_P


def _group_starts(words_P: np.ndarray) -> np.ndarray:
    """Cut points of groups of at most `LANES` neighbours with one number of words."""
    blocks = np.flatnonzero(np.diff(words_P, prepend=-1, append=-1))
    starts = [np.arange(low, high, LANES) for low, high in pairwise(blocks)]
    return np.concatenate([*starts, [len(words_P)]]).astype(np.int64)


@njit(cache=True, parallel=True)
def _pair_groups(packed: Packed, short_P: np.ndarray, long_P: np.ndarray, starts_G: np.ndarray) -> np.ndarray:
    distances_P = np.empty(short_P.size, np.int32)
    for group in prange(starts_G.size - 1):
        low, high = starts_G[group], starts_G[group + 1]
        forth_K = _lay_and_measure(packed, short_P[low:high], long_P[low:high])
        equal = False
        for pair in range(low, high):
            distances_P[pair] = forth_K[pair - low]
            equal |= packed.lengths_N[short_P[pair]] == packed.lengths_N[long_P[pair]]
        if equal:
            back_K = _lay_and_measure(packed, long_P[low:high], short_P[low:high])
            for pair in range(low, high):
                if packed.lengths_N[short_P[pair]] == packed.lengths_N[long_P[pair]]:
                    distances_P[pair] = min(distances_P[pair], back_K[pair - low])
    return distances_P


@njit(cache=True)
def _lay_and_measure(packed: Packed, patterns_K: np.ndarray, texts_K: np.ndarray) -> np.ndarray:
    words, longest = 0, 0
    for lane in range(patterns_K.size):
        words = max(words, packed.words_N[patterns_K[lane] + 1] - packed.words_N[patterns_K[lane]])
        longest = max(longest, packed.lengths_N[texts_K[lane]])
    masks_W4K = np.zeros((words, 4, LANES), np.uint64)
    text_LK = np.full((longest, LANES), np.uint8(_NO_LETTER))
    lengths_K = np.ones(LANES, np.int64)
    for lane in range(patterns_K.size):
        lengths_K[lane] = packed.lengths_N[patterns_K[lane]]
        _lay_pattern(packed, patterns_K[lane], lane, masks_W4K)
        _lay_text(packed, texts_K[lane], lane, text_LK)
    least_K = np.empty(LANES, np.int32)
    _least(masks_W4K, lengths_K, text_LK, np.empty((2, words, LANES), np.uint64), least_K)
    return least_K


class _Groups(NamedTuple):
    """All sequences in `LANES` columns each: as texts and as patterns."""

    text_XK: np.ndarray  # uint8, rows of group g: text_starts_G[g] to text_starts_G[g + 1]
    text_starts_G: np.ndarray
    masks_Y4K: np.ndarray  # uint64
    mask_starts_G: np.ndarray


@njit(cache=True)
def _pack_groups(packed: Packed) -> tuple:
    total = packed.lengths_N.size
    groups = (total + LANES - 1) // LANES
    text_starts_G, mask_starts_G = np.zeros(groups + 1, np.int64), np.zeros(groups + 1, np.int64)
    for group in range(groups):
        last = min((group + 1) * LANES, total) - 1  # sorted by length: the group's longest
        text_starts_G[group + 1] = text_starts_G[group] + packed.lengths_N[last]
        mask_starts_G[group + 1] = mask_starts_G[group] + packed.words_N[last + 1] - packed.words_N[last]
    text_XK = np.full((text_starts_G[-1], LANES), np.uint8(_NO_LETTER))
    masks_Y4K = np.zeros((mask_starts_G[-1], 4, LANES), np.uint64)
    for index in range(total):
        group, lane = index // LANES, index % LANES
        _lay_text(packed, index, lane, text_XK[text_starts_G[group] : text_starts_G[group + 1]])
        _lay_pattern(packed, index, lane, masks_Y4K[mask_starts_G[group] : mask_starts_G[group + 1]])
    return text_XK, text_starts_G, masks_Y4K, mask_starts_G


@njit(cache=True)
def most_edits(short: int, long: int, percent: int) -> int:
    """Largest distance at which designs of these lengths are at least `percent` % identical; negative = none is.

    The identity of two designs is ``1 - distance / short``; of a design shorter than `MIN_INFIX` it is
    ``(short - distance) / long``, as if all letters of the longer one had to be found.
    """
    if short >= MIN_INFIX:
        return (100 - percent) * short // 100
    return short - (percent * long + 99) // 100


@njit(cache=True)
def share_identical(edits: int, short: int, long: int) -> float:
    """Identity of two designs by their distance and lengths, see `most_edits`; 0 if nothing is alike."""
    return 1.0 - edits / short if short >= MIN_INFIX else (short - edits) / long


def distance_rows(packed: Packed, labels_N: np.ndarray, *, rows: int | None = None) -> Iterator[tuple[int, np.ndarray]]:
    """Distances of all pairs, a block of rows at a time.

    Args:
        packed: N sequences, sorted by length.
        labels_N: [N] int64; a pair with equal labels need not be computed. May be changed between two blocks.
        rows: stop after the pairs of this many shortest sequences with all others; None = all.

    Yields:
        Index of the block's first row, and [rows, N] uint16: entry (r, j) is the distance of sequences first + r and
        j as in `pair_distances`, or `UNKNOWN` where j <= first + r or the labels were equal.
    """
    if np.any(np.diff(packed.lengths_N) < 0):
        raise ValueError("sequences must be sorted by length")
    rows = packed.lengths_N.size if rows is None else rows
    if not rows:
        return
    groups = _Groups(*_pack_groups(packed))
    for first in range(0, rows, _ROWS_AT_ONCE):
        stop = min(first + _ROWS_AT_ONCE, rows)
        yield first, _block(packed, groups, labels_N, first, stop)


@njit(cache=True, parallel=True)
def _block(packed: Packed, groups: _Groups, labels_N: np.ndarray, first: int, stop: int) -> np.ndarray:
    total = packed.lengths_N.size
    distances_RN = np.full((stop - first, total), np.uint16(UNKNOWN))
    for row in prange(stop - first):
        _row(packed, groups, labels_N, first + row, distances_RN[row])
    return distances_RN


@njit(cache=True)
def _row(packed: Packed, groups: _Groups, labels_N: np.ndarray, index: int, distances_N: np.ndarray) -> None:
    total, length = packed.lengths_N.size, packed.lengths_N[index]
    words = packed.words_N[index + 1] - packed.words_N[index]
    pattern_W4K, text_LK = np.empty((words, 4, LANES), np.uint64), np.empty((length, LANES), np.uint8)
    for lane in range(LANES):
        _lay_pattern(packed, index, lane, pattern_W4K)
        _lay_text(packed, index, lane, text_LK)
    lengths_K, column_2WK = np.full(LANES, length), np.empty((2, words, LANES), np.uint64)
    forth_K, back_K = np.empty(LANES, np.int32), np.empty(LANES, np.int32)
    for group in range((index + 1) // LANES, (total + LANES - 1) // LANES):
        low, high = max(index + 1, group * LANES), min((group + 1) * LANES, total)
        wanted = False
        for other in range(low, high):
            wanted |= labels_N[other] != labels_N[index]
        if not wanted:
            continue
        text_first, text_stop = groups.text_starts_G[group], groups.text_starts_G[group + 1]
        _least(pattern_W4K, lengths_K, groups.text_XK[text_first:text_stop], column_2WK, forth_K)
        if packed.lengths_N[low] == length:
            mask_first = groups.mask_starts_G[group]
            masks_W4K = groups.masks_Y4K[mask_first : mask_first + words]
            _least(masks_W4K, lengths_K, text_LK, column_2WK, back_K)
        for other in range(low, high):
            if labels_N[other] != labels_N[index]:
                least = forth_K[other - group * LANES]
                if packed.lengths_N[other] == length:
                    least = min(least, back_K[other - group * LANES])
                distances_N[other] = least


def aligned_positions(pattern: str, text: str) -> np.ndarray:
    """Where each letter of `pattern` lies in `text` in one best infix alignment.

    Returns:
        [len(pattern)] int64, 0-based place in `text`, or -1 for a letter that has no counterpart.
    """
    return _trace_back(encode(pattern), encode(text))


@njit(cache=True)
def _trace_back(pattern_L: np.ndarray, text_L: np.ndarray) -> np.ndarray:
    cost = _matrix(pattern_L, text_L)
    row, column = pattern_L.size, int(np.argmin(cost[pattern_L.size]))
    places_L = np.full(row, -1, np.int64)
    while row > 0:
        mismatch = 1 if column == 0 or pattern_L[row - 1] != text_L[column - 1] else 0
        if column > 0 and cost[row, column] == cost[row - 1, column - 1] + mismatch:
            row, column = row - 1, column - 1
            places_L[row] = column
        elif cost[row, column] == cost[row - 1, column] + 1:
            row -= 1
        else:
            column -= 1
    return places_L


@njit(cache=True)
def _matrix(pattern_L: np.ndarray, text_L: np.ndarray) -> np.ndarray:
    cost = np.zeros((pattern_L.size + 1, text_L.size + 1), np.int32)
    for row in range(1, pattern_L.size + 1):
        cost[row, 0] = row
        for column in range(1, text_L.size + 1):
            mismatch = 0 if pattern_L[row - 1] == text_L[column - 1] else 1
            gap = min(cost[row - 1, column], cost[row, column - 1]) + 1
            cost[row, column] = min(gap, cost[row - 1, column - 1] + mismatch)
    return cost


def pair_distance_ref(first: str, second: str) -> int:
    """Slow twin of `pair_distances` for one pair: the plain dynamic programme, row by row."""
    short, long = sorted((first, second), key=len)
    ways = [(short, long), (long, short)] if len(short) == len(long) else [(short, long)]
    return min(_least_ref(pattern, text) for pattern, text in ways)


def _least_ref(pattern: str, text: str) -> int:
    above = [0] * (len(text) + 1)
    for row, letter in enumerate(pattern, start=1):
        here = [row]
        for column, other in enumerate(text, start=1):
            here.append(min(above[column] + 1, here[-1] + 1, above[column - 1] + (letter != other)))
        above = here
    return min(above)
