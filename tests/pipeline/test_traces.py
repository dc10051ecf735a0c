"""Errors of C1' traces: nothing for the truth wherever it stands, something for its mirror image."""

import math

import numpy as np
import pytest
import torch
from scipy.spatial.transform import Rotation
from torch import Tensor

from pipeline.structure.assembly import trace_from_pairs
from pipeline.training import traces
from submissions.tm_score import tm_score


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def fold(length: int = 40) -> Tensor:
    """A hairpin: [L, 3] Å."""
    pairs = [(k, length - 1 - k) for k in range(length // 2 - 3)]
    return torch.from_numpy(trace_from_pairs(length, pairs, np.random.default_rng(2))).float()


def moved(xyz_L3: Tensor, generator: torch.Generator) -> Tensor:
    """Turned and shifted."""
    axes_33, _ = torch.linalg.qr(torch.randn(3, 3, generator=generator))
    return xyz_L3 @ (axes_33 * torch.det(axes_33).sign()) + 50 * torch.randn(3, generator=generator)


def noisy(xyz_L3: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    return xyz_L3 + noise * torch.randn(xyz_L3.shape, generator=generator)


def test_the_truth_has_no_error_wherever_it_stands(generator):
    true_L3 = fold()
    for predicted_L3 in (true_L3, moved(true_L3, generator)):
        assert float(traces.frame_error(predicted_L3, true_L3)) < 1e-4
        assert float(traces.soft_tm_score(predicted_L3, true_L3)) > 1 - 1e-5
        assert (traces.lddt(predicted_L3, true_L3) == 1).all()


def test_a_rigid_motion_changes_no_error(generator):
    true_L3 = fold()
    predicted_L3 = noisy(true_L3, 3.0, generator)
    for error in (traces.frame_error, traces.soft_tm_score, traces.lddt):
        expected = error(predicted_L3, true_L3)
        torch.testing.assert_close(error(moved(predicted_L3, generator), true_L3), expected, rtol=1e-3, atol=1e-3)
        torch.testing.assert_close(error(predicted_L3, moved(true_L3, generator)), expected, rtol=1e-3, atol=1e-3)


def test_a_mirror_image_costs_and_only_its_distances_are_right(generator):
    true_L3 = fold()
    mirrored_L3 = moved(true_L3, generator) * torch.tensor([1.0, 1.0, -1.0])
    assert float(traces.frame_error(mirrored_L3, true_L3)) > 0.3
    assert float(traces.soft_tm_score(mirrored_L3, true_L3)) < 0.5
    assert (traces.lddt(mirrored_L3, true_L3) == 1).all()


def test_descent_on_the_frames_turns_a_mirror_image_into_the_fold(generator):
    true_L3 = fold(16)
    predicted_L3 = (noisy(true_L3, 0.1, generator) * torch.tensor([1.0, 1.0, -1.0])).requires_grad_()
    optimizer = torch.optim.Adam([predicted_L3], lr=0.3)
    for _ in range(400):
        optimizer.zero_grad()
        traces.frame_error(predicted_L3, true_L3).backward()
        optimizer.step()
    assert float(traces.soft_tm_score(predicted_L3.detach(), true_L3)) > 0.9


@pytest.mark.parametrize("noise", [0.5, 4.0])
def test_the_frames_error_is_the_mean_distance_seen_from_each(generator, noise):
    """By loops over frames and nucleotides; laws alone did not tell a distance from a sum of coordinates."""
    true_L3, predicted_L3 = fold(14).double(), noisy(fold(14), noise, generator).double()
    true_L3[9] = math.nan

    def seen(xyz_L3: Tensor, k: int, r: int) -> Tensor:
        before, origin, after = xyz_L3[k - 1 : k + 2]
        along = (after - before) / (after - before).norm()
        out = (origin - before) - (origin - before).dot(along) * along
        out = out / out.norm()
        return torch.stack([along, out, torch.linalg.cross(along, out)]) @ (xyz_L3[r] - origin)

    frames = [k for k in range(1, 13) if k not in (8, 9, 10)]
    off = [seen(predicted_L3, k, r) - seen(true_L3, k, r) for k in frames for r in range(14) if r != 9]
    expected = np.mean([min(float(each.norm()), 10.0) for each in off]) / 10
    assert float(traces.frame_error(predicted_L3, true_L3)) == pytest.approx(expected, abs=2e-3)


@pytest.mark.parametrize("turn", [(1.0, 1.0, 1.0), (1.0, -1.0, 1.0)], ids=["", "mirrored"])
def test_the_soft_score_is_that_of_four_weighted_superpositions(generator, turn):
    true_L3 = fold(50).double()
    true_L3[[3, 20]] = math.nan
    predicted_L3 = moved(noisy(fold(50), 2.0, generator), generator).double() * torch.tensor(turn)
    there_L = ~true_L3.isnan().any(dim=1)
    mobile, fixed = predicted_L3[there_L].numpy(), true_L3[there_L].numpy()
    share = np.ones(48)
    for _ in range(4):
        mobile_mean, fixed_mean = (np.average(each, axis=0, weights=share**2) for each in (mobile, fixed))
        motion, _ = Rotation.align_vectors(fixed - fixed_mean, mobile - mobile_mean, weights=share**2)
        square = np.square(motion.apply(mobile - mobile_mean) - (fixed - fixed_mean)).sum(axis=1)
        share = 1 / (1 + square / (0.6 * math.sqrt(47.5) - 2.5) ** 2)
    assert float(traces.soft_tm_score(predicted_L3, true_L3)) == pytest.approx(share.mean(), abs=1e-9)


def test_more_noise_is_more_error(generator):
    true_L3 = fold()
    predicted = [noisy(true_L3, noise, generator) for noise in (0.3, 1.0, 3.0, 10.0)]
    frame = [float(traces.frame_error(one, true_L3)) for one in predicted]
    score = [float(traces.soft_tm_score(one, true_L3)) for one in predicted]
    kept = [float(traces.lddt(one, true_L3).mean()) for one in predicted]
    assert frame == sorted(frame)
    assert score == sorted(score, reverse=True)
    assert kept == sorted(kept, reverse=True)


def test_nothing_is_further_off_than_ten_angstrom(generator):
    assert float(traces.frame_error(1000 * torch.randn(40, 3, generator=generator), fold())) <= 1.0


@pytest.mark.parametrize("length", [46, 90])
@pytest.mark.parametrize("noise", [1.0, 3.0])
def test_the_soft_score_is_near_the_tm_score(generator, length, noise):
    """From 46 nt on, where its scale is that of the score."""
    true_L3 = fold(length)
    predicted_L3 = noisy(moved(true_L3, generator), noise, generator)
    ours = float(traces.soft_tm_score(predicted_L3, true_L3))
    assert ours == pytest.approx(tm_score(predicted_L3.numpy(), true_L3.numpy()), abs=0.01)


def test_a_nucleotide_far_off_does_not_spoil_the_superposition(generator):
    true_L3 = fold()
    predicted_L3 = moved(true_L3, generator)
    predicted_L3[0] += 200.0
    assert float(traces.soft_tm_score(predicted_L3, true_L3)) == pytest.approx(39 / 40, abs=0.01)


def test_lddt_is_the_share_of_near_distances_that_are_kept(generator):
    true_L3, tolerances = fold(20), (0.5, 1.0, 2.0, 4.0)
    true_L3[7] = math.nan
    predicted_L3 = noisy(fold(20), 1.5, generator)
    found_L = traces.lddt(predicted_L3, true_L3)
    for i in range(20):
        kept = []
        for j in range(20):
            before, now = float((true_L3[i] - true_L3[j]).norm()), float((predicted_L3[i] - predicted_L3[j]).norm())
            if i != j and before < 30:
                kept += [abs(before - now) < tolerance for tolerance in tolerances]
        assert float(found_L[i]) == pytest.approx(np.mean(kept)) if kept else math.isnan(found_L[i])


def test_unresolved_nucleotides_have_no_say_and_no_gradient(generator):
    true_L3 = fold()
    true_L3[[0, 9, 10, 39]] = math.nan
    predicted_L3 = noisy(fold(), 2.0, generator).requires_grad_()
    elsewhere_L3 = predicted_L3.detach().clone()
    elsewhere_L3[[0, 9, 10, 39]] += 100.0
    for error in (traces.frame_error, traces.soft_tm_score):
        value = error(predicted_L3, true_L3)
        (gradient_L3,) = torch.autograd.grad(value, predicted_L3)
        assert not gradient_L3[[0, 9, 10, 39]].any()
        assert gradient_L3.isfinite().all()
        torch.testing.assert_close(error(elsewhere_L3, true_L3), value)


def test_a_structure_without_three_nucleotides_in_a_row_has_no_frames():
    true_L3 = fold(12)
    true_L3[2::3] = math.nan
    predicted_L3 = torch.zeros(12, 3, requires_grad=True)
    error = traces.frame_error(predicted_L3, true_L3)
    error.backward()
    assert error == 0
    assert not predicted_L3.grad.any()


@pytest.mark.parametrize("predicted_L3", [fold(9), torch.zeros(9, 3), torch.arange(9)[:, None] * torch.ones(3)])
def test_gradients_are_finite_where_a_prediction_is_perfect_or_has_no_frames(predicted_L3):
    predicted_L3 = predicted_L3.clone().requires_grad_()
    (traces.frame_error(predicted_L3, fold(9)) - traces.soft_tm_score(predicted_L3, fold(9))).backward()
    assert predicted_L3.grad.isfinite().all()


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_prediction_that_is_not_finite_is_seen(bad):
    predicted_L3 = fold(9)
    predicted_L3[4, 1] = bad
    assert not traces.frame_error(predicted_L3, fold(9)).isfinite()
    assert not traces.soft_tm_score(predicted_L3, fold(9)).isfinite()
