"""Training in several processes, for the tests: ``python -m tests.pipeline.ranks <root> <script>``.

One process imports torch once and forks the ranks of every scene; or torchrun starts this with RANK set.
"""

import contextlib
import itertools
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from models.registry import create_model, register_model
from pipeline import runlog, train
from pipeline.competitions import competition_of
from pipeline.config import RunConfig, load_config
from pipeline.errors import BusyError, DataError, DivergedError, PipelineError, StorageError
from pipeline.paths import Paths
from pipeline.plan import make_plan
from pipeline.runlog import read_metrics
from pipeline.training.checkpoint import CheckpointStore
from pipeline.training.distributed import join
from pipeline.training.loader import Loader
from pipeline.training.metrics import ErrorMeter
from tests.pipeline import before_fork, tiny  # noqa: F401  (imports for all children)

ROOT = Path(__file__).resolve().parents[2]
#: Name of a run, how many processes, settings, fault. A run that is named again goes on, with other settings if so.
#: Settings are those of `tiny.config`; or ``of``, a competition, with ``set``, overrides of the config ``tiny_hyena``.
Scene = tuple[str, int, dict[str, Any], list[Any] | None]

TIMEOUT_S, LONG_S = 3.0, 600.0  # where a process hangs, and elsewhere: a busy machine must not look like that
#: What can fail in one process alone: which call, and what it raises.
RAISED: dict[str, tuple[Any, str, Exception]] = {
    "lock": (train, "run_lock", BusyError("process 1 is at work here. Next: wait.")),
    "tables": (train, "load_data", DataError("the tables are gone. Next: make data.")),
    "worker": (Loader, "take", DataError("a loader worker died, twice. Next: no workers.")),
    "prediction": (ErrorMeter, "add", DivergedError("a prediction is not finite. Next: fp32.")),
    "disk": (CheckpointStore, "save", StorageError("the disk is full. Next: free space.")),
    "permission": (train, "drop_rows_after", PermissionError(13, "Permission denied", "metrics.jsonl")),
}
MERCY_S = 60.0  # for the others to end, once one has; where one hangs there is nothing to wait for


def scene(
    paths: Paths, *, run: str, config: dict[str, Any], fault: list[Any] | None, timeout: float = LONG_S, **options: Any
) -> int:
    """Train as one of the ranks; the exit code. `fault` is what happens: [rank, forward pass, what]."""
    runlog.console.quiet = False
    if fault and fault[0] == int(os.environ.get("RANK", "0")):
        arm(*fault[1:])
    known = {one.name: one for one in (tiny.TINY, tiny.TINY3D)}
    competition = known.get(paths.comp) or competition_of(paths)
    settings = settings_of(config)
    try:
        with join(timeout=timeout) as world:
            where = {"competition": competition, "paths": paths, "run": run, "split": tiny.SPLIT, "fold": 0}
            train.run(settings, **where, **options, world=world)
    except (PipelineError, OSError) as err:
        if not runlog.console.quiet:
            sys.stderr.write(f"{os.environ.get('RANK')}: {type(err).__name__}: {err}\n")
        return getattr(err, "exit_code", StorageError.exit_code)  # as the command line does
    return 0


def settings_of(config: dict[str, Any]) -> RunConfig:
    return load_config("tiny_hyena", config["set"]) if "set" in config else tiny.config(**config)


def plan_once(configs: Sequence[dict[str, Any]]) -> None:
    """Plan the memory of each network, before a fork: what torch learns of its operators takes half a child's time."""
    models = {repr(settings.model): settings for settings in map(settings_of, configs)}
    for settings in models.values():
        make_plan(settings, partial(create_model, settings.model.name, **settings.model.kwargs), length=30)


