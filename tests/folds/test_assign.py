"""The folds stage: what a split promises, and what it refuses."""

import itertools
import json

import numpy as np
import polars as pl
import pytest

from folds import assign
from folds.edit_distance import pack, pair_distances
from folds.split import assign_folds, length_label, parse_split
from pipeline import commands, runlog
from pipeline.cli import show
from pipeline.errors import ConfigError, DataError
from pipeline.labels import Classes, Numbers, write_labels
from pipeline.paths import Paths
from pipeline.stage import sha256_file
from pipeline.tables import number_lists, read_folds
from tests.folds.families import families, make_table, mutate, random_sequence, save


def library(rng, *, parents=40):
    """Families of five in two data sets of two lengths, and some loners."""
    short = families(rng, parents=parents, size=5, length=60, edits=4)
    long = families(rng, parents=parents // 2, size=5, length=110, edits=8)
    alone = [random_sequence(rng, int(length)) for length in rng.integers(50, 150, parents)]
    datasets = ["short"] * len(short) + ["long"] * (len(long) + len(alone))
    order = rng.permutation(len(datasets))
    sequences = [*short, *long, *alone]
    return make_table([sequences[row] for row in order], datasets=[datasets[row] for row in order])


def assigned(paths, split, **options):
    report = assign.run(paths, split=split, locks=paths.root / "locks", **options)
    return report, pl.read_parquet(report.outputs["folds"])


@pytest.fixture
def paths(tmp_path):
    return Paths(comp="ribonanza", root=tmp_path)


@pytest.mark.parametrize("split", ["sim80_k5", "sim90_k2", "length_k4", "random_k3"])
def test_folds_are_disjoint_complete_and_keep_clusters_whole(rng, paths, split):
    table = library(rng)
    save(table, paths)
    _, folds = assigned(paths, split)
    assert folds.schema == {"sequence_id": pl.String, "fold": pl.UInt8, "cluster": pl.String}
    assert folds["sequence_id"].to_list() == sorted(table["sequence_id"])
    assert folds["fold"].unique().sort().to_list() == list(range(parse_split(split).folds))
    assert folds.group_by("cluster").agg(pl.col("fold").n_unique())["fold"].max() == 1
    first = folds.group_by("cluster").agg(pl.col("sequence_id").min())
    assert (first["cluster"] == first["sequence_id"]).all()


def test_no_relatives_are_left_across_folds(rng, paths):
    table = library(rng)
    save(table, paths)
    _, folds = assigned(paths, "sim80_k5")
    pairs = np.array(list(itertools.combinations(range(table.height), 2)))
    distances = pair_distances(pack(table["sequence"].to_list()), pairs[:, 0], pairs[:, 1])
    lengths = table["sequence"].str.len_bytes().to_numpy()[pairs].min(axis=1)
    related = pairs[5 * distances <= lengths]
    fold = folds["fold"].to_numpy()
    assert len(related) > 100
    assert (fold[related[:, 0]] == fold[related[:, 1]]).all()


@pytest.mark.parametrize("split", ["sim80_k5", "random_k5"])
def test_every_fold_gets_its_share_of_every_stratum(rng, paths, split):
    save(library(rng, parents=100), paths)
    report, _ = assigned(paths, split)
    assert report.facts["imbalance"] < 1.03
    for stratum, counts in report.facts["strata"].items():
        assert max(counts) - min(counts) <= max(5, 0.1 * sum(counts)), stratum


def test_a_cluster_goes_where_its_kind_is_rare_though_the_fold_be_fuller():
    clusters = [("A", "long", 10), ("B", "short", 4), ("C", "short", 3)]
    rows = [
        {"cluster": name, "kinds": [kind], "sequence": "ACGU"} for name, kind, size in clusters for _ in range(size)
    ]
    table = pl.DataFrame(rows).with_row_index("sequence_id").with_columns(dataset_name=pl.lit("set"))
    dealt = assign_folds(table, parse_split("sim80_k2"), seed=0, where="sim80_k2")
    assert dict(dealt.select("cluster", "fold").unique().iter_rows()) == {"A": 0, "B": 1, "C": 0}


def test_length_split_holds_out_the_longest(rng, paths):
    lengths = [int(length) for length in rng.integers(40, 400, 100)]
    lengths[0] = 401
    table = make_table([random_sequence(rng, length) for length in lengths])
    save(table, paths)
    report, folds = assigned(paths, "length_k4")
    held = (folds["fold"] == 0).to_numpy()
    assert held.sum() == 25
    assert np.array(lengths)[held].min() >= np.array(lengths)[~held].max()
    assert report.facts["counts"] == [25, 25, 25, 25]


def test_length_split_takes_shorter_relatives_along(rng, paths):
    long = random_sequence(rng, 300)
    sequences = [long, long[100:180], *(random_sequence(rng, 100) for _ in range(18))]
    save(make_table(sequences), paths)
    _, folds = assigned(paths, "length_k5")
    assert folds["fold"][0] == folds["fold"][1] == 0


def test_a_cluster_that_is_too_big_ends_the_choice_of_the_longest(rng, paths):
    family = random_sequence(rng, 200)
    sequences = [random_sequence(rng, 300), *(mutate(rng, family, edits=2) for _ in range(15))]
    sequences += [random_sequence(rng, 100) for _ in range(4)]
    save(make_table(sequences), paths)
    _, folds = assigned(paths, "length_k4")
    assert folds.filter(pl.col("fold") == 0)["sequence_id"].to_list() == ["s00000"]


def test_every_other_fold_is_left_a_cluster_by_the_longest(rng, paths):
    """The longest took all clusters but one, and folds 2 to 4 were empty."""
    family = random_sequence(rng, 60)
    sequences = [random_sequence(rng, length) for length in (100, 90, 80, 70)]
    save(make_table([*sequences, *(mutate(rng, family, edits=2) for _ in range(96))]), paths)
    report, folds = assigned(paths, "length_k5")
    assert report.facts["counts"] == [1, 96, 1, 1, 1]
    assert folds["fold"][0] == 0


def test_a_giant_cluster_is_said_and_is_no_error(rng, paths):
    family = random_sequence(rng, 100)
    sequences = [mutate(rng, family, edits=3) for _ in range(60)] + [random_sequence(rng, 100) for _ in range(40)]
    save(make_table(sequences), paths)
    report, _ = assigned(paths, "sim80_k5")
    assert report.facts["counts"] == [60, 10, 10, 10, 10]
    assert report.facts["largest_cluster"] == 60
    assert "60 sequences are related" in str(assign.describe(report.facts)[1:])


def test_two_builds_are_byte_identical_and_the_second_run_is_current(rng, tmp_path):
    table = library(rng)
    digests = []
    for name in ("one", "two"):
        paths = Paths(comp="ribonanza", root=tmp_path / name)
        save(table, paths)
        report, _ = assigned(paths, "sim80_k5")
        assert report.status == "built"
        digests.append(sha256_file(report.outputs["folds"]))
    assert digests[0] == digests[1]
    assert assigned(paths, "sim80_k5")[0].status == "current"
    assert assigned(paths, "sim80_k2")[0].status == "built"
    assert assigned(paths, "sim80_k5")[0].status == "current"


def test_other_seeds_give_other_folds_of_the_same_clusters(rng, paths):
    save(library(rng), paths)
    _, first = assigned(paths, "sim80_k5")
    _, second = assigned(paths, "sim80_k5", seed=7)
    assert first["cluster"].equals(second["cluster"])
    assert not first["fold"].equals(second["fold"])


def test_changed_sequences_are_noticed(rng, paths):
    table = library(rng)
    save(table, paths)
    assigned(paths, "sim80_k5")
    save(table.head(100), paths)
    report, folds = assigned(paths, "sim80_k5")
    assert report.status == "built"
    assert folds.height == 100


def test_random_split_warns_that_it_leaks(rng, paths, monkeypatch):
    save(library(rng), paths)
    said = []
    monkeypatch.setattr(assign, "warn", said.append)
    assigned(paths, "random_k5")
    assert said == [
        "random_k5: relatives are in different folds, so its scores leak. Next: SPLIT=sim80_k5 for real ones."
    ]


@pytest.mark.parametrize(
    ("split", "message"),
    [
        ("sim80", "expected sim<percent>_k<folds>, length_k<folds> or random_k<folds>"),
        ("sim80_k1", "1 folds; expected 2 to 255"),
        ("length_k300", "300 folds; expected 2 to 255"),
        ("sim40_k5", "expected 65 to 100 %"),
        ("sim101_k5", "expected 65 to 100 %"),
        ("length80_k5", "expected sim<percent>_k<folds>"),
    ],
)
def test_other_split_names_are_refused(paths, split, message):
    with pytest.raises(ConfigError, match=message):
        assign.run(paths, split=split)


def test_more_folds_than_clusters_are_refused(rng, paths):
    save(make_table(families(rng, parents=3, size=10, length=80, edits=2)), paths)
    with pytest.raises(ConfigError, match=r"5 folds, but the 30 sequences make only 3 clusters\. Next: SPLIT=sim80_k3"):
        assigned(paths, "sim80_k5")
    assert not paths.fold_table("sim80_k5").exists()


def test_relatives_alone_are_told_of_a_split_that_exists(rng, paths, monkeypatch):
    """It said "Next: SPLIT=sim80_k2" of one cluster, which was refused with the same words."""
    save(make_table(families(rng, parents=1, size=10, length=80, edits=2)), paths)
    said = r"10 sequences make only 1 cluster\. Next: try a higher identity .*, or SPLIT=random_k2: .* scores leak"
    for split in ("sim80_k5", "sim80_k2"):
        with pytest.raises(ConfigError, match=said):
            assigned(paths, split)
    assert assigned(paths, "random_k2")[1]["fold"].n_unique() == 2


def test_a_missing_or_wrong_clean_table_is_refused(rng, paths):
    with pytest.raises(DataError, match=r"train file .* is missing"):
        assigned(paths, "sim80_k5")
    save(make_table([random_sequence(rng, 30)]).drop("group"), paths)
    with pytest.raises(DataError, match="no column group"):
        assigned(paths, "random_k2")
    save(make_table([]), paths)
    with pytest.raises(DataError, match="no rows; expected training sequences"):
        assigned(paths, "sim80_k2")


def test_a_fold_table_from_other_data_is_refused(rng, paths):
    table = library(rng)
    save(table, paths)
    assigned(paths, "sim80_k5")
    ids = table["sequence_id"].to_list()
    assert read_folds(paths.fold_table("sim80_k5"), ids).height == table.height
    with pytest.raises(DataError, match="from other data: 1 sequences have no fold there and 2 of its 340 are not"):
        read_folds(paths.fold_table("sim80_k5"), [*ids[2:], "stranger"])


def test_length_bins_are_contiguous():
    labels = [length_label(length) for length in range(1, 5000)]
    edges = [tuple(map(int, label.split("-"))) for label in dict.fromkeys(labels)]
    assert edges[0][0] == 1
    assert all(high + 1 == low for (_, high), (low, _) in itertools.pairwise(edges))
    assert all(
        low <= length <= high for length, label in enumerate(labels, 1) for low, high in [map(int, label.split("-"))]
    )


def test_folds_are_described_in_a_table(rng, paths):
    save(library(rng), paths)
    report, _ = assigned(paths, "sim80_k2")
    with runlog.console.capture() as printed:
        runlog.console.print(*assign.describe(report.facts))
    assert "short 49-64 nt" in printed.get()
    assert "lock absent: no ribonanza-sim80_k2-" in printed.get()


def test_of_a_set_of_your_own_it_is_said_that_it_needs_no_lock(rng, tmp_path):
    """Read like something left to do: lock absent: no labelled-mine-…; make folds RELOCK=1 writes it."""
    paths = Paths(comp="profiles-mine", root=tmp_path)
    save(library(rng), paths)
    report, _ = assigned(paths, "sim80_k2")
    assert report.facts["lock"].endswith(", and a set of your own needs none; make folds RELOCK=1 writes it")


def test_the_command_that_writes_the_lock_is_that_of_this_split(rng, paths, capsys):
    """Copied as it was printed, `make folds RELOCK=1` assigned another competition's folds."""
    save(library(rng), paths)
    report, _ = assigned(paths, "sim80_k2")
    with commands.scope():
        commands.remember({"comp": "labelled-x", "split": "sim80_k2"}, verbs={"folds": ["comp", "split"]})
        show(report, assign.describe(report.facts))
    assert "make folds RELOCK=1 COMP=labelled-x SPLIT=sim80_k2 writes it" in capsys.readouterr().out


def test_strata_are_described_in_the_order_of_their_lengths(rng, paths):
    """Lengths were sorted as text (1-32, 129-192, 33-48), and OpenVaccine's named twice ("107 nt 97-128 nt")."""
    lengths, datasets = [150, 40, 20, 107], ["train", "train", "train", "107 nt"]
    sequences = [random_sequence(rng, length) for length in lengths for _ in range(4)]
    save(make_table(sequences, datasets=np.repeat(datasets, 4).tolist()), paths)
    table, *_ = assign.describe(assigned(paths, "sim80_k2")[0].facts)
    bins = [f"train {bin_} nt" for bin_ in ("1-32", "33-48", "129-192")]
    assert list(table.columns[0].cells) == ["107 nt", *bins, "all", "lengths"]


def test_the_time_of_the_clustering_counts(rng, paths):
    """Said "done in 1.9 s" after 51 s."""
    save(library(rng), paths)
    report, _ = assigned(paths, "sim80_k5")
    spent = [
        json.loads((paths.fold_table(name).with_suffix(".manifest.json")).read_text())["seconds"]
        for name in ("sim80_k5", "clusters_sim80")
    ]
    assert min(spent) > 0
    assert report.seconds == pytest.approx(sum(spent))
    assert assigned(paths, "sim80_k5")[0].seconds == 0


# --- labelled sets ---------------------------------------------------------------------------------------------------


def labelled(rng, paths, *, letters="ACGU", several=False, count=200):
    """Loners and families of four, with a frequent, a rare and a very rare class that families share."""
    parents = ["".join(rng.choice(list(letters), 80)) for _ in range(count // 4)]
    relatives = ["".join(rng.choice(list(letters), 1)) + parent[1:] for parent in parents for _ in range(4)]
    place = np.repeat(np.arange(count // 4), 4)
    labels = np.where(place % 10 == 0, 2, np.where(place % 3 == 0, 1, 0))
    lists = [sorted({int(one), 0}) if several else [int(one)] for one in labels]
    table = make_table(relatives).with_columns(pl.Series("labels", lists, dtype=pl.List(pl.UInt16)))
    save(table, paths)
    write_labels(paths.clean("classes"), Classes(("common", "rare", "rarest"), (1, 1, 1), not several, letters))
    return table


@pytest.mark.parametrize("several", [False, True])
def test_classes_are_spread_as_evenly_as_families_allow(rng, paths, several):
    table = labelled(rng, paths, several=several)
    report, folds = assigned(paths, "sim80_k5")
    both = folds.join(table.select("sequence_id", "labels"), on="sequence_id")
    assert report.facts["by"] == "kind"
    for place, name in enumerate(("common", "rare", "rarest")):
        inside = both.filter(pl.col("labels").list.contains(place))["fold"]
        counts = [int((inside == fold).sum()) for fold in range(5)]
        assert report.facts["strata"][name] == counts
        assert max(counts) - min(counts) <= 8  # two families


def test_fifths_of_every_number_are_spread_as_evenly_as_families_allow(rng, paths):
    """The second number was measured of one family in five."""
    table = labelled(rng, paths).drop("labels")
    paths.clean("classes").unlink()
    place_N = np.repeat(np.arange(50), 4)
    lists = [[float(at), at / 10 if at % 5 == 0 else None] if at else None for at in place_N.tolist()]
    numbers = pl.Series("numbers", lists, dtype=pl.List(pl.Float64))
    save(table.with_columns(numbers), paths)
    write_labels(paths.clean("numbers"), Numbers(("Tm", "yield"), (), (), (), "ACGU").over(number_lists(numbers, 2)))
    report, folds = assigned(paths, "sim80_k5")
    fifth_N = np.searchsorted(np.quantile(place_N[place_N > 0], [0.2, 0.4, 0.6, 0.8]), place_N) + 1
    for fifth in range(1, 6):
        inside = folds["fold"].to_numpy()[(fifth_N == fifth) & (place_N > 0)]
        counts = np.bincount(inside, minlength=5).tolist()
        assert report.facts["strata"][f"Tm, fifth {fifth}"] == counts
        assert max(counts) - min(counts) <= 8  # two families
    assert sum(sum(report.facts["strata"][f"yield, fifth {fifth}"]) for fifth in range(1, 6)) == 9 * 4
    assert sum(report.facts["strata"]["(not measured)"]) == 4


def test_sequences_without_labels_are_spread_too(rng, paths):
    table = labelled(rng, paths)
    unknown = pl.when(pl.int_range(pl.len()) < 40).then(None).otherwise("labels")
    save(table.with_columns(unknown.alias("labels")), paths)
    report, _ = assigned(paths, "sim80_k5")
    assert report.facts["strata"]["(not labelled)"] == [8, 8, 8, 8, 8]


def test_copies_of_a_protein_and_its_relatives_share_a_fold(rng, paths):
    labelled(rng, paths, letters="ACDEFGHIKLMNPQRSTVWYX")
    report, folds = assigned(paths, "sim80_k5")
    assert report.facts["clusters"] == 50
    assert report.facts["largest_cluster"] == 4
    assert folds.group_by("cluster").agg(pl.col("fold").n_unique())["fold"].max() == 1
    with runlog.console.capture() as shown:
        runlog.console.print(*assign.describe(report.facts))
    assert "rarest " in shown.get()


def test_a_residue_that_is_replaced_by_a_similar_one_leaves_proteins_related(rng, paths):
    one = "".join(rng.choice(list("ILVM"), 60))
    table = make_table(
        [one, one.translate(str.maketrans("ILVM", "LVMI")), one.translate(str.maketrans("ILVM", "WKGE"))]
    )
    save(table, paths)
    _, folds = assigned(paths, "sim80_k2")
    assert folds["cluster"][0] == folds["cluster"][1] != folds["cluster"][2]


def test_an_unknown_nucleotide_is_one_letter_that_may_differ(rng, paths):
    one = random_sequence(rng, 60)
    save(make_table([one, one[:30] + "N" + one[31:], random_sequence(rng, 60)]), paths)
    _, folds = assigned(paths, "sim80_k2")
    assert folds["cluster"][0] == folds["cluster"][1] != folds["cluster"][2]


def test_clusters_of_an_earlier_table_make_no_folds(rng, paths, monkeypatch):
    """Make data ended between the clusters and the folds: these were paired by row number with other sequences."""
    table, changed = (make_table(families(rng, parents=4, size=2)) for _ in range(2))
    save(table, paths)
    clusters = assign._run_clusters

    def meanwhile(*args, **kwargs):
        report = clusters(*args, **kwargs)
        save(changed, paths)
        return report

    monkeypatch.setattr(assign, "_run_clusters", meanwhile)
    with pytest.raises(DataError, match=r"train.parquet was written anew meanwhile. Next: the same command again"):
        assign.run(paths, split="sim80_k2")
    assert not paths.fold_table("sim80_k2").exists()
