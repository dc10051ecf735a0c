"""Losses over masked, partly unmeasured targets, as sums and weights that micro-batches can be added up from.

Letters: B batch, L length (nt), C target channel or class, N sequences, K distance or lDDT bin, P pairs of nucleotides,
3 xyz.

A loss has two halves. ``weight(batch)`` needs no network: it says how much the batch counts. ``total(outputs, batch)``
is the weighted sum of errors. The loss of an optimiser step is the sum of totals over the sum of weights of all its
micro-batches in all processes: 2 x 16 sequences give the gradient of 32.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple, Protocol

import numpy as np
import torch
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits, cross_entropy, logsigmoid

from models.heads import distance_bins
from models.interface import RnaOutputs
from pipeline.batch import RnaBatch
from pipeline.competitions.base import Competition
from pipeline.config import TrainConfig
from pipeline.labels import Classes, Labels, Numbers
from pipeline.training import traces

#: Pairs of one structure in a training step; more are sampled. All of them count in validation.
_TRAIN_PAIRS = 65_536
#: How much each target counts beside the others, the largest 1; None = all alike.
TargetWeights = tuple[float, ...] | None


class Loss(Protocol):
    """What the training loop and the validation metric need of a loss."""

    def weight(self, batch: RnaBatch) -> float:
        """How much a batch counts: the divisor of its total."""

    def total(self, outputs: RnaOutputs, batch: RnaBatch) -> Tensor:
        """Weighted sum of errors: [] float32. A prediction that is not finite makes it not finite."""


@dataclass(frozen=True)
class MaskedError:
    """Mean absolute or square error on clipped targets, each profile with its weight, in deviations if there are units.

    Predictions are not clipped: beyond the range they keep a gradient that brings them back.

    Source:
        Ribonanza's metric, MAE after clipping to [0, 1]; OpenVaccine's, without the roots, which do not add up over
        micro-batches. Weights by signal to noise are this project's.
    """

    target_range: tuple[float, float] | None
    power: Literal[1, 2] = 1
    units: Numbers | None = None  # what of each target is 0 and 1 to the network; None = the data's own
    target_weights: TargetWeights = None

    def weight(self, batch: RnaBatch) -> float:
        assert batch.target_BLC is not None
        return float(self._weights(batch).sum(dtype=torch.float64))

    def total(self, outputs: RnaOutputs, batch: RnaBatch) -> Tensor:
        assert batch.target_BLC is not None
        assert outputs.values_BLC is not None
        real_BL1 = batch.inputs.mask_BL.unsqueeze(-1)
        target_BLC = batch.target_BLC if self.target_range is None else batch.target_BLC.clamp(*self.target_range)
        target_BLC = target_BLC if self.units is None else _in_deviations(target_BLC, self.units)
        # Both are filled before the difference: a NaN under torch.where still has a NaN gradient. Where a real
        # nucleotide was not measured the error is multiplied by 0, so that a NaN prediction is seen even there.
        predicted_BLC = torch.where(real_BL1, outputs.values_BLC.float(), 0.0)
        target_BLC = torch.where(torch.isnan(target_BLC), 0.0, target_BLC)
        difference_BLC = predicted_BLC - target_BLC
        error_BLC = difference_BLC.abs() if self.power == 1 else difference_BLC.square()
        return (error_BLC * self._weights(batch)).sum()

    def _weights(self, batch: RnaBatch) -> Tensor:
        """[B, L, C] float32: the profile's weight where measured, else 0."""
        assert batch.target_BLC is not None
        assert batch.weight_BC is not None
        weight_BC = _times(batch.weight_BC, self.target_weights)
        return torch.where(torch.isnan(batch.target_BLC), 0.0, weight_BC.unsqueeze(1))


def _times(weight_BC: Tensor, target_weights: TargetWeights) -> Tensor:
    """Weights of sequences or profiles, [B, 1] or [B, C], with those of the targets in them."""
    if target_weights is None:
        return weight_BC
    return weight_BC * torch.tensor(target_weights).to(weight_BC, non_blocking=True)  # new_tensor waits for a GPU


def _resolved(batch: RnaBatch) -> Tensor:
    """[B, L] bool: nucleotides of a structure whose position is known."""
    assert batch.target_BLC is not None
    return ~torch.isnan(batch.target_BLC).any(dim=-1)


class StructureTerms(NamedTuple):
    """Parts of a structure's loss, each summed over the structures of a batch: [] float32; 0 where there is no head."""

    distance: Tensor  # cross-entropy of binned distances
    frame: Tensor  # error of the coordinates as seen from local frames, 0 to 1; a mirror image has one
    tm: Tensor  # 1 - TM-score of the coordinates after superposition
    confidence: Tensor  # cross-entropy of the binned lDDT of the coordinates


