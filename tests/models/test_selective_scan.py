"""The fast scan against its definition in float64, outputs and all gradients."""

import pytest
import torch
from torch import Tensor

from models.layers import kernels
from models.layers.selective_scan import selective_scan, selective_scan_ref

NAMES = ("u", "delta", "A", "B", "C", "D")
#: largest relative difference, by the precision of what goes in
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}


@pytest.fixture(autouse=True, params=["reference", "compiled"])
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Which code float32 goes through on the CPU; float64 is always the plain path."""
    if request.param == "reference":
        monkeypatch.setenv("RNA_KERNELS", "reference")
    elif (choice := kernels.choose("selective_scan", torch.device("cpu"))).path != "compiled":
        pytest.skip(choice.reason)
    return request.param


def arguments(length: int, *, dtype: torch.dtype = torch.float32, batch: int = 3, inner: int = 6, state: int = 5):
    rng = torch.Generator().manual_seed(length)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=rng, dtype=torch.float64)

    arrays = (
        normal(batch, length, inner),
        normal(batch, length, inner).exp() / 5,  # delta > 0
        -normal(inner, state).exp(),  # A < 0
        normal(batch, length, state),
        normal(batch, length, state),
        normal(inner),
    )
    return [x.to(dtype).requires_grad_() for x in arrays]


def relative(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest expected number (over one, if all are zero)."""
    found, expected = found.detach().double(), expected.detach()
    return float((found - expected).abs().max() / (expected.abs().max() or 1.0))


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("length", [1, 2, 15, 16, 17, 50])
def test_outputs_and_all_gradients_equal_the_sequential_reference(length: int, reverse: bool, dtype: torch.dtype):
    args = arguments(length, dtype=dtype)
    weight_BLE = torch.randn(args[0].shape, generator=torch.Generator().manual_seed(1), dtype=dtype)
    found, expected = selective_scan(*args, reverse=reverse), selective_scan_ref(*args, reverse=reverse)
    assert found.dtype == dtype
    assert relative(found, expected) < TOLERANCE[dtype]
    found_grads = torch.autograd.grad(found, args, weight_BLE)
    expected_grads = torch.autograd.grad(expected, args, weight_BLE.double())
    for name, grad, wanted in zip(NAMES, found_grads, expected_grads, strict=True):
        assert relative(grad, wanted.double()) < TOLERANCE[dtype], name


def test_more_states_than_a_kernel_takes_run_in_plain_pytorch():
    """It said: RuntimeError: selective_scan: state size 300 is above 256."""
    args = arguments(3, batch=1, inner=2, state=257)
    assert relative(selective_scan(*args), selective_scan_ref(*args)) < TOLERANCE[torch.float32]


def test_gradients_are_those_of_finite_differences():
    assert torch.autograd.gradcheck(selective_scan, arguments(4, dtype=torch.float64, batch=1, inner=2, state=3))


def test_a_second_derivative_is_refused():
    """Compiled, its part of one was zero: "This may lead to silently incorrect behavior", said a warning."""
    args = arguments(11)
    grads = torch.autograd.grad(selective_scan(*args).square().sum(), args, create_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiate twice"):
        grads[0].sum().backward()


def test_a_reverse_scan_is_a_scan_of_the_reversed_sequence():
    u, delta, A, B, C, D = arguments(21)
    turned = selective_scan(u.flip(1), delta.flip(1), A, B.flip(1), C.flip(1), D)
    torch.testing.assert_close(selective_scan(u, delta, A, B, C, D, reverse=True), turned.flip(1))


def test_a_position_sees_itself_and_what_came_before():
    u, *rest = arguments(12, batch=1)
    grad_BLE = torch.autograd.grad(selective_scan(u, *rest)[0, 5].sum(), u)[0]
    assert (grad_BLE[0, :6].abs().sum(-1) > 0).all()
    assert (grad_BLE[0, 6:] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_under_autocast_everything_runs_in_float32(dtype: torch.dtype):
    args = arguments(30)
    expected = selective_scan_ref(*args)
    expected_grads = torch.autograd.grad(expected.sum(), args)
    with torch.autocast("cpu", dtype=dtype):
        found = selective_scan(*args)
        found_grads = torch.autograd.grad(found.sum(), args)  # inside autocast, as careless loops do
        halved = selective_scan(*[x.to(dtype) for x in args])
    assert found.dtype == halved.dtype == torch.float32
    assert relative(found, expected) < TOLERANCE[torch.float32]
    for name, grad, wanted in zip(NAMES, found_grads, expected_grads, strict=True):
        assert relative(grad, wanted.double()) < TOLERANCE[torch.float32], name


def test_slices_and_expanded_arrays_are_taken_as_they_lie():
    u, delta, A, B, C, D = (x.detach() for x in arguments(9))
    wide = torch.cat([B, C], dim=-1)
    B_view, C_view = wide.split(B.shape[-1], dim=-1)
    D_view = D[:1].expand(len(D))
    found = selective_scan(u.transpose(1, 2).contiguous().transpose(1, 2), delta, A, B_view, C_view, D_view)
    assert relative(found, selective_scan_ref(u, delta, A, B, C, D_view)) < TOLERANCE[torch.float32]


def test_large_steps_and_fast_decay_forget_without_nan():
    u, _, A, B, C, D = arguments(40)
    delta = torch.full_like(u, 10.0)
    found = selective_scan(u, delta, 100 * A, B, C, D)
    found.sum().backward()
    assert found.isfinite().all()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in (u, A, B, C, D))


def test_memory_kept_for_the_backward_pass_is_far_below_all_states():
    args = arguments(160, batch=2, inner=64, state=16)
    kept = 0

    def pack(x: Tensor) -> Tensor:
        nonlocal kept
        kept += x.numel()
        return x

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        selective_scan(*args)
    assert kept < 0.5 * 2 * 160 * 64 * 16
