"""Compiled code is taken from the cache only while every file that compiles is the same."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline.compiled import cache_folder

ROOT = Path(__file__).resolve().parents[2]
#: Compiles a function of its own, and says what it gives and whether that came from the cache.
PROGRAM = """
from pipeline.compiled import njit

@njit(cache=True)
def twice(x):
    return 2 * x

print(twice(21), sum(twice.stats.cache_hits.values()))
"""


def run(program: Path, cache: Path, *, before: str = "", stream: str = "stdout") -> str:
    if not program.exists():  # older versions of numba compile anew what was written again
        program.write_text(before + PROGRAM)
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "NUMBA_CACHE_DIR": str(cache)}
    done = subprocess.run([sys.executable, str(program)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return str(getattr(done, stream)).strip()


def test_a_damaged_cache_is_compiled_anew_and_heals(tmp_path: Path) -> None:
    """EOFError: Ran out of input, at every start, with nothing that said which file was meant."""
    program, cache = tmp_path / "program.py", tmp_path / "cache"
    found = [run(program, cache)]
    for kind, damage in {"nbi": b"", "nbc": bytes(100)}.items():  # index, code
        (path,) = cache.rglob(f"*.{kind}")
        path.write_bytes(damage)
        found.append(run(program, cache))
    assert [*found, run(program, cache)] == ["42 0", "42 0", "42 0", "42 1"]


def test_who_waits_for_the_compiler_is_told_so_once(tmp_path: Path) -> None:
    """The first TM-score on a machine was a minute of silence."""
    impatient = "from pipeline import compiled\ncompiled._Patience.AFTER = 0.0\n"
    two = impatient + "compiled.njit(cache=True)(lambda x: x + 1)(1)\n"
    told = [run(tmp_path / "p.py", tmp_path / "c", before=two, stream="stderr") for _ in range(2)]
    assert told == ["compiling for this machine, once: up to a minute", ""]


NOWHERE = "from numba.core import caching; caching.CacheImpl._locator_classes = []\n"
FULL = "from numba.core import caching\ndef full(*_): raise OSError(28, 'No space left on device')\n"
FULL += "caching.IndexDataCacheFile._save_data = full\n"


@pytest.mark.parametrize("before", [NOWHERE, FULL], ids=["read-only", "full"])
def test_without_a_place_for_the_cache_functions_are_compiled_in_every_process(tmp_path: Path, before: str) -> None:
    """In a read-only environment without a home: RuntimeError: cannot cache function, no locator available."""
    assert run(tmp_path / "program.py", tmp_path / "cache", before=before) == "42 0"


def test_functions_stay_python_where_numba_is_told_to_compile_none() -> None:
    """NUMBA_DISABLE_JIT=1, for a debugger: AttributeError: 'function' object has no attribute '_cache'."""
    code = "from pipeline.compiled import njit; print(njit(cache=True)(lambda x: [x] * 2)('any'))"
    environment = {**os.environ, "NUMBA_DISABLE_JIT": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout == "['any', 'any']\n"


def test_a_change_in_any_compiled_file_leaves_the_cache_behind(tmp_path: Path) -> None:
    """numba itself looks at the file of the caller alone: it ran the old code of a function in another file."""
    for package in ("folds", "pipeline", "submissions"):
        (tmp_path / package).mkdir()
    caller, callee = tmp_path / "folds" / "caller.py", tmp_path / "submissions" / "callee.py"
    for path in (caller, callee):
        path.write_text("from pipeline.compiled import njit\n")
    before = cache_folder(tmp_path)
    (tmp_path / "folds" / "plain.py").write_text("x = 1\n")
    assert cache_folder(tmp_path) == before
    callee.write_text("from pipeline.compiled import njit  # other code\n")
    assert cache_folder(tmp_path) != before
    before = cache_folder(tmp_path)
    (tmp_path / "pipeline" / "compiled.py").write_text("copy = None\n")  # what it compiles is part of its callers' code
    assert cache_folder(tmp_path) != before