@dataclass(frozen=True)
class StructureLoss:
    """Distances and, if the network predicts them, coordinates and their confidence, in float32.

    The mean over structures of which two nucleotides or more are resolved, long ones and short ones alike; distances
    are first averaged over a structure's resolved pairs.

    Args:
        frame_weight: of the error seen from local frames, where distances weigh 1.
        tm_weight: of what the TM-score lacks.
        confidence_weight: of the cross-entropy of the lDDT.
        max_pairs: whose distances count, of one structure; more are sampled; 0 = all.

    Source:
        Of distances: AlphaFold 2's distogram (Jumper et al. 2021, supplement 1.9.8), here on C1' and without the
        diagonal.
    """

    frame_weight: float
    tm_weight: float
    confidence_weight: float
    max_pairs: int = _TRAIN_PAIRS

    def weight(self, batch: RnaBatch) -> float:
        return float((_resolved(batch).sum(dim=1) >= 2).sum())

    def total(self, outputs: RnaOutputs, batch: RnaBatch) -> Tensor:
        return self.weighted(self.terms(outputs, batch))

    def weighted(self, terms: StructureTerms) -> Tensor:
        """The loss that the terms add up to."""
        coordinates = self.frame_weight * terms.frame + self.tm_weight * terms.tm
        return terms.distance + coordinates + self.confidence_weight * terms.confidence

    def terms(self, outputs: RnaOutputs, batch: RnaBatch) -> StructureTerms:
        """All parts of the loss of a batch."""
        with torch.autocast(batch.inputs.mask_BL.device.type, enabled=False):
            distance = _distance_term(outputs, batch, max_pairs=self.max_pairs)
            coordinates_3 = distance.new_zeros(3)
            for terms in _coordinate_terms(outputs, batch):
                coordinates_3 = coordinates_3 + torch.stack(terms)
        return StructureTerms(distance, *coordinates_3)


def _distance_term(outputs: RnaOutputs, batch: RnaBatch, *, max_pairs: int) -> Tensor:
    """Cross-entropy of binned distances, each structure's the mean over its pairs."""
    assert batch.target_BLC is not None
    assert outputs.distance_logits_BLLK is not None
    logits_BLLK = outputs.distance_logits_BLLK
    total = logits_BLLK.new_zeros((), dtype=torch.float32)
    for logits_LLK, xyz_L3, resolved_L in zip(logits_BLLK, batch.target_BLC, _resolved(batch), strict=True):
        i_P, j_P = _pairs(resolved_L.nonzero().squeeze(1), most=max_pairs)
        if len(i_P):
            distance_P = (xyz_L3[i_P] - xyz_L3[j_P]).norm(dim=-1)
            edges = torch.tensor(distance_bins(logits_LLK.shape[-1]).edges).to(distance_P, non_blocking=True)
            bin_P = torch.bucketize(distance_P, edges, right=True)
            total = total + cross_entropy(logits_LLK[i_P, j_P].float(), bin_P)
    return total


def _pairs(known: Tensor, *, most: int) -> tuple[Tensor, Tensor]:
    """Every pair of resolved nucleotides once, or a sample with replacement if they are more than `most`; 0 = all."""
    count = len(known)
    if most and count * (count - 1) // 2 > most:
        # drawn on the CPU, whose generator every checkpoint carries
        first = torch.randint(count, (most,))
        second = (first + torch.randint(1, count, (most,))) % count
        return known[first.to(known.device)], known[second.to(known.device)]
    i_P, j_P = torch.triu_indices(count, count, offset=1, device=known.device)
    return known[i_P], known[j_P]


