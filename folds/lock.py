"""Locks: committed digests that say which fold table belongs to which data.

``folds/locks/<comp>-<split>-<first 8 hex digits of the data's digest>.json``. A lock holds digests and counts, no
sequence and no id, so it may be published when the data may not.
"""

import hashlib
import json
from collections.abc import Iterable, Mapping
from itertools import zip_longest
from pathlib import Path
from typing import Any

from pipeline.errors import DataError
from pipeline.paths import REPOSITORY
from pipeline.stage import write_json

LOCKS = REPOSITORY / "folds" / "locks"

_MADE_BY = ("method", "seed", "version")
#: Facts of the folds stage that a lock keeps.
KEPT = ("comp", "split", "data_digest", "fold_digest", "counts", "clusters", "largest_cluster", *_MADE_BY)


def digest_pairs(first: Iterable[str], second: Iterable[Any]) -> str:
    """Hex sha256 over ``first <tab> second`` lines in sorted order: independent of the rows' order.

    >>> digest_pairs(["b", "a"], [1, 0]) == digest_pairs(["a", "b"], [0, 1])
    True
    """
    digest = hashlib.sha256()
    for left, right in sorted(zip(first, second, strict=True)):
        digest.update(f"{left}\t{right}\n".encode())
    return digest.hexdigest()


def lock_path(facts: Mapping[str, Any], *, locks: Path) -> Path:
    """Where the lock of a split of these data is, or would be."""
    return locks / f"{facts['comp']}-{facts['split']}-{facts['data_digest'][:8]}.json"


def write_lock(facts: Mapping[str, Any], *, locks: Path) -> Path:
    """Write the lock of a fold table and return its path."""
    path = lock_path(facts, locks=locks)
    write_json(path, {key: facts[key] for key in KEPT})
    return path


def verify_lock(facts: Mapping[str, Any], *, locks: Path) -> bool:
    """Compare a fold table with the lock for its data; False if there is none.

    Raises:
        DataError: the lock is not readable, or says otherwise.
    """
    path = lock_path(facts, locks=locks)
    if not path.is_file():
        return False
    try:
        lock = json.loads(path.read_text())
        same = all(lock[key] == facts[key] for key in ("data_digest", "fold_digest", "counts"))
    except (json.JSONDecodeError, KeyError, TypeError) as err:
        raise DataError(f"{path.name}: not a lock ({err}). Next: restore the file, or make folds RELOCK=1.") from err
    if not same:
        raise DataError(
            f"{path.name}: {_difference(lock, facts)}. Next: find out what changed the folds (old scores do not "
            "compare with new ones), or accept them with make folds RELOCK=1."
        )
    return True


def _difference(lock: Mapping[str, Any], facts: Mapping[str, Any]) -> str:
    made = [f"{key} {facts[key]} against {lock.get(key)}" for key in _MADE_BY if facts[key] != lock.get(key)]
    why = f" (made with {', '.join(made)})" if made else ""
    for fold, (got, expected) in enumerate(zip_longest(facts["counts"], lock["counts"], fillvalue=0)):
        if got != expected:
            return f"fold {fold} has {got:,} sequences, the lock says {expected:,}{why}"
    what = "fold_digest" if facts["data_digest"] == lock["data_digest"] else "data_digest"
    return f"every fold has as many sequences as the lock says, but {what} differs{why}"
