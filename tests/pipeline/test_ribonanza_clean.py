"""The data stage on Ribonanza's wide files: what it keeps, what it computes, what it refuses."""

import gzip
import hashlib
import json
import shutil
import zipfile
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from pipeline import preprocess
from pipeline.competitions import raw, ribonanza
from pipeline.competitions.ribonanza import RIBONANZA, error_sums, score
from pipeline.competitions.wide import ProfileStore, find_layout
from pipeline.errors import DataError, StorageError
from pipeline.paths import Paths
from pipeline.schema import PROBES
from pipeline.stage import Report

WIDTH = 9
TEST_CSV = "id_min,id_max,sequence_id,sequence,future\n0,4,t1,ACGUA,0\n5,7,t2,ggt,1\n"
SAMPLE_CSV = "id,reactivity_DMS_MaP,reactivity_2A3_MaP\n" + "".join(f"{row},0.0,0.0\n" for row in range(8))


@dataclass(frozen=True)
class Row:
    """One line of a wide file."""

    sequence_id: str
    probe: str = "DMS_MaP"
    sequence: str = "ACGUACG"
    dataset: str = "lib"
    reads: object = 500
    sn: object = 3.0
    passes: object = 1
    reactivity: tuple = (None, 0.5, 0.25, -0.125)
    error: tuple = field(default=(None, 0.1, 0.1, 0.1))

    def cells(self, *, width: int = WIDTH) -> list[str]:
        name = self.dataset + {"DMS_MaP": "_DMS", "2A3_MaP": "_2A3"}.get(self.probe, "")
        keys = [self.sequence_id, self.sequence, self.probe, name, self.reads, self.sn, self.passes]
        lists = [*self.reactivity, *[None] * (width - len(self.reactivity))]
        lists += [*self.error, *[None] * (width - len(self.error))]
        return ["" if value is None else str(value) for value in [*keys, *lists]]


def header(*, width: int = WIDTH) -> list[str]:
    keys = ["sequence_id", "sequence", "experiment_type", "dataset_name", "reads", "signal_to_noise", "SN_filter"]
    stems = ("reactivity", "reactivity_error")
    return keys + [f"{stem}_{position:04d}" for stem in stems for position in range(1, width + 1)]


def both(sequence_id: str, **values: object) -> list[Row]:
    return [Row(sequence_id, "2A3_MaP", **values), Row(sequence_id, "DMS_MaP", **values)]  # type: ignore[arg-type]


def wide_csv(rows: Iterable[Row], *, width: int = WIDTH, without: tuple[str, ...] = ()) -> str:
    names = header(width=width)
    kept = [column for column, name in enumerate(names) if name not in without]
    lines = [names, *(row.cells(width=width) for row in rows)]
    return "".join(",".join(line[column] for column in kept) + "\n" for line in lines)


def raw_folder(folder: Path, train: str | None, *, test: str = TEST_CSV) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    if train is not None:
        (folder / "train_data.csv").write_bytes(train.encode())
    (folder / "test_sequences.csv").write_text(test)
    return folder


def run(folder: Path, out: Path) -> tuple[Report, pl.DataFrame]:
    paths = Paths(comp="ribonanza", root=out)
    report = preprocess.run(RIBONANZA, folder, paths)
    return report, pl.read_parquet(paths.clean("train"))


def clean_csv(tmp_path: Path, train: str, **files: str) -> tuple[Report, pl.DataFrame]:
    return run(raw_folder(tmp_path / "raw", train, **files), tmp_path / "out")


def random_rows(rng: np.random.Generator, sequences: int) -> list[Row]:
    """Shuffled profiles with gaps, absent probes and duplicates, in three decimals as the organisers write them."""
    rows = []
    for number in range(sequences):
        length = int(rng.integers(3, WIDTH + 4))  # some sequences are longer than the table is wide
        sequence = "".join(rng.choice(list("ACGUacgutT"), length))
        for probe in rng.choice(PROBES, int(rng.integers(1, 5))):
            measured = min(length, WIDTH)
            values = np.round(rng.normal(0.4, 1.0, (2, measured)), 3).astype(object)
            values[rng.random((2, measured)) < 0.4] = None
            reads, sn = int(rng.integers(0, 300)), round(float(rng.normal(2, 2)), 3)
            rows.append(
                Row(
                    f"id{number:03d}", str(probe), sequence, "lib", reads, sn, int(rng.integers(2)), *map(tuple, values)
                )
            )
    return [rows[place] for place in rng.permutation(len(rows))]


def expected_profiles(rows: list[Row]) -> dict[tuple[str, str], Row]:
    """(id, probe) -> the row to keep, by the plainest reading of the rule."""
    best: dict[tuple[str, str], Row] = {}
    for row in rows:
        key = (row.sequence_id, row.probe)
        if key not in best or row.sn > best[key].sn:  # type: ignore[operator]
            best[key] = row
    return best


