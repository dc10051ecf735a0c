"""The words of the data: alphabet, probes, ids and table columns. Each has its one home here."""

import functools
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.errors import DataError
from pipeline.paths import how_to_make

#: Token id = position in this string; padding has no letter of its own, the mask tells it apart.
ALPHABET = "ACGU"

#: Of proteins, in a labelled set.
AMINO_ACIDS = "ACDEFGHIKLMNPQRSTVWY"

#: Watson–Crick and wobble pairs, in both directions.
CANONICAL_PAIRS = ("AU", "UA", "CG", "GC", "GU", "UG")

#: What a network reads in a test sequence where a letter is none of these: every row is to get a prediction.
ODD_LETTER_AS = "A"

#: ``experiment_type`` in the order of the submission's columns, everywhere.
PROBES = ("DMS_MaP", "2A3_MaP")

#: Candidates per target that a submission of structures holds.
CANDIDATES = 5

#: Largest believable C1' coordinate, Å.
MAX_COORDINATE = 1e4

#: Coordinates at or below this are the organisers' way of saying "not resolved" (-1e18 in part 1), Å.
SENTINEL = -1e6

#: Resolved residues below which a structure has no TM-score.
MIN_RESOLVED = 3

_OTHER_LETTER = re.compile(f"[^{ALPHABET}]")


def normalise_sequence(sequence: str, *, where: str) -> str:
    """Upper-case an RNA or DNA sequence and write T as U.

    Raises:
        DataError: the sequence is empty or holds a letter outside A, C, G, U, T; `where` (file, row, id) leads.
    """
    clean = sequence.strip().upper().replace("T", "U")
    if not clean:
        raise DataError(f"{where}: empty sequence; expected letters A, C, G, U. Next: remove or repair the row.")
    other = _OTHER_LETTER.search(clean)
    if other:
        raise DataError(
            f"{where}: letter {other.group()!r} at position {other.start() + 1} of the sequence; "
            "expected A, C, G, U (or T). Next: remove or repair the row."
        )
    return clean


def encode(sequence: str, alphabet: str = ALPHABET) -> np.ndarray:
    """Token ids of a normalised sequence.

    Returns:
        [L] uint8, index into the alphabet.

    Raises:
        DataError: a letter outside the alphabet (the sequence was not normalised).

    >>> encode("GAU").tolist()
    [2, 0, 3]
    """
    tokens_L = _token_of_byte(alphabet)[np.frombuffer(sequence.encode("ascii", "replace"), dtype=np.uint8)]
    if tokens_L.size and tokens_L.max() == 255:
        raise DataError(f"encode: {sequence[:20]!r}… holds a letter outside {alphabet}. Next: normalise it first.")
    return tokens_L


@functools.cache
def _token_of_byte(alphabet: str) -> np.ndarray:
    table = np.full(256, 255, dtype=np.uint8)
    table[np.frombuffer(alphabet.encode(), dtype=np.uint8)] = np.arange(len(alphabet))
    return table


def decode(tokens_L: np.ndarray, alphabet: str = ALPHABET) -> str:
    """Letters of token ids: the inverse of `encode`.

    >>> decode(encode("GAU"))
    'GAU'
    """
    return "".join(alphabet[token] for token in tokens_L)


def split_id(row_id: str) -> tuple[str, int]:
    """Target and 1-based residue number of a structure row's ``ID``; target ids may hold underscores.

    >>> split_id("1SCL_A_3"), split_id("R1117v2_7")
    (('1SCL_A', 3), ('R1117v2', 7))
    """
    target_id, _, resid = row_id.rpartition("_")
    if not target_id or not resid.isdigit():
        raise DataError(f"ID {row_id!r}: expected <target_id>_<residue number>. Next: write it like R1107_1.")
    return target_id, int(resid)


def folds_of_other_data(path: Path, found: Sequence[str], ids: Sequence[str]) -> DataError:
    """What to raise where a fold table's sequence ids are not those of the data."""
    missing, extra = set(ids) - set(found), set(found) - set(ids)
    return DataError(
        f"{path}: a fold table from other data: {len(missing):,} sequences have no fold there and {len(extra):,} of "
        f"its {len(found):,} are not in the data, such as {min(missing or extra or ids)}; expected each id once. Next: "
        f"{how_to_make(path)}."
    )
