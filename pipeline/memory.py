"""What this process may have of memory and CPUs, and what it holds; needs the standard library alone."""

import contextlib
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

_PROCESS, _MACHINE = Path("/proc/self"), Path("/proc/meminfo")
_GROUPS = Path("/sys/fs/cgroup")
_FILES = (  # of a control group, by both versions of the interface: limits, what is used, what of it can be dropped
    (("memory.max", "memory.high"), "memory.current", "inactive_file"),
    (("memory.limit_in_bytes",), "memory.usage_in_bytes", "total_inactive_file"),
)


class Free(NamedTuple):
    """Memory that a process could take, and what keeps it from more."""

    size: int  # bytes
    limit: str  # empty: the machine has no more


def free_bytes(*, processes: int = 1) -> Free:
    """Memory that each of so many processes like this one could take.

    They share what the machine and its control groups (containers, batch systems) have left; what the shell allows
    (``ulimit -v`` and ``-d``) is each one's own.
    """
    found = [Free(_machine_bytes() // processes, "")]
    found += [Free(left // processes, str(folder)) for folder, left in _group_bytes(_PROCESS / "cgroup", _GROUPS)]
    return min([*found, *_allowed_bytes()], key=lambda free: free.size)


def bound_cpus() -> int:
    """CPUs that this process may run on; all there are where the system does not say (macOS)."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def usable_cpus() -> int:
    """Of these as many as its control groups give time for: a container may see 64, and have the time of 4."""
    return max(1, min([bound_cpus(), *_group_cpus(_PROCESS / "cgroup", _GROUPS)]))


def _group_cpus(own: Path, root: Path) -> Iterator[int]:
    """CPUs that each group's quota of time comes to, rounded down; arguments as `_groups` takes them."""
    for group in _groups(own, root, "cpu"):
        with contextlib.suppress(OSError, ValueError):  # "max": no quota
            quota, period = (group / "cpu.max").read_text().split()
            yield int(quota) // int(period)
        with contextlib.suppress(OSError):
            quota, period = ((group / f"cpu.cfs_{name}_us").read_text() for name in ("quota", "period"))
            if int(quota) > 0:
                yield int(quota) // int(period)


def _machine_bytes() -> int:
    try:
        lines = _MACHINE.read_text().splitlines()
    except OSError:  # not Linux
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("MemAvailable:"))


def _group_bytes(own: Path, root: Path) -> Iterator[tuple[Path, int]]:
    """What the control groups that this process is in have left, each with its folder; arguments as of `_groups`."""
    for group in _groups(own, root, "memory"):
        yield from ((group, left) for left in _left(group))


def _groups(own: Path, root: Path, controller: str) -> Iterator[Path]:
    """Folders of the control groups that this process is in, by both versions of the interface.

    Args:
        own: what the system says of the process: lines of number, controllers and path.
        root: where the groups are mounted; that of a container is the root itself, whatever the path.
        controller: of what the groups share out.
    """
    lines = own.read_text().splitlines() if own.is_file() else []
    paths = {controllers: path for _, controllers, path in (line.split(":", 2) for line in lines)}
    of_controller = next((path for names, path in paths.items() if controller in names.split(",")), "/")
    for top, path in ((root, paths.get("", "/")), (root / controller, of_controller)):
        folder = top / path.lstrip("/")
        for group in (folder, *folder.parents):
            if group.is_relative_to(top):
                yield group


def _left(group: Path) -> Iterator[int]:
    for limits, used, dropped in _FILES:
        try:
            now = int((group / used).read_text())
            statistics = dict(line.split() for line in (group / "memory.stat").read_text().splitlines())
        except (OSError, ValueError):  # no such interface here, or no group: a container sees its own alone
            continue
        for limit in filter(Path.is_file, (group / name for name in limits)):
            most = limit.read_text().strip()
            if most != "max":
                yield max(0, int(most) - now + int(statistics.get(dropped, 0)))


def _allowed_bytes() -> Iterator[Free]:
    """What is left of the shell's limits, where the system says how much of them is taken."""
    import resource

    for name, kind, key in (("-v", resource.RLIMIT_AS, "VmSize"), ("-d", resource.RLIMIT_DATA, "VmData")):
        most, taken = resource.getrlimit(kind)[0], _status_bytes(key)
        if most != resource.RLIM_INFINITY and taken is not None:
            yield Free(max(0, most - taken), f"ulimit {name}")


def resident_mib() -> float:
    """Memory that this process has now, MiB; where the system does not say, the most that it had."""
    return (_status_bytes("VmRSS") or _peak_bytes()) / 2**20


def peak_memory_mib() -> float:
    """Largest resident memory of this process so far, MiB."""
    # on Linux ru_maxrss begins with the peak of the process that started this one
    return (_status_bytes("VmHWM") or _peak_bytes()) / 2**20


def _status_bytes(key: str) -> int | None:
    """A size that Linux tells of this process; None elsewhere."""
    try:
        lines = (_PROCESS / "status").read_text().splitlines()
    except OSError:
        return None
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:")), None)


def _peak_bytes() -> int:
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
