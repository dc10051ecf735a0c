"""Whole networks: tokens a second in training and prediction, and memory a sequence, with RibonanzaNet beside them.

Every cell (network, length, precision, gradient checkpointing) is a process of its own. The peer is an independent
implementation of its published architecture with random weights (``tests/benchmarks/peers/ribonanzanet.py``).
``python -m pipeline.bench_models`` needs this repository and torch alone.
"""

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from models.interface import RnaInputs
from models.registry import create_model
from pipeline import measure
from pipeline.config import load_config
from pipeline.measure import Promise
from pipeline.memory import free_bytes
from pipeline.training.optim import make_optimizer
from pipeline.training.precision import choose_device, choose_precision

PEER = "RibonanzaNet"

_LENGTH = 177  # nt, most of Ribonanza's training sequences
_THREADS = 2
_BASES = ("ribonanza_mamba", "transformer_sepconv", "hyena", "drsn")
_SMALL = tuple(f"small_{name}" for name in _BASES)
_PEER_GIB = 5.4  # that a sequence takes in training, in fp32
_SHARE = "memory a sequence in training, share of the peer's"
_MILLION = 1_000_000

Size = Literal["full", "tiny"]
Cell = dict[str, Any]


def run(*, size: Size = "full", rounds: int = 2, record: Path | None = None) -> list[dict[str, Any]]:
    """Measure, print a table and the promises, and write both as JSON.

    Args:
        size: "tiny" shows in a few seconds that everything works.
        rounds: how often each cell is measured, in turn; the median counts.
        record: JSON file; None = ``tests/benchmarks/models-<class>.json``.

    Returns:
        One dict a cell: model, parameters, batch, length, precision, checkpointing, forward and train (tokens/s),
        peak_mib (of a training step, a sequence), forward_peak_mib.
    """
    on_gpu = torch.cuda.is_available()
    cells = _tiny_cells() if size == "tiny" else _cuda_cells() if on_gpu else _cpu_cells()
    results = measure.interleave(cells, module="pipeline.bench_models", rounds=rounds, slow=45.0, pythons={})
    rows = [_row(cell, result) for cell, result in zip(cells, results, strict=True)]
    promises = _cuda_promises(rows) if on_gpu else _cpu_promises(rows)
    measure.publish(rows, stem="models", promises=promises, record=record, threads=None if on_gpu else _THREADS)
    return rows


def _tiny_cells() -> list[Cell]:
    return [_cell("tiny_ribonanza_mamba", batch=2, length=16), _cell("tiny_hyena", batch=2, length=16, checkpointing=1)]


def _cpu_cells() -> list[Cell]:
    cells = [_cell("ribonanza_mamba", batch=16), _cell(PEER, batch=_peer_batch()), _cell("small_ribonanza_mamba")]
    cells += [_cell(name, batch=16) for name in _BASES[1:]] + [_cell(name) for name in _SMALL[1:]]
    cells += [_cell(name, batch=16, checkpointing=1) for name in _BASES]
    cells += [_cell(name, batch=8, length=512) for name in _BASES]
    return [*cells, _cell("ribonanza_mamba", batch=16, precision="bf16")]


