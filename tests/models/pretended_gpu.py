"""A CUDA device that is none, as a plugin of pytest: tensors say that they are on it, and the CPU computes.

PyTorch without CUDA knows its rules all the same: which tensors may meet, what autocast casts, on which thread a
backward pass runs. What it lacks is a device. Here is one, numbers included, so that code for a GPU runs to its end:

- tensors on different devices do not meet, unless one is a single number on the CPU, as on a GPU;
- what makes the program wait for the device (a value read, a copy, a shape that depends on values) is in `waits`;
- dropout draws from random numbers of the device's own;
- what CUDA refuses under deterministic algorithms is refused.

What it cannot show: kernels (cuBLAS, cuDNN, Triton), memory and time. ``tests/models/test_pretended_gpu.py`` starts
pytest with it; hooks have to be there before torch is loaded.
"""

import contextlib
import functools
import traceback
from collections.abc import Callable, Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._library.custom_ops import OPDEFS
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_iter, tree_map_only

#: C++ that tells torch of a device; the file that it is compiled to goes to the linker's LD_PRELOAD
HOOKS = """
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
using c10::Device, c10::DeviceIndex, c10::Stream;
const Device here(c10::DeviceType::CUDA, 0);
struct CUDAHooks : at::CUDAHooksInterface {
  CUDAHooks(at::CUDAHooksArgs) {}
  void init() const override {}
  bool hasCUDA() const override { return true; }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return true; }
  bool hasPrimaryContext(DeviceIndex) const override { return true; }
  DeviceIndex deviceCount() const override { return 1; }
  int getNumGPUs() const override { return 1; }
  DeviceIndex current_device() const override { return 0; }
  DeviceIndex getCurrentDevice() const override { return 0; }
};
struct Guard : c10::impl::NoOpDeviceGuardImpl<c10::DeviceType::CUDA> {
  Device exchangeDevice(Device) const override { return here; }
  Device getDevice() const override { return here; }
  Stream getStream(Device) const noexcept override { return Stream(Stream::DEFAULT, here); }
  Stream exchangeStream(Stream) const noexcept override { return Stream(Stream::DEFAULT, here); }
  void record(void**, const Stream&, const DeviceIndex, const c10::EventFlag) const override {}
  void block(void*, const Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
};
namespace at { using ::CUDAHooks; REGISTER_CUDA_HOOKS(CUDAHooks) }
C10_REGISTER_GUARD_IMPL(CUDA, Guard)
"""

waits: list[str] = []  # "operation file:line" of all that made the program wait for the device

_CPU, _CUDA = torch.device("cpu"), torch.device("cuda", 0)
_aten: Any = torch.ops.aten
#: take tensors of both devices
_MIXED = {_aten.copy_.default, _aten._to_copy.default, _aten._pack_padded_sequence.default}
_MIXED |= {_aten._pad_packed_sequence.default, _aten._pack_padded_sequence_backward.default}
_READS = {_aten._local_scalar_dense.default, _aten.nonzero.default, _aten.masked_select.default, _aten.equal.default}
_BY_INDEX = {_aten.index.Tensor, _aten.index_put.default, _aten.index_put_.default}
#: refused under deterministic algorithms, for floating-point numbers; of all such, what networks use
_UNREPEATABLE = {_aten.cumsum.default, _aten.cumsum_.default, _aten.cumsum.out, _aten.histc.default}
_UNREPEATABLE |= {_aten.nll_loss2d_forward.default, _aten.put_.default, _aten.median.dim}
#: a lazy conjugate or negative is seen by no operation down here
_EAGER = {_aten._conj.default: _aten.conj_physical.default, _aten._neg_view.default: _aten.neg.default}


class OnDevice(Tensor):
    """A tensor on the pretended device."""

    held: Tensor  # its numbers, on the CPU
    __torch_function__ = torch._C._disabled_torch_function_impl

    @staticmethod
    def __new__(cls, held: Tensor) -> "OnDevice":
        layout = {"strides": held.stride(), "storage_offset": held.storage_offset(), "dtype": held.dtype}
        return Tensor._make_wrapper_subclass(cls, held.shape, device=_CUDA, **layout)  # type: ignore[attr-defined]

    def __init__(self, held: Tensor) -> None:
        self.held = held

    def __repr__(self, **_: Any) -> str:
        return f"OnDevice({self.held!r})"

    def __deepcopy__(self, memo: dict[int, Any]) -> Tensor:
        return memo.setdefault(id(self), self.detach().clone().requires_grad_(self.requires_grad))

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.held.detach().__reduce_ex__(protocol)  # files are read onto the CPU

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _compute(func, args, kwargs or {})


