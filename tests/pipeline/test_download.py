"""The real Kaggle client against a server on the loopback interface: what comes is checked, what fails is explained."""

import fcntl
import io
import json
import os
import stat
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from pipeline import archive, download, kaggle_cli
from pipeline.competitions import get_competition
from pipeline.errors import ConfigError, DataError, NetworkError
from pipeline.paths import Paths
from pipeline.training import stop
from tests.kaggle_server import FakeKaggle, serve
from tests.pipeline.tiny import TINY

CSV = b"sequence_id,sequence\n" + b"a,ACGU\n" * 1000
HERE = replace(TINY, slug="tiny-rna", files=("train.csv", "test.csv"))


@pytest.fixture
def kaggle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeKaggle]:
    with serve() as server:
        for name, value in server.environment(tmp_path / "home").items():
            monkeypatch.setenv(name, value)
        server.files = {"train.csv": CSV, "test.csv": CSV * 2}
        yield server


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return Paths(comp="tiny", root=tmp_path / "artifacts")


def zipped(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_DEFLATED) as opened:
        for name, content in members.items():
            opened.writestr(name, content)
    return buffer.getvalue()


def test_files_come_once_and_are_known_by_their_sha256(kaggle: FakeKaggle, paths: Paths):
    first = download.run(HERE, paths)
    assert first.status == "built"
    assert (paths.raw / "train.csv").read_bytes() == CSV
    assert sorted(path.name for path in paths.raw.glob("[!.]*")) == ["manifest.json", "test.csv", "train.csv"]
    calls = len(kaggle.calls)
    assert download.run(HERE, paths).status == "current"
    assert len(kaggle.calls) == calls


def test_a_download_that_is_under_way_is_waited_for(kaggle: FakeKaggle, paths: Paths, monkeypatch: pytest.MonkeyPatch):
    """The second wrote to the first one's file, and the first ended in a traceback: No such file or directory."""
    paths.raw.mkdir(parents=True)
    with (paths.raw / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)

        def let_go(_: str) -> None:
            assert not kaggle.calls
            fcntl.flock(other, fcntl.LOCK_UN)

        monkeypatch.setattr(stop, "say", let_go)
        assert download.run(HERE, paths).status == "built"


def test_a_file_of_the_right_size_and_other_bytes_comes_again(kaggle: FakeKaggle, paths: Paths):
    download.run(HERE, paths)
    (paths.raw / "train.csv").write_bytes(CSV.replace(b"A", b"G"))
    assert download.run(HERE, paths).status == "built"
    assert (paths.raw / "train.csv").read_bytes() == CSV


def test_the_whole_archive_is_unpacked(kaggle: FakeKaggle, paths: Paths):
    kaggle.files["tiny-rna.zip"] = zipped(**{"train.csv": CSV, "MSA/R1.fasta": b">a\nACGU\n"})
    download.run(HERE, paths, files=["all"])
    assert (paths.raw / "MSA" / "R1.fasta").read_bytes() == b">a\nACGU\n"
    assert set(json.loads((paths.raw / "manifest.json").read_text())["files"]) == {"train.csv", "MSA/R1.fasta"}
    assert download.run(HERE, paths, files=["all"]).status == "current"


def test_a_labelled_set_named_after_its_competition_comes_whole(kaggle: FakeKaggle, tmp_path: Path):
    kaggle.files["tiny-rna.zip"] = zipped(**{"train.csv": CSV, "test.csv": CSV})
    paths = Paths(comp="labelled-tiny-rna", root=tmp_path / "artifacts")
    download.run(get_competition(paths.comp), paths)
    assert sorted(path.name for path in paths.raw.glob("[!.]*")) == ["manifest.json", "test.csv", "train.csv"]
    assert download.run(get_competition(paths.comp), paths).status == "current"


@pytest.mark.parametrize("left", ["tiny-rna", ".tiny-rna.part"])
def test_a_killed_unpacking_is_begun_anew(kaggle: FakeKaggle, paths: Paths, left: str):
    """Every later call ended with "kaggle ended with 0 and said '(nothing)'"."""
    kaggle.files["tiny-rna.zip"] = zipped(**{"train.csv": CSV})
    incoming = paths.raw / ".incoming" / "all"
    (incoming / left).mkdir(parents=True)
    (incoming / left / "train.csv").write_bytes(CSV[:10])
    (incoming / "tiny-rna.zip").write_bytes(kaggle.files["tiny-rna.zip"])
    download.run(HERE, paths, files=["all"])
    assert (paths.raw / "train.csv").read_bytes() == CSV
    assert not incoming.parent.exists()


def test_what_came_with_the_whole_archive_does_not_come_again(kaggle: FakeKaggle, paths: Paths):
    """`make download FILES=all`, then `make download`: every file came a second time."""
    kaggle.files["tiny-rna.zip"] = zipped(**{"train.csv": CSV, "test.csv": CSV * 2})
    download.run(HERE, paths, files=["all"])
    assert download.run(HERE, paths).status == "current"
    (paths.raw / "train.csv").write_bytes(CSV.replace(b"A", b"G"))
    assert download.run(HERE, paths).status == "built"
    assert download.run(HERE, paths, files=["all"]).status == "current"


