"""Transformer with separable convolutions, for sequences with or without base-pair probabilities.

The plan of Ribonanza's best solutions (a transformer with dynamic position bias and base-pair bias, and of the
Squeezeformers with convolutions), with the bias built once for all layers.
"""

from models.encoder import RnaEncoder
from models.layers.attention import Attention, PairBias
from models.layers.blocks import EncoderBlock
from models.layers.embedding import InputEmbedding
from models.registry import register_model


@register_model
class TransformerSepconv(RnaEncoder):
    """Blocks of attention, separable convolution and feed-forward network.

    Args:
        num_channels: values per nucleotide; 0 = no such head.
        num_distance_bins: bins of the distance head; 0 = no such head.
        width: of the hidden layers; a multiple of `num_heads`.
        depth: blocks.
        num_heads: of the attention.
        kernel: of the separable convolutions, in nt, odd.
        ffn_expand: hidden over outer width of the feed-forward network; 0 = none.
        dropout: share dropped of each branch's output.
        use_bpp: read base-pair probabilities, as attention bias and as input.
        gru_head: put a bidirectional GRU before the values.
    """

    name = "transformer_sepconv"

    def __init__(
        self,
        *,
        num_channels: int = 2,
        num_distance_bins: int = 0,
        width: int = 192,
        depth: int = 12,
        num_heads: int = 6,
        kernel: int = 9,
        ffn_expand: int = 4,
        dropout: float = 0.1,
        use_bpp: bool = False,
        gru_head: bool = False,
    ) -> None:
        super().__init__(
            embedding=InputEmbedding(width, use_bpp=use_bpp, stem_kernel=kernel),
            blocks=[
                EncoderBlock(
                    Attention(width, num_heads=num_heads),
                    width=width,
                    kernel=kernel,
                    expand=ffn_expand,
                    dropout=dropout,
                )
                for _ in range(depth)
            ],
            pair_bias=PairBias(num_heads, use_bpp=use_bpp),
            width=width,
            num_channels=num_channels,
            num_distance_bins=num_distance_bins,
            use_bpp=use_bpp,
            gru_head=gru_head,
        )
