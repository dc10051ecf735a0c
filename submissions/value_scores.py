"""Scores of predicted values by the organisers' metric, with their parts, beside floors fitted on the other folds.

Letters: T positions, C targets, N sequences of a batch.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq

from pipeline.competitions.base import Competition
from pipeline.errors import DataError
from pipeline.paths import Paths
from pipeline.runlog import Bar, warn
from pipeline.tables import (
    OofBatch,
    finite_values,
    flat_lists,
    fold_numbers,
    out_of_fold,
    read_batches,
    truth_that_counts,
)
from submissions.breakdown import Breakdown, Groups, fold_summary
from submissions.floors import FLOORS, FloorTables, UnpairedBins, kmers, usuals_of
from submissions.paired import Paired


def evaluate_values(
    paths: Paths, *, competition: Competition, split: str, folds: Sequence[int], sources: Mapping[str, Sequence[Path]]
) -> dict[str, Any]:
    """Score out-of-fold predictions in two passes over the training sequences: floors are fitted, then all is scored.

    Args:
        paths: where the clean train table, the fold table and, for the last floor, base-pair probabilities live.
        competition: gives the metric.
        split: name of the fold table.
        folds: folds that were predicted.
        sources: name -> prediction tables that together make one set; the first is broken down, all are scored.

    Returns:
        JSON-able but for NaN: score, parts and coverage of the first source; ``others``: score and folds of the rest;
        ``floors`` on the positions of the first, ``floor_details``, ``floor_notes``; of two others or more,
        ``paired``: which of them is ``best``, and the ``differences`` of all sources from it (`submissions.paired`).

    Raises:
        DataError: predictions not out of fold, not finite, or of other data; or none of them is scored.
    """
    first = next(iter(sources))
    floors = _Floors(paths, competition, split)
    totals = {source: Groups(competition) for source in sources}
    paired = Paired(competition, paths.fold_table(split), list(sources))
    floor_totals = {name: Groups(competition) for name in floors.names}
    breakdown = Breakdown(competition)
    for batch in _batches(paths, competition, split, folds, sources, label="score"):
        truth_TC = truth_that_counts(batch, competition.targets)
        fold_T = batch.spread(batch.rows["fold"].to_numpy())
        breakdown.add(batch, batch.predictions[first], truth_TC, batch.missing[first])
        there = {each: batch.spread(~batch.missing[each]) & np.isfinite(truth_TC[:, 0]) for each in sources}
        for source, there_T in there.items():
            totals[source].add_positions(fold_T[there_T], batch.predictions[source][there_T], truth_TC[there_T])
        if len(sources) > 2:
            paired.add(batch, truth_TC)
        for name, prediction_TC in floors.at(batch, there[first]):
            floor_totals[name].add_positions(fold_T[there[first]], prediction_TC, truth_TC[there[first]])
    if not totals[first].positions():
        raise DataError(
            f"evaluate: no scored position has a prediction of {first}; expected out-of-fold predictions of scored "
            "sequences. Next: see that data and predictions belong together."
        )
    told = breakdown.summary()
    if lost := told["sequences"]["scored_without_prediction"]:
        warn(f"evaluate: {lost:,} scored sequences have no prediction; the score is of the others")
    others = {source: total.score() for source, total in totals.items() if source != first}
    best = min(others, key=lambda source: others[source], default=first)
    return {
        **fold_summary(totals[first]),
        **told,
        "paired": {"best": best, "differences": paired.differences(best)} if len(others) > 1 else None,
        "others": {source: fold_summary(total) for source, total in totals.items() if source != first},
        "floors": {name: total.score() for name, total in floor_totals.items()},
        "floor_details": {name: fold_summary(total) for name, total in floor_totals.items()},
        "floor_notes": [*filter(None, [competition.metric_note]), *floors.notes],
    }


def evaluate_test(paths: Paths, *, competition: Competition, predictions: Path) -> dict[str, Any]:
    """Score the test sequences whose values are known; nothing else reads these.

    Args:
        paths: where the clean tables are.
        competition: gives the metric.
        predictions: of the test set.

    Returns:
        As of a fold: ``score``, ``per_target``, ``positions``; and ``scored``, how many sequences have such.

    Raises:
        DataError: a test sequence has no prediction, or none of these targets.
    """
    targets = competition.targets
    test = pl.read_parquet(paths.clean("test"), columns=["sequence_id", "sequence", *targets])
    said = pl.concat(list(read_batches(predictions, ["sequence_id", *targets])))
    said = test.select("sequence_id").join(said, on="sequence_id", how="left", maintain_order="left", validate="1:1")
    if said[targets[0]].null_count():
        raise DataError(f"{predictions}: not of this test set. Next: make predict, then make ensemble.")
    lengths_N = test["sequence"].str.len_bytes().to_numpy().astype(np.int64)
    said_TC = finite_values(said, lengths_N, targets=targets, where=str(predictions))
    where, ids = "clean test table", test["sequence_id"]
    truth_TC = np.stack([flat_lists(test[name], lengths_N, ids=ids, where=where) for name in targets], axis=1)
    row_T = np.repeat(np.arange(test.height), lengths_N)
    total = Groups(competition)
    total.add_positions(np.zeros(len(row_T), dtype=np.intp), said_TC, truth_TC)
    return total.summary() | {"scored": len(np.unique(row_T[np.isfinite(truth_TC).all(axis=1)]))}


def _batches(
    paths: Paths,
    competition: Competition,
    split: str,
    folds: Sequence[int],
    sources: Mapping[str, Sequence[Path]],
    *,
    label: str,
) -> Iterator[OofBatch]:
    """Training sequences of some folds, with what the scores need of them, beside predictions."""
    train = paths.clean("train")
    columns = ["scored", *competition.targets, *Breakdown(competition).columns]
    stream = out_of_fold(
        train,
        fold_table=paths.fold_table(split),
        folds=folds,
        sources=sources,
        targets=competition.targets,
        columns=columns,
    )
    with Bar(label, total=pq.read_metadata(train).num_rows, unit="sequences") as bar:
        for batch in stream:
            yield batch
            bar.advance(batch.rows.height)


class _Floors:
    """Floors of a split, fitted on all its scored sequences outside the fold that is predicted."""

    def __init__(self, paths: Paths, competition: Competition, split: str) -> None:
        folds = fold_numbers(paths.fold_table(split))
        self._bins = UnpairedBins(paths.bpp, paths.clean("train")) if paths.bpp.is_file() else None
        self._tables = FloorTables(usuals_of(competition), folds=folds, unpaired=self._bins is not None)
        self.notes = self._notes(paths)
        for batch in _batches(paths, competition, split, folds, {}, label="fit floors"):
            truth_TC = truth_that_counts(batch, competition.targets)
            there_T = np.isfinite(truth_TC[:, 0])
            kmer_T, bin_T, fold_T = self._keys(batch, there_T)
            self._tables.add(kmer_T, bin_T, truth_TC[there_T], fold_T)
        self._fitted = self._tables.fit()
        self.names = self._tables.names

    def _notes(self, paths: Paths) -> list[str]:
        if self._bins is None:
            then = f"Next: make bpp COMP={paths.comp}, if ViennaRNA is installed."
            return [f"{FLOORS[-1]}: left out, there is no {paths.bpp}. {then}"]
        if self._bins.without:
            return [
                f"{FLOORS[-1]}: {self._bins.without:,} sequences without base-pair probabilities have their own bin"
            ]
        return []

    def _keys(self, batch: OofBatch, there_T: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        sequences = batch.rows["sequence"]
        kmer_T = kmers(sequences, batch.lengths_N)[there_T]
        bin_T = (
            self._bins.of(sequences, batch.lengths_N)[there_T] if self._bins else np.zeros(len(kmer_T), dtype=np.intp)
        )
        return kmer_T, bin_T, batch.spread(batch.rows["fold"].to_numpy())[there_T]

    def at(self, batch: OofBatch, there_T: np.ndarray) -> list[tuple[str, np.ndarray]]:
        """(floor, [T', C] prediction) at the positions that `there_T` selects."""
        kmer_T, bin_T, fold_T = self._keys(batch, there_T)
        return [(name, self._tables.lookup(table, kmer_T, bin_T, fold_T)) for name, table in self._fitted.items()]
