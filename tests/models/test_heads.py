"""Heads: bins of distance, pooling, and C1' coordinates."""

import itertools
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from models.heads import ClassHead, PackedGru, ValuesHead, distance_bins
from models.layers.coordinates import CoordinateHead, helix
from pipeline.structure.geometry import handedness, helix_strand


@pytest.fixture(autouse=True)
def seeded() -> None:
    torch.manual_seed(0)


def test_distance_bins_are_equal_between_four_and_sixty_and_open_beyond():
    edges, centres = distance_bins(30)
    assert (len(edges), len(centres)) == (29, 30)
    assert (edges[0], edges[-1]) == (4.0, 60.0)
    steps = [b - a for a, b in itertools.pairwise(centres)]
    assert steps == pytest.approx([2.0] * 29)
    assert all(low < c < high for (low, high), c in zip(itertools.pairwise(edges), centres[1:-1], strict=True))


def test_fewer_than_three_distance_bins_are_refused():
    with pytest.raises(ValueError, match="distance_bins: got 2"):
        distance_bins(2)


def test_a_gru_needs_an_even_width():
    with pytest.raises(ValueError, match="even"):
        PackedGru(7)


@pytest.mark.parametrize("mask", [[False, True, True], [True, False, True], [False] * 3])
def test_a_gru_refuses_padding_before_a_nucleotide(mask: list[bool]):
    """With padding on the left, values were other numbers (by 0.3) without a word: it read the first positions."""
    with pytest.raises(ValueError, match="padding before a nucleotide"):
        PackedGru(4)(torch.randn(1, 3, 4), torch.tensor([mask]))


def test_values_under_the_padding_are_zero():
    mask_BL = torch.tensor([[True, True, False]])
    values_BLC = ValuesHead(4, num_channels=2)(torch.randn(1, 3, 4), mask_BL)
    assert (values_BLC[0, 2] == 0).all()
    assert (values_BLC[0, :2] != 0).all()


def test_a_gru_adds_to_what_the_values_are_read_from():
    head, x_BLD, mask_BL = ValuesHead(4, num_channels=2, gru=True), torch.randn(1, 3, 4), torch.ones(1, 3).bool()
    assert head.gru is not None
    torch.testing.assert_close(head(x_BLD, mask_BL), head.linear(x_BLD + head.gru(x_BLD, mask_BL)))


def pooled(pool: str, x_BLD: Tensor, mask_BL: Tensor) -> Tensor:
    torch.manual_seed(0)
    head = ClassHead(x_BLD.shape[-1], num_classes=3, pool=pool)
    if head.query_D is not None:
        torch.nn.init.normal_(head.query_D)
    return head(x_BLD, mask_BL)


@pytest.mark.parametrize("pool", ["mean", "max", "attention", "gru"])
def test_classes_do_not_see_the_padding(pool: str):
    x_BLD, mask_BL = torch.randn(2, 9, 8), torch.ones(2, 9, dtype=torch.bool)
    padded = F.pad(x_BLD, (0, 0, 0, 30), value=torch.nan)
    found = pooled(pool, padded, F.pad(mask_BL, (0, 30)))
    assert found.shape == (2, 3)
    torch.testing.assert_close(found, pooled(pool, x_BLD, mask_BL), rtol=1e-6, atol=1e-6)