def padded(values: tuple, length: int) -> list[float | None]:
    return [None if value is None else float(np.float32(value)) for value in values] + [None] * (length - len(values))


# --- what it keeps ---------------------------------------------------------------------------------------------------


def test_table_agrees_with_a_row_by_row_reading(
    tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
):
    """Many blocks, many row groups, any order of rows."""
    monkeypatch.setattr(raw, "BLOCK_BYTES", 4096)
    monkeypatch.setattr(ribonanza, "ROW_GROUP", 7)
    rows = random_rows(rng, 60)
    report, table = clean_csv(tmp_path, wide_csv(rows))
    best = expected_profiles(rows)
    assert table["sequence_id"].to_list() == sorted({row.sequence_id for row in rows})
    assert report.facts["duplicates_resolved"] == len(rows) - len(best) > 0
    for record in table.iter_rows(named=True):
        found = {probe: best.get((record["sequence_id"], probe)) for probe in PROBES}
        assert record["scored"] == all(row is not None and row.passes == 1 for row in found.values())
        for probe, row in found.items():
            got = [
                record[f"{name}_{probe}"]
                for name in ("reactivity", "reactivity_error", "signal_to_noise", "reads", "SN_filter")
            ]
            if row is None:
                assert got == [None] * 5
                continue
            sequence = row.sequence.upper().replace("T", "U")
            assert record["sequence"] == sequence
            lists = [padded(values, len(sequence)) for values in (row.reactivity, row.error)]
            assert got == [*lists, float(np.float32(row.sn)), row.reads, row.passes == 1]  # type: ignore[arg-type]


def test_columns_and_their_types(tmp_path: Path):
    _, table = clean_csv(tmp_path, wide_csv(both("a")))
    per_probe = {
        "reactivity": pl.List(pl.Float32),
        "reactivity_error": pl.List(pl.Float32),
        "signal_to_noise": pl.Float32,
        "reads": pl.Int64,
        "SN_filter": pl.Boolean,
    }
    keys = {
        "sequence_id": pl.String,
        "sequence": pl.String,
        "dataset_name": pl.String,
        "group": pl.String,
        "scored": pl.Boolean,
    }
    assert dict(table.schema) == keys | {
        f"{name}_{probe}": kind for probe in PROBES for name, kind in per_probe.items()
    }
    assert set(RIBONANZA.targets) | set(RIBONANZA.signal_to_noise or ()) < set(table.columns)


def test_test_table_is_sorted_by_its_row_ids(tmp_path: Path):
    lines = TEST_CSV.splitlines(keepends=True)
    report, _ = clean_csv(tmp_path, wide_csv(both("a")), test=lines[0] + lines[2] + lines[1])
    table = pl.read_parquet(report.outputs["test"])
    assert dict(table.schema) == {
        "sequence_id": pl.String,
        "sequence": pl.String,
        "id_min": pl.Int64,
        "id_max": pl.Int64,
        "future": pl.Int8,
    }
    assert table.rows() == [("t1", "ACGUA", 0, 4, 0), ("t2", "GGU", 5, 7, 1)]


@pytest.mark.parametrize(
    "form", ["crlf", "bom", "gzip", "gzip named csv", "zip", "competition zip", "parquet", "parquet of float64"]
)
def test_every_form_of_the_raw_file_gives_the_same_bytes(form: str, tmp_path: Path, rng: np.random.Generator):
    text = wide_csv(random_rows(rng, 20))
    plain, _ = run(raw_folder(tmp_path / "plain", text), tmp_path / "a")
    folder = raw_folder(tmp_path / "raw", None)
    write_form(folder, text, form)
    other, _ = run(folder, tmp_path / "b")
    for table in RIBONANZA.tables:
        assert plain.outputs[table].read_bytes() == other.outputs[table].read_bytes()


def write_form(folder: Path, text: str, form: str) -> None:
    if form == "crlf":
        (folder / "train_data.csv").write_bytes(text.replace("\n", "\r\n").encode())
    elif form == "bom":
        (folder / "train_data.csv").write_bytes(b"\xef\xbb\xbf" + text.encode())
    elif form.startswith("gzip"):
        name = "train_data.csv" if form.endswith("csv") else "train_data.csv.gz"
        (folder / name).write_bytes(gzip.compress(text.encode()))
    elif form.endswith("zip"):
        with zipfile.ZipFile(folder / ("all.zip" if form.startswith("comp") else "train_data.csv.zip"), "w") as archive:
            archive.writestr("data/train_data.csv", text, zipfile.ZIP_DEFLATED)
            archive.writestr("other.csv", "x\n")
    else:
        kind = pl.Float64 if form.endswith("64") else pl.Float32
        numbers = {name: kind for name in header()[5:] if name != "SN_filter"}
        text_types = dict.fromkeys(header()[:4], pl.String)
        table = pl.read_csv(text.encode(), schema_overrides=numbers | text_types)
        table.with_columns(pl.col("dataset_name").cast(pl.Categorical)).write_parquet(folder / "train_data.parquet")


