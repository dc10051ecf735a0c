"""RNA chains of an mmCIF or PDB file, read with gemmi. No polars: readers run in worker processes.

Letters: M residues of a chain, 3 xyz; lengths in Å.
"""

import gzip
import itertools
import re
import zlib
from dataclasses import dataclass
from datetime import date, datetime
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from pipeline.errors import ConfigError, DataError

if TYPE_CHECKING:
    import gemmi

#: Letter of a residue that neither its file nor gemmi's table traces back to A, C, G or U (as for test sequences).
UNKNOWN_AS = "A"
#: Parents of residues that gemmi's table does not know as RNA, and of inosine, which pairs like G.
_PARENTS = {
    **dict.fromkeys(("5MC", "CTP", "CDP", "CBV", "4OC", "5CM", "10C", "LV2"), "C"),
    **dict.fromkeys(("GTP", "GDP", "G7M", "YYG", "YG", "23G", "I", "1MG", "2MG", "M2G", "7MG", "OMG"), "G"),
    **dict.fromkeys(("ATP", "ADP", "A23", "P5P", "6MZ", "MA6", "2MA", "T6A"), "A"),
    **dict.fromkeys(("UTP", "UDP", "5MU", "PSU", "H2U", "OMU", "4SU", "5BU", "3TD", "B8N", "T"), "U"),
}
_C1 = ("C1'", "C1*")
_LONGEST_GAP = 200  # residue numbers that a PDB file without SEQRES may skip
_MIN_RESOLVED = 10
#: Endings of structure files, each also with .gz.
ENDINGS = (".cif", ".mmcif", ".pdb", ".ent")


@dataclass(frozen=True, kw_only=True)
class Chain:
    """One RNA chain: every residue of its sequence, resolved or not."""

    template_id: str  # entry and author's chain name, such as 1SCL_A
    sequence: str  # letters A, C, G, U
    released: date | None
    resolution: float | None  # Å
    xyz_M3: np.ndarray  # Å, NaN where unresolved
    modified: int  # residues mapped to their parents
    unknown: int  # residues read as `UNKNOWN_AS`


def require_gemmi() -> None:
    """Say how to install gemmi where it is missing.

    Raises:
        ConfigError: it is.
    """
    try:
        import gemmi  # noqa: F401
    except ImportError as err:
        raise ConfigError(
            "templates: gemmi, which reads mmCIF and PDB files, is not installed. "
            "Next: pip install 'rna-competition-pipeline[templates]'."
        ) from err


def read_chains(path: Path) -> list[Chain]:
    """RNA chains of a structure file, of its first model; of equal sequences the best resolved one.

    - Residues take the place that the entry's sequence gives them (``label_seq``; in a PDB file SEQRES, along which the
      residues' numbers count, or else their letters and bonds are aligned), so that gaps stay gaps and insertion codes
      are residues of their own. A PDB file without SEQRES gets its gaps from jumps of the residue number.
    - Of alternative locations, and of different residues at one place, the C1' of highest occupancy counts, be it zero.
    - Modified residues become their parents: by the file's own table, gemmi's, or the one here.
    - The release date is the first of the entry's revisions; a deposition date is none.

    Args:
        path: ``.cif``, ``.mmcif``, ``.pdb`` or ``.ent``, also gzipped.

    Raises:
        DataError: the file is damaged, or no structure file.
    """
    import gemmi

    name, parents = path.name.lower(), dict[str, str]()
    try:
        text = gzip.decompress(path.read_bytes()) if name.endswith(".gz") else path.read_bytes()
        if name.removesuffix(".gz").endswith((".cif", ".mmcif")):
            block = gemmi.cif.read_string(text).sole_block()
            structure = gemmi.make_structure_from_block(block)
            structure.resolution = _cif_resolution(block)
            released, parents = _cif_release(block), _cif_parents(block)
        else:
            # before 0.7.4 gemmi reads on, past a short line's end, in what the line before it left there
            structure = gemmi.read_pdb_string(b"\n".join(line.ljust(80) for line in text.splitlines()))
            parents = {mod.res_id.name: mod.parent_comp_id for mod in structure.mod_residues}
            released = _pdb_release(text.decode("ascii", "replace"))
    except (ValueError, RuntimeError, IndexError, EOFError, OSError, zlib.error) as err:
        raise DataError(
            f"{path}: not a whole mmCIF or PDB file ({str(err).splitlines()[0][:150]}). "
            "Next: download it again, or remove it."
        ) from err
    if not len(structure) or not any(len(chain) for chain in structure[0]):
        raise DataError(f"{path}: no atoms; expected a structure. Next: download it again, or remove it.")
    structure.setup_entities()
    structure.assign_label_seq_id()
    entry = (dict(structure.info).get("_entry.id") or path.name.split(".")[0]).upper()
    return _distinct(_chains(structure, entry=entry, released=released, parents=parents))


def _cif_release(block: "gemmi.cif.Block") -> date | None:
    found = [_date(text) for text in block.find_values("_pdbx_audit_revision_history.revision_date")]
    return min((day for day in found if day), default=None)


def _cif_resolution(block: "gemmi.cif.Block") -> float:
    """Å; 0 = none, as of NMR structures."""
    tags = ("_refine.ls_d_res_high", "_em_3d_reconstruction.resolution")
    found = [text for tag in tags for text in block.find_values(tag)]
    numbers = [float(text) for text in found if re.fullmatch(r"\d+(\.\d*)?", text)]
    return min(numbers, default=0.0)


