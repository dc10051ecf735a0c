"""The templates stage: structure files become dated chains, and a damaged one is refused by name."""

import gzip
from concurrent.futures import ThreadPoolExecutor
from datetime import date
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from pipeline.errors import DataError
from pipeline.paths import Paths
from pipeline.stage import sha256_file
from pipeline.structure.geometry import helix_strand
from pipeline.templates import collection
from pipeline.templates.collection import library_path
from pipeline.templates.structure_file import read_chains

pytest.importorskip("gemmi")

SEQUENCE = ["GTP", "G", "A", "PSU", "C", "XYZ", "5MC", "I", "U", "A", "C", "G", "ABC"]
PLACES = {number: name for number, name in enumerate(SEQUENCE, start=1) if number != 9}  # residue 9 is unresolved
XYZ = helix_strand(len(SEQUENCE)).round(3)


def cif(
    entry: str = "9XYZ", *, extra_atoms: str = "", date_rows: str = "1 1 'Initial release' 2019-03-04", model: int = 1
) -> str:
    """A minimal mmCIF file of one chain, author's chain R, author's numbers with an insertion code."""
    atoms = []
    for number, name in PLACES.items():
        x, y, z = XYZ[number - 1]
        author, insertion = (number, "?") if number < 5 else (4, "A") if number == 5 else (number + 10, "?")
        fields = (name, "A", "1", number, insertion, x, y, z, "1.00", author, name, "R", '"C1\'"', model)
        atoms.append(
            "HETATM {} C {} . {} {} {} {} {} {} {} {} {} 10 {} {} {} {} {}".format(
                number, fields[12], *fields[:9], *fields[9:12], fields[12], fields[13]
            )
        )
    return f"""data_{entry}
_entry.id {entry}
_exptl.method 'X-RAY DIFFRACTION'
_refine.ls_d_res_high 2.50
loop_
_pdbx_audit_revision_history.ordinal
_pdbx_audit_revision_history.major_revision
_pdbx_audit_revision_history.details
_pdbx_audit_revision_history.revision_date
2 1 'Data collection' 2023-01-01
{date_rows}
loop_
_entity.id
_entity.type
1 polymer
loop_
_entity_poly.entity_id
_entity_poly.type
_entity_poly.pdbx_strand_id
1 polyribonucleotide R
loop_
_entity_poly_seq.entity_id
_entity_poly_seq.num
_entity_poly_seq.mon_id
{chr(10).join(f"1 {number} {name}" for number, name in enumerate(SEQUENCE, start=1))}
loop_
_chem_comp.id
_chem_comp.type
_chem_comp.mon_nstd_parent_comp_id
XYZ 'RNA linking' U
ABC 'RNA linking' ?
loop_
_struct_asym.id
_struct_asym.entity_id
A 1
loop_
_atom_site.group_PDB
_atom_site.id
_atom_site.type_symbol
_atom_site.label_atom_id
_atom_site.label_alt_id
_atom_site.label_comp_id
_atom_site.label_asym_id
_atom_site.label_entity_id
_atom_site.label_seq_id
_atom_site.pdbx_PDB_ins_code
_atom_site.Cartn_x
_atom_site.Cartn_y
_atom_site.Cartn_z
_atom_site.occupancy
_atom_site.B_iso_or_equiv
_atom_site.auth_seq_id
_atom_site.auth_comp_id
_atom_site.auth_asym_id
_atom_site.auth_atom_id
_atom_site.pdbx_PDB_model_num
{chr(10).join(atoms)}
{extra_atoms}"""


