"""What runs without a network read, and the tables of candidates that they write like a network.

Letters: K candidate pairs, L length (nt), 3 xyz. Lengths in Å.
"""

from collections.abc import Iterable
from datetime import date
from pathlib import Path
from typing import Any, Literal

import numpy as np
import polars as pl

from pipeline import tables
from pipeline.paths import Paths
from pipeline.tables import open_parquet

_SCHEMA: dict[str, Any] = {
    "sequence_id": pl.String,
    "candidate": pl.UInt8,
    "confidence": pl.Float32,
    **dict.fromkeys("xyz", pl.List(pl.Float32)),
}


def read_folds(paths: Paths, split: str) -> dict[str, int]:
    """Training target -> fold, in the order of their names."""
    targets = [name for name, _, _ in read_targets(paths, "train")]
    return dict(tables.read_folds(paths.fold_table(split), targets).iter_rows())


def read_targets(paths: Paths, table: str) -> list[tuple[str, str, date | None]]:
    """(id, sequence, cutoff) of the targets of a clean table, in the order of their ids."""
    columns = ["sequence_id", "sequence", "temporal_cutoff"]
    open_parquet(paths.clean(table), columns).close()
    return pl.read_parquet(paths.clean(table), columns=columns).sort("sequence_id").rows()


def read_pairs(path: Path, sequences: Iterable[str]) -> dict[str, tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """Sequence -> first residues, second residues and probabilities of its pairs, each [K]; empty without the table."""
    if not path.is_file():
        return {}
    open_parquet(path, ("sequence", "i", "j", "p")).close()
    asked = pl.col("sequence").is_in(sorted(set(sequences)))
    table = pl.scan_parquet(path).filter(asked).select("sequence", "i", "j", "p").collect()
    return {
        letters: (np.array(i, np.int64), np.array(j, np.int64), np.array(p, np.float64))
        for letters, i, j, p in table.iter_rows()
    }


def correlation(x_N: np.ndarray, y_N: np.ndarray) -> float:
    """Pearson's, of expected and found scores say; 0 where one of the two never varies, NaN is no JSON.

    >>> round(correlation(np.array([0.1, 0.2, 0.4]), np.array([0.2, 0.4, 0.8])), 6)
    1.0
    >>> correlation(np.full(3, 0.1), np.full(3, 0.1))
    0.0
    """
    if np.ptp(x_N) == 0 or np.ptp(y_N) == 0:
        return 0.0
    covariance = np.mean((x_N - x_N.mean()) * (y_N - y_N.mean()))
    return float(covariance / (x_N.std() * y_N.std()))


class CandidateRows:
    """Rows of candidates, fold by fold, until they are written.

    Args:
        folds: of which each gets a table, be it empty.
    """

    def __init__(self, folds: Iterable[int]) -> None:
        self._rows: dict[int, list[dict[str, Any]]] = {fold: [] for fold in folds}

    def add(self, target_id: str, fold: int, candidates: Iterable[tuple[float, np.ndarray]]) -> None:
        """Give a held-out target its candidates: expected TM-score and trace [L, 3] Å of each, best first."""
        for place, (expected, xyz_L3) in enumerate(candidates, start=1):
            self._append(target_id, fold, place, expected, xyz_L3)

    def deal(self, target_id: str, candidates: Iterable[tuple[float, np.ndarray]]) -> None:
        """Deal the candidates of a test target to the folds in turn, so that joining the folds gives different ones."""
        folds = list(self._rows)
        for number, (expected, xyz_L3) in enumerate(candidates):
            place, turn = divmod(number, len(folds))
            self._append(target_id, folds[turn], place + 1, expected, xyz_L3)

    def _append(self, target_id: str, fold: int, place: int, expected: float, xyz_L3: np.ndarray) -> None:
        key = {"sequence_id": target_id, "candidate": place, "confidence": float(expected)}
        self._rows[fold].append(key | dict(zip("xyz", xyz_L3.T.tolist(), strict=True)))

    def write(self, parts: dict[str, Path], table: Literal["oof", "test"]) -> None:
        """Write ``fold<k>/<table>`` of every fold; the table of held-out targets has a column ``fold``."""
        for fold, rows in self._rows.items():
            found = pl.DataFrame(rows, schema=_SCHEMA).sort("sequence_id", "candidate")
            if table == "oof":
                found.insert_column(1, pl.repeat(fold, found.height, dtype=pl.UInt8, eager=True).alias("fold"))
            found.write_parquet(parts[f"fold{fold}/{table}"], compression="zstd", row_group_size=320)
