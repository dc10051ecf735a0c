"""What a run is at one moment: network, average, optimiser, loss scaler, random numbers and counters, kept together."""

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from models.interface import RnaModel
from pipeline.config import TrainConfig
from pipeline.training import sharding
from pipeline.training.checkpoint import Checkpoint
from pipeline.training.distributed import ALONE, World
from pipeline.training.guard import GuardCounts, nonfinite_parameters
from pipeline.training.optim import Ema, make_optimizer, total_norm
from pipeline.training.precision import Precision, choose_precision


@dataclass(kw_only=True)
class Progress:
    """How far a run is: all the counters that a checkpoint carries."""

    step: int = 0  # batches taken from the plan, skipped ones included
    updates: int = 0  # of the weights: what the learning rate is a function of
    epoch: int = 0
    batch: int = 0  # next one of the epoch
    loss_sum: float = 0.0  # of the epoch
    loss_weight: float = 0.0
    best_metric: float | None = None  # of the best epoch
    best_choice: float | None = None  # what made it the best; None in checkpoints that knew the metric alone
    best_step: int | None = None
    stale_epochs: int = 0  # since the best one
    finished: bool = False
    precision: Literal["", "bf16", "fp32"] = ""  # the rung that a rollback ordered; "" = as configured
    micro_batch: int = 0  # what micro_batch = "auto" came down to when memory ran out; 0 = it has not
    left_out: list[list[int]] = field(default_factory=list)  # [epoch, batch] that were left out
    recent_losses: list[float] = field(default_factory=list)  # finite ones, what a spike is measured against
    guard: GuardCounts = field(default_factory=GuardCounts)

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> "Progress":
        """The inverse of ``dataclasses.asdict``."""
        return cls(**{**tree, "guard": GuardCounts(**tree["guard"])})

    def enter(self, metric: float, choice: float) -> bool:
        """Count the score of the epoch that ends, and say whether it is the best.

        A run that chose by the metric so far goes on by it: its best epoch is not known in other units.

        >>> begun = Progress(step=5, best_metric=300.0, best_step=3)
        >>> begun.enter(310.0, 0.9), begun.enter(290.0, 0.8), begun.enter(291.0, 0.7), begun.best_metric
        (False, True, False, 290.0)
        """
        by_metric = self.best_choice is None and self.best_metric is not None
        now, least = (metric, self.best_metric) if by_metric else (choice, self.best_choice)
        is_best = math.isfinite(now) and (least is None or now < least)
        if is_best:
            self.best_metric, self.best_choice = metric, None if by_metric else choice
            self.best_step = self.step
        self.stale_epochs = 0 if is_best else self.stale_epochs + 1
        return is_best

    def is_over(self, settings: TrainConfig) -> bool:
        """Whether the epochs or the patience are used up."""
        return self.epoch >= settings.num_epochs or 0 < settings.patience <= self.stale_epochs


