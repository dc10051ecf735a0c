"""Clean tables written as memory-mapped arrays, once, whatever process asks first.

Letters: N examples, L length (nt), T all nucleotides of a table in a row, C target or class, K stored pairs.

``arrays/<table>-<key>/`` holds tokens, offsets, ids and, for the train table, targets or labels (classes or numbers of
whole sequences), weights and scored; ``arrays/bpp-<key>/`` the base-pair probabilities of all tables, found by the
sequence. A key is a hash of the input file, so that a changed table never meets arrays of the old one.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import numpy as np

from pipeline.competitions.base import Competition
from pipeline.errors import ConfigError, DataError, StorageError
from pipeline.labels import Classes, Labels
from pipeline.paths import Paths
from pipeline.runlog import warn
from pipeline.schema import ALPHABET, encode
from pipeline.stage import (
    Report,
    fsync,
    is_alive,
    is_disk_full,
    read_manifest,
    require_clean_as_written,
    sha256_file,
    write_json,
)
from pipeline.training.stop import alone_in

_VERSION = 1
_ROWS = 4096  # of a table in memory at a time
Table = Literal["train", "test"]


def build_arrays(competition: Competition, *, paths: Paths, table: Table, labels: Labels | None = None) -> Report:
    """Turn a clean table into ``arrays/<table>-<key>/``, unless it is there; `labels` are those of a labelled set.

    Raises:
        DataError: the table is missing, damaged, or breaks its schema (the row's id is named).
    """
    clean = paths.clean(table)
    if not clean.is_file():
        if carried := _carried(paths, table):
            return carried
        raise DataError(f"{clean}: no clean table. Next: make data COMP={paths.comp}.")
    is_train = table == "train"
    targets = competition.targets if is_train and not labels else ()
    params = {"version": _VERSION, "targets": targets, "signal_to_noise": competition.signal_to_noise or ()}
    params |= {labels.kind: labels.identity()} if labels else {}

    def write(folder: Path) -> dict[str, Any]:
        facts = _write_table(
            clean,
            folder,
            targets=targets,
            signal_to_noise=competition.signal_to_noise,
            alphabet=labels.readable if labels else ALPHABET,
            sorted_by_id=is_train,
        )
        if labels and is_train:
            write_truth = _write_labels if isinstance(labels, Classes) else _write_numbers
            write_truth(clean, folder, count=len(labels.names))
        return facts

    return build_set(paths.arrays_dir, table, source=clean, params=params, write=write)


def build_bpp(paths: Paths) -> Report:
    """Turn the base-pair probabilities into ``arrays/bpp-<key>/``, unless they are there.

    Raises:
        ConfigError: they were not computed.
        DataError: the table is damaged.
    """
    if not paths.bpp.is_file():
        if carried := _carried(paths, "bpp"):
            return carried
        raise ConfigError(
            f"{paths.bpp}: missing, and the model uses base-pair probabilities. Next: make bpp COMP={paths.comp}, or "
            "SET='model.kwargs.use_bpp=false'."
        )

    def write(folder: Path) -> dict[str, Any]:
        return _write_bpp(paths.bpp, folder)

    return build_set(paths.arrays_dir, "bpp", source=paths.bpp, params={"version": _VERSION}, write=write)


def create_mapped(path: Path, dtype: type, shape: tuple[int, ...]) -> np.ndarray:
    """A new ``.npy`` file as a writable memory map. Its blocks are reserved first: a disk that fills up while mapped
    pages are written kills the process (SIGBUS), a failed reservation is an OSError."""
    if 0 in shape:  # nothing to map
        np.save(path, np.empty(shape, dtype=dtype))
        return np.empty(shape, dtype=dtype)
    array = np.lib.format.open_memmap(path, mode="w+", dtype=np.dtype(dtype), shape=tuple(int(n) for n in shape))
    if hasattr(os, "posix_fallocate"):
        with path.open("r+b") as handle:
            os.posix_fallocate(handle.fileno(), 0, path.stat().st_size)
    return array


def create_scratch(path: Path, shape: tuple[int, ...]) -> np.ndarray:
    """A writable map of float32 whose file loses its name at once: it lives as long as the map, whatever ends this
    process."""
    array = create_mapped(path, np.float32, shape)
    path.unlink()
    return array


def _carried(paths: Paths, kind: str) -> Report | None:
    """The only array set of its kind, where its source table is not on this machine; None if there is not one.

    Raises:
        DataError: it is damaged.
    """
    found = [folder for folder in sorted(paths.arrays_dir.glob(f"{kind}-*")) if (folder / "meta.json").is_file()]
    if len(found) != 1:
        return None
    if damaged := _damaged(found[0]):
        raise DataError(f"{found[0] / damaged}: not what was written. Next: copy the folder here again.")
    return Report(stage="arrays", status="current", outputs={"arrays": found[0], "meta": found[0] / "meta.json"})


def build_set(
    home: Path, kind: str, *, source: Path, params: dict[str, Any], write: Callable[[Path], dict[str, Any]]
) -> Report:
    """Write one folder of arrays aside and rename it when complete; older sets of its kind are superseded.

    Args:
        home: of all sets.
        kind: how the folder's name begins; its key follows.
        source: whose sha256 the key holds.
        params: JSON-able, what else the arrays depend on.
        write: takes the folder to fill, returns facts for its ``meta.json``.

    Raises:
        DataError: the source is not what its stage wrote.
        StorageError: the disk is full.
    """
    started = time.monotonic()
    found = sha256_file(source)
    require_clean_as_written(source, found)
    identity = {"kind": kind, "input": found, "params": params}
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    folder = home / f"{kind}-{key}"
    outputs = {"arrays": folder, "meta": folder / "meta.json"}
    if _is_there(folder):
        return Report(stage="arrays", status="current", outputs=outputs)
    part = home / f".part-{kind}-{key}-{os.getpid()}"
    try:
        with alone_in(home, what="writes arrays", name=".building") as is_alone:
            if _is_there(folder):  # by now
                return Report(stage="arrays", status="current", outputs=outputs)
            for left in home.glob(".part-*"):  # by a killed process: as large as the arrays themselves
                if is_alone or left == part or not is_alive(int(left.name.rpartition("-")[2])):
                    shutil.rmtree(left, ignore_errors=True)
            part.mkdir(parents=True)
            facts = write(part)
            for path in part.glob("*.npy"):
                fsync(path)
            files = {path.name: sha256_file(path) for path in part.glob("*.npy")}
            write_json(part / "meta.json", identity | {"facts": facts, "files": files})
            for old in home.glob(f"{kind}-*"):  # whoever has one open keeps its pages
                if old != folder or not (folder / "meta.json").is_file():  # else another one finished first
                    shutil.rmtree(old, ignore_errors=True)
            part.rename(folder)
    except OSError as err:
        if is_disk_full(err):
            raise StorageError(f"{home}: the disk is full. Next: free space and run again.") from err
        if not (folder / "meta.json").is_file():  # else another process built the same set meanwhile
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return Report(stage="arrays", status="built", outputs=outputs, facts=facts, seconds=time.monotonic() - started)


def _is_there(folder: Path) -> bool:
    """Whether a set is complete; one that is not what was written is removed."""
    if not (folder / "meta.json").is_file():
        return False
    if damaged := _damaged(folder):
        warn(f"{folder / damaged}: not what was written; the arrays are made again")
        shutil.rmtree(folder)
    return not damaged


def _damaged(folder: Path) -> str | None:
    """The first file of a set that is not what was written: maps are read without a look at their bytes."""
    meta = read_manifest(folder / "meta.json")
    if meta is None or "input" not in meta or not isinstance(meta.get("files", {}), dict):
        return "meta.json"
    files = meta.get("files", {})  # none where an older version wrote it
    return next((n for n, sha in files.items() if not (folder / n).is_file() or sha256_file(folder / n) != sha), None)


def _write_table(
    clean: Path,
    folder: Path,
    *,
    targets: tuple[str, ...],
    signal_to_noise: tuple[str, ...] | None,
    alphabet: str,
    sorted_by_id: bool,
) -> dict[str, Any]:
    """Stream a clean table into ``tokens, offsets, ids`` and, with targets, ``targets, weights, scored``."""
    ids, lengths = ids_and_lengths(clean, sorted_by_id=sorted_by_id)
    offsets = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int64)
    np.save(folder / "ids.npy", ids)
    np.save(folder / "offsets.npy", offsets)
    tokens_T = create_mapped(folder / "tokens.npy", np.uint8, (offsets[-1],))
    columns = ["sequence_id", "sequence"]
    if targets:
        targets_TC = create_mapped(folder / "targets.npy", np.float32, (offsets[-1], len(targets)))
        weights_NC = np.ones((len(ids), len(targets)), dtype=np.float32)
        scored_N = np.zeros(len(ids), dtype=bool)
        columns += ["scored", *targets, *(signal_to_noise or ()), *_optional(clean, "teaches")]
    row = 0
    for batch in read_batches(clean, columns):
        rows = slice(row, row + batch.num_rows)
        span = slice(offsets[row], offsets[row := rows.stop])
        tokens_T[span] = encode("".join(batch["sequence"].to_pylist()), alphabet)
        if targets:
            scored_N[rows] = batch["scored"].to_numpy(zero_copy_only=False)
            for c, name in enumerate(targets):
                targets_TC[span, c] = flat_values(batch, name, lengths[rows], where=clean)
            for c, name in enumerate(signal_to_noise or ()):
                weights_NC[rows, c] = batch[name].to_numpy(zero_copy_only=False)
            if "teaches" in columns:
                weights_NC[rows][~batch["teaches"].to_numpy(zero_copy_only=False)] = np.nan
    if targets:
        np.save(folder / "weights.npy", weights_NC)
        np.save(folder / "scored.npy", scored_N)
    return {"examples": len(ids), "nucleotides": int(offsets[-1])}


def _write_labels(clean: Path, folder: Path, *, count: int) -> None:
    """``labels`` [N, C], ``weights`` [N, 1] (1, NaN = not labelled) and ``scored``."""
    places, known = [], []
    for batch in read_batches(clean, ["labels"]):
        lists = batch["labels"]
        places.append(lists.flatten().to_numpy())  # without those of null lists
        known.append(np.where(lists.is_valid(), np.diff(lists.offsets.to_numpy()), -1))
    known_N = np.concatenate(known)
    labels_NC = create_mapped(folder / "labels.npy", np.bool_, (len(known_N), count))
    labels_NC[np.repeat(np.arange(len(known_N)), known_N.clip(min=0)), np.concatenate(places)] = True
    np.save(folder / "scored.npy", known_N >= 0)
    np.save(folder / "weights.npy", np.where(known_N >= 0, 1, np.nan).astype(np.float32)[:, None])


def _write_numbers(clean: Path, folder: Path, *, count: int) -> None:
    """``labels`` [N, C] float64 (NaN = not measured), ``weights`` [N, 1] (1, NaN = nothing measured) and ``scored``."""
    parts = []
    for batch in read_batches(clean, ["sequence_id", "numbers"]):
        lengths = np.full(batch.num_rows, count)
        parts.append(flat_values(batch, "numbers", lengths, where=clean, dtype=np.float64).reshape(-1, count))
    number_NC = np.concatenate(parts)
    scored_N = ~np.isnan(number_NC).all(axis=1)
    np.save(folder / "labels.npy", number_NC)
    np.save(folder / "scored.npy", scored_N)
    np.save(folder / "weights.npy", np.where(scored_N, 1, np.nan).astype(np.float32)[:, None])


def _optional(path: Path, name: str) -> list[str]:
    import pyarrow.parquet as pq

    return [name] if name in read_parquet(path, lambda: pq.read_schema(path)).names else []


def ids_and_lengths(clean: Path, *, sorted_by_id: bool) -> tuple[np.ndarray, np.ndarray]:
    """Of a clean table: [N] bytes, and [N] int64, nt.

    Raises:
        DataError: it is missing, damaged or empty, or its ids are not unique, or not sorted where they should be.
    """
    import pyarrow.compute as pc

    ids: list[str] = []
    lengths = []
    for batch in read_batches(clean, ["sequence_id", "sequence"]):
        ids += batch["sequence_id"].to_pylist()
        lengths.append(pc.binary_length(batch["sequence"]).to_numpy())
    if not ids:
        raise DataError(f"{clean}: no rows; expected at least one sequence. Next: make data.")
    ids_N, lengths_N = _as_bytes(ids), np.concatenate(lengths).astype(np.int64)
    if sorted_by_id and not (ids_N[:-1] < ids_N[1:]).all():
        raise DataError(f"{clean}: not sorted by sequence_id, or an id twice. Next: make data.")
    if not sorted_by_id and len(set(ids)) != len(ids):
        raise DataError(f"{clean}: a sequence_id twice. Next: make data.")
    return ids_N, lengths_N


def _as_bytes(ids: Sequence[str]) -> np.ndarray:
    """[N] ids as bytes of one width, which can be mapped."""
    return np.array([name.encode() for name in ids])


def flat_values(
    batch: Any, name: str, lengths: np.ndarray, *, where: Path, dtype: type[np.floating] = np.float32
) -> np.ndarray:
    """Values of a list column in a row, NaN for null lists and null values.

    Raises:
        DataError: a list does not fit its sequence.
    """
    lists = batch[name]
    given = lists.is_valid().to_numpy(zero_copy_only=False)
    got = np.where(given, np.diff(lists.offsets.to_numpy()), lengths)
    if (got != lengths).any():
        row = int(np.flatnonzero(got != lengths)[0])
        raise DataError(
            f"{where}: {name} of {batch['sequence_id'][row].as_py()!r} has {got[row]} values; expected "
            f"{lengths[row]}, one per nucleotide. Next: make data."
        )
    flat = np.full(int(lengths.sum()), np.nan, dtype=dtype)
    flat[np.repeat(given, lengths)] = lists.flatten().to_numpy(zero_copy_only=False)
    return flat


def _write_bpp(source: Path, folder: Path) -> dict[str, Any]:
    import pyarrow.compute as pc

    digests: list[int] = []
    counts = []
    for batch in read_batches(source, ["sequence", "i"]):
        digests += [digest(encode(sequence, f"{ALPHABET}N").tobytes()) for sequence in batch["sequence"].to_pylist()]
        counts.append(pc.list_value_length(batch["i"]).to_numpy())
    if len(set(digests)) != len(digests) or not digests:
        raise DataError(f"{source}: no rows, or a sequence twice. Next: make bpp.")
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(counts))]).astype(np.int64)
    ij_K2 = create_mapped(folder / "ij.npy", np.uint16, (offsets[-1], 2))
    p_K = create_mapped(folder / "p.npy", np.float32, (offsets[-1],))
    row = 0
    for batch in read_batches(source, ["sequence", "i", "j", "p"]):
        span = slice(offsets[row], offsets[row := row + batch.num_rows])
        counts_B = np.diff(offsets[row - batch.num_rows : row + 1])
        lengths = np.repeat(pc.binary_length(batch["sequence"]).to_numpy(), counts_B)
        i_K, j_K = (batch[name].flatten().to_numpy() for name in ("i", "j"))
        if len(j_K) != len(lengths) or (i_K >= j_K).any() or (j_K >= lengths).any():
            raise DataError(f"{source}: a pair that does not satisfy i < j < length. Next: make bpp.")
        ij_K2[span, 0], ij_K2[span, 1], p_K[span] = i_K, j_K, batch["p"].flatten().to_numpy()
    np.save(folder / "digests.npy", np.array(digests, dtype=np.uint64))
    np.save(folder / "offsets.npy", offsets)
    return {"sequences": len(digests), "pairs": int(offsets[-1])}


def digest(tokens: bytes) -> int:
    """64 bits of a sequence's hash: two of 2 million sequences share them with a chance of 1e-7 (and are refused)."""
    return int.from_bytes(hashlib.blake2b(tokens, digest_size=8).digest(), "little")


def read_batches(path: Path, columns: list[str]) -> Iterator[Any]:
    """Record batches of some columns, in the file's order, a few thousand rows in memory at a time.

    Raises:
        DataError: no such column, or the file is damaged.
    """
    import pyarrow.parquet as pq

    # Without pre_buffer=False, pyarrow 26 holds all that it has read of the file until the last batch.
    file = read_parquet(path, lambda: pq.ParquetFile(path, page_checksum_verification=True, pre_buffer=False))
    missing = [name for name in columns if name not in file.schema_arrow.names]
    if missing:
        raise DataError(f"{path}: no column {missing[0]!r}; found {file.schema_arrow.names}. Next: make data.")
    batches = file.iter_batches(batch_size=_ROWS, columns=columns)
    while (batch := read_parquet(path, lambda: next(batches, None))) is not None:
        yield batch


def read_parquet(path: Path, read: Callable[[], Any]) -> Any:
    """What `read` gives; DataError, in the name of a file, where that cannot be read."""
    import pyarrow as pa

    try:
        return read()
    except (pa.ArrowException, OSError) as err:
        raise DataError(
            f"{path}: not a readable parquet file ({str(err).splitlines()[0]}). Next: build it again."
        ) from err
