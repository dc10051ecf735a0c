"""One HTML page for an ensemble or a run: scores beside floors, curves, calibration, errors, examples, provenance.

The page needs no network and runs no script. What an earlier stage has not left is named on the page, not guessed.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.competitions.base import Competition
from pipeline.errors import ConfigError, DataError
from pipeline.paths import Paths
from pipeline.runlog import amount, duration, score_text, size_text
from pipeline.runs import seen_before, tell_seen_before
from pipeline.stage import Report, read_manifest, read_result, run_stage, sha256_file
from submissions import page
from submissions.breakdown import tell_over_folds
from submissions.classes_report import classes_sections
from submissions.numbers_report import numbers_sections
from submissions.page import Markup
from submissions.paired import tell_difference
from submissions.structure_report import structure_sections
from submissions.subject import Subject, read_scores, score_cells, short_name
from submissions.training_report import Training, read_training, training_section
from submissions.values_report import values_sections

VERSION = 11
_SAME = 0.0005  # a difference from a floor, relative to it, that is none
_FEW = 30  # scored sequences


def run(paths: Paths, *, competition: Competition, name: str | None = None, run: str | None = None) -> Report:
    """Write ``report.html`` beside the ``scores.json`` of an ensemble, or of a single run.

    Args:
        paths: where the artefacts live.
        competition: the one that was scored.
        name: of an ensemble.
        run: of a single run instead.

    Returns:
        Report with the output ``report``; its facts tell the page's size and what is missing on it.

    Raises:
        ConfigError: neither or both of `name` and `run`.
        DataError: there are no scores, or predictions and tables do not belong together.
    """
    if (name is None) == (run is None):
        raise ConfigError("report: not both and not neither. Next: give the name of an ensemble or that of a run.")
    home = paths.run_dir(run) if run is not None else paths.ensemble_dir(str(name))
    subject = Subject(paths=paths, competition=competition, home=home, scores=read_scores(home, comp=paths.comp))
    _require_scored(subject)
    return run_stage(
        "report",
        inputs=subject.inputs(),
        outputs={"report": home / "report.html"},
        params={"version": VERSION, **competition.params, "subject": subject.name},
        build=lambda parts: _write(subject, parts["report"]),
    )


def _require_scored(subject: Subject) -> None:
    """See that the scores are of the predictions and tables that the page shows beside them."""
    scored = (read_manifest(subject.home / "evaluate.manifest.json") or {}).get("inputs", {})
    shown = {"train": subject.paths.clean("train"), "folds": subject.paths.fold_table(subject.split)}
    shown |= {f"{subject.name}/{place}": path for place, path in enumerate(subject.predictions)}
    for label, path in shown.items():
        if label in scored and path.is_file() and sha256_file(path) != scored[label]:
            which = f"{'NAME' if subject.scores['kind'] == 'ensemble' else 'RUN'}={subject.name}"
            raise DataError(f"{path}: became another one since it was scored. Next: make evaluate {which}.")


def _write(subject: Subject, path: Path) -> dict[str, Any]:
    training = read_training(subject)
    draw = {
        "values": values_sections,
        "classes": classes_sections,
        "numbers": numbers_sections,
        "structure": structure_sections,
    }
    middle = draw[subject.competition.task](subject)
    sections = {
        "folds": ("Scores by fold", _folds_section(subject)),
        "training": ("Training", training_section(subject, training)),
        **middle,
        "settings": ("Settings", _settings_section(subject)),
        "provenance": ("Data and versions", _provenance_section(subject)),
    }
    links = [page.element("a", title, href=f"#{anchor}") for anchor, (title, _) in sections.items()]
    seen = tell_seen_before(seen_before(subject.paths, subject.runs, subject.folds))
    body = page.join(
        _header(subject, training),
        *(page.missing(f"{sentence}.") for sentence in seen),
        page.element("nav", *links),
        *(page.section(anchor, title, content) for anchor, (title, content) in sections.items()),
        page.element(
            "footer",
            f"{'All other' if seen else 'All'} scores are out of fold: of sequences that the predicting checkpoint did "
            "not see in training. Its epoch was chosen by the score on that same fold, which flatters the scores a "
            "little.",
        ),
    )
    text = page.page(f"{subject.name} · {subject.title}", body)
    path.write_text(text, encoding="utf-8")
    return {"bytes": len(text.encode()), "missing": subject.missing}


# --------------------------------------------------------------------------------------------------------------- header


def _header(subject: Subject, training: Mapping[tuple[str, int], Training]) -> Markup:
    scores = subject.scores
    rows = [(f"{subject.name} (this page)", scores["score"], True)]
    rows += [(run, told["score"], False) for run, told in sorted(scores["runs"].items())]
    rows += [(f"floor: {floor}", score, False) for floor, score in scores["floors"].items() if score is not None]
    rows = sorted(rows, key=lambda row: (-row[1] if subject.higher_is_better else row[1], not row[2]))
    direction = "higher is better" if subject.higher_is_better else "lower is better"
    hero = page.element(
        "div",
        page.element(
            "div",
            page.element("div", f"{scores['metric']}, {direction}", class_="kicker"),
            page.element("div", score_text(scores["score"]), class_="score"),
        ),
        page.bars(rows),
        class_="hero",
    )
    return page.element(
        "header",
        page.element("div", f"{subject.title} · {scores['kind']} · split {subject.split}", class_="kicker"),
        page.element("h1", subject.name),
        page.element("p", _verdict(subject), class_="lead"),
        *([page.note(_roles(subject))] if subject.joined else []),
        hero,
        page.facts(_headline_facts(subject, training)),
    )


def _verdict(subject: Subject) -> str:
    name, floor = subject.best_floor
    if not floor:
        return f"The best floor, {name}, is without error: there is nothing to be better at."
    nested, few = subject.joined.get("score_nested"), _few(subject.scores)
    change = (subject.scores["score"] if nested is None else nested) / floor - 1
    said = "" if nested is None else score_text(nested)
    is_other = said not in ("", score_text(subject.scores["score"]))
    by = f"; judged by {said}, where each fold has what the others choose" if is_other else ""
    if abs(change) < _SAME:
        return f"As good as the best floor, {name} ({score_text(floor)}){by}.{few}"
    better = (change > 0) == subject.higher_is_better
    where = "above" if change > 0 else "below"
    judgement = "better" if better else "worse; the model has learned less than the floor knows"
    judgement = "no clear difference, as its 95 % interval holds 0" if _is_unclear(subject.scores, name) else judgement
    return f"{abs(change):.1%} {where} the best floor, {name} ({score_text(floor)}): {judgement}{by}.{few}"


def _few(scores: Mapping[str, Any]) -> str:
    """A warning where hardly anything is scored; else ""."""
    count = scores["sequences"]["scored"] if "sequences" in scores else len(scores["targets"])
    return f" Only {amount(count, 'sequence')} scored: such a difference may be chance." if count < _FEW else ""


def _is_unclear(scores: Mapping[str, Any], floor: str) -> bool:
    """Whether it is known that chance may have made the difference from a floor; only the best run's is known.

    An ensemble of that run alone predicts the same.
    """
    alone = scores["runs"] if len(scores["runs"]) == 1 else ()
    if scores.get("best_run") not in (scores["name"], *alone):
        return False
    told = scores.get("floor_details", {}).get(floor, {}).get("difference") or {}
    return told.get("low") is not None and told["low"] <= 0 <= told["high"]


def _roles(subject: Subject) -> str:
    """Which runs predict and which do not, and what a choice of them would score that had not seen the score."""
    words = f"Predicted by {', '.join(run for run in subject.runs if run not in subject.idle)}."
    if subject.idle:
        is_structure = subject.competition.task == "structure"
        reserve = "In reserve, as the five are better out of fold without, and used where the others have fewer"
        words += f" {reserve if is_structure else 'Of weight 0'}: {', '.join(subject.idle)}."
    policy = subject.joined.get("policy") or {}
    nested = policy.get("best_of_five_nested", subject.joined.get("score_nested"))
    if nested is not None:
        score = policy["best_of_five"][str(policy["novelty"])] if policy else subject.joined["score"]
        where = " over the targets that teach" if policy else ""
        words += f" The choice was made by this score ({score_text(score)}{where}); made for each fold by the others, "
        words += f"it gives {score_text(nested)}."
    return words


def _headline_facts(subject: Subject, training: Mapping[tuple[str, int], Training]) -> dict[str, object]:
    scores = subject.scores
    told: dict[str, object] = {"made of": _size(subject)}
    if "sequences" in scores:
        told["scored"] = f"{scores['sequences']['scored']:,} sequences"
    else:
        told["targets scored"] = f"{len(scores['targets']):,}"
    if scores["fold_sd"] is not None:
        told["mean ± sd over folds"] = tell_over_folds(scores)
    if training:
        told["training, all folds"] = duration(sum(each.seconds for each in training.values()))
        told["peak memory"] = size_text(round(max(each.memory_mib for each in training.values()) * 2**20))
    return told


def _size(subject: Subject) -> str:
    spare = f", {len(subject.idle)} more idle" if subject.idle else ""
    predicting = [run for run in subject.runs if run not in subject.idle]
    return f"{amount(len(predicting), 'run')} × {amount(len(subject.folds), 'fold')}{spare}"


# ---------------------------------------------------------------------------------------------------------------- folds


def _folds_section(subject: Subject) -> Markup:
    scores, targets = subject.scores, subject.scores["columns"]
    if subject.competition.task == "structure":
        rows = [[row["fold"], page.number(row["score"]), f"{row['sequences']:,}"] for row in scores["per_fold"]]
        return page.table(["fold", scores["metric"], "targets"], rows)
    everyone = {subject.name: scores, **dict(sorted(scores["runs"].items()))}
    floors = sorted(scores["floor_details"].items(), key=lambda floor: floor[1]["score"] or 0.0)
    everyone |= {f"floor: {name}": told for name, told in floors}
    kinds = ["own"] + [""] * len(scores["runs"]) + ["floor"] * len(floors)
    counted, lost = ("positions", None) if subject.competition.task == "values" else ("scored", "undefined")
    means = [[name, *score_cells(told, targets, lost=lost), tell_over_folds(told)] for name, told in everyone.items()]
    by_fold = [[row["fold"], *score_cells(row, targets, lost=lost), f"{row[counted]:,}"] for row in scores["per_fold"]]
    names = [short_name(target) for target in targets]
    notes = [page.note(note) for note in scores["floor_notes"]]
    return page.join(
        page.table(["", scores["metric"], *names, "folds: mean ± sd"], means, classes=kinds),
        *notes,
        _paired(everyone, scores),
        page.element("h3", f"{subject.name}, fold by fold"),
        page.table(["fold", scores["metric"], *names, counted], by_fold),
        _coverage(scores),
    )


def _paired(everyone: Mapping[str, Mapping[str, Any]], scores: Mapping[str, Any]) -> Markup:
    rows = [[name, tell_difference(told["difference"])] for name, told in everyone.items() if "difference" in told]
    if not rows:
        return page.join()
    words = "On the same sequences; the 95 % interval is a jackknife's over clusters, without the spread over seeds."
    return page.join(
        page.element("h3", f"Difference from the best run, {scores['best_run']}"),
        page.table(["", scores["metric"]], rows),
        page.note(words),
    )


def _coverage(scores: Mapping[str, Any]) -> Markup:
    count = scores["sequences"]
    text = (
        f"{count['predicted']:,} of {count['in_folds']:,} sequences of these folds have predictions; "
        f"{count['scored']:,} count in the metric."
    )
    if "score_clipped" in scores:
        text += f" Predictions clipped to the range of the truth would score {scores['score_clipped']:.4f}."
    if count["scored_without_prediction"]:
        text += f" {count['scored_without_prediction']:,} that count have no prediction and are left out."
    return page.note(text)


# ----------------------------------------------------------------------------------------------------------- provenance


def _settings_section(subject: Subject) -> Markup:
    parts = []
    if subject.scores["kind"] == "ensemble" and subject.competition.task != "structure":
        parts.append(_weights(subject))
    files = subject.fold_files("config.json").items()
    configs = {key: read_result(path, hint="make train").get("config", {}) for key, path in files}
    for run in subject.networks:
        of_run = {fold: config for (each, fold), config in configs.items() if each == run}
        if not of_run:
            parts.append(subject.without(f"No settings (config.json) of {run}."))
            continue
        distinct = {json.dumps(config, sort_keys=True): fold for fold, config in reversed(of_run.items())}
        for text, fold in distinct.items():
            which = run if len(distinct) == 1 else f"{run}, fold {fold}"
            parts.append(page.details(which, _settings(json.loads(text))))
    return page.join(*parts) if parts else page.note("None: no run is a network.")


def _weights(subject: Subject) -> Markup:
    told = subject.joined
    if not told:
        return subject.without("No weights of the ensemble (weights.json).")
    targets = told["targets"]
    rows = [[run, *(page.number(told["weights"][target][run], 3) for target in targets)] for run in subject.runs]
    words = f"Weights of the runs; chosen by the out-of-fold score: {told['chosen']}."
    return page.join(page.note(words), page.table(["run", *(short_name(target) for target in targets)], rows))


def _settings(config: Mapping[str, Any]) -> Markup:
    """A configuration section by section, one setting a line."""
    blocks = []
    for title, settings in config.items():
        flat = {**settings, **{f"kwargs.{key}": value for key, value in settings.get("kwargs", {}).items()}}
        lines = [f"{key} = {json.dumps(value)}" for key, value in flat.items() if key != "kwargs"]
        blocks.append(page.element("div", page.element("h4", title), page.element("pre", "\n".join(lines))))
    return page.panels(blocks, small=True)


def _manifest(path: Path) -> dict[str, Any]:
    done = read_manifest(path)
    if done is None:
        raise DataError(f"{path}: damaged or edited; expected what its stage wrote. Next: run its stage again.")
    return done


def _provenance_section(subject: Subject) -> Markup:
    manifests = {label: _manifest(path) for label, path in subject.manifests().items()}
    lost = {"data", "folds"} - {done.get("stage") for done in manifests.values()}
    notes = []
    if subject.competition.task == "values" and not subject.paths.bpp.is_file():
        notes.append(subject.without("No base-pair probabilities: floors and models did without them."))
    if lost:
        notes.append(subject.without(f"No manifest of {', '.join(sorted(lost))}: those hashes are not known."))
    times = [[label, f"{done.get('seconds', 0):,.1f}", done.get("commit")] for label, done in manifests.items()]
    hashes = [
        [label, kind, name, page.element("code", digest[:16])]
        for label, done in manifests.items()
        for kind in ("inputs", "outputs")
        for name, digest in sorted(done.get(kind, {}).items())
    ]
    known = [done["versions"] for done in manifests.values() if "versions" in done]
    versions: dict[str, str] = known[-1] if known else {}
    return page.join(
        *notes,
        page.note(" · ".join(f"{package} {version}" for package, version in versions.items())),
        page.element("h3", "Stages"),
        page.table(["stage", "time, s", "commit"], times),
        page.details(
            "sha256 of every file, first 16 digits", page.table(["stage", "", "file", "sha256"], hashes, words=4)
        ),
    )
