"""A network in parts, one for each process, trains, stops and is saved as a whole one is."""

import contextlib
import importlib
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, distributed, nn

from models.interface import RnaInputs, RnaModel
from models.registry import create_model
from pipeline import train
from pipeline.config import TrainConfig, load_config
from pipeline.errors import ConfigError
from pipeline.training import sharding
from pipeline.training.checkpoint import Checkpoint, CheckpointStore
from pipeline.training.distributed import World
from pipeline.training.optim import decay_groups
from pipeline.training.precision import Precision
from pipeline.training.settings import check_sharding
from pipeline.training.state import TrainingState
from tests.pipeline import tiny
from tests.pipeline.ranks import Scene, codes, everything, fixtures, losses, rows, run_name

pytestmark = pytest.mark.slow
CPU = torch.device("cpu")
NETWORKS = ("drsn", "hyena", "ribonanza_mamba", "transformer_sepconv")
WHOLE = {"model": {"dropout": 0.0}, "epochs": 5, "micro_batch": 3}  # 20 steps, two passes each in one of two processes
PARTS = {**WHOLE, "sharding": "fsdp2"}

#: What processes do, in this order.
SCENES: list[Scene] = [
    ("alone", 1, WHOLE, None),
    ("both", 2, PARTS, None),
    ("killed", 2, PARTS, [1, 12, "SIGKILL"]),
    ("killed", 2, PARTS, None),
    ("regrouped", 2, PARTS, [1, 12, "SIGTERM"]),
    ("regrouped", 1, WHOLE, [0, 12, "SIGTERM"]),
    ("regrouped", 3, PARTS, None),
    ("hung", 2, PARTS, [1, 12, "hang"]),
    ("one with a NaN", 2, {"sharding": "fsdp2", "epochs": 2}, [1, 6, "nan"]),
    ("one with a NaN gradient", 2, {"sharding": "fsdp2", "epochs": 2}, [1, 6, "nan gradient"]),
    ("out of memory", 2, PARTS, [1, 12, "memory"]),
    ("short batches", 3, {"sharding": "fsdp2", "batch_size": 2, "epochs": 1, "precision": "fp16"}, None),
]

paths, ended = fixtures(SCENES)


def test_two_processes_with_half_a_network_each_give_the_losses_of_one(paths, ended):
    assert codes([*ended("alone"), *ended("both")]) == [[0], [0, 0]]
    assert len(losses(paths, "alone")) == 20
    np.testing.assert_allclose(losses(paths, "both"), losses(paths, "alone"), atol=1e-5)
    norms, metrics = (
        [[row[key] for row in rows(paths, run, event)] for run in ("alone", "both")]
        for event, key in (("step", "grad_norm"), ("epoch", "metric"))
    )
    np.testing.assert_allclose(*norms, rtol=1e-4)
    np.testing.assert_allclose(*metrics, atol=1e-5)


def test_a_killed_process_ends_the_others_and_the_rerun_ends_with_the_same_bits(paths, ended):
    assert codes(ended("killed")) == [[75, -9], [0, 0]]
    ended("both")
    assert everything(paths, "killed") == everything(paths, "both")


def test_a_run_goes_on_whole_in_one_process_and_in_parts_in_three(paths, ended):
    assert codes(ended("regrouped")) == [[75, 75], [75], [0, 0, 0]]
    starts = [(row["resumed_step"], row["processes"]) for row in rows(paths, "regrouped", "start")]
    assert [processes for _, processes in starts] == [2, 1, 3]
    assert 0 == starts[0][0] < starts[1][0] < starts[2][0] < 20
    np.testing.assert_allclose(losses(paths, "regrouped"), losses(paths, "alone"), atol=1e-5)


def test_a_checkpoint_holds_what_that_of_one_process_holds(paths, ended):
    last = []
    for name in ("alone", "both"):
        assert codes(ended(name))[-1][0] == 0
        last.append(CheckpointStore(paths.fold_dir(run_name(name), 0) / "checkpoints").load_newest())
    alone, both = last
    assert shapes(both.weights) == shapes(alone.weights)
    assert shapes(both.training) == shapes(alone.training)
    assert shapes(both.state["optimizer"]["state"]) == shapes(alone.state["optimizer"]["state"])
    assert both.state["optimizer"]["param_groups"] == alone.state["optimizer"]["param_groups"]
    assert both.meta.keys() == alone.meta.keys()


