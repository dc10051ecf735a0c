"""Which five structures are submitted, when several checkpoints predicted five each."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow.parquet as pq

from folds.job import Job, list_missing
from pipeline.competitions.rna3d import CANDIDATES
from pipeline.errors import DataError
from pipeline.tables import read_batches

_COLUMNS = ("sequence_id", "candidate", "confidence", "x", "y", "z")


def choose_candidates(tables: Mapping[str, pl.DataFrame], *, keep: int = CANDIDATES) -> pl.DataFrame:
    """Take turns: the best candidate of every source, most confident first, then every source's second, until `keep`.

    Coordinates of different models have no common frame, so they are chosen and never averaged. Taking turns keeps the
    five different from each other: the score counts only the best, and two from one checkpoint are often alike.

    Args:
        tables: source (a run, or one fold of it) -> table with ``sequence_id, candidate, confidence`` and whatever
            belongs to a candidate; unique in (sequence_id, candidate).
        keep: candidates of each sequence at most.

    Returns:
        The columns of the tables and ``source``, candidates renumbered from 1 in the order of choice, sorted by
        (sequence_id, candidate).
    """
    pooled = pl.concat(
        [
            table.with_columns(pl.lit(source).alias("source"), pl.lit(place).alias("_place"))
            for place, (source, table) in enumerate(tables.items())
        ]
    ).sort("sequence_id", "_place", "candidate")
    turn = pl.col("confidence").rank("ordinal", descending=True).over("sequence_id", "_place")
    ranked = pooled.with_columns(turn.alias("_turn")).sort(
        "sequence_id", "_turn", "confidence", "_place", descending=[False, False, True, False]
    )
    number = pl.int_range(1, pl.len() + 1).over("sequence_id")  # of all sources: more than a byte holds
    chosen = ranked.with_columns(number.alias("candidate")).filter(pl.col("candidate") <= keep)
    return chosen.with_columns(pl.col("candidate").cast(pl.UInt8)).drop("_turn", "_place")


def choose(job: Job, parts: dict[str, Path]) -> dict[str, Any]:
    """Write the chosen candidates of the out-of-fold and test tables and ``weights.json``; returns what it holds.

    Out of fold the sources are the runs, as a sequence is held out once; in the test set, every fold of every run.

    Raises:
        DataError: a candidate twice, not finite, or predicted by a fold that saw its sequence.
    """
    oof = choose_candidates({each: _read_oof_structures(job, each) for each in job.runs})
    test = choose_candidates(
        {f"{each}/fold{fold}": _read_structures(job.paths.test(each, fold)) for each in job.runs for fold in job.folds}
    )
    held_out = pl.read_parquet(job.paths.fold_table(job.split), columns=["sequence_id", "fold"])
    held_out = held_out.filter(pl.col("fold").is_in(job.folds))
    lost = held_out.join(oof, on="sequence_id", how="anti")["sequence_id"].sort().to_list()
    columns = ["sequence_id", "fold", *_COLUMNS[1:]]
    _write_structures(oof.select(columns), parts["oof"])
    _write_structures(test.select(_COLUMNS), parts["test"])
    taken = test.group_by("source").len().sort("source")
    facts = job.facts() | {
        "chosen": "candidates in turn, by confidence",
        "taken_from": dict(zip(taken["source"].to_list(), taken["len"].to_list(), strict=True)),
        "missing": list_missing({"all runs": lost}),
        "oof_rows": oof.height,
        "test_rows": test.height,
    }
    parts["weights"].write_text(json.dumps(facts, indent=2, sort_keys=True, allow_nan=False) + "\n")
    return facts


def _read_structures(path: Path, *, fold: bool = False) -> pl.DataFrame:
    """A table of candidates with finite coordinates, unique in (sequence_id, candidate)."""
    columns = ["sequence_id", *(["fold"] if fold else []), *_COLUMNS[1:]]
    frames = list(read_batches(path, columns))
    if not frames:
        raise DataError(f"{path}: no rows; expected predicted candidates. Next: make predict.")
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
