"""The one way in which a stage turns input files into output files.

A stage is built only when its inputs (by sha256), its parameters or its outputs changed; it writes under temporary
names, and its outputs get their final names and a manifest only when all of them are complete.
"""

import contextlib
import errno
import functools
import hashlib
import json
import os
import platform
import re
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any, Literal, TypeVar

from pipeline.errors import DataError, StorageError
from pipeline.paths import IS_CHECKOUT, REPOSITORY, how_to_make

Item = TypeVar("Item")

#: Numbers of the system's errors that say that a disk, or one's share of it, is full.
DISK_FULL = (errno.ENOSPC, errno.EDQUOT)
_VERSIONED = ("numpy", "polars", "pyarrow", "torch", "numba", "ViennaRNA")


@dataclass(frozen=True, kw_only=True)
class Report:
    """What a stage did: ``built`` now, or found ``current`` from an earlier time."""

    stage: str
    status: Literal["built", "current"]
    outputs: dict[str, Path]
    facts: dict[str, Any] = field(default_factory=dict)
    seconds: float = 0.0


def run_stage(
    name: str,
    *,
    inputs: Mapping[str, Path],
    outputs: Mapping[str, Path],
    params: Mapping[str, Any],
    build: Callable[[dict[str, Path]], dict[str, Any]],
    either: Sequence[str] = (),
    manifest: Path | None = None,
    notes: Mapping[str, Any] | None = None,
    force: bool = False,
) -> Report:
    """Build `outputs` from `inputs`, or say that they are current.

    Args:
        name: verb of the stage; also names the manifest, ``<name>.manifest.json`` beside the first output.
        inputs: label -> existing file. Their sha256 decides whether the outputs are current.
        outputs: label -> final path.
        params: JSON-able settings that the outputs depend on, a ``version`` of the stage's code among them.
        build: takes label -> temporary path for every output, writes them all, returns JSON-able facts.
        either: labels of outputs of which it writes one; what an earlier build wrote under the others is removed.
        manifest: where the manifest goes, if not beside the first output.
        notes: JSON-able, kept in the manifest; the outputs do not depend on them.
        force: build even if current.

    Raises:
        DataError: an input is missing or cannot be read, became another one meanwhile, or is a clean table that is not
            what the data stage wrote.
        StorageError: the disk is full; nothing is left behind.
    """
    manifest = manifest or next(iter(outputs.values())).parent / f"{name}.manifest.json"
    for label, path in inputs.items():
        if not path.is_file():
            raise DataError(f"{name}: {label} file {path} is missing. Next: {how_to_make(path)}.")
    try:  # an archive may stand under several labels
        seen = {path: _state(path) for path in set(inputs.values())}
        digests = {path: sha256_file(path) for path in set(inputs.values())}
    except OSError as err:
        raise DataError(
            f"{name}: {err.filename}: cannot be read: {err.strerror}. Next: check its permissions."
        ) from err
    for path, digest in digests.items():
        require_clean_as_written(path, digest)
    wanted = {
        "stage": name,
        "params": json.loads(json.dumps(dict(params), allow_nan=False)),
        "inputs": {label: digests[path] for label, path in sorted(inputs.items())},
    }
    if not force:
        done = read_manifest(manifest)
        if done and all(done.get(key) == wanted[key] for key in wanted) and _intact(done, outputs, either):
            if done.get("notes", {}) != (notes or {}):
                with contextlib.suppress(OSError):  # on a read-only disk it is current all the same
                    _write_manifest(manifest, done | {"notes": notes})
            return Report(stage=name, status="current", outputs=_written(outputs, either), facts=done["facts"])

    def build_of_these(parts: dict[str, Path]) -> dict[str, Any]:
        facts = build(parts)
        for path, digest in digests.items():  # a mixture of two would pass for what was made of one of them
            if _state(path) not in (None, seen[path]) and sha256_file(path) != digest:
                raise DataError(f"{name}: {path} was written anew while it was read. Next: the same command again.")
        return facts

    started = time.monotonic()
    facts = _build(outputs, build_of_these, either)
    outputs = _written(outputs, either)
    record = wanted | {
        "outputs": {label: sha256_file(path) for label, path in sorted(outputs.items())},
        "facts": json.loads(json.dumps(facts, allow_nan=False)),
        **({"notes": notes} if notes else {}),
        "versions": versions(),
        "commit": commit(),
        "seconds": round(time.monotonic() - started, 3),
    }
    _write_manifest(manifest, record)
    return Report(stage=name, status="built", outputs=outputs, facts=record["facts"], seconds=record["seconds"])


