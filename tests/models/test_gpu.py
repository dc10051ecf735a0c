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


def test_what_is_not_for_a_gpu_does_not_see_one():
    """On a machine with a GPU `make test` trained there, where sums by atomics differ from run to run."""
    assert os.environ["CUDA_VISIBLE_DEVICES"] == ""


RUN = """
import sys
import without
from pathlib import Path
from models.registry import register_model
from pipeline import predict
from pipeline.paths import Paths
from tests.pipeline import tiny

register_model(tiny.TinyModel)
paths = Paths(comp="tiny", root=Path(sys.argv[1]))
tiny.write_values(paths)
tiny.fit(paths, tiny.config(epochs=1))
predict.run(competition=tiny.TINY, paths=paths, run=tiny.RUN, fold=0)
"""


def without_packages_for_tables(folder: Path, *arguments: str) -> str:
    """What Python prints where they cannot be imported."""
    (folder / "without.py").write_text(WITHOUT)
    where = {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"}
    done = subprocess.run(
        [sys.executable, *arguments], cwd=ROOT, env=os.environ | where, capture_output=True, text=True
    )
    assert done.returncode == 0, (done.stdout + done.stderr)[-2000:]
    return done.stdout


@pytest.mark.slow
def test_its_tests_are_found_without_the_packages_for_tables(tmp_path: Path):
    # nor without pytest-timeout: "ERROR: Unknown config option: timeout"
    options = ["-p", "without", "-p", "no:timeout", "-p", "no:cacheprovider", "--collect-only", "-q", "-m", "gpu"]
    found = without_packages_for_tables(tmp_path, "-m", "pytest", *options, *files())
    assert all(file in found for file in files())


def test_a_run_trains_and_predicts_without_them(tmp_path: Path):
    """They were found, and each run then said: "No module named 'polars'". On the CPU, for want of a GPU."""
    without_packages_for_tables(tmp_path, "-c", RUN, str(tmp_path / "artifacts"))
    assert list(tmp_path.rglob("oof.parquet"))
