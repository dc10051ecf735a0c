"""The folds stage: every training sequence gets a fold, relatives the same one."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
from rich.markup import escape
from rich.table import Table

from folds.lock import LOCKS, digest_pairs, lock_path, verify_lock, write_lock
from folds.similarity import VERSION as CLUSTERS_VERSION
from folds.similarity import find_clusters
from folds.split import Split, assign_folds, parse_split
from pipeline.competitions import get_competition
from pipeline.errors import DataError
from pipeline.labels import read_classes, read_numbers
from pipeline.paths import Paths
from pipeline.runlog import warn
from pipeline.stage import Report, read_manifest, run_stage, sha256_file
from pipeline.tables import number_lists, open_parquet

#: Raised when the same clusters give other folds, or other facts, than before.
VERSION = 3

_COLUMNS = ("sequence_id", "sequence", "dataset_name", "group")
_SHOWN = 40  # strata in the table for the terminal
_SPREAD = 8  # most columns of numbers that are spread over the folds
_PARQUET: dict[str, Any] = {"compression": "zstd", "row_group_size": 1 << 16, "statistics": True}


def run(paths: Paths, *, split: str, relock: bool = False, seed: int = 2026, locks: Path = LOCKS) -> Report:
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
        if "clusters" in inputs:
            of_these = read_manifest(inputs["clusters"].with_suffix(".manifest.json"))
            if of_these is None or of_these["inputs"]["train"] != sha256_file(inputs["train"]):
                raise DataError(f"folds: {inputs['train']} was written anew meanwhile. Next: the same command again.")
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
    without = ", and a set of your own needs none" if get_competition(facts["comp"]).is_own else ""
    return f"absent: no {name}{without}; make folds RELOCK=1 writes it"


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
