"""Predicted classes from ensembles to scores, submission, check and report, on small tables."""

import csv
import dataclasses
import json
import re
from functools import partial

import numpy as np
import polars as pl
import pytest
from rich.console import Console

from folds import ensemble
from pipeline import words
from pipeline.competitions import get_competition
from pipeline.errors import ConfigError, DataError
from pipeline.labels import log_losses, read_classes, write_labels
from pipeline.paths import Paths
from pipeline.stage import write_json
from pipeline.tables import read_batches
from submissions import check, class_scores, class_write, classes_report, evaluate, own_tables, page, report, write
from submissions.class_evaluation import read_predicted
from tests.chain_tables import CLASSES, FOLDS, SPLIT, edit, make_paths, write_class_data, write_class_run
from tests.submissions.test_report import read, visible

LABELLED = get_competition("labelled-toy")
RUNS = ["good.sim80_k3", "other.sim80_k3"]
KINDS = ("exclusive", "several")


def build(folder, *, kind="exclusive", **options) -> Paths:
    paths, rng = make_paths(folder, LABELLED.name), np.random.default_rng(11)
    write_class_data(paths, rng, exclusive=kind == "exclusive", **options)
    for run, noise in zip(RUNS, (1.2, 1.5), strict=True):
        write_class_run(paths, run, rng, noise=noise, exclusive=kind == "exclusive")
    ensemble.run(paths, competition=LABELLED, name="all", runs=RUNS, split=SPLIT)
    return paths


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def paths(tmp_path, kind) -> Paths:
    return build(tmp_path, kind=kind)


@pytest.fixture
def plain(tmp_path) -> Paths:
    """Exclusive classes."""
    return build(tmp_path)


def score(paths, **subject):
    return evaluate.run(paths, competition=LABELLED, split=SPLIT, **(subject or {"name": "all"}))


def submit(paths, **options):
    return write.run(paths, competition=LABELLED, name="all", **options)


def joined(paths, run) -> pl.DataFrame:
    """Scored sequences beside a run's predictions, by plain joins."""
    tables = pl.concat([pl.read_parquet(paths.oof(run, fold)) for fold in range(FOLDS)])
    return pl.read_parquet(paths.clean("train")).filter("scored").join(tables, on="sequence_id", validate="1:1")


def flags(table) -> np.ndarray:
    return np.array([[place in labels for place in range(len(CLASSES))] for labels in table["labels"].to_list()])


def printed(renderable) -> str:
    console = Console(width=220)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


# -- scores


def test_score_is_the_mean_log_loss_of_all_labelled_sequences(paths, kind):
    facts = score(paths, run=RUNS[0]).facts
    table = joined(paths, RUNS[0])
    said_NK, truth_NK = np.array(table["probabilities"].to_list()), flags(table)
    assert facts["score"] == pytest.approx(log_losses(said_NK, truth_NK, exclusive=kind == "exclusive").mean())
    for row in facts["per_fold"]:
        here = (table["fold"] == row["fold"]).to_numpy()
        losses = log_losses(said_NK[here], truth_NK[here], exclusive=kind == "exclusive")
        assert (row["score"], row["scored"]) == (pytest.approx(losses.mean()), here.sum())
    assert facts["scored"] == table.height == facts["sequences"]["scored"]
    assert facts["sequences"]["without_label"] == 6


def test_ensemble_and_each_run_have_the_scores_of_their_own_tables(paths):
    facts = score(paths).facts
    weights = json.loads((paths.ensemble_dir("all") / "weights.json").read_text())
    assert facts["score"] == pytest.approx(weights["score"], abs=1e-6)
    for run in RUNS:
        alone = score(paths, run=run).facts
        assert facts["runs"][run]["score"] == pytest.approx(alone["score"])
        assert facts["runs"][run]["per_target"] == alone["per_target"]


def test_single_scores_agree_with_each_other(plain):
    facts = score(plain, run=RUNS[0]).facts
    confusion = np.array(facts["confusion"])
    assert confusion.sum() == facts["scored"]
    assert np.trace(confusion) / confusion.sum() == pytest.approx(facts["per_target"]["accuracy"])
    for place, row in enumerate(facts["per_class"]):
        assert (row["class"], row["support"], row["decided"]) == (
            CLASSES[place], confusion[place].sum(), confusion[:, place].sum()
        )  # fmt: skip
        assert row["recall"] == pytest.approx(confusion[place, place] / row["support"])
    assert facts["averages"]["micro"]["f1"] == pytest.approx(facts["per_target"]["accuracy"])
    assert facts["averages"]["macro"]["f1"] == pytest.approx(facts["per_target"]["macro F1"])
    assert sum(row["sequences"] for row in facts["by_length"]) == facts["scored"]
    assert facts["median_auroc"] == []


