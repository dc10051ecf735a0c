"""Refuse a submission that the competition would refuse, or score for other rows than it was made for.

The file is read in blocks of 16 MiB and compared with the expected keys row by row, so memory is constant. The first
thing wrong is named with its data row (from 1) and line of the file.
"""

import dataclasses
import itertools
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.competitions.base import Competition
from pipeline.errors import DataError
from pipeline.paths import Paths
from pipeline.runlog import Bar, warn
from pipeline.schema import CANDIDATES, MIN_RESOLVED
from pipeline.stage import Report
from submissions.class_layout import ClassLayout, read_class_layout
from submissions.file_blocks import ARROW, FileFormat, read_blocks, sniff, wrong_row
from submissions.layout import (
    IdRuns,
    Keys,
    Layout,
    PositionKeys,
    ResidueKeys,
    layout_of,
    read_layout,
    submission_columns,
)
from submissions.number_rows import read_number_layout

#: C1'-C1' distances of neighbours that are believed, Å: 99.5 % of those in 182 chains of the PDB.
_STEPS = (3.5, 10.0)
_CHAIN = (1.0, 100.0)  # Å: a candidate whose median is outside is no chain of nucleotides, or not in Å


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
    if rows and values and isinstance(layout.keys, ResidueKeys):
        _check_steps(file, layout, fmt=fmt)
    if not rows:
        return {"rows": 0, "format": fmt, "columns": layout.columns} | ({"ranges": {}} if values else {})
    ranges = {name: [lo, hi] for name, lo, hi in zip(layout.values, low.tolist(), high.tolist(), strict=True)}
    return {"rows": rows, "format": fmt, "columns": layout.columns} | ({"ranges": ranges} if values else {})


def _check_keys(block: pa.Table, before: int, layout: Layout, *, file: Path, fmt: FileFormat) -> None:
    stop = min(before + block.num_rows, layout.keys.rows)
    inside = stop - before
    expected = layout.keys.block(before, stop) if inside else {}
    same = {
        name: pc.fill_null(pc.equal(block[name].slice(0, inside), pa.array(column, ARROW[layout.kinds[name]])), False)
        for name, column in expected.items()
    }
    if wrong := _first_wrong({name: same_T.to_numpy() for name, same_T in same.items()}):
        at, name = wrong
        got, wanted = block[name][at].as_py(), expected[name][at]
        what = _explain(name, got, wanted, before + at, layout, file, fmt)
        raise wrong_row(file, before + at + 1, what, fmt=fmt, advice=layout.advice)
    if inside < block.num_rows:
        got = block[layout.keys.names[0]][inside].as_py()
        what = "an empty line or a row without key" if got is None else f"an extra row ({layout.keys.names[0]} {got!r})"
        what += f"; expected {layout.keys.rows:,} rows"
        raise wrong_row(file, before + inside + 1, what, fmt=fmt, advice=layout.advice)


def _first_wrong(right: Mapping[str, np.ndarray]) -> tuple[int, str] | None:
    """Row and column of the first cell that is not right; of a row's, the first column."""
    wrong = [(int(np.argmin(right_T)), name) for name, right_T in right.items() if not right_T.all()]
    return min(wrong, key=lambda found: found[0], default=None)


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
    cells = {name: block[name].to_numpy() for name in layout.values}  # null is NaN, which no comparison lets through
    ok = {name: (cells_T >= layout.low) & (cells_T <= layout.high) for name, cells_T in cells.items()}
    if wrong := _first_wrong(ok):
        at, name = wrong
        got = block[name][at].as_py()
        what = "empty" if got is None else f"{got!r}"
        limits = f"a finite number from {layout.low:.7g} to {layout.high:.7g}"
        key = f"{layout.keys.names[0]} {block[layout.keys.names[0]][at].as_py()!r}"
        raise wrong_row(file, before + at + 1, f"{name} of {key} is {what}; expected {limits}", fmt=fmt)


