"""Losses: what counts, what does not, and that parts add up to the whole."""

import math
import re
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn.functional import log_softmax

from models.interface import RnaInputs, RnaOutputs
from pipeline.batch import RnaBatch
from pipeline.competitions import get_competition
from pipeline.config import ModelConfig, RunConfig, TrainConfig, config_from_dict, load_config
from pipeline.errors import ConfigError
from pipeline.paths import Paths
from pipeline.train import build_model
from pipeline.training import traces
from pipeline.training.checkpoint import load_weights
from pipeline.training.losses import (
    MaskedError,
    StructureLoss,
    profile_weights,
    relative_weights,
    training_loss,
)
from pipeline.training.resume import require_same
from pipeline.training.settings import refuse_idle
from tests.pipeline import tiny


@pytest.fixture
def generator() -> torch.Generator:
    return torch.Generator().manual_seed(3)


def value_batch(generator: torch.Generator, lengths: list[int]) -> RnaBatch:
    size, longest = len(lengths), max(lengths)
    mask_BL = torch.arange(longest) < torch.tensor(lengths).unsqueeze(1)
    target_BLC = torch.randn(size, longest, 2, generator=generator)
    target_BLC[:, :2] = math.nan
    target_BLC[~mask_BL] = math.nan
    weight_BC = torch.rand(size, 2, generator=generator) + 0.1
    return RnaBatch(
        tuple("abcdefgh"[:size]), RnaInputs(torch.zeros_like(mask_BL).long(), mask_BL), target_BLC, weight_BC
    )


def rows(batch: RnaBatch, where: slice) -> RnaBatch:
    inputs = RnaInputs(batch.inputs.tokens_BL[where], batch.inputs.mask_BL[where])
    return RnaBatch(batch.ids[where], inputs, batch.target_BLC[where], batch.weight_BC[where])


@pytest.mark.parametrize("power", [1, 2])
def test_the_loss_is_the_weighted_mean_error_on_clipped_targets(generator, power):
    batch = value_batch(generator, [9, 5])
    predicted_BLC = torch.randn(2, 9, 2, generator=generator)
    total = weight = 0.0
    for b, length in enumerate([9, 5]):
        for k in range(2, length):
            for c in range(2):
                target = min(max(float(batch.target_BLC[b, k, c]), 0.0), 1.0)
                total += float(batch.weight_BC[b, c]) * abs(float(predicted_BLC[b, k, c]) - target) ** power
                weight += float(batch.weight_BC[b, c])
    loss = MaskedError((0.0, 1.0), power)
    assert float(loss.total(RnaOutputs(predicted_BLC), batch)) == pytest.approx(total, rel=1e-5)
    assert loss.weight(batch) == pytest.approx(weight, rel=1e-6)


def test_two_halves_give_loss_and_gradient_of_the_whole(generator):
    batch = value_batch(generator, [9, 3, 7, 4])
    predicted_BLC = torch.randn(4, 9, 2, generator=generator, requires_grad=True)
    loss = MaskedError((0.0, 1.0))
    whole = loss.total(RnaOutputs(predicted_BLC), batch) / loss.weight(batch)
    (expected,) = torch.autograd.grad(whole, predicted_BLC)
    halves = [slice(0, 2), slice(2, 4)]
    weight = sum(loss.weight(rows(batch, half)) for half in halves)
    parts = sum(loss.total(RnaOutputs(predicted_BLC[half]), rows(batch, half)) / weight for half in halves)
    (ours,) = torch.autograd.grad(parts, predicted_BLC)
    torch.testing.assert_close(parts, whole)
    torch.testing.assert_close(ours, expected)