def test_attention_starts_as_the_mean_and_then_weighs():
    x_BLD, mask_BL = torch.randn(2, 9, 8), torch.ones(2, 9, dtype=torch.bool)
    head = ClassHead(8, num_classes=3, pool="attention")
    torch.testing.assert_close(head(x_BLD, mask_BL), head.linear(x_BLD.mean(1)))
    torch.nn.init.constant_(head.query_D, 1e4)
    strongest = x_BLD[torch.arange(2), x_BLD.sum(-1).argmax(1)]
    torch.testing.assert_close(head(x_BLD, mask_BL), head.linear(strongest), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("pool", ["mean", "max", "attention", "gru"])
def test_only_a_gru_knows_the_order(pool: str):
    torch.manual_seed(3)
    x_BLD, mask_BL = torch.randn(1, 9, 8), torch.ones(1, 9, dtype=torch.bool)
    same = torch.allclose(pooled(pool, x_BLD, mask_BL), pooled(pool, x_BLD.flip(1), mask_BL), atol=1e-5)
    assert same == (pool != "gru")


def test_the_grus_last_states_are_those_of_each_sequences_own_ends():
    torch.manual_seed(0)
    gru, x_BLD = PackedGru(8), torch.randn(2, 7, 8)
    mask_BL = torch.arange(7) < torch.tensor([[4], [7]])
    states_BLD, last_BD = gru(x_BLD, mask_BL), gru.last(x_BLD, mask_BL)
    for row, length in enumerate((4, 7)):
        expected = torch.cat([states_BLD[row, length - 1, :4], states_BLD[row, 0, 4:]])
        torch.testing.assert_close(last_BD[row], expected)


def test_the_helix_is_the_one_of_the_structure_code():
    np.testing.assert_allclose(helix(40, like=torch.zeros((), dtype=torch.float64)), helix_strand(40), atol=1e-12)


def coordinate_head(*, moved: bool = True, **kwargs: int) -> CoordinateHead:
    torch.manual_seed(0)
    head = CoordinateHead(16, num_bins=4, use_bpp=False, **kwargs)
    with torch.no_grad():
        for parameter in head.parameters():
            parameter.add_(0.1 * moved * torch.randn_like(parameter))
    return head


def test_an_untrained_head_answers_with_a_centred_right_handed_helix():
    x_BLD, mask_BL = torch.randn(1, 30, 16), torch.ones(1, 30, dtype=torch.bool)
    xyz_L3 = coordinate_head(moved=False)(x_BLD, mask_BL, None).xyz_BL3[0].detach()
    steps = xyz_L3.diff(dim=0).norm(dim=-1)
    assert ((steps > 5.4) & (steps < 6)).all()
    assert xyz_L3.mean(0).abs().max() < 1e-4
    assert (handedness(xyz_L3.numpy()) > 0.2).all()


@pytest.mark.parametrize("pad", [1, 20, 117])
def test_coordinates_do_not_see_the_padding(pad: int):
    head, x_BLD, mask_BL = coordinate_head(), torch.randn(2, 19, 16), torch.ones(2, 19, dtype=torch.bool)
    padded = head(F.pad(x_BLD, (0, 0, 0, pad), value=torch.nan), F.pad(mask_BL, (0, pad)), None).xyz_BL3
    alone = head(x_BLD, mask_BL, None).xyz_BL3
    assert (alone - coordinate_head(moved=False)(x_BLD, mask_BL, None).xyz_BL3).abs().max() > 1
    torch.testing.assert_close(padded[:, :19], alone, rtol=1e-5, atol=1e-4)
    assert (padded[:, 19:] == 0).all()


def test_a_round_commutes_with_rotation_shift_and_reflection():
    """Handedness comes from the start alone."""
    torch.manual_seed(0)
    move = coordinate_head().rounds[0].double()
    h_BLE, xyz_BL3, bias_BHLL = (torch.randn(size).double() for size in ((1, 9, 64), (1, 9, 3), (1, 8, 9, 9)))
    turn_33 = torch.linalg.qr(torch.randn(3, 3).double())[0]
    for motion_33 in (turn_33, -turn_33):
        h_moved, moved = move(h_BLE, xyz_BL3 @ motion_33 + 5, bias_BHLL)
        h_still, still = move(h_BLE, xyz_BL3, bias_BHLL)
        torch.testing.assert_close(moved, still @ motion_33 + 5)
        torch.testing.assert_close(h_moved, h_still)


def test_a_distance_feature_is_one_half_at_its_scale():
    move = coordinate_head().rounds[0]
    for index, scale in enumerate((4.0, 8.0, 16.0, 32.0, 64.0, 128.0)):  # Å
        near = move._nearness(torch.tensor([[[0.0, 0, 0], [scale, 0, 0]]]))[0, :, :, index]
        torch.testing.assert_close(near, torch.tensor([[1.0, 0.5], [0.5, 1.0]]))


def test_no_round_moves_further_than_the_extent():
    """Measured with 8 gates that added up: positions of 800 Å after four rounds from 80 Å."""
    head, x_BLD = coordinate_head(), 100 * torch.randn(1, 700, 16)
    del head.rounds[1:]
    with torch.no_grad():
        head.rounds[0].gate.weight.mul_(1e6)
    start_L3 = helix(700, like=x_BLD)
    extent = (start_L3[0] - start_L3[-1]).norm()
    moved_L3 = head(x_BLD, torch.ones(1, 700, dtype=torch.bool), None).xyz_BL3[0] - (start_L3 - start_L3.mean(0))
    assert 0.1 * extent < moved_L3.norm(dim=-1).max() < 2 * extent


def test_pair_features_steer_the_coordinates():
    head, x_BLD, mask_BL = coordinate_head(track_width=4), torch.randn(1, 9, 16), torch.ones(1, 9, dtype=torch.bool)
    one, other = (head(x_BLD, mask_BL, None, torch.randn(1, 9, 9, 4)).xyz_BL3 for _ in range(2))
    assert (one - other).abs().max() > 0.1


def random_chain(length: int, *, seed: int) -> Tensor:
    """A self-avoiding walk of 5.9 Å steps, centred: [L, 3] Å."""
    rng = torch.Generator().manual_seed(seed)
    chain = [torch.zeros(3)]
    while len(chain) < length:
        following = chain[-1] + 5.9 * F.normalize(torch.randn(3, generator=rng), dim=0)
        if all((following - earlier).norm() > 4.5 for earlier in chain):
            chain.append(following)
    return torch.stack(chain) - torch.stack(chain).mean(0)


def superposed(mobile_L3: Tensor, fixed_L3: Tensor) -> Tensor:
    """Mean squared deviation after the best proper rotation, in Å²; no gradient through the rotation."""
    with torch.no_grad():
        left, _, right = torch.linalg.svd(mobile_L3.T @ fixed_L3)
        left[:, -1] *= torch.det(left @ right).sign()
    return (mobile_L3 @ (left @ right) - fixed_L3).square().sum(-1).mean()


def distance_rmsd(one_L3: Tensor, other_L3: Tensor) -> float:
    return (torch.cdist(one_L3, one_L3) - torch.cdist(other_L3, other_L3)).square().mean().sqrt().item()


@pytest.mark.parametrize("side", [1, -1], ids=["as-it-is", "mirrored"])
def test_coordinates_learn_a_chain_and_not_its_mirror_image(side: int):
    target_L3 = side * random_chain(24, seed=5)
    torch.manual_seed(0)
    head = CoordinateHead(16, num_bins=4, use_bpp=False)
    x_BLD, mask_BL = torch.randn(1, 24, 16), torch.ones(1, 24).bool()
    optimizer = torch.optim.Adam(head.parameters(), lr=5e-3)
    assert distance_rmsd(head(x_BLD, mask_BL, None).xyz_BL3[0].detach(), target_L3) > 5
    for _ in range(200):
        loss = superposed(head(x_BLD, mask_BL, None).xyz_BL3[0], target_L3)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(head.parameters(), 1.0)
        optimizer.step()
    found_L3 = head(x_BLD, mask_BL, None).xyz_BL3[0].detach()
    assert distance_rmsd(found_L3, target_L3) < 1
    assert math.sqrt(superposed(found_L3, target_L3)) < 1
    # the same distances, so that a loss on distances alone could not tell; a chiral one does
    assert distance_rmsd(found_L3, -target_L3) < 1
    assert math.sqrt(superposed(found_L3, -target_L3)) > 4
