"""One fold of one run: resume it if it was begun, refuse it if it is another one now, leave it if it is finished."""

import contextlib
import math
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from models.adapters import add_adapters, merged_state
from models.heads import is_head
from models.interface import RnaModel
from models.layers import kernels
from models.registry import create_model, model_arguments
from pipeline import plan
from pipeline.competitions.base import Competition
from pipeline.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from pipeline.dataset import ExampleSet, fold_members, open_examples, read_folds
from pipeline.errors import ConfigError, DataError, StorageError
from pipeline.labels import Classes, Labels, Numbers, read_labels, units_of
from pipeline.paths import Paths
from pipeline.runlog import say, score_text, warn
from pipeline.stage import Report, commit, sha256_file, versions, write_json
from pipeline.training.checkpoint import CheckpointStore, DamagedError, initial_checkpoint, load_weights, read_meta
from pipeline.training.distributed import ALONE, World, load_newest
from pipeline.training.failures import in_one_sentence
from pipeline.training.initial import has_seen, load_fitting, trained_on
from pipeline.training.loop import Trainer, TrainingData
from pipeline.training.losses import label_weights, profile_weights
from pipeline.training.metrics import metric_name
from pipeline.training.optim import learning_rate
from pipeline.training.precision import choose_device, choose_precision, deterministic_algorithms
from pipeline.training.pseudo import find_teachers, with_pseudo_labels
from pipeline.training.recovery import REPORT
from pipeline.training.resume import Change, environment, require_same, warn_of_other_environment, warn_of_other_folds
from pipeline.training.state import Progress
from pipeline.training.stop import StopRequest, run_lock
from pipeline.training.telemetry import Silence, Telemetry, drop_rows_after, settle_status
from pipeline.training.trackers import OpenTracker

#: Bins of the C1'–C1' distance, for the structure task: 1.9 Å wide between 4 and 60 Å.
NUM_DISTANCE_BINS = 32
_HEADS = ("num_channels", "num_distance_bins", "num_classes")  # a network's arguments that follow from the competition
_ANSWERS = {"values": "values are", "structure": "structures are", "classes": "classes are", "numbers": "numbers are"}
_COORDINATES = "coordinates"  # a head that a structure competition's configuration may have, and others leave out
#: Settings that say something of other tasks only, by their section.
_IDLE: dict[str, dict[str, tuple[str, ...]]] = {
    "values": {"data": ("crop",), "train": ("focal_gamma", "class_balance")},
    "structure": {"data": ("crop", "pseudo"), "train": ("focal_gamma", "class_balance")},
    "classes": {
        "data": ("min_signal_to_noise", "weighting", "flip"),  # read backwards it is another sequence
        "train": ("frame_weight", "tm_weight", "confidence_weight"),
    },
    "numbers": {
        "data": ("min_signal_to_noise", "weighting", "flip"),
        "train": ("frame_weight", "tm_weight", "confidence_weight", "focal_gamma", "class_balance"),
    },
}
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
        DataError: tables are missing or do not belong together (3).
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
        refuse_idle(config, competition)
        model = build_model(config.model, competition, read_labels(paths) if competition.has_labels else None)
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
        if begun is None and allow_changes:
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


def refuse_idle(config: RunConfig, competition: Competition) -> None:
    """ConfigError for a setting that is not at its default and means nothing to the competition's task."""
    if config.data.crop and config.data.crop % 2 == 0:
        raise ConfigError(
            f"[data] crop: got {config.data.crop}; expected an odd number. Next: crop = {config.data.crop + 1}."
        )
    if config.data.crop and config.train.length_stages:
        raise ConfigError(
            f"[train] length_stages = {config.train.length_stages!r} crops anywhere, and [data] crop = "
            f"{config.data.crop} keeps the middle alone; expected one of them. Next: leave one out."
        )
    share = config.train.backbone_lr_share
    if share != 1 and not config.model.init:
        raise ConfigError(
            f"[train] backbone_lr_share = {share:g} without model.init would hold back what has learned nothing yet; "
            "expected 1. Next: model.init = a checkpoint's folder, or leave it out."
        )
    if config.model.lora_rank and (not config.model.init or config.train.sharding != "none"):
        raise ConfigError(
            f"[model] lora_rank = {config.model.lora_rank}: adapters need the weights of another run (model.init), and "
            "all of them in each process (train.sharding = 'none'). Next: give model.init, or leave it out."
        )
    if config.model.lora_rank and not (share and config.model.lora_alpha):
        raise ConfigError(
            f"[model] lora_rank = {config.model.lora_rank} with lora_alpha = {config.model.lora_alpha:g} and "
            f"backbone_lr_share = {share:g}: adapters learn nothing where either is 0. Next: leave that one out."
        )
    if config.data.pseudo and config.train.focal_gamma:
        raise ConfigError(
            f"[data] pseudo with [train] focal_gamma = {config.train.focal_gamma:g}: probabilities hold no right "
            "answer that a network could be sure of; expected one of the two. Next: leave one out."
        )
    defaults = {"data": DataConfig(), "train": TrainConfig()}
    for section, names in _IDLE[competition.task].items():
        for name in names:
            got, usual = getattr(getattr(config, section), name), getattr(defaults[section], name)
            if got != usual:
                raise ConfigError(
                    f"[{section}] {name} = {got!r} means nothing where {_ANSWERS[competition.task]} predicted "
                    f"({competition.name}); expected {usual!r}. Next: leave it out."
                )


