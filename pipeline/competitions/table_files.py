"""A table or FASTA file as people have it: parquet, and text with commas, tabs, semicolons or bars, also as ``.gz``."""

import contextlib
import csv
import gzip
import os
import re
import zlib
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import IO

import polars as pl
import pyarrow as pa
import pyarrow.csv as pa_csv

from pipeline.competitions.raw import open_parquet, refuse_twice
from pipeline.competitions.raw_files import kind_of
from pipeline.errors import DataError
from pipeline.runlog import warn

_SEPARATORS = {".csv": ",", ".tsv": "\t", ".txt": "\t"}
TEXT = tuple(_SEPARATORS)  #: endings of tables of text
FASTA = (".fasta", ".fa", ".fna", ".faa")
#: Endings of files that other programs read -> what they are, and how they become a table there.
_FOREIGN = {
    **dict.fromkeys((".h5", ".hdf5", ".hdf"), ("HDF5", "pandas.read_hdf({0!r}, '<key>')")),
    **dict.fromkeys((".pkl", ".pickle"), ("a pickle", "pandas.read_pickle({0!r})")),
    **dict.fromkeys((".npz", ".npy"), ("arrays of numpy", "pandas.DataFrame({{'sequence': …, 'label': …}})")),
    **dict.fromkeys((".xlsx", ".xls"), ("a workbook", "pandas.read_excel({0!r})")),
    **dict.fromkeys((".feather", ".arrow"), ("an Arrow file", "pandas.read_feather({0!r})")),
}
_ROW = " row"  # of a sample, none of whose columns is called so
NUCLEOTIDE = "[ACGTUNacgtun]"
_UNIT = re.compile(r"\s*[(\[][^()\[\]]*[)\]]$")  # "tm [°C]"


def ending(path: Path) -> str:
    """Of a file's name, in small letters and without ``.gz``: ``.csv``."""
    return Path(path.name.lower().removesuffix(".gz")).suffix


def refuse_foreign(path: Path) -> None:
    """Say how a file becomes a table that is none, by its name.

    Raises:
        DataError: another program's file.
    """
    if ending(path) in _FOREIGN:
        what, call = _FOREIGN[ending(path)]
        raise DataError(
            f"{path}: {what}; expected a table of text or parquet. Next: write it as one in Python: "
            f"{call.format(path.name)}.to_csv('{path.name.partition('.')[0]}.csv', index=False), sequences as letters "
            "(flags become letters as pipeline/OWN_DATA.md shows)."
        )


def plain_heading(name: str) -> str:
    """A column's name in small letters, without a unit or remark in brackets at its end.

    >>> plain_heading("RNA Sequence (5'->3')")
    'rna_sequence'
    """
    return re.sub(r"[\s-]+", "_", _UNIT.sub("", name.strip().lower()))


def usual_columns(names: Sequence[str], usual: Sequence[str]) -> list[str]:
    """Those called by a usual name, in whatever letters; where none is, those whose plain heading is one.

    But for a group, which decides the folds: "Group (treatment)" is none of relatives.

    >>> usual_columns(["Name (clone)", "Group (treatment)"], ["name"]), usual_columns(["Group (treatment)"], ["group"])
    (['Name (clone)'], [])
    """
    called = [name for name in names if name.strip().lower() in usual]
    return called or [name for name in names if plain_heading(name) in usual and "group" not in usual]


def column_names(path: Path) -> list[str]:
    """Of a table, as the file has them."""
    if kind_of(path) != "parquet":
        return _header(path)[0]
    with open_parquet(path) as file:
        return list(file.schema_arrow.names)


