"""The program ``rna``: one verb per stage. The roof of the house: the only module that may call every package.

Verbs import what they need when they run, so that `rna --help` and the stages without a network start at once.
"""

import atexit
import contextlib
import json
import locale
import os
import re
import sys
import time
import traceback
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.table import Table
from rich.text import Text
from typer.core import TyperCommand

from pipeline import commands
from pipeline.errors import ConfigError, DataError, PipelineError, StorageError
from pipeline.paths import Paths
from pipeline.runlog import Unbreakable, console, output, say
from pipeline.runs import check_fold, finished_runs, fold_count, run_name, warn_of_unfinished
from pipeline.stage import Report

app = typer.Typer(
    help="RNA competitions: raw files to checked, scored submissions. Each verb is one stage and can be run twice.",
    epilog="Order: data, folds, (bpp), train, ensemble, submit, evaluate, report. Exit codes: 0 done, 2 configuration, "
    "3 data, 4 diverged, 5 storage or memory, 6 network or credentials, 7 died repeatedly, 75 stopped and resumable.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class _Verb(TyperCommand):
    """A verb that leaves word of what it was told, for the commands that its sentences end with."""

    def invoke(self, ctx: Any) -> Any:
        """Run it."""
        told = dict(ctx.params)
        if "comp" in told and told.get("model") == _competition(told["comp"]).default_model:
            del told["model"]
        verbs = ctx.find_root().command.commands
        commands.remember(told, verbs={name: [option.name for option in one.params] for name, one in verbs.items()})
        return super().invoke(ctx)


verb = partial(app.command, cls=_Verb)

Comp = Annotated[
    str,
    typer.Option(
        "--comp", help="ribonanza, openvaccine, rna3d, rna3d2, or labelled-<name> for a set of your own.", is_eager=True
    ),
]
Artifacts = Annotated[
    Path, typer.Option("--artifacts", help="Folder where the stages write.", envvar="RNA_ARTIFACTS", file_okay=False)
]


def _model_or_default(context: typer.Context, model: str) -> str:
    """The named model, or the competition's own; `Comp` is eager, so that it is known here."""
    return model or str(_competition(context.params["comp"]).default_model)


Model = Annotated[
    str,
    typer.Option(
        "--model",
        help="A config of pipeline/configs by name, or a TOML file by path; unless given, the competition's own.",
        show_default=False,
        callback=_model_or_default,
    ),
]
Split = Annotated[str, typer.Option("--split", help="Split: sim80_k5, length_k5 or random_k5.")]
Fold = Annotated[int, typer.Option("--fold", help="Fold to hold out, from 0.", min=0)]
Tag = Annotated[str, typer.Option("--tag", help="Names a variant of the model; needed with --set.")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", help="Override, as TOML: train.lr=1e-3. May be given several times.")
]
Rounds = Annotated[int, typer.Option("--rounds", help="Measurements of each cell, in turn; the median counts.", min=1)]
Name = Annotated[str, typer.Option("--name", help="Name of the ensemble.")]
Engine = Annotated[
    str, typer.Option("--engine", help="Of TM-scores: built-in, usalign (the program), or auto: it, where installed.")
]
Source = Annotated[
    Path | None, typer.Option("--from", help="Folder of an earlier run: the test set alone, with what it learned.")
]
StageBudget = Annotated[str, typer.Option("--time-budget", help="With --from: begin no target after this time: 90s.")]
TestOnly = Annotated[
    bool, typer.Option("--test-only", help="The test set alone: where checkpoints came from elsewhere.")
]


def _ask_for_kernels(mode: str) -> str:
    """Set the variable that `models.layers.kernels` reads: networks start late, and child processes inherit it."""
    if mode not in ("auto", "reference"):
        raise ConfigError(f"--kernels {mode!r} (or RNA_KERNELS): expected auto or reference. Next: choose one of them.")
    os.environ["RNA_KERNELS"] = mode
    return mode


Kernels = Annotated[
    str,
    typer.Option(
        "--kernels",
        help="auto: the fastest that is usable; reference: plain PyTorch.",
        envvar="RNA_KERNELS",
        callback=_ask_for_kernels,
    ),
]

_MOST_OUTPUTS = 8  # named one by one: a stage that writes every fold has a dozen
_INTERRUPTED = 130  # what a shell says of a program that Ctrl-C ended, and what typer makes of it
_COMP, _ARTIFACTS, _SPLIT, _NAME = "ribonanza", Path("artifacts"), "sim80_k5", "all"


@verb()
def doctor(artifacts: Artifacts = _ARTIFACTS) -> None:
    """Say what this machine has, what of it is usable, and what will be used."""
    from pipeline.doctor import examine

    table = Table(box=None, show_header=False, pad_edge=False)
    marks = {"ok": "[green]ok[/]", "absent": "[dim]--[/]", "problem": "[red]!![/]"}
    for finding in examine(artifacts):
        table.add_row(marks[finding.state], f"[bold]{finding.what}[/]", finding.detail)
    output.print(table)


@verb()
def demo(
    artifacts: Annotated[Path, typer.Option("--artifacts", help="Folder for everything the demo makes.")] = Path(
        "artifacts/demo"
    ),
    seed: Annotated[int, typer.Option("--seed", help="Of the synthetic data.", min=0)] = 0,
) -> None:
    """Run the whole chain, all competitions, on small synthetic data sets (CPU, under three minutes)."""
    from pipeline.demo import run

    run(artifacts, seed=seed)


@verb()
def download(
    comp: Comp = _COMP,
    artifacts: Artifacts = _ARTIFACTS,
    file: Annotated[
        list[str] | None, typer.Option("--file", help="A file's name on Kaggle, or all; default: what data reads.")
    ] = None,
) -> None:
    """Fetch a competition's files from Kaggle; started again it resumes, and it checks what came."""
    from pipeline import download as stage

    report = stage.run(_competition(comp), _paths(comp, artifacts), files=file or ())
    show(report, f"{len(report.facts['files'])} files, {report.facts['bytes']:,} bytes")


@verb()
def data(
    raw: Annotated[
        str,
        typer.Option("--raw", help="Folder with the files (or the training file of a labelled set); default: raw/."),
    ] = "",
    comp: Comp = _COMP,
    artifacts: Artifacts = _ARTIFACTS,
    test_only: TestOnly = False,
    rows: Annotated[
        int | None, typer.Option("--rows", help="With --test-only: so many test sequences, for a trial.", min=1)
    ] = None,
) -> None:
    """Read and check the raw files, and write clean tables with a validation report."""
    from pipeline import preprocess

    competition, paths = _competition(comp), _paths(comp, artifacts)
    if not raw and not paths.raw.is_dir():
        raise ConfigError(
            f"data: RAW is empty and {paths.raw} does not exist. Next: RAW=<folder> with the files, or make download."
        )
    if rows is not None and not test_only:
        raise ConfigError("data: --rows shortens the test set alone. Next: give --test-only with it, or leave it out.")
    folder = Path(raw).expanduser() if raw else paths.raw
    report = preprocess.run(competition, folder, paths, test_only=test_only, rows=rows)
    show(report, preprocess.describe(report.facts))


@verb()
def bpp(
    comp: Comp = _COMP,
    artifacts: Artifacts = _ARTIFACTS,
    workers: Annotated[int | None, typer.Option("--workers", help="Processes; default: one per CPU.")] = None,
    test_only: TestOnly = False,
    longest: Annotated[
        int | None, typer.Option("--longest", help="Leave out longer sequences, nt; the next call adds them.", min=1)
    ] = None,
) -> None:
    """Compute base-pair probabilities of all sequences with ViennaRNA (needed by models with use_bpp = true)."""
    from pipeline import bpp as stage

    tables = ("test",) if test_only else ("train", "test")
    report = stage.run(_paths(comp, artifacts), workers=workers, tables=tables, longest=longest)
    show(report, "{sequences:,} sequences, {pairs:,} pairs".format(**report.facts))


@verb()
def folds(
    comp: Comp = _COMP,
    artifacts: Artifacts = _ARTIFACTS,
    split: Split = _SPLIT,
    relock: Annotated[bool, typer.Option("--relock", help="Write the lock of this split for these data.")] = False,
) -> None:
    """Cluster the sequences and assign every one to a fold, near-copies together; verify against the lock."""
    from folds import assign

    report = assign.run(_paths(comp, artifacts), split=split, relock=relock)
    show(report, assign.describe(report.facts))


@verb()
def audit(
    comp: Comp = _COMP,
    artifacts: Artifacts = _ARTIFACTS,
    split: Annotated[list[str] | None, typer.Option("--split", help="Split to audit; repeatable.")] = None,
) -> None:
    """Measure how much a split leaks: highest cross-fold identity, and the score of copying the nearest neighbour."""
    from folds import audit as stage

    report = stage.run(_paths(comp, artifacts), splits=split or [_SPLIT], competition=_competition(comp, artifacts))
    show(report, stage.describe(report.facts))


@verb()
def templates(
    raw: Annotated[str, typer.Option("--raw", help="Folder with mmCIF or PDB files, also in folders below.")],
    comp: Comp = "rna3d",
    artifacts: Artifacts = _ARTIFACTS,
    workers: Annotated[int | None, typer.Option("--workers", help="Processes; default: one per CPU.")] = None,
) -> None:
    """Read structure files into a dated library of RNA chains (needs gemmi: the extra templates)."""
    from pipeline.preprocess import describe
    from pipeline.templates import collection

    if not raw:
        raise ConfigError("templates: RAW is empty. Next: RAW=<folder> with mmCIF or PDB files.")
    _competition(comp, artifacts).require_structures("templates")
    report = collection.run(_paths(comp, artifacts), raw=Path(raw).expanduser(), workers=workers)
    show(report, describe(report.facts))


def _pairing_first(paths: Paths, competition: Any) -> None:
    """Base-pair probabilities, where ViennaRNA can compute them."""
    from pipeline import bpp, viennarna

    if competition.task == "structure" and viennarna.available()[0]:
        show(bpp.run(paths))


@verb("templates-predict")
def templates_predict(
    comp: Comp = "rna3d",
    artifacts: Artifacts = _ARTIFACTS,
    split: Split = _SPLIT,
    msa: Annotated[
        Path | None,
        typer.Option("--msa", help="Undated alignments: folder of <target>.MSA.fasta, or parquet target_id, msa."),
    ] = None,
    source: Source = None,
    time_budget: StageBudget = "",
) -> None:
    """Predict structures from templates that a target's date and fold allow, as a run that ensemble takes."""
    from pipeline.templates import predict as stage
    from submissions.tm_score import tm_scores

    seconds = _stage_seconds(time_budget, source)
    paths, what = _paths(comp, artifacts), {"competition": _competition(comp, artifacts), "split": split, "msa": msa}
    if source is None:
        _pairing_first(paths, what["competition"])
        report = stage.run(paths, **what, score=tm_scores)
    else:
        report = stage.apply(paths, **what, source=source, seconds=seconds)
    show(report, stage.describe(report.facts))


@verb()
def denovo(
    comp: Comp = "rna3d",
    artifacts: Artifacts = _ARTIFACTS,
    split: Split = _SPLIT,
    source: Source = None,
    time_budget: StageBudget = "",
) -> None:
    """Predict structures from pairing and from loops of known structures, as a run that ensemble takes."""
    from pipeline.structure import predict as stage
    from submissions.tm_score import tm_scores

    seconds = _stage_seconds(time_budget, source)
    paths, what = _paths(comp, artifacts), {"competition": _competition(comp, artifacts), "split": split}
    if source is None:
        _pairing_first(paths, what["competition"])
        report = stage.run(paths, **what, score=tm_scores)
    else:
        report = stage.apply(paths, **what, source=source, seconds=seconds)
    show(report, stage.describe(report.facts))


@verb()
def words(
    comp: Comp = "labelled", artifacts: Artifacts = _ARTIFACTS, split: Split = _SPLIT, source: Source = None
) -> None:
    """Predict the classes of a labelled set by counting words (naive Bayes), as a run that ensemble takes."""
    from pipeline import words as stage

    paths, what = _paths(comp, artifacts), {"competition": _competition(comp, artifacts), "split": split}
    report = stage.run(paths, **what) if source is None else stage.apply(paths, **what, source=source)
    show(report, stage.describe(report.facts))


@verb()
def train(
    context: typer.Context,
    comp: Comp = _COMP,
    artifacts: Artifacts = _ARTIFACTS,
    model: Model = "",
    split: Split = _SPLIT,
    fold: Fold = 0,
    all_folds: Annotated[bool, typer.Option("--all-folds", help="Train every fold of the split in turn.")] = False,
    tag: Tag = "",
    set_: Sets = None,
    max_steps: Annotated[
        int | None, typer.Option("--max-steps", help="Stop, resumable, after so many steps.", min=1)
    ] = None,
    time_budget: Annotated[
        str, typer.Option("--time-budget", help="Train, save and predict within this time: 45m, 8h, 90s; resumable.")
    ] = "",
    restart: Annotated[bool, typer.Option("--restart", help="Set an earlier run aside and begin anew.")] = False,
    allow_changes: Annotated[
        bool, typer.Option("--allow-changes", help="Resume with changed settings that do no harm, such as more epochs.")
    ] = False,
    background: Annotated[
        bool, typer.Option("--background", help="Go on when the terminal closes; see rna status, logs, stop.")
    ] = False,
    track: Annotated[
        list[str] | None, typer.Option("--track", help="Also tell tensorboard or wandb (offline); repeatable.")
    ] = None,
    nproc: Annotated[
        int, typer.Option("--nproc", help="Processes that train together, one for each GPU of this machine.", min=1)
    ] = 1,
    kernels: Kernels = "auto",
) -> None:
    """Train one fold (or all) and predict; started again it resumes, or says that it is finished."""
    from pipeline import jobs
    from pipeline.training.stop import StopRequest

    config, run = _config(model, split=split, tag=tag, overrides=set_ or (), resumes=allow_changes)
    competition, paths, seconds = _competition(comp, artifacts), _paths(comp, artifacts), _seconds(time_budget)
    indices = tuple(range(fold_count(split))) if all_folds else (check_fold(fold, split),)
    if background:
        folder = jobs.job_folder(paths, run, None if all_folds else fold)
        raise typer.Exit(jobs.start(_same_words(context, without="background"), folder=folder))
    if nproc > 1:
        from pipeline.training.distributed import launch

        raise typer.Exit(launch(_same_words(context, without="nproc"), processes=nproc))
    holds = all_folds and os.environ.get("RANK", "0") == "0"  # of torchrun's processes the first one
    with StopRequest(), jobs.at_work(paths.run_dir(run)) if holds else contextlib.nullcontext():
        from pipeline import train_folds
        from pipeline.training.trackers import find_trackers

        train_folds.run(
            config,
            competition=competition,
            paths=paths,
            run=run,
            split=split,
            folds=indices,
            show=show,
            budget=None if seconds is None else train_folds.Budget(seconds=seconds),
            max_steps=max_steps,
            restart=restart,
            allow_changes=allow_changes,
            trackers=find_trackers(track or ()),
        )


@verb()
def status(
    artifacts: Artifacts = _ARTIFACTS,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON list, for programs.")] = False,
) -> None:
    """Show every run of every competition: what it is doing, how far it is, its metric, its process."""
    from pipeline import jobs

    rows = jobs.survey(artifacts)
    if as_json:
        typer.echo(json.dumps(rows, indent=2))
    elif rows:
        output.print(jobs.status_table(rows, width=output.width))
        for row in rows:
            if row["state"] in ("failed", "diverged"):
                say(f"{row['run']} fold{row['fold']}: {row['message']}")
    else:
        say(f"{artifacts}: no runs yet. Next: make train")


@verb()
def logs(
    comp: Comp = _COMP,
    artifacts: Artifacts = _ARTIFACTS,
    model: Model = "",
    split: Split = _SPLIT,
    fold: Fold = 0,
    all_folds: Annotated[bool, typer.Option("--all-folds", help="Of the job that trains all folds.")] = False,
    tag: Tag = "",
    lines: Annotated[int, typer.Option("--lines", "-n", help="How many of the last ones.", min=1)] = 20,
    follow: Annotated[bool, typer.Option("--follow", "-f", help="Go on until the run ends (Ctrl-C leaves it be).")] = (
        False
    ),
) -> None:
    """Show the last lines of what a run in the background said."""
    from pipeline import jobs

    run = run_name(model, split=split, tag=tag)
    log = jobs.find_log(_paths(comp, artifacts), run, None if all_folds else check_fold(fold, split))
    typer.echo(jobs.last_lines(log, count=lines))
    with contextlib.suppress(KeyboardInterrupt):
        for text in jobs.follow(log) if follow else ():
            typer.echo(text, nl=False)


@verb()
def stop(
    comp: Comp = _COMP,
    artifacts: Artifacts = _ARTIFACTS,
    model: Model = "",
    split: Split = _SPLIT,
    fold: Fold = 0,
    all_folds: Annotated[bool, typer.Option("--all-folds", help="The job that trains all folds.")] = False,
    tag: Tag = "",
) -> None:
    """Ask a run to save its state and end, and wait until it has."""
    from pipeline import jobs

    run = run_name(model, split=split, tag=tag)
    folder = jobs.job_folder(_paths(comp, artifacts), run, None if all_folds else check_fold(fold, split))
    say(jobs.stop(folder))


@verb()
def sweep(
    over: Annotated[
        list[str] | None, typer.Option("--over", help="What varies, as TOML: train.lr=[1e-3, 2e-3]; all combinations.")
    ] = None,
    sweep_name: Annotated[str, typer.Option("--name", help="Of the sweep.")] = "sweep",
    comp: Comp = _COMP,
    artifacts: Artifacts = _ARTIFACTS,
    model: Model = "",
    split: Split = _SPLIT,
    fold: Annotated[list[int] | None, typer.Option("--fold", help="Fold to hold out; repeatable.", min=0)] = None,
    all_folds: Annotated[bool, typer.Option("--all-folds", help="Every fold of the split.")] = False,
    seeds: Annotated[int, typer.Option("--seeds", help="Runs of every cell and fold.", min=1)] = 3,
    trials: Annotated[int, typer.Option("--trials", help="Let Optuna propose so many cells.", min=0)] = 0,
    set_: Sets = None,
    time_budget: Annotated[str, typer.Option("--time-budget", help="Stop, resumable, after this time: 8h.")] = "",
) -> None:
    """Train settings x seeds x folds and rank them; start it on several machines that share the folder, or again."""
    from pipeline import sweep as stage

    if not over:
        raise ConfigError("sweep: OVER is empty. Next: make sweep OVER='train.lr=[1e-3,2e-3]'.")
    run_name(model, split=split, tag=sweep_name)
    budget, competition, paths = _seconds(time_budget), _competition(comp, artifacts), _paths(comp, artifacts)
    folds = range(fold_count(split)) if all_folds else [check_fold(k, split) for k in fold or [0]]
    whole = stage.Sweep(
        name=sweep_name,
        model=model,
        overrides=tuple(set_ or ()),
        competition=competition,
        paths=paths,
        split=split,
        seeds=seeds,
        folds=tuple(folds),
        deadline=None if budget is None else time.monotonic() + budget,
    )
    report = stage.run(whole, [stage.parse_axis(text) for text in over], trials=trials)
    show(report, stage.describe(report.facts))


@verb()
def replay(
    comp: Comp = _COMP,
    artifacts: Artifacts = _ARTIFACTS,
    model: Model = "",
    split: Split = _SPLIT,
    fold: Fold = 0,
    tag: Tag = "",
    step: Annotated[int | None, typer.Option("--step", help="Of the batch; default: the last one.", min=0)] = None,
    precision: Annotated[str, typer.Option("--precision", help="fp16, bf16 or fp32 alone; default: all.")] = "",
) -> None:
    """Run a batch that training left out again: where it breaks, and in which precision it does not."""
    from pipeline import replay as stage

    run = run_name(model, split=split, tag=tag)
    where: dict[str, Any] = {"run": run, "fold": check_fold(fold, split), "step": step, "precision": precision or None}
    found = stage.run(competition=_competition(comp, artifacts), paths=_paths(comp, artifacts), **where)
    output.print(stage.describe(found.facts))


@verb()
def predict(
    comp: Comp = _COMP,
    artifacts: Artifacts = _ARTIFACTS,
    model: Model = "",
    split: Split = _SPLIT,
    fold: Fold = 0,
    tag: Tag = "",
    set_: Sets = None,
    test_only: TestOnly = False,
    kernels: Kernels = "auto",
) -> None:
    """Predict the held-out fold and the test set with a trained checkpoint, which carries its own configuration."""
    from pipeline.training.stop import StopRequest

    del set_  # the checkpoint's own settings hold
    run = run_name(model, split=split, tag=tag)
    with StopRequest():
        from pipeline import predict as stage

        where: dict[str, Any] = {"paths": _paths(comp, artifacts), "run": run, "fold": check_fold(fold, split)}
        where |= {"which": ("test",)} if test_only else {}
        show(stage.run(competition=_competition(comp, artifacts), **where))


@verb()
def embed(
    file: Annotated[Path, typer.Argument(help="Sequences: FASTA, CSV, TSV or parquet; text also as .gz.")],
    comp: Comp = _COMP,
    artifacts: Artifacts = _ARTIFACTS,
    model: Model = "",
    split: Split = _SPLIT,
    fold: Fold = 0,
    tag: Tag = "",
    per_nucleotide: Annotated[
        bool, typer.Option("--per-nucleotide", help="Also the embedding of every nucleotide.")
    ] = False,
    kernels: Kernels = "auto",
) -> None:
    """Write the last hidden layer of a trained checkpoint for any sequences: their mean, and each nucleotide's."""
    from pipeline.training.stop import StopRequest

    run = run_name(model, split=split, tag=tag)
    with StopRequest():
        from pipeline import embed as stage

        where: dict[str, Any] = {"paths": _paths(comp, artifacts), "run": run, "fold": check_fold(fold, split)}
        report = stage.run(file, competition=_competition(comp, artifacts), per_nucleotide=per_nucleotide, **where)
    show(report, "sequences: {sequences:,}, of {nucleotides:,} nt, {width} numbers each".format(**report.facts))


@verb()
def ensemble(
    comp: Comp = _COMP,
    artifacts: Artifacts = _ARTIFACTS,
    split: Split = _SPLIT,
    name: Name = _NAME,
    run: Annotated[list[str] | None, typer.Option("--run", help="Run to use; default: every finished one.")] = None,
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

    paths = _paths(comp, artifacts)
    if weights is not None:
        which: dict[str, Any] = {"weights": weights, "folds": use or None, "partial_runs": partial}
        report = stage.apply(paths, competition=_competition(comp, artifacts), name=name, **which)
        show(report, f"{report.facts['test_rows']:,} test rows from folds {report.facts['folds']}")
        return
    runs = run or finished_runs(paths, split, partial=partial)
    warn_of_unfinished(paths, runs)
    which = {"name": name, "runs": runs, "split": split, "allow_partial": partial}
    report = stage.run(paths, competition=_competition(comp, artifacts), score=tm_scores, **which)
    show(report, stage.describe(report.facts))


@verb()
def submit(
    comp: Comp = _COMP,
    artifacts: Artifacts = _ARTIFACTS,
    name: Name = _NAME,
    fmt: Annotated[str, typer.Option("--format", help="csv or parquet.")] = "csv",
    to: Annotated[
        Path | None,
        typer.Option(
            "--to", help="Folder of the file; default: submissions/csv, or submissions in another artifacts folder."
        ),
    ] = None,
    fill: Annotated[bool, typer.Option("--fill", help="Structures: simple shapes where nothing is predicted.")] = False,
) -> None:
    """Write the submission file and check it; an invalid file never gets its final name."""
    from submissions import write

    paths = replace(_paths(comp, artifacts), submissions=to)
    report = write.run(paths, competition=_competition(comp, artifacts), name=name, fmt=fmt, fill=fill)
    show(report, write.describe(report.facts))


@verb("submit-kaggle")
def submit_kaggle(
    comp: Comp = _COMP,
    artifacts: Artifacts = _ARTIFACTS,
    name: Name = _NAME,
    file: Annotated[Path | None, typer.Option("--file", help="Another submission than the ensemble's.")] = None,
    fmt: Annotated[str, typer.Option("--format", help="Of the ensemble's submission: csv or parquet.")] = "csv",
    kernel: Annotated[str, typer.Option("--kernel", help="Code competitions: owner/slug whose output to submit.")] = "",
    version: Annotated[str, typer.Option("--version", help="Version of the kernel.")] = "",
    wait: Annotated[str, typer.Option("--wait", help="For the score at most: 30m, 2h.")] = "1h",
) -> None:
    """Send a checked submission to Kaggle, once, and wait until it is listed and scored."""
    from submissions import upload

    if bool(kernel) != bool(version):
        raise ConfigError(
            "submit-kaggle: a notebook and its version go together. Next: KERNEL=owner/slug VERSION=1, or neither."
        )
    report = upload.run(
        _paths(comp, artifacts),
        competition=_competition(comp, artifacts),
        name=name,
        file=file,
        fmt=fmt,
        kernel=upload.Kernel(name=kernel, version=version) if kernel else None,
        wait=_seconds(wait, option="--wait") or 0.0,
    )
    show(report, upload.describe(report.facts))


@verb()
def kernel(
    owner: Annotated[str, typer.Option("--owner", help="Your user name on Kaggle.")] = "",
    mode: Annotated[str, typer.Option("--mode", help="train, or predict: with an ensemble's checkpoints.")] = "train",
    comp: Comp = _COMP,
    artifacts: Artifacts = _ARTIFACTS,
    model: Model = "",
    split: Split = _SPLIT,
    fold: Fold = 0,
    all_folds: Annotated[bool, typer.Option("--all-folds", help="Train every fold of the split in turn.")] = False,
    tag: Tag = "",
    set_: Sets = None,
    name: Name = _NAME,
    limit: Annotated[str, typer.Option("--limit", help="Time that the notebook may take.")] = "9h",
    resume: Annotated[str, typer.Option("--resume", help="owner/slug of the notebook to go on from.")] = "",
    gpu: Annotated[bool, typer.Option("--gpu/--no-gpu", help="Ask for two T4.")] = True,
) -> None:
    """Pack a Kaggle notebook that needs no internet: our wheel, missing wheels, settings or weights, its script."""
    from pipeline.kernel import bundle

    if mode not in ("train", "predict"):
        raise ConfigError(f"KERNEL={mode!r}: expected train or predict. Next: KERNEL=train or KERNEL=predict.")
    if mode == "train":
        _config(model, split=split, tag=tag, overrides=set_ or ())
    order = bundle.Order(
        competition=_competition(comp, artifacts),
        paths=_paths(comp, artifacts),
        owner=owner,
        mode=mode,  # type: ignore[arg-type]
        split=split,
        model=model,
        run=run_name(model, split=split, tag=tag),
        tag=tag,
        overrides=set_ or (),
        folds=tuple(range(fold_count(split))) if all_folds else (check_fold(fold, split),),
        ensemble=name,
        limit_s=_seconds(limit, option="LIMIT") or 0.0,
        resume=resume,
        gpu=gpu,
    )
    report = bundle.build(order)
    show(report, bundle.describe(report.facts))


Slug = Annotated[str, typer.Option("--slug", help="Name of the bundle; default: the one there is.")]


@verb("kernel-push")
def kernel_push(comp: Comp = _COMP, artifacts: Artifacts = _ARTIFACTS, slug: Slug = "") -> None:
    """Send a bundle to Kaggle, where the notebook starts to run, and see that it arrived."""
    from pipeline.kernel import service

    paths = _paths(comp, artifacts)
    report = service.push(paths, slug=_slug(paths, slug))
    show(report, service.describe(report.facts))


@verb("kernel-status")
def kernel_status(
    comp: Comp = _COMP,
    artifacts: Artifacts = _ARTIFACTS,
    slug: Slug = "",
    wait: Annotated[str, typer.Option("--wait", help="Until it ended, at most: 30m, 12h.")] = "",
) -> None:
    """Say how a notebook is doing; a failed one is told with its reason."""
    from pipeline.kernel import service

    paths = _paths(comp, artifacts)
    report = service.status(paths, slug=_slug(paths, slug), wait=_seconds(wait, option="--wait") or 0.0)
    show(report, service.describe(report.facts))


@verb("kernel-pull")
def kernel_pull(comp: Comp = _COMP, artifacts: Artifacts = _ARTIFACTS, slug: Slug = "") -> None:
    """Fetch what a notebook left, verified: trained folds become local runs, a submission can be checked here."""
    from pipeline.kernel import service

    paths = _paths(comp, artifacts)
    report = service.pull(paths, slug=_slug(paths, slug))
    show(report, service.describe(report.facts))


@verb("kernel-check")
def kernel_check(
    comp: Comp = _COMP,
    artifacts: Artifacts = _ARTIFACTS,
    python: Annotated[
        Path, typer.Option("--python", help="Of an environment with the packages of Kaggle's image; default: this one.")
    ] = Path(sys.executable),
    slug: Slug = "",
    raw: Annotated[
        Path | None, typer.Option("--raw", help="Play the bundle on the test set of this folder; default: synthetic.")
    ] = None,
    limit: Annotated[str, typer.Option("--limit", help="With --raw: time for the notebook; default: its own.")] = "",
) -> None:
    """Rehearse notebooks, both kinds on synthetic data or a bundle: bare Python, no network, read-only inputs."""
    from pipeline.kernel import check as rehearsal

    folder, paths = artifacts / "kernel-check", _paths(comp, artifacts)
    if raw is None:
        report = rehearsal.run(folder, python=python)
    else:
        home = paths.kernel_dir(_slug(paths, slug))
        what: dict[str, Any] = {"home": home, "competition": _competition(comp, artifacts), "raw": raw}
        report = rehearsal.run_bundle(folder, python=python, **what, limit_s=_seconds(limit, option="LIMIT"))
    show(report, rehearsal.describe(report.facts))


@verb()
def handover(comp: Comp = _COMP, artifacts: Artifacts = _ARTIFACTS, name: Name = _NAME) -> None:
    """Write the files that Kaggle asks of winners, from the ensemble and the settings of its runs."""
    from pipeline import handover as stage

    show(stage.run(_paths(comp, artifacts), competition=_competition(comp, artifacts), name=name))


@verb()
def check(
    file: Annotated[Path, typer.Argument(help="A submission: CSV, CSV.GZ or parquet.")],
    comp: Comp = _COMP,
    artifacts: Artifacts = _ARTIFACTS,
    sample: Annotated[Path | None, typer.Option("--sample", help="Check against this sample submission.")] = None,
) -> None:
    """Check a submission file: columns, every id in order, finite values in range."""
    from submissions import check as stage

    if file == Path():
        raise ConfigError("check: no file given; expected a submission. Next: make check FILE=my.csv.")
    report = stage.run(_paths(comp, artifacts), competition=_competition(comp, artifacts), file=file, sample=sample)
    show(report, f"accepted: {report.facts['rows']:,} rows, every id in its place, every value finite and in range")


@verb()
def evaluate(
    comp: Comp = _COMP,
    artifacts: Artifacts = _ARTIFACTS,
    split: Split = _SPLIT,
    name: Name = _NAME,
    engine: Engine = "built-in",
) -> None:
    """Score the out-of-fold predictions by the organisers' metric, beside the trivial floors."""
    from submissions import evaluate as stage

    which: dict[str, Any] = {"competition": _competition(comp, artifacts), "name": name, "split": split}
    report = stage.run(_paths(comp, artifacts), engine=engine, **which)
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
    comp: Comp = "rna3d",
    artifacts: Artifacts = _ARTIFACTS,
    name: Name = _NAME,
    table: Annotated[str, typer.Option("--table", help="test, or oof for the training targets.")] = "test",
) -> None:
    """Write predicted structures as PDB and mmCIF files, and a page that shows them, also offline."""
    from submissions import structure_files as stage

    show(stage.run(_paths(comp, artifacts), competition=_competition(comp, artifacts), name=name, table=table))


@verb()
def report(comp: Comp = _COMP, artifacts: Artifacts = _ARTIFACTS, name: Name = _NAME) -> None:
    """Write one self-contained HTML page: curves, calibration, errors, heat maps, configuration, hashes."""
    from submissions import report as stage

    show(stage.run(_paths(comp, artifacts), competition=_competition(comp, artifacts), name=name))


@verb()
def plan(
    comp: Comp = _COMP,
    artifacts: Artifacts = _ARTIFACTS,
    model: Model = "",
    set_: Sets = None,
    length: Annotated[
        int | None,
        typer.Option("--length", help="Of the longest sequence, nt; default: the clean table's, or max_length.", min=1),
    ] = None,
    nproc: Annotated[int, typer.Option("--nproc", help="Processes that train together.", min=1)] = 1,
) -> None:
    """Say what memory a training step takes, counted without running it; refuse what cannot fit, and say what would."""
    from pipeline import plan as planning
    from pipeline.classes import read_classes
    from pipeline.config import load_config
    from pipeline.train import build_model

    config, competition = load_config(model, set_ or ()), _competition(comp, artifacts)
    classes = read_classes(_paths(comp, artifacts)) if competition.task == "classes" else None
    length = length or planning.longest_sequence(table := _paths(comp, artifacts).clean("train"))
    if length is None:
        say(
            f"{table}: not there yet, so the longest sequence is taken to have data.max_length = "
            f"{config.data.max_length:,} nt. Next: make data, or LENGTH=<nt>."
        )
    elif length > config.data.max_length:
        say(f"{length:,} nt: training crops to data.max_length = {config.data.max_length:,} nt, which is what counts")
    size = {"length": length, "processes": nproc}
    found = planning.make_plan(config, lambda: build_model(config.model, competition, classes), **size)  # type: ignore[arg-type]
    output.print(found.table())
    found.require_fit()
    output.print(found.line(), markup=False)


@verb("bench-data")
def bench_data(artifacts: Artifacts = _ARTIFACTS) -> None:
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
    comp: Comp = "rna3d", artifacts: Artifacts = _ARTIFACTS, model: Model = "", split: Split = _SPLIT
) -> None:
    """What each way to five traces takes by the length of a target, after train-all."""
    from pipeline import bench_structures as bench

    bench.run(_paths(comp, artifacts), split=split, network=run_name(model, split=split))


