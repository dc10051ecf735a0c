"""Raw competition tables, as Kaggle or a user's own export gives them, read in batches with every doubt named.

A table ``train_data`` is a file ``train_data.csv``, ``.csv.gz`` or ``.parquet``, or a member ``train_data.csv`` of a
zip archive; JSON lines likewise, but for parquet. What a file holds is decided by its first bytes, since downloads
often carry the wrong ending.
"""

import csv
import gzip
import json
import re
import typing
import zipfile
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from pathlib import Path
from typing import IO, Any, NoReturn

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq

from pipeline.competitions.raw_files import kind_of, member_of
from pipeline.errors import DataError
from pipeline.runlog import Bar, amount, warn
from pipeline.schema import ALPHABET, ODD_LETTER_AS

#: Bytes of one block, read ahead a few times over; 1 to 8 MiB are equally fast, 8 MiB take 110 MiB more at the peak.
BLOCK_BYTES = 2 << 20
#: Rows of a batch out of a parquet file: 7 MiB of numbers.
BATCH_ROWS = 4096

_HEAD_BYTES = 1 << 20
_MIB = 1 << 20
_NULLS = ["", "NaN", "nan", "NA", "N/A", "null", "NULL", "None"]
_NUMBER = re.compile(r"[+-]?(\d+\.?\d*|\.\d+)([eE][+-]?\d+)?|[+-]?(inf|infinity|nan)", re.IGNORECASE)
_WHOLE = re.compile(r"[+-]?\d+")

_ONE_A_LINE = (
    "expected one JSON object a line. Next: write it so (pandas: to_json(lines=True, orient='records')), or download "
    "it again."
)
_ODD = f"(?i)[^{ALPHABET}T]"


def column_names(path: Path, stem: str) -> list[str]:
    """Names of a raw table's columns, in file order.

    Raises:
        DataError: the file is empty, damaged, an HTML page, not a table, or names a column twice.
    """
    if kind_of(path) == "parquet":
        with open_parquet(path) as file:
            names = list(file.schema_arrow.names)
    else:
        names = _csv_header(path, stem)
    refuse_twice(names, where=path.name)
    return names


def refuse_twice(names: Sequence[str], *, where: str) -> None:
    """DataError where two columns have one name."""
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"{where}: column {twice[0]!r} is there twice; expected it once. Next: remove one.")


def require_columns(names: Sequence[str], needed: Sequence[str], *, where: str) -> None:
    """Refuse a table without one of the columns that are needed.

    Raises:
        DataError: names the missing columns and what was found instead.
    """
    missing = [name for name in needed if name not in names]
    if missing:
        found = ", ".join(name[:40] if name.isprintable() else ascii(name[:40]) for name in names[:8])
        found += f" … ({len(names)} columns)" if len(names) > 8 else ""
        raise DataError(
            f"{where}: column {', '.join(map(repr, missing[:5]))} is missing; found {found}. "
            "Next: check that this is the competition's file, and download it again."
        )


def csv_cells(line: str) -> list[str]:
    """Cells of a line, with or without its end; a line that no CSV has is one cell."""
    try:
        return next(csv.reader([line.rstrip("\r\n")]), [])
    except csv.Error:
        return [line]


def read_batches(
    path: Path, stem: str, types: Mapping[str, pa.DataType], *, multiline: bool = False, may_be_empty: bool = False
) -> Iterator[pa.RecordBatch]:
    """Some columns of a raw table, batch after batch, in the order and with the types of `types`.

    Memory does not grow with the file. An empty cell is "" in a text column and null in a number column.

    Args:
        path: the file.
        stem: name of the table, as `find_table` takes it: an archive's member, and the label of the progress bar.
        types: column -> string, float or integer type.
        multiline: whether quoted text may hold line breaks, which costs the reader some speed.
        may_be_empty: whether a header alone is no fault, as of a hidden test set.

    Raises:
        DataError: a wrong type, a broken row or a cut file: column, row (1-based, without the header) and value.
    """
    if kind_of(path) == "parquet":
        batches = _parquet_batches(path, types)
    else:
        batches = _csv_batches(path, stem, types, multiline=multiline)
    rows = 0
    for batch in batches:
        rows += batch.num_rows
        yield batch
    if not rows and not may_be_empty:
        raise DataError(f"{path.name}: there is a header and no row. Next: download it again.")


