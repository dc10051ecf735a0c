"""Scores of a folder of traces: both modes, a row a model, and one sentence for each kind of bad input."""

import json
import os
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pytest

from pipeline.errors import ConfigError, DataError
from submissions import bench_tm, score_traces, tmalign, usalign
from submissions.engines import batches
from submissions.tm_score import tm_score
from tests.submissions.trace_cases import folded, moved, tm_align


def _rows(key: dict[str, str], trace: np.ndarray, names: str | None = None, first: int = 1) -> pl.DataFrame:
    table = pl.DataFrame(
        {"resid": np.arange(first, first + len(trace)), **dict(zip("xyz", trace.T, strict=True))}
    ).with_columns(**{name: pl.lit(value) for name, value in key.items()})
    return table if names is None else table.with_columns(pl.Series("resname", list(names)))


@pytest.fixture
def traces(tmp_path: Path) -> Path:
    """Two models of a native of 40 nt: a moved copy that lacks five residues, and another hairpin."""
    (native, names), (other, _) = folded(40, 1), folded(40, 2)
    folder = tmp_path / "traces"
    folder.mkdir()
    models = {"model_id": ["b", "a"], "benchmark": ["set", "set"], "target": ["T1", "T1"]}
    pl.DataFrame(models).write_parquet(folder / "models.parquet")
    parts = [_rows({"model_id": "b"}, other), _rows({"model_id": "a"}, moved(native, 3)[5:], first=6)]
    pl.concat(parts).write_parquet(folder / "model_traces.parquet")
    _rows({"benchmark": "set", "target": "T1"}, native, names).write_parquet(folder / "native_traces.parquet")
    return folder


def test_both_scores_of_every_model_are_written(traces: Path, tmp_path: Path) -> None:
    report = score_traces.run(traces, tmp_path / "out" / "scores.parquet")
    table = pl.read_parquet(report.outputs["scores"])
    (native, names), (other, _) = folded(40, 1), folded(40, 2)
    assert table.columns == ["model_id", "tm_byresi", "tm_seqindep"]
    assert table["model_id"].to_list() == ["a", "b"]
    assert table["tm_byresi"].to_list() == pytest.approx([35 / 40, tm_score(other, native)], abs=1e-5)
    assert table["tm_seqindep"].to_list() == pytest.approx([35 / 40, tm_align(other, native, names, names)], abs=1e-5)
    assert "residue-matched" in score_traces.describe(report.facts)
    assert score_traces.run(traces, tmp_path / "out" / "scores.parquet").status == "current"


@pytest.mark.parametrize("nothing", [None, -1e18, -1e6])
def test_nulls_and_sentinels_are_missing_residues(traces: Path, tmp_path: Path, nothing: float | None) -> None:
    path = traces / "native_traces.parquet"
    blank = pl.when(pl.col("resid") <= 10).then(pl.lit(nothing, dtype=pl.Float64)).otherwise(pl.col("x", "y", "z"))
    pl.read_parquet(path).with_columns(blank.name.keep()).write_parquet(path)
    table = pl.read_parquet(score_traces.run(traces, tmp_path / "scores.parquet").outputs["scores"])
    assert table["tm_byresi"][0] == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("shown", ["D{}", " {} ", "{}ra"])
def test_names_of_residues_may_be_those_of_files(traces: Path, shown: str) -> None:
    """A name of which only the first letter counted made " A" and "DA" residues that pair with nothing."""
    expected = [pair.names for pair in score_traces.read_pairs(traces)]
    _edit("native_traces", pl.format(shown, "resname").alias("resname"))(traces)
    assert [pair.names for pair in score_traces.read_pairs(traces)] == expected
    assert set(expected[0]) > {"A", "C"}


def test_high_numbers_take_no_more_memory(traces: Path) -> None:
    for table in ("model_traces", "native_traces"):
        _edit(table, pl.col("resid") + 90_000)(traces)
    assert [len(pair.names) for pair in score_traces.read_pairs(traces)] == [40, 40]


def test_long_models_move_the_bar_one_by_one() -> None:
    parts = batches([2000, 2500, 100, 3000, *[10] * 65], lambda length: length**2)
    assert [len(part) for part in parts] == [1, 1, 2, 64, 1]


@pytest.mark.parametrize("name", ["scores.csv", ""])
def test_only_a_parquet_file_is_written(traces: Path, tmp_path: Path, name: str) -> None:
    """It wrote parquet into OUT=o.csv."""
    with pytest.raises(ConfigError, match=r"expected the name of a parquet file. Next: OUT=scores.parquet"):
        score_traces.run(traces, tmp_path / name)
    assert not (tmp_path / "scores.csv").exists()


