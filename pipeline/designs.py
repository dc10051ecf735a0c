"""Random RNAs with known base pairs, from helices and loops, and what a chemical probe would read of them.

Letters: L length (nt).
"""

from collections.abc import Sequence

import numpy as np

from pipeline.schema import ALPHABET, CANONICAL_PAIRS, encode

Pairs = list[tuple[int, int]]  #: 0-based, i < j, nested

_BASE_PAIRS = ("GC", "CG", "AU", "UA", "GU", "UG")
_BASE_PAIR_SHARES = (0.36, 0.36, 0.11, 0.11, 0.03, 0.03)
_TETRALOOPS = ("GAAA", "UUCG", "GCAA", "GAGA", "UUCG", "GUGA")
_SHORTEST_HELIX = 12  # nt: four pairs and a tetraloop

#: Mean reactivity of a fully open nucleotide, in the order of the alphabet, dimensionless.
_OPEN = {"DMS_MaP": (1.05, 0.80, 0.14, 0.16), "2A3_MaP": (0.95, 0.45, 0.80, 0.70)}
#: A nucleotide after which (5') or before which (3') another stands reacts stronger or weaker: log factors.
_NEIGHBOUR_5, _NEIGHBOUR_3 = (0.25, -0.10, 0.10, -0.25), (0.20, -0.20, 0.15, -0.15)


def designs(rng: np.random.Generator, *, length: int, largest: int = 42) -> tuple[str, Pairs]:
    """A random sequence with a known secondary structure: helices with loops and bulges, joined by linkers.

    Args:
        rng: source of all choices.
        length: nt, at least 1; a helix needs 12.
        largest: nt that a helix may span with all that it closes, at least 16.

    Returns:
        Letters of ``ALPHABET``, and the base pairs, all of them GC, AU or GU.
    """
    parts: list[tuple[str, Pairs]] = []
    left = length
    while left:
        linker = min(left, int(rng.integers(1, 6)))
        parts.append((_linker(rng, linker), []))
        left -= linker
        if left >= _SHORTEST_HELIX:
            size = min(left, int(rng.integers(16, largest + 1)))
            parts.append(_helix(rng, size))
            left -= size
    return join(parts)


