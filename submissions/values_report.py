"""Report on predicted values: calibration, where the errors are, and truth beside prediction for some sequences.

Letters: T positions, C targets, N sequences, L length (nt), B bins.
"""

from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import polars as pl

from pipeline.competitions.base import Competition
from pipeline.runlog import score_text, track
from pipeline.schema import ALPHABET
from pipeline.tables import OofBatch, out_of_fold, truth_that_counts
from submissions import figures, page
from submissions.breakdown import Groups, sums_by
from submissions.canvas import ramp
from submissions.page import Markup
from submissions.subject import Subject, brief, score_cells, short_name, test_table

_BINS = 100  # of the calibration's histogram, along each axis
_STRIPS = 6  # sequences shown letter by letter
_MAPPED = 60  # sequences in the overview
_RARE = 0.03  # positions that fewer sequences have are left out of the profile along the sequence


class _Gathered:
    """What one pass over all predictions adds up."""

    def __init__(self, competition: Competition) -> None:
        self.competition = competition
        self.low_C, self.high_C = np.array(competition.shown_ranges).T
        self.counts_CBB = np.zeros((len(competition.targets), _BINS, _BINS))
        self.nucleotides = Groups(competition)
        self.ids: list[str] = []
        self.errors: list[float] = []

    def add(self, batch: OofBatch, prediction_TC: np.ndarray, missing_N: np.ndarray) -> None:
        """Add some sequences: only positions that the organisers' metric looks at."""
        truth_TC = truth_that_counts(batch, self.competition.targets)
        here_T = batch.spread(~missing_N) & np.isfinite(truth_TC[:, 0])
        prediction_TC, truth_TC = prediction_TC[here_T], truth_TC[here_T]
        predicted_TC, measured_TC = self._bin(prediction_TC), self._bin(truth_TC)
        for place, counts_BB in enumerate(self.counts_CBB):
            cell_T = predicted_TC[:, place] * _BINS + measured_TC[:, place]
            counts_BB += np.bincount(cell_T, minlength=_BINS**2).reshape(_BINS, _BINS)
        letters = np.frombuffer("".join(batch.rows["sequence"]).encode(), dtype="S1").astype("U1")
        self.nucleotides.add_positions(letters[here_T], prediction_TC, truth_TC)
        sequence_T = batch.spread(np.arange(batch.rows.height))[here_T]
        of_N, sums_NC, counts_NC = sums_by(self.competition, sequence_T, prediction_TC, truth_TC)
        self.ids += batch.rows["sequence_id"][of_N].to_list()
        self.errors += self.competition.target_errors(sums_NC, counts_NC).mean(axis=1).tolist()

    def _bin(self, values_TC: np.ndarray) -> np.ndarray:
        share_TC = (values_TC - self.low_C) / (self.high_C - self.low_C)
        return np.clip(share_TC * _BINS, 0, _BINS - 1).astype(np.intp)

    def spread_out(self, count: int) -> dict[str, float]:
        """Sequences from the best to the worst predicted one, evenly by rank: id -> error, mean of the targets."""
        order = sorted(range(len(self.ids)), key=lambda at: (self.errors[at], self.ids[at]))
        chosen = np.unique(np.linspace(0.01, 0.99, count) * (len(order) - 1) + 0.5).astype(int)
        return {self.ids[order[at]]: self.errors[order[at]] for at in np.unique(chosen)}


def values_sections(subject: Subject) -> dict[str, tuple[str, Markup]]:
    """Anchor -> title and content of the parts that only predicted values have; one pass over all predictions."""
    gathered = _Gathered(subject.competition)
    signals = subject.competition.signal_to_noise or ()
    batches = out_of_fold(
        subject.paths.clean("train"),
        fold_table=subject.paths.fold_table(subject.split),
        folds=subject.folds,
        sources={subject.name: subject.predictions},
        targets=subject.competition.targets,
        columns=["scored", "dataset_name", *signals, *subject.competition.targets],
    )
    for batch in track(batches, "report", unit="batches"):
        gathered.add(batch, batch.predictions[subject.name], batch.missing[subject.name])
    return {
        "calibration": ("Calibration", _calibration_section(gathered)),
        "errors": ("Where the errors are", _errors_section(subject, gathered)),
        "examples": ("Truth and prediction", _examples_section(subject, gathered)),
    }


