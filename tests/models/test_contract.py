"""What every registered network keeps to, whatever its arguments."""

import copy

import pytest
import torch
from torch import Tensor

from models.interface import RnaInputs
from models.registry import create_model, list_models
from tests.models.cases import CASES, SMALL, alone, batch, build, gradients, loss, outputs

CLOSE = {"rtol": 1e-5, "atol": 1e-5}

every_case = pytest.mark.parametrize("case", CASES)
plain_case = pytest.mark.parametrize("case", [case for case in CASES if case.endswith("/bpp")])


def test_every_registered_network_has_its_cases():
    assert sorted(SMALL) == list_models()


@every_case
@pytest.mark.parametrize("pad", [0, 20, 117])
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_padding_does_not_reach_real_positions(case: str, pad: int, training: bool):
    model = build(case, dropout=0.0).train(training)
    inputs = batch([23, 9, 31], pad=pad)
    together = outputs(model, inputs)
    for row in range(3):
        for name, expected in outputs(model, alone(inputs, row)).items():
            length = expected.shape[1]
            found = together[name][row, :length]
            found = found[:, :length] if name == "distance_logits_BLLK" else found
            torch.testing.assert_close(found, expected[0], **CLOSE, msg=lambda text, name=name: f"{name}: {text}")


@every_case
def test_gradients_do_not_depend_on_padding(case: str):
    model, inputs = build(case, dropout=0.0), batch([19], pad=13)
    loss(model, alone(inputs, 0)).backward()
    expected = gradients(model)
    model.zero_grad(set_to_none=True)
    loss(model, inputs).backward()
    for name, grad in gradients(model).items():
        torch.testing.assert_close(
            grad, expected[name], rtol=1e-4, atol=1e-5, msg=lambda text, name=name: f"{name}: {text}"
        )


@every_case
def test_inputs_are_never_written_to(case: str):
    inputs = batch([12, 7], pad=3)
    before = [x.clone() for x in inputs]
    versions = [x._version for x in inputs]
    loss(build(case), inputs).backward()
    assert [x._version for x in inputs] == versions
    for x, copied in zip(inputs, before, strict=True):
        torch.testing.assert_close(x, copied, rtol=0, atol=0, equal_nan=True)


@every_case
@pytest.mark.parametrize("every", [1, 2, 5])
def test_gradient_checkpointing_changes_no_gradient_with_dropout(case: str, every: int):
    model = build(case, dropout=0.3).train()
    inputs = batch([14, 11])
    grads = {}
    for k in (0, every):
        model.zero_grad()
        model.set_gradient_checkpointing(k)
        torch.manual_seed(7)
        loss(model, inputs).backward()
        grads[k] = {name: grad for name, grad in gradients(model).items() if grad is not None}
    assert grads[0].keys() == grads[every].keys()
    for name, expected in grads[0].items():
        torch.testing.assert_close(
            grads[every][name], expected, rtol=1e-5, atol=1e-7, msg=lambda text, name=name: f"{name}: {text}"
        )


def test_gradient_checkpointing_refuses_a_negative_group():
    with pytest.raises(ValueError, match="gradient_checkpointing: got -1"):
        build("drsn/values").set_gradient_checkpointing(-1)


@every_case
def test_every_parameter_gets_a_gradient(case: str):
    model = build(case)
    loss(model, batch([30, 21])).backward()
    dead = [name for name, grad in gradients(model).items() if grad is None or not grad.abs().max() > 0]
    assert not dead, f"no gradient: {dead}"


@every_case
def test_outputs_are_finite_float32_of_the_promised_shape(case: str):
    model, inputs = build(case), batch([12, 7], pad=2)
    found = outputs(model, inputs)
    wants_values = CASES[case][1].get("num_channels", 2) != 0
    assert ("values_BLC" in found) == wants_values
    assert ("distance_logits_BLLK" in found) == (CASES[case][1].get("num_distance_bins", 0) != 0)
    shapes = {"values_BLC": (2, 14, 2), "distance_logits_BLLK": (2, 14, 14, 5)}
    for name, x in found.items():
        assert x.dtype == torch.float32
        assert x.shape == shapes[name]
        assert x.isfinite().all()


@every_case
def test_distance_logits_are_symmetric(case: str):
    logits = outputs(build(case), batch([12, 7])).get("distance_logits_BLLK")
    if logits is not None:
        torch.testing.assert_close(logits, logits.transpose(1, 2), rtol=1e-6, atol=1e-6)


@every_case
def test_eval_is_deterministic_and_dropout_is_not(case: str):
    model, inputs = build(case, dropout=0.3), batch([20, 13])
    model.eval()
    assert_equal_outputs(outputs(model, inputs), outputs(model, inputs))
    model.train()
    first, second = outputs(model, inputs), outputs(model, inputs)
    assert all(not torch.equal(first[name], second[name]) for name in first)


