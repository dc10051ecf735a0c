"""The templates stage: structure files to a dated library of RNA chains, and the library that predictions use."""

from collections import Counter
from collections.abc import Mapping
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from pipeline.errors import DataError, StorageError
from pipeline.memory import usable_cpus
from pipeline.paths import Paths
from pipeline.runlog import Bar
from pipeline.stage import Report, run_stage
from pipeline.tables import open_parquet
from pipeline.templates.gate import released_by
from pipeline.templates.search import Library
from pipeline.templates.structure_file import ENDINGS, UNKNOWN_AS, Chain, read_chains, require_gemmi

#: Raised when the same files give another library than before.
VERSION = 2

_AXES = ("x", "y", "z")
_SCHEMA: dict[str, Any] = {
    "template_id": pl.String,
    "sequence": pl.String,
    "released": pl.Date,
    "resolution": pl.Float32,
    **dict.fromkeys(_AXES, pl.List(pl.Float32)),
}


def library_path(paths: Paths) -> Path:
    """Where the stage writes: ``templates/library.parquet``."""
    return paths.home / "templates" / "library.parquet"


def inputs_of(paths: Paths, split: str) -> dict[str, Path]:
    """What stages that learn from known structures read: clean tables and folds; pairs and library where they are."""
    inputs = {name: paths.clean(name) for name in ("train", "later", "test")} | {"folds": paths.fold_table(split)}
    optional = {"bpp": paths.bpp, "library": library_path(paths)}
    return inputs | {label: path for label, path in optional.items() if path.is_file()}


def run(paths: Paths, *, raw: Path, workers: int | None = None) -> Report:
    """Read all structure files of a folder into ``templates/library.parquet``.

    The table has one row per RNA chain: ``template_id, sequence, released`` (null = unknown), ``resolution`` (Å) and
    ``x, y, z`` (Å, null where unresolved), sorted by template_id.

    Args:
        paths: where the artefacts of the competition live.
        raw: folder with mmCIF or PDB files, gzipped or not, also in folders below.
        workers: processes; by default one per CPU this process may use.

    Raises:
        ConfigError: gemmi is not installed.
        DataError: a file is damaged, an entry is there twice, or there is no RNA at all; nothing is written.
    """
    require_gemmi()
    files = _structure_files(raw)

    def build(parts: dict[str, Path]) -> dict[str, Any]:
        chains = _read_all(files, workers=workers)
        table = _table(chains)
        if not table.height:
            raise DataError(f"RAW={raw}: {len(files):,} structure files and no RNA chain. Next: give another folder.")
        table.write_parquet(parts["library"], compression="zstd", compression_level=3, row_group_size=1024)
        return _facts(chains, files=len(files))

    return run_stage(
        "templates",
        inputs={str(path.relative_to(raw)): path for path in files},
        outputs={"library": library_path(paths)},
        params={"version": VERSION},
        build=build,
    )


def _structure_files(raw: Path) -> list[Path]:
    if not raw.is_dir():
        raise DataError(f"RAW={raw}: no such folder. Next: give the folder that holds mmCIF or PDB files.")
    found = sorted(path for path in raw.rglob("*") if path.name.lower().removesuffix(".gz").endswith(ENDINGS))
    if not found:
        raise DataError(f"RAW={raw}: no .cif, .pdb or .ent file (or .gz). Next: give the folder that holds them.")
    return found


def _read_all(files: list[Path], *, workers: int | None) -> list[Chain]:
    """Chains of all files, in the order of the files; a few files are read here."""
    workers = workers or usable_cpus()
    chains: list[Chain] = []
    with Bar("read structures", total=len(files), unit="files") as bar:
        if workers == 1 or len(files) < 16:
            for path in files:
                chains += read_chains(path)
                bar.advance()
            return chains
        try:
            with ProcessPoolExecutor(workers, mp_context=get_context("spawn")) as pool:
                for found in pool.map(read_chains, files, chunksize=4):
                    chains += found
                    bar.advance()
        except BrokenProcessPool as err:
            raise StorageError(
                "templates: a worker was killed, most likely for memory. Next: take fewer --workers."
            ) from err
    return chains


