"""What every registered network and every shipped configuration keeps to, on the CPU and, with `-m gpu`, on CUDA."""

import copy
import re

import pytest
import torch
from torch import Tensor

from models.heads import NUM_LDDT_BINS
from models.interface import RnaInputs
from models.registry import create_model, list_models
from tests.models.cases import ANGSTROM, CASES, SMALL, alone, batch, build, cut, gradients, loss, outputs, real

every_case = pytest.mark.parametrize("case", CASES)
plain_case = pytest.mark.parametrize("case", [case for case in CASES if case.endswith("/bpp")])


@pytest.fixture(params=["cpu", pytest.param("cuda", marks=pytest.mark.gpu)])
def device(request: pytest.FixtureRequest) -> str:
    """Where a contract is tested."""
    return request.param


def close(device: str, *, rtol: float = 1e-5, atol: float = 1e-5) -> dict[str, float]:
    """Tolerances; ten times wider on CUDA, where another shape means another order of summation and atomics add."""
    return {"rtol": rtol, "atol": atol} if device == "cpu" else {"rtol": 10 * rtol, "atol": 10 * atol}


def unit(name: str) -> float:
    """What an output's tolerance is multiplied by."""
    return ANGSTROM if name == "c1_xyz_BL3" else 1.0


def test_every_registered_network_has_its_cases():
    assert sorted(SMALL) == list_models()


@every_case
@pytest.mark.parametrize("training", [False, True], ids=["eval", "train"])
def test_padding_does_not_reach_real_positions(device: str, case: str, training: bool):
    model, lengths = build(case, device=device, dropout=0.0).train(training), [23, 9, 31]
    inputs = batch(lengths, pad=117, device=device)
    apart = [outputs(model, alone(inputs, row)) for row in range(len(lengths))]
    for pad in (0, 20, 117):
        together = outputs(model, cut(inputs, max(lengths) + pad))
        for row, length in enumerate(lengths):
            for name, expected in apart[row].items():
                torch.testing.assert_close(
                    real(name, together[name], row, length),
                    expected[0],
                    **close(device, atol=1e-5 * unit(name)),
                    msg=lambda text, name=name, pad=pad: f"{name}, padded by {pad}: {text}",
                )


@every_case
def test_gradients_do_not_depend_on_padding(device: str, case: str):
    model, inputs = build(case, device=device, dropout=0.0), batch([19], device=device, pad=13)
    loss(model, alone(inputs, 0)).backward()
    expected = gradients(model)
    model.zero_grad(set_to_none=True)
    loss(model, inputs).backward()
    for name, grad in gradients(model).items():
        wanted = expected[name]
        assert grad is not None
        assert wanted is not None
        # of the largest in the tensor: measured 5e-6 and less
        tolerance = close(device, rtol=0, atol=2e-5 * wanted.abs().max().item())
        torch.testing.assert_close(grad, wanted, **tolerance, msg=lambda text, name=name: f"{name}: {text}")


@every_case
def test_inputs_are_never_written_to(device: str, case: str):
    inputs = batch([12, 7], device=device, pad=3)
    before = [x.clone() for x in inputs]
    versions = [x._version for x in inputs]
    loss(build(case, device=device), inputs).backward()
    assert [x._version for x in inputs] == versions
    for x, copied in zip(inputs, before, strict=True):
        torch.testing.assert_close(x, copied, rtol=0, atol=0, equal_nan=True)


@every_case
def test_gradient_checkpointing_changes_no_gradient_with_dropout(device: str, case: str):
    model = build(case, device=device, dropout=0.3).train()
    inputs = batch([14, 11], device=device)
    grads = {}
    for every in (0, 1, 2, 5):
        model.zero_grad()
        model.set_gradient_checkpointing(every)
        torch.manual_seed(7)
        loss(model, inputs).backward()
        grads[every] = {name: grad for name, grad in gradients(model).items() if grad is not None}
    expected = grads.pop(0)
    for every, found in grads.items():
        assert found.keys() == expected.keys()
        for name, grad in found.items():
            torch.testing.assert_close(
                grad, expected[name], **close(device, atol=1e-7), msg=lambda text, at=(name, every): f"{at}: {text}"
            )


@pytest.mark.parametrize("case", [*(f"{name}/values" for name in SMALL), "drsn/pairs", "transformer_sepconv/pair+bpp"])
def test_gradient_checkpointing_computes_every_block_again(case: str):
    """Equal gradients are no proof: nothing noticed when a network kept all activations whatever it was told."""
    model, run = build(case), list[str]()
    for name, module in model.named_modules():
        if re.fullmatch(r"(pair_)?blocks\.\d+", name):
            module.register_forward_pre_hook(lambda *_, name=name: run.append(name))  # the last is not run to its end
    for every, times in ((0, 1), (2, 2)):
        run.clear()
        model.set_gradient_checkpointing(every)
        loss(model, batch([14, 11])).backward()
        assert set(map(run.count, run)) == {times}
    assert ("pair_blocks.0" in run) == (case == "drsn/pairs")


