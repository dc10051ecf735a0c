"""How much a split leaks, measured: relatives across folds, and the score of copying the nearest one.

Letters: N sequences sorted by length, S splits.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from rich.markup import escape
from rich.table import Table

from folds.assign import VERSION as FOLDS_VERSION
from folds.copies import read_truth, score_copies, score_labels, score_numbers, tell_leaks
from folds.edit_distance import pack
from folds.similarity import EXHAUSTIVE, find_designs
from folds.survey import PERCENTS, Survey, compare
from pipeline.competitions.base import Competition
from pipeline.errors import ConfigError
from pipeline.paths import Paths
from pipeline.runlog import score_text
from pipeline.stage import Report, run_stage, write_json
from pipeline.tables import open_parquet, read_folds

#: Raised when the same folds give other numbers than before.
VERSION = 2
_SEED = 2026  # of the sample


def run(paths: Paths, *, splits: Sequence[str], competition: Competition, exhaustive: int = EXHAUSTIVE) -> Report:
    """Compare sequences across the folds of each split, and score copies of the nearest one; writes ``audit.json``.

    Args:
        paths: where the artefacts of the competition live.
        splits: names of splits whose fold tables exist.
        competition: gives the metric; without one (structures) only identities are measured.
        exhaustive: most letters of all designs of which all pairs are compared; of more, a sample of the scored ones is
            compared with all: at most as much work.

    Raises:
        ConfigError: no splits.
        DataError: a table is missing, or a fold table is from other data.
    """
    if not splits:
        raise ConfigError("audit: no splits; expected at least one. Next: SPLITS=sim80_k5, for example.")
    inputs = {"train": paths.clean("train")} | {split: paths.fold_table(split) for split in splits}
    output = paths.home / "folds" / "audit.json"
    params = {"version": [VERSION, FOLDS_VERSION], "seed": _SEED, "exhaustive": exhaustive, "splits": list(splits)}
    params |= competition.params

    def build(parts: dict[str, Path]) -> dict[str, Any]:
        facts = measure(inputs["train"], inputs, splits=splits, competition=competition, most=exhaustive)
        write_json(parts["audit"], facts)
        return facts

    return run_stage("audit", inputs=inputs, outputs={"audit": output}, params=params, build=build)


def measure(
    train: Path,
    fold_tables: Mapping[str, Path],
    *,
    splits: Sequence[str],
    competition: Competition,
    most: int,
) -> dict[str, Any]:
    """The facts of `run`."""
    known = {"classes": ["labels"], "numbers": ["numbers"]}.get(competition.task, [])
    columns = ["sequence_id", "sequence", "dataset_name", "scored", *known]
    has_profiles = competition.task == "values" and competition.error_sums is not None
    open_parquet(train, (*columns, *(competition.targets if has_profiles else ()))).close()
    table = pl.read_parquet(train, columns=columns)
    designs, _ = find_designs(table["sequence"].to_list(), table["dataset_name"].to_list())
    table = table.with_columns(pl.Series("design", designs))
    folds = [read_folds(fold_tables[split], table["sequence_id"].to_list()) for split in splits]
    for split, held_out in zip(splits, folds, strict=True):
        held_out = held_out.select("sequence_id", pl.col("fold").alias(split))
        table = table.join(held_out, on="sequence_id", how="left", validate="1:1", maintain_order="left")
    table = table.sort(pl.col("design").str.len_bytes(), "design", "sequence_id")
    folds_SN = np.stack([table[split].to_numpy().astype(np.int64) for split in splits])
    packed = pack(table["design"].to_list())
    queries = _choose_queries(table["scored"].to_numpy(), letters=packed.tokens_T.size, most=most)
    survey = compare(packed, folds_SN, table["scored"].to_numpy(), queries=queries)
    facts: dict[str, Any] = {
        "sequences": table.height,
        "exhaustive": queries is None,
        "compared": table.height if queries is None else len(queries),
        "pairs": int(survey.pairs[0]),
        "metric": competition.metric if competition.error_sums else None,
        "splits": {},
    }
    is_measured = has_profiles and table["scored"].any()
    truth = read_truth(train, table, survey, queries, competition) if is_measured else None
    for place, split in enumerate(splits):
        told = _describe_split(survey, place, table["sequence_id"])
        fold_N, near_N = folds_SN[place], survey.nearest_SN[place]
        if truth is not None:
            told |= score_copies(table, fold_N, near_N, truth, queries, competition)
        if competition.task == "classes":
            told |= score_labels(table, fold_N, near_N, queries)
        if competition.task == "numbers":
            told |= score_numbers(table, fold_N, near_N, queries, competition)
        facts["splits"][split] = told
    tell_leaks(facts["splits"])
    return facts


def _choose_queries(scored_N: np.ndarray, *, letters: int, most: int) -> np.ndarray | None:
    """Sequences that stand for all of a large data set; None = compare all."""
    if letters <= most:
        return None
    pool = np.flatnonzero(scored_N) if scored_N.any() else np.arange(len(scored_N))
    size = min(len(pool), max(1, most**2 // 2 * len(scored_N) // letters**2))
    return np.sort(np.random.default_rng(_SEED).choice(pool, size, replace=False))


def _describe_split(survey: Survey, split: int, ids: pl.Series) -> dict[str, Any]:
    counts = {str(percent): int(count) for percent, count in zip(PERCENTS, survey.counts_SP[split], strict=True)}
    worst = [ids[int(place)] for place in survey.worst_S2[split] if place >= 0]
    highest = float(survey.highest_S[split]) if worst else None
    return {"highest_identity": highest, "pair": worst, "cross_pairs": counts}


def describe(facts: Mapping[str, Any]) -> Table:
    """Identities and scores of every split, as a table for the terminal."""
    how = "all pairs" if facts["exhaustive"] else f"a sample of {facts['compared']:,} sequences with all"
    title = f"{facts['sequences']:,} sequences, {how} ({facts['pairs']:,} pairs); pairs in different folds"
    table = Table(box=None, pad_edge=False, header_style="bold", title=title, title_justify="left")
    table.add_column("split")
    for name in ("highest", *(f">= {percent} %" for percent in PERCENTS)):
        table.add_column(name, justify="right")
    told = {key for found in facts["splits"].values() for key in found}
    usual = {"mean_score": "mean"} if "mean_score" in told else {"median_score": "median"}
    scores = {"copy_score": "copied"} | usual if facts["metric"] else {}
    scores = {key: f"{facts['metric']} {name}" for key, name in scores.items()}
    if "copy_accuracy" in told:
        scores = {"copy_accuracy": "right: copied", "frequent_accuracy": "most frequent"}
    for name in scores.values():
        table.add_column(name, justify="right")
    for split, found in facts["splits"].items():
        highest = "-" if found["highest_identity"] is None else f"{found['highest_identity']:.1%}"
        cells = [highest, *(f"{found['cross_pairs'][str(percent)]:,}" for percent in PERCENTS)]
        table.add_row(escape(split), *cells, *(score_text(found[key]) if key in found else "-" for key in scores))
    captions = {
        "copy_accuracy": "copied: share of sequences with the same labels as the nearest training sequence; most "
        "frequent: as most of them.\n"
        "Where copying is right much more often on one split, its scores are scores of memory.",
        "mean_score": "copied: the nearest training sequence's numbers; mean: that of the training sequences.\n"
        "Where copying beats the mean by much, scores of the split are scores of memory.",
        "median_score": "copied: the nearest training sequence's profile; median: the training median per nucleotide.\n"
        "Where copying beats the median by much, scores of the split are scores of memory.",
    }
    table.caption = next((caption for key, caption in captions.items() if key in scores), None)
    table.caption_justify = "left"
    return table
