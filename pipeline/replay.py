"""A batch that training left out, run again under observation: where it breaks, and in which precision it does not.

Nothing is written and no weight is changed; the run may go on meanwhile.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from rich.console import Group
from rich.markup import escape
from rich.table import Table

from models.interface import RnaModel
from pipeline.batch import RnaBatch
from pipeline.competitions.base import Competition
from pipeline.config import config_from_dict
from pipeline.errors import ConfigError, DataError
from pipeline.inference import as_trained
from pipeline.labels import labels_of
from pipeline.network import build_model
from pipeline.paths import Paths
from pipeline.stage import Report
from pipeline.training.bad_batch import BadBatch, find_bad_batches, load_bad_batch
from pipeline.training.failures import fitting, in_one_sentence
from pipeline.training.guard import Activation, Origin, Seen, classify, find_origin
from pipeline.training.losses import training_loss
from pipeline.training.optim import gradients, total_norm
from pipeline.training.precision import Precision, choose_device
from pipeline.training.state import set_random
from pipeline.training.step import forward_backward

_RUNGS = ("fp16", "bf16", "fp32")
_BEFORE = 6  # modules shown before the one that broke
_LARGEST = 5  # modules shown for the magnitude of their output


@in_one_sentence("replay")
def run(
    *,
    competition: Competition,
    paths: Paths,
    run: str,
    fold: int,
    step: int | None = None,
    precision: str | None = None,
) -> Report:
    """Run a saved batch again: in the precision in which it failed, and in the others.

    Args:
        competition: the one that the run is trained on.
        paths: where runs are.
        run: name of the run.
        fold: the one whose training met the batch.
        step: of the batch; None = the last one that was saved.
        precision: ``fp16``, ``bf16`` or ``fp32`` alone; None = all, the one in which it failed first.

    Returns:
        ``built`` without outputs; facts: the batch, statistics of its inputs, and for each precision what was seen,
        where it began, and the activations.

    Raises:
        ConfigError: no batch of that step, unknown precision, or the run is of another competition.
        DataError: no batch was ever saved, or its file is damaged.
        StorageError: memory ran out, perhaps because training goes on beside.
        LostDeviceError: the device failed.
    """
    if precision not in (None, *_RUNGS):
        raise ConfigError(
            f"--precision: got {precision!r}; expected {', '.join(_RUNGS)}. Next: give one of these, or none."
        )
    path = _choose(paths, run=run, fold=fold, step=step)
    bad = load_bad_batch(path)
    if bad.meta["competition"] != competition.name:
        raise ConfigError(
            f"{path}: of {bad.meta['competition']}; expected {competition.name}. Next: COMP={bad.meta['competition']}."
        )
    competition, device = as_trained(competition, bad.meta), choose_device()
    model = _network(bad, competition, where=str(path)).to(device)
    rungs = [precision] if precision else sorted(_RUNGS, key=lambda name: name != bad.precision)
    facts = {
        "file": str(path),
        "step": bad.step,
        "epoch": bad.place[0],
        "batch": bad.place[1],
        "seen": bad.seen,
        "precision": bad.precision,
        "loss": bad.loss,
        "grad_norm": bad.grad_norm,
        "scale": bad.scale,
        "weights_step": bad.weights_step,
        "ids": [name for batch in bad.batches for name in batch.ids],
        "inputs": describe_inputs(bad.batches),
        "largest_weight": max((float(w.abs().max()), name) for name, w in bad.weights.items() if w.is_floating_point()),
        "passes": {name: _observe(model, bad, competition, Precision(name, "replay"), device) for name in rungs},
    }
    return Report(stage="replay", status="built", outputs={}, facts=facts)


def describe(facts: Mapping[str, Any]) -> Group:
    """What a replay found, for the terminal."""
    ids = facts["ids"]
    named = f"{', '.join(ids[:8])}{' …' if len(ids) > 8 else ''}"
    lines = [
        f"{facts['file']}: step {facts['step']} (epoch {facts['epoch']}, batch {facts['batch']}), seen in training: "
        f"{facts['seen'].replace('_', ' ')} in {facts['precision']}, loss {facts['loss']:.4g}, gradient norm "
        f"{facts['grad_norm']:.4g}",
        f"{len(ids)} sequences: {named}",
    ]
    if facts["weights_step"] != facts["step"]:
        lines.append(f"with the weights of step {facts['weights_step']}: those of the step itself were lost")
    failed = next(iter(facts["passes"].values()))
    return Group(
        *(escape(line) for line in lines),
        _inputs_table(facts["inputs"]),
        _passes_table(facts["passes"]),
        _activations_table(failed["activations"], title=f"outputs of modules in {next(iter(facts['passes']))}"),
        escape(_verdict(facts)),
    )


def describe_inputs(batches: Sequence[RnaBatch]) -> dict[str, Any]:
    """Statistics of what the network was given, by name; "nonfinite" counts values that must not be there."""
    lengths = torch.cat([batch.inputs.mask_BL.sum(dim=1) for batch in batches])
    cells = sum(batch.inputs.mask_BL.numel() for batch in batches)
    found: dict[str, Any] = {
        "sequences": len(lengths),
        "micro_batches": len(batches),
        "length": (int(lengths.min()), int(lengths.max())),
        "padding": 1 - int(lengths.sum()) / cells,
    }
    for name, tensors in {
        "target": [batch.target_BLC for batch in batches],
        "weight": [batch.weight_BC for batch in batches],
        "bpp": [batch.p_K for batch in batches],
        "features": [batch.inputs.features_BLF for batch in batches],
    }.items():
        values = [tensor[~torch.isnan(tensor)] for tensor in tensors if tensor is not None]
        if any(value.numel() for value in values):
            joined = torch.cat([value.flatten() for value in values])
            nonfinite = int(torch.isinf(joined).sum())
            found[name] = {"range": (float(joined.min()), float(joined.max())), "nonfinite": nonfinite}
    return found


def _choose(paths: Paths, *, run: str, fold: int, step: int | None) -> Any:
    folder = paths.fold_dir(run, fold) / "bad"
    found = find_bad_batches(folder)
    if not found:
        raise DataError(
            f"{folder}: no batch was saved; expected one that training left out. Next: make train "
            "saves them when it meets a NaN."
        )
    if step is not None and step not in found:
        kept = ", ".join(map(str, sorted(found)))
        raise ConfigError(
            f"--step {step}: no batch of that step in {folder}; expected one of {kept}. Next: STEP=<one of these>."
        )
    return found[next(iter(found)) if step is None else step]


def _network(bad: BadBatch, competition: Competition, *, where: str) -> RnaModel:
    model = build_model(config_from_dict(bad.meta["config"], where=where).model, competition, labels_of(bad.meta))
    with fitting(where):
        model.load_state_dict(dict(bad.weights))
    return model.train()


def _observe(
    model: RnaModel, bad: BadBatch, competition: Competition, precision: Precision, device: torch.device
) -> dict[str, Any]:
    """One forward and backward pass with the random numbers of training."""
    settings = config_from_dict(bad.meta["config"], where="the saved batch").train
    loss, scaler = training_loss(competition, settings, labels_of(bad.meta)), precision.scaler(device)
    if precision.name == bad.precision:
        scaler.load_state_dict({**scaler.state_dict(), "scale": bad.scale})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)  # the scaler unscales gradients through one
    how: dict[str, Any] = {"weight": bad.weight, "precision": precision, "scaler": scaler, "device": device}
    value = math.nan

    def replay() -> None:
        nonlocal value
        set_random(bad.random, device)
        value, _ = forward_backward(model, loss, bad.batches, **how)

    origin = find_origin(model, replay)
    scaler.unscale_(optimizer)
    norm = total_norm(gradients(model.parameters()))
    model.zero_grad(set_to_none=True)
    seen = classify(value, norm, scale=scaler.get_scale() if precision.scaled else None)
    return {"seen": seen, "loss": value, "grad_norm": norm, **_where(origin, seen), "activations": origin.activations}


def _where(origin: Origin, seen: Seen) -> dict[str, str]:
    found = origin.phase != "unknown" and seen != "finite"
    return {"phase": origin.phase if found else "", "module": origin.module if found else ""}


def _verdict(facts: Mapping[str, Any]) -> str:
    passes, (weight, of) = facts["passes"], facts["largest_weight"]
    good = [name for name, found in passes.items() if found["seen"] == "finite"]
    bad = {name: found for name, found in passes.items() if found["seen"] != "finite"}
    if not bad:
        by_update = "; the update broke it: a lower train.lr" if facts["seen"] == "nonfinite_weights" else ""
        return f"finite in {', '.join(good)}: the batch alone does not break this network{by_update}"
    name, first = next(iter(bad.items()))
    where = f"{first['phase']} of {first['module']}" if first["module"] else "the step, in no one module"
    look = f"look at the inputs, and at the weights: the largest is {weight:.3g}, in {of}"
    cure = f"cured by {' and '.join(good)}" if good else f"cured by no precision that was tried: {look}"
    return f"{name} breaks in the {where}; {cure}"


def _inputs_table(inputs: Mapping[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False, title="inputs", title_justify="left")
    for name, value in inputs.items():
        if isinstance(value, dict):
            low, high = value["range"]
            shown = f"{low:.4g} to {high:.4g}" + (f", {value['nonfinite']} not finite" if value["nonfinite"] else "")
        else:
            shown = f"{value[0]} to {value[1]}" if isinstance(value, tuple) else f"{value:.3g}"
        table.add_row(name.replace("_", "-"), shown)
    return table


def _passes_table(passes: Mapping[str, Mapping[str, Any]]) -> Table:
    table = Table("precision", "seen", "loss", "gradient norm", "begins in", box=None, pad_edge=False)
    for name, found in passes.items():
        where = f"{found['phase']} of {found['module']}" if found["module"] else ""
        row = [name, found["seen"].replace("_", " "), f"{found['loss']:.4g}", f"{found['grad_norm']:.4g}", where]
        table.add_row(*map(escape, row))
    return table


def _activations_table(activations: Sequence[Activation], *, title: str) -> Table:
    """The modules that came before the end of the forward pass or its first NaN, and the largest outputs of all."""
    table = Table("module", "dtype", "largest", "rms", "not finite", box=None, pad_edge=False)
    table.title, table.title_justify = title, "left"
    last = list(activations[-_BEFORE:])
    largest = sorted((one for one in activations if one not in last), key=lambda one: -one.largest)[:_LARGEST]
    for one in (*largest, *last):
        table.add_row(escape(one.module), one.dtype, f"{one.largest:.4g}", f"{one.rms:.4g}", f"{one.nonfinite:,}")
    return table
