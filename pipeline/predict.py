"""Predictions of one fold: its held-out sequences (``oof``) and the test set, one row per sequence.

In float32 whatever the training ran in, so that neither batch size nor padding moves a prediction by more than 1e-6.
Letters: B batch, L length (nt), T nucleotides in a row, C target or class, N sequences.
"""

import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from models.interface import RnaModel, RnaOutputs
from pipeline import inference
from pipeline.arrays import create_scratch
from pipeline.augment import central_crop
from pipeline.batch import make_batch
from pipeline.competitions.base import Competition
from pipeline.config import DataConfig, RunConfig, config_from_dict
from pipeline.dataset import ExampleSet, RnaExample, fold_members, open_examples, read_folds
from pipeline.errors import DataError
from pipeline.features import read_features, with_width
from pipeline.inference import (
    Job,
    as_trained,
    both_ways,
    in_batches,
    inputs_of,
    load_network,
    not_finite,
    require_labels,
    take_unknown_letters,
    unless_out_of_memory,
    with_best_checkpoint,
)
from pipeline.labels import Labels, read_labels
from pipeline.network import build_model
from pipeline.packing import plan_by_tokens
from pipeline.paths import Paths
from pipeline.runlog import say, warn
from pipeline.stage import Report, read_manifest, run_stage, sha256_file
from pipeline.training.failures import in_one_sentence
from pipeline.training.losses import label_values, position_values
from pipeline.training.precision import choose_device
from pipeline.training.stop import StopRequest

_VERSION = {"values": 1, "structure": 2, "classes": 1, "numbers": 1}
_ROWS = 8192  # of a row group of value predictions
_SAMPLES, _SAMPLE_S = 5, 10.0  # batches of a table that an estimate times, and seconds after which it takes no more

Which = Literal["oof", "test"]


def run(
    *,
    competition: Competition,
    paths: Paths,
    run: str,
    fold: int,
    which: Sequence[Which] = ("oof", "test"),
    partial_pairs: bool = False,
) -> Report:
    """Predict with the best checkpoint of a fold, which carries its own configuration.

    Predictions by a training that is not finished are marked in their manifest (``params.unfinished``).

    Args:
        competition: the one that the run was trained on.
        paths: where clean tables, fold tables and runs are.
        run: name of the run.
        fold: trained fold.
        which: tables to write: ``oof`` = the fold's held-out sequences, ``test``.
        partial_pairs: leave out test sequences whose base-pair probabilities there was no time for.

    Returns:
        ``current`` if all tables are; facts: sequences and nucleotides of each, step of the checkpoint.

    Raises:
        ConfigError: the run is of another competition, or of other classes.
        DataError: this fold was never trained, or as another one, or clean or fold table changed since.
        DivergedError: a prediction is not finite.
        StorageError: every checkpoint is damaged, or a single sequence does not fit into memory.
        StoppedError: asked to stop, or the device is lost; nothing is left half-written.
    """

    def work(path: Path, meta: dict[str, Any], unfinished: bool) -> Report:
        if meta["fold"] != fold:
            raise DataError(
                f"{path}: trained with fold {meta['fold']} held out; its folder says {fold}. Next: rename or remove it."
            )
        named = meta | {"run": run}  # of a run that was copied or renamed the folder's, not that of the other one
        how: dict[str, Any] = {"competition": competition, "paths": paths, "partial_pairs": partial_pairs}
        return apply(path, named, unfinished, which=which, **how)

    return with_best_checkpoint(work, competition=competition, paths=paths, run=run, fold=fold)


