"""Several processes train as one, stop as one, and are missed when they are gone."""

import json
import os
import re
import subprocess
import sys

import numpy as np
import pytest
import torch
from torch import nn

from pipeline.paths import Paths
from pipeline.training import distributed
from pipeline.training.checkpoint import CheckpointStore
from pipeline.training.distributed import ALONE
from pipeline.training.stop import lock_holder
from tests.pipeline import ranks, tiny
from tests.pipeline.ranks import Scene, codes, everything, fixtures, losses, rows, run_name

pytestmark = pytest.mark.slow
PLAIN = {"model": {"dropout": 0.0}, "epochs": 5}  # 20 steps
MUON = {**PLAIN, "optimizer": "muon"}

#: What processes do, in this order.
SCENES: list[Scene] = [
    ("alone", 1, PLAIN, None),
    ("both", 2, PLAIN, None),
    ("accumulated", 2, {**PLAIN, "micro_batch": 3, "batch_size": 8}, None),
    ("alone with Muon", 1, MUON, None),
    ("both with Muon", 2, MUON, None),
    ("short batches", 3, {**PLAIN, "batch_size": 2, "epochs": 1, "precision": "fp16"}, None),
    ("whole", 2, {}, None),
    ("killed", 2, {}, [1, 6, "SIGKILL"]),
    ("killed", 2, {}, None),
    ("stopped", 2, {}, [1, 6, "SIGTERM"]),
    ("stopped", 2, {}, None),
    ("hung", 2, {}, [1, 6, "hang"]),
    ("one with a NaN", 2, {}, [1, 6, "nan"]),
    ("short of memory", 2, {**PLAIN, "micro_batch": "auto"}, [1, 6, "memory"]),
    ("out of memory", 2, {}, [1, 6, "memory"]),
    ("out of memory", 2, {}, None),
    ("second device lost", 2, {}, [1, 6, "device"]),
    ("first device lost", 2, {}, [0, 6, "device"]),
    ("no lock", 2, {}, [0, 1, "lock"]),
    ("no tables", 2, {}, [0, 1, "tables"]),
    ("no tables in the second", 2, {}, [1, 1, "tables"]),
    ("no permission", 2, {}, [0, 1, "permission"]),
    ("worker of the first", 3, {}, [0, 6, "worker"]),
    ("worker of the second", 3, {}, [1, 6, "worker"]),
    ("first diverges", 2, {}, [0, 2, "prediction"]),
    ("second diverges", 2, {}, [1, 1, "prediction"]),
    ("second diverges in parts", 2, {"sharding": "fsdp2"}, [1, 1, "prediction"]),
    ("full disk", 2, {}, [0, 3, "disk"]),
    ("fewer", 2, PLAIN, [0, 6, "SIGTERM"]),
    ("fewer", 1, PLAIN, None),
]

paths, ended = fixtures(SCENES)


@pytest.mark.parametrize(
    ("name", "alone"), [("both", "alone"), ("accumulated", "alone"), ("both with Muon", "alone with Muon")]
)
def test_two_processes_give_the_losses_of_one(paths, ended, name, alone):
    assert codes(ended(alone)) == [[0]]
    assert codes(ended(name)) == [[0, 0]]
    assert len(losses(paths, alone)) == 20
    np.testing.assert_allclose(losses(paths, name), losses(paths, alone), atol=1e-5)
    metrics = [[row["metric"] for row in rows(paths, run, "epoch")] for run in (alone, name)]
    np.testing.assert_allclose(*metrics, atol=1e-5)


def test_a_process_without_a_sequence_of_a_batch_takes_its_part(ended):
    """Batches of two sequences for three processes, with a loss scaler."""
    assert codes(ended("short batches")) == [[0, 0, 0]]


def test_the_first_process_alone_writes(paths, ended):
    ended("both")
    assert [row["step"] for row in rows(paths, "both", "step")] == list(range(1, 21))
    assert len(rows(paths, "both", "start")) == len(rows(paths, "both", "done")) == 1


