"""Superposition: rigid motions are undone, reflections are not."""

import numpy as np
import pytest

from submissions.superpose import rmsd, superpose


def _rotation(rng: np.random.Generator) -> np.ndarray:
    q, r = np.linalg.qr(rng.standard_normal((3, 3)))
    q *= np.sign(np.diag(r))
    return q * np.sign(np.linalg.det(q))


def test_a_rigid_motion_is_undone(rng: np.random.Generator) -> None:
    trace = 20 * rng.standard_normal((30, 3))
    assert np.allclose(superpose(trace @ _rotation(rng) + 100.0, trace), trace, atol=1e-9)


def test_a_mirror_image_is_not_undone(rng: np.random.Generator) -> None:
    trace = 20 * rng.standard_normal((30, 3))
    assert rmsd(trace * [1.0, 1.0, -1.0], trace) > 5.0


def test_points_in_a_plane_are_rotated_not_reflected(rng: np.random.Generator) -> None:
    flat = np.concatenate([20 * rng.standard_normal((12, 2)), np.zeros((12, 1))], axis=1)
    moved = superpose(flat @ _rotation(rng), flat)
    assert np.allclose(moved, flat, atol=1e-9)


def test_a_batch_is_superposed_one_by_one(rng: np.random.Generator) -> None:
    fixed = rng.standard_normal((4, 9, 3))
    mobile = rng.standard_normal((4, 9, 3))
    alone = np.stack([superpose(a, b) for a, b in zip(mobile, fixed, strict=True)])
    assert np.allclose(superpose(mobile, fixed), alone)


def test_missing_points_have_no_say(rng: np.random.Generator) -> None:
    trace = rng.standard_normal((10, 3))
    mobile, fixed = trace @ _rotation(rng) + 3.0, trace.copy()
    mobile[2], fixed[7] = np.nan, np.nan
    moved = superpose(mobile, fixed)
    kept = np.arange(10) != 2
    assert np.allclose(moved[kept], trace[kept])
    assert np.isnan(moved[2]).all()
    assert rmsd(mobile, fixed) < 1e-9


def test_no_other_rotation_comes_closer(rng: np.random.Generator) -> None:
    mobile, fixed = rng.standard_normal((2, 15, 3))
    best = rmsd(mobile, fixed)
    centred = mobile - mobile.mean(axis=0), fixed - fixed.mean(axis=0)
    for _ in range(200):
        other = np.sqrt(np.mean(np.sum((centred[0] @ _rotation(rng) - centred[1]) ** 2, axis=1)))
        assert other >= best - 1e-9


def test_two_points_are_refused() -> None:
    points = np.array([[0.0, 0.0, 0.0], [1.0, 0.0, 0.0], [np.nan] * 3])
    with pytest.raises(ValueError, match="2 points in common; expected at least 3"):
        superpose(points, points)


def test_unequal_shapes_are_refused() -> None:
    with pytest.raises(ValueError, match=r"got \(4, 3\) and \(5, 3\)"):
        superpose(np.zeros((4, 3)), np.zeros((5, 3)))
