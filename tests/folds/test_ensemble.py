import json
import zlib

import numpy as np
import polars as pl
import pytest

from folds import blend, ensemble, weights
from folds.candidates import _nested, _Policy, choose_candidates
from folds.job import Job
from folds.weights import learn_mixture, learn_weights, least_square_on_simplex
from pipeline.competitions import get_competition
from pipeline.errors import ConfigError, DataError
from pipeline.labels import Classes, log_losses, read_classes
from pipeline.paths import Paths
from pipeline.stage import sha256_file
from tests.chain_tables import (
    FOLDS,
    SPLIT,
    TARGETS,
    edit,
    make_paths,
    write,
    write_class_data,
    write_class_run,
    write_run,
    write_structure_data,
    write_structure_run,
    write_values_data,
)

RIBONANZA, RNA3D = get_competition("ribonanza"), get_competition("rna3d")
LABELLED = get_competition("labelled-toy")
GOOD = {"reactivity_DMS_MaP": 0.1, "reactivity_2A3_MaP": 0.3}
OTHER = {"reactivity_DMS_MaP": 0.3, "reactivity_2A3_MaP": 0.1}


@pytest.fixture
def paths(tmp_path, rng) -> Paths:
    paths = make_paths(tmp_path)
    write_values_data(paths, rng)
    write_run(paths, "good.sim80_k3", rng, noise=GOOD)
    write_run(paths, "other+wide.sim80_k3", rng, noise=OTHER)
    return paths


def join(paths: Paths, *, runs=("good.sim80_k3", "other+wide.sim80_k3"), comp=RIBONANZA, **options):
    return ensemble.run(paths, competition=comp, name="all", runs=list(runs), split=SPLIT, **options)


# -- the choice among joins, and its optimism


def test_a_choice_that_every_fold_makes_costs_nothing(paths):
    """The score was that of the best of several joins on the very folds that chose it, and nothing said by how much."""
    facts = join(paths).facts
    assert facts["chosen"] == "learned"
    assert facts["score_nested"] == pytest.approx(facts["score"], abs=1e-12)
    assert json.loads((paths.ensemble_dir("all") / "weights.json").read_text())["score_nested"] == facts["score_nested"]
    assert join(paths, runs=["good.sim80_k3"]).facts["score_nested"] is None, "there was no choice"


def test_a_choice_made_on_the_other_folds_is_scored_on_its_own(paths):
    """Each run is perfect in one of two folds: by the other fold the wrong one is chosen, each time."""
    job = Job(paths=paths, competition=RIBONANZA, runs=("a", "b"), split=SPLIT, folds=[0, 1], skipped=[])
    choices = [blend._Totals(job), blend._Totals(job)]
    for each, sums in zip(choices, ([0.0, 8.0], [8.0, 0.0]), strict=True):
        each.sums_FC[:], each.counts_FC[:] = np.array(sums)[:, None], 10.0
    assert [each.score() for each in choices] == pytest.approx([0.4, 0.4])
    assert blend._nested(job, choices) == pytest.approx(0.8)
    choices[0].counts_FC[1] = 0.0
    assert blend._nested(job, choices) is None, "of one fold without a scored position nothing can be chosen"


def test_a_policy_chosen_on_the_other_folds_is_scored_on_its_own():
    def policy(*best_of_five: float) -> _Policy:
        return _Policy((), {}, {0.0: np.array(best_of_five)}, 0.0, pl.DataFrame())

    fold_N = np.array([0, 0, 1, 1])
    assert _nested([policy(0.9, 0.9, 0.1, 0.1), policy(0.1, 0.1, 0.9, 0.9)], fold_N) == pytest.approx(0.1)
    assert _nested([policy(0.9, 0.7, 0.5, 0.3), policy(0.1, 0.1, 0.1, 0.1)], fold_N) == pytest.approx(0.6)


# -- weights


@pytest.mark.parametrize("seed", range(4))
def test_no_point_of_a_fine_grid_beats_the_learned_weights(seed):
    rng = np.random.default_rng(seed)
    truth_T = rng.beta(0.6, 1.5, size=700)
    shared_T = rng.normal(0.0, 0.1, size=700)
    noise_M = rng.uniform(0.02, 0.4, size=3)
    predictions_TM = truth_T[:, None] + shared_T[:, None] + rng.laplace(0.0, noise_M, size=(700, 3))
    found = learn_weights(predictions_TM, truth_T)
    steps = np.linspace(0.0, 1.0, 101)
    grid = np.array([(a, b, 1 - a - b) for a in steps for b in steps if a + b <= 1.0 + 1e-12])
    losses = np.abs(predictions_TM @ grid.T - truth_T[:, None]).mean(axis=0)
    assert found.loss <= losses.min() + 1e-5
    assert found.gap < 1e-5
    assert found.values_M.min() >= 0.0
    assert found.values_M.sum() == pytest.approx(1.0, abs=1e-12)


