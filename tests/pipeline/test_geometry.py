"""Superposition: rigid motions are undone, reflections are not."""

import numpy as np

from pipeline.structure.geometry import Frame, rmsd, rotation_onto


def _rotation(rng: np.random.Generator) -> np.ndarray:
    q, r = np.linalg.qr(rng.standard_normal((3, 3)))
    q *= np.sign(np.diag(r))
    return q * np.sign(np.linalg.det(q))


def test_a_rigid_motion_is_undone(rng: np.random.Generator) -> None:
    trace = 20 * rng.standard_normal((30, 3))
    moved = trace @ _rotation(rng) + 100.0
    assert np.allclose(Frame.fitted(moved, trace).place(moved), trace, atol=1e-9)
    assert rmsd(moved, trace) < 1e-9


def test_a_mirror_image_is_not_undone(rng: np.random.Generator) -> None:
    trace = 20 * rng.standard_normal((30, 3))
    assert rmsd(trace * [1.0, 1.0, -1.0], trace) > 5.0


def test_points_in_a_plane_are_rotated_not_reflected(rng: np.random.Generator) -> None:
    flat = np.concatenate([20 * rng.standard_normal((12, 2)), np.zeros((12, 1))], axis=1)
    turned = flat @ _rotation(rng)
    frame = Frame.fitted(turned, flat)
    assert np.allclose(frame.place(turned), flat, atol=1e-9)
    assert np.isclose(np.linalg.det(frame.axes), 1.0)


def test_several_sets_are_superposed_one_by_one(rng: np.random.Generator) -> None:
    mobile, fixed = rng.standard_normal((2, 4, 9, 3))
    alone = np.stack([rotation_onto(a, b) for a, b in zip(mobile, fixed, strict=True)])
    assert np.allclose(rotation_onto(mobile, fixed), alone)


def test_no_other_rotation_comes_closer(rng: np.random.Generator) -> None:
    mobile, fixed = rng.standard_normal((2, 15, 3))
    best = rmsd(mobile, fixed)
    centred = mobile - mobile.mean(axis=0), fixed - fixed.mean(axis=0)
    for _ in range(200):
        other = np.sqrt(np.mean(np.sum((centred[0] @ _rotation(rng) - centred[1]) ** 2, axis=1)))
        assert other >= best - 1e-9
