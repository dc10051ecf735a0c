"""One fold of one run: resume it if it was begun, refuse it if it is another one now, leave it if it is finished."""

import contextlib
import math
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from models.interface import RnaModel
from pipeline import plan
from pipeline.competitions.base import Competition
from pipeline.config import ModelConfig, RunConfig
from pipeline.dataset import ExampleSet, fold_members, open_examples, read_folds
from pipeline.errors import ConfigError, DataError
from pipeline.labels import Classes, Numbers, units_of
from pipeline.network import build_model, resolved_config
from pipeline.paths import Paths
from pipeline.runlog import say, score_text
from pipeline.runs import is_begun
from pipeline.stage import Report, sha256_file, write_json
from pipeline.training.announce import announce, describe, tell_changes
from pipeline.training.checkpoint import CheckpointStore
from pipeline.training.distributed import ALONE, World, load_newest
from pipeline.training.failures import in_one_sentence
from pipeline.training.initial import load_initial
from pipeline.training.loop import Trainer, TrainingData
from pipeline.training.losses import label_weights, profile_weights
from pipeline.training.metrics import metric_name
from pipeline.training.precision import choose_device, choose_precision, deterministic_algorithms
from pipeline.training.pseudo import find_teachers, with_pseudo_labels
from pipeline.training.recovery import REPORT
from pipeline.training.resume import Change, environment, require_same, warn_of_other_environment, warn_of_other_folds
from pipeline.training.settings import check_focal_alpha, check_sharding, settle
from pipeline.training.state import Progress
from pipeline.training.stop import StopRequest, run_lock
from pipeline.training.telemetry import Silence, Telemetry, drop_rows_after, settle_status
from pipeline.training.trackers import OpenTracker

#: Quantiles to which values without a range are clipped before they say what their unit is.
_MIDDLE = (0.001, 0.999)
#: In a fold's folder when its run is set aside: of the process.
_STAYS = (".lock", ".job", ".start", "run.log", "attempts")


