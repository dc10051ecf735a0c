"""What the rest of the pipeline needs to know of a competition. One file beside this one describes each."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from pipeline.errors import ConfigError, DataError
from pipeline.labels import Numbers
from pipeline.paths import Paths

if TYPE_CHECKING:  # a machine that trains may be without it
    import polars as pl

#: (prediction_LC, truth_LC) -> (sums_C, counts_C); truth is NaN where it does not count.
ErrorSums = Callable[[np.ndarray, np.ndarray], tuple[np.ndarray, np.ndarray]]
#: (sums_C, counts_C) over all scored rows -> the competition's single number.
Score = Callable[[np.ndarray, np.ndarray], float]
#: How Kaggle's competitions write their clean tables: readers see a flipped bit.
PARQUET: Mapping[str, Any] = {"compression": "zstd", "write_page_checksum": True}
#: What only the data of a set of one's own say, as JSON holds it; checkpoints keep it.
Facts = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class Competition:
    """A competition as data: how raw files become clean tables, what is predicted, and how it is scored.

    Clean tables, whatever the competition, are unique in ``sequence_id`` and sorted by it; where the submission has
    running rows, test is in their order:

    - train: ``sequence_id, sequence, dataset_name, group`` (null = no known relatives), ``scored`` (bool: counts in
      the metric), the `targets` as lists of length L (null = not measured) and the `signal_to_noise` columns; where
      not everything may be learned from, ``teaches`` (bool).
    - test: ``sequence_id, sequence``, and what the submission needs (``id_min, id_max``).

    Of classes, train holds ``labels`` instead of targets: places in the class names, null = not known. Of numbers, of
    which each sequence has one for each target, it holds ``numbers``: lists in their order, null = not measured.
    """

    name: str  #: COMP=… and the folder below artifacts/
    title: str  #: as Kaggle calls it
    slug: str  #: in Kaggle's addresses
    files: tuple[str, ...]  #: names on Kaggle of what the data stage reads
    #: values per nucleotide, C1' coordinates, or classes or numbers of whole sequences (`pipeline.labels`)
    task: Literal["values", "structure", "classes", "numbers"]
    #: the submission's first column: running numbers, ``<sequence_id>_<position from 0>``, ``<target>_<resid>``, or
    #: the id of the sequence itself
    row_key: Literal["id", "id_seqpos", "ID", "sequence_id"]
    targets: tuple[str, ...]  #: list columns of the clean train table, in the submission's column order
    target_range: tuple[float, float] | None  #: truth is clipped to it in loss and metric, predictions on the way out
    signal_to_noise: tuple[str, ...] | None  #: float column per target that weights its loss
    metric: str  #: name of the organisers' metric, lower is better for "values" and "numbers"
    #: the metric's errors are absolute differences to this power, and a target's error is that root of their mean
    error_power: Literal[1, 2] = 1
    error_sums: ErrorSums | None  #: None for structures and classes, which are scored in other ways
    score: Score | None
    tables: tuple[str, ...]  #: clean tables that `clean` writes, as ``clean/<table>.parquet``
    optional: tuple[str, ...] = ()  #: those of them that are written only where a raw file has that label
    either: tuple[str, ...] = ()  #: and those of which one is, whichever the raw files hold
    #: raw folder -> label -> raw file: the inputs of the data stage; DataError if one that is needed is missing. Those
    #: of Kaggle's competitions take ``test_only``: what `test_inputs` names is enough then
    raw_files: Callable[..., dict[str, Path]]
    #: (label -> raw file, table -> temporary parquet path) -> JSON-able facts: the validation report
    clean: Callable[[dict[str, Path], dict[str, Path]], dict[str, Any]]
    #: raw labels -> tables of the test set alone, for a machine that only predicts; `clean` writes what it is asked for
    test_inputs: tuple[str, ...] = ()
    test_tables: tuple[str, ...] = ()
    default_model: str = "ribonanza_mamba"  #: config that is trained unless another is named
    #: of each target's values in figures, and where its median is looked for; the range, if there is one
    shown_ranges: tuple[tuple[float, float], ...] = ()
    metric_note: str = ""  #: a sentence on what the metric's name does not tell
    meaning: str = ""  #: a sentence for who sees such values for the first time
    #: of a set of one's own: what its clean tables say that this description cannot; {} where there are none yet
    read_facts: Callable[[Paths], Facts] = lambda paths: {}
    #: what these facts, never empty, make of the competition
    apply_facts: Callable[["Competition", Facts], "Competition"] = lambda competition, facts: competition
    facts: Facts = field(default_factory=dict)  #: those that were applied
    #: of values per nucleotide that a network was trained to give in deviations: mean and deviation of each target
    units: Numbers | None = None

    def __post_init__(self) -> None:
        """ValueError where figures and floors could not tell which values to expect of a target."""
        if self.task == "values" and not self.shown_ranges and self.target_range:
            object.__setattr__(self, "shown_ranges", (self.target_range,) * len(self.targets))
        if self.task == "values" and len(self.shown_ranges) != len(self.targets):
            raise ValueError(
                f"competition {self.name}: shown_ranges of {len(self.shown_ranges)} targets; expected (low, high) for "
                f"each of {', '.join(self.targets) or 'none'}."
            )

    def with_facts(self, facts: Facts) -> "Competition":
        """The competition as its data say it is."""
        return replace(self.apply_facts(self, facts), facts=facts) if facts else self

    @property
    def params(self) -> dict[str, Any]:
        """What the outputs of a stage depend on of it, for `pipeline.stage.run_stage`."""
        return {"competition": self.name} | ({"facts": dict(self.facts)} if self.facts else {})

    @property
    def has_labels(self) -> bool:
        """Whether it is of whole sequences that classes or numbers are asked, and `pipeline.labels` says which."""
        return self.task in ("classes", "numbers")

    @property
    def is_own(self) -> bool:
        """Whether it is a set of one's own, of which only its data say what it is."""
        return not self.files

    def has_test(self, paths: Paths) -> bool:
        """Whether there is a test set, without which sets of one's own may come."""
        return "test" not in self.optional or paths.clean("test").is_file()

    def require_kaggle(self, stage: str) -> None:
        """ConfigError, in the name of a stage, unless the competition is one of Kaggle's."""
        if not self.slug:
            kind = self.name.partition("-")[0]
            raise ConfigError(
                f"{stage}: {self.name} is a set of your own; expected a competition of Kaggle's. Next: "
                f"COMP={kind}-<its name in Kaggle's addresses>, if it is one; the other targets (make help) need none."
            )

    @property
    def error_name(self) -> str:
        """What a target's error is called in words."""
        return "mean absolute error" if self.error_power == 1 else "root mean square error"

    def require_structures(self, stage: str) -> None:
        """ConfigError, in the name of a stage, unless structures are predicted."""
        if self.task != "structure":
            raise ConfigError(f"{stage}: {self.name} is not about structures. Next: COMP=rna3d.")

    def target_errors(self, sums_C: np.ndarray, counts_C: np.ndarray) -> np.ndarray:
        """[..., C] float64: each target's own error; NaN where nothing counts."""
        with np.errstate(invalid="ignore", divide="ignore"):
            means_C = np.asarray(sums_C, dtype=np.float64) / np.asarray(counts_C)
        return np.where(np.asarray(counts_C) > 0, means_C, np.nan) ** (1 / self.error_power)


