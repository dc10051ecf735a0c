"""Drawings of the report, one function each. Labels tell the unit; a colour is a place in the series.

Letters: N sequences, L positions, B bins, 3 xyz.
"""

from collections.abc import Mapping, Sequence

import numpy as np

from submissions.canvas import BLANK, DASHED, DENSITY, HEAT_MAP, INK, MUTED, PAPER, SERIES, canvas, colour_of
from submissions.page import Markup


def curves(
    lines: Mapping[int, tuple[Sequence[float], Sequence[float]]],
    *,
    xlabel: str,
    ylabel: str,
    level: tuple[str, float] | None = None,
) -> Markup:
    """One line per fold, over training steps.

    Args:
        lines: fold -> (x, y).
        xlabel: with unit, as all labels here.
        ylabel: likewise.
        level: name and height of a horizontal line to compare with.
    """
    with canvas(4.6, 2.9) as made:
        axes = made.axes
        for place, (x, y) in enumerate(lines.values()):
            axes.plot(x, y, color=colour_of(place), linewidth=1.6, marker="o" if len(x) == 1 else None)
        if level:
            axes.axhline(level[1], **DASHED)
            # above the axes: beside its line it would lie on others, which end on both sides of it
            axes.set_title(f"– –  {level[0]}", loc="right", color=MUTED, fontsize=9, pad=4)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.set_xlim(left=0)
        axes.locator_params(axis="x", integer=True)
    return made.drawing


