"""Bidirectional Mamba.

Both directions share the projections into and out of the block; the rest is each one's own, or tied. Letters: B batch,
L length (nt), D width, E inner channel, N state, R rank of the step size, H head.

Source: Mamba (Gu & Dao 2023) for the direction, Vision Mamba and Caduceus (2024) for the sharing. Where this differs:
the directions' sum is halved, because the plain sum lets activations grow until half precision overflows; a layer norm
stands before the output projection for the same reason; steps and decays are bounded.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.masked import zero_pads
from models.layers.precision import at_least_float32
from models.layers.selective_scan import selective_scan
from models.layers.sepconv import DepthwiseConv
from models.layers.undecayed import leave_undecayed

_CONV_KERNEL = 4
_STEP_RANGE = (1e-3, 1e-1)  # of the step size at initialisation, log-uniform
_STEP_FLOOR = 1e-4
_STEP_MAX = 10.0  # a state that forgets all but e^-10 in one position forgets enough
_DECAY_MIN = 1e-4  # |A| below never forgets: reported as a cause of NaN after many epochs


class MambaDirection(nn.Module):
    """Causal convolution and selective scan, usable in either direction."""

    def __init__(self, width: int, *, inner: int, state: int) -> None:
        super().__init__()
        self.rank, self.state = math.ceil(width / 16), state
        self.conv = DepthwiseConv(inner, kernel=_CONV_KERNEL, causal=True)
        self.select = nn.Linear(inner, self.rank + 2 * state, bias=False)
        self.step = nn.Linear(self.rank, inner)
        self.A_log_EN = nn.Parameter(torch.log(torch.arange(1.0, state + 1)).repeat(inner, 1))
        self.D_E = nn.Parameter(torch.ones(inner))
        leave_undecayed([self.A_log_EN])
        self._reset_step()

    def forward(self, x_BLE: Tensor, mask_BL: Tensor, *, reverse: bool) -> Tensor:
        """[B, L, E], zero under the padding, to [B, L, E] float32."""
        # masked a second time because the convolution has a bias: without it, padding on the right would fill the
        # state of the reverse scan before the first real nucleotide
        x_BLE = zero_pads(F.silu(self.conv(x_BLE, reverse=reverse)), mask_BL)
        step_BLR, B_BLN, C_BLN = self.select(x_BLE).split([self.rank, self.state, self.state], dim=-1)
        with torch.autocast(x_BLE.device.type, enabled=False):
            delta_BLE = F.softplus(self.step(at_least_float32(step_BLR))).clamp(max=_STEP_MAX)
            A_EN = -torch.exp(self.A_log_EN).clamp(min=_DECAY_MIN)
            return selective_scan(x_BLE, delta_BLE, A_EN, B_BLN, C_BLN, self.D_E, reverse=reverse)

    @torch.no_grad()
    def _reset_step(self) -> None:
        """Let softplus of the bias be log-uniform in `_STEP_RANGE` where the input says nothing."""
        nn.init.uniform_(self.step.weight, -(self.rank**-0.5), self.rank**-0.5)
        low, high = map(math.log, _STEP_RANGE)
        step_E = torch.empty_like(self.step.bias).uniform_(low, high).exp().clamp(min=_STEP_FLOOR)
        self.step.bias.copy_(step_E + torch.log(-torch.expm1(-step_E)))  # inverse of softplus


class BidirectionalMamba(nn.Module):
    """Two scans, along the sequence and against it, as a mixer for `EncoderBlock`.

    Args:
        width: D.
        state: N.
        expand: E / D.
        tie_directions: one set of parameters for both; reversing the input then reverses the output.
    """

    def __init__(self, width: int, *, state: int, expand: int, tie_directions: bool) -> None:
        super().__init__()
        inner = expand * width
        self.into = nn.Linear(width, 2 * inner, bias=False)
        self.directions = nn.ModuleList(
            MambaDirection(width, inner=inner, state=state) for _ in range(1 if tie_directions else 2)
        )
        self.norm = nn.LayerNorm(inner)
        self.out = nn.Linear(inner, width, bias=False)

    def forward(self, x_BLD: Tensor, mask_BL: Tensor, bias_BHLL: Tensor | None = None) -> Tensor:
        """[B, L, D] to [B, L, D]; the attention's bias is not used."""
        x_BLE, gate_BLE = zero_pads(self.into(x_BLD), mask_BL).chunk(2, dim=-1)
        forwards, backwards = self.directions[0], self.directions[-1]
        y_BLE = forwards(x_BLE, mask_BL, reverse=False) + backwards(x_BLE, mask_BL, reverse=True)
        return self.out(self.norm(y_BLE / 2 * F.silu(at_least_float32(gate_BLE))))