def shapes(tree: Any) -> Any:
    return {key: shapes(value) for key, value in tree.items()} if isinstance(tree, dict) else tree.shape


def test_a_hung_process_is_lost_after_the_timeout(ended):
    assert codes(ended("hung")) == [[75, -9]]


def test_a_nan_in_one_process_is_skipped_by_all(paths, ended):
    assert codes(ended("one with a NaN")) == [[0, 0]]
    (row,) = rows(paths, "one with a NaN", "guard")
    assert (row["seen"], row["answer"], row["step"], row["module"]) == ("nonfinite_loss", "skip", 6, "fault")
    assert len(row["ids"]) == row["sequences"] == 8, "the whole batch"


def test_a_nan_that_begins_in_the_gradient_of_a_parameter_is_named(paths, ended):
    """Gradients are sums over all processes: the guard said "not seen again in a replay" of one that was NaN in one."""
    assert codes(ended("one with a NaN gradient")) == [[0, 0]]
    (row,) = rows(paths, "one with a NaN gradient", "guard")
    assert (row["seen"], row["answer"], row["step"]) == ("nonfinite_grad", "skip", 6)
    assert (row["phase"], row["module"]) == ("backward", "heads.per_base.weight")


def test_memory_that_runs_out_in_one_process_ends_the_others_with_what_it_said(ended):
    """The others are in the middle of the same pass, where nothing but its end reaches them."""
    (end,) = ended("out of memory")
    assert end["codes"] == [5, 5]
    assert "0: StorageError: cpu is out of memory at step 6 with micro-batches of 3 sequences" in end["said"]


def test_a_process_without_a_sequence_of_a_batch_makes_the_passes_of_the_others(ended):
    """Batches of two sequences for three processes, with a loss scaler."""
    assert codes(ended("short batches")) == [[0, 0, 0]]


def test_what_parts_need_is_loaded_where_there_are_parts():
    """Every start loaded sympy with it: 0.7 s of processor time."""
    code = "import sys, pipeline.train; sys.exit(bool({'sympy', 'torch.distributed.fsdp'} & sys.modules.keys()))"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_one_process_says_that_it_keeps_the_whole_network(paths, monkeypatch, capfd):
    tiny.register(monkeypatch)
    where = {"competition": tiny.TINY, "paths": paths, "run": run_name("single"), "split": tiny.SPLIT, "fold": 0}
    train.run(tiny.config(sharding="fsdp2", epochs=1), **where)
    said = capfd.readouterr()
    assert "a single process keeps the whole network" in said.out + said.err
    assert "warning" not in said.out + said.err


@contextlib.contextmanager
def group(backend: str, *, size: int) -> Iterator[World]:
    store = distributed.HashStore()
    distributed.init_process_group(backend, store=store, rank=0, world_size=size)
    try:
        yield World(size=size, store=store)
    finally:
        distributed.destroy_process_group()


@pytest.fixture
def world() -> Iterator[World]:
    """One that all collectives run through, and nobody else is in."""
    with group("gloo", size=1) as world:
        yield world


def network(name: str, **changes: Any) -> RnaModel:
    torch.manual_seed(1)
    config = load_config(f"tiny_{name}").model
    return create_model(config.name, **{**config.kwargs, "dropout": 0.0, **changes}).train()


def batch(*, bpp: bool) -> RnaInputs:
    generator = torch.Generator().manual_seed(2)
    mask_BL = torch.arange(37) < torch.tensor([[37], [21]])
    bpp_BLL = torch.rand(2, 37, 37, generator=generator) / 40 if bpp else None
    if bpp_BLL is not None:
        bpp_BLL = (bpp_BLL + bpp_BLL.mT).triu(1) + (bpp_BLL + bpp_BLL.mT).tril(-1)
    return RnaInputs(torch.randint(4, (2, 37), generator=generator), mask_BL, bpp_BLL)


def gradients(model: RnaModel, inputs: RnaInputs, *, bf16: bool) -> dict[str, Tensor]:
    model.zero_grad()
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
        outputs = model(inputs)
    sum(x.square().sum() for x in outputs if x is not None).backward()
    return {name: sharding.whole(x.grad, keep=True) for name, x in model.named_parameters()}


