"""Base-pair probabilities: right, complete, computed once, and safe to interrupt."""

import itertools
import json
import multiprocessing
import os
import signal
import subprocess
import sys
from importlib import metadata
from typing import Any

import numpy as np
import polars as pl
import pytest

from pipeline import bpp, viennarna
from pipeline.errors import BusyError, ConfigError, DataError, StoppedError, StorageError
from pipeline.paths import Paths
from pipeline.stage import Report
from pipeline.training.stop import StopRequest

RNA = pytest.importorskip("RNA")
HAIRPIN = "GGGCACGGAAACGUGCCCAAAAAA"


def random_sequences(rng, count, *, length):
    return ["".join(rng.choice(list("ACGU"), size=length)) for _ in range(count)]


def write_clean(paths, train, test=("GGGAAACCC",)):
    paths.clean("train").parent.mkdir(parents=True, exist_ok=True)
    for table, sequences in (("train", train), ("test", test)):
        ids = [f"{k:04d}" for k in range(len(sequences))]
        pl.DataFrame({"sequence_id": ids, "sequence": list(sequences)}).write_parquet(paths.clean(table))


@pytest.fixture
def paths(tmp_path):
    return Paths(comp="ribonanza", root=tmp_path)


def dense(folded, length):
    matrix = np.zeros((length, length))
    matrix[folded.i_K, folded.j_K] = folded.p_K
    return matrix + matrix.T


def test_a_hairpin_pairs_as_it_must_and_its_loop_and_tail_stay_free():
    folded = viennarna.fold(HAIRPIN)
    matrix = dense(folded, len(HAIRPIN))
    assert all(matrix[k, 17 - k] > 0.9 for k in range(7))
    assert (folded.unpaired_L[[8, 9, *range(18, 24)]] > 0.95).all()


def test_a_sequence_whose_positions_do_not_fit_is_refused_before_any_work(paths):
    """Part 2 of the 3D competition has one of 125,000 nt; positions beyond 65,535 would have wrapped around."""
    write_clean(paths, [HAIRPIN], test=["ACGU" * 31_250])
    with pytest.raises(DataError, match=r"a sequence of 125,000 nt; expected at most 65,535\. Next: give its domains"):
        bpp.run(paths)


def test_probabilities_are_viennas_own_above_the_cutoff(rng):
    for sequence in random_sequences(rng, 5, length=80):
        compound = RNA.fold_compound(sequence)
        compound.pf()
        whole = np.asarray(compound.bpp())[1:, 1:]
        folded = viennarna.fold(sequence)
        expected = np.where(whole >= viennarna.MIN_PROBABILITY, whole, 0.0)
        np.testing.assert_allclose(dense(folded, 80), expected + expected.T, atol=1e-7)
        np.testing.assert_allclose(folded.unpaired_L, 1 - (whole + whole.T).sum(axis=1), atol=1e-6)
        assert (folded.i_K < folded.j_K).all()
        assert folded.p_K.min() >= viennarna.MIN_PROBABILITY


@pytest.mark.parametrize("sequence", ["A", "GC"])
def test_a_sequence_too_short_to_fold_is_unpaired(sequence):
    folded = viennarna.fold(sequence)
    assert folded.unpaired_L.tolist() == [1.0] * len(sequence)
    assert folded.p_K.size == 0


def test_a_helix_so_stable_that_the_default_scale_overflows_is_folded():
    sequence = "G" * 220 + "GAAA" + "C" * 220
    compound = RNA.fold_compound(sequence)
    assert compound.pf()[1] >= 1e4
    assert viennarna.fold(sequence).unpaired_L[:100].max() < 0.2


@pytest.fixture
def small_windows(monkeypatch):
    monkeypatch.setattr(viennarna, "MAX_WHOLE", 150)
    monkeypatch.setattr(viennarna, "WINDOW", 120)


@pytest.mark.parametrize("start", [0, 31, 55, 60, 90, 121, 250])
def test_windows_find_a_local_helix_wherever_it_is(small_windows, start):
    sequence = "A" * start + HAIRPIN + "A" * (330 - start)
    matrix = dense(viennarna.fold(sequence), len(sequence))
    assert all(matrix[start + k, start + 17 - k] > 0.9 for k in range(7))


def test_windows_pair_no_nucleotide_more_than_once_and_nothing_beyond_a_window(small_windows, rng):
    (sequence,) = random_sequences(rng, 1, length=400)
    folded = viennarna.fold(sequence)
    total_L = dense(folded, 400).sum(axis=1)
    assert total_L.max() <= 1 + 1e-6
    assert (folded.j_K.astype(int) - folded.i_K).max() < 120
    assert (folded.unpaired_L >= 0).all()
    np.testing.assert_allclose(folded.unpaired_L, 1 - total_L, atol=0.05)


