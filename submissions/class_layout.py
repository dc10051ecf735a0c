"""What a submission of classes must look like: one row a sequence, a column a class, or the label, or both.

Without a sample submission: ``id`` and a column of probabilities for each class, in the order of the test set. With
one: its columns and its order. A single column beside its ids is the label if it holds class names; else, of two
classes, the probability of the second.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import polars as pl

from pipeline.errors import DataError
from pipeline.labels import Classes, read_classes
from pipeline.paths import Paths
from submissions.layout import Kind, Layout, ListedKeys
from submissions.whole_rows import free_key, read_sample_rows, read_test_ids

#: Stands between the labels of one sequence.
SEPARATOR = ";"


@dataclass(frozen=True, kw_only=True)
class ClassLayout(Layout):
    """Columns of probabilities (`values`, each of one class), of labels, or both."""

    header: tuple[str, ...]  #: all columns, in order
    classes: Classes
    of_values: tuple[int, ...]  #: which class each of `values` is the probability of
    label: str = ""  #: column of labels, if there is one

    @property
    def columns(self) -> list[str]:
        return list(self.header)

    @property
    def kinds(self) -> dict[str, Kind]:
        text = (*self.keys.names, self.label)
        return {name: "text" if name in text else "number" for name in self.header}

    @property
    def sums_to_one(self) -> bool:
        """Whether the probabilities of a row must."""
        return self.classes.exclusive and len(self.values) == len(self.classes.names)

    def is_label(self, cell: str) -> bool:
        """Whether a cell of the label's column names a class, or, of several, any number of them."""
        names = [cell] if self.classes.exclusive else [name for name in cell.split(SEPARATOR) if name]
        return set(names) <= set(self.classes.names)


def read_class_layout(paths: Paths, sample: Path | None = None) -> ClassLayout:
    """Layout from the clean test set, the classes and the sample submission: the set's own, if any, or `sample`.

    Raises:
        DataError: there is no test set, or the sample submission is of other sequences or classes.
    """
    classes, ids = read_classes(paths), read_test_ids(paths)
    found = read_sample_rows(paths, ids, sample)
    if found:
        return _from_sample(found[1], classes, where=found[0])
    names = classes.names
    return _layout((free_key(names), *names), ids, classes, values=names, of_values=tuple(range(len(names))))


def _layout(header: Sequence[str], ids: pl.Series, classes: Classes, **columns: Any) -> ClassLayout:
    keys = ListedKeys(ids, header[0])
    return ClassLayout(keys=keys, low=0.0, high=1.0, header=tuple(header), classes=classes, **columns)


def _from_sample(table: pl.DataFrame, classes: Classes, *, where: str) -> ClassLayout:
    key, *rest = table.columns
    values, others = [name for name in rest if name in classes.names], [n for n in rest if n not in classes.names]
    lost = [name for name in classes.names if name not in values]
    wanted = ", ".join(classes.names)[:120]
    if len(others) > 1 or (values and lost):
        raise DataError(
            f"{where}: columns {', '.join(rest)[:120]}; expected one for each class ({wanted}), one label, or both. "
            "Next: see that the sample submission and the labels are of one set."
        )
    ids, label = table[key], others[0] if others else ""
    if values or _holds_labels(table[label], classes):
        of_values = tuple(classes.names.index(name) for name in values)
        return _layout(table.columns, ids, classes, values=tuple(values), of_values=of_values, label=label)
    if len(classes.names) != 2 or not classes.exclusive:
        raise DataError(
            f"{where}: {label} holds {table[label][0]!r}, which is no class; expected some of {wanted}. "
            "Next: see that the sample submission and the labels are of one set."
        )
    return _layout(table.columns, ids, classes, values=(label,), of_values=(1,))


def _holds_labels(column: pl.Series, classes: Classes) -> bool:
    """Whether every cell is empty or of class names alone."""
    cells = column.drop_nulls().unique()
    split = cells if classes.exclusive else cells.str.split(SEPARATOR).explode()
    return bool(split.filter(split != "").is_in(list(classes.names)).all())