def _cif_parents(block: "gemmi.cif.Block") -> dict[str, str]:
    """Component -> parent component, as the entry itself says."""
    parents = dict[str, str]()
    for table in (
        block.find("_chem_comp.", ["id", "mon_nstd_parent_comp_id"]),
        block.find("_pdbx_struct_mod_residue.", ["label_comp_id", "parent_comp_id"]),
    ):
        parents |= {row.str(0): row.str(1) for row in table if row.str(1) not in ("", "?", ".")}
    return parents


def _pdb_release(text: str) -> date | None:
    found = re.findall(r"^REVDAT +\d+ +(\d\d-[A-Z]{3}-\d\d) ", text, re.MULTILINE)
    days = [datetime.strptime(day, "%d-%b-%y").date() for day in found]
    return min(days, default=None)


def _date(text: str) -> date | None:
    try:
        return date.fromisoformat(text.strip("'\""))
    except ValueError:
        return None


def _chains(structure: "gemmi.Structure", *, entry: str, released: date | None, parents: dict[str, str]) -> list[Chain]:
    import gemmi

    found = []
    for chain in structure[0]:
        polymer = chain.get_polymer()
        if not len(polymer) or polymer.check_polymer_type() not in (
            gemmi.PolymerType.Rna,
            gemmi.PolymerType.DnaRnaHybrid,
        ):
            continue
        entity = structure.get_entity_of(polymer)
        names = [gemmi.Entity.first_mon(name) for name in entity.full_sequence] if entity else []
        names, places = _places(polymer, names, numbered=structure.input_format == gemmi.CoorFormat.Pdb)
        letters = [_letter(name, parents) for name in names]
        xyz_M3, occupancy_M = np.full((len(names), 3), np.nan), np.full(len(names), -1.0)
        for residue, place in zip(polymer, places, strict=True):
            for atom in residue:
                if atom.name in _C1 and atom.occ > occupancy_M[place]:
                    xyz_M3[place], occupancy_M[place] = atom.pos.tolist(), atom.occ
                    letters[place] = _letter(residue.name, parents)
        if np.isfinite(xyz_M3[:, 0]).sum() >= _MIN_RESOLVED:
            found.append(
                Chain(
                    template_id=f"{entry}_{chain.name}",
                    sequence="".join(letter or UNKNOWN_AS for letter in letters),
                    released=released,
                    resolution=structure.resolution or None,
                    xyz_M3=xyz_M3,
                    modified=sum(letter not in (None, name) for letter, name in zip(letters, names, strict=True)),
                    unknown=letters.count(None),
                )
            )
    return found


def _places(polymer: "gemmi.ResidueSpan", names: list[str], *, numbered: bool) -> tuple[list[str], list[int]]:
    """All residue names of the chain, and the 0-based place of every observed residue among them.

    Args:
        polymer: the observed residues.
        names: of the entry's sequence; none where it has none.
        numbered: whether residue numbers that count along the sequence come before labels, which are an alignment.
    """
    if numbered and (places := _counted(polymer, names)):
        return names, places
    labels = [residue.label_seq or 0 for residue in polymer]
    if all(1 <= label <= len(names) for label in labels):
        return names, [label - 1 for label in labels]
    names, places = list[str](), list[int]()
    last: gemmi.SeqId | None = None
    for residue in polymer:
        here = residue.seqid
        if last is not None and last == here:  # another residue at the same place
            places.append(places[-1])
            continue
        jump = (here.num or 0) - (last.num or 0) - 1 if last is not None else 0
        names += [""] * (jump if 0 < jump <= _LONGEST_GAP else 0)
        places.append(len(names))
        names.append(residue.name)
        last = here
    return names, places


def _counted(polymer: "gemmi.ResidueSpan", names: list[str]) -> list[int]:
    """Places by the residues' numbers, from 1 or from elsewhere; none if not all of the names agree with any."""
    numbers = [residue.seqid.num or 0 for residue in polymer]
    ascending = all(left < right for left, right in itertools.pairwise(numbers))
    if not ascending or numbers[-1] - numbers[0] >= len(names):
        return []
    starts = range(len(names) - (numbers[-1] - numbers[0]))
    for start in sorted(starts, key=lambda start: start + 1 != numbers[0]):
        places = [start + number - numbers[0] for number in numbers]
        if all(names[place] == residue.name for place, residue in zip(places, polymer, strict=True)):
            return places
    return []


def _letter(name: str, parents: dict[str, str]) -> str | None:
    """A, C, G or U; None where the residue's parent is not known."""
    import gemmi

    for known in (name, parents.get(name, "")):
        code = gemmi.find_tabulated_residue(known).one_letter_code.upper().replace("T", "U")
        if _PARENTS.get(known) or (code and code in "ACGU"):
            return _PARENTS.get(known) or code
    return None


def _distinct(chains: list[Chain]) -> list[Chain]:
    """The best resolved chain of every sequence; the first of equals."""
    best: dict[str, Chain] = {}
    for chain in chains:
        other = best.get(chain.sequence)
        if other is None or np.isfinite(chain.xyz_M3).sum() > np.isfinite(other.xyz_M3).sum():
            best[chain.sequence] = chain
    return list(best.values())
