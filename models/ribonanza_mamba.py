"""RibonanzaMamba: an encoder in which bidirectional Mamba stands beside attention, with separable convolutions.

The published network of that name has a perceptron where its state space should be, and a padding mask that masks
nothing; this one takes the plan (convolution, sequence mixer, feed-forward, base-pair input, pair track) and neither
fault.
"""

import itertools
from typing import Any

from models.encoder import BlockEncoder
from models.layers.mamba import BidirectionalMamba
from models.registry import refuse_without_effect, register_model


@register_model
class RibonanzaMamba(BlockEncoder):
    """Blocks of a mixer, a separable convolution and a feed-forward network; the mixers follow a pattern.

    Args:
        width: of the hidden layers; a multiple of `num_heads`.
        depth: blocks.
        pattern: mixer of each block, M = bidirectional Mamba, A = attention; repeated to `depth`.
        mamba_version: 1 = selective scan, 2 = Mamba-2, with one decay for each head.
        state: numbers that a Mamba channel remembers.
        expand: inner over outer width of a Mamba block.
        head_width: channels of a head of Mamba-2; divides `expand` x `width`.
        tie_directions: one set of Mamba parameters for both directions.
        ffn_expand: hidden over outer width of the feed-forward network; 0 = none.
        **common: what networks of blocks take, see `BlockEncoder`.
    """

    name = "ribonanza_mamba"

    def __init__(
        self,
        *,
        width: int = 192,
        depth: int = 12,
        pattern: str = "MMA",
        mamba_version: int = 1,
        state: int = 16,
        expand: int = 2,
        head_width: int = 64,
        tie_directions: bool = False,
        ffn_expand: int = 2,
        **common: Any,
    ) -> None:
        if not pattern or set(pattern) - set("MA"):
            raise ValueError(f"pattern: got {pattern!r}; expected letters M (Mamba) and A (attention), as in 'MMA'.")

        def mamba() -> BidirectionalMamba:
            return BidirectionalMamba(
                width,
                state=state,
                expand=expand,
                tie_directions=tie_directions,
                version=mamba_version,
                head_width=head_width,
            )

        letters = list(itertools.islice(itertools.cycle(pattern), depth))
        super().__init__(width, ffn_expand, [mamba() if letter == "M" else None for letter in letters], **common)
        if "M" not in letters:
            kinds = {"mamba_version": mamba_version, "tie_directions": tie_directions, "head_width": head_width}
            refuse_without_effect(self, "without Mamba (pattern, depth)", **kinds)
        elif mamba_version == 1:
            refuse_without_effect(self, "in version 1 (mamba_version)", head_width=head_width)
