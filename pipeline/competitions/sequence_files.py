"""Tables of sequences in the files that people have, as they are: which file is which, which column is what.

RAW is a folder with ``train`` and perhaps ``test`` and ``sample_submission``, or the training file itself: CSV, TSV,
parquet or FASTA (``>id label`` or ``>id|label``), text also as ``.gz``; or folders ``train`` and ``test`` with a FASTA
file for each class, or a folder for each class that holds FASTA files or, as GenomicBenchmarks has them, a text file
for each sequence. Columns are found by their usual names; ``columns.toml`` in the same folder says otherwise, see
`Settings`.

Source: Klimentova et al. 2023, GenomicBenchmarks, BMC Genomic Data 24:25 (the folders).
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import polars as pl

from pipeline.competitions import table_files
from pipeline.competitions.columns_toml import read_told
from pipeline.competitions.raw_files import only_one
from pipeline.competitions.table_files import FASTA, ending, read_fasta, refuse_foreign
from pipeline.errors import DataError, did_you_mean
from pipeline.runlog import say

#: Column of the raw table -> names that it usually has, in small letters.
_USUAL = {
    "id": ("id", "sequence_id", "seq_id", "target_id", "name", "identifier", "accession"),
    "sequence": ("sequence", "seq", "rna", "dna", "protein", "rna_sequence", "dna_sequence", "protein_sequence"),
    "label": ("label", "labels", "class", "classes", "target", "family", "category"),
    "group": ("group",),
}
_LABEL_ENDS = ("_label", "_class", "_family")  # of a label's column where none has a usual name
_NUMBER_NAMES = ("value", "y", "efficacy", "efficiency", "activity", "half_life", "tm")  # and where none ends so
ENDINGS = (*table_files.TEXT, ".parquet", *FASTA)
_SAMPLE = "sample_submission"


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What ``columns.toml`` may say; "" = found by itself."""

    id: str = ""  #: column of the ids; without one, rows are numbered
    sequence: str = ""
    label: str = ""
    #: instead of a label's column: columns of 0 and 1, each a class that a sequence has or has not
    classes: list[str] = field(default_factory=list)
    #: or one column or several of measured numbers, an empty cell where there is none
    numbers: list[str] = field(default_factory=list)
    #: label -> the class that it is read as; "" = none
    merge: dict[str, str] = field(default_factory=dict)
    min_count: int = 0  #: classes of fewer training sequences are dropped
    #: group -> classes that are scored together, by name or pattern (`fnmatch`); a class is in the first that fits
    groups: dict[str, list[str]] = field(default_factory=dict)
    group: str = ""  #: column of known relatives, which share a fold
    separator: str = ";"  #: between the labels of one sequence; "" = a cell is one label, whatever it holds
    alphabet: Literal["", "nucleotides", "amino acids"] = ""
    max_odd: float = 0.05  #: share of letters outside the alphabet (N, X, B, …) from which a table is refused


def raw_files(raw: Path, *, endings: Sequence[str] = ENDINGS) -> dict[str, Path]:
    """``train``, and ``test``, ``sample`` and ``columns`` where they are; a folder's files as ``train/<path in it>``.

    Beside a test set there may be no training file, as for a notebook that only predicts.

    Args:
        raw: the folder, or the training file itself.
        endings: of the files that are looked for.

    Raises:
        DataError: no training file, or several.
    """
    if not raw.exists():
        raise DataError(f"RAW={raw}: no such file or folder. Next: give the training file, or the folder that has it.")
    home = raw if raw.is_dir() else raw.parent
    files = {"columns": home / "columns.toml"} if (home / "columns.toml").is_file() else {}
    if raw.is_file():
        refuse_foreign(raw)
        return {"train": raw} | files
    train, test, sample = (_find(raw, stem, endings) for stem in ("train", "test", _SAMPLE))
    train = train or _only_table(raw, endings, needed=test is None)
    files |= {"test": test} if test and test.is_file() else {}
    if sample and not test:
        raise DataError(f"{raw}: {sample.name} and no test set; expected both or none. Next: add test.csv or the like.")
    files |= {"sample": sample} if sample else {}
    for table, path in (("train", train), ("test", test)):
        if path and path.is_dir():
            files |= _class_files(path, table)
    return ({"train": train} if train and train.is_file() else {}) | files


def _find(raw: Path, stem: str, endings: Sequence[str]) -> Path | None:
    """The file or folder of classes that holds a table."""
    found = [path for path in tables_in(raw, endings) if path.name.partition(".")[0] == stem]
    found += [path for path in [raw / stem] if path.is_dir()]
    return only_one(found, raw, stem)


def tables_in(raw: Path, endings: Sequence[str]) -> list[Path]:
    """Files of a folder that may be tables, by name."""
    return [path for path in sorted(raw.glob("[!.]*")) if path.is_file() and ending(path) in endings]


