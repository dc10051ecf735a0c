"""The audit against brute force, and the score of copies on planted leaks."""

import dataclasses
import itertools
from functools import cache

import numpy as np
import polars as pl
import pytest

from folds import assign, audit
from folds.copies import copy_aligned
from folds.lock import LOCKS
from folds.similarity import find_designs
from pipeline import runlog
from pipeline.competitions import get_competition
from pipeline.errors import ConfigError, DataError
from pipeline.labels import Numbers, write_labels
from pipeline.paths import Paths
from tests.folds.families import families, identity_ref, make_table, random_sequence, save
from tests.number_tables import lists

RIBONANZA, RNA3D = get_competition("ribonanza"), get_competition("rna3d")
SPLITS = ["sim80_k3", "random_k3"]


def add_profiles(table, rng, *, noise=0.05):
    """Reactivity that belongs to the family (the first letter of a run of 5 decides), so that copies are good."""
    levels = rng.random(size=4**5)
    columns = {target: [] for target in RIBONANZA.targets}
    for sequence in table["sequence"]:
        letters = np.array(["ACGU".index(letter) for letter in sequence])
        padded = np.pad(letters, 2)
        code = sum(padded[shift : shift + len(letters)] * 4**shift for shift in range(5))
        for target in columns:
            values = levels[code] + rng.normal(0, noise, len(letters))
            columns[target].append([None, *values[1:-1].tolist(), None])
    scored = pl.Series("scored", [number % 9 != 8 for number in range(table.height)])
    return table.with_columns(
        scored, *(pl.Series(name, lists, dtype=pl.List(pl.Float32)) for name, lists in columns.items())
    )


@pytest.fixture
def paths(rng, tmp_path):
    """A library of families with folds that keep them together, and folds that do not."""
    paths = Paths(comp="ribonanza", root=tmp_path)
    sequences = families(rng, parents=15, size=4, length=45, edits=2)
    save(add_profiles(make_table(sequences, groups=[None] * len(sequences)), rng), paths)
    for split in SPLITS:
        assign.run(paths, split=split, locks=tmp_path)
    return paths


@pytest.fixture
def cross_pairs_ref(paths):
    """Cross-fold pairs of at least a percentage, of some rows or all, by the plain dynamic programme."""
    sequences = pl.read_parquet(paths.clean("train"))["sequence"].to_list()
    identity = cache(lambda one, two: identity_ref(sequences[one], sequences[two]))

    def count(split, percent, rows=None):
        fold = pl.read_parquet(paths.fold_table(split))["fold"].to_list()
        pairs = itertools.combinations(range(len(sequences)), 2)
        crossing = [(a, b) for a, b in pairs if fold[a] != fold[b] and (rows is None or a in rows or b in rows)]
        return sum(identity(*pair) >= percent / 100 - 1e-9 for pair in crossing)

    return count


def test_cross_fold_pairs_are_counted_as_brute_force_counts_them(paths, cross_pairs_ref):
    facts = audit.run(paths, splits=SPLITS, competition=RIBONANZA).facts
    assert facts["exhaustive"]
    assert facts["pairs"] == 60 * 59 // 2
    for split in SPLITS:
        for percent in (80, 60):
            assert facts["splits"][split]["cross_pairs"][str(percent)] == cross_pairs_ref(split, percent)
    assert facts["splits"]["sim80_k3"]["cross_pairs"]["80"] == 0
    assert facts["splits"]["sim80_k3"]["highest_identity"] < 0.8
    assert facts["splits"]["random_k3"]["cross_pairs"]["80"] > 30
    assert facts["splits"]["random_k3"]["highest_identity"] > 0.9


def test_copies_score_well_where_relatives_are_across_folds_only_and_that_is_told(paths, capsys):
    """Of profiles nothing was told, where of labels and numbers it was."""
    facts = audit.run(paths, splits=SPLITS, competition=RIBONANZA).facts["splits"]
    share = facts["random_k3"]["copy_score"] / facts["random_k3"]["median_score"]
    said = capsys.readouterr().err
    assert f"the nearest training sequence's profile has {share:.0%} of the median's error on random_k3" in said
    assert said.count("scores of memory") == 1
    assert facts["random_k3"]["copy_score"] < 0.6 * facts["random_k3"]["median_score"]
    assert facts["sim80_k3"]["copy_score"] > 0.9 * facts["sim80_k3"]["median_score"]
    assert facts["random_k3"]["scored"] == facts["sim80_k3"]["scored"] == 54


