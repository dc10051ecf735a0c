"""Checkpoints that survive a kill at any moment, a full disk and a flipped bit.

    checkpoints/.part-step-00000025-<pid>/   written and synced here, then renamed to
    checkpoints/step-00000025/model.safetensors      the weights that predict (the averaged ones, if averaging is on)
                              training.safetensors   the weights that train on, if they are others
                              state.pt               optimiser, loss scaler, random state, counters
                              meta.json              configuration, digests, sha256 of the files above and of itself
    checkpoints/bad/                         damaged ones, each with its reason

A checkpoint is chosen by its step, never by a time stamp; there is no pointer file that could be stale. The newest
one's meta.json knows which step was best. Nothing but tensors and plain Python values is ever loaded.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import pickle
import re
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from pipeline.errors import DivergedError, StorageError
from pipeline.paths import PRETRAINED
from pipeline.runlog import size_text, warn
from pipeline.stage import DISK_FULL, fsync, write_json

_FORMAT = 1
_STEP_NAME = re.compile(r"step-\d{8,}")
_KEEP = 2
#: What the system says of files that are no more; what it refuses otherwise (rights, too many open files, a share that
#: is gone for a moment) may be whole.
_LOST = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.ELOOP, errno.EIO)
_WEIGHTS, _TRAINING, _STATE = "model.safetensors", "training.safetensors", "state.pt"


class Checkpoint(NamedTuple):
    """A checkpoint in memory, verified."""

    folder: Path
    meta: dict[str, Any]
    weights: dict[str, Tensor]  # those that predict
    training: dict[str, Tensor]  # those that train on; the same ones without averaging
    state: dict[str, Any]


class DamagedError(Exception):
    """A checkpoint's files are not what its meta.json promises."""


