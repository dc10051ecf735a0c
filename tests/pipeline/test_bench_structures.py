"""The benchmark of single targets runs the stages that a test set meets, each in a process of its own."""

import json
from pathlib import Path

import polars as pl
import pytest

from pipeline import bench_structures
from pipeline.errors import ConfigError, DataError
from pipeline.paths import Paths

NETWORK = "small_structure.sim80_k5"
RUNS = ("denovo.sim80_k5", "templates.sim80_k5", f"{NETWORK}/fold0/checkpoints")


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    """A chain that has run, as far as folders tell."""
    paths = Paths(comp="rna3d", root=tmp_path / "artifacts")
    for run in RUNS:
        paths.run_dir(run).mkdir(parents=True)
    paths.clean("test").parent.mkdir(parents=True)
    pl.DataFrame(
        {"sequence_id": ["R1"], "sequence": ["ACGU"], "temporal_cutoff": [None], "chain_lengths": [[4]]},
        schema_overrides={"chain_lengths": pl.List(pl.Int32), "temporal_cutoff": pl.Date},
    ).write_parquet(paths.clean("test"))
    return paths


def test_every_stage_of_every_length_is_measured_and_kept(paths, tmp_path, monkeypatch, capsys):
    asked = []

    def spawn(module: str, cell: dict) -> dict | None:
        own = Paths(comp="rna3d", root=Path(cell["artifacts"]))
        row = pl.read_parquet(own.clean("test"))
        assert row.schema == pl.read_parquet(paths.clean("test")).schema
        assert (own.fold_dir(NETWORK, 0) / "checkpoints").is_dir()
        assert row["chain_lengths"].to_list() == [[len(row["sequence"][0])]]
        asked.append((module, len(row["sequence"][0]), cell["stage"]))
        return {"seconds": 1.5, "peak_mib": 400} if cell["stage"] != "network" else None  # out of memory

    monkeypatch.setattr(bench_structures.measure, "spawn", spawn)
    monkeypatch.setattr(bench_structures.measure, "RECORDS", tmp_path)
    monkeypatch.setattr(bench_structures, "LENGTHS", (5, 7))
    bench_structures.run(paths, split="sim80_k5", network=NETWORK)
    stages = ("pairing", "de novo", "templates", "network")
    assert asked == [("pipeline.bench_structures", nt, stage) for nt in (5, 7) for stage in stages]
    rows = json.loads(next(tmp_path.glob("structures-*.json")).read_text())["rows"]
    assert [(row["nt"], row["de novo, s"], row["network, MiB"]) for row in rows] == [(5, 1.5, None), (7, 1.5, None)]
    assert "–" in capsys.readouterr().out


def test_pairing_is_that_of_the_target(paths, tmp_path):
    pytest.importorskip("RNA")
    own = Paths(comp="rna3d", root=tmp_path / "own")
    bench_structures.write_target(own, like=paths, length=30)
    cell = {"comp": "rna3d", "artifacts": str(own.root), "learned": str(paths.root), "split": "sim80_k5"}
    found = bench_structures.measure_stage(cell | {"stage": "pairing", "network": NETWORK})
    assert found["seconds"] >= 0
    assert found["peak_mib"] > 10
    assert pl.read_parquet(own.bpp)["sequence"].to_list() == pl.read_parquet(own.clean("test"))["sequence"].to_list()


@pytest.mark.parametrize("missing", RUNS)
def test_a_chain_that_has_not_run_is_told(paths, missing):
    paths.run_dir(missing).rmdir()
    with pytest.raises(DataError, match=r"bench-structures: .* is not there\. Next: make train-all COMP=rna3d\."):
        bench_structures.run(paths, split="sim80_k5", network=NETWORK)


def test_only_structures_are_measured(tmp_path):
    with pytest.raises(ConfigError, match="bench-structures"):
        bench_structures.run(Paths(comp="ribonanza", root=tmp_path), split="sim80_k5", network=NETWORK)
