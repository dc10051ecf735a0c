"""A trained checkpoint at work on many sequences: which one, in which batches, both ways, in the memory there is.

Letters: N sequences.
"""

from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from models.adapters import merge_adapters
from models.interface import RnaInputs, RnaModel
from models.layers.embedding import InputEmbedding
from pipeline.augment import flip
from pipeline.batch import make_batch
from pipeline.competitions.base import Competition
from pipeline.config import RunConfig
from pipeline.dataset import ExampleSet, RnaExample
from pipeline.errors import ConfigError, DataError, DivergedError, StoppedError, StorageError
from pipeline.labels import Labels, find_labels, labels_of, units_of
from pipeline.network import build_model
from pipeline.packing import STRUCTURE_PAIRS, plan_by_tokens
from pipeline.paths import Paths
from pipeline.runlog import Bar, say, warn
from pipeline.runs import SWEEP
from pipeline.stage import Report
from pipeline.training.checkpoint import CheckpointStore, DamagedError, load_weights, read_meta
from pipeline.training.failures import fitting, is_out_of_memory
from pipeline.training.precision import choose_device
from pipeline.training.stop import StopRequest

#: Padded nucleotides of a batch; halved where memory runs out. Changes no prediction.
BATCH_TOKENS = 65_536

_TRIES = 5  # with a checkpoint that a training at work removes for a better one
Computed = TypeVar("Computed")


@dataclass(frozen=True, kw_only=True)
class Job:
    """Which sequences a checkpoint is to see, and how."""

    competition: Competition
    config: RunConfig
    checkpoint: Path
    examples: ExampleSet
    positions: np.ndarray  # of the examples, in the order of their sequence_id
    fold: int | None  # for the table's fold column; None = no such column
    stop: StopRequest

    @property
    def key_fields(self) -> list[tuple[str, pa.DataType]]:
        """Columns of a table of predictions that say of what they are."""
        return [("sequence_id", pa.string())] + ([] if self.fold is None else [("fold", pa.uint8())])


def with_best_checkpoint(
    work: Callable[[Path, dict[str, Any], bool], Report],
    *,
    competition: Competition,
    paths: Paths,
    run: str | Path,
    fold: int,
) -> Report:
    """Do something with the best checkpoint of a fold; again where a training at work replaced it meanwhile.

    Args:
        work: takes the checkpoint's folder, its meta, and whether its training is unfinished.
        competition: the one that the run has to be of.
        paths: where runs are.
        run: name of the run, or its folder where that lies elsewhere.
        fold: trained fold.

    Raises:
        ConfigError: the run is of another competition.
        DataError: this fold was never trained, or other code trained it.
        StorageError: every checkpoint is damaged.
    """
    store = CheckpointStore(paths.fold_dir(run, fold) / "checkpoints")
    _require_begun(store, paths)
    for tries_left in reversed(range(_TRIES)):
        path = store.best_folder()
        try:
            meta = meta_of(path)
            if meta["competition"] != competition.name:
                got = f"{path}: trained on {meta['competition']}"
                raise ConfigError(f"{got}; expected {competition.name}. Next: COMP={meta['competition']}.")
            return work(path, meta, _is_unfinished(store, meta))
        except (DataError, StorageError, OSError):  # a share may call a removed file stale
            if path.is_dir() or not tries_left:
                raise
            say(f"{path}: replaced meanwhile by the training that goes on; predicting with its better one")
    raise AssertionError


def _is_unfinished(store: CheckpointStore, meta: dict[str, Any]) -> bool:
    """Whether the training of a checkpoint goes on, or was interrupted; this is said."""
    newest = store.newest_meta()
    unfinished = newest is not None and not newest["progress"]["finished"]
    if unfinished:
        run = f"{meta['run']} fold{meta['fold']}"
        say(f"{run}: training is not finished; predicting with its checkpoint of step {meta['step']}")
    return unfinished


