"""The selective scan as Triton kernels, forward and backward: any CUDA device from compute capability 7.5 on.

A program is one warp: a block of channels of one sequence, walking tile by tile of 16 positions. The channels are the
lanes and the positions of a tile live in registers, so the recurrence needs neither shared memory nor exchange between
lanes; the states are taken one after the other, and between tiles they lie in the table of the tiles' first states,
which is all that is kept for the backward pass: 1/16 of all states. Everything is float32 inside, whatever comes in.

Where batch and channels make too few programs, the tiles of a sequence are shared out to groups that run side by side:
since A does not depend on the position, a group carries a state h to exp(A sum(delta)) h plus its own end from zero.
One kernel computes each group's end and sum, one chains the groups, and then every group knows its start. The backward
pass does the same from the other side. How many groups there are depends on the shapes only, and nothing is added with
atomics: the same input gives the same bits.

Letters: B batch, L length, E channel, N state, S step of the scan: the positions in the scan's order, whole tiles.
This module imports triton, which is optional: import it inside a function.

Source: Gu & Dao 2023, arXiv 2312.00752, algorithm 2 and appendix D (recomputation).
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
import triton
import triton.language as tl
from torch import Tensor, library

from models.layers.compiled_scan import register_gradient

# Triton's own language: it joins tuples with + alone, and its values have no types here.
# Its interpreter (3.9) loses a scalar truth in & with a block, and one whose left side is a compile-time number.
# ruff: noqa: ANN202, B007, RUF005, SIM300
# mypy: disable-error-code="assignment, union-attr"

_TILE = tl.constexpr(16)  # positions held in registers; the first state of each tile is kept
_LANES = tl.constexpr(32)  # channels of a program
_LN_2 = tl.constexpr(math.log(2))
_LOG2_E = math.log2(math.e)
_ENOUGH = 1024  # programs that keep a large GPU busy: eight warps on each of 128 multiprocessors
_GROUP_TILES = 4  # a group is no shorter than this: its work must outweigh the chain's

#: one warp; products and sums fused, which Triton 3.9 wants said and 3.10 leaves out otherwise
_LAUNCH = {"num_warps": 1, "enable_fp_fusion": True}
#: one compilation serves all sizes: what Triton would know of them changes no instruction
_VARYING = ("L", "E", "N", "tiles", "per_group", "groups", "stride", "batch_stride")


@triton.jit
def _sequence_and_block(E):
    """A program's, both from the grid's first axis: the others end at 65,535, and a batch may be larger."""
    blocks = tl.cdiv(E, _LANES)
    return tl.program_id(0) // blocks, tl.program_id(0) % blocks


@triton.jit
def _place(b, tile, channels, L, E, reverse: tl.constexpr):
    """Offset of a tile's first row in a [B, L, E] array, and that from row to row."""
    position = L - 1 - tile * _TILE if reverse else tile * _TILE
    return (b.to(tl.int64) * L + position) * E + channels, -E if reverse else E


@triton.jit
def _load_tile(x, b, tile, channels, L, E, reverse: tl.constexpr):
    """A tile's rows of a [B, L, E] array, in the scan's order, zero beyond its end."""
    offset, step = _place(b, tile, channels, L, E, reverse)
    rows = ()
    for t in tl.static_range(_TILE):
        inside = channels < tl.where(L > tile * _TILE + t, E, 0)
        rows = rows + (tl.load(x + offset + t * step, mask=inside, other=0.0).to(tl.float32),)
    return rows


@triton.jit
def _store_tile(x, rows, b, tile, channels, L, E, reverse: tl.constexpr):
    offset, step = _place(b, tile, channels, L, E, reverse)
    for t in tl.static_range(_TILE):
        inside = channels < tl.where(L > tile * _TILE + t, E, 0)
        tl.store(x + offset + t * step, rows[t], mask=inside)


@triton.jit
def _load_column(x):
    """A tile's numbers of one state in a [B, N, S] array."""
    column = ()
    for t in tl.static_range(_TILE):
        column = column + (tl.load(x + t),)
    return column


@triton.jit
def _products(left, right):
    rows = ()
    for t in tl.static_range(_TILE):
        rows = rows + (left[t] * right[t],)
    return rows