def test_a_copy_of_a_twin_scores_its_noise_of_nothing(rng, tmp_path):
    """Twins in two folds with equal profiles: copying makes no error at all."""
    paths = Paths(comp="ribonanza", root=tmp_path)
    sequences = [random_sequence(rng, 60) for _ in range(10)] * 2
    table = add_profiles(make_table(sequences), rng, noise=0.0).with_columns(scored=pl.lit(True))
    save(table, paths)
    ids = table["sequence_id"]
    folds = pl.DataFrame({"sequence_id": ids, "fold": [0] * 10 + [1] * 10, "cluster": ids})
    paths.fold_table("twins").parent.mkdir()
    folds.with_columns(pl.col("fold").cast(pl.UInt8)).write_parquet(paths.fold_table("twins"))
    found = audit.run(paths, splits=["twins"], competition=RIBONANZA).facts["splits"]["twins"]
    assert found["copy_score"] == 0.0
    assert found["highest_identity"] == 1.0
    assert found["median_score"] > 0.1


def test_copies_follow_the_alignment(rng):
    """A window shifted by 7 nt, with primers, copies the value of the same nucleotide."""
    genome, values = random_sequence(rng, 90), rng.random((90, 2)).astype(np.float32)
    here, there = ("GG" + genome[7:67], genome[7:67]), ("GGGG" + genome[:60], genome[:60])
    profile = np.full((64, 2), np.nan, np.float32)
    profile[4:] = values[:60]
    profile[20] = np.nan
    for one, two in ((here, there), (here, ("GGGG" + genome[:60], genome[:58]))):
        copied = copy_aligned(np.full((62, 2), -1.0, np.float32), one, two, profile)
        length = len(two[1]) - 15  # the last letters have no counterpart and may lie anywhere
        assert (copied[2 : 2 + length] == np.where(np.isnan(profile), -1, profile)[11 : 11 + length]).all()
        assert (copied[:2] == -1).all()
        assert (copied[11] == -1).all()


