import fcntl
import os
import re

import pytest

from pipeline.paths import REPOSITORY
from submissions import log
from submissions.log import TITLE, LogEntry, append, header, today


def entry(**changes: str) -> LogEntry:
    cells = {
        "date": "2026-01-02",
        "comp": "ribonanza",
        "name": "all",
        "split": "sim80_k5",
        "folds": "0,1",
        "metric": "MAE",
        "score": "0.12345",
        "floors": "constant 0.2647",
        "data": "0123456789",
        "config": "abcdef0123",
        "commit": "1a2b3c4d5e",
    }
    return LogEntry(**(cells | changes))


def test_a_result_is_logged_once(tmp_path):
    path = tmp_path / "new" / "LOG.md"
    assert append(path, entry())
    text = path.read_text()
    assert not append(path, entry(date="2027-01-01", commit="fffffffff", note="again"))
    assert path.read_text() == text
    assert text == TITLE + header() + entry().line()


@pytest.mark.parametrize("column", ["comp", "name", "split", "folds", "score", "data"])
def test_another_result_gets_its_own_line_below(tmp_path, column):
    path = tmp_path / "LOG.md"
    append(path, entry())
    assert append(path, entry(**{column: "other"}))
    assert path.read_text().splitlines()[-2:] == [entry().line().strip(), entry(**{column: "other"}).line().strip()]


def test_cells_cannot_break_the_table(tmp_path):
    path = tmp_path / "LOG.md"
    odd = entry(name="a|b", note="two\nlines | and a bar")
    assert append(path, odd)
    assert not append(path, odd)
    lines = [line for line in path.read_text().splitlines() if line.startswith("|")]
    assert {line.count("|") for line in lines} == {13}
    assert not list(tmp_path.glob(".*"))


def test_lines_that_people_add_are_kept(tmp_path):
    path = tmp_path / "LOG.md"
    path.write_text(TITLE + header() + entry().line() + "\nA remark between lines.")
    append(path, entry(score="0.1"))
    assert (
        path.read_text()
        == TITLE + header() + entry().line() + "\nA remark between lines.\n" + entry(score="0.1").line()
    )


def test_committed_log_starts_as_the_code_writes_it():
    assert (REPOSITORY / "submissions" / "LOG.md").read_text().startswith(TITLE + header())


def test_the_date_has_its_form():
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", today())


def test_evaluations_that_end_at_the_same_time_wait_for_each_other(tmp_path, monkeypatch):
    """Both read the log before either wrote it, and one of the two lines was lost."""

    def write(path, text):
        other = os.open(path.parent, os.O_RDONLY)
        with pytest.raises(BlockingIOError):
            fcntl.flock(other, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(other)
        path.write_text(text)

    monkeypatch.setattr(log, "write_text", write)
    assert append(tmp_path / "LOG.md", entry())
    assert append(tmp_path / "LOG.md", entry(name="other"))
