"""Tables of sequences in the files that people have, as they are: which file is which, which column is what.

RAW is a folder with ``train`` and perhaps ``test`` and ``sample_submission``, or the training file itself: CSV, TSV,
parquet or FASTA (``>id label`` or ``>id|label``), text also as ``.gz``; or folders ``train`` and ``test`` with a FASTA
file for each class, or a folder for each class that holds FASTA files or, as GenomicBenchmarks has them, a text file
for each sequence. Columns are found by their usual names; ``columns.toml`` in the same folder says otherwise, see
`Settings`.

Source: Klimentova et al. 2023, GenomicBenchmarks, BMC Genomic Data 24:25 (the folders).
"""

import contextlib
import csv
import gzip
import re
import tomllib
import typing
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import IO, Any, Literal

import polars as pl
import pyarrow as pa
import pyarrow.csv as pa_csv

from pipeline.competitions.raw import kind_of, open_parquet
from pipeline.errors import DataError
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
_TEXT = {".csv": ",", ".tsv": "\t", ".txt": "\t"}
FASTA = (".fasta", ".fa", ".fna", ".faa")
ENDINGS = (*_TEXT, ".parquet", *FASTA)
_SAMPLE = "sample_submission"
_HAS, _HAS_NOT = ("1", "1.0", "true"), ("0", "0.0", "false")  # what a column of a class holds
_NUCLEOTIDE = "[ACGTUNacgtun]"


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
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise DataError(f"{raw}: {names} all hold {stem}; expected one of them. Next: move the others away.")
    return found[0] if found else None


def tables_in(raw: Path, endings: Sequence[str]) -> list[Path]:
    """Files of a folder that may be tables, by name."""
    return [path for path in sorted(raw.iterdir()) if path.is_file() and ending(path) in endings]


