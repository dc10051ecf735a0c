"""Any labelled set: from the files that people have to clean tables, and what is said of those that cannot be read."""

import gzip
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import polars as pl
import pytest

from pipeline import preprocess
from pipeline.competitions import get_competition
from pipeline.competitions.labelled import read_sequences
from pipeline.errors import ConfigError, DataError
from pipeline.labels import Classes, read_classes
from pipeline.paths import Paths
from submissions.class_layout import read_class_layout

OWN_DATA = Path(__file__).resolve().parents[2] / "pipeline" / "OWN_DATA.md"
ROWS = pl.DataFrame(
    {
        "id": ["a", "b", "c", "d"],
        "sequence": ["GGGGAACC", "ACGTACGTA", "acgu", "UUUUUUUA"],
        "label": ["yes", "no", "yes", "no"],
    }
)
CLEAN = {"a": ("GGGGAACC", "yes"), "b": ("ACGUACGUA", "no"), "c": ("ACGU", "yes"), "d": ("UUUUUUUA", "no")}


@pytest.fixture
def paths(tmp_path: Path) -> Paths:
    return Paths(comp="labelled", root=tmp_path / "artifacts")


def train(paths: Paths) -> pl.DataFrame:
    """The clean train table, with the classes' names for their places."""
    names = read_classes(paths).names
    table = pl.read_parquet(paths.clean("train"))
    told = [None if places is None else [names[place] for place in places] for places in table["labels"].to_list()]
    return table.with_columns(pl.Series("names", told, dtype=pl.List(pl.String)))


def fasta(separator: str) -> str:
    return "".join(f">{name}{separator}{label}\n{text[:5]}\n{text[5:]}\n" for name, text, label in ROWS.iter_rows())


WRITERS: dict[str, Callable[[Path], Any]] = {
    "csv": lambda raw: ROWS.write_csv(raw / "train.csv"),
    "csv-semicolon": lambda raw: ROWS.write_csv(raw / "train.csv", separator=";"),
    "csv-without-last-line-end": lambda raw: (raw / "train.csv").write_text(ROWS.write_csv().rstrip()),
    "csv-bom": lambda raw: (raw / "train.csv").write_text("\ufeff" + ROWS.write_csv()),
    "csv-gz": lambda raw: (raw / "train.csv.gz").write_bytes(gzip.compress(ROWS.write_csv().encode())),
    "tsv": lambda raw: ROWS.write_csv(raw / "train.tsv", separator="\t"),
    "parquet": lambda raw: ROWS.write_parquet(raw / "train.parquet"),
    "spaces-in-the-header": lambda raw: (raw / "train.csv").write_text(ROWS.write_csv().replace(",seq", ", seq")),
    "bars-in-a-name": lambda raw: ROWS.with_columns(pl.lit(1).alias("a|b|c|d|e")).write_csv(raw / "train.csv"),
    "commas-in-a-tsv": lambda raw: (raw / "train.tsv").write_text(ROWS.write_csv()),
    "another-name": lambda raw: ROWS.write_csv(raw / "promoters.csv"),
    "fasta-space": lambda raw: (raw / "train.fa").write_text(fasta(" ")),
    "fasta-bar": lambda raw: (raw / "train.fasta").write_text(fasta("|")),
    "fasta-gz": lambda raw: (raw / "train.fasta.gz").write_bytes(gzip.compress(fasta(" ").encode())),
}


@pytest.mark.parametrize("layout", WRITERS)
def test_every_layout_gives_the_same_tables(layout, raw, paths, run):
    WRITERS[layout](raw)
    facts = run()
    table = train(paths)
    assert {
        name: (text, labels[0]) for name, text, labels in table["sequence_id", "sequence", "names"].iter_rows()
    } == CLEAN
    assert table["scored"].all()
    assert read_classes(paths) == Classes(("no", "yes"), (2, 2), True, "ACGU")
    assert facts["classes"] == {"no": 2, "yes": 2}


def test_a_file_stands_for_the_folder(raw, paths, run):
    ROWS.write_csv(raw / "mine.csv")
    (raw / "other.csv").write_text("not asked for\n")
    assert run(raw / "mine.csv")["sequences"] == 4


def test_a_folder_for_each_class_takes_the_classes_from_sorted_names(raw, paths, run):
    """HyenaDNA's loader numbers the classes in the order in which the directory lists them."""
    for table in ("train", "test"):
        for name, text, label in ROWS.iter_rows():
            (raw / table / label).mkdir(parents=True, exist_ok=True)
            (raw / table / label / f"{name}.txt").write_text(text)
    run()
    assert read_classes(paths).names == ("no", "yes")
    assert dict(train(paths)["sequence_id", "names"].iter_rows()) == {
        "no/b": ["no"], "no/d": ["no"], "yes/a": ["yes"], "yes/c": ["yes"],
    }  # fmt: skip
    test = pl.read_parquet(paths.clean("test"))
    assert dict(test["sequence_id", "labels"].iter_rows()) == {"no/b": [0], "no/d": [0], "yes/a": [1], "yes/c": [1]}


@pytest.mark.parametrize("layout", ["{label}.fasta", "{label}/all.fa", "{label}/{name}.faa", "{label}.fna.gz"])
def test_fasta_files_get_their_class_from_their_name_or_folder(layout, raw, paths, run):
    """train/tRNA.fasta and train/tRNA/*.fa, what databases give out, were refused: "no <class>/*.txt in it"."""
    for table in ("train", "test"):
        for name, text, label in ROWS.iter_rows():
            path = raw / table / layout.format(name=name, label=label)
            path.parent.mkdir(parents=True, exist_ok=True)
            opener = gzip.open if path.suffix == ".gz" else open
            with opener(path, "at") as file:
                file.write(f">{name} some description\n{text[:5]}\n{text[5:]}\n")
    assert run()["test"]["labelled"] == 4
    assert dict(train(paths)["sequence_id", "names"].iter_rows()) == {
        "no/b": ["no"], "no/d": ["no"], "yes/a": ["yes"], "yes/c": ["yes"],
    }  # fmt: skip


