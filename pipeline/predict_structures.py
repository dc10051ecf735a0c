"""Structures that a network predicts: five C1' traces of each sequence, from its distances and its coordinates.

Letters: B batch, L length (nt), K distance bin, M candidate, N traces of a pool, 3 xyz.
"""

import zlib
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from models.heads import expected_lddt
from models.interface import RnaInputs, RnaModel, RnaOutputs
from pipeline.batch import make_batch
from pipeline.dataset import dense_bpp
from pipeline.errors import StorageError
from pipeline.inference import Job, both_ways, load_network, not_finite, poll_stop, unless_out_of_memory
from pipeline.runlog import Bar
from pipeline.schema import CANDIDATES, decode
from pipeline.structure import choice
from pipeline.structure.fold3d import candidates_from_distogram
from pipeline.structure.rigid import relax

#: Longest sequence for which distances between all pairs are predicted, nt; longer ones are built from pairing alone.
MAX_PAIR_LENGTH = 1000
_ROWS = 320  # of a row group: 64 sequences


def write_structures(job: Job, path: Path, *, label: str) -> None:
    """Write five candidates of each sequence: ``sequence_id, fold, candidate, confidence, x, y, z`` (Å).

    Raises:
        DivergedError: a prediction is not finite.
        StorageError: a single sequence does not fit into memory.
        StoppedError: asked to stop.
    """
    numbers = [("candidate", pa.uint8()), ("confidence", pa.float32())]
    schema = pa.schema([*job.key_fields, *numbers, *((axis, pa.list_(pa.float32())) for axis in "xyz")])
    model, device = load_network(job)
    rows: list[dict[str, Any]] = []
    with (
        pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True) as writer,
        Bar(label, total=len(job.positions), unit="structures") as bar,
    ):
        for position in job.positions:
            poll_stop(job)
            rows += structure_rows(job, model, device, int(position))
            if len(rows) >= _ROWS:
                writer.write_table(pa.Table.from_pylist(rows, schema=schema))
                rows = []
            bar.advance()
        if rows:
            writer.write_table(pa.Table.from_pylist(rows, schema=schema))


def structure_rows(job: Job, model: RnaModel, device: torch.device, position: int) -> list[dict[str, Any]]:
    """Five candidates of one sequence: from pairing, from the distances that the network expects, and its coordinates.

    Where there is a network, its distances say of all of them how right they are.
    """
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
