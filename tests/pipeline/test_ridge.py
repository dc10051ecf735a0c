"""Ridge regression on words against its closed form, and as a run of its own beside networks."""

import numpy as np
import polars as pl
import pytest

from folds import ensemble
from pipeline import words
from pipeline.errors import DataError
from pipeline.labels import read_numbers
from pipeline.ridge import PENALTIES_P, Ridge, View
from submissions.number_floors import predict_floors
from submissions.number_scores import root_mean_square_error
from tests.chain_tables import FOLDS, SPLIT, make_paths, random_sequence
from tests.number_tables import NAMES, truth, write_number_data, write_number_run


def draw(rng, *, count=80, length=0):
    sequences = [random_sequence(rng, length or int(rng.integers(20, 60))) for _ in range(count)]
    truth_NC = np.array([[text.count("G"), text.count("AC")] for text in sequences]) + rng.normal(0, 1, (count, 2))
    return sequences, truth_NC, rng.integers(0, 4, count)


def test_features_are_length_words_and_places():
    view = View.of(["ACGUN", "AAAAA"], "ACGUN")
    row_V = view.features(["ACGUN"]).toarray()[0]
    assert (view.longest, view.span, len(row_V)) == (4, 5, 1 + 4 + 16 + 64 + 256 + 5 * 4)
    assert row_V[0] == 5
    assert row_V[1:5].tolist() == [1, 1, 1, 1]
    assert row_V[5:21].sum() == 3  # AC, CG, GU
    assert row_V[-20:].reshape(5, 4).tolist() == [*np.eye(4).tolist(), [0, 0, 0, 0]]


def test_long_sequences_of_one_length_have_no_places(rng):
    assert View.of([random_sequence(rng, 400)] * 2, "ACGU").span == 0


def test_weights_are_those_of_the_normal_equations(rng):
    sequences, truth_NC, fold_N = draw(rng)
    truth_NC[::5, 1] = np.nan
    view = View.of(sequences, "ACGU")
    x_NV, model = (
        view.features(sequences).toarray().astype(float),
        Ridge(sequences, truth_NC, fold_N, fold_N, view).fit(0),
    )
    for at in range(2):
        here = (fold_N != 0) & np.isfinite(truth_NC[:, at])
        spread_V = x_NV[here].std(axis=0)
        z_nV = (x_NV[here] - x_NV[here].mean(axis=0)) / np.where(spread_V > 0, spread_V, np.inf)
        y_n = truth_NC[here, at]
        assert model.penalty_C[at] in PENALTIES_P
        inner_VV = z_nV.T @ z_nV + model.penalty_C[at] * np.eye(len(spread_V))
        z_weights_V = np.linalg.solve(inner_VV, z_nV.T @ (y_n - y_n.mean()))
        weights_V = z_weights_V / np.where(spread_V > 0, spread_V, np.inf)
        assert np.allclose(model.weights_CV[at], weights_V)
        assert model.level_C[at] == pytest.approx(y_n.mean() - x_NV[here].mean(axis=0) @ weights_V)


def test_the_penalty_is_the_one_under_which_the_other_folds_predict_each_other_best(rng):
    sequences, truth_NC, fold_N = draw(rng)
    ridge = Ridge(sequences, truth_NC, fold_N, fold_N, View.of(sequences, "ACGU"))
    error_P = np.zeros(len(PENALTIES_P))
    x_NV = View.of(sequences, "ACGU").features(sequences).toarray().astype(float)
    for told in (1, 2, 3):
        here, there = (fold_N != 0) & (fold_N != told), fold_N == told
        mean_V, spread_V = x_NV[here].mean(axis=0), x_NV[here].std(axis=0)
        scale_V = np.where(spread_V > 0, spread_V, np.inf)
        z_nV, z_mV = (x_NV[here] - mean_V) / scale_V, (x_NV[there] - mean_V) / scale_V
        y_n = truth_NC[here, 0]
        for place, penalty in enumerate(PENALTIES_P):
            weights_V = np.linalg.solve(z_nV.T @ z_nV + penalty * np.eye(len(mean_V)), z_nV.T @ (y_n - y_n.mean()))
            error_P[place] += np.square(z_mV @ weights_V + y_n.mean() - truth_NC[there, 0]).sum()
    assert ridge.fit(0).penalty_C[0] == PENALTIES_P[np.argmin(error_P)]


