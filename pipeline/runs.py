"""Runs by their names: what they are called after, how many folds they have, and which of them are finished."""

import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from pipeline.competitions import get_competition
from pipeline.errors import ConfigError, DataError
from pipeline.labels import find_labels, labels_of
from pipeline.paths import PRETRAINED, Paths
from pipeline.runlog import say, warn
from pipeline.stage import read_manifest, read_result, sha256_file

#: Runs without a network, of labelled sets too: how their names begin -> the target of make.
STAGES = {"denovo": "denovo", "templates": "templates-predict", "words": "words"}
#: How the tags of a sweep's runs begin, <config>+sweep-<name>-<cell>-s<seed>.<split>: ensembles leave them out.
SWEEP = "sweep-"


def run_name(model: str, *, split: str, tag: str = "") -> str:
    """Folder name of a run: config, variant and split.

    Raises:
        ConfigError: the variant's name is not fit for a folder.

    >>> run_name("hyena", split="sim80_k5", tag="wide")
    'hyena+wide.sim80_k5'
    """
    if tag and not re.fullmatch(r"[\w.-]{1,100}", tag):
        raise ConfigError(f"TAG={tag!r} is no name for a folder. Next: take letters, digits, . _ -, at most 100.")
    return f"{Path(model).stem}{'+' + tag if tag else ''}.{split}"


def find_run(model: str, *, split: str, tag: str = "") -> str | Path:
    """The run that MODEL means where it is used: its name, or a folder with trained folds, shipped ones by their name.

    Raises:
        ConfigError: a fold's folder.

    >>> find_run("hyena", split="sim80_k5"), find_run("reactivity-v2", split="sim80_k5").parent.name
    ('hyena.sim80_k5', 'pretrained')
    """
    if re.fullmatch(r"fold\d+", Path(model).name) and (Path(model) / "checkpoints").is_dir():
        run, number = Path(model).parent, Path(model).name.removeprefix("fold")
        raise ConfigError(
            f"MODEL={model}: one fold of a run; expected the run's folder. Next: MODEL={run} FOLD={number}."
        )
    for folder in (PRETRAINED / model, Path(model)):
        if any(folder.glob("fold*/checkpoints")):
            return folder.resolve()
    return run_name(model, split=split, tag=tag)


def whole_name(run: str, *, split: str, paths: Paths) -> str:
    """The run that RUN or RUNS means, which may leave its split to SPLIT."""
    whole = f"{run}.{split}"
    return whole if paths.run_dir(whole).is_dir() and not paths.run_dir(run).is_dir() else run


def read_run_name(run: str) -> tuple[str, str, str]:
    """Config, variant ("" = none) and split that a run is called after: the inverse of `run_name`.

    >>> read_run_name("hyena+wide.sim80_k5")
    ('hyena', 'wide', 'sim80_k5')
    """
    variant, _, split = run.rpartition(".")
    model, _, tag = variant.partition("+")
    return model, tag, split


def is_stage(run: str) -> bool:
    """Whether a run was made without a network.

    >>> is_stage("denovo.sim80_k5"), is_stage("hyena+wide.sim80_k5")
    (True, False)
    """
    return run.partition(".")[0] in STAGES


def weighted_runs(told: Mapping[str, Any]) -> list[str]:
    """Runs of an ensemble's ``weights.json`` whose predictions it takes, in their order: a run may have no weight.

    >>> weighted_runs({"runs": ["a", "b", "c"], "weights": {"DMS_MaP": {"a": 1.0, "b": 0.0, "c": 0.0},
    ...                                                     "2A3_MaP": {"a": 0.6, "b": 0.0, "c": 0.4}}})
    ['a', 'c']
    >>> weighted_runs({"runs": ["denovo.sim80_k5"]})  # of structures there is a choice in place of weights
    ['denovo.sim80_k5']
    """
    weights = told.get("weights")
    return [run for run in told["runs"] if weights is None or any(of_run[run] for of_run in weights.values())]


def fold_count(split: str) -> int:
    """How many folds a split has, by its name.

    Raises:
        ConfigError: no split is called so.

    >>> fold_count("sim80_k5")
    5
    """
    found = re.fullmatch(r"\w+_k([1-9]\d*)", split)
    if not found:
        raise ConfigError(f"SPLIT={split!r}: expected <kind>_k<folds>. Next: SPLIT=sim80_k5, for example.")
    return int(found.group(1))


