"""Places where a NaN or inf is put into a run, and what the run did about it."""

import contextlib
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor, nn

from pipeline import train
from pipeline.batch import RnaBatch
from pipeline.config import ModelConfig, RunConfig, list_configs, load_config
from pipeline.paths import Paths
from pipeline.training.checkpoint import CheckpointStore
from pipeline.training.loop import Trainer
from tests.faults.network import POINTS, Point
from tests.pipeline import tiny

Poke = Callable[[Trainer], None]
_STEP = 5  # of twelve, before which everything is put in


@dataclass(frozen=True)
class NanPoint:
    """One place, and how the value gets there."""

    name: str
    how: str
    poke: Poke
    precision: str = "fp32"
    optimizer: str = "adamw"
    model: ModelConfig | None = None  # None = the network with all parts


@contextlib.contextmanager
def poked(poke: Poke, *, step: int = _STEP) -> Iterator[None]:
    """Call a function with the trainer once, before one step."""
    done = False

    class Poked(Trainer):
        def _step(self) -> None:
            nonlocal done
            if self.progress.step + 1 == step and not done:
                done = True
                poke(self)
            super()._step()

    with mock.patch.object(train, "Trainer", Poked):
        try:
            yield
        finally:
            Point.inject = None
    assert done, f"step {step} was never reached"


def activation(place: str, value: float) -> Poke:
    """A value in a module's output, in one step and when that step is traced."""

    def poke(trainer: Trainer) -> None:
        step = trainer.progress.step

        def inject(at: str, x: Tensor) -> Tensor:
            if at != place or trainer.progress.step != step or trainer.progress.guard.rollbacks:
                return x
            bad = torch.zeros(x.numel(), dtype=x.dtype)
            bad[0] = value
            return x + bad.view(x.shape)

        Point.inject = staticmethod(inject)

    return poke


class _Spoilt:
    """A loss that is not finite in one batch."""

    def __init__(self, loss: Any, place: list[int], trainer: Trainer, value: float) -> None:
        self._loss, self._place, self._trainer, self._value = loss, place, trainer, value

    def weight(self, batch: RnaBatch) -> float:
        return self._loss.weight(batch)

    def total(self, outputs: Any, batch: RnaBatch) -> Tensor:
        progress = self._trainer.progress
        here = [progress.epoch, progress.batch] == self._place
        return self._loss.total(outputs, batch) * (self._value if here else 1.0)


def spoil_loss(value: float) -> Poke:
    def poke(trainer: Trainer) -> None:
        place = [trainer.progress.epoch, trainer.progress.batch]
        trainer.loss = _Spoilt(trainer.loss, place, trainer, value)

    return poke


def spoil_data(trainer: Trainer) -> None:
    """An infinite weight of the first sequence that trains, in every epoch that is left."""
    source = trainer.source
    weights_NC = source.examples.weights_NC.copy()
    weights_NC[source.train[0]] = math.inf
    source.examples = replace(source.examples, weights_NC=weights_NC)


def spoil_weights(trainer: Trainer) -> None:
    with torch.no_grad():
        next(trainer.state.model.parameters())[0, 0] = math.nan


def spoil_average(trainer: Trainer) -> None:
    assert trainer.state.ema
    with torch.no_grad():
        next(trainer.state.ema.module.parameters())[0, 0] = math.inf


def spoil_moment(name: str, value: float) -> Poke:
    def poke(trainer: Trainer) -> None:
        moments = next(found for found in trainer.state.optimizer.state.values() if name in found)
        moments[name].view(-1)[0] = value

    return poke


def spoil_gradient(value: float) -> Poke:
    """A hook on one parameter's gradient, for one step and its trace."""

    def poke(trainer: Trainer) -> None:
        step = trainer.progress.step
        parameter = list(trainer.state.model.parameters())[-1]
        parameter.register_hook(lambda grad: grad * value if trainer.progress.step == step else grad)

    return poke


def spoil_scale(value: float) -> Poke:
    return lambda trainer: trainer.state.scaler.update(value)


def large_learning_rate(trainer: Trainer) -> None:
    """One update that throws the weights out of range."""
    whole, step = trainer.learning_rate, trainer.progress.step
    first = iter([1e38])

    def rate() -> float:
        return next(first, whole()) if trainer.progress.step == step else whole()

    trainer.learning_rate = rate  # type: ignore[method-assign]