def test_unmeasured_and_padded_positions_have_neither_loss_nor_gradient(generator):
    batch = value_batch(generator, [9, 5])
    predicted_BLC = torch.randn(2, 9, 2, generator=generator, requires_grad=True)
    loss = MaskedError((0.0, 1.0))
    total = loss.total(RnaOutputs(predicted_BLC), batch)
    (grad_BLC,) = torch.autograd.grad(total, predicted_BLC)
    silent_BLC = torch.isnan(batch.target_BLC)
    assert (grad_BLC[silent_BLC] == 0).all()
    assert (grad_BLC[~silent_BLC] != 0).all()
    moved = torch.where(silent_BLC, 1e6, predicted_BLC)
    assert loss.total(RnaOutputs(moved), batch) == total


def test_a_prediction_beyond_the_range_keeps_a_gradient_back():
    batch = RnaBatch(
        ("a",),
        RnaInputs(torch.zeros(1, 2).long(), torch.ones(1, 2, dtype=torch.bool)),
        torch.tensor([[[3.0], [-2.0]]]),
        torch.ones(1, 1),
    )
    predicted_BLC = torch.tensor([[[2.0], [-1.0]]], requires_grad=True)
    total = MaskedError((0.0, 1.0)).total(RnaOutputs(predicted_BLC), batch)
    (grad_BLC,) = torch.autograd.grad(total, predicted_BLC)
    assert total == 2.0
    assert grad_BLC.flatten().tolist() == [1.0, -1.0]


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("place", [(0, 4), (0, 0)], ids=["measured", "unmeasured"])
def test_a_bad_prediction_at_a_real_nucleotide_is_seen(generator, bad, place):
    batch = value_batch(generator, [9, 5])
    predicted_BLC = torch.zeros(2, 9, 2)
    predicted_BLC[*place, 1] = bad
    assert not torch.isfinite(MaskedError((0.0, 1.0)).total(RnaOutputs(predicted_BLC), batch))


def test_a_bad_prediction_under_the_padding_harms_nobody(generator):
    batch = value_batch(generator, [9, 5])
    predicted_BLC = torch.zeros(2, 9, 2, requires_grad=True)
    poisoned = torch.where(batch.inputs.mask_BL.unsqueeze(-1), predicted_BLC, math.nan)
    total = MaskedError((0.0, 1.0)).total(RnaOutputs(poisoned), batch)
    (grad_BLC,) = torch.autograd.grad(total, predicted_BLC)
    assert torch.isfinite(total)
    assert torch.isfinite(grad_BLC).all()


def test_a_batch_without_any_measurement_weighs_nothing(generator):
    batch = value_batch(generator, [9, 5])
    batch.target_BLC.fill_(math.nan)
    loss = MaskedError((0.0, 1.0))
    assert loss.weight(batch) == 0
    assert loss.total(RnaOutputs(torch.ones(2, 9, 2)), batch) == 0


def test_profile_weights_follow_signal_to_noise():
    noise_NC = np.array([[np.nan, -1.0], [0.5, 1.0], [3.0, 100.0]], dtype=np.float32)
    logged = profile_weights(noise_NC, weighting="log1p_sn", minimum=1.0)
    np.testing.assert_allclose(logged, [[0, 0], [0, np.log(2)], [np.log(4), np.log(101)]], rtol=1e-6)
    uniform = profile_weights(noise_NC, weighting="uniform", minimum=-np.inf)
    np.testing.assert_array_equal(uniform, [[0, 1], [1, 1], [1, 1]])


LOSS = StructureLoss(frame_weight=1.0, tm_weight=0.5, confidence_weight=0.1, max_pairs=0)


def structure_batch() -> RnaBatch:
    xyz_BL3 = torch.full((2, 12, 3), math.nan)
    for b, length in enumerate([12, 6]):
        xyz_BL3[b, :length] = torch.from_numpy(tiny.helix(length)).float()
    xyz_BL3[0, 3] = math.nan
    mask_BL = torch.arange(12) < torch.tensor([[12], [6]])
    return RnaBatch(("a", "b"), RnaInputs(torch.zeros(2, 12).long(), mask_BL), xyz_BL3, torch.ones(2, 3))


