"""Sequences of one's own: what `predict` and `structures` do where they are given some, from the file to its tables."""

import time
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer

from pipeline.cli.options import find_trained
from pipeline.cli.program import show
from pipeline.errors import ConfigError
from pipeline.paths import Paths
from pipeline.runlog import amount, say
from pipeline.runs import check_fold
from pipeline.stage import read_result

OwnFile = Annotated[
    Path | None,
    typer.Argument(
        help="Sequences of your own: FASTA, CSV, TSV or parquet, text also as .gz; without, the test set.",
        show_default=False,
    ),
]
OwnFeatures = Annotated[
    list[str] | None,
    typer.Option(
        "--features", help="name=<folder or parquet>: features of your own sequences, where a network reads some."
    ),
]
OwnSequence = Annotated[str, typer.Option("--sequence", help="Or a single sequence of your own.")]


class Own(NamedTuple):
    """Sequences of one's own."""

    path: Path
    title: str  #: of their page


def source_of(file: Path | None, sequence: str, paths: Paths) -> Own | None:
    """The file that is meant, a single sequence as a file of its own; None where neither is given."""
    if file is not None and sequence:
        raise ConfigError(f"{file}: given beside a sequence; expected one of them. Next: leave FILE or SEQ out.")
    if not sequence:
        return None if file is None else Own(file, file.name)
    from pipeline.own_file import write_single  # which torch comes with
    from submissions.subject import brief

    return Own(write_single(sequence, paths), brief(sequence))


def embeddings_of(features: list[str] | None) -> dict[str, Path]:
    """Name -> source of the features that are given."""
    found = {}
    for item in features or ():
        name, is_given, source = item.partition("=")
        if not is_given:
            raise ConfigError(f'--features {item!r}: expected name=<folder or parquet>. Next: write FEATURES="name=…".')
        found[name] = Path(source)
    return found


def predict_file(
    source: Own,
    *,
    competition: Any,
    paths: Paths,
    model: str,
    split: str,
    tag: str,
    fold: int | None,
    ensemble: str,
    embeddings: dict[str, Path],
) -> None:
    """Predict a file with the folds of a run, joined by their mean, or with an ensemble, and write its tables."""
    from folds import ensemble as joining
    from pipeline import own_file
    from pipeline.labels import read_classes
    from submissions import own_tables
    from submissions.class_write import thresholds_here

    started = time.monotonic()
    own_file.require_no_structures(competition)
    with own_file.held(source.path, paths, verb="predict"):
        given: dict[str, Any] = {"competition": competition, "paths": paths, "embeddings": embeddings}
        if ensemble:
            done = own_file.predict_ensemble(source.path, name=ensemble, **given)
        else:
            run = find_trained(model, split=split, tag=tag, paths=paths)
            only = None if fold is None else check_fold(fold, split)
            done = own_file.predict_run(source.path, run=run, fold=only, **given)
        joining.apply(done.own, competition=done.competition, name=done.name, weights=done.weights)
        folder = own_file.folder_of(source.path, paths)
        which: dict[str, Any] = {"name": done.name, "folder": folder, "title": source.title, "longest": done.longest}
        if done.competition.task == "classes" and not (classes := read_classes(done.own)).exclusive:
            joined = read_result(done.weights, hint="make ensemble")
            of_folds = [] if ensemble else [paths.oof(run, k) for k in joined["folds"]]
            tables = of_folds or [paths.ensemble_dir(ensemble) / "oof.parquet"]
            which["thresholds"], words = thresholds_here(paths, classes, told=joined, tables=tables)
            say(f"labels: {words}")
        report = own_tables.run(done.own, competition=done.competition, **which)
        told = f"{amount(report.facts['sequences'], 'sequence')}, {done.about}"
        show(replace(report, seconds=time.monotonic() - started), told)


def predict_structures(
    source: Own, *, competition: Any, paths: Paths, split: str, name: str, run: str | Path | None
) -> None:
    """Give the RNAs of a file their candidates, and write them as files, as a table and as a page."""
    from folds import ensemble as joining
    from pipeline import own_file, own_structures
    from pipeline.training.stop import StopRequest
    from submissions import structure_files

    started = time.monotonic()
    competition.require_structures("structures")
    with StopRequest(), own_file.held(source.path, paths, verb="structures"):
        which: dict[str, Any] = {"competition": competition, "name": name, "run": run}
        done = own_structures.predict(source.path, paths=paths, split=split, **which)
        joining.apply(done.own, competition=competition, name=done.name, weights=done.weights, partial_runs=True)
        home = own_file.folder_of(source.path, paths) / "structures"
        table = own_structures.write_table(done, home / "candidates.csv")
        report = structure_files.run(done.own, competition=competition, name=done.name, home=home, title=source.title)
    show(table, f"{amount(table.facts['sequences'], 'RNA')}, {done.about}")
    show(replace(report, seconds=time.monotonic() - started))
