"""Two processes train what one trains, whatever is predicted: classes (one, or several), numbers, structures."""

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pipeline import predict, preprocess, train
from pipeline.competitions import get_competition
from pipeline.config import load_config
from pipeline.paths import Paths
from tests.pipeline import labelled_sets, tiny
from tests.pipeline.ranks import Scene, codes, fixtures, losses, rows

pytestmark = pytest.mark.slow
#: Weighted classes, numbers with gaps: a batch of one process and the parts of two have other sums of weights.
OF_MODEL = ["model.kwargs.dropout=0.0", "model.kwargs.depth=1"]
SETTINGS = [*OF_MODEL, "train.epochs=2", "train.batch_size=6", "data.length_bucket=2"]
TEACHER = f"teacher.{tiny.SPLIT}"
SET = {
    "labelled": [*SETTINGS, "train.class_balance=0.9"],
    "labelled-several": [*SETTINGS, "train.focal_gamma=1.0"],
    "labelled-numbers": SETTINGS,
    "tiny3d": SETTINGS,
    "tiny": [*SETTINGS, f'data.pseudo="{TEACHER}"'],
}
SCENES: list[Scene] = [
    (f"{comp} {size}", size, {"of": comp, "set": settings}, None) for comp, settings in SET.items() for size in (1, 2)
]

written, ended = fixtures(SCENES)


@pytest.fixture(scope="module")
def paths(written: Paths, tmp_path_factory: pytest.TempPathFactory) -> Paths:
    """With tables of classes and of structures beside those of values, and a network whose predictions teach."""
    table = labelled_sets.planted(np.random.default_rng(7), count=36)
    several = table.with_columns(table["label"].replace_strict({"one": "a;b", "two": "b"}).alias("label"))
    numbers = labelled_sets.measured(np.random.default_rng(7), count=36)
    for comp, each in (("labelled", table), ("labelled-several", several), ("labelled-numbers", numbers)):
        raw, of_set = tmp_path_factory.mktemp(comp), replace(written, comp=comp)
        each.write_csv(raw / "train.csv")
        if each is numbers:
            (raw / "columns.toml").write_text("numbers = ['gc', 'tail']")
        preprocess.run(get_competition(comp), raw, of_set)
        labelled_sets.write_folds(of_set)
    tiny.write_structures(replace(written, comp="tiny3d"), count=24)
    of_run: dict[str, Any] = {"competition": tiny.TINY, "paths": written, "run": TEACHER, "fold": 0}
    train.run(load_config("tiny_hyena", ["train.epochs=1"]), split=tiny.SPLIT, **of_run)
    predict.run(which=["test"], **of_run)
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
