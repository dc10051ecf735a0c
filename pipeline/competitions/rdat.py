"""RDAT, the text format of the RNA Mapping Database (RMDB) for chemical mapping profiles, revisions 0.2 to 0.34.

A construct (``NAME, SEQUENCE, OFFSET, SEQPOS, ANNOTATION``) has numbered profiles (``ANNOTATION_DATA, REACTIVITY,
REACTIVITY_ERROR``; ``AREA_PEAK`` in early revisions). Position ``p`` of SEQPOS is letter ``p - OFFSET`` of the
sequence, from 1. A profile's own ``sequence:`` stands instead of the construct's, ``mutation:A01U`` changes a letter.

Source: RMDB, "RDAT format specification" (rmdb.stanford.edu/deposit/specs); Cordero et al. 2012, Biochemistry 51:7037.
"""

import re
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any

from pipeline.errors import DataError

_LINE = re.compile(r"([A-Z_]+)(?::?\s*(\d+)(?=\s|$))?[:\s]*(.*)")
_NUMBERED = ("ANNOTATION_DATA", "REACTIVITY", "REACTIVITY_ERROR", "AREA_PEAK", "AREA_PEAK_ERROR")
_READ = ("VERSION", "RDAT_VERSION", "NAME", "SEQUENCE", "OFFSET", "SEQPOS", "ANNOTATION", *_NUMBERED)
_MUTATION = re.compile(r"([ACGUT])(-?\d+)([ACGUT])")
_UNTREATED = ("nomod", "none", "no modification", "")  # a modifier that is none: background


@dataclass(kw_only=True)
class _Construct:
    sequence: str = ""
    offset: int = 0
    positions: list[int] = field(default_factory=list)
    told: list[tuple[str, str]] = field(default_factory=list)
    profiles: dict[int, dict[str, Any]] = field(default_factory=lambda: defaultdict(dict))


def read_rdat(lines: Iterable[str], *, where: str, stem: str) -> Iterator[dict[str, Any]]:
    """Profiles of a file, those of untreated molecules left out.

    Args:
        lines: of the file.
        where: its name, for messages.
        stem: the beginning of every id.

    Returns:
        Rows with ``id, sequence, dataset_name`` (the modifier), ``signal_to_noise`` (None = not said), ``reactivity``
        and ``reactivity_error``, lists as long as the sequence (None = not measured).

    Raises:
        DataError: another revision, or a line that is not what the format says.
    """
    constructs: list[_Construct] = []
    for number, line in enumerate(lines, start=1):
        found = _LINE.fullmatch(line.strip())
        if not found or found[1] not in _READ:
            continue
        place = f"{where}: line {number}"
        key, index, rest = found[1], found[2], found[3].strip()
        if key in ("VERSION", "RDAT_VERSION"):
            _check_revision(line.split()[-1].rpartition(":")[2], place)
        elif key == "NAME":
            constructs.append(_Construct())
        elif not constructs or (key in _NUMBERED and not index):
            raise DataError(f"{place}: {line[:40]!r}; expected NAME before it, and a number after {key}. {_NEXT}")
        else:
            text = rest if key in _NUMBERED else line.strip()[len(key) :].strip(": \t")
            _enter(constructs[-1], key, int(index or 0), text, place)
    for count, construct in enumerate(constructs, start=1):
        first = f"{stem}-" if len(constructs) == 1 else f"{stem}-{count}-"
        for index, profile in construct.profiles.items():
            row = _row(construct, profile, where=f"{where}: profile {index}")
            if row:
                yield {"id": f"{first}{index}"} | row


_NEXT = "Next: check that this is an RDAT file of revision 0.2 to 0.34."


def _check_revision(revision: str, place: str) -> None:
    if not re.fullmatch(r"0\.[23]\d*", revision):
        raise DataError(f"{place}: revision {revision}; expected 0.2 to 0.34. Next: write the profiles as CSV.")


