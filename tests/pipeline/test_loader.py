"""Batches that are read ahead are the same ones in the same order, whatever happens to who reads them."""

import os
import pickle
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pipeline.config import RunConfig
from pipeline.dataset import ExampleSet, open_examples
from pipeline.errors import DataError, StoppedError
from pipeline.packing import Packed
from pipeline.paths import Paths
from pipeline.training import loader
from pipeline.training.loader import BatchSource, Loader, Place, _Worker
from tests.pipeline import tiny
from tests.pipeline.faulty_source import Faulty

ROOT = Path(__file__).resolve().parents[2]
PATIENCE_S = 1.0  # with a worker that is known to hang (`hung`)


@pytest.fixture
def examples(tmp_path: Path) -> ExampleSet:
    paths = Paths(comp="tiny", root=tmp_path)
    tiny.write_bpp(paths, tiny.write_values(paths))
    return open_examples(tiny.TINY, paths=paths, table="train", bpp=True)


@pytest.fixture
def config() -> RunConfig:
    return tiny.config(data={"flip": 0.5, "max_length": 25})


@pytest.fixture
def hung(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Tells who hangs; before that patience has no end, as a busy worker may be silent for long."""
    path, hear = tmp_path / "hung", Loader._hear

    def patiently(loader: Loader, worker: _Worker, *, patience: float) -> bytes:
        def hangs() -> bool:
            return path.exists() and path.read_text() == str(worker.process.pid) and not worker.connection.poll()

        while patience == PATIENCE_S and worker.received.empty() and not hangs():
            time.sleep(0.01)
        return hear(loader, worker, patience=patience)

    monkeypatch.setattr(Loader, "_hear", patiently)
    return path


def faulty(examples: ExampleSet, config: RunConfig, *, how: str, once: Path | None, hung: Path) -> Faulty:
    source = Faulty(examples, np.arange(0, 64, 2), config=config)
    source.how, source.once, source.hung = how, once, hung
    return source


def places(*, micro_batch: int = 3, epochs: int = 2) -> Iterator[Place]:
    return (Place(epoch, batch, micro_batch) for epoch in range(epochs) for batch in range(4))


def content(batches: list[Packed]) -> list:
    return [
        tuple(part.tobytes() if isinstance(part, np.ndarray) else part for part in batch)
        + tuple(part.shape for part in batch if isinstance(part, np.ndarray))
        for batch in batches
    ]


def all_of(source: BatchSource, *, workers: int, patience: float = 600.0) -> list:
    with Loader(source, workers=workers, patience=patience) as loader:
        return [content(loader.take(place)) for place in places()]


def test_workers_give_the_same_batches_in_the_same_order(examples, config, monkeypatch):
    monkeypatch.setattr(loader, "warn", pytest.fail)  # of one that is lost and replaced, as where it reads too far
    source = BatchSource(examples, np.arange(0, 64, 2), config=config)
    assert all_of(source, workers=2) == all_of(source, workers=0)


def test_an_epoch_is_planned_once(examples, config, monkeypatch):
    """Of a million sequences that takes 0.3 s, which every batch would take."""
    planned, plan = [], loader.plan_epoch
    monkeypatch.setattr(loader, "plan_epoch", lambda *args, **how: planned.append(how["epoch"]) or plan(*args, **how))
    source = BatchSource(examples, np.arange(0, 60, 2), config=config)
    all_of(source, workers=0)
    assert (source.batches, planned) == (4, [0, 1])


def test_what_was_read_ahead_for_another_place_is_thrown_away(examples, config):
    """A batch is left out, micro-batches are halved, the run is rolled back."""
    source = BatchSource(examples, np.arange(0, 64, 2), config=config)
    wanted = [Place(0, 0, 3), Place(0, 2, 3), Place(0, 3, 1), Place(0, 1, 1), Place(1, 0, 1)]
    with Loader(source, workers=1) as loader:
        assert [content(loader.take(place)) for place in wanted] == [content(source(place)) for place in wanted]


def test_the_shares_of_all_ranks_are_the_batch(examples, config):
    train = np.arange(0, 64, 2)
    whole = BatchSource(examples, train, config=config)
    shares = [BatchSource(examples, train, config=config, rank=rank, ranks=3) for rank in range(3)]
    for place in places(micro_batch=0):
        ids = [name for share in shares for batch in share(place) for name in batch.ids]
        assert sorted(ids) == sorted(whole(place)[0].ids)
        assert len(ids) == 8


def test_a_rank_without_a_sequence_gets_no_batch(examples, config):
    source = BatchSource(examples, np.arange(2), config=config, rank=2, ranks=3)
    assert source(Place(0, 0, 0)) == []


@pytest.mark.parametrize("how", ["kill", "exit", "hang", "raise"])
def test_a_worker_that_is_lost_is_replaced_once_and_no_batch_is_missed(examples, config, tmp_path, how, hung):
    source = faulty(examples, config, how=how, once=tmp_path / "happened", hung=hung)
    found = all_of(source, workers=2, patience=PATIENCE_S if how == "hang" else 600.0)
    assert found == all_of(source, workers=0)
    assert (tmp_path / "happened").exists()


@pytest.mark.parametrize(
    ("how", "says"),
    [("exit", r"died \(exit code 3"), ("hang", "said nothing for 1 s"), ("raise", "raised OSError: the file is gone")],
)
def test_a_worker_that_is_lost_again_ends_the_run_with_a_reason(examples, config, how, says, hung):
    source = faulty(examples, config, how=how, once=None, hung=hung)
    with pytest.raises(DataError, match=rf"epoch 0, batch 3: a loader worker {says}.*, twice. Next: train.workers = 0"):
        all_of(source, workers=1, patience=PATIENCE_S if how == "hang" else 600.0)


def test_a_run_that_is_asked_to_stop_does_not_wait_for_a_silent_worker(examples, config, hung):
    """SIGTERM, `make stop` and a spent budget were heard when the worker spoke again, or after minutes."""
    source = faulty(examples, config, how="hang", once=None, hung=hung)
    with (
        Loader(source, workers=1, patience=1e6, stops=hung.exists) as loader,
        pytest.raises(StoppedError, match="while a loader worker said nothing"),
    ):
        list(map(loader.take, places()))


def test_a_worker_imports_neither_torch_nor_polars():
    """torch takes seconds to import, and polars hangs in a process that was forked."""
    code = "import sys, pipeline.training.loader; assert not {'torch', 'polars'} & set(sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_workers_end_with_the_loader(examples, config):
    with Loader(BatchSource(examples, np.arange(32), config=config), workers=1) as loader:
        loader.take(Place(0, 0, 0))
        (process,) = [worker.process for worker in loader._workers]
        assert process.is_alive()
    assert not process.is_alive()


def test_a_mapped_set_travels_as_the_names_of_its_files(examples):
    data = pickle.dumps(examples)
    assert len(data) < examples.tokens_T.nbytes + examples.targets_TC.nbytes
    again = pickle.loads(data)
    assert not again.tokens_T.flags.writeable
    for index in (0, 63):
        for ours, theirs in zip(examples.example(index)[1:], again.example(index)[1:], strict=True):
            np.testing.assert_array_equal(ours, theirs)


BARE = """
import _multiprocessing, dataclasses, os, sys
from pathlib import Path

def missing(*_):
    raise FileNotFoundError(2, "No such file or directory")  # what a machine without /dev/shm says

_multiprocessing.SemLock = missing

if __name__ == "__main__":
    from pipeline.config import load_config
    from pipeline.paths import Paths
    from tests.pipeline import tiny

    config = tiny.config(workers=2, epochs=1)
    model = load_config("tiny_ribonanza_mamba", ["model.kwargs.use_bpp=false"]).model
    paths = Paths(comp="tiny", root=Path(sys.argv[1]))
    tiny.fit(paths, dataclasses.replace(config, model=model))
    (start,) = tiny.rows_of(paths, "start")
    print(start["kernels"])
"""


def test_training_needs_neither_shared_memory_nor_a_home_that_can_be_written(tmp_path):
    """As in a container: workers send through pipes, and where compiled code cannot be kept plain PyTorch computes."""
    tiny.write_values(Paths(comp="tiny", root=tmp_path))
    (tmp_path / "bare.py").write_text(BARE)
    kept = {name: value for name, value in os.environ.items() if name not in ("RNA_CACHE", "RNA_KERNELS")}
    environment = {**kept, "HOME": "/proc/none", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, str(tmp_path / "bare.py"), str(tmp_path)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "selective_scan: reference (" in done.stdout
