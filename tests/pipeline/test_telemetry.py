"""What a run says of itself reaches whoever listens, and can never end it."""

import importlib.util
import io
import math
import os
import re
import resource
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from pipeline import runlog
from pipeline.errors import ConfigError
from pipeline.runlog import MetricsLog, Unbreakable, duration, read_metrics, read_status, write_status
from pipeline.training import telemetry as telemetry_module
from pipeline.training.telemetry import Telemetry
from pipeline.training.trackers import find_trackers
from tests.pipeline import tiny
from tests.pipeline.tiny import fit


class Listener:
    """Remembers what it is told, and fails when asked to."""

    def __init__(self, fails: str = "") -> None:
        self.fails, self.rows, self.closed, self.opened = fails, list[tuple[int, dict]](), False, list[Any]()

    def open(self, folder: Path, meta: Mapping[str, Any], first_step: int) -> "Listener":
        self.opened.append((folder, meta["run"], first_step))
        self._fail("open")
        return self

    def log(self, values: Mapping[str, float], *, step: int) -> None:
        self._fail("log")
        self.rows.append((step, dict(values)))

    def close(self) -> None:
        self._fail("close")
        self.closed = True

    def _fail(self, where: str) -> None:
        if where == self.fails:
            raise RuntimeError(f"broken in {where}")


def test_a_target_that_validation_has_nothing_of_is_null_in_the_log_and_the_run_goes_on(tmp_path):
    """Ended the run after its first epoch: "ValueError: Out of range float values are not JSON compliant"."""
    with Telemetry(tmp_path, label="", steps=1, first_step=0, metric="MAE") as telemetry:
        told = {"train_loss": 1.0, "metric": 0.5, "best": True}
        telemetry.epoch(step=1, epoch=0, **told, valid={"a": 0.5, "b": math.nan})
    (row,) = read_metrics(tmp_path / "metrics.jsonl")
    assert row["valid"] == {"a": 0.5, "b": None, "b_nonfinite": "nan"}


def test_a_tracker_hears_the_numbers_of_metrics_jsonl(paths):
    listener = Listener()
    fit(paths, trackers={"fake": listener.open})
    rows = read_metrics(paths.fold_dir(tiny.RUN, 0) / "metrics.jsonl")
    steps = [(step, values) for step, values in listener.rows if "train/loss" in values]
    assert [(step, values["train/loss"]) for step, values in steps] == [
        (row["step"], row["loss"]) for row in rows if row["event"] == "step"
    ]
    assert [values["epoch/metric"] for _, values in listener.rows if "epoch/metric" in values] == [
        row["metric"] for row in rows if row["event"] == "epoch"
    ]
    assert {"train/lr", "train/tokens_per_s", "train/grad_norm"} < set(steps[0][1])
    assert listener.opened == [(paths.fold_dir(tiny.RUN, 0), tiny.RUN, 0)]
    assert listener.closed


@pytest.mark.parametrize("where", ["open", "log", "close"])
def test_a_tracker_that_breaks_is_warned_of_once_and_training_goes_on(where, paths, capsys):
    broken, whole = Listener(fails=where), Listener()
    assert fit(paths, trackers={"broken": broken.open, "whole": whole.open}).facts["steps"] == 12
    said = capsys.readouterr().err
    assert said.count(f"TRACK=broken: RuntimeError: broken in {where}; it is left out, training goes on") == 1
    assert whole.closed


def test_an_unknown_tracker_is_refused():
    with pytest.raises(ConfigError, match=r"expected one of tensorboard, wandb"):
        find_trackers(["mlflow"])


@pytest.mark.parametrize("name", ["tensorboard", "wandb"])
def test_a_tracker_that_is_not_there_is_one_sentence_before_anything_starts(name):
    if importlib.util.find_spec(name):
        pytest.skip(f"{name} is installed")
    with pytest.raises(ConfigError, match=rf"TRACK={name}: cannot be imported .*Next: pip install {name}"):
        find_trackers([name])


def test_a_resumed_run_keeps_its_metric_in_view(tmp_path):
    write_status(tmp_path, {"metric": 0.3, "best_metric": 0.2, "state": "lost", "message": "old", "exit_code": 1})
    with Telemetry(tmp_path, label="a", steps=9, first_step=4, metric="MAE"):
        status = read_status(tmp_path)
        assert (status["metric"], status["best_metric"], status["state"]) == (0.3, 0.2, "running")
        assert "message" not in status
    assert read_status(tmp_path)["state"] == "done"