def _helix(rng: np.random.Generator, size: int) -> tuple[str, Pairs]:
    """A helix and all that it closes: a hairpin loop, a bulge or internal loop before the next helix, or a branch."""
    if size < 22:
        loop = 4 if rng.random() < 0.75 else int(rng.integers(3, 8))
        loop = min(loop, size - 8)
        loop += (size - loop) % 2
        return _close(rng, (_hairpin_loop(rng, loop), []), stem=(size - loop) // 2)
    stem = int(rng.integers(4, min(6, (size - _SHORTEST_HELIX - 1) // 2) + 1))
    inside = size - 2 * stem
    if inside >= 2 * _SHORTEST_HELIX + 4 and rng.random() < 0.5:
        first = int(rng.integers(_SHORTEST_HELIX, inside - _SHORTEST_HELIX - 2))
        second = inside - first - 3
        parts = [(_linker(rng, 1), []), _helix(rng, first), (_linker(rng, 2), []), _helix(rng, second)]
    else:
        before, after = _uneven(rng, spare=inside - _SHORTEST_HELIX)
        middle = _helix(rng, inside - before - after)
        parts = [(_linker(rng, before), []), middle, (_linker(rng, after), [])]
    return _close(rng, join(parts), stem=stem)


def _close(rng: np.random.Generator, content: tuple[str, Pairs], *, stem: int) -> tuple[str, Pairs]:
    """Stack base pairs on the outside of a loop."""
    ends = [_BASE_PAIRS[k] for k in rng.choice(len(_BASE_PAIRS), size=stem, p=_BASE_PAIR_SHARES)]
    strand, partner = "".join(pair[0] for pair in ends), "".join(pair[1] for pair in reversed(ends))
    letters, pairs = join([(strand, []), content, (partner, [])])
    return letters, [(k, len(letters) - 1 - k) for k in range(stem)] + pairs


def _uneven(rng: np.random.Generator, *, spare: int) -> tuple[int, int]:
    """Unpaired nucleotides on the two sides of an internal loop or bulge; never none at all."""
    before = int(rng.integers(0, min(spare, 4) + 1))
    after = int(rng.integers(0 if before else 1, min(spare - before, 4) + 1)) if spare > before else 0
    return before, after


def _hairpin_loop(rng: np.random.Generator, size: int) -> str:
    return str(rng.choice(_TETRALOOPS)) if size == 4 else _linker(rng, size)


def _linker(rng: np.random.Generator, size: int) -> str:
    return "".join(rng.choice(list(ALPHABET), size=size, p=(0.70, 0.10, 0.06, 0.14)))


def join(parts: Sequence[tuple[str, Pairs]]) -> tuple[str, Pairs]:
    """Pieces with their own pairs as one sequence, 5' to 3'."""
    letters, pairs = "", []
    for more, inner in parts:
        pairs += [(i + len(letters), j + len(letters)) for i, j in inner]
        letters += more
    return letters, pairs


def mutate(letters: str, pairs: Pairs, rng: np.random.Generator) -> tuple[str, Pairs]:
    """One to three substitutions; a pair that no longer fits opens."""
    changed = list(letters)
    for site in rng.choice(len(changed), size=int(rng.integers(1, 4)), replace=False):
        changed[site] = str(rng.choice([letter for letter in ALPHABET if letter != changed[site]]))
    return "".join(changed), [(i, j) for i, j in pairs if changed[i] + changed[j] in CANONICAL_PAIRS]


def reactivity(sequence: str, pairs: Pairs, *, probe: str, rng: np.random.Generator) -> np.ndarray:
    """What a probe would read without measurement noise.

    Paired nucleotides are protected, those at the end of a helix or in a GU pair less; among unpaired ones DMS sees A
    and C, 2A3 all; the rigid positions of tetraloops are quiet, and neighbours raise or lower a signal.

    Args:
        sequence: letters of ``ALPHABET``, length L.
        pairs: its base pairs.
        probe: one of ``PROBES``.
        rng: source of each molecule's own variation.

    Returns:
        [L] float64, dimensionless, above 0.
    """
    token_L = encode(sequence)
    before_L, after_L = np.roll(token_L, 1), np.roll(token_L, -1)
    effect_L = np.take(_NEIGHBOUR_5, before_L) + np.take(_NEIGHBOUR_3, after_L)
    open_L = np.take(_OPEN[probe], token_L) * openness(sequence, pairs)
    return 0.02 + open_L * np.exp(effect_L + 0.2 * rng.standard_normal(len(token_L)))


def openness(sequence: str, pairs: Pairs) -> np.ndarray:
    """[L] share of the time that a nucleotide is free to react, in [0, 1]."""
    open_L = np.full(len(sequence), 1.0)
    partner = dict(pairs) | {j: i for i, j in pairs}
    for j in partner:
        if j + 1 < len(sequence):
            open_L[j + 1] = 0.5  # stacked on the 3' end of a helix
    for i, j in partner.items():
        inside = partner.get(i - 1) == j + 1 and partner.get(i + 1) == j - 1
        wobble = sequence[i] + sequence[j] in ("GU", "UG")
        open_L[i] = 0.04 + (0.0 if inside else 0.14) + (0.08 if wobble else 0.0)
    for i, j in pairs:
        if sequence[i + 1 : j] == "UUCG":
            open_L[i + 1 : j] = (0.8, 0.9, 0.4, 0.1)
        elif j - i == 5 and sequence[i + 1] == "G" and sequence[j - 1] == "A":
            open_L[i + 1 : j] = (0.3, 0.9, 0.8, 0.4)
    return open_L
