"""A hidden test set of RNA 3D folding, which nobody can repair, gets every row that its sample submission asks for."""

from collections.abc import Callable
from datetime import date
from pathlib import Path

import polars as pl
import pytest

from pipeline.competitions.rna3d import RNA3D
from pipeline.competitions.rna3d_hidden import NOTHING_OLDER
from pipeline.errors import DataError

TEST = {"R1107": "GGCU", "R1_b": "ANG"}


def write(folder: Path, *, tests: Callable = lambda t: t, sample: Callable | None = lambda s: s) -> Path:
    """Test files as Kaggle ships them, but for what `tests` and `sample` make of them, and no training files."""
    folder.mkdir()
    rows = [{"target_id": name, "sequence": text, "temporal_cutoff": "2022-05-28"} for name, text in TEST.items()]
    tests(pl.DataFrame(rows)).write_csv(folder / "test_sequences.csv")
    keys = [(f"{name}_{k}", letter, k) for name, text in TEST.items() for k, letter in enumerate(text, start=1)]
    table = pl.DataFrame(keys, schema=["ID", "resname", "resid"], orient="row")
    table = table.with_columns(pl.lit(0.0).alias(f"{axis}_{k}") for k in range(1, 6) for axis in "xyz")
    if sample is not None:
        sample(table).write_csv(folder / "sample_submission.csv")
    return folder


def clean(folder: Path) -> tuple[dict[str, str], pl.DataFrame, pl.DataFrame]:
    """Letters of the targets, the clean test table, and the rows of the submission."""
    out = {table: folder.parent / f"{table}.parquet" for table in RNA3D.test_tables}
    RNA3D.clean(RNA3D.raw_files(folder, test_only=True), out)
    test = pl.read_parquet(out["test"])
    return dict(test.select("sequence_id", "sequence").iter_rows()), test, pl.read_parquet(out["sample"])


OTHER_LETTERS = pl.col("resname").replace({"N": "PSU", "U": "T", "G": "x"})
TOLD: dict[str, tuple[dict[str, Callable], dict[str, str], str]] = {
    "other letters": ({"sample": lambda s: s.with_columns(OTHER_LETTERS)}, TEST, "4 rows (such as R1107_1) with"),
    "another order": ({"sample": lambda s: s.reverse()}, TEST, ""),
    "a row twice": ({"sample": lambda s: pl.concat([s, s.head(1)])}, TEST, ""),
    "no resid": ({"sample": lambda s: s.drop("resid")}, TEST, ""),
    "targets left out": ({"sample": lambda s: s.head(4)}, {"R1107": "GGCU"}, "(such as R1_b) without a row in"),
    "residues left out": ({"sample": lambda s: s.filter(pl.col("resid") > 1)}, TEST, ""),
    "targets that are only there": ({"tests": lambda t: t.head(1)}, TEST, "(such as R1_b) that test_sequences.csv"),
    "longer targets": (
        {"tests": lambda t: t.with_columns(pl.col("sequence").str.slice(0, 2))},
        TEST,
        "2 targets (such as R1107) longer than",
    ),
    "an empty sequence": ({"tests": lambda t: t.with_columns(pl.col("sequence").replace("ANG", ""))}, TEST, ""),
    "a target twice": ({"tests": lambda t: pl.concat([t, t.head(1)])}, TEST, "(such as R1107) without an id"),
    "no such stoichiometry": (
        {"tests": lambda t: t.with_columns(stoichiometry=pl.lit("dimer"))},
        TEST,
        "2 targets (such as R1107) with a stoichiometry",
    ),
}


@pytest.mark.parametrize("case", TOLD)
def test_the_rows_of_the_sample_are_predicted_and_what_was_made_of_them_is_told(
    case: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """`rna data` refused these, and the notebook ended with "rna data ended with 3" and no submission."""
    changes, expected, told = TOLD[case]
    folder = write(tmp_path / "raw", **changes)
    letters, _, rows = clean(folder)
    assert letters == {name: text.replace("N", "A") for name, text in expected.items()}
    own = pl.read_csv(folder / "sample_submission.csv")
    for name in ("ID", "resname", "resid"):
        assert name not in own or rows[name].to_list() == own[name].to_list()
    assert told in " ".join(capsys.readouterr().err.split())


def test_without_a_sample_every_residue_is_a_row(tmp_path: Path):
    """The notebook ended with "no folder below it holds … sample_submission.csv", and so without training files."""
    _, _, rows = clean(write(tmp_path / "raw", sample=None))
    assert rows["ID"].to_list() == [f"{name}_{k}" for name, text in TEST.items() for k in range(1, len(text) + 1)]
    assert "".join(rows["resname"]) == "GGCUANG"


@pytest.mark.parametrize(
    ("text", "day"),
    [
        ("2022-05-28 00:00:00", date(2022, 5, 28)),
        ("05/28/2022", date(2022, 5, 28)),
        ("03/04/2022", date(2022, 3, 4)),
        ("28-May-2022", date(2022, 5, 28)),
        ("soon", NOTHING_OLDER),
        ("", None),
    ],
)
def test_a_cutoff_is_never_read_as_a_later_day_than_it_may_be(tmp_path: Path, text: str, day: date | None):
    folder = write(tmp_path / "raw", tests=lambda t: t.with_columns(temporal_cutoff=pl.lit(text)))
    assert clean(folder)[1]["temporal_cutoff"].to_list() == [day, day]


def test_a_test_set_of_nothing_is_one(tmp_path: Path):
    letters, _, rows = clean(write(tmp_path / "raw", tests=pl.DataFrame.clear, sample=pl.DataFrame.clear))
    assert (letters, rows.height) == ({}, 0)


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        (
            lambda s: s.with_columns((pl.lit("Q") + pl.col("ID")).alias("ID")),
            "none of its 2 targets, such as QR1107, is in",
        ),
        (lambda s: s.select(pl.lit(0).alias("id"), "x_1"), "column 'ID', 'y_1'.* is missing"),
        (lambda s: s.with_columns(pl.lit("R1107_0").alias("ID")), "row 1 .*'R1107_0'; expected <target_id>_<residue"),
        (lambda s: s.with_columns(pl.lit("R1107").alias("ID")), "row 1: ID 'R1107'; expected <target_id>_<residue"),
    ],
)
def test_a_sample_of_something_else_is_refused(tmp_path: Path, change: Callable, sentence: str):
    with pytest.raises(DataError, match=sentence):
        clean(write(tmp_path / "raw", sample=change))
