"""Any labelled set of sequences, RNA, DNA or protein: one class for each sequence, or any number of them.

RAW is a folder with ``train`` and perhaps ``test`` and ``sample_submission``, or the training file itself: CSV, TSV,
parquet or FASTA (``>id label`` or ``>id|label``), text also as ``.gz``; or folders ``train`` and ``test`` with a FASTA
file for each class, or a folder for each class that holds FASTA files or, as GenomicBenchmarks has them, a text file
for each sequence. Columns are found by their usual names; ``columns.toml`` in the same folder says otherwise, see
`Settings`.

What cannot be read is refused in one sentence, but for a test set that is read alone, by a notebook that a competition
runs again on hidden sequences: there every row is to get a prediction, whatever is in it, and what is odd is counted.

Source: Klimentova et al. 2023, GenomicBenchmarks, BMC Genomic Data 24:25 (the folders).
"""

import contextlib
import csv
import gzip
import re
import tomllib
import zlib
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import IO, Any, Literal

import polars as pl
import pyarrow as pa
import pyarrow.csv as pa_csv

from pipeline.classes import Classes, letters_of, read_class_file, unknown_letter, write_classes
from pipeline.competitions.base import Competition
from pipeline.competitions.raw import kind_of, open_parquet
from pipeline.errors import DataError
from pipeline.runlog import warn
from pipeline.schema import ALPHABET, AMINO_ACIDS

#: Column of the raw table -> names that it usually has, in small letters.
_USUAL = {
    "id": ("id", "sequence_id", "seq_id", "target_id", "name", "identifier", "accession"),
    "sequence": ("sequence", "seq", "rna", "dna", "protein", "rna_sequence", "dna_sequence", "protein_sequence"),
    "label": ("label", "labels", "class", "classes", "target", "family", "category"),
    "group": ("group",),
}
_LABEL_ENDS = ("_label", "_class", "_family")  # of a label's column where none has a usual name
_TEXT = {".csv": ",", ".tsv": "\t", ".txt": "\t"}
_FASTA = (".fasta", ".fa", ".fna", ".faa")
_ENDINGS = (*_TEXT, ".parquet", *_FASTA)
_SAMPLE = "sample_submission"
_NUCLEOTIDE = "[ACGTUNacgtun]"
_NUCLEIC_FROM, _PROTEIN_BELOW = 0.9, 0.6  # share of nucleotides' letters; proteins have about a quarter
_MOST_CLASSES = 1 << 16
_UNSAID = ("nan", "na", "n/a", "none", "null", "?")  # what a cell that says nothing may hold, in small letters
_BETWEEN_LABELS = (",", "|", "/", "+", "&", ";")  # signs that may stand between the labels in a cell
_HAS, _HAS_NOT = ("1", "1.0", "true"), ("0", "0.0", "false")  # what a column of a class holds
_PARQUET: dict[str, Any] = {"compression": "zstd", "row_group_size": 1 << 14}


@dataclass(frozen=True, kw_only=True)
class Settings:
    """What ``columns.toml`` may say; "" = found by itself."""

    id: str = ""  #: column of the ids; without one, rows are numbered
    sequence: str = ""
    label: str = ""
    #: instead of a label's column: columns of 0 and 1, each a class that a sequence has or has not
    classes: list[str] = field(default_factory=list)
    group: str = ""  #: column of known relatives, which share a fold
    separator: str = ";"  #: between the labels of one sequence; "" = a cell is one label, whatever it holds
    alphabet: Literal["", "nucleotides", "amino acids"] = ""
    max_odd: float = 0.05  #: share of letters outside the alphabet (N, X, B, …) from which a table is refused


