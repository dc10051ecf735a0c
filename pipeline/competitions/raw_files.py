"""Which file of a download holds a raw table: one of its own, packed or not, or a member of the competition's zip."""

import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Literal

from pipeline.errors import DataError
from pipeline.runlog import warn

Kind = Literal["csv", "parquet", "zip", "gzip"]


def find_table(folder: Path, stem: str, *, suffix: str = ".csv", is_needed: bool = False) -> Path | None:
    """The file that holds a raw table, or None.

    A file of its own wins over a member of an archive: who unpacked a download keeps both. An archive that cannot be
    opened may be anything, such as a download on its way: it counts where nothing else holds the table.

    Args:
        folder: of the raw files, or the archive with all of them.
        stem: the table's name.
        suffix: ``.csv``, which a parquet file may stand in for, or ``.json`` for JSON lines.
        is_needed: whether an archive that cannot be opened and may hold it is refused; else a warning says so.

    Raises:
        DataError: `folder` is neither, two files of equal rank are there, or an archive cannot be opened.
    """
    if folder.is_file() and folder.suffix == ".zip":
        return folder if _members(folder, f"{stem}{suffix}") else None
    if not folder.is_dir():
        got = "a file" if folder.is_file() else "no such folder"
        raise DataError(f"RAW={folder}: {got}. Next: give the folder, or the zip, that holds the competition's files.")
    found = [path for ending in _endings(suffix) if (path := folder / f"{stem}{ending}").is_file()]
    unreadable: DataError | None = None
    for path in () if found else sorted(folder.glob("*.zip")):
        try:
            found += [path] if _members(path, f"{stem}{suffix}") else []
        except DataError as err:
            unreadable = err
    if unreadable and not found:
        if is_needed:
            raise unreadable
        warn(f"{stem}: looked for and not found, but {unreadable}")
    return only_one(found, folder, stem)


def only_one(found: Sequence[Path], folder: Path, stem: str) -> Path | None:
    """The file of a folder that holds a table, or None.

    Raises:
        DataError: several do.
    """
    if len(found) > 1:
        names = ", ".join(path.name for path in found)
        raise DataError(f"{folder}: {names} all hold {stem}; expected one of them. Next: move the others away.")
    return found[0] if found else None


def need_table(folder: Path, stem: str, *, suffix: str = ".csv") -> Path:
    """The file that holds a raw table.

    Raises:
        DataError: there is none, or `find_table` refuses.
    """
    path = find_table(folder, stem, suffix=suffix, is_needed=True)
    if path is None:
        *first, last = _endings(suffix)
        absent = f"{folder}: no {stem}{', '.join(first)} or {last}, and no zip that holds {stem}{suffix}"
        if folder.is_file():
            raise DataError(f"{absent}. Next: give the zip of this competition, or the folder of its files.")
        there = sorted((path.name for path in folder.glob("[!.]*")), key=lambda name: (not name.startswith(stem), name))
        found = ", ".join(there[:4]) + (" …" if len(there) > 4 else "") if there else "nothing"
        below = [path.parent for ending in _endings(suffix) for path in sorted(folder.glob(f"*/{stem}{ending}"))]
        then = f"RAW={below[0]}" if below else "download the competition's files into that folder"
        raise DataError(f"{absent}; found {found}. Next: {then}.")
    return path


def names_beside(path: Path) -> list[str]:
    """Names of the files of a raw file's folder, and of its archive where it is one."""
    names = {other.name for other in path.parent.iterdir()}
    if kind_of(path) == "zip":
        with zipfile.ZipFile(path) as opened:
            names |= {member.rsplit("/", 1)[-1] for member in opened.namelist()}
    return sorted(names)


def kind_of(path: Path) -> Kind:
    """What a file is, by its first bytes.

    Raises:
        DataError: the file is empty.
    """
    with path.open("rb") as handle:
        head = handle.read(4)
    if not head:
        raise DataError(f"{path.name}: the file is empty. Next: write or download it again.")
    if head == b"PAR1":
        return "parquet"
    if head == b"PK\x03\x04":
        return "zip"
    return "gzip" if head[:2] == b"\x1f\x8b" else "csv"


def member_of(archive: Path, name: str) -> str:
    """The member of that name; of several, the one that is in fewer folders, beside which others are additions."""
    members = _members(archive, name)
    fewest = min((member.count("/") for member in members), default=0)
    members = [member for member in members if member.count("/") == fewest]
    if len(members) != 1:
        raise DataError(f"{archive.name}: holds {len(members)} files {name!r}; expected one. Next: unpack it by hand.")
    return members[0]


def _members(archive: Path, name: str) -> list[str]:
    try:
        with zipfile.ZipFile(archive) as opened:
            return [member for member in opened.namelist() if member.rsplit("/", 1)[-1] == name]
    except zipfile.BadZipFile as err:
        raise DataError(f"{archive.name}: not a zip archive, or cut short: {err}. Next: download it again.") from err


def _endings(suffix: str) -> list[str]:
    return [suffix, f"{suffix}.gz", *([".parquet"] if suffix == ".csv" else [])]