def read_table(
    path: Path, stem: str, types: Mapping[str, pa.DataType], *, multiline: bool = False, may_be_empty: bool = False
) -> pa.Table:
    """The same as `read_batches`, in one piece, for tables that fit into memory."""
    batches = list(read_batches(path, stem, types, multiline=multiline, may_be_empty=may_be_empty))
    return pa.Table.from_batches(batches or [pa.RecordBatch.from_pylist([], schema=pa.schema(list(types.items())))])


class RawBytes:
    """Unpacked bytes of a text file, plain, gzipped or in an archive; remembers what the checks at its end need."""

    closed = False  # part of what Arrow expects of a file

    def __init__(self, path: Path, stem: str, suffix: str = ".csv") -> None:
        self.path, self.last = path, b""
        kind = kind_of(path)
        self._disk: IO[bytes] = path.open("rb")
        self._bytes: IO[bytes] = self._disk
        self._gauge: IO[bytes] = self._disk
        self.total = path.stat().st_size
        if kind == "gzip":
            self._bytes = typing.cast(IO[bytes], gzip.GzipFile(fileobj=self._disk))
        elif kind == "zip":
            archive = zipfile.ZipFile(self._disk)
            member = archive.getinfo(member_of(path, f"{stem}{suffix}"))
            try:
                self._bytes = self._gauge = archive.open(member)
            except (zipfile.BadZipFile, OSError, RuntimeError) as err:  # or it has a password
                self._disk.close()
                raise _damaged(path, err) from err
            self.total = member.file_size

    def read(self, size: int = -1) -> bytes:
        """Next bytes; b"" at the end.

        Raises:
            DataError: the packed file is cut short or damaged.
        """
        try:
            data = self._bytes.read(size)
        except (EOFError, zlib.error, gzip.BadGzipFile, zipfile.BadZipFile) as err:
            raise _damaged(self.path, err) from err
        self.last = data[-1:] or self.last
        return data

    @property
    def consumed(self) -> int:
        """How many of `total` bytes were read so far: packed ones for gzip, unpacked ones for a member."""
        return self._gauge.tell()

    def readable(self) -> bool:
        return True

    def close(self) -> None:
        self.closed = True
        self._bytes.close()
        self._disk.close()


def _damaged(path: Path, err: Exception) -> DataError:
    return DataError(f"{path.name}: damaged or cut short: {err}. Next: download it again.")


def open_raw_bytes(path: Path, stem: str, *, suffix: str = ".csv") -> closing[RawBytes]:
    """Unpacked bytes of a CSV file, or of one with another suffix, closed at the end."""
    return closing(RawBytes(path, stem, suffix))


def _csv_header(path: Path, stem: str) -> list[str]:
    with open_raw_bytes(path, stem) as source:
        head = source.read(_HEAD_BYTES)
    if not head.strip():
        raise DataError(f"{path.name}: the file is empty. Next: download it again.")
    if head.lstrip(b"\xef\xbb\xbf \t\r\n")[:1] == b"<":
        raise _web_page(path)
    try:
        line = head.splitlines()[0].decode("utf-8-sig")
    except UnicodeDecodeError as err:
        raise DataError(f"{path.name}: the first line is no UTF-8 text: {err}. Next: download it again.") from err
    return csv_cells(line)


def _web_page(path: Path) -> DataError:
    return DataError(
        f"{path.name}: a web page (HTML), not a table; Kaggle sends one when nobody is logged in. "
        "Next: log in, accept the competition's rules, and download it again."
    )


