"""What this machine has, what of it is usable, and what will therefore be used.

"Installed" is not "usable": a compiled extra counts only after a forward and backward pass on the real device.
"""

import importlib
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path
from typing import Literal, NamedTuple

from pipeline.errors import ConfigError
from pipeline.memory import free_bytes, usable_cpus

_KAGGLE_FILES = ("kaggle.json", "access_token", "access_token.txt")
_KAGGLE_VARIABLES = ("KAGGLE_API_TOKEN", "KAGGLE_KEY")


State = Literal["ok", "absent", "problem"]


class Finding(NamedTuple):
    """One line of the doctor's report."""

    what: str
    state: State
    detail: str  # what was found, and what follows from it


def examine(artifacts: Path) -> list[Finding]:
    """Look at interpreter, devices, optional packages, programs, disk, memory and Kaggle set-up.

    Args:
        artifacts: folder the stages will write to; its disk is the one measured.
    """
    return [
        _python(),
        *_torch(),
        *_fast_kernels(),
        _package("timm", "train.optimizer knows AdamW and Muon alone"),
        _viennarna(),
        _program("mmseqs", "make bench-folds compares with it", "make bench-folds does without it"),
        _program("USalign", "TM-scores can be checked with US-align", "the built-in TM-score is used"),
        *_resources(artifacts),
        *_kaggle(),
    ]


def _python() -> Finding:
    return Finding("Python", "ok", f"{platform.python_version()} on {platform.machine()}, {usable_cpus()} CPUs")


def _torch() -> Iterator[Finding]:
    import torch

    from pipeline.training.precision import choose_device, choose_precision

    yield Finding("torch", "ok", f"{torch.__version__}, threads: {torch.get_num_threads()}")
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            card = torch.cuda.get_device_properties(index)
            memory = card.total_memory / 2**30
            yield Finding("GPU", "ok", f"{card.name}, compute capability {card.major}.{card.minor}, {memory:.0f} GiB")
    else:
        built = f"this torch is built for CUDA {torch.version.cuda}" if torch.version.cuda else "a CPU build of torch"
        yield Finding("GPU", "absent", f"{built}; everything runs on the CPU")
    try:
        precision = choose_precision("auto", choose_device())
    except (ConfigError, RuntimeError) as err:  # CUDA's own say more on further lines
        yield Finding("GPU", "problem", str(err).partition("\n")[0])
    else:
        yield Finding("precision", "ok", f"{precision.name} will be used; {precision.reason}")


def _fast_kernels() -> Iterator[Finding]:
    import torch

    from models.layers import kernels

    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        for operator in kernels.HOMES:
            path, reason = kernels.choose(operator, torch.device(device))
            state: State = "absent" if path == "reference" else "ok"
            yield Finding(operator, state, f"on {device}: {path} ({reason})")


def _package(package: str, otherwise: str) -> Finding:
    if importlib.util.find_spec(package) is None:
        return Finding(package, "absent", f"not installed: {otherwise}")
    try:
        importlib.import_module(package)
    except Exception as err:  # compiled extras raise anything: ImportError, RuntimeError, AttributeError
        return Finding(package, "problem", f"installed but not usable ({type(err).__name__}: {err}): {otherwise}")
    return Finding(package, "ok", f"{metadata.version(package)}, importable")


def _viennarna() -> Finding:
    from pipeline.viennarna import available

    usable, reason = available()
    return Finding("ViennaRNA", "ok" if usable else "absent", reason)


def _program(name: str, with_it: str, without_it: str) -> Finding:
    path = shutil.which(name)
    return Finding(name, "ok", f"{path}: {with_it}") if path else Finding(name, "absent", f"not found: {without_it}")


def _resources(artifacts: Path) -> Iterator[Finding]:
    folder = next(path for path in (artifacts.resolve(), *artifacts.resolve().parents) if path.exists())
    usage = shutil.disk_usage(folder)
    free, total = usage.free / 2**30, usage.total / 2**30
    yield Finding("disk", "ok" if free > 10 else "problem", f"{free:.0f} GiB free of {total:.0f} at {folder}")
    pages, size, room = os.sysconf("SC_PHYS_PAGES"), os.sysconf("SC_PAGE_SIZE"), free_bytes()
    limit = f" (limit: {room.limit})" if room.limit else ""
    yield Finding("memory", "ok", f"{room.size / 2**30:.1f} GiB free{limit} of {pages * size / 2**30:.0f}")


def _kaggle() -> Iterator[Finding]:
    """The program's version and whether credentials lie where it looks; their content is never read.

    The program itself is not started: it calls its service, with the credentials, as soon as it is imported.
    """
    program = shutil.which("kaggle") or str(Path(sys.executable).with_name("kaggle"))
    if not Path(program).exists():
        yield Finding("kaggle", "absent", "not installed: pip install kaggle six, for downloads and submissions")
    elif importlib.util.find_spec("kaggle") is None:
        yield Finding("kaggle", "ok", f"{program}, of another environment than this one")
    elif importlib.util.find_spec("six") is None:
        yield Finding("kaggle", "problem", f"{metadata.version('kaggle')} without the package six, which it imports")
    else:
        yield Finding("kaggle", "ok", metadata.version("kaggle"))
    home = Path(os.path.expanduser("~"))  # Path.home() fails where the system does not know the user
    folders = [Path(os.environ.get("KAGGLE_CONFIG_DIR", home / ".kaggle")), home / ".config" / "kaggle"]
    found = [name for name in _KAGGLE_VARIABLES if os.environ.get(name)]
    found += [str(folder / name) for folder in folders for name in _KAGGLE_FILES if (folder / name).is_file()]
    if found:
        yield Finding("credentials", "ok", f"present ({', '.join(dict.fromkeys(found))}); not read")
    else:
        yield Finding("credentials", "absent", "none found; needed only to download and to submit")