def build_model(config: ModelConfig, competition: Competition, labels: Labels | None = None) -> RnaModel:
    """The network of a configuration, with the heads that the competition's task asks for.

    Args:
        config: name and arguments.
        competition: what is predicted.
        labels: of a labelled set: they give the number of logits, and the token table a row for every letter at least.

    Raises:
        ConfigError: the model or one of its arguments is unknown or makes no sense.
    """
    is_structure = competition.task == "structure"
    channels, bins = (0, NUM_DISTANCE_BINS) if is_structure else (0 if labels else len(competition.targets), 0)
    heads = {"num_channels": channels, "num_distance_bins": bins} | (
        {"num_classes": len(labels.names)} if labels else {}
    )
    kwargs = {key: value for key, value in config.kwargs.items() if is_structure or key != _COORDINATES}
    if not kwargs.get("num_classes", 1):  # a checkpoint's settings name the default
        del kwargs["num_classes"]
    rows = kwargs.get("vocabulary", 0)
    if labels and type(rows) is int and rows < len(labels.alphabet):
        kwargs["vocabulary"] = len(labels.alphabet)
    for key in _HEADS:
        if key in kwargs:
            raise ConfigError(f"[model] kwargs: {key} follows from the competition. Next: leave it out.")
    try:
        model = create_model(config.name, **heads, **kwargs)
        if config.lora_rank:
            add_adapters(model, rank=config.lora_rank, alpha=config.lora_alpha)
        return model
    except (TypeError, ValueError) as err:
        hint = "" if "Next:" in str(err) else " Next: correct it there."
        raise ConfigError(f"[model] {err}{hint}") from err


def resolved_config(config: RunConfig, model: RnaModel) -> dict[str, Any]:
    """The settings as a checkpoint keeps them: with the defaults of the network's constructor written out.

    A default that changes in the code later neither changes a run that goes on nor how its checkpoints predict.
    """
    arguments = {name: parameter.default for name, parameter in model_arguments(type(model)).items()}
    left_out = ("num_channels", "num_distance_bins")
    chosen = {name: value for name, value in arguments.items() if name not in left_out} | config.model.kwargs
    return asdict(replace(config, model=replace(config.model, kwargs=chosen)))


def load_data(
    config: RunConfig, model: RnaModel, *, competition: Competition, paths: Paths, split: str, fold: int
) -> tuple[TrainingData, dict[str, Any]]:
    """Open examples and fold table, and decide who trains and who validates.

    Profiles that weigh nothing do not train; only scored examples validate, and those that teach nothing do neither.
    Pseudo-labelled ones train, and never validate.

    Returns:
        The data, and the digests by which a resumed run knows that they are the same.

    Raises:
        ConfigError: no such fold; base-pair probabilities are needed and missing.
        DataError: tables are missing or do not belong together, or nothing is left to train or validate on.
    """
    examples = open_examples(competition, paths=paths, table="train", bpp=model.uses_bpp, crop=config.data.crop)
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
    if isinstance(examples.labels, Classes) and config.train.class_balance:
        assert examples.labels_NC is not None
        how: dict[str, Any] = {"exclusive": examples.labels.exclusive, "beta": config.train.class_balance}
        weights_NC = weights_NC * label_weights(examples.labels_NC, train, **how)
    digests: dict[str, Any] = {"examples": examples.key, "folds": sha256_file(table)}
    if examples.bpp is not None:
        digests["bpp"] = examples.bpp.key
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
        target = folder / f"set-aside-{len(earlier) + 1}"
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
    initial = checkpoint.meta.get("initial") if checkpoint else _load_initial(model, config.model, meta)
    meta = meta | {"environment": checkpoint.meta.get("environment", here) if checkpoint else here}
    meta |= {"initial": initial} if initial else {}
    plan.set_gradient_checkpointing(model, config.train.gradient_checkpointing)
    _check_sharding(config.train, world)
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
    facts, first = _describe(trainer, meta), trainer.progress.step
    label = f"{meta['run']} fold{meta['fold']}"
    _announce(trainer, facts, needs=needs, goes_on=checkpoint is not None, label=label)
    warn_of_other_environment(meta["environment"], here, label=label)
    _tell_changes(trainer, changes, label=label)
    stop.defer()
    listeners: dict[str, Any] = {"trackers": trackers, "meta": meta, "work": trainer.source.read_until}
    told = {"label": label, "steps": trainer.steps, "first_step": first, "metric": facts["metric_name"], **listeners}
    with Telemetry(folder, **told) if world.is_main else Silence() as telemetry:
        telemetry.log.write("start", **facts)
        for change in changes:
            telemetry.log.write("changed", step=first, **change._asdict())
        trainer.fit(telemetry, max_steps=max_steps)
        telemetry.log.write("done", step=trainer.progress.step, **_outcome(asdict(trainer.progress)))


