"""Which examples come together, and how they become one padded batch of numpy arrays; loader workers need no torch.

Letters: B batch, L padded length (nt), C target or class, N examples of a set, K base pairs of a batch, F feature.
"""

from collections.abc import Callable, Sequence
from itertools import pairwise
from typing import NamedTuple

import numpy as np

from pipeline.dataset import ExampleSet, RnaExample

#: Pairs of nucleotides in a batch of structures that teaches nothing: about 0.4 GiB of pair features.
STRUCTURE_PAIRS = 2**20


class Packed(NamedTuple):
    """A padded batch as small as it travels: no mask, and of the base-pair probabilities only those that are stored."""

    ids: tuple[str, ...]
    tokens_BL: np.ndarray  # uint8, 0 where padded
    lengths_B: np.ndarray  # int64
    target_BLC: np.ndarray | None = None  # float32, NaN = not measured or padded
    weight_BC: np.ndarray | None = None  # float32
    pairs_3K: np.ndarray | None = None  # int32: position in the batch, i, j, with i < j
    p_K: np.ndarray | None = None  # float32
    label_BC: np.ndarray | None = None  # see `RnaExample`
    features_BLF: np.ndarray | None = None  # float16, 0 where padded


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
    return np.array_split(indices, parts) if len(indices) else []


def padding_share(lengths_N: np.ndarray, batches: Sequence[np.ndarray]) -> float:
    """Share of padded positions among all positions of the batches."""
    padded = sum(len(batch) * int(lengths_N[batch].max()) for batch in batches)
    return 1 - sum(int(lengths_N[batch].sum()) for batch in batches) / padded


def read_packed(
    examples: ExampleSet, indices: np.ndarray, *, change: Callable[[RnaExample, int], RnaExample] | None = None
) -> Packed:
    """Read examples, change them (`pipeline.augment`), and pad them into one batch."""
    chosen = [examples.example(index) for index in indices]
    if change is not None:
        chosen = [change(example, index) for example, index in zip(chosen, indices, strict=True)]
    return pack(chosen)


def pack(examples: Sequence[RnaExample]) -> Packed:
    """Pad examples at their ends to the longest: tokens and features with 0, targets with NaN."""
    lengths_B = np.array([len(example.tokens_L) for example in examples])
    ids = tuple(example.id for example in examples)
    real_BL = np.arange(lengths_B.max()) < lengths_B[:, None]
    tokens_BL = np.zeros(real_BL.shape, dtype=np.uint8)
    tokens_BL[real_BL] = np.concatenate([example.tokens_L for example in examples])
    pairs_3K, p_K = _pairs(examples) if examples[0].bpp_p_K is not None else (None, None)
    first, target_BLC, features_BLF = examples[0], None, None
    if first.target_LC is not None:
        target_BLC = np.full((*real_BL.shape, first.target_LC.shape[1]), np.nan, dtype=np.float32)
        target_BLC[real_BL] = np.concatenate([example.target_LC for example in examples])
    if first.features_LF is not None:
        features_BLF = np.zeros((*real_BL.shape, first.features_LF.shape[1]), dtype=np.float16)
        features_BLF[real_BL] = np.concatenate([example.features_LF for example in examples])
    weight_BC, label_BC = (
        None if getattr(first, name) is None else np.stack([getattr(example, name) for example in examples])
        for name in ("weight_C", "label_C")
    )
    return Packed(ids, tokens_BL, lengths_B, target_BLC, weight_BC, pairs_3K, p_K, label_BC, features_BLF)


def _pairs(examples: Sequence[RnaExample]) -> tuple[np.ndarray, np.ndarray]:
    counts = [len(example.bpp_p_K) for example in examples]  # type: ignore[arg-type]
    pairs_3K = np.empty((3, sum(counts)), dtype=np.int32)
    pairs_3K[0] = np.repeat(np.arange(len(examples)), counts)
    pairs_3K[1:] = np.concatenate([example.bpp_ij_K2 for example in examples]).T
    return pairs_3K, np.concatenate([example.bpp_p_K for example in examples])
