"""Stanford RNA 3D Folding: sequences and C1' labels as Kaggle ships them, to clean tables.

Labels are wide (1 to 40 conformations side by side), in any row order, with -1e18 or empty cells where a residue was
not resolved. Clean tables have one row per target (train, later, test) or per known conformation (references).

What no test target with a cutoff may have seen teaches nothing. Targets dated after the earliest of these cutoffs are
in ``later``, from which templates are taken for the test targets that may use them. Targets that no date shows to be
old enough stay in ``train``, to be predicted and scored, but ``teaches`` is false there: no network, ranker or policy
learns from them. Dates are those of ``temporal_cutoff``, else of ``pdb_release_dates_NA.csv`` (part 2 ships it), else
what the PDB id tells.
"""

import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from pipeline.competitions.base import Competition
from pipeline.competitions.raw import column_names, find_table, need_table, read_table, require_columns
from pipeline.errors import DataError
from pipeline.runlog import warn
from pipeline.schema import ALPHABET, CANDIDATES, MAX_COORDINATE, MIN_RESOLVED, ODD_LETTER_AS, SENTINEL
from pipeline.templates.gate import allowed_mask, released_by

_AXES = ("x", "y", "z")
_NEEDED = ("train_sequences", "train_labels", "test_sequences", "sample_submission")
_OPTIONAL = ("validation_sequences", "validation_labels", "train_clusters")
_RELEASES, _RELEASES_IN = "pdb_release_dates_NA", "PDB_RNA"  # the file, and the folder that part 2 has it in
_RELEASE_COLUMNS = {"Entry ID": pa.string(), "Release Date": pa.string()}
_SAMPLE_COLUMNS = [f"{axis}_{number}" for number in range(1, CANDIDATES + 1) for axis in _AXES]
_ODD = f"[^{ALPHABET}]"
_ID = r"^(.+)_(\d+)$"  # as `pipeline.schema.split_id`, for a whole column
_COPIES = re.compile(r"([^:;\s]+):([1-9]\d*)")  # of stoichiometry: chain name and how many copies of it
_CHAIN_NAMES = re.compile(r"(\w+)(?:\[auth (\w+)\])?")
_ASSEMBLY = {"chain": pl.String, "copy": pl.Int32}  # of a residue, in the labels of part 2
_KEY = {"ID": pa.string(), "resname": pa.string(), "resid": pa.int64()}


def raw_files(folder: Path) -> dict[str, Path]:
    """Label -> raw file in a folder or its zip; those of validation, clusters and release dates may be absent.

    Raises:
        DataError: a needed file is missing, or validation labels came without their sequences.
    """
    found = {label: need_table(folder, label) for label in _NEEDED}
    for label in _OPTIONAL:
        path = find_table(folder, label)
        if path is not None:
            found[label] = path
    for place in (folder, folder / _RELEASES_IN):
        if "release_dates" not in found and place.is_dir() and (path := find_table(place, _RELEASES)) is not None:
            found["release_dates"] = path
    if "validation_labels" in found and "validation_sequences" not in found:
        raise DataError(f"{folder}: validation_labels came without validation_sequences.csv. Next: add that file.")
    return found


def _raw_files_2(folder: Path) -> dict[str, Path]:
    """As `raw_files`, with a word where the files look like those of part 1, which would be accepted in silence."""
    found = raw_files(folder)
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
    odd_test, test = _test_table(raw["test_sequences"])
    sample = _sample_table(raw["sample_submission"], odd_test)
    if "train" not in out:
        _write({"test": test, "sample": sample}, out)
        return {"test_rows": test.height, "test_lengths": _lengths(test), "sample_rows": sample.height}
    train, facts = _train_sequences(raw["train_sequences"])
    dropped = facts["train"]["odd_letter_ids"]
    labels = _read_labels(raw["train_labels"], "train_labels", sequences=train, ignore=dropped)
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


def _read(path: Path, label: str, types: dict[str, pa.DataType]) -> pl.DataFrame:
    """Some columns of a raw table, its data rows numbered from 1."""
    require_columns(column_names(path, label), list(types), where=path.name)
    table = pl.DataFrame(read_table(path, label, types, multiline=True))
    return table.with_row_index("row", offset=1)


