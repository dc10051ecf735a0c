"""From raw files to clean tables and folds."""

from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.cli.options import (
    ARTIFACTS,
    COMP,
    SPLIT,
    Artifacts,
    Comp,
    Split,
    TestOnly,
    find_competition,
    find_paths,
    seconds_of,
)
from pipeline.cli.program import show, verb
from pipeline.errors import ConfigError
from pipeline.runlog import amount


@verb()
def download(
    comp: Comp = COMP,
    artifacts: Artifacts = ARTIFACTS,
    file: Annotated[
        list[str] | None, typer.Option("--file", help="A file's name on Kaggle, or all; default: what data reads.")
    ] = None,
) -> None:
    """Fetch a competition's files from Kaggle; started again it resumes, and it checks what came."""
    from pipeline import download as stage

    report = stage.run(find_competition(comp), find_paths(comp, artifacts), files=file or ())
    show(report, f"{amount(len(report.facts['files']), 'file')}, {report.facts['bytes']:,} bytes")


@verb()
def data(
    raw: Annotated[
        str,
        typer.Option(
            "--raw", help="Folder or zip with the files, or the training file of a set of your own; default: raw/."
        ),
    ] = "",
    comp: Comp = COMP,
    artifacts: Artifacts = ARTIFACTS,
    test_only: TestOnly = False,
    rows: Annotated[
        int | None, typer.Option("--rows", help="With --test-only: so many test sequences, for a trial.", min=1)
    ] = None,
) -> None:
    """Read and check the raw files, and write clean tables with a validation report."""
    from pipeline import preprocess

    competition, paths = find_competition(comp), find_paths(comp, artifacts)
    if not raw and not any(paths.raw.glob("[!.]*")):  # a download that was refused leaves a folder with a dot
        raise ConfigError(
            f"data: RAW is empty and {paths.raw} holds no files. Next: RAW=<folder> with the files, or make download."
        )
    if rows is not None and not test_only:
        raise ConfigError("data: --rows shortens the test set alone. Next: give --test-only with it, or leave it out.")
    folder = Path(raw) if raw else paths.raw
    report = preprocess.run(competition, folder, paths, test_only=test_only, rows=rows)
    show(report, preprocess.describe(report.facts))


@verb()
def bpp(
    comp: Comp = COMP,
    artifacts: Artifacts = ARTIFACTS,
    workers: Annotated[int | None, typer.Option("--workers", help="Processes; default: one per CPU.", min=1)] = None,
    test_only: TestOnly = False,
    longest: Annotated[
        int | None, typer.Option("--longest", help="Leave out longer sequences, nt; the next call adds them.", min=1)
    ] = None,
    time_budget: Annotated[str, typer.Option("--time-budget", help="Stop, resumable, after this time: 8h.")] = "",
    partial: Annotated[
        bool, typer.Option("--partial", help="With --time-budget: write what is folded when the time is up.")
    ] = False,
) -> None:
    """Compute base-pair probabilities of all sequences with ViennaRNA (needed by models with use_bpp = true)."""
    from pipeline import bpp as stage

    tables = ("test",) if test_only else ("train", "test")
    how: dict[str, Any] = {"workers": workers, "longest": longest, "time_budget": seconds_of(time_budget)}
    report = stage.run(find_paths(comp, artifacts), tables=tables, partial=partial, **how)
    show(report, stage.describe(report.facts))


@verb()
def features(
    source: Annotated[
        Path,
        typer.Argument(help="A parquet file as embed writes it, a folder of <sequence_id>.npy, or its index.csv."),
    ],
    name: Annotated[str, typer.Option("--name", help="By which data.features asks for them: rnafm, for example.")] = "",
    comp: Comp = COMP,
    artifacts: Artifacts = ARTIFACTS,
) -> None:
    """Bring in embeddings of all sequences, of each or of its nucleotides, that networks then read (data.features)."""
    from pipeline import features as stage

    report = stage.run(source, name=name, paths=find_paths(comp, artifacts))
    show(report, stage.describe(report.facts))


@verb()
def folds(
    comp: Comp = COMP,
    artifacts: Artifacts = ARTIFACTS,
    split: Split = SPLIT,
    relock: Annotated[bool, typer.Option("--relock", help="Write the lock of this split for these data.")] = False,
) -> None:
    """Cluster the sequences and assign every one to a fold, near-copies together; verify against the lock."""
    from folds import assign

    report = assign.run(find_paths(comp, artifacts), split=split, relock=relock)
    show(report, assign.describe(report.facts))


@verb()
def audit(
    comp: Comp = COMP,
    artifacts: Artifacts = ARTIFACTS,
    split: Annotated[list[str] | None, typer.Option("--split", help="Split to audit; repeatable.")] = None,
) -> None:
    """Measure how much a split leaks: highest cross-fold identity, and the score of copying the nearest neighbour."""
    from folds import audit as stage

    competition, paths = find_competition(comp, artifacts), find_paths(comp, artifacts)
    report = stage.run(paths, splits=split or [SPLIT], competition=competition)
    show(report, stage.describe(report.facts))
