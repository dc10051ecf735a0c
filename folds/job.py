"""What an ensemble is made of: the runs, the folds that all of them have, and their out-of-fold predictions."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cached_property, partial
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq

from pipeline.competitions.base import Competition
from pipeline.labels import Classes, log_losses
from pipeline.paths import Paths
from pipeline.runlog import Bar, warn
from pipeline.tables import (
    OofBatch,
    check_probabilities,
    labels_that_count,
    numbers_that_count,
    out_of_fold,
    truth_that_counts,
)


@dataclass(frozen=True, kw_only=True)
class Job:
    """Runs of one split, and the folds of it that every run has predicted (`skipped` are the others).

    Classes are blended as one target, ``probabilities``, whose T values are those of every class, one sequence after
    the other; of numbers each column is a target, and T is the number of sequences.
    """

    paths: Paths
    competition: Competition
    runs: tuple[str, ...]
    split: str
    folds: list[int]
    skipped: list[int]
    classes: Classes | None = None  #: what is told apart, if it is classes

    @cached_property
    def scoring(self) -> Competition:
        """The competition; of classes with the columns, range and metric that predictions of them have."""
        if self.classes is None:
            return self.competition
        sums = partial(_log_loss_sums, classes=self.classes)
        kept: dict[str, Any] = {"targets": ("probabilities",), "target_range": (0.0, 1.0), "error_power": 1}
        return replace(
            self.competition, **kept, error_sums=sums, score=lambda sums_C, counts_C: sums_C[0] / counts_C[0]
        )

    @property
    def columns(self) -> tuple[str, ...]:
        """List columns of the prediction tables."""
        return ("numbers",) if self.competition.task == "numbers" else self.scoring.targets

    @property
    def width(self) -> int | None:
        """Values in each list, if it is not one a nucleotide."""
        if self.competition.task == "numbers":
            return len(self.scoring.targets)
        return len(self.classes.names) if self.classes else None

    def facts(self) -> dict[str, Any]:
        """The job as ``weights.json`` records it."""
        return {
            "competition": self.competition.name,
            "task": self.competition.task,
            "metric": self.competition.metric,
            "targets": list(self.scoring.targets),
            "split": self.split,
            "folds": self.folds,
            "folds_left_out": self.skipped,
            "runs": list(self.runs),
            **({"classes": self.classes.facts()} if self.classes else {}),
        }

    def batches(self, *, truth: bool = False, label: str) -> Iterator[OofBatch]:
        """Training sequences of the folds beside the out-of-fold predictions of every run.

        Args:
            truth: read what `truth` needs as well.
            label: of the progress bar.
        """
        measured = ("labels",) if self.classes else self.columns
        stream = out_of_fold(
            self.paths.clean("train"),
            fold_table=self.paths.fold_table(self.split),
            folds=self.folds,
            sources={each: [self.paths.oof(each, fold) for fold in self.folds] for each in self.runs},
            targets=self.columns,
            columns=("scored", *measured) if truth else (),
            width=self.width,
        )
        with Bar(label, total=pq.read_metadata(self.paths.clean("train")).num_rows, unit="sequences") as bar:
            for batch in stream:
                for each, values_TC in batch.predictions.items():
                    self.check(values_TC, batch.rows["sequence_id"], where=each)
                yield batch.by_column(len(self.scoring.targets)) if self.competition.task == "numbers" else batch
                bar.advance(batch.rows.height)

    def truth(self, batch: OofBatch) -> np.ndarray:
        """[T, C] float32: what the metric compares predictions with, NaN where it does not look."""
        if self.classes:
            return labels_that_count(batch.rows, width=len(self.classes.names)).reshape(-1, 1)
        if self.competition.task == "numbers":
            return numbers_that_count(batch.rows, width=len(self.scoring.targets))
        return truth_that_counts(batch, self.scoring.targets)

    def check(self, values_TC: np.ndarray, ids: pl.Series, *, where: str) -> None:
        """See that predictions of classes are probabilities.

        Raises:
            DataError: they are not.
        """
        if self.classes:
            probability_NK = values_TC.reshape(-1, len(self.classes.names))
            check_probabilities(probability_NK, ids, exclusive=self.classes.exclusive, where=where)


def _log_loss_sums(
    probability_TC: np.ndarray, truth_TC: np.ndarray, *, classes: Classes
) -> tuple[np.ndarray, np.ndarray]:
    """Sum and number of the log losses of whole sequences, [1] each."""
    shape = (-1, len(classes.names))
    losses_N = log_losses(probability_TC.reshape(shape), truth_TC.reshape(shape), exclusive=classes.exclusive)
    return np.array([losses_N.sum()]), np.array([len(losses_N)])


def list_missing(missing: Mapping[str, list[str]]) -> dict[str, Any]:
    """Count and first ids of the sequences without prediction, run by run, with a warning for each run."""
    listed = {}
    for each, ids in missing.items():
        if ids:
            warn(f"ensemble: {len(ids):,} sequences without prediction of {each} are left out: {', '.join(ids[:3])}…")
            listed[each] = {"count": len(ids), "first": ids[:10]}
    return listed
