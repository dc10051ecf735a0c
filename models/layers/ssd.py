"""Mamba-2's scan in its dual form: the selective scan with one decay a head, as products of matrices.

With h_t of shape [B, H, N, P] and h before the first position zero,

    h_t = exp(delta_t A) h_{t-1} + delta_t B_t x_t        y_t = C_t h_t + D x_t

Letters: B batch, L length, H head, P channel of a head, N state; J chunk, Q position in a chunk. Everything runs in
float32 (float64 if given that), the output included, in plain PyTorch and the same on every device.

Forward + backward on one CPU thread, batch 8, 8 heads of 64, state 64, each in one run with upstream's ``ssd_minimal``
(chunk 64): L 128, 512, 2048 take 14, 57, 404 ms (it 28, 110, 712) and 57, 164, 410 MiB at the peak (it 78, 298, 610).
Chunks of 32 and 128 take 0.94 and 1.4 times as long at L 512, and 1.2 times both at L 177.

Source: Dao & Gu 2024, Transformers are SSMs, section 6. Where this differs: one group of B and C stays one group
instead of being repeated for every head, so that the products with the states are one matrix product for all heads.
"""

from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from models.layers.precision import at_least_float32


def ssd(
    x_BLHP: Tensor,
    delta_BLH: Tensor,
    A_H: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    D_H: Tensor,
    *,
    reverse: bool = False,
    chunk: int = 64,
) -> Tensor:
    """Scan along the sequence, or against it, in chunks: all pairs within one, states from one to the next.

    Args:
        x_BLHP: [B, L, H, P] input.
        delta_BLH: [B, L, H] step size, positive.
        A_H: [H] decay, negative.
        B_BLN: [B, L, N] input weights, the same for all heads.
        C_BLN: [B, L, N] output weights, the same for all heads.
        D_H: [H] weight of the input in the output.
        reverse: from the last position to the first.
        chunk: positions in a chunk at most; chunks are made equal, so that little is padded.

    Returns:
        [B, L, H, P], float32 or float64.
    """
    with torch.autocast(x_BLHP.device.type, enabled=False):
        x_BLHP, delta_BLH, A_H, B_BLN, C_BLN, D_H = map(at_least_float32, (x_BLHP, delta_BLH, A_H, B_BLN, C_BLN, D_H))
        x_BJQHP, delta_BJQH, B_BJQN, C_BJQN = (_cut(x, chunk) for x in (x_BLHP, delta_BLH, B_BLN, C_BLN))
        step_BJQHP = x_BJQHP * delta_BJQH.unsqueeze(-1)
        # summed, never subtracted: a sum of negative numbers is not rounded above 0, so that no decay exceeds 1
        log_decay_BJHQ = (delta_BJQH * A_H).transpose(2, 3)
        enter_BJQH1, leave_BJQH1 = _to_and_from_states(log_decay_BJHQ, reverse)
        ends_BJNHP = torch.matmul(B_BJQN.mT, (step_BJQHP * leave_BJQH1).flatten(3)).unflatten(3, x_BLHP.shape[2:])
        starts_BJNHP = _scan(ends_BJNHP, log_decay_BJHQ.sum(-1).exp(), reverse)
        from_states_BJQHP = torch.matmul(C_BJQN, starts_BJNHP.flatten(3)).unflatten(3, x_BLHP.shape[2:])
        y_BJQHP = torch.addcmul(D_H.unsqueeze(-1) * x_BJQHP, enter_BJQH1, from_states_BJQHP)
        y_BJQHP = y_BJQHP + _within_chunks(step_BJQHP, log_decay_BJHQ, B_BJQN, C_BJQN, reverse)
        return y_BJQHP.flatten(1, 2)[:, : x_BLHP.shape[1]]


def ssd_ref(
    x_BLHP: Tensor,
    delta_BLH: Tensor,
    A_H: Tensor,
    B_BLN: Tensor,
    C_BLN: Tensor,
    D_H: Tensor,
    *,
    reverse: bool = False,
) -> Tensor:
    """The definition, one position after the other in float64: the twin of `ssd`, same arguments."""
    x_BLHP, delta_BLH, A_H, B_BLN, C_BLN, D_H = (x.double() for x in (x_BLHP, delta_BLH, A_H, B_BLN, C_BLN, D_H))
    steps = list(zip(*(x.unbind(1) for x in (x_BLHP, delta_BLH, B_BLN, C_BLN)), strict=True))
    h_BHNP = x_BLHP.new_zeros(x_BLHP.shape[0], len(A_H), B_BLN.shape[-1], x_BLHP.shape[-1])
    outputs = []
    for x_BHP, delta_BH, B_BN, C_BN in reversed(steps) if reverse else steps:
        input_BHNP = torch.einsum("bh,bn,bhp->bhnp", delta_BH, B_BN, x_BHP)
        h_BHNP = torch.exp(delta_BH * A_H)[..., None, None] * h_BHNP + input_BHNP
        outputs.append(torch.einsum("bn,bhnp->bhp", C_BN, h_BHNP) + D_H.unsqueeze(-1) * x_BHP)
    return torch.stack(outputs[::-1] if reverse else outputs, dim=1)


