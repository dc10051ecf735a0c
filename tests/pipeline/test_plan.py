"""The memory plan against what a step really takes, and its suggestions against itself."""

import json
import subprocess
import sys
from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from rich.console import Console

from models.registry import create_model
from pipeline import memory, plan
from pipeline.config import RunConfig, config_from_dict, load_config
from pipeline.errors import StorageError
from pipeline.measure import held_mib, peak_mib
from pipeline.memory import Free
from pipeline.paths import REPOSITORY
from pipeline.plan import Need, Step, estimate, make_plan
from pipeline.training.muon import Muon
from pipeline.training.optim import make_optimizer
from pipeline.training.precision import Precision

CPU = torch.device("cpu")
FP32 = Precision("fp32", "")
FAMILIES = ("drsn", "hyena", "ribonanza_mamba", "transformer_sepconv")

#: prints the most MiB that three training steps add to a process that has taken a small one: what the first one needs
#: depends on where the heap has gaps, by a fifth from run to run; for each case in a process that is forked for it
_REAL = """
import json, os, sys, torch
from models.interface import RnaInputs
from models.registry import create_model
from pipeline.config import load_config
from pipeline.measure import held_mib, peak_mib
torch.set_num_threads(1)
def measure(name, every, batch, length):
    config = load_config(name).model
    model = create_model(config.name, **config.kwargs)
    def step(*shape):
        bpp = torch.zeros(*shape, shape[1]) if model.uses_bpp else None
        inputs = RnaInputs(torch.zeros(shape, dtype=torch.long), torch.ones(shape, dtype=torch.bool), bpp)
        model(inputs).values_BLC.sum().backward()
    step(1, 16)
    model.set_gradient_checkpointing(every)
    model.zero_grad()
    before = held_mib()
    for _ in range(3):
        model.zero_grad()
        step(batch, length)
    return peak_mib() - before
for case in json.loads(sys.argv[1]):
    if os.fork() == 0:
        print(measure(*case), flush=True)
        os._exit(0)
    assert os.wait()[1] == 0
"""
CASES = [*((family, 0) for family in FAMILIES), ("transformer_sepconv", 1)]


@pytest.fixture(scope="module")
def real_peaks() -> dict[tuple[str, int], float]:
    """MiB of each case, in processes of one that imports torch once."""
    cases = [(f"small_{family}", every, 32, 177) for family, every in CASES]
    command = [sys.executable, "-c", _REAL, json.dumps(cases)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY)
    assert done.returncode == 0, done.stderr
    return dict(zip(CASES, map(float, done.stdout.splitlines()), strict=True))


@cache  # what is made of the same network is counted once
def build(name: str, **changes: int | bool):
    config = load_config(name).model
    return partial(create_model, config.name, **{**config.kwargs, **changes})


def need(name: str, *, batch: int = 2, length: int = 48, every: int = 0, accumulates: bool = False, **changes):
    step = Step(micro_batch=batch, length=length, gradient_checkpointing=every, accumulates=accumulates)
    return estimate(build(name, **changes), step, precision=FP32, device=CPU, averaged=True)


def test_planning_leaves_random_numbers_alone_also_beside_several_gpus(monkeypatch):
    """Each process of a run said: "CUDA reports that you have 2 available devices, and you have used fork_rng ..."."""
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    before = torch.get_rng_state()
    need("tiny_drsn")
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.skipif(sys.platform != "linux", reason="reads the peak from /proc")
@pytest.mark.parametrize(("family", "every"), CASES)
def test_estimate_is_within_a_quarter_of_the_real_peak(real_peaks, family: str, every: int):
    found = need(f"small_{family}", batch=32, length=177, every=every)
    planned = found.gradients + found.activations + found.heap
    assert planned / 2**20 == pytest.approx(real_peaks[family, every], rel=0.25)


def test_live_bytes_are_those_of_distinct_storages():
    with plan._LiveBytes(most=None) as live:
        kept = torch.zeros(1000)
        freed = torch.zeros(500) + 1  # two storages, one of them gone at once
        view = kept[10:]
        assert live.now == 4 * 1500
        del freed
        assert live.now == 4 * 1000
        del kept
        assert live.now == 4 * 1000  # the view holds it
        del view
    assert (live.now, live.peak) == (0, 4 * 2000)


