"""RibonanzaMamba: an encoder in which bidirectional Mamba stands beside attention, with separable convolutions.

The published network of that name has a perceptron where its state space should be, and a padding mask that masks
nothing; this one takes the plan (convolution, sequence mixer, feed-forward, base-pair input) and neither fault.
"""

import itertools
from typing import Any

from torch import nn

from models.encoder import RnaEncoder
from models.layers.attention import Attention, PairBias
from models.layers.blocks import EncoderBlock
from models.layers.mamba import BidirectionalMamba
from models.registry import register_model


@register_model
class RibonanzaMamba(RnaEncoder):
    """Blocks of a mixer, a separable convolution and a feed-forward network; the mixers follow a pattern.

    Args:
        width: of the hidden layers; a multiple of `num_heads`.
        depth: blocks.
        pattern: mixer of each block, M = bidirectional Mamba, A = attention; repeated to `depth`.
        state: numbers that a Mamba channel remembers.
        expand: inner over outer width of a Mamba block.
        tie_directions: one set of Mamba parameters for both directions.
        num_heads: of the attention.
        kernel: of the separable convolutions, in nt, odd.
        ffn_expand: hidden over outer width of the feed-forward network; 0 = none.
        dropout: share dropped of each branch's output.
        **common: what every network takes, see `RnaEncoder`.
    """

    name = "ribonanza_mamba"

    def __init__(
        self,
        *,
        width: int = 192,
        depth: int = 12,
        pattern: str = "MMA",
        state: int = 16,
        expand: int = 2,
        tie_directions: bool = False,
        num_heads: int = 6,
        kernel: int = 9,
        ffn_expand: int = 2,
        dropout: float = 0.1,
        **common: Any,
    ) -> None:
        if not pattern or set(pattern) - set("MA"):
            raise ValueError(f"pattern: got {pattern!r}; expected letters M (Mamba) and A (attention), as in 'MMA'.")

        def mixer(letter: str) -> nn.Module:
            if letter == "A":
                return Attention(width, num_heads=num_heads)
            return BidirectionalMamba(width, state=state, expand=expand, tie_directions=tie_directions)

        super().__init__(width, kernel, **common)
        letters = list(itertools.islice(itertools.cycle(pattern), depth))
        self.pair_bias = PairBias(num_heads, use_bpp=self.uses_bpp) if "A" in letters else None
        self.blocks = nn.ModuleList(
            EncoderBlock(mixer(letter), width=width, kernel=kernel, expand=ffn_expand, dropout=dropout)
            for letter in letters
        )