def test_decisions_of_several_labels_use_thresholds_of_the_other_folds(tmp_path):
    paths = build(tmp_path, kind="several")
    facts = score(paths, run=RUNS[0]).facts
    table = joined(paths, RUNS[0]).sort("sequence_id")
    said_NK, truth_NK = np.array(table["probabilities"].to_list(), dtype=np.float32), flags(table)
    thresholds_NK = class_scores.crossed_thresholds(said_NK, truth_NK, table["fold"].to_numpy())
    counts = class_scores.count(said_NK >= thresholds_NK, truth_NK)
    assert facts["per_target"]["macro F1"] == pytest.approx(class_scores.f1(counts).mean())
    assert facts["confusion"] is None


def test_the_median_area_is_over_all_classes_and_over_each_group_without_what_has_no_value(tmp_path, monkeypatch):
    paths = build(tmp_path, kind="several")
    classes = read_classes(paths)
    grouped = dataclasses.replace(
        classes,
        names=(*classes.names, "viroid"),
        counts=(*classes.counts, 0),
        groups=("large", "small", "large", "small"),
    )
    write_labels(paths.clean("classes"), grouped)
    for fold in range(FOLDS):
        for table in (paths.oof(RUNS[0], fold), paths.test(RUNS[0], fold)):
            edit(table, pl.col("probabilities").list.concat(pl.lit([0.0], dtype=pl.List(pl.Float32))))
    facts = score(paths, run=RUNS[0]).facts
    auroc = {row["class"]: row["auroc"] for row in facts["per_class"]}
    assert auroc.pop("viroid") is None
    large, small = [auroc[classes.names[0]], auroc[classes.names[2]]], [auroc[classes.names[1]]]
    told = {row["group"]: (row["median"], row["classes"], row["left_out"]) for row in facts["median_auroc"]}
    assert told == {
        "": (pytest.approx(np.median(list(auroc.values()))), len(auroc), 1),
        "large": (pytest.approx(np.median(large)), 2, 0),
        "small": (pytest.approx(np.median(small)), 1, 1),
    }
    assert facts["per_target"]["median AUROC"] == told[""][0]
    text = printed(evaluate.describe(facts))
    assert f"median of {len(auroc)} classes (1 undefined)" in text
    assert "median of 2 classes, large" in text
    monkeypatch.setattr(classes_report, "_LISTED", 1)
    monkeypatch.setattr(classes_report, "_DRAWN", 1)
    text = visible(report.run(paths, competition=LABELLED, run=RUNS[0]).outputs["report"])
    assert f"median of 1 class, small (1 undefined) {np.median(small):.3f}" in text
    assert f"{len(auroc)} rarer classes" in text
    assert f"Drawn are the 1 most frequent of {len(auroc)}." in text


def test_floors_are_scored_on_the_same_sequences_and_the_weakest_comes_first(paths):
    facts = score(paths).facts
    headline = evaluate.headline(facts)
    assert set(headline.floors) == {"class frequencies", "naive Bayes, 6-mers", "nearest neighbour, 4-mers"}
    assert list(headline.floors.values()) == sorted(headline.floors.values(), reverse=True)
    for name, told in facts["floor_details"].items():
        assert told["scored"] == facts["scored"]
        assert told["score"] == headline.floors[name]
        assert len(told["per_fold"]) == FOLDS


def test_a_class_without_sequences_is_undefined_and_left_out_of_the_means(plain):
    classes = read_classes(plain)
    names = (*classes.names, "viroid")
    write_labels(plain.clean("classes"), type(classes)(names, (*classes.counts, 0), True, classes.alphabet))
    for run in RUNS:
        for fold in range(FOLDS):
            for table in (plain.oof(run, fold), plain.test(run, fold)):
                edit(table, pl.col("probabilities").list.concat(pl.lit([0.0], dtype=pl.List(pl.Float32))))
    ensemble.run(plain, competition=LABELLED, name="all", runs=RUNS, split=SPLIT)
    report_ = score(plain)
    facts = report_.facts
    assert facts["per_class"][3] == {
        "class": "viroid", "support": 0, "decided": 0, "threshold": 0.5, **dict.fromkeys(
            ["precision", "recall", "f1", "mcc", "auroc", "average_precision", "f1_at_threshold"])
    }  # fmt: skip
    assert facts["undefined"]["auroc"] == ["viroid"]
    defined = [row["auroc"] for row in facts["per_class"][:3]]
    assert facts["per_target"]["macro AUROC"] == facts["averages"]["macro"]["auroc"] == pytest.approx(np.mean(defined))
    assert re.search(r"viroid +0 +undefined +undefined", printed(evaluate.describe(facts)))