@pytest.mark.parametrize("length", [1, 1200, 1201, 1500, 2300, 4640])
def test_windows_speak_for_every_pair_middle_once_and_reach_half_a_window(length):
    windows = list(viennarna._windows(length))
    assert windows[0][2] == 0
    assert windows[-1][3] == length
    assert all(before[3] == after[2] for before, after in itertools.pairwise(windows))
    for start, stop, first, last in windows:
        reach = 0 if len(windows) == 1 else viennarna.WINDOW // 4
        assert start == 0 or start <= first - reach
        assert stop == length or stop >= last + reach


def test_the_file_has_every_sequence_of_train_and_test_once_sorted(paths, rng):
    train = random_sequences(rng, 5, length=40)
    write_clean(paths, [*train, train[0]], test=[train[1], "GGGAAACCC"])
    report = bpp.run(paths, workers=1)
    table = pl.read_parquet(paths.bpp)
    assert table["sequence"].to_list() == sorted({*train, "GGGAAACCC"})
    assert report.facts == {"sequences": 6, "computed": 6, "in_windows": 0, "pairs": table["p"].list.len().sum()}
    assert table.schema == {
        "sequence": pl.String,
        "unpaired": pl.List(pl.Float32),
        "i": pl.List(pl.UInt16),
        "j": pl.List(pl.UInt16),
        "p": pl.List(pl.Float32),
    }
    for row in table.iter_rows(named=True):
        folded = viennarna.fold(row["sequence"])
        assert [row["unpaired"], row["i"], row["j"], row["p"]] == [values.tolist() for values in folded]
    assert not (paths.bpp.parent / "parts").exists()


def test_a_second_run_is_current_and_a_grown_table_costs_only_its_new_sequences(paths, rng):
    train = random_sequences(rng, 20, length=40)
    write_clean(paths, train[:12])
    bpp.run(paths, workers=1)
    assert bpp.run(paths, workers=1).status == "current"
    write_clean(paths, train)
    assert bpp.run(paths, workers=1).facts["computed"] == 8
    grown = paths.bpp.read_bytes()
    fresh = Paths(comp="ribonanza", root=paths.root / "fresh")
    write_clean(fresh, train)
    bpp.run(fresh, workers=1)
    assert grown == fresh.bpp.read_bytes()
    write_clean(paths, train[5:])
    assert bpp.run(paths, workers=1).facts["computed"] == 0
    assert pl.read_parquet(paths.bpp).height == 16


def test_a_first_result_without_long_sequences_is_completed_by_the_next_call(paths, rng):
    lengths = [12, 30, 31, 60]
    write_clean(paths, [], [random_sequences(rng, 1, length=length)[0] for length in lengths])
    bpp.run(paths, workers=1, tables=("test",), longest=30)
    assert sorted(map(len, pl.read_parquet(paths.bpp)["sequence"])) == [12, 30]
    report = bpp.run(paths, workers=1, tables=("test",))
    assert (report.status, report.facts["computed"]) == ("built", 2)
    assert sorted(map(len, pl.read_parquet(paths.bpp)["sequence"])) == lengths


@pytest.mark.parametrize("part", [{"tables": ("test",)}, {"longest": 30}, {"tables": ("test",), "longest": 30}])
def test_a_call_for_a_part_takes_nothing_away(paths, rng, part):
    """After make bpp, rna bpp --test-only replaced the table of all sequences by the test's alone, and the next make
    bpp, or training with use_bpp, computed the others again.
    """
    train, tests = (random_sequences(rng, 4, length=length) for length in (40, 20))
    write_clean(paths, train, tests)
    bpp.run(paths, workers=1)
    whole = paths.bpp.read_bytes()
    assert bpp.run(paths, workers=1, **part).status == "current"
    assert bpp.run(paths, workers=1).status == "current"
    assert paths.bpp.read_bytes() == whole
    write_clean(paths, train, [*tests, "GGGGAAACCCC"])
    report = bpp.run(paths, workers=1, **part)
    assert (report.facts["computed"], report.facts["sequences"]) == (1, 9)
    assert bpp.run(paths, workers=1).facts["computed"] == 0
    assert pl.read_parquet(paths.bpp)["sequence"].to_list() == sorted([*train, *tests, "GGGGAAACCCC"])


