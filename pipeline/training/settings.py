"""Settings that mean nothing for what a competition predicts, or cannot work together, are refused before a run."""

import contextlib
from collections.abc import Callable, Mapping
from functools import partial

from torch._subclasses.fake_tensor import FakeTensorMode

from models.interface import RnaModel
from pipeline.competitions.base import Competition
from pipeline.config import FREEZING, DataConfig, RunConfig, TrainConfig
from pipeline.errors import ConfigError
from pipeline.features import with_width
from pipeline.labels import Classes, read_labels
from pipeline.network import build_model
from pipeline.paths import Paths
from pipeline.runlog import say
from pipeline.training.distributed import World

_ANSWERS = {"values": "values are", "structure": "structures are", "classes": "classes are", "numbers": "numbers are"}
_OF_CLASSES = ("focal_gamma", "focal_alpha", "class_balance")
#: Settings that say something of other tasks only, by their section.
_IDLE: dict[str, dict[str, tuple[str, ...]]] = {
    "values": {"data": ("crop",), "train": _OF_CLASSES},
    "structure": {"data": ("crop", "pseudo"), "train": (*_OF_CLASSES, "target_weights")},
    "classes": {
        "data": ("min_signal_to_noise", "weighting", "flip"),  # read backwards it is another sequence
        "train": ("frame_weight", "tm_weight", "confidence_weight", "target_weights"),
    },
    "numbers": {
        "data": ("min_signal_to_noise", "weighting", "flip"),
        "train": ("frame_weight", "tm_weight", "confidence_weight", *_OF_CLASSES),
    },
}


def settle(config: RunConfig, competition: Competition, *, paths: Paths) -> tuple[RunConfig, Callable[[], RnaModel]]:
    """The settings with what the data say, and what builds their network.

    Raises:
        ConfigError: a setting means nothing here; of the network's, on building it.
        DataError: there are no clean tables to learn labels from.
    """
    refuse_idle(config, competition)
    config = with_width(config, paths)
    labels = read_labels(paths) if competition.has_labels else None
    return config, partial(build_model, config.model, competition, labels)


def require_sense(config: RunConfig, competition: Competition, *, paths: Paths) -> None:
    """Raise what `settle` does, and the network's constructor, in no time and no memory."""
    with contextlib.suppress(RuntimeError), FakeTensorMode():  # a network that needs real numbers is built later
        settle(config, competition, paths=paths)[1]()


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
    freezing = {name: value for name in FREEZING if (value := getattr(config.model, name))}
    if len(freezing) > 1:
        raise ConfigError(f"[model] {' and '.join(freezing)} each freeze all else. Next: leave one of them out.")
    for name, value in freezing.items():
        if not config.model.init or config.train.sharding != "none":
            raise ConfigError(
                f"[model] {name} = {value}: {FREEZING[name]} need the weights of another run (model.init), and all of "
                "them in each process (train.sharding = 'none'). Next: give model.init, or leave it out."
            )
        scales = {"backbone_lr_share": share} | ({"lora_alpha": config.model.lora_alpha} if name == "lora_rank" else {})
        if still := [scale for scale, factor in scales.items() if not factor]:
            raise ConfigError(
                f"[model] {name} = {value} with {still[0]} = 0: {FREEZING[name]} learn nothing then. Next: leave that "
                "one out."
            )
    for name in ("focal_gamma", "focal_alpha"):
        if config.data.pseudo and (value := getattr(config.train, name)):
            raise ConfigError(
                f"[data] pseudo with [train] {name} = {value:g}: probabilities hold no right answer that a network "
                "could be sure of, or that could weigh more; expected one of the two. Next: leave one out."
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
    _check_target_weights(config.train.target_weights, competition)


def _check_target_weights(weights: Mapping[str, float], competition: Competition) -> None:
    """ConfigError where they name no target, leave none, or have nothing to weigh it against."""
    targets, told = competition.targets, ", ".join(f"{name} = {weight:g}" for name, weight in weights.items())
    if not weights:
        return
    if strange := [name for name in weights if name not in targets]:
        advice = f"write one of {', '.join(targets)}"
        raise ConfigError(f"[train] target_weights: {competition.name} has no target {strange[0]!r}. Next: {advice}.")
    if len(targets) == 1 or not any(weights.get(name, 1) for name in targets):
        what = "weighs the only target" if len(targets) == 1 else "leaves nothing to learn"
        raise ConfigError(
            f"[train] target_weights: {told} {what}; expected two or more targets, one of them above 0. Next: leave it "
            "out."
        )


def check_focal_alpha(alpha: float, classes: Classes) -> None:
    """ConfigError where having a label is no question, as each sequence has one of several."""
    if alpha and classes.exclusive and len(classes.names) != 2:
        raise ConfigError(
            f"[train] focal_alpha = {alpha:g} weighs having a label against not having it, and each sequence has one "
            f"of {len(classes.names)} classes; expected two, or several labels a sequence. Next: leave it out; "
            "class_balance weighs classes."
        )


def check_sharding(settings: TrainConfig, world: World) -> None:
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
