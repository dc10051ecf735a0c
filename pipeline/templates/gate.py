"""The date gate: what a target may use, by when it was released. Its one home."""

import re
from datetime import date

import numpy as np

#: First character of a PDB id -> a date by which its block of ids had been released. The latest of the 844 official
#: training targets are of 2006-09, 2017-02, 2016-07, 2016-04 (blocks 1 to 4), 2018-09, 2021-11 and 2023-05 (5 to 7);
#: blocks 8 and 9 were not used up yet.
_RELEASED_BY = {
    **dict.fromkeys("1234", date(2017, 12, 31)),
    "5": date(2019, 12, 31),
    "6": date(2021, 12, 31),
    "7": date(2023, 12, 31),
}
_PDB_ID = re.compile(r"[1-9][A-Za-z0-9]{3}(_.*)?")


def allowed(target_cutoff: date | None, source_date: date | None) -> bool:
    """Whether a target may use something (a template, a training example).

    A target without a cutoff may use everything. One that has a cutoff may use what was released on that day or
    before, and never what has no date.

    >>> allowed(date(2022, 5, 28), date(2022, 5, 28)), allowed(date(2022, 5, 28), date(2022, 5, 29))
    (True, False)
    >>> allowed(date(2022, 5, 28), None), allowed(None, date(2024, 1, 1)), allowed(None, None)
    (False, True, True)
    """
    return target_cutoff is None or (source_date is not None and source_date <= target_cutoff)


def allowed_mask(target_cutoff: date | None, dates_N: np.ndarray) -> np.ndarray:
    """`allowed` for many sources: [N] bool.

    Args:
        target_cutoff: of the target, or None.
        dates_N: [N] datetime64[D]; NaT = no date.
    """
    if target_cutoff is None:
        return np.ones(len(dates_N), dtype=bool)
    return dates_N <= np.datetime64(target_cutoff, "D")  # NaT compares as False


def entry_of(name: str) -> str:
    """PDB id of a target or chain, in capitals; "" where its name does not begin with one.

    A target that has a cutoff may not use its own entry, whatever its date: part 2 gives as cutoff of a test target the
    very day on which its entry was released.

    >>> entry_of("9g4p"), entry_of("8T3E_EC"), entry_of("R1107")
    ('9G4P', '8T3E', '')
    """
    return name[:4].upper() if _PDB_ID.fullmatch(name) else ""


def released_by(template_id: str) -> date | None:
    """A date by which an entry had certainly been released, from its PDB id alone; None if it says nothing.

    Stands in where a table gives no date; being late, it errs on the safe side.

    >>> released_by("1SCL_A"), released_by("8SA3_A"), released_by("7SK_human")
    (datetime.date(2017, 12, 31), None, None)
    """
    return _RELEASED_BY.get(template_id[0]) if _PDB_ID.fullmatch(template_id) else None
