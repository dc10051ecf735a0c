"""Kaggle competitions, one file each, and labelled sets of any origin."""

import difflib
import re
from dataclasses import replace

from pipeline.competitions.base import Competition
from pipeline.errors import ConfigError


def competitions() -> dict[str, Competition]:
    """Every known competition of Kaggle's by name."""
    from pipeline.competitions.openvaccine import OPENVACCINE
    from pipeline.competitions.ribonanza import RIBONANZA
    from pipeline.competitions.rna3d import RNA3D, RNA3D2

    return {comp.name: comp for comp in (RIBONANZA, OPENVACCINE, RNA3D, RNA3D2)}


def get_competition(name: str) -> Competition:
    """A competition by name; ``labelled`` and ``labelled-<name>`` are sets of sequences with classes.

    Such a set may be a competition of Kaggle's: then <name> is its name in Kaggle's addresses.

    Raises:
        ConfigError: unknown name; the message lists the known ones.
    """
    if re.fullmatch(r"labelled(-\w[\w.-]*)?", name):
        from pipeline.competitions.labelled import LABELLED

        slug = re.fullmatch(r"labelled-([a-z\d][a-z\d-]*)", name)
        return replace(LABELLED, name=name, slug=slug[1] if slug else "")
    known = competitions()
    if name not in known:
        near = difflib.get_close_matches(name, [*known, "labelled"], n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        expected = f"{', '.join(known)}, labelled or labelled-<name>"
        raise ConfigError(f"COMP={name!r} is not known; expected one of {expected}.{hint} Next: correct COMP.")
    return known[name]
