"""Tables as people have them: empty rows, odd signs, columns without names, types of other programs.

What is read is read right, and what is refused is refused with the row that a spreadsheet shows, less the header.
"""

import gzip
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline import preprocess
from pipeline.competitions import get_competition
from pipeline.competitions.ribonanza import RIBONANZA
from pipeline.errors import DataError
from pipeline.paths import Paths
from pipeline.synthetic import write_ribonanza

SEQUENCES = ["GGAAC", "CCUUG", "ACGUA", "UGCAU"]
VALUES = [[0.1, 0.2, 0.3, 0.4, 0.5], [0.5, 0.4, 0.3, 0.2, 0.1], [0.2] * 4 + [0.9], [0.0, 0.1, 0.0, 0.7, 0.0]]
PROFILES = "id,sequence,shape\n" + "".join(
    f'p{k},{text},"{values}"\n' for k, (text, values) in enumerate(zip(SEQUENCES, VALUES, strict=True))
)
LABELLED = "id,sequence,label\n" + "".join(f"p{k},{text},{'xy'[k % 2]}\n" for k, text in enumerate(SEQUENCES))


@pytest.fixture
def run(raw: Path, tmp_path: Path) -> Callable[..., pl.DataFrame]:
    """The data stage of a set; its clean train table."""

    def build(kind: str, table: str = "train") -> pl.DataFrame:
        paths = Paths(comp=f"{kind}-mine", root=tmp_path / "artifacts")
        preprocess.run(get_competition(paths.comp), raw, paths)
        return pl.read_parquet(paths.clean(table))

    return build


def records(texts: list[str]) -> str:
    """JSON lines of two sequences, with these lines between them; the second one's list is too short."""
    rows = [
        json.dumps({"id": name, "sequence": "GGAAC", "shape": [0.1, 0.2, 0.3][: 3 - k] + [0.4] * 2})
        for k, name in enumerate("ab")
    ]
    return "\n".join([rows[0], *texts, rows[1]]) + "\n"


# --- rows are numbered as the file has them ---


ROW_FIVE: dict[str, tuple[str, str, str]] = {
    "csv, blank lines": ("labelled", "train.csv", "id,sequence,label\na,ACGU,x\nb,GGGA,y\n\n\nc,AC9U,x\n"),
    "csv, separators": ("labelled", "train.csv", "id,sequence,label\na,ACGU,x\nb,GGGA,y\n,,\n , ,\nc,AC9U,x\n"),
    "csv, cells": ("labelled", "train.csv", "id,sequence,label\na,ACGU,x\nb,GGGA,y\n\n\r\nc,ACGU\n"),
    "csv, numbers": (
        "labelled",
        "train.csv",
        "id,sequence,tm\na,ACGU,1.5\nb,GGGA,2.5\n\n,,\nc,ACGU,warm\n",
    ),
    "tsv": ("labelled", "train.tsv", "id\tsequence\tlabel\na\tACGU\tx\n\n\t\t\nb\tGGGA\ty\nc\tAC9U\tx\n"),
    "csv.gz": ("labelled", "train.csv.gz", "id,sequence,label\na,ACGU,x\n\nb,GGGA,y\n\nc,AC9U,x\n"),
    "test without ids": ("labelled", "test.csv", "sequence,x\nACGU,1\nGGGA,1\nACGU,1\nGG,1\nAC9U,1\n"),
    "profiles csv": ("profiles", "train.csv", 'id,sequence,shape\na,GGAAC,"1 2 3 4 5"\n\n,,\n\nb,CCU,"1 2"\n'),
    "profiles tsv": ("profiles", "train.tsv", "id\tsequence\tshape\na\tGGAAC\t1 2 3 4 5\n\n\n\t\t\nb\tCCU\t1 2\n"),
    "profiles json": ("profiles", "train.jsonl", records(["", "  ", ""])),
    "json, broken": ("profiles", "train.json", records(["", "", "", "{"])),
    "json.gz": ("profiles", "train.json.gz", records(["", "", ""])),
    "profiles test": ("profiles", "test.csv", "id,sequence\na,GG\n\n,\n\nb,GX\n"),
}