def test_distance_loss_is_the_mean_over_resolved_pairs_then_over_structures(generator):
    batch = structure_batch()
    logits_BLLK = torch.randn(2, 12, 12, 8, generator=generator)
    expected = 0.0
    for xyz_L3, logits_LLK in zip(batch.target_BLC, logits_BLLK, strict=True):
        terms = []
        for i in range(12):
            for j in range(i + 1, 12):
                distance = float((xyz_L3[i] - xyz_L3[j]).norm())
                if not math.isnan(distance):
                    terms.append(-float(log_softmax(logits_LLK[i, j], 0)[tiny.nearest_bin(distance, num_bins=8)]))
        expected += sum(terms) / len(terms)
    total = LOSS.total(RnaOutputs(distance_logits_BLLK=logits_BLLK), batch)
    assert float(total) == pytest.approx(expected, rel=1e-5)
    assert LOSS.weight(batch) == 2


def test_a_sample_of_pairs_estimates_the_loss_of_all(generator):
    batch = structure_batch()
    outputs = RnaOutputs(distance_logits_BLLK=torch.randn(2, 12, 12, 8, generator=generator))
    torch.manual_seed(0)
    sampled = [float(replace(LOSS, max_pairs=10).total(outputs, batch)) for _ in range(600)]
    whole = float(LOSS.total(outputs, batch))
    # logits are not symmetric here, so that the sample also sees (j, i): the mean over both triangles
    turned = RnaOutputs(distance_logits_BLLK=outputs.distance_logits_BLLK.transpose(1, 2))
    both = (whole + float(LOSS.total(turned, batch))) / 2
    assert np.mean(sampled) == pytest.approx(both, rel=0.03)


def test_a_structure_without_two_resolved_nucleotides_counts_nothing(generator):
    batch, outputs = structure_batch(), structure_outputs(generator)
    batch.target_BLC[1, 2:] = math.nan
    pair = LOSS.terms(outputs, batch)
    assert LOSS.weight(batch) == 2, "a single pair teaches"
    batch.target_BLC[1, 1:] = math.nan
    logits_BLLK = torch.zeros(2, 12, 12, 8, requires_grad=True)
    LOSS.total(RnaOutputs(distance_logits_BLLK=logits_BLLK), batch).backward()
    assert LOSS.weight(batch) == 1
    assert not logits_BLLK.grad[1].any()
    alone = LOSS.terms(outputs, batch)
    assert all(getattr(alone, name) < getattr(pair, name) for name in ("distance", "tm", "confidence"))


# --- coordinates ---


def structure_outputs(generator: torch.Generator, *, noise: float = 3.0) -> RnaOutputs:
    """Coordinates near the truth, the rest by chance."""
    batch = structure_batch()
    clean_BL3 = torch.stack([torch.from_numpy(tiny.helix(12)).float()] * 2)
    logits_BLLK = torch.randn(2, 12, 12, 8, generator=generator)
    return RnaOutputs(
        distance_logits_BLLK=logits_BLLK + logits_BLLK.transpose(1, 2),
        c1_xyz_BL3=(clean_BL3 + noise * torch.randn(2, 12, 3, generator=generator)) * batch.inputs.mask_BL[..., None],
        lddt_logits_BLK=torch.randn(2, 12, 5, generator=generator),
    )


def structure_rows(outputs: RnaOutputs, where: slice) -> RnaOutputs:
    return RnaOutputs(*(None if output is None else output[where] for output in outputs))


def with_gradients(outputs: RnaOutputs) -> RnaOutputs:
    return RnaOutputs(*(None if output is None else output.requires_grad_() for output in outputs))


def gradients_of(total: torch.Tensor, outputs: RnaOutputs) -> list[torch.Tensor]:
    return list(torch.autograd.grad(total, [output for output in outputs if output is not None]))


