"""Report on predicted structures: scores of the targets beside their floors, and traces on the known structures.

Letters: L length (nt), 3 xyz.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from submissions import figures, page
from submissions.page import Markup
from submissions.subject import Subject
from submissions.superpose import rmsd, superpose

_TRACES = 8  # targets whose traces are drawn
_TARGETS = 60  # targets in the figure of scores


def structure_sections(subject: Subject) -> dict[str, tuple[str, Markup]]:
    """Anchor -> title and content of the parts that only predicted structures have."""
    rows = sorted(subject.scores["targets"], key=lambda row: (-row["score"], row["sequence_id"]))
    return {
        "targets": ("Targets", _targets_section(subject, rows)),
        "traces": ("Traces", _traces_section(subject, rows)),
    }


def _evenly(rows: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of some rows, evenly spaced, the first and the last among them."""
    places = np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int))
    return [rows[at] for at in places]


def _targets_section(subject: Subject, rows: Sequence[Mapping[str, Any]]) -> Markup:
    scores = subject.scores
    shown = _evenly(rows, _TARGETS)
    drawing = figures.target_scores(
        [row["sequence_id"] for row in shown],
        [row["score"] for row in shown],
        [list(row["floors"].values()) for row in shown],
        xlabel=f"{scores['metric']}, best of the candidates",
    )
    ahead = sum(row["score"] > max(row["floors"].values()) for row in rows)
    words = (
        f"{ahead} of {len(rows)} targets beat every floor (filled dots). Ticks: what shapes that read no sequence "
        f"score ({', '.join(scores['floors'])}). Candidate 1 alone scores {scores['first_candidate']:.4f}."
    )
    if len(shown) < len(rows):
        words += f" {len(shown)} targets are shown, evenly spaced by rank."
    by_length = figures.scatter(
        [row["length"] for row in rows],
        [row["score"] for row in rows],
        [max(row["floors"].values()) for row in rows],
        xlabel="length, nt",
        ylabel=scores["metric"],
    )
    lengths = [
        [row["length"], row["targets"], page.number(row["score"]), page.number(row["best_floor"])]
        for row in scores["by_length"]
    ]
    notes = [page.element("p", scores["engine"], class_="note")]
    if lost := scores["without_reference"]:
        notes.append(page.element("p", f"No known structure, not scored: {len(lost):,} targets.", class_="note"))
    return page.join(
        page.element("p", words, class_="note"),
        page.figure(drawing, wide=True),
        page.panels(
            [
                page.figure(by_length, title="By length", caption="filled: prediction; open: best floor of the target"),
                page.table(["length", "targets", scores["metric"], "best floor"], lengths),
            ]
        ),
        *notes,
    )


def _traces_section(subject: Subject, rows: Sequence[Mapping[str, Any]]) -> Markup:
    shown = [row for row in _evenly(rows, _TRACES) if row["resolved"] >= 3]
    wanted = pl.col("sequence_id").is_in([row["sequence_id"] for row in shown])
    known = _coordinates(pl.scan_parquet(subject.paths.clean("references")).filter(wanted), member="conformer")
    predicted = _coordinates(pl.scan_parquet(subject.predictions).filter(wanted), member="candidate")
    drawings = []
    for row in shown:
        trace_L3 = predicted[row["sequence_id"]][row["candidate"] - 1]
        references = [each for each in known[row["sequence_id"]] if np.isfinite(each).all(axis=1).sum() >= 3]
        distance = [float(rmsd(trace_L3, reference_L3)) for reference_L3 in references]
        nearest = int(np.argmin(distance))
        drawing = figures.traces(references[nearest], superpose(trace_L3, references[nearest]))
        caption = f"{subject.scores['metric']} {row['score']:.3f}, RMSD {distance[nearest]:.1f} Å, {row['length']} nt"
        drawings.append(page.figure(drawing, title=row["sequence_id"], caption=caption))
    words = (
        "C1' traces of targets evenly spaced by rank, the best first: the best candidate (thin, starting at the large "
        "dot) superposed by least squares on the known structure (broad), seen from where that is broadest."
    )
    return page.join(page.element("p", words, class_="note"), page.panels(drawings, small=True))


def _coordinates(table: pl.LazyFrame, *, member: str) -> dict[str, list[np.ndarray]]:
    """sequence_id -> [L, 3] Å of every member, in order; NaN where null."""
    found: dict[str, list[np.ndarray]] = {}
    for row in table.select("sequence_id", member, "x", "y", "z").sort("sequence_id", member).collect().iter_rows():
        found.setdefault(row[0], []).append(np.array(row[2:], dtype=np.float64).T)
    return found