def apply(
    path: Path,
    meta: dict[str, Any],
    unfinished: bool,
    *,
    competition: Competition,
    paths: Paths,
    which: Sequence[Which],
    partial_pairs: bool = False,
) -> Report:
    """What `run` does with one checkpoint, wherever that lies: `with_best_checkpoint` says the first three."""
    competition = as_trained(competition, meta)
    if not competition.has_test(paths):
        which = [table for table in which if table == "oof"]
        if not which:
            raise DataError(f"{paths.clean('test')}: this set has no test set. Next: make predict without --test-only.")
        say(f"{meta['run']} fold{meta['fold']}: no test set, so out-of-fold predictions alone")
    reports = {}
    with StopRequest() as stop:
        for table in which:
            how: dict[str, Any] = {"stop": stop, "unfinished": unfinished, "partial_pairs": partial_pairs}
            reports[table] = _run_table(table, competition, paths, path, meta, **how)
    return Report(
        stage="predict",
        status="current" if all(report.status == "current" for report in reports.values()) else "built",
        outputs={table: report.outputs[table] for table, report in reports.items()},
        facts={"step": meta["step"], **{table: report.facts for table, report in reports.items()}},
        seconds=sum(report.seconds for report in reports.values()),
    )


def _run_table(
    table: Which,
    competition: Competition,
    paths: Paths,
    checkpoint: Path,
    meta: dict[str, Any],
    *,
    stop: StopRequest,
    unfinished: bool,
    partial_pairs: bool,
) -> Report:
    config = config_from_dict(meta["config"], where=f"{checkpoint}/meta.json")
    labels = require_labels(meta, paths, where=checkpoint)
    partial_pairs = partial_pairs and table == "test"
    sees: dict[str, Any] = {"uses_bpp": "bpp" in meta["data"], "partial": partial_pairs}
    examples = _open(table, competition, paths, labels=labels, data=config.data, **sees)
    _require_same_features(meta, config.data.features, paths)
    run, split, fold = meta["run"], meta["split"], meta["fold"]
    inputs = inputs_of(checkpoint, examples, paths)
    if table == "oof":
        inputs["folds"] = paths.fold_table(split)
        _require_trained_on(meta, examples, inputs["folds"])
    positions = _members(table, examples, paths, split=split, fold=fold)
    if partial_pairs and examples.bpp and (sees["uses_bpp"] or competition.task != "structure"):
        positions = positions[examples.bpp.row_N[positions] >= 0]  # of all networks: a mean needs the same of each
    job = Job(
        competition=competition,
        config=config,
        checkpoint=checkpoint,
        examples=examples,
        positions=positions,
        fold=fold if table == "oof" else None,
        stop=stop,
    )
    label = f"{run} fold{fold} {table}"

    def build(parts: dict[str, Path]) -> dict[str, Any]:
        if competition.task == "structure":  # which compiles: slow to import
            from pipeline.predict_structures import write_structures as write
        else:
            write = _write_values
        with in_one_sentence(f"predictions of {label}"):
            write(job, parts[table], label=label)
        return {"sequences": len(positions), "nucleotides": int(examples.lengths[positions].sum())}

    output = paths.oof(run, fold) if table == "oof" else paths.test(run, fold)
    params = {"version": _VERSION[competition.task], "flipped": config.data.flip > 0}
    if unfinished:  # so that they are told apart, and made again when the training is finished
        params["unfinished"] = True
    notes = {"table": (read_manifest(inputs["arrays"]) or {}).get("input")}  # that the arrays were made of
    made: dict[str, Any] = {"params": params, "notes": notes, "build": build}
    return run_stage(f"predict-{table}", inputs=inputs, outputs={table: output}, **made)


def _open(
    table: Which,
    competition: Competition,
    paths: Paths,
    *,
    uses_bpp: bool,
    labels: Labels | None,
    data: DataConfig,
    partial: bool = False,
) -> ExampleSet:
    """Examples of a table, with base-pair probabilities where network or structures are made from them."""
    bpp = uses_bpp or ((partial or competition.task == "structure") and paths.bpp.is_file())
    name: Any = "train" if table == "oof" else "test"
    sees: dict[str, Any] = {
        "bpp": bpp,
        "partial": partial,
        "features": data.features,
        "labels": labels,
        "crop": data.crop,
    }
    return open_examples(competition, paths=paths, table=name, **sees)