@pytest.mark.parametrize("case", ROW_FIVE)
def test_the_row_that_is_named_is_the_one_of_the_file_whatever_is_empty_before_it(case: str, raw: Path, run: Any):
    """It said row 3: blank lines and rows of separators alone did not count."""
    kind, name, text = ROW_FIVE[case]
    if name.startswith("test"):
        (raw / "train.csv").write_text(PROFILES if kind == "profiles" else LABELLED)
    if "numbers" in case:
        (raw / "columns.toml").write_text('numbers = ["tm"]')
    packed = gzip.compress(text.encode()) if name.endswith(".gz") else text.encode()
    (raw / name).write_bytes(packed)
    with pytest.raises(DataError, match=r": row 5\b"):
        run(kind)


@pytest.mark.parametrize("name", ["train_data.csv", "test_sequences.csv", "sample_submission.csv"])
def test_blank_lines_of_a_competitions_file_are_none_at_its_end_and_named_elsewhere(name: str, tmp_path: Path):
    raw, paths = tmp_path / "raw", Paths(comp="ribonanza", root=tmp_path / "artifacts")
    write_ribonanza(raw, sequences=12, test=4)
    preprocess.run(RIBONANZA, raw, paths)
    clean = [paths.clean(table).read_bytes() for table in ("train", "test")]
    text = (raw / name).read_text()
    (raw / name).write_text(text + "\n\r\n\n")
    preprocess.run(RIBONANZA, raw, paths, force=True)
    assert [paths.clean(table).read_bytes() for table in ("train", "test")] == clean
    lines = text.splitlines()
    (raw / name).write_text("\n".join([*lines[:3], "", *lines[3:]]) + "\n")
    where = "row 3: empty sequence" if name != "sample_submission.csv" else r"in [\d,]+ rows; expected"
    with pytest.raises(DataError, match=rf"{name}: .*{where}"):
        preprocess.run(RIBONANZA, raw, paths)


def test_a_line_of_spaces_after_blank_ones_is_the_row_that_is_named(tmp_path: Path):
    """It said "has 0 of … columns, a broken line" of the first blank line, three rows before."""
    raw, paths = tmp_path / "raw", Paths(comp="ribonanza", root=tmp_path / "artifacts")
    write_ribonanza(raw, sequences=12, test=4)
    with (raw / "test_sequences.csv").open("a") as file:
        file.write("\n\n   \n")
    with pytest.raises(DataError, match="row 7 has 1 of 5 columns"):
        preprocess.run(RIBONANZA, raw, paths)


# --- what is read ---


def table_of(**columns: pa.Array) -> Callable[[Path], None]:
    return lambda path: pq.write_table(pa.table(columns), path)


TEXT, LISTS = pa.array(SEQUENCES), pa.array(VALUES)
IDS = pa.array([f"p{k}" for k in range(4)])
READ: dict[str, tuple[str, Callable[[Path], Any]]] = {
    "Windows": ("train.csv", lambda path: path.write_bytes(PROFILES.replace("\n", "\r\n").encode())),
    "byte order mark": ("train.csv", lambda path: path.write_text(PROFILES, encoding="utf-8-sig")),
    "columns without names": (
        "train.csv",
        lambda path: path.write_text(PROFILES.replace("shape", "shape,,").replace(']"', ']",,')),
    ),
    "rows of separators": ("train.csv", lambda path: path.write_text(PROFILES + ",,\n,,\n")),
    "bars": (
        "train.csv",
        lambda path: path.write_text(
            "id|sequence|shape\n" + "".join(f"p{k}|{text}|{VALUES[k]}\n" for k, text in enumerate(SEQUENCES))
        ),
    ),
    "a Mac's shadow": (
        "train.csv",
        lambda path: [path.write_text(PROFILES), path.with_name("._other.csv").write_bytes(b"\0\5")],
    ),
    "texts of few values": (
        "train.parquet",
        table_of(id=IDS.dictionary_encode(), sequence=TEXT.dictionary_encode(), shape=LISTS),
    ),
    "large types": (
        "train.parquet",
        table_of(id=IDS, sequence=TEXT.cast(pa.large_string()), shape=LISTS.cast(pa.large_list(pa.float64()))),
    ),
    "json, byte order mark": (
        "train.json",
        lambda path: path.write_text(
            "".join(
                json.dumps({"id": f"p{k}", "sequence": text, "shape": values}) + "\n"
                for k, (text, values) in enumerate(zip(SEQUENCES, VALUES, strict=True))
            ),
            encoding="utf-8-sig",
        ),
    ),
}


