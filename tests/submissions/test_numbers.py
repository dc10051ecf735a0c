"""Predicted numbers from ensembles to scores, submission, check and report, on small tables."""

import json
import re
from functools import partial

import numpy as np
import polars as pl
import pytest
from rich.console import Console

from folds import assign, audit, ensemble
from pipeline import preprocess, words
from pipeline.competitions import competition_of, get_competition
from pipeline.errors import DataError
from pipeline.paths import Paths
from pipeline.tables import read_batches
from submissions import check, evaluate, report, write
from submissions.number_scores import r_squared, root_mean_square_error, spearman
from tests.chain_tables import FOLDS, SPLIT, edit, make_paths, random_sequence
from tests.number_tables import NAMES, lists, truth, write_number_data, write_number_run
from tests.submissions.test_report import visible

RUNS = ["good.sim80_k3", "other.sim80_k3"]


class Chain:
    """Paths and the competition that their tables make."""

    def __init__(self, folder, **options):
        self.paths, rng = make_paths(folder, "labelled-toy"), np.random.default_rng(11)
        self.competition = write_number_data(self.paths, rng, **options)
        for run, noise in zip(RUNS, (0.4, 0.5), strict=True):
            write_number_run(self.paths, run, rng, noise=noise)
        self.join()

    def join(self, runs=RUNS, **options):
        return ensemble.run(
            self.paths, competition=self.competition, name="all", runs=runs, split=SPLIT, **options
        ).facts

    def score(self, **subject):
        return evaluate.run(self.paths, competition=self.competition, split=SPLIT, **(subject or {"name": "all"}))

    def submit(self, **options):
        return write.run(self.paths, competition=self.competition, name="all", **options)

    def check(self, file, **options):
        return check.run(self.paths, competition=self.competition, file=file, **options)

    def report(self, **subject):
        return report.run(self.paths, competition=self.competition, **(subject or {"name": "all"}))


@pytest.fixture(autouse=True)
def short_words(monkeypatch) -> None:
    """Words of up to three letters: ridge regression on 85 features in place of 341, for a floor of every score."""
    monkeypatch.setattr("pipeline.ridge.MOST_FEATURES", 84)


@pytest.fixture(params=[1, 2], ids=["one", "two"])
def chain(request, tmp_path) -> Chain:
    return Chain(tmp_path, names=NAMES[: request.param])


@pytest.fixture
def two(tmp_path) -> Chain:
    return Chain(tmp_path)


def oof(paths: Paths, run: str) -> pl.DataFrame:
    return pl.concat([pl.read_parquet(paths.oof(run, fold)) for fold in range(FOLDS)]).sort("sequence_id")


def pairs(paths: Paths, run: str) -> tuple[np.ndarray, np.ndarray]:
    """[N, C] predicted and [N, C] measured, by plain joins."""
    return np.array(oof(paths, run)["numbers"].to_list()), truth(paths)


def column_errors(said_NC, truth_NC) -> list[float]:
    here_NC = np.isfinite(truth_NC)
    return [
        root_mean_square_error(said_NC[here_NC[:, at], at], truth_NC[here_NC[:, at], at])
        for at in range(len(said_NC.T))
    ]


def printed(renderable) -> str:
    console = Console(width=240)
    with console.capture() as capture:
        console.print(renderable)
    return capture.get()


# -- scores


def test_score_is_the_mean_over_the_columns_of_the_error_of_what_was_measured(chain):
    facts = chain.score(run=RUNS[0]).facts
    said_NC, truth_NC = pairs(chain.paths, RUNS[0])
    assert facts["metric"] == ("RMSE" if len(said_NC.T) == 1 else "MCRMSE")
    assert facts["score"] == pytest.approx(np.mean(column_errors(said_NC, truth_NC)))
    assert facts["scored"] == np.isfinite(truth_NC).any(axis=1).sum() == facts["sequences"]["scored"]
    assert facts["sequences"]["without_label"] == 6
    fold_N = oof(chain.paths, RUNS[0])["fold"].to_numpy()
    for row in facts["per_fold"]:
        here = fold_N == row["fold"]
        assert row["score"] == pytest.approx(np.mean(column_errors(said_NC[here], truth_NC[here])))