def test_a_test_set_of_known_classes_is_scored_and_chooses_nothing(paths, kind):
    before = score(paths).facts
    assert "test" not in before
    test = pl.read_parquet(paths.clean("test"))
    labels = [None if place == 0 else [place % len(CLASSES)] for place in range(test.height)]
    edit(paths.clean("test"), pl.Series("labels", labels, dtype=pl.List(pl.UInt16)).alias("labels"))
    made = score(paths)
    facts = made.facts
    assert {name: facts[name] for name in before} == before
    said = pl.read_parquet(paths.ensemble_dir("all") / "test.parquet").select("sequence_id", "probabilities")
    both = test.with_columns(pl.Series("labels", labels)).join(said, on="sequence_id").drop_nulls()
    probability_NK, truth_NK = np.array(both["probabilities"].to_list()), flags(both)
    losses = log_losses(probability_NK, truth_NK, exclusive=kind == "exclusive")
    assert facts["test"]["score"] == pytest.approx(losses.mean())
    limits = [row["threshold"] for row in before["per_class"]]
    decided_NK = class_scores.decide(probability_NK, exclusive=kind == "exclusive", thresholds=np.array(limits))
    assert facts["test"]["per_target"]["accuracy"] == (decided_NK == truth_NK).all(axis=1).mean()
    assert facts["test"]["scored"] == test.height - 1
    line = rf"test set, {test.height - 1:,} sequences +{losses.mean():.4f}"
    assert re.search(line, printed(evaluate.describe(facts)))
    page = visible(report.run(paths, competition=LABELLED, name="all").outputs["report"])
    assert f"{test.height - 1:,} {losses.mean():.4f} {facts['test']['per_target']['accuracy']:.4f}" in page


def test_sequences_without_a_prediction_are_listed_every_one(plain, capsys):
    lost = ["s0003", "s0030", "s0060"]
    for fold in range(FOLDS):
        table = pl.read_parquet(plain.oof(RUNS[0], fold))
        edit(plain.oof(RUNS[0], fold), table.filter(~pl.col("sequence_id").is_in(lost)))
    facts = score(plain, run=RUNS[0]).facts
    assert facts["without_prediction"] == lost
    assert facts["sequences"]["scored_without_prediction"] == 3
    assert facts["scored"] == facts["sequences"]["scored"] - 3
    assert "3 scored sequences have no prediction" in capsys.readouterr().err
    again = ensemble.run(plain, competition=LABELLED, name="all", runs=RUNS, split=SPLIT)
    assert again.facts["missing"][RUNS[0]] == {"count": 3, "first": lost}


def test_scores_are_the_same_whatever_the_size_of_the_batches(plain, monkeypatch):
    before = score(plain, run=RUNS[0]).facts
    (plain.run_dir(RUNS[0]) / "evaluate.manifest.json").unlink()
    monkeypatch.setattr("pipeline.tables.read_batches", partial(read_batches, rows=7))
    assert score(plain, run=RUNS[0]).facts == before


def test_a_line_of_the_log_tells_score_and_floors(plain):
    facts = score(plain).facts
    (line,) = [line for line in plain.log.read_text().splitlines() if "labelled-toy" in line]
    assert f"| log loss | {facts['score']:.5f} |" in line
    assert f"class frequencies {facts['floors']['class frequencies']:.4f}" in line


def test_an_engine_of_structures_is_refused(plain):
    with pytest.raises(ConfigError, match="ENGINE=usalign is for structures"):
        evaluate.run(plain, competition=LABELLED, name="all", split=SPLIT, engine="usalign")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (pl.col("probabilities").list.eval(pl.element() * 1.1), r"expected a sum of 1|expected values from 0 to 1"),
        (pl.col("probabilities").list.eval(pl.element() - 0.5), "expected values from 0 to 1"),
        (
            pl.col("probabilities").list.head(2),
            "2 values of probabilities; expected 3, one a nucleotide, a class or a number",
        ),
        (pl.col("probabilities").list.eval(pl.element() * np.nan), "expected finite numbers"),
        ((pl.col("fold") + 1).alias("fold"), "the checkpoint saw it"),
    ],
)
def test_what_are_no_probabilities_or_not_out_of_fold_is_refused(plain, change, message):
    edit(plain.oof(RUNS[0], 1), change)
    for stage in (
        lambda: score(plain, run=RUNS[0]),
        lambda: ensemble.run(plain, competition=LABELLED, name="all", runs=RUNS, split=SPLIT),
    ):
        with pytest.raises(DataError, match=message):
            stage()


