"""What predictions are worth: files checked, scored, drawn and reported."""

from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.cli.options import (
    ARTIFACTS,
    COMP,
    NAME,
    SPLIT,
    Artifacts,
    Comp,
    Name,
    Split,
    Tag,
    find_competition,
    find_paths,
)
from pipeline.cli.own import OwnFile, OwnSequence, predict_structures, source_of
from pipeline.cli.program import show, verb
from pipeline.errors import ConfigError, DataError
from pipeline.paths import Paths
from pipeline.runs import find_run, read_run_name, warn_of_other_data, warn_of_seen_before, whole_name

SingleRun = Annotated[str, typer.Option("--run", help="A single run, <model>[.<split>], instead of the ensemble.")]
Engine = Annotated[
    str, typer.Option("--engine", help="Of TM-scores: built-in, usalign (the program), or auto: it, where installed.")
]


@verb()
def check(
    file: Annotated[Path, typer.Argument(help="A submission: CSV, CSV.GZ or parquet.")],
    comp: Comp = COMP,
    artifacts: Artifacts = ARTIFACTS,
    sample: Annotated[Path | None, typer.Option("--sample", help="Check against this sample submission.")] = None,
) -> None:
    """Check a submission file: columns, every id in order, finite values in range."""
    from submissions import check as stage

    if file == Path():
        raise ConfigError("check: no file given; expected a submission. Next: make check FILE=my.csv.")
    competition, paths = find_competition(comp, artifacts), find_paths(comp, artifacts)
    try:
        report = stage.run(paths, competition=competition, file=file, sample=sample)
    except DataError as err:
        if comp != COMP:
            raise
        said, _, advice = str(err).rpartition(" Next: ")  # who says no COMP may have meant another one
        said = f"{said.removesuffix('.')}; checked as COMP={comp}"
        raise DataError(f"{said}. Next: {advice.removesuffix('.')}, or give COMP.") from err
    show(report, f"accepted: {report.facts['rows']:,} rows, every id in its place, every value finite and in range")


@verb()
def evaluate(
    comp: Comp = COMP,
    artifacts: Artifacts = ARTIFACTS,
    split: Split = SPLIT,
    name: Name = NAME,
    single_run: SingleRun = "",
    engine: Engine = "built-in",
) -> None:
    """Score the out-of-fold predictions by the organisers' metric, beside the trivial floors."""
    from submissions import evaluate as stage

    competition, paths = find_competition(comp, artifacts), find_paths(comp, artifacts)
    which = _which(name, single_run, split=split, paths=paths)
    split = read_run_name(which["run"])[2] if single_run else split
    report = stage.run(paths, competition=competition, split=split, engine=engine, **which)
    runs = [which["run"]] if single_run else [*report.facts["runs"]]
    warn_of_other_data(paths, runs)
    warn_of_seen_before(paths, runs, report.facts["folds"])
    show(report, stage.describe(report.facts))


@verb("score-tm")
def score_tm(
    traces: Annotated[Path, typer.Option("--traces", help="Folder with models, model_traces, native_traces.parquet.")],
    out: Annotated[Path, typer.Option("--out", help="Parquet file for model_id, tm_byresi, tm_seqindep.")],
    engine: Engine = "built-in",
) -> None:
    """Score a folder of C1' traces by both TM-scores: residues matched by number, and by the shapes alone.

    Columns: models: model_id, benchmark, target; model_traces: model_id, resid, x, y, z; native_traces: benchmark,
    target, resid, resname, x, y, z (Å).
    """
    from submissions import score_traces as stage

    report = stage.run(traces, out, engine=engine)
    show(report, stage.describe(report.facts))


@verb()
def structures(
    file: OwnFile = None,
    sequence: OwnSequence = "",
    comp: Comp = "rna3d",
    artifacts: Artifacts = ARTIFACTS,
    split: Split = SPLIT,
    name: Name = NAME,
    table: Annotated[str, typer.Option("--table", help="test, or oof for the training targets.")] = "test",
    model: Annotated[
        str, typer.Option("--model", help="RNAs of your own: by this run alone, its name or folder.")
    ] = "",
    tag: Tag = "",
) -> None:
    """Write predicted structures as PDB and mmCIF files, and a page that shows them, also offline.

    For RNAs of your own, structures are predicted first: as the ensemble of this name does or, without one, by assembly
    from pairing, and by templates if these were made; with --model by a single run: a network, denovo or templates.
    """
    from submissions import structure_files as stage

    source = source_of(file, sequence, find_paths(comp, artifacts))
    if source is not None:
        which: dict[str, Any] = {"competition": find_competition(comp, artifacts), "split": split, "name": name}
        which["run"] = find_run(model, split=split, tag=tag) if model else None
        predict_structures(source, paths=find_paths(comp, artifacts), **which)
        return
    if model:
        raise ConfigError("structures: --model is for RNAs of your own. Next: give them with it, or leave it out.")
    show(stage.run(find_paths(comp, artifacts), competition=find_competition(comp, artifacts), name=name, table=table))


@verb()
def report(
    comp: Comp = COMP,
    artifacts: Artifacts = ARTIFACTS,
    split: Split = SPLIT,
    name: Name = NAME,
    single_run: SingleRun = "",
) -> None:
    """Write one self-contained HTML page: curves, calibration, errors, heat maps, configuration, hashes."""
    from submissions import report as stage

    paths = find_paths(comp, artifacts)
    which = _which(name, single_run, split=split, paths=paths)
    show(stage.run(paths, competition=find_competition(comp, artifacts), **which))


def _which(name: str, single_run: str, *, split: str, paths: Paths) -> dict[str, str]:
    """The ensemble or the run that is meant, as stages take it."""
    return {"run": whole_name(single_run, split=split, paths=paths)} if single_run else {"name": name}