def check_fold(fold: int, split: str) -> int:
    """A fold's number, if the split's name allows for it.

    Raises:
        ConfigError: it does not.
    """
    count = fold_count(split)
    if fold >= count:
        raise ConfigError(f"FOLD={fold}: the folds of {split} are 0 to {count - 1}. Next: choose one of them.")
    return fold


def is_begun(folder: Path) -> bool:
    """Whether a folder of runs holds one: training left a checkpoint, or a stage without training its predictions."""
    return any(folder.glob("fold*/checkpoints")) or any(folder.glob("fold*/oof.parquet"))


def finished_runs(paths: Paths, split: str, *, partial: bool = False) -> list[str]:
    """Runs of a split whose folds all (`partial`: at least one) have out-of-fold and test predictions, sorted by name.

    Raises:
        DataError: there is none.
    """
    begun = sorted(path.name for path in (paths.home / "runs").glob("*.*") if is_begun(path))
    runs = [run for run in begun if run.endswith(f".{split}") and f"+{SWEEP}" not in run]
    tested = get_competition(paths.comp).has_test(paths)
    complete = [
        run
        for run in runs
        if (any if partial else all)(
            paths.oof(run, k).is_file() and (paths.test(run, k).is_file() or not tested)
            for k in range(fold_count(split))
        )
    ]
    if not complete:
        seen = ", ".join(runs or begun) or "no run at all"
        others = sorted({read_run_name(run)[2] for run in begun} - {split})
        advice = f"SPLIT={' or '.join(others)}, or " if others and not runs else ""
        advice += _how_to_make(paths.comp, runs[0]) if runs else f"make train-all COMP={paths.comp}"
        advice += ", or PARTIAL=1 to do without the folds that are missing" if runs and not partial else ""
        lacks = f"no run of {split} has predictions of {'any fold' if partial else 'all its folds'}"
        raise DataError(f"{paths.home / 'runs'}: {lacks} (seen: {seen}). Next: {advice}.")
    for run in sorted(set(runs) - set(complete)):
        say(f"{run}: left out, its folds are not complete")
    return complete


def _how_to_make(comp: str, run: str) -> str:
    """The command that makes a run, which leaves the folds that it has."""
    model, tag, _ = read_run_name(run)
    target = STAGES.get(model, f"train-all MODEL={model}{' TAG=' + tag if tag else ''}")
    return f"make {target} COMP={comp}"


def predicted_unfinished(folder: Path) -> bool:
    """Whether a fold's predictions were made before its training was finished."""
    found = (read_manifest(folder / f"predict-{table}.manifest.json") for table in ("oof", "test"))
    return any(done["params"].get("unfinished", False) for done in found if done)


def warn_of_unfinished(paths: Paths, runs: Sequence[str]) -> None:
    """Say which runs of an ensemble were predicted before their training was finished."""
    for run in runs:
        folders = sorted(paths.run_dir(run).glob("fold*"))
        early = [folder.name for folder in folders if predicted_unfinished(folder)]
        if early:
            warn(
                f"{run}: {', '.join(early)} predicted before the training was finished; these predictions are used. "
                "Next: make train goes on with it, then make ensemble again."
            )


def seen_before(paths: Paths, runs: Sequence[str], folds: Sequence[int]) -> dict[str, list[int]]:
    """Run -> those folds whose initial weights have learned, or may have, from the sequences that they hold out."""
    found: dict[str, list[int]] = {}
    for run in runs:
        for fold in folds:
            path = paths.fold_dir(run, fold) / "config.json"
            meta = read_result(path, hint="make train") if path.is_file() else {}
            own = {key: meta.get(key) for key in ("competition", "split", "fold")}
            own |= {"folds": (meta.get("data") or {}).get("folds")}
            learned = (meta.get("initial") or {}).get("trained_on", ())
            if any(each["competition"] == own["competition"] and each != own for each in learned):
                found.setdefault(run, []).append(fold)
    return found


