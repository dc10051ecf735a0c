"""Mamba's selective scan: a linear recurrence whose decay, input and output depend on the position.

With h_t of shape [B, E, N] and h before the first position zero,

    h_t = exp(delta_t A) h_{t-1} + delta_t u_t B_t        y_t = sum_n C_t h_t + D u_t

Letters: B batch, L length, E inner channel, N state. Everything runs in float32 (float64 if given that), the output
included: in half precision the states overflow long before the inputs do.

Source: Gu & Dao 2023, Mamba, algorithm 2, with zero-order hold for A and Euler for B.
"""

import math
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.layers import compiled_scan, kernels
from models.layers.precision import at_least_float32

_LOG2_E = 1 / math.log(2)
_CHUNK = 16  # positions whose states are kept at a time in the backward pass
_MAMBA_SSM_CHUNK = 2048  # positions for which mamba-ssm keeps one state
_MOST_STATES = 256  # of the compiled kernel's and mamba-ssm's channels; more take plain PyTorch


def selective_scan(
    u_BLE: Tensor,
    delta_BLE: Tensor,
    A_EN: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    D_E: Tensor,
    *,
    reverse: bool = False,
) -> Tensor:
    """Scan along the sequence, or against it; `models.layers.kernels` chooses with what.

    Nothing of size [B, L, E, N] is kept: the backward pass starts from the states at every 16th or 32nd position and
    computes the others again.

    Args:
        u_BLE: [B, L, E] input.
        delta_BLE: [B, L, E] step size, positive.
        A_EN: [E, N] decay, negative.
        B_BLN: [B, L, N] input weights.
        C_BLN: [B, L, N] output weights.
        D_E: [E] weight of the input in the output.
        reverse: from the last position to the first.

    Returns:
        [B, L, E], float32 or float64.
    """
    args = (u_BLE, delta_BLE, A_EN, B_BLN, C_BLN, D_E)
    with torch.autocast(u_BLE.device.type, enabled=False):
        exact = any(x.dtype == torch.float64 for x in args)  # which plain PyTorch alone keeps
        plain = exact or A_EN.shape[1] > _MOST_STATES
        path = "reference" if plain else kernels.path("selective_scan", u_BLE.device)
        if path == "reference":
            return _in_plain_pytorch(*args, reverse=reverse)
        return OPERATOR.kernels[path].run(*args, reverse=reverse)


def selective_scan_ref(
    u_BLE: Tensor,
    delta_BLE: Tensor,
    A_EN: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    D_E: Tensor,
    *,
    reverse: bool = False,
) -> Tensor:
    """The definition, one position after the other in float64: the twin of `selective_scan`, same arguments."""
    u_BLE, delta_BLE, A_EN, B_BLN, C_BLN, D_E = (x.double() for x in (u_BLE, delta_BLE, A_EN, B_BLN, C_BLN, D_E))
    # unbound once: the gradient of an index x[:, t] is a zero tensor of full size, quadratic work over all positions
    steps = list(zip(*(x.unbind(1) for x in (u_BLE, delta_BLE, B_BLN, C_BLN)), strict=True))
    h_BEN = u_BLE.new_zeros(u_BLE.shape[0], *A_EN.shape)
    outputs = []
    for u_BE, delta_BE, B_BN, C_BN in reversed(steps) if reverse else steps:
        decay_BEN = torch.exp(delta_BE.unsqueeze(-1) * A_EN)
        h_BEN = decay_BEN * h_BEN + (delta_BE * u_BE).unsqueeze(-1) * B_BN.unsqueeze(1)
        outputs.append((h_BEN * C_BN.unsqueeze(1)).sum(-1) + D_E * u_BE)
    return torch.stack(outputs[::-1] if reverse else outputs, dim=1)


def _in_plain_pytorch(*args: Tensor, reverse: bool) -> Tensor:
    u_BLE, delta_BLE, A_EN, B_BLN, C_BLN, D_E = map(at_least_float32, args)
    return _Scan.apply(delta_BLE, A_EN, delta_BLE * u_BLE, B_BLN, C_BLN, reverse) + D_E * u_BLE


