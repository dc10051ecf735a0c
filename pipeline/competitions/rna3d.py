"""Stanford RNA 3D Folding: sequences and C1' labels as Kaggle ships them, to clean tables.

`pipeline.competitions.rna3d_files` reads the files and checks them. Clean tables have one row per target (train, later,
test) or per known conformation (references).

What no test target with a cutoff may have seen teaches nothing. Targets dated after the earliest of these cutoffs are
in ``later``, from which templates are taken for the test targets that may use them. Targets that no date shows to be
old enough stay in ``train``, to be predicted and scored, but ``teaches`` is false there: no network, ranker or policy
learns from them. Dates are those of ``temporal_cutoff``, else of ``pdb_release_dates_NA.csv`` (part 2 ships it), else
what the PDB id tells.
"""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from pipeline.competitions import rna3d_files, rna3d_hidden
from pipeline.competitions.base import Competition, tell_lengths
from pipeline.competitions.raw import column_names
from pipeline.competitions.raw_files import find_table, names_beside, need_table
from pipeline.competitions.rna3d_files import ASSEMBLY, AXES, RELEASES
from pipeline.errors import DataError
from pipeline.runlog import warn
from pipeline.schema import ALPHABET, MIN_RESOLVED, ODD_LETTER_AS
from pipeline.templates.gate import allowed_mask, entry_of, released_by

_NEEDED = ("train_sequences", "train_labels", "test_sequences", "sample_submission")
_OPTIONAL = ("validation_sequences", "validation_labels", "train_clusters")
_RELEASES_IN = "PDB_RNA"  # the folder of release dates in part 2
_ODD = f"[^{ALPHABET}]"


def raw_files(folder: Path, *, test_only: bool = False) -> dict[str, Path]:
    """Label -> raw file in a folder or a zip; those of validation, clusters and release dates may be absent.

    With `test_only` the test sequences, and the sample submission if it is there.

    Raises:
        DataError: a needed file is missing, or validation labels came without their sequences.
    """
    if test_only:
        sample = find_table(folder, "sample_submission")
        found = {"test_sequences": need_table(folder, "test_sequences")}
        return found | ({"sample_submission": sample} if sample else {})
    found = {label: need_table(folder, label) for label in _NEEDED}
    for label in _OPTIONAL:
        path = find_table(folder, label)
        if path is not None:
            found[label] = path
    for place in (folder, folder / _RELEASES_IN):
        if "release_dates" not in found and place.exists() and (path := find_table(place, RELEASES)) is not None:
            found["release_dates"] = path
    if "validation_labels" in found and "validation_sequences" not in found:
        raise DataError(f"{folder}: validation_labels came without validation_sequences.csv. Next: add that file.")
    return found


def _raw_files_2(folder: Path, *, test_only: bool = False) -> dict[str, Path]:
    """As `raw_files`, with a word where the files look like those of part 1, which would be accepted in silence."""
    found = raw_files(folder, test_only=test_only)
    if "stoichiometry" not in column_names(found["test_sequences"], "test_sequences"):
        warn(
            f"{found['test_sequences'].name}: no column stoichiometry, which part 2 ships; every target counts as one "
            "chain. Next: COMP=rna3d if these are the files of part 1."
        )
    return found


def clean(raw: dict[str, Path], out: dict[str, Path]) -> dict[str, Any]:
    """Write the clean tables train, later, test, references and sample; of the test set alone, if `out` has no train.

    Args:
        raw: label -> raw file, as `raw_files` gives it.
        out: table -> parquet path to write.

    Returns:
        JSON-able facts: rows, what was dropped and why, lengths, resolved shares, ranges.

    Raises:
        DataError: a file is damaged or the files contradict each other; file and row are named.
    """
    if "train" not in out:
        odd_test, sample = rna3d_hidden.read_tests(raw["test_sequences"], raw.get("sample_submission"))
        test = _as_read(odd_test)
        _write({"test": test, "sample": sample}, out)
        return {"test_rows": test.height, "test_lengths": tell_lengths(test["sequence"]), "sample_rows": sample.height}
    odd_test = rna3d_files.read_sequences(raw["test_sequences"], "test_sequences")
    sample = rna3d_files.read_sample(raw["sample_submission"], odd_test)
    test = _as_read(odd_test)
    _tell_later_versions(raw)
    train, facts = _train_sequences(raw["train_sequences"])
    dropped = facts["train"]["odd_letter_ids"]
    labels = rna3d_files.read_labels(raw["train_labels"], "train_labels", sequences=train, ignore=dropped)
    references = _conformers(labels)
    train = _train_table(_dated(train, raw.get("release_dates")), references, raw.get("train_clusters"))
    facts["train"] |= {"rows": train.height, "without_labels": facts["train"]["sequences"] - train.height}
    train, later = _split_by_date(train, test, raw["train_sequences"])
    teaches_nothing = train.filter(~pl.col("teaches"))["sequence_id"].to_list()
    undated = train["temporal_cutoff"].null_count()
    facts["train"] |= {"later": later.height, "no_date_in_the_files": undated, "teaches_nothing": teaches_nothing}
    if "validation_labels" in raw:
        known = _validation(raw, train_ids=pl.concat([train, later])["sequence_id"])
        references = pl.concat([references, known]).sort("sequence_id", "conformer")
    _write({"train": train, "later": later, "test": test, "references": references, "sample": sample}, out)
    return facts | _describe(train, test, references, sample, odd_test)


