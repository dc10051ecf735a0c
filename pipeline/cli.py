"""The program ``rna``: one verb per stage. The roof of the house: the only module that may call every package.

Verbs import what they need when they run, so that `rna --help` and the stages without a network start at once.
"""

import atexit
import contextlib
import os
import re
import sys
import traceback
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.table import Table
from rich.text import Text

from pipeline.errors import ConfigError, DataError, PipelineError, StorageError
from pipeline.paths import Paths
from pipeline.runlog import console, output, say
from pipeline.stage import Report

app = typer.Typer(
    help="RNA competitions: raw files to checked, scored submissions. Each verb is one stage and can be run twice.",
    epilog="Order: data, folds, (bpp), train, ensemble, submit, evaluate, report. Exit codes: 0 done, 2 configuration, "
    "3 data, 4 diverged, 5 storage or memory, 6 network or credentials, 75 stopped and resumable.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

Comp = Annotated[str, typer.Option("--comp", help="Competition: ribonanza or rna3d.")]
Artifacts = Annotated[
    Path, typer.Option("--artifacts", help="Folder where the stages write.", envvar="RNA_ARTIFACTS", file_okay=False)
]
Model = Annotated[str, typer.Option("--model", help="A config of pipeline/configs by name, or a TOML file by path.")]
Split = Annotated[str, typer.Option("--split", help="Split: sim80_k5, length_k5 or random_k5.")]
Fold = Annotated[int, typer.Option("--fold", help="Fold to hold out, from 0.", min=0)]
Tag = Annotated[str, typer.Option("--tag", help="Names a variant of the model; needed with --set.")]
Sets = Annotated[
    list[str] | None, typer.Option("--set", help="Override, as TOML: train.lr=1e-3. May be given several times.")
]
Name = Annotated[str, typer.Option("--name", help="Name of the ensemble.")]

_INTERRUPTED = 130  # what a shell says of a program that Ctrl-C ended, and what typer makes of it
_COMP, _ARTIFACTS, _SPLIT, _NAME = "ribonanza", Path("artifacts"), "sim80_k5", "all"


@app.command()
def doctor(artifacts: Artifacts = _ARTIFACTS) -> None:
    """Say what this machine has, what of it is usable, and what will be used."""
    from pipeline.doctor import examine

    table = Table(box=None, show_header=False, pad_edge=False)
    marks = {"ok": "[green]ok[/]", "absent": "[dim]--[/]", "problem": "[red]!![/]"}
    for finding in examine(artifacts):
        table.add_row(marks[finding.state], f"[bold]{finding.what}[/]", finding.detail)
    output.print(table)


@app.command()
def demo(
    artifacts: Annotated[Path, typer.Option("--artifacts", help="Folder for everything the demo makes.")] = Path(
        "artifacts/demo"
    ),
    seed: Annotated[int, typer.Option("--seed", help="Of the synthetic data.", min=0)] = 0,
) -> None:
    """Run the whole chain, reactivity and structure, on a small synthetic data set (CPU, under three minutes)."""
    from pipeline.demo import run

    run(artifacts, seed=seed)


@app.command()
def data(
    raw: Annotated[str, typer.Option("--raw", help="Folder with the competition's files, as Kaggle ships them.")],
    comp: Comp = _COMP,
    artifacts: Artifacts = _ARTIFACTS,
) -> None:
    """Read and check the raw files, and write clean tables with a validation report."""
    from pipeline import preprocess

    if not raw:
        raise ConfigError("data: RAW is empty; expected the folder with the competition's files. Next: RAW=<folder>.")
    report = preprocess.run(_competition(comp), Path(raw).expanduser(), _paths(comp, artifacts))
    show(report, preprocess.describe(report.facts))


@app.command()
def bpp(
    comp: Comp = _COMP,
    artifacts: Artifacts = _ARTIFACTS,
    workers: Annotated[int | None, typer.Option("--workers", help="Processes; default: one per CPU.")] = None,
) -> None:
    """Compute base-pair probabilities of all sequences with ViennaRNA (needed by models with use_bpp = true)."""
    from pipeline import bpp as stage

    show(stage.run(_paths(comp, artifacts), workers=workers))


@app.command()
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


@app.command()
def audit(
    comp: Comp = _COMP,
    artifacts: Artifacts = _ARTIFACTS,
    split: Annotated[list[str] | None, typer.Option("--split", help="Split to audit; repeatable.")] = None,
) -> None:
    """Measure how much a split leaks: highest cross-fold identity, and the score of copying the nearest neighbour."""
    from folds import audit as stage

    report = stage.run(_paths(comp, artifacts), splits=split or [_SPLIT], competition=_competition(comp))
    show(report, stage.describe(report.facts))


@app.command()
def train(
    comp: Comp = _COMP,
    artifacts: Artifacts = _ARTIFACTS,
    model: Model = "ribonanza_mamba",
    split: Split = _SPLIT,
    fold: Fold = 0,
    all_folds: Annotated[bool, typer.Option("--all-folds", help="Train every fold of the split in turn.")] = False,
    tag: Tag = "",
    set_: Sets = None,
    max_steps: Annotated[
        int | None, typer.Option("--max-steps", help="Stop, resumable, after so many steps.", min=1)
    ] = None,
    time_budget: Annotated[
        str, typer.Option("--time-budget", help="Stop, resumable, after this time: 45m, 8h, 90s.")
    ] = "",
    restart: Annotated[bool, typer.Option("--restart", help="Set an earlier run aside and begin anew.")] = False,
) -> None:
    """Train one fold (or all) and predict; started again it resumes, or says that it is finished."""
    from pipeline import predict as predict_stage
    from pipeline import train as train_stage

    config, run = _config(model, split=split, tag=tag, overrides=set_ or ())
    competition, paths = _competition(comp), _paths(comp, artifacts)
    seconds, indices = _seconds(time_budget), range(_fold_count(split)) if all_folds else (_fold(fold, split),)
    if config.model.kwargs.get("use_bpp"):
        from pipeline import bpp as bpp_stage

        show(bpp_stage.run(paths))
    for index in indices:
        report = train_stage.run(
            config,
            competition=competition,
            paths=paths,
            run=run,
            split=split,
            fold=index,
            max_steps=max_steps,
            time_budget=seconds,
            restart=restart,
        )
        show(report)
        show(predict_stage.run(competition=competition, paths=paths, run=run, fold=index))


@app.command()
def predict(
    comp: Comp = _COMP,
    artifacts: Artifacts = _ARTIFACTS,
    model: Model = "ribonanza_mamba",
    split: Split = _SPLIT,
    fold: Fold = 0,
    tag: Tag = "",
    set_: Sets = None,
) -> None:
    """Predict the held-out fold and the test set with a trained checkpoint, which carries its own configuration."""
    from pipeline import predict as stage

    del set_  # the checkpoint's own settings hold
    run = run_name(model, split=split, tag=tag)
    show(stage.run(competition=_competition(comp), paths=_paths(comp, artifacts), run=run, fold=_fold(fold, split)))


@app.command()
def ensemble(
    comp: Comp = _COMP,
    artifacts: Artifacts = _ARTIFACTS,
    split: Split = _SPLIT,
    name: Name = _NAME,
    run: Annotated[list[str] | None, typer.Option("--run", help="Run to use; default: every finished one.")] = None,
) -> None:
    """Join folds and models into one prediction table, with weights learned on out-of-fold predictions."""
    from folds import ensemble as stage

    paths = _paths(comp, artifacts)
    runs = run or finished_runs(paths, split)
    report = stage.run(paths, competition=_competition(comp), name=name, runs=runs, split=split)
    show(report, stage.describe(report.facts))


@app.command()
def submit(
    comp: Comp = _COMP,
    artifacts: Artifacts = _ARTIFACTS,
    name: Name = _NAME,
    fmt: Annotated[str, typer.Option("--format", help="csv or parquet.")] = "csv",
) -> None:
    """Write the submission file and check it; an invalid file never gets its final name."""
    from submissions import write

    report = write.run(_paths(comp, artifacts), competition=_competition(comp), name=name, fmt=fmt)
    show(report, write.describe(report.facts))


@app.command()
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
    report = stage.run(_paths(comp, artifacts), competition=_competition(comp), file=file, sample=sample)
    show(report, f"accepted: {report.facts['rows']:,} rows, every id in its place, every value finite and in range")


@app.command()
def evaluate(
    comp: Comp = _COMP,
    artifacts: Artifacts = _ARTIFACTS,
    split: Split = _SPLIT,
    name: Name = _NAME,
) -> None:
    """Score the out-of-fold predictions by the organisers' metric, beside the trivial floors."""
    from submissions import evaluate as stage

    report = stage.run(_paths(comp, artifacts), competition=_competition(comp), name=name, split=split)
    show(report, stage.describe(report.facts))


@app.command()
def report(comp: Comp = _COMP, artifacts: Artifacts = _ARTIFACTS, name: Name = _NAME) -> None:
    """Write one self-contained HTML page: curves, calibration, errors, heat maps, configuration, hashes."""
    from submissions import report as stage

    show(stage.run(_paths(comp, artifacts), competition=_competition(comp), name=name))


@app.command("bench-data")
def bench_data(artifacts: Artifacts = _ARTIFACTS) -> None:
    """Time the data stage on a 100,000-row CSV beside pandas, polars, pyarrow and duckdb."""
    from pipeline import bench_data as bench

    bench.run(folder=artifacts / "bench")


@app.command("bench-folds")
def bench_folds(artifacts: Artifacts = _ARTIFACTS, comp: Comp = _COMP) -> None:
    """Time the clustering beside MMseqs2 and cd-hit, and count the relatives each leaves across folds."""
    from folds import bench

    output.print(bench.run(_paths(comp, artifacts), folder=artifacts / "bench"))


def _competition(name: str) -> Any:
    from pipeline.competitions import get_competition

    return get_competition(name)


def _paths(comp: str, artifacts: Path) -> Paths:
    return Paths(comp=comp, root=artifacts)


def run_name(model: str, *, split: str, tag: str = "") -> str:
    """Folder name of a run: config, variant and split.

    Raises:
        ConfigError: the variant's name is not fit for a folder.

    >>> run_name("hyena", split="sim80_k5", tag="wide")
    'hyena+wide.sim80_k5'
    """
    if tag and not re.fullmatch(r"[\w.-]+", tag):
        raise ConfigError(f"TAG={tag!r}: expected letters, digits and . _ - only, as it names a folder.")
    return f"{Path(model).stem}{'+' + tag if tag else ''}.{split}"


def finished_runs(paths: Paths, split: str) -> list[str]:
    """Runs of a split whose folds all have out-of-fold and test predictions, sorted by name.

    Raises:
        DataError: there is none.
    """
    runs = sorted(path.name for path in (paths.home / "runs").glob(f"*.{split}") if any(path.glob("fold*/checkpoints")))
    complete = [
        run
        for run in runs
        if all(paths.oof(run, k).is_file() and paths.test(run, k).is_file() for k in range(_fold_count(split)))
    ]
    if not complete:
        seen = ", ".join(runs) or "no run at all"
        raise DataError(
            f"{paths.home / 'runs'}: no run of {split} has predictions of all its folds (seen: {seen}). "
            "Next: make train-all, or make train FOLD=<k> for the folds that are missing."
        )
    for run in sorted(set(runs) - set(complete)):
        say(f"{run}: left out, its folds are not complete")
    return complete


def _config(model: str, *, split: str, tag: str, overrides: Sequence[str]) -> tuple[Any, str]:
    from pipeline.config import load_config

    if overrides and not tag:
        raise ConfigError("--set changes what a run is. Next: name the variant with --tag (make: TAG=…).")
    return load_config(model, overrides), run_name(model, split=split, tag=tag)


def _fold_count(split: str) -> int:
    found = re.fullmatch(r"\w+_k([1-9]\d*)", split)
    if not found:
        raise ConfigError(f"SPLIT={split!r}: expected <kind>_k<folds>, such as sim80_k5.")
    return int(found.group(1))


def _fold(fold: int, split: str) -> int:
    """A fold's number, if the split's name allows for it."""
    count = _fold_count(split)
    if fold >= count:
        raise ConfigError(f"FOLD={fold}: the folds of {split} are 0 to {count - 1}. Next: choose one of them.")
    return fold


def _seconds(text: str) -> float | None:
    """Seconds of ``90s``, ``45m``, ``8h``; None for an empty text."""
    if not text:
        return None
    found = re.fullmatch(r"(\d+(?:\.\d+)?)([smh])", text)
    if not found:
        raise ConfigError(f"--time-budget {text!r}: expected a number with s, m or h, such as 8h.")
    return float(found.group(1)) * {"s": 1, "m": 60, "h": 3600}[found.group(2)]


def show(report: Report, details: Any = ()) -> None:
    """Print what a stage did: one line, its own details (one renderable or several), and where its outputs are."""
    said = "up to date, nothing to do" if report.status == "current" else f"done in {report.seconds:.1f} s"
    output.print(f"[bold]{report.stage}[/]: {said}")
    for detail in details if isinstance(details, list | tuple) else [details]:
        output.print(detail)
    for path in report.outputs.values():
        output.print(f"  -> {_near(path)}", markup=False)


def _near(path: Path) -> Path:
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def main() -> NoReturn:
    """Run the verb of the command line, and end the process with its exit code.

    The process ends before Python's own shutdown: there, a thread of Arrow that still has to let go of a Python object
    aborts it, with SIGABRT instead of the exit code, after a file that was refused.
    """
    # torch's threads wait by spinning, which beside another busy process made training 2 to 10 times slower
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    code = 1  # of an exception that nobody expected

    def leave() -> None:
        with contextlib.suppress(OSError):  # whoever read the output may be gone
            sys.stdout.flush()
            sys.stderr.flush()
        os._exit(code)

    atexit.register(leave)  # the first to be registered is the last to run
    code = run_verb()
    raise SystemExit(code)


def run_verb(arguments: Sequence[str] | None = None) -> int:
    """Run a verb, by default that of the command line; a failure that a user can act on is told in one sentence.

    Returns:
        The exit code.
    """
    try:
        code = app(args=arguments, standalone_mode=False) or 0
        return _interrupted() if code == _INTERRUPTED else code
    except PipelineError as err:
        return _fail(str(err), err.exit_code)
    except MemoryError as err:
        return _fail(
            f"out of memory: {err}. Next: close other programs, or lower the batch size.", StorageError.exit_code
        )
    except OSError as err:
        if err.errno is None or err.strerror is None:  # not the system's
            raise
        where = f"{err.filename}: " if err.filename else ""
        return _fail(
            f"{where}{err.strerror}. Next: check the path, its permissions and the disk.", StorageError.exit_code
        )
    except (typer.Abort, KeyboardInterrupt):
        return _interrupted()
    except Exception as err:
        if not hasattr(err, "format_message"):  # not one of the command line's own
            raise
        sentence = err.format_message()  # empty where no verb was given: the help is printed then
        return _fail(sentence, ConfigError.exit_code) if sentence else ConfigError.exit_code


def _interrupted() -> int:
    return _fail("interrupted; nothing is half-written. Next: the same command again.", _INTERRUPTED)


def _fail(message: str, code: int) -> int:
    if os.environ.get("RNA_DEBUG"):
        traceback.print_exc()
    console.print(Text.assemble(("error: ", "bold red"), f"{message} (exit code {code})"))
    return code
