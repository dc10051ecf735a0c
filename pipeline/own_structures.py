"""Candidates for RNAs of one's own, by what predicts hidden test targets: assembly, templates, networks.

It needs no data: without an earlier `denovo` helices are assembled with the loops of the clean tables, if these are
there, and ranked by the weights that come with the program.

Letters: L length (nt), M candidates, 3 xyz. Lengths in Å.
"""

import re
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl

from pipeline import bpp, viennarna
from pipeline.competitions.base import Competition
from pipeline.competitions.labelled import read_sequences
from pipeline.errors import DataError
from pipeline.inference import with_best_checkpoint
from pipeline.own_file import Predicted, apply_checkpoint, own_paths, place_of, require_file, trained_folds
from pipeline.paths import Paths
from pipeline.runlog import say
from pipeline.runs import is_stage
from pipeline.schema import ALPHABET
from pipeline.stage import Report, read_result, run_stage, write_json
from pipeline.structure import predict as denovo
from pipeline.structure.denovo import WEIGHTS
from pipeline.structure.secondary import without_lone_pairs
from pipeline.tables import read_batches
from pipeline.templates import predict as templates
from pipeline.templates.collection import collect
from pipeline.templates.pairs import pairs_from_trace

_VERSION = 3
_NAME_LENGTH = 200  # of 255 bytes that file systems have for a name with all that stands around it
_CUTOFF = "temporal_cutoff"
_BRACKETS = "()", "[]", "{}", "<>", "Aa", "Bb", "Cc", "Dd"  # of pairs that cross, one kind after the other


def predict(
    source: Path, *, competition: Competition, paths: Paths, split: str, name: str, run: str | Path | None = None
) -> Predicted:
    """Give every RNA of a file its candidates, by all sources of an ensemble, or else by assembly and templates.

    Args:
        source: FASTA, CSV, TSV or parquet; a column ``temporal_cutoff`` (YYYY-MM-DD) keeps later structures away.
        competition: one whose task is a structure.
        paths: where runs and ensembles are; all is written below ``predictions/<name of the file>/``.
        split: of the runs that are used without an ensemble.
        name: of the ensemble whose choice is used, if it is there.
        run: by this one alone instead: its name, or its folder where that lies elsewhere.

    Raises:
        ConfigError: the competition is not about structures.
        DataError: the file is not what it should be, an RNA is too long, or `run` has no trained fold.
        StoppedError: asked to stop; nothing is left half-written.
    """
    competition.require_structures("structures")
    require_file(source, verb="structures")
    own = own_paths(source, paths)
    _read(source, own)
    if viennarna.available()[0]:
        bpp.run(own, tables=("test",))
    weights = paths.ensemble_dir(name) / "weights.json"
    if run is None and weights.is_file():
        told = read_result(weights, hint=f"make ensemble COMP={paths.comp} NAME={name}")
        about = f"chosen as by ensemble {name}"
    else:
        told = _without_ensemble(competition, paths, split=split, run=run)
        about = f"the most confident ones{' (no ensemble)' if run is None else ''}"
        weights = own.ensemble_dir("best") / "weights.json"
    given = told["runs"] if run is None else [run]
    told["runs"] = [_predict_run(each, told, competition=competition, paths=paths, own=own) for each in given]
    if weights.is_relative_to(own.home):
        write_json(weights, told)
    about = f"candidates of {', '.join(told['runs'])}, {about}"
    return Predicted(own=own, competition=competition, name=weights.parent.name, weights=weights, about=about)


def _read(source: Path, own: Paths) -> Report:
    """The file's RNAs as a clean test table."""

    def build(parts: dict[str, Path]) -> dict[str, Any]:
        table = read_sequences(source, alphabet=ALPHABET, also=(_CUTOFF,), place=place_of(source, own))[0]
        table = _with_cutoffs(_with_file_names(table, source), source)
        _require_short(table, source)
        none: dict[str, Any] = {"stoichiometry": pl.String, "chain_lengths": pl.List(pl.Int32)}
        table = table.with_columns(pl.lit(None, kind).alias(column) for column, kind in none.items())
        table.write_parquet(parts["test"], compression="zstd")
        return {"sequences": table.height, "cutoffs": table.height - table[_CUTOFF].null_count()}

    columns = source.with_name("columns.toml")
    inputs = {"sequences": source} | ({"columns": columns} if columns.is_file() else {})
    outputs, params = {"test": own.clean("test")}, {"version": _VERSION}
    report = run_stage("own-structures", inputs=inputs, outputs=outputs, params=params, build=build)
    if not report.facts["cutoffs"]:
        say(f"{source.name}: no {_CUTOFF} given, so structures of any date may be used")
    return report


