"""The rows of a submission of structures: five candidates of every residue, side by side."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from pipeline.competitions.base import Competition
from pipeline.errors import DataError
from pipeline.paths import Paths
from pipeline.schema import CANDIDATES, split_id
from pipeline.tables import finite_values, read_batches
from submissions.layout import (
    MAX_SUBMITTED,
    Layout,
    ResidueKeys,
    layout_of,
    moved_into_range,
    read_sample,
    value_columns,
)
from submissions.structure_scores import trivial_shapes
from submissions.whole_rows import write_rows

#: Decimals of a coordinate, as in a PDB file, Å.
DECIMALS = 3


def write_structures(
    paths: Paths, competition: Competition, predictions: Path, part: Path, *, fmt: str, fill: bool
) -> tuple[Layout, dict[str, Any]]:
    """Write a submission of structures, a row a residue, in the order of the sample submission.

    With `fill`, what is not predicted is completed with shapes that know nothing but the length; the table of
    predictions may be absent then.

    Raises:
        DataError: a residue or a candidate is missing, or a coordinate is not finite.
    """
    sample = read_sample(paths.clean("sample"))
    layout = layout_of(competition, ResidueKeys(sample))
    if not sample.height:  # a hidden test set of nothing: a file that says so is whole
        write_rows(pl.DataFrame(schema=dict.fromkeys(layout.columns, pl.String)), part, fmt=fmt)
        return layout, {"sequences": 0}
    tests = pl.concat(list(read_batches(paths.clean("test"), ["sequence_id", "sequence"])))
    long = _read_candidates(predictions, tests, competition, fill=fill)
    coordinates = _wide_coordinates(long, predictions, tests, competition)
    targets = [split_id(key) for key in sample["ID"].to_list()]
    keyed = sample.with_columns(
        pl.Series("sequence_id", [target for target, _ in targets]),
        pl.Series("resid_of_id", [row for _, row in targets]),
    )
    table = keyed.join(
        coordinates,
        left_on=["sequence_id", "resid_of_id"],
        right_on=["sequence_id", "position"],
        how="left",
        validate="m:1",  # the sample of a hidden test set may have a row twice
        maintain_order="left",
    )
    lost = table.filter(pl.col(layout.values[0]).is_null())
    if lost.height:
        raise DataError(
            f"{predictions}: no coordinates for {lost['ID'][0]} ({lost.height:,} rows of the sample submission); "
            "expected a prediction for every residue. Next: make predict, then make ensemble."
        )
    write_rows(table.select(layout.columns), part, fmt=fmt, decimals=DECIMALS)
    return layout, {"sequences": tests.height}


def _read_candidates(predictions: Path, tests: pl.DataFrame, competition: Competition, *, fill: bool) -> pl.DataFrame:
    """sequence_id, candidate, x, y, z, sequence: a row per candidate of the test sequences."""
    columns = ["sequence_id", "candidate", *competition.targets]
    frames = list(read_batches(predictions, columns)) if predictions.is_file() or not fill else []
    if fill:
        known = pl.concat([*frames, pl.DataFrame(schema=dict.fromkeys(columns[:2], pl.Null))], how="diagonal_relaxed")
        frames.append(_fill(tests, dict(known.group_by("sequence_id").len().iter_rows()), competition))
    return pl.concat(frames, how="vertical_relaxed").join(tests, on="sequence_id", how="inner", validate="m:1")


def _fill(tests: pl.DataFrame, known: Mapping[str, int], competition: Competition) -> pl.DataFrame:
    """Candidates that every sequence lacks, of which `known` has so many: shapes that know nothing but the length."""
    rows: list[dict[str, Any]] = []
    for name, sequence in tests.select("sequence_id", "sequence").iter_rows():
        have = known.get(name, 0)
        shapes = _plain_shapes(len(sequence)) if have < CANDIDATES else []
        for number, xyz_L3 in enumerate(shapes[: CANDIDATES - have], start=have + 1):
            axes = dict(zip(competition.targets, xyz_L3.T.tolist(), strict=True))
            rows.append({"sequence_id": name, "candidate": number} | axes)
    kinds = {"sequence_id": pl.String, "candidate": pl.UInt8} | dict.fromkeys(competition.targets, pl.List(pl.Float32))
    return pl.DataFrame(rows, schema=kinds)


def _plain_shapes(length: int) -> list[np.ndarray]:
    """Hairpin, helix and five walks, the best of them first; without those too long for the file's coordinates."""
    shapes = trivial_shapes(length)
    traces = [*shapes["hairpin"], *shapes["A-form helix"], *shapes["random walks"]]
    return [xyz_L3 for xyz_L3 in map(moved_into_range, traces) if xyz_L3.max() < MAX_SUBMITTED]


def _wide_coordinates(
    long: pl.DataFrame, predictions: Path, tests: pl.DataFrame, competition: Competition
) -> pl.DataFrame:
    """sequence_id, position (1-based), x_1 … z_5: a row per residue of every predicted sequence."""
    axes = competition.targets
    wide: pl.DataFrame | None = None
    for number in range(1, CANDIDATES + 1):
        one = long.filter(pl.col("candidate") == number).sort("sequence_id")
        lost = tests.join(one, on="sequence_id", how="anti", maintain_order="left")
        if lost.height:
            raise DataError(
                f"{predictions}: {lost['sequence_id'][0]} has no candidate {number}; expected {CANDIDATES} of every "
                "test sequence. Next: make predict, then make ensemble."
            )
        lengths_N = one["sequence"].str.len_bytes().to_numpy().astype(np.int64)
        xyz_TC = finite_values(one, lengths_N, targets=axes, where=str(predictions))
        xyz_TC = np.concatenate([moved_into_range(xyz_L3) for xyz_L3 in np.split(xyz_TC, np.cumsum(lengths_N)[:-1])])
        if wide is None:
            ids = np.repeat(one["sequence_id"].to_numpy(), lengths_N)
            positions = np.concatenate([np.arange(1, length + 1) for length in lengths_N])
            wide = pl.DataFrame({"sequence_id": ids, "position": positions})
        wide = wide.with_columns(**{f"{axis}_{number}": xyz_TC[:, place] for place, axis in enumerate(axes)})
    assert wide is not None
    return wide.select("sequence_id", "position", *value_columns(competition))
