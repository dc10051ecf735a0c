"""Training in several processes, for the tests: ``python -m tests.pipeline.ranks <root> <script>``.

One process imports torch once and forks the ranks of every scene; or torchrun starts this with RANK set.
"""

import itertools
import json
import os
import signal
import socket
import sys
import threading
import time
import traceback
from pathlib import Path
from typing import Any

from torch import Tensor

from models.registry import register_model
from pipeline import runlog, train
from pipeline.errors import PipelineError
from pipeline.paths import Paths
from pipeline.training.distributed import join
from tests.pipeline import tiny

TIMEOUT_S = 3.0  # where a process hangs; elsewhere a busy machine must not look like that
MERCY_S = 2.0


def scene(paths: Paths, *, run: str, config: dict[str, Any], fault: list[Any] | None, **options: Any) -> int:
    """Train as one of the ranks; the exit code. `fault` is what happens: [rank, forward pass, what]."""
    if fault and fault[0] == int(os.environ.get("RANK", "0")):
        tiny.Fault.inject = staticmethod(happens(*fault[1:]))
    try:
        with join(timeout=TIMEOUT_S if fault and fault[2] == "hang" else 60.0) as world:
            where = {"competition": tiny.TINY, "paths": paths, "run": run, "split": tiny.SPLIT, "fold": 0}
            train.run(tiny.config(**config), **where, **options, world=world)
    except PipelineError as err:
        sys.stderr.write(f"{os.environ.get('RANK')}: {type(err).__name__}: {err}\n")
        return err.exit_code
    return 0


def happens(at: int, what: str) -> Any:
    """Something in one forward pass of training."""
    count = itertools.count(1)

    def inject(x_BLD: Tensor) -> Tensor:
        number = next(count)
        if what == "nan" and number in (at, at + 1):  # again when it is traced
            return x_BLD * float("nan")
        if number == at and what == "hang":
            time.sleep(60)
        elif number == at and what == "memory":
            raise MemoryError("CUDA out of memory")
        elif number == at - 3 and what == "SIGTERM after a hang-up":
            os.kill(os.getppid(), signal.SIGHUP)
        elif number == at and what.startswith("SIG"):
            os.kill(os.getpid(), signal.Signals[what.split()[0]])
        return x_BLD

    return inject


def fork_ranks(size: int, root: str, **options: Any) -> dict[str, Any]:
    """Exit codes of all ranks and seconds, by fork."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    started, pids = time.monotonic(), []
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                where = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank, "MASTER_ADDR": "127.0.0.1"}
                os.environ.update({name: str(value) for name, value in {**where, "MASTER_PORT": port}.items()})
                code = scene(Paths(comp="tiny", root=Path(root)), **options)
            except Exception:
                traceback.print_exc()
            finally:
                os._exit(code)
        pids.append(pid)
    codes: dict[int, int] = {}
    first = 0.0
    for _ in pids:
        pid, status = os.wait()
        codes[pids.index(pid)] = os.waitstatus_to_exitcode(status)
        if len(codes) == 1:
            first = time.monotonic()
            threading.Timer(MERCY_S, end, args=(pids, codes)).start()
    last = time.monotonic()
    return {
        "codes": [codes[rank] for rank in range(size)],
        "seconds": last - started,
        "after_first": last - first,
    }


def end(pids: list[int], codes: dict[int, int]) -> None:
    """What torchrun does with the others when one has ended."""
    for rank, pid in enumerate(pids):
        if rank not in codes:
            os.kill(pid, signal.SIGKILL)


def main() -> int:
    register_model(tiny.TinyModel)
    runlog.console.quiet = runlog.output.quiet = True
    root, script = sys.argv[1:]
    if "RANK" in os.environ:
        return scene(Paths(comp="tiny", root=Path(root)), **json.loads(script))
    found = [fork_ranks(one.pop("size"), root, **one) for one in json.loads(script)]
    sys.stdout.write(json.dumps(found) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
