"""The guard tells apart what went wrong and names where it began."""

import json
import math

import pytest
import torch
from torch import Tensor, nn

from pipeline.training.guard import GuardCounts, classify, decide, find_origin, nonfinite_parameters


@pytest.mark.parametrize(
    ("loss", "norm", "scale", "expected"),
    [
        (0.3, 1.0, None, "finite"),
        (0.3, 1.0, 65536.0, "finite"),
        (0.3, math.inf, 65536.0, "scaler_overflow"),
        (0.3, math.nan, 2.0, "scaler_overflow"),
        (0.3, math.inf, 1.0, "nonfinite_grad"),
        (0.3, math.nan, None, "nonfinite_grad"),
        (math.nan, math.nan, None, "nonfinite_loss"),
        (math.inf, math.nan, 65536.0, "nonfinite_loss"),
    ],
)
def test_loss_gradient_and_scale_tell_what_happened(loss, norm, scale, expected):
    assert classify(loss, norm, scale=scale) == expected


def test_bad_batches_are_skipped_until_too_many_come_in_a_row():
    counts = GuardCounts()
    seen = ["nonfinite_loss", "nonfinite_grad", "finite", "nonfinite_loss", "nonfinite_loss", "nonfinite_loss"]
    answers = [decide(one, counts, max_skips=2) for one in seen]
    assert answers == ["skip", "skip", "go", "skip", "skip", "roll_back"]
    assert counts == GuardCounts(skips=4, skips_in_a_row=3)


def test_an_overflow_of_the_scaler_raises_no_alarm():
    counts = GuardCounts()
    assert [decide("scaler_overflow", counts, max_skips=0) for _ in range(20)] == ["skip"] * 20
    assert counts == GuardCounts(overflows=20)


def test_bad_weights_roll_back_at_once():
    assert decide("nonfinite_weights", GuardCounts(), max_skips=99) == "roll_back"


class Log(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return torch.log(x)


class Root(nn.Module):
    """sqrt: finite at 0, its gradient is not."""

    def forward(self, x: Tensor) -> Tensor:
        return torch.sqrt(x)


def network(middle: nn.Module) -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 3), nn.Sequential(nn.ReLU(), middle), nn.Linear(3, 1))


def test_the_first_bad_forward_is_named_with_what_came_before():
    model = network(Log())
    origin = find_origin(model, lambda: model(torch.full((2, 3), -1e3)))
    assert (origin.phase, origin.module) == ("forward", "1.1")
    assert [one.module for one in origin.activations] == ["0", "1.0", "1.1"]
    assert origin.describe() == "first in the forward of 1.1"


def test_a_bad_backward_is_named_by_the_module_that_made_it():
    model = network(Root())
    nn.init.constant_(model[0].bias, -1e3)

    def replay() -> None:
        model(torch.zeros(2, 3)).sum().backward()

    origin = find_origin(model, replay)
    assert (origin.phase, origin.module) == ("backward", "1.1")


class BadWeightGradient(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        return x + torch.sqrt(self.weight)


def test_a_gradient_that_breaks_on_its_way_to_a_parameter_is_named_by_it():
    model = network(BadWeightGradient())
    origin = find_origin(model, lambda: model(torch.ones(2, 3)).sum().backward())
    assert (origin.phase, origin.module) == ("backward", "1.1.weight")


def test_a_residual_branch_is_named_not_its_block():
    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm, self.branch = nn.Identity(), Root()

        def forward(self, x: Tensor) -> Tensor:
            return x + self.branch(self.norm(x) * 0.0)

    model = network(Block())
    origin = find_origin(model, lambda: model(torch.ones(2, 3)).sum().backward())
    assert (origin.phase, origin.module) == ("backward", "1.1.branch")


def test_a_row_of_the_log_is_json():
    origin = find_origin(network(Log()), lambda: None)
    assert json.dumps(origin.as_row(), allow_nan=False)
    model = network(Log())
    row = find_origin(model, lambda: model(torch.full((2, 3), -1e3))).as_row()
    assert json.loads(json.dumps(row, allow_nan=False))["activations"][-1] == ["1.1", "inf"]


def test_bad_weights_are_named_without_a_replay():
    model = network(nn.Identity())
    with torch.no_grad():
        model[2].weight[0, 1] = math.inf
    origin = find_origin(model, lambda: pytest.fail("replayed"))
    assert (origin.phase, origin.module) == ("weights", "2.weight")
    assert nonfinite_parameters(model) == ["2.weight"]


def test_a_replay_that_is_fine_says_so():
    model = network(nn.Identity())
    origin = find_origin(model, lambda: model(torch.ones(2, 3)).sum().backward())
    assert origin.phase == "unknown"
    assert origin.describe() == "not seen again in a replay"


def test_observation_leaves_no_hooks():
    def fails() -> None:
        raise ValueError("bad batch")

    model = network(nn.Identity())
    find_origin(model, lambda: model(torch.ones(2, 3)))
    with pytest.raises(ValueError, match="bad batch"):
        find_origin(model, fails)
    for module in model.modules():
        assert not {**module._forward_pre_hooks, **module._forward_hooks, **module._backward_hooks}


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_activations_are_described_in_their_own_precision(dtype):
    model = nn.Identity()
    x = torch.tensor([3.0, -4.0, 0.0, 0.0], dtype=dtype)
    (one,) = find_origin(model, lambda: model(x)).activations
    assert (one.module, one.largest, one.rms, one.nonfinite) == ("Identity", 4.0, 2.5, 0)
    assert one.dtype == str(dtype).removeprefix("torch.")
    x[1], x[2], x[3] = -math.inf, math.nan, math.nan
    (one,) = find_origin(model, lambda: model(x)).activations
    assert math.isnan(one.largest)
    assert one.nonfinite == 3


def test_of_several_outputs_the_largest_value_of_all_is_told():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.places = Places()  # whose output has no statistics

        def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
            self.places(x)
            return x, 10.0 * x

    class Places(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return x.argsort()

    model = Two()
    origin = find_origin(model, lambda: model(torch.tensor([3.0, -4.0])))
    assert origin.as_row() == {"phase": "unknown", "module": "", "activations": [["Two", 40.0]]}
