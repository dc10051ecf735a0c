"""``make test-faults``: the full soak, and its table in tests/benchmarks/faults.json and faults.md.

python -m tests.faults [--kills 240] [--damages 8] [--seed N] [--out tests/benchmarks]
"""

import argparse
import contextlib
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from models.registry import register_model
from pipeline import runlog
from pipeline.paths import Paths
from pipeline.stage import versions, write_json
from tests.faults import damage, kills, nan, others
from tests.faults.network import PartsModel
from tests.pipeline import before_fork, tiny  # noqa: F401  (imports for all children)

Row = dict[str, Any]


def kill_rows(paths: Paths, *, count: int, seed: int) -> list[Row]:
    """One row for each kind of run that is killed."""
    rows = []
    for one in kills.soak(paths, kills=count, seed=seed):
        places = ", ".join(f"{place} {number}" for place, number in sorted(one["places"].items()))
        happened = f"resumed to the end; {one['lost']} checkpoints lost"
        rows.append(
            {
                "fault": f"SIGKILL: {one['run']}",
                "how": places,
                "count": one["kills"],
                "happened": happened,
                "equal": f"{one['runs'] - one['mismatches']} of {one['runs']} runs",
                "passed": not one["lost"] and not one["mismatches"],
            }
        )
    return rows


def damage_rows(paths: Paths, *, each: int, seed: int) -> list[Row]:
    """One row for each way to damage a checkpoint."""
    return [
        {
            "fault": f"checkpoint {one['damage']}",
            "how": "a file of the newest one, before the run is resumed",
            "count": one["checkpoints"],
            "happened": f"set aside, the older one used; {one['silent']} loaded silently",
            "equal": f"{one['checkpoints'] - one['mismatches']} of {one['checkpoints']}",
            "passed": not one["silent"] and not one["mismatches"],
        }
        for one in damage.soak(paths, each=each, seed=seed)
    ]


def nan_rows(paths: Paths) -> list[Row]:
    """One row for each place where a NaN or inf is put in; such a run ends as a good one, not as the same one."""
    rows = []
    for number, point in enumerate([*nan.NAN_POINTS, *nan.network_points()]):
        found = nan.recover(point, paths, run=f"nan{number}.{tiny.SPLIT}")
        guard = found["guard"]
        answers = [f"{name} {guard[name]}" for name in ("overflows", "skips", "rollbacks") if guard[name]]
        rows.append(
            {
                "fault": f"NaN: {point.name}",
                "how": f"{point.how} ({point.precision})",
                "count": 1,
                "happened": f"{', '.join(answers) or 'nothing'}; finished, all weights and moments finite"
                if found["finished"] and found["finite"]
                else f"not recovered: {found}",
                "equal": "-",
                "passed": bool(answers) and found["finished"] and found["finite"],
            }
        )
    return rows


def other_rows(paths: Paths) -> list[Row]:
    """One row for each of the other faults."""
    kills.fit(paths, others.WHOLE, tiny.config())
    rows = []
    for name in others.FAULTS:
        found = others.check(name, paths)
        rows.append({**found, "count": 1, "equal": f"{int(found['equal'])} of 1", "passed": found["equal"]})
        shutil.rmtree(paths.run_dir(others.RUN))
    return rows


def markdown(rows: list[Row], *, seconds: float) -> str:
    """The table, with its counts."""
    killed = sum(row["count"] for row in rows if row["fault"].startswith("SIGKILL"))
    damaged = sum(row["count"] for row in rows if row["fault"].startswith("checkpoint"))
    points = sum(row["fault"].startswith("NaN") for row in rows)
    failed = [row["fault"] for row in rows if not row["passed"]]
    lines = [
        f"{killed} SIGKILLs, {damaged} damaged checkpoints, {points} places of a NaN; {len(failed)} failed "
        f"({seconds:.0f} s).",
        "",
        "| fault | injected | times | what happened | final state equal |",
        "|---|---|---|---|---|",
    ]
    cells = ("fault", "how", "count", "happened", "equal")
    lines += ["| " + " | ".join(str(row[cell]).replace("|", "/") for cell in cells) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.faults")
    parser.add_argument("--kills", type=int, default=240)
    parser.add_argument("--damages", type=int, default=8, help="times each way to damage a checkpoint is tried")
    parser.add_argument("--seed", type=int, default=time.time_ns() % 2**31, help="of the kills; a new one each time")
    parser.add_argument("--only", action="append", choices=("kills", "damages", "nan", "others"), help="repeatable")
    parser.add_argument("--out", type=Path, default=Path("tests/benchmarks"))
    chosen = parser.parse_args()
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # under nohup it would be ignored, by what is tested too
    torch.set_num_threads(1)  # a forked child of a process with OpenMP threads waits for ever
    for model in (tiny.TinyModel, PartsModel):
        register_model(model)
    runlog.console.quiet = True
    started, rows = time.monotonic(), list[Row]()
    parts: dict[str, Callable[[Paths], list[Row]]] = {
        "kills": lambda paths: kill_rows(paths, count=chosen.kills, seed=chosen.seed),
        "damages": lambda paths: damage_rows(paths, each=chosen.damages, seed=chosen.seed),
        "nan": nan_rows,
        "others": other_rows,
    }
    with tempfile.TemporaryDirectory() as folder:
        for name in chosen.only or parts:
            paths = Paths(comp="tiny", root=Path(folder) / name)
            tiny.write_values(paths)
            rows += parts[name](paths)
    seconds = time.monotonic() - started
    text = markdown(rows, seconds=seconds)
    facts = {"rows": rows, "seed": chosen.seed, "seconds": round(seconds, 1), "versions": versions()}
    write_json(chosen.out / "faults.json", facts)
    (chosen.out / "faults.md").write_text(text)
    with contextlib.suppress(BrokenPipeError):
        sys.stdout.write(text)
    return int(not all(row["passed"] for row in rows))


if __name__ == "__main__":
    raise SystemExit(main())
