"""Refuse a submission that the competition would refuse, or score for other rows than it was made for.

The file is read in blocks of 16 MiB and compared with the expected keys row by row, so memory is constant. The first
thing wrong is named with its data row (from 1) and line of the file.
"""

import dataclasses
import gzip
import io
import itertools
import time
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO, Literal, cast

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pacsv

from pipeline.competitions.base import Competition
from pipeline.competitions.raw import csv_cells
from pipeline.errors import DataError
from pipeline.paths import Paths
from pipeline.runlog import Bar, warn
from pipeline.schema import CANDIDATES, MIN_RESOLVED
from pipeline.stage import Report
from pipeline.tables import open_parquet
from submissions.class_layout import ClassLayout, read_class_layout
from submissions.layout import (
    IdRuns,
    Keys,
    Kind,
    Layout,
    PositionKeys,
    ResidueKeys,
    layout_of,
    other_competition,
    read_layout,
    submission_columns,
)
from submissions.number_rows import read_number_layout

#: C1'-C1' distances of neighbours that are believed, Å: 99.5 % of those in 182 chains of the PDB.
_STEPS = (3.5, 10.0)
_CHAIN = (1.0, 100.0)  # Å: a candidate whose median is outside is no chain of nucleotides, or not in Å
_BLOCK_BYTES = 1 << 24
_BATCH_ROWS = 1 << 18
_ARROW = {"text": pa.string(), "whole": pa.int64(), "number": pa.float64()}
_WORDS = {"text": "text", "whole": "a whole number", "number": "a number"}

FileFormat = Literal["csv", "csv.gz", "parquet"]


def run(paths: Paths, *, competition: Competition, file: Path, sample: Path | None = None) -> Report:
    """Check a submission: columns, every key in order, finite values in range.

    Args:
        paths: where the clean test tables are, from which the expected keys come.
        competition: gives columns and range.
        file: CSV, CSV.GZ or parquet, under a name that says which: readers go by it.
        sample: a sample submission. With clean tables it must agree with them; without, it gives the expected keys.

    Raises:
        DataError: the first thing wrong, with its row, what was got and what was expected.
    """
    started = time.monotonic()
    facts = check_file(file, _expected(paths, competition, sample))
    if not file.name.lower().endswith(f".{facts['format']}"):
        fmt = facts["format"]
        raise DataError(f"{file}: holds {fmt.upper()}; expected what the name says. Next: name it *.{fmt}.")
    seconds = time.monotonic() - started
    return Report(stage="check", status="built", outputs={"submission": file}, facts=facts, seconds=round(seconds, 3))


def _expected(paths: Paths, competition: Competition, sample: Path | None) -> Layout:
    if competition.task == "classes":
        return read_class_layout(paths, sample)
    if competition.task == "numbers":
        return read_number_layout(paths, competition, sample)
    test = paths.clean("test" if competition.task == "values" else "sample")
    if sample is None:
        return read_layout(paths, competition)
    if not test.is_file():
        return _layout_from_sample(sample, competition)
    layout = read_layout(paths, competition)
    advice = f"give the sample submission of the data in {test}"
    check_file(sample, dataclasses.replace(layout, advice=advice), values=False)
    return layout


