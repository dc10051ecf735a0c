import gzip
import shutil

import numpy as np
import polars as pl
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.competitions import get_competition
from pipeline.errors import DataError
from pipeline.paths import Paths
from submissions import check, file_blocks
from submissions.layout import IdRuns
from tests.chain_tables import make_paths, write, write_structure_data, write_values_data

RIBONANZA, RNA3D = get_competition("ribonanza"), get_competition("rna3d")
HEADER = "id,reactivity_DMS_MaP,reactivity_2A3_MaP"


@pytest.fixture
def paths(tmp_path, rng) -> Paths:
    paths = make_paths(tmp_path)
    write_values_data(paths, rng, tests=4)
    return paths


def good_lines(paths: Paths) -> list[str]:
    rows = pl.read_parquet(paths.clean("test"))["id_max"].max() + 1
    return [HEADER, *(f"{row},{row % 7 / 10:.4f},{row % 3 / 2:.4f}" for row in range(rows))]


def write_lines(path, lines: list[str], *, end: str = "\n"):
    path.write_text(end.join(lines) + end)
    return path


def run(paths: Paths, file, comp=RIBONANZA, sample=None):
    return check.run(paths, competition=comp, file=file, sample=sample)


def test_good_files_of_every_format_are_accepted(paths, tmp_path):
    lines = good_lines(paths)
    plain = write_lines(tmp_path / "a.csv", lines)
    windows = write_lines(tmp_path / "b.csv", lines, end="\r\n")
    unended = tmp_path / "c.csv"
    unended.write_text("\ufeff" + "\n".join(lines))
    zipped = tmp_path / "c.CSV.GZ"
    zipped.write_bytes(gzip.compress(plain.read_bytes()))
    table = tmp_path / "d.parquet"
    pl.read_csv(plain).write_parquet(table)
    for file, fmt in ((plain, "csv"), (windows, "csv"), (unended, "csv"), (zipped, "csv.gz"), (table, "parquet")):
        facts = run(paths, file).facts
        assert (facts["rows"], facts["format"]) == (len(lines) - 1, fmt)
        assert facts["ranges"] == {"reactivity_DMS_MaP": [0.0, 0.6], "reactivity_2A3_MaP": [0.0, 1.0]}


def swap(lines):
    lines[5], lines[6] = lines[6], lines[5]


def replace(at, text):
    def change(lines):
        lines[at] = text

    return change


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda lines: lines.pop(5), r"data row 5 \(line 6\): id 4 is missing; got 5"),
        (lambda lines: lines.pop(), r"ends after data row \d+; expected \d+ rows: id \d+ and all after it are missing"),
        (lambda lines: lines.insert(5, lines[4]), r"data row 5 \(line 6\): id 3 is a duplicate of data row 4"),
        (lambda lines: lines.append("9999,0.1,0.1"), r"an extra row \(id 9999\); expected \d+ rows"),
        (swap, r"data row 5 \(line 6\): id 5 is out of order; expected 4, which comes in data row 6"),
        (replace(3, "7777,0.1,0.1"), r"data row 3 \(line 4\): id 7777 is not in the test set; expected 2"),
        (replace(3, ",0.1,0.1"), r"data row 3 \(line 4\): id is empty; expected 2"),
        (replace(3, "2.0,0.1,0.1"), r"data row 3 \(line 4\): id is '2.0'; expected a whole number"),
        (replace(3, "2,,0.1"), r"data row 3 \(line 4\): reactivity_DMS_MaP of id 2 is empty; expected a finite number"),
        (replace(3, "2,0.1,nan"), r"data row 3 \(line 4\): reactivity_2A3_MaP of id 2 is nan"),
        (replace(3, "2,0.1,NaN"), r"data row 3 \(line 4\): reactivity_2A3_MaP of id 2 is nan"),
        (replace(3, "2,inf,0.1"), r"data row 3 \(line 4\): reactivity_DMS_MaP of id 2 is inf"),
        (replace(3, "2,-Infinity,0.1"), r"data row 3 \(line 4\): reactivity_DMS_MaP of id 2 is -inf"),
        (
            replace(3, "2,0.1,1.0001"),
            r"data row 3 \(line 4\): reactivity_2A3_MaP of id 2 is 1.0001; expected .* 0 to 1",
        ),
        (replace(3, "2,-0.1,0.5"), r"data row 3 \(line 4\): reactivity_DMS_MaP of id 2 is -0.1"),
        (replace(3, "2,0.1"), r"data row 3 \(line 4\): 2 cells \('2,0.1'\); expected 3: the file may be cut"),
        (replace(3, "2,0.1,0.1,0.1"), r"data row 3 \(line 4\): 4 cells \('2,0.1,0.1,0.1'\); expected 3\. Next"),
        (replace(3, "2,0.1,low"), r"data row 3 \(line 4\): reactivity_2A3_MaP is 'low'; expected a number"),
        (replace(3, ""), r"data row 3 \(line 4\)"),
        (replace(0, "id,reactivity_2A3_MaP,reactivity_DMS_MaP"), r"in another order: got 'id,reactivity_2A3"),
        (replace(0, "id, reactivity_DMS_MaP, reactivity_2A3_MaP"), "blanks around the names: got 'id, reactivity_DMS"),
        (replace(0, "id;reactivity_DMS_MaP;reactivity_2A3_MaP"), "other columns: .* Next: write the expected columns,"),
        (replace(0, "id_seqpos,reactivity,deg_Mg_pH10,deg_pH10,deg_Mg_50C,deg_50C"), "Next: see that COMP fits"),
        (replace(0, "id,reactivity_DMS_MaP"), "other columns: got 'id,reactivity_DMS_MaP'; expected 'id,"),
        (lambda lines: lines.pop(0), "other columns: got '0,0.0000,0.0000'"),
        (lambda lines: lines.__setitem__(slice(1, None), []), "ends after data row 0; expected"),
    ],
)
def test_every_fault_is_refused_with_its_row(paths, tmp_path, change, message):
    lines = good_lines(paths)
    change(lines)
    with pytest.raises(DataError, match=message):
        run(paths, write_lines(tmp_path / "bad.csv", lines))