def _coordinate_terms(outputs: RnaOutputs, batch: RnaBatch) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Errors of frames, superposition and confidence of every structure with coordinates to compare."""
    xyz_BL3, logits_BLK = outputs.c1_xyz_BL3, outputs.lddt_logits_BLK
    if xyz_BL3 is None or logits_BLK is None:
        return
    assert batch.target_BLC is not None
    for b, resolved_L in enumerate(_resolved(batch)):
        if resolved_L.sum() < 2:
            continue
        length = int(batch.inputs.mask_BL[b].sum())
        xyz_L3, true_L3 = xyz_BL3[b, :length].float(), batch.target_BLC[b, :length]
        lddt_L = traces.lddt(xyz_L3, true_L3)
        known_L, logits_LK = ~torch.isnan(lddt_L), logits_BLK[b, :length].float()
        num_bins = logits_LK.shape[1]
        bin_R = (lddt_L[known_L] * num_bins).long().clamp(max=num_bins - 1)
        confidence = cross_entropy(logits_LK[known_L], bin_R, reduction="sum") / max(len(bin_R), 1)
        yield traces.frame_error(xyz_L3, true_L3), 1 - traces.soft_tm_score(xyz_L3, true_L3), confidence


@dataclass(frozen=True)
class ClassLoss:
    """Cross-entropy of the classes of whole sequences, each sequence (or each of its labels) with its weight.

    Exclusive classes: softmax. Otherwise the binary cross-entropy of every class, averaged over the classes.

    Args:
        exclusive: one class a sequence.
        focal_gamma: factor (1 - p)^gamma on every term, p being what the truth was given; 0 = none.
        focal_alpha: factor on the term of a label that a sequence has, 1 - alpha of one that it has not; of two classes
            that exclude each other the second is had or not. 0 = none, 0.5 = half of the loss without it.

    Source:
        Lin et al. 2017 (focal loss, equation 5). log(1 - p) is computed from the logits, so that its gradient is finite
        where p rounds to 1.
    """

    exclusive: bool
    focal_gamma: float = 0.0
    focal_alpha: float = 0.0

    def weight(self, batch: RnaBatch) -> float:
        assert batch.weight_BC is not None
        return float(batch.weight_BC.mean(dim=1).sum(dtype=torch.float64))

    def total(self, outputs: RnaOutputs, batch: RnaBatch) -> Tensor:
        assert outputs.class_logits_BC is not None
        assert batch.label_BC is not None
        assert batch.weight_BC is not None
        logits_BC, label_BC = outputs.class_logits_BC.float(), batch.label_BC
        if label_BC.is_floating_point():
            return (self._soft_error(logits_BC, label_BC) * batch.weight_BC).mean(dim=1).sum()
        log_p, log_rest = (_softmax_logs if self.exclusive else _sigmoid_logs)(logits_BC, label_BC)
        error = -log_p * (self.focal_gamma * log_rest).exp() if self.focal_gamma else -log_p
        if self.focal_alpha:
            has_BC = label_BC[:, 1:] if self.exclusive else label_BC
            error = error * torch.where(has_BC, self.focal_alpha, 1 - self.focal_alpha)
        return (error * batch.weight_BC).mean(dim=1).sum()

    def _soft_error(self, logits_BC: Tensor, label_BC: Tensor) -> Tensor:
        """Cross-entropy with classes known as probabilities: [B, 1], or [B, C] where they do not exclude each other."""
        if self.exclusive:
            return cross_entropy(logits_BC, label_BC, reduction="none").unsqueeze(1)
        return binary_cross_entropy_with_logits(logits_BC, label_BC, reduction="none")


def _softmax_logs(logits_BC: Tensor, label_BC: Tensor) -> tuple[Tensor, Tensor]:
    """Log of the true class's probability and of all others': [B, 1] each."""
    true_B1 = label_BC.int().argmax(dim=1, keepdim=True)
    whole_B1 = logits_BC.logsumexp(dim=1, keepdim=True)
    others_BC = logits_BC.scatter(1, true_B1, torch.finfo(logits_BC.dtype).min)
    return logits_BC.gather(1, true_B1) - whole_B1, others_BC.logsumexp(dim=1, keepdim=True) - whole_B1


def _sigmoid_logs(logits_BC: Tensor, label_BC: Tensor) -> tuple[Tensor, Tensor]:
    """Log of the probability of each label being as it is, and of the opposite: [B, C] each."""
    towards_BC = torch.where(label_BC, logits_BC, -logits_BC)
    return logsigmoid(towards_BC), logsigmoid(-towards_BC)


def class_probabilities(logits_BC: Tensor, *, exclusive: bool) -> Tensor:
    """Probabilities of classes, [B, C] float64; of exclusive ones they sum to 1."""
    return logits_BC.double().softmax(dim=1) if exclusive else logits_BC.double().sigmoid()


@dataclass(frozen=True)
class NumberLoss:
    """Square error of the numbers of whole sequences, in units of their deviations, over those that were measured.

    A network's output is (number - mean) / deviation, with mean and deviation over the sequences that train: what it
    learns does not depend on the units of the data.
    """

    numbers: Numbers
    target_weights: TargetWeights = None

    def weight(self, batch: RnaBatch) -> float:
        return float(self._weights(batch).sum(dtype=torch.float64))

    def total(self, outputs: RnaOutputs, batch: RnaBatch) -> Tensor:
        assert outputs.class_logits_BC is not None
        assert batch.label_BC is not None
        true_BC = _in_deviations(batch.label_BC, self.numbers)
        true_BC = torch.where(torch.isnan(true_BC), 0.0, true_BC)  # as in MaskedError
        error_BC = outputs.class_logits_BC.float() - true_BC
        return (error_BC.square() * self._weights(batch)).sum()

    def _weights(self, batch: RnaBatch) -> Tensor:
        """[B, C] float32: the sequence's weight where measured, else 0."""
        assert batch.label_BC is not None
        assert batch.weight_BC is not None
        return torch.where(torch.isnan(batch.label_BC), 0.0, _times(batch.weight_BC, self.target_weights))


