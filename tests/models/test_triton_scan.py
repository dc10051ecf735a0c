"""The Triton scan against its definition: on a GPU, and in Triton's interpreter where triton is installed."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor, library

from models.layers.selective_scan import selective_scan_ref
from tests.models.cases import TENSOR_CORES, TORCH_ITSELF
from tests.models.test_selective_scan import NAMES, arguments, relative

ROOT = Path(__file__).resolve().parents[2]
#: batch, length, channels, states: whole and broken tiles of 16 positions and blocks of 32 channels, groups of tiles
SMALL = [(2, 1, 5, 4), (2, 16, 35, 8), (1, 37, 33, 5), (2, 120, 33, 2), (1, 20, 5, 64)]
LARGE = [(3, 177, 100, 16), (64, 177, 512, 16), (2, 4099, 48, 16), (1, 70, 64, 128), (2, 300, 40, 4)]
LARGE += [(65_600, 2, 40, 2)]  # more sequences than the second and third axis of a grid have places


def scan(*args: Tensor, reverse: bool) -> Tensor:
    from models.layers import triton_scan  # noqa: F401  registers the operator

    return torch.ops.rna_scan_triton.forward(*(x.contiguous() for x in args), reverse)[0]


def differences(shape: tuple[int, ...], *, device: str, dtype: torch.dtype, reverse: bool) -> dict[str, float]:
    """Largest relative difference of the output and of each gradient; the definition runs in float64 beside it."""
    batch, length, inner, state = shape
    values = [x.detach().to(dtype) for x in arguments(length, batch=batch, inner=inner, state=state)]
    results = []
    for run in (scan, selective_scan_ref):
        args = [x.to(device).requires_grad_() for x in values]
        y = run(*args, reverse=reverse)
        weight = torch.linspace(-1, 1, y.numel(), dtype=torch.float64).view_as(y).to(y)
        results.append([y.detach(), *torch.autograd.grad(y, args, weight)])
    return {name: relative(found, wanted.double()) for name, found, wanted in zip(("y", *NAMES), *results, strict=True)}


def interpreter_is_missing() -> str:
    """Why Triton's interpreter cannot run here; "" where it can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed"
    numpy = tuple(map(int, importlib.import_module("numpy").__version__.split(".")[:2]))
    return "Triton's interpreter takes numpy's arrays of one number for numbers; numpy 2.4 does not" * (numpy >= (2, 4))


@pytest.mark.slow
@pytest.mark.skipif(bool(interpreter_is_missing()), reason=interpreter_is_missing())
def test_in_the_interpreter_outputs_and_all_gradients_equal_the_definition():
    """In a process of its own: Triton reads the variable when it is imported."""
    variables = {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, __file__], env=os.environ | variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def check_in_the_interpreter() -> None:
    for shape in SMALL:
        for reverse in (False, True):
            found = differences(shape, device="cpu", dtype=torch.float32, reverse=reverse)
            assert max(found.values()) < 1e-5, (shape, reverse, found)
    halves = differences((1, 33, 40, 4), device="cpu", dtype=torch.float16, reverse=True)
    assert halves["y"] < 1e-5, halves
    assert max(halves.values()) < 1e-3, halves  # gradients are rounded to float16
    empty = scan(*(x.detach() for x in arguments(0, batch=2)), reverse=False)
    assert empty.shape == (2, 0, 6)
    library.opcheck(torch.ops.rna_scan_triton.forward.default, (*arguments(20, batch=1, inner=5, state=3), False))


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("capability", [75, 80, 90])
def test_every_kernel_compiles_for_gpus_from_turing_on_without_shared_memory(capability):
    """Compiling needs no GPU. Half of the inputs are bfloat16, in which Turing cannot calculate."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from models.layers import triton_scan

    flags, counts = {"adjoint", "reverse"}, {"L", "E", "N", "tiles", "per_group", "groups", "stride", "batch_stride"}
    for name in ("_forward_kernel", "_ends_kernel", "_chain_kernel", "_backward_kernel"):
        kernel = getattr(triton_scan, name)
        kinds = {
            arg: "i32" if arg in counts else "*bf16" if arg in ("u", "du") else "*fp32" for arg in kernel.arg_names
        }
        signature = {arg: "constexpr" if arg in flags else kind for arg, kind in kinds.items()}
        constants = {(place,): True for place, arg in enumerate(kernel.arg_names) if arg in flags}
        source = ASTSource(fn=kernel, signature=signature, constexprs=constants)
        built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=triton_scan._LAUNCH)
        assert built.metadata.shared == 0, name


@pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="triton is not installed")
@pytest.mark.parametrize("shape", [(65_600, 2, 40), (1, 1_000_000, 40)], ids=str)
def test_no_axis_of_a_grid_but_the_first_outgrows_what_a_gpu_takes(shape):
    """Sequences were the third, so that CUDA would have refused to launch 65,536 of them."""
    from models.layers import triton_scan

    (_, *others), _, _ = triton_scan._shares(torch.empty(shape, device="meta"))
    assert max(others) <= 65_535


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [*SMALL, *LARGE], ids=str)
@pytest.mark.parametrize("reverse", [False, True])
def test_on_a_gpu_outputs_and_all_gradients_equal_the_definition(shape, reverse):
    found = differences(shape, device="cuda", dtype=torch.float32, reverse=reverse)
    assert max(found.values()) < 2e-5, found


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_on_a_gpu_half_precision_is_rounded_only_on_the_way_in_and_out(dtype):
    found = differences((2, 177, 100, 16), device="cuda", dtype=dtype, reverse=False)
    assert found["y"] < 2e-5, found
    assert max(found.values()) < (1e-3 if dtype == torch.float16 else 1e-2), found


@pytest.mark.gpu
@pytest.mark.parametrize("shape", [(64, 177, 512, 16), (1, 4099, 64, 16)], ids=["one group", "many groups"])
def test_on_a_gpu_the_same_input_gives_the_same_bits(shape):
    batch, length, inner, state = shape
    args = [x.detach().cuda().requires_grad_() for x in arguments(length, batch=batch, inner=inner, state=state)]
    first, second = (
        [y, *torch.autograd.grad(y.square().sum(), args)] for y in (scan(*args, reverse=False) for _ in range(2))
    )
    assert all(map(torch.equal, first, second))


@pytest.mark.gpu
@pytest.mark.filterwarnings(TENSOR_CORES, TORCH_ITSELF)
def test_on_a_gpu_it_compiles_into_one_graph_and_keeps_the_rules_of_operators():
    args = [x.detach().cuda().requires_grad_() for x in arguments(70, inner=40, state=16)]
    library.opcheck(torch.ops.rna_scan_triton.forward.default, (*args, True))
    compiled = torch.compile(lambda *args: scan(*args, reverse=False) * 2, fullgraph=True)
    torch.testing.assert_close(compiled(*args), scan(*args, reverse=False) * 2)


@pytest.mark.gpu
def test_on_a_gpu_memory_kept_is_a_small_part_of_all_states():
    batch, length, inner, state = 4, 4096, 256, 16
    args = [x.detach().cuda().requires_grad_() for x in arguments(length, batch=batch, inner=inner, state=state)]
    scan(*args, reverse=False).sum().backward()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    scan(*args, reverse=False).sum().backward()
    assert torch.cuda.max_memory_allocated() - before < 0.5 * batch * length * inner * state * 4


if __name__ == "__main__":
    check_in_the_interpreter()