def test_what_kaggle_cannot_read_by_its_name_or_letters_is_refused(paths, tmp_path):
    """A gzip file under the name of a CSV was accepted; of UTF-16 the columns were said to be others."""
    lines = "\n".join(good_lines(paths)) + "\n"
    file = tmp_path / "mine.csv"
    file.write_bytes(gzip.compress(lines.encode()))
    with pytest.raises(DataError, match=r"holds CSV.GZ; expected what the name says. Next: name it \*.csv.gz"):
        run(paths, file)
    file.write_text(lines, encoding="utf-16")
    with pytest.raises(DataError, match="text in UTF-16; expected UTF-8"):
        run(paths, file)


@pytest.mark.parametrize("block", [64, 1000])
def test_rows_are_numbered_the_same_whatever_the_block_size(paths, tmp_path, monkeypatch, block):
    monkeypatch.setattr(file_blocks, "_BLOCK_BYTES", block)
    lines = good_lines(paths)
    assert run(paths, write_lines(tmp_path / "good.csv", lines)).facts["rows"] == len(lines) - 1
    lines[77] = "76,0.5,2"
    with pytest.raises(DataError, match=r"data row 77 \(line 78\): reactivity_2A3_MaP of id 76 is 2.0"):
        run(paths, write_lines(tmp_path / "bad.csv", lines))
    lines[70] = "69,0.5,x"
    with pytest.raises(DataError, match=r"data row 70 \(line 71\): reactivity_2A3_MaP is 'x'"):
        run(paths, write_lines(tmp_path / "bad.csv", lines))


@settings(max_examples=60, deadline=None)
@given(data=st.data())
def test_any_changed_cell_or_row_is_refused(tmp_path_factory, data):
    """Whatever single line of a good file is dropped, doubled, moved or given another value is noticed."""
    folder = tmp_path_factory.mktemp("any")
    paths = make_paths(folder)
    write_values_data(paths, np.random.default_rng(1), sequences=3, tests=2)
    lines = good_lines(paths)
    at = data.draw(st.integers(1, len(lines) - 1))
    cells = lines[at].split(",")
    fault = data.draw(st.sampled_from(["drop", "double", "move", "value", "id", "cell"]))
    if fault == "drop":
        lines.pop(at)
    elif fault == "double":
        lines.insert(at, lines[at])
    elif fault == "move":
        to = data.draw(st.integers(1, len(lines) - 1).filter(lambda other: other != at))
        lines.insert(to, lines.pop(at))
    elif fault == "value":
        bad = data.draw(st.sampled_from(["", "nan", "inf", "-inf", "1.01", "-0.01", "1e9", "a", "0,5", "--"]))
        lines[at] = f"{cells[0]},{bad},{cells[2]}"
    elif fault == "id":
        wrong = data.draw(st.integers(-5, 500).filter(lambda other: other != int(cells[0])))
        lines[at] = f"{wrong},{cells[1]},{cells[2]}"
    else:
        lines[at] = ",".join(cells[: data.draw(st.integers(0, 2))])
    with pytest.raises(DataError):
        run(paths, write_lines(folder / "bad.csv", lines))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty"),
        (b"\n\n", "empty"),
        (b"<!DOCTYPE html><html><title>Sign in</title>", "a web page, not a submission"),
        (b"PAR1 and no more", "not a readable parquet file"),
    ],
)
def test_what_is_no_table_is_refused(paths, tmp_path, content, message):
    file = tmp_path / "bad.csv"
    file.write_bytes(content)
    with pytest.raises(DataError, match=message):
        run(paths, file)
    with pytest.raises(DataError, match="no such file"):
        run(paths, tmp_path / "absent.csv")


