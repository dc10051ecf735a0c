"""A whole run beside the plain loop that it should be: float64, one sequence at a time, torch's own AdamW."""

import copy
import math
from typing import NamedTuple

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn

from models.interface import RnaInputs
from pipeline.augment import epoch_augmentation
from pipeline.config import RunConfig
from pipeline.packing import plan_epoch
from pipeline.paths import Paths
from pipeline.schema import encode
from pipeline.training.checkpoint import CheckpointStore
from pipeline.training.optim import learning_rate
from tests.pipeline import tiny

SETTINGS = {"micro_batch": 3, "length_stages": "12x1", "clip_norm": 0.05, "weight_decay": 0.5, "ema_decay": 0.8}


class Plain(NamedTuple):
    """What a run comes to."""

    losses: list[float]  # of every step
    epochs: list[tuple[float, float]]  # training loss and metric of each
    trained: nn.Module
    averaged: nn.Module


def test_a_run_ends_with_the_losses_metrics_weights_and_averages_of_a_plain_loop(paths):
    """Crops, flips, pairs, weights, clipping, decay, rates and averages together; each alone has tests of its own.

    That an epoch's metric is of the averaged network, and its training loss a weighted mean, no test had seen.
    """
    bpp = tiny.write_bpp(paths, pq.read_table(paths.clean("train"))["sequence"].to_pylist())
    data = {"max_length": 25, "flip": 0.5, "min_signal_to_noise": 1.5}
    config = tiny.config(model={"dropout": 0.0, "use_bpp": True}, data=data, **SETTINGS)
    tiny.fit(paths, config)
    last = CheckpointStore(paths.fold_dir(tiny.RUN, 0) / "checkpoints").load_newest()
    plain = plain_run(paths, config, bpp)
    assert [row["loss"] for row in tiny.rows_of(paths, "step")] == pytest.approx(plain.losses, rel=1e-5)
    told = [(row["train_loss"], row["metric"]) for row in tiny.rows_of(paths, "epoch")]
    np.testing.assert_allclose(told, plain.epochs, rtol=1e-5)
    for stored, network in ((last.training, plain.trained), (last.weights, plain.averaged)):
        for name, parameter in network.state_dict().items():
            torch.testing.assert_close(stored[name].double(), parameter, atol=5e-6, rtol=0)


def plain_run(paths: Paths, config: RunConfig, bpp: dict[str, np.ndarray]) -> Plain:
    """The run of a configuration, in float64."""
    settings, rows = config.train, pq.read_table(paths.clean("train")).to_pylist()
    folds = pq.read_table(paths.fold_table(tiny.SPLIT))["fold"].to_pylist()
    weights = [[weight_of(row[name], config) for name in tiny.NOISE] for row in rows]
    train = [at for at in range(len(rows)) if folds[at] != 0 and any(weights[at])]
    torch.manual_seed(settings.seed)
    network = tiny.TinyModel(**config.model.kwargs).double()
    averaged, parameters = copy.deepcopy(network), list(network.parameters())
    decayed = [p for p in parameters if p.ndim > 1 and p is not network.embedding.weight]
    others = [p for p in parameters if all(p is not each for each in decayed)]
    groups = [{"params": decayed, "weight_decay": settings.weight_decay}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99))
    plain, total = Plain([], [], network, averaged), settings.num_epochs * math.ceil(len(train) / settings.batch_size)
    for epoch in range(settings.num_epochs):
        longest, how = config.longest(epoch), {"seed": settings.seed, "epoch": epoch}
        draws_N2 = epoch_augmentation(len(rows), max_length=0, flip=0, **how).draws_N2
        lengths_N = np.array([min(len(rows[at]["sequence"]), longest) for at in train])
        sums = np.zeros(2)
        for batch in plan_epoch(lengths_N, batch_size=settings.batch_size, bucket=config.data.length_bucket, **how):
            loss, weight, update = torch.zeros((), dtype=torch.float64), 0.0, len(plain.losses)
            for at in (train[place] for place in batch):
                start, is_turned = draws_N2[at, 0], draws_N2[at, 1] < config.data.flip
                error_LC, known_LC = errors(network, rows[at], bpp, longest=longest, start=start, is_turned=is_turned)
                loss = loss + (error_LC * torch.tensor(weights[at])).sum()
                weight += float((known_LC * torch.tensor(weights[at])).sum())
            optimizer.zero_grad()
            (loss / weight).backward()
            nn.utils.clip_grad_norm_(parameters, settings.clip_norm)
            for group in optimizer.param_groups:
                group["lr"] = learning_rate(update, settings, total=total)
            optimizer.step()
            decay = min(settings.ema_decay, (1 + update) / (10 + update))
            for mean, parameter in zip(averaged.parameters(), parameters, strict=True):
                mean.data.mul_(decay).add_(parameter.data, alpha=1 - decay)
            plain.losses.append(float(loss.detach()) / weight)
            sums += float(loss.detach()), weight
        valid = [row for row, fold in zip(rows, folds, strict=True) if fold == 0 and row["scored"]]
        with torch.no_grad():
            found = [errors(averaged, row, bpp, is_clipped=True) for row in valid]
        metric = sum(float(error_LC.sum()) for error_LC, _ in found) / sum(int(known_LC.sum()) for _, known_LC in found)
        plain.epochs.append((sums[0] / sums[1], metric))
    return plain


def weight_of(signal_to_noise: float | None, config: RunConfig) -> float:
    known = signal_to_noise is not None and signal_to_noise >= config.data.min_signal_to_noise
    return math.log1p(signal_to_noise) if known else 0.0


def errors(
    network: nn.Module,
    row: dict,
    bpp: dict[str, np.ndarray],
    *,
    longest: int = 999,
    start: float = 0.0,
    is_turned: bool = False,
    is_clipped: bool = False,
) -> tuple[Tensor, Tensor]:
    """Of one sequence, of which a window is shown, perhaps read from its end: [L, C] each, 0 where not measured."""
    length, dense_LL = len(row["sequence"]), torch.from_numpy(bpp[row["sequence"]]).double()
    first = int(start * (max(length - longest, 0) + 1))
    places = list(range(first, min(first + longest, length)))[:: -1 if is_turned else 1]
    tokens_L = torch.from_numpy(encode(row["sequence"])).long()[places]
    lists = [row[name] or [None] * length for name in tiny.TARGETS]
    target_LC = torch.tensor([[math.nan if v is None else v for v in each] for each in lists]).T[places].double()
    inputs = RnaInputs(tokens_L[None], torch.ones(1, len(places), dtype=torch.bool), dense_LL[places][:, places][None])
    values_LC = network(inputs).values_BLC[0].double()
    values_LC, known_LC = values_LC.clamp(0, 1) if is_clipped else values_LC, ~target_LC.isnan()
    return torch.where(known_LC, (values_LC - target_LC.nan_to_num(0.0).clamp(0, 1)).abs(), 0.0), known_LC
