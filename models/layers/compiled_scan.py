"""The selective scan compiled for this machine's CPU, built once from C++ and cached.

The source is ``csrc/selective_scan.cpp``; PyTorch's extension loader compiles it (10 to 20 seconds, once a machine
and torch version) into ``$RNA_CACHE`` or ``~/.cache/rna-competition-pipeline``. Where that cannot be done, `load` says
why, and `models.layers.kernels` goes on to plain PyTorch.
"""

import contextlib
import functools
import hashlib
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, library

_SOURCE = Path(__file__).parent / "csrc" / "selective_scan.cpp"
_FLAGS = ("-O3", "-fopenmp", "-fno-math-errno", "-ffp-contract=fast", "-Wno-psabi")


@functools.cache
def load() -> tuple[bool, str]:
    """Whether ``torch.ops.rna_scan`` is there, and why or why not; builds it at the first call."""
    try:
        built = _built()
        torch.ops.load_library(str(built))
    except (OSError, RuntimeError, ImportError) as err:
        return False, f"could not be compiled ({type(err).__name__}: {str(err).strip().splitlines()[0][:100]})"
    _register()
    return True, f"compiled for this CPU, {built}"


def _built() -> Path:
    """Path of the shared object, compiled if the cache has none for this source, torch and CPU."""
    flags = [*_FLAGS, "-march=native"] if platform.machine() in ("x86_64", "AMD64") else list(_FLAGS)
    key = hashlib.sha256("\0".join([_SOURCE.read_text(), torch.__version__, _cpu(), *flags]).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("RNA_CACHE", Path.home() / ".cache" / "rna-competition-pipeline"))
    built = cache / f"rna_scan-{key}.so"
    if not built.exists():
        cache.mkdir(parents=True, exist_ok=True)
        _compile(built, flags)
    return built


def _compile(built: Path, flags: list[str]) -> None:
    """Build in a private folder and rename: two processes may do so at once, and a killed one leaves no lock."""
    from torch.utils import cpp_extension

    with tempfile.TemporaryDirectory(dir=built.parent, prefix=".build-") as folder, _own_programs_found():
        cpp_extension.load(
            name="rna_scan",
            sources=[str(_SOURCE)],
            extra_cflags=flags,
            extra_ldflags=["-fopenmp"],
            build_directory=folder,
            is_python_module=False,
        )
        Path(folder, "rna_scan.so").replace(built)


@contextlib.contextmanager
def _own_programs_found() -> Iterator[None]:
    """Let the loader find ninja of this environment, also where the environment was not activated."""
    before = os.environ.get("PATH", "")
    os.environ["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), before])
    try:
        yield
    finally:
        os.environ["PATH"] = before


def _cpu() -> str:
    """What the compiled code may rely on: the CPU's instruction sets, where the system lists them."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())


def _register() -> None:
    """Tell autograd and compilers what the operators of the library do."""

    @library.register_fake("rna_scan::forward")
    def _(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, reverse: bool) -> tuple[Tensor, Tensor]:
        chunks, blocks = -(-u.shape[1] // 32), -(-u.shape[2] // 16)
        return torch.empty_like(u), u.new_empty(u.shape[0], chunks, blocks, A.shape[1], 16)

    @library.register_fake("rna_scan::backward")
    def _(dy: Tensor, u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor, *_: Any) -> Any:
        return tuple(torch.empty_like(x) for x in (u, delta, A, B, C, D))

    register_gradient("rna_scan")


def register_gradient(namespace: str) -> None:
    """Make ``<namespace>::backward`` the gradient of ``<namespace>::forward``, whose second output is for it alone."""

    def save(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
        *tensors, ctx.reverse = inputs
        ctx.save_for_backward(*tensors, output[1])
        ctx.mark_non_differentiable(output[1])

    def backward(ctx: Any, dy: Tensor, _: Tensor) -> tuple[Any, ...]:
        operators = getattr(torch.ops, namespace)
        return *operators.backward(dy.contiguous(), *ctx.saved_tensors, ctx.reverse), None

    library.register_autograd(f"{namespace}::forward", backward, setup_context=save)
