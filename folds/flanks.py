"""Ends that all sequences of a data set share: primers and barcode hairpins, which say nothing about a design.

Letters: S sequences that are looked at, E places from one end, N sequences.
"""

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from pipeline.schema import ALPHABET, CANONICAL_PAIRS

#: A place is constant if one letter holds in this share of the sequences.
CONSTANT = 0.95

#: Longer constant ends are a scaffold, which is part of the design, nt.
MAX_FLANK = 32

#: A data set with fewer sequences is not trimmed: relatives would pass for primers.
MIN_SEQUENCES = 50

#: A sequence of which less would be left is not trimmed, nt.
MIN_DESIGN = 20

_SAMPLE = 20_000
_STEMS = range(5, 13)  # base pairs of a barcode's stem
_LOOP = 4
_PAIRS = tuple((ord(pair[0]), ord(pair[1])) for pair in CANONICAL_PAIRS)


class Flank(NamedTuple):
    """Letters that are cut from the ends of a data set's sequences, nt."""

    left: int
    right: int  #: with the barcode
    barcode: int


def find_flank(sequences: Sequence[str]) -> Flank:
    """Constant ends of one data set, and the barcode hairpin inside the right one if there is one.

    The run of constant places from either end is the primer, at most `MAX_FLANK`. A barcode is what follows the right
    one in most chemical-mapping libraries: a stem of 5 to 12 pairs, another one in every sequence, around a constant
    loop of four. (On the published 15k and PK50 libraries this gives 26 and 41 or 39, the ends that were not scored.)

    Args:
        sequences: normalised; of more than 20,000 as many, evenly spaced, are looked at.
    """
    if len(sequences) < MIN_SEQUENCES:
        return Flank(0, 0, 0)
    some = [sequences[place] for place in np.linspace(0, len(sequences) - 1, min(len(sequences), _SAMPLE)).astype(int)]
    left = _run(_shares(_end_letters(some, MAX_FLANK)))
    letters_SE = _end_letters([sequence[::-1] for sequence in some], MAX_FLANK + 2 * _STEMS[-1] + _LOOP)
    right = _run(_shares(letters_SE)[:MAX_FLANK])
    barcode = _barcode(letters_SE[:, right:]) if right else 0
    return Flank(left, right + barcode, barcode)


def cut_flanks(sequence: str, flank: Flank) -> slice:
    """Where the design lies in a sequence; all of it if less than `MIN_DESIGN` would be left."""
    stop = len(sequence) - flank.right
    return slice(flank.left, stop) if stop - flank.left >= MIN_DESIGN else slice(0, len(sequence))


def _end_letters(sequences: Sequence[str], width: int) -> np.ndarray:
    """First letters of all sequences, [S, width] uint8 codes; 255 behind the end."""
    text = b"".join(sequence[:width].encode().ljust(width, b"\xff") for sequence in sequences)
    return np.frombuffer(text, dtype=np.uint8).reshape(len(sequences), width)


def _shares(letters_SE: np.ndarray) -> np.ndarray:
    """Share of the commonest letter at every place, [E]."""
    return np.max([(letters_SE == ord(letter)).mean(axis=0) for letter in ALPHABET], axis=0)


def _run(shares_E: np.ndarray) -> int:
    return int(np.argmin(np.append(shares_E >= CONSTANT, False)))


def _barcode(letters_SE: np.ndarray) -> int:
    """Length of the hairpin with which the reversed sequences begin; 0 = none."""
    constant_E = _shares(letters_SE) >= CONSTANT
    for stem in _STEMS:
        if not constant_E[stem : stem + _LOOP].all():
            continue
        length = 2 * stem + _LOOP
        paired = sum(_pairs(letters_SE[:, place], letters_SE[:, length - 1 - place]) for place in range(stem))
        if np.mean(np.asarray(paired) >= stem - 1) >= CONSTANT:
            return length
    return 0


def _pairs(first_S: np.ndarray, second_S: np.ndarray) -> np.ndarray:
    return np.any([(first_S == one) & (second_S == other) for one, other in _PAIRS], axis=0).astype(int)
