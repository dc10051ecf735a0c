"""The clean tables of profiles, and what their data say of the competition: targets, quality, range.

The signal to noise that weighs a profile's loss is the mean of its values over the mean of their errors, as Ribonanza's
organisers define it, where no column says it.

Letters: N rows, T = sum of their lengths (nt), C targets.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa

from pipeline.competitions.base import tell_lengths
from pipeline.competitions.profile_columns import Rows, Source, error_source, find_targets, read_values
from pipeline.competitions.profile_files import FILE, ROW, Settings
from pipeline.competitions.profile_rows import (
    SEQUENCE,
    choose_columns,
    describe,
    each_once,
    numbers_of,
    passes_of,
    rows_of,
    take_sequences,
)
from pipeline.competitions.raw import replace_odd_letters
from pipeline.competitions.sequence_rows import one_row_an_id, spot, with_ids
from pipeline.errors import DataError
from pipeline.runlog import warn
from pipeline.schema import ALPHABET, ODD_LETTER_AS, normalise_sequence
from pipeline.tables import as_lists

_TAKEN = {"sequence_id", "sequence", "dataset_name", "group", "passes", "scored", "teaches", "fold", "id_seqpos"}


def clean_train(frame: pl.DataFrame, settings: Settings) -> tuple[pl.DataFrame, dict[str, Any], dict[str, Any]]:
    """The clean train table, what ``clean/profiles.parquet`` keeps of it, and the validation report."""
    where, count = frame[FILE][0], frame.height
    roles = choose_columns(frame, settings, where=where)
    frame = take_sequences(frame, roles)
    rows = rows_of(frame, roles, frame[SEQUENCE])
    values = frame.drop({*roles.values(), ROW, FILE, SEQUENCE})
    sources = find_targets(values, rows, told=settings.targets, where=where)
    if taken := sorted(_TAKEN & set(sources)):
        raise DataError(f"{where}: a target is called {taken[0]!r}; tables have another such column. Next: rename it.")
    profiles_TC = np.stack([read_values(values, source, rows) for source in sources.values()], axis=1)
    signals = _signals(frame, values, roles, sources, profiles_TC, rows)
    said_N, counted_N = _per_row(~np.isnan(profiles_TC), rows.lengths_N)
    table = describe(frame, roles, rows).with_columns(
        *_lists(profiles_TC, list(sources), rows.lengths_N),
        *signals,
        (pl.col("passes") & pl.Series(counted_N)).alias("scored"),
    )
    table = each_once(table.filter(pl.Series(said_N)), where=where)
    table, quality = _weighed(table, list(sources))
    _require_scored(table, profiles_TC, list(sources), where=where)
    _warn_of_constants(profiles_TC, sources, rows, where=where)
    told = {
        "targets": list(sources),
        "metric": settings.metric,
        "range": [float(edge) for edge in settings.range] or None,
        "shown_ranges": {target: settings.range or _shown_range(profiles_TC[:, c]) for c, target in enumerate(sources)},
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


def _lists(profiles_TC: np.ndarray, targets: Sequence[str], lengths_N: np.ndarray) -> list[pl.Series]:
    """Columns of lists, null where not measured."""
    lists = (pl.Series(target, as_lists(profiles_TC[:, c], lengths_N)) for c, target in enumerate(targets))
    return [each.list.eval(pl.element().fill_nan(None)) for each in lists]


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


def _warn_of_constants(profiles_TC: np.ndarray, sources: Mapping[str, Source], rows: Rows, *, where: str) -> None:
    """Say which targets are the same everywhere, and of which others (not of structures) profiles are."""
    starts_N = np.cumsum(rows.lengths_N) - rows.lengths_N
    for (target, source), values_T in zip(sources.items(), profiles_TC.T, strict=True):
        low_N, high_N = np.fmin.reduceat(values_T, starts_N), np.fmax.reduceat(values_T, starts_N)
        several_N = np.add.reduceat(~np.isnan(values_T), starts_N, dtype=np.int64) > 1
        flat = np.flatnonzero((low_N == high_N) & several_N)
        if np.nanmin(low_N) == np.nanmax(high_N):
            warn(f"{where}: {target} is {np.nanmax(high_N):g} wherever it was measured: there is nothing to learn")
        elif flat.size and not source.is_structure:
            first = f"{rows.where[flat[0]]}: {target} is {high_N[flat[0]]:g} throughout"
            them = f"{flat.size:,} of {len(starts_N):,} profiles are such"
            warn(f"{first}; {them}. Next, if their measurement failed: remove them.")


def _per_row(measured_TC: np.ndarray, lengths_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[N] bool: any value at all; any position where all targets were measured."""
    starts_N = np.cumsum(lengths_N) - lengths_N
    any_T, all_T = measured_TC.any(axis=1), measured_TC.all(axis=1)
    return np.logical_or.reduceat(any_T, starts_N), np.logical_or.reduceat(all_T, starts_N)