def test_the_last_status_names_the_step_at_which_a_run_stopped(tmp_path):
    """Stopped at step 445, the status said 444: it was told of steps only from time to time."""
    telemetry = Telemetry(tmp_path, label="a", steps=2000, first_step=0, metric="MAE")
    with telemetry:
        for step in (1, 2):
            telemetry.step(step=step, epoch=0, loss=0.5, weight=1.0, norm=1.0, lr=1e-3, tokens=10)
    assert read_status(tmp_path)["step"] == 2


def test_the_time_left_goes_by_the_work_that_is_left(tmp_path):
    """Half the steps, a fourth of the work: three times what was spent is left."""
    work = {4: 0.0, 5: 100.0, 6: 400.0}.__getitem__
    with Telemetry(tmp_path, label="a", steps=6, first_step=4, metric="MAE", work=work) as telemetry:
        telemetry._started -= 1e6
        telemetry.step(step=5, epoch=0, loss=0.5, weight=1.0, norm=1.0, lr=1e-3, tokens=10)
        assert telemetry._state["eta_s"] == pytest.approx(3e6, rel=1e-3)


def test_validation_does_not_slow_training_down(tmp_path, monkeypatch):
    """The first row of an epoch told of 530 nt/s where all others had 39,000."""
    now = [0.0]
    monkeypatch.setattr(telemetry_module.time, "monotonic", lambda: now[0])
    with Telemetry(tmp_path, label="", steps=4, first_step=0, metric="MAE") as telemetry:
        for step in range(1, 5):
            now[0] += 2
            telemetry.step(step=step, epoch=0, loss=1.0, weight=1.0, norm=1.0, lr=1e-3, tokens=100)
            if step == 2:
                now[0] += 60
                telemetry.epoch(step=step, epoch=0, train_loss=1.0, metric=0.5, best=True)
    rows = [row for row in read_metrics(tmp_path / "metrics.jsonl") if row["event"] == "step"]
    assert [row["tokens_per_s"] for row in rows[1:]] == [50.0] * 3  # the first began by another clock


def test_the_bar_on_a_terminal_tells_the_time_left_that_status_tells(tmp_path, monkeypatch):
    """In short crops (train.length_stages) it went by steps, and plain lines and status by nucleotides."""
    console = Console(file=io.StringIO(), force_terminal=True, width=120)
    monkeypatch.setattr(runlog, "console", console)
    work = {0: 0.0, 1: 100.0, 2: 400.0}.__getitem__
    with Telemetry(tmp_path, label="a", steps=2, first_step=0, metric="MAE", work=work) as telemetry:
        telemetry._started -= 1e6
        telemetry.step(step=1, epoch=0, loss=0.5, weight=1.0, norm=1.0, lr=1e-3, tokens=10)
        console.print(telemetry._bar._progress.get_renderable())
    told = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", console.file.getvalue())
    assert f" GiB, {duration(telemetry._state['eta_s'])} left" in told
    assert "1/2 steps\n" in re.sub(" +\n", "\n", told), "and no clock of the bar's own behind it"


def test_rows_that_a_full_disk_does_not_take_are_written_later_and_whole(tmp_path, capsys):
    """A write that is cut short, as on a full disk, made by the limit on the size of files."""
    path = tmp_path / "metrics.jsonl"
    log = MetricsLog(path)
    log.write("step", step=1)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (path.stat().st_size + 10, before[1]))
    try:
        log.write("step", step=2)
        log.write("step", step=3)
        assert [row["step"] for row in read_metrics(path)] == [1], "the torn end is dropped"
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    log.write("step", step=4)
    log.close()
    assert [row["step"] for row in read_metrics(path)] == [1, 2, 3, 4]
    assert capsys.readouterr().err.count("rows are kept and written") == 1


def test_a_status_that_cannot_be_written_does_not_end_the_run(tmp_path, capsys):
    telemetry = Telemetry(tmp_path, label="a", steps=9, first_step=0, metric="MAE")
    (tmp_path / "status.json").mkdir()
    with telemetry:
        telemetry.step(step=1, epoch=0, loss=0.5, weight=1.0, norm=1.0, lr=1e-3, tokens=10)
    assert capsys.readouterr().err.count("status.json cannot be written") == 1
    assert [row["event"] for row in read_metrics(tmp_path / "metrics.jsonl")] == ["step"]