def check_file(file: Path, layout: Layout, *, values: bool = True) -> dict[str, Any]:
    """Compare a file with a layout, row by row.

    Args:
        file: CSV, CSV.GZ or parquet.
        layout: expected columns, keys and range.
        values: False looks at columns and keys only, as for a sample submission.

    Returns:
        rows, format, and smallest and largest value of every predicted column.

    Raises:
        DataError: the first thing wrong.
    """
    fmt = sniff(file)
    low = np.full(len(layout.values), np.inf)
    high = np.full(len(layout.values), -np.inf)
    rows = 0
    with Bar("check", total=layout.keys.rows, unit="rows") as bar:
        for block in read_blocks(file, layout.kinds, fmt=fmt):
            _check_keys(block, rows, layout, file=file, fmt=fmt)
            if values:
                _check_values(block, rows, layout, file=file, fmt=fmt)
                if isinstance(layout, ClassLayout):
                    _check_classes(block, rows, layout, file=file, fmt=fmt)
                spans = [pc.min_max(block[name]).as_py() for name in layout.values]
                low = np.minimum(low, [span["min"] for span in spans])
                high = np.maximum(high, [span["max"] for span in spans])
            rows += block.num_rows
            bar.advance(block.num_rows)
    if rows < layout.keys.rows:
        missing = f"{layout.keys.names[0]} {layout.keys.block(rows, rows + 1)[layout.keys.names[0]][0]}"
        raise DataError(
            f"{file}: ends after data row {rows:,}; expected {layout.keys.rows:,} rows: {missing} and all after it are "
            f"missing. Next: {layout.advice}, or copy it again if it was cut."
        )
    if values and isinstance(layout.keys, ResidueKeys):
        _check_steps(file, layout, fmt=fmt)
    ranges = {name: [lo, hi] for name, lo, hi in zip(layout.values, low.tolist(), high.tolist(), strict=True)}
    return {"rows": rows, "format": fmt, "columns": layout.columns} | ({"ranges": ranges} if values else {})


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


# ------------------------------------------------------------------------------------------------------------ reading


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
    types = {name: _ARROW[kind] for name, kind in columns.items()}
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
            return _wrong(file, row, f"{len(cells)} cells ({','.join(cells)[:60]!r}); expected {len(columns)}{cut}")
        for (name, kind), cell in zip(columns.items(), cells, strict=True):
            if cell and not _reads_as(cell, kind):
                return _wrong(file, row, f"{name} is {cell[:40]!r}; expected {_WORDS[kind]}")
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
    schema = pa.schema([(name, _ARROW[kind]) for name, kind in columns.items()])
    try:
        for batch in opened.iter_batches(batch_size=_BATCH_ROWS):
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


# ----------------------------------------------------------------------------------------------------------- comparing


def _check_keys(block: pa.Table, before: int, layout: Layout, *, file: Path, fmt: FileFormat) -> None:
    stop = min(before + block.num_rows, layout.keys.rows)
    inside = stop - before
    first_wrong: tuple[int, str] | None = None
    expected = layout.keys.block(before, stop) if inside > 0 else {}
    for name, column in expected.items():
        got = block[name].slice(0, inside)
        same = pc.fill_null(pc.equal(got, pa.array(column, _ARROW[layout.kinds[name]])), False).to_numpy()
        if not same.all() and (first_wrong is None or int(np.argmin(same)) < first_wrong[0]):
            first_wrong = int(np.argmin(same)), name
    if first_wrong:
        at, name = first_wrong
        got, wanted = block[name][at].as_py(), expected[name][at]
        raise _wrong(
            file,
            before + at + 1,
            _explain(name, got, wanted, before + at, layout, file, fmt),
            fmt=fmt,
            advice=layout.advice,
        )
    if inside < block.num_rows:
        got = block[layout.keys.names[0]][max(inside, 0)].as_py()
        what = "an empty line or a row without key" if got is None else f"an extra row ({layout.keys.names[0]} {got!r})"
        what += f"; expected {layout.keys.rows:,} rows"
        raise _wrong(file, before + max(inside, 0) + 1, what, fmt=fmt, advice=layout.advice)


def _explain(name: str, got: Any, wanted: Any, row: int, layout: Layout, file: Path, fmt: FileFormat) -> str:
    """Why a key differs: empty, unknown, repeated, out of order, or the expected one is missing."""
    wanted = wanted.item() if isinstance(wanted, np.generic) else wanted
    if got is None:
        return f"{name} is empty; expected {wanted!r}"
    if name != layout.keys.names[0]:
        return f"{name} is {got!r}; expected {wanted!r}"
    home = layout.keys.row_of(got)
    if home is None:
        return f"{name} {got!r} is not in the test set; expected {wanted!r}"
    if home < row:
        return f"{name} {got!r} is a duplicate of data row {home + 1:,}; expected {wanted!r}"
    later = _find_key(file, name, wanted, after=row, layout=layout, fmt=fmt)
    if later is None:
        return f"{name} {wanted!r} is missing; got {got!r}"
    return f"{name} {got!r} is out of order; expected {wanted!r}, which comes in data row {later + 1:,}"


