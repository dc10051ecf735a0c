"""RNA 3D folding: raw files become clean tables, and files that lie are refused in one sentence."""

import zipfile
from collections.abc import Callable
from datetime import date
from pathlib import Path

import polars as pl
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from pipeline.competitions.rna3d import RNA3D, RNA3D2, read_teaching
from pipeline.errors import DataError
from pipeline.schema import SENTINEL
from pipeline.stage import sha256_file
from pipeline.templates.gate import allowed

SEQUENCES = {"1SCL_A": "GGGAAC", "R1117v2": "ACGU", "17RA_A": "GG-UX"}
TEST = {"R1107": "GGCU", "R1_b": "ANG"}


def _table(path: Path, rows: list[dict[str, object]]) -> None:
    pl.DataFrame(rows).write_csv(path)


def _sequences(sequences: dict[str, str]) -> list[dict[str, object]]:
    return [
        {"target_id": name, "sequence": letters, "temporal_cutoff": "2022-05-28", "description": "a,\nb"}
        for name, letters in sequences.items()
    ]


def _labels(sequences: dict[str, str], conformers: int = 1) -> list[dict[str, object]]:
    rows: list[dict[str, object]] = []
    for name, letters in sequences.items():
        for resid, letter in enumerate(letters, start=1):
            row: dict[str, object] = {"ID": f"{name}_{resid}", "resname": letter, "resid": resid}
            for number in range(1, conformers + 1):
                row |= {f"x_{number}": 5.5 * resid, f"y_{number}": float(number), f"z_{number}": -1.25}
            rows.append(row)
    return rows


def _sample(sequences: dict[str, str]) -> list[dict[str, object]]:
    rows = _labels(sequences, conformers=5)
    return [row | {name: 0.0 for name in row if name[1] == "_"} for row in rows]


@pytest.fixture
def raw(tmp_path: Path) -> Path:
    folder = tmp_path / "raw"
    folder.mkdir()
    _table(folder / "train_sequences.csv", _sequences(SEQUENCES))
    _table(folder / "train_labels.csv", _labels(SEQUENCES))
    _table(folder / "test_sequences.csv", _sequences(TEST))
    _table(folder / "sample_submission.csv", _sample(TEST))
    return folder


def _clean(folder: Path) -> tuple[dict[str, pl.DataFrame], dict]:
    out = {table: folder.parent / f"{table}.parquet" for table in RNA3D.tables}
    facts = RNA3D.clean(RNA3D.raw_files(folder), out)
    return {table: pl.read_parquet(path) for table, path in out.items()}, facts


def test_a_target_becomes_one_row_with_coordinates_in_residue_order(raw: Path) -> None:
    rows = _labels(SEQUENCES)
    _table(raw / "train_labels.csv", rows[::-1])
    train = _clean(raw)[0]["train"]
    assert train["sequence_id"].to_list() == ["1SCL_A", "R1117v2"]
    assert train["x"][1].to_list() == [5.5, 11.0, 16.5, 22.0]
    assert train.schema["x"] == pl.List(pl.Float32)
    assert train.schema["temporal_cutoff"] == pl.Date
    assert train["scored"].all()