def calibration(counts_BB: np.ndarray, *, low: float, high: float, unit: str, colour: int) -> Markup:
    """Measured against predicted: density, mean and middle half of the measured values by predicted bin.

    `counts_BB` are positions by (predicted, measured) bin, both from `low` to `high`, in `unit`.
    """
    bins = len(counts_BB)
    middles = low + (np.arange(bins) + 0.5) * (high - low) / bins
    coarse_PB = counts_BB.reshape(bins // _MERGE, _MERGE, bins).sum(axis=1)
    total_P = coarse_PB.sum(axis=1)
    enough = total_P >= max(20, 2e-4 * total_P.sum())
    predicted_P = middles.reshape(-1, _MERGE).mean(axis=1)[enough]
    mean_P = (coarse_PB @ middles)[enough] / total_P[enough]
    cumulated = np.cumsum(coarse_PB, axis=1)[enough] / total_P[enough, None]
    quarter, three = (middles[np.argmax(cumulated >= share, axis=1)] for share in (0.25, 0.75))
    with canvas(4.2, 3.7) as made:
        axes = made.axes
        density = np.log1p(counts_BB.T) / np.log1p(max(counts_BB.max(), 1))
        axes.imshow(density, origin="lower", extent=(low, high, low, high), cmap=DENSITY, interpolation="none")
        axes.plot([low, high], [low, high], **DASHED)
        axes.fill_between(predicted_P, quarter, three, color=colour_of(colour), alpha=0.22, linewidth=0)
        axes.plot(predicted_P, mean_P, color=colour_of(colour), linewidth=2, marker="o", markersize=3.5)
        axes.set(xlim=(low, high), ylim=(low, high), xlabel=f"predicted, {unit}", ylabel=f"measured, {unit}")
        axes.set_aspect("equal")
        axes.grid(visible=False)
    return made.drawing


_MERGE = 5  # fine bins of a point on the calibration line


def points(predicted_N: np.ndarray, measured_N: np.ndarray, *, unit: str, colour: int) -> Markup:
    """Measured against predicted, a dot for each sequence: for so few that a density would say nothing."""
    low = float(min(predicted_N.min(), measured_N.min()))
    high = float(max(predicted_N.max(), measured_N.max()))
    room = 0.04 * (high - low) or 0.5
    ends = (low - room, high + room)
    with canvas(4.2, 3.7) as made:
        axes = made.axes
        axes.plot(ends, ends, **DASHED)
        axes.plot(predicted_N, measured_N, "o", color=colour_of(colour), markersize=3.2, alpha=0.55, mew=0)
        axes.set(xlim=ends, ylim=ends, xlabel=f"predicted, {unit}", ylabel=f"measured, {unit}")
        axes.set_aspect("equal")
    return made.drawing


def residuals(x_N: np.ndarray, residual_N: np.ndarray, *, xlabel: str, ylabel: str, colour: int) -> Markup:
    """Predicted less measured: median, and the middle half and nine tenths, along a property of the sequences.

    Groups along it hold about equally many.
    """
    edges = np.unique(np.quantile(x_N, np.linspace(0, 1, min(_GROUPS, max(2, len(x_N) // 12)) + 1)[1:], method="lower"))
    of_N = np.searchsorted(edges, x_N)
    groups = [residual_N[of_N == group] for group in range(len(edges))]
    at = [float(x_N[of_N == group].mean()) for group in range(len(edges))]
    low, quarter, middle, three, high = np.array(
        [np.quantile(group, (0.05, 0.25, 0.5, 0.75, 0.95)) for group in groups]
    ).T
    with canvas(4.6, 2.9) as made:
        axes = made.axes
        axes.axhline(0.0, **DASHED)
        axes.fill_between(at, low, high, color=colour_of(colour), alpha=0.12, linewidth=0)
        axes.fill_between(at, quarter, three, color=colour_of(colour), alpha=0.22, linewidth=0)
        axes.plot(at, middle, color=colour_of(colour), linewidth=2, marker="o", markersize=3.5)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.margins(x=0.02)
    return made.drawing


_GROUPS = 12  # along the x axis of residuals


def grouped_bars(
    labels: Sequence[str], values: Mapping[int, Sequence[float]], *, xlabel: str, ylabel: str, notes: Sequence[str] = ()
) -> Markup:
    """Bars side by side for every label, one per series, with their heights written on them where there is room.

    `values` are place in the series -> height of each group; `notes` stand under the labels.
    """
    width, most = 0.8 / len(values), max(map(max, values.values()))
    with canvas(4.6, 2.9) as made:
        axes = made.axes
        for at, (place, heights) in enumerate(values.items()):
            x = np.arange(len(labels)) + (at - (len(values) - 1) / 2) * width
            drawn = axes.bar(x, heights, width * 0.92, color=colour_of(place))
            if len(labels) * len(values) <= 12:
                written = [f"{height:.2f}" if most >= 0.1 else f"{height:.2g}" for height in heights]
                axes.bar_label(drawn, written, padding=2, fontsize=8, color=MUTED)
        texts = [f"{label}\n{note}" for label, note in zip(labels, notes, strict=True)] if notes else labels
        axes.set_xticks(range(len(labels)), texts, fontsize=9)
        axes.tick_params(axis="x", length=0)
        axes.grid(visible=False, axis="x")
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.locator_params(axis="y", nbins=5)
        axes.margins(y=0.12)
    return made.drawing


def rates(
    lines: Sequence[tuple[np.ndarray, np.ndarray]], *, xlabel: str, ylabel: str, chance: Sequence[tuple[float, float]]
) -> Markup:
    """Lines in the unit square, one for each class: the first `len(SERIES)` in colour, those after them in grey.

    `chance` are the ends of a dashed line, what guessing reaches.
    """
    with canvas(4.2, 3.7) as made:
        axes = made.axes
        for place, (x, y) in reversed(list(enumerate(lines))):
            named = place < len(SERIES)
            colour, width = (SERIES[place], 1.7) if named else (MUTED, 0.7)
            axes.plot(x, y, color=colour, linewidth=width, alpha=1.0 if named else 0.5)
        axes.plot(*zip(*chance, strict=True), **DASHED)
        axes.set(xlim=(-0.01, 1.01), ylim=(-0.01, 1.01), xlabel=xlabel, ylabel=ylabel, aspect="equal")
    return made.drawing


def reliability(rows: Sequence[Mapping[str, float]], *, bins: int, stated: str, right: str) -> Markup:
    """What came true against the probability that was stated, and how many cases there are of each.

    Args:
        rows: ``low``, ``stated``, ``right`` (share) and ``count`` of every bin that is not empty.
        bins: from 0 to 1.
        stated: in words, as `right`.
        right: what came true.
    """
    names = ("low", "stated", "right", "count")
    low_B, stated_B, right_B, count_B = (np.array([row[name] for row in rows]) for name in names)
    with canvas(9.4, 3.5, ncols=2) as made:
        line, bars = made.figure.axes
        line.plot([0, 1], [0, 1], **DASHED)
        line.plot(stated_B, right_B, color=SERIES[0], linewidth=2, marker="o", markersize=4)
        line.set(xlim=(-0.02, 1.02), ylim=(-0.02, 1.02), xlabel=stated, ylabel=right)
        middle_B, width = low_B + 0.5 / bins, 0.9 / bins
        bars.bar(middle_B, count_B * right_B, width, color=SERIES[0])
        bars.bar(middle_B, count_B * (1 - right_B), width, bottom=count_B * right_B, color=SERIES[1])
        bars.grid(visible=False, axis="x")
        bars.set(xlim=(-0.02, 1.02), xlabel=stated, ylabel="cases")
    return made.drawing


def class_map(share_KK: np.ndarray, names: Sequence[str]) -> Markup:
    """How often K classes (rows) are taken for others (columns), as shares of the row; NaN is left blank."""
    side = 1.6 + 0.16 * len(names)
    with canvas(side + 0.6, side) as made:
        axes = made.axes
        axes.imshow(share_KK, **HEAT_MAP)
        axes.set_facecolor(BLANK)
        axes.set_xticks(range(len(names)), names, rotation=90, fontsize=7)
        axes.set_yticks(range(len(names)), names, fontsize=7)
        axes.tick_params(length=0)
        axes.grid(visible=False)
        axes.set(xlabel="decided", ylabel="true")
    return made.drawing


def profile(x: Sequence[float], values: Mapping[int, Sequence[float]], *, xlabel: str, ylabel: str) -> Markup:
    """Lines over positions, one per place in the series."""
    with canvas(9.4, 2.6) as made:
        axes = made.axes
        for place, heights in values.items():
            axes.plot(x, heights, color=colour_of(place), linewidth=1.4)
        axes.set(xlabel=xlabel, ylabel=ylabel)
        axes.set_ylim(bottom=0)
        axes.margins(x=0.01)
    return made.drawing


def strip(letters: str, rows: Sequence[tuple[str, np.ndarray]], *, first: int) -> Markup:
    """Measured and predicted values of one sequence as pairs of rows of coloured cells under its letters.

    Args:
        letters: of the positions shown.
        rows: label and [L] values, from 0 (the palest colour) to 1; NaN is left blank.
        first: 1-based number of the first position.
    """
    length = len(letters)
    with canvas(10.4, 0.62 + 0.21 * len(rows)) as made:
        axes = made.axes
        heights = [row + (row // 2) * 0.45 for row in range(len(rows))]
        for height, (_, values_L) in zip(heights, rows, strict=True):
            axes.axhspan(height + 0.04, height + 0.96, color=BLANK, linewidth=0, zorder=-1)
            extent = (first - 0.5, first + length - 0.5, height + 0.96, height + 0.04)
            axes.imshow(values_L[None], **HEAT_MAP, aspect="auto", extent=extent)
        axes.set(xlim=(first - 0.5, first + length - 0.5), ylim=(heights[-1] + 1.0, 0.0))
        axes.set_yticks([height + 0.5 for height in heights], [label for label, _ in rows], fontsize=9)
        axes.set_xticks([at for at in range(first, first + length) if at % 10 == 0])
        axes.tick_params(length=2)
        axes.grid(visible=False)
        axes.spines[:].set_visible(False)
        if length <= 180:
            size = min(8.0, 8.6 * 72 / length / 0.8)
            for at, letter in enumerate(letters, start=first):
                axes.text(at, -0.12, letter, ha="center", va="bottom", fontsize=size, color=MUTED, in_layout=False)
            axes.set_title(" ", fontsize=7, pad=2)  # keeps their place: measuring every letter takes half a second
        axes.set_xlabel("position, nt", labelpad=1, fontsize=9)
    return made.drawing


def heat_maps(maps: Sequence[tuple[str, np.ndarray]], *, first: int, ylabel: str) -> Markup:
    """Maps of many sequences side by side.

    Args:
        maps: title and [N, L] values, from 0 (the palest colour) to 1; NaN is left blank.
        first: 1-based number of the first position.
        ylabel: what the rows are.
    """
    with canvas(10.4, 4.0, ncols=len(maps), sharey=True) as made:
        for axes, (title, values_NL) in zip(made.figure.axes, maps, strict=True):
            count, length = values_NL.shape
            extent = (first - 0.5, first + length - 0.5, count, 0)
            axes.imshow(values_NL, **HEAT_MAP, aspect="auto", extent=extent)
            axes.set_facecolor(BLANK)
            axes.set_title(title, fontsize=10, color=INK)
            axes.set_xlabel("position, nt")
            axes.grid(visible=False)
            axes.tick_params(length=2)
            axes.set_yticks([])
        made.axes.set_ylabel(ylabel)
    return made.drawing


def target_scores(
    labels: Sequence[str], scores: Sequence[float], floors: Sequence[Sequence[float]], *, xlabel: str
) -> Markup:
    """One line per target, from the top: its score as a dot, its floors as ticks, joined to the best of them."""
    rows, score = np.arange(len(labels)), np.asarray(scores)
    best = np.array([max(values) for values in floors])
    ahead = score >= best
    with canvas(9.4, 0.75 + 0.2 * len(labels)) as made:
        axes = made.axes
        axes.hlines(rows, best, scores, color=MUTED, linewidth=0.8)
        for row, values in enumerate(floors):
            axes.plot(values, np.full(len(values), row), "|", color=MUTED, markersize=7, markeredgewidth=1.0)
        axes.scatter(score[ahead], rows[ahead], s=34, color=SERIES[0], zorder=3)
        axes.scatter(score[~ahead], rows[~ahead], s=30, facecolor=PAPER, edgecolor=SERIES[1], linewidth=1.5, zorder=3)
        axes.set_yticks(rows, labels, fontsize=8.5)
        axes.tick_params(axis="y", length=0)
        axes.grid(visible=False, axis="y")
        axes.set(xlabel=xlabel, xlim=(0, 1.02), ylim=(len(labels) - 0.4, -0.6))
    return made.drawing


def scatter(
    x: Sequence[float], scores: Sequence[float], floors: Sequence[float], *, xlabel: str, ylabel: str
) -> Markup:
    """Scores of targets and of their best floors over a property of the target."""
    with canvas(4.6, 3.0) as made:
        axes = made.axes
        axes.scatter(x, floors, s=16, facecolor="none", edgecolor=MUTED, linewidth=0.9)
        axes.scatter(x, scores, s=20, color=SERIES[0])
        axes.set(xlabel=xlabel, ylabel=ylabel, ylim=(0, 1.03))
    return made.drawing


def traces(truth_L3: np.ndarray, prediction_L3: np.ndarray) -> Markup:
    """A predicted trace on the true one, seen from where the true one is broadest.

    Args:
        truth_L3: [L, 3] Å, NaN where unresolved.
        prediction_L3: [L, 3] Å, superposed on it.
    """
    known = np.isfinite(truth_L3).all(axis=1)
    centre = truth_L3[known].mean(axis=0)
    _, _, directions = np.linalg.svd(truth_L3[known] - centre, full_matrices=False)
    directions *= np.sign(directions[:, np.argmax(np.abs(directions), axis=1)].diagonal())[:, None]
    flat_truth, flat_prediction = ((trace - centre) @ directions[:2].T for trace in (truth_L3, prediction_L3))
    flats = np.concatenate([flat_truth[known], flat_prediction])
    reach = 1.08 * max(np.abs(flats[:, 0]).max(), np.abs(flats[:, 1]).max() / _LANDSCAPE)
    with canvas(2.6, 2.6 * _LANDSCAPE) as made:
        axes = made.axes
        axes.plot(*flat_truth.T, color=MUTED, linewidth=3.2, alpha=0.55, solid_joinstyle="round")
        axes.plot(*flat_prediction.T, color=SERIES[0], linewidth=1.2, marker="o", markersize=1.8)
        axes.plot(*flat_prediction[0], marker="o", color=SERIES[1], markersize=4.5)
        axes.set(xlim=(-reach, reach), ylim=(-reach * _LANDSCAPE, reach * _LANDSCAPE), aspect="equal")
        left, low, bar = -0.97 * reach, -0.97 * reach * _LANDSCAPE, 10.0 if reach < 60 else 50.0
        axes.plot([left, left + bar], [low, low], color=INK, linewidth=1.4)
        axes.annotate(f"{bar:.0f} Å", (left, low), (0, 3), textcoords="offset points", fontsize=8, color=MUTED)
        axes.set_axis_off()
    return made.drawing


_LANDSCAPE = 0.78  # height of a trace's picture over its width