def signal_column(target: str) -> str:
    """The clean column of a target's signal to noise."""
    return f"signal_to_noise_{target}"


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
    common_N = numbers_of(frame, roles, "signal_to_noise")
    others = values.drop(name for source in sources.values() for name in source.columns)
    columns = []
    for place, target in enumerate(sources):
        own = signal_column(target)
        told_N = numbers_of(frame, {**roles, "own": own}, "own") if own in frame.columns else common_N
        errors = error_source(others, target, rows)
        if errors:
            both_T = np.stack([profiles_TC[:, place], read_values(others, errors, rows)])
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
    names = {target: signal_column(target) for target in targets}
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


def _shown_range(values_T: np.ndarray) -> list[float]:
    """Edges of a target's figures: the middle 98 % of its values, to a half of its power of ten."""
    low, high = np.nanquantile(values_T, (0.01, 0.99))
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


def known_values(
    frame: pl.DataFrame, table: pl.DataFrame, settings: Settings, targets: Sequence[str]
) -> tuple[pl.DataFrame, dict[str, Any]]:
    """A clean test table with the targets where their values are known, and what was found.

    Nothing but the last score ever reads them, by the same rules as of training. Values that cannot be read, or are the
    same everywhere, are passed over.

    Args:
        frame: the raw table.
        table: the clean one, in the same order.
        settings: what ``columns.toml`` says.
        targets: of training.
    """
    where = frame[FILE][0]
    try:
        roles = choose_columns(frame, settings, where=where, roles=("id", "sequence", "passes", "first", "measured"))
        rows = rows_of(frame, roles, table["sequence"])
        values = frame.drop({*roles.values(), ROW, FILE})
        sources = find_targets(values, rows, told=settings.targets, where=where)
    except DataError:  # as of most test sets
        return table, {}
    if lost := sorted(set(targets) - set(sources)):
        return table, {"values": f"not used: no {lost[0]}"} if set(targets) & set(sources) else {}
    try:
        profiles_TC = np.stack([read_values(values, sources[target], rows) for target in targets], axis=1)
        passes_N = passes_of(frame, roles, rows).to_numpy()
    except DataError as err:
        return table, {"values": f"not used: {str(err).partition(';')[0]}"}
    profiles_TC[~np.repeat(passes_N, rows.lengths_N)] = np.nan
    _, counted_N = _per_row(~np.isnan(profiles_TC), rows.lengths_N)
    if not counted_N.any() or not np.nanmax(profiles_TC) > np.nanmin(profiles_TC):
        return table, {"values": "not used: all the same" if counted_N.any() else "not used: none is measured"}
    return table.with_columns(_lists(profiles_TC, targets, rows.lengths_N)), {"measured": int(counted_N.sum())}


def clean_test(frame: pl.DataFrame, settings: Settings, *, hidden: bool) -> pl.DataFrame:
    """The clean test table. Of a hidden set rows without an id are numbered, and an id that comes again counts once."""
    where = frame[FILE][0]
    roles = choose_columns(frame, settings, where=where, roles=("id", "sequence"))  # the rest is of training
    texts = frame[roles["sequence"]].cast(pl.String).fill_null("").alias("sequence")
    table = pl.DataFrame({"row": frame[ROW], "where": frame[FILE], "sequence": texts})
    table = table.with_columns(frame[roles["id"]].cast(pl.String).alias("id")) if "id" in roles else table
    table = with_ids(one_row_an_id(table) if hidden else table, "test", may_repeat=False)
    if hidden:
        letters = replace_odd_letters(table["sequence"].to_arrow().cast(pa.string()), where=where)
        table = table.with_columns(pl.Series("sequence", letters).replace("", ODD_LETTER_AS))
    text = pl.col("sequence").str.strip_chars().str.to_uppercase().str.replace_all("T", "U")
    for row in table.filter(~text.str.contains(f"^[{ALPHABET}]+$")).head(1).iter_rows(named=True):
        normalise_sequence(row["sequence"], where=spot(row))  # which refuses it
    table = table.with_columns(text)
    length = pl.col("sequence").str.len_bytes().cast(pl.Int64)
    last = length.cum_sum() - 1
    return table.select("sequence_id", "sequence", (last - length + 1).alias("id_min"), last.alias("id_max"))
