"""What an ensemble is made of: the runs, the folds that all of them have, and their out-of-fold predictions."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import pyarrow.parquet as pq

from pipeline.competitions.base import Competition
from pipeline.paths import Paths
from pipeline.runlog import Bar, warn
from pipeline.tables import OofBatch, out_of_fold


@dataclass(frozen=True, kw_only=True)
class Job:
    """Runs of one split, and the folds of it that every run has predicted (`skipped` are the others)."""

    paths: Paths
    competition: Competition
    runs: tuple[str, ...]
    split: str
    folds: list[int]
    skipped: list[int]

    def facts(self) -> dict[str, Any]:
        """The job as ``weights.json`` records it."""
        return {
            "competition": self.competition.name,
            "task": self.competition.task,
            "metric": self.competition.metric,
            "targets": list(self.competition.targets),
            "split": self.split,
            "folds": self.folds,
            "folds_left_out": self.skipped,
            "runs": list(self.runs),
        }

    def batches(self, *columns: str, label: str) -> Iterator[OofBatch]:
        """Training sequences of the folds beside the out-of-fold predictions of every run."""
        stream = out_of_fold(
            self.paths.clean("train"),
            fold_table=self.paths.fold_table(self.split),
            folds=self.folds,
            sources={each: [self.paths.oof(each, fold) for fold in self.folds] for each in self.runs},
            targets=self.competition.targets,
            columns=columns,
        )
        with Bar(label, total=pq.read_metadata(self.paths.clean("train")).num_rows, unit="sequences") as bar:
            for batch in stream:
                yield batch
                bar.advance(batch.rows.height)


def list_missing(missing: Mapping[str, list[str]]) -> dict[str, Any]:
    """Count and first ids of the sequences without prediction, run by run, with a warning for each run."""
    listed = {}
    for each, ids in missing.items():
        if ids:
            warn(f"ensemble: {len(ids):,} sequences without prediction of {each} are left out: {', '.join(ids[:3])}…")
            listed[each] = {"count": len(ids), "first": ids[:10]}
    return listed