def _find_key(file: Path, name: str, key: Any, *, after: int, layout: Layout, fmt: FileFormat) -> int | None:
    before = 0
    try:
        for block in read_blocks(file, layout.kinds, fmt=fmt):
            found = pc.index(block[name], key).as_py()
            if found >= 0 and before + found > after:
                return before + found
            before += block.num_rows
    except DataError:
        return None  # damaged further down; the first thing wrong is what is reported
    return None


def _check_values(block: pa.Table, before: int, layout: Layout, *, file: Path, fmt: FileFormat) -> None:
    first_wrong: tuple[int, str] | None = None
    for name in layout.values:
        values = block[name].to_numpy()  # null becomes NaN, which no comparison lets through
        ok = (values >= layout.low) & (values <= layout.high)
        if not ok.all() and (first_wrong is None or int(np.argmin(ok)) < first_wrong[0]):
            first_wrong = int(np.argmin(ok)), name
    if first_wrong:
        at, name = first_wrong
        got = block[name][at].as_py()
        what = "empty" if got is None else f"{got!r}"
        limits = f"a finite number from {layout.low:.7g} to {layout.high:.7g}"
        key = f"{layout.keys.names[0]} {block[layout.keys.names[0]][at].as_py()!r}"
        raise _wrong(file, before + at + 1, f"{name} of {key} is {what}; expected {limits}", fmt=fmt)


def _check_classes(block: pa.Table, before: int, layout: ClassLayout, *, file: Path, fmt: FileFormat) -> None:
    """Refuse rows whose probabilities do not sum to 1 where they should, and labels that are no classes."""
    table, (key,) = pl.DataFrame(block), layout.keys.names
    if layout.sums_to_one:
        sum_T = table.select(pl.sum_horizontal(layout.values)).to_series().to_numpy()
        off_T = np.abs(sum_T - 1.0) > 1e-3
        if off_T.any():
            at = int(off_T.argmax())
            got = f"probabilities of {key} {table[key][at]!r} sum to {sum_T[at]:.6g}; expected 1"
            raise _wrong(file, before + at + 1, got, fmt=fmt)
    if not layout.label:
        return
    said = table[layout.label].fill_null("")
    wrong = said.is_in([cell for cell in said.unique() if not layout.is_label(cell)])
    if wrong.any():
        at = int(wrong.arg_max() or 0)
        some = f"{'one' if layout.classes.exclusive else 'some'} of {', '.join(layout.classes.names)[:120]}"
        got = f"{layout.label} of {key} {table[key][at]!r} is {said[at]!r}; expected {some}"
        raise _wrong(file, before + at + 1, got, fmt=fmt)


def _check_steps(file: Path, layout: Layout, *, fmt: FileFormat) -> None:
    """Refuse what is no chain of nucleotides, such as coordinates in nm; warn of what is torn, crushed or repeated."""
    table = pl.concat([pl.DataFrame(block) for block in read_blocks(file, layout.kinds, fmt=fmt)])
    target = pl.col("ID").str.replace(r"_\d+$", "")
    table = table.with_columns(target.alias("_target")).sort("_target", "resid", maintain_order=True)
    follows = (table["_target"] == table["_target"].shift(1)).fill_null(False).to_numpy()[1:]
    follows &= np.diff(table["resid"].to_numpy()) == 1
    _warn_repeated(table, file)
    odd: list[str] = []
    for number in range(1, CANDIDATES + 1):
        xyz_T3 = table.select(f"{axis}_{number}" for axis in "xyz").to_numpy()
        step_T = np.linalg.norm(np.diff(xyz_T3, axis=0), axis=1)
        if follows.any() and not _CHAIN[0] <= (median := float(np.median(step_T[follows]))) <= _CHAIN[1]:
            raise DataError(
                f"{file}: candidate {number}: C1' atoms of neighbours are {median:.3g} Å apart (median); expected "
                "about 5.5. Next: write C1' coordinates in Å, five candidates of each target."
            )
        wrong_T = follows & ~((step_T >= _STEPS[0]) & (step_T <= _STEPS[1]))
        odd += [
            f"{name} candidate {number}" for name in table["_target"][1:].filter(pl.Series(wrong_T)).unique().sort()
        ]
    if odd:
        them = "candidate has" if len(odd) == 1 else "candidates have"
        some = ", ".join(odd[:3]) + (" …" if len(odd) > 3 else "")
        warn(
            f"{file}: {len(odd):,} {them} neighbouring C1' less than {_STEPS[0]:g} or "
            f"more than {_STEPS[1]:g} Å apart: {some}"
        )


