"""Every shipped configuration loads and builds its network."""

import pytest
import torch

from models.interface import RnaInputs
from models.registry import create_model, list_models
from pipeline.config import list_configs, load_config

CONFIGS = list_configs()


def build(name: str, **heads: int):
    config = load_config(name)
    return create_model(config.model.name, **heads, **config.model.kwargs)


@pytest.mark.parametrize("name", CONFIGS)
def test_a_shipped_config_builds_its_network(name: str):
    with torch.device("meta"):
        model = build(name, num_channels=2)
    assert model.name in list_models()
    assert name.removeprefix("small_").removeprefix("smoke_") == model.name


def test_each_family_comes_in_three_sizes():
    families = ("ribonanza_mamba", "transformer_sepconv", "hyena")
    assert {f"{size}{family}" for size in ("", "small_", "smoke_") for family in families} <= set(CONFIGS)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name.startswith("smoke_")])
@pytest.mark.parametrize(
    "heads", [{"num_channels": 2}, {"num_channels": 0, "num_distance_bins": 8}], ids=["values", "structure"]
)
def test_a_smoke_config_learns_something(name: str, heads: dict[str, int]):
    torch.manual_seed(0)
    model = build(name, **heads)
    tokens_BL, mask_BL = torch.randint(0, 4, (4, 24)), torch.ones(4, 24, dtype=torch.bool)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)

    def loss() -> torch.Tensor:
        values_BLC, logits_BLLK = model(RnaInputs(tokens_BL, mask_BL, torch.zeros(4, 24, 24)))
        if logits_BLLK is None:
            return (values_BLC - tokens_BL.unsqueeze(-1) / 3).abs().mean()
        near_LL = (torch.arange(24)[:, None] - torch.arange(24)).abs().clamp(max=7)
        return torch.nn.functional.cross_entropy(logits_BLLK.permute(0, 3, 1, 2), near_LL.expand(4, -1, -1))

    first = loss().item()
    for _ in range(60):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < 0.5 * first
