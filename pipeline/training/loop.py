"""The training loop. One optimiser step, in the order in which it is read:

    indices -> examples -> augment -> collate -> forward, backward (micro-batches) -> guard -> update -> average

Everything that a step depends on is either a pure function of ``(seed, epoch, batch)`` or in the checkpoint: an
interrupted run ends with the same bits as one that was left alone.
"""

import math
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np
import torch

from models.interface import RnaModel
from pipeline import runlog
from pipeline.augment import central_crop, epoch_augmentation
from pipeline.batch import RnaBatch, make_batch, plan_by_tokens, plan_epoch, split_batch
from pipeline.competitions.base import Competition
from pipeline.config import RunConfig
from pipeline.dataset import ExampleSet, RnaExample
from pipeline.errors import DivergedError, StoppedError, StorageError
from pipeline.training.checkpoint import Checkpoint, CheckpointStore
from pipeline.training.guard import Answer, GuardCounts, Origin, Seen, classify, decide, find_origin
from pipeline.training.losses import training_loss
from pipeline.training.metrics import make_meter
from pipeline.training.optim import Ema, clip_gradients, gradients, learning_rate, make_optimizer, total_norm
from pipeline.training.precision import Precision, next_precision
from pipeline.training.stop import StopRequest
from pipeline.training.telemetry import Telemetry

_IDS_SHOWN = 16
_VALID_PAIRS = 2**20  # of nucleotides in a validation batch of structures: about 0.4 GiB of pair features


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """Examples of one competition, and which of them train and which validate."""

    examples: ExampleSet  # its weights_NC are those of the loss
    train: np.ndarray  # positions
    valid: np.ndarray


@dataclass(kw_only=True)
class Progress:
    """How far a run is: all the counters that a checkpoint carries."""

    step: int = 0  # batches taken from the plan, skipped ones included
    updates: int = 0  # of the weights: what the learning rate is a function of
    epoch: int = 0
    batch: int = 0  # next one of the epoch
    loss_sum: float = 0.0  # of the epoch
    loss_weight: float = 0.0
    best_metric: float | None = None
    best_step: int | None = None
    stale_epochs: int = 0  # since the best one
    finished: bool = False
    precision: Literal["", "bf16", "fp32"] = ""  # the rung that a rollback ordered; "" = as configured
    left_out: list[list[int]] = field(default_factory=list)  # [epoch, batch] that gave a NaN or inf
    guard: GuardCounts = field(default_factory=GuardCounts)

    @classmethod
    def from_dict(cls, tree: dict[str, Any]) -> "Progress":
        """The inverse of ``dataclasses.asdict``."""
        return cls(**{**tree, "guard": GuardCounts(**tree["guard"])})


