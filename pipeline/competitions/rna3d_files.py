"""The files of Stanford RNA 3D Folding as Kaggle ships them, read and checked: what is refused is named by its row.

Labels are wide (1 to 40 conformations side by side), in any row order, with -1e18 or empty cells where a residue was
not resolved.
"""

import re
from collections.abc import Sequence
from pathlib import Path

import polars as pl
import pyarrow as pa

from pipeline.competitions.raw import column_names, read_table, require_columns
from pipeline.errors import DataError
from pipeline.schema import CANDIDATES, MAX_COORDINATE, SENTINEL

AXES = ("x", "y", "z")
ASSEMBLY = {"chain": pl.String, "copy": pl.Int32}  #: of a residue, in the labels of part 2
RELEASES = "pdb_release_dates_NA"  #: file of part 2
_RELEASE_COLUMNS = {"Entry ID": pa.string(), "Release Date": pa.string()}
#: What a sample submission is known by.
SAMPLE_COLUMNS = [f"{axis}_{number}" for number in range(1, CANDIDATES + 1) for axis in AXES]
ID_AND_NUMBER = r"^(.+)_(\d+)$"  #: as `pipeline.schema.split_id`, for a whole column
_COPIES = re.compile(r"([^:;\s]+):([1-9]\d*)")  # of stoichiometry: chain name and how many copies of it
_CHAIN_NAMES = re.compile(r"(\w+)(?:\[auth (\w+)\])?")
_KEY = {"ID": pa.string(), "resname": pa.string(), "resid": pa.int64()}


def read_sequences(path: Path, label: str) -> pl.DataFrame:
    """row, sequence_id, sequence (upper case, U for T, odd letters kept), temporal_cutoff (date or null), and of part 2
    stoichiometry and chain_lengths (null where not given)."""
    table = read_sequence_columns(path, label)
    refuse(table, pl.col("sequence_id") == "", path, "target_id is empty; expected an id")
    refuse(table, pl.col("sequence") == "", path, "empty sequence; expected letters A, C, G, U")
    refuse(table, pl.col("sequence_id").is_first_distinct().not_(), path, "this target_id was there already")
    table = table.with_columns(pl.col("cutoff_text").str.to_date("%Y-%m-%d", strict=False).alias("temporal_cutoff"))
    bad_date = (pl.col("cutoff_text") != "") & pl.col("temporal_cutoff").is_null()
    refuse(table, bad_date, path, "temporal_cutoff is no date; expected YYYY-MM-DD")
    odd = (pl.col("stoichiometry") != "") & pl.col("is_stoichiometry").not_()
    refuse(table, odd, path, "stoichiometry is not <chain>:<copies>;…, such as A:2;B:1")
    return with_chains(table)


def read_sequence_columns(path: Path, label: str, *, may_be_empty: bool = False) -> pl.DataFrame:
    """row, sequence_id, sequence, cutoff_text, stoichiometry, is_stoichiometry, all_sequences; "" = not given."""
    names, optional = column_names(path, label), ("temporal_cutoff", "stoichiometry", "all_sequences")
    given = [name for name in optional if name in names]
    types = dict.fromkeys(["target_id", "sequence", *given], pa.string())
    table = _read(path, label, types, may_be_empty=may_be_empty)
    table = table.with_columns(pl.lit("").alias(name) for name in optional if name not in given)
    whole = f"^{_COPIES.pattern}(;{_COPIES.pattern})*$"
    return table.select(
        "row",
        pl.col("target_id").str.strip_chars().alias("sequence_id"),
        letters_of("sequence"),
        pl.col("temporal_cutoff").str.strip_chars().alias("cutoff_text"),
        pl.col("stoichiometry").str.strip_chars(),
        pl.col("stoichiometry").str.strip_chars().str.contains(whole).alias("is_stoichiometry"),
        "all_sequences",
    )


