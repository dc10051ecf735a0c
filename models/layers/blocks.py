"""Residual blocks, normalised before each branch. Letters: B batch, L length, D width."""

from typing import Literal

from torch import Tensor, nn

from models.layers.attention import BiasRows
from models.layers.dropout import Dropout
from models.layers.sepconv import SeparableConv

Gelu = Literal["none", "tanh"]


class FeedForward(nn.Sequential):
    """Norm, and two linear layers with a GELU between them, at every position by itself."""

    def __init__(self, width: int, *, expand: int, gelu: Gelu) -> None:
        inner = expand * width
        super().__init__(
            nn.LayerNorm(width), nn.Linear(width, inner), nn.GELU(approximate=gelu), nn.Linear(inner, width)
        )


class EncoderBlock(nn.Module):
    """A mixer over all positions, a separable convolution over near ones, and a feed-forward network.

    Args:
        mixer: called as ``mixer(x_BLD, mask_BL, bias)``, gives [B, L, D].
        width: D.
        kernel: of the separable convolution, in nt, odd; 0 = none.
        expand: hidden over outer width of the feed-forward network; 0 = none.
        dropout: share of each branch's output that is dropped in training.
        gelu: "none" for the exact form, "tanh" for the approximation.
        multi_kernel: see `SeparableConv`, as for the next two.
        glu: gate the convolution.
        squeeze: scale its channels by a gate on the whole sequence.
    """

    def __init__(
        self,
        mixer: nn.Module,
        *,
        width: int,
        kernel: int,
        expand: int,
        dropout: float,
        gelu: Gelu = "none",
        multi_kernel: bool = False,
        glu: bool = True,
        squeeze: bool = False,
    ) -> None:
        super().__init__()
        self.norm_mixer = nn.LayerNorm(width)
        self.mixer = mixer
        self.norm_conv = nn.LayerNorm(width) if kernel else None
        self.conv = (
            SeparableConv(width, kernel=kernel, multi_kernel=multi_kernel, glu=glu, squeeze=squeeze) if kernel else None
        )
        self.feed_forward = FeedForward(width, expand=expand, gelu=gelu) if expand else None
        self.dropout = Dropout(dropout)

    def forward(self, x_BLD: Tensor, mask_BL: Tensor, bias: Tensor | BiasRows | None) -> Tensor:
        """[B, L, D] to [B, L, D]; what stands under the padding reaches no real position."""
        x_BLD = x_BLD + self.dropout(self.mixer(self.norm_mixer(x_BLD), mask_BL, bias))
        if self.conv is not None and self.norm_conv is not None:
            x_BLD = x_BLD + self.dropout(self.conv(self.norm_conv(x_BLD), mask_BL))
        if self.feed_forward is not None:
            x_BLD = x_BLD + self.dropout(self.feed_forward(x_BLD))
        return x_BLD
