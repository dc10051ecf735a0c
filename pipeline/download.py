"""Competition files from Kaggle into ``artifacts/<comp>/raw``: resumable, checked, and never half there.

A file gets its name when it is complete and looks like what it is called; ``manifest.json`` keeps its sha256, by which
a later run knows that it need not come again, and the data stage that nobody changed it.
"""

import contextlib
import json
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from pipeline import archive, kaggle_cli
from pipeline.competitions.base import Competition
from pipeline.errors import ConfigError, DataError, NetworkError
from pipeline.paths import Paths
from pipeline.runlog import Bar, say
from pipeline.stage import Report, sha256_file, write_json
from pipeline.training.stop import alone_in

_TIMEOUT_S = 12 * 3600.0
_MAGIC = {".zip": b"PK", ".parquet": b"PAR1", ".gz": b"\x1f\x8b"}
_MANIFEST = "manifest.json"
ALL = "all"


def run(competition: Competition, paths: Paths, *, files: Sequence[str] = ()) -> Report:
    """Fetch what is not there yet.

    Args:
        competition: whose files.
        paths: where ``raw`` is.
        files: names on Kaggle; empty = those that the data stage reads (of a labelled set all), ``("all",)`` = the
            whole archive, unpacked.

    Returns:
        ``current`` if everything was there and unchanged; outputs: the raw folder; facts: ``files``, ``bytes``.

    Raises:
        NetworkError: not reachable, no credentials, rules not accepted, a web page instead of data (exit code 6).
        DataError: an archive that must not be unpacked (3).
        ConfigError: a name with a folder in it (2).
    """
    competition.require_kaggle("download")
    started = time.monotonic()
    wanted = list(files or competition.files or [ALL])
    for name in wanted:
        if Path(name).name != name:
            raise ConfigError(f"FILES={name!r}: expected names without folders, or all. Next: FILES={Path(name).name}.")
    with alone_in(paths.raw, what="downloads into it"):  # two clients would write one file
        manifest = _read_manifest(paths.raw)
        missing = [name for name in wanted if not _intact(paths.raw, manifest, name)]
        for name in missing:
            for path in _fetch(competition, paths.raw, name):
                entry = {"sha256": sha256_file(path), "bytes": path.stat().st_size, "asked": name}
                manifest[str(path.relative_to(paths.raw))] = entry
            write_json(paths.raw / _MANIFEST, {"files": manifest})
    total = sum(entry["bytes"] for entry in manifest.values())
    facts = {"files": sorted(manifest), "bytes": total}
    status: Any = "built" if missing else "current"
    seconds = time.monotonic() - started
    return Report(stage="download", status=status, outputs={"raw": paths.raw}, facts=facts, seconds=seconds)


def _fetch(competition: Competition, raw: Path, name: str) -> list[Path]:
    """Download one file (or all as one archive), check it, and give what came its place."""
    incoming = raw / ".incoming" / name
    incoming.mkdir(parents=True, exist_ok=True)
    for left in filter(Path.is_dir, incoming.iterdir()):  # by a run that was killed while it unpacked
        shutil.rmtree(left)
    what = f"download of {name} of {competition.slug}"
    only = [] if name == ALL else ["-f", name]
    with Bar(f"download {name}", unit="MiB") as bar:
        shown = 0

        def watch() -> None:
            nonlocal shown
            with contextlib.suppress(FileNotFoundError):  # the client removes its marker between listing and looking
                size = sum(path.stat().st_size for path in incoming.iterdir()) >> 20
                bar.advance(size - shown)
                shown = size

        request = ["competitions", "download", competition.slug, *only, "-p", str(incoming), "-q"]
        answer = kaggle_cli.call(*request, timeout=_TIMEOUT_S, on_wait=watch)
    came = list(incoming.iterdir())
    if answer.code != 0 or len(came) != 1:  # with a marker beside it, a file is not complete
        raise kaggle_cli.explain(answer, what=what, slug=competition.slug)
    _need_data(came[0], what=what, slug=competition.slug)
    placed = _unpack(came[0], raw) if name == ALL else [came[0].replace(raw / came[0].name)]
    incoming.rmdir()
    with contextlib.suppress(OSError):  # another file may be on its way
        incoming.parent.rmdir()
    say(f"{what}: {sum(path.stat().st_size for path in placed):,} bytes")
    return placed


def _unpack(packed: Path, raw: Path) -> list[Path]:
    """Unpack the whole archive into the raw folder; what is there under a name that comes is replaced."""
    aside = packed.with_suffix("")
    placed = []
    for path in archive.extract(packed, aside):
        target = raw / path.relative_to(aside)
        if target == raw / _MANIFEST:
            raise DataError(f"{packed}: holds a {_MANIFEST} of its own. Next: make download FILES='…' by name.")
        target.parent.mkdir(parents=True, exist_ok=True)
        placed.append(path.replace(target))
    shutil.rmtree(aside)
    packed.unlink()
    return placed


def _need_data(path: Path, *, what: str, slug: str) -> None:
    """Refuse a login or error page, and what does not begin as its name says; the file is removed."""
    with path.open("rb") as handle:
        head = handle.read(512)
    is_page = head.lstrip().lower().startswith((b"<!doctype html", b"<html"))
    wrong = not head.startswith(_MAGIC.get(path.suffix, b""))
    if is_page or wrong or not head:
        path.unlink()  # else the next run would take it for complete
        got = "a web page" if is_page else "an empty file" if not head else f"bytes {head[:8]!r}"
        raise NetworkError(
            f"{what}: got {got}; expected {path.suffix.lstrip('.') or 'data'}. "
            f"Next: log in and accept the rules at {kaggle_cli.PAGE}/competitions/{slug}/rules, then run this again."
        )


def _read_manifest(raw: Path) -> dict[str, Any]:
    """Local name -> ``sha256, bytes, asked``; empty where there is none that can be read."""
    try:
        return dict(json.loads((raw / _MANIFEST).read_text())["files"])
    except (OSError, ValueError, KeyError, TypeError):
        return {}


def _intact(raw: Path, manifest: dict[str, Any], name: str) -> bool:
    """Whether all that came for a name, alone or in the whole archive, is there with the bytes that came."""
    entries = [(raw / local, entry) for local, entry in manifest.items() if name in (local, entry.get("asked"))]
    return bool(entries) and all(
        path.is_file() and path.stat().st_size == entry["bytes"] and sha256_file(path) == entry["sha256"]
        for path, entry in entries
    )
