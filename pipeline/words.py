"""Counting words (k-mers) as a run of its own, beside those of networks: naive Bayes of classes, ridge of numbers.

On a small set counting beats many a network, and an ensemble with this run is out of fold no worse than either.

Letters: N sequences, K classes, C numbers, V words or features, F folds.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from pipeline.bayes import MOST_WORDS, Known, NaiveBayes, cut_folds, learn_factor, mix
from pipeline.competitions.base import Competition
from pipeline.errors import ConfigError, DataError
from pipeline.kmers import count_words, longest_words
from pipeline.labels import Classes, Labels, Numbers, letters_of, log_losses, read_labels
from pipeline.paths import Paths
from pipeline.ridge import Model as RidgeModel
from pipeline.ridge import Ridge, View
from pipeline.stage import Report, run_stage
from pipeline.tables import labels_that_count, numbers_that_count, open_parquet, read_fold_table

#: Raised when the same tables give other predictions than before.
VERSION = 2

_MODEL = "words.parquet"
#: Files of a run that `apply` needs on another machine.
CARRIED = (_MODEL,)


def run_name(split: str) -> str:
    """Of the run that this stage writes, as ensembles are given it."""
    return f"words.{split}"


def run(paths: Paths, *, competition: Competition, split: str) -> Report:
    """Write ``runs/words.<split>/fold<k>/{oof,test}.parquet``, which ensembles take like those of a network.

    Args:
        paths: clean and fold tables.
        competition: a labelled set.
        split: name of the split, whose fold table exists.

    Returns:
        Facts: ``how``, ``k``, ``metric`` and ``score`` (out of fold).

    Raises:
        ConfigError: the competition is not about labelled sequences.
        DataError: a table is missing, damaged or of other data, or the split has a single fold.
    """
    _require_labels(competition)
    labels = read_labels(paths)
    inputs = {"train": paths.clean("train"), labels.kind: paths.clean(labels.kind), "folds": paths.fold_table(split)}
    inputs |= {"test": paths.clean("test")} if paths.clean("test").is_file() else {}
    for label, path in inputs.items():
        open_parquet(path, ("sequence_id", "fold", "cluster") if label == "folds" else ()).close()
    counting = _counting(labels)
    table = _read_train(paths, split, counting.known)
    folds = table["fold"].unique().sort().to_list()
    name = run_name(split)
    outputs = paths.predictions(name, folds, "oof", *(["test"] if "test" in inputs else []))

    def build(parts: dict[str, Path]) -> dict[str, Any]:
        models, facts = counting.fit(table)
        counting.table(models).write_parquet(parts["model"], compression="zstd")
        for fold, model in models.items():
            _predict(counting, model, table.filter(fold=fold)).write_parquet(parts[f"fold{fold}/oof"])
        if "test" in inputs:
            _write_test(paths, counting, models, parts)
        told = pl.concat([pl.read_parquet(parts[f"fold{fold}/oof"]) for fold in folds])
        told = told.select("sequence_id", said=counting.said)  # the truth may have the same name
        scored = table.filter("scored").join(told, on="sequence_id", validate="1:1")
        said_NK = np.array(scored["said"].to_list())
        return facts | {"metric": competition.metric, "score": counting.score(said_NK, scored, competition)}

    return run_stage(
        "words",
        inputs=inputs,
        outputs=outputs | {"model": paths.run_dir(name) / _MODEL},
        params={"version": VERSION, "split": split},
        build=build,
        manifest=paths.run_dir(name) / "words.manifest.json",
    )


def apply(paths: Paths, *, competition: Competition, split: str, source: Path) -> Report:
    """Write the test tables alone, with what an earlier `run` counted: in a notebook that has no training data.

    Args:
        paths: the clean test table, and the classes or numbers.
        competition: a labelled set.
        split: of the earlier run.
        source: folder of the earlier run, ``runs/words.<split>``.

    Raises:
        ConfigError: the competition is not about labelled sequences.
        DataError: a table is missing or damaged.
    """
    _require_labels(competition)
    labels, name = read_labels(paths), run_name(split)
    counting = _counting(labels)
    open_parquet(source / _MODEL, counting.columns).close()
    models = counting.models(pl.read_parquet(source / _MODEL))

    def build(parts: dict[str, Path]) -> dict[str, Any]:
        return {"test": _write_test(paths, counting, models, parts)}

    return run_stage(
        "words",
        inputs={"test": paths.clean("test"), labels.kind: paths.clean(labels.kind), "model": source / _MODEL},
        outputs=paths.predictions(name, models, "test"),
        params={"version": VERSION, "split": split, "test_only": True},
        build=build,
        manifest=paths.run_dir(name) / "words.manifest.json",
    )


def describe(facts: Mapping[str, Any]) -> list[str]:
    """What `run` or `apply` did, as lines for a terminal."""
    if "score" not in facts:
        return [f"{facts['test']:,} test sequences"]
    return [f"{facts['how']}, {facts['k']}-mers: {facts['metric']} {facts['score']:.4g} out of fold"]


def _require_labels(competition: Competition) -> None:
    if not competition.has_labels:
        raise ConfigError(f"words: {competition.name} is not a labelled set. Next: COMP=labelled-<name>.")


def _read_train(paths: Paths, split: str, known: str) -> pl.DataFrame:
    """``sequence_id, sequence, scored, fold, cluster`` and what is known of every training sequence."""
    train = pl.read_parquet(paths.clean("train"), columns=["sequence_id", "sequence", "scored", known])
    folds = read_fold_table(paths.fold_table(split), ["sequence_id", "fold", "cluster"])
    table = train.join(folds, on="sequence_id", how="left", maintain_order="left", validate="1:1")
    if table["fold"].null_count() or folds.height != train.height or folds["fold"].n_unique() < 2:
        raise DataError(
            f"{paths.fold_table(split)}: not the folds of {paths.clean('train')}, or a single one; expected one for "
            f"each sequence, of two or more. Next: make folds COMP={paths.comp} SPLIT={split}."
        )
    return table.with_columns(pl.col("fold").cast(pl.UInt8))


def _predict(counting: "_Counting", model: Any, table: pl.DataFrame) -> pl.DataFrame:
    """``sequence_id``, ``fold`` where the table has it, and what is said, in the order of the ids."""
    rows = table.sort("sequence_id")
    kept = [name for name in ("sequence_id", "fold") if name in rows.columns]
    said_NK = counting.predict(model, rows["sequence"].to_list()).astype(np.float32)
    return rows.select(kept).with_columns(pl.Series(counting.said, said_NK).cast(pl.List(pl.Float32)))


def _write_test(paths: Paths, counting: "_Counting", models: Mapping[int, Any], parts: dict[str, Path]) -> int:
    test = pl.read_parquet(paths.clean("test"), columns=["sequence_id", "sequence"])
    for fold, model in models.items():
        _predict(counting, model, test).write_parquet(parts[f"fold{fold}/test"])
    return test.height


# ------------------------------------------------------------------------------------------------------------- classes


@dataclass(frozen=True, kw_only=True)
class BayesModel:
    """What predicts the sequences of one fold and, with those of the other folds, the test set."""

    weights_KV: np.ndarray  #: float32: log probability of every word in each class; of several labels, less the rest's
    frequent_K: np.ndarray  #: float64: share of every class
    factor: float  #: how far words are believed: 0 not at all, 1 as if they were independent


@dataclass(frozen=True)
class _OfClasses:
    """Naive Bayes of a set's classes."""

    classes: Classes
    known, said = "labels", "probabilities"  # columns of the clean table, and of predictions
    columns = ("fold", "factor", "frequency", "weights")

    def _words(self, sequences: Sequence[str]) -> tuple[int, Any]:
        letters = letters_of(self.classes.alphabet)
        k = longest_words(len(letters), MOST_WORDS)
        return k, count_words(sequences, letters, k)

    def _truth(self, table: pl.DataFrame) -> np.ndarray:
        return labels_that_count(table, width=len(self.classes.names)) > 0.5

    def fit(self, table: pl.DataFrame) -> tuple[dict[int, Any], dict[str, Any]]:
        """The model of every fold, fitted on the labelled sequences of the others."""
        labelled = table.filter("scored")
        fold_N, cluster_N = (labelled[name].to_numpy() for name in ("fold", "cluster"))
        known = Known(self._truth(labelled), fold_N, cluster_N, exclusive=self.classes.exclusive)
        k, words_NV = self._words(labelled["sequence"].to_list())
        bayes = NaiveBayes(words_NV, known)
        models = {
            fold: BayesModel(
                weights_KV=bayes.weights(known.parts_of(fold)).astype(np.float32),
                frequent_K=known.frequencies(known.parts_of(fold)),
                factor=learn_factor(bayes, known, fold),
            )
            for fold in table["fold"].unique().sort().to_list()
        }
        factors = [round(model.factor, 4) for model in models.values()]
        return models, {"how": "naive Bayes", "k": k, "factors": factors}

    def predict(self, model: BayesModel, sequences: Sequence[str]) -> np.ndarray:
        """[N, K] probabilities."""
        evidence_NK = self._words(sequences)[1] @ model.weights_KV.T
        return mix(model.frequent_K, evidence_NK, model.factor, exclusive=self.classes.exclusive)

    def score(self, said_NK: np.ndarray, table: pl.DataFrame, competition: Competition) -> float:
        """The log loss of what is said of the rows of a table."""
        return float(log_losses(said_NK, self._truth(table), exclusive=self.classes.exclusive).mean())

    def table(self, models: Mapping[int, BayesModel]) -> pl.DataFrame:
        """A row for each fold and class."""
        return pl.DataFrame(
            {
                "fold": [fold for fold, model in models.items() for _ in model.frequent_K],
                "factor": [model.factor for model in models.values() for _ in model.frequent_K],
                "frequency": np.concatenate([model.frequent_K for model in models.values()]),
                "weights": pl.Series(np.concatenate([model.weights_KV for model in models.values()])),
            }
        ).cast({"fold": pl.UInt8, "weights": pl.List(pl.Float32)})

    def models(self, table: pl.DataFrame) -> dict[int, Any]:
        """The inverse of `table`."""
        return {
            fold: BayesModel(
                weights_KV=np.array(part["weights"].to_list(), dtype=np.float32),
                frequent_K=part["frequency"].to_numpy(),
                factor=part["factor"][0],
            )
            for (fold,), part in table.partition_by("fold", as_dict=True, maintain_order=True).items()
        }


