"""Nested secondary structures from base-pair probabilities, and a simple fold where none are given.

Letters: L length (nt), K candidate pairs.
"""

import numpy as np

from pipeline.compiled import copy, njit
from pipeline.structure.geometry import sum_over_pairs

#: Of a pair that a structure may have.
LEAST_PROBABILITY = 0.02

_MIN_HAIRPIN = 3  # nt
_RT = 0.616  # kcal/mol at 37 °C

#: Free energy of stacked pairs, kcal/mol, in the order CG GC GU UG AU UA: row = outer pair (i, j), column = inner pair
#: read backwards (j - 1, i + 1). Source: Turner 2004 (Mathews et al. 2004), as in ViennaRNA's rna_turner2004.par.
_STACKING = np.array(
    [
        [-2.4, -3.3, -2.1, -1.4, -2.1, -2.1],
        [-3.3, -3.4, -2.5, -1.5, -2.2, -2.4],
        [-2.1, -2.5, 1.3, -0.5, -1.4, -1.3],
        [-1.4, -1.5, -0.5, 0.3, -0.6, -1.0],
        [-2.1, -2.2, -1.4, -0.6, -1.1, -0.9],
        [-2.1, -2.4, -1.3, -1.0, -0.9, -1.3],
    ]
)
_PAIR_TYPES = ("CG", "GC", "GU", "UG", "AU", "UA")
_SMALLEST_STEM = 3  # pairs of a stem that is considered at all
_LOOP_COST = 4.5  # kcal/mol for closing a loop, about that of a hairpin of 4 to 9 nt
#: Stacking energy from which unpaired residues of different loops are taken to pair, kcal/mol. Of 9 such helices that
#: the likeliest nested structures of 182 chains of the PDB leave room for, 5 are there and 2 in part; of the 102
#: between -9 and -4, 11.
_CROSSING_STABLE = -9.0
_CROSSING_LENGTH = 1000  # nt up to which that holds
_KISSING = 6  # pairs of a kissing loop
_SPAN_COST = 1.75 * _RT  # kcal/mol for each factor e in the distance that is bridged (Jacobson and Stockmayer 1950)


