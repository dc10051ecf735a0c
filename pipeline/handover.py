"""The files that Kaggle asks of winners, written from the ensemble, the settings of its runs and what they ran on.

``artifacts/<comp>/handover/<name>/``: README.md, requirements.txt, directory_structure.txt, SETTINGS.json,
entry_points.md, and configs/ with the settings of every run as a TOML file.

Source: Kaggle's Winning Model Documentation Guidelines.
"""

import itertools
import json
import re
import time
import tomllib
from collections.abc import Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from pipeline.competitions.base import Competition
from pipeline.errors import ConfigError, DataError
from pipeline.paths import IS_CHECKOUT, REPOSITORY, Paths
from pipeline.runlog import duration, read_metrics
from pipeline.runs import STAGES, is_stage
from pipeline.stage import Report, commit, read_manifest, read_result, versions, write_json
from pipeline.templates.collection import library_path
from pipeline.training.checkpoint import CheckpointStore

_TREE = ("pipeline", "models", "folds", "submissions", "tests")


def run(paths: Paths, *, competition: Competition, name: str) -> Report:
    """Write the files for one ensemble.

    Raises:
        ConfigError: the competition is not one of Kaggle's, or this is no checkout.
        DataError: there is no such ensemble, or a checkpoint or metrics file of it is absent.
    """
    competition.require_kaggle("handover")
    if not IS_CHECKOUT:
        raise ConfigError(
            f"handover: {REPOSITORY} holds the installed package; expected a checkout of the project, whose files are "
            "handed over. Next: make handover in one."
        )
    started = time.monotonic()
    told = read_result(
        paths.ensemble_dir(name) / "weights.json", hint=f"make ensemble COMP={competition.name} NAME={name}"
    )
    trained = _in_order(paths, told)
    home = paths.home / "handover" / name
    home.mkdir(parents=True, exist_ok=True)
    features = {facts["config"]["data"].get("features") for folds in trained.values() for facts in folds} - {None, ""}
    steps = _steps(competition, paths, told, name, networks=list(trained), features=features)
    texts = {
        "README.md": _readme(competition, told, name, trained, steps),
        "requirements.txt": _requirements(),
        "directory_structure.txt": _tree(),
        "entry_points.md": _entry_points(steps),
    }
    (home / "configs").mkdir(exist_ok=True)
    configs = {home / "configs" / _config_name(run): _toml(folds[0]["config"]) for run, folds in trained.items()}
    for path in set((home / "configs").glob("*.toml")) - set(configs):  # of an earlier ensemble of this name
        path.unlink()
    for path, text in configs.items():
        path.write_text(text)
    for file, text in texts.items():
        (home / file).write_text(text)
    write_json(home / "SETTINGS.json", _settings(paths, told, name))
    outputs = {file: home / file for file in (*texts, "SETTINGS.json")}
    facts = {"runs": told["runs"], "folds": told["folds"]}
    return Report(stage="handover", status="built", outputs=outputs, facts=facts, seconds=time.monotonic() - started)


def _in_order(paths: Paths, told: Mapping[str, Any]) -> dict[str, list[dict[str, Any]]]:
    """Every network that the ensemble comes from -> its folds, after the networks that it learned from or began with.

    Those of other competitions and those that are not there any more are left out; the README names them.
    """
    found: dict[str, list[dict[str, Any]]] = {}

    def visit(run: str, *above: str) -> None:
        if run in found or run in above or not (paths.run_dir(run).is_dir() or run in told["runs"]):
            return
        folds = [_trained(paths, run, fold) for fold in told["folds"]]
        for other in folds[0]["needs"]:
            visit(other, run, *above)
        found[run] = folds

    for run in told["runs"]:
        if not is_stage(run):
            visit(run)
    return found


def _trained(paths: Paths, run: str, fold: int) -> dict[str, Any]:
    """What a fold's training was and took, from its checkpoint and its metrics."""
    folder = paths.fold_dir(run, fold)
    meta = CheckpointStore(folder / "checkpoints").newest_meta()
    rows = read_metrics(folder / "metrics.jsonl") if (folder / "metrics.jsonl").is_file() else []
    starts = [row for row in rows if row.get("event") == "start"]
    if meta is None or not starts:
        raise DataError(
            f"{folder}: no readable checkpoint or metrics.jsonl; expected those of a network trained here. Next: "
            "make train goes on with it, or make ensemble without it (RUNS=…)."
        )
    kept = ("device", "device_name", "precision", "parameters", "threads")
    pseudo, initial = list(meta["data"].get("pseudo", {}).get("runs", ())), meta.get("initial")
    home = paths.run_dir(initial["run"]).resolve() if initial else None
    began = home and Path(meta["config"]["model"].get("init", "")).resolve().is_relative_to(home)
    return {key: starts[-1].get(key, "") for key in kept} | {
        "config": meta["config"],
        "initial": initial,
        "pseudo": pseudo,
        "needs": [*pseudo, *([initial["run"]] if initial and began else [])],
        "steps": meta["step"],
        "finished": meta["progress"]["finished"],
        "seconds": _seconds(rows),
    }


