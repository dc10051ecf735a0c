"""Bidirectional Mamba, versions 1 and 2.

Both directions share the projections into and out of the block; the rest is each one's own, or tied. Letters: B batch,
L length (nt), D width, E inner channel, N state, R rank of the step size, H head, P channel of a head, S what a
direction of version 2 is told besides its input: 2 N + H.

Source: Mamba (Gu & Dao 2023) and Mamba-2 (Dao & Gu 2024) for the direction, Vision Mamba and Caduceus (2024) for the
sharing. Where this differs: the directions' sum is halved, because the plain sum lets activations grow until half
precision overflows; a layer norm of the gated sum stands before the output projection, for the same reason in version 1
and instead of Mamba-2's root mean square norm, which takes five times as long on the CPU; steps and decays are bounded.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.masked import zero_pads
from models.layers.precision import at_least_float32
from models.layers.selective_scan import selective_scan
from models.layers.sepconv import DepthwiseConv
from models.layers.ssd import ssd
from models.layers.undecayed import leave_undecayed

_CONV_KERNEL = 4
_STEP_RANGE = (1e-3, 1e-1)  # of the step size at initialisation, log-uniform
_STEP_FLOOR = 1e-4
_STEP_MAX = 10.0  # a state that forgets all but e^-10 in one position forgets enough
_DECAY_MIN = 1e-4  # |A| below never forgets: reported as a cause of NaN after many epochs
_DECAY_RANGE = (1.0, 16.0)  # of |A| at initialisation in version 2, uniform


class MambaDirection(nn.Module):
    """Causal convolution and selective scan, usable in either direction."""

    operators = ("selective_scan",)

    def __init__(self, width: int, *, inner: int, state: int) -> None:
        super().__init__()
        self.rank, self.state = math.ceil(width / 16), state
        self.conv = DepthwiseConv(inner, kernel=_CONV_KERNEL, causal=True)
        self.select = nn.Linear(inner, self.rank + 2 * state, bias=False)
        self.step = nn.Linear(self.rank, inner)
        self.A_log_EN = nn.Parameter(torch.log(torch.arange(1.0, state + 1)).repeat(inner, 1))
        self.D_E = nn.Parameter(torch.ones(inner))
        leave_undecayed([self.A_log_EN])
        nn.init.uniform_(self.step.weight, -(self.rank**-0.5), self.rank**-0.5)
        _reset_step_bias(self.step.bias)

    def forward(self, x_BLE: Tensor, mask_BL: Tensor, *, reverse: bool) -> Tensor:
        """[B, L, E], zero under the padding, to [B, L, E] float32."""
        # masked a second time because the convolution has a bias: without it, padding on the right would fill the
        # state of the reverse scan before the first real nucleotide
        x_BLE = zero_pads(F.silu(self.conv(x_BLE, reverse=reverse)), mask_BL)
        step_BLR, B_BLN, C_BLN = self.select(x_BLE).split([self.rank, self.state, self.state], dim=-1)
        with torch.autocast(x_BLE.device.type, enabled=False):
            delta_BLE = _bounded_step(self.step(at_least_float32(step_BLR)))
            A_EN = _bounded_decay(self.A_log_EN)
            return selective_scan(x_BLE, delta_BLE, A_EN, B_BLN, C_BLN, self.D_E, reverse=reverse)


class Mamba2Direction(nn.Module):
    """Causal convolution and scan in its dual form: one decay a head of P channels, so that all is matrix products."""

    def __init__(self, inner: int, *, state: int, head_width: int) -> None:
        super().__init__()
        num_heads = inner // head_width
        self.state, self.head_width = state, head_width
        self.conv = DepthwiseConv(inner + 2 * state, kernel=_CONV_KERNEL, causal=True)
        self.step_bias_H = nn.Parameter(torch.empty(num_heads))
        self.A_log_H = nn.Parameter(torch.empty(num_heads).uniform_(*_DECAY_RANGE).log())
        self.D_H = nn.Parameter(torch.ones(num_heads))
        _reset_step_bias(self.step_bias_H)

    def forward(self, x_BLE: Tensor, select_BLS: Tensor, mask_BL: Tensor, *, reverse: bool) -> Tensor:
        """[B, L, E] and [B, L, 2 N + H] (B, C and step), zero under the padding, to [B, L, E] float32."""
        select_BLS, step_BLH = select_BLS.split([2 * self.state, len(self.D_H)], dim=-1)
        # masked a second time for the same reason as in version 1
        mixed_BLF = zero_pads(F.silu(self.conv(torch.cat([x_BLE, select_BLS], dim=-1), reverse=reverse)), mask_BL)
        x_BLE, B_BLN, C_BLN = mixed_BLF.split([x_BLE.shape[-1], self.state, self.state], dim=-1)
        with torch.autocast(x_BLE.device.type, enabled=False):
            delta_BLH = _bounded_step(at_least_float32(step_BLH) + self.step_bias_H)
            x_BLHP = x_BLE.unflatten(-1, (-1, self.head_width))
            A_H = _bounded_decay(self.A_log_H)
            return ssd(x_BLHP, delta_BLH, A_H, B_BLN, C_BLN, self.D_H, reverse=reverse).flatten(2)


def _bounded_step(x: Tensor) -> Tensor:
    return F.softplus(x).clamp(max=_STEP_MAX)


def _bounded_decay(A_log: Tensor) -> Tensor:
    return -torch.exp(A_log).clamp(min=_DECAY_MIN)


@torch.no_grad()
def _reset_step_bias(bias: nn.Parameter) -> None:
    """Let softplus of the bias be log-uniform in `_STEP_RANGE` where the input says nothing."""
    low, high = map(math.log, _STEP_RANGE)
    step = torch.empty_like(bias).uniform_(low, high).exp().clamp(min=_STEP_FLOOR)
    bias.copy_(step + torch.log(-torch.expm1(-step)))  # inverse of softplus


class BidirectionalMamba(nn.Module):
    """Two scans, along the sequence and against it, as a mixer for `EncoderBlock`.

    Args:
        width: D.
        state: N.
        expand: E / D.
        tie_directions: one set of parameters for both; reversing the input then reverses the output.
        version: 1 = Mamba, a decay for each channel and state; 2 = Mamba-2, one for each head.
        head_width: P, channels that share a decay in version 2.

    Raises:
        ValueError: no such version, or E is not a multiple of P in version 2.
    """

    def __init__(
        self, width: int, *, state: int, expand: int, tie_directions: bool, version: int = 1, head_width: int = 64
    ) -> None:
        super().__init__()
        inner, count = expand * width, 1 if tie_directions else 2
        if version == 2:
            _check_heads(width, expand=expand, head_width=head_width)
        elif version != 1:
            raise ValueError(f"Mamba: got version {version}; expected 1 or 2.")
        self.sizes = [inner, inner] + (count * [2 * state + inner // head_width] if version == 2 else [])
        self.into = nn.Linear(width, sum(self.sizes), bias=False)
        self.directions = nn.ModuleList(
            MambaDirection(width, inner=inner, state=state)
            if version == 1
            else Mamba2Direction(inner, state=state, head_width=head_width)
            for _ in range(count)
        )
        self.norm = nn.LayerNorm(inner)
        self.out = nn.Linear(inner, width, bias=False)

    def forward(self, x_BLD: Tensor, mask_BL: Tensor, bias_BHLL: Tensor | None = None) -> Tensor:
        """[B, L, D] to [B, L, D]; the attention's bias is not used."""
        # select: nothing in version 1, whose directions derive it from x; else one for each direction
        x_BLE, gate_BLE, *select = zero_pads(self.into(x_BLD), mask_BL).split(self.sizes, dim=-1)
        forwards, backwards = self.directions[0], self.directions[-1]
        y_BLE = forwards(x_BLE, *select[:1], mask_BL, reverse=False)
        y_BLE = y_BLE + backwards(x_BLE, *select[-1:], mask_BL, reverse=True)
        return self.out(self.norm(y_BLE / 2 * F.silu(at_least_float32(gate_BLE))))


def _check_heads(width: int, *, expand: int, head_width: int) -> None:
    """Refuse an inner width that does not divide into heads."""
    if expand * width % head_width:
        unit = head_width // math.gcd(head_width, expand)
        raise ValueError(
            f"Mamba-2: got width {width}, {expand * width} inside, for heads of {head_width}; expected a multiple. "
            f"Next: width {-(-width // unit) * unit}, or another head_width."
        )
