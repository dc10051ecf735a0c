"""Which five structures are submitted, when several checkpoints, templates and assemblies offer more.

The policy: what a source says of its candidates is turned into an expected TM-score, learned from its out-of-fold
candidates; the best goes first; then, one after the other, what promises most of that which is unlike those taken. How
much likeness costs is the most that does no harm out of fold.

Letters: M candidates of one sequence, N of all, F features, L length (nt), 3 xyz. Lengths in Å.
"""

import json
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq

from folds.job import Job, list_missing
from pipeline.competitions.rna3d import CANDIDATES, read_teaching
from pipeline.errors import DataError
from pipeline.structure.geometry import similarity
from pipeline.tables import read_batches

#: (predicted, known) traces -> TM-score of each pair; the roof hands in `submissions.tm_score.tm_scores`.
Scorer = Callable[[Sequence[tuple[np.ndarray, np.ndarray]]], np.ndarray]

_COLUMNS = ("sequence_id", "candidate", "confidence", "x", "y", "z")
#: What being a copy of a candidate already taken costs, in TM-score, and the one that is used where nothing is known.
_NOVELTIES, _NOVELTY = (0.0, 0.05, 0.1, 0.2, 0.4), 0.1
_AS_GOOD = 0.001  # TM-score: of what is as good out of fold, the most different five are taken
_COPY = 0.98  # likeness from which a candidate is a copy: taken only where there is nothing else
_PENALTY = 1e-2  # of the regression, per target


def choose_candidates(
    tables: Mapping[str, pl.DataFrame],
    *,
    keep: int = CANDIDATES,
    weights: Mapping[str, Sequence[float]] | None = None,
    novelty: float = _NOVELTY,
) -> pl.DataFrame:
    """Of all candidates of a sequence, the one with the highest expected score, then what is good and new.

    Coordinates of different models have no common frame, so they are chosen and never averaged.

    Args:
        tables: source (a run, or one fold of it) -> table with ``sequence_id, candidate, confidence, x, y, z`` and
            whatever belongs to a candidate; unique in (sequence_id, candidate).
        keep: candidates of each sequence at most.
        weights: source -> weights of its regression, from which the confidence becomes the expected TM-score; None
            takes the confidence as it is.
        novelty: what being a copy of a candidate already taken costs, in TM-score.

    Returns:
        The columns of the tables and ``source``, candidates renumbered from 1, the most confident first, sorted by
        (sequence_id, candidate).
    """
    parts = []
    for place, (source, table) in enumerate(tables.items()):
        if weights is not None:
            table = table.with_columns(pl.Series("confidence", _features(table) @ np.array(weights[source])))
            table = table.with_columns(pl.col("confidence").clip(0.0, 1.0))
        parts.append(table.with_columns(pl.lit(source).alias("source"), pl.lit(place).alias("_place")))
    pooled = pl.concat(parts).sort("sequence_id", "_place", "candidate").drop("_place")
    if not pooled.height:
        raise DataError(f"ensemble: no candidate in any of {', '.join(tables)}. Next: make predict.")
    taken: list[int] = []
    numbers: list[int] = []
    for rows in pooled.with_row_index("_row").partition_by("sequence_id", maintain_order=True):
        expected_M = rows["confidence"].cast(pl.Float64).to_numpy()
        chosen = _take(expected_M, similarity(_traces(rows)), keep=keep, novelty=novelty)
        chosen.sort(key=lambda m, expected_M=expected_M: (-expected_M[m], m))  # type: ignore[misc]
        taken += rows["_row"].gather(chosen).to_list()
        numbers += range(1, len(chosen) + 1)
    return pooled[taken].with_columns(pl.Series("candidate", numbers, dtype=pl.UInt8))


def _take(expected_M: np.ndarray, alike_MM: np.ndarray, *, keep: int, novelty: float) -> list[int]:
    """Places in the order of choice."""
    chosen = [int(np.argmax(expected_M))]
    while len(chosen) < min(keep, len(expected_M)):
        alike_M = alike_MM[:, chosen].max(axis=1)
        worth_M = expected_M - novelty * alike_M - (alike_M > _COPY)  # a copy comes after everything else
        worth_M[chosen] = -np.inf
        chosen.append(int(np.argmax(worth_M)))
    return chosen


def _traces(rows: pl.DataFrame) -> list[np.ndarray]:
    return [np.array(axes, dtype=np.float64).T for axes in rows.select("x", "y", "z").iter_rows()]


def _features(table: pl.DataFrame) -> np.ndarray:
    """[N, F] what a source's expected TM-score is computed from: its confidence and, of short sequences, the length."""
    confidence_N = table["confidence"].cast(pl.Float64).to_numpy()
    log_N = np.log(table["x"].list.len().cast(pl.Float64).clip(15.0, 60.0).to_numpy() / 60.0)
    return np.stack([np.ones(len(log_N)), confidence_N, log_N, confidence_N * log_N], axis=1)


