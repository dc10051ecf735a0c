"""Keyed tables read in the order of their key, a batch at a time: memory does not grow with the number of rows.

Letters: N sequences of a batch, T their nucleotides one after the other, C targets.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.errors import DataError
from pipeline.paths import how_to_make
from pipeline.schema import folds_of_other_data
from pipeline.stage import require_as_written, sha256_file

#: Rows of a batch and of a row group that is written from one: about 3 MiB of float32 a target at 177 nt.
BATCH_ROWS = 2048


def open_parquet(path: Path, columns: Sequence[str] = ()) -> pq.ParquetFile:
    """Open a parquet file, with page checksums verified, and see that it has `columns`.

    Raises:
        DataError: missing, not parquet, or without one of the columns.
    """
    if not path.is_file():
        raise DataError(f"{path}: no such file. Next: {how_to_make(path)}.")
    try:
        # Without pre_buffer=False, pyarrow 26 holds all that it has read of the file until the last batch.
        opened = pq.ParquetFile(path, page_checksum_verification=True, pre_buffer=False)
    except (pa.ArrowException, OSError, UnicodeDecodeError) as err:
        raise DataError(
            f"{path}: not a readable parquet file ({_first_line(err)}). Next: remove it and run its stage again."
        ) from err
    missing = [column for column in columns if column not in opened.schema_arrow.names]
    if missing:
        raise DataError(
            f"{path}: no column {', '.join(missing)}; got {', '.join(opened.schema_arrow.names)}; "
            f"expected {', '.join(columns)}. Next: see that the file belongs to this competition."
        )
    return opened


def read_batches(path: Path, columns: Sequence[str], *, rows: int = BATCH_ROWS) -> Iterator[pl.DataFrame]:
    """Batches of a parquet file with `columns`, in the file's order.

    Raises:
        DataError: as `open_parquet`, or a page is damaged.
    """
    opened = open_parquet(path, columns)
    try:
        for batch in opened.iter_batches(batch_size=rows, columns=list(columns)):
            yield pl.DataFrame(pa.Table.from_batches([batch]))
    except (pa.ArrowException, OSError) as err:
        raise DataError(f"{path}: damaged ({_first_line(err)}). Next: remove it and run its stage again.") from err
    finally:
        opened.close()


def read_all(path: Path) -> pl.DataFrame:
    """A whole table with its page checksums verified, which polars passes over.

    Raises:
        DataError: as `read_batches`.
    """
    with open_parquet(path) as opened:
        schema = opened.schema_arrow
    return pl.concat([pl.DataFrame(schema.empty_table()), *read_batches(path, schema.names)])


def read_fold_table(path: Path, columns: Sequence[str] = ("sequence_id", "fold")) -> pl.DataFrame:
    """Columns of ``folds/<split>.parquet``, in the file's order.

    Raises:
        DataError: missing, damaged, or not what `make folds` wrote.
    """
    open_parquet(path, columns).close()
    require_as_written(path, sha256_file(path), manifest=path.with_suffix(".manifest.json"), label="folds")
    return pl.read_parquet(path, columns=list(columns))


def read_folds(path: Path, ids: Sequence[str]) -> pl.DataFrame:
    """``sequence_id, fold`` of a fold table, sorted by sequence_id.

    Args:
        path: ``folds/<split>.parquet``.
        ids: sequence ids of the data that it should be for, each once.

    Raises:
        DataError: as `read_fold_table`, or it is from other data.
    """
    table = read_fold_table(path).sort("sequence_id")
    if not table["sequence_id"].equals(pl.Series(ids, dtype=pl.String).sort()):
        raise folds_of_other_data(path, table["sequence_id"].to_list(), ids)
    return table


def fold_numbers(path: Path) -> list[int]:
    """Folds of a fold table, in rising order.

    Raises:
        DataError: as `read_fold_table`.
    """
    return read_fold_table(path)["fold"].unique().sort().to_list()


class SortedRows:
    """Rows of one parquet file that is sorted by, and unique in, ``sequence_id``; each row is handed out once.

    Raises:
        DataError: as soon as an id does not rise.
    """

    def __init__(self, path: Path, columns: Sequence[str]) -> None:
        self.path = path
        self._batches = read_batches(path, ["sequence_id", *columns])
        self._ready: pl.DataFrame | None = next(self._batches, None)
        self._last: str | None = None
        self._check()

    def upto(self, last: str) -> pl.DataFrame | None:
        """The next rows, as long as their id is not greater than `last`; None if there are none."""
        parts = []
        while self._ready is not None:
            cut = int(self._ready["sequence_id"].search_sorted(last, side="right"))
            if cut:
                parts.append(self._ready.head(cut))
            if cut < self._ready.height:
                self._ready = self._ready.slice(cut)
                break
            self._ready = next(self._batches, None)
            self._check()
        return pl.concat(parts) if parts else None

    def rest(self) -> str | None:
        """First id that was not handed out, if one is left."""
        return None if self._ready is None else self._ready["sequence_id"][0]

    def _check(self) -> None:
        if self._ready is None:
            return
        ids = self._ready["sequence_id"]
        before = ids.shift(1, fill_value=self._last)
        bad = self._ready.filter((ids <= before).fill_null(False))
        if bad.height:
            raise DataError(
                f"{self.path}: sequence_id {bad['sequence_id'][0]!r} is repeated or out of order; expected rows sorted "
                "by and unique in sequence_id. Next: run the stage that writes the file again."
            )
        self._last = ids[-1]


def flat_lists(column: pl.Series, lengths_N: np.ndarray, *, ids: pl.Series, where: str) -> np.ndarray:
    """Values of a list column one after the other.

    Args:
        column: N lists of numbers; null, as a whole or inside, becomes NaN.
        lengths_N: [N] int, how long each list must be, nt.
        ids: N keys, for messages.
        where: what the table is called in messages.

    Returns:
        [T] float32.

    Raises:
        DataError: a list has another length.
    """
    got_N = column.list.len().to_numpy()  # float with NaN where the list is null
    wrong = np.flatnonzero(np.isfinite(got_N) & (got_N != lengths_N))
    if wrong.size:
        row = wrong[0]
        raise DataError(
            f"{where}: {ids[int(row)]}: {int(got_N[row])} values of {column.name}; expected {lengths_N[row]}, one a "
            "nucleotide, a class or a number. Next: run the table's stage again, it is of other data."
        )
    filled = column.filter(column.list.len() > 0)  # an empty list explodes to a null in polars 1, to nothing in 2
    values = filled.explode().cast(pl.Float32).to_numpy()
    if not column.null_count():
        return values
    flat_T = np.full(int(lengths_N.sum()), np.nan, dtype=np.float32)
    flat_T[np.repeat(column.is_not_null().to_numpy(), lengths_N)] = values
    return flat_T


def as_lists(flat_T: np.ndarray, lengths_N: np.ndarray) -> pa.Array:
    """The inverse of `flat_lists` for values without null: N lists of float32."""
    offsets = np.concatenate([[0], np.cumsum(lengths_N)]).astype(np.int32)
    return pa.ListArray.from_arrays(offsets, pa.array(flat_T.astype(np.float32, copy=False)))


def position_keys(ids: pa.Array, before_K: np.ndarray, start: int, stop: int) -> pa.Array:
    """``<sequence_id>_<position from 0>`` of some nucleotides of sequences that stand one after the other.

    Args:
        ids: K texts.
        before_K: [K] int64, nucleotides before each sequence.
        start: the first nucleotide, from 0.
        stop: the one after the last.

    >>> position_keys(pa.array(["a", "b_1"]), np.array([0, 3]), 2, 5).to_pylist()
    ['a_2', 'b_1_0', 'b_1_1']
    """
    first, last = np.searchsorted(before_K, [start, max(start, stop - 1)], side="right") - 1
    begins, ends = before_K[first : last + 1].clip(min=start), np.append(before_K[first + 1 : last + 1], stop)
    place_T = np.repeat(np.arange(first, last + 1), ends - begins)
    position_T = np.arange(start, stop) - before_K[place_T]
    words = pa.array(np.arange(position_T.max(initial=0) + 1)).cast(pa.string())  # of each number once: 7 times as fast
    return pc.binary_join_element_wise(ids.take(pa.array(place_T)), words.take(pa.array(position_T)), "_")


@dataclass(frozen=True, kw_only=True)
class OofBatch:
    """Some training sequences, in the order of their ids, and what was predicted for each by every source."""

    rows: pl.DataFrame  #: columns of the clean train table, and ``fold``
    lengths_N: np.ndarray  #: [N] int64, predicted values of each: its length in nt, or the number of classes or columns
    predictions: dict[str, np.ndarray]  #: source -> [T, C] float32; a sequence without prediction is NaN throughout
    missing: dict[str, np.ndarray]  #: source -> [N] bool: no prediction

    def flat(self, columns: Sequence[str]) -> np.ndarray:
        """List columns of `rows` as [T, C] float32, NaN where null."""
        ids = self.rows["sequence_id"]
        flats = [flat_lists(self.rows[name], self.lengths_N, ids=ids, where="clean train table") for name in columns]
        return np.stack(flats, axis=1)

    def spread(self, per_sequence_N: np.ndarray) -> np.ndarray:
        """A value per sequence repeated for its nucleotides, [T]."""
        return np.repeat(per_sequence_N, self.lengths_N)

    def by_column(self, width: int) -> "OofBatch":
        """The same where the only target lists a number for each of `width` columns: these are the C, and T is N."""
        wide = {source: values_TC.reshape(-1, width) for source, values_TC in self.predictions.items()}
        return replace(self, lengths_N=np.ones(self.rows.height, dtype=np.int64), predictions=wide)


def truth_that_counts(batch: OofBatch, targets: Sequence[str]) -> np.ndarray:
    """Measured values of a batch, [T, C] float32, NaN where the organisers' metric does not look.

    A position counts if its sequence is ``scored`` and all targets were measured there.
    """
    truth_TC = batch.flat(targets)
    counts_T = batch.spread(batch.rows["scored"].to_numpy()) & np.isfinite(truth_TC).all(axis=1)
    truth_TC[~counts_T] = np.nan
    return truth_TC


def labels_that_count(rows: pl.DataFrame, *, width: int) -> np.ndarray:
    """Labels of sequences as [N, K] float32, 1 for each class that a sequence has; a row of NaN where none is scored.

    Args:
        rows: ``sequence_id``, ``labels`` (places among the classes; null = not known) and ``scored``.
        width: number of classes.

    Raises:
        DataError: a label of other classes.
    """
    count_N = rows["labels"].list.len().fill_null(0).to_numpy()
    owner_L = np.repeat(np.arange(rows.height), count_N)
    place_L = rows["labels"].filter(rows["labels"].list.len() > 0).explode().to_numpy()
    if place_L.size and place_L.max() >= width:
        raise DataError(
            f"clean train table: {rows['sequence_id'][int(owner_L[place_L.argmax()])]} has label {place_L.max()}; "
            f"expected 0 to {width - 1}, a place among the classes. Next: make data."
        )
    truth_NK = np.zeros((rows.height, width), dtype=np.float32)
    truth_NK[owner_L, place_L] = 1.0
    truth_NK[~(rows["scored"] & rows["labels"].is_not_null()).to_numpy()] = np.nan
    return truth_NK


def number_lists(numbers: pl.Series, width: int) -> np.ndarray:
    """Lists of `width` numbers as [N, C] float64, NaN = not measured.

    >>> number_lists(pl.Series([[1.0, None], None], dtype=pl.List(pl.Float64)), 2).tolist()
    [[1.0, nan], [nan, nan]]
    """
    columns = [numbers.list.get(place, null_on_oob=True).cast(pl.Float64).to_numpy() for place in range(width)]
    return np.stack(columns, axis=1).astype(np.float64)


def numbers_that_count(rows: pl.DataFrame, *, width: int) -> np.ndarray:
    """Measured numbers of sequences as [N, C] float64, NaN where not measured; a row of NaN where none is scored.

    Args:
        rows: ``sequence_id``, ``numbers`` (one for each column; null = not measured) and ``scored``.
        width: number of columns.

    Raises:
        DataError: numbers of other columns.
    """
    count_N = rows["numbers"].list.len()
    wrong = rows.filter((count_N != width).fill_null(False))
    if wrong.height:
        raise DataError(
            f"clean table: {wrong['sequence_id'][0]} has {len(wrong['numbers'][0])} numbers; expected {width}, one a "
            "column. Next: make data."
        )
    truth_NC = number_lists(rows["numbers"], width)
    truth_NC[~rows["scored"].to_numpy()] = np.nan
    return truth_NC


def check_probabilities(probability_NK: np.ndarray, ids: pl.Series, *, exclusive: bool, where: str) -> None:
    """See that predictions are probabilities; rows of NaN, sequences without prediction, are passed over.

    Raises:
        DataError: a value outside [0, 1], or exclusive classes whose probabilities do not sum to 1.
    """
    outside_N = ((probability_NK < -1e-6) | (probability_NK > 1 + 1e-6)).any(axis=1)
    off_N = (np.abs(probability_NK.sum(axis=1, dtype=np.float64) - 1.0) > 1e-3) & exclusive
    for wrong_N, expected in ((outside_N, "values from 0 to 1"), (off_N, "a sum of 1")):
        if wrong_N.any():
            at = int(wrong_N.argmax())
            shown = ", ".join(f"{value:.4g}" for value in probability_NK[at, :5])
            raise DataError(
                f"{where}: {ids[at]}: probabilities {shown}{' …' if probability_NK.shape[1] > 5 else ''}; "
                f"expected {expected}. Next: make predict again, and see that the table is this competition's."
            )


def out_of_fold(
    train: Path,
    *,
    fold_table: Path,
    folds: Sequence[int],
    sources: Mapping[str, Sequence[Path]],
    targets: Sequence[str],
    columns: Sequence[str] = (),
    width: int | None = None,
) -> Iterator[OofBatch]:
    """Training sequences of some folds beside their out-of-fold predictions, joined on ``sequence_id``.

    Args:
        train: clean train table.
        fold_table: which sequence is held out in which fold.
        folds: folds to read; sequences of other folds are passed over.
        sources: name -> prediction tables, each sorted by ``sequence_id``, that together make one set of predictions.
        targets: list columns of the prediction tables, the C of the arrays.
        columns: further columns of the train table.
        width: values in each list of the predictions, such as the number of classes; None = one a nucleotide.

    Raises:
        DataError: a fold table or predictions of other data; a sequence predicted twice, or by a checkpoint that saw
            it; a prediction that is not finite.
    """
    held_out = _read_folds(fold_table, train)
    readers = {name: [SortedRows(path, ["fold", *targets]) for path in tables] for name, tables in sources.items()}
    wanted = list(dict.fromkeys(["sequence_id", "sequence", *columns]))
    last = None
    for rows in read_batches(train, wanted):
        rows = rows.join(held_out, on="sequence_id", how="left", validate="1:1", maintain_order="left")
        if rows["fold"].null_count():
            lost = rows.filter(pl.col("fold").is_null())["sequence_id"][0]
            raise DataError(f"{fold_table}: no fold for {lost}: the table is from other data. Next: make folds.")
        last = rows["sequence_id"][-1]
        rows = rows.filter(pl.col("fold").is_in(list(folds)))
        lengths_N = rows["sequence"].str.len_bytes().to_numpy().astype(np.int64)
        lengths_N = lengths_N if width is None else np.full(rows.height, width)
        found = {name: (parts, last) for name, parts in readers.items()}
        yield _align(rows, lengths_N, found, targets, split=fold_table.stem)
    for parts in readers.values():
        for part in parts:
            if part.rest() is not None:
                raise _unknown_id(part.path, str(part.rest()))


def _read_folds(fold_table: Path, train: Path) -> pl.DataFrame:
    held_out = read_fold_table(fold_table)
    rows = pq.read_metadata(train).num_rows
    if held_out.height != rows:
        raise DataError(
            f"{fold_table}: {held_out.height:,} sequences; expected {rows:,} as in {train}: the table is from other "
            "data. Next: make folds."
        )
    return held_out


def _align(
    rows: pl.DataFrame,
    lengths_N: np.ndarray,
    sources: Mapping[str, tuple[list[SortedRows], str]],
    targets: Sequence[str],
    *,
    split: str,
) -> OofBatch:
    predictions, missing = {}, {}
    for name, (parts, last) in sources.items():
        found = [(part.path, table) for part in parts if (table := part.upto(last)) is not None]
        for path, table in found:
            _check_fold(table, rows, path=path, split=split)
        tables = [table for _, table in found]
        if tables:
            table = pl.concat(tables)
            twice = table.filter(pl.col("sequence_id").is_duplicated())["sequence_id"].unique().sort()
            if twice.len():
                raise DataError(f"{name}: {_some(twice)} predicted in two folds; expected one. Next: make predict.")
            table = rows.select("sequence_id").join(
                table, on="sequence_id", how="left", validate="1:1", maintain_order="left"
            )
        else:
            empty = [pl.lit(None, dtype=pl.List(pl.Float32)).alias(target) for target in targets]
            table = rows.select("sequence_id", *empty)
        missing[name] = table[targets[0]].is_null().to_numpy()
        predictions[name] = finite_values(table, lengths_N, targets=targets, missing_N=missing[name], where=name)
    return OofBatch(rows=rows, lengths_N=lengths_N, predictions=predictions, missing=missing)


def _check_fold(table: pl.DataFrame, rows: pl.DataFrame, *, path: Path, split: str) -> None:
    unknown = table.select("sequence_id").join(rows, on="sequence_id", how="anti")
    if unknown.height:
        raise _unknown_id(path, unknown["sequence_id"][0])
    require_out_of_fold(table, rows, where=path, split=split)


def require_out_of_fold(table: pl.DataFrame, held_out: pl.DataFrame, *, where: str | Path, split: str) -> None:
    """See that no prediction is by a checkpoint that saw its sequence.

    Args:
        table: predictions, with ``sequence_id`` and the ``fold`` that made them.
        held_out: ``sequence_id`` and the ``fold`` that the split holds it out in.
        where: they are from, for the message.
        split: its name, likewise.

    Raises:
        DataError: one is, or is of no sequence of the split.
    """
    beside = table.select("sequence_id", "fold").join(
        held_out.select("sequence_id", held_out="fold"), on="sequence_id", how="left", maintain_order="left"
    )
    seen = beside.filter(pl.col("held_out").ne_missing(pl.col("fold")))
    if seen.height:
        names = seen["sequence_id"].unique(maintain_order=True)
        raise DataError(
            f"{where}: {_some(names)} predicted by fold {seen['fold'][0]}; the split {split} holds it out in fold "
            f"{seen['held_out'][0]}, so the checkpoint saw it. Next: train and predict again with this split."
        )


def finite_values(
    table: pl.DataFrame,
    lengths_N: np.ndarray,
    *,
    targets: Sequence[str],
    missing_N: np.ndarray | None = None,
    where: str,
) -> np.ndarray:
    """Predicted lists as [T, C] float32, NaN for the sequences that `missing_N`, [N] bool, names; None = for none.

    Raises:
        DataError: a prediction that is there has another length than its sequence or is not finite.
    """
    ids = table["sequence_id"]
    flats = [flat_lists(table[target], lengths_N, ids=ids, where=where) for target in targets]
    values_TC = np.stack(flats, axis=1)
    broken_T = ~np.isfinite(values_TC).all(axis=1)
    if missing_N is not None:
        broken_T &= ~np.repeat(missing_N, lengths_N)
    if broken_T.any():
        at = int(np.flatnonzero(broken_T)[0])
        ends_N = np.cumsum(lengths_N)
        row = int(np.searchsorted(ends_N, at, side="right"))
        raise DataError(
            f"{where}: {ids[row]}: prediction at position {at - int(ends_N[row] - lengths_N[row]) + 1} is "
            f"{values_TC[at].tolist()}; expected finite numbers. Next: make predict again, or see the run's skips."
        )
    return values_TC


def _unknown_id(path: Path, sequence_id: str) -> DataError:
    return DataError(
        f"{path}: {sequence_id!r} is not among the sequences that this split holds out there; the predictions are of "
        "other data. Next: make predict."
    )


def _some(ids: pl.Series) -> str:
    shown = ", ".join(ids.head(3).to_list())
    return shown if ids.len() <= 3 else f"{shown} and {ids.len() - 3} more"


def _first_line(err: Exception) -> str:
    return str(err).splitlines()[0][:120] if str(err) else type(err).__name__
