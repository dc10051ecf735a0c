"""A submission of numbers: one row a sequence, a column a number.

Without a sample submission: ``id`` and a column for each number, in the order of the test set. With one: its columns,
all the numbers or some of them, and its order. A single column beside its ids is the number, if there is but one.

Letters: N sequences, C numbers.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from pipeline.competitions.base import Competition
from pipeline.errors import DataError
from pipeline.paths import Paths
from submissions.layout import Layout, ListedKeys
from submissions.number_evaluation import answers_of
from submissions.whole_rows import (
    free_key,
    ids_of,
    predictions_in_order,
    read_sample_rows,
    read_test_ids,
    set_inputs,
    write_rows,
)

_MOST = float(np.finfo(np.float32).max)


@dataclass(frozen=True, kw_only=True)
class NumberLayout(Layout):
    """Ids and columns of numbers."""

    of_values: tuple[int, ...]  #: which of the competition's targets each of `values` is


def read_number_layout(paths: Paths, competition: Competition, sample: Path | None = None) -> NumberLayout:
    """Layout from the clean test set and the sample submission: the set's own, if there is one, or `sample`.

    Raises:
        DataError: there is no test set, or the sample submission is of other sequences or numbers.
    """
    names, ids = competition.targets, read_test_ids(paths)
    found = read_sample_rows(paths, ids, sample)
    if found is None:
        return _layout(ids, free_key(names), {name: place for place, name in enumerate(names)})
    where, table = found
    key, *columns = table.columns
    lost = [name for name in columns if name not in names]
    if lost and len(columns) == len(names) == 1:
        return _layout(table[key], key, {columns[0]: 0})
    if lost:
        raise DataError(
            f"{where}: column {lost[0]} is none of the numbers ({', '.join(names)[:120]}); expected ids and some of "
            "them. Next: see that the sample submission and the training numbers are of one set."
        )
    return _layout(table[key], key, {name: names.index(name) for name in columns})


def _layout(ids: pl.Series, key: str, place_of: Mapping[str, int]) -> NumberLayout:
    values, places = tuple(place_of), tuple(place_of.values())
    return NumberLayout(keys=ListedKeys(ids, key), values=values, low=-_MOST, high=_MOST, of_values=places)


def number_inputs(paths: Paths, competition: Competition) -> dict[str, Path]:
    """Files that a submission is made from, beside predictions and the test set.

    Raises:
        DataError: see `read_number_layout`.
    """
    read_number_layout(paths, competition)
    return set_inputs(paths, "numbers")


def write_numbers(
    paths: Paths, competition: Competition, predictions: Path, part: Path, *, fmt: str
) -> tuple[NumberLayout, dict[str, Any]]:
    """Write a submission of numbers as CSV or parquet, with all the digits of a float32.

    Raises:
        DataError: a prediction is missing, twice, unknown or not finite.
    """
    layout = read_number_layout(paths, competition)
    ids = ids_of(layout)
    said_NC = predictions_in_order(predictions, ids, answers_of(competition))
    columns = {name: said_NC[:, place] for name, place in zip(layout.values, layout.of_values, strict=True)}
    write_rows(pl.DataFrame({ids.name: ids} | columns), part, fmt=fmt)
    return layout, {"sequences": len(ids)}
