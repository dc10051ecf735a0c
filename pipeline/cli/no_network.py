"""Predictors without a network: structures from templates or pairing, words."""

from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

import typer

from pipeline.cli.options import ARTIFACTS, SPLIT, Artifacts, Comp, Split, find_competition, find_paths, seconds_of
from pipeline.cli.program import show, verb
from pipeline.errors import ConfigError
from pipeline.paths import Paths

Source = Annotated[
    Path | None, typer.Option("--from", help="Folder of an earlier run: the test set alone, with what it learned.")
]
Msa = Annotated[
    Path | None,
    typer.Option("--msa", help="Undated alignments: folder of <target>.MSA.fasta, parquet target_id, msa; none."),
]
StageBudget = Annotated[str, typer.Option("--time-budget", help="With --from: begin no target after this time: 90s.")]


@verb()
def templates(
    raw: Annotated[str, typer.Option("--raw", help="Folder with mmCIF or PDB files, also in folders below.")],
    comp: Comp = "rna3d",
    artifacts: Artifacts = ARTIFACTS,
    workers: Annotated[int | None, typer.Option("--workers", help="Processes; default: one per CPU.", min=1)] = None,
) -> None:
    """Read structure files into a dated library of RNA chains (needs gemmi: the extra templates)."""
    from pipeline.preprocess import describe
    from pipeline.templates import collection

    if not raw:
        raise ConfigError("templates: RAW is empty. Next: RAW=<folder> with mmCIF or PDB files.")
    find_competition(comp, artifacts).require_structures("templates")
    report = collection.run(find_paths(comp, artifacts), raw=Path(raw), workers=workers)
    show(report, describe(report.facts))


@verb("templates-predict")
def templates_predict(
    comp: Comp = "rna3d",
    artifacts: Artifacts = ARTIFACTS,
    split: Split = SPLIT,
    msa: Msa = None,
    source: Source = None,
    time_budget: StageBudget = "",
) -> None:
    """Predict structures from templates that a target's date and fold allow, as a run that ensemble takes."""
    from pipeline.templates import predict as stage

    what: dict[str, Any] = {"competition": find_competition(comp, artifacts), "split": split, "msa": msa}
    _predict_structures(stage, find_paths(comp, artifacts), what, source=source, time_budget=time_budget)


@verb()
def denovo(
    comp: Comp = "rna3d",
    artifacts: Artifacts = ARTIFACTS,
    split: Split = SPLIT,
    source: Source = None,
    time_budget: StageBudget = "",
) -> None:
    """Predict structures from pairing and from loops of known structures, as a run that ensemble takes."""
    from pipeline.structure import predict as stage

    what: dict[str, Any] = {"competition": find_competition(comp, artifacts), "split": split}
    _predict_structures(stage, find_paths(comp, artifacts), what, source=source, time_budget=time_budget)


@verb()
def words(
    comp: Comp = "labelled", artifacts: Artifacts = ARTIFACTS, split: Split = SPLIT, source: Source = None
) -> None:
    """Predict classes or numbers of a labelled set by counting words (naive Bayes, ridge), as a run for ensembles."""
    from pipeline import words as stage

    paths, what = find_paths(comp, artifacts), {"competition": find_competition(comp, artifacts), "split": split}
    report = stage.run(paths, **what) if source is None else stage.apply(paths, **what, source=source)
    show(report, stage.describe(report.facts))


def predict_all(comp: str, artifacts: Path, *, split: str, msa: Path | None) -> None:
    """Make every run of a competition that needs no network; of some there is none."""
    where: dict[str, Any] = {"comp": comp, "artifacts": artifacts, "split": split}
    competition = find_competition(comp, artifacts)
    if competition.task == "structure":
        denovo(**where)
        templates_predict(**where, msa=msa)
    elif competition.has_labels:
        words(**where)


def _predict_structures(
    stage: ModuleType, paths: Paths, what: dict[str, Any], *, source: Path | None, time_budget: str
) -> None:
    """Learn from the training targets, pairs first where ViennaRNA is there; or go by what `source` learned."""
    from pipeline import bpp, viennarna
    from submissions.tm_score import tm_scores

    if time_budget and source is None:
        raise ConfigError("--time-budget is of --from alone, which leaves out targets. Next: leave it out.")
    if source is None:
        if what["competition"].task == "structure" and viennarna.available()[0]:
            paired = bpp.run_in_turn(paths)
            show(paired, bpp.describe(paired.facts))
        report = stage.run(paths, **what, score=tm_scores)
    else:
        report = stage.apply(paths, **what, source=source, seconds=seconds_of(time_budget))
    show(report, stage.describe(report.facts))