def _cuda_cells() -> list[Cell]:
    half = choose_precision("bf16", torch.device("cuda")).name  # fp16 where bf16 is only emulated
    cells = [_cell(name, batch=64, precision=half) for name in (*_BASES, PEER)]
    # the peer's step may not fit at 64 sequences; then it is compared at the largest batch that does
    cells += [_cell(PEER, batch=batch, precision=half) for batch in (32, 16, 8)]
    cells += [_cell(name, batch=64, precision=half, checkpointing=1) for name in _BASES]
    cells += [_cell(name, batch=16, length=1024, precision=half) for name in _BASES[:3]]
    cells += [_cell(f"large_{name}", batch=64, precision=half) for name in _BASES]
    lengths = (_MILLION // 2, _MILLION)
    return cells + [_cell("hyena", batch=1, length=n, precision=half, checkpointing=1) for n in lengths]


def _cell(
    model: str, *, batch: int = 32, length: int = _LENGTH, precision: str = "fp32", checkpointing: int = 0
) -> Cell:
    threads = 0 if torch.cuda.is_available() else _THREADS
    shape = {"model": model, "batch": batch, "length": length, "precision": precision}
    return shape | {"checkpointing": checkpointing, "threads": threads}


def _peer_batch() -> int:
    """Two sequences, or one where there is no memory for two."""
    return 2 if free_bytes().size > 2.2 * _PEER_GIB * 2**30 else 1


# --- one measurement, in its own process ---


def measure_cell(cell: Cell) -> dict[str, float]:
    """Parameters, tokens/s and MiB a sequence, of prediction and of a training step."""
    if cell["threads"]:
        torch.set_num_threads(cell["threads"])
    device, batch, length = choose_device(), cell["batch"], cell["length"]
    precision = choose_precision(cell["precision"], device)
    with device:
        model, call = _build(cell)
        model.to(device)
        optimizer = make_optimizer(model, lr=1e-4, weight_decay=0.01)

        def predict(inputs: RnaInputs) -> None:
            with torch.inference_mode(), precision.autocast(device):
                call(inputs)

        def train(inputs: RnaInputs) -> None:
            optimizer.zero_grad(set_to_none=True)
            with precision.autocast(device):
                predicted = call(inputs)
            predicted.float().square().mean().backward()
            optimizer.step()

        train(_inputs(1, 16, bpp=getattr(model, "uses_bpp", False)))  # kernels are chosen, moments allocated
        inputs = _inputs(batch, length, bpp=getattr(model, "uses_bpp", False))
        before = measure.held_mib()
        seconds = measure.seconds(lambda: predict(inputs), at_least=2.0)
        found = {"forward": batch * length / seconds, "forward_peak_mib": (measure.peak_mib() - before) / batch}
        model.train()
        seconds = measure.seconds(lambda: train(inputs), at_least=3.0)
        found |= {"train": batch * length / seconds, "peak_mib": (measure.peak_mib() - before) / batch}
    return found | {"parameters": sum(parameter.numel() for parameter in model.parameters())}


def _build(cell: Cell) -> tuple[nn.Module, Callable[[RnaInputs], Tensor]]:
    """A network in eval mode, and what calls it."""
    torch.manual_seed(0)
    if cell["model"] == PEER:
        peer = measure.load_peer("ribonanzanet").RibonanzaNet().eval()
        return peer, lambda inputs: peer(inputs.tokens_BL, inputs.mask_BL)
    config = load_config(cell["model"]).model
    model = create_model(config.name, **config.kwargs).eval()
    model.set_gradient_checkpointing(cell["checkpointing"])

    def call(inputs: RnaInputs) -> Tensor:
        values_BLC = model(inputs).values_BLC
        assert values_BLC is not None
        return values_BLC

    return model, call


def _inputs(batch: int, length: int, *, bpp: bool) -> RnaInputs:
    tokens_BL = torch.randint(4, (batch, length))
    bpp_BLL = torch.zeros(batch, length, length) if bpp else None
    return RnaInputs(tokens_BL, torch.ones(batch, length, dtype=torch.bool), bpp_BLL)


# --- what follows from the measurements ---


def _row(cell: Cell, result: dict[str, Any] | None) -> dict[str, Any]:
    row = {"model": cell["model"], "parameters": None if result is None else int(result["parameters"])}
    row |= {key: cell[key] for key in ("batch", "length", "precision", "checkpointing")}
    measured = ("forward", "train", "peak_mib", "forward_peak_mib")
    return row | {key: None if result is None else round(result[key], 1) for key in measured}


def _find(rows: list[dict[str, Any]], model: str, **wanted: Any) -> dict[str, Any] | None:
    """The first row of a network at the usual length that was measured."""
    wanted = {"model": model, "length": _LENGTH, "checkpointing": 0} | wanted
    fitting = (row for row in rows if all(row[key] == value for key, value in wanted.items()))
    return next((row for row in fitting if row["train"] is not None), None)


def _cpu_promises(rows: list[dict[str, Any]]) -> list[Promise]:
    ours, small, peer = (_find(rows, name, precision="fp32") for name in (_BASES[0], _SMALL[0], PEER))
    promises = [] if small is None else [Promise("small_ribonanza_mamba trains, tokens/s", small["train"], 1500)]
    if ours is None or peer is None:
        return promises
    return [
        Promise(f"ribonanza_mamba trains, times {PEER}'s tokens/s", ours["train"] / peer["train"], 20),
        Promise(f"ribonanza_mamba predicts, times {PEER}'s tokens/s", ours["forward"] / peer["forward"], 10),
        Promise(_SHARE, ours["peak_mib"] / peer["peak_mib"], 0.1, True),
        *promises,
    ]


def _cuda_promises(rows: list[dict[str, Any]]) -> list[Promise]:
    ours, again = (_find(rows, _BASES[0], batch=64, checkpointing=every) for every in (0, 1))
    peer, promises = _find(rows, PEER), []
    if ours and peer:
        promises = [
            Promise(f"ribonanza_mamba trains, times {PEER}'s tokens/s", ours["train"] / peer["train"], 5),
            Promise(_SHARE, ours["peak_mib"] / peer["peak_mib"], 0.5, True),
        ]
    if ours and again:
        promises.append(Promise("gradient checkpointing, extra time", ours["train"] / again["train"] - 1, 0.35, True))
    million = _find(rows, "hyena", length=_MILLION, checkpointing=1)
    return [*promises, Promise("hyena trains at a million nt, tokens/s", million["train"] if million else 0, 1)]


if __name__ == "__main__":
    if len(sys.argv) > 1:
        measure.answer(measure_cell)
    else:
        run()
