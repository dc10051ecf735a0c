"""The search for the best superposition: its motions are the best ones, its score is that of the motion it returns."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numba.core.dispatcher import Dispatcher

from pipeline.structure.geometry import Frame, rmsd
from submissions import align, seed_search, tm_score
from submissions.seed_search import LANES, MOTION, SUMS, _larger, _remember, best_motions, pair_terms, search


def _columns(xyz_L3: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray((xyz_L3 - xyz_L3.mean(axis=0)).T, dtype=np.float32)


def _moved(motion: np.ndarray, columns: np.ndarray) -> np.ndarray:
    return (motion[:9].reshape(3, 3) @ columns + motion[9:, None]).T


def _set_of(kind: str, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    mobile, fixed = 15.0 * rng.standard_normal((2, 12, 3))
    if kind == "near":
        fixed = mobile @ np.linalg.qr(rng.standard_normal((3, 3)))[0] + 0.1 * fixed
    elif kind == "flat":
        mobile[:, 2] = 0.0
    elif kind == "line":
        mobile = np.arange(12.0)[:, None] * np.array([1.0, 2.0, 3.0])
    elif kind == "point":
        mobile[:] = 0.0
    return _columns(mobile), _columns(fixed)


@pytest.mark.parametrize("kind", ["any", "near", "flat", "line", "point"])
def test_every_lane_gets_the_best_rotation(kind: str, rng: np.random.Generator) -> None:
    sets = [_set_of(kind, rng) for _ in range(LANES)]
    sums = np.stack([pair_terms(*each).sum(axis=0) for each in sets], axis=1)
    motions = np.empty(MOTION * LANES)
    best_motions(sums.ravel(), np.empty(4 * LANES), motions)
    assert sums.shape == (SUMS, LANES)
    for lane, (mobile, fixed) in enumerate(sets):
        motion = motions.reshape(MOTION, LANES)[:, lane]
        assert np.linalg.det(motion[:9].reshape(3, 3)) == pytest.approx(1.0)
        apart = np.sqrt(((_moved(motion, mobile) - fixed.T) ** 2).sum(axis=1).mean())
        assert apart == pytest.approx(rmsd(mobile.T, fixed.T), abs=1e-4)


@pytest.mark.parametrize("count", [5, 16, 33, 512, 513, 1301])
@pytest.mark.parametrize("farthest", [9.0, np.inf])
def test_the_score_is_that_of_the_motion(count: int, farthest: float, rng: np.random.Generator) -> None:
    mobile = np.cumsum(3.0 * rng.standard_normal((count, 3)), axis=0)
    other = mobile[::-1] + 2.0
    fixed = Frame.fitted(other, mobile).place(other)
    fixed[: count // 2] = mobile[: count // 2] + rng.standard_normal((count // 2, 3))
    mobile, fixed, motion = _columns(mobile), _columns(fixed), np.empty(MOTION)
    score = search(mobile, fixed, 4.0, 5.0, farthest, 40, motion)
    apart = ((_moved(motion, mobile) - fixed.T) ** 2).sum(axis=1)
    assert score == pytest.approx(np.sum((1.0 / (1.0 + apart / 16.0))[apart <= farthest**2]), rel=1e-3)
    assert score > 0.8 * (count // 2)


def test_a_larger_table_knows_the_same_names(rng: np.random.Generator) -> None:
    names = rng.integers(1, 2**63, 400).astype(np.uint64)
    seen = np.zeros(1024, dtype=np.uint64)
    assert all(_remember(seen, name) for name in names)
    larger = _larger(seen)
    assert len(larger) == 2048
    assert not any(_remember(table, name) for table in (seen, larger) for name in names)


def test_more_seeds_than_the_first_table_has_names_for_find_no_less(rng: np.random.Generator) -> None:
    mobile, fixed = (_columns(20.0 * rng.standard_normal((400, 3))) for _ in range(2))
    scores = [search(mobile, fixed, 3.0, 4.5, np.inf, step, np.empty(MOTION)) for step in (1, 40)]
    assert scores[0] >= scores[1] - 1e-3


_SCORES = """
import numpy as np
from submissions.tm_score import tm_scores
rng = np.random.default_rng(0)
natives = [np.cumsum(3.0 * rng.standard_normal((length, 3)), axis=0) for length in range(20, 60)]
print(tm_scores([(native + 6.0 * rng.standard_normal(native.shape), native) for native in natives]).tobytes().hex())
"""


def test_compiled_and_loaded_code_give_the_same_bits(tmp_path: Path) -> None:
    """Half of the scores differed: two of 1,783 sequence-independent ones by 9e-4, residue-matched ones by 2e-7."""
    environment = os.environ | {"NUMBA_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", _SCORES]
    said = [subprocess.run(command, env=environment, capture_output=True, check=True).stdout for _ in range(2)]
    assert list(tmp_path.rglob("*.nbc"))
    assert said[0] == said[1]


@pytest.mark.parametrize("module", [align, seed_search, tm_score])
def test_the_compiler_has_no_freedom_to_round(module) -> None:
    """With it, digits depend on where a function is inlined."""
    compiled = [each for each in vars(module).values() if isinstance(each, Dispatcher)]
    assert compiled
    assert not any(each.targetoptions.get("fastmath") for each in compiled)