def _read_sequences(path: Path, label: str) -> pl.DataFrame:
    """row, sequence_id, sequence (upper case, U for T, odd letters kept), temporal_cutoff (date or null), and of part 2
    stoichiometry and chain_lengths (null where not given)."""
    names, optional = column_names(path, label), ("temporal_cutoff", "stoichiometry", "all_sequences")
    given = [name for name in optional if name in names]
    table = _read(path, label, dict.fromkeys(["target_id", "sequence", *given], pa.string()))
    table = table.with_columns(pl.lit("").alias(name) for name in optional if name not in given)
    table = table.select(
        "row",
        pl.col("target_id").str.strip_chars().alias("sequence_id"),
        _letters("sequence"),
        pl.col("temporal_cutoff").str.strip_chars().alias("cutoff_text"),
        pl.col("stoichiometry").str.strip_chars(),
        "all_sequences",
    ).with_columns(pl.col("cutoff_text").str.to_date("%Y-%m-%d", strict=False).alias("temporal_cutoff"))
    _refuse(table, pl.col("sequence_id") == "", path, "target_id is empty; expected an id")
    _refuse(table, pl.col("sequence") == "", path, "empty sequence; expected letters A, C, G, U")
    _refuse(table, pl.col("sequence_id").is_first_distinct().not_(), path, "this target_id was there already")
    bad_date = (pl.col("cutoff_text") != "") & pl.col("temporal_cutoff").is_null()
    _refuse(table, bad_date, path, "temporal_cutoff is no date; expected YYYY-MM-DD")
    whole = f"^{_COPIES.pattern}(;{_COPIES.pattern})*$"
    odd = (pl.col("stoichiometry") != "") & pl.col("stoichiometry").str.contains(whole).not_()
    _refuse(table, odd, path, "stoichiometry is not <chain>:<copies>;…, such as A:2;B:1")
    lengths = [chain_lengths(*row) for row in table.select("sequence", "stoichiometry", "all_sequences").iter_rows()]
    return table.with_columns(
        pl.col("stoichiometry").replace("", None),
        pl.Series("chain_lengths", lengths, dtype=pl.List(pl.Int32)),
    ).drop("cutoff_text", "all_sequences")


