"""Muon: hidden matrices move by steps of equal size in every direction, everything else by AdamW's."""

import math
from collections import defaultdict
from typing import Any

import torch
from torch import Tensor, nn

from models.heads import is_head
from pipeline.errors import ConfigError
from pipeline.training.precision import choose_precision

_MOMENTUM = 0.95
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)  # of a x + b x³ + c x⁵, steepest at 0 among those that end near 1
_ROUNDS = 5
_RMS = 0.2  # of a step's numbers at lr 1, about that of AdamW's


class Muon(torch.optim.Optimizer):
    """One optimiser of `hidden_apart`'s groups: Muon with Nesterov's momentum where ``orthogonal``, AdamW elsewhere.

    A step of a matrix [A, B] is 0.2 √max(A, B) times the orthogonal matrix nearest to its momentum, so that its
    numbers are about as large as AdamW's and both follow one learning rate. Kernels [out, in, …] are matrices
    [out, in × …].

    `torch.optim.Muon` (``adjust_lr_fn="match_rms_adamw"``) takes the same steps of matrices, one by one and always in
    bfloat16: `small_drsn`'s 16 kernels turned in 29 ms where a CPU has no instructions for it, and turn in 2 ms here.

    Args:
        groups: as `hidden_apart` makes them.
        lr: learning rate of all.

    Source:
        Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/; size of the steps: Liu et al. 2025, Muon is
        scalable for LLM training, arXiv:2502.16982, section 2.2.
    """

    def __init__(self, groups: list[dict[str, Any]], *, lr: float) -> None:
        super().__init__(groups, {"lr": lr})
        self._adamw = torch.optim.AdamW(self._groups(orthogonal=False), lr=lr, betas=(0.9, 0.99), fused=True)

    def _groups(self, *, orthogonal: bool) -> list[dict[str, Any]]:
        return [group for group in self.param_groups if group["orthogonal"] == orthogonal]

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Move every parameter that has a gradient."""
        del closure
        for group in self._groups(orthogonal=True):
            alike: dict[torch.Size, list[Tensor]] = defaultdict(list)
            for parameter in group["params"]:
                if parameter.grad is not None:
                    alike[parameter.shape].append(parameter)
            for parameters in alike.values():
                self._turn(parameters, lr=group["lr"], weight_decay=group["weight_decay"])
        # loaded groups and moments are other objects than those that it was made of
        self._adamw.param_groups, self._adamw.state = self._groups(orthogonal=False), self.state
        self._adamw.step()

    def _turn(self, parameters: list[Tensor], *, lr: float, weight_decay: float) -> None:
        """The step of some matrices of one shape."""
        gradients = [parameter.grad for parameter in parameters if parameter.grad is not None]
        for parameter in parameters:
            if not self.state[parameter]:
                self.state[parameter]["momentum"] = torch.zeros_like(parameter)
        moments = [self.state[parameter]["momentum"] for parameter in parameters]
        torch._foreach_lerp_(moments, gradients, 1 - _MOMENTUM)
        ahead = torch.stack(torch._foreach_lerp(gradients, moments, _MOMENTUM))
        is_fast = choose_precision("auto", ahead.device).name == "bf16"
        turned_NAB = orthogonal(ahead.flatten(2), dtype=torch.bfloat16 if is_fast else torch.float32)
        torch._foreach_mul_(parameters, 1 - lr * weight_decay)
        size = lr * _RMS * math.sqrt(max(turned_NAB.shape[1:]))
        torch._foreach_add_(parameters, list(turned_NAB.to(ahead.dtype).view_as(ahead)), alpha=-size)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Go on from a checkpoint.

        Raises:
            ConfigError: timm's Muon wrote it, which was what "muon" meant before.
        """
        if any("orthogonal" not in group for group in state_dict["param_groups"]):
            raise ConfigError(
                "[train] optimizer: this run was begun with timm's 'muon', which this one cannot go on from. Next: "
                "TAG=<name> for a new run beside it, or --restart (make: RESTART=1) to begin it anew."
            )
        super().load_state_dict(state_dict)


def hidden_apart(model: nn.Module, groups: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Parameter groups with the hidden matrices that decay in groups of their own, ``orthogonal``.

    Hidden is what lies between embeddings and heads and mixes channels: no depthwise kernel [D, 1, K], no vector, and
    nothing that does not decay.

    Args:
        model: whose parameters they are.
        groups: as `pipeline.training.optim.decay_groups` makes them.
    """
    hidden = {
        id(parameter)
        for name, parameter in model.named_parameters()
        if parameter.ndim >= 2 and min(parameter.shape[:2]) > 1 and not is_head(name)
    }
    found = []
    for group in groups:
        for is_orthogonal in (True, False):
            parameters = [p for p in group["params"] if (group["decays"] and id(p) in hidden) == is_orthogonal]
            if parameters:
                found.append({**group, "params": parameters, "orthogonal": is_orthogonal})
    return found


def orthogonal(matrices_NAB: Tensor, *, dtype: torch.dtype) -> Tensor:
    """About the nearest orthogonal matrix to each.

    Newton and Schulz's iteration with coefficients that trade exactness for five rounds instead of many: singular
    values of a hundredth of the norm and more end between 0.68 and 1.14.

    Args:
        matrices_NAB: any numbers; zeros stay.
        dtype: to compute in.

    Returns:
        [N, A, B] of that dtype.
    """
    a, b, c = _COEFFICIENTS
    is_tall = matrices_NAB.shape[1] > matrices_NAB.shape[2]
    x_NAB = (matrices_NAB.mT if is_tall else matrices_NAB).to(dtype)
    x_NAB = x_NAB / x_NAB.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(_ROUNDS):
        gram_NAA = x_NAB @ x_NAB.mT
        gram_NAA = torch.baddbmm(gram_NAA, gram_NAA, gram_NAA, beta=b, alpha=c)
        x_NAB = torch.baddbmm(x_NAB, gram_NAA, x_NAB, beta=a)
    return x_NAB.mT if is_tall else x_NAB
