"""Scores of out-of-fold predictions by the organisers' metric, beside floors fitted on the other folds.

``scores.json`` holds the total and the same by target, fold, length, signal-to-noise, data set and position; every
number is a sum over positions divided by their count, never a mean of means.

`submissions.value_scores`, `class_evaluation`, `number_evaluation` and `structure_scores` compute them, one for each
task.
"""

import hashlib
import json
import math
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import polars as pl
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from pipeline.competitions.base import Competition
from pipeline.errors import ConfigError
from pipeline.paths import Paths
from pipeline.runlog import amount, score_text, warn
from pipeline.stage import Report, commit, read_result, run_stage, write_json
from pipeline.tables import fold_numbers, open_parquet, read_all, read_fold_table, require_out_of_fold
from submissions import class_evaluation, log, number_evaluation, value_scores
from submissions.breakdown import over_folds, tell_over_folds
from submissions.class_evaluation import evaluate_classes
from submissions.number_evaluation import evaluate_numbers
from submissions.number_scores import tell
from submissions.paired import tell_difference
from submissions.value_scores import evaluate_values
from submissions.whole_scores import has_test_truth

if TYPE_CHECKING:
    from submissions.engines import Engine

VERSION = 6


def run(
    paths: Paths,
    *,
    competition: Competition,
    split: str,
    name: str | None = None,
    run: str | None = None,
    engine: str = "built-in",
) -> Report:
    """Score an ensemble (and each of its runs), or a single run, and add a line to the log if the result is new.

    Args:
        paths: where the artefacts and the log live.
        competition: gives the metric.
        split: whose fold table says what is out of fold.
        name: of an ensemble; writes ``ensembles/<name>/scores.json``.
        run: of a single run instead; writes ``runs/<run>/scores.json``.
        engine: what computes the TM-scores of structures, as in `submissions.engines.choose_engine`.

    Raises:
        ConfigError: neither or both of `name` and `run`, an ensemble of another split, or an engine that is not there.
        DataError: predictions missing, not out of fold, not finite, or of other data; or none of them is scored.
    """
    if (name is None) == (run is None):
        raise ConfigError("evaluate: not both and not neither. Next: give the name of an ensemble or that of a run.")
    subject = _read_ensemble(paths, str(name), split, competition) if run is None else _find_run(paths, run, split)
    inputs = {"train": paths.clean("train"), "folds": paths.fold_table(split)} | subject.inputs()
    is_structure = competition.task == "structure"
    extra = {
        "values": {"bpp": paths.bpp} | ({"test": paths.clean("test")} if subject.test else {}),
        "classes": {"classes": paths.clean("classes"), "test": paths.clean("test")},
        "numbers": {"numbers": paths.clean("numbers"), "test": paths.clean("test")},
        "structure": {"references": paths.clean("references"), "test": paths.clean("test")},
    }[competition.task]
    needed = ("references", "classes", "numbers")
    inputs |= {label: path for label, path in extra.items() if label in needed or path.is_file()}
    if not is_structure and engine != "built-in":
        raise ConfigError(f"evaluate: ENGINE={engine} is for structures. Next: leave out ENGINE.")
    chosen = _choose_engine(engine) if is_structure else None
    if chosen and chosen.program:
        inputs["program"] = chosen.program
    score = partial(_score_structures, engine=chosen) if is_structure else _score_predictions
    build = partial(score, paths, competition, subject)
    report = run_stage(
        "evaluate",
        inputs=inputs,
        outputs={"scores": subject.home / "scores.json"},
        params={"version": VERSION, **competition.params, "split": split, "subject": subject.name}
        | ({"engine": chosen.matched_by} if chosen else {}),
        build=lambda parts: _write_scores(parts["scores"], build()),
    )
    _log(paths, subject, report, note=chosen.matched_by if chosen and chosen.program else "")
    return report


def _choose_engine(name: str) -> "Engine":
    from submissions.engines import choose_engine  # numba is slow to import

    return choose_engine(name, where="evaluate")


# ------------------------------------------------------------------------------------------------- what is scored