@pytest.mark.parametrize("keep", [0.5, 0.9, 0.999])
def test_cut_files_are_refused(paths, tmp_path, keep):
    whole = write_lines(tmp_path / "whole.csv", good_lines(paths)).read_bytes()
    zipped = gzip.compress(whole)
    for content in (whole[: int(len(whole) * keep) - 3], zipped[: int(len(zipped) * keep)]):
        cut = tmp_path / "cut.csv"
        cut.write_bytes(content)
        with pytest.raises(DataError, match=r"cut|missing|end early"):
            run(paths, cut)


def test_parquet_faults_are_refused_with_their_row(paths, tmp_path):
    table = pl.read_csv(write_lines(tmp_path / "good.csv", good_lines(paths)))
    null = pl.when(pl.col("id") == 4).then(None).otherwise(pl.col("reactivity_2A3_MaP")).alias("reactivity_2A3_MaP")
    for change, message in (
        (table.with_columns(null), r"data row 5: reactivity_2A3_MaP of id 4 is empty"),
        (table.reverse(), r"data row 1: id \d+ is out of order; expected 0, which comes in data row \d+"),
        (table.cast({"id": pl.Float64}), "column id is double; expected a whole number"),
        (table.cast({"reactivity_2A3_MaP": pl.String}), "column reactivity_2A3_MaP is .*string; expected a floating"),
    ):
        change.write_parquet(tmp_path / "bad.parquet")
        with pytest.raises(DataError, match=message):
            run(paths, tmp_path / "bad.parquet")


def test_sample_of_another_competition_is_refused(paths, tmp_path):
    good = write_lines(tmp_path / "good.csv", good_lines(paths))
    xyz = ",".join(f"{axis}_{number}" for number in range(1, 6) for axis in "xyz")
    other = write_lines(tmp_path / "other.csv", [f"ID,resname,resid,{xyz}", "R1_1,G,1" + ",0.0" * 15])
    with pytest.raises(DataError, match=r"other\.csv: other columns: .* \(the columns of COMP=rna3d\)"):
        run(paths, good, sample=other)


def test_sample_of_other_data_is_refused(paths, tmp_path):
    good = write_lines(tmp_path / "good.csv", good_lines(paths))
    sample = write_lines(tmp_path / "sample.csv", good_lines(paths)[:-9])
    with pytest.raises(DataError, match=r"sample\.csv: ends after .* Next: give the sample submission of the data"):
        run(paths, good, sample=sample)


def test_sample_alone_is_enough(paths, tmp_path):
    lines = good_lines(paths)
    sample = write_lines(tmp_path / "sample.csv", lines[:4] + lines[9:])
    shutil.rmtree(paths.home)
    with pytest.raises(DataError, match=r"data row 4 \(line 5\): id 3 is not in the test set; expected 8"):
        run(paths, write_lines(tmp_path / "good.csv", lines), sample=sample)
    assert run(paths, sample, sample=sample).facts["rows"] == len(lines) - 6
    with pytest.raises(DataError, match="no rows below the header"):
        run(paths, sample, sample=write_lines(tmp_path / "none.csv", lines[:1]))


