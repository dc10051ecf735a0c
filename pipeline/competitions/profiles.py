"""Any set of RNA or DNA with numbers per nucleotide: chemical mapping, scores of any kind, paired or unpaired.

RAW is a folder with ``train`` and perhaps ``test`` and ``sample_submission``, the training file itself, or a folder of
RDAT files. A target is a column whose cells are lists (parquet, JSON lines, or text such as ``[0.1, null, 0.3]`` or
``0.1 0.2`` in CSV and TSV), columns that are numbered from 1 (``reactivity_0001`` …), or a dot-bracket structure, which
becomes ``unpaired`` (1 = unpaired, 0 = paired). Columns are found by themselves; ``columns.toml`` in the same folder
says otherwise, see `Settings`. What cannot be read is refused in one sentence.

The signal to noise that weighs a profile's loss is the mean of its values over the mean of their errors, as Ribonanza's
organisers define it, where no column says it.
"""

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.compute as pc

from pipeline.competitions.base import Competition, Facts, positions_that_count
from pipeline.competitions.openvaccine import check_sample
from pipeline.competitions.profile_columns import (
    MISSING,
    Rows,
    Source,
    error_source,
    find_targets,
    read_numbers,
    read_values,
)
from pipeline.competitions.raw import read_json_lines, replace_odd_letters
from pipeline.competitions.rdat import read_rdat
from pipeline.competitions.sequence_files import (
    FASTA,
    column_names,
    ending,
    open_text,
    read_fasta,
    read_table,
    read_told,
    tables_in,
)
from pipeline.competitions.sequence_files import raw_files as find_files
from pipeline.competitions.sequence_rows import one_row_an_id, tell_lengths, total_of, with_ids
from pipeline.competitions.wide import normalise_sequences
from pipeline.errors import DataError
from pipeline.paths import Paths, how_to_make
from pipeline.runlog import warn
from pipeline.schema import ALPHABET, ODD_LETTER_AS
from pipeline.tables import as_lists

_JSON = (".json", ".jsonl", ".ndjson")
_RDAT = ".rdat"
_ENDINGS = (".csv", ".tsv", ".txt", ".parquet", *_JSON, _RDAT, *FASTA)
#: Role -> names that its column usually has, in small letters.
_USUAL = {
    "id": ("id", "sequence_id", "seq_id", "name", "identifier", "accession"),
    "sequence": ("sequence", "seq", "rna", "dna", "rna_sequence", "dna_sequence"),
    "group": ("group",),
    "dataset": ("dataset_name", "dataset"),
    "signal_to_noise": ("signal_to_noise",),
    "passes": ("sn_filter",),
    "first": ("first_pos", "first_position"),
    "measured": ("seq_scored",),
}
_TAKEN = {"sequence_id", "sequence", "dataset_name", "group", "passes", "scored", "teaches", "fold", "id_seqpos"}
_MAX_ODD = 0.05  # share of training rows with other letters, which are left out, from which a table is refused
_HAS, _HAS_NOT = ("1", "1.0", "true"), ("0", "0.0", "false")
_PARQUET: dict[str, Any] = {"compression": "zstd", "row_group_size": 1 << 12}
_NEXT = "Next: repair that row, or remove it."


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


