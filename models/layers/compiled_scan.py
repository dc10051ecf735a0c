"""The selective scan compiled for this machine's CPU from ``csrc/selective_scan.cpp``, and its place in autograd."""

import functools
from typing import Any

import torch
from torch import Tensor, library

from models.layers import extension

_CHUNK, _LANES = 32, 16  # positions and channels of a block of kept states: kChunk and kLanes of the C++


@functools.cache
def load() -> tuple[bool, str]:
    """Whether ``torch.ops.rna_scan`` is there, and why or why not; builds it at the first call."""
    usable, reason = extension.load("selective_scan")
    if usable:
        _register()
    return usable, reason


def _register() -> None:
    """Tell autograd and compilers what the operators of the library do."""

    @library.register_fake("rna_scan::forward")
    def _(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
        chunks, blocks = -(-u.shape[1] // _CHUNK), -(-u.shape[2] // _LANES)
        return torch.empty_like(u), u.new_empty(u.shape[0], chunks, blocks, A.shape[1], _LANES)

    @library.register_fake("rna_scan::backward")
    def _(dy: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, *_: Any) -> Any:
        return tuple(torch.empty_like(x) for x in (u, delta, A, B, C, D))

    register_gradient("rna_scan")


def register_gradient(namespace: str) -> None:
    """Make ``<namespace>::backward`` the gradient of ``<namespace>::forward``, whose second output is for it alone.

    Without a word of its own on the gradient's gradient, autograd takes it for zero.
    """

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.reverse = inputs
        ctx.save_for_backward(*tensors, output[1])
        ctx.mark_non_differentiable(output[1])

    def backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Any, ...]:
        operators = getattr(torch.ops, namespace)
        return *operators.backward(dy.contiguous(), *ctx.saved_tensors, ctx.reverse), None

    def refuse(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError("The selective scan: trying to differentiate twice.")

    library.register_autograd(f"{namespace}::forward", backward, setup_context=save)
    library.register_autograd(f"{namespace}::backward", refuse)
