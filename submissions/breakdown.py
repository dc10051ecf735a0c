"""Errors of predictions as (sum, count), and the scores of their parts: by fold, length, signal, data set, position.

Letters: T positions, C targets, N sequences of a batch, G groups.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from pipeline.competitions.base import Competition
from pipeline.runlog import score_text, spread_text
from pipeline.tables import OofBatch

#: Lengths are reported in steps of so many nt.
LENGTH_STEP = 50
#: Lower edges of the signal-to-noise classes; of a sequence counts the lowest of its profiles.
SIGNAL_EDGES = (0, 1, 2, 4, 8, 16)


class Groups:
    """(sum, count) of the metric's errors per label, added up over batches in a fixed order."""

    def __init__(self, competition: Competition) -> None:
        self.competition = competition
        width = len(competition.targets)
        self._zero = np.zeros(width), np.zeros(width, dtype=np.int64)
        self._found: dict[Any, tuple[np.ndarray, np.ndarray]] = {}

    def add_positions(self, label_T: np.ndarray, prediction_TC: np.ndarray, truth_TC: np.ndarray) -> None:
        """Add the errors of some positions to the groups that their labels name."""
        self.add_sums(*sums_by(self.competition, label_T, prediction_TC, truth_TC))

    def add_sums(self, label_N: np.ndarray, sums_NC: np.ndarray, counts_NC: np.ndarray) -> None:
        """Add sums that are known, of sequences for example, to the groups that their labels name."""
        labels_G, group_N = np.unique(label_N, return_inverse=True)
        for group, label in enumerate(labels_G.tolist()):
            sums_C, counts_C = self._found.get(label, self._zero)
            here_N = group_N == group
            self._found[label] = sums_C + sums_NC[here_N].sum(axis=0), counts_C + counts_NC[here_N].sum(axis=0)

    def positions(self) -> int:
        """Positions that count, over all groups."""
        return int(self._total()[1].max(initial=0))

    def counts(self) -> np.ndarray:
        """Values that count in each group, over all targets: [G], in the order of the labels."""
        return np.array([self._found[label][1].sum() for label in sorted(self._found)])

    def score(self) -> float:
        """The competition's score of all groups together."""
        assert self.competition.score is not None
        return float(self.competition.score(*self._total()))

    def scores_without(self) -> np.ndarray:
        """The score of all groups but one, for each of them: [G], in the order of the labels."""
        assert self.competition.score is not None
        total_C, number_C = self._total()
        parts = [self._found[label] for label in sorted(self._found)]
        return np.array([self.competition.score(total_C - sums_C, number_C - counts_C) for sums_C, counts_C in parts])

    def summary(self) -> dict[str, Any]:
        """Score and errors per target of all groups together."""
        return self._named(*self._total())

    def table(self, label_name: str) -> list[dict[str, Any]]:
        """The same of every group, in the order of the labels."""
        return [{label_name: label} | self._named(*self._found[label]) for label in sorted(self._found)]

    def _total(self) -> tuple[np.ndarray, np.ndarray]:
        sums_C, counts_C = self._zero
        for label in sorted(self._found):
            sums_C, counts_C = sums_C + self._found[label][0], counts_C + self._found[label][1]
        return sums_C, counts_C

    def _named(self, sums_C: np.ndarray, counts_C: np.ndarray) -> dict[str, Any]:
        assert self.competition.score is not None
        errors_C = self.competition.target_errors(sums_C, counts_C)
        return {
            "score": float(self.competition.score(sums_C, counts_C)),
            "per_target": dict(zip(self.competition.targets, map(float, errors_C), strict=True)),
            "positions": int(counts_C.max(initial=0)),
        }


