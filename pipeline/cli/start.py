"""Where to begin: what this machine can do, and the whole chain on small data."""

from pathlib import Path
from typing import Annotated

import typer
from rich.table import Table

from pipeline.cli.options import ARTIFACTS, Artifacts
from pipeline.cli.program import verb
from pipeline.runlog import output


@verb()
def doctor(artifacts: Artifacts = ARTIFACTS) -> None:
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
