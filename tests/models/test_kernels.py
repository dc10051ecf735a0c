"""The choice of kernels: only what has proved itself is used, the reason is said, and weights do not depend on it."""

import logging
import sys
import warnings
from types import ModuleType

import pytest
import torch
from torch import Tensor, nn

from models.layers import kernels
from models.layers.causal_conv import OPERATOR as CONVOLUTION
from models.layers.causal_conv import causal_conv_ref
from models.layers.checkpointing import run_blocks
from models.layers.long_conv import OPERATOR as LONG_CONVOLUTION
from models.layers.mamba import BidirectionalMamba
from models.layers.selective_scan import OPERATOR as SCAN
from models.layers.selective_scan import selective_scan_ref

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def found_out_anew(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("RNA_KERNELS", "auto")
    kernels._choose.cache_clear()
    yield
    kernels._choose.cache_clear()


def absent() -> str:
    raise ModuleNotFoundError("No module named 'fast'")


def shifted(*args: Tensor, reverse: bool) -> Tensor:
    return causal_conv_ref(*args, reverse=reverse).float() + 1e-2


def one_sided(*args: Tensor, reverse: bool) -> Tensor:
    return causal_conv_ref(*args).float()


def forgets_the_bias(x: Tensor, weight: Tensor, bias: Tensor, *, reverse: bool) -> Tensor:
    """Right output, wrong gradient."""
    return causal_conv_ref(x, weight, bias.detach() + 0 * bias, reverse=reverse).float()


def not_a_number(*args: Tensor, reverse: bool) -> Tensor:
    return causal_conv_ref(*args, reverse=reverse).float() * float("nan")


def right(*args: Tensor, reverse: bool) -> Tensor:
    return causal_conv_ref(*args, reverse=reverse).float()


def their_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """mamba-ssm's ``selective_scan_fn``: u and delta [B, E, L], B and C [B, N, L], forwards."""
    turned = (x.transpose(1, 2) for x in (u, delta, B, C))
    u, delta, B, C = turned
    return selective_scan_ref(u, delta, A, B, C, D).transpose(1, 2).float()


def their_convolution(x: Tensor, weight: Tensor, bias: Tensor, activation: None = None) -> Tensor:
    """causal-conv1d's ``causal_conv1d_fn``: x [B, D, L], which may lie as [B, L, D] if D is a multiple of 8."""
    assert x.stride(1) == 1 or x.is_contiguous()
    return causal_conv_ref(x.transpose(1, 2), weight, bias).transpose(1, 2).to(x.dtype)


def choose_among(**candidates: kernels.Kernel) -> kernels.Choice:
    return kernels._first_usable(CONVOLUTION._replace(kernels=candidates), CPU, deterministic=False)


@pytest.mark.parametrize(
    ("run", "reason"),
    [
        (shifted, r"differs from the definition by .* in output \(reverse=False\)"),
        (one_sided, r"in output \(reverse=True\)"),
        (forgets_the_bias, r"differs from the definition by 1.0e\+00 in bias"),
        (not_a_number, r"by nan in output"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_a_kernel_that_gives_other_numbers_is_not_used(run, reason):
    bad, good = kernels.Kernel("cpu", lambda: "installed", run), kernels.Kernel("cpu", lambda: "the good one", right)
    choice = choose_among(bad=bad, good=good)
    assert choice.path == "good"
    assert choice.reason.startswith("the good one; not bad: ")
    with pytest.raises(RuntimeError, match=reason):
        kernels._check(bad, CONVOLUTION, CPU)


def test_what_cannot_be_loaded_or_is_for_another_device_leaves_plain_pytorch():
    gone, other = kernels.Kernel("cpu", absent, right), kernels.Kernel("cuda", lambda: "for a GPU", right)
    choice = choose_among(gone=gone, other=other)
    assert choice == ("reference", "plain PyTorch; gone: No module named 'fast'")
    assert choose_among(other=other).reason == "plain PyTorch; there is no kernel for cpu"


def test_a_package_that_warns_when_it_is_imported_is_used_all_the_same():
    """Triton 3.9 warns of a default at every first launch; where warnings are errors nothing but the reference ran."""

    def load() -> str:
        warnings.warn("deprecated", UserWarning, stacklevel=1)
        return "noisy"

    assert choose_among(noisy=kernels.Kernel("cpu", load, right)).path == "noisy"


def test_where_deterministic_algorithms_are_asked_for_sums_by_atomics_are_not_used():
    kernel = kernels.Kernel("cpu", lambda: "fast", right, repeatable=False)
    operator = CONVOLUTION._replace(kernels={"fast": kernel})
    assert kernels._first_usable(operator, CPU, deterministic=False).path == "fast"
    refused = kernels._first_usable(operator, CPU, deterministic=True)
    assert refused.path == "reference"
    assert "deterministic algorithms" in refused.reason
    assert not SCAN.kernels["mamba-ssm"].repeatable
    assert SCAN.kernels["triton"].repeatable


def test_the_packages_functions_are_called_in_their_layout_and_in_both_directions(monkeypatch):
    """Stand-ins with the packages' signatures, which run on the CPU."""
    scan, convolution = ModuleType("mamba_ssm.ops.selective_scan_interface"), ModuleType("causal_conv1d")
    scan.selective_scan_fn, convolution.causal_conv1d_fn = their_scan, their_convolution
    monkeypatch.setitem(sys.modules, scan.__name__, scan)
    monkeypatch.setitem(sys.modules, convolution.__name__, convolution)
    kernels._check(SCAN.kernels["mamba-ssm"], SCAN, CPU)
    kernels._check(CONVOLUTION.kernels["causal-conv1d"], CONVOLUTION, CPU)


@pytest.mark.parametrize("reverse", [False, True])
def test_a_kernel_with_32_bit_offsets_gets_no_more_than_it_can_address(reverse, monkeypatch, caplog):
    """mamba-ssm and causal-conv1d wrap around at 2**32 numbers of a batch, without a word."""
    scan, convolution = ModuleType("mamba_ssm.ops.selective_scan_interface"), ModuleType("causal_conv1d")
    seen: list[int] = []
    kernels._tell_parts.cache_clear()

    def noted(run):
        return lambda x, *rest: (seen.append(len(x)), run(x, *rest))[1]

    scan.selective_scan_fn, convolution.causal_conv1d_fn = noted(their_scan), noted(their_convolution)
    monkeypatch.setitem(sys.modules, scan.__name__, scan)
    monkeypatch.setitem(sys.modules, convolution.__name__, convolution)
    rng = torch.Generator().manual_seed(0)
    shapes = ((7, 9, 8), (7, 9, 8), (8, 3), (7, 9, 3), (7, 9, 3), (8,))
    x, delta, A, B, C, D = (torch.rand(*shape, generator=rng) for shape in shapes)
    calls = {
        "mamba-ssm": (SCAN, (x, delta, -A, B, C, D)),
        "causal-conv1d": (CONVOLUTION, (x, torch.rand(8, 4, generator=rng), D)),
    }
    with caplog.at_level(logging.INFO, logger="models.kernels"):
        for name, (operator, args) in calls.items():
            run = operator.kernels[name].run
            whole = run(*args, reverse=reverse)
            monkeypatch.setattr(kernels, "ADDRESSED", 3 * 9 * 8 + 5)
            torch.testing.assert_close(run(*args, reverse=reverse), whole, rtol=0, atol=0)
            monkeypatch.setattr(kernels, "ADDRESSED", 71)
            with pytest.raises(ValueError, match=r"a sequence of 72 numbers; the kernel addresses 71\. Next: RNA_"):
                run(*args, reverse=reverse)
            monkeypatch.setattr(kernels, "ADDRESSED", 2**31)
    assert seen == [7, 3, 3, 1] * 2
    assert [record.getMessage() for record in caplog.records] == [
        "3 sequences at a time: the kernel's offsets have 32 bits"
    ]


def test_the_states_that_mamba_ssm_keeps_count_as_well(monkeypatch):
    """Many states of short sequences are more numbers than the input has."""
    sizes: list[int] = []
    scan = ModuleType("mamba_ssm.ops.selective_scan_interface")
    scan.selective_scan_fn = None
    monkeypatch.setitem(sys.modules, scan.__name__, scan)
    monkeypatch.setattr(kernels, "over_batch", lambda *_, size: sizes.append(size))
    for length, states in ((100, 16), (100, 256), (4097, 256)):
        rows = [torch.empty(2, length, width, device="meta") for width in (64, 64, states, states)]
        A_EN = torch.empty(64, states, device="meta")
        SCAN.kernels["mamba-ssm"].run(*rows[:2], A_EN, *rows[2:], A_EN[:, 0], reverse=False)
    assert sizes == [64 * 100, 64 * 2 * 256, 64 * 4097]


def test_the_choice_is_logged_once(caplog):
    with caplog.at_level(logging.INFO, logger="models.kernels"):
        first = kernels.choose("selective_scan", CPU)
        assert kernels.choose("selective_scan", CPU) == first
    assert [record.getMessage() for record in caplog.records] == [
        f"selective_scan on cpu: {first.path} ({first.reason})"
    ]


def test_a_device_with_two_names_is_found_out_about_once(caplog, monkeypatch):
    """ "cuda" and "cuda:0" were two, so that everything was compiled, compared and logged twice."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 1)
    monkeypatch.setattr(kernels, "_first_usable", lambda *_, **__: kernels.Choice("triton", "a stand-in"))
    with caplog.at_level(logging.INFO, logger="models.kernels"):
        for names in (("cuda", "cuda:1"), ("cpu:0", "cpu"), ("cuda:0", "cuda:0")):
            one, other = (kernels.choose("selective_scan", torch.device(name)) for name in names)
            assert one is other
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        f"selective_scan on {name}" for name in ("cuda", "cpu", "cuda")
    ]


def test_the_reference_can_be_forced_and_released(monkeypatch):
    monkeypatch.setenv("RNA_KERNELS", "reference")
    assert kernels.choose("selective_scan", CPU) == (
        "reference",
        "RNA_KERNELS=reference asks for plain PyTorch",
    )
    monkeypatch.setenv("RNA_KERNELS", "auto")
    assert "asks for" not in kernels.choose("selective_scan", CPU).reason


def test_an_unknown_mode_is_refused_in_one_sentence(monkeypatch):
    monkeypatch.setenv("RNA_KERNELS", "fast")
    with pytest.raises(ValueError, match=r"RNA_KERNELS='fast': expected auto or reference\. Next: unset it"):
        kernels.choose("selective_scan", CPU)


def test_a_network_says_what_its_operators_run_on():
    said = kernels.describe(BidirectionalMamba(8, state=4, expand=2, tie_directions=True), CPU)
    convolution, scan = said.split("; selective_scan: ")
    assert convolution == "causal_conv1d: reference (plain PyTorch; there is no kernel for cpu)"
    assert scan.startswith(kernels.choose("selective_scan", CPU).path)
    assert kernels.describe(nn.Linear(2, 2), CPU) == ""


def test_a_scan_in_plain_pytorch_on_a_gpu_is_warned_of_unless_it_was_asked_for(monkeypatch):
    layer, cuda = BidirectionalMamba(8, state=4, expand=2, tie_directions=True), torch.device("cuda")
    choice = kernels.Choice("reference", "plain PyTorch; triton: Failed to find C compiler")
    monkeypatch.setattr(kernels, "choose", lambda *_: choice)
    assert "Next: install a C compiler" in kernels.slow(layer, cuda)
    assert kernels.slow(nn.Linear(2, 2), cuda) == kernels.slow(layer, CPU) == ""
    monkeypatch.setenv("RNA_KERNELS", "reference")
    assert kernels.slow(layer, cuda) == ""
    monkeypatch.delenv("RNA_KERNELS")
    choice = kernels.Choice("triton", "triton 3.6.0")
    assert kernels.slow(layer, cuda) == ""


def test_the_examples_reach_every_gradient():
    """A gradient that is zero in the example would be checked against nothing."""
    for operator in (SCAN, CONVOLUTION, LONG_CONVOLUTION):
        grads = kernels._output_and_gradients(operator.reference, operator.example(), CPU, operator.options[0])
        assert all(float(grad.abs().max()) > 0.1 for grad in grads)


def test_weights_trained_with_kernels_predict_the_same_without(monkeypatch):
    torch.manual_seed(0)
    layer, twin = (BidirectionalMamba(24, state=16, expand=2, tie_directions=False) for _ in range(2))
    x_BLD, mask_BL = torch.randn(2, 70, 24), torch.arange(70) < torch.tensor([[70], [41]])
    layer(x_BLD, mask_BL).square().mean().backward()
    torch.optim.SGD(layer.parameters(), lr=0.1).step()
    twin.load_state_dict(layer.state_dict())
    with torch.no_grad():
        fast = layer(x_BLD, mask_BL)
        monkeypatch.setenv("RNA_KERNELS", "reference")
        torch.testing.assert_close(twin(x_BLD, mask_BL), fast, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("operator", ["selective_scan", "causal_conv1d"])
def test_a_compiled_graph_takes_the_choice_as_a_constant(operator):
    graph = torch.compile(
        lambda x: x + (kernels.path(operator, x.device) == "reference"), fullgraph=True, backend="aot_eager"
    )
    expected = kernels.choose(operator, CPU).path == "reference"
    assert torch.equal(graph(torch.zeros(1)), torch.full((1,), float(expected)))


@pytest.mark.gpu
@pytest.mark.parametrize("operator", [SCAN, CONVOLUTION], ids=["selective_scan", "causal_conv1d"])
def test_on_a_gpu_every_kernel_that_can_be_loaded_gives_the_definitions_numbers(operator):
    checked = 0
    for kernel in operator.kernels.values():
        try:
            kernel.load()
        except Exception:  # not installed, or not for this GPU
            continue
        if kernel.device == "cuda":
            kernels._check(kernel, operator, torch.device("cuda"))
            checked += 1
    if not checked:
        pytest.skip("no kernel for a GPU is installed")


@pytest.mark.gpu
def test_on_a_gpu_the_current_device_is_one_with_and_without_its_number():
    number = torch.cuda.current_device()
    one, other = (kernels.choose("selective_scan", torch.device(name)) for name in ("cuda", f"cuda:{number}"))
    assert one is other


def test_the_first_choice_may_fall_within_gradient_checkpointing():
    """ "A different number of tensors was saved during the original forward and recomputation"."""
    torch.manual_seed(0)
    layer = BidirectionalMamba(8, state=4, expand=2, tie_directions=False)
    x_BLD, mask_BL = torch.randn(1, 9, 8, requires_grad=True), torch.ones(1, 9, dtype=torch.bool)
    grads = [torch.autograd.grad(run_blocks([layer], x_BLD, mask_BL, every=k).sum(), x_BLD)[0] for k in (1, 0)]
    torch.testing.assert_close(grads[0], grads[1], rtol=0, atol=0)