# --- what the data say ---


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
        prediction_LC: [L, C] float.
        truth_LC: [L, C] float, NaN = not measured; clipped to the range, if there is one.
        targets: names, for messages.
        target_range: least and largest truth.
        power: of the errors.

    Raises:
        DataError, ValueError: see `positions_that_count`.

    >>> truth = np.array([[2.0], [np.nan], [0.5]])
    >>> error_sums(np.zeros((3, 1)), truth, targets=("a",), target_range=(0, 1), power=2)
    (array([1.25]), array([2]))
    """
    counted_L = positions_that_count(prediction_LC, truth_LC, targets=targets)
    truth = truth_LC[counted_L].astype(np.float64)
    truth = truth if target_range is None else np.clip(truth, *target_range)
    sums_C = (np.abs(prediction_LC[counted_L] - truth) ** power).sum(axis=0)
    return sums_C, np.full(sums_C.shape, counted_L.sum(), dtype=np.int64)


def score(sums_C: np.ndarray, counts_C: np.ndarray, *, power: int) -> float:
    """Mean over the targets of their errors; NaN if no position counts.

    >>> score(np.array([4.0, 36.0]), np.array([4, 4]), power=2)
    2.0
    """
    if not np.all(counts_C):
        return math.nan
    return float(np.mean((np.asarray(sums_C, dtype=np.float64) / counts_C) ** (1 / power)))


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
            "shown_range": one["shown_range"],
            "signal_to_noise": one["signal_to_noise"],
        }
    except (pl.exceptions.PolarsError, OSError, KeyError) as err:
        raise DataError(f"{path}: not what the data stage writes ({err}). Next: {how_to_make(path)}.") from err


def apply_facts(competition: Competition, facts: Facts) -> Competition:
    """The competition with the targets, metric and range of its data."""
    targets = tuple(facts["targets"])
    power: Literal[1, 2] = 2 if facts["metric"] == "RMSE" else 1
    within = None if facts["range"] is None else (facts["range"][0], facts["range"][1])
    return replace(
        competition,
        targets=targets,
        metric=facts["metric"],
        error_power=power,
        target_range=within,
        shown_range=tuple(facts["shown_range"]),
        signal_to_noise=tuple(map(_signal_column, targets)) if facts["signal_to_noise"] else None,
        error_sums=partial(error_sums, targets=targets, target_range=within, power=power),
        score=partial(score, power=power),
    )


def _signal_column(target: str) -> str:
    return f"signal_to_noise_{target}"


# --- raw files ---


def raw_files(raw: Path) -> dict[str, Path]:
    """``train``, and ``test``, ``sample`` and ``columns`` where they are; RDAT files alone as ``train/<name>``.

    Raises:
        DataError: no training file, or several.
    """
    if raw.is_dir() and (found := _only_rdat(raw)):
        columns = raw / "columns.toml"
        return {f"train/{path.name}": path for path in found} | ({"columns": columns} if columns.is_file() else {})
    return find_files(raw, endings=_ENDINGS)


def _only_rdat(raw: Path) -> list[Path]:
    """RDAT files of a folder without other tables, where none is called train."""
    tables = tables_in(raw, _ENDINGS)
    is_rdat = all(ending(path) == _RDAT for path in tables)
    return tables if is_rdat and not any(path.name.partition(".")[0] == "train" for path in tables) else []


_ROW, _FILE, _SEQUENCE = " row", " file", " sequence"  # beside a table's own columns, none of which is called so


def _read(files: Mapping[str, Path], table: str, settings: Settings) -> pl.DataFrame:
    """All columns of a table, its rows numbered from 1, with their file."""
    found = [path for label, path in sorted(files.items()) if label.partition("/")[0] == table]
    frames = [
        frame.with_columns(pl.lit(path.name).alias(_FILE)).with_row_index(_ROW, offset=1)
        for path in found
        if (frame := _read_file(path, settings)).height
    ]
    if not frames:
        raise DataError(f"{found[0].name}: no sequence in it. Next: check the file.")
    return pl.concat(frames)


def _read_file(path: Path, settings: Settings) -> pl.DataFrame:
    kind = ending(path)
    if kind in FASTA:
        return read_fasta(path, labelled=False).select("id", "sequence")
    if kind == _RDAT:
        return _read_rdat(path, settings)
    if kind in _JSON:
        return _read_records(path)
    names = column_names(path)
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise DataError(f"{path.name}: column {twice[0]!r} is there twice; expected it once. Next: remove one.")
    return read_table(path, names)


def _read_rdat(path: Path, settings: Settings) -> pl.DataFrame:
    with open_text(path) as lines:
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
        for name, cell in record.items():
            if isinstance(cell, list) and any(isinstance(value, int | float) for value in cell):
                record[name] = [_number(value, f"{path.name}: row {row:,}: {name}") for value in cell]
        records.append(record)
    try:
        return pl.DataFrame(records, infer_schema_length=None, strict=False)
    except (pl.exceptions.PolarsError, TypeError, ValueError) as err:
        told = " ".join(str(err).split())[:160]
        raise DataError(f"{path.name}: rows hold different things under one name: {told}. {_NEXT}") from err


def _number(value: Any, where: str) -> float | None:
    if value is None or (isinstance(value, str) and value.strip().lower() in MISSING):
        return None
    if not isinstance(value, int | float):
        raise DataError(f"{where} holds {str(value)[:40]!r}; expected a number. {_NEXT}")
    return float(value)


# --- clean tables ---


def clean(files: dict[str, Path], parts: dict[str, Path]) -> dict[str, Any]:
    """Write the tables that `parts` asks for; the facts are the validation report.

    A test set without ``train`` is one that is read alone, by a notebook that a competition runs again.

    - train: as every competition's, with ``signal_to_noise_<target>`` and ``SN_filter_<target>`` where the files say
      how good a profile is. ``scored`` are rows that pass ``SN_filter``, if there is one, and have a position where
      all targets were measured. Rows with other letters than A, C, G, U, T, or without any value, are left out;
    - profiles: a row for each target, and what `read_facts` reads;
    - test: in the order of the file.

    Raises:
        DataError: a raw file is not what it should be.
    """
    settings, hidden = _settings(files.get("columns")), "train" not in parts
    facts: dict[str, Any] = {}
    if "train" in parts:
        train, told, facts = _train(_read(files, "train", settings), settings)
        if "sample" in files:
            told["targets"] = _sample_order(files["sample"], told["targets"])
        train.write_parquet(parts["train"], **_PARQUET)
        _write_facts(parts["profiles"], told)
    if "test" in parts:
        test = _test(_read(files, "test", settings), settings, hidden=hidden)
        test.write_parquet(parts["test"], **_PARQUET)
        facts["test"] = {"sequences": test.height, "positions": total_of(test["sequence"].str.len_bytes())}
        if "train" in parts:
            facts["test"]["copies_of_train"] = int(test["sequence"].is_in(train["sequence"].to_list()).sum())
        if "sample" in files and not hidden:
            rows = test.select("sequence_id", "sequence").to_dicts()
            facts["test"]["sample_submission_rows"] = check_sample(files["sample"], rows, targets=told["targets"])
        facts["test"]["lengths"] = tell_lengths(test["sequence"])
    said = {name: value for name, value in asdict(settings).items() if value != getattr(Settings(), name)}
    return facts | ({"columns": said} if said else {})


def _settings(path: Path | None) -> Settings:
    settings = Settings(**read_told(path, Settings))
    if settings.metric not in ("MAE", "RMSE"):
        raise DataError(f"{path}: metric = {settings.metric!r}. Next: write 'MAE' or 'RMSE'.")
    if settings.range and not (len(settings.range) == 2 and settings.range[0] < settings.range[1]):
        raise DataError(f"{path}: range = {settings.range}; expected two rising numbers. Next: range = [0, 1].")
    return settings


def _write_facts(path: Path, told: Mapping[str, Any]) -> None:
    one = {name: told[name] for name in ("metric", "range", "shown_range", "signal_to_noise")}
    types = {"range": pl.List(pl.Float64), "shown_range": pl.List(pl.Float64)}
    pl.DataFrame([{"target": target} | one for target in told["targets"]], schema_overrides=types).write_parquet(path)


def _sample_order(path: Path, targets: Sequence[str]) -> list[str]:
    """Targets in the order of the sample submission's columns."""
    names = column_names(path)
    if names[:1] != ["id_seqpos"] or sorted(names[1:]) != sorted(targets):
        raise DataError(
            f"{path.name}: columns {', '.join(names[:6])}; expected id_seqpos and {', '.join(targets)}. Next: name the "
            "targets in columns.toml as the sample does, or leave the sample out."
        )
    return names[1:]


