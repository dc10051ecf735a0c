"""Learning rate at chosen points, which parameters decay, the moving average, clipping."""

import math

import pytest
import torch
from torch import nn

from pipeline.config import TrainConfig
from pipeline.training.optim import (
    Ema,
    clip_gradients,
    decay_groups,
    gradients,
    learning_rate,
    make_optimizer,
    total_norm,
)


def rate(update: int, schedule: str, *, total: int = 101, warmup: float = 0.1) -> float:
    return learning_rate(update, TrainConfig(lr=2.0, warmup=warmup, schedule=schedule), total=total)


def test_one_cycle_starts_at_a_25th_peaks_after_the_warm_up_and_ends_at_a_thousandth():
    assert rate(0, "one_cycle") == pytest.approx(2.0 / 25)
    assert rate(10, "one_cycle") == pytest.approx(2.0)
    assert rate(55, "one_cycle") == pytest.approx((2.0 + 0.002) / 2)
    assert rate(100, "one_cycle") == pytest.approx(0.002)


def rates_of(scheduler: torch.optim.lr_scheduler.LRScheduler, *, updates: int) -> list[float]:
    found = []
    for _ in range(updates):
        found += scheduler.get_last_lr()
        scheduler.optimizer.step()
        scheduler.step()
    return found


def test_between_its_ends_one_cycle_is_torchs_own():
    """Lines in place of both cosines passed: beginning, top, middle and end are the same."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    options = {"pct_start": 11 / 102, "div_factor": 25, "final_div_factor": 40, "cycle_momentum": False}
    theirs = torch.optim.lr_scheduler.OneCycleLR(optimizer, 2.0, total_steps=102, **options)
    assert [rate(k, "one_cycle", total=102) for k in range(101)] == pytest.approx(rates_of(theirs, updates=101))


def test_cosine_rises_on_a_line_and_falls_on_a_cosine():
    assert [rate(k, "cosine") for k in (0, 4, 9, 10)] == pytest.approx([0.2, 1.0, 2.0, 2.0])
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=2.0)
    theirs = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=90, eta_min=0.002)
    assert [rate(k, "cosine") for k in range(10, 101)] == pytest.approx(rates_of(theirs, updates=91))


@pytest.mark.parametrize("warmup", [0.0, 0.1])
def test_a_run_of_three_updates_warms_up_in_one(warmup):
    told = {name: [rate(k, name, total=3, warmup=warmup) for k in range(3)] for name in ("one_cycle", "cosine")}
    assert told["one_cycle"] == pytest.approx([2.0 / 25, 2.0, 0.002])
    assert told["cosine"] == pytest.approx([2.0, 2.0, 0.002])


def test_constant_stays():
    assert {rate(k, "constant") for k in range(101)} == {2.0}


@pytest.mark.parametrize("schedule", ["one_cycle", "cosine"])
@pytest.mark.parametrize(("total", "warmup"), [(1, 0.1), (2, 0.5), (7, 0.0), (50, 1.0), (1000, 0.3)])
def test_every_rate_is_positive_and_none_exceeds_the_top(schedule, total, warmup):
    rates = [rate(k, schedule, total=total, warmup=warmup) for k in range(total + 3)]
    assert all(0 < value <= 2.0 for value in rates)
    peak = rates.index(max(rates))
    assert rates[:peak] == sorted(rates[:peak])
    assert rates[peak:] == sorted(rates[peak:], reverse=True)


class Mixed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 3)
        self.linear = nn.Linear(3, 3)
        self.norm = nn.LayerNorm(3)
        self.a_log = nn.Parameter(torch.ones(3, 2))
        self.a_log._no_weight_decay = True
        self.frozen = nn.Parameter(torch.ones(2, 2), requires_grad=False)


def test_only_matrices_that_do_not_object_decay():
    model = Mixed()
    decaying, kept = decay_groups(model, weight_decay=0.1)
    assert [id(p) for p in decaying["params"]] == [id(model.linear.weight)]
    assert {id(p) for p in kept["params"]} == {
        id(p) for p in (model.embedding.weight, model.linear.bias, *model.norm.parameters(), model.a_log)
    }
    assert (decaying["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)


def test_without_gradient_only_decaying_parameters_shrink():
    model = Mixed()
    optimizer = make_optimizer(model, lr=0.1, weight_decay=0.5)
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    changed = {name for name, parameter in model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {"linear.weight"}


def test_the_average_follows_the_closed_form():
    model = nn.Linear(1, 1, bias=False)
    nn.init.zeros_(model.weight)
    ema, expected = Ema(model, decay=0.9), 0.0
    for n in range(200):
        nn.init.constant_(model.weight, float(n))
        ema.update(updates=n)
        decay = min(0.9, (1 + n) / (10 + n))
        expected = decay * expected + (1 - decay) * n
        assert float(ema.module.weight.detach()) == pytest.approx(expected, rel=1e-5), n


def test_the_average_copies_buffers_and_neither_trains_nor_drops_out():
    model = nn.Sequential(nn.BatchNorm1d(2), nn.Dropout(0.5))
    ema = Ema(model, decay=0.9)
    model(torch.randn(8, 2))
    ema.update(updates=0)
    assert ema.module[0].num_batches_tracked == 1
    assert not ema.module.training
    assert not any(parameter.requires_grad for parameter in ema.module.parameters())


def test_recurrent_weights_of_the_average_are_put_together_as_a_gpu_wants_them(monkeypatch):
    model, put = nn.Sequential(nn.Linear(2, 4), nn.GRU(4, 3)), list[nn.Module]()
    monkeypatch.setattr(nn.RNNBase, "flatten_parameters", lambda part: put.append(part))
    ema = Ema(model, decay=0.9)
    assert put == [ema.module[1]]


def test_clipping_scales_a_large_gradient_and_leaves_a_small_one():
    model = nn.Linear(4, 1)
    model(torch.full((1, 4), 10.0)).sum().backward()
    found = gradients(model.parameters())
    norm = total_norm(found)
    assert norm == pytest.approx(math.sqrt(4 * 100 + 1))
    clip_gradients(found, norm=norm, clip_norm=0.0)
    assert total_norm(gradients(model.parameters())) == pytest.approx(norm)
    clip_gradients(found, norm=norm, clip_norm=1.0)
    assert total_norm(gradients(model.parameters())) == pytest.approx(1.0, rel=1e-4)
    clip_gradients(found, norm=1.0, clip_norm=5.0)
    assert total_norm(gradients(model.parameters())) == pytest.approx(1.0, rel=1e-4)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_one_bad_value_makes_the_norm_bad(bad):
    good, spoilt = torch.ones(3), torch.tensor([1.0, bad])
    assert math.isfinite(total_norm([good]))
    assert not math.isfinite(total_norm([good, spoilt]))
