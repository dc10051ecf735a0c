"""Kaggle competitions, one file each, and sets of any origin: labelled sequences, numbers per nucleotide."""

import re
from dataclasses import replace

from pipeline.competitions.base import Competition
from pipeline.errors import ConfigError, did_you_mean
from pipeline.paths import Paths


def competitions() -> dict[str, Competition]:
    """Every known competition of Kaggle's by name."""
    from pipeline.competitions.openvaccine import OPENVACCINE
    from pipeline.competitions.ribonanza import RIBONANZA
    from pipeline.competitions.rna3d import RNA3D, RNA3D2

    return {comp.name: comp for comp in (RIBONANZA, OPENVACCINE, RNA3D, RNA3D2)}


def competition_of(paths: Paths) -> Competition:
    """The competition of a folder of artefacts, with what its clean tables say of it."""
    competition = get_competition(paths.comp)
    return competition.with_facts(competition.read_facts(paths))


def get_competition(name: str) -> Competition:
    """A competition by name; ``labelled-<name>`` and ``profiles-<name>`` (or without -<name>) are sets of one's own.

    Such a set may be a competition of Kaggle's: then <name> is its name in Kaggle's addresses. What its data say,
    `competition_of` reads from the clean tables.

    Args:
        name: as COMP=… says it.

    Raises:
        ConfigError: unknown name; the message lists the known ones.
    """
    if own := re.fullmatch(r"(labelled|profiles)(-\w[\w.-]*)?", name):
        slug = re.fullmatch(r"\w+-([a-z\d][a-z\d-]*)", name)
        return replace(_own_sets()[own[1]], name=name, slug=slug[1] if slug else "")
    known = competitions()
    if name not in known:
        hint = did_you_mean(name, [*known, "labelled", "profiles"])
        expected = f"{', '.join(known)}, labelled-<name> or profiles-<name>"
        raise ConfigError(f"COMP={name!r} is not known; expected one of {expected}.{hint} Next: correct COMP.")
    return known[name]


def _own_sets() -> dict[str, Competition]:
    from pipeline.competitions.labelled import LABELLED
    from pipeline.competitions.profiles import PROFILES

    return {own.name: own for own in (LABELLED, PROFILES)}
