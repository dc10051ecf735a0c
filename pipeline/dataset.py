"""Clean tables as memory-mapped arrays: written once, opened in milliseconds, shared by every fold.

Letters: N examples, L length (nt), T all nucleotides of a table in a row, C target or class, M sequences with base-pair
probabilities, K stored pairs.

``arrays/<table>-<key>/`` holds tokens, offsets, ids and, for the train table, targets or labels, weights and scored;
``arrays/bpp-<key>/`` the base-pair probabilities of all tables, found by the sequence. A key is a hash of the input
file, so that a changed table never meets arrays of the old one.
"""

import hashlib
import json
import os
import shutil
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np

from pipeline.classes import Classes, read_classes
from pipeline.competitions.base import Competition
from pipeline.errors import ConfigError, DataError, StorageError
from pipeline.paths import Paths
from pipeline.schema import ALPHABET, decode, encode
from pipeline.stage import DISK_FULL, Report, fsync, is_alive, sha256_file, write_json

_VERSION = 1
_ROWS = 4096  # of a table in memory at a time
Table = Literal["train", "test"]


class RnaExample(NamedTuple):
    """One sequence as read-only numpy views; pairs are sparse, ``i < j``, 0-based."""

    id: str
    tokens_L: np.ndarray  # uint8
    target_LC: np.ndarray | None = None  # float32, NaN = not measured, not clipped
    weight_C: np.ndarray | None = None  # float32
    bpp_ij_K2: np.ndarray | None = None  # uint16
    bpp_p_K: np.ndarray | None = None  # float32 in (0, 1]
    label_C: np.ndarray | None = None  # bool, whether the sequence is of each class


def crop(example: RnaExample, *, start: int, length: int) -> RnaExample:
    """The window ``[start, start + length)`` of an example; pairs that leave it are lost.

    >>> crop(RnaExample("a", np.array([0, 1, 2], dtype=np.uint8)), start=1, length=2).tokens_L.tolist()
    [1, 2]
    """
    window = slice(start, start + length)
    changed: dict[str, Any] = {"tokens_L": example.tokens_L[window]}
    if example.target_LC is not None:
        changed["target_LC"] = example.target_LC[window]
    if example.bpp_ij_K2 is not None and example.bpp_p_K is not None:
        inside_K = ((example.bpp_ij_K2 >= start) & (example.bpp_ij_K2 < window.stop)).all(axis=1)
        changed["bpp_ij_K2"] = (example.bpp_ij_K2[inside_K] - start).astype(np.uint16)
        changed["bpp_p_K"] = example.bpp_p_K[inside_K]
    return example._replace(**changed)


class _File(NamedTuple):
    """A memory-mapped array on its way to another process."""

    path: str


class _Mapped:
    """Pickles arrays of mapped files as the files' names: who gets them opens the files, and no byte is copied."""

    def __getstate__(self) -> dict[str, Any]:
        return {name: _file_of(value) for name, value in vars(self).items()}

    def __setstate__(self, state: dict[str, Any]) -> None:
        for name, value in state.items():
            mapped = np.asarray(np.load(value.path, mmap_mode="r")) if isinstance(value, _File) else value
            object.__setattr__(self, name, mapped)


def _file_of(value: Any) -> Any:
    base = value.base if isinstance(value, np.ndarray) else None
    return _File(str(base.filename)) if isinstance(base, np.memmap) and base.size == value.size else value


@dataclass(frozen=True, kw_only=True)
class BppArrays(_Mapped):
    """Sparse base-pair probabilities, one row per example of the set that holds them."""

    key: str
    row_N: np.ndarray  # example -> row of offsets
    offsets: np.ndarray  # int64 [M+1] into the pairs
    ij_K2: np.ndarray  # uint16
    p_K: np.ndarray  # float32