def probable_pairs(bpp_LL: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs (i, j, probability) of a dense matrix, ``i < j``, sorted.

    Args:
        bpp_LL: [L, L] base-pair probabilities, symmetric; those below `LEAST_PROBABILITY` are left out.
    """
    i_K, j_K = np.nonzero(np.triu(bpp_LL >= LEAST_PROBABILITY, _MIN_HAIRPIN + 1))
    return i_K, j_K, bpp_LL[i_K, j_K].astype(np.float64)


def stacking_pairs(sequence: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs (i, j, pseudo-probability) of stems that are stable by themselves: a stand-in where no folding program is.

    A stem counts by the energy of its stacked pairs against the cost of closing its loop; stems do not see each other,
    so the numbers are no probabilities of an ensemble, only an order.

    Args:
        sequence: letters A, C, G, U.
    """
    type_of = _pair_type()
    letters_L = np.frombuffer(sequence.encode(), dtype=np.uint8)
    i_K, j_K, energy_K = _stems(letters_L, type_of, _STACKING)
    return i_K, j_K, 1.0 / (1.0 + np.exp(np.clip(energy_K / (2.0 * _RT), -30.0, 30.0)))


def _pair_type() -> np.ndarray:
    """[256, 256] place of two letters' codes in `_PAIR_TYPES`, -1 = they do not pair."""
    type_of = np.full((256, 256), -1, dtype=np.int64)
    for number, pair in enumerate(_PAIR_TYPES):
        type_of[ord(pair[0]), ord(pair[1])] = number
    return type_of


@njit(cache=True, error_model="numpy")
def _stems(
    letters_L: np.ndarray, type_of: np.ndarray, stacking: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Every pair of every maximal stem that could be stable, with the energy of its whole stem, kcal/mol."""
    length = len(letters_L)
    found_i, found_j, found_energy = [0], [0], [0.0]
    for total in range(_MIN_HAIRPIN + 1, 2 * length - _MIN_HAIRPIN - 1):
        i, size, energy = (total - _MIN_HAIRPIN - 1) // 2, 0, 0.0
        lowest = max(0, total - length + 1)
        while i >= lowest - 1:
            j = total - i
            kind = type_of[letters_L[i], letters_L[j]] if i >= lowest else -1
            if kind >= 0:
                if size > 0:
                    energy += stacking[kind, type_of[letters_L[j - 1], letters_L[i + 1]]]
                size += 1
            elif size > 0:
                if size >= _SMALLEST_STEM:
                    span = (j - 1) - (i + 1) - 2 * (size - 1) - 1
                    stem_energy = energy + _LOOP_COST + _SPAN_COST * np.log(max(span, 4) / 6.0)
                    if stem_energy < 0.5:
                        for k in range(size):
                            found_i.append(i + 1 + k)
                            found_j.append(j - 1 - k)
                            found_energy.append(stem_energy)
                size, energy = 0, 0.0
            i -= 1
    return np.array(found_i[1:]), np.array(found_j[1:]), np.array(found_energy[1:])


def nested_pairs(length: int, i_K: np.ndarray, j_K: np.ndarray, probability_K: np.ndarray) -> list[tuple[int, int]]:
    """The nested structure of highest expected accuracy.

    Maximises ``2 * sum of p_ij over pairs + sum of unpaired probabilities over the rest``.

    Args:
        length: nt.
        i_K: [K] first residues, 0-based.
        j_K: [K] second residues, larger by at least four.
        probability_K: [K] in [0, 1].

    Returns:
        0-based pairs, sorted.

    Source:
        Do, Woods and Batzoglou 2006, Bioinformatics 22:e90, with gamma 1.
    """
    paired_L = sum_over_pairs(i_K, j_K, probability_K, length)
    unpaired_L = np.maximum(1.0 - paired_L, 0.0)
    gain_K = 2.0 * probability_K - unpaired_L[i_K] - unpaired_L[j_K]
    useful = np.flatnonzero(gain_K > 0)
    order = useful[np.lexsort((j_K[useful], i_K[useful]))]
    starts = np.searchsorted(i_K[order], np.arange(length + 1))
    partner_L = _best_nested(length, starts, j_K[order], gain_K[order].astype(np.float32))
    return [(i, int(j)) for i, j in enumerate(partner_L) if j > i]


def without_lone_pairs(pairs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The pairs that stack on another one.

    >>> without_lone_pairs([(0, 20), (1, 19), (4, 12)])
    [(0, 20), (1, 19)]
    """
    known = set(pairs)
    return [(i, j) for i, j in pairs if (i - 1, j + 1) in known or (i + 1, j - 1) in known]


@njit(cache=True)
def _best_nested(length: int, starts: np.ndarray, partner_K: np.ndarray, gain_K: np.ndarray) -> np.ndarray:
    """[L] partner or -1 of the nested set of pairs with the largest sum of gains: L times K steps."""
    best = np.zeros((length + 2, length + 1), dtype=np.float32)  # best[i, j + 1]: residues i to j
    for i in range(length - 1, -1, -1):
        copy(best[i + 1, i + 1 :], best[i, i + 1 :])
        for k in range(starts[i], starts[i + 1]):
            partner = partner_K[k]
            inside = gain_K[k] + best[i + 1, partner]
            for j in range(partner, length):
                best[i, j + 1] = max(best[i, j + 1], inside + best[partner + 1, j + 1])
    partner_L = np.full(length, -1)
    todo = [(0, length - 1)]
    while len(todo) > 0:
        i, j = todo.pop()
        if i >= j:
            continue
        while i < j and best[i, j + 1] == best[i + 1, j + 1]:
            i += 1
        for k in range(starts[i], starts[i + 1]):
            partner = partner_K[k]
            if i < partner <= j:
                value = gain_K[k] + best[i + 1, partner] + best[partner + 1, j + 1]
                if value == best[i, j + 1]:
                    partner_L[i], partner_L[partner] = partner, i
                    todo.append((i + 1, partner - 1))
                    todo.append((partner + 1, j))
                    break
    return partner_L


def pair_across_junctions(sequence: str, pairs: list[tuple[int, int]]) -> list[tuple[int, int]]:
    """The pairs, and those of helices too short for an energy model that part a tight junction of six into two of four.

    Two crossovers of three helices side by side are seldom further apart than two or three pairs. Loops of five
    helices cost an energy model more than so few pairs are worth; that the only two gaps of such a junction lie
    opposite each other and pair from end to end is no chance.

    Args:
        sequence: letters A, C, G, U.
        pairs: 0-based nested pairs.

    >>> arms = [(1, 5), (8, 12), (13, 17), (18, 22), (25, 29)]
    >>> found = pair_across_junctions("G" + "CAAAG" + "GC" + "CAAAG" * 3 + "GC" + "CAAAG" + "C", [(0, 30), *arms])
    >>> sorted(set(found) - {(0, 30), *arms})
    [(6, 24), (7, 23)]
    """
    partner, found = dict(pairs), list(pairs)
    for i, j in pairs:
        gaps, start, residue = [], i + 1, i + 1
        while residue < j:
            if residue in partner:
                gaps.append(range(start, residue))
                start = residue = partner[residue] + 1
            else:
                residue += 1
        gaps.append(range(start, j))
        whole = [place for place, gap in enumerate(gaps) if gap]
        if len(gaps) == 6 and len(whole) == 2 and whole[1] - whole[0] == 3:
            left, right = gaps[whole[0]], gaps[whole[1]][::-1]
            if len(left) == len(right) > 1 and all(
                sequence[a] + sequence[b] in _PAIR_TYPES for a, b in zip(left, right, strict=True)
            ):
                found += zip(left, right, strict=True)
    return sorted(found)


def crossing_helices(sequence: str, pairs: list[tuple[int, int]]) -> list[tuple[int, int, int]]:
    """Helices that unpaired residues of different loops can form: pseudoknots, kissing loops, paranemic crossovers.

    Args:
        sequence: letters A, C, G, U.
        pairs: 0-based nested pairs, which leave the rest unpaired.

    Returns:
        (first residue, its partner, number of pairs), the most stable first, each residue in one at most.

    >>> crossing_helices("GGGGAAACCUGCAAACCCCAAAAAGCAGG", [(k, 18 - k) for k in range(4)])
    [(7, 28, 5)]
    """
    partner_L = np.full(len(sequence), -1)
    for i, j in pairs:
        partner_L[i], partner_L[j] = j, i
    loop_L, strand_L, around = np.full(len(sequence), -2), np.cumsum(partner_L >= 0), [-1]
    for residue, partner in enumerate(partner_L.tolist()):
        if partner > residue:
            around.append(residue)
        elif partner >= 0:
            around.pop()
        else:
            loop_L[residue] = around[-1]
    letters_L = np.frombuffer(sequence.encode(), dtype=np.uint8)
    # chance finds twice the length four times
    stable = _CROSSING_STABLE - 2.0 * _RT * np.log(max(len(sequence) / _CROSSING_LENGTH, 1.0))
    i_K, j_K, size_K, energy_K = _crossing(letters_L, loop_L, strand_L, _pair_type(), _STACKING, stable)
    chosen: list[tuple[int, int, int]] = []
    taken = np.zeros(len(sequence), dtype=bool)
    for k in np.argsort(energy_K, kind="stable"):
        i, j, size = int(i_K[k]), int(j_K[k]), int(size_K[k])
        kept = not taken[i : i + size].any() and not taken[j - size + 1 : j + 1].any()
        if kept and _may_kiss(sequence, partner_L, loop_L, [(i, i + size - 1), (j - size + 1, j)]):
            taken[i : i + size] = taken[j - size + 1 : j + 1] = True
            chosen.append((i, j, size))
    return chosen


def _may_kiss(sequence: str, partner_L: np.ndarray, loop_L: np.ndarray, strands: list[tuple[int, int]]) -> bool:
    """Whether two hairpins that pair can stand on one axis; True for what is no pair of hairpins.

    Those of HIV-1's dimerisation site do, with six pairs, two residues before and an A behind each strand (Ennifar et
    al. 2001); purine riboswitches, without the A, hold theirs side by side.
    """
    for start, end in strands:
        closing = loop_L[start]
        if closing < 0:
            return True
        hairpin = (partner_L[closing + 1 : partner_L[closing]] < 0).all()
        if not hairpin and partner_L[closing] - end > 2:
            return True
    return all(
        end - start + 1 >= _KISSING
        and start - loop_L[start] > 2
        and partner_L[loop_L[start]] == end + 2
        and sequence[end + 1] == "A"
        for start, end in strands
    )


@njit(cache=True, error_model="numpy")
def _crossing(
    letters_L: np.ndarray,
    loop_L: np.ndarray,
    strand_L: np.ndarray,
    type_of: np.ndarray,
    stacking: np.ndarray,
    stable: float,
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Every longest helix of two strands of different loops (-2 = paired), and its stacking energy, kcal/mol."""
    length = len(letters_L)
    found_i, found_j, found_size, found_energy = [0], [0], [0], [0.0]
    for total in range(1, 2 * length - 2):
        size, energy = 0, 0.0
        for i in range(max(0, total - length + 1), (total + 1) // 2 + 1):
            j = total - i
            kind = type_of[letters_L[i], letters_L[j]] if i < j and loop_L[i] > -2 and loop_L[j] > -2 else -1
            if kind >= 0 and loop_L[i] == loop_L[j]:
                kind = -1
            goes_on = size > 0 and kind >= 0 and strand_L[i] == strand_L[i - 1] and strand_L[j] == strand_L[j + 1]
            if goes_on:
                energy += stacking[type_of[letters_L[i - 1], letters_L[j + 1]], type_of[letters_L[j], letters_L[i]]]
                size += 1
                continue
            if size > 0 and energy <= stable:
                found_i.append(i - size)
                found_j.append(j + size)
                found_size.append(size)
                found_energy.append(energy)
            size, energy = int(kind >= 0), 0.0
    return np.array(found_i[1:]), np.array(found_j[1:]), np.array(found_size[1:]), np.array(found_energy[1:])
