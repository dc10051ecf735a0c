"""What a submission must look like: its columns, and the key of every row in order.

The keys come from the clean test tables; a sample submission can stand in for them. Keys of values are counted up
within a sequence, so that 269,796,671 of them are known without being held.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol

import numpy as np
import polars as pl
import pyarrow as pa

from pipeline.competitions import competitions
from pipeline.competitions.base import Competition
from pipeline.errors import DataError
from pipeline.paths import Paths
from pipeline.schema import CANDIDATES, SENTINEL
from pipeline.tables import open_parquet, position_keys, read_batches

#: Range of a submitted coordinate, Å; the PDB format that the scorer writes has eight characters for it.
LOWEST_SUBMITTED, MAX_SUBMITTED = -999.999, 9999.999


def moved_into_range(xyz_L3: np.ndarray) -> np.ndarray:
    """A trace shifted along the axes on which it leaves that range: where a structure lies means nothing.

    Args:
        xyz_L3: [L, 3] Å, finite. What is longer than the range still sticks out of it.

    Returns:
        [L, 3] of the same type; as it was where it fits, or holds a sentinel.

    >>> moved_into_range(np.array([[-1500.0, 1.0, 2.0], [0.0, 1.0, 3.0]])).tolist()
    [[-999.0, 1.0, 2.0], [501.0, 1.0, 3.0]]
    """
    low_3, high_3 = xyz_L3.min(axis=0), xyz_L3.max(axis=0)
    outside_3 = (low_3 < LOWEST_SUBMITTED) | (high_3 > MAX_SUBMITTED)
    outside_3 &= max(-low_3.min(), high_3.max()) < -SENTINEL
    return xyz_L3 - np.where(outside_3, low_3 - math.ceil(LOWEST_SUBMITTED), 0).astype(xyz_L3.dtype)


#: What the cells of a column are.
Kind = Literal["text", "whole", "number"]


class Keys(Protocol):
    """Key columns of a submission, row by row."""

    names: tuple[str, ...]
    kinds: tuple[Kind, ...]
    rows: int

    def block(self, start: int, stop: int) -> dict[str, np.ndarray]:
        """Key columns of rows `start` to `stop` (0-based)."""

    def row_of(self, key: Any) -> int | None:
        """Row (0-based) of a value of the first key column, or None if it has none."""


class IdRuns:
    """Integer ids in runs of consecutive numbers: [K] first of each, [K] how many."""

    names: tuple[str, ...] = ("id",)
    kinds: tuple[Kind, ...] = ("whole",)

    def __init__(self, first_K: np.ndarray, count_K: np.ndarray) -> None:
        starts = np.ones(len(first_K), dtype=bool)
        starts[1:] = first_K[1:] != first_K[:-1] + count_K[:-1]
        before_K = np.cumsum(count_K) - count_K
        self.rows = int(count_K.sum())
        self._first, self._before = first_K[starts], before_K[starts]
        self._count = np.diff(self._before, append=self.rows)
        self._order = np.argsort(self._first, kind="stable")

    def block(self, start: int, stop: int) -> dict[str, np.ndarray]:
        low, high = np.searchsorted(self._before, [start, stop - 1], side="right")
        here = slice(low - 1, high)
        begin = np.maximum(self._before[here], start)
        end = np.minimum(self._before[here] + self._count[here], stop)
        shift = np.repeat(self._first[here] - self._before[here], end - begin)
        return {"id": np.arange(start, stop) + shift}

    def row_of(self, key: Any) -> int | None:
        place = int(np.searchsorted(self._first[self._order], key, side="right")) - 1
        if place < 0:
            return None
        run = self._order[place]
        step = int(key) - int(self._first[run])
        return int(self._before[run]) + step if step < self._count[run] else None


class PositionKeys:
    """``<sequence_id>_<position from 0>``: [K] sequences one after the other, and how many positions each has."""

    names: tuple[str, ...] = ("id_seqpos",)
    kinds: tuple[Kind, ...] = ("text",)

    def __init__(self, ids: pl.Series, count_K: np.ndarray) -> None:
        self._ids, self._count = ids.to_arrow().cast(pa.string()), count_K
        self._before = np.cumsum(count_K) - count_K
        self._place = {name: place for place, name in enumerate(ids.to_list())}
        self.rows = int(count_K.sum())

    def block(self, start: int, stop: int) -> dict[str, np.ndarray]:
        return {"id_seqpos": position_keys(self._ids, self._before, start, stop).to_numpy(zero_copy_only=False)}

    def row_of(self, key: Any) -> int | None:
        name, _, position = str(key).rpartition("_")
        place = self._place.get(name)
        if place is None or not position.isdecimal() or int(position) >= self._count[place]:
            return None
        row = int(self._before[place]) + int(position)
        return row if self.block(row, row + 1)["id_seqpos"][0] == key else None  # "x_07" is not "x_7"


class ListedKeys:
    """Keys that are held, one a row, under the name that their column has."""

    def __init__(self, keys: pl.Series, name: str, kind: Kind = "text") -> None:
        self.names: tuple[str, ...] = (name,)
        self.kinds: tuple[Kind, ...] = (kind,)
        self.rows = len(keys)
        self._keys = keys.to_numpy()
        self._row = {key: row for row, key in enumerate(keys.to_list())}

    def block(self, start: int, stop: int) -> dict[str, np.ndarray]:
        return {self.names[0]: self._keys[start:stop]}

    def row_of(self, key: Any) -> int | None:
        return self._row.get(key)


class ResidueKeys:
    """``ID, resname, resid`` of a structure submission: a few thousand rows, held in memory."""

    names: tuple[str, ...] = ("ID", "resname", "resid")
    kinds: tuple[Kind, ...] = ("text", "text", "whole")

    def __init__(self, table: pl.DataFrame) -> None:
        self._columns = {name: table[name].to_numpy() for name in self.names}
        self._rows = {key: row for row, key in enumerate(table["ID"].to_list())}
        self.rows = table.height

    def block(self, start: int, stop: int) -> dict[str, np.ndarray]:
        return {name: column[start:stop] for name, column in self._columns.items()}

    def row_of(self, key: Any) -> int | None:
        return self._rows.get(key)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Columns, keys and range of a competition's submission."""

    keys: Keys
    values: tuple[str, ...]  #: names of the predicted columns
    low: float
    high: float
    advice: str = "make submit again; do not upload this file"  #: what to do when a file does not fit

    @property
    def columns(self) -> list[str]:
        return [*self.keys.names, *self.values]

    @property
    def kinds(self) -> dict[str, Kind]:
        """Column -> what its cells are, in the order of the columns."""
        return _kinds(self.keys, self.values)


