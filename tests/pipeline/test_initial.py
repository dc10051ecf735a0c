"""Initial weights: what fits is taken, and what became of the rest is told."""

import pytest
import torch
from torch import nn

from pipeline.training.initial import load_fitting


def network(*, width: int = 8, heads: dict[str, int], depth: int = 2) -> nn.Module:
    """An embedding, blocks of a width, and heads by name and size."""
    model = nn.Module()
    model.embedding = nn.Embedding(4, 8)
    model.blocks = nn.ModuleList(nn.Linear(8, width) for _ in range(depth))
    model.heads = nn.ModuleDict({name: nn.Linear(8, size) for name, size in heads.items()})
    return model


def test_the_backbone_is_taken_and_other_heads_are_left():
    source, target = network(heads={"reactivity": 2}), network(heads={"distances": 5})
    fresh = target.heads["distances"].weight.clone()
    found = load_fitting(target, source.state_dict())
    assert torch.equal(target.embedding.weight, source.embedding.weight)
    assert torch.equal(target.blocks[1].weight, source.blocks[1].weight)
    assert torch.equal(target.heads["distances"].weight, fresh)
    assert found.facts() == {
        "backbone": 1.0,
        "loaded": ["blocks", "embedding"],
        "fresh": ["heads.distances"],
        "ignored": ["heads.reactivity"],
    }


def test_a_head_of_the_same_name_and_shape_is_taken_and_of_another_shape_is_not():
    source, target = network(heads={"reactivity": 2, "classes": 3}), network(heads={"reactivity": 2, "classes": 4})
    facts = load_fitting(target, source.state_dict()).facts()
    assert torch.equal(target.heads["reactivity"].weight, source.heads["reactivity"].weight)
    assert facts["fresh"] == facts["ignored"] == ["heads.classes"]


def test_heads_may_stay_as_they_are():
    source, target = network(heads={"reactivity": 2}), network(heads={"reactivity": 2})
    fresh = target.heads["reactivity"].weight.clone()
    found = load_fitting(target, source.state_dict(), heads=False)
    assert torch.equal(target.heads["reactivity"].weight, fresh)
    assert found.share == 1.0
    assert found.facts()["fresh"] == found.facts()["ignored"] == ["heads.reactivity"]


def test_a_block_that_the_other_network_lacks_stays_fresh():
    source, target = network(heads={}, depth=2), network(heads={}, depth=3)
    found = load_fitting(target, source.state_dict())
    assert found.share == pytest.approx((32 + 2 * 72) / (32 + 3 * 72))
    assert found.facts()["loaded"] == ["blocks.0", "blocks.1", "embedding"]
    assert found.facts()["fresh"] == ["blocks.2"]


def test_less_than_half_of_the_backbone_is_refused_and_changes_nothing():
    source, target = network(heads={"reactivity": 2}, width=6), network(heads={"reactivity": 2})
    before = {name: tensor.clone() for name, tensor in target.state_dict().items()}
    with pytest.raises(ValueError, match="18% of the network's backbone are there in the same shape") as told:
        load_fitting(target, source.state_dict())
    assert str(told.value).endswith(
        "; blocks.0.weight [8, 8], there [6, 8]; blocks.0.bias [8], there [6]; blocks.1.weight [8, 8], there [6, 8]; "
        "and 1 more"
    )
    assert all(torch.equal(tensor, before[name]) for name, tensor in target.state_dict().items())
