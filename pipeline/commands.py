"""The commands of make that a sentence ends with, completed by what this process itself was told.

A stage says "Next: make folds", and whoever copies that means the same competition, folder, split and run. Stages know
some of these and repeat some; here, at the door, the rest is put in: where a verb prints, not where it fails.
"""

import contextlib
import os
import re
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence

#: Parameter of a verb -> variable of make and what the Makefile takes where nothing is said; in a command's order.
VARIABLES = {
    "comp": ("COMP", "ribonanza"),
    "model": ("MODEL", ""),
    "split": ("SPLIT", "sim80_k5"),
    "all_folds": ("ALL", ""),
    "fold": ("FOLD", "0"),
    "tag": ("TAG", ""),
    "set_": ("SET", ""),
    "name": ("NAME", "all"),
    "single_run": ("RUN", ""),
    "slug": ("SLUG", ""),
    "artifacts": ("ARTIFACTS", "artifacts"),
    "py": ("PY", ".venv/bin/python"),  # of no verb: the Makefile leaves word of it
}
_VALUE = r"""(?:<[^>]*>|'[^']*'|"[^"]*"|[^\s'"<])+?"""
_END = r"(?=[.,;:)`]*(?:\s|$))"  # a sentence may go on after it

_given: dict[str, str] = {}  # variable -> value, of the verb that runs now
_takes: dict[str, set[str]] = {}  # target -> variables


@contextlib.contextmanager
def scope() -> Iterator[None]:
    """Within it a verb is remembered; after it, what was before."""
    given, takes = dict(_given), dict(_takes)
    try:
        yield
    finally:
        _given.clear()
        _given.update(given)
        _takes.clear()
        _takes.update(takes)


def remember(given: Mapping[str, object], *, verbs: Mapping[str, Iterable[str]] | None = None) -> None:
    """Keep what the running verb was told, where make would take something else by itself.

    Args:
        given: parameter -> value of the verb; a list becomes one value, True becomes 1.
        verbs: verb -> its parameters; None = as remembered before. Two targets are no verbs: train-bg is train with
            ALL=1 or a fold, train-all has neither.
    """
    given = {**given, "py": os.environ.get("RNA_PY")}
    _given.update(
        (variable, text)
        for name, (variable, preset) in VARIABLES.items()
        if (text := _text(given.get(name))) not in ("", preset)
    )
    if "ALL" in _given:
        _given.pop("FOLD", None)
    if verbs is None:
        return
    _takes.update(
        (verb, {VARIABLES[name][0] for name in ("py", *names) if name in VARIABLES}) for verb, names in verbs.items()
    )
    train, structures = _takes.get("train", set()), _takes.get("structures", set())
    _takes.update({"train": train - {"ALL"}, "train-bg": train, "train-all": train - {"ALL", "FOLD"}})
    _takes["structures"] = structures - {"MODEL", "TAG"}  # a single run predicts RNAs of one's own alone


def _text(value: object) -> str:
    if isinstance(value, Sequence) and not isinstance(value, str):
        return " ".join(map(str, value))
    return "1" if value is True else str(value) if value not in (None, False) else ""


def complete(text: str) -> str:
    """A sentence with the variables put in that its commands of make lack; said twice, it stays the same.

    >>> with scope():
    ...     remember({"comp": "rna3d", "split": "sim80_k3"}, verbs={"folds": ["comp", "split"], "data": ["comp"]})
    ...     complete("no fold table. Next: make data folds COMP=rna3d.")
    'no fold table. Next: make data folds COMP=rna3d SPLIT=sim80_k3.'
    """
    if not _given:
        return text
    target = rf"(?:{'|'.join(map(re.escape, _takes))})(?![\w-])"
    return re.sub(rf"\bmake {target}(?: {target})*(?: [A-Z]+={_VALUE}{_END})*", _completed, text)


def _completed(found: re.Match[str]) -> str:
    command = found.group()
    said = set(re.findall(r" ([A-Z]+)=", command))
    if said & {"FOLD", "ALL"}:  # one fold, or all of them
        said |= {"FOLD", "ALL"}
    elif "ALL" in _given:
        command = re.sub(r"(?<= )train(?= |$)", "train-all", command)
    wanted = set[str]().union(*(_takes.get(word, ()) for word in command.split()[1:])) - said
    lacking = [name for name, _ in VARIABLES.values() if name in wanted and name in _given]
    return command + "".join(f" {name}={_quoted(_given[name])}" for name in lacking)


def _quoted(value: str) -> str:
    """As a shell takes it, in the double quotes that the documentation has, where these are enough."""
    return f'"{value}"' if re.fullmatch(r"[\w ./=,:+-]* [\w ./=,:+-]*", value) else shlex.quote(value)
