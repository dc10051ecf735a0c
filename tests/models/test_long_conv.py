"""The Fourier convolution against the sum itself, on each of its paths."""

import pytest
import torch
from torch import Tensor, library
from torch.utils.checkpoint import checkpoint

from models.layers import long_conv
from models.layers.long_conv import fft_conv, fft_conv_ref

PATHS = ["plain", "ring", "rows-and-columns"]


@pytest.fixture(params=PATHS)
def path(request, monkeypatch: pytest.MonkeyPatch) -> str:
    """Small inputs go the way of long ones, in blocks and parts that do not divide the width."""
    if request.param != "plain":
        monkeypatch.setitem(long_conv._PLAIN_POINTS, "cpu", 0)
        monkeypatch.setattr(long_conv, "_LANES", 2)
        monkeypatch.setitem(long_conv._BLOCK_POINTS, "cpu", 1)
        monkeypatch.setattr(long_conv, "_SPLIT_POINTS", 8 if request.param == "rows-and-columns" else 1 << 30)
    return request.param


def arguments(length: int, *, both: bool, dtype: torch.dtype, width: int = 3):
    torch.manual_seed(length)
    u, after, before, skip = (
        torch.randn(*shape, dtype=dtype).requires_grad_()
        for shape in ((2, length, width), (width, length), (width, length), (width,))
    )
    return [u, after, before if both else None, skip]


def gradients(found: Tensor, args: list[Tensor | None], weight: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(found, [x for x in args if x is not None], weight.to(found.dtype))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float64, 1e-12), (torch.float32, 1e-5)])
@pytest.mark.parametrize("both", [False, True], ids=["causal", "both-sides"])
@pytest.mark.parametrize("length", [1, 2, 31, 64, 100])
def test_outputs_and_all_gradients_equal_the_sum(path, length: int, both: bool, dtype: torch.dtype, tolerance: float):
    args = arguments(length, both=both, dtype=dtype)
    found, expected = fft_conv(*args), fft_conv_ref(*args)
    assert found.dtype == dtype
    assert (found - expected).abs().max() < tolerance * expected.abs().max()
    weight = torch.randn(found.shape, dtype=dtype)
    for grad, wanted in zip(gradients(found, args, weight), gradients(expected, args, weight), strict=True):
        assert (grad - wanted).abs().max() <= tolerance * wanted.abs().max()


@pytest.mark.parametrize("both", [False, True], ids=["causal", "both-sides"])
def test_gradients_equal_finite_differences(path, both: bool):
    args = arguments(11, both=both, dtype=torch.float64)
    assert torch.autograd.gradcheck(fft_conv, args)


def test_a_second_derivative_is_refused(path):
    args = arguments(11, both=True, dtype=torch.float64)
    found = torch.autograd.grad(fft_conv(*args).square().sum(), args, create_graph=True)
    with pytest.raises(RuntimeError, match=r"autograd|differentiate twice"):
        found[0].sum().backward()


def test_the_kernel_over_what_comes_after_is_not_used_at_lag_zero(path):
    args = arguments(16, both=True, dtype=torch.float64)
    grad_DL = gradients(fft_conv(*args), args, torch.ones(2, 16, 3))[2]
    assert grad_DL[:, 0].abs().max() < 1e-12
    assert (grad_DL[:, 1:].abs() > 1e-6).all()


@pytest.mark.parametrize("both", [False, True], ids=["causal", "both-sides"])
def test_a_change_is_felt_afterwards_only_or_everywhere(path, both: bool):
    u, after, before, skip = (None if x is None else x.detach() for x in arguments(50, both=both, dtype=torch.float64))
    changed = u.clone()
    changed[:, 20] += 1
    felt_L = (fft_conv(changed, after, before, skip) - fft_conv(u, after, before, skip)).abs().amin(dim=(0, 2))
    most_L = (fft_conv(changed, after, before, skip) - fft_conv(u, after, before, skip)).abs().amax(dim=(0, 2))
    assert (felt_L[20:] > 1e-6).all()
    assert (felt_L[:20] > 1e-6).all() if both else (most_L[:20] < 1e-13).all()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_half_precision_input_is_convolved_in_float32(path, dtype: torch.dtype):
    u, after, before, skip = (x.detach() for x in arguments(200, both=True, dtype=torch.float32))
    u = (100 * u.abs()).to(dtype)  # its mean alone would overflow a half-precision transform
    with torch.autocast("cpu", dtype=dtype):
        found = fft_conv(u, after, before, skip)
    expected = fft_conv_ref(u, after, before, skip)
    assert found.dtype == torch.float32
    assert (found - expected).abs().max() < 1e-5 * expected.abs().max()


