"""What a labelled set of sequences is made of: its classes, whether a sequence has exactly one, and its letters.

Letters: N sequences, C classes.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import DataError
from pipeline.paths import Paths, how_to_make
from pipeline.schema import ALPHABET, AMINO_ACIDS

#: Probabilities are taken as at least this, and at most 1 minus this: one mistake must not make a mean infinite.
MIN_PROBABILITY = 1e-7


@dataclass(frozen=True)
class Classes:
    """The classes of a labelled set, as its data stage found them."""

    names: tuple[str, ...]  #: sorted; a label is a place in them
    counts: tuple[int, ...]  #: training sequences of each
    exclusive: bool  #: each labelled sequence has exactly one; otherwise none, one or several
    alphabet: str  #: letters of the sequences; a token is a place in it

    @property
    def is_nucleic(self) -> bool:
        """RNA or DNA: base pairs mean something."""
        return self.alphabet.startswith(ALPHABET)

    @property
    def readable(self) -> str:
        """The alphabet, and the unknown letter where no training sequence has one: what test sequences may hold."""
        unknown = unknown_letter(self.alphabet)
        return self.alphabet if unknown in self.alphabet else self.alphabet + unknown

    def facts(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return {"names": list(self.names), "exclusive": self.exclusive, "alphabet": self.alphabet}

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> "Classes":
        """From a checkpoint's facts; the counts are not known there."""
        names = tuple(facts["names"])
        return cls(names, (0,) * len(names), facts["exclusive"], facts["alphabet"])

    def difference(self, other: "Classes") -> str:
        """How another set differs in what a network depends on; "" = not at all.

        >>> Classes(("a", "b"), (1, 2), True, "ACGU").difference(Classes(("b", "c"), (1, 2), True, "ACGUN"))
        "classes without 'a', with 'c'; alphabet ACGU -> ACGUN"
        """
        found = []
        if self.names != other.names:
            gone = [name for name in self.names if name not in other.names]
            new = [name for name in other.names if name not in self.names]
            parts = [f"{word} {_some(names)}" for word, names in (("without", gone), ("with", new)) if names]
            found.append(f"classes {', '.join(parts) or 'in another order'}")
        if self.exclusive != other.exclusive:
            found.append("one label a sequence -> several" if self.exclusive else "several labels a sequence -> one")
        if self.alphabet != other.alphabet:
            found.append(f"alphabet {self.alphabet} -> {other.alphabet}")
        return "; ".join(found)


def letters_of(alphabet: str) -> str:
    """Nucleotides or amino acids, without the letter for unknown ones."""
    return ALPHABET if alphabet.startswith(ALPHABET) else AMINO_ACIDS


def unknown_letter(alphabet: str) -> str:
    """What odd letters are read as.

    >>> unknown_letter("ACGU"), unknown_letter("ACDEFGHIKLMNPQRSTVWYX")
    ('N', 'X')
    """
    return "N" if alphabet.startswith(ALPHABET) else "X"


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def read_classes(paths: Paths) -> Classes:
    """The classes of a labelled set, from ``clean/classes.parquet``.

    Raises:
        DataError: the data stage has not run, or the file is not what it wrote.
    """
    return read_class_file(paths.clean("classes"))


def read_class_file(path: Path) -> Classes:
    """`read_classes`, from where the file is."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise DataError(f"{path}: no classes; expected those of the clean table. Next: {how_to_make(path)}.")
    try:
        table = pq.read_table(path)
        told = table.schema.metadata or {}
        names, counts = table["name"].to_pylist(), table["count"].to_pylist()
        return Classes(tuple(names), tuple(counts), told[b"exclusive"] == b"true", told[b"alphabet"].decode())
    except (pa.ArrowException, OSError, KeyError) as err:
        raise DataError(f"{path}: not what the data stage writes ({err}). Next: {how_to_make(path)}.") from err


def write_classes(path: Path, classes: Classes) -> None:
    """The file that `read_class_file` reads."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema(
        [("name", pa.string()), ("count", pa.int64())],
        metadata={"exclusive": str(classes.exclusive).lower(), "alphabet": classes.alphabet},
    )
    table = pa.table({"name": list(classes.names), "count": list(classes.counts)}, schema=schema)
    pq.write_table(table, path, compression="zstd", write_page_checksum=True)


def log_losses(probability_NC: np.ndarray, label_NC: np.ndarray, *, exclusive: bool) -> np.ndarray:
    """Log loss of every sequence: [N] float64.

    Exclusive classes: minus the log of the true class's probability. Otherwise the binary log loss of each class,
    averaged over the classes.

    Args:
        probability_NC: [N, C] float in [0, 1].
        label_NC: [N, C] bool or 0/1; exactly one a row if exclusive.
        exclusive: one class a sequence.

    >>> log_losses(np.array([[0.5, 0.5], [0.0, 1.0]]), np.array([[0, 1], [1, 0]]), exclusive=True).round(3).tolist()
    [0.693, 16.118]
    """
    p_NC = np.clip(np.asarray(probability_NC, dtype=np.float64), MIN_PROBABILITY, 1 - MIN_PROBABILITY)
    true_NC = np.asarray(label_NC).astype(bool)
    if exclusive:
        return -np.log(p_NC[true_NC])
    return -np.where(true_NC, np.log(p_NC), np.log1p(-p_NC)).mean(axis=1)