class Trainer:
    """A network, its optimiser and its data on one device.

    Args:
        model: new or with initial weights, on `device`.
        config: of the run.
        competition: gives task, loss and metric.
        data: examples and their roles.
        device: where to compute.
        precision: the rung to start on.
        store: where checkpoints go.
        stop: polled after each step and each validation batch.
        meta: goes into every checkpoint: what `pipeline.predict` and a resumed run need to know.
    """

    def __init__(
        self,
        model: RnaModel,
        *,
        config: RunConfig,
        competition: Competition,
        data: TrainingData,
        device: torch.device,
        precision: Precision,
        store: CheckpointStore,
        stop: StopRequest,
        meta: dict[str, Any],
    ) -> None:
        self.model, self.config, self.competition, self.data = model, config, competition, data
        self.device, self.store, self.stop, self.meta = device, store, stop, meta
        self.progress = Progress()
        self.loss = training_loss(competition)
        self.optimizer = make_optimizer(model, lr=config.train.lr, weight_decay=config.train.weight_decay)
        self.ema = Ema(model, decay=config.train.ema_decay) if config.train.ema_decay else None
        self.precision, self.scaler = precision, precision.scaler(device)
        self.steps_per_epoch = -(-len(data.train) // config.train.batch_size)
        self.steps = self.steps_per_epoch * config.train.epochs
        self._lengths_N = np.minimum(data.examples.lengths, config.data.max_length)
        self._last_step: int | None = None
        self._saved_at: tuple[int, int] | None = None
        self._updating = False
        self._random_before = self._random_state()

    def fit(self, telemetry: Telemetry, *, max_steps: int | None = None) -> None:
        """Train to the end of the run.

        Args:
            telemetry: told of every step.
            max_steps: stop, resumable, after so many steps from here.

        Raises:
            StoppedError: asked to stop; the state is saved.
            DivergedError: non-finite values that no fallback cured.
            StorageError: memory or disk ran out; the last good state is saved.
        """
        self.telemetry, self.log = telemetry, telemetry.log
        self._last_step = None if max_steps is None else self.progress.step + max_steps
        try:
            if self._saved_at is None:
                self.save()  # a state to roll back to before the first update
            while not self.progress.finished:
                self._train_epoch()
                self._end_epoch()
        except (MemoryError, RuntimeError) as err:
            if not is_out_of_memory(err):
                raise
            raise self._out_of_memory() from err

    # --- one epoch ---

    def _train_epoch(self) -> None:
        progress, save_every = self.progress, self.config.train.save_every
        self._start_epoch()
        while progress.batch < self.steps_per_epoch:
            self._poll_stop()
            self._step()
            progress.step, progress.batch = progress.step + 1, progress.batch + 1
            if progress is not self.progress:  # rolled back, perhaps into an earlier epoch
                progress = self.progress
                self._start_epoch()
            elif save_every and progress.step % save_every == 0 and progress.batch < self.steps_per_epoch:
                self.save()

    def _start_epoch(self) -> None:
        """Batches and augmentation of the present epoch, from seed and epoch alone."""
        config, epoch = self.config, self.progress.epoch
        self._plan = plan_epoch(
            self._lengths_N[self.data.train],
            batch_size=config.train.batch_size,
            bucket=config.data.length_bucket,
            seed=config.train.seed,
            epoch=epoch,
        )
        self._augment = epoch_augmentation(
            len(self.data.examples),
            seed=config.train.seed,
            epoch=epoch,
            max_length=config.data.max_length,
            flip=config.data.flip,
        )
        self._seconds = {"data_seconds": 0.0, "compute_seconds": 0.0}
        self._epoch_started = time.monotonic()
        self.model.train()

    def _end_epoch(self) -> None:
        """Evaluate, remember the best, decide whether to go on, save."""
        progress, settings = self.progress, self.config.train
        train_seconds = time.monotonic() - self._epoch_started
        values = self.evaluate()
        metric = values.pop("metric")
        is_best = math.isfinite(metric) and (progress.best_metric is None or metric < progress.best_metric)
        if is_best:
            progress.best_metric, progress.best_step, progress.stale_epochs = metric, progress.step, 0
        else:
            progress.stale_epochs += 1
        self.telemetry.epoch(
            step=progress.step,
            epoch=progress.epoch,
            train_loss=progress.loss_sum / progress.loss_weight if progress.loss_weight else math.nan,
            metric=metric,
            best=is_best,
            valid=values,
            seconds=round(time.monotonic() - self._epoch_started, 3),
            train_seconds=round(train_seconds, 3),
            **{name: round(value, 3) for name, value in self._seconds.items()},
        )
        progress.epoch, progress.batch, progress.loss_sum, progress.loss_weight = progress.epoch + 1, 0, 0.0, 0.0
        out_of_patience = 0 < settings.patience < progress.stale_epochs
        progress.finished = progress.epoch >= settings.epochs or out_of_patience
        self.save()

    @torch.no_grad()
    def evaluate(self) -> dict[str, float]:
        """Metric of the averaged weights on the validation examples: ``{"metric": …, <target>: …}``.

        Whole sequences, but only the middle ``max_length`` of a structure: its pair map grows with the square.
        """
        examples, valid, longest = self.data.examples, self.data.valid, self.config.data.max_length
        is_structure = self.competition.task == "structure"

        def middle(example: RnaExample, _index: int) -> RnaExample:
            return central_crop(example, max_length=longest)

        lengths = (self._lengths_N if is_structure else examples.lengths)[valid]
        network = (self.ema.module if self.ema else self.model).eval()
        micro_batch = self.config.train.micro_batch or self.config.train.batch_size
        meter = make_meter(self.competition)
        max_pairs = _VALID_PAIRS if is_structure else None
        for part in plan_by_tokens(lengths, max_tokens=micro_batch * longest, max_pairs=max_pairs):
            self._poll_stop()
            batch = make_batch(examples, valid[part], change=middle if is_structure else None).to(self.device)
            with self.precision.autocast(self.device):
                outputs = network(batch.inputs)
            meter.add(outputs, batch)
        return meter.result()

    # --- one step ---

    def _step(self) -> None:
        """Take the next batch: update the weights with it, or leave it out if the guard says so."""
        progress, started = self.progress, time.perf_counter()
        place = [progress.epoch, progress.batch]
        if place in progress.left_out:
            return
        taken = self._take(place)
        prepared = time.perf_counter()
        self._random_before = self._random_state()
        loss = self._accumulate(taken)
        self.scaler.unscale_(self.optimizer)
        norm = total_norm(gradients(self.model))
        seen = classify(loss, norm, scale=self.scaler.get_scale() if self.precision.scaled else None)
        lr = self._learning_rate()
        if seen == "finite":
            seen = self._update(norm=norm, lr=lr)
        answer = decide(seen, progress.guard, max_skips=self.config.train.max_skips)
        if answer != "go":
            self._leave_out(taken, seen, answer, loss=loss, norm=norm)
            return
        progress.loss_sum += loss * taken.weight
        progress.loss_weight += taken.weight
        self._seconds["data_seconds"] += prepared - started
        self._seconds["compute_seconds"] += time.perf_counter() - prepared
        place_told = {"step": progress.step + 1, "epoch": progress.epoch}
        self.telemetry.step(**place_told, loss=loss, weight=taken.weight, norm=norm, lr=lr, tokens=taken.tokens)

    def _take(self, place: list[int]) -> "_Taken":
        """Read, augment and pad the examples of one batch."""
        indices = self.data.train[self._plan[place[1]]]
        parts = split_batch(indices, micro_batch=self.config.train.micro_batch)
        batches = [make_batch(self.data.examples, part, change=self._augment) for part in parts]
        weight = sum(self.loss.weight(batch) for batch in batches)
        return _Taken(place, batches, weight, int(self._lengths_N[indices].sum()))

    def _accumulate(self, taken: "_Taken") -> float:
        """Forward and backward of all micro-batches; the loss of the whole batch."""
        self.optimizer.zero_grad(set_to_none=True)
        loss = torch.zeros((), device=self.device)
        try:
            for batch in taken.batches:
                on_device = batch.to(self.device)
                with self.precision.autocast(self.device):
                    outputs = self.model(on_device.inputs)
                part = self.loss.total(outputs, on_device) / (taken.weight or 1.0)
                self.scaler.scale(part).backward()
                loss += part.detach()
            return float(loss)
        except (MemoryError, RuntimeError):  # out of memory, mostly: the state is saved as it was before the step
            self._set_random_state(self._random_before)
            raise

    def _update(self, *, norm: float, lr: float) -> Seen:
        """Clip, step, average. The average takes in finite weights only."""
        self._updating = True
        clip_gradients(self.model, norm=norm, clip_norm=self.config.train.clip_norm)
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        self.scaler.step(self.optimizer)
        self.scaler.update()
        if not math.isfinite(total_norm([parameter.detach() for parameter in self.model.parameters()])):
            return "nonfinite_weights"
        if self.ema:
            self.ema.update(self.model, updates=self.progress.updates)
        self.progress.updates += 1
        self._updating = False
        return "finite"

    def _learning_rate(self) -> float:
        settings = self.config.train
        shape = {"lr": settings.lr, "warmup": settings.warmup, "schedule": settings.schedule}
        return learning_rate(self.progress.updates, total=self.steps, **shape)  # type: ignore[arg-type]

    # --- what the guard orders ---

    def _leave_out(self, taken: "_Taken", seen: Seen, answer: Answer, *, loss: float, norm: float) -> None:
        """Log a batch that gave a NaN or inf, trace it, and skip it or roll back."""
        progress, counts = self.progress, self.progress.guard
        step, (epoch, batch) = progress.step + 1, taken.place
        row: dict[str, Any] = {"seen": seen, "answer": answer, "step": step, "epoch": epoch, "batch": batch}
        row |= {"loss": loss, "grad_norm": norm, "precision": self.precision.name}
        if seen == "scaler_overflow":
            self.scaler.update(self.scaler.get_scale() / 2)
            self.log.write("guard", **row, scale=self.scaler.get_scale(), overflows=counts.overflows)
            return
        origin = self._trace(taken)
        if self.precision.scaled and seen != "nonfinite_weights":
            self.scaler.update(self.scaler.get_scale())  # not the scale's fault
        progress.left_out.append(taken.place)
        ids = [name for part in taken.batches for name in part.ids]
        row |= {"ids": ids[:_IDS_SHOWN], "sequences": len(ids), "skips_in_a_row": counts.skips_in_a_row}
        self.log.write("guard", **row, **origin.as_row(), **_input_statistics(taken.batches))
        what = f"step {step}: {seen.replace('_', ' ')} ({self.precision.name}), {origin.describe()}; "
        what += f"batch {', '.join(ids[:4])}{' …' if len(ids) > 4 else ''}"
        if answer == "roll_back":
            self._roll_back(what)
        else:
            runlog.warn(f"{what}; the batch is skipped ({counts.skips_in_a_row} in a row)")

    def _trace(self, taken: "_Taken") -> Origin:
        """Replay the step with the same random numbers and find the first module that produced the value."""
        after = self._random_state()

        def replay() -> None:
            self._set_random_state(self._random_before)
            self._accumulate(taken)

        try:
            return find_origin(self.model, replay)
        finally:
            self._set_random_state(after)
            self.optimizer.zero_grad(set_to_none=True)

    def _roll_back(self, what: str) -> None:
        """Everything from the last good checkpoint, one precision rung down, without the bad batches.

        Raises:
            DivergedError: that was done ``max_rollbacks`` times already.
        """
        counts, left_out = self.progress.guard, self.progress.left_out
        if counts.rollbacks >= self.config.train.max_rollbacks:
            raise DivergedError(
                f"{what}; {counts.skips} batches skipped and {counts.rollbacks} rollbacks did not cure it. "
                "Next: look at the guard rows of metrics.jsonl; then a lower train.lr, or train.precision = 'fp32'."
            )
        checkpoint = self.store.load_newest()
        assert checkpoint is not None, "the first step is only taken when a checkpoint exists"
        lower = next_precision(self.precision, self.device)
        self.restore(checkpoint)
        self._set_precision(lower)
        self.progress.precision = lower.name  # type: ignore[assignment]
        self.progress.left_out = left_out
        self.progress.guard = GuardCounts(**{**asdict(counts), "rollbacks": counts.rollbacks + 1, "skips_in_a_row": 0})
        self._updating = False
        self.log.write("rollback", to_step=self.progress.step, precision=lower.name, rollbacks=counts.rollbacks + 1)
        runlog.warn(f"{what}; back to step {self.progress.step}, {lower.name}, without {len(left_out)} batches")

    # --- state ---

    def save(self) -> None:
        """Commit a checkpoint of the present state."""
        progress = self.progress
        started = time.monotonic()
        weights = (self.ema.module if self.ema else self.model).state_dict()
        counters = asdict(progress)
        path = self.store.save(
            progress.step,
            weights=weights,
            training=self.model.state_dict() if self.ema else None,
            state={
                "optimizer": self.optimizer.state_dict(),
                "scaler": self.scaler.state_dict(),
                "random": self._random_state(),
                "progress": counters,
            },
            meta={**self.meta, "best_step": progress.best_step, "progress": counters, "precision": self.precision.name},
        )
        self._saved_at = (progress.step, progress.epoch)
        seconds = round(time.monotonic() - started, 3)
        self.log.write("checkpoint", step=progress.step, path=path.name, seconds=seconds)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go back to a checkpoint's state: weights, optimiser, scaler, random numbers, counters."""
        self.model.load_state_dict(checkpoint.training)
        if self.ema:
            self.ema.module.load_state_dict(checkpoint.weights)
        self.optimizer.load_state_dict(checkpoint.state["optimizer"])
        self.progress = Progress.from_dict(checkpoint.state["progress"])
        if self.progress.precision:
            self._set_precision(Precision(self.progress.precision, "a rollback ordered it"))
        if self.precision.scaled and checkpoint.state["scaler"]:
            self.scaler.load_state_dict(checkpoint.state["scaler"])
        self._set_random_state(checkpoint.state["random"])
        self._saved_at = (self.progress.step, self.progress.epoch)

    def _set_precision(self, precision: Precision) -> None:
        self.precision, self.scaler = precision, precision.scaler(self.device)

    def _random_state(self) -> dict[str, torch.Tensor]:
        """Generators that dropout draws from: the CPU's and the device's."""
        state = {"cpu": torch.get_rng_state()}
        if self.device.type == "cuda":
            state["cuda"] = torch.cuda.get_rng_state(self.device)
        return state

    def _set_random_state(self, state: dict[str, torch.Tensor]) -> None:
        torch.set_rng_state(state["cpu"])
        if self.device.type == "cuda" and "cuda" in state:
            torch.cuda.set_rng_state(state["cuda"], self.device)

    def _poll_stop(self) -> None:
        progress = self.progress
        reason = self.stop.reason()
        if reason is None and progress.step == self._last_step:
            reason = "the number of steps that was asked for"
        if reason is None:
            return
        if self._saved_at != (progress.step, progress.epoch):
            self.save()
        raise StoppedError(
            f"{self.store.folder.parent}: stopped at step {progress.step} of {self.steps} ({reason}); the state is "
            "saved. Next: the same command goes on from there."
        )

    def _out_of_memory(self) -> StorageError:
        """Save what is good and say what can be done."""
        if not self._updating and self._saved_at != (self.progress.step, self.progress.epoch):
            self.save()
        micro_batch = self.config.train.micro_batch or self.config.train.batch_size
        return StorageError(
            f"{self.device} is out of memory at step {self.progress.step + 1} with micro-batches of {micro_batch} "
            f"sequences; the state is saved. Next: SET='train.micro_batch={max(1, micro_batch // 2)}' makes the same "
            "optimiser steps in less memory; it needs a TAG of its own."
        )


class _Taken(NamedTuple):
    """One batch, on its way through a step."""

    place: list[int]  # [epoch, batch of the epoch]
    batches: list[RnaBatch]  # micro-batches
    weight: float  # of all of them in the loss
    tokens: int


def is_out_of_memory(err: BaseException) -> bool:
    """Whether an error says that memory ran out, on the CPU (a plain RuntimeError) or a GPU."""
    if isinstance(err, MemoryError | torch.OutOfMemoryError):
        return True
    return "out of memory" in str(err).lower() or "can't allocate memory" in str(err)


def _input_statistics(batches: Sequence[RnaBatch]) -> dict[str, float]:
    """What is worth knowing of the data of a bad batch."""
    lengths = [int(batch.inputs.mask_BL.sum(dim=1).max()) for batch in batches]
    targets = [batch.target_BLC[~torch.isnan(batch.target_BLC)] for batch in batches if batch.target_BLC is not None]
    largest = max((float(target.abs().max()) for target in targets if target.numel()), default=0.0)
    return {"longest": max(lengths), "largest_target": largest}