def _write(tables: dict[str, pl.DataFrame], out: dict[str, Path]) -> None:
    for name, table in tables.items():
        table.write_parquet(out[name], compression="zstd", compression_level=3, row_group_size=65536)


def _tell_later_versions(raw: dict[str, Path]) -> None:
    """Part 1 ships ``train_sequences.v2.csv`` beside the first ones, with six times the targets."""
    found = {name for path in raw.values() for name in names_beside(path) if re.match(r"train_\w+\.v\d", name)}
    if found:
        warn(
            f"{', '.join(sorted(found))}: not read; train_sequences and train_labels without a version are. Next, to "
            "learn from these: RAW=<folder> where they have the names train_sequences.csv and train_labels.csv."
        )


def _train_sequences(path: Path) -> tuple[pl.DataFrame, dict[str, Any]]:
    table = rna3d_files.read_sequences(path, "train_sequences")
    odd = table.filter(pl.col("sequence").str.contains(_ODD))["sequence_id"].sort().to_list()
    kept = table.filter(pl.col("sequence_id").is_in(odd).not_())
    if kept.is_empty():
        raise DataError(
            f"{path.name}: no sequence of A, C, G, U only. Next: check that this is the competition's file."
        )
    facts = {"sequences": table.height - len(odd), "odd_letter_ids": odd}
    return kept, {"train": facts}


def _conformers(labels: pl.DataFrame) -> pl.DataFrame:
    """sequence_id, conformer, x, y, z, chain, copy lists: one row per conformation with a resolved residue.

    ``chain`` and ``copy`` say to which copy of which chain a residue belongs; null where the labels do not.
    """
    assembly = [
        pl.when(pl.col(name).is_null().all()).then(None).otherwise(pl.col(name).cast(kind).implode()).alias(name)
        for name, kind in ASSEMBLY.items()
    ]
    parts = []
    for number in sorted(int(name[2:]) for name in labels.columns if name.startswith("x_")):
        lists = [pl.col(f"{axis}_{number}").cast(pl.Float32).alias(axis) for axis in AXES]
        part = labels.group_by("sequence_id", maintain_order=True).agg(*lists, *assembly)
        part = part.filter(pl.col("x").list.drop_nulls().list.len() > 0)
        number_of = pl.lit(number, dtype=pl.UInt8).alias("conformer")
        parts.append(part.select("sequence_id", number_of, *AXES, *ASSEMBLY))
    return pl.concat(parts).sort("sequence_id", "conformer")


def _train_table(sequences: pl.DataFrame, references: pl.DataFrame, clusters: Path | None) -> pl.DataFrame:
    """One row per training target that has labels: its first conformation."""
    first = references.filter(pl.col("sequence_id").is_first_distinct()).drop("conformer", *ASSEMBLY)
    train = sequences.join(first, on="sequence_id", how="inner", validate="1:1")
    if train.is_empty():
        raise DataError("train_labels: no target of train_sequences is labelled. Next: use files of the same release.")
    if clusters:
        train = train.join(rna3d_files.read_clusters(clusters), on="sequence_id", how="left", validate="1:1")
    else:
        train = train.with_columns(group=pl.lit(None, dtype=pl.String))
    resolved = pl.col("x").list.drop_nulls().list.len()
    return train.select(
        "sequence_id",
        "sequence",
        pl.lit("train").alias("dataset_name"),
        "group",
        "temporal_cutoff",
        (resolved >= MIN_RESOLVED).alias("scored"),
        *AXES,
        "chain_lengths",
    ).sort("sequence_id")


def _dated(sequences: pl.DataFrame, releases: Path | None) -> pl.DataFrame:
    """Training sequences with the release date of their PDB entry where they have no temporal_cutoff."""
    if releases is None:
        return sequences
    entry_of = pl.col("sequence_id").str.split("_").list.first().str.to_uppercase().alias("entry")
    dated = sequences.with_columns(entry_of).join(
        rna3d_files.read_releases(releases), on="entry", how="left", validate="m:1", maintain_order="left"
    )
    return dated.with_columns(pl.coalesce("temporal_cutoff", "released").alias("temporal_cutoff"))


