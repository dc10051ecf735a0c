"""What every table of sequences goes through, whatever is known of them: letters, ids, duplicates."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import polars as pl

from pipeline.competitions.sequence_files import Settings
from pipeline.competitions.table_files import NUCLEOTIDE
from pipeline.errors import DataError
from pipeline.labels import letters_of, unknown_letter
from pipeline.runlog import amount, warn
from pipeline.schema import ALPHABET, AMINO_ACIDS

#: What a cell that says nothing may hold, in small letters.
UNSAID = ("nan", "na", "n/a", "none", "null", "?")

_NUCLEIC_FROM, _PROTEIN_BELOW = 0.9, 0.6  # share of nucleotides' letters; proteins have about a quarter
_USUAL_SETTINGS = Settings()


def choose_letters(frames: Sequence[pl.DataFrame], settings: Settings) -> str:
    """`ALPHABET` or `AMINO_ACIDS`, whichever the sequences are written in."""
    if settings.alphabet:
        return ALPHABET if settings.alphabet == "nucleotides" else AMINO_ACIDS
    text = pl.concat([frame["sequence"] for frame in frames])
    total, nucleotides = (total_of(text.str.count_matches(sign)) for sign in ("[A-Za-z]", NUCLEOTIDE))
    share = nucleotides / max(total, 1)
    if _PROTEIN_BELOW < share < _NUCLEIC_FROM or not total:
        raise DataError(
            f"{frames[0]['where'][0]}: {share:.0%} of the letters are A, C, G, T, U or N; expected {_NUCLEIC_FROM:.0%} "
            f"or more in RNA and DNA, less than {_PROTEIN_BELOW:.0%} in proteins. Next: check the column, or say "
            "alphabet = 'nucleotides' or 'amino acids' in columns.toml."
        )
    return ALPHABET if share >= _NUCLEIC_FROM else AMINO_ACIDS


def normalise(
    frame: pl.DataFrame, letters: str, settings: Settings, *, hidden: bool = False
) -> tuple[pl.DataFrame, dict[str, int]]:
    """Sequences in the letters and what odd ones are read as; how many were odd, and how many gaps were removed.

    Of a hidden set, signs that are no letters are odd letters, and so is a sequence without any: it becomes one.
    """
    raw = pl.col("sequence").fill_null("").str.strip_chars().str.to_uppercase()
    frame = frame.with_columns(raw.str.replace_all(r"[-.~\s]", "").alias("text"), raw.str.len_chars().alias("before"))
    if letters == AMINO_ACIDS:
        frame = frame.with_columns(pl.col("text").str.strip_suffix("*"))
    else:
        frame = frame.with_columns(pl.col("text").str.replace_all("T", "U"))
    wrong = frame.filter(pl.col("text").str.contains("[^A-Z]") | (pl.col("text") == ""))
    if wrong.height and not hidden:
        row = wrong.row(0, named=True)
        sign = re.search("[^A-Z]", row["text"])
        what = f"{sign.group()!r} in the sequence" if sign else "empty sequence"
        raise DataError(f"{spot(row)}: {what}; expected letters. Next: repair the sequence, or leave it out.")
    gaps = total_of(frame["before"]) - total_of(frame["text"].str.len_chars())
    if wrong.height:
        warn(f"{frame['where'][0]}: {amount(wrong.height, 'sequence')} with other signs than letters, or nothing")
        letter = pl.col("text").str.replace_all("[^A-Z]", unknown_letter(letters))
        frame = frame.with_columns(
            pl.when(letter == "").then(pl.lit(unknown_letter(letters))).otherwise(letter).alias("text")
        )
    odd, text = f"[^{letters}]", pl.col("text").str
    frame = frame.with_columns(
        text.count_matches(odd).alias("odd"), text.replace_all(odd, unknown_letter(letters)).alias("sequence")
    )
    total, odd_letters = total_of(frame["text"].str.len_bytes()), total_of(frame["odd"])
    if odd_letters > settings.max_odd * total and not hidden:
        row = frame.sort("odd", descending=True).row(0, named=True)
        most = f" (most in {spot(row)}, {row['odd']} of {len(row['text'])})" if frame.height > 1 else ""
        cure = "" if row["row"] is None else ", or raise max_odd in columns.toml beside the file"
        raise DataError(
            f"{row['where']}: {odd_letters / total:.1%} of the letters are none of {tell_alphabet(letters)}{most}; "
            f"expected at most {settings.max_odd:.0%}. Next: repair the sequences{cure}."
        )
    counts = {"odd": odd_letters, "sequences": int((frame["odd"] > 0).sum()), "gaps": gaps}
    return frame.drop("text", "before", "odd"), counts


def warn_of_unknown(test: pl.DataFrame, alphabet: str) -> None:
    """Say where letters of a test set say nothing, as no training sequence had any such."""
    unknown = unknown_letter(alphabet)
    odd = test["sequence"].str.count_matches(unknown, literal=True)
    rows = int((odd > 0).sum())
    if unknown not in alphabet and rows:
        warn(
            f"{test['where'][0]}: {amount(total_of(odd), 'letter')} other than {alphabet} in "
            f"{amount(rows, 'sequence')}; no training sequence has such letters, so they say nothing"
        )


def known_letters(
    frame: pl.DataFrame, alphabet: str, settings: Settings = _USUAL_SETTINGS
) -> tuple[pl.DataFrame, dict[str, int]]:
    """`normalise` for a network that reads these letters: where it knows no unknown letter, odd ones are refused.

    Raises:
        DataError: other signs than letters, nothing, or odd letters, more than `settings` allow.
    """
    letters, unknown = letters_of(alphabet), unknown_letter(alphabet)
    if unknown in alphabet:
        return normalise(frame, letters, settings)
    frame, counts = normalise(frame, letters, replace(settings, max_odd=1.0))
    if counts["odd"]:
        row = frame.filter(pl.col("sequence").str.contains(unknown, literal=True)).row(0, named=True)
        raise DataError(
            f"{spot(row)}: {amount(row['sequence'].count(unknown), 'letter')} other than {tell_alphabet(letters)}, and "
            "the network was trained on those alone. Next: repair the sequence, or leave it out."
        )
    return frame, counts


def tell_alphabet(letters: str) -> str:
    return f"{letters} (T is read as U)" if letters == ALPHABET else letters


def spot(row: Mapping[str, Any]) -> str:
    """Place of a row, for messages; a sequence of no file has no row."""
    if row["row"] is None:
        return str(row["where"])
    named = f" (id {row['id']})" if row.get("id") else ""
    return f"{row['where']}: row {row['row']}{named}"


def tell_letters(letters: str, odd: Mapping[str, int]) -> dict[str, Any]:
    kind = "RNA or DNA" if letters == ALPHABET else "protein"
    found = {f"odd, read as {unknown_letter(letters)}": odd["odd"], "sequences with odd ones": odd["sequences"]}
    return {"kind": kind} | found | {"gaps removed": odd["gaps"]}


def total_of(counts: pl.Series) -> int:
    """The sum of numbers of 32 bits, which polars gives in 32 bits.

    >>> total_of(pl.Series([1 << 31, 1 << 31], dtype=pl.UInt32))
    4294967296
    """
    return int(counts.cast(pl.Int64).sum())


def one_row_an_id(frame: pl.DataFrame) -> pl.DataFrame:
    """Number the rows of a hidden test set that have no id; of rows that share one, keep the first."""
    if "id" not in frame.columns:
        return frame
    number = pl.lit("row-") + pl.col("row").cast(pl.String)
    named = frame.with_columns(pl.when(pl.col("id").fill_null("") == "").then(number).otherwise("id").alias("id"))
    kept = named.unique("id", keep="first", maintain_order=True)
    changed = int((named["id"] != frame["id"].fill_null("")).sum()) + named.height - kept.height
    if changed:
        warn(f"{frame['where'][0]}: {amount(changed, 'row')} without an id, numbered, or with an id again, left out")
    return kept


def with_ids(frame: pl.DataFrame, table: str, *, may_repeat: bool) -> pl.DataFrame:
    """Add ``sequence_id``: the id, with ``-2``, ``-3`` … where it comes again; numbered rows where there are none."""
    if "id" not in frame.columns:
        number = pl.col("row").cast(pl.String).str.zfill(len(str(frame["row"].max())))
        return frame.with_columns((pl.lit(f"{table}-") + number).alias("sequence_id"))
    lost = frame.filter(pl.col("id").fill_null("") == "")
    if lost.height:
        raise DataError(f"{spot(lost.row(0, named=True))}: no id. Next: give the row one, or remove it.")
    again = frame.filter(pl.col("id").is_duplicated())
    if again.height and not may_repeat:
        raise DataError(f"{spot(again.row(1, named=True))}: an id twice; expected each once. Next: repair the file.")
    taken, seen, ids = set(frame["id"]), dict[str, int](), []
    for name in frame["id"]:
        count = seen[name] = seen.get(name, 0) + 1
        while count > 1 and f"{name}-{count}" in taken:
            count += 1
        ids.append(name if count == 1 else f"{name}-{count}")
        taken.add(ids[-1])
    return frame.with_columns(pl.Series("sequence_id", ids))


def train_table(frame: pl.DataFrame, labels: pl.Expr) -> pl.DataFrame:
    """The clean train table, of rows with ``sequence_id``; where `labels` is null, a sequence is not scored."""
    none = pl.lit(None, dtype=pl.String).alias("group")
    return frame.select(
        "sequence_id",
        "sequence",
        pl.lit("train").alias("dataset_name"),
        relatives(frame["group"], where=frame["where"][0]) if "group" in frame.columns else none,
        labels.is_not_null().alias("scored"),
        labels,
    ).sort("sequence_id")


def relatives(groups: pl.Series, *, where: str) -> pl.Series:
    """``group``: names without blanks around them, null = none are known; a warning where a name may say just that."""
    names = groups.str.strip_chars().replace("", None).alias("group")
    unsaid = names.filter(names.str.to_lowercase().is_in(UNSAID))
    if unsaid.len() > 1:
        warn(
            f"{where}: the {unsaid.len():,} sequences of group {unsaid[0]!r} are taken for relatives, which share a "
            "fold. Next, if it means that none are known: empty these cells."
        )
    return names


def duplicates(train: pl.DataFrame, frame: pl.DataFrame, labels: str, *, rows: int) -> dict[str, int]:
    """What came again in a table of so many rows, of which `frame` kept some; `labels`: their column."""
    twice = train.filter(pl.col("sequence").is_duplicated())
    kinds = twice.filter("scored").group_by("sequence").agg(pl.col(labels).n_unique())
    return {
        "rows left out": rows - train.height,
        "ids made unique": int((frame["id"] != frame["sequence_id"]).sum()) if "id" in frame.columns else 0,
        "sequences that come again": train.height - train["sequence"].n_unique(),
        f"sequences with different {labels}": int((kinds[labels] > 1).sum()),
    }