def _fit(table: pl.DataFrame, tm_N: np.ndarray) -> list[float]:
    """Ridge regression of the TM-score; a confidence that says nothing leaves the mean."""
    features_NF = _features(table)
    spread_F = features_NF.std(axis=0)
    spread_F = np.where(spread_F > 1e-9, spread_F, np.inf)
    spread_F[0] = 1.0
    scaled_NF = features_NF / spread_F
    penalty_F = np.full(len(spread_F), _PENALTY * len(tm_N))
    penalty_F[0] = 0.0
    weights_F = np.linalg.solve(scaled_NF.T @ scaled_NF + np.diag(penalty_F), scaled_NF.T @ tm_N)
    return (weights_F / spread_F).tolist()


def choose(job: Job, parts: dict[str, Path], *, score: Scorer | None = None) -> dict[str, Any]:
    """Write the chosen candidates of the out-of-fold and test tables and ``weights.json``; returns what it holds.

    Out of fold the sources are the runs, as a sequence is held out once, and what judges their candidates learned from
    the other folds; in the test set, every fold of every run.

    Args:
        job: runs, split and folds.
        parts: paths of the tables ``oof`` and ``test`` and of ``weights``.
        score: gives the TM-scores that the policy is learned from; None takes confidences as they are.

    Raises:
        DataError: a candidate twice, not finite, or predicted by a fold that saw its sequence.
    """
    tables = {each: _read_oof_structures(job, each) for each in job.runs}
    learned = _learn(job, tables, score) if score else None
    if learned:
        oof = learned.pop("oof")
        test = _choose_test(job, learned)
    else:
        oof, test = choose_candidates(tables), _choose_test(job, None)
    held_out = pl.read_parquet(job.paths.fold_table(job.split), columns=["sequence_id", "fold"])
    held_out = held_out.filter(pl.col("fold").is_in(job.folds))
    lost = held_out.join(oof, on="sequence_id", how="anti")["sequence_id"].sort().to_list()
    columns = ["sequence_id", "fold", *_COLUMNS[1:], "source"]
    _write_structures(oof.select(columns), parts["oof"])
    _write_structures(test.select(*_COLUMNS, "source"), parts["test"])
    facts = job.facts() | {
        "chosen": "highest expected TM-score, then what is good and new",
        "policy": learned,
        "taken_from": _count(test),
        "taken_from_oof": _count(oof),
        "missing": list_missing({"all runs": lost}),
        "oof_rows": oof.height,
        "test_rows": test.height,
    }
    parts["weights"].write_text(json.dumps(facts, indent=2, sort_keys=True, allow_nan=False) + "\n")
    return facts


def _count(table: pl.DataFrame) -> dict[str, int]:
    taken = table.group_by("source").len().sort("source")
    return dict(zip(taken["source"].to_list(), taken["len"].to_list(), strict=True))


def _learn(job: Job, tables: Mapping[str, pl.DataFrame], score: Scorer) -> dict[str, Any] | None:
    """Weights of every run, the largest novelty that does no harm, and its five (``oof``); None if none is known."""
    known = _references(job.paths.clean("references"))
    tables = {each: table.with_columns(pl.Series("_tm", _score(table, known, score))) for each, table in tables.items()}
    teaches = pl.col("sequence_id").is_in(sorted(read_teaching(job.paths.clean("train"))))
    judged = {each: table.filter(pl.col("_tm").is_not_nan(), teaches) for each, table in tables.items()}
    if any(not table.height or table["fold"].n_unique() < 2 for table in judged.values()):
        return None
    held_out = {
        fold: {
            each: _fit(rows, rows["_tm"].to_numpy())
            for each, table in judged.items()
            for rows in [table.filter(pl.col("fold") != fold)]
        }
        for fold in job.folds
    }
    choices = {}
    for novelty in _NOVELTIES:
        folds = [
            choose_candidates(
                {each: table.filter(pl.col("fold") == fold) for each, table in tables.items()},
                weights=held_out[fold],
                novelty=novelty,
            )
            for fold in job.folds
        ]
        choices[novelty] = pl.concat(folds).sort("sequence_id", "candidate")
    best = {novelty: _mean_best(table.filter(teaches)) for novelty, table in choices.items()}
    novelty = max(each for each, value in best.items() if value >= max(best.values()) - _AS_GOOD)
    return {
        "oof": choices[novelty].drop("_tm"),
        "novelty": novelty,
        "best_of_five": {str(each): round(value, 4) for each, value in best.items()},
        "best_of_five_of_runs": {each: round(_mean_best(table), 4) for each, table in judged.items()},
        "weights": {each: _fit(table, table["_tm"].to_numpy()) for each, table in judged.items()},
    }


def _mean_best(table: pl.DataFrame) -> float:
    """Mean over the known targets of the best candidate."""
    best = table.filter(pl.col("_tm").is_not_nan()).group_by("sequence_id").agg(pl.col("_tm").max()).sort("sequence_id")
    return float(np.mean(best["_tm"].to_numpy()))


