"""The Fourier convolution against the sum itself, on each of its paths."""

import math

import pytest
import torch
from torch import Tensor, library
from torch.utils.checkpoint import checkpoint

from models.layers import extension, kernels, long_conv
from models.layers.long_conv import fft_conv, fft_conv_ref
from tests.models.cases import check_threads_change_no_bit

COMPILED = "compiled" if extension.load("long_conv")[0] else "no compiler"
PATHS = [COMPILED, "plain", "ring"]
WAYS = [
    (path, dtype)
    for path in PATHS
    for dtype in (torch.float32, torch.float64)
    if (path, dtype) != (COMPILED, torch.float64)
]
TOLERANCE = {torch.float64: 1e-12, torch.float32: 1e-5}
needs_compiler = pytest.mark.skipif(COMPILED != "compiled", reason=extension.load("long_conv")[1])


def take(path: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """In plain PyTorch, small inputs go the way of long ones in blocks that do not divide the width."""
    if path == "no compiler":
        pytest.skip(extension.load("long_conv")[1])
    monkeypatch.setenv("RNA_KERNELS", "auto" if path == "compiled" else "reference")
    assert (kernels.path("long_conv", torch.device("cpu")) == "compiled") == (path == "compiled")
    if path == "ring":
        monkeypatch.setitem(long_conv._PLAIN_POINTS, "cpu", 0)
        monkeypatch.setitem(long_conv._BLOCK_POINTS, "cpu", 1 << 9)


@pytest.fixture(params=PATHS)
def path(request, monkeypatch: pytest.MonkeyPatch) -> str:
    take(request.param, monkeypatch)
    return request.param


@pytest.fixture(params=WAYS, ids=lambda way: f"{way[0]}-{way[1]}")
def dtype(request, monkeypatch: pytest.MonkeyPatch) -> torch.dtype:
    """Each path in each precision that it has."""
    take(request.param[0], monkeypatch)
    return request.param[1]


def arguments(length: int, *, both: bool, dtype: torch.dtype, width: int = 3):
    torch.manual_seed(length)
    u, after, before, skip = (
        torch.randn(*shape, dtype=dtype).requires_grad_()
        for shape in ((2, length, width), (width, length), (width, length), (width,))
    )
    return [u, after, before if both else None, skip]


def gradients(found: Tensor, args: list[Tensor | None], weight: Tensor) -> tuple[Tensor, ...]:
    return torch.autograd.grad(found, [x for x in args if x is not None], weight.to(found.dtype))


@pytest.mark.parametrize("both", [False, True], ids=["causal", "both-sides"])
@pytest.mark.parametrize("length", [1, 2, 31, 64, 100])
def test_outputs_and_all_gradients_equal_the_sum(dtype: torch.dtype, length: int, both: bool):
    check_against_the_sum(arguments(length, both=both, dtype=dtype), TOLERANCE[dtype])


def check_against_the_sum(args: list[Tensor | None], tolerance: float) -> None:
    found, expected = fft_conv(*args), fft_conv_ref(*args)
    assert found.dtype == args[0].dtype
    assert (found - expected).abs().max() < tolerance * expected.abs().max()
    weight = torch.randn(found.shape, dtype=found.dtype)
    for grad, wanted in zip(gradients(found, args, weight), gradients(expected, args, weight), strict=True):
        assert (grad - wanted).abs().max() <= tolerance * wanted.abs().max()


def test_a_second_derivative_is_refused(path):
    args = arguments(11, both=True, dtype=torch.float32)
    found = torch.autograd.grad(fft_conv(*args).square().sum(), args, create_graph=True)
    with pytest.raises(RuntimeError, match=r"differentiate twice"):
        found[0].sum().backward()


def test_the_kernel_over_what_comes_after_is_not_used_at_lag_zero(dtype: torch.dtype):
    args = arguments(16, both=True, dtype=dtype)
    grad_DL = gradients(fft_conv(*args), args, torch.ones(2, 16, 3))[2]
    assert grad_DL[:, 0].abs().max() < TOLERANCE[dtype]
    assert (grad_DL[:, 1:].abs() > 1e-3).all()


@pytest.mark.parametrize("both", [False, True], ids=["causal", "both-sides"])
def test_a_change_is_felt_afterwards_only_or_everywhere(dtype: torch.dtype, both: bool):
    u, after, before, skip = (None if x is None else x.detach() for x in arguments(50, both=both, dtype=dtype))
    changed = u.clone()
    changed[:, 20] += 1
    difference_BLD = (fft_conv(changed, after, before, skip) - fft_conv(u, after, before, skip)).abs()
    felt_L, most_L = difference_BLD.amin(dim=(0, 2)), difference_BLD.amax(dim=(0, 2))
    assert (felt_L[20:] > 1e-4).all()
    assert (felt_L[:20] > 1e-4).all() if both else (most_L[:20] < TOLERANCE[dtype]).all()


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
    operator = torch.ops.rna_conv.forward.default if path == "compiled" else long_conv._long_conv
    for laid_out in (args, [x if x is None else x.detach().mT.contiguous().mT if x.ndim > 1 else x for x in args]):
        library.opcheck(operator, tuple(laid_out))
    compiled = torch.compile(fft_conv, backend="aot_eager", fullgraph=True)
    weight = torch.randn(2, 40, 3)
    for a, b in zip(gradients(compiled(*args), args, weight), gradients(fft_conv(*args), args, weight), strict=True):
        assert torch.allclose(a, b, atol=1e-5)


@pytest.mark.parametrize("path", ["ring", COMPILED])
@pytest.mark.parametrize(("batch", "length", "width"), [(3, 5_000, 19), (2, 70_000, 3)])
def test_long_inputs_keep_no_spectra_and_round_as_accurate_transforms_do(path, batch, length, width, monkeypatch):
    """Compiled, the first is taken as 2 rows and the second as 32: an odd number of levels each.

    A transform of accurate factors has an error of about 0.6 eps sqrt(log2 N), of inaccurate ones more by sqrt(N)
    (Schatzman 1996). That of the plain transform is no measure: it is a library's, and another on other processors.
    """
    take(path, monkeypatch)
    shapes = (batch, length, width), (width, length), (width, length), (width,)
    args = [torch.randn(shape).requires_grad_() for shape in shapes]
    kept: list[int] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda x: kept.append(x.numel()) or x, lambda x: x):
        found = fft_conv(*args)
    assert sum(kept) == sum(x.numel() for x in args)
    exact_args = [x.detach().double().requires_grad_() for x in args]
    weight = torch.randn(found.shape)
    exact = long_conv._Plain.apply(*exact_args)
    bound = torch.finfo(torch.float32).eps * math.sqrt(math.log2(2 * long_conv._points(length)))
    tensors = [(y, *gradients(y, xs, weight)[:3]) for y, xs in ((found, args), (exact, exact_args))]
    for ours, wanted in zip(*tensors, strict=True):
        assert (ours - wanted).norm() < bound * wanted.norm()


