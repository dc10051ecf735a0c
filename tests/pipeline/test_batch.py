"""Batches: every example once, little padding, the same ones for the same seed and epoch."""

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch

from pipeline.batch import make_batch, unpack
from pipeline.dataset import RnaExample, open_examples
from pipeline.packing import pack, padding_share, plan_by_tokens, plan_epoch, split_batch
from pipeline.paths import Paths
from tests.pipeline import tiny


@pytest.fixture
def lengths(rng) -> np.ndarray:
    return rng.integers(20, 207, 5001)


def plan(
    lengths: np.ndarray, *, seed: int = 1, epoch: int = 0, batch_size: int = 32, bucket: int = 64
) -> list[np.ndarray]:
    return plan_epoch(lengths, batch_size=batch_size, bucket=bucket, seed=seed, epoch=epoch)


@pytest.mark.parametrize("bucket", [0, 1, 7, 64, 10_000])
@pytest.mark.parametrize("batch_size", [1, 32, 6000])
def test_every_example_comes_once_an_epoch(lengths, bucket, batch_size):
    batches = plan(lengths, bucket=bucket, batch_size=batch_size)
    np.testing.assert_array_equal(np.sort(np.concatenate(batches)), np.arange(len(lengths)))
    assert max(map(len, batches)) <= batch_size
    assert len(batches) == -(-len(lengths) // batch_size)


def test_batches_are_of_equal_size_but_for_one(lengths):
    sizes = set(map(len, plan(lengths)))
    assert max(sizes) - min(sizes) <= 1


def test_a_plan_is_a_function_of_seed_and_epoch(lengths):
    def flat(**where: int) -> list[int]:
        return np.concatenate(plan(lengths, **where)).tolist()

    assert flat(seed=3, epoch=5) == flat(seed=3, epoch=5)
    assert flat(seed=3, epoch=5) != flat(seed=3, epoch=6)
    assert flat(seed=3, epoch=5) != flat(seed=4, epoch=5)


def test_buckets_waste_less_than_a_tenth_on_padding(lengths):
    assert padding_share(lengths, plan(lengths)) < 0.1 < padding_share(lengths, plan(lengths, bucket=0))


def test_lengths_come_in_random_order(lengths):
    means = [lengths[batch].mean() for batch in plan(lengths)]
    assert abs(np.corrcoef(np.arange(len(means)), means)[0, 1]) < 0.25


@pytest.mark.shared
def test_the_real_profiles_waste_less_than_a_tenth_on_padding(shared_data):
    table = shared_data("stanford-ribonanza-rna-folding") / "train_data.parquet"
    real = np.array([len(text) for text in pq.read_table(table, columns=["sequence"])["sequence"].to_pylist()])
    share = padding_share(real, plan(real, batch_size=64))
    assert share < 0.1, share


def test_batches_by_tokens_stay_within_them_longest_first(lengths):
    batches = plan_by_tokens(lengths, max_tokens=2000)
    np.testing.assert_array_equal(np.sort(np.concatenate(batches)), np.arange(len(lengths)))
    assert all(len(batch) * lengths[batch].max() <= 2000 for batch in batches)
    longest = [lengths[batch].max() for batch in batches]
    assert longest == sorted(longest, reverse=True)


def test_batches_by_pairs_stay_within_the_square_and_within_their_tokens(lengths):
    batches = plan_by_tokens(lengths, max_tokens=1000, max_pairs=100_000)
    np.testing.assert_array_equal(np.sort(np.concatenate(batches)), np.arange(len(lengths)))
    assert all(len(batch) * lengths[batch].max() ** 2 <= 100_000 for batch in batches)
    assert all(len(batch) * lengths[batch].max() <= 1000 for batch in batches)


def test_a_sequence_longer_than_the_limit_comes_alone():
    assert [batch.tolist() for batch in plan_by_tokens(np.array([5, 900, 5]), max_tokens=10)] == [[1], [0, 2]]


@pytest.mark.parametrize(
    ("size", "micro", "parts"), [(32, 16, [16, 16]), (32, 0, [32]), (7, 3, [3, 2, 2]), (2, 9, [2])]
)
def test_a_batch_splits_into_nearly_equal_parts(size, micro, parts):
    split = split_batch(np.arange(size), micro_batch=micro)
    assert [len(part) for part in split] == parts
    np.testing.assert_array_equal(np.concatenate(split), np.arange(size))


def test_a_collated_batch_holds_every_example_and_nothing_else(tmp_path):
    paths = Paths(comp="tiny", root=tmp_path)
    texts = tiny.write_values(paths)
    dense = tiny.write_bpp(paths, texts)
    examples = open_examples(tiny.TINY, paths=paths, table="train", bpp=True)
    chosen = np.array([5, 1, 30])
    batch = make_batch(examples, chosen).to(torch.device("cpu"))
    longest = max(len(texts[k]) for k in chosen)
    assert batch.inputs.tokens_BL.shape == (3, longest)
    assert batch.inputs.tokens_BL.dtype == torch.int64
    assert batch.inputs.mask_BL.dtype == torch.bool
    for b, k in enumerate(chosen):
        size, example = len(texts[k]), examples.example(k)
        assert batch.ids[b] == example.id
        assert batch.inputs.mask_BL[b].tolist() == [True] * size + [False] * (longest - size)
        np.testing.assert_array_equal(batch.inputs.tokens_BL[b, :size], example.tokens_L)
        np.testing.assert_array_equal(batch.target_BLC[b, :size], example.target_LC)
        assert torch.isnan(batch.target_BLC[b, size:]).all()
        expected = np.zeros((longest, longest), dtype=np.float32)
        expected[:size, :size] = dense[texts[k]]
        np.testing.assert_array_equal(batch.inputs.bpp_BLL[b], expected)


def test_a_batch_without_targets_or_pairs_has_none():
    packed = pack([RnaExample("a", np.zeros(4, dtype=np.uint8)), RnaExample("b", np.ones(2, dtype=np.uint8))])
    batch = unpack(packed)
    assert (batch.target_BLC, batch.weight_BC, batch.inputs.bpp_BLL) == (None, None, None)
    assert batch.to(torch.device("cpu")) is batch
