"""Attention with a learned bias on every pair of positions.

The bias is a function of the signed distance, so that it exists at every length, and of the base-pair probabilities;
all layers share it. Or, with a pair track, each layer reads its own from the pair features. For long sequences no
[L, L] matrix of logits or bias is kept: queries go through in groups of rows. Letters: B batch, L length, D width,
H head, F pair feature, P pair channel, T distance, R row (query).
"""

import functools
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, library, nn
from torch.autograd.function import once_differentiable

from models.layers.precision import at_least_float32
from models.layers.undecayed import leave_undecayed

_BPP_FLOOR = 1e-3  # probabilities below are nothing: base-pair tables are cut there
_HIDDEN = 32  # units of the network on the distance
NUM_PAIR_FEATURES = 3
WHOLE_LENGTH = 1024  # in nt; the rows of longer sequences are grouped
# logits of a group of rows, over batch and heads; on the CPU more is slower, elsewhere less leaves the device idle
_GROUP_ELEMENTS, _GROUP_ELEMENTS_CPU = 2**24, 2**20


class RelativePosition(nn.Module):
    """Signed distance i - j to a value per head, through a small network on the logarithm of the distance.

    Training sees distances to 206 nt, prediction 456 and more: in logarithms that is 5.3 against 6.1.

    Source: dynamic position bias, CrossFormer (Wang et al. 2021), there on the plain distance.
    """

    def __init__(self, num_heads: int, *, symmetric: bool = False) -> None:
        super().__init__()
        self.symmetric = symmetric
        self.hidden = nn.Linear(3, _HIDDEN)
        self.out = nn.Linear(_HIDDEN, num_heads, bias=False)  # a constant would be no bias: softmax ignores it

    def forward(self, length: int) -> Tensor:
        """Values for all pairs: [H, L, L] float32, first position in the rows."""
        return _rows_of_table(self.table(length), 0, length)

    def table(self, length: int) -> Tensor:
        """Values at every distance, from L-1 down to 1-L: [H, T] float32, T = 2 L - 1."""
        with torch.autocast(self.hidden.weight.device.type, enabled=False):
            return self.out(F.gelu(self.hidden(self._features(length)))).t()

    def _features(self, length: int) -> Tensor:
        weight = self.hidden.weight
        distance = torch.arange(length - 1, -length, -1, device=weight.device, dtype=weight.dtype)
        near = distance.abs()
        sign = torch.zeros_like(near) if self.symmetric else distance.sign()
        return torch.stack([torch.log1p(near), 2.0 / (1.0 + near), sign], dim=-1)


@library.custom_op("rna::rows_of_table", mutates_args=())
def _rows_of_table(table_HT: Tensor, start: int, stop: int) -> Tensor:
    """Rows `start` … `stop` - 1 of the matrix that depends on the distance alone: [H, R, L].

    An operator of its own because a compiler would build the network anew for every length: `unfold` takes no symbol.
    """
    length = (table_HT.shape[1] + 1) // 2
    # row i is a window that starts at distance i: 5 times faster forward and backward than a gather
    return table_HT[:, length - stop : 2 * length - 1 - start].unfold(1, length, 1).flip(1).contiguous()