@pytest.mark.parametrize("packed", [False, True])
def test_later_versions_of_the_training_files_are_told_as_not_read(
    packed: bool, raw: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Part 1 ships them beside the first ones, with six times the targets; nothing said that they were left out."""
    plain, _ = _clean(raw)
    assert "not read" not in capsys.readouterr().err
    for label in ("train_sequences", "train_labels"):
        (raw / f"{label}.v2.csv").write_text("another version")
    (raw / "PDB_RNA").mkdir()
    _table(raw / "PDB_RNA" / "pdb_release_dates_NA.csv", [{"Entry ID": "1SCL", "Release Date": "1995-01-26"}])
    folder = raw
    if packed:
        folder = raw.with_suffix(".zip")
        with zipfile.ZipFile(folder, "w") as archive:
            for path in raw.rglob("*.csv"):
                archive.write(path, path.relative_to(raw))
    assert "release_dates" in RNA3D.raw_files(folder)
    assert _clean(folder)[0]["train"].equals(plain["train"])
    assert "train_labels.v2.csv, train_sequences.v2.csv: not read" in " ".join(capsys.readouterr().err.split())


def test_training_rows_with_odd_letters_are_dropped_and_named(raw: Path) -> None:
    tables, facts = _clean(raw)
    assert facts["train"]["odd_letter_ids"] == ["17RA_A"]
    assert "17RA_A" not in tables["references"]["sequence_id"].to_list()


def test_test_rows_with_odd_letters_go_on_and_the_sample_keeps_them(raw: Path) -> None:
    tables, facts = _clean(raw)
    assert dict(tables["test"].select("sequence_id", "sequence").iter_rows())["R1_b"] == "AAG"
    assert tables["sample"]["resname"].to_list() == list("GGCUANG")
    assert facts["test_odd_letters"] == {"ids": ["R1_b"], "read_as": "A"}


def test_the_sample_keeps_its_own_row_order(raw: Path) -> None:
    rows = _sample(TEST)
    rows = rows[4:] + rows[:4]
    _table(raw / "sample_submission.csv", rows)
    assert _clean(raw)[0]["sample"]["ID"].to_list() == [row["ID"] for row in rows]


@pytest.mark.parametrize("sentinel", [-1e18, SENTINEL, None, "NaN"])
def test_a_sentinel_becomes_null(raw: Path, sentinel: float | str | None) -> None:
    rows = _labels(SEQUENCES)
    rows[1] |= {"x_1": sentinel, "y_1": sentinel, "z_1": sentinel}
    pl.DataFrame(rows, strict=False, infer_schema_length=1).write_csv(raw / "train_labels.csv")
    if isinstance(sentinel, str):
        text = (raw / "train_labels.csv").read_text().splitlines()
        text[2] = "1SCL_A_2,G,2,NaN,NaN,NaN"
        (raw / "train_labels.csv").write_text("\n".join([*text, ""]))
    train = _clean(raw)[0]["train"]
    assert train["y"][0].to_list() == [1.0, None, 1.0, 1.0, 1.0, 1.0]


def test_fewer_than_three_resolved_residues_are_not_scored(raw: Path) -> None:
    rows = _labels(SEQUENCES)
    for row in rows[2:6]:
        row |= {"x_1": -1e18, "y_1": -1e18, "z_1": -1e18}
    _table(raw / "train_labels.csv", rows)
    assert _clean(raw)[0]["train"]["scored"].to_list() == [False, True]


def test_every_conformation_with_a_resolved_residue_is_a_reference(raw: Path) -> None:
    known = {"R1107": "GGCU", "R1190": "AC"}
    rows = _labels(known, conformers=3)
    for row in rows[:4]:
        row |= {"x_2": -1e18, "y_2": -1e18, "z_2": -1e18}
    _table(raw / "validation_labels.csv", rows)
    _table(raw / "validation_sequences.csv", _sequences(known | {"R1156": "GG"}))
    tables, facts = _clean(raw)
    found = tables["references"].filter(pl.col("sequence_id").is_in(list(known)))
    assert list(found.select("sequence_id", "conformer").iter_rows()) == [
        ("R1107", 1),
        ("R1107", 3),
        ("R1190", 1),
        ("R1190", 2),
        ("R1190", 3),
    ]
    assert facts["most_conformers"] == 3


def _set_days(raw: Path, *days: str) -> None:
    rows = _sequences(SEQUENCES)
    for row, day in zip(rows, days, strict=False):
        row["temporal_cutoff"] = day
    _table(raw / "train_sequences.csv", rows)


def test_training_targets_dated_after_a_test_cutoff_are_set_apart(raw: Path) -> None:
    _set_days(raw, "2022-05-29")
    tables, facts = _clean(raw)
    assert tables["train"]["sequence_id"].to_list() == ["R1117v2"]
    assert tables["later"]["sequence_id"].to_list() == ["1SCL_A"]
    assert tables["later"].schema == tables["train"].schema
    assert "1SCL_A" in tables["references"]["sequence_id"].to_list()
    assert (facts["train"]["later"], facts["train"]["teaches_nothing"]) == (1, [])


def test_what_has_no_date_teaches_nothing_unless_its_pdb_id_is_an_old_one(
    raw: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """An undated target (8SA3_A, of 2023) trained networks for targets with a cutoff of 2022."""
    _set_days(raw, "", "")
    tables, facts = _clean(raw)
    assert dict(tables["train"].select("sequence_id", "teaches").iter_rows()) == {"1SCL_A": True, "R1117v2": False}
    assert read_teaching(raw.parent / "train.parquet") == {"1SCL_A"}
    assert (facts["train"]["no_date_in_the_files"], facts["train"]["teaches_nothing"]) == (2, ["R1117v2"])
    assert "1 of 2 labelled targets have no date that shows them to be of 2022-05-28 or before" in " ".join(
        capsys.readouterr().err.split()
    )


def test_nothing_is_held_back_from_test_targets_without_a_cutoff(raw: Path) -> None:
    _set_days(raw, "", "2024-01-01")
    _table(raw / "test_sequences.csv", [row | {"temporal_cutoff": ""} for row in _sequences(TEST)])
    tables, _ = _clean(raw)
    assert tables["train"]["teaches"].to_list() == [True, True]
    assert tables["later"].is_empty()


def test_a_test_targets_own_entry_teaches_nothing(raw: Path) -> None:
    """Part 2 gives as cutoff of a test target the day of its entry's release: a chain of that day taught networks."""
    _set_days(raw, "2022-05-28", "2020-01-01")
    _table(raw / "test_sequences.csv", _sequences({"1scl": "GGCU"}))
    _table(raw / "sample_submission.csv", _sample({"1scl": "GGCU"}))
    tables, _ = _clean(raw)
    assert dict(tables["train"].select("sequence_id", "teaches").iter_rows()) == {"1SCL_A": False, "R1117v2": True}


@pytest.mark.parametrize("place", [".", "PDB_RNA"])
@pytest.mark.parametrize(("released", "teaches"), [("2022-05-28", True), ("2022-05-29", False)])
def test_release_dates_of_part_2_date_what_has_none(raw: Path, place: str, released: str, teaches: bool) -> None:
    _set_days(raw, "", "2020-01-01")
    (raw / place).mkdir(exist_ok=True)
    dates = raw / place / "pdb_release_dates_NA.csv"
    dates.write_text(f"Entry ID,Release Date\n1scl,{released}\nR1117v2,2024-01-01\n")
    tables, _ = _clean(raw)
    table = tables["train" if teaches else "later"].filter(sequence_id="1SCL_A")
    assert table.select("temporal_cutoff", "teaches").rows() == [(date.fromisoformat(released), teaches)]
    assert tables["train"].filter(sequence_id="R1117v2")["temporal_cutoff"].to_list() == [date(2020, 1, 1)]


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("1SCL,May 2020\n", "row 1: Release Date is no date"),
        ("1SCL,2020-05-01\n1SCL,2021-05-01\n", "row 2: this Entry ID had another date before"),
    ],
)
def test_release_dates_that_are_none_are_refused(raw: Path, text: str, sentence: str) -> None:
    (raw / "pdb_release_dates_NA.csv").write_text(f"Entry ID,Release Date\n{text}")
    with pytest.raises(DataError, match=sentence):
        _clean(raw)


