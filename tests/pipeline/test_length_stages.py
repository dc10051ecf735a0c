"""Short crops first: which epoch sees which length, at the same steps and batches, wherever a run was interrupted."""

import contextlib

import numpy as np
import pytest

from pipeline.competitions import get_competition
from pipeline.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from pipeline.dataset import open_examples
from pipeline.errors import ConfigError, StoppedError
from pipeline.training.loader import BatchSource, Place
from pipeline.training.settings import refuse_idle
from tests.pipeline import tiny

STAGES = "6x1,12x2"


def config(stages: str = STAGES, **settings) -> RunConfig:
    return tiny.config(length_stages=stages, data={"max_length": 30}, **{"epochs": 4, **settings})


def test_stages_follow_one_another_and_then_the_whole_length():
    assert [config().longest(epoch) for epoch in range(5)] == [6, 12, 12, 30, 30]
    assert [config("64x1").longest(epoch) for epoch in range(2)] == [30, 30]
    assert config("").longest(0) == 30


@pytest.mark.parametrize("stages", ["64", "64x", "x1", "64x0", "0x1", "64x1,", "64x1;128x1", "64x1 128x1", "64x1.5"])
def test_stages_that_make_no_sense_are_refused(stages):
    with pytest.raises(ConfigError, match=r"length_stages: got .* Next: write '64x1,128x2'"):
        TrainConfig(length_stages=stages)


def test_every_stage_has_the_batches_of_the_whole_length_in_shorter_crops(paths):
    examples, train = open_examples(tiny.TINY, paths=paths, table="train"), np.arange(1, 64, 2)
    source = BatchSource(examples, train, config=config())
    for epoch, longest in enumerate([6, 12, 12, 30]):
        batches = [source(Place(epoch, batch, 0))[0] for batch in range(source.batches)]
        ids = [name for batch in batches for name in batch.ids]
        lengths = np.concatenate([batch.lengths_B for batch in batches])
        assert [len(batch.ids) for batch in batches] == [8] * 4
        assert sorted(ids) == [f"s{k:04d}" for k in train]
        expected = {
            name.decode(): min(int(length), longest)
            for name, length in zip(examples.ids_N, examples.lengths, strict=True)
        }
        assert lengths.tolist() == [expected[name] for name in ids]
        assert sum(source.tokens(Place(epoch, batch, 0)) for batch in range(source.batches)) == lengths.sum()


def test_stages_change_neither_validation_nor_the_number_of_steps(paths):
    """A structure's validation is cropped to the longest training length, which the stages leave as it is."""
    examples = open_examples(tiny.TINY, paths=paths, table="train")
    short, whole = (BatchSource(examples, np.arange(1, 64, 2), config=config(stages)) for stages in ("6x9", ""))
    assert short.batches == whole.batches
    np.testing.assert_array_equal(short.lengths_N, whole.lengths_N)


def test_a_run_stopped_after_every_step_goes_on_in_its_stage_and_ends_with_the_same_bits(paths, monkeypatch):
    seen, count = list[tuple[int, int]](), BatchSource.tokens

    def told(source: BatchSource, place: Place) -> int:
        seen.append((place.epoch, count(source, place)))
        return seen[-1][1]

    monkeypatch.setattr(BatchSource, "tokens", told)
    tiny.fit(paths, config())
    whole, _ = seen.copy(), seen.clear()
    for _ in range(17):  # the last one validates
        with contextlib.suppress(StoppedError):
            tiny.fit(paths, config(), run="again.sim80_k2", max_steps=1)
    assert tiny.final_bytes(paths, "again.sim80_k2") == tiny.final_bytes(paths)
    assert seen == whole
    assert whole[:12] == [(0, 8 * 6)] * 4 + [(1, 8 * 12)] * 4 + [(2, 8 * 12)] * 4  # all are longer than 12 nt
    assert min(tokens for _, tokens in whole[12:]) > 8 * 12


def test_the_stages_of_a_run_that_was_begun_cannot_be_changed(paths):
    tiny.fit(paths, config())
    with pytest.raises(ConfigError, match=r"length_stages 6x1,12x2 -> 6x2"):
        tiny.fit(paths, config("6x2"), allow_changes=True)


def test_windows_around_a_site_are_not_cropped_anywhere():
    settings = RunConfig(
        model=ModelConfig(name="tiny"), data=DataConfig(crop=41), train=TrainConfig(length_stages="9x1")
    )
    with pytest.raises(ConfigError, match=r"crops anywhere, and \[data\] crop = 41 keeps the middle alone.* Next: "):
        refuse_idle(settings, get_competition("labelled"))


def test_the_work_until_a_step_is_what_the_batches_hold(paths):
    """The time left went by steps: short crops promised a third of it."""
    examples = open_examples(tiny.TINY, paths=paths, table="train")
    source = BatchSource(examples, np.arange(1, 64, 2), config=config())
    for epoch in range(4):
        held = sum(source.tokens(Place(epoch, batch, 0)) for batch in range(source.batches))
        first = epoch * source.batches
        assert source.read_until(first + source.batches) - source.read_until(first) == held
        assert source.read_until(first + 1) - source.read_until(first) == held / source.batches


def test_stages_that_outlast_the_run_are_warned_of(paths, capsys):
    tiny.fit(paths, config("6x1,12x9", epochs=2))
    assert "last longer than train.epochs = 2: nothing trains on more than 12 nt" in capsys.readouterr().err


@pytest.mark.parametrize("stages", ["6x1", "6x1,512x9"])
def test_stages_that_reach_the_whole_length_are_not(paths, capsys, stages):
    tiny.fit(paths, config(stages, epochs=2))
    assert "last longer" not in capsys.readouterr().err


def test_the_stage_is_said(paths, capsys):
    tiny.fit(paths, config(epochs=1))
    assert "epoch 1 in crops of 6 nt (6x1,12x2)" in capsys.readouterr().err
