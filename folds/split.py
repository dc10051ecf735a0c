"""A split: what its name says, and whole clusters dealt to its folds, every stratum spread evenly.

Letters: C clusters, F folds, S strata (data set and length; of a labelled set its classes, or fifths of its numbers), K
entries of the sparse cluster × stratum table.
"""

import hashlib
import re
from dataclasses import dataclass
from typing import Literal

import numpy as np
import polars as pl

from folds.similarity import MIN_PERCENT
from pipeline.compiled import njit
from pipeline.errors import ConfigError
from pipeline.runlog import amount

#: Threshold of the clusters that the length split keeps together.
LENGTH_PERCENT = 80


@dataclass(frozen=True, kw_only=True)
class Split:
    """A split's name, read."""

    kind: Literal["sim", "length", "random"]
    percent: int  #: identity from which sequences are kept together; 0 = not at all
    folds: int


def parse_split(name: str) -> Split:
    """Read ``sim<percent>_k<folds>``, ``length_k<folds>`` or ``random_k<folds>``.

    Raises:
        ConfigError: another name, an identity below what unrelated sequences have, fewer than 2 or over 255 folds.

    >>> parse_split("sim80_k5")
    Split(kind='sim', percent=80, folds=5)
    """
    found = re.fullmatch(r"(?:sim(\d{1,3})|(length|random))_k(\d{1,3})", name)
    if not found:
        raise ConfigError(
            f"SPLIT={name!r}: expected sim<percent>_k<folds>, length_k<folds> or random_k<folds>. Next: "
            "SPLIT=sim80_k5, for example."
        )
    folds = int(found[3])
    if not 2 <= folds <= 255:
        raise ConfigError(f"SPLIT={name!r}: {folds} folds; expected 2 to 255. Next: SPLIT={name.partition('_')[0]}_k5.")
    if found[1]:
        percent = int(found[1])
        if not MIN_PERCENT <= percent <= 100:
            raise ConfigError(
                f"SPLIT={name!r}: expected {MIN_PERCENT} to 100 %; unrelated ones reach 60 %. "
                f"Next: SPLIT=sim80_k{folds}."
            )
        return Split(kind="sim", percent=percent, folds=folds)
    if found[2] == "length":
        return Split(kind="length", percent=LENGTH_PERCENT, folds=folds)
    return Split(kind="random", percent=0, folds=folds)


def length_label(length: int) -> str:
    """Length bin, nt: between powers of two, and halfway.

    >>> [length_label(n) for n in (1, 96, 97, 177)]
    ['1-32', '65-96', '97-128', '129-192']
    """
    low, high = 0, 32
    while length > high:
        low, high = high, high + high // 2 if high & (high - 1) == 0 else high // 3 * 4
    return f"{low + 1}-{high}"


def assign_folds(table: pl.DataFrame, plan: Split, *, seed: int, where: str) -> pl.DataFrame:
    """Add the columns ``fold``, ``strata`` (a list) and ``length``; whole clusters share a fold.

    Args:
        table: ``sequence_id, sequence, dataset_name, cluster``, and ``kinds``, lists of words such as classes, where
            these are to be spread evenly.
        plan: how many folds, and whether the first holds the longest.
        seed: decides between equals.
        where: the split's name, for messages.

    Raises:
        ConfigError: more folds than clusters.
    """
    labels = {length: length_label(length) for length in table["sequence"].str.len_bytes().unique().to_list()}
    table = table.with_columns(pl.col("sequence").str.len_bytes().alias("length"))
    bin_ = pl.col("length").replace_strict(labels, return_dtype=pl.String)
    by_length = pl.concat_list(pl.concat_str("dataset_name", bin_, separator=" "))
    table = table.with_columns((pl.col("kinds") if "kinds" in table.columns else by_length).alias("strata"))
    clusters = table.group_by("cluster").agg(pl.len().alias("size"), pl.col("length").max()).sort("cluster")
    if clusters.height < plan.folds:
        raise ConfigError(
            f"SPLIT={where!r}: {plan.folds} folds, but the {table.height:,} sequences make only "
            f"{amount(clusters.height, 'cluster')}. Next: {_smaller_split(table.height, clusters.height, where=where)}."
        )
    ties = [hashlib.sha256(f"{seed}:{name}".encode()).hexdigest() for name in clusters["cluster"]]
    clusters = clusters.with_columns(pl.Series("tie", ties, dtype=pl.String))
    held_C = _hold_longest(clusters, plan.folds) if plan.kind == "length" else np.zeros(clusters.height, bool)
    folds_C = _balance(table, clusters, held_C, folds=plan.folds, first=int(plan.kind == "length"))
    fold_of = clusters.select("cluster", pl.Series("fold", folds_C, dtype=pl.UInt8))
    return table.join(fold_of, on="cluster", how="left", validate="m:1", maintain_order="left")


