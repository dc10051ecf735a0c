"""Runs in the background: they outlive their terminal, are found by their lock, and stop when they are asked to."""

import errno
import fcntl
import io
import json
import os
import pty
import re
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipeline import jobs
from pipeline.cli import run_verb
from pipeline.errors import BusyError, ConfigError, DataError, StoppedError, StorageError
from pipeline.paths import Paths
from pipeline.runlog import read_status, write_status
from pipeline.runs import finished_runs, seen_before, warn_of_seen_before, warn_of_unfinished
from pipeline.stage import write_json
from pipeline.training import stop
from pipeline.training.checkpoint import CheckpointStore
from pipeline.training.stop import lock_holder, run_lock
from tests.pipeline import tiny

ROOT = Path(__file__).resolve().parents[2]
CONFIG = """
[model]
name = "transformer_sepconv"
kwargs = {width = 8, depth = 1, num_heads = 1}
[train]
epochs = 100000
batch_size = 16
save_every = 5
"""


def wait_until(true: Callable[[], Any]) -> None:
    """As long as a very busy machine may take, and no longer than it does."""
    give_up = time.monotonic() + 600
    while not true():
        assert time.monotonic() < give_up, "waited in vain"
        time.sleep(0.05)


def tell(folder: Path, status: dict[str, Any]) -> None:
    """The status of a run whose folder need not be there."""
    folder.mkdir(parents=True, exist_ok=True)
    write_status(folder, status)


class Endless:
    """A run that trains until it is asked to stop, on tiny tables."""

    def __init__(self, folder: Path) -> None:
        self.artifacts = folder / "art"
        self.paths = Paths(comp="ribonanza", root=self.artifacts)
        tiny.write_values(self.paths)
        (folder / "endless.toml").write_text(CONFIG)
        self.model = str(folder / "endless.toml")
        self.folder = self.paths.fold_dir(f"endless.{tiny.SPLIT}", 0)
        self.options = [f"--artifacts={self.artifacts}", f"--model={self.model}", f"--split={tiny.SPLIT}"]

    def make(self, target: str) -> list[str]:
        where = [f"PY={sys.executable}", f"ARTIFACTS={self.artifacts}"]
        return ["make", "-C", str(ROOT), target, *where, f"MODEL={self.model}", f"SPLIT={tiny.SPLIT}"]

    def trains(self) -> bool:
        """Whether the process at work says so itself: the status may still be that of one that was killed."""
        status, pid = read_status(self.folder), jobs.worker(self.folder)
        return pid is not None and status.get("pid") == pid and status.get("step", 0) > 0

    def row(self) -> dict[str, Any]:
        (row,) = jobs.survey(self.artifacts)
        return row


@pytest.fixture
def endless(tmp_path, monkeypatch, usual_signals) -> Iterator[Endless]:
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setattr(jobs, "_BEGIN_S", 600.0)
    monkeypatch.setitem(jobs.stop.__kwdefaults__, "patience", 600.0)
    run = Endless(tmp_path)
    yield run
    pid = jobs.worker(run.folder)
    if pid:
        with suppress(ProcessLookupError):  # it ended at this moment
            os.kill(pid, signal.SIGKILL)


def in_a_terminal(command: list[str], *, until: Callable[[], Any], shows: Sequence[str]) -> str:
    """Run a command from a shell in a terminal of its own and close that; what was on it.

    Args:
        command: to run.
        until: the terminal is not closed before this is true,
        shows: nor before all these patterns are on it.
    """
    pid, terminal = pty.fork()
    if pid == 0:
        shell = ["bash", "-c", f"{shlex.join(command)}; true"]  # "; true": the shell stays in between
        os.execvpe("bash", shell, {**os.environ, "TERM": "xterm", "COLUMNS": "80"})
    os.set_blocking(terminal, False)
    shown = bytearray()

    def text() -> str:
        with suppress(OSError):  # nothing more yet, or the last process has closed it
            while data := os.read(terminal, 65536):
                shown.extend(data)
        return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", shown.decode(errors="replace"))

    try:
        wait_until(lambda: all(re.search(pattern, text()) for pattern in shows) and until())
        return text()
    finally:
        os.close(terminal)
        os.waitpid(pid, 0)


