"""A trained network learns another task by few new parameters: adapters in its matrices, or a prompt before sequences.

Source: Hu et al. 2021, LoRA, arXiv:2106.09685; Lester et al. 2021, soft prompts, arXiv:2104.08691, here as HyenaDNA
(Nguyen et al. 2023, section 4.3) has them, but with heads that train too.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from models.encoder import RnaEncoder
from models.heads import is_head
from models.interface import RnaModel
from models.layers.undecayed import leave_undecayed

_PROMPT_STD = 0.02


class LowRank(nn.Module):
    """Adds up · down, a matrix of low rank that begins as zero, to the weight of a linear layer.

    Args:
        weight: [out, in].
        rank: columns of `up`.
        alpha: up · down counts alpha / rank times, so that a learning rate fits several ranks.
    """

    def __init__(self, weight: Tensor, *, rank: int, alpha: float) -> None:
        super().__init__()
        self.down = nn.Parameter(weight.new_empty(rank, weight.shape[1]))
        self.up = nn.Parameter(weight.new_zeros(weight.shape[0], rank))
        self.scale = alpha / rank
        nn.init.kaiming_uniform_(self.down, a=math.sqrt(5))

    def forward(self, weight: Tensor) -> Tensor:
        """The adapted weight; in float32, where half precision would lose small sums."""
        with torch.autocast(weight.device.type, enabled=False):
            return weight + self.scale * (self.up @ self.down)


def add_adapters(model: RnaModel, *, rank: int, alpha: float) -> None:
    """Give every linear layer of the blocks an adapter, and freeze all else but the heads; outputs stay as they are.

    Filters and other matrices that do not decay, which are functions of time and not of channels, get none.

    Raises:
        ValueError: the network has no such layer.
    """
    _freeze(model)
    layers = [
        module
        for name, module in model.named_modules()
        if "blocks." in name and isinstance(module, nn.Linear) and not hasattr(module.weight, "_no_weight_decay")
    ]
    if not layers:
        raise ValueError(f"model {model.name!r}: no linear layer in its blocks; expected one to adapt (lora_rank).")
    for layer in layers:
        parametrize.register_parametrization(layer, "weight", LowRank(layer.weight, rank=rank, alpha=alpha))


def add_prompt(model: RnaModel, *, length: int) -> None:
    """Give the blocks vectors to learn that stand before every sequence, and freeze all else but the heads.

    Heads see the sequence alone: no pool, value or pair has the prompt in it.

    Args:
        model: changed in place.
        length: N, of the vectors.

    Raises:
        ValueError: the network has no place for them.
    """
    if not isinstance(model, RnaEncoder):
        raise ValueError(f"model {model.name!r}: no place for a soft prompt; expected an RnaEncoder (soft_prompt).")
    _freeze(model)
    scale = model.norm.weight
    model.prompt_ND = nn.Parameter(_PROMPT_STD * torch.randn(length, len(scale)).to(scale))
    leave_undecayed([model.prompt_ND])


def _freeze(model: RnaModel) -> None:
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_head(name))


def merge_adapters(model: nn.Module) -> None:
    """Add every adapter to the weight it adapts, for good; a network without them stays as it is."""
    for module in model.modules():
        if parametrize.is_parametrized(module, "weight"):
            parametrize.remove_parametrizations(module, "weight", leave_parametrized=True)


def plain_state(model: nn.Module) -> dict[str, Tensor]:
    """The state dict of a network without adapters or prompt, named as it is then; the tensors are its own."""
    return {
        name.replace(".parametrizations.weight.original", ".weight"): tensor
        for name, tensor in model.state_dict().items()
        if ".parametrizations.weight.0." not in name and name != "prompt_ND"
    }


def merged_state(weights: Mapping[str, Tensor], *, scale: float) -> dict[str, Tensor]:
    """A stored state dict with every adapter added to its weight; `scale` is alpha / rank of `LowRank`."""
    merged = {}
    for name, tensor in weights.items():
        home, adapted, part = name.partition(".parametrizations.weight.")
        if part == "original":
            up, down = (weights[f"{home}{adapted}0.{side}"] for side in ("up", "down"))
            merged[f"{home}.weight"] = tensor + scale * (up @ down)
        elif not adapted:
            merged[name] = tensor
    return merged
