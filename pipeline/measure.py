"""One measurement, one process: what the benchmarks of kernels and of whole models share.

Needs torch and the standard library alone, so that it also runs where only this repository and torch are.
"""

import gc
import importlib.util
import json
import os
import platform
import re
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch

from pipeline.errors import PipelineError
from pipeline.memory import peak_memory_mib, resident_mib
from pipeline.paths import REPOSITORY
from pipeline.stage import versions, write_json
from pipeline.training.failures import is_out_of_memory

RECORDS = REPOSITORY / "tests" / "benchmarks"
#: The interpreter of the environment that holds the peers; `make bench-kernels` creates it.
PEER_PYTHON = REPOSITORY / ".venv-bench" / "bin" / "python"

_MOST_CALLS, _MOST_TURNS = 30, 200  # however short they are
_OUT_OF_MEMORY = 3  # exit code of a measurement that did not fit


class Promise(NamedTuple):
    """A number that the project promises, and what was found."""

    what: str
    found: float
    wanted: float
    at_most: bool = False  # wanted is the largest that will do, not the smallest

    @property
    def met(self) -> bool:
        return self.found <= self.wanted if self.at_most else self.found >= self.wanted


def machine_class() -> str:
    """What sort of machine this is, and nothing that tells which: ``cpu-2core-avx2``, ``cuda-h100``."""
    if torch.cuda.is_available():
        words = re.split(r"[\s-]+", torch.cuda.get_device_name())
        return f"cuda-{next((word for word in words if re.search(r'[0-9]', word)), words[-1]).lower()}"
    capability = torch.backends.cpu.get_cpu_capability().lower()
    return f"cpu-{os.cpu_count()}core-{platform.machine().lower() if capability == 'default' else capability}"


