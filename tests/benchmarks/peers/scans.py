"""Other ways to compute Mamba's selective scan, each with the arguments of `models.layers.selective_scan`.

The first two are what one writes in PyTorch without a kernel; the others are calls of packages, which are imported when
they are called. Letters: B batch, L length, E inner channel, N state.
"""

import torch
from torch import Tensor


def unbind_loop(u_BLE: Tensor, delta_BLE: Tensor, A_EN: Tensor, B_BLN: Tensor, C_BLN: Tensor, D_E: Tensor) -> Tensor:
    """One position after the other under autograd; the fastest that plain PyTorch does on a CPU."""
    h_BEN = u_BLE.new_zeros(u_BLE.shape[0], *A_EN.shape)
    outputs = []
    for u_BE, delta_BE, B_BN, C_BN in zip(*(x.unbind(1) for x in (u_BLE, delta_BLE, B_BLN, C_BLN)), strict=True):
        decay_BEN = torch.exp(delta_BE.unsqueeze(-1) * A_EN)
        h_BEN = decay_BEN * h_BEN + (delta_BE * u_BE).unsqueeze(-1) * B_BN.unsqueeze(1)
        outputs.append(torch.bmm(h_BEN, C_BN.unsqueeze(-1)).squeeze(-1))
    return torch.stack(outputs, dim=1) + D_E * u_BLE


def associative(u_BLE: Tensor, delta_BLE: Tensor, A_EN: Tensor, B_BLN: Tensor, C_BLN: Tensor, D_E: Tensor) -> Tensor:
    """Pairs of neighbours joined, scanned as a sequence of half the length, and taken apart (Blelloch 1990)."""
    states_BLEN = _scan_pairs(*_discretised(u_BLE, delta_BLE, A_EN, B_BLN))
    return torch.matmul(states_BLEN, C_BLN.unsqueeze(-1)).squeeze(-1) + D_E * u_BLE


def _scan_pairs(decay_BLEN: Tensor, input_BLEN: Tensor) -> Tensor:
    length = decay_BLEN.shape[1]
    if length == 1:
        return input_BLEN
    even, odd = slice(0, length - length % 2, 2), slice(1, None, 2)
    joined = decay_BLEN[:, odd] * input_BLEN[:, even] + input_BLEN[:, odd]
    odd_states = _scan_pairs(decay_BLEN[:, even] * decay_BLEN[:, odd], joined)
    before = torch.cat([torch.zeros_like(odd_states[:, :1]), odd_states], dim=1)[:, : (length + 1) // 2]
    even_states = decay_BLEN[:, ::2] * before + input_BLEN[:, ::2]
    both = torch.stack([even_states[:, : length // 2], odd_states], dim=2).flatten(1, 2)
    return torch.cat([both, even_states[:, length // 2 :]], dim=1)


def mamba_py(u_BLE: Tensor, delta_BLE: Tensor, A_EN: Tensor, B_BLN: Tensor, C_BLN: Tensor, D_E: Tensor) -> Tensor:
    """`pscan` of the package mambapy."""
    from mambapy.pscan import pscan

    states_BLEN = pscan(*_discretised(u_BLE, delta_BLE, A_EN, B_BLN))
    return torch.matmul(states_BLEN, C_BLN.unsqueeze(-1)).squeeze(-1) + D_E * u_BLE


def transformers(u_BLE: Tensor, delta_BLE: Tensor, A_EN: Tensor, B_BLN: Tensor, C_BLN: Tensor, D_E: Tensor) -> Tensor:
    """The scan of Hugging Face's Mamba where no kernel is installed."""
    from transformers.models.mamba.modeling_mamba import mamba_selective_scan

    sequences = (x.transpose(1, 2) for x in (B_BLN, C_BLN))
    y_BEL = mamba_selective_scan(u_BLE.transpose(1, 2), delta_BLE.transpose(1, 2), A_EN, *sequences, D=D_E)
    return y_BEL.transpose(1, 2)


def _discretised(u_BLE: Tensor, delta_BLE: Tensor, A_EN: Tensor, B_BLN: Tensor) -> tuple[Tensor, Tensor]:
    """Decay and input of every state: [B, L, E, N] each."""
    return torch.exp(delta_BLE.unsqueeze(-1) * A_EN), (delta_BLE * u_BLE).unsqueeze(-1) * B_BLN.unsqueeze(2)
