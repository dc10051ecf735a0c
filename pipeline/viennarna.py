"""Base-pair probabilities of one sequence by ViennaRNA, long ones in windows.

Letters: L length (nt), K pairs.
"""

import importlib
import itertools
from collections.abc import Iterator
from importlib import metadata
from typing import NamedTuple

import numpy as np

from pipeline.errors import DataError
from pipeline.structure.geometry import sum_over_pairs

#: Pairs less likely than this are not kept; a nucleotide's unpaired share is summed before.
MIN_PROBABILITY = 1e-3
#: Sequences up to this length are folded as a whole, nt: 3 s and 100 MiB at 1,200 nt, and time grows with the cube.
MAX_WHOLE = 1200
#: Longer ones are folded in windows, nt. A pair counts as the window whose middle is nearest to it says; all pairs up
#: to WINDOW / 2 apart lie in that window, none beyond WINDOW is found. 4,640 nt take 20 s instead of two minutes.
WINDOW = 1000

_OVERFLOW = 1e4  # kcal/mol; ViennaRNA's "infinite" ensemble energy is 1e5


class PairProbabilities(NamedTuple):
    """Base-pair probabilities of one sequence; positions are 0-based, ``i < j``."""

    unpaired_L: np.ndarray  # float32 in [0, 1]: 1 minus the sum over all pairs, the rare ones included
    i_K: np.ndarray  # uint16
    j_K: np.ndarray  # uint16
    p_K: np.ndarray  # float32, at least MIN_PROBABILITY


def available() -> tuple[bool, str]:
    """Whether ViennaRNA can be used, and which version, or why not."""
    try:
        version = installed_version()
    except ImportError as err:
        return False, (
            f"ViennaRNA is not usable ({err}): models with use_bpp=false work without it. "
            "Next: pip install ViennaRNA, or the extra 'bpp'"
        )
    return True, f"{version}: base-pair probabilities can be computed"


def installed_version() -> str:
    """ViennaRNA's version, also where a system package or conda brought its bindings without Python's metadata."""
    rna = importlib.import_module("RNA")
    try:
        return metadata.version("ViennaRNA")
    except metadata.PackageNotFoundError:
        return str(rna.__version__)


def fold(sequence: str) -> PairProbabilities:
    """Base-pair probabilities of one sequence.

    Sequences longer than ``MAX_WHOLE`` are folded in overlapping windows; where the windows disagree so that a
    nucleotide would be paired more than once, its probabilities are scaled down.

    Source:
        McCaskill 1990, as ViennaRNA computes it (Turner 2004 parameters, 37 °C, dangles 2).
    """
    length, pieces = len(sequence), []
    for start, stop, first, last in _windows(length):
        bpp_LL = _fold_whole(sequence[start:stop])
        i_K, j_K = np.nonzero(bpp_LL)
        p_K, i_K, j_K = bpp_LL[i_K, j_K], i_K + start, j_K + start
        mine = (i_K + j_K >= 2 * first) & (i_K + j_K < 2 * last)
        pieces.append((i_K[mine], j_K[mine], p_K[mine]))
    i_K, j_K, p_K = (np.concatenate(column) for column in zip(*pieces, strict=True))
    total_L = sum_over_pairs(i_K, j_K, p_K, length)
    excess_L = np.maximum(total_L, 1.0)
    p_K = p_K / np.maximum(excess_L[i_K], excess_L[j_K])
    unpaired_L = 1.0 - sum_over_pairs(i_K, j_K, p_K, length)
    kept = np.lexsort((j_K, i_K))
    kept = kept[p_K[kept] >= MIN_PROBABILITY]
    return PairProbabilities(
        unpaired_L.clip(0.0, 1.0).astype(np.float32),
        i_K[kept].astype(np.uint16),
        j_K[kept].astype(np.uint16),
        p_K[kept].astype(np.float32),
    )


def _windows(length: int) -> Iterator[tuple[int, int, float, float]]:
    """Start and stop of every window, and the range of pair middles that it speaks for."""
    if length <= MAX_WHOLE:
        yield 0, length, 0.0, float(length)
        return
    starts = [*range(0, length - WINDOW, WINDOW // 2), length - WINDOW]
    borders = [0.0, *((a + b + WINDOW) / 2 for a, b in itertools.pairwise(starts)), float(length)]
    for start, first, last in zip(starts, borders[:-1], borders[1:], strict=True):
        yield start, start + WINDOW, first, last


def _fold_whole(sequence: str) -> np.ndarray:
    """[L, L] float64, upper triangle."""
    rna = importlib.import_module("RNA")
    compound = rna.fold_compound(sequence)
    if compound.pf()[1] >= _OVERFLOW:
        # The default scale expects an average sequence. Scaling by the minimum free energy costs 40 % more time at
        # 170 nt, so only those that need it get it: very stable or very long ones.
        compound.exp_params_rescale(compound.mfe()[1])
        if compound.pf()[1] >= _OVERFLOW:
            raise DataError(
                f"sequence {sequence[:20]}… of {len(sequence)} nt: its partition function overflows; expected a "
                "foldable sequence. Next: remove it from the clean tables."
            )
    return np.asarray(compound.bpp())[1:, 1:]


def seconds_to_fold(length: int) -> float:
    """Time to fold a sequence on one core of the machine it was measured on: 25 ms at 170 nt, 5.7 s at 1,500 nt."""
    if length > MAX_WHOLE:
        return (2 * length / WINDOW) * seconds_to_fold(WINDOW)
    return 6.5e-7 * length**2 + 1.25e-9 * length**3
