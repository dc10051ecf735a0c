"""The last hidden layer of a trained network for any file of sequences: features for searches, clusters, other models.

In float32, by the checkpoint that predicts, both directions averaged where training saw both, as predictions are. So a
linear values head applied to a nucleotide's embedding gives its predicted values.

Letters: N sequences, T nucleotides in a row, L length (nt), D width.
"""

from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch
from torch import Tensor

from models.interface import RnaModel
from pipeline.arrays import create_scratch
from pipeline.competitions.base import Competition
from pipeline.config import config_from_dict
from pipeline.dataset import open_examples
from pipeline.inference import (
    Job,
    as_trained,
    both_ways,
    in_batches,
    inputs_of,
    load_network,
    not_finite,
    require_labels,
    with_best_checkpoint,
)
from pipeline.own_file import NONE, bring_inputs, read, require_file
from pipeline.paths import Paths
from pipeline.schema import ALPHABET
from pipeline.stage import Report, run_stage
from pipeline.training.failures import in_one_sentence
from pipeline.training.stop import StopRequest, alone_in

_VERSION = 1
_ROWS = 512  # of a row group


def run(
    source: Path,
    *,
    competition: Competition,
    paths: Paths,
    run: str | Path,
    fold: int,
    per_nucleotide: bool = False,
    embeddings: Mapping[str, Path] = NONE,
) -> Report:
    """Embed every sequence of a file with the best checkpoint of a fold, which carries its own configuration.

    The table has a row for each sequence in the order of the file: ``sequence_id``, ``embedding`` (float32 [D], mean
    over the nucleotides) and, if asked for, ``nucleotides`` (float32 [L, D]). Networks that read base-pair
    probabilities get them from ViennaRNA; what was computed outlives an interruption.

    Args:
        source: FASTA, CSV, TSV or parquet, see `pipeline.competitions.labelled.read_sequences`.
        competition: the one that the run was trained on.
        paths: where runs are; below ``embeddings/<name of the file>/`` all is written.
        run: name of the run, or its folder where that lies elsewhere.
        fold: trained fold.
        per_nucleotide: also write an embedding of every nucleotide.
        embeddings: name -> source of the features that the network itself reads, see `pipeline.features.run`.

    Returns:
        ``current`` if the table is; facts: sequences, nucleotides, width, odd letters, step of the checkpoint.

    Raises:
        ConfigError: the run is of another competition; ViennaRNA is needed and missing.
        DataError: this fold was never trained, or the file is not what it should be.
        DivergedError: an embedding is not finite.
        StorageError: every checkpoint is damaged, or a single sequence does not fit into memory.
        StoppedError: asked to stop; nothing is left half-written.
    """
    require_file(source, verb="embed")
    how: dict[str, Any] = {"per_nucleotide": per_nucleotide, "embeddings": embeddings}
    work = partial(_run, source, competition=competition, paths=paths, **how)
    with alone_in(_folder_of(source, paths), what="embeds a file of this name"):  # or each would read the other's table
        return with_best_checkpoint(work, competition=competition, paths=paths, run=run, fold=fold)


def _folder_of(source: Path, paths: Paths) -> Path:
    return paths.embeddings_dir(Path(source.name.removesuffix(".gz")).stem)


