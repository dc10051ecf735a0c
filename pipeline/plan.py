"""How much memory a training step needs, counted before it is taken, and what to change where that is too much.

The step runs on fake tensors, which have shapes and no memory, while every storage that would be allocated and freed is
counted: forward, loss, backward, recomputation. What cannot run on them (a recurrent head, a scan in a Python loop)
runs for real at three small sizes, from which the memory follows, as it is linear in the batch and quadratic in the
length (a Fourier transform is not quite: there it may come out half as large again).

On the CPU the heap of the C library holds more than the tensors: freed blocks into which nothing else fits. Steps of
eight networks of 0.1 to 12 million parameters, batches of 4 to 32, L 177 to 500, with and without gradient
checkpointing, held 5 to 43 % (median 19 %) of what the forward pass allocates on top of the live tensors.
"""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path
from typing import Any
from weakref import ref

import torch
from rich.table import Table
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter

from models.interface import RnaInputs, RnaModel
from models.layers import kernels
from pipeline.config import RunConfig
from pipeline.errors import ConfigError, StorageError
from pipeline.memory import Free, free_bytes
from pipeline.runlog import amount, size_text
from pipeline.training.optim import make_optimizer
from pipeline.training.precision import Precision, choose_device, choose_precision

_HEAP_SHARE, _HEAP_LEAST = 0.18, 20 * 2**20  # of what a forward pass allocates, and whatever that is
_HEAP_LARGEST = 32 * 2**20  # larger blocks go back to the system: glibc's M_MMAP_THRESHOLD after it has grown
_MARGIN = 0.1  # of what is free, left alone: 22.2 GiB of 22.4 GiB were let go, and took it all
_MOMENTS = 2  # of every parameter: AdamW's, and of an optimiser that needs real numbers to tell; most keep as many
_SMALL = 128  # nt; longer sequences are not run for real
_MOST_OPERATIONS = 60_000  # on fake tensors, about two seconds; a scan in a Python loop needs more
_SHORTEST = 32  # nt that are still suggested

#: Makes the network of a configuration, with random weights.
Build = Callable[[], RnaModel]