def test_a_perfect_run_takes_all_weight(rng):
    truth_T = rng.uniform(size=300)
    predictions_TM = np.stack([truth_T + 0.3 * rng.normal(size=300), truth_T, rng.uniform(size=300)], axis=1)
    assert learn_weights(predictions_TM, truth_T).values_M.tolist() == [0.0, 1.0, 0.0]


def test_equal_runs_share_the_weight_and_opposite_errors_cancel(rng):
    truth_T = rng.uniform(size=300)
    error_T = 0.2 * rng.normal(size=300)
    same = np.stack([truth_T + error_T] * 2, axis=1)
    assert learn_weights(same, truth_T).values_M.tolist() == [0.5, 0.5]
    opposite = np.stack([truth_T + error_T, truth_T - 2 * error_T], axis=1)
    assert learn_weights(opposite, truth_T).values_M == pytest.approx([2 / 3, 1 / 3], abs=2e-3)


@pytest.mark.parametrize("seed", range(5))
def test_least_square_on_simplex_satisfies_its_optimality_conditions(seed):
    rng = np.random.default_rng(seed)
    factor = rng.normal(size=(9, 6)) + rng.normal(size=(9, 1))
    matrix = factor.T @ factor
    weights = least_square_on_simplex(matrix)
    slope = matrix @ weights
    assert weights.sum() == pytest.approx(1.0)
    assert weights.min() >= 0.0
    assert slope.min() == pytest.approx(weights @ slope, rel=1e-6)  # no corner is downhill


@pytest.mark.parametrize("seed", range(4))
def test_no_point_of_a_fine_grid_has_a_lower_log_loss_than_the_learned_mixture(seed):
    rng = np.random.default_rng(seed)
    right_TM = 1 / (1 + np.exp(-rng.normal(0.5, 1.0, size=(600, 1)) - rng.normal(0, rng.uniform(0.2, 3, 3), (600, 3))))
    found = learn_mixture(right_TM)
    steps = np.linspace(0.0, 1.0, 101)
    grid = np.array([(a, b, 1 - a - b) for a in steps for b in steps if a + b <= 1.0 + 1e-12])
    losses = -np.log(right_TM @ grid.T + 1e-300).mean(axis=0)
    assert found.loss <= losses.min() + 1e-7
    assert found.gap < 1e-5
    assert found.values_M.min() >= 0.0
    assert found.values_M.sum() == pytest.approx(1.0, abs=1e-12)


def test_a_mixture_of_equals_is_even_and_what_never_helps_gets_nothing(rng):
    right_T = rng.uniform(0.3, 0.9, size=200)
    assert learn_mixture(np.stack([right_T] * 2, axis=1)).values_M.tolist() == [0.5, 0.5]
    assert learn_mixture(np.stack([right_T, 0.5 * right_T], axis=1)).values_M.tolist() == [1.0, 0.0]
    turns_T = np.arange(200) % 2
    specialists_TM = np.stack([np.where(turns_T == 0, 0.9, 0.1), np.where(turns_T == 1, 0.9, 0.1)], axis=1)
    assert learn_mixture(specialists_TM).values_M == pytest.approx([0.5, 0.5])


def test_one_certain_mistake_does_not_break_a_mixture():
    found = learn_mixture(np.array([[1e-7, 0.5], [1.0, 0.5], [1.0, 0.5], [1.0, 0.5]]))
    assert 0.1 < found.values_M[0] < 0.9
    assert found.gap < 1e-5


@pytest.mark.parametrize("power", [0, 1, 2])
def test_the_gap_of_weights_that_are_not_the_best_is_no_less_than_what_the_best_gain(rng, monkeypatch, power):
    """Power 0 stands for the log loss. The certificate of a learning that ends too early, which no test had seen."""
    truth_T = rng.uniform(size=300)
    predictions_TM = truth_T[:, None] + rng.normal(0.0, (0.05, 0.2, 0.4), size=(300, 3))
    right_TM = rng.uniform((0.6, 0.1, 0.01), 1.0, size=(300, 3))
    best = learn_weights(predictions_TM, truth_T, power=power) if power else learn_mixture(right_TM)
    monkeypatch.setattr(weights, "_STEPS", 0)
    monkeypatch.setattr(weights, "_LOG_STEPS", 0)
    begun = learn_weights(predictions_TM, truth_T, power=power) if power else learn_mixture(right_TM)
    error_T = predictions_TM.mean(axis=1) - truth_T
    expected = -np.log(right_TM.mean(axis=1)).mean() if power == 0 else (np.abs(error_T) ** power).mean()
    assert begun.loss == pytest.approx(expected, rel=1e-5)
    assert best.gap < 1e-5 < begun.loss - best.loss <= begun.gap + (weights.SMOOTHING if power == 1 else 0)


