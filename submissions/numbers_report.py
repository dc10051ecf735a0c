"""Report on predicted numbers: every column, measured against predicted, and where the errors are.

Letters: N sequences, C columns of numbers, B bins.
"""

from typing import Any

import numpy as np

from pipeline.runlog import score_text
from submissions import figures, page
from submissions.number_evaluation import answers_of
from submissions.number_scores import SCORES, tell
from submissions.page import Markup
from submissions.subject import Subject, beginning, brief, test_table, without_prediction
from submissions.whole_scores import Predicted, read_predicted

_BINS = 100  # of a density, along each axis
_DOTS = 1000  # most sequences that are drawn one by one
_DRAWN = 12  # most columns that are drawn, and beside floors
_WORST = 12
_ENDS = (0.2, 99.8)  # percentiles between which a density is drawn


def numbers_sections(subject: Subject) -> dict[str, tuple[str, Markup]]:
    """Anchor -> title and content of the parts that only predicted numbers have; one pass over all predictions."""
    own = read_predicted(
        subject.paths, answers_of(subject.competition), split=subject.split, folds=subject.folds,
        tables=subject.predictions, name=subject.name,
    )  # fmt: skip
    return {
        "columns": ("Every number", _columns_section(subject)),
        "measured": ("Measured and predicted", _measured_section(subject, own)),
        "errors": ("Where the errors are", _errors_section(subject, own)),
    }


def _columns_section(subject: Subject) -> Markup:
    scores = subject.scores
    rows: list[list[Any]] = []
    for place, row in enumerate(scores["per_column"]):
        rows.append([row["column"], f"{row['measured']:,}", *(tell(row[name], name) for name in SCORES)])
        for floor, told in scores["floor_details"].items() if place < _DRAWN else ():
            rows.append([f"floor: {floor}", "", *(tell(told["per_column"][place][name], name) for name in SCORES)])
    kinds = ["floor" if row[1] == "" else "" for row in rows]
    words = (
        "RMSE and MAE are in the units of the data, here and above. R²: the share of the variance that is predicted, 0 "
        "for predicting the mean; Spearman: correlation of the ranks. Undefined: of numbers that do not vary."
    )
    if len(scores["per_column"]) > 1:
        words += f" {scores['metric']} is the mean of the columns' RMSE: those of large numbers decide it."
    return page.join(page.note(words), page.table(["", "measured", *SCORES], rows, classes=kinds), test_table(scores))


def _columns_drawn(subject: Subject, own: Predicted) -> list[tuple[int, str, np.ndarray]]:
    """Place and name of the columns that are drawn, and which sequences they were measured of."""
    here_NC = np.isfinite(own.truth_NK)
    named = enumerate(subject.competition.targets)
    return [(place, name, here_NC[:, place]) for place, name in named if here_NC[:, place].any()][:_DRAWN]


def _measured_section(subject: Subject, own: Predicted) -> Markup:
    drawings = []
    for place, name, here_N in _columns_drawn(subject, own):
        pair = own.said_NK[here_N, place].astype(np.float64), own.truth_NK[here_N, place]
        drawing = figures.points if len(pair[0]) <= _DOTS else _density
        drawn = drawing(*pair, unit=brief(name), colour=place % len(figures.SERIES))
        drawings.append(page.figure(drawn, title=name))
    words = "Dashed: perfect predictions."
    if len(own.ids) > _DOTS:
        words += (
            " Points: mean of the measured numbers whose prediction falls into a bin; band: their middle half; grey: "
            "density of sequences. Numbers outside the axes are drawn at their ends."
        )
    if len(subject.competition.targets) > _DRAWN:
        words += f" Drawn are the first {_DRAWN} of {len(subject.competition.targets)} columns."
    return page.join(page.note(words), page.panels(drawings))


def _density(predicted_N: np.ndarray, measured_N: np.ndarray, *, unit: str, colour: int) -> Markup:
    ends = np.percentile(np.concatenate([predicted_N, measured_N]), _ENDS)
    low, high = (float(end) for end in ends) if ends[1] > ends[0] else (float(ends[0]) - 0.5, float(ends[0]) + 0.5)

    def bins(values_N: np.ndarray) -> np.ndarray:
        return np.clip((values_N - low) / (high - low) * _BINS, 0, _BINS - 1).astype(np.intp)

    cell_N = bins(predicted_N) * _BINS + bins(measured_N)
    counts_BB = np.bincount(cell_N, minlength=_BINS**2).reshape(_BINS, _BINS).astype(np.float64)
    return figures.calibration(counts_BB, low=low, high=high, unit=unit, colour=colour)


def _errors_section(subject: Subject, own: Predicted) -> Markup:
    scores, length_N = subject.scores, own.lengths()
    parts = []
    if len(np.unique(length_N)) > 1:
        drawings = []
        for place, name, here_N in _columns_drawn(subject, own):
            residual_N = own.said_NK[here_N, place] - own.truth_NK[here_N, place]
            drawing = figures.residuals(
                length_N[here_N], residual_N, xlabel="length, letters", ylabel="predicted - measured", colour=place
            )
            drawings.append(page.figure(drawing, title=name))
        words = "Line: median of predicted less measured; bands: the middle half and nine tenths."
        cells = [
            [row["label"].replace("-", "–"), score_text(row["score"]), f"{row['sequences']:,}"]
            for row in scores["by_length"]
        ]
        parts += [page.element("h3", "By length"), page.note(words), page.panels(drawings)]
        parts += [page.details("By length, in numbers", page.table(["length", scores["metric"], "sequences"], cells))]
    else:
        parts += [page.note(f"All sequences have {length_N[0]:,} letters.")]
    parts += [page.element("h3", "The largest errors"), _worst(subject, own)]
    return page.join(*parts, without_prediction(scores))


def _worst(subject: Subject, own: Predicted) -> Markup:
    """Sequences whose numbers are farthest from the predicted ones, in units of each column's standard deviation."""
    known = [truth_N[np.isfinite(truth_N)] for truth_N in own.truth_NK.T]
    unit_C = np.array([truth_n.std() if len(truth_n) and np.ptp(truth_n) > 0 else 1.0 for truth_n in known])
    off_NC = (own.said_NK - own.truth_NK) / unit_C
    size = np.where(np.isfinite(off_NC), np.abs(off_NC), -1.0).ravel()
    worst = np.argsort(-size, kind="stable")[:_WORST]
    rows: list[list[Any]] = []
    for at, place in zip(*np.unravel_index(worst[size[worst] > 0], off_NC.shape), strict=True):
        measured, predicted = own.truth_NK[at, place], own.said_NK[at, place]
        which = own.ids[int(at)], subject.competition.targets[place], beginning(own.sequences[int(at)])
        numbers = f"{measured:.5g}", f"{predicted:.5g}", f"{off_NC[at, place]:+.2f}", int(own.fold_N[at])
        rows.append([*which, *numbers])
    words = "Error: predicted less measured, in standard deviations of the column."
    head = ["sequence", "number", "begins", "measured", "predicted", "error", "fold"]
    return page.join(page.note(words), page.table(head, rows, words=3))