class CheckpointStore:
    """The checkpoints of one training run, in one folder.

    Args:
        folder: of the checkpoints, in that of the run.
        is_held: whether the run's folder is still this process's, asked before anything is written.
    """

    def __init__(self, folder: Path, *, is_held: Callable[[], bool] = lambda: True) -> None:
        self.folder, self._is_held = folder, is_held

    def steps(self) -> dict[int, Path]:
        """Step -> folder of every committed checkpoint, newest first."""
        paths = [path for path in self.folder.glob("step-*") if _STEP_NAME.fullmatch(path.name)]
        return dict(sorted(((int(path.name.removeprefix("step-")), path) for path in paths), reverse=True))

    def newest_meta(self) -> dict[str, Any] | None:
        """Meta data of the newest checkpoint whose files are all there, or None; nothing is loaded or moved."""
        for step, path in self.steps().items():
            with contextlib.suppress(DamagedError):
                return _of_step(read_meta(path), step)
        return None

    def save(
        self,
        step: int,
        *,
        weights: Mapping[str, Tensor],
        training: Mapping[str, Tensor] | None,
        state: Mapping[str, Any],
        meta: Mapping[str, Any],
    ) -> Path:
        """Commit a checkpoint, then remove those that are neither among the last two nor the best.

        Args:
            step: its number; an earlier checkpoint of the same step is replaced.
            weights: state dict that predicts.
            training: state dict that trains on, None if it is the same.
            state: what else the run needs to go on; tensors and plain values only.
            meta: JSON-able; ``best_step`` in it is never pruned.

        Raises:
            DivergedError: a weight is not finite; such a checkpoint is never written.
            StorageError: the disk is full, even after older checkpoints were removed; or the run's folder is gone.
        """
        if not self._is_held():
            raise StorageError(
                f"{self.folder.parent}: moved, removed or replaced while this run was at work in it; step {step} is "
                "not saved, the checkpoints before it are where the folder went. Next: the same command there, with "
                "ARTIFACTS=<folder>, goes on from them."
            )
        if (name := _not_finite(weights) or _not_finite(training or {})) is not None:
            raise DivergedError(
                f"step {step}: {name} is not finite; such a checkpoint is never written. Next: the same command "
                "goes on from the checkpoint before."
            )
        payload = {_WEIGHTS: _tensor_bytes(weights), _STATE: _state_bytes(state)}
        if training is not None:
            payload[_TRAINING] = _tensor_bytes(training)
        try:
            path = self._write(step, payload, meta)
        except OSError as err:
            if err.errno not in DISK_FULL:
                raise
            before = self.newest_meta()  # the best one may be the one that is not written yet
            self._prune(keep=1, best_step=before["best_step"] if before else None)
            path = self._retry(step, payload, meta)
        self._prune(keep=_KEEP, best_step=meta.get("best_step"))
        return path

    def load_newest(self) -> Checkpoint | None:
        """The newest undamaged checkpoint; damaged ones are moved to ``bad/``. None if there never was one.

        Raises:
            OSError: one cannot be read now, by this user; it is left where it is.
            StorageError: there were checkpoints and none can be read; the run does not silently start again.
        """
        for step, path in self.steps().items():
            try:
                _of_step(read_meta(path), step)
                return load_checkpoint(path)
            except DamagedError as err:
                self._quarantine(path, str(err))
        if any((self.folder / "bad").glob("step-*")):
            raise StorageError(
                f"{self.folder}: every checkpoint is damaged (reasons in bad/); expected at least one readable one. "
                "Next: --restart begins anew and sets them aside."
            )
        return None

    def set_damaged_aside(self) -> None:
        """Move to ``bad/`` whatever is not what was written; only for the holder of the run's lock."""
        for path in self.steps().values():
            try:
                _read(path)
            except DamagedError as err:
                self._quarantine(path, str(err))

    def best_folder(self) -> Path:
        """Where the checkpoint with the best validation metric is; before any validation, the newest.

        Raises:
            StorageError: there is no checkpoint.
        """
        meta, steps = self.newest_meta(), self.steps()
        if meta is None:
            raise StorageError(f"{self.folder}: no readable checkpoint. Next: make train.")
        return steps.get(meta["best_step"]) or steps[meta["step"]]

    def sweep(self) -> None:
        """Remove what killed runs left half-written; only for the holder of the run's lock."""
        for part in self.folder.glob(".part-*"):
            shutil.rmtree(part, ignore_errors=True)

    def _write(self, step: int, payload: Mapping[str, bytes], meta: Mapping[str, Any]) -> Path:
        path = self.folder / f"step-{step:08d}"
        part = self.folder / f".part-{path.name}-{os.getpid()}"
        shutil.rmtree(part, ignore_errors=True)
        part.mkdir(parents=True)
        try:
            files = {}
            for name, data in payload.items():
                (part / name).write_bytes(data)
                fsync(part / name)
                files[name] = {"sha256": hashlib.sha256(data).hexdigest(), "size": len(data)}
            write_json(part / "meta.json", _sealed({**meta, "format": _FORMAT, "step": step, "files": files}))
            _read(part)
            fsync_folder(part)
            if path.exists():
                path.rename(part.with_name(f"{part.name}-replaced"))
            part.rename(path)
            fsync_folder(self.folder)
        except DamagedError as err:
            raise OSError(5, f"{path}: written and not read back: {err}") from err
        except OSError as err:  # the system names no file where a disk or a limit (ulimit -f) stopped the writing
            err.filename = err.filename or str(path)
            raise
        finally:
            shutil.rmtree(part, ignore_errors=True)
            shutil.rmtree(part.with_name(f"{part.name}-replaced"), ignore_errors=True)
        return path

    def _retry(self, step: int, payload: Mapping[str, bytes], meta: Mapping[str, Any]) -> Path:
        try:
            return self._write(step, payload, meta)
        except OSError as err:
            if err.errno not in DISK_FULL:
                raise
            size = size_text(sum(map(len, payload.values())))
            intact = "The one before it is intact. " if self.steps() else ""
            raise StorageError(
                f"{self.folder}: the disk is full; the checkpoint of step {step} needs {size}. {intact}Next: free "
                "space and run again, training goes on from there."
            ) from err

    def _prune(self, *, keep: int, best_step: int | None) -> None:
        for number, (step, path) in enumerate(self.steps().items()):
            if number >= keep and step != best_step:
                # renamed first: a kill in the middle of the removal must not leave half a checkpoint under its name
                part = path.with_name(f".part-old-{path.name}")
                path.rename(part)
                shutil.rmtree(part, ignore_errors=True)

    def _quarantine(self, path: Path, reason: str) -> None:
        bad = self.folder / "bad" / path.name
        shutil.rmtree(bad, ignore_errors=True)
        bad.parent.mkdir(exist_ok=True)
        path.rename(bad)
        (bad / "reason.txt").write_text(reason + "\n")
        warn(f"{path}: damaged ({reason}); moved to {bad}, the next older checkpoint is used")


def initial_checkpoint(given: Path, *, fold: int) -> Path:
    """The checkpoint that ``model.init`` means for a fold: the folder given, or of a run's the best of the same fold.

    Weights that come with the program are called by their name.

    Raises:
        StorageError: the run has the fold, and no readable checkpoint of it.
    """
    given = PRETRAINED / given if (PRETRAINED / given).is_dir() else given
    store = CheckpointStore(given / f"fold{fold}" / "checkpoints")
    return store.best_folder() if store.folder.is_dir() else given


def read_meta(path: Path) -> dict[str, Any]:
    """Meta data of a checkpoint folder, if it is there and every file has its size.

    Raises:
        DamagedError: it is not.
        OSError: it cannot be read now.
    """
    try:
        meta = json.loads((path / "meta.json").read_text())
        seal = meta.pop("sha256")
        files = meta["files"].items()
        sizes = {name: (path / name).stat().st_size for name, _ in files}
    except (OSError, ValueError, KeyError, AttributeError, TypeError) as err:
        if isinstance(err, OSError) and err.errno not in _LOST:
            raise
        raise DamagedError(f"meta.json or a file of it cannot be read ({type(err).__name__}: {err})") from err
    if seal != _sealed(meta)["sha256"]:
        raise DamagedError("meta.json does not have its sha256")
    if meta.get("format") != _FORMAT:
        raise DamagedError(f"format {meta.get('format')!r}; expected {_FORMAT}")
    for name, record in files:
        if sizes[name] != record["size"]:
            raise DamagedError(f"{name} has {sizes[name]} bytes; expected {record['size']}")
    return meta


