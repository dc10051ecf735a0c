"""Floors of numbers: each fold from the others alone."""

import numpy as np
import pytest

from pipeline.labels import Numbers
from submissions import number_floors
from tests.chain_tables import random_sequence

NUMBERS = Numbers(("Tm", "decay"), (), (), (), "ACGU")


def draw(rng, count=120, length=0):
    sequences = [random_sequence(rng, length or int(rng.integers(20, 60))) for _ in range(count)]
    truth_NC = np.array([[text.count("G") + 3 * text.count("ACA"), len(text)] for text in sequences], dtype=float)
    return sequences, truth_NC + rng.normal(0, 0.1, truth_NC.shape), rng.integers(0, 4, count)


def predict_floors(sequences, truth_NC, fold_N, numbers):
    """Without relatives: each sequence is a cluster of its own."""
    return number_floors.predict_floors(sequences, truth_NC, fold_N, np.arange(len(sequences)), numbers)


def floors(sequences, truth_NC, fold_N, kind):
    (found,) = (said for name, said in predict_floors(sequences, truth_NC, fold_N, NUMBERS).items() if kind in name)
    return found


def test_means_are_those_of_the_other_folds_where_each_was_measured(rng):
    sequences, truth_NC, fold_N = draw(rng)
    truth_NC[::3, 1] = np.nan
    found = floors(sequences, truth_NC, fold_N, "mean")
    for fold in range(4):
        assert np.allclose(found[fold_N == fold], np.nanmean(truth_NC[fold_N != fold], axis=0))


@pytest.mark.parametrize("kind", ["mean", "ridge", "nearest"])
def test_a_fold_has_no_say_in_its_own_predictions(kind, rng):
    sequences, truth_NC, fold_N = draw(rng)
    before = floors(sequences, truth_NC, fold_N, kind)
    changed_NC = truth_NC.copy()
    changed_NC[fold_N == 2] = 1e3 * rng.normal(size=changed_NC[fold_N == 2].shape)
    assert np.array_equal(floors(sequences, changed_NC, fold_N, kind)[fold_N == 2], before[fold_N == 2])


def test_ridge_finds_words_and_length(rng):
    sequences, truth_NC, fold_N = draw(rng)
    off_NC = floors(sequences, truth_NC, fold_N, "ridge") - truth_NC
    assert np.all(np.sqrt((off_NC**2).mean(axis=0)) < [0.6, 0.4] * truth_NC.std(axis=0))


def test_a_copy_tells_the_number_and_a_stranger_hardly_any(rng):
    sequences, truth_NC, fold_N = draw(rng, count=60)
    copied_NC = floors(sequences * 4, np.tile(truth_NC, (4, 1)), np.repeat(np.arange(4), 60), "nearest")
    assert np.allclose(copied_NC, np.tile(truth_NC, (4, 1)))
    noise_NC = rng.normal(size=truth_NC.shape)
    found = floors(sequences, noise_NC, fold_N, "nearest")
    assert np.sqrt(((found - noise_NC) ** 2).mean()) < 1.2 * noise_NC.std()


def test_a_number_that_the_other_folds_lack_is_nought(rng):
    sequences, truth_NC, fold_N = draw(rng)
    truth_NC[fold_N != 1, 1] = np.nan
    for kind in ("mean", "ridge", "nearest"):
        assert np.array_equal(floors(sequences, truth_NC, fold_N, kind)[fold_N == 1, 1], np.zeros((fold_N == 1).sum()))


def test_predictions_stay_within_what_was_measured(rng):
    """A sequence far longer than all others was told a number far from all others."""
    sequences, truth_NC, fold_N = draw(rng)
    sequences[0] = "ACGU" * 500
    found = floors(sequences, truth_NC, fold_N, "ridge")[0]
    others_NC = truth_NC[fold_N != fold_N[0]]
    assert np.all((found >= others_NC.min(axis=0)) & (found <= others_NC.max(axis=0)))


@pytest.mark.parametrize("folds", [1, 2, 3])
def test_few_folds_are_enough(folds, rng):
    sequences, truth_NC, _ = draw(rng)
    found = predict_floors(sequences, truth_NC, np.arange(len(sequences)) % folds, NUMBERS)
    assert all(np.isfinite(said_NC).all() for said_NC in found.values())


def test_where_all_have_one_length_the_letter_at_a_place_is_seen(rng):
    sequences, _, fold_N = draw(rng, count=300, length=21)
    truth_NC = np.array([[text[4] == "A", text[17] in "GC"] for text in sequences], dtype=float)
    found = predict_floors(sequences, truth_NC, fold_N, NUMBERS)
    ridge = found["ridge, 4-mers and places"]
    assert np.all(np.abs(ridge - truth_NC).mean(axis=0) < 0.35)
