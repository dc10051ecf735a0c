"""The synthetic data sets look like Kaggle's files, are the same for the same seed, and can be learned from."""

import numpy as np
import polars as pl
import pytest

from pipeline.designs import designs, reactivity
from pipeline.schema import PROBES, split_id
from pipeline.synthetic import BLANK_3, BLANK_5, write_labelled, write_ribonanza, write_rna3d

HEAD = ["sequence_id", "sequence", "experiment_type", "dataset_name", "reads", "signal_to_noise", "SN_filter"]


@pytest.fixture(scope="module")
def ribonanza(tmp_path_factory):
    return write_ribonanza(tmp_path_factory.mktemp("ribonanza"), sequences=120, test=12, seed=3)


@pytest.fixture(scope="module")
def profiles(ribonanza):
    table = pl.read_csv(ribonanza["train_data.csv"])
    return table.with_columns(pl.col("^reactivity_.*$").cast(pl.Float64))  # the blank ends are read as strings


@pytest.fixture(scope="module")
def rna3d(tmp_path_factory):
    return write_rna3d(tmp_path_factory.mktemp("rna3d"), targets=24, test=6, seed=3)


def columns(table, prefix):
    return [name for name in table.columns if name.removeprefix(prefix).isdigit()]


@pytest.mark.parametrize("length", [1, 5, 12, 13, 30, 64, 110])
def test_a_design_has_the_asked_length_and_only_nested_canonical_pairs(length):
    for seed in range(30):
        sequence, pairs = designs(np.random.default_rng(seed), length=length)
        assert len(sequence) == length
        assert set(sequence) <= set("ACGU")
        assert all(sequence[i] + sequence[j] in ("GC", "CG", "AU", "UA", "GU", "UG") for i, j in pairs)
        assert all(j - i > 3 for i, j in pairs)
        ends = [end for pair in pairs for end in pair]
        assert len(ends) == len(set(ends))
        assert not any(i < k < j < m for i, j in pairs for k, m in pairs)


def test_long_enough_designs_are_mostly_paired(rng):
    shares = [2 * len(designs(rng, length=60)[1]) / 60 for _ in range(50)]
    assert 0.4 < np.mean(shares) < 0.75


def test_vienna_folds_designs_as_they_were_designed(rng):
    rna = pytest.importorskip("RNA")
    right, count = 0.0, 0
    for _ in range(10):
        sequence, pairs = designs(rng, length=50)
        fold = rna.fold_compound(sequence)
        fold.pf()
        bpp = fold.bpp()
        right += sum(bpp[i + 1][j + 1] for i, j in pairs)
        count += len(pairs)
    assert right / count > 0.7


def test_the_same_seed_writes_the_same_bytes_and_another_seed_others(tmp_path):
    for write, sizes in ((write_ribonanza, {"sequences": 30, "test": 4}), (write_rna3d, {"targets": 6, "test": 3})):
        once, again, other = (
            write(tmp_path / f"{write.__name__}-{k}", seed=seed, **sizes) for k, seed in enumerate((5, 5, 6))
        )
        assert all(path.read_bytes() == again[name].read_bytes() for name, path in once.items())
        assert all(path.read_bytes() != other[name].read_bytes() for name, path in once.items())


def test_train_data_has_kaggles_columns_and_as_many_positions_as_its_longest_sequence(profiles):
    width = profiles["sequence"].str.len_chars().max()
    values = [f"reactivity_{k:04d}" for k in range(1, width + 1)]
    errors = [f"reactivity_error_{k:04d}" for k in range(1, width + 1)]
    assert profiles.columns == HEAD + values + errors
    assert profiles["sequence_id"].str.contains("^[0-9a-f]{12}$").all()
    assert profiles["sequence_id"].n_unique() == 120
    assert profiles.select("sequence_id", "experiment_type").is_duplicated().sum() == 0
    assert set(profiles["experiment_type"]) == set(PROBES)


