"""Small clean, fold and prediction tables of every task, as earlier stages leave them for ensemble and submissions."""

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import polars as pl

from pipeline.labels import Classes, write_labels
from pipeline.paths import Paths
from pipeline.schema import ALPHABET, PROBES

TARGETS = [f"reactivity_{probe}" for probe in PROBES]
SPLIT = "sim80_k3"
FOLDS = 3

_UNMEASURED = 2  # nt at either end without a value


def make_paths(folder: Path, comp: str = "ribonanza") -> Paths:
    return Paths(comp=comp, root=folder / "artifacts", submissions=folder / "csv")


def write(table: pl.DataFrame, path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    table.write_parquet(path)
    return path


def random_sequence(rng: np.random.Generator, length: int) -> str:
    return "".join(rng.choice(list("ACGU"), size=length))


def write_values_data(paths: Paths, rng: np.random.Generator, *, sequences: int = 60, tests: int = 7) -> pl.DataFrame:
    """Clean train and test tables and a fold table: reactivity follows the nucleotide and its neighbour, plus noise.

    Every tenth sequence has no DMS profile, every seventh fails the 2A3 filter.
    """
    rows = []
    for number in range(sequences):
        sequence = random_sequence(rng, int(rng.integers(20, 60)))
        row = {"sequence_id": f"s{number:04d}", "sequence": sequence, "dataset_name": "lib" + "AB"[number % 2]}
        for place, probe in enumerate(PROBES):
            absent = place == 0 and number % 10 == 9
            row |= _profile(rng, sequence, probe, absent=absent, passes=not (place == 1 and number % 7 == 6))
        row["scored"] = all(row[f"SN_filter_{probe}"] for probe in PROBES)
        rows.append(row)
    schema = {target: pl.List(pl.Float32) for target in TARGETS}
    train = pl.DataFrame(rows, schema_overrides=schema, infer_schema_length=None).sort("sequence_id")
    write(train, paths.clean("train"))
    fold = pl.Series("fold", [number % FOLDS for number in range(sequences)], dtype=pl.UInt8)
    write(
        train.select("sequence_id", fold, cluster=pl.col("sequence_id")),
        paths.fold_table(SPLIT),
    )
    lengths = rng.integers(20, 60, size=tests)
    ends = np.cumsum(lengths)
    test = pl.DataFrame(
        {
            "sequence_id": [f"t{number:04d}" for number in rng.permutation(tests)],
            "sequence": [random_sequence(rng, int(length)) for length in lengths],
            "id_min": ends - lengths,
            "id_max": ends - 1,
            "future": np.zeros(tests, dtype=np.int8),
        }
    )
    write(test, paths.clean("test"))
    return train


def _profile(rng: np.random.Generator, sequence: str, probe: str, *, absent: bool, passes: bool) -> dict:
    length = len(sequence)
    level = {"A": 0.8, "C": 0.3, "G": 0.4, "U": 0.2}
    values = [
        level[letter] * (0.6 if after == "G" else 1.0)
        for letter, after in zip(sequence, sequence[1:] + "A", strict=True)
    ]
    noisy = np.array(values) + rng.normal(0.0, 0.2, size=length)
    inner = range(_UNMEASURED, length - _UNMEASURED)
    measured = [float(np.float32(noisy[at])) if at in inner else None for at in range(length)]
    return {
        f"reactivity_{probe}": None if absent else measured,
        f"signal_to_noise_{probe}": None if absent else float(rng.uniform(1.0, 20.0)),
        f"SN_filter_{probe}": not absent and passes,
    }


def truth_lists(train: pl.DataFrame, target: str) -> list[np.ndarray]:
    """Clipped truth of every sequence, 0.5 where not measured."""
    lists = []
    for sequence, values in zip(train["sequence"], train[target].to_list(), strict=True):
        array = np.array(values if values is not None else [None] * len(sequence), dtype=np.float64)
        lists.append(np.clip(np.where(np.isnan(array), 0.5, array), 0.0, 1.0))
    return lists


def write_run(paths: Paths, run: str, rng: np.random.Generator, *, noise: Mapping[str, float]) -> None:
    """All folds of a run: the truth with noise of a given size for each target out of fold, noise for the test."""
    train = pl.read_parquet(paths.clean("train"))
    test = pl.read_parquet(paths.clean("test"))
    folds = pl.read_parquet(paths.fold_table(SPLIT))["fold"]
    predicted = {
        target: [values + rng.laplace(0.0, noise[target], size=len(values)) for values in truth_lists(train, target)]
        for target in TARGETS
    }
    for fold in range(FOLDS):
        here = [at for at in range(train.height) if folds[at] == fold]
        ids = [train["sequence_id"][at] for at in here]
        table = prediction_table(ids, {target: [predicted[target][at] for at in here] for target in TARGETS})
        write(table.insert_column(1, pl.Series("fold", [fold] * len(ids), dtype=pl.UInt8)), paths.oof(run, fold))
        lists = {t: [rng.uniform(-0.2, 1.2, size=len(sequence)) for sequence in test["sequence"]] for t in TARGETS}
        write(prediction_table(test["sequence_id"].to_list(), lists), paths.test(run, fold))


def prediction_table(ids: Sequence[str], lists: Mapping[str, Sequence[np.ndarray]]) -> pl.DataFrame:
    columns = {
        name: pl.Series([values.tolist() for values in of], dtype=pl.List(pl.Float32)) for name, of in lists.items()
    }
    return pl.DataFrame({"sequence_id": list(ids), **columns}).sort("sequence_id")


def edit(path: Path, change: pl.Expr | pl.DataFrame) -> None:
    """Replace a table, or one column of it."""
    table = pl.read_parquet(path)
    (change if isinstance(change, pl.DataFrame) else table.with_columns(change)).write_parquet(path)


def write_structure_data(paths: Paths, rng: np.random.Generator, *, targets: int = 6) -> pl.DataFrame:
    """Clean train, test, references, sample and fold tables of `targets` training and three test targets."""
    train = pl.DataFrame(
        {
            "sequence_id": [f"R{number}_A" for number in range(targets)],
            "sequence": [random_sequence(rng, int(rng.integers(6, 12))) for _ in range(targets)],
            "scored": [True] * targets,
        }
    )
    xyz = {axis: _coordinates(rng, train["sequence"]) for axis in "xyz"}
    train = train.with_columns(**xyz).sort("sequence_id")
    write(train, paths.clean("train"))
    references = train.select("sequence_id", pl.lit(1, dtype=pl.UInt8).alias("conformer"), "x", "y", "z")
    write(references, paths.clean("references"))
    fold = pl.Series("fold", [number % 2 for number in range(targets)], dtype=pl.UInt8)
    write(train.select("sequence_id", fold, cluster=pl.col("sequence_id")), paths.fold_table(SPLIT))
    test = pl.DataFrame({"sequence_id": ["Q1", "Q10", "Q2_B"], "sequence": ["GGAC", "ACGUA", "UUUCCC"]})
    write(test, paths.clean("test"))
    sample = [
        (f"{target}_{place}", letter, place)
        for target, sequence in [("Q2_B", "UUUCCC"), ("Q1", "GGAC"), ("Q10", "ACGUA")]
        for place, letter in enumerate(sequence, start=1)
    ]
    write(pl.DataFrame(sample, schema=["ID", "resname", "resid"], orient="row"), paths.clean("sample"))
    return train


def write_structure_run(paths: Paths, run: str, rng: np.random.Generator, *, confidences: Sequence[float]) -> None:
    """Five random candidates of each target, with given confidences."""
    train, test = pl.read_parquet(paths.clean("train")), pl.read_parquet(paths.clean("test"))
    folds = pl.read_parquet(paths.fold_table(SPLIT))["fold"]
    for fold in range(2):
        here = train.filter(folds == fold)
        table = _candidates(rng, here, confidences)
        write(table.insert_column(1, pl.lit(fold, dtype=pl.UInt8).alias("fold")), paths.oof(run, fold))
        write(_candidates(rng, test, [value + fold / 100 for value in confidences]), paths.test(run, fold))


def _candidates(rng: np.random.Generator, table: pl.DataFrame, confidences: Sequence[float]) -> pl.DataFrame:
    parts = []
    for number, confidence in enumerate(confidences, start=1):
        keys = (
            pl.lit(number, dtype=pl.UInt8).alias("candidate"),
            pl.lit(confidence, dtype=pl.Float32).alias("confidence"),
        )
        parts.append(
            table.select("sequence_id", *keys, *(_coordinates(rng, table["sequence"]).alias(axis) for axis in "xyz"))
        )
    return pl.concat(parts).sort("sequence_id", "candidate")


def _coordinates(rng: np.random.Generator, sequences: pl.Series) -> pl.Series:
    lists = [rng.normal(0.0, 20.0, size=len(sequence)).tolist() for sequence in sequences]
    return pl.Series(lists, dtype=pl.List(pl.Float32))


CLASSES = ("miRNA", "rRNA", "tRNA")


def write_class_data(
    paths: Paths, rng: np.random.Generator, *, exclusive: bool = True, sequences: int = 90, tests: int = 8
) -> pl.DataFrame:
    """Clean train, test, classes and fold tables: each class prefers a letter; every 15th sequence has no label.

    Several labels: each class of a sequence is drawn for itself, so that some have none.
    """
    chosen = rng.random((sequences, len(CLASSES))) < 0.4
    if exclusive:
        chosen = rng.choice(len(CLASSES), size=sequences)[:, None] == np.arange(len(CLASSES))
    texts = []
    for flags in chosen:
        weights = 1.0 + 3.0 * np.append(flags, False)
        texts.append("".join(rng.choice(list(ALPHABET), size=int(rng.integers(20, 90)), p=weights / weights.sum())))
    known = [number % 15 != 14 for number in range(sequences)]
    labels = [np.flatnonzero(flags).tolist() if there else None for flags, there in zip(chosen, known, strict=True)]
    train = pl.DataFrame(
        {
            "sequence_id": [f"s{number:04d}" for number in range(sequences)],
            "sequence": texts,
            "dataset_name": "train",
            "group": pl.Series([None] * sequences, dtype=pl.String),
            "scored": known,
            "labels": pl.Series(labels, dtype=pl.List(pl.UInt16)),
        }
    )
    write(train, paths.clean("train"))
    counts = tuple(int(count) for count in chosen[known].sum(axis=0))
    write_labels(paths.clean("classes"), Classes(CLASSES, counts, exclusive, ALPHABET))
    fold = pl.Series("fold", [number % FOLDS for number in range(sequences)], dtype=pl.UInt8)
    write(train.select("sequence_id", fold, cluster=pl.col("sequence_id")), paths.fold_table(SPLIT))
    ids = [f"t{number:04d}" for number in rng.permutation(tests)]
    test = pl.DataFrame({"sequence_id": ids, "sequence": [random_sequence(rng, 30) for _ in ids]})
    write(test, paths.clean("test"))
    return train


def write_class_run(
    paths: Paths, run: str, rng: np.random.Generator, *, noise: float, exclusive: bool = True, test: bool = True
) -> None:
    """All folds of a run: the truth behind noise of a given size out of fold, noise alone for the test."""
    train, tested = pl.read_parquet(paths.clean("train")), pl.read_parquet(paths.clean("test"))
    folds = pl.read_parquet(paths.fold_table(SPLIT))["fold"]
    truth = np.zeros((train.height, len(CLASSES)))
    for row, labels in enumerate(train["labels"].to_list()):
        truth[row, labels or []] = 1.0
    for fold in range(FOLDS):
        here = (folds == fold).to_numpy()
        ids = train["sequence_id"].filter(pl.Series(here)).to_list()
        told = _probabilities(2.0 * truth[here] - 1.0 + noise * rng.normal(size=(len(ids), len(CLASSES))), exclusive)
        table = prediction_table(ids, {"probabilities": told})
        write(table.insert_column(1, pl.Series("fold", [fold] * len(ids), dtype=pl.UInt8)), paths.oof(run, fold))
        if test:
            told = _probabilities(rng.normal(size=(tested.height, len(CLASSES))), exclusive)
            write(prediction_table(tested["sequence_id"].to_list(), {"probabilities": told}), paths.test(run, fold))


def _probabilities(logits: np.ndarray, exclusive: bool) -> np.ndarray:
    odds = np.exp(logits)
    return odds / odds.sum(axis=1, keepdims=True) if exclusive else odds / (1.0 + odds)
