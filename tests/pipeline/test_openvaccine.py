"""OpenVaccine: JSON lines in, five columns of which three count out, keys of sequence and position."""

import gzip
import json
import math
import zipfile
from pathlib import Path

import numpy as np
import polars as pl
import pytest

from folds.weights import learn_weights
from pipeline import preprocess, synthetic
from pipeline.competitions import raw as raw_tables
from pipeline.competitions.openvaccine import COUNTED, OPENVACCINE, TARGETS, check_sample, error_sums, score
from pipeline.errors import DataError
from pipeline.paths import Paths
from submissions import check, file_blocks, write
from submissions.layout import PositionKeys, read_layout

SEQUENCE = "GGAAACGUAC"


def train_row(**changes) -> dict:
    errors = ("reactivity_error", "deg_error_Mg_pH10", "deg_error_pH10", "deg_error_Mg_50C", "deg_error_50C")
    lists = {name: [0.5, None, -0.25, 1.5] for name in TARGETS} | {name: [0.1] * 4 for name in errors}
    row = {"index": 0, "id": "id_b", "sequence": SEQUENCE, "signal_to_noise": 4.5, "SN_filter": 1}
    return row | {"seq_length": 10, "seq_scored": 4} | lists | changes


def test_row(**changes) -> dict:
    return {"index": 0, "id": "id_z", "sequence": SEQUENCE, "seq_length": 10, "seq_scored": 4} | changes


test_row.__test__ = False  # a row of the test file


def write_raw(folder: Path, *, train: list | None = None, test: list | None = None) -> Path:
    folder.mkdir(exist_ok=True)
    whole = {"train": [train_row()] if train is None else train, "test": [test_row()] if test is None else test}
    for name, rows in whole.items():
        text = "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows)
        (folder / f"{name}.json").write_text(text)
    return folder


def clean(raw: Path, tmp_path: Path) -> Paths:
    paths = Paths(comp="openvaccine", root=tmp_path / "artifacts", submissions=tmp_path / "csv")
    preprocess.run(OPENVACCINE, raw, paths)
    return paths