def write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_a_chain_keeps_gaps_and_insertion_codes_and_maps_modified_residues(tmp_path: Path) -> None:
    (chain,) = read_chains(write(tmp_path / "9xyz.cif", cif()))
    assert chain.template_id == "9XYZ_R"
    assert chain.sequence == "GGAUCUCGUACGA"  # GTP, PSU, XYZ by the file, 5MC, I as G, ABC unknown
    assert (chain.modified, chain.unknown) == (5, 1)
    assert np.flatnonzero(np.isnan(chain.xyz_M3[:, 0])).tolist() == [8]
    resolved = [number - 1 for number in PLACES]
    np.testing.assert_allclose(chain.xyz_M3[resolved], XYZ[resolved])


def test_the_release_is_the_first_revision_and_the_resolution_is_kept(tmp_path: Path) -> None:
    (chain,) = read_chains(write(tmp_path / "9xyz.cif", cif()))
    assert (chain.released, chain.resolution) == (date(2019, 3, 4), 2.5)


def test_of_alternative_locations_the_fuller_one_counts(tmp_path: Path) -> None:
    """Position 2 three times: the highest occupancy wins, the first of equals."""
    rows = [
        f'ATOM {90 + k} C "C1\'" {alt} G A 1 2 ? {x} 0 0 {occupancy} 10 2 G R "C1\'" 1'
        for k, (alt, x, occupancy) in enumerate((("A", 50.0, 0.4), ("B", 60.0, 0.6), ("C", 70.0, 0.6)))
    ]
    text = "\n".join(line for line in cif().splitlines() if not line.startswith("HETATM 2 "))
    (chain,) = read_chains(write(tmp_path / "9xyz.cif", f"{text}\n" + "\n".join(rows) + "\n"))
    assert chain.xyz_M3[1].tolist() == [60.0, 0.0, 0.0]


def test_only_the_first_model_and_the_best_of_equal_chains_are_read(tmp_path: Path) -> None:
    text = cif()
    second = text[text.index("HETATM 1 ") :].replace("\n\n", "\n")
    copies = second.replace(" A 1 ", " B 1 ").replace(' R "C1\'"', ' S "C1\'"').replace("HETATM 3 ", "HETATM 103 ")
    without_one = "\n".join(line for line in copies.splitlines() if not line.startswith("HETATM 103"))
    models = second.replace('"C1\'" 1\n', '"C1\'" 2\n')
    text = text.replace("A 1\nloop_", "A 1\nB 1\nloop_")
    chains = read_chains(write(tmp_path / "9xyz.cif", f"{text.rstrip()}\n{without_one}\n{models}"))
    assert [chain.template_id for chain in chains] == ["9XYZ_R"]


def pdb(entry: str = "1ABC") -> str:
    """PDB format: no SEQRES, residue numbers 1 to 8, then 11 to 16, the last but one with an insertion code."""
    numbers = [*range(1, 9), *range(11, 15), "14A", 15]
    lines = [
        f"HEADER    RNA                                     01-JAN-03   {entry}",
        "REVDAT   2   24-FEB-09 1ABC    1",
    ]
    lines.append("REVDAT   1   14-OCT-03 1ABC    0")
    for serial, (number, (x, y, z)) in enumerate(zip(numbers, helix_strand(len(numbers)), strict=True), start=1):
        name = "GCAU"[serial % 4]
        place = f"{number:>4} " if isinstance(number, int) else f"{number:>5}"
        lines.append(f"ATOM  {serial:>5}  C1'   {name} B{place}   {x:8.3f}{y:8.3f}{z:8.3f}  1.00 10.00           C  ")
    return "\n".join([*lines, "END", ""])


def test_a_pdb_file_gets_its_gap_from_the_residue_numbers_and_its_date_from_revdat(tmp_path: Path) -> None:
    (chain,) = read_chains(write(tmp_path / "pdb1abc.ent", pdb()))
    assert (chain.template_id, chain.released) == ("1ABC_B", date(2003, 10, 14))
    assert np.flatnonzero(np.isnan(chain.xyz_M3[:, 0])).tolist() == [8, 9]
    assert len(chain.sequence) == 16
    assert chain.sequence[10:] == "".join("GCAU"[serial % 4] for serial in range(9, 15))