def sums_by(
    competition: Competition, label_T: np.ndarray, prediction_TC: np.ndarray, truth_TC: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The competition's error sums of each group of positions.

    Returns:
        [G] labels in rising order, [G, C] sums and [G, C] counts.
    """
    assert competition.error_sums is not None
    order = np.argsort(label_T, kind="stable")
    labels_G, starts_G = np.unique(label_T[order], return_index=True)
    stops_G = np.append(starts_G, len(order))[1:]
    sums_GC = np.zeros((len(labels_G), prediction_TC.shape[1]))
    counts_GC = np.zeros(sums_GC.shape, dtype=np.int64)
    for group, (start, stop) in enumerate(zip(starts_G, stops_G, strict=True)):
        here = order[start:stop]
        sums_GC[group], counts_GC[group] = competition.error_sums(prediction_TC[here], truth_TC[here])
    return labels_G, sums_GC, counts_GC


def fold_summary(by_fold: Groups) -> dict[str, Any]:
    """Score of all folds together, of each, and mean and standard deviation over them (NaN for a single one)."""
    folds = by_fold.table("fold")
    return by_fold.summary() | {"per_fold": folds} | over_folds([row["score"] for row in folds])


def over_folds(scores: Sequence[float]) -> dict[str, float]:
    """``fold_mean`` and ``fold_sd``; NaN where there are too few folds for them."""
    mean = float(np.mean(scores)) if len(scores) else math.nan
    return {"fold_mean": mean, "fold_sd": float(np.std(scores, ddof=1)) if len(scores) > 1 else math.nan}


def tell_over_folds(told: Mapping[str, Any]) -> str | None:
    """``0.1587 ± 0.0380`` of what `over_folds` found, the mean alone of a single fold; None where there is no mean."""
    mean, spread = told.get("fold_mean"), told.get("fold_sd")
    if mean is None or spread is None:
        return None if mean is None else score_text(mean)
    return f"{score_text(mean)} ± {spread_text(spread, mean=mean)}"


class Breakdown:
    """What is told of the predictions that are evaluated, beside their score."""

    def __init__(self, competition: Competition) -> None:
        self.competition = competition
        names = ("length", "signal_to_noise", "dataset", "position")
        self._groups = {name: Groups(competition) for name in names}
        self._clipped = Groups(competition)
        self._own_sums_C, self._own_counts_C = np.zeros((2, len(competition.targets)))
        self._sequences = {"in_folds": 0, "predicted": 0, "scored": 0, "scored_without_prediction": 0}

    @property
    def columns(self) -> list[str]:
        """Columns of the clean train table that are needed beside sequence, ``scored`` and the targets."""
        return ["dataset_name", *self._signals, *self._filters]

    @property
    def _signals(self) -> tuple[str, ...]:
        return self.competition.signal_to_noise or ()

    @property
    def _filters(self) -> list[str]:
        return [name.replace("signal_to_noise", "SN_filter") for name in self._signals]

    def add(self, batch: OofBatch, prediction_TC: np.ndarray, truth_TC: np.ndarray, missing_N: np.ndarray) -> None:
        """Add a batch.

        Args:
            batch: training sequences.
            prediction_TC: [T, C], NaN where `missing_N`.
            truth_TC: [T, C], NaN where the metric does not look.
            missing_N: [N] bool, sequences without prediction.
        """
        there_T = batch.spread(~missing_N)
        self._count(batch.rows["scored"].to_numpy(), missing_N)
        self._add_own(batch, prediction_TC, there_T)
        here_T = there_T & np.isfinite(truth_TC[:, 0])
        prediction_TC, truth_TC = prediction_TC[here_T], truth_TC[here_T]
        sequence_T = batch.spread(np.arange(batch.rows.height))[here_T]
        of_N, sums_NC, counts_NC = sums_by(self.competition, sequence_T, prediction_TC, truth_TC)
        for name, label_N in self._labels(batch).items():
            self._groups[name].add_sums(label_N[of_N], sums_NC, counts_NC)
        starts_N = np.cumsum(batch.lengths_N) - batch.lengths_N
        position_T = np.arange(len(there_T)) - batch.spread(starts_N) + 1
        self._groups["position"].add_positions(position_T[here_T], prediction_TC, truth_TC)
        if self.competition.target_range:
            one_T = np.zeros(len(truth_TC), dtype=np.intp)
            self._clipped.add_positions(one_T, np.clip(prediction_TC, *self.competition.target_range), truth_TC)

    def _count(self, scored_N: np.ndarray, missing_N: np.ndarray) -> None:
        self._sequences["in_folds"] += len(scored_N)
        self._sequences["predicted"] += int((~missing_N).sum())
        self._sequences["scored"] += int(scored_N.sum())
        self._sequences["scored_without_prediction"] += int((scored_N & missing_N).sum())

    def _add_own(self, batch: OofBatch, prediction_TC: np.ndarray, there_T: np.ndarray) -> None:
        """Each target by its own filter, whatever the others say."""
        assert self.competition.error_sums is not None
        measured_TC = batch.flat(self.competition.targets)
        for place, name in enumerate(self._filters):
            passed_T = batch.spread(batch.rows[name].fill_null(False).to_numpy())
            here_T = there_T & passed_T & np.isfinite(measured_TC[:, place])
            one = slice(place, place + 1)
            sums_C, counts_C = self.competition.error_sums(prediction_TC[here_T, one], measured_TC[here_T, one])
            self._own_sums_C[place] += sums_C[0]
            self._own_counts_C[place] += counts_C[0]

    def _labels(self, batch: OofBatch) -> dict[str, np.ndarray]:
        labels = {
            "length": batch.lengths_N - batch.lengths_N % LENGTH_STEP,
            "dataset": batch.rows["dataset_name"].fill_null("").to_numpy(),
        }
        if self._signals:
            lowest_N = batch.rows.select(pl.min_horizontal(self._signals)).to_series().fill_null(0.0).to_numpy()
            edge_N = np.searchsorted(SIGNAL_EDGES, lowest_N, side="right") - 1
            labels["signal_to_noise"] = np.array(SIGNAL_EDGES)[np.maximum(edge_N, 0)]
        return labels

    def summary(self) -> dict[str, Any]:
        """JSON-able: coverage, own-filter errors, a table per kind of group; the score clipped, where the truth is."""
        own_C = self.competition.target_errors(self._own_sums_C, self._own_counts_C).tolist()
        return {
            "sequences": self._sequences,
            **({"score_clipped": self._clipped.score()} if self.competition.target_range else {}),
            "per_target_own_filter": dict(zip(self.competition.targets, own_C, strict=True)),
            "by_length": _ranges(self._groups["length"].table("from"), step=LENGTH_STEP),
            "by_signal_to_noise": _ranges(self._groups["signal_to_noise"].table("from"), edges=SIGNAL_EDGES),
            "by_dataset": self._groups["dataset"].table("dataset_name"),
            "by_position": self._groups["position"].table("position"),
        }


def _ranges(rows: list[dict[str, Any]], *, step: int = 0, edges: Sequence[int] = ()) -> list[dict[str, Any]]:
    """Rows with a ``label`` such as "100-149" (whole numbers) or, of edges, those below.

    Below the first edge there are profiles, too: of nothing but noise some have a mean reactivity below 0.

    >>> [row["label"] for row in _ranges([{"from": low} for low in (0, 2, 16)], edges=SIGNAL_EDGES)]
    ['below 1', '2 to 4', '16 or more']
    """
    labelled = []
    for row in rows:
        low = row["from"]
        if step:
            label = f"{low}-{low + step - 1}"
        else:
            after = [edge for edge in edges if edge > low]
            begins = f"{low} to" if low > edges[0] else "below"
            label = f"{begins} {after[0]}" if after else f"{low} or more"
        labelled.append({"label": label} | row)
    return labelled
