"""Sequences with classes, one each or any number of them, and what may be wrong with how they are written."""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import polars as pl

from pipeline.competitions.sequence_files import Settings
from pipeline.competitions.sequence_rows import UNSAID, duplicates, spot, train_table, with_ids
from pipeline.errors import DataError
from pipeline.labels import Classes
from pipeline.runlog import warn

_MOST_CLASSES = 1 << 16
_MOSTLY_NUMBERS = 0.8  # share of cells from which the others are faults in a column of numbers
_BETWEEN_LABELS = (",", "|", "/", "+", "&", ";")  # signs that may stand between the labels in a cell


def take_classes(
    frame: pl.DataFrame, alphabet: str, settings: Settings
) -> tuple[pl.DataFrame, Classes, dict[str, Any]]:
    """The clean train table, its classes, and what there is to say of both."""
    rows, where = frame.height, frame["where"][0]
    frame, exclusive = _split_labels(frame, settings)
    frame, names, tidied = _tidy(frame, settings, exclusive=exclusive)
    labelled = None if settings.classes else int(frame["names"].is_not_null().sum())  # as columns they are no doubt
    if labelled is not None and are_too_many(len(names), labelled):
        _refuse_numbers(frame)
    _check_classes(names, labelled, exclusive=exclusive, where=where)
    frame = with_ids(frame, "train", may_repeat=True)
    train = train_table(frame, _places(names))
    counted = dict(train["labels"].explode().drop_nulls().value_counts().iter_rows())
    counts = tuple(counted.get(index, 0) for index in range(len(names)))
    classes = Classes(tuple(names), counts, exclusive, alphabet, _groups(names, settings.groups, where=where))
    for hint in filter(None, (_combined(names, taken=settings.separator), _alike(names), _alone(classes))):
        warn(f"{where}: {hint}")
    of_column = f", from {frame['label_name'][0]}" if frame["label_name"][0] != "label" else ""
    facts = {
        "rows": rows,
        "sequences": train.height,
        "labels": ("one class each" if exclusive else "any number of classes each") + of_column,
        "unlabelled": int((~train["scored"]).sum()),
        "classes": dict(zip(names, classes.counts, strict=True)),
        "duplicates": duplicates(train, frame, "labels", rows=rows),
    }
    return train, classes, facts | tidied


def take_test_classes(
    frame: pl.DataFrame, classes: Classes, settings: Settings, *, dropped: Iterable[str] = ()
) -> tuple[pl.DataFrame, dict[str, str | int]]:
    """Add ``labels`` to a test set whose labels are known, which nothing but its score ever reads; and what was found.

    Columns that only look like labels, or hold the same everywhere, are passed over. `dropped`: classes that the
    training set has no more; a sequence with one alone is not scored.
    """
    if "label" not in frame.columns:
        return frame, {}
    frame, _ = _split_labels(frame, settings, exclusive=classes.exclusive)
    for names in (settings.merge, dict.fromkeys(dropped, "")):
        frame = _rename(frame, names, exclusive=classes.exclusive)
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


def _tidy(
    frame: pl.DataFrame, settings: Settings, *, exclusive: bool
) -> tuple[pl.DataFrame, list[str], dict[str, dict[str, int]]]:
    """Merge and drop classes as columns.toml says, leave out rows that come again, and tell how many had each.

    A row that comes again may have made a class seem large enough: what is dropped is looked for until all stays. The
    same settings then change nothing of what comes out.
    """
    found, where = _count(frame), frame["where"][0]
    if strange := sorted(settings.merge.keys() - found.keys() - set(settings.classes)):
        warn(f"{where}: no label {strange[0]!r}, which columns.toml merges. Next: correct or remove it there.")
    merged = {old: new for old, new in settings.merge.items() if old in found}
    frame = _rename(frame, merged, exclusive=exclusive)
    given = {settings.merge.get(name, name) for name in settings.classes} - {""}
    names, dropped = sorted(given or _count(frame)), {old: found[old] for old, new in merged.items() if not new}
    while True:
        if "id" in frame.columns:
            frame = frame.unique(["id", "sequence", "names"], keep="first", maintain_order=True)
        counts = _count(frame)
        rare = {name: counts.get(name, 0) for name in names if counts.get(name, 0) < settings.min_count}
        if not rare:
            break
        frame = _rename(frame, dict.fromkeys(rare, ""), exclusive=exclusive)
        names, dropped = [name for name in names if name not in rare], dropped | rare
    least = 2 if exclusive else 1
    if dropped and len(names) < least:
        raise DataError(
            f"{where}: columns.toml leaves {', '.join(names) or 'none'} of {len(found):,} classes; expected at least "
            f"{least}. Next: lower min_count (it is {settings.min_count}), or merge less."
        )
    told = {"merged": {f"{old} -> {new}": found[old] for old, new in merged.items() if new}, "dropped": dropped}
    return frame, names, {kind: counts for kind, counts in told.items() if counts}


