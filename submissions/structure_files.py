"""Predicted structures as files: PDB and mmCIF of every target (C1' only), and a page that shows them.

The page needs no network: 3Dmol.js (``vendor``) is part of it and draws what the script beside this module asks for.

Letters: M candidates, R references, L length (nt), 3 xyz. Lengths in Å.
"""

import itertools
import json
import string
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from pipeline.competitions.base import Competition
from pipeline.errors import ConfigError, DataError
from pipeline.paths import Paths
from pipeline.schema import MIN_RESOLVED, SENTINEL
from pipeline.stage import Report, run_stage
from pipeline.structure.geometry import rotation_onto
from pipeline.tables import open_parquet
from submissions import page
from submissions.chains import permuted
from submissions.layout import MAX_SUBMITTED, moved_into_range
from submissions.structure_targets import read_traces
from submissions.tm_score import d0_rna, tm_matrix

#: Raised when the same tables give other files than before.
VERSION = 4

_SCRIPT = Path(__file__).with_name("viewer.js")
_LIBRARY = Path(__file__).with_name("vendor") / "3Dmol-min.js"
_LICENCE = _LIBRARY.with_name("LICENSE")
_LONGEST_PDB = 9_999  # residues: four columns
_CHAINS = string.ascii_uppercase + string.ascii_lowercase + string.digits  # a PDB file has one column for a name
_ORDERED = 2_000  # nt of a complex whose copies are put in order: eight of 580 nt would take a minute a candidate
_FITS = 12  # rounds of superposition, each weighting residues by their TM-score of the round before
_CIF_COLUMNS = (
    *("group_PDB", "id", "type_symbol", "label_atom_id", "label_alt_id", "label_comp_id", "label_asym_id"),
    *("label_entity_id", "label_seq_id", "pdbx_PDB_ins_code", "Cartn_x", "Cartn_y", "Cartn_z", "occupancy"),
    *("B_iso_or_equiv", "auth_seq_id", "auth_asym_id", "pdbx_PDB_model_num"),
)


@dataclass(frozen=True, kw_only=True)
class Structure:
    """The candidates of one target."""

    name: str
    sequence: str
    xyz_ML3: np.ndarray  # Å
    confidence_M: np.ndarray  # expected TM-score
    chain_lengths: Sequence[int] | None = None  # nt, in the sequence's order; None = one chain

    @property
    def chains(self) -> list[tuple[str, slice]]:
        """Name and residues of every chain; of more than 62 a single one."""
        lengths = self.chain_lengths or []
        if sum(lengths) != len(self.sequence) or not 0 < len(lengths) <= len(_CHAINS):
            lengths = [len(self.sequence)]
        ends = itertools.accumulate(lengths, initial=0)
        return [(name, slice(*ends)) for name, ends in zip(_CHAINS, itertools.pairwise(ends), strict=False)]


