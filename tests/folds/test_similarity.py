"""Distances against the plain dynamic programme, flanks, and clusters against brute force."""

import subprocess
import sys
from itertools import combinations

import numba
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from folds import seeds, similarity
from folds.components import find_roots
from folds.edit_distance import (
    UNKNOWN,
    aligned_positions,
    distance_rows,
    pack,
    pair_distance_ref,
    pair_distances,
    share_identical,
)
from folds.flanks import MAX_FLANK, Flank, cut_flanks, find_flank
from folds.similarity import find_clusters, find_designs, link
from tests.folds.families import (
    LEFT,
    RIGHT,
    clusters_ref,
    families,
    make_table,
    mutate,
    random_sequence,
    related_ref,
    with_primers,
)

LENGTHS = [1, 2, 20, 63, 64, 65, 100, 127, 128, 129, 191, 192, 193, 260]


def relatives(rng, *, most=260):
    """Sequences of all word counts, among them mutants and pieces of others."""
    made = [random_sequence(rng, length) for length in LENGTHS]
    made += [mutate(rng, text, edits=len(text) // 8 + 1) for text in made]
    made += [text[len(text) // 5 :] for text in made[8:14]] + [made[3], made[3]]
    return sorted(made, key=len)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_distance_equals_the_plain_dynamic_programme(data):
    letters = st.text(alphabet="ACGU", min_size=1, max_size=70)
    first, second = data.draw(letters), data.draw(letters)
    second = data.draw(st.sampled_from([second, second + first, first[len(first) // 3 :] + second, first]))
    got = pair_distances(pack([first, second]), np.array([0]), np.array([1]))
    assert got[0] == pair_distance_ref(first, second)


def test_distance_equals_the_plain_dynamic_programme_over_word_borders(rng):
    texts = relatives(rng)
    pairs = np.array(list(combinations(range(len(texts)), 2)))[::3]
    expected = [pair_distance_ref(texts[one], texts[two]) for one, two in pairs]
    packed = pack(texts)
    assert pair_distances(packed, pairs[:, 0], pairs[:, 1]).tolist() == expected
    assert pair_distances(packed, pairs[:, 1], pairs[:, 0]).tolist() == expected


def test_rows_of_distances_equal_single_pairs(rng):
    texts = relatives(rng) + relatives(rng) + relatives(rng)
    texts.sort(key=len)
    packed, total = pack(texts), len(texts)
    labels = np.arange(total) % 5
    full = np.concatenate([rows for _, rows in distance_rows(packed, np.arange(total))])
    some = np.concatenate([rows for _, rows in distance_rows(packed, labels)])
    upper = np.triu(np.ones((total, total), bool), 1)
    one, two = np.nonzero(upper)
    assert np.array_equal(full[upper], pair_distances(packed, one, two))
    assert (full[~upper] == UNKNOWN).all()
    wanted = upper & (labels[:, None] != labels)
    assert np.array_equal(some[wanted], full[wanted])
    assert (some[~wanted] == UNKNOWN).all()


def test_rows_of_distances_need_sorted_sequences():
    with pytest.raises(ValueError, match="sorted by length"):
        next(distance_rows(pack(["ACGU", "A"]), np.arange(2)))


def identity(first: str, second: str) -> float:
    (edits,) = pair_distances(pack([first, second]), np.array([0]), np.array([1]))
    return share_identical(int(edits), *sorted((len(first), len(second))))


@pytest.mark.parametrize("shift", [0, 10, 20])
def test_tiled_windows_are_relatives(rng, shift):
    genome = random_sequence(rng, 160)
    assert identity(genome[:100], genome[shift : shift + 100]) == pytest.approx(1 - shift / 100)


def test_a_piece_of_a_sequence_is_identical_to_it(rng):
    text = random_sequence(rng, 150)
    assert identity(text, text[40:110]) == identity(text[40:110], text) == 1.0


@pytest.mark.parametrize(("length", "expected"), [(40, 1.0), (39, 39 / 500), (15, 15 / 500)])
def test_short_pieces_do_not_make_strangers_relatives(rng, length, expected):
    """15 nt are found in any ribosome: the official structures hung together in one cluster of 778 of 844."""
    text = random_sequence(rng, 500)
    assert identity(text, text[200 : 200 + length]) == pytest.approx(expected)


def test_alignment_costs_what_the_distance_says(rng):
    for text in relatives(rng):
        pattern = mutate(rng, text[len(text) // 4 :], edits=4)
        short, long = sorted((pattern, text), key=len)
        places = aligned_positions(short, long)
        used = places[places >= 0]
        assert (np.diff(used) > 0).all()
        replaced = sum(short[row] != long[place] for row, place in enumerate(places) if place >= 0)
        skipped = used[-1] - used[0] + 1 - len(used) if used.size else 0
        cost = replaced + skipped + (places < 0).sum()
        least = pair_distance_ref(short, long)
        assert cost == least or (len(short) == len(long) and cost > least)


def test_primers_and_barcodes_are_no_part_of_the_design(rng):
    designs = [random_sequence(rng, 50) for _ in range(60)]
    sequences = [with_primers(rng, design) for design in designs]
    found, flanks = find_designs(sequences, ["library"] * 60)
    assert flanks["library"] == Flank(left=len(LEFT), right=len(RIGHT) + 20, barcode=20)
    assert found == designs


def test_a_constant_end_without_pairing_is_no_barcode(rng):
    sequences = [LEFT + random_sequence(rng, 66) + "UUCG" + random_sequence(rng, 8) + RIGHT for _ in range(60)]
    assert find_flank(sequences) == Flank(left=len(LEFT), right=len(RIGHT), barcode=0)


def test_one_sequence_in_twenty_may_differ_in_the_primer(rng):
    sequences = [LEFT + random_sequence(rng, 40) for _ in range(100)]
    sequences[:5] = [random_sequence(rng, 66) for _ in range(5)]
    assert find_flank(sequences).left == len(LEFT)
    sequences[:12] = [random_sequence(rng, 66) for _ in range(12)]
    assert find_flank(sequences).left == 0


def test_small_data_sets_and_scaffolds_keep_their_design(rng):
    family = [mutate(rng, random_sequence(rng, 10) + LEFT * 4, edits=1) for _ in range(49)]
    assert find_flank(family) == Flank(0, 0, 0)
    scaffold = random_sequence(rng, 150)
    assert find_flank([scaffold] * 80) == Flank(MAX_FLANK, MAX_FLANK, 0)


@pytest.mark.parametrize("length", [1, 46, 47, 65])
def test_no_sequence_is_trimmed_to_nothing(rng, length):
    text = random_sequence(rng, length)
    assert text[cut_flanks(text, Flank(left=26, right=20, barcode=0))] == text


def test_exact_clusters_are_the_connected_components(rng):
    sequences = families(rng, parents=8, size=5, edits=15) + families(rng, parents=4, size=4, length=30, edits=8)
    table = make_table(sequences)
    pairs = related_ref(find_designs(sequences, ["library"] * len(sequences))[0], 80)
    found = find_clusters(table, percent=80)
    assert found.facts["method"] == "exact"
    assert found.cluster == clusters_ref(table["sequence_id"].to_list(), pairs)
    assert 12 < len(set(found.cluster)) < len(sequences) - 12


def test_groups_and_copies_are_kept_together(rng):
    sequences = [random_sequence(rng, 60) for _ in range(10)]
    sequences[9] = sequences[4]
    groups = ["a", None, "a", "b", None, None, "b", "a", None, None]
    found = find_clusters(make_table(sequences, groups=groups), percent=80)
    expected = [0, 1, 0, 3, 4, 5, 3, 0, 8, 4]
    assert found.cluster == [f"s{number:05d}" for number in expected]


def test_seeds_find_relatives_and_never_join_strangers(rng):
    """Seeded clusters only split exact ones, and split few: each mutant differs from its parent in 10 % at most."""
    texts = families(rng, parents=60, size=12, length=100, edits=10)
    texts = sorted([*texts, *(text[:25] for text in texts[::40])], key=len)
    roots = {}
    for method in ("exact", "seeded"):
        parent = np.arange(len(texts))
        link(pack(texts), parent, percent=80, method=method)
        roots[method] = find_roots(parent)
    assert np.array_equal(roots["exact"][roots["seeded"]], roots["exact"])
    assert len(np.unique(roots["seeded"])) <= 1.02 * len(np.unique(roots["exact"]))


def test_long_relatives_are_found_beside_long_strangers_that_share_a_repeat(rng, monkeypatch):
    """Mutants and fragments of 1,500 to 3,000 nt, half with one repeat of 200 nt; few exact distances are needed."""
    parents = [random_sequence(rng, int(length)) for length in rng.integers(1500, 3000, 60)]
    repeat = random_sequence(rng, 200)
    parents = [
        text[:500] + mutate(rng, repeat, edits=20) + text[700:] if i % 2 else text for i, text in enumerate(parents)
    ]
    relatives = [mutate(rng, text, edits=len(text) // 5) for text in parents[::4]]
    fragments = [mutate(rng, text[200:1300], edits=150) for text in parents[1::4]]
    texts = sorted([*parents, *relatives, *fragments], key=len)
    compared = []
    pairs = seeds.pair_distances
    monkeypatch.setattr(
        seeds,
        "pair_distances",
        lambda packed, *pair: (compared.append((packed, len(pair[0]))), pairs(packed, *pair))[1],
    )
    packed, parent = pack(texts), np.arange(len(texts))
    link(packed, parent, percent=80, method="seeded")
    roots = np.arange(len(texts))
    link(packed, roots, percent=80, method="exact")
    assert np.array_equal(find_roots(parent), find_roots(roots))
    assert len(np.unique(find_roots(roots))) == len(parents)
    exact = sum(count for of, count in compared if of is packed)
    assert len(relatives) + len(fragments) <= exact < 2 * (len(relatives) + len(fragments))


def test_seeds_are_the_same_however_often_the_scan_pauses(rng):
    """A slice stops when its room for pairs is full; it has to go on as if it had not stopped."""
    packed = pack(sorted(families(rng, parents=10, size=90, length=80, edits=12), key=len))
    total, marks = packed.lengths_N.size, np.arange(8)
    owner = np.repeat(np.arange(total, dtype=np.uint32), packed.lengths_N)
    index = seeds._Index(owner, *seeds._index(packed.tokens_T, packed.offsets_N, marks), marks)
    found = []
    for room in (1 << 20, seeds.NEIGHBOURS):
        start, keys, room_R = 0, [], np.empty(room, np.uint64)
        while start < index.places_Q.size:
            start, count = seeds._scan(packed, index, np.arange(total), start, index.places_Q.size, room_R)
            keys += room_R[:count].tolist()
        found.append(keys)
    assert found[0] == found[1]
    assert len(found[0]) > 10_000


@pytest.mark.parametrize("method", ["exact", "seeded"])
def test_clusters_do_not_depend_on_threads(rng, method, monkeypatch):
    monkeypatch.setattr(similarity, "EXHAUSTIVE", 0 if method == "seeded" else 1 << 30)
    table = make_table(families(rng, parents=20, size=10, length=90, edits=18))
    before = numba.get_num_threads()
    try:
        numba.set_num_threads(1)
        alone = find_clusters(table, percent=80).cluster
    finally:
        numba.set_num_threads(before)
    assert find_clusters(table, percent=80).cluster == alone


def test_lengths_of_structures_can_be_clustered(rng):
    """15 to 4,300 nt, as in the structure competition."""
    ribosome = random_sequence(rng, 4300)
    sequences = [ribosome, mutate(rng, ribosome, edits=300), ribosome[1000:1400], random_sequence(rng, 300)]
    sequences += [random_sequence(rng, 15), random_sequence(rng, 1200)]
    found = find_clusters(make_table(sequences), percent=80)
    assert found.cluster[0] == found.cluster[1] == found.cluster[2] == "s00000"
    assert found.cluster[3] == "s00003"
    assert found.cluster[5] == "s00005"


def test_comparing_sequences_leaves_the_threads_of_torch_alone():
    """numba's OpenMP layer set torch's threads from 1 to 2, and training in the same process changed its digits."""
    code = (
        "import numpy as np, torch; torch.set_num_threads(1)\n"
        "from folds.edit_distance import distance_rows, pack\n"
        "list(distance_rows(pack(['GGAAACUUCC'] * 50), np.zeros(50, dtype=np.int64)))\n"
        "assert torch.get_num_threads() == 1, torch.get_num_threads()"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
