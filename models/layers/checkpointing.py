"""Gradient checkpointing: pay a second forward pass, keep fewer activations."""

from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import torch
from torch.utils.checkpoint import checkpoint

State = TypeVar("State")  # a tensor, or a tuple of tensors


def run_blocks(blocks: Sequence[Callable[..., State]], state: State, *args: Any, every: int) -> State:
    """Run blocks in order, recomputing activations in groups in the backward pass.

    Gradients are the same for every value of `every`, dropout included: the random state is kept for the second pass.

    Args:
        blocks: each called as ``block(state, *args)``, gives the next state.
        state: what the first block takes: [B, L, D], or that and pair features [B, L, L, P].
        *args: what every block takes besides; gradients reach them.
        every: group size, in blocks; 0 keeps all activations.
    """
    if every == 0 or not torch.is_grad_enabled():
        return _run(blocks, state, *args)
    for start in range(0, len(blocks), every):
        # the re-entrant form gives no gradient to what is not a direct tensor input, and none at all without one
        state = checkpoint(_run, blocks[start : start + every], state, *args, use_reentrant=False)
    return state


def _run(blocks: Sequence[Callable[..., State]], state: State, *args: Any) -> State:
    for block in blocks:
        state = block(state, *args)
    return state