def test_labels_of_other_classes_are_refused(plain):
    edit(plain.clean("train"), pl.col("labels").list.eval(pl.element() + 1))
    with pytest.raises(DataError, match="has label 3; expected 0 to 2"):
        read_predicted(
            plain, split=SPLIT, folds=range(FOLDS), tables=[plain.oof(RUNS[0], k) for k in range(FOLDS)], name="x",
            classes=read_classes(plain),
        )  # fmt: skip


# -- submissions


def test_submission_has_the_mean_probabilities_of_every_test_sequence_in_order(paths):
    made = submit(paths)
    table = pl.read_csv(made.outputs["submission"])
    expected = pl.read_parquet(paths.ensemble_dir("all") / "test.parquet")
    assert table.columns == ["id", *CLASSES]
    assert table["id"].to_list() == pl.read_parquet(paths.clean("test"))["sequence_id"].to_list()
    values = dict(zip(expected["sequence_id"], expected["probabilities"], strict=True))
    for row in table.iter_rows():
        assert list(row[1:]) == pytest.approx(list(values[row[0]]), abs=1e-6)
    assert made.facts["rows"] == 8
    assert check.run(paths, competition=LABELLED, file=made.outputs["submission"]).facts["rows"] == 8


@pytest.mark.parametrize("fmt", ["csv", "parquet"])
def test_a_submission_never_says_never(plain, fmt):
    """The true class at 1e-9 costs 16.1 in the scores here; it was written as 0.000000, which costs 34.5 at Kaggle."""
    sure = pl.lit([1.0 - 1e-9, 1e-9, 0.0], dtype=pl.List(pl.Float32)).alias("probabilities")
    edit(plain.ensemble_dir("all") / "test.parquet", sure)
    file = submit(plain, fmt=fmt).outputs["submission"]
    table = pl.read_csv(file) if fmt == "csv" else pl.read_parquet(file)
    said_NK = table.select(CLASSES).to_numpy()
    assert said_NK.tolist() == [pytest.approx([1 - 1e-7, 1e-7, 1e-7], abs=2e-8)] * 8
    assert check.run(plain, competition=LABELLED, file=file).facts["rows"] == 8


def test_predictions_of_an_earlier_test_set_are_not_submitted(plain):
    """A test sequence was changed, make data told it, and what networks had said of the earlier one was submitted."""
    run = words.run_name(SPLIT)

    def join():
        ensemble.run(plain, competition=LABELLED, name="all", runs=[run], split=SPLIT)

    words.run(plain, competition=LABELLED, split=SPLIT)
    join()
    submit(plain)
    edit(plain.clean("test"), pl.col("sequence").str.replace("^.", "N"))
    for again in (lambda: submit(plain), join):
        with pytest.raises(DataError, match=rf"{run}/fold0/test.parquet: .*test.parquet changed since; .*make words"):
            again()
    words.run(plain, competition=LABELLED, split=SPLIT)
    with pytest.raises(DataError, match=r"changed since these predictions were joined. Next: make ensemble NAME=all"):
        submit(plain)
    join()
    assert submit(plain).status == "built"


def test_probabilities_of_classes_that_are_called_otherwise_by_now_are_not_submitted(plain):
    """After a class was renamed, the columns of two changed places, and what was said of one stood under the other."""
    classes = read_classes(plain)
    config = {"classes": classes.facts()}
    for run in RUNS:
        write_json(plain.fold_dir(run, 0) / "config.json", config)
    submit(plain)
    renamed = dataclasses.replace(classes, names=("rRNA", "tRNA", "zRNA"))
    write_labels(plain.clean("classes"), renamed)
    said = "the classes are others by now"
    with pytest.raises(DataError, match=said):
        submit(plain)
    with pytest.raises(DataError, match=said):
        ensemble.run(plain, competition=LABELLED, name="all", runs=RUNS, split=SPLIT)
    for run in RUNS:
        (plain.fold_dir(run, 0) / "config.json").unlink()
    with pytest.raises(DataError, match=r"predictions of miRNA, rRNA, tRNA; the classes are rRNA, tRNA, zRNA by now"):
        submit(plain)