def test_scratch_file_and_parts_are_gone_afterwards(tmp_path: Path):
    report, _ = clean_csv(tmp_path, wide_csv(both("a")))
    names = {path.name for path in report.outputs["train"].parent.iterdir()}
    assert names == {"train.parquet", "test.parquet", "data.manifest.json"}


# --- what it computes ------------------------------------------------------------------------------------------------


def test_sn_filter_is_computed_where_the_file_has_none(tmp_path: Path):
    """The organisers' rule: signal_to_noise above 1 and more than 100 reads."""
    cases = {"a": (1.0, 101), "b": (1.001, 100), "c": (1.001, 101), "d": (None, 5000)}
    rows = [row for key, (sn, reads) in cases.items() for row in both(key, sn=sn, reads=reads, passes=0)]
    _, table = clean_csv(tmp_path, wide_csv(rows, without=("SN_filter",)))
    assert table["scored"].to_list() == [False, False, True, False]
    assert table["signal_to_noise_DMS_MaP"].to_list()[3] is None


def test_reads_may_be_absent_where_the_file_has_the_filter(tmp_path: Path):
    _, table = clean_csv(tmp_path, wide_csv(both("a"), without=("reads",)))
    assert table["scored"].to_list() == [True]
    assert table["reads_DMS_MaP"].to_list() == [None]


def test_highest_signal_to_noise_wins_and_the_first_row_wins_a_tie(tmp_path: Path):
    found = [(None, 0.0), (2.0, 0.1), (5.0, 0.2), (5.0, 0.3), (-1.0, 0.4)]
    rows = [Row("a", sn=sn, reactivity=(value,)) for sn, value in found]
    report, table = clean_csv(tmp_path, wide_csv(rows))
    assert table["reactivity_DMS_MaP"].to_list()[0][0] == pytest.approx(0.2)
    assert report.facts["duplicates_resolved"] == 4
    assert report.facts["rows"] == 5


def test_dataset_name_loses_the_probe_and_the_first_probe_names_a_mixture(tmp_path: Path):
    rows = [
        *both("a", dataset="15k"),
        Row("b", "2A3_MaP", dataset="x"),
        Row("b", dataset="y"),
        Row("c", "2A3_MaP", dataset="z_DMS"),
    ]
    report, table = clean_csv(tmp_path, wide_csv(rows))
    assert table["dataset_name"].to_list() == ["15k", "y", "z_DMS"]
    assert report.facts["datasets"] == {"15k": 1, "y": 1, "z_DMS": 1}
    assert report.facts["dataset_names_that_differ_between_probes"] == 1


def test_known_groups_are_joined_by_id(tmp_path: Path):
    folder = raw_folder(tmp_path / "raw", wide_csv([*both("b"), *both("a"), *both("c")]))
    groups = pl.DataFrame(
        {"sequence_id": ["c", "zz", "a"], "group": ["virus", "x", None], "window_start": [10, 20, None]}
    )
    groups.write_parquet(folder / "library_groups.parquet")
    report, table = run(folder, tmp_path / "out")
    assert table["group"].to_list() == [None, None, "virus"]
    assert report.facts["groups"] == {"joined": 1, "groups": 1, "ids_not_in_train": 1}


def test_report_holds_the_numbers_of_the_table(tmp_path: Path, rng: np.random.Generator):
    report, table = clean_csv(tmp_path, wide_csv(random_rows(rng, 80)))
    for probe in PROBES:
        facts = report.facts["probes"][probe]
        lists = table[f"reactivity_{probe}"].drop_nulls()
        values = np.sort(lists.explode().drop_nulls().to_numpy())
        assert facts["profiles"] == len(lists)
        assert facts["pass_SN_filter"] == table[f"SN_filter_{probe}"].sum()
        assert facts["null_share"] == pytest.approx(1 - len(values) / lists.list.len().sum(), abs=1e-4)
        names = ["min", "q01", "q05", "q25", "q50", "q75", "q95", "q99", "max"]
        ranks = np.ceil(np.array([0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1]) * len(values)).astype(int)
        wanted = values[np.maximum(ranks - 1, 0)]
        assert [facts["reactivity"][name] for name in names] == pytest.approx(wanted, abs=1e-3)
        signal = table[f"signal_to_noise_{probe}"].drop_nulls()
        assert facts["signal_to_noise"]["1 to 2"] == signal.is_between(1, 2, closed="left").sum()
        assert sum(facts["signal_to_noise"].values()) == len(signal)
    lengths = table["sequence"].str.len_chars().value_counts().rows()
    assert report.facts["lengths"] == {str(length): count for length, count in lengths}