def arm(at: int, what: str) -> None:
    """Let something happen in this process: in one forward pass of training, or in one call of `RAISED`."""
    if what == "nan gradient":
        nn.Linear.forward = spoils_gradient(at)  # type: ignore[method-assign]
        return
    if what not in RAISED:
        tiny.Fault.inject = staticmethod(happens(at, what))
        return
    owner, name, error = RAISED[what]
    call, count = getattr(owner, name), itertools.count(1)

    def faulty(*args: Any, **options: Any) -> Any:
        if next(count) == at:
            raise error
        return call(*args, **options)

    setattr(owner, name, faulty)


def spoils_gradient(at: int) -> Callable[[nn.Linear, Tensor], Tensor]:
    """A NaN that is in no tensor but a weight's gradient, in one pass of training and when it is traced."""
    forward, count = nn.Linear.forward, itertools.count(1)

    def spoiling(self: nn.Linear, x: Tensor) -> Tensor:
        planned = isinstance(x, FakeTensor)  # the memory plan's pass, which is no step
        if self.training and not planned and next(count) in (at, at + 1):
            handle = self.weight.register_hook(lambda grad: (handle.remove(), grad * float("nan"))[1])
        return forward(self, x)

    return spoiling


def happens(at: int, what: str) -> Any:
    """Something in one forward pass of training."""
    count = itertools.count(1)

    def inject(x_BLD: Tensor) -> Tensor:
        number = next(count)
        if what == "nan" and number in (at, at + 1):  # again when it is traced
            return x_BLD * float("nan")
        if number == at and what == "hang":
            time.sleep(24 * 3600)
        elif number == at and what == "memory":
            raise MemoryError("CUDA out of memory")
        elif number == at and what == "device":
            raise torch.AcceleratorError("CUDA error: an illegal memory access was encountered")
        elif number == at - 3 and what == "SIGTERM after a hang-up":
            os.kill(os.getppid(), signal.SIGHUP)
        elif number == at and what.startswith("SIG"):
            os.kill(os.getpid(), signal.Signals[what.split()[0]])
        return x_BLD

    return inject


def free_port() -> int:
    """A port that nobody listens to, below those that the system hands out by itself; each process has twelve."""
    first = 20_000 + os.getpid() % 1000 * 12
    for port in range(first, first + 12):
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)  # as the store does, which takes it next
            probe.bind(("", port))
            return port
    raise AssertionError(f"ports {first} to {first + 11} are all in use")


def fork_ranks(size: int, root: str, *, mercy: float = MERCY_S, **options: Any) -> dict[str, Any]:
    """Exit codes of all ranks and seconds, by fork."""
    port, started, pids = free_port(), time.monotonic(), list[int]()
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                where = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1"}
                os.environ.update({name: str(value) for name, value in {**where, "MASTER_PORT": port}.items()})
                code = scene(paths_of(Path(root), options["config"]), **options)
            except Exception:
                traceback.print_exc()
            finally:
                os._exit(code)
        pids.append(pid)
    codes: dict[int, int] = {}
    first, timer = 0.0, threading.Timer(mercy, end, args=(pids, codes))
    for _ in pids:
        pid, status = os.wait()
        codes[pids.index(pid)] = os.waitstatus_to_exitcode(status)
        if len(codes) == 1:
            first = time.monotonic()
            timer.start()
    last = time.monotonic()
    timer.cancel()
    timer.join()  # the next ranks are forked from a process of one thread
    return {
        "codes": [codes[rank] for rank in range(size)],
        "seconds": last - started,
        "after_first": last - first,
    }


def fork_hung_ranks(size: int, root: str, **options: Any) -> dict[str, Any]:
    """As `fork_ranks`, where one is to hang; with more patience where a busy machine looked like that before it did."""
    for doubled in range(7):
        found = fork_ranks(size, root, mercy=0.0, timeout=TIMEOUT_S * 2**doubled, **options)
        if -signal.SIGKILL in found["codes"]:
            break
    return found


def end(pids: list[int], codes: dict[int, int]) -> None:
    """What torchrun does with the others when one has ended."""
    for rank, pid in enumerate(pids):
        if rank not in codes:
            os.kill(pid, signal.SIGKILL)


