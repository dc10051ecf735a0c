"""Validation metrics are sums over the whole epoch, whatever the batches were."""

import math
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
import torch

from models.interface import RnaInputs, RnaOutputs
from pipeline.batch import RnaBatch
from pipeline.competitions import get_competition
from pipeline.config import TrainConfig
from pipeline.errors import DivergedError
from pipeline.labels import Numbers
from pipeline.training import traces
from pipeline.training.metrics import make_meter
from tests.pipeline import tiny


def batch_of(target_BLC: torch.Tensor) -> RnaBatch:
    mask_BL = torch.ones(target_BLC.shape[:2], dtype=torch.bool)
    return RnaBatch(("a",) * len(target_BLC), RnaInputs(mask_BL.long(), mask_BL), target_BLC)


@pytest.fixture
def truth() -> torch.Tensor:
    target_BLC = torch.rand(10, 7, 2, generator=torch.Generator().manual_seed(1)) * 2 - 0.5
    target_BLC[:4, :3] = math.nan
    return target_BLC


def test_uneven_batches_give_the_metric_of_one_batch(truth):
    predicted = truth.nan_to_num(0.3) + torch.linspace(0, 0.5, 10)[:, None, None]
    results = []
    for edges in ([0, 10], [0, 1, 9, 10]):
        meter = make_meter(tiny.TINY, TrainConfig())
        for start, stop in pairwise(edges):
            meter.add(RnaOutputs(predicted[start:stop]), batch_of(truth[start:stop]))
        results.append(meter.result())
    assert results[0] == pytest.approx(results[1])
    error = (predicted.clamp(0, 1) - truth.clamp(0, 1)).abs()
    assert results[0]["metric"] == pytest.approx(float(error.nanmean()), rel=1e-6)
    assert set(results[0]) == {"metric", "choice", *tiny.TARGETS}
    assert results[0]["choice"] == results[0]["metric"]


def test_a_target_called_metric_does_not_choose_the_epoch_alone(truth):
    """Of a set of one's own the metric was that target's error."""
    results = []
    for names in (tiny.TARGETS, ("metric", "step")):
        meter = make_meter(replace(tiny.TINY, targets=names), TrainConfig())
        predicted = truth.nan_to_num(0.3) + torch.tensor([0.0, 0.4])
        meter.add(RnaOutputs(predicted), batch_of(truth))
        results.append(meter.result()["metric"])
    assert results[0] == results[1] > 0


@pytest.mark.parametrize("unit", [1.0, 1000.0])
def test_no_unit_has_more_say_in_the_best_epoch_than_another(truth, unit):
    """Of two targets the one with the largest unit chose it: the second epoch here, whose first target is worse."""
    facts = {"targets": tiny.TARGETS, "metric": "MAE", "range": None, "signal_to_noise": False}
    facts["shown_ranges"] = [(0.0, 1.0)] * 2
    chosen, scale_C = [], torch.tensor([1.0, unit])
    for errors_C in ([0.1, 0.2], [0.4, 0.1]):
        units = Numbers.of_values(tiny.TARGETS, (truth * scale_C).reshape(-1, 2).numpy().T)
        meter = make_meter(replace(get_competition("profiles-x").with_facts(facts), units=units), TrainConfig())
        deviations = torch.tensor(units.deviations)
        said = (truth.nan_to_num(0.3) + torch.tensor(errors_C)) * scale_C
        meter.add(RnaOutputs(((said - torch.tensor(units.means)) / deviations).float()), batch_of(truth * scale_C))
        chosen.append(meter.result()["choice"])
        assert chosen[-1] == pytest.approx(float((torch.tensor(errors_C) * scale_C / deviations).mean()), rel=1e-4)
    assert chosen[0] < chosen[1]


