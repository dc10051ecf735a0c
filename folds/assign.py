"""The folds stage: every training sequence gets a fold, relatives the same one.

Letters: C clusters, F folds, S strata (data set and length; of a labelled set its classes, or fifths of its numbers), K
entries of the sparse cluster × stratum table.
"""

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
from rich.markup import escape
from rich.table import Table

from folds.lock import LOCKS, digest_pairs, lock_path, verify_lock, write_lock
from folds.similarity import MIN_PERCENT, find_clusters
from folds.similarity import VERSION as CLUSTERS_VERSION
from pipeline.compiled import njit
from pipeline.errors import ConfigError, DataError
from pipeline.labels import read_classes, read_numbers
from pipeline.paths import Paths
from pipeline.runlog import warn
from pipeline.stage import Report, run_stage
from pipeline.tables import number_lists, open_parquet

#: Raised when the same clusters give other folds, or other facts, than before.
VERSION = 3

#: Threshold of the clusters that the length split keeps together.
LENGTH_PERCENT = 80

_COLUMNS = ("sequence_id", "sequence", "dataset_name", "group")
_SHOWN = 40  # strata in the table for the terminal
_SPREAD = 8  # most columns of numbers that are spread over the folds
_PARQUET: dict[str, Any] = {"compression": "zstd", "row_group_size": 1 << 16, "statistics": True}


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


def run(
    paths: Paths,
    *,
    split: str,
    relock: bool = False,
    seed: int = 2026,
    locks: Path = LOCKS,
) -> Report:
    """Write ``folds/<split>.parquet`` (sequence_id, fold, cluster), checked against the lock for these data.

    - ``sim80_k5``: relatives of at least 80 % identity (`folds.similarity`) share a fold; data sets and lengths, or the
      classes or numbers of a labelled set, are spread evenly over five folds.
    - ``length_k5``: fold 0 holds the longest fifth, with their relatives; the rest as above.
    - ``random_k5``: every sequence by itself. Scores of it leak; it exists to measure how much.

    Args:
        paths: where the artefacts of the competition live.
        split: name of the split.
        relock: write the lock instead of checking it.
        seed: decides between equals.
        locks: folder of the locks.

    Raises:
        ConfigError: no such split, or more folds than clusters.
        DataError: the clean table is missing or damaged, or the folds are not those of the lock; nothing is written.
    """
    plan = parse_split(split)
    inputs = {"train": paths.clean("train")}
    made: dict[str, Any] = {"method": "none", "flanks": {}}
    clustering = 0.0
    if plan.kind == "random":
        warn(
            f"{split}: relatives are in different folds, so its scores leak. "
            f"Next: SPLIT=sim80_k{plan.folds} for real ones."
        )
    else:
        clusters = _run_clusters(paths, percent=plan.percent)
        inputs["clusters"], made, clustering = clusters.outputs["clusters"], clusters.facts, clusters.seconds

    def build(parts: dict[str, Path]) -> dict[str, Any]:
        table = _read_train(inputs["train"])
        if "labels" in table.columns:
            table = table.with_columns(_class_names(table["labels"], read_classes(paths).names))
        if "numbers" in table.columns:
            table = table.with_columns(_fifths(table["numbers"], read_numbers(paths).names))
        cluster = pl.read_parquet(inputs["clusters"])["cluster"] if "clusters" in inputs else table["sequence_id"]
        table = assign_folds(table.with_columns(cluster.alias("cluster")), plan, seed=seed, where=split)
        facts = {"comp": paths.comp, "split": split, "seed": seed, "version": [CLUSTERS_VERSION, VERSION]}
        facts |= {"method": made["method"], "flanks": made["flanks"]} | _count(table, plan)
        if not relock:
            verify_lock(facts, locks=locks)
        table.select("sequence_id", "fold", "cluster").write_parquet(parts["folds"], **_PARQUET)
        return facts

    fold_table = paths.fold_table(split)
    report = run_stage(
        "folds",
        inputs=inputs,
        outputs={"folds": fold_table},
        params={"version": VERSION, "split": split, "seed": seed, "method": made["method"]},
        build=build,
        manifest=fold_table.with_suffix(".manifest.json"),
    )
    facts = report.facts | {"lock": _lock(report.facts, relock=relock, locks=locks)}
    return replace(report, facts=facts, seconds=report.seconds + clustering)