def replace_odd_letters(sequences: pa.StringArray, *, where: str) -> pa.StringArray:
    """Sequences of a hidden test set with `ODD_LETTER_AS` for every sign but A, C, G, U, T, and a warning that counts.

    There every row is to get a prediction. In a file that a user can repair such signs are refused instead.
    """
    texts = pc.utf8_trim_whitespace(sequences)
    odd = pc.sum(pc.match_substring_regex(texts, _ODD)).as_py()
    if odd:
        warn(f"{where}: {amount(odd, 'sequence')} with signs other than A, C, G, U, T, read as {ODD_LETTER_AS}")
    return pc.replace_substring_regex(texts, _ODD, ODD_LETTER_AS)


def read_json_lines(path: Path, stem: str, *, may_be_empty: bool = False) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row, record) of a file with one JSON object a line, rows from 1; blank lines count and are no records.

    Raises:
        DataError: a line that is no JSON object, a cut or damaged file, a web page, or no row where one is expected.
    """
    found = False
    with open_raw_bytes(path, stem, suffix=".json") as source:
        for row, (line, is_last) in enumerate(_lines(source), start=1):
            if not line.strip():
                continue
            found = True
            try:
                record = json.loads(line.removeprefix("\ufeff"))
            except ValueError as err:
                if row == 1 and line.lstrip().startswith("<"):
                    raise _web_page(path) from err
                what = ", the last one: the file was cut short" if is_last else ""
                raise DataError(f"{path.name}: row {row:,} is no JSON ({err}){what}; {_ONE_A_LINE}") from err
            if not isinstance(record, dict):
                raise DataError(f"{path.name}: row {row:,} is a {type(record).__name__}; {_ONE_A_LINE}")
            yield row, record
    if not found and not may_be_empty:
        raise DataError(f"{path.name}: the file is empty. Next: download it again.")


def _csv_batches(
    path: Path, stem: str, types: Mapping[str, pa.DataType], *, multiline: bool
) -> Iterator[pa.RecordBatch]:
    read = pa_csv.ReadOptions(block_size=BLOCK_BYTES)
    parse = pa_csv.ParseOptions(newlines_in_values=multiline, ignore_empty_lines=False)  # or rows would be misnumbered
    convert = pa_csv.ConvertOptions(
        column_types=dict(types), include_columns=list(types), null_values=_NULLS, strings_can_be_null=False
    )
    done, empty = 0, list[pa.RecordBatch]()
    with open_raw_bytes(path, stem) as source, Bar(f"read {stem}", total=source.total // _MIB, unit="MiB") as bar:
        shown = 0
        try:
            file = pa.PythonFile(source, mode="r")
            with pa_csv.open_csv(file, read_options=read, parse_options=parse, convert_options=convert) as reader:
                for batch in reader:
                    done += batch.num_rows
                    bar.advance(source.consumed // _MIB - shown, note=f"{done:,} rows")
                    shown = source.consumed // _MIB
                    if end := _last_filled(batch):
                        yield from empty
                        yield batch.slice(0, end)
                        empty.clear()
                    if end < batch.num_rows:
                        empty.append(batch.slice(end))
        except pa.ArrowInvalid as err:
            _explain(path, stem, types, good_rows=done, err=err)
        last = source.last
    if last not in (b"\n", b"\r"):
        raise DataError(f"{path.name}: the last line has no end: the file was cut short. Next: download it again.")


def _last_filled(batch: pa.RecordBatch) -> int:
    """How many rows there are up to the last one with anything in it: at the end of a file the others are none."""
    end = batch.num_rows
    while end and not any(column[end - 1].as_py() not in ("", None) for column in batch.columns):
        end -= 1
    return end


def _explain(
    path: Path, stem: str, types: Mapping[str, pa.DataType], *, good_rows: int, err: pa.ArrowInvalid
) -> NoReturn:
    """Raise the sentence for Arrow's refusal: it names a value or a line, and only a second look names the row."""
    numbers = {name: pa.types.is_integer(kind) for name, kind in types.items() if not pa.types.is_string(kind)}
    names = _csv_header(path, stem)
    with open_raw_bytes(path, stem) as source:
        for row, (line, is_last) in enumerate(_lines(source)):
            if row <= good_rows or not line:  # an empty line is a row of empty cells
                continue
            cells = csv_cells(line)
            if len(cells) != len(names):
                what = "the last one: the file was cut short" if is_last else "a broken line"
                raise DataError(
                    f"{path.name}: row {row:,} has {len(cells)} of {len(names)} columns, {what}. Next: download it "
                    "again."
                ) from err
            record = dict(zip(names, cells, strict=True))
            for name, is_whole in numbers.items():
                if record[name] not in _NULLS and not (_WHOLE if is_whole else _NUMBER).fullmatch(record[name].strip()):
                    raise DataError(
                        f"{path.name}: row {row:,} ({names[0]} {cells[0]}): column {name!r} holds "
                        f"{record[name][:40]!r}; expected a {'whole ' * is_whole}number. Next: repair the row, or "
                        "download the file again."
                    ) from err
    raise DataError(f"{path.name}: after row {good_rows}: {str(err)[:200]}. Next: download it again.") from err