def run(
    paths: Paths, *, competition: Competition, name: str, table: str = "test", home: Path | None = None, title: str = ""
) -> Report:
    """Write ``ensembles/<name>/structures-<table>/``: ``<target>.pdb``, ``<target>.cif`` and ``viewer.html``.

    Args:
        paths: where ensembles and clean tables are.
        competition: one whose task is a structure.
        name: of the ensemble.
        table: its test candidates, or the out-of-fold ones of the training targets.
        home: another folder to write to, which is all this stage's.
        title: of the page; "" = what the ensemble and its table are called.

    Raises:
        ConfigError: the competition is not about structures, or there is no such table.
        DataError: a table is missing or damaged, or a coordinate is not finite.
    """
    competition.require_structures("structures")
    if table not in ("test", "oof"):
        raise ConfigError(f"structures: table {table!r}; expected test or oof. Next: TABLE=oof or none.")
    predictions = paths.ensemble_dir(name) / f"{table}.parquet"
    clean = paths.clean("test" if table == "test" else "train")
    inputs = {"predictions": predictions, "sequences": clean, "script": _SCRIPT, "library": _LIBRARY}
    if paths.clean("references").is_file():
        inputs["references"] = paths.clean("references")
    home = home or paths.ensemble_dir(name) / f"structures-{table}"
    which = "test targets" if table == "test" else "training targets, out of fold"
    title = title or f"{name}: {which}"

    def build(parts: dict[str, Path]) -> dict[str, Any]:
        found = read_structures(predictions, clean)
        for ending in ("pdb", "cif"):  # of targets that there are no more
            for path in home.glob(f"*.{ending}"):
                path.unlink()
        skipped = []
        for structure in found:
            (home / f"{structure.name}.cif").write_text(to_cif(structure), encoding="ascii")
            if len(structure.sequence) > _LONGEST_PDB or structure.xyz_ML3.max() > MAX_SUBMITTED:
                skipped.append(structure.name)
            else:
                (home / f"{structure.name}.pdb").write_text(to_pdb(structure), encoding="ascii")
        known = read_traces(inputs["references"], member="conformer", finite=False) if "references" in inputs else {}
        text = viewer_page(found, known, title=title, above=competition.title)
        parts["viewer"].write_text(text, encoding="utf-8")
        facts = {"targets": len(found), "with_reference": sum(each.name in known for each in found)}
        return facts | ({"too_long_for_pdb": skipped} if skipped else {})

    return run_stage(
        "structures",
        inputs=inputs,
        outputs={"viewer": home / "viewer.html"},
        params={"version": VERSION, "table": table, "title": title},
        build=build,
    )


def read_structures(predictions: Path, sequences: Path) -> list[Structure]:
    """Candidates of all targets, in the order of the clean table, each where a PDB file holds it if one can.

    Args:
        predictions: parquet with ``sequence_id, candidate, confidence, x, y, z``.
        sequences: clean table with ``sequence_id, sequence``, and ``chain_lengths`` if it tells them.

    Raises:
        DataError: a table is missing or damaged, they are not of the same targets, or a coordinate is not finite.
    """
    open_parquet(predictions, ("sequence_id", "candidate", "confidence", "x", "y", "z")).close()
    open_parquet(sequences, ("sequence_id", "sequence")).close()
    known = pl.read_parquet(sequences)
    letters = dict(known.select("sequence_id", "sequence").iter_rows())
    chains = dict(known.select("sequence_id", "chain_lengths").iter_rows()) if "chain_lengths" in known.columns else {}
    table = pl.read_parquet(predictions).sort("sequence_id", "candidate")
    parts = table.partition_by("sequence_id", maintain_order=True)
    places = {name: place for place, name in enumerate(letters)}
    found = []
    for rows in sorted(parts, key=lambda rows: places.get(rows["sequence_id"][0], 0)):
        name = rows["sequence_id"][0]
        xyz_ML3 = np.stack([np.array(axes, dtype=np.float64).T for axes in rows.select("x", "y", "z").iter_rows()])
        if len(letters.get(name, "")) != xyz_ML3.shape[1]:
            raise DataError(
                f"{predictions}: {name} has {xyz_ML3.shape[1]} residues, {sequences} "
                f"{len(letters.get(name, ''))}. Next: predict again from the present clean tables."
            )
        bad = ~(np.abs(xyz_ML3) < -SENTINEL)
        if bad.any():
            raise DataError(
                f"{predictions}: {name} has the coordinate {xyz_ML3[bad][0]:.3f} Å; expected a place in a molecule. "
                "Next: predict again."
            )
        xyz_ML3 = np.stack([moved_into_range(xyz_L3) for xyz_L3 in xyz_ML3])
        confidence_M = rows["confidence"].cast(pl.Float64).to_numpy()
        found.append(
            Structure(
                name=name,
                sequence=letters[name],
                xyz_ML3=xyz_ML3,
                confidence_M=confidence_M,
                chain_lengths=chains.get(name),
            )
        )
    return found


