"""Scores that need no model: the usual truth around a nucleotide, fitted on the other folds.

The usual is the median where the metric's errors are absolute, the mean where they are squared: what no other constant
beats. A model that does not beat the last floor has learned less than a lookup table (5-mer and chance of being
unpaired). All floors come from one table of statistics over (fold, target, 5-mer, unpaired bin): shorter contexts are
sums over longer ones, and what is left of all folds without one is the training data of that fold.

For medians the statistics are a histogram: the clipped truth is counted in `STEPS` bins and a bin each for the two ends
of its range, where clipping piles values up. Where nothing is clipped, the range is that of the target's figures, and
a median beyond it comes out at its end. A median is exact to the width of a bin (0.004 for [0, 1]). On the 1,259,923
scored positions of 13,075 real sequences, in five clustered folds, the floors differ from those of exact medians by
3.8e-5 (constant) and 1.3e-5 (nucleotide).

Letters: T positions, C targets, F folds, K 5-mers, U unpaired bins, S statistics (histogram bins; count and sum).
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
import polars as pl

from pipeline.competitions.base import Competition
from pipeline.errors import DataError
from pipeline.schema import ALPHABET
from pipeline.tables import flat_lists, read_batches

#: Nucleotides of the context, the predicted one in the middle.
CONTEXT = 5
#: Examples that a context needs; with fewer, the next shorter context answers.
MIN_EXAMPLES = 8
#: Bins of the unpaired probability; one more counts sequences without it.
UNPAIRED_BINS = 10
#: Inner bins of the histogram of the truth.
STEPS = 250

FLOORS = ("constant", "nucleotide", "5-mer", "5-mer x unpaired")

_LETTERS = len(ALPHABET)
_KMERS = _LETTERS**CONTEXT


class Usual(Protocol):
    """Statistics that add up, and the one value that stands for what they count."""

    shape: tuple[int, np.dtype]  #: how many statistics, and their type

    def add(self, flat: np.ndarray, cell_T: np.ndarray, truth_T: np.ndarray) -> None:
        """Count values: `flat` holds the statistics of all cells one after the other."""

    def examples(self, stats_S: np.ndarray) -> np.ndarray:
        """[...] how many values were counted."""

    def value(self, stats_S: np.ndarray) -> np.ndarray:
        """[...] the value that stands for them; 0 where nothing was counted."""


class Medians:
    """Histograms over a range, values outside it at its ends."""

    def __init__(self, low: float, high: float) -> None:
        self.low, self.high = low, high
        self.shape = STEPS + 2, np.dtype(np.uint32)
        self._width = (high - low) / STEPS

    def add(self, flat: np.ndarray, cell_T: np.ndarray, truth_T: np.ndarray) -> None:
        np.add.at(flat, cell_T * self.shape[0] + self._step(truth_T), 1)

    def _step(self, truth_T: np.ndarray) -> np.ndarray:
        """Histogram bin of a value: 0 at or below the range, 1 … STEPS inside, STEPS + 1 at or above it."""
        steps_T = np.floor((truth_T.astype(np.float64) - self.low) / self._width) + 1
        steps_T = np.clip(steps_T, 1, STEPS).astype(np.intp)
        return np.where(truth_T <= self.low, 0, np.where(truth_T >= self.high, STEPS + 1, steps_T))

    def examples(self, stats_S: np.ndarray) -> np.ndarray:
        return stats_S.sum(axis=-1)

    def value(self, stats_S: np.ndarray) -> np.ndarray:
        """Medians along the last axis, straight lines inside a bin."""
        below_S = np.cumsum(stats_S, axis=-1)
        half = below_S[..., -1:] / 2.0
        step = np.minimum((below_S < half).sum(axis=-1, keepdims=True), STEPS + 1)
        inside = np.take_along_axis(stats_S, step, axis=-1)
        share = (half - (np.take_along_axis(below_S, step, axis=-1) - inside)) / np.maximum(inside, 1)
        value = np.where(step == 0, self.low, self.low + (step - 1 + share) * self._width)
        return np.minimum(value, self.high)[..., 0]


class Means:
    """Counts and sums of values within a range."""

    def __init__(self, low: float = -np.inf, high: float = np.inf) -> None:
        self.low, self.high = low, high
        self.shape = 2, np.dtype(np.float64)

    def add(self, flat: np.ndarray, cell_T: np.ndarray, truth_T: np.ndarray) -> None:
        np.add.at(flat, cell_T * 2, 1.0)
        np.add.at(flat, cell_T * 2 + 1, np.clip(truth_T.astype(np.float64), self.low, self.high))

    def examples(self, stats_S: np.ndarray) -> np.ndarray:
        return stats_S[..., 0]

    def value(self, stats_S: np.ndarray) -> np.ndarray:
        return stats_S[..., 1] / np.maximum(stats_S[..., 0], 1.0)


def usuals_of(competition: Competition) -> list[Usual]:
    """Which constant has the least error in a competition's metric, for each target."""
    within = competition.target_range
    if competition.error_power == 2:
        return [Means(*(within or ())) for _ in competition.targets]
    return [Medians(*(within or shown)) for shown in competition.shown_ranges]


