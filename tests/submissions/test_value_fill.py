"""Where nothing is predicted a notebook's submission of values holds training's medians; its rows are the sample's."""

import json

import numpy as np
import polars as pl
import pytest

from pipeline.competitions import get_competition
from pipeline.errors import ConfigError, DataError
from pipeline.paths import Paths
from submissions import check
from submissions import write as stage
from submissions.value_fill import medians_file
from tests.chain_tables import TARGETS, make_paths, prediction_table, write, write_values_data

RIBONANZA = get_competition("ribonanza")
MEDIANS = {"A": [0.1, 0.9], "C": [0.2, 0.8], "G": [0.3, 0.7], "U": [0.4, 0.6], "any": [0.25, 0.75]}


@pytest.fixture
def paths(tmp_path, rng) -> Paths:
    """The second of three test sequences is not predicted; nor is anything before `predict` is called."""
    paths = make_paths(tmp_path)
    write_values_data(paths, rng, sequences=3, tests=3)
    medians_file(paths, "all").parent.mkdir(parents=True)
    medians_file(paths, "all").write_text(json.dumps({"targets": TARGETS, "medians": MEDIANS}))
    return paths


def predict(paths: Paths) -> pl.DataFrame:
    test = pl.read_parquet(paths.clean("test"))[[2, 0]]
    lists = {name: [np.full(len(text), 0.5) for text in test["sequence"]] for name in TARGETS}
    write(prediction_table(test["sequence_id"].to_list(), lists), paths.ensemble_dir("all") / "test.parquet")
    return test


def submitted(paths: Paths, *, fmt: str = "csv", **options) -> pl.DataFrame:
    file = stage.run(paths, competition=RIBONANZA, name="all", fmt=fmt, fill=True, **options).outputs["submission"]
    check.run(paths, competition=RIBONANZA, file=file)
    return pl.read_csv(file) if fmt == "csv" else pl.read_parquet(file)


def filled(test: pl.DataFrame) -> np.ndarray:
    return np.array([MEDIANS[letter] for letter in "".join(test["sequence"])])


@pytest.mark.parametrize("fmt", ["csv", "parquet"])
def test_a_file_of_medians_is_there_before_there_is_any_prediction(paths, fmt):
    """Values had none: what failed before the first fold was predicted left the notebook without a score."""
    table = submitted(paths, fmt=fmt)
    test = pl.read_parquet(paths.clean("test"))
    np.testing.assert_allclose(table.select(TARGETS).to_numpy(), filled(test), atol=1e-6)


def test_what_is_not_predicted_is_filled_and_what_is_stays(paths, capsys):
    predict(paths)
    test, table = pl.read_parquet(paths.clean("test")), submitted(paths)
    own = table.filter(pl.col("id").is_between(*test.select("id_min", "id_max").row(1)))
    np.testing.assert_allclose(own.select(TARGETS).to_numpy(), filled(test[[1]]), atol=1e-6)
    others = table.join(own, on="id", how="anti")
    assert (others.select(TARGETS).to_numpy() == 0.5).all()
    assert "1 of 3 sequences are not predicted: training's medians" in " ".join(capsys.readouterr().err.split())


def test_medians_of_other_targets_are_none(paths):
    medians_file(paths, "all").write_text(json.dumps({"targets": TARGETS[::-1], "medians": MEDIANS}))
    with pytest.raises(ConfigError, match="nothing to fill in here"):
        submitted(paths)


@pytest.mark.parametrize("fmt", ["csv", "parquet"])
def test_the_rows_are_those_of_a_hidden_test_sets_own_sample(paths, fmt):
    plain = submitted(paths)
    keys = [*plain["id"].to_list()[::-1], 999_999, plain["id"][0]]
    write(pl.DataFrame({"id": keys}), paths.clean("sample"))
    table = submitted(paths, fmt=fmt)
    assert table["id"].to_list() == keys
    values = dict(zip(plain["id"], plain.select(TARGETS).rows(), strict=True)) | {999_999: tuple(MEDIANS["any"])}
    np.testing.assert_allclose(table.select(TARGETS).to_numpy(), [values[key] for key in keys], atol=1e-6)


def test_a_row_of_no_test_sequence_is_refused_where_nothing_is_filled_in(paths):
    predict(paths)
    write(pl.read_parquet(paths.clean("test"))[[0, 2]], paths.clean("test"))
    write(pl.DataFrame({"id": [0, 999_999]}), paths.clean("sample"))
    with pytest.raises(DataError, match=r"id '?999999'? is of no test sequence .1 such row"):
        stage.run(paths, competition=RIBONANZA, name="all")


@pytest.mark.parametrize("fmt", ["csv", "parquet"])
def test_of_a_test_set_of_nothing_the_file_is_a_header(paths, fmt):
    write(pl.read_parquet(paths.clean("test")).clear(), paths.clean("test"))
    assert submitted(paths, fmt=fmt).shape == (0, 3)
