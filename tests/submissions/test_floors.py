from dataclasses import replace

import numpy as np
import polars as pl
import pytest

from pipeline.competitions import get_competition
from pipeline.errors import DataError
from submissions.floors import (
    CONTEXT,
    FLOORS,
    MIN_EXAMPLES,
    UNPAIRED_BINS,
    FloorTables,
    Means,
    Medians,
    UnpairedBins,
    kmers,
    usuals_of,
)

RIBONANZA = get_competition("ribonanza")


def tables(folds: int = 2, *, unpaired: bool = True) -> FloorTables:
    return FloorTables([Medians(0.0, 1.0)] * 2, folds=list(range(folds)), unpaired=unpaired)


def random_positions(rng: np.random.Generator, size: int, *, folds: int = 2):
    kmer_T = rng.integers(0, 4**CONTEXT, size=size)
    bin_T = rng.integers(0, UNPAIRED_BINS + 1, size=size)
    truth_TC = np.stack([kmer_T // 16 % 4 * 0.2, bin_T * 0.08], axis=1) + rng.normal(0.0, 0.3, size=(size, 2))
    return kmer_T, bin_T, truth_TC.astype(np.float32), rng.integers(0, folds, size=size)


def exact_medians(key_T, truth_T, train_T, wanted_T, within=(0.0, 1.0)):
    """Median of the clipped truth of each key on the training positions, looked up at all wanted ones."""
    medians = {key: np.median(np.clip(truth_T[train_T & (key_T == key)], *within)) for key in np.unique(key_T)}
    return np.array([medians[key] for key in key_T[wanted_T]])


def test_floors_agree_with_exact_medians_of_the_other_folds(rng):
    kmer_T, bin_T, truth_TC, fold_T = random_positions(rng, 30_000)
    ranges = (0.0, 1.0), (-0.5, 0.5)
    floors = FloorTables([Medians(*within) for within in ranges], folds=[0, 1], unpaired=True)
    floors.add(kmer_T, bin_T, truth_TC, fold_T)
    fitted = floors.fit()
    nucleotide_T = kmer_T // 16 % 4
    for name, key_T in (("constant", np.zeros_like(kmer_T)), ("nucleotide", nucleotide_T)):
        got_TC = floors.lookup(fitted[name], kmer_T, bin_T, fold_T)
        for target in range(2):
            for fold in range(2):
                here_T = fold_T == fold
                wanted = exact_medians(key_T, truth_TC[:, target], ~here_T, here_T, ranges[target])
                np.testing.assert_allclose(got_TC[here_T, target], wanted, atol=0.004)


def test_longest_context_with_enough_examples_answers():
    """One 5-mer with many examples, one with too few whose 3-mer has many, one unknown: 5-mer, 3-mer, nucleotide."""
    many, few, unknown = 0b0110111001, 0b0110111010, 0b1111111111  # first two share the middle three letters
    other = 0b0000110000  # shares the middle letter alone, and decides its median
    floors = tables(unpaired=False)
    kmer_T = np.array([many] * 40 + [few] * (MIN_EXAMPLES - 1) + [other] * 60)
    value_T = np.array([0.2] * 40 + [0.9] * (MIN_EXAMPLES - 1) + [0.6] * 60)
    truth_TC = np.stack([value_T, value_T], axis=1)
    floors.add(kmer_T, np.zeros_like(kmer_T), truth_TC, np.ones(len(kmer_T), dtype=int))
    table_K = floors.fit()["5-mer"][0, 0, :, 0]
    assert table_K[many] == pytest.approx(0.2, abs=0.004)
    assert table_K[few] == pytest.approx(0.2, abs=0.004)
    assert table_K[unknown] == pytest.approx(0.6, abs=0.004)
    floors.add(np.array([few]), np.array([0]), np.array([[0.9, 0.9]]), np.array([1]))
    assert floors.fit()["5-mer"][0, 0, few, 0] == pytest.approx(0.9, abs=0.004)


def test_a_fold_never_sees_its_own_truth(rng):
    kmer_T, bin_T, truth_TC, fold_T = random_positions(rng, 5_000)
    first, second = tables(), tables()
    first.add(kmer_T, bin_T, truth_TC, fold_T)
    changed_TC = np.where(fold_T[:, None] == 0, 1.0 - truth_TC, truth_TC)
    second.add(kmer_T, bin_T, changed_TC, fold_T)
    before, after = first.fit(), second.fit()
    for name in FLOORS:
        assert np.array_equal(before[name][0], after[name][0])
        assert not np.array_equal(before[name][1], after[name][1])


def test_batches_add_up(rng):
    kmer_T, bin_T, truth_TC, fold_T = random_positions(rng, 3_000)
    truth_TC[::7, 0] = np.nan
    whole, parts = tables(), tables()
    whole.add(kmer_T, bin_T, truth_TC, fold_T)
    for some in np.array_split(rng.permutation(3_000), 5):
        parts.add(kmer_T[some], bin_T[some], truth_TC[some], fold_T[some])
    fitted = parts.fit()
    for name, table in whole.fit().items():
        assert np.array_equal(table, fitted[name])


def test_piles_at_the_ends_of_the_range_give_exact_medians():
    floors = tables(unpaired=False)
    truth_TC = np.array([[-3.0, 5.0]] * 30 + [[0.5, 0.5]] * 20)
    kmer_T = np.zeros(50, dtype=int)
    floors.add(kmer_T, kmer_T, truth_TC, np.ones(50, dtype=int))
    assert floors.fit()["constant"][0, :, 0, 0].tolist() == [0.0, 1.0]


def test_floors_of_a_square_error_are_means_of_the_other_folds(rng):
    kmer_T, bin_T, truth_TC, fold_T = random_positions(rng, 30_000)
    truth_TC = truth_TC * 5 - 2
    floors = FloorTables([Means()] * 2, folds=[0, 1], unpaired=True)
    floors.add(kmer_T, bin_T, truth_TC, fold_T)
    fitted = floors.fit()
    middle_T = kmer_T // 16 % 4
    for fold in (0, 1):
        train_T = fold_T != fold
        assert fitted["constant"][fold, :, 7, 3] == pytest.approx(truth_TC[train_T].mean(axis=0), abs=1e-6)
        wanted = truth_TC[train_T & (middle_T == 2)].mean(axis=0)
        assert fitted["nucleotide"][fold, :, 2 * 16 + 5, 0] == pytest.approx(wanted, abs=1e-6)


def test_medians_are_as_exact_in_any_unit(rng):
    """One histogram for all targets, as wide as the largest needs, put all values of a small unit into one bin."""
    kmer_T, bin_T, truth_TC, fold_T = random_positions(rng, 20_000)
    units_C = np.array([1e-4, 50.0])
    within = [(0.0, 1e-4), (0.0, 50.0)]
    own = replace(get_competition("profiles-none"), targets=("a", "b"), shown_ranges=tuple(within))
    floors, scaled = tables(), FloorTables(usuals_of(own), folds=[0, 1], unpaired=True)
    floors.add(kmer_T, bin_T, truth_TC, fold_T)
    scaled.add(kmer_T, bin_T, truth_TC * units_C, fold_T)
    fitted = scaled.fit()
    for name, table_FCKU in floors.fit().items():
        np.testing.assert_allclose(fitted[name] / units_C[:, None, None], table_FCKU, atol=0.004)


def test_unpaired_floor_is_only_there_with_probabilities():
    assert tables(unpaired=False).names == FLOORS[:-1]
    assert tables(unpaired=True).names == FLOORS


def test_kmers_number_the_letters_around_and_repeat_the_ends():
    sequences = pl.Series(["ACGUA", "G"])
    got = kmers(sequences, np.array([5, 1])).tolist()
    letters = "ACGU"
    words = ["AAACG", "AACGU", "ACGUA", "CGUAA", "GUAAA", "GGGGG"]
    assert got == [
        sum(letters.index(letter) * 4**place for place, letter in enumerate(reversed(word))) for word in words
    ]


def test_unpaired_bins_follow_the_sequence_and_mark_unknown_ones(tmp_path):
    pl.DataFrame({"sequence": ["GGG", "AC", "UUUU", "AC"]}).write_parquet(tmp_path / "train.parquet")
    bpp = pl.DataFrame({"sequence": ["AC", "CCCC", "GGG"], "unpaired": [[0.05, 1.0], [0.5] * 4, [0.999, 0.31, 0.0]]})
    bpp.write_parquet(tmp_path / "bpp.parquet")
    bins = UnpairedBins(tmp_path / "bpp.parquet", tmp_path / "train.parquet")
    got = bins.of(pl.Series(["UUUU", "AC", "GGG", "AC"]), np.array([4, 2, 3, 2]))
    assert got.tolist() == [UNPAIRED_BINS] * 4 + [0, 9] + [9, 3, 0] + [0, 9]
    assert bins.without == 1


def test_probabilities_of_another_length_are_refused(tmp_path):
    pl.DataFrame({"sequence": ["GGG"]}).write_parquet(tmp_path / "train.parquet")
    pl.DataFrame({"sequence": ["GGG"], "unpaired": [[0.1]]}).write_parquet(tmp_path / "bpp.parquet")
    with pytest.raises(DataError, match="GGG: 1 values of unpaired; expected 3"):
        UnpairedBins(tmp_path / "bpp.parquet", tmp_path / "train.parquet")


@pytest.mark.shared
def test_floors_on_pk50_are_those_measured_with_exact_medians(shared_data):
    """Random folds of the 2,553 scored PK50 sequences: 0.2647, 0.2167 and 0.1772 were measured with exact medians."""
    wide = pl.read_parquet(shared_data("stanford-ribonanza-rna-folding") / "train_data.parquet")
    wide = wide.filter(pl.col("dataset_name").str.starts_with("PK50"))
    scored = wide.filter(pl.col("SN_filter") == 1).group_by("sequence_id").len().filter(pl.col("len") == 2)
    wide = wide.join(scored, on="sequence_id", how="semi").sort(
        "sequence_id", "experiment_type", descending=[False, True]
    )
    length = len(wide["sequence"][0])
    cells = wide.select(f"reactivity_{at:04d}" for at in range(1, length + 1)).to_numpy()
    truth_TC = cells.reshape(-1, 2, length).transpose(0, 2, 1).reshape(-1, 2)
    truth_TC[~np.isfinite(truth_TC).all(axis=1)] = np.nan
    sequences = wide["sequence"].gather_every(2)
    kmer_T = kmers(sequences, np.full(sequences.len(), length))
    fold_T = np.repeat(np.random.default_rng(0).integers(0, 5, size=sequences.len()), length)
    floors = tables(folds=5, unpaired=False)
    floors.add(kmer_T, np.zeros_like(kmer_T), truth_TC, fold_T)
    for name, table in floors.fit().items():
        prediction_TC = floors.lookup(table, kmer_T, np.zeros_like(kmer_T), fold_T)
        got = RIBONANZA.score(*RIBONANZA.error_sums(prediction_TC, truth_TC))
        assert got == pytest.approx({"constant": 0.2647, "nucleotide": 0.2167, "5-mer": 0.1772}[name], abs=4e-4)
