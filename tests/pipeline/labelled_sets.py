"""Small labelled sets whose class can be read off the sequence."""

import numpy as np
import polars as pl

from pipeline.labels import Classes, write_labels
from pipeline.paths import Paths
from pipeline.schema import ALPHABET, AMINO_ACIDS

#: class -> what is planted into its sequences
MOTIFS = {"one": "GGACGG", "two": "UCUUCU"}
RESIDUES = {"one": "WHWHWH", "two": "CPCPCP"}


def planted(rng: np.random.Generator, *, count: int, letters: str = ALPHABET, length: int = 30) -> pl.DataFrame:
    """``id, sequence, label``: random letters around the motif of the class, so that none is another's relative."""
    motifs = MOTIFS if letters == ALPHABET else RESIDUES
    rows = []
    for index in range(count):
        label = list(motifs)[index % len(motifs)]
        text = list(rng.choice(list(letters), length))
        at = rng.integers(0, length - 6)
        text[at : at + 6] = motifs[label]
        rows.append({"id": f"s{index:03d}", "sequence": "".join(text), "label": label})
    return pl.DataFrame(rows)


def proteins(rng: np.random.Generator, *, count: int) -> pl.DataFrame:
    return planted(rng, count=count, letters=AMINO_ACIDS)


def write_folds(paths: Paths, *, folds: int = 2) -> str:
    """A fold table by turns over the classes, under the name of a split."""
    ids = pl.read_parquet(paths.clean("train"))["sequence_id"].to_list()
    path = paths.fold_table(f"sim80_k{folds}")
    path.parent.mkdir(parents=True, exist_ok=True)
    numbers = pl.Series([index // 2 % folds for index in range(len(ids))], dtype=pl.UInt8)
    pl.DataFrame({"sequence_id": ids, "fold": numbers, "cluster": ids}).write_parquet(path)
    return path.stem


def write_planted(paths: Paths) -> pl.DataFrame:
    """Clean tables and folds of 24 planted sequences, 21 nt, odd letters known; and `planted`, which they are."""
    frame = planted(np.random.default_rng(0), count=24, length=21)
    clean = frame.select("sequence", sequence_id="id").with_columns(
        pl.lit("train").alias("dataset_name"),
        pl.lit(True).alias("scored"),
        pl.Series("labels", [[list(MOTIFS).index(label)] for label in frame["label"]], dtype=pl.List(pl.UInt16)),
    )
    paths.clean("train").parent.mkdir(parents=True)
    clean.write_parquet(paths.clean("train"))
    write_labels(paths.clean("classes"), Classes(tuple(MOTIFS), (12, 12), True, ALPHABET + "N"))
    write_folds(paths)
    return frame


def measured(rng: np.random.Generator, *, count: int, length: int = 30) -> pl.DataFrame:
    """``id, sequence, gc, tail``: how many letters are G or C, in degrees, and a number of every second sequence."""
    table = planted(rng, count=count, length=length).drop("label")
    gc = table["sequence"].str.count_matches("[GC]")
    tail = table["sequence"].str.tail(10).str.count_matches("A") / 100
    known = pl.Series(range(count)) % 2 == 0
    return table.with_columns(gc=gc * 2.5 + 30, tail=pl.when(known).then(tail))