def job_of(paths: Paths, competition, classes: Classes | None = None) -> Job:
    found = {"competition": competition, "classes": classes, "folds": [0, 1], "skipped": []}
    return Job(paths=paths, runs=("a", "b"), split=SPLIT, **found)


def test_weights_are_learned_from_the_truth_as_the_metric_clips_it(tmp_path, rng):
    truth_T = rng.normal(0.5, 1.0, size=400)
    predictions_TM = np.stack([truth_T, truth_T.clip(0, 1)], axis=1)
    found = blend._fit(job_of(make_paths(tmp_path), RIBONANZA), predictions_TM, truth_T)
    assert found.values_M.tolist() == [0.0, 1.0]


@pytest.mark.parametrize("exclusive", [True, False])
def test_what_every_run_held_to_be_impossible_does_not_break_the_weights(tmp_path, exclusive):
    """Of a truth that all runs gave 0 the log would be infinite."""
    classes = Classes(("x", "y"), (1, 1), exclusive, "ACGU")
    said_TM = np.array([[0.0, 0.0], [1.0, 1.0], [0.9, 0.6], [0.1, 0.4], [0.8, 0.7], [0.2, 0.3]])
    truth_T = np.array([1.0, 0.0, 1.0, 0.0, 1.0, 0.0])
    found = blend._fit(job_of(make_paths(tmp_path), LABELLED, classes), said_TM, truth_T)
    assert found.values_M == pytest.approx([1.0, 0.0])
    assert np.isfinite([found.loss, found.gap]).all()


# -- classes


@pytest.fixture(params=[True, False], ids=["exclusive", "several"])
def class_paths(request, tmp_path, rng) -> Paths:
    paths = make_paths(tmp_path, LABELLED.name)
    write_class_data(paths, rng, exclusive=request.param, sequences=240)
    for run, noise in (("one.sim80_k3", 1.5), ("two.sim80_k3", 2.2)):
        write_class_run(paths, run, rng, noise=noise, exclusive=request.param)
    return paths


def join_classes(paths: Paths, **options):
    options = {"runs": ["one.sim80_k3", "two.sim80_k3"]} | options
    return ensemble.run(paths, competition=LABELLED, name="all", split=SPLIT, **options)


def class_loss(paths: Paths, table: pl.DataFrame) -> float:
    """Mean log loss by a plain join."""
    joined = pl.read_parquet(paths.clean("train")).filter("scored").join(table, on="sequence_id", validate="1:1")
    truth = np.array([[place in labels for place in range(3)] for labels in joined["labels"].to_list()])
    said = np.array(joined["probabilities"].to_list())
    return float(log_losses(said, truth, exclusive=read_classes(paths).exclusive).mean())


def test_two_noisy_classifiers_together_are_better_than_either(class_paths):
    facts = join_classes(class_paths).facts
    singles = [told["score"] for told in facts["run_scores"].values()]
    assert facts["chosen"] == "learned"
    assert facts["score"] < facts["mean_score"]["score"] < min(singles)
    assert facts["learned"]["score_in_sample"] <= facts["mean_score"]["score"]
    weights = facts["weights"]["probabilities"]
    assert sum(weights.values()) == pytest.approx(1.0)
    assert 0.2 < weights["two.sim80_k3"] < weights["one.sim80_k3"]


def test_class_scores_are_those_of_the_written_table_and_of_each_run(class_paths):
    report = join_classes(class_paths)
    assert report.facts["score"] == pytest.approx(
        class_loss(class_paths, pl.read_parquet(report.outputs["oof"])), abs=1e-6
    )
    for run, told in report.facts["run_scores"].items():
        tables = pl.concat([pl.read_parquet(class_paths.oof(run, fold)) for fold in range(FOLDS)])
        assert told["score"] == pytest.approx(class_loss(class_paths, tables), abs=1e-6)


def test_probabilities_of_the_test_set_are_the_weighted_mean_and_still_probabilities(class_paths):
    report = join_classes(class_paths)
    weights = report.facts["weights"]["probabilities"]
    got = np.array(pl.read_parquet(report.outputs["test"])["probabilities"].to_list())
    expected = sum(
        weight / FOLDS * np.array(pl.read_parquet(class_paths.test(run, fold))["probabilities"].to_list())
        for run, weight in weights.items()
        for fold in range(FOLDS)
    )
    np.testing.assert_allclose(got, expected, atol=1e-6)
    if read_classes(class_paths).exclusive:
        np.testing.assert_allclose(got.sum(axis=1), 1.0, atol=1e-5)


