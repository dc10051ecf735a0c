"""Unpacking archives from elsewhere: every name and size is checked before the first byte is written."""

import shutil
import stat
import zipfile
import zlib
from pathlib import Path, PurePosixPath

from pipeline.errors import DataError, StorageError

_MAX_RATIO = 300  # unpacked over packed size; text of few letters packs 4 to 20 times, a bomb 1000 times
_SMALL = 2**30  # bytes unpacked that no ratio is asked of


def extract(archive: Path, target: Path) -> list[Path]:
    """Unpack a zip into a folder that must not exist, which appears only when all of it is there.

    Returns:
        The files, sorted.

    Raises:
        DataError: it is no zip or damaged, or a member would leave the folder, is a link, comes twice, or unpacks to
            far more than it should.
        StorageError: the disk has not the room.
    """
    aside = target.with_name(f".{target.name}.part")
    try:
        with zipfile.ZipFile(archive) as opened:
            members = _checked(opened, archive)
            _need_room(sum(member.file_size for member in members), target.parent)
            for member in members:
                path = aside / member.filename
                path.parent.mkdir(parents=True, exist_ok=True)
                with opened.open(member) as source, path.open("wb") as sink:
                    shutil.copyfileobj(source, sink, 1 << 20)  # checks the CRC at the end
            aside.mkdir(parents=True, exist_ok=True)
            aside.rename(target)
    except (zipfile.BadZipFile, zlib.error, EOFError, NotImplementedError, RuntimeError) as err:
        raise DataError(f"{archive}: no readable zip archive ({err}). Next: download it again.") from err
    finally:
        shutil.rmtree(aside, ignore_errors=True)
    return sorted(path for path in target.rglob("*") if path.is_file())


def _checked(opened: zipfile.ZipFile, archive: Path) -> list[zipfile.ZipInfo]:
    members = [member for member in opened.infolist() if not member.is_dir()]
    seen: set[str] = set()
    for member in members:
        name = PurePosixPath(member.filename)
        kind = stat.S_IFMT(member.external_attr >> 16)
        odd = name.is_absolute() or ".." in name.parts or "\\" in member.filename or ":" in (name.parts or ":")[0]
        if odd or kind not in (0, stat.S_IFREG) or str(name).lower() in seen:
            raise DataError(
                f"{archive}: member {member.filename!r} leaves the folder, is a link or comes twice; nothing was "
                "unpacked. Next: do not use this archive."
            )
        seen.add(str(name).lower())
    unpacked, packed = sum(m.file_size for m in members), sum(m.compress_size for m in members)
    if unpacked > _SMALL and unpacked > _MAX_RATIO * max(packed, 1):
        raise DataError(
            f"{archive}: {packed:,} bytes would unpack to {unpacked:,}, more than {_MAX_RATIO} times; nothing was "
            "unpacked. Next: do not use this archive."
        )
    return members


def _need_room(size: int, folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(folder).free
    if size > 0.95 * free:
        raise StorageError(f"{folder}: {size:,} bytes to unpack, {free:,} free. Next: free some space.")
