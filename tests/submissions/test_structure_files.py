"""Structures as PDB, mmCIF and a page: what is written is read back, and the page needs nothing from elsewhere."""

import base64
import hashlib
import html
import json
import re
import shutil
import subprocess
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from pipeline.competitions import get_competition
from pipeline.errors import ConfigError, DataError
from pipeline.paths import Paths
from pipeline.structure.assembly import trace_from_pairs
from pipeline.structure.geometry import rmsd, rotation_onto
from submissions import structure_files
from submissions.structure_files import Structure, to_cif, to_pdb, viewer_page
from tests.chain_tables import make_paths, write, write_structure_data

RNA3D = get_competition("rna3d")


def structure(name: str = "R1_A", length: int = 40, count: int = 5) -> Structure:
    traces = [
        trace_from_pairs(
            length, [(i, length - 1 - i) for i in range(min(8 + m, length // 3))], np.random.default_rng(m)
        )
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


@pytest.mark.parametrize(("ending", "text"), [("pdb", to_pdb), ("cif", to_cif)])
def test_every_chain_of_a_complex_is_a_chain(tmp_path: Path, ending: str, text) -> None:
    """A dimer of 730 nt was one chain of 1,460, bonded across."""
    gemmi = pytest.importorskip("gemmi")
    one, path = (
        replace(structure(length=12, count=2), sequence="GGCAGGCAUUAA", chain_lengths=[4, 4, 4]),
        tmp_path / "one",
    )
    path = path.with_suffix(f".{ending}")
    path.write_text(text(one))
    read = gemmi.read_structure(str(path))
    for model, xyz_L3 in zip(read, one.xyz_ML3, strict=True):
        assert [chain.name for chain in model] == ["A", "B", "C"]
        assert ["".join(residue.name for residue in chain) for chain in model] == ["GGCA", "GGCA", "UUAA"]
        assert all([residue.seqid.num for residue in chain] == [1, 2, 3, 4] for chain in model)
        assert np.allclose([residue[0].pos.tolist() for chain in model for residue in chain], xyz_L3, atol=6e-4)
    if ending == "cif":
        assert [entity.subchains for entity in read.entities] == [["A", "B"], ["C"]]
        assert [entity.full_sequence for entity in read.entities] == [list("GGCA"), list("UUAA")]


@pytest.mark.parametrize("lengths", [None, [], [3], [7, 4], [1] * 63])
def test_lengths_that_say_nothing_of_the_chains_leave_one(lengths: list[int] | None) -> None:
    length = 63 if lengths and len(lengths) == 63 else 12
    one = replace(structure(length=length, count=1), chain_lengths=lengths)
    assert one.chains == [("A", slice(0, length))]


@pytest.mark.parametrize("name", ["_x", "loop_", "data_1", "save_", "-", "R1"])
def test_an_id_that_mmcif_reserves_is_a_value(name: str) -> None:
    """`_entry.id _x` was a name without a value: gemmi refused the whole file."""
    gemmi = pytest.importorskip("gemmi")
    block = gemmi.cif.read_string(to_cif(structure(name, count=1))).sole_block()
    assert gemmi.cif.as_string(block.find_value("_entry.id")) == name


def test_pdb_lines_are_as_wide_as_the_format_says() -> None:
    one = structure(length=40, count=1)
    one.xyz_ML3[0, :2] = [[-999.999, 9999.999, 0.0], [-0.0004, 1234.5678, -12.0]]
    lines = to_pdb(replace(one, name="x" * 200)).splitlines()
    atoms = [line for line in lines if line.startswith("ATOM")]
    assert max(map(len, lines)) == 80
    assert {len(line) for line in atoms} == {80}
    assert [float(atoms[0][at : at + 8]) for at in (30, 38, 46)] == [-999.999, 9999.999, 0.0]


# -- the page

SUBMISSIONS = Path(structure_files.__file__).parent
VENDOR = SUBMISSIONS / "vendor"
LIBRARY = (VENDOR / "3Dmol-min.js").read_text(encoding="utf-8")
SCRIPT = (SUBMISSIONS / "viewer.js").read_text(encoding="utf-8")
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")


def data_of(text: str) -> list[dict]:
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', text).group(1)
    return json.loads(found, parse_constant=pytest.fail)["targets"]


def points_of(listed: list[list[float] | None]) -> np.ndarray:
    return np.array([[np.nan] * 3 if point is None else point for point in listed])


def test_the_vendored_files_are_those_that_their_note_names() -> None:
    noted = dict(re.findall(r"^\| `(.+?)` \| ([0-9a-f]{64}) \|$", (VENDOR / "README.md").read_text(), re.MULTILINE))
    files = {path.name for path in VENDOR.iterdir()} - {"README.md"}
    assert noted == {name: hashlib.sha256((VENDOR / name).read_bytes()).hexdigest() for name in files}
    assert files == {"3Dmol-min.js", "LICENSE"}


def test_the_page_runs_the_library_once_and_its_own_script_and_nothing_else() -> None:
    text = viewer_page([structure()], {}, title="a <b> & c", above="of <d>")
    (script,) = re.findall(r"<script>(.*?)</script>", text, re.DOTALL)
    assert script == f"{LIBRARY}\n{SCRIPT}"
    assert text.count("<script") == 2  # the other holds the data
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    assert f"script-src 'sha256-{digest}'" in text
    assert "<h1>a &lt;b&gt; &amp; c</h1>" in text
    assert ">of &lt;d&gt;</div>" in text


def test_the_page_loads_nothing() -> None:
    """The library knows addresses of databases: the page's policy forbids them, and ours asks for none."""
    text = viewer_page([structure()], {}, title="t")
    policy = re.search(r'Content-Security-Policy" content="(.*?)"', text).group(1)
    rules = dict(rule.strip().split(" ", 1) for rule in policy.split(";"))
    assert rules.pop("default-src") == "'none'"
    assert set(rules) == {"style-src", "img-src", "base-uri", "form-action", "script-src"}
    assert not re.search(r"https?:|unsafe-eval", policy)
    rest = text.replace(LIBRARY, "")
    assert not re.search(r"(?:src|href|srcset|action)\s*=|@import|url\(", rest)
    assert not re.search(r"https?://|fetch|XMLHttpRequest|viewer_3Dmoljs", SCRIPT)


def test_the_licence_of_the_library_goes_with_the_page() -> None:
    text = html.unescape(viewer_page([structure()], {}, title="t"))
    assert (VENDOR / "LICENSE").read_text(encoding="utf-8") in text


def test_a_name_cannot_break_out_of_the_data() -> None:
    text = viewer_page([structure(name="</script><b>")], {}, title="t")
    assert data_of(text)[0]["name"] == "</script><b>"
    assert "</script><b>" not in text


def test_the_page_holds_every_candidate_unbent_and_unmirrored() -> None:
    one = structure()
    (shown,) = data_of(viewer_page([one], {}, title="t"))
    assert shown["sequence"] == one.sequence
    assert [each["confidence"] for each in shown["candidates"]] == np.round(one.confidence_M, 4).tolist()
    pairs = zip(shown["candidates"], one.xyz_ML3, strict=True)
    assert max(rmsd(np.array(each["xyz"]), xyz_L3) for each, xyz_L3 in pairs) < 0.1  # rounded to 0.1 Å


def test_the_page_looks_at_the_flat_side() -> None:
    trace_L3 = np.random.default_rng(0).normal(size=(40, 3)) * [3.0, 30.0, 9.0] + 50.0
    one = Structure(name="R1", sequence="A" * 40, xyz_ML3=trace_L3[None], confidence_M=np.array([0.5]))
    (shown,) = data_of(viewer_page([one], {}, title="t"))
    x, y, z = np.array(shown["candidates"][0]["xyz"]).std(axis=0)
    assert x > 2 * y > 4 * z


@pytest.mark.parametrize("length", [1, 2, 3])
def test_the_shortest_chains_have_a_page(length: int) -> None:
    (shown,) = data_of(viewer_page([structure(length=length)], {}, title="t"))
    assert [len(each["xyz"]) for each in shown["candidates"]] == [length] * 5


def test_candidates_lie_on_the_known_structure_and_gaps_stay_gaps(rng: np.random.Generator) -> None:
    one = structure()
    known = one.xyz_ML3[2] @ rotation_onto(*rng.standard_normal((2, 9, 3))) + 70.0
    known[[0, 1, 2, 20, 22, 39], [0, 1, 2, 0, 1, 2]] = np.nan  # one axis is enough to be unresolved
    (shown,) = data_of(viewer_page([one], {one.name: known[None]}, title="t"))
    assert [i for i, point in enumerate(shown["reference"]) if point is None] == [0, 1, 2, 20, 22, 39]
    far_ML = np.linalg.norm(
        [points_of(each["xyz"]) - points_of(shown["reference"]) for each in shown["candidates"]], axis=2
    )
    assert [each["score"] for each in shown["candidates"]].index(1.0) == 2
    assert np.nanmax(far_ML[2]) < 0.2
    assert np.nanmax(far_ML[0]) > 2.0


def test_of_several_known_structures_the_closest_is_shown_and_named() -> None:
    one = structure()
    known_RL3 = np.stack([one.xyz_ML3[0, ::-1], np.full((40, 3), np.nan), one.xyz_ML3[1]])
    (shown,) = data_of(viewer_page([one], {one.name: known_RL3}, title="t"))
    assert shown["facts"] == "candidates lie on the known structure (grey), number 3 of 3, the closest"
    assert rmsd(points_of(shown["reference"]), one.xyz_ML3[1]) < 0.1
    assert shown["candidates"][1]["score"] == 1.0


def test_copies_of_a_chain_are_scored_and_drawn_in_the_order_that_fits_as_in_the_evaluation() -> None:
    """The page said "got 0.2" of a dimer that `evaluate` gave 1.0."""
    one = replace(structure(length=40, count=1), sequence="GGCAGGCAUU" * 4, chain_lengths=[20, 20])
    swapped = np.roll(one.xyz_ML3, 20, axis=1)
    shown = data_of(viewer_page([one], {one.name: swapped}, title="t"))[0]
    assert shown["candidates"][0]["score"] == 1.0
    np.testing.assert_allclose(shown["candidates"][0]["xyz"], shown["reference"], atol=0.11)
    assert shown["facts"].endswith("; copies of a chain in the order that fits best")


def test_without_a_known_structure_nothing_is_said_of_errors() -> None:
    (shown,) = data_of(viewer_page([structure()], {"other": np.zeros((1, 40, 3))}, title="t"))
    assert shown["reference"] is None
    assert shown["facts"] == "no known structure: candidates lie on candidate 1"
    assert {each["score"] for each in shown["candidates"]} == {None}


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium here")
@pytest.mark.parametrize("webgl", [True, False])
def test_a_browser_draws_or_says_in_a_sentence_why_not(tmp_path: Path, webgl: bool) -> None:
    one, path = structure(), tmp_path / "viewer.html"
    known = one.xyz_ML3[2].copy()
    known[[0, 20, 22]] = np.nan
    one = replace(one, chain_lengths=[15, 6, 19])
    path.write_text(viewer_page([one, structure("R2", 1)], {one.name: known[None]}, title="t"), encoding="utf-8")
    graphics = "--use-gl=angle --use-angle=swiftshader --enable-unsafe-swiftshader"
    flags = graphics if webgl else "--disable-gpu --disable-software-rasterizer --disable-3d-apis"
    quiet = "--no-first-run --disable-background-networking --disable-component-update --enable-logging=stderr"
    command = ["timeout", "300", CHROMIUM, "--headless", "--no-sandbox", f"--user-data-dir={tmp_path / 'profile'}"]
    command += [*quiet.split(), *flags.split(), "--virtual-time-budget=2000", "--dump-dom", path.as_uri()]
    ran = subprocess.run(command, capture_output=True, encoding="utf-8", check=False)
    if ran.returncode or "<html" not in ran.stdout:
        pytest.skip(f"Chromium does not start here: {ran.stderr[-200:]}")
    if webgl and "error creating viewer" in ran.stderr:
        pytest.skip("this Chromium has no software WebGL")
    assert not re.search(r"CONSOLE.*(Uncaught|Refused|violates)", ran.stderr)
    assert re.findall(r"<option value=\"\d\">(.*?)</option>", ran.stdout) == ["R1_A", "R2"]
    assert re.findall(r"(Candidate \d): expected TM.score [\d.]+, got 1.000", ran.stdout) == ["Candidate 3"]
    assert "40 nt in 3 chains; candidates lie on" in ran.stdout
    body = re.sub(r"<script.*?</script>", "", ran.stdout, flags=re.DOTALL)
    is_drawn, is_told = "<canvas" in body, "Drawing needs JavaScript and WebGL" in body
    assert (is_drawn, is_told) == (webgl, not webgl)


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
    write(
        pl.read_parquet(paths.clean("test")).with_columns(pl.Series("chain_lengths", [[2, 2], None, [6]])),
        paths.clean("test"),
    )
    structure_files.run(paths, competition=RNA3D, name="all")
    chains = [{line[21] for line in (home / f"{name}.pdb").read_text().splitlines() if line.startswith("ATOM")}
              for name in ("Q1", "Q10", "Q2_B")]  # fmt: skip
    assert chains == [{"A", "B"}, {"A"}, {"A"}]
    assert structure_files.run(paths, competition=RNA3D, name="all", table="oof").facts["with_reference"] == 6


def test_structures_that_a_pdb_file_does_not_hold_are_moved_and_those_too_long_for_one_are_left_to_mmcif(
    paths: Paths,
) -> None:
    """It said: longC has the coordinate -1298.700 Å; … Next: move the structure to the origin. (1,000 nt, unpaired.)"""
    gemmi, path = pytest.importorskip("gemmi"), paths.ensemble_dir("all") / "test.parquet"
    away = pl.when(pl.col("sequence_id") == "Q1").then(-1500.0).otherwise(0.0)
    longer = pl.when(pl.col("sequence_id") == "Q10").then(1000.0).otherwise(1.0)
    table = pl.read_parquet(path)
    flat = table.with_row_index().explode("x", "y", "z").with_columns(pl.col("x") * longer + away)
    lists = flat.group_by("index", maintain_order=True).agg("x", "y", "z")
    write(table.drop("x", "y", "z").hstack(lists.drop("index")), path)
    report, home = structure_files.run(paths, competition=RNA3D, name="all"), path.parent / "structures-test"
    assert report.facts["too_long_for_pdb"] == ["Q10"]
    assert {file.name for file in home.glob("*Q*")} == {"Q1.pdb", "Q1.cif", "Q10.cif", "Q2_B.pdb", "Q2_B.cif"}
    for name in ("Q1.pdb", "Q1.cif"):
        read = [[residue[0].pos.tolist() for residue in model[0]] for model in gemmi.read_structure(str(home / name))]
        known = [np.array(axes).T for axes in table.filter(sequence_id="Q1").select("x", "y", "z").iter_rows()]
        for got_L3, xyz_L3 in zip(read, known, strict=True):
            np.testing.assert_allclose(np.diff(got_L3, axis=0), np.diff(xyz_L3, axis=0), atol=1.2e-3)


@pytest.mark.parametrize("value", [None, float("nan"), float("inf"), -1e18])
def test_a_coordinate_that_is_no_place_is_refused(paths: Paths, value: float | None) -> None:
    path = paths.ensemble_dir("all") / "test.parquet"
    write(pl.read_parquet(path).with_columns(pl.col("x").list.eval(pl.element() * 0 + pl.lit(value))), path)
    with pytest.raises(DataError, match=r"Q1 has the coordinate (nan|inf|-1\d+\.000) Å; expected a place"):
        structure_files.run(paths, competition=RNA3D, name="all")


def test_other_tables_and_competitions_are_refused(paths: Paths) -> None:
    with pytest.raises(ConfigError, match="expected test or oof"):
        structure_files.run(paths, competition=RNA3D, name="all", table="train")
    with pytest.raises(ConfigError, match="not about structures"):
        structure_files.run(paths, competition=get_competition("ribonanza"), name="all")
    write(pl.read_parquet(paths.clean("test")).with_columns(sequence=pl.lit("ACG")), paths.clean("test"))
    with pytest.raises(DataError, match="Q1 has 4 residues"):
        structure_files.run(paths, competition=RNA3D, name="all")
