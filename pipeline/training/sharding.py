"""FSDP2: each process keeps its part of weights, gradients, moments and averages, where otherwise each keeps all.

A process has a block's whole weights only while it computes that block. Parts are float32 and autocast chooses what
products run in, as without; so losses are the same up to rounding, and since checkpoints hold whole tensors, a run goes
on with any number of processes, sharded or not.

The price is that processes meet in every block: all make the same passes (`pipeline.training.step`), and one that runs
out of memory in the middle of one can only leave and be missed. Nothing here is more than torch's own `fully_shard`.
"""

import warnings
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, TypeGuard

import torch
from torch import Tensor, distributed, nn
from torch.distributed.device_mesh import init_device_mesh

from models.layers.undecayed import leave_undecayed

if TYPE_CHECKING:  # it brings sympy with it, 0.7 s of processor time: loaded where a network is in parts
    from torch.distributed.tensor import DTensor


def shard(model: nn.Module, device: torch.device) -> None:
    """Keep this process's part of every parameter, by rows; blocks are put together one at a time, the rest as another.

    Gradients of a backward pass are then the sum over all processes, as `World.add_gradients` makes it.

    Args:
        model: the same in every process, with what repeats in ``blocks``.
        device: where it is.
    """
    from torch.distributed.fsdp import fully_shard

    undecayed = {name for name, parameter in model.named_parameters() if hasattr(parameter, "_no_weight_decay")}
    # a block that hands its pair features on unchanged gives a view of them, which no other changes in place
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (distributed.get_world_size(),))
    for module in (*getattr(model, "blocks", ()), model):
        # after evaluation no backward pass would put the outermost parameters back in parts
        sharded = fully_shard(module, mesh=mesh, reshard_after_forward=True)
        sharded.set_gradient_divide_factor(1.0)
        sharded.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    leave_undecayed(parameter for name, parameter in model.named_parameters() if name in undecayed)


def is_sharded(tensor: object) -> TypeGuard["DTensor"]:
    """Whether this process holds only a part of it."""
    return hasattr(tensor, "placements")


def local(tensors: Iterable[Tensor]) -> list[Tensor]:
    """This process's parts of tensors, sharing their memory; a tensor that is not sharded is all of itself."""
    return [tensor.to_local() if is_sharded(tensor) else tensor for tensor in tensors]


def whole(tree: Any, *, keep: bool) -> Any:
    """A state dict with whole tensors in place of parts, on the CPU; every process has to ask for it.

    Args:
        tree: dicts of dicts of tensors, and of anything else, which stays.
        keep: False drops the tensors again: only the process that writes has a use for them.
    """
    if isinstance(tree, Mapping):
        return {key: whole(value, keep=keep) for key, value in tree.items()}
    if is_sharded(tree):
        tensor = tree.full_tensor()
        return tensor.cpu() if keep else None
    return tree


def parts(tensors: Mapping[str, Tensor], like: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The inverse of `whole` for one dict: each tensor in parts where `like` has a tensor in parts of that name."""
    return {name: _part(tensor, like.get(name)) for name, tensor in tensors.items()}


def _part(tensor: Tensor, like: Tensor | None) -> Tensor:
    if not is_sharded(like):
        return tensor
    from torch.distributed.tensor import distribute_tensor

    # without a source each process cuts its part out of its own copy
    return distribute_tensor(tensor.to(like.device), like.device_mesh, like.placements, src_data_rank=None)


def nonfinite(tensors: Mapping[str, Tensor]) -> list[str]:
    """Names of the tensors that hold a NaN or inf, whichever process has that part: the same ones in all of them."""
    names = [name for name, tensor in tensors.items() if tensor.is_floating_point()]
    finite = [bool(torch.isfinite(part).all()) for part in local(tensors[name] for name in names)]
    bad = torch.tensor([not one for one in finite], dtype=torch.int32)
    if any(map(is_sharded, tensors.values())):
        distributed.all_reduce(bad)
    return [name for name, count in zip(names, bad.tolist(), strict=True) if count]
