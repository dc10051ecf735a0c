"""The benchmark of the kernels: its peers compute the same function, and its record has the promised form."""

import json
import math
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from models.layers.long_conv import fft_conv_ref
from models.layers.selective_scan import selective_scan_ref
from pipeline import bench_kernels, measure
from pipeline.errors import PipelineError
from pipeline.measure import Promise
from pipeline.paths import REPOSITORY

TURNED = ("low", "ratio", "high")
KEYS = {"what", "shape", "threads", "ours", "peer", "peer_name", "ratio", "quartiles", "peak_mib", "peer_peak_mib"}


@pytest.mark.parametrize(
    ("peer", "package"),
    [("unbind_loop", ""), ("associative", ""), ("mamba_py", "mambapy"), ("transformers", "transformers")],
)
def test_peers_compute_the_scan(peer: str, package: str):
    if package:
        pytest.importorskip(package)
    torch.manual_seed(1)
    B, L, E, N = 2, 13, 6, 4
    operands = [
        torch.randn(B, L, E),
        torch.rand(B, L, E),
        -torch.rand(E, N),
        torch.randn(B, L, N),
        torch.randn(B, L, N),
        torch.randn(E),
    ]
    found = getattr(measure.load_peer("scans"), peer)(*operands)
    torch.testing.assert_close(found, selective_scan_ref(*operands).float(), rtol=1e-5, atol=1e-5)


def test_the_transforms_peer_computes_the_convolution():
    torch.manual_seed(1)
    operands = torch.randn(2, 21, 5), torch.randn(5, 21), torch.randn(5)
    expected = fft_conv_ref(operands[0], operands[1], None, operands[2]).float()
    torch.testing.assert_close(bench_kernels.rfft_conv(*operands), expected, rtol=1e-5, atol=1e-5)


def test_contestants_in_turn_give_ratios_between_their_quartiles_and_lengths_a_slope():
    *_, in_turn, slope = bench_kernels._conv_cells((32, 64), (torch.get_num_threads(),))
    found = bench_kernels.measure_cell(in_turn)
    for way in ("forward", "both"):
        assert 0 < found[f"{way}_low"] <= found[f"{way}_ratio"] <= found[f"{way}_high"]
        assert found[f"{way}_ms"] > 0 < found[f"{way}_peer_ms"]
    assert (slope["start"], slope["length"]) == (32, 64)
    assert math.isfinite(bench_kernels.measure_cell(slope)["slope"])


def test_what_a_gpu_compiles_is_no_part_of_a_time(monkeypatch):
    """A first call above 0.6 s was the only one: at L 177 the scan would have taken as long as Triton's compiler."""
    calls, now = iter([5.0, *[0.25] * 99]), [0.0]

    def call():
        now[0] += next(calls)

    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "synchronize", lambda: None)
    monkeypatch.setattr(measure.time, "perf_counter", lambda: now[0])
    assert measure.seconds(call) == 0.25


def test_calls_in_turn_come_back_in_the_order_they_were_given():
    made: list[int] = []
    turns = measure.in_turn(*(partial(made.append, k) for k in range(2)), at_least=0.0, fewest=3)
    assert made == [0, 1, 1, 0, 0, 1, 1, 0]
    assert [len(turn) for turn in turns] == [2, 2, 2]


