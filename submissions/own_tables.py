"""Predictions for one's own sequences: a table that a spreadsheet opens, one for programs, and a page of profiles.

Letters: L length (nt), C targets.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from pipeline.competitions.base import Competition
from pipeline.labels import read_classes
from pipeline.paths import Paths
from pipeline.runlog import amount
from pipeline.stage import Report, run_stage
from pipeline.tables import read_batches
from submissions import page
from submissions.class_scores import decide
from submissions.class_write import joined_labels
from submissions.page import Markup
from submissions.subject import short_name

#: Raised when the same predictions give other files than before.
VERSION = 4
_SHOWN = 50  # sequences on the page
_SHOWN_NT = 2_000  # of each of them
_ROWS = 1_024  # sequences of a CSV that are in memory as rows
_DIGITS = 5  # that count, of a value in a CSV
_LINE, _CELL, _BARS, _GAP = 100, 9, 54, 16  # nt of a line; units of a nucleotide, of the highest bar, between targets


def run(
    paths: Paths,
    *,
    competition: Competition,
    name: str,
    folder: Path,
    title: str,
    longest: int | None = None,
    thresholds: np.ndarray | float = 0.5,
) -> Report:
    """Write ``<name>.csv`` and, of values per nucleotide, ``<name>.parquet`` and ``<name>.html``.

    Sequences are in the order of their file. Of values the CSV has a row for each nucleotide: ``sequence_id``,
    ``position`` (from 1), ``nucleotide`` and the targets; of classes a row for each sequence: ``sequence_id``, the
    probability of each class, ``most_probable`` and, where several are possible, ``labels``, those that reach their
    thresholds, with ";" between; of numbers likewise, a column for each. Values lie within the competition's range, as
    in a submission.

    Args:
        paths: where the file's clean test table and the joined predictions are.
        competition: what is predicted.
        name: of what was joined, below ``ensembles/``.
        folder: for the files.
        title: of the page.
        longest: nt of the longest sequence that was trained on; longer ones are marked.
        thresholds: [K] or one for all, what the probability of a label must reach.

    Raises:
        DataError: a table is missing or damaged.
    """
    outputs = {"table": folder / f"{name}.csv"}
    if competition.task == "values":
        outputs |= {"values": folder / f"{name}.parquet", "page": folder / f"{name}.html"}
    predictions = paths.ensemble_dir(name) / "test.parquet"
    inputs = {"sequences": paths.clean("test"), "predictions": predictions}
    if competition.task == "classes":
        inputs["classes"] = paths.clean("classes")

    def build(parts: dict[str, Path]) -> dict[str, Any]:
        table = _in_order(paths.clean("test"), predictions)
        if competition.task == "values":
            return _write_values(table, competition, parts, longest, title=title, name=name)
        wide = _classes(table, paths, thresholds) if competition.task == "classes" else _numbers(table, competition)
        _rounded(wide).write_csv(parts["table"])
        return {"sequences": wide.height}

    return run_stage(
        "own-predictions",
        inputs=inputs,
        outputs=outputs,
        params={"version": VERSION, "title": title, "longest": longest, **competition.params}
        | {"thresholds": np.atleast_1d(thresholds).tolist()},
        build=build,
        manifest=folder / f"{name}.manifest.json",
    )


def _in_order(sequences: Path, predictions: Path) -> pl.DataFrame:
    """``sequence_id, sequence`` and the predictions, in the order of the sequences."""
    first = pl.concat(list(read_batches(sequences, ["sequence_id", "sequence"])))
    found = pl.read_parquet(predictions)
    return first.join(found, on="sequence_id", how="left", maintain_order="left", validate="1:1")


def _classes(table: pl.DataFrame, paths: Paths, thresholds: np.ndarray | float) -> pl.DataFrame:
    classes = read_classes(paths)
    names = classes.names
    probability_NC = np.stack(table["probabilities"].to_list())
    columns = {f"p({name})": probability_NC[:, place] for place, name in enumerate(names)}
    likely = [names[place] for place in probability_NC.argmax(axis=1)]
    wide = pl.DataFrame({"sequence_id": table["sequence_id"], **columns, "most_probable": likely})
    if classes.exclusive:
        return wide
    decided_NC = decide(probability_NC, exclusive=False, thresholds=thresholds)
    return wide.with_columns(pl.Series("labels", joined_labels(decided_NC, classes)))


def _numbers(table: pl.DataFrame, competition: Competition) -> pl.DataFrame:
    number_NC = np.stack(table["numbers"].to_list())
    columns = {target: number_NC[:, place] for place, target in enumerate(competition.targets)}
    return table.select("sequence_id").with_columns(**columns)


def _rounded(table: pl.DataFrame) -> pl.DataFrame:
    """For people: digits that count are kept whatever the unit."""
    return table.with_columns(pl.selectors.float().round_sig_figs(_DIGITS))


# --------------------------------------------------------------------------------------------------------------- values


def _write_values(
    table: pl.DataFrame, competition: Competition, parts: dict[str, Path], longest: int | None, *, title: str, name: str
) -> dict[str, Any]:
    low, high = competition.target_range or (None, None)
    targets = list(competition.targets)
    table = table.select("sequence_id", "sequence", pl.col(targets).list.eval(pl.element().clip(low, high)))
    table.write_parquet(parts["values"], compression="zstd")
    with parts["table"].open("wb") as handle:
        for start in range(0, table.height, _ROWS):
            rows = _by_nucleotide(table.slice(start, _ROWS), targets)
            _rounded(rows).write_csv(handle, include_header=start == 0)
    parts["page"].write_text(_page(table, competition, longest, title=title, name=name), encoding="utf-8")
    return {"sequences": table.height, "nucleotides": int(table["sequence"].str.len_bytes().cast(pl.Int64).sum())}


def _by_nucleotide(table: pl.DataFrame, targets: Sequence[str]) -> pl.DataFrame:
    letters = pl.col("sequence").str.split("").alias("nucleotide")
    positions = pl.int_ranges(1, pl.col("sequence").str.len_bytes() + 1).alias("position")
    columns = ["position", "nucleotide", *targets]
    return table.with_columns(letters, positions).select("sequence_id", *columns).explode(columns)


def _page(table: pl.DataFrame, competition: Competition, longest: int | None, *, title: str, name: str) -> str:
    low_C1, high_C1 = np.array(competition.shown_ranges).T[..., None]
    base_C1 = np.clip(0.0, low_C1, high_C1)  # bars begin at 0, or at the edge that is next to it
    names = [short_name(target) for target in competition.targets]
    shown = table.head(_SHOWN)
    words = [f"{amount(table.height, 'sequence')}, predicted by {name}.", competition.meaning]
    words += [_told_ends(competition.shown_ranges, names), f"Every value is in {name}.csv."]
    if table.height > shown.height:
        words.append(f"Drawn: the first {shown.height}.")
    drawings = []
    for sequence_id, sequence, *values in shown.iter_rows():
        about = f"{sequence_id} · {len(sequence):,} nt"
        about += f", longer than the {longest:,} nt of training" if longest and len(sequence) > longest else ""
        about += f", the first {_SHOWN_NT:,} drawn" if len(sequence) > _SHOWN_NT else ""
        shares_CL = (np.array(values)[:, :_SHOWN_NT] - low_C1) / (high_C1 - low_C1)
        bases = ((base_C1 - low_C1) / (high_C1 - low_C1))[:, 0].tolist()
        drawing = profile_drawing(sequence[:_SHOWN_NT], shares_CL.clip(0.0, 1.0), names, bases=bases)
        drawings.append(page.figure(drawing, title=about, wide=True))
    key = page.legend([(label, page.series_colour(place)) for place, label in enumerate(names)])
    body = page.join(
        page.element("div", competition.title, class_="kicker"),
        page.element("h1", title),
        page.note(" ".join(filter(None, words))),
        key,
        *drawings,
    )
    return page.page(title, body)


def _told_ends(ranges: Sequence[tuple[float, float]], names: Sequence[str]) -> str:
    """Where bars begin and are cut, in a sentence; of every target where they differ.

    >>> _told_ends([(0.0, 1.0), (0.0, 1.0)], ["DMS", "2A3"])
    'Bars begin at 0 and are cut at 1.'
    >>> _told_ends([(-5.0, 5.0), (0.0, 1.0)], ["a", "b"])
    'Bars begin at 0 and are cut at -5 and 5 (a); begin at 0 and are cut at 1 (b).'
    """
    told = []
    for low, high in ranges:
        base = min(max(low, 0.0), high)
        told.append(f"begin at {base:g} and are cut at {f'{low:g} and ' if low < base else ''}{high:g}")
    each = [f"{words} ({name})" for words, name in zip(told, names, strict=True)]
    return f"Bars {told[0] if len(set(told)) == 1 else '; '.join(each)}."


def profile_drawing(letters: str, heights_CL: np.ndarray, names: Sequence[str], *, bases: Sequence[float]) -> Markup:
    """Bars of a sequence's values over its letters, a hundred nucleotides a line.

    Drawn without matplotlib, which takes a second for the letters of a few hundred nucleotides.

    Args:
        letters: [L].
        heights_CL: [C, L] in [0, 1].
        names: of the targets, for those who listen.
        bases: [C] in [0, 1], where bars begin.
    """
    lines = [slice(start, start + _LINE) for start in range(0, len(letters), _LINE)]
    height = len(names) * (_BARS + _GAP) + 2 * _GAP
    width = _LINE * _CELL + 2 * _CELL  # also of a short sequence, whose letters have the same size; room for numbers
    parts = [
        _line(letters[line], heights_CL[:, line], bases, first=line.start, top=number * height)
        for number, line in enumerate(lines)
    ]
    return Markup(
        f'<svg viewBox="0 0 {width} {len(lines) * height}" role="img" '
        f'aria-label="{page.text(", ".join(names))} along the sequence" font-family="var(--mono)" font-size="{_CELL}" '
        f'text-anchor="middle">{"".join(parts)}</svg>'
    )


def _line(letters: str, heights_CL: np.ndarray, bases: Sequence[float], *, first: int, top: int) -> str:
    """One line: a row of bars for each target, the letters, and every tenth position."""
    parts = []
    for place, (heights_L, base) in enumerate(zip(heights_CL, bases, strict=True)):
        foot = top + (place + 1) * (_BARS + _GAP) - _GAP // 2
        zero = foot - round(base * _BARS)
        bars = "".join(
            f"M{at * _CELL + 1} {zero}v{(base - share) * _BARS:.1f}h{_CELL - 2}V{zero}z"
            for at, share in enumerate(heights_L)
        )
        parts.append(
            f'<path d="M0 {zero}.5h{len(letters) * _CELL}M0 {foot - _BARS}.5h{len(letters) * _CELL}" '
            'stroke="var(--line)"/>'
            f'<path d="{bars}" fill="{page.series_colour(place)}"/>'
        )
    foot = top + len(heights_CL) * (_BARS + _GAP) + _GAP // 2
    places = " ".join(str(at * _CELL + _CELL / 2) for at in range(len(letters)))
    parts.append(f'<text x="{places}" y="{foot}" fill="var(--ink)">{page.text(letters)}</text>')
    for at in range(len(letters)):
        if (first + at + 1) % 10 == 0:
            x = at * _CELL + _CELL / 2
            parts.append(f'<text x="{x}" y="{foot + _CELL + 2}" fill="var(--muted)">{first + at + 1}</text>')
    return "".join(parts)
