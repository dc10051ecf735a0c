"""The optimiser's parts: parameter groups, learning rate as a function of the step, averaged weights."""

import copy
import difflib
import math
from collections.abc import Iterable, Sequence
from functools import cached_property

import torch
from torch import Tensor, nn

from models.heads import is_head
from pipeline.config import TrainConfig
from pipeline.errors import ConfigError
from pipeline.training.muon import Muon, hidden_apart

#: of timm's optimisers: those that need gradients of gradients, apex or bitsandbytes
_UNFIT = ("adahessian", "fused", "bnb")
_START_SHARE = 1 / 25  # of the top rate, where one_cycle begins
_END_SHARE = 1e-3  # of the top rate, where one_cycle and cosine end


def make_optimizer(
    model: nn.Module, *, lr: float, weight_decay: float, backbone_lr_share: float = 1.0, name: str = "adamw"
) -> torch.optim.Optimizer:
    """AdamW, Muon, or another of timm's optimisers, over the groups of `decay_groups`.

    AdamW is fused: 0.8 ms a step instead of 8 ms for 546 k parameters in 80 tensors on one CPU thread.

    Raises:
        ConfigError: timm cannot be imported, or has no optimiser of this name that a plain step can drive.
    """
    groups = decay_groups(model, weight_decay=weight_decay, backbone_lr_share=backbone_lr_share)
    if name == "adamw":
        return torch.optim.AdamW(groups, lr=lr, betas=(0.9, 0.99), fused=True)
    if name == "muon":
        return Muon(hidden_apart(model, groups), lr=lr)
    try:
        from timm.optim import create_optimizer_v2, list_optimizers
    except Exception as err:  # with a torchvision made for another torch it raises RuntimeError
        raise ConfigError(
            f"[train] optimizer: got {name!r}; expected 'adamw' or 'muon', as timm, which knows others, cannot be "
            f"imported ({type(err).__name__}: {err}). Next: pip install timm, or optimizer = 'muon'."
        ) from err
    known = [found for found in list_optimizers() if not found.startswith(_UNFIT)]
    if name not in known:
        near = "' or '".join(difflib.get_close_matches(name, known, n=3) or ["adamw", "nadamw", "muon"])
        raise ConfigError(
            f"[train] optimizer: got {name!r}; expected 'adamw', 'muon' or one of timm's. Next: optimizer = '{near}'."
        )
    for group in groups:  # of Muon's kin: orthogonal steps are for matrices; vectors and embeddings get AdamW's
        group["use_fallback"] = not group["decays"]
    return create_optimizer_v2(groups, opt=name, lr=lr, weight_decay=weight_decay)


def set_learning_rate(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """The rate of the next update: that of the heads, of which the backbone's may be a share."""
    for group in optimizer.param_groups:
        group["lr"] = lr * group.get("lr_share", 1.0)  # groups of earlier checkpoints know of no share


def decay_groups(model: nn.Module, *, weight_decay: float, backbone_lr_share: float = 1.0) -> list[dict]:
    """Parameters that decay, and those that must not: vectors (norms, biases, D), embeddings, and what says so.

    A network marks a matrix that must not decay (A_log, implicit filters) by ``parameter._no_weight_decay = True``.
    Where the backbone learns more slowly than the heads, its groups are apart from theirs and come first.
    """
    embeddings = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    found: dict[tuple[float, bool], list[nn.Parameter]] = {}
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        free = parameter.ndim <= 1 or id(parameter) in embeddings or getattr(parameter, "_no_weight_decay", False)
        found.setdefault((1.0 if is_head(name) else backbone_lr_share, free), []).append(parameter)
    return [
        {
            "params": found[share, free],
            "weight_decay": 0.0 if free else weight_decay,
            "lr_share": share,
            "decays": not free,  # whatever the weight decay
        }
        for share, free in sorted(found)
    ]


def learning_rate(update: int, settings: TrainConfig, *, total: int) -> float:
    """Learning rate of one update: a closed form, so that a resumed run needs no scheduler state.

    one_cycle rises on a cosine from lr/25, cosine on a line from 0, both during the share ``warmup`` of all updates;
    then both fall on a cosine to lr/1000. constant stays.

    Args:
        update: 0-based count of optimiser updates made before.
        settings: of the run: ``schedule``, ``warmup`` and ``lr``, the highest rate.
        total: updates of the whole run.

    Source:
        one_cycle: Smith & Topin 2017, arXiv:1708.07120, without the cycled momentum.
    """
    lr = settings.lr
    if settings.schedule == "constant":
        return lr
    rise = max(1, round(settings.warmup * total))
    if update < rise:
        if settings.schedule == "cosine":
            return lr * (update + 1) / rise
        return lr * _cosine(_START_SHARE, 1.0, update / rise)
    return lr * _cosine(1.0, _END_SHARE, min(1.0, (update - rise) / max(1, total - 1 - rise)))


def _cosine(start: float, end: float, share: float) -> float:
    return end + (start - end) * (1 + math.cos(math.pi * share)) / 2


class Ema:
    """Exponential moving average of a network's weights: a copy of the network that only predicts.

    The average is short at first, decay = min(decay, (1 + n) / (10 + n)), so that a run of a few hundred updates does
    not remember its initial weights.
    """

    def __init__(self, model: nn.Module, *, decay: float) -> None:
        self.module = copy.deepcopy(model).eval().requires_grad_(False)
        for part in self.module.modules():
            if isinstance(part, nn.RNNBase):  # copies lie apart: cuDNN would put them together in every call, and warn
                part.flatten_parameters()
        self._model, self._decay = model, decay

    @torch.no_grad()
    def update(self, *, updates: int) -> None:
        """Move towards the network's present weights, which the caller knows to be finite."""
        decay = min(self._decay, (1 + updates) / (10 + updates))
        averages, weights = self._weights
        torch._foreach_lerp_(averages, weights, 1 - decay)
        for kept, buffer in zip(self.module.buffers(), self._model.buffers(), strict=True):
            kept.copy_(buffer)

    @cached_property  # at the first update: to shard a network gives it other parameters
    def _weights(self) -> tuple[list[Tensor], list[Tensor]]:
        return list(self.module.parameters()), list(self._model.parameters())


def gradients(parameters: Iterable[nn.Parameter]) -> list[Tensor]:
    """Those of all parameters that have one."""
    return [parameter.grad for parameter in parameters if parameter.grad is not None]


def total_norm(tensors: Sequence[Tensor]) -> float:
    """Euclidean norm over all tensors; not finite if any value is not."""
    return float(torch.nn.utils.get_total_norm(tensors, error_if_nonfinite=False))


def clip_gradients(found: list[Tensor], *, norm: float, clip_norm: float) -> None:
    """Scale gradients of a known, finite norm down to `clip_norm`, in place; 0 = leave them.

    The norm is measured and judged before: clipping by a NaN or infinite norm would spread it to every gradient.
    """
    if clip_norm and norm > clip_norm:
        torch._foreach_mul_(found, clip_norm / (norm + 1e-6))
