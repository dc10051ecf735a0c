"""Floors of classes: each knows the other folds alone, and what it cannot know it does not claim."""

import numpy as np
import pytest

from pipeline.labels import Classes, log_losses
from pipeline.words import count_words
from submissions import class_floors
from submissions.class_scores import decide, in_short


def classes(width, *, exclusive=True, alphabet="ACGU"):
    names = tuple("abcdefgh"[:width])
    return Classes(names, (0,) * width, exclusive, alphabet)


def predict_floors(texts, truth_NK, fold_N, classes):
    """Without relatives: each sequence is a cluster of its own."""
    return class_floors.predict_floors(texts, truth_NK, fold_N, np.arange(len(texts)), classes)


def biased(rng, truth_NK, *, strength=4.0, length=60):
    """Sequences in which every class of a sequence prefers a letter of its own."""
    texts = []
    for flags in truth_NK:
        weights = 1.0 + strength * np.append(flags, [False] * (4 - len(flags)))
        texts.append("".join(rng.choice(list("ACGU"), size=length, p=weights / weights.sum())))
    return texts


def one_hot(rng, count, width):
    return rng.choice(width, size=count)[:, None] == np.arange(width)


def losses(floors, truth_NK, *, exclusive):
    return [float(log_losses(said_NK, truth_NK, exclusive=exclusive).mean()) for said_NK in floors.values()]


@pytest.mark.parametrize("exclusive", [True, False])
def test_words_beat_frequencies_where_classes_have_their_own_words(rng, exclusive):
    truth_NK = one_hot(rng, 240, 3) if exclusive else rng.random((240, 3)) < 0.4
    floors = predict_floors(biased(rng, truth_NK), truth_NK, np.arange(240) % 4, classes(3, exclusive=exclusive))
    assert list(floors) == ["class frequencies", "naive Bayes, 6-mers", "nearest neighbour, 4-mers"]
    frequent, bayes, near = losses(floors, truth_NK, exclusive=exclusive)
    assert bayes < 0.5 * frequent
    assert near < 0.75 * frequent


@pytest.mark.parametrize("exclusive", [True, False])
def test_nothing_is_claimed_where_words_say_nothing(rng, exclusive):
    """Naive Bayes left to itself is sure of everything: its loss on such data would be many times as high."""
    truth_NK = one_hot(rng, 300, 3) if exclusive else rng.random((300, 3)) < 0.4
    texts = ["".join(rng.choice(list("ACGU"), size=80)) for _ in range(300)]
    floors = predict_floors(texts, truth_NK, np.arange(300) % 3, classes(3, exclusive=exclusive))
    frequent, bayes, near = losses(floors, truth_NK, exclusive=exclusive)
    assert bayes < 1.03 * frequent
    assert near < 1.03 * frequent


@pytest.mark.parametrize("folds", [2, 3, 4])
@pytest.mark.parametrize("exclusive", [True, False])
def test_predictions_of_a_fold_know_nothing_of_its_truth(rng, exclusive, folds):
    """With two or three folds, how far words are believed was learned from all but the fold that is told."""
    truth_NK = one_hot(rng, 150, 3) if exclusive else rng.random((150, 3)) < 0.4
    texts, fold_N = biased(rng, truth_NK), np.arange(150) % folds
    before = predict_floors(texts, truth_NK, fold_N, classes(3, exclusive=exclusive))
    changed_NK = truth_NK.copy()
    changed_NK[fold_N == 0] = np.roll(truth_NK[fold_N == 0], 1, axis=1)
    after = predict_floors(texts, changed_NK, fold_N, classes(3, exclusive=exclusive))
    for name in before:
        assert (after[name][fold_N == 0] == before[name][fold_N == 0]).all(), name
        assert (after[name][fold_N == 1] != before[name][fold_N == 1]).any(), name