@dataclass(frozen=True, kw_only=True)
class ExampleSet(_Mapped):
    """All examples of one table, on disk until they are asked for."""

    key: str
    tokens_T: np.ndarray  # uint8
    offsets: np.ndarray  # int64 [N+1] into the nucleotides
    ids_N: np.ndarray  # bytes, unique; sorted in the train table
    targets_TC: np.ndarray | None = None  # float32, NaN = not measured
    #: float32: signal_to_noise, or ones; NaN = no such profile, or none to learn; of classes [N, 1] may stand for all
    weights_NC: np.ndarray | None = None
    scored_N: np.ndarray | None = None  # bool: counts in the organisers' metric
    bpp: BppArrays | None = None
    labels_NC: np.ndarray | None = None  # bool
    classes: Classes | None = None  # of a labelled set, for the test table too
    crop: int = 0  # nt; only the middle of each example is seen, as its length too; 0 = all of it

    def __len__(self) -> int:
        return len(self.ids_N)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Nucleotides of each example: [N] int64."""
        whole_N = np.diff(self.offsets)
        return np.minimum(whole_N, self.crop) if self.crop else whole_N

    def example(self, index: int) -> RnaExample:
        """One example; its arrays are views of the files and cannot be written to."""
        start, stop = self.offsets[index], self.offsets[index + 1]
        example = RnaExample(
            self.ids_N[index].decode(),
            self.tokens_T[start:stop],
            None if self.targets_TC is None else self.targets_TC[start:stop],
            None if self.weights_NC is None else self.weights_NC[index],
            label_C=None if self.labels_NC is None else self.labels_NC[index],
        )
        if self.bpp is not None:
            row = self.bpp.row_N[index]
            pairs = slice(self.bpp.offsets[row], self.bpp.offsets[row + 1])
            example = example._replace(bpp_ij_K2=self.bpp.ij_K2[pairs], bpp_p_K=self.bpp.p_K[pairs])
        surplus = stop - start - self.crop
        return crop(example, start=surplus // 2, length=self.crop) if self.crop and surplus > 0 else example


def open_examples(
    competition: Competition,
    *,
    paths: Paths,
    table: Table,
    bpp: bool = False,
    classes: Classes | None = None,
    crop: int = 0,
) -> ExampleSet:
    """Memory-map the arrays of a clean table, and build them first if they are missing or of other data.

    Without the clean table (arrays that were carried to another machine) the one set that is there is used.

    Args:
        competition: names the target columns.
        paths: where the tables and arrays are.
        table: ``train`` (with targets) or ``test``.
        bpp: also open the base-pair probabilities.
        classes: of a labelled set, where they are not on this machine; None = as the data stage found them.
        crop: show the middle of each sequence, so many nt, alone; 0 = all of it.

    Raises:
        DataError: no clean table, or one that does not keep its schema; a sequence without a middle.
        ConfigError: base-pair probabilities are asked for and were not computed, or make no sense.
    """
    if competition.task == "classes":
        classes = classes or read_classes(paths)
        if bpp and not classes.is_nucleic:
            raise ConfigError(
                f"{paths.comp}: base-pair probabilities of proteins; expected RNA or DNA. "
                "Next: SET='model.kwargs.use_bpp=false'."
            )
    folder = build_arrays(competition, paths=paths, table=table, classes=classes).outputs["arrays"]
    truth = ("labels" if classes else "targets", "weights", "scored") if table == "train" else ()
    names = ("tokens", "offsets", "ids", *truth)
    arrays = _open_arrays(folder, names)
    examples = ExampleSet(
        key=folder.name,
        tokens_T=arrays["tokens"],
        offsets=arrays["offsets"],
        ids_N=arrays["ids"],
        targets_TC=arrays.get("targets"),
        weights_NC=arrays.get("weights"),
        scored_N=arrays.get("scored"),
        bpp=_open_bpp(arrays["tokens"], arrays["offsets"], paths=paths) if bpp else None,
        labels_NC=arrays.get("labels"),
        classes=classes,
        crop=crop,
    )
    if crop:
        _require_middle(examples, where=paths.clean(table))
    return examples


def _require_middle(examples: ExampleSet, *, where: Path) -> None:
    whole_N = np.diff(examples.offsets)
    even = np.flatnonzero((whole_N > examples.crop) & (whole_N % 2 == 0))
    if even.size:
        name, length = examples.ids_N[even[0]].decode(), whole_N[even[0]]
        raise DataError(
            f"{where}: {name!r} has {length} letters, none of them in the middle; expected windows of odd length for "
            "data.crop. Next: leave data.crop out."
        )


def dense_bpp(example: RnaExample) -> np.ndarray | None:
    """Base-pair probabilities of one example: [L, L] float32, symmetric; None if it has none."""
    if example.bpp_ij_K2 is None:
        return None
    bpp_LL = np.zeros((len(example.tokens_L), len(example.tokens_L)), dtype=np.float32)
    i_K, j_K = example.bpp_ij_K2[:, 0], example.bpp_ij_K2[:, 1]
    bpp_LL[i_K, j_K] = bpp_LL[j_K, i_K] = example.bpp_p_K
    return bpp_LL


def read_folds(path: Path, *, examples: ExampleSet) -> np.ndarray:
    """Fold number of every example: [N] uint8.

    Raises:
        DataError: there is no such fold table, or it was made from other data.
    """
    import pyarrow.parquet as pq

    hint = require_fold_table(path)
    folds = _read_parquet(path, lambda: pq.read_table(path, columns=["sequence_id", "fold"]))
    ids = _as_bytes(folds["sequence_id"].to_pylist())
    order = np.argsort(ids)
    if not np.array_equal(ids[order], examples.ids_N):
        ours, theirs = set(examples.ids_N.tolist()), set(ids.tolist())
        other = sorted((ours ^ theirs) or theirs)[0].decode()
        raise DataError(
            f"{path}: fold table from other data: {len(theirs - ours)} of its {len(ids)} rows are not in the clean "
            f"train table and {len(ours - theirs)} of {len(ours)} clean rows have no fold (such as {other!r}); "
            f"expected the same sequence_id once each. Next: {hint}."
        )
    return folds["fold"].to_numpy().astype(np.uint8)[order]


def require_fold_table(path: Path) -> str:
    """DataError where there is no such fold table; otherwise the command that makes it."""
    hint = f"make folds COMP={path.parents[1].name} SPLIT={path.stem}"
    if not path.is_file():
        raise DataError(f"{path}: no fold table. Next: {hint}.")
    return hint


def fold_members(fold_N: np.ndarray, fold: int, *, where: str) -> np.ndarray:
    """True for the examples that `fold` holds out: [N] bool.

    Raises:
        ConfigError: the split has no such fold, or no other one to train on.
    """
    known = np.unique(fold_N).tolist()
    if fold not in known or len(known) < 2:
        raise ConfigError(f"FOLD={fold}: the folds of {where} are {known}. Next: choose one of at least two.")
    return fold_N == fold


def build_arrays(competition: Competition, *, paths: Paths, table: Table, classes: Classes | None = None) -> Report:
    """Turn a clean table into ``arrays/<table>-<key>/``, unless it is there; `classes` are those of a labelled set.

    Raises:
        DataError: the table is missing, damaged, or breaks its schema (the row's id is named).
    """
    clean = paths.clean(table)
    if not clean.is_file():
        return _carried(paths, table, missing=f"{clean}: no clean table. Next: make data COMP={paths.comp}.")
    is_train = table == "train"
    targets = competition.targets if is_train else ()
    params = {"version": _VERSION, "targets": targets, "signal_to_noise": competition.signal_to_noise or ()}
    params |= {"classes": classes.facts()} if classes else {}

    def write(folder: Path) -> dict[str, Any]:
        facts = _write_table(
            clean,
            folder,
            targets=targets,
            signal_to_noise=competition.signal_to_noise,
            alphabet=classes.alphabet if classes else ALPHABET,
            sorted_by_id=is_train,
        )
        if classes and is_train:
            _write_labels(clean, folder, count=len(classes.names))
        return facts

    return _build_set(paths.arrays_dir, table, source=clean, params=params, write=write)


def _open_arrays(folder: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Name -> memory map.

    Raises:
        DataError: a file is missing, cut short or no array.
    """
    try:
        return {name: np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in names}
    except (OSError, ValueError, EOFError) as err:
        raise DataError(
            f"{folder}: an array is damaged ({' '.join(str(err).split())[:120]}). "
            "Next: remove this folder; it is built again from its table."
        ) from err


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


def _carried(paths: Paths, kind: str, *, missing: str) -> Report:
    """The only array set of its kind, where its source table is not on this machine."""
    found = [folder for folder in sorted(paths.arrays_dir.glob(f"{kind}-*")) if (folder / "meta.json").is_file()]
    if len(found) != 1:
        raise DataError(missing)
    return Report(stage="arrays", status="current", outputs={"arrays": found[0], "meta": found[0] / "meta.json"})


def _build_set(
    home: Path, kind: str, *, source: Path, params: dict[str, Any], write: Callable[[Path], dict[str, Any]]
) -> Report:
    """Write one folder of arrays aside and rename it when complete; older sets of its kind are superseded."""
    started = time.monotonic()
    identity = {"kind": kind, "input": sha256_file(source), "params": params}
    key = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:16]
    folder = home / f"{kind}-{key}"
    outputs = {"arrays": folder, "meta": folder / "meta.json"}
    if (folder / "meta.json").is_file():
        return Report(stage="arrays", status="current", outputs=outputs)
    part = home / f".part-{kind}-{key}-{os.getpid()}"
    for left in home.glob(".part-*"):  # by a killed process: as large as the arrays themselves
        if left == part or not is_alive(int(left.name.rpartition("-")[2])):
            shutil.rmtree(left, ignore_errors=True)
    try:
        part.mkdir(parents=True)
        facts = write(part)
        for path in part.glob("*.npy"):
            fsync(path)
        write_json(part / "meta.json", identity | {"facts": facts})
        for old in home.glob(f"{kind}-*"):  # whoever has one open keeps its pages
            if old != folder or not (folder / "meta.json").is_file():  # else it is another process's, finished first
                shutil.rmtree(old, ignore_errors=True)
        part.rename(folder)
    except OSError as err:
        if err.errno in DISK_FULL:
            raise StorageError(f"{home}: the disk is full. Next: free space and run again.") from err
        if not (folder / "meta.json").is_file():  # else another process built the same set meanwhile
            raise
    finally:
        shutil.rmtree(part, ignore_errors=True)
    return Report(stage="arrays", status="built", outputs=outputs, facts=facts, seconds=time.monotonic() - started)


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
    ids, lengths = _ids_and_lengths(clean, sorted_by_id=sorted_by_id)
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
    for batch in _batches(clean, columns):
        rows = slice(row, row + batch.num_rows)
        span = slice(offsets[row], offsets[row := rows.stop])
        tokens_T[span] = encode("".join(batch["sequence"].to_pylist()), alphabet)
        if targets:
            scored_N[rows] = batch["scored"].to_numpy(zero_copy_only=False)
            for c, name in enumerate(targets):
                targets_TC[span, c] = _flat_values(batch, name, lengths[rows], where=clean)
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
    for batch in _batches(clean, ["labels"]):
        lists = batch["labels"]
        places.append(lists.flatten().to_numpy())  # without those of null lists
        known.append(np.where(lists.is_valid(), np.diff(lists.offsets.to_numpy()), -1))
    known_N = np.concatenate(known)
    labels_NC = create_mapped(folder / "labels.npy", np.bool_, (len(known_N), count))
    labels_NC[np.repeat(np.arange(len(known_N)), known_N.clip(min=0)), np.concatenate(places)] = True
    np.save(folder / "scored.npy", known_N >= 0)
    np.save(folder / "weights.npy", np.where(known_N >= 0, 1, np.nan).astype(np.float32)[:, None])