def test_a_structures_loss_is_the_weighted_sum_of_its_terms(generator):
    batch, outputs = structure_batch(), structure_outputs(generator)
    terms = LOSS.terms(outputs, batch)
    frame = sum(float(traces.frame_error(outputs.c1_xyz_BL3[b], batch.target_BLC[b])) for b in range(2))
    assert terms.distance == LOSS.total(RnaOutputs(distance_logits_BLLK=outputs.distance_logits_BLLK), batch)
    assert float(terms.frame) == pytest.approx(frame, rel=1e-5)
    expected = float(terms.distance) + frame + 0.5 * float(terms.tm) + 0.1 * float(terms.confidence)
    assert float(LOSS.total(outputs, batch)) == pytest.approx(expected, rel=1e-5)
    assert LOSS.weight(batch) == 2


def test_right_coordinates_cost_nothing_and_their_mirror_image_does(generator):
    batch, outputs = structure_batch(), structure_outputs(generator, noise=0.0)
    mirrored = outputs._replace(c1_xyz_BL3=outputs.c1_xyz_BL3 * torch.tensor([1.0, -1.0, 1.0]))
    right, wrong = LOSS.terms(outputs, batch), LOSS.terms(mirrored, batch)
    assert max(float(right.frame), float(right.tm)) < 1e-4
    assert min(float(wrong.frame), float(wrong.tm)) > 0.1
    assert wrong.confidence == right.confidence  # of distances, which a mirror keeps


def test_confidence_is_the_cross_entropy_of_the_bin_of_the_lddt(generator):
    batch, outputs = structure_batch(), structure_outputs(generator)
    expected = 0.0
    for b in range(2):
        lddt_L = traces.lddt(outputs.c1_xyz_BL3[b], batch.target_BLC[b])
        log_LK = log_softmax(outputs.lddt_logits_BLK[b], -1)
        terms = [-float(log_LK[i, min(int(lddt_L[i] * 5), 4)]) for i in range(12) if not math.isnan(lddt_L[i])]
        expected += sum(terms) / len(terms)
    assert float(LOSS.terms(outputs, batch).confidence) == pytest.approx(expected, rel=1e-5)


def test_the_halves_of_a_batch_of_structures_add_up_to_it(generator):
    batch, outputs = structure_batch(), with_gradients(structure_outputs(generator))
    whole = LOSS.total(outputs, batch) / LOSS.weight(batch)
    halves = [slice(0, 1), slice(1, 2)]
    weight = sum(LOSS.weight(rows(batch, half)) for half in halves)
    parts = sum(LOSS.total(structure_rows(outputs, half), rows(batch, half)) / weight for half in halves)
    torch.testing.assert_close(parts, whole)
    for ours, expected in zip(gradients_of(parts, outputs), gradients_of(whole, outputs), strict=True):
        torch.testing.assert_close(ours, expected)


def test_the_padding_of_a_structure_has_no_say(generator):
    batch, outputs = structure_batch(), structure_outputs(generator)
    alone = RnaBatch(
        ("b",),
        RnaInputs(*(x[1:, :6] for x in batch.inputs[:2])),
        batch.target_BLC[1:, :6],
        batch.weight_BC[1:],
    )
    cut = RnaOutputs(
        distance_logits_BLLK=outputs.distance_logits_BLLK[1:, :6, :6],
        c1_xyz_BL3=outputs.c1_xyz_BL3[1:, :6],
        lddt_logits_BLK=outputs.lddt_logits_BLK[1:, :6],
    )
    padded = LOSS.total(structure_rows(outputs, slice(1, 2)), rows(batch, slice(1, 2)))
    torch.testing.assert_close(LOSS.total(cut, alone), padded)


