import json

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import arrays
from pipeline.competitions import raw
from pipeline.errors import DataError
from pipeline.stage import sha256_file
from pipeline.tables import (
    SortedRows,
    as_lists,
    check_probabilities,
    flat_lists,
    labels_that_count,
    open_parquet,
    out_of_fold,
    read_all,
    read_batches,
    read_fold_table,
)


@pytest.mark.parametrize("seed", range(3))
def test_lists_survive_flattening(seed):
    rng = np.random.default_rng(seed)
    lengths_N = rng.integers(1, 9, size=20)
    flat_T = rng.normal(size=lengths_N.sum()).astype(np.float32)
    column = pl.Series("values", as_lists(flat_T, lengths_N))
    ids = pl.Series([str(number) for number in range(20)])
    assert np.array_equal(flat_lists(column, lengths_N, ids=ids, where="test"), flat_T)


def test_null_lists_and_null_values_become_nan():
    column = pl.Series("values", [[1.0, None], None, [3.0]], dtype=pl.List(pl.Float32))
    flat_T = flat_lists(column, np.array([2, 3, 1]), ids=pl.Series(["a", "b", "c"]), where="test")
    assert np.isnan(flat_T).tolist() == [False, True, True, True, True, False]
    with pytest.raises(DataError, match="test: c: 1 values of values; expected 2"):
        flat_lists(column, np.array([2, 3, 2]), ids=pl.Series(["a", "b", "c"]), where="test")


def test_a_damaged_fold_table_is_told_by_its_manifest(tmp_path):
    """`make evaluate` ended in polars' traceback: "parquet: File out of specification: Invalid thrift: bad data"."""
    path = tmp_path / "sim80_k2.parquet"
    table = pl.DataFrame({"sequence_id": ["a", "b"], "fold": [0, 1]})
    table.write_parquet(path)
    found = {"facts": {}, "outputs": {"folds": sha256_file(path)}}
    path.with_suffix(".manifest.json").write_text(json.dumps(found))
    assert read_fold_table(path).equals(table)
    data = bytearray(path.read_bytes())
    data[4:40] = bytes(36)
    path.write_bytes(data)
    with pytest.raises(DataError, match=r"sim80_k2\.parquet: not what its stage wrote: damaged or edited since"):
        read_fold_table(path)


def test_rows_are_handed_out_once_and_in_order(tmp_path, rng):
    keys = sorted({f"{number:04d}" for number in rng.integers(0, 10_000, size=500)})
    pl.DataFrame({"sequence_id": keys, "value": range(len(keys))}).write_parquet(
        tmp_path / "t.parquet", row_group_size=64
    )
    rows = SortedRows(tmp_path / "t.parquet", ["value"])
    got = []
    for last in ("0000", "1234", "1234", "5000", "9999"):
        part = rows.upto(last)
        got += [] if part is None else part["sequence_id"].to_list()
        assert got == [key for key in keys if key <= last]
    assert rows.rest() is None


def test_batches_do_not_depend_on_row_groups(tmp_path):
    table = pl.DataFrame({"sequence_id": [f"{number:05d}" for number in range(5000)]})
    for size in (700, 5000):
        table.write_parquet(tmp_path / f"{size}.parquet", row_group_size=size)
        heights = [batch.height for batch in read_batches(tmp_path / f"{size}.parquet", ["sequence_id"], rows=2048)]
        assert heights == [2048, 2048, 904]


@pytest.mark.parametrize("reader", ["tables", "arrays", "raw"])
def test_of_a_file_that_is_read_in_batches_no_more_than_a_few_are_held(tmp_path, rng, reader):
    """arrays and raw files held all that they had read of a file: 618 MiB for one of 302 MiB."""
    path = tmp_path / "t.parquet"
    with pq.ParquetWriter(path, pa.schema([("value", pa.float64())])) as writer:
        for _ in range(20):
            writer.write_table(pa.table({"value": rng.random(20_000)}))
    before = pa.total_allocated_bytes()
    batches = {
        "tables": lambda: read_batches(path, ["value"]),
        "arrays": lambda: arrays.read_batches(path, ["value"]),
        "raw": lambda: raw.read_batches(path, "t", {"value": pa.float64()}),
    }[reader]()
    held = max(pa.total_allocated_bytes() - before for _ in batches)
    assert held < path.stat().st_size / 4