def _references(path: Path) -> dict[str, list[np.ndarray]]:
    """sequence_id -> known conformations, [L, 3] Å, NaN where unresolved."""
    known: dict[str, list[np.ndarray]] = {}
    for batch in read_batches(path, ["sequence_id", "conformer", "x", "y", "z"]):
        for rows in batch.partition_by("sequence_id", maintain_order=True):
            known.setdefault(rows["sequence_id"][0], []).extend(_traces(rows))
    return known


def _score(table: pl.DataFrame, known: Mapping[str, list[np.ndarray]], score: Scorer) -> np.ndarray:
    """[N] TM-score of each candidate against the conformation that suits it best; NaN where none is known."""
    pairs, owner = [], []
    for row, (target, trace_L3) in enumerate(zip(table["sequence_id"].to_list(), _traces(table), strict=True)):
        for reference_L3 in known.get(target, []):
            pairs.append((trace_L3, reference_L3))
            owner.append(row)
    best_N = np.full(table.height, -np.inf)
    if pairs:
        np.maximum.at(best_N, np.array(owner), score(pairs))
    return np.where(np.isfinite(best_N), best_N, np.nan)


def choose_test(job: Job, policy: Mapping[str, Any] | None, parts: dict[str, Path]) -> dict[str, Any]:
    """Write the chosen candidates of the test set alone, by the policy that `choose` learned (None: as they are).

    Among the tables that are there: a machine whose time was up has not predicted with every run and fold.
    """
    test = _choose_test(job, policy)
    _write_structures(test.select(*_COLUMNS, "source"), parts["test"])
    return job.facts() | {"test_rows": test.height}


def _choose_test(job: Job, policy: Mapping[str, Any] | None) -> pl.DataFrame:
    places = {f"{each}/fold{fold}": (each, fold) for each in job.runs for fold in job.folds}
    sources = {source: place for source, place in places.items() if job.paths.test(*place).is_file()}
    tables = {source: _read_structures(job.paths.test(*place)) for source, place in sources.items()}
    if policy is None:
        return choose_candidates(tables)
    weights = {source: policy["weights"][each] for source, (each, _) in sources.items()}
    return choose_candidates(tables, weights=weights, novelty=policy["novelty"])


def _read_structures(path: Path, *, fold: bool = False) -> pl.DataFrame:
    """A table of candidates with finite coordinates, unique in (sequence_id, candidate)."""
    columns = ["sequence_id", *(["fold"] if fold else []), *_COLUMNS[1:]]
    frames = list(read_batches(path, columns))
    if not frames:  # a target without any usable template has no rows, and so may a fold
        return pl.read_parquet(path, columns=columns)
    table = pl.concat(frames)
    again = table.filter(pl.struct("sequence_id", "candidate").is_duplicated())
    if again.height:
        raise DataError(
            f"{path}: {again['sequence_id'][0]} has candidate {again['candidate'][0]} twice. Next: make predict."
        )
    whole = [pl.col(axis).list.eval(pl.element().is_finite().fill_null(False)).list.all() for axis in "xyz"]
    alike = [pl.col(axis).list.len() == pl.col("x").list.len() for axis in "yz"]
    good = pl.all_horizontal(*whole, *alike, pl.col("confidence").is_finite()).fill_null(False)
    broken = table.filter(~good)
    if broken.height:
        raise DataError(
            f"{path}: {broken['sequence_id'][0]}: candidate {broken['candidate'][0]} has an unequal number of x, y, z, "
            "or a number that is not finite; expected coordinates in Å and a confidence. Next: make predict again."
        )
    return table


def _read_oof_structures(job: Job, each: str) -> pl.DataFrame:
    table = pl.concat([_read_structures(job.paths.oof(each, fold), fold=True) for fold in job.folds])
    held_out = pl.read_parquet(job.paths.fold_table(job.split), columns=["sequence_id", "fold"])
    beside = table.join(held_out.rename({"fold": "_held_out"}), on="sequence_id", how="left", maintain_order="left")
    wrong = beside.filter(pl.col("_held_out").ne_missing(pl.col("fold")))
    if wrong.height:
        raise DataError(
            f"run {each}: {wrong['sequence_id'][0]} predicted by fold {wrong['fold'][0]}; the split {job.split} holds "
            f"it out in fold {wrong['_held_out'][0]}. Next: train and predict again with this split."
        )
    return table


def _write_structures(table: pl.DataFrame, path: Path) -> None:
    table = table.with_columns(
        pl.col("candidate").cast(pl.UInt8),
        pl.col("confidence").cast(pl.Float32),
        pl.col("x", "y", "z").cast(pl.List(pl.Float32)),
    )
    pq.write_table(table.to_arrow(), path, compression="zstd", row_group_size=4096, write_page_checksum=True)