def _cut(x: Tensor, chunk: int) -> Tensor:
    """[B, L, …] to [B, J, Q, …]; zeros at the end, as step sizes too: there the state stays as it is."""
    length = x.shape[1]
    chunks = -(-length // chunk)
    size = -(-length // chunks)
    if missing := chunks * size - length:
        x = F.pad(x, (0, 0) * (x.ndim - 2) + (0, missing))
    return x.unflatten(1, (chunks, size))


def _to_and_from_states(log_decay_BJHQ: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
    """Decay from the state before a chunk to each position, and from each to the state after: [B, J, Q, H, 1]."""
    before_BJHQ = _cumsum(log_decay_BJHQ)
    after_BJHQ = _cumsum(log_decay_BJHQ.flip(-1)).flip(-1)
    if reverse:
        enter_BJHQ, leave_BJHQ = after_BJHQ, F.pad(before_BJHQ[..., :-1], (1, 0))
    else:
        enter_BJHQ, leave_BJHQ = before_BJHQ, F.pad(after_BJHQ[..., 1:], (0, 1))
    return enter_BJHQ.exp().transpose(2, 3).unsqueeze(-1), leave_BJHQ.exp().transpose(2, 3).unsqueeze(-1)


def _cumsum(x: Tensor, dim: Literal[-1, -2] = -1) -> Tensor:
    """Sums along one of the last two axes; on a GPU that is to be deterministic, where cumsum is refused, a product."""
    if x.device.type == "cpu" or not torch.are_deterministic_algorithms_enabled():
        return x.cumsum(dim)
    upper_QQ = torch.ones(x.shape[dim], x.shape[dim], device=x.device, dtype=x.dtype).triu()
    return x @ upper_QQ if dim == -1 else upper_QQ.mT @ x


def _scan(ends_BJNHP: Tensor, decay_BJH: Tensor, reverse: bool) -> Tensor:
    """States before each chunk, [B, J, N, H, P], from what each chunk adds and the decay across it."""
    chunks = list(zip(ends_BJNHP.unbind(1), decay_BJH[:, :, None, :, None].unbind(1), strict=True))
    h_BNHP = torch.zeros_like(ends_BJNHP[:, 0])
    starts = []
    for end_BNHP, decay_B1H1 in reversed(chunks) if reverse else chunks:
        starts.append(h_BNHP)
        h_BNHP = torch.addcmul(end_BNHP, decay_B1H1, h_BNHP)
    return torch.stack(starts[::-1] if reverse else starts, dim=1)


def _within_chunks(step_BJQHP: Tensor, log_decay_BJHQ: Tensor, B_BJQN: Tensor, C_BJQN: Tensor, reverse: bool) -> Tensor:
    """What positions of the same chunk give each other and themselves: [B, J, Q, H, P]."""
    if reverse:
        # from s back to t < s the steps t … s - 1 decay: shifted by one, this is the transpose of the other direction
        log_decay_BJHQ = F.pad(log_decay_BJHQ[..., :-1], (1, 0))
        weight_BJHQQ = (_Decay.apply(log_decay_BJHQ) * torch.matmul(B_BJQN, C_BJQN.mT).unsqueeze(2)).mT
    else:
        weight_BJHQQ = _Decay.apply(log_decay_BJHQ) * torch.matmul(C_BJQN, B_BJQN.mT).unsqueeze(2)
    return torch.matmul(weight_BJHQQ, step_BJQHP.transpose(2, 3)).transpose(2, 3)


class _Decay(torch.autograd.Function):
    """Decay from position s to t >= s of a chunk, exp(sum of a over s + 1 … t), as a lower triangle [..., Q, Q].

    The sum is a cumulative one of what is not masked: a difference of two cumulative sums loses all digits where decay
    is fast, in the gradient as well (A's is wrong by 2e-4 instead of 1e-7 at steps above 1 and decays around -4). By
    hand because autograd's backward of these four operations adds 7 to 19 % to the time of the whole scan.
    """

    @staticmethod
    def forward(ctx: Any, a_Q: Tensor) -> Tensor:
        size = a_Q.shape[-1]
        later_QQ = torch.ones(size, size, dtype=torch.bool, device=a_Q.device).tril(-1)
        # not cumsum_: in place along this axis is 6 times slower on the CPU; and not tril_: compiled by torch 2.11, a
        # function whose output was changed in place last has gradients of zero
        decay_QQ = _cumsum(torch.where(later_QQ, a_Q.unsqueeze(-1), 0), -2).exp_().tril()
        ctx.save_for_backward(decay_QQ)
        return decay_QQ

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_QQ: Tensor) -> Tensor:
        # a_r stands in the exponents of all s < r <= t
        up_to_s_QQ = _cumsum(grad_QQ * ctx.saved_tensors[0]).tril_(-1)
        return F.pad(up_to_s_QQ[..., :-1].sum(-2), (1, 0))