def test_a_large_data_set_is_sampled_and_the_sample_is_counted_right(paths, cross_pairs_ref):
    table = pl.read_parquet(paths.clean("train")).sort(pl.col("sequence").str.len_bytes(), "sequence", "sequence_id")
    letters = int(table["sequence"].str.len_bytes().sum())
    facts = audit.run(paths, splits=SPLITS, competition=RIBONANZA, exhaustive=2 * letters // 3).facts
    assert not facts["exhaustive"]
    assert facts["compared"] == 13
    assert facts["pairs"] == sum(60 - 1 - place for place in range(facts["compared"]))
    queries = audit._choose_queries(table["scored"].to_numpy(), letters=letters, most=2 * letters // 3)
    rows = {int(name[1:]) for name in table["sequence_id"].gather(queries)}
    assert facts["splits"]["random_k3"]["cross_pairs"]["80"] == cross_pairs_ref("random_k3", 80, rows)
    assert facts["splits"]["random_k3"]["scored"] == len(rows) == 13


def test_without_a_metric_only_identities_are_measured(rng, tmp_path):
    paths = Paths(comp="rna3d", root=tmp_path)
    save(make_table(families(rng, parents=6, size=3, length=30)).with_columns(scored=pl.lit(True)), paths)
    assign.run(paths, split="sim80_k2", locks=tmp_path)
    facts = audit.run(paths, splits=["sim80_k2"], competition=RNA3D).facts
    assert facts["metric"] is None
    assert set(facts["splits"]["sim80_k2"]) == {"highest_identity", "pair", "cross_pairs"}
    with runlog.console.capture() as printed:
        runlog.console.print(audit.describe(facts))
    assert "sim80_k2" in printed.get()


def test_without_any_scored_sequence_only_identities_are_measured(paths):
    """It ended in a traceback: zip() argument 2 is longer than argument 1."""
    save(pl.read_parquet(paths.clean("train")).with_columns(scored=pl.lit(False)), paths)
    facts = audit.run(paths, splits=SPLITS, competition=RIBONANZA).facts
    assert facts["splits"]["random_k3"]["cross_pairs"]["80"] > 30
    assert "copy_score" not in facts["splits"]["random_k3"]
    with runlog.console.capture() as printed:
        runlog.console.print(audit.describe(facts))
    assert "random_k3" in printed.get()


def test_copied_numbers_are_near_where_relatives_are_across_folds_and_that_is_told(paths, rng, capsys):
    """Families share their numbers: copies have a fraction of the mean's error on random folds, more than it on others.

    Every fifth sequence has no second number, and copies take the mean for it.
    """
    table = pl.read_parquet(paths.clean("train"))
    family_N = np.arange(table.height) // 4
    numbers_NC = np.stack([rng.normal(5, 2, 15)[family_N], rng.normal(100, 9, 15)[family_N]], axis=1)
    numbers_NC += rng.normal(0, 0.1, numbers_NC.shape)
    numbers_NC[::5, 1] = np.nan
    table = table.with_columns(lists(numbers_NC), scored=pl.lit(True))
    table.write_parquet(paths.clean("train"))
    write_labels(paths.clean("numbers"), Numbers(("Tm", "yield"), (), (), (), "ACGU").over(numbers_NC))
    competition = get_competition("labelled").with_facts({"numbers": ["Tm", "yield"]})
    facts = audit.run(paths, splits=SPLITS, competition=competition).facts
    said = capsys.readouterr().err
    sequences = table["sequence"].to_list()
    for split in SPLITS:
        told, fold_N = facts["splits"][split], pl.read_parquet(paths.fold_table(split))["fold"].to_numpy()
        mean_NC = np.array([np.nanmean(numbers_NC[fold_N != fold], axis=0) for fold in fold_N])
        off_NC = mean_NC - numbers_NC
        assert told["mean_score"] == pytest.approx(np.sqrt(np.nanmean(off_NC**2, axis=0)).mean())
        assert told["scored"] == len(sequences)
    one, two = (facts["splits"][split] for split in SPLITS)
    assert one["copy_score"] > 0.9 * one["mean_score"]
    assert two["copy_score"] < 0.7 * two["mean_score"]
    share = two["copy_score"] / two["mean_score"]
    assert f"the nearest training sequence's numbers have {share:.0%} of the mean's error on random_k3" in said
    with runlog.console.capture() as shown:
        runlog.console.print(audit.describe(facts))
    assert "MCRMSE copied" in shown.get()
    assert "mean: that of the training sequences" in shown.get()


def test_copied_labels_are_right_where_relatives_are_across_folds_and_that_is_told(paths, rng, capsys):
    """Families that share a class: on random folds the nearest neighbour is a relative, on clustered ones it is not."""
    labelled = get_competition("labelled-toy")
    family = rng.integers(0, 3, size=15)
    table = pl.read_parquet(paths.clean("train"))
    places = [None if number % 20 == 19 else [int(family[number // 4])] for number in range(table.height)]
    table = table.with_columns(pl.Series("labels", places, dtype=pl.List(pl.UInt16)))
    table.with_columns(pl.col("labels").is_not_null().alias("scored")).write_parquet(paths.clean("train"))
    facts = audit.run(paths, splits=SPLITS, competition=labelled).facts
    told = facts["splits"]
    assert told["random_k3"]["copy_accuracy"] > 0.85
    assert told["sim80_k3"]["copy_accuracy"] < 0.6
    assert {each["scored"] for each in told.values()} == {57}
    for each in told.values():
        assert each["frequent_accuracy"] < 0.6
    assert "on random_k3, " in " ".join(capsys.readouterr().err.split())
    assert facts["metric"] is None
    assert [column.header for column in audit.describe(facts).columns][-2:] == ["right: copied", "most frequent"]


def test_the_audit_is_described_in_a_table(paths):
    report = audit.run(paths, splits=SPLITS, competition=RIBONANZA)
    assert audit.run(paths, splits=SPLITS, competition=RIBONANZA).status == "current"
    with runlog.console.capture() as printed:
        runlog.console.print(audit.describe(report.facts))
    assert "60 sequences, all pairs (1,770 pairs)" in printed.get()
    assert "MAE copied" in printed.get()


def test_folds_of_other_data_and_no_splits_are_refused(paths):
    table = pl.read_parquet(paths.clean("train"))
    save(table.head(50), paths)
    with pytest.raises(DataError, match="fold table from other data"):
        audit.run(paths, splits=SPLITS, competition=RIBONANZA)
    with pytest.raises(ConfigError, match="no splits"):
        audit.run(paths, splits=[], competition=RIBONANZA)


@pytest.mark.slow
@pytest.mark.shared
def test_real_folds_fit_their_lock_and_leave_no_relatives_apart(shared_data, tmp_path):
    """One in 32 of the shared sequences, drawn at random, is compared with all of it (`make audit`: all 98 million)."""
    raw = shared_data("stanford-ribonanza-rna-folding")
    columns = ["sequence_id", "sequence", "dataset_name"]
    table = pl.read_parquet(raw / "train_data.parquet", columns=columns)
    table = table.with_columns(pl.col("dataset_name").str.replace("_(2A3|DMS)$", "")).unique().sort("sequence_id")
    groups = pl.read_parquet(raw / "library_groups.parquet", columns=["sequence_id", "group"])
    table = table.join(groups, on="sequence_id", how="left", validate="1:1").sort("sequence_id")
    paths = Paths(comp="ribonanza", root=tmp_path)
    save(table.with_columns(scored=pl.lit(True)), paths)
    report = assign.run(paths, split="sim80_k5")
    assert report.facts["lock"].startswith("verified"), LOCKS
    identities = dataclasses.replace(RIBONANZA, error_sums=None, score=None)
    designs, _ = find_designs(table["sequence"].to_list(), table["dataset_name"].to_list())
    found = audit.run(paths, splits=["sim80_k5"], competition=identities, exhaustive=len("".join(designs)) // 4).facts
    assert found["compared"] == table.height // 32
    assert found["splits"]["sim80_k5"]["cross_pairs"]["80"] == 0
    assert found["splits"]["sim80_k5"]["highest_identity"] < 0.8
