"""A run that always dies in the same place ends with a code and a sentence of its own, and nothing else is counted."""

import faulthandler
import itertools
import multiprocessing
import os
import re
import shutil
import signal
import subprocess
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pipeline import train_folds
from pipeline.errors import CrashedError, LostDeviceError, PipelineError, StoppedError
from pipeline.paths import REPOSITORY, Paths
from pipeline.runlog import read_status
from pipeline.training import attempts
from pipeline.training.distributed import LostProcessError
from tests.pipeline import tiny

pytestmark = pytest.mark.usefixtures("known_model")

SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["tests.pipeline.before_fork", "tests.pipeline.tiny", "pipeline.train_folds"])


def fit(paths: Paths, config=None, **options: Any) -> None:
    settings = {"competition": tiny.TINY, "split": tiny.SPLIT, "show": lambda _: None, **options}
    train_folds.run(config or tiny.config(), paths=paths, run=tiny.RUN, folds=(0,), **settings)


def dies(number: int, *, at: int):
    """What kills this process in one forward pass."""
    count = itertools.count(1)

    def inject(x_BLD: torch.Tensor) -> torch.Tensor:
        if next(count) == at:
            os.kill(os.getpid(), number)
        return x_BLD

    return inject


def train(paths: Paths, number: int | None, at: int, asked: bool) -> None:
    """What a child does."""
    if asked:
        os.environ["PYTHONFAULTHANDLER"] = "1"
        faulthandler.enable(2)  # as Python does by itself then
    tiny.register(pytest.MonkeyPatch())
    tiny.Fault.inject = staticmethod(dies(number, at=at)) if number else None
    try:
        fit(paths)
    except PipelineError as err:
        raise SystemExit(err.exit_code) from err


def in_child(paths: Paths, number: int | None = None, *, at: int = 2, asked: bool = False) -> int | None:
    """Train in a process of its own, which a signal ends; its exit code.

    No fork of this one: where torch is built for CUDA, gradients had threads here, and a child cannot go on with them.
    """
    process = SERVER.Process(target=train, args=(paths, number, at, asked))
    process.start()
    process.join()
    return process.exitcode


def test_a_run_that_always_dies_of_one_signal_is_not_begun_a_fourth_time(paths):
    """`until rna train; do :; done` began a run that a kernel's segmentation fault ends for ever, with not a word."""
    number = signal.SIGSEGV
    assert [in_child(paths, number) for _ in range(3)] == [-number] * 3
    folder = paths.fold_dir(tiny.RUN, 0)
    with pytest.raises(
        CrashedError, match="the last 3 attempts died with no newer checkpoint than that of step 0: "
    ) as caught:
        fit(paths)
    said = str(caught.value)
    assert caught.value.exit_code == 7
    assert re.search(r": SIGSEGV after step 0 \(3 times\).*\. Next: RNA_KERNELS=reference", said), said
    (trace,) = re.findall(r"; see (\S+\.txt)", said)
    assert "in inject" in Path(trace).read_text(), "Python's stack"
    status = read_status(folder)
    assert (status["state"], status["exit_code"], status["message"]) == ("failed", 7, said)
    assert in_child(paths, number) == 7, "nor a fifth time"


def test_a_stack_that_somebody_asked_for_is_counted_as_well(paths):
    """With PYTHONFAULTHANDLER=1 a segmentation fault was "SIGKILL or power lost", and begun again for ever."""
    assert [in_child(paths, signal.SIGSEGV, asked=True) for _ in range(3)] == [-signal.SIGSEGV] * 3
    with pytest.raises(CrashedError, match=r"SIGSEGV after step 0 \(3 times\); see \S+\.txt"):
        fit(paths)


def test_what_is_killed_from_outside_is_warned_of_and_begun_again(paths, monkeypatch):
    """Three kill -9 of a run that had no checkpoint yet were its end."""
    said: list[str] = []
    monkeypatch.setattr(attempts, "warn", said.append)
    assert [in_child(paths, signal.SIGKILL) for _ in range(4)] == [-9] * 4
    fit(paths)
    assert read_status(paths.fold_dir(tiny.RUN, 0))["state"] == "done"
    (line,) = said
    assert "the last 4 attempts died with no newer checkpoint than that of step 0: SIGKILL or power lost after" in line
    assert "(4 times). Next: see whether memory ran out (dmesg)" in line


def test_a_newer_checkpoint_begins_to_count_anew(paths):
    """A machine that is taken away every so often is no fault of the run."""
    codes = [in_child(paths, signal.SIGKILL, at=4) for _ in range(3)]  # step 3 is saved: no two die in the same place
    assert codes == [-9, -9, -9]
    assert in_child(paths) == 0
    assert not (paths.fold_dir(tiny.RUN, 0) / attempts.FOLDER).exists()


