"""Numbers per nucleotide in tables as people keep them: lists in cells, numbered columns, dot-bracket structures.

Letters: N rows, L length of a sequence (nt), T = sum of lengths, V values of a column in a row, W position columns.
"""

import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import polars as pl

from pipeline.competitions.openvaccine import error_column
from pipeline.errors import DataError

#: What a cell or a list that was not measured holds, in small letters; so does -999.
MISSING = ("", "nan", "na", "n/a", "none", "null")
_NOT_MEASURED = -999.0
_STRUCTURES = ("structure", "dot_bracket", "dotbracket", "secondary_structure", "ss", "db")
#: What follows, or precedes, the name of values in that of their errors; the rest only beside the values themselves.
_ERRORS = ("error", "err", "errors", "std", "stdev", "stderr", "sd")
_ERRORS_BESIDE = ("se", "sem", "stddev", "sigma", "unc", "uncertainty")
_BRACKETS = {"(": ")", "[": "]", "{": "}", "<": ">"}  # and pseudoknots A a, B b, …
_BRACKET_TEXT = re.compile(r"[.()\[\]{}<>A-Za-z]+")
_NUMBER = r"(?:[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?|(?i:nan|na|n/a|none|null))"
_SPLIT_AT = re.compile(r"\s*[,;]\s*|\s+")
_NUMBERED = re.compile(r"(.+)_(\d+)|(.*\D)(\d+)")
_COMMAS = r"\d,\d+[;\s]+[+-]?\d+,\d"  # of decimals, in lists that have other signs between their numbers
_AT_ONCE = 4096  # rows whose text is taken apart together
_LOOKED_AT = 200  # cells from which it is told what a column holds
_MOSTLY = 0.8  # share of numbers in a column from which its other cells are faults
_LARGEST = float(np.finfo(np.float32).max)
REPAIR = "Next: repair that row, or remove it."
_POINTS = "Next: write decimal points."


@dataclass(frozen=True)
class Source:
    """Where the values of one target are."""

    columns: tuple[str, ...]  #: a single one, or one for each position, 1 first
    is_structure: bool = False


@dataclass(frozen=True, kw_only=True)
class Rows:
    """Sequences whose values are read."""

    where: list[str]  #: N places, for messages
    lengths_N: np.ndarray  #: [N] int64
    first_N: np.ndarray  #: [N] float64, position (from 1) of the first value of a list; NaN = not said
    measured_N: np.ndarray  #: [N] float64, how many values from the 5' end a list holds; NaN = not said

    def __getitem__(self, some: slice) -> "Rows":
        arrays = {name: getattr(self, name)[some] for name in ("lengths_N", "first_N", "measured_N")}
        return Rows(where=self.where[some], **arrays)


def find_targets(frame: pl.DataFrame, rows: Rows, *, told: Sequence[str], where: str) -> dict[str, Source]:
    """Target -> where its values are.

    Args:
        frame: the columns that have no other role.
        rows: its sequences.
        told: names of the targets, as ``columns.toml`` has them; [] = all columns of numbers that fit the sequences
            and are no errors or, where there are none, the structure.
        where: the file.

    Raises:
        DataError: a target that is not there, or none at all.
    """
    numbered = numbered_columns(frame.columns)
    listed = ", ".join(_short(frame.columns, numbered)) or "no other column"
    if uncounted := _uncounted(frame.columns, numbered):
        listed += f" ({uncounted[0]} to {uncounted[-1]} are not numbered 1, 2, 3 … without a gap, after a name)"
    if told:
        found = {name: _source(frame, name, numbered) for name in told}
        if lost := [name for name, source in found.items() if source is None]:
            raise DataError(f"{where}: no column {lost[0]!r}, a target; found {listed}. Next: correct columns.toml.")
        return {_target_name(name, source): source for name, source in found.items() if source is not None}
    lists = {
        name: Source((name,)) for name in frame.columns if _holds_numbers(frame[name]) and _fits(frame[name], rows)
    }
    wide = {stem: Source(tuple(names)) for stem, names in numbered.items() if _is_number(frame[names[0]])}
    values = {name: source for name, source in (wide | lists).items() if not _is_error(name)}
    beside = {f"{name}_{word}" for name in values for word in _ERRORS_BESIDE}
    targets = {name: source for name, source in values.items() if name not in beside}
    short = [name for name in targets if name in wide and len(wide[name].columns) < rows.lengths_N.max()]
    if whole := {name: source for name, source in targets.items() if name not in short}:
        return whole
    structures = [name for name in frame.columns if name.strip().lower() in _STRUCTURES]
    if len(structures) == 1:
        return {"unpaired": Source((structures[0],), is_structure=True)}
    if short:
        raise DataError(
            f"{where}: columns {short[0]} 1 to {len(wide[short[0]].columns)}; expected one for each of the "
            f"{rows.lengths_N.max()} letters of the longest sequence. Next, if the first letter's is the first: "
            f"targets = ['{short[0]}'] in columns.toml beside the file."
        )
    raise DataError(
        f"{where}: no column holds numbers, as many as the sequence has letters, or a structure; found {listed}. Next: "
        "say which: targets = ['<column>'] in columns.toml beside the file."
    )