def with_chains(table: pl.DataFrame) -> pl.DataFrame:
    """What `read_sequences` gives, of its columns as they are read."""
    lengths = [chain_lengths(*row) for row in table.select("sequence", "stoichiometry", "all_sequences").iter_rows()]
    return table.with_columns(
        pl.col("stoichiometry").replace("", None),
        pl.Series("chain_lengths", lengths, dtype=pl.List(pl.Int32)),
    ).drop("cutoff_text", "is_stoichiometry", "all_sequences")


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


def read_labels(path: Path, label: str, *, sequences: pl.DataFrame, ignore: Sequence[str] = ()) -> pl.DataFrame:
    """row, ID, sequence_id, resid, chain, copy, x_1, y_1, z_1, …: Float64, null where not resolved."""
    names = column_names(path, label)
    require_columns(names, [*_KEY, "x_1"], where=path.name)
    numbers = sorted(int(name[2:]) for name in names if re.fullmatch(r"x_\d+", name))
    columns = [f"{axis}_{number}" for number in numbers for axis in AXES]
    types = _KEY | dict.fromkeys(columns, pa.float64())
    types |= {name: pa.string() if name == "chain" else pa.int64() for name in ASSEMBLY if name in names}
    table = _with_residue(_read(path, label, types), path)
    table = table.with_columns(pl.lit(None, kind).alias(name) for name, kind in ASSEMBLY.items() if name not in names)
    table = table.filter(pl.col("sequence_id").is_in(list(ignore)).not_())
    table = _match_sequences(table, sequences, path, other="the sequences file")
    return _coordinates(table, columns, path).sort("sequence_id", "resid")


def _coordinates(table: pl.DataFrame, columns: list[str], path: Path) -> pl.DataFrame:
    """Å, with sentinels and NaN as null."""
    value = pl.col(columns)
    numbers = table.with_columns(pl.when(value.is_nan() | (value <= SENTINEL)).then(None).otherwise(value).name.keep())
    for name in columns:
        far = pl.col(name).abs() > MAX_COORDINATE
        refuse(numbers, far, path, f"{name} is beyond {MAX_COORDINATE:,.0f} Å; expected a coordinate or -1e18")
    for x, y, z in zip(*[iter(columns)] * 3, strict=True):
        given = pl.sum_horizontal(pl.col(x, y, z).is_not_null())
        refuse(numbers, given.is_between(1, 2), path, f"{x}, {y}, {z} are there only in part; expected all or none")
    return numbers


def read_sample(path: Path, test: pl.DataFrame) -> pl.DataFrame:
    """ID, resname, resid in the sample submission's row order."""
    require_columns(column_names(path, "sample_submission"), [*_KEY, *SAMPLE_COLUMNS], where=path.name)
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


def read_clusters(path: Path) -> pl.DataFrame:
    names = column_names(path, "train_clusters")
    cluster = next((name for name in names if "cluster" in name), "cluster")
    require_columns(names, ["target_id", cluster], where=path.name)
    table = _read(path, "train_clusters", {"target_id": pa.string(), cluster: pa.string()})
    table = table.rename({"target_id": "sequence_id", cluster: "group"})
    refuse(table, pl.col("sequence_id").is_first_distinct().not_(), path, "this target_id was there already")
    return table.drop("row")


def read_releases(path: Path) -> pl.DataFrame:
    """entry (PDB id, upper case) and released, its date."""
    table = _read(path, RELEASES, _RELEASE_COLUMNS)
    entry, day = (pl.col(name).str.strip_chars() for name in _RELEASE_COLUMNS)
    table = table.select(
        "row",
        entry.str.to_uppercase().alias("entry"),
        day.str.slice(0, 10).str.to_date("%Y-%m-%d", strict=False).alias("released"),
    )
    refuse(table, pl.col("released").is_null(), path, "Release Date is no date; expected YYYY-MM-DD")
    table = table.unique(["entry", "released"], maintain_order=True, keep="first")
    refuse(table, pl.col("entry").is_first_distinct().not_(), path, "this Entry ID had another date before")
    return table.drop("row")