@_rows_of_table.register_fake
def _(table_HT: Tensor, start: int, stop: int) -> Tensor:
    return table_HT.new_empty(table_HT.shape[0], stop - start, (table_HT.shape[1] + 1) // 2)


@library.custom_op("rna::rows_of_table_backward", mutates_args=())
def _rows_of_table_backward(grad_HRL: Tensor, start: int, stop: int) -> Tensor:
    """Sums along the diagonals, zero at distances that no row holds: [H, T]."""
    heads, rows, length = grad_HRL.shape
    window = [heads, length + rows - 1]
    grad_HT = torch.ops.aten.unfold_backward(grad_HRL.flip(1), window, 1, length, 1)
    return F.pad(grad_HT, (length - stop, start))


@_rows_of_table_backward.register_fake
def _(grad_HRL: Tensor, start: int, stop: int) -> Tensor:
    return grad_HRL.new_empty(grad_HRL.shape[0], 2 * grad_HRL.shape[2] - 1)


def _save_rows(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    ctx.rows = inputs[1:]


def _differentiate_rows(ctx: Any, grad_HRL: Tensor) -> tuple[Tensor | None, ...]:
    return _rows_of_table_backward(grad_HRL, *ctx.rows), None, None


_rows_of_table.register_autograd(_differentiate_rows, setup_context=_save_rows)


def pair_features(bpp_BLL: Tensor, start: int = 0, stop: int | None = None) -> Tensor:
    """What base-pair probabilities say of a pair of positions, zero where nothing pairs.

    The features are the probability, its logarithm above a floor (0 … 1), and the logarithm's mean over the two
    pairs stacked on this one, (i-1, j+1) and (i+1, j-1).

    Args:
        bpp_BLL: [B, L, L].
        start: first row.
        stop: row after the last; None = L.

    Returns:
        [B, F, R, L] float32.
    """
    length = bpp_BLL.shape[1]
    stop = length if stop is None else stop
    # rows start - 1 … stop; what lies outside is zero
    near_BRL = F.pad(bpp_BLL[:, max(start - 1, 0) : stop + 1], (0, 0, int(start == 0), int(stop == length)))
    log_BRL = torch.log1p(near_BRL / _BPP_FLOOR) / math.log1p(1 / _BPP_FLOOR)
    stacked_BRL = F.pad(log_BRL[:, :-2, 1:], (0, 1)) + F.pad(log_BRL[:, 2:, :-1], (1, 0))
    return torch.stack([near_BRL[:, 1:-1], log_BRL[:, 1:-1], stacked_BRL / 2], dim=1)


class BiasRows(NamedTuple):
    """The bias of `PairBias`, computed where and when rows of it are needed."""

    table_HT: Tensor
    weight_HF: Tensor | None
    mask_BL: Tensor
    bpp_BLL: Tensor | None

    def rows(self, start: int, stop: int) -> Tensor:
        """Rows `start` … `stop` - 1: [B, H, R, L], in the precision of the attention's queries."""
        bias_HRL = _rows_of_table(self.table_HT, start, stop)
        bias_BHRL = bias_HRL.unsqueeze(0)
        if self.weight_HF is not None and self.bpp_BLL is not None:
            bias_BHRL = _add_pairing(bias_HRL, pair_features(self.bpp_BLL, start, stop), self.weight_HF)
        return _close_pads(bias_BHRL, self.mask_BL)


class PairBias(nn.Module):
    """The additive attention bias that all layers share: distance, base pairing, and the key mask."""

    def __init__(self, num_heads: int, *, use_bpp: bool) -> None:
        super().__init__()
        self.position = RelativePosition(num_heads)
        # heads start from "ignores pairing" to "looks at the partner"
        start_HF = torch.zeros(num_heads, NUM_PAIR_FEATURES)
        start_HF[:, 1] = torch.linspace(0.0, 6.0, num_heads)
        self.weight_HF = nn.Parameter(start_HF) if use_bpp else None
        if self.weight_HF is not None:
            leave_undecayed([self.weight_HF])

    def forward(self, mask_BL: Tensor, bpp_BLL: Tensor | None) -> Tensor | BiasRows:
        """Bias for `Attention`: [B, H, L, L] up to `WHOLE_LENGTH`, beyond it what gives any rows of it."""
        length = mask_BL.shape[1]
        bias = BiasRows(self.position.table(length), self.weight_HF, mask_BL, bpp_BLL)
        return bias.rows(0, length) if length <= WHOLE_LENGTH else bias


def _add_pairing(bias_HRL: Tensor, pairs_BFRL: Tensor, weight_HF: Tensor) -> Tensor:
    batch, _, *shape = pairs_BFRL.shape
    with torch.autocast(pairs_BFRL.device.type, enabled=False):
        # one product for weighting and adding: half the time of einsum and sum, an eighth of a 1×1 convolution
        return torch.baddbmm(
            bias_HRL.flatten(1).expand(batch, -1, -1),
            weight_HF.expand(batch, -1, -1),
            pairs_BFRL.flatten(2).to(bias_HRL.dtype),
        ).view(batch, -1, *shape)


def channels_first(linear: nn.Linear, x_BRLP: Tensor) -> Tensor:
    """Apply a linear layer without bias, channels first in the result and no copy transposed: [B, C, R, L]."""
    batch, *shape, _ = x_BRLP.shape
    # bmm, not matmul, which would transpose a copy
    return torch.bmm(linear.weight.expand(batch, -1, -1), x_BRLP.flatten(1, 2).mT).unflatten(2, shape)


def _close_pads(bias_BHRL: Tensor, mask_BL: Tensor) -> Tensor:
    """Give no weight to keys under the padding; in the precision of the attention's queries."""
    dtype = bias_BHRL.dtype
    if torch.is_autocast_enabled(mask_BL.device.type):
        dtype = torch.get_autocast_dtype(mask_BL.device.type)
    # the smallest number, not -inf: no NaN arises anywhere
    closed_BHRL = torch.where(mask_BL[:, None, None], bias_BHRL.to(dtype), torch.finfo(dtype).min)
    needs_alignment = closed_BHRL.is_cuda and not torch.compiler.is_compiling()  # Inductor aligns by itself
    return _align(closed_BHRL) if needs_alignment else closed_BHRL


def _align(bias_BHRL: Tensor) -> Tensor:
    """The same numbers in rows that begin at multiples of 8: of others each layer's attention keeps an aligned copy.

    Source: ``preprocess_mask`` of PyTorch's memory-efficient attention.
    """
    length = bias_BHRL.shape[-1]
    return F.pad(bias_BHRL, (0, -length % 8))[..., :length]


def _attend_in_groups(q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, rows: Callable[[int, int], Tensor]) -> Tensor:
    """Attention with the bias ``rows(start, stop)``: [B, H, L, D]; without gradients."""
    # a list of small results between large temporaries would let the heap grow by all of those: 1.6 GiB at L 8192
    mixed_BHLD = torch.empty_like(q_BHLD)
    for start, stop in _groups(q_BHLD):
        bias_BHRL = rows(start, stop)
        mixed_BHLD[:, :, start:stop] = F.scaled_dot_product_attention(
            q_BHLD[:, :, start:stop], k_BHLD, v_BHLD, attn_mask=bias_BHRL
        )
    return mixed_BHLD


def _groups(q_BHLD: Tensor) -> Iterator[tuple[int, int]]:
    """First row and row after the last of each group."""
    batch, num_heads, length, _ = q_BHLD.shape
    elements = _GROUP_ELEMENTS_CPU if q_BHLD.device.type == "cpu" else _GROUP_ELEMENTS
    size = max(1, elements // (batch * num_heads * length))
    return ((start, min(start + size, length)) for start in range(0, length, size))


class _AttentionInGroups(torch.autograd.Function):
    """Attention with the bias of `BiasRows`, whose every group is computed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, *parts: Any) -> Tensor:
        ctx.save_for_backward(q_BHLD, k_BHLD, v_BHLD, *parts)
        device = q_BHLD.device.type
        ctx.autocast = {"dtype": torch.get_autocast_dtype(device), "enabled": torch.is_autocast_enabled(device)}
        return _attend_in_groups(q_BHLD, k_BHLD, v_BHLD, BiasRows(*parts).rows)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad_BHLD: Tensor) -> tuple[Tensor | None, ...]:
        q_BHLD, *shared = ctx.saved_tensors
        needed = ctx.needs_input_grad[1:]
        shared = [x.detach().requires_grad_() if need else x for x, need in zip(shared, needed, strict=True)]
        given = [x for x, need in zip(shared, needed, strict=True) if need]
        sums = [torch.zeros_like(at_least_float32(x)) for x in given]  # over many groups: not in half precision
        grad_q_BHLD = torch.empty_like(q_BHLD)
        for start, stop in _groups(q_BHLD):
            q_BHRD = q_BHLD[:, :, start:stop].detach().requires_grad_()
            with torch.enable_grad(), torch.autocast(q_BHLD.device.type, **ctx.autocast):
                bias_BHRL = BiasRows(*shared[2:]).rows(start, stop)
                mixed_BHRD = F.scaled_dot_product_attention(q_BHRD, shared[0], shared[1], attn_mask=bias_BHRL)
            grad_q, *grads = torch.autograd.grad(mixed_BHRD, [q_BHRD, *given], grad_BHLD[:, :, start:stop])
            grad_q_BHLD[:, :, start:stop] = grad_q
            for total, grad in zip(sums, grads, strict=True):
                total += grad
        found = iter(sums)
        return grad_q_BHLD, *(next(found).to(x.dtype) if need else None for x, need in zip(shared, needed, strict=True))


class Attention(nn.Module):
    """Multi-head self-attention with an additive bias, through `scaled_dot_product_attention`.

    Rows of sequences beyond `WHOLE_LENGTH` go in groups, which training computes twice; the exception is training with
    pair features, which need more memory than logits do. Two blocks of width 192 with 6 heads, batch 1, one CPU thread:
    at L 2048 156 MiB instead of 513 in training and 43 instead of 212 in prediction, for 1.1 and 0.5 times the time;
    at L 8192 447 MiB in training, and 91 instead of 3,121 in prediction.

    Args:
        width: D.
        num_heads: H.
        pair_width: P, where the bias comes from pair features; 0 = they are not read.
    """

    def __init__(self, width: int, *, num_heads: int, pair_width: int = 0) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"attention: width {width} is not a multiple of num_heads {num_heads}.")
        self.num_heads = num_heads
        self.qkv = nn.Linear(width, 3 * width, bias=False)
        self.out = nn.Linear(width, width)
        # no biases: softmax ignores a constant
        self.norm_pairs = nn.LayerNorm(pair_width, bias=False) if pair_width else None
        self.read_pairs = nn.Linear(pair_width, num_heads, bias=False) if pair_width else None

    def forward(self, x_BLD: Tensor, mask_BL: Tensor, bias: Tensor | BiasRows | None) -> Tensor:
        """Mix positions.

        Args:
            x_BLD: [B, L, D].
            mask_BL: [B, L] bool.
            bias: what `PairBias` gave; pair features [B, L, L, P] if built for them; None = the mask alone.

        Returns:
            [B, L, D].
        """
        batch, length, width = x_BLD.shape
        heads = self.qkv(x_BLD).view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q_BHLD, k_BHLD, v_BHLD = heads.unbind(0)
        mixed_BHLD = self._attend(q_BHLD, k_BHLD, v_BHLD, mask_BL, bias)
        return self.out(mixed_BHLD.transpose(1, 2).reshape(batch, length, width))

    def _attend(
        self, q_BHLD: Tensor, k_BHLD: Tensor, v_BHLD: Tensor, mask_BL: Tensor, bias: Tensor | BiasRows | None
    ) -> Tensor:
        length = q_BHLD.shape[2]
        if isinstance(bias, BiasRows):
            return _AttentionInGroups.apply(q_BHLD, k_BHLD, v_BHLD, *bias)
        if bias is None:
            bias = mask_BL[:, None, None]
        elif self.norm_pairs is not None and self.read_pairs is not None:
            rows = functools.partial(self._read_pairs, bias, mask_BL)
            if length > WHOLE_LENGTH and not torch.is_grad_enabled():
                return _attend_in_groups(q_BHLD, k_BHLD, v_BHLD, rows)
            bias = rows(0, length)
        return F.scaled_dot_product_attention(q_BHLD, k_BHLD, v_BHLD, attn_mask=bias)

    def _read_pairs(self, pair_BLLP: Tensor, mask_BL: Tensor, start: int, stop: int) -> Tensor:
        assert self.norm_pairs is not None
        assert self.read_pairs is not None
        return _close_pads(channels_first(self.read_pairs, self.norm_pairs(pair_BLLP[:, start:stop])), mask_BL)