def test_each_number_has_its_own_scores(two):
    facts = two.score(run=RUNS[0]).facts
    said_NC, truth_NC = pairs(two.paths, RUNS[0])
    for at, row in enumerate(facts["per_column"]):
        here = np.isfinite(truth_NC[:, at])
        assert (row["column"], row["measured"]) == (NAMES[at], here.sum())
        assert row["R²"] == pytest.approx(r_squared(said_NC[here, at], truth_NC[here, at]))
        assert row["Spearman"] == pytest.approx(spearman(said_NC[here, at], truth_NC[here, at]))
    assert facts["per_target"]["mean R²"] == pytest.approx(np.mean([row["R²"] for row in facts["per_column"]]))
    shown = printed(evaluate.describe(facts))
    assert re.search(rf"Tm +{facts['per_column'][1]['measured']} +{facts['per_column'][1]['RMSE']:.4f}", shown)


def test_ensemble_and_each_run_have_the_scores_of_their_own_tables(chain):
    facts = chain.score().facts
    weights = json.loads((chain.paths.ensemble_dir("all") / "weights.json").read_text())
    assert weights["targets"] == list(chain.competition.targets)
    assert facts["score"] == pytest.approx(weights["score"], rel=1e-6)
    for run in RUNS:
        alone = chain.score(run=run).facts
        assert facts["runs"][run]["score"] == pytest.approx(alone["score"])
        assert facts["runs"][run]["per_target"] == alone["per_target"]


def test_differences_from_the_best_run_are_told_of_the_floors_too(two):
    facts = two.score().facts
    best = min(RUNS, key=lambda run: facts["runs"][run]["score"])
    (other,) = (run for run in RUNS if run != best)
    assert facts["best_run"] == best
    for told in (facts, facts["runs"][other], *facts["floor_details"].values()):
        difference = told["difference"]
        assert difference["value"] == pytest.approx(told["score"] - facts["runs"][best]["score"])
        assert difference["low"] < difference["value"] < difference["high"]
    assert "difference" not in facts["runs"][best]
    assert re.search(rf"{re.escape(best)} .*best run", printed(evaluate.describe(facts)))


def test_floors_are_differences_from_a_run_that_is_scored_alone(two):
    facts = two.score(run=RUNS[0]).facts
    assert facts["best_run"] == RUNS[0]
    for told in facts["floor_details"].values():
        assert told["difference"]["value"] == pytest.approx(told["score"] - facts["score"])


def test_floors_are_scored_on_the_same_sequences_and_the_mean_explains_nothing(chain):
    facts = chain.score().facts
    assert list(evaluate.headline(facts).floors)[-1] == "ridge, 3-mers"  # the numbers are counts of letters
    for told in facts["floor_details"].values():
        assert told["scored"] == facts["scored"]
        assert len(told["per_fold"]) == FOLDS
    mean = facts["floor_details"]["mean"]
    assert all(-0.2 < row["R²"] <= 0.0 for row in mean["per_column"])


def test_sequences_without_a_prediction_are_listed_every_one(two, capsys):
    lost = ["s0003", "s0030", "s0060"]
    for fold in range(FOLDS):
        table = pl.read_parquet(two.paths.oof(RUNS[0], fold))
        edit(two.paths.oof(RUNS[0], fold), table.filter(~pl.col("sequence_id").is_in(lost)))
    facts = two.score(run=RUNS[0]).facts
    assert facts["without_prediction"] == lost
    assert facts["scored"] == facts["sequences"]["scored"] - 3
    assert "3 scored sequences have no prediction" in capsys.readouterr().err
    assert two.join()["missing"][RUNS[0]] == {"count": 3, "first": lost}
    assert two.score().facts["scored"] == facts["scored"]