def raw_files(raw: Path) -> dict[str, Path]:
    """``train``, and ``test``, ``sample`` and ``columns`` where they are; a folder's files as ``train/<path in it>``.

    Raises:
        DataError: no training file, or several.
    """
    if not raw.exists():
        raise DataError(f"RAW={raw}: no such file or folder. Next: give the training file, or the folder that has it.")
    home = raw if raw.is_dir() else raw.parent
    files = {"columns": home / "columns.toml"} if (home / "columns.toml").is_file() else {}
    if raw.is_file():
        return {"train": raw} | files
    train, test, sample = (_find(raw, stem) for stem in ("train", "test", _SAMPLE))
    train = train or _only_table(raw)
    files |= {"test": test} if test and test.is_file() else {}
    if sample and not test:
        raise DataError(f"{raw}: {sample.name} and no test set; expected both or none. Next: add test.csv or the like.")
    files |= {"sample": sample} if sample else {}
    for table, path in (("train", train), ("test", test)):
        if path and path.is_dir():
            files |= _class_files(path, table)
    return ({"train": train} if train.is_file() else {}) | files


def _find(raw: Path, stem: str) -> Path | None:
    """The file or folder of classes that holds a table."""
    found = [path for path in _tables(raw) if path.name.partition(".")[0] == stem]
    found += [path for path in [raw / stem] if path.is_dir()]
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise DataError(f"{raw}: {names} all hold {stem}; expected one of them. Next: move the others away.")
    return found[0] if found else None


def _tables(raw: Path) -> list[Path]:
    return [path for path in sorted(raw.iterdir()) if path.is_file() and _ending(path) in _ENDINGS]


def _ending(path: Path) -> str:
    return Path(path.name.lower().removesuffix(".gz")).suffix


def _only_table(raw: Path) -> Path:
    found = [path for path in _tables(raw) if path.name.partition(".")[0] not in ("test", _SAMPLE)]
    if len(found) == 1:
        return found[0]
    others = sorted(path for path in raw.iterdir() if not path.name.startswith("."))
    names = ", ".join(path.name for path in (found or others)[:5]) or "nothing of the kind"
    raise DataError(
        f"RAW={raw}: no train{', '.join(_ENDINGS)} or folder train/<class>; found {names}. "
        "Next: name the training file train, give its path as RAW, or put a FASTA file for each class into train/."
    )


def _class_files(folder: Path, table: str) -> dict[str, Path]:
    found = [path for path in folder.glob("[!.]*") if path.is_file() and _ending(path) in _FASTA]
    found += [path for path in folder.glob("[!.]*/[!.]*") if path.is_file() and _ending(path) in (".txt", *_FASTA)]
    if not found:
        raise DataError(
            f"{folder}: no <class>.fasta, <class>/*.fasta or <class>/*.txt in it; expected a FASTA file or a folder "
            "for each class. Next: move the files, or give a table train.csv instead."
        )
    return {f"{table}/{path.relative_to(folder)}": path for path in sorted(found)}


def clean(files: dict[str, Path], parts: dict[str, Path]) -> dict[str, Any]:
    """Write the tables that `parts` asks for; the facts are the validation report.

    A test set without ``train`` is a hidden one, and ``classes`` among the files is what the checkpoints know.

    - train: as every competition's, with ``labels`` (places in the class names; null = not known, not scored);
    - classes: see `pipeline.classes`;
    - test: ``sequence_id, sequence`` in the order of the file, and ``labels`` where they are known, for the last score;
    - sample: the sample submission as it is, all text.

    Raises:
        DataError: a raw file is not what it should be.
    """
    settings, hidden = _read_settings(files.get("columns")), "train" not in parts
    raw = {table: _read(files, table, settings) for table in ("train", "test") if table in parts}
    alphabet = read_class_file(files["classes"]).alphabet if hidden and "classes" in files else ""
    letters = letters_of(alphabet) if alphabet else _choose_letters(list(raw.values()), settings)
    tables, odd = {}, {}
    for table, frame in raw.items():
        tables[table], odd[table] = _normalise(frame, letters, settings, hidden=hidden)
    alphabet = alphabet or letters + (unknown_letter(letters) if "train" in odd and odd["train"]["odd"] else "")
    facts: dict[str, Any] = {}
    if "train" in tables:
        train, classes, facts = _label(tables["train"], alphabet, settings)
        facts |= {"letters": _tell_letters(letters, odd["train"]), "lengths": _lengths(train["sequence"])}
        train.write_parquet(parts["train"], **_PARQUET)
        write_classes(parts["classes"], classes)
    if "test" in tables:
        test = _one_row_an_id(tables["test"]) if hidden else tables["test"]
        test = _with_ids(test, "test", may_repeat=False)
        _warn_of_unknown(test, alphabet)
        test, known = _label_test(test, classes, settings) if "train" in tables else (test, {})
        test = test.select("sequence_id", "sequence", *(["labels"] if "labels" in test.columns else []))
        test.write_parquet(parts["test"], **_PARQUET)
        facts["test"] = {"sequences": test.height, **known, "letters": _tell_letters(letters, odd["test"])}
        facts["test"] |= {"lengths": _lengths(test["sequence"])}
        if "train" in tables:
            facts["test"]["copies_of_train"] = int(test["sequence"].is_in(train["sequence"].to_list()).sum())
        if "sample" in parts:
            _write_sample(files["sample"], test["sequence_id"], parts["sample"], hidden=hidden)
    told = {name: value for name, value in asdict(settings).items() if value != getattr(Settings(), name)}
    return facts | ({"columns": told} if told else {})