def test_predictions_that_were_made_anew_since_they_were_joined_are_told(plain, capsys):
    said = {"facts": {}, "inputs": {}, "outputs": {"test": "of another checkpoint"}}
    write_json(plain.fold_dir(RUNS[1], 2) / "predict-test.manifest.json", said)
    submit(plain)
    assert f"{RUNS[1]} fold2 was predicted anew since it was joined" in " ".join(capsys.readouterr().err.split())


def test_parquet_holds_the_same(paths):
    text, parquet = pl.read_csv(submit(paths).outputs["submission"]), submit(paths, fmt="parquet").outputs["submission"]
    table = pl.read_parquet(parquet)
    assert table.columns == text.columns
    assert table["tRNA"].to_list() == pytest.approx(text["tRNA"].to_list(), abs=1e-6)
    assert check.run(paths, competition=LABELLED, file=parquet).facts["format"] == "parquet"


def write_sample(paths, columns):
    ids = sorted(pl.read_parquet(paths.clean("test"))["sequence_id"].to_list())
    sample = pl.DataFrame({"name": ids} | {name: [cell] * len(ids) for name, cell in columns.items()})
    sample.write_parquet(paths.clean("sample"))
    return ids


def test_columns_and_order_are_those_of_the_sample_submission(paths):
    ids = write_sample(paths, {"tRNA": "0", "rRNA": "0", "miRNA": "1"})
    table = pl.read_csv(submit(paths).outputs["submission"])
    assert (table.columns, table["name"].to_list()) == (["name", "tRNA", "rRNA", "miRNA"], ids)
    expected = pl.read_parquet(paths.ensemble_dir("all") / "test.parquet").sort("sequence_id")["probabilities"]
    assert table["rRNA"].to_list() == pytest.approx([values[1] for values in expected], abs=1e-6)


@pytest.mark.parametrize("with_values", [False, True])
def test_labels_are_the_most_probable_class_where_the_sample_asks_for_labels(plain, with_values):
    write_sample(plain, {"label": "tRNA"} | (dict.fromkeys(CLASSES, "0") if with_values else {}))
    made = submit(plain)
    table = pl.read_csv(made.outputs["submission"])
    expected = pl.read_parquet(plain.ensemble_dir("all") / "test.parquet").sort("sequence_id")["probabilities"]
    assert table["label"].to_list() == [CLASSES[int(np.argmax(values))] for values in expected.to_list()]
    assert table.columns == ["name", "label", *(CLASSES if with_values else ())]
    assert "the most probable class" in printed(write.describe(made.facts))


def test_several_labels_are_those_above_thresholds_learned_out_of_fold(tmp_path):
    paths = build(tmp_path, kind="several")
    write_sample(paths, {"labels": "tRNA;miRNA"})
    made = submit(paths)
    table = pl.read_csv(made.outputs["submission"], infer_schema=False)
    oof = pl.read_parquet(paths.ensemble_dir("all") / "oof.parquet")
    truth = pl.read_parquet(paths.clean("train")).filter("scored").join(oof, on="sequence_id").sort("sequence_id")
    limits = class_scores.learn_thresholds(np.array(truth["probabilities"].to_list(), dtype=np.float32), flags(truth))
    expected = pl.read_parquet(paths.ensemble_dir("all") / "test.parquet").sort("sequence_id")["probabilities"]
    for cell, values in zip(table["labels"], expected.to_list(), strict=True):
        assert (cell or "") == ";".join(
            name for name, value, limit in zip(CLASSES, values, limits, strict=True) if value >= limit
        )
    assert f"tRNA {limits[2]:.3f}" in made.facts["labels"]
    assert check.run(paths, competition=LABELLED, file=made.outputs["submission"]).facts["rows"] == 8


