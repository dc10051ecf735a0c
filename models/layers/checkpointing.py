"""Gradient checkpointing: pay a second forward pass, keep fewer activations."""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Block = Callable[..., Tensor]


def run_blocks(blocks: Sequence[Block], x_BLD: Tensor, *args: Tensor | None, every: int) -> Tensor:
    """Run blocks in order, recomputing activations in groups in the backward pass.

    Gradients are the same for every value of `every`, dropout included: the random state is kept for the second pass.

    Args:
        blocks: each called as ``block(x_BLD, *args)``.
        x_BLD: [B, L, D] what the first block takes.
        *args: what every block takes besides; gradients reach them.
        every: group size, in blocks; 0 keeps all activations.
    """
    if every == 0 or not torch.is_grad_enabled():
        return _run(blocks, x_BLD, *args)
    for start in range(0, len(blocks), every):
        # the re-entrant form gives no gradient to what is not a direct tensor input, and none at all without one
        x_BLD = checkpoint(_run, blocks[start : start + every], x_BLD, *args, use_reentrant=False)
    return x_BLD


def _run(blocks: Sequence[Block], x_BLD: Tensor, *args: Tensor | None) -> Tensor:
    for block in blocks:
        x_BLD = block(x_BLD, *args)
    return x_BLD
