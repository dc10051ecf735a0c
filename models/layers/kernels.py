"""Which code computes an operator on a device, and why: the one home of that decision.

An operator (the selective scan, a convolution) lists its kernels, fastest first. The first that is usable is taken,
and usable is what has just given, on that very device, the definition's outputs and gradients: an installed package
may lack the kernel, or hold it for another GPU. Otherwise, and where ``RNA_KERNELS=reference`` asks for it, the
operator runs in plain PyTorch. Weights do not depend on the choice.
"""

import functools
import importlib
import logging
import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

MODES = ("auto", "reference")
#: operator -> the module that holds its ``OPERATOR``
HOMES = {
    "selective_scan": "models.layers.selective_scan",
    "causal_conv1d": "models.layers.causal_conv",
    "long_conv": "models.layers.long_conv",
}
#: Numbers of one array within which a kernel with 32-bit offsets finds its way.
ADDRESSED = 2**31
_BOTH_DIRECTIONS = ({"reverse": False}, {"reverse": True})
_TOLERANCE = 1e-4  # largest difference to the definition, over its largest number
_LOG = logging.getLogger("models.kernels")


class Kernel(NamedTuple):
    """One way to compute an operator.

    Attributes:
        device: type of device it is for.
        load: make it ready, and say what it is; raises where it cannot be had.
        run: the operator's own arguments to its output, differentiable.
        repeatable: the same input gives the same bits; a kernel without (sums by atomics) is not used under
            `torch.use_deterministic_algorithms`.
    """

    device: str
    load: Callable[[], str]
    run: Callable[..., Tensor]
    repeatable: bool = True


class Operator(NamedTuple):
    """What is known of an operator; its module holds one as ``OPERATOR``.

    Attributes:
        kernels: by the name of the path, fastest first.
        reference: the definition, in float64.
        example: names and small float32 values of its tensors, in order.
        options: further arguments; a kernel is tried with each set of them.
    """

    kernels: Mapping[str, Kernel]
    reference: Callable[..., Tensor]
    example: Callable[[], dict[str, Tensor]]
    options: Sequence[Mapping[str, Any]] = _BOTH_DIRECTIONS


class Choice(NamedTuple):
    """The path that is taken, "reference" being plain PyTorch, and why."""

    path: str
    reason: str


def mode() -> str:
    """What ``RNA_KERNELS`` asks for: "auto", if nothing, or "reference".

    Raises:
        ValueError: it asks for something else.
    """
    asked = os.environ.get("RNA_KERNELS") or "auto"
    if asked not in MODES:
        raise ValueError(f"RNA_KERNELS={asked!r}: expected auto or reference. Next: unset it, or choose one of them.")
    return asked


def choose(operator: str, device: torch.device) -> Choice:
    """The path of an operator on a device; found out once, and logged then.

    Args:
        operator: one of `HOMES`.
        device: where its tensors are.
    """
    return _choose(operator, _one_name(torch.device(device)), mode(), torch.are_deterministic_algorithms_enabled())


def path(operator: str, device: torch.device) -> str:
    """The name alone, which a compiled graph takes as a constant."""
    if torch.compiler.is_compiling():
        from models.layers import constant

        return constant.path(operator, device)
    return choose(operator, device).path


def describe(model: nn.Module, device: torch.device) -> str:
    """What each of a network's operators runs on, and why; "" for a network without any.

    A module says what it uses in its attribute ``operators``.
    """
    choices = {name: choose(name, device) for name in _operators(model)}
    return "; ".join(f"{name}: {choice.path} ({choice.reason})" for name, choice in choices.items())


def slow(model: nn.Module, device: torch.device) -> str:
    """What makes a network many times slower than it need be on a GPU, unasked, and what mends it; "" for nothing.

    Plain PyTorch starts several kernels for each position of the scan, in each direction and layer.
    """
    scan = "selective_scan"
    if device.type != "cuda" or mode() == "reference" or scan not in _operators(model):
        return ""
    if choose(scan, device).path != "reference":
        return ""
    return (
        f"{scan} runs in plain PyTorch on {device}, position by position, many times slower than Triton's. "
        "Next: install a C compiler and Python's headers, which Triton needs, or mamba-ssm."
    )


def _operators(model: nn.Module) -> list[str]:
    return sorted({name for module in model.modules() for name in getattr(module, "operators", ())})


