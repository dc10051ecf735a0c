"""A network that begins with another's weights may learn more slowly, or not at all, below its new heads."""

import contextlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from models.heads import is_head
from models.registry import create_model, list_models
from pipeline.config import RunConfig
from pipeline.errors import ConfigError, StoppedError
from pipeline.paths import Paths
from pipeline.training.checkpoint import CheckpointStore, load_weights
from pipeline.training.optim import decay_groups, make_optimizer, set_learning_rate
from tests.models.cases import SMALL
from tests.pipeline import tiny

NEXT = f"next.{tiny.SPLIT}"


def weights(paths: Paths, run: str) -> dict[str, torch.Tensor]:
    last = CheckpointStore(paths.fold_dir(run, 0) / "checkpoints").load_newest()
    assert last is not None
    return last.training


def begun_by(paths: Paths, **train) -> RunConfig:
    """A configuration that begins with the weights of a finished run."""
    if not paths.run_dir(tiny.RUN).exists():
        tiny.fit(paths, tiny.config(epochs=1))
    checkpoint = CheckpointStore(paths.fold_dir(tiny.RUN, 0) / "checkpoints").best_folder()
    config = tiny.config(**{"epochs": 1, "ema_decay": 0.0, "schedule": "constant", "weight_decay": 0.0, **train})
    return replace(config, model=replace(config.model, init=str(checkpoint)))


@pytest.mark.parametrize("name", list_models())
@pytest.mark.parametrize("share", [1.0, 0.2])
def test_every_parameter_is_in_one_group_with_its_decay_and_its_share(name, share):
    model = create_model(name, **SMALL[name])
    names = {id(parameter): key for key, parameter in model.named_parameters()}
    groups = decay_groups(model, weight_decay=0.1, backbone_lr_share=share)
    found = [names[id(parameter)] for group in groups for parameter in group["params"]]
    assert sorted(found) == sorted(names.values())
    assert len(groups) == (2 if share == 1 else 4)
    decayed = {id(p) for p in decay_groups(model, weight_decay=0.1)[0]["params"]}
    for group in groups:
        for parameter in group["params"]:
            assert group["lr_share"] == (1.0 if is_head(names[id(parameter)]) else share)
            assert group["weight_decay"] == (0.1 if id(parameter) in decayed else 0.0)


def largest_moves(before: dict[str, torch.Tensor], after: dict[str, torch.Tensor]) -> tuple[float, float]:
    """Of a number of the backbone, and of the heads."""
    moves = {name: float((tensor - before[name]).abs().max()) for name, tensor in after.items()}
    return tuple(max(move for name, move in moves.items() if is_head(name) == head) for head in (False, True))


def test_the_first_update_moves_the_backbone_by_its_share(paths):
    """Adam's first update is the learning rate itself wherever a gradient is not tiny."""
    config = begun_by(paths, lr=1e-2, backbone_lr_share=0.2)
    with pytest.raises(StoppedError):
        tiny.fit(paths, config, run=NEXT, max_steps=1)
    before, after = load_weights(Path(config.model.init)), weights(paths, NEXT)
    assert largest_moves(before, after) == pytest.approx((2e-3, 1e-2), rel=1e-3)


def test_a_share_of_nothing_keeps_the_backbone_as_it_was_loaded(paths):
    config = begun_by(paths, backbone_lr_share=0, weight_decay=0.1)
    tiny.fit(paths, config, run=NEXT)
    backbone, heads = largest_moves(load_weights(Path(config.model.init)), weights(paths, NEXT))
    assert backbone == 0
    assert heads > 1e-3


def test_a_run_stopped_after_every_step_ends_with_the_same_bits(paths):
    config = begun_by(paths, backbone_lr_share=0.3, schedule="one_cycle", weight_decay=0.05, ema_decay=0.9)
    tiny.fit(paths, config, run=NEXT)
    for _ in range(5):
        with contextlib.suppress(StoppedError):
            tiny.fit(paths, config, run="again.sim80_k2", max_steps=1)
    assert tiny.final_bytes(paths, "again.sim80_k2") == tiny.final_bytes(paths, NEXT)


def test_groups_of_a_checkpoint_that_knows_of_no_share_learn_at_the_whole_rate():
    model = torch.nn.ModuleDict({"body": torch.nn.Linear(2, 2), "heads": torch.nn.Linear(2, 2)})
    old = make_optimizer(model, lr=1.0, weight_decay=0.1).state_dict()
    for group in old["param_groups"]:
        del group["lr_share"]
    optimizer = make_optimizer(model, lr=1.0, weight_decay=0.1)
    optimizer.load_state_dict(old)
    set_learning_rate(optimizer, 0.5)
    assert [group["lr"] for group in optimizer.param_groups] == [0.5, 0.5]


def test_the_shares_are_told(paths, capsys):
    tiny.fit(paths, begun_by(paths, backbone_lr_share=0.2), run=NEXT)
    assert "360 parameters of the backbone at 0.2 of the learning rate" in capsys.readouterr().err


def test_a_share_without_initial_weights_is_refused(paths):
    with pytest.raises(ConfigError, match=r"backbone_lr_share = 0\.2 without model\.init .* Next: "):
        tiny.fit(paths, tiny.config(backbone_lr_share=0.2))