def numbered_pdb(names: list[str], numbers: list[int], *, seqres: list[str], head: str = "") -> str:
    """C1' alone, residues with these names and numbers, the whole sequence in SEQRES."""
    lines = [f"SEQRES {k // 13 + 1:3} A {len(seqres):4}  {' '.join(f'{name:>3}' for name in seqres[k : k + 13])}"
             for k in range(0, len(seqres), 13)]  # fmt: skip
    for serial, (name, number, (x, y, z)) in enumerate(
        zip(names, numbers, helix_strand(len(names)), strict=True), start=1
    ):
        lines.append(f"ATOM  {serial:>5}  C1' {name:>3} A{number:>4}    {x:8.3f}{y:8.3f}{z:8.3f}  1.00 10.00")
    return "\n".join([*head.splitlines(), *lines, "TER", "END", ""])


@pytest.mark.parametrize("first", [1, -4, 101])
def test_numbers_that_count_along_seqres_say_where_its_gaps_are(tmp_path: Path, first: int) -> None:
    """Of GCAUGC--AUGCAUGC, without AU, the two after the gap were put into it; the start of --GCAUGC at its first G."""
    seqres = list("GGGCAUGCAUAUGCAUGCC")
    there = [*range(2, 8), *range(10, 18)]
    text = numbered_pdb([seqres[k] for k in there], [k + first for k in there], seqres=seqres)
    (chain,) = read_chains(write(tmp_path / "1abc.pdb", text))
    assert chain.sequence == "".join(seqres)
    assert np.flatnonzero(np.isfinite(chain.xyz_M3[:, 0])).tolist() == there


def test_numbers_that_do_not_count_along_seqres_give_way_to_its_letters(tmp_path: Path) -> None:
    seqres = list("GCAUGGAUCCAGUC")
    text = numbered_pdb(seqres, [*range(1, 8), *range(20, 27)], seqres=seqres)
    (chain,) = read_chains(write(tmp_path / "1abc.pdb", text))
    assert (chain.sequence, np.isfinite(chain.xyz_M3).all()) == ("GCAUGGAUCCAGUC", True)


def test_a_pdb_file_says_what_its_residues_are_modified_from(tmp_path: Path) -> None:
    """MODRES was not read: queuosine, a G, was A, as everything unknown; and so was T."""
    names = ["G", "QUO", "T", "A", "C", "G", "U", "A", "C", "G"]
    head = "MODRES 1ABC QUO A    2    G  2-AMINO-7-DEAZA..."
    (chain,) = read_chains(write(tmp_path / "1abc.pdb", numbered_pdb(names, list(range(1, 11)), seqres=[], head=head)))
    assert (chain.sequence, chain.modified, chain.unknown) == ("GGUACGUACG", 2, 0)


def test_a_residue_of_no_occupancy_has_the_place_that_the_file_gives_it(tmp_path: Path) -> None:
    """A file whose occupancies are empty or all zero had no chain at all, and nobody said so."""
    for occupancy in ("  0.00", "      "):
        (chain,) = read_chains(write(tmp_path / "1abc.pdb", pdb().replace("  1.00", occupancy)))
        assert np.isfinite(chain.xyz_M3[:, 0]).sum() == 14


DAMAGED = {
    "cut": cif()[:-400],
    "empty": "",
    "web page": "<!DOCTYPE html><html></html>",
    "no atoms": "data_9XYZ\n_entry.id 9XYZ\n",
    "random": "\x00\x01\x02" * 50,
}


@pytest.mark.parametrize("case", DAMAGED)
def test_a_damaged_file_is_refused_by_name_in_one_sentence(tmp_path: Path, case: str) -> None:
    write(tmp_path / "raw" / "good.cif", cif("8ABC"))
    write(tmp_path / "raw" / "9xyz.cif", DAMAGED[case])
    with pytest.raises(DataError, match=r"9xyz\.cif: (not a whole mmCIF|no atoms)") as caught:
        collection.run(Paths(comp="rna3d", root=tmp_path), raw=tmp_path / "raw")
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)
    assert not library_path(Paths(comp="rna3d", root=tmp_path)).exists()