class FloorTables:
    """Statistics of the truth per context, and the usual values that follow from them.

    Memory of medians: folds x targets x 1,024 x 11 x 252 counts of 4 bytes, 114 MB for five folds of two targets, and
    as much again while fitting; a tenth without unpaired probabilities. Of means: 5 MB for five folds of five targets.
    """

    def __init__(self, usuals: Sequence[Usual], *, folds: list[int], unpaired: bool) -> None:
        self.usuals, self.folds, self.unpaired = usuals, folds, unpaired
        bins = UNPAIRED_BINS + 1 if unpaired else 1
        statistics, kind = usuals[0].shape
        self._stats_FCKUS = np.zeros((len(folds), len(usuals), _KMERS, bins, statistics), dtype=kind)

    @property
    def names(self) -> tuple[str, ...]:
        """Floors that can be had: the last one needs unpaired probabilities."""
        return FLOORS if self.unpaired else FLOORS[:-1]

    def add(self, kmer_T: np.ndarray, bin_T: np.ndarray, truth_TC: np.ndarray, fold_T: np.ndarray) -> None:
        """Count the truth at some positions.

        Args:
            kmer_T: [T] context, of `kmers`.
            bin_T: [T] unpaired bin; ignored without unpaired probabilities.
            truth_TC: [T, C]; NaN is not counted.
            fold_T: [T] fold that holds the position out.
        """
        flat = self._stats_FCKUS.reshape(-1)
        place_T = np.searchsorted(self.folds, fold_T)
        for target, usual in enumerate(self.usuals):
            here_T = np.isfinite(truth_TC[:, target])
            many = int(here_T.sum())
            unpaired_T = bin_T[here_T] if self.unpaired else np.zeros(many, dtype=np.intp)
            where = (place_T[here_T], np.full(many, target), kmer_T[here_T], unpaired_T)
            cell_T = np.ravel_multi_index(where, self._stats_FCKUS.shape[:-1])
            usual.add(flat, cell_T, truth_TC[here_T, target])

    def fit(self) -> dict[str, np.ndarray]:
        """Usual values by fold that is left out.

        Returns:
            floor -> [F, C, K, U] float32, the prediction in every context. Where there is too little of a context,
            what a shorter one says; the unpaired bin is kept as long as the context is at least a nucleotide.
        """
        tables: dict[str, list[np.ndarray]] = {name: [] for name in self.names}
        total_CKUS = self._stats_FCKUS.sum(axis=0)
        for stats_CKUS in self._stats_FCKUS:
            for name, table_CKU in self._fit_one(total_CKUS - stats_CKUS).items():
                tables[name].append(table_CKU)
        return {name: np.stack(parts).astype(np.float32) for name, parts in tables.items()}

    def lookup(self, table_FCKU: np.ndarray, kmer_T: np.ndarray, bin_T: np.ndarray, fold_T: np.ndarray) -> np.ndarray:
        """[T, C] float32: what a table of `fit` predicts at some positions."""
        return table_FCKU[np.searchsorted(self.folds, fold_T), :, kmer_T, bin_T if self.unpaired else 0]

    def _fit_one(self, stats_CKUS: np.ndarray) -> dict[str, np.ndarray]:
        plain_CKS = stats_CKUS.sum(axis=2)
        constant_CK = np.repeat(self._values(plain_CKS.sum(axis=1, keepdims=True)), _KMERS, axis=1)
        nucleotide_CK = self._backed_off(plain_CKS, constant_CK, contexts=(1,))
        kmer_CK = self._backed_off(plain_CKS, nucleotide_CK, contexts=(3, 5))
        fitted = {"constant": constant_CK, "nucleotide": nucleotide_CK, "5-mer": kmer_CK}
        shape = stats_CKUS.shape[:-1]
        tables = {name: np.broadcast_to(table_CK[:, :, None], shape) for name, table_CK in fitted.items()}
        if self.unpaired:
            by_bin = [
                self._backed_off(stats_CKUS[:, :, place], kmer_CK, contexts=(1, 3, 5)) for place in range(shape[2])
            ]
            tables[FLOORS[-1]] = np.stack(by_bin, axis=2)
        return tables

    def _backed_off(self, stats_CKS: np.ndarray, fallback_CK: np.ndarray, *, contexts: tuple[int, ...]) -> np.ndarray:
        """[C, K] usual values: each longer context answers where it has enough examples."""
        table_CK = fallback_CK
        for context in contexts:
            stats = _narrow(stats_CKS, context)
            enough = self.usuals[0].examples(stats) >= MIN_EXAMPLES
            table_CK = np.where(_widen(enough, context), _widen(self._values(stats), context), table_CK)
        return table_CK

    def _values(self, stats_CKS: np.ndarray) -> np.ndarray:
        """[C, K] what stands for each context's statistics."""
        return np.stack([usual.value(stats_KS) for usual, stats_KS in zip(self.usuals, stats_CKS, strict=True)])


