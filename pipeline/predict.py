"""Predictions of one fold: its held-out sequences (``oof``) and the test set, one row per sequence.

In float32 whatever the training ran in, so that neither batch size nor padding moves a prediction by more than 1e-6.
Letters: B batch, L length (nt), T nucleotides in a row, C target or class, K distance bin, M candidate, N sequences or
traces of a pool, 3 xyz.
"""

import time
import zlib
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from models.heads import expected_lddt
from models.interface import RnaInputs, RnaModel, RnaOutputs
from pipeline import inference
from pipeline.arrays import create_scratch
from pipeline.augment import central_crop
from pipeline.batch import make_batch
from pipeline.competitions.base import Competition
from pipeline.config import DataConfig, RunConfig, config_from_dict
from pipeline.dataset import ExampleSet, RnaExample, dense_bpp, fold_members, open_examples, read_folds
from pipeline.errors import DataError, StorageError
from pipeline.features import read_features, with_width
from pipeline.inference import (
    Job,
    as_trained,
    both_ways,
    in_batches,
    inputs_of,
    load_network,
    not_finite,
    poll_stop,
    require_labels,
    take_unknown_letters,
    unless_out_of_memory,
    with_best_checkpoint,
)
from pipeline.labels import Labels, read_labels
from pipeline.network import build_model
from pipeline.packing import plan_by_tokens
from pipeline.paths import Paths
from pipeline.runlog import Bar, say, warn
from pipeline.schema import CANDIDATES, decode
from pipeline.stage import Report, read_manifest, run_stage, sha256_file
from pipeline.training.failures import in_one_sentence
from pipeline.training.losses import label_values, position_values
from pipeline.training.precision import choose_device
from pipeline.training.stop import StopRequest

_VERSION = {"values": 1, "structure": 2, "classes": 1, "numbers": 1}
_ROWS = 8192  # of a row group of value predictions
_STRUCTURE_ROWS = 320  # of a row group of structures: 64 sequences
_SAMPLES, _SAMPLE_S = 5, 10.0  # batches of a table that an estimate times, and seconds after which it takes no more
#: Longest sequence for which distances between all pairs are predicted, nt; longer ones are built from pairing alone.
MAX_PAIR_LENGTH = 1000

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
        write = _write_structures if competition.task == "structure" else _write_values
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
    parts = plan_by_tokens(
        lengths_N, max_tokens=1 if is_structure else inference.BATCH_TOKENS
    )  # structures go one by one

    def timed(part: np.ndarray) -> float:
        started = time.monotonic()
        if is_structure:
            _structure_rows(job, model, device, int(job.positions[part[0]]))
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
    schema = pa.schema([*_key_fields(job), *((name, pa.list_(pa.float32())) for name in names)])
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


# --- structures ---


def _write_structures(job: Job, path: Path, *, label: str) -> None:
    numbers = [("candidate", pa.uint8()), ("confidence", pa.float32())]
    schema = pa.schema([*_key_fields(job), *numbers, *((axis, pa.list_(pa.float32())) for axis in "xyz")])
    model, device = load_network(job)
    rows: list[dict[str, Any]] = []
    with (
        pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True) as writer,
        Bar(label, total=len(job.positions), unit="structures") as bar,
    ):
        for position in job.positions:
            poll_stop(job)
            rows += _structure_rows(job, model, device, int(position))
            if len(rows) >= _STRUCTURE_ROWS:
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
                rows = []
            bar.advance()
        if rows:
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))


