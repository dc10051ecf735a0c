"""Losses over masked, partly unmeasured targets, as sums and weights that micro-batches can be added up from.

Letters: B batch, L length (nt), C target channel, K distance bin, P pairs of nucleotides.

A loss has two halves. ``weight(batch)`` needs no network: it says how much the batch counts. ``total(outputs, batch)``
is the weighted sum of errors. The loss of an optimiser step is the sum of totals over the sum of weights of all its
micro-batches (and, one day, of all devices): 2 x 16 sequences give the gradient of 32.
"""

from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from models.heads import distance_bins
from models.interface import RnaOutputs
from pipeline.batch import RnaBatch
from pipeline.competitions.base import Competition

#: Pairs of one structure in a training step; more are sampled. All of them count in validation.
_TRAIN_PAIRS = 65_536


class Loss(Protocol):
    """What the training loop and the validation metric need of a loss."""

    def weight(self, batch: RnaBatch) -> float:
        """How much a batch counts: the divisor of its total."""

    def total(self, outputs: RnaOutputs, batch: RnaBatch) -> Tensor:
        """Weighted sum of errors: [] float32. A prediction that is not finite makes it not finite."""


@dataclass(frozen=True)
class MaskedMae:
    """Mean absolute error on clipped targets, each profile with its weight.

    Predictions are not clipped: beyond the range they keep a gradient that brings them back.

    Source:
        Ribonanza's metric, MAE after clipping to [0, 1]; weights by signal to noise are this project's.
    """

    target_range: tuple[float, float] | None

    def weight(self, batch: RnaBatch) -> float:
        assert batch.target_BLC is not None
        return float(_element_weights(batch).sum(dtype=torch.float64))

    def total(self, outputs: RnaOutputs, batch: RnaBatch) -> Tensor:
        assert batch.target_BLC is not None
        assert outputs.values_BLC is not None
        real_BL1 = batch.inputs.mask_BL.unsqueeze(-1)
        target_BLC = batch.target_BLC if self.target_range is None else batch.target_BLC.clamp(*self.target_range)
        # Both are filled before the difference: a NaN under torch.where still has a NaN gradient. Where a real
        # nucleotide was not measured the error is multiplied by 0, so that a NaN prediction is seen even there.
        predicted_BLC = torch.where(real_BL1, outputs.values_BLC.float(), 0.0)
        target_BLC = torch.where(torch.isnan(target_BLC), 0.0, target_BLC)
        return ((predicted_BLC - target_BLC).abs() * _element_weights(batch)).sum()


def _element_weights(batch: RnaBatch) -> Tensor:
    """[B, L, C] float32: the profile's weight where measured, else 0."""
    assert batch.target_BLC is not None
    assert batch.weight_BC is not None
    return torch.where(torch.isnan(batch.target_BLC), 0.0, batch.weight_BC.unsqueeze(1))


@dataclass(frozen=True)
class DistanceCrossEntropy:
    """Cross-entropy of binned C1'–C1' distances: mean over a structure's resolved pairs, then over structures.

    Source:
        AlphaFold 2's distogram (Jumper et al. 2021, supplement 1.9.8), here on C1' and without the diagonal.
    """

    max_pairs: int = _TRAIN_PAIRS  # of one structure; 0 = all

    def weight(self, batch: RnaBatch) -> float:
        assert batch.target_BLC is not None
        return float((self._resolved(batch).sum(dim=1) >= 2).sum())

    def total(self, outputs: RnaOutputs, batch: RnaBatch) -> Tensor:
        assert batch.target_BLC is not None
        assert outputs.distance_logits_BLLK is not None
        logits_BLLK = outputs.distance_logits_BLLK
        total = logits_BLLK.new_zeros((), dtype=torch.float32)
        for logits_LLK, xyz_L3, resolved_L in zip(logits_BLLK, batch.target_BLC, self._resolved(batch), strict=True):
            known = resolved_L.nonzero().squeeze(1)
            i_P, j_P = self._pairs(known)
            if len(i_P):
                distance_P = (xyz_L3[i_P] - xyz_L3[j_P]).norm(dim=-1)
                edges = distance_P.new_tensor(distance_bins(logits_LLK.shape[-1]).edges)
                bin_P = torch.bucketize(distance_P, edges, right=True)
                total = total + cross_entropy(logits_LLK[i_P, j_P].float(), bin_P)
        return total

    def _resolved(self, batch: RnaBatch) -> Tensor:
        assert batch.target_BLC is not None
        return ~torch.isnan(batch.target_BLC).any(dim=-1)

    def _pairs(self, known: Tensor) -> tuple[Tensor, Tensor]:
        """Every pair of resolved nucleotides once, or a sample with replacement if they are more than `max_pairs`."""
        count = len(known)
        if self.max_pairs and count * (count - 1) // 2 > self.max_pairs:
            # drawn on the CPU, whose generator every checkpoint carries
            first = torch.randint(count, (self.max_pairs,))
            second = (first + torch.randint(1, count, (self.max_pairs,))) % count
            return known[first.to(known.device)], known[second.to(known.device)]
        i_P, j_P = torch.triu_indices(count, count, offset=1, device=known.device)
        return known[i_P], known[j_P]


def training_loss(competition: Competition) -> Loss:
    """The loss that a competition's network is trained with."""
    return DistanceCrossEntropy() if competition.task == "structure" else MaskedMae(competition.target_range)


def profile_weights(
    signal_to_noise_NC: np.ndarray, *, weighting: Literal["log1p_sn", "uniform"], minimum: float
) -> np.ndarray:
    """How much each profile counts in the loss.

    Only ratios matter: every loss is divided by the sum of its weights.

    Args:
        signal_to_noise_NC: [N, C] float32, NaN = no such profile.
        weighting: ``log1p_sn`` = log(1 + max(signal_to_noise, 0)); ``uniform`` = 1.
        minimum: profiles with less signal to noise weigh nothing.

    Returns:
        [N, C] float32 >= 0.
    """
    known_NC = signal_to_noise_NC >= minimum  # NaN is not
    signal_NC = np.where(known_NC, signal_to_noise_NC, 0)
    weight_NC = np.log1p(np.maximum(signal_NC, 0)) if weighting == "log1p_sn" else np.ones_like(signal_NC)
    return np.where(known_NC, weight_NC, 0).astype(np.float32)
