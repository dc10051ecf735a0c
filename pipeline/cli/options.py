"""Options that several verbs share, and what their texts mean."""

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from pipeline.errors import ConfigError, did_you_mean
from pipeline.paths import PRETRAINED, Paths
from pipeline.runs import SWEEP, find_run, run_name

COMP, ARTIFACTS, SPLIT, NAME = "ribonanza", Path("artifacts"), "sim80_k5", "all"

Comp = Annotated[
    str,
    typer.Option(
        "--comp",
        help="ribonanza, openvaccine, rna3d, rna3d2, or a set of your own: labelled-<name>, profiles-<name>.",
        is_eager=True,
    ),
]
Artifacts = Annotated[
    Path, typer.Option("--artifacts", help="Folder where the stages write.", envvar="RNA_ARTIFACTS", file_okay=False)
]


def _model_or_default(context: typer.Context, model: str) -> str:
    """The named model, or the competition's own; `Comp` is eager, so that it is known here."""
    return model or str(find_competition(context.params["comp"]).default_model)


Model = Annotated[
    str,
    typer.Option(
        "--model",
        help="A config of pipeline/configs by name, or a TOML file by path; unless given, the competition's own.",
        show_default=False,
        callback=_model_or_default,
    ),
]
Split = Annotated[str, typer.Option("--split", help="<kind><identity %>_k<folds>: sim80_k5, length_k5, random_k5.")]
Fold = Annotated[int, typer.Option("--fold", help="Fold to hold out, from 0.", min=0)]
AllFolds = Annotated[bool, typer.Option("--all-folds", help="Train every fold of the split in turn.")]
Tag = Annotated[str, typer.Option("--tag", help="Names a variant of the model; needed with --set.")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", help="Override, as TOML: train.lr=1e-3. May be given several times.")
]
Name = Annotated[str, typer.Option("--name", help="Name of the ensemble.")]
TestOnly = Annotated[
    bool, typer.Option("--test-only", help="The test set alone: where checkpoints came from elsewhere.")
]


def ask_for_kernels(mode: str) -> str:
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
        callback=ask_for_kernels,
    ),
]


def find_competition(name: str, artifacts: Path | None = None) -> Any:
    """A competition; with what its clean tables below `artifacts` say of it, where they are given."""
    from pipeline.competitions import competition_of, get_competition

    return get_competition(name) if artifacts is None else competition_of(find_paths(name, artifacts))


def find_paths(comp: str, artifacts: Path) -> Paths:
    """Where a competition's files are; the name is checked here, or of a misspelt one a file would be "missing"."""
    try:
        str(artifacts.absolute()).encode()
    except UnicodeEncodeError as err:
        raise ConfigError(
            f"ARTIFACTS={os.fsencode(artifacts)!r} in {os.fsencode(Path.cwd())!r}: a path that is not UTF-8, which "
            "tables and logs cannot name. Next: choose another folder."
        ) from err
    return Paths(comp=find_competition(comp).name, root=artifacts)


def find_trained(model: str, *, split: str, tag: str, paths: Paths) -> str | Path:
    """`find_run`; ConfigError where nothing is called as MODEL says: no run, no shipped weights, no config, no file."""
    from pipeline.config import list_configs

    run = find_run(model, split=split, tag=tag)
    shipped = sorted(card.parent.name for card in PRETRAINED.glob("*/card.md"))
    if isinstance(run, Path) or paths.run_dir(run).is_dir() or Path(model).is_file() or model in list_configs():
        return run
    hint = did_you_mean(model, [*shipped, *list_configs()])
    raise ConfigError(
        f"MODEL={model!r} is not known; expected a run's folder, {', '.join(shipped)}, or one of "
        f"{', '.join(list_configs())}.{hint} Next: name one of these; make status lists what is trained."
    )


def find_config(
    model: str, *, split: str, tag: str, overrides: Sequence[str], resumes: bool = False
) -> tuple[Any, str]:
    """The settings of a run, and its name; settings of its own need a tag, unless it resumes."""
    from pipeline.config import load_config

    if overrides and not tag and not resumes:
        raise ConfigError("--set changes what a run is. Next: name the variant with --tag (make: TAG=…).")
    if tag.startswith(SWEEP):
        raise ConfigError(
            f"TAG={tag!r}: runs of these names are a sweep's, left out of ensembles. Next: give another TAG."
        )
    return load_config(model, overrides), run_name(model, split=split, tag=tag)


def seconds_of(text: str, *, option: str = "BUDGET") -> float | None:
    """Seconds of ``90s``, ``45m``, ``8h``; None for an empty text."""
    if not text:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if not found:
        raise ConfigError(f"{option} {text!r}: expected a number with s, m or h, such as 8h. Next: correct it.")
    return float(found.group(1)) * {"s": 1, "m": 60, "h": 3600}[found.group(2)]