def _only_table(raw: Path, endings: Sequence[str], *, needed: bool) -> Path | None:
    found = [path for path in tables_in(raw, endings) if path.name.partition(".")[0] not in ("test", _SAMPLE)]
    if len(found) == 1:
        return found[0]
    if not (found or needed):
        return None
    others = sorted(path for path in raw.iterdir() if not path.name.startswith("."))
    for path in () if found else others:
        refuse_foreign(path)
    names = ", ".join(path.name for path in (found or others)[:5]) or "nothing of the kind"
    of_classes = (" or folder train/<class>", ", or put a FASTA file for each class into train/")
    of_classes = of_classes if endings is ENDINGS else ("", "")
    raise DataError(
        f"RAW={raw}: no train{', '.join(endings)}{of_classes[0]}; found {names}. "
        f"Next: name the training file train, or give its path as RAW{of_classes[1]}."
    )


def _class_files(folder: Path, table: str) -> dict[str, Path]:
    found = [path for path in folder.glob("[!.]*") if path.is_file() and ending(path) in FASTA]
    found += [path for path in folder.glob("[!.]*/[!.]*") if path.is_file() and ending(path) in (".txt", *FASTA)]
    if not found:
        raise DataError(
            f"{folder}: no <class>.fasta, <class>/*.fasta or <class>/*.txt in it; expected a FASTA file or a folder "
            "for each class. Next: move the files, or give a table train.csv instead."
        )
    return {f"{table}/{path.relative_to(folder)}": path for path in sorted(found)}


def read_settings(path: Path | None, *, of_any_set: bool = False) -> Settings:
    """What ``columns.toml`` says of labels; `of_any_set`: what it says of other things is passed over."""
    told = read_told(path, Settings, passes_over=of_any_set)
    if told.get("alphabet", "") not in ("", "nucleotides", "amino acids"):
        raise DataError(f"{path}: alphabet = {told['alphabet']!r}. Next: write 'nucleotides' or 'amino acids'.")
    if len(given := [name for name in ("label", "classes", "numbers") if told.get(name)]) > 1:
        raise DataError(f"{path}: {' and '.join(given)}; expected one of them. Next: remove the rest.")
    settings = Settings(**told)
    tidies = [name for name in ("merge", "min_count", "groups") if told.get(name)]
    if settings.numbers and tidies:
        raise DataError(f"{path}: {tidies[0]} is for classes, numbers says there are none. Next: remove one of them.")
    if twice := sorted(settings.merge.keys() & settings.merge.values()):
        raise DataError(
            f"{path}: merge: {twice[0]!r} is merged and merged into; expected one of the two. Next: name the class "
            "that each label is in the end."
        )
    if settings.min_count < 0:
        raise DataError(f"{path}: min_count = {settings.min_count}; expected 0 or more. Next: correct that line.")
    return settings


def read_raw(files: Mapping[str, Path], table: str, settings: Settings, *, also: Sequence[str] = ()) -> pl.DataFrame:
    """A table as its file has it.

    Returns:
        ``row`` (from 1, empty ones counted), ``where``, ``sequence``, and what there is of ``id``, ``group``, ``label``
        (text, or lists of text) with ``label_name`` (its column), ``cells`` (of the columns of numbers, lists of text)
        and `also`.
    """
    is_train = table == "train"
    if table in files:
        path, where = files[table], files[table].name
        if ending(path) in FASTA:
            frame = read_fasta(path, labelled=is_train)
        else:
            frame = _read_columns(path, settings, labelled=is_train, also=also)
    else:
        where = f"{table}/"
        frame = _read_folders({label: path for label, path in files.items() if label.startswith(f"{table}/")})
    if not frame.height:
        raise DataError(f"{where}: no sequence in it. Next: check the file.")
    frame = frame if "row" in frame.columns else frame.with_row_index("row", offset=1)
    return frame.with_columns(pl.lit(where).alias("where"))


def _read_columns(path: Path, settings: Settings, *, labelled: bool, also: Sequence[str]) -> pl.DataFrame:
    names = table_files.column_names(path)
    chosen = _choose_columns(names, settings, labelled=labelled, where=path.name)
    chosen |= {name: name for name in also if name in names}
    several = list(dict.fromkeys(settings.classes or settings.numbers))
    several = several if labelled or set(several) <= set(names) else []
    columns = [*chosen.values(), *(name for name in several if name not in chosen.values())]
    is_any_row_one = not (labelled or "id" in chosen)  # of a test set without ids
    table = table_files.read_table(path, columns, blank_lines=not is_any_row_one)
    frame = table.select(pl.col(column).alias(role) for role, column in chosen.items())
    if several and settings.classes:
        try:
            frame = frame.with_columns(_join_flags(table, several, where=path.name))
        except DataError as err:
            if labelled:
                raise
            say(f"{str(err).partition(';')[0]}: its classes are not used")
    is_list = isinstance(frame.schema.get("label"), pl.List)
    kinds = {role: pl.List(pl.String) if is_list and role == "label" else pl.String for role in frame.columns}
    try:
        if several and settings.numbers:
            cells = table.select(pl.concat_list(pl.col(several).cast(pl.String)).alias("cells"))
            frame, kinds = frame.with_columns(cells["cells"]), kinds | {"cells": pl.List(pl.String)}
        frame = frame.cast(kinds)  # type: ignore[arg-type]
    except pl.exceptions.PolarsError as err:
        kinds_found = ", ".join(map(str, table.dtypes))
        raise DataError(
            f"{path.name}: columns {', '.join(table.columns)} are {kinds_found}; expected text. "
            "Next: say which columns are meant in columns.toml beside the file."
        ) from err
    frame = frame if is_any_row_one else table_files.number_rows(frame, "row")
    return frame.with_columns(pl.lit(chosen.get("label", "label")).alias("label_name"))


