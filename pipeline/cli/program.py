"""The program: its help, a verb that leaves word of what it was told, and how the report of a stage is printed."""

import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import typer
from typer.core import TyperCommand

from pipeline import commands
from pipeline.cli.options import find_competition
from pipeline.runlog import output
from pipeline.stage import Report

_Run = TypeVar("_Run", bound=Callable[..., Any])

app = typer.Typer(
    help="RNA competitions: raw files to checked, scored submissions. Each verb is one stage and can be run twice.",
    epilog="Order: (download), data, (bpp), (features), folds, train, ensemble, submit, evaluate, report. Exit codes: "
    "0 done, 2 configuration, 3 data, 4 diverged, 5 storage or memory, 6 network or credentials, 7 died repeatedly, "
    "75 stopped and resumable.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


class _Verb(TyperCommand):
    """A verb that leaves word of what it was told, for the commands that its sentences end with."""

    def invoke(self, ctx: Any) -> Any:
        """Run it."""
        told = dict(ctx.params)
        if "comp" in told and told.get("model") == find_competition(told["comp"]).default_model:
            del told["model"]
        verbs = ctx.find_root().command.commands
        commands.remember(told, verbs={name: [option.name for option in one.params] for name, one in verbs.items()})
        return super().invoke(ctx)


def verb(name: str | None = None) -> Callable[[_Run], _Run]:
    """Make a function a verb, of another name than its own if one is given.

    `rna --help` lists it below the first line of its module's docstring.
    """

    def register(run: _Run) -> _Run:
        about = (sys.modules[run.__module__].__doc__ or "").partition("\n")[0]
        return app.command(name, cls=_Verb, rich_help_panel=about.rstrip("."))(run)

    return register


_MOST_OUTPUTS = 8  # named one by one: a stage that writes every fold has a dozen


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
