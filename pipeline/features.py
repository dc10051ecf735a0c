"""Embeddings that other networks made, as further input: brought in once, one memory-mapped array for each clean table.

``features/<name>/train.npy`` and ``test.npy`` are float16, in the order of their table: a vector for every nucleotide,
[T, F], or for every sequence, [N, F], which all of its nucleotides get. Half precision is what such networks compute
in, and the network that reads a vector norms it first.

Letters: N sequences, T nucleotides in a row, L length (nt), F feature.
"""

import csv
import hashlib
import json
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.arrays import create_mapped, ids_and_lengths, read_parquet
from pipeline.config import RunConfig
from pipeline.errors import ConfigError, DataError
from pipeline.paths import Paths, how_to_make
from pipeline.runlog import Bar, amount
from pipeline.stage import Report, read_manifest, run_stage, sha256_file

_VERSION = 1
_ROWS = 64  # of a parquet file in memory at a time: 29 MB of 177 nt by 640 float32
_SHOWN = 5  # ids in a message
_WIDTH = "num_features"  #: argument of every network
_COLUMNS = "nucleotides", "embedding"  # as `pipeline.embed` writes them; the first one that is there


def run(source: Path, *, name: str, paths: Paths) -> Report:
    """Bring in embeddings of all sequences of the clean tables, as ``features/<name>/<table>.npy``.

    The same embeddings give the same bytes, in whatever order they are given.

    Args:
        source: a parquet file with ``sequence_id`` and ``nucleotides`` ([L, F] each) or else ``embedding`` ([F]); or a
            folder of ``<sequence_id>.npy``, or an ``index.csv`` there with ``sequence_id,file``, or such a CSV.
        name: by which ``data.features`` asks for them.
        paths: artefacts of one competition, whose clean tables there are say which sequences.

    Returns:
        Outputs: the tables' arrays; facts: ``width``, ``per_nucleotide``, sequences of each table, and ``others``,
        which are given and in no table.

    Raises:
        ConfigError: no name, or no source.
        DataError: no clean table, a sequence without embedding (named), one that does not fit its sequence or the
            others, or a value that is not finite.
        StorageError: the disk is full.
    """
    if not re.fullmatch(r"[\w.+-]*\w", name):
        raise ConfigError(
            f"features: NAME={name!r}; expected letters, digits and . _ + -. Next: NAME=rnafm, for example."
        )
    is_table = source.is_file() and source.suffix != ".csv"
    if source == Path() or not source.exists():
        got = "no embeddings given" if source == Path() else f"{source}: no such file or folder"
        raise ConfigError(f"features: {got}; expected a parquet file or a folder of .npy. Next: FILE=<it>.")
    outputs = {table: paths.features(name, table) for table in ("train", "test") if paths.clean(table).is_file()}
    if not outputs:
        raise DataError(f"{paths.clean('train')}: no clean table. Next: make data COMP={paths.comp}.")
    files = {} if is_table else _files(source)
    if is_table:
        with source.open("rb") as handle:
            if handle.read(4) != b"PAR1":
                raise DataError(f"{source}: no parquet file; expected what make embed writes. Next: FILE=<that>.")
    inputs = {table: paths.clean(table) for table in outputs} | ({"embeddings": source} if is_table else {})
    params = {"version": _VERSION} | ({} if is_table else {"files": _digest(files)})

    def build(parts: dict[str, Path]) -> dict[str, Any]:
        tables = {
            table: _Rows(paths.clean(table), part, sorted_by_id=table == "train") for table, part in parts.items()
        }
        known = _ids_of(source) if is_table else files.keys()
        _require_all(tables, known, source=source)
        given = _read_table(source) if is_table else ((each, _load(path)) for each, path in files.items())
        return _write(tables, given, total=len(known), source=source)

    return run_stage("features", inputs=inputs, outputs=outputs, params=params, build=build)


def describe(facts: Mapping[str, Any]) -> str:
    """What `run` brought in, for a person."""
    counts = [f"{facts[table]:,} {table}" for table in ("train", "test") if table in facts]
    unit = "nucleotide" if facts["per_nucleotide"] else "sequence"
    others = f"; {amount(facts['others'], 'other sequence')} left out" if facts["others"] else ""
    return f"{facts['width']} numbers a {unit}, {' and '.join(counts)} sequences{others}"


def read_features(name: str, *, paths: Paths) -> dict[str, Any]:
    """The manifest of features by name.

    Raises:
        ConfigError: there are none of that name.
    """
    done = read_manifest(paths.features_manifest(name))
    if done is None:
        there = sorted(
            path.parent.name for path in paths.features_manifest("*").parent.parent.glob("*/*.manifest.json")
        )
        raise ConfigError(
            f"data.features = {name!r}: no features of that name for {paths.comp}; there are "
            f"{', '.join(there) or 'none'}. Next: {how_to_make(paths.features(name, 'train'))}."
        )
    return done


