"""Times of our stages and networks beside those of others."""

from pathlib import Path
from typing import Annotated

import typer

from pipeline.cli.options import ARTIFACTS, COMP, SPLIT, Artifacts, Comp, Model, Split, find_paths
from pipeline.cli.program import verb
from pipeline.runlog import output
from pipeline.runs import run_name

Rounds = Annotated[int, typer.Option("--rounds", help="Measurements of each cell, in turn; the median counts.", min=1)]


@verb("bench-data")
def bench_data(artifacts: Artifacts = ARTIFACTS) -> None:
    """Time the data stage on a 100,000-row CSV beside pandas, polars, pyarrow and duckdb."""
    from pipeline import bench_data as bench

    bench.run(folder=artifacts / "bench")


@verb("bench-kernels")
def bench_kernels(rounds: Rounds = 2) -> None:
    """Time Mamba's scan and Hyena's long convolution beside other implementations; memory and slopes too."""
    from pipeline import bench_kernels as bench

    bench.run(rounds=rounds)


@verb("bench-models")
def bench_models(rounds: Rounds = 2) -> None:
    """Time training and prediction of whole networks beside RibonanzaNet's architecture; memory too."""
    from pipeline import bench_models as bench

    bench.run(rounds=rounds)


@verb("bench-tm")
def bench_tm(
    traces: Annotated[Path, typer.Option("--traces", help="Folder of C1' traces, as score-tm reads it.")],
) -> None:
    """Time both TM-scores beside one process a pair of US-align, or else of TM-align, and compare the scores."""
    from pipeline import measure
    from submissions import bench_tm as bench

    output.print(bench.run(traces, record=measure.RECORDS / f"tm-{measure.machine_class()}.json"))


@verb("bench-structures")
def bench_structures(
    comp: Comp = "rna3d", artifacts: Artifacts = ARTIFACTS, model: Model = "", split: Split = SPLIT
) -> None:
    """Measure what each way to five traces takes, by the length of a target, after train-all."""
    from pipeline import bench_structures as bench

    bench.run(find_paths(comp, artifacts), split=split, network=run_name(model, split=split))


@verb("bench-loader")
def bench_loader(artifacts: Artifacts = ARTIFACTS, comp: Comp = COMP) -> None:
    """Time the making of batches, with and without workers, and count the padding of the clean training table."""
    from pipeline import bench_loader as bench

    output.print(bench.run(find_paths(comp, artifacts)))


@verb("bench-folds")
def bench_folds(artifacts: Artifacts = ARTIFACTS, comp: Comp = COMP) -> None:
    """Time the clustering beside MMseqs2 and cd-hit, and count the relatives each leaves across folds."""
    from folds import bench

    output.print(bench.run(find_paths(comp, artifacts), folder=artifacts / "bench"))