class Device(TorchDispatchMode):
    """While this is entered, "cuda" exists."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None:
            return func(*args, **kwargs)  # fake tensors know about devices
        if func.namespace == "rna" and _on_device((args, kwargs)):
            with self:  # our own operators run here as there: what they make, they have to make on the device
                return OPDEFS[func._schema.name]._init_fn(*args, **kwargs)
        return _compute(func, args, kwargs)


def _on_device(tree: Any) -> list[OnDevice]:
    return [x for x in tree_iter(tree) if isinstance(x, OnDevice)]


def _compute(func: Any, args: Any, kwargs: dict[str, Any]) -> Any:
    here, place = _on_device((args, kwargs)), kwargs.get("device")
    elsewhere = [x for x in tree_iter((args, kwargs)) if isinstance(x, Tensor) and x.ndim and x.device.type == "cpu"]
    if here and elsewhere and func not in _MIXED:
        raise RuntimeError(f"{func}: Expected all tensors to be on the same device, but found cuda:0 and cpu")
    onto = bool(here) if place is None else torch.device(place).type == "cuda"
    if func is _aten.copy_.default:
        onto = isinstance(args[0], OnDevice)
    _refuse_what_differs_from_run_to_run(func, here)
    if _waits(func, args, kwargs, here, elsewhere, onto):
        waits.append(f"{func} {_line()}")
    kwargs = kwargs if place is None else kwargs | {"device": _CPU}
    args_held, kwargs_held = tree_map_only(OnDevice, lambda x: x.held, (args, kwargs))
    drawn = onto and torch.Tag.nondeterministic_seeded in func.tags
    with _own_random_numbers() if drawn else contextlib.nullcontext():
        out = _EAGER.get(func, func)(*args_held, **kwargs_held)
    if not onto:
        return out
    known = {id(x.held): x for x in here}  # what was written to is given back as it is
    if func is _aten._pack_padded_sequence.default:  # the sizes stay on the CPU
        return OnDevice(out[0]), out[1]
    return tree_map_only(Tensor, lambda x: known.get(id(x)) if id(x) in known else OnDevice(x), out)


def _refuse_what_differs_from_run_to_run(func: Any, here: list[OnDevice]) -> None:
    strict = torch.are_deterministic_algorithms_enabled()
    if strict and func in _UNREPEATABLE and any(x.is_floating_point() for x in here):
        raise RuntimeError(f"{func} does not have a deterministic implementation")


def _waits(func: Any, args: Any, kwargs: Any, here: list[OnDevice], elsewhere: list[Tensor], onto: bool) -> bool:
    if func in (_aten._to_copy.default, _aten.copy_.default):
        moves = bool(elsewhere) if onto else bool(here)
        return moves and not (kwargs.get("non_blocking") or args[2:] == (True,))
    by_mask = func in _BY_INDEX and any(x is not None and x.dtype == torch.bool for x in args[1])
    return bool(here) and (func in _READS or by_mask)


def _line() -> str:
    """Whose line it was."""
    ours = [f for f in traceback.extract_stack() if "/models/" in f.filename or "/pipeline/" in f.filename]
    ours = [f for f in ours if "/tests/" not in f.filename]
    return f"{'/'.join(ours[-1].filename.rsplit('/', 3)[1:])}:{ours[-1].lineno}" if ours else "?"


# --- random numbers of the device ---

_drawn_from = {"state": torch.Generator().manual_seed(1).get_state()}


@contextlib.contextmanager
def _own_random_numbers() -> Iterator[None]:
    before = torch.get_rng_state()
    torch.set_rng_state(_drawn_from["state"])
    try:
        yield
    finally:
        _drawn_from["state"] = torch.get_rng_state()
        torch.set_rng_state(before)


def _set_state(state: Tensor, device: Any = None) -> None:
    assert not isinstance(state, OnDevice)
    _drawn_from["state"] = state.clone()


def _seed(seed: int) -> None:
    _set_state(torch.Generator().manual_seed(seed).get_state())


# --- what stands above the operations ---


def _by_way_of_the_cpu(function: Callable[..., Any], *, lower: bool) -> Callable[..., Any]:
    """A function that has kernels of its own on CUDA: places and types are checked, and the CPU computes.

    Args:
        function: takes tensors, and lists of them.
        lower: whether autocast lowers its inputs' precision.
    """

    @functools.wraps(function)
    def run(*args: Any, **kwargs: Any) -> Any:
        given = (args, kwargs)
        if not any(x.device.type == "cuda" for x in tree_iter(given) if isinstance(x, Tensor)):
            return function(*args, **kwargs)
        if lower and torch.is_autocast_enabled("cuda"):
            dtype = torch.get_autocast_dtype("cuda")
            given = tree_map_only(Tensor, lambda x: x.to(dtype) if x.is_floating_point() else x, given)
        floats = [x for x in tree_iter(given) if isinstance(x, Tensor) and x.is_floating_point()]
        assert {x.device for x in floats} == {_CUDA}, [x.device for x in floats]
        assert len({x.dtype for x in floats}) == 1, [x.dtype for x in floats]
        args, kwargs = tree_map_only(OnDevice, _Carry.apply, given)
        return tree_map_only(Tensor, _Carry.apply, function(*args, **kwargs))

    return run


class _Carry(torch.autograd.Function):
    """To the other device and, as a gradient, back; nobody waits."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return x.to("cpu" if x.device.type == "cuda" else "cuda", non_blocking=True)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:  # type: ignore[override]
        return _Carry.forward(ctx, grad)


