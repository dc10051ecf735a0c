"""Weights of another run to begin with: all that fits the new network, whatever the other was trained for."""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.adapters import merged_state, plain_state
from models.heads import HEADS, is_head
from models.interface import RnaModel
from pipeline.config import FREEZING, ModelConfig
from pipeline.errors import ConfigError, StorageError
from pipeline.runlog import say, warn
from pipeline.training.checkpoint import DamagedError, initial_checkpoint, load_weights, read_meta

_LEAST = 0.5  # of the backbone's numbers
_SHOWN = 3  # tensors that do not fit


class Loaded(NamedTuple):
    """What became of another network's weights, by name."""

    loaded: list[str]
    fresh: list[str]  # of the new network, as it was made
    ignored: list[str]  # of the other one: no such name or shape here, or heads in other units
    share: float  # of the backbone's numbers that were loaded

    def facts(self) -> dict[str, Any]:
        """For logs: parts of the network instead of single tensors, where a part shares its fate."""
        loaded, fresh, ignored = map(set, self[:3])
        return {
            "backbone": round(self.share, 4),
            "loaded": _parts(loaded, beside=fresh | ignored),
            "fresh": _parts(fresh, beside=loaded),
            "ignored": _parts(ignored, beside=loaded),
        }


def load_initial(model: RnaModel, config: ModelConfig, meta: dict[str, Any]) -> dict[str, Any] | None:
    """Begin with all that fits of another run's weights, if the configuration names them, and say what that is.

    Warns where they have seen the held-out fold: weights of another fold, or of another split of the same competition,
    were trained on what this run validates on; likewise those that they themselves began with.
    """
    if not config.init:
        return None
    try:
        folder = initial_checkpoint(Path(config.init), fold=meta["fold"])
        source = read_meta(folder)
        weights = _merged(load_weights(folder), source["config"]["model"])
        found = load_fitting(model, weights, heads=_said_in(source) == _said_in(meta))
        for name in FREEZING:
            if getattr(config, name) and found.share < 1:  # what is fresh would stay as it is
                raise ValueError(f"only {found.share:.0%} of the backbone fit, and {name} freezes all of it")
    except (DamagedError, OSError, ValueError, StorageError) as err:
        raise ConfigError(
            f"model.init = {config.init!r}: {' '.join(str(err).split())[:300]}; expected a run's folder with this fold "
            "in it, or a checkpoint's (…/checkpoints/step-…), of a network with the same [model], heads aside. Next: "
            "correct the path, or take the MODEL whose weights they are (of reactivity-v2 small_ribonanza_mamba)."
        ) from err
    seen = has_seen(source)
    for each in seen:
        if each["competition"] == meta["competition"] and each != trained_on(meta):
            is_namesake = (each["split"], each["fold"]) == (meta["split"], meta["fold"])
            held, has = ("of other data held out", "may have") if is_namesake else ("held out", "has")
            warn(
                f"model.init = {config.init!r} was trained with fold {each['fold']} of {each['split']!r} {held}, so it "
                f"{has} seen sequences of fold {meta['fold']}: scores of this run are not out of fold"
            )
    facts = found.facts()
    told = "; ".join(f"{fate} {', '.join(facts[fate]) or 'nothing'}" for fate in ("loaded", "fresh", "ignored"))
    if _said_in(source) != _said_in(meta):
        told += f"; heads that give {_said_in(source)} do not begin others, of {_said_in(meta)}"
    say(f"initial weights of {source.get('run')} fold{source.get('fold')}: {found.share:.0%} of the backbone; {told}")
    return {key: source.get(key) for key in ("run", "fold", "step")} | facts | {"trained_on": seen}


def _said_in(meta: Mapping[str, Any]) -> str:
    """What a network's heads give: the same shape may mean other units."""
    kinds = {"classes": "logits", "numbers": "deviations of numbers", "units": "deviations of values"}
    return next((said for key, said in kinds.items() if key in meta), "values as they are")


def _merged(weights: dict[str, Tensor], model: dict[str, Any]) -> dict[str, Tensor]:
    """Weights of a checkpoint with the adapters in them that its configuration names."""
    rank = model.get("lora_rank", 0)  # of older checkpoints, none
    return merged_state(weights, scale=model["lora_alpha"] / rank) if rank else weights


def trained_on(meta: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint was trained on, all but one fold of a competition's split: which, and its table's digest."""
    digests = meta.get("data") or {}
    return {key: meta.get(key) for key in ("competition", "split", "fold")} | {"folds": digests.get("folds")}


def has_seen(meta: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All that a checkpoint has learned from, as `trained_on`: by its initial weights, by its pseudo-labels, itself."""
    initial, pseudo = meta.get("initial") or {}, (meta.get("data") or {}).get("pseudo") or {}
    return [*initial.get("trained_on", []), *pseudo.get("trained_on", []), trained_on(meta)]


def load_fitting(model: nn.Module, weights: Mapping[str, Tensor], *, heads: bool = True) -> Loaded:
    """Copy every tensor that the network has too, by name and shape.

    Args:
        model: changed in place.
        weights: name -> tensor of another network.
        heads: False leaves the heads as they are.

    Raises:
        ValueError: less than half of the backbone fits; nothing is changed then.
    """
    own = plain_state(model)
    fitting = [name for name, tensor in own.items() if name in weights and weights[name].shape == tensor.shape]
    loaded = [name for name in fitting if heads or not is_head(name)]
    backbone = {name: tensor.numel() for name, tensor in own.items() if not is_head(name)}
    share = sum(backbone.get(name, 0) for name in loaded) / max(sum(backbone.values()), 1)
    taken = set(loaded)
    fresh, ignored = ([name for name in names if name not in taken] for names in (own, weights))
    if share < _LEAST:
        got = f"{share:.0%} of the network's backbone are there in the same shape"
        raise ValueError(f"{got}; expected at least half; {_misfits(own, weights)}")
    with torch.no_grad():
        for name in loaded:
            own[name].copy_(weights[name])
    return Loaded(loaded, fresh, ignored, share)


def _misfits(own: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> str:
    """The first tensors of the backbone that do not fit, with both shapes."""
    found = [
        f"{name} {list(tensor.shape)}, there {list(weights[name].shape) if name in weights else 'none'}"
        for name, tensor in own.items()
        if not is_head(name) and (name not in weights or weights[name].shape != tensor.shape)
    ]
    return "; ".join(found[:_SHOWN]) + (f"; and {len(found) - _SHOWN} more" if len(found) > _SHOWN else "")


def _parts(names: Iterable[str], *, beside: set[str]) -> list[str]:
    """The names, shortened to the first module that holds nothing of another fate."""
    return sorted({_part(name, beside) for name in names})


def _part(name: str, beside: set[str]) -> str:
    pieces = name.split(".")
    for end in range(1, len(pieces)):
        prefix = ".".join(pieces[:end])
        if prefix + "." != HEADS and not any(other.startswith(f"{prefix}.") for other in beside):
            return prefix
    return name
