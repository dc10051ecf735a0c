"""A hidden test set of Ribonanza, which a rerun brings: every id of its sample submission is to get values.

Nobody can repair these files: what a download would be refused for is read as well as it can be, and told.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa

from pipeline.competitions.hidden_sample import own_rows
from pipeline.competitions.raw import column_names, read_table, replace_odd_letters, require_columns
from pipeline.errors import DataError
from pipeline.runlog import amount, warn
from pipeline.schema import ODD_LETTER_AS

TEST_TYPES = {
    "sequence_id": pa.string(),
    "sequence": pa.string(),
    "id_min": pa.int64(),
    "id_max": pa.int64(),
    "future": pa.int8(),
}
_TEST = "test_sequences"
_MOST = 65_535  # ids of a sequence: as many as it may have letters


def read_test(path: Path, sample: Path | None, *, targets: Sequence[str]) -> tuple[pa.Table, pa.Table | None]:
    """The test table, sorted by its ids, and the ids of the sample submission where these are others.

    Ids may have gaps, and be written as 1.0; ``future`` may be absent; a sequence is cut or filled up to its ids.

    Raises:
        DataError: a file is damaged, the ids of two sequences overlap, or the sample is of something else.
    """
    names = column_names(path, _TEST)
    require_columns(names, ["sequence_id", "sequence", "id_min", "id_max"], where=path.name)
    types = TEST_TYPES | dict.fromkeys(("id_min", "id_max", "future"), pa.float64())
    raw = read_table(path, _TEST, {name: types[name] for name in types if name in names}, may_be_empty=True)
    letters = raw["sequence"].combine_chunks()
    letters = replace_odd_letters(letters, where=path.name) if raw.num_rows else letters
    table = pl.DataFrame(raw.set_column(raw.column_names.index("sequence"), "sequence", letters))
    test = _tidy(table if "future" in names else table.with_columns(future=pl.lit(0.0)), path)
    if sample is None:
        return test, None
    first_S = test["id_min"].to_numpy()
    end_S = np.cumsum(test["id_max"].to_numpy() - first_S + 1)
    shift_S = first_S - np.concatenate([[0], end_S[:-1]])

    def ids(start: int, stop: int) -> pa.Array:
        row_N = np.arange(start, stop)
        return pa.array(row_N + shift_S[np.searchsorted(end_S, row_N, side="right")])

    keys = {"key": "id", "kind": pa.int64(), "targets": targets}
    return test, own_rows(sample, **keys, wanted=ids, total=int(end_S[-1]) if len(end_S) else 0)


def _tidy(table: pl.DataFrame, path: Path) -> pa.Table:
    ids = ["id_min", "id_max"]
    table = table.with_columns(
        pl.col("sequence").str.to_uppercase().str.replace_all("T", "U", literal=True),
        pl.col(ids).fill_nan(None).cast(pl.Int64, strict=False),
        pl.col("future").fill_nan(None).fill_null(0).cast(pl.Int8, strict=False).fill_null(0),
    ).with_row_index("row", offset=1)
    width = pl.col("id_max") - pl.col("id_min") + 1
    there = table.filter(width.is_between(1, _MOST)).unique([*ids, "sequence"], keep="first", maintain_order=True)
    if there.height < table.height:
        warn(f"{path.name}: {amount(table.height - there.height, 'row')} without ids of its own left out")
    other = there.filter(pl.col("sequence").str.len_bytes() != width)
    if other.height:
        some = f"{amount(other.height, 'sequence')} (such as {other['sequence_id'][0]!r})"
        warn(f"{path.name}: {some} of another length than its ids, cut or filled up with {ODD_LETTER_AS}")
        filled = pl.col("sequence") + pl.lit(ODD_LETTER_AS).repeat_by(width).list.join("")
        there = there.with_columns(
            pl.when(pl.col("sequence").str.len_bytes() == width).then("sequence").otherwise(filled.str.slice(0, width))
        )
    again = pl.col("sequence_id").is_duplicated() | (pl.col("sequence_id") == "")
    if there.filter(again).height:  # no row of the submission tells them
        named = pl.format("{}#{}", "sequence_id", "row")
        there = there.with_columns(pl.when(again).then(named).otherwise("sequence_id").alias("sequence_id"))
    there = there.sort("id_min")
    twice = there.filter(pl.col("id_min") <= pl.col("id_max").shift(1))
    if twice.height:
        raise DataError(
            f"{path.name}: row {twice['row'][0]:,} (id {twice['sequence_id'][0]}): id_min {twice['id_min'][0]} is "
            "another sequence's too; expected an id for each nucleotide. Next: see that this is the competition's file."
        )
    return there.select(*TEST_TYPES).to_arrow().cast(pa.schema(list(TEST_TYPES.items())))