def _require_begun(store: CheckpointStore, paths: Paths) -> None:
    if any(store.folder.glob("step-*")) or any(store.folder.glob("bad/step-*")):
        return
    trained: dict[str, list[str]] = {}
    for folder in sorted({path.parents[1] for path in paths.home.glob("runs/*/fold*/checkpoints/step-*")}):
        if f"+{SWEEP}" not in folder.parent.name:
            trained.setdefault(folder.parent.name, []).append(folder.name)
    there = ", ".join(f"{run} ({', '.join(folds)})" for run, folds in trained.items()) or "no run at all"
    raise DataError(
        f"{store.folder}: no checkpoint, this fold was never trained; trained so far: {there}. Next: make train "
        f"COMP={paths.comp} FOLD={store.folder.parent.name.removeprefix('fold')}, or MODEL, SPLIT, FOLD and TAG of a "
        "trained one."
    )


def inputs_of(checkpoint: Path, examples: ExampleSet, paths: Paths) -> dict[str, Path]:
    """What a stage that applies a checkpoint reads: the files by which it knows that nothing changed."""
    arrays = {"arrays": examples.key} | ({"bpp": examples.bpp.key} if examples.bpp else {})
    metas = {label: paths.arrays_dir / key / "meta.json" for label, key in arrays.items()}
    metas |= {"features": paths.features_manifest(examples.features.name)} if examples.features else {}
    return {"checkpoint": checkpoint / "meta.json"} | metas


def as_trained(competition: Competition, meta: dict[str, Any]) -> Competition:
    """The competition as a checkpoint learned it: its units, and its facts where no clean tables here say them.

    Raises:
        ConfigError: they have other targets; of labels `require_labels` says more.
    """
    competition = replace(competition, units=units_of(meta))
    trained = competition.with_facts(meta.get("facts") or {})
    if competition.facts and not competition.has_labels and competition.targets != trained.targets:
        raise ConfigError(
            f"{meta['run']} fold{meta['fold']}: trained on {', '.join(trained.targets)}; the data have "
            f"{', '.join(competition.targets)}. Next: train again, or make data COMP={competition.name} with the "
            "earlier files."
        )
    return competition if competition.facts else trained


def require_labels(meta: dict[str, Any], paths: Paths, *, where: Path) -> Labels | None:
    """Classes or numbers that a checkpoint was trained on, which must be those of the data, where these are here."""
    labels = labels_of(meta)
    there = find_labels(paths) if labels else None
    if labels and there and (changed := labels.difference(there)):
        raise ConfigError(
            f"{where}: trained on other data than those in {paths.clean('train').parent}: {changed}. Next: train "
            f"again, or make data COMP={paths.comp} with the earlier files."
        )
    return labels


def meta_of(path: Path) -> dict[str, Any]:
    """What a checkpoint says of itself; StorageError where it is damaged."""
    try:
        return read_meta(path)
    except DamagedError as err:
        raise _damaged(path, err) from err


def _damaged(path: Path, err: DamagedError) -> StorageError:
    return StorageError(f"{path}: damaged: {err}. Next: remove this folder; the newest other checkpoint is used then.")


def load_network(job: Job) -> tuple[RnaModel, torch.device]:
    """The network with the weights that predict, on the best device."""
    device, features = choose_device(), job.examples.features
    reads = job.config.model.kwargs.get("num_features", 0)
    if features is not None and features.values.shape[-1] != reads:
        raise DataError(
            f"features {features.name!r}: {features.values.shape[-1]} numbers each; {job.checkpoint} reads {reads}. "
            "Next: give those of the network that made the ones it was trained on."
        )
    model = build_model(job.config.model, job.competition, job.examples.labels)
    try:
        weights = load_weights(job.checkpoint)
    except DamagedError as err:
        raise _damaged(job.checkpoint, err) from err
    with fitting(job.checkpoint):
        model.load_state_dict(weights)
    merge_adapters(model)
    if job.examples.labels:
        take_unknown_letters(model, job.examples.labels)
    return model.to(device).eval(), device