def test_test_sequences_that_copy_a_training_sequence_are_counted(tmp_path: Path):
    """Exact copies after normalisation; a prefix is no copy."""
    report, _ = clean_csv(tmp_path, wide_csv([*both("a", sequence="acgta"), *both("b", sequence="GGUG")]))
    assert report.facts["test"]["copies_of_train"] == 1
    assert report.facts["test"]["future"] == 1


def test_sequence_hashes_do_not_depend_on_the_batch(tmp_path: Path):
    """Longer sequences bring new weights; those of the first positions stay."""
    import pyarrow as pa

    with ProfileStore(tmp_path, layout=find_layout(header(), where="x"), where="x") as store:
        alone = store.hash_sequences(pa.array(["ACG"]))
        together = store.hash_sequences(pa.array(["GGGGGGGGG", "ACG", "AC", "ACGA", "CAG"]))
    assert together[1] == alone[0]
    assert len(set(together.tolist())) == 5


# --- what it refuses -------------------------------------------------------------------------------------------------

GOOD = [row for key in "abc" for row in both(key)]


def with_row(**values: object) -> str:
    """A file whose fourth row (id b, DMS_MaP) differs."""
    return wide_csv([*GOOD[:3], replace(GOOD[3], **values), *GOOD[4:]])  # type: ignore[arg-type]


BAD_TRAIN = {
    "missing column": (wide_csv(GOOD, without=("signal_to_noise",)), "column 'signal_to_noise' is missing; found"),
    "no filter, no reads": (wide_csv(GOOD, without=("reads", "SN_filter")), "column 'reads' is missing"),
    "a gap": (wide_csv(GOOD, without=("reactivity_0004",)), "column 'reactivity_0004' is missing"),
    "fewer errors": (wide_csv(GOOD, without=(f"reactivity_error_{WIDTH:04d}",)), "'reactivity_error_0009' is missing"),
    "another table": ("id,x\n1,2\n", "column 'sequence_id', 'sequence', .* is missing; found id, x"),
    "column twice": (wide_csv(GOOD).replace("reads,", "sequence,", 1), "column 'sequence' is there twice"),
    "letter": (with_row(sequence="ACGUXCG"), r"row 4 \(id b\): letter 'X' at position 5"),
    "no sequence": (with_row(sequence=""), r"row 4 \(id b\): empty sequence"),
    "two sequences": (with_row(sequence="ACGUAC"), "id b has one sequence in row 3 and another in row 4"),
    "no id": (with_row(sequence_id=""), r"row 4: empty sequence_id"),
    "probe": (with_row(probe="CMCT"), r"row 4 \(id b\): experiment_type 'CMCT'; expected DMS_MaP or 2A3_MaP"),
    "infinite": (with_row(reactivity=(0.1, "inf")), r"row 4 \(id b\): column 'reactivity_0002' holds inf"),
    "infinite error": (with_row(error=("-Infinity",)), r"row 4 \(id b\): column 'reactivity_error_0001' holds -inf"),
    "too large for float32": (with_row(reactivity=("1e39",)), r"row 4 \(id b\): column 'reactivity_0001' holds inf"),
    "infinite sn": (with_row(sn="inf"), r"row 4 \(id b\): signal_to_noise inf"),
    "longer than the sequence": (
        with_row(reactivity=(0.1,) * 8),
        r"row 4 \(id b\): column 'reactivity_0008' holds 0.1.*7 letters",
    ),
    "error beyond the sequence": (
        with_row(error=(0.5,) * 9),
        r"row 4 \(id b\): column 'reactivity_error_0008' holds 0.5",
    ),
    "text": (
        with_row(reactivity=(0.1, "high")),
        r"row 4 \(sequence_id b\): column 'reactivity_0002' holds 'high'; expected a number",
    ),
    "text in reads": (with_row(reads="many"), "row 4 .*column 'reads' holds 'many'"),
    "half a read": (with_row(reads=1.5), r"row 4 \(id b\): reads 1.5; expected a whole number"),
    "filter": (with_row(passes=2), r"row 4 \(id b\): SN_filter 2.0; expected 0 or 1"),
    "no filter": (with_row(passes=None), r"row 4 \(id b\): SN_filter nan; expected 0 or 1"),
    "broken line": (
        wide_csv(GOOD).replace("b,ACGUACG,DMS_MaP,", "b,ACGUACG,", 1),
        "row 4 has 24 of 25 columns, a broken line",
    ),
    "cut in the last line": (wide_csv(GOOD)[:-30], "row 6 has 11 of 25 columns, the last one: the file was cut short"),
    "cut at the last cell": (wide_csv(GOOD)[:-1], "the last line has no end: the file was cut short"),
    "web page": ("\n<!DOCTYPE html>\n<html><body>Sign in</body></html>\n", "a web page"),
    "empty": ("", "the file is empty"),
    "blank": ("\n\n", "the file is empty"),
    "header only": (wide_csv([]), "a header and no row"),
    "one endless line": ("a" * 200_000, "column 'sequence_id', .* is missing; found a{40}"),  # was a traceback
    "bytes of zero": ("\0" * 5000, r"is missing; found '\\x00"),  # were printed as they are, all of them
}