def _standard(numbers: Numbers, like: Tensor) -> tuple[Tensor, Tensor]:
    """Means and scales, [C] float64 each, where another tensor is."""
    both_2C = torch.tensor([numbers.means, numbers.scales], dtype=torch.float64).to(like.device, non_blocking=True)
    return both_2C[0], both_2C[1]


def _in_deviations(values: Tensor, numbers: Numbers) -> Tensor:
    """[..., C] float32: how far from the mean."""
    mean_C, scale_C = _standard(numbers, values)
    return ((values - mean_C) / scale_C).float()


def in_units(deviations: Tensor, numbers: Numbers) -> Tensor:
    """What a network says, [..., C], in the units of the data: float64."""
    mean_C, scale_C = _standard(numbers, deviations)
    return deviations.double() * scale_C + mean_C


def position_values(values: Tensor, units: Numbers | None) -> Tensor:
    """What a network says of nucleotides, [..., C], in the units of the data: float32."""
    return values.float() if units is None else in_units(values, units).float()


def label_values(logits_BC: Tensor, labels: Labels) -> Tensor:
    """What a network says of whole sequences: probabilities of classes, or numbers in their units; [B, C] float64."""
    if isinstance(labels, Classes):
        return class_probabilities(logits_BC, exclusive=labels.exclusive)
    return in_units(logits_BC, labels)


def class_weights(counts_C: np.ndarray, *, beta: float) -> np.ndarray:
    """How much a sequence of each class counts, by the effective number of the class's sequences.

    Args:
        counts_C: [C] int, sequences that train.
        beta: in [0, 1); 0 = all the same, towards 1 = inversely proportional to the counts.

    Returns:
        [C] float64 with mean 1 over the classes that have a sequence; 0 for the others.

    Source:
        Cui et al. 2019, equation 5.

    >>> class_weights(np.array([1_000_000, 10_000, 1_000, 100, 10]), beta=0.9999).round(4).tolist()
    [0.0045, 0.0071, 0.0472, 0.451, 4.4902]
    """
    counts_C = np.asarray(counts_C, dtype=np.float64)
    weight_C = np.divide(1 - beta, 1 - beta**counts_C, out=np.zeros_like(counts_C), where=counts_C > 0)
    return weight_C * (np.count_nonzero(counts_C) / max(weight_C.sum(), np.finfo(np.float64).tiny))


def label_weights(label_NC: np.ndarray, train: np.ndarray, *, exclusive: bool, beta: float) -> np.ndarray:
    """How much each sequence counts, or each of its labels, so that rare classes count more: [N, 1] or [N, C] float32.

    Of classes that do not exclude each other, each weighs the sequences that have it against those that have it not.

    Args:
        label_NC: [N, C] bool.
        train: positions of those that train, whose labels are counted.
        exclusive: one class a sequence.
        beta: see `class_weights`.
    """
    counts_C = label_NC[train].sum(axis=0)
    if exclusive:
        return class_weights(counts_C, beta=beta)[label_NC.argmax(axis=1)][:, None].astype(np.float32)
    pairs_C2 = np.array([class_weights(np.array([len(train) - n, n]), beta=beta) for n in counts_C])
    return np.where(label_NC, pairs_C2[:, 1], pairs_C2[:, 0]).astype(np.float32)


def training_loss(competition: Competition, settings: TrainConfig, labels: Labels | None = None) -> Loss:
    """The loss that a competition's network is trained with; `labels` are those of a labelled set."""
    if isinstance(labels, Classes):
        return ClassLoss(labels.exclusive, settings.focal_gamma, settings.focal_alpha)
    if labels is not None:
        return NumberLoss(labels, relative_weights(settings.target_weights, labels.names))
    if competition.task == "structure":
        return StructureLoss(settings.frame_weight, settings.tm_weight, settings.confidence_weight)
    weights = relative_weights(settings.target_weights, competition.targets)
    return MaskedError(competition.target_range, competition.error_power, competition.units, weights)


def relative_weights(weights: Mapping[str, float], targets: Sequence[str]) -> TargetWeights:
    """Of every target, 1 where `weights` says nothing, over the largest; None where it says nothing at all.

    Equal weights become 1, whatever they are, and change no bit.

    >>> relative_weights({"DMS": 0.5}, ("DMS", "2A3")), relative_weights({"a": 4.0, "b": 2.0}, ("a", "b"))
    ((0.5, 1.0), (1.0, 0.5))
    """
    each = [weights.get(name, 1.0) for name in targets]
    return tuple(weight / max(each) for weight in each) if weights else None


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