def read_sequences(path: Path, *, alphabet: str) -> tuple[pl.DataFrame, int]:
    """Sequences of any file that RAW may be, without labels, in the letters of a network.

    Args:
        path: CSV, TSV, parquet or FASTA; ``columns.toml`` beside it holds here too.
        alphabet: the network's; odd letters are read as N, or X in proteins, where it has that one.

    Returns:
        ``sequence_id`` (each once; numbered rows where there are none) and ``sequence`` in the order of the file, and
        how many letters were odd.

    Raises:
        DataError: the file is not what it should be, or has an odd letter that the network does not know.
    """
    if _ending(path) not in _ENDINGS:
        raise DataError(f"{path}: expected {', '.join(_ENDINGS)}. Next: write the sequences in one of these.")
    columns = path.with_name("columns.toml")
    settings = _read_settings(columns if columns.is_file() else None)
    letters, unknown = letters_of(alphabet), unknown_letter(alphabet)
    frame, found = _normalise(_read({"embed": path}, "embed", settings), letters, settings)
    if found["odd"] and unknown not in alphabet:
        row = frame.filter(pl.col("sequence").str.contains(unknown, literal=True)).row(0, named=True)
        raise DataError(
            f"{_spot(row)}: {row['sequence'].count(unknown)} letters that are none of {letters}, and the "
            "network was trained on those alone. Next: remove or repair the row."
        )
    return _with_ids(frame, "row", may_repeat=False).select("sequence_id", "sequence"), found["odd"]


# --- raw files ---


def _read_settings(path: Path | None) -> Settings:
    if path is None:
        return Settings()
    try:
        told = tomllib.loads(path.read_text())
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as err:
        raise DataError(f"{path}: not valid TOML: {err}. Next: correct that line.") from err
    known = {name: type(value) for name, value in asdict(Settings()).items()}
    for key, value in told.items():
        listed = value if isinstance(value, list) else []
        if key not in known or not isinstance(value, known[key]) or not all(isinstance(each, str) for each in listed):
            expected = ", ".join(f"{name} ({kind.__name__})" for name, kind in known.items())
            raise DataError(f"{path}: {key} = {value!r}; expected {expected}. Next: correct that line.")
    if told.get("alphabet", "") not in ("", "nucleotides", "amino acids"):
        raise DataError(f"{path}: alphabet = {told['alphabet']!r}. Next: 'nucleotides' or 'amino acids'.")
    if told.get("label") and told.get("classes"):
        raise DataError(f"{path}: label and classes; expected one of them. Next: remove the other.")
    return Settings(**told)


def _read(files: Mapping[str, Path], table: str, settings: Settings) -> pl.DataFrame:
    """``row`` (from 1), ``where``, ``sequence``, and what there is of ``id``, ``label`` (text or lists), ``group``."""
    is_train = table == "train"
    if table in files:
        path, where = files[table], files[table].name
        fasta = _ending(path) in _FASTA
        frame = _read_fasta(path, labelled=is_train) if fasta else _read_columns(path, settings, labelled=is_train)
    else:
        where = f"{table}/"
        frame = _read_folders({label: path for label, path in files.items() if label.startswith(f"{table}/")})
    if not frame.height:
        raise DataError(f"{where}: no sequence in it. Next: check the file.")
    return frame.with_row_index("row", offset=1).with_columns(pl.lit(where).alias("where"))