NAN_POINTS = [
    *(NanPoint(place, "one NaN in its output", activation(place, math.nan)) for place in POINTS),
    NanPoint("attention logits, fp16", "one inf in its output", activation("attention logits", math.inf), "fp16"),
    NanPoint("head, bf16", "one inf in its output", activation("head", math.inf), "bf16"),
    NanPoint("loss", "times NaN in one batch", spoil_loss(math.nan)),
    NanPoint("loss, infinite", "times inf in one batch", spoil_loss(math.inf)),
    NanPoint("data", "an infinite weight of one sequence", spoil_data),
    NanPoint("weights", "one NaN between two steps", spoil_weights),
    NanPoint("weights, by the update", "a learning rate of 1e38 in one step", large_learning_rate),
    NanPoint("averaged weights", "one inf between two steps", spoil_average),
    NanPoint("gradient hook", "a parameter's gradient times NaN", spoil_gradient(math.nan)),
    NanPoint("gradient hook, infinite", "a parameter's gradient times inf", spoil_gradient(math.inf)),
    NanPoint("gradient hook, fp16", "a parameter's gradient times NaN", spoil_gradient(math.nan), "fp16"),
    NanPoint("optimiser, first moment", "one NaN between two steps", spoil_moment("exp_avg", math.nan)),
    NanPoint("optimiser, second moment", "one inf between two steps", spoil_moment("exp_avg_sq", math.inf)),
    NanPoint("Muon's momentum", "one NaN between two steps", spoil_moment("momentum", math.nan), optimizer="muon"),
    NanPoint("Muon's momentum, fp16", "one inf between two steps", spoil_moment("momentum", math.inf), "fp16", "muon"),
    NanPoint("loss scale, infinite", "set between two steps", spoil_scale(math.inf), "fp16"),
    NanPoint("loss scale, NaN", "set between two steps", spoil_scale(math.nan), "fp16"),
]


def break_module(kind: str) -> Poke:
    """A NaN in the output of the first module of a class, in one step and its trace."""

    def poke(trainer: Trainer) -> None:
        step = trainer.progress.step
        module = next(one for one in trainer.state.model.modules() if type(one).__name__ == kind)

        def hook(_module: nn.Module, _inputs: object, output: Tensor) -> Tensor | None:
            return output * math.nan if trainer.progress.step == step else None

        module.register_forward_hook(hook)

    return poke


def network_points() -> Iterator[NanPoint]:
    """In every shipped network, every class of innermost module."""
    for name in list_configs():
        if name.startswith("tiny_"):
            model = load_config(name).model
            network = train.build_model(model, tiny.TINY)
            kinds = {type(module).__name__ for module in network.modules() if not list(module.children())}
            for kind in sorted(kinds - {"Dropout", "ModuleList"}):
                yield NanPoint(f"{model.name}, {kind}", "NaN for its output", break_module(kind), model=model)


def config(*, model: dict[str, Any] | None = None, **settings: Any) -> RunConfig:
    """Twelve steps of the network with all parts."""
    return replace(tiny.config(**settings), model=ModelConfig(name="parts", kwargs=model or {}))


def recover(point: NanPoint, paths: Paths, *, run: str = tiny.RUN) -> dict[str, Any]:
    """Train with the fault; what the guard did, and whether the run ended with finite weights and metric."""
    settings = config(precision=point.precision, optimizer=point.optimizer)
    if point.model:
        settings = replace(settings, model=point.model)
    with poked(point.poke):
        report = train.run(settings, competition=tiny.TINY, paths=paths, run=run, split=tiny.SPLIT, fold=0)
    last = CheckpointStore(paths.fold_dir(run, 0) / "checkpoints").load_newest()
    assert last is not None
    tensors = [*last.weights.values(), *last.training.values()]
    for moments in last.state["optimizer"]["state"].values():
        tensors += moments.values()
    finite = all(bool(torch.isfinite(tensor).all()) for tensor in tensors)
    done = report.facts["metric"] is not None and report.facts["steps"] == 12
    return {"guard": report.facts["guard"], "finite": finite, "finished": done, "updates": report.facts["updates"]}
