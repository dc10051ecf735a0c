"""Notebooks on Kaggle: the real client against a server on the loopback interface; only evidence counts."""

import errno
import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from pipeline.errors import DataError, NetworkError
from pipeline.kernel import service
from pipeline.paths import Paths
from pipeline.stage import sha256_file, write_json
from tests.kaggle_server import FakeKaggle, serve
from tests.pipeline.kernels import RUN, order_of, pack

CANARY = "canary-0123456789abcdef"


@dataclass
class Desk:
    """A bundle, and a Kaggle to send it to."""

    paths: Paths
    home: Path
    kaggle: FakeKaggle

    @property
    def slug(self) -> str:
        return self.home.name

    @property
    def dataset(self) -> str:
        return f"tester/{self.slug}-data"

    def push(self) -> dict:
        return service.push(self.paths, slug=self.slug, every=0.05).facts

    def have_dataset(self) -> None:
        """As after an earlier push of the same bundle."""
        digest = sha256_file(self.home / "dataset" / "MANIFEST.json")
        write_json(self.home / "sent.json", {"dataset": self.dataset, "manifest": digest})

    def leave(self, files: dict[str, bytes], **told: Any) -> None:
        """What a notebook left: files, and what it declares."""
        digests = {name: hashlib.sha256(content).hexdigest() for name, content in files.items()}
        facts = {"bundle": self.slug, "mode": "train", "state": "finished", "files": digests} | told
        self.kaggle.kernel_outputs = {**files, "KERNEL.json": json.dumps(facts).encode()}


FILES = {
    f"artifacts/ribonanza/runs/{RUN}/fold0/oof.parquet": b"oof",
    f"artifacts/ribonanza/runs/{RUN}/fold0/checkpoints/step-00000004/meta.json": b"{}",
}


@pytest.fixture
def desk(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Desk]:
    paths = Paths(comp="ribonanza", root=tmp_path / "artifacts")
    home = pack(order_of(paths, folds=(0,)))
    with serve() as server:
        for name, value in server.environment(tmp_path / "home").items():
            monkeypatch.setenv(name, value)
        yield Desk(paths, home, server)


def test_a_push_sends_data_set_and_notebook_once_each(desk: Desk, capfd: pytest.CaptureFixture[str]):
    facts = desk.push()
    assert facts["version"] == 1
    assert facts["state"] == "QUEUED"
    told = json.loads((desk.home / "dataset" / "MANIFEST.json").read_text())
    assert set(desk.kaggle.blobs.values()) == {*told["files"], "MANIFEST.json"}
    for token, name in desk.kaggle.blobs.items():
        assert desk.kaggle.uploads[token] == (desk.home / "dataset" / name).read_bytes()
    saved = desk.kaggle.kernels[f"tester/{desk.slug}"]
    assert saved["enableInternet"] is False
    assert saved["datasetDataSources"] == [desk.dataset]
    assert saved["sessionTimeoutSeconds"] == told["limit_s"]
    uploads = len(desk.kaggle.blobs)
    desk.push()
    assert len(desk.kaggle.blobs) == uploads
    assert desk.kaggle.calls.count("SaveKernel") == 2
    printed = "".join(capfd.readouterr())
    left = [path.read_bytes() for path in desk.home.rglob("*") if path.is_file()]
    assert CANARY not in printed
    assert CANARY.encode() not in b"".join(left)


def test_a_bundle_that_changed_becomes_a_new_version(desk: Desk):
    desk.kaggle.datasets[desk.dataset] = 3
    desk.kaggle.push_error = "enough for this test"
    with pytest.raises(NetworkError, match="enough for this test"):
        desk.push()
    assert desk.kaggle.calls.count("CreateDatasetVersion") == 1
    assert desk.kaggle.datasets[desk.dataset] == 4


def test_a_push_that_is_refused_with_exit_code_zero_is_seen(desk: Desk):
    desk.have_dataset()
    desk.kaggle.push_error = "Maximum batch GPU session count of 2 reached."
    with pytest.raises(NetworkError, match=r"Kaggle refused it: Maximum batch GPU session count of 2 reached\."):
        desk.push()
    assert not (desk.home / "pushed.json").exists()