def _read_columns(path: Path, settings: Settings, *, labelled: bool) -> pl.DataFrame:
    chosen = _choose_columns(_column_names(path), settings, labelled=labelled, where=path.name)
    flags = sorted(set(settings.classes)) if labelled or set(settings.classes) <= set(_column_names(path)) else []
    table = _read_table(path, [*chosen.values(), *(name for name in flags if name not in chosen.values())])
    frame = table.select(pl.col(column).alias(role) for role, column in chosen.items())
    if flags:
        frame = frame.with_columns(_join_flags(table, flags, where=path.name))
    is_list = isinstance(frame.schema.get("label"), pl.List)
    kinds = {role: pl.List(pl.String) if is_list and role == "label" else pl.String for role in frame.columns}
    try:
        return frame.cast(kinds)  # type: ignore[arg-type]
    except pl.exceptions.PolarsError as err:
        kinds_found = ", ".join(map(str, frame.dtypes))
        raise DataError(
            f"{path.name}: columns {', '.join(chosen.values())} are {kinds_found}; expected text. "
            "Next: say which columns are meant in columns.toml beside the file."
        ) from err


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


def _column_names(path: Path) -> list[str]:
    if kind_of(path) != "parquet":
        return _header(path)[0]
    with open_parquet(path) as file:
        return list(file.schema_arrow.names)


def _read_table(path: Path, columns: Sequence[str]) -> pl.DataFrame:
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
    with _open_text(path) as lines:
        first = next(iter(lines), "").rstrip("\r\n")
    if first.lstrip()[:1] in ("<", ""):
        raise DataError(f"{path.name}: the first line is {first[:40]!r}; expected column names. Next: check the file.")
    usual = _TEXT.get(_ending(path), ",")
    separator = max((usual, ",", "\t", ";"), key=first.count)  # the first of equals
    names = next(csv.reader([first], delimiter=separator, skipinitialspace=True))
    if any(re.fullmatch(f"{_NUCLEOTIDE}{{20,}}", name.strip()) for name in names):
        raise DataError(
            f"{path.name}: the first line holds a sequence; expected column names. Next: begin with a line such as "
            f"{separator.join(('id', 'sequence', 'label'))!r}, in the order of the columns."
        )
    return [name.strip() for name in names], separator


@contextlib.contextmanager
def _open_text(path: Path) -> Iterator[IO[str]]:
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
    if lost := sorted(set(settings.classes) - set(names) if labelled else ()):
        raise DataError(f"{where}: no column {lost[0]!r}, one of columns.toml's classes. Next: correct it.")
    for role in _USUAL:
        if role == "label" and settings.classes:
            continue
        told = getattr(settings, role)
        found = [told] if told else _usual_columns(names, role)
        if role == "label" and not labelled:  # of a test set they may be there
            chosen |= {role: found[0]} if len(found) == 1 and found[0] in names else {}
            continue
        listed = ", ".join(names[:12]) + (" …" if len(names) > 12 else "")
        if told and told not in names:
            raise DataError(f"{where}: no column {told!r}, which columns.toml names; found {listed}. Next: correct it.")
        if len(found) > 1:
            raise DataError(
                f"{where}: {' and '.join(found)} may each be the {role}; found {listed}. "
                f"Next: say which in columns.toml beside the file: {role} = '{found[0]}'."
            )
        if not found and role in ("sequence", "label"):
            several = ", or classes = ['<column of 0 and 1>', …]" if role == "label" else ""
            raise DataError(
                f"{where}: no column is called {', '.join(_USUAL[role][:4])} …; found {listed}. "
                f"Next: say which is the {role} in columns.toml beside the file: {role} = '<column>'{several}."
            )
        chosen |= {role: found[0]} if found else {}
    return chosen


