"""Precision is chosen by what the device really has, and says why."""

import os

import pytest
import torch

from pipeline.errors import ConfigError
from pipeline.training.precision import (
    Precision,
    choose_device,
    choose_precision,
    deterministic_algorithms,
    next_precision,
)

CUDA, CPU = torch.device("cuda"), torch.device("cpu")


@pytest.fixture
def capability(monkeypatch):
    def pretend(major: int, minor: int) -> None:
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda _device=None: (major, minor))

    return pretend


@pytest.mark.parametrize(
    ("card", "expected"), [((9, 0), "bf16"), ((8, 0), "bf16"), ((7, 5), "fp16"), ((7, 0), "fp16"), ((6, 0), "fp32")]
)
def test_auto_follows_the_compute_capability(capability, card, expected):
    capability(*card)
    chosen = choose_precision("auto", CUDA)
    assert chosen.name == expected
    assert f"compute capability {card[0]}.{card[1]}" in chosen.reason


def test_emulated_bf16_is_not_taken_for_bf16(capability):
    capability(7, 5)
    chosen = choose_precision("bf16", CUDA)
    assert chosen == Precision("fp16", "bf16 was asked for, but compute capability 7.5 only emulates it")


def test_the_cpu_computes_in_fp32_unless_asked():
    assert choose_precision("auto", CPU) == Precision("fp32", "auto: no CUDA device (cpu)")
    assert choose_precision("bf16", CPU).name == "bf16"


def test_an_unknown_word_is_refused():
    with pytest.raises(ValueError, match="got 'fp8'; expected auto, bf16, fp16, fp32"):
        choose_precision("fp8", CPU)


@pytest.mark.parametrize(
    ("card", "device", "rungs"),
    [
        ((8, 0), CUDA, ["fp16", "bf16", "fp32", "fp32"]),
        ((7, 5), CUDA, ["fp16", "fp32"]),
        ((8, 0), CPU, ["fp16", "fp32"]),
    ],
)
def test_the_ladder_ends_in_fp32(capability, card, device, rungs):
    capability(*card)
    current, seen = Precision("fp16", ""), ["fp16"]
    for _ in rungs[1:]:
        current = next_precision(current, device)
        seen.append(current.name)
    assert seen == rungs


@pytest.mark.parametrize(
    ("name", "dtype"), [("bf16", torch.bfloat16), ("fp16", torch.float16), ("fp32", torch.float32)]
)
def test_matrix_products_run_in_the_named_precision(name, dtype):
    precision = Precision(name, "")
    x = torch.ones(2, 2)
    with precision.autocast(CPU):
        assert (x @ x).dtype == dtype
    assert precision.scaler(CPU).is_enabled() == precision.scaled == (name == "fp16")


def test_a_scaled_fp16_step_updates_and_an_overflow_does_not():
    weight = torch.nn.Parameter(torch.ones(1))
    optimizer = torch.optim.SGD([weight], lr=0.1)
    scaler = Precision("fp16", "").scaler(CPU)
    for factor, moves in ((1.0, True), (1e38, False)):
        before, scale = float(weight.detach()), scaler.get_scale()
        optimizer.zero_grad()
        scaler.scale(weight.sum() * factor).backward()
        scaler.step(optimizer)
        scaler.update()
        assert (float(weight.detach()) != before) == moves
        assert scaler.get_scale() == (scale if moves else scale / 2)


def test_determinism_is_switched_back():
    assert not torch.are_deterministic_algorithms_enabled()
    with deterministic_algorithms(True):
        assert torch.are_deterministic_algorithms_enabled()
    assert not torch.are_deterministic_algorithms_enabled()


@pytest.fixture
def first_kernel(monkeypatch):
    """Says how the first kernel on a GPU ends; what `choose_device` changes is put back."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", True)
    torch.backends.cuda.matmul.allow_tf32 = True
    monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", "")
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG")
    yield lambda run: monkeypatch.setattr(torch, "ones", run)
    torch.backends.cuda.matmul.allow_tf32 = False
    torch.backends.cuda.enable_cudnn_sdp(True)


def test_libraries_are_told_what_they_have_to_know_before_they_compute(first_kernel):
    """A sample of the predictions, then a deterministic run: "you must set an environment variable before"."""
    first_kernel(lambda *_, **__: None)
    assert choose_device() == torch.device("cuda")
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    assert not torch.backends.cudnn.allow_tf32
    assert not torch.backends.cuda.matmul.allow_tf32
    assert not torch.backends.cuda.cudnn_sdp_enabled()


@pytest.mark.parametrize(
    ("said", "kind", "told"),
    [
        (
            "no kernel image is available for execution on the device",
            ConfigError,
            r"^Tesla P100: torch .* has no code for it; expected one of sm_75, sm_90\. Next: take another GPU",
        ),
        ("all CUDA-capable devices are busy or unavailable", torch.AcceleratorError, "busy or unavailable"),
    ],
)
def test_a_gpu_that_this_torch_has_no_code_for_is_refused_in_a_sentence(first_kernel, monkeypatch, said, kind, told):
    """It was taken for one that failed, and the command for one to be repeated."""

    def fail(*_, **__):
        raise torch.AcceleratorError(f"CUDA error: {said}\nCUDA kernel errors might be reported later")

    first_kernel(fail)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla P100")
    monkeypatch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_90"])
    with pytest.raises(kind, match=told):
        choose_device()


def test_a_device_is_found():
    assert choose_device().type == ("cuda" if torch.cuda.is_available() else "cpu")