def test_scores_are_the_same_whatever_the_size_of_the_batches(two, monkeypatch):
    before = two.score(run=RUNS[0]).facts
    (two.paths.run_dir(RUNS[0]) / "evaluate.manifest.json").unlink()
    monkeypatch.setattr("pipeline.tables.read_batches", partial(read_batches, rows=7))
    assert two.score(run=RUNS[0]).facts == before


def test_a_test_set_of_known_numbers_is_scored_and_chooses_nothing(two):
    before = two.score().facts
    assert "test" not in before
    paths, width = two.paths, len(two.competition.targets)
    test = pl.read_parquet(paths.clean("test"))
    known_NC = np.random.default_rng(0).normal(30, 5, size=(test.height, width))
    known_NC[0], known_NC[1, -1] = np.nan, np.nan
    edit(paths.clean("test"), lists(known_NC).alias("numbers"))
    facts = two.score().facts
    assert {name: facts[name] for name in before} == before
    said = dict(pl.read_parquet(paths.ensemble_dir("all") / "test.parquet").iter_rows())
    said_NC = np.array([said[name] for name in test["sequence_id"]])
    assert facts["test"]["score"] == pytest.approx(np.mean(column_errors(said_NC, known_NC)), rel=1e-6)
    assert facts["test"]["scored"] == np.isfinite(known_NC).any(axis=1).sum()
    shown = f"{facts['test']['scored']} sequences +{facts['test']['score']:.4f}"
    assert re.search(f"test set, {shown}", printed(evaluate.describe(facts)))
    assert f"{facts['test']['scored']} {facts['test']['score']:.4f}" in visible(two.report().outputs["report"])


def test_test_numbers_that_are_all_empty_are_none(two):
    test = pl.read_parquet(two.paths.clean("test"))
    edit(two.paths.clean("test"), pl.lit(None, dtype=pl.List(pl.Float64)).alias("numbers"))
    assert pl.read_parquet(two.paths.clean("test"))["numbers"].null_count() == test.height
    assert "test" not in two.score().facts


@pytest.mark.parametrize("unit", [1e-9, 1e7])
def test_any_unit_gives_the_same_but_for_the_unit(unit, tmp_path):
    """Weights of numbers around 1e-9 were the mean's: the optimum was believed to be reached."""
    plain, scaled = Chain(tmp_path / "plain"), Chain(tmp_path / "scaled", unit=unit)
    one, two = (json.loads((each.paths.ensemble_dir("all") / "weights.json").read_text()) for each in (plain, scaled))
    assert two["chosen"] == one["chosen"]
    for target, weights in one["learned"]["weights"].items():
        assert two["learned"]["weights"][target] == pytest.approx(weights, abs=1e-3)
        assert abs(weights[RUNS[0]] - 0.5) > 0.01
    before, after = plain.score().facts, scaled.score().facts
    assert after["score"] == pytest.approx(unit * before["score"], rel=1e-3)
    assert after["per_target"] == pytest.approx(before["per_target"], rel=1e-3)
    assert after["floors"] == pytest.approx({name: unit * value for name, value in before["floors"].items()}, rel=1e-3)
    assert "0.0000 " not in printed(ensemble.describe(two)) + printed(evaluate.describe(after))
    assert f"{after['score']:.4g}" in visible(scaled.report().outputs["report"]) or unit > 1


def test_predictions_that_never_change_have_no_correlation(chain):
    width = len(chain.competition.targets)
    for fold in range(FOLDS):
        edit(chain.paths.oof(RUNS[0], fold), pl.lit([30.0] * width, dtype=pl.List(pl.Float32)).alias("numbers"))
    facts = chain.score(run=RUNS[0]).facts
    assert [row["Pearson"] for row in facts["per_column"]] == [None] * width
    assert all(row["R²"] < 0.1 for row in facts["per_column"])
    assert "undefined" in printed(evaluate.describe(facts))
    assert "undefined" in visible(chain.report(run=RUNS[0]).outputs["report"])


