"""From checkpoints to a submission file."""

from dataclasses import replace
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
    Fold,
    Kernels,
    Model,
    Name,
    Sets,
    Split,
    Tag,
    TestOnly,
    find_competition,
    find_paths,
    find_trained,
)
from pipeline.cli.own import OwnFeatures, OwnFile, OwnSequence, embeddings_of, predict_file, source_of
from pipeline.cli.program import show, verb
from pipeline.errors import ConfigError
from pipeline.paths import PRETRAINED
from pipeline.runs import (
    check_fold,
    finished_runs,
    run_name,
    warn_of_other_data,
    warn_of_seen_before,
    warn_of_unfinished,
    whole_name,
)


@verb()
def predict(
    file: OwnFile = None,
    sequence: OwnSequence = "",
    comp: Comp = COMP,
    artifacts: Artifacts = ARTIFACTS,
    model: Model = "",
    split: Split = SPLIT,
    fold: Annotated[
        int | None, typer.Option("--fold", help="Trained fold, from 0; of sequences of your own all of them.", min=0)
    ] = None,
    tag: Tag = "",
    set_: Sets = None,
    ensemble: Annotated[
        str, typer.Option("--name", help="Sequences of your own: by all runs and folds of this ensemble.")
    ] = "",
    features: OwnFeatures = None,
    test_only: TestOnly = False,
    partial: Annotated[
        bool, typer.Option("--partial", help="Test sequences whose pairs bpp --partial had no time for are left out.")
    ] = False,
    kernels: Kernels = "auto",
) -> None:
    """Predict the held-out fold and the test set with a trained checkpoint, or sequences of your own with all folds.

    A checkpoint carries its own configuration. Of sequences of your own a table is written that a spreadsheet opens,
    and of values per nucleotide a page that shows them; --model may be the folder of a run, too, or reactivity-v2,
    weights that come with the program.
    """
    from pipeline.training.stop import StopRequest

    del set_  # the checkpoint's own settings hold
    with StopRequest():
        paths = find_paths(comp, artifacts)
        source = source_of(file, sequence, paths)
        if source is not None:
            which: dict[str, Any] = {"model": model, "split": split, "tag": tag, "fold": fold, "ensemble": ensemble}
            which["embeddings"] = embeddings_of(features)
            predict_file(source, competition=find_competition(comp, artifacts), paths=paths, **which)
            return
        from pipeline import predict as stage

        run = find_trained(model, split=split, tag=tag, paths=paths)
        if (PRETRAINED / model).is_dir():
            raise ConfigError(
                f"predict: MODEL={model} are weights for sequences of your own; got none, neither FILE nor SEQ. Next: "
                f"make predict MODEL={model} FILE=my.fasta."
            )
        run = run_name(model, split=split, tag=tag)
        where: dict[str, Any] = {"paths": paths, "run": run, "fold": check_fold(fold or 0, split)}
        where |= {"which": ("test",)} if test_only else {}
        where |= {"partial_pairs": True} if partial else {}
        show(stage.run(competition=find_competition(comp, artifacts), **where))


@verb()
def embed(
    file: Annotated[Path, typer.Argument(help="Sequences: FASTA, CSV, TSV or parquet; text also as .gz.")],
    comp: Comp = COMP,
    artifacts: Artifacts = ARTIFACTS,
    model: Model = "",
    split: Split = SPLIT,
    fold: Fold = 0,
    tag: Tag = "",
    per_nucleotide: Annotated[
        bool, typer.Option("--per-nucleotide", help="Also the embedding of every nucleotide.")
    ] = False,
    features: OwnFeatures = None,
    kernels: Kernels = "auto",
) -> None:
    """Write the last hidden layer of a trained checkpoint for any sequences: their mean, and each nucleotide's."""
    from pipeline.training.stop import StopRequest

    paths = find_paths(comp, artifacts)
    run = find_trained(model, split=split, tag=tag, paths=paths)
    with StopRequest():
        from pipeline import embed as stage

        where: dict[str, Any] = {"paths": paths, "run": run, "fold": check_fold(fold, split)}
        where |= {"per_nucleotide": per_nucleotide, "embeddings": embeddings_of(features)}
        report = stage.run(file, competition=find_competition(comp, artifacts), **where)
    show(report, "sequences: {sequences:,}, of {nucleotides:,} nt in all, {width} numbers each".format(**report.facts))


@verb()
def ensemble(
    comp: Comp = COMP,
    artifacts: Artifacts = ARTIFACTS,
    split: Split = SPLIT,
    name: Name = NAME,
    run: Annotated[
        list[str] | None, typer.Option("--run", help="Run to use, or several with commas; default: every finished one.")
    ] = None,
    weights: Annotated[
        Path | None, typer.Option("--weights", help="Join test predictions alone, by an earlier weights.json.")
    ] = None,
    use: Annotated[
        list[int] | None, typer.Option("--fold", help="With --weights: use these folds; repeatable.", min=0)
    ] = None,
    partial: Annotated[
        bool, typer.Option("--partial", help="Only folds that all runs have; with --weights: structures there are.")
    ] = False,
) -> None:
    """Join folds and models into one prediction table, with weights learned on out-of-fold predictions."""
    from folds import ensemble as stage
    from submissions.tm_score import tm_scores

    paths = find_paths(comp, artifacts)
    if weights is not None:
        which: dict[str, Any] = {"weights": weights, "folds": use or None, "partial_runs": partial}
        report = stage.apply(paths, competition=find_competition(comp, artifacts), name=name, **which)
        show(report, f"{report.facts['test_rows']:,} test rows from folds {report.facts['folds']}")
        return
    given = [each for runs in run or () for each in runs.replace(",", " ").split()]  # as data.pseudo takes them
    named = [whole_name(each, split=split, paths=paths) for each in given]
    runs = named or finished_runs(paths, split, partial=partial)
    warn_of_unfinished(paths, runs)
    warn_of_other_data(paths, runs)
    which = {"name": name, "runs": runs, "split": split, "allow_partial": partial}
    report = stage.run(paths, competition=find_competition(comp, artifacts), score=tm_scores, **which)
    warn_of_seen_before(paths, runs, report.facts["folds"])
    show(report, stage.describe(report.facts))


@verb()
def submit(
    comp: Comp = COMP,
    artifacts: Artifacts = ARTIFACTS,
    name: Name = NAME,
    fmt: Annotated[str, typer.Option("--format", help="csv or parquet.")] = "csv",
    to: Annotated[
        Path | None,
        typer.Option(
            "--to", help="Folder of the file; default: submissions/csv, or submissions in another artifacts folder."
        ),
    ] = None,
    fill: Annotated[
        bool, typer.Option("--fill", help="Where nothing is predicted: simple shapes; in a notebook medians.")
    ] = False,
) -> None:
    """Write the submission file and check it; an invalid file never gets its final name."""
    from submissions import write

    paths = replace(find_paths(comp, artifacts), submissions=to)
    report = write.run(paths, competition=find_competition(comp, artifacts), name=name, fmt=fmt, fill=fill)
    show(report, write.describe(report.facts))
