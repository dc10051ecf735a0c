"""numba's compiler, with threads of its own.

Left to itself numba shares OpenMP with torch and sets the number of torch's threads, and with it the last digits of
every sum; its work queue leaves torch alone.

numba takes compiled code from its cache as long as the function's own file is the same, also when a function of another
file that it calls has changed. So the cache lies in a folder named after the contents of all files that compile.
"""

import hashlib
import os
from pathlib import Path

import numba
from numba import njit, prange

numba.config.THREADING_LAYER = "workqueue"  # type: ignore[attr-defined]


def cache_folder(home: Path) -> Path:
    """Folder of compiled code that fits the present sources of the packages in `home`."""
    digest = hashlib.sha256()
    for path in sorted(
        each for package in ("folds", "pipeline", "submissions") for each in (home / package).rglob("*.py")
    ):
        text = path.read_bytes()
        if b"from pipeline.compiled import" in text:
            digest.update(text)
    return home / "pipeline" / "__pycache__" / f"numba-{digest.hexdigest()[:16]}"


if not numba.config.CACHE_DIR and os.access(Path(__file__).parent, os.W_OK):  # type: ignore[attr-defined]
    numba.config.CACHE_DIR = str(cache_folder(Path(__file__).parents[1]))  # type: ignore[attr-defined]

__all__ = ["njit", "prange"]