def test_only_the_two_ends_of_a_sequence_are_unmeasured(profiles):
    for kind in ("reactivity_", "reactivity_error_"):
        block = profiles.select(columns(profiles, kind)).to_numpy()
        for row, length in zip(block, profiles["sequence"].str.len_chars(), strict=True):
            assert np.flatnonzero(np.isfinite(row)).tolist() == list(range(BLANK_5, length - BLANK_3))


def test_signal_to_noise_is_mean_reactivity_over_mean_error_and_decides_the_filter(profiles):
    value = np.nanmean(profiles.select(columns(profiles, "reactivity_")).to_numpy(), axis=1)
    error = np.nanmean(profiles.select(columns(profiles, "reactivity_error_")).to_numpy(), axis=1)
    stated = profiles["signal_to_noise"].to_numpy()
    clear = stated > 3
    np.testing.assert_allclose((value / error)[clear], stated[clear], rtol=0.25)
    passes = (profiles["signal_to_noise"] > 1.0) & (profiles["reads"] > 100)
    assert (profiles["SN_filter"] == passes.cast(int)).all()
    assert 0 < (profiles["SN_filter"] == 0).sum() < 30


def test_some_profiles_are_missing(profiles):
    assert 120 < profiles.height < 240


def test_families_and_windows_make_near_copies_that_share_a_group(ribonanza, profiles):
    groups = pl.read_parquet(ribonanza["library_groups.parquet"])
    assert sorted(groups["sequence_id"]) == sorted(profiles["sequence_id"].unique())
    table = groups.join(profiles.unique("sequence_id").select("sequence_id", "sequence"), on="sequence_id")
    mutants = table.filter(pl.col("group").str.starts_with("mutants")).sort("group")
    first, second = mutants["sequence"][:2]
    assert sum(a != b for a, b in zip(first, second, strict=True)) <= 6
    windows = table.filter(pl.col("window_start") <= 10).sort("group", "window_start")["sequence"]
    assert windows[0][26 + 10 : 26 + 60] == windows[1][26 : 26 + 50]


@pytest.mark.parametrize("probe", PROBES)
def test_reactivity_follows_pairing_and_nucleotide(rng, probe):
    paired, free = [], {letter: [] for letter in "ACGU"}
    for _ in range(40):
        sequence, pairs = designs(rng, length=60)
        ends = {end for pair in pairs for end in pair}
        for k, value in enumerate(reactivity(sequence, pairs, probe=probe, rng=rng)):
            (paired if k in ends else free[sequence[k]]).append(value)
    quiet, loud = ("U", "A") if probe == "DMS_MaP" else ("C", "A")
    assert np.median(free[loud]) > 1.5 * np.median(free[quiet]) > 0
    assert np.median(paired) < 0.25 * np.median(free[loud])


def test_submission_rows_run_over_all_positions_of_the_test_sequences(ribonanza, profiles):
    test = pl.read_csv(ribonanza["test_sequences.csv"])
    sample = pl.read_csv(ribonanza["sample_submission.csv"])
    assert test.columns == ["id_min", "id_max", "sequence_id", "sequence", "future"]
    assert sample.columns == ["id", "reactivity_DMS_MaP", "reactivity_2A3_MaP"]
    assert (test["id_max"] - test["id_min"] + 1 == test["sequence"].str.len_chars()).all()
    assert test["id_min"].to_list() == [0, *(test["id_max"] + 1)[:-1]]
    assert sample["id"].to_list() == list(range(test["id_max"][-1] + 1))
    assert not set(test["sequence"]) & set(profiles["sequence"])
    assert test["sequence"].str.len_chars().mean() > profiles["sequence"].str.len_chars().mean()


def labels(path):
    table = pl.read_csv(path)
    ids = [split_id(row) for row in table["ID"]]
    assert [number for _, number in ids] == table["resid"].to_list()
    return table.with_columns(target_id=pl.Series([target for target, _ in ids]))