@pytest.mark.parametrize("source", ["ensemble", "run", "elsewhere", "dealt anew"])
def test_several_labels_of_a_file_are_decided_as_those_of_a_submission(tmp_path, source):
    """Its table told the most probable class alone; or no file was predicted once the training data had changed."""
    paths, classes = build(tmp_path, kind="several"), read_classes(make_paths(tmp_path, LABELLED.name))
    joined = paths.ensemble_dir("all") / "oof.parquet"
    tables = {"ensemble": [joined], "run": [paths.oof(RUNS[0], fold) for fold in range(FOLDS)]}.get(source, [tmp_path])
    if source == "dealt anew":
        tables = [joined]
        edit(paths.fold_table(SPLIT), (pl.col("fold") + 1) % FOLDS)
    told = {"split": SPLIT, "folds": [0, 1, 2], "runs": RUNS}
    limits, words = class_write.thresholds_here(paths, classes, told=told, tables=tables)
    which = {"name": "all", "folder": tmp_path / "mine", "title": "mine", "thresholds": limits}
    table = pl.read_csv(own_tables.run(paths, competition=LABELLED, **which).outputs["table"])
    assert table.columns == ["sequence_id", *(f"p({name})" for name in CLASSES), "most_probable", "labels"]
    expected = [0.5] * len(CLASSES)
    if source in ("ensemble", "run"):
        found = pl.concat([pl.read_parquet(each) for each in tables])
        truth = pl.read_parquet(paths.clean("train")).filter("scored").join(found, on="sequence_id")
        said_NK = np.array(truth["probabilities"].to_list(), dtype=np.float32)
        expected = class_scores.learn_thresholds(said_NK, flags(truth)).tolist()
    for *values, cell in table.select(*(f"p({name})" for name in CLASSES), "labels").iter_rows():
        chosen = [name for name, value, limit in zip(CLASSES, values, expected, strict=True) if value >= limit]
        assert (cell or "") == ";".join(chosen)
    why = {
        "elsewhere": "0.5 on: there are no out-of-fold",
        "dealt anew": "0.5 on: better ones cannot be learned",
    }
    assert why.get(source, "from these thresholds on, learned on") in words


def test_one_column_of_numbers_is_the_probability_of_the_second_of_two_classes(tmp_path):
    paths, rng = make_paths(tmp_path, LABELLED.name), np.random.default_rng(0)
    write_class_data(paths, rng)
    write_class_run(paths, RUNS[0], rng, noise=1.0)
    write_labels(paths.clean("classes"), type(read_classes(paths))(("0", "1"), (1, 1), True, "ACGU"))
    halves = pl.col("probabilities").list.head(2).list.eval(pl.element() / pl.element().sum())
    for fold in range(FOLDS):
        for table in (paths.oof(RUNS[0], fold), paths.test(RUNS[0], fold)):
            edit(table, halves.cast(pl.List(pl.Float32)))
    edit(paths.clean("train"), (pl.col("labels").list.eval((pl.element() > 0).cast(pl.UInt16))))
    ensemble.run(paths, competition=LABELLED, name="all", runs=RUNS[:1], split=SPLIT)
    write_sample(paths, {"target": "0.5"})
    table = pl.read_csv(submit(paths).outputs["submission"])
    expected = pl.read_parquet(paths.ensemble_dir("all") / "test.parquet").sort("sequence_id")["probabilities"]
    assert table["target"].to_list() == pytest.approx([values[1] for values in expected], abs=1e-6)
    assert table.columns == ["name", "target"]


def test_without_a_test_set_there_is_nothing_to_submit_and_everything_else_works(tmp_path):
    paths, rng = make_paths(tmp_path, LABELLED.name), np.random.default_rng(0)
    write_class_data(paths, rng)
    for run in RUNS:
        write_class_run(paths, run, rng, noise=1.0, test=False)
    paths.clean("test").unlink()
    made = ensemble.run(paths, competition=LABELLED, name="all", runs=RUNS, split=SPLIT)
    assert set(made.outputs) == {"oof", "weights"}
    assert score(paths).facts["score"] > 0
    assert report.run(paths, competition=LABELLED, name="all").status == "built"
    with pytest.raises(DataError, match=r"there is no test set, so there is nothing to submit.*Next: put test\.csv"):
        submit(paths)


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"miRNA": "0", "rRNA": "0"}, "expected one for each class"),
        ({"miRNA": "0", "rRNA": "0", "tRNA": "0", "a": "", "b": ""}, "one label, or both"),
        ({"label": "mRNA"}, "label holds 'mRNA', which is no class"),
    ],
)
def test_a_sample_submission_of_other_classes_is_refused(plain, columns, message):
    write_sample(plain, columns)
    with pytest.raises(DataError, match=message):
        submit(plain)