DAYS = st.none() | st.dates(date(2000, 1, 1), date(2025, 12, 31))


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(released=st.tuples(DAYS, DAYS, DAYS), cutoffs=st.tuples(DAYS, DAYS))
def test_nothing_is_learned_from_a_target_newer_than_a_test_targets_cutoff(
    raw: Path, released: tuple[date | None, ...], cutoffs: tuple[date | None, ...]
) -> None:
    """What teaches is, for every test target, data that its cutoff allows; what has no date is not."""
    train, test = {f"T{n}": "GGAC" for n in range(3)}, {f"R{n}": "GGAC" for n in range(2)}
    for name, sequences, days in (("train_sequences", train, released), ("test_sequences", test, cutoffs)):
        rows = _sequences(sequences)
        for row, day in zip(rows, days, strict=True):
            row["temporal_cutoff"] = str(day or "")
        _table(raw / f"{name}.csv", rows)
    _table(raw / "train_labels.csv", _labels(train))
    _table(raw / "sample_submission.csv", _sample(test))
    known = [day for day in cutoffs if day]
    late = [day for day in released if day and known and day > min(known)]
    if known and all(day is None or day > min(known) for day in released):
        with pytest.raises(DataError, match=f"none of 3 labelled targets is known to be of .*{len(late)} are dated"):
            _clean(raw)
        return
    tables, _ = _clean(raw)
    teaching = tables["train"].filter("teaches")["temporal_cutoff"]
    assert all(allowed(cutoff, day) for cutoff in cutoffs for day in teaching)
    assert len(teaching) == sum(all(allowed(cutoff, day) for cutoff in cutoffs) for day in released)
    assert sorted(tables["later"]["temporal_cutoff"].to_list()) == sorted(late)