def _table(chains: list[Chain]) -> pl.DataFrame:
    rows: list[dict[str, Any]] = []
    for chain in chains:
        rows.append({name: getattr(chain, name) for name in ("template_id", "sequence", "released", "resolution")})
        for axis, values_M in zip(_AXES, chain.xyz_M3.T, strict=True):
            rows[-1][axis] = [None if np.isnan(value) else value for value in values_M.tolist()]
    table = pl.DataFrame(rows, schema=_SCHEMA).sort("template_id")
    twice = table.filter(pl.col("template_id").is_duplicated())
    if twice.height:
        raise DataError(
            f"templates: two files hold {twice['template_id'][0]}; expected every entry once. Next: remove one of them."
        )
    return table


def _facts(chains: list[Chain], *, files: int) -> dict[str, Any]:
    days = sorted(chain.released for chain in chains if chain.released)
    return {
        "files": files,
        "chains": len(chains),
        "sequences": len({chain.sequence for chain in chains}),
        "residues": sum(len(chain.sequence) for chain in chains),
        "unresolved": int(sum(np.isnan(chain.xyz_M3[:, 0]).sum() for chain in chains)),
        "modified": sum(chain.modified for chain in chains),
        "unknown": {"residues": sum(chain.unknown for chain in chains), "read_as": UNKNOWN_AS},
        "undated": len(chains) - len(days),
        "first_release": str(days[0]) if days else "none",
        "last_release": str(days[-1]) if days else "none",
    }


def collect(paths: Paths) -> tuple[pl.DataFrame, dict[str, Any]]:
    """The structures of the training targets, of later ones and, where `run` was called, of its chains.

    Args:
        paths: the clean tables train and later, and ``templates/library.parquet`` if it is there.

    Returns:
        ``id, sequence, day`` (of release; null = unknown), ``x, y, z``, training targets first; and how many chains are
        of each origin, and whose dates are given, known by the block of ids, or unknown.

    Raises:
        DataError: a table is missing or damaged.
    """
    tables = [_read(paths.clean(name), "sequence_id", "temporal_cutoff") for name in ("train", "later")]
    counts = {"train": tables[0].height, "later": tables[1].height, "library": 0}
    if library_path(paths).is_file():
        own = [name for table in tables for name in table["id"].to_list()]
        tables.append(_read(library_path(paths), "template_id", "released").filter(pl.col("id").is_in(own).not_()))
        counts["library"] = tables[-1].height
    table = pl.concat(tables)
    given, late = table["day"].to_list(), [released_by(name) for name in table["id"]]
    sources = Counter(
        "given" if day else "by_block_of_ids" if bound else "unknown" for day, bound in zip(given, late, strict=True)
    )
    table = table.with_columns(pl.col("day").fill_null(pl.Series(late, dtype=pl.Date)))
    return table, counts | {"dates": dict(sorted(sources.items()))}


def make_library(table: pl.DataFrame, *, folds: Mapping[str, int]) -> Library:
    """Arrays of a table that `collect` gave.

    Args:
        table: ``id, sequence, day, x, y, z``.
        folds: training target -> fold.
    """
    return Library.of(
        table["id"].to_list(),
        table["sequence"].to_list(),
        [np.array(row, dtype=np.float64).T for row in table.select(_AXES).iter_rows()],
        dates=table["day"].to_list(),
        folds=[folds.get(name, -1) for name in table["id"]],
    )


def _read(path: Path, key: str, day: str) -> pl.DataFrame:
    """Columns id, sequence, day, x, y, z of the chains that have a score."""
    scored = ["scored"] if key == "sequence_id" else []
    open_parquet(path, [key, "sequence", day, *_AXES, *scored]).close()
    table = pl.read_parquet(path).sort(key)
    table = table.filter(*(pl.col(name) for name in scored))
    return table.select(pl.col(key).alias("id"), "sequence", pl.col(day).alias("day"), *_AXES)
