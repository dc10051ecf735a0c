"""The wide profile table: one row per sequence and probe, one column per position.

Letters: N rows of a batch, W position columns, L length of a sequence (nt), T = sum of lengths, S sequences, P probes.

The rows may stand in any order and the file may be larger than memory. `ProfileStore` takes them batch after batch,
checks them, puts values and letters into an unnamed scratch file and keeps about 60 bytes a row in memory: enough to
choose one profile per sequence and probe, and to read the chosen ones back in the order of the clean table. With the
competition's 1,643,680 rows the whole stage peaks at 0.55 GiB.
"""

import os
import re
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Self

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.competitions.raw import require_columns
from pipeline.errors import DataError
from pipeline.schema import ALPHABET, PROBES, normalise_sequence

#: A profile passes when its signal_to_noise and its reads are above these.
#: Source: DasLab/DataPrepRibonanzaKaggle2023, output_all_data_for_kaggle_v2_SCRIPT.m.
MIN_SIGNAL_TO_NOISE, MIN_READS = 1.0, 100

_TEXTS = ("sequence_id", "sequence", "experiment_type", "dataset_name")
_HASHED_AT_ONCE = 4096  # sequences; a hash needs some 30 bytes of scratch memory a letter
_REPAIR = "Next: remove or repair the row"

_POSITION = re.compile(r"reactivity(?:_error)?_(\d{4})")
_INDEX = np.dtype(
    [
        ("values_at", "i8"),  # of the reactivities in the scratch file; the errors follow
        ("letters_at", "i8"),
        ("letters_hash", "u8"),
        ("reads", "f8"),  # NaN = not given; whole numbers below 2**53 are exact
        ("length", "i4"),
        ("dataset", "i4"),  # position in the store's dataset names
        ("signal_to_noise", "f4"),  # NaN = not given
        ("probe", "u1"),
        ("passes", "?"),
    ]
)

_LETTER_OF_BYTE = np.zeros(256, dtype=np.uint8)  # 0 = refused
for _letter in ALPHABET + "T":
    for _byte in (ord(_letter), ord(_letter.lower())):
        _LETTER_OF_BYTE[_byte] = ord("U" if _letter == "T" else _letter)


@dataclass(frozen=True, kw_only=True)
class Layout:
    """Which columns a wide file has."""

    reactivity: tuple[str, ...]  #: W names, position 1 first
    error: tuple[str, ...]
    has_reads: bool
    has_filter: bool

    @property
    def types(self) -> dict[str, pa.DataType]:
        """Columns to read, with their types."""
        counts = ["reads"] * self.has_reads + ["SN_filter"] * self.has_filter
        floats = ("signal_to_noise", *self.reactivity, *self.error)
        return (
            dict.fromkeys(_TEXTS, pa.string())
            | dict.fromkeys(counts, pa.float64())
            | dict.fromkeys(floats, pa.float32())
        )


def find_layout(names: Sequence[str], *, where: str) -> Layout:
    """Which of a wide file's columns to read.

    Raises:
        DataError: a column is missing, or the positions have a gap.
    """
    numbers = [int(found[1]) for name in names if (found := _POSITION.fullmatch(name))]
    positions = range(1, max(numbers, default=1) + 1)
    layout = Layout(
        reactivity=tuple(f"reactivity_{position:04d}" for position in positions),
        error=tuple(f"reactivity_error_{position:04d}" for position in positions),
        has_reads="reads" in names,
        has_filter="SN_filter" in names,
    )
    needs_reads = ["reads"] * (not layout.has_filter)
    require_columns(names, [*layout.types, *needs_reads], where=where)
    return layout


def normalise_sequences(
    sequences: pa.StringArray, ids: pa.StringArray, *, where: str, first_row: int
) -> pa.StringArray:
    """`schema.normalise_sequence` for a column at once.

    Raises:
        DataError: the first sequence that is empty or holds another letter, with its row and id.
    """
    raw, lengths_N = _bytes_of(sequences)
    letters = _LETTER_OF_BYTE[raw]
    if letters.all() and lengths_N.all():
        ends = np.concatenate([[0], np.cumsum(lengths_N)]).astype(np.int32)
        return pa.StringArray.from_buffers(len(sequences), pa.py_buffer(ends), pa.py_buffer(letters))
    rows = enumerate(zip(ids.to_pylist(), sequences.to_pylist(), strict=True), start=first_row)
    named = ((f"{where}: row {row:,}" + f" (id {key})" * bool(key), letters) for row, (key, letters) in rows)
    clean = [normalise_sequence(letters, where=place) for place, letters in named]
    return pa.array(clean, pa.string())