def test_chains_and_copies_of_part_2_reach_the_references(raw: Path) -> None:
    rows = _labels(SEQUENCES)
    for row in rows:
        row |= {"chain": "B", "copy": 1 + (row["resid"] > 3)}
    _table(raw / "train_labels.csv", rows)
    references = _clean(raw)[0]["references"]
    assert references["chain"].to_list() == [["B"] * 6, ["B"] * 4]
    assert references["copy"].to_list() == [[1, 1, 1, 2, 2, 2], [1, 1, 1, 2]]


def test_labels_of_part_1_have_no_chains(raw: Path) -> None:
    references = _clean(raw)[0]["references"]
    assert references["chain"].null_count() == references["copy"].null_count() == references.height


@pytest.mark.parametrize(
    ("stoichiometry", "fasta", "lengths"),
    [
        ("A:2", "", [3, 3]),
        ("A:1;B:1", ">1ABC_1|Chain A[auth A]|x|\nACGAC\n>1ABC_2|Chains B[auth B], C[auth C]|y|\nG", [5, 1]),
        ("B:1;A:1", ">1ABC_1|Chain A[auth A]|x|\nACGAC\n>1ABC_2|Chain B[auth B]|y|\nG", None),  # in another order
        ("A:4", "", None),
        ("", "", None),
    ],
)
def test_chain_ends_are_found_where_stoichiometry_and_sequence_agree(
    raw: Path, stoichiometry: str, fasta: str, lengths: list[int] | None
) -> None:
    rows = _sequences({"R1107": "ACGACG"})
    rows[0] |= {"stoichiometry": stoichiometry, "all_sequences": fasta}
    _table(raw / "test_sequences.csv", rows)
    _table(raw / "sample_submission.csv", _sample({"R1107": "ACGACG"}))
    test = _clean(raw)[0]["test"]
    assert test["chain_lengths"].to_list() == [lengths]
    assert test["stoichiometry"].to_list() == [stoichiometry or None]


