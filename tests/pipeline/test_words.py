"""Naive Bayes of words as a run: out of fold like a network's, the same elsewhere, and part of an ensemble."""

from pathlib import Path

import numpy as np
import polars as pl
import pytest

from folds import ensemble
from pipeline import preprocess, words
from pipeline.competitions import get_competition
from pipeline.errors import ConfigError, DataError
from pipeline.labels import log_losses, read_classes
from pipeline.paths import Paths
from submissions.class_floors import predict_floors
from tests.pipeline.labelled_sets import planted, proteins, write_folds

LABELLED = get_competition("labelled")


def make(folder: Path, table: pl.DataFrame, *, test: pl.DataFrame | None = None, folds: int = 4) -> tuple[Paths, str]:
    raw, paths = folder / "raw", Paths(comp="labelled", root=folder / "artifacts")
    raw.mkdir(exist_ok=True)
    table.write_csv(raw / "train.csv")
    if test is not None:
        test.drop("label").write_csv(raw / "test.csv")
    preprocess.run(LABELLED, raw, paths)
    return paths, write_folds(paths, folds=folds)


def probabilities(*tables: Path) -> dict[str, list[float]]:
    return dict(pl.concat([pl.read_parquet(path) for path in tables])["sequence_id", "probabilities"].iter_rows())


@pytest.mark.parametrize("kind", [planted, proteins])
def test_the_run_out_of_fold_is_the_floor(kind, tmp_path, rng):
    table = kind(rng, count=80)
    paths, split = make(tmp_path, table)
    report = words.run(paths, competition=LABELLED, split=split)
    said = probabilities(*(paths.oof(f"words.{split}", fold) for fold in range(4)))
    folds = dict(pl.read_parquet(paths.fold_table(split))["sequence_id", "fold"].iter_rows())
    truth_NK = np.array([[label == name for name in ("one", "two")] for label in table["label"]])
    fold_N = np.array([folds[name] for name in table["id"]])
    clean = table["sequence"].str.replace_all("T", "U") if kind is planted else table["sequence"]
    floors = predict_floors(clean.to_list(), truth_NK, fold_N, fold_N, read_classes(paths))
    (floor_NK,) = (values_NK for name, values_NK in floors.items() if name.startswith("naive Bayes"))
    assert np.allclose([said[name] for name in table["id"]], floor_NK, atol=1e-5)
    assert report.facts["score"] == pytest.approx(log_losses(floor_NK, truth_NK, exclusive=True).mean(), abs=1e-5)


@pytest.mark.parametrize("more", ["", ";any"])
def test_what_was_counted_predicts_elsewhere_as_here(more, tmp_path, rng):
    test = planted(rng, count=12).with_columns(id="t" + pl.col("id"))
    table = planted(rng, count=60).with_columns(pl.col("label") + more)
    paths, split = make(tmp_path, table, test=test)
    words.run(paths, competition=LABELLED, split=split)
    name = f"words.{split}"
    here = [paths.test(name, fold).read_bytes() for fold in range(4)]
    source = paths.run_dir(name).rename(tmp_path / "learned")
    report = words.apply(paths, competition=LABELLED, split=split, source=source)
    assert report.facts == {"test": 12}
    assert [paths.test(name, fold).read_bytes() for fold in range(4)] == here
    assert list(probabilities(paths.test(name, 0))) == sorted(test["id"])


def test_a_row_without_a_label_is_predicted_and_teaches_nothing(tmp_path, rng):
    table = planted(rng, count=60)
    paths, split = make(tmp_path, table)
    words.run(paths, competition=LABELLED, split=split)
    before = probabilities(*(paths.oof(f"words.{split}", fold) for fold in range(4)))
    more = pl.DataFrame({"id": ["s999"], "sequence": ["ACGU" * 9], "label": [""]})
    paths, split = make(tmp_path, pl.concat([table, more]))
    words.run(paths, competition=LABELLED, split=split)
    after = probabilities(*(paths.oof(f"words.{split}", fold) for fold in range(4)))
    assert set(after) - set(before) == {"s999"}
    assert all(np.allclose(after[name], values, atol=1e-6) for name, values in before.items())


def test_where_one_fold_has_all_labels_there_is_nothing_to_learn_the_belief_from(tmp_path, rng):
    """Two labelled sequences among many, both of fold 0, ended with a traceback."""
    first = pl.col("id").is_in(["s000", "s001"])
    table = planted(rng, count=20).with_columns(pl.when(first).then("label").otherwise(pl.lit("")).alias("label"))
    paths, split = make(tmp_path, table, folds=2)
    report = words.run(paths, competition=LABELLED, split=split)
    assert report.facts["factors"][0] == 0
    said = probabilities(paths.oof(f"words.{split}", 0))
    assert set(map(tuple, said.values())) == {(0.5, 0.5)}


@pytest.mark.parametrize("folds", [2, 3, 4])
def test_predictions_of_a_fold_know_nothing_of_its_labels(tmp_path, rng, folds):
    table = planted(rng, count=80)
    paths, split = make(tmp_path, table, folds=folds)
    words.run(paths, competition=LABELLED, split=split)
    before = pl.read_parquet(paths.oof(f"words.{split}", 0))
    mine = pl.col("id").is_in(before["sequence_id"].to_list())
    swapped = pl.when(pl.col("label") == "one").then(pl.lit("two")).otherwise(pl.lit("one"))
    changed = table.with_columns(pl.when(mine).then(swapped).otherwise("label").alias("label"))
    paths, split = make(tmp_path, changed, folds=folds)
    words.run(paths, competition=LABELLED, split=split)
    assert pl.read_parquet(paths.oof(f"words.{split}", 0)).equals(before)


def test_an_ensemble_with_it_is_out_of_fold_no_worse_than_it(tmp_path, rng):
    """The default network ended above the floor on small sets, and nothing put the floor's knowledge to use."""
    paths, split = make(tmp_path, planted(rng, count=80))
    report = words.run(paths, competition=LABELLED, split=split)
    for fold in range(4):  # a network that has learned nothing, and is sure of it
        told = pl.read_parquet(paths.oof(f"words.{split}", fold))
        wrong = pl.Series("probabilities", [[0.9, 0.1]] * told.height, dtype=pl.List(pl.Float32))
        paths.fold_dir(f"net.{split}", fold).mkdir(parents=True)
        told.with_columns(wrong).write_parquet(paths.oof(f"net.{split}", fold))
    runs = [f"net.{split}", f"words.{split}"]
    joined = ensemble.run(paths, competition=LABELLED, name="all", runs=runs, split=split)
    assert joined.facts["score"] <= report.facts["score"] + 1e-6


def test_it_is_for_labelled_sets_with_folds_of_theirs(tmp_path, rng):
    paths, split = make(tmp_path, planted(rng, count=40))
    with pytest.raises(ConfigError, match=r"words: ribonanza is not a labelled set. Next: "):
        words.run(paths, competition=get_competition("ribonanza"), split=split)
    with pytest.raises(DataError, match=r"sim80_k7.*Next: "):
        words.run(paths, competition=LABELLED, split="sim80_k7")
    table = pl.read_parquet(paths.fold_table(split))
    table.head(30).write_parquet(paths.fold_table(split))
    with pytest.raises(DataError, match=r"not the folds of .*Next: make folds COMP=labelled SPLIT=sim80_k4"):
        words.run(paths, competition=LABELLED, split=split)
    with pytest.raises(DataError, match=r"words.parquet.*Next: "):
        words.apply(paths, competition=LABELLED, split=split, source=tmp_path / "nowhere")
