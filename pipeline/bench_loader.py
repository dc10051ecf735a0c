"""How fast batches are made: read, augmented and padded, in the training process and by workers that read ahead.

Arrays are made up: sequences of 177 nt with two profiles each, with and without base-pair probabilities; the share of
padding with and without length buckets is that of the clean training table, where there is one. The bar: ten times the
nucleotides a second that the base network trains on an H100, so that no loader keeps a GPU waiting.
"""

import json
import tempfile
import time
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from rich.console import Group
from rich.table import Table

from pipeline.arrays import create_mapped
from pipeline.batch import unpack
from pipeline.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from pipeline.dataset import BppArrays, ExampleSet
from pipeline.measure import RECORDS, machine_class
from pipeline.packing import padding_share, plan_epoch
from pipeline.paths import Paths
from pipeline.runlog import say
from pipeline.stage import versions, write_json
from pipeline.training.loader import BatchSource, Loader, Place

LENGTH = 177
_SEQUENCES = 20_000
_PAIRS = 320  # of a sequence; of 50 sequences of Ribonanza with 170 nt, ViennaRNA gave 306 of at least 1e-3 on average
_BATCH = 256
_WARM_UP, _BATCHES, _REPEATS = 4, 40, 3
_BASE, _TIMES = "ribonanza_mamba", 10  # the network whose training rate is the bar, and how often


def run(paths: Paths) -> Group:
    """Measure, print and write ``tests/benchmarks/loader-<class>.json``, one file for each class of machines."""
    cells = []
    with tempfile.TemporaryDirectory() as folder:
        for bpp in (False, True):
            examples = make_examples(Path(folder) / str(bpp), sequences=_SEQUENCES, bpp=bpp)
            for workers in (0, 1, 2):
                rates = [tokens_per_second(examples, workers=workers) for _ in range(_REPEATS)]
                cells.append({"bpp": bpp, "workers": workers, "tokens_per_s": round(median(rates)), "runs": rates})
                say(f"bpp {bpp}, {workers} workers: {cells[-1]['tokens_per_s']:,} nt/s")
    facts = {"length": LENGTH, "batch": _BATCH, "cells": cells, "padding": real_padding(paths), "bar": bar(RECORDS)}
    machine = machine_class()
    write_json(RECORDS / f"loader-{machine}.json", facts | {"machine": machine, "versions": versions()})
    return _table(facts)


def bar(records: Path) -> int | None:
    """Nucleotides a second that are asked for; None where no record tells how fast an H100 trains."""
    for path in sorted(records.glob("models-cuda-h100*.json")):
        rows = json.loads(path.read_text())["rows"]
        rates = [row["train"] for row in rows if (row["model"], row["length"]) == (_BASE, LENGTH) and row.get("train")]
        if rates:
            return round(_TIMES * max(rates))
    return None


def tokens_per_second(examples: ExampleSet, *, workers: int, batches: int = _BATCHES) -> float:
    """Nucleotides of batches that are ready for the device, a second, once all workers are at work."""
    config = RunConfig(
        model=ModelConfig(name=""), data=DataConfig(flip=0.5), train=TrainConfig(batch_size=_BATCH, epochs=1)
    )
    source = BatchSource(examples, np.arange(len(examples)), config=config)
    places = [Place(number // source.batches, number % source.batches, 0) for number in range(_WARM_UP + batches)]
    with Loader(source, workers=workers) as loader:
        for number, place in enumerate(places):
            if number == _WARM_UP:
                started = time.perf_counter()
            for packed in loader.take(place):
                unpack(packed)
        seconds = time.perf_counter() - started
    return sum(source.tokens(place) for place in places[_WARM_UP:]) / seconds


def make_examples(folder: Path, *, sequences: int, bpp: bool, length: int = LENGTH) -> ExampleSet:
    """Memory-mapped arrays of random sequences, as `pipeline.arrays` writes them."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    arrays: dict[str, tuple[type, np.ndarray]] = {
        "tokens": (np.uint8, rng.integers(0, 4, sequences * length)),
        "targets": (np.float32, rng.random((sequences * length, 2))),
        "ij": (np.uint16, np.sort(rng.integers(0, length, (sequences * _PAIRS, 2)), axis=1) if bpp else np.empty(0)),
        "p": (np.float32, rng.random(sequences * _PAIRS) if bpp else np.empty(0)),
    }
    mapped = {}
    for name, (dtype, values) in arrays.items():
        if len(values):
            create_mapped(folder / f"{name}.npy", dtype, values.shape)[...] = values
            mapped[name] = np.asarray(np.load(folder / f"{name}.npy", mmap_mode="r"))
    pairs = None
    if bpp:
        offsets = np.arange(sequences + 1) * _PAIRS
        pairs = BppArrays(key="", row_N=np.arange(sequences), offsets=offsets, ij_K2=mapped["ij"], p_K=mapped["p"])
    return ExampleSet(
        key="",
        tokens_T=mapped["tokens"],
        offsets=np.arange(sequences + 1) * length,
        ids_N=np.array([f"{number:012x}" for number in range(sequences)], dtype=bytes),
        targets_TC=mapped["targets"],
        weights_NC=np.ones((sequences, 2), dtype=np.float32),
        bpp=pairs,
    )


def real_padding(paths: Paths) -> dict[str, Any] | None:
    """Share of padding in an epoch of the clean training table, without and with length buckets."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    clean = paths.clean("train")
    if not clean.is_file():
        return None
    lengths_N = pc.binary_length(pq.read_table(clean, columns=["sequence"])["sequence"]).to_numpy().astype(np.int64)
    shares = {
        str(bucket): padding_share(lengths_N, plan_epoch(lengths_N, batch_size=64, bucket=bucket, seed=1, epoch=0))
        for bucket in (0, DataConfig().length_bucket)
    }
    return {"sequences": len(lengths_N), "share_by_bucket": shares}


def _table(facts: dict[str, Any]) -> Group:
    table = Table(box=None, pad_edge=False, title=f"{LENGTH} nt, batches of {_BATCH}", title_justify="left")
    for name in ("base-pair probabilities", "workers", "nt/s"):
        table.add_column(name, justify="right")
    for cell in facts["cells"]:
        table.add_row("yes" if cell["bpp"] else "no", str(cell["workers"]), f"{cell['tokens_per_s']:,}")
    shares = facts["padding"]["share_by_bucket"] if facts["padding"] else {}
    for bucket, share in shares.items():
        table.add_row(f"padding, buckets of {bucket}", "", f"{share:.1%}")
    return Group(table, _verdict(facts))


def _verdict(facts: dict[str, Any]) -> str:
    # the base network reads base-pair probabilities
    wanted, found = facts["bar"], max(cell["tokens_per_s"] for cell in facts["cells"] if cell["bpp"])
    if wanted is None:
        return (
            f"bar: {_TIMES} x the rate at which {_BASE} trains on an H100, which make bench-models has to measure there"
        )
    return (
        f"bar: {_TIMES} x {_BASE} on an H100 = {wanted:,} nt/s: {'met' if found >= wanted else 'NOT met'}, "
        f"{found / wanted:.1f} times that"
    )