@pytest.mark.parametrize(("train", "sentence"), BAD_TRAIN.values(), ids=BAD_TRAIN.keys())
def test_bad_training_file_is_refused_in_a_sentence_and_nothing_is_left(train: str, sentence: str, tmp_path: Path):
    refused(raw_folder(tmp_path / "raw", train), tmp_path / "out", sentence)


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        (b"sequence_id", b"\xff\xfes\x00", "train_data.csv: the first line is no UTF-8 text"),
        (b"c,ACGUACG,DMS", b"c,ACGUACG,\xff", "train_data.csv: after row 0: .*UTF8"),
    ],
)
def test_bytes_that_are_no_text_are_refused(old: bytes, new: bytes, sentence: str, tmp_path: Path):
    folder = raw_folder(tmp_path / "raw", None)
    (folder / "train_data.csv").write_bytes(wide_csv(GOOD).encode().replace(old, new, 1))
    refused(folder, tmp_path / "out", sentence)


def refused(folder: Path, out: Path, sentence: str) -> None:
    with pytest.raises(DataError, match=sentence) as caught:
        run(folder, out)
    assert "Next: " in str(caught.value)
    assert "\n" not in str(caught.value)
    assert [path for path in out.rglob("*") if path.is_file()] == []


@pytest.mark.parametrize("bad_row", [5, 150, 299])
@pytest.mark.parametrize("kind", ["text", "letter", "columns"])
def test_row_numbers_are_right_far_into_the_file(
    bad_row: int, kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(raw, "BLOCK_BYTES", 2048)
    lines = wide_csv([Row(f"id{number}") for number in range(1, 301)]).splitlines(keepends=True)
    swap = {"text": (",0.5,", ",?,"), "letter": ("ACGU", "ACGN"), "columns": (",0.5,", ",0.5,,")}[kind]
    lines[bad_row] = lines[bad_row].replace(*swap)
    refused(raw_folder(tmp_path / "raw", "".join(lines)), tmp_path / "out", rf"row {bad_row}\b")


@pytest.mark.parametrize("name", ["train_data.csv.gz", "train_data.csv.zip", "train_data.parquet"])
@pytest.mark.parametrize("share", [0.5, 0.98])
def test_cut_packed_file_is_refused(name: str, share: float, tmp_path: Path):
    folder = raw_folder(tmp_path / "raw", None)
    forms = {".gz": "gzip", "zip": "zip", "uet": "parquet"}
    write_form(folder, wide_csv(both(f"id{number}")[0] for number in range(2000)), forms[name[-3:]])
    whole = (folder / name).read_bytes()
    (folder / name).write_bytes(whole[: int(len(whole) * share)])
    refused(folder, tmp_path / "out", f"{name}: .*Next: download it again")


@pytest.mark.parametrize("flip", [(b"a,ACGUACG,DMS", b"a,ACGUACC,DMS"), (b"data.csv", b"dat\xe1.csv")])
def test_flipped_byte_in_a_packed_file_is_refused(flip: tuple[bytes, bytes], tmp_path: Path):
    """Where the archive says again what its member is called, zipfile's BadZipFile was no sentence."""
    folder = raw_folder(tmp_path / "raw", None)
    path = folder / "train_data.csv.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("train_data.csv", wide_csv(GOOD))
    path.write_bytes(path.read_bytes().replace(*flip, 1))
    refused(folder, tmp_path / "out", "train_data.csv.zip: damaged or cut short")


def test_parquet_with_text_for_numbers_is_refused(tmp_path: Path):
    folder = raw_folder(tmp_path / "raw", None)
    pl.read_csv(wide_csv(GOOD).encode(), infer_schema=False).write_parquet(folder / "train_data.parquet")
    refused(folder, tmp_path / "out", "train_data.parquet: column 'reads' has type large_string; expected double")


@pytest.mark.parametrize(
    ("old", "new", "sentence"),
    [
        ("ACGUA,0", "ACGUN,0", r"test_sequences.csv: row 1 \(id t1\): letter 'N'"),
        ("5,7,", "6,8,", r"row 2 \(id t2\): id_min 6 comes after id_max 4"),
        ("5,7,", "5,8,", r"row 2 \(id t2\): id_min 5 to id_max 8; expected 3 ids"),
        ("t2", "t1", "sequence_id 't1'; expected an id, and each once"),
        ("future", "later", "column 'future' is missing"),
        ("5,7,", ",7,", "has an empty cell"),
        ("5,7,", "five,7,", "column 'id_min' holds 'five'"),
    ],
)
def test_bad_test_file_is_refused(old: str, new: str, sentence: str, tmp_path: Path):
    refused(raw_folder(tmp_path / "raw", wide_csv(GOOD), test=TEST_CSV.replace(old, new)), tmp_path / "out", sentence)


def test_every_row_of_a_hidden_test_set_gets_a_clean_sequence(tmp_path: Path, capsys: pytest.CaptureFixture):
    """An N in one of them ended a prediction notebook without a submission: row 1 (id t1): letter 'N' …"""
    folder = raw_folder(
        tmp_path / "raw", wide_csv(GOOD), test=TEST_CSV.replace("ACGUA,0", "nCÅtA,0").replace("GGU", "ggu")
    )
    paths = Paths(comp="ribonanza", root=tmp_path / "out")
    preprocess.run(RIBONANZA, folder, paths, test_only=True)
    assert pl.read_parquet(paths.clean("test"))["sequence"].to_list() == ["ACAUA", "GGU"]
    said = "test_sequences.csv: 1 sequence with signs other than A, C, G, U, T, read as A"
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("form", ["csv", "csv.gz", "parquet", "no last line end"])
def test_sample_submission_of_these_test_sequences_is_accepted(form: str, tmp_path: Path):
    folder = raw_folder(tmp_path / "raw", wide_csv(GOOD))
    write_sample(folder, SAMPLE_CSV, form)
    report, _ = run(folder, tmp_path / "out")
    assert report.facts["test"]["sample_submission_rows"] == 8


def write_sample(folder: Path, text: str, form: str) -> None:
    if form == "parquet":
        pl.read_csv(text.encode()).write_parquet(folder / "sample_submission.parquet", row_group_size=3)
    elif form == "csv.gz":
        (folder / "sample_submission.csv.gz").write_bytes(gzip.compress(text.encode()))
    else:
        (folder / "sample_submission.csv").write_text(text.rstrip("\n") if form.startswith("no") else text)


@pytest.mark.parametrize("form", ["csv", "csv.gz", "parquet"])
@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        (
            "ID,resname,resid,x_1\nR1107_1,G,1,0.0\n",
            "columns ID, resname, resid, x_1; expected id, .* another competition",
        ),
        (
            SAMPLE_CSV.replace("DMS", "tmp").replace("2A3", "DMS").replace("tmp", "2A3"),
            "columns id, reactivity_2A3_MaP",
        ),
        (SAMPLE_CSV + "8,0.0,0.0\n", "ids 0 to 8 in 9 rows; expected 0 to 7"),
        (SAMPLE_CSV.replace("3,0.0,0.0\n", ""), "ids 0 to 7 in 7 rows; expected 0 to 7"),
        (SAMPLE_CSV.replace("\n0,", "\n1000,"), "ids 1000 to 7 in 8 rows"),
        (SAMPLE_CSV.splitlines(keepends=True)[0], "in 0 rows; expected 0 to 7"),
    ],
)
def test_sample_submission_from_elsewhere_is_refused(text: str, sentence: str, form: str, tmp_path: Path):
    folder = raw_folder(tmp_path / "raw", wide_csv(GOOD))
    write_sample(folder, text, form)
    refused(folder, tmp_path / "out", sentence)