def play(paths: Paths, scenes: Sequence[Scene]) -> Callable[[str], list[dict[str, Any]]]:
    """Start what the scenes say; the result gives the ends of a run's starts. Where one hangs the others go on."""
    begun: dict[str, dict[str, Any]] = {}
    groups: dict[bool, list[dict[str, Any]]] = {True: [], False: []}
    for name, size, config, fault in scenes:
        changed = begun.setdefault(name, config) != config
        one = {"run": run_name(name), "size": size, "config": config, "fault": fault, "allow_changes": changed}
        groups[bool(fault) and fault[2] == "hang"].append(one)
        begun[name] = config

    def start(script: list[dict[str, Any]]) -> list[dict[str, Any]]:
        command = [sys.executable, "-m", "tests.pipeline.ranks", str(paths.root), json.dumps(script)]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr
        told = done.stdout.splitlines()[-1]  # above it gloo of torch 2.10 says who is connected
        found = zip(json.loads(told), script, strict=True)
        return [one | {"run": scene["run"], "said": done.stderr} for one, scene in found]

    with ThreadPoolExecutor() as pool:
        ends = list(itertools.chain(*pool.map(start, groups.values())))
    return lambda name: [end for end in ends if end["run"] == run_name(name)]


def fixtures(scenes: Sequence[Scene]) -> tuple[Any, Any]:
    """``paths, ended = fixtures(scenes)`` in a test module: where its scenes are played, and how each start ended."""
    import pytest  # here, as no process needs it

    @pytest.fixture(scope="module")
    def paths(tmp_path_factory: pytest.TempPathFactory) -> Paths:
        paths = Paths(comp="tiny", root=tmp_path_factory.mktemp("ranks"))
        tiny.write_values(paths)
        return paths

    @pytest.fixture(scope="module")
    def ended(paths: Paths) -> Callable[[str], list[dict[str, Any]]]:
        return play(paths, scenes)

    return paths, ended


def paths_of(root: Path, config: dict[str, Any]) -> Paths:
    """Where the tables of a scene are."""
    return Paths(comp=config.get("of", "tiny"), root=root)


def run_name(name: str) -> str:
    return f"{name.replace(' ', '-')}.{tiny.SPLIT}"


def codes(ends: list[dict[str, Any]]) -> list[list[int]]:
    return [end["codes"] for end in ends]


def rows(paths: Paths, name: str, event: str) -> list[dict[str, Any]]:
    found = read_metrics(paths.fold_dir(run_name(name), 0) / "metrics.jsonl")
    return [row for row in found if row["event"] == event]


def losses(paths: Paths, name: str) -> list[float]:
    return [row["loss"] for row in rows(paths, name, "step")]


def everything(paths: Paths, name: str) -> dict[str, bytes]:
    """The last checkpoint, the random numbers of the second process among it."""
    last = CheckpointStore(paths.fold_dir(run_name(name), 0) / "checkpoints").load_newest()
    assert last is not None
    (elsewhere,) = last.state["random_elsewhere"]
    assert not torch.equal(elsewhere["cpu"], last.state["random"]["cpu"]), "each process has random numbers of its own"
    return tiny.final_bytes(paths, run_name(name)) | {"elsewhere": elsewhere["cpu"].numpy().tobytes()}


def main() -> int:
    register_model(tiny.TinyModel)
    runlog.console.quiet = runlog.output.quiet = True
    root, script = sys.argv[1:]
    if "RANK" in os.environ:
        options = json.loads(script)
        return scene(paths_of(Path(root), options["config"]), **options)
    found, scenes = [], json.loads(script)
    plan_once([one["config"] for one in scenes])
    for one in scenes:
        fork = fork_hung_ranks if one["fault"] and one["fault"][2] == "hang" else fork_ranks
        found.append(fork(one.pop("size"), root, **one))
    sys.stdout.write(json.dumps(found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