def _announce(trainer: Trainer, facts: dict[str, Any], *, needs: str, goes_on: bool, label: str) -> None:
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
    steps = f"{trainer.steps} steps, {config.train.epochs} epochs"
    say(f"{label}: goes on at step {first} of {steps}" if goes_on else f"{label}: {steps}")
    learning = {
        name: parameter.numel() for name, parameter in state.model.named_parameters() if parameter.requires_grad
    }
    if config.model.lora_rank:
        trained = sum(learning.values())
        say(f"{label}: {trained:,} of the parameters train ({trained / facts['parameters']:.1%}), adapters and heads")
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


def _tell_changes(trainer: Trainer, changes: list[Change], *, label: str) -> None:
    """Say every change that a run goes on with, and where more epochs move the learning rate."""
    for change in changes:
        say(f"{label}: {change.key} {change.before} -> {change.now}: {change.remark}")
        if change.key == "config.train.epochs":
            settings, updates = trainer.config.train, trainer.progress.updates
            shape: dict[str, Any] = {"lr": settings.lr, "warmup": settings.warmup, "schedule": settings.schedule}
            before, now = (
                learning_rate(updates, total=trainer.source.batches * epochs, **shape)
                for epochs in (change.before, change.now)
            )
            say(f"{label}: the next update's learning rate {before:.2e} -> {now:.2e}")


def _describe(trainer: Trainer, meta: dict[str, Any]) -> dict[str, Any]:
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


def _load_initial(model: RnaModel, config: ModelConfig, meta: dict[str, Any]) -> dict[str, Any] | None:
    """Begin with all that fits of another run's weights, if the configuration names them, and say what that is.

    Warns where they have seen the held-out fold: weights of another fold, or of another split of the same competition,
    were trained on what this run validates on; likewise those that they themselves began with.
    """
    if not config.init:
        return None
    try:
        folder = initial_checkpoint(Path(config.init), fold=meta["fold"])
        source = read_meta(folder)
        found = load_fitting(model, _merged(load_weights(folder), source["config"]["model"]))
        if config.lora_rank and found.share < 1:  # what is fresh would stay as it is
            raise ValueError(f"only {found.share:.0%} of the backbone fit, and lora_rank freezes all of it")
    except (DamagedError, OSError, ValueError, StorageError) as err:
        raise ConfigError(
            f"model.init = {config.init!r}: {' '.join(str(err).split())[:300]}; expected a run's folder with this fold "
            "in it, or a checkpoint's (…/checkpoints/step-…), of a network with the same [model], heads aside. Next: "
            "correct the path."
        ) from err
    seen = has_seen(source)
    for each in seen:
        if each["competition"] == meta["competition"] and each != trained_on(meta):
            warn(
                f"model.init = {config.init!r} was trained with fold {each['fold']} of {each['split']!r} held out, so "
                f"it has seen sequences of fold {meta['fold']}: scores of this run are not out of fold"
            )
    facts = found.facts()
    told = "; ".join(f"{fate} {', '.join(facts[fate]) or 'nothing'}" for fate in ("loaded", "fresh", "ignored"))
    say(f"initial weights of {source.get('run')} fold{source.get('fold')}: {found.share:.0%} of the backbone; {told}")
    return {key: source.get(key) for key in ("run", "fold", "step")} | facts | {"trained_on": seen}


def _merged(weights: dict[str, Tensor], model: dict[str, Any]) -> dict[str, Tensor]:
    """Weights of a checkpoint with the adapters in them that its configuration names."""
    rank = model.get("lora_rank", 0)  # of older checkpoints, none
    return merged_state(weights, scale=model["lora_alpha"] / rank) if rank else weights


def _check_sharding(settings: TrainConfig, world: World) -> None:
    """Say where there is nobody to share a network with, and refuse what a shared one cannot do."""
    if settings.sharding == "none":
        return
    if world.is_alone:
        say("train.sharding = 'fsdp2': a single process keeps the whole network; NPROC=2 or more share it")
    elif settings.micro_batch == "auto":
        raise ConfigError(
            "[train] micro_batch = 'auto' with sharding = 'fsdp2': a process whose memory runs out cannot call the "
            "others out of the pass that they share. Next: give a number (make plan finds one), or sharding = 'none'."
        )


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