def test_a_structure_of_which_nothing_is_resolved_has_no_loss_and_no_gradient(generator):
    batch, outputs = structure_batch(), with_gradients(structure_outputs(generator))
    batch.target_BLC[1] = math.nan
    total = LOSS.total(outputs, batch)
    assert LOSS.weight(batch) == 1
    assert all(not gradient[1].any() and gradient[0].any() for gradient in gradients_of(total, outputs))
    batch.target_BLC[0] = math.nan
    assert LOSS.weight(batch) == 0
    assert LOSS.total(outputs, batch) == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_structures_loss_and_gradients_are_those_of_float32_under_autocast(generator, dtype):
    batch, outputs = structure_batch(), with_gradients(structure_outputs(generator))
    expected = LOSS.total(outputs, batch)
    with torch.autocast("cpu", dtype=dtype):
        total = LOSS.total(outputs, batch)
    assert total.dtype == torch.float32
    assert total == expected
    for ours, wanted in zip(gradients_of(total, outputs), gradients_of(expected, outputs), strict=True):
        assert ours.isfinite().all()
        torch.testing.assert_close(ours, wanted)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_coordinate_that_is_not_finite_is_seen(generator, bad):
    batch, outputs = structure_batch(), structure_outputs(generator)
    outputs.c1_xyz_BL3[0, 6, 1] = bad
    assert not torch.isfinite(LOSS.total(outputs, batch))


# --- weights of targets ----------------------------------------------------------------------------------------------


def test_the_loss_is_the_stated_sum_over_targets(generator):
    batch = value_batch(generator, [9, 5, 7])
    batch.target_BLC[1, :, 0] = math.nan  # of this molecule the first was not measured: there it counts for nothing
    predicted_BLC = torch.randn(3, 9, 2, generator=generator)
    alone = []
    for c in range(2):
        one = batch._replace(target_BLC=batch.target_BLC[..., [c]], weight_BC=batch.weight_BC[:, [c]])
        loss = MaskedError((0.0, 1.0))
        alone.append((loss.total(RnaOutputs(predicted_BLC[..., [c]]), one), loss.weight(one)))
    loss = MaskedError((0.0, 1.0), target_weights=relative_weights({"a": 0.3, "b": 0.6}, ("a", "b")))
    torch.testing.assert_close(loss.total(RnaOutputs(predicted_BLC), batch), 0.5 * alone[0][0] + alone[1][0])
    assert loss.weight(batch) == pytest.approx(0.5 * alone[0][1] + alone[1][1])


@pytest.mark.parametrize("weight", [1, 0.1, 3.0])
def test_equal_weights_of_all_targets_change_no_bit(generator, weight):
    batch, predicted_BLC = value_batch(generator, [9, 5]), torch.randn(2, 9, 2, generator=generator)
    plain = MaskedError((0.0, 1.0))
    equal = MaskedError((0.0, 1.0), target_weights=relative_weights({"a": weight, "b": weight}, ("a", "b")))
    assert torch.equal(equal.total(RnaOutputs(predicted_BLC), batch), plain.total(RnaOutputs(predicted_BLC), batch))
    assert equal.weight(batch) == plain.weight(batch)


def test_a_target_that_weighs_nothing_has_no_gradient_and_no_say(generator):
    batch = value_batch(generator, [9, 5])
    predicted_BLC = torch.randn(2, 9, 2, generator=generator, requires_grad=True)
    loss = MaskedError((0.0, 1.0), target_weights=relative_weights({"b": 0}, ("a", "b")))
    total = loss.total(RnaOutputs(predicted_BLC), batch)
    (gradient_BLC,) = torch.autograd.grad(total, predicted_BLC)
    assert (gradient_BLC[..., 1] == 0).all()
    assert (gradient_BLC[..., 0] != 0).any()
    other = batch._replace(target_BLC=batch.target_BLC.clone())
    other.target_BLC[..., 1] += 1.0
    assert torch.equal(loss.total(RnaOutputs(predicted_BLC), other), total)
    poisoned = predicted_BLC.detach().clone()
    poisoned[0, 3, 1] = math.nan
    assert loss.total(RnaOutputs(poisoned), batch).isnan(), "it is predicted all the same"


