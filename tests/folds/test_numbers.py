"""Ensembles of measured numbers: weights of each column from what was measured, and the tables that they make."""

import json
import re

import numpy as np
import polars as pl
import pytest
from rich.console import Console

from folds import ensemble
from pipeline.competitions import get_competition
from pipeline.errors import ConfigError, DataError
from tests.chain_tables import FOLDS, SPLIT, edit, make_paths
from tests.number_tables import NAMES, truth, write_number_data, write_number_run

RUNS = ["good.sim80_k3", "other.sim80_k3"]


@pytest.fixture
def made(tmp_path, rng):
    """Paths, competition and facts of an ensemble of two runs, the second better at Tm alone."""
    paths = make_paths(tmp_path, "labelled-toy")
    competition = write_number_data(paths, rng)
    for run, noise in zip(RUNS, (0.4, 0.5), strict=True):
        write_number_run(paths, run, rng, noise=noise)
    melting_N = np.nan_to_num(truth(paths)[:, 1], nan=40.0) + rng.normal(size=90)
    near = dict(zip(pl.read_parquet(paths.clean("train"))["sequence_id"], melting_N.tolist(), strict=True))
    for fold in range(FOLDS):
        table = pl.read_parquet(paths.oof(RUNS[1], fold))
        lists = [[values[0], near[name]] for name, values in table["sequence_id", "numbers"].iter_rows()]
        edit(paths.oof(RUNS[1], fold), pl.Series("numbers", lists, dtype=pl.List(pl.Float32)))
    facts = ensemble.run(paths, competition=competition, name="all", runs=RUNS, split=SPLIT).facts
    return paths, competition, facts


def said(paths, run) -> np.ndarray:
    tables = pl.concat([pl.read_parquet(paths.oof(run, fold)) for fold in range(FOLDS)]).sort("sequence_id")
    return np.array(tables["numbers"].to_list(), dtype=np.float64)


def best_share(one_N, two_N, truth_N) -> float:
    """Weight of the first of two, from 0 to 1, with the least square error: a line's minimum."""
    along_N = one_N - two_N
    return float(np.clip(along_N @ (truth_N - two_N) / (along_N @ along_N), 0, 1))


def test_weights_of_a_column_are_those_of_least_squares_over_what_was_measured(made):
    paths, _, facts = made
    truth_NC, (one_NC, two_NC) = truth(paths), (said(paths, run) for run in RUNS)
    for at, name in enumerate(NAMES):
        here = np.isfinite(truth_NC[:, at])
        share = best_share(one_NC[here, at], two_NC[here, at], truth_NC[here, at])
        expected = dict(zip(RUNS, (share, 1 - share), strict=True))
        assert facts["learned"]["weights"][name] == pytest.approx(expected, abs=2e-6)
    assert facts["learned"]["weights"]["half_life"][RUNS[0]] > 0.5 > facts["learned"]["weights"]["Tm"][RUNS[0]]
    assert facts["chosen"] == "learned"


def test_a_fold_is_joined_with_weights_of_the_others(made):
    paths, _, facts = made
    truth_NC, (one_NC, two_NC), fold_N = truth(paths), (said(paths, run) for run in RUNS), np.arange(90) % FOLDS
    joined = pl.read_parquet(paths.ensemble_dir("all") / "oof.parquet")
    joined_NC = np.array(joined["numbers"].to_list())
    errors = []
    for at in range(len(NAMES)):
        here = np.isfinite(truth_NC[:, at])
        for fold in range(FOLDS):
            others = here & (fold_N != fold)
            share = best_share(one_NC[others, at], two_NC[others, at], truth_NC[others, at])
            mine = fold_N == fold
            expected = share * one_NC[mine, at] + (1 - share) * two_NC[mine, at]
            assert np.allclose(joined_NC[mine, at], expected, rtol=1e-5)
        errors.append(np.sqrt(np.mean((joined_NC[here, at] - truth_NC[here, at]) ** 2)))
    assert facts["score"] == pytest.approx(np.mean(errors), rel=1e-5)


def test_test_numbers_are_the_weighted_mean_of_runs_and_folds(made):
    paths, _, facts = made
    expected = 0.0
    for run in RUNS:
        weight_C = np.array([facts["weights"][name][run] for name in NAMES])
        for fold in range(FOLDS):
            table = pl.read_parquet(paths.test(run, fold)).sort("sequence_id")
            expected += weight_C * np.array(table["numbers"].to_list()) / FOLDS
    joined = pl.read_parquet(paths.ensemble_dir("all") / "test.parquet").sort("sequence_id")
    assert joined.columns == ["sequence_id", "numbers"]
    assert np.allclose(joined["numbers"].to_list(), expected, rtol=1e-5)


def test_weights_of_other_numbers_join_nothing(made):
    paths, _, _ = made
    other = get_competition("labelled-toy").with_facts({"numbers": ["half_life", "yield"]})
    weights = paths.ensemble_dir("all") / "weights.json"
    assert json.loads(weights.read_text())["targets"] == list(NAMES)
    with pytest.raises(ConfigError, match=r"weights of half_life, Tm; expected those of half_life, yield\. Next: "):
        ensemble.apply(paths, competition=other, name="again", weights=weights)


def test_a_test_table_with_fewer_numbers_is_refused(made):
    paths, competition, _ = made
    edit(paths.test(RUNS[1], 2), pl.col("numbers").list.head(1))
    with pytest.raises(DataError, match="1 values of numbers; expected 2"):
        ensemble.run(paths, competition=competition, name="all", runs=RUNS, split=SPLIT)


def test_a_number_called_score_does_not_take_the_place_of_the_score(tmp_path):
    paths, rng = make_paths(tmp_path, "labelled-toy"), np.random.default_rng(11)
    competition = write_number_data(paths, rng, names=("score", "Tm"))
    for run in RUNS:
        write_number_run(paths, run, rng, noise=0.5)
    facts = ensemble.run(paths, competition=competition, name="all", runs=RUNS, split=SPLIT).facts
    for told in (*facts["run_scores"].values(), facts["mean_score"]):
        errors = told["per_target"]
        assert errors["score"] != pytest.approx(errors["Tm"], rel=1e-3)
        assert told["score"] == pytest.approx((errors["score"] + errors["Tm"]) / 2)


def test_of_many_numbers_the_terminal_tells_the_span_of_the_weights(made):
    _, _, facts = made
    many = [f"n{place}" for place in range(20)]
    weights = {name: facts["weights"][NAMES[place % 2]] for place, name in enumerate(many)}
    each = {"per_target": dict.fromkeys(many, 1.0)}
    scores = {run: told | each for run, told in facts["run_scores"].items()}
    mean = facts["mean_score"] | each
    told = facts | {"targets": many, "weights": weights, "run_scores": scores, "mean_score": mean}
    console = Console(width=120)
    with console.capture() as shown:
        console.print(ensemble.describe(told))
    assert "n7" not in shown.get()
    low, high = sorted(facts["weights"][name][RUNS[0]] for name in NAMES)
    assert re.search(rf"weight of {RUNS[0]} +{low:.3f} to {high:.3f}", shown.get())
