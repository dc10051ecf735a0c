"""The program US-align, when it is installed: the scores that the competitions' own metrics call for. Lengths in Å.

Letters: L residues, 3 xyz.
"""

import re
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from pipeline.errors import ConfigError, DataError
from pipeline.schema import MIN_RESOLVED
from submissions.layout import LOWEST_SUBMITTED, MAX_SUBMITTED
from submissions.tm_score import resolved

#: What `score-tm` and reports call this engine.
ENGINE = "US-align"
#: Options for residues that are matched by number, part 2's metric; part 1's needs none.
MATCHED = ("-TMscore", "1")

_LAST_NUMBER = 9999  # four columns
_TIMEOUT = 600  # s for one pair
_LINE = "ATOM  {0:5d}  C1' {1:>3s} A{0:4d}    {2:8.3f}{3:8.3f}{4:8.3f}  1.00  0.00           C\n"


def find_program() -> Path | None:
    """The program ``USalign`` on the PATH, or None."""
    found = shutil.which("USalign")
    return None if found is None else Path(found)


def usalign_score(
    model_L3: np.ndarray, native_L3: np.ndarray, names: tuple[str, str], *, by_residue: bool, program: Path
) -> float:
    """One score by the program, normalised by the native.

    Args:
        model_L3: [L, 3] Å; NaN where missing.
        native_L3: [L, 3] Å; NaN where not resolved. Rows of the two have the same numbers.
        names: letters of the model and of the native, one a row.
        by_residue: part 2's metric (``-TMscore 1``: residues matched by number), else part 1's (default alignment).
        program: of `find_program`.

    Returns:
        Score in [0, 1] with the program's five digits; 0 if one side has fewer than three residues.

    Raises:
        DataError: a trace does not fit into a PDB file.
        ConfigError: the program fails or says something else than scores.
    """
    if min(resolved(model_L3).sum(), resolved(native_L3).sum()) < MIN_RESOLVED:
        return 0.0
    with tempfile.TemporaryDirectory() as folder:
        paths = Path(folder) / "model.pdb", Path(folder) / "native.pdb"
        write_pdb(paths[0], model_L3, names[0])
        write_pdb(paths[1], native_L3, names[1])
        return run_program(program, *paths, options=MATCHED if by_residue else ())


def run_program(program: Path, model: Path, native: Path, *, options: Sequence[str] = ()) -> float:
    """The score that the program prints for two PDB files, normalised by the second.

    Args:
        program: US-align, or one that takes and says the same.
        model: PDB file.
        native: PDB file.
        options: beside that which picks C1' atoms.

    Raises:
        ConfigError: the program fails or says something else than scores.
    """
    command = [str(program), str(model), str(native), "-atom", " C1'", *options]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_TIMEOUT)
    except (OSError, subprocess.TimeoutExpired) as err:
        raise ConfigError(f"{program}: did not run to its end ({err}). Next: use the built-in engine.") from err
    scores = re.findall(r"^TM-score= *([0-9.]+)", done.stdout, flags=re.MULTILINE)
    if done.returncode or len(scores) < 2:
        said = (done.stderr.strip() or done.stdout.strip() or "nothing").splitlines()[-1]
        raise ConfigError(
            f"{program}: ended with code {done.returncode} and said {said!r}; expected two scores. Next: use the "
            "built-in engine."
        )
    return float(scores[1])


def write_pdb(path: Path, xyz_L3: np.ndarray, names: str) -> None:
    """Write the residues that are there as C1' atoms, numbered from 1 by row, moved to the origin.

    Raises:
        DataError: a residue's number or place does not fit into the format's columns.
    """
    there_L = resolved(xyz_L3)
    centred_L3 = xyz_L3 - xyz_L3[there_L].mean(axis=0)
    kept = np.flatnonzero(there_L)
    low, high = float(centred_L3[kept].min()), float(centred_L3[kept].max())
    if kept[-1] + 1 > _LAST_NUMBER or low < LOWEST_SUBMITTED or high > MAX_SUBMITTED:
        raise DataError(
            f"{path.name}: {kept[-1] + 1} residues from {low:.0f} to {high:.0f} Å about the centre do not fit into a "
            f"PDB file (at most {_LAST_NUMBER}, {LOWEST_SUBMITTED:.0f} to {MAX_SUBMITTED:.0f} Å). Next: use the "
            "built-in engine."
        )
    lines = [_LINE.format(place + 1, names[place], *centred_L3[place]) for place in kept]
    path.write_text("".join([*lines, "TER\n"]))
