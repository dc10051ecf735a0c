"""C1' coordinates: an ideal helix, bent by a few rounds of attention that knows where everybody is.

Letters: B batch, L length (nt), D width, E hidden width, H head, K lDDT bin, P pair, S scale, 3 xyz.
"""

import math
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.layers.attention import NUM_PAIR_FEATURES, RelativePosition, pair_features
from models.layers.masked import masked_mean, zero_pads
from models.layers.precision import at_least_float32

#: C1' of one strand of an A-form helix: fitted to 230 helices in 182 chains of the PDB (`pipeline.structure.geometry`);
#: neighbours are 5.45 Å apart. Fibre models give 2.81 Å and 32.7° (Arnott et al. 1973).
_RISE, _TWIST, _RADIUS = 2.60, math.radians(32.83), 8.48  # Å a step, right-handed turn a step, Å
_ROUNDS = 4  # in which all positions move
_HIDDEN, _HEADS = 64, 8  # E, and weighted means a position
_SCALES = (4.0, 8.0, 16.0, 32.0, 64.0, 128.0)  # Å at which a distance's features fall to one half


def helix(length: int, *, like: Tensor) -> Tensor:
    """One strand of an A-form helix: [L, 3] Å, of the type and device of `like`."""
    step_L = torch.arange(length, device=like.device, dtype=like.dtype)
    angle_L = _TWIST * step_L
    return torch.stack([_RADIUS * torch.cos(angle_L), _RADIUS * torch.sin(angle_L), _RISE * step_L], dim=-1)


class Coordinates(NamedTuple):
    """A trace, and what the network thinks of it."""

    xyz_BL3: Tensor  # float32, Å
    lddt_logits_BLK: Tensor  # float32: equal bins from 0 to 1 of each nucleotide's lDDT


class CoordinateHead(nn.Module):
    """One C1' position per nucleotide, in Å and float32, and how far each is to be trusted.

    Every round moves each position towards or away from weighted means of all; the weights come from both hidden
    states, the distance in space, the distance along the chain, and base pairing and pair features where there are
    any. A round commutes with rotations, shifts and reflections; the start is a right-handed helix and nothing
    else, so that a fold and its mirror image are different answers. The first answer, untrained, is the helix.

    Memory in training is about ``400 B L²`` bytes: 87 MiB for B 8, L 170.

    Args:
        width: D.
        num_bins: K.
        use_bpp: whether base-pair probabilities are given.
        track_width: P, of the pair features that the network hands on; 0 = none.

    Source:
        E(n)-equivariant graph network, Satorras et al. 2021, equations 3 to 6. Where this differs: the sum over
        differences is the mean of several softmaxes, each times a gate in (-1, 1): no step is longer than the extent.
    """

    def __init__(self, width: int, *, num_bins: int, use_bpp: bool, track_width: int = 0) -> None:
        super().__init__()
        self.into = nn.Linear(width, _HIDDEN)
        self.position = RelativePosition(_HEADS)
        self.pairing = nn.Linear(NUM_PAIR_FEATURES, _HEADS, bias=False) if use_bpp else None
        self.track = nn.Linear(track_width, _HEADS, bias=False) if track_width else None
        self.rounds = nn.ModuleList(_Round(_HIDDEN, num_heads=_HEADS) for _ in range(_ROUNDS))
        self.confidence = nn.Sequential(nn.LayerNorm(_HIDDEN), nn.Linear(_HIDDEN, num_bins))

    def forward(
        self, x_BLD: Tensor, mask_BL: Tensor, bpp_BLL: Tensor | None, pair_BLLP: Tensor | None = None
    ) -> Coordinates:
        """From [B, L, D]: a trace centred on the mean of its real positions, and its logits; zero under the padding."""
        with torch.autocast(x_BLD.device.type, enabled=False):
            h_BLE = self.into(zero_pads(at_least_float32(x_BLD), mask_BL))
            bias_BHLL = self._bias(mask_BL, bpp_BLL, pair_BLLP)
            xyz_BL3 = helix(mask_BL.shape[1], like=h_BLE).expand(mask_BL.shape[0], -1, -1)
            xyz_BL3 = _centre(xyz_BL3, mask_BL)
            for move in self.rounds:
                h_BLE, xyz_BL3 = move(h_BLE, xyz_BL3, bias_BHLL)
            xyz_BL3 = zero_pads(_centre(xyz_BL3, mask_BL), mask_BL)
            return Coordinates(xyz_BL3, zero_pads(self.confidence(h_BLE), mask_BL))

    def _bias(self, mask_BL: Tensor, bpp_BLL: Tensor | None, pair_BLLP: Tensor | None) -> Tensor:
        bias_BHLL = self.position(mask_BL.shape[1]).unsqueeze(0)
        dtype = bias_BHLL.dtype
        if self.pairing is not None and bpp_BLL is not None:
            pairs_BLLF = pair_features(bpp_BLL).permute(0, 2, 3, 1)
            bias_BHLL = bias_BHLL + self.pairing(pairs_BLLF.to(dtype)).permute(0, 3, 1, 2)
        if self.track is not None and pair_BLLP is not None:
            bias_BHLL = bias_BHLL + self.track(pair_BLLP.to(dtype)).permute(0, 3, 1, 2)
        return torch.where(mask_BL[:, None, None], bias_BHLL, torch.finfo(dtype).min)