class TrainingState:
    """All that an update changes, and nothing else. Of several processes each has the same, but for random numbers.

    Where ``sharding = "fsdp2"`` each has its part of weights, averages and moments instead (`sharded`).

    Args:
        model: new or with initial weights, on `device`.
        settings: of the run.
        device: where to compute.
        precision: the rung to start on.
        world: processes that train together.
    """

    def __init__(
        self,
        model: RnaModel,
        *,
        settings: TrainConfig,
        device: torch.device,
        precision: Precision,
        world: World = ALONE,
    ) -> None:
        self.model, self.device, self.world, self._seed = model, device, world, settings.seed
        self.ema = Ema(model, decay=settings.ema_decay) if settings.ema_decay else None
        self.sharded = settings.sharding == "fsdp2" and not world.is_alone
        if self.sharded:
            for network in dict.fromkeys((model, self.predictor)):
                sharding.shard(network, device)
        self.parameters = list(model.parameters())  # here once: a walk through a large network takes a millisecond
        rates = {"lr": settings.lr, "backbone_lr_share": settings.backbone_lr_share}
        self.optimizer = make_optimizer(model, weight_decay=settings.weight_decay, name=settings.optimizer, **rates)
        self.progress = Progress()
        self.set_precision(precision)
        self._draw_anew()

    @property
    def predictor(self) -> torch.nn.Module:
        """The network that predicts: the averaged one, if averaging is on."""
        return self.ema.module if self.ema else self.model

    def tensors(self) -> tuple[dict[str, Tensor], dict[str, Tensor] | None, dict[str, Any]]:
        """For `CheckpointStore.save`: weights that predict, weights that train on if they are others, and the rest.

        Every process has to ask for them, because all random numbers are among them.
        """
        random, *elsewhere = self.world.gather(self.random())
        rest = {
            "optimizer": self._whole(self.optimizer.state_dict()),
            "scaler": self.scaler.state_dict(),
            "random": random,
            "random_elsewhere": elsewhere,  # of the other processes
            "progress": asdict(self.progress),
        }
        weights = self._whole(self.predictor.state_dict())
        return weights, self.weights() if self.ema else None, rest

    def weights(self) -> dict[str, Tensor]:
        """Those that train on, whole; every process has to ask for them, and only process 0 gets them."""
        return self._whole(self.model.state_dict())

    def _whole(self, tree: dict[str, Any]) -> Any:
        return sharding.whole(tree, keep=self.world.is_main) if self.sharded else tree

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go back to a checkpoint's state: weights, optimiser, scaler, random numbers, counters."""
        for network, weights in ((self.predictor, checkpoint.weights), (self.model, checkpoint.training)):
            network.load_state_dict(sharding.parts(weights, network.state_dict()))
        self._restore_optimizer(checkpoint.state["optimizer"])
        self.progress = Progress.from_dict(checkpoint.state["progress"])
        if ordered := self.progress.precision:
            is_real = choose_precision(ordered, self.device).name == ordered  # bf16 is emulated on a T4
            self.set_precision(Precision(ordered if is_real else "fp32", "a rollback ordered it"))
        if self.precision.scaled and checkpoint.state["scaler"]:
            self.scaler.load_state_dict(checkpoint.state["scaler"])
        random = [checkpoint.state["random"], *checkpoint.state.get("random_elsewhere", [])]
        if self.world.is_main or len(random) == self.world.size:
            self.set_random(random[self.world.rank])
        else:
            self._draw_anew()

    def _restore_optimizer(self, saved: dict[str, Any]) -> None:
        parameters = [parameter for group in self.optimizer.param_groups for parameter in group["params"]]
        state = {
            index: sharding.parts(
                moments, {name: parameters[index] for name in _tensors(moments) if moments[name].ndim}
            )
            for index, moments in saved["state"].items()
        }
        self.optimizer.load_state_dict({**saved, "state": state})

    def nonfinite(self) -> list[str]:
        """Names of weights, averages and moments that hold a NaN or inf, in whichever process."""
        bad = nonfinite_parameters(self.model) + (nonfinite_parameters(self.ema.module) if self.ema else [])
        state = self.optimizer.state_dict()["state"].items()
        moments = {f"{name} {index}": moment for index, found in state for name, moment in _tensors(found).items()}
        return bad + sharding.nonfinite(moments)

    def norm(self) -> float:
        """Of weights, averages and moments: the same in all processes that train together."""
        moments = [moment for found in self.optimizer.state.values() for moment in _tensors(found).values()]
        return self.norm_of([*self.parameters, *self.predictor.parameters(), *moments])

    @torch.no_grad()
    def norm_of(self, tensors: Sequence[Tensor]) -> float:
        """Euclidean norm over tensors, the parts of all processes included: the same in all of them."""
        if not self.sharded:
            return total_norm(tensors)
        (square,) = self.world.sum(total_norm(sharding.local(tensors)) ** 2)
        return math.sqrt(square)

    def set_precision(self, precision: Precision) -> None:
        """Compute in another precision from here on, with a fresh loss scaler if it needs one."""
        self.precision, self.scaler = precision, precision.scaler(self.device)

    def _draw_anew(self) -> None:
        """Random numbers of its own for a process that is not the first, whose seed is the run's."""
        if not self.world.is_main:
            words = np.random.SeedSequence([self._seed, self.progress.step, self.world.rank]).generate_state(1)
            torch.manual_seed(int(words[0]))

    def random(self) -> dict[str, Tensor]:
        """Generators that dropout draws from: the CPU's and the device's."""
        state = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def set_random(self, state: dict[str, Tensor]) -> None:
        """The inverse of `random`."""
        set_random(state, self.device)


def _tensors(moments: dict[str, Any]) -> dict[str, Tensor]:
    """Of what an optimiser keeps of a parameter: some count their steps in Python."""
    return {name: moment for name, moment in moments.items() if isinstance(moment, Tensor)}


def set_random(state: dict[str, Tensor], device: torch.device) -> None:
    """Set the generators that dropout draws from to what `TrainingState.random` gave."""
    torch.set_rng_state(state["cpu"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)
