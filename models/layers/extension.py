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
import re
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import torch

_SOURCES = Path(__file__).parent / "csrc"
_CLOSED = (errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT)  # a home that takes no file
_SERIAL = "-serial-"  # in the name of what runs on one thread
_FLAGS = ("-O3", "-fno-math-errno", "-ffp-contract=fast", "-Wno-psabi")


@functools.cache
def load(name: str) -> tuple[bool, str]:
    """Whether the operators of ``csrc/<name>.cpp`` are there, and why or why not; builds them at the first call."""
    try:
        built = _built(name)
        torch.ops.load_library(str(built))
    except (OSError, RuntimeError, ImportError) as err:
        said = [*re.findall("error: .*", str(err)), *str(err).strip().splitlines(), ""][0]  # the compiler's own first
        told = f"could not be compiled ({type(err).__name__}: {said[:100]})"
        is_closed = getattr(err, "errno", None) in _CLOSED or "home directory" in str(err)
        return False, f"{told}; RNA_CACHE=<folder> names another place for it" if is_closed else told
    return True, f"for this CPU, {'on one thread (no OpenMP), ' if _SERIAL in built.name else ''}{built}"


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
    """Build in a private folder and rename: two processes may do so at once, and a killed one leaves no lock.

    Where the compiler has no OpenMP the operators run on one thread. On macOS too: Apple's has none, and the one of
    another would be a second beside torch's own, which ends the process.
    """
    with tempfile.TemporaryDirectory(dir=stem.parent, prefix=".build-") as folder, _own_programs_found():
        if sys.platform != "darwin":
            try:
                made = _load(source, folder, flags, ["-fopenmp"])
                return made.replace(f"{stem}-{_digest(made)}.so")
            except RuntimeError as err:
                if not _lacks_openmp(str(err)):
                    raise
        made = _load(source, folder, flags, [])
        return made.replace(f"{stem}{_SERIAL}{_digest(made)}.so")


def _lacks_openmp(said: str) -> bool:
    """Whether a build failed for that: its commands, which are repeated, name OpenMP in any case.

    >>> _lacks_openmp("c++ -fopenmp -c scan.cpp -o scan.o\\nclang: error: unsupported option '-fopenmp'")
    True
    >>> _lacks_openmp("c++ -fopenmp -c scan.cpp -o scan.o\\nc++: fatal error: Killed signal terminated program cc1plus")
    False
    """
    return any(re.search("openmp|gomp|lomp|omp[.]h", line) and " -o " not in line for line in said.splitlines())


def _load(source: Path, folder: str, flags: list[str], openmp: list[str]) -> Path:
    from torch.utils import cpp_extension

    cpp_extension.load(
        name=source.stem,
        sources=[str(source)],
        extra_cflags=[*flags, *openmp],
        extra_ldflags=openmp,
        build_directory=folder,
        is_python_module=False,
    )
    [made] = Path(folder).glob("*.so")  # a second one of the same name gets another
    return made


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
