"""Nested secondary structures from base-pair probabilities, and a simple fold where none are given.

Letters: L length (nt), K candidate pairs.
"""

import numpy as np

from pipeline.compiled import njit

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
_SPAN_COST = 1.75 * _RT  # kcal/mol for each factor e in the distance that is bridged (Jacobson and Stockmayer 1950)


def probable_pairs(bpp_LL: np.ndarray, *, least: float = 0.02) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs (i, j, probability) of a dense matrix, ``i < j``, sorted.

    Args:
        bpp_LL: [L, L] base-pair probabilities, symmetric.
        least: probability below which a pair is left out.
    """
    i_K, j_K = np.nonzero(np.triu(bpp_LL >= least, _MIN_HAIRPIN + 1))
    return i_K, j_K, bpp_LL[i_K, j_K].astype(np.float64)


def stacking_pairs(sequence: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Pairs (i, j, pseudo-probability) of stems that are stable by themselves: a stand-in where no folding program is.

    A stem counts by the energy of its stacked pairs against the cost of closing its loop; stems do not see each other,
    so the numbers are no probabilities of an ensemble, only an order.

    Args:
        sequence: letters A, C, G, U.
    """
    type_of = np.full((256, 256), -1, dtype=np.int64)
    for number, pair in enumerate(_PAIR_TYPES):
        type_of[ord(pair[0]), ord(pair[1])] = number
    letters_L = np.frombuffer(sequence.encode(), dtype=np.uint8)
    i_K, j_K, energy_K = _stems(letters_L, type_of, _STACKING)
    return i_K, j_K, 1.0 / (1.0 + np.exp(np.clip(energy_K / (2.0 * _RT), -30.0, 30.0)))


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
    paired_L = np.bincount(i_K, probability_K, length) + np.bincount(j_K, probability_K, length)
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
        best[i, i + 1 :] = best[i + 1, i + 1 :]
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