def test_gradient_checkpointing_refuses_a_negative_group():
    with pytest.raises(ValueError, match="gradient_checkpointing: got -1"):
        build("drsn/values").set_gradient_checkpointing(-1)


@every_case
def test_every_parameter_gets_a_gradient(device: str, case: str):
    model = build(case, device=device)
    loss(model, batch([30, 21], device=device)).backward()
    dead = [name for name, grad in gradients(model).items() if grad is None or not grad.abs().max() > 0]
    assert not dead, f"no gradient: {dead}"


@every_case
def test_outputs_are_finite_float32_of_the_promised_shape(device: str, case: str):
    model, inputs = build(case, device=device), batch([12, 7], device=device, pad=2)
    found = outputs(model, inputs)
    asked, shapes = CASES[case][1], {}
    if asked.get("num_channels") != 0:
        shapes["values_BLC"] = (2, 14, 2)
    if asked.get("num_distance_bins"):
        shapes["distance_logits_BLLK"] = (2, 14, 14, 5)
    if asked.get("num_classes"):
        shapes["class_logits_BC"] = (2, 3)
    if asked.get("coordinates"):
        shapes |= {"c1_xyz_BL3": (2, 14, 3), "lddt_logits_BLK": (2, 14, NUM_LDDT_BINS)}
    assert found.keys() == shapes.keys()
    for name, x in found.items():
        assert x.dtype == torch.float32
        assert x.shape == shapes[name]
        assert x.isfinite().all()


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case][1].get("num_distance_bins")])
def test_distance_logits_are_symmetric(device: str, case: str):
    logits = outputs(build(case, device=device), batch([12, 7], device=device))["distance_logits_BLLK"]
    torch.testing.assert_close(logits, logits.transpose(1, 2), **close(device, rtol=1e-6, atol=1e-6))


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case][1].get("coordinates")])
def test_coordinates_are_centred_on_the_real_positions_and_zero_elsewhere(device: str, case: str):
    inputs = batch([12, 7], pad=3, device=device)
    xyz_BL3 = outputs(build(case, device=device), inputs)["c1_xyz_BL3"]
    assert (xyz_BL3[~inputs.mask_BL] == 0).all()
    assert xyz_BL3.sum(1).abs().max() < 1e-3
    assert xyz_BL3.abs().max() > 1


@every_case
def test_eval_is_deterministic_and_dropout_is_not(device: str, case: str):
    model, inputs = build(case, device=device, dropout=0.3), batch([20, 13], device=device)
    model.eval()
    assert_equal_outputs(outputs(model, inputs), outputs(model, inputs))
    model.train()
    first, second = outputs(model, inputs), outputs(model, inputs)
    assert all(not torch.equal(first[name], second[name]) for name in first)


@every_case
def test_a_state_dict_makes_another_instance_the_same(device: str, case: str):
    model, inputs = build(case, device=device, seed=0).eval(), batch([20, 13], device=device)
    other = build(case, device=device, seed=1).eval()
    other.load_state_dict(copy.deepcopy(model.state_dict()))
    assert_equal_outputs(outputs(model, inputs), outputs(other, inputs))


