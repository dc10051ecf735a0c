"""Hidden test sets of values per nucleotide, which nobody can repair, get every row that their sample asks for."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import polars as pl
import pytest

from pipeline import preprocess, synthetic
from pipeline.competitions import get_competition
from pipeline.competitions.openvaccine import TARGETS
from pipeline.errors import DataError
from pipeline.paths import Paths
from submissions.layout import read_layout

RIBONANZA, OPENVACCINE = get_competition("ribonanza"), get_competition("openvaccine")
PROBES = list(RIBONANZA.targets)


def clean(comp: str, folder: Path) -> tuple[pl.DataFrame, list | None]:
    """The clean test table, and the rows of the sample where these are others."""
    competition = get_competition(comp)
    out = {table: folder.parent / f"{table}.parquet" for table in competition.test_tables}
    competition.clean(competition.raw_files(folder, test_only=True), out)
    own = pl.read_parquet(out["sample"]).to_series().to_list() if out["sample"].is_file() else None
    return pl.read_parquet(out["test"]), own


def told(capsys: pytest.CaptureFixture[str]) -> str:
    return " ".join(capsys.readouterr().err.split())


def write_ribonanza(folder: Path, rows: list[tuple], *, sample: list[int] | None = None, head: str = "") -> Path:
    folder.mkdir()
    lines = [",".join("" if cell is None else str(cell) for cell in row) for row in rows]
    header = head or "id_min,id_max,sequence_id,sequence,future"
    (folder / "test_sequences.csv").write_text("\n".join([header, *lines]) + "\n")
    if sample is not None:
        keys = "\n".join([",".join(["id", *PROBES]), *(f"{key},0.0,0.0" for key in sample)])
        (folder / "sample_submission.csv").write_text(keys + "\n")
    return folder


# rows of test_sequences -> (letters by id_min, what is told)
ODD: dict[str, tuple[list[tuple], dict[int, str], str]] = {
    "gaps": ([(10, 12, "a", "GGC", 0), (20, 21, "b", "AU", 1)], {10: "GGC", 20: "AU"}, ""),
    "another order": ([(20, 21, "b", "AU", 1), (10, 12, "a", "GGC", 0)], {10: "GGC", 20: "AU"}, ""),
    "one id twice": ([(10, 12, "a", "GGC", 0), (13, 14, "a", "AU", 1)], {10: "GGC", 13: "AU"}, ""),
    "no ids": ([(10, 12, "", "GGC", 0), (13, 14, "", "AU", 1)], {10: "GGC", 13: "AU"}, ""),
    "no future": ([(10, 12, "a", "GGC", None)], {10: "GGC"}, ""),
    "fractions": ([("10.0", "12.0", "a", "GGC", 0)], {10: "GGC"}, ""),
    "a row twice": ([(10, 12, "a", "GGC", 0)] * 2, {10: "GGC"}, "1 row without ids of its own left out"),
    "nothing to write": ([(10, 12, "a", "GGC", 0), (13, 12, "b", "", 0)], {10: "GGC"}, "1 row without ids"),
    "longer than its ids": ([(10, 11, "a", "GGC", 0)], {10: "GG"}, "(such as 'a') of another length than its ids"),
    "shorter than its ids": ([(10, 14, "a", "ggT", 0)], {10: "GGUAA"}, "(such as 'a') of another length than its ids"),
    "empty": ([(10, 12, "a", "", 0)], {10: "AAA"}, "of another length than its ids"),
    "one nucleotide": ([(10, 10, "a", "N", 0)], {10: "A"}, "1 sequence with signs other than A, C, G, U, T"),
}


@pytest.mark.parametrize("case", ODD)
def test_odd_rows_of_ribonanza_are_read_as_well_as_they_can_be(case: str, tmp_path: Path, capsys):
    """`rna data` refused most of these, and the notebook ended with "rna data ended with 3" and no submission."""
    rows, expected, sentence = ODD[case]
    test, own = clean("ribonanza", write_ribonanza(tmp_path / "raw", rows))
    assert dict(test.select("id_min", "sequence").iter_rows()) == expected
    assert (test["id_max"] - test["id_min"] + 1).to_list() == [len(text) for text in expected.values()]
    assert test["sequence_id"].is_unique().all()
    assert own is None
    assert sentence in told(capsys)


def test_a_column_that_nothing_is_made_of_may_be_absent(tmp_path: Path):
    rows = [(10, 12, "a", "GGC")]
    assert clean("ribonanza", write_ribonanza(tmp_path / "raw", rows, head="id_min,id_max,sequence_id,sequence"))


def test_ids_of_two_sequences_are_refused(tmp_path: Path):
    rows = [(10, 12, "a", "GGC", 0), (12, 13, "b", "AU", 0)]
    with pytest.raises(DataError, match=r"row 2 \(id b\): id_min 12 is another sequence's too"):
        clean("ribonanza", write_ribonanza(tmp_path / "raw", rows))


def write_openvaccine(folder: Path, sequences: dict[str, str] | list[dict], sample: list[str] | None = None) -> Path:
    folder.mkdir()
    rows = sequences if isinstance(sequences, list) else [{"id": a, "sequence": b} for a, b in sequences.items()]
    (folder / "test.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
    if sample is not None:
        table = pl.DataFrame({"id_seqpos": sample}, schema={"id_seqpos": pl.String})
        table.with_columns(pl.lit(0.0).alias(name) for name in reversed(TARGETS)).write_csv(
            folder / "sample_submission.csv"
        )
    return folder


def test_odd_rows_of_openvaccine_are_read_as_well_as_they_can_be(tmp_path: Path, capsys):
    """`rna data` ended with 3: "the id of row 1 again", "seq_scored None", "seq_length 107 for a sequence of 3"."""
    rows = [{"id": "a", "sequence": "GGC", "seq_length": 107, "seq_scored": 68}, {"id": "b", "sequence": "aTN"}]
    rows += [{"id": "a", "sequence": "AAA"}, {"id": "", "sequence": "A"}, {"id": "c", "sequence": ""}]
    test, own = clean("openvaccine", write_openvaccine(tmp_path / "raw", rows))
    assert dict(test.select("sequence_id", "sequence").iter_rows()) == {"a": "GGC", "b": "AUA"}
    assert (test["seq_scored"].to_list(), own) == ([3, 3], None)
    assert "test.json: 3 rows without an id of its own and a sequence left out" in told(capsys)


KEYS = ["a_0", "a_1", "b_0"]
SAMPLES: dict[str, tuple[list[str], str]] = {
    "another order": (
        ["b_0", "a_0", "a_1"],
        "3 rows in another order than the test set; these are written, in this order",
    ),
    "some rows": (["a_0", "b_0"], "2 rows without 1 position of the test set"),
    "more rows": ([*KEYS, "c_0"], "4 rows with 1 row of no test sequence"),
    "a row twice": ([*KEYS, "a_0"], "4 rows in another order"),
}


@pytest.mark.parametrize("case", SAMPLES)
@pytest.mark.parametrize("comp", ["ribonanza", "openvaccine"])
def test_the_rows_of_a_sample_that_differ_are_kept_and_told(comp: str, case: str, tmp_path: Path, capsys):
    """ "row 1: id_seqpos 'id_2_0'; expected 'id_0_0', in the order of the test set", and the notebook ended with 3."""
    sample, sentence = SAMPLES[case]
    if comp == "openvaccine":
        folder = write_openvaccine(tmp_path / "raw", {"a": "GG", "b": "C"}, sample)
    else:
        number = {key: 10 + place for place, key in enumerate([*KEYS, "c_0"])}
        sample = [number[key] for key in sample]
        rows = [(10, 11, "a", "GG", 0), (12, 12, "b", "C", 0)]
        folder = write_ribonanza(tmp_path / "raw", rows, sample=sample)
    assert clean(comp, folder)[1] == sample
    assert sentence in told(capsys)


@pytest.mark.parametrize("sample", [KEYS, []])
def test_a_sample_of_the_test_sets_rows_or_of_none_changes_nothing(sample: list[str], tmp_path: Path):
    assert clean("openvaccine", write_openvaccine(tmp_path / "raw", {"a": "GG", "b": "C"}, sample))[1] is None


@pytest.mark.parametrize("comp", ["ribonanza", "openvaccine"])
def test_a_test_set_of_nothing_is_one(comp: str, tmp_path: Path):
    write: Callable[..., Path] = write_ribonanza if comp == "ribonanza" else write_openvaccine
    test, own = clean(comp, write(tmp_path / "raw", [], sample=[]))
    assert (test.height, own) == (0, None)
    shutil.rmtree(tmp_path / "raw")
    assert clean(comp, write(tmp_path / "raw", [], sample=[7] if comp == "ribonanza" else ["a_7"]))[1], (
        "whatever that is, it is asked for"
    )


def test_rows_of_a_hidden_sample_are_gone_with_the_next_whole_data_stage(tmp_path: Path):
    """`make submit` would have written the rows of an earlier rehearsal."""
    synthetic.write_openvaccine(tmp_path / "raw", sequences=12, test=3)
    paths, sample = Paths(comp="openvaccine", root=tmp_path), tmp_path / "raw" / "sample_submission.csv"
    whole = pl.read_csv(sample)
    whole.reverse().write_csv(sample)
    preprocess.run(OPENVACCINE, tmp_path / "raw", paths, test_only=True)
    assert read_layout(paths, OPENVACCINE).keys.block(0, 1)["id_seqpos"].tolist() == [whole["id_seqpos"][-1]]
    assert preprocess.run(OPENVACCINE, tmp_path / "raw", paths, test_only=True).status == "current"
    whole.write_csv(sample)
    preprocess.run(OPENVACCINE, tmp_path / "raw", paths)
    assert not paths.clean("sample").exists()
    assert preprocess.run(OPENVACCINE, tmp_path / "raw", paths).status == "current"
    assert read_layout(paths, OPENVACCINE).keys.block(0, 1)["id_seqpos"].tolist() == [whole["id_seqpos"][0]]


def test_a_sample_of_something_else_is_refused(tmp_path: Path):
    folder = write_openvaccine(tmp_path / "raw", {"a": "GG"}, ["x_0", "x_1"])
    with pytest.raises(DataError, match="none of its 2 rows, such as id_seqpos 'x_0', is of the test set"):
        clean("openvaccine", folder)
    (folder / "sample_submission.csv").write_text("id,reactivity_DMS_MaP,reactivity_2A3_MaP\n0,0,0\n")
    with pytest.raises(DataError, match="it is from another competition"):
        clean("openvaccine", folder)