@pytest.mark.parametrize(("metric", "shown"), [(0.25, "0.2500"), (2.5e-12, "2.5e-12")])
def test_plain_lines_have_all_that_the_bar_has(metric, shown, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("pipeline.runlog._PLAIN_INTERVAL_S", 0.0)
    with Telemetry(tmp_path, label="a fold0", steps=400, first_step=0, metric="MAE") as telemetry:
        telemetry.epoch(step=0, epoch=0, train_loss=1.0, metric=metric, best=True)
        telemetry.step(step=1, epoch=0, loss=0.5, weight=1.0, norm=1.0, lr=1e-3, tokens=10)
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith(f"a fold0: 1/400 steps loss 0.5000 MAE {shown} lr 1.0e-03 ")
    assert " nt/s " in last
    assert " GiB, " in last
    assert last.endswith(" left")


@pytest.mark.parametrize("width", [60, 80, 100, 200])
def test_the_bar_of_a_long_name_keeps_its_numbers_in_a_narrow_terminal(monkeypatch, width):
    """At 80 columns "12345/80000" was cut to "123…", and the name stood there whole."""
    console = Console(file=io.StringIO(), force_terminal=True, width=width)
    monkeypatch.setattr(runlog, "console", console)
    with runlog.Bar("ribonanza_mamba+a-variant-of-it.sim80_k5 fold0", total=80_000, unit="steps") as bar:
        bar.advance(12_345, note="loss 0.1234")
        console.print(bar._progress.get_renderable())
    line = next(line for line in reversed(console.file.getvalue().splitlines()) if "steps" in line)
    plain = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", line)
    assert re.search(r"12345/80000 steps -+:--", plain), plain
    assert len(plain) <= width
    assert ("fold0" in plain) == (width >= 100)


def test_a_stream_without_a_reader_swallows_what_it_is_told(tmp_path):
    """A closed terminal raised OSError in the middle of training."""
    path = tmp_path / "gone"
    path.touch()
    with path.open() as unwritable:  # not open for writing: io.UnsupportedOperation is an OSError, as EIO is
        stream = Unbreakable(unwritable)
        assert stream.write("text") == 4
        stream.flush()
        assert stream.name == str(path)


def test_letters_that_a_terminal_does_not_have_are_told_by_number():
    """A table of scores with its ± ended in UnicodeEncodeError, exit code 1, after the work was done."""
    latin = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    stream = Unbreakable(latin)
    assert stream.write("0.387 ± 0.009") == 13
    stream.flush()
    assert latin.buffer.getvalue() == rb"0.387 \xb1 0.009"


@pytest.mark.parametrize("closed", ["1", "2", "12", "012"])
def test_what_is_said_to_a_closed_stream_gets_into_no_file_of_ours(closed, tmp_path):
    """``make train >&-`` ended in an AttributeError; the file that was opened next took the stream's number."""
    work = "from pipeline import runlog; import os; print(); number = os.open('file', os.O_CREAT | os.O_WRONLY); "
    work += "os.write(1, b'noise'); os.write(2, b'noise'); os.write(number, b'ours'); os._exit(7)"
    start = f"import os; [os.close(number) for number in {[int(number) for number in closed]}]; "
    start += f"os.execv({sys.executable!r}, [{sys.executable!r}, '-c', {work!r}])"
    environment = {**os.environ, "PYTHONPATH": str(Path(runlog.__file__).parents[1])}
    done = subprocess.run(
        [sys.executable, "-c", start], cwd=tmp_path, env=environment, capture_output=True, check=False
    )
    assert done.returncode == 7, done.stderr
    assert (tmp_path / "file").read_bytes() == b"ours"


def test_a_status_is_not_written_into_a_folder_that_went_away(tmp_path):
    with pytest.raises(FileNotFoundError, match="gone"):
        write_status(tmp_path / "gone", {"state": "running"})
    assert not (tmp_path / "gone").exists()


def test_durations_are_told_for_people():
    assert [duration(s) for s in (27_660, 185, 9.4, -1)] == ["7 h 41 min", "3 min 5 s", "9 s", "0 s"]
