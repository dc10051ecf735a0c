"""Sequences with classes, one each or any number of them, and what may be wrong with how they are written."""

from collections import Counter
from collections.abc import Sequence
from typing import Any

import polars as pl

from pipeline.competitions.sequence_files import Settings
from pipeline.competitions.sequence_rows import duplicates, train_table, with_ids
from pipeline.errors import DataError
from pipeline.labels import Classes
from pipeline.runlog import warn

_MOST_CLASSES = 1 << 16
#: What a cell that says nothing may hold, in small letters.
UNSAID = ("nan", "na", "n/a", "none", "null", "?")
_BETWEEN_LABELS = (",", "|", "/", "+", "&", ";")  # signs that may stand between the labels in a cell


def take_classes(
    frame: pl.DataFrame, alphabet: str, settings: Settings
) -> tuple[pl.DataFrame, Classes, dict[str, Any]]:
    """The clean train table, its classes, and what there is to say of both."""
    rows, where = frame.height, frame["where"][0]
    frame, exclusive = _split_labels(frame, settings)
    names = sorted(set(settings.classes)) or frame["names"].explode().drop_nulls().unique().sort().to_list()
    _check_classes(names, int(frame["names"].is_not_null().sum()), exclusive=exclusive, where=where)
    if "id" in frame.columns:
        frame = frame.unique(["id", "sequence", "names"], keep="first", maintain_order=True)
    frame = with_ids(frame, "train", may_repeat=True)
    train = train_table(frame, _places(names))
    counted = dict(train["labels"].explode().drop_nulls().value_counts().iter_rows())
    classes = Classes(tuple(names), tuple(counted.get(index, 0) for index in range(len(names))), exclusive, alphabet)
    for hint in filter(None, (_combined(names, taken=settings.separator), _alike(names), _alone(classes))):
        warn(f"{where}: {hint}")
    facts = {
        "rows": rows,
        "sequences": train.height,
        "labels": "one class each" if exclusive else "any number of classes each",
        "unlabelled": int((~train["scored"]).sum()),
        "classes": dict(zip(names, classes.counts, strict=True)),
        "duplicates": duplicates(train, frame, "labels", rows=rows),
    }
    return train, classes, facts


def take_test_classes(
    frame: pl.DataFrame, classes: Classes, settings: Settings
) -> tuple[pl.DataFrame, dict[str, str | int]]:
    """Add ``labels`` to a test set whose labels are known, which nothing but its score ever reads; and what was found.

    Columns that only look like labels, or hold the same everywhere, are passed over.
    """
    if "label" not in frame.columns:
        return frame, {}
    frame, _ = _split_labels(frame, settings, exclusive=classes.exclusive)
    found = set(frame["names"].explode().drop_nulls())
    strange = sorted(found - set(classes.names))
    if strange or frame["names"].n_unique() < 2:
        return frame, {"labels": f"not used: {strange[0]!r} is no class" if strange else "not used: all the same"}
    frame = frame.with_columns(_places(classes.names))
    return frame, {"labelled": frame.height - frame["labels"].null_count()}


def _places(names: Sequence[str]) -> pl.Expr:
    """``labels``: of each row's ``names`` their places among all."""
    place = {name: index for index, name in enumerate(names)}
    return pl.col("names").list.eval(pl.element().replace_strict(place, return_dtype=pl.UInt16)).alias("labels")