def take_unknown_letters(model: RnaModel, labels: Labels) -> None:
    """Let a network read the letters of test sequences that no training sequence had, as nothing."""
    for module in model.modules():
        if isinstance(module, InputEmbedding):
            module.widen(len(labels.readable))


def in_batches(
    job: Job, compute: Callable[[np.ndarray], list[np.ndarray]], *, device: torch.device, label: str
) -> Iterator[tuple[np.ndarray, list[np.ndarray]]]:
    """Batches as (positions in ``job.positions``, an array for each); out of memory, all that is left is halved.

    Args:
        job: which examples.
        compute: positions of examples -> an array for each.
        device: that computes, for messages.
        label: of the bar.
    """
    lengths_N = job.examples.lengths[job.positions]
    max_pairs = STRUCTURE_PAIRS if job.competition.task == "structure" else None
    pending = deque(plan_by_tokens(lengths_N, max_tokens=BATCH_TOKENS, max_pairs=max_pairs))
    with Bar(label, total=len(job.positions), unit="sequences") as bar:
        while pending:
            poll_stop(job)
            part = pending.popleft()
            values = unless_out_of_memory(partial(compute, job.positions[part]))
            if values is not None:
                yield part, values
                bar.advance(len(part))
                continue
            if len(part) == 1:
                raise StorageError(
                    f"{device} is out of memory on a single sequence of {lengths_N[part[0]]} nt. "
                    "Next: predict on a machine with more memory."
                )
            pending = deque(half for whole in (part, *pending) for half in np.array_split(whole, 2) if len(half))
            warn(f"{label}: out of memory with {len(part)} sequences; going on with half as many, same predictions")


def both_ways(
    job: Job,
    network: Callable[[RnaInputs], Computed],
    device: torch.device,
    positions: np.ndarray,
    *,
    pick: Callable[[Computed, int, int], np.ndarray],
    turn: Callable[[np.ndarray], np.ndarray],
) -> list[np.ndarray]:
    """One output array per example, averaged over both directions where training saw both.

    Args:
        job: which examples.
        network: what a padded batch goes through.
        device: where.
        positions: of the examples.
        pick: (what the network gives, on the CPU, place in the batch, length in nt) -> the example's array.
        turn: an array of the reversed sequence as one of the sequence.
    """
    lengths = job.examples.lengths[positions].tolist()

    def outputs_of(change: Callable[[RnaExample, int], RnaExample] | None = None) -> Computed:
        inputs = make_batch(job.examples, positions, change=change).to(device).inputs
        return tree_map_only(Tensor, Tensor.cpu, network(inputs))  # at once: each copy waits for the device

    with torch.no_grad():
        outputs = outputs_of()
        forward = [pick(outputs, b, length) for b, length in enumerate(lengths)]
        if job.config.data.flip == 0:
            return forward
        outputs = outputs_of(lambda one, _: flip(one))
        pairs = zip(forward, lengths, strict=True)
        return [(one + turn(pick(outputs, b, length))) / 2 for b, (one, length) in enumerate(pairs)]


def unless_out_of_memory(compute: Callable[[], Computed]) -> Computed | None:
    """What is computed; None where memory ran out, all of it given back."""
    try:
        return compute()
    except (MemoryError, RuntimeError) as err:
        if not is_out_of_memory(err):
            raise
    torch.cuda.empty_cache()
    return None


def poll_stop(job: Job) -> None:
    """End for a signal whose own StoppedError, raised where the work then was, got lost in somebody's callback."""
    if job.stop.signalled:
        raise StoppedError("predict: stopped; nothing is half-written. Next: the same command again.")


def not_finite(job: Job, position: int) -> DivergedError:
    return DivergedError(
        f"{job.checkpoint}: the prediction for {job.examples.ids_N[position].decode()!r} is not finite. "
        "Next: train again with a lower train.lr or train.precision = 'fp32'."
    )