def _seconds(rows: list[dict[str, Any]]) -> float | None:
    """Time of all sessions together, each from its start to its last row; None where rows have no time."""
    timed = [row for row in rows if isinstance(row.get("time"), int | float)]
    pairs = itertools.pairwise(timed)
    steps = [float(row["time"] - before["time"]) for before, row in pairs if row["event"] != "start"]
    return sum(steps) if steps else None


def _steps(
    competition: Competition,
    paths: Paths,
    told: Mapping[str, Any],
    name: str,
    *,
    networks: list[str],
    features: set[str],
) -> list[tuple[str, str]]:
    """What happens -> the command, in order."""
    at = f"COMP={competition.name}"
    uses_bpp = paths.bpp.is_file()
    uses_library = library_path(paths).is_file() and any(map(is_stage, told["runs"]))
    split = f"SPLIT={told['split']}"
    partial = bool(told["folds_left_out"])
    runs = [run.removesuffix(f".{told['split']}") for run in told["runs"]]
    given = " ".join(f"{each}=<folder or parquet>" for each in sorted(features))
    trained = [f"train FOLD={fold}" for fold in told["folds"]] if partial else ["train-all"]
    return [
        ("Prepare the data", f"make data {at} RAW=<folder with the raw files>"),
        *([("Base-pair probabilities", f"make bpp {at}")] if uses_bpp else []),
        *(
            (f"Embeddings {each} of all sequences", f"make features {at} NAME={each} FILE=<folder or parquet>")
            for each in sorted(features)
        ),
        *([("Known structures", f"make templates {at} RAW=<folder of mmCIF files>")] if uses_library else []),
        ("Assign the folds", f"make folds {at} {split}"),
        *(
            (f"Make the predictions of {run}", f"make {target} {at} {split}{rest}")
            for run in [*filter(is_stage, told["runs"]), *networks]
            for target, rest in _targets(paths, run, trained)
        ),
        (
            "Join the predictions",
            f'make ensemble {at} {split} NAME={name} RUNS="{" ".join(runs)}"{" PARTIAL=1" if partial else ""}',
        ),
        ("Write and check the submission", f"make submit {at} NAME={name}"),
        ("Predict new sequences", f'make predict {at} NAME={name} FILE=<sequences> FEATURES="{given}"')
        if features  # which no notebook gets
        else ("Predict new test data in a notebook", f"make kernel {at} KERNEL=predict NAME={name} OWNER=<user>"),
    ]


def _targets(paths: Paths, run: str, trained: list[str]) -> list[tuple[str, str]]:
    """What make is told for a run, before and after competition and split."""
    if is_stage(run):
        return [(STAGES[run.partition(".")[0]], _alignments(paths, run))]
    return [(target, f" MODEL=<this folder>/configs/{_config_name(run)}") for target in trained]


def _alignments(paths: Paths, run: str) -> str:
    """The option that gives a stage the alignments it was given, if it was."""
    manifest = paths.run_dir(run) / f"{STAGES[run.partition('.')[0]]}.manifest.json"
    inputs = (read_manifest(manifest) or {}).get("inputs", {})
    return " MSA=<folder of alignments>" if any(label.startswith("msa/") for label in inputs) else ""


def _config_name(run: str) -> str:
    """A TOML file's name, from which the run gets its name again."""
    return f"{run.rpartition('.')[0]}.toml"


def _toml(config: Mapping[str, Any]) -> str:
    """Settings as a TOML file; JSON writes their plain values, and names that TOML wants quoted, as TOML does."""
    lines: list[str] = []
    for section, values in config.items():
        tables = {f"{section}.{_key(key)}": value for key, value in values.items() if isinstance(value, Mapping)}
        for title, table in {section: values, **tables}.items():
            plain = {key: value for key, value in table.items() if not isinstance(value, Mapping)}
            lines += [f"[{title}]", *(f"{_key(key)} = {json.dumps(value)}" for key, value in plain.items()), ""]
    return "\n".join(lines)


def _key(name: str) -> str:
    return name if re.fullmatch(r"[\w-]+", name, re.ASCII) else json.dumps(name, ensure_ascii=False)


def _near(path: Path) -> Path:
    """As seen from the checkout, where it is below it."""
    return path.relative_to(REPOSITORY) if path.is_relative_to(REPOSITORY) else path


