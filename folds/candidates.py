"""Which five structures are submitted, when several checkpoints, templates and assemblies offer more.

The policy: what a run says of its candidates, and how like they are to those of other runs, is turned into an expected
TM-score, learned from its out-of-fold candidates; the best goes first; then, one after the other, what promises most of
that which is unlike those taken. How much likeness costs is the most that does no harm out of fold. A run without which
the five are better out of fold lends candidates only where there are no others.

Letters: M candidates of one sequence, N of all, F features, L length (nt), 3 xyz. Lengths in Å.
"""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow.parquet as pq

from folds.job import Job, list_missing
from pipeline.competitions.rna3d import read_teaching
from pipeline.errors import DataError
from pipeline.schema import CANDIDATES
from pipeline.stage import write_json
from pipeline.structure.geometry import Scorer, similarity
from pipeline.tables import read_batches, read_fold_table, require_out_of_fold

_COLUMNS = ("sequence_id", "candidate", "confidence", "x", "y", "z")
#: What being a copy of a candidate already taken costs, in TM-score, and the one that is used where nothing is known.
_NOVELTIES, _NOVELTY = (0.0, 0.05, 0.1, 0.2, 0.4), 0.1
_AS_GOOD = 0.001  # TM-score: of what is as good out of fold, the most different five are taken
_COPY = 0.98  # likeness from which a candidate is a copy: taken only where there is nothing else
_PENALTY = 1e-2  # of the regression, per target


def choose_candidates(
    tables: Mapping[str, pl.DataFrame],
    *,
    weights: Mapping[str, Sequence[float]] | None = None,
    novelty: float = _NOVELTY,
    spare: Collection[str] = (),
) -> pl.DataFrame:
    """Of all candidates of a sequence five: the one with the highest expected score, then what is good and new.

    Coordinates of different models have no common frame, so they are chosen and never averaged.

    Args:
        tables: source (``<run>``, or ``<run>/fold<k>``) -> table with ``sequence_id, candidate, confidence, x, y, z``
            and whatever belongs to a candidate; unique in (sequence_id, candidate).
        weights: run -> weights of its regression, from which the confidence becomes the expected TM-score; None takes
            the confidence as it is.
        novelty: what being a copy of a candidate already taken costs, in TM-score.
        spare: runs whose candidates are taken only where the others have fewer than five.

    Returns:
        The columns of the tables and ``source``, candidates renumbered from 1, the most confident first, sorted by
        (sequence_id, candidate).
    """
    pools = _pools(tables)
    if not pools:
        raise DataError(f"ensemble: no candidate in any of {', '.join(tables)}. Next: make predict.")
    return pl.concat([pool.chosen(weights=weights, novelty=novelty, spare=spare) for pool in pools])


@dataclass(frozen=True)
class _Pool:
    """All candidates of one sequence."""

    rows: pl.DataFrame
    run_M: np.ndarray
    confidence_M: np.ndarray
    alike_MM: np.ndarray

    @staticmethod
    def of(rows: pl.DataFrame) -> "_Pool":
        run_M = np.array([source.split("/")[0] for source in rows["source"]])
        return _Pool(rows, run_M, rows["confidence"].cast(pl.Float64).to_numpy(), similarity(_traces(rows)))

    def features(self, spare: Collection[str]) -> np.ndarray:
        """[M, F] of which the expected TM-score is made: the confidence, of short sequences the length, the likeness
        to what other runs offer."""
        log_M = np.full(len(self.run_M), np.log(np.clip(len(self.rows["x"][0]), 15, 60) / 60.0))
        known = [np.ones(len(log_M)), self.confidence_M, log_M, self.confidence_M * log_M]
        return np.stack([*known, self._seconded(spare)], axis=1)

    def _seconded(self, spare: Collection[str]) -> np.ndarray:
        """[M] likeness to the most alike of the five most confident of each other run; 0 where there is none."""
        voice_M = np.zeros(len(self.run_M), dtype=bool)
        for run in set(self.run_M.tolist()) - set(spare):
            own = np.flatnonzero(self.run_M == run)
            voice_M[own[np.argsort(-self.confidence_M[own], kind="stable")[:CANDIDATES]]] = True
        other_MM = (self.run_M[:, None] != self.run_M) & voice_M
        return np.where(other_MM, self.alike_MM, 0.0).max(axis=1)

    def chosen(
        self, *, weights: Mapping[str, Sequence[float]] | None, novelty: float, spare: Collection[str]
    ) -> pl.DataFrame:
        """The rows that are taken, as `choose_candidates` says."""
        expected_M = self.confidence_M
        if weights is not None:
            weights_MF = np.array([weights[run] for run in self.run_M])
            expected_M = np.clip(np.sum(self.features(spare) * weights_MF, axis=1), 0.0, 1.0)
        last_M = np.isin(self.run_M, list(spare))
        taken = _take(expected_M - 2.0 * last_M, self.alike_MM, novelty=novelty)
        taken.sort(key=lambda m: (-expected_M[m], m))
        rows = self.rows.with_columns(pl.Series("confidence", expected_M))[taken]
        return rows.with_columns(pl.Series("candidate", range(1, len(taken) + 1), dtype=pl.UInt8))


