"""C++ operators compiled for this machine's CPU, built once and cached.

The sources are ``csrc/*.cpp``; PyTorch's extension loader compiles one (5 to 20 seconds, once a machine and torch
version) into ``$RNA_CACHE`` or ``~/.cache/rna-competition-pipeline``. Where that cannot be done, `load` says why, and
`models.layers.kernels` goes on to plain PyTorch.
"""

import contextlib
import errno
import functools
import hashlib
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

_SOURCES = Path(__file__).parent / "csrc"
_CLOSED = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT)  # a home that takes no file
_FLAGS = ("-O3", "-fopenmp", "-fno-math-errno", "-ffp-contract=fast", "-Wno-psabi")


@functools.cache
def load(name: str) -> tuple[bool, str]:
    """Whether the operators of ``csrc/<name>.cpp`` are there, and why or why not; builds them at the first call."""
    try:
        built = _built(name)
        torch.ops.load_library(str(built))
    except (OSError, RuntimeError, ImportError) as err:
        told = f"could not be compiled ({type(err).__name__}: {str(err).strip().splitlines()[0][:100]})"
        is_closed = isinstance(err, OSError) and err.errno in _CLOSED
        return False, f"{told}; RNA_CACHE=<folder> names another place for it" if is_closed else told
    return True, f"for this CPU, {built}"


def _built(name: str) -> Path:
    """Path of the shared object, compiled if the cache has no whole one for this source, torch and CPU.

    Its name ends with the digest of what it holds: one that a power cut left torn ended every process by SIGBUS.
    """
    source = _SOURCES / f"{name}.cpp"
    flags = [*_FLAGS, "-march=native"] if platform.machine() in ("x86_64", "AMD64") else list(_FLAGS)
    key = hashlib.sha256("\0".join([source.read_text(), torch.__version__, _cpu(), *flags]).encode()).hexdigest()[:16]
    cache = Path(os.environ.get("RNA_CACHE") or Path.home() / ".cache" / "rna-competition-pipeline")
    for built in cache.glob(f"{name}-{key}-*.so"):
        if built.stem.endswith(_digest(built)):
            return built
    cache.mkdir(parents=True, exist_ok=True)
    return _compile(source, cache / f"{name}-{key}", flags)


def _digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def _compile(source: Path, stem: Path, flags: list[str]) -> Path:
    """Build in a private folder and rename: two processes may do so at once, and a killed one leaves no lock."""
    from torch.utils import cpp_extension

    with tempfile.TemporaryDirectory(dir=stem.parent, prefix=".build-") as folder, _own_programs_found():
        cpp_extension.load(
            name=source.stem,
            sources=[str(source)],
            extra_cflags=flags,
            extra_ldflags=["-fopenmp"],
            build_directory=folder,
            is_python_module=False,
        )
        made = Path(folder, f"{source.stem}.so")
        return made.replace(f"{stem}-{_digest(made)}.so")


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
