"""Hyena: long convolutions with implicit filters, gated, causal as in HyenaDNA or truly bidirectional.

HyenaDNA's own ``bidirectional`` option pads and crops such that no position sees its neighbourhood; here two filters,
one over what came before and one over what comes after, go through one transform. Letters: B batch, L length (nt),
D width, N long convolutions of a block (its order - 1), F features of a time point, T time point.

Source: Hyena Hierarchy (Poli et al. 2023), HyenaDNA (Nguyen et al. 2023). Where this differs: time features are
computed for the length at hand, so that a sequence longer than `l_max` continues the filter beyond its last trained
point instead of failing; nothing under the padding enters a convolution; from order 3 on the windows, slow to fast, are
dealt out one convolution after the other, the first getting the slow ones, and not to each a sample of all.
"""

import math
from typing import Any

import torch
from torch import Tensor, nn

from models.encoder import RnaEncoder
from models.layers.blocks import EncoderBlock, FeedForward
from models.layers.long_conv import fft_conv
from models.layers.masked import zero_pads
from models.layers.precision import at_least_float32
from models.layers.sepconv import DepthwiseConv
from models.layers.undecayed import leave_undecayed
from models.registry import register_model

_SHORT_KERNEL = 3
_SINE_FREQUENCY = 10.0  # of the filter network's activations at initialisation
_FILTER_FLOOR = 1e-2  # to which the window decays, over 0.3 (fast channels) to 1.5 (slow ones) of l_max
_INIT_STD = 0.02
_TWO_SIDED = ("use_bpp", "gru_head", "num_distance_bins", "coordinates")


class HyenaFilter(nn.Module):
    """Long kernels as a function of time: a sine network times an exponentially decaying window.

    Args:
        channels: kernels a direction.
        directions: 1 (causal) or 2.
        l_max: length in nt over which time runs from 0 to 1.
        width: hidden units of the network.
        features: numbers that describe a time point; odd, at least 3.
        shift: added to the window; HyenaDNA's standalone file has 0.05, its repository 0.
    """

    def __init__(self, channels: int, *, directions: int, l_max: int, width: int, features: int, shift: float) -> None:
        super().__init__()
        if l_max < 2 or features < 3 or features % 2 == 0:
            raise ValueError(f"Hyena filter: got l_max {l_max}, features {features}; expected >= 2, odd and >= 3.")
        self.l_max, self.shift, self.directions = l_max, shift, directions
        self.bands = (features - 1) // 2
        self.frequency = nn.Parameter(torch.full((1, width), _SINE_FREQUENCY))
        self.hidden = nn.ModuleList(nn.Linear(inner, width) for inner in (features, width, width))
        self.out = nn.Linear(width, directions * channels, bias=False)
        slow, fast = (abs(math.log(_FILTER_FLOOR)) / share for share in (1.5, 0.3))
        self.decay_D: Tensor
        self.register_buffer("decay_D", torch.linspace(slow, fast, channels), persistent=False)

    def forward(self, length: int) -> list[Tensor]:
        """One [D, L] float32 kernel for each direction."""
        with torch.autocast(self.frequency.device.type, enabled=False):
            position_T1 = torch.arange(length, device=self.frequency.device, dtype=self.frequency.dtype).unsqueeze(1)
            time_T1 = position_T1 / (self.l_max - 1)
            x_TF = self._features(position_T1, time_T1)
            for layer in self.hidden:
                x_TF = torch.sin(self.frequency * layer(x_TF))
            window_TD = torch.exp(-time_T1 * self.decay_D) + self.shift
            kernels = self.out(x_TF).chunk(self.directions, dim=-1)
            return [(kernel_TD * window_TD).t() for kernel_TD in kernels]

    def _features(self, position_T1: Tensor, time_T1: Tensor) -> Tensor:
        # made where it is used: a copy from the CPU waits for the device in every block
        bands = torch.linspace(1e-4, self.bands - 1, self.bands, device=position_T1.device).to(position_T1)
        angle = position_T1 * (bands * (2 * math.pi / self.l_max))
        return torch.cat([time_T1, torch.cos(angle), -torch.sin(angle)], dim=-1)


