"""The adapter to US-align: files fit the format, what the program says is understood, failures are one sentence."""

import stat
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import ConfigError, DataError
from submissions.tm_score import tm_score
from submissions.usalign import find_program, run_program, usalign_score, write_pdb
from tests.submissions.trace_cases import folded, tm_align

_SAID = """
Name of Structure_1: model.pdb (to be superimposed onto Structure_2)
TM-score= 0.11111 (normalized by length of Structure_1: L=30, d0=0.76)
TM-score= 0.22222 (normalized by length of Structure_2: L=30, d0=0.76)
"""


def _program(folder: Path, script: str) -> Path:
    path = folder / "USalign"
    path.write_text(f"#!/bin/sh\n{script}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return path


def test_the_score_by_the_native_is_read(tmp_path: Path) -> None:
    program = _program(tmp_path, f"cat <<'end'\n{_SAID}end")
    trace, names = folded(30, 0)
    assert usalign_score(trace, trace, (names, names), by_residue=True, program=program) == 0.22222


@pytest.mark.parametrize(("by_residue", "expected"), [(True, "-atom| C1'|-TMscore|1|"), (False, "-atom| C1'|")])
def test_each_metric_has_its_options(tmp_path: Path, by_residue: bool, expected: str) -> None:
    program = _program(tmp_path, f"shift 2; printf '%s|' \"$@\" > {tmp_path}/said; cat <<'end'\n{_SAID}end")
    trace, names = folded(30, 0)
    usalign_score(trace, trace, (names, names), by_residue=by_residue, program=program)
    assert (tmp_path / "said").read_text() == expected


@pytest.mark.parametrize("script", ["echo no >&2; exit 3", "echo TM-score= 0.5"])
def test_a_program_that_gives_no_scores_is_named(tmp_path: Path, script: str) -> None:
    with pytest.raises(ConfigError, match=r"USalign: ended with code \d and said .*; expected two scores"):
        run_program(_program(tmp_path, script), tmp_path, tmp_path)


def test_the_file_has_the_columns_of_the_format(tmp_path: Path) -> None:
    trace, names = folded(12, 0)
    trace[3] = -1e18
    write_pdb(tmp_path / "a.pdb", trace + 5000.0 * (trace > -1e6), names)
    lines = (tmp_path / "a.pdb").read_text().splitlines()
    assert len(lines) == 12
    assert [line[12:16] for line in lines[:-1]] == [" C1'"] * 11
    assert [int(line[22:26]) for line in lines[:-1]] == [1, 2, 3, *range(5, 13)]
    assert "".join(line[19] for line in lines[:-1]) == names[:3] + names[4:]
    written = np.array([[float(line[at : at + 8]) for at in (30, 38, 46)] for line in lines[:-1]])
    kept = np.delete(trace, 3, axis=0)
    assert np.allclose(written, kept - kept.mean(axis=0), atol=2e-3)


def test_a_trace_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    trace, names = folded(12, 0)
    with pytest.raises(DataError, match=r"do not fit into a PDB file .* Next: use the built-in engine"):
        write_pdb(tmp_path / "a.pdb", 500.0 * trace, names)


def test_two_residues_score_nothing_without_the_program(tmp_path: Path) -> None:
    trace, names = folded(12, 0)
    few = trace.copy()
    few[2:] = np.nan
    assert usalign_score(few, trace, (names, names), by_residue=False, program=tmp_path / "none") == 0.0


@pytest.mark.skipif(find_program() is None, reason="USalign is not on the PATH")
def test_the_program_agrees_with_the_built_in_scores() -> None:
    program = find_program()
    assert program is not None
    (model, names), (native, _) = folded(60, 1), folded(60, 2)
    both = names, names
    expected = tm_score(model, native), tm_align(model, native, *both)
    for by_residue, ours in zip((True, False), expected, strict=True):
        assert usalign_score(model, native, both, by_residue=by_residue, program=program) == pytest.approx(
            ours, abs=1e-3
        )
