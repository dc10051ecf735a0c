"""Flip and crop move targets and pairs with the sequence, and depend on seed, epoch and index alone."""

import itertools

import numpy as np
import pytest

from pipeline.augment import central_crop, crop, epoch_augmentation, flip
from pipeline.dataset import RnaExample, dense_bpp


@pytest.fixture
def example(rng) -> RnaExample:
    return RnaExample(
        id="a",
        tokens_L=rng.integers(0, 4, 12).astype(np.uint8),
        target_LC=rng.random((12, 2), dtype=np.float32),
        weight_C=np.ones(2, dtype=np.float32),
        bpp_ij_K2=np.array([[0, 11], [1, 10], [3, 7]], dtype=np.uint16),
        bpp_p_K=np.array([0.5, 0.25, 0.125], dtype=np.float32),
    )


def test_a_flip_reverses_tokens_targets_and_pairs(example):
    turned = flip(example)
    np.testing.assert_array_equal(turned.tokens_L, example.tokens_L[::-1])
    np.testing.assert_array_equal(turned.target_LC, example.target_LC[::-1])
    np.testing.assert_array_equal(dense_bpp(turned), dense_bpp(example)[::-1, ::-1])
    assert (turned.bpp_ij_K2[:, 0] < turned.bpp_ij_K2[:, 1]).all()


def test_two_flips_are_none(example):
    for ours, theirs in zip(flip(flip(example)), example, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_a_crop_is_a_window_of_everything(example):
    part = crop(example, start=2, length=8)
    np.testing.assert_array_equal(part.tokens_L, example.tokens_L[2:10])
    np.testing.assert_array_equal(part.target_LC, example.target_LC[2:10])
    for start, stop in itertools.combinations(range(13), 2):  # a window may begin or end with one half of a pair
        window = slice(start, stop)
        part = crop(example, start=start, length=stop - start)
        np.testing.assert_array_equal(dense_bpp(part), dense_bpp(example)[window, window])


def test_the_original_is_left_alone(example):
    before = [np.copy(part) for part in example]
    flip(crop(example, start=1, length=5))
    for ours, theirs in zip(example, before, strict=True):
        np.testing.assert_array_equal(ours, theirs)


def test_an_augmentation_is_a_function_of_seed_epoch_and_index(example):
    def draw(seed: int, epoch: int, index: int) -> list[int]:
        change = epoch_augmentation(50, seed=seed, epoch=epoch, max_length=5, flip=0.5)
        return change(example, index).tokens_L.tolist()

    assert [draw(1, 2, k) for k in range(50)] == [draw(1, 2, k) for k in reversed(range(50))][::-1]
    assert len({tuple(draw(1, 2, k)) for k in range(50)}) > 8  # 8 windows, two directions
    assert [draw(1, 2, k) for k in range(50)] != [draw(1, 3, k) for k in range(50)]
    assert [draw(1, 2, k) for k in range(50)] != [draw(2, 2, k) for k in range(50)]


def test_crops_reach_both_ends(example):
    change = epoch_augmentation(400, seed=0, epoch=0, max_length=11, flip=0.0)
    seen = {change(example, k).tokens_L.tobytes() for k in range(400)}
    assert seen == {example.tokens_L[:11].tobytes(), example.tokens_L[1:].tobytes()}


@pytest.mark.parametrize(("share", "expected"), [(0.0, 0), (1.0, 400)])
def test_flips_happen_as_often_as_asked(example, share, expected):
    change = epoch_augmentation(400, seed=0, epoch=0, max_length=99, flip=share)
    turned = example.tokens_L[::-1].tobytes()
    assert sum(change(example, k).tokens_L.tobytes() == turned for k in range(400)) == expected


def test_the_central_crop_leaves_short_sequences_alone(example):
    assert central_crop(example, max_length=12) is example
    np.testing.assert_array_equal(central_crop(example, max_length=6).tokens_L, example.tokens_L[3:9])