def _count(frame: pl.DataFrame) -> dict[str, int]:
    """Rows that have each class."""
    return dict(frame["names"].explode().drop_nulls().value_counts().iter_rows())


def _groups(names: Sequence[str], told: Mapping[str, Sequence[str]], *, where: str) -> tuple[str, ...]:
    """Of each class the first group of columns.toml that fits it, "" = none; () where there are no groups.

    >>> _groups(["liver|DNase", "liver|CTCF"], {"DNase": ["*|DNase"], "TF": ["*"]}, where="train.csv")
    ('DNase', 'TF')
    """

    found = dict[str, str]()
    for group, pattern in ((group, pattern) for group, patterns in told.items() for pattern in patterns):
        fitting = [name for name in names if name == pattern or fnmatchcase(name, pattern)]  # names may hold [ and *
        if not fitting:
            warn(
                f"{where}: no class is {pattern!r}, which columns.toml has in groups.{group}. Next: correct or remove "
                "it there; * stands for any letters."
            )
        found = dict.fromkeys(fitting, group) | found
    return tuple(found.get(name, "") for name in names) if told else ()


def _rename(frame: pl.DataFrame, names: Mapping[str, str], *, exclusive: bool) -> pl.DataFrame:
    """Other classes in place of some, "" = none; of a row that then has none where each has one, it is not known."""
    if not names:
        return frame
    renamed = pl.col("names").list.eval(pl.element().replace(dict(names)))
    kept = renamed.list.eval(pl.element().filter(pl.element() != "")).list.unique().list.sort()
    return frame.with_columns(pl.when((kept.list.len() > 0) | (not exclusive)).then(kept).alias("names"))


def are_too_many(names: int, labelled: int) -> bool:
    """Whether so many different labels of so many sequences are none."""
    return names > _MOST_CLASSES or (names > 10 and 2 * names > labelled)


def no_number(name: str, cell: str) -> tuple[str, str]:
    """What is wrong with a cell in a column of numbers, and what to do, for messages.

    >>> no_number("tm", "51,3")[1], no_number("tm", ">10")[1]
    ('write decimal points', 'repair or empty the cell')
    """
    has_comma = re.fullmatch(r"[-+]?[\d.]*,\d+", cell)
    wanted = f"a finite number{', with a decimal point' if has_comma else ''}, or an empty cell where none was measured"
    return f"{name} is {cell!r}; expected {wanted}", "write decimal points" if has_comma else "repair or empty the cell"


def _refuse_numbers(frame: pl.DataFrame) -> None:
    """Of labels that are no classes, and of which most are numbers, name the first that is none."""
    if isinstance(frame.schema["label"], pl.List):
        return
    told = frame.with_columns(pl.col("label").str.strip_chars()).filter(
        (pl.col("label") != "") & ~pl.col("label").str.to_lowercase().is_in(UNSAID)
    )
    finite = told["label"].cast(pl.Float64, strict=False).is_finite().fill_null(False)
    commas = told["label"].str.contains(r"^[-+]?\d+,\d+$")
    wrong = told.filter(~finite)
    if wrong.height and (finite | commas).sum() >= _MOSTLY_NUMBERS * told.height:
        row = wrong.row(0, named=True)
        said, cure = no_number(row["label_name"], row["label"])
        raise DataError(f"{spot(row)}: {said}. Next: {cure}.")


def _check_classes(names: Sequence[str], labelled: int | None, *, exclusive: bool, where: str) -> None:
    least = 2 if exclusive else 1
    if len(names) < least:
        raise DataError(
            f"{where}: {len(names)} class{'' if len(names) == 1 else 'es'} ({', '.join(names) or 'no label at all'}); "
            f"expected at least {least}. Next: check the label's column, or name another in columns.toml."
        )
    if labelled is not None and are_too_many(len(names), labelled):
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
            cure = f"merge = {{ '{name}' = '{first}' }} in columns.toml"
            return f"labels {first!r} and {name!r} are taken for two classes. Next, if they are one: {cure}."
        if name.lower() in UNSAID:
            cure = f"empty these cells, or merge = {{ '{name}' = '' }} in columns.toml"
            return f"the label {name!r} is taken for a class. Next, if it means that none is known: {cure}."
    return ""


def _alone(classes: Classes) -> str:
    """A hint where there are classes of a single sequence; else ""."""
    alone = [name for name, count in zip(classes.names, classes.counts, strict=True) if count == 1]
    if not alone:
        return ""
    return (
        f"{len(alone):,} of {len(classes.names):,} classes have a single sequence, such as {alone[0]!r}: where that is "
        "held out, nothing has taught its class. Next: min_count = 2 in columns.toml drops such classes, merge joins "
        "them to others."
    )
