"""Muon: torch's own as outside truth, which parameters it is for, and what a run asks of every optimiser."""

from collections.abc import Callable, Iterator

import pytest
import torch
from torch import nn

from models.registry import create_model
from pipeline.config import load_config
from pipeline.errors import ConfigError, StoppedError
from pipeline.training.checkpoint import CheckpointStore
from pipeline.training.muon import Muon, orthogonal
from pipeline.training.optim import make_optimizer, set_learning_rate
from tests.pipeline import tiny
from tests.pipeline.tiny import fit

WHOLE = f"whole.{tiny.SPLIT}"
SMALL = ("drsn", "hyena", "ribonanza_mamba", "transformer_sepconv")


class Layers(nn.Module):
    """Matrices, wide and tall, of which two are alike, a kernel, a depthwise one, vectors, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(4, 8)
        self.wide = nn.ModuleList([nn.Linear(24, 8), nn.Linear(24, 8)])
        self.tall = nn.Linear(8, 24)
        self.kernel = nn.Conv1d(8, 16, 5)
        self.depthwise = nn.Conv1d(16, 16, 3, groups=16)
        self.marked = nn.Parameter(torch.randn(8, 8))
        self.marked._no_weight_decay = True
        self.heads = nn.ModuleDict({"per_base": nn.Linear(16, 8)})


def moved(
    step: Callable[[nn.Module], torch.optim.Optimizer], *, updates: int = 4, device: str = "cpu"
) -> dict[str, torch.Tensor]:
    """Parameters after some updates with gradients that depend on the seed alone."""
    torch.manual_seed(3)
    model = Layers().to(device)
    optimizer = step(model)
    for update in range(updates):
        set_learning_rate(optimizer, 0.02 / (update + 1))
        for parameter in model.parameters():
            parameter.grad = torch.randn(parameter.shape).to(device)
        optimizer.step()
    return {name: parameter.detach().cpu() for name, parameter in model.named_parameters()}


def muon(model: nn.Module, *, weight_decay: float = 0.1, share: float = 1.0) -> torch.optim.Optimizer:
    return make_optimizer(model, lr=0.02, weight_decay=weight_decay, backbone_lr_share=share, name="muon")


def orthogonal_names(model: nn.Module, **options: float) -> set[str]:
    found = {id(p) for group in muon(model, **options).param_groups if group["orthogonal"] for p in group["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in found}


def torchs(names: set[str], model: nn.Module) -> torch.optim.Optimizer:
    matrices = [parameter for name, parameter in model.named_parameters() if name in names]
    return torch.optim.Muon(matrices, lr=0.02, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")


def test_matrices_move_as_with_torchs_own():
    """Within bfloat16, in which torch's turns them."""
    names = {"wide.0.weight", "wide.1.weight", "tall.weight"}
    start, ours = moved(muon, updates=0), moved(muon)
    theirs = moved(lambda model: torchs(names, model))
    for name in names:
        assert (ours[name] - theirs[name]).norm() < 0.02 * (ours[name] - start[name]).norm()


def test_all_that_is_no_hidden_matrix_moves_as_with_adamw_to_the_bit():
    ours, theirs = moved(muon), moved(lambda model: make_optimizer(model, lr=0.02, weight_decay=0.1))
    same = {name for name in ours if torch.equal(ours[name], theirs[name])}
    assert same == ours.keys() - {"wide.0.weight", "wide.1.weight", "tall.weight", "kernel.weight"}


def test_a_kernel_moves_as_the_matrix_of_its_output_channels():
    def flat(model: nn.Module) -> torch.optim.Optimizer:
        model.kernel.weight = nn.Parameter(model.kernel.weight.detach().flatten(1))
        return muon(model)

    ours, theirs = moved(muon)["kernel.weight"], moved(flat)["kernel.weight"]
    assert torch.equal(ours.flatten(1), theirs)


@pytest.mark.parametrize("options", [{}, {"weight_decay": 0.0}, {"share": 0.5}])
def test_hidden_matrices_are_meant_whatever_weight_decay_and_share(options):
    expected = {"wide.0.weight", "wide.1.weight", "tall.weight", "kernel.weight"}
    assert orthogonal_names(Layers(), **options) == expected


@pytest.mark.parametrize("family", SMALL)
def test_no_networks_embedding_head_depthwise_kernel_or_marked_matrix_is_turned(family):
    config = load_config(f"small_{family}").model
    model = create_model(config.name, **config.kwargs)
    turned = orthogonal_names(model)
    for name, parameter in model.named_parameters():
        is_other = name.startswith("heads.") or name.endswith(("tokens.weight", "weight_D1K"))
        is_other |= parameter.ndim < 2 or hasattr(parameter, "_no_weight_decay")
        assert (name in turned) == (not is_other), name