@needs_compiler
@pytest.mark.parametrize("both", [False, True], ids=["causal", "both-sides"])
@pytest.mark.parametrize("length", [15, 16, 17, 300, 520])
def test_tiles_and_blocks_that_are_not_full_give_the_sum(length: int, both: bool, monkeypatch):
    """300 and 520 positions are transformed by recursion, with an odd and an even number of levels."""
    take("compiled", monkeypatch)
    check_against_the_sum(arguments(length, both=both, dtype=torch.float32, width=37), 1e-5)


@needs_compiler
@pytest.mark.parametrize(("batch", "length", "width"), [(1, 40, 200), (3, 100, 40), (2, 9_000, 20)])
def test_outputs_and_gradients_have_the_same_bits_whatever_the_number_of_threads(batch, length, width, monkeypatch):
    """Threads share out blocks of channels, or the passes over a long one."""
    take("compiled", monkeypatch)
    shapes = (batch, length, width), (width, length), (width, length), (width,)
    check_threads_change_no_bit(fft_conv, [torch.randn(shape).requires_grad_() for shape in shapes])


@needs_compiler
@pytest.mark.parametrize(("batch", "width"), [(0, 3), (2, 0)], ids=["no sequence", "no channel"])
def test_empty_input_gives_empty_output_and_zero_gradients(batch: int, width: int, monkeypatch):
    """Which PyTorch's own transforms refuse."""
    take("compiled", monkeypatch)
    shapes = (batch, 5, width), (width, 5), (width, 5), (width,)
    args = [torch.randn(shape).requires_grad_() for shape in shapes]
    y = fft_conv(*args)
    assert y.shape == (batch, 5, width)
    assert all(not grad.any() for grad in torch.autograd.grad(y.sum(), args))


@needs_compiler
@pytest.mark.parametrize("place", range(4), ids=["u", "after", "before", "skip"])
def test_shapes_and_types_that_do_not_fit_are_refused_and_not_read(place: int):
    args = [x.detach() for x in arguments(20, both=True, dtype=torch.float32)]
    for wrong in (args[place][..., :-1], args[place].double(), args[place].unsqueeze(0)):
        with pytest.raises(RuntimeError, match="long_conv: "):
            torch.ops.rna_conv.forward(*args[:place], wrong, *args[place + 1 :])
    with pytest.raises(RuntimeError, match="long_conv: gradient"):
        torch.ops.rna_conv.backward(args[0][:1], *args)


@needs_compiler
def test_what_is_not_a_number_stays_in_its_own_channel_and_sequence(monkeypatch):
    take("compiled", monkeypatch)
    args = [x.detach() for x in arguments(70, both=True, dtype=torch.float32, width=20)]
    args[0][1, 3, 17] = float("nan")
    spoilt_BD = fft_conv(*args).isnan().any(dim=1)
    assert spoilt_BD.nonzero().tolist() == [[1, 17]]


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