def test_rows_of_a_damaged_file_or_of_another_version_are_not_reused(paths, rng):
    write_clean(paths, random_sequences(rng, 4, length=30))
    bpp.run(paths, workers=1)
    good = paths.bpp.read_bytes()
    paths.bpp.write_bytes(good[:200] + bytes([good[200] ^ 1]) + good[201:])
    assert bpp.run(paths, workers=1).facts["computed"] == 5
    assert paths.bpp.read_bytes() == good
    manifest = paths.bpp.parent / "bpp.manifest.json"
    done = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(done | {"params": done["params"] | {"program_version": "0.1"}}))
    assert bpp.run(paths, workers=1).facts["computed"] == 5


def test_where_the_system_does_not_say_which_cpus_are_ours_all_are_counted(paths, rng, monkeypatch):
    """On macOS it said: AttributeError: module 'os' has no attribute 'sched_getaffinity'."""
    monkeypatch.delattr(os, "sched_getaffinity")
    write_clean(paths, random_sequences(rng, 2, length=12))
    assert bpp.run(paths).status == "built"


@pytest.mark.parametrize("text", ["[]", "{}", '{"facts": {}}', "\xff"])
def test_a_manifest_that_no_stage_wrote_is_no_result(paths, rng, text):
    """It said: TypeError: list indices must be integers or slices, not str, or KeyError: 'outputs'."""
    write_clean(paths, random_sequences(rng, 2, length=12))
    bpp.run(paths, workers=1)
    (paths.bpp.parent / "bpp.manifest.json").write_bytes(text.encode("latin-1"))
    assert bpp.run(paths, workers=1, tables=("test",)).status == "built"


def test_two_workers_write_the_bytes_that_one_writes_and_more_row_groups_change_nothing_else(paths, rng, monkeypatch):
    monkeypatch.setattr(bpp, "_WORTH_A_WORKER", 0.05)
    monkeypatch.setattr(bpp, "ROWS", 7)
    write_clean(paths, random_sequences(rng, 40, length=60))
    bpp.run(paths, workers=2)
    alone = Paths(comp="ribonanza", root=paths.root / "alone")
    write_clean(alone, pl.read_parquet(paths.clean("train"))["sequence"])
    bpp.run(alone, workers=1)
    assert paths.bpp.read_bytes() == alone.bpp.read_bytes()
    table = pl.read_parquet(paths.bpp)
    assert table["sequence"].is_sorted()
    assert table.height == 41


def test_without_viennarna_the_error_says_what_to_install_and_an_existing_file_is_still_current(
    paths, rng, monkeypatch
):
    train = random_sequences(rng, 3, length=30)
    write_clean(paths, train)
    monkeypatch.setitem(sys.modules, "RNA", None)
    assert viennarna.available()[0] is False
    with pytest.raises(ConfigError, match=r"use_bpp=false.*pip install ViennaRNA.*'bpp'"):
        bpp.run(paths)
    monkeypatch.setitem(sys.modules, "RNA", RNA)
    assert viennarna.available()[0] is True
    bpp.run(paths, workers=1)
    monkeypatch.setitem(sys.modules, "RNA", None)
    assert bpp.run(paths).status == "current"
    write_clean(paths, train[:2])
    with pytest.raises(ConfigError, match="pip install ViennaRNA"):
        bpp.run(paths)


def test_no_clean_table_is_refused(paths):
    with pytest.raises(DataError, match="missing"):
        bpp.run(paths, workers=1)


def test_a_killed_worker_is_named_and_finished_parts_are_kept(paths, rng, monkeypatch):
    monkeypatch.setattr(bpp, "_WORTH_A_WORKER", 0.1)
    monkeypatch.setattr(bpp, "_PART_SECONDS", 0.2)
    write_clean(paths, random_sequences(rng, 80, length=150))
    receive = bpp.Crew._receive

    def kill_the_other(crew, pipe):
        """Its first part is at work, or finished and unread: neither may be missed, nor that it takes no other."""
        for other, process in crew._workers.items():
            if other is not pipe:
                process.kill()
                process.join()
        return receive(crew, pipe)

    with monkeypatch.context() as patch:
        patch.setattr(bpp.Crew, "_receive", kill_the_other)
        with pytest.raises(StorageError, match=r"exit code -9.*--workers 1"):
            bpp.run(paths, workers=2)
    assert not multiprocessing.active_children()
    assert not paths.bpp.exists()
    assert bpp.run(paths, workers=1).facts["computed"] < 81


