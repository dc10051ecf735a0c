"""Transformer with separable convolutions, for sequences with or without base-pair probabilities.

The plan of Ribonanza's best solutions (a transformer with dynamic position bias and base-pair bias, and of the
Squeezeformers with convolutions), with the bias built once for all layers.
"""

from typing import Any

from torch import nn

from models.encoder import RnaEncoder
from models.layers.attention import Attention, PairBias
from models.layers.blocks import EncoderBlock
from models.registry import register_model


@register_model
class TransformerSepconv(RnaEncoder):
    """Blocks of attention, separable convolution and feed-forward network.

    Args:
        width: of the hidden layers; a multiple of `num_heads`.
        depth: blocks.
        num_heads: of the attention.
        kernel: of the separable convolutions, in nt, odd.
        ffn_expand: hidden over outer width of the feed-forward network; 0 = none.
        dropout: share dropped of each branch's output.
        **common: what every network takes, see `RnaEncoder`.
    """

    name = "transformer_sepconv"

    def __init__(
        self,
        *,
        width: int = 192,
        depth: int = 12,
        num_heads: int = 6,
        kernel: int = 9,
        ffn_expand: int = 4,
        dropout: float = 0.1,
        **common: Any,
    ) -> None:
        super().__init__(width, kernel, **common)
        self.pair_bias = PairBias(num_heads, use_bpp=self.uses_bpp)
        self.blocks = nn.ModuleList(
            EncoderBlock(
                Attention(width, num_heads=num_heads), width=width, kernel=kernel, expand=ffn_expand, dropout=dropout
            )
            for _ in range(depth)
        )
