"""Small clean, fold and prediction tables of a set with two measured numbers a sequence."""

import numpy as np
import polars as pl

from pipeline.competitions import competition_of
from pipeline.competitions.base import Competition
from pipeline.labels import Numbers, write_labels
from pipeline.paths import Paths
from pipeline.schema import ALPHABET
from tests.chain_tables import FOLDS, SPLIT, prediction_table, random_sequence, write

NAMES = ("half_life", "Tm")


def write_number_data(
    paths: Paths,
    rng: np.random.Generator,
    *,
    names: tuple[str, ...] = NAMES,
    unit: float = 1.0,
    sequences: int = 90,
    tests: int = 8,
    length: int = 0,
) -> Competition:
    """Clean train, test, numbers and fold tables; returns the competition that they make.

    half_life follows the count of G, Tm that of A (in `unit`); Tm is not measured of every fourth sequence, and
    neither of every fifteenth.

    Args:
        paths: where to write.
        rng: draws sequences and noise.
        names: of the numbers, one or two.
        unit: of all of them.
        sequences: in train.
        tests: in test.
        length: of all sequences; 0 = 20 to 89.
    """
    texts = [random_sequence(rng, length or int(rng.integers(20, 90))) for _ in range(sequences)]
    counts = np.array([[text.count("G"), 50 - text.count("A")] for text in texts], dtype=np.float64)
    numbers = ((counts + rng.normal(0, 0.5, counts.shape)) * unit)[:, : len(names)]
    rows = np.arange(sequences)
    if len(names) > 1:
        numbers[rows % 4 == 3, 1] = np.nan
    numbers[rows % 15 == 14] = np.nan
    train = pl.DataFrame(
        {
            "sequence_id": [f"s{row:04d}" for row in rows],
            "sequence": texts,
            "dataset_name": "train",
            "group": pl.Series([None] * sequences, dtype=pl.String),
            "scored": np.isfinite(numbers).any(axis=1),
            "numbers": lists(numbers),
        }
    )
    write(train, paths.clean("train"))
    write_labels(paths.clean("numbers"), Numbers(names, (), (), (), ALPHABET).over(numbers))
    fold = pl.Series("fold", rows % FOLDS, dtype=pl.UInt8)
    write(train.select("sequence_id", fold, cluster=pl.col("sequence_id")), paths.fold_table(SPLIT))
    ids = [f"t{row:04d}" for row in rng.permutation(tests)]
    write(pl.DataFrame({"sequence_id": ids, "sequence": [random_sequence(rng, 30) for _ in ids]}), paths.clean("test"))
    return competition_of(paths)


def lists(numbers_NC: np.ndarray) -> pl.Series:
    """As the data stage writes them: null where not measured, a row of nulls as null."""
    rows = [[None if np.isnan(value) else float(value) for value in row] for row in numbers_NC]
    return pl.Series(
        "numbers", [row if any(value is not None for value in row) else None for row in rows], dtype=pl.List(pl.Float64)
    )


def truth(paths: Paths) -> np.ndarray:
    """[N, C] of the clean train table, NaN where not measured."""
    table = pl.read_parquet(paths.clean("train"))
    width = len(competition_of(paths).targets)
    return np.array([row or [None] * width for row in table["numbers"].to_list()], dtype=np.float64)


def write_number_run(paths: Paths, run: str, rng: np.random.Generator, *, noise: float, test: bool = True) -> None:
    """All folds of a run: the truth (its mean where not measured) with noise, in units of each number's deviation."""
    train, tested = pl.read_parquet(paths.clean("train")), pl.read_parquet(paths.clean("test"))
    numbers = truth(paths)
    mean_C, spread_C = np.nanmean(numbers, axis=0), np.nanstd(numbers, axis=0)
    said = np.where(np.isnan(numbers), mean_C, numbers) + noise * spread_C * rng.normal(size=numbers.shape)
    folds = pl.read_parquet(paths.fold_table(SPLIT))["fold"].to_numpy()
    for fold in range(FOLDS):
        ids = train["sequence_id"].filter(pl.Series(folds == fold)).to_list()
        table = prediction_table(ids, {"numbers": said[folds == fold]})
        write(table.insert_column(1, pl.Series("fold", [fold] * len(ids), dtype=pl.UInt8)), paths.oof(run, fold))
        if test:
            told = mean_C + spread_C * rng.normal(size=(tested.height, len(mean_C)))
            write(prediction_table(tested["sequence_id"].to_list(), {"numbers": told}), paths.test(run, fold))