def test_probabilities_out_of_fold_use_weights_learned_on_the_other_folds(class_paths):
    """Other labels in fold 0 change the joined probabilities of the other folds and none of its own."""
    before = join_classes(class_paths)
    assert before.facts["chosen"] == "learned"
    table = pl.read_parquet(before.outputs["oof"])
    zero = pl.read_parquet(class_paths.fold_table(SPLIT))["fold"] == 0
    few = zero & (pl.Series(range(240)) % 30 == 0)
    shifted = pl.col("labels").list.eval((pl.element() + 1) % 3).list.sort().cast(pl.List(pl.UInt16))
    edit(class_paths.clean("train"), pl.when(few).then(shifted).otherwise("labels").alias("labels"))
    report = join_classes(class_paths)
    assert report.facts["chosen"] == "learned"
    after = pl.read_parquet(report.outputs["oof"])
    for fold in range(FOLDS):
        assert after.filter(fold=fold).equals(table.filter(fold=fold)) == (fold == 0)


def test_an_earlier_ensemble_of_classes_needs_no_training_data(class_paths, tmp_path):
    report = join_classes(class_paths)
    other = make_paths(tmp_path / "notebook", LABELLED.name)
    for run in ("one.sim80_k3", "two.sim80_k3"):
        for fold in range(FOLDS):
            write(pl.read_parquet(class_paths.test(run, fold)), other.test(run, fold))
    again = ensemble.apply(other, competition=LABELLED, name="all", weights=report.outputs["weights"])
    assert pl.read_parquet(again.outputs["test"]).equals(pl.read_parquet(report.outputs["test"]))


def test_a_test_table_of_other_classes_is_refused(class_paths):
    edit(class_paths.test("two.sim80_k3", 1), pl.col("probabilities").list.head(2))
    with pytest.raises(DataError, match="2 values of probabilities; expected 3"):
        join_classes(class_paths)


def test_classes_are_described_without_a_column_for_each(class_paths):
    table = ensemble.describe(join_classes(class_paths).facts)
    assert len(table.columns) == 2
    assert table.row_count == 9


# -- values


def test_ensemble_is_never_worse_than_the_best_run_or_the_plain_mean(paths):
    facts = join(paths).facts
    singles = [scores["score"] for scores in facts["run_scores"].values()]
    assert facts["score"] <= min(*singles, facts["mean_score"]["score"])
    assert facts["chosen"] == "learned"
    assert facts["learned"]["score_in_sample"] <= facts["mean_score"]["score"]


def test_weights_are_learned_per_target(paths):
    weights = join(paths).facts["weights"]
    assert weights["reactivity_DMS_MaP"]["good.sim80_k3"] > 0.6
    assert weights["reactivity_2A3_MaP"]["good.sim80_k3"] < 0.4
    for of_target in weights.values():
        assert min(of_target.values()) >= 0.0
        assert sum(of_target.values()) == pytest.approx(1.0, abs=1e-6)


def test_weights_of_an_own_set_do_not_depend_on_its_unit(paths):
    """Of profiles in hundred-thousandths they were never learned: any two runs had a half each."""
    told = {"targets": TARGETS, "metric": "MAE", "range": None, "signal_to_noise": False}
    own = get_competition("profiles-mine").with_facts(told | {"shown_ranges": [[0.0, 1.0]] * 2})
    before = join(paths, comp=own).facts["learned"]["weights"]
    for table in (paths.clean("train"), *paths.home.glob("runs/*/fold*/*.parquet")):
        smaller = [pl.col(target).list.eval(pl.element() * 2.0**-17) for target in TARGETS]
        edit(table, pl.read_parquet(table).with_columns(smaller))
    assert join(paths, comp=own).facts["learned"]["weights"] == before
    assert all(max(weights.values()) > 0.6 for weights in before.values())


def test_the_better_of_run_and_mean_is_used_when_weights_do_not_help(paths, rng):
    write_run(paths, "noise.sim80_k3", rng, noise=dict.fromkeys(TARGETS, 5.0))
    report = join(paths, runs=["good.sim80_k3", "noise.sim80_k3"])
    assert report.facts["chosen"] == "run good.sim80_k3"
    assert report.facts["weights"]["reactivity_DMS_MaP"] == {"good.sim80_k3": 1.0, "noise.sim80_k3": 0.0}


def test_reported_score_is_that_of_the_written_table(paths):
    report = join(paths)
    train = pl.read_parquet(paths.clean("train")).filter("scored")
    table = pl.read_parquet(report.outputs["oof"]).join(train, on="sequence_id", suffix="_true", validate="1:1")
    errors = {
        target: table.select(
            (pl.col(target).explode() - pl.col(f"{target}_true").explode().clip(0.0, 1.0)).abs().mean()
        )
        for target in TARGETS
    }
    assert np.mean([error.item() for error in errors.values()]) == pytest.approx(report.facts["score"], abs=1e-6)


