"""What a labelled set of sequences is made of: its classes, or the numbers measured of each, and its letters.

Letters: N sequences, C classes or numbers.
"""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from pipeline.errors import DataError
from pipeline.paths import Paths, how_to_make
from pipeline.schema import ALPHABET, AMINO_ACIDS

#: Probabilities are taken as at least this, and at most 1 minus this: one mistake must not make a mean infinite.
MIN_PROBABILITY = 1e-7


class _Named:
    """What classes and numbers share."""

    kind: ClassVar[str]  #: what there is of each sequence; also its clean table, and its key in a checkpoint's meta
    column: ClassVar[str]  #: of a table of predictions, lists with one for each name
    names: tuple[str, ...]
    alphabet: str

    @property
    def is_nucleic(self) -> bool:
        """RNA or DNA: base pairs mean something."""
        return self.alphabet.startswith(ALPHABET)

    @property
    def readable(self) -> str:
        """The alphabet, and the unknown letter where no training sequence has one: what test sequences may hold."""
        unknown = unknown_letter(self.alphabet)
        return self.alphabet if unknown in self.alphabet else self.alphabet + unknown

    def identity(self) -> dict[str, Any]:
        """What a network depends on."""
        return {"names": list(self.names), "alphabet": self.alphabet}

    def difference(self, other: "Labels") -> str:
        """How another set differs in what a network depends on; "" = not at all.

        >>> Classes(("a", "b"), (1, 2), True, "ACGU").difference(Classes(("b", "c"), (1, 2), True, "ACGUN"))
        "classes without 'a', with 'c'; alphabet ACGU -> ACGUN"
        """
        if self.kind != other.kind:
            return f"{self.kind} ({_some(list(self.names))}) -> {other.kind} ({_some(list(other.names))})"
        found = []
        if self.names != other.names:
            gone = [name for name in self.names if name not in other.names]
            new = [name for name in other.names if name not in self.names]
            parts = [f"{word} {_some(names)}" for word, names in (("without", gone), ("with", new)) if names]
            found.append(f"{self.kind} {', '.join(parts) or 'in another order'}")
        if isinstance(self, Classes) and self.identity()["exclusive"] != other.identity()["exclusive"]:
            found.append("one label a sequence -> several" if self.exclusive else "several labels a sequence -> one")
        if self.alphabet != other.alphabet:
            found.append(f"alphabet {self.alphabet} -> {other.alphabet}")
        return "; ".join(found)


@dataclass(frozen=True)
class Classes(_Named):
    """The classes of a labelled set, as its data stage found them."""

    kind, column = "classes", "probabilities"
    names: tuple[str, ...]  #: sorted; a label is a place in them
    counts: tuple[int, ...]  #: training sequences of each
    exclusive: bool  #: each labelled sequence has exactly one; otherwise none, one or several
    alphabet: str  #: letters of the sequences; a token is a place in it
    groups: tuple[str, ...] = ()  #: of each class the group that it is scored with, "" = none; () = there are no groups

    def identity(self) -> dict[str, Any]:
        """What a network depends on."""
        return super().identity() | {"exclusive": self.exclusive}

    def facts(self) -> dict[str, Any]:
        """What a checkpoint keeps."""
        return self.identity()

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> "Classes":
        """From a checkpoint's facts; the counts are not known there."""
        names = tuple(facts["names"])
        return cls(names, (0,) * len(names), facts["exclusive"], facts["alphabet"])


@dataclass(frozen=True)
class Numbers(_Named):
    """What was measured of each sequence of a set, in the units of the data; or of each nucleotide (`of_values`)."""

    kind = column = "numbers"
    names: tuple[str, ...]  #: in the order of every list of numbers
    counts: tuple[int, ...]  #: sequences of which each was measured
    means: tuple[float, ...]  #: over these
    deviations: tuple[float, ...]  #: standard deviations over these
    alphabet: str  #: letters of the sequences; a token is a place in it

    @property
    def scales(self) -> tuple[float, ...]:
        """The deviations, 1 where a number is the same everywhere: what a network takes for 1."""
        return tuple(deviation or 1.0 for deviation in self.deviations)

    def over(self, number_NC: np.ndarray) -> "Numbers":
        """The same numbers, with count, mean and deviation over these sequences; 0 where none was measured.

        >>> numbers = Numbers(("Tm",), (0,), (0.0,), (0.0,), "ACGU").over(np.array([[50.0], [np.nan], [60.0]]))
        >>> numbers.counts, numbers.means, numbers.deviations
        ((2,), (55.0,), (5.0,))
        """
        return self._over(np.asarray(number_NC, dtype=np.float64).T)

    @classmethod
    def of_values(cls, names: tuple[str, ...], columns: Iterable[np.ndarray]) -> "Numbers":
        """The units of values per nucleotide: mean and deviation of each target; `columns` [T] are taken one by one."""
        return cls(names, (), (), (), ALPHABET)._over(columns)

    def _over(self, columns: Iterable[np.ndarray]) -> "Numbers":
        found = [_count_mean_deviation(column[~np.isnan(column)]) for column in columns]
        counts, means, deviations = zip(*found, strict=True)
        return replace(self, counts=counts, means=means, deviations=deviations)

    def facts(self) -> dict[str, Any]:
        """What a checkpoint keeps; there mean and deviation are those of the sequences that trained it."""
        return self.identity() | {"means": list(self.means), "deviations": list(self.deviations)}

    @classmethod
    def of(cls, facts: Mapping[str, Any]) -> "Numbers":
        """From a checkpoint's facts; the counts are not known there."""
        names, means, deviations = (tuple(facts[key]) for key in ("names", "means", "deviations"))
        return cls(names, (0,) * len(names), means, deviations, facts["alphabet"])


