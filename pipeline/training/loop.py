"""The training loop. One optimiser step, in the order in which it is read:

    indices -> examples -> augment -> pack -> forward, backward (micro-batches) -> guard -> update -> average

Everything that a step depends on is either a pure function of ``(seed, epoch, batch)`` or in the checkpoint: an
interrupted run ends with the same bits as one that was left alone. Where several processes train together, every line
here runs in all of them and every decision is the same in all of them (`pipeline.training.distributed`).
"""

import math
import time
import traceback
from collections.abc import Callable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any, TypeVar

import numpy as np
import torch

from models.interface import RnaModel, RnaOutputs
from pipeline.augment import central_crop
from pipeline.batch import RnaBatch, make_batch, unpack
from pipeline.competitions.base import Competition
from pipeline.config import RunConfig
from pipeline.dataset import ExampleSet, RnaExample
from pipeline.errors import DataError, DivergedError, LostDeviceError, StoppedError, StorageError
from pipeline.packing import STRUCTURE_PAIRS, plan_by_tokens
from pipeline.runlog import amount
from pipeline.training.checkpoint import Checkpoint, CheckpointStore
from pipeline.training.distributed import ALONE, World
from pipeline.training.failures import (
    OutOfMemoryEverywhere,
    fitting,
    is_device_lost,
    is_out_of_memory,
    is_process_lost,
)
from pipeline.training.guard import Seen, classify, decide, is_spike, remember
from pipeline.training.loader import BatchSource, Loader, Place
from pipeline.training.losses import training_loss
from pipeline.training.metrics import make_meter
from pipeline.training.optim import clip_gradients, gradients, learning_rate, set_learning_rate
from pipeline.training.precision import Precision
from pipeline.training.recovery import Recovery
from pipeline.training.state import Progress, TrainingState
from pipeline.training.step import Taken, forward_backward
from pipeline.training.stop import StopRequest
from pipeline.training.telemetry import Silence, Telemetry