def with_width(config: RunConfig, paths: Paths) -> RunConfig:
    """The settings with the width of the features that ``data.features`` names among the network's arguments.

    Raises:
        ConfigError: there are none of that name, or the settings say another width.
    """
    name = config.data.features
    width = read_features(name, paths=paths)["facts"]["width"] if name else 0
    kwargs = config.model.kwargs | ({_WIDTH: width} if name else {})
    if (given := config.model.kwargs.get(_WIDTH, width)) != width:
        raise ConfigError(
            f"[model] kwargs: {_WIDTH} = {given}; expected {width}, which follows from data.features = {name!r}. Next: "
            "leave it out."
        )
    return replace(config, model=replace(config.model, kwargs=kwargs)) if name else config


# --- what is given ---


def _files(source: Path) -> dict[str, Path]:
    """sequence_id -> file, in the order of the ids."""
    index = source / "index.csv" if source.is_dir() else source
    if not index.is_file():
        found = {path.stem: path for path in source.glob("*.npy")}
    else:
        try:
            with index.open(newline="", encoding="utf-8-sig") as handle:
                rows = list(csv.DictReader(handle))
        except (UnicodeDecodeError, csv.Error) as err:
            raise DataError(f"{index}: no CSV in UTF-8 ({err}). Next: write it again.") from err
        if not rows or any(not row.get("sequence_id") or not row.get("file") for row in rows):
            raise DataError(f"{index}: a row without sequence_id or file; expected both columns. Next: correct it.")
        found = {row["sequence_id"]: index.parent / row["file"] for row in rows}
        if len(found) < len(rows):
            raise DataError(
                f"{index}: {len(rows):,} rows with {len(found):,} ids; expected each once. Next: correct it."
            )
    if not found:
        raise DataError(f"{source}: no .npy file; expected <sequence_id>.npy. Next: FILE=<the folder that holds them>.")
    return dict(sorted(found.items()))


def _digest(files: Mapping[str, Path]) -> str:
    try:
        digests = {name: sha256_file(path) for name, path in files.items()}
    except OSError as err:
        raise DataError(f"{err.filename}: cannot be read: {err.strerror}. Next: see that it is there.") from err
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


def _load(path: Path) -> np.ndarray:
    try:
        x = np.load(path)
        if not isinstance(x, np.ndarray):
            raise ValueError("several arrays in one file")
        return x
    except (OSError, ValueError, EOFError) as err:
        raise DataError(f"{path}: not a readable array ({str(err)[:100]}). Next: write it again.") from err


def _ids_of(source: Path) -> set[str]:
    from pipeline.tables import open_parquet  # brings polars, which loader workers must not import

    with open_parquet(source, ["sequence_id"]) as file:
        ids = read_parquet(source, lambda: file.read(["sequence_id"]))["sequence_id"].to_pylist()
    if len(set(ids)) < len(ids):
        raise DataError(
            f"{source}: {len(ids):,} rows with {len(set(ids)):,} ids; expected each once. Next: correct it."
        )
    return set(ids)


