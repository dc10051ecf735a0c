"""NaN, inf and loss spikes: seen before they reach a weight, told apart, traced to the module where they start.

Every optimiser step asks the guard twice: before the update with loss and gradient norm, after it with the weights'
norm. What it sees and what it answers:

| seen                | means                                              | answer                                |
|---------------------|----------------------------------------------------|---------------------------------------|
| finite              |                                                    | go                                    |
| scaler_overflow     | fp16: the loss scale is too high, by design        | skip, halve the scale, no alarm       |
| nonfinite_grad      | the backward pass broke, the loss is fine          | skip; too many in a row: roll back    |
| nonfinite_loss      | the forward pass broke                             | skip; too many in a row: roll back    |
| nonfinite_weights   | the update itself broke; the state is lost         | roll back                             |
| loss_spike          | finite, but far above all recent losses (if asked) | skip; too many in a row: roll back    |

Rolling back means: everything from the last good checkpoint, one precision rung down, the bad batches left out
(`pipeline.training.recovery`).
"""

import math
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from statistics import median
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_iter

from pipeline.training.sharding import is_sharded, nonfinite

Seen = Literal["finite", "scaler_overflow", "nonfinite_grad", "nonfinite_loss", "nonfinite_weights", "loss_spike"]
Answer = Literal["go", "skip", "roll_back"]

#: Below this loss scale an overflow is the network's, not the scale's.
_LOWEST_SCALE = 1.0
_HIGHEST_SCALE = 2.0**16
_MODULES_SHOWN = 5
_RECENT = 128  # finite losses that a spike is measured against
_ENOUGH = 32  # of them before anything is called a spike
_MAD_TO_SIGMA = 1.4826  # of a normal distribution
_LEAST_SPREAD = 1e-3  # of the median: losses that hardly vary do not make a spike of their next ripple


@dataclass(kw_only=True)
class GuardCounts:
    """What the guard did so far; part of every checkpoint."""

    overflows: int = 0  # of the fp16 scaler, expected now and then
    skips: int = 0
    skips_in_a_row: int = 0
    rollbacks: int = 0


def classify(loss: float, grad_norm: float, *, scale: float | None) -> Seen:
    """Name what loss and unscaled gradient norm of a step say; `scale` is that of the loss in fp16, else None."""
    if not math.isfinite(loss):
        return "nonfinite_loss"
    if math.isfinite(grad_norm):
        return "finite"
    too_high = scale is not None and not scale <= _LOWEST_SCALE  # one that is itself NaN or inf is too high
    return "scaler_overflow" if too_high else "nonfinite_grad"


def lower_scale(scale: float) -> float:
    """The loss scale after an overflow: half of it, or where it is itself out of range the one that runs begin with."""
    half = scale / 2
    return half if half <= _HIGHEST_SCALE else _HIGHEST_SCALE


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


def is_spike(loss: float, recent: list[float], *, threshold: float) -> bool:
    """Whether a loss lies more than `threshold` robust standard deviations above the recent ones.

    Args:
        loss: of one step; one that is not finite is no spike but a NaN, see `classify`.
        recent: finite losses before it.
        threshold: in median absolute deviations, scaled to those of a normal distribution; 0 = nothing is a spike.
    """
    if not threshold or len(recent) < _ENOUGH or not math.isfinite(loss):
        return False
    middle = median(recent)
    spread = _MAD_TO_SIGMA * median([abs(value - middle) for value in recent])
    return loss > middle + threshold * max(spread, _LEAST_SPREAD * abs(middle))


def remember(loss: float, recent: list[float]) -> None:
    """Take a loss into the recent ones, if it is finite: one NaN would blind the statistics for all that follow."""
    if math.isfinite(loss):
        recent.append(loss)
        del recent[:-_RECENT]


class Activation(NamedTuple):
    """What left a module."""

    module: str  # dotted name
    largest: float  # magnitude; NaN or inf as it is
    rms: float
    nonfinite: int  # values
    dtype: str


@dataclass(kw_only=True)
class Origin:
    """Where the first value that is not finite came from."""

    phase: Literal["forward", "backward", "weights", "unknown"]
    module: str = ""  # dotted name of the module (or parameter) that made it out of finite ones
    activations: list[Activation] = field(default_factory=list)  # of every module, up to the first bad one
    summed: bool = False  # seen in a gradient that is the sum over all processes: one of them may know better

    def describe(self) -> str:
        """One clause for a sentence."""
        return f"first in the {self.phase} of {self.module}" if self.module else "not seen again in a replay"

    def as_row(self) -> dict[str, Any]:
        """Values for a JSON line."""
        last = self.activations[-_MODULES_SHOWN:]
        shown = [[one.module, one.largest if math.isfinite(one.largest) else str(one.largest)] for one in last]
        return {"phase": self.phase, "module": self.module, "activations": shown}


def find_origin(model: nn.Module, replay: Callable[[], object]) -> Origin:
    """Run a step again under observation and name the first module that makes a NaN or inf out of finite values.

    Args:
        model: the network, in the state in which it failed.
        replay: runs forward and backward on the same batch with the same random numbers. It costs about as much as
            a step and leaves no trace but gradients. torch's anomaly mode is off meanwhile: it would break the
            backward pass off before the hooks have seen the value.
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
        with torch.autograd.set_detect_anomaly(False):
            replay()
    finally:
        for handle in handles:
            handle.remove()
    gradients = {name: x.grad for name, x in model.named_parameters() if x.grad is not None}
    bad = nonfinite(gradients)  # of a sharded network all processes ask for it, whatever each of them has seen
    activations = observer.activations
    if observer.bad_forward:
        return Origin(phase="forward", module=observer.bad_forward, activations=activations)
    if culprit := observer.culprit():
        return Origin(phase="backward", module=culprit, activations=activations)
    if not bad:
        return Origin(phase="unknown", activations=activations)
    return Origin(phase="backward", module=bad[0], activations=activations, summed=is_sharded(gradients[bad[0]]))


class _Observer:
    """Watches what goes through modules, forward by module hooks and backward by hooks on their tensors."""

    def __init__(self) -> None:
        self.activations: list[Activation] = []
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
                activation = _describe(name, tensors)
                self.activations.append(activation)
                if activation.nonfinite:
                    self.bad_forward = name
            for tensor in tensors:
                if tensor.requires_grad:
                    tensor.register_hook(on_gradient)

        return hook


def _describe(name: str, tensors: list[Tensor]) -> Activation:
    """Statistics without a copy of a tensor: a pair map in a second precision could be what memory lacks."""
    values = [tensor.detach() for tensor in tensors]
    largest = [float(torch.linalg.vector_norm(value, ord=math.inf)) for value in values]
    norms = [float(torch.linalg.vector_norm(value, dtype=torch.float32)) for value in values]
    bad = [value for value, most in zip(values, largest, strict=True) if not math.isfinite(most)]
    return Activation(
        module=name,
        largest=max(largest, key=lambda most: (math.isnan(most), most)),
        rms=math.hypot(*norms) / math.sqrt(sum(value.numel() for value in values)),
        nonfinite=sum(int((~torch.isfinite(value)).sum()) for value in bad),
        dtype="/".join(sorted({str(value.dtype).removeprefix("torch.") for value in values})),
    )


def nonfinite_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters and buffers that hold a NaN or inf."""
    return nonfinite(model.state_dict())


def _tensors(values: Any) -> list[Tensor]:
    return [value for value in tree_iter(values) if isinstance(value, Tensor)]