@pytest.mark.parametrize("exclusive", [True, False])
@pytest.mark.parametrize("folds", [2, 3, 5])
def test_every_floor_gives_probabilities(rng, exclusive, folds):
    truth_NK = one_hot(rng, 60, 4) if exclusive else rng.random((60, 4)) < 0.4
    truth_NK[:, 3] = False  # a class that only the test may have
    if exclusive:
        truth_NK[:, 0] |= ~truth_NK.any(axis=1)
    floors = predict_floors(biased(rng, truth_NK), truth_NK, np.arange(60) % folds, classes(4, exclusive=exclusive))
    for said_NK in floors.values():
        assert ((said_NK >= 0) & (said_NK <= 1)).all()
        assert not exclusive or said_NK.sum(axis=1) == pytest.approx(np.ones(60))


def test_a_copy_in_another_fold_is_found_and_one_in_the_same_fold_is_not_looked_at(rng):
    half = ["".join(rng.choice(list("ACGU"), size=50)) for _ in range(60)]
    truth_NK = np.repeat(one_hot(rng, 60, 3), 2, axis=0)
    texts = [text for text in half for _ in range(2)]
    across, together = (np.arange(120) % 2 + np.arange(120) // 2) % 4, np.arange(120) // 2 % 4
    for fold_N, found in ((across, True), (together, False)):
        said_NK = list(predict_floors(texts, truth_NK, fold_N, classes(3)).values())[-1]
        told = in_short(said_NK, truth_NK, decide(said_NK, exclusive=True), exclusive=True)
        assert (told["accuracy"] == 1.0) == found


def test_proteins_have_their_own_words(rng):
    letters = "ACDEFGHIKLMNPQRSTVWY"
    truth_NK = one_hot(rng, 90, 2)
    texts = ["".join(rng.choice(list(letters[:12] if flags[0] else letters[8:]), size=40)) for flags in truth_NK]
    floors = predict_floors(texts, truth_NK, np.arange(90) % 3, classes(2, alphabet=letters))
    assert list(floors)[1:] == ["naive Bayes, 3-mers", "nearest neighbour, 2-mers"]
    frequent, bayes, _ = losses(floors, truth_NK, exclusive=True)
    assert bayes < 0.3 * frequent


def test_words_do_not_cross_from_one_sequence_to_the_next():
    counts = count_words(["ACG", "AC", "U", "GGGG"], "ACGU", 3).toarray()
    assert counts.sum(axis=1).tolist() == [1.0, 0.0, 0.0, 2.0]
    assert counts[0, 0 * 16 + 1 * 4 + 2] == 1.0
    assert counts[3, 2 * 16 + 2 * 4 + 2] == 2.0


@pytest.mark.parametrize("folds", [2, 3])
def test_relatives_within_a_fold_are_no_reason_to_believe_a_neighbour(rng, folds):
    """Copies stay in one part of their fold: cut through, they would be found each time, and across folds never."""
    truth_NK = np.repeat(one_hot(rng, 60, 3), 2, axis=0)
    half, family_N = ["".join(rng.choice(list("ACGU"), size=50)) for _ in range(60)], np.arange(120) // 2
    texts = [text for text in half for _ in range(2)]
    said_NK = list(class_floors.predict_floors(texts, truth_NK, family_N % folds, family_N, classes(3)).values())
    frequent, *_, near = (float(log_losses(each, truth_NK, exclusive=True).mean()) for each in said_NK)
    assert near < 1.1 * frequent


def test_floors_are_the_same_in_whatever_order_the_folds_are_numbered(rng):
    truth_NK = one_hot(rng, 90, 3)
    texts, fold_N = biased(rng, truth_NK), np.arange(90) % 3
    for name, said_NK in predict_floors(texts, truth_NK, fold_N, classes(3)).items():
        other_NK = predict_floors(texts, truth_NK, 2 - fold_N, classes(3))[name]
        assert other_NK == pytest.approx(said_NK, abs=2e-4), name


def test_of_many_sequences_a_part_is_searched_and_the_name_says_so(rng, monkeypatch):
    monkeypatch.setattr("submissions.class_floors.MOST_PAIRS", 1000)
    truth_NK = one_hot(rng, 90, 3)
    floors = predict_floors(biased(rng, truth_NK), truth_NK, np.arange(90) % 3, classes(3))
    assert list(floors)[2] == "nearest neighbour, 4-mers among 1 in 9"
    frequent, _, near = losses(floors, truth_NK, exclusive=True)
    assert near < frequent
