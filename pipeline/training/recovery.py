"""What the guard orders, done: a batch left out, traced and saved for replay; a rollback; smaller micro-batches.

Everything here may fail without harm to the run's last checkpoint, and a diagnosis that fails never ends a run.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch

from pipeline import runlog
from pipeline.batch import RnaBatch
from pipeline.config import TrainConfig
from pipeline.errors import DivergedError, StorageError
from pipeline.stage import write_text
from pipeline.training.bad_batch import BadBatch
from pipeline.training.checkpoint import CheckpointStore
from pipeline.training.distributed import load_newest
from pipeline.training.failures import is_out_of_memory
from pipeline.training.guard import Answer, GuardCounts, Origin, Seen, find_origin, lower_scale
from pipeline.training.precision import next_precision
from pipeline.training.state import TrainingState
from pipeline.training.step import Taken

#: In the fold's folder of a run that diverged: every event of the guard, for people.
REPORT = "diverged.md"
_COLUMNS = ("step", "seen", "precision", "loss", "grad_norm", "phase", "module", "ids", "saved")
_IDS_SHOWN = 16


class Recovery:
    """The fallback ladder of one run.

    Args:
        state: of the run; a rollback replaces its counters.
        settings: of the run.
        store: where checkpoints are; batches for replay go to ``bad/`` beside it.
        meta: of the run, for replay.
        log: of the run.
    """

    def __init__(
        self,
        state: TrainingState,
        *,
        settings: TrainConfig,
        store: CheckpointStore,
        meta: dict[str, Any],
        log: runlog.MetricsLog,
    ) -> None:
        self.state, self.settings, self.store, self.meta, self.log = state, settings, store, meta, log
        self.folder = store.folder.parent / "bad"

    def leave_out(
        self,
        taken: Taken,
        seen: Seen,
        answer: Answer,
        *,
        loss: float,
        norm: float,
        random: dict[str, torch.Tensor],
        replay: Callable[[], object],
    ) -> None:
        """Log a batch that gave a NaN, an inf or a spike, trace and save it, and skip it or roll back.

        Args:
            taken: the batch.
            seen: what the guard saw.
            answer: what it ordered: ``skip`` or ``roll_back``.
            loss: of the step.
            norm: of its gradients.
            random: state of the generators before the step.
            replay: runs forward and backward of the batch.

        Raises:
            DivergedError: no rollback is left.
        """
        state, counts = self.state, self.state.progress.guard
        step, (epoch, batch) = state.progress.step + 1, taken.place
        row: dict[str, Any] = {"seen": seen, "answer": answer, "step": step, "epoch": epoch, "batch": batch}
        precision, scale = state.precision.name, state.scaler.get_scale()
        row |= {"loss": loss, "grad_norm": norm, "precision": precision}
        if seen == "scaler_overflow":
            state.scaler.update(lower_scale(scale))
            self.log.write("guard", **row, scale=state.scaler.get_scale(), overflows=counts.overflows)
            return
        taken, origin, what = self._of_all(taken, *self._explain(seen, loss, random, replay))
        broken_before = origin.phase == "weights" and seen != "nonfinite_weights"
        if broken_before:  # no batch can be good for such weights, and this one is not to blame
            row["answer"] = answer = "roll_back"
        else:
            state.progress.left_out.append(taken.place)
        if state.precision.scaled and seen != "nonfinite_weights":
            state.scaler.update(scale)  # not the scale's fault
        ids = taken.ids
        row |= {"ids": ids[:_IDS_SHOWN], "sequences": len(ids), "skips_in_a_row": counts.skips_in_a_row}
        saved = self._save(taken, seen, origin, loss=loss, norm=norm, scale=scale, random=random)
        self.log.write("guard", **row, **origin.as_row(), **input_statistics(taken.batches), saved=saved)
        what = f"step {step}: {seen.replace('_', ' ')} ({precision}), {what}; batch "
        what += f"{', '.join(ids[:4])}{' …' if len(ids) > 4 else ''}"
        if answer == "roll_back":
            self.roll_back(what)
        else:
            runlog.warn(f"{what}; the batch is left out ({counts.skips_in_a_row} in a row)")

    def roll_back(self, what: str) -> None:
        """Everything from the last good checkpoint, one precision rung down, without the bad batches.

        Args:
            what: happened; one clause for a sentence.

        Raises:
            DivergedError: that was done ``max_rollbacks`` times already, or there is no checkpoint yet; `REPORT` tells.
        """
        state, before = self.state, self.state.progress
        counts = before.guard
        left = counts.rollbacks < self.settings.max_rollbacks
        checkpoint = load_newest(self.store, state.world) if left else None
        if checkpoint is None:
            left_out = runlog.amount(len(before.left_out), "batch")
            tried = f"{left_out} left out and {runlog.amount(counts.rollbacks, 'rollback')}"
            told = (
                f"{what}; {tried} did not cure it. Next: make replay runs such a batch again, and says where it breaks "
                "and in which precision it does not; then a lower train.lr, or train.precision = 'fp32'."
            )
            self.report(told)
            raise state.world.agreed(DivergedError(told))
        row = {"step": before.step + 1, "before": state.precision.name, "rollbacks": counts.rollbacks + 1}
        lower = next_precision(state.precision, state.device)
        state.restore(checkpoint)
        state.set_precision(lower)
        progress = state.progress
        progress.precision = lower.name  # type: ignore[assignment]
        progress.left_out, progress.micro_batch = before.left_out, before.micro_batch
        progress.finished = False  # that of a finished run, which was given more epochs since, says it was
        progress.guard = GuardCounts(**{**asdict(counts), "rollbacks": counts.rollbacks + 1, "skips_in_a_row": 0})
        self.log.write("rollback", **row, to_step=progress.step, precision=lower.name)
        lost = runlog.amount(len(progress.left_out), "batch")
        runlog.warn(f"{what}; back to step {progress.step}, {lower.name}, without {lost}")

    def report(self, told: str) -> None:
        """Write `REPORT` out of the log's rows: how a run diverged, and why it ends."""
        if not self.state.world.is_main:
            return
        path = self.folder.parent / REPORT
        try:
            rows = [row for row in runlog.read_metrics(self.log.path) if row["event"] in ("guard", "rollback")]
            table = [_COLUMNS, ["---"] * len(_COLUMNS), *map(_cells, rows)]
            lines = (f"| {' | '.join(cells)} |" for cells in table)
            write_text(path, f"# {self.folder.parent}\n\n{told}\n\n" + "\n".join(lines) + "\n")
            runlog.say(f"{path}: what the guard saw and did, {len(rows)} events")
        except (OSError, ValueError) as err:
            runlog.warn(f"{path}: could not be written: {err}")

    def halve_micro_batch(self, size: int) -> None:
        """Remember half the micro-batch that memory ran out with, and give back what torch still holds.

        Args:
            size: sequences in it.
        """
        progress, half = self.state.progress, max(1, size // 2)
        progress.micro_batch = half
        if self.state.device.type == "cuda":
            torch.cuda.empty_cache()
        self.log.write("micro_batch", step=progress.step + 1, before=size, now=half)
        runlog.warn(
            f"{self.state.device} is out of memory with {size} sequences at a time; goes on with micro-batches of "
            f"{half}, the optimiser's batches stay as they are"
        )

    def _explain(
        self, seen: Seen, loss: float, random: dict[str, torch.Tensor], replay: Callable[[], object]
    ) -> tuple[Origin, str]:
        """Where it began, and that as one clause."""
        if seen == "loss_spike":
            return Origin(phase="unknown"), f"loss {loss:.4g}"
        if seen == "nonfinite_weights":
            return Origin(phase="weights"), "made by the update out of finite gradients"
        origin = self._trace(random, replay)
        return origin, origin.describe()

    def _of_all(self, taken: Taken, origin: Origin, what: str) -> tuple[Taken, Origin, str]:
        """The whole batch, and where it began in the process that knows."""
        found = self.state.world.gather((taken.batches, origin, what))
        _, origin, what = min(found, key=lambda one: (not one[1].module, one[1].summed))
        return taken._replace(batches=[batch for batches, _, _ in found for batch in batches]), origin, what

    def _trace(self, random: dict[str, torch.Tensor], replay: Callable[[], object]) -> Origin:
        """Run the step again with the same random numbers and find the first module that produced the value."""
        state = self.state
        after = state.random()

        def again() -> None:
            state.set_random(random)
            replay()

        try:
            return find_origin(state.model, again)
        except (MemoryError, RuntimeError) as err:
            if state.sharded or not is_out_of_memory(err):
                raise
            return Origin(phase="unknown")
        finally:
            state.set_random(after)
            state.optimizer.zero_grad(set_to_none=True)

    def _save(
        self,
        taken: Taken,
        seen: Seen,
        origin: Origin,
        *,
        loss: float,
        norm: float,
        scale: float,
        random: dict[str, torch.Tensor],
    ) -> str | None:
        """Keep the batch for ``rna replay``; returns the file's name, None if it was not (or could not be) written."""
        state = self.state
        weights, weights_step = state.weights(), state.progress.step + 1
        if not state.world.is_main:
            return None
        try:
            if origin.phase == "weights":  # those of before are lost
                checkpoint = self.store.load_newest()
                if checkpoint is not None:
                    weights, weights_step = checkpoint.training, checkpoint.meta["step"]
            bad = BadBatch(
                seen=seen,
                step=state.progress.step + 1,
                place=taken.place,
                loss=loss,
                grad_norm=norm,
                precision=state.precision.name,
                scale=scale,
                weight=taken.weight,
                batches=taken.batches,
                weights=weights,
                weights_step=weights_step,
                random=random,
                meta=self.meta,
            )
            return bad.save(self.folder).name
        except (OSError, StorageError) as err:
            runlog.warn(f"{self.folder}: the bad batch could not be saved for replay: {err}")
            return None


def _cells(row: Mapping[str, Any]) -> list[str]:
    """Of one event's line in the report; a rollback says where to."""
    if row["event"] == "rollback":
        row = {"step": row["step"], "seen": f"rolled back to step {row['to_step']}", "precision": row["precision"]}
    shown = {**row, "ids": ", ".join(row.get("ids", []))}
    values = (shown.get(f"{name}_nonfinite", shown.get(name)) for name in _COLUMNS)
    return ["" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value) for value in values]


def input_statistics(batches: Sequence[RnaBatch]) -> dict[str, float]:
    """What is worth knowing of the data of a bad batch."""
    lengths = [int(batch.inputs.mask_BL.sum(dim=1).max()) for batch in batches]
    targets = [batch.target_BLC[~torch.isnan(batch.target_BLC)] for batch in batches if batch.target_BLC is not None]
    largest = max((float(target.abs().max()) for target in targets if target.numel()), default=0.0)
    return {"longest": max(lengths), "largest_target": largest}