def test_a_run_with_equal_weights_ends_with_the_same_bits_and_one_without_a_target_leaves_its_head_alone(
    tmp_path, monkeypatch
):
    tiny.register(monkeypatch)
    paths = Paths(comp="tiny", root=tmp_path)
    tiny.write_values(paths)
    first, second = tiny.TARGETS

    def train_with(run: str, **weights: float) -> dict[str, torch.Tensor]:
        settings = tiny.config(epochs=1, weight_decay=0.0, ema_decay=0.0, target_weights=weights)
        checkpoint = tiny.fit(paths, settings, run=f"{run}.{tiny.SPLIT}").outputs["checkpoint"]
        return load_weights(checkpoint)

    train_with("plain")
    train_with("equal", **{first: 7, second: 7})
    assert tiny.final_bytes(paths, f"equal.{tiny.SPLIT}") == tiny.final_bytes(paths, f"plain.{tiny.SPLIT}")
    torch.manual_seed(tiny.config().train.seed)
    begun = dict(build_model(tiny.config().model, tiny.TINY).state_dict())
    trained = train_with("one", **{second: 0})
    (head,) = [name for name, tensor in trained.items() if tensor.ndim == 2 and len(tensor) == 2]
    assert torch.equal(trained[head][1], begun[head][1])
    assert not torch.equal(trained[head][0], begun[head][0])


def test_a_run_goes_on_from_before_targets_had_weights_and_not_with_others():
    now = asdict(tiny.config())
    before = {**now, "train": {key: value for key, value in now["train"].items() if key != "target_weights"}}
    assert config_from_dict(before, where="a checkpoint") == tiny.config()
    assert require_same({"config": now}, {"config": before}, where=Path("run"), defaults={"config": now}) == []
    changed = asdict(tiny.config(target_weights={tiny.TARGETS[1]: 0.5}))
    with pytest.raises(ConfigError, match=r"config.train.target_weights.reactivity_2A3_MaP \(absent\) -> 0.5"):
        require_same({"config": changed}, {"config": before}, where=Path("run"), allow_changes=True)


@pytest.mark.parametrize(
    ("comp", "weights", "told"),
    [
        ("openvaccine", {"deg_MgpH10": 1.0}, "openvaccine has no target 'deg_MgpH10'. Next: write one of reactivity, "),
        ("ribonanza", {name: 0 for name in tiny.TARGETS}, "leaves nothing to learn; expected two or more targets, one"),
        ("rna3d", {"x": 1.0}, "target_weights = {'x': 1.0} means nothing where structures are predicted"),
        ("labelled", {"x": 1.0}, "target_weights = {'x': 1.0} means nothing where classes are predicted"),
    ],
)
def test_weights_that_would_have_no_effect_or_leave_nothing_are_refused(comp, weights, told):
    config = RunConfig(model=ModelConfig(name="hyena"), train=TrainConfig(target_weights=weights))
    with pytest.raises(ConfigError, match=re.escape(told)):
        refuse_idle(config, get_competition(comp))


def test_the_weight_of_an_only_target_is_refused():
    profiles = replace(get_competition("profiles"), targets=("shape",), target_range=(0.0, 2.0))
    config = RunConfig(model=ModelConfig(name="hyena"), train=TrainConfig(target_weights={"shape": 0.5}))
    with pytest.raises(ConfigError, match=r"shape = 0.5 weighs the only target; expected two or more targets"):
        refuse_idle(config, profiles)


@pytest.mark.parametrize("weight", ["-1", "nan", "inf", "true", '"1"'])
def test_a_weight_that_is_no_finite_number_of_at_least_0_is_refused(weight):
    with pytest.raises(ConfigError, match=r"target_weights: x = .*; expected a finite number of at least 0. Next: "):
        load_config("small_drsn", [f"train.target_weights.x={weight}"])


def test_the_loss_follows_the_task_and_its_settings():
    settings = tiny.config(frame_weight=2.0, tm_weight=0.0, confidence_weight=0.5).train
    assert training_loss(tiny.TINY, settings) == MaskedError((0.0, 1.0))
    assert training_loss(tiny.TINY3D, settings) == StructureLoss(2.0, 0.0, 0.5)
    settings = tiny.config(target_weights={tiny.TARGETS[0]: 4.0}).train
    assert training_loss(tiny.TINY, settings) == MaskedError((0.0, 1.0), target_weights=(1.0, 0.25))