def _pools(tables: Mapping[str, pl.DataFrame]) -> list[_Pool]:
    parts = [
        table.with_columns(pl.lit(source).alias("source"), pl.lit(place).alias("_place"))
        for place, (source, table) in enumerate(tables.items())
    ]
    pooled = pl.concat(parts).sort("sequence_id", "_place", "candidate").drop("_place")
    return [_Pool.of(rows) for rows in pooled.partition_by("sequence_id", maintain_order=True)]


def _take(expected_M: np.ndarray, alike_MM: np.ndarray, *, novelty: float) -> list[int]:
    """Places in the order of choice."""
    chosen = [int(np.argmax(expected_M))]
    while len(chosen) < min(CANDIDATES, len(expected_M)):
        alike_M = alike_MM[:, chosen].max(axis=1)
        worth_M = expected_M - novelty * alike_M - (alike_M > _COPY)  # a copy comes after everything else
        worth_M[chosen] = -np.inf
        chosen.append(int(np.argmax(worth_M)))
    return chosen


def _traces(rows: pl.DataFrame) -> list[np.ndarray]:
    return [np.array(axes, dtype=np.float64).T for axes in rows.select("x", "y", "z").iter_rows()]


def _fit(features_NF: np.ndarray, tm_N: np.ndarray) -> list[float]:
    """Ridge regression of the TM-score; a confidence that says nothing leaves the mean."""
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
    oof = learned.pop("oof") if learned else choose_candidates(tables)
    test = _choose_test(job, learned)
    held_out = read_fold_table(job.paths.fold_table(job.split))
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
    write_json(parts["weights"], facts)
    return facts


def _count(table: pl.DataFrame) -> dict[str, int]:
    return dict(table.group_by("source").len().sort("source").iter_rows())


def _learn(job: Job, tables: Mapping[str, pl.DataFrame], score: Scorer) -> dict[str, Any] | None:
    """What `_Policy` learns, runs that lower the score in reserve, and its five (``oof``); None if nothing is known."""
    known = _references(job.paths.clean("references"))
    tables = {each: table.with_columns(pl.Series("_tm", _score(table, known, score))) for each, table in tables.items()}
    teaching = read_teaching(job.paths.clean("train"))
    pools = _pools(tables)
    judged = [pool for pool in pools if pool.rows["sequence_id"][0] in teaching and pool.rows["_tm"].is_not_nan().all()]
    if any(len({pool.rows["fold"][0] for pool in judged if run in pool.run_M}) < 2 for run in tables):
        return None
    learned = _Policy.learn(pools, judged, runs=list(tables), spare=())
    tried = [learned]
    while len(learned.spare) < len(tables) - 1:
        others = [run for run in tables if run not in learned.spare]
        fewer = [_Policy.learn(pools, judged, runs=list(tables), spare=(*learned.spare, run)) for run in others]
        tried += fewer
        better = max(fewer, key=lambda each: each.score)
        if better.score <= learned.score:
            break
        learned = better
    alone = {run: _mean_best([pool.rows.filter(pl.col("source") == run) for pool in judged]) for run in tables}
    return {
        "oof": learned.oof.drop("_tm"),
        "novelty": learned.novelty,
        "spare": sorted(learned.spare),
        "best_of_five": {str(each): round(value, 4) for each, value in learned.best_of_five.items()},
        "best_of_five_nested": round(_nested(tried, np.array([pool.rows["fold"][0] for pool in judged])), 4),
        "best_of_five_of_runs": {each: round(value, 4) for each, value in alone.items()},
        "weights": learned.weights,
    }


