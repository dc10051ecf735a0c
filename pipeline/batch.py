"""Which examples come together, and how they become one padded batch.

Letters: B batch, L padded length (nt), C target, N examples of a set.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from models.interface import RnaInputs
from pipeline.dataset import ExampleSet, RnaExample


class RnaBatch(NamedTuple):
    """A padded batch: what the network takes, and what its output is compared with."""

    ids: tuple[str, ...]
    inputs: RnaInputs
    target_BLC: Tensor | None = None  # float32, NaN = not measured or padded
    weight_BC: Tensor | None = None  # float32 >= 0, NaN = no such profile

    def to(self, device: torch.device) -> "RnaBatch":
        """The same batch on another device; from pinned memory without waiting."""
        if device.type == "cpu":
            return self

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.pin_memory().to(device, non_blocking=True)

        inputs = RnaInputs(*(move(tensor) for tensor in self.inputs))  # type: ignore[arg-type]
        return RnaBatch(self.ids, inputs, move(self.target_BLC), move(self.weight_BC))


def plan_epoch(lengths_N: np.ndarray, *, batch_size: int, bucket: int, seed: int, epoch: int) -> list[np.ndarray]:
    """Every example once, in batches of similar length and random order: a pure function of ``(seed, epoch)``.

    A random permutation is cut into stretches of ``bucket`` batches; each stretch is sorted by length, cut into
    batches, and all batches are shuffled. Batches are of (nearly) equal size: 33 examples in batches of at most 32
    make 17 + 16, so that no step sees a single sequence.

    Args:
        lengths_N: [N] int, nt, as the network will see them (after cropping).
        batch_size: largest number of examples in a batch.
        bucket: batches that are sorted together; 0 = order by chance alone.
        seed: of the run.
        epoch: 0-based.

    Returns:
        Arrays of positions in `lengths_N`.
    """
    rng = np.random.default_rng([seed, epoch, 0])
    order = rng.permutation(len(lengths_N))
    count = -(-len(order) // batch_size)
    edges = np.linspace(0, len(order), count + 1).astype(int)
    if bucket:
        for first in range(0, count, bucket):
            span = slice(edges[first], edges[min(first + bucket, count)])
            order[span] = order[span][np.argsort(lengths_N[order[span]], kind="stable")]
    batches = [order[start:stop] for start, stop in pairwise(edges)]
    return [batches[i] for i in rng.permutation(count)]


def plan_by_tokens(lengths_N: np.ndarray, *, max_tokens: int, max_pairs: int | None = None) -> list[np.ndarray]:
    """Every example once, longest first, in batches within two limits, of at least one example.

    Args:
        lengths_N: [N] int, nt.
        max_tokens: padded nucleotides of a batch.
        max_pairs: padded pairs of nucleotides, B L², for networks whose memory is made of them.

    Returns:
        Arrays of positions in `lengths_N`.
    """
    batches = []
    order = np.argsort(-lengths_N, kind="stable")
    start = 0
    while start < len(order):
        longest = int(lengths_N[order[start]])
        size = max_tokens // longest if max_pairs is None else min(max_tokens // longest, max_pairs // longest**2)
        size = max(size, 1)
        batches.append(order[start : start + size])
        start += size
    return batches


def split_batch(indices: np.ndarray, *, micro_batch: int) -> list[np.ndarray]:
    """A batch in parts of at most `micro_batch` examples, as equal as can be; 0 = in one part."""
    parts = -(-len(indices) // micro_batch) if micro_batch else 1
    return np.array_split(indices, parts)


def padding_share(lengths_N: np.ndarray, batches: Sequence[np.ndarray]) -> float:
    """Share of padded positions among all positions of the batches."""
    padded = sum(len(batch) * int(lengths_N[batch].max()) for batch in batches)
    return 1 - sum(int(lengths_N[batch].sum()) for batch in batches) / padded


def make_batch(
    examples: ExampleSet, indices: np.ndarray, *, change: Callable[[RnaExample, int], RnaExample] | None = None
) -> RnaBatch:
    """Read examples, change them (`pipeline.augment`), and pad them into one batch."""
    chosen = [examples.example(index) for index in indices]
    if change is not None:
        chosen = [change(example, index) for example, index in zip(chosen, indices, strict=True)]
    return collate(chosen)


def collate(examples: Sequence[RnaExample]) -> RnaBatch:
    """Pad examples at their ends to the longest: tokens with 0, targets with NaN, probabilities with 0."""
    size, longest = len(examples), max(len(example.tokens_L) for example in examples)
    tokens_BL = np.zeros((size, longest), dtype=np.int64)
    mask_BL = np.zeros((size, longest), dtype=bool)
    for b, example in enumerate(examples):
        tokens_BL[b, : len(example.tokens_L)] = example.tokens_L
        mask_BL[b, : len(example.tokens_L)] = True
    bpp_BLL = _dense_bpp(examples, longest) if examples[0].bpp_p_K is not None else None
    inputs = RnaInputs(torch.from_numpy(tokens_BL), torch.from_numpy(mask_BL), bpp_BLL)
    ids = tuple(example.id for example in examples)
    first = examples[0].target_LC
    if first is None:
        return RnaBatch(ids, inputs)
    target_BLC = np.full((size, longest, first.shape[1]), np.nan, dtype=np.float32)
    for b, example in enumerate(examples):
        target_BLC[b, : len(example.tokens_L)] = example.target_LC
    weight_BC = np.stack([example.weight_C for example in examples])  # type: ignore[misc]
    return RnaBatch(ids, inputs, torch.from_numpy(target_BLC), torch.from_numpy(weight_BC))


def _dense_bpp(examples: Sequence[RnaExample], longest: int) -> Tensor:
    """One scatter for the whole batch: [B, L, L] float32, symmetric."""
    bpp_BLL = np.zeros((len(examples), longest, longest), dtype=np.float32)
    b_K = np.repeat(np.arange(len(examples)), [len(example.bpp_p_K) for example in examples])  # type: ignore[arg-type]
    ij_K2 = np.concatenate([example.bpp_ij_K2 for example in examples])
    p_K = np.concatenate([example.bpp_p_K for example in examples])
    bpp_BLL[b_K, ij_K2[:, 0], ij_K2[:, 1]] = p_K
    bpp_BLL[b_K, ij_K2[:, 1], ij_K2[:, 0]] = p_K
    return torch.from_numpy(bpp_BLL)
