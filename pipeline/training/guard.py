"""NaN and inf: seen before they reach a weight, told apart, traced to the module where they start, and recovered from.

Every optimiser step asks the guard twice: before the update with loss and gradient norm, after it with the weights'
norm. What it sees and what it answers:

| seen                | means                                              | answer                                |
|---------------------|----------------------------------------------------|---------------------------------------|
| finite              |                                                    | go                                    |
| scaler_overflow     | fp16: the loss scale is too high, by design        | skip, halve the scale, no alarm       |
| nonfinite_grad      | the backward pass broke, the loss is fine          | skip; too many in a row: roll back    |
| nonfinite_loss      | the forward pass broke                             | skip; too many in a row: roll back    |
| nonfinite_weights   | the update itself broke; the state is lost         | roll back                             |

Rolling back means: everything from the last good checkpoint, one precision rung down, the bad batches left out.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor, nn

Seen = Literal["finite", "scaler_overflow", "nonfinite_grad", "nonfinite_loss", "nonfinite_weights"]
Answer = Literal["go", "skip", "roll_back"]

#: Below this loss scale an overflow is the network's, not the scale's.
_LOWEST_SCALE = 1.0
_MODULES_SHOWN = 5


@dataclass(kw_only=True)
class GuardCounts:
    """What the guard did so far; part of every checkpoint."""

    overflows: int = 0  # of the fp16 scaler, expected now and then
    skips: int = 0
    skips_in_a_row: int = 0
    rollbacks: int = 0


def classify(loss: float, grad_norm: float, *, scale: float | None = None) -> Seen:
    """Name what loss and unscaled gradient norm of a step say, `scale` being the fp16 loss scale."""
    if not math.isfinite(loss):
        return "nonfinite_loss"
    if math.isfinite(grad_norm):
        return "finite"
    return "scaler_overflow" if scale is not None and scale > _LOWEST_SCALE else "nonfinite_grad"


def decide(seen: Seen, counts: GuardCounts, *, max_skips: int) -> Answer:
    """Count what was seen and answer it."""
    if seen == "finite":
        counts.skips_in_a_row = 0
        return "go"
    if seen == "scaler_overflow":
        counts.overflows += 1
        return "skip"
    counts.skips_in_a_row += 1
    if seen == "nonfinite_weights" or counts.skips_in_a_row > max_skips:
        return "roll_back"
    counts.skips += 1
    return "skip"


@dataclass(kw_only=True)
class Origin:
    """Where the first value that is not finite came from."""

    phase: Literal["forward", "backward", "weights", "unknown"]
    module: str = ""  # dotted name of the module (or parameter) that made it out of finite ones
    activations: list[tuple[str, float]] = field(default_factory=list)  # largest magnitudes of the last modules

    def describe(self) -> str:
        """One clause for a sentence."""
        return f"first in the {self.phase} of {self.module}" if self.module else "not seen again in a replay"

    def as_row(self) -> dict[str, Any]:
        """Values for a JSON line."""
        shown = [[name, value if math.isfinite(value) else str(value)] for name, value in self.activations]
        return {"phase": self.phase, "module": self.module, "activations": shown}


def find_origin(model: nn.Module, replay: Callable[[], object]) -> Origin:
    """Run a step again under observation and name the first module that makes a NaN or inf out of finite values.

    Args:
        model: the network, in the state in which it failed.
        replay: runs forward and backward on the same batch with the same random numbers. It costs about as much as
            a step and leaves no trace but gradients.
    """
    bad = nonfinite_parameters(model)
    if bad:
        return Origin(phase="weights", module=bad[0])
    observer = _Observer()
    for parameter in model.parameters():
        parameter.grad = None
    handles = []
    for name, module in model.named_modules():
        handles.append(module.register_forward_pre_hook(observer.before(name), with_kwargs=True))
        handles.append(module.register_forward_hook(observer.after(name or type(model).__name__)))
    try:
        replay()
    finally:
        for handle in handles:
            handle.remove()
    activations = observer.activations[-_MODULES_SHOWN:]
    if observer.bad_forward:
        return Origin(phase="forward", module=observer.bad_forward, activations=activations)
    gradients = ((name, parameter.grad) for name, parameter in model.named_parameters() if parameter.grad is not None)
    culprit = observer.culprit() or next((name for name, grad in gradients if not torch.isfinite(grad).all()), "")
    return Origin(phase="backward" if culprit else "unknown", module=culprit, activations=activations)


class _Observer:
    """Watches what goes through modules, forward by module hooks and backward by hooks on their tensors."""

    def __init__(self) -> None:
        self.activations: list[tuple[str, float]] = []
        self.bad_forward = ""
        self._bad_outputs: set[str] = set()  # modules whose output already has a bad gradient
        self._first_bad: Tensor | None = None
        self._readers: list[str] = []  # modules that read the first tensor with a bad gradient, outer ones first

    def culprit(self) -> str:
        """The innermost module whose output's gradient is finite and whose input's is not."""
        return next((name for name in reversed(self._readers) if name not in self._bad_outputs), "")

    def before(self, name: str) -> Callable[..., None]:
        """Hook that watches the gradients of a module's inputs."""

        def on_gradient(tensor: Tensor, grad: Tensor) -> None:
            if (self._first_bad is None or self._first_bad is tensor) and not torch.isfinite(grad).all():
                self._first_bad = tensor
                self._readers.append(name)

        def hook(_module: nn.Module, inputs: object, keywords: object) -> None:
            for tensor in _tensors((inputs, keywords)):
                if tensor.requires_grad:
                    tensor.register_hook(partial(on_gradient, tensor))

        return hook

    def after(self, name: str) -> Callable[..., None]:
        """Hook that watches a module's outputs and their gradients."""

        def on_gradient(grad: Tensor) -> None:
            if not torch.isfinite(grad).all():
                self._bad_outputs.add(name)

        def hook(_module: nn.Module, _inputs: object, output: object) -> None:
            tensors = [tensor for tensor in _tensors(output) if tensor.is_floating_point() and tensor.numel()]
            if tensors and not self.bad_forward:
                largest = max(float(tensor.detach().abs().max()) for tensor in tensors)
                self.activations.append((name, largest))
                if not math.isfinite(largest):
                    self.bad_forward = name
            for tensor in tensors:
                if tensor.requires_grad:
                    tensor.register_hook(on_gradient)

        return hook


def nonfinite_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters and buffers that hold a NaN or inf."""
    state = model.state_dict().items()
    return [name for name, tensor in state if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())]


def _tensors(output: Any) -> Iterator[Tensor]:
    if isinstance(output, Tensor):
        yield output
    elif isinstance(output, tuple | list):
        for item in output:
            yield from _tensors(item)
    elif isinstance(output, dict):
        yield from _tensors(list(output.values()))
