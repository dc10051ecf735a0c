"""The data stage as a whole: current or built, the same bytes twice, and a report for people."""

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from pipeline import preprocess
from pipeline.competitions.ribonanza import RIBONANZA
from pipeline.paths import REPOSITORY, Paths

TRAIN_HEADER = (
    "sequence_id,sequence,experiment_type,dataset_name,reads,signal_to_noise,reactivity_0001,reactivity_error_0001\n"
)


@pytest.fixture
def raw_files(tmp_path: Path, rng: np.random.Generator) -> Path:
    folder = tmp_path / "raw"
    folder.mkdir()
    rows = [
        f"id{key:03d},ACGU,{probe},lib,500,2.5," for key in rng.permutation(300) for probe in ("DMS_MaP", "2A3_MaP")
    ]
    lines = [f"{row}{value:.3f},0.1\n" for row, value in zip(rows, rng.random(len(rows)), strict=True)]
    (folder / "train_data.csv").write_text(TRAIN_HEADER + "".join(lines))
    (folder / "test_sequences.csv").write_text("id_min,id_max,sequence_id,sequence,future\n0,3,t,ACGU,0\n")
    return folder


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return Paths(comp="ribonanza", root=tmp_path / "artifacts")


def test_second_run_is_current_and_keeps_the_report(raw_files: Path, paths: Paths):
    first = preprocess.run(RIBONANZA, raw_files, paths)
    second = preprocess.run(RIBONANZA, raw_files, paths)
    assert (first.status, second.status) == ("built", "current")
    assert first.facts == second.facts
    assert (paths.clean("train").parent / "data.manifest.json").is_file()


@pytest.mark.parametrize("name", ["train_data.csv", "test_sequences.csv", "sample_submission.csv"])
def test_changed_or_new_raw_file_is_noticed(name: str, raw_files: Path, paths: Paths):
    preprocess.run(RIBONANZA, raw_files, paths)
    if name.startswith("sample"):
        rows = "".join(f"{row},0,0\n" for row in range(4))
        (raw_files / name).write_text("id,reactivity_DMS_MaP,reactivity_2A3_MaP\n" + rows)
    else:
        text = (raw_files / name).read_text()
        (raw_files / name).write_text(text.replace("ACGU", "ACGG"))
    assert preprocess.run(RIBONANZA, raw_files, paths).status == "built"


def test_same_file_under_another_name_is_current(raw_files: Path, paths: Paths):
    """The hash decides, not the name or the time."""
    preprocess.run(RIBONANZA, raw_files, paths)
    (raw_files / "train_data.csv").rename(raw_files / "train_data.csv.gz")
    os.utime(raw_files / "test_sequences.csv", (0, 0))
    assert preprocess.run(RIBONANZA, raw_files, paths).status == "current"


def test_two_builds_in_two_processes_are_byte_identical(raw_files: Path, tmp_path: Path):
    code = (
        "import sys; from pathlib import Path; from pipeline import preprocess; from pipeline.paths import Paths\n"
        "from pipeline.competitions.ribonanza import RIBONANZA\n"
        "preprocess.run(RIBONANZA, Path(sys.argv[1]), Paths(comp='ribonanza', root=Path(sys.argv[2])))\n"
    )
    digests = []
    for seed in "12":
        root = tmp_path / seed
        command = [sys.executable, "-c", code, str(raw_files), str(root)]
        subprocess.run(command, check=True, cwd=REPOSITORY, env=os.environ | {"PYTHONHASHSEED": seed})
        tables = [Paths(comp="ribonanza", root=root).clean(table) for table in RIBONANZA.tables]
        facts = json.loads(tables[0].with_name("data.manifest.json").read_text())["facts"] | {"peak_memory_mib": 0}
        digests.append([json.dumps(facts), *(hashlib.sha256(path.read_bytes()).hexdigest() for path in tables)])
    assert digests[0] == digests[1]


def test_report_is_one_readable_line_per_fact(raw_files: Path, paths: Paths):
    lines = preprocess.describe(preprocess.run(RIBONANZA, raw_files, paths).facts)
    assert "rows = 600" in lines
    assert "sequences = 300" in lines
    assert "  DMS_MaP: profiles = 300, pass_SN_filter = 300, null share = 0.75" in lines
    assert any(line.startswith("    reactivity: min = 0") for line in lines)
    assert all("{" not in line and "\n" not in line for line in lines)


def test_report_shortens_what_is_long():
    assert preprocess.describe({"left": [], "ids": ["a", "b"]}) == ["left = none", "ids = a, b"]
    assert preprocess.describe({"ids": list(range(1000, 1100))})[0].endswith("1,004, 1,005, … (94 more)")
    (line,) = preprocess.describe({"lengths": {str(length): 1 for length in range(100)}})
    assert line.startswith("lengths: 0 = 1, 1 = 1, ")
    assert line.endswith("(76 more)")
