"""Links between many sequences without comparing all pairs: shared seeds propose a pair, the exact distance decides.

A seed is a pattern of letters that two sequences have in common ("1" = must agree, "0" = may differ). Sequences that
share one lie in the same bucket; each is compared with the `NEIGHBOURS` before it there, first by the letters around
the seed, long ones then by a few pieces, then by the exact distance. The work grows with the number of sequences and
not with its square, as long as buckets are not crowded; pairs that share no seed are missed (`folds.bench` measures
how many).

Letters: N sequences, T letters, Q places of seeds, S slices, P pairs.
"""

from typing import Any, NamedTuple

import numpy as np

from folds.components import find_roots, unite_relatives, unite_rows
from folds.edit_distance import Packed, distance_rows, pack_tokens, pair_distances
from pipeline.compiled import copy, njit, prange
from pipeline.runlog import Bar

#: Two spaced seeds find what substitutions leave, a plain one what deletions leave. Measured on 29,942 mutants (0-30 %
#: of letters changed), share of all pairs of at least 80 % identity that end in one cluster: the first alone 99.963 %,
#: all three 99.987 %; three of weight 12 99.983 %.
SEEDS = ("111010010100110111", "1100110110001011011", "11111111111")

#: How many of a bucket's members before it a member is compared with.
NEIGHBOURS = 64

#: Letters around a seed of which no more than half may differ, no more than a third where sequences are so long that
#: they share many seeds; unrelated sequences differ in three of four.
_WINDOW = 32

#: Sequences too short for the seeds are compared with all.
_SHORT = 32

#: A sequence of this length or more shares seeds with any other by chance.
_LONG = 1_024

#: Of two long sequences as many pieces of the shorter one, each of so many letters and evenly spaced, are first laid
#: anywhere within the longer one, as the exact distance of 3,000 letters takes 30 times as long. Of 71 relatives of at
#: least 80 % identity up to 21 % of the pieces' letters changed, of the median of 115,000 other pairs 41 %.
_PIECES, _PIECE = 8, 64

#: Share of the pieces' letters that may be edited beyond what relatives may differ in.
_SLACK = 0.07

_SLICES = 32
_ROOM = 1 << 14  # pairs that a slice proposes before it waits for the verdict
_SEEN_BITS = 25  # of the table that remembers decided pairs (256 MiB); a pair is proposed about three times
_ZERO, _ONE = np.uint64(0), np.uint64(1)
_HIGH = np.uint64(32)


class _Index(NamedTuple):
    """Where the seeds of one pattern lie, bucket by bucket."""

    owner_T: np.ndarray  #: uint32, sequence of every letter
    starts: np.ndarray  #: int64, first entry of every bucket in `places_Q`
    places_Q: np.ndarray  #: uint32, first letter of every seed
    marks: np.ndarray  #: int64, which letters from there on must agree


def link_by_seeds(packed: Packed, parent_N: np.ndarray, percent: int) -> None:
    """Join, in place, the sequences that share a seed and are at least `percent` % identical.

    Args:
        packed: N sequences, sorted by length; fewer than 2**32 letters.
        parent_N: int64 union-find forest, see `folds.components`.
        percent: least identity.
    """
    assert packed.tokens_T.size < 1 << 32, "places are kept in 32 bits"
    _link_short(packed, parent_N, percent)
    pieces = _cut_pieces(packed)
    owner_T = np.repeat(np.arange(packed.lengths_N.size, dtype=np.uint32), packed.lengths_N)
    seen = np.zeros(1 << _SEEN_BITS, np.uint64)
    for seed in SEEDS:
        marks = np.array([place for place, mark in enumerate(seed) if mark == "1"])
        starts, places_Q = _index(packed.tokens_T, packed.offsets_N, marks)
        with Bar(f"cluster, seed {seed}", total=places_Q.size, unit="places") as bar:
            index = _Index(owner_T, starts, places_Q, marks)
            _link_buckets(packed, pieces, parent_N, percent, index, seen, bar)


def _link_short(packed: Packed, parent_N: np.ndarray, percent: int) -> None:
    short = int(np.searchsorted(packed.lengths_N, _SHORT))
    labels_N = find_roots(parent_N)
    for first, distances_RN in distance_rows(packed, labels_N, rows=short):
        unite_rows(parent_N, first, distances_RN, packed.lengths_N, percent)
        labels_N[:] = find_roots(parent_N)