@pytest.mark.parametrize("shape", [(64, 64), (16, 128), (128, 16), (4, 32)])
def test_a_steps_numbers_are_a_fifth_of_the_learning_rate_whatever_the_shape(shape):
    """About as large as AdamW's, so that one learning rate does for both."""
    torch.manual_seed(1)
    parameter, other = nn.Parameter(torch.zeros(shape)), nn.Parameter(torch.zeros(1))
    groups = [
        {"params": [parameter], "weight_decay": 0.0, "orthogonal": True},
        {"params": [other], "weight_decay": 0.0, "orthogonal": False},
    ]
    parameter.grad = torch.randn(shape)
    Muon(groups, lr=0.5).step()
    assert float(parameter.detach().square().mean().sqrt()) == pytest.approx(0.2 * 0.5, rel=0.2)


def test_singular_values_of_a_hundredth_of_the_norm_become_alike_and_directions_stay():
    torch.manual_seed(2)
    left, right = (torch.linalg.qr(torch.randn(3, size, 12))[0] for size in (12, 40))
    before = torch.logspace(-1.9, 0, 12)
    after = left.mT @ orthogonal(left @ torch.diag(before / before.norm()) @ right.mT, dtype=torch.float32) @ right
    values = after.diagonal(dim1=1, dim2=2)
    assert float((before / before.norm()).min()) == pytest.approx(0.01, rel=0.1)
    assert float(values.min()) > 0.68
    assert float(values.max()) < 1.14
    torch.testing.assert_close(after, torch.diag_embed(values), atol=1e-4, rtol=0)


def test_in_bfloat16_it_is_the_same_within_its_rounding():
    torch.manual_seed(4)
    matrices = torch.randn(2, 24, 16)
    exact, rounded = (orthogonal(matrices, dtype=dtype) for dtype in (torch.float32, torch.bfloat16))
    assert rounded.dtype == torch.bfloat16
    assert float((exact - rounded).norm() / exact.norm()) < 0.03


@pytest.mark.gpu
def test_on_a_gpu_steps_are_those_of_the_cpu():
    """Of matrices within bfloat16, in which they are turned there: 1.6 % where the CPU does so."""
    start, found, expected = moved(muon, updates=0), moved(muon, device="cuda"), moved(muon)
    for name in found:
        share = 0.04 if name in orthogonal_names(Layers()) else 1e-5
        assert (found[name] - expected[name]).norm() < share * (expected[name] - start[name]).norm(), name


def test_a_gradient_of_nothing_only_decays_and_none_leaves_a_matrix_as_it_was():
    model = Layers()
    decaying, kept = (layer.weight for layer in model.wide)
    decaying.grad = torch.zeros_like(decaying)
    expected, before = decaying.detach() * (1 - 0.02 * 0.5), kept.detach().clone()
    muon(model, weight_decay=0.5).step()
    torch.testing.assert_close(decaying.detach(), expected)
    assert torch.equal(kept, before)


# --- runs ---

#: What a run may be besides plain.
KINDS = {
    "plain": {},
    "in micro-batches": {"micro_batch": 3},
    "in fp16, whose gradients are scaled": {"precision": "fp16"},
    "without averages": {"ema_decay": 0.0, "schedule": "constant"},
}


def tensors(paths, run: str) -> Iterator[tuple[str, torch.Tensor]]:
    last = CheckpointStore(paths.fold_dir(run, 0) / "checkpoints").load_newest()
    assert last.meta["progress"]["updates"] == 12
    yield from last.weights.items()
    yield from last.training.items()
    for index, moments in last.state["optimizer"]["state"].items():
        yield from ((f"{index} {name}", moment) for name, moment in moments.items())


@pytest.mark.parametrize("kind", KINDS)
def test_a_stopped_run_ends_with_the_bits_of_a_whole_one(paths, kind):
    config = tiny.config(optimizer="muon", **KINDS[kind])
    fit(paths, config, run=WHOLE)
    with pytest.raises(StoppedError):
        fit(paths, config, max_steps=5)
    fit(paths, config)
    whole, stopped = (dict(tensors(paths, run)) for run in (WHOLE, tiny.RUN))
    assert {name.split()[1] for name in whole if " " in name} == {"momentum", "exp_avg", "exp_avg_sq", "step"}
    assert whole.keys() == stopped.keys()
    assert [name for name in whole if not torch.equal(whole[name], stopped[name])] == []


def test_a_batch_whose_gradients_are_not_finite_changes_nothing(paths, inject):
    inject(tiny.at_calls(lambda x_BLD: x_BLD * float("nan"), {2}))
    report = fit(paths, tiny.config(optimizer="muon"))
    assert report.facts["guard"]["skips"] == 1
    last = CheckpointStore(paths.fold_dir(tiny.RUN, 0) / "checkpoints").load_newest()
    assert last.meta["progress"]["updates"] == 11
    assert all(bool(torch.isfinite(tensor).all()) for tensor in last.training.values())


def test_a_checkpoint_of_timms_is_refused_in_a_sentence():
    model = tiny.TinyModel()
    saved = muon(model).state_dict()
    for group in saved["param_groups"]:
        del group["orthogonal"]
    with pytest.raises(ConfigError, match=r"begun with timm's 'muon', .* Next: TAG=<name> for a new run"):
        muon(model).load_state_dict(saved)
