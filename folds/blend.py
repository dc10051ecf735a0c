"""A weighted mean of values, numbers or probabilities over folds and runs, its weights learned out of fold.

The test prediction of a run is the mean of its folds; the ensemble is a weighted mean of its runs, one set of weights
for each target. Its out-of-fold table is cross-fitted: a fold is joined with weights learned on the other folds, so
its score is not flattered by the learning.

Letters: T positions (of classes: every class of every sequence; of numbers: sequences), C targets, M runs, F folds,
K = M·F tables.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq

from folds.job import Job, list_missing
from folds.weights import Weights, learn_mixture, learn_weights
from pipeline.errors import DataError
from pipeline.labels import MIN_PROBABILITY
from pipeline.runlog import Bar
from pipeline.stage import write_json
from pipeline.tables import OofBatch, as_lists, finite_values, open_parquet, read_batches

#: Positions a target from which weights are learned; longer data are thinned evenly, whole sequences at a time.
#: Memory of the learning: 400,000 x runs x 20 bytes, 80 MiB for ten runs.
SAMPLE_POSITIONS = 400_000


class _Totals:
    """(sum, count) of the metric's errors, fold by fold."""

    def __init__(self, job: Job) -> None:
        self.competition, self.folds = job.scoring, job.folds
        self.sums_FC = np.zeros((len(job.folds), len(job.scoring.targets)))
        self.counts_FC = np.zeros_like(self.sums_FC)

    def add(self, prediction_TC: np.ndarray, truth_TC: np.ndarray, fold_T: np.ndarray) -> None:
        assert self.competition.error_sums is not None
        for place, fold in enumerate(self.folds):
            here_T = fold_T == fold
            if here_T.any():
                sums_C, counts_C = self.competition.error_sums(prediction_TC[here_T], truth_TC[here_T])
                self.sums_FC[place] += sums_C
                self.counts_FC[place] += counts_C

    def score(self, *, without: int | None = None) -> float:
        """Of all folds together, or of all but the one at a place."""
        assert self.competition.score is not None
        kept_F = np.arange(len(self.folds)) != without
        return float(self.competition.score(self.sums_FC[kept_F].sum(axis=0), self.counts_FC[kept_F].sum(axis=0)))

    def named(self) -> dict[str, Any]:
        """``score`` and ``per_target``, which may itself be called score."""
        errors_C = self.competition.target_errors(self.sums_FC.sum(axis=0), self.counts_FC.sum(axis=0))
        told_C = [None if np.isnan(error) else float(error) for error in errors_C]  # a number nowhere measured
        return {"score": self.score(), "per_target": dict(zip(self.competition.targets, told_C, strict=True))}


@dataclass(frozen=True, kw_only=True)
class _Sample:
    """Positions from which weights are learned."""

    predictions_TMC: np.ndarray
    truth_TC: np.ndarray
    fold_T: np.ndarray
    stride: int  #: every so many scored sequences were taken


def blend(job: Job, parts: dict[str, Path]) -> dict[str, Any]:
    """Write the ensemble's tables and ``weights.json``; returns what the latter holds.

    Used is whichever scores best out of fold: learned weights (as cross-fitted), the plain mean, or the best run alone.
    As that choice is made on the score that is told, ``score_nested`` is told beside it: for each fold, the choice that
    the other folds make. Without a test set, `parts` has no ``test``.

    Raises:
        DataError: see `pipeline.tables.out_of_fold`; test tables with different rows; nothing to score.
    """
    sample, totals, missing = _survey(job)
    singles = {each: totals[each].score() for each in job.runs}
    best = min(singles, key=lambda each: singles[each])
    options = {"mean": _uniform(job), f"run {best}": _only(job, best)}
    scores = {"mean": totals["mean"].score(), f"run {best}": singles[best]}
    choices = list(totals.values())
    facts = job.facts() | {"missing": missing, "learned": None}
    if len(job.runs) > 1 and len(job.folds) > 1:
        final_CM, crossed, gap = _learn(job, sample)
        options["learned"] = crossed | {None: final_CM}
        in_sample, cross_fitted = _score_weights(job, [dict.fromkeys([*job.folds, None], final_CM), options["learned"]])
        scores["learned"] = cross_fitted.score()
        choices.append(cross_fitted)
        facts["learned"] = {
            "weights": _named(job, final_CM),
            "score_in_sample": in_sample.score(),
            "score_cross_fitted": cross_fitted.score(),
            "optimality_gap": gap,
            "sample_positions": len(sample.truth_TC),
            "every_nth_sequence": sample.stride,
        }
    chosen = f"run {best}" if len(job.runs) == 1 else min(scores, key=lambda option: scores[option])
    facts |= {
        "chosen": chosen,
        "score": scores[chosen],
        "score_nested": _nested(job, choices) if len(job.runs) > 1 else None,
        "weights": _named(job, options[chosen][None]),
        "run_scores": {each: totals[each].named() for each in job.runs},
        "mean_score": totals["mean"].named(),
    }
    facts["oof_rows"] = _write_oof(job, options[chosen], parts["oof"])
    facts["test_rows"] = _write_test(job, options[chosen][None], parts["test"]) if "test" in parts else 0
    write_json(parts["weights"], facts)
    return facts


