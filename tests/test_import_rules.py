"""Who may import whom. The table is the rule and its reason; the test only reads it."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
OURS = {"pipeline", "models", "folds", "submissions", "tests"}

#: Modules without torch that folds and submissions may build on.
CORE = {
    "pipeline.bayes",
    "pipeline.competitions",
    "pipeline.compiled",
    "pipeline.errors",
    "pipeline.kaggle_cli",
    "pipeline.kmers",
    "pipeline.labels",
    "pipeline.memory",
    "pipeline.paths",
    "pipeline.ridge",
    "pipeline.runlog",
    "pipeline.runs",
    "pipeline.schema",
    "pipeline.stage",
    "pipeline.structure.assembly",
    "pipeline.structure.geometry",
    "pipeline.tables",
    "pipeline.words",
}

#: The roof: the command line may call every stage.
ROOF = ("pipeline/cli/", "pipeline/demo.py", "pipeline/__main__.py")

#: package -> (our modules it may import, third-party packages it may not import)
MAY = {
    "models": ({"models"}, {"polars", "pyarrow", "numba", "pandas"}),
    "pipeline": ({"pipeline", "models"}, {"pandas"}),
    "folds": ({"folds"} | CORE, {"torch", "pandas"}),
    "submissions": ({"submissions"} | CORE, {"torch", "pandas"}),
}
FILES = sorted(path for package in MAY for path in (ROOT / package).rglob("*.py"))


def imported_modules(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_imports_point_down(path: Path):
    where = str(path.relative_to(ROOT))
    ours, barred = MAY[path.relative_to(ROOT).parts[0]]
    if where.startswith(ROOF):
        ours = OURS - {"tests"}
    for name in imported_modules(path):
        assert name.split(".")[0] not in barred, f"{where} may not import {name}"
        if name.split(".")[0] in OURS:
            allowed = any(name == module or name.startswith(module + ".") for module in ours)
            assert allowed, f"{where} may not import {name}; allowed: {sorted(ours)}"


def test_core_needs_no_torch():
    """A stage without a network starts in a fraction of a second."""
    import subprocess
    import sys

    loads = "; ".join(f"import {name}" for name in sorted(CORE))
    code = f"{loads}; import sys; assert 'torch' not in sys.modules, 'torch was imported'"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