def _cut_pieces(packed: Packed) -> Packed:
    """The long sequences, and after them their pieces."""
    first = int(np.searchsorted(packed.lengths_N, _LONG))
    offsets_N, lengths_N = packed.offsets_N[first:-1], packed.lengths_N[first:]
    middles_P = (np.arange(_PIECES) + 0.5) / _PIECES
    starts_NP = offsets_N[:, None] + (middles_P * lengths_N[:, None]).astype(np.int64) - _PIECE // 2
    pieces = packed.tokens_T[starts_NP[:, :, None] + np.arange(_PIECE)]
    tokens = packed.tokens_T[packed.offsets_N[first] :]
    return pack_tokens(np.append(tokens, pieces), np.append(lengths_N, np.full(starts_NP.size, _PIECE)))


def _may_be_related(pieces: Packed, first_P: np.ndarray, second_P: np.ndarray, percent: int) -> np.ndarray:
    """[P] bool: False where the pieces of the shorter of two long sequences lie badly in the longer one.

    Args:
        pieces: N long sequences, sorted by length, and their pieces.
        first_P: [P] int, index of the shorter one among the long ones; below 0 = it is not long, and true.
        second_P: [P] int, of the longer one.
        percent: least identity of relatives.
    """
    may_P, long_P = first_P < 0, np.flatnonzero(first_P >= 0)
    places_PP = (pieces.lengths_N.size // (1 + _PIECES)) + first_P[long_P, None] * _PIECES + np.arange(_PIECES)
    edits = pair_distances(pieces, places_PP.ravel(), np.repeat(second_P[long_P], _PIECES))
    most = (1 - percent / 100 + _SLACK) * _PIECES * _PIECE
    may_P[long_P] = edits.reshape(-1, _PIECES).sum(axis=1) <= most
    return may_P


def _link_buckets(
    packed: Packed, pieces: Packed, parent_N: np.ndarray, percent: int, index: _Index, seen: np.ndarray, bar: Bar
) -> None:
    edges = np.linspace(0, index.places_Q.size, _SLICES + 1).astype(np.int64)
    next_S, stop_S = edges[:-1].copy(), edges[1:]
    while np.any(next_S < stop_S):
        before = int(next_S.sum())
        keys = _propose(packed, index, find_roots(parent_N), next_S, stop_S)
        keys = _drop_seen(keys, seen)
        first_P, second_P = (keys >> _HIGH).astype(np.int64), (keys & np.uint64(0xFFFFFFFF)).astype(np.int64)
        short = int(np.searchsorted(packed.lengths_N, _LONG))
        may_P = _may_be_related(pieces, first_P - short, second_P - short, percent)
        first_P, second_P = first_P[may_P], second_P[may_P]
        if first_P.size:
            distances_P = pair_distances(packed, first_P, second_P)
            unite_relatives(parent_N, first_P, second_P, distances_P, packed.lengths_N, percent)
        bar.advance(int(next_S.sum()) - before)


@njit(cache=True)
def _key(tokens_T: np.ndarray, place: Any, marks: np.ndarray) -> int:
    key = 0
    for mark in marks:
        key = 4 * key + tokens_T[place + mark]
    return key


@njit(cache=True)
def _index(tokens_T: np.ndarray, offsets_N: np.ndarray, marks: np.ndarray) -> tuple:
    """First entry of every bucket, and the places of all seeds, bucket by bucket (counting sort)."""
    span = marks[-1] + 1
    starts = np.zeros(4**marks.size + 2, np.int64)
    for sequence in range(offsets_N.size - 1):
        for place in range(offsets_N[sequence], offsets_N[sequence + 1] - span + 1):
            starts[_key(tokens_T, place, marks) + 2] += 1
    for key in range(2, starts.size):
        starts[key] += starts[key - 1]
    places_Q = np.empty(starts[-1], np.uint32)
    for sequence in range(offsets_N.size - 1):
        for place in range(offsets_N[sequence], offsets_N[sequence + 1] - span + 1):
            key = _key(tokens_T, place, marks) + 1
            places_Q[starts[key]] = place
            starts[key] += 1
    return starts[:-1], places_Q


@njit(cache=True, parallel=True)
def _propose(packed: Packed, index: _Index, labels_N: np.ndarray, next_S: np.ndarray, stop_S: np.ndarray) -> np.ndarray:
    """Pairs that share a seed and look alike around it, as first * 2**32 + second; moves `next_S` on."""
    keys_SR, counts_S = np.empty((next_S.size, _ROOM), np.uint64), np.zeros(next_S.size, np.int64)
    for slice_ in prange(next_S.size):
        if next_S[slice_] < stop_S[slice_]:
            done = _scan(packed, index, labels_N, next_S[slice_], stop_S[slice_], keys_SR[slice_])
            next_S[slice_], counts_S[slice_] = done
    return _join(keys_SR, counts_S)


@njit(cache=True)
def _scan(
    packed: Packed, index: _Index, labels_N: np.ndarray, start: int, stop: int, keys_R: np.ndarray
) -> tuple[int, int]:
    """Fill `keys_R` from the places `start` to `stop`; returns where it stopped and how many keys it wrote."""
    letters, known = np.empty(NEIGHBOURS, np.uint64), np.empty(NEIGHBOURS, np.uint64)
    owners = np.empty(NEIGHBOURS, np.int64)
    lead, weight = (_WINDOW - index.marks[-1] - 1) // 2, index.marks.size
    bucket = index.starts[_key(packed.tokens_T, index.places_Q[start], index.marks)]
    count, entry = 0, max(start - NEIGHBOURS, bucket)  # the ring of neighbours as the round before left it
    while entry < stop and count <= keys_R.size - NEIGHBOURS:
        place = np.int64(index.places_Q[entry])
        bucket = index.starts[_key(packed.tokens_T, place, index.marks)]
        owner = np.int64(index.owner_T[place])
        low, high = packed.offsets_N[owner], packed.offsets_N[owner + 1]
        here, valid = _around(packed.tokens_T, place - lead, low, high)
        for other in range(max(bucket, entry - NEIGHBOURS), entry if entry >= start else 0):
            slot = other % NEIGHBOURS
            first, second = min(owner, owners[slot]), max(owner, owners[slot])
            share = 3 if packed.lengths_N[second] >= _LONG and packed.lengths_N[first] >= _LONG // 4 else 2
            both = valid & known[slot]
            if labels_N[first] != labels_N[second] and _alike(here ^ letters[slot], both, weight, share):
                keys_R[count] = (np.uint64(first) << _HIGH) | np.uint64(second)
                count += 1
        slot = entry % NEIGHBOURS
        letters[slot], known[slot], owners[slot] = here, valid, owner
        entry += 1
    return max(entry, start), count


@njit(cache=True)
def _alike(differ: Any, both: Any, weight: int, share: int) -> bool:
    """Whether at most one in `share` letters besides the seed differs, among those that both sequences have."""
    return share * _ones((differ | (differ >> _ONE)) & both) <= _ones(both) - weight


@njit(cache=True)
def _join(keys_SR: np.ndarray, counts_S: np.ndarray) -> np.ndarray:
    keys, filled = np.empty(counts_S.sum(), np.uint64), 0
    for row in range(counts_S.size):
        copy(keys_SR[row, : counts_S[row]], keys[filled:])
        filled += counts_S[row]
    return keys


@njit(cache=True)
def _around(tokens_T: np.ndarray, first: int, low: int, high: int) -> tuple:
    """Two bits a letter from `first` on, and the lower bit of each that lies in the sequence from `low` to `high`."""
    letters, known = _ZERO, _ZERO
    for offset in range(max(0, low - first), min(_WINDOW, high - first)):
        shift = np.uint64(2 * offset)
        letters |= np.uint64(tokens_T[first + offset]) << shift
        known |= _ONE << shift
    return letters, known


@njit(cache=True)
def _ones(bits: Any) -> Any:
    """Number of set bits among the lower bits of 32 letters."""
    bits = (bits & np.uint64(0x1111111111111111)) + ((bits >> np.uint64(2)) & np.uint64(0x1111111111111111))
    bits = (bits + (bits >> np.uint64(4))) & np.uint64(0x0F0F0F0F0F0F0F0F)
    return np.int64((bits * np.uint64(0x0101010101010101)) >> np.uint64(56))


@njit(cache=True)
def _drop_seen(keys: np.ndarray, seen: np.ndarray) -> np.ndarray:
    """Pairs that were not decided yet; a pair that another has pushed out of its slot is decided again."""
    fresh = np.empty(keys.size, np.bool_)
    for pair in range(keys.size):
        slot = np.int64((keys[pair] * np.uint64(0x9E3779B97F4A7C15)) >> np.uint64(64 - _SEEN_BITS))
        fresh[pair] = seen[slot] != keys[pair]
        seen[slot] = keys[pair]
    return keys[fresh]