def test_a_killed_process_ends_the_others_at_once_and_the_rerun_ends_with_the_same_bits(paths, ended):
    (killed, again), whole = ended("killed"), ended("whole")
    assert killed["codes"] == [75, -9]
    assert killed["after_first"] < ranks.MERCY_S
    assert lock_holder(paths.fold_dir(run_name("killed"), 0)) is None
    assert codes([again, *whole]) == [[0, 0], [0, 0]]
    assert everything(paths, "killed") == everything(paths, "whole")


def test_a_signal_to_one_process_stops_all_at_the_same_step(paths, ended):
    stopped, again = ended("stopped")
    assert stopped["codes"] == [75, 75]
    assert again["codes"] == [0, 0]
    assert rows(paths, "stopped", "start")[1]["resumed_step"] == 6
    assert everything(paths, "stopped") == everything(paths, "whole")


def test_a_hung_process_is_lost_after_the_timeout(ended):
    (hung,) = ended("hung")
    assert hung["codes"] == [75, -9]
    assert hung["seconds"] > ranks.TIMEOUT_S


def test_a_nan_in_one_process_is_skipped_by_all(paths, ended):
    assert codes(ended("one with a NaN")) == [[0, 0]]
    (row,) = rows(paths, "one with a NaN", "guard")
    assert (row["seen"], row["answer"], row["step"], row["module"]) == ("nonfinite_loss", "skip", 6, "fault")
    assert len(row["ids"]) == row["sequences"] == 8, "the whole batch"


def test_memory_that_runs_out_in_one_process_halves_the_micro_batches_of_all(paths, ended):
    assert codes(ended("short of memory")) == [[0, 0]]
    (row,) = rows(paths, "short of memory", "micro_batch")
    assert (row["before"], row["now"]) == (4, 2)
    np.testing.assert_allclose(losses(paths, "short of memory"), losses(paths, "alone"), atol=1e-5)


def test_memory_that_runs_out_in_one_process_saves_and_ends_all(paths, ended):
    assert codes(ended("out of memory")) == [[5, 5], [0, 0]]
    assert rows(paths, "out of memory", "start")[1]["resumed_step"] == 5
    assert everything(paths, "out of memory") == everything(paths, "whole")


@pytest.mark.parametrize(
    ("name", "told"),
    [
        ("second device lost", "0: LostProcessError: .* did not answer in time; process 1: LostDeviceError: "),
        ("first device lost", "1: LostProcessError: process 1 of 2 has lost another one"),  # with it the store is gone
    ],
)
def test_a_device_that_one_process_loses_ends_the_others_at_once(ended, name, told):
    """Taken for a stop that all know of: the others waited for the whole train.process_timeout, and then said "has
    lost another one, which died, failed or did not answer in time. Next: ...", without the reason.
    """
    (lost,) = ended(name)
    assert lost["codes"] == [75, 75]
    assert lost["seconds"] < ranks.LONG_S
    assert re.search(told, lost["said"])


@pytest.mark.parametrize(
    ("name", "code"),
    [
        ("no lock", 75),
        ("no tables", 3),
        ("no tables in the second", 3),
        ("no permission", 5),
        ("worker of the first", 3),
        ("worker of the second", 3),
        ("first diverges", 4),
        ("second diverges", 4),
        ("second diverges in parts", 4),
        ("full disk", 5),
    ],
)
def test_what_fails_in_one_process_ends_all_with_its_exit_code_and_one_sentence(ended, name, code):
    """A prediction that was not finite in one process ended it with 4 and the others with 75, "process 0 of 2 has lost
    another one, which died, failed or did not answer in time", and traces of C++ where that was the first.
    """
    (end,) = ended(name)
    assert set(end["codes"]) == {code}
    fault = next(fault for run, _, _, fault in SCENES if run == name)
    said = [line for line in end["said"].splitlines() if str(ranks.RAISED[fault[2]][2]) in line]
    starts = [run for run, _, _, other in SCENES if other and other[2] == fault[2]]
    assert len(said) == len(starts)


def test_a_run_goes_on_with_fewer_processes(paths, ended):
    assert codes(ended("fewer")) == [[75, 75], [0]]
    np.testing.assert_allclose(losses(paths, "fewer"), losses(paths, "alone"), atol=1e-5)