@pytest.fixture
def one_process(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first cell is measured in a process of its own, the others here: each start of torch costs three seconds."""
    spawn, cells = measure.spawn, []

    def measured(module: str, cell: dict, **how: object) -> dict | None:
        cells.append(cell)
        return bench_kernels.measure_cell(cell) if cells[1:] else spawn(module, cell, **how)

    monkeypatch.setattr(measure, "spawn", measured)
    monkeypatch.setattr(torch, "set_num_threads", lambda _: None)


def test_a_tiny_run_writes_rows_bars_and_a_header(
    one_process: None, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    rows = bench_kernels.run(size="tiny", rounds=1, record=tmp_path / "kernels.json")
    written = json.loads((tmp_path / "kernels.json").read_text())
    assert written["rows"] == rows
    assert {"date", "machine", "versions", "promises"} <= written.keys()
    assert all(row.keys() == KEYS and row["ours"] > 0 and row["peer"] > 0 for row in rows)
    assert {row["peer_name"] for row in rows} == {"unbind loop", "torch rfft"}
    assert all(promise.keys() == {"what", "found", "wanted", "at_most", "met"} for promise in written["promises"])
    assert "times as fast as unbind loop" in capsys.readouterr().out


@pytest.mark.parametrize("cuda", [False, True], ids=["cpu", "cuda"])
@pytest.mark.parametrize(
    "lost", [{"ours"}, {"ours", "ours and torch rfft in turn"}, {"unbind loop", "ours, triton"}, set()]
)
def test_the_table_is_written_whoever_had_no_memory(monkeypatch, tmp_path: Path, cuda: bool, lost: set[str]):
    """Without our own scan all that had been measured ended in a TypeError, on a GPU in a ValueError."""

    def measured(cells: list[dict], **_: object) -> list[dict | None]:
        ways = {f"{way}_{key}": 2.0 for way in ("forward", "both") for key in ("ms", "mib", "peer_ms", *TURNED)}
        return [None if cell["who"] in lost else ways | {"slope": 1.0} for cell in cells]

    monkeypatch.setattr(measure, "interleave", measured)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: cuda)
    monkeypatch.setattr(measure, "machine_class", lambda: "cuda-h100" if cuda else "cpu-2core-avx2")
    monkeypatch.setattr(bench_kernels, "_has_mamba_ssm", lambda: True)
    bench_kernels.run(record=tmp_path / "kernels.json")
    written = json.loads((tmp_path / "kernels.json").read_text())
    assert written["rows"]
    assert any(promise["what"].startswith("slope") for promise in written["promises"])


def test_a_benchmark_needs_nothing_but_torch():
    """GPU machines have this repository and torch; numpy comes with the latter."""
    absent = (
        "import sys; sys.modules.update(dict.fromkeys(('polars', 'pyarrow', 'pydantic', 'rich', 'numba', 'typer')))"
    )
    cells = [
        ("bench_kernels", {"what": "scan", "who": "unbind loop", "length": 8, "threads": 1}),
        ("bench_models", {"model": "tiny_hyena", "batch": 1, "length": 8, "threads": 1, "precision": "fp32"}),
    ]
    cells[1][1]["checkpointing"] = 0
    calls = "; ".join(f"from pipeline import {name}; {name}.measure_cell({cell})" for name, cell in cells)
    done = subprocess.run(
        [sys.executable, "-c", f"{absent}; {calls}"], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


def test_the_machine_class_tells_no_name():
    kind, *parts = measure.machine_class().split("-")
    assert kind in ("cpu", "cuda")
    assert parts


@pytest.mark.parametrize(
    ("promise", "met"),
    [(Promise("", 2, 1), True), (Promise("", 2, 1, True), False), (Promise("", 1, 1), True)],
)
def test_promises_are_met_from_their_own_side(promise: Promise, met: bool):
    assert promise.met == met


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> dict[str, str]:
    """The variables of a measurement's process, which is not started."""
    found: dict[str, str] = {}

    def run(*_, env: dict[str, str], **__):
        found.update(env)
        return SimpleNamespace(returncode=0, stdout="{}")

    monkeypatch.setattr(measure.subprocess, "run", run)
    return found


def test_a_measurement_finds_the_packages_that_its_parent_finds(monkeypatch, seen: dict[str, str]):
    """With mamba-ssm in a folder of PYTHONPATH, its cells ended in "No module named 'mamba_ssm'"."""
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    measure.spawn("module", {})
    assert seen["PYTHONPATH"] == f"{REPOSITORY}{os.pathsep}elsewhere"


def test_a_measurement_on_a_gpu_keeps_the_threads_it_finds(monkeypatch, seen: dict[str, str]):
    """They were 0: "libgomp: Invalid value for environment variable OMP_NUM_THREADS"."""
    monkeypatch.setenv("OMP_NUM_THREADS", "7")
    for threads, told in ((0, "7"), (2, "2")):
        measure.spawn("module", {"threads": threads})
        assert seen["OMP_NUM_THREADS"] == told


def test_a_failed_measurement_says_what_failed():
    with pytest.raises(PipelineError, match=r"bench_kernels: .*'no such'.*KeyError"):
        measure.spawn("pipeline.bench_kernels", {"what": "scan", "who": "no such", "length": 8, "threads": 1})