@pytest.mark.parametrize(
    ("how", "sentence"),
    [
        (401, r"does not know who asks.*kaggle auth login"),
        (403, r"join.*accept the rules at https://www.kaggle.com/competitions/tiny-rna/rules"),
        (404, r"knows no such thing"),
        (429, r"asks for patience"),
        (500, r"a failure of its own"),
    ],
)
def test_each_refusal_is_one_sentence_and_leaves_nothing(kaggle: FakeKaggle, paths: Paths, how: int, sentence: str):
    kaggle.fail["DownloadDataFile"] = how
    with pytest.raises(NetworkError, match=sentence):
        download.run(HERE, paths)
    assert not (paths.raw / "train.csv").exists()
    assert not (paths.raw / "manifest.json").exists()


@pytest.mark.parametrize("digits", ["401", "403", "404", "429", "502"])
def test_digits_of_an_address_are_no_status_code(digits: str):
    """A failed connection said "Kaggle does not know who asks" where the address of an object held 401."""
    said = f"Max retries exceeded (Caused by NewConnectionError('<HTTPSConnection object at 0x7f{digits}1c0d5d0>'))"
    found = kaggle_cli.explain(kaggle_cli.Answer(1, "", said), what="download", slug="tiny-rna")
    assert "the connection to Kaggle failed" in str(found)


def test_a_login_page_is_not_taken_for_data(kaggle: FakeKaggle, paths: Paths):
    kaggle.fail["GET"] = "html"
    with pytest.raises(NetworkError, match=r"got a web page; expected csv.*accept the rules"):
        download.run(HERE, paths)
    kaggle.fail.clear()
    assert download.run(HERE, paths).status == "built"


def test_what_begins_unlike_its_name_is_refused(kaggle: FakeKaggle, paths: Paths):
    kaggle.files["a.parquet"] = b"no parquet at all"
    with pytest.raises(NetworkError, match=r"got bytes b'no parqu'; expected parquet"):
        download.run(HERE, paths, files=["a.parquet"])


def test_a_client_that_hangs_is_stopped_and_what_came_is_kept(kaggle: FakeKaggle, paths: Paths, monkeypatch):
    monkeypatch.setattr(download, "_TIMEOUT_S", 3.0)
    kaggle.fail["GET"] = "slow"
    with pytest.raises(NetworkError, match=r"no end after 3 s.*downloads resume"):
        download.run(HERE, paths)


def test_a_connection_that_breaks_is_taken_up_where_it_broke(kaggle: FakeKaggle, paths: Paths):
    kaggle.fail["cut"] = "once"
    download.run(HERE, paths)
    assert (paths.raw / "train.csv").read_bytes() == CSV


def test_no_client_is_said_in_one_sentence(paths: Paths, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("sys.executable", "/nowhere/python")
    monkeypatch.setenv("PATH", "/nowhere")
    with pytest.raises(NetworkError, match=r"client is not installed. Next: make setup"):
        download.run(HERE, paths)


def test_a_name_with_a_folder_is_refused(paths: Paths):
    with pytest.raises(ConfigError, match="expected names without folders"):
        download.run(HERE, paths, files=["../x.csv"])


@pytest.mark.parametrize("canary", ["canary-0123456789abcdef", "KGAT_abcdef0123456789"])
def test_credentials_never_reach_an_answer(kaggle: FakeKaggle, canary: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setenv("KAGGLE_KEY", canary)
    monkeypatch.setenv("VERBOSE", "1")
    answer = kaggle_cli.call("competitions", "submission-limits", "tiny-rna", "--json", timeout=600)
    assert answer.code == 0
    assert canary not in answer.text
    assert kaggle_cli.redact(f"Authorization: Bearer {canary} and key={canary}").count(canary) == 0


def test_an_archive_that_would_leave_its_folder_writes_nothing(tmp_path: Path):
    """A member "." ended in a traceback: IndexError."""
    link = zipfile.ZipInfo("link")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    for name in ("../out.csv", "/abs.csv", "a/../../b", "C:/x", "a\\..\\b", ".", link):
        path = tmp_path / "bad.zip"
        with zipfile.ZipFile(path, "w") as opened:
            opened.writestr("fine.csv", b"1")
            opened.writestr(name, b"x")
        with pytest.raises(DataError, match="nothing was unpacked"):
            archive.extract(path, tmp_path / "target")
        assert sorted(os.listdir(tmp_path)) == ["bad.zip"]


def test_an_archive_that_unpacks_to_far_more_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(archive, "_SMALL", 2**20)
    path = tmp_path / "bomb.zip"
    path.write_bytes(zipped(zeros=bytes(2**22)))
    with pytest.raises(DataError, match="more than 300 times"):
        archive.extract(path, tmp_path / "target")
    assert not (tmp_path / "target").exists()


@pytest.mark.parametrize("damage", ["cut", "flip", "text"])
def test_a_damaged_archive_is_refused_and_leaves_no_target(tmp_path: Path, damage: str):
    good = zipped(**{"a.csv": CSV})
    bad = {"cut": good[:-30], "flip": good[:60] + bytes([good[60] ^ 255]) + good[61:], "text": b"hello"}[damage]
    path = tmp_path / "x.zip"
    path.write_bytes(bad)
    with pytest.raises(DataError, match="no readable zip archive"):
        archive.extract(path, tmp_path / "target")
    assert not (tmp_path / "target").exists()
