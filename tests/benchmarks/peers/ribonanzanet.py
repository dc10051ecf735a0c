"""The architecture of RibonanzaNet with random weights, as a peer that benchmarks measure.

Written anew from the published description and settings: nine blocks of width 256 with eight heads and a pair track of
64 channels; no weights of it fit in here. Where this differs on purpose: the padding mask masks. Letters: B batch,
L length (nt), D width, H head, C pair channel, R rank of the outer product.

Source: He et al. 2024, "Ribonanza: deep learning of RNA structure through dual crowdsourcing"; settings of the public
configuration (no triangle attention).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_WIDTH, _HEADS, _DEPTH = 256, 8, 9
_PAIR, _RANK, _KERNEL = 64, 32, 5
_EXPAND, _LARGEST_OFFSET, _DROPOUT = 4, 8, 0.05
_TOKENS, _PROBES = 5, 2


class RibonanzaNet(nn.Module):
    """Tokens to two reactivities a nucleotide, with a pair representation beside the sequence."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(_TOKENS, _WIDTH)
        self.pair_from_sequence = OuterProduct()
        self.pair_from_offset = nn.Linear(2 * _LARGEST_OFFSET + 1, _PAIR)
        self.blocks = nn.ModuleList(Block(kernel=_KERNEL if k + 1 < _DEPTH else 1) for k in range(_DEPTH))
        self.out = nn.Linear(_WIDTH, _PROBES)

    def forward(self, tokens_BL: Tensor, mask_BL: Tensor) -> Tensor:
        """[B, L] to [B, L, 2]."""
        x_BLD = self.embedding(tokens_BL)
        pair_BLLC = self.pair_from_sequence(x_BLD) + self._offsets(tokens_BL.shape[1], tokens_BL.device)
        for block in self.blocks:
            x_BLD, pair_BLLC = block(x_BLD, pair_BLLC, mask_BL)
        # the last block's pairs go nowhere; times zero, as published, they are computed and get gradients all the same
        return self.out(x_BLD) + pair_BLLC.mean() * 0

    def _offsets(self, length: int, device: torch.device) -> Tensor:
        position_L = torch.arange(length, device=device)
        offset_LL = (position_L[:, None] - position_L).clamp(-_LARGEST_OFFSET, _LARGEST_OFFSET) + _LARGEST_OFFSET
        return self.pair_from_offset(F.one_hot(offset_LL, 2 * _LARGEST_OFFSET + 1).float())


