"""Sequences with measured numbers, one or several each, and what may be wrong with how they are written."""

import re
from collections.abc import Sequence
from typing import Any

import numpy as np
import polars as pl

from pipeline.competitions.class_labels import are_too_many, no_number
from pipeline.competitions.sequence_files import Settings
from pipeline.competitions.sequence_rows import UNSAID, duplicates, spot, train_table, with_ids
from pipeline.errors import DataError
from pipeline.labels import Numbers
from pipeline.runlog import amount, say, warn
from pipeline.tables import number_lists

_MOST_DIGITS = 6  # of what the report says of numbers


def number_names(frame: pl.DataFrame, settings: Settings) -> tuple[str, ...]:
    """What is measured of the sequences of a raw training table; none = they have classes.

    Where columns.toml does not say, labels are numbers if all of them can be read as such, they are more than ten
    different ones, and no classes: some are not whole, or hardly one comes again. This is said.
    """
    told = settings.classes or settings.label or settings.merge or settings.min_count  # that they are classes
    if settings.numbers or told or isinstance(frame.schema["label"], pl.List):
        return tuple(dict.fromkeys(settings.numbers))
    texts = frame.select(_told(pl.col("label")))["label"].drop_nulls()
    values, different = texts.cast(pl.Float64, strict=False), texts.n_unique()
    if different <= 10 or not values.is_finite().fill_null(False).all():
        return ()
    if (values == values.round()).all() and not are_too_many(different, len(texts)):
        return ()
    name = frame["label_name"][0]
    say(
        f"{frame['where'][0]}: the {different:,} different labels ({name}) are taken for measured numbers. Next, if "
        f"they are classes: label = '{name}' in columns.toml beside the file."
    )
    return (name,)


def take_numbers(
    frame: pl.DataFrame, names: tuple[str, ...], alphabet: str
) -> tuple[pl.DataFrame, Numbers, dict[str, Any]]:
    """The clean train table, the numbers in it, and what there is to say of both.

    Raises:
        DataError: a cell is no number, or one of the numbers is the same everywhere.
    """
    rows, where = frame.height, frame["where"][0]
    frame, unsaid = _read_cells(frame, names)
    if "id" in frame.columns:
        frame = frame.unique(["id", "sequence", "numbers"], keep="first", maintain_order=True)
    frame = with_ids(frame, "train", may_repeat=True)
    train = train_table(frame, pl.col("numbers"))
    number_NC = number_lists(train["numbers"], len(names))
    numbers = Numbers(names, (), (), (), alphabet).over(number_NC)
    told = {}
    for name, column in zip(names, number_NC.T, strict=True):
        known = np.sort(column[~np.isnan(column)])
        if len(np.unique(known)) < 2:
            found = f"{known[0]:g} in {amount(len(known), 'sequence')}" if len(known) else "no number at all"
            raise DataError(
                f"{where}: {name} is {found}; expected at least two different numbers. Next: check the column, or name "
                "others in columns.toml: numbers = ['<column>', …]."
            )
        if not _are_told_apart(known):
            raise DataError(
                f"{where}: {name} reaches from {known[0]:g} to {known[-1]:g}; expected numbers that 32 bits hold and "
                "tell apart. Next: write them in another unit, or less what they have in common."
            )
        if hint := _sentinel(known):
            warn(f"{where}: {name}: {hint}")
        told[name] = _summary(known, missing=len(column) - len(known))
    if unsaid:
        warn(f"{where}: {amount(unsaid, 'cell')} such as 'NaN' or 'NA', taken for not measured as empty ones are")
    facts = {
        "rows": rows,
        "sequences": train.height,
        "labels": "a measured number each" if len(names) == 1 else f"{len(names)} measured numbers each",
        "unlabelled": int((~train["scored"]).sum()),
        "numbers": told,
        "duplicates": duplicates(train, frame, "numbers", rows=rows),
    }
    return train, numbers, facts


def take_test_numbers(frame: pl.DataFrame, numbers: Numbers) -> tuple[pl.DataFrame, dict[str, str | int]]:
    """Add ``numbers`` to a test set where they are known, which nothing but its score ever reads; and what was found.

    A column that only looks like them, or holds the same everywhere, is passed over.
    """
    has_label = "label" in frame.columns and frame["label_name"][0] in numbers.names  # the name is there without it too
    if "cells" not in frame.columns and not has_label:
        return frame, {}
    try:
        frame, _ = _read_cells(frame, numbers.names)
    except DataError as err:
        return frame, {"numbers": f"not used: {str(err).partition(';')[0]}"}
    if frame["numbers"].n_unique() < 2:
        return frame.drop("numbers"), {"numbers": "not used: all the same"}
    return frame, {"measured": frame.height - frame["numbers"].null_count()}


