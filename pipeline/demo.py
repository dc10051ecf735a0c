"""The whole chain on small seeded data sets, in the competitions' own raw formats and labelled: no data, no GPU."""

import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from rich.rule import Rule
from rich.table import Table

from folds import assign, ensemble
from pipeline import bpp, commands, predict, preprocess, synthetic, train, viennarna
from pipeline.cli.program import show
from pipeline.competitions import get_competition
from pipeline.config import load_config
from pipeline.paths import Paths
from pipeline.runlog import output
from pipeline.runs import run_name
from submissions import evaluate, report, write

_SPLIT = "sim80_k2"
_NAME = "demo"

#: Competition -> what writes its raw files, which networks train, and whether they use pairing probabilities.
CHAINS: dict[str, tuple[Callable[..., object], tuple[str, ...], bool]] = {
    "ribonanza": (synthetic.write_ribonanza, ("tiny_ribonanza_mamba", "tiny_transformer_sepconv"), True),
    "openvaccine": (synthetic.write_openvaccine, ("tiny_transformer_sepconv",), True),
    "rna3d": (synthetic.write_rna3d, ("tiny_transformer_sepconv",), True),
    "labelled": (synthetic.write_labelled, ("tiny_drsn",), False),
}


def run(folder: Path, *, seed: int = 0) -> None:
    """Make raw data of every competition and a labelled set, run all stages on them, and print what came of it.

    Args:
        folder: everything goes below it: raw files, artefacts, submissions, the experiment log.
        seed: of the synthetic data.
    """
    started = time.monotonic()
    for comp, (write_raw, _, _) in CHAINS.items():
        write_raw(folder / "raw" / comp, seed=seed)
    has_bpp, reason = viennarna.available()
    if not has_bpp:
        output.print(f"base-pair probabilities are left out: {reason}")
    scores = [
        _chain(folder, comp, models=models, use_bpp=uses_bpp and has_bpp)
        for comp, (_, models, uses_bpp) in CHAINS.items()
    ]
    _summary(scores, seconds=time.monotonic() - started)


@commands.scope()
def _chain(folder: Path, comp: str, *, models: Sequence[str], use_bpp: bool) -> dict[str, Any]:
    """data -> folds -> (bpp) -> train and predict -> ensemble -> submit and check -> evaluate -> report."""
    competition = get_competition(comp)
    paths = Paths(comp=comp, root=folder)
    commands.remember({"comp": comp, "split": _SPLIT, "name": _NAME})
    _rule(competition.title)
    cleaned = preprocess.run(competition, folder / "raw" / comp, paths)
    show(cleaned, preprocess.describe(cleaned.facts))
    assigned = assign.run(paths, split=_SPLIT)
    show(assigned, assign.describe(assigned.facts))
    if use_bpp:
        paired = bpp.run(paths)
        show(paired, bpp.describe(paired.facts))
    runs = [_train(model, competition, paths, use_bpp=use_bpp) for model in models]
    joined = ensemble.run(paths, competition=competition, name=_NAME, runs=runs, split=_SPLIT)
    show(joined, ensemble.describe(joined.facts))
    written = write.run(paths, competition=competition, name=_NAME)
    show(written, write.describe(written.facts))
    scored = evaluate.run(paths, competition=competition, name=_NAME, split=_SPLIT)
    show(scored, evaluate.describe(scored.facts))
    page = report.run(paths, competition=competition, name=_NAME)
    show(page)
    return {"competition": competition, "scored": scored, "written": written, "page": page}


def _rule(title: str) -> None:
    output.print(Rule(title), width=min(output.width, 120))


def _train(model: str, competition: Any, paths: Paths, *, use_bpp: bool) -> str:
    config = load_config(model, [f"model.kwargs.use_bpp={str(use_bpp).lower()}"])
    run = run_name(model, split=_SPLIT)
    for fold in range(2):
        show(train.run(config, competition=competition, paths=paths, run=run, split=_SPLIT, fold=fold))
        show(predict.run(competition=competition, paths=paths, run=run, fold=fold))
    return run


def _summary(chains: Sequence[dict[str, Any]], *, seconds: float) -> None:
    _rule(f"demo finished in {seconds:.0f} s")
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("competition", "metric", "score", "floors"):
        table.add_column(column)
    for chain in chains:
        headline = evaluate.headline(chain["scored"].facts)
        floors = "; ".join(f"{name} {value:.3f}" for name, value in headline.floors.items())
        table.add_row(chain["competition"].name, headline.metric, f"[bold]{headline.score:.3f}[/]", floors)
    output.print(table)
    for chain in chains:
        output.print(f"submission: {chain['written'].outputs['submission']}", markup=False)
        output.print(f"report:     {chain['page'].outputs['report']}", markup=False)
