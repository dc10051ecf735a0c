"""A file of one's own sequences, predicted as the test set of a competition that has nothing else.

Below ``predictions/<name of the file>/`` lies what any test set has: a clean table, pairing probabilities, arrays,
predictions by run and fold. So whatever serves a hidden test set serves a file.
"""

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import polars as pl

from pipeline import bpp, features, predict, words
from pipeline.competitions import get_competition
from pipeline.competitions.base import Competition, Facts
from pipeline.competitions.labelled import LABELLED, read_sequences
from pipeline.errors import ConfigError, DataError
from pipeline.inference import with_best_checkpoint
from pipeline.labels import Labels, labels_of, read_labels, write_labels
from pipeline.paths import PRETRAINED, Paths
from pipeline.plan import longest_sequence
from pipeline.runlog import say
from pipeline.runs import is_stage, weighted_runs
from pipeline.schema import ALPHABET
from pipeline.stage import Report, read_result, run_stage, write_json, write_text
from pipeline.training.checkpoint import CheckpointStore
from pipeline.training.stop import alone_in

_VERSION = 1
NONE: Mapping[str, Path] = MappingProxyType({})


def require_file(source: Path, *, verb: str) -> None:
    """ConfigError where no file is given, DataError where it is not there, in the name of a verb."""
    if source == Path():
        raise ConfigError(f"{verb}: no file given; expected sequences. Next: make {verb} FILE=my.fasta.")
    if not source.is_file():
        raise DataError(f"{source}: no such file. Next: make {verb} FILE=<FASTA, CSV, TSV or parquet>.")


def write_single(sequence: str, paths: Paths) -> Path:
    """A FASTA file with one sequence, in the folder of its predictions, which is called after it."""
    name = f"sequence-{hashlib.sha256(sequence.encode()).hexdigest()[:8]}"
    path = paths.predictions_dir(name) / f"{name}.fasta"
    write_text(path, f">sequence\n{sequence}\n")
    return path


def folder_of(source: Path, paths: Paths) -> Path:
    """Where what is predicted for a file goes; another file of the same name takes its place."""
    return paths.predictions_dir(Path(source.name.removesuffix(".gz")).stem)


@contextlib.contextmanager
def held(source: Path, paths: Paths, *, verb: str) -> Iterator[None]:
    """Keep others out of the folder of a file, in the name of a verb: what they predict would come among its own.

    Raises:
        ConfigError, DataError: see `require_file`.
    """
    require_file(source, verb=verb)
    with alone_in(folder_of(source, paths), what="predicts a file of this name"):
        yield


def own_paths(source: Path, paths: Paths) -> Paths:
    """Where the stages find the sequences of a file, and write what they make of them."""
    return replace(paths, root=folder_of(source, paths))


def place_of(source: Path, own: Paths) -> str:
    """What messages call a sequence of `write_single`, of whose file nobody knows; "" = its file and row."""
    return "SEQ" if source.parent == own.root else ""


def read(source: Path, own: Paths, *, alphabet: str) -> Report:
    """The sequences of a file as a clean test table, in the order of the file.

    Args:
        source: see `pipeline.competitions.labelled.read_sequences`.
        own: where the table goes.
        alphabet: of the network.

    Returns:
        Facts: ``sequences`` and ``odd_letters``.

    Raises:
        DataError: the file is not what it should be.
    """

    def build(parts: dict[str, Path]) -> dict[str, Any]:
        frame, odd = read_sequences(source, alphabet=alphabet, place=place_of(source, own))
        frame.write_parquet(parts["test"], compression="zstd")
        return {"sequences": frame.height, "odd_letters": odd}

    columns = source.with_name("columns.toml")
    inputs = {"sequences": source} | ({"columns": columns} if columns.is_file() else {})
    params = {"version": _VERSION, "alphabet": alphabet}
    return run_stage("own-sequences", inputs=inputs, outputs={"test": own.clean("test")}, params=params, build=build)


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """What the networks made of a file, and how it is joined: by `folds.ensemble.apply`."""

    own: Paths
    competition: Competition  #: as the networks were trained on it
    name: str  #: of what is joined
    weights: Path  #: the ``weights.json`` that says how
    about: str  #: for a terminal
    longest: int | None = None  #: nt of the longest sequence that every network was trained on