def _lock(facts: Mapping[str, Any], *, relock: bool, locks: Path) -> str:
    name = lock_path(facts, locks=locks).name
    if relock:
        write_lock(facts, locks=locks)
        return f"written: {name}"
    if verify_lock(facts, locks=locks):
        return f"verified: {name}"
    return f"absent: no {name}; make folds RELOCK=1 writes it"


def _run_clusters(paths: Paths, *, percent: int) -> Report:
    """Clusters are a stage of their own, so that splits with one threshold share them."""
    output = paths.fold_table(f"clusters_sim{percent}")

    def build(parts: dict[str, Path]) -> dict[str, Any]:
        table = _read_train(paths.clean("train"))
        found = find_clusters(table, percent=percent)
        rows = table.select("sequence_id", pl.Series("cluster", found.cluster, dtype=pl.String))
        rows.write_parquet(parts["clusters"], **_PARQUET)
        return found.facts

    return run_stage(
        "clusters",
        inputs={"train": paths.clean("train")},
        outputs={"clusters": output},
        params={"version": CLUSTERS_VERSION, "percent": percent, "method": "auto"},
        build=build,
        manifest=output.with_suffix(".manifest.json"),
    )


def _read_train(path: Path) -> pl.DataFrame:
    with open_parquet(path, _COLUMNS) as opened:
        labels = [name for name in ("labels", "numbers") if name in opened.schema_arrow.names]
    table = pl.read_parquet(path, columns=[*_COLUMNS, *labels]).sort("sequence_id")
    if not table.height:
        raise DataError(f"{path}: no rows; expected training sequences. Next: make data.")
    return table


def _class_names(labels: pl.Series, names: Sequence[str]) -> pl.Series:
    """Classes of each sequence, as a list of names: what is spread evenly."""
    name_of = pl.element().cast(pl.Int64).replace_strict(list(range(len(names))), list(names), return_dtype=pl.String)
    found = pl.DataFrame({"labels": labels}).select(
        pl.when(pl.col("labels").is_null())
        .then(pl.lit(["(not labelled)"]))
        .when(pl.col("labels").list.len() == 0)
        .then(pl.lit(["(none of them)"]))
        .otherwise(pl.col("labels").list.eval(name_of))
        .alias("kinds")
    )
    return found["kinds"]


def _fifths(numbers: pl.Series, names: Sequence[str]) -> pl.Series:
    """Which fifth of each column a sequence's numbers are in, as a list of words: what is spread evenly.

    >>> _fifths(pl.Series([[3.0], [1.0], [2.0], None], dtype=pl.List(pl.Float64)), ["Tm"]).to_list()
    [['Tm, fifth 5'], ['Tm, fifth 1'], ['Tm, fifth 3'], ['(not measured)']]
    """
    found: list[list[str]] = [[] for _ in range(len(numbers))]
    for name, column_N in zip(names[:_SPREAD], number_lists(numbers, len(names)).T, strict=False):
        measured = np.flatnonzero(np.isfinite(column_N))
        if measured.size:
            edges = np.quantile(column_N[measured], (0.2, 0.4, 0.6, 0.8))
            for row, fifth in zip(measured, np.searchsorted(edges, column_N[measured]), strict=True):
                found[row].append(f"{name}, fifth {fifth + 1}")
    return pl.Series("kinds", [words or ["(not measured)"] for words in found])


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
            f"SPLIT={where!r}: {plan.folds} folds, but the {table.height:,} sequences make only {clusters.height} "
            f"cluster{'s' * (clusters.height > 1)}. Next: {_smaller_split(table.height, clusters.height, where=where)}."
        )
    ties = [hashlib.sha256(f"{seed}:{name}".encode()).hexdigest() for name in clusters["cluster"]]
    clusters = clusters.with_columns(pl.Series("tie", ties, dtype=pl.String))
    held_C = _hold_longest(clusters, plan.folds) if plan.kind == "length" else np.zeros(clusters.height, bool)
    folds_C = _balance(table, clusters, held_C, folds=plan.folds, first=int(plan.kind == "length"))
    fold_of = clusters.select("cluster", pl.Series("fold", folds_C, dtype=pl.UInt8))
    return table.join(fold_of, on="cluster", how="left", validate="m:1", maintain_order="left")


