"""What limits a process, by every way in which a system says so."""

import os
import resource
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import memory
from pipeline.paths import REPOSITORY


def write(root: Path, files: dict[str, str]) -> None:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text + "\n")


def version2(most: str, now: int, files: int, *, at: str = "") -> dict[str, str]:
    statistics = f"anon 5\ninactive_file {files}"
    return {f"{at}memory.max": most, f"{at}memory.current": str(now), f"{at}memory.stat": statistics}


def version1(most: int, now: int, *, at: str = "") -> dict[str, str]:
    names = (f"memory/{at}memory.{name}" for name in ("limit_in_bytes", "usage_in_bytes", "stat"))
    return dict(zip(names, (str(most), str(now), "total_inactive_file 0"), strict=True))


@pytest.mark.parametrize(
    ("own", "files", "left"),
    [
        ("", version2("1000", 700, 200), {"": 500}),
        ("", version2("max", 700, 200), {}),
        ("", version1(1000, 900), {"memory": 100}),
        ("", version1(800, 900), {"memory": 0}),
        ("", {}, {}),
        ("0::/slurm/job_7", version2("1000", 700, 0, at="slurm/") | version2("max", 9, 0), {"slurm": 300}),
        (
            "0::/slurm/job_7",
            version2("max", 100, 0, at="slurm/job_7/") | {"slurm/job_7/memory.high": "500"},
            {"slurm/job_7": 400},
        ),
        ("1:name=systemd:/\n4:cpu,memory:/job\n0::/", version1(9, 1, at="job/"), {"memory/job": 8}),
        ("4:memory:/docker/0a1b", version1(1000, 900), {"memory": 100}),
    ],
    ids=["2", "2 without", "1", "1 exceeded", "none", "2, of a batch system", "2, slowed", "1, named", "1, in Docker"],
)
def test_control_groups_limit_a_process_wherever_it_is_in_them(
    tmp_path: Path, own: str, files: dict[str, str], left: dict[str, int]
):
    """Was: the root's limit alone, which is a container's; a batch system's job has a group of its own below it."""
    write(tmp_path, files | ({"own": own} if own else {}))
    found = dict(memory._group_bytes(tmp_path / "own", tmp_path))
    assert found == {tmp_path / name: size for name, size in left.items()}


@pytest.mark.parametrize(
    ("own", "files", "cpus"),
    [
        ("0::/", {"cpu.max": "400000 100000"}, 4),
        ("0::/job_7/step", {"job_7/cpu.max": "250000 100000", "job_7/step/cpu.max": "max 100000"}, 2),
        ("0::/", {"cpu.max": "50000 100000"}, 1),
        ("4:cpu,cpuacct:/a", {"cpu/a/cpu.cfs_quota_us": "300000", "cpu/a/cpu.cfs_period_us": "100000"}, 3),
        ("4:cpu:/", {"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, 64),
        ("0::/", {"cpu.max": "max 100000"}, 64),
        ("", {}, 64),
    ],
    ids=["4 of 64", "of a batch system's job", "half a CPU", "version 1", "version 1 without", "without", "no groups"],
)
def test_a_container_that_sees_64_cpus_uses_those_that_it_has_the_time_of(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, own: str, files: dict[str, str], cpus: int
):
    """Was 64: as many threads, and workers of `make bpp`, shared the time of 4 CPUs and waited for each other."""
    write(tmp_path, files | ({"cgroup": own} if own else {}))
    for name in ("_PROCESS", "_GROUPS"):
        monkeypatch.setattr(memory, name, tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)), raising=False)
    assert (memory.usable_cpus(), memory.bound_cpus()) == (cpus, 64)


def test_the_least_of_all_limits_counts_and_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    write(tmp_path, {"cgroup": "0::/job", "meminfo": "MemAvailable: 8 kB"} | version2("7000", 1000, 0, at="job/"))
    write(tmp_path, {"status": "VmSize: 1 kB\nVmData: 1 kB"})
    for name, path in (("_PROCESS", tmp_path), ("_MACHINE", tmp_path / "meminfo"), ("_GROUPS", tmp_path)):
        monkeypatch.setattr(memory, name, path)
    allowed = {resource.RLIMIT_AS: resource.RLIM_INFINITY, resource.RLIMIT_DATA: resource.RLIM_INFINITY}
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (allowed[kind], allowed[kind]))
    assert memory.free_bytes() == (6000, str(tmp_path / "job"))
    assert memory.free_bytes(processes=2) == (3000, str(tmp_path / "job"))
    allowed[resource.RLIMIT_AS] = 5024
    assert [memory.free_bytes(processes=n) for n in (1, 2)] == [(4000, "ulimit -v"), (3000, str(tmp_path / "job"))]
    allowed[resource.RLIMIT_DATA] = 3024
    assert memory.free_bytes(processes=2) == (2000, "ulimit -d")


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere nothing says how much of it is taken")
def test_what_the_shell_allows_is_all_there_is():
    """`ulimit -v` was not seen: a run that had no room began, and ended with "can't allocate memory"."""
    code = "from pipeline.memory import free_bytes; free = free_bytes(); print(free.size, free.limit)"
    command = f"ulimit -v 200000; exec {sys.executable} -c '{code}'"
    done = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True, cwd=REPOSITORY)
    size, limit = done.stdout.strip().split(maxsplit=1)
    assert limit == "ulimit -v"
    assert 2**20 < int(size) < 200_000 * 1024


def test_elsewhere_the_machine_and_the_most_that_was_held_are_what_is_known(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    for name in ("_PROCESS", "_MACHINE", "_GROUPS"):
        monkeypatch.setattr(memory, name, tmp_path / "nothing")
    assert memory.free_bytes().size > 2**28
    assert memory.resident_mib() == memory.peak_memory_mib() > 10
