"""The benchmark of the data stage, and the promise that it measures: memory that does not follow the file."""

import json
from pathlib import Path

import pytest

from pipeline import bench_data
from pipeline.bench_data import LISTS, OURS, PEERS


def test_record_holds_every_contestant_that_is_installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    absent = {"somebody else": ("no_such_package", "1 / 0")}
    monkeypatch.setattr(bench_data, "PEERS", {LISTS: PEERS[LISTS], OURS: PEERS[OURS]} | absent)
    results = bench_data.run(rows=301, repeats=1, folder=tmp_path, record=tmp_path / "data.json")
    assert json.loads((tmp_path / "data.json").read_text())["rows"] == results
    assert [row["what"] for row in results] == [LISTS, OURS]
    assert results[0]["ratio_to_polars_lists"] == 1.0
    assert all(row["rows"] == 301 and row["seconds"] > 0 and row["peak_mib"] > 20 for row in results)


def test_synthetic_file_is_seeded(tmp_path: Path):
    for name in "ab":
        bench_data.write_csv(tmp_path / name / "train_data.csv", rows=50)
    first, second = ((tmp_path / name / "train_data.csv").read_bytes() for name in "ab")
    assert first == second
    assert first.count(b"\n") == 51


@pytest.mark.slow
def test_memory_of_the_data_stage_does_not_follow_the_file(tmp_path: Path):
    """60,000 more rows are 118 MB more text and 90 MB more numbers, in every run; threads that wait add some in one."""

    def peak(rows: int) -> float:
        csv = tmp_path / str(rows) / "train_data.csv"
        if not csv.exists():
            bench_data.write_csv(csv, rows=rows)
        return bench_data.measure(OURS, csv, tmp_path / "out")[1]

    least = peak(40_000)
    assert any(peak(100_000) - least < 40 for _ in range(3))