def _optional(path: Path, name: str) -> list[str]:
    import pyarrow.parquet as pq

    return [name] if name in _read_parquet(path, lambda: pq.read_schema(path)).names else []


def _ids_and_lengths(clean: Path, *, sorted_by_id: bool) -> tuple[np.ndarray, np.ndarray]:
    import pyarrow.compute as pc

    ids: list[str] = []
    lengths = []
    for batch in _batches(clean, ["sequence_id", "sequence"]):
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
    return np.array([name.encode() for name in ids])


def _flat_values(batch: Any, name: str, lengths: np.ndarray, *, where: Path) -> np.ndarray:
    """Values of a list column in a row, NaN for null lists and null values; lists must fit their sequences."""
    lists = batch[name]
    given = lists.is_valid().to_numpy(zero_copy_only=False)
    got = np.where(given, np.diff(lists.offsets.to_numpy()), lengths)
    if (got != lengths).any():
        row = int(np.flatnonzero(got != lengths)[0])
        raise DataError(
            f"{where}: {name} of {batch['sequence_id'][row].as_py()!r} has {got[row]} values; expected "
            f"{lengths[row]}, one per nucleotide. Next: make data."
        )
    flat = np.full(int(lengths.sum()), np.nan, dtype=np.float32)
    flat[np.repeat(given, lengths)] = lists.flatten().to_numpy(zero_copy_only=False)
    return flat