@pytest.mark.parametrize("case", [case for case in CASES if CASES[case][0] in ("hyena", "ribonanza_mamba")])
def test_weights_trained_on_the_fast_path_predict_the_same_on_the_reference_path(
    device: str, case: str, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("RNA_KERNELS", "auto")
    fast, inputs = build(case, device=device, dropout=0.0), batch([37, 20], device=device)
    optimizer = torch.optim.SGD(fast.parameters(), lr=1e-3)
    loss(fast, inputs).backward()
    optimizer.step()
    expected = outputs(fast, inputs)
    monkeypatch.setenv("RNA_KERNELS", "reference")
    slow = build(case, device=device, seed=1, dropout=0.0)
    slow.load_state_dict(fast.state_dict())
    for name, x in outputs(slow, inputs).items():
        torch.testing.assert_close(
            x[real_mask(name, inputs)],
            expected[name][real_mask(name, inputs)],
            **close(device, rtol=1e-4, atol=1e-5 * unit(name)),
        )


@every_case
def test_sequences_longer_than_any_in_training_are_predicted(device: str, case: str):
    model = build(case, device=device, dropout=0.0)
    loss(model, batch([20], device=device)).backward()  # in training mode: cuDNN's GRU has no other backward pass
    model.eval()
    assert all(x.isfinite().all() for x in outputs(model, batch([150], device=device)).values())


@every_case
def test_one_nucleotide_is_a_sequence(device: str, case: str):
    model = build(case, device=device)
    inputs = batch([1, 6], device=device)
    loss(model, alone(inputs, 0)).backward()
    assert all(x.isfinite().all() for x in outputs(model, inputs).values())
    assert all(grad is None or grad.isfinite().all() for grad in gradients(model).values())


@every_case
@pytest.mark.parametrize("magnitude", [1.0, 300.0])
def test_autocast_stays_finite_and_near_float32(device: str, case: str, magnitude: float):
    model, inputs = build(case, device=device, dropout=0.0), batch([25, 18], device=device, pad=4)
    with torch.no_grad():
        model.get_submodule("embedding.tokens").weight.mul_(magnitude)
        expected = outputs(model, inputs)
    for dtype, tolerance in {torch.float16: 0.02, torch.bfloat16: 0.1}.items():
        model.zero_grad()
        with torch.autocast(device, dtype=dtype):
            found = outputs(model, inputs)
            total = loss(model, inputs)
        total.backward()
        assert all(grad is not None and grad.isfinite().all() for grad in gradients(model).values()), dtype
        for name, x in found.items():
            assert x.dtype == torch.float32, (name, dtype)
            assert (x - expected[name]).abs().mean() < unit(name) * tolerance, (name, dtype)


@every_case
def test_weights_that_have_grown_overflow_no_half_precision(device: str, case: str):
    """Hyena of order 3 gave "NaN" in fp16 with weights four times the initial ones: its gates met in half precision."""
    model, inputs = build(case, device=device, dropout=0.0).eval(), batch([25, 18], device=device, pad=4)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(4)
        assert all(x.isfinite().all() for x in outputs(model, inputs).values())
        with torch.autocast(device, dtype=torch.float16):
            assert all(x.isfinite().all() for x in outputs(model, inputs).values())


@pytest.mark.parametrize("case", [case for case in CASES if "num_channels" not in CASES[case][1]])
def test_each_output_is_influenced_by_every_position_it_may_see(device: str, case: str):
    model = build(case, device=device, dropout=0.0).double()
    influence_LL = influence(model, batch([18], device=device))
    causal = CASES[case][1].get("bidirectional") is False
    seen = torch.ones(18, 18, device=device).bool()
    seen = seen.tril() if causal else seen
    largest = influence_LL.max()
    assert (influence_LL[seen] > 1e-9 * largest).all()
    assert (influence_LL[~seen] < 1e-12 * largest).all()


@every_case
def test_the_order_of_a_batch_does_not_matter(device: str, case: str):
    model, inputs = build(case, device=device).eval(), batch([20, 13, 17], device=device)
    turned = RnaInputs(*(x.flip(0) for x in inputs))
    for name, x in outputs(model, inputs).items():
        torch.testing.assert_close(outputs(model, turned)[name].flip(0), x, **close(device, atol=1e-5 * unit(name)))


@plain_case
def test_missing_base_pair_probabilities_are_refused_in_a_sentence(device: str, case: str):
    with pytest.raises(ValueError, match="use_bpp=True but got no base-pair probabilities"):
        build(case, device=device)(batch([5], device=device)._replace(bpp_BLL=None))


@plain_case
def test_base_pair_probabilities_change_the_prediction(device: str, case: str):
    model, inputs = build(case, device=device).eval(), batch([20], device=device)
    assert model.uses_bpp
    assert inputs.bpp_BLL is not None
    other = inputs._replace(bpp_BLL=inputs.bpp_BLL / 2)
    assert (outputs(model, inputs)["values_BLC"] - outputs(model, other)["values_BLC"]).abs().max() > 1e-3


@pytest.mark.parametrize("name", SMALL)
def test_features_that_are_missing_or_of_another_width_are_refused_in_a_sentence(name: str):
    model, inputs = build(f"{name}/features"), batch([5, 4])
    for given, got in ((None, "none"), (torch.ones(2, 5, 7), r"\[2, 5, 7\]")):
        with pytest.raises(ValueError, match=rf"got features {got}; expected \[2, 5, 6\]"):
            model(inputs._replace(features_BLF=given))


@pytest.mark.parametrize("name", SMALL)
def test_features_change_the_prediction_and_are_read_in_half_precision_too(name: str):
    model, inputs = build(f"{name}/features").eval(), batch([20])
    assert inputs.features_BLF is not None
    expected = outputs(model, inputs)["values_BLC"]
    half = outputs(model, inputs._replace(features_BLF=inputs.features_BLF.half()))["values_BLC"]
    torch.testing.assert_close(half, expected, rtol=0, atol=1e-2 * expected.abs().max().item())
    other = outputs(model, inputs._replace(features_BLF=inputs.features_BLF.flip(2)))["values_BLC"]
    assert (other - expected).abs().max() > 1e-2 * expected.abs().max()


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
    }.get(name, ())
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


def real_mask(name: str, inputs: RnaInputs) -> Tensor:
    """Where an output is defined: [B, L], [B, L, L] or [B]."""
    mask_BL = inputs.mask_BL
    if name == "class_logits_BC":
        return mask_BL.any(1)
    return mask_BL.unsqueeze(1) & mask_BL.unsqueeze(2) if name == "distance_logits_BLLK" else mask_BL


def assert_equal_outputs(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, x in expected.items():
        torch.testing.assert_close(found[name], x, rtol=0, atol=0)