def test_a_quoted_column_name_may_hold_what_stands_between_columns(raw, run):
    """The header was split at every comma: "Expected 5 columns, got 4"."""
    lines = ROWS.write_csv(include_header=False).splitlines()
    text = "\n".join(['id,"Sequence, 5\'-3\'",label,"Length, nt"', *(f"{line},9" for line in lines), ""])
    (raw / "train.csv").write_text(text)
    (raw / "columns.toml").write_text("sequence = \"Sequence, 5'-3'\"")
    assert run()["sequences"] == 4


LABELLED_TESTS: dict[str, tuple[str, str, list[Any] | None]] = {
    "labels": ("test.csv", "id,sequence,label\ne,ACGU,no\nf,GGGA,\ng,ACGA,yes\n", [[0], None, [1]]),
    "fasta": ("test.fa", ">e no\nACGU\n>f\nGGGA\n>g yes\nACGA\n", [[0], None, [1]]),
    "no-class": ("test.csv", "id,sequence,label\ne,ACGU,no\nf,GGGA,perhaps\ng,ACGA,yes\n", None),
    "place-holder": ("test.csv", "id,sequence,label\ne,ACGU,no\nf,GGGA,no\ng,ACGA,no\n", None),
    "two-columns": ("test.csv", "id,sequence,label,class\ne,ACGU,no,x\nf,GGGA,no,y\ng,ACGA,yes,z\n", None),
}


@pytest.mark.parametrize("case", LABELLED_TESTS)
def test_labels_of_a_test_set_are_kept_where_they_are_such(case, raw, paths, run):
    """They were never read: the test accuracy of a GenomicBenchmarks set could not be had."""
    name, text, expected = LABELLED_TESTS[case]
    ROWS.write_csv(raw / "train.csv")
    (raw / name).write_text(text)
    facts, test = run(), pl.read_parquet(paths.clean("test"))
    assert test["sequence_id"].to_list() == ["e", "f", "g"]
    assert (test["labels"].to_list() if "labels" in test.columns else None) == expected
    assert facts["test"].get("labelled") == (2 if expected else None)
    run(test_only=True)
    assert pl.read_parquet(paths.clean("test")).columns == ["sequence_id", "sequence"]


def test_several_labels_of_a_test_set_may_be_none(raw, paths, run):
    ROWS.with_columns(pl.col("label") + ";any").write_csv(raw / "train.csv")
    (raw / "test.csv").write_text("id,sequence,label\ne,ACGU,any\nf,GGGA,\n")
    run()
    assert pl.read_parquet(paths.clean("test"))["labels"].to_list() == [[0], []]


def test_headings_with_spaces_and_remarks_in_brackets_are_known(raw, paths, run):
    """Was: no column is called sequence, seq, rna, dna …; found Clone ID, Sequence (RNA), RNA family."""
    heads = {"id": "Sequence ID", "sequence": "RNA Sequence (5'->3')", "label": "RNA family"}
    ROWS.rename(heads).write_csv(raw / "train.csv", separator=";")
    assert run()["labels"] == "one class each, from RNA family"
    table = train(paths)
    assert dict(table["sequence_id", "sequence"].iter_rows()) == {name: text for name, (text, _) in CLEAN.items()}


def test_the_usual_name_itself_goes_before_a_heading_like_it(raw, paths, run):
    ROWS.with_columns(pl.lit("ACGU").alias("Sequence (primer)")).write_csv(raw / "train.csv")
    run()
    assert train(paths)["sequence"].to_list() == [text for text, _ in CLEAN.values()]


def test_rows_of_a_file_that_are_numbered_are_told(tmp_path, capsys):
    """Sample names were lost without a word; predictions were of "row-01"."""
    (tmp_path / "mine.csv").write_text("Sample,sequence\nA1,ACGU\n")
    frame, _ = read_sequences(tmp_path / "mine.csv", alphabet="ACGU")
    assert frame["sequence_id"].to_list() == ["row-1"]
    assert "mine.csv: no column is called id, so rows are numbered" in capsys.readouterr().err
    (tmp_path / "columns.toml").write_text("id = 'Sample'")
    assert read_sequences(tmp_path / "mine.csv", alphabet="ACGU")[0]["sequence_id"].to_list() == ["A1"]
    assert "numbered" not in capsys.readouterr().err


def test_rows_without_ids_are_numbered_in_the_order_of_the_file(raw, paths, run):
    pl.concat([ROWS] * 3).drop("id").write_csv(raw / "train.csv")
    run()
    table = train(paths)
    assert table["sequence_id"].to_list() == [f"train-{number:02d}" for number in range(1, 13)]
    assert table["sequence"][:4].to_list() == [text for text, _ in CLEAN.values()]


def test_repeated_rows_go_repeated_ids_stay_and_contradictions_are_told(raw, paths, run):
    again = [("a", "GGGGAACC", "yes"), ("a", "GGGGAACC", "no"), ("a", "CCCC", "no"), ("a-2", "GCGC", "no")]
    pl.concat([ROWS, pl.DataFrame(again, schema=ROWS.schema, orient="row")]).write_csv(raw / "train.csv")
    assert run()["duplicates"] == {
        "rows left out": 1,
        "ids made unique": 2,
        "sequences that come again": 1,
        "sequences with different labels": 1,
    }
    assert train(paths)["sequence_id"].to_list() == ["a", "a-2", "a-3", "a-4", "b", "c", "d"]


def test_several_labels_in_a_cell_make_classes_that_do_not_exclude_each_other(raw, paths, run):
    labels = ["red; blue", "", "blue;blue;", "green"]
    ROWS.with_columns(pl.Series("label", labels)).write_csv(raw / "train.csv", quote_style="always")
    assert run()["labels"] == "any number of classes each"
    assert train(paths)["names"].to_list() == [["blue", "red"], [], ["blue"], ["green"]]
    assert train(paths)["scored"].all()
    assert read_classes(paths) == Classes(("blue", "green", "red"), (2, 1, 1), False, "ACGU")


