"""Pseudo-labels: what networks predicted for the test set, as further training examples of the fold that they held out.

One rule keeps scores out of fold: a fold learns from its own networks' predictions alone. Those of any other fold have
learned from what this one validates on, and so has whatever began with such a network or learned from its predictions.
Each table is therefore traced to the checkpoint that wrote it, and that one to all that it has learned from.

Letters: N sequences, T nucleotides (or classes) of all sequences in a row, C target or class.
"""

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from pipeline.arrays import build_set, create_mapped, flat_values, read_batches
from pipeline.competitions.base import Competition
from pipeline.config import DataConfig
from pipeline.dataset import ExampleSet, open_arrays, open_examples
from pipeline.errors import ConfigError, DataError
from pipeline.paths import Paths
from pipeline.stage import read_manifest, sha256_file
from pipeline.training.checkpoint import DamagedError, read_meta
from pipeline.training.initial import has_seen, trained_on

_VERSION = 1
_ROWS = 4096  # of a set in memory at a time
_NOWHERE = 2**40  # nt


class Teachers(NamedTuple):
    """Predictions of the test set that a fold may learn from."""

    files: dict[str, Path]  # run -> its table
    facts: dict[str, Any]  # JSON-able: "runs", run -> sha256 of the table, and "trained_on", all that was learned from


def find_teachers(meta: Mapping[str, Any], data: DataConfig, *, paths: Paths) -> Teachers:
    """The tables that ``data.pseudo`` names, for one fold.

    Args:
        meta: of the run that is to learn: ``competition, split, fold`` and the digests in ``data``.
        data: names the runs.
        paths: where they are.

    Raises:
        ConfigError: a network behind one has learned from what this fold holds out, or a run is named twice.
        DataError: a table is missing, or no checkpoint beside it wrote it.
    """
    runs = data.pseudo.replace(",", " ").split()
    if len(set(runs)) < len(runs):
        raise ConfigError(f"[data] pseudo = {data.pseudo!r}: a run twice; expected each once. Next: leave one out.")
    teachers = Teachers({run: paths.test(run, meta["fold"]) for run in runs}, {"runs": {}, "trained_on": []})
    for run, path in teachers.files.items():
        teachers.facts["runs"][run], source = _source(path, paths)
        for each in has_seen(source):
            if each["competition"] == meta["competition"] and each != trained_on(meta):
                raise ConfigError(
                    f"[data] pseudo: what {run} predicts comes from all but fold {each['fold']} of {each['split']!r} "
                    "(its own training, initial weights or pseudo-labels), and so from sequences that fold "
                    f"{meta['fold']} of {meta['split']!r} validates on; expected the same fold of the same fold table. "
                    "Next: leave it out."
                )
            if each not in teachers.facts["trained_on"]:
                teachers.facts["trained_on"].append(each)
    return teachers


def _source(path: Path, paths: Paths) -> tuple[str, dict[str, Any]]:
    """Digest of a table of predictions, and the meta data of the checkpoint that wrote it."""
    run, fold = path.parent.parent.name, path.parent.name
    if not path.is_file():
        there = sorted(found.parents[1].name for found in paths.home.glob(f"runs/*/{fold}/{path.name}"))
        raise DataError(
            f"{path}: no predictions of {run!r} to learn from; runs that have some for {fold}: "
            f"{', '.join(there) or 'none'}. Next: train that run first (train-all predicts too), or name another."
        )
    digest, told = sha256_file(path), read_manifest(path.with_name("predict-test.manifest.json")) or {}
    if told.get("outputs") == {"test": digest}:
        for meta in path.parent.glob("checkpoints/step-*/meta.json"):
            if told["inputs"].get("checkpoint") == sha256_file(meta):
                with contextlib.suppress(DamagedError):
                    return digest, read_meta(meta.parent)
    raise DataError(
        f"{path}: not written by a whole checkpoint in {path.parent / 'checkpoints'}, so what its network has seen is "
        "not known; expected a network's own predictions. Next: predict with that run again, or name another."
    )


def with_pseudo_labels(
    measured: ExampleSet,
    train: np.ndarray,
    teachers: Teachers,
    *,
    data: DataConfig,
    competition: Competition,
    paths: Paths,
) -> tuple[ExampleSet, np.ndarray]:
    """Add the test set to what trains, the mean of the teachers' predictions being its truth.

    Values teach where training sequences were measured, seen from both ends: nowhere nearer to one than any of them (in
    OpenVaccine all but the last 39 nt, the first 68 of 107 and 91 of 130). Classes teach as probabilities, numbers as
    they are; sequences with letters that no training sequence has do not teach.

    Args:
        measured: the training set, with the loss's weights.
        train: its positions that train.
        teachers: see `find_teachers`.
        data: its ``pseudo_weight`` of the mean weight of a training profile is what each sequence weighs.
        competition: what is predicted.
        paths: where test set and arrays are.

    Returns:
        Both sets as one, in which no position of the first changes, and the positions that train.

    Raises:
        DataError: there is no test set, or the predictions are of another one.
    """
    options: dict[str, Any] = {"bpp": measured.bpp is not None, "labels": measured.labels, "crop": data.crop}
    options["features"] = data.features
    test = open_examples(competition, paths=paths, table="test", **options)
    members = hashlib.sha256(np.ascontiguousarray(train, dtype=np.int64).tobytes()).hexdigest()
    params = {"version": _VERSION, "runs": teachers.facts["runs"], "train": [measured.key, members]}
    named = " ".join([*map(str, teachers.files.values()), measured.key, members])  # what other predictions supersede
    kind = f"pseudo-{hashlib.sha256(named.encode()).hexdigest()[:8]}"

    def write(folder: Path) -> dict[str, Any]:
        if test.labels:
            return _write_labels(folder, test, teachers)
        return _write_values(
            folder, test, teachers, targets=competition.targets, nearest_2C=measured_ends(measured, train)
        )

    source = paths.arrays_dir / test.key / "meta.json"
    folder = build_set(paths.arrays_dir, kind, source=source, params=params, write=write).outputs["arrays"]
    assert measured.weights_NC is not None
    mean_C = np.ma.masked_equal(measured.weights_NC[train], 0).mean(axis=0, dtype=np.float64).filled(0)
    weights_NC = np.tile((data.pseudo_weight * mean_C).astype(np.float32), (len(test), 1))
    teaches_N, truth = open_arrays(folder, ["teaches", "labels" if test.labels else "targets"]).values()
    taught: dict[str, Any] = {"labels_NC" if test.labels else "targets_TC": truth}
    more = replace(test, weights_NC=weights_NC, **taught)
    return replace(measured, more=more), np.concatenate([train, len(measured) + np.flatnonzero(teaches_N)])


