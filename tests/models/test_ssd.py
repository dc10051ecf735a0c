"""The scan as matrix products against its definition in float64, outputs and all gradients."""

from functools import partial

import pytest
import torch
from torch import Tensor

from models.layers.selective_scan import selective_scan_ref
from models.layers.ssd import _Decay, ssd, ssd_ref

NAMES = ("x", "delta", "A", "B", "C", "D")
#: largest relative difference, by the precision of what goes in
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


def arguments(
    length: int,
    *,
    dtype: torch.dtype = torch.float32,
    batch: int = 2,
    heads: int = 3,
    channels: int = 4,
    state: int = 5,
) -> list[Tensor]:
    rng = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    arrays = (
        normal(batch, length, heads, channels),
        normal(batch, length, heads).exp() / 5,  # delta > 0
        -normal(heads).exp(),  # A < 0
        normal(batch, length, state),
        normal(batch, length, state),
        normal(heads),
    )
    return [x.to(dtype).requires_grad_() for x in arrays]


def relative(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected number (over one, if all are zero)."""
    found, expected = found.detach().double(), expected.detach().double()
    return float((found - expected).abs().max() / (expected.abs().max() or 1.0))


def assert_equal_with_gradients(args: list[Tensor], *, reverse: bool, chunk: int, tolerance: float) -> None:
    weight = torch.randn(args[0].shape, generator=torch.Generator().manual_seed(1), dtype=args[0].dtype).to(args[0])
    found, expected = ssd(*args, reverse=reverse, chunk=chunk), ssd_ref(*args, reverse=reverse)
    assert found.dtype == args[0].dtype
    assert found.shape == expected.shape
    assert relative(found, expected) < tolerance
    grads, wanted = torch.autograd.grad(found, args, weight), torch.autograd.grad(expected, args, weight.double())
    for name, grad, other in zip(NAMES, grads, wanted, strict=True):
        assert relative(grad, other) < tolerance, name


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [1, 2, 7, 8, 9, 16, 37])
def test_outputs_and_all_gradients_equal_the_recurrence(length: int, reverse: bool, dtype: torch.dtype):
    args = arguments(length, dtype=dtype)
    assert_equal_with_gradients(args, reverse=reverse, chunk=8, tolerance=TOLERANCE[dtype])


@pytest.mark.parametrize("reverse", [False, True])
def test_the_chunk_is_a_matter_of_speed_only(reverse: bool):
    args = arguments(150)
    for chunk in (1, 64, 149, 1000):
        assert_equal_with_gradients(args, reverse=reverse, chunk=chunk, tolerance=1e-5)


def test_it_is_the_selective_scan_with_one_decay_a_head():
    x_BLHP, delta_BLH, A_H, B_BLN, C_BLN, D_H = arguments(30, dtype=torch.float64)
    per_channel = (delta_BLH.repeat_interleave(4, -1), A_H.repeat_interleave(4).unsqueeze(-1).expand(-1, 5))
    for reverse in (False, True):
        expected = selective_scan_ref(
            x_BLHP.flatten(2), *per_channel, B_BLN, C_BLN, D_H.repeat_interleave(4), reverse=reverse
        )
        found = ssd(x_BLHP, delta_BLH, A_H, B_BLN, C_BLN, D_H, reverse=reverse, chunk=8)
        torch.testing.assert_close(found.flatten(2), expected)


@pytest.mark.parametrize("reverse", [False, True])
def test_gradients_are_those_of_finite_differences(reverse: bool):
    args = arguments(5, dtype=torch.float64, batch=1, heads=2, channels=2, state=2)
    assert torch.autograd.gradcheck(partial(ssd, reverse=reverse, chunk=3), args)


def test_where_decay_is_fast_the_decays_gradient_keeps_its_digits():
    """A difference of cumulative sums gave this gradient with an error of 2e-4."""
    args = arguments(177)
    with torch.no_grad():
        args[1].add_(1)
        args[2].mul_(4)
    assert_equal_with_gradients(args, reverse=False, chunk=64, tolerance=2e-6)


def test_a_reverse_scan_is_a_scan_of_the_reversed_sequence():
    x, delta, A, B, C, D = arguments(21)
    turned = ssd(x.flip(1), delta.flip(1), A, B.flip(1), C.flip(1), D, chunk=8).flip(1)
    torch.testing.assert_close(ssd(x, delta, A, B, C, D, reverse=True, chunk=8), turned)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_position_sees_itself_and_what_came_before(reverse: bool):
    x, *rest = arguments(20, batch=1)
    grad_BLHP = torch.autograd.grad(ssd(x, *rest, reverse=reverse, chunk=8)[0, 9].sum(), x)[0]
    seen_L = grad_BLHP[0].abs().sum((-1, -2)) > 0
    assert seen_L.tolist() == [(i >= 9 if reverse else i <= 9) for i in range(20)]


def test_a_step_of_zero_leaves_the_state_as_it_is():
    x, delta, A, B, C, D = (x.detach() for x in arguments(25))
    delta[:, 11] = 0
    others = [i for i in range(25) if i != 11]
    without = ssd(x[:, others], delta[:, others], A, B[:, others], C[:, others], D, chunk=8)
    torch.testing.assert_close(ssd(x, delta, A, B, C, D, chunk=8)[:, others], without)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_under_autocast_everything_runs_in_float32(dtype: torch.dtype):
    args = arguments(30)
    expected = ssd_ref(*args)
    expected_grads = torch.autograd.grad(expected.sum(), args)
    with torch.autocast("cpu", dtype=dtype):
        found = ssd(*args, chunk=8)
        assert ssd(*[x.to(dtype) for x in args]).dtype == torch.float32
    assert found.dtype == torch.float32
    assert relative(found, expected) < TOLERANCE[torch.float32]
    for name, grad, wanted in zip(NAMES, torch.autograd.grad(found.sum(), args), expected_grads, strict=True):
        assert relative(grad, wanted) < TOLERANCE[torch.float32], name


def test_decays_are_no_tensor_that_was_changed_in_place():
    """Compiled by torch 2.11, a function that gives one has gradients of zero: A learned nothing, without a word."""
    assert _Decay.apply(torch.randn(2, 5, requires_grad=True))._version == 0


def test_slices_and_expanded_arrays_are_taken_as_they_lie():
    x, delta, A, B, C, D = (x.detach() for x in arguments(19))
    wide = torch.cat([x.flatten(2), B, C], dim=-1)
    x_view, B_view, C_view = wide.split([12, 5, 5], dim=-1)
    found = ssd(x_view.unflatten(-1, (3, 4)), delta, A, B_view, C_view, D[:1].expand(3), chunk=8)
    assert relative(found, ssd_ref(x, delta, A, B, C, D[:1].expand(3))) < TOLERANCE[torch.float32]


def test_large_steps_and_fast_decay_forget_without_nan():
    x, delta, A, B, C, D = arguments(80)
    found = ssd(x, torch.full_like(delta, 10.0), 1000 * A, B, C, D)
    found.sum().backward()
    assert found.isfinite().all()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (x, A, B, C, D))


def test_memory_kept_for_the_backward_pass_is_a_few_times_the_input_however_many_states():
    args = arguments(512, heads=4, channels=64, state=64)
    kept: dict[int, int] = {}

    def pack(x: Tensor) -> Tensor:
        kept[x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        _ = ssd(*args)
    assert sum(kept.values()) < 10 * args[0].untyped_storage().nbytes()  # all states would be 64 times


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("reverse", [False, True])
def test_a_cuda_device_gives_the_same_outputs_and_gradients(reverse: bool):
    args = [x.detach().cuda().requires_grad_() for x in arguments(177, heads=4, channels=64, state=64)]
    assert_equal_with_gradients(args, reverse=reverse, chunk=64, tolerance=1e-5)
