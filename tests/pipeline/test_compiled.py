"""Compiled code is taken from the cache only while every file that compiles is the same."""

from pathlib import Path

from pipeline.compiled import cache_folder


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