def _read_table(source: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Ids with their vectors, in the file's order; nucleotides with vectors of several widths have none."""
    import pyarrow as pa
    import pyarrow.compute as pc

    from pipeline.tables import open_parquet

    with open_parquet(source) as file:
        names = file.schema_arrow.names
        column = next((name for name in _COLUMNS if name in names), None)
        if column is None:
            raise DataError(
                f"{source}: columns {', '.join(names)}; expected {' or '.join(_COLUMNS)}. Next: make embed."
            )
        kind, lists_in_lists = file.schema_arrow.field(column).type, 0
        while pa.types.is_nested(kind) and hasattr(kind, "value_type"):
            kind, lists_in_lists = kind.value_type, lists_in_lists + 1
        if lists_in_lists != (2 if column == "nucleotides" else 1) or not pa.types.is_primitive(kind):
            raise DataError(
                f"{source}: {column} is of {file.schema_arrow.field(column).type}; expected a list of numbers for each "
                f"{'nucleotide' if column == 'nucleotides' else 'sequence'}. Next: make embed."
            )
        batches = file.iter_batches(batch_size=_ROWS, columns=["sequence_id", column])
        while (batch := read_parquet(source, lambda: next(batches, None))) is not None:
            lists, ends = batch[column], np.arange(batch.num_rows + 1)
            if column == "nucleotides":
                ends = np.concatenate([[0], np.cumsum(pc.list_value_length(lists).fill_null(0).to_numpy())])
                lists = lists.flatten()
            widths = pc.list_value_length(lists).fill_null(0).to_numpy(zero_copy_only=False)
            places, flat = np.concatenate([[0], np.cumsum(widths)]), lists.flatten().to_numpy(zero_copy_only=False)
            for k, name in enumerate(batch["sequence_id"].to_pylist()):
                values, own = flat[places[ends[k]] : places[ends[k + 1]]], widths[ends[k] : ends[k + 1]]
                if column == "nucleotides":
                    same = len(set(own.tolist())) == 1
                    values = values.reshape(len(own), -1) if same else np.empty((len(own), 0))
                yield name, values


# --- what is written ---


class _Rows:
    """Where the sequences of a clean table have their vectors, and the file that gets them."""

    def __init__(self, clean: Path, part: Path, *, sorted_by_id: bool) -> None:
        ids_N, self.lengths_N = ids_and_lengths(clean, sorted_by_id=sorted_by_id)
        self.row_of = {name.decode(): row for row, name in enumerate(ids_N.tolist())}
        self.part = part

    def create(self, shape: tuple[int, ...]) -> None:
        """The array, for vectors of the shape of one sequence's."""
        counts_N = self.lengths_N if len(shape) == 2 else np.ones_like(self.lengths_N)
        starts_N = np.concatenate([[0], np.cumsum(counts_N)])
        array = create_mapped(self.part, np.float16, (starts_N[-1], shape[-1]))
        self._places_N = self.part.stat().st_size - array.nbytes + starts_N * shape[-1] * array.itemsize

    def write(self, row: int, x_LF: np.ndarray) -> None:
        """Not through the map, whose pages would fill the memory."""
        with self.part.open("r+b") as handle:
            handle.seek(int(self._places_N[row]))
            handle.write(x_LF.tobytes())


def _require_all(tables: Mapping[str, _Rows], known: Collection[str], *, source: Path) -> None:
    for table, rows in tables.items():
        missing = [name for name in rows.row_of if name not in known]
        if missing:
            shown = ", ".join(missing[:_SHOWN]) + (", …" if len(missing) > _SHOWN else "")
            raise DataError(
                f"{source}: no embedding of {len(missing):,} of {len(rows.row_of):,} {table} sequences: {shown}; "
                "expected all of the clean tables. Next: add these, too."
            )


def _write(
    tables: Mapping[str, _Rows], given: Iterator[tuple[str, np.ndarray]], *, total: int, source: Path
) -> dict[str, Any]:
    first: tuple[str, tuple[int, ...]] = "", ()
    others = 0
    with Bar("features", total=total, unit="sequences") as bar:
        for name, x in given:
            found = [rows for rows in tables.values() if name in rows.row_of]
            for rows in found:
                row = rows.row_of[name]
                half = in_half(name, x, length=int(rows.lengths_N[row]), like=first, where=str(source))
                if not first[0]:
                    first = name, x.shape
                    for each in tables.values():
                        each.create(x.shape)
                rows.write(row, half)
            others += not found
            bar.advance()
    counts = {table: len(rows.row_of) for table, rows in tables.items()}
    return {"width": first[1][-1], "per_nucleotide": len(first[1]) == 2, "others": others} | counts


def in_half(
    name: str, x: np.ndarray, *, length: int, like: tuple[str, tuple[int, ...]] = ("", ()), where: str
) -> np.ndarray:
    """The vectors of one sequence in half precision.

    Args:
        name: of the sequence.
        x: [L, F] or [F], floating.
        length: of the sequence, nt.
        like: what others are called, and a shape of theirs; "" = there are none yet.
        where: what they came from, for messages.

    Raises:
        DataError: they do not fit the sequence or the others, or one is not finite.
    """
    alike, shape = like
    wanted = (length, *shape[1:]) if len(shape) == 2 else shape
    fits = x.shape == wanted if alike else x.ndim == 1 or (x.ndim == 2 and len(x) == length)
    if not fits or x.shape[-1] < 2 or x.dtype.kind != "f":
        expected = f"{list(wanted)}, as those of {alike!r}" if alike else f"[{length}, F] or [F] with an F of 2 or more"
        raise DataError(
            f"{where}: {name!r}, of {length} letters, has {x.dtype} {list(x.shape)}; expected floating {expected}. "
            "Next: leave out what belongs to no letter, such as marks of begin and end."
        )
    with np.errstate(over="ignore"):
        half = x.astype(np.float16)
    if not np.isfinite(half).all():
        raise DataError(
            f"{where}: {name!r} has {int((~np.isfinite(half)).sum())} values that are not finite in half precision; "
            "expected numbers up to 65,504. Next: write it again, or scale all of them down."
        )
    return half