@triton.jit(do_not_specialize=_VARYING)
def _forward_kernel(u, delta, A, B, C, D, y, starts, L, E, N, tiles, per_group, reverse: tl.constexpr):
    """y, and the first state of every tile but each group's first, which `starts` holds already."""
    b, block = _sequence_and_block(E)
    group = tl.program_id(1)
    channels = block * _LANES + tl.arange(0, _LANES)
    real = channels < E
    skip = tl.load(D + channels, mask=real, other=0.0)
    last = min(group * per_group + per_group, tiles)
    for tile in range(group * per_group, last):
        u_T = _load_tile(u, b, tile, channels, L, E, reverse)
        delta_T = _load_tile(delta, b, tile, channels, L, E, reverse)
        x_T = _products(delta_T, u_T)
        y_T = ()
        for t in tl.static_range(_TILE):
            y_T = y_T + (skip * u_T[t],)
        start = starts + (b.to(tl.int64) * tiles + tile) * N * E + channels
        for n in range(N):
            column = (b.to(tl.int64) * N + n) * tiles * _TILE + tile * _TILE
            B_T, C_T = _load_column(B + column), _load_column(C + column)
            decay = tl.load(A + n * E + channels, mask=real, other=0.0)
            h = tl.load(start + n * E, mask=real, other=0.0)
            sums_T = ()
            for t in tl.static_range(_TILE):
                h = tl.exp2(delta_T[t] * decay) * h + x_T[t] * B_T[t]
                sums_T = sums_T + (y_T[t] + h * C_T[t],)
            y_T = sums_T
            tl.store(start + (N + n) * E, h, mask=channels < tl.where(last > tile + 1, E, 0))
        _store_tile(y, y_T, b, tile, channels, L, E, reverse)
        tl.debug_barrier()  # the next tile reads what this one has stored


@triton.jit(do_not_specialize=_VARYING)
def _ends_kernel(delta, x, W, A, ends, sums, L, E, N, tiles, per_group, adjoint: tl.constexpr, reverse: tl.constexpr):
    """What each group carries out when nothing comes in (`ends`, zero before), and its sum of delta.

    The state, from x = u and W = B; or, with `adjoint`, the gradient that leaves the group's first position, from
    x = dy and W = C.
    """
    b, block = _sequence_and_block(E)
    group = tl.program_id(1)
    channels = block * _LANES + tl.arange(0, _LANES)
    real = channels < E
    first, last = group * per_group, min(group * per_group + per_group, tiles)
    end = ends + (b.to(tl.int64) * tl.num_programs(1) + group) * N * E + channels
    total = tl.zeros((_LANES,), tl.float32)
    for count in range(last - first):
        tile = last - 1 - count if adjoint else first + count
        delta_T = _load_tile(delta, b, tile, channels, L, E, reverse)
        x_T = _load_tile(x, b, tile, channels, L, E, reverse)
        if not adjoint:
            x_T = _products(delta_T, x_T)
        for t in tl.static_range(_TILE):
            total += delta_T[t]
        for n in range(N):
            W_T = _load_column(W + (b.to(tl.int64) * N + n) * tiles * _TILE + tile * _TILE)
            decay = tl.load(A + n * E + channels, mask=real, other=0.0)
            h = tl.load(end + n * E, mask=real, other=0.0)
            for t in tl.static_range(_TILE):
                if adjoint:
                    h = tl.exp2(delta_T[_TILE - 1 - t] * decay) * (h + x_T[_TILE - 1 - t] * W_T[_TILE - 1 - t])
                else:
                    h = tl.exp2(delta_T[t] * decay) * h + x_T[t] * W_T[t]
            tl.store(end + n * E, h, mask=real)
        tl.debug_barrier()
    tl.store(sums + (b.to(tl.int64) * tl.num_programs(1) + group) * E + channels, total, mask=real)


@triton.jit(do_not_specialize=_VARYING)
def _chain_kernel(ends, sums, A, into, E, N, groups, stride, batch_stride, adjoint: tl.constexpr):
    """What comes into each group, from what each carries out by itself; a program is one state of one block."""
    b, block = _sequence_and_block(E)
    n = tl.program_id(1)
    channels = block * _LANES + tl.arange(0, _LANES)
    real = channels < E
    decay = tl.load(A + n * E + channels, mask=real, other=0.0)
    carry = tl.zeros((_LANES,), tl.float32)
    for count in range(groups):
        group = groups - 1 - count if adjoint else count
        at = b.to(tl.int64) * groups + group
        end = tl.load(ends + (at * N + n) * E + channels, mask=real, other=0.0)
        total = tl.load(sums + at * E + channels, mask=real, other=0.0)
        place = b.to(tl.int64) * batch_stride + group.to(tl.int64) * stride + n * E
        tl.store(into + place + channels, carry, mask=real)
        carry = tl.exp2(decay * total) * carry + end