def _open_bpp(tokens_T: np.ndarray, offsets: np.ndarray, *, paths: Paths) -> BppArrays:
    """Base-pair probabilities for every sequence of a table."""
    folder = _build_bpp(paths).outputs["arrays"]
    digests_M, starts, ij_K2, p_K = _open_arrays(folder, ("digests", "offsets", "ij", "p")).values()
    pairs = zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
    wanted_N = np.fromiter((_digest(tokens_T[i:j].tobytes()) for i, j in pairs), np.uint64, len(offsets) - 1)
    order = np.argsort(digests_M)
    row_N = order[np.searchsorted(digests_M, wanted_N, sorter=order).clip(max=len(order) - 1)]
    missing = np.flatnonzero(digests_M[row_N] != wanted_N)
    if missing.size:
        first = decode(tokens_T[offsets[missing[0]] : offsets[missing[0] + 1]], f"{ALPHABET}N")
        raise DataError(
            f"{paths.bpp}: no base-pair probabilities for {missing.size} of {len(wanted_N)} sequences (such as "
            f"{first[:20]}…); expected all. Next: make bpp COMP={paths.comp}."
        )
    return BppArrays(key=folder.name, row_N=row_N, offsets=starts, ij_K2=ij_K2, p_K=p_K)


def _build_bpp(paths: Paths) -> Report:
    if not paths.bpp.is_file():
        try:
            return _carried(paths, "bpp", missing="")
        except DataError:
            raise ConfigError(
                f"{paths.bpp}: missing, and the model uses base-pair probabilities. Next: make bpp COMP={paths.comp}, "
                "or SET='model.kwargs.use_bpp=false'."
            ) from None

    def write(folder: Path) -> dict[str, Any]:
        return _write_bpp(paths.bpp, folder)

    return _build_set(paths.arrays_dir, "bpp", source=paths.bpp, params={"version": _VERSION}, write=write)