def predict_run(
    source: Path,
    *,
    competition: Competition,
    paths: Paths,
    run: str | Path,
    fold: int | None = None,
    embeddings: Mapping[str, Path] = NONE,
) -> Predicted:
    """Predict the sequences of a file with the folds of a run, to be joined by their mean.

    Args:
        source: FASTA, CSV, TSV or parquet.
        competition: the one that the run was trained on.
        paths: where runs are; all is written below `folder_of` the file.
        run: name of the run, or its folder where that lies elsewhere.
        fold: this one alone; None = all that are trained.
        embeddings: name -> source of the features that its network reads, see `pipeline.features.run`.

    Raises:
        ConfigError: structures are predicted in another way, the run is of another competition, or ViennaRNA is needed
            and missing.
        DataError: no such fold was trained, or the file is not what it should be.
        DivergedError: a prediction is not finite.
        StorageError: every checkpoint is damaged, or a single sequence does not fit into memory.
        StoppedError: asked to stop; nothing is left half-written.
    """
    require_no_structures(competition)
    require_file(source, verb="predict")
    own = own_paths(source, paths)
    how: dict[str, Any] = {"competition": competition, "source": source, "embeddings": embeddings}
    work = partial(apply_checkpoint, own=own, paths=paths, **how)
    folds = [fold] if fold is not None else trained_folds(paths.run_dir(run), competition)
    for k in folds:  # never none
        trained = with_best_checkpoint(work, competition=competition, paths=paths, run=run, fold=k).facts["trained"]
    _tell_of_length(trained["longest"], own)
    competition = _as_trained(competition, trained["facts"], kind=next(iter(trained["labels"]), ""))
    name = trained["run"] if fold is None else f"{trained['run']}.fold{fold}"
    weights = own.ensemble_dir(name) / "weights.json"
    targets = ["probabilities"] if competition.task == "classes" else list(competition.targets)
    told = {"runs": [trained["run"]], "folds": folds, "split": trained["split"], "targets": targets}
    told |= {"weights": {target: {trained["run"]: 1.0} for target in targets}} | trained["labels"]
    write_json(weights, {"competition": competition.name, "task": competition.task} | told)
    about = f"{trained['run']}, {'fold' if len(folds) == 1 else 'mean of folds'} {', '.join(map(str, folds))}"
    told_of: dict[str, Any] = {"name": name, "weights": weights, "about": about, "longest": trained["longest"]}
    return Predicted(own=own, competition=competition, **told_of)


def predict_ensemble(
    source: Path, *, competition: Competition, paths: Paths, name: str, embeddings: Mapping[str, Path] = NONE
) -> Predicted:
    """Predict the sequences of a file with every fold of the runs that an ensemble gives weight, to be joined by these.

    Args and errors are those of `predict_run`.
    """
    require_no_structures(competition)
    require_file(source, verb="predict")
    weights = paths.ensemble_dir(name) / "weights.json"
    told = read_result(weights, hint=f"make ensemble COMP={paths.comp} NAME={name}")
    own, longest = own_paths(source, paths), None
    how: dict[str, Any] = {"competition": competition, "source": source, "embeddings": embeddings}
    work = partial(apply_checkpoint, own=own, paths=paths, **how)
    for run in weighted_runs(told):
        if is_stage(run):  # the one of labelled sets
            labels = read_labels(paths)
            keep_labels(labels, own)
            read(source, own, alphabet=labels.alphabet)
            words.apply(own, competition=competition, split=told["split"], source=paths.run_dir(run))
            continue
        for fold in told["folds"]:
            done = with_best_checkpoint(work, competition=competition, paths=paths, run=run, fold=fold)
            trained = done.facts["trained"]
            longest = min(longest or trained["longest"], trained["longest"])
            competition = _as_trained(competition, trained["facts"], kind=next(iter(trained["labels"]), ""))
    if longest:
        _tell_of_length(longest, own)
    about = f"ensemble {name} of {', '.join(weighted_runs(told))}"
    told_of: dict[str, Any] = {"name": name, "weights": weights, "about": about, "longest": longest}
    return Predicted(own=own, competition=competition, **told_of)