def test_out_of_fold_values_use_weights_learned_on_the_other_folds(paths):
    """Another truth in fold 0 changes the joined values of the other folds and none of its own."""
    before = pl.read_parquet(join(paths).outputs["oof"])
    zero = pl.read_parquet(paths.fold_table(SPLIT))["fold"] == 0
    scaled = [pl.when(zero).then(pl.col(target).list.eval(pl.element() * 0.8)).otherwise(target) for target in TARGETS]
    edit(paths.clean("train"), pl.read_parquet(paths.clean("train")).with_columns(scaled))
    report = join(paths)
    assert report.facts["chosen"] == "learned"
    after = pl.read_parquet(report.outputs["oof"])
    for fold in range(FOLDS):
        same = after.filter(pl.col("fold") == fold).equals(before.filter(pl.col("fold") == fold))
        assert same == (fold == 0)


def test_test_table_is_the_weighted_mean_over_runs_of_the_mean_over_folds(paths):
    report = join(paths)
    weights = report.facts["weights"]
    for target in TARGETS:
        expected = sum(
            weight / FOLDS * pl.read_parquet(paths.test(run, fold))[target].explode().to_numpy().astype(np.float64)
            for run, weight in weights[target].items()
            for fold in range(FOLDS)
        )
        got = pl.read_parquet(report.outputs["test"])[target].explode().to_numpy()
        np.testing.assert_allclose(got, expected, atol=1e-6)


def test_two_builds_are_byte_identical_and_the_second_is_current(paths, tmp_path):
    first = join(paths)
    hashes = {label: sha256_file(path) for label, path in first.outputs.items()}
    assert join(paths).status == "current"
    for path in paths.ensemble_dir("all").iterdir():
        path.unlink()
    second = join(paths)
    assert second.status == "built"
    assert {label: sha256_file(path) for label, path in second.outputs.items()} == hashes


def test_one_run_is_its_folds_in_the_order_of_the_ids(paths):
    report = join(paths, runs=["good.sim80_k3"])
    folds = [pl.read_parquet(paths.oof("good.sim80_k3", fold)) for fold in range(FOLDS)]
    assert pl.read_parquet(report.outputs["oof"]).equals(pl.concat(folds).sort("sequence_id"))
    assert report.facts["chosen"] == "run good.sim80_k3"


def test_weights_file_holds_the_facts(paths):
    report = join(paths)
    assert json.loads(report.outputs["weights"].read_text()) == report.facts


def test_thinned_sample_gives_nearly_the_same_weights(paths, monkeypatch):
    whole = join(paths).facts["learned"]
    monkeypatch.setattr("folds.blend.SAMPLE_POSITIONS", 500)
    thinned = ensemble.run(
        paths, competition=RIBONANZA, name="thin", runs=["good.sim80_k3", "other+wide.sim80_k3"], split=SPLIT
    ).facts["learned"]
    assert thinned["every_nth_sequence"] > 1
    assert thinned["sample_positions"] < 0.5 * whole["sample_positions"]
    for target in TARGETS:
        assert thinned["weights"][target]["good.sim80_k3"] == pytest.approx(
            whole["weights"][target]["good.sim80_k3"], abs=0.2
        )


def test_sequences_without_prediction_are_counted_and_named(paths):
    path = paths.oof("good.sim80_k3", 1)
    edit(path, pl.read_parquet(path).slice(2))
    report = join(paths)
    assert report.facts["missing"] == {"good.sim80_k3": {"count": 2, "first": ["s0001", "s0004"]}}
    assert report.facts["oof_rows"] == 58


def test_what_is_no_run_of_the_split_is_named_with_those_that_are(paths):
    """RUNS=foo was answered with "Next: make train FOLD=0 MODEL= SPLIT=foo"."""
    with pytest.raises(ConfigError, match=r"RUNS=foo: no run of sim80_k3; there are: .*good\.sim80_k3.* Next: "):
        join(paths, runs=["foo"])
    paths.run_dir("good+sweep-lr-1a2b3c4d-s0.sim80_k3").mkdir()  # which no ensemble takes unless it is asked for
    with pytest.raises(ConfigError) as told:
        join(paths, runs=["god"])
    assert "Did you mean 'good.sim80_k3'? Next: name some of these" in str(told.value)
    assert "sweep" not in str(told.value)
    paths.run_dir("good.sim80_k5").mkdir()
    with pytest.raises(ConfigError, match=r"RUNS=good.sim80_k5: no run of sim80_k3; .* Next: SPLIT=sim80_k5\."):
        join(paths, runs=["good.sim80_k5"])