def _of_step(meta: dict[str, Any], step: int) -> dict[str, Any]:
    """Meta data, if it is of the step that its folder's name says: by that name the newest is chosen."""
    if meta["step"] != step:
        raise DamagedError(f"the folder was renamed: it holds step {meta['step']}")
    return meta


def load_checkpoint(path: Path) -> Checkpoint:
    """Read a checkpoint folder; every byte is compared with its recorded sha256 first.

    Raises:
        DamagedError: it is not what was written, or holds anything but tensors and plain values.
    """
    meta, data = _read(path)
    try:
        weights = safetensors.torch.load(data[_WEIGHTS])
        training = safetensors.torch.load(data[_TRAINING]) if _TRAINING in data else weights
        state = torch.load(io.BytesIO(data[_STATE]), weights_only=True, map_location="cpu")
    except (SafetensorError, KeyError, RuntimeError, EOFError, pickle.UnpicklingError) as err:
        raise DamagedError(f"{type(err).__name__}: {str(err).splitlines()[0]}") from err
    if (name := _not_finite(weights) or _not_finite(training)) is not None:
        raise DamagedError(f"{name} is not finite")
    return Checkpoint(path, meta, weights, training, state)


def _read(path: Path) -> tuple[dict[str, Any], dict[str, bytes]]:
    """Meta data and files of a checkpoint folder; every byte is what was written.

    Raises:
        DamagedError: it is not.
    """
    meta = read_meta(path)
    return meta, {name: _file(path, meta, name) for name in meta["files"]}


def _file(path: Path, meta: Mapping[str, Any], name: str) -> bytes:
    try:
        data = (path / name).read_bytes()
    except OSError as err:
        if err.errno not in _LOST:
            raise
        raise DamagedError(f"{name} cannot be read ({err})") from err
    if hashlib.sha256(data).hexdigest() != meta["files"][name]["sha256"]:
        raise DamagedError(f"{name} does not have its sha256")
    return data


def _not_finite(weights: Mapping[str, Tensor]) -> str | None:
    """The name of the first tensor that holds a NaN or inf."""
    floats = ((name, tensor) for name, tensor in weights.items() if tensor.is_floating_point())
    return next((name for name, tensor in floats if not bool(torch.isfinite(tensor).all())), None)


def load_weights(path: Path) -> dict[str, Tensor]:
    """The weights of a checkpoint folder that predict; the state of its training is neither needed nor read.

    Raises:
        DamagedError: they are not what was written.
    """
    try:
        return safetensors.torch.load(_file(path, read_meta(path), _WEIGHTS))
    except SafetensorError as err:
        raise DamagedError(f"{type(err).__name__}: {str(err).splitlines()[0]}") from err


def export_weights(path: Path, target: Path, *, finished: bool) -> None:
    """Copy what predictions need of a checkpoint, weights and settings, to a folder that `load_weights` reads.

    Args:
        path: checkpoint folder.
        target: new folder.
        finished: whether the training that the checkpoint belongs to was finished, here or later.

    Raises:
        DamagedError: the weights are not what was written.
    """
    meta = read_meta(path)
    data = _file(path, meta, _WEIGHTS)
    target.mkdir(parents=True)
    (target / _WEIGHTS).write_bytes(data)
    kept = {"files": {_WEIGHTS: meta["files"][_WEIGHTS]}, "progress": meta["progress"] | {"finished": finished}}
    write_json(target / "meta.json", _sealed(meta | kept))


def _sealed(meta: dict[str, Any]) -> dict[str, Any]:
    """Meta data with a digest of all its values, as JSON keeps them."""
    plain = json.loads(json.dumps(meta, allow_nan=False))
    return plain | {"sha256": hashlib.sha256(json.dumps(plain, sort_keys=True).encode()).hexdigest()}


def fsync_folder(path: Path) -> None:
    """Ask the system to put a folder's entries on the disk; some shared folders have no such request."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    except OSError as err:
        if err.errno != errno.EINVAL:
            raise
    finally:
        os.close(handle)


def _tensor_bytes(tensors: Mapping[str, Tensor]) -> bytes:
    """Copies of the tensors, so that tied weights are stored twice rather than refused."""
    copies = {name: tensor.detach().cpu().clone().contiguous() for name, tensor in tensors.items()}
    return safetensors.torch.save(copies)


def _state_bytes(state: Mapping[str, Any]) -> bytes:
    """Made in memory: on a full disk torch.save hides the system's error and leaves a part of a file."""
    buffer = io.BytesIO()
    torch.save(dict(state), buffer)
    return buffer.getvalue()