def _write_values(
    folder: Path, test: ExampleSet, teachers: Teachers, *, targets: tuple[str, ...], nearest_2C: np.ndarray
) -> dict[str, Any]:
    """``targets`` [T, C], NaN where nothing teaches, and ``teaches`` [N]."""
    targets_TC = create_mapped(folder / "targets.npy", np.float32, (len(test.tokens_T), len(targets)))
    _write_mean(targets_TC, test.offsets, test, teachers, names=targets)
    for rows, places_2T in _places(test.offsets):
        targets_TC[rows][(places_2T[..., None] < nearest_2C[:, None]).any(axis=0)] = np.nan
    np.save(folder / "teaches.npy", np.diff(test.offsets) > nearest_2C.sum(axis=0).min())
    return {"nearest": nearest_2C.tolist()}


def _write_labels(folder: Path, test: ExampleSet, teachers: Teachers) -> dict[str, Any]:
    """``labels`` [N, C], probabilities or numbers, and ``teaches`` [N]."""
    assert test.labels is not None
    count = len(test.labels.names)
    labels_NC = create_mapped(folder / "labels.npy", np.float32, (len(test), count))
    _write_mean(labels_NC.reshape(-1, 1), np.arange(len(test) + 1) * count, test, teachers, names=(test.labels.column,))
    highest_N = np.maximum.reduceat(test.tokens_T, test.offsets[:-1])
    np.save(folder / "teaches.npy", highest_N < len(test.labels.alphabet))
    return {test.labels.kind: count}


def _write_mean(
    values_TC: np.ndarray, offsets: np.ndarray, test: ExampleSet, teachers: Teachers, *, names: tuple[str, ...]
) -> None:
    """Fill in the mean of all tables; `offsets` are those of the test sequences in `values_TC`, which holds zeros."""
    order, lengths_N = np.argsort(test.ids_N), np.diff(offsets)  # tables are sorted by id, test sets need not be
    for path in teachers.files.values():
        row = 0
        for batch in read_batches(path, ["sequence_id", *names]):
            rows = order[row : row + batch.num_rows]
            row += batch.num_rows
            if [name.encode() for name in batch["sequence_id"].to_pylist()] != test.ids_N[rows].tolist():
                row = -1
                break
            lengths = lengths_N[rows]
            before = np.cumsum(lengths) - lengths
            places = np.repeat(offsets[rows] - before, lengths) + np.arange(lengths.sum())
            for c, name in enumerate(names):
                values_TC[places, c] += flat_values(batch, name, lengths, where=path)
        if row != len(test):
            raise DataError(
                f"{path}: predictions of other sequences than the {len(test)} of the test set. Next: predict with that "
                "run again, or name another."
            )
    values_TC /= len(teachers.files)


def measured_ends(examples: ExampleSet, members: np.ndarray) -> np.ndarray:
    """Fewest nucleotides that lie between the 5' (and the 3') end and a measured position of some examples.

    Args:
        examples: with targets.
        members: positions of those that count.

    Returns:
        [2, C] int64; of a target that none of them has, more than any sequence is long.
    """
    assert examples.targets_TC is not None
    is_member_N = np.isin(np.arange(len(examples)), members)
    nearest_2C = np.full((2, examples.targets_TC.shape[1]), _NOWHERE)
    member_T = np.repeat(is_member_N, np.diff(examples.offsets))
    for rows, places_2T in _places(examples.offsets):
        measured_TC = np.isfinite(examples.targets_TC[rows]) & member_T[rows, None]
        found_2TC = np.where(measured_TC, places_2T[..., None], _NOWHERE)
        nearest_2C = np.minimum(nearest_2C, found_2TC.min(axis=1))
    return nearest_2C


def _places(offsets: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """Some thousand sequences at a time: where their nucleotides are, and how far each is from both ends, [2, T]."""
    for first in range(0, len(offsets) - 1, _ROWS):
        ends = offsets[first : first + _ROWS + 1]
        lengths, span = np.diff(ends), slice(int(ends[0]), int(ends[-1]))
        from_5 = np.arange(span.start, span.stop) - np.repeat(ends[:-1], lengths)
        yield span, np.stack([from_5, np.repeat(lengths, lengths) - 1 - from_5])