@verb("bench-loader")
def bench_loader(artifacts: Artifacts = _ARTIFACTS, comp: Comp = _COMP) -> None:
    """Time the making of batches, with and without workers, and count the padding of the clean training table."""
    from pipeline import bench_loader as bench

    output.print(bench.run(_paths(comp, artifacts)))


@verb("bench-folds")
def bench_folds(artifacts: Artifacts = _ARTIFACTS, comp: Comp = _COMP) -> None:
    """Time the clustering beside MMseqs2 and cd-hit, and count the relatives each leaves across folds."""
    from folds import bench

    output.print(bench.run(_paths(comp, artifacts), folder=artifacts / "bench"))


def _competition(name: str, artifacts: Path | None = None) -> Any:
    """A competition; with what its clean tables below `artifacts` say of it, where they are given."""
    from pipeline.competitions import competition_of, get_competition

    return get_competition(name) if artifacts is None else competition_of(_paths(name, artifacts))


def _paths(comp: str, artifacts: Path) -> Paths:
    return Paths(comp=_competition(comp).name, root=artifacts)  # of a misspelt one a file would be "missing"


def _slug(paths: Paths, slug: str) -> str:
    """The bundle that is meant: the one that is named, or the only one there is."""
    known = sorted(path.parents[1].name for path in (paths.home / "kernels").glob("*/dataset/MANIFEST.json"))
    if slug in known or (not slug and len(known) == 1):
        return slug or known[0]
    if not known:
        raise DataError(f"{paths.home / 'kernels'}: no bundle. Next: make kernel COMP={paths.comp} OWNER=<user>.")
    got = f"SLUG={slug!r} is not there" if slug else "there are several bundles"
    raise ConfigError(f"{paths.home / 'kernels'}: {got}. Next: SLUG= one of {', '.join(known)}.")


