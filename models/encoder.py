"""What all networks here share: embedding, a stack of blocks, a last norm, heads.

Letters: B batch, L length, D width, H head.
"""

from collections.abc import Sequence

from torch import Tensor, nn

from models.heads import ValuesHead
from models.interface import RnaInputs, RnaModel, RnaOutputs
from models.layers.attention import PairBias
from models.layers.checkpointing import run_blocks
from models.layers.distogram import DistanceHead
from models.layers.embedding import InputEmbedding
from models.layers.masked import clean_inputs


class RnaEncoder(RnaModel):
    """Base of the registered networks, which differ in their blocks.

    Args:
        embedding: `RnaInputs` to [B, L, D].
        blocks: each called as ``block(x_BLD, mask_BL, bias_BHLL)``.
        pair_bias: builds the bias that the blocks' attention shares; None = the blocks get None.
        width: D.
        num_channels: values per nucleotide; 0 = no such head.
        num_distance_bins: 0 = no such head.
        use_bpp: whether base-pair probabilities are read.
        gru_head: put a bidirectional GRU before the values.
    """

    def __init__(
        self,
        *,
        embedding: InputEmbedding,
        blocks: Sequence[nn.Module],
        pair_bias: PairBias | None,
        width: int,
        num_channels: int,
        num_distance_bins: int,
        use_bpp: bool,
        gru_head: bool = False,
    ) -> None:
        super().__init__()
        self.uses_bpp = use_bpp
        self.checkpoint_every = 0
        self.embedding = embedding
        self.pair_bias = pair_bias
        self.blocks = nn.ModuleList(blocks)
        self.norm = nn.LayerNorm(width)
        self.values = ValuesHead(width, num_channels=num_channels, gru=gru_head) if num_channels else None
        self.distances = DistanceHead(width, num_bins=num_distance_bins, use_bpp=use_bpp) if num_distance_bins else None

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
        x_BLD = self._encode(inputs)
        return RnaOutputs(
            values_BLC=None if self.values is None else self.values(x_BLD, inputs.mask_BL),
            distance_logits_BLLK=None if self.distances is None else self.distances(x_BLD, inputs.bpp_BLL),
        )

    def _encode(self, inputs: RnaInputs) -> Tensor:
        x_BLD = self.embedding(inputs)
        bias_BHLL = None if self.pair_bias is None else self.pair_bias(inputs.mask_BL, inputs.bpp_BLL)
        x_BLD = run_blocks(list(self.blocks), x_BLD, inputs.mask_BL, bias_BHLL, every=self.checkpoint_every)
        return self.norm(x_BLD)