class _Scan(torch.autograd.Function):
    """y_t = sum_n C_t h_t with h_t = exp(delta_t A) h_{t-1} + x_t B_t, where x = delta u.

    States lie as [B, N, E]: the channels, being most, are the contiguous axis, and a sum over n is a product of a row
    with a matrix. A carries the factor 1/log 2, since exp2 takes a third of exp's time on the CPU.
    """

    @staticmethod
    def forward(
        ctx: Any, delta_BLE: Tensor, A_EN: Tensor, x_BLE: Tensor, B_BLN: Tensor, C_BLN: Tensor, reverse: bool
    ) -> Tensor:
        batch, length, _ = delta_BLE.shape
        A_NE = (A_EN * _LOG2_E).t().contiguous()
        h_BNE = delta_BLE.new_zeros(batch, *A_NE.shape)
        decay_BNE = torch.empty_like(h_BNE)
        y_LB1E = delta_BLE.new_empty(length, batch, 1, A_EN.shape[0])
        steps = list(zip(*(x.unbind(1) for x in (delta_BLE, x_BLE, B_BLN, C_BLN)), y_LB1E.unbind(0), strict=True))
        starts = []
        for count, (delta_BE, x_BE, B_BN, C_BN, y_B1E) in enumerate(reversed(steps) if reverse else steps):
            if count % _CHUNK == 0 and any(ctx.needs_input_grad):
                starts.append(h_BNE.clone())
            torch.mul(delta_BE.unsqueeze(1), A_NE, out=decay_BNE).exp2_()
            h_BNE.mul_(decay_BNE).addcmul_(B_BN.unsqueeze(2), x_BE.unsqueeze(1))
            torch.bmm(C_BN.unsqueeze(1), h_BNE, out=y_B1E)
        ctx.save_for_backward(delta_BLE, A_EN, x_BLE, B_BLN, C_BLN, *starts)
        ctx.reverse = reverse
        return y_LB1E.squeeze(2).transpose(0, 1).contiguous()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BLE: Tensor) -> tuple[Tensor | None, ...]:
        delta_BLE, A_EN, x_BLE, B_BLN, C_BLN, *starts = ctx.saved_tensors
        with torch.autocast(grad_BLE.device.type, enabled=False):
            return *_scan_backward(grad_BLE, delta_BLE, A_EN, x_BLE, B_BLN, C_BLN, starts, ctx.reverse), None


def _scan_backward(
    grad_BLE: Tensor,
    delta_BLE: Tensor,
    A_EN: Tensor,
    x_BLE: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    starts: list[Tensor],
    reverse: bool,
) -> tuple[Tensor, ...]:
    """Gradients of delta, A, x, B and C, walking back chunk by chunk from the states at their starts."""
    A_NE = A_EN.t().contiguous()
    columns = [x.unbind(1) for x in (grad_BLE, delta_BLE, x_BLE, B_BLN, C_BLN)]
    grads = [torch.empty_like(x) for x in (delta_BLE, x_BLE, B_BLN, C_BLN)]
    steps = list(zip(*columns, *(x.unbind(1) for x in grads), strict=True))
    if reverse:
        steps.reverse()
    grad_A_BNE = torch.zeros_like(starts[0])
    carry_BNE = torch.zeros_like(starts[0])  # gradient of the state, from the positions after it
    spare_BNE = torch.empty_like(starts[0])
    for first, start_BNE in reversed(list(zip(range(0, len(steps), _CHUNK), starts, strict=True))):
        chunk = steps[first : first + _CHUNK]
        decays, states = _recompute(chunk, A_NE * _LOG2_E, start_BNE)
        for step, decay_BNE, before_BNE, after_BNE in reversed(
            list(zip(chunk, decays, states[:-1], states[1:], strict=True))
        ):
            grad_BE, delta_BE, x_BE, B_BN, C_BN, grad_delta_BE, grad_x_BE, grad_B_BN, grad_C_BN = step
            carry_BNE.addcmul_(C_BN.unsqueeze(2), grad_BE.unsqueeze(1))
            torch.sum(torch.mul(after_BNE, grad_BE.unsqueeze(1), out=spare_BNE), -1, out=grad_C_BN)
            torch.sum(torch.mul(carry_BNE, x_BE.unsqueeze(1), out=spare_BNE), -1, out=grad_B_BN)
            grad_x_BE.copy_(torch.bmm(B_BN.unsqueeze(1), carry_BNE).squeeze(1))
            carry_BNE.mul_(decay_BNE)
            torch.mul(carry_BNE, before_BNE, out=spare_BNE)  # gradient of the exponent, delta A
            grad_A_BNE.addcmul_(spare_BNE, delta_BE.unsqueeze(1))
            torch.sum(spare_BNE.mul_(A_NE), 1, out=grad_delta_BE)
    grad_delta_BLE, grad_x_BLE, grad_B_BLN, grad_C_BLN = grads
    return grad_delta_BLE, grad_A_BNE.sum(0).t(), grad_x_BLE, grad_B_BLN, grad_C_BLN