def _config(model: str, *, split: str, tag: str, overrides: Sequence[str], resumes: bool = False) -> tuple[Any, str]:
    from pipeline.config import load_config

    if overrides and not tag and not resumes:
        raise ConfigError("--set changes what a run is. Next: name the variant with --tag (make: TAG=…).")
    if tag.startswith("sweep-"):
        raise ConfigError(f"TAG={tag!r}: runs of these names are a sweep's, left out of ensembles. Next: another TAG.")
    return load_config(model, overrides), run_name(model, split=split, tag=tag)


def _same_words(context: typer.Context, *, without: str) -> list[str]:
    """The command line of the verb that is running, less one option."""
    words = [str(context.info_name)]
    for option in context.command.params:
        value = context.params.get(str(option.name))
        given = value if isinstance(value, list | tuple) else [value]
        if option.name != without:
            words += [
                option.opts[0] if one is True else f"{option.opts[0]}={one}"
                for one in given
                if one is not None and one is not False and one != ""
            ]
    return words


def _seconds(text: str, *, option: str = "BUDGET") -> float | None:
    """Seconds of ``90s``, ``45m``, ``8h``; None for an empty text."""
    if not text:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if not found:
        raise ConfigError(f"{option} {text!r}: expected a number with s, m or h, such as 8h. Next: correct it.")
    return float(found.group(1)) * {"s": 1, "m": 60, "h": 3600}[found.group(2)]