def _told(cell: pl.Expr) -> pl.Expr:
    """A cell's text, null where it says nothing."""
    text = cell.str.strip_chars()
    return pl.when((text != "") & ~text.str.to_lowercase().is_in(UNSAID)).then(text)


def _read_cells(frame: pl.DataFrame, names: Sequence[str]) -> tuple[pl.DataFrame, int]:
    """Add ``numbers``, null where none was measured; and how many cells say so in words.

    Raises:
        DataError: a cell is no finite number.
    """
    if "cells" not in frame.columns:
        if len(names) > 1:
            raise DataError(
                f"{frame['where'][0]}: a label each; expected the columns {', '.join(names)}, columns.toml's numbers. "
                "Next: give a table with these columns, or name one number."
            )
        frame = frame.with_columns(pl.concat_list("label").alias("cells"))
    texts = frame.select(pl.col("cells").list.get(place).alias(name) for place, name in enumerate(names))
    told = texts.select(_told(pl.col(name)).alias(name) for name in names)
    values = told.cast(pl.Float64, strict=False)
    for name in names:
        wrong = told[name].is_not_null() & ~values[name].is_finite().fill_null(False)
        if wrong.any():
            row, cell = frame.filter(wrong).row(0, named=True), told[name].filter(wrong)[0]
            said, cure = no_number(name, cell)
            raise DataError(f"{spot(row)}: {said}. Next: {cure}.")
    unsaid = int(texts.select((pl.all().str.strip_chars() != "").sum()).sum_horizontal()[0])
    unsaid -= int(told.select(pl.all().is_not_null().sum()).sum_horizontal()[0])
    known = values.select(
        pl.when(pl.any_horizontal(pl.all().is_not_null())).then(pl.concat_list(pl.all())).alias("numbers")
    )
    return frame.with_columns(known["numbers"]), unsaid


def _are_told_apart(known: np.ndarray) -> bool:
    """Whether predictions, which are of 32 bits, have a hundred steps at least from the first to the last number.

    >>> _are_told_apart(np.array([1e12, 2e12])), _are_told_apart(np.array([1e39, 2e39]))
    (True, False)
    >>> _are_told_apart(np.array([1e-12, 2e-12])), _are_told_apart(np.array([1e9, 1e9 + 60]))
    (True, False)
    """
    kind, largest = np.finfo(np.float32), np.abs(known[[0, -1]]).max()
    return bool(largest < kind.max and known[-1] - known[0] > 100 * max(kind.eps * largest, kind.tiny))


def _sentinel(known: np.ndarray) -> str:
    """A hint where the smallest or largest of sorted numbers looks like a sign for "not measured"; else "".

    Such a number stands apart, by more than all others spread or alone below zero, and comes again or is all nines.

    >>> _sentinel(np.array([-999.0, 0.5, 1.5, 2.5]))[:48], _sentinel(np.array([-1.0, -1.0, 0.0, 3.0, 9.0]))[:43]
    ('-999 stands apart from all others (0.5 to 2.5) i', '-1 stands apart from all others (0 to 9) in')
    >>> _sentinel(np.array([0.1, 0.2, 0.3, 99.5])), _sentinel(np.array([0.0, 0.0, 1.0, 2.0]))
    ('', '')
    >>> _sentinel(np.array([0.0, 0.0, 1.0, 1.0]))
    ''
    """
    for value in (known[0], known[-1]):
        others = known[known != value]
        spread, gap = np.ptp(others), np.abs(others - value).min()
        apart = gap > spread or value < 0 <= others[0]
        nines = re.fullmatch(r"-?9{2,}(\.9*)?", f"{value:.10g}") is not None
        if apart and len(others) > 1 and (nines or (spread > 0 and len(known) - len(others) > 1)):
            return (
                f"{value:g} stands apart from all others ({others[0]:g} to {others[-1]:g}) in "
                f"{amount(len(known) - len(others), 'sequence')}. Next, if it means not measured: empty these cells."
            )
    return ""


def _summary(known: np.ndarray, *, missing: int) -> dict[str, float]:
    """Of sorted numbers, for the report."""
    values = {
        "mean": known.mean(),
        "sd": known.std(),
        "smallest": known[0],
        "median": np.median(known),
        "largest": known[-1],
    }
    told = {name: float(f"{value:.{_MOST_DIGITS}g}") for name, value in values.items()}
    return {"measured": len(known), "not measured": missing} | told
