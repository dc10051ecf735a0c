"""What every network takes and gives.

Letters: B batch, L padded length (nt), C channel or class, K distance bin, D width, F feature, 3 xyz.
"""

from typing import ClassVar, NamedTuple

from torch import Tensor, nn


class RnaInputs(NamedTuple):
    """A padded batch of sequences. Nothing that stands under the padding may change an output at a real position."""

    tokens_BL: Tensor  # int64, index into "ACGU", or into the letters of a labelled set; arbitrary where padded
    mask_BL: Tensor  # bool, True at real nucleotides, at least one a row; never modified
    bpp_BLL: Tensor | None = None  # float32 in [0, 1], symmetric, zero diagonal, rows sum to at most 1
    features_BLF: Tensor | None = None  # floating; what another network says of each nucleotide; arbitrary where padded


class RnaOutputs(NamedTuple):
    """What a network predicts; a head that the task does not ask for gives None."""

    values_BLC: Tensor | None = None  # float32, one value per nucleotide and channel
    distance_logits_BLLK: Tensor | None = None  # float32, symmetric: bins of the C1'–C1' distance
    class_logits_BC: Tensor | None = None  # float32, one value per sequence and class, or measured number
    c1_xyz_BL3: Tensor | None = None  # float32, Å, zero where padded; centred on the real positions, frame arbitrary
    lddt_logits_BLK: Tensor | None = None  # float32, with c1_xyz: bins of how right each nucleotide's surroundings are


class RnaModel(nn.Module):
    """Base of all networks.

    A constructor takes keyword arguments only, annotated and defaulted: its signature is the model's schema in a
    TOML file. ``num_channels``, ``num_distance_bins`` and ``num_classes`` (0 = no such head) come from the task,
    ``num_features`` (0 = none are read) from the data, and ``vocabulary`` from their letters, unless it is larger.
    """

    name: ClassVar[str]
    uses_bpp: bool = False
    num_features: int = 0

    def forward(self, inputs: RnaInputs) -> RnaOutputs:
        raise NotImplementedError

    def embed(self, inputs: RnaInputs) -> Tensor:
        """The last hidden layer, which the heads read: [B, L, D] float32, zero where padded."""
        raise NotImplementedError

    def set_gradient_checkpointing(self, every: int) -> None:
        """Recompute activations in groups of `every` blocks in the backward pass; 0 keeps them all."""
        raise NotImplementedError