def numbered_columns(names: Sequence[str]) -> dict[str, list[str]]:
    """Stem -> its columns in order, of those that are numbered 1, 2, … without a gap.

    >>> numbered_columns(["id", "2A3_0002", "2A3_0001", "deg_pH10", "x2", "r1", "r2"])
    {'2A3': ['2A3_0001', '2A3_0002'], 'r': ['r1', 'r2']}
    """
    stems: dict[str, dict[int, str]] = {}
    for name in names:
        if found := _NUMBERED.fullmatch(name):
            stems.setdefault(found[1] or found[3], {})[int(found[2] or found[4])] = name
    whole = {
        stem: found for stem, found in stems.items() if len(found) > 1 and set(found) == {*range(1, len(found) + 1)}
    }
    return {stem: [found[place] for place in sorted(found)] for stem, found in whole.items()}


def _uncounted(names: Sequence[str], numbered: Mapping[str, Sequence[str]]) -> list[str]:
    """Columns that are numbered, ten or more, and not as positions are.

    >>> _uncounted([f"r_{k}" for k in range(12)], {})[0], _uncounted(["pH7", "pH10"], {})
    ('r_0', [])
    """
    inside = {name for each in numbered.values() for name in each}
    found = [name for name in names if name not in inside and re.fullmatch(r"(.*\D)?\d+", name)]
    return found if len(found) >= 10 else []


def error_source(frame: pl.DataFrame, target: str, rows: Rows) -> Source | None:
    """Where the errors of a target's values are.

    They are called ``<target>_error`` or as OpenVaccine has it; ``_sem`` and the like are, if they fit the sequences.
    """
    numbered = numbered_columns(frame.columns)
    for name in dict.fromkeys((f"{target}_error", error_column(target))):
        if name != target and (found := _source(frame, name, numbered)):
            return found
    for name in (f"{target}_{word}" for word in (*_ERRORS, *_ERRORS_BESIDE)):
        found = _source(frame, name, numbered)
        if found and (name in numbered or (_holds_numbers(frame[name]) and _fits(frame[name], rows))):
            return found
    return None


def read_values(frame: pl.DataFrame, source: Source, rows: Rows) -> np.ndarray:
    """[T] float32 values of a target, NaN where it was not measured.

    Raises:
        DataError: text among numbers, or a list of another length than its sequence; row and position are named.
    """
    parts = (slice(first, first + _AT_ONCE) for first in range(0, frame.height, _AT_ONCE))
    return np.concatenate([_read_values(frame[part], source, rows[part]) for part in parts])


def _read_values(frame: pl.DataFrame, source: Source, rows: Rows) -> np.ndarray:
    name = source.columns[0]
    if source.is_structure:
        return _unpaired(frame[name].cast(pl.String), rows)
    if len(source.columns) > 1:
        values_NW = np.stack([read_numbers(frame[column], rows.where, column) for column in source.columns], axis=1)
        counts_N = np.full(len(values_NW), values_NW.shape[1])
        return _place(values_NW.ravel(), counts_N, np.zeros(len(counts_N), dtype=np.int64), rows, name=name)
    if frame[name].dtype == pl.String and (commas := frame[name].str.contains(_COMMAS).fill_null(False)).any():
        at = int(commas.arg_max() or 0)
        cell = str(frame[name][at])[:24]
        raise DataError(f"{rows.where[at]}: {name} holds '{cell} …'; expected numbers with a decimal point. {_POINTS}")
    lists = _split(frame[name])
    counts_N = lists.list.len().fill_null(0).to_numpy().astype(np.int64)
    flat = lists.filter(lists.list.len() > 0).explode()
    places = np.repeat(np.arange(len(counts_N)), counts_N)
    at_V = np.arange(len(places)) - np.repeat(np.cumsum(counts_N) - counts_N, counts_N)
    values_V = read_numbers(flat, rows.where, name, row_V=places, at_V=at_V)
    return _place(values_V, counts_N, _starts(counts_N, rows, name=name), rows, name=name)