Labels = Classes | Numbers


def units_of(meta: Mapping[str, Any]) -> Numbers | None:
    """Those of the values that a checkpoint predicts, by its meta; None = its network gives them as they are."""
    return Numbers.of(meta["units"]) if "units" in meta else None


def labels_of(meta: Mapping[str, Any]) -> Labels | None:
    """Those that a checkpoint was trained on, by its meta; None where nucleotides have values or structures."""
    return next((kind.of(meta[kind.kind]) for kind in (Classes, Numbers) if kind.kind in meta), None)


def letters_of(alphabet: str) -> str:
    """Nucleotides or amino acids, without the letter for unknown ones."""
    return ALPHABET if alphabet.startswith(ALPHABET) else AMINO_ACIDS


def unknown_letter(alphabet: str) -> str:
    """What odd letters are read as.

    >>> unknown_letter("ACGU"), unknown_letter("ACDEFGHIKLMNPQRSTVWYX")
    ('N', 'X')
    """
    return "N" if alphabet.startswith(ALPHABET) else "X"


def _count_mean_deviation(known: np.ndarray) -> tuple[int, float, float]:
    if not known.size or not np.ptp(known):  # of equal numbers 0, where rounding makes std 1e-17
        return known.size, float(known.mean()) if known.size else 0.0, 0.0
    return known.size, float(known.mean()), float(known.std())


def _some(names: list[str]) -> str:
    return ", ".join(map(repr, names[:5])) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def read_classes(paths: Paths) -> Classes:
    """The classes of a labelled set, from ``clean/classes.parquet``.

    Raises:
        DataError: the data stage has not run, or the file is not what it wrote.
    """
    return read_label_file(paths.clean("classes"))


def read_numbers(paths: Paths) -> Numbers:
    """The numbers of a labelled set, from ``clean/numbers.parquet``; counts, means … are over its train table.

    Raises:
        DataError: the data stage has not run, or the file is not what it wrote.
    """
    return read_label_file(paths.clean("numbers"))


def read_labels(paths: Paths) -> Labels:
    """Whichever of them the data stage found.

    Raises:
        DataError: it has not run, or the file is not what it wrote.
    """
    path = paths.clean("numbers")
    return read_label_file(path if path.is_file() else paths.clean("classes"))


def find_labels(paths: Paths) -> Labels | None:
    """`read_labels` where the data have some, else None.

    Raises:
        DataError: the file is not what the data stage wrote.
    """
    return read_labels(paths) if any(paths.clean(kind).is_file() for kind in ("classes", "numbers")) else None


def read_label_file(path: Path) -> Any:
    """`read_labels`, from where the file is; its name says what is in it."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    if not path.is_file():
        raise DataError(f"{path}: no {path.stem}; expected those of the clean table. Next: {how_to_make(path)}.")
    try:
        table = pq.read_table(path)
        told, columns = table.schema.metadata or {}, table.to_pydict()
        names, counts, alphabet = tuple(columns["name"]), tuple(columns["count"]), told[b"alphabet"].decode()
        if path.stem == "numbers":
            return Numbers(names, counts, tuple(columns["mean"]), tuple(columns["sd"]), alphabet)
        groups = tuple(columns.get("group", ()))
        return Classes(names, counts, told[b"exclusive"] == b"true", alphabet, groups)
    except (pa.ArrowException, OSError, KeyError) as err:
        raise DataError(f"{path}: not what the data stage writes ({err}). Next: {how_to_make(path)}.") from err


def write_labels(path: Path, labels: Labels) -> None:
    """The file that `read_labels` reads."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    columns, told = {"name": list(labels.names), "count": list(labels.counts)}, {"alphabet": labels.alphabet}
    fields = [("name", pa.string()), ("count", pa.int64())]
    if isinstance(labels, Classes):
        told = {"exclusive": str(labels.exclusive).lower()} | told
        if labels.groups:
            columns, fields = columns | {"group": list(labels.groups)}, [*fields, ("group", pa.string())]
    else:
        columns |= {"mean": list(labels.means), "sd": list(labels.deviations)}
        fields += [("mean", pa.float64()), ("sd", pa.float64())]
    table = pa.table(columns, schema=pa.schema(fields, metadata=told))
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