def _train(frame: pl.DataFrame, settings: Settings) -> tuple[pl.DataFrame, dict[str, Any], dict[str, Any]]:
    """The clean train table, what the competition is told of it, and the validation report."""
    where, count = frame[_FILE][0], frame.height
    roles = _choose_columns(frame, settings, where=where)
    frame = _letters(frame, roles)
    rows = Rows(
        where=_where(frame, roles),
        lengths_N=frame[_SEQUENCE].str.len_bytes().to_numpy().astype(np.int64),
        first_N=_numbers_of(frame, roles, "first"),
        measured_N=_numbers_of(frame, roles, "measured"),
    )
    values = frame.drop({*roles.values(), _ROW, _FILE, _SEQUENCE})
    sources = find_targets(values, rows, told=settings.targets, where=where)
    if taken := sorted(_TAKEN & set(sources)):
        raise DataError(f"{where}: a target is called {taken[0]!r}; tables have another such column. Next: rename it.")
    profiles_TC = np.stack([read_values(values, source, rows) for source in sources.values()], axis=1)
    signals = _signals(frame, values, roles, sources, profiles_TC, rows)
    said_N, counted_N = _per_row(~np.isnan(profiles_TC), rows.lengths_N)
    table = _described(frame, roles, rows).with_columns(
        *(
            pl.Series(target, as_lists(profiles_TC[:, c], rows.lengths_N)).list.eval(pl.element().fill_nan(None))
            for c, target in enumerate(sources)
        ),
        *signals,
        (pl.col("passes") & pl.Series(counted_N)).alias("scored"),
    )
    table = _each_once(table.filter(pl.Series(said_N)), where=where)
    table, quality = _weighed(table, list(sources))
    _require_scored(table, profiles_TC, list(sources), where=where)
    told = {
        "targets": list(sources),
        "metric": settings.metric,
        "range": [float(edge) for edge in settings.range] or None,
        "shown_range": settings.range or _shown_range(profiles_TC),
        "signal_to_noise": bool(quality),
    }
    facts: dict[str, Any] = {
        "rows": count,
        "sequences": table.height,
        "scored": int(table["scored"].sum()),
        "left out": {"other letters": count - frame.height, "no value": int((~said_N).sum())},
        "targets": {target: _tell(profiles_TC[:, c]) for c, target in enumerate(sources)},
    }
    return table, told, facts | quality | {"lengths": tell_lengths(table["sequence"])}