def _state(path: Path) -> tuple[int, ...] | None:
    """What changes when a file is written or replaced; None = it is gone."""
    try:
        told = path.stat()
    except FileNotFoundError:
        return None
    return told.st_dev, told.st_ino, told.st_size, told.st_mtime_ns


def _written(outputs: Mapping[str, Path], either: Sequence[str]) -> dict[str, Path]:
    """The outputs that there are, all but those of which another one was written."""
    return {label: path for label, path in outputs.items() if label not in either or path.is_file()}


def _write_manifest(path: Path, record: Mapping[str, Any]) -> None:
    # not sorted: people read the facts, of a second run too, in the order in which the stage told them
    write_text(path, json.dumps(record, indent=2, allow_nan=False) + "\n")


def _build(
    outputs: Mapping[str, Path], build: Callable[[dict[str, Path]], dict[str, Any]], either: Sequence[str]
) -> dict[str, Any]:
    parts = {}
    for label, path in outputs.items():
        path.parent.mkdir(parents=True, exist_ok=True)
        parts[label] = path.with_name(f".{path.name}.part-{os.getpid()}")
        sweep(path)
    try:
        facts = build(dict(parts))
        written = _written(parts, either)
        for label, part in written.items():
            if not part.is_file():
                raise AssertionError(f"the stage promised {label} and did not write it")
            fsync(part)
        for label, path in outputs.items():
            if label in written:
                parts[label].replace(path)
            else:
                path.unlink(missing_ok=True)
        return facts
    except Exception as err:
        if is_disk_full(err):
            where = getattr(err, "filename", None) or path
            raise StorageError(f"{where}: the disk is full. Next: free space and run again.") from err
        raise
    finally:
        for path in outputs.values():
            sweep(path)


def is_disk_full(err: Exception) -> bool:
    """Whether an error is that of a full disk; polars says so in the text alone, numpy how much it wrote.

    >>> is_disk_full(ValueError("parquet: underlying IO error: No space left on device (os error 28)"))
    True
    >>> is_disk_full(OSError("480 requested and 396 written")), is_disk_full(OSError(errno.EIO, "Input/output error"))
    (True, False)
    """
    told = re.search(r"\(os error (\d+)\)", str(err))
    number = int(told[1]) if told else getattr(err, "errno", None)
    return number in DISK_FULL or (isinstance(err, OSError) and "requested and" in str(err))


def sweep(path: Path) -> None:
    """Remove what this process or a killed one left half-written beside `path`; another living one keeps its own.

    A part may be a folder, and may have scratch of its own beside it, named ``<part>.<anything>`` or, while JSON is
    written to it, as its own part. In containers a process often has the number of the one before it, so what bears
    this process's own is swept too.
    """
    for start in (f".{path.name}.part-", f"..{path.name}.part-"):
        for part in path.parent.glob(f"{start}*"):
            pid = part.name.removeprefix(start).partition(".")[0]
            if not pid.isdigit() or int(pid) == os.getpid() or not is_alive(int(pid)):
                if part.is_dir():
                    shutil.rmtree(part, ignore_errors=True)
                else:
                    with contextlib.suppress(OSError):  # another user's
                        part.unlink()


