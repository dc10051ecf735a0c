"""Adapters: nothing at first, alone with the heads in learning, and part of the weights in the end."""

import pytest
import torch

from models.adapters import LowRank, add_adapters, add_prompt, merge_adapters, plain_state
from models.interface import RnaInputs, RnaModel
from models.registry import create_model, list_models
from pipeline.training.optim import decay_groups
from tests.models import cases
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


# --- soft prompts ----------------------------------------------------------------------------------------------------


def prompted(name: str, *, length: int = 5, **options) -> tuple[RnaModel, RnaModel]:
    """A network, and the same one with a prompt that says something."""
    plain, model = (create_model(name, **SMALL[name], dropout=0.0, **options) for _ in range(2))
    model.load_state_dict(plain.state_dict())
    add_prompt(model, length=length)
    assert model.prompt_ND.shape == (length, 16)
    model.prompt_ND.data *= 50
    return plain, model


@torch.no_grad()  # attention takes another path where its bias has a gradient
@pytest.mark.parametrize("name", list_models())
def test_a_prompt_of_no_vectors_changes_no_bit(name):
    plain, model = prompted(name, length=0)
    inputs = batch([9, 14])
    assert torch.equal(outputs(model.eval(), inputs)["values_BLC"], outputs(plain.eval(), inputs)["values_BLC"])


@pytest.mark.parametrize("name", list_models())
@pytest.mark.parametrize("every", [0, 1])
def test_prompt_and_heads_alone_learn_recomputed_or_not(name, every):
    _, model = prompted(name)
    model.set_gradient_checkpointing(every)
    model.train()(batch([9, 14])).values_BLC.square().sum().backward()
    for key, parameter in model.named_parameters():
        learns = key.startswith("heads.") or key == "prompt_ND"
        assert parameter.requires_grad == learns, key
        assert (parameter.grad is not None) == learns, key
    assert model.prompt_ND.grad.abs().min() > 0


@pytest.mark.parametrize("name", list_models())
@pytest.mark.parametrize("pool", ["mean", "max", "attention", "gru"])
def test_outputs_are_of_the_sequence_alone_and_of_no_padding(name, pool):
    """Of every head as many as without a prompt, others than without it, and the same alone and in a batch."""
    plain, model = prompted(name, use_bpp=True, num_distance_bins=5, num_classes=3, pool=pool, coordinates=True)
    inputs = batch([9, 14])
    whole, without = outputs(model.eval(), inputs), outputs(plain.eval(), inputs)
    assert {key: value.shape for key, value in whole.items()} == {key: value.shape for key, value in without.items()}
    assert (whole["class_logits_BC"] - without["class_logits_BC"]).abs().max() > 1e-3
    for key, value in outputs(model, cases.alone(inputs, 0)).items():
        among = whole[key][tuple(slice(size) for size in value.shape)]
        torch.testing.assert_close(value, among, rtol=0, atol=1e-5 * (cases.ANGSTROM if "xyz" in key else 1))
    assert torch.equal(model.embed(inputs)[0, 9:], torch.zeros(5, 16))


def test_a_prompt_of_what_nucleotides_are_to_the_blocks_is_those_nucleotides():
    plain, model = prompted("hyena", bidirectional=False, kernel=0, stem_kernel=0)
    inputs = batch([14, 14])
    before = RnaInputs(inputs.tokens_BL[:1, :5].expand(2, -1), inputs.mask_BL[:, :5])
    with torch.no_grad():
        model.prompt_ND.copy_(plain.embedding(before)[0])
    joined = RnaInputs(torch.cat([before.tokens_BL, inputs.tokens_BL], 1), torch.ones(2, 19, dtype=torch.bool))
    expected = outputs(plain.eval(), joined)["values_BLC"][:, 5:]
    torch.testing.assert_close(outputs(model.eval(), inputs)["values_BLC"], expected, rtol=0, atol=1e-5)


def test_a_prompt_does_not_decay():
    _, model = prompted("drsn")
    groups = decay_groups(model, weight_decay=0.1)
    (decay,) = [group["weight_decay"] for group in groups if any(p is model.prompt_ND for p in group["params"])]
    assert decay == 0


def test_a_network_without_linear_layers_is_refused():
    model = create_model("drsn", **SMALL["drsn"])
    model.blocks = torch.nn.ModuleList()
    with pytest.raises(ValueError, match="no linear layer"):
        add_adapters(model, rank=2, alpha=4.0)