def test_lists_of_labels_in_a_parquet_file_are_taken_as_they_are(raw, paths, run):
    ROWS.with_columns(pl.Series("label", [["b", "a"], None, [], ["b"]])).write_parquet(raw / "train.parquet")
    run()
    assert train(paths)["names"].to_list() == [["a", "b"], None, [], ["b"]]
    assert train(paths)["scored"].to_list() == [True, False, True, True]


def test_a_column_of_0_and_1_for_each_class_keeps_the_classes_that_no_sequence_has(raw, paths, run):
    """What sets of many labels come as was refused: "no column is called label, labels, class, classes …"."""
    flags = pl.DataFrame({"Um": [1, 0, 1, 0], "Am": ["0", "0", "1.0", "False"], "m6A": [0, 0, 0, 0]})
    (raw / "columns.toml").write_text('classes = ["Um", "m6A", "Am"]\n')
    tables = []
    for write in (pl.DataFrame.write_csv, pl.DataFrame.write_parquet):
        write(pl.concat([ROWS.drop("label"), flags], how="horizontal"), raw / f"train.{write.__name__[6:]}")
        facts = run(raw / f"train.{write.__name__[6:]}")
        tables.append(dict(train(paths)["sequence_id", "names"].iter_rows()))
    assert tables == [{"a": ["Um"], "b": [], "c": ["Am", "Um"], "d": []}] * 2
    assert read_classes(paths) == Classes(("Am", "Um", "m6A"), (1, 2, 0), False, "ACGU")
    assert train(paths)["scored"].all()
    assert facts["columns"] == {"classes": ["Um", "m6A", "Am"]}


def test_flags_of_nucleotides_become_letters_as_the_page_shows(raw, paths, run, rng, monkeypatch):
    """Where a window ran over the end of its molecule, and no flag was set, the page's lines wrote A."""
    (recipe,) = re.findall(r"```\n(import numpy, pandas\n.*?)```", OWN_DATA.read_text(), re.DOTALL)
    flags_NL4 = np.eye(5)[rng.integers(0, 4, (20, 41))][..., :4]
    flags_NL4[3, :2] = flags_NL4[7, -1] = 0
    labels = pl.DataFrame({"Um": [1, 0] * 10, "Am": [0] * 15 + [1] * 5})
    labels.assign = lambda sequence: labels.with_columns(pl.Series("sequence", sequence))
    monkeypatch.setattr(pl.DataFrame, "to_csv", lambda table, path, index: table.write_csv(raw / path), raising=False)
    tables = {"train_in": pl.DataFrame(flags_NL4.reshape(20, -1)), "train_out": labels}
    monkeypatch.setitem(sys.modules, "pandas", SimpleNamespace(read_hdf=lambda _, key: tables[key]))
    exec(recipe, {})
    (raw / "columns.toml").write_text('classes = ["Um", "Am"]\n')
    assert run()["letters"]["odd, read as N"] == 3
    assert read_classes(paths).counts == (5, 10)
    letters_NL = np.array([list(text) for text in train(paths)["sequence"]])
    assert (np.stack([letters_NL == letter for letter in "ACGU"], axis=2) == flags_NL4).all()


def test_columns_of_classes_may_be_more_than_sequences(raw, run):
    """918 different labels on 150 sequences, such as 'L001'; expected classes that come again."""
    flags = pl.DataFrame({f"L{k}": [k % 2, 1, 0, k % 3 % 2] for k in range(919)})
    (raw / "columns.toml").write_text(f"classes = {flags.columns}\n")
    pl.concat([ROWS.drop("label"), flags], how="horizontal").write_csv(raw / "train.csv")
    assert len(run()["classes"]) == 919


def test_a_test_set_may_have_the_columns_of_classes_empty(raw, paths, run, capsys):
    """test.csv: column Um holds ''; expected 0 or 1, being one of columns.toml's classes."""
    (raw / "columns.toml").write_text('classes = ["Um", "Am"]\n')
    ROWS.drop("label").with_columns(Um=pl.lit(1), Am=pl.Series([0, 1, 1, 0])).write_csv(raw / "train.csv")
    for cell, labelled in (("", False), ("1", True)):
        ROWS.drop("label").with_columns(Um=pl.lit(cell), Am=pl.Series(["0", "1", "0", "0"])).write_csv(raw / "test.csv")
        run()
        assert ("labels" in pl.read_parquet(paths.clean("test")).columns) is labelled
    assert "test.csv: column Um holds '': its classes are not used" in " ".join(capsys.readouterr().err.split())


def test_a_separator_of_nothing_keeps_a_cell_whole(raw, paths, run):
    ROWS.with_columns(pl.Series("label", ["x;y", "z", "z", "x;y"])).write_csv(raw / "train.csv")
    (raw / "columns.toml").write_text('separator = ""\n')
    run()
    assert read_classes(paths).names == ("x;y", "z")


def test_a_row_without_a_label_is_kept_and_not_scored(raw, paths, run):
    ROWS.with_columns(pl.Series("label", ["yes", "", "no", " "])).write_csv(raw / "train.csv")
    assert run()["unlabelled"] == 2
    assert train(paths)["scored"].to_list() == [True, False, True, False]
    assert train(paths)["labels"].to_list() == [[1], None, [0], None]


def test_numbers_are_classes_by_their_text(raw, paths, run):
    ROWS.with_columns(pl.Series("label", [1, 0, 1, 0])).write_parquet(raw / "train.parquet")
    run()
    assert read_classes(paths).names == ("0", "1")


def test_the_column_that_was_taken_for_the_label_is_told(raw, run):
    """Of Cloud Lab profiles, `sn_class` was taken without a word, as its name ends so."""
    ROWS.rename({"label": "sn_class"}).write_csv(raw / "train.csv")
    assert run()["labels"] == "one class each, from sn_class"
    ROWS.write_csv(raw / "train.csv")
    assert run()["labels"] == "one class each"