def length_counts(lengths_N: np.ndarray) -> dict[str, int]:
    """How many sequences there are of each length, for the validation report.

    >>> length_counts(np.array([107, 130, 107]))
    {'107': 2, '130': 1}
    """
    lengths, counts = np.unique(lengths_N, return_counts=True)
    return {str(length): count for length, count in zip(lengths.tolist(), counts.tolist(), strict=True)}


def tell_lengths(sequences: "pl.Series") -> dict[str, float]:
    """Shortest, median and longest, for the validation report."""
    lengths = sequences.str.len_bytes()
    return {"shortest": lengths.min(), "median": lengths.median(), "longest": lengths.max()}  # type: ignore[dict-item]


def error_sums(
    prediction_LC: np.ndarray,
    truth_LC: np.ndarray,
    *,
    targets: tuple[str, ...],
    target_range: tuple[float, float] | None,
    power: int,
) -> tuple[np.ndarray, np.ndarray]:
    """Sums and counts of absolute (`power` 1) or square (2) errors over positions where all targets were measured.

    Args:
        prediction_LC: [L, C] float, not clipped.
        truth_LC: [L, C] float, NaN = not measured; clipped to the range, if there is one.
        targets: names, for messages.
        target_range: least and largest truth.
        power: of the errors.

    Returns:
        [C] float64 sums of the errors and [C] int64 counts of positions.

    Raises:
        DataError, ValueError: see `require_finite`.

    >>> truth = np.array([[2.0], [np.nan], [0.5]])
    >>> error_sums(np.zeros((3, 1)), truth, targets=("a",), target_range=(0, 1), power=2)
    (array([1.25]), array([2]))
    """
    require_finite(prediction_LC, truth_LC, targets=targets, place="position")
    counted_L = ~np.isnan(truth_LC).any(axis=1)
    truth = truth_LC[counted_L].astype(np.float64)
    truth = truth if target_range is None else np.clip(truth, *target_range)
    sums_C = (np.abs(prediction_LC[counted_L] - truth) ** power).sum(axis=0)
    return sums_C, np.full(sums_C.shape, counted_L.sum(), dtype=np.int64)


def mean_error(sums_C: np.ndarray, counts_C: np.ndarray, *, power: int, scored_C: Any = slice(None)) -> float:
    """Mean over the targets, or those that are scored, of their errors; NaN if no position counts.

    >>> mean_error(np.array([4.0, 36.0]), np.array([4, 4]), power=2)
    2.0
    """
    if not np.all(counts_C):
        return math.nan
    errors_C = (np.asarray(sums_C, dtype=np.float64) / counts_C) ** (1 / power)
    return float(np.mean(errors_C[scored_C]))


def require_finite(prediction_NC: np.ndarray, truth_NC: np.ndarray, *, targets: tuple[str, ...], place: str) -> None:
    """Look at predictions before they are scored; `place` is what a row of them is called.

    Raises:
        DataError: one is NaN or infinite.
        ValueError: the shapes differ.
    """
    if prediction_NC.shape != truth_NC.shape:
        raise ValueError(f"error_sums: prediction {prediction_NC.shape} and truth {truth_NC.shape} differ in shape.")
    if not np.isfinite(prediction_NC).all():
        row, channel = np.argwhere(~np.isfinite(prediction_NC))[0]
        raise DataError(
            f"prediction of {targets[channel]} is {prediction_NC[row, channel]} at {place} {row + 1}; "
            "expected finite values. Next: predict again, and look into the run's log for non-finite values."
        )
