"""Alignment of a target with a template, by letters and by secondary structure, with affine gaps.

Letters: L target length, M template length (nt), N templates, T residues of all of them, 4 letters of the alphabet,
3 states of a residue.
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

from pipeline.compiled import njit, prange

#: States of a residue in a secondary structure: unpaired, paired with a later residue, paired with an earlier one.
UNPAIRED, OPENING, CLOSING = 0, 1, 2

Mode = Literal["global", "local"]

_NOWHERE = np.float32(-1e30)
_START = 3  # of a local alignment


@dataclass(frozen=True, kw_only=True)
class Costs:
    """What an alignment is worth; dimensionless."""

    match: float = 1.0
    transition: float = -0.4  # A for G, C for U
    transversion: float = -0.8
    state: float = 0.6  # the same state of pairing, times its probability; the negative for another one
    gap_open: float = 6.0
    gap_extend: float = 0.5
    end_extend: float = 0.1  # of gaps at the ends, which cost no opening


def letter_scores(profile_L4: np.ndarray, costs: Costs) -> np.ndarray:
    """Expected score of every template letter at every target position.

    Args:
        profile_L4: [L, 4] shares of A, C, G, U at each position; one-hot without relatives.
        costs: of letters.

    Returns:
        [L, 4] float32.
    """
    table_44 = np.full((4, 4), costs.transversion)
    for a, b in ((0, 2), (1, 3)):
        table_44[a, b] = table_44[b, a] = costs.transition
    np.fill_diagonal(table_44, costs.match)
    return (profile_L4 @ table_44).astype(np.float32)


def state_scores(states_L3: np.ndarray, costs: Costs) -> np.ndarray:
    """Expected score of every template state at every target position: [L, 3] float32.

    Args:
        states_L3: [L, 3] probabilities of `UNPAIRED`, `OPENING`, `CLOSING`.
        costs: of states.
    """
    return (costs.state * (2.0 * states_L3 - 1.0)).astype(np.float32)


def align_all(
    letters_L4: np.ndarray,
    states_L3: np.ndarray,
    tokens_T: np.ndarray,
    state_T: np.ndarray,
    offsets: np.ndarray,
    *,
    mode: Mode,
    costs: Costs,
) -> tuple[np.ndarray, np.ndarray]:
    """The best alignment of a target with every one of some templates.

    Args:
        letters_L4: `letter_scores` of the target.
        states_L3: `state_scores` of the target.
        tokens_T: [T] letters of all templates one after the other, index into the alphabet.
        state_T: [T] states of the same residues.
        offsets: [N + 1] int64, where each template starts.
        mode: ``global`` spends all residues of both, ``local`` the part that scores best.
        costs: of gaps.

    Returns:
        [N] float32 scores, and [N, L] int32: the template's residue at every target residue, -1 = none.

    Source:
        Gotoh 1982, J. Mol. Biol. 162:705; Smith and Waterman 1981, J. Mol. Biol. 147:195.
    """
    gaps = np.array([costs.gap_open, costs.gap_extend, costs.end_extend], dtype=np.float32)
    return _align_all(letters_L4, states_L3, tokens_T, state_T, offsets, mode == "local", gaps)


@njit(cache=True, parallel=True)
def _align_all(
    letters_L4: np.ndarray,
    states_L3: np.ndarray,
    tokens_T: np.ndarray,
    state_T: np.ndarray,
    offsets: np.ndarray,
    local: bool,
    gaps: np.ndarray,
) -> tuple[np.ndarray, np.ndarray]:
    count = len(offsets) - 1
    score_N = np.empty(count, dtype=np.float32)
    partner_NL = np.empty((count, len(letters_L4)), dtype=np.int32)
    for n in prange(count):
        tokens_M, state_M = tokens_T[offsets[n] : offsets[n + 1]], state_T[offsets[n] : offsets[n + 1]]
        score_N[n] = _gotoh(letters_L4, states_L3, tokens_M, state_M, local, gaps, partner_NL[n])
    return score_N, partner_NL


@njit(cache=True)
def _gotoh(
    letters_L4: np.ndarray,
    states_L3: np.ndarray,
    tokens_M: np.ndarray,
    state_M: np.ndarray,
    local: bool,
    gaps: np.ndarray,
    partner_L: np.ndarray,
) -> float:
    """Fill `partner_L` and return the score.

    Matrix 0: residues face each other; 1: the target's faces a gap; 2: the template's does. `back` holds two bits of
    each: the matrix that its value came from, or `_START`.
    """
    rows, columns = len(letters_L4), len(tokens_M)
    opening, extend, end = gaps
    above = np.full((3, columns + 1), _NOWHERE, dtype=np.float32)
    row = np.empty_like(above)
    back = np.zeros((rows + 1, columns + 1), dtype=np.uint8)
    above[0, 0] = 0.0
    for j in range(1, columns + 1):
        above[2, j] = 0.0 if local else -end * j
        back[0, j] = 2 << 4
    top, i, j, matrix = 0.0, 0, 0, 0
    for r in range(1, rows + 1):
        row[:] = _NOWHERE
        row[1, 0] = 0.0 if local else -end * r
        back[r, 0] = 1 << 2
        last_row = r == rows and not local
        for c in range(1, columns + 1):
            last_column = c == columns and not local
            value, came = _best(above[0, c - 1], above[1, c - 1], above[2, c - 1])
            if local and value <= 0.0:
                value, came = 0.0, _START
            row[0, c] = value + letters_L4[r - 1, tokens_M[c - 1]] + states_L3[r - 1, state_M[c - 1]]
            open_, go_on = (end, end) if last_column else (opening + extend, extend)
            row[1, c], came_1 = _best(above[0, c] - open_, above[1, c] - go_on, above[2, c] - open_)
            open_, go_on = (end, end) if last_row else (opening + extend, extend)
            row[2, c], came_2 = _best(row[0, c - 1] - open_, row[1, c - 1] - open_, row[2, c - 1] - go_on)
            back[r, c] = came | came_1 << 2 | came_2 << 4
            if local and row[0, c] > top:
                top, i, j = row[0, c], r, c
        above, row = row, above
    if not local:
        i, j = rows, columns
        top, matrix = _best(above[0, columns], above[1, columns], above[2, columns])
    partner_L[:] = -1
    while (i > 0 or j > 0) and matrix != _START:
        came = back[i, j] >> (2 * matrix) & 3
        if matrix == 0:
            if i == 0 or j == 0:  # nothing aligned at all
                break
            i, j = i - 1, j - 1
            partner_L[i] = j
        elif matrix == 1:
            i -= 1
        else:
            j -= 1
        matrix = came
    return top


@njit(cache=True)
def _best(zero: float, one: float, two: float) -> tuple[float, int]:
    """The largest of three and its number; the first of equals."""
    if zero >= one and zero >= two:
        return zero, 0
    return (one, 1) if one >= two else (two, 2)
