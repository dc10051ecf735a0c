"""Any set of RNA or DNA with numbers per nucleotide: chemical mapping, scores of any kind, paired or unpaired.

What RAW may be says `pipeline.competitions.profile_files`; where the values may stand in it,
`pipeline.competitions.profile_columns`. What cannot be read is refused in one sentence.
"""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import polars as pl

from pipeline.competitions.base import Competition, Facts, error_sums, mean_error, tell_lengths
from pipeline.competitions.columns_toml import tell_settings
from pipeline.competitions.openvaccine import check_sample, own_positions
from pipeline.competitions.profile_files import raw_files, read_raw, read_settings
from pipeline.competitions.profile_tables import clean_test, clean_train, known_values, signal_column
from pipeline.competitions.sequence_rows import total_of
from pipeline.competitions.table_files import column_names
from pipeline.errors import DataError
from pipeline.paths import Paths, how_to_make

_PARQUET: dict[str, Any] = {"compression": "zstd", "row_group_size": 1 << 12}


def clean(files: dict[str, Path], parts: dict[str, Path]) -> dict[str, Any]:
    """Write the tables that `parts` asks for; the facts are the validation report.

    A test set without ``train`` is one that is read alone, by a notebook that a competition runs again.

    - train: as every competition's, with ``signal_to_noise_<target>`` and ``SN_filter_<target>`` where the files say
      how good a profile is. ``scored`` are rows that pass ``SN_filter``, if there is one, and have a position where
      all targets were measured. Rows with other letters than A, C, G, U, T, or without any value, are left out;
    - profiles: a row for each target, and what `read_facts` reads;
    - test: in the order of the file; with the targets where their values are known, for the last score.

    Raises:
        DataError: a raw file is not what it should be.
    """
    settings, hidden = read_settings(files.get("columns")), "train" not in parts
    facts: dict[str, Any] = {}
    if "train" in parts:
        train, told, facts = clean_train(read_raw(files, "train", settings), settings)
        if "sample" in files:
            told["targets"] = _sample_order(files["sample"], told["targets"])
        train.write_parquet(parts["train"], **_PARQUET)
        _write_facts(parts["profiles"], told)
    if "test" in parts:
        raw = read_raw(files, "test", settings, hidden=hidden)
        test, known = clean_test(raw, settings, hidden=hidden), dict[str, Any]()
        if not hidden:
            test, known = known_values(raw, test, settings, told["targets"])
        test.write_parquet(parts["test"], **_PARQUET)
        facts["test"] = {"sequences": test.height, "positions": total_of(test["sequence"].str.len_bytes()), **known}
        if "train" in parts:
            facts["test"]["copies_of_train"] = int(test["sequence"].is_in(train["sequence"].to_list()).sum())
        ids, lengths_K = test["sequence_id"].to_list(), test["sequence"].str.len_bytes().to_numpy()
        if "sample" in files and hidden:  # the training data say which targets it has
            if (own := own_positions(files["sample"], ids, lengths_K, targets=())) is not None:
                pl.DataFrame(own).write_parquet(parts["sample"], **_PARQUET)
        elif "sample" in files:
            rows = check_sample(files["sample"], ids, lengths_K, targets=told["targets"])
            facts["test"]["sample_submission_rows"] = rows
        facts["test"]["lengths"] = tell_lengths(test["sequence"])
    return facts | tell_settings(settings)


def _sample_order(path: Path, targets: Sequence[str]) -> list[str]:
    """Targets in the order of the sample submission's columns."""
    names = column_names(path)
    if names[:1] != ["id_seqpos"] or sorted(names[1:]) != sorted(targets):
        raise DataError(
            f"{path.name}: columns {', '.join(names[:6])}; expected id_seqpos and {', '.join(targets)}. Next: name the "
            "targets in columns.toml as the sample does, or leave the sample out."
        )
    return names[1:]


def _write_facts(path: Path, told: Mapping[str, Any]) -> None:
    one = {name: told[name] for name in ("metric", "range", "signal_to_noise")}
    types = {"range": pl.List(pl.Float64), "shown_range": pl.List(pl.Float64)}
    rows = [{"target": target, "shown_range": told["shown_ranges"][target]} | one for target in told["targets"]]
    pl.DataFrame(rows, schema_overrides=types).write_parquet(path)


def read_facts(paths: Paths) -> Facts:
    """What ``clean/profiles.parquet`` says, as `apply_facts` takes it; {} before the data stage.

    Raises:
        DataError: the file is not what the data stage wrote.
    """
    path = paths.clean("profiles")
    if not path.is_file():
        return {}
    try:
        table = pl.read_parquet(path)
        one = table.row(0, named=True)
        return {
            "targets": table["target"].to_list(),
            "metric": one["metric"],
            "range": one["range"],
            "shown_ranges": table["shown_range"].to_list(),
            "signal_to_noise": one["signal_to_noise"],
        }
    except (pl.exceptions.PolarsError, OSError, KeyError) as err:
        raise DataError(f"{path}: not what the data stage writes ({err}). Next: {how_to_make(path)}.") from err


def apply_facts(competition: Competition, facts: Facts) -> Competition:
    """The competition with the targets, metric and range of its data."""
    targets = tuple(facts["targets"])
    power: Literal[1, 2] = 2 if facts["metric"] == "RMSE" else 1
    within = None if facts["range"] is None else (facts["range"][0], facts["range"][1])
    shown = facts.get("shown_ranges") or [facts["shown_range"]] * len(targets)  # earlier checkpoints: one for all
    return replace(
        competition,
        targets=targets,
        metric=facts["metric"],
        error_power=power,
        target_range=within,
        shown_ranges=tuple((low, high) for low, high in shown),
        signal_to_noise=tuple(map(signal_column, targets)) if facts["signal_to_noise"] else None,
        error_sums=partial(error_sums, targets=targets, target_range=within, power=power),
        score=partial(mean_error, power=power),
    )


PROFILES = Competition(
    name="profiles",
    title="Profiles",
    slug="",
    files=(),
    task="values",
    row_key="id_seqpos",
    default_model="small_ribonanza_mamba",
    targets=(),
    target_range=None,
    signal_to_noise=None,
    metric="MAE",
    error_sums=None,
    score=None,
    tables=("train", "profiles", "test"),
    optional=("test",),
    either=("sample",),  # of a hidden test set, where its rows are others
    raw_files=raw_files,
    clean=clean,
    test_inputs=("test", "sample", "columns"),
    test_tables=("test", "sample"),
    read_facts=read_facts,
    apply_facts=apply_facts,
)