def load_peer(name: str) -> ModuleType:
    """A module of ``tests/benchmarks/peers``, which is no package."""
    spec = importlib.util.spec_from_file_location(f"peers_{name}", RECORDS / "peers" / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def spawn(module: str, cell: dict[str, Any], *, python: str | Path = sys.executable) -> dict[str, Any] | None:
    """Measure a cell in a process of its own, which runs ``python -m module <cell as JSON>``.

    Returns:
        What it printed as JSON; None if it ran out of memory.

    Raises:
        PipelineError: it failed otherwise.
    """
    threads = cell.get("threads")  # 0: a GPU's, which is told none
    path = os.pathsep.join(filter(None, [str(REPOSITORY), os.environ.get("PYTHONPATH")]))
    environment = {**os.environ, "PYTHONPATH": path, **({"OMP_NUM_THREADS": str(threads)} if threads else {})}
    # waiting threads sleep, as they do in training: spinning ones are slow beside any other process
    environment |= {"RNA_KERNELS": cell.get("kernels", "auto"), "OMP_WAIT_POLICY": "PASSIVE"}
    done = subprocess.run(
        [str(python), "-m", module, json.dumps(cell)],
        capture_output=True,
        text=True,
        check=False,
        cwd=REPOSITORY,
        env=environment,
    )
    if done.returncode in (_OUT_OF_MEMORY, -9):  # the system kills what takes too much
        return None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise PipelineError(
            f"{module}: {cell}: ended with code {done.returncode}: {last}. Next: run it alone to see why."
        )
    return json.loads(done.stdout.splitlines()[-1])


def answer(measure: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """The other side of `spawn`: measure the cell of the command line and print the result."""
    try:
        print(json.dumps(measure(json.loads(sys.argv[1]))))
    except (MemoryError, RuntimeError) as err:  # torch's own out-of-memory errors are RuntimeErrors
        if not is_out_of_memory(err):
            raise
        sys.exit(_OUT_OF_MEMORY)


def interleave(
    cells: Sequence[dict[str, Any]], *, module: str, rounds: int, slow: float = 8.0, pythons: dict[str, Path]
) -> list[dict[str, Any] | None]:
    """Measure all cells in turn, `rounds` times, so that a busy machine is busy for all of them.

    Args:
        cells: JSON-able descriptions; ``python`` names one of `pythons`, otherwise this interpreter runs them.
        module: what measures a cell.
        rounds: how often.
        slow: seconds of one process above which a cell is not repeated.
        pythons: name -> interpreter.

    Returns:
        One dict a cell with the medians of what the rounds gave; None where memory ran out.
    """
    found: list[list[dict[str, Any] | None]] = [[] for _ in cells]
    is_slow = [False] * len(cells)
    for turn in range(rounds):
        for k, cell in enumerate(cells):
            if turn and (is_slow[k] or found[k][0] is None):
                continue
            started = time.monotonic()
            found[k].append(spawn(module, cell, python=pythons.get(cell.get("python", ""), Path(sys.executable))))
            is_slow[k] = time.monotonic() - started > slow
            brief = " ".join(map(str, cell.values()))
            print(f"{turn + 1}/{rounds} {k + 1}/{len(cells)} {brief}: {found[k][-1]}", file=sys.stderr)
    return [_median(results) for results in found]


def _median(results: list[dict[str, Any] | None]) -> dict[str, Any] | None:
    kept = [result for result in results if result is not None]
    if not kept:
        return None
    return {key: statistics.median(result[key] for result in kept) for key in kept[0]}


def seconds(call: Callable[[], Any], *, at_least: float = 0.6) -> float:
    """Median wall seconds of a call; the first one is left out unless it alone takes `at_least` seconds.

    On a GPU it is left out whatever it takes: kernels are compiled in it.
    """
    times: list[float] = []
    if torch.cuda.is_available():
        _once(call)
    while not times or (sum(times) < at_least and len(times) < _MOST_CALLS):
        times.append(_once(call))
    return statistics.median(times[1:] or times)


def in_turn(*calls: Callable[[], Any], at_least: float = 3.0, fewest: int = 5) -> list[list[float]]:
    """Wall seconds of calls that are made in turn, after one that is left out: ratios within a turn see one machine.

    Returns:
        One list a turn, the seconds in the order of the calls; the order in which they are made alternates.
    """
    turns: list[list[float]] = []
    for call in calls:
        _once(call)
    while len(turns) < fewest or (sum(map(sum, turns)) < at_least and len(turns) < _MOST_TURNS):
        step = 1 if len(turns) % 2 else -1
        turns.append([_once(call) for call in calls[::step]][::step])
    return turns


def _once(call: Callable[[], Any]) -> float:
    started = time.perf_counter()
    call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - started


def held_mib() -> float:
    """Memory that is in use now: resident, or allocated on the GPU."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated() / 2**20
    return resident_mib()


def peak_mib() -> float:
    """The most memory that was in use; on the GPU since the last `held_mib`."""
    return torch.cuda.max_memory_allocated() / 2**20 if torch.cuda.is_available() else peak_memory_mib()


def publish(
    rows: Sequence[dict[str, Any]],
    *,
    stem: str,
    promises: Sequence[Promise] = (),
    record: Path | None = None,
    **head: Any,
) -> None:
    """Print rows and promises, and write both below a header that says when, on what and with what they were measured.

    Args:
        rows: of equal keys.
        stem: of the JSON file's name, ``tests/benchmarks/<stem>-<class>.json``.
        promises: what was promised, and found.
        record: another JSON file.
        **head: more of the header.
    """
    _print_table(rows)
    for promise in promises:
        sign = "at most" if promise.at_most else "at least"
        kept = "pass" if promise.met else "FAIL"
        print(f"{kept}  {promise.what}: {promise.found:.3g} ({sign} {promise.wanted:g} wanted)")
    told = [promise._asdict() | {"found": round(promise.found, 3), "met": promise.met} for promise in promises]
    head = {"date": datetime.now(UTC).date().isoformat(), "machine": machine_class(), "versions": versions()} | head
    path = record or RECORDS / f"{stem}-{head['machine']}.json"
    write_json(path, head | {"promises": told, "rows": list(rows)})


def _print_table(rows: Sequence[dict[str, Any]]) -> None:
    """Rows of equal keys as plain text, in columns."""
    cells = [list(rows[0]), *([_shown(value) for value in row.values()] for row in rows)]
    widths = [max(len(line[k]) for line in cells) for k in range(len(cells[0]))]
    for line in cells:
        print("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip())


def _shown(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}"
    return "–" if value is None else str(value)
