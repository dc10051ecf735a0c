"""The network of a configuration, with the heads that a competition asks for."""

from dataclasses import asdict, replace
from typing import Any

from models.adapters import add_adapters, add_prompt
from models.interface import RnaModel
from models.registry import create_model, model_arguments
from pipeline.competitions.base import Competition
from pipeline.config import ModelConfig, RunConfig
from pipeline.errors import ConfigError
from pipeline.labels import Labels

#: Bins of the C1'–C1' distance, for the structure task: 1.9 Å wide between 4 and 60 Å.
NUM_DISTANCE_BINS = 32
_HEADS = ("num_channels", "num_distance_bins", "num_classes")  # a network's arguments that follow from the competition
_COORDINATES = "coordinates"  # a head that a structure competition's configuration may have, and others leave out


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
        if config.soft_prompt:
            add_prompt(model, length=config.soft_prompt)
        return model
    except (TypeError, ValueError) as err:
        hint = "" if "Next:" in str(err) else " Next: correct it there."
        raise ConfigError(f"[model] {err}{hint}") from err


def resolved_config(config: RunConfig, model: RnaModel) -> dict[str, Any]:
    """The settings as a checkpoint keeps them: with the defaults of the network's constructor written out.

    A default that changes in the code later neither changes a run that goes on nor how its checkpoints predict.
    """
    arguments = {name: parameter.default for name, parameter in model_arguments(type(model)).items()}
    left_out = ("num_channels", "num_distance_bins", "num_features")
    chosen = {name: value for name, value in arguments.items() if name not in left_out} | config.model.kwargs
    return asdict(replace(config, model=replace(config.model, kwargs=chosen)))