def _nested(job: Job, choices: Sequence[_Totals]) -> float | None:
    """Score of the best choice, made for each fold on the others; None where a fold alone says nothing of a target.

    The learned weights that are chosen among were cross-fitted once: those for another fold knew this one.
    """
    if len(job.folds) < 2 or not all((each.counts_FC > 0).all() for each in choices):
        return None
    nested = _Totals(job)
    for place in range(len(job.folds)):
        best = min(choices, key=lambda each: each.score(without=place))
        nested.sums_FC[place], nested.counts_FC[place] = best.sums_FC[place], best.counts_FC[place]
    return nested.score()


def blend_test(job: Job, weights: Mapping[str, Mapping[str, float]], parts: dict[str, Path]) -> dict[str, Any]:
    """Write the test table alone, with weights that were learned before: target -> run -> weight."""
    weights_CM = np.array([[weights[target][each] for each in job.runs] for target in job.scoring.targets])
    return job.facts() | {"test_rows": _write_test(job, weights_CM, parts["test"])}


def _survey(job: Job) -> tuple[_Sample, dict[str, _Totals], dict[str, Any]]:
    """One pass over the out-of-fold tables: scores of every run and of the mean, and the sample to learn from."""
    stride = _stride(job)
    totals = {each: _Totals(job) for each in (*job.runs, "mean")}
    missing: dict[str, list[str]] = {each: [] for each in job.runs}
    drawn: list[tuple[np.ndarray, np.ndarray, np.ndarray]] = []
    seen = 0
    for batch in job.batches(truth=True, label="out of fold"):
        for each in job.runs:
            missing[each] += batch.rows["sequence_id"].filter(pl.Series(batch.missing[each])).to_list()
        stacked_TMC = np.stack([batch.predictions[each] for each in job.runs], axis=1)
        truth_TC = job.truth(batch)
        there_T = np.isfinite(stacked_TMC[:, :, 0]).all(axis=1) & np.isfinite(truth_TC).any(axis=1)
        fold_T = batch.spread(batch.rows["fold"].to_numpy())
        scored_N = batch.rows["scored"].to_numpy()
        turn_N = seen + np.cumsum(scored_N) - 1
        seen += int(scored_N.sum())
        drawn_T = there_T & batch.spread(scored_N & (turn_N % stride == 0))
        drawn.append((stacked_TMC[drawn_T], truth_TC[drawn_T], fold_T[drawn_T]))
        stacked_TMC, truth_TC, fold_T = stacked_TMC[there_T], truth_TC[there_T], fold_T[there_T]
        for place, each in enumerate(job.runs):
            totals[each].add(stacked_TMC[:, place], truth_TC, fold_T)
        totals["mean"].add(stacked_TMC.mean(axis=1), truth_TC, fold_T)
    predictions_TMC, truth_TC, fold_T = (np.concatenate(arrays) for arrays in zip(*drawn, strict=True))
    if not len(truth_TC):
        raise DataError(
            f"ensemble: no scored position has predictions of {', '.join(job.runs)}; expected out-of-fold predictions "
            "of scored sequences. Next: see that data and predictions belong together."
        )
    sample = _Sample(predictions_TMC=predictions_TMC, truth_TC=truth_TC, fold_T=fold_T, stride=stride)
    return sample, totals, list_missing(missing)