def test_an_input_that_kaggle_does_not_know_is_no_success(desk: Desk):
    desk.have_dataset()
    desk.kaggle.invalid_sources = [desk.dataset]
    with pytest.raises(NetworkError, match=r"knows no dataset \['tester/.*runs without it and will fail"):
        desk.push()
    assert not (desk.home / "pushed.json").exists()
    assert not (desk.home / "sent.json").exists()


@pytest.mark.parametrize(
    ("code", "sentence"),
    [
        (401, "does not know who asks"),
        (403, "accept the rules at https://www.kaggle.com/competitions/stanford-ribonanza-rna-folding/rules"),
        (404, "knows no such thing"),
        (429, "asks for patience"),
        (500, "a failure of its own"),
    ],
)
def test_each_refusal_of_a_push_is_one_sentence(desk: Desk, code: int, sentence: str):
    desk.have_dataset()
    desk.kaggle.fail["SaveKernel"] = code
    with pytest.raises(NetworkError, match=sentence):
        desk.push()
    assert desk.kaggle.calls.count("SaveKernel") == 1


def test_an_upload_that_fails_with_exit_code_zero_is_seen(desk: Desk):
    desk.kaggle.fail["PUT"] = 500
    with pytest.raises(NetworkError, match="upload of tester/"):
        desk.push()
    assert "SaveKernel" not in desk.kaggle.calls


def test_a_data_set_that_is_refused_with_exit_code_zero_is_seen(desk: Desk):
    desk.kaggle.dataset_error = "The title is in use."
    with pytest.raises(NetworkError, match=r"Kaggle refused it: The title is in use\."):
        desk.push()
    assert "SaveKernel" not in desk.kaggle.calls


def test_a_data_set_that_kaggle_cannot_unpack_is_told(desk: Desk):
    desk.kaggle.datasets[desk.dataset] = 1
    desk.kaggle.dataset_state = "FAILED"
    with pytest.raises(NetworkError, match="failed to unpack"):
        desk.push()
    assert "SaveKernel" not in desk.kaggle.calls


def test_status_follows_a_notebook_to_its_end(desk: Desk):
    facts = service.status(desk.paths, slug=desk.slug, wait=600.0, every=0.05).facts
    assert facts["state"] == "COMPLETE"
    assert desk.kaggle.calls.count("GetKernelSessionStatus") == 3


@pytest.mark.parametrize("state", ["ERROR", "CANCEL_ACKNOWLEDGED"])
def test_a_notebook_that_failed_is_a_failure_although_the_client_ends_with_zero(desk: Desk, state: str):
    desk.kaggle.kernel_states = [state]
    reason = ": out of memory" if state == "ERROR" else ""
    with pytest.raises(NetworkError, match=rf"ended with {state}{reason}\. Next: make kernel-pull"):
        service.status(desk.paths, slug=desk.slug)


def test_a_notebook_that_runs_on_is_told(desk: Desk):
    desk.kaggle.kernel_states = ["RUNNING"]
    assert service.status(desk.paths, slug=desk.slug).facts["state"] == "RUNNING"
    with pytest.raises(NetworkError, match=r"still RUNNING after 0 s.*waits on"):
        service.status(desk.paths, slug=desk.slug, wait=0.01, every=0.05)


@pytest.mark.parametrize("code", [403, 404])
def test_a_notebook_that_is_not_there_is_told(desk: Desk, code: int):
    desk.kaggle.fail["GetKernelSessionStatus"] = code
    with pytest.raises(NetworkError, match="no such notebook"):
        service.status(desk.paths, slug=desk.slug)


def test_what_a_notebook_left_is_verified_and_becomes_a_local_run(desk: Desk):
    desk.leave(FILES)
    desk.kaggle.kernel_outputs["artifacts/ribonanza/clean/train.parquet"] = b"tables stay there"
    write_json(desk.home / "pushed.json", {"version": 2})
    report = service.pull(desk.paths, slug=desk.slug)
    assert json.loads((desk.home / service.PULLED).read_text()) == {"version": 2}
    assert report.facts["placed"] == [str(desk.paths.fold_dir(RUN, 0))]
    assert desk.paths.oof(RUN, 0).read_bytes() == b"oof"
    assert (desk.home / f"{desk.slug}.log").read_text() == "done"
    assert not (desk.home / "output" / "artifacts" / "ribonanza" / "clean").exists()
    desk.paths.oof(RUN, 0).write_bytes(b"mine")
    assert service.pull(desk.paths, slug=desk.slug).facts["placed"] == []
    assert desk.paths.oof(RUN, 0).read_bytes() == b"mine"


