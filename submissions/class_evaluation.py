"""Scores of predicted classes over whole sets, with their parts, beside floors fitted on the other folds.

Letters: N sequences, K classes.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from rich.markup import escape
from rich.table import Table

from pipeline.classes import Classes, log_losses, read_classes
from pipeline.errors import DataError
from pipeline.paths import Paths
from pipeline.runlog import track, warn
from pipeline.tables import check_probabilities, labels_that_count, out_of_fold
from submissions import class_scores
from submissions.breakdown import LENGTH_STEP
from submissions.class_floors import predict_floors

#: Most classes of which all confusions are kept and drawn.
MOST_CONFUSED = 60
#: Scores of each class of which there is a mean over the classes, beside precision, recall and F1.
_ALSO_AVERAGED = ("mcc", "auroc", "average_precision", "f1_at_threshold")
#: Most classes that the terminal lists.
_SHOWN = 30


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """Scored sequences that have a prediction, in the order of their ids, and what was said of them."""

    ids: pl.Series
    sequences: pl.Series
    fold_N: np.ndarray
    truth_NK: np.ndarray  #: bool
    probability_NK: np.ndarray  #: float32
    classes: Classes
    counts: dict[str, int]  #: coverage: how many are in the folds, predicted, scored, without label
    missing: list[str]  #: ids of scored sequences without prediction

    def thresholds(self) -> np.ndarray:
        """[N, K]: thresholds learned on the other folds."""
        return class_scores.crossed_thresholds(self.probability_NK, self.truth_NK, self.fold_N)

    def decided(self) -> np.ndarray:
        """[N, K] bool: the classes decided for."""
        return _decide(self.probability_NK, self)


def read_predicted(
    paths: Paths, *, split: str, folds: Sequence[int], tables: Sequence[Path], name: str, classes: Classes
) -> Predicted:
    """Out-of-fold predictions of one source beside the truth.

    Raises:
        DataError: predictions not out of fold, no probabilities, or of other data; or none of them is scored.
    """
    rows, truths, probabilities, missing = [], [], [], list[str]()
    counts = {"in_folds": 0, "predicted": 0, "scored": 0, "without_label": 0}
    for batch in track(_batches(paths, split, folds, {name: tables}, classes), f"read {name}", unit="batches"):
        truth_NK = labels_that_count(batch.rows, width=len(classes.names))
        probability_NK = batch.predictions[name].reshape(truth_NK.shape)
        check_probabilities(probability_NK, batch.rows["sequence_id"], exclusive=classes.exclusive, where=name)
        scored_N, lost_N = ~np.isnan(truth_NK[:, 0]), batch.missing[name]
        seen = {"in_folds": len(lost_N), "predicted": (~lost_N).sum(), "scored": scored_N.sum()}
        for kind, number in (seen | {"without_label": batch.rows["labels"].null_count()}).items():
            counts[kind] += int(number)
        missing += batch.rows["sequence_id"].filter(pl.Series(scored_N & lost_N)).to_list()
        here_N = scored_N & ~lost_N
        rows.append(batch.rows.select("sequence_id", "sequence", "fold").filter(pl.Series(here_N)))
        truths.append(truth_NK[here_N] > 0.5)
        probabilities.append(probability_NK[here_N])
    table = pl.concat(rows)
    if not table.height:
        raise DataError(
            f"evaluate: no scored sequence has a prediction of {name}; expected out-of-fold predictions of labelled "
            "sequences. Next: see that data and predictions belong together."
        )
    return Predicted(
        ids=table["sequence_id"],
        sequences=table["sequence"],
        fold_N=table["fold"].to_numpy(),
        truth_NK=np.concatenate(truths),
        probability_NK=np.concatenate(probabilities),
        classes=classes,
        counts=counts | {"scored_without_prediction": len(missing)},
        missing=missing,
    )


def _batches(
    paths: Paths, split: str, folds: Sequence[int], sources: Mapping[str, Sequence[Path]], classes: Classes
) -> Any:
    return out_of_fold(
        paths.clean("train"),
        fold_table=paths.fold_table(split),
        folds=folds,
        sources=sources,
        targets=("probabilities",),
        columns=("scored", "labels"),
        width=len(classes.names),
    )


def evaluate_classes(
    paths: Paths, *, split: str, folds: Sequence[int], sources: Mapping[str, Sequence[Path]]
) -> dict[str, Any]:
    """Score out-of-fold predictions of classes.

    Args:
        paths: where the clean tables and the fold table live.
        split: name of the fold table.
        folds: folds that were predicted.
        sources: name -> prediction tables that together make one set; the first is told in full, all are scored.

    Returns:
        JSON-able but for NaN: score, parts and coverage of the first source; ``others``: score and folds of the rest;
        ``floors`` on the sequences of the first, ``floor_details``, ``floor_notes``.

    Raises:
        DataError: see `read_predicted`.
    """
    classes = read_classes(paths)
    others = {}
    for name, tables in reversed(list(sources.items())):  # the first one last, to be told in full
        own = read_predicted(paths, split=split, folds=folds, tables=tables, name=name, classes=classes)
        others[name] = _summary(own, own.probability_NK)
    if own.missing:
        some = ", ".join(own.missing[:3]) + (" …" if len(own.missing) > 3 else "")
        warn(
            f"evaluate: {len(own.missing):,} scored sequences have no prediction of {name}: {some}; the score is of "
            "the others, and scores.json lists them"
        )
    floors = {floor: _summary(own, values_NK) for floor, values_NK in _floors_of(paths, split, own).items()}
    summary = others.pop(name)
    return {
        **summary,
        "columns": list(summary["per_target"]),
        **_in_full(own),
        "others": others,
        "floors": {floor: told["score"] for floor, told in floors.items()},
        "floor_details": floors,
        "floor_notes": [],
    }


def _floors_of(paths: Paths, split: str, own: Predicted) -> dict[str, np.ndarray]:
    """Floors fitted on all scored sequences outside a fold, whether predicted or not, at the sequences of `own`."""
    table = pl.read_parquet(paths.fold_table(split), columns=["fold"])
    folds = table["fold"].unique().sort().to_list()
    rows = pl.concat([batch.rows for batch in _batches(paths, split, folds, {}, own.classes)])
    truth_NK = labels_that_count(rows, width=len(own.classes.names))
    rows, truth_NK = rows.filter(pl.Series(~np.isnan(truth_NK[:, 0]))), truth_NK[~np.isnan(truth_NK[:, 0])] > 0.5
    here_N = rows["sequence_id"].is_in(own.ids.to_list()).to_numpy()
    found = predict_floors(rows["sequence"].to_list(), truth_NK, rows["fold"].to_numpy(), own.classes)
    return {name: values_NK[here_N] for name, values_NK in found.items()}


def _decide(probability_NK: np.ndarray, own: Predicted) -> np.ndarray:
    if own.classes.exclusive:
        return class_scores.decide(probability_NK, exclusive=True)
    thresholds_NK = class_scores.crossed_thresholds(probability_NK, own.truth_NK, own.fold_N)
    return class_scores.decide(probability_NK, exclusive=False, thresholds=thresholds_NK)


def _summary(own: Predicted, probability_NK: np.ndarray) -> dict[str, Any]:
    """Log loss and `class_scores.in_short` of all sequences and of every fold; mean and deviation over the folds."""
    decided_NK = _decide(probability_NK, own)

    def scores(here_N: np.ndarray) -> dict[str, Any]:
        parts = (probability_NK[here_N], own.truth_NK[here_N], decided_NK[here_N])
        return _scores(*parts, exclusive=own.classes.exclusive)

    by_fold = [{"fold": int(fold)} | scores(own.fold_N == fold) for fold in np.unique(own.fold_N)]
    losses = np.array([row["score"] for row in by_fold])
    spread = float(losses.std(ddof=1)) if len(losses) > 1 else math.nan
    whole = scores(np.ones(len(own.fold_N), dtype=bool))
    return whole | {"per_fold": by_fold, "fold_mean": float(losses.mean()), "fold_sd": spread}


def _scores(
    probability_NK: np.ndarray, truth_NK: np.ndarray, decided_NK: np.ndarray, *, exclusive: bool
) -> dict[str, Any]:
    told = class_scores.in_short(probability_NK, truth_NK, decided_NK, exclusive=exclusive)
    loss = log_losses(probability_NK, truth_NK, exclusive=exclusive).mean()
    return {"score": float(loss), "per_target": told, "scored": len(truth_NK)}


def _in_full(own: Predicted) -> dict[str, Any]:
    """What is told of the first source beside its summary."""
    names, exclusive = own.classes.names, own.classes.exclusive
    decided_NK, thresholds_NK = own.decided(), own.thresholds()
    found = class_scores.per_class(own.probability_NK, own.truth_NK, decided_NK, thresholds_NK)
    found["threshold"] = class_scores.learn_thresholds(own.probability_NK, own.truth_NK)
    averages = class_scores.averages(class_scores.count(decided_NK, own.truth_NK))
    averages["macro"] |= {kind: class_scores.mean_defined(found[kind]) for kind in _ALSO_AVERAGED}
    bins = class_scores.stated_and_right(own.probability_NK, own.truth_NK, exclusive=exclusive)
    keep = exclusive and len(names) <= MOST_CONFUSED
    return {
        "classes": {"names": list(names), "exclusive": exclusive},
        "per_class": [
            {"class": name} | {kind: values_K[place].item() for kind, values_K in found.items()}
            for place, name in enumerate(names)
        ],
        "averages": averages,
        "undefined": {
            kind: lost
            for kind, values_K in found.items()
            if (lost := [name for name, value in zip(names, values_K, strict=True) if np.isnan(value)])
        },
        "confusion": class_scores.confusion(decided_NK, own.truth_NK).tolist() if keep else None,
        "calibration": {"error": class_scores.calibration_error(bins), "bins": bins},
        "by_length": _by_length(own, decided_NK),
        "sequences": own.counts,
        "without_prediction": own.missing,
    }


def _by_length(own: Predicted, decided_NK: np.ndarray) -> list[dict[str, Any]]:
    losses_N = log_losses(own.probability_NK, own.truth_NK, exclusive=own.classes.exclusive)
    right_N = (decided_NK == own.truth_NK).all(axis=1)
    length_N = own.sequences.str.len_bytes().to_numpy().astype(np.int64)
    rows = []
    for low in np.unique(length_N - length_N % LENGTH_STEP):
        here_N = length_N - length_N % LENGTH_STEP == low
        label = {"label": f"{low}-{low + LENGTH_STEP - 1}", "sequences": int(here_N.sum())}
        rows.append(label | {"score": float(losses_N[here_N].mean()), "accuracy": float(right_N[here_N].mean())})
    return rows


def has_test_labels(paths: Paths) -> bool:
    """Whether the classes of test sequences are known."""
    return paths.clean("test").is_file() and "labels" in pl.read_parquet_schema(paths.clean("test"))


def evaluate_test(paths: Paths, *, predictions: Path, thresholds: Sequence[float]) -> dict[str, Any]:
    """Score the test sequences whose classes are known; nothing else reads these.

    Args:
        paths: where the clean tables are.
        predictions: of the test set.
        thresholds: of several labels, what the probability of each must reach.

    Returns:
        As of a fold: ``score``, ``per_target``, ``scored``.

    Raises:
        DataError: a test sequence has no prediction, or none of probabilities.
    """
    classes = read_classes(paths)
    known = pl.read_parquet(paths.clean("test")).filter(pl.col("labels").is_not_null())
    said = pl.read_parquet(predictions, columns=["sequence_id", "probabilities"])
    table = known.join(said, on="sequence_id", how="left", maintain_order="left", validate="1:1")
    if table["probabilities"].null_count():
        raise DataError(f"{predictions}: not of this test set. Next: make predict, then make ensemble.")
    probability_NK = np.array(table["probabilities"].to_list(), dtype=np.float32)
    check_probabilities(probability_NK, table["sequence_id"], exclusive=classes.exclusive, where=str(predictions))
    truth_NK = labels_that_count(table.with_columns(scored=True), width=len(classes.names)) > 0.5
    decided_NK = class_scores.decide(probability_NK, exclusive=classes.exclusive, thresholds=np.array(thresholds))
    return _scores(probability_NK, truth_NK, decided_NK, exclusive=classes.exclusive)


def describe(facts: Mapping[str, Any]) -> Table:
    """Every class's scores as a table for the terminal; of many classes, the most frequent."""
    rows = sorted(facts["per_class"], key=lambda row: (-row["support"], row["class"]))
    head = {"precision": "precision", "recall": "recall", "f1": "F1", "mcc": "MCC", "auroc": "AUROC"}
    head |= {"average_precision": "average precision", "threshold": "threshold", "f1_at_threshold": "F1 there"}
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(f"{'one class' if facts['classes']['exclusive'] else 'any number of classes'} a sequence")
    for name in ("sequences", *head.values()):
        table.add_column(name, justify="right")
    for row in rows[:_SHOWN]:
        table.add_row(escape(row["class"]), f"{row['support']:,}", *(tell(row[kind], 3) for kind in head))
    for name, told in facts["averages"].items():
        table.add_row(
            f"{name} average", "", *(tell(told[kind], 3) if kind in told else "" for kind in head), style="dim"
        )
    if len(rows) > _SHOWN:
        table.caption = f"The {_SHOWN} most frequent of {len(rows)} classes; scores.json and the report have them all."
    return table


def tell(value: float | None, digits: int = 4) -> str:
    """A score, or that it is not defined.

    >>> tell(0.25), tell(None)
    ('0.2500', 'undefined')
    """
    return "undefined" if value is None else f"{value:.{digits}f}"