@pytest.mark.parametrize("part", ["train", "validation"])
def test_labels_are_traces_of_their_sequences_with_gaps_and_second_conformations(rna3d, part):
    table = labels(rna3d[f"{part}_labels.csv"])
    sequences = dict(pl.read_csv(rna3d[f"{part}_sequences.csv"]).select("target_id", "sequence").iter_rows())
    conformers = set()
    for (target,), rows in table.group_by("target_id", maintain_order=True):
        assert "".join(rows["resname"]) == sequences.pop(target)
        for number in (1, 2):
            xyz = rows.select(f"x_{number}", f"y_{number}", f"z_{number}").to_numpy()
            resolved = xyz[:, 0] > -1e17
            conformers.add((number, "none" if not resolved.any() else "all" if resolved.all() else "gaps"))
            steps = np.linalg.norm(np.diff(xyz, axis=0), axis=1)[resolved[1:] & resolved[:-1]]
            assert ((steps > 3.5) & (steps < 9.5)).all()
    assert not sequences
    assert conformers >= {(1, "all"), (1, "gaps"), (2, "none")}
    assert conformers & {(2, "all"), (2, "gaps")}
    assert (1, "none") not in conformers


def test_the_structure_sample_follows_the_test_sequences_and_not_the_labels(rna3d):
    test = pl.read_csv(rna3d["test_sequences.csv"])
    sample = pl.read_csv(rna3d["sample_submission.csv"])
    expected = [f"{row[0]}_{k}" for row in test.iter_rows() for k in range(1, len(row[1]) + 1)]
    assert sample["ID"].to_list() == expected
    truth = pl.read_csv(rna3d["validation_labels.csv"])
    assert sorted(truth["ID"]) == sorted(expected)
    assert truth["ID"].to_list() != expected
    assert sample.columns[:6] == ["ID", "resname", "resid", "x_1", "y_1", "z_1"]
    assert len(sample.columns) == 3 + 5 * 3


def test_test_targets_are_dated_after_all_train_targets(rna3d):
    train, test = (pl.read_csv(rna3d[f"{part}_sequences.csv"])["temporal_cutoff"] for part in ("train", "test"))
    assert train.max() < test.min()


@pytest.mark.shared
def test_ribonanza_files_have_the_columns_of_the_real_ones(ribonanza, profiles, shared_data):
    real = shared_data("stanford-ribonanza-rna-folding")
    theirs = pl.read_csv(real / "train_data_first600.csv", n_rows=1)
    assert columns(theirs, "reactivity_")[: len(columns(profiles, "reactivity_"))] == columns(profiles, "reactivity_")
    assert theirs.columns[:7] == profiles.columns[:7]
    for name in ("test_sequences.csv", "sample_submission.csv"):
        path = real / name if (real / name).exists() else real / f"{name}.gz"
        assert pl.read_csv(path, n_rows=1).columns == pl.read_csv(ribonanza[name]).columns
    groups = "library_groups.parquet"
    assert pl.read_parquet_schema(real / groups) == pl.read_parquet_schema(ribonanza[groups])


@pytest.mark.shared
def test_rna3d_files_have_the_columns_of_the_real_ones(rna3d, shared_data):
    real = shared_data("stanford-rna-3d-folding")
    for name, path in rna3d.items():
        ours, theirs = (pl.read_csv(file, n_rows=1).columns for file in (path, real / name))
        assert ours[: len(theirs)] == theirs[: len(ours)]


def test_the_order_of_two_motifs_is_the_class_and_every_sequence_has_both(tmp_path):
    files = write_labelled(tmp_path, sequences=40, test=5, seed=1)
    table = pl.read_csv(files["train"])
    assert table["label"].value_counts()["count"].to_list() == [20, 20]
    for sequence, label in table["sequence", "label"].iter_rows():
        first = label.removesuffix(" first")
        (second,) = {"GGACU", "CUUCC"} - {first}
        assert sequence.index(first) < sequence.rindex(second)
    assert pl.read_csv(files["test"]).columns == ["id", "sequence"]
    assert not set(pl.read_csv(files["test"])["id"]) & set(table["id"])