def _split_by_date(train: pl.DataFrame, test: pl.DataFrame, path: Path) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Targets not known to be newer than the earliest cutoff of a test target, and those dated after it.

    Of both, ``teaches`` says whether they are known to be old enough for every test target, and of none's own entry.
    """
    own = {entry_of(name) for name, day in test.select("sequence_id", "temporal_cutoff").iter_rows() if day} - {""}
    earliest = test["temporal_cutoff"].drop_nulls().min()
    days = zip(train["sequence_id"], train["temporal_cutoff"], strict=True)
    known = [None if entry_of(name) in own else day or released_by(name) for name, day in days]
    known_N = np.array(known, dtype="datetime64[D]")
    train = train.with_columns(pl.Series("teaches", allowed_mask(earliest, known_N)))  # type: ignore[arg-type]
    if earliest is None:
        return train, train.clear()
    is_later = (pl.col("temporal_cutoff") > earliest).fill_null(False)
    kept, later = train.filter(is_later.not_()), train.filter(is_later)
    doubtful = int((~kept["teaches"]).sum())
    if doubtful == kept.height:
        raise DataError(
            f"{path.name}: none of {train.height} labelled targets is known to be of {earliest!s} or before, the "
            f"earliest temporal_cutoff of test_sequences ({later.height} are dated after it). Next: give them a "
            f"temporal_cutoff, or put {RELEASES}.csv beside it."
        )
    if doubtful:
        warn(
            f"{path.name}: {doubtful} of {kept.height} labelled targets have no date that shows them to be of "
            f"{earliest!s} or before, or are of a test target's entry; they are predicted and scored, and nothing "
            f"learns from them. Next: give them a temporal_cutoff, or put {RELEASES}.csv (Entry ID, Release Date) "
            "beside it."
        )
    return kept, later


def read_teaching(train: Path) -> set[str]:
    """Ids of the targets of a clean train table from which something may be learned for the test targets."""
    table = pl.scan_parquet(train)
    if "teaches" in table.collect_schema().names():
        table = table.filter("teaches")
    return set(table.select("sequence_id").collect()["sequence_id"])


def _validation(raw: dict[str, Path], *, train_ids: pl.Series) -> pl.DataFrame:
    path = raw["validation_sequences"]
    sequences = rna3d_files.read_sequences(path, "validation_sequences")
    twice = pl.col("sequence_id").is_in(train_ids.to_list())
    rna3d_files.refuse(sequences, twice, path, "this target is in train_sequences too")
    return _conformers(rna3d_files.read_labels(raw["validation_labels"], "validation_labels", sequences=sequences))


def _as_read(tests: pl.DataFrame) -> pl.DataFrame:
    """The clean table of test sequences, odd letters replaced for the model."""
    model = pl.col("sequence").str.replace_all(_ODD, ODD_LETTER_AS)
    columns = ("sequence_id", model, "temporal_cutoff", "stoichiometry", "chain_lengths")
    return tests.sort("sequence_id").select(columns)


def _describe(
    train: pl.DataFrame, test: pl.DataFrame, references: pl.DataFrame, sample: pl.DataFrame, raw_test: pl.DataFrame
) -> dict[str, Any]:
    """The validation report that stands beside the tables."""
    x = train["x"].explode()
    largest = max(float(np.nanmax(np.abs(references[axis].explode().to_numpy()))) for axis in AXES)
    odd = raw_test.filter(pl.col("sequence").str.contains(_ODD))["sequence_id"].to_list()
    same = train.filter(pl.col("sequence").is_in(test["sequence"].to_list()))["sequence_id"].to_list()
    return {
        "train_lengths": tell_lengths(train["sequence"]),
        "train_scored": int(train["scored"].sum()),
        "train_groups": train["group"].n_unique() if train["group"].null_count() < train.height else 0,
        "train_residues": x.len(),
        "train_unresolved": x.null_count(),
        "train_equal_to_test": same,
        "test_rows": test.height,
        "test_lengths": tell_lengths(test["sequence"]),
        "test_multi_chain": test.filter(pl.col("chain_lengths").list.len() > 1)["sequence_id"].to_list(),
        "test_odd_letters": {"ids": odd, "read_as": ODD_LETTER_AS},
        "references": references.height,
        "reference_targets": references["sequence_id"].n_unique(),
        "most_conformers": int(references["conformer"].to_numpy().max()),
        "largest_coordinate": round(largest, 3),
        "sample_rows": sample.height,
    }


RNA3D = Competition(
    name="rna3d",
    title="Stanford RNA 3D Folding",
    slug="stanford-rna-3d-folding",
    files=(
        "train_sequences.csv",
        "train_labels.csv",
        "validation_sequences.csv",
        "validation_labels.csv",
        "test_sequences.csv",
        "sample_submission.csv",
    ),
    task="structure",
    row_key="ID",
    default_model="small_structure",
    targets=AXES,
    target_range=None,
    signal_to_noise=None,
    metric="TM-score",
    error_sums=None,
    score=None,
    tables=("train", "later", "test", "references", "sample"),
    raw_files=raw_files,
    clean=clean,
    test_inputs=("test_sequences", "sample_submission"),
    test_tables=("test", "sample"),
)

#: The second part, whose files have more columns and another address; everything else is the same.
RNA3D2 = replace(
    RNA3D, name="rna3d2", title=f"{RNA3D.title}, part 2", slug="stanford-rna-3d-folding-2", raw_files=_raw_files_2
)