def test_files_of_part_1_are_told_from_those_of_part_2(raw: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """COMP=rna3d2 took part 1's folder without a word."""
    RNA3D.raw_files(raw)
    assert capsys.readouterr().err == ""
    RNA3D2.raw_files(raw)
    assert "no column stoichiometry, which part 2 ships" in " ".join(capsys.readouterr().err.split())
    _table(raw / "test_sequences.csv", [row | {"stoichiometry": "A:1"} for row in _sequences(TEST)])
    RNA3D2.raw_files(raw)
    assert capsys.readouterr().err == ""


def test_a_stoichiometry_that_is_none_is_refused(raw: Path) -> None:
    rows = _sequences(TEST)
    rows[1] |= {"stoichiometry": "A-2"}
    _table(raw / "test_sequences.csv", rows)
    with pytest.raises(DataError, match=r"row 2 \(R1_b\): stoichiometry is not <chain>:<copies>;…, such as A:2;B:1"):
        _clean(raw)


def test_clusters_become_groups(raw: Path) -> None:
    _table(raw / "train_clusters.csv", [{"target_id": "R1117v2", "seq_cluster80": 7, "source": "a"}])
    assert _clean(raw)[0]["train"]["group"].to_list() == [None, "7"]


def test_two_builds_are_byte_identical(raw: Path, tmp_path: Path) -> None:
    digests = []
    for _ in range(2):
        _clean(raw)
        digests.append([sha256_file(tmp_path / f"{table}.parquet") for table in RNA3D.tables])
    assert digests[0] == digests[1]


def _change(path: Path, old: str, new: str) -> None:
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new, 1))


BAD = {
    "id without underscore": ("train_labels.csv", "1SCL_A_2,", "1SCLA2,", "row 2: ID '1SCLA2'.*expected <target_id>_"),
    "resid other than in id": ("train_labels.csv", "1SCL_A_2,G,2", "1SCL_A_2,G,3", "row 2.*resid is not the number"),
    "duplicate residue": ("train_labels.csv", "1SCL_A_2,G,2", "1SCL_A_1,G,1", "row 2 .1SCL_A.*there already"),
    "missing residue": ("train_labels.csv", "1SCL_A_2,G,2,11.0,1.0,-1.25\n", "", "1SCL_A has 5 of 6 residues"),
    "wrong letter": ("train_labels.csv", "1SCL_A_2,G", "1SCL_A_2,U", "resname 'U', but .* has 'G' there"),
    "other target": ("train_labels.csv", "R1117v2_1,", "R1118_1,", "R1118.*not in the sequences file"),
    "far coordinate": ("train_labels.csv", "1SCL_A_2,G,2,11.0", "1SCL_A_2,G,2,10001", "x_1 is beyond 10,000 Å"),
    "infinite coordinate": ("train_labels.csv", "1SCL_A_2,G,2,11.0", "1SCL_A_2,G,2,inf", "x_1 is beyond 10,000 Å"),
    "text coordinate": (
        "train_labels.csv",
        "1SCL_A_2,G,2,11.0",
        "1SCL_A_2,G,2,abc",
        "row 2.*'x_1' holds 'abc'; expected a number",
    ),
    "fraction": ("train_labels.csv", "1SCL_A_2,G,2,", "1SCL_A_2,G,2.0,", "row 2.*'resid' holds '2.0'; .* whole number"),
    "partial residue": ("train_labels.csv", "2,11.0,1.0,-1.25", "2,11.0,,", "there only in part"),
    "empty sequence": ("train_sequences.csv", "GGGAAC", "", "row 1 .1SCL_A.: empty sequence"),
    "bad date": ("train_sequences.csv", "2022-05-28", "28 May 22", "row 1.*no date; expected YYYY-MM-DD"),
    "duplicate target": ("train_sequences.csv", "R1117v2", "1SCL_A", "row 2 .1SCL_A.*target_id was there already"),
    "sample letter": ("sample_submission.csv", "R1107_1,G", "R1107_1,A", "sample_submission.csv: row 1 .R1107_1.*'A'"),
    "sample without fifteen": ("sample_submission.csv", "x_2", "xx2", "column 'x_2' is missing"),
}