@dataclass(frozen=True, kw_only=True)
class _Subject:
    """An ensemble and its runs, or a run alone: names and the out-of-fold tables that make each."""

    name: str
    kind: str  #: "ensemble" or "run"
    split: str
    folds: list[int]
    home: Path
    sources: dict[str, list[Path]]  #: the subject first, under its name
    runs: list[str]
    test: Path | None = None  #: predictions of the test set, where the truth of some of it may be known

    @property
    def members(self) -> dict[str, str]:
        """Source -> run, of the runs that stand beside an ensemble."""
        return {f"run {each}": each for each in self.runs} if self.kind == "ensemble" else {}

    def facts(self, competition: Competition) -> dict[str, Any]:
        """What was scored, as ``scores.json`` records it."""
        return {
            "competition": competition.name,
            "task": competition.task,
            "metric": competition.metric,
            "columns": list(competition.targets),
            "kind": self.kind,
            "name": self.name,
            "split": self.split,
            "folds": self.folds,
        }

    def inputs(self) -> dict[str, Path]:
        tables = {
            f"{source}/{place}": path for source, tables in self.sources.items() for place, path in enumerate(tables)
        }
        return tables | ({"predictions of test": self.test} if self.test else {})


def _read_ensemble(paths: Paths, name: str, split: str, competition: Competition) -> _Subject:
    home = paths.ensemble_dir(name)
    hint = f"make ensemble COMP={paths.comp} NAME={name}"
    facts = read_result(home / "weights.json", manifest=home / "ensemble.manifest.json", hint=hint)
    if facts["split"] != split:
        raise ConfigError(
            f"ensemble {name!r} was made with split {facts['split']}; got SPLIT={split}. Next: make evaluate "
            f"COMP={paths.comp} SPLIT={facts['split']}."
        )
    runs = {f"run {each}": [paths.oof(each, fold) for fold in facts["folds"]] for each in facts["runs"]}
    may_be_known = competition.task == "structure" or has_test_truth(paths, competition.targets)
    sources = {name: [home / "oof.parquet"]} | runs
    return _Subject(
        name=name,
        kind="ensemble",
        split=split,
        folds=facts["folds"],
        home=home,
        sources=sources,
        runs=facts["runs"],
        test=home / "test.parquet" if may_be_known else None,
    )


def _find_run(paths: Paths, run: str, split: str) -> _Subject:
    if not paths.run_dir(run).is_dir():
        known = ", ".join(sorted(path.name for path in (paths.home / "runs").glob("*.*"))) or "none"
        raise ConfigError(f"RUN={run}: no such run; there are: {known}. Next: name one of these.")
    every = fold_numbers(paths.fold_table(split))
    folds = [fold for fold in every if paths.oof(run, fold).is_file()]
    if not folds:
        raise ConfigError(
            f"run {run!r} has no out-of-fold predictions of split {split}. Next: make train, make predict."
        )
    if folds != every:
        warn(f"evaluate: run {run} has folds {folds} of {every}; the score covers only these")
    tables = {run: [paths.oof(run, fold) for fold in folds]}
    return _Subject(name=run, kind="run", split=split, folds=folds, home=paths.run_dir(run), sources=tables, runs=[run])


def _write_scores(path: Path, scores: dict[str, Any]) -> dict[str, Any]:
    scores = _without_nan(scores)
    write_json(path, scores)
    return scores