def _edit(table: str, change: pl.Expr):
    def apply(folder: Path) -> None:
        path = folder / f"{table}.parquet"
        pl.read_parquet(path).with_columns(change).write_parquet(path)

    return apply


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_edit("model_traces", pl.lit(np.nan).alias("y")), "model_traces.parquet: .* a coordinate that is not finite"),
        (_edit("model_traces", pl.lit(1e30).alias("z")), "residue 1 has a coordinate of 1,000,000 Å or more"),
        (_edit("model_traces", pl.lit(7).alias("resid")), "residue 7 has a residue number twice"),
        (_edit("model_traces", (pl.col("resid") - 9).alias("resid")), "residue -8 has a residue number below 0"),
        (_edit("model_traces", pl.col("resid") + 0.5), "a residue number is no whole number"),
        (_edit("native_traces", pl.lit(-np.inf).alias("x")), "a coordinate that is not finite"),
        (_edit("models", pl.lit("a").alias("model_id")), "models.parquet: a comes twice"),
        (_edit("models", pl.lit("T2").alias("target")), "no native set/T2 for a"),
        (_edit("models", (pl.col("model_id") + "x").alias("model_id")), "no residue of ax has a place"),
        (_edit("native_traces", pl.lit(None, dtype=pl.String).alias("resname")), "a row without resname"),
        (_edit("native_traces", pl.lit("one").alias("x")), "native_traces.parquet: cannot be read"),
        (lambda folder: (folder / "models.parquet").unlink(), "no models.parquet.*columns model_id, benchmark, target"),
        (lambda folder: (folder / "models.parquet").write_bytes(b"PAR1"), "models.parquet: not a readable parquet"),
    ],
)
def test_bad_input_is_one_sentence(traces: Path, tmp_path: Path, damage, said: str) -> None:
    damage(traces)
    with pytest.raises(DataError, match=said) as caught:
        score_traces.run(traces, tmp_path / "scores.parquet")
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "scores.parquet").exists()


def test_a_folder_that_is_not_there_is_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nowhere is not a folder"):
        score_traces.run(tmp_path / "nowhere", tmp_path / "scores.parquet")


def test_an_engine_that_is_not_there_is_refused(traces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="USalign is not on the PATH"):
        score_traces.run(traces, tmp_path / "scores.parquet", engine="usalign")
    with pytest.raises(ConfigError, match="ENGINE=fast; expected built-in, usalign or auto"):
        score_traces.run(traces, tmp_path / "scores.parquet", engine="fast")


def _benchmark(traces: Path, tmp_path: Path) -> dict[str, Any]:
    stored = pl.read_parquet(traces / "models.parquet").with_columns(pl.lit(0.5).alias("tm_usalign_c1_byresi"))
    stored.write_parquet(traces / "models.parquet")
    bench_tm.run(traces, repeats=1, record=tmp_path / "tm.json")
    return json.loads((tmp_path / "tm.json").read_text())


def test_the_benchmark_says_what_it_compared(traces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "bin" / "USalign"
    program.parent.mkdir()
    program.write_text("#!/bin/sh\necho TM-score= 0.1\necho TM-score= 0.75\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    facts = _benchmark(traces, tmp_path)
    rows = {row["mode"]: row for row in facts["rows"]}
    matched, free = rows["residue-matched"], rows["sequence-independent"]
    assert (facts["pairs"], facts["sample"], facts["peer"]) == (2, 2, "US-align")
    assert matched["lowest"] == pytest.approx(35 / 40 - 0.5, abs=1e-4)
    assert matched["peer_to_stored"]["lowest"] == matched["peer_to_stored"]["highest"] == 0.25
    assert not free.keys() & {"lowest", "peer_to_stored"}
    assert all(row["ours_ms"] > 0 and row["ratio"] > 0 for row in rows.values())


def test_the_benchmark_does_without_a_peer(
    traces: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(usalign, "find_program", lambda: None)
    monkeypatch.setattr(tmalign, "_HOME", tmp_path / "peer")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.delenv("PIP_FIND_LINKS", raising=False)
    facts = _benchmark(traces, tmp_path)
    assert facts["peer"] is None
    (tmp_path / "tm.json").write_text('{"pairs": 3}')
    assert _benchmark(traces, tmp_path) == {"pairs": 3}, "what is of more pairs stays"
    assert all(row["ours_ms"] > 0 and "ratio" not in row for row in facts["rows"])
    said = [line for line in capfd.readouterr().err.splitlines() if "bench-tm" in line]
    assert len(said) == 3
    assert "tm.json stays: it is of 3 pairs" in said[2]
    assert "the source package tmtools==0.3.0 could not be had" in said[0]


@pytest.mark.parametrize("known", [True, False])
def test_the_peer_is_built_without_the_lines_for_proteins(
    known: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lines = ["int main() {", "    int chain_i = 0, mol_vec1[1] = {0};", "    mol_vec1[chain_i]=-1;"]
    lines += ["    int chain_j = 0, mol_vec2[1] = {0};", "    mol_vec2[chain_j]=-1;" if known else ""]
    source = "\n".join([*lines, "    return mol_vec1[chain_i] + mol_vec2[chain_j];", "}"])
    monkeypatch.setattr(tmalign, "_downloaded", lambda _: source)
    monkeypatch.setattr(tmalign, "_HOME", tmp_path)
    monkeypatch.setattr(tmalign, "_COMPILE", ("g++",))  # not every machine links statically
    if not known:
        with pytest.raises(ConfigError, match="1 lines that take chains for proteins; expected 2"):
            tmalign.build()
        assert not (tmp_path / "TMalign").exists()
    elif shutil.which("g++"):
        program = tmalign.build()
        assert subprocess.run([program], check=False).returncode == 0
        monkeypatch.delattr(tmalign, "_downloaded")
        assert tmalign.build() == program
