"""Every shipped configuration loads, builds the network it says it does, and keeps the contracts at its full size."""

import os
import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from models.interface import RnaInputs, RnaModel
from models.registry import create_model, list_models, model_arguments
from pipeline.config import find_config, list_configs, load_config
from tests.models.cases import alone, batch, outputs, real

CONFIGS = list_configs()
#: what keeps its contracts at full size: networks of the usual one, and with RNA_EVERY_SIZE=1 every configuration
FULL = CONFIGS if os.environ.get("RNA_EVERY_SIZE") else list_models()
SIZES = {"tiny_": (0.01, 0.1), "small_": (0.1, 0.5), "": (9, 12.5), "large_": (30, 100)}  # million parameters


def build(name: str, **heads: int) -> RnaModel:
    config = load_config(name)
    if "pool" in config.model.kwargs and not heads:  # of classes, which another head goes without
        heads = {"num_channels": 0, "num_classes": 2}
    return create_model(config.model.name, **heads, **config.model.kwargs)


def build_arguments(name: str) -> dict[str, int | float | str | bool]:
    """All arguments of a configuration's network, defaults included."""
    model = load_config(name).model
    defaults = {key: p.default for key, p in model_arguments(type(create_model(model.name))).items()}
    return defaults | model.kwargs


def million_parameters(model: nn.Module) -> float:
    return sum(p.numel() for p in model.parameters()) / 1e6


HYENADNA = [f"hyenadna_{size}" for size in ("tiny_1k", "tiny_1k_d256", "small_32k", "medium_160k", "large_1m")]
#: configuration -> network
OTHERS = {"small_structure": "ribonanza_mamba", "small_labelled": "drsn"} | dict.fromkeys(HYENADNA, "hyena")


def test_every_network_comes_in_four_sizes():
    assert sorted(CONFIGS) == sorted([*(f"{size}{name}" for size in SIZES for name in list_models()), *OTHERS])


@pytest.mark.parametrize("name", OTHERS)
def test_a_config_besides_the_four_sizes_builds_the_network_it_is_of(name: str):
    with torch.device("meta"):
        assert build(name).name == OTHERS[name]


def test_the_config_for_structures_has_coordinates_and_a_pair_track():
    arguments = load_config("small_structure").model.kwargs
    assert arguments["coordinates"] is True
    assert arguments["pair_width"]


@pytest.mark.parametrize("option", [{"mamba_version": 2}, {"mamba_version": 1}, {"pair_width": 32}])
def test_some_size_of_ribonanza_mamba_ships_each_of_its_main_options(option: dict[str, int]):
    """No preset had the pair track or Mamba-2 in it, so that nobody would find them."""
    shipped = [build_arguments(f"{size}ribonanza_mamba") for size in SIZES]
    assert any(option.items() <= arguments.items() for arguments in shipped)


@pytest.mark.parametrize("name", list_models())
@pytest.mark.parametrize("size", SIZES)
def test_a_shipped_config_builds_its_network_in_its_size(size: str, name: str):
    with torch.device("meta"):
        model = build(f"{size}{name}")
    assert model.name == name
    least, most = SIZES[size]
    assert least < million_parameters(model) < most


@pytest.mark.parametrize("name", CONFIGS)
def test_the_first_line_tells_the_parameters(name: str):
    line = find_config(name).read_text().splitlines()[0]
    found = re.fullmatch(r"# [^:]+: (\d+\.(\d+)) million parameters; [^.]+\.", line)
    assert found is not None, line
    assert len(line) <= 120
    with torch.device("meta"):
        parameters = million_parameters(build(name))
    assert f"{parameters:.{len(found[2])}f}" == found[1]


def two_sided(name: str) -> dict[str, int]:
    """A head on pairs of positions, for the networks that look at both sides and are not of classes."""
    return {} if name in HYENADNA or "pool" in load_config(name).model.kwargs else {"num_distance_bins": 5}


@pytest.mark.parametrize("name", FULL)
def test_at_full_size_no_network_sees_the_padding(name: str):
    torch.manual_seed(0)
    model, inputs = build(name, **two_sided(name)).eval(), batch([60, 41], pad=20)
    with torch.inference_mode():
        together, by_itself = outputs(model, inputs), outputs(model, alone(inputs, 1))
    for key, expected in by_itself.items():
        torch.testing.assert_close(real(key, together[key], 1, 41), expected[0], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", FULL)
def test_at_full_size_every_parameter_gets_its_gradient_recomputed_or_not(name: str):
    torch.manual_seed(0)
    model, inputs, found = build(name, **two_sided(name)).train(), batch([40]), []
    for every in (0, 2):
        model.zero_grad()
        model.set_gradient_checkpointing(every)
        torch.manual_seed(1)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            predicted = outputs(model, inputs)
        torch.stack([x.square().mean() for x in predicted.values()]).sum().backward()
        found.append({key: p.grad for key, p in model.named_parameters()})
    for key, grad in found[0].items():
        assert grad is not None
        assert grad.isfinite().all(), key
        torch.testing.assert_close(found[1][key], grad, rtol=0, atol=0, msg=key)


@pytest.mark.parametrize("name", [name for name in CONFIGS if name.startswith("tiny_")])
@pytest.mark.parametrize(
    "heads", [{"num_channels": 2}, {"num_channels": 0, "num_distance_bins": 8}], ids=["values", "structure"]
)
def test_a_tiny_config_learns_something(name: str, heads: dict[str, int]):
    torch.manual_seed(0)
    model = build(name, **heads)
    tokens_BL, mask_BL = torch.randint(0, 4, (4, 24)), torch.ones(4, 24, dtype=torch.bool)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)

    def loss() -> torch.Tensor:
        predicted = model(RnaInputs(tokens_BL, mask_BL, torch.zeros(4, 24, 24)))
        if predicted.values_BLC is not None:
            return (predicted.values_BLC - tokens_BL.unsqueeze(-1) / 3).abs().mean()
        near_LL = (torch.arange(24)[:, None] - torch.arange(24)).abs().clamp(max=7)
        assert predicted.distance_logits_BLLK is not None
        return F.cross_entropy(predicted.distance_logits_BLLK.permute(0, 3, 1, 2), near_LL.expand(4, -1, -1))

    first = loss().item()
    for _ in range(60):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert loss().item() < 0.5 * first