def test_a_number_that_these_folds_do_not_measure_is_undefined(two):
    """Tm was measured in fold 2 alone, which the ensemble of the first two does not have."""
    fold_N = np.arange(90) % FOLDS
    numbers = truth(two.paths)
    numbers[fold_N != 2, 1] = np.nan
    edit(two.paths.clean("train"), lists(numbers))
    for run in RUNS:
        two.paths.oof(run, 2).unlink()
    weights = two.join(allow_partial=True)
    assert weights["weights"]["Tm"] == dict.fromkeys(RUNS, 0.5)
    assert weights["mean_score"]["per_target"]["Tm"] is None
    assert printed(ensemble.describe(weights))
    facts = two.score().facts
    assert facts["per_column"][1] == {"column": "Tm", "measured": 0} | dict.fromkeys(
        ["RMSE", "MAE", "R²", "Pearson", "Spearman"]
    )
    assert facts["score"] == pytest.approx(facts["per_column"][0]["RMSE"])
    assert re.search(r"Tm +0 +undefined", printed(evaluate.describe(facts)))
    assert "Tm 0 undefined" in visible(two.report().outputs["report"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (pl.col("numbers").list.head(1), "1 values of numbers; expected 2, one a nucleotide, a class or a number"),
        (pl.col("numbers").list.eval(pl.element() * np.nan), "expected finite numbers"),
        (pl.col("numbers").list.eval(pl.element() * np.inf), "expected finite numbers"),
        (pl.col("numbers").alias("probabilities"), ""),
        ((pl.col("fold") + 1).alias("fold"), "the checkpoint saw it"),
    ],
)
def test_what_are_no_numbers_or_not_out_of_fold_is_refused(two, change, message):
    if message:
        edit(two.paths.oof(RUNS[0], 1), change)
    else:
        table = pl.read_parquet(two.paths.oof(RUNS[0], 1)).rename({"numbers": "probabilities"})
        edit(two.paths.oof(RUNS[0], 1), table)
    for stage in (lambda: two.score(run=RUNS[0]), two.join):
        with pytest.raises(DataError, match=message or "no column numbers"):
            stage()


def test_numbers_of_other_columns_are_refused(two):
    edit(two.paths.clean("train"), pl.col("numbers").list.head(1))
    with pytest.raises(DataError, match=r"s0000 has 1 numbers; expected 2, one a column. Next: make data"):
        two.score(run=RUNS[0])


def test_a_line_of_the_log_tells_score_and_floors(two):
    facts = two.score().facts
    (line,) = [line for line in two.paths.log.read_text().splitlines() if "labelled-toy" in line]
    assert f"| {facts['metric']} | {facts['score']:.5f} |" in line
    assert f"mean {facts['floors']['mean']:.4f}" in line


# -- submissions


def test_submission_has_every_test_sequence_in_order_with_all_digits(chain):
    made = chain.submit()
    table = pl.read_csv(made.outputs["submission"])
    names = chain.competition.targets
    assert table.columns == ["id", *names]
    assert table["id"].to_list() == pl.read_parquet(chain.paths.clean("test"))["sequence_id"].to_list()
    said = dict(pl.read_parquet(chain.paths.ensemble_dir("all") / "test.parquet").iter_rows())
    for name, *values in table.iter_rows():
        assert np.array_equal(np.float32(values), np.float32(said[name]))
    assert made.facts["rows"] == 8
    assert chain.check(made.outputs["submission"]).facts["rows"] == 8
    assert all(name in printed(write.describe(made.facts)) for name in names)


def test_parquet_holds_the_same(two):
    text, parquet = pl.read_csv(two.submit().outputs["submission"]), two.submit(fmt="parquet").outputs["submission"]
    table = pl.read_parquet(parquet)
    assert table.columns == text.columns
    assert np.array_equal(table.to_numpy()[:, 1:].astype(np.float32), text.to_numpy()[:, 1:].astype(np.float32))
    assert two.check(parquet).facts["format"] == "parquet"