@pytest.mark.slow
def test_a_background_run_outlives_its_terminal_and_a_kill_and_stops_when_asked(endless, capsys, monkeypatch):
    started, word = time.time(), "training in the background as process"
    said = in_a_terminal(endless.make("train-bg"), until=endless.trains, shows=[rf"{word} \d+;"])
    pid = jobs.worker(endless.folder)
    assert f"{word} {pid};" in said
    os.kill(pid, signal.SIGHUP)
    row = endless.row()
    assert (row["state"], row["phase"], row["pid"], row["competition"]) == ("running", "training", pid, "ribonanza")
    assert row["age_s"] <= time.time() - started + 1
    assert os.getsid(pid) == pid, "a session of its own"

    for verb in (["train"], ["train", "--background"]):  # here, and in the background
        assert run_verb([*verb, *endless.options]) == 75
        assert f"process {pid} is already at work here" in capsys.readouterr().err

    wait_until(lambda: list(endless.folder.glob("checkpoints/step-*")))
    os.kill(pid, signal.SIGKILL)
    wait_until(lambda: jobs.worker(endless.folder) is None)
    assert (endless.row()["state"], endless.row()["pid"]) == ("lost", None)
    assert str(pid) in (endless.folder / ".job").read_text(), "a number that nobody believes any more"

    assert run_verb(["train", "--background", *endless.options]) == 0
    log = jobs.find_log(endless.paths, endless.folder.parent.name, 0)
    followed, listens, look = list[str](), threading.Event(), jobs.worker
    follower = threading.Thread(target=lambda: followed.extend(jobs.follow(log)))

    def worker(folder: Path) -> int | None:  # what `follow` asks when it stands at the end of the log
        if threading.current_thread() is follower:
            listens.set()
        return look(folder)

    monkeypatch.setattr(jobs, "worker", worker)
    follower.start()
    assert listens.wait(timeout=600)
    wait_until(endless.trains)
    capsys.readouterr()
    assert run_verb(["stop", *endless.options]) == 0
    assert re.search(r"has stopped \(exit code 75, step \d+ of 200000\)", capsys.readouterr().err)
    follower.join(timeout=600)
    assert not follower.is_alive(), "following ends with the run"
    assert "(SIGTERM); the state is saved" in "".join(followed)
    assert endless.row()["state"] == "stopped"
    assert run_verb(["stop", *endless.options]) == 0
    assert "nothing is running here (stopped)" in capsys.readouterr().err
    text = log.read_text()
    assert len(re.findall(r"^=== \d{4}-\d\d-\d\d .* rna train ", text, re.MULTILINE)) == 2
    assert "goes on at step" in text


def saved(run: Endless, trainer: int) -> bool:
    status = read_status(run.folder)
    newest = CheckpointStore(run.folder / "checkpoints").newest_meta()
    return (status["state"], status["exit_code"], status["pid"]) == ("stopped", 75, trainer) and (
        newest is not None and newest["step"] == status["step"]
    )


@pytest.mark.slow
def test_killing_make_stops_the_trainer_with_its_state_saved(endless):
    with subprocess.Popen(endless.make("train"), stderr=subprocess.PIPE, text=True) as make:
        wait_until(endless.trains)
        trainer = jobs.worker(endless.folder)
        make.terminate()
        wait_until(lambda: jobs.worker(endless.folder) is None)
        assert "the state is saved" in make.stderr.read()
    assert saved(endless, trainer)