def _stride(job: Job) -> int:
    values = pl.lit(job.width) * pl.len() if job.width else pl.col("sequence").str.len_bytes().cast(pl.Int64).sum()
    scored = pl.scan_parquet(job.paths.clean("train")).filter("scored").select(values).collect().item()
    return max(1, -(-int(scored) // SAMPLE_POSITIONS))


_FoldWeights = dict[int | None, np.ndarray]  #: fold -> [C, M] for out-of-fold predictions, None -> [C, M] for the test


def _uniform(job: Job) -> _FoldWeights:
    weights_CM = np.full((len(job.scoring.targets), len(job.runs)), 1.0 / len(job.runs))
    return dict.fromkeys([*job.folds, None], weights_CM)


def _only(job: Job, each: str) -> _FoldWeights:
    weights_CM = np.zeros((len(job.scoring.targets), len(job.runs)))
    weights_CM[:, job.runs.index(each)] = 1.0
    return dict.fromkeys([*job.folds, None], weights_CM)


def _named(job: Job, weights_CM: np.ndarray) -> dict[str, dict[str, float]]:
    return {
        target: {each: round(float(weight), 6) for each, weight in zip(job.runs, weights_M, strict=True)}
        for target, weights_M in zip(job.scoring.targets, weights_CM, strict=True)
    }


def _learn(job: Job, sample: _Sample) -> tuple[np.ndarray, _FoldWeights, float]:
    """Weights from all folds, weights for each fold from the others, and the largest optimality gap of the former."""

    def fit(here_T: np.ndarray) -> tuple[np.ndarray, float]:
        places = range(sample.truth_TC.shape[1])
        fits = [_fit(job, sample.predictions_TMC[here_T, :, at], sample.truth_TC[here_T, at]) for at in places]
        return np.stack([each.values_M for each in fits]), max(each.gap for each in fits)

    final_CM, gap = fit(np.ones(len(sample.truth_TC), dtype=bool))
    crossed: _FoldWeights = {}
    for fold in job.folds:
        others_T = sample.fold_T != fold
        crossed[fold] = fit(others_T)[0] if others_T.any() else _uniform(job)[None]
    return final_CM, crossed, gap


def _fit(job: Job, predictions_TM: np.ndarray, truth_T: np.ndarray) -> Weights:
    """Weights with the least error of one target; equal ones where it was not measured."""
    measured_T = np.isfinite(truth_T)
    predictions_TM, truth_T = predictions_TM[measured_T], truth_T[measured_T]
    if not len(truth_T):
        return Weights(values_M=np.full(len(job.runs), 1.0 / len(job.runs)), loss=0.0, gap=0.0)
    if job.classes is None:
        low, high = job.scoring.target_range or (-np.inf, np.inf)
        truth_T = np.clip(truth_T, low, high)
        unit = truth_T.std() or 1.0 if job.competition.is_own else 1.0  # theirs may be thousands or thousandths
        return learn_weights(predictions_TM / unit, truth_T / unit, power=job.scoring.error_power)
    true_T = truth_T > 0.5
    right_TM = np.where(true_T[:, None], predictions_TM, 1.0 - predictions_TM)
    return learn_mixture(np.clip(right_TM[true_T] if job.classes.exclusive else right_TM, MIN_PROBABILITY, 1.0))


def _combine(job: Job, batch: OofBatch, weights: _FoldWeights) -> np.ndarray:
    """[T, C] float32: weighted mean of the runs; NaN where one of them has no prediction."""
    weights_FCM = np.stack([weights[fold] for fold in job.folds])
    place_T = batch.spread(np.searchsorted(job.folds, batch.rows["fold"].to_numpy()))
    mean_TC = np.zeros((len(place_T), len(job.scoring.targets)))
    for place, each in enumerate(job.runs):
        mean_TC += weights_FCM[place_T, :, place] * batch.predictions[each]
    return mean_TC.astype(np.float32)


def _score_weights(job: Job, candidates: Sequence[_FoldWeights]) -> list[_Totals]:
    totals = [_Totals(job) for _ in candidates]
    for batch in job.batches(truth=True, label="score weights"):
        truth_TC, fold_T = job.truth(batch), batch.spread(batch.rows["fold"].to_numpy())
        for total, weights in zip(totals, candidates, strict=True):
            mean_TC = _combine(job, batch, weights)
            there_T = np.isfinite(mean_TC[:, 0]) & np.isfinite(truth_TC).any(axis=1)
            total.add(mean_TC[there_T], truth_TC[there_T], fold_T[there_T])
    return totals


def _open_writer(path: Path, targets: Sequence[str], *, fold: bool) -> pq.ParquetWriter:
    fields = [("sequence_id", pa.string()), *([("fold", pa.uint8())] if fold else [])]
    schema = pa.schema([*fields, *((target, pa.list_(pa.float32())) for target in targets)])
    return pq.ParquetWriter(path, schema, compression="zstd", write_page_checksum=True)


def _write_oof(job: Job, weights: _FoldWeights, path: Path) -> int:
    """Write the cross-fitted out-of-fold table; returns its rows."""
    written = 0
    with _open_writer(path, job.columns, fold=True) as writer:
        for batch in job.batches(label="write oof"):
            mean_TC = _combine(job, batch, weights)
            keep_N = ~np.any([batch.missing[each] for each in job.runs], axis=0)
            mean_TC = mean_TC[batch.spread(keep_N)]
            rows = batch.rows.filter(pl.Series(keep_N))
            keys = [pa.array(rows["sequence_id"].to_list(), pa.string()), pa.array(rows["fold"].to_numpy(), pa.uint8())]
            lists = _lists(job, mean_TC, batch.lengths_N[keep_N])
            if rows.height:
                writer.write_table(pa.Table.from_arrays([*keys, *lists], schema=writer.schema))
            written += rows.height
    return written


def _lists(job: Job, values_TC: np.ndarray, lengths_N: np.ndarray) -> list[pa.Array]:
    """Columns of a prediction table: a list for each target, or, of numbers, one of all."""
    if job.competition.task == "numbers":
        return [as_lists(values_TC.reshape(-1), np.full(len(values_TC), values_TC.shape[1]))]
    return [as_lists(values_TC[:, place], lengths_N) for place in range(values_TC.shape[1])]


def _write_test(job: Job, weights_CM: np.ndarray, path: Path) -> int:
    """Write the test table, in the order that all test tables share; returns its rows."""
    columns, written = job.columns, 0
    tables = [job.paths.test(each, fold) for each in job.runs for fold in job.folds]
    weights_KC = np.repeat(weights_CM.T / len(job.folds), len(job.folds), axis=0)  # K tables, runs before folds
    with open_parquet(tables[0]) as first_table:
        total = first_table.metadata.num_rows
    streams = [read_batches(table, ["sequence_id", *columns]) for table in tables]
    with _open_writer(path, columns, fold=False) as writer, Bar("write test", total=total, unit="sequences") as bar:
        while (first := next(streams[0], None)) is not None:
            others = [_same_rows(stream, first, tables[0], table) for stream, table in _rest(streams, tables)]
            lengths_N = first[columns[0]].list.len().fill_null(0).to_numpy().astype(np.int64)
            if job.width:
                lengths_N = np.full(first.height, job.width)
            mean_TC = np.zeros(int(lengths_N.sum()) * len(columns)).reshape(-1, weights_KC.shape[1])
            for batch, table, weights_C in zip([first, *others], tables, weights_KC, strict=True):
                where = str(table)
                values_TC = finite_values(batch, lengths_N, targets=columns, where=where)
                job.check(values_TC, batch["sequence_id"], where=where)
                mean_TC += weights_C * values_TC.reshape(mean_TC.shape)
            lists = _lists(job, mean_TC, lengths_N)
            keys = pa.array(first["sequence_id"].to_list(), pa.string())
            writer.write_table(pa.Table.from_arrays([keys, *lists], schema=writer.schema))
            written += first.height
            bar.advance(first.height)
        for stream, table in _rest(streams, tables):
            if next(stream, None) is not None:
                raise _other_rows(tables[0], table, f"more than {written:,} rows")
    return written


def _rest(
    streams: Sequence[Iterator[pl.DataFrame]], tables: Sequence[Path]
) -> Iterator[tuple[Iterator[pl.DataFrame], Path]]:
    return zip(streams[1:], tables[1:], strict=True)


def _same_rows(stream: Iterator[pl.DataFrame], first: pl.DataFrame, wanted: Path, table: Path) -> pl.DataFrame:
    batch = next(stream, None)
    if batch is None or batch.height != first.height:
        raise _other_rows(wanted, table, "fewer or more rows")
    differs = first["sequence_id"] != batch["sequence_id"]
    if differs.any():
        at = int(differs.arg_max() or 0)
        raise _other_rows(wanted, table, f"{batch['sequence_id'][at]!r} where it has {first['sequence_id'][at]!r}")
    return batch


def _other_rows(wanted: Path, table: Path, got: str) -> DataError:
    return DataError(
        f"{table}: got {got}; expected the same sequences in the same order as in {wanted}. Next: make predict for "
        "the fold that is older than the data."
    )