def _narrow(stats_CKS: np.ndarray, context: int) -> np.ndarray:
    """Statistics of 5-mers summed to shorter contexts around the same middle: [C, 4**context, S]."""
    targets, _, steps = stats_CKS.shape
    side = _LETTERS ** ((CONTEXT - context) // 2)
    return stats_CKS.reshape(targets, side, _LETTERS**context, side, steps).sum(axis=(1, 3))


def _widen(table: np.ndarray, context: int) -> np.ndarray:
    """Values of shorter contexts repeated for all 5-mers around them: [C, K]."""
    side = _LETTERS ** ((CONTEXT - context) // 2)
    spread = np.broadcast_to(table[:, None, :, None], (table.shape[0], side, table.shape[1], side))
    return spread.reshape(table.shape[0], _KMERS)


def kmers(sequences: pl.Series, lengths_N: np.ndarray) -> np.ndarray:
    """Context of every nucleotide as a number below 4**5; beyond an end, the end's letter is repeated.

    >>> kmers(pl.Series(["AC"]), np.array([2])).tolist()
    [5, 21]
    """
    table = np.zeros(256, dtype=np.intp)
    table[np.frombuffer(ALPHABET.encode(), dtype=np.uint8)] = np.arange(_LETTERS)
    tokens_T = table[np.frombuffer("".join(sequences.to_list()).encode(), dtype=np.uint8)]
    ends_N = np.cumsum(lengths_N)
    first_T, last_T = np.repeat(ends_N - lengths_N, lengths_N), np.repeat(ends_N - 1, lengths_N)
    at_T = np.arange(len(tokens_T))
    code_T = np.zeros(len(tokens_T), dtype=np.intp)
    for shift in range(-(CONTEXT // 2), CONTEXT // 2 + 1):
        code_T = code_T * _LETTERS + tokens_T[np.clip(at_T + shift, first_T, last_T)]
    return code_T


class UnpairedBins:
    """Unpaired probability of every nucleotide of the training sequences, as a bin number of one byte.

    Memory: a byte a nucleotide and the sequences themselves, 300 MB for 800,000 of 177 nt.
    """

    def __init__(self, bpp: Path, train: Path) -> None:
        wanted = pl.read_parquet(train, columns=["sequence"]).unique().sort("sequence")
        parts: list[np.ndarray] = []
        found: list[pl.DataFrame] = []
        before = 0
        for batch in read_batches(bpp, ["sequence", "unpaired"]):
            batch = batch.join(wanted, on="sequence", how="semi", maintain_order="left")
            lengths_N = batch["sequence"].str.len_bytes().to_numpy().astype(np.int64)
            flat_T = flat_lists(batch["unpaired"], lengths_N, ids=batch["sequence"], where=str(bpp))
            if not np.isfinite(flat_T).all():
                raise DataError(
                    f"{bpp}: an unpaired probability is missing; expected one a nucleotide. Next: make bpp."
                )
            parts.append(np.clip(flat_T * UNPAIRED_BINS, 0, UNPAIRED_BINS - 1).astype(np.uint8))
            found.append(batch.select("sequence").with_columns(_at=before + np.cumsum(lengths_N) - lengths_N))
            before += len(flat_T)
        self._bins_T = np.concatenate([np.zeros(0, dtype=np.uint8), *parts])
        self._places = pl.concat([pl.DataFrame(schema={"sequence": pl.String, "_at": pl.Int64}), *found])
        self.without = wanted.height - self._places.height

    def of(self, sequences: pl.Series, lengths_N: np.ndarray) -> np.ndarray:
        """[T] bins of some sequences one after the other; `UNPAIRED_BINS` where a sequence has no probabilities."""
        beside = pl.DataFrame({"sequence": sequences}).join(
            self._places, on="sequence", how="left", validate="m:1", maintain_order="left"
        )
        at_N = beside["_at"].fill_null(-1).to_numpy()
        begins_N = np.cumsum(lengths_N) - lengths_N
        inside_T = np.arange(int(lengths_N.sum())) - np.repeat(begins_N, lengths_N)
        from_T = np.repeat(at_N, lengths_N)
        if not len(self._bins_T):
            return np.full(len(from_T), UNPAIRED_BINS)
        bins_T = self._bins_T[np.where(from_T < 0, 0, from_T + inside_T)].astype(np.intp)
        return np.where(from_T < 0, UNPAIRED_BINS, bins_T)