def _recompute(chunk: list[tuple[Tensor, ...]], A_NE: Tensor, start_BNE: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """The decays of a chunk's positions, and the states before the first and after each."""
    decays, states = [], [start_BNE]
    for _, delta_BE, x_BE, B_BN, *_ in chunk:
        decays.append((delta_BE.unsqueeze(1) * A_NE).exp2_())
        states.append((decays[-1] * states[-1]).addcmul_(B_BN.unsqueeze(2), x_BE.unsqueeze(1)))
    return decays, states


def _load_compiled() -> str:
    usable, reason = compiled_scan.load()
    if not usable:
        raise RuntimeError(reason)
    return reason


def _run_compiled(*args: Tensor, reverse: bool) -> Tensor:
    return torch.ops.rna_scan.forward(*(x.float().contiguous() for x in args), reverse)[0]


def _load_triton() -> str:
    from models.layers import triton_scan

    return f"own kernels, triton {triton_scan.triton.__version__}"


def _run_triton(*args: Tensor, reverse: bool) -> Tensor:
    return torch.ops.rna_scan_triton.forward(*(x.contiguous() for x in args), reverse)[0]


def _load_mamba_ssm() -> str:
    from mamba_ssm import __version__
    from mamba_ssm.ops import selective_scan_interface  # noqa: F401

    return f"mamba-ssm {__version__}"


def _run_mamba_ssm(*args: Tensor, reverse: bool) -> Tensor:
    """Theirs wants [B, E, L] and knows one direction."""
    from mamba_ssm.ops.selective_scan_interface import selective_scan_fn

    u_BLE, delta_BLE, A_EN, B_BLN, C_BLN, D_E = (x.float() for x in args)

    def scan(*rows: Tensor) -> Tensor:
        columns = ((x.flip(1) if reverse else x).transpose(1, 2).contiguous() for x in rows)
        u_BEL, delta_BEL, B_BNL, C_BNL = columns
        y_BLE = selective_scan_fn(u_BEL, delta_BEL, A_EN.contiguous(), B_BNL, C_BNL, D_E.contiguous()).transpose(1, 2)
        return y_BLE.flip(1) if reverse else y_BLE.contiguous()

    length, (inner, states) = u_BLE.shape[1], A_EN.shape
    kept = 2 * states * -(-length // _MAMBA_SSM_CHUNK)  # numbers a channel that theirs keeps for the backward pass
    return kernels.over_batch(scan, u_BLE, delta_BLE, B_BLN, C_BLN, size=inner * max(length, kept))


def _example() -> dict[str, Tensor]:
    """70 positions: more than one chunk of every kernel but mamba-ssm's, and none a whole number of them."""
    rng = torch.Generator().manual_seed(0)
    sizes = {"u": (2, 70, 40), "delta": (2, 70, 40), "A": (40, 16), "B": (2, 70, 16), "C": (2, 70, 16), "D": (40,)}
    values = {name: torch.randn(*size, generator=rng) for name, size in sizes.items()}
    return values | {"delta": values["delta"].exp() / 5, "A": -values["A"].exp()}


OPERATOR = kernels.Operator(
    kernels={
        "mamba-ssm": kernels.Kernel("cuda", _load_mamba_ssm, _run_mamba_ssm, repeatable=False),
        "triton": kernels.Kernel("cuda", _load_triton, _run_triton),
        "compiled": kernels.Kernel("cpu", _load_compiled, _run_compiled),
    },
    reference=selective_scan_ref,
    example=_example,
)