def test_flipped_byte_in_a_page_is_noticed(tmp_path):
    path = tmp_path / "t.parquet"
    pq.write_table(pl.DataFrame({"value": np.arange(5000.0)}).to_arrow(), path, write_page_checksum=True)
    content = bytearray(path.read_bytes())
    content[len(content) // 3] ^= 0x10
    path.write_bytes(bytes(content))
    for read in (lambda: list(read_batches(path, ["value"])), lambda: read_all(path)):
        with pytest.raises(DataError, match="damaged"):
            read()


@pytest.mark.parametrize("rows", [0, 5000])
def test_a_whole_table_is_what_was_written(tmp_path, rows):
    table = pl.DataFrame({"id": ["a"] * rows, "x": [[0.5]] * rows}, schema={"id": pl.String, "x": pl.List(pl.Float32)})
    pq.write_table(table.to_arrow(), tmp_path / "t.parquet")
    assert read_all(tmp_path / "t.parquet").equals(table)


@pytest.mark.parametrize("content", [b"<html>", b"", b"PAR1"])
def test_files_that_are_no_parquet_are_refused(tmp_path, content):
    (tmp_path / "t.parquet").write_bytes(content)
    with pytest.raises(DataError, match="not a readable parquet file"):
        open_parquet(tmp_path / "t.parquet")
    with pytest.raises(DataError, match="no such file"):
        open_parquet(tmp_path / "absent.parquet")


def test_out_of_fold_passes_over_the_other_folds(tmp_path):
    ids = [f"s{number}" for number in range(6)]
    pl.DataFrame({"sequence_id": ids, "sequence": ["ACG"] * 6}).write_parquet(tmp_path / "train.parquet")
    fold = pl.Series("fold", [0, 1, 2, 0, 1, 2], dtype=pl.UInt8)
    pl.DataFrame({"sequence_id": ids, "fold": fold}).write_parquet(tmp_path / "folds.parquet")
    lists = pl.Series("value", [[0.0, 1.0, 2.0]] * 2, dtype=pl.List(pl.Float32))
    for number in range(2):
        table = pl.DataFrame({"sequence_id": ids[number::3], "fold": pl.Series([number] * 2, dtype=pl.UInt8)})
        table.with_columns(lists).write_parquet(tmp_path / f"{number}.parquet")
    sources = {"run": [tmp_path / "0.parquet", tmp_path / "1.parquet"]}
    batches = list(
        out_of_fold(
            tmp_path / "train.parquet",
            fold_table=tmp_path / "folds.parquet",
            folds=[0, 1],
            sources=sources,
            targets=["value"],
        )
    )
    assert [key for batch in batches for key in batch.rows["sequence_id"]] == ["s0", "s1", "s3", "s4"]
    assert batches[0].predictions["run"][:, 0].tolist() == [0.0, 1.0, 2.0] * 4


def test_labels_become_flags_and_what_is_not_scored_becomes_nan():
    rows = pl.DataFrame(
        {
            "sequence_id": ["a", "b", "c", "d"],
            "labels": pl.Series([[2], [0, 1], None, []], dtype=pl.List(pl.UInt16)),
            "scored": [True, True, False, True],
        }
    )
    flags = labels_that_count(rows, width=3)
    assert flags[[0, 1, 3]].tolist() == [[0, 0, 1], [1, 1, 0], [0, 0, 0]]
    assert np.isnan(flags[2]).all()
    assert np.isnan(labels_that_count(rows.with_columns(scored=pl.lit(False)), width=3)).all()
    with pytest.raises(DataError, match="a has label 2; expected 0 to 1"):
        labels_that_count(rows, width=2)


@pytest.mark.parametrize(
    ("row", "exclusive", "message"),
    [
        ([0.7, 0.7], True, "b: probabilities 0.7, 0.7; expected a sum of 1"),
        ([-0.2, 1.2], True, "b: probabilities -0.2, 1.2; expected values from 0 to 1"),
        ([0.5, 1.1], False, "expected values from 0 to 1"),
    ],
)
def test_what_are_no_probabilities_is_named(row, exclusive, message):
    ids = pl.Series(["a", "b", "c"])
    good = [0.4, 0.6]
    with pytest.raises(DataError, match=message):
        check_probabilities(np.array([good, row, good]), ids, exclusive=exclusive, where="oof")
    check_probabilities(np.array([good, [np.nan, np.nan], good]), ids, exclusive=exclusive, where="oof")
