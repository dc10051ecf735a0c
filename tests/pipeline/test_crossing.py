"""Helices between loops: which are found, that they stack on what follows them, and that rings close."""

import itertools

import numpy as np
import pytest

from pipeline.structure import secondary
from pipeline.structure.assembly import gaps_of_rings, trace_from_pairs
from pipeline.structure.denovo import assemble
from pipeline.structure.geometry import Stem, double_helix, find_stems, rotation_onto
from pipeline.structure.motifs import MotifArranger, MotifLibrary
from pipeline.structure.rings import crossing_stacks
from pipeline.structure.secondary import crossing_helices, pair_across_junctions
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


def test_each_residue_is_in_one_helix_and_the_most_stable_wins(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(secondary, "_CROSSING_STABLE", -5.0)
    sequence = KNOT + "AAAGCGUCC"
    found = crossing_helices(sequence, KNOT_PAIRS)
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
    apart: list[float] = []
    closed: list[float] = []
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


#: As `TILE`, but two turns between the junctions and as much beside them: nothing is strained.
RING = (
    *("((((((((((", "(((((((.........)))))))", "((((((((((((((((((((((", "(((((((.........)))))))"),
    *("((((((....))))))", "((((((....))))))", "))))))))))))))))))))))", "((((((....))))))", "))))))))))"),
)


def ring() -> tuple[str, list[tuple[int, int]], Stem]:
    """A sequence that folds into `RING`, its nested pairs, and the helix that its loops form."""
    dots = "".join(RING)
    pairs = pairs_of(dots)
    loops = [part.inner[0] for part in find_stems(len(dots), pairs) if part.inner[1] - part.inner[0] == 10]
    letters = np.array(list("A" * len(dots)))
    rng = np.random.default_rng(1)
    for i, j in pairs:
        letters[[i, j]] = list(("GC", "CG")[rng.integers(2)])
    letters[loops[0] + 3 : loops[0] + 9] = list("GGACGG")
    letters[loops[1] + 3 : loops[1] + 9] = list("CCGUCC")
    return "".join(letters), pairs, Stem(loops[0] + 3, loops[1] + 8, 6)


def gap_of(pairs: list[tuple[int, int]], length: int, kiss: Stem, ways: dict[Stem, int] | None) -> tuple[float, list]:
    arranger = MotifArranger(MotifLibrary([]), "A" * length)
    arranger.start(np.random.default_rng(0), temperature=0.0, ways=ways)
    gaps = gaps_of_rings(length, pairs, np.random.default_rng(0), arranger=arranger, crossing=[kiss])
    return gaps[kiss], list(arranger.ways)


def test_one_way_of_stacking_closes_a_ring_of_whole_turns_and_no_other_does() -> None:
    sequence, pairs, kiss = ring()
    junctions = gap_of(pairs, len(sequence), kiss, None)[1]
    assert len(junctions) == 2
    ways = [dict(zip(junctions, each, strict=True)) for each in itertools.product((0, 1), repeat=2)]
    gaps = sorted(gap_of(pairs, len(sequence), kiss, each)[0] for each in ways)
    assert gaps[0] < 2.0
    assert gaps[1] > 50.0


def test_assemblies_stack_junctions_so_that_rings_close() -> None:
    """It said 57 to 413 Å RMS of strain in designed bundles: all junctions of a trace stacked in one way."""
    sequence, pairs, kiss = ring()
    found = assemble(sequence, [(pairs, 0.9)], library=None, rng=np.random.default_rng(0))
    assert {each.crossing for each in found} == {6}
    beside = find_stems(len(sequence), pairs)[2]
    for each in found:
        angle, aside = off_axis(each.xyz_L3, beside, kiss)
        assert angle < 10.0
        assert 15.0 < aside < 25.0


def test_a_structure_whose_rings_stay_open_gives_way_to_one_whose_rings_close() -> None:
    sequence, pairs, _ = ring()
    torn = [(i, j) for i, j in pairs if not 10 <= i < 17]  # without the stem of a loop that kisses
    found = assemble(sequence, [(torn, 0.9), (pairs, 0.8)], library=None, rng=np.random.default_rng(0))
    assert {each.pairing for each in found} == {0.8}


def test_gaps_of_a_tight_junction_that_pair_end_to_end_part_it_in_two() -> None:
    arms = ["CAAAG"] * 5
    pairs = [(0, 30), (1, 5), (8, 12), (13, 17), (18, 22), (25, 29)]

    def found(first: str, second: str, at: int = 4) -> set[tuple[int, int]]:
        parts = [arms[0], first, *arms[1:at], second, *arms[at:]]
        moved = pairs if at == 4 else [(0, 30), (1, 5), (8, 12), (13, 17), (20, 24), (25, 29)]
        return set(pair_across_junctions("G" + "".join(parts) + "C", moved)) - set(moved)

    assert found("GC", "GC") == {(6, 24), (7, 23)}
    assert found("GA", "UC") == {(6, 24), (7, 23)}
    assert found("GA", "GC") == set()
    assert found("GC", "GC", at=3) == set()  # not opposite: a junction of three and one of five would be left
