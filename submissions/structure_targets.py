"""Predicted targets whose structure is known, read and checked: traces, letters, chains, and what is from templates.

Letters: M candidates, R references, L residues, 3 xyz; lengths in Å.
"""

import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import polars as pl

from pipeline.errors import DataError
from pipeline.paths import Paths
from pipeline.tables import open_parquet
from submissions.tm_score import resolved

#: How the names of runs begin whose candidates are copied from templates.
TEMPLATES = "templates."

_AXES = ["x", "y", "z"]


@dataclass(frozen=True, kw_only=True)
class Target:
    """What is predicted of a target, and what is known."""

    name: str
    predicted_ML3: np.ndarray
    known_RL3: np.ndarray
    letters: str  # N where no clean table tells them
    is_named: bool  # whether one does
    chains: list[str]  # their sequences; none where no order has to be chosen
    templates: int | None  # candidates that were copied from templates

    @property
    def length(self) -> int:
        return self.known_RL3.shape[1]


def read_targets(paths: Paths, predictions: Path) -> tuple[list[Target], list[str]]:
    """The predicted targets whose structure is known, by name, and the names of the others.

    Args:
        paths: where the clean tables are.
        predictions: parquet with ``sequence_id, candidate, x, y, z``, and ``source`` if it tells whose they are.

    Raises:
        DataError: a table is missing or damaged, the tables contradict each other, or no predicted target is known.
    """
    known = read_traces(paths.clean("references"), member="conformer", finite=False)
    predicted = read_traces(predictions, member="candidate", finite=True)
    common = sorted(set(known) & set(predicted))
    if not common:
        raise DataError(
            f"{predictions}: none of its {len(predicted)} targets has a known structure in "
            f"{paths.clean('references')}. Next: add validation_labels.csv to the raw files, or evaluate the folds."
        )
    for name in common:
        got, expected = predicted[name].shape[1], known[name].shape[1]
        if got != expected:
            raise DataError(
                f"{predictions}: {name} has {got} residues, its reference {expected}. "
                "Next: predict again from the present clean tables."
            )
    letters, chains, templates = _sequences(paths), _chains(paths), _templates(predictions)
    for name in common:
        if name in letters and len(letters[name]) != known[name].shape[1]:
            raise DataError(
                f"{predictions}: {name} has {known[name].shape[1]} residues, its sequence {len(letters[name])}. "
                "Next: make data, and predict again."
            )
    targets = [
        Target(
            name=name,
            predicted_ML3=predicted[name],
            known_RL3=known[name],
            letters=letters.get(name, "N" * known[name].shape[1]),
            is_named=name in letters,
            chains=_copies(chains.get(name, []), letters.get(name, ""), known[name].shape[1]),
            templates=templates.get(name),
        )
        for name in common
    ]
    return targets, sorted(set(predicted) - set(known))


def _sequences(paths: Paths) -> dict[str, str]:
    """sequence_id -> letters, of the clean tables that are there."""
    found: dict[str, str] = {}
    for path in (paths.clean("test"), paths.clean("train")):
        if path.is_file():
            open_parquet(path, ["sequence_id", "sequence"]).close()
            table = _columns(path, {"sequence_id": pl.String(), "sequence": pl.String()})
            found |= dict(table.drop_nulls().iter_rows())
    return found


def _chains(paths: Paths) -> dict[str, list[int]]:
    """sequence_id -> length of every chain, of targets with several copies of one.

    The labels of part 2 tell the copy of every residue; where they do not, the stoichiometry does.
    """
    found: dict[str, list[int]] = {}
    for path in (paths.clean("test"), paths.clean("train")):
        if path.is_file() and "chain_lengths" in pl.read_parquet_schema(path):
            table = _columns(path, {"sequence_id": pl.String(), "chain_lengths": pl.List(pl.Int64)})
            found |= dict(table.filter(pl.col("chain_lengths").list.len() > 1).iter_rows())
    path = paths.clean("references")
    if {"chain", "copy"} <= set(pl.read_parquet_schema(path)):
        types = {"sequence_id": pl.String(), "chain": pl.List(pl.String), "copy": pl.List(pl.Int64)}
        table = _columns(path, types).drop_nulls()
        for name, chain, copy in table.unique("sequence_id", keep="first").iter_rows():
            if max((number for number in copy if number is not None), default=1) > 1:
                found[name] = [len(list(run)) for _, run in itertools.groupby(zip(chain, copy, strict=True))]
            else:
                found.pop(name, None)
    return found


def _copies(lengths: Sequence[int], letters: str, residues: int) -> list[str]:
    """Sequences of the chains; none where no two are alike, or where the letters are not known."""
    if sum(lengths) != residues or len(letters) != residues:
        return []
    ends = list(itertools.accumulate(lengths))
    chains = [letters[end - length : end] for end, length in zip(ends, lengths, strict=True)]
    return chains if len(set(chains)) < len(chains) else []


def _templates(predictions: Path) -> dict[str, int]:
    """sequence_id -> candidates from templates; nothing if the table does not tell whose they are."""
    if "source" not in pl.read_parquet_schema(predictions):
        return {}
    table = _columns(predictions, {"sequence_id": pl.String(), "source": pl.String()})
    copied = pl.col("source").str.starts_with(TEMPLATES).sum().cast(pl.Int64)
    return dict(table.group_by("sequence_id").agg(copied).iter_rows())


def read_traces(path: Path, *, member: str, finite: bool) -> dict[str, np.ndarray]:
    """sequence_id -> [M, L, 3] Å in the order of `member`, NaN where null.

    Raises:
        DataError: the table is missing or damaged, or contradicts itself; or, if `finite`, a coordinate is missing.
    """
    open_parquet(path, ("sequence_id", member, *_AXES)).close()
    table = _columns(path, {"sequence_id": pl.String(), member: pl.Int64()} | dict.fromkeys(_AXES, pl.List(pl.Float64)))
    traces = {}
    for (target,), rows in table.sort("sequence_id", member).group_by(["sequence_id"], maintain_order=True):
        if rows[member].is_duplicated().any():
            raise DataError(f"{path}: {target} has a {member} twice. Next: run the stage that writes it again.")
        lists = [[values or [] for values in rows[axis].to_list()] for axis in _AXES]
        if len({len(values) for axis in lists for values in axis}) != 1:
            raise DataError(f"{path}: {target} has lists of different lengths. Next: run its stage again.")
        xyz_ML3 = np.stack([np.array(axis, dtype=np.float64) for axis in lists], axis=-1)
        if finite and not resolved(xyz_ML3.reshape(-1, 3)).all():
            raise DataError(
                f"{path}: {target} has a coordinate that is null or not finite or a sentinel. Next: predict again."
            )
        traces[str(target)] = xyz_ML3
    return traces


def _columns(path: Path, types: dict[str, pl.DataType]) -> pl.DataFrame:
    """Some columns of a table, in these types."""
    try:
        return pl.read_parquet(path, columns=list(types)).cast(pl.Schema(types))
    except (pl.exceptions.PolarsError, OSError) as err:
        reason = str(err).splitlines()[0]
        raise DataError(f"{path}: {', '.join(types)} cannot be read ({reason}). Next: run its stage again.") from err