def over_batch(run: Callable[..., Tensor], *arrays: Tensor, size: int) -> Tensor:
    """What a kernel with 32-bit offsets gives, for as many sequences at a time as it can address.

    Source: mamba-ssm's selective_scan_fwd_kernel.cuh and causal-conv1d's causal_conv1d_fwd.cu multiply the number of a
    sequence by its stride, or by its number of states, as 32-bit integers, and say nothing when these are exceeded.

    Args:
        run: of some sequences.
        arrays: [B, …] each, which `run` takes.
        size: numbers of one sequence in the largest array that the kernel reads or writes.

    Raises:
        ValueError: a single sequence is too large.
    """
    at_once, batch = ADDRESSED // size, arrays[0].shape[0]
    if batch <= at_once:
        return run(*arrays)
    if not at_once:
        raise ValueError(
            f"a sequence of {size:,} numbers; the kernel addresses {ADDRESSED:,}. Next: RNA_KERNELS=reference."
        )
    _tell_parts(at_once)
    return torch.cat([run(*parts) for parts in zip(*(x.split(at_once) for x in arrays), strict=True)])


@functools.cache
def _tell_parts(at_once: int) -> None:
    _LOG.info("%d sequences at a time: the kernel's offsets have 32 bits", at_once)


def _one_name(device: torch.device) -> torch.device:
    """The same for "cpu" and "cpu:0", and for "cuda" and the number of the current one."""
    if device.type == "cpu":
        return torch.device("cpu")
    if device.type == "cuda" and device.index is None and torch.cuda.is_available():
        return torch.device("cuda", torch.cuda.current_device())
    return device


@functools.cache
def _choose(operator: str, device: torch.device, asked: str, deterministic: bool) -> Choice:
    if asked == "reference":
        choice = Choice("reference", "RNA_KERNELS=reference asks for plain PyTorch")
    else:
        choice = _first_usable(_home(operator), device, deterministic=deterministic)
    _LOG.info("%s on %s: %s (%s)", operator, device, choice.path, choice.reason)
    return choice


def _home(operator: str) -> Operator:
    return importlib.import_module(HOMES[operator]).OPERATOR


def _first_usable(operator: Operator, device: torch.device, *, deterministic: bool) -> Choice:
    refused = []
    for name, kernel in operator.kernels.items():
        if kernel.device != device.type:
            continue
        try:
            if deterministic and not kernel.repeatable:
                raise RuntimeError("its sums differ from run to run, and deterministic algorithms are asked for")
            with warnings.catch_warnings():  # what a package deprecates at its import is no reason against it
                warnings.simplefilter("ignore")
                about = kernel.load()
                _check(kernel, operator, device)
        except Exception as err:  # third-party kernels raise anything: ImportError, RuntimeError, TypeError …
            refused.append(f"{name}: {' '.join(str(err).split())[:150] or type(err).__name__}")
        else:
            return Choice(name, "; ".join([about, *(f"not {reason}" for reason in refused)]))
    return Choice("reference", "plain PyTorch; " + ("; ".join(refused) or f"there is no kernel for {device.type}"))


def _check(kernel: Kernel, operator: Operator, device: torch.device) -> None:
    """Run forward and backward, with each set of options, and compare with the definition.

    Raises:
        RuntimeError: the output or a gradient is another.
    """
    # the first call may stand inside gradient checkpointing, which must not count what is saved here as its own
    unseen = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
    with unseen, torch.inference_mode(False), torch.enable_grad(), torch.autocast(device.type, enabled=False):
        values = operator.example()
        for options in operator.options:
            found = _output_and_gradients(kernel.run, values, device, options)
            expected = _output_and_gradients(operator.reference, values, torch.device("cpu"), options)
            for name, one, other in zip(("output", *values), found, expected, strict=True):
                error = float((one.double().cpu() - other).abs().max() / other.abs().max())
                if not error <= _TOLERANCE:  # true for NaN
                    said = "".join(f" ({key}={value})" for key, value in options.items())
                    raise RuntimeError(f"differs from the definition by {error:.1e} in {name}{said}")


def _output_and_gradients(
    run: Callable[..., Tensor], values: dict[str, Tensor], device: torch.device, options: Mapping[str, Any]
) -> list[Tensor]:
    args = [value.detach().to(device).requires_grad_() for value in values.values()]
    output = run(*args, **options)
    weight = torch.linspace(-1, 1, output.numel(), dtype=output.dtype, device=device).view_as(output)
    return [output.detach(), *torch.autograd.grad(output, args, weight)]