def _with_file_names(table: pl.DataFrame, source: Path) -> pl.DataFrame:
    """Ids become names of files: other signs than letters, digits and . _ + - become _; long ones are cut."""
    names = [re.sub(r"[^\w.+-]", "_", name, flags=re.ASCII)[:_NAME_LENGTH] for name in table["sequence_id"]]
    twice = {name for name in names if names.count(name) > 1}
    for name, given in zip(names, table["sequence_id"], strict=True):
        if name in twice or name.startswith("."):
            raise DataError(
                f"{source.name}: id {given!r} would name the files {name!r}, hidden or another one's; expected ids "
                "that differ in letters, digits and . _ + -. Next: rename it."
            )
    return table.with_columns(pl.Series("sequence_id", names))


def _with_cutoffs(table: pl.DataFrame, source: Path) -> pl.DataFrame:
    if _CUTOFF not in table.columns:
        return table.with_columns(pl.lit(None, pl.Date).alias(_CUTOFF))
    text = pl.col(_CUTOFF).fill_null("").str.strip_chars()
    table = table.with_columns(text.alias("_text"), text.str.to_date("%Y-%m-%d", strict=False).alias(_CUTOFF))
    bad = table.filter((pl.col("_text") != "") & pl.col(_CUTOFF).is_null())
    if bad.height:
        name, got = bad.select("sequence_id", "_text").row(0)
        raise DataError(f"{source.name}: {name}: {_CUTOFF} {got!r}; expected YYYY-MM-DD. Next: correct it.")
    return table.drop("_text")


def _require_short(table: pl.DataFrame, source: Path) -> None:
    longest = table.sort(pl.col("sequence").str.len_chars(), descending=True, maintain_order=True).row(0, named=True)
    if len(longest["sequence"]) > denovo.LONGEST:
        raise DataError(
            f"{source.name}: {longest['sequence_id']} has {len(longest['sequence']):,} nt; expected at most "
            f"{denovo.LONGEST:,}. Next: give its domains as sequences of their own."
        )


def _without_ensemble(competition: Competition, paths: Paths, *, split: str, run: str | Path | None) -> dict[str, Any]:
    """What an ensemble would say of a single run, or of those whose confidence is a TM-score: all without a network."""
    runs = [denovo.run_name(split) if run is None else Path(run).name]
    if run is None and all((paths.run_dir(templates.run_name(split)) / file).is_file() for file in templates.CARRIED):
        runs.append(templates.run_name(split))
    if run is None or is_stage(runs[0]):
        folds = sorted({0}.union(*(_dealt(paths.run_dir(each)) for each in runs)))
    else:
        folds = trained_folds(paths.run_dir(run), competition)
    told = {"competition": competition.name, "task": competition.task, "split": split, "folds": folds, "runs": runs}
    return told | {"targets": list(competition.targets), "policy": None}


def _dealt(folder: Path) -> set[int]:
    """Folds that a run without a network deals its test candidates to."""
    found = {path.parent.name.removeprefix("fold") for path in folder.glob("fold*/test.parquet")}
    return {int(number) for number in found if number.isdigit()}


def _predict_run(run: str | Path, told: dict[str, Any], *, competition: Competition, paths: Paths, own: Paths) -> str:
    """Returns the name under which it predicted."""
    source, split = paths.run_dir(run), told["split"]
    if not is_stage(source.name):
        work = partial(apply_checkpoint, competition=competition, source=None, own=own, paths=paths)
        for fold in told["folds"]:  # never none
            done = with_best_checkpoint(work, competition=competition, paths=paths, run=run, fold=fold)
        return str(done.facts["trained"]["run"])
    if source.name == templates.run_name(split):
        templates.apply(own, competition=competition, split=split, source=source)
    else:
        learned = all((source / file).is_file() for file in denovo.CARRIED)
        denovo.apply(own, competition=competition, split=split, source=source if learned else _unlearned(paths, own))
    return source.name