class _Round(nn.Module):
    """Attention over all positions that also moves them."""

    def __init__(self, hidden: int, *, num_heads: int) -> None:
        super().__init__()
        self.num_heads = num_heads
        self.norm = nn.LayerNorm(hidden)
        self.qkv = nn.Linear(hidden, 3 * hidden, bias=False)
        self.near = nn.Linear(len(_SCALES), num_heads, bias=False)
        self.out = nn.Linear(hidden, hidden)
        self.gate = nn.Linear(hidden, num_heads)
        nn.init.zeros_(self.gate.weight)  # an untrained head answers with the helix
        nn.init.zeros_(self.gate.bias)
        self.scale_S: Tensor
        self.register_buffer("scale_S", torch.tensor(_SCALES), persistent=False)

    def forward(self, h_BLE: Tensor, xyz_BL3: Tensor, bias_BHLL: Tensor) -> tuple[Tensor, Tensor]:
        batch, length, hidden = h_BLE.shape
        heads = self.qkv(self.norm(h_BLE)).view(batch, length, 3, self.num_heads, -1).permute(2, 0, 3, 1, 4)
        q_BHLE, k_BHLE, v_BHLE = heads.unbind(0)
        logits_BHLL = q_BHLE @ k_BHLE.mT / math.sqrt(q_BHLE.shape[-1]) + bias_BHLL
        weight_BHLL = torch.softmax(logits_BHLL + self.near(self._nearness(xyz_BL3)).permute(0, 3, 1, 2), dim=-1)
        mixed_BLE = (weight_BHLL @ v_BHLE).transpose(1, 2).reshape(batch, length, hidden)
        h_BLE = h_BLE + F.gelu(self.out(mixed_BLE))
        pull_BHL3 = weight_BHLL @ xyz_BL3.unsqueeze(1) - xyz_BL3.unsqueeze(1)
        gate_BHL1 = torch.tanh(self.gate(h_BLE)).transpose(1, 2).unsqueeze(-1)
        return h_BLE, xyz_BL3 + (gate_BHL1 * pull_BHL3).mean(1)

    def _nearness(self, xyz_BL3: Tensor) -> Tensor:
        """Squared distances at several scales, 1 at zero and 0 far away: [B, L, L, S]."""
        square_BLL = (xyz_BL3.unsqueeze(2) - xyz_BL3.unsqueeze(1)).square().sum(-1)
        return 1 / (1 + square_BLL.unsqueeze(-1) / self.scale_S.square())


def _centre(xyz_BL3: Tensor, mask_BL: Tensor) -> Tensor:
    return xyz_BL3 - masked_mean(xyz_BL3, mask_BL).unsqueeze(1)
