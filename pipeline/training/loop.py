"""The training loop. One optimiser step, in the order in which it is read:

    indices -> examples -> augment -> collate -> forward, backward (micro-batches) -> guard -> update -> average

Everything that a step depends on is either a pure function of ``(seed, epoch, batch)`` or in the checkpoint: an
interrupted run ends with the same bits as one that was left alone.
"""

import math
import time
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from models.interface import RnaModel
from pipeline.augment import central_crop, epoch_augmentation
from pipeline.batch import make_batch, plan_by_tokens, plan_epoch, split_batch
from pipeline.competitions.base import Competition
from pipeline.config import RunConfig
from pipeline.dataset import ExampleSet, RnaExample
from pipeline.errors import StoppedError, StorageError
from pipeline.training.checkpoint import Checkpoint, CheckpointStore
from pipeline.training.failures import is_device_lost, is_out_of_memory
from pipeline.training.guard import Seen, classify, decide, is_spike, remember
from pipeline.training.losses import training_loss
from pipeline.training.metrics import make_meter
from pipeline.training.optim import clip_gradients, gradients, learning_rate, total_norm
from pipeline.training.precision import Precision
from pipeline.training.recovery import Recovery
from pipeline.training.state import Progress, TrainingState
from pipeline.training.step import Taken, forward_backward
from pipeline.training.stop import StopRequest
from pipeline.training.telemetry import Telemetry

_VALID_PAIRS = 2**20  # of nucleotides in a validation batch of structures: about 0.4 GiB of pair features