def ending(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _only_table(raw: Path, endings: Sequence[str], *, needed: bool) -> Path | None:
    found = [path for path in tables_in(raw, endings) if path.name.partition(".")[0] not in ("test", _SAMPLE)]
    if len(found) == 1:
        return found[0]
    if not (found or needed):
        return None
    others = sorted(path for path in raw.iterdir() if not path.name.startswith("."))
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
    return Settings(**told)


def read_told(path: Path | None, settings: type, *, passes_over: bool = False) -> dict[str, Any]:
    """What ``columns.toml`` says, each of the type that a dataclass of settings has under that name.

    Args:
        path: of the file; None = there is none.
        settings: the dataclass.
        passes_over: leave out what it does not know.

    Raises:
        DataError: another name or type, or no TOML.
    """
    if path is None:
        return {}
    try:
        told = tomllib.loads(path.read_text(encoding="utf-8-sig"))
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as err:
        raise DataError(f"{path}: not valid TOML: {err}. Next: correct that line.") from err
    known = {each.name: each.type for each in fields(settings)}
    told = {key: value for key, value in told.items() if key in known} if passes_over else told
    for key, value in told.items():
        if key not in known or not _is_of(value, known[key]):
            kinds = {name: type(value).__name__ for name, value in asdict(settings()).items()}
            expected = ", ".join(f"{name} ({kind})" for name, kind in kinds.items())
            raise DataError(f"{path}: {key} = {value!r}; expected {expected}. Next: correct that line.")
    return told


def _is_of(value: Any, kind: Any) -> bool:
    """Whether a value is a text, a number, or a list of such, as a type says.

    >>> _is_of("MAE", str), _is_of(["a", 1], list[str]), _is_of([0, 1.5], list[float])
    (True, False, True)
    """
    if typing.get_origin(kind) is list:
        return isinstance(value, list) and all(_is_of(each, typing.get_args(kind)[0]) for each in value)
    return type(value) in ((int, float) if kind is float else (str,))


def read_raw(files: Mapping[str, Path], table: str, settings: Settings, *, also: Sequence[str] = ()) -> pl.DataFrame:
    """A table as its file has it.

    Returns:
        ``row`` (from 1), ``where``, ``sequence``, and what there is of ``id``, ``group``, ``label`` (text, or lists of
        text) with ``label_name`` (its column), ``cells`` (of the columns of numbers, lists of text) and `also`.
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
    return frame.with_row_index("row", offset=1).with_columns(pl.lit(where).alias("where"))


def _read_columns(path: Path, settings: Settings, *, labelled: bool, also: Sequence[str]) -> pl.DataFrame:
    names = column_names(path)
    chosen = _choose_columns(names, settings, labelled=labelled, where=path.name)
    chosen |= {name: name for name in also if name in names}
    several = list(dict.fromkeys(settings.classes or settings.numbers))
    several = several if labelled or set(several) <= set(names) else []
    table = read_table(path, [*chosen.values(), *(name for name in several if name not in chosen.values())])
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
    frame = _without_empty_rows(frame) if labelled or "id" in chosen else frame
    return frame.with_columns(pl.lit(chosen.get("label", "label")).alias("label_name"))


def _without_empty_rows(frame: pl.DataFrame) -> pl.DataFrame:
    """Rows with anything in them: spreadsheets end with others, of separators alone."""
    lists = [name for name, kind in frame.schema.items() if isinstance(kind, pl.List)]
    texts = frame.with_columns(pl.col(lists).list.join("", ignore_nulls=True)).fill_null("")
    return frame.filter(~texts.select(pl.all_horizontal(pl.all().str.strip_chars() == "")).to_series())


def _join_flags(table: pl.DataFrame, names: Sequence[str], *, where: str) -> pl.Series:
    """``label``: of each row the names of the columns that hold 1."""
    texts = table.select(pl.col(names).cast(pl.String).str.strip_chars().str.to_lowercase())
    for name in names:
        odd = texts[name].filter(~texts[name].is_in([*_HAS, *_HAS_NOT]).fill_null(False))
        if odd.len():
            raise DataError(
                f"{where}: column {name} holds {odd[0]!r}; expected 0 or 1, being one of columns.toml's classes. "
                "Next: repair that cell, or correct columns.toml."
            )
    flags = [pl.when(pl.col(name).is_in(_HAS)).then(pl.lit(name)) for name in names]
    return texts.select(pl.concat_list(flags).list.drop_nulls().alias("label"))["label"]


def column_names(path: Path) -> list[str]:
    if kind_of(path) != "parquet":
        return _header(path)[0]
    with open_parquet(path) as file:
        return list(file.schema_arrow.names)


def read_table(path: Path, columns: Sequence[str]) -> pl.DataFrame:
    """Some columns of a table, those of a text file as text.

    Raises:
        DataError: the file is cut short or damaged, or a row has another number of cells than the first line.
    """
    try:
        if kind_of(path) == "parquet":
            with open_parquet(path) as file:
                return pl.DataFrame(file.read(columns=list(columns)))
        names, separator = _header(path)
        with pa.input_stream(str(path), compression="gzip" if kind_of(path) == "gzip" else None) as source:
            return pl.DataFrame(
                pa_csv.read_csv(
                    source,
                    read_options=pa_csv.ReadOptions(column_names=names, skip_rows=1),
                    parse_options=pa_csv.ParseOptions(delimiter=separator, newlines_in_values=True),
                    convert_options=pa_csv.ConvertOptions(
                        include_columns=list(columns),
                        column_types=dict.fromkeys(columns, pa.string()),
                        strings_can_be_null=False,
                    ),
                )
            )
    except (pa.ArrowException, OSError) as err:
        told = " ".join(str(err).split())[:200]
        raise DataError(f"{path.name}: {told}. Next: repair that row, or get the file again.") from err


def _header(path: Path) -> tuple[list[str], str]:
    """Column names of a text table, and what stands between them."""
    if kind_of(path) == "zip":
        raise DataError(f"{path.name}: an archive, or a workbook; expected text. Next: unpack it, or save it as CSV.")
    with open_text(path) as lines:
        first = next(iter(lines), "").rstrip("\r\n")
    if first.lstrip()[:1] in ("<", ""):
        raise DataError(f"{path.name}: the first line is {first[:40]!r}; expected column names. Next: check the file.")
    usual = _TEXT.get(ending(path), ",")
    separator = max((usual, ",", "\t", ";"), key=first.count)  # the first of equals
    names = next(csv.reader([first], delimiter=separator, skipinitialspace=True))
    if any(re.fullmatch(f"{_NUCLEOTIDE}{{20,}}", name.strip()) for name in names):
        raise DataError(
            f"{path.name}: the first line holds a sequence; expected column names. Next: begin with a line such as "
            f"{separator.join(('id', 'sequence', 'label'))!r}, in the order of the columns."
        )
    return [name.strip() for name in names], separator


@contextlib.contextmanager
def open_text(path: Path) -> Iterator[IO[str]]:
    """Lines of a text file, plain or gzipped.

    Raises:
        DataError: the file is empty, cut short, or no UTF-8.
    """
    opener = gzip.open if kind_of(path) == "gzip" else open
    try:
        with opener(path, "rt", encoding="utf-8-sig") as handle:
            yield handle
    except (EOFError, zlib.error, gzip.BadGzipFile, UnicodeDecodeError) as err:
        raise DataError(
            f"{path.name}: damaged, cut short or no UTF-8 text: {err}. Next: save it as UTF-8, or get it again."
        ) from err


def _choose_columns(names: Sequence[str], settings: Settings, *, labelled: bool, where: str) -> dict[str, str]:
    """Role -> column."""
    chosen: dict[str, str] = {}
    kind = "classes" if settings.classes else "numbers"
    if lost := sorted({*settings.classes, *settings.numbers} - set(names) if labelled else ()):
        raise DataError(f"{where}: no column {lost[0]!r}, one of columns.toml's {kind}. Next: correct it.")
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
        listed = ", ".join(names[:12]) + (" …" if len(names) > 12 else "")
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
    found = [name for name in names if name.strip().lower() in _USUAL[role]]
    if role == "label" and not found:
        found = [name for name in names if name.strip().lower().endswith(_LABEL_ENDS)]
        found = found or [name for name in names if name.strip().lower() in _NUMBER_NAMES]
    return found


def read_fasta(path: Path, *, labelled: bool) -> pl.DataFrame:
    ids: list[str] = []
    labels: list[str] = []
    texts: list[list[str]] = []
    with open_text(path) as lines:
        for number, line in enumerate(lines, start=1):
            line = line.strip()
            if line.startswith(">"):
                name, label = _split_header(line[1:].strip(), labelled=labelled)
                ids.append(name)
                labels.append(label)
                texts.append([])
            elif line and not texts:
                raise DataError(
                    f"{path.name}: line {number} is {line[:40]!r}; expected '>id label' first. Next: check the file."
                )
            elif line:
                texts[-1].append(line)
    frame = {"id": ids, "sequence": ["".join(parts) for parts in texts], "label": labels}
    told = pl.DataFrame(frame, schema_overrides={"sequence": pl.String})
    return told.with_columns(pl.lit("label").alias("label_name"))


def _split_header(header: str, *, labelled: bool) -> tuple[str, str]:
    """Id and label of ``id label`` or ``id|label``; of a test sequence the id alone.

    >>> _split_header("a1 beta lactam", labelled=True), _split_header("a|1|tRNA", labelled=True)
    (('a1', 'beta lactam'), ('a|1', 'tRNA'))
    """
    first, *rest = header.split(maxsplit=1) or [""]
    if rest or not labelled:
        return first, "".join(rest)
    name, bar, label = first.rpartition("|")
    return (name, label) if bar else (first, "")


def _read_folders(files: Mapping[str, Path]) -> pl.DataFrame:
    rows = []
    for label, path in files.items():
        _, *folder, file = label.split("/")
        stem = Path(file.removesuffix(".gz")).stem
        if ending(path) in FASTA:
            found = read_fasta(path, labelled=False).select("id", "sequence").rows()
        else:
            with open_text(path) as lines:
                found = [(stem, "".join(line.strip() for line in lines))]
        name = folder[0] if folder else stem
        told = {"label": name, "label_name": "label"}
        rows += [{"id": f"{name}/{each}", "sequence": sequence} | told for each, sequence in found]
    return pl.DataFrame(rows)