@dataclass(frozen=True, kw_only=True)
class Choice:
    """One profile per sequence and probe."""

    ids: pa.StringArray  #: [S] sorted
    rows_SP: np.ndarray  #: [S, P] int64, row of the profile in `PROBES` order, -1 = none
    duplicates: int  #: profiles that gave way to one of higher signal_to_noise


class ProfileStore:
    """Checked profiles of a wide file: numbers and letters on the disk, keys in memory.

    Args:
        folder: where the scratch file goes; it has no name and vanishes with the process.
        layout: columns of the file.
        where: the file's name, which leads every sentence.
    """

    def __init__(self, folder: Path, *, layout: Layout, where: str) -> None:
        self.layout, self.where = layout, where
        self.rows = 0
        self.dataset_names: list[str] = []
        self.index = np.empty(0, dtype=_INDEX)  #: [rows of the file], complete after `choose`
        self._ids: list[pa.StringArray] = []
        self._parts: list[np.ndarray] = []
        self._dataset_codes: dict[str, int] = {}
        self._position_weights = np.empty(0, dtype=np.uint64)
        self._scratch = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 closed by __exit__
        self._end = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self._scratch.close()

    def add(self, batch: pa.RecordBatch) -> None:
        """Check the next rows of the file and keep them.

        Raises:
            DataError: a row breaks a rule; the sentence holds its number and id.
        """
        if not batch.num_rows:
            return
        index_N = np.zeros(batch.num_rows, dtype=_INDEX)
        sequences = normalise_sequences(
            batch.column("sequence"), batch.column("sequence_id"), where=self.where, first_row=self.rows + 1
        )
        letters, lengths_N = _bytes_of(sequences)
        index_N["length"] = lengths_N
        index_N["letters_hash"] = self._hashes(letters, lengths_N)
        self._keys(batch, index_N)
        values_N2W, within_NW = self._values(batch, lengths_N)
        kept = values_N2W[np.broadcast_to(within_NW[:, None], values_N2W.shape)]
        index_N["values_at"] = self._append(kept, 2 * values_N2W.itemsize * within_NW.sum(axis=1))
        index_N["letters_at"] = self._append(letters, lengths_N)
        self._ids.append(batch.column("sequence_id"))
        self._parts.append(index_N)
        self.rows += batch.num_rows

    def choose(self) -> Choice:
        """Keep, of each sequence and probe, the profile with the highest signal_to_noise; the first row wins a tie.

        Raises:
            DataError: one id stands for two sequences.
        """
        self.index = np.concatenate(self._parts)
        self._parts.clear()
        encoded = pa.concat_arrays(self._ids).dictionary_encode()
        self._ids.clear()
        order_S = pc.sort_indices(encoded.dictionary)
        ids = encoded.dictionary.take(order_S)
        rank_S = np.empty(len(ids), dtype=np.int32)
        rank_S[order_S.to_numpy()] = np.arange(len(ids), dtype=np.int32)
        code_N = rank_S[encoded.indices.to_numpy()]
        signal_N = self.index["signal_to_noise"]
        signal_N = np.where(np.isnan(signal_N), -np.inf, signal_N)  # a profile without one comes last
        order_N = np.lexsort((-signal_N, self.index["probe"], code_N))
        self._one_sequence_per_id(order_N, code_N, ids)
        key_N = (code_N.astype(np.int64) * len(PROBES) + self.index["probe"])[order_N]
        best = order_N[np.flatnonzero(np.diff(key_N, prepend=-1))]
        rows_SP = np.full((len(ids), len(PROBES)), -1, dtype=np.int64)
        rows_SP[code_N[best], self.index["probe"][best]] = best
        return Choice(ids=ids, rows_SP=rows_SP, duplicates=len(order_N) - len(best))

    def read_values(self, rows_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Profiles of some rows, one behind the other.

        Args:
            rows_N: [N] row numbers of the file, 0-based.

        Returns:
            [T] float32 reactivities and [T] float32 errors; NaN = not measured.
        """
        index_N = self.index[rows_N]
        lengths_N = index_N["length"]
        starts_N = np.cumsum(lengths_N, dtype=np.int64) - lengths_N
        columns = np.full((2, lengths_N.sum()), np.nan, dtype=np.float32)
        reactivity, error = memoryview(columns[0]).cast("B"), memoryview(columns[1]).cast("B")
        bytes_N = 4 * np.minimum(lengths_N, len(self.layout.reactivity))
        file = self._scratch.fileno()
        places = zip((4 * starts_N).tolist(), bytes_N.tolist(), index_N["values_at"].tolist(), strict=True)
        for start, size, at in places:
            got = os.preadv(file, [reactivity[start : start + size], error[start : start + size]], at)
            assert got == 2 * size, f"scratch file of {self.where}: {got} of {2 * size} bytes at {at}"
        return columns[0], columns[1]

    def read_sequences(self, rows_N: np.ndarray) -> pa.StringArray:
        """[N] normalised sequences of some rows."""
        index_N = self.index[rows_N]
        file = self._scratch.fileno()
        places = zip(index_N["length"].tolist(), index_N["letters_at"].tolist(), strict=True)
        return pa.array([os.pread(file, length, at).decode("ascii") for length, at in places], pa.string())

    def hash_sequences(self, sequences: pa.StringArray) -> np.ndarray:
        """[N] uint64 hashes that equal ``index["letters_hash"]`` where the normalised sequences are equal."""
        starts = range(0, len(sequences), _HASHED_AT_ONCE)
        pieces = [self._hashes(*_bytes_of(sequences.slice(start, _HASHED_AT_ONCE))) for start in starts]
        return np.concatenate(pieces)

    def _keys(self, batch: pa.RecordBatch, index_N: np.ndarray) -> None:
        self._refuse(batch, pc.equal(batch.column("sequence_id"), ""), lambda _: "empty sequence_id; expected an id")
        probes = batch.column("experiment_type")
        codes = pc.index_in(probes, value_set=pa.array(PROBES))
        expected = f"expected {' or '.join(PROBES)}"
        self._refuse(batch, codes.is_null(), lambda n: f"experiment_type {probes[n].as_py()!r}; {expected}")
        index_N["probe"] = codes.to_numpy()
        names = batch.column("dataset_name").dictionary_encode()
        index_N["dataset"] = self._codes_of(names.dictionary.to_pylist())[names.indices.to_numpy()]
        signal_N = _floats(batch.column("signal_to_noise"))
        self._refuse(batch, np.isinf(signal_N), lambda n: f"signal_to_noise {signal_N[n]}; expected a finite number")
        index_N["signal_to_noise"] = signal_N
        index_N["reads"] = np.nan
        if self.layout.has_reads:
            reads_N = _floats(batch.column("reads"))
            odd_N = (reads_N < 0) | (reads_N != np.floor(reads_N)) & ~np.isnan(reads_N) | np.isinf(reads_N)
            self._refuse(batch, odd_N, lambda n: f"reads {reads_N[n]}; expected a whole number")
            index_N["reads"] = reads_N
        index_N["passes"] = self._passes(batch, index_N)

    def _passes(self, batch: pa.RecordBatch, index_N: np.ndarray) -> np.ndarray:
        if not self.layout.has_filter:
            return (index_N["signal_to_noise"] > MIN_SIGNAL_TO_NOISE) & (index_N["reads"] > MIN_READS)
        given_N = _floats(batch.column("SN_filter"))
        self._refuse(batch, ~np.isin(given_N, (0, 1)), lambda n: f"SN_filter {given_N[n]}; expected 0 or 1")
        return given_N == 1

    def _values(self, batch: pa.RecordBatch, lengths_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        columns = self.layout.reactivity + self.layout.error
        width = len(self.layout.reactivity)
        tensor = batch.select(columns).to_tensor(null_to_nan=True)
        values_N2W = tensor.to_numpy().reshape(batch.num_rows, 2, width)
        within_NW = np.arange(width) < lengths_N[:, None]
        infinite_N = np.isinf(values_N2W).any(axis=(1, 2))
        self._refuse(batch, infinite_N, lambda n: self._describe(batch, n, np.isinf(values_N2W[n]), "finite values"))
        beyond_N2W = ~np.isnan(values_N2W) & ~within_NW[:, None]
        self._refuse(
            batch,
            beyond_N2W.any(axis=(1, 2)),
            lambda n: self._describe(batch, n, beyond_N2W[n], f"nothing beyond the sequence's {lengths_N[n]} letters"),
        )
        return values_N2W, within_NW

    def _describe(self, batch: pa.RecordBatch, row: int, bad_2W: np.ndarray, expected: str) -> str:
        name = (self.layout.reactivity + self.layout.error)[int(bad_2W.argmax())]
        return f"column {name!r} holds {batch.column(name)[row].as_py()}; expected {expected}"

    def _refuse(self, batch: pa.RecordBatch, bad: np.ndarray | pa.Array, what: Callable[[int], str]) -> None:
        bad_N = np.asarray(bad)
        if bad_N.any():
            row = int(bad_N.argmax())
            key = batch.column("sequence_id")[row].as_py()
            named = f" (id {key})" if key else ""
            raise DataError(f"{self.where}: row {self.rows + row + 1:,}{named}: {what(row)}. {_REPAIR}.")

    def _codes_of(self, names: list[str]) -> np.ndarray:
        for name in names:
            if name not in self._dataset_codes:
                self._dataset_codes[name] = len(self.dataset_names)
                self.dataset_names.append(name)
        return np.array([self._dataset_codes[name] for name in names], dtype=np.int32)

    def _hashes(self, letters: np.ndarray, lengths_N: np.ndarray) -> np.ndarray:
        """Multilinear hashes: sum of letter × random weight of its position, modulo 2**64."""
        longest = int(lengths_N.max())
        if longest > self._position_weights.size:
            self._position_weights = np.random.default_rng(0).integers(2**64, size=longest, dtype=np.uint64)
        starts_N = np.cumsum(lengths_N) - lengths_N
        position = np.arange(len(letters)) - np.repeat(starts_N, lengths_N)
        return np.add.reduceat(letters * self._position_weights[position], starts_N)

    def _append(self, data: np.ndarray, sizes_N: np.ndarray) -> np.ndarray:
        """Write rows of `sizes_N` bytes behind each other; returns where each of them starts."""
        self._scratch.write(np.ascontiguousarray(data).data.cast("B"))
        self._scratch.flush()
        ends_N = self._end + np.cumsum(sizes_N, dtype=np.int64)
        self._end = int(ends_N[-1])
        return ends_N - sizes_N

    def _one_sequence_per_id(self, order_N: np.ndarray, code_N: np.ndarray, ids: pa.StringArray) -> None:
        hashes_N, sorted_N = self.index["letters_hash"][order_N], code_N[order_N]
        differs = np.flatnonzero((sorted_N[1:] == sorted_N[:-1]) & (hashes_N[1:] != hashes_N[:-1]))
        if differs.size:
            rows = sorted(int(row) + 1 for row in order_N[differs[0] : differs[0] + 2])
            raise DataError(
                f"{self.where}: id {ids[int(sorted_N[differs[0]])].as_py()} has one sequence in row {rows[0]} and "
                f"another in row {rows[1]}; expected one sequence per id. {_REPAIR} that is wrong."
            )


def _bytes_of(strings: pa.StringArray) -> tuple[np.ndarray, np.ndarray]:
    """[sum of lengths] uint8 and [N] int64: all letters behind each other, and how many belong to each string."""
    _, ends, data = strings.buffers()
    ends_N = np.frombuffer(ends, dtype=np.int32)[strings.offset : strings.offset + len(strings) + 1]
    letters = np.frombuffer(data, dtype=np.uint8) if data else np.empty(0, dtype=np.uint8)
    return letters[ends_N[0] : ends_N[-1]], np.diff(ends_N).astype(np.int64)


def _floats(column: pa.Array) -> np.ndarray:
    return column.to_numpy(zero_copy_only=False)
