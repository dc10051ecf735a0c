"""The versions that pyproject.toml promises are those of the environments in which the tests ran."""

import tomllib
from pathlib import Path

import pytest
from packaging.requirements import Requirement
from packaging.version import Version

from pipeline.kernel.wheels import IMAGE

ROOT = Path(__file__).resolve().parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
EXTRAS = PROJECT["optional-dependencies"]
READ = [
    *PROJECT["dependencies"],
    *(text for name in ("bpp", "kaggle", "sweep", "templates", "dev") for text in EXTRAS[name]),
]
PROMISED = {one.name: one.specifier for one in map(Requirement, READ)}
TOOLS = {"ruff", "mypy"}  # they judge the code and run none of it


def _pins(name: str) -> dict[str, str]:
    lines = (ROOT / ".ci" / name).read_text().splitlines()
    return dict(line.split("==") for line in lines if line and not line.startswith("#"))


FLOORS = _pins("floor-constraints.txt")


def test_the_oldest_versions_promised_are_the_oldest_tested():
    floors = {name: each.version for name, of in PROMISED.items() for each in of if each.operator == ">="}
    for tool in TOOLS:
        floors.pop(tool)
    assert {name: Version(FLOORS[name]) for name in floors} == {name: Version(text) for name, text in floors.items()}


@pytest.mark.parametrize("pins", [FLOORS, _pins("constraints.txt"), IMAGE], ids=["floors", "newest", "kaggle"])
def test_environments_that_are_tested_keep_the_promise(pins: dict[str, str]):
    assert {name for name, of in PROMISED.items() if name in pins and not of.contains(pins[name])} == set()
    assert pins.keys() & PROMISED.keys() >= {"torch", "numpy", "polars"}