@pytest.mark.slow
def test_a_terminal_shows_a_bar_with_everything_and_closing_it_saves_and_ends_the_run(endless):
    def has_validated() -> bool:
        return {"metric", "loss"} <= read_status(endless.folder).keys() and read_status(endless.folder)["step"] > 20

    bar = r"endless\.sim80_k2 fold0 \S+ +\d+/200000 steps"
    note = r"loss \d\.\d{4} MAE \d\.\d{4} lr \d\.\de-\d\d [\d,]+ nt/s \d+\.\d GiB, [\d hmins]+ left"
    shown = in_a_terminal(endless.make("train"), until=has_validated, shows=[bar, note])
    trainer = read_status(endless.folder)["pid"]
    assert max(len(line.rstrip()) for line in re.split(r"[\r\n]+", shown) if "loss" in line) <= 80
    wait_until(lambda: jobs.worker(endless.folder) is None)
    assert saved(endless, trainer)


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_start_that_is_interrupted_leaves_no_job_behind(tmp_path, monkeypatch, number):
    """Ctrl-C while make train-bg waited for its job said "interrupted; nothing is half-written", and the job went on;
    make stop in that time, from another terminal, said "nothing is running here", and the job began.
    """
    program, told, folder = tmp_path / "program", tmp_path / "pid", tmp_path / "runs" / "a.sim80_k2" / "fold0"
    program.write_text(f"#!/bin/sh\necho $$ > {told}\nexec sleep 86400\n")
    program.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(program))

    def interrupted(_process: subprocess.Popen, where: Path) -> None:
        wait_until(lambda: told.exists() and told.read_text().strip())
        assert jobs.worker(where) == os.getpid()
        os.kill(os.getpid(), number)  # Ctrl-C; or make stop, which finds this process

    monkeypatch.setattr(jobs, "_wait_for_begin", interrupted)
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell's background job ignores Ctrl-C
    try:
        with pytest.raises(StoppedError, match="stopped while it was started in the background"):
            jobs.start(["train"], folder=folder)
    finally:
        signal.signal(signal.SIGINT, before)
    with pytest.raises(ProcessLookupError):
        os.kill(int(told.read_text()), 0)
    assert jobs.worker(folder) is None
    assert not folder.exists()


def test_a_start_that_fails_is_answered_at_once_with_its_sentence_and_exit_code(endless, capfd):
    endless.paths.fold_table(tiny.SPLIT).unlink()
    assert run_verb(["train", "--background", *endless.options]) == 3
    said = capfd.readouterr().err
    assert "Next: make folds" in said
    assert "in the background" not in said
    assert not (endless.paths.home / "runs").exists(), "it was told, so nothing is left of it"
    assert run_verb(["train", "--background", "--model=nowhere"]) == 2
    assert "MODEL='nowhere' is not known" in capfd.readouterr().err


# --- locks ---


@pytest.mark.parametrize("number", [errno.ENOSYS, errno.ENOLCK])
def test_a_file_system_without_locks_is_named_with_what_to_do(tmp_path, monkeypatch, number):
    """It said "Function not implemented. Next: check the path, its permissions and the disk", and not which path."""

    def refuse(*_: object) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", refuse)
    with pytest.raises(StorageError, match=rf"{tmp_path}: its file system gives no locks .* Next: ARTIFACTS="):
        run_lock(tmp_path).__enter__()
    assert lock_holder(tmp_path) is None, "make status goes on"


def test_a_number_is_believed_only_together_with_its_lock(tmp_path):
    assert lock_holder(tmp_path) is None
    (tmp_path / ".lock").write_text(f"{os.getpid()}\n")
    assert lock_holder(tmp_path) is None, "a living process that holds nothing"
    with run_lock(tmp_path):
        assert lock_holder(tmp_path) == os.getpid()
        (tmp_path / ".lock").write_text("1\n")  # left by one that was killed; its number is another program's now
        assert lock_holder(tmp_path) == 0
    assert lock_holder(tmp_path / "absent") is None


@pytest.mark.parametrize("width", [80, 110, 400])
def test_a_status_in_a_narrow_terminal_leaves_columns_out_rather_than_breaking_names(tmp_path, width):
    """At 80 columns the name of a run stood in pieces of four letters, one below the other."""
    name = "ribonanza_mamba.sim80_k5"
    status = {"step": 20_000, "steps": 80_000, "metric": 0.16, "best_metric": 0.16, "loss": 0.1, "tokens_per_s": 60_000}
    tell(tmp_path / "ribonanza" / "runs" / name / "fold0", {"state": "stopped", "memory_mib": 500, **status})
    table = jobs.status_table(jobs.survey(tmp_path), width=width)
    lines = Console(width=width, record=True, file=io.StringIO())
    lines.print(table)
    head, row = lines.export_text().rstrip().split("\n")
    assert name in row
    assert "best" in head
    assert ("loss" in head) == (width == 400)


