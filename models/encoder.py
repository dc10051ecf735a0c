"""What all networks here share: embedding, a stack of blocks, a last norm, heads.

Letters: B batch, L length, D width, P pair channel, N vectors of a soft prompt.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from models.heads import Heads, Pool
from models.interface import RnaInputs, RnaModel, RnaOutputs
from models.layers.attention import Attention, PairBias
from models.layers.blocks import EncoderBlock
from models.layers.checkpointing import run_blocks
from models.layers.embedding import NUM_NUCLEOTIDES, InputEmbedding
from models.layers.masked import clean_inputs, zero_pads
from models.layers.pair import PairBlock, PairStart, PairUpdate
from models.layers.precision import at_least_float32
from models.registry import refuse_without_effect


class RnaEncoder(RnaModel):
    """Base of the registered networks, which differ in their blocks.

    A subclass hands ``**common`` on to this constructor and then sets ``self.blocks``, each called as
    ``block(x_BLD, mask_BL, bias)``, and ``self.pair_bias`` if they need one. Where it sets ``self.pair_start``, blocks
    take and give ``(x_BLD, pair_BLLP)``. The arguments with a default are part of every network's schema.

    Args:
        width: D, of the hidden layers.
        stem_kernel: of a separable convolution on the input, in nt, odd; 0 = none.
        pair_width: of the pair features that the subclass hands to the heads; 0 = none.
        num_channels: values per nucleotide; 0 = no such head.
        num_distance_bins: bins of the distance head; 0 = no such head.
        num_classes: logits of a whole sequence; 0 = no such head.
        coordinates: predict C1' coordinates.
        use_bpp: read base-pair probabilities.
        gru_head: put a bidirectional GRU before the values.
        pool: how a sequence becomes one vector for the classes: mean over its positions, largest value of each channel,
            mean weighted by a learned query, or the last states of a bidirectional GRU.
        vocabulary: rows of the token table: 4 nucleotides or 20 amino acids, one more for an unknown letter; HyenaDNA
            has 16.
        num_features: numbers that come with every position beside its letter; 0 = none.
    """

    blocks: nn.ModuleList
    prompt_ND: nn.Parameter | None  #: what the blocks see before the sequence, see `models.adapters.add_prompt`

    def __init__(
        self,
        width: int,
        stem_kernel: int,
        pair_width: int = 0,
        /,
        *,
        num_channels: int = 2,
        num_distance_bins: int = 0,
        num_classes: int = 0,
        coordinates: bool = False,
        use_bpp: bool = False,
        gru_head: bool = False,
        pool: Pool = "mean",
        vocabulary: int = NUM_NUCLEOTIDES,
        num_features: int = 0,
    ) -> None:
        super().__init__()
        if not num_channels:
            refuse_without_effect(self, "without values per nucleotide (num_channels)", gru_head=gru_head)
        if not num_classes:
            refuse_without_effect(self, "without classes (num_classes)", pool=pool)
        self.uses_bpp = use_bpp
        self.num_features = num_features
        self.checkpoint_every = 0
        reads: dict[str, Any] = {"use_bpp": use_bpp, "vocabulary": vocabulary, "num_features": num_features}
        self.embedding = InputEmbedding(width, stem_kernel=stem_kernel, **reads)
        self.pair_bias: PairBias | None = None
        self.pair_start: PairStart | None = None
        self.register_parameter("prompt_ND", None)
        self.norm = nn.LayerNorm(width)
        self.heads = Heads(
            width,
            num_channels=num_channels,
            num_distance_bins=num_distance_bins,
            num_classes=num_classes,
            coordinates=coordinates,
            use_bpp=use_bpp,
            gru_head=gru_head,
            pool=pool,
            pair_width=pair_width,
        )

    def set_gradient_checkpointing(self, every: int) -> None:
        """Recompute activations in groups of `every` blocks in the backward pass; 0 keeps them all."""
        if every < 0:
            raise ValueError(f"gradient_checkpointing: got {every}; expected 0 (off) or a number of blocks.")
        self.checkpoint_every = every

    def forward(self, inputs: RnaInputs) -> RnaOutputs:
        """Predict; see `RnaInputs` and `RnaOutputs`.

        Raises:
            ValueError: the parts of the batch do not fit together, or bpp or features are needed and missing.
        """
        inputs = clean_inputs(inputs, needs_bpp=self.uses_bpp, num_features=self.num_features)
        x_BLD, pair_BLLP = self._encode(inputs)
        return self.heads(x_BLD, inputs, pair_BLLP)

    def embed(self, inputs: RnaInputs) -> Tensor:
        """The last hidden layer, which the heads read: [B, L, D] float32, zero where padded.

        Raises:
            ValueError: as `forward`.
        """
        inputs = clean_inputs(inputs, needs_bpp=self.uses_bpp, num_features=self.num_features)
        return zero_pads(at_least_float32(self._encode(inputs)[0]), inputs.mask_BL)

    def _encode(self, inputs: RnaInputs) -> tuple[Tensor, Tensor | None]:
        """Last hidden layer, and pair features [B, L, L, P] for the heads if there are any; of the sequence alone."""
        x_BLD, mask_BL, bpp_BLL = self._behind_prompt(self.embedding(inputs), inputs.mask_BL, inputs.bpp_BLL)
        blocks, pair_BLLP, first = list(self.blocks), None, 0 if self.prompt_ND is None else len(self.prompt_ND)
        bias = None if self.pair_bias is None else self.pair_bias(mask_BL, bpp_BLL)
        if self.pair_start is None:
            x_BLD = run_blocks(blocks, x_BLD, mask_BL, bias, every=self.checkpoint_every)
        else:
            state = (x_BLD, self.pair_start(mask_BL, bpp_BLL))
            x_BLD, pair_BLLP = run_blocks(blocks, state, mask_BL, bias, every=self.checkpoint_every)
        return self.norm(x_BLD[:, first:]), None if pair_BLLP is None else pair_BLLP[:, first:, first:]

    def _behind_prompt(
        self, x_BLD: Tensor, mask_BL: Tensor, bpp_BLL: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        """All three with the prompt in front, if there is one: N more positions, unpaired."""
        if self.prompt_ND is None:
            return x_BLD, mask_BL, bpp_BLL
        n = len(self.prompt_ND)
        prompt_BND = self.prompt_ND.to(x_BLD.dtype).expand(len(x_BLD), -1, -1)
        bpp_BLL = None if bpp_BLL is None else pad(bpp_BLL, (n, 0, n, 0))
        return torch.cat([prompt_BND, x_BLD], dim=1), pad(mask_BL, (n, 0), value=True), bpp_BLL


class BlockEncoder(RnaEncoder):
    """Stack of `EncoderBlock`, some or all of whose mixers are attention, with a pair track or without.

    Args:
        width: D.
        ffn_expand: hidden over outer width of the feed-forward networks; 0 = none.
        mixers: one a block; None = attention.
        num_heads: of the attention; divides `width`.
        kernel: of the separable convolutions, in nt, odd.
        multi_kernel: average kernels of `kernel`, `kernel` - 2 and `kernel` - 4 in the blocks.
        glu: gate the separable convolutions of the blocks.
        squeeze_excite: scale their channels by a gate on the whole sequence.
        pair_width: channels of the pair track, even, see `models.layers.pair`; 0 = none.
        pair_every: update it before every n-th attention.
        triangle: with triangle multiplication.
        dropout: share dropped of each branch's output.
        **common: what every network takes, see `RnaEncoder`.
    """

    def __init__(
        self,
        width: int,
        ffn_expand: int,
        mixers: Sequence[nn.Module | None],
        /,
        *,
        num_heads: int = 6,
        kernel: int = 9,
        multi_kernel: bool = False,
        glu: bool = True,
        squeeze_excite: bool = False,
        pair_width: int = 0,
        pair_every: int = 2,
        triangle: bool = True,
        dropout: float = 0.1,
        **common: Any,
    ) -> None:
        attends = [mixer is None for mixer in mixers]
        if pair_width and (pair_every < 1 or not any(attends)):
            got = f"pair_every {pair_every}, {sum(attends)} blocks with attention"
            raise ValueError(f"pair track: got {got}; expected 1 or more of each.")

        def block(index: int) -> nn.Module:
            block = EncoderBlock(
                mixers[index] or Attention(width, num_heads=num_heads, pair_width=pair_width),
                width=width,
                kernel=kernel,
                expand=ffn_expand,
                dropout=dropout,
                multi_kernel=multi_kernel,
                glu=glu,
                squeeze=squeeze_excite,
            )
            if not pair_width:
                return block
            updates = attends[index] and sum(attends[:index]) % pair_every == 0
            update = PairUpdate(width, pair_width=pair_width, triangle=triangle, dropout=dropout) if updates else None
            return PairBlock(block, update)

        super().__init__(width, kernel, pair_width, **common)
        if not kernel:
            shape = {"multi_kernel": multi_kernel, "glu": glu, "squeeze_excite": squeeze_excite}
            refuse_without_effect(self, "without convolutions (kernel)", **shape)
        if not pair_width:
            refuse_without_effect(self, "without a pair track (pair_width)", pair_every=pair_every, triangle=triangle)
        if pair_width:
            self.pair_start = PairStart(pair_width, use_bpp=self.uses_bpp)
        elif any(attends):
            self.pair_bias = PairBias(num_heads, use_bpp=self.uses_bpp)
        self.blocks = nn.ModuleList(block(index) for index in range(len(mixers)))