def _enter(construct: _Construct, key: str, index: int, rest: str, place: str) -> None:
    """Take in one line of a construct."""
    try:
        if key == "SEQUENCE":
            (construct.sequence,) = re.sub(r"^\d+\s", "", rest).split()
        elif key == "OFFSET":
            construct.offset = int(rest)
        elif key == "SEQPOS":
            construct.positions = [int(re.sub("^[A-Za-z]", "", word)) for word in re.split(r"[\s,]+", rest)]
        elif key == "ANNOTATION":
            construct.told += _pairs(rest)
        elif key == "ANNOTATION_DATA":
            construct.profiles[index]["told"] = _pairs(rest)
        elif key in _NUMBERED:
            numbers = [float(word) for word in re.split(r"[\s,]+", rest)]
            construct.profiles[index]["error" if key.endswith("ERROR") else "values"] = numbers
    except ValueError as err:
        raise DataError(f"{place}: {key} holds {rest[:40]!r} ({err}). {_NEXT}") from err


def _pairs(text: str) -> list[tuple[str, str]]:
    """``key:value`` pairs between tabs or, where there are none, spaces.

    >>> _pairs("modifier:1M7	chemical:MgCl2:10mM")
    [('modifier', '1M7'), ('chemical', 'MgCl2:10mM')]
    """
    words = (word.strip().partition(":") for word in (text.split("\t") if "\t" in text else text.split()))
    return [(key, value.strip()) for key, colon, value in words if colon]


def _row(construct: _Construct, profile: dict[str, Any], *, where: str) -> dict[str, Any] | None:
    """A profile's row; None where nothing was measured, or nothing reacted."""
    own = profile.get("told", [])
    told = dict(construct.told) | dict(own)
    modifier = told.get("modifier", "not said")
    if "values" not in profile or modifier.lower() in _UNTREATED:
        return None
    sequence = dict(own).get("sequence") or _mutate(construct, own, where=where)
    signal = told.get("signal_to_noise", "").rpartition(":")[2]
    try:
        row: dict[str, Any] = {"signal_to_noise": float(signal) if signal else None}
    except ValueError as err:
        raise DataError(f"{where}: signal_to_noise:{signal}; expected a number. {_NEXT}") from err
    row |= {"sequence": sequence, "dataset_name": modifier}
    for name, numbers in (("reactivity", profile["values"]), ("reactivity_error", profile.get("error"))):
        row[name] = None if numbers is None else _place(construct, numbers, len(sequence), where=where)
    return row


def _mutate(construct: _Construct, told: list[tuple[str, str]], *, where: str) -> str:
    """The construct's sequence with a profile's mutations."""
    letters = list(construct.sequence.upper().replace("T", "U"))
    for change in (each for key, value in told if key == "mutation" for each in re.split(r"[,;\s]+", value)):
        found = _MUTATION.fullmatch(change)
        at = int(found[2]) - construct.offset - 1 if found else -1
        if found and 0 <= at < len(letters) and letters[at] == found[1].replace("T", "U"):
            letters[at] = found[3].replace("T", "U")
        elif change.upper() not in ("", "WT"):
            raise DataError(f"{where}: mutation {change} does not fit its construct. Next: add the sequence: of each.")
    return "".join(letters)


def _place(construct: _Construct, numbers: list[float], length: int, *, where: str) -> list[float | None]:
    """Values at their letters; SEQPOS may go on beyond a sequence that is shorter than others of its construct.

    Without SEQPOS there is a value for each letter.
    """
    positions = construct.positions or range(construct.offset + 1, construct.offset + length + 1)
    if len(numbers) != len(positions):
        of = "SEQPOS has" if construct.positions else "there is no SEQPOS, and the sequence has"
        raise DataError(f"{where}: {len(numbers)} values; {of} {len(positions)} positions. {_NEXT}")
    placed: list[float | None] = [None] * length
    for position, value in zip(positions, numbers, strict=True):
        if 0 < position - construct.offset <= length:
            placed[position - construct.offset - 1] = value
    if max(positions) <= construct.offset or min(positions) > construct.offset + length:
        raise DataError(
            f"{where}: SEQPOS {min(positions)} to {max(positions)} with OFFSET {construct.offset}; expected "
            f"{construct.offset + 1} to {construct.offset + length}, the letters of its sequence. Next: correct OFFSET."
        )
    return placed
