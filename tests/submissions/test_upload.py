"""Nothing is believed that Kaggle does not list, and nothing is sent twice; the real client against a fake Kaggle."""

import errno
import fcntl
import json
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pytest

from pipeline.competitions import get_competition
from pipeline.errors import ConfigError, DataError, NetworkError
from pipeline.paths import Paths
from pipeline.runlog import cut_torn_tail
from pipeline.stage import sha256_file
from submissions import ledger, upload
from tests.chain_tables import make_paths, write_values_data
from tests.kaggle_server import FakeKaggle, serve

COMPETITION = get_competition("ribonanza")


@dataclass
class Desk:
    """A valid submission, and a Kaggle to send it to."""

    paths: Paths
    file: Path
    kaggle: FakeKaggle

    def submit(self, **options) -> dict:
        report = upload.run(self.paths, competition=COMPETITION, name="all", **{"wait": 600, "every": 0.05, **options})
        return {"status": report.status, **report.facts}

    def states(self) -> list[str]:
        book = self.paths.log.parent / "ledger.jsonl"
        return [json.loads(line)["state"] for line in book.read_text().splitlines()] if book.exists() else []

    def sent(self) -> int:
        return self.kaggle.calls.count("CreateSubmission")


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    paths = make_paths(tmp_path)
    write_values_data(paths, np.random.default_rng(3))
    rows = read_length(paths)
    file = paths.submission("all")
    file.parent.mkdir(parents=True)
    lines = [f"{k},0.25,0.5" for k in range(rows)]
    file.write_text("\n".join(["id,reactivity_DMS_MaP,reactivity_2A3_MaP", *lines]) + "\n")
    monkeypatch.setattr(upload, "_LOOKS", 2)  # each starts the client
    with serve() as server:
        for name, value in server.environment(tmp_path / "home").items():
            monkeypatch.setenv(name, value)
        yield Desk(paths, file, server)


def read_length(paths: Paths) -> int:
    import polars as pl

    return int(pl.read_parquet(paths.clean("test"))["id_max"].max()) + 1


def test_a_submission_ends_with_its_score_in_ledger_and_log(desk: Desk):
    found = desk.submit()
    assert found["status"] == "built"
    assert (found["public"], found["private"]) == ("0.20831", "0.21064")
    assert desk.states() == ["sent", "listed", "scored"]
    assert "public 0.20831, private 0.21064" in desk.paths.log.read_text()
    assert next(iter(desk.kaggle.uploads.values())) == desk.file.read_bytes()


def test_what_an_ensemble_said_before_it_was_made_anew_is_sent_only_if_the_file_is_named(desk: Desk):
    """After make train-all and make ensemble, make submit-kaggle sent the file of the ensemble before."""
    home = desk.paths.ensemble_dir("all")
    home.mkdir(parents=True)
    (home / "test.parquet").write_text("earlier")
    written = {"inputs": {"predictions": sha256_file(home / "test.parquet")}, "facts": {}}
    (home / "submit-csv.manifest.json").write_text(json.dumps(written))
    (home / "test.parquet").write_text("anew")
    with pytest.raises(ConfigError, match=r"csv: written before .*test\.parquet was made anew\. Next: make submit"):
        desk.submit()
    assert desk.sent() == 0
    assert desk.submit(file=desk.file)["status"] == "built"


def leave_output(desk: Desk, text: str, version: int | None = 3) -> None:
    """As `make kernel-pull` leaves a notebook's output."""
    home = desk.paths.kernel_dir("ribonanza-predict-all")
    (home / "output").mkdir(parents=True, exist_ok=True)
    (home / "output" / "submission.csv").write_text(text)
    (home / "pulled.json").write_text(json.dumps({"version": version}))


