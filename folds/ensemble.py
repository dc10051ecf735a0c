"""Folds and models become one set of predictions: a weighted mean of values or probabilities, a choice of structures.

`folds.blend` joins values and probabilities, `folds.candidates` chooses structures; both read what `Job` names.
"""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.table import Table

from folds.blend import blend, blend_test
from folds.candidates import Scorer, choose, choose_test
from folds.job import Job
from pipeline.competitions.base import Competition
from pipeline.errors import ConfigError, DataError, did_you_mean
from pipeline.labels import Classes, read_classes
from pipeline.paths import Paths
from pipeline.runlog import amount, score_text, warn
from pipeline.runs import STAGES, SWEEP, read_run_name, require_same_test, weighted_runs
from pipeline.stage import Report, read_result, run_stage, sha256_file
from pipeline.tables import fold_numbers

VERSION = 5

_SHOWN = 8  # most targets in the table for the terminal


def run(
    paths: Paths,
    *,
    competition: Competition,
    name: str,
    runs: Sequence[str],
    split: str,
    allow_partial: bool = False,
    score: Scorer | None = None,
) -> Report:
    """Join the folds of every run, and the runs, into ``ensembles/<name>/{oof,test}.parquet`` and ``weights.json``.

    Memory does not grow with the number of sequences, but for one id and fold number of each.

    Args:
        paths: where the artefacts of the competition live.
        competition: decides between values, classes, numbers and structures, and gives the metric.
        name: of the ensemble.
        runs: names below ``runs/``, each trained on `split`.
        split: whose fold table says what is out of fold.
        allow_partial: use the folds that all runs have, instead of refusing when one is missing.
        score: gives TM-scores, from which the choice of structures is learned; None takes confidences as they are.

    Raises:
        ConfigError: no runs, one twice, or a fold of one is not trained or predicted.
        DataError: predictions of other data or an earlier test set, not out of fold, twice for a sequence, or not
            finite.
    """
    _check_names(name, runs)
    tested = competition.has_test(paths)
    folds, skipped = _find_folds(paths, runs, split=split, allow_partial=allow_partial, tested=tested)
    if tested:
        require_same_test(paths, [(each, fold) for each in runs for fold in folds])
    inputs = {"train": paths.clean("train"), "folds": paths.fold_table(split)}
    if competition.task == "structure" and score is not None:
        inputs["references"] = paths.clean("references")  # what the policy learns from
    for each in runs:
        for fold in folds:
            inputs[f"{each}/fold{fold}/oof"] = paths.oof(each, fold)
            if tested:
                inputs[f"{each}/fold{fold}/test"] = paths.test(each, fold)
    classes = None
    if competition.task == "classes":
        inputs["classes"] = paths.clean("classes")
        classes = read_classes(paths)
    home = paths.ensemble_dir(name)
    found: dict[str, Any] = {"folds": folds, "skipped": skipped, "classes": classes}
    job = Job(paths=paths, competition=competition, runs=tuple(runs), split=split, **found)
    is_structure = competition.task == "structure"
    build = partial(choose, job, score=score) if is_structure else partial(blend, job)
    return run_stage(
        "ensemble",
        inputs=inputs,
        outputs={
            "oof": home / "oof.parquet",
            **({"test": home / "test.parquet"} if tested else {}),
            "weights": home / "weights.json",
        },
        params={
            "version": VERSION,
            **competition.params,
            "runs": list(runs),
            "split": split,
            "folds": folds,
            "learn_weights": True,
            **({"scored": score is not None} if is_structure else {}),
        },
        notes={"table": sha256_file(paths.clean("test"))} if tested else None,  # which a submission has to be of
        build=build,
    )


