"""Which matrices weight decay must leave alone. Vectors (biases, norms, gains) and embeddings need no mark."""

from collections.abc import Iterable

from torch import nn


def leave_undecayed(parameters: Iterable[nn.Parameter]) -> None:
    """Mark parameters by ``_no_weight_decay = True``, which the optimiser's grouping reads."""
    for parameter in parameters:
        parameter._no_weight_decay = True  # type: ignore[attr-defined]
