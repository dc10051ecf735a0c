"""How a predicted C1' trace differs from the true one, as numbers with a gradient. All in float32 or float64.

Letters: L nucleotides, R resolved ones, F local frames, 3 xyz; lengths in Å. A true trace is NaN where not resolved.
"""

import math

import torch
from torch import Tensor

from pipeline.structure.geometry import LDDT_RADIUS, LDDT_TOLERANCES, d0_rna

_CLAMP = 10.0  # Å: a frame sees no difference between what is further off
_EPSILON = 1e-4  # Å², under square roots, so that a perfect position has a gradient
_LEAST_SCALE = 1.5  # Å
_SUPERPOSITIONS = 4  # rounds in which nucleotides that fit badly lose their say


def frame_error(predicted_L3: Tensor, true_L3: Tensor) -> Tensor:
    """Where nucleotides stand as seen from local frames: 0 for a rigid motion of the truth, 1 for 10 Å off and more.

    A frame stands on three nucleotides in a row. What lies on one side of their plane lies on the other in a mirror
    image: unlike distances, this tells the two apart.

    Args:
        predicted_L3: [L, 3] Å.
        true_L3: [L, 3] Å, NaN where not resolved.

    Returns:
        [], mean over all frames of resolved nucleotides and all resolved nucleotides; 0 if there is no frame.

    Source:
        FAPE, AlphaFold 2 (Jumper et al. 2021, algorithm 28), with C1' in place of the backbone's atoms.
    """
    resolved_L = ~torch.isnan(true_L3).any(-1)
    middle_F = (resolved_L[:-2] & resolved_L[1:-1] & resolved_L[2:]).nonzero().squeeze(1) + 1
    if not len(middle_F):
        return predicted_L3.sum() * 0.0
    offset_FR3 = _seen_from_frames(predicted_L3, middle_F, resolved_L) - _seen_from_frames(
        true_L3, middle_F, resolved_L
    )
    distance_FR = (offset_FR3.square().sum(-1) + _EPSILON).sqrt() - math.sqrt(_EPSILON)
    return distance_FR.clamp(max=_CLAMP).mean() / _CLAMP


def _seen_from_frames(xyz_L3: Tensor, middle_F: Tensor, seen_L: Tensor) -> Tensor:
    """[F, R, 3]: coordinates of the seen nucleotides in the frames whose middle nucleotides are given."""
    before_F3, origin_F3, after_F3 = xyz_L3[middle_F - 1], xyz_L3[middle_F], xyz_L3[middle_F + 1]
    along_F3 = _unit(after_F3 - before_F3)
    out_F3 = origin_F3 - before_F3
    out_F3 = _unit(out_F3 - (out_F3 * along_F3).sum(-1, keepdim=True) * along_F3)
    axes_F33 = torch.stack([along_F3, out_F3, torch.linalg.cross(along_F3, out_F3)], dim=-1)
    return (xyz_L3[seen_L].unsqueeze(0) - origin_F3.unsqueeze(1)) @ axes_F33


def _unit(vector_F3: Tensor) -> Tensor:
    return vector_F3 / (vector_F3.square().sum(-1, keepdim=True) + _EPSILON).sqrt()


def soft_tm_score(predicted_L3: Tensor, true_L3: Tensor) -> Tensor:
    """TM-score of a superposition that a few rounds of reweighting find: [] in (0, 1]; no gradient through the motion.

    Below 45 resolved nt its scale stays 1.5 Å: that of the score, 0.3 Å for the shortest, leaves no gradient to
    whatever is not nearly right.

    Args:
        predicted_L3: [L, 3] Å.
        true_L3: [L, 3] Å, NaN where not resolved; at least one nucleotide is.

    Source:
        Zhang and Skolnick 2004; scale of RNA by Gong et al. 2019, as in US-align.
    """
    resolved_L = ~torch.isnan(true_L3).any(-1)
    predicted_R3, true_R3 = predicted_L3[resolved_L], true_L3[resolved_L]
    scale = max(d0_rna(max(len(true_R3), 1)), _LEAST_SCALE)
    share_R = torch.ones_like(true_R3[:, 0])
    for _ in range(_SUPERPOSITIONS):
        with torch.no_grad():
            rotation_33, shift_3 = _superposition(predicted_R3, true_R3, share_R.square())
        share_R = 1 / (1 + (predicted_R3 @ rotation_33 + shift_3 - true_R3).square().sum(-1) / scale**2)
    return share_R.mean()


def _superposition(mobile_R3: Tensor, fixed_R3: Tensor, weight_R: Tensor) -> tuple[Tensor, Tensor]:
    """Rotation and shift that bring one trace onto another with the least weighted square distance."""
    weight_R1 = (weight_R / weight_R.sum()).unsqueeze(-1)
    mobile_3, fixed_3 = (weight_R1 * mobile_R3).sum(0), (weight_R1 * fixed_R3).sum(0)
    covariance_33 = (weight_R1 * (mobile_R3 - mobile_3)).T @ (fixed_R3 - fixed_3)
    # a prediction that is not finite comes out as a loss that is not: the decomposition would raise an error
    unit_33 = torch.eye(3, dtype=covariance_33.dtype, device=covariance_33.device)
    covariance_33 = torch.where(covariance_33.isfinite().all(), covariance_33, unit_33)
    left_33, _, right_33 = torch.linalg.svd(covariance_33)
    side = torch.ones_like(mobile_3)
    side[2] = torch.det(left_33 @ right_33).sign()
    rotation_33 = (left_33 * side) @ right_33
    return rotation_33, fixed_3 - mobile_3 @ rotation_33


@torch.no_grad()
def lddt(predicted_L3: Tensor, true_L3: Tensor) -> Tensor:
    """Share of each nucleotide's true distances below 30 Å that are kept within 0.5, 1, 2 and 4 Å, on average.

    Args:
        predicted_L3: [L, 3] Å.
        true_L3: [L, 3] Å, NaN where not resolved.

    Returns:
        [L] in [0, 1]; NaN where not resolved or without surroundings.

    Source:
        Mariani et al. 2013, on C1' alone and with the radius that AlphaFold 3 uses for nucleotides.
    """
    true_LL, predicted_LL = _distances(true_L3), _distances(predicted_L3)
    counted_LL = (true_LL < LDDT_RADIUS) & ~torch.eye(len(true_LL), dtype=torch.bool, device=true_LL.device)
    error_LL = (predicted_LL - true_LL).abs()
    kept_LL = torch.stack([error_LL < tolerance for tolerance in LDDT_TOLERANCES]).float().mean(0)
    return torch.where(counted_LL, kept_LL, 0.0).sum(1) / counted_LL.sum(1)


def _distances(xyz_L3: Tensor) -> Tensor:
    return (xyz_L3.unsqueeze(0) - xyz_L3.unsqueeze(1)).square().sum(-1).sqrt()
