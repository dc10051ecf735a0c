"""Two processes train what one trains, whatever is predicted: classes (one, or several), structures."""

from dataclasses import replace

import numpy as np
import pytest

from pipeline import preprocess
from pipeline.competitions import get_competition
from pipeline.paths import Paths
from tests.pipeline import labelled_sets, tiny
from tests.pipeline.ranks import Scene, codes, fixtures, losses, rows

pytestmark = pytest.mark.slow
#: Weighted classes: a batch of one process and the parts of two have other sums of weights.
SETTINGS = ["model.kwargs.dropout=0.0", "train.epochs=2", "train.batch_size=6", "data.length_bucket=2"]
SET = {
    "labelled": [*SETTINGS, "train.class_balance=0.9"],
    "labelled-several": [*SETTINGS, "train.focal_gamma=1.0"],
    "tiny3d": SETTINGS,
}
SCENES: list[Scene] = [
    (f"{comp} {size}", size, {"of": comp, "set": settings}, None) for comp, settings in SET.items() for size in (1, 2)
]

written, ended = fixtures(SCENES)


@pytest.fixture(scope="module")
def paths(written: Paths, tmp_path_factory: pytest.TempPathFactory) -> Paths:
    """With tables of classes and of structures beside those of values."""
    table = labelled_sets.planted(np.random.default_rng(7), count=36)
    several = table.with_columns(table["label"].replace_strict({"one": "a;b", "two": "b"}).alias("label"))
    for comp, each in (("labelled", table), ("labelled-several", several)):
        raw, of_set = tmp_path_factory.mktemp(comp), replace(written, comp=comp)
        each.write_csv(raw / "train.csv")
        preprocess.run(get_competition(comp), raw, of_set)
        labelled_sets.write_folds(of_set)
    tiny.write_structures(replace(written, comp="tiny3d"), count=24)
    return written


@pytest.mark.parametrize("comp", SET)
def test_two_processes_give_the_losses_and_the_metric_of_one(paths, ended, comp):
    """Shown by hand alone, before: the tests knew values."""
    assert codes(ended(f"{comp} 1") + ended(f"{comp} 2")) == [[0], [0, 0]]
    of_set = replace(paths, comp=comp)
    alone, both = (losses(of_set, f"{comp} {size}") for size in (1, 2))
    assert len(alone) >= 4
    assert alone[0] != alone[-1], "it learns"
    np.testing.assert_allclose(both, alone, atol=2e-5)
    metrics = [[row["metric"] for row in rows(of_set, f"{comp} {size}", "epoch")] for size in (1, 2)]
    np.testing.assert_allclose(*metrics, atol=2e-5)