def _run(
    source: Path,
    checkpoint: Path,
    meta: dict[str, Any],
    unfinished: bool,
    *,
    competition: Competition,
    paths: Paths,
    per_nucleotide: bool,
    embeddings: Mapping[str, Path],
) -> Report:
    config = config_from_dict(meta["config"], where=f"{checkpoint}/meta.json")
    competition = as_trained(competition, meta)
    labels = require_labels(meta, paths, where=checkpoint)
    folder = _folder_of(source, paths)
    own = replace(paths, root=folder)  # the file is the test set of a competition of its own
    alphabet = labels.alphabet if labels else ALPHABET
    odd_letters = read(source, own, alphabet=alphabet).facts["odd_letters"]
    bring_inputs(meta, own, embeddings)
    reads: dict[str, Any] = {"bpp": "bpp" in meta["data"], "features": config.data.features, "crop": config.data.crop}
    examples = open_examples(competition, paths=own, table="test", labels=labels, **reads)
    params = {"version": _VERSION, "flipped": config.data.flip > 0, "per_nucleotide": per_nucleotide}
    params |= {"unfinished": True} if unfinished else {}
    label = f"{meta['run']}.fold{meta['fold']}"
    width = int(config.model.kwargs["width"])

    with StopRequest() as stop:
        job = Job(
            competition=competition,
            config=config,
            checkpoint=checkpoint,
            examples=examples,
            positions=np.arange(len(examples)),
            fold=None,
            stop=stop,
        )

        def build(parts: dict[str, Path]) -> dict[str, Any]:
            with in_one_sentence(f"embeddings by {label}"):
                _write(job, parts["embeddings"], label=label, width=width, per_nucleotide=per_nucleotide)
            facts = {"sequences": len(examples), "nucleotides": int(examples.lengths.sum()), "width": width}
            return facts | {"odd_letters": odd_letters, "step": meta["step"]}

        table = folder / f"{label}.parquet"
        kept: dict[str, Any] = {"manifest": table.with_suffix(".manifest.json"), "params": params}
        return run_stage(
            "embed", inputs=inputs_of(checkpoint, examples, own), outputs={"embeddings": table}, build=build, **kept
        )


def _write(job: Job, path: Path, *, label: str, width: int, per_nucleotide: bool) -> None:
    lengths_N = job.examples.lengths
    offsets = np.concatenate([[0], np.cumsum(lengths_N)])
    scratch = path.with_name(f"{path.name}.npy")
    mean_ND = create_scratch(scratch, (len(lengths_N), width))
    nucleotide_TD = create_scratch(scratch, (int(offsets[-1]), width)) if per_nucleotide else None
    model, device = load_network(job)
    for part, found in in_batches(job, partial(_embed, job, model, device), device=device, label=label):
        for k, x_LD in zip(part, found, strict=True):
            if not np.isfinite(x_LD).all():
                raise not_finite(job, k)
            mean_ND[k] = x_LD.mean(axis=0)
            if nucleotide_TD is not None:
                nucleotide_TD[offsets[k] : offsets[k + 1]] = x_LD
    vector = pa.list_(pa.float32(), width)
    fields = [("sequence_id", pa.string()), ("embedding", vector)]
    schema = pa.schema(fields + ([("nucleotides", pa.list_(vector))] if per_nucleotide else []))
    with pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True) as writer:
        for start in range(0, len(lengths_N), _ROWS):
            stop = min(start + _ROWS, len(lengths_N))
            ids = [name.decode() for name in job.examples.ids_N[start:stop].tolist()]
            columns = [pa.array(ids, pa.string()), _vectors(mean_ND[start:stop])]
            if nucleotide_TD is not None:
                inner = pa.array(offsets[start : stop + 1] - offsets[start], pa.int32())
                flat_TD = nucleotide_TD[offsets[start] : offsets[stop]]
                columns.append(pa.ListArray.from_arrays(inner, _vectors(flat_TD)))
            writer.write_table(pa.Table.from_arrays(columns, schema=schema), row_group_size=_ROWS)


def _vectors(x_ND: np.ndarray) -> pa.Array:
    return pa.FixedSizeListArray.from_arrays(pa.array(np.ascontiguousarray(x_ND).reshape(-1)), x_ND.shape[1])


def _embed(job: Job, model: RnaModel, device: torch.device, positions: np.ndarray) -> list[np.ndarray]:
    """x_LD of each example."""

    def pick(x_BLD: Tensor, b: int, length: int) -> np.ndarray:
        return x_BLD[b, :length].numpy()

    return both_ways(job, model.embed, device, positions, pick=pick, turn=lambda x_LD: x_LD[::-1])