def is_alive(pid: int) -> bool:
    """Whether a process of this machine exists, whoever owns it."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True


def read_manifest(path: Path) -> dict[str, Any] | None:
    """A manifest, or None where there is none that this program could have written."""
    try:
        done = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):  # not there, no JSON or no text
        return None
    if not isinstance(done, dict) or "facts" not in done:
        return None
    done = {"params": {}, "inputs": {}, "outputs": {}} | done
    return done if all(isinstance(done[key], dict) for key in ("params", "inputs", "outputs", "facts")) else None


def _intact(done: Mapping[str, Any], outputs: Mapping[str, Path], either: Sequence[str]) -> bool:
    recorded, there = done.get("outputs", {}), _written(outputs, either)
    return set(recorded) == set(there) and all(
        path.is_file() and sha256_file(path) == recorded[label] for label, path in there.items()
    )


def take_until(items: Sequence[Item], end: float | None) -> Iterator[Item]:
    """Items as long as there is time: none is begun after `end`, on `time.monotonic`'s clock (None = no end).

    >>> list(take_until([3, 1, 2], None)), list(take_until([3, 1, 2], time.monotonic()))
    ([3, 1, 2], [])
    """
    for item in items:
        if end is not None and time.monotonic() >= end:
            return
        yield item


def tell_left_out(facts: Mapping[str, Any]) -> str:
    """Which targets a stage had no time for, in one line.

    >>> tell_left_out({"targets": 3, "left_out": ["R1", "R2"]})
    '1 of 3 targets predicted; left out: R1, R2'
    """
    left = facts["left_out"]
    some = f"; left out: {', '.join(left[:5])}{', …' if len(left) > 5 else ''}" if left else ""
    return f"{facts['targets'] - len(left)} of {facts['targets']} targets predicted{some}"


def read_result(path: Path, *, hint: str, manifest: Path | None = None) -> dict[str, Any]:
    """A JSON file that a stage wrote.

    Args:
        path: the file.
        hint: which command writes it.
        manifest: of the stage; where it is there, the file must still be what it was then.

    Raises:
        DataError: the file is missing, unreadable, or was changed or damaged since.
    """
    try:
        told = json.loads(path.read_text())
    except (FileNotFoundError, ValueError) as err:  # not there, no JSON or no text
        raise DataError(f"{path}: missing or unreadable. Next: {hint}.") from err
    done = read_manifest(manifest) if manifest else None
    if not isinstance(told, dict) or (done and sha256_file(path) not in done.get("outputs", {}).values()):
        raise DataError(f"{path}: not what its stage wrote: damaged or edited since. Next: {hint}.")
    return told


def require_as_written(path: Path, digest: str, *, manifest: Path, label: str) -> None:
    """Refuse a table that is not the one that its stage wrote: a single bit can be another value, and still be read.

    Args:
        path: the table.
        digest: its sha256.
        manifest: of the stage; where there is none, nothing is known.
        label: of the table there.

    Raises:
        DataError: the manifest has another digest.
    """
    done = read_manifest(manifest)
    if done and done["outputs"].get(label, digest) != digest:
        raise DataError(f"{path}: not what its stage wrote: damaged or edited since. Next: {how_to_make(path)}.")


def require_clean_as_written(path: Path, digest: str) -> None:
    """`require_as_written` of a clean table, or of another file beside a manifest of the data stage."""
    require_as_written(path, digest, manifest=path.with_name("data.manifest.json"), label=path.stem)


def sha256_file(path: Path) -> str:
    """Hex sha256 of a file's bytes."""
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, "sha256").hexdigest()


def fsync(path: Path) -> None:
    """Ask the system to put a file's bytes on the disk."""
    with path.open("rb") as handle:
        os.fsync(handle.fileno())


def write_json(path: Path, value: Any) -> None:
    """Write JSON atomically, see `write_text`. NaN is refused."""
    write_text(path, json.dumps(value, indent=2, sort_keys=True, allow_nan=False, default=str) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write text atomically, see `write_bytes`."""
    write_bytes(path, text.encode())


def write_bytes(path: Path, data: bytes) -> None:
    """Write a file atomically: readers see the old one or the new one.

    Raises:
        OSError: naming the file also where the system does not, as of a full disk.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".{path.name}.part-{os.getpid()}")
    try:
        part.write_bytes(data)
        fsync(part)
        part.replace(path)
    except OSError as err:
        err.filename = err.filename or str(path)
        raise
    finally:
        sweep(path)


def versions() -> dict[str, str]:
    """Versions of Python and of the packages that can change a number."""
    found = {package: _version(package) for package in _VERSIONED}
    return {"python": platform.python_version()} | {package: said for package, said in found.items() if said}


@functools.cache  # 3 ms for all, of every stage
def _version(package: str) -> str:
    """What is installed; "" if it is not."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return ""


def commit() -> str:
    """Short hash of the checkout this code runs from, with ``+dirty`` if files changed; "" outside git.

    The log of scores does not count: `submissions.evaluate` itself adds a line to it.
    """
    if not IS_CHECKOUT:  # around installed packages there may be somebody else's
        return ""
    git = ["git", "--no-optional-locks", "-C", str(REPOSITORY)]  # or a commit that is made meanwhile fails
    try:
        head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True)
        changed = [*git, "status", "--porcelain", "--", ":!submissions/LOG.md"]
        dirty = subprocess.run(changed, capture_output=True, text=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        return ""
    return head.stdout.strip() + ("+dirty" if dirty.stdout.strip() else "")
