"""Sequences in families, as a library has them: parents, mutants, tiled windows, primers and barcodes."""

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path

import numpy as np
import polars as pl

from folds.edit_distance import pair_distance_ref
from pipeline.paths import Paths

LEFT, RIGHT = "GGGAACGACUCGAGUAGAGUCGAAAA", "AAAAGAAACAACAACAACAAC"
PARTNER = {"A": "U", "C": "G", "G": "C", "U": "A"}


def random_sequence(rng: np.random.Generator, length: int) -> str:
    return "".join(rng.choice(list("ACGU"), size=length))


def mutate(rng: np.random.Generator, parent: str, *, edits: int) -> str:
    """At most `edits` single-letter changes."""
    letters = list(parent)
    for _ in range(edits):
        place = int(rng.integers(len(letters)))
        kind = rng.integers(4)
        if kind == 0 and len(letters) > 1:
            del letters[place]
        elif kind == 1:
            letters.insert(place, str(rng.choice(list("ACGU"))))
        else:
            letters[place] = str(rng.choice(list("ACGU")))
    return "".join(letters)


def families(rng: np.random.Generator, *, parents: int, size: int, length: int = 60, edits: int = 5) -> list[str]:
    """`parents` unrelated sequences, each followed by `size - 1` mutants of its own."""
    made = []
    for _ in range(parents):
        parent = random_sequence(rng, length)
        made += [parent, *(mutate(rng, parent, edits=edits) for _ in range(size - 1))]
    return made


def with_primers(rng: np.random.Generator, design: str) -> str:
    """A design between primers, with a barcode hairpin of its own."""
    stem = random_sequence(rng, 8)
    return LEFT + design + stem + "UUCG" + "".join(PARTNER[letter] for letter in reversed(stem)) + RIGHT


def make_table(
    sequences: Sequence[str], *, datasets: Sequence[str] | str = "library", groups: Sequence[str | None] | None = None
) -> pl.DataFrame:
    """What the clustering reads of a clean train table."""
    names = [datasets] * len(sequences) if isinstance(datasets, str) else list(datasets)
    columns = {
        "sequence_id": [f"s{number:05d}" for number in range(len(sequences))],
        "sequence": list(sequences),
        "dataset_name": names,
        "group": list(groups) if groups else [None] * len(sequences),
    }
    return pl.DataFrame(columns, schema_overrides={"group": pl.String})


def save(table: pl.DataFrame, paths: Paths) -> Path:
    path = paths.clean("train")
    path.parent.mkdir(parents=True, exist_ok=True)
    table.write_parquet(path)
    return path


def identity_ref(first: str, second: str) -> float:
    """Identity by the plain dynamic programme; designs of less than 40 nt have to cover the longer."""
    short, long = sorted((len(first), len(second)))
    edits = pair_distance_ref(first, second)
    return (short - edits) / (short if short >= 40 else long)


def related_ref(designs: Sequence[str], percent: int) -> list[tuple[int, int]]:
    """Pairs of at least `percent` % identity, by the plain dynamic programme."""
    return [
        (one, two)
        for one, two in combinations(range(len(designs)), 2)
        if identity_ref(designs[one], designs[two]) >= percent / 100 - 1e-9
    ]


def clusters_ref(ids: Sequence[str], pairs: Sequence[tuple[int, int]]) -> list[str]:
    """Smallest id of every row's connected component, by spreading labels until nothing changes."""
    labels = list(ids)
    changed = True
    while changed:
        changed = False
        for one, two in pairs:
            low = min(labels[one], labels[two])
            changed |= labels[one] != labels[two]
            labels[one] = labels[two] = low
    return labels