@triton.jit(do_not_specialize=_VARYING)
def _backward_kernel(
    dy, u, delta, A, B, C, D, starts, carries, du, ddelta, dA, dB, dC, dD, L, E, N, tiles, per_group,
    reverse: tl.constexpr,
):  # fmt: skip
    """Gradients, from the last tile of a group to its first.

    `carries` holds the gradient that comes into the group's last state from behind, and takes what leaves each tile.
    dA, zero before, and dD are each group's own, dB and dC each block's of channels; the caller adds them up.
    """
    b, block = _sequence_and_block(E)
    group = tl.program_id(1)
    channels = block * _LANES + tl.arange(0, _LANES)
    real = channels < E
    skip = tl.load(D + channels, mask=real, other=0.0)
    first, last = group * per_group, min(group * per_group + per_group, tiles)
    place = (b.to(tl.int64) * tl.num_programs(1) + group) * N * E + channels
    batch = tl.num_programs(0) // tl.cdiv(E, _LANES)
    share = block.to(tl.int64) * batch * N * tiles * _TILE  # where this block's dB and dC begin
    skip_grad = tl.zeros((_LANES,), tl.float32)
    for count in range(last - first):
        tile = last - 1 - count
        u_T = _load_tile(u, b, tile, channels, L, E, reverse)
        delta_T = _load_tile(delta, b, tile, channels, L, E, reverse)
        dy_T = _load_tile(dy, b, tile, channels, L, E, reverse)
        x_T = _products(delta_T, u_T)
        dx_T = ()
        for t in tl.static_range(_TILE):
            dx_T = dx_T + (tl.zeros((_LANES,), tl.float32),)
        dexp_T = dx_T  # gradient of delta through the decay
        start = starts + (b.to(tl.int64) * tiles + tile) * N * E + channels
        for n in range(N):
            column = (b.to(tl.int64) * N + n) * tiles * _TILE + tile * _TILE
            B_T, C_T = _load_column(B + column), _load_column(C + column)
            decay = tl.load(A + n * E + channels, mask=real, other=0.0)
            a_T, h_T = (), (tl.load(start + n * E, mask=real, other=0.0),)
            for t in tl.static_range(_TILE):
                a_T = a_T + (tl.exp2(delta_T[t] * decay),)
                h_T = h_T + (a_T[t] * h_T[t] + x_T[t] * B_T[t],)
            carry = tl.load(carries + place + n * E, mask=real, other=0.0)
            decay_grad = tl.load(dA + place + n * E, mask=real, other=0.0)
            new_dx_T, new_dexp_T = (), ()
            for t in tl.static_range(_TILE - 1, -1, -1):
                grad = carry + dy_T[t] * C_T[t]
                tl.store(dC + share + column + t, tl.sum(h_T[t + 1] * dy_T[t]))
                tl.store(dB + share + column + t, tl.sum(grad * x_T[t]))
                carry = grad * a_T[t]
                through = carry * h_T[t]
                decay_grad += through * delta_T[t]
                new_dx_T = (dx_T[t] + grad * B_T[t],) + new_dx_T
                new_dexp_T = (dexp_T[t] + through * decay,) + new_dexp_T
            dx_T, dexp_T = new_dx_T, new_dexp_T
            tl.store(carries + place + n * E, carry, mask=real)
            tl.store(dA + place + n * E, decay_grad, mask=real)
        du_T, ddelta_T = (), ()
        for t in tl.static_range(_TILE):
            du_T = du_T + (dx_T[t] * delta_T[t] + dy_T[t] * skip,)
            ddelta_T = ddelta_T + (dx_T[t] * u_T[t] + dexp_T[t] * _LN_2,)
            skip_grad += dy_T[t] * u_T[t]
        _store_tile(du, du_T, b, tile, channels, L, E, reverse)
        _store_tile(ddelta, ddelta_T, b, tile, channels, L, E, reverse)
        tl.debug_barrier()
    tl.store(dD + (b.to(tl.int64) * tl.num_programs(1) + group) * E + channels, skip_grad, mask=real)


@library.custom_op("rna_scan_triton::forward", mutates_args=())
def forward(
    u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, reverse: bool
) -> tuple[Tensor, Tensor]:
    """The scan, and the first state of every tile, for the backward pass.

    Args:
        u: [B, L, E], float32 or half precision, contiguous like all of them.
        delta: [B, L, E].
        A: [E, N].
        B: [B, L, N].
        C: [B, L, N].
        D: [E].
        reverse: from the last position to the first.

    Returns:
        y [B, L, E] and states [B, tiles, N, E], float32.
    """
    batch, length, inner = u.shape
    grid, tiles, per_group = _shares(u)
    A_NE, B_BNS, C_BNS = _decays(A), _columns(B, tiles, reverse), _columns(C, tiles, reverse)
    y = u.new_empty(u.shape, dtype=torch.float32)
    starts = y.new_empty(batch, tiles, A.shape[1], inner)
    starts[:, :1] = 0
    sizes = (length, inner, A.shape[1], tiles, per_group)
    with torch.cuda.device_of(u):
        if grid[1] > 1:
            ends, sums = y.new_zeros(batch, grid[1], *A_NE.shape), y.new_empty(batch, grid[1], inner)
            _ends_kernel[grid](delta, u, B_BNS, A_NE, ends, sums, *sizes, adjoint=False, reverse=reverse, **_LAUNCH)
            _chain(ends, sums, A_NE, starts, stride=per_group * A.numel(), adjoint=False)
        _forward_kernel[grid](
            u, delta, A_NE, B_BNS, C_BNS, D.float(), y, starts, *sizes, reverse=reverse, **_LAUNCH
        )  # fmt: skip
    return y, starts


