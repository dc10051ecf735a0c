"""Whether a run may go on as it is now: the same settings and data, or changes that were asked for and do no harm."""

import contextlib
import json
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

import torch

from pipeline.errors import ConfigError
from pipeline.runlog import warn
from pipeline.training.checkpoint import CheckpointStore

#: Settings that a run may go on with after a change, and what the change does.
_HARMLESS = {
    "config.model.init": "read as a run begins, and this one has begun",
    "config.train.epochs": "the learning rate follows the schedule of the longer run from here on",
    "config.train.patience": "decides when the run ends, not what it learns",
    "config.train.save_every": "changes no result",
    "config.train.max_skips": "matters where a batch is bad",
    "config.train.max_rollbacks": "matters where a batch is bad",
    "config.train.spike_threshold": "matters where a loss is a spike",
    "config.train.micro_batch": "the same optimiser steps up to rounding and dropout's random numbers",
    "config.train.workers": "the same batches in the same order",
    "config.train.sharding": "the same steps up to rounding, in other memory",
    "config.train.process_timeout": "matters where a process is lost",
    "config.train.gradient_checkpointing": "the same gradients in other memory",
}
_OF_FIGURES = ("facts.shown_range", "facts.shown_ranges")  # which nothing that is learned depends on
_MISSING = "(absent)"


class Change(NamedTuple):
    """One setting that is another one now."""

    key: str
    before: Any
    now: Any
    remark: str


def require_same(
    wanted: dict[str, Any],
    begun: dict[str, Any],
    *,
    where: Path,
    allow_changes: bool = False,
    defaults: Mapping[str, Any] = MappingProxyType({}),
) -> list[Change]:
    """Refuse to go on with a run under other settings or with other data.

    A setting that the code did not have when the run was begun was at its default, and one that it has no more was
    none where it was off.

    Args:
        wanted: meta data of the run as it would be begun now.
        begun: meta data of its newest checkpoint.
        where: folder of the run, for the message.
        allow_changes: let changes through that do no harm.
        defaults: the part of `wanted` that follows where nothing is set.

    Returns:
        The changes that were let through.

    Raises:
        ConfigError: with every difference.
    """
    changes = _changes(wanted, begun, defaults)
    harmful = [change.key for change in changes if not _is_harmless(change)]
    if not harmful and (allow_changes or not changes):
        return changes
    tables = [key for key in harmful if key.startswith("data.") and not key.startswith("data.pseudo.")]
    repair = "make data folds if a table was damaged, " if tables else ""
    before = _as_overrides(change for change in changes if change.key in harmful or not allow_changes)
    if not harmful:
        repair = "--allow-changes (make: ALLOW_CHANGES=1) to go on with the change, "
    elif allow_changes:
        how = f" ({before} in SET)" if before else ""
        repair += f"leave {', '.join(harmful)} as it was{how}, since it would make the run another one, or "
    elif before:
        repair = f"the same command with {before} in SET (--set) and ALLOW_CHANGES=1 to go on as it was begun, "
    raise ConfigError(
        f"{where}: this run was begun with other settings or data: {_told(changes)}. "
        f"Next: {repair}TAG=<name> for a new run beside it, or --restart (make: RESTART=1) to begin this one anew."
    )


def warn_of_other_folds(folder: Path, wanted: Mapping[str, Any], *, label: str, auto_epochs: bool) -> None:
    """Say it if other folds of a run were trained with other settings: every score takes all of them as one network.

    Args:
        folder: of the fold that begins.
        wanted: ``config`` of it.
        label: of the fold, for the message.
        auto_epochs: their number follows from the fold's size.
    """
    alike = _HARMLESS.keys() - {"config.model.init", *([] if auto_epochs else ["config.train.epochs"])}
    for other in sorted(folder.parent.glob("fold*")):
        begun = None
        with contextlib.suppress(OSError):  # one that this user may not read keeps nobody from training another
            begun = None if other == folder else CheckpointStore(other / "checkpoints").newest_meta()
        changes = [change for change in _changes(wanted, begun, wanted) if change.key not in alike] if begun else []
        if changes:
            warn(
                f"{label}: {other.name} of this run was trained with other settings: {_told(changes)}; scores and "
                "ensembles take the folds as one network. Next: TAG=<name> keeps variants apart."
            )


def _changes(wanted: Mapping[str, Any], begun: Mapping[str, Any], defaults: Mapping[str, Any]) -> list[Change]:
    """What is another now; of `begun` only the parts that are wanted count, and what it lacks was at its default."""
    now = dict(_leaves(wanted))
    told = dict(_leaves({key: begun.get(key) for key in wanted}))
    before = dict(_leaves(defaults)) | {key: value for key, value in told.items() if key in now or value}
    found = [(key, before.get(key, _MISSING), now.get(key, _MISSING)) for key in sorted(now.keys() | before.keys())]
    return [
        Change(key, was, is_, _HARMLESS.get(key, ""))
        for key, was, is_ in found
        if was != is_ and key not in _OF_FIGURES
    ]


def _told(changes: Iterable[Change]) -> str:
    return "; ".join(f"{change.key} {change.before} -> {change.now}" for change in changes)


def _as_overrides(changes: Iterable[Change]) -> str:
    """The settings of before as a command takes them; empty where a change is none of settings, or not to be undone."""
    changes = list(changes)
    if not all(change.key.startswith("config.") and _MISSING not in (change.before, change.now) for change in changes):
        return ""
    return " ".join(f"{change.key.removeprefix('config.')}={json.dumps(change.before)}" for change in changes)


def _is_harmless(change: Change) -> bool:
    if change.key == "config.train.epochs":
        return change.now > change.before
    if change.key == "config.model.init":  # a folder that was moved
        return bool(change.before and change.now)
    return change.key in _HARMLESS


def environment(device: torch.device, *, processes: int = 1) -> dict[str, Any]:
    """What else the last bits of a run depend on, beside settings, data and code."""
    is_cuda = device.type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if is_cuda else device.type,
        "threads": None if is_cuda else torch.get_num_threads(),
        "torch": torch.__version__.split("+")[0],
        "processes": processes,
    }


def warn_of_other_environment(begun: dict[str, Any], now: dict[str, Any], *, label: str) -> None:
    """Say it if a run goes on where the bits of the one that was begun cannot be met again."""
    other = [f"{key} {begun[key]} -> {now[key]}" for key in now if key in begun and begun[key] != now[key]]
    if other:
        warn(
            f"{label}: goes on with {', '.join(other)}: as good a run, but sums round otherwise and it will not end "
            "with the same bits"
        )


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
    else:
        yield prefix, tree
