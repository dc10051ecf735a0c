"""What a compiled graph takes as a constant; by itself, as the decorator imports the compiler: 1 s of processor time.

Only a function that is being compiled imports it.
"""

import torch

from models.layers import kernels


@torch.compiler.assume_constant_result
def path(operator: str, device: torch.device) -> str:
    """As `kernels.path`."""
    return kernels.choose(operator, device).path