def _structure_rows(job: Job, model: RnaModel, device: torch.device, position: int) -> list[dict[str, Any]]:
    """Five candidates of one sequence: from pairing, from the distances that the network expects, and its coordinates.

    Where there is a network, its distances say of all of them how right they are.
    """
    from pipeline.structure import choice
    from pipeline.structure.fold3d import candidates_from_distogram

    example = job.examples.example(position)
    seed = zlib.crc32(example.id.encode()) ^ job.config.train.seed
    logits_LLK = None
    if len(example.tokens_L) <= MAX_PAIR_LENGTH:
        logits_LLK = _predict_distances(job, model, device, position)
        if not np.isfinite(logits_LLK).all():
            raise not_finite(job, position)
    sequence, bpp_LL = decode(example.tokens_L), dense_bpp(example)
    xyz_ML3, confidence_M = candidates_from_distogram(
        logits_LLK, sequence=sequence, bpp_LL=bpp_LL, count=CANDIDATES, seed=seed
    )
    if logits_LLK is not None:
        own_ML3, lddt_M = _predict_traces(job, model, device, position, seed=seed)
        pool_NL3 = np.concatenate([xyz_ML3, own_ML3])
        confidence_N = choice.expected_lddt(logits_LLK, pool_NL3)
        confidence_N[len(xyz_ML3) :] += lddt_M  # two opinions of the same
        confidence_N[len(xyz_ML3) :] /= 2
        xyz_ML3, confidence_M = choice.most_trusted(pool_NL3, confidence_N, count=CANDIDATES)
    if not (np.isfinite(xyz_ML3).all() and np.isfinite(confidence_M).all()):
        raise not_finite(job, position)
    key = {"sequence_id": example.id} | ({} if job.fold is None else {"fold": job.fold})
    return [
        key | {"candidate": m, "confidence": float(confidence)} | _axes(xyz_L3)
        for m, (xyz_L3, confidence) in enumerate(zip(xyz_ML3, confidence_M, strict=True), start=1)
    ]


def _axes(xyz_L3: np.ndarray) -> dict[str, np.ndarray]:
    return dict(zip("xyz", xyz_L3.T.astype(np.float32), strict=True))


def _predict_distances(job: Job, model: RnaModel, device: torch.device, position: int) -> np.ndarray:
    def pick(outputs: RnaOutputs, b: int, length: int) -> np.ndarray:
        assert outputs.distance_logits_BLLK is not None
        return outputs.distance_logits_BLLK[b, :length, :length].float().numpy()

    one = np.array([position])
    logits = unless_out_of_memory(
        lambda: both_ways(job, model, device, one, pick=pick, turn=lambda logits_LLK: logits_LLK[::-1, ::-1])
    )
    if logits is None:
        raise _too_long(job, device, position)
    return logits[0]


def _predict_traces(
    job: Job, model: RnaModel, device: torch.device, position: int, *, seed: int
) -> tuple[np.ndarray, np.ndarray]:
    """The network's own coordinates, all but the first with dropout, and the lDDT that it expects of them.

    [M, L, 3] Å and [M]; M is 0 where there is no such head. Sequences are not read backwards here: of coordinates in
    arbitrary frames there is no mean.
    """
    from pipeline.structure.rigid import relax

    if not job.config.model.kwargs.get("coordinates"):
        return np.zeros((0, job.examples.lengths[position], 3)), np.zeros(0)
    inputs = make_batch(job.examples, np.array([position])).to(device).inputs
    found = unless_out_of_memory(lambda: _draw_traces(model, inputs, seed=seed))
    if found is None:
        raise _too_long(job, device, position)
    if not all(np.isfinite(xyz_L3).all() for xyz_L3, _ in found):
        raise not_finite(job, position)
    traces = [relax(xyz_L3, []) for xyz_L3, _ in found]
    return np.stack(traces), np.array([lddt for _, lddt in found])


@torch.no_grad()
def _draw_traces(model: RnaModel, inputs: RnaInputs, *, seed: int) -> list[tuple[np.ndarray, float]]:
    found = []
    device = inputs.tokens_BL.device
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for k in range(CANDIDATES):
            torch.manual_seed(seed + k)
            outputs = model.train(k > 0)(inputs)
            model.eval()
            assert outputs.c1_xyz_BL3 is not None
            assert outputs.lddt_logits_BLK is not None
            lddt = float(expected_lddt(outputs.lddt_logits_BLK[0]).mean())
            found.append((outputs.c1_xyz_BL3[0].double().cpu().numpy(), lddt))
    return found


def _too_long(job: Job, device: torch.device, position: int) -> StorageError:
    length = job.examples.lengths[position]
    return StorageError(f"{device} is out of memory on a structure of {length} nt. Next: predict on a larger machine.")


# --- the keys of either ---


def _key_fields(job: Job) -> list[tuple[str, pa.DataType]]:
    return [("sequence_id", pa.string())] + ([] if job.fold is None else [("fold", pa.uint8())])


def _key_columns(job: Job, positions: np.ndarray) -> list[pa.Array]:
    ids = pa.array([name.decode() for name in job.examples.ids_N[positions].tolist()], pa.string())
    return [ids] if job.fold is None else [ids, pa.array(np.full(len(positions), job.fold, dtype=np.uint8))]