@pytest.mark.parametrize("cure", ["settings", "environment", "anew", "by hand"])
def test_what_may_cure_it_is_tried(paths, cure, monkeypatch):
    folder, config, options = paths.fold_dir(tiny.RUN, 0), tiny.config(), {}
    with pytest.raises(StoppedError):
        fit(paths, max_steps=1)
    for _ in range(attempts.MOST):
        pid = os.fork()
        if pid == 0:
            faulthandler.disable()
            with attempts.counted(folder, config=config, processes=1, restart=False):
                os.kill(os.getpid(), signal.SIGABRT)
        os.waitpid(pid, 0)  # this one: any other child of this process may end meanwhile
    with pytest.raises(CrashedError, match="SIGABRT"):
        fit(paths)
    if cure == "settings":
        config, options = tiny.config(micro_batch=2), {"allow_changes": True}
    elif cure == "environment":
        monkeypatch.setenv("RNA_KERNELS", "reference")
    elif cure == "anew":
        options = {"restart": True}
    else:
        shutil.rmtree(folder / attempts.FOLDER)
    fit(paths, config, **options)
    assert read_status(folder)["state"] == "done"


@pytest.mark.parametrize("error", [LostDeviceError, LostProcessError])
def test_the_third_lost_device_in_the_same_place_is_not_resumable(paths, error, monkeypatch):
    """A device that fails each time ended the run with 75 at every start; a lost process may have been killed."""
    monkeypatch.setattr(train_folds.train, "run", lambda *_, **__: (_ for _ in ()).throw(error("gone. Next: again.")))
    for _ in range(2):
        with pytest.raises(error, match="gone"):
            fit(paths)
    is_own = error is LostDeviceError
    told = r"a lost device before its first step \(3 times\)\. Next: look for Xid" if is_own else "gone"
    with pytest.raises(CrashedError if is_own else error, match=told):
        fit(paths)


def test_the_signal_of_a_process_that_trains_with_this_one_is_named(tmp_path):
    """The first of several writes; the others leave word of their own end."""

    def attempt(error: type[Exception]) -> None:
        with attempts.counted(tmp_path, config=tiny.config(), processes=2, restart=False):
            pid = os.fork()
            if pid == 0:
                faulthandler.disable()
                with attempts.traced(tmp_path):
                    os.kill(os.getpid(), signal.SIGBUS)
            os.waitpid(pid, 0)
            raise error("process 0 of 2 has lost another one. Next: again.")

    for _ in range(2):
        with pytest.raises(StoppedError, match="has lost another one"):
            attempt(LostProcessError)
    with pytest.raises(CrashedError, match=r": SIGBUS before its first step \(3 times\)"):
        attempt(StoppedError)  # by torchrun's SIGTERM


def test_what_was_asked_to_stop_is_not_counted(paths):
    for _ in range(attempts.MOST + 1):
        with suppress(StoppedError):
            fit(paths, max_steps=1)
        assert not (paths.fold_dir(tiny.RUN, 0) / attempts.FOLDER).exists()
    broken = replace(tiny.config(), model=replace(tiny.config().model, name="unknown"))
    for _ in range(attempts.MOST + 1):
        with pytest.raises(PipelineError) as caught:
            fit(paths, broken)
        assert not isinstance(caught.value, CrashedError)


def test_one_that_was_asked_to_stop_hides_none_of_those_that_died(paths, monkeypatch):
    """Two deaths, a Ctrl-C before the first step, two more deaths, …: each Ctrl-C began to count anew."""
    assert [in_child(paths, signal.SIGSEGV) for _ in range(2)] == [-signal.SIGSEGV] * 2
    with monkeypatch.context() as patch:
        patch.setattr(train_folds.train, "run", lambda *_, **__: (_ for _ in ()).throw(StoppedError("stopped.")))
        with pytest.raises(StoppedError, match="stopped"):
            fit(paths)
    assert in_child(paths, signal.SIGSEGV) == -signal.SIGSEGV
    with pytest.raises(CrashedError, match=r"SIGSEGV after step 0 \(3 times\)"):
        fit(paths)


@pytest.mark.parametrize(
    ("ends", "starts"),
    [
        (["kill -9 $$", "kill -SEGV $$", "exit 0", "exit 0"], 3),
        *(([f"exit {code}", "exit 0"], 1) for code in (2, 3, 5, 7, 75, 130)),  # 130: Ctrl-C before it listens
    ],
    ids=str,
)
def test_the_documented_loop_begins_again_after_a_signal_alone(tmp_path, ends, starts):
    """It was `until …; do [ $? = 7 ] && break; done`, which began a misspelt setting, or Ctrl-C, again for ever."""
    (loop,) = re.findall(r"`(until \S+rna train .*?done)`", (REPOSITORY / "pipeline" / "README.md").read_text())
    cases = "".join(f"{number}) {end};; " for number, end in enumerate(ends, start=1))
    (tmp_path / "rna").write_text(f'echo start >> starts; case $(grep -c "" starts) in {cases} esac')
    command = re.sub(r"\S+rna train --fold 0 …", "bash ./rna", loop)
    subprocess.run(["bash", "-c", command], cwd=tmp_path, check=True, stderr=subprocess.DEVNULL)
    assert len((tmp_path / "starts").read_text().split()) == starts


@pytest.mark.parametrize("text", ["{", "[1]", "null"])
def test_a_damaged_count_is_none(tmp_path, text):
    """One of "[1]" was "AttributeError: 'list' object has no attribute 'get'"."""
    (tmp_path / attempts.FOLDER).mkdir()
    (tmp_path / attempts.FOLDER / "count.json").write_text(text)
    with attempts.counted(tmp_path, config=tiny.config(), processes=1, restart=False):
        pass
    assert not (tmp_path / attempts.FOLDER).exists()