def test_missing_fold_names_the_command_that_makes_it(paths):
    paths.oof("other+wide.sim80_k3", 2).unlink()
    with pytest.raises(
        ConfigError, match=r"fold 2 .* make train FOLD=2 COMP=ribonanza MODEL=other SPLIT=sim80_k3 TAG=wide\."
    ):
        join(paths)


def test_a_missing_run_without_a_network_names_its_own_command(paths):
    """The sentence said make train MODEL=templates."""
    with pytest.raises(ConfigError, match=r"Next: make templates-predict COMP=ribonanza SPLIT=sim80_k3\."):
        join(paths, runs=["good.sim80_k3", "templates.sim80_k3"])


@pytest.mark.parametrize("name", ["..", ".hidden", "a/b", "-x", ""])
def test_names_that_are_no_folder_of_their_own_are_refused(paths, name):
    """NAME=.. wrote its tables beside the other ensembles, where no other verb found them."""
    with pytest.raises(ConfigError, match="NAME="):
        ensemble.run(paths, competition=RIBONANZA, name=name, runs=["good.sim80_k3"], split="sim80_k3")


def test_partial_ensemble_says_which_folds_it_covers(paths):
    paths.oof("other+wide.sim80_k3", 2).unlink()
    report = join(paths, allow_partial=True)
    assert (report.facts["folds"], report.facts["folds_left_out"]) == ([0, 1], [2])
    assert set(pl.read_parquet(report.outputs["oof"])["fold"]) == {0, 1}


def test_runs_that_share_no_fold_cannot_be_joined_in_part(paths):
    """PARTIAL=1 asked for one fold of one of many runs, after which it would have asked for the next."""
    for run, folds in (("good.sim80_k3", (0, 1)), ("other+wide.sim80_k3", (2,))):
        for fold in folds:
            paths.oof(run, fold).unlink()
    with pytest.raises(ConfigError, match=r"no fold of sim80_k3 is predicted by all 2 runs; .* Next: name in RUNS"):
        join(paths, allow_partial=True)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: pl.concat([t, t.head(1)]).sort("sequence_id"), "'s0001' is repeated or out of order"),
        (lambda t: t.reverse(), "is repeated or out of order"),
        (lambda t: t.with_columns(fold=pl.lit(2, dtype=pl.UInt8)), "the split sim80_k3 holds it out in fold 1"),
        (lambda t: t.with_columns(sequence_id="x" + pl.col("sequence_id")), "'xs0001' is not among the sequences"),
        (lambda t: t.with_columns(pl.col(TARGETS[0]).list.head(5)), "s0001: 5 values of reactivity_DMS_MaP; expected"),
        (
            lambda t: t.with_columns(pl.col(TARGETS[1]).list.eval(pl.element() * float("nan"))),
            "s0001: prediction at position 1 is",
        ),
        (lambda t: t.drop(TARGETS[1]), "no column reactivity_2A3_MaP"),
    ],
)
def test_bad_predictions_are_refused_by_name(paths, change, message):
    path = paths.oof("good.sim80_k3", 1)
    edit(path, change(pl.read_parquet(path)))
    with pytest.raises(DataError, match=message):
        join(paths)
    assert not list(paths.ensemble_dir("all").iterdir())


def test_sequence_in_two_folds_is_refused(paths):
    table = pl.read_parquet(paths.oof("good.sim80_k3", 0)).head(1)
    path = paths.oof("good.sim80_k3", 1)
    edit(path, pl.concat([pl.read_parquet(path), table]).sort("sequence_id"))
    with pytest.raises(DataError, match=r"s0000 predicted by fold 0|s0000 predicted in two folds"):
        join(paths)


def test_test_tables_of_different_data_are_refused(paths):
    path = paths.test("good.sim80_k3", 1)
    edit(path, pl.read_parquet(path).with_columns(sequence_id=pl.col("sequence_id").str.replace("t0003", "t0099")))
    with pytest.raises(DataError, match="'t0099' where it has 't0003'"):
        join(paths)
    edit(path, pl.read_parquet(path).head(3))
    with pytest.raises(DataError, match="fewer or more rows"):
        join(paths)


def test_fold_table_of_other_data_is_refused(paths):
    edit(paths.fold_table(SPLIT), pl.read_parquet(paths.fold_table(SPLIT)).head(50))
    with pytest.raises(DataError, match=r"50 sequences; expected 60 .* make folds"):
        join(paths)