def test_inputs_laid_out_by_time_or_by_channel_give_the_same(path):
    u, after, before, skip = arguments(100, both=True, dtype=torch.float32)
    turned = [x.detach().mT.contiguous().mT for x in (u, after, before)]
    assert torch.equal(fft_conv(u, after, before, skip), fft_conv(*turned, skip))


def test_it_is_deterministic_and_survives_gradient_checkpointing(path):
    args = arguments(100, both=True, dtype=torch.float32)
    weight = torch.randn(2, 100, 1).expand(2, 100, 3)
    runs = [fft_conv(*args), fft_conv(*args), checkpoint(fft_conv, *args, use_reentrant=False)]
    assert all(torch.equal(runs[0], other) for other in runs[1:])
    first, *others = [gradients(run, args, weight) for run in runs]
    assert all(torch.equal(a, b) for other in others for a, b in zip(first, other, strict=True))


@pytest.mark.parametrize("both", [False, True], ids=["causal", "both-sides"])
def test_the_operator_can_be_traced_and_compiled_whole(path, both: bool):
    args = arguments(40, both=both, dtype=torch.float32)
    for laid_out in (args, [x if x is None else x.detach().mT.contiguous().mT if x.ndim > 1 else x for x in args]):
        library.opcheck(long_conv._long_conv, tuple(laid_out))
    compiled = torch.compile(fft_conv, backend="aot_eager", fullgraph=True)
    weight = torch.randn(2, 40, 3)
    for a, b in zip(gradients(compiled(*args), args, weight), gradients(fft_conv(*args), args, weight), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize(("batch", "length"), [(2, 140_000), (24, 9_000)])
def test_long_inputs_keep_no_spectra_and_are_as_exact_as_the_plain_transform(batch: int, length: int):
    """At the sizes as they ship: the first is taken as rows and columns, the second whole."""
    torch.manual_seed(0)
    args = [torch.randn(shape).requires_grad_() for shape in ((batch, length, 3), (3, length), (3, length), (3,))]
    assert (long_conv._Ring(args[0]).rows > 1) == (length == 140_000)
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        found = fft_conv(*args)
    assert sum(kept) == sum(x.numel() for x in args)
    exact_args = [x.detach().double().requires_grad_() for x in args]
    weight = torch.randn(found.shape)
    exact, plain = long_conv._Plain.apply(*exact_args), long_conv._Plain.apply(*args)
    tensors = [(y, *gradients(y, xs, weight)[:3]) for y, xs in ((found, args), (plain, args), (exact, exact_args))]
    for ours, theirs, wanted in zip(*tensors, strict=True):
        assert (ours - wanted).norm() < 1.1 * (theirs - wanted).norm()


@pytest.mark.gpu
def test_a_million_positions_train_on_one_gpu():
    torch.manual_seed(0)
    length, width = 1_000_000, 256
    args = [
        torch.randn(shape, device="cuda").requires_grad_()
        for shape in ((1, length, width), (width, length), (width, length), (width,))
    ]
    torch.cuda.reset_peak_memory_stats()
    found = fft_conv(*args)
    grads = gradients(found, args, torch.ones_like(found))
    assert all(x.isfinite().all() for x in (found, *grads))
    few = [x.detach()[..., :2] if i in (0, 3) else x.detach()[:2] for i, x in enumerate(args)]
    expected = long_conv._Plain.apply(*few)
    assert (found[..., :2] - expected).abs().max() < 1e-5 * expected.abs().max()
    assert torch.cuda.max_memory_allocated() < 20 * 2**30