@pytest.mark.parametrize("family", FAMILIES)
def test_parameters_moments_and_averages_are_counted_exactly(family: str):
    found = need(f"tiny_{family}")
    model = build(f"tiny_{family}")()
    parameters = sum(parameter.numel() for parameter in model.parameters())
    buffers = sum(buffer.numel() * buffer.element_size() for buffer in model.buffers())
    assert found.parameters == parameters
    assert (found.gradients, found.optimizer) == (4 * parameters, 8 * parameters)
    assert found.weights == found.average == 4 * parameters + buffers


@pytest.mark.parametrize(("name", "most"), [("adamw", 2.0), ("muon", 1.7)])
@pytest.mark.parametrize("family", FAMILIES)
def test_moments_are_those_of_the_optimiser_that_is_chosen(family: str, name: str, most: float):
    """All were counted as AdamW's two, and Muon keeps one of hidden matrices."""
    planned = planned_with(name, f"tiny_{family}")
    model = build(f"tiny_{family}")()
    optimizer = make_optimizer(model, lr=1e-3, weight_decay=0.1, name=name)
    for parameter in model.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    numbers = sum(moment.numel() for found in optimizer.state.values() for moment in found.values() if moment.ndim)
    assert planned.optimizer == 4 * numbers <= most * planned.gradients


def test_an_optimiser_that_needs_real_numbers_is_counted_as_two_moments(monkeypatch):
    def asks(self: torch.optim.Optimizer, closure: None = None) -> None:
        float(self.param_groups[0]["params"][0].detach().sum())

    monkeypatch.setattr(Muon, "step", asks)
    plan._moment_bytes.cache_clear()
    found = planned_with("muon", "tiny_drsn")
    assert found.optimizer == 2 * found.gradients


def planned_with(optimizer: str, name: str) -> Need:
    step = Step(micro_batch=2, length=48, gradient_checkpointing=0, accumulates=False)
    return estimate(build(name), step, precision=FP32, device=CPU, averaged=True, optimizer=optimizer)


@pytest.mark.parametrize("family", FAMILIES)
def test_activations_grow_with_batch_and_length_and_shrink_with_recomputation(family: str):
    name = f"small_{family}"
    plain = need(name, batch=8).activations
    assert need(name, batch=16).activations > 1.6 * plain
    assert need(name, batch=8, length=96).activations > 1.6 * plain
    assert need(name, batch=8, every=1).activations < 0.8 * plain


def test_a_network_that_cannot_run_on_fake_tensors_is_extrapolated():
    """A packed recurrent head needs the lengths themselves."""
    linear, recurrent = (
        need("small_transformer_sepconv", batch=8, length=300, gru_head=gru).activations for gru in (False, True)
    )
    assert recurrent == pytest.approx(linear, rel=0.1)


def test_planning_leaves_the_random_numbers_alone():
    before = torch.get_rng_state()
    need("tiny_hyena", gru_head=True)
    assert torch.equal(torch.get_rng_state(), before)


def small_run(**train: int | str) -> RunConfig:
    tree = {"model": {"name": "hyena"}, "data": {"max_length": 128}, "train": {"batch_size": 32, **train}}
    return config_from_dict(tree, where="test")


@pytest.mark.parametrize("share", [0.7, 0.5, 0.3])
def test_a_refusal_names_settings_that_fit(share: float):
    config, network = small_run(), build("small_hyena")
    total = make_plan(config, network, device=CPU, available=Free(2**50, "")).need.total
    refused = make_plan(config, network, device=CPU, available=Free(int(share * total), ""))
    assert not refused.fits
    assert refused.fitting is not None
    step, _ = refused.fitting
    settings = {"micro_batch": step.micro_batch, "gradient_checkpointing": step.gradient_checkpointing}
    again = make_plan(small_run(**settings), network, length=step.length, device=CPU, available=refused.available)
    assert again.fits
    with pytest.raises(StorageError, match=rf"needs about .* free on cpu.*Next: set .*{step.micro_batch}"):
        refused.require_fit()


def test_a_tenth_of_what_is_free_is_spared():
    """A run on 22.4 GiB was let go with "needs about 22.2 GiB", and took it all."""
    planned = partial(make_plan, small_run(), build("tiny_hyena"), device=CPU)
    total = planned(available=Free(2**50, "")).need.total
    assert not planned(available=Free(int(total / 0.91), "")).fits
    assert planned(available=Free(int(total / 0.89), "")).fits


