"""Training of networks: one run or many, also in the background."""

import contextlib
import json
import os
import time
from functools import partial
from typing import Annotated, Any

import typer

from pipeline.cli.no_network import Msa, predict_all
from pipeline.cli.options import (
    ARTIFACTS,
    COMP,
    SPLIT,
    AllFolds,
    Artifacts,
    Comp,
    Fold,
    Kernels,
    Model,
    Sets,
    Split,
    Tag,
    find_competition,
    find_config,
    find_paths,
    seconds_of,
)
from pipeline.cli.program import show, verb
from pipeline.errors import ConfigError
from pipeline.runlog import output, say
from pipeline.runs import check_fold, fold_count, run_name


@verb()
def plan(
    comp: Comp = COMP,
    artifacts: Artifacts = ARTIFACTS,
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
    from pipeline.config import load_config
    from pipeline.training.settings import settle

    competition, paths = find_competition(comp, artifacts), find_paths(comp, artifacts)
    config, build = settle(load_config(model, set_ or ()), competition, paths=paths)
    table = paths.clean("train")
    teaching = [table, table.with_name("test.parquet")] if config.data.pseudo else [table]
    length = length or planning.longest_sequence(*teaching)
    if length is None:
        say(
            f"{table}: not there yet, so the longest sequence is taken to have data.max_length = "
            f"{config.data.max_length:,} nt. Next: make data, or LENGTH=<nt>."
        )
    elif length > config.data.max_length:
        say(f"{length:,} nt: training crops to data.max_length = {config.data.max_length:,} nt, which is what counts")
    found = planning.make_plan(config, build, length=length, processes=nproc)
    output.print(found.table())
    found.require_fit()
    output.print(found.line(), markup=False)


@verb()
def train(
    context: typer.Context,
    comp: Comp = COMP,
    artifacts: Artifacts = ARTIFACTS,
    model: Model = "",
    split: Split = SPLIT,
    fold: Fold = 0,
    all_folds: AllFolds = False,
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
    without_network: Annotated[
        bool,
        typer.Option("--without-network", help="Predict without one first: denovo and templates-predict, or words."),
    ] = False,
    msa: Msa = None,
) -> None:
    """Train one fold (or all) and predict; started again it resumes, or says that it is finished."""
    from pipeline import jobs
    from pipeline.training.stop import StopRequest

    config, run = find_config(model, split=split, tag=tag, overrides=set_ or (), resumes=allow_changes)
    competition, paths = find_competition(comp, artifacts), find_paths(comp, artifacts)
    seconds = seconds_of(time_budget)
    indices = tuple(range(fold_count(split))) if all_folds else (check_fold(fold, split),)
    folder = jobs.job_folder(paths, run, None if all_folds else fold)
    if background:
        raise typer.Exit(jobs.start(_same_words(context, without="background"), folder=folder))
    if nproc > 1:
        from pipeline.training.distributed import launch

        jobs.require_idle(folder)
        raise typer.Exit(launch(_same_words(context, without="nproc"), processes=nproc))
    holds = all_folds and os.environ.get("RANK", "0") == "0"  # of torchrun's processes the first one
    with StopRequest(), jobs.at_work(paths.run_dir(run)) if holds else contextlib.nullcontext():
        from pipeline import train_folds
        from pipeline.training.trackers import find_trackers

        beforehand = partial(predict_all, comp, artifacts, split=split, msa=msa) if without_network else lambda: None
        train_folds.run(
            config,
            competition=competition,
            paths=paths,
            run=run,
            split=split,
            folds=indices,
            show=show,
            beforehand=beforehand,
            budget=None if seconds is None else train_folds.Budget(seconds=seconds),
            max_steps=max_steps,
            restart=restart,
            allow_changes=allow_changes,
            trackers=find_trackers(track or ()),
        )


@verb()
def status(
    artifacts: Artifacts = ARTIFACTS,
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
    comp: Comp = COMP,
    artifacts: Artifacts = ARTIFACTS,
    model: Model = "",
    split: Split = SPLIT,
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
    log = jobs.find_log(find_paths(comp, artifacts), run, None if all_folds else check_fold(fold, split))
    typer.echo(jobs.last_lines(log, count=lines))
    with contextlib.suppress(KeyboardInterrupt):
        for text in jobs.follow(log) if follow else ():
            typer.echo(text, nl=False)


@verb()
def stop(
    comp: Comp = COMP,
    artifacts: Artifacts = ARTIFACTS,
    model: Model = "",
    split: Split = SPLIT,
    fold: Fold = 0,
    all_folds: Annotated[bool, typer.Option("--all-folds", help="The job that trains all folds.")] = False,
    tag: Tag = "",
) -> None:
    """Ask a run to save its state and end, and wait until it has."""
    from pipeline import jobs

    run = run_name(model, split=split, tag=tag)
    folder = jobs.job_folder(find_paths(comp, artifacts), run, None if all_folds else check_fold(fold, split))
    say(jobs.stop(folder))


@verb()
def sweep(
    over: Annotated[
        list[str] | None, typer.Option("--over", help="What varies, as TOML: train.lr=[1e-3, 2e-3]; all combinations.")
    ] = None,
    sweep_name: Annotated[str, typer.Option("--name", help="Of the sweep.")] = "sweep",
    comp: Comp = COMP,
    artifacts: Artifacts = ARTIFACTS,
    model: Model = "",
    split: Split = SPLIT,
    fold: Annotated[list[int] | None, typer.Option("--fold", help="Fold to hold out; repeatable.", min=0)] = None,
    all_folds: Annotated[bool, typer.Option("--all-folds", help="Every fold of the split.")] = False,
    seeds: Annotated[int, typer.Option("--seeds", help="Runs of every cell and fold.", min=1)] = 3,
    trials: Annotated[int, typer.Option("--trials", help="Let Optuna propose so many cells.", min=0)] = 0,
    set_: Sets = None,
    time_budget: Annotated[str, typer.Option("--time-budget", help="Stop, resumable, after this time: 8h.")] = "",
) -> None:
    """Train settings x seeds x folds and rank them; start it on several machines that share the folder, or again."""
    from pipeline.sweep import jobs, ranking, stage

    if not over:
        raise ConfigError("sweep: OVER is empty. Next: make sweep OVER='train.lr=[1e-3,2e-3]'.")
    run_name(model, split=split, tag=sweep_name)
    budget, competition, paths = seconds_of(time_budget), find_competition(comp, artifacts), find_paths(comp, artifacts)
    folds = range(fold_count(split)) if all_folds else [check_fold(k, split) for k in fold or [0]]
    whole = jobs.Sweep(
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
    report = stage.run(whole, [jobs.parse_axis(text) for text in over], trials=trials)
    show(report, ranking.describe(report.facts))


@verb()
def replay(
    comp: Comp = COMP,
    artifacts: Artifacts = ARTIFACTS,
    model: Model = "",
    split: Split = SPLIT,
    fold: Fold = 0,
    tag: Tag = "",
    step: Annotated[int | None, typer.Option("--step", help="Of the batch; default: the last one.", min=0)] = None,
    precision: Annotated[str, typer.Option("--precision", help="fp16, bf16 or fp32 alone; default: all.")] = "",
) -> None:
    """Run a batch that training left out again: where it breaks, and in which precision it does not."""
    from pipeline import replay as stage

    run = run_name(model, split=split, tag=tag)
    where: dict[str, Any] = {"run": run, "fold": check_fold(fold, split), "step": step, "precision": precision or None}
    found = stage.run(competition=find_competition(comp, artifacts), paths=find_paths(comp, artifacts), **where)
    output.print(stage.describe(found.facts))


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