def apply(
    paths: Paths,
    *,
    competition: Competition,
    name: str,
    weights: Path,
    folds: Sequence[int] | None = None,
    partial_runs: bool = False,
) -> Report:
    """Join test predictions alone, as an earlier ensemble did, into ``ensembles/<name>/test.parquet``.

    For a machine that has the checkpoints of an ensemble and no training data: a notebook that a code competition runs.

    Args:
        paths: where the test predictions of every run and fold are.
        competition: the ensemble's.
        name: of the ensemble that is written.
        weights: ``weights.json`` of the earlier one: its runs, folds and weights; runs without weight are not read.
        folds: use these of its folds alone.
        partial_runs: of structures, choose among the predictions that are there: some folds of some runs.

    Raises:
        ConfigError: the weights are of another competition, a fold is not theirs, or values lack a run.
        DataError: `weights` or a table of predictions is missing or damaged, or two of them are of other data.
    """
    _check_names(name, ("any",))
    told = read_result(weights, hint="make ensemble")
    if told.get("competition") != competition.name:
        other = told.get("competition")
        raise ConfigError(f"{weights}: of {other}; expected {competition.name}. Next: COMP={other}.")
    chosen = list(told["folds"] if folds is None else folds)
    if not chosen or not set(chosen) <= set(told["folds"]):
        raise ConfigError(f"FOLD={chosen}: the folds of {weights} are {told['folds']}. Next: choose some of them.")
    left_out = [fold for fold in told["folds"] if fold not in chosen]
    runs = tuple(weighted_runs(told))
    classes = Classes.of(told["classes"]) if competition.task == "classes" else None
    what: dict[str, Any] = {"runs": runs, "split": told["split"], "folds": chosen, "skipped": left_out}
    job = Job(paths=paths, competition=competition, classes=classes, **what)
    if list(job.scoring.targets) != told["targets"]:
        raise ConfigError(
            f"{weights}: weights of {', '.join(told['targets'])}; expected those of "
            f"{', '.join(job.scoring.targets)}. Next: make ensemble of these data."
        )
    is_structure = competition.task == "structure"
    if partial_runs and not is_structure:
        raise ConfigError(f"ensemble: a mean of {competition.name} needs every run. Next: leave --partial out.")
    tables = {f"{each}/fold{k}/test": paths.test(each, k) for each in runs for k in chosen}
    if partial_runs:
        tables = {label: path for label, path in tables.items() if path.is_file()}
        if not tables:
            raise DataError(f"{paths.home / 'runs'}: no predictions of {weights}. Next: make predict.")
    return run_stage(
        "ensemble",
        inputs={"weights": weights} | tables,
        outputs={"test": paths.ensemble_dir(name) / "test.parquet"},
        params={"version": VERSION, **competition.params, "test_only": True, "folds": chosen},
        build=partial(choose_test, job, told.get("policy"))
        if is_structure
        else partial(blend_test, job, told["weights"]),
    )


def _check_names(name: str, runs: Sequence[str]) -> None:
    if not re.fullmatch(r"\w[\w.+-]*", name):
        raise ConfigError(
            f"NAME={name!r}: expected a letter or digit, then letters, digits and . _ + - only, as it names files. "
            "Next: NAME=all, for example."
        )
    if not runs:
        raise ConfigError("ensemble: no runs given. Next: make train FOLD=0 MODEL=…, and the other folds.")
    twice = sorted({each for each in runs if list(runs).count(each) > 1})
    if twice:
        raise ConfigError(f"ensemble: run {twice[0]!r} is given twice; expected each run once. Next: leave it out.")


def _find_folds(
    paths: Paths, runs: Sequence[str], *, split: str, allow_partial: bool, tested: bool
) -> tuple[list[int], list[int]]:
    """Folds to use and folds left out, from the fold table and the predictions that are there."""
    every = fold_numbers(paths.fold_table(split))
    lacking = {
        (each, fold)
        for each in runs
        for fold in every
        if not (paths.oof(each, fold).is_file() and (paths.test(each, fold).is_file() or not tested))
    }
    folds = [fold for fold in every if all((each, fold) not in lacking for each in runs)]
    if lacking and not (allow_partial and folds):
        each, fold = min(lacking)
        if not each.endswith(f".{split}"):
            begun = sorted(
                path.name for path in (paths.home / "runs").glob(f"*.{split}") if f"+{SWEEP}" not in path.name
            )
            hint = did_you_mean(f"{each}.{split}", begun)
            own = read_run_name(each)[2] if paths.run_dir(each).is_dir() else ""
            advice = f"SPLIT={own}" if own else "name some of these in RUNS, or leave it out"
            told = f"RUNS={each}: no run of {split}; there are: {', '.join(begun) or 'none'}."
            raise ConfigError(f"{told}{hint} Next: {advice}.")
        more = f" ({len(lacking)} folds are missing over all runs)" if len(lacking) > 1 else ""
        if allow_partial and len(runs) > 1:
            raise ConfigError(
                f"ensemble: no fold of {split} is predicted by all {len(runs)} runs; {each!r} lacks fold {fold}{more}. "
                "Next: name in RUNS those that share a fold."
            )
        raise ConfigError(
            f"run {each!r} has no predictions of fold {fold} of split {split}{more}. "
            f"Next: {_how_to_train(each, fold, comp=paths.comp)}."
        )
    skipped = [fold for fold in every if fold not in folds]
    if skipped:
        warn(f"ensemble: folds {skipped} are not predicted by all runs and are left out; scores cover folds {folds}")
    return folds, skipped


