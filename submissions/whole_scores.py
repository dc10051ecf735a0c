"""Predictions of whole sequences, of classes or of numbers, read beside the truth and scored fold by fold.

Letters: N sequences, K answers to each: classes or numbers.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from pipeline.errors import DataError
from pipeline.paths import Paths
from pipeline.runlog import track, warn
from pipeline.tables import finite_values, out_of_fold, read_batches, read_fold_table
from submissions.breakdown import LENGTH_STEP, over_folds


@dataclass(frozen=True, kw_only=True)
class Answers:
    """How the truth and the predictions of a set are read."""

    known: str  #: column of the clean tables that tells the truth
    said: str  #: list column of predictions
    width: int  #: answers to each sequence
    truth: Callable[[pl.DataFrame], np.ndarray]  #: rows -> [N, K], NaN where nothing is known; all of it, if not scored
    check: Callable[[np.ndarray, pl.Series, str], None]  #: [N, K], their ids, where they are from -> DataError


@dataclass(frozen=True, kw_only=True)
class Predicted:
    """Scored sequences that have a prediction, in the order of their ids, and what was said of them."""

    ids: pl.Series
    sequences: pl.Series
    fold_N: np.ndarray
    truth_NK: np.ndarray
    said_NK: np.ndarray  #: float32
    counts: dict[str, int]  #: coverage: how many are in the folds, predicted, scored, without label
    missing: list[str]  #: ids of scored sequences without prediction

    def lengths(self) -> np.ndarray:
        """[N] int64 letters of each sequence."""
        return self.sequences.str.len_bytes().to_numpy().astype(np.int64)


def read_predicted(
    paths: Paths, answers: Answers, *, split: str, folds: Sequence[int], tables: Sequence[Path], name: str
) -> Predicted:
    """Out-of-fold predictions of one source beside the truth.

    Raises:
        DataError: predictions not out of fold, or of other data; or none of them is scored.
    """
    rows, truths, predictions, missing = [], [], [], list[str]()
    counts = {"in_folds": 0, "predicted": 0, "scored": 0, "without_label": 0}
    for batch in track(_batches(paths, answers, split, folds, {name: tables}), f"read {name}", unit="batches"):
        truth_NK = answers.truth(batch.rows)
        said_NK = batch.predictions[name].reshape(truth_NK.shape)
        answers.check(said_NK, batch.rows["sequence_id"], name)
        scored_N, lost_N = np.isfinite(truth_NK).any(axis=1), batch.missing[name]
        seen = {"in_folds": len(lost_N), "predicted": (~lost_N).sum(), "scored": scored_N.sum()}
        for kind, number in (seen | {"without_label": batch.rows[answers.known].null_count()}).items():
            counts[kind] += int(number)
        missing += batch.rows["sequence_id"].filter(pl.Series(scored_N & lost_N)).to_list()
        here_N = scored_N & ~lost_N
        rows.append(batch.rows.select("sequence_id", "sequence", "fold").filter(pl.Series(here_N)))
        truths.append(truth_NK[here_N])
        predictions.append(said_NK[here_N])
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
        said_NK=np.concatenate(predictions),
        counts=counts | {"scored_without_prediction": len(missing)},
        missing=missing,
    )


def _batches(
    paths: Paths, answers: Answers, split: str, folds: Sequence[int], sources: Mapping[str, Sequence[Path]]
) -> Any:
    return out_of_fold(
        paths.clean("train"),
        fold_table=paths.fold_table(split),
        folds=folds,
        sources=sources,
        targets=(answers.said,),
        columns=("scored", answers.known),
        width=answers.width,
    )


def floors_of(
    own: Predicted, paths: Paths, answers: Answers, *, split: str, predict: Callable[..., dict[str, np.ndarray]]
) -> dict[str, np.ndarray]:
    """Floors fitted on all scored sequences outside a fold, whether predicted or not, at the sequences of `own`.

    Args:
        own: gives the sequences.
        paths: where the clean tables and the fold table are.
        answers: how the truth is read.
        split: name of the fold table.
        predict: n sequences, [n, K] truth, [n] fold and [n] cluster of each -> floor -> [n, K].
    """
    table = read_fold_table(paths.fold_table(split), ["sequence_id", "fold", "cluster"])
    folds = table["fold"].unique().sort().to_list()
    rows = pl.concat([batch.rows for batch in _batches(paths, answers, split, folds, {})])
    rows = rows.join(table.drop("fold"), on="sequence_id", how="left", maintain_order="left", validate="1:1")
    truth_NK = answers.truth(rows)
    scored_N = np.isfinite(truth_NK).any(axis=1)
    rows = rows.filter(pl.Series(scored_N))
    here_N = rows["sequence_id"].is_in(own.ids.to_list()).to_numpy()
    fold_N, cluster_N = (rows[name].to_numpy() for name in ("fold", "cluster"))
    found = predict(rows["sequence"].to_list(), truth_NK[scored_N], fold_N, cluster_N)
    return {name: values_NK[here_N] for name, values_NK in found.items()}


def has_test_truth(paths: Paths, targets: Sequence[str]) -> bool:
    """Whether the classes or numbers of test sequences, or the values of their nucleotides, are known."""
    if not paths.clean("test").is_file():
        return False
    known = pl.selectors.by_name("labels", "numbers", *targets, require_all=False)
    return any(column.count() for column in pl.scan_parquet(paths.clean("test")).select(known).collect())


def read_test(paths: Paths, answers: Answers, predictions: Path) -> tuple[np.ndarray, np.ndarray]:
    """[N, K] predictions and [N, K] truth of the test sequences whose truth is known.

    Raises:
        DataError: one of them has no prediction, or none of this kind.
    """
    known = pl.read_parquet(paths.clean("test")).filter(pl.col(answers.known).is_not_null()).with_columns(scored=True)
    said = pl.concat(list(read_batches(predictions, ["sequence_id", answers.said])))
    table = known.join(said, on="sequence_id", how="left", maintain_order="left", validate="1:1", suffix="_said")
    column = f"{answers.said}_said" if answers.said == answers.known else answers.said
    if table[column].null_count():
        raise DataError(f"{predictions}: not of this test set. Next: make predict, then make ensemble.")
    said_NK = dense(table.select("sequence_id", pl.col(column).alias(answers.said)), answers, where=str(predictions))
    return said_NK, answers.truth(table)


def dense(table: pl.DataFrame, answers: Answers, *, where: str) -> np.ndarray:
    """[N, K] float32 predictions of a table that has one for every row.

    Raises:
        DataError: one has another length, is not finite, or is none of this kind.
    """
    lengths_N = np.full(table.height, answers.width)
    said_NK = finite_values(table, lengths_N, targets=(answers.said,), where=where).reshape(-1, answers.width)
    answers.check(said_NK, table["sequence_id"], where)
    return said_NK


def warn_missing(own: Predicted, name: str) -> None:
    """Say that scored sequences have no prediction."""
    if own.missing:
        some = ", ".join(own.missing[:3]) + (" …" if len(own.missing) > 3 else "")
        warn(
            f"evaluate: {len(own.missing):,} scored sequences have no prediction of {name}: {some}; the score is of "
            "the others, and scores.json lists them"
        )


def summarise(own: Predicted, score: Callable[[np.ndarray], dict[str, Any]]) -> dict[str, Any]:
    """Scores of all sequences and of every fold; mean and deviation over the folds.

    Args:
        own: gives the folds.
        score: [N] bool -> ``score`` and others of these sequences.
    """
    by_fold = [{"fold": int(fold)} | score(own.fold_N == fold) for fold in np.unique(own.fold_N)]
    whole = score(np.ones(len(own.fold_N), dtype=bool))
    return whole | {"per_fold": by_fold} | over_folds([row["score"] for row in by_fold])


def by_length(own: Predicted, score: Callable[[np.ndarray], dict[str, Any]]) -> list[dict[str, Any]]:
    """The same of sequences of like length: rows with a ``label`` such as "100-149", and how many there are."""
    from_N = own.lengths() - own.lengths() % LENGTH_STEP
    return [
        {"label": f"{low}-{low + LENGTH_STEP - 1}", "sequences": int((from_N == low).sum())} | score(from_N == low)
        for low in np.unique(from_N)
    ]
