"""To Kaggle and back: submissions, notebooks, a winner's files."""

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.cli.options import (
    ARTIFACTS,
    COMP,
    NAME,
    SPLIT,
    AllFolds,
    Artifacts,
    Comp,
    Fold,
    Model,
    Name,
    Sets,
    Split,
    Tag,
    find_competition,
    find_config,
    find_paths,
    seconds_of,
)
from pipeline.cli.program import show, verb
from pipeline.errors import ConfigError, DataError
from pipeline.paths import Paths
from pipeline.runs import check_fold, fold_count, run_name

Slug = Annotated[str, typer.Option("--slug", help="Name of the bundle; default: the one there is.")]


@verb("submit-kaggle")
def submit_kaggle(
    comp: Comp = COMP,
    artifacts: Artifacts = ARTIFACTS,
    name: Name = NAME,
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
        find_paths(comp, artifacts),
        competition=find_competition(comp, artifacts),
        name=name,
        file=file,
        fmt=fmt,
        kernel=upload.Kernel(name=kernel, version=version) if kernel else None,
        wait=seconds_of(wait, option="--wait") or 0.0,
    )
    show(report, upload.describe(report.facts))


@verb()
def kernel(
    owner: Annotated[str, typer.Option("--owner", help="Your user name on Kaggle.")] = "",
    mode: Annotated[str, typer.Option("--mode", help="train, or predict: with an ensemble's checkpoints.")] = "train",
    comp: Comp = COMP,
    artifacts: Artifacts = ARTIFACTS,
    model: Model = "",
    split: Split = SPLIT,
    fold: Fold = 0,
    all_folds: AllFolds = False,
    tag: Tag = "",
    set_: Sets = None,
    name: Name = NAME,
    limit: Annotated[str, typer.Option("--limit", help="Time that the notebook may take.")] = "9h",
    resume: Annotated[str, typer.Option("--resume", help="owner/slug of the notebook to go on from.")] = "",
    gpu: Annotated[bool, typer.Option("--gpu/--no-gpu", help="Ask for two T4.")] = True,
) -> None:
    """Pack a Kaggle notebook that needs no internet: our wheel, missing wheels, settings or weights, its script."""
    from pipeline.kernel import bundle

    if mode not in ("train", "predict"):
        raise ConfigError(f"KERNEL={mode!r}: expected train or predict. Next: KERNEL=train or KERNEL=predict.")
    if mode == "train":
        find_config(model, split=split, tag=tag, overrides=set_ or ())
    order = bundle.Order(
        competition=find_competition(comp, artifacts),
        paths=find_paths(comp, artifacts),
        owner=owner,
        mode=mode,  # type: ignore[arg-type]
        split=split,
        model=model,
        run=run_name(model, split=split, tag=tag),
        tag=tag,
        overrides=set_ or (),
        folds=tuple(range(fold_count(split))) if all_folds else (check_fold(fold, split),),
        ensemble=name,
        limit_s=seconds_of(limit, option="LIMIT") or 0.0,
        resume=resume,
        gpu=gpu,
    )
    report = bundle.build(order)
    show(report, bundle.describe(report.facts))


@verb("kernel-push")
def kernel_push(comp: Comp = COMP, artifacts: Artifacts = ARTIFACTS, slug: Slug = "") -> None:
    """Send a bundle to Kaggle, where the notebook starts to run, and see that it arrived."""
    from pipeline.kernel import service

    paths = find_paths(comp, artifacts)
    report = service.push(paths, slug=_slug(paths, slug))
    show(report, service.describe(report.facts))


@verb("kernel-status")
def kernel_status(
    comp: Comp = COMP,
    artifacts: Artifacts = ARTIFACTS,
    slug: Slug = "",
    wait: Annotated[str, typer.Option("--wait", help="Until it ended, at most: 30m, 12h.")] = "",
) -> None:
    """Say how a notebook is doing; a failed one is told with its reason."""
    from pipeline.kernel import service

    paths = find_paths(comp, artifacts)
    report = service.status(paths, slug=_slug(paths, slug), wait=seconds_of(wait, option="--wait") or 0.0)
    show(report, service.describe(report.facts))


@verb("kernel-pull")
def kernel_pull(comp: Comp = COMP, artifacts: Artifacts = ARTIFACTS, slug: Slug = "") -> None:
    """Fetch what a notebook left, verified: trained folds become local runs, a submission can be checked here."""
    from pipeline.kernel import service

    paths = find_paths(comp, artifacts)
    report = service.pull(paths, slug=_slug(paths, slug))
    show(report, service.describe(report.facts))


@verb("kernel-check")
def kernel_check(
    comp: Comp = COMP,
    artifacts: Artifacts = ARTIFACTS,
    python: Annotated[
        Path,
        typer.Option(
            "--python",
            help="Of an environment with the packages of Kaggle's image; default: this one.",
            show_default=False,
        ),
    ] = Path(sys.executable),
    slug: Slug = "",
    raw: Annotated[
        Path | None, typer.Option("--raw", help="Play the bundle on the test set of this folder; default: synthetic.")
    ] = None,
    limit: Annotated[str, typer.Option("--limit", help="With --raw: time for the notebook; default: its own.")] = "",
) -> None:
    """Rehearse notebooks, both kinds on synthetic data or a bundle: bare Python, no network, read-only inputs."""
    from pipeline.kernel import check as rehearsal

    folder, paths = artifacts / "kernel-check", find_paths(comp, artifacts)
    if raw is None:
        report = rehearsal.run(folder, python=python)
    else:
        home = paths.kernel_dir(_slug(paths, slug))
        what: dict[str, Any] = {"home": home, "competition": find_competition(comp, artifacts), "raw": raw}
        report = rehearsal.run_bundle(folder, python=python, **what, limit_s=seconds_of(limit, option="LIMIT"))
    show(report, rehearsal.describe(report.facts))


@verb()
def handover(comp: Comp = COMP, artifacts: Artifacts = ARTIFACTS, name: Name = NAME) -> None:
    """Write the files that Kaggle asks of winners, from the ensemble and the settings of its runs."""
    from pipeline import handover as stage

    show(stage.run(find_paths(comp, artifacts), competition=find_competition(comp, artifacts), name=name))


def _slug(paths: Paths, slug: str) -> str:
    """The bundle that is meant: the one that is named, or the only one there is."""
    known = sorted(path.parents[1].name for path in (paths.home / "kernels").glob("[!.]*/dataset/MANIFEST.json"))
    if slug in known or (not slug and len(known) == 1):
        return slug or known[0]
    if not known:
        raise DataError(f"{paths.home / 'kernels'}: no bundle. Next: make kernel COMP={paths.comp} OWNER=<user>.")
    got = f"SLUG={slug!r} is not there" if slug else "there are several bundles"
    raise ConfigError(f"{paths.home / 'kernels'}: {got}. Next: SLUG={' or SLUG='.join(known)}.")