def test_a_sample_submission_of_other_sequences_is_refused(plain, tmp_path):
    file = submit(plain).outputs["submission"]
    for ids, message in (
        (["t0000"] * 8, "'t0000' twice"),
        ([f"t{k:04d}" for k in range(7)], "'t0007' of the test set is not in it"),
        ([f"t{k:04d}" for k in range(9)], "'t0008' is not in the test set"),
    ):
        sample = tmp_path / "sample.csv"
        pl.DataFrame({"id": ids} | {name: ["0"] * len(ids) for name in CLASSES}).write_csv(sample)
        with pytest.raises(DataError, match=message):
            check.run(plain, competition=LABELLED, file=file, sample=sample)


def test_a_sample_that_is_given_says_what_is_expected(plain, tmp_path):
    """The clean tables know no sample submission; the file is checked against the one that is named."""
    ids = sorted(pl.read_parquet(plain.clean("test"))["sequence_id"].to_list())
    sample, mine = tmp_path / "sample.csv", tmp_path / "mine.csv"
    pl.DataFrame({"seq": ids, "family": ["tRNA"] * 8}).write_csv(sample)
    pl.DataFrame({"seq": ids, "family": ["rRNA"] * 8}).write_csv(mine)
    assert check.run(plain, competition=LABELLED, file=mine, sample=sample).facts["rows"] == 8
    sample.write_text(sample.read_text().replace(",", ";") + ";\n")
    assert check.run(plain, competition=LABELLED, file=mine, sample=sample).facts["rows"] == 8
    with pytest.raises(DataError, match="other columns: got 'seq,family'; expected 'id,miRNA,rRNA,tRNA'"):
        check.run(plain, competition=LABELLED, file=mine)
    sample.write_text("seq\n")
    with pytest.raises(DataError, match="0 rows of seq; expected ids and at least one column"):
        check.run(plain, competition=LABELLED, file=mine, sample=sample)
    with pytest.raises(DataError, match=r"none.csv: no such file\. Next: give"):
        check.run(plain, competition=LABELLED, file=mine, sample=tmp_path / "none.csv")


def corrupt(text: str, what: str) -> str:
    lines = text.splitlines()
    cells = lines[3].split(",")
    changes = {
        "sum": [*cells[:3], "0.9"],
        "range": [cells[0], "-0.5", "0.5", "1.0"],
        "empty": [*cells[:2], "", cells[3]],
        "word": [*cells[:3], "high"],
        "unknown": ["t9999", *cells[1:]],
        "cut": cells[:3],
    }
    if what in changes:
        lines[3] = ",".join(changes[what])
    if what == "header":
        lines[0] = "id,miRNA,tRNA,rRNA"
    if what == "swapped":
        lines[3], lines[4] = lines[4], lines[3]
    if what == "twice":
        lines[4] = lines[3]
    if what == "lost":
        del lines[3]
    if what == "short":
        del lines[6:]
    if what == "long":
        lines.append(lines[3])
    return "\n".join(lines) + "\n"


@pytest.mark.parametrize(
    ("what", "message"),
    [
        ("sum", r"data row 3 \(line 4\): probabilities of id 't\d+' sum to 1?[\d.]+; expected 1"),
        ("range", r"miRNA of id 't\d+' is -0.5; expected a finite number from 0 to 1"),
        ("empty", r"rRNA of id 't\d+' is empty"),
        ("word", "tRNA is 'high'; expected a number"),
        ("unknown", "id 't9999' is not in the test set"),
        ("cut", "3 cells"),
        ("header", "in another order: got 'id,miRNA,tRNA,rRNA'"),
        ("swapped", "is out of order"),
        ("twice", "is a duplicate of data row 3"),
        ("lost", "is missing"),
        ("short", "ends after data row 5; expected 8 rows"),
        ("long", "an extra row"),
    ],
)
def test_every_violation_has_its_own_sentence(plain, tmp_path, what, message):
    file = tmp_path / "mine.csv"
    file.write_text(corrupt(submit(plain).outputs["submission"].read_text(), what))
    with pytest.raises(DataError, match=message):
        check.run(plain, competition=LABELLED, file=file)


def test_a_label_that_is_no_class_is_refused(paths, kind, tmp_path):
    write_sample(paths, {"label": "tRNA"})
    text = submit(paths).outputs["submission"].read_text()
    lines = text.splitlines()
    lines[2] = lines[2].partition(",")[0] + ",tRNA;mRNA"
    (tmp_path / "mine.csv").write_text("\n".join(lines) + "\n")
    some = "one" if kind == "exclusive" else "some"
    with pytest.raises(DataError, match=f"data row 2 .*is 'tRNA;mRNA'; expected {some} of miRNA, rRNA, tRNA"):
        check.run(paths, competition=LABELLED, file=tmp_path / "mine.csv")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda table: table.head(5), "no prediction of"),
        (lambda table: pl.concat([table, table.head(1)]), "is predicted twice"),
        (lambda table: table.with_columns(sequence_id="x" + pl.col("sequence_id")), "is not among the test sequences"),
    ],
)
def test_predictions_of_other_sequences_are_not_submitted(plain, change, message):
    file = plain.ensemble_dir("all") / "test.parquet"
    edit(file, change(pl.read_parquet(file)))
    with pytest.raises(DataError, match=message):
        submit(plain)
    assert not plain.submission("all").exists()