def run(
    config: RunConfig,
    *,
    competition: Competition,
    paths: Paths,
    run: str,
    split: str,
    fold: int,
    max_steps: int | None = None,
    time_budget: float | None = None,
    restart: bool = False,
    allow_changes: bool = False,
    trackers: Mapping[str, OpenTracker] | None = None,
    world: World = ALONE,
) -> Report:
    """Train one fold to its end, from wherever it stands.

    Args:
        config: of the run; must be the one it was begun with.
        competition: what is predicted.
        paths: where clean tables, fold tables and runs are.
        run: name of the run, a folder below ``runs/``.
        split: name of the fold table.
        fold: the one that is held out.
        max_steps: stop, resumable, after so many steps.
        time_budget: stop, resumable, after so many seconds.
        restart: set an earlier run of this name and fold aside and begin anew.
        allow_changes: go on with a run that was begun although settings changed that do it no harm.
        trackers: who else is told of loss and metric, by name (`pipeline.training.trackers.find_trackers`).
        world: processes that train together; each calls this, and the first one writes.

    Returns:
        ``built``, or ``current`` if it was finished before; facts: best metric, its step, epochs, steps.

    Raises:
        ConfigError: unknown model or argument, or the run was begun with other settings or data (exit code 2).
        DataError: tables are missing or do not belong together, or other code wrote the checkpoint (3).
        DivergedError: non-finite values that no fallback cured (4).
        StorageError: disk or memory ran out, or every checkpoint is damaged (5).
        StoppedError: asked to stop, the device or another process is lost, or another process trains here (75).
    """
    started = time.monotonic()
    folder = paths.fold_dir(run, fold)
    lock = run_lock(folder) if world.is_main else contextlib.nullcontext(folder.is_dir)
    with lock as is_held, StopRequest(time_budget=time_budget if world.is_main else None) as stop:
        if restart and world.is_main:
            set_aside(folder)
        torch.manual_seed(config.train.seed)
        config, build = settle(config, competition, paths=paths)
        model = build()
        store = CheckpointStore(folder / "checkpoints", is_held=is_held)
        if world.is_main:
            store.sweep()
        with world.main_first():  # arrays are built once
            data, digests = load_data(config, model, competition=competition, paths=paths, split=split, fold=fold)
        begun, changes = world.from_main(store.newest_meta), list[Change]()
        units = _units(competition, data, where=f"{split}: fold {fold}") if begun is None else units_of(begun)
        competition = replace(competition, units=units)
        auto_epochs = config.train.epochs == "auto"
        config = replace(config, train=config.train.settled(len(data.train)))
        meta = {"run": run, "competition": competition.name, "split": split, "fold": fold}
        meta |= {"data": digests, "config": resolved_config(config, model)}
        labels = data.examples.labels
        meta |= {labels.kind: labels.facts()} if labels else {}
        meta |= {"facts": dict(competition.facts)} if competition.facts else {}
        meta |= {"units": units.facts()} if units else {}
        if begun is None and allow_changes and not is_begun(folder.parent):  # a run of which other folds are
            raise ConfigError(f"{folder}: no run was begun here that could be changed. Next: leave out ALLOW_CHANGES.")
        if begun is None and world.is_main:
            told: dict[str, Any] = {"label": f"{run} fold{fold}", "auto_epochs": auto_epochs}
            warn_of_other_folds(folder, {"config": meta["config"]}, **told)
        if begun is not None:
            unset = resolved_config(RunConfig(model=ModelConfig(name=config.model.name)), model)
            how = {"allow_changes": allow_changes, "defaults": {"config": unset}}
            changes = require_same(meta, begun, where=folder, **how)  # type: ignore[arg-type]
            if begun["progress"]["finished"] and Progress.from_dict(begun["progress"]).is_over(config.train):
                if world.is_main:
                    store.set_damaged_aside()
                begun = world.from_main(store.newest_meta)
                if begun is not None and begun["progress"]["finished"]:
                    if world.is_main:
                        settle_status(folder)
                    return _report(store, begun, status="current", seconds=0.0)
        with deterministic_algorithms(config.train.deterministic):
            options: dict[str, Any] = {"max_steps": max_steps, "changes": changes, "trackers": trackers}
            _train(model, config, competition, data, store, stop, meta, world, **options)
        done = world.from_main(store.newest_meta)
        assert done is not None
        best, step = done["progress"]["best_metric"], done["progress"]["best_step"]
        if best is not None and world.is_main:
            say(f"{run} fold{fold}: best {metric_name(competition)} {score_text(best)} at step {step}")
        return _report(store, done, status="built", seconds=time.monotonic() - started)


