"""Attention with a learned bias on every pair of positions.

The bias is a function of the signed distance, so that it exists at every length, and of the base-pair probabilities.
It is built once a forward pass and shared by all layers. Letters: B batch, L length, D width, H head, F pair feature.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.undecayed import leave_undecayed

_BPP_FLOOR = 1e-3  # probabilities below are nothing: base-pair tables are cut there
_HIDDEN = 32  # units of the network on the distance
NUM_PAIR_FEATURES = 3


class RelativePosition(nn.Module):
    """Signed distance i - j to a value per head, through a small network on the logarithm of the distance.

    Training sees distances to 206 nt, prediction 456 and more: in logarithms that is 5.3 against 6.1.

    Source: dynamic position bias, CrossFormer (Wang et al. 2021), there on the plain distance.
    """

    def __init__(self, num_heads: int, *, symmetric: bool = False) -> None:
        super().__init__()
        self.symmetric = symmetric
        self.hidden = nn.Linear(3, _HIDDEN)
        self.out = nn.Linear(_HIDDEN, num_heads, bias=False)  # a constant would be no bias: softmax ignores it

    def forward(self, length: int) -> Tensor:
        """Values for all pairs: [H, L, L] float32, first position in the rows."""
        with torch.autocast(self.hidden.weight.device.type, enabled=False):
            # one column for each distance, L-1 down to 1-L
            table_HT = self.out(F.gelu(self.hidden(self._features(length)))).t()
        # row i is a window that starts at distance i: 5 times faster forward and backward than a gather
        return table_HT.unfold(1, length, 1).flip(1)

    def _features(self, length: int) -> Tensor:
        weight = self.hidden.weight
        distance = torch.arange(length - 1, -length, -1, device=weight.device, dtype=weight.dtype)
        near = distance.abs()
        sign = torch.zeros_like(near) if self.symmetric else distance.sign()
        return torch.stack([torch.log1p(near), 2.0 / (1.0 + near), sign], dim=-1)


def pair_features(bpp_BLL: Tensor) -> Tensor:
    """What base-pair probabilities say of a pair of positions: [B, F, L, L] float32, zero where nothing pairs.

    The features are the probability, its logarithm above a floor (0 … 1), and the logarithm's mean over the two
    pairs stacked on this one, (i-1, j+1) and (i+1, j-1).
    """
    log_BLL = torch.log1p(bpp_BLL / _BPP_FLOOR) / math.log1p(1 / _BPP_FLOOR)
    stacked_BLL = torch.zeros_like(log_BLL)
    stacked_BLL[:, 1:, :-1] += log_BLL[:, :-1, 1:]
    stacked_BLL[:, :-1, 1:] += log_BLL[:, 1:, :-1]
    return torch.stack([bpp_BLL, log_BLL, stacked_BLL / 2], dim=1)


class PairBias(nn.Module):
    """The additive attention bias of all layers: distance, base pairing, and the key mask."""

    def __init__(self, num_heads: int, *, use_bpp: bool) -> None:
        super().__init__()
        self.position = RelativePosition(num_heads)
        # heads start from "ignores pairing" to "looks at the partner"
        start_HF = torch.zeros(num_heads, NUM_PAIR_FEATURES)
        start_HF[:, 1] = torch.linspace(0.0, 6.0, num_heads)
        self.weight_HF = nn.Parameter(start_HF) if use_bpp else None
        if self.weight_HF is not None:
            leave_undecayed([self.weight_HF])

    def forward(self, mask_BL: Tensor, bpp_BLL: Tensor | None) -> Tensor:
        """Bias for `Attention`: [B, H, L, L], in the precision of the attention's queries."""
        bias_HLL = self.position(mask_BL.shape[1])
        dtype = bias_HLL.dtype
        if torch.is_autocast_enabled(mask_BL.device.type):
            dtype = torch.get_autocast_dtype(mask_BL.device.type)
        bias_BHLL = bias_HLL.unsqueeze(0)
        if self.weight_HF is not None and bpp_BLL is not None:
            bias_BHLL = self._add_pairing(bias_HLL, pair_features(bpp_BLL))
        # the smallest number, not -inf: a key under the padding gets no weight, and no NaN arises anywhere
        lowest = torch.finfo(dtype).min
        return torch.where(mask_BL[:, None, None], bias_BHLL.to(dtype), lowest)

    def _add_pairing(self, bias_HLL: Tensor, pairs_BFLL: Tensor) -> Tensor:
        batch, _, length, _ = pairs_BFLL.shape
        assert self.weight_HF is not None
        with torch.autocast(pairs_BFLL.device.type, enabled=False):
            # one product for weighting and adding: half the time of einsum and sum, an eighth of a 1×1 convolution
            return torch.baddbmm(
                bias_HLL.flatten(1).expand(batch, -1, -1),
                self.weight_HF.expand(batch, -1, -1),
                pairs_BFLL.flatten(2).to(bias_HLL.dtype),
            ).view(batch, -1, length, length)


class Attention(nn.Module):
    """Multi-head self-attention with an additive bias, through `scaled_dot_product_attention`."""

    def __init__(self, width: int, *, num_heads: int) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"attention: width {width} is not a multiple of num_heads {num_heads}.")
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)

    def forward(self, x_BLD: Tensor, mask_BL: Tensor, bias_BHLL: Tensor | None) -> Tensor:
        """Mix positions: [B, L, D] to [B, L, D]; the keys' mask is in the bias."""
        batch, length, width = x_BLD.shape
        heads = self.qkv(x_BLD).view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q_BHLD, k_BHLD, v_BHLD = heads.unbind(0)
        mixed_BHLD = F.scaled_dot_product_attention(q_BHLD, k_BHLD, v_BHLD, attn_mask=bias_BHLL)
        return self.out(mixed_BHLD.transpose(1, 2).reshape(batch, length, width))