def _calibration_section(gathered: _Gathered) -> Markup:
    drawings = []
    for place, (target, counts_BB) in enumerate(zip(gathered.competition.targets, gathered.counts_CBB, strict=True)):
        kinds = {} if gathered.competition.is_own else {"deg_": "degradation", "reactivity": "reactivity"}
        unit = next((kind for start, kind in kinds.items() if target.startswith(start)), brief(target))
        low, high = gathered.competition.shown_ranges[place]
        drawing = figures.calibration(counts_BB, low=low, high=high, unit=unit, colour=place)
        drawings.append(page.figure(drawing, title=short_name(target)))
    words = (
        "Points: mean of the measured values whose prediction falls into a bin; band: their middle half; grey: density "
        "of positions; dashed: perfect calibration. Values outside the axes are drawn at their ends. "
    )
    if gathered.competition.error_power == 1:
        words += (
            "A model trained on absolute error predicts medians, so a skewed truth has its mean above the dashed line."
        )
    return page.join(page.note(words), page.panels(drawings))


def _errors_section(subject: Subject, gathered: _Gathered) -> Markup:
    scores, targets = subject.scores, subject.competition.targets
    ylabel, scales = subject.competition.error_name, _scales(subject.competition)

    def series(rows: Sequence[Mapping[str, Any]], places: Sequence[int]) -> dict[int, list[float]]:
        return {place: [row["per_target"][targets[place]] or 0.0 for row in rows] for place in places}

    def titled(title: str, places: Sequence[int]) -> str:
        return title if len(scales) == 1 else f"{title}: {_named(places, targets)}"

    letters = sorted(gathered.nucleotides.table("letter"), key=lambda row: ALPHABET.index(row["letter"]))
    groups = {
        "By nucleotide": ([row | {"label": row["letter"]} for row in letters], "nucleotide"),
        "By signal-to-noise": (scores["by_signal_to_noise"], "lowest signal-to-noise of the profiles"),
        "By length": (scores["by_length"], "length, nt"),
    }
    drawings = []
    for title, (rows, xlabel) in groups.items():
        labels = [row["label"].replace(" to ", "–").replace(" or more", "+").replace("-", "–") for row in rows]
        notes = [_many(row["positions"]) for row in rows]
        for together in scales if rows else ():
            heights = series(rows, together)
            drawing = figures.grouped_bars(labels, heights, xlabel=xlabel, ylabel=ylabel, notes=notes)
            drawings.append(page.figure(drawing, title=titled(title, together)))
    most = max(row["positions"] for row in scores["by_position"])
    places = [row for row in scores["by_position"] if row["positions"] >= _RARE * most]
    x = [row["position"] for row in places]
    along = [
        page.figure(
            figures.profile(x, series(places, together), xlabel="position, nt", ylabel=ylabel),
            title=titled("Along the sequence", together),
            wide=True,
        )
        for together in scales
    ]
    sets = [
        [name, *score_cells(row, targets), f"{row['positions']:,}"]
        for row in scores["by_dataset"]
        if (name := _set_name(subject.competition, row["dataset_name"]))
    ]
    names = [short_name(target) for target in targets]
    by_set = page.table(["data set", scores["metric"], *names, "positions"], sets)
    return page.join(
        page.legend([(name, page.series_colour(place)) for place, name in enumerate(names)]),
        page.panels(drawings),
        page.note("Small numbers under the labels: positions scored."),
        *along,
        *((page.element("h4", "By data set"), by_set) if sets else ()),
        test_table(scores),
    )


def _set_name(competition: Competition, name: str | None) -> str:
    """Of a data set; "" for the word that the data stage writes where a set of one's own has no such column."""
    return "" if competition.is_own and name == "train" else name or ""


def _scales(competition: Competition) -> list[list[int]]:
    """Places of the targets that can share an axis: values of other units would be lost beside each other."""
    ranges = competition.shown_ranges
    return [[place for place, each in enumerate(ranges) if each == one] for one in dict.fromkeys(ranges)]


def _named(places: Sequence[int], targets: Sequence[str]) -> str:
    return ", ".join(short_name(targets[place]) for place in places)


def _key(competition: Competition) -> Markup:
    """What the colours of the maps stand for, on every scale."""
    below, keys, scales = "" if competition.target_range else " and below", [], _scales(competition)
    for places in scales:
        low, high = competition.shown_ranges[places[0]]
        names = [] if len(scales) == 1 else [page.element("span", f"{_named(places, competition.targets)}:")]
        keys.append(page.element("div", *names, f"{low:g}{below}", ramp(), f"{high:g} and above", class_="legend"))
    return page.join(*keys)


