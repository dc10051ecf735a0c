"""Validation metrics as running (sum, count) pairs: the epoch's value is one division, never a mean of means."""

from typing import Protocol

import numpy as np

from models.interface import RnaOutputs
from pipeline.batch import RnaBatch
from pipeline.competitions.base import Competition
from pipeline.errors import DivergedError
from pipeline.training.losses import DistanceCrossEntropy


class Meter(Protocol):
    """Adds up batches of a validation epoch."""

    def add(self, outputs: RnaOutputs, batch: RnaBatch) -> None:
        """Count one batch.

        Raises:
            DivergedError: a predicted value is not finite.
        """

    def result(self) -> dict[str, float]:
        """``metric`` (lower is better) and, if there are several targets, one value for each."""


class ErrorMeter:
    """The organisers' metric over all positions of the batches; give it scored examples only."""

    def __init__(self, competition: Competition) -> None:
        assert competition.error_sums is not None
        self._competition, self._error_sums = competition, competition.error_sums
        self._sums_C = np.zeros(len(competition.targets))
        self._counts_C = np.zeros(len(competition.targets))

    def add(self, outputs: RnaOutputs, batch: RnaBatch) -> None:
        assert outputs.values_BLC is not None
        assert batch.target_BLC is not None
        mask_BL = batch.inputs.mask_BL
        predicted_TC = outputs.values_BLC[mask_BL].float().cpu().numpy()
        if not np.isfinite(predicted_TC).all():
            raise DivergedError(
                f"validation: a prediction for {', '.join(batch.ids[:4])}{' …' if len(batch.ids) > 4 else ''} is not "
                "finite. Next: train again with train.precision = 'fp32' or a lower train.lr."
            )
        sums_C, counts_C = self._error_sums(predicted_TC, batch.target_BLC[mask_BL].cpu().numpy())
        self._sums_C += sums_C
        self._counts_C += counts_C

    def result(self) -> dict[str, float]:
        assert self._competition.score is not None
        with np.errstate(invalid="ignore"):
            means_C = self._sums_C / self._counts_C
        values = dict(zip(self._competition.targets, map(float, means_C), strict=True))
        return {"metric": float(self._competition.score(self._sums_C, self._counts_C)), **values}


class LossMeter:
    """The structure task's validation loss over all resolved pairs."""

    def __init__(self) -> None:
        self._loss = DistanceCrossEntropy(max_pairs=0)
        self._total, self._weight = 0.0, 0.0

    def add(self, outputs: RnaOutputs, batch: RnaBatch) -> None:
        self._total += float(self._loss.total(outputs, batch))
        self._weight += self._loss.weight(batch)

    def result(self) -> dict[str, float]:
        return {"metric": self._total / self._weight if self._weight else float("nan")}


def metric_name(competition: Competition) -> str:
    """What the validation metric is called: structures are only scored once they are built."""
    return "distance loss" if competition.task == "structure" else competition.metric


def make_meter(competition: Competition) -> Meter:
    """An empty meter for a competition's task."""
    return LossMeter() if competition.task == "structure" else ErrorMeter(competition)
