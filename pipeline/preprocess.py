"""The data stage: raw competition files to clean tables, with a validation report."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.competitions.base import Competition
from pipeline.errors import DataError
from pipeline.paths import Paths
from pipeline.schema import split_id
from pipeline.stage import Report, run_stage

#: Raised when the same raw files give other tables than before.
VERSION = 8

_MOST_VALUES = 24  # side by side in one line
_MOST_ITEMS = 6  # of a list
_UNITS = {"mib": "MiB", "coordinate": "coordinate, Å"}  # words of a fact's name, as people write them
#: Facts whose names, so many levels below them, come from the data or from columns.toml.
_GIVEN = dict.fromkeys(("classes", "numbers", "targets", "probes", "datasets", "merged", "dropped"), 1) | {"columns": 2}


def run(
    competition: Competition,
    raw: Path,
    paths: Paths,
    *,
    force: bool = False,
    test_only: bool = False,
    rows: int | None = None,
) -> Report:
    """Turn the raw files in a folder into ``clean/*.parquet``, or say that they are current.

    Args:
        competition: whose files they are.
        raw: folder with the files as Kaggle ships them.
        paths: where the tables go; their manifest, ``clean/data.manifest.json``, keeps the report and `raw`.
        force: build even if current.
        test_only: write the tables of the test set alone, for a machine that has trained checkpoints.
        rows: with `test_only`, keep this many test sequences, the first ones, for a trial.

    Returns:
        The report; its facts are the validation report, see `describe`.

    Raises:
        DataError: a raw file is missing, damaged, or not what it claims to be; nothing is written.
        StorageError: the disk is full.
    """
    try:
        files = competition.raw_files(raw, **({"test_only": True} if test_only and not competition.is_own else {}))
    except OSError as err:
        raise DataError(
            f"RAW={raw}: {err.filename or raw} cannot be read: {err.strerror}. Next: check its permissions."
        ) from err
    tables = tuple(dict.fromkeys((*competition.tables, *competition.either)))  # of a rerun's sample nothing stays
    params: dict[str, Any] = {"version": VERSION, "competition": competition.name}
    if test_only:
        files = {label: path for label, path in files.items() if label.partition("/")[0] in competition.test_inputs}
        known = [table for table in competition.either if table not in competition.test_tables]
        files |= {table: path for table in known if (path := paths.clean(table)).is_file()}  # so far
        tables, params = competition.test_tables, params | {"test_only": True, "rows": rows}
    given = {label.partition("/")[0] for label in files}
    if competition.is_own and not test_only and "train" not in given:
        raise DataError(f"RAW={raw}: a test set alone; expected the training file too. Next: put train.csv there.")
    tables = tuple(table for table in tables if table not in competition.optional or table in given)
    if set(tables) <= set(competition.either):
        raise DataError(f"RAW={raw}: no test set. Next: put test.csv or the like there, or leave --test-only away.")

    def build(parts: dict[str, Path]) -> dict[str, Any]:
        facts = competition.clean(files, parts)
        if test_only and rows is not None:
            _keep_first(competition, parts, rows)
        for table in () if test_only else competition.optional:
            if table not in tables:  # of an earlier set that had one
                paths.clean(table).unlink(missing_ok=True)
        return facts

    outputs = {table: paths.clean(table) for table in tables}
    notes = {"raw": str(raw.resolve())}
    either = [table for table in competition.either if table in outputs]
    told: dict[str, Any] = {"params": params, "notes": notes, "force": force}
    return run_stage("data", inputs=files, outputs=outputs, build=build, either=either, **told)


def _keep_first(competition: Competition, parts: Mapping[str, Path], rows: int) -> None:
    """Cut the test set down to its first sequences, and the rows that are submitted to theirs."""
    test = pq.read_table(parts["test"]).slice(0, rows)
    pq.write_table(test, parts["test"])
    if "sample" in parts and competition.task == "values":  # a trial's rows are those of its sequences
        parts["sample"].unlink(missing_ok=True)
    elif "sample" in parts:
        sample, kept = pq.read_table(parts["sample"]), set(test["sequence_id"].to_pylist())
        ids = sample[sample.column_names[0]].to_pylist()
        of_residues = competition.row_key == "ID"
        mask = [(split_id(row_id)[0] if of_residues else row_id) in kept for row_id in ids]
        pq.write_table(sample.filter(pa.array(mask)), parts["sample"])


def describe(facts: Mapping[str, Any]) -> list[str]:
    """The validation report as lines for a terminal: small facts side by side, deeper ones indented.

    >>> describe({"rows": 12000, "lengths": {"115": 3, "170": 4}, "probes": {"DMS_MaP": {"null_share": 0.25}}})
    ['rows = 12,000', 'lengths: 115 = 3, 170 = 4', 'probes:', '  DMS_MaP: null share = 0.25']
    >>> describe({"peak_memory_mib": 584, "largest_coordinate": 51.7})
    ['peak memory MiB = 584', 'largest coordinate, Å = 51.7']
    >>> describe({"classes": {"type_1": 3, "type 1": 4}, "numbers": {"half_life": {"null_share": 0.25}}})
    ['classes: type_1 = 3, type 1 = 4', 'numbers:', '  half_life: null share = 0.25']
    """
    return _lines(facts, given=0)


def _lines(facts: Mapping[str, Any], *, given: int) -> list[str]:
    """`describe`; `given`: how many levels of names, from the first, are the data's own and stay as they are."""
    says = str if given else _words
    plain = [f"{says(name)} = {_value(value)}" for name, value in facts.items() if not isinstance(value, Mapping)]
    lines = [*plain]
    for name, value in facts.items():
        if isinstance(value, Mapping):
            below = given - 1 if given else _GIVEN.get(name, 0)
            small = {key: item for key, item in value.items() if not isinstance(item, Mapping)}
            deep = {key: item for key, item in value.items() if isinstance(item, Mapping)}
            lines.append(f"{says(name)}: {_side_by_side(small, given=below)}".rstrip())
            lines += [f"  {line}" for line in _lines(deep, given=below)]
    return lines


def _side_by_side(values: Mapping[str, Any], *, given: int) -> str:
    says = str if given else _words
    parts = [f"{says(name)} = {_value(value)}" for name, value in values.items()]
    more = len(parts) - _MOST_VALUES
    return ", ".join(parts[:_MOST_VALUES]) + (f", … ({more} more)" if more > 0 else "")


def _words(name: str) -> str:
    """A fact's name as words, with its unit; names that hold capitals stay as they are."""
    if not name.islower():
        return name
    return " ".join(_UNITS.get(word, word) for word in name.split("_"))


def _value(value: Any) -> str:
    if isinstance(value, list):
        more = [f"… ({len(value) - _MOST_ITEMS:,} more)"] if len(value) > _MOST_ITEMS else []
        return ", ".join([*map(_value, value[:_MOST_ITEMS]), *more]) or "none"
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
