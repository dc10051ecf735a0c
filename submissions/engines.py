"""Who computes TM-scores: this project's own code, or the program US-align where it is installed. Lengths in Å.

Letters: L residues, N pairs of traces, 3 xyz.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import numpy as np

from pipeline.errors import ConfigError
from submissions import align, tm_score, usalign

BUILT_IN, US_ALIGN, AUTO = "built-in", "usalign", "auto"
_MOST = 64  # of what is scored between two steps of a progress bar, or fewer if
_WORK = 4e6  # the squared lengths (nt) of its pairs reach this: a pair of 2,000 nt takes seconds
_Item = TypeVar("_Item")

#: Model [L, 3] Å (NaN where missing), native [L, 3] Å (NaN where not resolved), letters of the L residues.
Case = tuple[np.ndarray, np.ndarray, str]


@dataclass(frozen=True, kw_only=True)
class Engine:
    """Both scores of pairs of traces, normalised by the native, and what to call who computed them."""

    matched_by: str
    matched: Callable[[Sequence[Case]], np.ndarray]  #: residues matched by number, as in part 2: [N]
    aligned_by: str
    aligned: Callable[[Sequence[Case]], np.ndarray]  #: by the shapes alone, as in part 1: [N]
    program: Path | None = None


def batches(items: Sequence[_Item], work: Callable[[_Item], float]) -> Iterator[list[_Item]]:
    """Items in their order, in parts that suit a progress bar: long ones come alone.

    Args:
        items: pairs of traces, or targets.
        work: squared lengths of an item's pairs, nt.
    """
    part: list[_Item] = []
    for item in items:
        part.append(item)
        if len(part) == _MOST or sum(map(work, part)) >= _WORK:
            yield part
            part = []
    if part:
        yield part


def choose_engine(name: str, *, where: str) -> Engine:
    """The engine of a name.

    Args:
        name: "built-in", "usalign" for the program, "auto" for the program where it is installed.
        where: stage, for messages.

    Raises:
        ConfigError: no such engine, or the program is not installed.
    """
    if name not in (BUILT_IN, US_ALIGN, AUTO):
        raise ConfigError(f"{where}: ENGINE={name}; expected {BUILT_IN}, {US_ALIGN} or {AUTO}. Next: leave out ENGINE.")
    program = None if name == BUILT_IN else usalign.find_program()
    if program is None and name == US_ALIGN:
        raise ConfigError(f"{where}: USalign is not on the PATH. Next: install it, or leave out ENGINE={US_ALIGN}.")
    return built_in() if program is None else by_program(program)


def built_in() -> Engine:
    """This project's own code."""
    return Engine(
        matched_by=tm_score.ENGINE,
        matched=lambda cases: tm_score.tm_scores([(model, native) for model, native, _ in cases]),
        aligned_by=align.ENGINE,
        aligned=lambda cases: align.tm_aligns([(model, native, names, names) for model, native, names in cases]),
    )


def by_program(program: Path) -> Engine:
    """US-align, one process a pair."""
    score = partial(_by_program, program)
    return Engine(
        matched_by=usalign.ENGINE,
        matched=partial(score, by_residue=True),
        aligned_by=usalign.ENGINE,
        aligned=partial(score, by_residue=False),
        program=program,
    )


def _by_program(program: Path, cases: Sequence[Case], *, by_residue: bool) -> np.ndarray:
    scores = [
        usalign.usalign_score(model, native, (names, names), by_residue=by_residue, program=program)
        for model, native, names in cases
    ]
    return np.array(scores, dtype=np.float64)