@pytest.mark.parametrize("case", READ)
def test_what_other_programs_write_is_read_as_it_is_meant(case: str, raw: Path, run: Any):
    name, write = READ[case]
    write(raw / name)
    got = run("profiles")
    assert got["sequence_id"].to_list() == IDS.to_pylist()
    assert got["sequence"].to_list() == SEQUENCES
    assert got["shape"].to_list() == [pytest.approx(values) for values in VALUES]


def test_a_column_of_nothing_has_no_type_of_its_own(tmp_path: Path):
    """It said "column 'reactivity_0001' has type large_string", of a position that no profile measured."""
    raw, paths = tmp_path / "raw", Paths(comp="ribonanza", root=tmp_path / "artifacts")
    write_ribonanza(raw, sequences=12, test=4)
    preprocess.run(RIBONANZA, raw, paths)
    clean = paths.clean("train").read_bytes()
    table = pl.read_csv(raw / "train_data.csv", infer_schema_length=None)
    assert table["reactivity_0001"].dtype == pl.String
    table.write_parquet(raw / "train_data.parquet")
    (raw / "train_data.csv").unlink()
    preprocess.run(RIBONANZA, raw, paths)
    assert paths.clean("train").read_bytes() == clean


@pytest.mark.parametrize("kind", ["labelled", "profiles"])
def test_blanks_around_groups_are_none_and_names_that_say_nothing_are_told(kind: str, raw: Path, run: Any, capsys: Any):
    """'g ' was another group than 'g', so relatives were in two folds; ' ' was a group, of 'NA' nothing was said."""
    first, *rows = (PROFILES if kind == "profiles" else LABELLED).splitlines()
    groups = ["g ", "g", "NA", "NA", " ", ""]
    rows += [rows[0].replace("p0", "p4"), rows[1].replace("p1", "p5")]
    lines = [f"{row},{group}" for row, group in zip(rows, groups, strict=True)]
    (raw / "train.csv").write_text("\n".join([f"{first},group", *lines]) + "\n")
    assert run(kind)["group"].to_list() == ["g", "g", "NA", "NA", None, None]
    assert "train.csv: the 2 sequences of group 'NA' are taken for relatives" in capsys.readouterr().err
    (raw / "train.csv").write_text((raw / "train.csv").read_text().replace("NA", "N"))
    run(kind)
    assert "relatives" not in capsys.readouterr().err


@pytest.mark.parametrize(("end", "told"), [("", 1), ("GGG", 1), ("GGG\n", 0), ("GGG\r\n", 0)])
def test_a_last_line_without_an_end_is_told(end: str, told: int, raw: Path, run: Any, capsys: Any):
    """A file that broke off within its last cell, a sequence or a number, was read without a word."""
    (raw / "train.csv").write_bytes(f"label,sequence\nx,GGAAC\ny,CCUUG\nx,ACGUA\ny,UGC{end}".encode())
    run("labelled")
    said = "train.csv: the last line has no end: if the file was cut there, its last cell is not whole"
    assert capsys.readouterr().err.count(said) == told


# --- what is refused ---


def wide(names: list[str]) -> str:
    return ",".join(["id", "sequence", *names]) + "\na,ACGUACGUACGU" + ",0.5" * len(names) + "\n"


