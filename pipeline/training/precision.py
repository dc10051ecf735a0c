"""Which dtype the matrix products run in, why, and what comes next if it overflows."""

import contextlib
import os
from collections.abc import Iterator
from typing import NamedTuple

import torch

from pipeline.errors import ConfigError

_DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}


class Precision(NamedTuple):
    """A rung of the ladder fp16 -> bf16 -> fp32."""

    name: str
    reason: str  # printed at the start of a run and kept in its log

    @property
    def scaled(self) -> bool:
        """Whether gradients need a loss scaler: fp16 alone underflows."""
        return self.name == "fp16"

    def autocast(self, device: torch.device) -> torch.autocast:
        """Context in which the forward pass runs; in fp32 it does nothing."""
        return torch.autocast(device.type, dtype=_DTYPES[self.name], enabled=self.name != "fp32")

    def scaler(self, device: torch.device) -> torch.amp.GradScaler:
        """A loss scaler, switched off unless this precision needs one."""
        return torch.amp.GradScaler(device.type, enabled=self.scaled)


def choose_device() -> torch.device:
    """The first CUDA device, where float32 means float32 from here on, or the CPU.

    cuDNN rounds the factors of convolutions and recurrent layers to 10 bits unless it is told not to: predictions would
    depend on the batch, and the last rung of the ladder would be hardly above bf16. And PyTorch looks once, at a
    process's first matrix product, whether cuBLAS was told to be repeatable: `deterministic_algorithms` comes too late
    where something else was computed before.

    Attention takes the kernels that know a learned bias, in validation and with adapters as well. Since 2.11 PyTorch
    prefers cuDNN's on an H100 where the bias has no gradient, whose gradients can be NaN at lengths of 64 modulo 128
    (pytorch/pytorch issue 196678).

    Raises:
        ConfigError: this torch has no code for the GPU.
    """
    if not torch.cuda.is_available():
        return torch.device("cpu")
    torch.backends.cudnn.allow_tf32 = False
    torch.backends.cuda.matmul.allow_tf32 = False  # NVIDIA's containers set TORCH_ALLOW_TF32_CUBLAS_OVERRIDE
    torch.backends.cuda.enable_cudnn_sdp(False)
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    device = torch.device("cuda")
    try:
        torch.ones(1, device=device)
    except RuntimeError as err:
        if "no kernel image" not in str(err):
            raise
        raise ConfigError(
            f"{torch.cuda.get_device_name()}: torch {torch.__version__} has no code for it; expected one of "
            f"{', '.join(torch.cuda.get_arch_list())}. Next: take another GPU (on Kaggle T4 x2, not P100), a torch "
            "built for this one, or CUDA_VISIBLE_DEVICES= before the same command for the CPU."
        ) from err
    return device


def choose_precision(requested: str, device: torch.device) -> Precision:
    """Resolve ``auto``, and never take an emulated bf16 for a real one.

    ``torch.cuda.is_bf16_supported()`` is true on a T4, where bf16 is emulated and slow; the compute capability is not
    fooled.

    Args:
        requested: ``auto``, ``bf16``, ``fp16`` or ``fp32``.
        device: where the network runs.

    Raises:
        ValueError: another word.
    """
    if requested not in ("auto", *_DTYPES):
        raise ValueError(f"precision: got {requested!r}; expected auto, {', '.join(_DTYPES)}.")
    if device.type != "cuda":
        if requested == "auto":
            return Precision("fp32", f"auto: no CUDA device ({device.type})")
        return Precision(requested, f"asked for by precision = {requested!r}")
    major, minor = torch.cuda.get_device_capability(device)
    capability = f"compute capability {major}.{minor}"
    best = "bf16" if major >= 8 else "fp16" if major == 7 else "fp32"
    if requested == "auto":
        return Precision(best, f"auto: {capability}")
    if requested == "bf16" and best != "bf16":
        return Precision(best, f"bf16 was asked for, but {capability} only emulates it")
    return Precision(requested, f"asked for by precision = {requested!r}; {capability}")


def next_precision(current: Precision, device: torch.device) -> Precision:
    """The safer rung below, or fp32 again at the bottom: fp16 -> bf16 where real -> fp32."""
    reason = f"fallback from {current.name}"
    if current.name == "fp16" and device.type == "cuda" and torch.cuda.get_device_capability(device)[0] >= 8:
        return Precision("bf16", reason)
    return Precision("fp32", reason)


@contextlib.contextmanager
def deterministic_algorithms(enabled: bool) -> Iterator[None]:
    """Refuse operations without a repeatable result while the context is open."""
    if not enabled:
        yield
        return
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