def _readme(
    competition: Competition,
    told: Mapping[str, Any],
    name: str,
    trained: Mapping[str, list[dict[str, Any]]],
    steps: list[tuple[str, str]],
) -> str:
    policy = told.get("policy") or {}
    found = policy["best_of_five"][str(policy["novelty"])] if policy else told.get("score")
    score = f", {found:.5f} out of fold" if found is not None else ""
    joined = f"Commit: {commit() or 'none recorded'}. Joined: {told['chosen']}."
    lines = [f"# {competition.title}: ensemble {name}", "", f"Metric: {competition.metric}{score}. {joined}", ""]
    lines += ["## Models", "", "| run | fold | parameters | steps | device | precision | time |"]
    lines += ["|---|---|---|---|---|---|---|"]
    for run, folds in trained.items():
        for fold, facts in zip(told["folds"], folds, strict=True):
            device = facts["device_name"] or facts["device"]
            spent = duration(facts["seconds"]) if facts["seconds"] is not None else "not recorded"
            did = f"{facts['steps']}{'' if facts['finished'] else ' (unfinished)'}"
            lines.append(
                f"| {run} | {fold} | {facts['parameters']:,} | {did} | {device} | {facts['precision']} | {spent} |"
            )
    if others := [run for run in trained if run not in told["runs"]]:
        lines += ["", *(f"{run}: not in the ensemble; others learned from it, or began with it." for run in others)]
    stages = [run for run in told["runs"] if is_stage(run)]
    if stages:
        how = "by counting words" if competition.has_labels else "from pairing and known structures"
        lines += ["", *(f"{run}: without a network, {how}." for run in stages)]
    if spare := policy.get("spare"):
        lines += ["", *(f"{run}: in reserve, used where the others have fewer than five." for run in spare)]
    began = [
        f"- {run} fold {fold}: those of {initial['run']} fold {initial['fold']}, step {initial['step']}"
        for run, folds in trained.items()
        for fold, facts in zip(told["folds"], folds, strict=True)
        if (initial := facts["initial"])
    ]
    if began:
        lines += ["", "## Weights that runs began with (model.init), which come first", "", *began]
    learned = [f"- {run}: {', '.join(taught)}" for run, folds in trained.items() if (taught := folds[0]["pseudo"])]
    if learned:
        title = "Predictions of the test set that runs learned from (data.pseudo), which come first"
        lines += ["", f"## {title}", "", *learned]
    lines += ["", "## Settings of the runs", ""]
    for run, folds in trained.items():
        lines += [f"{run}:", "", "```json", json.dumps(folds[0]["config"], indent=2, sort_keys=True), "```", ""]
    lines += ["## Software", "", *(f"- {package} {version}" for package, version in versions().items()), ""]
    lines += [
        "`requirements.txt` pins every package. Entry points are in `entry_points.md`, paths in `SETTINGS.json`.",
        "",
    ]
    lines += ["## From raw data to the submission", "", "```", *(command for _, command in steps), "```", ""]
    return "\n".join(lines)


def _requirements() -> str:
    """Our dependencies and what they need, at the versions that are installed here."""
    declared = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]["dependencies"]
    todo, found = [_package(text) for text in declared] + ["ViennaRNA"], dict[str, str]()
    while todo:
        package = todo.pop()
        key = re.sub(r"[-_.]+", "-", package).lower()
        if key in found:
            continue
        try:
            one = metadata.distribution(package)
        except metadata.PackageNotFoundError:
            continue
        found[key] = f"{one.metadata['Name']}=={one.version}"
        todo += [_package(text) for text in one.requires or () if "extra ==" not in text]
    return "\n".join(found[key] for key in sorted(found)) + "\n"


def _package(requirement: str) -> str:
    match = re.match(r"[\w.-]+", requirement)
    assert match is not None, requirement
    return match[0]


def _tree() -> str:
    """Every source file, folder by folder."""
    files = [path for folder in _TREE for path in (REPOSITORY / folder).rglob("*") if path.is_file()]
    kept = sorted(path.relative_to(REPOSITORY) for path in files if not {"__pycache__", "csv"} & {*path.parts})
    return "".join(f"./{path}\n" for path in ("Makefile", "README.md", "pyproject.toml", *kept))


def _settings(paths: Paths, told: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {
        "RAW_DATA_DIR": str(_near(_raw(paths))),
        "CLEAN_DATA_DIR": str(paths.clean("train").parent),
        "FOLDS_DIR": str(paths.fold_table(told["split"]).parent),
        "MODEL_CHECKPOINT_DIRS": {
            run: [str(paths.fold_dir(run, fold) / "checkpoints") for fold in told["folds"]]
            for run in told["runs"]
            if not is_stage(run)
        },
        "LEARNED_DIRS": {run: str(paths.run_dir(run)) for run in told["runs"] if is_stage(run)},
        "ENSEMBLE_DIR": str(paths.ensemble_dir(name)),
        "LOGS_DIR": str(paths.home / "runs"),
        "SUBMISSION_DIR": str(_near(paths.csv_dir)),
        "SPLIT": told["split"],
    }


def _raw(paths: Paths) -> Path:
    """Folder that the clean tables were made from."""
    made = read_manifest(paths.clean("data").with_name("data.manifest.json")) or {}
    return Path(made.get("notes", {}).get("raw", paths.raw))  # older manifests do not name it


def _entry_points(steps: list[tuple[str, str]]) -> str:
    lines = ["# Entry points", "", "Each is one command; run in this order, and safe to run again.", ""]
    for number, (what, command) in enumerate(steps, start=1):
        lines += [f"{number}. {what}", "", f"   ```\n   {command}\n   ```", ""]
    return "\n".join(lines)
