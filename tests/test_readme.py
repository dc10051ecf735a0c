"""What the README says is there: files of its tour, targets of its commands, one line for every module."""

import itertools
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PAGES = [
    "README.md",
    *(f"{folder}/README.md" for folder in ("pipeline", "models", "tests/benchmarks")),
    "pipeline/OWN_DATA.md",
    "pipeline/KAGGLE.md",
]
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


@pytest.mark.parametrize("name", PAGES)
def test_every_link_leads_somewhere_and_every_table_has_even_rows(name):
    text = re.sub(r"```.*?```", "", (ROOT / name).read_text(), flags=re.DOTALL)
    for target, _, anchor in (link.partition("#") for link in re.findall(r"\]\((?!http)([^)]*)\)", text)):
        page = (ROOT / name).parent / target if target else ROOT / name
        titles = re.findall(r"^#+ (.*)", page.read_text(), re.MULTILINE)
        assert anchor in {"", *(re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in titles)}
    for table in re.findall(r"(?:^\|.*\|\n)+", text, re.MULTILINE):
        assert len({len(re.findall(r"(?<!\\)\|", row)) for row in table.splitlines()}) == 1, table


@pytest.mark.parametrize("name", PAGES)
def test_every_make_target_in_a_readme_exists(name):
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    text = (ROOT / name).read_text()
    blocks = re.findall(r"```\w*\n(.*?)```", text, re.DOTALL) + re.findall(r"`(make [^`]*)`", text)
    commands = [line.split()[1:] for block in blocks for line in block.splitlines() if line.startswith("make ")]
    used = {word for words in commands for word in itertools.takewhile(re.compile("[a-z][a-z-]*$").match, words)}
    assert used
    assert used <= targets