def _usual_columns(names: Sequence[str], role: str) -> list[str]:
    found = [name for name in names if name.strip().lower() in _USUAL[role]]
    if role == "label" and not found:
        found = [name for name in names if name.strip().lower().endswith(_LABEL_ENDS)]
    return found


def _read_fasta(path: Path, *, labelled: bool) -> pl.DataFrame:
    ids: list[str] = []
    labels: list[str] = []
    texts: list[list[str]] = []
    with _open_text(path) as lines:
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
    frame = {"id": ids, "sequence": ["".join(parts) for parts in texts]}
    return pl.DataFrame(frame | {"label": labels}, schema_overrides={"sequence": pl.String})


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
        if _ending(path) in _FASTA:
            found = _read_fasta(path, labelled=False).select("id", "sequence").rows()
        else:
            with _open_text(path) as lines:
                found = [(stem, "".join(line.strip() for line in lines))]
        name = folder[0] if folder else stem
        rows += [{"id": f"{name}/{each}", "sequence": sequence, "label": name} for each, sequence in found]
    return pl.DataFrame(rows)


# --- letters ---


def _choose_letters(frames: Sequence[pl.DataFrame], settings: Settings) -> str:
    """`ALPHABET` or `AMINO_ACIDS`, whichever the sequences are written in."""
    if settings.alphabet:
        return ALPHABET if settings.alphabet == "nucleotides" else AMINO_ACIDS
    text = pl.concat([frame["sequence"] for frame in frames])
    total, nucleotides = (int(text.str.count_matches(sign).sum() or 0) for sign in ("[A-Za-z]", _NUCLEOTIDE))
    share = nucleotides / max(total, 1)
    if _PROTEIN_BELOW < share < _NUCLEIC_FROM or not total:
        raise DataError(
            f"{frames[0]['where'][0]}: {share:.0%} of the letters are A, C, G, T, U or N; expected {_NUCLEIC_FROM:.0%} "
            f"or more in RNA and DNA, less than {_PROTEIN_BELOW:.0%} in proteins. Next: check the column, or say "
            "alphabet = 'nucleotides' or 'amino acids' in columns.toml."
        )
    return ALPHABET if share >= _NUCLEIC_FROM else AMINO_ACIDS


