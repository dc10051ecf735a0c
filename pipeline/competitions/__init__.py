"""Kaggle competitions, one file each."""

import difflib

from pipeline.competitions.base import Competition
from pipeline.errors import ConfigError


def competitions() -> dict[str, Competition]:
    """Every known competition by name."""
    from pipeline.competitions.ribonanza import RIBONANZA
    from pipeline.competitions.rna3d import RNA3D

    return {comp.name: comp for comp in (RIBONANZA, RNA3D)}


def get_competition(name: str) -> Competition:
    """A competition by name.

    Raises:
        ConfigError: unknown name; the message lists the known ones.
    """
    known = competitions()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        raise ConfigError(
            f"COMP={name!r} is not known; expected one of {', '.join(known)}. Next: COMP={(near or list(known))[0]}."
        )
    return known[name]
