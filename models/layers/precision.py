"""Parts that must not run in half precision, whatever autocast says."""

import torch
from torch import Tensor


def at_least_float32(x: Tensor) -> Tensor:
    """`x` itself if it is float64, else in float32."""
    return x if x.dtype == torch.float64 else x.float()