CHILD = """
import os, sys
from pathlib import Path
from pipeline import bpp
from pipeline.errors import PipelineError
from pipeline.paths import Paths
if __name__ == "__main__":
    bpp._WORTH_A_WORKER, bpp._PART_SECONDS = 0.1, 0.2
    receive, once = bpp.Crew._receive, iter([int(sys.argv[2])])
    def received(*args):
        for number in once:
            os.kill(os.getpid(), number)
        return receive(*args)
    bpp.Crew._receive = received
    try:
        bpp.run(Paths(comp="ribonanza", root=Path(sys.argv[1])), workers=2)
    except PipelineError as err:
        print(err)
        sys.exit(err.exit_code)
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_an_interrupted_run_leaves_no_process_and_goes_on_from_its_parts(paths, rng, tmp_path, number):
    write_clean(paths, random_sequences(rng, 80, length=150))
    script = tmp_path / "child.py"
    script.write_text(CHILD)
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run(  # to the end of its output, which its workers have open too: none outlives it
        [sys.executable, script, tmp_path, str(int(number))],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        check=False,
        timeout=600,
    )
    if number == signal.SIGTERM:
        assert done.returncode == StoppedError.exit_code
        assert b"stopped (SIGTERM)" in done.stdout
        assert b"run it again" in done.stdout
    else:
        assert done.returncode == -signal.SIGKILL
    assert not paths.bpp.exists()
    report = bpp.run(paths, workers=1)
    assert 0 < report.facts["computed"] < 81
    assert pl.read_parquet(paths.bpp).height == 81


def test_folding_keeps_to_a_time_budget_and_goes_on_from_there(paths, rng):
    """A Kaggle notebook with a BUDGET folded for hours past its end."""
    write_clean(paths, "train", random_sequences(rng, 20, length=40))
    with pytest.raises(StoppedError, match=r"bpp: stopped \(the time budget is spent\)"):
        bpp.run(paths, time_budget=0.0, tables=("train",))
    assert bpp.run(paths, tables=("train",)).status == "built"


def test_what_is_folded_when_the_time_is_up_is_written_if_asked_for(paths, rng, monkeypatch, capsys):
    """In a notebook all pairs were lost where the time sufficed for some: networks and assemblies had none."""
    write_clean(paths, [], test=random_sequences(rng, 6, length=40))
    reasons = iter([None, None, *["the time budget is spent"] * 9])
    monkeypatch.setattr(StopRequest, "reason", lambda _: next(reasons))
    report = bpp.run(paths, tables=("test",), partial=True, time_budget=1e-3, workers=1)
    assert (pl.read_parquet(paths.bpp).height, report.facts["left_out"], report.facts["computed"]) == (2, 4, 2)
    assert bpp.describe(report.facts).endswith("; left out: 4, as its time was up")
    assert "4 of 6 sequences are not folded" in " ".join(capsys.readouterr().err.split())
    with pytest.raises(StoppedError, match="0 of 4 sequences are folded and kept"):  # two are not called all of them
        bpp.run(paths, tables=("test",), partial=True, time_budget=0.0, workers=1)
    monkeypatch.undo()
    assert bpp.run(paths, tables=("test",)).facts["computed"] == 4
    assert pl.read_parquet(paths.bpp).height == 6


def test_workers_import_neither_polars_nor_torch():
    check = "import sys, pipeline.pair_workers; sys.exit(bool({'polars', 'torch', 'pandas'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", check], env=os.environ | {"PYTHONPATH": sys.path[0]}).returncode == 0


def test_viennarna_without_python_metadata_is_usable(monkeypatch):
    """Was: PackageNotFoundError out of the doctor, where conda or apt installed the bindings."""
    pytest.importorskip("RNA")
    expected = viennarna.available()

    def unknown(name):
        raise metadata.PackageNotFoundError(name)

    monkeypatch.setattr(viennarna.metadata, "version", unknown)
    assert viennarna.available() == expected


def test_pairs_that_another_process_computes_are_waited_for_as_long_as_there_is_time(tmp_path, monkeypatch, capsys):
    """Of folds that were started at once all but the first ended with exit code 75, and their nights were lost.

    So did, of two trainings of all folds of structures, the second one, whose `denovo` asks for pairs.
    """
    done = Report(stage="bpp", status="current", outputs={}, facts={}, seconds=0.0)
    answers = [BusyError("bpp: process 1 is already at work here."), BusyError("still"), done, BusyError("again")]

    def computed(*_: Any, **__: Any) -> Report:
        answer = answers.pop(0)
        if isinstance(answer, BusyError):
            raise answer
        return answer

    monkeypatch.setattr("pipeline.training.stop.POLL_S", 0.0)
    monkeypatch.setattr(bpp, "run", computed)
    assert bpp.run_in_turn(Paths(comp="tiny", root=tmp_path)) is done
    told = " ".join(capsys.readouterr().err.split())
    assert told == "bpp: process 1 is already at work here. Here its base-pair probabilities are waited for."
    with pytest.raises(BusyError, match="again"):
        bpp.run_in_turn(Paths(comp="tiny", root=tmp_path), time_budget=0.0)