def _with_residue(table: pl.DataFrame, path: Path) -> pl.DataFrame:
    """Add sequence_id and resid, both read from ID and checked against the resid column."""
    table = table.with_columns(
        pl.col("ID").str.extract(ID_AND_NUMBER, 1).alias("sequence_id"),
        pl.col("ID").str.extract(ID_AND_NUMBER, 2).cast(pl.Int64, strict=False).alias("number"),
        letters_of("resname"),
    )
    unnumbered = pl.col("sequence_id").is_null() | pl.col("number").is_null()
    refuse(table, unnumbered, path, "ID {ID!r}; expected <target_id>_<residue number>, such as R1107_1")
    differs = pl.col("number").ne_missing(pl.col("resid"))
    refuse(table, differs, path, "resid is not the number at the end of ID")
    twice = pl.struct("sequence_id", "resid").is_first_distinct().not_()
    refuse(table, twice, path, "this residue was there already; expected each resid once")
    return table.drop("number")


def _match_sequences(table: pl.DataFrame, sequences: pl.DataFrame, path: Path, *, other: str) -> pl.DataFrame:
    """Check that rows of residues spell the sequences of their targets, from 1 to L without a gap."""
    table = table.join(sequences.select("sequence_id", "sequence"), on="sequence_id", how="left", validate="m:1")
    table = table.sort("row")
    refuse(table, pl.col("sequence").is_null(), path, f"this target is not in {other}")
    length = pl.col("sequence").str.len_chars()
    beyond = (pl.col("resid") < 1) | (pl.col("resid") > length)
    refuse(table, beyond, path, "resid is outside the target's sequence")
    spelt = table.with_columns(expected=pl.col("sequence").str.slice(pl.col("resid") - 1, 1))
    differs, what = pl.col("resname").ne_missing(pl.col("expected")), f"resname {{resname!r}}, but {other} has "
    refuse(spelt, differs, path, what + "{expected!r} there", key="ID", then="use files of the same release")
    counts = table.group_by("sequence_id").agg(pl.len().alias("count"), pl.col("sequence").first()).sort("sequence_id")
    short = counts.filter(pl.col("count") != pl.col("sequence").str.len_chars())
    if not short.is_empty():
        target, count, sequence = short.row(0)
        raise DataError(
            f"{path.name}: target {target} has {count} of {len(sequence)} residues; expected 1 to {len(sequence)} "
            f"complete{_more(short, 'targets')}. Next: download the file again."
        )
    return table.drop("sequence")


def _read(path: Path, label: str, types: dict[str, pa.DataType], *, may_be_empty: bool = False) -> pl.DataFrame:
    """Some columns of a raw table, its data rows numbered from 1."""
    require_columns(column_names(path, label), list(types), where=path.name)
    table = pl.DataFrame(read_table(path, label, types, multiline=True, may_be_empty=may_be_empty))
    return table.with_row_index("row", offset=1)


def letters_of(column: str) -> pl.Expr:
    """Letters without blanks, in capitals, U for T."""
    return pl.col(column).str.strip_chars().str.to_uppercase().str.replace_all("T", "U", literal=True).alias(column)


def refuse(
    table: pl.DataFrame,
    wrong: pl.Expr,
    path: Path,
    sentence: str,
    *,
    key: str = "sequence_id",
    then: str = "repair or download the file again",
) -> None:
    """Raise DataError for the first row that is wrong, saying how many there are.

    Args:
        table: with the column ``row``.
        wrong: which rows are.
        path: of the file.
        sentence: what is wrong; {column} stands for what the row has there.
        key: column that names the row, where it has one.
        then: what to do.
    """
    bad = table.filter(wrong)
    if bad.height:
        first = bad.row(0, named=True)
        name = f" ({first[key]})" if first.get(key) else ""
        told = f"{path.name}: row {first['row']:,}{name}: {sentence.format(**first)}"
        raise DataError(f"{told}{_more(bad, 'rows')}. Next: {then}.")


def _more(bad: pl.DataFrame, what: str) -> str:
    """How many there are like the first one, which is named."""
    return f" ({bad.height:,} {what} like this)" if bad.height > 1 else ""