def to_pdb(structure: Structure) -> str:
    """A PDB file with a model for each candidate, C1' only; the B factor is 100 times the expected TM-score.

    >>> one = Structure(name="R1", sequence="G", xyz_ML3=np.array([[[1.0, -2.5, 30.0]]]), confidence_M=np.array([0.3]))
    >>> to_pdb(one).splitlines()[3]
    "ATOM      1  C1'   G A   1       1.000  -2.500  30.000  1.00 30.00           C  "
    """
    lines = ["REMARK   1 C1' TRACES ONLY; B FACTOR = 100 X EXPECTED TM-SCORE OF THE MODEL"]
    lines.append(f"REMARK   1 TARGET {structure.name}"[:80])
    for number, (xyz_L3, confidence) in enumerate(zip(structure.xyz_ML3, structure.confidence_M, strict=True), start=1):
        lines.append(f"MODEL     {number:4d}")
        serial = 0
        for chain, own in structure.chains:
            letters = structure.sequence[own]
            for i, (letter, (x, y, z)) in enumerate(zip(letters, xyz_L3[own].tolist(), strict=True), start=1):
                serial += 1
                lines.append(
                    f"ATOM  {serial:5d}  C1'   {letter} {chain}{i:4d}    {x:8.3f}{y:8.3f}{z:8.3f}  1.00"
                    f"{100 * confidence:6.2f}           C  "
                )
            serial += 1
            lines.append(f"TER   {serial:5d}        {letters[-1]} {chain}{len(letters):4d}")
        lines.append("ENDMDL")
    return "\n".join([*lines, "END", ""])


def to_cif(structure: Structure) -> str:
    """An mmCIF file with what `to_pdb` writes; chains of one sequence are one entity."""
    lines = [f"data_{structure.name}", "#", f"_entry.id '{structure.name}'", "#"]  # _x or loop_ would be no value
    sequences = [structure.sequence[own] for _, own in structure.chains]
    entities = {sequence: number for number, sequence in enumerate(dict.fromkeys(sequences), start=1)}
    lines += ["loop_", "_entity.id", "_entity.type", *(f"{number} polymer" for number in entities.values())]
    lines += ["#", "loop_", "_entity_poly.entity_id", "_entity_poly.type"]
    lines += [f"{number} polyribonucleotide" for number in entities.values()]
    lines += ["#", "loop_", "_struct_asym.id", "_struct_asym.entity_id"]
    lines += [f"{chain} {entities[structure.sequence[own]]}" for chain, own in structure.chains]
    lines += ["#", "loop_"]
    lines += ["_entity_poly_seq.entity_id", "_entity_poly_seq.num", "_entity_poly_seq.mon_id"]
    for sequence, entity in entities.items():
        lines += [f"{entity} {i} {letter}" for i, letter in enumerate(sequence, start=1)]
    lines += ["#", "loop_", *(f"_atom_site.{column}" for column in _CIF_COLUMNS)]
    serial = 0
    for number, (xyz_L3, confidence) in enumerate(zip(structure.xyz_ML3, structure.confidence_M, strict=True), start=1):
        for chain, own in structure.chains:
            letters = structure.sequence[own]
            for i, (letter, (x, y, z)) in enumerate(zip(letters, xyz_L3[own].tolist(), strict=True), start=1):
                serial += 1
                lines.append(
                    f'ATOM {serial} C "C1\'" . {letter} {chain} {entities[letters]} {i} ? {x:.3f} {y:.3f} {z:.3f} 1.00 '
                    f"{100 * confidence:.2f} {i} {chain} {number}"
                )
    return "\n".join([*lines, "#", ""])


# --------------------------------------------------------------------------------------------------------------- viewer


