"""Scores of classes: laws, what scikit-learn says of the same predictions, and what must have no value."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from pipeline.labels import log_losses
from submissions import class_scores as scores
from tests.golden.class_scores import make_predictions

GOLDEN = json.loads((Path(__file__).parents[1] / "golden" / "class_scores.json").read_text())
KINDS = ("exclusive", "several")


def predictions(kind):
    said_NK, truth_NK = make_predictions(exclusive=kind == "exclusive")
    return said_NK, truth_NK, scores.decide(said_NK, exclusive=kind == "exclusive")


def long_tailed(rng, *, sequences=4000, classes=41):
    """Several labels a sequence, from frequent classes to very rare ones."""
    truth_NK = rng.random((sequences, classes)) < np.geomspace(0.3, 5e-4, classes)
    return 1 / (1 + np.exp(-3.0 * truth_NK + 2.5 - rng.normal(size=truth_NK.shape))), truth_NK


# -- against an outside truth


@pytest.mark.parametrize("kind", KINDS)
def test_every_class_gets_the_scores_that_scikit_learn_gives_it_where_they_are_defined(kind):
    said_NK, truth_NK, decided_NK = predictions(kind)
    found = scores.per_class(said_NK, truth_NK, decided_NK, np.full(truth_NK.shape, 0.5))
    two_sided_K = truth_NK.any(axis=0) & ~truth_NK.all(axis=0)
    for name in ("precision", "recall", "f1", "mcc", "auroc", "average_precision"):
        golden_K = np.array(GOLDEN[kind][name], dtype=float)
        assert found[name][two_sided_K] == pytest.approx(golden_K[two_sided_K], abs=1e-12), name
    assert two_sided_K.sum() == 6


@pytest.mark.parametrize("kind", KINDS)
def test_averages_and_accuracy_are_those_of_scikit_learn(kind):
    said_NK, truth_NK, decided_NK = predictions(kind)
    found = scores.averages(scores.count(decided_NK, truth_NK))
    for average in ("macro", "weighted", "micro"):
        assert found[average]["f1"] == pytest.approx(GOLDEN[kind][f"{average} f1"], abs=1e-12)
    told = scores.in_short(said_NK, truth_NK, decided_NK, exclusive=kind == "exclusive")
    assert told["accuracy"] == pytest.approx(GOLDEN[kind]["accuracy"], abs=1e-12)
    assert told["macro F1"] == found["macro"]["f1"]


def test_confusion_and_correlation_of_exclusive_classes_are_those_of_scikit_learn():
    _, truth_NK, decided_NK = predictions("exclusive")
    confusion_KK = scores.confusion(decided_NK, truth_NK)
    assert confusion_KK.tolist() == GOLDEN["exclusive"]["confusion"]
    assert scores.matthews_of_classes(confusion_KK) == pytest.approx(GOLDEN["exclusive"]["mcc of classes"], abs=1e-12)


def test_log_loss_is_that_of_scikit_learn():
    said_NK, truth_NK, _ = predictions("exclusive")
    share_NK = said_NK / said_NK.sum(axis=1, keepdims=True)
    assert log_losses(share_NK, truth_NK, exclusive=True).mean() == pytest.approx(GOLDEN["exclusive"]["log loss"])


# -- laws


def test_f1_is_of_the_whole_epoch_whatever_the_batches(rng):
    """The mean of batch values, with nothing where a batch lacks a class, is another number altogether."""
    said_NK, truth_NK = long_tailed(rng)
    counts = scores.count(said_NK >= 0.5, truth_NK)
    whole = scores.averages(counts)["macro"]["f1"]
    order = rng.permutation(len(truth_NK))
    parts = [scores.count(said_NK[some] >= 0.5, truth_NK[some]) for some in np.array_split(order, 125)]
    added = scores.Counts(*(np.sum(kind, axis=0) for kind in zip(*parts, strict=True)))
    assert scores.averages(added)["macro"]["f1"] == pytest.approx(whole, abs=1e-12)
    batch_means = [np.nan_to_num(scores.f1(part)).mean() for part in parts]
    assert abs(np.mean(batch_means) - whole) > 0.2


def test_micro_average_of_classes_is_the_score_of_all_decisions_as_one_class(rng):
    said_NK, truth_NK = long_tailed(rng, sequences=300)
    decided_NK = said_NK >= 0.5
    flat = scores.count(decided_NK.reshape(-1, 1), truth_NK.reshape(-1, 1))
    micro = scores.averages(scores.count(decided_NK, truth_NK))["micro"]
    expected = {
        "precision": scores.precision(flat)[0], "recall": scores.recall(flat)[0], "f1": scores.f1(flat)[0]
    }  # fmt: skip
    assert micro == pytest.approx(expected, abs=1e-12)


def test_micro_f1_of_exclusive_classes_is_accuracy():
    said_NK, truth_NK, decided_NK = predictions("exclusive")
    micro = scores.averages(scores.count(decided_NK, truth_NK))["micro"]
    accuracy = scores.in_short(said_NK, truth_NK, decided_NK, exclusive=True)["accuracy"]
    assert micro == pytest.approx(dict.fromkeys(micro, accuracy))


def test_correlation_of_two_exclusive_classes_is_that_of_either(rng):
    truth_NK = (rng.random(200) < 0.3)[:, None] == np.array([True, False])
    decided_NK = (rng.random(200) < 0.4)[:, None] == np.array([True, False])
    both = scores.matthews(scores.count(decided_NK, truth_NK))
    assert scores.matthews_of_classes(scores.confusion(decided_NK, truth_NK)) == pytest.approx(both[0])
    assert both[0] == pytest.approx(both[1])


def test_ranking_scores_depend_on_the_order_alone_and_count_equals_half(rng):
    said_N, truth_N = rng.random(150).round(1), rng.random(150) < 0.4
    pairs = [(said_N[a] > said_N[b]) + 0.5 * (said_N[a] == said_N[b]) for a in np.flatnonzero(truth_N)
             for b in np.flatnonzero(~truth_N)]  # fmt: skip
    assert scores.auroc(said_N, truth_N) == pytest.approx(np.mean(pairs))
    for score in (scores.auroc, scores.average_precision):
        assert score(np.exp(5 * said_N), truth_N) == pytest.approx(score(said_N, truth_N))
    assert scores.auroc(-said_N, truth_N) == pytest.approx(1 - scores.auroc(said_N, truth_N))
    shuffled = rng.permutation(150)
    assert scores.average_precision(said_N[shuffled], truth_N[shuffled]) == pytest.approx(
        scores.average_precision(said_N, truth_N)
    )


def test_curves_end_where_everything_is_accepted(rng):
    said_N, truth_N = rng.random(80), rng.random(80) < 0.3
    told = scores.curve(said_N, truth_N)
    assert (told["recall"][-1], told["false_positive_rate"][-1]) == (1.0, 1.0)
    assert told["precision"][-1] == truth_N.mean()
    x, y = np.append(0, told["false_positive_rate"]), np.append(0, told["recall"])
    area = (np.diff(x) * (y[1:] + y[:-1]) / 2).sum()
    assert area == pytest.approx(scores.auroc(said_N, truth_N))


# -- what has no value


def test_a_class_without_positives_or_without_negatives_is_undefined_not_0_or_1():
    said_NK, truth_NK, decided_NK = predictions("several")
    found = scores.per_class(said_NK, truth_NK, decided_NK, np.full(truth_NK.shape, 0.5))
    nothing_else, no_positive = 6, 7
    for place in (nothing_else, no_positive):
        assert np.isnan(found["auroc"][place])
        assert np.isnan(found["average_precision"][place])
    assert np.isnan(found["f1"][no_positive])
    assert np.isnan(found["recall"][no_positive])
    assert found["precision"][no_positive] == 0.0  # decided for, and wrong each time
    assert found["precision"][nothing_else] == 1.0
    assert scores.in_short(said_NK, truth_NK, decided_NK, exclusive=False)["macro AUROC"] == pytest.approx(
        np.mean(GOLDEN["several"]["auroc"][:6])
    )


def test_a_class_that_is_never_decided_for_has_no_precision_and_an_f1_of_0():
    truth_NK = np.array([[True], [False], [True]])
    counts = scores.count(np.zeros((3, 1), dtype=bool), truth_NK)
    assert np.isnan(scores.precision(counts)[0])
    assert (scores.recall(counts)[0], scores.f1(counts)[0]) == (0.0, 0.0)
    assert np.isnan(scores.matthews(counts)[0])


def test_nothing_at_all_has_no_score():
    empty = np.zeros((0, 2)), np.zeros((0, 2), dtype=bool), np.zeros((0, 2), dtype=bool)
    for exclusive in (True, False):
        assert all(math.isnan(value) for value in scores.in_short(*empty, exclusive=exclusive).values())
    assert math.isnan(scores.calibration_error([]))


# -- decisions


def test_the_best_threshold_has_the_highest_f1_of_all(rng):
    truth_N = rng.random(120) < 0.3
    said_N = ((2 * rng.random(120) + truth_N) / 3).round(2)  # or the best would be to say yes always

    def reached(threshold):
        return scores.f1(scores.count((said_N >= threshold)[:, None], truth_N[:, None]))[0]

    best = scores.best_threshold(said_N, truth_N)
    assert 0.2 < best < 0.8
    assert reached(best) == max(reached(threshold) for threshold in np.linspace(0, 1, 401))
    assert scores.best_threshold(said_N, np.zeros(120, dtype=bool)) == 0.5


def test_thresholds_of_a_fold_are_learned_on_the_others_alone(rng):
    said_NK, truth_NK = long_tailed(rng, sequences=300, classes=4)
    fold_N = np.arange(300) % 3
    before_NK = scores.crossed_thresholds(said_NK, truth_NK, fold_N)
    for fold in range(3):
        expected_K = scores.learn_thresholds(said_NK[fold_N != fold], truth_NK[fold_N != fold])
        assert (before_NK[fold_N == fold] == expected_K).all()
    truth_NK[fold_N == 0] = ~truth_NK[fold_N == 0]
    after_NK = scores.crossed_thresholds(said_NK, truth_NK, fold_N)
    assert (after_NK[fold_N == 0] == before_NK[fold_N == 0]).all()
    assert (after_NK[fold_N == 1] != before_NK[fold_N == 1]).any()
    assert (scores.crossed_thresholds(said_NK, truth_NK, np.zeros(300)) == 0.5).all()


def test_exclusive_classes_get_one_answer_even_where_all_are_equal():
    assert scores.decide(np.full((2, 3), 1 / 3), exclusive=True).sum(axis=1).tolist() == [1, 1]


# -- calibration


def test_calibration_error_is_0_for_honest_probabilities_and_the_excess_for_boasts():
    stated_T = np.repeat([0.25, 0.75], 400)
    right_T = np.tile([True, False, False, False], 100).tolist() + np.tile([True, True, True, False], 100).tolist()
    honest = scores.reliability(stated_T, np.array(right_T))
    assert scores.calibration_error(honest) == pytest.approx(0.0, abs=1e-12)
    boast = scores.reliability(np.full(100, 0.9), np.arange(100) < 60)
    assert scores.calibration_error(boast) == pytest.approx(0.3)
    assert boast == [{"low": 13 / 15, "stated": pytest.approx(0.9), "right": 0.6, "count": 100}]
    assert scores.reliability(np.array([1.0, 0.0]), np.array([True, False]))[-1]["count"] == 1


def test_reliability_of_exclusive_classes_looks_at_the_answer_that_is_given():
    said_NK, truth_NK = np.array([[0.8, 0.2], [0.3, 0.7]]), np.array([[True, False], [True, False]])
    rows = scores.stated_and_right(said_NK, truth_NK, exclusive=True)
    assert [(row["stated"], row["right"]) for row in rows] == [(0.7, 0.0), (0.8, 1.0)]
    assert sum(row["count"] for row in scores.stated_and_right(said_NK, truth_NK, exclusive=False)) == 4