def _check_classes(block: pa.Table, before: int, layout: ClassLayout, *, file: Path, fmt: FileFormat) -> None:
    """Refuse rows whose probabilities do not sum to 1 where they should, and labels that are no classes."""
    table, (key,) = pl.DataFrame(block), layout.keys.names
    if layout.sums_to_one:
        sum_T = table.select(pl.sum_horizontal(layout.values)).to_series().to_numpy()
        off_T = np.abs(sum_T - 1.0) > 1e-3
        if off_T.any():
            at = int(off_T.argmax())
            got = f"probabilities of {key} {table[key][at]!r} sum to {sum_T[at]:.6g}; expected 1"
            raise wrong_row(file, before + at + 1, got, fmt=fmt)
    if not layout.label:
        return
    said = table[layout.label].fill_null("")
    wrong = said.is_in([cell for cell in said.unique() if not layout.is_label(cell)])
    if wrong.any():
        at = int(wrong.arg_max() or 0)
        some = f"{'one' if layout.classes.exclusive else 'some'} of {', '.join(layout.classes.names)[:120]}"
        got = f"{layout.label} of {key} {table[key][at]!r} is {said[at]!r}; expected {some}"
        raise wrong_row(file, before + at + 1, got, fmt=fmt)


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
        names = table["_target"][1:].filter(pl.Series(wrong_T)).unique().sort()
        odd += [f"{name} candidate {number}" for name in names]
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


def _layout_from_sample(sample: Path, competition: Competition) -> Layout:
    """Layout with the keys that a sample submission has, when there is no clean test table."""
    blocks = read_blocks(sample, submission_columns(competition), fmt=sniff(sample))
    keys: Keys
    if competition.row_key == "ID":
        parts = [pl.DataFrame(block.select(ResidueKeys.names)) for block in blocks]
        keys = ResidueKeys(pl.concat(parts) if parts else pl.DataFrame(schema=ResidueKeys.names))
    elif competition.row_key == "id_seqpos":
        keys = _positions(sample, competition)
    else:
        none = np.zeros(0, dtype=np.int64)
        first, count = zip((none, none), *(_runs(block["id"], sample) for block in blocks), strict=True)
        keys = IdRuns(np.concatenate(first), np.concatenate(count))
    if not keys.rows:
        raise DataError(f"{sample}: no rows below the header. Next: give the competition's own sample submission.")
    return layout_of(competition, keys)


def _positions(sample: Path, competition: Competition) -> PositionKeys:
    """Keys of a sample submission, read twice: to count the positions of each sequence, and to compare."""
    fmt, columns = sniff(sample), submission_columns(competition)
    named = pl.col("id_seqpos").fill_null("").str.replace("_[^_]*$", "").rle().struct.unnest()
    runs = [pl.DataFrame(block.select(["id_seqpos"])).select(named) for block in read_blocks(sample, columns, fmt=fmt)]
    none = pl.DataFrame(schema={"len": pl.UInt32, "value": pl.String})
    counts = pl.concat([none, *runs]).group_by("value", maintain_order=True).agg(pl.col("len").cast(pl.Int64).sum())
    keys = PositionKeys(counts["value"], counts["len"].to_numpy())
    before = 0
    for block in read_blocks(sample, columns, fmt=fmt):
        got, wanted = block["id_seqpos"], keys.block(before, before + block.num_rows)["id_seqpos"]
        same = pc.fill_null(pc.equal(got, pa.array(wanted, pa.string())), False).to_numpy()
        if not same.all():
            at = int(same.argmin())
            advice = "give the competition's own sample submission"
            what = f"id_seqpos {got[at].as_py()!r}; expected {wanted[at]!r}"
            raise wrong_row(sample, before + at + 1, what, advice=advice)
        before += block.num_rows
    return keys


def _runs(column: pa.ChunkedArray, sample: Path) -> tuple[np.ndarray, np.ndarray]:
    if column.null_count:
        raise DataError(f"{sample}: a row has no id. Next: give the competition's own sample submission.")
    ids = column.to_numpy()
    cuts = np.flatnonzero(np.diff(ids, prepend=ids[0] - 2) != 1)
    return ids[cuts], np.diff(cuts, append=len(ids))