def chain_lengths(sequence: str, stoichiometry: str, all_sequences: str) -> list[int] | None:
    """Where one chain of a target ends and the next begins: part 2 writes all copies of all chains one after the other.

    Args:
        sequence: of the target.
        stoichiometry: chain names and numbers of copies, such as ``A:2;B:1``; "" = not given.
        all_sequences: FASTA of the whole entry, whose headers name the chains.

    Returns:
        Length of every chain in the sequence's order, nt; None where the three do not fit together.

    >>> chain_lengths("GGCCAGGCCA", "A:2", "")
    [5, 5]
    >>> chain_lengths("GGCCAUU", "B:1;A:1", ">1ABC_2|Chain A|RNA|\\nUU\\n>1ABC_1|Chain B[auth B]|RNA|\\nGGCCA")
    [5, 2]
    """
    copies = [(name, int(count)) for name, count in _COPIES.findall(stoichiometry)]
    if len(copies) == 1 and sequence == sequence[: len(sequence) // copies[0][1]] * copies[0][1]:
        return [len(sequence) // copies[0][1]] * copies[0][1]
    known: dict[str, str] = {}
    for record in all_sequences.split(">")[1:]:
        header, *lines = record.splitlines()
        names = header.split("|")[1] if header.count("|") > 1 else ""
        for label, author in _CHAIN_NAMES.findall(names.removeprefix("Chains").removeprefix("Chain")):
            known[author or label] = "".join(lines).strip().upper().replace("T", "U")
    chains = [known.get(name, "") for name, count in copies for _ in range(count)]
    return [len(chain) for chain in chains] if chains and "".join(chains) == sequence else None


def _letters(column: str) -> pl.Expr:
    return pl.col(column).str.strip_chars().str.to_uppercase().str.replace_all("T", "U", literal=True).alias(column)


def _refuse(table: pl.DataFrame, wrong: pl.Expr, path: Path, sentence: str) -> None:
    """Raise DataError for the first row that is wrong, saying how many there are."""
    bad = table.filter(wrong)
    if bad.is_empty():
        return
    first = bad.row(0, named=True)
    name = f" ({first['sequence_id']})" if first.get("sequence_id") else ""
    raise DataError(
        f"{path.name}: row {first['row']:,}{name}: {sentence}{_more(bad, 'rows')}. Next: repair or download the file "
        "again."
    )


def _more(bad: pl.DataFrame, what: str) -> str:
    """How many there are like the first one, which is named."""
    return f" ({bad.height:,} {what} like this)" if bad.height > 1 else ""


def _train_sequences(path: Path) -> tuple[pl.DataFrame, dict[str, Any]]:
    table = _read_sequences(path, "train_sequences")
    odd = table.filter(pl.col("sequence").str.contains(_ODD))["sequence_id"].sort().to_list()
    kept = table.filter(pl.col("sequence_id").is_in(odd).not_())
    if kept.is_empty():
        raise DataError(
            f"{path.name}: no sequence of A, C, G, U only. Next: check that this is the competition's file."
        )
    facts = {"sequences": table.height - len(odd), "odd_letter_ids": odd}
    return kept, {"train": facts}


def _with_residue(table: pl.DataFrame, path: Path) -> pl.DataFrame:
    """Add sequence_id and resid, both read from ID and checked against the resid column."""
    table = table.with_columns(
        pl.col("ID").str.extract(_ID, 1).alias("sequence_id"),
        pl.col("ID").str.extract(_ID, 2).cast(pl.Int64, strict=False).alias("number"),
        _letters("resname"),
    )
    bad = table.filter(pl.col("sequence_id").is_null() | pl.col("number").is_null())
    if not bad.is_empty():
        row, row_id = bad.select("row", "ID").row(0)
        raise DataError(
            f"{path.name}: row {row:,}: ID {row_id!r}; expected <target_id>_<residue number>, such as R1107_1. "
            "Next: download the file again."
        )
    differs = pl.col("number").ne_missing(pl.col("resid"))
    _refuse(table, differs, path, "resid is not the number at the end of ID")
    twice = pl.struct("sequence_id", "resid").is_first_distinct().not_()
    _refuse(table, twice, path, "this residue was there already; expected each resid once")
    return table.drop("number")


def _match_sequences(table: pl.DataFrame, sequences: pl.DataFrame, path: Path, *, other: str) -> pl.DataFrame:
    """Check that rows of residues spell the sequences of their targets, from 1 to L without a gap."""
    table = table.join(sequences.select("sequence_id", "sequence"), on="sequence_id", how="left", validate="m:1")
    table = table.sort("row")
    _refuse(table, pl.col("sequence").is_null(), path, f"this target is not in {other}")
    length = pl.col("sequence").str.len_chars()
    beyond = (pl.col("resid") < 1) | (pl.col("resid") > length)
    _refuse(table, beyond, path, "resid is outside the target's sequence")
    expected = pl.col("sequence").str.slice(pl.col("resid") - 1, 1)
    wrong = table.with_columns(expected.alias("expected")).filter(pl.col("resname").ne_missing(pl.col("expected")))
    if not wrong.is_empty():
        first = wrong.row(0, named=True)
        raise DataError(
            f"{path.name}: row {first['row']:,} ({first['ID']}): resname {first['resname']!r}, but {other} has "
            f"{first['expected']!r} there{_more(wrong, 'rows')}. Next: use files of the same release."
        )
    counts = table.group_by("sequence_id").agg(pl.len().alias("count"), pl.col("sequence").first()).sort("sequence_id")
    short = counts.filter(pl.col("count") != pl.col("sequence").str.len_chars())
    if not short.is_empty():
        target, count, sequence = short.row(0)
        raise DataError(
            f"{path.name}: target {target} has {count} of {len(sequence)} residues; expected 1 to {len(sequence)} "
            f"complete{_more(short, 'targets')}. Next: download the file again."
        )
    return table.drop("sequence")


def _read_labels(path: Path, label: str, *, sequences: pl.DataFrame, ignore: Sequence[str] = ()) -> pl.DataFrame:
    """row, ID, sequence_id, resid, chain, copy, x_1, y_1, z_1, …: Float64, null where not resolved."""
    names = column_names(path, label)
    require_columns(names, [*_KEY, "x_1"], where=path.name)
    numbers = sorted(int(name[2:]) for name in names if re.fullmatch(r"x_\d+", name))
    columns = [f"{axis}_{number}" for number in numbers for axis in _AXES]
    types = _KEY | dict.fromkeys(columns, pa.float64())
    types |= {name: pa.string() if name == "chain" else pa.int64() for name in _ASSEMBLY if name in names}
    table = _with_residue(_read(path, label, types), path)
    table = table.with_columns(pl.lit(None, kind).alias(name) for name, kind in _ASSEMBLY.items() if name not in names)
    table = table.filter(pl.col("sequence_id").is_in(list(ignore)).not_())
    table = _match_sequences(table, sequences, path, other="the sequences file")
    return _coordinates(table, columns, path).sort("sequence_id", "resid")


def _coordinates(table: pl.DataFrame, columns: list[str], path: Path) -> pl.DataFrame:
    """Å, with sentinels and NaN as null."""
    value = pl.col(columns)
    numbers = table.with_columns(pl.when(value.is_nan() | (value <= SENTINEL)).then(None).otherwise(value).name.keep())
    for name in columns:
        far = pl.col(name).abs() > MAX_COORDINATE
        _refuse(numbers, far, path, f"{name} is beyond {MAX_COORDINATE:,.0f} Å; expected a coordinate or -1e18")
    for x, y, z in zip(*[iter(columns)] * 3, strict=True):
        given = pl.sum_horizontal(pl.col(x, y, z).is_not_null())
        _refuse(numbers, given.is_between(1, 2), path, f"{x}, {y}, {z} are there only in part; expected all or none")
    return numbers


def _conformers(labels: pl.DataFrame) -> pl.DataFrame:
    """sequence_id, conformer, x, y, z, chain, copy lists: one row per conformation with a resolved residue.

    ``chain`` and ``copy`` say to which copy of which chain a residue belongs; null where the labels do not.
    """
    assembly = [
        pl.when(pl.col(name).is_null().all()).then(None).otherwise(pl.col(name).cast(kind).implode()).alias(name)
        for name, kind in _ASSEMBLY.items()
    ]
    parts = []
    for number in sorted(int(name[2:]) for name in labels.columns if name.startswith("x_")):
        lists = [pl.col(f"{axis}_{number}").cast(pl.Float32).alias(axis) for axis in _AXES]
        part = labels.group_by("sequence_id", maintain_order=True).agg(*lists, *assembly)
        part = part.filter(pl.col("x").list.drop_nulls().list.len() > 0)
        number_of = pl.lit(number, dtype=pl.UInt8).alias("conformer")
        parts.append(part.select("sequence_id", number_of, *_AXES, *_ASSEMBLY))
    return pl.concat(parts).sort("sequence_id", "conformer")


def _train_table(sequences: pl.DataFrame, references: pl.DataFrame, clusters: Path | None) -> pl.DataFrame:
    """One row per training target that has labels: its first conformation."""
    first = references.filter(pl.col("sequence_id").is_first_distinct()).drop("conformer", *_ASSEMBLY)
    train = sequences.join(first, on="sequence_id", how="inner", validate="1:1")
    if train.is_empty():
        raise DataError("train_labels: no target of train_sequences is labelled. Next: use files of the same release.")
    group = (
        _read_clusters(clusters) if clusters else pl.DataFrame(schema={"sequence_id": pl.String, "group": pl.String})
    )
    train = train.join(group, on="sequence_id", how="left", validate="1:1")
    resolved = pl.col("x").list.drop_nulls().list.len()
    return train.select(
        "sequence_id",
        "sequence",
        pl.lit("train").alias("dataset_name"),
        "group",
        "temporal_cutoff",
        (resolved >= MIN_RESOLVED).alias("scored"),
        *_AXES,
        "chain_lengths",
    ).sort("sequence_id")


def _dated(sequences: pl.DataFrame, releases: Path | None) -> pl.DataFrame:
    """Training sequences with the release date of their PDB entry where they have no temporal_cutoff."""
    if releases is None:
        return sequences
    table = _read(releases, _RELEASES, _RELEASE_COLUMNS)
    entry, day = (pl.col(name).str.strip_chars() for name in _RELEASE_COLUMNS)
    table = table.select(
        "row",
        entry.str.to_uppercase().alias("entry"),
        day.str.slice(0, 10).str.to_date("%Y-%m-%d", strict=False).alias("released"),
    )
    _refuse(table, pl.col("released").is_null(), releases, "Release Date is no date; expected YYYY-MM-DD")
    table = table.unique(["entry", "released"], maintain_order=True, keep="first")
    _refuse(table, pl.col("entry").is_first_distinct().not_(), releases, "this Entry ID had another date before")
    entry_of = pl.col("sequence_id").str.split("_").list.first().str.to_uppercase().alias("entry")
    dated = sequences.with_columns(entry_of).join(
        table.drop("row"), on="entry", how="left", validate="m:1", maintain_order="left"
    )
    return dated.with_columns(pl.coalesce("temporal_cutoff", "released").alias("temporal_cutoff"))


def _split_by_date(train: pl.DataFrame, test: pl.DataFrame, path: Path) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Targets not known to be newer than the earliest cutoff of a test target, and those dated after it.

    Of both, ``teaches`` says whether they are known to be old enough for every test target.
    """
    earliest = test["temporal_cutoff"].drop_nulls().min()
    days = zip(train["sequence_id"], train["temporal_cutoff"], strict=True)
    known_N = np.array([day or released_by(name) for name, day in days], dtype="datetime64[D]")
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
            f"temporal_cutoff, or put {_RELEASES}.csv beside it."
        )
    if doubtful:
        warn(
            f"{path.name}: {doubtful} of {kept.height} labelled targets have no date that shows them to be of "
            f"{earliest!s} or before; they are predicted and scored, and nothing learns from them. Next: give them a "
            f"temporal_cutoff, or put {_RELEASES}.csv (Entry ID, Release Date) beside it."
        )
    return kept, later


def read_teaching(train: Path) -> set[str]:
    """Ids of the targets of a clean train table from which something may be learned for the test targets."""
    table = pl.scan_parquet(train)
    if "teaches" in table.collect_schema().names():
        table = table.filter("teaches")
    return set(table.select("sequence_id").collect()["sequence_id"])


def _read_clusters(path: Path) -> pl.DataFrame:
    names = column_names(path, "train_clusters")
    cluster = next((name for name in names if "cluster" in name), "cluster")
    require_columns(names, ["target_id", cluster], where=path.name)
    table = _read(path, "train_clusters", {"target_id": pa.string(), cluster: pa.string()})
    table = table.rename({"target_id": "sequence_id", cluster: "group"})
    _refuse(table, pl.col("sequence_id").is_first_distinct().not_(), path, "this target_id was there already")
    return table.drop("row")


def _validation(raw: dict[str, Path], *, train_ids: pl.Series) -> pl.DataFrame:
    path = raw["validation_sequences"]
    sequences = _read_sequences(path, "validation_sequences")
    _refuse(sequences, pl.col("sequence_id").is_in(train_ids.to_list()), path, "this target is in train_sequences too")
    return _conformers(_read_labels(raw["validation_labels"], "validation_labels", sequences=sequences))


def _test_table(path: Path) -> tuple[pl.DataFrame, pl.DataFrame]:
    """Test sequences as they came, and with odd letters replaced for the model."""
    raw = _read_sequences(path, "test_sequences").sort("sequence_id")
    model = pl.col("sequence").str.replace_all(_ODD, ODD_LETTER_AS)
    return raw, raw.select("sequence_id", model, "temporal_cutoff", "stoichiometry", "chain_lengths")


def _sample_table(path: Path, test: pl.DataFrame) -> pl.DataFrame:
    """ID, resname, resid in the sample submission's row order."""
    require_columns(column_names(path, "sample_submission"), [*_KEY, *_SAMPLE_COLUMNS], where=path.name)
    table = _read(path, "sample_submission", _KEY)
    checked = _with_residue(table, path)
    checked = _match_sequences(checked, test, path, other="test_sequences")
    absent = test.filter(pl.col("sequence_id").is_in(checked["sequence_id"].unique().to_list()).not_())
    if not absent.is_empty():
        raise DataError(
            f"{path.name}: no rows for target {absent['sequence_id'][0]} of test_sequences"
            f"{_more(absent, 'targets')}. Next: use files of the same release."
        )
    return table.select("ID", "resname", pl.col("resid").cast(pl.Int32))


def _describe(
    train: pl.DataFrame, test: pl.DataFrame, references: pl.DataFrame, sample: pl.DataFrame, raw_test: pl.DataFrame
) -> dict[str, Any]:
    """The validation report that stands beside the tables."""
    x = train["x"].explode()
    largest = max(float(np.nanmax(np.abs(references[axis].explode().to_numpy()))) for axis in _AXES)
    odd = raw_test.filter(pl.col("sequence").str.contains(_ODD))["sequence_id"].to_list()
    same = train.filter(pl.col("sequence").is_in(test["sequence"].to_list()))["sequence_id"].to_list()
    return {
        "train_lengths": _lengths(train),
        "train_scored": int(train["scored"].sum()),
        "train_groups": train["group"].n_unique() if train["group"].null_count() < train.height else 0,
        "train_residues": x.len(),
        "train_unresolved": x.null_count(),
        "train_equal_to_test": same,
        "test_rows": test.height,
        "test_lengths": _lengths(test),
        "test_multi_chain": test.filter(pl.col("chain_lengths").list.len() > 1)["sequence_id"].to_list(),
        "test_odd_letters": {"ids": odd, "read_as": ODD_LETTER_AS},
        "references": references.height,
        "reference_targets": references["sequence_id"].n_unique(),
        "most_conformers": int(references["conformer"].to_numpy().max()),
        "largest_coordinate": round(largest, 3),
        "sample_rows": sample.height,
    }


def _lengths(table: pl.DataFrame) -> dict[str, float]:
    length_N = table["sequence"].str.len_chars().to_numpy()
    return {"shortest": int(length_N.min()), "median": float(np.median(length_N)), "longest": int(length_N.max())}


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
    targets=_AXES,
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