@dataclass(frozen=True)
class _Policy:
    """What was learned with some runs in reserve, and what it takes out of fold, by weights that never saw the fold."""

    spare: tuple[str, ...]
    weights: dict[str, list[float]]  # of every run, from all folds
    best: dict[float, np.ndarray]  # novelty -> [N] best of five of each target that teaches
    novelty: float
    oof: pl.DataFrame

    @property
    def best_of_five(self) -> dict[float, float]:
        """Novelty -> mean over the targets that teach."""
        return {novelty: float(best_N.mean()) for novelty, best_N in self.best.items()}

    @property
    def score(self) -> float:
        return max(self.best_of_five.values())

    @staticmethod
    def learn(pools: list[_Pool], judged: list[_Pool], *, runs: list[str], spare: tuple[str, ...]) -> "_Policy":
        features = [pool.features(spare) for pool in judged]

        def fit(without: int | None) -> dict[str, list[float]]:
            used = [n for n, pool in enumerate(judged) if pool.rows["fold"][0] != without]
            run_N = np.concatenate([judged[n].run_M for n in used])
            told_NF = np.concatenate([features[n] for n in used])
            tm_N = np.concatenate([judged[n].rows["_tm"].to_numpy() for n in used])
            return {run: _fit(told_NF[run_N == run], tm_N[run_N == run]) for run in runs}

        held_out = {fold: fit(fold) for fold in {pool.rows["fold"][0] for pool in pools}}
        taken = {
            novelty: [
                pool.chosen(weights=held_out[pool.rows["fold"][0]], novelty=novelty, spare=spare) for pool in pools
            ]
            for novelty in _NOVELTIES
        }
        teaching = {pool.rows["sequence_id"][0] for pool in judged}
        best = {
            novelty: np.array([rows["_tm"].max() for rows in tables if rows["sequence_id"][0] in teaching])
            for novelty, tables in taken.items()
        }
        novelty = _most_different({each: float(best_N.mean()) for each, best_N in best.items()})
        return _Policy(spare, fit(None), best, novelty, pl.concat(taken[novelty]))


def _most_different(best_of_five: Mapping[float, float]) -> float:
    """The largest novelty that is as good out of fold as the best.

    >>> _most_different({0.0: 0.5, 0.1: 0.4995, 0.4: 0.3})
    0.1
    """
    return max(each for each, value in best_of_five.items() if value >= max(best_of_five.values()) - _AS_GOOD)


def _nested(tried: Sequence[_Policy], fold_N: np.ndarray) -> float:
    """Best of five where reserve and novelty are chosen for each fold on the others; a mean over targets.

    Chosen is among what was tried on the way to the choice that is used.
    """
    best_N = np.empty(len(fold_N))
    for fold in set(fold_N.tolist()):
        here_N = fold_N == fold
        told = [{novelty: float(each_N[~here_N].mean()) for novelty, each_N in each.best.items()} for each in tried]
        place = max(range(len(tried)), key=lambda at: max(told[at].values()))
        best_N[here_N] = tried[place].best[_most_different(told[place])][here_N]
    return float(best_N.mean())


def _mean_best(tables: list[pl.DataFrame]) -> float:
    """Mean over targets, each with its own candidates, of the best; those without any do not count."""
    return float(np.mean([rows["_tm"].max() for rows in tables if rows.height]))


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
    return choose_candidates(tables, weights=policy["weights"], novelty=policy["novelty"], spare=policy["spare"])


def _read_structures(path: Path, *, fold: bool = False) -> pl.DataFrame:
    """A table of candidates with finite coordinates, unique in (sequence_id, candidate)."""
    columns = ["sequence_id", *(["fold"] if fold else []), *_COLUMNS[1:]]
    frames = list(read_batches(path, columns))
    if not frames:  # a target without any usable template has no rows, and so may a fold
        return pl.read_parquet(path, columns=columns)
    table = pl.concat(frames)
    again = table.filter(pl.struct("sequence_id", "candidate").is_duplicated())
    if again.height:
        found = f"{again['sequence_id'][0]} has candidate {again['candidate'][0]} twice"
        raise DataError(f"{path}: {found}. Next: make predict.")
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
    held_out = read_fold_table(job.paths.fold_table(job.split))
    require_out_of_fold(table, held_out, where=f"run {each}", split=job.split)
    return table


def _write_structures(table: pl.DataFrame, path: Path) -> None:
    table = table.with_columns(
        pl.col("candidate").cast(pl.UInt8),
        pl.col("confidence").cast(pl.Float32),
        pl.col("x", "y", "z").cast(pl.List(pl.Float32)),
    )
    pq.write_table(table.to_arrow(), path, compression="zstd", row_group_size=4096, write_page_checksum=True)