def _normalise(
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
        raise DataError(f"{_spot(row)}: {what}; expected letters. Next: remove or repair the row.")
    gaps = int(frame["before"].sum()) - int(frame["text"].str.len_chars().sum())
    if wrong.height:
        warn(f"{frame['where'][0]}: {wrong.height:,} sequences hold other signs than letters, or nothing")
        letter = pl.col("text").str.replace_all("[^A-Z]", unknown_letter(letters))
        frame = frame.with_columns(
            pl.when(letter == "").then(pl.lit(unknown_letter(letters))).otherwise(letter).alias("text")
        )
    odd, text = f"[^{letters}]", pl.col("text").str
    frame = frame.with_columns(
        text.count_matches(odd).alias("odd"), text.replace_all(odd, unknown_letter(letters)).alias("sequence")
    )
    total, odd_letters = int(frame["text"].str.len_bytes().sum()), int(frame["odd"].sum())
    if odd_letters > settings.max_odd * total and not hidden:
        row = frame.sort("odd", descending=True).row(0, named=True)
        raise DataError(
            f"{row['where']}: {odd_letters / total:.1%} of the letters are none of {letters} (most in {_spot(row)}, "
            f"{row['odd']} of {len(row['text'])}); expected at most {settings.max_odd:.0%}. Next: repair the "
            "sequences, or raise max_odd in columns.toml."
        )
    counts = {"odd": odd_letters, "sequences": int((frame["odd"] > 0).sum()), "gaps": gaps}
    return frame.drop("text", "before", "odd"), counts


def _warn_of_unknown(test: pl.DataFrame, alphabet: str) -> None:
    """Say where letters of a test set say nothing, as no training sequence had any such."""
    unknown = unknown_letter(alphabet)
    odd = test["sequence"].str.count_matches(unknown, literal=True)
    if unknown not in alphabet and odd.sum():
        warn(
            f"{test['where'][0]}: {odd.sum():,} letters in {(odd > 0).sum():,} sequences are none of {alphabet}; no "
            "training sequence has such letters, so they say nothing of a class"
        )


def _spot(row: Mapping[str, Any]) -> str:
    named = f" (id {row['id']})" if row.get("id") else ""
    return f"{row['where']}: row {row['row']}{named}"


def _tell_letters(letters: str, odd: Mapping[str, int]) -> dict[str, Any]:
    kind = "RNA or DNA" if letters == ALPHABET else "protein"
    found = {f"odd, read as {unknown_letter(letters)}": odd["odd"], "sequences with odd ones": odd["sequences"]}
    return {"kind": kind} | found | {"gaps removed": odd["gaps"]}


def _lengths(sequences: pl.Series) -> dict[str, float]:
    lengths = sequences.str.len_bytes()
    return {"shortest": lengths.min(), "median": lengths.median(), "longest": lengths.max()}  # type: ignore[dict-item]


# --- ids and labels ---


def _one_row_an_id(frame: pl.DataFrame) -> pl.DataFrame:
    """Number the rows of a hidden test set that have no id; of rows that share one, keep the first."""
    if "id" not in frame.columns:
        return frame
    number = pl.lit("row-") + pl.col("row").cast(pl.String)
    named = frame.with_columns(pl.when(pl.col("id").fill_null("") == "").then(number).otherwise("id").alias("id"))
    kept = named.unique("id", keep="first", maintain_order=True)
    changed = int((named["id"] != frame["id"].fill_null("")).sum()) + named.height - kept.height
    if changed:
        warn(f"{frame['where'][0]}: {changed:,} rows have no id, and are numbered, or an id again, and are left out")
    return kept


def _with_ids(frame: pl.DataFrame, table: str, *, may_repeat: bool) -> pl.DataFrame:
    """Add ``sequence_id``: the id, with ``-2``, ``-3`` … where it comes again; numbered rows where there are none."""
    if "id" not in frame.columns:
        number = pl.col("row").cast(pl.String).str.zfill(len(str(frame["row"].max())))
        return frame.with_columns((pl.lit(f"{table}-") + number).alias("sequence_id"))
    lost = frame.filter(pl.col("id").fill_null("") == "")
    if lost.height:
        raise DataError(f"{_spot(lost.row(0, named=True))}: no id. Next: give the row one, or remove it.")
    again = frame.filter(pl.col("id").is_duplicated())
    if again.height and not may_repeat:
        raise DataError(f"{_spot(again.row(1, named=True))}: an id twice; expected each once. Next: repair the file.")
    taken, seen, ids = set(frame["id"]), dict[str, int](), []
    for name in frame["id"]:
        count = seen[name] = seen.get(name, 0) + 1
        while count > 1 and f"{name}-{count}" in taken:
            count += 1
        ids.append(name if count == 1 else f"{name}-{count}")
        taken.add(ids[-1])
    return frame.with_columns(pl.Series("sequence_id", ids))


def _label(frame: pl.DataFrame, alphabet: str, settings: Settings) -> tuple[pl.DataFrame, Classes, dict[str, Any]]:
    """The clean train table, its classes, and what there is to say of both."""
    rows, where = frame.height, frame["where"][0]
    frame, exclusive = _split_labels(frame, settings)
    names = sorted(set(settings.classes)) or frame["names"].explode().drop_nulls().unique().sort().to_list()
    _check_classes(names, int(frame["names"].is_not_null().sum()), exclusive=exclusive, where=where)
    if "id" in frame.columns:
        frame = frame.unique(["id", "sequence", "names"], keep="first", maintain_order=True)
    frame = _with_ids(frame, "train", may_repeat=True)
    place = {name: index for index, name in enumerate(names)}
    group = pl.col("group") if "group" in frame.columns else pl.lit("")
    train = frame.select(
        "sequence_id",
        "sequence",
        pl.lit("train").alias("dataset_name"),
        group.replace("", None).alias("group"),
        pl.col("names").is_not_null().alias("scored"),
        pl.col("names").list.eval(pl.element().replace_strict(place, return_dtype=pl.UInt16)).alias("labels"),
    ).sort("sequence_id")
    counted = dict(train["labels"].explode().drop_nulls().value_counts().iter_rows())
    classes = Classes(tuple(names), tuple(counted.get(index, 0) for index in range(len(names))), exclusive, alphabet)
    for hint in filter(None, (_combined(names, taken=settings.separator), _alike(names), _alone(classes))):
        warn(f"{where}: {hint}")
    facts = {
        "rows": rows,
        "sequences": train.height,
        "labels": "one class each" if exclusive else "any number of classes each",
        "unlabelled": int((~train["scored"]).sum()),
        "classes": dict(zip(names, classes.counts, strict=True)),
        "duplicates": _duplicates(train, frame, rows=rows),
    }
    return train, classes, facts


def _label_test(frame: pl.DataFrame, classes: Classes, settings: Settings) -> tuple[pl.DataFrame, dict[str, str | int]]:
    """Add ``labels`` to a test set whose labels are known, which nothing but its score ever reads; and what was found.

    Columns that only look like labels, or hold the same everywhere, are passed over.
    """
    if "label" not in frame.columns:
        return frame, {}
    frame, _ = _split_labels(frame, settings, exclusive=classes.exclusive)
    found = set(frame["names"].explode().drop_nulls())
    strange = sorted(found - set(classes.names))
    if strange or frame["names"].n_unique() < 2:
        return frame, {"labels": f"not used: {strange[0]!r} is no class" if strange else "not used: all the same"}
    places = [
        None if names is None else [classes.names.index(name) for name in names] for names in frame["names"].to_list()
    ]
    frame = frame.with_columns(pl.Series("labels", places, dtype=pl.List(pl.UInt16)))
    return frame, {"labelled": frame.height - frame["labels"].null_count()}


def _duplicates(train: pl.DataFrame, frame: pl.DataFrame, *, rows: int) -> dict[str, int]:
    twice = train.filter(pl.col("sequence").is_duplicated())
    kinds = twice.filter("scored").group_by("sequence").agg(pl.col("labels").n_unique())
    return {
        "rows left out": rows - train.height,
        "ids made unique": int((frame["id"] != frame["sequence_id"]).sum()) if "id" in frame.columns else 0,
        "sequences that come again": train.height - train["sequence"].n_unique(),
        "sequences with different labels": int((kinds["labels"] > 1).sum()),
    }


def _split_labels(
    frame: pl.DataFrame, settings: Settings, *, exclusive: bool | None = None
) -> tuple[pl.DataFrame, bool]:
    """Add ``names``, the classes of each row (null = not known), and say whether each row has exactly one.

    `exclusive`: whether it has, where that is known.
    """
    if isinstance(frame.schema["label"], pl.List):
        names, exclusive = pl.col("label"), False
    else:
        text = pl.col("label").str.strip_chars()
        if exclusive is None:
            exclusive = not (settings.separator and frame["label"].str.contains(settings.separator, literal=True).any())
        whole = exclusive or not settings.separator
        names = pl.concat_list(pl.when(text != "").then(text)) if whole else text.str.split(settings.separator)
        names = pl.when(text == "").then(None).otherwise(names) if exclusive else names
    stripped = names.list.eval(pl.element().str.strip_chars())
    tidy = stripped.list.eval(pl.element().filter(pl.element() != "")).list.unique().list.sort()
    known = pl.when(pl.col("label").is_null()).then(None).otherwise(tidy)
    return frame.with_columns(known.alias("names")), exclusive


def _check_classes(names: Sequence[str], labelled: int, *, exclusive: bool, where: str) -> None:
    least = 2 if exclusive else 1
    if len(names) < least:
        raise DataError(
            f"{where}: {len(names)} class{'' if len(names) == 1 else 'es'} ({', '.join(names) or 'no label at all'}); "
            f"expected at least {least}. Next: check the label's column, or name another in columns.toml."
        )
    if len(names) > _MOST_CLASSES or (len(names) > 10 and 2 * len(names) > labelled):
        raise DataError(
            f"{where}: {len(names):,} different labels on {labelled:,} sequences, such as {names[0]!r}; expected "
            "classes that come again. Next: name the column of classes in columns.toml: label = '<column>'."
        )


def _combined(names: Sequence[str], *, taken: str) -> str:
    """A hint where several labels of a cell were read as one class, and which setting tells them apart; else "".

    `taken`: the separator at which cells were split. A class is such where its parts are classes themselves, or parts
    of others.

    >>> _combined(["Am", "Am,Gm", "Gm"], taken=";")[:59]
    "labels such as 'Am,Gm', 1 of 3, are taken for classes of th"
    >>> _combined(["beta lactam", "alpha/beta", "alpha"], taken=";")
    ''
    """
    for sign in _BETWEEN_LABELS:
        parts = {name: {part.strip() for part in name.split(sign)} for name in names if sign != taken and sign in name}
        uses = Counter(part for each in parts.values() for part in each)
        found = [name for name, each in parts.items() if all(part in names or uses[part] > 1 for part in each)]
        if found:
            count = len({part for name in found for part in parts[name]})
            return (
                f"labels such as {found[0]!r}, {len(found):,} of {len(names):,}, are taken for classes of their own, "
                f"and look like combinations of {count:,} others. Next, if they are: separator = '{sign}' in "
                "columns.toml beside the file makes these the classes, several a sequence."
            )
    return ""


def _alike(names: Sequence[str]) -> str:
    """A hint where two classes differ in how they are written alone, or one looks like no label at all; else "".

    >>> _alike(["0", "1", "1.0"])[:48], _alike(["a", "NaN"])[:34], _alike(["a", "b"])
    ("labels '1' and '1.0' are taken for two classes. ", "the label 'NaN' is taken for a cla", '')
    """
    written: dict[str, str] = {}
    for name in names:
        first = written.setdefault(name.lower().removesuffix(".0"), name)
        if first != name:
            return f"labels {first!r} and {name!r} are taken for two classes. Next, if they are one: write them alike."
        if name.lower() in _UNSAID:
            return f"the label {name!r} is taken for a class. Next, if it means that none is known: empty these cells."
    return ""


def _alone(classes: Classes) -> str:
    """A hint where there are classes of a single sequence; else ""."""
    alone = [name for name, count in zip(classes.names, classes.counts, strict=True) if count == 1]
    if not alone:
        return ""
    return (
        f"{len(alone):,} of {len(classes.names):,} classes have a single sequence, such as {alone[0]!r}: where that is "
        "held out, nothing has taught its class. Next: join such classes, or leave them out."
    )


def _write_sample(path: Path, ids: pl.Series, part: Path, *, hidden: bool) -> None:
    """The sample submission as text; beside a hidden test set of other ids, its first row for each of those."""
    sample = _read_table(path, _column_names(path)).select(pl.all().cast(pl.String))
    first = sample[sample.columns[0]]
    lost = set(ids) ^ set(first)
    if hidden and sample.height and (lost or first.is_duplicated().any()):
        warn(
            f"{path.name}: other ids than the test set's ({len(lost):,}); its columns are used for the test set's rows"
        )
        sample = sample[[0] * len(ids)].with_columns(ids.alias(first.name))
    elif lost:
        raise DataError(
            f"{path.name}: its first column and the ids of the test set differ in {len(lost):,} rows, such as "
            f"{min(map(str, lost))!r}; expected the same. Next: check that both are of one set."
        )
    sample.write_parquet(part, **_PARQUET)


LABELLED = Competition(
    name="labelled",
    title="Labelled sequences",
    slug="",
    files=(),
    task="classes",
    row_key="sequence_id",
    default_model="small_labelled",
    targets=(),
    target_range=None,
    signal_to_noise=None,
    metric="log loss",
    error_sums=None,
    score=None,
    tables=("train", "classes", "test", "sample"),
    optional=("test", "sample"),
    raw_files=raw_files,
    clean=clean,
    test_inputs=("test", "sample", "columns"),
    test_tables=("test", "sample"),
)