@every_case
def test_a_state_dict_makes_another_instance_the_same(case: str):
    model, inputs = build(case, seed=0).eval(), batch([20, 13])
    other = build(case, seed=1).eval()
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    assert_equal_outputs(outputs(model, inputs), outputs(other, inputs))


@every_case
def test_sequences_longer_than_any_in_training_are_predicted(case: str):
    model = build(case).eval()
    loss(model, batch([20])).backward()
    assert all(x.isfinite().all() for x in outputs(model, batch([150])).values())


@every_case
def test_one_nucleotide_is_a_sequence(case: str):
    model = build(case)
    inputs = batch([1, 6])
    loss(model, alone(inputs, 0)).backward()
    assert all(x.isfinite().all() for x in outputs(model, inputs).values())
    assert all(grad is None or grad.isfinite().all() for grad in gradients(model).values())


@every_case
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["fp16", "bf16"])
@pytest.mark.parametrize("magnitude", [1.0, 300.0])
def test_autocast_stays_finite_and_near_float32(case: str, dtype: torch.dtype, magnitude: float):
    model, inputs = build(case, dropout=0.0), batch([25, 18], pad=4)
    with torch.no_grad():
        model.get_submodule("embedding.tokens").weight.mul_(magnitude)
    expected = outputs(model, inputs)
    with torch.autocast("cpu", dtype=dtype):
        found = outputs(model, inputs)
        total = loss(model, inputs)
    total.backward()
    assert all(grad is not None and grad.isfinite().all() for grad in gradients(model).values())
    for name, x in found.items():
        assert x.dtype == torch.float32
        assert (x - expected[name]).abs().mean() < (0.02 if dtype == torch.float16 else 0.1)


@pytest.mark.parametrize("case", [case for case in CASES if "num_channels" not in CASES[case][1]])
def test_each_output_is_influenced_by_every_position_it_may_see(case: str):
    model = build(case, dropout=0.0).double()
    influence_LL = influence(model, batch([18]))
    causal = CASES[case][1].get("bidirectional") is False
    seen = torch.ones(18, 18).tril().bool() if causal else torch.ones(18, 18).bool()
    largest = influence_LL.max()
    assert (influence_LL[seen] > 1e-9 * largest).all()
    assert (influence_LL[~seen] < 1e-12 * largest).all()


@every_case
def test_the_order_of_a_batch_does_not_matter(case: str):
    model, inputs = build(case).eval(), batch([20, 13, 17])
    turned = RnaInputs(*(x.flip(0) for x in inputs))
    for name, x in outputs(model, inputs).items():
        torch.testing.assert_close(outputs(model, turned)[name].flip(0), x, **CLOSE)


@plain_case
def test_missing_base_pair_probabilities_are_refused_in_a_sentence(case: str):
    with pytest.raises(ValueError, match="use_bpp=True but got no base-pair probabilities"):
        build(case)(batch([5])._replace(bpp_BLL=None))


@plain_case
def test_base_pair_probabilities_change_the_prediction(case: str):
    model, inputs = build(case).eval(), batch([20])
    assert model.uses_bpp
    assert inputs.bpp_BLL is not None
    other = inputs._replace(bpp_BLL=inputs.bpp_BLL / 2)
    assert (outputs(model, inputs)["values_BLC"] - outputs(model, other)["values_BLC"]).abs().max() > 1e-3


@pytest.mark.parametrize("name", SMALL)
def test_a_mask_that_is_not_bool_is_refused(name: str):
    inputs = batch([5, 4])
    with pytest.raises(ValueError, match="bool mask"):
        create_model(name, **SMALL[name])(inputs._replace(mask_BL=inputs.mask_BL.float()))


@pytest.mark.parametrize("name", SMALL)
def test_matrices_that_must_not_decay_are_marked(name: str):
    marked = {key for key, p in build(f"{name}/bpp").named_parameters() if getattr(p, "_no_weight_decay", False)}
    endings = {
        "hyena": ("filters.frequency", "filters.out.weight", "skip_ND"),
        "ribonanza_mamba": ("A_log_EN", "pair_bias.weight_HF"),
        "transformer_sepconv": ("pair_bias.weight_HF",),
        "drsn": (),
    }[name]
    for ending in endings:
        assert any(key.endswith(ending) for key in marked)
    assert len(marked) >= len(endings)


def influence(model: torch.nn.Module, inputs: RnaInputs) -> Tensor:
    """How much each position's values (rows) change with each position's token embedding (columns): [L, L]."""
    seen: list[Tensor] = []
    hook = model.get_submodule("embedding.tokens").register_forward_hook(lambda *call: seen.append(call[2]))
    values_LC = outputs(model, inputs)["values_BLC"][0]
    hook.remove()
    rows = [torch.autograd.grad(value_C.sum(), seen[0], retain_graph=True)[0][0] for value_C in values_LC]
    return torch.stack(rows).norm(dim=-1)


def assert_equal_outputs(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, rtol=0, atol=0)