def write_sample(paths, *columns):
    ids = sorted(pl.read_parquet(paths.clean("test"))["sequence_id"].to_list())
    pl.DataFrame({"name": ids} | {name: ["0"] * len(ids) for name in columns}).write_parquet(paths.clean("sample"))
    return ids


@pytest.mark.parametrize("columns", [("Tm", "half_life"), ("Tm",)])
def test_columns_and_order_are_those_of_the_sample_submission(two, columns):
    ids = write_sample(two.paths, *columns)
    made = two.submit()
    table = pl.read_csv(made.outputs["submission"])
    assert (table.columns, table["name"].to_list()) == (["name", *columns], ids)
    said = dict(pl.read_parquet(two.paths.ensemble_dir("all") / "test.parquet").iter_rows())
    assert table["Tm"].to_list() == pytest.approx([said[name][1] for name in ids])
    assert two.check(made.outputs["submission"]).facts["rows"] == len(ids)


def test_a_single_number_may_have_any_name_in_the_sample(tmp_path):
    chain = Chain(tmp_path, names=NAMES[:1])
    ids = write_sample(chain.paths, "target")
    table = pl.read_csv(chain.submit().outputs["submission"])
    assert (table.columns, table["name"].to_list()) == (["name", "target"], ids)


def test_a_sample_of_other_numbers_is_refused(two):
    write_sample(two.paths, "Tm", "yield")
    with pytest.raises(DataError, match=r"yield is none of the numbers \(half_life, Tm\); expected ids and some"):
        two.submit()


def test_without_a_test_set_there_is_nothing_to_submit(two):
    two.paths.clean("test").unlink()
    with pytest.raises(DataError, match="there is no test set, so there is nothing to submit"):
        two.submit()


@pytest.mark.parametrize(
    ("find", "put", "message"),
    [
        (r"(t\d+),[-.\d]+", r"\1,", "half_life of id 't.*' is empty; expected a finite number"),
        (r"(t\d+),[-.\d]+", r"\1,inf", "half_life of id 't.*' is inf; expected a finite number"),
        (r"(t\d+),[-.\d]+", r"\1,much", "half_life is 'much'; expected a number"),
        (r"t0003", r"t0099", "id 't0099' is not in the test set"),
        (r"t0003.*\n", r"", "missing"),
        (r"half_life", r"halflife", "other columns"),
    ],
)
def test_a_file_that_would_not_be_scored_is_refused(two, find, put, message):
    file = two.submit().outputs["submission"]
    file.write_text(re.sub(find, put, file.read_text(), count=1))
    with pytest.raises(DataError, match=message):
        two.check(file)


def test_a_prediction_that_lacks_a_sequence_or_has_another_is_refused(two):
    path = two.paths.ensemble_dir("all") / "test.parquet"
    table = pl.read_parquet(path)
    for change, message in (
        (table.head(7), "no prediction of t.* \\(1 of 8 test sequences\\)"),
        (pl.concat([table, table.head(1)]), "is predicted twice"),
        (table.with_columns(pl.col("sequence_id").str.replace("t0003", "x")), "'x' is not among the test sequences"),
    ):
        edit(path, change)
        with pytest.raises(DataError, match=message):
            two.submit()


# -- report


def test_the_page_shows_every_number_its_drawings_and_the_largest_errors(chain):
    said_NC, truth_NC = pairs(chain.paths, RUNS[0])
    spread_C = np.nanstd(truth_NC, axis=0)
    worst, place = np.unravel_index(np.nanargmax(np.abs(said_NC - truth_NC) / spread_C), said_NC.shape)
    facts = chain.score(run=RUNS[0]).facts
    path = chain.report(run=RUNS[0]).outputs["report"]
    text = visible(path)
    for row in facts["per_column"]:
        cells = [row["column"], str(row["measured"]), *(f"{row[name]:.4f}" for name in ("RMSE", "MAE", "R²"))]
        assert " ".join(cells) in text
        assert f"measured, {row['column']}" in text
    name = chain.competition.targets[place]
    measured, predicted = truth_NC[worst, place], said_NC[worst, place]
    assert re.search(rf"s{worst:04d} {name} [ACGU]+(… \(\d+\))? {measured:.5g} {predicted:.5g}", text)
    assert "By length" in text
    assert f"{facts['score']:.4f}" in text
    assert "Difference from the best run" in text