def read_table(path: Path, columns: Sequence[str], *, blank_lines: bool = False) -> pl.DataFrame:
    """Some columns of a table, those of a text file as text, with a warning where its last line has no end.

    Args:
        path: CSV, TSV or parquet.
        columns: their names.
        blank_lines: whether lines without anything are rows, of empty cells, which count where rows are numbered.

    Raises:
        DataError: the file is cut short or damaged, or a row has another number of cells than the first line.
    """
    broken: list[pa_csv.InvalidRow] = []

    def refuse(row: pa_csv.InvalidRow) -> str:
        broken.append(row)
        return "error"

    try:
        if kind_of(path) == "parquet":
            with open_parquet(path) as file:
                table = file.read(columns=list(columns)).replace_schema_metadata(None)
            table.validate(full=True)  # of text that is none, metadata's too, polars panics, or crashes later
            return pl.DataFrame(table).with_columns(pl.col(pl.Categorical).cast(pl.String))
        names, separator = _header(path)
        _tell_no_end(path)
        with pa.input_stream(str(path), compression="gzip" if kind_of(path) == "gzip" else None) as source:
            return pl.DataFrame(
                pa_csv.read_csv(
                    source,
                    read_options=pa_csv.ReadOptions(column_names=names, skip_rows=1, use_threads=False),
                    parse_options=pa_csv.ParseOptions(
                        delimiter=separator,
                        newlines_in_values=True,
                        ignore_empty_lines=not blank_lines,
                        invalid_row_handler=refuse,  # which threads would leave without its number
                    ),
                    convert_options=pa_csv.ConvertOptions(
                        include_columns=list(columns),
                        column_types=dict.fromkeys(columns, pa.string()),
                        strings_can_be_null=False,
                    ),
                )
            )
    except (pa.ArrowException, OSError) as err:
        told = " ".join(str(err).split())[:200]
        if broken:
            row = broken[0]
            told = f"row {row.number - 1:,} has {row.actual_columns} cells, {row.text[:40]!r}; expected "
            told += f"{row.expected_columns}, as the first line has"
        raise DataError(f"{path.name}: {told}. Next: repair that row, or get the file again.") from err


def read_whole(path: Path, *, blank_lines: bool = True) -> pl.DataFrame:
    """All columns that have a name (spreadsheets end lines with separators), of all rows; see `read_table`.

    Raises:
        DataError: see `read_table`; or two columns have one name.
    """
    names = [name for name in column_names(path) if name]
    refuse_twice(names, where=path.name)
    return read_table(path, names, blank_lines=blank_lines)


def read_sample(path: Path) -> pl.DataFrame:
    """A sample submission as text, rows without anything left out.

    Raises:
        DataError: see `read_whole`.
    """
    table = read_whole(path).select(pl.all().cast(pl.String))
    return number_rows(table, _ROW).drop(_ROW)


def number_rows(frame: pl.DataFrame, name: str) -> pl.DataFrame:
    """Rows of text with anything in them, and their numbers: spreadsheets end with others, of separators alone."""
    numbered = empty = frame.with_row_index(name, offset=1)
    for column, kind in frame.schema.items():  # one after the other: few rows are left after the first
        text = pl.col(column).list.join("", ignore_nulls=True) if isinstance(kind, pl.List) else pl.col(column)
        empty = empty.filter(text.fill_null("").str.strip_chars() == "")
    return numbered.join(empty, on=name, how="anti", maintain_order="left") if empty.height else numbered


def read_flags(column: pl.Series) -> pl.Series:
    """Of each cell whether it says yes (1, 1.0, true) or no (0, 0.0, false); null = neither.

    >>> read_flags(pl.Series(["1.0", "False", " true", "2", None])).to_list()
    [True, False, True, None, None]
    """
    text = column.cast(pl.String).str.strip_chars().str.to_lowercase()
    said = dict.fromkeys(("1", "1.0", "true"), True) | dict.fromkeys(("0", "0.0", "false"), False)
    return text.replace_strict(said, default=None, return_dtype=pl.Boolean)


def _tell_no_end(path: Path) -> None:
    """Some programs leave the end of the last line out; in a file that was cut its last cell may be another one."""
    with path.open("rb") as handle:
        handle.seek(-1, os.SEEK_END)
        last = handle.read(1)
    if last not in b"\r\n" and kind_of(path) != "gzip":  # which says itself that it was cut
        warn(f"{path.name}: the last line has no end: if the file was cut there, its last cell is not whole")


