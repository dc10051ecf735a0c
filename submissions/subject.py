"""What a report is about: its scores, and where the pieces behind them lie."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline.competitions.base import Competition
from pipeline.paths import Paths
from pipeline.runlog import amount
from pipeline.runs import is_stage
from pipeline.stage import read_result
from submissions import page
from submissions.number_scores import tell
from submissions.page import Markup

_SHOWN = 48  # letters of a sequence
_BRIEF = 24  # letters of a name


def read_scores(home: Path, *, comp: str) -> dict[str, Any]:
    """Scores of a competition's ensemble, or run, that `evaluate` left in its folder.

    Raises:
        DataError: there are none, or not those that it left.
    """
    hint = f"make evaluate COMP={comp} {'RUN' if home.parent.name == 'runs' else 'NAME'}={home.name}"
    return read_result(home / "scores.json", manifest=home / "evaluate.manifest.json", hint=hint)


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What the page is about, and where its pieces lie."""

    paths: Paths
    competition: Competition
    home: Path
    scores: dict[str, Any]
    missing: list[str] = field(default_factory=list)  #: what the page says it cannot show

    @property
    def name(self) -> str:
        return self.scores["name"]

    @property
    def title(self) -> str:
        """The competition's, and of sets of one's own which it is."""
        which = self.competition.name.partition("-")[2]
        return ", ".join(filter(None, (self.competition.title, which)))

    @property
    def split(self) -> str:
        return self.scores["split"]

    @property
    def folds(self) -> list[int]:
        return self.scores["folds"]

    @property
    def runs(self) -> list[str]:
        """Runs behind the scores; a single run is its own."""
        return sorted(self.scores["runs"]) if self.scores["kind"] == "ensemble" else [self.name]

    @cached_property
    def joined(self) -> dict[str, Any]:
        """How the runs were joined, as ``weights.json`` says; empty without one."""
        path = self.home / "weights.json"
        if self.scores["kind"] != "ensemble" or not path.is_file():
            return {}
        return read_result(path, manifest=self.home / "ensemble.manifest.json", hint="make ensemble")

    @property
    def idle(self) -> list[str]:
        """Runs that do not predict: of structures those in reserve, else those of weight 0 in every mean."""
        if self.competition.task == "structure":
            return sorted((self.joined.get("policy") or {}).get("spare", []))
        weights = self.joined.get("weights", {}).values()
        return [run for run in self.runs if weights and not any(of_target[run] for of_target in weights)]

    @property
    def networks(self) -> list[str]:
        """Those of the runs that were trained."""
        return [run for run in self.runs if not is_stage(run)]

    @property
    def higher_is_better(self) -> bool:
        return self.competition.task == "structure"

    @property
    def best_floor(self) -> tuple[str, float]:
        """Name and score of the trivial predictor that is hardest to beat."""
        known = {name: score for name, score in self.scores["floors"].items() if score is not None}
        name = (max if self.higher_is_better else min)(known, key=lambda each: known[each])
        return name, known[name]

    @property
    def predictions(self) -> list[Path]:
        if self.scores["kind"] == "ensemble":
            return [self.home / "oof.parquet"]
        return [self.paths.oof(self.name, fold) for fold in self.folds]

    def fold_files(self, name: str) -> dict[tuple[str, int], Path]:
        """(run, fold) -> a file of its folder, where it is there."""
        found = {(run, fold): self.paths.fold_dir(run, fold) / name for run in self.runs for fold in self.folds}
        return {key: path for key, path in found.items() if path.is_file()}

    def manifests(self) -> dict[str, Path]:
        """Label -> manifest of the stages behind the page, in the order of the chain."""
        folders = {"": self.home.parent, "clean": self.paths.home / "clean", "bpp": self.paths.bpp.parent}
        folders |= {"folds": self.paths.fold_table(self.split).parent}
        folders |= {f"{run} fold {k}": self.paths.fold_dir(run, k) for run in self.runs for k in self.folds}
        folders |= {self.name: self.home}
        found = {
            f"{label}: {path.name.removesuffix('.manifest.json')}": path
            for label, folder in folders.items()
            for path in sorted(folder.glob("*.manifest.json"))
        }
        return {
            label: path
            for label, path in found.items()
            if path.name != "report.manifest.json" and (path.parent != folders["folds"] or self.split in path.name)
        }

    def inputs(self) -> dict[str, Path]:
        """All files that the page shows something of."""
        inputs = {"scores": self.home / "scores.json", "train": self.paths.clean("train")}
        inputs |= {"folds": self.paths.fold_table(self.split)}
        inputs |= {f"predictions/{place}": path for place, path in enumerate(self.predictions)}
        if (self.home / "weights.json").is_file():
            inputs["weights"] = self.home / "weights.json"
        truth = {"structure": "references", "classes": "classes", "numbers": "numbers"}
        if self.competition.task in truth:
            inputs[truth[self.competition.task]] = self.paths.clean(truth[self.competition.task])
        for name in ("metrics.jsonl", "config.json"):
            inputs |= {f"{run}/fold{k}/{name}": path for (run, k), path in self.fold_files(name).items()}
        return inputs | {f"manifest/{label}": path for label, path in self.manifests().items()}

    def without(self, reason: str) -> Markup:
        """A part that cannot be shown: said on the page, and in the stage's facts."""
        self.missing.append(reason)
        return page.missing(reason)


def short_name(target: str) -> str:
    """A target without what all targets share.

    >>> short_name("reactivity_2A3_MaP")
    '2A3_MaP'
    """
    return target.removeprefix("reactivity_")


def brief(name: str) -> str:
    """A name that fits on an axis or above one of four drawings: of a long one both ends.

    >>> brief("deg_Mg_pH10"), brief("relative luminescence after 24 hours")
    ('deg_Mg_pH10', 'relative lumi…r 24 hours')
    """
    return name if len(name) <= _BRIEF else f"{name[: _BRIEF // 2 + 1]}…{name[2 - _BRIEF // 2 :]}"


def score_cells(told: Mapping[str, Any], targets: Sequence[str], *, lost: str | None = None) -> list[Markup]:
    """Cells of a table: score, and mean error of every target, or `lost` (a dash) where there is none."""
    values = {"": told["score"]} | {target: told["per_target"][target] for target in targets}
    return [page.text(lost if value is None else tell(value, name)) for name, value in values.items()]


def test_table(scores: Mapping[str, Any]) -> Markup:
    """Scores of the test set, where its classes, numbers or values are known."""
    if "test" not in scores:
        return page.join()
    told, columns = scores["test"], scores["columns"]
    cells = [f"{told['scored']:,}", *score_cells(told, columns, lost="undefined")]
    words = "Its answers are known; nothing was chosen by them, neither epochs nor weights nor thresholds."
    return page.join(
        page.element("h3", "The test set"),
        page.note(words),
        page.table(["sequences", scores["metric"], *columns], [cells], words=0),
    )


def beginning(sequence: str) -> Markup:
    """A sequence, or its first letters and how many there are."""
    shown = sequence if len(sequence) <= _SHOWN else f"{sequence[:_SHOWN]}… ({len(sequence):,})"
    return page.element("code", shown)


def without_prediction(scores: Mapping[str, Any]) -> Markup:
    """Ids of the scored sequences that no prediction is of."""
    lost = scores["without_prediction"]
    if not lost:
        return page.join()
    return page.details(f"{amount(len(lost), 'sequence')} without prediction", ", ".join(lost))