def load_data(
    config: RunConfig, model: RnaModel, *, competition: Competition, paths: Paths, split: str, fold: int
) -> tuple[TrainingData, dict[str, Any]]:
    """Open examples and fold table, and decide who trains and who validates.

    Profiles that weigh nothing do not train; only scored examples validate, and those that teach nothing do neither.
    Pseudo-labelled ones train, and never validate.

    Returns:
        The data, and the digests by which a resumed run knows that they are the same.

    Raises:
        ConfigError: no such fold; base-pair probabilities or features are needed and missing.
        DataError: tables are missing or do not belong together, or nothing is left to train or validate on.
    """
    reads: dict[str, Any] = {"bpp": model.uses_bpp, "features": config.data.features, "crop": config.data.crop}
    examples = open_examples(competition, paths=paths, table="train", **reads)
    table = paths.fold_table(split)
    held_out_N = fold_members(read_folds(table, examples=examples), fold, where=split)
    assert examples.weights_NC is not None
    assert examples.scored_N is not None
    minimum = config.data.min_signal_to_noise if competition.signal_to_noise else -math.inf
    weighting = config.data.weighting if competition.signal_to_noise else "uniform"
    weights_NC = profile_weights(examples.weights_NC, weighting=weighting, minimum=minimum)
    train = np.flatnonzero(~held_out_N & (weights_NC > 0).any(axis=1))
    valid = np.flatnonzero(held_out_N & examples.scored_N & np.isfinite(examples.weights_NC).any(axis=1))
    for name, members in (("training", train), ("validation", valid)):
        if not len(members):
            raise DataError(
                f"{table}: fold {fold} leaves no {name} sequence (training needs a profile with signal_to_noise of at "
                f"least {config.data.min_signal_to_noise}, validation a scored one). Next: give another fold or "
                "threshold."
            )
    if isinstance(examples.labels, Numbers):
        examples = replace(examples, labels=_over_training(examples, train, where=f"{table}: fold {fold}"))
    if isinstance(examples.labels, Classes):
        check_focal_alpha(config.train.focal_alpha, examples.labels)
    if isinstance(examples.labels, Classes) and config.train.class_balance:
        assert examples.labels_NC is not None
        how: dict[str, Any] = {"exclusive": examples.labels.exclusive, "beta": config.train.class_balance}
        weights_NC = weights_NC * label_weights(examples.labels_NC, train, **how)
    digests: dict[str, Any] = {"examples": examples.key, "folds": sha256_file(table)}
    if examples.bpp is not None:
        digests["bpp"] = examples.bpp.key
    if examples.features is not None:
        digests["features"] = examples.features.key
    examples = replace(examples, weights_NC=weights_NC)
    if config.data.pseudo and config.data.pseudo_weight:
        learner = {"competition": competition.name, "split": split, "fold": fold, "data": digests}
        teachers = find_teachers(learner, config.data, paths=paths)
        where: dict[str, Any] = {"competition": competition, "paths": paths}
        examples, train = with_pseudo_labels(examples, train, teachers, data=config.data, **where)
        digests["pseudo"] = teachers.facts
    return TrainingData(examples=examples, train=train, valid=valid), digests


def _over_training(examples: ExampleSet, train: np.ndarray, *, where: str) -> Numbers:
    """The numbers with mean and deviation over the sequences that train: no other one says how they are scaled."""
    assert isinstance(examples.labels, Numbers)
    assert examples.labels_NC is not None
    return _all_measured(examples.labels.over(examples.labels_NC[train]), where=where)


def _units(competition: Competition, data: TrainingData, *, where: str) -> Numbers | None:
    """Mean and deviation of each target of a set of one's own over the values that train; None for other competitions.

    Values are clipped as the loss clips them, or else to the middle 99.8 %: a single wild one would be the unit.
    """
    if competition.task != "values" or not competition.is_own:
        return None
    examples = data.examples
    assert examples.targets_TC is not None
    assert examples.weights_NC is not None
    teaches_NC = np.isin(np.arange(len(examples.ids_N)), data.train)[:, None] & (examples.weights_NC > 0)

    def values_of(c: int) -> np.ndarray:
        assert examples.targets_TC is not None
        values_T = examples.targets_TC[np.repeat(teaches_NC[:, c], np.diff(examples.offsets)), c]
        values_T = values_T[~np.isnan(values_T)].astype(np.float64)
        within = competition.target_range or (np.quantile(values_T, _MIDDLE) if values_T.size else (0.0, 0.0))
        return np.clip(values_T, *within)

    units = Numbers.of_values(competition.targets, map(values_of, range(len(competition.targets))))
    return _all_measured(units, where=where)


def _all_measured(numbers: Numbers, *, where: str) -> Numbers:
    for name, count in zip(numbers.names, numbers.counts, strict=True):
        if not count:
            raise DataError(
                f"{where} leaves no training sequence of which {name} was measured. Next: give another split, or data "
                "without that column."
            )
    return numbers


