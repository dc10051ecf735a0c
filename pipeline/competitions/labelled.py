"""Any labelled set of sequences, RNA, DNA or protein: one class for each, any number of them, or measured numbers.

What RAW may be says `pipeline.competitions.sequence_files`. What cannot be read is refused in one sentence, but for a
test set that is read alone, by a notebook that a competition runs again on hidden sequences: there every row is to get
a prediction, whatever is in it, and what is odd is counted.

Letters: N sequences, C numbers.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from pipeline.competitions.base import Competition, Facts, require_finite, tell_lengths
from pipeline.competitions.class_labels import take_classes, take_test_classes
from pipeline.competitions.columns_toml import tell_settings
from pipeline.competitions.number_labels import number_names, take_numbers, take_test_numbers
from pipeline.competitions.sequence_files import ENDINGS, Settings, raw_files, read_raw, read_settings
from pipeline.competitions.sequence_rows import (
    choose_letters,
    known_letters,
    normalise,
    one_row_an_id,
    tell_letters,
    warn_of_unknown,
    with_ids,
)
from pipeline.competitions.table_files import ending, read_sample, refuse_foreign
from pipeline.errors import DataError
from pipeline.labels import (
    Classes,
    Labels,
    letters_of,
    read_label_file,
    read_numbers,
    unknown_letter,
    write_labels,
)
from pipeline.paths import Paths
from pipeline.runlog import say, warn

_KINDS = ("classes", "numbers")  # tables of which there is one
_PARQUET: dict[str, Any] = {"compression": "zstd", "row_group_size": 1 << 14}


def clean(files: dict[str, Path], parts: dict[str, Path]) -> dict[str, Any]:
    """Write the tables that `parts` asks for; the facts are the validation report.

    A test set without ``train`` is a hidden one, and ``classes`` or ``numbers`` among the files what the checkpoints
    know.

    - train: as every competition's, with ``labels`` (places in the class names) or ``numbers`` (lists of C); null = not
      known, not scored;
    - classes or numbers, whichever there are: see `pipeline.labels`;
    - test: ``sequence_id, sequence`` in the order of the file, and ``labels`` or ``numbers`` where they are known, for
      the last score;
    - sample: the sample submission as it is, all text.

    Raises:
        DataError: a raw file is not what it should be.
    """
    settings, hidden = read_settings(files.get("columns")), "train" not in parts
    raw = {table: read_raw(files, table, settings) for table in ("train", "test") if table in parts}
    known = [files[kind] for kind in _KINDS if hidden and kind in files]
    alphabet = read_label_file(known[0]).alphabet if known else ""
    letters = letters_of(alphabet) if alphabet else choose_letters(list(raw.values()), settings)
    tables, odd = {}, {}
    for table, frame in raw.items():
        tables[table], odd[table] = normalise(frame, letters, settings, hidden=hidden)
    alphabet = alphabet or letters + (unknown_letter(letters) if "train" in odd and odd["train"]["odd"] else "")
    facts: dict[str, Any] = {}
    if "train" in tables:
        train, labels, facts = _take(tables["train"], alphabet, settings)
        facts |= {"letters": tell_letters(letters, odd["train"]), "lengths": tell_lengths(train["sequence"])}
        train.write_parquet(parts["train"], **_PARQUET)
        write_labels(parts[labels.kind], labels)
    if "test" in tables:
        test = one_row_an_id(tables["test"]) if hidden else tables["test"]
        test = with_ids(test, "test", may_repeat=False)
        warn_of_unknown(test, alphabet)
        test, told = _take_test(test, labels, settings, facts) if "train" in tables else (test, {})
        test = test.select("sequence_id", "sequence", *({"labels", "numbers"} & set(test.columns)))
        test.write_parquet(parts["test"], **_PARQUET)
        facts["test"] = {"sequences": test.height, **told, "letters": tell_letters(letters, odd["test"])}
        facts["test"] |= {"lengths": tell_lengths(test["sequence"])}
        if "train" in tables:
            facts["test"]["copies_of_train"] = int(test["sequence"].is_in(train["sequence"].to_list()).sum())
        if "sample" in parts:
            _write_sample(files["sample"], test["sequence_id"], parts["sample"], hidden=hidden)
    return facts | tell_settings(settings)


def _take(frame: pl.DataFrame, alphabet: str, settings: Settings) -> tuple[pl.DataFrame, Labels, dict[str, Any]]:
    names = number_names(frame, settings)
    return take_numbers(frame, names, alphabet) if names else take_classes(frame, alphabet, settings)


def _take_test(
    frame: pl.DataFrame, labels: Labels, settings: Settings, facts: Mapping[str, Any]
) -> tuple[pl.DataFrame, dict[str, str | int]]:
    if isinstance(labels, Classes):
        return take_test_classes(frame, labels, settings, dropped=facts.get("dropped", ()))
    return take_test_numbers(frame, labels)


def read_sequences(path: Path, *, alphabet: str, also: Sequence[str] = (), place: str = "") -> tuple[pl.DataFrame, int]:
    """Sequences of any file that RAW may be, without labels, in the letters of a network.

    Args:
        path: CSV, TSV, parquet or FASTA; ``columns.toml`` beside it holds here too.
        alphabet: the network's; odd letters are read as N, or X in proteins, where it has that one.
        also: further columns that are read, as text, if a table has them.
        place: what messages call a single sequence that came without a file; "" = they name file and row.

    Returns:
        ``sequence_id`` (each once; numbered rows where there are none), ``sequence`` and what there is of `also`, in
        the order of the file, and how many letters were odd.

    Raises:
        DataError: the file is not what it should be, or has an odd letter that the network does not know.
    """
    refuse_foreign(path)
    if ending(path) not in ENDINGS:
        raise DataError(f"{path}: expected {', '.join(ENDINGS)}. Next: write the sequences in one of these.")
    columns = path.with_name("columns.toml")
    settings = read_settings(columns if columns.is_file() else None, of_any_set=True)
    raw = read_raw({"own": path}, "own", settings, also=also)
    if place:
        raw = raw.with_columns(pl.lit(None).alias("row"), pl.lit(place).alias("where"))
    frame, found = known_letters(raw, alphabet, settings)
    if "id" not in frame.columns:
        say(f"{path.name}: no column is called id, so rows are numbered; id = '<column>' in columns.toml names one")
    kept = ["sequence_id", "sequence", *(name for name in also if name in frame.columns)]
    return with_ids(frame, "row", may_repeat=False).select(kept), found["odd"]


def _write_sample(path: Path, ids: pl.Series, part: Path, *, hidden: bool) -> None:
    """The sample submission as text; beside a hidden test set of other ids, its first row for each of those."""
    sample = read_sample(path)
    first = sample[sample.columns[0]]
    lost = set(ids) ^ set(first)
    if hidden and sample.height and (lost or first.is_duplicated().any()):
        warn(
            f"{path.name}: other ids than the test set's ({len(lost):,}); its columns are used for the test set's rows"
        )
        sample = sample[[0] * len(ids)].with_columns(ids.alias(first.name))
    elif lost:
        raise DataError(
            f"{path.name}: its first column and the ids of the test set differ in {len(lost):,} rows, such as "
            f"{min(map(str, lost))!r}; expected the same. Next: check that both are of one set."
        )
    sample.write_parquet(part, **_PARQUET)


def number_errors(
    prediction_NC: np.ndarray, truth_NC: np.ndarray, *, names: tuple[str, ...]
) -> tuple[np.ndarray, np.ndarray]:
    """Sums of square errors of each number, and how many were measured: [C] float64 and [C] int64.

    Args:
        prediction_NC: [N, C], finite.
        truth_NC: [N, C], NaN = not measured.
        names: of the numbers.

    Raises:
        DataError: a prediction is NaN or infinite, measured or not.
        ValueError: the shapes differ.

    >>> truth_NC = np.array([[1.0, np.nan], [3.0, 5.0]])
    >>> number_errors(np.zeros((2, 2)), truth_NC, names=("a", "b"))
    (array([10., 25.]), array([2, 1]))
    """
    require_finite(prediction_NC, truth_NC, targets=names, place="row")
    known_NC = ~np.isnan(truth_NC)
    difference_NC = np.where(known_NC, prediction_NC.astype(np.float64) - truth_NC, 0.0)
    return np.square(difference_NC).sum(axis=0), known_NC.sum(axis=0)


def mean_root_error(sums_C: np.ndarray, counts_C: np.ndarray) -> float:
    """Root mean square error, averaged over the numbers of which one was measured at least; NaN if none was.

    Source: the metric of Kaggle's OpenVaccine, MCRMSE, here with gaps; of a single number it is its RMSE.

    >>> mean_root_error(np.array([8.0, 25.0, 0.0]), np.array([2, 1, 0]))
    3.5
    """
    known_C = np.asarray(counts_C) > 0
    return (
        float(np.sqrt(np.asarray(sums_C)[known_C] / np.asarray(counts_C)[known_C]).mean()) if known_C.any() else np.nan
    )


def read_facts(paths: Paths) -> Facts:
    """The names of the numbers; {} of classes, which `pipeline.labels` knows."""
    return {"numbers": list(read_numbers(paths).names)} if paths.clean("numbers").is_file() else {}


def apply_facts(competition: Competition, facts: Facts) -> Competition:
    """The competition as one of numbers with these names."""
    names = tuple(facts["numbers"])
    return replace(
        competition,
        task="numbers",
        targets=names,
        metric="RMSE" if len(names) == 1 else "MCRMSE",
        error_power=2,
        error_sums=partial(number_errors, names=names),
        score=mean_root_error,
    )


LABELLED = Competition(
    name="labelled",
    title="Labelled sequences",
    slug="",
    files=(),
    task="classes",
    row_key="sequence_id",
    default_model="small_labelled",
    targets=(),
    target_range=None,
    signal_to_noise=None,
    metric="log loss",
    error_sums=None,
    score=None,
    tables=("train", *_KINDS, "test", "sample"),
    optional=("test", "sample"),
    either=_KINDS,
    raw_files=raw_files,
    clean=clean,
    test_inputs=("test", "sample", "columns"),
    test_tables=("test", "sample"),
    read_facts=read_facts,
    apply_facts=apply_facts,
)
