"""The loader's benchmark measures what training does."""

import numpy as np
import pytest

from pipeline import bench_loader
from pipeline.packing import read_packed
from pipeline.paths import Paths
from tests.pipeline import tiny


@pytest.mark.parametrize("bpp", [False, True])
def test_made_up_arrays_are_read_like_real_ones(tmp_path, bpp):
    examples = bench_loader.make_examples(tmp_path / "arrays", sequences=300, bpp=bpp, length=20)
    packed = read_packed(examples, np.arange(5))
    assert packed.tokens_BL.shape == (5, 20)
    assert (packed.pairs_3K is not None) == bpp
    assert bench_loader.tokens_per_second(examples, workers=0, batches=2) > 0


def test_padding_is_that_of_the_clean_table(tmp_path):
    paths = Paths(comp="tiny", root=tmp_path)
    assert bench_loader.real_padding(paths) is None
    tiny.write_values(paths, count=300)
    found = bench_loader.real_padding(paths)
    assert found["sequences"] == 300
    assert found["share_by_bucket"]["64"] < 0.1 < found["share_by_bucket"]["0"]
