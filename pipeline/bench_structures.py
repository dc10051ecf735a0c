"""What a target takes by its length: pairing, de novo assembly, template search, and the network's five.

Every stage runs as for a test set of one random sequence, with what its run on the training targets has learned, in a
process of its own: seconds of the stage, loading what was learned included, and the most memory of its process.
"""

import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from pipeline import bpp, measure, predict
from pipeline.competitions import get_competition
from pipeline.errors import DataError
from pipeline.paths import Paths
from pipeline.schema import decode
from pipeline.structure import predict as denovo
from pipeline.templates import predict as templates

#: nt; the last is part 2's longest test target, whose five are made from pairing alone.
LENGTHS = (30, 100, 300, 1_000, 2_000, 4_640)
_MODULE = "pipeline.bench_structures"
_STAGES = ("pairing", "de novo", "templates", "network")


def run(paths: Paths, *, split: str, network: str) -> None:
    """Measure, print and write ``tests/benchmarks/structures-<class>.json``.

    Args:
        paths: of a competition of structures whose chain has run.
        split: of its runs without a network.
        network: the run of a network, whose fold 0 predicts.

    Raises:
        ConfigError: the competition is not about structures.
        DataError: one of the runs is not there.
    """
    get_competition(paths.comp).require_structures("bench-structures")
    sources = [paths.run_dir(denovo.run_name(split)), paths.run_dir(templates.run_name(split))]
    sources.append(paths.fold_dir(network, 0) / "checkpoints")
    for source in sources:
        if not source.is_dir():
            raise DataError(f"bench-structures: {source} is not there. Next: make train-all COMP={paths.comp}.")
    rows = []
    for length in LENGTHS:
        with tempfile.TemporaryDirectory() as folder:
            own = Paths(comp=paths.comp, root=Path(folder))
            write_target(own, like=paths, length=length)
            shutil.copytree(sources[-1], own.fold_dir(network, 0) / "checkpoints")
            cell = {"artifacts": folder, "learned": str(paths.root), "comp": paths.comp, "split": split, "threads": 1}
            row: dict[str, Any] = {"nt": length}
            for stage in _STAGES:
                found = measure.spawn(_MODULE, cell | {"stage": stage, "network": network}) or {}
                row |= {f"{stage}, s": found.get("seconds"), f"{stage}, MiB": found.get("peak_mib")}
            rows.append(row)
    measure.publish(rows, stem="structures", threads=1)


def write_target(own: Paths, *, like: Paths, length: int) -> None:
    """The clean test table of one random sequence, with the columns of another."""
    letters = decode(np.random.default_rng(length).integers(0, 4, length).astype(np.uint8))
    row = pl.read_parquet(like.clean("test")).head(1)
    row = row.with_columns(
        sequence_id=pl.lit("random"),
        sequence=pl.lit(letters),
        chain_lengths=pl.lit([length], dtype=row.schema["chain_lengths"]),
    )
    own.clean("test").parent.mkdir(parents=True)
    row.write_parquet(own.clean("test"))


def measure_stage(cell: dict[str, Any]) -> dict[str, float]:
    """Seconds and peak memory of one stage, in this process."""
    own = Paths(comp=cell["comp"], root=Path(cell["artifacts"]))
    learned = Paths(comp=cell["comp"], root=Path(cell["learned"]))
    competition, split = get_competition(cell["comp"]), cell["split"]
    what: dict[str, Any] = {"competition": competition, "split": split}
    stages: dict[str, Callable[[], Any]] = {
        "pairing": lambda: bpp.run(own, tables=("test",), workers=1),
        "de novo": lambda: denovo.apply(own, **what, source=learned.run_dir(denovo.run_name(split))),
        "templates": lambda: templates.apply(own, **what, source=learned.run_dir(templates.run_name(split))),
        "network": lambda: predict.run(
            competition=competition, paths=own, run=cell["network"], fold=0, which=("test",)
        ),
    }
    started = time.perf_counter()
    stages[cell["stage"]]()
    return {"seconds": round(time.perf_counter() - started, 2), "peak_mib": round(measure.peak_mib())}


if __name__ == "__main__":
    measure.answer(measure_stage)