def test_of_a_notebook_its_own_output_is_checked_and_its_version_is_submitted_once(desk: Desk):
    """It checked the ensemble's CSV, and asked Kaggle for a file of that name, which no notebook writes."""
    notebook = upload.Kernel(name="tester/ribonanza-predict-all", version="3")
    valid = desk.file.read_text()
    desk.file.unlink()
    with pytest.raises(ConfigError, match=r"absent; expected the output of tester/.*make kernel-pull"):
        desk.submit(kernel=notebook)
    leave_output(desk, valid.replace("0,0.25", "0,nan", 1))
    with pytest.raises(DataError, match=r"output/submission\.csv"):
        desk.submit(kernel=notebook)
    assert desk.kaggle.calls == []
    leave_output(desk, valid)
    assert desk.submit(kernel=notebook)["public"] == "0.20831"
    (body,) = desk.kaggle.code_submissions
    assert (body["fileName"], body["kernelOwner"], body["kernelSlug"], body["kernelVersion"]) == (
        "submission.csv", "tester", "ribonanza-predict-all", 3,
    )  # fmt: skip
    assert desk.kaggle.uploads == {}
    assert desk.submit(kernel=notebook)["status"] == "current"
    leave_output(desk, valid, version=4)
    with pytest.raises(ConfigError, match=r"of version 4 of .*; expected 3"):
        desk.submit(kernel=notebook)
    assert desk.submit(kernel=upload.Kernel(name=notebook.name, version="4"))["status"] == "built"
    assert [body["kernelVersion"] for body in desk.kaggle.code_submissions] == [3, 4]


def test_the_same_bytes_are_never_sent_again(desk: Desk):
    first = desk.submit()
    again = desk.submit()
    assert again == first | {"status": "current"}
    assert desk.sent() == 1


def test_a_run_killed_after_sending_finds_its_submission_and_waits_on(desk: Desk):
    desk.kaggle.score_after = 10**6
    with pytest.raises(NetworkError, match=r"has no score after 0 s.*sends nothing"):
        desk.submit(wait=0.0)
    assert desk.states() == ["sent", "listed"]
    desk.kaggle.score_after = 0
    assert desk.submit()["public"] == "0.20831"
    assert desk.sent() == 1


def test_what_was_listed_once_is_not_sent_again_when_the_list_hides_it(desk: Desk):
    """It said "the submission did not arrive", wrote it down as failed, and the next call sent it a second time."""
    desk.kaggle.score_after = 10**6
    with pytest.raises(NetworkError, match="has no score"):
        desk.submit(wait=0.0)
    desk.kaggle.hidden = True
    with pytest.raises(NetworkError, match=r"\(submission 1000\).*sends nothing"):
        desk.submit()
    desk.kaggle.hidden, desk.kaggle.score_after = False, 0
    assert desk.submit()["public"] == "0.20831"
    assert desk.sent() == 1


def test_an_upload_that_fails_with_exit_code_zero_is_seen(desk: Desk):
    desk.kaggle.fail["PUT"] = 500
    with pytest.raises(NetworkError, match="submission of"):
        desk.submit()
    assert desk.states() == ["sent", "failed"]
    desk.kaggle.fail.clear()
    assert desk.submit()["status"] == "built"


def test_success_that_the_list_does_not_show_is_no_success(desk: Desk):
    desk.kaggle.hidden = True
    with pytest.raises(NetworkError, match="does not list"):
        desk.submit()
    assert desk.states() == ["sent", "failed"]


def test_an_error_that_arrived_all_the_same_counts(desk: Desk):
    desk.kaggle.fail["CreateSubmission"] = 500
    desk.kaggle.arrive_on_failure = True
    assert desk.submit()["public"] == "0.20831"
    assert desk.sent() == 1


def test_an_empty_budget_sends_nothing(desk: Desk):
    desk.kaggle.budget = 0
    with pytest.raises(ConfigError, match="no submission is left today"):
        desk.submit()
    assert desk.sent() == 0
    assert desk.states() == []


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        (401, "does not know who asks"),
        (403, "accept the rules"),
        (404, "knows no such thing"),
        (429, "asks for patience"),
        (500, "a failure of its own"),
    ],
)
def test_each_refusal_is_one_sentence(desk: Desk, code: int, sentence: str):
    desk.kaggle.fail["GetSubmissionLimits"] = code
    with pytest.raises(NetworkError, match=sentence):
        desk.submit()
    assert desk.states() == []


