"""Which cells of a sweep can be told apart: means, intervals, ranks, and the table that shows them."""

import math
import statistics
from collections.abc import Mapping
from typing import Any

from rich.table import Table

from pipeline.sweep.jobs import Job, Settings, label

_CONFIDENCE = 0.95


def summarise(results: Mapping[Job, float | None]) -> list[dict[str, Any]]:
    """Mean, spread and rank of every cell, best first; lower metrics are better.

    A cell is ranked below another only if their 95 % intervals of the mean do not overlap; those that overlap share a
    rank, also by way of a third one. A cell with fewer than two results, or with one that diverged, has none.

    Returns:
        One dict a cell: ``cell``, ``n``, ``diverged``, ``mean``, ``sd``, ``low``, ``high``, ``rank``, and ``p``: of a
        paired t-test against the first over the seeds and folds that both have.
    """
    rows = [_summarise_cell(cell, results) for cell in dict.fromkeys(job.cell for job in results)]
    rows.sort(key=lambda row: (row["diverged"] > 0, math.inf if row["mean"] is None else row["mean"]))
    for row in rows:
        row["p"] = _paired_p(rows[0]["cell"], row["cell"], results) if row is not rows[0] else None
        row["rank"] = None
    ranked = sorted((row for row in rows if row["low"] is not None and not row["diverged"]), key=lambda row: row["low"])
    rank, reach = 1, -math.inf
    for place, row in enumerate(ranked, start=1):
        if row["low"] > reach:
            rank = place
        row["rank"], reach = rank, max(reach, row["high"])
    return rows


def _summarise_cell(cell: Settings, results: Mapping[Job, float | None]) -> dict[str, Any]:
    everything = [value for job, value in results.items() if job.cell == cell]
    values = [value for value in everything if value is not None]
    row: dict[str, Any] = {"cell": cell, "n": len(values), "diverged": len(everything) - len(values)}
    row |= {"mean": statistics.fmean(values) if values else None, "sd": None, "low": None, "high": None}
    if len(values) > 1:
        from scipy import stats

        row["sd"] = statistics.stdev(values)
        half = float(stats.t.ppf((1 + _CONFIDENCE) / 2, len(values) - 1)) * row["sd"] / math.sqrt(len(values))
        row |= {"low": row["mean"] - half, "high": row["mean"] + half}
    return row


def _paired_p(first: Settings, other: Settings, results: Mapping[Job, float | None]) -> float | None:
    def of(cell: Settings) -> dict[tuple[int, int], float]:
        return {(job.seed, job.fold): v for job, v in results.items() if job.cell == cell and v is not None}

    ours, theirs = of(first), of(other)
    shared = sorted(ours.keys() & theirs.keys())
    differences = [theirs[key] - ours[key] for key in shared]
    if len(shared) < 2 or (spread := statistics.stdev(differences)) == 0:
        return None
    from scipy import stats

    t = statistics.fmean(differences) / (spread / math.sqrt(len(shared)))
    return float(2 * stats.t.sf(abs(t), len(shared) - 1))


def describe(facts: Mapping[str, Any]) -> list[Any]:
    """What `run` found, for a person."""
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in ("rank", "settings", "n", "mean", "sd", "95 % interval", "p against the first"):
        table.add_column(column, justify="left" if column == "settings" else "right")
    for row in facts["cells"]:
        kind = ".5g" if row["mean"] is not None and abs(row["mean"]) < 1e-3 else ".5f"  # whatever the metric's unit
        interval = "-" if row["low"] is None else f"{row['low']:{kind}} … {row['high']:{kind}}"
        lost = f" ({row['diverged']} diverged)" if row["diverged"] else ""
        numbers = ["-" if row[key] is None else f"{row[key]:{kind}}" for key in ("mean", "sd")]
        p = "" if row["p"] is None else f"{row['p']:.3f}"
        rank = "-" if row["rank"] is None else str(row["rank"])
        table.add_row(rank, label(row["cell"]), f"{row['n']}{lost}", *numbers, interval, p)
    notes = [f"best {facts['metric']} of each run in validation, lower is better"]
    notes += ["cells whose intervals overlap share a rank; - = one result is no interval, or a run diverged"]
    if any(row["n"] == 2 for row in facts["cells"]):
        notes.append("of two results an interval is 9 sd wide to each side, of three 2.5 (SEEDS=3), of five 1.2")
    if (count := len(facts["cells"])) > 2 and any(row["p"] is not None for row in facts["cells"]):
        sure = 0.05 / math.comb(count, 2)  # Bonferroni's: the first is the first of so many by chance, too
        notes.append(f"p is of one pair, and the first was chosen of {count}: sure below {sure:.2g}, not below 0.05")
    if facts["next"]:
        notes.append(f"the first of them on all folds, with predictions: {facts['next']}")
    if facts["busy"]:
        jobs = "1 job is" if facts["busy"] == 1 else f"{facts['busy']} jobs are"
        notes.append(f"{jobs} at work elsewhere; run the sweep again for the whole table")
    return [table, *notes]
