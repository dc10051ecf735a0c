"""How the runs of a report were trained: curves, time and memory, and everything that went wrong on the way."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.errors import DataError
from pipeline.runlog import duration, read_metrics, size_text
from submissions import figures, page
from submissions.page import Markup
from submissions.subject import Subject

_POINTS = 200  # of a loss curve
_EVENTS = 20  # shown of the first and of the last ones of a fold


@dataclass(frozen=True, kw_only=True)
class Training:
    """One fold of one run, from its metrics log."""

    rows: list[dict[str, Any]]

    def of(self, event: str) -> list[dict[str, Any]]:
        return [row for row in self.rows if row["event"] == event]

    @property
    def start(self) -> dict[str, Any]:
        return next(iter(self.of("start")), {})

    @property
    def precisions(self) -> list[str]:
        """Those it was trained in, one after the other."""
        told = [*self.of("start")[:1], *self.of("rollback")]
        return list(dict.fromkeys(row["precision"] for row in told if "precision" in row))

    @property
    def seconds(self) -> float:
        return sum(row.get("seconds") or 0.0 for row in self.of("epoch"))

    @property
    def memory_mib(self) -> float:
        return max((row.get("memory_mib") or 0.0 for row in self.of("epoch")), default=0.0)

    def curve(self, event: str, value: str) -> tuple[list[float], list[float]]:
        """Steps and values, means of neighbours where there are many; of steps that a rollback repeated, the last."""
        points = {row["step"]: row[value] for row in self.of(event) if row.get(value) is not None}
        parts = np.array_split(np.array(sorted(points.items())).reshape(-1, 2), max(1, min(_POINTS, len(points))))
        means = [part.mean(axis=0) for part in parts if len(part)]
        return [float(step) for step, _ in means], [float(level) for _, level in means]


def read_training(subject: Subject) -> dict[tuple[str, int], Training]:
    """(run, fold) -> what its log tells, where there is one.

    Raises:
        DataError: a line before the last one of a log is not JSON.
    """
    found = {}
    for key, path in subject.fold_files("metrics.jsonl").items():
        try:
            found[key] = Training(rows=read_metrics(path))
        except ValueError as err:
            raise DataError(f"{err}. Next: move the file away; the report says that it is missing.") from err
    return found


def training_section(subject: Subject, training: Mapping[tuple[str, int], Training]) -> Markup:
    """Curves of every run; steps, time and memory of every fold; what went wrong in them and what was done about it."""
    lost = [f"{run} fold {k}" for run in subject.networks for k in subject.folds if (run, k) not in training]
    notes = [subject.without(f"No metrics log (metrics.jsonl) of {', '.join(lost)}.")] if lost else []
    if without := [run for run in subject.runs if run not in subject.networks]:
        notes.append(page.note(f"Without a network, so never trained: {', '.join(without)}."))
    if len(subject.folds) == 1:
        notes.append(subject.without(f"Only fold {subject.folds[0]} is trained: there is no spread over folds."))
    if not training:
        return page.join(*notes)
    rows = [_training_row(run, fold, told) for (run, fold), told in training.items()]
    head = ["run", "fold", "best", "at step", "steps", "epochs", "train", "validate", "time", "memory", "precision"]
    runs = [run for run in subject.runs if any(key[0] == run for key in training)]
    return page.join(
        *notes,
        *(_curves(subject, run, {k: told for (each, k), told in training.items() if each == run}) for run in runs),
        page.element("h3", "Folds, time and memory"),
        page.table(head, rows),
        page.note("best: metric of the averaged weights on the held-out fold; memory: peak of the process."),
        _events_section(training),
    )


def _training_row(run: str, fold: int, told: Training) -> list[object]:
    epochs = told.of("epoch")
    best = [row for row in epochs if row.get("best")]
    start = told.start
    return [
        run,
        fold,
        page.number(best[-1]["metric"] if best else None),
        f"{best[-1]['step']:,}" if best else None,
        f"{epochs[-1]['step']:,}" if epochs else None,
        len({row["epoch"] for row in epochs}),
        f"{start['train']:,}" if "train" in start else None,
        f"{start['valid']:,}" if "valid" in start else None,
        duration(told.seconds),
        size_text(round(told.memory_mib * 2**20)) if epochs else None,
        " → ".join(told.precisions),
    ]


def _curves(subject: Subject, run: str, folds: Mapping[int, Training]) -> Markup:
    metric, level = "structure loss", None  # of distances alone, or of coordinates too: no floor has one
    if subject.competition.task != "structure":
        metric = subject.scores["metric"]
        name, floor = subject.best_floor
        level = (f"floor: {name}", floor)
    ylabel = f"{metric} on the held-out fold"
    loss = {fold: told.curve("step", "loss") for fold, told in folds.items()}
    held_out = {fold: told.curve("epoch", "metric") for fold, told in folds.items()}
    drawings = [
        page.figure(figures.curves(loss, xlabel="step", ylabel="training loss, weighted"), title="Training loss"),
        page.figure(figures.curves(held_out, xlabel="step", ylabel=ylabel, level=level), title="Validation"),
    ]
    keys = [(f"fold {fold}", page.series_colour(place)) for place, fold in enumerate(folds)]
    return page.join(page.element("h3", run), page.legend(keys), page.panels(drawings))


# --- what went wrong ---


def _events_section(training: Mapping[tuple[str, int], Training]) -> Markup:
    eventful = {key: rows for key, told in training.items() if (rows := _events(told))}
    title = page.element("h3", "What went wrong, and what was done")
    if not eventful:
        calm = (
            "Nothing: no value that was not finite, no lack of memory, no interruption, no settings changed on the way."
        )
        return page.join(title, page.note(calm))
    words = "Batches that were left out are kept beside their run; make replay runs one again."
    if quiet := len(training) - len(eventful):
        words += f" {quiet} of {len(training)} folds went through without any of this."
    tables = [
        page.details(f"{run}, fold {fold}: {_in_short(training[run, fold])}", _events_table(rows))
        for (run, fold), rows in eventful.items()
    ]
    return page.join(title, page.note(words), *tables)


def _events(told: Training) -> list[list[object]]:
    """One row for each: step, what was seen, where it began, in which batch, and what was done; in their order."""
    return [cells for row in told.rows if row is not told.start and (cells := _cells(row))]


def _in_short(told: Training) -> str:
    """How often what happened, most telling first."""
    guard = told.of("guard")
    overflows = sum(row["seen"] == "scaler_overflow" for row in guard)
    counts = {
        "bad steps": len(guard) - overflows,
        "rollbacks": len(told.of("rollback")),
        "smaller micro-batches": len(told.of("micro_batch")),
        "settings changed": len(told.of("changed")),
        "interruptions": len(told.of("start")[1:]),
        "fp16 overflows": overflows,
    }
    return ", ".join(f"{name} {count}" for name, count in counts.items() if count)


def _guard_cells(row: Mapping[str, Any]) -> list[object]:
    if row["seen"] == "scaler_overflow":
        scale = f"{row['scale']:g}" if row.get("scale") else "set back"
        return [row["step"], "fp16 overflow, which its scale provokes", None, None, f"step skipped, loss scale {scale}"]
    seen = f"{row['seen'].replace('nonfinite', 'non-finite').replace('_', ' ')} in {row['precision']}"
    where = f"{row['phase']} of {row['module']}" if row.get("module") else None
    ids, count = row.get("ids") or [], row.get("sequences", 0)
    batch = f"{', '.join(ids[:2])}{f' and {count - 2} more' if count > 2 else ''}"
    return [row["step"], seen, where, batch, "batch left out" if row["answer"] == "skip" else "rolled back, see below"]


def _cells(row: Mapping[str, Any]) -> list[object]:
    """A row of the table, of an event that belongs there; else none."""
    match row["event"]:
        case "guard":
            return _guard_cells(row)
        case "rollback":
            lower = f", now in {row['precision']}" if row["precision"] != row.get("before") else ""
            step, seen = row.get("step"), "rollback"
            done = f"everything from the checkpoint of step {row['to_step']}{lower}"
        case "micro_batch":
            step, seen = row["step"], f"out of memory with {row['before']} sequences at a time"
            done = f"micro-batches of {row['now']}, the optimiser's batches as before"
        case "changed":
            step, seen, done = row["step"], f"{row['key']} {row['before']} → {row['now']}", row["remark"]
        case "start":
            step, seen = row.get("resumed_step"), "the run had ended before its time"
            done = "started again, went on from there"
        case _:
            return []
    return [step, seen, None, None, done]


def _events_table(rows: Sequence[Sequence[object]]) -> Markup:
    shown = [*rows[:_EVENTS], *rows[_EVENTS:][-_EVENTS:]]
    table = page.table(["step", "seen", "began in", "batch", "done"], shown, words=5)
    left_out = len(rows) - len(shown)
    note = f"{left_out} more between the first {_EVENTS} and the last {_EVENTS}: metrics.jsonl has them all."
    return page.join(table, page.note(note) if left_out else "")