def test_a_cut_gzip_is_refused(tmp_path: Path) -> None:
    packed = gzip.compress(cif().encode())
    (tmp_path / "9xyz.cif.gz").write_bytes(packed[:-100])
    with pytest.raises(DataError, match=r"9xyz\.cif\.gz: not a whole mmCIF"):
        read_chains(tmp_path / "9xyz.cif.gz")


@pytest.mark.parametrize("name", ["9XYZ.CIF", "9xyz.cif.GZ"])
def test_endings_in_capitals_are_read_as_those_in_small_letters(tmp_path: Path, name: str) -> None:
    """It said: 9XYZ.CIF: not a whole mmCIF or PDB file (Incorrect file format (perhaps it is cif not pdb?))."""
    text = cif().encode()
    (tmp_path / name).write_bytes(gzip.compress(text) if name.endswith(".GZ") else text)
    assert [chain.template_id for chain in read_chains(tmp_path / name)] == ["9XYZ_R"]


def test_the_library_is_a_dated_table_and_two_builds_are_identical(tmp_path: Path) -> None:
    write(tmp_path / "raw" / "b" / "9xyz.cif", cif())
    write(tmp_path / "raw" / "1abc.pdb", pdb())
    digests = []
    for root in (tmp_path / "one", tmp_path / "two"):
        report = collection.run(Paths(comp="rna3d", root=root), raw=tmp_path / "raw")
        digests.append(sha256_file(report.outputs["library"]))
    assert digests[0] == digests[1]
    table = pl.read_parquet(report.outputs["library"])
    assert table["template_id"].to_list() == ["1ABC_B", "9XYZ_R"]
    assert table["released"].to_list() == [date(2003, 10, 14), date(2019, 3, 4)]
    assert table["x"].list.len().to_list() == table["sequence"].str.len_chars().to_list() == [16, 13]
    assert table["z"].list.eval(pl.element().is_null()).list.sum().to_list() == [2, 1]
    assert report.facts["undated"] == 0
    assert collection.run(Paths(comp="rna3d", root=tmp_path / "one"), raw=tmp_path / "raw").status == "current"


def test_an_entry_in_two_files_and_a_folder_without_structures_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "raw" / "9xyz.cif", cif())
    write(tmp_path / "raw" / "again.cif", cif())
    with pytest.raises(DataError, match="two files hold 9XYZ_R"):
        collection.run(Paths(comp="rna3d", root=tmp_path), raw=tmp_path / "raw")
    (tmp_path / "none").mkdir()
    with pytest.raises(DataError, match=r"no \.cif, \.pdb or \.ent file"):
        collection.run(Paths(comp="rna3d", root=tmp_path), raw=tmp_path / "none")


def test_as_many_processes_read_as_there_is_time_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One was started for each CPU that the container sees, not for each that it has time for."""
    asked = []

    def pool(workers: int, **_: object) -> ThreadPoolExecutor:
        asked.append(workers)
        return ThreadPoolExecutor(1)

    monkeypatch.setattr(collection, "ProcessPoolExecutor", pool)
    monkeypatch.setattr(collection, "usable_cpus", lambda: 3, raising=False)
    files = [write(tmp_path / f"{number}.cif", cif(f"9XY{number}")) for number in range(16)]
    assert len(collection._read_all(files, workers=None)) == len(collection._read_all(files, workers=2)) == 16
    assert asked == [3, 2]


def test_an_entry_without_a_release_date_is_undated(tmp_path: Path) -> None:
    text = cif().replace("2023-01-01", "?").replace("2019-03-04", "?")
    (chain,) = read_chains(write(tmp_path / "9xyz.cif", text))
    assert chain.released is None