def _lines(source: RawBytes) -> Iterator[tuple[str, bool]]:
    """(line, is it the file's last)."""
    rest = b""
    while True:
        block = source.read(BLOCK_BYTES)
        lines = (rest + block).splitlines(keepends=True)
        rest = lines.pop() if lines and block else b""
        for position, line in enumerate(lines):
            yield line.decode("utf-8", "replace").rstrip("\r\n"), not block and position == len(lines) - 1
        if not block:
            return


def open_parquet(path: Path) -> pq.ParquetFile:
    """A parquet file, which ``with`` closes.

    Raises:
        DataError: the file is cut short or no parquet file.
    """
    try:
        # Without pre_buffer=False, pyarrow 26 holds all that it has read of the file until the last batch.
        return pq.ParquetFile(path, pre_buffer=False)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as err:
        raise DataError(f"{path.name}: not a whole parquet file: {err}. Next: download it again.") from err


def _parquet_batches(path: Path, types: Mapping[str, pa.DataType]) -> Iterator[pa.RecordBatch]:
    done = 0
    with open_parquet(path) as file, Bar(f"read {path.name}", total=file.metadata.num_rows, unit="rows") as bar:
        batches = file.iter_batches(BATCH_ROWS, columns=list(types))
        while True:
            try:
                batch = next(batches, None)
                if batch:
                    batch.validate(full=True)  # text that is none takes others down
            except (pa.ArrowException, OSError) as err:
                raise DataError(f"{path.name}: damaged after row {done}: {err}. Next: download it again.") from err
            if batch is None:
                return
            columns = [_as_type(batch.column(name), kind, where=path.name, name=name) for name, kind in types.items()]
            done += batch.num_rows
            bar.advance(batch.num_rows)
            yield pa.record_batch(columns, names=list(types))


def _as_type(column: pa.Array, kind: pa.DataType, *, where: str, name: str) -> pa.Array:
    """A parquet column in the type that the CSV would have given."""
    got = column.type
    decoded = got.value_type if pa.types.is_dictionary(got) else got
    text = pa.types.is_string(decoded) or pa.types.is_large_string(decoded) or pa.types.is_string_view(decoded)
    if text != pa.types.is_string(kind) and column.null_count < len(column):  # of nulls alone, any type says the same
        raise DataError(f"{where}: column {name!r} has type {got}; expected {kind}. Next: write the file again.")
    try:
        cast = column.cast(kind)
    except pa.ArrowException as err:
        raise DataError(f"{where}: column {name!r} ({got}) is no {kind}: {err}. Next: write the file again.") from err
    return cast.fill_null("") if pa.types.is_string(kind) else cast
