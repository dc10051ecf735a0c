"""Distances between positions as a distribution over bins. Letters: B batch, L length, D width, P pair, K bin."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.attention import NUM_PAIR_FEATURES, RelativePosition, pair_features
from models.layers.precision import at_least_float32

_PAIR_WIDTH = 32  # P of the distance head


class PairEmbedding(nn.Module):
    """First features of every pair of positions, symmetric, in float32.

    A pair is the sum and the product of two projections, the unsigned distance along the chain, and (with bpp) the
    pairing.

    Args:
        width: D.
        pair_width: P.
        use_bpp: whether base-pair probabilities are given.
    """

    def __init__(self, width: int, *, pair_width: int, use_bpp: bool) -> None:
        super().__init__()
        self.pair_width = pair_width
        self.project = nn.Linear(width, 2 * pair_width)
        self.position = RelativePosition(pair_width, symmetric=True)
        self.pairing = nn.Linear(NUM_PAIR_FEATURES, pair_width, bias=False) if use_bpp else None

    def forward(self, x_BLD: Tensor, bpp_BLL: Tensor | None) -> Tensor:
        """[B, L, D] to [B, L, L, P] float32; pairs with padding mean nothing."""
        with torch.autocast(x_BLD.device.type, enabled=False):
            summed_BLP, multiplied_BLP = self.project(at_least_float32(x_BLD)).split(self.pair_width, dim=-1)
            pair_BLLP = summed_BLP.unsqueeze(1) + summed_BLP.unsqueeze(2)
            pair_BLLP = torch.addcmul(pair_BLLP, multiplied_BLP.unsqueeze(1), multiplied_BLP.unsqueeze(2))
            pair_BLLP = pair_BLLP + self.position(x_BLD.shape[1]).permute(1, 2, 0)
            if self.pairing is not None and bpp_BLL is not None:
                pair_BLLP = pair_BLLP + self.pairing(pair_features(bpp_BLL).permute(0, 2, 3, 1).to(pair_BLLP.dtype))
            return pair_BLLP


class DistanceHead(nn.Module):
    """Symmetric logits over distance bins for every pair of positions, in float32.

    Memory in training is about ``4 B L² (4 P + K)`` bytes: 136 MiB for B 8, L 170, P 32, K 19.

    Args:
        width: D.
        num_bins: K.
        use_bpp: whether base-pair probabilities are given.
        track_width: of the pair features that the network hands on; 0 = none.
    """

    def __init__(self, width: int, *, num_bins: int, use_bpp: bool, track_width: int = 0) -> None:
        super().__init__()
        self.pairs = PairEmbedding(width, pair_width=_PAIR_WIDTH, use_bpp=use_bpp)
        self.track = nn.Linear(track_width, _PAIR_WIDTH, bias=False) if track_width else None
        self.norm = nn.LayerNorm(_PAIR_WIDTH)
        self.logits = nn.Linear(_PAIR_WIDTH, num_bins)

    def forward(self, x_BLD: Tensor, bpp_BLL: Tensor | None, pair_BLLP: Tensor | None = None) -> Tensor:
        """Logits [B, L, L, K] float32; those of pairs with padding mean nothing."""
        with torch.autocast(x_BLD.device.type, enabled=False):
            merged_BLLP = self.pairs(x_BLD, bpp_BLL)
            if self.track is not None and pair_BLLP is not None:
                track_BLLP = self.track(at_least_float32(pair_BLLP))
                merged_BLLP = merged_BLLP + (track_BLLP + track_BLLP.transpose(1, 2))
            return self.logits(F.gelu(self.norm(merged_BLLP)))