@library.custom_op("rna_scan_triton::backward", mutates_args=())
def backward(
    dy: Tensor,
    u: Tensor,
    delta: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor,
    starts: Tensor,
    reverse: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, delta, A, B, C and D, each with its tensor's shape and type."""
    batch, length, inner = u.shape
    grid, tiles, per_group = _shares(u)
    A_NE, B_BNS, C_BNS = _decays(A), _columns(B, tiles, reverse), _columns(C, tiles, reverse)
    du, ddelta = torch.empty_like(u), torch.empty_like(delta)
    carries, dA = starts.new_zeros(2, batch, grid[1], *A_NE.shape)
    dB, dC = starts.new_empty(2, _blocks(inner), *B_BNS.shape)
    dD = starts.new_empty(batch, grid[1], inner)
    sizes = (length, inner, A.shape[1], tiles, per_group)
    with torch.cuda.device_of(u):
        if grid[1] > 1:
            sums = torch.empty_like(dD)
            _ends_kernel[grid](
                delta, dy, C_BNS, A_NE, carries, sums, *sizes, adjoint=True, reverse=reverse, **_LAUNCH
            )  # fmt: skip
            _chain(carries, sums, A_NE, carries, stride=A.numel(), adjoint=True)
        _backward_kernel[grid](
            dy, u, delta, A_NE, B_BNS, C_BNS, D.float(), starts, carries, du, ddelta, dA, dB, dC, dD,
            *sizes, reverse=reverse, **_LAUNCH,
        )  # fmt: skip
    grads = dA.sum((0, 1)).t(), _rows(dB.sum(0), length, reverse), _rows(dC.sum(0), length, reverse), dD.sum((0, 1))
    return du, ddelta, *(grad.to(x.dtype).contiguous() for grad, x in zip(grads, (A, B, C, D), strict=True))


@forward.register_fake
def _(u: Tensor, delta: Tensor, A: Tensor, *_: Any) -> tuple[Tensor, Tensor]:
    y = torch.empty_like(u, dtype=torch.float32)
    return y, y.new_empty(u.shape[0], -(-u.shape[1] // _TILE.value), A.shape[1], A.shape[0])


@backward.register_fake
def _(dy: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, *_: Any) -> Any:
    return tuple(torch.empty_like(x) for x in (u, delta, A, B, C, D))


register_gradient("rna_scan_triton")


def _blocks(inner: int) -> int:
    """Of channels."""
    return -(-inner // _LANES.value)


def _shares(u: Tensor) -> tuple[tuple[int, int], int, int]:
    """Grid of blocks of channels of all sequences, and groups of tiles; tiles of a sequence; tiles of a group."""
    batch, length, inner = u.shape
    programs, tiles = batch * _blocks(inner), -(-length // _TILE.value)
    wanted = 1 if programs >= _ENOUGH else _ENOUGH // max(1, programs)
    per_group = max(1, -(-tiles // max(1, min(wanted, tiles // _GROUP_TILES))))
    return (programs, max(1, -(-tiles // per_group))), tiles, per_group


def _decays(A_EN: Tensor) -> Tensor:
    """A as the kernels want it: [N, E], for the power of two."""
    return (A_EN.float() * _LOG2_E).t().contiguous()


def _columns(x_BLN: Tensor, tiles: int, reverse: bool) -> Tensor:
    """[B, N, S], in the scan's order, zero beyond the sequence's end."""
    x_BLN = x_BLN.float().flip(1) if reverse else x_BLN.float()
    return F.pad(x_BLN.transpose(1, 2), (0, tiles * _TILE.value - x_BLN.shape[1])).contiguous()


def _rows(x_BNS: Tensor, length: int, reverse: bool) -> Tensor:
    """[B, L, N] of [B, N, S]: the other way round."""
    x_BLN = x_BNS[..., :length].transpose(1, 2)
    return x_BLN.flip(1) if reverse else x_BLN


def _chain(ends: Tensor, sums: Tensor, A_NE: Tensor, into: Tensor, *, stride: int, adjoint: bool) -> None:
    """Write what comes into each group at every `stride`-th number of a sequence's part of `into`."""
    batch, groups, states, inner = ends.shape
    batch_stride = into.stride(0)
    _chain_kernel[batch * _blocks(inner), states](
        ends, sums, A_NE, into, inner, states, groups, stride, batch_stride, adjoint=adjoint, **_LAUNCH
    )  # fmt: skip
