"""Both TM-scores of every model in a folder of C1' traces. Lengths in Å.

The folder holds three parquet tables: ``models`` (``model_id, benchmark, target``), ``model_traces`` (``model_id,
resid, x, y, z``) and ``native_traces`` (``benchmark, target, resid, resname, x, y, z``). Residues without a place have
no row, or nulls or the competitions' sentinels in it; NaN is refused. A model's residues get the names of the native's
residues with the same numbers.

Letters: L residues, 3 xyz.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from pipeline import runlog
from pipeline.errors import ConfigError, DataError
from pipeline.schema import SENTINEL
from pipeline.stage import Report, run_stage
from pipeline.tables import open_parquet
from submissions.engines import BUILT_IN, Case, Engine, batches, choose_engine

VERSION = 1

_TABLES = {
    "models": ["model_id", "benchmark", "target"],
    "model_traces": ["model_id", "resid", "x", "y", "z"],
    "native_traces": ["benchmark", "target", "resid", "resname", "x", "y", "z"],
}
_TYPES = {"resid": pl.Int64(), "x": pl.Float64(), "y": pl.Float64(), "z": pl.Float64()}  # the rest is text
_DEOXY = ("DA", "DC", "DG", "DT", "DU")
_LAST = 100_000  # the highest residue number that is believed


@dataclass(frozen=True, kw_only=True)
class Pair:
    """A model and its native, residue by residue: a row of both for each number that one of them has."""

    model_id: str
    model_L3: np.ndarray
    native_L3: np.ndarray
    names: str

    @property
    def case(self) -> Case:
        return self.model_L3, self.native_L3, self.names


def tables_of(traces: Path, *, stage: str) -> dict[str, Path]:
    """The three tables of a folder, by name.

    Raises:
        DataError: in the name of a stage, if it has none or not all of them.
    """
    if traces == Path() or not traces.is_dir():
        got = "TRACES is empty" if traces == Path() else f"{traces} is not a folder"
        raise DataError(f"{stage}: {got}. Next: TRACES=<folder> with {', '.join(_TABLES)}.parquet.")
    for name in _TABLES:
        if not (traces / f"{name}.parquet").is_file():
            columns = ", ".join(_TABLES[name])
            raise DataError(f"{stage}: {traces} has no {name}.parquet. Next: write it there, with columns {columns}.")
    return {name: traces / f"{name}.parquet" for name in _TABLES}


def run(traces: Path, out: Path, *, engine: str = BUILT_IN) -> Report:
    """Write ``model_id, tm_byresi, tm_seqindep`` (residue-matched; by the default alignment), sorted by model.

    Args:
        traces: folder with the three tables.
        out: parquet file.
        engine: as in `submissions.engines.choose_engine`.

    Returns:
        Report with the output ``scores``; its facts tell the number of models, the engine and the mean scores.

    Raises:
        ConfigError: the engine is unknown or not installed, or `out` does not end in ``.parquet``.
        DataError: a table is missing, damaged or contradicts another.
    """
    chosen = choose_engine(engine, where="score-tm")
    if out.suffix != ".parquet":
        raise ConfigError(f"score-tm: OUT={out}; expected the name of a parquet file. Next: OUT=scores.parquet.")
    tables = tables_of(traces, stage="score-tm")
    out.parent.mkdir(parents=True, exist_ok=True)
    return run_stage(
        "score-tm",
        inputs=tables | ({"program": chosen.program} if chosen.program else {}),
        outputs={"scores": out},
        params={"version": VERSION, "engine": chosen.matched_by},
        build=lambda parts: _write(read_pairs(traces), parts["scores"], chosen),
        manifest=out.with_name(f"{out.name}.manifest.json"),
    )


def describe(facts: dict[str, Any]) -> str:
    """What `run` found, as lines of text."""
    if not facts["models"]:
        return "no models"
    labels = ("residue-matched", "sequence-independent")
    means = (facts["mean_byresi"], facts["mean_seqindep"])
    lines = zip(labels, means, facts["engines"], strict=True)
    return "\n".join(f"{facts['models']:,} models, {label}: mean {mean:.4f}; {by}" for label, mean, by in lines)


def _write(pairs: Sequence[Pair], path: Path, engine: Engine) -> dict[str, Any]:
    found = []
    with runlog.Bar("score-tm", total=len(pairs), unit="models") as bar:
        for part in batches([pair.case for pair in pairs], lambda case: len(case[2]) ** 2):
            found.append((engine.matched(part), engine.aligned(part)))
            bar.advance(len(part))
    by_residue, independent = np.concatenate(found, axis=1) if found else np.zeros((2, 0))
    table = {"model_id": [pair.model_id for pair in pairs], "tm_byresi": by_residue, "tm_seqindep": independent}
    pl.DataFrame(table, schema_overrides={"model_id": pl.String}).write_parquet(path)
    means = [float(values.mean()) if len(pairs) else None for values in (by_residue, independent)]
    return {
        "models": len(pairs),
        "engines": [engine.matched_by, engine.aligned_by],
        "mean_byresi": means[0],
        "mean_seqindep": means[1],
    }


def read_pairs(traces: Path) -> list[Pair]:
    """Models and their natives, sorted by model.

    Raises:
        DataError: a table is missing or damaged, a residue or model comes twice, a coordinate is no number, or a model
            has no trace or no native.
    """
    tables = {name: _read(traces / f"{name}.parquet", columns) for name, columns in _TABLES.items()}
    models = tables["models"].sort("model_id")
    if twice := models["model_id"].filter(models["model_id"].is_duplicated()).to_list():
        raise DataError(f"{traces / 'models.parquet'}: {twice[0]} comes twice. Next: keep one row a model.")
    traced = _by_key(traces / "model_traces.parquet", tables["model_traces"], ["model_id"])
    known = _by_key(traces / "native_traces.parquet", tables["native_traces"], ["benchmark", "target"])
    pairs = []
    for model_id, *native in models.iter_rows():
        if (model_id,) not in traced:
            raise DataError(
                f"{traces / 'model_traces.parquet'}: no residue of {model_id} has a place. Next: add its trace."
            )
        if tuple(native) not in known:
            raise DataError(
                f"{traces / 'native_traces.parquet'}: no native {'/'.join(native)} for {model_id}. Next: add its trace."
            )
        pairs.append(_pair(model_id, traced[model_id,], known[tuple(native)]))
    return pairs


def _read(path: Path, columns: list[str]) -> pl.DataFrame:
    open_parquet(path, columns).close()
    try:
        table = pl.read_parquet(path, columns=columns)
        whole = "resid" not in columns or bool((table["resid"].cast(pl.Float64) % 1.0 == 0.0).all())
        table = table.cast({name: _TYPES.get(name, pl.String()) for name in columns})
    except (pl.exceptions.PolarsError, OSError) as err:
        reason = str(err).splitlines()[0]
        raise DataError(f"{path}: cannot be read ({reason}). Next: write {', '.join(columns)} again.") from err
    if not whole:
        raise DataError(f"{path}: a residue number is no whole number. Next: number the residues 1, 2, 3 and so on.")
    for name in columns:
        if name not in ("x", "y", "z") and table[name].null_count():
            raise DataError(f"{path}: a row without {name}. Next: fill it in, or leave out the row.")
    return table


def _by_key(path: Path, table: pl.DataFrame, key: list[str]) -> dict[tuple[Any, ...], pl.DataFrame]:
    """Key -> its residues that have a place, after all have been checked."""
    xyz = pl.col("x", "y", "z")
    there = table.filter(pl.all_horizontal(xyz.is_not_null() & ~(xyz.is_finite() & (xyz <= SENTINEL))))
    checks = {
        "a coordinate that is not finite": ~pl.all_horizontal(xyz.is_finite()),
        f"a coordinate of {-SENTINEL:,.0f} Å or more": pl.any_horizontal(xyz >= -SENTINEL),
        f"a residue number below 0 or above {_LAST}": ~pl.col("resid").is_between(0, _LAST),
        "a residue number twice": pl.struct(*key, "resid").is_duplicated(),
    }
    for what, wrong in checks.items():
        bad = there.filter(wrong)
        if bad.height:
            where = "/".join(str(bad[name][0]) for name in key)
            raise DataError(
                f"{path}: {where} residue {bad['resid'][0]} has {what}. Next: correct it, or leave the residue out."
            )
    return {name: part for name, part in there.group_by(key, maintain_order=True)}


def _pair(model_id: str, model: pl.DataFrame, native: pl.DataFrame) -> Pair:
    numbers = [part["resid"].to_numpy() for part in (model, native)]
    rows = np.union1d(*numbers)
    places = [np.searchsorted(rows, each) for each in numbers]
    xyz = np.full((2, len(rows), 3), np.nan)
    for slot, part in enumerate((model, native)):
        xyz[slot, places[slot]] = part.select("x", "y", "z").to_numpy()
    names = ["N"] * len(rows)
    for place, name in zip(places[1].tolist(), native["resname"].str.strip_chars(), strict=True):
        names[place] = (name[1:] if name in _DEOXY else name)[:1] or "N"
    return Pair(model_id=model_id, model_L3=xyz[0], native_L3=xyz[1], names="".join(names))