def test_the_best_epoch_is_chosen_by_the_weights_of_those_numbers_that_were_measured():
    numbers = Numbers(("a", "b", "c"), (9, 9, 9), (5.0, 0.0, 1.0), (2.0, 100.0, 0.0), "ACGU")
    competition = get_competition("labelled-x").with_facts({"numbers": numbers.names})
    meter = make_meter(competition, TrainConfig(target_weights={"b": 3.0}), numbers)
    batch = RnaBatch(("s", "t"), batch_of(torch.zeros(2, 1, 1)).inputs, label_BC=torch.full((2, 3), math.nan).double())
    batch.label_BC[:, 0], batch.label_BC[0, 1] = torch.tensor([5.0, 7.0]), 80.0
    meter.add(RnaOutputs(class_logits_BC=torch.tensor([[0.5, 0.0, 7.0], [0.5, 9.0, 7.0]])), batch)
    assert meter.result()["a"] == pytest.approx(1.0)
    assert meter.result()["b"] == pytest.approx(80.0)
    assert math.isnan(meter.result()["c"])
    assert meter.result()["choice"] == pytest.approx((1.0 / 2.0 * 1 + 80.0 / 100.0 * 3) / 4)


def test_predictions_under_the_padding_do_not_count(truth):
    batch = batch_of(truth)
    batch.inputs.mask_BL[:, 5:] = False
    batch.target_BLC[:, 5:] = math.nan
    predicted = torch.zeros_like(truth)
    predicted[:, 5:] = math.nan
    meter = make_meter(tiny.TINY, TrainConfig())
    meter.add(RnaOutputs(predicted), batch)
    assert np.isfinite(meter.result()["metric"])


def test_a_prediction_that_is_not_finite_is_a_divergence_and_names_its_batch(truth):
    """Was: DataError (exit code 3) with the advice to predict again, in the middle of a training."""
    predicted = torch.zeros_like(truth)
    predicted[3, 2, 1] = math.inf
    with pytest.raises(DivergedError, match=r"validation: a prediction for .* is not finite. Next: .*train.lr"):
        make_meter(tiny.TINY, TrainConfig()).add(RnaOutputs(predicted), batch_of(truth))


@pytest.mark.parametrize("bad", ["distances", "coordinates"])
def test_a_structure_that_is_not_finite_is_a_divergence_too(bad):
    """Was: a metric of NaN, and with it "ValueError: Out of range float values are not JSON compliant"."""
    xyz_BL3 = torch.from_numpy(tiny.helix(9)).float().unsqueeze(0)
    outputs = RnaOutputs(None, torch.zeros(1, 9, 9, 8), None, xyz_BL3.clone(), torch.zeros(1, 9, 5))
    spoilt = outputs.distance_logits_BLLK if bad == "distances" else outputs.c1_xyz_BL3
    spoilt[0, 3] = math.nan
    with pytest.raises(DivergedError, match=r"validation: a prediction for .* is not finite. Next: .*train.lr"):
        make_meter(tiny.TINY3D, TrainConfig()).add(outputs, batch_of(xyz_BL3))


def test_the_structure_metric_is_the_loss_of_the_epoch_and_its_terms_stand_beside_it():
    xyz_BL3 = torch.from_numpy(np.stack([tiny.helix(9)] * 3)).float()
    moved_BL3 = xyz_BL3 * torch.tensor([1.0, 1.0, -1.0])
    meter = make_meter(tiny.TINY3D, TrainConfig(frame_weight=2.0, tm_weight=3.0, confidence_weight=0.5))
    for part in (slice(0, 1), slice(1, 3)):
        batch = batch_of(xyz_BL3[part])
        logits = torch.zeros(len(batch.ids), 9, 9, 8), torch.zeros(len(batch.ids), 9, 5)
        meter.add(RnaOutputs(None, logits[0], None, moved_BL3[part], logits[1]), batch)
    result = meter.result()
    frame = float(traces.frame_error(moved_BL3[0], xyz_BL3[0]))
    assert result["distance"] == pytest.approx(math.log(8))
    assert result["frame"] == pytest.approx(frame, rel=1e-5)
    assert result["tm"] == pytest.approx(1 - float(traces.soft_tm_score(moved_BL3[0], xyz_BL3[0])), rel=1e-5)
    assert result["confidence"] == pytest.approx(math.log(5))
    expected = math.log(8) + 2 * result["frame"] + 3 * result["tm"] + 0.5 * math.log(5)
    assert result["metric"] == pytest.approx(expected, rel=1e-5)