def set_aside(folder: Path) -> None:
    """Move all that a run wrote to ``set-aside-<n>/`` in its own folder, so that it can begin anew."""
    earlier = sorted(folder.glob("set-aside-*"))
    found = [path for path in sorted(folder.iterdir()) if path.name not in _STAYS and path not in earlier]
    if found:
        numbers = [int(number) for path in earlier if (number := path.name.rpartition("-")[2]).isdecimal()]
        target = folder / f"set-aside-{max(numbers, default=0) + 1}"  # the first ones may have been removed
        target.mkdir()
        for path in found:
            path.rename(target / path.name)
        say(f"{folder}: the earlier run is now in {target.name}")


@in_one_sentence("training, as it begins")
def _train(
    model: RnaModel,
    config: RunConfig,
    competition: Competition,
    data: TrainingData,
    store: CheckpointStore,
    stop: StopRequest,
    meta: dict[str, Any],
    world: World,
    *,
    max_steps: int | None,
    changes: list[Change],
    trackers: Mapping[str, OpenTracker] | None,
) -> None:
    device = choose_device()
    precision = choose_precision(config.train.precision, device)
    checkpoint, here = load_newest(store, world), environment(device, processes=world.size)
    initial = checkpoint.meta.get("initial") if checkpoint else load_initial(model, config.model, meta)
    meta = meta | {"environment": checkpoint.meta.get("environment", here) if checkpoint else here}
    meta |= {"initial": initial} if initial else {}
    plan.set_gradient_checkpointing(model, config.train.gradient_checkpointing)
    check_sharding(config.train, world)
    size = {"length": int(data.examples.lengths[data.train].max()), "sequences": len(data.train)}
    build = partial(build_model, config.model, competition, data.examples.labels)
    needs = plan.check(config, build, **size, device=device, processes=world.size)
    trainer = Trainer(
        model.to(device),
        config=config,
        competition=competition,
        data=data,
        device=device,
        precision=precision,
        store=store,
        stop=stop,
        meta=meta,
        world=world,
    )
    folder = store.folder.parent
    if checkpoint is not None:
        trainer.restore(checkpoint)
    with world.main_first():
        if world.is_main:
            (folder / REPORT).unlink(missing_ok=True)  # of an earlier attempt
            drop_rows_after(folder / "metrics.jsonl", step=trainer.progress.step, epoch=trainer.progress.epoch)
            write_json(folder / "config.json", meta)
    facts, first = describe(trainer, meta), trainer.progress.step
    label = f"{meta['run']} fold{meta['fold']}"
    announce(trainer, facts, needs=needs, goes_on=checkpoint is not None, label=label)
    warn_of_other_environment(meta["environment"], here, label=label)
    tell_changes(trainer, changes, label=label)
    stop.defer()
    listeners: dict[str, Any] = {"trackers": trackers, "meta": meta, "work": trainer.source.read_until}
    told = {"label": label, "steps": trainer.steps, "first_step": first, "metric": facts["metric_name"], **listeners}
    with Telemetry(folder, **told) if world.is_main else Silence() as telemetry:
        telemetry.log.write("start", **facts)
        for change in changes:
            telemetry.log.write("changed", step=first, **change._asdict())
        trainer.fit(telemetry, max_steps=max_steps)
        telemetry.log.write("done", step=trainer.progress.step, **_outcome(asdict(trainer.progress)))


def _outcome(progress: dict[str, Any]) -> dict[str, Any]:
    return {
        "metric": progress["best_metric"],
        "best_step": progress["best_step"],
        "epochs": progress["epoch"],
        "updates": progress["updates"],
        "guard": progress["guard"],
    }


def _report(store: CheckpointStore, meta: dict[str, Any], *, status: Any, seconds: float) -> Report:
    outputs = {"checkpoint": store.best_folder(), "metrics": store.folder.parent / "metrics.jsonl"}
    facts = {"steps": meta["step"], **_outcome(meta["progress"])}
    return Report(stage="train", status=status, outputs=outputs, facts=facts, seconds=seconds)