COMMAS = "id;sequence;shape\na;GGAAC;0,1 0,2 0,3 0,4 0,5\n"
REFUSED: dict[str, tuple[str, str, str, str]] = {
    "UTF-16 without mark": ("labelled", "", LABELLED.encode("utf-16-be").decode("latin-1"), "the first line is '.x00i"),
    "Excel's first line": ("labelled", "", "sep=,\n" + LABELLED, "the first line is 'sep=,'.* Next: remove that line"),
    "a cell more": ("labelled", "", LABELLED.replace(",y\n", ",y,\n"), "row 2 has 4 cells, 'p1,CCUUG,y,'; expected 3"),
    "decimal commas": (
        "profiles",
        "",
        COMMAS,
        r"row 1 \(id a\): shape holds '0,1 0,2 .*' *; expected .*decimal point.* Next: write",
    ),
    "wide decimal commas": (
        "profiles",
        'targets = ["s"]',
        "id;sequence;s_1;s_2\na;GG;0,1;0,2\n",
        r"s_1 holds '0,1'; expected a number, with a decimal point. Next: write decimal points",
    ),
    "wide decimal commas, untold": (
        "profiles",
        "",
        "id;sequence;s_1;s_2\na;GG;0,1;0,2\n",
        r"s_1 holds '0,1'; expected",
    ),
    "a letter in a list": (
        "profiles",
        "",
        "id,sequence,shape\na,GGAAC,1 2 3 4 5\nb,GGAAC,1 2 3 x 5\n",
        r"row 2 \(id b\): shape holds 'x' at position 4; expected a number",
    ),
    "no names, tabs": ("labelled", "", f"a\t{'ACGU' * 6}\tx\n", r"a line such as 'id<tab>sequence<tab>label'"),
    "no names, one column": ("labelled", "", "ACGU" * 6 + "\n", r"begin with the line 'sequence'\."),
    "a position missing": (
        "profiles",
        "",
        wide([f"r_{k:02d}" for k in range(1, 14) if k != 7]),
        r"r_01 to r_13 are not numbered 1, 2, 3 … without a gap",
    ),
    "positions from 0": ("profiles", "", wide([f"r{k}" for k in range(12)]), "r0 to r11 are not numbered 1, 2, 3"),
    "numbers alone": ("profiles", "", wide([f"{k}" for k in range(1, 13)]), "1 to 12 are not numbered .* after a name"),
    "two columns of a name": ("profiles", "", "id,sequence,x,x\na,GG,1,1\n", "column 'x' is there twice"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_says_what_to_do(case: str, raw: Path, run: Any):
    kind, settings, text, sentence = REFUSED[case]
    (raw / "train.csv").write_bytes(text.encode("latin-1" if "UTF" in case else "utf-8"))
    (raw / "columns.toml").write_text(settings)
    with pytest.raises(DataError, match=sentence) as caught:
        run(kind)
    assert str(caught.value).count("Next: ") == 1


@pytest.mark.parametrize("kind", ["labelled", "profiles", "ribonanza"])
@pytest.mark.parametrize(
    ("part", "flipped"), [(b"GGAAC", b"GG\xffAC"), (b"sequence", b"s\xe8quence"), (b"told", b"t\xffld")]
)
def test_a_flipped_byte_in_a_parquet_file_is_told(kind: str, part: bytes, flipped: bytes, raw: Path, tmp_path: Path):
    """Python ended with a segmentation fault or polars' panic in letters, in UnicodeDecodeError of a column's name."""
    paths = Paths(comp=kind, root=tmp_path / "artifacts")
    name = "train_data.parquet" if kind == "ribonanza" else "train.parquet"
    columns = {"sequence_id": IDS, "sequence": TEXT, "shape": LISTS, "label": pa.array(["x", "y"] * 2)}
    if kind == "ribonanza":
        write_ribonanza(raw, sequences=2, test=2)["train_data.csv"].unlink()
        columns |= {"experiment_type": pa.array(["DMS_MaP"] * 4), "dataset_name": IDS, "SN_filter": pa.array([1] * 4)}
        columns |= dict.fromkeys(("signal_to_noise", "reactivity_0001", "reactivity_error_0001"), pa.array([1.0] * 4))
    table = pa.table(columns).replace_schema_metadata({"told": "by another program"})
    pq.write_table(table, raw / name, compression="none", use_dictionary=False, store_schema=False)
    (raw / name).write_bytes((raw / name).read_bytes().replace(part, flipped))
    if part == b"told":
        assert preprocess.run(get_competition(kind), raw, paths).facts["sequences"] == 4
        return
    with pytest.raises(DataError, match=rf"{name}: .* Next: "):
        preprocess.run(get_competition(kind), raw, paths)
