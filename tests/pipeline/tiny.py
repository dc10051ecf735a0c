"""A competition, tables and a network so small that a whole training run takes a second."""

import itertools
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from models import registry
from models.heads import distance_bins
from models.interface import RnaInputs, RnaModel, RnaOutputs
from pipeline import train
from pipeline.competitions.base import Competition
from pipeline.config import DataConfig, ModelConfig, RunConfig, TrainConfig
from pipeline.paths import Paths
from pipeline.runlog import read_metrics
from pipeline.stage import Report
from pipeline.training.checkpoint import CheckpointStore

TARGETS = ("reactivity_DMS_MaP", "reactivity_2A3_MaP")
NOISE = ("signal_to_noise_DMS_MaP", "signal_to_noise_2A3_MaP")
SPLIT = "sim80_k2"
RUN = f"tiny.{SPLIT}"


def _error_sums(predicted: np.ndarray, truth: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    known = ~np.isnan(truth)
    error = np.abs(predicted.clip(0, 1) - np.where(known, truth, 0).clip(0, 1)).astype(np.float64)
    return (error * known).sum(axis=0), known.sum(axis=0)


def _no_raw_files(_folder: Path) -> dict[str, Path]:
    return {}


def _no_clean(_raw: dict[str, Path], _tables: dict[str, Path]) -> dict[str, Any]:
    return {}


def _competition(**changes: Any) -> Competition:
    facts: dict[str, Any] = {
        "name": "tiny",
        "title": "Tiny",
        "slug": "tiny",
        "files": ("train.csv",),
        "task": "values",
        "row_key": "id",
        "targets": TARGETS,
        "target_range": (0.0, 1.0),
        "signal_to_noise": NOISE,
        "metric": "MAE",
        "error_sums": _error_sums,
        "score": lambda sums, counts: float(sums.sum() / counts.sum()),
        "tables": ("train", "test"),
        "raw_files": _no_raw_files,
        "clean": _no_clean,
        "shown_ranges": ((0.0, 1.0),) * len(TARGETS),
    }
    return Competition(**{**facts, **changes})


TINY = _competition()
TINY3D = _competition(
    name="tiny3d",
    task="structure",
    row_key="ID",
    targets=("x", "y", "z"),
    target_range=None,
    signal_to_noise=None,
    error_sums=None,
    score=None,
)


class Fault(nn.Module):
    """Where tests make something go wrong: `inject` is called in every forward pass in training mode."""

    inject: ClassVar[Callable[[Tensor], Tensor] | None] = None

    def forward(self, x_BLD: Tensor) -> Tensor:
        inject = type(self).inject
        planned = isinstance(x_BLD, FakeTensor)  # the memory plan's pass, which is no step
        return inject(x_BLD) if inject is not None and self.training and not planned else x_BLD


class TinyModel(RnaModel):
    """Embedding, one convolution, dropout, heads."""

    name: ClassVar[str] = "tiny"

    def __init__(
        self,
        *,
        num_channels: int = 2,
        num_distance_bins: int = 0,
        width: int = 8,
        dropout: float = 0.1,
        use_bpp: bool = False,
        coordinates: bool = False,
    ) -> None:
        super().__init__()
        self.uses_bpp = use_bpp
        self.embedding = nn.Embedding(4, width)
        self.convolution = nn.Conv1d(width, width, 5, padding=2)
        self.fault = Fault()
        self.dropout = nn.Dropout(dropout)
        sizes = {"per_base": num_channels, "distances": num_distance_bins, "placed": 3 + 10 if coordinates else 0}
        self.heads = nn.ModuleDict({name: nn.Linear(width, size) for name, size in sizes.items() if size})

    def forward(self, inputs: RnaInputs) -> RnaOutputs:
        mask_BL1 = inputs.mask_BL.unsqueeze(-1)
        x_BLD = self.embedding(torch.where(inputs.mask_BL, inputs.tokens_BL, 0)) * mask_BL1
        if self.uses_bpp:
            assert inputs.bpp_BLL is not None
            x_BLD = x_BLD + inputs.bpp_BLL @ x_BLD
        x_BLD = self.fault(torch.relu(self.convolution(x_BLD.transpose(1, 2)).transpose(1, 2)))
        x_BLD = self.dropout(x_BLD)
        found: dict[str, Tensor] = {}
        if "per_base" in self.heads:
            found["values_BLC"] = self.heads["per_base"](x_BLD).float()
        if "distances" in self.heads:
            found["distance_logits_BLLK"] = self.heads["distances"](x_BLD.unsqueeze(1) + x_BLD.unsqueeze(2)).float()
        if "placed" in self.heads:
            placed_BLK = self.heads["placed"](x_BLD).float() * mask_BL1
            trace_L3 = torch.from_numpy(helix(x_BLD.shape[1])).to(placed_BLK)
            found |= {"c1_xyz_BL3": placed_BLK[..., :3] + trace_L3, "lddt_logits_BLK": placed_BLK[..., 3:]}
        return RnaOutputs(**found)

    def set_gradient_checkpointing(self, every: int) -> None:
        del every


def register(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the network known for one test: tests over all models must not meet it."""
    monkeypatch.setattr(registry, "_MODELS", dict(registry._MODELS))
    registry.register_model(TinyModel)


def config(*, model: dict[str, Any] | None = None, data: dict[str, Any] | None = None, **train: Any) -> RunConfig:
    """A run of twelve steps: three epochs of four."""
    settings = {"epochs": 3, "batch_size": 8, "lr": 1e-2, "save_every": 3, "seed": 7}
    return RunConfig(
        model=ModelConfig(name="tiny", kwargs=model or {}),
        data=DataConfig(**{"max_length": 40, "length_bucket": 2, **(data or {})}),
        train=TrainConfig(**{**settings, **train}),
    )


def fit(paths: Paths, settings: RunConfig | None = None, *, run: str = RUN, **options: Any) -> Report:
    """Train fold 0 of a run to its end, or as far as the options say."""
    options = {"competition": TINY, "split": SPLIT, "fold": 0, **options}
    return train.run(settings or config(), paths=paths, run=run, **options)


def rows_of(paths: Paths, event: str, run: str = RUN) -> list[dict[str, Any]]:
    """Rows of one kind in the log of fold 0."""
    return [row for row in read_metrics(paths.fold_dir(run, 0) / "metrics.jsonl") if row["event"] == event]


def at_calls(fault: Callable[[Tensor], Tensor], calls: Collection[int]) -> Callable[[Tensor], Tensor]:
    """A fault for `Fault.inject` that happens in some forward passes, counted from 1, traces of the guard included."""
    count = itertools.count(1)
    return lambda x_BLD: fault(x_BLD) if next(count) in calls else x_BLD


def final_bytes(paths: Paths, run: str = RUN) -> dict[str, bytes]:
    """All weights, moments and counters of the last checkpoint."""
    last = CheckpointStore(paths.fold_dir(run, 0) / "checkpoints").load_newest()
    assert last is not None
    assert last.meta["progress"]["finished"]
    tensors = {f"w.{name}": tensor for name, tensor in last.weights.items()}
    tensors |= {f"t.{name}": tensor for name, tensor in last.training.items()} | {"random": last.state["random"]["cpu"]}
    for index, moments in last.state["optimizer"]["state"].items():
        tensors |= {f"o.{index}.{name}": tensor for name, tensor in moments.items()}
    found = {name: tensor.numpy().tobytes() for name, tensor in tensors.items()}
    return found | {"progress": repr(last.state["progress"]).encode(), "scaler": repr(last.state["scaler"]).encode()}


def sequences(count: int, *, seed: int = 1, shortest: int = 20, longest: int = 40) -> list[str]:
    """Different random sequences."""
    rng = np.random.default_rng(seed)
    return ["".join(rng.choice(list("ACGU"), rng.integers(shortest, longest + 1))) for _ in range(count)]


def write_values(paths: Paths, *, count: int = 64, tests: int = 9, seed: int = 1) -> list[str]:
    """Clean train and test tables and a fold table; reactivity follows the letter. Returns the train sequences."""
    rng = np.random.default_rng(seed)
    texts = sequences(count, seed=seed)
    level = {"A": 0.9, "C": 0.3, "G": 0.5, "U": 0.1}
    columns: dict[str, Any] = {
        "sequence_id": [f"s{k:04d}" for k in range(count)],
        "sequence": texts,
        "scored": [k % 5 != 0 for k in range(count)],
    }
    for c, target in enumerate(TARGETS):
        rows: list[list[float | None] | None] = []
        for k, text in enumerate(texts):
            values: list[float | None] = [level[letter] + rng.normal(0, 0.1) for letter in text]
            values[:3] = [None] * 3
            rows.append(None if k % 5 == 0 and c == 1 else values)
        columns[target] = pa.array(rows, pa.list_(pa.float32()))
        noise = [None if row is None else float(rng.uniform(0.5, 9)) for row in rows]
        columns[NOISE[c]] = pa.array(noise, pa.float32())
    write_table(paths.clean("train"), columns)
    write_table(
        paths.clean("test"), {"sequence_id": [f"t{9 - k}" for k in range(tests)], "sequence": sequences(tests, seed=99)}
    )
    write_folds(paths, columns["sequence_id"])
    return texts


def write_structures(paths: Paths, *, count: int = 12, tests: int = 2) -> None:
    """Helical C1' traces with some unresolved nucleotides, and a fold table."""
    texts = sequences(count)
    columns: dict[str, Any] = {
        "sequence_id": [f"R{k:03d}" for k in range(count)],
        "sequence": texts,
        "scored": [True] * count,
    }
    for axis in range(3):
        traces = [helix(len(text))[:, axis].tolist() for text in texts]
        for trace in traces:
            trace[4] = None
        columns["xyz"[axis]] = pa.array(traces, pa.list_(pa.float32()))
    write_table(paths.clean("train"), columns)
    write_table(
        paths.clean("test"), {"sequence_id": [f"T{k}" for k in range(tests)], "sequence": sequences(tests, seed=98)}
    )
    write_folds(paths, columns["sequence_id"])


def helix(length: int) -> np.ndarray:
    """[L, 3] Å: one strand of an A-form helix."""
    turn = np.arange(length) * 2 * np.pi / 11
    return np.stack([8 * np.cos(turn), 8 * np.sin(turn), 2.8 * np.arange(length)], axis=1)


def write_folds(paths: Paths, ids: list[str], *, split: str = SPLIT) -> None:
    """Even rows are fold 0, odd ones fold 1."""
    folds = pa.array([k % 2 for k in range(len(ids))], pa.uint8())
    write_table(paths.fold_table(split), {"sequence_id": ids, "fold": folds, "cluster": ids})


def write_bpp(paths: Paths, texts: list[str]) -> dict[str, np.ndarray]:
    """A hairpin for each sequence. Returns its dense matrices."""
    unique = sorted(set(texts))
    dense = {}
    columns: dict[str, list] = {"i": [], "j": [], "p": [], "unpaired": []}
    for text in unique:
        size = len(text)
        i = np.arange(0, size // 3)
        p = np.linspace(0.2, 0.9, len(i)).astype(np.float32)
        matrix = np.zeros((size, size), dtype=np.float32)
        matrix[i, size - 1 - i] = matrix[size - 1 - i, i] = p
        dense[text] = matrix
        for name, values in {"i": i, "j": size - 1 - i, "p": p, "unpaired": 1 - matrix.sum(1)}.items():
            columns[name].append(values)
    kinds = {"i": pa.uint16(), "j": pa.uint16(), "p": pa.float32(), "unpaired": pa.float32()}
    lists = {name: pa.array(rows, pa.list_(kinds[name])) for name, rows in columns.items()}
    write_table(paths.bpp, {"sequence": unique, **lists})
    return dense


def write_table(path: Path, columns: dict[str, Any]) -> None:
    """A parquet file, folders included."""
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table(columns), path)


def nearest_bin(distance: float, *, num_bins: int) -> int:
    """Bin of a distance, found the slow way."""
    return sum(distance >= edge for edge in distance_bins(num_bins).edges)