def _join_flags(table: pl.DataFrame, names: Sequence[str], *, where: str) -> pl.Series:
    """``label``: of each row the names of the columns that hold 1."""
    flags = pl.DataFrame({name: table_files.read_flags(table[name]) for name in names})
    for name in names:
        odd = table[name].cast(pl.String).filter(flags[name].is_null())
        if odd.len():
            raise DataError(
                f"{where}: column {name} holds {odd[0]!r}; expected 0 or 1, being one of columns.toml's classes. "
                "Next: repair that cell, or correct columns.toml."
            )
    held = [pl.when(name).then(pl.lit(name)) for name in names]
    return flags.select(pl.concat_list(held).list.drop_nulls().alias("label"))["label"]


def _choose_columns(names: Sequence[str], settings: Settings, *, labelled: bool, where: str) -> dict[str, str]:
    """Role -> column."""
    chosen: dict[str, str] = {}
    kind, listed = "classes" if settings.classes else "numbers", ", ".join(names[:12]) + " …" * (len(names) > 12)
    if lost := sorted({*settings.classes, *settings.numbers} - set(names) if labelled else ()):
        told = f"no column {lost[0]!r}, one of columns.toml's {kind}; found {listed}.{did_you_mean(lost[0], names)}"
        raise DataError(f"{where}: {told} Next: correct it.")
    for role in _USUAL:
        if role == "label" and (settings.classes or settings.numbers):
            continue
        told = getattr(settings, role)
        found = [told] if told else list(dict.fromkeys(_usual_columns(names, role)))
        if role == "label" and not labelled:  # of a test set they may be there
            chosen |= {role: found[0]} if len(found) == 1 and found[0] in names else {}
            continue
        if role == "group" and not labelled:  # relatives matter where folds are made
            continue
        if told and told not in names:
            raise DataError(f"{where}: no column {told!r}, which columns.toml names; found {listed}. Next: correct it.")
        if len(found) > 1:
            numbers = f", or numbers = {found}, if they are measured" if role == "label" else ""
            raise DataError(
                f"{where}: {' and '.join(found)} may each be the {role}; found {listed}. "
                f"Next: say which in columns.toml beside the file: {role} = '{found[0]}'{numbers}."
            )
        if not found and role in ("sequence", "label"):
            several = ", classes = ['<of 0 and 1>', …] or numbers = ['<column>', …]" if role == "label" else ""
            raise DataError(
                f"{where}: no column is called {', '.join(_USUAL[role][:4])} …; found {listed}. "
                f"Next: say which is the {role} in columns.toml beside the file: {role} = '<column>'{several}."
            )
        chosen |= {role: found[0]} if found else {}
    taken = [*chosen.values(), *settings.classes, *settings.numbers]
    if twice := [name for name in taken if names.count(name) > 1]:
        raise DataError(
            f"{where}: {names.count(twice[0])} columns are called {twice[0]!r}; expected one. Next: rename or remove "
            "the others."
        )
    return chosen


def _usual_columns(names: Sequence[str], role: str) -> list[str]:
    found = table_files.usual_columns(names, _USUAL[role])
    if role != "label":
        return found
    found = found or [name for name in names if table_files.plain_heading(name).endswith(_LABEL_ENDS)]
    if any(name.strip().lower() in _USUAL[role] or name.strip().lower().endswith(_LABEL_ENDS) for name in found):
        return found
    # a heading that is only like a label's, "Target (mRNA)", may be a remark beside a measured number
    return found + [name for name in names if table_files.plain_heading(name) in _NUMBER_NAMES]


def _read_folders(files: Mapping[str, Path]) -> pl.DataFrame:
    rows = []
    for label, path in files.items():
        _, *folder, file = label.split("/")
        stem = Path(file.removesuffix(".gz")).stem
        if ending(path) in FASTA:
            found = read_fasta(path, labelled=False).select("id", "sequence").rows()
        else:
            with table_files.open_text(path) as lines:
                found = [(stem, "".join(line.strip() for line in lines))]
        name = folder[0] if folder else stem
        told = {"label": name, "label_name": "label"}
        rows += [{"id": f"{name}/{each}", "sequence": sequence} | told for each, sequence in found]
    return pl.DataFrame(rows)