@dataclass(frozen=True, kw_only=True)
class TestIndex:
    """Where the values of every test sequence stand in the submission, in the order of ``id_min``."""

    ids: pl.Series  #: sequence_id
    length_K: np.ndarray  #: [K] int64, nt
    first_K: np.ndarray  #: [K] int64, id of the first nucleotide

    @property
    def offsets(self) -> np.ndarray:
        """[K] int64: rows of the submission before each sequence."""
        return np.cumsum(self.length_K) - self.length_K

    def keys(self, competition: Competition) -> "IdRuns | PositionKeys":
        """First column of a submission of values."""
        if competition.row_key == "id_seqpos":
            return PositionKeys(self.ids, self.length_K)
        return IdRuns(self.first_K, self.length_K)


def submission_columns(competition: Competition) -> dict[str, Kind]:
    """Header of a competition's submission, and what its cells are."""
    known: tuple[type[Keys], ...] = (IdRuns, PositionKeys, ResidueKeys)
    (keys,) = (kind for kind in known if kind.names[0] == competition.row_key)
    return _kinds(keys, value_columns(competition))


def _kinds(keys: Keys | type[Keys], values: tuple[str, ...]) -> dict[str, Kind]:
    numbers: dict[str, Kind] = dict.fromkeys(values, "number")
    return dict(zip(keys.names, keys.kinds, strict=True)) | numbers