def _header(path: Path) -> tuple[list[str], str]:
    """Column names of a text table, and what stands between them."""
    if kind_of(path) == "zip":
        raise DataError(f"{path.name}: an archive, or a workbook; expected text. Next: unpack it, or save it as CSV.")
    with open_text(path) as lines:
        first, second = (next(lines, "").rstrip("\r\n") for _ in range(2))
    of_excel = first.lower().startswith("sep=")
    if first.lstrip()[:1] in ("<", "") or "\0" in first or of_excel:
        cure = "remove that line" if of_excel else "check the file"
        raise DataError(f"{path.name}: the first line is {first[:40]!r}; expected column names. Next: {cure}.")
    usual = _SEPARATORS.get(ending(path), ",")
    signs = sorted((usual, ",", "\t", ";", "|"), key=first.count, reverse=True)  # the first of equals stays it
    separator = next((sign for sign in signs if 0 < first.count(sign) <= second.count(sign)), signs[0])
    names = next(csv.reader([first], delimiter=separator, skipinitialspace=True))
    if any(re.fullmatch(f"{NUCLEOTIDE}{{20,}}", name.strip()) for name in names):
        line = separator.join(("id", "sequence", "label")).replace("\t", "<tab>")
        line = f"a line such as '{line}', in the order of the columns" if len(names) > 1 else "the line 'sequence'"
        raise DataError(
            f"{path.name}: the first line holds a sequence; expected column names. Next: begin with {line}."
        )
    return [name.strip() for name in names], separator


@contextlib.contextmanager
def open_text(path: Path, *, errors: str = "strict") -> Iterator[IO[str]]:
    """Lines of a text file, plain or gzipped; `errors` as `open` takes it, of what is no UTF-8.

    Raises:
        DataError: the file is empty, cut short, or no UTF-8.
    """
    opener = gzip.open if kind_of(path) == "gzip" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig", errors=errors) as handle:
            yield handle
    except (EOFError, zlib.error, gzip.BadGzipFile, UnicodeDecodeError) as err:
        raise DataError(
            f"{path.name}: damaged, cut short or no UTF-8 text: {err}. Next: save it as UTF-8 (Excel: "
            "CSV UTF-8), or get it again."
        ) from err


def read_fasta(path: Path, *, labelled: bool) -> pl.DataFrame:
    """``id, sequence, label, label_name`` of a FASTA file; `labelled`: a label may also stand behind the id and a bar.

    Raises:
        DataError: letters before the first header.
    """
    ids: list[str] = []
    labels: list[str] = []
    texts: list[list[str]] = []
    with open_text(path) as lines:
        for number, line in enumerate(lines, start=1):
            line = line.strip()
            if line.startswith(">"):
                name, label = _split_header(line[1:].strip(), labelled=labelled)
                ids.append(name)
                labels.append(label)
                texts.append([])
            elif line and not texts:
                raise DataError(
                    f"{path.name}: line {number} is {line[:40]!r}; expected '>id label' first. Next: check the file."
                )
            elif line:
                texts[-1].append(line)
    frame = {"id": ids, "sequence": ["".join(parts) for parts in texts], "label": labels}
    told = pl.DataFrame(frame, schema_overrides={"sequence": pl.String})
    return told.with_columns(pl.lit("label").alias("label_name"))


def _split_header(header: str, *, labelled: bool) -> tuple[str, str]:
    """Id and label of ``id label`` or ``id|label``; of a test sequence the id alone.

    >>> _split_header("a1 beta lactam", labelled=True), _split_header("a|1|tRNA", labelled=True)
    (('a1', 'beta lactam'), ('a|1', 'tRNA'))
    """
    first, *rest = header.split(maxsplit=1) or [""]
    if rest or not labelled:
        return first, "".join(rest)
    name, bar, label = first.rpartition("|")
    return (name, label) if bar else (first, "")