def _without_nan(value: Any) -> Any:
    """NaN, the score of nothing, as null."""
    if isinstance(value, dict):
        return {key: _without_nan(item) for key, item in value.items()}
    if isinstance(value, list):
        return [_without_nan(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _score_predictions(paths: Paths, competition: Competition, subject: _Subject) -> dict[str, Any]:
    evaluators: dict[str, Callable[..., dict[str, Any]]] = {
        "classes": evaluate_classes,
        "numbers": partial(evaluate_numbers, competition=competition),
        "values": partial(evaluate_values, competition=competition),
    }
    scored = evaluators[competition.task](paths, split=subject.split, folds=subject.folds, sources=subject.sources)
    others, paired = scored.pop("others"), scored.pop("paired", None)
    if subject.test and competition.task == "numbers":
        scored["test"] = number_evaluation.evaluate_test(paths, competition=competition, predictions=subject.test)
    elif subject.test and competition.task == "values":
        scored["test"] = value_scores.evaluate_test(paths, competition=competition, predictions=subject.test)
    elif subject.test:
        thresholds = [row["threshold"] for row in scored["per_class"]]
        scored["test"] = class_evaluation.evaluate_test(paths, predictions=subject.test, thresholds=thresholds)
    if paired:
        scored["best_run"] = subject.members.get(paired["best"], subject.name)
        for source, difference in paired["differences"].items():
            others.get(source, scored)["difference"] = difference
    return (
        subject.facts(competition)
        | scored
        | {"runs": {each: others[source] for source, each in subject.members.items()}}
    )


def _score_structures(
    paths: Paths, competition: Competition, subject: _Subject, *, engine: "Engine | None"
) -> dict[str, Any]:
    from submissions.structure_scores import evaluate_structure  # numba is slow to import

    score = partial(evaluate_structure, paths, competition=competition, engine=engine)
    names = {subject.name: subject.name} | subject.members
    with tempfile.TemporaryDirectory() as folder:
        scored = {}
        for source, tables in subject.sources.items():
            joined = Path(folder) / "oof.parquet"
            _read_structures(paths, subject.split, tables, run=names[source]).write_parquet(joined)
            scored[source] = score(predictions=joined)
    main = scored[subject.name]
    test = score(predictions=subject.test) if subject.test and _known_of(paths, subject.test) else None
    return subject.facts(competition) | {
        **main,
        **_structure_folds(paths, subject, main["targets"]),
        "runs": {each: _both_modes(scored[source]) for source, each in subject.members.items()},
        "test": test,
        "floor_notes": [],
    }


def _both_modes(scores: Mapping[str, Any]) -> dict[str, Any]:
    return {"score": scores["score"], "sequence_independent": {"score": scores["sequence_independent"]["score"]}}


def _known_of(paths: Paths, predictions: Path) -> bool:
    """Whether the structure of a predicted target is known."""
    open_parquet(predictions, ["sequence_id"]).close()
    predicted, known = (
        pl.scan_parquet(path).select("sequence_id").unique() for path in (predictions, paths.clean("references"))
    )
    return predicted.join(known, on="sequence_id", how="semi").collect().height > 0


def _read_structures(paths: Paths, split: str, tables: Sequence[Path], *, run: str) -> pl.DataFrame:
    """Candidates of all folds, none of them of a checkpoint that saw its target; those of a run have its ``source``."""
    joined = pl.concat([read_all(table) for table in tables]).sort("sequence_id", "candidate")
    held_out = read_fold_table(paths.fold_table(split))
    require_out_of_fold(joined, held_out, where=tables[0].parent, split=split)
    return joined if "source" in joined.columns else joined.with_columns(pl.lit(run).alias("source"))


def _structure_folds(paths: Paths, subject: _Subject, targets: list[dict[str, Any]]) -> dict[str, Any]:
    held_out = read_fold_table(paths.fold_table(subject.split))
    scores = pl.DataFrame(
        {"sequence_id": [row["sequence_id"] for row in targets], "score": [row["score"] for row in targets]}
    )
    by_fold = (
        scores.join(held_out, on="sequence_id", validate="1:1")
        .group_by("fold")
        .agg(pl.col("score").sort_by("sequence_id").mean(), pl.len().alias("sequences"))
        .sort("fold")
    )
    return {"per_fold": by_fold.to_dicts()} | over_folds(by_fold["score"].to_list())


# ---------------------------------------------------------------------------------------------------------------- log


def _log(paths: Paths, subject: _Subject, report: Report, *, note: str) -> None:
    facts = report.facts
    manifest = json.loads((subject.home / "evaluate.manifest.json").read_text())
    floors = ", ".join(f"{name} {score_text(value)}" for name, value in _floors(facts).items())
    entry = log.LogEntry(
        date=log.today(),
        comp=facts["competition"],
        name=facts["name"],
        split=facts["split"],
        folds=",".join(map(str, facts["folds"])),
        metric=facts["metric"],
        score=score_text(facts["score"], 5),
        floors=floors,
        data=manifest["inputs"]["train"][:10],
        config=_config_digest(paths, subject),
        commit=commit() or "-",
        note="; ".join(filter(None, (note, facts.get("copies_note")))),
    )
    log.append(paths.log, entry)


def _config_digest(paths: Paths, subject: _Subject) -> str:
    """First digits of a digest of the settings of all runs, as their folds recorded them."""
    found = []
    for each in subject.runs:
        for fold in subject.folds:
            path = paths.fold_dir(each, fold) / "config.json"
            if path.is_file():
                found.append(json.dumps(read_result(path, hint="make train").get("config"), sort_keys=True))
    if not found:
        return "-"
    distinct = sorted(set(found))
    return hashlib.sha256("\n".join(distinct).encode()).hexdigest()[:10]


# -------------------------------------------------------------------------------------------------------- what it says


@dataclass(frozen=True, kw_only=True)
class Headline:
    """The one number, and those beside it."""

    metric: str
    score: float
    floors: dict[str, float]


def headline(facts: Mapping[str, Any]) -> Headline:
    """Metric, score and floors of a `scores.json`."""
    return Headline(metric=facts["metric"], score=facts["score"], floors=_floors(facts))


def _floors(facts: Mapping[str, Any]) -> dict[str, float]:
    """Floors from the weakest to the one that is hardest to beat; `scores.json` keeps no order."""
    lower_is_better = facts["task"] != "structure"
    return dict(sorted(facts["floors"].items(), key=lambda item: item[1], reverse=lower_is_better))


def describe(facts: Mapping[str, Any]) -> RenderableType:
    """Scores of the subject, of its runs and of the floors, for the terminal; below them every class or structure."""
    targets = facts["columns"] if facts["task"] != "structure" else []
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(
        f"{facts['metric']}, {amount(len(facts['folds']), 'fold')} of {facts['split']}, out of fold", overflow="fold"
    )
    both = ["sequence-independent"] if facts["task"] == "structure" else []
    for column in ("score", *both, *targets, "folds: mean ± sd"):
        table.add_column(column, justify="right", overflow="fold")
    if facts.get("best_run"):
        table.add_column("less the best run, 95 %", justify="right", overflow="fold")
    table.add_row(*_cells(facts["name"], facts, targets), style="bold")
    for each, scores in sorted(facts["runs"].items()):
        mark = ["best run"] if each == facts.get("best_run") else []
        table.add_row(*_cells(f"  {each}", scores, targets), *mark)
    for name in _floors(facts):
        details = facts["floor_details"][name] if not both else _floor_of_both(facts, name)
        table.add_row(*_cells(f"floor: {name}", details, targets), style="dim")
    if facts["task"] != "structure" and "test" in facts:
        table.add_row(*_cells(f"test set, {facts['test']['scored']:,} sequences", facts["test"], targets))
    parts: list[RenderableType] = [table, *(Text(note, style="dim") for note in facts["floor_notes"])]
    of_parts = {"classes": class_evaluation.describe, "numbers": number_evaluation.describe}
    if facts["task"] != "structure":
        more = of_parts[facts["task"]](facts) if facts["task"] in of_parts else None
        return Group(*parts, Text(), more) if more else Group(*parts)
    from submissions import structure_scores  # numba is slow to import

    parts.append(Text(structure_scores.describe(facts, with_floors=False)))
    if facts["test"]:
        parts.append(Text(f"\ntest targets of known structure\n{structure_scores.describe(facts['test'])}"))
    return Group(*parts)


def _floor_of_both(facts: Mapping[str, Any], name: str) -> dict[str, Any]:
    """A floor's scores of structures, as those of a run."""
    return {
        "score": facts["floors"][name],
        "sequence_independent": {"score": facts["sequence_independent"]["floors"][name]},
    }


def _cells(label: str, scores: Mapping[str, Any], targets: Sequence[str]) -> list[str]:
    told = [tell(scores["per_target"][target], target) for target in targets]
    told += [_number(scores["sequence_independent"]["score"])] if "sequence_independent" in scores else []
    cells = [label, _number(scores["score"]), *told, tell_over_folds(scores) or ""]
    return [*cells, tell_difference(scores["difference"])] if "difference" in scores else cells


def _number(value: float | None) -> str:
    return "" if value is None else score_text(value)