def _source(frame: pl.DataFrame, name: str, numbered: Mapping[str, Sequence[str]]) -> Source | None:
    if name in frame.columns:
        return Source((name,), is_structure=_is_structure(frame[name]))
    return Source(tuple(numbered[name])) if name in numbered else None


def _target_name(name: str, source: Source) -> str:
    return "unpaired" if source.is_structure else name


def _short(names: Sequence[str], numbered: Mapping[str, Sequence[str]]) -> list[str]:
    """Column names for a message, numbered ones by their stems."""
    inside = {name for each in numbered.values() for name in each}
    found = [name for name in names if name not in inside] + [f"{stem} 1-{len(v)}" for stem, v in numbered.items()]
    return found[:12] + ["…"] * (len(found) > 12)


def _is_error(name: str) -> bool:
    return re.search(rf"(?i)(^|_)({'|'.join(_ERRORS)})(_|$)", name) is not None


def _is_number(column: pl.Series) -> bool:
    if column.dtype == pl.String:
        return _are_mostly(re.fullmatch(rf"{_NUMBER}|[+-]?\d+,\d+", text.strip()) for text in _cells(column))
    return column.dtype.is_numeric()


def _cells(column: pl.Series) -> list[str]:
    told = column.drop_nulls()
    return told.filter(~told.str.strip_chars().str.to_lowercase().is_in(MISSING)).head(_LOOKED_AT).to_list()


def _holds_numbers(column: pl.Series) -> bool:
    """Whether the cells are lists of numbers; of text, most of them: `read_values` names the others."""
    if isinstance(column.dtype, pl.List | pl.Array):
        inner = column.dtype.inner
        return inner is not None and pl.Series(dtype=inner).dtype.is_numeric()
    cells = _cells(column) if column.dtype == pl.String else []
    lists = [_SPLIT_AT.split(text.strip().strip("[]()").strip()) for text in cells]
    return (
        bool(cells)
        and min(map(len, lists)) > 1
        and _are_mostly(re.fullmatch(rf"{_NUMBER}?", value) for values in lists for value in values)
    )


def _are_mostly(found: Iterable[object]) -> bool:
    """Whether so many are as expected that the others are faults, which are to be named."""
    right = [each is not None for each in found]
    return sum(right) >= _MOSTLY * len(right)


def _fits(column: pl.Series, rows: Rows) -> bool:
    """Whether most lists that are looked at have the length that their sequence asks for."""
    counts_N = _split(column.head(_LOOKED_AT)).list.len().fill_null(0).to_numpy().astype(np.int64)
    is_right = np.isfinite(_start_of(counts_N, rows))[counts_N > 0]
    return bool(is_right.size) and is_right.mean() >= 0.5


def _is_structure(column: pl.Series) -> bool:
    cells = _cells(column) if column.dtype == pl.String else []
    return bool(cells) and all(_BRACKET_TEXT.fullmatch(text.strip()) for text in cells) and "." in "".join(cells)


def _split(column: pl.Series) -> pl.Series:
    """A column of lists; those of text are split at commas, semicolons or spaces, brackets around them left out."""
    if column.dtype != pl.String:
        return column if isinstance(column.dtype, pl.List) else column.cast(pl.List(pl.Float64))
    text = column.str.strip_chars().str.strip_chars("[]()").str.strip_chars()
    text = text.str.replace_all(r"\s*[,;]\s*", ",").str.replace_all(r"\s+", ",")
    said = pl.DataFrame({"text": text}).select(pl.when(pl.col("text") != "").then("text")).to_series()
    return said.str.split(",")


def read_numbers(
    column: pl.Series,
    where: Sequence[str],
    name: str,
    *,
    row_V: np.ndarray | None = None,
    at_V: np.ndarray | None = None,
) -> np.ndarray:
    """[V] float64 values, NaN where nothing was measured.

    Args:
        column: V values, a row each unless `row_V` is given.
        where: place of every row, for messages.
        name: of the column.
        row_V: [V] row of each value.
        at_V: [V] place of each value in its list, from 0.

    Raises:
        DataError: text, or a number that is infinite or needs more than 32 bits.
    """
    if column.dtype == pl.String:
        text = column.str.strip_chars()
        said = ~text.str.to_lowercase().is_in(MISSING).fill_null(True)
        numbers = text.cast(pl.Float64, strict=False)
    else:
        said, numbers = column.is_not_null(), column.cast(pl.Float64, strict=False)
    bad = said & (numbers.is_null() | (numbers.abs() > _LARGEST).fill_null(False) & ~numbers.is_nan().fill_null(False))
    if bad.any():
        at = int(bad.arg_max() or 0)
        row = at if row_V is None else int(row_V[at])
        place = "" if at_V is None else f" at position {int(at_V[at]) + 1}"
        most = "" if numbers[at] is None else f" of at most {_LARGEST:.2g}"
        has_comma = re.fullmatch(r"\s*[-+]?\d+,\d+\s*", str(column[at]))
        most += ", with a decimal point" if has_comma else ""
        holds = f"{where[row]}: {name} holds {str(column[at])[:40]!r}{place}"
        raise DataError(f"{holds}; expected a number{most}. {_POINTS if has_comma else REPAIR}")
    values_V = numbers.to_numpy().astype(np.float64)
    return np.where(values_V == _NOT_MEASURED, np.nan, values_V)