def _unlearned(paths: Paths, own: Paths) -> Path:
    """The folder of a `denovo` that has learned nothing: weights of the program, loops of the clean tables if any."""
    folder = own.home / "unlearned"
    known = all(paths.clean(table).is_file() for table in ("train", "later"))
    axes = dict.fromkeys("xyz", pl.List(pl.Float32))
    none = pl.DataFrame(schema={"id": pl.String, "sequence": pl.String, "day": pl.Date, **axes})
    table = collect(paths)[0] if known else none
    say(f"loops of {table.height:,} known structures" + ("" if known else f": no clean tables of {paths.comp} here"))
    folder.mkdir(parents=True, exist_ok=True)
    library, weights = (folder / file for file in denovo.CARRIED)
    table.write_parquet(library, compression="zstd")
    write_json(weights, {"weights": list(WEIGHTS), "folds": [0]})
    return folder


# ---------------------------------------------------------------------------------------------------------------- table


def write_table(predicted: Predicted, path: Path) -> Report:
    """A row for each candidate as CSV: ``sequence_id, candidate, confidence, source, pairs, sequence``.

    ``pairs`` are read from the trace, in dot-bracket notation; other brackets are pairs that cross the round ones.

    Args:
        predicted: whose candidates are joined already.
        path: of the table.
    """
    own = predicted.own
    candidates = own.ensemble_dir(predicted.name) / "test.parquet"

    def build(parts: dict[str, Path]) -> dict[str, Any]:
        order = pl.read_parquet(own.clean("test"), columns=["sequence_id", "sequence"])
        letters = dict(order.iter_rows())
        columns = ["sequence_id", "candidate", "confidence", "source", "x", "y", "z"]
        rows = []
        for batch in read_batches(candidates, columns, rows=64):
            for name, number, confidence, origin, *axes in batch.iter_rows():
                xyz_L3 = np.array(axes, dtype=np.float64).T
                partner_L = pairs_from_trace(letters[name], xyz_L3)
                pairs = without_lone_pairs([(i, int(j)) for i, j in enumerate(partner_L) if j > i])
                brackets = dot_bracket(len(partner_L), pairs)
                rows.append((name, number, confidence, origin, brackets, letters[name]))
        header = ["sequence_id", "candidate", "confidence", "source", "pairs", "sequence"]
        found = pl.DataFrame(rows, schema=header, orient="row")
        table = order.select("sequence_id").join(found, on="sequence_id", maintain_order="left_right", validate="1:m")
        table.write_csv(parts["table"], float_precision=4)
        return {"sequences": table["sequence_id"].n_unique(), "candidates": table.height}

    inputs = {"sequences": own.clean("test"), "candidates": candidates}
    return run_stage(
        "own-candidates", inputs=inputs, outputs={"table": path}, params={"version": _VERSION}, build=build
    )


def dot_bracket(length: int, pairs: Sequence[tuple[int, int]]) -> str:
    """Pairs as text; those that cross earlier ones in brackets of another kind.

    Args:
        length: of the sequence.
        pairs: 0-based, each residue in one at most.

    >>> dot_bracket(11, [(0, 8), (1, 7), (2, 10), (3, 9)])
    '(([[...))]]'
    """
    signs = ["."] * length
    ends: list[list[int]] = [[] for _ in _BRACKETS]  # of each kind what is open, the innermost last
    for i, j in sorted(pairs):
        for opened in ends:
            while opened and opened[-1] < i:
                opened.pop()
        kind = next((k for k, opened in enumerate(ends) if not opened or opened[-1] > j), None)
        if kind is not None:  # beyond eight kinds a pair is not shown
            ends[kind].append(j)
            signs[i], signs[j] = list(_BRACKETS[kind])
    return "".join(signs)
