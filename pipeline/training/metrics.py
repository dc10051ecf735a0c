"""Validation metrics as running (sum, count) pairs: the epoch's value is one division, never a mean of means."""

from typing import Protocol

import numpy as np
from torch import Tensor

from models.interface import RnaOutputs
from pipeline.batch import RnaBatch
from pipeline.competitions.base import Competition
from pipeline.config import TrainConfig
from pipeline.errors import DivergedError
from pipeline.labels import Classes, Labels, Numbers, log_losses
from pipeline.training.distributed import World
from pipeline.training.losses import (
    StructureLoss,
    StructureTerms,
    class_probabilities,
    label_values,
    position_values,
    relative_weights,
)


class Meter(Protocol):
    """Adds up batches of a validation epoch."""

    def add(self, outputs: RnaOutputs, batch: RnaBatch) -> None:
        """Count one batch.

        Raises:
            DivergedError: a predicted value is not finite.
        """

    def join(self, world: World) -> None:
        """Count what all processes have counted."""

    def result(self) -> dict[str, float]:
        """``metric`` (lower is better) and, if there are several targets, one value for each.

        ``choice`` is what chooses the best epoch, where that is not the metric.
        """


class ErrorMeter:
    """The organisers' metric over all positions of the batches, or over their sequences if these have numbers.

    Give it scored examples only.
    """

    def __init__(self, competition: Competition, settings: TrainConfig, numbers: Numbers | None = None) -> None:
        assert competition.error_sums is not None
        self._numbers = numbers
        self._weights = relative_weights(settings.target_weights, competition.targets)
        self._competition, self._error_sums = competition, competition.error_sums
        self._sums_C = np.zeros(len(competition.targets))
        self._counts_C = np.zeros(len(competition.targets))

    def add(self, outputs: RnaOutputs, batch: RnaBatch) -> None:
        predicted_TC, true_TC = (tensor.cpu().numpy() for tensor in self._compared(outputs, batch))
        if not np.isfinite(predicted_TC).all():
            raise _not_finite(batch)
        sums_C, counts_C = self._error_sums(predicted_TC, true_TC)
        self._sums_C += sums_C
        self._counts_C += counts_C

    def _compared(self, outputs: RnaOutputs, batch: RnaBatch) -> tuple[Tensor, Tensor]:
        if self._numbers is not None:
            assert outputs.class_logits_BC is not None
            assert batch.label_BC is not None
            return label_values(outputs.class_logits_BC, self._numbers), batch.label_BC
        assert outputs.values_BLC is not None
        assert batch.target_BLC is not None
        mask_BL = batch.inputs.mask_BL
        return position_values(outputs.values_BLC[mask_BL], self._competition.units), batch.target_BLC[mask_BL]

    def join(self, world: World) -> None:
        self._sums_C, self._counts_C = np.split(np.array(world.sum(*self._sums_C, *self._counts_C)), 2)

    def result(self) -> dict[str, float]:
        assert self._competition.score is not None
        errors_C = self._competition.target_errors(self._sums_C, self._counts_C)
        values = dict(zip(self._competition.targets, map(float, errors_C), strict=True))
        metric = float(self._competition.score(self._sums_C, self._counts_C))
        return values | {"metric": metric, "choice": self._choice(errors_C, metric)}  # last: names are free

    def _choice(self, errors_C: np.ndarray, metric: float) -> float:
        """Mean error of several targets in deviations, as they were learned: by their weights, and no unit's say."""
        units = self._numbers or self._competition.units
        weights_C = np.where(np.isfinite(errors_C), self._weights or 1.0, 0.0)
        if units is None or len(errors_C) == 1 or not weights_C.any():
            return metric
        learned_C = weights_C > 0
        return float(np.average((errors_C / units.scales)[learned_C], weights=weights_C[learned_C]))


class StructureMeter:
    """The structure task's loss over whole structures and all their pairs, and what it is made of."""

    def __init__(self, settings: TrainConfig) -> None:
        weights = (settings.frame_weight, settings.tm_weight, settings.confidence_weight)
        self._loss = StructureLoss(*weights, max_pairs=0)
        self._sums_T = np.zeros(1 + len(StructureTerms._fields))
        self._weight = 0.0

    def add(self, outputs: RnaOutputs, batch: RnaBatch) -> None:
        terms = self._loss.terms(outputs, batch)
        values_T = [float(self._loss.weighted(terms)), *map(float, terms)]
        if not np.isfinite(values_T).all():
            raise _not_finite(batch)
        self._sums_T += values_T
        self._weight += self._loss.weight(batch)

    def join(self, world: World) -> None:
        *sums, self._weight = world.sum(*self._sums_T, self._weight)
        self._sums_T = np.array(sums)

    def result(self) -> dict[str, float]:
        with np.errstate(invalid="ignore"):
            metric, *parts = map(float, self._sums_T / self._weight)
        return {"metric": metric, **dict(zip(StructureTerms._fields, parts, strict=True))}


class ClassMeter:
    """Log loss and accuracy over all sequences; of classes that do not exclude each other, over all their labels."""

    def __init__(self, classes: Classes) -> None:
        self._exclusive = classes.exclusive
        self._loss = self._right = self._count = 0.0

    def add(self, outputs: RnaOutputs, batch: RnaBatch) -> None:
        assert outputs.class_logits_BC is not None
        assert batch.label_BC is not None
        p_BC = class_probabilities(outputs.class_logits_BC, exclusive=self._exclusive).cpu().numpy()
        if not np.isfinite(p_BC).all():
            raise _not_finite(batch)
        label_BC = batch.label_BC.cpu().numpy()
        self._loss += float(log_losses(p_BC, label_BC, exclusive=self._exclusive).sum())
        if self._exclusive:
            self._right += float((p_BC.argmax(axis=1) == label_BC.argmax(axis=1)).sum())
        else:
            self._right += float(((p_BC >= 0.5) == label_BC).mean(axis=1).sum())
        self._count += len(p_BC)

    def join(self, world: World) -> None:
        self._loss, self._right, self._count = world.sum(self._loss, self._right, self._count)

    def result(self) -> dict[str, float]:
        count = self._count or np.nan
        return {"metric": self._loss / count, "accuracy": self._right / count}


def _not_finite(batch: RnaBatch) -> DivergedError:
    return DivergedError(
        f"validation: a prediction for {', '.join(batch.ids[:4])}{' …' if len(batch.ids) > 4 else ''} is not finite. "
        "Next: train again with a lower train.lr, or with train.precision = 'fp32' where it was another."
    )


def metric_name(competition: Competition) -> str:
    """What the validation metric is called: structures are only scored once they are built."""
    return "structure loss" if competition.task == "structure" else competition.metric


def make_meter(competition: Competition, settings: TrainConfig, labels: Labels | None = None) -> Meter:
    """An empty meter for a competition's task; `labels` are those of a labelled set."""
    if isinstance(labels, Classes):
        return ClassMeter(labels)
    return StructureMeter(settings) if competition.task == "structure" else ErrorMeter(competition, settings, labels)
