"""Report on predicted structures: both scores of the targets beside their floors, and traces on the known structures.

Letters: L length (nt), 3 xyz.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl

from pipeline.schema import MIN_RESOLVED
from pipeline.structure.geometry import Frame, rmsd
from submissions import figures, page
from submissions.page import Markup
from submissions.subject import Subject

_TRACES = 8  # targets whose traces are drawn
_TARGETS = 60  # targets in the figure of scores
_MATCHED, _ALIGNED = "residue-matched", "sequence-independent"


def structure_sections(subject: Subject) -> dict[str, tuple[str, Markup]]:
    """Anchor -> title and content of the parts that only predicted structures have."""
    rows = _by_rank(subject.scores)
    sections = {"targets": ("Targets", _targets_section(subject.scores, rows))}
    if test := subject.scores["test"]:
        sections["test"] = ("Test targets of known structure", _targets_section(test, _by_rank(test)))
    return sections | {"traces": ("Traces", _traces_section(subject, rows))}


def _by_rank(scores: Mapping[str, Any]) -> list[dict[str, Any]]:
    return sorted(scores["targets"], key=lambda row: (-row["score"], row["sequence_id"]))


def _evenly(rows: Sequence[Any], count: int) -> list[Any]:
    """At most `count` of some rows, evenly spaced, the first and the last among them."""
    places = np.unique(np.linspace(0, len(rows) - 1, min(count, len(rows))).round().astype(int))
    return [rows[at] for at in places]


def _targets_section(scores: Mapping[str, Any], rows: Sequence[Mapping[str, Any]]) -> Markup:
    shown = _evenly(rows, _TARGETS)
    modes = {_MATCHED: list(rows), _ALIGNED: [row | row["sequence_independent"] for row in rows]}
    ahead = {mode: sum(row["score"] > _floor(row) for row in found) for mode, found in modes.items()}
    words = (
        f"{ahead[_MATCHED]} of {len(rows)} targets beat every floor residue-matched (filled dots), {ahead[_ALIGNED]} "
        f"sequence-independent. Ticks: what shapes that read no sequence score ({', '.join(scores['floors'])})."
    )
    if len(shown) < len(rows):
        words += f" {len(shown)} targets are drawn, evenly spaced by rank."
    drawings = [
        page.figure(_dots(_evenly(found, _TARGETS), f"{scores['metric']}, {mode}, best of the candidates"), wide=True)
        for mode, found in modes.items()
    ]
    by_length = []
    for mode, found in modes.items():
        points = zip(*((row["length"], row["score"], _floor(row)) for row in found), strict=True)
        drawing = figures.scatter(*points, xlabel="length, nt", ylabel=scores["metric"])
        caption = "filled: prediction; open: best floor of the target"
        by_length.append(page.figure(drawing, title=f"By length, {mode}", caption=caption))
    notes = []
    if copied := scores.get("copies_note"):  # older scores have none
        notes.append(f"{copied}.")
    if unnamed := scores["sequence_independent"]["unnamed"]:
        notes.append(f"Aligned without residue names, which no table tells: {len(unnamed)} targets.")
    if lost := scores["without_reference"]:
        notes.append(f"No known structure, not scored: {len(lost):,} targets.")
    return page.join(
        _modes_table(scores),
        page.note(words),
        *drawings,
        page.panels(by_length),
        _lengths_table(scores),
        page.details(f"All {len(rows)} targets", _all_targets(rows)),
        *(page.note(note) for note in notes),
    )


def _floor(row: Mapping[str, Any]) -> float:
    return max(row["floors"].values())


def _dots(rows: Sequence[Mapping[str, Any]], xlabel: str) -> Markup:
    return figures.target_scores(
        [row["sequence_id"] for row in rows],
        [row["score"] for row in rows],
        [list(row["floors"].values()) for row in rows],
        xlabel=xlabel,
    )


def _modes_table(scores: Mapping[str, Any]) -> Markup:
    """Both metrics, their floors, and who computed them."""
    both = scores, scores["sequence_independent"]
    rows = [
        ["best of the candidates", *(page.number(each["score"]) for each in both)],
        ["candidate 1 alone", *(page.number(each["first_candidate"]) for each in both)],
        *([f"floor: {name}", *(page.number(each["floors"][name]) for each in both)] for name in scores["floors"]),
        ["computed by", *(each["engine"] for each in both)],
        ["floors by", *(each["floor_engine"] for each in both)],
    ]
    kinds = ["own", "", *["floor"] * len(scores["floors"]), "", ""]
    return page.table(
        [f"{scores['metric']}, {len(scores['targets'])} targets", _MATCHED, _ALIGNED], rows, classes=kinds
    )


def _lengths_table(scores: Mapping[str, Any]) -> Markup:
    rows = [
        [
            matched["length"],
            matched["targets"],
            *(page.number(each[key]) for each in (matched, aligned) for key in ("score", "best_floor")),
        ]
        for matched, aligned in zip(scores["by_length"], scores["sequence_independent"]["by_length"], strict=True)
    ]
    return page.table(["length", "targets", _MATCHED, "best floor", _ALIGNED, "best floor"], rows)


def _all_targets(rows: Sequence[Mapping[str, Any]]) -> Markup:
    head = ["target", "length, nt", "resolved", "references", "from templates", _MATCHED, "candidate", "best floor"]
    cells = [
        [
            *(row[key] for key in ("sequence_id", "length", "resolved", "references", "templates")),
            page.number(row["score"]),
            row["candidate"],
            page.number(_floor(row)),
            page.number(row["sequence_independent"]["score"]),
            page.number(_floor(row["sequence_independent"])),
        ]
        for row in rows
    ]
    return page.table([*head, _ALIGNED, "best floor"], cells)


def _traces_section(subject: Subject, rows: Sequence[Mapping[str, Any]]) -> Markup:
    shown = [row for row in _evenly(rows, _TRACES) if row["resolved"] >= MIN_RESOLVED]
    wanted = pl.col("sequence_id").is_in([row["sequence_id"] for row in shown])
    known = _coordinates(pl.scan_parquet(subject.paths.clean("references")).filter(wanted), member="conformer")
    predicted = _coordinates(pl.scan_parquet(subject.predictions).filter(wanted), member="candidate")
    drawings = []
    for row in shown:
        trace_L3 = predicted[row["sequence_id"]][row["candidate"] - 1]
        references = [each for each in known[row["sequence_id"]] if np.isfinite(each).all(axis=1).sum() >= MIN_RESOLVED]
        distance, nearest, moved_L3 = min((_laid(trace_L3, each) for each in references), key=lambda laid: laid[0])
        drawing = figures.traces(nearest, moved_L3)
        caption = f"{subject.scores['metric']} {row['score']:.3f}, RMSD {distance:.1f} Å, {row['length']} nt"
        drawings.append(page.figure(drawing, title=row["sequence_id"], caption=caption))
    words = (
        "C1' traces of targets evenly spaced by rank, the best first: the best candidate (thin, starting at the large "
        "dot) superposed by least squares on the known structure (broad), seen from where that is broadest."
    )
    return page.join(page.note(words), page.panels(drawings, small=True))


def _laid(trace_L3: np.ndarray, reference_L3: np.ndarray) -> tuple[float, np.ndarray, np.ndarray]:
    """RMSD, Å, the known structure, and the trace moved onto it by what is resolved in both."""
    common_L = np.isfinite(trace_L3).all(axis=1) & np.isfinite(reference_L3).all(axis=1)
    mobile_P3, fixed_P3 = trace_L3[common_L], reference_L3[common_L]
    return rmsd(mobile_P3, fixed_P3), reference_L3, Frame.fitted(mobile_P3, fixed_P3).place(trace_L3)


def _coordinates(table: pl.LazyFrame, *, member: str) -> dict[str, list[np.ndarray]]:
    """sequence_id -> [L, 3] Å of every member, in order; NaN where null."""
    found: dict[str, list[np.ndarray]] = {}
    for row in table.select("sequence_id", member, "x", "y", "z").sort("sequence_id", member).collect().iter_rows():
        found.setdefault(row[0], []).append(np.array(row[2:], dtype=np.float64).T)
    return found