@pytest.mark.parametrize(
    ("manifest", "sentence"),
    [
        ({"files": {"train_data.csv": {"rows": 7}}}, "train_data.csv: 6 rows; the manifest says 7"),
        ({"files": {"test_sequences.csv": {"rows": 3}}}, "test_sequences.csv: 2 rows; the manifest says 3"),
        (
            {"files": {"train_data.csv": {"rows": 6, "sha256": "0" * 64}}},
            "train_data.csv: its sha256 is not the manifest's",
        ),
        ({"rows": 6}, "manifest.json: KeyError"),
        ({"files": {"train_data.csv": 6}}, "manifest.json: TypeError"),
        ([], "manifest.json: TypeError"),
    ],
)
def test_files_that_differ_from_the_download_are_refused(manifest: object, sentence: str, tmp_path: Path):
    folder = raw_folder(tmp_path / "raw", wide_csv(GOOD))
    (folder / "manifest.json").write_text(json.dumps(manifest))
    refused(folder, tmp_path / "out", sentence)


def test_files_that_agree_with_the_download_are_accepted(tmp_path: Path):
    folder = raw_folder(tmp_path / "raw", wide_csv(GOOD))
    digest = hashlib.sha256((folder / "train_data.csv").read_bytes()).hexdigest()
    (folder / "manifest.json").write_text(json.dumps({"files": {"train_data.csv": {"rows": 6, "sha256": digest}}}))
    assert run(folder, tmp_path / "out")[0].status == "built"