def _stage_seconds(text: str, source: Path | None) -> float | None:
    """Seconds of a time budget, which only `--from` has."""
    if text and source is None:
        raise ConfigError("--time-budget is of --from alone, which leaves out targets. Next: leave it out.")
    return _seconds(text)


def show(report: Report, details: Any = ()) -> None:
    """Print what a stage did: one line, its own details (one renderable or several), and where its outputs are."""
    said = "up to date, nothing to do" if report.status == "current" else f"done in {report.seconds:.1f} s"
    output.print(f"[bold]{report.stage}[/]: {said}")
    for detail in details if isinstance(details, list | tuple) else [details]:
        is_text = isinstance(detail, str)  # the data's own names may hold brackets
        output.print(commands.complete(detail) if is_text else detail, markup=not is_text)
    files = list(report.outputs.values())
    if len(files) > _MOST_OUTPUTS:
        files, several = [Path(os.path.commonpath(files))], f" ({len(files)} files)"
    else:
        several = ""
    for path in files:
        output.print(f"  -> {_near(path)}{several}", markup=False)


def _near(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def main() -> NoReturn:
    """Run the verb of the command line, and end the process with its exit code.

    The process ends before Python's own shutdown: there, a thread of Arrow that still has to let go of a Python object
    aborts it, with SIGABRT instead of the exit code, after a file that was refused.
    """
    is_utf8 = sys.flags.utf8_mode or locale.getencoding().lower() == "utf-8"
    if not is_utf8 and os.environ.get("PYTHONUTF8") != "1":  # our files are UTF-8 whatever the terminal is
        os.environ["PYTHONUTF8"] = "1"
        os.execv(sys.executable, [sys.executable, *sys.orig_argv[1:]])
    # torch's threads wait by spinning, which beside another busy process made training 2 to 10 times slower
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    code = 1  # of an exception that nobody expected

    def leave() -> None:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)

    sys.stdout, sys.stderr = Unbreakable(sys.stdout), Unbreakable(sys.stderr)
    atexit.register(leave)  # the first to be registered is the last to run
    code = run_verb()
    raise SystemExit(code)


