"""What all networks here share: embedding, a stack of blocks, a last norm, heads.

Letters: B batch, L length, D width, H head.
"""

from torch import Tensor, nn

from models.heads import Heads
from models.interface import RnaInputs, RnaModel, RnaOutputs
from models.layers.attention import PairBias
from models.layers.checkpointing import run_blocks
from models.layers.embedding import NUM_NUCLEOTIDES, InputEmbedding
from models.layers.masked import clean_inputs


class RnaEncoder(RnaModel):
    """Base of the registered networks, which differ in their blocks.

    A subclass hands ``**common`` on to this constructor and then sets ``self.blocks``, each called as
    ``block(x_BLD, mask_BL, bias_BHLL)``, and ``self.pair_bias`` if they need one. The arguments with a default are
    part of every network's schema.

    Args:
        width: D, of the hidden layers.
        stem_kernel: of a separable convolution on the input, in nt, odd; 0 = none.
        vocabulary: rows of the token table.
        num_channels: values per nucleotide; 0 = no such head.
        num_distance_bins: bins of the distance head; 0 = no such head.
        use_bpp: read base-pair probabilities.
        gru_head: put a bidirectional GRU before the values.
    """

    blocks: nn.ModuleList

    def __init__(
        self,
        width: int,
        stem_kernel: int,
        vocabulary: int = NUM_NUCLEOTIDES,
        /,
        *,
        num_channels: int = 2,
        num_distance_bins: int = 0,
        use_bpp: bool = False,
        gru_head: bool = False,
    ) -> None:
        super().__init__()
        self.uses_bpp = use_bpp
        self.checkpoint_every = 0
        self.embedding = InputEmbedding(width, use_bpp=use_bpp, stem_kernel=stem_kernel, vocabulary=vocabulary)
        self.pair_bias: PairBias | None = None
        self.norm = nn.LayerNorm(width)
        self.heads = Heads(
            width, num_channels=num_channels, num_distance_bins=num_distance_bins, use_bpp=use_bpp, gru_head=gru_head
        )

    def set_gradient_checkpointing(self, every: int) -> None:
        """Recompute activations in groups of `every` blocks in the backward pass; 0 keeps them all."""
        if every < 0:
            raise ValueError(f"gradient_checkpointing: got {every}; expected 0 (off) or a number of blocks.")
        self.checkpoint_every = every

    def encode(self, inputs: RnaInputs) -> Tensor:
        """Last hidden layer, normalised: [B, L, D]; what stands under the padding means nothing."""
        return self._encode(clean_inputs(inputs, needs_bpp=self.uses_bpp))

    def forward(self, inputs: RnaInputs) -> RnaOutputs:
        """Predict; see `RnaInputs` and `RnaOutputs`.

        Raises:
            ValueError: the parts of the batch do not fit together, or bpp are needed and missing.
        """
        inputs = clean_inputs(inputs, needs_bpp=self.uses_bpp)
        return self.heads(self._encode(inputs), inputs)

    def _encode(self, inputs: RnaInputs) -> Tensor:
        x_BLD = self.embedding(inputs)
        bias_BHLL = None if self.pair_bias is None else self.pair_bias(inputs.mask_BL, inputs.bpp_BLL)
        x_BLD = run_blocks(list(self.blocks), x_BLD, inputs.mask_BL, bias_BHLL, every=self.checkpoint_every)
        return self.norm(x_BLD)
