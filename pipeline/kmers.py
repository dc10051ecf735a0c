"""Words (k-mers) of sequences, counted."""

import itertools
from collections.abc import Iterator, Sequence

import numpy as np
from scipy.sparse import csr_matrix, vstack

_LETTERS = 1 << 20  # that are counted together


def longest_words(letters: int, most: int) -> int:
    """The longest k for which there are at most so many k-mers.

    >>> longest_words(4, 8192), longest_words(20, 8192), longest_words(20, 512)
    (6, 3, 2)
    """
    return max(k for k in range(1, 9) if letters**k <= most or k == 1)


def count_words(sequences: Sequence[str], letters: str, k: int) -> csr_matrix:
    """[N, V] float32: how often each k-mer occurs, those with other letters left out; V = len(letters) ** k.

    >>> count_words(["ACACNA", "G"], "ACGU", 2).toarray()[:, [1, 4]].tolist()
    [[2.0, 1.0], [0.0, 0.0]]
    """
    return vstack([_count(part, letters, k) for part in in_parts(sequences)], format="csr")


def in_parts(sequences: Sequence[str]) -> Iterator[Sequence[str]]:
    """Sequences in order, about a million letters at a time: to count takes 100 bytes a letter."""
    stops = np.cumsum(np.fromiter(map(len, sequences), dtype=np.int64, count=len(sequences))) // _LETTERS
    edges = [0, *(np.flatnonzero(np.diff(stops)) + 1).tolist(), len(sequences)]
    yield from (sequences[low:high] for low, high in itertools.pairwise(edges))


def _count(sequences: Sequence[str], letters: str, k: int) -> csr_matrix:
    lengths_N = np.fromiter(map(len, sequences), dtype=np.int64, count=len(sequences))
    token_T = places_in(letters, "".join(sequences))
    start_T = np.flatnonzero(np.arange(len(token_T)) + k <= np.repeat(np.cumsum(lengths_N), lengths_N))
    parts_TK = np.stack([token_T[start_T + shift] for shift in range(k)], axis=1)
    known_T = (parts_TK >= 0).all(axis=1)
    word_T = parts_TK[known_T] @ len(letters) ** np.arange(k)[::-1]
    owner_T = np.repeat(np.arange(len(sequences)), lengths_N)[start_T[known_T]]
    ones_T = np.ones(len(word_T), dtype=np.float32)
    return csr_matrix((ones_T, (owner_T, word_T)), shape=(len(sequences), len(letters) ** k))


def places_in(letters: str, text: str) -> np.ndarray:
    """[T] int64 place of each sign of a text among some letters; -1 = it is none of them."""
    place = np.full(256, -1)
    place[np.frombuffer(letters.encode(), dtype=np.uint8)] = np.arange(len(letters))
    return place[np.frombuffer(text.encode(), dtype=np.uint8)]