def viewer_page(
    structures: Sequence[Structure], known: dict[str, np.ndarray], *, title: str, above: str = "C1' traces"
) -> str:
    """A self-contained page: candidates over the known structure, coloured by error, expected score or position.

    Args:
        structures: of all targets to show.
        known: target -> [R, L, 3] Å of its known conformations, NaN where unresolved.
        title: of the page.
        above: what stands over the title.
    """
    data = {"targets": [_shown(each, known.get(each.name)) for each in structures]}
    text = json.dumps(data, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    element, markup = page.element, page.Markup
    options = [
        element("option", label, value=value, id=anchor)
        for value, label, anchor in (
            ("candidate", "candidate", ""),
            ("error", "error", "error"),
            ("confidence", "expected TM-score", ""),
            ("position", "position in the chain", ""),
        )
    ]
    controls = element(
        "div",
        element("label", "Target ", element("select", id="target")),
        element("label", "Colour by ", element("select", *options, id="colour")),
        element("label", markup('<input type="checkbox" id="reference">'), " known structure"),
        element("label", markup('<input type="checkbox" id="spin">'), " turn"),
        class_="controls",
    )
    scale = element("div", element("span", id="low"), element("i", id="bar"), element("span", id="high"), id="legend")
    view = element(
        "div", element("p", _NOTHING_DRAWN, id="missing"), id="view", tabindex="0", role="img", aria_label=_KEYS
    )
    body = page.join(
        element("div", above, class_="kicker"),
        element("h1", title),
        controls,
        element("div", view, element("div", id="hover"), element("div", id="ruler"), class_="stage"),
        scale,
        element("div", id="candidates"),
        element("p", id="facts", class_="note"),
        page.note("Drag to turn, scroll or pinch to zoom, point at a residue to read its name. A ball is a 5′ end."),
        page.details("Drawn with 3Dmol.js; its licence", element("pre", _LICENCE.read_text(encoding="utf-8"))),
        markup(f'<script type="application/json" id="data">{text}</script>'),
    )
    script = "\n".join(path.read_text(encoding="utf-8") for path in (_LIBRARY, _SCRIPT))
    return page.page(title, body, style=_STYLE, script=script)


_KEYS = "C1' traces; arrow keys turn, + and - zoom"
_NOTHING_DRAWN = (
    "Drawing needs JavaScript and WebGL, and this browser lacks one of them or has it switched off; the .pdb and .cif "
    "files beside this page hold the same structures."
)
_STYLE = """
.controls { display: flex; flex-wrap: wrap; gap: .6rem 1.4rem; align-items: center; margin: 1rem 0; }
.controls select { font: inherit; max-width: 14rem; color: var(--ink); background: var(--card);
  border: 1px solid var(--line); border-radius: 4px; padding: .2rem .4rem; }
.stage { position: relative; background: var(--card); border: 1px solid var(--line); border-radius: 6px; }
#view { position: relative; height: min(68vh, 40rem, 80vw); overflow: hidden; touch-action: none; cursor: grab; }
#missing { padding: 1rem 1.2rem; }
#view:focus-visible { outline: 2px solid var(--accent); }
#hover { position: absolute; top: .6rem; left: .9rem; font-size: .86rem; color: var(--muted); pointer-events: none; }
#ruler { position: absolute; bottom: .9rem; left: .9rem; font-size: .8rem; line-height: 1.3; color: var(--muted);
  border-bottom: 2px solid; white-space: nowrap; pointer-events: none; }
#legend { display: flex; align-items: center; gap: .6rem; font-size: .84rem; color: var(--muted); margin: .7rem 0; }
#legend[hidden] { display: none; }
#low { white-space: nowrap; }
#bar { width: 12rem; height: .7rem; border-radius: 3px; }
#candidates { display: flex; flex-wrap: wrap; gap: .3rem 1.4rem; margin: .8rem 0; font-size: .92rem; }
#candidates i { display: inline-block; width: .8rem; height: .8rem; border-radius: 2px; margin: 0 .35rem; }
"""


def _shown(structure: Structure, references_RL3: np.ndarray | None) -> dict[str, Any]:
    """What the page needs of one target, centred, with the candidates superposed."""
    scores_M: list[float | None] = [None] * len(structure.xyz_ML3)
    xyz_ML3, fixed_L3, is_known = structure.xyz_ML3, structure.xyz_ML3[0], False
    facts = "no known structure: candidates lie on candidate 1"
    if references_RL3 is not None and np.isfinite(references_RL3).all(axis=2).sum(axis=1).max() >= MIN_RESOLVED:
        parts = [own for _, own in structure.chains] if len(structure.sequence) <= _ORDERED else [slice(None)]
        chains = [structure.sequence[own] for own in parts]
        ordered_RML3 = [
            np.stack([permuted(xyz_L3, known_L3, chains) for xyz_L3 in xyz_ML3]) for known_L3 in references_RL3
        ]
        both = zip(ordered_RML3, references_RL3, strict=True)
        scores_MR = np.hstack([tm_matrix(traces_ML3, known_L3[None]) for traces_ML3, known_L3 in both])
        scores_M = [round(score, 4) for score in scores_MR.max(axis=1).tolist()]
        closest, count = int(np.argmax(scores_MR.max(axis=0))), len(references_RL3)
        xyz_ML3, fixed_L3, is_known = ordered_RML3[closest], references_RL3[closest], True
        facts = "candidates lie on the known structure (grey)"
        facts += f", number {closest + 1} of {count}, the closest" if count > 1 else ""
        facts += "; copies of a chain in the order that fits best" if len(set(chains)) < len(chains) else ""
    fixed_L3 = _laid_flat(fixed_L3)
    return {
        "name": structure.name,
        "sequence": structure.sequence,
        "chains": [[name, own.start] for name, own in structure.chains],
        "facts": facts,
        "reference": _listed(fixed_L3) if is_known else None,
        "candidates": [
            {
                "number": m + 1,
                "confidence": round(float(structure.confidence_M[m]), 4),
                "score": scores_M[m],
                "xyz": _listed(_superposed(xyz_L3, fixed_L3)),
            }
            for m, xyz_L3 in enumerate(xyz_ML3)
        ],
    }


def _laid_flat(xyz_L3: np.ndarray) -> np.ndarray:
    """A trace around the origin, longest along x and shortest along z, where the page looks from."""
    known_L3 = xyz_L3[np.isfinite(xyz_L3).all(axis=1)]
    centre_3 = known_L3.mean(axis=0)
    axes_33 = np.linalg.eigh((known_L3 - centre_3).T @ (known_L3 - centre_3)).eigenvectors[:, ::-1]
    axes_33 = axes_33 * [1.0, 1.0, np.linalg.det(axes_33)]  # turned, not mirrored
    return (xyz_L3 - centre_3) @ axes_33


def _listed(xyz_L3: np.ndarray) -> list[list[float] | None]:
    return [None if np.isnan(row).any() else [round(value, 1) for value in row.tolist()] for row in xyz_L3]


def _superposed(mobile_L3: np.ndarray, fixed_L3: np.ndarray) -> np.ndarray:
    """A trace moved onto another so that what fits does: least squares, then weighted by closeness."""
    common_L = np.isfinite(fixed_L3).all(axis=1)
    scale = max(d0_rna(int(common_L.sum())), 2.0)
    weight_L1 = common_L.astype(np.float64)[:, None]
    fixed_L3 = np.where(common_L[:, None], fixed_L3, 0.0)
    for _ in range(_FITS):
        centre = (mobile_L3 * weight_L1).sum(axis=0) / weight_L1.sum()
        target = (fixed_L3 * weight_L1).sum(axis=0) / weight_L1.sum()
        root_L1 = np.sqrt(weight_L1)
        turn = rotation_onto((mobile_L3 - centre) * root_L1, (fixed_L3 - target) * root_L1)
        moved_L3 = (mobile_L3 - centre) @ turn + target
        square_L1 = np.sum((moved_L3 - fixed_L3) ** 2, axis=1, keepdims=True)
        weight_L1 = common_L[:, None] / (1.0 + square_L1 / scale**2) ** 2
    return moved_L3