def _start_of(counts_N: np.ndarray, rows: Rows) -> np.ndarray:
    """[N] float64 letter (from 0) at which lists of some lengths begin; NaN = that cannot be told."""
    some = slice(0, len(counts_N))
    lengths_N, first_N, measured_N = rows.lengths_N[some], rows.first_N[some], rows.measured_N[some]
    whole_N = (counts_N == 0) | (counts_N >= lengths_N) | (counts_N == measured_N)
    return np.where(whole_N, 0.0, first_N - 1)


def _starts(counts_N: np.ndarray, rows: Rows, *, name: str) -> np.ndarray:
    start_N = _start_of(counts_N, rows)
    wrong_N = ~(start_N >= 0) | (start_N % 1 > 0) | ((start_N + counts_N > rows.lengths_N) & (start_N > 0))
    if wrong_N.any():
        row = int(wrong_N.argmax())
        begins = "" if np.isnan(start_N[row]) else f", from position {start_N[row] + 1:g} on"
        raise DataError(
            f"{rows.where[row]}: {name} holds {counts_N[row]} values{begins}; the sequence has "
            f"{rows.lengths_N[row]} letters, expected as many. Next: fill up with null, or say in columns.toml which "
            "column holds the position (from 1) of the first value: first = '<column>'."
        )
    return start_N.astype(np.int64)


def _place(values_V: np.ndarray, counts_N: np.ndarray, start_N: np.ndarray, rows: Rows, *, name: str) -> np.ndarray:
    """Values at their letters, [T] float32; what is beyond the sequence must be missing."""
    row_V = np.repeat(np.arange(len(counts_N)), counts_N)
    at_V = np.arange(len(row_V)) - np.repeat(np.cumsum(counts_N) - counts_N, counts_N) + start_N[row_V]
    inside_V = at_V < rows.lengths_N[row_V]
    beyond_V = ~inside_V & ~np.isnan(values_V)
    if beyond_V.any():
        at = int(beyond_V.argmax())
        row = int(row_V[at])
        raise DataError(
            f"{rows.where[row]}: {name} holds {values_V[at]:g} at position {at_V[at] + 1}; the sequence ends with "
            f"letter {rows.lengths_N[row]}, expected nothing beyond. {REPAIR}"
        )
    flat_T = np.full(int(rows.lengths_N.sum()), np.nan, dtype=np.float32)
    offsets_N = np.cumsum(rows.lengths_N) - rows.lengths_N
    flat_T[offsets_N[row_V[inside_V]] + at_V[inside_V]] = values_V[inside_V]
    return flat_T


def _unpaired(column: pl.Series, rows: Rows) -> np.ndarray:
    """1 for every dot of a dot-bracket structure, 0 for every bracket; no structure: NaN."""
    texts = [(text or "").strip() for text in column.to_list()]
    for text, length, where in zip(texts, rows.lengths_N.tolist(), rows.where, strict=True):
        if text and len(text) != length:
            raise DataError(f"{where}: a structure of {len(text)} signs; expected {length}, one a letter. {REPAIR}")
        if text and not (_BRACKET_TEXT.fullmatch(text) and _is_balanced(text)):
            raise DataError(f"{where}: structure {text[:40]!r}; expected dots and brackets that close. {REPAIR}")
    signs = "".join(text or " " * length for text, length in zip(texts, rows.lengths_N.tolist(), strict=True))
    sign_T = np.frombuffer(signs.encode(), dtype="S1")
    return np.where(sign_T == b".", 1.0, np.where(sign_T == b" ", np.nan, 0.0)).astype(np.float32)


def _is_balanced(text: str) -> bool:
    """Whether as many brackets of each kind open as close.

    >>> _is_balanced("((.[[A.)).]]a"), _is_balanced("((.)")
    (True, False)
    """
    counts = Counter(text)
    pairs = _BRACKETS | {chr(code): chr(code).lower() for code in range(ord("A"), ord("Z") + 1)}
    return all(counts[opening] == counts[closing] for opening, closing in pairs.items())