@pytest.mark.parametrize("table", ["oof", "test"])
def test_damaged_predictions_are_refused(paths, table):
    """A first test table that was cut ended in a traceback: OSError."""
    path = getattr(paths, table)("good.sim80_k3", 0)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(DataError, match="not a readable parquet file"):
        join(paths)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"runs": []}, "no runs given"), ({"runs": ["good.sim80_k3"] * 2}, "given twice")],
)
def test_senseless_choices_are_refused(paths, options, message):
    with pytest.raises(ConfigError, match=message):
        join(paths, **options)
    with pytest.raises(ConfigError, match="as it names files"):
        ensemble.run(paths, competition=RIBONANZA, name="../x", runs=["good.sim80_k3"], split=SPLIT)


def test_description_has_every_run_and_the_choice(paths):
    from rich.console import Console

    console = Console(width=200)
    with console.capture() as captured:
        console.print(ensemble.describe(join(paths).facts))
    for word in ("good.sim80_k3", "other+wide.sim80_k3", "plain mean", "learned, cross-fitted", "used: learned"):
        assert word in captured.get()


@pytest.mark.parametrize("width", [40, 80])
def test_a_narrow_terminal_breaks_names_and_scores_and_cuts_none(paths, width):
    from rich.console import Console

    console = Console(width=width)
    with console.capture() as captured:
        console.print(ensemble.describe(join(paths).facts))
    assert "…" not in captured.get()


# -- structures


def trace(seed: int) -> np.ndarray:
    return np.cumsum(np.random.default_rng(seed).normal(0.0, 4.0, size=(40, 3)), axis=0)


def candidates(source: str, confidences: list[float], *, seeds: list[int] | None = None) -> pl.DataFrame:
    seeds = seeds or [zlib.crc32(f"{source}{number}".encode()) for number in range(len(confidences))]
    traces = [trace(seed) for seed in seeds]
    return pl.DataFrame(
        {
            "sequence_id": ["R1"] * len(confidences),
            "candidate": list(range(1, len(confidences) + 1)),
            "confidence": confidences,
            "name": [f"{source}{number}" for number in range(1, len(confidences) + 1)],
            **{axis: [each[:, k].tolist() for each in traces] for k, axis in enumerate("xyz")},
        }
    )


def test_the_most_promising_go_first_whatever_their_source():
    chosen = choose_candidates({"a": candidates("a", [0.9, 0.8, 0.1]), "b": candidates("b", [0.2, 0.95, 0.5, 0.6])})
    assert chosen["name"].to_list() == ["b2", "a1", "a2", "b4", "b3"]
    assert chosen["candidate"].to_list() == [1, 2, 3, 4, 5]


def test_copies_are_not_taken_while_there_is_anything_else():
    table = candidates("a", [0.9, 0.89, 0.88, 0.3, 0.2, 0.1, 0.0], seeds=[1, 1, 1, 2, 3, 4, 5])
    assert choose_candidates({"a": table}, novelty=0.0)["name"].to_list() == ["a1", "a4", "a5", "a6", "a7"]


def test_five_copies_are_taken_if_there_is_nothing_else():
    assert choose_candidates({"a": candidates("a", [0.5] * 6, seeds=[1] * 6)}).height == 5


def test_what_is_new_is_worth_a_little_expected_score():
    close = trace(1) + np.random.default_rng(9).normal(0.0, 1.0, size=(40, 3))
    table = candidates("a", [0.9, 0.8, 0.75, 0.99, 0.98, 0.97], seeds=[1, 1, 2, 3, 4, 5])
    columns = {
        axis: [close[:, k].tolist() if row == 1 else xyz for row, xyz in enumerate(table[axis].to_list())]
        for k, axis in enumerate("xyz")
    }
    table = table.with_columns(**{axis: pl.Series(column) for axis, column in columns.items()})
    assert choose_candidates({"a": table}, novelty=0.0)["name"].to_list() == ["a4", "a5", "a6", "a1", "a2"]
    assert choose_candidates({"a": table}, novelty=0.4)["name"].to_list() == ["a4", "a5", "a6", "a1", "a3"]


def test_more_candidates_than_a_byte_counts_are_no_trouble():
    """Was: InvalidOperationError from 255 candidates on, such as 11 runs of 5 folds."""
    chosen = choose_candidates({f"run{k:02d}": candidates(f"run{k:02d}_", [0.5] * 5) for k in range(60)})
    assert chosen.height == 5
    assert chosen["candidate"].dtype == pl.UInt8