def _require_scored(table: pl.DataFrame, profiles_TC: np.ndarray, targets: Sequence[str], *, where: str) -> None:
    """DataError where nothing counts, as targets were measured of different molecules; a warning where little does."""
    if not table["scored"].any():
        raise DataError(
            f"{where}: no scored position with a value of {' and '.join(targets)}; expected some. Next: give each "
            "a set of its own (targets = ['<one>'] in columns.toml), if no molecule has them all."
        )
    measured_TC = ~np.isnan(profiles_TC)
    share = measured_TC[measured_TC.all(axis=1)].sum() / measured_TC.sum()
    if share < 0.5:
        warn(f"{where}: only {share:.0%} of the measured values count: all targets must be measured at a position")


def _per_row(measured_TC: np.ndarray, lengths_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[N] bool: any value at all; any position where all targets were measured."""
    starts_N = np.cumsum(lengths_N) - lengths_N
    any_T, all_T = measured_TC.any(axis=1), measured_TC.all(axis=1)
    return np.logical_or.reduceat(any_T, starts_N), np.logical_or.reduceat(all_T, starts_N)


def _choose_columns(
    frame: pl.DataFrame, settings: Settings, *, where: str, roles: Iterable[str] = _USUAL
) -> dict[str, str]:
    """Role -> column, of those roles that are asked for."""
    chosen: dict[str, str] = {}
    names = [name for name in frame.columns if name not in (_ROW, _FILE)]
    for role in roles:
        usual = _USUAL[role]
        told = getattr(settings, role, "")
        found = [told] if told else [name for name in names if name.strip().lower() in usual]
        if told and told not in names:
            raise DataError(f"{where}: no column {told!r}, which columns.toml names. Next: correct it there.")
        if len(found) > 1 or (not found and role == "sequence"):
            may = (
                f"{' and '.join(found)} may each be" if found else f"no column is called {', '.join(usual[:3])} …, for"
            )
            raise DataError(
                f"{where}: {may} the {role}; found {', '.join(names[:12])}{' …' if len(names) > 12 else ''}. Next: say "
                f"which in columns.toml beside the file: {role} = '{found[0] if found else '<column>'}'."
            )
        chosen |= {role: found[0]} if found else {}
    return chosen


def _letters(frame: pl.DataFrame, roles: Mapping[str, str]) -> pl.DataFrame:
    """Rows with sequences of A, C, G, U alone, as ``_SEQUENCE``; a few others are left out."""
    column = frame[roles["sequence"]]
    if column.dtype != pl.String:
        raise DataError(
            f"{frame[_FILE][0]}: column {column.name} is {column.dtype}; expected letters. Next: correct it."
        )
    text = column.fill_null("").str.strip_chars().str.to_uppercase().str.replace_all("T", "U").alias(_SEQUENCE)
    frame, is_clean = frame.with_columns(text), text.str.contains(f"^[{ALPHABET}]+$")
    odd = frame.filter(~is_clean)
    if odd.height:
        sign = odd[_SEQUENCE].str.replace_all(f"[{ALPHABET}]", "")[0][:1]
        what = f"{_where(odd, roles)[0]}: {f'letter {sign!r}' if sign else 'an empty sequence'}; {odd.height:,} of "
        what += f"{frame.height:,} rows are such"
        if odd.height > _MAX_ODD * frame.height:
            raise DataError(f"{what}, expected at most {_MAX_ODD:.0%}. {_NEXT}")
        warn(f"{what}, and are left out")
    return frame.filter(is_clean)


def _where(frame: pl.DataFrame, roles: Mapping[str, str]) -> list[str]:
    """Place of each row, for messages."""
    ids = frame[roles["id"]].to_list() if "id" in roles else [""] * frame.height
    rows = zip(frame[_FILE].to_list(), frame[_ROW].to_list(), ids, strict=True)
    return [f"{file}: row {row:,}" + (f" (id {name})" if name else "") for file, row, name in rows]


def _numbers_of(frame: pl.DataFrame, roles: Mapping[str, str], role: str) -> np.ndarray:
    """[N] float64 of a role's column, NaN where it says nothing or there is none."""
    if role not in roles:
        return np.full(frame.height, np.nan)
    return read_numbers(frame[roles[role]], _where(frame, roles), roles[role])


def _described(frame: pl.DataFrame, roles: Mapping[str, str], rows: Rows) -> pl.DataFrame:
    """``sequence_id, sequence, dataset_name, group, passes``."""
    passes = pl.Series("passes", np.ones(frame.height, dtype=bool))
    if "passes" in roles:
        text = frame[roles["passes"]].cast(pl.String).str.strip_chars().str.to_lowercase()
        odd = ~text.is_in([*_HAS, *_HAS_NOT]).fill_null(False)
        if odd.any():
            at = int(odd.arg_max() or 0)
            raise DataError(f"{rows.where[at]}: {roles['passes']} holds {text[at]!r}; expected 0 or 1. {_NEXT}")
        passes = text.is_in(_HAS).alias("passes")
    texts = {name: frame[roles[role]].cast(pl.String) for name, role in _TEXTS.items() if role in roles}
    return pl.DataFrame(
        {
            "sequence_id": _ids(frame, roles),
            "sequence": frame[_SEQUENCE],
            "dataset_name": texts.get("dataset_name", pl.Series(["train"] * frame.height)).fill_null(""),
            "group": texts.get("group", pl.Series([None] * frame.height, dtype=pl.String)).replace("", None),
            "passes": passes,
        }
    )


_TEXTS = {"dataset_name": "dataset", "group": "group"}


def _ids(frame: pl.DataFrame, roles: Mapping[str, str]) -> pl.Series:
    """Ids as text; numbered rows where there are none."""
    if "id" in roles:
        ids = frame[roles["id"]].cast(pl.String).str.strip_chars()
        lost = ids.fill_null("") == ""
        if lost.any():
            raise DataError(f"{_where(frame, {})[int(lost.arg_max() or 0)]}: no id. Next: give the row one.")
        return ids
    number = frame[_ROW].cast(pl.String).str.zfill(len(str(frame[_ROW].max())))
    return pl.Series(["train-"]) + number


def _each_once(table: pl.DataFrame, *, where: str) -> pl.DataFrame:
    """Rows sorted by id, one of several that are the same in all."""
    table = table.unique(maintain_order=True).sort("sequence_id", maintain_order=True)
    again = table.filter(pl.col("sequence_id").is_duplicated())
    if again.height:
        name = again["sequence_id"][0]
        kinds = again.filter(pl.col("sequence_id") == name)["sequence"].n_unique()
        raise DataError(
            f"{where}: id {name} comes again with {'another sequence' if kinds > 1 else 'other values'}; expected each "
            "once. Next: give every profile an id of its own; profiles of one sequence stay in one fold."
        )
    return table


def _signals(
    frame: pl.DataFrame,
    values: pl.DataFrame,
    roles: Mapping[str, str],
    sources: Mapping[str, Source],
    profiles_TC: np.ndarray,
    rows: Rows,
) -> list[pl.Series]:
    """``signal_to_noise_<target>`` of each row and target, null where nothing says it."""
    starts_N = np.cumsum(rows.lengths_N) - rows.lengths_N
    common_N = _numbers_of(frame, roles, "signal_to_noise")
    columns = []
    for place, target in enumerate(sources):
        own = _signal_column(target)
        told_N = _numbers_of(frame, {**roles, "own": own}, "own") if own in frame.columns else common_N
        errors = error_source(values, target)
        if errors:
            both_T = np.stack([profiles_TC[:, place], read_values(values, errors, rows)])
            both_T[:, np.isnan(both_T).any(axis=0)] = 0.0
            value_N, error_N = np.add.reduceat(both_T.astype(np.float64), starts_N, axis=1)
            with np.errstate(divide="ignore", invalid="ignore"):
                told_N = np.where(np.isnan(told_N) & (error_N > 0), value_N / error_N, told_N)
        columns.append(pl.Series(own, told_N.astype(np.float32)).fill_nan(None))
    return columns


def _weighed(table: pl.DataFrame, targets: Sequence[str]) -> tuple[pl.DataFrame, dict[str, Any]]:
    """Add ``SN_filter_<target>``, and the median where quality is not known; what there is to report of it.

    Without any quality that is known there are no such columns, and nothing to report.
    """
    names = {target: _signal_column(target) for target in targets}
    has = {target: pl.col(target).list.drop_nulls().list.len() > 0 for target in targets}
    table = table.with_columns(pl.when(has[target]).then(pl.col(name)).alias(name) for target, name in names.items())
    known = pl.concat([table[name] for name in names.values()]).drop_nulls()
    if not known.len():
        return table.drop(*names.values(), "passes"), {}
    median = known.median()
    unknown = sum(
        int(table.select((has[target] & pl.col(name).is_null()).sum()).item()) for target, name in names.items()
    )
    table = table.with_columns(
        pl.when(has[target]).then(pl.col(name).fill_null(median)).alias(name) for target, name in names.items()
    )
    passes = [(pl.col("passes") & has[target]).alias(f"SN_filter_{target}") for target in targets]
    quality = {"median": round(float(median), 3), "not known, taken for the median": unknown}  # type: ignore[arg-type]
    return table.with_columns(passes).drop("passes"), {"signal_to_noise": quality}


def _shown_range(profiles_TC: np.ndarray) -> list[float]:
    """Edges of figures: the middle 98 % of all values, to a half of its power of ten."""
    low, high = np.nanquantile(profiles_TC, (0.01, 0.99))
    if low == high:
        return [float(low), float(high) + 1.0]
    step = 10 ** math.floor(math.log10(high - low)) / 2
    return [math.floor(low / step) * step, math.ceil(high / step) * step]


def _tell(values_T: np.ndarray) -> dict[str, Any]:
    known = values_T[~np.isnan(values_T)]
    if not known.size:
        return {"measured": 0}
    edges = [float(f"{edge:.4g}") for edge in np.quantile(known, (0.0, 0.01, 0.5, 0.99, 1.0))]
    said = {"measured": known.size, "null_share": round(1 - known.size / values_T.size, 4)}
    return said | dict(zip(("min", "q01", "median", "q99", "max"), edges, strict=True))


def _test(frame: pl.DataFrame, settings: Settings, *, hidden: bool) -> pl.DataFrame:
    """The clean test table. Of a hidden set rows without an id are numbered, and an id that comes again counts once."""
    where = frame[_FILE][0]
    roles = _choose_columns(frame, settings, where=where, roles=("id", "sequence"))  # the rest is of training
    texts = frame[roles["sequence"]].cast(pl.String).fill_null("").alias("sequence")
    table = pl.DataFrame({"row": frame[_ROW], "where": frame[_FILE], "sequence": texts})
    table = table.with_columns(frame[roles["id"]].cast(pl.String).alias("id")) if "id" in roles else table
    table = with_ids(one_row_an_id(table) if hidden else table, "test", may_repeat=False)
    letters = table["sequence"].to_arrow().cast(pa.string())
    if hidden:
        letters = replace_odd_letters(letters, where=where)
        letters = pc.if_else(pc.equal(letters, ""), ODD_LETTER_AS, letters)
    ids = table["sequence_id"].to_arrow().cast(pa.string())
    read = normalise_sequences(letters, ids, where=where, first_row=1)
    table = table.with_columns(pl.Series("sequence", read))
    length = pl.col("sequence").str.len_bytes().cast(pl.Int64)
    last = length.cum_sum() - 1
    return table.select("sequence_id", "sequence", (last - length + 1).alias("id_min"), last.alias("id_max"))


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
    raw_files=raw_files,
    clean=clean,
    test_inputs=("test", "sample", "columns"),
    test_tables=("test",),
    read_facts=read_facts,
    apply_facts=apply_facts,
)