def _smaller_split(sequences: int, clusters: int, *, where: str) -> str:
    """What to try where a split has more folds than there are clusters.

    >>> _smaller_split(9, 3, where="sim80_k5"), _smaller_split(1, 1, where="random_k5")
    ('SPLIT=sim80_k3, or a higher identity', 'add sequences: of a single one there are no folds')
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


def _count(table: pl.DataFrame, plan: Split) -> dict[str, Any]:
    """What the lock and the report say of a fold table."""
    folds_N = table["fold"].to_numpy()
    counts = np.bincount(folds_N, minlength=plan.folds).tolist()
    strata: dict[str, list[int]] = {}
    members = table.select("fold", stratum="strata").explode("stratum").group_by("stratum", "fold").len()
    for stratum, fold, count in members.sort("stratum", "fold").iter_rows():
        strata.setdefault(stratum, [0] * plan.folds)[fold] = count
    largest = int(table.group_by("cluster").len()["len"].max() or 0)  # type: ignore[arg-type]
    lengths = table.group_by("fold").agg(pl.col("length").min().alias("low"), pl.col("length").max().alias("high"))
    return {
        "data_digest": digest_pairs(table["sequence_id"], table["sequence"]),
        "fold_digest": digest_pairs(table["sequence_id"], folds_N.tolist()),
        "rows": table.height,
        "counts": counts,
        "strata": strata,
        "by": "kind" if "kinds" in table.columns else "length",
        "lengths": [list(row) for row in lengths.sort("fold").select("low", "high").iter_rows()],
        "clusters": table["cluster"].n_unique(),
        "largest_cluster": largest,
        "imbalance": round(max(counts) * plan.folds / table.height, 4),
        "giant": largest > table.height / plan.folds,
    }


def describe(facts: Mapping[str, Any]) -> list[Any]:
    """Sequences of every fold, stratum by stratum, as a table for the terminal, and lines below it."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    table.add_column(f"{facts['rows']:,} sequences by {facts['split']}")
    for fold in range(len(facts["counts"])):
        table.add_column(f"fold {fold}", justify="right")
    names = sorted(facts["strata"], key=_by_length) if facts["by"] == "length" else list(facts["strata"])
    for name in names[:_SHOWN]:
        told = _data_set(name) if facts["by"] == "length" else name
        table.add_row(escape(told), *(f"{count:,}" for count in facts["strata"][name]))
    if len(names) > _SHOWN:
        table.add_row(f"and {len(names) - _SHOWN:,} more", *("…" for _ in facts["counts"]), style="dim")
    table.add_row("all", *(f"[bold]{count:,}[/]" for count in facts["counts"]))
    table.add_row("lengths", *(f"{low}-{high}" if low < high else str(low) for low, high in facts["lengths"]))
    return [table, *_notes(facts)]


def _by_length(stratum: str) -> tuple[str, int]:
    name, _, bin_ = stratum.rpartition(" ")
    return name, int(bin_.partition("-")[0])


def _data_set(stratum: str) -> str:
    """A data set and its bin for people; OpenVaccine's data sets are lengths already.

    >>> _data_set("train 33-48"), _data_set("107 nt 97-128")
    ('train 33-48 nt', '107 nt')
    """
    name = stratum.rpartition(" ")[0]
    return name if name.endswith(" nt") else f"{stratum} nt"


def _notes(facts: Mapping[str, Any]) -> list[str]:
    lines = [f"{facts['clusters']:,} clusters ({facts['method']}), the largest of {facts['largest_cluster']:,}"]
    lines[0] += f"; largest fold {facts['imbalance']:.2f} times the mean"
    if facts["giant"]:
        lines.append(
            f"{facts['largest_cluster']:,} sequences are related and make a fold bigger than the others: cutting them "
            "apart would leave near-copies in two folds"
        )
    return [*lines, f"lock {facts['lock']}"]