def test_groups_with_an_id_twice_are_refused(tmp_path: Path):
    folder = raw_folder(tmp_path / "raw", wide_csv(GOOD))
    pl.DataFrame({"sequence_id": ["a", "a"], "group": ["x", "y"]}).write_parquet(folder / "library_groups.parquet")
    refused(folder, tmp_path / "out", "library_groups.parquet: sequence_id 'a'; expected an id, and each once")


# --- which file it takes ---------------------------------------------------------------------------------------------


def test_file_of_its_own_wins_over_a_member_of_an_archive(tmp_path: Path):
    folder = raw_folder(tmp_path / "raw", wide_csv(GOOD))
    write_form(folder, "not even a table", "competition zip")
    assert RIBONANZA.raw_files(folder)["train"].name == "train_data.csv"


def break_both(folder: Path) -> None:
    write_form(folder, wide_csv(GOOD), "gzip")


def break_zips(folder: Path) -> None:
    (folder / "train_data.csv").unlink()
    write_form(folder, wide_csv(GOOD), "zip")
    write_form(folder, wide_csv(GOOD), "competition zip")


def break_archive(folder: Path) -> None:
    (folder / "train_data.csv").rename(folder / "train_data.csv.zip")


@pytest.mark.parametrize(
    ("breaking", "sentence"),
    [
        (break_both, "train_data.csv, train_data.csv.gz all hold train_data; expected one"),
        (break_zips, "all.zip, train_data.csv.zip all hold train_data; expected one"),
        (break_archive, "train_data.csv.zip: not a zip archive, or cut short"),
        (lambda folder: (folder / "train_data.csv").unlink(), "no train_data.csv, .csv.gz or .parquet, and no zip"),
        (lambda folder: (folder / "test_sequences.csv").unlink(), "no test_sequences.csv"),
        (shutil.rmtree, "no such folder"),
    ],
)
def test_missing_and_doubtful_files_are_refused(breaking: Callable[[Path], object], sentence: str, tmp_path: Path):
    folder = raw_folder(tmp_path / "raw", wide_csv(GOOD))
    breaking(folder)
    refused(folder, tmp_path / "out", sentence)


def test_a_zip_as_kaggle_gives_it_is_read_whether_it_or_its_folder_is_named(tmp_path: Path):
    """It said "no such folder" of the zip, and "holds 2 files 'test_sequences.csv'; expected one"."""
    folder = raw_folder(tmp_path / "raw", wide_csv(GOOD))
    plain, _ = run(folder, tmp_path / "plain")
    (tmp_path / "downloads").mkdir()
    archive = tmp_path / "downloads" / "stanford-ribonanza-rna-folding.zip"
    with zipfile.ZipFile(archive, "w") as opened:
        for name in ("train_data.csv", "test_sequences.csv"):
            opened.write(folder / name, name)
            opened.writestr(f"supplementary/{name}", "another")
        opened.writestr("train_data_QUICK_START.csv", "a part of the other")
    for place in (archive, archive.parent):
        packed, _ = run(place, tmp_path / f"of {place.name}")
        for table in RIBONANZA.tables:
            assert packed.outputs[table].read_bytes() == plain.outputs[table].read_bytes()
    with zipfile.ZipFile(archive, "w") as opened:
        for part in "ab":
            opened.writestr(f"{part}/train_data.csv", "x")
    refused(archive, tmp_path / "out", "no test_sequences.csv")
    refused(folder / "train_data.csv", tmp_path / "out", "train_data.csv: a file. Next: give the folder, or the zip")


def test_an_archive_that_is_none_counts_only_where_nothing_else_holds_the_table(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
):
    """A download on its way, of anything, beside the files: "other.zip: not a zip archive", and nothing was read."""
    folder = raw_folder(tmp_path / "raw", wide_csv(GOOD))
    (folder / "other.zip").write_bytes(b"PK\x03\x04")
    run(folder, tmp_path / "first")
    assert "sample_submission: looked for and not found, but other.zip: not a zip" in capsys.readouterr().err
    (folder / "train_data.csv").unlink()
    refused(folder, tmp_path / "out", "other.zip: not a zip archive, or cut short")