def tell_seen_before(seen: Mapping[str, Sequence[int]]) -> list[str]:
    """A sentence for each run of `seen_before`."""
    return [
        f"{run}: fold {', '.join(map(str, folds))} began with weights that have learned, or may have, from what it "
        "holds out: its scores are not out of fold, nor what is chosen by them"
        for run, folds in seen.items()
    ]


def warn_of_seen_before(paths: Paths, runs: Sequence[str], folds: Sequence[int]) -> None:
    """Say which scores are no scores."""
    for sentence in tell_seen_before(seen_before(paths, runs, folds)):
        warn(f"{sentence}. Next: leave it out (RUNS=…), or believe a leaderboard alone.")


def warn_of_other_data(paths: Paths, runs: Sequence[str]) -> None:
    """Say which runs on a set of one's own predicted before its clean tables became what they are.

    Their folds may be the same ones and every sequence may be there: other labels alone would go unseen.
    """
    if not get_competition(paths.comp).is_own or not paths.clean("train").is_file():
        return
    train, arrays = sha256_file(paths.clean("train")), _sources_of_arrays(paths, "train")
    for run in runs:
        manifests = [*paths.run_dir(run).glob("fold*/predict-oof.manifest.json")]
        manifests += paths.run_dir(run).glob("words.manifest.json")
        inputs = [done["inputs"] for path in manifests if (done := read_manifest(path))]
        if any(_are_of_other_data(each, train, arrays) for each in inputs):
            warn(
                f"{run}: predicted before the clean tables were written anew, by which it is scored now. Next: "
                f"{_how_to_make(paths.comp, run)}{'' if is_stage(run) else ' RESTART=1, with its SET'}, or leave "
                "it out (RUNS=…)."
            )


def require_same_test(paths: Paths, predicted: Iterable[tuple[str, int]]) -> None:
    """See that test predictions are of the test set, and of the classes or numbers, that the clean tables hold now.

    An id does not tell that its sequence changed, nor a place in a list that it is another class's. Predictions of
    another program have no manifest and are believed.

    Args:
        paths: where runs and clean tables are.
        predicted: runs and folds.

    Raises:
        DataError: those of a run and fold are not.
    """
    test, arrays = sha256_file(paths.clean("test")), _sources_of_arrays(paths, "test")
    labels = find_labels(paths)
    for run, fold in predicted:
        folder, changed = paths.fold_dir(run, fold), ""
        of_run = paths.run_dir(run) / f"{STAGES.get(run.partition('.')[0])}.manifest.json"
        done = read_manifest(of_run if is_stage(run) else folder / "predict-test.manifest.json") or {}
        inputs, notes = done.get("inputs", {}), done.get("notes") or {}
        made_of = notes.get("table") or inputs.get("test") or arrays.get(inputs.get("arrays", ""))
        if made_of not in (None, test):
            changed = f"{paths.clean('test')} changed since"
        config = folder / "config.json"
        trained = labels_of(read_result(config, hint="make train")) if config.is_file() else None
        if labels and trained and (trained.kind, trained.names) != (labels.kind, labels.names):
            changed = f"the {labels.kind} are others by now ({trained.difference(labels)})"
        elif labels and inputs.get(labels.kind) not in (None, sha256_file(paths.clean(labels.kind))):
            changed = f"{paths.clean(labels.kind)} changed since"
        if changed:
            again = f"{_how_to_make(paths.comp, run)} SPLIT={read_run_name(run)[2]}"
            raise DataError(
                f"{paths.test(run, fold)}: {changed}; expected predictions of the same data. Next: {again}, then make "
                "ensemble."
            )


def _sources_of_arrays(paths: Paths, table: str) -> dict[str, str]:
    """sha256 of the meta of each array set of a clean table that there is -> sha256 of the table it was made of."""
    found = {path: read_manifest(path) or {} for path in paths.arrays_dir.glob(f"{table}-*/meta.json")}
    return {sha256_file(path): meta["input"] for path, meta in found.items() if "input" in meta}


def _are_of_other_data(inputs: Mapping[str, str], train: str, arrays: Mapping[str, str]) -> bool:
    """Whether inputs of predictions were made of another train table; arrays: sha256 of each set -> its table's."""
    if "train" in inputs:
        return inputs["train"] != train
    made_of = arrays.get(inputs.get("arrays", ""))
    return made_of != train if made_of else train in arrays.values()