def _members(table: Which, examples: ExampleSet, paths: Paths, *, split: str, fold: int) -> np.ndarray:
    """Positions that a table predicts, in the order of their sequence_id."""
    positions = np.arange(len(examples))
    if table == "oof":
        folds_N = read_folds(paths.fold_table(split), examples=examples)
        positions = np.flatnonzero(fold_members(folds_N, fold, where=split))
    return positions[np.argsort(examples.ids_N[positions])]


@in_one_sentence("a sample of the predictions")
def estimate(config: RunConfig, *, competition: Competition, paths: Paths, split: str, fold: int) -> float:
    """Time that both tables of a fold will take here, in seconds, before anything is trained.

    A sample of the very batches, by length, goes through an untrained network: validation, whose time is known
    sooner, runs in another precision and without what is done for structures.
    """
    labels = read_labels(paths) if competition.has_labels else None
    config = with_width(config, paths)
    model, device = build_model(config.model, competition, labels).eval(), choose_device()
    if labels:
        take_unknown_letters(model, labels)
    model.to(device)
    seconds = 0.0
    with StopRequest() as stop:
        tables: dict[Which, int | None] = {"oof": fold, "test": None}
        for table, number in tables.items():
            if table == "test" and not competition.has_test(paths):
                continue
            examples = _open(table, competition, paths, uses_bpp=model.uses_bpp, labels=labels, data=config.data)
            positions = _members(table, examples, paths, split=split, fold=fold)
            job = Job(
                competition=competition,
                config=config,
                checkpoint=Path("(untrained)"),
                examples=examples,
                positions=positions,
                fold=number,
                stop=stop,
            )
            seconds += _sampled_seconds(job, model, device)
    return seconds


def _sampled_seconds(job: Job, model: RnaModel, device: torch.device) -> float:
    lengths_N = job.examples.lengths[job.positions]
    is_structure = job.competition.task == "structure"
    most = 1 if is_structure else inference.BATCH_TOKENS  # structures go one by one
    parts = plan_by_tokens(lengths_N, max_tokens=most)

    def timed(part: np.ndarray) -> float:
        started = time.monotonic()
        if is_structure:
            from pipeline.predict_structures import structure_rows

            structure_rows(job, model, device, int(job.positions[part[0]]))
            return time.monotonic() - started
        fits = unless_out_of_memory(partial(predict_values, job, model, device, job.positions[part])) is not None
        if fits or len(part) == 1:
            return time.monotonic() - started
        return sum(timed(half) for half in np.array_split(part, 2))

    timed(parts[-1][:1])  # the first pass also loads and compiles what every later one finds ready
    sample, spent = np.unique(np.linspace(0, len(parts) - 1, _SAMPLES).astype(int)), list[float]()
    for index in sample:  # longest first: cut short, the sample errs on the safe side
        spent.append(timed(parts[index]))
        if sum(spent) > _SAMPLE_S:
            break
    return sum(spent) / len(spent) * len(parts)


def _require_trained_on(meta: dict[str, Any], examples: ExampleSet, fold_table: Path) -> None:
    """Out-of-fold predictions are honest only for the very data and folds of the training."""
    if meta["data"]["examples"] != examples.key or meta["data"]["folds"] != sha256_file(fold_table):
        raise DataError(
            f"{fold_table}: clean or fold table changed since {meta['run']} fold {meta['fold']} was trained; held-out "
            "sequences may have been trained on. Next: train again, with a new TAG or --restart (make: RESTART=1)."
        )


def _require_same_features(meta: dict[str, Any], name: str, paths: Paths) -> None:
    """Features of a name must be those that were learned from, as far as these are here."""
    trained = meta["data"].get("features")
    if trained and read_features(name, paths=paths)["outputs"].get("train", trained) != trained:
        raise DataError(
            f"{paths.features(name, 'train')}: features {name!r} changed since {meta['run']} fold {meta['fold']} was "
            "trained; expected the same. Next: make features with the earlier ones, or train again with a new TAG."
        )


# --- values per nucleotide, probabilities of classes, numbers ---


