"""Clean tables as memory-mapped arrays: opened in milliseconds, shared by every fold.

Letters: N examples, L length (nt), T all nucleotides of a table in a row, C target or class, M sequences with base-pair
probabilities, K stored pairs, F feature.

`pipeline.arrays` writes what is opened here, where it is missing.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline.arrays import Table, build_arrays, build_bpp, digest, read_parquet
from pipeline.competitions.base import Competition
from pipeline.errors import ConfigError, DataError
from pipeline.features import read_features
from pipeline.labels import Labels, read_labels
from pipeline.paths import Paths, how_to_make
from pipeline.schema import ALPHABET, decode, folds_of_other_data
from pipeline.stage import require_as_written, sha256_file


class RnaExample(NamedTuple):
    """One sequence as read-only numpy views; pairs are sparse, ``i < j``, 0-based."""

    id: str
    tokens_L: np.ndarray  # uint8
    target_LC: np.ndarray | None = None  # float32, NaN = not measured, not clipped
    weight_C: np.ndarray | None = None  # float32
    bpp_ij_K2: np.ndarray | None = None  # uint16
    bpp_p_K: np.ndarray | None = None  # float32 in (0, 1]
    #: bool, whether the sequence is of each class; float32 = how probably; numbers float64, NaN = not measured
    label_C: np.ndarray | None = None
    features_LF: np.ndarray | None = None  # float16


def crop(example: RnaExample, *, start: int, length: int) -> RnaExample:
    """The window ``[start, start + length)`` of an example; pairs that leave it are lost.

    >>> crop(RnaExample("a", np.array([0, 1, 2], dtype=np.uint8)), start=1, length=2).tokens_L.tolist()
    [1, 2]
    """
    window = slice(start, start + length)
    changed: dict[str, Any] = {"tokens_L": example.tokens_L[window]}
    if example.target_LC is not None:
        changed["target_LC"] = example.target_LC[window]
    if example.features_LF is not None:
        changed["features_LF"] = example.features_LF[window]
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
    row_N: np.ndarray  # example -> row of offsets; -1 = it has none
    offsets: np.ndarray  # int64 [M+1] into the pairs
    ij_K2: np.ndarray  # uint16
    p_K: np.ndarray  # float32


@dataclass(frozen=True, kw_only=True)
class Features(_Mapped):
    """What another network says of every nucleotide, or of every sequence as a whole; see `pipeline.features`."""

    name: str
    key: str  # sha256 of the array
    values: np.ndarray  # float16, [T, F] or [N, F]
    per_nucleotide: bool


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
    features: Features | None = None
    labels_NC: np.ndarray | None = None  # bool; of numbers float64, of pseudo-labels float32
    labels: Labels | None = None  # what they are, of a labelled set, for the test table too
    crop: int = 0  # nt; only the middle of each example is seen, as its length too; 0 = all of it
    more: "ExampleSet | None" = None  # whose positions follow those of this set

    def __len__(self) -> int:
        return len(self.ids_N) + (len(self.more) if self.more is not None else 0)

    @cached_property
    def lengths(self) -> np.ndarray:
        """Nucleotides of each example: [N] int64."""
        whole_N = np.diff(self.offsets)
        own_N = np.minimum(whole_N, self.crop) if self.crop else whole_N
        return own_N if self.more is None else np.concatenate([own_N, self.more.lengths])

    def example(self, index: int) -> RnaExample:
        """One example; its arrays are views of the files and cannot be written to."""
        if self.more is not None and index >= len(self.ids_N):
            return self.more.example(index - len(self.ids_N))
        start, stop = self.offsets[index], self.offsets[index + 1]
        example = RnaExample(
            self.ids_N[index].decode(),
            self.tokens_T[start:stop],
            None if self.targets_TC is None else self.targets_TC[start:stop],
            None if self.weights_NC is None else self.weights_NC[index],
            label_C=None if self.labels_NC is None else self.labels_NC[index],
        )
        if self.bpp is not None and (row := self.bpp.row_N[index]) >= 0:
            pairs = slice(self.bpp.offsets[row], self.bpp.offsets[row + 1])
            example = example._replace(bpp_ij_K2=self.bpp.ij_K2[pairs], bpp_p_K=self.bpp.p_K[pairs])
        if self.features is not None:
            own = self.features.values[start:stop] if self.features.per_nucleotide else self.features.values[index]
            example = example._replace(features_LF=np.broadcast_to(own, (stop - start, own.shape[-1])))
        surplus = stop - start - self.crop
        return crop(example, start=surplus // 2, length=self.crop) if self.crop and surplus > 0 else example


def open_examples(
    competition: Competition,
    *,
    paths: Paths,
    table: Table,
    bpp: bool = False,
    partial: bool = False,
    features: str = "",
    labels: Labels | None = None,
    crop: int = 0,
) -> ExampleSet:
    """Memory-map the arrays of a clean table, and build them first if they are missing or of other data.

    Without the clean table (arrays that were carried to another machine) the one set that is there is used.

    Args:
        competition: names the target columns.
        paths: where the tables and arrays are.
        table: ``train`` (with targets) or ``test``.
        bpp: also open the base-pair probabilities.
        partial: whether some sequences may have none of these.
        features: also open those of that name; "" = none.
        labels: of a labelled set, where they are not on this machine; None = as the data stage found them.
        crop: show the middle of each sequence, so many nt, alone; 0 = all of it.

    Raises:
        DataError: no clean table, or one that does not keep its schema; a sequence without a middle; features of other
            data.
        ConfigError: base-pair probabilities are asked for and were not computed, or make no sense; no such features.
    """
    if competition.has_labels:
        labels = labels or read_labels(paths)
        if bpp and not labels.is_nucleic:
            raise ConfigError(
                f"{paths.comp}: base-pair probabilities of proteins; expected RNA or DNA. "
                "Next: SET='model.kwargs.use_bpp=false'."
            )
    folder = build_arrays(competition, paths=paths, table=table, labels=labels).outputs["arrays"]
    truth = ("labels" if labels else "targets", "weights", "scored") if table == "train" else ()
    names = ("tokens", "offsets", "ids", *truth)
    arrays = open_arrays(folder, names)
    examples = ExampleSet(
        key=folder.name,
        tokens_T=arrays["tokens"],
        offsets=arrays["offsets"],
        ids_N=arrays["ids"],
        targets_TC=arrays.get("targets"),
        weights_NC=arrays.get("weights"),
        scored_N=arrays.get("scored"),
        bpp=_open_bpp(arrays["tokens"], arrays["offsets"], paths=paths, partial=partial) if bpp else None,
        features=_open_features(features, folder, paths=paths, table=table) if features else None,
        labels_NC=arrays.get("labels"),
        labels=labels,
        crop=crop,
    )
    if crop and table == "train":  # a hidden test sequence is predicted from what is nearest to its middle
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

    Not by `pipeline.tables`, which brings polars: neither a loader's workers nor a borrowed machine with a GPU have it.

    Raises:
        DataError: there is no such fold table, it was made from other data, or is not what `make folds` wrote.
    """
    import pyarrow.parquet as pq

    require_fold_table(path)
    require_as_written(path, sha256_file(path), manifest=path.with_suffix(".manifest.json"), label="folds")
    folds = read_parquet(path, lambda: pq.read_table(path, columns=["sequence_id", "fold"])).sort_by("sequence_id")
    found, ids = folds["sequence_id"].to_pylist(), [name.decode() for name in examples.ids_N.tolist()]
    if found != ids:
        raise folds_of_other_data(path, found, ids)
    return folds["fold"].to_numpy().astype(np.uint8)


