"""The rows of a submission of classes: probabilities, labels or both, in the order that is asked for."""

from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq

from pipeline.errors import DataError
from pipeline.paths import Paths
from pipeline.stage import read_result
from pipeline.tables import check_probabilities, finite_values, read_batches
from submissions import class_scores
from submissions.class_evaluation import read_predicted
from submissions.class_layout import SEPARATOR, ClassLayout, read_class_layout

#: Decimals of a probability in a CSV.
DECIMALS = 6


def class_inputs(paths: Paths, name: str) -> dict[str, Path]:
    """Files that a submission of an ensemble is made from, beside its predictions and the test set.

    Raises:
        DataError: there is no test set, or the sample submission does not fit it.
    """
    inputs = {"classes": paths.clean("classes")}
    if paths.clean("sample").is_file():
        inputs["sample"] = paths.clean("sample")
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
    (key,) = layout.keys.names
    ids = pl.Series(key, layout.keys.block(0, layout.keys.rows)[key])
    probability_NK = _in_order(predictions, ids, layout)
    columns = {key: ids, **dict(zip(layout.values, probability_NK[:, list(layout.of_values)].T, strict=True))}
    facts: dict[str, Any] = {"sequences": len(ids)}
    if layout.label:
        thresholds_K, facts["labels"] = _thresholds(paths, predictions.parent.name, layout)
        columns[layout.label] = pl.Series(_labels(probability_NK, thresholds_K, layout))
    table = pl.DataFrame(columns).select(layout.columns)
    if fmt == "csv":
        table.write_csv(part, float_precision=DECIMALS)
    else:
        pq.write_table(table.to_arrow(), part, compression="zstd", write_page_checksum=True)
    return layout, facts


def _in_order(predictions: Path, ids: pl.Series, layout: ClassLayout) -> np.ndarray:
    """[N, K] float32 probabilities of the sequences of a submission."""
    again = "Next: make predict, then make ensemble."
    table = pl.concat(list(read_batches(predictions, ["sequence_id", "probabilities"])))
    twice = table.filter(pl.col("sequence_id").is_duplicated())["sequence_id"]
    unknown = table.filter(~pl.col("sequence_id").is_in(ids.to_list()))["sequence_id"]
    for these, what in ((twice, "is predicted twice"), (unknown, "is not among the test sequences")):
        if these.len():
            raise DataError(f"{predictions}: {these[0]!r} {what}; expected each test sequence once. {again}")
    table = pl.DataFrame({"sequence_id": ids}).join(table, on="sequence_id", how="left", maintain_order="left")
    lost = table.filter(pl.col("probabilities").is_null())["sequence_id"]
    if lost.len():
        some = ", ".join(lost.head(3).to_list())
        raise DataError(
            f"{predictions}: no prediction of {some} ({lost.len():,} of {len(ids):,} test sequences); expected all. "
            f"{again}"
        )
    width, where = len(layout.classes.names), str(predictions)
    lengths_N, none_N = np.full(len(ids), width), np.zeros(len(ids), dtype=bool)
    flat_T1 = finite_values(table, lengths_N, targets=("probabilities",), missing_N=none_N, where=where)
    probability_NK = flat_T1.reshape(-1, width)
    check_probabilities(probability_NK, ids, exclusive=layout.classes.exclusive, where=where)
    return np.clip(probability_NK, 0.0, 1.0)


def _thresholds(paths: Paths, name: str, layout: ClassLayout) -> tuple[np.ndarray | float, str]:
    """What a probability must reach, and in words how labels are chosen."""
    if not _needs_thresholds(layout):
        return 0.5, "the most probable class"
    told = _read_weights(paths, name)
    own = read_predicted(
        paths, split=told["split"], folds=told["folds"], tables=[paths.ensemble_dir(name) / "oof.parquet"], name=name,
        classes=layout.classes,
    )  # fmt: skip
    thresholds_K = class_scores.learn_thresholds(own.probability_NK, own.truth_NK)
    shown = ", ".join(f"{each} {limit:.3f}" for each, limit in zip(layout.classes.names, thresholds_K, strict=True))
    return thresholds_K, f"classes from these thresholds on, learned on {len(own.ids):,} sequences out of fold: {shown}"


def _labels(probability_NK: np.ndarray, thresholds: np.ndarray | float, layout: ClassLayout) -> list[str]:
    decided_NK = class_scores.decide(probability_NK, exclusive=layout.classes.exclusive, thresholds=thresholds)
    names = np.array(layout.classes.names, dtype=object)
    return [SEPARATOR.join(names[decided_K]) for decided_K in decided_NK]
