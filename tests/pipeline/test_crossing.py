"""Helices between loops: which are found, that they stack on what follows them, and that rings close."""

import numpy as np
import pytest

from pipeline.structure.assembly import trace_from_pairs
from pipeline.structure.denovo import assemble
from pipeline.structure.geometry import Stem, double_helix, find_stems, rotation_onto
from pipeline.structure.motifs import MotifArranger, MotifLibrary
from pipeline.structure.rings import crossing_stacks
from pipeline.structure.secondary import crossing_helices
from tests.pipeline.dot_bracket import pairs_of

#: Two hairpins whose loops of nine pair as those of HIV-1's dimerisation site do.
KISSING = "GGCGACGC" + "AAGGACGGA" + "GCGUCGCC" + "A" * 15 + "GCCUGAGC" + "AACCGUCCA" + "GCUCAGGC"
KISSING_PAIRS = [(k, 24 - k) for k in range(8)] + [(40 + k, 64 - k) for k in range(8)]
#: A stem whose loop pairs with the 3' tail.
KNOT = "GGCAGC" + "AAA" + "GGACGC" + "GCUGCC" + "AAAAAAA" + "GCGUCC"
KNOT_PAIRS = [(k, 20 - k) for k in range(6)]
#: Two junctions of four helices on one axis, and a helix beside it whose two halves kiss: a ring.
TILE = (
    *("((((((((((", "((((((((.........))))))))", "((((((((((((((((((((((((((", "((((((((.........))))))))"),
    *("((((((....))))))", "((((((....))))))", "))))))))))))))))))))))))))", "((((((....))))))", "))))))))))"),
)


def axis_of(xyz_L3: np.ndarray, stem: Stem) -> tuple[np.ndarray, np.ndarray]:
    """The middle of a helix's axis, and its direction."""
    ideal_P3, atoms_P3 = double_helix(stem.pairs).reshape(-1, 3), xyz_L3[stem.residues]
    turn = rotation_onto(ideal_P3 - ideal_P3.mean(axis=0), atoms_P3 - atoms_P3.mean(axis=0))
    middle = np.array([0.0, 0.0, ideal_P3[:, 2].mean()])
    return (middle - ideal_P3.mean(axis=0)) @ turn + atoms_P3.mean(axis=0), turn[2]


def off_axis(xyz_L3: np.ndarray, one: Stem, other: Stem) -> tuple[float, float]:
    """Angle between two axes in degrees, and how far the second helix's middle is from the first one's axis, Å."""
    (point, along), (middle, direction) = axis_of(xyz_L3, one), axis_of(xyz_L3, other)
    aside = middle - point - along * ((middle - point) @ along)
    return float(np.degrees(np.arccos(min(abs(along @ direction), 1.0)))), float(np.linalg.norm(aside))


def pair_widths(xyz_L3: np.ndarray, stem: Stem) -> np.ndarray:
    first_P3, second_P3 = xyz_L3[stem.residues].reshape(2, -1, 3)
    return np.linalg.norm(first_P3 - second_P3, axis=1)


def test_kissing_loops_are_found_and_none_where_loops_do_not_fit() -> None:
    assert crossing_helices(KISSING, KISSING_PAIRS) == [(10, 55, 6)]
    unlike = KISSING.replace("AACCGUCCA", "AAAAAAAAA")
    assert crossing_helices(unlike, KISSING_PAIRS) == []


def test_a_pseudoknot_is_found_between_a_loop_and_a_tail() -> None:
    assert crossing_helices(KNOT, KNOT_PAIRS) == [(9, 33, 6)]


@pytest.mark.parametrize("loop", ["AAGGACGGU", "AGGACGGAA"])
def test_hairpins_whose_loops_are_unlike_a_180_degree_kiss_are_left_alone(loop: str) -> None:
    """It said that purine riboswitches hold theirs on one axis, not side by side: TM-score 0.81 -> 0.39."""
    assert crossing_helices(KISSING.replace("AAGGACGGA", loop), KISSING_PAIRS) == []


def test_each_residue_is_in_one_helix_and_the_most_stable_wins() -> None:
    sequence = KNOT + "AAAGCGUCC"
    found = crossing_helices(sequence, KNOT_PAIRS, stable=-5.0)
    used = [residue for helix in found for residue in Stem(*helix).residues.tolist()]
    assert found
    assert len(used) == len(set(used))


@pytest.mark.parametrize("seed", [0, 1])
def test_hairpins_that_kiss_stand_on_one_axis_with_their_loops_between(seed: int) -> None:
    kiss, stems = Stem(10, 55, 6), find_stems(len(KISSING), KISSING_PAIRS)
    xyz_L3 = trace_from_pairs(len(KISSING), KISSING_PAIRS, np.random.default_rng(seed), crossing=[kiss])
    for stem in stems:
        angle, aside = off_axis(xyz_L3, kiss, stem)
        assert angle < 15.0
        assert aside < 5.0
    assert np.allclose(pair_widths(xyz_L3, kiss), 10.58, atol=0.3)
    ends = [axis_of(xyz_L3, stem)[0] for stem in stems]
    assert 38.0 < np.linalg.norm(ends[0] - ends[1]) < 48.0  # two halves of 8 pairs and 9 steps, 2.6 Å each


def test_the_stems_of_a_pseudoknot_stack() -> None:
    knot, stem = Stem(9, 33, 6), find_stems(len(KNOT), KNOT_PAIRS)[0]
    assert [(stack.stem, stack.inside) for stack in crossing_stacks([knot], [stem])] == [(stem, True)]
    xyz_L3 = trace_from_pairs(len(KNOT), KNOT_PAIRS, np.random.default_rng(0), crossing=[knot])
    angle, aside = off_axis(xyz_L3, knot, stem)
    assert angle < 10.0
    assert aside < 4.0
    assert np.linalg.norm(np.diff(xyz_L3, axis=0), axis=1).max() < 8.0


def test_a_ring_closes_through_a_kiss() -> None:
    dots = "".join(TILE)
    pairs = pairs_of(dots)
    loops = [part for part in find_stems(len(dots), pairs) if part.inner[1] - part.inner[0] == 10]
    kiss = Stem(loops[0].inner[0] + 3, loops[1].inner[0] + 8, 6)
    arranger = MotifArranger(MotifLibrary([]), "A" * len(dots))
    apart, closed = [], []
    for crossing, found in ((), apart), ([kiss], closed):
        arranger.start(np.random.default_rng(0), temperature=0.0)
        xyz_L3 = trace_from_pairs(len(dots), pairs, np.random.default_rng(0), arranger=arranger, crossing=crossing)
        found += pair_widths(xyz_L3, kiss).tolist()
    assert min(apart) > 14.0
    assert np.allclose(closed, 10.58, atol=2.0)
    assert np.linalg.norm(np.diff(xyz_L3, axis=0), axis=1).max() < 8.0


def test_assemblies_say_how_many_pairs_are_between_loops() -> None:
    rng = np.random.default_rng(0)
    found = assemble(KISSING, [(KISSING_PAIRS, 0.9), ([], 0.1)], library=None, rng=rng)
    assert {each.crossing for each in found if each.pairs} == {6}
    assert {each.crossing for each in found if not each.pairs} == {0}
