"""Locks: committed digests that fold tables are checked against."""

import json

import pytest

from folds import assign
from folds.lock import KEPT, LOCKS, lock_path, write_lock
from pipeline.errors import DataError
from pipeline.paths import Paths
from tests.folds.families import families, make_table, save

SPLIT = "sim80_k3"


@pytest.fixture
def chain(rng, tmp_path):
    """Run the folds stage on one library with locks of its own."""
    paths = Paths(comp="ribonanza", root=tmp_path / "artifacts")
    table = make_table(families(rng, parents=20, size=3))
    save(table, paths)

    def run(**options):
        return assign.run(paths, split=SPLIT, locks=tmp_path / "locks", **options)

    run.paths, run.table, run.locks = paths, table, tmp_path / "locks"
    return run


def test_data_without_a_lock_are_said_to_be_unlocked(chain):
    report = chain()
    assert report.facts["lock"].startswith("absent: no ribonanza-sim80_k3-")
    assert report.facts["lock"].endswith("make folds RELOCK=1 writes it")
    assert not chain.locks.exists()


def test_a_written_lock_verifies_built_and_current_folds(chain):
    assert chain(relock=True).facts["lock"].startswith("written: ribonanza-sim80_k3-")
    assert chain().facts["lock"].startswith("verified")
    chain.paths.fold_table(SPLIT).unlink()
    report = chain()
    assert report.status == "built"
    assert report.facts["lock"].startswith("verified")


def test_relock_locks_folds_that_are_current(chain):
    chain()
    report = chain(relock=True)
    assert report.status == "current"
    assert json.loads(lock_path(report.facts, locks=chain.locks).read_text())["counts"] == report.facts["counts"]


def test_a_lock_holds_no_sequence_and_no_id(chain):
    text = lock_path(chain(relock=True).facts, locks=chain.locks).read_text()
    assert not any(value in text for value in [*chain.table["sequence"], *chain.table["sequence_id"]])


def test_other_folds_than_the_locks_are_refused_and_not_written(chain):
    facts = chain(relock=True).facts
    lock = lock_path(facts, locks=chain.locks)
    counts = facts["counts"]
    lock.write_text(json.dumps(json.loads(lock.read_text()) | {"counts": [counts[0], counts[1] + 3, counts[2]]}))
    expected = f"fold 1 has {counts[1]} sequences, the lock says {counts[1] + 3}.*make folds RELOCK=1"
    with pytest.raises(DataError, match=expected):
        chain()
    chain.paths.fold_table(SPLIT).unlink()
    with pytest.raises(DataError, match=expected):
        chain()
    assert not chain.paths.fold_table(SPLIT).exists()
    chain(relock=True)
    assert chain().facts["lock"].startswith("verified")


def test_another_seed_than_the_locks_is_named(chain):
    chain(relock=True)
    with pytest.raises(DataError, match=r"\(made with seed 7 against 2026\)"):
        chain(seed=7)


def test_locks_of_other_data_do_not_count(chain):
    chain(relock=True)
    save(chain.table.head(50), chain.paths)
    assert chain().facts["lock"].startswith("absent")


@pytest.mark.parametrize("text", ["{", "{}", "[]"])
def test_a_damaged_lock_is_refused(chain, text):
    lock_path(chain(relock=True).facts, locks=chain.locks).write_text(text)
    with pytest.raises(DataError, match="not a lock"):
        chain()


@pytest.mark.parametrize("path", sorted(LOCKS.glob("*.json")), ids=lambda path: path.stem)
def test_committed_locks_are_whole_and_well_named(path, tmp_path):
    lock = json.loads(path.read_text())
    assert set(lock) == set(KEPT)
    assert lock_path(lock, locks=LOCKS).name == path.name
    assert write_lock(lock, locks=tmp_path).read_text() == path.read_text()
