"""What a run says as it begins, and what it is: the first row of its metrics."""

import sys
from collections.abc import Sequence
from typing import Any

import torch

from models.heads import is_head
from models.layers import kernels
from pipeline.config import FREEZING
from pipeline.runlog import amount, say, warn
from pipeline.stage import commit, versions
from pipeline.training.loop import Trainer
from pipeline.training.metrics import metric_name
from pipeline.training.optim import learning_rate
from pipeline.training.resume import Change


def describe(trainer: Trainer, meta: dict[str, Any]) -> dict[str, Any]:
    """The "start" row: all that a number of this run can depend on."""
    return {
        **meta,
        "resumed_step": trainer.progress.step,
        "steps": trainer.steps,
        "metric_name": metric_name(trainer.competition),
        "device": str(trainer.device),
        "processes": trainer.world.size,
        "device_name": torch.cuda.get_device_name(trainer.device) if trainer.device.type == "cuda" else "",
        "precision": trainer.state.precision.name,
        "precision_reason": trainer.state.precision.reason,
        "kernels": kernels.describe(trainer.state.model, trainer.device),
        "threads": torch.get_num_threads(),
        "parameters": sum(parameter.numel() for parameter in trainer.state.model.parameters()),
        "train": len(trainer.data.train),
        "pseudo": int((trainer.data.train >= len(trainer.data.examples.ids_N)).sum()),
        "valid": len(trainer.data.valid),
        "versions": versions(),
        "commit": commit(),
        "command": sys.argv,
    }


def announce(trainer: Trainer, facts: dict[str, Any], *, needs: str, goes_on: bool, label: str) -> None:
    """Say what begins: who trains, where, in which memory, from which step, and what of the network is held back."""
    state, config, first = trainer.state, trainer.config, trainer.progress.step
    say(f"{label}: {facts['train']:,} sequences train, {facts['valid']:,} validate; {facts['parameters']:,} parameters")
    if facts["pseudo"]:
        say(f"{label}: {facts['pseudo']:,} of them with what was predicted for them: {config.data.pseudo}")
    processes = trainer.world.size
    devices = f"{processes} processes, each on {trainer.device}" if processes > 1 else str(trainer.device)
    say(f"{label}: {devices}, {state.precision.name} ({state.precision.reason})")
    say(f"{label}: {needs}")
    if facts["kernels"]:
        say(f"{label}: {facts['kernels']}")
    if slow := kernels.slow(state.model, trainer.device):
        warn(f"{label}: {slow}")
    steps = f"{amount(trainer.steps, 'step')}, {amount(config.train.num_epochs, 'epoch')}"
    say(f"{label}: goes on at step {first} of {steps}" if goes_on else f"{label}: {steps}")
    learning = {
        name: parameter.numel() for name, parameter in state.model.named_parameters() if parameter.requires_grad
    }
    for added in (said for name, said in FREEZING.items() if getattr(config.model, name)):
        trained = sum(learning.values())
        say(f"{label}: {trained:,} of the parameters train ({trained / facts['parameters']:.1%}), {added} and heads")
    if config.train.backbone_lr_share != 1:
        held = sum(count for name, count in learning.items() if not is_head(name))
        say(f"{label}: {held:,} parameters of the backbone at {config.train.backbone_lr_share:g} of the learning rate")
    if config.train.length_stages:
        _announce_stages(trainer, label=label)


def _announce_stages(trainer: Trainer, *, label: str) -> None:
    """Say in which crops the run trains now, and where the stages outlast it."""
    config, epoch = trainer.config, trainer.progress.epoch
    longest = int(trainer.data.examples.lengths[trainer.data.train].max())
    say(f"{label}: epoch {epoch + 1} in crops of {config.longest(epoch)} nt ({config.train.length_stages})")
    if (most := max(map(config.longest, range(config.train.num_epochs)))) < min(longest, config.data.max_length):
        warn(
            f"{label}: train.length_stages = {config.train.length_stages!r} last longer than train.epochs = "
            f"{config.train.epochs}: nothing trains on more than {most} nt of sequences of up to {longest} nt"
        )


def tell_changes(trainer: Trainer, changes: Sequence[Change], *, label: str) -> None:
    """Say every change that a run goes on with, and where more epochs move the learning rate."""
    for change in changes:
        say(f"{label}: {change.key} {change.before} -> {change.now}: {change.remark}")
        if change.key == "config.train.epochs":
            before, now = (
                learning_rate(trainer.progress.updates, trainer.config.train, total=trainer.source.batches * epochs)
                for epochs in (change.before, change.now)
            )
            say(f"{label}: the next update's learning rate {before:.2e} -> {now:.2e}")
