"""A hidden test set of Stanford RNA 3D Folding, which a rerun brings: every row of its sample is to get coordinates.

Nobody can repair these files. What `rna3d_files` would refuse is read as well as it can be, and told; a sample of
another competition, or of other targets, is refused all the same.
"""

from collections.abc import Mapping
from datetime import date
from pathlib import Path

import polars as pl
import pyarrow as pa

from pipeline.competitions.raw import column_names, read_table, require_columns
from pipeline.competitions.rna3d_files import (
    ID_AND_NUMBER,
    SAMPLE_COLUMNS,
    letters_of,
    read_sequence_columns,
    refuse,
    with_chains,
)
from pipeline.errors import DataError
from pipeline.runlog import amount, warn

#: In place of a cutoff that cannot be read: nothing is older, so that nothing too new is learned from.
NOTHING_OLDER = date(1, 1, 1)
_DATES = ("%Y/%m/%d", "%Y%m%d", "%m/%d/%Y", "%d/%m/%Y", "%d-%b-%Y", "%d %b %Y")
_MOST = 65_535  # nt, as of pairs


def read_tests(path: Path, sample: Path | None) -> tuple[pl.DataFrame, pl.DataFrame]:
    """The test sequences, as `rna3d_files.read_sequences` gives them, and ``ID, resname, resid`` of the submission.

    The sample decides which rows there are, how they are called and their order; targets and residues that
    test_sequences lacks are read from its resnames. Without one every residue of the test sequences is a row.

    Raises:
        DataError: a file is damaged, or the sample of another competition, or of none of these targets.
    """
    tests = _read_sequences(path)
    if sample is None:
        warn(f"{path.parent}: no sample_submission; the rows are those of {path.name}, in its order")
        return with_chains(tests.filter(pl.col("sequence") != "")), _rows_of(tests)
    rows = _read_rows(sample)
    return with_chains(_completed(tests, rows, path, sample)), _named(rows, tests)


def _read_sequences(path: Path) -> pl.DataFrame:
    table = read_sequence_columns(path, "test_sequences", may_be_empty=True)
    again = (pl.col("sequence_id") == "") | pl.col("sequence_id").is_first_distinct().not_()
    _tell(table.filter(again), path, "without an id of its own left out")
    table = table.filter(again.not_())
    readable = [pl.col("cutoff_text").str.slice(0, 10).str.to_date("%Y-%m-%d", strict=False)]
    readable += [pl.col("cutoff_text").str.to_date(form, strict=False) for form in _DATES]
    given = pl.col("cutoff_text") != ""
    day = pl.min_horizontal(readable)  # of a date that can be read in two ways the earlier one
    table = table.with_columns(pl.when(given).then(day.fill_null(NOTHING_OLDER)).alias("temporal_cutoff"))
    unread = table.filter(pl.col("temporal_cutoff") == NOTHING_OLDER)
    _tell(unread, path, "with a temporal_cutoff that is no date: nothing dated is used for it")
    odd = (pl.col("stoichiometry") != "") & pl.col("is_stoichiometry").not_()
    _tell(table.filter(odd), path, "with a stoichiometry that cannot be read: one chain")
    return table.with_columns(pl.when(odd).then(pl.lit("")).otherwise("stoichiometry").alias("stoichiometry"))


def _read_rows(path: Path) -> pl.DataFrame:
    """row, ID, resname, resid (null where the file has none), sequence_id, position of the sample submission."""
    names = column_names(path, "sample_submission")
    require_columns(names, ["ID", *SAMPLE_COLUMNS], where=path.name)
    given = [name for name in ("resname", "resid") if name in names]
    types = dict.fromkeys(["ID", *given], pa.string())
    rows = pl.DataFrame(read_table(path, "sample_submission", types, multiline=True, may_be_empty=True))
    lacking = [pl.lit("").alias(name) for name in ("resname", "resid") if name not in given]
    rows = rows.with_columns(lacking).with_row_index("row", offset=1)
    rows = rows.with_columns(
        pl.col("resid").str.strip_chars().cast(pl.Int32, strict=False),
        pl.col("ID").str.extract(ID_AND_NUMBER, 1).alias("sequence_id"),
        pl.col("ID").str.extract(ID_AND_NUMBER, 2).cast(pl.Int32, strict=False).alias("position"),
    )
    wrong = pl.col("sequence_id").is_null() | pl.col("position").is_between(1, _MOST).fill_null(False).not_()
    refuse(rows, wrong, path, "ID {ID!r}; expected <target_id>_<residue number>, such as R1107_1")
    return rows


