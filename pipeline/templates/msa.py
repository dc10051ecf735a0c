"""Letter profiles of targets from alignments of their relatives.

Alignments carry no date, so the date gate does not ask for one: they hold sequences, never coordinates, the organisers
hand them out with every target, and a run that was never given MSA=… uses none.

Letters: L target length (nt), R relatives.
"""

import re
from pathlib import Path

import numpy as np
import polars as pl

from pipeline.errors import DataError
from pipeline.runlog import warn
from pipeline.schema import ALPHABET, ODD_LETTER_AS, encode
from pipeline.tables import open_parquet

#: Weight of the target's own letter beside the relatives' shares.
_OWN = 0.5


def find_alignments(folder: Path, targets: list[str]) -> dict[str, Path]:
    """Target -> its file ``<target>.MSA.fasta``, as Kaggle ships them; targets without one are left out.

    Args:
        folder: with these files, or a parquet file with the columns ``target_id`` and ``msa`` (list of rows).
        targets: ids to look for in a folder.

    Raises:
        DataError: there is no such folder or file.
    """
    if folder.is_file():
        open_parquet(folder, ("target_id", "msa")).close()
        return {"all": folder}
    if not folder.is_dir():
        raise DataError(f"MSA={folder}: no such folder. Next: give the folder that holds <target>.MSA.fasta.")
    paths = {target: folder / f"{target}.MSA.fasta" for target in targets}
    return {target: path for target, path in paths.items() if path.is_file()}


def read_profiles(files: dict[str, Path], sequences: dict[str, str]) -> dict[str, np.ndarray]:
    """Profiles of the targets that have relatives.

    Args:
        files: as `find_alignments` gives them.
        sequences: target -> its sequence.

    Returns:
        target -> [L, 4] shares of A, C, G, U: half the target's own letter, half its relatives'. Where the first row is
        not the target's sequence, the alignment is of another release: it is left out with a warning.

    Raises:
        DataError: an alignment has rows that do not fit its target.
    """
    if list(files) == ["all"]:
        table = pl.read_parquet(files["all"], columns=["target_id", "msa"])
        rows = {name: (files["all"], list(msa)) for name, msa in table.iter_rows() if msa is not None}
    else:
        rows = {name: (path, _fasta_rows(path)) for name, path in files.items()}
    rows = {name: found for name, found in rows.items() if name in sequences and len(found[1]) > 1}
    odd = re.compile(f"[^{ALPHABET}.-]")  # which clean tables do not keep
    first = {name: odd.sub(ODD_LETTER_AS, _letters(aligned[0])) for name, (_, aligned) in rows.items()}
    other = [name for name, letters in first.items() if letters != sequences[name]]
    if other:
        warn(f"MSA: {len(other)} alignments are of another sequence than their target's and are not used: {other[0]}…")
    return {
        name: _profile(aligned, sequences[name], where=f"{path} ({name})")
        for name, (path, aligned) in rows.items()
        if name not in other
    }


def _letters(row: str) -> str:
    """Aligned columns: lower-case letters are insertions."""
    return "".join(letter for letter in row if not letter.islower()).replace("T", "U")


def _fasta_rows(path: Path) -> list[str]:
    try:
        text = path.read_text(encoding="utf-8", errors="replace")  # of titles in any encoding nothing is used
    except OSError as err:
        raise DataError(f"{path}: not readable as FASTA ({err}). Next: download it again.") from err
    records = re.split("^>", text, flags=re.MULTILINE)[1:]  # titles may hold another: 5'->3'
    return ["".join(record.splitlines()[1:]) for record in records]


def _profile(rows: list[str], sequence: str, *, where: str) -> np.ndarray:
    """Signs other than A, C, G, U count for nothing."""
    count_L4 = np.zeros((len(sequence), 4))
    for number, row in enumerate(dict.fromkeys(rows), start=1):
        kept = _letters(row)
        if len(kept) != len(sequence):
            raise DataError(
                f"{where}: row {number} has {len(kept)} aligned columns; expected {len(sequence)}, the target's "
                "length. Next: use the alignments of the same release."
            )
        for k, letter in enumerate(ALPHABET):
            count_L4[:, k] += np.frombuffer(kept.encode("ascii", "replace"), dtype=np.uint8) == ord(letter)
    own_L4, total_L1 = np.eye(4)[encode(sequence)], count_L4.sum(axis=1, keepdims=True)
    return np.where(total_L1 > 0, _OWN * own_L4 + (1.0 - _OWN) * count_L4 / np.maximum(total_L1, 1.0), own_L4)
