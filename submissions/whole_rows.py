"""A submission with one row a sequence: its ids and their order, from the test set or a sample submission.

Letters: N sequences, K answers to each: classes or numbers.
"""

from pathlib import Path

import numpy as np
import polars as pl
import pyarrow.parquet as pq

from pipeline.competitions.table_files import read_sample
from pipeline.errors import DataError
from pipeline.paths import Paths
from pipeline.tables import open_parquet, read_batches
from submissions.layout import Layout
from submissions.whole_scores import Answers, dense


def ids_of(layout: Layout) -> pl.Series:
    """[N] ids of a submission, named as their column."""
    (key,) = layout.keys.names
    return pl.Series(key, layout.keys.block(0, layout.keys.rows)[key])


def set_inputs(paths: Paths, answers: str) -> dict[str, Path]:
    """The clean table of the answers, and the set's sample submission where there is one."""
    sample = paths.clean("sample")
    return {answers: paths.clean(answers)} | ({"sample": sample} if sample.is_file() else {})


def read_test_ids(paths: Paths) -> pl.Series:
    """Ids of the test sequences, in the order of the raw file.

    Raises:
        DataError: there is no test set.
    """
    test = paths.clean("test")
    if not test.is_file():
        raise DataError(
            f"{paths.comp}: there is no test set, so there is nothing to submit; make evaluate scores what is there. "
            f"Next: put test.csv beside the training file, then make data COMP={paths.comp}."
        )
    return pl.read_parquet(test, columns=["sequence_id"])["sequence_id"]


def free_key(names: tuple[str, ...]) -> str:
    """What the column of ids is called where nothing says it.

    >>> free_key(("a", "b")), free_key(("id", "b"))
    ('id', 'sequence_id')
    """
    return "id" if "id" not in names else "sequence_id"


def read_sample_rows(paths: Paths, ids: pl.Series, sample: Path | None) -> tuple[str, pl.DataFrame] | None:
    """A sample submission's name for messages, and all its columns as text; None where there is none.

    Args:
        paths: where the set's own is.
        ids: of the test sequences.
        sample: another one, CSV or parquet.

    Raises:
        DataError: it is not readable, or of other sequences.
    """
    if sample is None and not paths.clean("sample").is_file():
        return None
    path = paths.clean("sample") if sample is None else sample
    table = _read(path)
    _check_ids(table[table.columns[0]], ids, where=str(path))
    return str(path), table


def _read(path: Path) -> pl.DataFrame:
    if path.suffix == ".parquet":
        open_parquet(path).close()  # which knows the command that makes the set's own again
    elif not path.is_file():
        raise DataError(f"{path}: no such file. Next: give the set's own sample submission.")
    table = read_sample(path)
    if not table.height or table.width < 2:
        raise DataError(
            f"{path}: {table.height} rows of {', '.join(table.columns)[:80]}; expected ids and at least one column "
            "beside them. Next: give the set's own sample submission."
        )
    return table


def _check_ids(first: pl.Series, ids: pl.Series, *, where: str) -> None:
    twice = first.filter(first.is_duplicated())
    if twice.len():
        raise DataError(f"{where}: {first.name} {twice[0]!r} twice; expected each once. Next: repair the file.")
    unknown, lost = first.filter(~first.is_in(ids.to_list())), ids.filter(~ids.is_in(first.to_list()))
    for these, what in ((unknown, "is not in the test set"), (lost, "of the test set is not in it")):
        if these.len():
            raise DataError(
                f"{where}: {first.name} {these[0]!r} {what} ({these.len():,} such); expected the same sequences. "
                "Next: give the sample submission of these data."
            )


def predictions_in_order(predictions: Path, ids: pl.Series, answers: Answers) -> np.ndarray:
    """[N, K] float32 predictions of the sequences of a submission.

    Raises:
        DataError: one of them is not predicted, or twice, or another is; or predictions are none of this kind.
    """
    again = "Next: make predict, then make ensemble."
    table = pl.concat(list(read_batches(predictions, ["sequence_id", answers.said])))
    twice = table.filter(pl.col("sequence_id").is_duplicated())["sequence_id"]
    unknown = table.filter(~pl.col("sequence_id").is_in(ids.to_list()))["sequence_id"]
    for these, what in ((twice, "is predicted twice"), (unknown, "is not among the test sequences")):
        if these.len():
            raise DataError(f"{predictions}: {these[0]!r} {what}; expected each test sequence once. {again}")
    table = pl.DataFrame({"sequence_id": ids}).join(table, on="sequence_id", how="left", maintain_order="left")
    lost = table.filter(pl.col(answers.said).is_null())["sequence_id"]
    if lost.len():
        some = ", ".join(lost.head(3).to_list())
        raise DataError(
            f"{predictions}: no prediction of {some} ({lost.len():,} of {len(ids):,} test sequences); expected all. "
            f"{again}"
        )
    return dense(table, answers, where=str(predictions))


def write_rows(table: pl.DataFrame, part: Path, *, fmt: str, decimals: int | None = None) -> None:
    """A submission as CSV or parquet; without `decimals` every number has as many as it needs."""
    if fmt == "csv":
        table.write_csv(part, float_precision=decimals)
    else:
        pq.write_table(table.to_arrow(), part, compression="zstd", write_page_checksum=True)
