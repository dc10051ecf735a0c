"""Every failure that a user can act on says what to do next."""

import ast
import importlib
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from pipeline import errors
from pipeline.kaggle_cli import _MEANINGS
from pipeline.viennarna import available

ROOT = Path(__file__).resolve().parents[1]
KINDS = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)}
MODULES = sorted(path for package in ("pipeline", "folds", "submissions") for path in (ROOT / package).rglob("*.py"))

#: Module and function whose message comes from elsewhere -> where its "Next:" is.
ELSEWHERE = {
    "pipeline/bpp.py:_program_version": "the reason that available() gives",
    "pipeline/bpp.py:_build": "the reason that available() gives",
    "pipeline/notebook.py:_pair_probabilities": "the reason that available() gives",
    "pipeline/kaggle_cli.py:explain": "every entry of _MEANINGS",
}

#: What a sentence may tell to do: a verb, a command, an option, a variable or a setting with its value, what goes on by
#: itself, or what another sentence says.
DOING = re.compile(
    r"(accept|add|begin|build|check|choose|close|compare|copy|correct|cure|do|download|fill|find|fix|free|give|install|join|"
    r"keep|leave|log|look|lower|make|move|name|normalise|number|paste|pip|predict|put|read|remove|rename|repair|replay|restore|rna|"
    r"run|save|say|see|set|stop|take|train|try|unpack|use|wait|write)\b"
    r"|the same (command|make)\b|--[a-z]|[A-Z]+=(?![\s.…])|[\w.]+ = |\{\}|…",
    re.IGNORECASE,
)


def kinds_of(tree: ast.Module) -> set[str]:
    """Names of the failures of `pipeline.errors`, and of those that a module derives from them."""
    derived = {
        node.name
        for node in tree.body
        if isinstance(node, ast.ClassDef)
        and any(isinstance(base, ast.Name) and base.id in KINDS for base in node.bases)
    }
    return KINDS | derived


def texts(node: ast.AST, variables: dict[str, list[ast.expr]]) -> Iterator[str]:
    """All string constants of an expression, and of what is assigned to its variables anywhere in the module."""
    for part in ast.walk(node):
        if isinstance(part, ast.Constant) and isinstance(part.value, str):
            yield part.value
        elif isinstance(part, ast.Name):
            for value in variables.get(part.id, ()):
                yield from texts(value, {})


def imported(module: str, name: str) -> object:
    """A constant of another module of the packages, whose text a message may end with."""
    return getattr(importlib.import_module(module), name, None) if module.startswith("pipeline.") else None


def silent(source: str) -> Iterator[tuple[str, int]]:
    """Function and line of every failure whose message has no "Next:" in it."""
    tree = ast.parse(source)
    variables: dict[str, list[ast.expr]] = {}
    for node in ast.walk(tree):
        for target in node.targets if isinstance(node, ast.Assign) else ():
            if isinstance(target, ast.Name):
                variables.setdefault(target.id, []).append(node.value)
        for alias in node.names if isinstance(node, ast.ImportFrom) and node.module else ():
            if alias.name.isupper() and isinstance(text := imported(str(node.module), alias.name), str):
                variables.setdefault(alias.name, []).append(ast.Constant(text))
    kinds = kinds_of(tree)

    def visit(node: ast.AST, function: str) -> Iterator[tuple[str, int]]:
        for child in ast.iter_child_nodes(node):
            name = child.name if isinstance(child, ast.FunctionDef) else function
            is_failure = isinstance(child, ast.Call) and isinstance(child.func, ast.Name) and child.func.id in kinds
            if is_failure and not any("Next:" in text or "Next, if" in text for text in texts(child, variables)):
                yield name, child.lineno
            yield from visit(child, name)

    return visit(tree, "")


def test_every_failure_says_what_to_do_next():
    found = {
        f"{path.relative_to(ROOT)}:{function}": line for path in MODULES for function, line in silent(path.read_text())
    }
    assert found.keys() == ELSEWHERE.keys(), {place: line for place, line in found.items() if place not in ELSEWHERE}


def sentences(source: str) -> Iterator[str]:
    """All texts of a module, with {} for what is put into them."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "{}" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def unknown(source: str) -> set[str]:
    """Targets and variables of make that a module tells to use next, and that the Makefile does not have."""
    makefile = (ROOT / "Makefile").read_text()
    targets = {*re.findall(r"^([a-z-]+):", makefile, re.MULTILINE), "one"}  # "make one at {page}"
    told = " ".join(text.partition("Next: ")[2] for text in sentences(source))
    named = set(re.findall(r"\bmake ([a-z][a-z-]*)", told)) - targets
    variables = set(re.findall(r"\b([A-Z][A-Z_]+)=", told)) - set(re.findall(r"\b[A-Z][A-Z_]+\b", makefile))
    return named | {name for name in variables if not name.startswith(("RNA_", "CUDA_"))}  # of the environment


def test_what_to_do_next_can_be_done():
    """METHOD=auto was told, which neither make nor a verb takes."""
    found = {str(path.relative_to(ROOT)): unknown(path.read_text()) for path in MODULES}
    assert {path: names for path, names in found.items() if names} == {}
    assert unknown("f'{x}: no. Next: make nothing METHOD={y} COMP=rna3d.'") == {"nothing", "METHOD"}


def vague(source: str) -> list[str]:
    """What a module tells to do next that is neither a verb nor to be copied: a noun, a variable without a value."""
    told = [advice for text in sentences(source) for advice in text.split("Next: ")[1:]]
    return [advice for advice in told if advice and not DOING.match(advice)]


def test_what_to_do_next_is_a_verb_or_can_be_copied():
    """It said "Next: COMP=….", "Next: auto.", "Next: another one."."""
    found = {str(path.relative_to(ROOT)): vague(path.read_text()) for path in MODULES}
    assert {path: advice for path, advice in found.items() if advice} == {}
    assert vague("'Next: COMP=….', 'Next: auto.', f'no. Next: COMP={x}.', 'Next: make data.', 'Next: RUNS= of'") == [
        "COMP=….",
        "auto.",
        "RUNS= of",
    ]


def test_one_thing_has_one_name():
    """Replay said "ordered out", training "skipped", the report "left out" of the same batch."""
    others = re.compile(r"ordered out|batch(es)? (is |are )?skipped")
    found = [f"{path.name}: {text}" for path in MODULES for text in sentences(path.read_text()) if others.search(text)]
    assert found == []


def test_what_is_said_elsewhere_says_it_too(monkeypatch):
    assert all("Next: " in meaning for _, meaning in _MEANINGS)
    monkeypatch.setattr("pipeline.viennarna.installed_version", lambda: (_ for _ in ()).throw(ImportError("no RNA")))
    usable, reason = available()
    assert not usable
    assert "Next: " in reason


@pytest.mark.parametrize(
    ("source", "count"),
    [
        ("def f():\n    raise ConfigError('no')", 1),
        ("def f(x):\n    raise DataError(f'{x}: no. ' 'Next: yes.')", 0),
        ("A = 'Next: yes'\ndef f(x):\n    raise DataError(f'{x}: no. {A}')", 0),
        ("def f(x):\n    how = 'Next: yes'\n    raise DataError(f'{x}: no. {how}')", 0),
        ("class Mine(StoppedError):\n    pass\ndef f():\n    return Mine('no')", 1),
        ("def f():\n    raise ValueError('no')", 0),
    ],
)
def test_the_check_sees_what_it_is_for(source, count):
    assert len(list(silent(source))) == count
