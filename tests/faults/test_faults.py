"""The fast form of ``make test-faults``: every kind of fault once, a few kills. The soak: python -m tests.faults."""

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from models import registry
from pipeline import runlog
from pipeline.paths import Paths
from tests.faults import damage, kills, nan, others
from tests.faults.network import PartsModel
from tests.pipeline import tiny

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def paths(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Paths]:
    """Tables, the tiny networks, and a run that was left alone."""
    paths = Paths(comp="tiny", root=tmp_path_factory.mktemp("faults"))
    tiny.write_values(paths)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runlog.console, "quiet", True)
        patch.setattr(registry, "_MODELS", dict(registry._MODELS))
        for model in (tiny.TinyModel, PartsModel):
            registry.register_model(model)
        kills.fit(paths, others.WHOLE, tiny.config())
        yield paths


def test_runs_killed_at_random_end_with_the_same_bits(tmp_path):
    """In a process of its own: it forks."""
    command = [sys.executable, "-m", "tests.faults", "--only=kills", "--kills=8", "--seed=1", f"--out={tmp_path}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    rows = json.loads((tmp_path / "faults.json").read_text())["rows"]
    assert len(rows) == len(kills.RUNS)
    assert sum(row["count"] for row in rows) >= 8
    assert (tmp_path / "faults.md").read_text() == done.stdout


def test_no_damaged_checkpoint_is_loaded_and_none_costs_the_result(paths):
    for row in damage.soak(paths, each=1, seed=1):
        assert (row["checkpoints"], row["silent"], row["mismatches"]) == (1, 0, 0), row


@pytest.mark.parametrize("point", nan.NAN_POINTS, ids=lambda point: point.name)
def test_a_run_recovers_from_a_nan_anywhere(paths, point):
    found = nan.recover(point, paths, run=f"nan{nan.NAN_POINTS.index(point)}.{tiny.SPLIT}")
    assert found["finished"]
    assert found["finite"]
    guard = found["guard"]
    assert guard["overflows"] + guard["skips"] + guard["rollbacks"] > 0
    assert guard["overflows"] + guard["skips"] <= 3, "one fault costs few batches"


@pytest.mark.parametrize("name", others.FAULTS)
def test_a_run_ends_the_same_after(paths, name, usual_signals):
    """Under nohup, which ignores the hang-up, the run went on and `nohup make test` failed."""
    try:
        assert others.check(name, paths)["equal"]
    finally:
        shutil.rmtree(paths.run_dir(others.RUN), ignore_errors=True)