def _completed(tests: pl.DataFrame, rows: pl.DataFrame, path: Path, sample: Path) -> pl.DataFrame:
    """The tests that the sample asks for, each as long as that, and with what it alone has."""
    asked = rows.group_by("sequence_id", maintain_order=True).agg(pl.col("position").max().alias("residues"))
    strangers = asked.join(tests, on="sequence_id", how="anti", maintain_order="left")
    if tests.height and asked.height and strangers.height == asked.height:
        raise DataError(
            f"{sample.name}: none of its {amount(asked.height, 'target')}, such as {asked['sequence_id'][0]}, is in "
            f"{path.name}; expected the same. Next: see that both are of one set."
        )
    _tell(strangers, sample, f"that {path.name} lacks, read from resname")
    if asked.height:
        _tell(tests.join(asked, on="sequence_id", how="anti"), path, f"without a row in {sample.name} left out")
        tests = tests.join(asked, on="sequence_id", how="semi", maintain_order="left")
    else:
        _tell(tests, path, f"left out: {sample.name} has no row")
        tests = tests.clear()
    added = strangers.select("sequence_id").with_columns(
        [pl.lit("").alias(name) for name in ("sequence", "stoichiometry", "all_sequences")],
        temporal_cutoff=pl.lit(NOTHING_OLDER),
    )
    tests = pl.concat([tests, added], how="diagonal_relaxed").join(asked, on="sequence_id", maintain_order="left")
    short = pl.col("sequence").str.len_chars() < pl.col("residues")
    _tell(
        tests.filter(short & (pl.col("sequence") != "")),
        sample,
        f"longer than in {path.name}: the rest is read from resname",
    )
    letters = _letters(rows)
    whole = [text + letters[name][len(text) :] for name, text in tests.select("sequence_id", "sequence").iter_rows()]
    tests = tests.with_columns(pl.Series("sequence", whole, dtype=pl.String)).drop("residues")
    known = rows.join(tests.select("sequence_id", "sequence"), on="sequence_id", maintain_order="left")
    there = known["sequence"].str.slice(known["position"] - 1, 1)
    other = known.with_columns(there=there, said=letters_of("resname")).filter(
        pl.col("said").ne_missing(pl.col("there"))
    )
    _tell(other.filter(pl.col("resname") != ""), sample, f"with another letter than {path.name}, which stays", "row")
    return tests


def _letters(rows: pl.DataFrame) -> dict[str, str]:
    """Target -> what the sample calls its residues, from 1 on; N where that is no letter."""
    found: dict[str, dict[int, str]] = {}
    for name, position, said in rows.select("sequence_id", "position", letters_of("resname")).iter_rows():
        found.setdefault(name, {})[position] = said if len(said) == 1 else "N"
    return {name: "".join(at.get(k, "N") for k in range(1, max(at) + 1)) for name, at in found.items()}


def _rows_of(tests: pl.DataFrame) -> pl.DataFrame:
    table = tests.filter(pl.col("sequence") != "").select(
        "sequence_id", pl.col("sequence").str.split("").alias("resname")
    )
    table = table.explode("resname").with_columns(
        resid=pl.int_range(1, pl.len() + 1, dtype=pl.Int32).over("sequence_id")
    )
    return table.select(pl.format("{}_{}", "sequence_id", "resid").alias("ID"), "resname", "resid")


def _named(rows: pl.DataFrame, tests: pl.DataFrame) -> pl.DataFrame:
    """ID, resname, resid of a sample: its own, and where it has none those of the tests."""
    letters: Mapping[str, str] = dict(tests.select("sequence_id", "sequence").iter_rows())
    own = [
        said or letters.get(name, "")[position - 1 : position] or "N"
        for said, name, position in rows.select("resname", "sequence_id", "position").iter_rows()
    ]
    named = rows.with_columns(pl.Series("resname", own, dtype=pl.String), pl.coalesce("resid", "position"))
    return named.select("ID", "resname", "resid")


def _tell(some: pl.DataFrame, path: Path, sentence: str, what: str = "target") -> None:
    """Warn of targets or rows of which something is changed or left out, the first of them by name."""
    if some.height:
        first = some["ID" if what == "row" else "sequence_id"][0]
        warn(f"{path.name}: {amount(some.height, what)} (such as {first or 'one without a name'}) {sentence}")