@pytest.mark.parametrize("case", BAD)
def test_a_file_that_contradicts_itself_is_refused(raw: Path, case: str) -> None:
    name, old, new, sentence = BAD[case]
    _change(raw / name, old, new)
    with pytest.raises(DataError, match=sentence) as caught:
        _clean(raw)
    assert "\n" not in str(caught.value)
    assert str(caught.value).count("Next:") == 1


def test_a_sample_of_other_targets_is_refused(raw: Path) -> None:
    _table(raw / "sample_submission.csv", _sample(SEQUENCES))
    with pytest.raises(DataError, match=r"row 1 \(1SCL_A\): this target is not in test_sequences"):
        _clean(raw)


def test_a_sample_without_a_test_target_is_refused(raw: Path) -> None:
    _table(raw / "sample_submission.csv", _sample({"R1107": "GGCU"}))
    with pytest.raises(DataError, match="no rows for target R1_b"):
        _clean(raw)


@pytest.mark.parametrize("content", ["", "<!DOCTYPE html>\n<html><body>Not found</body></html>\n", "ID,resname\n"])
def test_a_page_or_an_empty_file_under_the_right_name_is_refused(raw: Path, content: str) -> None:
    (raw / "train_labels.csv").write_text(content)
    with pytest.raises(DataError, match=r"train_labels.csv: (the file is empty|a web page|column 'resid')"):
        _clean(raw)


def test_another_competitions_sample_is_refused(raw: Path) -> None:
    (raw / "sample_submission.csv").write_text("id,reactivity_DMS_MaP,reactivity_2A3_MaP\n0,0,0\n")
    with pytest.raises(DataError, match=r"sample_submission.csv: column 'ID', 'resname', 'resid'"):
        _clean(raw)


def test_a_missing_file_is_named(raw: Path) -> None:
    (raw / "train_labels.csv").unlink()
    with pytest.raises(DataError, match=r"no train_labels.csv, .csv.gz or .parquet"):
        RNA3D.raw_files(raw)


def test_validation_labels_need_their_sequences(raw: Path) -> None:
    _table(raw / "validation_labels.csv", _labels({"R1107": "GGCU"}))
    with pytest.raises(DataError, match="validation_labels came without validation_sequences"):
        RNA3D.raw_files(raw)


@pytest.mark.shared
def test_the_shared_files_become_182_training_targets_and_189_references(
    shared_data: Callable[[str], Path], tmp_path: Path
) -> None:
    out = {table: tmp_path / f"{table}.parquet" for table in RNA3D.tables}
    facts = RNA3D.clean(RNA3D.raw_files(shared_data("stanford-rna-3d-folding")), out)
    assert facts["train"]["rows"] == facts["train_scored"] == 182
    assert (facts["references"], facts["reference_targets"], facts["most_conformers"]) == (189, 187, 2)
    assert (facts["test_rows"], facts["sample_rows"]) == (12, 2515)


@pytest.mark.shared
def test_the_shared_files_of_part_2_give_every_targets_chains(shared_data: Callable[[str], Path], raw: Path) -> None:
    """28 targets of 19 to 4,640 nt, seven of them of several chains, beside training files of any release."""
    folder = shared_data("stanford-rna-3d-folding")
    for name in ("test_sequences", "sample_submission"):
        (raw / f"{name}.csv").unlink()
        (raw / f"{name}.parquet").symlink_to(folder / f"part2_{name}.parquet")
    tables, facts = _clean(raw)
    assert (facts["test_rows"], facts["sample_rows"], facts["test_lengths"]["longest"]) == (28, 9762, 4640)
    ends = tables["test"].select("sequence_id", pl.col("chain_lengths").list.sum(), pl.col("sequence").str.len_chars())
    assert (ends["chain_lengths"] == ends["sequence"]).all()
    assert facts["test_multi_chain"] == ["9G4P", "9G4Q", "9I9W", "9JGM", "9MME", "9WHV", "9ZCC"]