# ------------------------------------------------------------------------------------------------------------- numbers


@dataclass(frozen=True)
class _OfNumbers:
    """Ridge regression of a set's numbers."""

    numbers: Numbers
    known = said = "numbers"
    columns = ("fold", "span", "weights", "level", "low", "high", "penalty")

    def _truth(self, table: pl.DataFrame) -> np.ndarray:
        return numbers_that_count(table, width=len(self.numbers.names))

    def fit(self, table: pl.DataFrame) -> tuple[dict[int, Any], dict[str, Any]]:
        """The model of every fold, fitted on what was measured in the others."""
        view = View.of(table["sequence"].to_list(), self.numbers.alphabet)
        scored = table.filter("scored")
        fold_N, cluster_N = (scored[name].to_numpy() for name in ("fold", "cluster"))
        part_N = cut_folds(fold_N, cluster_N)
        ridge = Ridge(scored["sequence"].to_list(), self._truth(scored), fold_N, part_N, view)
        models = {fold: ridge.fit(fold) for fold in table["fold"].unique().sort().to_list()}
        return models, {"how": "ridge", "k": view.longest, "places": view.span}

    def predict(self, model: RidgeModel, sequences: Sequence[str]) -> np.ndarray:
        """[N, C] in the units of the data."""
        return model.predict(sequences)

    def score(self, said_NC: np.ndarray, table: pl.DataFrame, competition: Competition) -> float:
        """The competition's score of what is said of the rows of a table."""
        assert competition.error_sums is not None
        assert competition.score is not None
        return competition.score(*competition.error_sums(said_NC, self._truth(table)))

    def table(self, models: Mapping[int, RidgeModel]) -> pl.DataFrame:
        """A row for each fold and number."""
        each = [(fold, model, at) for fold, model in models.items() for at in range(len(model.level_C))]
        return pl.DataFrame(
            {
                "fold": pl.Series([fold for fold, _, _ in each], dtype=pl.UInt8),
                "span": [model.view.span for _, model, _ in each],
                "weights": pl.Series([model.weights_CV[at] for _, model, at in each]).cast(pl.List(pl.Float64)),
                "level": [model.level_C[at] for _, model, at in each],
                "low": [model.low_C[at] for _, model, at in each],
                "high": [model.high_C[at] for _, model, at in each],
                "penalty": [model.penalty_C[at] for _, model, at in each],
            }
        )

    def models(self, table: pl.DataFrame) -> dict[int, Any]:
        """The inverse of `table`."""
        return {
            fold: RidgeModel(
                view=View(letters_of(self.numbers.alphabet), part["span"][0]),
                weights_CV=np.array(part["weights"].to_list()),
                **{f"{name}_C": part[name].to_numpy() for name in ("level", "low", "high", "penalty")},
            )
            for (fold,), part in table.partition_by("fold", as_dict=True, maintain_order=True).items()
        }


_Counting = _OfClasses | _OfNumbers


def _counting(labels: Labels) -> _Counting:
    return _OfNumbers(labels) if isinstance(labels, Numbers) else _OfClasses(labels)