def value_columns(competition: Competition) -> tuple[str, ...]:
    """Predicted columns of a competition's submission, in order."""
    if competition.task == "values":
        return competition.targets
    return tuple(f"{axis}_{number}" for number in range(1, CANDIDATES + 1) for axis in competition.targets)


def other_competition(columns: list[str]) -> str:
    """A hint for a message: which competition's submission has these columns, if one has."""
    fitting = [comp.name for comp in competitions().values() if list(submission_columns(comp)) == columns]
    return f" (the columns of COMP={fitting[0]})" if fitting else ""


def read_layout(paths: Paths, competition: Competition) -> Layout:
    """Layout of a submission from the clean test tables.

    Raises:
        DataError: they are missing or contradict themselves.
    """
    if competition.task == "values":
        own = read_own_rows(paths, competition)
        return layout_of(competition, read_test_index(paths.clean("test")).keys(competition) if own is None else own)
    return layout_of(competition, ResidueKeys(read_sample(paths.clean("sample"))))


def read_own_rows(paths: Paths, competition: Competition) -> ListedKeys | None:
    """Rows of values that the sample of a hidden test set has in place of those of the test set, if it has others."""
    path, key = paths.clean("sample"), str(competition.row_key)
    if competition.task != "values" or not path.is_file():
        return None
    open_parquet(path, [key]).close()
    return ListedKeys(pl.read_parquet(path, columns=[key])[key], key, "whole" if key == "id" else "text")


def layout_of(competition: Competition, keys: Keys) -> Layout:
    """Layout of a submission with given keys."""
    low, high = (LOWEST_SUBMITTED, MAX_SUBMITTED) if competition.task == "structure" else _range(competition)
    return Layout(keys=keys, values=value_columns(competition), low=low, high=high)


def _range(competition: Competition) -> tuple[float, float]:
    """Of values, which are float32: 0.1 as such is a little more than 0.1."""
    most = float(np.finfo(np.float32).max)
    low, high = competition.target_range or (-most, most)
    return min(low, float(np.float32(low))), max(high, float(np.float32(high)))


def read_sample(path: Path) -> pl.DataFrame:
    """``ID, resname, resid`` in the order of the competition's sample submission."""
    open_parquet(path, ResidueKeys.names).close()
    return pl.read_parquet(path, columns=list(ResidueKeys.names))


def read_test_index(path: Path) -> TestIndex:
    """Ids and places of the test sequences, checked.

    Raises:
        DataError: a range of ids does not fit its sequence, or two of them overlap or are out of order.
    """
    parts = [_index_of(batch) for batch in read_batches(path, ["sequence_id", "id_min", "id_max", "sequence"])]
    empty = pl.read_parquet(path, n_rows=0, columns=["sequence_id", "id_min", "id_max", "sequence"])
    table = pl.concat(parts or [_index_of(empty)])  # a hidden test set may be one of nothing
    off = table.filter(pl.col("id_max") - pl.col("id_min") + 1 != pl.col("length"))
    if off.height:
        row = off.row(0, named=True)
        raise DataError(
            f"{path}: {row['sequence_id']}: ids {row['id_min']} to {row['id_max']} for a sequence of {row['length']} "
            "nt; expected as many ids as nucleotides. Next: check test_sequences.csv."
        )
    overlap = table.filter(pl.col("id_min") <= pl.col("id_max").shift(1))
    if overlap.height:
        raise DataError(
            f"{path}: the ids of {overlap['sequence_id'][0]} (from {overlap['id_min'][0]}) overlap those of the "
            "sequence before it; expected sequences sorted by id_min. Next: make data."
        )
    return TestIndex(
        ids=table["sequence_id"], length_K=table["length"].to_numpy(), first_K=table["id_min"].cast(pl.Int64).to_numpy()
    )


def _index_of(batch: pl.DataFrame) -> pl.DataFrame:
    length = pl.col("sequence").str.len_bytes().cast(pl.Int64).alias("length")
    return batch.select("sequence_id", "id_min", "id_max", length)
