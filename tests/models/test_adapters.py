"""Adapters: nothing at first, alone with the heads in learning, and part of the weights in the end."""

import pytest
import torch

from models.adapters import LowRank, add_adapters, merge_adapters, plain_state
from models.interface import RnaModel
from models.registry import create_model, list_models
from tests.models.cases import SMALL, batch, outputs


def adapted(name: str, **options) -> tuple[RnaModel, RnaModel]:
    """A network, and the same one with adapters."""
    plain, model = (create_model(name, **SMALL[name], dropout=0.0, **options) for _ in range(2))
    model.load_state_dict(plain.state_dict())
    add_adapters(model, rank=2, alpha=4.0)
    return plain, model


def learned(model: RnaModel) -> RnaModel:
    """The same with numbers in `up`, as after training."""
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, LowRank):
                module.up.normal_(std=0.3)
    return model


@pytest.mark.parametrize("name", list_models())
def test_outputs_begin_as_they_were(name):
    plain, model = adapted(name)
    inputs = batch([9, 14])
    torch.testing.assert_close(outputs(model.eval(), inputs), outputs(plain.eval(), inputs), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", list_models())
@pytest.mark.parametrize("every", [0, 1])
def test_adapters_and_heads_alone_learn_recomputed_or_not(name, every):
    _, model = adapted(name)
    model.set_gradient_checkpointing(every)
    learned(model).train()(batch([9, 14])).values_BLC.sum().backward()
    for key, parameter in model.named_parameters():
        learns = key.startswith("heads.") or key.endswith((".down", ".up"))
        assert parameter.requires_grad == learns, key
        assert (parameter.grad is not None) == learns, key


@pytest.mark.parametrize("name", list_models())
def test_merged_weights_answer_as_the_adapted_network(name):
    plain, model = adapted(name)
    inputs = batch([9, 14])
    expected = outputs(learned(model).eval(), inputs)["values_BLC"]
    merge_adapters(model)
    assert model.state_dict().keys() == plain.state_dict().keys()
    torch.testing.assert_close(outputs(model, inputs)["values_BLC"], expected, rtol=0, atol=1e-5)
    assert (outputs(plain.eval(), inputs)["values_BLC"] - expected).abs().max() > 1e-3


def test_the_sum_is_alpha_over_rank_times_the_product():
    weight = torch.randn(3, 5)
    adapter = LowRank(weight, rank=2, alpha=6.0)
    adapter.up.data.normal_()
    torch.testing.assert_close(adapter(weight), weight + 3 * adapter.up @ adapter.down)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_adapted_weight_is_that_of_float32_under_autocast(dtype):
    _, model = adapted("transformer_sepconv")
    layer = next(
        module
        for module in learned(model).modules()
        if isinstance(module, torch.nn.Linear) and hasattr(module, "parametrizations")
    )
    with torch.autocast("cpu", dtype=dtype):
        inside = layer.weight
    assert torch.equal(inside, layer.weight)


def test_filters_of_hyena_get_none():
    _, model = adapted("hyena")
    assert not [name for name, module in model.named_modules() if isinstance(module, LowRank) and "filters" in name]


def test_the_plain_state_is_that_of_the_network_without_adapters_and_its_own_tensors():
    plain, model = adapted("ribonanza_mamba")
    found = plain_state(model)
    assert found.keys() == plain.state_dict().keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in plain.state_dict().items())
    found["norm.weight"].fill_(7.0)
    assert model.norm.weight[0] == 7


def test_a_network_without_linear_layers_is_refused():
    model = create_model("drsn", **SMALL["drsn"])
    model.blocks = torch.nn.ModuleList()
    with pytest.raises(ValueError, match="no linear layer"):
        add_adapters(model, rank=2, alpha=4.0)