class HyenaOperator(nn.Module):
    """Gates and long convolutions in turn, as a mixer for `EncoderBlock`; arguments as of `Hyena`."""

    operators = ("long_conv",)

    def __init__(
        self,
        width: int,
        *,
        order: int,
        bidirectional: bool,
        l_max: int,
        filter_width: int,
        filter_features: int,
        filter_shift: float,
    ) -> None:
        super().__init__()
        if order < 2:
            raise ValueError(f"Hyena: got order {order}; expected 2 or more.")
        self.order, self.bidirectional = order, bidirectional
        self.into = nn.Linear(width, (order + 1) * width)
        self.short = DepthwiseConv((order + 1) * width, kernel=_SHORT_KERNEL, causal=not bidirectional)
        self.filters = HyenaFilter(
            (order - 1) * width,
            directions=2 if bidirectional else 1,
            l_max=l_max,
            width=filter_width,
            features=filter_features,
            shift=filter_shift,
        )
        self.skip_ND = nn.Parameter(torch.randn(order - 1, width))
        self.out = nn.Linear(width, width)
        leave_undecayed([*self.filters.parameters(), self.skip_ND])

    def forward(self, x_BLD: Tensor, mask_BL: Tensor, bias_BHLL: Tensor | None = None) -> Tensor:
        """[B, L, D] to [B, L, D]; the attention's bias is not used."""
        # both convolutions have a bias, or a projection with one, before them: padding is zeroed before each
        projected = zero_pads(self.short(zero_pads(self.into(x_BLD), mask_BL)), mask_BL)
        *gates, v_BLD = projected.chunk(self.order + 1, dim=-1)
        kernels = [kernel_DL.chunk(self.order - 1) for kernel_DL in self.filters(x_BLD.shape[1])]
        for i, gate_BLD in enumerate(reversed(gates[1:])):
            before_DL = kernels[1][i] if self.bidirectional else None
            # the gates are zero under the padding, and with them what goes into each long convolution; their products
            # leave half precision's range
            v_BLD = fft_conv(at_least_float32(v_BLD) * gate_BLD, kernels[0][i], before_DL, self.skip_ND[i])
        with torch.autocast(x_BLD.device.type, enabled=False):
            return self.out(v_BLD * at_least_float32(gates[0]))


@register_model
class Hyena(RnaEncoder):
    """Blocks of a Hyena operator and a feed-forward network; HyenaDNA's sizes are ``pipeline/configs/hyenadna_*.toml``.

    Args:
        width: of the hidden layers.
        depth: blocks.
        order: long convolutions in a block, plus one.
        bidirectional: see both sides; otherwise a position sees what came before it.
        l_max: length in nt that stretches the filters; keep it when weights are kept.
        filter_width: hidden units of the filter network.
        filter_features: numbers that describe a time point to it; odd, at least 3.
        filter_shift: floor of the filter's window; 0, or HyenaDNA's 0.05.
        kernel: of a separable convolution in each block, in nt, odd; 0 = none.
        stem_kernel: of a separable convolution on the input, in nt, odd; 0 = none.
        ffn_expand: hidden over outer width of the feed-forward network; 0 = none.
        dropout: share dropped of each branch's output.
        **common: what every network takes, see `RnaEncoder`.
    """

    name = "hyena"

    def __init__(
        self,
        *,
        width: int = 256,
        depth: int = 8,
        order: int = 2,
        bidirectional: bool = True,
        l_max: int = 512,
        filter_width: int = 64,
        filter_features: int = 5,
        filter_shift: float = 0.0,
        kernel: int = 9,
        stem_kernel: int = 9,
        ffn_expand: int = 4,
        dropout: float = 0.1,
        **common: Any,
    ) -> None:
        two_sided = {"kernel": kernel, "stem_kernel": stem_kernel} | {key: common.get(key, 0) for key in _TWO_SIDED}
        if not bidirectional and any(two_sided.values()):
            raise ValueError(
                f"hyena: bidirectional=False goes without {', '.join(two_sided)}: each looks at both sides."
            )

        def block() -> nn.Module:
            mixer = HyenaOperator(
                width,
                order=order,
                bidirectional=bidirectional,
                l_max=l_max,
                filter_width=filter_width,
                filter_features=filter_features,
                filter_shift=filter_shift,
            )
            return EncoderBlock(mixer, width=width, kernel=kernel, expand=ffn_expand, dropout=dropout, gelu="tanh")

        super().__init__(width, stem_kernel, **common)
        self.blocks = nn.ModuleList(block() for _ in range(depth))
        self._reset_like_hyenadna()

    @torch.no_grad()
    def _reset_like_hyenadna(self) -> None:
        """Small normal weights and zero biases; what closes a branch gets smaller ones the deeper the network is."""
        closing: set[nn.Module] = {m.out for m in self.modules() if isinstance(m, HyenaOperator)}
        closing |= {m[-1] for m in self.modules() if isinstance(m, FeedForward)}
        nn.init.normal_(self.embedding.tokens.weight, std=_INIT_STD)
        for module in self.blocks.modules():
            if isinstance(module, nn.Linear):
                shrink = math.sqrt(2 * len(self.blocks)) if module in closing else 1.0
                nn.init.normal_(module.weight, std=_INIT_STD / shrink)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