@commands.scope()
def run_verb(arguments: Sequence[str] | None = None) -> int:
    """Run a verb, by default that of the command line; a failure that a user can act on is told in one sentence.

    Returns:
        The exit code.
    """
    try:
        _ask_for_kernels(os.environ.get("RNA_KERNELS") or "auto")
        code = app(args=arguments, standalone_mode=False) or 0
        return _interrupted() if code == _INTERRUPTED else code
    except PipelineError as err:
        return _fail(str(err), err.exit_code)
    except MemoryError as err:
        return _fail(
            f"out of memory: {err}. Next: close other programs, or lower the batch size.", StorageError.exit_code
        )
    except OSError as err:
        said = _system_failure(err)
        if not said:
            raise
        return _fail(f"{said}. Next: check the path, its permissions and the disk.", StorageError.exit_code)
    except (typer.Abort, KeyboardInterrupt):
        return _interrupted()
    except Exception as err:
        if not hasattr(err, "format_message"):  # not one of the command line's own
            raise
        sentence = err.format_message()  # empty where no verb was given: the help is printed then
        context = getattr(err, "ctx", None)
        which = f" {context.info_name}" if context is not None and context.parent is not None else ""
        told = f"{sentence.rstrip('.')}. Next: rna{which} --help."
        return _fail(told, ConfigError.exit_code) if sentence else ConfigError.exit_code


def _system_failure(err: OSError) -> str:
    """What the system refused, and where; empty where it was not the system. Polars names both in the text alone."""
    if err.errno is not None and err.strerror is not None:
        return f"{err.filename}: {err.strerror}" if err.filename else err.strerror
    found = re.search(r"(.+) \(os error \d+\)(?:: (.+))?", str(err))
    return ": ".join(part for part in reversed(found.groups()) if part) if found else ""


def _interrupted() -> int:
    return _fail("interrupted; nothing is half-written. Next: the same command again.", _INTERRUPTED)


def _fail(message: str, code: int) -> int:
    if os.environ.get("RNA_DEBUG"):
        traceback.print_exc()
    console.print(Text.assemble(("error: ", "bold red"), f"{commands.complete(message)} (exit code {code})"))
    return code
