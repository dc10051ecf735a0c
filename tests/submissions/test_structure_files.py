"""Structures as PDB, mmCIF and a page: what is written is read back, and the page needs nothing from elsewhere."""

import base64
import hashlib
import json
import re
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from pipeline.competitions import get_competition
from pipeline.errors import ConfigError, DataError
from pipeline.paths import Paths
from pipeline.structure.assembly import trace_from_pairs
from pipeline.structure.geometry import rotation_onto
from submissions import structure_files
from submissions.structure_files import Structure, to_cif, to_pdb, viewer_page
from tests.chain_tables import make_paths, write, write_structure_data

RNA3D = get_competition("rna3d")


def structure(name: str = "R1_A", length: int = 40, count: int = 5) -> Structure:
    traces = [
        trace_from_pairs(length, [(i, length - 1 - i) for i in range(8 + m)], np.random.default_rng(m))
        for m in range(count)
    ]
    return Structure(
        name=name,
        sequence="".join(np.random.default_rng(0).choice(list("ACGU"), length)),
        xyz_ML3=np.stack(traces),
        confidence_M=np.linspace(0.6, 0.2, count),
    )


@pytest.mark.parametrize(("ending", "text"), [("pdb", to_pdb), ("cif", to_cif)])
def test_another_program_reads_what_was_written(tmp_path: Path, ending: str, text) -> None:
    gemmi = pytest.importorskip("gemmi")
    one, path = structure(), tmp_path / f"one.{ending}"
    path.write_text(text(one))
    read = gemmi.read_structure(str(path))
    assert len(read) == 5
    for model, xyz_L3, confidence in zip(read, one.xyz_ML3, one.confidence_M, strict=True):
        assert [chain.name for chain in model] == ["A"]
        residues = list(model["A"])
        assert "".join(residue.name for residue in residues) == one.sequence
        assert [residue.seqid.num for residue in residues] == list(range(1, 41))
        atoms = [residue["C1'"][0] for residue in residues]
        assert np.allclose([atom.pos.tolist() for atom in atoms], xyz_L3, atol=6e-4)
        assert np.allclose([atom.b_iso for atom in atoms], 100 * confidence, atol=6e-3)


def test_pdb_lines_are_as_wide_as_the_format_says() -> None:
    one = structure(length=40, count=1)
    one.xyz_ML3[0, :2] = [[-999.999, 9999.999, 0.0], [-0.0004, 1234.5678, -12.0]]
    atoms = [line for line in to_pdb(one).splitlines() if line.startswith("ATOM")]
    assert {len(line) for line in atoms} == {80}
    assert [float(atoms[0][at : at + 8]) for at in (30, 38, 46)] == [-999.999, 9999.999, 0.0]


# -- the page


def data_of(text: str) -> list[dict]:
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', text).group(1))["targets"]


def test_the_page_loads_nothing_and_runs_only_its_own_script() -> None:
    text = viewer_page([structure()], {}, title="a <b> & c")
    assert "default-src 'none'" in text
    script = re.search(r"<script>(.*)</script>", text, re.DOTALL).group(1)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text
    assert "<h1>a &lt;b&gt; &amp; c</h1>" in text
    assert not re.search(r'(?:src|href)="(?!#)', text)
    assert not re.search(r"https?://", text)


def test_a_name_cannot_break_out_of_the_data() -> None:
    text = viewer_page([structure(name="</script><b>")], {}, title="t")
    assert data_of(text)[0]["name"] == "</script><b>"
    assert "</script><b>" not in text


def test_candidates_lie_on_the_known_structure_with_score_and_error(rng: np.random.Generator) -> None:
    one = structure()
    known = one.xyz_ML3[2] @ rotation_onto(*rng.standard_normal((2, 9, 3))) + 70.0
    known[:3] = np.nan
    (shown,) = data_of(viewer_page([one], {one.name: known[None]}, title="t"))
    assert [point is None for point in shown["reference"][:5]] == [True] * 3 + [False] * 2
    assert [each["score"] for each in shown["candidates"]].index(1.0) == 2
    same = shown["candidates"][2]
    assert same["error"][:3] == [None] * 3
    assert max(same["error"][3:]) < 0.11
    assert max(shown["candidates"][0]["error"][3:]) > 2.0


def test_without_a_known_structure_nothing_is_said_of_errors() -> None:
    (shown,) = data_of(viewer_page([structure()], {"other": np.zeros((1, 40, 3))}, title="t"))
    assert shown["reference"] is None
    assert {each["error"] for each in shown["candidates"]} == {None}
    assert {each["score"] for each in shown["candidates"]} == {None}


# -- the stage


@pytest.fixture
def paths(tmp_path: Path, rng: np.random.Generator) -> Paths:
    paths = make_paths(tmp_path, "rna3d")
    write_structure_data(paths, rng)
    for table, clean in (("test", "test"), ("oof", "train")):
        rows: list[list] = []
        for name, sequence in pl.read_parquet(paths.clean(clean)).select("sequence_id", "sequence").iter_rows():
            rows += [[name, m, 0.1 * m, *rng.normal(0.0, 9.0, (3, len(sequence))).tolist()] for m in range(1, 6)]
        columns = ["sequence_id", "candidate", "confidence", "x", "y", "z"]
        write(pl.DataFrame(rows, schema=columns, orient="row"), paths.ensemble_dir("all") / f"{table}.parquet")
    return paths


def test_the_stage_writes_two_files_a_target_and_one_page(paths: Paths) -> None:
    report = structure_files.run(paths, competition=RNA3D, name="all")
    home = paths.ensemble_dir("all") / "structures-test"
    names = {path.name for path in home.iterdir() if path.suffix != ".json"}
    assert names == {"viewer.html", *(f"{name}.{kind}" for name in ("Q1", "Q10", "Q2_B") for kind in ("pdb", "cif"))}
    assert report.facts == {"targets": 3, "with_reference": 0}
    assert structure_files.run(paths, competition=RNA3D, name="all", table="oof").facts["with_reference"] == 6


def test_a_coordinate_that_no_pdb_file_holds_is_refused(paths: Paths) -> None:
    path = paths.ensemble_dir("all") / "test.parquet"
    write(pl.read_parquet(path).with_columns(pl.col("x").list.eval(pl.element() - 1500.0)), path)
    with pytest.raises(DataError, match=r"Q1 has the coordinate -1\d{3}.* Å; expected -999.999 to 9999.999,"):
        structure_files.run(paths, competition=RNA3D, name="all")


def test_other_tables_and_competitions_are_refused(paths: Paths) -> None:
    with pytest.raises(ConfigError, match="expected test or oof"):
        structure_files.run(paths, competition=RNA3D, name="all", table="train")
    with pytest.raises(ConfigError, match="not about structures"):
        structure_files.run(paths, competition=get_competition("ribonanza"), name="all")
    write(pl.read_parquet(paths.clean("test")).with_columns(sequence=pl.lit("ACG")), paths.clean("test"))
    with pytest.raises(DataError, match="Q1 has 4 residues"):
        structure_files.run(paths, competition=RNA3D, name="all")
