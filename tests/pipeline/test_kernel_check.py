"""The room in which notebooks are rehearsed is bare and has no network, whatever this machine allows."""

import json
import subprocess
import sys
from pathlib import Path

import polars as pl
import pytest

from pipeline import preprocess
from pipeline.competitions import competition_of, get_competition
from pipeline.errors import ConfigError, DataError
from pipeline.kernel import check, wheels
from pipeline.kernel.check import Room
from pipeline.paths import Paths
from tests.pipeline.kernels import COMPETITION, write_raw


def within(room: Room, code: str) -> subprocess.CompletedProcess[str]:
    command = [*room.prefix, str(room.python), "-c", code]
    return subprocess.run(command, capture_output=True, text=True, check=False, cwd=room.folder)


@pytest.mark.parametrize("namespaces", [True, False])
def test_a_room_has_the_images_packages_and_neither_our_code_nor_a_network(
    namespaces: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    if not namespaces:
        monkeypatch.setattr("shutil.which", lambda _: None)
    room = Room(tmp_path, Path(sys.executable))  # proves that it has no network, or raises
    assert namespaces or room.prefix == []
    assert set(room.versions) == {"Python", *wheels.IMAGE}
    assert within(room, "import polars, pyarrow, numba, safetensors, typer, pip").returncode == 0
    assert "No module named 'pipeline'" in within(room, "import pipeline").stderr
    assert "No module named 'ninja'" in within(room, "import ninja").stderr


def test_processes_in_a_room_talk_to_each_other(tmp_path: Path):
    """Torchrun's do, over the loopback interface, which a new namespace has switched off."""
    room = Room(tmp_path, Path(sys.executable))
    if not room.prefix:
        pytest.skip("this system allows no namespace: Python's own connections are refused, others are not")
    code = "import socket; s = socket.create_server(('127.0.0.1', 0)); socket.create_connection(s.getsockname(), 30)"
    done = within(room, code)
    assert done.returncode == 0, done.stderr


def test_a_room_in_a_relative_folder_runs_from_any_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """`make kernel-check`, whose ARTIFACTS is relative, said FileNotFoundError of the interpreter."""
    monkeypatch.chdir(tmp_path)
    room = Room(Path("room"), Path(sys.executable))
    assert within(room, "pass").returncode == 0


def test_an_interpreter_that_is_none_is_refused(tmp_path: Path):
    """It said "Permission denied. Next: check the path, its permissions and the disk." and left with exit code 5."""
    with pytest.raises(ConfigError, match=r"absent: expected a Python interpreter. Next: IMAGE="):
        Room(tmp_path / "room", tmp_path / "absent")


def test_an_environment_without_the_images_packages_is_refused(tmp_path: Path):
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "bare"], check=True)
    with pytest.raises(ConfigError, match=r"without torch, .*pip; expected 3.11 or 3.12"):
        Room(tmp_path / "room", tmp_path / "bare" / "bin" / "python")


@pytest.mark.parametrize(
    ("script", "sentence"),
    [
        ("raise SystemExit(3)", "the notebook ended with 3"),
        ("pass", "the notebook ended with 0"),
        (
            "import os, pathlib\nfound = next(pathlib.Path(os.environ['RNA_INPUT']).rglob('a.csv'))\n"
            "found.chmod(0o644)\nfound.write_text('mine')\npathlib.Path('KERNEL.json').write_text('{}')",
            "the notebook wrote to its inputs",
        ),
    ],
)
def test_a_notebook_that_misbehaves_is_caught(tmp_path: Path, script: str, sentence: str):
    room = Room(tmp_path, Path(sys.executable))
    outputs = {"code": tmp_path / "code", "dataset": tmp_path / "dataset"}
    for folder in (*outputs.values(), tmp_path / "raw"):
        folder.mkdir()
    (tmp_path / "raw" / "a.csv").write_text("id\n")
    (outputs["dataset"] / "dataset-metadata.json").write_text("{}")
    told = f'{{"dataset_sources": ["tester/any-data"], "competition_sources": ["{COMPETITION.slug}"]}}'
    (outputs["code"] / "kernel-metadata.json").write_text(told)
    (outputs["code"] / "kernel.py").write_text(script)
    with pytest.raises(DataError, match=sentence):
        room.play(outputs, tmp_path / "raw", work=tmp_path / "work")


def test_every_kind_of_data_is_rehearsed(tmp_path: Path):
    """Numbers and profiles were not."""
    tasks = {}
    for name, write in check._SYNTHETIC.items():
        competition, paths = get_competition(name), Paths(comp=name, root=tmp_path)
        if competition.is_own:
            write(tmp_path / name, test=3)
            preprocess.run(competition, tmp_path / name, paths)
        tasks[name] = competition_of(paths).task
    assert set(tasks.values()) == {"values", "structure", "classes", "numbers"}
    assert tasks["profiles-rates"] == "values"


@pytest.mark.parametrize(("cut", "filled"), [(False, False), (True, False), (False, True)])
def test_a_bundle_is_played_as_a_rerun_and_what_it_leaves_is_judged_here(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, cut: bool, filled: bool
):
    """A notebook without pairs predicted nothing, and its file of medians was accepted without a word."""
    seen = {}

    class FakeRoom:
        versions, refusal = {"Python": "3.12.1"}, "none"

        def __init__(self, folder: Path, python: Path) -> None:
            folder.mkdir()

        def play(self, _: object, raw: Path, *, work: Path, more: dict[str, str], timeout: float) -> float:
            seen.update(more, timeout=timeout)
            work.mkdir()
            rows = int(pl.read_csv(raw / "test_sequences.csv")["id_max"].max()) + 1 - cut
            lines = ["id,reactivity_DMS_MaP,reactivity_2A3_MaP", *(f"{row},0.5,0.5" for row in range(rows))]
            (work / "submission.csv").write_text("\n".join(lines) + "\n")
            (work / "KERNEL.json").write_text(json.dumps({"filled": filled}))
            return 7.0

    monkeypatch.setattr(check, "Room", FakeRoom)
    monkeypatch.setattr(check, "read_bundle", lambda _: {"mode": "predict", "limit_s": 3600.0, "files": {}})
    raw = write_raw(tmp_path / "raw", test=4)
    what = {"python": Path(sys.executable), "home": tmp_path, "competition": COMPETITION, "raw": raw}
    if cut or filled:
        with pytest.raises(DataError, match="nothing was predicted" if filled else "rna check ended with 3"):
            check.run_bundle(tmp_path / "room", **what)
        return
    facts = check.run_bundle(tmp_path / "room", **what, limit_s=60.0).facts
    assert seen["KAGGLE_IS_COMPETITION_RERUN"] == "1"
    assert (seen["RNA_LIMIT"], seen["timeout"] >= 60.0) == ("60.0", True)
    rows = int(pl.read_csv(raw / "test_sequences.csv")["id_max"].max()) + 1
    assert facts["competitions"]["ribonanza"] == {"notebook": 7.0, "rows": rows}
    assert check.describe(facts)[2:] == [
        "ribonanza: notebook 7 s",
        f"  submission.csv of the test set in RAW: {rows:,} rows, accepted",
    ]