def test_known_relatives_are_kept(raw, paths, run):
    ROWS.with_columns(pl.Series("group", ["g", "", "g", "h"])).write_csv(raw / "train.csv")
    run()
    assert train(paths)["group"].to_list() == ["g", None, "g", "h"]


def test_a_test_set_need_not_tell_its_relatives(raw, paths, run):
    """test.csv: no column 'family', which columns.toml names; found sequence."""
    ROWS.with_columns(pl.Series("family", ["g", "", "g", "h"])).write_csv(raw / "train.csv")
    ROWS.select("sequence").write_csv(raw / "test.csv")
    (raw / "columns.toml").write_text('group = "family"\nlabel = "label"\n')
    run()
    assert train(paths)["group"].to_list() == ["g", None, "g", "h"]
    assert pl.read_parquet(paths.clean("test")).height == 4


# --- letters ---------------------------------------------------------------------------------------------------------


def test_u_and_t_capital_and_small_are_the_same_and_odd_letters_are_counted(raw, paths, run):
    texts = ["acgtACGUAC" * 4, "ACGU-ACGU.ACGU" * 3, "ACGURYACGU" + "ACGU" * 20, "GGGG" * 9]
    ROWS.with_columns(pl.Series("sequence", texts)).write_csv(raw / "train.csv")
    found = run()["letters"]
    assert found == {"kind": "RNA or DNA", "odd, read as N": 2, "sequences with odd ones": 1, "gaps removed": 6}
    assert train(paths)["sequence"][0] == "ACGUACGUAC" * 4
    assert "NN" in train(paths)["sequence"][2]
    assert read_classes(paths).alphabet == "ACGUN"


def test_proteins_are_known_by_their_letters(raw, paths, run):
    texts = ["MKWVTFISLLLLFSSAYS*", "mktayiakqrqisfvkshfsrq", "MALWMRLLPLUALLALWGPDPA", "MGSSHHHHHHSSGLVPRGSH"]
    ROWS.with_columns(pl.Series("sequence", texts)).write_csv(raw / "train.csv")
    assert run()["letters"]["kind"] == "protein"
    assert train(paths)["sequence"].to_list()[:3] == [texts[0][:-1], texts[1].upper(), texts[2].replace("U", "X")]
    assert read_classes(paths).alphabet == "ACDEFGHIKLMNPQRSTVWYX"
    assert not read_classes(paths).is_nucleic


def test_letters_may_be_told_where_they_cannot_be_seen(raw, paths, run):
    ROWS.with_columns(pl.Series("sequence", ["ACGA", "GGGA", "CCGA", "TTGA"])).write_csv(raw / "train.csv")
    (raw / "columns.toml").write_text('alphabet = "amino acids"\n')
    run()
    assert train(paths)["sequence"][3] == "TTGA"


def test_odd_letters_of_a_test_set_alone_are_warned_of(raw, paths, run, capsys):
    """They became letters of the alphabet, and an untrained token of the network, without a word."""
    ROWS.write_csv(raw / "train.csv")
    (raw / "test.csv").write_text(f"id,sequence\ne,ACGUN\nf,GGGARR\ng,{'ACGU' * 90}\n")
    facts = run()
    classes = read_classes(paths)
    assert (classes.alphabet, classes.readable) == ("ACGU", "ACGUN")
    assert pl.read_parquet(paths.clean("test"))["sequence"].to_list()[:2] == ["ACGUN", "GGGANN"]
    assert facts["test"]["letters"]["odd, read as N"] == 3
    assert "test.csv: 3 letters other than ACGU in 2 sequences; no training sequence has" in capsys.readouterr().err


# --- several labels in a cell ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("sign", [",", "|", "/", "+", "&"])
def test_labels_that_look_like_combinations_are_told_with_the_setting_that_parts_them(sign, raw, run, capsys):
    """Cells such as "Am,Gm" silently became classes of their own."""
    labels = [f"Am{sign}Gm", "Gm", "Am", f"Gm{sign} Um", f"Um{sign}Am"]
    pl.concat([ROWS, ROWS.head(1).with_columns(id=pl.lit("e"))]).with_columns(pl.Series("label", labels)).write_csv(
        raw / "train.csv"
    )
    assert run()["labels"] == "one class each"
    told = capsys.readouterr().err
    assert f"labels such as 'Am{sign}Gm', 3 of 5, are taken for classes of their own" in told
    assert f"combinations of 3 others. Next, if they are: separator = '{sign}' in columns.toml" in told
    (raw / "columns.toml").write_text(f"separator = '{sign}'\n")
    assert run()["classes"] == {"Am": 3, "Gm": 3, "Um": 2}
    assert "combinations" not in capsys.readouterr().err


@pytest.mark.parametrize("labels", [["alpha/beta", "tRNA", "a,b", "tRNA"], ["yes", "no", "yes", "no"]])
def test_names_with_signs_in_them_are_no_combinations(labels, raw, run, capsys):
    ROWS.with_columns(pl.Series("label", labels)).write_csv(raw / "train.csv")
    run()
    assert "combinations" not in capsys.readouterr().err


@pytest.mark.parametrize(
    ("labels", "told"),
    [
        (["1", "0", "1.0", "0"], "labels '1' and '1.0' are taken for two classes. Next, if they are one: "),
        (["Yes", "no", "yes", "no"], "labels 'Yes' and 'yes' are taken for two classes"),
        (["yes", "no", "NaN", "no"], "the label 'NaN' is taken for a class. Next, if it means that none is known: "),
        (["yes", "no", "rare", "no"], "2 of 3 classes have a single sequence, such as 'rare': where that is held out"),
    ],
)
def test_doubtful_classes_are_told(labels, told, raw, run, capsys):
    ROWS.with_columns(pl.Series("label", labels)).write_csv(raw / "train.csv")
    run()
    assert told in capsys.readouterr().err


# --- classes that are merged or dropped ------------------------------------------------------------------------------

TOLD = ["A", "A", "a", "b", "b", "c", "?", ""]