@pytest.mark.parametrize("name", NETWORKS)
@pytest.mark.parametrize(("bf16", "every"), [(False, 0), (True, 0), (False, 1), (False, 2)])
def test_a_network_in_blocks_has_the_gradients_of_a_whole_one(world, name: str, bf16: bool, every: int):
    """Custom operators, autocast and recomputed blocks included: inside a block its parameters are plain tensors."""
    model, inputs = network(name), batch(bpp=False)
    expected = gradients(model, inputs, bf16=bf16)
    sharding.shard(model, CPU)
    model.set_gradient_checkpointing(every)
    found = gradients(model, inputs, bf16=bf16)
    assert found.keys() == expected.keys()
    for key, grad in found.items():
        torch.testing.assert_close(grad, expected[key], rtol=1e-5, atol=1e-5, msg=key)


def test_heads_that_keep_their_own_list_of_weights_and_pair_features_are_sharded_too(world):
    changes = {"gru_head": True, "use_bpp": True, "pair_width": 8, "num_distance_bins": 4, "coordinates": True}
    model, inputs = network("transformer_sepconv", **changes), batch(bpp=True)
    expected = gradients(model, inputs, bf16=False)
    sharding.shard(model, CPU)
    for key, grad in gradients(model, inputs, bf16=False).items():
        torch.testing.assert_close(grad, expected[key], rtol=1e-4, atol=1e-4, msg=key)


@pytest.mark.parametrize("name", NETWORKS)
def test_what_does_not_decay_is_the_same_in_parts(world, name: str):
    model = network(name)
    whole = undecayed(model)
    sharding.shard(model, CPU)
    assert undecayed(model) == whole


def undecayed(model: nn.Module) -> set[str]:
    _, kept = decay_groups(model, weight_decay=1.0)
    chosen = {id(parameter) for parameter in kept["params"]}
    return {name for name, parameter in model.named_parameters() if id(parameter) in chosen}


def test_no_more_than_the_outer_parameters_and_two_blocks_are_whole_at_one_time(world):
    model, held = network("drsn", depth=6), list[int]()
    sizes = [sum(x.numel() for x in block.parameters()) for block in model.blocks]
    outer = sum(x.numel() for x in model.parameters()) - sum(sizes)
    sharding.shard(model, CPU)

    def count(*_: Any) -> None:
        held.append(sum(x.numel() for x in model.parameters() if not sharding.is_sharded(x)))

    for block in model.blocks:
        block.dropout.register_forward_hook(count)
        block.dropout.register_full_backward_hook(count)
    gradients(model, batch(bpp=False), bf16=False)
    assert len(held) == 2 * len(sizes)
    assert outer < max(held) <= outer + 2 * max(sizes)
    assert all(sharding.is_sharded(x) for x in model.parameters())


@pytest.mark.parametrize("size", [2, 8])
def test_a_process_holds_its_part_of_weights_averages_moments_and_gradients(size: int):
    """Where "fake" collectives come back without the others; what a checkpoint restores is held in parts as well."""
    importlib.import_module("torch.testing._internal.distributed.fake_pg")
    model = network("transformer_sepconv")
    numbers = sum(parameter.numel() for parameter in model.parameters())
    with group("fake", size=size) as world:
        where = {"device": CPU, "precision": Precision("fp32", ""), "world": world}
        state = TrainingState(model, settings=TrainConfig(sharding="fsdp2", lr=0.0), **where)
        gradients(model, batch(bpp=False), bf16=False)
        state.optimizer.step()
        before = held(state)
        weights, training, rest = state.tensors()
        state.restore(Checkpoint(Path(), {}, weights, training, rest))
        assert held(state) == before
    assert before == pytest.approx(5 * 4 * numbers / size, rel=0.03)


def held(state: TrainingState) -> int:
    """Bytes of storage behind a process's weights, gradients, averages and moments."""
    parameters = list(state.model.parameters())
    moments = [moment for moments in state.optimizer.state.values() for moment in moments.values() if moment.ndim]
    found = [*parameters, *(x.grad for x in parameters), *state.predictor.parameters(), *moments]
    storages = [tensor.untyped_storage() for tensor in sharding.local(found)]
    return sum({storage.data_ptr(): storage.nbytes() for storage in storages}.values())


def test_an_automatic_micro_batch_is_refused_in_parts(world):
    settings = TrainConfig(sharding="fsdp2", micro_batch="auto")
    with pytest.raises(ConfigError, match=r"micro_batch = 'auto' with sharding = 'fsdp2'.* Next: give a number"):
        check_sharding(settings, world)
