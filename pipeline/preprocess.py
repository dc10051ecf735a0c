"""The data stage: raw competition files to clean tables, with a validation report."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.competitions.base import Competition
from pipeline.errors import DataError
from pipeline.paths import Paths
from pipeline.stage import Report, run_stage

#: Raised when the same raw files give other tables than before.
VERSION = 1

_MOST_VALUES = 24  # side by side in one line


def run(competition: Competition, raw: Path, paths: Paths, *, force: bool = False) -> Report:
    """Turn the raw files in a folder into ``clean/*.parquet``, or say that they are current.

    Args:
        competition: whose files they are.
        raw: folder with the files as Kaggle ships them.
        paths: where the tables go; their manifest, ``clean/data.manifest.json``, keeps the report.
        force: build even if current.

    Returns:
        The report; its facts are the validation report, see `describe`.

    Raises:
        DataError: a raw file is missing, damaged, or not what it claims to be; nothing is written.
        StorageError: the disk is full.
    """
    try:
        files = competition.raw_files(raw)
    except OSError as err:
        raise DataError(
            f"RAW={raw}: {err.filename or raw} cannot be read: {err.strerror}. Next: check its permissions."
        ) from err
    return run_stage(
        "data",
        inputs=files,
        outputs={table: paths.clean(table) for table in competition.tables},
        params={"version": VERSION, "competition": competition.name},
        build=lambda parts: competition.clean(files, parts),
        force=force,
    )


def describe(facts: Mapping[str, Any]) -> list[str]:
    """The validation report as lines for a terminal: small facts side by side, deeper ones indented.

    >>> describe({"rows": 12000, "lengths": {"115": 3, "170": 4}, "probes": {"DMS_MaP": {"null_share": 0.25}}})
    ['rows = 12,000', 'lengths: 115 = 3, 170 = 4', 'probes:', '  DMS_MaP: null share = 0.25']
    """
    plain = [f"{_words(name)} = {_value(value)}" for name, value in facts.items() if not isinstance(value, Mapping)]
    lines = [*plain]
    for name, value in facts.items():
        if isinstance(value, Mapping):
            small = {key: item for key, item in value.items() if not isinstance(item, Mapping)}
            deep = {key: item for key, item in value.items() if isinstance(item, Mapping)}
            lines.append(f"{_words(name)}: {_side_by_side(small)}".rstrip())
            lines += [f"  {line}" for line in describe(deep)]
    return lines


def _side_by_side(values: Mapping[str, Any]) -> str:
    parts = [f"{_words(name)} = {_value(value)}" for name, value in values.items()]
    more = len(parts) - _MOST_VALUES
    return ", ".join(parts[:_MOST_VALUES]) + (f", … ({more} more)" if more > 0 else "")


def _words(name: str) -> str:
    """A fact's name as words; names of probes and columns hold capitals and stay as they are."""
    return name.replace("_", " ") if name.islower() else name


def _value(value: Any) -> str:
    return f"{value:,}" if isinstance(value, int) and not isinstance(value, bool) else str(value)