def _warn_repeated(table: pl.DataFrame, file: Path) -> None:
    """Say which targets have a candidate twice: the best of the five counts, and of equal ones all but one are lost."""
    long = table.filter(pl.len().over("_target") >= MIN_RESOLVED)  # of fewer residues nothing is scored
    pairs = itertools.combinations(range(1, CANDIDATES + 1), 2)
    equal = [
        pl.all_horizontal(pl.col(f"{axis}_{a}") == pl.col(f"{axis}_{b}") for axis in "xyz").all() for a, b in pairs
    ]
    same = long.group_by("_target", maintain_order=True).agg(pl.any_horizontal(equal).alias("same")).filter("same")
    if same.height:
        some = ", ".join(same["_target"].head(3)) + (" …" if same.height > 3 else "")
        have = "target has" if same.height == 1 else "targets have"
        warn(f"{file}: {same.height:,} {have} the same candidate more than once: {some}; the best of five counts")


def _wrong(file: Path, row: int, what: str, *, fmt: FileFormat = "csv", advice: str = Layout.advice) -> DataError:
    line = "" if fmt == "parquet" else f" (line {row + 1:,})"
    return DataError(f"{file}: data row {row:,}{line}: {what}. Next: {advice}.")


def _layout_from_sample(sample: Path, competition: Competition) -> Layout:
    """Layout with the keys that a sample submission has, when there is no clean test table."""
    blocks = read_blocks(sample, submission_columns(competition), fmt=sniff(sample))
    keys: Keys
    if competition.row_key == "ID":
        parts = [pl.DataFrame(block.select(ResidueKeys.names)) for block in blocks]
        keys = ResidueKeys(pl.concat(parts) if parts else pl.DataFrame(schema=ResidueKeys.names))
    elif competition.row_key == "id_seqpos":
        keys = _positions([name for block in blocks for name in block["id_seqpos"].to_pylist()], sample)
    else:
        none = np.zeros(0, dtype=np.int64)
        first, count = zip((none, none), *(_runs(block["id"], sample) for block in blocks), strict=True)
        keys = IdRuns(np.concatenate(first), np.concatenate(count))
    if not keys.rows:
        raise DataError(f"{sample}: no rows below the header. Next: give the competition's own sample submission.")
    return layout_of(competition, keys)


def _positions(names: list[str | None], sample: Path) -> PositionKeys:
    counts = Counter((name or "").rpartition("_")[0] for name in names)
    keys = PositionKeys(pl.Series(list(counts), dtype=pl.String), np.array(list(counts.values()), dtype=np.int64))
    for row, (got, wanted) in enumerate(zip(names, keys.block(0, keys.rows)["id_seqpos"], strict=True), start=1):
        if got != wanted:
            advice = "give the competition's own sample submission"
            raise _wrong(sample, row, f"id_seqpos {got!r}; expected {wanted!r}", advice=advice)
    return keys


def _runs(column: pa.ChunkedArray, sample: Path) -> tuple[np.ndarray, np.ndarray]:
    if column.null_count:
        raise DataError(f"{sample}: a row has no id. Next: give the competition's own sample submission.")
    ids = column.to_numpy()
    cuts = np.flatnonzero(np.diff(ids, prepend=ids[0] - 2) != 1)
    return ids[cuts], np.diff(cuts, append=len(ids))
