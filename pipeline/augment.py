"""What training does to an example before the network sees it. Pure: the same numbers in, the same example out.

Coordinates need no rotation here: no term of the structure loss changes with it.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.dataset import RnaExample, crop


@dataclass(frozen=True, kw_only=True)
class Augmentation:
    """Crop and flip, drawn from ``(seed, epoch, index)`` alone, in whatever order examples are asked for."""

    draws_N2: np.ndarray  # float64 in [0, 1): for each example one draw for the crop, one for the flip
    max_length: int  # nt
    flip: float  # probability

    def __call__(self, example: RnaExample, index: int) -> RnaExample:
        """The example as this epoch shows it."""
        where, turn = self.draws_N2[index]
        surplus = len(example.tokens_L) - self.max_length
        if surplus > 0:
            example = crop(example, start=int(where * (surplus + 1)), length=self.max_length)
        return flip(example) if turn < self.flip else example


def epoch_augmentation(count: int, *, seed: int, epoch: int, max_length: int, flip: float) -> Augmentation:
    """The augmentation of one epoch over `count` examples.

    All draws are made at once: one generator for each example costs 15 µs, more than the rest of its preparation.
    """
    draws_N2 = np.random.default_rng([seed, epoch, 1]).random((count, 2))
    return Augmentation(draws_N2=draws_N2, max_length=max_length, flip=flip)


def flip(example: RnaExample) -> RnaExample:
    """The example read from 3' to 5', targets, pairs and features with it.

    >>> flip(RnaExample("a", np.array([0, 1, 2], dtype=np.uint8))).tokens_L.tolist()
    [2, 1, 0]
    """
    changed: dict[str, Any] = {"tokens_L": example.tokens_L[::-1]}
    if example.target_LC is not None:
        changed["target_LC"] = example.target_LC[::-1]
    if example.features_LF is not None:
        changed["features_LF"] = example.features_LF[::-1]
    if example.bpp_ij_K2 is not None:
        changed["bpp_ij_K2"] = (len(example.tokens_L) - 1 - example.bpp_ij_K2[:, ::-1]).astype(np.uint16)
    return example._replace(**changed)


def central_crop(example: RnaExample, *, max_length: int) -> RnaExample:
    """The middle of an example that is too long for a pair map; the same window each time, for validation."""
    surplus = len(example.tokens_L) - max_length
    return crop(example, start=surplus // 2, length=max_length) if surplus > 0 else example