def test_a_source_that_boasts_is_taken_at_its_out_of_fold_worth(tmp_path, rng):
    """Run good is near the truth and says 0.3, run bad is noise and says 0.9."""
    paths = make_paths(tmp_path, "rna3d")
    write_structure_data(paths, rng, targets=8)
    write_structure_run(paths, "bad.s", rng, confidences=[0.9, 0.9, 0.9, 0.9, 0.9])
    write_structure_run(paths, "good.s", rng, confidences=[0.3, 0.3, 0.3, 0.3, 0.3])
    train = pl.read_parquet(paths.clean("train"))
    for fold in range(2):
        table = pl.read_parquet(paths.oof("good.s", fold))
        known = table.select("sequence_id").join(train, on="sequence_id", how="left", maintain_order="left")
        noise = [pl.Series(axis, known[axis]) for axis in "xyz"]
        table.with_columns(noise).write_parquet(paths.oof("good.s", fold))

    def closeness(pairs):
        return np.array([np.mean(1.0 / (1.0 + np.sum((a - b) ** 2, axis=1))) for a, b in pairs])

    facts = join(paths, runs=["bad.s", "good.s"], comp=RNA3D, score=closeness).facts
    first = pl.read_parquet(paths.ensemble_dir("all") / "oof.parquet").filter(pl.col("candidate") == 1)
    truth = first.select("sequence_id").join(train, on="sequence_id", how="left", maintain_order="left")
    assert first["x"].to_list() == truth["x"].to_list()
    assert facts["policy"]["best_of_five_of_runs"]["good.s"] == 1.0
    taken = {source: count for source, count in facts["taken_from"].items() if source.startswith("good")}
    assert sum(taken.values()) == facts["test_rows"], "good.s has five or more candidates for every test target"


@pytest.fixture
def structure_paths(tmp_path, rng) -> Paths:
    paths = make_paths(tmp_path, "rna3d")
    write_structure_data(paths, rng)
    write_structure_run(paths, "one.s", rng, confidences=[0.9, 0.7, 0.5, 0.3, 0.1])
    write_structure_run(paths, "two.s", rng, confidences=[0.8, 0.6, 0.4, 0.2, 0.0])
    return paths


def test_structure_ensemble_holds_five_candidates_of_every_target(structure_paths):
    report = join(structure_paths, runs=["one.s", "two.s"], comp=RNA3D)
    for table, ids in (("oof", [f"R{number}_A" for number in range(6)]), ("test", ["Q1", "Q10", "Q2_B"])):
        got = pl.read_parquet(report.outputs[table])
        assert got.select("sequence_id", "candidate").rows() == [(key, number) for key in ids for number in range(1, 6)]
    assert report.facts["taken_from"] == {"one.s/fold0": 3, "one.s/fold1": 6, "two.s/fold0": 3, "two.s/fold1": 3}


def test_the_policy_learns_nothing_from_targets_that_teach_nothing(structure_paths):
    """Their known structures may be newer than a test target's cutoff: other truth, same policy."""
    train = pl.read_parquet(structure_paths.clean("train"))
    teaches = ~pl.col("sequence_id").is_in(["R0_A", "R3_A"])
    write(train.with_columns(teaches=teaches), structure_paths.clean("train"))

    def closeness(pairs):
        return np.array([np.mean(1.0 / (1.0 + np.sum((a - b) ** 2, axis=1) / 400.0)) for a, b in pairs])

    def learned():
        policy = join(structure_paths, runs=["one.s", "two.s"], comp=RNA3D, score=closeness).facts["policy"]
        return policy["weights"], policy["novelty"], policy["best_of_five"], policy["best_of_five_of_runs"]

    before = learned()
    path = structure_paths.clean("references")
    known = pl.read_parquet(path)
    write(known.with_columns(x=pl.when(teaches).then("x").otherwise("y")), path)
    assert learned() == before
    write(known.with_columns(x=pl.when(teaches).then("y").otherwise("x")), path)
    assert learned() != before


def test_structure_out_of_fold_table_keeps_the_coordinates_of_its_sources(structure_paths):
    oof = pl.read_parquet(join(structure_paths, runs=["one.s"], comp=RNA3D).outputs["oof"])
    parts = [pl.read_parquet(structure_paths.oof("one.s", fold)) for fold in range(2)]
    expected = pl.concat(parts).sort("sequence_id", "candidate")
    assert oof.drop("source").equals(expected.select(oof.drop("source").columns))
    assert oof["source"].unique().to_list() == ["one.s"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (pl.lit(float("nan"), dtype=pl.Float32).alias("confidence"), "not finite"),
        (pl.col("y").list.head(2), "unequal number of x, y, z"),
        (pl.lit(1, dtype=pl.UInt8).alias("candidate"), "candidate 1 twice"),
        (pl.lit(0, dtype=pl.UInt8).alias("fold"), "holds it out in fold 1"),
    ],
)
def test_bad_structures_are_refused_by_name(structure_paths, change, message):
    edit(structure_paths.oof("one.s", 1), change)
    with pytest.raises(DataError, match=message):
        join(structure_paths, runs=["one.s"], comp=RNA3D)