def test_a_small_network_needs_something():
    """`make plan` said "weights 0 MiB"."""
    console = Console(width=100)
    planned = make_plan(small_run(), build("tiny_hyena"), device=CPU)
    with console.capture() as captured:
        console.print(planned.table())
    (told,) = [line.split() for line in captured.get().splitlines() if line.startswith("weights")]
    assert told[1:] == [f"{planned.need.weights / 2**10:.0f}", "KiB"]


def test_processes_share_the_memory_of_a_machine(monkeypatch):
    """Each of 8 was compared with all of it."""
    monkeypatch.setattr(memory, "_machine_bytes", lambda: 8 * 2**30)
    found = [make_plan(small_run(), build("tiny_hyena"), device=CPU, processes=n).available for n in (1, 8)]
    assert found == [Free(8 * 2**30, ""), Free(2**30, "")]


def test_what_no_setting_can_help_is_refused_with_that_sentence():
    refused = make_plan(small_run(), build("small_hyena"), device=CPU, available=Free(2**20, "ulimit -v"))
    with pytest.raises(
        StorageError, match=r"free on cpu \(limit: ulimit -v\): .*nothing smaller fits\. Next: take a smaller network"
    ):
        refused.require_fit()


def test_a_plan_is_for_the_sequences_that_training_sees():
    network = build("tiny_hyena")
    assert make_plan(small_run(), network, sequences=5, device=CPU).step.micro_batch == 5
    assert make_plan(small_run(), network, sequences=500, device=CPU).step.micro_batch == 32
    lengths = [make_plan(small_run(), network, length=n, device=CPU).step.length for n in (50, 128, 4000)]
    assert lengths == [50, 128, 128]


def test_a_process_of_several_needs_memory_for_its_share_of_the_batch():
    network = build("tiny_hyena")
    shares = [
        make_plan(small_run(), network, sequences=30, processes=n, device=CPU).step.micro_batch for n in (1, 4, 7)
    ]
    assert shares == [30, 8, 5]
    assert make_plan(small_run(micro_batch=8), network, processes=4, device=CPU).step.accumulates is False
    assert make_plan(small_run(micro_batch=8), network, processes=2, device=CPU).step.accumulates
    line = make_plan(small_run(), network, processes=4, device=CPU).line()
    assert "free on cpu in each of 4 processes: 8 sequences of 128 nt" in line
    assert ": 1 sequence of 128 nt" in make_plan(small_run(micro_batch=1), network, device=CPU).line()


def test_a_process_of_a_sharded_run_needs_its_part_of_the_states_and_two_blocks():
    network, config = build("small_hyena"), small_run(sharding="fsdp2")
    alone, whole, part = (
        make_plan(settings, network, processes=n, device=CPU)
        for settings, n in ((config, 1), (small_run(), 4), (config, 4))
    )
    assert alone.step == make_plan(small_run(), network, device=CPU).step, "one process has nobody to share with"
    for name in ("weights", "gradients", "optimizer", "average"):
        assert getattr(part.need, name) == pytest.approx(getattr(whole.need, name) / 4, abs=8)
    assert part.need.activations == whole.need.activations
    blocks = [4 * sum(x.numel() for x in block.parameters()) for block in network().blocks]
    outer = whole.need.gradients - sum(blocks)
    assert (whole.need.together, part.need.together) == (0, 2 * (outer + 2 * max(blocks)))
    assert "in each of 4 processes: 1/4 of the network, 8 sequences" in part.line()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_estimate_is_the_allocators_peak_on_a_gpu():
    """All of the process was compared: cuBLAS takes 32 MiB for itself, a fifth of this step, and tests leave theirs."""
    device, network = torch.device("cuda"), build("small_hyena")
    step = Step(micro_batch=32, length=177, gradient_checkpointing=0, accumulates=False)
    found = estimate(network, step, precision=FP32, device=device, averaged=False)
    model = network().to(device).train()

    def train(step: Step) -> None:
        model.zero_grad()
        with device:
            model(plan._inputs(step, model)).values_BLC.sum().backward()

    train(replace(step, micro_batch=1, length=16))
    model.zero_grad()
    before = held_mib()
    train(step)
    assert (found.gradients + found.activations) / 2**20 == pytest.approx(peak_mib() - before, rel=0.15)
