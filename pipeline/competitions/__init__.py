"""Kaggle competitions, one file each."""

import difflib

from pipeline.competitions.base import Competition
from pipeline.errors import ConfigError


def competitions() -> dict[str, Competition]:
    """Every known competition by name."""
    from pipeline.competitions.openvaccine import OPENVACCINE
    from pipeline.competitions.ribonanza import RIBONANZA
    from pipeline.competitions.rna3d import RNA3D, RNA3D2

    return {comp.name: comp for comp in (RIBONANZA, OPENVACCINE, RNA3D, RNA3D2)}


def get_competition(name: str) -> Competition:
    """A competition by name.

    Raises:
        ConfigError: unknown name; the message lists the known ones.
    """
    known = competitions()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"COMP={name!r} is not known; expected one of {', '.join(known)}.{hint} Next: correct COMP.")
    return known[name]