_module_to = nn.Module.to


def _move(self: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
    """Parameters become others, since torch cannot exchange their kind; their marks go with them."""
    if torch._C._nn._parse_to(*args, **kwargs)[0] != torch.device("cuda"):
        return _module_to(self, *args, **kwargs)
    moved: dict[int, nn.Parameter] = {}
    for module in self.modules():
        for name, x in module._parameters.items():
            if x is not None and not isinstance(x, OnDevice):
                moved[id(x)] = moved.get(id(x)) or nn.Parameter(x.detach().to("cuda"), requires_grad=x.requires_grad)
                moved[id(x)].__dict__.update(x.__dict__)
                module._parameters[name] = moved[id(x)]
        module._buffers.update({k: x.to("cuda") for k, x in module._buffers.items() if x is not None})
        if isinstance(module, nn.RNNBase):
            module._flat_weights = [getattr(module, name) for name in module._flat_weights_names]
    return self


_NAME, _MEMORY = "Pretended P1", 80 * 2**30
_TOLD: dict[str, Any] = {
    "is_available": True,
    "is_initialized": True,
    "is_bf16_supported": True,
    "is_current_stream_capturing": False,
    "device_count": 1,
    "current_device": 0,
    "get_device_capability": (8, 0),
    "get_device_name": _NAME,
    "get_device_properties": SimpleNamespace(name=_NAME, major=8, minor=0, total_memory=_MEMORY),
    "mem_get_info": (_MEMORY, _MEMORY),
    **dict.fromkeys(("memory_allocated", "memory_reserved", "max_memory_allocated"), 0),
    **dict.fromkeys(("_lazy_init", "init", "set_device", "synchronize", "empty_cache", "reset_peak_memory_stats")),
}


def pytest_configure() -> None:
    """Replace what asks for a driver."""
    for name, value in _TOLD.items():
        setattr(torch.cuda, name, lambda *_, value=value, **__: value)
    torch.cuda._initialized = True
    torch.backends.cudnn.is_acceptable = lambda *_: False  # type: ignore[assignment]
    torch.cuda.get_rng_state = lambda *_: _drawn_from["state"].clone()  # type: ignore[assignment]
    torch.cuda.set_rng_state = _set_state  # type: ignore[assignment]
    torch.cuda.manual_seed = torch.cuda.manual_seed_all = _seed  # type: ignore[assignment]
    torch.cuda.device = torch.cuda.device_of = lambda *_: contextlib.nullcontext()  # type: ignore
    Tensor.pin_memory = Tensor.clone  # type: ignore[assignment]
    nn.Module.to = _move  # type: ignore[assignment]
    F.scaled_dot_product_attention = _by_way_of_the_cpu(F.scaled_dot_product_attention, lower=True)  # type: ignore
    torch._VF.gru = _by_way_of_the_cpu(torch._VF.gru, lower=False)  # type: ignore[attr-defined]


@pytest.hookimpl(wrapper=True)
def pytest_runtest_setup(item: Any) -> Iterator[Any]:
    """What is asked of a GPU before a test."""
    with Device():
        return (yield)


@pytest.hookimpl(wrapper=True)
def pytest_pyfunc_call(pyfuncitem: Any) -> Iterator[Any]:
    """Every test runs where the device exists."""
    waits.clear()
    with Device():
        return (yield)