@pytest.fixture(scope="module")
def synthetic_raw(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("raw")
    synthetic.write_openvaccine(folder, sequences=20, test=7)
    return folder


# --- clean tables ---


def test_lists_are_as_long_as_the_sequence_and_null_where_nothing_was_measured(tmp_path):
    raw = write_raw(tmp_path / "raw", train=[train_row(), train_row(id="id_a", sequence="ggaaacgtac", SN_filter=0)])
    train = pl.read_parquet(clean(raw, tmp_path).clean("train"))
    assert train["sequence_id"].to_list() == ["id_a", "id_b"]
    assert train["sequence"].to_list() == [SEQUENCE] * 2
    assert train["scored"].to_list() == [False, True]
    for target in TARGETS:
        assert train[target].to_list() == [[0.5, None, -0.25, 1.5] + [None] * 6] * 2
        assert train[f"signal_to_noise_{target}"].to_list() == [4.5, 4.5]
        assert train[f"SN_filter_{target}"].to_list() == [False, True]
    assert len(train["deg_error_pH10"][0]) == 10


def test_nan_is_not_measured(tmp_path):
    raw = write_raw(tmp_path / "raw", train=[train_row(deg_pH10=[math.nan, 1.0, 1.0, 1.0])])
    assert pl.read_parquet(clean(raw, tmp_path).clean("train"))["deg_pH10"][0].to_list()[:2] == [None, 1.0]


def test_the_test_table_keeps_the_files_order_and_counts_its_rows(tmp_path):
    rows = [test_row(), test_row(id="id_c", sequence=SEQUENCE + "AC", seq_length=12)]
    test = pl.read_parquet(clean(write_raw(tmp_path / "raw", test=rows), tmp_path).clean("test"))
    assert test["sequence_id"].to_list() == ["id_z", "id_c"]
    assert test.select("id_min", "id_max").rows() == [(0, 9), (10, 21)]


def test_every_row_of_a_hidden_test_set_gets_a_clean_sequence(tmp_path, capsys):
    """An N in one of them ended a prediction notebook without a submission; in files of one's own it is refused."""
    raw = write_raw(tmp_path / "raw", test=[test_row(sequence="GGNAACG*yt"), test_row(id="id_c")])
    with pytest.raises(DataError, match=r"test.json: row 1 \(id id_z\): letter 'N' at position 3"):
        clean(raw, tmp_path / "own")
    paths = Paths(comp="openvaccine", root=tmp_path / "artifacts")
    preprocess.run(OPENVACCINE, raw, paths, test_only=True)
    assert pl.read_parquet(paths.clean("test"))["sequence"].to_list() == ["GGAAACGAAU", SEQUENCE]
    assert "test.json: 1 sequence with signs other than A, C, G, U, T, read as A" in capsys.readouterr().err


def test_gzip_and_archive_give_the_same_tables(synthetic_raw, tmp_path):
    plain = clean(synthetic_raw, tmp_path / "plain")
    packed = tmp_path / "packed"
    packed.mkdir()
    with gzip.open(packed / "train.json.gz", "wb") as handle:
        handle.write((synthetic_raw / "train.json").read_bytes())
    with zipfile.ZipFile(packed / "stanford-covid-vaccine.zip", "w") as archive:
        archive.write(synthetic_raw / "test.json", "test.json")
    other = clean(packed, tmp_path / "other")
    for table in OPENVACCINE.tables:
        assert pl.read_parquet(plain.clean(table)).equals(pl.read_parquet(other.clean(table)))


@pytest.mark.parametrize(
    ("train", "said"),
    [
        ([train_row(), train_row()], r"train.json: row 2 \(id id_b\): the id of row 1 again"),
        ([train_row(id="")], "train.json: row 1 has no id"),
        ([train_row(sequence="GGAAACGUAN")], r"row 1 \(id id_b\): letter 'N' at position 10"),
        ([train_row(seq_length=9)], "seq_length 9 for a sequence of 10 letters"),
        ([train_row(seq_scored=11)], "seq_scored 11; expected 1 to 10"),
        ([train_row(seq_scored=None)], "seq_scored None; expected 1 to 10"),
        ([train_row(signal_to_noise="high")], "signal_to_noise 'high'; expected a finite number"),
        ([train_row(SN_filter=2)], "SN_filter 2; expected 0 or 1"),
        ([train_row(deg_50C=[1.0])], "deg_50C is 1 values; expected a list of seq_scored = 4 numbers"),
        ([{k: v for k, v in train_row().items() if k != "deg_50C"}], "deg_50C is NoneType; expected a list"),
        ([train_row(reactivity=[1.0, "x", 1.0, 1.0])], "reactivity holds 'x' at position 2; expected a number"),
        ([train_row(reactivity=[math.inf, 1.0, 1.0, 1.0])], "reactivity holds inf at position 1"),
        ([train_row(), '{"id": "id_c", "sequ'], "row 2 is no JSON .* the last one: the file was cut short"),
        (["<!doctype html><html>\n"], "a web page"),
        ([json.dumps([train_row()]) + "\n"], "row 1 is a list; expected one JSON object a line"),
        ([], "train.json: the file is empty"),
    ],
)
def test_bad_rows_are_refused_in_one_sentence(tmp_path, train, said):
    with pytest.raises(DataError, match=said) as refused:
        clean(write_raw(tmp_path / "raw", train=train), tmp_path)
    assert "Next: " in str(refused.value)


def test_a_missing_file_is_named(tmp_path):
    (write_raw(tmp_path / "raw") / "test.json").unlink()
    with pytest.raises(DataError, match=r"no test.json or .json.gz, and no zip that holds test.json"):
        clean(tmp_path / "raw", tmp_path)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda rows: rows[:-1], "ends after row 9; expected 'id_z_9' next"),
        (lambda rows: [*rows, "id_z_10,0,0,0,0,0"], "row 11: id_seqpos 'id_z_10'; expected 'the end'"),
        (lambda rows: [*rows[:2], rows[3], rows[2], *rows[4:]], "row 2: id_seqpos 'id_z_2'; expected 'id_z_1'"),
        (lambda rows: ["id,reactivity", *("1,0" for _ in rows[1:])], "it is from another competition"),
    ],
)
def test_a_sample_submission_of_other_data_is_refused(tmp_path, change, said):
    rows = ["id_seqpos," + ",".join(TARGETS), *(f"id_z_{position},0,0,0,0,0" for position in range(10))]
    raw = write_raw(tmp_path / "raw")
    (raw / "sample_submission.csv").write_text("\n".join(change(rows)) + "\n")
    with pytest.raises(DataError, match=said):
        clean(raw, tmp_path)