def _many(count: int) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if count >= size:
            return f"{count / size:.3g}{unit}"
    return str(count)


def _examples_section(subject: Subject, gathered: _Gathered) -> Markup:
    competition = subject.competition
    strips, mapped = gathered.spread_out(_STRIPS), gathered.spread_out(_MAPPED)
    examples = _read_examples(subject, [*strips, *mapped])
    key = _key(competition)
    first, last = _span(examples.values())
    maps = []
    for place, target in enumerate(competition.targets):
        for kind in ("measured", "predicted"):
            rows = [_share(_padded(examples[name], kind, place, first, last), competition, place) for name in mapped]
            maps.append((f"{brief(short_name(target))}, {kind}", np.stack(rows)))
    draw = partial(figures.heat_maps, first=first + 1)
    overview = [draw(maps[at : at + 4], ylabel="sequences, best predicted on top") for at in range(0, len(maps), 4)]
    drawings = [
        page.figure(
            _strip(examples[name], competition),
            title=f"{name} · error {score_text(error, 3)} · {examples[name]['about']}",
            wide=True,
        )
        for name, error in strips.items()
    ]
    words = (
        f"{len(mapped)} sequences, evenly spaced by rank from the best to the worst predicted one, measured beside "
        "predicted. Grey: not measured."
    )
    return page.join(
        page.note(words),
        key,
        *(page.figure(drawing, wide=True) for drawing in overview),
        page.element("h3", "Letter by letter"),
        key,
        *drawings,
    )


def _read_examples(subject: Subject, ids: Sequence[str]) -> dict[str, dict[str, Any]]:
    """Sequence, measured and predicted values [C, L] of some sequences."""
    targets, signals = subject.competition.targets, subject.competition.signal_to_noise or ()
    wanted = pl.col("sequence_id").is_in(list(ids))
    train = pl.scan_parquet(subject.paths.clean("train")).filter(wanted)
    train = train.select("sequence_id", "sequence", "dataset_name", *signals, *targets)
    predicted = pl.scan_parquet(subject.predictions).filter(wanted).select("sequence_id", "fold", *targets)
    joined = train.join(predicted, on="sequence_id", suffix="_predicted", validate="1:1").collect()
    examples = {}
    for row in joined.iter_rows(named=True):
        signal = ", ".join(dict.fromkeys(f"{row[name]:.1f}" for name in signals))
        about = [_set_name(subject.competition, row["dataset_name"]), f"fold {row['fold']}"]
        about.append(f"signal-to-noise {signal}" if signal else "")
        examples[row["sequence_id"]] = {
            "sequence": row["sequence"],
            "about": ", ".join(filter(None, about)),
            "measured": np.array([row[target] for target in targets], dtype=np.float32),
            "predicted": np.array([row[f"{target}_predicted"] for target in targets], dtype=np.float32),
        }
    return examples


def _span(examples: Iterable[Mapping[str, Any]]) -> tuple[int, int]:
    """First measured position, and the one after the last, over all examples; 0-based."""
    places = [np.flatnonzero(np.isfinite(example["measured"]).any(axis=0)) for example in examples]
    return min(int(at[0]) for at in places), max(int(at[-1]) + 1 for at in places)


def _padded(example: Mapping[str, Any], kind: str, place: int, first: int, last: int) -> np.ndarray:
    """Values at positions `first` to `last`, NaN where the sequence was not measured."""
    shown = np.full(last - first, np.nan, dtype=np.float32)
    values = np.where(np.isfinite(example["measured"][place]), example[kind][place], np.nan)[first:last]
    shown[: len(values)] = values
    return shown


def _share(values_L: np.ndarray, competition: Competition, place: int) -> np.ndarray:
    """[L] a target's values, 0 and 1 being the ends of its range."""
    low, high = competition.shown_ranges[place]
    return (values_L - low) / (high - low)


def _strip(example: Mapping[str, Any], competition: Competition) -> Markup:
    first, last = _span([example])
    rows = [
        (f"{brief(short_name(target))} {kind}", _share(example[kind][place][first:last], competition, place))
        for place, target in enumerate(competition.targets)
        for kind in ("measured", "predicted")
    ]
    letters = example["sequence"][first:last]
    return figures.strip(letters, rows, first=first + 1)