def _split_labels(
    frame: pl.DataFrame, settings: Settings, *, exclusive: bool | None = None
) -> tuple[pl.DataFrame, bool]:
    """Add ``names``, the classes of each row (null = not known), and say whether each row has exactly one.

    `exclusive`: whether it has, where that is known.
    """
    if isinstance(frame.schema["label"], pl.List):
        names, exclusive = pl.col("label"), False
    else:
        text = pl.col("label").str.strip_chars()
        if exclusive is None:
            exclusive = not (settings.separator and frame["label"].str.contains(settings.separator, literal=True).any())
        whole = exclusive or not settings.separator
        names = pl.concat_list(pl.when(text != "").then(text)) if whole else text.str.split(settings.separator)
        names = pl.when(text == "").then(None).otherwise(names) if exclusive else names
    stripped = names.list.eval(pl.element().str.strip_chars())
    tidy = stripped.list.eval(pl.element().filter(pl.element() != "")).list.unique().list.sort()
    known = pl.when(pl.col("label").is_null()).then(None).otherwise(tidy)
    return frame.with_columns(known.alias("names")), exclusive


def are_too_many(names: int, labelled: int) -> bool:
    """Whether so many different labels of so many sequences are none."""
    return names > _MOST_CLASSES or (names > 10 and 2 * names > labelled)


def _check_classes(names: Sequence[str], labelled: int, *, exclusive: bool, where: str) -> None:
    least = 2 if exclusive else 1
    if len(names) < least:
        raise DataError(
            f"{where}: {len(names)} class{'' if len(names) == 1 else 'es'} ({', '.join(names) or 'no label at all'}); "
            f"expected at least {least}. Next: check the label's column, or name another in columns.toml."
        )
    if are_too_many(len(names), labelled):
        raise DataError(
            f"{where}: {len(names):,} different labels on {labelled:,} sequences, such as {names[0]!r}; expected "
            "classes that come again. Next: name the column in columns.toml: label = '<of classes>', or "
            "numbers = ['<of measured numbers>']."
        )


def _combined(names: Sequence[str], *, taken: str) -> str:
    """A hint where several labels of a cell were read as one class, and which setting tells them apart; else "".

    `taken`: the separator at which cells were split. A class is such where its parts are classes themselves, or parts
    of others.

    >>> _combined(["Am", "Am,Gm", "Gm"], taken=";")[:59]
    "labels such as 'Am,Gm', 1 of 3, are taken for classes of th"
    >>> _combined(["beta lactam", "alpha/beta", "alpha"], taken=";")
    ''
    """
    for sign in _BETWEEN_LABELS:
        parts = {name: {part.strip() for part in name.split(sign)} for name in names if sign != taken and sign in name}
        uses = Counter(part for each in parts.values() for part in each)
        found = [name for name, each in parts.items() if all(part in names or uses[part] > 1 for part in each)]
        if found:
            count = len({part for name in found for part in parts[name]})
            return (
                f"labels such as {found[0]!r}, {len(found):,} of {len(names):,}, are taken for classes of their own, "
                f"and look like combinations of {count:,} others. Next, if they are: separator = '{sign}' in "
                "columns.toml beside the file makes these the classes, several a sequence."
            )
    return ""


def _alike(names: Sequence[str]) -> str:
    """A hint where two classes differ in how they are written alone, or one looks like no label at all; else "".

    >>> _alike(["0", "1", "1.0"])[:48], _alike(["a", "NaN"])[:34], _alike(["a", "b"])
    ("labels '1' and '1.0' are taken for two classes. ", "the label 'NaN' is taken for a cla", '')
    """
    written: dict[str, str] = {}
    for name in names:
        first = written.setdefault(name.lower().removesuffix(".0"), name)
        if first != name:
            return f"labels {first!r} and {name!r} are taken for two classes. Next, if they are one: write them alike."
        if name.lower() in UNSAID:
            return f"the label {name!r} is taken for a class. Next, if it means that none is known: empty these cells."
    return ""


def _alone(classes: Classes) -> str:
    """A hint where there are classes of a single sequence; else ""."""
    alone = [name for name, count in zip(classes.names, classes.counts, strict=True) if count == 1]
    if not alone:
        return ""
    return (
        f"{len(alone):,} of {len(classes.names):,} classes have a single sequence, such as {alone[0]!r}: where that is "
        "held out, nothing has taught its class. Next: join such classes, or leave them out."
    )