def test_metrics_in_small_units_are_shown_in_digits_that_count(tmp_path):
    """Numbers of 1e-12 were all 0.0000."""
    tell(tmp_path / "labelled-a" / "runs" / "a.sim80_k2" / "fold0", {"metric": 2.5e-12, "best_metric": 2.25e-12})
    lines = Console(width=400, record=True, file=io.StringIO())
    lines.print(jobs.status_table(jobs.survey(tmp_path), width=400))
    assert re.search(r" 2\.5e-12 +2\.25e-12 ", lines.export_text())


def _old_kernel(_: int) -> int:
    raise OSError(errno.ENOSYS, "Function not implemented")


@pytest.mark.parametrize("kernel", ["this", "old"])
@pytest.mark.parametrize("halted", [False, True])
def test_a_job_is_asked_to_stop_also_where_the_kernel_is_old_or_ctrl_z_has_halted_it(
    tmp_path, monkeypatch, kernel, halted
):
    """Linux before 5.3, as on clusters, knows no pidfd_open: make stop ended with "Function not implemented". Of a job
    that was halted it said "asked to stop and is still at work after 40 s. Next: wait for its step to end"."""
    if kernel == "old":
        monkeypatch.setattr(os, "pidfd_open", _old_kernel, raising=False)
    hold = (
        "import fcntl, os; f = open('.job', 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(os.getpid(), file=f, flush=True)"
    )
    command = [sys.executable, "-c", f"{hold}; print('ready', flush=True); input()"]
    with subprocess.Popen(command, cwd=tmp_path, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as job:
        assert job.stdout.readline() == b"ready\n"
        if halted:
            job.send_signal(signal.SIGSTOP)
            assert os.WIFSTOPPED(os.waitpid(job.pid, os.WUNTRACED)[1])
        jobs._terminate(job.pid, tmp_path)
        try:
            assert job.wait(600) == -signal.SIGTERM
        finally:
            job.kill()


@pytest.mark.parametrize("kernel", ["this", "old"])
def test_a_job_of_several_processes_is_stopped_also_where_another_one_of_them_is_halted(tmp_path, monkeypatch, kernel):
    """With NPROC=2, each in a session of its own: "process 11894 was asked to stop and is still at work after 40 s"."""
    if kernel == "old":
        monkeypatch.setattr(os, "pidfd_open", _old_kernel, raising=False)

    def begin(rank: int, port: int, code: str) -> subprocess.Popen:
        meets = {"RANK": str(rank), "MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
        where = {"env": {**os.environ, **meets}, "cwd": tmp_path, "start_new_session": True}
        return subprocess.Popen([sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, **where)

    hold = "import fcntl, os; f = open('.job', 'w'); fcntl.flock(f, fcntl.LOCK_EX); print(os.getpid(), file=f, flush=1)"
    wait = "print('ready', flush=True); input()"
    with begin(0, 1, f"{hold}; {wait}") as job, begin(1, 1, wait) as second, begin(1, 2, wait) as stranger:
        try:
            for each in (job, second, stranger):
                assert each.stdout.readline() == b"ready\n"
            for each in (second, stranger):
                each.send_signal(signal.SIGSTOP)
                assert os.WIFSTOPPED(os.waitpid(each.pid, os.WUNTRACED)[1])
            jobs._terminate(job.pid, tmp_path)
            assert job.wait(600) == -signal.SIGTERM
            assert os.waitid(os.P_PID, second.pid, os.WCONTINUED | os.WNOHANG) is not None
            assert os.waitid(os.P_PID, stranger.pid, os.WCONTINUED | os.WNOHANG) is None, "of another run"
        finally:
            for each in (job, second, stranger):
                each.kill()


@pytest.mark.parametrize(("where", "options"), [("fold0", []), ("", ["--all-folds"])])
def test_several_processes_are_refused_before_they_start_where_one_is_at_work(
    endless, monkeypatch, capsys, where, options
):
    """After seconds, and with a second sentence below it: "stopped (SIGTERM); nothing is half-written. Next: the same
    command again." """
    monkeypatch.setattr("pipeline.training.distributed.launch", lambda *_, **__: pytest.fail("processes were started"))
    with run_lock(endless.folder.parent / where, name=".job"):
        assert run_verb(["train", *endless.options, "--nproc=2", *options]) == 75
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(rf"process {os.getpid()} is already at work here\. Next: wait for it or stop it", line)


@pytest.mark.parametrize("kernel", ["this", "old"])
def test_no_signal_is_sent_to_a_process_that_does_not_hold_the_folder(tmp_path, monkeypatch, kernel):
    if kernel == "old":
        monkeypatch.setattr(os, "pidfd_open", _old_kernel, raising=False)
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as stranger:
        (tmp_path / ".job").write_text(f"{stranger.pid}\n")
        assert "nothing is running here (never begun). Next: make status" in jobs.stop(tmp_path)
        with run_lock(tmp_path, name=".job"):
            (tmp_path / ".job").write_text(f"{stranger.pid}\n")
            with pytest.raises(StoppedError, match=r"which process cannot be said here .*nobody was asked"):
                jobs.stop(tmp_path, patience=0.3)
            jobs._terminate(stranger.pid, tmp_path)
        assert stranger.poll() is None
        stranger.communicate(b"\n")
        assert stranger.returncode == 0


def test_a_job_whose_number_is_told_late_is_asked_once_and_one_that_never_tells_it_is_named_no_number(
    tmp_path, monkeypatch
):
    """Nobody was asked; after 40 s it advised "kill -9 0", which ends one's own shell, or "process 0 has stopped"."""
    asked, holders = [], iter([0, 0, 7, 0, 7])
    monkeypatch.setattr(jobs, "worker", lambda _: next(holders, None))
    monkeypatch.setattr(jobs, "_terminate", lambda pid, _: asked.append(pid))
    assert "process 7 has stopped" in jobs.stop(tmp_path)
    assert asked == [7]
    holders = iter([0, 0])
    assert "process (unknown) has stopped" in jobs.stop(tmp_path)
    monkeypatch.setattr(jobs, "worker", lambda _: 0)
    with pytest.raises(StoppedError, match=r"nobody was asked\. Next: stop it where it was started\.$"):
        jobs.stop(tmp_path, patience=0.3)
    assert asked == [7]


@pytest.mark.parametrize(
    ("status", "told"),
    [
        ({"exit_code": 75}, "exit code 75, before its first step"),
        ({"step": 3, "steps": 8}, "step 3 of 8"),
        ({"step": 3, "steps": 8, "exit_code": 75}, "exit code 75, step 3 of 8"),
    ],
)
def test_stop_tells_how_far_a_job_was_also_one_that_only_read_its_tables(tmp_path, status, told):
    """Stopped while it still prepared, make stop ended in a traceback: KeyError: 'step'."""
    write_status(tmp_path, {"pid": 5, "state": "stopped", **status})
    assert f"process 5 has stopped ({told})" in jobs._last_words(tmp_path, 5)


def test_looking_at_a_lock_does_not_keep_a_run_from_taking_it(tmp_path):
    ended = threading.Event()

    def look() -> None:
        while not ended.is_set():
            lock_holder(tmp_path)

    threads = [threading.Thread(target=look) for _ in range(2)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(50):
            with run_lock(tmp_path):
                pass
    finally:
        ended.set()
        for thread in threads:
            thread.join()


# --- what is shown ---


@pytest.fixture
def surveyed(tmp_path, monkeypatch) -> Path:
    """Two competitions, four folds; one at work in this process. The clock stands still: surveys are compared."""
    now = time.time()
    monkeypatch.setattr(time, "time", lambda: now)
    folder = tmp_path / "ribonanza" / "runs" / "a.sim80_k2"
    base = {"step": 30, "steps": 120, "loss": 0.5, "tokens_per_s": 1234.5, "memory_mib": 2048, "eta_s": 185.0, "pid": 1}
    tell(folder / "fold0", {**base, "state": "running", "pid": os.getpid(), "metric": 0.25, "best_metric": 0.2})
    tell(folder / "fold1", {**base, "state": "running"})
    tell(folder / "fold1" / "set-aside-1", {**base, "state": "done"})
    tell(tmp_path / "demo" / "rna3d" / "runs" / "b.sim80_k2" / "fold0", {"state": "failed", "message": "why"})
    (folder / "fold2").mkdir()
    return tmp_path


def test_the_survey_tells_of_every_fold_what_its_lock_says(surveyed, capsys):
    with jobs.at_work(surveyed / "ribonanza" / "runs" / "a.sim80_k2" / "fold0"):
        rows = jobs.survey(surveyed)
        assert run_verb(["status", "--json", f"--artifacts={surveyed}"]) == 0
    assert json.loads(capsys.readouterr().out) == rows
    found = [(row["competition"], row["run"], row["fold"], row["state"], row["pid"]) for row in rows]
    assert found == [
        ("demo/rna3d", "b.sim80_k2", 0, "failed", None),
        ("ribonanza", "a.sim80_k2", 0, "running", os.getpid()),
        ("ribonanza", "a.sim80_k2", 1, "lost", None),
    ]
    assert (rows[1]["percent"], rows[1]["eta_s"], rows[2]["eta_s"]) == (25.0, 185.0, None)


def test_rehearsals_are_no_runs(surveyed):
    before = jobs.survey(surveyed)
    shutil.copytree(surveyed / "ribonanza", surveyed / "kernel-check" / "raw-work" / "ribonanza")
    assert jobs.survey(surveyed) == before


def test_runs_on_another_disk_are_surveyed_by_the_link_to_it(surveyed, tmp_path_factory):
    """`make status` showed no run of a competition whose folder is a link."""
    before, disk = jobs.survey(surveyed), tmp_path_factory.mktemp("disk")
    (surveyed / "ribonanza").rename(disk / "ribonanza")
    (surveyed / "ribonanza").symlink_to(disk / "ribonanza")
    assert jobs.survey(surveyed) == before


@pytest.mark.parametrize("place", ["a.sim80_k2/fold0/checkpoints/step-00000267", "refused.sim80_k2"])
def test_what_is_removed_while_runs_are_surveyed_is_passed_over(surveyed, monkeypatch, place):
    """`make status` beside a training ended in FileNotFoundError: … '…/fold0/checkpoints/step-00000267'."""
    before, scan = jobs.survey(surveyed), os.scandir
    goes = surveyed / "ribonanza" / "runs" / place
    goes.mkdir(parents=True)

    def removed(path: Any = ".") -> Any:
        if Path(os.fsdecode(path)) == goes:
            goes.rmdir()
        return scan(path)

    monkeypatch.setattr(os, "scandir", removed)
    assert jobs.survey(surveyed) == before


def test_a_copy_of_a_fold_beside_it_is_no_fold(surveyed):
    """make status ended in "ValueError: invalid literal for int() with base 10: '0_old'"."""
    before = jobs.survey(surveyed)
    fold = surveyed / "ribonanza" / "runs" / "a.sim80_k2" / "fold0"
    shutil.copytree(fold, fold.with_name("fold0_old"))
    assert len(jobs.survey(surveyed)) == len(before) > 0


def test_the_table_has_it_all_for_people(surveyed, capfd):
    with jobs.at_work(surveyed / "ribonanza" / "runs" / "a.sim80_k2" / "fold0"):
        assert run_verb(["status", f"--artifacts={surveyed}"]) == 0
    said, told = capfd.readouterr()
    for word in ("running", "30/120", "25", "0.2500", "0.2000", "0.5000", "1,234", "3 min 5 s", "2.0 GiB", "lost"):
        assert word in said
    assert str(os.getpid()) in said
    assert "b.sim80_k2 fold0: why" in told


def test_a_clock_that_was_set_back_gives_no_negative_age(surveyed):
    folder = surveyed / "ribonanza" / "runs" / "a.sim80_k2" / "fold1"
    status = json.loads((folder / "status.json").read_text())
    (folder / "status.json").write_text(json.dumps(status | {"updated": time.time() + 86_400}))
    assert jobs.survey(surveyed)[2]["age_s"] == 0


def test_a_job_that_still_prepares_is_not_told_the_age_of_what_an_earlier_one_left(tmp_path):
    """`make status` said "running: preparing", and "21 min" since its last sign."""
    folder = tmp_path / "tiny" / "runs" / "a.sim80_k2" / "fold0"
    tell(folder, {"state": "stopped", "pid": os.getppid(), "step": 3, "steps": 4})
    with jobs.at_work(folder):
        (row,) = jobs.survey(tmp_path)
    assert (row["state"], row["phase"], row["age_s"], row["percent"]) == ("running", "preparing", None, 75.0)
    assert jobs.survey(tmp_path)[0]["age_s"] >= 0


def test_damaged_status_files_are_shown_as_lost(tmp_path):
    folder = tmp_path / "tiny" / "runs" / "a.sim80_k2" / "fold0"
    tell(folder, {"state": "done"})
    for text in ("", "[1]", "{"):
        (folder / "status.json").write_text(text)
        assert jobs.survey(tmp_path) == []
        with run_lock(folder):
            assert jobs.survey(tmp_path)[0]["state"] == "running"


def test_the_last_lines_come_from_the_newest_log_that_tells_of_the_fold(tmp_path):
    paths = Paths(comp="tiny", root=tmp_path)
    with pytest.raises(DataError, match="nothing was started here in the background"):
        jobs.find_log(paths, "a", 0)
    for number, folder in enumerate((paths.fold_dir("a", 0), paths.run_dir("a"))):
        folder.mkdir(parents=True, exist_ok=True)
        log = folder / "run.log"
        log.write_text("".join(f"line {k} of {number}\n" for k in range(50_000)))
        os.utime(log, (number, number))
    assert jobs.find_log(paths, "a", 0) == paths.run_dir("a") / "run.log"
    assert jobs.last_lines(log, count=2) == "line 49998 of 1\nline 49999 of 1"


def test_stop_of_a_fold_leaves_the_job_that_trains_all_of_them_alone_and_names_it(tmp_path):
    """FOLD=0, which is what make stop means without FOLD, ended the other folds' training with it."""
    run = tmp_path / "a.sim80_k2"
    with jobs.at_work(run):
        assert f"make stop ALL=1 stops process {os.getpid()}" in jobs.stop(run / "fold0")
        with (
            jobs.at_work(run / "fold0"),
            pytest.raises(ConfigError, match=rf"process {os.getpid()} trains all folds .* Next: make stop ALL=1"),
        ):
            jobs.stop(run / "fold0")
    with jobs.at_work(run / "fold1"):
        assert "nothing is running here. Next: make stop FOLD=<one of 1>" in jobs.stop(run)


def test_a_refusal_says_how_to_stop_what_is_at_work(tmp_path):
    """Of a run over all folds it said "make stop", which refuses to stop that; of make bpp, which it cannot stop."""
    run, other, table = (tmp_path / name for name in ("runs/a.sim80_k2", "runs/b.sim80_k2/fold0", "bpp"))
    with jobs.at_work(run), jobs.at_work(run / "fold0"), jobs.at_work(other), run_lock(table):
        for folder, told in ((run, "make stop ALL=1"), (run / "fold0", "make stop ALL=1"), (other, "make stop FOLD=0")):
            with pytest.raises(BusyError, match=rf"Next: wait for it or stop it \({told}\)"), jobs.at_work(folder):
                pass
        with pytest.raises(BusyError, match=rf"stop it \(kill {os.getpid()}\)"), run_lock(table):
            pass


def test_a_job_of_all_folds_that_has_ended_is_not_told_as_never_begun(tmp_path):
    """make stop ALL=1 twice: the second one said "never begun" of three trained folds and one half-trained."""
    (tmp_path / "fold0").mkdir()
    (tmp_path / "fold0" / "status.json").write_text('{"state": "stopped"}')
    assert "nothing is running here. Next: make status shows all runs" in jobs.stop(tmp_path)


# --- starts that are refused ---


def test_a_failure_is_told_also_where_the_folder_is_gone_by_then(tmp_path):
    """Its sentence was lost in a FileNotFoundError of the traces that were to be removed."""
    fold = tmp_path / "fold0"

    def work() -> None:
        with jobs.at_work(fold):
            fold.rename(tmp_path / "elsewhere")
            raise DataError("why")

    with pytest.raises(DataError, match="why"):
        work()


def refused(folder: Path) -> None:
    def start() -> None:
        with jobs.at_work(folder):
            write_status(folder, {"state": "failed", "message": "why"})
            raise DataError("why")

    with pytest.raises(DataError):
        start()


def test_a_first_start_that_is_refused_leaves_no_folder_and_no_row(tmp_path):
    """It left a "failed" row in make status, of a run that had never begun."""
    folder = tmp_path / "ribonanza" / "runs" / "a.sim80_k2" / "fold0"
    refused(folder)
    assert [path.name for path in tmp_path.iterdir()] == ["ribonanza"]
    assert list((tmp_path / "ribonanza").iterdir()) == []
    (folder.parent / "fold1" / "checkpoints").mkdir(parents=True)
    refused(folder)
    assert [path.name for path in folder.parent.iterdir()] == ["fold1"], "what others began stays"


@pytest.mark.parametrize("trace", ["checkpoints", "metrics.jsonl", "set-aside-1", "oof.parquet"])
def test_a_run_that_was_begun_keeps_everything_when_a_start_is_refused(tmp_path, trace):
    folder = tmp_path / "runs" / "a.sim80_k2" / "fold0"
    (folder / trace).mkdir(parents=True)
    refused(folder)
    assert {path.name for path in folder.iterdir()} == {trace, ".job", "status.json"}


@pytest.mark.parametrize("all_folds", [False, True])
def test_a_refusal_in_the_background_that_nobody_saw_stays_to_be_read(tmp_path, all_folds):
    run = tmp_path / "tiny" / "runs" / "a.sim80_k2"
    (run / "fold0").mkdir(parents=True)
    ((run if all_folds else run / "fold0") / "run.log").write_text("error: why\n")
    refused(run / "fold0")
    assert [(row["state"], row["message"]) for row in jobs.survey(tmp_path)] == [("failed", "why")]


def test_a_lock_that_goes_with_a_refused_start_keeps_nobody_else_out_and_lets_nobody_in(tmp_path, monkeypatch):
    """Two that opened the file before it was removed would otherwise hold a lock that no third one sees."""
    lock, removed = stop._lock, []

    def removed_before_it_is_ours(descriptor: int, folder: Path) -> bool:
        if not removed:
            removed.append((tmp_path / ".lock").unlink())
        return lock(descriptor, folder)

    monkeypatch.setattr(stop, "_lock", removed_before_it_is_ours)
    with run_lock(tmp_path):
        assert lock_holder(tmp_path) == os.getpid()
    assert removed


def test_a_run_that_began_with_weights_of_its_held_out_fold_is_named_where_it_is_scored(tmp_path, capsys):
    """Training warned; the ensemble then gave it a weight of 1, and its page said "All scores are out of fold"."""
    paths = Paths(comp="ribonanza", root=tmp_path)
    own = {"competition": "ribonanza", "split": "sim80_k2", "folds": "b"}
    learned = {
        "anew": None,
        "same": lambda fold: own | {"fold": fold},
        "elsewhere": lambda fold: own | {"competition": "openvaccine", "fold": 1 - fold},
        "first": lambda fold: own | {"fold": 0},
        "shipped": lambda fold: own | {"fold": fold, "folds": "others"},
    }
    for name, from_where in learned.items():
        for fold in range(2):
            meta = {"competition": "ribonanza", "split": "sim80_k2", "fold": fold, "data": {"folds": "b"}}
            initial = from_where and {"trained_on": [from_where(fold)]}
            write_json(paths.fold_dir(f"{name}.sim80_k2", fold) / "config.json", meta | {"initial": initial})
    runs = ["denovo.sim80_k2", *(f"{name}.sim80_k2" for name in learned)]
    assert seen_before(paths, runs, [0, 1]) == {"first.sim80_k2": [1], "shipped.sim80_k2": [0, 1]}
    warn_of_seen_before(paths, runs, [0])
    said = capsys.readouterr().err
    assert "warning: shipped.sim80_k2: fold 0 began with weights that have learned" in " ".join(said.split())
    assert "first.sim80_k2" not in said


def test_unfinished_predictions_are_used_and_named(tmp_path, capsys):
    """An ensemble took predictions of a training that was stopped by its clock for those of a finished one."""
    paths = Paths(comp="ribonanza", root=tmp_path)
    for fold in range(2):
        folder = paths.fold_dir("a.sim80_k2", fold)
        (folder / "checkpoints").mkdir(parents=True)
        for table in ("oof", "test"):
            (folder / f"{table}.parquet").touch()
            params = {"version": 1, **({"unfinished": True} if fold else {})}
            (folder / f"predict-{table}.manifest.json").write_text(json.dumps({"params": params, "facts": {}}))
    assert finished_runs(paths, "sim80_k2") == ["a.sim80_k2"]
    warn_of_unfinished(paths, ["a.sim80_k2"])
    assert "a.sim80_k2: fold1 predicted before the training was finished" in capsys.readouterr().err