def test_id_runs_agree_with_the_ids_written_out(rng):
    first_K = np.array([5, 8, 20, 0, 21])
    count_K = np.array([3, 2, 1, 4, 7])
    ids = np.concatenate([np.arange(first, first + count) for first, count in zip(first_K, count_K, strict=True)])
    keys = IdRuns(first_K, count_K)
    assert keys.rows == len(ids)
    for start in range(len(ids)):
        for stop in range(start + 1, len(ids) + 1):
            assert keys.block(start, stop)["id"].tolist() == ids[start:stop].tolist()
    home = {int(key): row for row, key in enumerate(ids)}
    assert [keys.row_of(key) for key in range(-2, 40)] == [home.get(key) for key in range(-2, 40)]


# -- structures


@pytest.fixture
def structure_paths(tmp_path, rng) -> Paths:
    paths = make_paths(tmp_path, "rna3d")
    write_structure_data(paths, rng)
    return paths


def structure_table(paths: Paths) -> pl.DataFrame:
    sample = pl.read_parquet(paths.clean("sample"))
    names = [f"{axis}_{number}" for number in range(1, 6) for axis in "xyz"]
    return sample.with_columns((5.5 * pl.col("resid") + place).alias(name) for place, name in enumerate(names))


def test_good_structure_submission_is_accepted(structure_paths, tmp_path):
    structure_table(structure_paths).write_csv(tmp_path / "good.csv")
    facts = run(structure_paths, tmp_path / "good.csv", RNA3D).facts
    assert (facts["rows"], len(facts["ranges"])) == (15, 15)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            lambda t: t.sort("ID"),
            r"data row 1 \(line 2\): ID 'Q10_1' is out of order; expected 'Q2_B_1', which comes in",
        ),
        (lambda t: t.filter(pl.col("ID") != "Q1_2"), r"data row 8 \(line 9\): ID 'Q1_2' is missing; got 'Q1_3'"),
        (
            lambda t: pl.concat([t.head(2), t.tail(-1)]),
            r"data row 3 \(line 4\): ID 'Q2_B_2' is a duplicate of data row 2",
        ),
        (lambda t: t.with_columns(resname=pl.lit("A")), r"data row 1 \(line 2\): resname is 'A'; expected 'U'"),
        (lambda t: t.with_columns(resid=pl.lit(1)), r"data row 2 \(line 3\): resid is 1; expected 2"),
        (
            lambda t: t.with_columns(y_3=pl.lit(-1e18)),
            r"y_3 of ID 'Q2_B_1' is -1e\+18; expected .* -999.999 to 9999.999",
        ),
        (lambda t: t.with_columns(z_5=pl.lit(float("nan"))), r"z_5 of ID 'Q2_B_1' is nan"),
        (lambda t: t.with_columns(x_1=pl.lit(None)), r"x_1 of ID 'Q2_B_1' is empty"),
        (lambda t: t.drop("z_5"), "other columns"),
    ],
)
def test_structure_faults_are_refused_with_their_row(structure_paths, tmp_path, change, message):
    change(structure_table(structure_paths)).write_csv(tmp_path / "bad.csv")
    with pytest.raises(DataError, match=message):
        run(structure_paths, tmp_path / "bad.csv", RNA3D)


def test_neighbours_at_impossible_distances_are_refused_as_another_unit(structure_paths, tmp_path):
    table = structure_table(structure_paths)
    for factor, median in ((0.1, "0.953"), (0.0, "0"), (100.0, "953")):
        names = ["x_2", "y_2", "z_2"]
        table.with_columns(pl.col(names) * factor).write_csv(tmp_path / "nm.csv")
        with pytest.raises(DataError, match=f"candidate 2: C1' atoms of neighbours are {median} Å apart"):
            run(structure_paths, tmp_path / "nm.csv", RNA3D)


def test_a_structure_sample_without_rows_is_refused(structure_paths, tmp_path):
    file = write(structure_table(structure_paths), tmp_path / "good.parquet")
    shutil.rmtree(structure_paths.home)
    with pytest.raises(DataError, match="no rows below the header"):
        run(structure_paths, file, RNA3D, sample=write(pl.read_parquet(file).head(0), tmp_path / "none.parquet"))


def test_a_torn_candidate_is_accepted_with_a_warning(structure_paths, tmp_path, capsys):
    torn = pl.when(pl.col("ID") == "Q1_4").then(90.0).otherwise(pl.col("x_4"))
    structure_table(structure_paths).with_columns(x_4=torn).write_csv(tmp_path / "torn.csv")
    run(structure_paths, tmp_path / "torn.csv", RNA3D)
    said = capsys.readouterr().err
    assert "1 candidate has neighbouring C1'" in said
    assert "Q1 candidate 4" in said


