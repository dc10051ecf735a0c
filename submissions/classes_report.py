"""Report on predicted classes: every class, what is taken for what, curves, calibration, and the surest mistakes.

Letters: N sequences, K classes.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from pipeline.labels import log_losses, read_classes
from submissions import class_scores, figures, page
from submissions.breakdown import LENGTH_STEP
from submissions.canvas import heat_colour, ramp
from submissions.class_evaluation import (
    COLUMNS,
    MOST_CONFUSED,
    ClassesPredicted,
    by_support,
    read_predicted,
    tell_median,
)
from submissions.page import Markup
from submissions.subject import Subject, beginning, brief, test_table, without_prediction

_WRITTEN = 16  # most classes whose confusions are written as numbers
_LISTED = 60  # classes in the table; the others open on a click
_DRAWN = 60  # classes that have curves
_MISTAKES = 12
_POINTS = 240  # of a curve
_PADDING = "padding: .34rem .7rem"
_UPRIGHT = "writing-mode: vertical-rl; transform: rotate(180deg); text-align: left"


def classes_sections(subject: Subject) -> dict[str, tuple[str, Markup]]:
    """Anchor -> title and content of the parts that only predicted classes have; one pass over all predictions."""
    own = read_predicted(
        subject.paths, split=subject.split, folds=subject.folds, tables=subject.predictions, name=subject.name,
        classes=read_classes(subject.paths),
    )  # fmt: skip
    decided_NK = own.decided()
    return {
        "classes": ("Every class", _classes_section(subject)),
        "confusion": ("What is taken for what", _confusion_section(subject, own, decided_NK)),
        "curves": ("Ranking", _curves_section(own)),
        "calibration": ("Calibration", _calibration_section(subject)),
        "errors": ("Where the errors are", _errors_section(subject, own, decided_NK)),
    }


def _score(value: float | None) -> object:
    return "undefined" if value is None else page.number(value, 3)


def _classes_section(subject: Subject) -> Markup:
    scores, ranked = subject.scores, by_support(subject.scores)
    rows: list[list[Any]] = [
        [row["class"], f"{row['support']:,}", f"{row['decided']:,}", *(_score(row[kind]) for kind in COLUMNS)]
        for row in ranked
    ]
    together = {f"{name} average": told for name, told in scores["averages"].items()}
    together |= {tell_median(told): {"auroc": told["median"]} for told in scores.get("median_auroc", [])}
    over_all = [
        [of, "", "", *(_score(told[kind]) if kind in told else "" for kind in COLUMNS)] for of, told in together.items()
    ]
    columns, more = ["class", "sequences", "decided", *COLUMNS.values()], rows[_LISTED:]
    table = page.table(
        columns, rows[:_LISTED] + over_all, classes=[""] * len(rows[:_LISTED]) + ["floor"] * len(over_all)
    )
    how = (
        "Decided is the most probable class."
        if scores["classes"]["exclusive"]
        else "Decided are the classes that reach their thresholds, each learned on the other folds for the highest F1."
    )
    words = (
        f"{how} Threshold: the probability of this class against all others with the highest F1 over all folds; F1 "
        "there: with thresholds learned on the other folds (0.5 if there are none). Macro: the mean over classes; "
        "weighted: by their numbers; micro: over all decisions. Undefined: a class without positives, without "
        "negatives, or never decided for; averages leave it out."
    )
    lost = {kind: names for kind, names in scores["undefined"].items() if kind in ("f1", "auroc")}
    notes = [f"No {COLUMNS[kind]} of {_some(names)}." for kind, names in lost.items()]
    return page.join(
        page.note(words),
        table,
        *([page.details(f"{len(more):,} rarer classes", page.table(columns, more))] if more else []),
        *(page.note(note) for note in notes),
        test_table(scores),
    )


def _some(names: Sequence[str]) -> str:
    """The first of many names, and how many follow."""
    return ", ".join(names[:10]) + (f" and {len(names) - 10:,} more" if len(names) > 10 else "")


def _confusion_section(subject: Subject, own: ClassesPredicted, decided_NK: np.ndarray) -> Markup:
    names = own.classes.names
    if len(names) > MOST_CONFUSED:
        return subject.without(f"{len(names)} classes are too many to draw against each other.")
    truth_NK = own.truth()
    if not own.classes.exclusive:
        names = (*names, "(none)")
        truth_NK, decided_NK = (np.column_stack([each_NK, ~each_NK.any(axis=1)]) for each_NK in (truth_NK, decided_NK))
    counts_KK = truth_NK.T.astype(np.int64) @ decided_NK.astype(np.int64)
    support_K = truth_NK.sum(axis=0)[:, None]
    share_KK = np.where(support_K > 0, counts_KK / np.maximum(support_K, 1), np.nan)
    words = "Rows: the true class; columns: the decided one; colour: share of the row."
    if not own.classes.exclusive:
        words += " A sequence counts in every row of a class that it has, and in every column of one decided for."
    if len(names) <= _WRITTEN:
        drawing = _numbers(counts_KK, share_KK, names)
    else:
        drawing = page.figure(figures.class_map(share_KK, names), wide=True)
    key = page.element("div", "0", ramp(), "100 %", class_="legend")
    return page.join(page.note(words), key, drawing)


def _numbers(counts_KK: np.ndarray, share_KK: np.ndarray, names: tuple[str, ...]) -> Markup:
    """The map as a table with its numbers."""
    rows = []
    for name, counts_K, share_K in zip(names, counts_KK, share_KK, strict=True):
        cells = [page.element("td", name)]
        for count, share in zip(counts_K, share_K, strict=True):
            ground, letters = heat_colour(share) if np.isfinite(share) else ("transparent", "inherit")
            style = f"background: {ground}; color: {letters}; {_PADDING}"
            cells.append(page.element("td", f"{count:,}", class_="number", style=style))
        rows.append(page.element("tr", *cells))
    style = f"{_PADDING}; {_UPRIGHT}" if max(map(len, names)) > 8 else _PADDING
    head = [page.element("th", ""), *(page.element("th", brief(name), class_="number", style=style) for name in names)]
    table = page.element("table", page.element("thead", page.element("tr", *head)), page.element("tbody", *rows))
    return page.element("div", table, class_="scroll")


def _curves_section(own: ClassesPredicted) -> Markup:
    """ROC and precision-recall curves of the classes that have positives and negatives, the most frequent first."""
    support_K = own.truth().sum(axis=0)
    places = [int(k) for k in np.argsort(-support_K, kind="stable") if 0 < support_K[k] < len(own.ids)]
    if own.classes.exclusive and len(own.classes.names) == 2:
        places = [k for k in places if k == 1]  # the other's is its mirror image
    if not places:
        return page.missing("No class has both positives and negatives: there is nothing to rank.")
    of_all = f" Drawn are the {_DRAWN} most frequent of {len(places):,}." if len(places) > _DRAWN else ""
    places = places[:_DRAWN]
    found = [class_scores.curve(own.said_NK[:, k], own.truth()[:, k]) for k in places]
    roc = [_thin(np.append(0.0, each["false_positive_rate"]), np.append(0.0, each["recall"])) for each in found]
    steps = [_thin(each["recall"], each["precision"]) for each in found]
    share = float(support_K[places[0]] / len(own.ids))
    drawings = [
        page.figure(
            figures.rates(roc, xlabel="false positive rate", ylabel="recall", chance=[(0, 0), (1, 1)]),
            title="Receiver operating characteristic",
        ),
        page.figure(
            figures.rates(steps, xlabel="recall", ylabel="precision", chance=[(0, share), (1, share)]),
            title="Precision and recall",
        ),
    ]
    named = places[: len(figures.SERIES)]
    keys = [(own.classes.names[k], page.series_colour(place)) for place, k in enumerate(named)]
    keys += [(f"{len(places) - len(named)} more classes", "var(--muted)")] if len(places) > len(named) else []
    guess = f"Dashed: guessing; at the right, for {own.classes.names[places[0]]}."
    words = f"Each class against all others.{of_all} {guess}"
    return page.join(page.note(words), page.legend(keys), page.panels(drawings))


def _thin(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    at = np.unique(np.linspace(0, len(x) - 1, min(_POINTS, len(x))).round().astype(int))
    return x[at], y[at]


def _calibration_section(subject: Subject) -> Markup:
    told, exclusive = subject.scores["calibration"], subject.scores["classes"]["exclusive"]
    stated = "probability of the most probable class" if exclusive else "stated probability"
    drawing = figures.reliability(told["bins"], bins=class_scores.BINS, stated=stated, right="share that came true")
    words = (
        f"Expected calibration error {told['error']:.4f}: the mean distance of the points from the dashed line, "
        f"weighted by the cases at the right, {'one a sequence' if exclusive else 'one for each sequence and class'}."
    )
    keys = page.legend([("came true", page.series_colour(0)), ("did not", page.series_colour(1))])
    return page.join(page.note(words), keys, page.figure(drawing, wide=True))


def _errors_section(subject: Subject, own: ClassesPredicted, decided_NK: np.ndarray) -> Markup:
    parts = []
    rows = subject.scores["by_length"]
    if len(rows) > 1:
        middles = [int(row["label"].partition("-")[0]) + LENGTH_STEP / 2 for row in rows]
        drawing = figures.profile(
            middles, {0: [row["accuracy"] for row in rows]}, xlabel="length, letters", ylabel="accuracy"
        )
        cells = [
            [row["label"].replace("-", "–"), page.number(row["score"]), page.number(row["accuracy"]), row["sequences"]]
            for row in rows
        ]
        table = page.table(["length", subject.scores["metric"], "accuracy", "sequences"], cells)
        parts += [page.figure(drawing, title="Accuracy by length", wide=True)]
        parts += [page.details("By length, in numbers", table)]
    parts += [page.element("h3", "The surest mistakes"), _mistakes(own, decided_NK)]
    return page.join(*parts, without_prediction(subject.scores))


def _mistakes(own: ClassesPredicted, decided_NK: np.ndarray) -> Markup:
    """Sequences whose true classes were given the least probability."""
    losses_N = log_losses(own.said_NK, own.truth(), exclusive=own.classes.exclusive)
    wrong_N = np.flatnonzero((decided_NK != own.truth()).any(axis=1))
    if not wrong_N.size:
        return page.note("None: every sequence got its classes.")
    names = np.array(own.classes.names, dtype=object)
    rows = []
    for at in wrong_N[np.argsort(-losses_N[wrong_N], kind="stable")][:_MISTAKES]:
        true, said = (", ".join(names[flags_NK[at]]) or "none" for flags_NK in (own.truth(), decided_NK))
        loss = page.number(losses_N[at], 2)
        rows.append([own.ids[int(at)], true, said, beginning(own.sequences[int(at)]), loss, int(own.fold_N[at])])
    return page.join(
        page.note("The highest losses among the sequences with a wrong answer."),
        page.table(["sequence", "true", "decided", "begins", "loss, nats", "fold"], rows, words=4),
    )