def test_noise_is_answered_with_the_mean(rng):
    sequences, truth_NC, fold_N = draw(rng, count=200)
    noise_NC = rng.normal(size=truth_NC.shape)
    model = Ridge(sequences, noise_NC, fold_N, fold_N, View.of(sequences, "ACGU")).fit(0)
    assert np.abs(model.predict(sequences) - noise_NC[fold_N != 0].mean(axis=0)).max() < 0.5


@pytest.mark.parametrize("unit", [1e-9, 1e9])
def test_a_unit_changes_predictions_by_itself_alone(unit, rng):
    sequences, truth_NC, fold_N = draw(rng)
    view = View.of(sequences, "ACGU")
    plain, scaled = (Ridge(sequences, factor * truth_NC, fold_N, fold_N, view).fit(0) for factor in (1.0, unit))
    assert np.array_equal(plain.penalty_C, scaled.penalty_C)
    assert np.allclose(scaled.predict(sequences), unit * plain.predict(sequences), rtol=1e-6)


# -- the run


def make(folder, rng, **options):
    paths = make_paths(folder, "labelled-toy")
    return paths, write_number_data(paths, rng, **options)


def said(paths, kind="oof") -> dict[str, list[float]]:
    name = words.run_name(SPLIT)
    tables = [getattr(paths, kind)(name, fold) for fold in range(FOLDS)]
    return dict(pl.concat([pl.read_parquet(table)["sequence_id", "numbers"] for table in tables]).iter_rows())


def test_the_run_out_of_fold_is_the_floor(tmp_path, rng):
    """The score was that of the truth itself: both tables had a column of the same name."""
    paths, competition = make(tmp_path, rng)
    facts = words.run(paths, competition=competition, split=SPLIT).facts
    train = pl.read_parquet(paths.clean("train"))
    truth_NC, here_N = truth(paths), train["scored"].to_numpy()
    scored, fold_N = train.filter("scored"), (np.arange(90) % FOLDS)[here_N]
    cluster_N = scored["sequence_id"].to_numpy()
    floors = predict_floors(scored["sequence"].to_list(), truth_NC[here_N], fold_N, cluster_N, read_numbers(paths))
    found = said(paths)
    said_NC = np.array([found[name] for name in scored["sequence_id"]])
    assert np.allclose(said_NC, floors["ridge, 4-mers"], rtol=1e-5)
    errors = [
        root_mean_square_error(column_N[known_N], truth_N[known_N])
        for column_N, truth_N in zip(said_NC.T, truth_NC[here_N].T, strict=True)
        for known_N in (np.isfinite(truth_N),)
    ]
    assert facts["score"] == pytest.approx(np.mean(errors), rel=1e-5)
    assert words.describe(facts) == [f"ridge, 4-mers: MCRMSE {facts['score']:.4g} out of fold"]
    assert len(found) == train.height


@pytest.mark.parametrize("length", [0, 21])
def test_what_was_learned_predicts_elsewhere_as_here(length, tmp_path, rng):
    paths, competition = make(tmp_path, rng, length=length)
    words.run(paths, competition=competition, split=SPLIT)
    before, name = said(paths, "test"), words.run_name(SPLIT)
    source = paths.run_dir(name).rename(tmp_path / "learned")
    report = words.apply(paths, competition=competition, split=SPLIT, source=source)
    assert report.facts == {"test": 8}
    assert said(paths, "test") == before


def test_an_ensemble_takes_it_beside_a_network(tmp_path, rng):
    paths, competition = make(tmp_path, rng, names=NAMES[:1])
    words.run(paths, competition=competition, split=SPLIT)
    write_number_run(paths, f"net.{SPLIT}", rng, noise=0.5)
    runs = [f"net.{SPLIT}", words.run_name(SPLIT)]
    told = ensemble.run(paths, competition=competition, name="all", runs=runs, split=SPLIT).facts
    assert told["score"] <= min(told["run_scores"][run]["score"] for run in runs)


def test_a_lost_model_or_another_kind_of_it_is_refused(tmp_path, rng):
    paths, competition = make(tmp_path, rng)
    for change in (None, pl.DataFrame({"fold": [0], "factor": [1.0], "frequency": [0.5], "weights": [[1.0]]})):
        if change is not None:
            change.write_parquet(tmp_path / "words.parquet")
        with pytest.raises(DataError, match=r"words.parquet: no .*Next: "):
            words.apply(paths, competition=competition, split=SPLIT, source=tmp_path)
