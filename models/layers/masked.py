"""Masks: what keeps padding away from real nucleotides.

A mask is bool and True at real nucleotides; it is read, never written. Letters: B batch, L length, D width.
"""

import torch
from torch import Tensor

from models.interface import RnaInputs


def clean_inputs(inputs: RnaInputs, *, needs_bpp: bool, num_features: int = 0) -> RnaInputs:
    """Check that the parts of a batch fit together, and zero what stands under the padding.

    Args:
        inputs: as `RnaInputs` says; left as it is.
        needs_bpp: whether the network reads base-pair probabilities; if not, none are handed on.
        num_features: that it reads of each position; likewise.

    Returns:
        The same batch with tokens, bpp and features 0 under the padding; both of the latter in float32.

    Raises:
        ValueError: the batch is empty, shapes or types differ from what `RnaInputs` says, or no bpp or features where
            they are needed.
    """
    tokens_BL, mask_BL, bpp_BLL, features_BLF = inputs
    if tokens_BL.ndim != 2 or tokens_BL.shape != mask_BL.shape or mask_BL.dtype != torch.bool:
        got = f"tokens {list(tokens_BL.shape)}, mask {list(mask_BL.shape)} of {mask_BL.dtype}"
        raise ValueError(f"network input: got {got}; expected [B, L] twice and a bool mask.")
    if tokens_BL.dtype != torch.int64:
        raise ValueError(f"network input: got tokens of {tokens_BL.dtype}; expected torch.int64, indices into 'ACGU'.")
    for size, missing in zip(tokens_BL.shape, ("sequence", "position"), strict=True):
        if size == 0:
            raise ValueError(f"network input: got tokens {list(tokens_BL.shape)}, no {missing}; expected at least one.")
    tokens_BL = torch.where(mask_BL, tokens_BL, 0)
    cleaned = RnaInputs(tokens_BL, mask_BL)
    if num_features:
        shape = [*tokens_BL.shape, num_features]
        if features_BLF is None or list(features_BLF.shape) != shape:
            got = "none" if features_BLF is None else str(list(features_BLF.shape))
            raise ValueError(f"network input: got features {got}; expected {shape}, as it was built with num_features.")
        cleaned = cleaned._replace(features_BLF=zero_pads(features_BLF.float(), mask_BL))
    if not needs_bpp:
        return cleaned
    if bpp_BLL is None:
        raise ValueError("network input: built with use_bpp=True but got no base-pair probabilities.")
    if bpp_BLL.shape != (*tokens_BL.shape, tokens_BL.shape[1]):
        raise ValueError(f"network input: got bpp {list(bpp_BLL.shape)} for tokens {list(tokens_BL.shape)}.")
    real_BLL = mask_BL.unsqueeze(2) & mask_BL.unsqueeze(1)
    return cleaned._replace(bpp_BLL=torch.where(real_BLL, bpp_BLL.float(), 0))


def zero_pads(x_BLD: Tensor, mask_BL: Tensor) -> Tensor:
    """Zero wherever the mask is False, whatever stood there; [B, L, L, D] with a mask [B, L, L] too."""
    # torch.where, not masked_fill: a broadcast masked_fill runs on one thread, 40 times slower here; a product
    # would let an infinity under the padding become NaN
    return torch.where(mask_BL.unsqueeze(-1), x_BLD, 0)


def masked_mean(x_BLD: Tensor, mask_BL: Tensor) -> Tensor:
    """Mean over the real positions, or pairs of them, of each row, zero where there are none: [B, D]."""
    return zero_pads(x_BLD, mask_BL).flatten(1, -2).sum(1) / mask_BL.flatten(1).sum(1, keepdim=True).clamp(min=1)
