"""Tables of profiles in the files that people have, as they are: parquet, JSON lines, CSV, TSV, RDAT, FASTA.

RAW is a folder with ``train`` and perhaps ``test`` and ``sample_submission``, the training file itself, or a folder of
RDAT files. ``columns.toml`` in the same folder says what is not found by itself, see `Settings`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import polars as pl

from pipeline.competitions import sequence_files, table_files
from pipeline.competitions.columns_toml import read_told
from pipeline.competitions.profile_columns import MISSING, REPAIR
from pipeline.competitions.raw import read_json_lines
from pipeline.competitions.raw_files import kind_of
from pipeline.competitions.rdat import read_rdat
from pipeline.competitions.table_files import FASTA, ending, read_fasta
from pipeline.errors import DataError

_JSON = (".json", ".jsonl", ".ndjson")
_RDAT = ".rdat"
_ENDINGS = (*table_files.TEXT, ".parquet", *_JSON, _RDAT, *FASTA)
ROW, FILE = " row", " file"  # beside a table's own columns, none of which is called so
#: What a column of ids is usually called, in small letters.
IDS = ("id", "sequence_id", "seq_id", "name", "identifier", "accession")


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What ``columns.toml`` may say; "" = found by itself."""

    id: str = ""  #: column of the ids; without one, rows are numbered
    sequence: str = ""
    targets: list[str] = field(default_factory=list)  #: columns of values, or stems of numbered ones
    group: str = ""  #: column of known relatives, which share a fold
    dataset: str = ""  #: column of where a profile comes from: scores are told for each
    signal_to_noise: str = ""  #: column of a molecule's quality, for all targets
    first: str = ""  #: column of the position, from 1, at which a list begins that is shorter than its sequence
    modifier: str = ""  #: of RDAT files with several, the one that is read
    metric: str = "MAE"  #: or "RMSE"; the mean of the targets' errors
    range: list[float] = field(default_factory=list)  #: the truth is clipped to it in loss and metric


def read_settings(path: Path | None) -> Settings:
    """What ``columns.toml`` says, if there is one."""
    settings = Settings(**read_told(path, Settings))
    if settings.metric not in ("MAE", "RMSE"):
        raise DataError(f"{path}: metric = {settings.metric!r}. Next: write 'MAE' or 'RMSE'.")
    if settings.range and not (len(settings.range) == 2 and settings.range[0] < settings.range[1]):
        raise DataError(f"{path}: range = {settings.range}; expected two rising numbers. Next: range = [0, 1].")
    return settings


def raw_files(raw: Path) -> dict[str, Path]:
    """``train``, and ``test``, ``sample`` and ``columns`` where they are; RDAT files alone as ``train/<name>``.

    Raises:
        DataError: no training file, or several.
    """
    if raw.is_dir() and (found := _only_rdat(raw)):
        columns = raw / "columns.toml"
        return {f"train/{path.name}": path for path in found} | ({"columns": columns} if columns.is_file() else {})
    return sequence_files.raw_files(raw, endings=_ENDINGS)


def _only_rdat(raw: Path) -> list[Path]:
    """RDAT files of a folder without other tables, where none is called train."""
    tables = sequence_files.tables_in(raw, _ENDINGS)
    is_rdat = all(ending(path) == _RDAT for path in tables)
    return tables if is_rdat and not any(path.name.partition(".")[0] == "train" for path in tables) else []


def read_raw(files: Mapping[str, Path], table: str, settings: Settings, *, hidden: bool = False) -> pl.DataFrame:
    """All columns of a table, its rows numbered from 1 (empty ones counted), with their file.

    Of a hidden test set without ids an empty row is a row, too: a submission lacked it.
    """
    found = [path for label, path in sorted(files.items()) if label.partition("/")[0] == table]
    frames = []
    for path in found:
        frame = _read_file(path, settings, hidden=hidden)
        frame = frame if ROW in frame.columns else frame.with_row_index(ROW, offset=1)
        frames += [frame.with_columns(pl.lit(path.name).alias(FILE))] * bool(frame.height)
    if not frames:
        treated = " of a treated molecule" if ending(found[0]) == _RDAT else ""
        raise DataError(f"{found[0].name}: no sequence{treated} in it. Next: check the file.")
    return pl.concat(frames)


def _read_file(path: Path, settings: Settings, *, hidden: bool) -> pl.DataFrame:
    kind = ending(path)
    if kind in FASTA:
        return read_fasta(path, labelled=False).select("id", "sequence")
    if kind == _RDAT:
        return _read_rdat(path, settings)
    if kind in _JSON:
        return _read_records(path)
    if hidden and not (settings.id or table_files.usual_columns(table_files.column_names(path), IDS)):
        return table_files.read_whole(path, blank_lines=False)
    table = table_files.read_whole(path)
    return table if kind_of(path) == "parquet" else table_files.number_rows(table, ROW)


def _read_rdat(path: Path, settings: Settings) -> pl.DataFrame:
    with table_files.open_text(path, errors="replace") as lines:  # comments hold signs of all times
        rows = list(read_rdat(lines, where=path.name, stem=Path(path.name.removesuffix(".gz")).stem))
    modifiers = sorted({row["dataset_name"] for row in rows})
    if len(modifiers) > 1 and not settings.modifier:
        raise DataError(
            f"{path.name}: profiles of {', '.join(modifiers)}; expected one modifier. Next: say which in columns.toml "
            f"beside the file: modifier = '{modifiers[0]}'."
        )
    kept = [row for row in rows if settings.modifier in ("", row["dataset_name"])]
    numbers: dict[str, Any] = dict.fromkeys(("reactivity", "reactivity_error"), pl.List(pl.Float64))
    return pl.DataFrame(kept, schema_overrides=numbers | {"signal_to_noise": pl.Float64}, infer_schema_length=None)


def _read_records(path: Path) -> pl.DataFrame:
    """JSON lines; text in a list of numbers is refused, but for what says that nothing was measured."""
    records = []
    for row, record in read_json_lines(path, path.name.partition(".")[0]):
        record[ROW] = row
        for name, cell in record.items():
            if isinstance(cell, list) and any(isinstance(value, int | float) for value in cell):
                record[name] = [_number(value, f"{path.name}: row {row:,}: {name}") for value in cell]
        records.append(record)
    try:
        return pl.DataFrame(records, infer_schema_length=None, strict=False)
    except (pl.exceptions.PolarsError, TypeError, ValueError) as err:
        told = " ".join(str(err).split())[:160]
        raise DataError(f"{path.name}: rows hold different things under one name: {told}. {REPAIR}") from err


def _number(value: Any, where: str) -> float | None:
    if value is None or (isinstance(value, str) and value.strip().lower() in MISSING):
        return None
    if not isinstance(value, int | float):
        raise DataError(f"{where} holds {str(value)[:40]!r}; expected a number. {REPAIR}")
    return float(value)