def require_fold_table(path: Path) -> None:
    """DataError where there is no such fold table."""
    if not path.is_file():
        raise DataError(f"{path}: no fold table. Next: {how_to_make(path)}.")


def fold_members(fold_N: np.ndarray, fold: int, *, where: str) -> np.ndarray:
    """True for the examples that `fold` holds out: [N] bool.

    Raises:
        ConfigError: the split has no such fold, or no other one to train on.
    """
    known = np.unique(fold_N).tolist()
    if fold not in known or len(known) < 2:
        raise ConfigError(f"FOLD={fold}: the folds of {where} are {known}. Next: choose one of at least two.")
    return fold_N == fold


def open_arrays(folder: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Name -> memory map.

    Args:
        folder: of the files.
        names: of the files, without their ending.

    Raises:
        DataError: a file is missing, cut short or no array.
    """
    try:
        return {name: np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r")) for name in names}
    except (OSError, ValueError, EOFError) as err:
        told = " ".join(str(err).split())[:120]
        cure = "remove this folder; it is built again from its table"
        raise DataError(f"{folder}: an array is damaged ({told}). Next: {cure}.") from err


def _open_features(name: str, folder: Path, *, paths: Paths, table: Table) -> Features:
    """Features for every sequence of a table, whose arrays are in a folder."""
    done, path = read_features(name, paths=paths), paths.features(name, table)
    is_of = json.loads((folder / "meta.json").read_text())["input"]
    if done["inputs"].get(table) != is_of:
        raise DataError(
            f"{path}: features {name!r} are of another {table} table than {paths.clean(table)}; expected this one's. "
            f"Next: {how_to_make(path)}."
        )
    if not path.is_file():
        raise DataError(f"{path}: missing. Next: {how_to_make(path)}.")
    require_as_written(path, sha256_file(path), manifest=paths.features_manifest(name), label=table)
    values = open_arrays(path.parent, [table])[table]
    return Features(
        name=name, key=done["outputs"][table], values=values, per_nucleotide=done["facts"]["per_nucleotide"]
    )


def _open_bpp(tokens_T: np.ndarray, offsets: np.ndarray, *, paths: Paths, partial: bool) -> BppArrays:
    """Base-pair probabilities for every sequence of a table, or for those that have some."""
    folder = build_bpp(paths).outputs["arrays"]
    digests_M, starts, ij_K2, p_K = open_arrays(folder, ("digests", "offsets", "ij", "p")).values()
    pairs = zip(offsets[:-1].tolist(), offsets[1:].tolist(), strict=True)
    wanted_N = np.fromiter((digest(tokens_T[i:j].tobytes()) for i, j in pairs), np.uint64, len(offsets) - 1)
    order = np.argsort(digests_M)
    row_N = order[np.searchsorted(digests_M, wanted_N, sorter=order).clip(max=len(order) - 1)]
    missing = np.flatnonzero(digests_M[row_N] != wanted_N)
    if partial:
        row_N = np.where(digests_M[row_N] == wanted_N, row_N, -1)
    elif missing.size:
        first = decode(tokens_T[offsets[missing[0]] : offsets[missing[0] + 1]], f"{ALPHABET}N")
        raise DataError(
            f"{paths.bpp}: no base-pair probabilities for {missing.size} of {len(wanted_N)} sequences (such as "
            f"{first[:20]}…); expected all. Next: make bpp COMP={paths.comp}."
        )
    return BppArrays(key=folder.name, row_N=row_N, offsets=starts, ij_K2=ij_K2, p_K=p_K)
