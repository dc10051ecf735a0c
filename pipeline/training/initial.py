"""Weights of another run to begin with: all that fits the new network, whatever the other was trained for."""

from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from models.adapters import plain_state
from models.heads import HEADS, is_head

_LEAST = 0.5  # of the backbone's numbers
_SHOWN = 3  # tensors that do not fit


class Loaded(NamedTuple):
    """What became of another network's weights, by name."""

    loaded: list[str]
    fresh: list[str]  # of the new network, as it was made
    ignored: list[str]  # of the other one: no such name or shape here
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


def trained_on(meta: Mapping[str, Any]) -> dict[str, Any]:
    """What a checkpoint was trained on, all but one fold of a competition's split: which, and its table's digest."""
    digests = meta.get("data") or {}
    return {key: meta.get(key) for key in ("competition", "split", "fold")} | {"folds": digests.get("folds")}


def has_seen(meta: Mapping[str, Any]) -> list[dict[str, Any]]:
    """All that a checkpoint has learned from, as `trained_on`: by its initial weights, by its pseudo-labels, itself."""
    initial, pseudo = meta.get("initial") or {}, (meta.get("data") or {}).get("pseudo") or {}
    return [*initial.get("trained_on", []), *pseudo.get("trained_on", []), trained_on(meta)]


def load_fitting(model: nn.Module, weights: Mapping[str, Tensor]) -> Loaded:
    """Copy every tensor that the network has too, by name and shape.

    Args:
        model: changed in place.
        weights: name -> tensor of another network.

    Raises:
        ValueError: less than half of the backbone fits; nothing is changed then.
    """
    own = plain_state(model)
    loaded = [name for name, tensor in own.items() if name in weights and weights[name].shape == tensor.shape]
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