@dataclass(frozen=True, kw_only=True)
class Step:
    """What the memory of a training step depends on, besides the network."""

    micro_batch: int  # sequences of one forward pass in one process
    length: int  # nt
    gradient_checkpointing: int  # recompute every k blocks; 0 = keep activations
    accumulates: bool  # whether gradients of earlier micro-batches are there already
    processes: int = 1  # that train together, each with its share of the batch
    sharded: bool = False  # and of the network

    @classmethod
    def of(cls, config: RunConfig, *, length: int, sequences: int | None = None, processes: int = 1) -> "Step":
        """The largest step of a run with so many sequences, the longest of `length` nt, in the fullest process."""
        train = config.train
        share = -(-min(train.batch_size, sequences or train.batch_size) // processes)
        micro_batch = min(train.largest_micro_batch, share)
        return cls(
            micro_batch=micro_batch,
            length=min(length, config.data.max_length),
            gradient_checkpointing=train.gradient_checkpointing,
            accumulates=micro_batch < share,
            processes=processes,
            sharded=train.sharding == "fsdp2" and processes > 1,
        )


@dataclass(frozen=True, kw_only=True)
class Need:
    """Bytes of a training step at its peak, in one process."""

    parameters: int  # a number, not bytes
    weights: int
    gradients: int
    optimizer: int
    average: int
    together: int  # weights and gradients that a sharded network has whole at one time
    activations: int  # and what the backward pass holds besides
    heap: int  # freed, and not given back to the system

    @property
    def total(self) -> int:
        states = self.weights + self.gradients + self.optimizer + self.average + self.together
        return states + self.activations + self.heap


@dataclass(frozen=True, kw_only=True)
class Plan:
    """What a run needs, what there is, and what would fit if that is not enough."""

    step: Step
    need: Need
    available: Free  # to each process
    precision: Precision
    device: torch.device
    fitting: tuple[Step, Need] | None = None  # None: the plan itself fits, or nothing does

    @property
    def fits(self) -> bool:
        return self.need.total <= _room(self.available.size)

    def line(self) -> str:
        """One line: need, of what, for what."""
        step, checkpointing = self.step, self.step.gradient_checkpointing
        each = f" in each of {step.processes} processes" if step.processes > 1 else ""
        part = f"1/{step.processes} of the network, " if step.sharded else ""
        need, free = size_text(self.need.total), size_text(self.available.size)
        return (
            f"needs about {need} of {free} free on {self.device.type}{each}"
            f"{f' (limit: {self.available.limit})' if self.available.limit else ''}: {part}"
            f"{amount(step.micro_batch, 'sequence')} of {step.length:,} nt, {self.precision.name}"
            f"{f', gradient checkpointing every {checkpointing}' if checkpointing else ''}"
        )

    def require_fit(self) -> None:
        """Refuse what cannot run.

        Raises:
            StorageError: with the settings that would fit.
        """
        if self.fits:
            return
        line = f"plan: {self.line()}; {_MARGIN:.0%} of what is free is spared"
        if self.fitting is None:
            raise StorageError(
                f"{line}, and nothing smaller fits. Next: take a smaller network, or a machine with more memory."
            )
        step, need = self.fitting
        settings = {"data.max_length": step.length} if step.length < self.step.length else {}
        for name in ("micro_batch", "gradient_checkpointing"):
            if getattr(step, name) != getattr(self.step, name):
                settings[f"train.{name}"] = getattr(step, name)
        told = " ".join(f"{name}={value}" for name, value in settings.items())
        raise StorageError(f"{line}. Next: set {told}, which needs about {size_text(need.total)}.")

    def table(self) -> Table:
        """All parts, for a terminal."""
        table = Table(box=None, show_header=False, pad_edge=False)
        table.add_column(justify="left")
        table.add_column(justify="right")
        table.add_row("parameters", f"{self.need.parameters:,}")
        names = {"optimizer": "optimiser", "average": "averaged weights", "heap": "heap that stays"}
        names |= {"together": "blocks that are whole at one time"}
        for part, size in asdict(self.need).items():
            if part != "parameters" and size:
                table.add_row(names.get(part, part), size_text(size))
        table.add_row("[bold]needs about[/]", f"[bold]{size_text(self.need.total)}[/]")
        each = f", to each of {self.step.processes} processes" if self.step.processes > 1 else ""
        limit = f"; limit: {self.available.limit}" if self.available.limit else ""
        table.add_row(f"free ({self.device.type}{each}{limit})", size_text(self.available.size))
        return table


def make_plan(
    config: RunConfig,
    build: Build,
    *,
    length: int | None = None,
    sequences: int | None = None,
    processes: int = 1,
    device: torch.device | None = None,
    available: Free | None = None,
) -> Plan:
    """Count what a run needs, and look for settings that fit if there is less.

    Args:
        config: of the run.
        build: makes its network.
        length: of the longest sequence in nt, as far as known; the run's ``max_length`` crops it.
        sequences: that train, which no batch exceeds; None = more than a batch.
        processes: that train together; what is counted is one's need.
        device: where it trains; None = where `choose_device` would.
        available: what one process may take, less a margin; None = what is free now.

    Raises:
        ConfigError: the network cannot take gradient checkpointing of that kind.
    """
    device = device or choose_device()
    precision = choose_precision(config.train.precision, device)
    kept: dict[str, Any] = {"optimizer": config.train.optimizer, "averaged": config.train.ema_decay > 0}
    available = available or free_on(device, processes=processes)

    def count(step: Step) -> Need:
        return estimate(build, step, precision=precision, device=device, **kept)

    step = Step.of(config, length=length or config.data.max_length, sequences=sequences, processes=processes)
    plan = Plan(step=step, need=count(step), available=available, precision=precision, device=device)
    states = replace(plan.need, activations=0, heap=0)  # which no other step makes smaller
    if plan.fits or states.total > _room(available.size):
        return plan
    smaller = ((candidate, count(candidate)) for candidate in _smaller(step) if candidate != step)
    return replace(plan, fitting=next((found for found in smaller if found[1].total <= _room(available.size)), None))


def check(config: RunConfig, build: Build, *, length: int, sequences: int, processes: int, device: torch.device) -> str:
    """Refuse a run that cannot fit, and say of another what it needs; arguments as for `make_plan`.

    A run on a GPU with ``micro_batch = "auto"`` is let go: it halves its batches by itself when memory runs out.

    Raises:
        StorageError: with the settings that would fit.
    """
    plan = make_plan(config, build, length=length, sequences=sequences, processes=processes, device=device)
    if not (config.train.micro_batch == "auto" and plan.device.type == "cuda"):
        plan.require_fit()
    return plan.line()


def _smaller(step: Step) -> Iterator[Step]:
    """Steps that need less, the least painful first.

    Micro-batches down to a quarter cost next to nothing, recomputation a third of the time, shorter sequences score.
    """
    for checkpointing in dict.fromkeys((step.gradient_checkpointing, 1)):
        sizes = [step.micro_batch >> k for k in range(step.micro_batch.bit_length())]
        for size in sizes[:3] if checkpointing == 0 else sizes:
            yield replace(
                step,
                micro_batch=size,
                gradient_checkpointing=checkpointing,
                accumulates=step.accumulates or size < step.micro_batch,
            )
    length = step.length // 2
    while length >= _SHORTEST:
        yield replace(step, micro_batch=1, gradient_checkpointing=1, length=length, accumulates=True)
        length //= 2


def estimate(
    build: Build, step: Step, *, precision: Precision, device: torch.device, averaged: bool, optimizer: str = "adamw"
) -> Need:
    """Count the memory of one training step.

    Args:
        build: makes the network.
        step: batch, length, gradient checkpointing.
        precision: that it computes in.
        device: that it trains on.
        averaged: whether averaged weights are kept.
        optimizer: by name.

    Raises:
        ConfigError: the network cannot take gradient checkpointing of that kind, or there is no such optimiser.
    """
    # planning leaves the run's random numbers alone, and anomaly mode is no business of fake numbers
    forked = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(forked), torch.autograd.set_detect_anomaly(False):
        counted = _count(build, step, precision=precision, device=device)
        moments = _MOMENTS * counted.gradients
        if optimizer != "adamw":
            moments = _moment_bytes(build, optimizer, device=device, otherwise=moments)
    parts = step.processes if step.sharded else 1
    weights, gradients = -(-counted.weights // parts), -(-counted.gradients // parts)
    return Need(
        parameters=counted.parameters,
        weights=weights,
        gradients=gradients,
        optimizer=-(-moments // parts),
        average=weights if averaged else 0,
        together=2 * counted.together if step.sharded else 0,
        activations=counted.activations,
        heap=_HEAP_LEAST + int(_HEAP_SHARE * counted.allocated) if device.type == "cpu" else 0,
    )


@lru_cache(maxsize=1)  # however many steps are tried for a run, it is one optimiser
def _moment_bytes(build: Build, optimizer: str, *, device: torch.device, otherwise: int) -> int:
    """What an optimiser keeps after a step on fake tensors; `otherwise`, if it or the network needs real ones."""
    try:
        with FakeTensorMode(), device:
            model = build()
            made = make_optimizer(model, lr=1e-3, weight_decay=0.0, name=optimizer)
            for parameter in model.parameters():
                parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
            made.step()
    except (RuntimeError, AssertionError):
        return otherwise
    return _bytes(x for state in made.state.values() for x in state.values() if isinstance(x, Tensor) and x.ndim)


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


@dataclass(frozen=True, kw_only=True)
class _Counted:
    parameters: int
    weights: int
    gradients: int
    together: int  # bytes of the parameters outside of blocks, of a block and of the next one
    activations: int
    allocated: int  # by the forward pass on the heap, whether it was freed or not


def _count(build: Build, step: Step, *, precision: Precision, device: torch.device) -> _Counted:
    """Run the step on fake tensors, or small ones where that does not work."""
    fake = FakeTensorMode()
    try:
        with fake, device:
            model = build()
        kernels.describe(model, device)  # tried out on real tensors now: what fails on fake ones is never chosen again
        with fake:
            return _run(model, step, precision=precision, device=device, most=_MOST_OPERATIONS)
    except RuntimeError:  # data-dependent shapes, kernels that read memory, too many operations
        return _extrapolate(build, step, precision=precision, device=device)


def _extrapolate(build: Build, step: Step, *, precision: Precision, device: torch.device) -> _Counted:
    """c + B (a L + b L²) through three real runs."""

    def run(batch: int, length: int) -> _Counted:
        with device:
            model = build()
        return _run(model, replace(step, micro_batch=batch, length=length), precision=precision, device=device)

    short = min(step.length, _SMALL)
    one, two, long = run(1, short), run(2, short), run(1, 2 * short)
    single = two.activations - one.activations
    fixed = one.activations - single
    square = max(0.0, (long.activations - fixed - 2 * single) / 2)
    stretch = step.length / short
    growing = (single - square) * stretch + square * stretch**2
    allocated = int(one.allocated * step.micro_batch * stretch)
    return replace(one, activations=int(fixed + step.micro_batch * growing), allocated=allocated)


def _run(
    model: RnaModel, step: Step, *, precision: Precision, device: torch.device, most: int | None = None
) -> _Counted:
    """One forward and backward pass with every storage counted."""
    set_gradient_checkpointing(model, step.gradient_checkpointing)
    parameters = [parameter for parameter in model.train().parameters() if parameter.requires_grad]
    with device, _LiveBytes(most=most) as live:
        for tensor in (*model.parameters(), *model.buffers()):
            live.see(tensor)
        weights, live.allocated = live.now, 0
        if step.accumulates:
            for parameter in parameters:
                parameter.grad = torch.zeros_like(parameter)
        with precision.autocast(device):
            outputs = model(_inputs(step, model))
        allocated = live.allocated
        losses = [x.float().square().sum() for x in outputs if x is not None]
        torch.stack(losses).sum().backward()
    gradients = _bytes(parameters)
    return _Counted(
        parameters=sum(parameter.numel() for parameter in model.parameters()),
        weights=weights,
        gradients=gradients,
        together=_together(model),
        activations=max(0, live.peak - weights - gradients),
        allocated=allocated,
    )


def _together(model: RnaModel) -> int:
    """Bytes of the parameters that `pipeline.training.sharding` has put together while it computes a block."""
    blocks = [_bytes(block.parameters()) for block in getattr(model, "blocks", ())]
    return _bytes(model.parameters()) - sum(blocks) + 2 * max(blocks, default=0)


def set_gradient_checkpointing(model: RnaModel, every: int) -> None:
    """What a run sets.

    Raises:
        ConfigError: the network cannot take gradient checkpointing of that kind.
    """
    try:
        model.set_gradient_checkpointing(every)
    except ValueError as err:
        raise ConfigError(f"[train] {err} Next: correct it there.") from err


def _inputs(step: Step, model: RnaModel) -> RnaInputs:
    shape = (step.micro_batch, step.length)
    return RnaInputs(
        torch.zeros(shape, dtype=torch.int64),
        torch.ones(shape, dtype=torch.bool),
        torch.zeros(*shape, step.length) if model.uses_bpp else None,
        torch.zeros(*shape, model.num_features, dtype=torch.float16) if model.num_features else None,
    )


class _LiveBytes(TorchDispatchMode):
    """Bytes of all storages that operators made and nobody let go of yet.

    Args:
        most: operations after which to give up; None = never.

    Raises:
        RuntimeError: more operations than `most`.
    """

    def __init__(self, *, most: int | None) -> None:
        super().__init__()
        self.now, self.peak, self.allocated, self._left = 0, 0, 0, most
        self._storages: dict[int, ref] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self._left is not None:
            self._left -= 1
            if self._left < 0:
                raise RuntimeError("more operations than planning has time for")
        out = func(*args, **(kwargs or {}))
        for leaf in tree_iter(out):
            if isinstance(leaf, Tensor):
                self.see(leaf)
        return out

    def see(self, tensor: Tensor) -> None:
        """Count a tensor's storage, once, until it is freed."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._storages:
            return

        def freed(_: ref) -> None:
            del self._storages[key]
            self.now -= size

        self._storages[key] = ref(storage, freed)
        self.now += size
        self.peak = max(self.peak, self.now)
        self.allocated += size if size <= _HEAP_LARGEST else 0


def free_on(device: torch.device, *, processes: int = 1) -> Free:
    """Memory that each process of a new run could take: of its GPU, or its share of the machine's, within limits."""
    if device.type != "cuda":
        return free_bytes(processes=processes)
    free, _ = torch.cuda.mem_get_info(device)
    return Free(free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device), "")


def _room(available: int) -> int:
    return int((1 - _MARGIN) * available)


def longest_sequence(*tables: Path) -> int | None:
    """Of clean tables, in nt; None where there is none yet."""
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    there = [pq.read_table(table, columns=["sequence"])["sequence"] for table in tables if table.is_file()]
    return max((pc.max(pc.utf8_length(column)).as_py() for column in there), default=None)
