"""The rows of a submission of classes: probabilities, labels or both, in the order that is asked for."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from pipeline.errors import DataError
from pipeline.labels import MIN_PROBABILITY, Classes, read_classes
from pipeline.paths import Paths
from pipeline.stage import read_result
from submissions import class_scores
from submissions.class_evaluation import answers_of, read_predicted
from submissions.class_layout import SEPARATOR, ClassLayout, read_class_layout
from submissions.whole_rows import ids_of, predictions_in_order, set_inputs, write_rows

#: Decimals of a probability in a CSV: as many as `MIN_PROBABILITY` has.
DECIMALS = 7


def class_inputs(paths: Paths, name: str) -> dict[str, Path]:
    """Files that a submission of an ensemble is made from, beside its predictions and the test set.

    Raises:
        DataError: there is no test set, or the sample submission does not fit it.
    """
    inputs = set_inputs(paths, "classes")
    if _needs_thresholds(read_class_layout(paths)):
        home, split = paths.ensemble_dir(name), _read_weights(paths, name)["split"]
        inputs |= {"oof": home / "oof.parquet", "weights": home / "weights.json"}
        inputs |= {"train": paths.clean("train"), "folds": paths.fold_table(split)}
    return inputs


def _needs_thresholds(layout: ClassLayout) -> bool:
    return bool(layout.label) and not layout.classes.exclusive


def _read_weights(paths: Paths, name: str) -> dict[str, Any]:
    return read_result(paths.ensemble_dir(name) / "weights.json", hint=f"make ensemble COMP={paths.comp} NAME={name}")


def write_classes(paths: Paths, predictions: Path, part: Path, *, fmt: str) -> tuple[ClassLayout, dict[str, Any]]:
    """Write a submission of classes; labels are the most probable class, or those that reach their thresholds.

    Args:
        paths: where the clean tables are; of several labels, also the out-of-fold predictions of the ensemble, from
            all of which a threshold for each class is learned.
        predictions: table of the ensemble.
        part: file to write.
        fmt: "csv" or "parquet".

    Raises:
        DataError: a prediction is missing, twice, unknown, or no probability.
    """
    layout = read_class_layout(paths)
    ids = ids_of(layout)
    probability_NK = np.clip(predictions_in_order(predictions, ids, answers_of(layout.classes)), 0.0, 1.0)
    # as scores here take them: a 0 of the true class costs twice as much by Kaggle's log loss, which takes 1e-15 for it
    value_NV = np.clip(probability_NK[:, list(layout.of_values)], MIN_PROBABILITY, 1 - MIN_PROBABILITY)
    columns = {ids.name: ids, **dict(zip(layout.values, value_NV.T, strict=True))}
    facts: dict[str, Any] = {"sequences": len(ids)}
    if layout.label:
        thresholds_K, facts["labels"] = _thresholds(paths, predictions.parent.name, layout)
        columns[layout.label] = pl.Series(_labels(probability_NK, thresholds_K, layout))
    write_rows(pl.DataFrame(columns).select(layout.columns), part, fmt=fmt, decimals=DECIMALS)
    return layout, facts


def _thresholds(paths: Paths, name: str, layout: ClassLayout) -> tuple[np.ndarray | float, str]:
    """What a probability must reach, and in words how labels are chosen."""
    if not _needs_thresholds(layout):
        return 0.5, "the most probable class"
    tables = [paths.ensemble_dir(name) / "oof.parquet"]
    return _learn_thresholds(paths, layout.classes, told=_read_weights(paths, name), tables=tables)


def _learn_thresholds(
    paths: Paths, classes: Classes, *, told: Mapping[str, Any], tables: Sequence[Path]
) -> tuple[np.ndarray, str]:
    """[K] thresholds from all out-of-fold predictions, and the sentence that tells them."""
    which: dict[str, Any] = {"split": told["split"], "folds": told["folds"], "tables": tables}
    own = read_predicted(paths, name=", ".join(told["runs"]), classes=classes, **which)
    thresholds_K = class_scores.learn_thresholds(own.said_NK, own.truth())
    shown = ", ".join(f"{each} {limit:.3f}" for each, limit in zip(classes.names, thresholds_K, strict=True))
    return thresholds_K, f"classes from these thresholds on, learned on {len(own.ids):,} sequences out of fold: {shown}"


def thresholds_here(
    paths: Paths, classes: Classes, *, told: Mapping[str, Any], tables: Sequence[Path]
) -> tuple[np.ndarray | float, str]:
    """As of a submission, where the data and predictions to learn thresholds from are at hand; else 0.5.

    Args:
        paths: where the clean tables may be.
        classes: of the networks.
        told: ``split, folds, runs`` of what was predicted.
        tables: its out-of-fold predictions.

    Returns:
        [K] or 0.5, and the sentence that tells them and, of 0.5, why.
    """
    needed = [paths.clean("train"), paths.clean("classes"), paths.fold_table(told["split"]), *tables]
    why = "there are no out-of-fold predictions here to learn better ones"
    if all(path.is_file() for path in needed) and read_classes(paths).identity() == classes.identity():
        try:
            return _learn_thresholds(paths, classes, told=told, tables=tables)
        except DataError as err:  # the training data are others by now, or damaged: what is predicted is neither
            why = f"better ones cannot be learned here ({str(err).partition(' Next:')[0].rstrip('.')})"
    return 0.5, f"classes from a probability of 0.5 on: {why}"


def _labels(probability_NK: np.ndarray, thresholds: np.ndarray | float, layout: ClassLayout) -> list[str]:
    decided_NK = class_scores.decide(probability_NK, exclusive=layout.classes.exclusive, thresholds=thresholds)
    return joined_labels(decided_NK, layout.classes)


def joined_labels(decided_NK: np.ndarray, classes: Classes) -> list[str]:
    """The classes that each sequence is taken for, as a cell of a table."""
    names = np.array(classes.names, dtype=object)
    return [SEPARATOR.join(names[decided_K]) for decided_K in decided_NK]