def test_a_file_that_holds_no_prediction_is_told_when_it_is_fetched(desk: Desk, capsys: pytest.CaptureFixture[str]):
    for filled in (False, True):
        desk.leave({"submission.csv": b"id\n"}, mode="predict", filled=filled)
        service.pull(desk.paths, slug=desk.slug)
        assert ("nothing was predicted" in " ".join(capsys.readouterr().err.split())) is filled


def test_a_fold_is_placed_whole_or_not_at_all(desk: Desk, monkeypatch: pytest.MonkeyPatch):
    """A full disk, or a kill, left half of it, of which every later pull said that it "is there already and stays"."""
    desk.leave(FILES)
    fold = desk.paths.fold_dir(RUN, 0)
    copy = shutil.copyfile

    def fill_up(source: Path, target: Path) -> None:
        monkeypatch.setattr(shutil, "copyfile", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "full")))
        copy(source, target)

    monkeypatch.setattr(shutil, "copyfile", fill_up)
    with pytest.raises(OSError, match="full"):
        service.pull(desk.paths, slug=desk.slug)
    assert list(fold.parent.iterdir()) == []
    (fold.parent / f".fold0.part-{2**22 + 1}").mkdir()  # of a killed process
    monkeypatch.setattr(shutil, "copyfile", copy)
    assert service.pull(desk.paths, slug=desk.slug).facts["placed"] == [str(fold)]
    assert [path.name for path in fold.parent.iterdir()] == ["fold0"]
    assert sum(path.is_file() for path in fold.rglob("*")) == len(FILES)


def test_code_of_another_bundle_is_not_sent(desk: Desk):
    """A `make kernel` that was killed left new code beside the old data set, and both were sent."""
    path = desk.home / "code" / "kernel.py"
    path.write_text(path.read_text() + "# other\n")
    with pytest.raises(DataError, match=r"kernel.py: absent, or of another bundle .* Next: make kernel"):
        desk.push()
    assert desk.kaggle.calls == []


@pytest.mark.parametrize("damage", ["absent", "other"])
def test_a_declared_file_that_is_not_there_is_a_loud_failure(desk: Desk, damage: str):
    desk.leave(FILES)
    name = next(iter(FILES))
    if damage == "absent":
        del desk.kaggle.kernel_outputs[name]
    else:
        desk.kaggle.kernel_outputs[name] = b"cut"
    with pytest.raises(DataError, match=r"oof\.parquet, which it declared, is (absent|other than declared)"):
        service.pull(desk.paths, slug=desk.slug)
    assert not (desk.home / "output").exists()
    assert not desk.paths.fold_dir(RUN, 0).exists()


def test_a_notebook_that_did_not_end_well_leaves_its_log(desk: Desk):
    desk.kaggle.kernel_outputs = {"submission.csv": b"id\n"}
    with pytest.raises(DataError, match=r"holds no KERNEL\.json.*\.log says why"):
        service.pull(desk.paths, slug=desk.slug)
    assert (desk.home / f"{desk.slug}.log").is_file()


def test_a_name_that_leaves_its_folder_is_refused(desk: Desk):
    desk.leave({"../../artifacts/submission.csv": b"x"})
    with pytest.raises(DataError, match="left the folder that it was fetched into"):
        service.pull(desk.paths, slug=desk.slug)
    assert not (desk.home / ".incoming").exists()
    assert not (desk.home / "output").exists()


def test_output_that_kaggle_does_not_show_is_told(desk: Desk):
    desk.kaggle.fail["ListKernelSessionOutput"] = 404
    with pytest.raises(NetworkError, match="no such notebook"):
        service.pull(desk.paths, slug=desk.slug)


def test_output_that_breaks_off_is_not_taken(desk: Desk):
    desk.leave(FILES)
    desk.kaggle.fail["cut"] = "once"
    with pytest.raises(NetworkError, match="the connection to Kaggle failed or broke off"):
        service.pull(desk.paths, slug=desk.slug)
    assert not (desk.home / "output").exists()
