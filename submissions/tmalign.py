"""The program TM-align built from its source, for `bench-tm` where US-align is not installed.

The package tmtools carries TM-align 20210224, by the authors of US-align, their notice at its head. The main program
takes every chain for a protein; without the two lines that say so, the kind of molecule is read from the residues'
names, as US-align does. No score of this project is computed by it.
"""

import shutil
import subprocess
import sys
import tarfile
import tempfile
from pathlib import Path

from pipeline.errors import ConfigError
from pipeline.paths import REPOSITORY

#: What tables call this peer.
NAME = "TM-align 20210224 for RNA (two lines of its main program deleted)"
#: Options of both metrics, and those for residues that are matched by number.
OPTIONS, MATCHED = ("-mol", "RNA"), ("-byresi", "1")

_HOME = REPOSITORY / ".venv-bench" / "tmalign"  # beside the other peers, ignored by git
_PACKAGE = "tmtools==0.3.0"
_SOURCE = "src/extern/TMalign.cpp"
_PROTEIN = ("mol_vec1[chain_i]=-1;", "mol_vec2[chain_j]=-1;")
_COMPILE = ("g++", "-static", "-O3", "-ffast-math")  # as the head of the source says
_TIMEOUT = 600  # s


def build() -> Path:
    """The program, downloaded and compiled at the first call.

    Raises:
        ConfigError: the source cannot be fetched, is not the one that is known, or cannot be compiled.
    """
    program = _HOME / "TMalign"
    if not program.exists():
        _HOME.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=_HOME) as folder:
            source, built = _HOME / "TMalign.cpp", Path(folder) / "TMalign"
            source.write_text(_for_rna(_downloaded(Path(folder))))
            _do([*_COMPILE, "-o", str(built), str(source)], missing="a C++ compiler that links statically")
            built.rename(program)
    return program


def _downloaded(folder: Path) -> str:
    """The source in the package."""
    pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    _do([*pip, "--no-binary", "tmtools", "--dest", str(folder), _PACKAGE], missing=f"the source package {_PACKAGE}")
    with tarfile.open(next(folder.glob("tmtools-*.tar.gz"))) as archive:
        member = archive.extractfile(next(name for name in archive.getnames() if name.endswith(_SOURCE)))
        assert member is not None
        return member.read().decode("utf-8", errors="replace")


def _for_rna(source: str) -> str:
    """The source without the lines that take chains for proteins."""
    lines = source.splitlines(keepends=True)
    kept = [line for line in lines if line.strip() not in _PROTEIN]
    if len(lines) - len(kept) != len(_PROTEIN):
        raise ConfigError(
            f"bench-tm: {_PACKAGE} has {len(lines) - len(kept)} lines that take chains for proteins; expected "
            f"{len(_PROTEIN)}. Next: put USalign on the PATH."
        )
    return "".join(kept)


def _do(command: list[str], *, missing: str) -> None:
    """Run a command; what is missing if it fails goes into the message."""
    said = "not found"
    if shutil.which(command[0]):
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=_TIMEOUT)
        if done.returncode == 0:
            return
        said = (done.stderr.strip() or done.stdout.strip() or "nothing said").splitlines()[-1]
    raise ConfigError(
        f"bench-tm: there is no peer to compare with, as USalign is not on the PATH and {missing} could not be had to "
        f"build TM-align ({said}). Next: install USalign, or repeat with a network and g++."
    )
