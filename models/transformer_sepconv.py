"""Transformer with separable convolutions, for sequences with or without base-pair probabilities.

The plan of Ribonanza's best solutions: a transformer with dynamic position bias and base-pair bias, and of the
Squeezeformers with convolutions.
"""

from typing import Any

from models.encoder import BlockEncoder
from models.registry import register_model


@register_model
class TransformerSepconv(BlockEncoder):
    """Blocks of attention, separable convolution and feed-forward network.

    Args:
        width: of the hidden layers; a multiple of `num_heads`.
        depth: blocks.
        ffn_expand: hidden over outer width of the feed-forward network; 0 = none.
        **common: what networks of blocks take, see `BlockEncoder`.
    """

    name = "transformer_sepconv"

    def __init__(self, *, width: int = 192, depth: int = 12, ffn_expand: int = 4, **common: Any) -> None:
        super().__init__(width, ffn_expand, [None] * depth, **common)
