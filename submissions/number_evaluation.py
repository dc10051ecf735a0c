"""Scores of predicted numbers over whole sets, with their parts, beside floors fitted on the other folds.

Letters: N sequences, C columns of numbers.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from rich.markup import escape
from rich.table import Table

from pipeline.competitions.base import Competition
from pipeline.labels import read_numbers
from pipeline.paths import Paths
from pipeline.tables import OofBatch, numbers_that_count
from submissions import number_scores
from submissions.number_floors import predict_floors
from submissions.number_scores import tell
from submissions.paired import Paired
from submissions.whole_scores import (
    Answers,
    Predicted,
    by_length,
    floors_of,
    read_predicted,
    read_test,
    summarise,
    warn_missing,
)

#: Most columns that the terminal lists.
_SHOWN = 30


def answers_of(competition: Competition) -> Answers:
    """How measured and predicted numbers are read."""
    width = len(competition.targets)
    return Answers(
        known="numbers",
        said="numbers",
        width=width,
        truth=partial(numbers_that_count, width=width),
        check=lambda said_NC, ids, where: None,  # whatever is finite is a number
    )


def evaluate_numbers(
    paths: Paths, *, competition: Competition, split: str, folds: Sequence[int], sources: Mapping[str, Sequence[Path]]
) -> dict[str, Any]:
    """Score out-of-fold predictions of numbers, as `submissions.value_scores.evaluate_values` does values.

    ``paired`` is there of a single source, too: it compares the floors as well.

    Raises:
        DataError: see `read_predicted`.
    """
    answers = answers_of(competition)
    first, *rest = sources
    read = {
        name: read_predicted(paths, answers, split=split, folds=folds, tables=tables, name=name)
        for name, tables in sources.items()
    }
    own = read[first]
    warn_missing(own, first)
    others = {name: _summary(read[name], read[name].said_NK, competition) for name in rest}
    best = min(others, key=lambda name: others[name]["score"], default=first)
    predict = partial(predict_floors, numbers=read_numbers(paths))
    found = floors_of(own, paths, answers, split=split, predict=predict)
    # as float32, like all predictions: ridge is to differ from the run `words` by nothing
    said = {floor: said_NC.astype(np.float32) for floor, said_NC in found.items()}
    floors = {floor: _summary(own, said_NC, competition) for floor, said_NC in said.items()}
    compared = {name: read[name] for name in ([first, *rest] if len(rest) > 1 else [best])}
    differences = _differences(paths.fold_table(split), own, compared, said, competition, best=best)
    for floor, told in floors.items():
        told |= {"difference": differences.pop(floor), "per_column": _per_column(own, said[floor], competition)}
    summary = _summary(own, own.said_NK, competition)
    return {
        **summary,
        "columns": list(summary["per_target"]),
        "numbers": list(competition.targets),
        "per_column": _per_column(own, own.said_NK, competition),
        "by_length": by_length(own, lambda here_N: _scores(own.said_NK[here_N], own.truth_NK[here_N], competition)),
        "sequences": own.counts,
        "without_prediction": own.missing,
        "paired": {"best": best, "differences": differences},
        "others": others,
        "floors": {floor: told["score"] for floor, told in floors.items()},
        "floor_details": floors,
        "floor_notes": [],
    }


def _differences(
    fold_table: Path,
    own: Predicted,
    compared: Mapping[str, Predicted],
    floors: Mapping[str, np.ndarray],
    competition: Competition,
    *,
    best: str,
) -> dict[str, dict[str, float]]:
    """Scores of some sources and of the floors, less that of one, on the sequences that all of them predict."""
    ids = pl.DataFrame({"sequence_id": own.ids})
    predictions, missing = dict(floors), {floor: np.zeros(len(own.ids), dtype=bool) for floor in floors}
    for name, source in compared.items():
        places = pl.DataFrame({"sequence_id": source.ids, "place": np.arange(len(source.ids))})
        place_N = ids.join(places, on="sequence_id", how="left", maintain_order="left", validate="1:1")["place"]
        missing[name] = place_N.is_null().to_numpy()
        predictions[name] = source.said_NK[place_N.fill_null(0).to_numpy()]
    paired = Paired(competition, fold_table, list(predictions))
    ones_N = np.ones(len(own.ids), dtype=np.int64)
    paired.add(OofBatch(rows=ids, lengths_N=ones_N, predictions=predictions, missing=missing), own.truth_NK)
    return paired.differences(best)


def _summary(own: Predicted, said_NC: np.ndarray, competition: Competition) -> dict[str, Any]:
    """The metric and `number_scores.in_short` of all sequences and of every fold; mean and deviation over the folds."""
    return summarise(own, lambda here_N: _scores(said_NC[here_N], own.truth_NK[here_N], competition))


def _scores(said_NC: np.ndarray, truth_NC: np.ndarray, competition: Competition) -> dict[str, Any]:
    assert competition.error_sums is not None
    assert competition.score is not None
    score = competition.score(*competition.error_sums(said_NC, truth_NC))
    return {
        "score": float(score),
        "per_target": number_scores.in_short(said_NC, truth_NC),
        "scored": int(np.isfinite(truth_NC).any(axis=1).sum()),
    }


def _per_column(own: Predicted, said_NC: np.ndarray, competition: Competition) -> list[dict[str, Any]]:
    rows = number_scores.each_column(said_NC, own.truth_NK)
    return [{"column": name} | row for name, row in zip(competition.targets, rows, strict=True)]


def evaluate_test(paths: Paths, *, competition: Competition, predictions: Path) -> dict[str, Any]:
    """Score the test sequences whose numbers are known, as a fold; nothing else reads these.

    Raises:
        DataError: a test sequence has no prediction, or none of these columns.
    """
    return _scores(*read_test(paths, answers_of(competition), predictions), competition)


def describe(facts: Mapping[str, Any]) -> Table | None:
    """Every column's scores as a table for the terminal; None of a single column, which the rest tells all of."""
    if len(facts["per_column"]) == 1:
        return None
    best = min(facts["floors"], key=lambda floor: facts["floors"][floor])
    floors = {row["column"]: row["RMSE"] for row in facts["floor_details"][best]["per_column"]}
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column("column", overflow="fold")
    for name in ("measured", *number_scores.SCORES, f"RMSE of {best}"):
        table.add_column(name, justify="right")
    for row in facts["per_column"][:_SHOWN]:
        cells = [tell(row[name], name) for name in number_scores.SCORES]
        table.add_row(escape(row["column"]), f"{row['measured']:,}", *cells, tell(floors[row["column"]]))
    if len(facts["per_column"]) > _SHOWN:
        table.caption = f"The first {_SHOWN} of {len(facts['per_column'])}; scores.json and the report have them all."
    return table