def test_a_page_of_equally_long_sequences_says_so(tmp_path):
    chain = Chain(tmp_path, length=21)
    facts = chain.score().facts
    assert "ridge, 3-mers and places" in facts["floors"]
    assert "All sequences have 21 letters" in visible(chain.report().outputs["report"])


def test_many_sequences_are_drawn_as_a_density(two, monkeypatch):
    monkeypatch.setattr("submissions.numbers_report._DOTS", 20)
    two.score()
    assert "density of sequences" in visible(two.report().outputs["report"])


# -- weights


def test_weights_learned_elsewhere_join_test_predictions_alone(two):
    home = two.paths.ensemble_dir("all")
    before = pl.read_parquet(home / "test.parquet")
    (home / "test.parquet").unlink()
    made = ensemble.apply(two.paths, competition=two.competition, name="again", weights=home / "weights.json")
    assert made.facts["test_rows"] == 8
    assert pl.read_parquet(two.paths.ensemble_dir("again") / "test.parquet").equals(before)


# -- from raw files


@pytest.mark.parametrize("names", [("Tm",), ("half_life", "Tm")], ids=["one", "two"])
def test_raw_files_become_a_submission_and_a_page_without_a_network(names, tmp_path, rng):
    """The numbers are counts of G: ridge regression finds them, and the test set's own numbers say so."""
    raw, paths = tmp_path / "raw", make_paths(tmp_path, "labelled-raw")
    raw.mkdir()
    for kind, rows in (("train", 90), ("test", 12)):
        texts = [random_sequence(rng, int(rng.integers(30, 80))) for _ in range(rows)]
        columns = {name: [f"{text.count('G') + 0.1 * at:.1f}" for text in texts] for at, name in enumerate(names)}
        columns["Tm"][0] = ""
        table = pl.DataFrame({"name": [f"{kind}{row}" for row in range(rows)], "sequence": texts} | columns)
        table.write_csv(raw / f"{kind}.csv")
    table.select("name", *reversed(names)).reverse().write_csv(raw / "sample_submission.csv")
    (raw / "columns.toml").write_text(f"numbers = {list(names)}\n")
    preprocess.run(get_competition(paths.comp), raw, paths)
    competition = competition_of(paths)
    assert competition.targets == names
    assign.run(paths, split=SPLIT, locks=tmp_path)
    words.run(paths, competition=competition, split=SPLIT)
    ensemble.run(paths, competition=competition, name="all", runs=[words.run_name(SPLIT)], split=SPLIT)
    file = write.run(paths, competition=competition, name="all").outputs["submission"]
    submitted = pl.read_csv(file)
    assert submitted.columns == ["name", *reversed(names)]
    assert submitted["name"].to_list() == [f"test{row}" for row in range(11, -1, -1)]
    assert (
        check.run(paths, competition=competition, file=file, sample=raw / "sample_submission.csv").facts["rows"] == 12
    )
    facts = evaluate.run(paths, competition=competition, split=SPLIT, name="all").facts
    assert facts["score"] < 0.5 * facts["floors"]["mean"]
    same = next(told["difference"] for floor, told in facts["floor_details"].items() if floor.startswith("ridge"))
    assert set(same.values()) == {0.0}, "of what is the same, with rounding -1.3e-08 [-2.7e-08, -3.2e-12]"
    assert facts["test"]["scored"] == (11 if len(names) == 1 else 12)
    assert facts["test"]["score"] < 0.5 * facts["floors"]["mean"]
    found = audit.run(paths, splits=[SPLIT], competition=competition).facts["splits"][SPLIT]
    assert found["mean_score"] == pytest.approx(facts["floors"]["mean"])
    assert "Tm" in visible(report.run(paths, competition=competition, name="all").outputs["report"])
