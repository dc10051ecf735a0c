"""Clusters of related sequences, so that no fold holds near-copies of what another fold trains on.

``identity(a, b) = 1 - D / |shorter|``, where D is the least edit distance of the shorter design laid anywhere within
the longer: the longer's free ends cost nothing, every letter of the shorter without counterpart is an edit. Of two
equally long designs the better of both ways counts. Tiled windows of 100 nt that are shifted by up to 20 nt are
therefore at least 80 % identical. A design shorter than 40 nt would lie in many long ones by chance, so for it the
longer's free ends count as well: identity is the share of the longer that it matches. The design is what is left
without the ends that all sequences of a data set share (`folds.flanks`).

Proteins are compared by groups of similar residues (`RESIDUE_GROUPS`), so that their identity here is never below the
share of identical residues: relatives of at least 80 % by residues are together, and more distant ones as well. Unknown
nucleotides are read as A.

Clusters are the connected components (single linkage) of all pairs with at least the given identity, of known groups
and of exact duplicates; nothing less keeps relatives out of other folds.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import polars as pl

from folds.components import find_roots, unite_pairs, unite_rows
from folds.edit_distance import Packed, distance_rows, pack
from folds.flanks import Flank, cut_flanks, find_flank
from folds.seeds import link_by_seeds
from pipeline.runlog import Bar
from pipeline.schema import ALPHABET

#: Amino acids that stand for one letter each of the four that are compared; X stands with the most frequent group. Of
#: 300,000 pairs of shuffled resistance proteins none reaches 80 % so, 5 reach 70 % (all of less than 80 residues).
#: Source: Murphy et al. 2000, Protein Eng. 13:149, the alphabet of four.
RESIDUE_GROUPS = ("LVIMC", "AGSTPX", "FYW", "EDNQKRH")

#: Raised when the same sequences give other clusters than before.
VERSION = 2

#: Most letters of all designs of which all pairs are compared: 13,975 designs of 103, 1.4 million letters, take 11 s on
#: two threads, 1,040 of 2,300, 2.4 million letters, 96 s on two busy ones; twice the letters take four times as long.
EXHAUSTIVE = 4_000_000

#: Least threshold: unrelated designs reach 60 % (50 nt within 103 nt), and from there on everything hangs together.
MIN_PERCENT = 65


@dataclass(frozen=True, kw_only=True)
class Clusters:
    """Which sequences belong together."""

    cluster: list[str]  #: per row: the smallest sequence_id of its cluster
    facts: dict[str, Any]


def in_four_letters(sequences: Sequence[str]) -> list[str]:
    """Sequences as they are compared: proteins by their residues' groups, unknown nucleotides as A.

    >>> in_four_letters(["MKW", "GAX"]), in_four_letters(["GANU"])
    (['AUG', 'CCC'], ['GAAU'])
    """
    odd = set().union(*map(set, sequences)) - set(ALPHABET)
    if not odd:
        return list(sequences)
    read_as = dict.fromkeys("N", ALPHABET[0])
    if odd != {"N"}:
        read_as = {residue: ALPHABET[place] for place, group in enumerate(RESIDUE_GROUPS) for residue in group}
    table = str.maketrans(read_as)
    return [sequence.translate(table) for sequence in sequences]


def find_designs(sequences: Sequence[str], datasets: Sequence[str]) -> tuple[list[str], dict[str, Flank]]:
    """Sequences, `in_four_letters`, without the ends that are constant in their data set, and those ends."""
    sequences = in_four_letters(sequences)
    members: dict[str, list[str]] = {}
    for sequence, dataset in zip(sequences, datasets, strict=True):
        members.setdefault(dataset, []).append(sequence)
    flanks = {dataset: find_flank(members[dataset]) for dataset in sorted(members)}
    pairs = zip(sequences, datasets, strict=True)
    return [sequence[cut_flanks(sequence, flanks[dataset])] for sequence, dataset in pairs], flanks


def find_clusters(table: pl.DataFrame, *, percent: int) -> Clusters:
    """Cluster sequences so that two of at least `percent` % identity, of one group or of one design are together.

    Up to `EXHAUSTIVE` letters all pairs of designs are compared ("exact"): the definition holds to the letter. Of more,
    those that share a seed (`folds.seeds`, "seeded"): linear; at 80 % few are missed (`folds.bench`; MMseqs2 leaves
    relatives apart), at lower thresholds fewer relatives share a seed.

    Args:
        table: ``sequence_id, sequence, dataset_name, group`` (null = no known relatives), sorted by sequence_id.
        percent: least identity of relatives, `MIN_PERCENT` to 100.
    """
    designs, flanks = find_designs(table["sequence"].to_list(), table["dataset_name"].to_list())
    texts = sorted(set(designs), key=lambda text: (len(text), text))
    place_of = {text: place for place, text in enumerate(texts)}
    places_N = np.array([place_of[design] for design in designs], dtype=np.int64)
    parent_U = np.arange(len(texts))
    _unite_groups(parent_U, places_N, table["group"])
    packed = pack(texts)
    method: Literal["exact", "seeded"] = "exact" if packed.tokens_T.size <= EXHAUSTIVE else "seeded"
    facts: dict[str, Any] = {"method": method, "percent": percent, "sequences": len(designs), "designs": len(texts)}
    link(packed, parent_U, percent=percent, method=method)
    cluster = _name_clusters(table["sequence_id"].to_list(), find_roots(parent_U)[places_N])
    facts["flanks"] = {dataset: flank._asdict() for dataset, flank in flanks.items()}
    return Clusters(cluster=cluster, facts=facts)


def _unite_groups(parent_U: np.ndarray, places_N: np.ndarray, group: pl.Series) -> None:
    first_of: dict[str, int] = {}
    rows = [(first_of.setdefault(name, place), place) for name, place in zip(group, places_N, strict=True) if name]
    if rows:
        unite_pairs(parent_U, *np.array(rows, dtype=np.int64).T.copy())


def _name_clusters(ids: Sequence[str], labels_N: np.ndarray) -> list[str]:
    smallest: dict[int, str] = {}
    for label, sequence_id in zip(labels_N.tolist(), ids, strict=True):
        smallest[label] = min(smallest.get(label, sequence_id), sequence_id)
    return [smallest[label] for label in labels_N.tolist()]


def link(packed: Packed, parent_N: np.ndarray, *, percent: int, method: Literal["exact", "seeded"]) -> None:
    """Join, in place, the designs of at least `percent` % identity.

    Args:
        packed: N designs, sorted by length.
        parent_N: int64 union-find forest, see `folds.components`.
        percent: least identity of relatives.
        method: compare all pairs, or those that share a seed.
    """
    if method == "seeded":
        link_by_seeds(packed, parent_N, percent)
        return
    labels_N = find_roots(parent_N)
    with Bar("cluster, all pairs", total=packed.lengths_N.size, unit="sequences") as bar:
        for first, distances_RN in distance_rows(packed, labels_N):
            unite_rows(parent_N, first, distances_RN, packed.lengths_N, percent)
            labels_N[:] = find_roots(parent_N)
            bar.advance(len(distances_RN))
