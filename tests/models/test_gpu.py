"""`make test-gpu` runs every test that needs a GPU, also where torch is installed and little else."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
WITHOUT = """
import sys


class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in ("polars", "RNA", "kaggle", "gemmi", "optuna"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)


sys.meta_path.insert(0, Absent())
"""


def files() -> list[str]:
    """What the target hands to pytest."""
    listed = re.search(r"^GPU := (.*?[^\\])$", (ROOT / "Makefile").read_text(), re.DOTALL | re.MULTILINE)
    assert listed is not None
    return [f"tests/{name}.py" for name in listed[1].replace("\\\n", " ").split()]


def test_make_test_gpu_names_every_file_that_has_a_test_for_a_gpu():
    marked = (path for path in (ROOT / "tests").rglob("test_*.py") if "pytest.mark.gpu" in path.read_text())
    assert sorted(files()) == sorted(str(path.relative_to(ROOT)) for path in marked if path != Path(__file__))


@pytest.mark.slow
def test_its_tests_are_found_without_the_packages_for_tables(tmp_path: Path):
    (tmp_path / "without.py").write_text(WITHOUT)
    command = [sys.executable, "-m", "pytest", "-p", "without", "-p", "no:cacheprovider", "--collect-only", "-q"]
    found = subprocess.run(
        [*command, "-m", "gpu", *files()],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
    )
    assert found.returncode == 0, found.stdout[-2000:]
    assert all(file in found.stdout for file in files())
