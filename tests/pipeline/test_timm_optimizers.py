"""`train.optimizer`: timm's optimisers where timm is installed, and our side of them everywhere."""

import importlib.util
import sys
from types import ModuleType

import pytest
import torch

from pipeline.config import load_config
from pipeline.errors import ConfigError, StoppedError
from pipeline.training.optim import make_optimizer
from tests.pipeline import tiny
from tests.pipeline.tiny import fit

needs_timm = pytest.mark.skipif(importlib.util.find_spec("timm") is None, reason="timm is not installed")
WHOLE = f"whole.{tiny.SPLIT}"


class Momentum(torch.optim.Optimizer):
    """As some of timm's do, it counts its steps in Python and keeps lists."""

    def __init__(self, groups: list[dict], lr: float, weight_decay: float) -> None:
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is None
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    state = self.state[parameter]
                    moment = state.setdefault("moment", torch.zeros_like(parameter))
                    state["step"] = state.get("step", 0) + 1
                    state["seen"] = [*state.get("seen", []), float(group["lr"])]
                    moment.mul_(0.9).add_(parameter.grad)
                    parameter.mul_(1 - group["lr"] * group["weight_decay"]).sub_(moment, alpha=group["lr"])


@pytest.fixture
def timm(monkeypatch) -> None:
    """A package with the two functions that we call."""
    package, optim = ModuleType("timm"), ModuleType("timm.optim")
    optim.list_optimizers = lambda: ["adahessian", "bnblion", "fusedlamb", "momentum", "nadamw"]
    optim.create_optimizer_v2 = lambda groups, *, opt, lr, weight_decay: {"momentum": Momentum}[opt](
        groups, lr, weight_decay
    )
    monkeypatch.setitem(sys.modules, "timm", package)
    monkeypatch.setitem(sys.modules, "timm.optim", optim)


def check_that_a_stopped_run_ends_as_a_whole_one(paths, optimizer: str) -> None:
    config = tiny.config(optimizer=optimizer, lr=1e-3)
    fit(paths, config, run=WHOLE)
    with pytest.raises(StoppedError):
        fit(paths, config, max_steps=5)
    fit(paths, config)
    newest = [tiny.CheckpointStore(paths.fold_dir(run, 0) / "checkpoints").load_newest() for run in (tiny.RUN, WHOLE)]
    assert [checkpoint.meta["progress"]["updates"] for checkpoint in newest] == [12, 12]
    for weights in ("weights", "training"):
        ours, theirs = (getattr(checkpoint, weights) for checkpoint in newest)
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


def test_what_an_optimiser_keeps_besides_tensors_survives_a_resume(paths, timm):
    check_that_a_stopped_run_ends_as_a_whole_one(paths, "momentum")
    last = tiny.CheckpointStore(paths.fold_dir(tiny.RUN, 0) / "checkpoints").load_newest()
    found = next(iter(last.state["optimizer"]["state"].values()))
    assert found["step"] == len(found["seen"]) == 12


def test_an_unknown_name_is_met_with_the_closest_known_ones(timm):
    model = tiny.TinyModel()
    with pytest.raises(ConfigError, match=r"optimizer: got 'momentun'; .* Next: optimizer = 'momentum'"):
        make_optimizer(model, lr=1e-3, weight_decay=0, name="momentun")
    for unfit in ("adahessian", "bnblion", "fusedlamb"):
        with pytest.raises(ConfigError, match=f"got '{unfit}'; expected"):
            make_optimizer(model, lr=1e-3, weight_decay=0, name=unfit)


@pytest.mark.parametrize("weight_decay", [0.1, 0.0])
def test_vectors_and_embeddings_never_get_the_steps_of_muons_kin(timm, weight_decay):
    """Without weight decay they were told from matrices no more, which then got AdamW's steps too."""
    optimizer = make_optimizer(tiny.TinyModel(), lr=1e-3, weight_decay=weight_decay, name="momentum")
    assert {group["use_fallback"]: {p.ndim for p in group["params"]} for group in optimizer.param_groups} == {
        False: {2, 3},  # linear layers and the convolution
        True: {1, 2},  # biases and the embedding
    }


def test_without_timm_its_optimisers_are_refused_in_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "timm.optim", None)
    with pytest.raises(ConfigError, match=r"got 'lion'; .* cannot be imported \(.*\)\. Next: pip install timm"):
        make_optimizer(tiny.TinyModel(), lr=1e-3, weight_decay=0, name="lion")
    assert make_optimizer(tiny.TinyModel(), lr=1e-3, weight_decay=0, name="muon")


def test_parts_of_a_network_know_adamw_alone():
    with pytest.raises(ConfigError, match="with sharding = 'fsdp2', which knows 'adamw' alone"):
        load_config("small_hyena", ["train.optimizer='muon'", "train.sharding='fsdp2'"])


@needs_timm
@pytest.mark.parametrize("name", ["nadamw", "nmuon", "nadamuon", "lion", "adopt", "lamb", "laprop", "madgradw"])
def test_a_run_with_one_of_timms_is_resumed_bit_for_bit(paths, name):
    check_that_a_stopped_run_ends_as_a_whole_one(paths, name)


@needs_timm
@pytest.mark.filterwarnings("ignore:.*opt_einsum")  # advice of kron's
def test_every_name_that_is_not_refused_makes_an_optimiser():
    from timm.optim import list_optimizers

    model, refused = tiny.TinyModel(), []
    for name in list_optimizers():
        try:
            optimizer = make_optimizer(model, lr=1e-3, weight_decay=0.1, name=name)
        except ConfigError:
            refused.append(name)
        else:
            assert sum(len(group["params"]) for group in optimizer.param_groups) == len(list(model.parameters()))
    assert all(name == "adahessian" or name.startswith(("bnb", "fused")) for name in refused), refused
