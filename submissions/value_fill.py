"""What a submission of values holds where nothing is predicted, and the rows of a hidden test set's own sample.

Letters: T rows (nucleotides), C value columns.
"""

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from pipeline.competitions.base import Competition
from pipeline.errors import ConfigError, DataError
from pipeline.paths import Paths
from pipeline.runlog import amount, warn
from pipeline.schema import ALPHABET, encode
from submissions.layout import ListedKeys
from submissions.whole_rows import write_rows

_ANY = "any"  # letter


@dataclass(frozen=True, kw_only=True)
class Medians:
    """Of training's values, by letter: what is written where nothing is predicted."""

    of_letters: np.ndarray  # [4, C] float32
    of_all: np.ndarray  # [C] float32

    def of(self, sequences: str) -> np.ndarray:
        """[T, C] float32 for letters in a row."""
        return self.of_letters[encode(sequences)]


def medians_file(paths: Paths, name: str) -> Path:
    """Where a notebook's bundle puts them."""
    return paths.ensemble_dir(name) / "medians.json"


def read_medians(paths: Paths, competition: Competition, name: str) -> Medians:
    """Those that came with a notebook.

    Raises:
        ConfigError: there are none, or of other targets.
    """
    path = medians_file(paths, name)
    told = json.loads(path.read_text()) if path.is_file() else {}
    if told.get("targets") != list(competition.targets):
        raise ConfigError(f"submit: {competition.name} has nothing to fill in here. Next: leave --fill out.")
    values = {letter: np.array(told["medians"][letter], np.float32) for letter in (*ALPHABET, _ANY)}
    return Medians(of_letters=np.stack([values[letter] for letter in ALPHABET]), of_all=values[_ANY])


def take_own_rows(own: ListedKeys, part: Path, *, fmt: str, medians: Medians | None, decimals: int | None) -> None:
    """Give a written submission the rows of a hidden test set's own sample, in its order.

    Args:
        own: keys of the sample.
        part: submission of the test set's rows, which is replaced.
        fmt: "csv" or "parquet".
        medians: for rows of no test sequence.
        decimals: of a value in a CSV; None = all digits.

    Raises:
        DataError: there are such rows, and no medians.
    """
    (key,) = own.names
    table = pl.read_csv(part, infer_schema=False) if fmt == "csv" else pl.read_parquet(part)
    wanted = pl.DataFrame({key: pl.Series(own.block(0, own.rows)[key]).cast(table.schema[key])})
    found = wanted.join(table, on=key, how="left", maintain_order="left")
    lost = found.filter(pl.col(table.columns[1]).is_null())
    if lost.height and medians is None:
        raise DataError(
            f"sample submission: {key} {lost[key][0]!r} is of no test sequence ({amount(lost.height, 'such row')}); "
            "expected some. Next: give submit --fill, in a notebook."
        )
    if lost.height and medians is not None:
        warn(f"submit: {lost.height:,} of {own.rows:,} rows are of no test sequence: training's median of all letters")
        shown = medians.of_all.tolist() if fmt == "parquet" else [_text(x, decimals) for x in medians.of_all.tolist()]
        filled = zip(table.columns[1:], shown, strict=True)
        found = found.with_columns(pl.col(name).fill_null(pl.lit(x, table.schema[name])) for name, x in filled)
    write_rows(found, part, fmt=fmt)


def _text(value: float, decimals: int | None) -> str:
    return str(value) if decimals is None else f"{value:.{decimals}f}"
