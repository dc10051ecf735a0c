"""Whole networks under `torch.compile`: one graph, the same numbers, and one graph for many lengths."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend

from models.interface import RnaInputs, RnaModel
from models.layers import kernels
from tests.models.cases import TENSOR_CORES, TORCH_ITSELF, Kwargs, batch, build, gradients, loss, outputs

pytestmark = [
    # the compiler makes an instance of Mamba-2's autograd function, of which torch itself warns
    pytest.mark.filterwarnings("ignore:.*should not be instantiated:DeprecationWarning"),
    pytest.mark.filterwarnings(TENSOR_CORES, TORCH_ITSELF),  # each test on a GPU ended with the second one
]

LENGTHS = (33, 40, 47, 61, 64, 70)
#: graphs that these lengths take: Mamba-2 one for each number of chunks of 64
GRAPHS = {
    "drsn/bpp": 1,
    "hyena/bpp": 1,
    "ribonanza_mamba/bpp": 1,
    "ribonanza_mamba/mamba-2": 2,
    "transformer_sepconv/bpp": 1,
}


def small(case: str, *, device: str = "cpu") -> RnaModel:
    """As few blocks as show every kind of them."""
    blocks: Kwargs = {"pattern": "MA"} if case == "ribonanza_mamba/bpp" else {}
    return build(case, depth=2 if blocks else 1, dropout=0.0, device=device, **blocks)


@pytest.fixture(autouse=True)
def forgotten():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_networks_are_imported_without_the_compiler():
    """It took 1.3 s of every command that loads one."""
    code = "import models, sys; print('models.layers.kernels' in sys.modules, 'torch._dynamo' in sys.modules)"
    root = Path(__file__).parents[2]
    told = subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, check=True).stdout
    assert told == "True False\n"


@pytest.mark.parametrize(("case", "graphs"), GRAPHS.items())
def test_lengths_share_a_graph_and_outputs_are_those_of_the_network(case: str, graphs: int):
    """Every length had a graph of its own in all networks but drsn."""
    counter = CompileCounterWithBackend("eager")
    model = small(case).eval()
    compiled: Any = torch.compile(model, dynamic=True, fullgraph=True, backend=counter)
    with torch.no_grad():
        for length in LENGTHS:
            inputs = batch([length, length - 7])
            for name, x in outputs(model, inputs).items():
                torch.testing.assert_close(outputs(compiled, inputs)[name], x, rtol=0, atol=0)
    assert counter.frame_count == graphs


@pytest.mark.parametrize("case", GRAPHS)
def test_the_gradients_of_a_graph_are_those_of_the_network(case: str):
    """Torch 2.11 gave Mamba-2's decays a gradient of zero, and said nothing."""
    scan = kernels.choose("selective_scan", torch.device("cpu"))
    if case == "ribonanza_mamba/bpp" and scan.path == "reference":
        pytest.skip(f"a scan in plain PyTorch is no graph: {scan.reason}")
    check_gradients(small(case), batch([33, 20]), backend="aot_eager", tolerance=1e-4)


@pytest.mark.gpu
@pytest.mark.parametrize("case", GRAPHS)
def test_on_a_gpu_compiled_kernels_give_the_gradients_of_the_network(case: str):
    device = torch.device("cuda")
    theirs = {kernels.path(name, device) for name in ("selective_scan", "causal_conv1d")} & {
        "mamba-ssm",
        "causal-conv1d",
    }
    if theirs and case.startswith("ribonanza_mamba"):
        pytest.skip(f"{theirs} is no operator, at which a graph breaks")
    check_gradients(small(case, device="cuda"), batch([33, 20], device="cuda"), backend="inductor", tolerance=1e-4)


def check_gradients(model: RnaModel, inputs: RnaInputs, *, backend: str, tolerance: float) -> None:
    """Compare the compiled network's gradients, relative to the largest of each parameter."""
    compiled: Any = torch.compile(model, fullgraph=True, backend=backend)
    found: list[dict[str, Tensor | None]] = []
    for one in (compiled, model):
        model.zero_grad(set_to_none=True)
        loss(one, inputs).backward()
        found.append(gradients(model))
    for name, expected in found[1].items():
        grad = found[0][name]
        assert grad is not None
        assert expected is not None
        torch.testing.assert_close(
            grad,
            expected,
            rtol=0,
            atol=tolerance * expected.abs().max().item(),
            msg=lambda text, name=name: f"{name}: {text}",
        )