@dataclass(frozen=True, kw_only=True)
class TrainingData:
    """Examples of one competition, and which of them train and which validate."""

    examples: ExampleSet  # its weights_NC are those of the loss
    train: np.ndarray  # positions
    valid: np.ndarray


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
        self.config, self.competition, self.data = config, competition, data
        self.device, self.store, self.stop, self.meta = device, store, stop, meta
        self.state = TrainingState(model, settings=config.train, device=device, precision=precision)
        self.loss = training_loss(competition)
        self.steps_per_epoch = -(-len(data.train) // config.train.batch_size)
        self.steps = self.steps_per_epoch * config.train.epochs
        self._lengths_N = np.minimum(data.examples.lengths, config.data.max_length)
        self._last_step: int | None = None
        self._saved_at: tuple[int, int] | None = None
        self._updating = False

    @property
    def progress(self) -> Progress:
        """How far the run is; a rollback puts another one in its place."""
        return self.state.progress

    @property
    def micro_batch(self) -> int:
        """Sequences of a forward pass, at most."""
        settings = self.config.train
        halved = self.progress.micro_batch if settings.micro_batch == "auto" else 0
        return halved or settings.largest_micro_batch

    def fit(self, telemetry: Telemetry, *, max_steps: int | None = None) -> None:
        """Train to the end of the run.

        Args:
            telemetry: told of every step.
            max_steps: stop, resumable, after so many steps from here.

        Raises:
            StoppedError: asked to stop; the state is saved.
            DivergedError: non-finite values that no fallback cured.
            StorageError: memory or disk ran out, and the last good state is saved; or the device failed.
        """
        self.telemetry, self.log = telemetry, telemetry.log
        state, settings = self.state, self.config.train
        self.recovery = Recovery(state, settings=settings, store=self.store, meta=self.meta, log=telemetry.log)
        self._last_step = None if max_steps is None else self.progress.step + max_steps
        try:
            if self._saved_at is None:
                self.save()  # a state to roll back to before the first update
            while not self.progress.finished:
                self._train_epoch()
                self._end_epoch()
        except (MemoryError, RuntimeError) as err:
            if is_out_of_memory(err):
                raise self._out_of_memory() from err
            if is_device_lost(err):
                raise self._device_lost(err) from err
            raise

    # --- one epoch ---

    def _train_epoch(self) -> None:
        progress, save_every = self.progress, self.config.train.save_every
        self._start_epoch()
        while progress.batch < self.steps_per_epoch:
            self._poll_stop()
            self._step()
            progress.step, progress.batch = progress.step + 1, progress.batch + 1
            is_due = save_every and progress.step % save_every == 0 and progress.batch < self.steps_per_epoch
            if is_due and progress is self.progress:
                self.save()
            if progress is not self.progress:  # rolled back, perhaps into an earlier epoch
                progress, self._saved_at = self.progress, None
                self._start_epoch()

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
        self.state.model.train()

    def _end_epoch(self) -> None:
        """Evaluate, remember the best, decide whether to go on, save."""
        progress = self.progress
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
        progress.finished = progress.is_over(self.config.train)
        self.save()

    def evaluate(self) -> dict[str, float]:
        """Metric of the averaged weights on the validation examples: ``{"metric": …, <target>: …}``.

        Whole sequences, but only the middle ``max_length`` of a structure: its pair map grows with the square.
        """
        while True:
            size = self.micro_batch
            try:
                return self._evaluate(micro_batch=size)
            except (MemoryError, RuntimeError) as err:
                if not self._may_halve(err, size=size):
                    raise
            self.recovery.halve_micro_batch(size)

    @torch.no_grad()
    def _evaluate(self, *, micro_batch: int) -> dict[str, float]:
        examples, valid, longest = self.data.examples, self.data.valid, self.config.data.max_length
        is_structure = self.competition.task == "structure"

        def middle(example: RnaExample, _index: int) -> RnaExample:
            return central_crop(example, max_length=longest)

        lengths = (self._lengths_N if is_structure else examples.lengths)[valid]
        network = self.state.predictor.eval()
        meter = make_meter(self.competition)
        max_pairs = _VALID_PAIRS if is_structure else None
        for part in plan_by_tokens(lengths, max_tokens=micro_batch * longest, max_pairs=max_pairs):
            self._poll_stop()
            batch = make_batch(examples, valid[part], change=middle if is_structure else None).to(self.device)
            with self.state.precision.autocast(self.device):
                outputs = network(batch.inputs)
            meter.add(outputs, batch)
        return meter.result()

    # --- one step ---

    def _step(self) -> None:
        """Take the next batch: update the weights with it, or leave it out if the guard says so."""
        state, progress, started = self.state, self.progress, time.perf_counter()
        place = [progress.epoch, progress.batch]
        if place in progress.left_out:
            return
        taken, random = self._take(place), state.random()
        prepared = time.perf_counter()
        taken, loss, intact = self._forward_backward(taken, random)
        state.scaler.unscale_(state.optimizer)
        norm = total_norm(gradients(state.model)) if intact else math.nan
        lr = self.learning_rate()
        seen = self._judge(loss, norm)
        if seen == "finite":
            seen = self._update(norm=norm, lr=lr)
        answer = decide(seen, progress.guard, max_skips=self.config.train.max_skips)
        if answer != "go":
            found: dict[str, Any] = {"loss": loss, "norm": norm, "random": random}
            self.recovery.leave_out(taken, seen, answer, **found, replay=lambda: self._accumulate(taken))
            self._updating = False
            return
        progress.loss_sum += loss * taken.weight
        progress.loss_weight += taken.weight
        self._seconds["data_seconds"] += prepared - started
        self._seconds["compute_seconds"] += time.perf_counter() - prepared
        place_told = {"step": progress.step + 1, "epoch": progress.epoch}
        self.telemetry.step(**place_told, loss=loss, weight=taken.weight, norm=norm, lr=lr, tokens=taken.tokens)

    def _take(self, place: list[int]) -> Taken:
        """Read, augment and pad the examples of one batch."""
        indices = self.data.train[self._plan[place[1]]]
        parts = split_batch(indices, micro_batch=self.micro_batch)
        batches = [make_batch(self.data.examples, part, change=self._augment) for part in parts]
        weight = sum(self.loss.weight(batch) for batch in batches)
        return Taken(place, batches, weight, int(self._lengths_N[indices].sum()))

    def _accumulate(self, taken: Taken) -> tuple[float, bool]:
        """Forward and backward of all micro-batches: the loss of the whole batch, see `forward_backward`."""
        state = self.state
        how = {"precision": state.precision, "scaler": state.scaler, "device": self.device}
        return forward_backward(state.model, self.loss, taken.batches, weight=taken.weight, **how)  # type: ignore[arg-type]

    def _forward_backward(self, taken: Taken, random: dict[str, torch.Tensor]) -> tuple[Taken, float, bool]:
        """`_accumulate`, in smaller micro-batches where memory runs out and ``micro_batch = "auto"`` allows it."""
        while True:
            size = max(len(batch.ids) for batch in taken.batches)
            try:
                return taken, *self._accumulate(taken)
            except (MemoryError, RuntimeError) as err:
                if is_out_of_memory(err):
                    self.state.set_random(random)  # saved, or tried again, as before the step
                if not self._may_halve(err, size=size):
                    raise
            # here, outside `except`, nothing holds the tensors of the failed pass any more
            self.recovery.halve_micro_batch(size)
            taken = self._take(taken.place)

    def _may_halve(self, err: BaseException, *, size: int) -> bool:
        return is_out_of_memory(err) and self.config.train.micro_batch == "auto" and size > 1

    def _judge(self, loss: float, norm: float) -> Seen:
        """What loss and gradients say before the update."""
        state, threshold = self.state, self.config.train.spike_threshold
        seen = classify(loss, norm, scale=state.scaler.get_scale() if state.precision.scaled else None)
        if threshold:
            recent = state.progress.recent_losses
            if seen == "finite" and is_spike(loss, recent, threshold=threshold):
                seen = "loss_spike"
            remember(loss, recent)
        return seen

    def _update(self, *, norm: float, lr: float) -> Seen:
        """Clip, step, average. The average takes in finite weights only."""
        state = self.state
        self._updating = True
        clip_gradients(state.model, norm=norm, clip_norm=self.config.train.clip_norm)
        for group in state.optimizer.param_groups:
            group["lr"] = lr
        state.scaler.step(state.optimizer)
        state.scaler.update()
        if not math.isfinite(total_norm([parameter.detach() for parameter in state.model.parameters()])):
            return "nonfinite_weights"
        if state.ema:
            state.ema.update(state.model, updates=state.progress.updates)
        state.progress.updates += 1
        self._updating = False
        return "finite"

    def learning_rate(self) -> float:
        """Of the next update."""
        settings = self.config.train
        shape = {"lr": settings.lr, "warmup": settings.warmup, "schedule": settings.schedule}
        return learning_rate(self.progress.updates, total=self.steps, **shape)  # type: ignore[arg-type]

    # --- state ---

    def save(self) -> None:
        """Commit a checkpoint of the present state; a state that is not finite is rolled back instead."""
        progress, started = self.progress, time.monotonic()
        bad = self.state.nonfinite()
        if bad:
            self.recovery.roll_back(f"step {progress.step}: {bad[0]} is not finite and is not saved")
            return
        weights, training, rest = self.state.tensors()
        meta = {"best_step": progress.best_step, "progress": asdict(progress), "precision": self.state.precision.name}
        path = self.store.save(
            progress.step, weights=weights, training=training, state=rest, meta={**self.meta, **meta}
        )
        self._saved_at = (progress.step, progress.epoch)
        seconds = round(time.monotonic() - started, 3)
        self.log.write("checkpoint", step=progress.step, path=path.name, seconds=seconds)

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint. A finished run goes on too, if it was given more epochs or patience since."""
        self.state.restore(checkpoint)
        progress = self.progress
        progress.finished = progress.finished and progress.is_over(self.config.train)
        self._saved_at = (progress.step, progress.epoch)

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
        size = self.micro_batch
        smaller = "a smaller network, train.gradient_checkpointing, or a smaller data.max_length"
        if size > 1 and self.config.train.micro_batch != "auto":
            smaller = (
                f"SET='train.micro_batch={size // 2}' ALLOW_CHANGES=1 makes the same optimiser steps in less memory"
            )
        return StorageError(
            f"{self.device} is out of memory at step {self.progress.step + 1} with micro-batches of {size} sequences; "
            f"the state is saved. Next: {smaller}."
        )

    def _device_lost(self, err: BaseException) -> StorageError:
        """Say it, and touch the device no more: saving from a context that is dead fails, or hangs."""
        saved = next(iter(self.store.steps()), 0)
        return StorageError(
            f"{self.store.folder.parent}: the device {self.device} failed at step {self.progress.step + 1} "
            f"({str(err).strip().splitlines()[0]}); nothing more can be read from it, the checkpoint of step {saved} "
            "is intact. Next: the same command goes on from there; if it fails at the same step again, "
            "CUDA_LAUNCH_BLOCKING=1 names the operation, otherwise look for Xid lines in dmesg."
        )