def several(labels: list[str]) -> pl.DataFrame:
    """A row for each label, no sequence twice."""
    texts = ["GA" + "".join("ACGU"[k // 4**place % 4] for place in range(3)) for k in range(len(labels))]
    return pl.DataFrame({"id": [f"r{k}" for k in range(len(labels))], "sequence": texts, "label": labels})


def test_classes_are_merged_and_dropped_as_columns_toml_says(raw, paths, run, capsys):
    several(TOLD).write_csv(raw / "train.csv")
    (raw / "columns.toml").write_text('merge = {a = "A", "?" = "", z = "A"}\nmin_count = 2\n')
    facts = run()
    assert (facts["merged"], facts["dropped"]) == ({"a -> A": 1}, {"?": 1, "c": 1})
    assert facts["classes"] == {"A": 3, "b": 2}
    assert facts["unlabelled"] == 3
    assert train(paths)["names"].to_list() == [["A"], ["A"], ["A"], ["b"], ["b"], None, None, None]
    assert train(paths)["scored"].to_list() == [True] * 5 + [False] * 3
    assert "train.csv: no label 'z', which columns.toml merges" in capsys.readouterr().err


def test_a_class_is_in_the_first_group_that_fits_it_and_training_knows_nothing_of_groups(raw, paths, run, capsys):
    several(["liver|DNase|None", "liver|CTCF|None", "liver|H3K4me1|None", "odd[1]", "liver|CTCF|None"]).write_csv(
        raw / "train.csv"
    )
    run()
    plain = read_classes(paths)
    told = 'groups = { DNase = ["*|DNase|*"], histone = ["*|H3K*", "*|H4K*"], odd = ["odd[1]"], TF = ["liver|*"] }\n'
    (raw / "columns.toml").write_text(told)
    assert run()["columns"]["groups"]["odd"] == ["odd[1]"]
    grouped = read_classes(paths)
    assert dict(zip(grouped.names, grouped.groups, strict=True)) == {
        "liver|CTCF|None": "TF", "liver|DNase|None": "DNase", "liver|H3K4me1|None": "histone", "odd[1]": "odd"
    }  # fmt: skip
    assert "train.csv: no class is '*|H4K*', which columns.toml has in groups.histone." in capsys.readouterr().err
    assert plain.groups == ()
    assert not plain.difference(grouped)
    assert plain.facts() == grouped.facts()


def test_a_class_in_no_group_has_none(raw, paths, run):
    several(["a", "b", "c"]).write_csv(raw / "train.csv")
    (raw / "columns.toml").write_text("[groups]\nfirst = ['a', 'b']\n")
    run()
    assert read_classes(paths).groups == ("first", "first", "")


def test_a_sequence_whose_labels_are_dropped_has_none_of_the_classes_that_stay(raw, paths, run):
    several(["a;b", "rare", "a", "b;rare", ""]).write_csv(raw / "train.csv", quote_style="always")
    (raw / "columns.toml").write_text("min_count = 2\nmerge = {rare = 'seldom'}\n")
    assert run()["classes"] == {"a": 2, "b": 2, "seldom": 2}
    (raw / "columns.toml").write_text("merge = {rare = ''}\n")
    assert run()["dropped"] == {"rare": 2}
    assert train(paths)["names"].to_list() == [["a", "b"], [], ["a"], ["b"], []]
    assert train(paths)["scored"].all()


def test_columns_of_classes_are_merged_and_dropped_too(raw, paths, run):
    flags = pl.DataFrame({"Um": [1, 0, 1, 0], "Am": [0, 0, 1, 1], "m6A": [0, 0, 0, 0], "Gm": [0, 1, 0, 1]})
    pl.concat([ROWS.drop("label"), flags], how="horizontal").write_csv(raw / "train.csv")
    (raw / "columns.toml").write_text(
        'classes = ["Um", "m6A", "Am", "Gm"]\nmin_count = 1\nmerge = {Um = "Xm", Am = "Xm"}\n'
    )
    facts = run()
    assert (facts["classes"], facts["dropped"]) == ({"Gm": 2, "Xm": 3}, {"m6A": 0})
    assert train(paths)["names"].to_list() == [["Xm"], ["Gm"], ["Xm"], ["Gm", "Xm"]]


@pytest.mark.parametrize("labels", [[*TOLD, "d", "d"], ["a;b", "a;b", "c;rare", "a;?", "b;A"]], ids=["one", "several"])
def test_cleaning_what_was_cleaned_changes_nothing(labels, raw, paths, run):
    """A row that comes again once "rare" is dropped was what made "c" large enough."""
    table = several(labels)
    table = pl.concat([table, table[2].with_columns(label=pl.lit("c"))])
    table.write_csv(raw / "train.csv", quote_style="always")
    (raw / "columns.toml").write_text("min_count = 2\nmerge = {A = 'a', '?' = ''}\n")
    first, before = run(), train(paths)
    assert {"merged", "dropped"} <= first.keys()
    assert ("c" in first["dropped"]) == (";" in labels[0])
    cells = pl.col("names").list.join(";").fill_null("").alias("label")
    cleaned = before.select(pl.col("sequence_id").alias("id"), "sequence", cells)
    cleaned.write_csv(raw / "train.csv", quote_style="always")
    second = run()
    assert not {"merged", "dropped"} & second.keys()
    assert second["classes"] == first["classes"]
    assert train(paths).equals(before)


def test_labels_of_a_test_set_follow_those_of_training(raw, paths, run):
    several(TOLD).write_csv(raw / "train.csv")
    (raw / "columns.toml").write_text('merge = {a = "A", "?" = ""}\nmin_count = 2\n')
    (raw / "test.csv").write_text("id,sequence,label\nt,GGGA,a\nu,GGGC,c\nv,GGGU,b\nw,GGAA,?\n")
    assert run()["test"]["labelled"] == 2
    assert pl.read_parquet(paths.clean("test"))["labels"].to_list() == [[0], None, [1], None]


def test_a_sample_submission_with_a_dropped_class_is_refused_where_it_is_read(raw, paths, run):
    several(TOLD).write_csv(raw / "train.csv")
    (raw / "columns.toml").write_text('merge = {a = "A", "?" = ""}\nmin_count = 2\n')
    (raw / "test.csv").write_text("id,sequence\nt,GGGA\n")
    (raw / "sample_submission.csv").write_text("id,A,b,c,a\nt,0,0,0,0\n")
    run()
    with pytest.raises(DataError, match=r"columns A, b, c, a; expected one for each class \(A, b\), .* Next: "):
        read_class_layout(paths)


def test_numbers_that_are_to_be_merged_or_counted_are_classes(raw, run):
    several([f"{k / 2}" for k in range(12)] * 2).write_csv(raw / "train.csv")
    assert "numbers" in run()
    (raw / "columns.toml").write_text("min_count = 2\n")
    assert set(run()["classes"].values()) == {2}


# --- hidden test set -------------------------------------------------------------------------------------------------

HIDDEN: dict[str, tuple[str, str]] = {
    "unknown-letters": ("ACGNNRYACG", "ACGNNNNACG"),
    "small-letters-and-t": ("acgtT", "ACGUU"),
    "gaps-and-spaces": ("AC-G U.~", "ACGU"),
    "signs": ("AC*G9U?", "ACNGNUN"),
    "not-ascii": ("ACéG", "ACNG"),
    "empty": ("", "N"),
    "gaps-alone": ("---", "N"),
    "nothing-known": ("NNNN", "NNNN"),
}


@pytest.mark.parametrize("alphabet", ["ACGU", "ACGUN"])
def test_every_row_of_a_hidden_test_set_can_be_read(alphabet, raw, paths, run, capsys):
    """A notebook that a competition ran again ended with "letters that are none of ACGU" or "empty sequence"."""
    rows = ROWS if alphabet == "ACGU" else ROWS.with_columns(sequence=pl.lit("ACGU" * 30 + "N"))
    rows.write_csv(raw / "train.csv")
    run()
    assert read_classes(paths).alphabet == alphabet
    hidden = pl.DataFrame({"id": list(HIDDEN), "sequence": [text for text, _ in HIDDEN.values()]})
    hidden.write_csv(raw / "test.csv")
    run(test_only=True)
    read = pl.read_parquet(paths.clean("test"))
    assert dict(read["sequence_id", "sequence"].iter_rows()) == {
        name: expected for name, (_, expected) in HIDDEN.items()
    }
    told = capsys.readouterr().err
    assert "test.csv: 4 sequences with other signs than letters, or nothing" in told
    assert ("no training sequence has such letters" in told) == (alphabet == "ACGU")


def test_letters_of_a_hidden_test_set_are_those_of_training_whatever_they_look_like(raw, paths, run):
    texts = ["MKWVTFISLLLLFSSAYS*", "MKTAYIAKQRQISFVKSHFSRQ", "MALWMRLLPLLALLALWGPDPA", "MGSSHHHHHHSSGLVPRGSH"]
    ROWS.with_columns(pl.Series("sequence", texts)).write_csv(raw / "train.csv")
    run()
    (raw / "test.csv").write_text("id,sequence\ne,MKXX*WV*\nf,ACGTACGTACGT\n")
    run(test_only=True)
    assert pl.read_parquet(paths.clean("test"))["sequence"].to_list() == ["MKXXXWV", "ACGTACGTACGT"]


def test_ids_of_a_hidden_test_set_may_come_again_or_lack(raw, paths, run, capsys):
    ROWS.write_csv(raw / "train.csv")
    ROWS.drop("label").write_csv(raw / "test.csv")
    (raw / "sample_submission.csv").write_text("name,p\na,0.5\nb,0.5\nc,0.5\nd,0.5\n")
    run()
    (raw / "test.csv").write_text("id,sequence\ne,ACGU\n,GGG\ne,CCCC\nf,AC\n")
    run(test_only=True)
    assert pl.read_parquet(paths.clean("test"))["sequence_id"].to_list() == ["e", "row-2", "f"]
    assert pl.read_parquet(paths.clean("sample")).rows() == [("e", "0.5"), ("row-2", "0.5"), ("f", "0.5")]
    told = capsys.readouterr().err
    assert "test.csv: 2 rows without an id, numbered, or with an id again, left out" in told
    assert "sample_submission.csv: other ids than the test set's (7)" in told


# --- test set --------------------------------------------------------------------------------------------------------


def test_the_test_set_keeps_the_order_of_its_file(raw, paths, run):
    ROWS.write_csv(raw / "train.csv")
    ROWS[["id", "sequence"]].with_columns(id="t" + pl.col("id")).reverse().write_csv(raw / "test.tsv", separator="\t")
    assert run()["test"]["copies_of_train"] == 4
    assert pl.read_parquet(paths.clean("test"))["sequence_id"].to_list() == ["td", "tc", "tb", "ta"]


def test_a_test_set_that_is_gone_leaves_no_table_behind(raw, paths, run):
    ROWS.write_csv(raw / "train.csv")
    ROWS.write_csv(raw / "test.csv")
    run()
    (raw / "test.csv").unlink()
    assert "test" not in run()
    assert not paths.clean("test").exists()


def test_the_sample_submission_is_kept_as_text(raw, paths, run):
    ROWS.write_csv(raw / "train.csv")
    ROWS.write_csv(raw / "test.csv")
    (raw / "sample_submission.csv").write_text("id,target\nd,0.5\na,0.5\nb,1e-3\nc,\n")
    run()
    sample = pl.read_parquet(paths.clean("sample"))
    assert sample.rows() == [("d", "0.5"), ("a", "0.5"), ("b", "1e-3"), ("c", "")]


def test_a_sample_submission_out_of_a_spreadsheet_is_the_same_and_a_column_twice_is_refused(raw, paths, run):
    """Columns without names became column_2, 'other columns' when submitted; rows of separators were "differ in 1 rows,
    such as ''"; a name twice was no sentence but polars' DuplicateError."""
    ROWS.write_csv(raw / "train.csv")
    ROWS.write_csv(raw / "test.csv")
    text = "id;target;;\nd;0.5;;\n;;;\na;0.5;;\nb;1e-3;;\nc;;;\n;;;\n"
    (raw / "sample_submission.csv").write_text(text)
    run()
    sample = pl.read_parquet(paths.clean("sample"))
    assert sample.columns == ["id", "target"]
    assert sample.rows() == [("d", "0.5"), ("a", "0.5"), ("b", "1e-3"), ("c", "")]
    (raw / "sample_submission.csv").write_text(text.replace("target;", "target;target"))
    with pytest.raises(DataError, match=r"sample_submission.csv: column 'target' is there twice; .* Next: remove one"):
        run()


@pytest.mark.parametrize("beside", ["train.csv", "columns.toml"])
def test_the_test_set_alone_is_read_where_nothing_is_trained(beside, raw, paths, run):
    ROWS.write_csv(raw / "test.csv")
    (raw / beside).write_text(GOOD if beside == "train.csv" else "")
    run(test_only=True)
    assert paths.clean("test").is_file()
    assert not paths.clean("train").exists()


def test_two_builds_are_byte_identical(raw, paths, tmp_path, run):
    ROWS.write_csv(raw / "train.csv")
    run()
    other = Paths(comp="labelled", root=tmp_path / "other")
    preprocess.run(get_competition("labelled"), raw, other)
    for table in ("train", "classes"):
        assert paths.clean(table).read_bytes() == other.clean(table).read_bytes()


# --- what cannot be read ---------------------------------------------------------------------------------------------

GOOD = "id,sequence,label\na,ACGU,x\nb,GGGA,y\n"
BAD: dict[str, tuple[dict[str, str], str]] = {
    "no-file": ({}, r"no train.*found nothing of the kind"),
    "two-files": ({"train.csv": GOOD, "train.fa": ">a x\nACGU\n"}, r"train.csv, train.fa all hold train"),
    "test-alone": ({"test.csv": GOOD}, r"a test set alone; expected the training file too. Next: put train.csv there"),
    "which-file": ({"one.csv": GOOD, "two.csv": GOOD}, r"no train.*found one.csv, two.csv"),
    "empty": ({"train.csv": ""}, r"train.csv: the file is empty. Next: write or download it again"),
    "web-page": ({"train.csv": "<html>\n"}, r"train.csv: the first line is '<html>'"),
    "header-alone": ({"train.csv": "id,sequence,label\n"}, r"train.csv: no sequence in it"),
    "no-sequence-column": ({"train.csv": "id,text,label\na,ACGU,x\n"}, r"no column is called sequence.*found id, text"),
    "no-label-column": (
        {"train.csv": "id,sequence,kind\na,ACGU,x\n"},
        r"no column is called label.*label = '<column>'",
    ),
    "two-label-columns": (
        {"train.csv": "sequence,class,family\nACGU,x,y\n"},
        r"class and family may each be the label",
    ),
    "like-a-label": (  # the heading in brackets was taken, without a word
        {"train.csv": "id,sequence,Target (mRNA),Efficacy (%)\na,ACGU,x,50\n"},
        r"Target \(mRNA\) and Efficacy \(%\) may each be the label.*label = 'Target \(mRNA\)', or numbers = ",
    ),
    "column-not-there": (
        {"train.csv": GOOD, "columns.toml": 'label = "kind"'},
        r"no column 'kind', which columns.toml",
    ),
    "unknown-setting": (
        {"train.csv": GOOD, "columns.toml": 'labels = "x"'},
        r"columns.toml: labels = 'x'; expected id",
    ),
    "no-class-column": (
        {"train.csv": GOOD, "columns.toml": 'classes = ["x"]'},
        r"train.csv: no column 'x', one of columns.toml's classes",
    ),
    "no-flag": (
        {"train.csv": GOOD, "columns.toml": 'classes = ["label"]'},
        r"train.csv: column label holds 'x'; expected 0 or 1",
    ),
    "classes-twice": (
        {"train.csv": GOOD, "columns.toml": 'classes = ["label"]\nlabel = "label"'},
        r"columns.toml: label and classes; expected one of them",
    ),
    "numbers-for-names": (
        {"train.csv": GOOD, "columns.toml": "classes = [1]"},
        r"columns.toml: classes = \[1\]; expected id \(str\)",
    ),
    "merged-twice": (
        {"train.csv": GOOD, "columns.toml": "merge = {x = 'y', y = 'z'}"},
        r"columns.toml: merge: 'y' is merged and merged into; expected one of the two",
    ),
    "merged-numbers": (
        {"train.csv": GOOD, "columns.toml": "numbers = ['label']\nmin_count = 2"},
        r"columns.toml: min_count is for classes, numbers says there are none",
    ),
    "merged-into-a-number": (
        {"train.csv": GOOD, "columns.toml": "merge = {x = 1}"},
        r"columns.toml: merge = \{'x': 1\}; expected .*merge \(dict\), min_count \(int\)",
    ),
    "less-than-none": ({"train.csv": GOOD, "columns.toml": "min_count = -1"}, r"min_count = -1; expected 0 or more"),
    "all-too-few": (
        {"train.csv": GOOD + "c,ACGC,x\n", "columns.toml": "min_count = 2"},
        r"train.csv: columns.toml leaves x of 2 classes; expected at least 2. Next: lower min_count \(it is 2\)",
    ),
    "no-toml": ({"train.csv": GOOD, "columns.toml": "label: x"}, r"columns.toml: not valid TOML"),
    "no-column-names": (
        {"train.csv": "a,ACGUACGUACGUACGUACGUACGU,x\n"},
        r"the first line holds a sequence; expected column names. Next: begin with a line such as 'id,sequence,label'",
    ),
    "other-files": ({"train.docx": "x"}, r"no train.csv.*found train.docx"),
    "hdf5": (
        {"train.h5": "x"},
        r"train.h5: HDF5; expected a table of text or parquet. Next: write it as one in Python: "
        r"pandas.read_hdf\('train.h5', '<key>'\).to_csv\('train.csv', index=False\), sequences as letters",
    ),
    "pickle": (
        {"set.pkl": "x"},
        r"set.pkl: a pickle; .*pandas.read_pickle\('set.pkl'\).to_csv\('set.csv', index=False",
    ),
    "arrays": ({"train.npz": "x"}, r"arrays of numpy; .*pandas.DataFrame\({'sequence': …, 'label': …}\).to_csv"),
    "workbook": ({"train.xlsx": "x"}, r"a workbook; .*pandas.read_excel\('train.xlsx'\).to_csv"),
    "short-row": ({"train.csv": GOOD + "c,ACGU\n"}, r"train.csv: row 3 has 2 cells, 'c,ACGU'; expected 3"),
    "no-letters": ({"train.csv": GOOD + "c,AC9U,x\n"}, r"train.csv: row 3 \(id c\): '9' in the sequence"),
    "empty-sequence": ({"train.csv": GOOD + "c,-,x\n"}, r"train.csv: row 3 \(id c\): empty sequence"),
    "odd-letters": ({"train.csv": GOOD + "c,ACNNGU,x\n"}, r"14\.3% of the letters.*row 3 \(id c\), 2 of 6"),
    "neither": ({"train.csv": GOOD + "c,MKWLF,x\n"}, r"62% of the letters are A, C, G, T, U or N"),
    "no-id": ({"train.csv": GOOD + ",ACGU,x\n"}, r"train.csv: row 3: no id"),
    "one-class": ({"train.csv": GOOD.replace(",y", ",x")}, r"train.csv: 1 class \(x\); expected at least 2"),
    "no-label": ({"train.csv": "sequence,label\nACGU,\n"}, r"0 classes \(no label at all\)"),
    "not-classes": ({"train.csv": "sequence,label\n" + "".join(f"ACGU,c{n}\n" for n in range(20))}, r"20 different"),
    "fasta-without-header": ({"train.fa": "ACGU\n"}, r"train.fa: line 1 is 'ACGU'; expected '>id label'"),
    "empty-folders": ({"train/yes/readme.md": "x"}, r"no <class>.fasta, .*\*.txt in it"),
    "test-id-twice": (
        {"train.csv": GOOD, "test.csv": "id,sequence\na,ACGU\na,ACGA\n"},
        r"test.csv: row 2 \(id a\): an id twice",
    ),
    "sample-of-others": (
        {"train.csv": GOOD, "test.csv": "id,sequence\na,ACGU\n", "sample_submission.csv": "id,x\nb,0\n"},
        r"sample_submission.csv: .*differ in 2 rows, such as 'a'",
    ),
    "sample-alone": (
        {"train.csv": GOOD, "sample_submission.csv": "id,x\nb,0\n"},
        r"sample_submission.csv and no test set",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_bad_set_is_refused_in_one_sentence_and_nothing_is_written(case, raw, paths, run):
    files, expected = BAD[case]
    for name, text in files.items():
        (raw / name).parent.mkdir(parents=True, exist_ok=True)
        (raw / name).write_text(text)
    with pytest.raises(DataError, match=expected) as caught:
        run()
    assert "Next: " in str(caught.value)
    assert "\n" not in str(caught.value)
    assert not list(paths.root.rglob("*.parquet"))


@pytest.mark.parametrize("kind", ["labelled", "profiles"])
def test_a_file_of_another_program_is_refused_by_its_path_too(kind, raw):
    """An HDF5 file was "damaged, cut short or no UTF-8 text … Next: save it as UTF-8, or get it again"."""
    (raw / "set.h5").write_bytes(b"\x89HDF\r\n\x1a\n")
    with pytest.raises(DataError, match=r"set.h5: HDF5; expected a table of text or parquet. Next: write it"):
        get_competition(kind).raw_files(raw / "set.h5")


def test_a_workbook_is_named(raw, run):
    """Its bytes were "no UTF-8 text. Next: get the file again"."""
    (raw / "train.csv").write_bytes(b"PK\x03\x04\xff\xfe\x80")
    with pytest.raises(DataError, match=r"train.csv: an archive, or a workbook; expected text. Next: unpack it"):
        run()


def test_a_cut_archive_is_named(raw, run):
    (raw / "train.fasta.gz").write_bytes(gzip.compress(fasta(" ").encode() * 50)[:-40])
    with pytest.raises(DataError, match=r"train.fasta.gz: damaged, cut short"):
        run()


def test_a_damaged_parquet_file_is_named(raw, run):
    ROWS.write_parquet(raw / "train.parquet", compression="uncompressed")
    data = bytearray((raw / "train.parquet").read_bytes())
    data[4:60] = b"\xff" * 56
    (raw / "train.parquet").write_bytes(data)
    with pytest.raises(DataError, match=r"train.parquet: .*Next: "):
        run()


def test_columns_that_hold_no_text_are_named(raw, run):
    ROWS.with_columns(sequence=pl.concat_list(pl.lit(1), pl.lit(2))).write_parquet(raw / "train.parquet")
    with pytest.raises(
        DataError, match=r"columns id, sequence, label are String, List\(Int32\), String; expected text"
    ):
        run()


def test_a_folder_that_is_not_there_is_named(tmp_path, run):
    with pytest.raises(DataError, match=r"no such file or folder"):
        run(tmp_path / "nowhere")


# --- the name --------------------------------------------------------------------------------------------------------


def test_each_set_has_a_name_of_its_own():
    assert get_competition("labelled-promoters").name == "labelled-promoters"
    assert get_competition("labelled-promoters").task == "classes"


@pytest.mark.parametrize("name", ["labelled-", "labelled-a/b", "labelledx"])
def test_a_name_that_is_no_folder_is_refused(name):
    with pytest.raises(ConfigError, match="is not known"):
        get_competition(name)


def test_kaggle_is_not_asked_for_it(paths):
    from pipeline import download

    with pytest.raises(ConfigError, match=r"download: labelled is a set of your own.*Next: "):
        download.run(get_competition("labelled"), paths)