def test_an_invalid_file_never_leaves(desk: Desk):
    desk.file.write_text(desk.file.read_text().replace("0,0.25", "0,nan", 1))
    with pytest.raises(DataError):
        desk.submit()
    assert desk.kaggle.calls == []


def test_a_scoring_error_is_told(desk: Desk):
    desk.kaggle.final_status = "ERROR"
    with pytest.raises(NetworkError, match="could not score"):
        desk.submit()
    assert desk.states() == ["sent", "listed", "failed"]


def test_a_line_after_a_torn_one_is_not_lost(tmp_path: Path):
    """It ran into the torn one: what had just been sent was not known, and would have been sent again."""
    book = tmp_path / "ledger.jsonl"
    sent = ledger.Sent(comp="ribonanza", sha256="ab", tag="one 1", file="a.csv")
    ledger.append(book, sent)
    with book.open("a") as handle:
        handle.write('{"time": "2026')
    ledger.append(book, replace(sent, sha256="cd", tag="one 2"))
    assert [ledger.find(book, comp="ribonanza", sha256=digest) is None for digest in ("ab", "cd")] == [False, False]
    ledger.append(book, replace(sent, sha256="cd", tag="one 2", state="listed", ref=7))
    found = ledger.find(book, comp="ribonanza", sha256="cd")
    assert found is not None
    assert found.ref == 7


def test_nobody_else_writes_while_a_torn_line_is_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Two uploads after a torn line both saw it: the later one cut what the earlier had just written in its place."""
    book = tmp_path / "ledger.jsonl"
    sent = ledger.Sent(comp="ribonanza", sha256="ab", tag="one 1", file="a.csv")

    def cut(path: Path) -> None:
        with path.open("a") as other, pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        cut_torn_tail(path)

    monkeypatch.setattr(ledger, "cut_torn_tail", cut)
    ledger.append(book, sent)
    book.write_text(book.read_text() + '{"time": "2026')
    ledger.append(book, replace(sent, sha256="cd", tag="one 2"))
    assert [json.loads(line)["tag"] for line in book.read_text().splitlines()] == ["one 1", "one 2"]
    with book.open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)


def test_a_line_is_written_where_the_disk_gives_no_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    def refuse(*_: object) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuse)
    ledger.append(tmp_path / "ledger.jsonl", ledger.Sent(comp="ribonanza", sha256="ab", tag="one 1", file="a.csv"))
    assert "one 1" in (tmp_path / "ledger.jsonl").read_text()


def test_a_last_line_without_its_end_is_whole(tmp_path: Path):
    """An editor may leave it so: it was cut, and what it told would have been sent again."""
    book = tmp_path / "ledger.jsonl"
    sent = ledger.Sent(comp="ribonanza", sha256="ab", tag="one 1", file="a.csv")
    ledger.append(book, sent)
    book.write_text(book.read_text().rstrip("\n"))
    assert ledger.find(book, comp="ribonanza", sha256="ab") == sent
    ledger.append(book, replace(sent, sha256="cd", tag="one 2"))
    assert [ledger.find(book, comp="ribonanza", sha256=digest) is None for digest in ("ab", "cd")] == [False, False]


def test_a_torn_last_line_of_the_ledger_is_left_and_another_is_named(tmp_path: Path):
    book = tmp_path / "ledger.jsonl"
    sent = ledger.Sent(comp="c", sha256="s", tag="t", file="f.csv")
    ledger.append(book, sent)
    book.write_text(book.read_text() + '{"time": "2026')
    assert ledger.find(book, comp="c", sha256="s") == sent
    book.write_text("nonsense\n" + book.read_text())
    with pytest.raises(DataError, match="line 1 is no entry"):
        ledger.find(book, comp="c", sha256="s")
