"""Scores of predicted classes over whole sets, with their parts, beside floors fitted on the other folds.

Letters: N sequences, K classes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from rich.markup import escape
from rich.table import Table

from pipeline.labels import Classes, log_losses, read_classes
from pipeline.paths import Paths
from pipeline.runlog import amount
from pipeline.tables import check_probabilities, labels_that_count
from submissions import class_scores, whole_scores
from submissions.class_floors import predict_floors
from submissions.whole_scores import Answers, Predicted, by_length, floors_of, read_test, summarise, warn_missing

#: Most classes of which all confusions are kept and drawn.
MOST_CONFUSED = 60
#: Scores of each class of which there is a mean over the classes, beside precision, recall and F1.
_ALSO_AVERAGED = ("mcc", "auroc", "average_precision", "f1_at_threshold")
#: Most classes that the terminal lists.
_SHOWN = 30
#: Scores of each class in the tables of terminal and report, and the heads of their columns.
COLUMNS = {
    **{"precision": "precision", "recall": "recall", "f1": "F1", "mcc": "MCC", "auroc": "AUROC"},
    **{"average_precision": "average precision", "threshold": "threshold", "f1_at_threshold": "F1 there"},
}


@dataclass(frozen=True, kw_only=True)
class ClassesPredicted(Predicted):
    """Scored sequences, their classes and the probabilities that were predicted of each."""

    classes: Classes

    def truth(self) -> np.ndarray:
        """[N, K] bool."""
        return self.truth_NK > 0.5

    def thresholds(self) -> np.ndarray:
        """[N, K]: thresholds learned on the other folds."""
        return class_scores.crossed_thresholds(self.said_NK, self.truth(), self.fold_N)

    def decided(self) -> np.ndarray:
        """[N, K] bool: the classes decided for."""
        return _decide(self.said_NK, self)


def answers_of(classes: Classes) -> Answers:
    """How labels and probabilities are read."""
    width, exclusive = len(classes.names), classes.exclusive
    return Answers(
        known="labels",
        said="probabilities",
        width=width,
        truth=partial(labels_that_count, width=width),
        check=lambda said_NK, ids, where: check_probabilities(said_NK, ids, exclusive=exclusive, where=where),
    )


def read_predicted(
    paths: Paths, *, split: str, folds: Sequence[int], tables: Sequence[Path], name: str, classes: Classes
) -> ClassesPredicted:
    """Out-of-fold predictions of one source beside the truth.

    Raises:
        DataError: predictions not out of fold, no probabilities, or of other data; or none of them is scored.
    """
    own = whole_scores.read_predicted(paths, answers_of(classes), split=split, folds=folds, tables=tables, name=name)
    return ClassesPredicted(**vars(own), classes=classes)


def evaluate_classes(
    paths: Paths, *, split: str, folds: Sequence[int], sources: Mapping[str, Sequence[Path]]
) -> dict[str, Any]:
    """Score out-of-fold predictions of classes, as `submissions.value_scores.evaluate_values` does values; not paired.

    Raises:
        DataError: see `read_predicted`.
    """
    classes = read_classes(paths)
    others = {}
    for name, tables in reversed(list(sources.items())):  # the first one last, to be told in full
        own = read_predicted(paths, split=split, folds=folds, tables=tables, name=name, classes=classes)
        others[name] = _summary(own, own.said_NK)
    warn_missing(own, name)

    def predict(
        sequences: list[str], truth_NK: np.ndarray, fold_N: np.ndarray, cluster_N: np.ndarray
    ) -> dict[str, np.ndarray]:
        return predict_floors(sequences, truth_NK > 0.5, fold_N, cluster_N, classes)

    found = floors_of(own, paths, answers_of(classes), split=split, predict=predict)
    floors = {floor: _summary(own, values_NK) for floor, values_NK in found.items()}
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


def _decide(probability_NK: np.ndarray, own: ClassesPredicted) -> np.ndarray:
    if own.classes.exclusive:
        return class_scores.decide(probability_NK, exclusive=True)
    thresholds_NK = class_scores.crossed_thresholds(probability_NK, own.truth(), own.fold_N)
    return class_scores.decide(probability_NK, exclusive=False, thresholds=thresholds_NK)


def _summary(own: ClassesPredicted, probability_NK: np.ndarray) -> dict[str, Any]:
    """Log loss and `class_scores.in_short` of all sequences and of every fold; mean and deviation over the folds."""
    decided_NK = _decide(probability_NK, own)

    def scores(here_N: np.ndarray) -> dict[str, Any]:
        parts = (probability_NK[here_N], own.truth()[here_N], decided_NK[here_N])
        return _scores(*parts, exclusive=own.classes.exclusive)

    return summarise(own, scores)


def _scores(
    probability_NK: np.ndarray, truth_NK: np.ndarray, decided_NK: np.ndarray, *, exclusive: bool
) -> dict[str, Any]:
    told = class_scores.in_short(probability_NK, truth_NK, decided_NK, exclusive=exclusive)
    loss = log_losses(probability_NK, truth_NK, exclusive=exclusive).mean()
    return {"score": float(loss), "per_target": told, "scored": len(truth_NK)}


def _in_full(own: ClassesPredicted) -> dict[str, Any]:
    """What is told of the first source beside its summary."""
    names, exclusive = own.classes.names, own.classes.exclusive
    decided_NK, thresholds_NK = own.decided(), own.thresholds()
    found = class_scores.per_class(own.said_NK, own.truth(), decided_NK, thresholds_NK)
    found["threshold"] = class_scores.learn_thresholds(own.said_NK, own.truth())
    averages = class_scores.averages(class_scores.count(decided_NK, own.truth()))
    averages["macro"] |= {kind: class_scores.mean_defined(found[kind]) for kind in _ALSO_AVERAGED}
    bins = class_scores.stated_and_right(own.said_NK, own.truth(), exclusive=exclusive)
    keep = exclusive and len(names) <= MOST_CONFUSED
    return {
        "classes": {"names": list(names), "exclusive": exclusive},
        "per_class": [
            {"class": name} | {kind: values_K[place].item() for kind, values_K in found.items()}
            for place, name in enumerate(names)
        ],
        "averages": averages,
        "median_auroc": [] if exclusive and not own.classes.groups else _medians(found["auroc"], own.classes.groups),
        "undefined": {
            kind: lost
            for kind, values_K in found.items()
            if (lost := [name for name, value in zip(names, values_K, strict=True) if np.isnan(value)])
        },
        "confusion": class_scores.confusion(decided_NK, own.truth()).tolist() if keep else None,
        "calibration": {"error": class_scores.calibration_error(bins), "bins": bins},
        "by_length": _by_length(own, decided_NK),
        "sequences": own.counts,
        "without_prediction": own.missing,
    }


def _medians(auroc_K: np.ndarray, groups: Sequence[str]) -> list[dict[str, Any]]:
    """`class_scores.median_defined` of all classes, then of each group; ``group`` "" = all."""
    group_K = np.array(groups)
    parts = {"": auroc_K} | {group: auroc_K[group_K == group] for group in sorted(set(groups) - {""})}
    return [{"group": group} | class_scores.median_defined(part_k) for group, part_k in parts.items()]


def _by_length(own: ClassesPredicted, decided_NK: np.ndarray) -> list[dict[str, Any]]:
    losses_N = log_losses(own.said_NK, own.truth(), exclusive=own.classes.exclusive)
    right_N = (decided_NK == own.truth()).all(axis=1)

    def score(here_N: np.ndarray) -> dict[str, Any]:
        return {"score": float(losses_N[here_N].mean()), "accuracy": float(right_N[here_N].mean())}

    return by_length(own, score)


def evaluate_test(paths: Paths, *, predictions: Path, thresholds: Sequence[float]) -> dict[str, Any]:
    """Score the test sequences whose classes are known, as a fold; nothing else reads these.

    Args:
        paths: where the clean tables are.
        predictions: of the test set.
        thresholds: of several labels, what the probability of each must reach.

    Raises:
        DataError: a test sequence has no prediction, or none of probabilities.
    """
    classes = read_classes(paths)
    probability_NK, truth_NK = read_test(paths, answers_of(classes), predictions)
    decided_NK = class_scores.decide(probability_NK, exclusive=classes.exclusive, thresholds=np.array(thresholds))
    return _scores(probability_NK, truth_NK > 0.5, decided_NK, exclusive=classes.exclusive)


def describe(facts: Mapping[str, Any]) -> Table:
    """Every class's scores as a table for the terminal; of many classes, the most frequent."""
    rows = by_support(facts)
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(f"{'one class' if facts['classes']['exclusive'] else 'any number of classes'} a sequence")
    for name in ("sequences", *COLUMNS.values()):
        table.add_column(name, justify="right")
    for row in rows[:_SHOWN]:
        table.add_row(escape(row["class"]), f"{row['support']:,}", *(tell(row[kind], 3) for kind in COLUMNS))
    for name, told in facts["averages"].items():
        cells = [tell(told[kind], 3) if kind in told else "" for kind in COLUMNS]
        table.add_row(f"{name} average", "", *cells, style="dim")
    for told in facts["median_auroc"]:
        cells = [tell(told["median"], 3) if kind == "auroc" else "" for kind in COLUMNS]
        table.add_row(escape(tell_median(told)), "", *cells, style="dim")
    if len(rows) > _SHOWN:
        table.caption = f"The {_SHOWN} most frequent of {len(rows)} classes; scores.json and the report have them all."
    return table


def tell_median(told: Mapping[str, Any]) -> str:
    """Of what a median is: a row of ``median_auroc``.

    >>> tell_median({"group": "TF", "classes": 690, "left_out": 2})
    'median of 690 classes, TF (2 undefined)'
    """
    words = f"median of {amount(told['classes'], 'class')}" + (f", {told['group']}" if told["group"] else "")
    return words + (f" ({told['left_out']:,} undefined)" if told["left_out"] else "")


def by_support(facts: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Rows of the classes, the most frequent first."""
    return sorted(facts["per_class"], key=lambda row: (-row["support"], row["class"]))


def tell(value: float | None, digits: int = 4) -> str:
    """A score, or that it is not defined.

    >>> tell(0.25), tell(None)
    ('0.2500', 'undefined')
    """
    return "undefined" if value is None else f"{value:.{digits}f}"
