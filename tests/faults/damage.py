"""Checkpoints damaged in every way, and what a run that starts again makes of them."""

import contextlib
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.errors import StoppedError
from pipeline.paths import Paths
from pipeline.training.checkpoint import CheckpointStore
from tests.faults.kills import fit
from tests.pipeline import tiny

FILES = ("model.safetensors", "training.safetensors", "state.pt", "meta.json")
_STOPPED_AT = 8  # of twelve steps; checkpoints of steps 6 and 8 are there


def cut(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes()[: rng.randrange(1, path.stat().st_size)])


def flip(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
    path.write_bytes(data)


def zero(path: Path, rng: random.Random) -> None:
    data = bytearray(path.read_bytes())
    start = rng.randrange(len(data) // 2)
    data[start:] = bytes(len(data) - start)
    path.write_bytes(data)


def empty(path: Path, _rng: random.Random) -> None:
    path.write_bytes(b"")


def lengthen(path: Path, rng: random.Random) -> None:
    path.write_bytes(path.read_bytes() + rng.randbytes(rng.randrange(1, 100)))


def remove(path: Path, _rng: random.Random) -> None:
    path.unlink()


def swap(path: Path, _rng: random.Random) -> None:
    """The same file of an older checkpoint: whole, and of another step."""
    older = sorted(path.parent.parent.glob("step-*"))[0]
    shutil.copy(older / path.name, path)


DAMAGES: dict[str, Callable[[Path, random.Random], None]] = {
    "cut": cut,
    "one bit flipped": flip,
    "zeroed from somewhere on": zero,
    "emptied": empty,
    "lengthened": lengthen,
    "removed": remove,
    "replaced by an older one": swap,
}


def soak(paths: Paths, *, each: int, seed: int) -> list[dict[str, Any]]:
    """Damage a file of the newest checkpoint in every way, `each` times; every run goes on and is compared."""
    rng = random.Random(seed)
    whole, stopped = f"whole.{tiny.SPLIT}", f"stopped.{tiny.SPLIT}"
    fit(paths, whole, tiny.config())
    with contextlib.suppress(StoppedError):
        fit(paths, stopped, tiny.config(), max_steps=_STOPPED_AT)
    expected = tiny.final_bytes(paths, whole)
    folder = paths.fold_dir(stopped, 0)
    copy = folder.with_name("copy")
    folder.rename(copy)
    rows = []
    for index, (name, damage) in enumerate(DAMAGES.items()):
        row = {"damage": name, "checkpoints": 0, "silent": 0, "mismatches": 0}
        for number in range(index, index + each):
            file = FILES[number % len(FILES)]
            shutil.copytree(copy, folder)
            newest = next(iter(CheckpointStore(folder / "checkpoints").steps().values()))
            damage(newest / file, rng)
            fit(paths, stopped, tiny.config())
            row["checkpoints"] += 1
            row["silent"] += not (folder / "checkpoints" / "bad" / newest.name / "reason.txt").is_file()
            row["mismatches"] += tiny.final_bytes(paths, stopped) != expected
            shutil.rmtree(folder)
        rows.append(row)
    return rows
