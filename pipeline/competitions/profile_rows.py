"""What a row of a table of profiles says beside the values: id, sequence, group, data set, quality."""

from collections.abc import Iterable, Mapping

import numpy as np
import polars as pl

from pipeline.competitions.profile_columns import REPAIR, Rows, read_numbers
from pipeline.competitions.profile_files import FILE, IDS, ROW, Settings
from pipeline.competitions.sequence_rows import relatives
from pipeline.competitions.table_files import read_flags, usual_columns
from pipeline.errors import DataError
from pipeline.runlog import warn
from pipeline.schema import ALPHABET

#: Role -> names that its column usually has, in small letters.
_USUAL = {
    "id": IDS,
    "sequence": ("sequence", "seq", "rna", "dna", "rna_sequence", "dna_sequence"),
    "group": ("group",),
    "dataset": ("dataset_name", "dataset"),
    "signal_to_noise": ("signal_to_noise",),
    "passes": ("sn_filter",),
    "first": ("first_pos", "first_position"),
    "measured": ("seq_scored",),
}
_TEXTS = {"dataset_name": "dataset", "group": "group"}  # clean column -> role of text
_MAX_ODD = 0.05  # share of training rows with other letters, which are left out, from which a table is refused
SEQUENCE = " sequence"  #: in letters A, C, G, U, beside the column that it was read from


def choose_columns(
    frame: pl.DataFrame, settings: Settings, *, where: str, roles: Iterable[str] = _USUAL
) -> dict[str, str]:
    """Role -> column, of those roles that are asked for."""
    chosen: dict[str, str] = {}
    names = [name for name in frame.columns if name not in (ROW, FILE)]
    listed = ", ".join(names[:12]) + " …" * (len(names) > 12)
    for role in roles:
        usual = _USUAL[role]
        told = getattr(settings, role, "")
        found = [told] if told else usual_columns(names, usual)
        if told and told not in names:
            raise DataError(f"{where}: no column {told!r}, which columns.toml names; found {listed}. Next: correct it.")
        if len(found) > 1 or (not found and role == "sequence"):
            may = (
                f"{' and '.join(found)} may each be" if found else f"no column is called {', '.join(usual[:3])} …, for"
            )
            raise DataError(
                f"{where}: {may} the {role}; found {listed}. Next: say which in columns.toml beside the file: "
                f"{role} = '{found[0] if found else '<column>'}'."
            )
        chosen |= {role: found[0]} if found else {}
    return chosen


def take_sequences(frame: pl.DataFrame, roles: Mapping[str, str]) -> pl.DataFrame:
    """Rows with sequences of A, C, G, U alone, as ``SEQUENCE``; a few others are left out."""
    column = frame[roles["sequence"]]
    if column.dtype != pl.String:
        raise DataError(
            f"{frame[FILE][0]}: column {column.name} is {column.dtype}; expected letters. Next: correct it."
        )
    text = column.fill_null("").str.strip_chars().str.to_uppercase().str.replace_all("T", "U").alias(SEQUENCE)
    frame, is_clean = frame.with_columns(text), text.str.contains(f"^[{ALPHABET}]+$")
    odd = frame.filter(~is_clean)
    if odd.height:
        sign = odd[SEQUENCE].str.replace_all(f"[{ALPHABET}]", "")[0][:1]
        what = f"{places(odd, roles)[0]}: {f'letter {sign!r}' if sign else 'an empty sequence'}; {odd.height:,} of "
        what += f"{frame.height:,} rows are such"
        if odd.height > _MAX_ODD * frame.height:
            raise DataError(f"{what}, expected at most {_MAX_ODD:.0%}. {REPAIR}")
        warn(f"{what}, and are left out")
    return frame.filter(is_clean)


def places(frame: pl.DataFrame, roles: Mapping[str, str]) -> list[str]:
    """Place of each row, for messages."""
    ids = frame[roles["id"]].to_list() if "id" in roles else [""] * frame.height
    rows = zip(frame[FILE].to_list(), frame[ROW].to_list(), ids, strict=True)
    return [f"{file}: row {row:,}" + (f" (id {name})" if name else "") for file, row, name in rows]


def numbers_of(frame: pl.DataFrame, roles: Mapping[str, str], role: str) -> np.ndarray:
    """[N] float64 of a role's column, NaN where it says nothing or there is none."""
    if role not in roles:
        return np.full(frame.height, np.nan)
    return read_numbers(frame[roles[role]], places(frame, roles), roles[role])


def rows_of(frame: pl.DataFrame, roles: Mapping[str, str], sequences: pl.Series) -> Rows:
    """The rows of a table, whose sequences are given as they were read."""
    return Rows(
        where=places(frame, roles),
        lengths_N=sequences.str.len_bytes().to_numpy().astype(np.int64),
        first_N=numbers_of(frame, roles, "first"),
        measured_N=numbers_of(frame, roles, "measured"),
    )


def describe(frame: pl.DataFrame, roles: Mapping[str, str], rows: Rows) -> pl.DataFrame:
    """``sequence_id, sequence, dataset_name, group, passes``."""
    texts = {name: frame[roles[role]].cast(pl.String) for name, role in _TEXTS.items() if role in roles}
    nothing = pl.Series([None] * frame.height, dtype=pl.String)
    return pl.DataFrame(
        {
            "sequence_id": _ids(frame, roles),
            "sequence": frame[SEQUENCE],
            "dataset_name": texts.get("dataset_name", pl.Series(["train"] * frame.height)).fill_null(""),
            "group": relatives(texts.get("group", nothing), where=frame[FILE][0]),
            "passes": passes_of(frame, roles, rows),
        }
    )


def passes_of(frame: pl.DataFrame, roles: Mapping[str, str], rows: Rows) -> pl.Series:
    """Whether each row passes its ``SN_filter``; all do where there is none."""
    if "passes" not in roles:
        return pl.Series(np.ones(frame.height, dtype=bool))
    column = frame[roles["passes"]].cast(pl.String)
    passes = read_flags(column)
    if passes.null_count():
        at = int(passes.is_null().arg_max() or 0)
        raise DataError(f"{rows.where[at]}: {column.name} holds {column[at]!r}; expected 0 or 1. {REPAIR}")
    return passes


def _ids(frame: pl.DataFrame, roles: Mapping[str, str]) -> pl.Series:
    """Ids as text; numbered rows where there are none."""
    if "id" in roles:
        ids = frame[roles["id"]].cast(pl.String).str.strip_chars()
        lost = ids.fill_null("") == ""
        if lost.any():
            raise DataError(f"{places(frame, {})[int(lost.arg_max() or 0)]}: no id. Next: give the row one.")
        return ids
    number = frame[ROW].cast(pl.String).str.zfill(len(str(frame[ROW].max())))
    return pl.Series(["train-"]) + number


def each_once(table: pl.DataFrame, *, where: str) -> pl.DataFrame:
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