LAUNCH = """
import sys
from pipeline.errors import StoppedError
from pipeline.training.distributed import launch
try:
    sys.exit(launch(sys.argv[1:], processes=2, module="tests.pipeline.ranks"))
except StoppedError as err:
    sys.stderr.write(f"launcher: {err}")
    sys.exit(err.exit_code)
"""


def launched(paths: Paths, name: str, fault: list) -> subprocess.CompletedProcess:
    script = {"run": run_name(name), "config": {}, "fault": fault}
    command = ["nohup", sys.executable, "-c", LAUNCH, str(paths.root), json.dumps(script)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=ranks.ROOT, env=environment, capture_output=True, text=True, check=False)


def test_torchrun_under_nohup_survives_a_hang_up_and_gives_the_exit_code_of_its_processes(paths):
    """One start for both claims, as it imports torch three times. Was: torchrun's own SIGHUP handler undid nohup."""
    done = launched(paths, "launched", [1, 6, "SIGTERM after a hang-up"])
    assert done.returncode == 75, done.stderr
    assert "SIGHUP" not in done.stderr
    meta = CheckpointStore(paths.fold_dir(run_name("launched"), 0) / "checkpoints").newest_meta()
    assert meta["step"] == 6
    assert meta["environment"]["processes"] == 2


def test_torchrun_ends_with_75_where_a_process_was_killed(paths):
    """Exit code 137, below the other process's sentence that ended with "(exit code 75)"."""
    done = launched(paths, "launched and killed", [1, 6, "SIGKILL"])
    assert done.returncode == 75, done.stderr
    *_, last = done.stderr.splitlines()
    assert last.startswith("launcher: process 1 of the run was ended by SIGKILL. Next: the same command goes on")
    assert CheckpointStore(paths.fold_dir(run_name("launched-and-killed"), 0) / "checkpoints").newest_meta() is not None


@pytest.mark.parametrize(
    ("failed", "code"),
    [
        ({0: 75, 1: 75}, 75),
        ({1: 3}, 3),
        ({0: -9, 1: 4}, 4),
        ({0: 75, 1: 5}, 5),
        ({0: 75, 1: -9, 2: 5}, 5),
        ({0: 75, 1: -15, 2: 5}, 5),
        ({0: 75, 1: -15}, 75),
    ],
)
def test_what_a_process_said_that_it_failed_with_is_the_launchers_exit_code(failed, code):
    """Below "process 28714 is already at work here" of process 0 (the last case) stood "process 1 of the run was ended
    by SIGTERM. Next: the same command goes on from the last checkpoint", which torchrun had sent it."""
    assert distributed._code(failed) == code


@pytest.mark.parametrize(
    ("failed", "rank", "name"),
    [
        ({1: -11}, 1, "SIGSEGV"),
        ({0: -15, 1: -9}, 1, "SIGKILL"),
        ({0: -9, 1: -11}, 1, "SIGSEGV"),  # was SIGKILL: by it torchrun ends one that does not hear SIGTERM
        ({1: -9, 0: -9}, 1, "SIGKILL"),  # was process 0, which torchrun had ended so after process 1
        ({2: -40}, 2, "signal 40"),
    ],
)
def test_a_process_that_a_signal_ended_is_named_and_the_run_resumable(failed, rank, name):
    with pytest.raises(distributed.LostProcessError, match=rf"process {rank} of the run was ended by {name}\. Next: "):
        distributed._code(failed)


DIVERGES = """
[model]
name = "drsn"
kwargs = {width = 8, depth = 1}
[train]
lr = 1e38
schedule = "constant"
max_rollbacks = 1
"""