def test_keys_of_a_sample_submission_are_compared_block_by_block(tmp_path, monkeypatch):
    monkeypatch.setattr(raw_tables, "BLOCK_BYTES", 64)
    ids, lengths_K = [f"id_{place}" for place in range(40)], np.arange(1, 41)
    names = [f"{name}_{k}" for name, length in zip(ids, lengths_K, strict=True) for k in range(length)]

    def rows(names):
        table = pl.DataFrame({"id_seqpos": names} | dict.fromkeys(TARGETS, 0.0))
        table.write_csv(tmp_path / "sample.csv")
        return check_sample(tmp_path / "sample.csv", ids, lengths_K)

    assert rows(names) == 820
    for row, wrong in ((1, "id_0_1"), (500, "id_x_0"), (820, "id_39_04")):
        said = f"row {row}: id_seqpos '{wrong}'; expected '{names[row - 1]}'"
        with pytest.raises(DataError, match=said):
            rows([*names[: row - 1], wrong, *names[row:]])
    with pytest.raises(DataError, match="row 821: id_seqpos 'id_40_0'; expected 'the end'"):
        rows([*names, "id_40_0"])
    with pytest.raises(DataError, match="ends after row 780; expected 'id_39_0' next"):
        rows(names[:780])


# --- metric ---


def test_the_score_is_the_mean_of_three_root_mean_square_errors(rng):
    truth_LC, predicted_LC = rng.normal(size=(2, 40, 5))
    truth_LC[7, 3] = np.nan
    sums_C, counts_C = (
        sum(parts)
        for parts in zip(
            *(error_sums(predicted_LC[here], truth_LC[here]) for here in (slice(0, 15), slice(15, 40))), strict=True
        )
    )
    there_L = np.arange(40) != 7
    rmse_C = np.sqrt(((predicted_LC - truth_LC)[there_L] ** 2).mean(axis=0))
    wanted = np.mean([rmse_C[TARGETS.index(name)] for name in COUNTED])
    assert score(sums_C, counts_C) == pytest.approx(wanted, rel=1e-12)
    assert OPENVACCINE.target_errors(sums_C, counts_C) == pytest.approx(rmse_C, rel=1e-12)
    assert counts_C.tolist() == [39] * 5
    assert math.isnan(score(sums_C, np.zeros(5)))


def test_a_prediction_that_is_not_finite_is_refused_even_where_nothing_was_measured():
    truth_LC, predicted_LC = np.full((3, 5), np.nan), np.zeros((3, 5))
    predicted_LC[1, 2] = np.inf
    with pytest.raises(DataError, match="prediction of deg_pH10 is inf at position 2"):
        error_sums(predicted_LC, truth_LC)


def test_weights_of_a_square_error_are_those_of_least_squares(rng):
    truth_T = rng.normal(size=4000)
    predictions_TM = truth_T[:, None] + rng.normal(size=(4000, 3)) * (0.5, 1.0, 2.0)
    learned = learn_weights(predictions_TM, truth_T, power=2)
    residuals_TM = predictions_TM - truth_T[:, None]
    inverse = np.linalg.solve(residuals_TM.T @ residuals_TM, np.ones(3))  # all weights are positive here
    assert learned.values_M == pytest.approx(inverse / inverse.sum(), abs=2e-6)
    assert learned.gap < 1e-4
    assert learned.loss == pytest.approx(((residuals_TM @ learned.values_M) ** 2).mean(), rel=1e-9)


# --- submission ---


@pytest.fixture
def submitted(synthetic_raw, tmp_path, rng) -> tuple[Paths, pl.DataFrame]:
    """Predictions, in another order than the test file."""
    paths = clean(synthetic_raw, tmp_path)
    test = pl.read_parquet(paths.clean("test"))
    lists = {name: [rng.normal(size=len(letters)).tolist() for letters in test["sequence"]] for name in TARGETS}
    predicted = test.select("sequence_id").with_columns(
        pl.Series(name, values, dtype=pl.List(pl.Float32)) for name, values in lists.items()
    )
    table = paths.ensemble_dir("all") / "test.parquet"
    table.parent.mkdir(parents=True)
    predicted.sort("sequence_id").write_parquet(table)
    return paths, predicted