_Result = TypeVar("_Result")


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
        world: processes that train together.
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
        world: World = ALONE,
    ) -> None:
        self.config, self.competition, self.data, self.world = config, competition, data, world
        self.device, self.store, self.stop, self.meta = device, store, stop, meta
        self.state = TrainingState(model, settings=config.train, device=device, precision=precision, world=world)
        self.loss = training_loss(competition, config.train, data.examples.labels)
        self.source = BatchSource(data.examples, data.train, config=config, rank=world.rank, ranks=world.size)
        self.steps = self.source.batches * config.train.num_epochs
        self._last_step: int | None = None
        self._saved_at: tuple[int, int, int] | None = None
        self._updating = False
        self._before: dict[str, torch.Tensor] | None = None  # generators as they were when the present step began

    @property
    def progress(self) -> Progress:
        """How far the run is; a rollback puts another one in its place."""
        return self.state.progress

    @property
    def _now(self) -> tuple[int, int, int]:
        """What tells states apart: a rollback comes to a step that was saved, and what it ordered is not."""
        return self.progress.step, self.progress.epoch, self.progress.guard.rollbacks

    @property
    def micro_batch(self) -> int:
        """Sequences of a forward pass, at most."""
        settings = self.config.train
        halved = self.progress.micro_batch if settings.micro_batch == "auto" else 0
        return halved or settings.largest_micro_batch

    def fit(self, telemetry: Telemetry | Silence, *, max_steps: int | None = None) -> None:
        """Train to the end of the run.

        Args:
            telemetry: told of every step.
            max_steps: stop, resumable, after so many steps from here.

        Raises:
            StoppedError: asked to stop; the state is saved.
            DivergedError: non-finite values that no fallback cured.
            StorageError: memory or disk ran out, and the last good state is saved.
            LostDeviceError: the device failed; the last checkpoint is intact.
            LostProcessError: another process of the run is gone.
        """
        self.telemetry, self.log = telemetry, telemetry.log
        state, settings = self.state, self.config.train
        self.recovery = Recovery(state, settings=settings, store=self.store, meta=self.meta, log=telemetry.log)
        self._last_step = None if max_steps is None else self.progress.step + max_steps
        try:
            with Loader(
                self.source, workers=settings.workers, stops=lambda: self.stop.reason() is not None
            ) as self._loader:
                if self._saved_at is None:
                    self.save()  # a state to roll back to before the first update
                while not self.progress.finished:
                    self._train_epoch()
                    self._end_epoch()
        except (MemoryError, RuntimeError) as err:
            if is_out_of_memory(err):
                raise self._out_of_memory(err) from err
            if is_process_lost(err):  # in the middle of a sharded network
                raise self.world.lost() from err
            if is_device_lost(err):
                raise self._device_lost(err) from err
            raise

    # --- one epoch ---

    def _train_epoch(self) -> None:
        progress, save_every = self.progress, self.config.train.save_every
        self._start_epoch()
        while progress.batch < self.source.batches:
            self._poll_stop()
            self._step()
            progress.step, progress.batch = progress.step + 1, progress.batch + 1
            is_due = save_every and progress.step % save_every == 0 and progress.batch < self.source.batches
            if is_due and progress is self.progress:
                self.save()
            if progress is not self.progress:  # rolled back, perhaps into an earlier epoch
                progress = self.progress
                self._start_epoch()

    def _start_epoch(self) -> None:
        self._seconds = {"data_seconds": 0.0, "compute_seconds": 0.0}
        self._epoch_started = time.monotonic()
        self.state.model.train()

    def _end_epoch(self) -> None:
        """Evaluate, remember the best, decide whether to go on, save."""
        progress = self.progress
        train_seconds = time.monotonic() - self._epoch_started
        try:
            values = self.evaluate()
        except DivergedError as err:  # perhaps of sequences longer than the pieces that train
            rung = self.state.precision.name
            if rung == "fp32" or not self.world.is_alone:  # several processes have agreed to end
                self.recovery.report(str(err))
                raise
            self.recovery.roll_back(f"step {progress.step}: in {rung}, {str(err).partition('. Next')[0]}")
            return
        metric = values.pop("metric")
        is_best = progress.enter(metric, values.pop("choice", metric))
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
        """Metric of the averaged weights on the validation examples: as `Meter.result`.

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

        lengths = (self.source.lengths_N if is_structure else examples.lengths)[valid]
        network = self.state.predictor.eval()
        meter = make_meter(self.competition, self.config.train, examples.labels)
        max_pairs = STRUCTURE_PAIRS if is_structure else None
        parts = plan_by_tokens(lengths, max_tokens=micro_batch * longest, max_pairs=max_pairs)

        def predict(part: np.ndarray) -> tuple[RnaBatch, RnaOutputs]:
            batch = make_batch(examples, valid[part], change=middle if is_structure else None).to(self.device)
            with self.state.precision.autocast(self.device):
                return batch, network(batch.inputs)

        def count(batch: RnaBatch, outputs: RnaOutputs, *, mine: bool) -> None:
            if mine:
                meter.add(outputs, batch)

        rank, size = self.world.rank, self.world.size
        for first in range(0, len(parts), size):
            self._poll_stop()
            last = min(first + rank, len(parts) - 1)  # at the end some predict what another counts: all meet in a pass
            batch, outputs = self._everywhere(partial(predict, parts[last]))
            self.world.together(partial(count, batch, outputs, mine=last == first + rank))
        meter.join(self.world)
        return meter.result()

    # --- one step ---

    def _step(self) -> None:
        """Take the next batch: update the weights with it, or leave it out if the guard says so."""
        state, progress, started = self.state, self.progress, time.perf_counter()
        place = [progress.epoch, progress.batch]
        if place in progress.left_out:
            return
        taken, random = self._take(place), state.random()
        prepared, self._before = time.perf_counter(), random
        taken, loss, intact = self._forward_backward(taken, random)
        if not state.sharded:
            self.world.add_gradients(state.model)
        state.scaler.unscale_(state.optimizer)
        norm = state.norm_of(gradients(state.parameters)) if intact else math.nan
        lr = self.learning_rate()
        seen = self._judge(loss, norm)
        if seen == "finite":
            seen = self._update(norm=norm, lr=lr)
        self._before = None
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
        """This process's share of one batch, with the weight of all of it."""
        where = Place(place[0], place[1], self.micro_batch)
        try:
            taken = self.world.together(partial(self._loader.take, where))
        except StoppedError:
            self._poll_stop()  # saves
            raise
        batches = [unpack(packed) for packed in taken]
        (weight,) = self.world.sum(sum(self.loss.weight(batch) for batch in batches))
        passes = max(self.world.gather(len(batches))) if self.state.sharded else 0
        return Taken(place, batches, weight, self.source.tokens(where), passes)

    def _accumulate(self, taken: Taken) -> tuple[float, bool]:
        """Forward and backward of this process's micro-batches, see `forward_backward`."""
        state = self.state
        how = {"precision": state.precision, "scaler": state.scaler, "device": self.device, "passes": taken.passes}
        return forward_backward(state.model, self.loss, taken.batches, weight=taken.weight, **how)  # type: ignore[arg-type]

    def _forward_backward(self, taken: Taken, random: dict[str, torch.Tensor]) -> tuple[Taken, float, bool]:
        """`_accumulate`, in smaller micro-batches where memory runs out and ``micro_batch = "auto"`` allows it."""
        while True:
            try:
                share, is_whole = self._everywhere(partial(self._accumulate, taken))
                loss, broken = self.world.sum(share, not is_whole)
                return taken, loss, not broken
            except (MemoryError, RuntimeError) as err:
                if self.state.sharded or not is_out_of_memory(err):
                    raise
                size = max(self.world.gather(max((len(batch.ids) for batch in taken.batches), default=0)))
                if not self._may_halve(err, size=size):
                    raise
            # here, outside `except`, nothing holds the tensors of the failed pass any more
            self.state.set_random(random)
            self.recovery.halve_micro_batch(size)
            taken = self._take(taken.place)

    def _everywhere(self, work: Callable[[], _Result]) -> _Result:
        """Do something that takes memory; if it fails in one process, it does in all of them.

        One that leaves the middle of a sharded network can tell the others only by being gone.
        """
        return work() if self.state.sharded else self.world.together(work)

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
        clip_gradients(gradients(state.parameters), norm=norm, clip_norm=self.config.train.clip_norm)
        set_learning_rate(state.optimizer, lr)
        state.scaler.step(state.optimizer)
        state.scaler.update()
        if not math.isfinite(state.norm_of(state.parameters)):
            return "nonfinite_weights"
        if state.ema:
            state.ema.update(updates=state.progress.updates)
        state.progress.updates += 1
        self._updating = False
        return "finite"

    def learning_rate(self) -> float:
        """Of the next update."""
        return learning_rate(self.progress.updates, self.config.train, total=self.steps)

    # --- state ---

    def save(self) -> None:
        """Commit a checkpoint of the present state; a state that is not finite is rolled back instead."""
        progress, started = self.progress, time.monotonic()
        bad = self.state.nonfinite()
        if bad:
            self.recovery.roll_back(f"step {progress.step}: {bad[0]} is not finite and is not saved")
            return
        self._require_same_weights()
        weights, training, rest = self.state.tensors()
        meta = {"best_step": progress.best_step, "progress": asdict(progress), "precision": self.state.precision.name}
        with self.world.main_first():
            if self.world.is_main:
                path = self.store.save(
                    progress.step, weights=weights, training=training, state=rest, meta={**self.meta, **meta}
                )
                seconds = round(time.monotonic() - started, 3)
                self.log.write("checkpoint", step=progress.step, path=path.name, seconds=seconds)
        self._saved_at = self._now

    def _require_same_weights(self) -> None:
        """Of several processes each makes the update by itself, and devices of different kinds round differently."""
        norms = self.world.gather(self.state.norm())
        if len(set(norms)) > 1:
            raise self.world.agreed(
                DivergedError(
                    f"step {self.progress.step}: the processes' weights are no longer the same (norms {norms}). "
                    "Next: use devices of one kind; the run goes on from its last checkpoint."
                )
            )

    def restore(self, checkpoint: Checkpoint) -> None:
        """Go on from a checkpoint. A finished run goes on too, if it was given more epochs or patience since.

        Raises:
            DataError: another version of the code wrote it.
        """
        try:
            with fitting(checkpoint.folder):
                self.state.restore(checkpoint)
        except DataError as err:
            self.world.agreed(err)
            raise
        progress = self.progress
        progress.finished = progress.finished and progress.is_over(self.config.train)
        self._saved_at = self._now

    def _poll_stop(self) -> None:
        progress = self.progress
        reason = self.stop.reason()
        if self.world.any(reason is not None):  # a signal may have reached one process alone
            reason = next(filter(None, self.world.gather(reason)))
        if reason is None and progress.step == self._last_step:
            reason = "the number of steps that was asked for"
        if reason is None:
            return
        while self._saved_at != self._now:  # again after a state that is rolled back instead
            self.save()
        raise self.world.agreed(
            StoppedError(
                f"{self.store.folder.parent}: stopped at step {self.progress.step} of {self.steps} ({reason}); the "
                "state is saved. Next: the same command goes on from there."
            )
        )

    def _out_of_memory(self, err: BaseException) -> StorageError:
        """Save what is good and say what can be done; one of several processes cannot save by itself."""
        traceback.clear_frames(err.__traceback__)  # or all that the pass had made is kept, and saving takes memory, too
        if self._before is not None:
            self.state.set_random(self._before)
        together = self.world.size == 1 or isinstance(err, OutOfMemoryEverywhere)
        saves = together and not self._updating
        while saves and self._saved_at != self._now:
            self.save()
        size = min(self.micro_batch, -(-self.config.train.batch_size // self.world.size))
        smaller = "try a smaller network, train.gradient_checkpointing, or a smaller data.max_length"
        if size > 1 and self.config.train.micro_batch != "auto":
            smaller = (
                f"SET='train.micro_batch={size // 2}' ALLOW_CHANGES=1 makes the same optimiser steps in less memory"
            )
        step, in_epoch = self.progress.step, self.progress.batch < self.source.batches
        where = f"at step {step + 1}" if in_epoch else f"in the validation after step {step}"
        told = StorageError(
            f"{self.device} is out of memory {where} with micro-batches of {amount(size, 'sequence')}; "
            f"{'the state is saved' if saves else 'the last checkpoint is intact'}. Next: {smaller}."
        )
        return self.world.agreed(told) if together else told

    def _device_lost(self, err: BaseException) -> LostDeviceError:
        """Say it, and touch the device no more: saving from a context that is dead fails, or hangs."""
        saved = next(iter(self.store.steps()), 0)
        return LostDeviceError(
            f"{self.store.folder.parent}: the device {self.device} failed at step {self.progress.step + 1} "
            f"({str(err).strip().splitlines()[0]}); nothing more can be read from it, the checkpoint of step {saved} "
            "is intact. Next: the same command goes on from there; if it fails at the same step again, "
            "CUDA_LAUNCH_BLOCKING=1 names the operation, otherwise look for Xid lines in dmesg."
        )
