"""On one CUDA device: the same bits after a resume, memory that really runs out, a context that really dies."""

import itertools
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from pipeline import train
from pipeline.config import RunConfig
from pipeline.errors import StoppedError
from pipeline.paths import Paths
from pipeline.runlog import read_metrics
from pipeline.training.checkpoint import CheckpointStore
from tests.pipeline import tiny

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
WHOLE = f"whole.{tiny.SPLIT}"


@pytest.fixture
def paths(tmp_path: Path, monkeypatch) -> Paths:
    tiny.register(monkeypatch)
    paths = Paths(comp="tiny", root=tmp_path / "artifacts")
    tiny.write_values(paths)
    return paths


def fit(paths: Paths, config: RunConfig, *, run: str = tiny.RUN, **options: Any) -> Any:
    return train.run(config, competition=tiny.TINY, paths=paths, run=run, split=tiny.SPLIT, fold=0, **options)


@pytest.mark.parametrize("precision", ["fp32", "bf16", "fp16"])
def test_a_run_stopped_after_every_step_ends_with_the_same_bits(paths, precision):
    config = tiny.config(precision=precision, deterministic=True, micro_batch=3)
    fit(paths, config, run=WHOLE)
    for _ in itertools.count():
        try:
            fit(paths, config, max_steps=1)
            break
        except StoppedError:
            continue
    assert tiny.final_bytes(paths) == tiny.final_bytes(paths, WHOLE)


def test_memory_that_runs_out_halves_the_micro_batch(paths, monkeypatch):
    def hungry(x_BLD: Tensor) -> Tensor:
        if x_BLD.shape[0] > 2:
            torch.empty(2**50, dtype=torch.uint8, device=x_BLD.device)
        return x_BLD

    monkeypatch.setattr(tiny.Fault, "inject", staticmethod(hungry))
    assert fit(paths, tiny.config(micro_batch="auto")).facts["updates"] == 12
    rows = read_metrics(paths.fold_dir(tiny.RUN, 0) / "metrics.jsonl")
    assert [row["now"] for row in rows if row["event"] == "micro_batch"] == [4, 2]


LOST = """
import itertools, sys
from pathlib import Path
import torch
from models.registry import register_model
from pipeline import train
from pipeline.errors import StorageError
from pipeline.paths import Paths
from tests.pipeline import tiny

register_model(tiny.TinyModel)
count = itertools.count(1)

def fault(x_BLD):
    if next(count) == 6:
        index = torch.full((4,), 99, device=x_BLD.device)
        return x_BLD + torch.zeros(3, device=x_BLD.device)[index].sum()
    return x_BLD

tiny.Fault.inject = staticmethod(fault)
paths = Paths(comp="tiny", root=Path(sys.argv[1]))
try:
    train.run(tiny.config(), competition=tiny.TINY, paths=paths, run=tiny.RUN, split=tiny.SPLIT, fold=0)
except StorageError as err:
    print(err, flush=True)
    import os
    os._exit(err.exit_code)
"""


def test_a_device_side_assert_ends_the_run_with_a_sentence_and_the_rerun_resumes(paths):
    root = Path(__file__).resolve().parents[2]
    command = [sys.executable, "-c", LOST, str(paths.root)]
    done = subprocess.run(
        command, cwd=root, env={**os.environ}, capture_output=True, text=True, timeout=300, check=False
    )
    assert done.returncode == 5, done.stderr
    assert "failed at step 6 (CUDA error: device-side assert triggered)" in done.stdout
    assert CheckpointStore(paths.fold_dir(tiny.RUN, 0) / "checkpoints").newest_meta()["step"] == 4
    assert fit(paths, tiny.config()).facts["steps"] == 12
