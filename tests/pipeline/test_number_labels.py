"""Measured numbers of sequences: from the files that people have to clean tables, and what their data say of a set."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from pipeline import preprocess
from pipeline.competitions import competition_of, get_competition
from pipeline.competitions.base import Competition
from pipeline.errors import DataError
from pipeline.labels import Classes, Numbers, labels_of, read_labels, read_numbers, write_labels
from pipeline.paths import Paths

COMP = "labelled-half-lives"
#: Twelve different numbers, all but one of them not whole; no two sequences are alike.
ROWS = pl.DataFrame(
    {
        "id": [f"s{index:02d}" for index in range(12)],
        "sequence": ["ACGU" + letter * 4 + tail for letter in "ACGU" for tail in ("", "GG", "UU")],
        "half_life": [index * 1.25 for index in range(12)],
    }
)
TOLD = "numbers = ['half_life']\n"


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return Paths(comp=COMP, root=tmp_path / "artifacts")


def numbers_of(paths: Paths, table: str = "train") -> dict[str, list[float | None] | None]:
    return dict(pl.read_parquet(paths.clean(table))["sequence_id", "numbers"].iter_rows())


def csv(raw: Path, table: pl.DataFrame, columns: str = "") -> None:
    table.write_csv(raw / "train.csv")
    (raw / "columns.toml").write_text(columns)


def with_cells(cells: list[str]) -> pl.DataFrame:
    """The set with other cells in its first rows, as text."""
    texts = ROWS["half_life"].cast(pl.String).to_list()
    return ROWS.with_columns(half_life=pl.Series(cells + texts[len(cells) :]))


# --- which labels are numbers ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["csv", "parquet", "fasta", "told", "label"])
def test_every_layout_gives_the_same_numbers(layout, raw, paths, run, capsys):
    if layout == "parquet":
        ROWS.write_parquet(raw / "train.parquet")
    elif layout == "fasta":
        (raw / "train.fa").write_text("".join(f">{name} {value}\n{text}\n" for name, text, value in ROWS.iter_rows()))
    else:
        csv(raw, ROWS.rename({"half_life": "label"}) if layout == "label" else ROWS, TOLD if layout == "told" else "")
    facts = run()
    assert numbers_of(paths) == {name: [value] for name, _, value in ROWS.iter_rows()}
    assert pl.read_parquet(paths.clean("train")).schema["numbers"] == pl.List(pl.Float64)
    assert pl.read_parquet(paths.clean("train"))["scored"].all()
    name = "half_life" if layout in ("csv", "parquet", "told") else "label"
    found = read_numbers(paths)
    assert (found.names, found.counts, found.alphabet) == ((name,), (12,), "ACGU")
    assert found.means == pytest.approx((ROWS["half_life"].mean(),))
    assert found.deviations == pytest.approx((ROWS["half_life"].std(ddof=0),))
    assert facts["numbers"][name]["median"] == ROWS["half_life"].median()
    said = capsys.readouterr().err
    assert ("taken for measured numbers. Next, if they are classes: label = " in said) == (layout != "told")


@pytest.mark.parametrize(
    ("labels", "columns", "expected"),
    [
        ([f"{index % 10}.5" for index in range(40)], "", "classes"),  # no more than ten different ones
        ([f"{index % 11}.5" for index in range(40)], "", "numbers"),
        ([str(index % 11) for index in range(40)], "", "classes"),  # whole, and each comes again
        ([str(index * 7) for index in range(40)], "", "numbers"),  # were refused: 40 different labels
        ([f"{index % 11}.5" for index in range(40)], "label = 'label'", "classes"),
        ([str(index % 3) for index in range(40)], "numbers = ['label']", "numbers"),
        ([f"{index % 11}.5;x" for index in range(40)], "", "classes"),
        ([f"1e{index % 11}" for index in range(38)] + ["", "NaN"], "numbers = ['label']", "numbers"),
    ],
)
def test_numbers_are_labels_that_can_be_no_classes(labels, columns, expected, raw, paths, run):
    letters = ["".join("ACGU"[index // 4**place % 4] for place in range(4)) for index in range(40)]
    csv(raw, pl.DataFrame({"sequence": letters, "label": labels}), columns)
    run()
    assert read_labels(paths).kind == expected
    assert competition_of(paths).task == expected


def test_a_unit_in_brackets_is_no_part_of_a_usual_name(raw, run):
    """Of `half_life (h)` and `tm`, tm alone was learned."""
    csv(raw, ROWS.rename({"half_life": "Half_life (h)"}))
    assert list(run()["numbers"]) == ["Half_life (h)"]
    csv(raw, ROWS.rename({"half_life": "half_life [h]"}).with_columns(tm=pl.lit(50.5)))
    with pytest.raises(DataError, match=r"half_life \[h\] and tm may each be the label.*or numbers = \['half_life"):
        run()


def test_several_numbers_keep_the_order_of_columns_toml_and_their_gaps(raw, paths, run):
    table = ROWS.with_columns(tm=pl.when(pl.col("half_life") > 5).then(-pl.col("half_life")), other=pl.lit("x"))
    csv(
        raw,
        table.with_columns(half_life=pl.when(pl.col("id") > "s01").then("half_life")),
        "numbers = ['tm', 'half_life']",
    )
    facts = run()
    found = numbers_of(paths)
    assert found["s00"] is None, "nothing was measured"
    assert found["s02"] == [None, 2.5]
    assert found["s11"] == [-13.75, 13.75]
    table = pl.read_parquet(paths.clean("train"))
    assert table.filter(~pl.col("scored"))["sequence_id"].to_list() == ["s00", "s01"]
    assert (facts["unlabelled"], facts["numbers"]["tm"]["measured"], facts["numbers"]["tm"]["not measured"]) == (
        2,
        7,
        5,
    )
    assert read_numbers(paths).counts == (7, 10)


# --- what is wrong with them -----------------------------------------------------------------------------------------

BAD = {
    "text": (with_cells(["0", "many"]), TOLD, r"train.csv: row 2 \(id s01\): half_life is 'many'; expected a finite"),
    "infinite": (with_cells(["inf"]), TOLD, r"row 1 \(id s00\): half_life is 'inf'; expected a finite number, or an"),
    "decimal-comma": (with_cells(["1,5"]), TOLD, r"half_life is '1,5'; expected a finite number, with a decimal point"),
    "comma-untold": (with_cells(["1,5"]), "", r"row 1 \(id s00\): half_life is '1,5'; .* Next: write decimal points"),
    "commas-untold": (
        with_cells([f"{k},5" for k in range(12)]),
        "",
        r"row 1 \(id s00\): half_life is '0,5'; .*with a decimal point.* Next: write decimal points",
    ),
    "text-untold": (with_cells(["0", ">10"]), "", r"row 2 \(id s01\): half_life is '>10'; expected a finite number"),
    "infinite-untold": (with_cells(["inf"]), "", r"row 1 \(id s00\): half_life is 'inf'; expected a finite number"),
    "text-everywhere": (with_cells([f"about {k}" for k in range(12)]), "", r"12 different labels .*numbers = \['<of"),
    "no-column": (ROWS, "numbers = ['tm']", r"'tm', one of columns.toml's numbers; found id, sequence"),
    "two-ways": (ROWS, "numbers = ['half_life']\nlabel = 'half_life'", r"label and numbers; expected one of them"),
    "not-a-list": (ROWS, "numbers = 'half_life'", r"numbers = 'half_life'; expected .*numbers \(list\)"),
    "constant": (ROWS.with_columns(half_life=pl.lit(2.5)), TOLD, r"half_life is 2.5 in 12 sequences; expected at"),
    "too-large": (with_cells(["1e39"]), TOLD, r"half_life reaches from 1.25 to 1e\+39; expected numbers that"),
    "too-small": (ROWS.with_columns(pl.col("half_life") * 1e-45), TOLD, r"half_life reaches from 0 to 1.3\d*e-44; ex"),
    "too-close": (ROWS.with_columns(pl.col("half_life") + 1e9), TOLD, r"half_life reaches from 1e\+09 to 1e\+09; ex"),
    "nothing": (ROWS.with_columns(half_life=pl.lit("")), TOLD, r"half_life is no number at all; expected at least two"),
    "which": (ROWS.with_columns(tm="half_life"), "", r"half_life and tm may .* or numbers = \['half_life', 'tm'\]"),
}  # fmt: skip


@pytest.mark.parametrize(("name", "columns"), [("label", ""), ("half_life", TOLD), ("sequence", TOLD)])
def test_a_column_that_is_there_twice_is_refused_and_one_that_nobody_reads_is_not(name, columns, raw, run):
    """Which of two was read was not told."""
    table = ROWS.rename({"half_life": "label"}) if name == "label" else ROWS
    csv(raw, table.with_columns(note=pl.lit("a"), again=name), columns)
    text = (raw / "train.csv").read_text().replace(",note,again", f",note,{name}", 1)
    (raw / "train.csv").write_text(text)
    with pytest.raises(DataError, match=f"train.csv: 2 columns are called '{name}'; expected one. Next: rename"):
        run()
    (raw / "train.csv").write_text(text.replace(f",note,{name}", ",note,note", 1))
    assert run()["sequences"] == ROWS.height


def test_columns_toml_may_begin_with_the_mark_that_editors_write(raw, run):
    csv(raw, ROWS, f"\ufeff{TOLD}")
    assert list(run()["numbers"]) == ["half_life"]


@pytest.mark.parametrize("columns", ["", TOLD])
def test_rows_of_separators_alone_as_spreadsheets_leave_them_are_no_rows(columns, raw, run):
    csv(raw, ROWS, columns)
    with (raw / "train.csv").open("a") as file:
        file.write(",,\n , ,\n")
    (raw / "test.csv").write_text("id,sequence\na,ACGU\n,\n")
    facts = run()
    assert (facts["rows"], facts["test"]["sequences"]) == (ROWS.height, 1)
    with (raw / "train.csv").open("a") as file:
        file.write(",,2.5\n")
    with pytest.raises(DataError, match="row 15: empty sequence"):
        run()


@pytest.mark.parametrize("case", BAD)
def test_bad_numbers_are_refused_in_one_sentence_and_nothing_is_written(case, raw, paths, run):
    table, columns, expected = BAD[case]
    csv(raw, table, columns)
    with pytest.raises(DataError, match=expected) as caught:
        run()
    assert str(caught.value).count("Next: ") == 1
    assert not paths.clean("train").exists()
    assert not paths.clean("numbers").exists()


def test_a_header_of_fasta_holds_one_number(raw, run):
    (raw / "train.fa").write_text("".join(f">{name} {value}\n{text}\n" for name, text, value in ROWS.iter_rows()))
    (raw / "columns.toml").write_text("numbers = ['a', 'b']")
    with pytest.raises(DataError, match=r"train.fa: a label each; expected the columns a, b.*Next: "):
        run()


def test_cells_that_say_in_words_that_nothing_was_measured_are_counted(raw, paths, run, capsys):
    csv(raw, with_cells(["NaN", "n/a", " "]), TOLD)
    assert run()["numbers"]["half_life"]["not measured"] == 3
    assert numbers_of(paths)["s01"] is None
    assert "2 cells such as 'NaN' or 'NA', taken for not measured" in capsys.readouterr().err


@pytest.mark.parametrize(("cells", "expected"), [(["-999", "-999"], "-999 stands apart"), (["-2.5", "40"], "")])
def test_a_number_that_may_mean_not_measured_is_told_and_kept(cells, expected, raw, paths, run, capsys):
    csv(raw, with_cells(cells), TOLD)
    run()
    said = capsys.readouterr().err
    assert expected in said
    assert ("Next, if it means not measured" in said) == bool(expected)
    assert numbers_of(paths)["s00"] == [float(cells[0])]


def test_copies_with_other_numbers_are_kept_and_counted(raw, paths, run):
    again = ROWS[[0, 0, 1]].with_columns(id=pl.Series(["s00", "s00", "x"]), half_life=pl.Series([0.0, 7.0, 1.25]))
    csv(raw, pl.concat([ROWS, again]), TOLD)
    told = run()["duplicates"]
    assert told["rows left out"] == 1, "the same id, sequence and number"
    assert told["sequences with different numbers"] == 1
    found = numbers_of(paths)
    assert found["s00"] == [0.0]
    assert found["s00-2"] == [7.0]
    assert found["x"] == [1.25]


# --- the test set ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("change", "expected"),
    [
        ({}, {"measured": 12}),
        ({"half_life": pl.lit("soon")}, {"numbers": "not used: test.csv: row 1 (id s00): half_life is 'soon'"}),
        ({"half_life": pl.lit(0)}, {"numbers": "not used: all the same"}),
    ],
)
@pytest.mark.parametrize("columns", [TOLD, ""])
def test_numbers_of_the_test_set_are_kept_for_its_score(change, expected, columns, raw, paths, run):
    csv(raw, ROWS, columns)
    ROWS.with_columns(**change).write_csv(raw / "test.csv")
    facts = run()["test"]
    assert {key: facts.get(key) for key in expected} == expected
    assert ("numbers" in pl.read_parquet(paths.clean("test")).columns) == (not change)
    if not change:
        assert numbers_of(paths, "test") == numbers_of(paths)


def test_a_test_set_without_numbers_has_none(raw, paths, run):
    csv(raw, ROWS, TOLD)
    ROWS.drop("half_life").write_csv(raw / "test.csv")
    run()
    assert pl.read_parquet(paths.clean("test")).columns == ["sequence_id", "sequence"]


def test_a_hidden_test_set_is_read_in_the_letters_that_the_network_knows(tmp_path, raw, paths, run):
    csv(raw, ROWS, TOLD)
    run()
    hidden, train = tmp_path / "hidden", paths.clean("train").read_bytes()
    hidden.mkdir()
    csv(hidden, ROWS, TOLD)
    (hidden / "test.csv").write_text("id,sequence\nx,ACGNNT\n,AC*\n")
    facts = preprocess.run(competition_of(paths), hidden, paths, test_only=True).facts
    assert facts["test"]["sequences"] == 2
    assert pl.read_parquet(paths.clean("test"))["sequence"].to_list() == ["ACGNNU", "ACN"]
    assert paths.clean("train").read_bytes() == train


# --- from numbers to classes and back --------------------------------------------------------------------------------


def test_other_raw_files_leave_no_table_of_the_earlier_ones(raw, paths, run):
    def there() -> set[str]:
        return {path.stem for path in paths.clean("train").parent.glob("*.parquet")}

    csv(raw, ROWS, TOLD)
    run()
    assert there() == {"train", "numbers"}
    csv(raw, ROWS.with_columns(label=pl.Series(["a", "b"] * 6)), "label = 'label'")
    run()
    assert there() == {"train", "classes"}
    assert competition_of(paths).task == "classes"
    csv(raw, ROWS, TOLD)
    run()
    assert there() == {"train", "numbers"}
    assert competition_of(paths).task == "numbers"
    paths.clean("numbers").write_bytes(b"damaged")
    with pytest.raises(DataError, match=r"numbers.parquet: not what the data stage writes .*Next: make data"):
        competition_of(paths)
    run()
    assert read_numbers(paths).names == ("half_life",)
    assert preprocess.run(get_competition(COMP), raw, paths).status == "current"


# --- what the data say of the set ------------------------------------------------------------------------------------


def informed(*names: str) -> Competition:
    return get_competition(COMP).with_facts({"numbers": list(names)})


def test_numbers_come_back_as_they_were_written(tmp_path):
    numbers = Numbers(("Tm", "ü|x"), (3, 0), (55.5, 0.0), (1.25, 0.0), "ACGUN")
    write_labels(tmp_path / "numbers.parquet", numbers)
    paths = Paths(comp=COMP, root=tmp_path)
    paths.clean("numbers").parent.mkdir(parents=True)
    (tmp_path / "numbers.parquet").rename(paths.clean("numbers"))
    assert read_numbers(paths) == read_labels(paths) == numbers
    assert labels_of({"numbers": numbers.facts()}).difference(numbers) == ""
    assert labels_of({}) is None


def test_numbers_are_missed_in_one_sentence(paths):
    with pytest.raises(DataError, match=rf"no numbers; .*Next: make data COMP={COMP}\.$"):
        read_numbers(paths)


def test_other_numbers_are_a_difference_and_other_means_are_none():
    one = Numbers(("a", "b"), (1, 1), (0.0, 0.0), (1.0, 1.0), "ACGU")
    assert one.difference(Numbers(("b", "a"), (1, 1), (0.0, 0.0), (1.0, 1.0), "ACGU")) == "numbers in another order"
    assert one.difference(Numbers(("a", "b"), (7, 7), (9.0, 9.0), (2.0, 2.0), "ACGU")) == ""
    classes = Classes(("no", "yes"), (1, 1), True, "ACGU")
    assert one.difference(classes) == "numbers ('a', 'b') -> classes ('no', 'yes')"


def test_numbers_that_are_equal_have_no_deviation():
    """Their standard deviation came out as 1.4e-17, and made a unit of it."""
    numbers = Numbers(("a",), (), (), (), "ACGU").over(np.full((3, 1), 0.1))
    assert np.full(3, 0.1).std() > 0
    assert (numbers.deviations, numbers.scales) == ((0.0,), (1.0,))


def test_the_metric_of_one_number_is_its_rmse_and_of_several_their_mean():
    assert (informed("a").metric, informed("a", "b").metric) == ("RMSE", "MCRMSE")
    assert informed("a", "b").targets == ("a", "b")
    assert get_competition(COMP).task == "classes"


def test_every_measured_number_counts_whatever_else_was_measured(rng):
    competition = informed("a", "b")
    prediction_NC, truth_NC = rng.normal(size=(50, 2)), rng.normal(size=(50, 2))
    truth_NC[:20, 0] = np.nan
    truth_NC[15:25, 1] = np.nan
    sums_C, counts_C = competition.error_sums(prediction_NC, truth_NC)
    errors = [prediction_NC[20:, 0] - truth_NC[20:, 0], np.delete(prediction_NC - truth_NC, slice(15, 25), 0)[:, 1]]
    assert counts_C.tolist() == [30, 40]
    expected = [np.sqrt(np.square(each).mean()) for each in errors]
    assert competition.target_errors(sums_C, counts_C) == pytest.approx(expected)
    assert competition.score(sums_C, counts_C) == pytest.approx(np.mean(expected))
    assert competition.score(sums_C * [1, 0], counts_C * [1, 0]) == pytest.approx(expected[0])
    assert np.isnan(competition.score(np.zeros(2), np.zeros(2)))


def test_a_prediction_that_is_not_finite_is_named_even_where_nothing_was_measured():
    with pytest.raises(DataError, match=r"prediction of b is nan at row 2; expected finite values. Next: "):
        informed("a", "b").error_sums(np.array([[0.0, 1.0], [0.0, np.nan]]), np.full((2, 2), np.nan))