def _write_values(job: Job, path: Path, *, label: str) -> None:
    """Lists of values, one for each target and nucleotide; of a labelled set a list of one for each class or number."""
    lengths_N, names = job.examples.lengths[job.positions], job.competition.targets
    if labels := job.examples.labels:
        lengths_N, names = np.full(len(lengths_N), len(labels.names)), (labels.column,)
    offsets = np.concatenate([[0], np.cumsum(lengths_N)])
    predicted_TC = create_scratch(path.with_name(f"{path.name}.npy"), (int(offsets[-1]), len(names)))
    model, device = load_network(job)
    for part, values in in_batches(job, partial(predict_values, job, model, device), device=device, label=label):
        for k, values_LC in zip(part, values, strict=True):
            if not np.isfinite(values_LC).all():
                raise not_finite(job, job.positions[k])
            predicted_TC[offsets[k] : offsets[k + 1]] = values_LC
    schema = pa.schema([*job.key_fields, *((name, pa.list_(pa.float32())) for name in names)])
    with pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True) as writer:
        for start in range(0, len(offsets) - 1, _ROWS):
            rows = slice(start, min(start + _ROWS, len(offsets) - 1))
            inner = pa.array(offsets[rows.start : rows.stop + 1] - offsets[rows.start], pa.int32())
            flat_TC = predicted_TC[offsets[rows.start] : offsets[rows.stop]]
            lists = [pa.ListArray.from_arrays(inner, np.ascontiguousarray(flat_TC[:, c])) for c in range(len(names))]
            keys = _key_columns(job, job.positions[rows])
            writer.write_table(pa.Table.from_arrays([*keys, *lists], schema=schema), row_group_size=_ROWS)


def predict_values(job: Job, model: RnaModel, device: torch.device, positions: np.ndarray) -> list[np.ndarray]:
    """values_LC of each example; the mean with those of the reversed sequence if training reversed some.

    Of a labelled set the probabilities of its classes, or its numbers in their units, [C, 1].
    """
    if job.examples.labels:
        return _predict_labels(job, model, device, positions)

    def pick(outputs: RnaOutputs, b: int, length: int) -> np.ndarray:
        assert outputs.values_BLC is not None
        return position_values(outputs.values_BLC[b, :length], job.competition.units).numpy()

    return both_ways(job, model, device, positions, pick=pick, turn=lambda values_LC: values_LC[::-1])


def _predict_labels(job: Job, model: RnaModel, device: torch.device, positions: np.ndarray) -> list[np.ndarray]:
    """[C, 1] for each example; of a test sequence that is too long for the memory, what its middle gives.

    A notebook that a competition runs again must not end with one hidden sequence.
    """
    labels, longest = job.examples.labels, int(job.examples.lengths[positions].max())
    assert labels is not None

    def compute(change: Callable[[RnaExample, int], RnaExample] | None) -> list[np.ndarray]:
        with torch.no_grad():
            logits_BC = model(make_batch(job.examples, positions, change=change).to(device).inputs).class_logits_BC
            assert logits_BC is not None
            found_BC = label_values(logits_BC, labels)
        return list(found_BC.float().unsqueeze(-1).cpu().numpy())

    if len(positions) > 1 or job.fold is not None:
        return compute(None)
    while (found := unless_out_of_memory(partial(compute, _middle_of(longest)))) is None and longest > 1:
        longest //= 2
        name = job.examples.ids_N[positions[0]].decode()
        warn(f"{device}: out of memory on {name!r} alone; predicting from the {longest:,} letters in its middle")
    if found is None:
        raise MemoryError
    return found


def _middle_of(longest: int) -> Callable[[RnaExample, int], RnaExample]:
    return lambda example, _index: central_crop(example, max_length=longest)


def _key_columns(job: Job, positions: np.ndarray) -> list[pa.Array]:
    ids = pa.array([name.decode() for name in job.examples.ids_N[positions].tolist()], pa.string())
    return [ids] if job.fold is None else [ids, pa.array(np.full(len(positions), job.fold, dtype=np.uint8))]
