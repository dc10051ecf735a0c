"""What holds on a pretended GPU (`tests.models.pretended_gpu`); `tests/models/test_pretended_gpu.py` runs it."""

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.interface import RnaInputs, RnaOutputs
from models.layers import kernels
from models.layers.causal_conv import conv1d
from models.layers.ssd import ssd
from pipeline import inference
from pipeline.batch import RnaBatch
from pipeline.training.precision import choose_device, choose_precision
from tests.models import pretended_gpu
from tests.models.cases import CASES, batch, build, outputs
from tests.models.test_ssd import arguments
from tests.pipeline.test_training_gpu import LOSSES, loss_and_gradient

#: of every kind of part one; presets are made of these
WAITLESS = [case for case in CASES if "gru" not in case and not case.endswith(".toml")]


def total(found: dict[str, Tensor]) -> Tensor:
    return torch.stack([(x / 10).square().mean() for x in found.values()]).sum()


def test_tensors_on_different_devices_do_not_meet():
    one = torch.ones(3)
    with pytest.raises(RuntimeError, match="Expected all tensors to be on the same device"):
        one.to("cuda") + one
    assert (one.to("cuda") + one[0]).device == torch.device("cuda:0")


def test_what_waits_is_written_down():
    one = torch.ones(3, device="cuda")
    assert not pretended_gpu.waits
    assert one.sum().item() == 3
    one[one > 0].cpu()
    torch.ones(3).to("cuda", non_blocking=True)
    torch.ones(3).to("cuda")
    names = [wait.split(" ")[0].split(".")[1] for wait in pretended_gpu.waits]
    assert names == ["_local_scalar_dense", "index", "_to_copy", "_to_copy"]


@pytest.mark.parametrize("case", WAITLESS)
def test_no_network_makes_the_program_wait(case: str):
    """Hyena copied three numbers from the CPU in every block, and waited for the device each time."""
    model, inputs = build(case, device="cuda"), batch([12, 7], pad=3, device="cuda")
    pretended_gpu.waits.clear()
    with torch.autocast("cuda", dtype=torch.float16):
        found = outputs(model, inputs)
    total(found).backward()
    assert pretended_gpu.waits == []
    assert {x.device.type for x in found.values()} == {"cuda"}
    assert all(p.grad is not None and p.grad.dtype == torch.float32 for p in model.parameters())


@pytest.mark.parametrize("kind", LOSSES)
def test_no_loss_of_values_or_labels_makes_the_program_wait(kind: str):
    """Weights of targets were made on the device out of a list, which waits for it."""
    loss_and_gradient(kind, "cuda")
    assert pretended_gpu.waits == []


@pytest.mark.parametrize("case", [case for case in CASES if case.endswith(("/all-heads", "drsn/gru", "/mamba-2"))])
def test_numbers_are_those_of_the_cpu(case: str):
    """Half of the branches on a device's kind are those for a GPU."""
    model, inputs = build(case, dropout=0.0), batch([12, 7], pad=3)
    expected = outputs(model, inputs)
    wanted = torch.autograd.grad(total(expected), list(model.parameters()))
    found = outputs(model.to("cuda"), type(inputs)(*(x.to("cuda") for x in inputs)))
    grads = torch.autograd.grad(total(found), list(model.parameters()))
    for name, x in expected.items():
        torch.testing.assert_close(found[name].cpu(), x, rtol=1e-4, atol=1e-4)
    for grad, other in zip(grads, wanted, strict=True):
        torch.testing.assert_close(grad.cpu(), other, rtol=1e-3, atol=1e-5)


def test_convolutions_too_large_for_pytorchs_own_kernel_go_to_cudnn(monkeypatch: pytest.MonkeyPatch):
    """They were handed to it, which asks for canUse32BitIndexMath(input) and ends there."""
    convolve, seen = F.conv2d, list[bool]()

    def watched(image: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        seen.append(image.is_contiguous())
        return convolve(image, *args, **kwargs)

    monkeypatch.setattr(F, "conv2d", watched)
    monkeypatch.setattr(kernels, "ADDRESSED", 2 * 2 * 9 * 6)
    weight_D1K = torch.randn(6, 1, 3, device="cuda")
    for length in (9, 10):
        x_BLD = torch.randn(2, length, 6, device="cuda")
        expected = conv1d(x_BLD.cpu(), weight_D1K.cpu(), None, padding=1)
        torch.testing.assert_close(conv1d(x_BLD, weight_D1K, None, padding=1).cpu(), expected)
    assert seen == [False, True, False, False]  # every second one is the CPU's


@pytest.mark.parametrize("reverse", [False, True])
def test_mamba_2_runs_under_deterministic_algorithms(reverse: bool):
    """ "cumsum_cuda_kernel does not have a deterministic implementation"."""
    args = arguments(70, heads=2, channels=3, state=5)
    moved = [x.detach().to("cuda").requires_grad_() for x in args]
    torch.use_deterministic_algorithms(True)
    try:
        found = ssd(*moved, reverse=reverse, chunk=16)
        grads = torch.autograd.grad(found.square().sum(), moved)
    finally:
        torch.use_deterministic_algorithms(False)
    expected = ssd(*args, reverse=reverse, chunk=16)
    torch.testing.assert_close(found.cpu(), expected)
    for grad, other in zip(grads, torch.autograd.grad(expected.square().sum(), args), strict=True):
        torch.testing.assert_close(grad.cpu(), other, rtol=1e-5, atol=1e-4)


def test_predictions_wait_once_for_all_sequences_of_a_batch(monkeypatch: pytest.MonkeyPatch):
    """Each of some 370 of a batch had a copy of its own, in both directions."""
    tokens_BL = torch.arange(15).view(3, 5)
    batch = RnaBatch((), RnaInputs(tokens_BL, tokens_BL >= 0))
    monkeypatch.setattr(inference, "make_batch", lambda *_, **__: batch)
    examples = SimpleNamespace(lengths=np.array([3, 4, 5]))
    job: Any = SimpleNamespace(examples=examples, config=SimpleNamespace(data=SimpleNamespace(flip=0.5)))

    def network(inputs: RnaInputs) -> RnaOutputs:
        return RnaOutputs(values_BLC=inputs.tokens_BL.unsqueeze(-1))

    how: dict[str, Any] = {"pick": lambda outputs, b, length: outputs.values_BLC[b, :length, 0].numpy()}
    device = torch.device("cuda")
    found = inference.both_ways(job, network, device, np.arange(3), turn=lambda one: one[::-1], **how)
    assert [one.tolist() for one in found] == [[1, 1, 1], [6.5, 6.5, 6.5, 6.5], [12, 12, 12, 12, 12]]
    assert len(pretended_gpu.waits) == 2


def test_float32_means_float32():
    """Predictions of convolutions were rounded to 10 bits on a GPU, though they promise 1e-6."""
    torch.backends.cudnn.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    assert choose_precision("auto", choose_device()).name == "bf16"
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32
