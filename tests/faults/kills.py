"""Runs that are killed again and again, at chosen and at random moments; run in a process of its own, which forks."""

import contextlib
import itertools
import os
import random
import shutil
import signal
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from pipeline import train
from pipeline.competitions.base import Competition
from pipeline.config import RunConfig
from pipeline.paths import Paths
from pipeline.training.checkpoint import CheckpointStore, load_checkpoint
from tests.pipeline import tiny

#: What is killed, by name: settings of a run of twelve steps.
RUNS: dict[str, dict[str, Any]] = {
    "fp32, averaged weights": {},
    "bf16": {"precision": "bf16"},
    "fp16 and scaler": {"precision": "fp16"},
    "micro-batches": {"micro_batch": 3},
    "micro-batches, fp16, no average": {"micro_batch": 3, "precision": "fp16", "ema_decay": 0.0},
    "Muon, averaged weights": {"optimizer": "muon"},
    "Muon, micro-batches, fp16": {"optimizer": "muon", "micro_batch": 3, "precision": "fp16"},
    "two loader workers": {"workers": 2, "data": {"flip": 0.5, "max_length": 25}},
    "flipped and cropped, a save each step": {"data": {"flip": 0.5, "max_length": 25}, "save_every": 1},
}

#: Where a process kills itself -> the highest count at which it may.
PLACES = {"forward": 12, "update": 12, "fsync": 30, "rename": 10, "remove": 6, "evaluation": 3, "clock": 1}
_IN_A_ROW = 6  # kills of one run at most
_LONGEST_S = 0.4  # of a process that a clock kills


@dataclass(frozen=True)
class Kill:
    """Where a process is killed."""

    place: str
    count: int = 1  # how often it gets there before
    seconds: float = 0.0  # for "clock"


def draw(rng: random.Random) -> Kill:
    """A random kill; the first batch and the first save come up as often as the others."""
    place = rng.choice(list(PLACES))
    return Kill(place, rng.randint(1, PLACES[place]), rng.uniform(0, _LONGEST_S))


def fit(paths: Paths, run: str, config: RunConfig, *, competition: Competition = tiny.TINY, **options: Any) -> None:
    """Train to the end, or as far as the options say."""
    train.run(config, competition=competition, paths=paths, run=run, split=tiny.SPLIT, fold=0, **options)


@contextlib.contextmanager
def armed(kill: Kill) -> Iterator[Competition]:
    """This process dies by SIGKILL at a place; gives the competition to train, whose score may be that place."""
    count = itertools.count(1)

    def die(*_: Any) -> None:
        if next(count) == kill.count:
            os.kill(os.getpid(), signal.SIGKILL)

    def before(call: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **options: (die(), call(*args, **options))[1]

    competition = tiny.TINY
    if kill.place == "forward":
        tiny.Fault.inject = staticmethod(lambda x_BLD: (die(), x_BLD)[1])
    elif kill.place == "update":
        torch.optim.AdamW.step = before(torch.optim.AdamW.step)  # type: ignore[method-assign]
    elif kill.place == "remove":
        shutil.rmtree = before(shutil.rmtree)  # type: ignore[assignment]
    elif kill.place == "clock":
        threading.Timer(kill.seconds, die).start()
    elif kill.place == "evaluation":

        def error_sums(predicted: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
            die()
            return tiny.TINY.error_sums(predicted, truth)  # type: ignore[misc]

        competition = replace(tiny.TINY, error_sums=error_sums)
    else:
        setattr(os, kill.place, before(getattr(os, kill.place)))
    yield competition


def in_child(paths: Paths, run: str, config: RunConfig, kill: Kill | None = None) -> bool:
    """Train in a forked process that may have to die; whether it did, or had ended before.

    The parent never trains: where torch is built for CUDA its gradients have threads, which no child can go on with.

    Raises:
        AssertionError: the process failed in some other way.
    """
    pid = os.fork()
    if pid == 0:
        code = 1
        try:
            with armed(kill) if kill else contextlib.nullcontext(tiny.TINY) as competition:
                fit(paths, run, config, competition=competition)
            code = 0
        finally:
            os._exit(code)
    status = os.waitpid(pid, 0)[1]
    assert status in (0, signal.SIGKILL), f"{kill}: the process ended with {os.waitstatus_to_exitcode(status)}"
    return status == signal.SIGKILL


def committed(store: CheckpointStore) -> list[int]:
    """Steps of all checkpoints, each read and verified."""
    return [load_checkpoint(path).meta["step"] for path in store.steps().values()]


def soak(paths: Paths, *, kills: int, seed: int) -> list[dict[str, Any]]:
    """Kill runs until that was done `kills` times; every run is then finished and compared with one left alone."""
    rng, in_a_row = random.Random(seed), min(_IN_A_ROW, -(-kills // len(RUNS)))
    rows = {name: {"run": name, "runs": 0, "kills": 0, "lost": 0, "mismatches": 0, "places": {}} for name in RUNS}
    for name in RUNS:
        in_child(paths, _whole(name), tiny.config(**RUNS[name]))
    for number in itertools.count():
        name = list(RUNS)[number % len(RUNS)]
        row, run, config = rows[name], f"killed{number}.{tiny.SPLIT}", tiny.config(**RUNS[name])
        store = CheckpointStore(paths.fold_dir(run, 0) / "checkpoints")
        newest = -1
        for _ in range(in_a_row):
            kill = draw(rng)
            if not in_child(paths, run, config, kill):
                break
            row["kills"] += 1
            row["places"][kill.place] = row["places"].get(kill.place, 0) + 1
            step = max(committed(store), default=-1)
            row["lost"] += step < newest
            newest = max(newest, step)
        in_child(paths, run, config)
        row["runs"] += 1
        row["mismatches"] += tiny.final_bytes(paths, run) != tiny.final_bytes(paths, _whole(name))
        shutil.rmtree(paths.fold_dir(run, 0))
        if number >= len(RUNS) - 1 and sum(one["kills"] for one in rows.values()) >= kills:
            return list(rows.values())
    raise AssertionError


def _whole(name: str) -> str:
    return f"whole{list(RUNS).index(name)}.{tiny.SPLIT}"