def test_two_processes_of_the_command_line_fail_with_one_sentence_and_its_exit_code(tmp_path):
    """``rna train --nproc 2``, as make train NPROC=2 calls it; torchrun's own log lines stood around the sentence."""
    tiny.write_values(Paths(comp="ribonanza", root=tmp_path))
    (tmp_path / "diverges.toml").write_text(DIVERGES)
    command = [sys.executable, "-m", "pipeline", "train", "--nproc", "2", f"--split={tiny.SPLIT}"]
    command += [f"--artifacts={tmp_path}", f"--model={tmp_path / 'diverges.toml'}"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ranks.ROOT, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 4, done.stderr
    *said, last = done.stderr.splitlines()
    assert last.startswith("error: step 2: nonfinite weights")
    assert last.endswith("(exit code 4)")
    assert [line for line in said if not line.startswith(("diverges.", "warning: step 1: ", str(tmp_path)))] == []
    assert (tmp_path / f"ribonanza/runs/diverges.{tiny.SPLIT}/fold0/diverged.md").is_file()


def test_two_machines_train_as_one(paths, ended, tmp_path):
    """The documented command over loopback: two launchers, each in a folder of its own, one folder of artefacts."""
    ended("alone")
    script = json.dumps({"run": run_name("machines"), "config": PLAIN, "fault": None})
    where = ["--nnodes", "2", "--nproc-per-node", "1", "--rdzv-backend", "c10d"]
    where += ["--rdzv-endpoint", f"127.0.0.1:{ranks.free_port()}", "--signals-to-handle", "SIGTERM,SIGINT"]
    where += ["--rdzv-conf", "keep_alive_max_attempt=1000"]  # a launcher that a busy machine keeps waiting is not lost
    module = ["-m", "tests.pipeline.ranks", str(paths.root), script]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ranks.ROOT)}
    started = []
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        command = [sys.executable, "-m", "torch.distributed.run", *where, *module]
        how = {"cwd": tmp_path / name, "env": environment, "stderr": subprocess.PIPE, "text": True}
        started.append(subprocess.Popen(command, **how))
    said = [process.communicate()[1] for process in started]
    assert [process.returncode for process in started] == [0, 0], said
    np.testing.assert_allclose(losses(paths, "machines"), losses(paths, "alone"), atol=1e-5)
    (row,) = rows(paths, "machines", "start")
    assert row["processes"] == 2


@pytest.mark.parametrize(
    ("cpus", "given", "threads"),
    [((8, 8), None, "4"), ((8, 8), "8", "8"), ((4, 64), "4", "2"), ((4, 64), "3", "3")],
    ids=["all", "as given", "a quota", "as given beside a quota"],
)
def test_processes_of_one_machine_share_its_cpus(monkeypatch, cpus, given, threads):
    """In a container with the time of 4 CPUs out of 64 each of two had 32 threads."""
    for name, count in zip(("usable_cpus", "bound_cpus"), cpus, strict=True):
        monkeypatch.setattr(distributed, name, lambda count=count: count)
    monkeypatch.setattr("torch.distributed.run.run", lambda _: None)
    monkeypatch.setenv("TORCH_CPP_LOG_LEVEL", "ERROR")
    monkeypatch.setenv("OMP_NUM_THREADS", given or "")
    if given is None:
        monkeypatch.delenv("OMP_NUM_THREADS")
    assert distributed.launch([], processes=2, module="tests.pipeline.ranks") == 0
    assert os.environ["OMP_NUM_THREADS"] == threads


def test_one_process_joins_nobody(monkeypatch):
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    with distributed.join(timeout=1.0) as world:
        assert world is ALONE
    assert world.sum(1.0, 2.0) == [1.0, 2.0]
    assert world.gather("a") == ["a"]
    assert world.from_main(lambda: 3) == 3
    layer = nn.Linear(2, 2)
    world.add_gradients(layer)
    assert layer.weight.grad is None


def test_a_device_that_fails_as_gradients_are_added_up_is_no_lost_process(monkeypatch):
    """ "process 0 of 2 has lost another one", a fault from outside, after which the same command was tried for ever."""
    layer, world = nn.Linear(2, 1), distributed.World(size=2, store=torch.distributed.HashStore())

    def fail(*_: object, **__: object) -> None:
        raise torch.AcceleratorError("CUDA error: uncorrectable ECC error encountered")

    monkeypatch.setattr(torch.distributed, "all_reduce", fail)
    with pytest.raises(torch.AcceleratorError, match="ECC"):
        world.add_gradients(layer)


def test_buckets_hold_every_parameter_once_in_order(monkeypatch):
    monkeypatch.setattr(distributed, "_BUCKET", 10)
    parameters = [nn.Parameter(torch.zeros(size)) for size in (3, 8, 20, 1, 2)]
    buckets = list(distributed._buckets(parameters))
    assert [[len(one) for one in bucket] for bucket in buckets] == [[3, 8], [20], [1, 2]]
