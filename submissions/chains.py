"""TM-score of complexes with several copies of a chain: which predicted copy stands for which is free. Lengths in Å.

Letters: L residues of all chains, C copies, 3 xyz.
"""

import itertools
import math
from collections.abc import Sequence

import numpy as np
from scipy.optimize import linear_sum_assignment

from pipeline.structure.geometry import rotation_onto
from submissions.tm_score import d0_rna, resolved, tm_scores

_BRUTE = math.factorial(6)  # orders of the copies that are all tried


def tm_permuted(predicted_L3: np.ndarray, reference_L3: np.ndarray, chains: Sequence[str]) -> float:
    """Residue-matched TM-score, the copies of each chain in the order that scores best.

    All orders are tried while there are at most 720 (six copies of one chain). Beyond that every copy is laid upon
    every place of its chain in turn, the rest of the complex moves along, the copies are assigned to the places where
    they score most (Hungarian method), and the best of these orders counts: it may miss the best order of all.

    Args:
        predicted_L3: [L, 3] Å; NaN where missing.
        reference_L3: [L, 3] Å, same residues; NaN where not resolved.
        chains: sequence of each chain, in order; chains with the same sequence are copies.

    Returns:
        Score in [0, 1].

    Raises:
        ValueError: the chains do not make up the L residues.

    Source:
        part 2 of the competition: ``USalign -TMscore 0 -mm 1 -ter 0`` maps the chains, then ``-TMscore 1``.
    """
    if sum(map(len, chains)) != len(reference_L3) or predicted_L3.shape != reference_L3.shape:
        raise ValueError(
            f"tm_permuted: chains of {sum(map(len, chains))} residues, traces {predicted_L3.shape} and "
            f"{reference_L3.shape}; expected [L, 3] twice and chains that make up L"
        )
    groups = [[place for place, chain in enumerate(chains) if chain == kind] for kind in dict.fromkeys(chains)]
    spans = np.split(np.arange(len(reference_L3)), np.cumsum([len(chain) for chain in chains])[:-1])
    tried = math.prod(math.factorial(len(group)) for group in groups)
    orders = _all_orders(groups) if tried <= _BRUTE else _laid_orders(predicted_L3, reference_L3, groups, spans)
    traces = [predicted_L3[np.concatenate([spans[place] for place in order])] for order in orders]
    return float(tm_scores([(trace, reference_L3) for trace in traces]).max())


def _all_orders(groups: list[list[int]]) -> list[list[int]]:
    """Every order of the chains that puts copies only in each other's places."""
    orders = []
    for choice in itertools.product(*(itertools.permutations(group) for group in groups)):
        order = [0] * sum(map(len, groups))
        for group, copies in zip(groups, choice, strict=True):
            for place, copy in zip(group, copies, strict=True):
                order[place] = copy
        orders.append(order)
    return orders


def _laid_orders(
    predicted_L3: np.ndarray, reference_L3: np.ndarray, groups: list[list[int]], spans: list[np.ndarray]
) -> list[list[int]]:
    """Orders that follow from laying one predicted chain upon one place of the reference; the given order first."""
    d0 = d0_rna(max(int(resolved(reference_L3).sum()), 1))
    orders = [list(range(len(spans)))]
    for group in groups:
        for copy, place in itertools.product(group, group):
            common = resolved(predicted_L3[spans[copy]]) & resolved(reference_L3[spans[place]])
            if common.sum() < 3:
                continue
            mobile, fixed = predicted_L3[spans[copy]][common], reference_L3[spans[place]][common]
            origin, place_of = mobile.mean(axis=0), fixed.mean(axis=0)
            moved_L3 = (predicted_L3 - origin) @ rotation_onto(mobile - origin, fixed - place_of) + place_of
            order = _assign(moved_L3, reference_L3, groups, spans, d0)
            if order not in orders:
                orders.append(order)
    return orders


def _assign(
    moved_L3: np.ndarray, reference_L3: np.ndarray, groups: list[list[int]], spans: list[np.ndarray], d0: float
) -> list[int]:
    """Copies at the places where, lying as they do, they score most together."""
    order = list(range(len(spans)))
    for group in groups:
        gain_CC = np.array([[_nearness(moved_L3[spans[a]], reference_L3[spans[b]], d0) for a in group] for b in group])
        for place, copy in zip(*linear_sum_assignment(gain_CC, maximize=True), strict=True):
            order[group[place]] = group[copy]
    return order


def _nearness(moved_L3: np.ndarray, reference_L3: np.ndarray, d0: float) -> float:
    return float(np.nansum(1.0 / (1.0 + np.sum((moved_L3 - reference_L3) ** 2, axis=1) / d0**2)))
