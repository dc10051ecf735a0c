"""What the README says is there: files of its tour, targets of its commands, one line for every module."""

import itertools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
MODULES = [
    path.relative_to(ROOT)
    for package in ("pipeline", "models", "folds", "submissions")
    for path in sorted((ROOT / package).rglob("*.py"))
    if path.name not in ("__init__.py", "__main__.py")
]


def test_the_readme_is_short_enough_to_be_read():
    assert len(README.splitlines()) < 250


def test_every_file_the_readme_names_exists():
    named = set(re.findall(r"`((?:pipeline|models|folds|submissions|tests)/[\w./-]+?)`", README))
    missing = [name for name in named if not (ROOT / name).exists()]
    assert not missing
    assert named


def test_the_file_tour_names_every_module():
    tour = README.split("## File tour")[1].split("\n## ")[0]
    absent = [str(path) for path in MODULES if not re.search(rf"\b{re.escape(path.name)}\b", tour)]
    assert not absent


@pytest.mark.parametrize(
    "name",
    [
        "README.md",
        *(f"{folder}/README.md" for folder in ("pipeline", "models", "tests/benchmarks")),
        "pipeline/OWN_DATA.md",
        "pipeline/KAGGLE.md",
    ],
)
def test_every_make_target_in_a_readme_exists(name):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = (ROOT / name).read_text()
    blocks = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL) + re.findall(r"`(make [^`]*)`", text)
    commands = [line.split()[1:] for block in blocks for line in block.splitlines() if line.startswith("make ")]
    used = {word for words in commands for word in itertools.takewhile(re.compile("[a-z][a-z-]*$").match, words)}
    assert used
    assert used <= targets