def test_a_candidate_given_twice_is_accepted_with_a_warning(structure_paths, tmp_path, capsys):
    """Five times the same one was accepted without a word: four of the five tries thrown away."""
    table = structure_table(structure_paths)
    axes = [f"{axis}_{number}" for axis in "xyz" for number in (2, 5)]
    touching = [pl.when(pl.col("ID") == "Q1_4").then(20.0).otherwise(pl.col(name)).alias(name) for name in axes]
    run(structure_paths, write(table.with_columns(touching), tmp_path / "five.parquet"), RNA3D)
    assert "more than once" not in capsys.readouterr().err
    second = pl.col("ID").str.starts_with("Q1_")
    again = [
        pl.when(second).then(pl.col(f"{axis}_2")).otherwise(pl.col(f"{axis}_5")).alias(f"{axis}_5") for axis in "xyz"
    ]
    run(structure_paths, write(table.with_columns(again), tmp_path / "four.parquet"), RNA3D)
    assert "1 target has the same candidate more than once: Q1;" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("part", "flipped", "message"),
    [(b"Q2_B_1", b"Q2\xffB_1", r"bad.parquet: damaged \("), (b"resname", b"resn\xe8me", "not a readable parquet file")],
)
def test_a_flipped_byte_in_a_name_is_told(structure_paths, tmp_path, part, flipped, message):
    """UnicodeDecodeError: 'utf-8' codec can't decode byte 0xff in position 2"""
    file = tmp_path / "bad.parquet"
    structure_table(structure_paths).write_parquet(file, compression="uncompressed")
    file.write_bytes(file.read_bytes().replace(part, flipped))
    with pytest.raises(DataError, match=message):
        run(structure_paths, file, RNA3D)


def test_structure_sample_alone_is_enough(structure_paths, tmp_path):
    sample = write(structure_table(structure_paths), tmp_path / "sample.parquet")
    shutil.rmtree(structure_paths.home)
    assert run(structure_paths, sample, RNA3D, sample=sample).facts["rows"] == 15


@pytest.mark.shared
def test_the_competitions_own_sample_is_accepted(shared_data, tmp_path):
    folder = shared_data("stanford-ribonanza-rna-folding")
    sample = folder / "sample_submission.csv.gz"
    facts = run(make_paths(tmp_path), sample, sample=sample).facts
    assert facts["rows"] == 336_815


@pytest.mark.parametrize(
    ("row", "sentence"),
    [
        ("2,1_0,0.5", r"row 3 \(line 4\): reactivity_DMS_MaP is '1_0'; expected a number"),
        ("99999999999999999999,0.5,0.5", r"row 3 \(line 4\): id is '9{20}'; expected a whole number"),
        ('2,"0.1\n",0.5', r"row 3 \(line 4\): 2 cells"),
    ],
)
def test_cells_that_only_python_reads_are_named_by_row(paths, tmp_path, row, sentence):
    """1_0 and an id beyond 64 bits gave "from data row 1: In CSV column #0: Row #50: CSV conversion error"."""
    lines = good_lines(paths)
    with pytest.raises(DataError, match=sentence):
        run(paths, write_lines(tmp_path / "a.csv", [*lines[:3], row, *lines[4:]]))


@pytest.mark.parametrize(
    ("content", "sentence"),
    [
        (b"\r\x00a\rb" * 50, "other columns"),
        (b"a" * 65536, "other columns"),
        (b"PK\x03\x04" + b"x" * 50, "a zip archive; expected CSV, CSV.GZ or parquet"),
    ],
)
def test_file_that_is_no_table_is_refused_in_a_sentence(paths, tmp_path, content, sentence):
    """Random bytes ended in a traceback: _csv.Error: new-line character seen in unquoted field."""
    (tmp_path / "a.csv").write_bytes(content)
    with pytest.raises(DataError, match=sentence):
        run(paths, tmp_path / "a.csv")


def test_folder_is_called_a_folder(paths, tmp_path):
    with pytest.raises(DataError, match="a folder; expected a submission"):
        run(paths, tmp_path)


def test_last_line_without_an_end_gets_a_warning(paths, tmp_path, capsys):
    """A file that was cut within its last number was accepted without a word."""
    (tmp_path / "a.csv").write_text("\n".join(good_lines(paths))[:-2])
    run(paths, tmp_path / "a.csv")
    assert "the last number is not whole" in capsys.readouterr().err