class Block(nn.Module):
    """Convolution, attention with a bias from the pairs, feed-forward; then the pairs are updated."""

    def __init__(self, *, kernel: int) -> None:
        super().__init__()
        self.conv = nn.Conv1d(_WIDTH, _WIDTH, kernel, padding=kernel // 2)
        self.norms = nn.ModuleList(nn.LayerNorm(_WIDTH) for _ in range(3))
        self.attention = BiasedAttention()
        self.feed_forward = nn.Sequential(
            nn.Linear(_WIDTH, _EXPAND * _WIDTH), nn.GELU(), nn.Dropout(_DROPOUT), nn.Linear(_EXPAND * _WIDTH, _WIDTH)
        )
        self.dropout = nn.Dropout(_DROPOUT)
        self.outer_product = OuterProduct()
        self.outgoing, self.incoming = TriangleProduct("bikc,bjkc->bijc"), TriangleProduct("bkjc,bkic->bijc")
        self.transition = nn.Sequential(
            nn.LayerNorm(_PAIR), nn.Linear(_PAIR, _EXPAND * _PAIR), nn.ReLU(), nn.Linear(_EXPAND * _PAIR, _PAIR)
        )

    def forward(self, x_BLD: Tensor, pair_BLLC: Tensor, mask_BL: Tensor) -> tuple[Tensor, Tensor]:
        """Both tracks, each of its own shape again."""
        x_BLD = x_BLD * mask_BL.unsqueeze(-1)
        x_BLD = self.norms[0](x_BLD + self.conv(x_BLD.transpose(1, 2)).transpose(1, 2))
        x_BLD = self.norms[1](x_BLD + self.dropout(self.attention(x_BLD, pair_BLLC, mask_BL)))
        x_BLD = self.norms[2](x_BLD + self.dropout(self.feed_forward(x_BLD)))
        pair_BLLC = pair_BLLC + self.outer_product(x_BLD)
        for triangle in (self.outgoing, self.incoming):
            pair_BLLC = pair_BLLC + _drop_rows(triangle(pair_BLLC, mask_BL), training=self.training)
        return x_BLD, pair_BLLC + self.transition(pair_BLLC)


class BiasedAttention(nn.Module):
    """Attention whose logits get a number of each pair; with a residual connection and a norm of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(_WIDTH, _WIDTH, bias=False) for _ in range(4))
        self.norm = nn.LayerNorm(_WIDTH)
        self.pair_norm, self.pair_bias = nn.LayerNorm(_PAIR), nn.Linear(_PAIR, _HEADS, bias=False)
        self.dropout = nn.Dropout(_DROPOUT)

    def forward(self, x_BLD: Tensor, pair_BLLC: Tensor, mask_BL: Tensor) -> Tensor:
        """[B, L, D] to [B, L, D]."""
        split = (self.query(x_BLD), self.key(x_BLD), self.value(x_BLD))
        query, key, value = (part.unflatten(-1, (_HEADS, -1)).transpose(1, 2) for part in split)
        logits_BHLL = query @ key.mT / (_WIDTH // _HEADS) ** 0.5
        logits_BHLL = logits_BHLL + self.pair_bias(self.pair_norm(pair_BLLC)).permute(0, 3, 1, 2)
        logits_BHLL = logits_BHLL.float().masked_fill(~mask_BL[:, None, None], torch.finfo(torch.float32).min)
        mixed = self.dropout(logits_BHLL.softmax(-1)).to(value.dtype) @ value
        return self.norm(x_BLD + self.dropout(self.out(mixed.transpose(1, 2).flatten(-2))))


class OuterProduct(nn.Module):
    """A pair's features from the product of its two nucleotides' features."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.out = nn.Linear(_WIDTH, _RANK), nn.Linear(_RANK**2, _PAIR)

    def forward(self, x_BLD: Tensor) -> Tensor:
        """[B, L, D] to [B, L, L, C]."""
        x_BLR = self.down(x_BLD)
        return self.out(torch.einsum("bir,bjs->bijrs", x_BLR, x_BLR).flatten(-2))


class TriangleProduct(nn.Module):
    """A pair's update from the pairs that both its ends make with every third nucleotide (AlphaFold 2, 1.6.5)."""

    def __init__(self, equation: str) -> None:
        super().__init__()
        self.equation = equation
        self.norm, self.mixed_norm = nn.LayerNorm(_PAIR), nn.LayerNorm(_PAIR)
        self.left, self.right, self.out = (nn.Linear(_PAIR, _PAIR) for _ in range(3))
        self.gates = nn.ModuleList(nn.Linear(_PAIR, _PAIR) for _ in range(3))

    def forward(self, pair_BLLC: Tensor, mask_BL: Tensor) -> Tensor:
        """[B, L, L, C] to [B, L, L, C]."""
        real_BLL1 = (mask_BL.unsqueeze(1) & mask_BL.unsqueeze(2)).unsqueeze(-1)
        pair_BLLC = self.norm(pair_BLLC)
        left_gate, right_gate, out_gate = (gate(pair_BLLC).sigmoid() for gate in self.gates)
        left_BLLC = self.left(pair_BLLC) * real_BLL1 * left_gate
        right_BLLC = self.right(pair_BLLC) * real_BLL1 * right_gate
        mixed_BLLC = torch.einsum(self.equation, left_BLLC, right_BLLC)
        return self.out(self.mixed_norm(mixed_BLLC) * out_gate)


def _drop_rows(x_BLLC: Tensor, *, training: bool) -> Tensor:
    """Dropout with one mask for all first nucleotides of a pair."""
    return x_BLLC * F.dropout(x_BLLC.new_ones(x_BLLC[:, :1].shape), _DROPOUT, training=training)