def _smaller_split(sequences: int, clusters: int, *, where: str) -> str:
    """What to try where a split has more folds than there are clusters.

    >>> _smaller_split(9, 2, where="sim80_k5"), _smaller_split(1, 1, where="random_k5")
    ('SPLIT=sim80_k2, or a higher identity', 'add sequences: of a single one there are no folds')
    """
    if sequences < 2:
        return "add sequences: of a single one there are no folds"
    if clusters < 2:
        return "try a higher identity (SPLIT=sim95_k2), or SPLIT=random_k2: all are relatives, so that its scores leak"
    return f"SPLIT={where.rsplit('_', 1)[0]}_k{clusters}, or a higher identity"


def _hold_longest(clusters: pl.DataFrame, folds: int) -> np.ndarray:
    """Clusters of fold 0: by their longest sequence, as many as come closest to an even share of the rows, [C] bool.

    No sequence outside is longer than the longest of a cluster inside: a cluster that does not fit ends the choice,
    but for others that are as long. Every other fold is left a cluster.
    """
    share, taken, shortest = int(clusters["size"].sum()) / folds, 0, 0
    held_C = np.zeros(clusters.height, bool)
    order = clusters.with_row_index().sort("length", "tie", descending=[True, False])
    for index, size, length in order.select("index", "size", "length").head(clusters.height - folds + 1).iter_rows():
        if length < shortest:
            break
        if not taken or abs(taken + size - share) < share - taken:
            held_C[index], taken = True, taken + size
        else:
            shortest = length
    return held_C


def _balance(table: pl.DataFrame, clusters: pl.DataFrame, held_C: np.ndarray, *, folds: int, first: int) -> np.ndarray:
    """Fold of every cluster, [C] uint8: held ones 0, the others from the biggest down into the emptiest fold."""
    entries = table.select("cluster", "strata", (1 / pl.col("strata").list.len()).alias("rows"))
    entries = entries.explode("strata").rename({"strata": "stratum"})
    names = entries["stratum"].unique().sort()
    # shares of several labels are no whole numbers: their sum must not depend on the order in which it is made
    counts = entries.group_by("cluster", "stratum", maintain_order=True).agg(pl.col("rows").sum())
    counts = counts.sort("cluster", "stratum")
    stratum_K = names.search_sorted(counts["stratum"]).to_numpy().astype(np.int64)
    entries_C = counts.group_by("cluster", maintain_order=True).len()["len"].to_numpy()
    starts_C = np.concatenate([[0], np.cumsum(entries_C)]).astype(np.int64)
    open_ = clusters.with_row_index().filter(pl.Series(~held_C)).sort("size", "tie", descending=[True, False])
    folds_C = np.zeros(clusters.height, np.uint8)
    order = open_["index"].to_numpy().astype(np.int64)
    rows_K = counts["rows"].to_numpy().astype(np.float64)
    folds_C[order] = first + _fill(starts_C, stratum_K, rows_K, order, len(names), folds - first)
    return folds_C


@njit(cache=True)
def _fill(
    starts_C: np.ndarray, stratum_K: np.ndarray, rows_K: np.ndarray, order: np.ndarray, strata: int, folds: int
) -> np.ndarray:
    """Put clusters, in this order, into the fold with the least load; the load of a fold counts what the cluster holds.

    The load is the fold's share of all rows plus its shares of the cluster's strata, weighted by the cluster's own mix;
    so a fold that is short of long sequences gets the long ones. Ties go to the fold with fewer rows, then the first.
    """
    load_FS, rows_F = np.zeros((folds, strata)), np.zeros(folds)
    total_S, chosen = np.zeros(strata), np.empty(order.size, np.uint8)
    for place in range(order.size):
        for entry in range(starts_C[order[place]], starts_C[order[place] + 1]):
            total_S[stratum_K[entry]] += rows_K[entry]
    for place in range(order.size):
        low, high = starts_C[order[place]], starts_C[order[place] + 1]
        size, best, least = rows_K[low:high].sum(), 0, np.inf
        for fold in range(folds):
            load = rows_F[fold] / total_S.sum()
            for entry in range(low, high):
                load += rows_K[entry] / size * load_FS[fold, stratum_K[entry]] / total_S[stratum_K[entry]]
            if load < least or (load == least and rows_F[fold] < rows_F[best]):
                best, least = fold, load
        chosen[place] = best
        rows_F[best] += size
        for entry in range(low, high):
            load_FS[best, stratum_K[entry]] += rows_K[entry]
    return chosen