def _how_to_train(run: str, fold: int, *, comp: str) -> str:
    """The command that trains a fold to its end, wherever it stands, and predicts."""
    model, tag, split = read_run_name(run)
    if model in STAGES:
        return f"make {STAGES[model]} COMP={comp} SPLIT={split}"
    return f"make train FOLD={fold} COMP={comp} MODEL={model} SPLIT={split}{f' TAG={tag}' if tag else ''}"


def describe(facts: Mapping[str, Any]) -> Table:
    """Scores of the runs, of their mean and of the learned weights, as a table for the terminal."""
    if facts["task"] == "structure":
        return _describe_structures(facts)
    several = len(facts["targets"]) > 1  # of a single one the score tells all
    targets = facts["targets"] if several and len(facts["targets"]) <= _SHOWN else []
    table = Table(box=None, pad_edge=False, header_style="bold", title_justify="left")
    folds = amount(len(facts["folds"]), "fold")
    table.add_column(f"{folds} of {facts['split']}, {facts['metric']} out of fold", overflow="fold")
    for column in ("score", *targets):
        table.add_column(column, justify="right", overflow="fold")
    scores = {run: facts["run_scores"][run] for run in facts["runs"]} | {"plain mean": facts["mean_score"]}
    for each, score in scores.items():
        table.add_row(each, _score(score["score"]), *(_score(score["per_target"][target]) for target in targets))
    if facts["learned"]:
        table.add_row("learned, cross-fitted", _score(facts["learned"]["score_cross_fitted"]))
        table.add_row("learned, in sample (optimistic)", _score(facts["learned"]["score_in_sample"]))
    table.add_row(f"used: {facts['chosen']}", f"[bold]{_score(facts['score'])}[/]")
    if facts["score_nested"] is not None:
        table.add_row("used where each fold has what the others choose", _score(facts["score_nested"]))
    for each in facts["runs"] if len(facts["runs"]) > 1 else ():
        weights = [f"{facts['weights'][target][each]:.3f}" for target in facts["targets"]]
        span = f"{min(weights)} to {max(weights)}" if several else weights[0]
        table.add_row(f"weight of {each}", *(["", *weights] if targets else [span]))
    return table


def _score(value: float | None) -> str:
    return "" if value is None else score_text(value)


def _describe_structures(facts: Mapping[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(f"{amount(len(facts['folds']), 'fold')} of {facts['split']}", overflow="fold")
    table.add_column("test candidates taken", justify="right")
    for source, count in sorted(facts["taken_from"].items()):
        table.add_row(source, f"{count:,}")
    if policy := facts["policy"]:
        for each, score in policy["best_of_five_of_runs"].items():
            table.add_row(f"best of five out of fold, {each} alone", f"{score:.4f}")
        for each in policy["spare"]:
            table.add_row(f"in reserve, as the five are better without it: {each}", "")
        chosen = policy["best_of_five"][str(policy["novelty"])]
        table.add_row("best of five out of fold, chosen", f"[bold]{chosen:.4f}[/]")
        table.add_row("the same where each fold has what the others choose", f"{policy['best_of_five_nested']:.4f}")
        table.caption = "best of five: mean over the targets that teach; evaluate scores those that teach nothing, too"
    return table
