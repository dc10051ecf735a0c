"""The benchmark's own parts: mutants as promised, and a record that can be trusted."""

import json
import shutil

import numpy as np
import pytest

from folds import bench
from folds.edit_distance import pack, pair_distances
from pipeline.paths import Paths
from tests.folds.families import families, make_table, random_sequence, save


def test_mutants_change_up_to_thirty_percent_of_their_parent(rng):
    parent = random_sequence(rng, 200)
    mutants = bench.make_mutants([parent], 300, seed=1)
    edits = pair_distances(pack([parent, *mutants]), np.zeros(len(mutants), int), np.arange(1, len(mutants) + 1))
    assert 25 < edits.mean() < 35
    assert edits.min() < 5
    assert edits.max() < 90
    assert {len(mutant) for mutant in mutants} > {199, 200, 201}
    assert mutants == bench.make_mutants([parent], 300, seed=1)


def test_the_record_holds_what_was_measured(rng, tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", "")  # only our own programs
    paths = Paths(comp="ribonanza", root=tmp_path)
    save(make_table(families(rng, parents=12, size=5, length=80, edits=4)), paths)
    record = tmp_path / "folds.json"
    table = bench.run(paths, folder=tmp_path / "scratch", mutants=200, scales=[50], record=record)
    facts = json.loads(record.read_text())
    exact = facts["real"]["clusterings"]["exact"]
    assert set(facts["real"]["clusterings"]) == {"exact", "seeded"}
    assert exact["clusters"] == 12
    assert exact["recall"] == 1
    assert exact["pairs_in_two_folds"] == exact["pairs_in_two_clusters"] == 0
    assert exact["highest"] < 0.8
    assert facts["real"]["related_pairs"] == pytest.approx(12 * 10, abs=3)
    assert facts["mutants"]["clusterings"]["seeded"]["recall"] > 0.95
    assert facts["scales"][0]["designs"] <= 50
    assert table.row_count == 4


@pytest.mark.skipif(not shutil.which("mmseqs"), reason="MMseqs2 is not installed")
def test_mmseqs_joins_near_copies(rng, tmp_path):
    texts = families(rng, parents=4, size=5, length=100, edits=2)
    roots = bench._mmseqs("easy-linclust", (), texts, tmp_path)
    assert np.array_equal(roots[:, None] == roots, np.arange(20)[:, None] // 5 == np.arange(20) // 5)