# -- report


def test_the_page_shows_every_class_its_confusions_and_the_surest_mistakes(paths, kind):
    facts = score(paths).facts
    made = report.run(paths, competition=LABELLED, name="all")
    text = visible(made.outputs["report"])
    for row in facts["per_class"]:
        assert f"{row['class']} {row['support']} {row['decided']} {row['precision']:.3f} {row['recall']:.3f}" in text
    for told in (facts, *facts["runs"].values(), *facts["floor_details"].values(), *facts["per_fold"]):
        assert f"{told['score']:.4f}" in text
    assert f"Expected calibration error {facts['calibration']['error']:.4f}" in text
    assert "Receiver operating characteristic" in text
    assert ("the most probable class" in text) == (kind == "exclusive")
    if kind == "exclusive":
        for row, counts in zip(CLASSES, facts["confusion"], strict=True):
            assert f"{row} {' '.join(map(str, counts))}" in text
    else:
        own = read_predicted(
            paths, split=SPLIT, folds=range(FOLDS), tables=[paths.ensemble_dir("all") / "oof.parquet"], name="all",
            classes=read_classes(paths),
        )  # fmt: skip
        decided_NK, none_N = own.decided(), ~own.truth_NK.any(axis=1)
        counts = [*decided_NK[none_N].sum(axis=0), (~decided_NK[none_N].any(axis=1)).sum()]
        assert sum(counts) > 0
        assert f"(none) {' '.join(map(str, counts))}" in text
    assert "The surest mistakes" in text
    assert "all · Labelled sequences, toy" in text


def test_accuracy_is_drawn_at_the_middle_of_each_group_of_lengths(plain, monkeypatch):
    """Sequences of 100 to 149 letters were drawn at 100."""
    told, drawn = score(plain).facts, []
    groups = [told["by_length"][0] | {"label": label} for label in ("0-49", "100-149")]
    monkeypatch.setattr(report, "read_scores", lambda *_, **__: told | {"by_length": groups})
    monkeypatch.setattr(classes_report.figures, "profile", lambda x, *_, **__: drawn.append(list(x)) or page.join())
    report.run(plain, competition=LABELLED, name="all")
    assert drawn == [[25, 125]]


def test_the_page_runs_nothing_loads_nothing_and_follows_the_theme(paths):
    score(paths)
    path = report.run(paths, competition=LABELLED, name="all").outputs["report"]
    reader = read(path)
    assert not {"script", "link", "iframe", "object", "form", "img"} & set(reader.tags)
    drawings = "".join(re.findall(r"<svg.*?</svg>", path.read_text(), flags=re.DOTALL))
    assert "<text" in drawings
    assert set(re.findall(r"(?:fill|stroke): (#\w+)", drawings)) == set()
    before = path.read_bytes()
    (paths.ensemble_dir("all") / "report.manifest.json").unlink()
    assert report.run(paths, competition=LABELLED, name="all").outputs["report"].read_bytes() == before


def test_hostile_class_names_are_shown_and_do_nothing(plain):
    classes = read_classes(plain)
    hostile = ("<img src=x onerror=alert(1)>", "$x^2$", "a,b\"c'")
    write_labels(plain.clean("classes"), type(classes)(hostile, classes.counts, True, classes.alphabet))
    ensemble.run(plain, competition=LABELLED, name="all", runs=RUNS, split=SPLIT)
    score(plain)
    reader = read(report.run(plain, competition=LABELLED, name="all").outputs["report"])
    assert not {"script", "img"} & set(reader.tags)
    for name in hostile:
        assert any(name in text for text in reader.texts)
    header = submit(plain).outputs["submission"].read_text().splitlines()[0]
    assert next(csv.reader([header])) == ["id", *hostile]


def test_many_classes_are_drawn_as_a_map(rng):
    from submissions import figures

    drawing = figures.class_map(rng.random((20, 20)), [f"class {number}" for number in range(20)])
    assert drawing.count("class 19") == 2