def apply_checkpoint(
    checkpoint: Path,
    meta: dict[str, Any],
    unfinished: bool,
    *,
    competition: Competition,
    source: Path | None,
    own: Paths,
    paths: Paths,
    embeddings: Mapping[str, Path] = NONE,
) -> Report:
    """What `with_best_checkpoint` does for one fold: read the file as its network reads sequences, and predict it.

    Args:
        checkpoint: its folder.
        meta: what it says of itself.
        unfinished: whether its training goes on.
        competition: the one that it was trained on.
        source: the file; None = it was read.
        own: where all that is written goes.
        paths: of the data that it was trained on, as far as they are here.
        embeddings: name -> source of the features that its network reads.

    Returns:
        Facts: those of `predict.run`, and ``trained``, what the checkpoint tells: run, split, facts of the competition,
        labels, and the ``longest`` sequence.

    Raises:
        ConfigError: its features are not given, or it predicts structures by some.
    """
    labels = labels_of(meta)
    competition = _as_trained(competition, meta.get("facts") or {}, kind=labels.kind if labels else "")
    if labels:
        keep_labels(labels, own)
    if source is not None:
        read(source, own, alphabet=labels.alphabet if labels else ALPHABET)
    if competition.task == "structure" and (name := meta["config"]["data"].get("features")):
        raise ConfigError(
            f"{meta['run']}: reads features {name!r}, which make structures FILE=… does not take; expected a network "
            "of letters and pairing alone. Next: MODEL=<another run>, or such sequences in the test set."
        )
    bring_inputs(meta, own, embeddings)
    report = predict.apply(checkpoint, meta, unfinished, competition=competition, paths=own, which=("test",))
    trained = {"run": meta["run"], "split": meta["split"], "facts": dict(competition.facts)}
    trained |= {"labels": {labels.kind: labels.facts()} if labels else {}, "longest": _longest(meta, paths)}
    return replace(report, facts=report.facts | {"trained": trained})


def _as_trained(competition: Competition, facts: Facts, *, kind: str) -> Competition:
    """What a checkpoint predicts, also where the data by now have labels of another kind."""
    same = not kind or kind == competition.task
    return (competition if same else get_competition(competition.name)).with_facts(facts)


def bring_inputs(meta: dict[str, Any], own: Paths, given: Mapping[str, Path]) -> None:
    """What else than letters a checkpoint reads of the sequences of a file: pairing is computed, features are given.

    Raises:
        ConfigError: they are not given; ViennaRNA is needed and missing.
        DataError: they are not what they should be.
    """
    name = meta["config"]["data"].get("features")  # of older checkpoints, none
    if name and name not in given:
        raise ConfigError(
            f"{meta['run']}: reads features {name!r} of every sequence; given: {', '.join(given) or 'none'}. Next: "
            f'the same command with FEATURES="{name}=<folder or parquet>".'
        )
    if name:
        features.run(given[name], name=name, paths=own)
    if "bpp" in meta["data"]:
        bpp.run(own, tables=("test",))


def keep_labels(labels: Labels, own: Paths) -> None:
    """What a labelled set's stages read beside its test table."""
    path = own.clean(labels.kind)
    path.parent.mkdir(parents=True, exist_ok=True)
    for kind in LABELLED.either:  # the data may have had the other one
        own.clean(kind).unlink(missing_ok=True)
    write_labels(path, labels)


def require_no_structures(competition: Competition) -> None:
    """ConfigError where structures are predicted, in another way."""
    if competition.task == "structure":
        raise ConfigError(
            f"predict: {competition.name} is about structures, which take more than a network. Next: make structures "
            f"FILE=<sequences> COMP={competition.name}."
        )


def trained_folds(folder: Path, competition: Competition) -> list[int]:
    """Folds that have a checkpoint; the first where none has, so that the sentence for it is told."""
    stores = {path.name.removeprefix("fold"): CheckpointStore(path / "checkpoints") for path in folder.glob("fold*")}
    found = sorted(int(number) for number, store in stores.items() if number.isdigit() and store.steps())
    if not found and (shipped := _shipped(competition)):
        say(f"{folder}: not trained; MODEL={shipped} are weights that come with the program")
    return found or [0]


def _shipped(competition: Competition) -> str:
    """Weights for a competition that come with the program, if there are some."""
    for card in sorted(PRETRAINED.glob("*/card.md")):
        meta = CheckpointStore(card.parent / "fold0" / "checkpoints").newest_meta()
        if meta and meta["competition"] == competition.name:
            return card.parent.name
    return ""


def _longest(meta: dict[str, Any], paths: Paths) -> int:
    """Length of the longest sequence that a checkpoint was trained on, as far as that is known, nt."""
    known = (meta["config"]["data"]["max_length"], meta.get("longest"), longest_sequence(paths.clean("train")))
    return min(length for length in known if length)


def _tell_of_length(trained: int, own: Paths) -> None:
    """Say which sequences are longer than any that the networks were trained on."""
    length = pl.col("sequence").str.len_chars().alias("length")
    lengths = pl.read_parquet(own.clean("test")).select("sequence_id", length)
    longer = lengths.filter(pl.col("length") > trained).sort("length", descending=True, maintain_order=True)
    if longer.height:
        name, longest = longer.row(0)
        say(
            f"{longer.height:,} of {lengths.height:,} sequences are longer than the {trained:,} nt of training, up to "
            f"{longest:,} nt ({name}): how good predictions are there is not known"
        )