def test_files_in_a_folder_below_are_pointed_at(tmp_path: Path):
    folder = raw_folder(tmp_path / "raw", wide_csv(GOOD))
    refused(folder.parent, tmp_path / "out", f"Next: RAW={folder}.")


def test_full_disk_is_noticed_before_the_work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = raw_folder(tmp_path / "raw", wide_csv(GOOD))
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: usage._replace(free=10))
    with pytest.raises(StorageError, match=r"GB are needed for train_data.csv"):
        run(folder, tmp_path / "out")


# --- the metric ------------------------------------------------------------------------------------------------------


def test_metric_agrees_with_a_loop_over_positions(rng: np.random.Generator):
    prediction, truth = rng.normal(0.5, 1, (200, 2)), rng.normal(0.5, 1, (200, 2))
    truth[rng.random((200, 2)) < 0.3] = np.nan
    sums, count = np.zeros(2), 0
    for one, (dms, a3) in zip(prediction, truth, strict=True):
        if dms == dms and a3 == a3:
            count += 1
            sums += [abs(one[0] - min(max(dms, 0), 1)), abs(one[1] - min(max(a3, 0), 1))]
    got_sums, got_counts = error_sums(prediction, truth)
    np.testing.assert_allclose(got_sums, sums, rtol=1e-12)
    assert got_counts.tolist() == [count, count]
    assert score(got_sums, got_counts) == pytest.approx((sums[0] / count + sums[1] / count) / 2, rel=1e-12)


def test_metric_of_pieces_adds_up(rng: np.random.Generator):
    prediction, truth = rng.random((60, 2), np.float32), rng.random((60, 2), np.float32)
    whole = error_sums(prediction, truth)
    pieces = [error_sums(prediction[a:b], truth[a:b]) for a, b in ((0, 7), (7, 7), (7, 60))]
    np.testing.assert_allclose(whole[0], sum(sums for sums, _ in pieces), rtol=1e-12)
    assert whole[1].tolist() == sum(counts for _, counts in pieces).tolist()


def test_metric_clips_the_truth_and_not_the_prediction():
    sums, _ = error_sums(np.array([[3.0, -2.0]]), np.array([[7.0, -7.0]]))
    assert sums.tolist() == [2.0, 2.0]


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("measured", [True, False])
def test_prediction_that_is_not_finite_is_seen(value: float, measured: bool):
    truth = np.array([[0.5, 0.5], [0.5, 0.5 if measured else np.nan]])
    with pytest.raises(DataError, match=r"reactivity_2A3_MaP is (nan|inf) at position 2"):
        error_sums(np.array([[0.5, 0.5], [0.5, value]]), truth)


def test_score_of_nothing_is_nan():
    assert np.isnan(score(*error_sums(np.zeros((3, 2)), np.full((3, 2), np.nan))))


# --- real data -------------------------------------------------------------------------------------------------------


@pytest.mark.shared
def test_real_profiles_are_kept_to_the_last_value(tmp_path: Path, shared_data: Callable[[str], Path]):
    home = shared_data("stanford-ribonanza-rna-folding")
    report, table = run(home, tmp_path / "out")
    source = pl.read_parquet(home / "train_data.parquet")
    assert report.facts["rows"] == source.height
    assert report.facts["test"]["sample_submission_rows"] == 336_815
    assert report.facts["groups"]["joined"] == table.height == source["sequence_id"].n_unique()
    width = 206
    for probe in PROBES:
        wanted = source.filter(experiment_type=probe).sort("sequence_id")
        got = table.filter(pl.col(f"reactivity_{probe}").is_not_null())
        assert got["sequence_id"].equals(wanted["sequence_id"])
        within = np.arange(width) < wanted["sequence"].str.len_bytes().to_numpy()[:, None]
        matrix = wanted.select(f"reactivity_{position:04d}" for position in range(1, width + 1)).to_numpy()
        values = got[f"reactivity_{probe}"].explode().to_numpy()
        np.testing.assert_array_equal(values, matrix[within])


@pytest.mark.shared
def test_real_csv_gives_the_rows_of_the_parquet_file(tmp_path: Path, shared_data: Callable[[str], Path]):
    home = shared_data("stanford-ribonanza-rna-folding")
    folder = raw_folder(tmp_path / "csv", (home / "train_data_first600.csv").read_text())
    _, from_csv = run(folder, tmp_path / "a")
    other = raw_folder(tmp_path / "parquet", None)
    pl.read_parquet(home / "train_data.parquet").head(600).write_parquet(other / "train_data.parquet")
    _, from_parquet = run(other, tmp_path / "b")
    assert from_csv.equals(from_parquet)
