"""A submission read in blocks of 16 MiB, whatever its format: what cannot be read is named with its row."""

import gzip
import io
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import BinaryIO, Literal, cast

import pyarrow as pa
import pyarrow.csv as pacsv

from pipeline.competitions.raw import csv_cells
from pipeline.errors import DataError
from pipeline.runlog import warn
from pipeline.tables import open_parquet
from submissions.layout import Kind, Layout, other_competition

_BLOCK_BYTES = 1 << 24
_BATCH_ROWS = 1 << 18
#: What cells are read as.
ARROW = {"text": pa.string(), "whole": pa.int64(), "number": pa.float64()}
_WORDS = {"text": "text", "whole": "a whole number", "number": "a number"}

FileFormat = Literal["csv", "csv.gz", "parquet"]


def sniff(file: Path) -> FileFormat:
    """Format of a file by its first bytes, as a download or a temporary file may have any name.

    Raises:
        DataError: missing, empty, a folder, an archive or a web page.
    """
    if file.is_dir():
        raise DataError(f"{file}: a folder; expected a submission. Next: make check FILE=my.csv.")
    if not file.is_file():
        raise DataError(f"{file}: no such file. Next: make submit.")
    with file.open("rb") as handle:
        start = handle.read(512)
    if not start.strip():
        raise DataError(f"{file}: empty. Next: make submit again, or copy the file again.")
    if start.startswith(b"PAR1"):
        return "parquet"
    if start.startswith(b"\x1f\x8b"):
        return "csv.gz"
    if start.startswith(b"PK\x03\x04"):
        raise DataError(f"{file}: a zip archive; expected CSV, CSV.GZ or parquet. Next: unpack it.")
    if start.startswith((b"\xff\xfe", b"\xfe\xff")):
        raise DataError(f"{file}: text in UTF-16; expected UTF-8. Next: save it as CSV in UTF-8.")
    if start.lstrip().lower().startswith((b"<!doctype", b"<html", b"<?xml")):
        raise DataError(f"{file}: a web page, not a submission (a login page?). Next: download the file again.")
    return "csv"


def read_blocks(file: Path, columns: Mapping[str, Kind], *, fmt: FileFormat) -> Iterator[pa.Table]:
    """Blocks of a submission in its order: whole numbers as int64, names as text, values as float64 (null = empty).

    Args:
        file: the submission.
        columns: its header, and what the cells of each column are.
        fmt: as `sniff` says.

    Raises:
        DataError: other columns, a row that does not parse, or a damaged file.
    """
    if fmt == "parquet":
        yield from _parquet_blocks(file, columns)
        return
    try:
        with gzip.open(file) if fmt == "csv.gz" else file.open("rb") as handle:
            yield from _csv_blocks(cast(BinaryIO, handle), file, columns)
    except (EOFError, gzip.BadGzipFile, zlib.error) as err:
        raise DataError(f"{file}: the compressed data end early or are damaged ({err}). Next: copy it again.") from err


def _csv_blocks(handle: BinaryIO, file: Path, columns: Mapping[str, Kind]) -> Iterator[pa.Table]:
    header = handle.readline(1 << 16).removeprefix(b"\xef\xbb\xbf").decode("utf-8", "replace")
    _check_columns(csv_cells(header), list(columns), file=file)
    rows, rest = 0, b""
    while True:
        data = handle.read(_BLOCK_BYTES)
        text = rest + data
        cut = text.rfind(b"\n") + 1 if data else len(text)
        if rest and not data:
            warn(f"{file}: the last line has no end: if the file was cut there, the last number is not whole")
        if cut:
            block = _parse(text[:cut], columns, file=file, rows=rows)
            rows += block.num_rows
            yield block
        if not data:
            return
        rest = text[cut:]


def _parse(text: bytes, columns: Mapping[str, Kind], *, file: Path, rows: int) -> pa.Table:
    types = {name: ARROW[kind] for name, kind in columns.items()}
    try:
        return pacsv.read_csv(
            pa.BufferReader(text),
            read_options=pacsv.ReadOptions(use_threads=False, column_names=list(columns), block_size=len(text) + 1),
            parse_options=pacsv.ParseOptions(ignore_empty_lines=False),
            convert_options=pacsv.ConvertOptions(column_types=types, null_values=[""], strings_can_be_null=True),
        )
    except pa.ArrowInvalid as err:
        raise _unparsable(text, columns, file=file, rows=rows, err=err) from err


def _unparsable(text: bytes, columns: Mapping[str, Kind], *, file: Path, rows: int, err: Exception) -> DataError:
    """Find the row that the fast parser refused, slowly."""
    for row, line in enumerate(io.StringIO(text.decode("utf-8", "replace"), newline="\n"), start=rows + 1):
        cells = csv_cells(line)
        if len(cells) != len(columns):
            cut = ": the file may be cut" if len(cells) < len(columns) else ""
            return wrong_row(file, row, f"{len(cells)} cells ({','.join(cells)[:60]!r}); expected {len(columns)}{cut}")
        for (name, kind), cell in zip(columns.items(), cells, strict=True):
            if cell and not _reads_as(cell, kind):
                return wrong_row(file, row, f"{name} is {cell[:40]!r}; expected {_WORDS[kind]}")
    return DataError(f"{file}: from data row {rows + 1:,}: {' '.join(str(err).split())}. Next: make submit again.")


def _reads_as(cell: str, kind: Kind) -> bool:
    if kind == "text":
        return True
    try:
        number = int(cell) if kind == "whole" else float(cell)
    except ValueError:
        return False
    return "_" not in cell and (kind != "whole" or -(2**63) <= number < 2**63)


def _parquet_blocks(file: Path, columns: Mapping[str, Kind]) -> Iterator[pa.Table]:
    opened = open_parquet(file)
    _check_columns(opened.schema_arrow.names, list(columns), file=file)
    for name, kind in columns.items():
        got = opened.schema_arrow.field(name).type
        ok = pa.types.is_integer(got) if kind == "whole" else kind == "text" or pa.types.is_floating(got)
        if not ok:
            expected = "a whole number" if kind == "whole" else "a floating-point number"
            raise DataError(f"{file}: column {name} is {got}; expected {expected}. Next: make submit again.")
    schema = pa.schema([(name, ARROW[kind]) for name, kind in columns.items()])
    try:
        for batch in opened.iter_batches(batch_size=_BATCH_ROWS):
            batch.validate(full=True)  # letters that are none
            yield pa.Table.from_batches([batch]).cast(schema)
    except (pa.ArrowInvalid, OSError) as err:
        raise DataError(f"{file}: damaged ({str(err).splitlines()[0]}). Next: make submit again.") from err


def _check_columns(got: list[str], expected: list[str], *, file: Path) -> None:
    if got == expected:
        return
    wrong, fitting = "other columns", other_competition(got)
    if [name.strip() for name in got] == expected:
        wrong = "blanks around the names"  # which pandas, and so Kaggle, takes for a part of them
    elif sorted(got) == sorted(expected):
        wrong = "columns in another order"
    advice = "see that COMP fits the file" if fitting else "write the expected columns, between commas"
    raise DataError(
        f"{file}: {wrong}: got {','.join(got)[:200]!r}{fitting}; expected {','.join(expected)!r}. Next: {advice}."
    )


def wrong_row(file: Path, row: int, what: str, *, fmt: FileFormat = "csv", advice: str = Layout.advice) -> DataError:
    """What is wrong with a row (from 1), with its line of the file."""
    line = "" if fmt == "parquet" else f" (line {row + 1:,})"
    return DataError(f"{file}: data row {row:,}{line}: {what}. Next: {advice}.")