def _write_bpp(source: Path, folder: Path) -> dict[str, Any]:
    import pyarrow.compute as pc

    digests: list[int] = []
    counts = []
    for batch in _batches(source, ["sequence", "i"]):
        digests += [_digest(encode(sequence, f"{ALPHABET}N").tobytes()) for sequence in batch["sequence"].to_pylist()]
        counts.append(pc.list_value_length(batch["i"]).to_numpy())
    if len(set(digests)) != len(digests) or not digests:
        raise DataError(f"{source}: no rows, or a sequence twice. Next: make bpp.")
    offsets = np.concatenate([[0], np.cumsum(np.concatenate(counts))]).astype(np.int64)
    ij_K2 = create_mapped(folder / "ij.npy", np.uint16, (offsets[-1], 2))
    p_K = create_mapped(folder / "p.npy", np.float32, (offsets[-1],))
    row = 0
    for batch in _batches(source, ["sequence", "i", "j", "p"]):
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


def _digest(tokens: bytes) -> int:
    """64 bits of a sequence's hash: two of 2 million sequences share them with a chance of 1e-7 (and are refused)."""
    return int.from_bytes(hashlib.blake2b(tokens, digest_size=8).digest(), "little")


def _batches(path: Path, columns: list[str]) -> Iterator[Any]:
    """Record batches of some columns, in the file's order, a few thousand rows in memory at a time."""
    import pyarrow.parquet as pq

    file = _read_parquet(path, lambda: pq.ParquetFile(path, page_checksum_verification=True))
    missing = [name for name in columns if name not in file.schema_arrow.names]
    if missing:
        raise DataError(f"{path}: no column {missing[0]!r}; found {file.schema_arrow.names}. Next: make data.")
    batches = file.iter_batches(batch_size=_ROWS, columns=columns)
    while (batch := _read_parquet(path, lambda: next(batches, None))) is not None:
        yield batch


def _read_parquet(path: Path, read: Callable[[], Any]) -> Any:
    import pyarrow as pa

    try:
        return read()
    except (pa.ArrowException, OSError) as err:
        raise DataError(
            f"{path}: not a readable parquet file ({str(err).splitlines()[0]}). Next: build it again."
        ) from err