@pytest.mark.parametrize("fmt", ["csv", "parquet"])
def test_a_submission_has_the_samples_keys_and_negative_values_stay(submitted, synthetic_raw, fmt):
    paths, predicted = submitted
    file = write.run(paths, competition=OPENVACCINE, name="all", fmt=fmt).outputs["submission"]
    got = pl.read_csv(file) if fmt == "csv" else pl.read_parquet(file)
    sample = pl.read_csv(synthetic_raw / "sample_submission.csv")
    assert got.columns == sample.columns
    assert got["id_seqpos"].to_list() == sample["id_seqpos"].to_list()
    for target in TARGETS:
        np.testing.assert_allclose(got[target], predicted[target].explode(), atol=0.50001e-4)
    check.run(paths, competition=OPENVACCINE, file=file, sample=synthetic_raw / "sample_submission.csv")


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda table: table.reverse(), "is out of order|is not in the test set"),
        (lambda table: table.vstack(table[:1]), "an extra row"),
        (lambda table: table[:-1], "are missing"),
        (lambda table: table.vstack(table[3:4])[[0, 1, 2, 3, len(table), *range(5, len(table))]], "is a duplicate"),
        (lambda table: table.with_columns(deg_50C=pl.lit(None, pl.Float64)), "deg_50C of id_seqpos .* is empty"),
        (lambda table: table.rename({"deg_50C": "deg_60C"}), "other columns"),
    ],
)
def test_a_wrong_submission_is_refused(submitted, synthetic_raw, tmp_path, change, said):
    paths, _ = submitted
    file = write.run(paths, competition=OPENVACCINE, name="all").outputs["submission"]
    change(pl.read_csv(file)).write_csv(tmp_path / "my.csv")
    sample = synthetic_raw / "sample_submission.csv"
    empty = Paths(comp="openvaccine", root=tmp_path / "none")
    for where in (paths, empty):  # with clean tables, and with the sample alone
        with pytest.raises(DataError, match=said):
            check.run(where, competition=OPENVACCINE, file=tmp_path / "my.csv", sample=sample)


def test_a_sample_submission_alone_gives_the_keys(tmp_path, monkeypatch):
    monkeypatch.setattr(file_blocks, "_BLOCK_BYTES", 100)
    names = [f"id_{name}_{k}" for name, length in (("b", 30), ("a_1", 4), ("c", 50)) for k in range(length)]

    def checked(names, sample):
        for file, keys in (("s.csv", sample), ("f.csv", names)):
            pl.DataFrame({"id_seqpos": keys} | dict.fromkeys(TARGETS, 0.5)).write_csv(tmp_path / file)
        paths = Paths(comp="openvaccine", root=tmp_path / "none")
        return check.run(paths, competition=OPENVACCINE, file=tmp_path / "f.csv", sample=tmp_path / "s.csv").facts

    assert checked(names, names)["rows"] == 84
    with pytest.raises(DataError, match=r"f.csv: data row 33 .*'id_a_1_3' is out of order; expected 'id_a_1_2'"):
        checked([*names[:32], names[33], names[32], *names[34:]], names)
    with pytest.raises(DataError, match=r"s.csv: data row 41 .*: id_seqpos 'id_c_7'; expected 'id_c_6'"):
        checked(names, [*names[:40], *names[41:]])


def test_keys_number_positions_within_sequences_and_find_their_rows():
    keys = PositionKeys(pl.Series(["id_a", "b"]), np.array([3, 2]))
    names = ["id_a_0", "id_a_1", "id_a_2", "b_0", "b_1"]
    assert keys.rows == 5
    for start in range(5):
        assert keys.block(start, 5)["id_seqpos"].tolist() == names[start:]
    assert [keys.row_of(name) for name in names] == list(range(5))
    for other in ("id_a_3", "b_2", "c_0", "b_", "b", "b_01", "b_-1", ""):
        assert keys.row_of(other) is None


@pytest.mark.shared
def test_the_real_files_give_clean_tables_and_a_layout_that_is_the_samples(shared_data, tmp_path):
    raw = shared_data("stanford-covid-vaccine")
    paths = clean(raw, tmp_path)
    train, test = (pl.read_parquet(paths.clean(table)) for table in ("train", "test"))
    assert (train.height, test.height) == (1589, 3634)
    assert train["reactivity"].list.drop_nulls().list.len().unique().to_list() == [68]
    layout = read_layout(paths, OPENVACCINE)
    assert layout.keys.rows == 457_953
    assert check.check_file(raw / "sample_submission.csv.gz", layout)["rows"] == 457_953
