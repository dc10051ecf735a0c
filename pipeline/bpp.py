"""Base-pair probabilities of every sequence by ViennaRNA, computed once and kept in one keyed file.

The file has one row per sequence of the clean tables: the pairs above a cut-off, and what is left unpaired. Sequences
that an earlier file holds are copied; the others are computed in worker processes, part by part, and every finished
part outlives an interruption. A core folds 44 sequences of 170 nt a second.

Letters: N sequences, R rows of a group.
"""

import functools
import json
import shutil
import time
from bisect import bisect_left
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import viennarna
from pipeline.errors import ConfigError, DataError, StoppedError
from pipeline.labels import find_labels
from pipeline.memory import usable_cpus
from pipeline.pair_workers import ROWS, Crew, parquet_schema, write_part
from pipeline.paths import Paths
from pipeline.runlog import Bar, amount, rate_text, say, warn
from pipeline.stage import Report, read_manifest, run_stage, sha256_file
from pipeline.tables import read_batches
from pipeline.training.stop import StopRequest, in_turn, run_lock

_TABLES = ("train", "test")
_LENGTH, _PARTIAL = "longest", "partial"  # parameters of a result that other calls complete
_LONGEST = 65_535  # nt: positions take two bytes
_MAX_PART_ROWS = 2048
_PART_SECONDS = 8.0  # of work in a part: what an interruption loses
_PARTS_IN_TIME = 40  # that a partial result's time suffices for, on the machine that `seconds_to_fold` knows
_WORTH_A_WORKER = 5.0  # seconds of work that pay for starting another process


def run_in_turn(paths: Paths, *, time_budget: float | None = None) -> Report:
    """`run`, and wait where another process computes them: of trainings that begin at once the first one does.

    Raises:
        BusyError: the time is up before the other one is done; and what `run` raises.
    """
    deadline = None if time_budget is None else time.monotonic() + time_budget

    def work() -> Report:
        return run(paths, time_budget=None if deadline is None else max(0.0, deadline - time.monotonic()))

    return in_turn(work, deadline=deadline, what="its base-pair probabilities are")


def run(
    paths: Paths,
    *,
    workers: int | None = None,
    tables: Sequence[str] = _TABLES,
    longest: int | None = None,
    time_budget: float | None = None,
    partial: bool = False,
) -> Report:
    """Compute the base-pair probabilities of all sequences of the clean train and test tables.

    A call for a part of them, by `tables` or `longest`, adds to what is there and takes nothing away.

    Args:
        paths: artefacts of one competition; ``clean/train`` and ``clean/test`` are read, ``bpp/bpp.parquet`` written.
        workers: processes; by default one per CPU this process may use.
        tables: clean tables whose sequences are folded; ``test`` alone where nothing is trained.
        longest: nt; longer sequences are left out, for a first result that another call completes.
        time_budget: seconds after which it stops; None = never.
        partial: where that time is up, write what is folded; for a notebook, whose time is all there is.

    Returns:
        Report with the output ``bpp``; the fact ``left_out`` says how many of a partial result are missing.

    Raises:
        ConfigError: ViennaRNA is not installed and the file is not there.
        DataError: a clean table is missing.
        StoppedError: a signal came, or the time is up; finished parts are kept and the next call goes on from them.
        StorageError: a worker was killed, most likely for memory, or the disk is full.
    """
    tables = _foldable(paths, tables)
    params = {
        "version": 1,
        "program": "ViennaRNA",
        "program_version": _program_version(paths),
        "min_probability": viennarna.MIN_PROBABILITY,
        "max_whole": viennarna.MAX_WHOLE,
        "window": viennarna.WINDOW,
    }
    inputs = {table: paths.clean(table) for table in tables}
    is_part = longest is not None or set(tables) != set(_TABLES)
    if is_part and (done := _recorded(paths)) and _covers(done, inputs, params, longest):
        return Report(stage="bpp", status="current", outputs={"bpp": paths.bpp}, facts=done["facts"])

    def build(parts: dict[str, Path]) -> dict[str, Any]:
        with run_lock(paths.bpp.parent):  # only around work: folds that train at once all ask whether it is done
            batches = (batch for path in inputs.values() for batch in read_batches(path, ["sequence"]))
            wanted = {each for batch in batches for each in batch["sequence"] if len(each) <= (longest or len(each))}
            kept = (
                {each for source in _finished_result(paths, params) for each in source.sequences()}
                if is_part
                else set()
            )
            how: dict[str, Any] = {"params": params, "workers": workers, "time_budget": time_budget}
            how["partial"] = partial
            return _build(parts["bpp"], sorted(wanted | kept), paths=paths, **how)

    of_all = params if longest is None else params | {_LENGTH: longest}
    of_all = of_all | ({_PARTIAL: True} if partial else {})
    again = bool((_recorded(paths) or {"facts": {}})["facts"].get("left_out"))
    report = run_stage("bpp", inputs=inputs, outputs={"bpp": paths.bpp}, params=of_all, build=build, force=again)
    if report.status == "built":
        shutil.rmtree(_parts_dir(paths), ignore_errors=True)
    return report


def describe(facts: Mapping[str, Any]) -> str:
    """What `run` computed, for a person."""
    least, left_out = viennarna.MIN_PROBABILITY, facts.get("left_out", 0)
    told = f"{facts['sequences']:,} sequences, {facts['pairs']:,} pairs of probability {least} or more"
    return told + (f"; left out: {left_out:,}, as its time was up" if left_out else "")


def _parts_dir(paths: Paths) -> Path:
    return paths.bpp.parent / "parts"


def _program_version(paths: Paths) -> str:
    """The version that computes; without ViennaRNA, the one that computed the file, which may still be current."""
    usable, reason = viennarna.available()
    if usable:
        return viennarna.installed_version()
    done = _recorded(paths)
    if done is None:
        raise ConfigError(f"bpp: {reason}.")
    return done["params"]["program_version"]


def _foldable(paths: Paths, tables: Sequence[str]) -> Sequence[str]:
    """The tables to fold: a set of one's own may have no test set, and must not be of proteins."""
    labels = find_labels(paths)
    if not labels and not paths.clean("profiles").is_file():
        return tables
    if labels and not labels.is_nucleic:
        raise ConfigError(f"bpp: {paths.comp} holds proteins; expected RNA or DNA. Next: use_bpp = false.")
    return [table for table in tables if table != "test" or paths.clean(table).is_file()]


def _recorded(paths: Paths) -> dict[str, Any] | None:
    """Manifest of an earlier, undamaged result."""
    done = read_manifest(paths.bpp.parent / "bpp.manifest.json")
    intact = done and paths.bpp.is_file() and done.get("outputs") == {"bpp": sha256_file(paths.bpp)}
    return done if intact else None


def _covers(done: dict[str, Any], inputs: Mapping[str, Path], params: dict[str, Any], longest: int | None) -> bool:
    """Whether an earlier result, of more tables or longer sequences, holds what is asked for."""
    until = done["params"].get(_LENGTH)
    if done["facts"].get("left_out"):
        return False
    reaches = until is None or (longest is not None and longest <= until)
    is_same = _of_each(done) == params and inputs.keys() <= done["inputs"].keys()
    return (
        reaches
        and is_same
        and all(path.is_file() and sha256_file(path) == done["inputs"][table] for table, path in inputs.items())
    )


def _of_each(done: dict[str, Any]) -> dict[str, Any]:
    """Parameters that a sequence's probabilities depend on, whichever sequences there are."""
    return {name: value for name, value in done["params"].items() if name not in (_LENGTH, _PARTIAL)}


def _build(
    out: Path,
    wanted: list[str],
    *,
    paths: Paths,
    params: dict[str, Any],
    workers: int | None,
    time_budget: float | None,
    partial: bool,
) -> dict[str, Any]:
    usable, reason = viennarna.available()
    if not usable:
        raise ConfigError(f"bpp: {reason}.")
    longest = max(map(len, wanted), default=0)
    if longest > _LONGEST:
        raise DataError(
            f"bpp: a sequence of {longest:,} nt; expected at most {_LONGEST:,}. Next: give its domains as sequences of "
            "their own."
        )
    sources = _sources(paths, params)
    missing = _locate(wanted, sources).missing
    if missing.size:
        there = len(wanted) - missing.size
        say(f"bpp: {amount(missing.size, 'sequence')} to fold" + (f", {there:,} are there already" if there else ""))
        how: dict[str, Any] = {"params": params, "workers": workers, "time_budget": time_budget}
        how["partial"] = partial
        _compute([wanted[k] for k in missing], folder=_parts_dir(paths), **how)
        sources = _sources(paths, params)
    left_out = _locate(wanted, sources).missing
    if left_out.size:
        warn(f"bpp: its time is up; {left_out.size:,} of {amount(len(wanted), 'sequence')} are not folded")
        wanted = np.delete(np.array(wanted, dtype=object), left_out).tolist()
    pairs = _merge(wanted, sources, out)
    return {
        "sequences": len(wanted),
        **({"left_out": int(left_out.size)} if left_out.size else {}),
        "computed": int(missing.size - left_out.size),
        "in_windows": sum(len(sequence) > viennarna.MAX_WHOLE for sequence in wanted),
        "pairs": pairs,
    }


class _Source:
    """A file of finished rows, read a row group at a time."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with pq.ParquetFile(path) as file:
                counts = [file.metadata.row_group(k).num_rows for k in range(file.num_row_groups)]
                self.tag = (file.schema_arrow.metadata or {}).get(b"bpp", b"").decode()
        except (pa.ArrowException, OSError) as err:
            raise DataError(f"{path}: not a readable parquet file ({err}). Next: make bpp.") from err
        self.starts = np.concatenate([[0], np.cumsum(counts, dtype=np.int64)])
        self.group = functools.lru_cache(maxsize=2)(self._group)

    def _group(self, number: int) -> pa.Table:
        try:
            with pq.ParquetFile(self.path, page_checksum_verification=True) as file:
                return file.read_row_group(number).combine_chunks()
        except (pa.ArrowException, OSError) as err:
            raise DataError(f"{self.path}: damaged ({err}). Next: remove it, then make bpp.") from err

    def sequences(self) -> Iterator[str]:
        with pq.ParquetFile(self.path) as file:
            for batch in file.iter_batches(columns=["sequence"]):
                yield from batch["sequence"].to_pylist()

    def rows(self, rows: np.ndarray) -> Iterator[Any]:
        """Tables of some rows, given in rising order."""
        group_of_row = np.searchsorted(self.starts, rows, side="right") - 1
        for number in np.unique(group_of_row):
            yield self.group(int(number)).take(rows[group_of_row == number] - self.starts[number])


def _sources(paths: Paths, params: dict[str, Any]) -> list[_Source]:
    """Files with rows of these parameters: an earlier result, and the parts of an interrupted call."""
    found = _finished_result(paths, params)
    for path in sorted(_parts_dir(paths).glob("*")):
        try:
            part = _Source(path)
        except DataError:  # half-written by a killed worker
            part = None
        if part and path.suffix == ".parquet" and part.tag == json.dumps(params):
            found.append(part)
        else:
            path.unlink()
    return found


def _finished_result(paths: Paths, params: dict[str, Any]) -> list[_Source]:
    """An earlier result, if it was made with these parameters."""
    done = _recorded(paths)
    return [_Source(paths.bpp)] if done and _of_each(done) == params else []


class _Located(NamedTuple):
    """Where the row of each wanted sequence is."""

    source_N: np.ndarray  # int, -1 = nowhere
    row_N: np.ndarray

    @property
    def missing(self) -> np.ndarray:
        return np.flatnonzero(self.source_N < 0)


def _locate(wanted: list[str], sources: list[_Source]) -> _Located:
    located = _Located(np.full(len(wanted), -1, dtype=np.int32), np.zeros(len(wanted), dtype=np.int64))
    for number, source in enumerate(sources):
        for row, sequence in enumerate(source.sequences()):
            k = bisect_left(wanted, sequence)
            if k < len(wanted) and wanted[k] == sequence:
                located.source_N[k], located.row_N[k] = number, row
    return located


def _merge(wanted: list[str], sources: list[_Source], out: Path) -> int:
    """Write the wanted rows, sorted by sequence, a row group at a time; every source is sorted. Returns the pairs."""
    located, pairs = _locate(wanted, sources), 0
    with pq.ParquetWriter(out, parquet_schema(), compression="zstd", write_page_checksum=True) as writer:
        for start in range(0, len(wanted), ROWS):
            source_R, row_R = (column[start : start + ROWS] for column in located)
            tables = []
            for number in np.unique(source_R):
                tables += sources[number].rows(row_R[source_R == number])
            table = pa.concat_tables(tables).replace_schema_metadata(None)
            table = table.take(np.argsort(np.argsort(source_R, kind="stable"))).combine_chunks()
            writer.write_table(table, row_group_size=ROWS)
            pairs += len(table["p"].combine_chunks().values)
    return pairs


def _compute(
    missing: list[str],
    *,
    folder: Path,
    params: dict[str, Any],
    workers: int | None,
    time_budget: float | None,
    partial: bool,
) -> None:
    """Fold sequences and leave them in parts; in this process if there is little to do.

    Raises:
        StoppedError: a signal came, or the time is up and not even a part of them was asked for, or none is there.
    """
    work = sum(viennarna.seconds_to_fold(len(sequence)) for sequence in missing)
    workers = min(workers or usable_cpus(), 1 + int(work / _WORTH_A_WORKER))
    limit = min(_PART_SECONDS, work / (4 * workers))
    if partial and time_budget is not None:  # of a short one, on a machine that others use, not a part was done
        limit = min(limit, time_budget / _PARTS_IN_TIME)
    jobs = [(part, folder, json.dumps(params)) for part in _divide(missing, limit=limit)]
    folder.mkdir(parents=True, exist_ok=True)
    with StopRequest(time_budget=time_budget) as stop, Bar("bpp", total=len(missing), unit="sequences") as bar:
        kept, started = 0, time.monotonic()
        for count in _finished(jobs, workers=min(workers, len(jobs)), stop=stop):
            kept += count
            bar.advance(count, note=rate_text(kept / (time.monotonic() - started)))
        if kept < len(missing) and not (partial and kept and not stop.signalled):
            raise StoppedError(
                f"bpp: stopped ({stop.reason()}); {kept:,} of {len(missing):,} sequences are folded and kept. "
                "Next: run it again to go on."
            )


def _divide(missing: list[str], *, limit: float) -> list[list[str]]:
    """Parts of `limit` seconds of work."""
    parts: list[list[str]] = [[]]
    spent = 0.0
    for sequence in missing:
        if parts[-1] and (spent >= limit or len(parts[-1]) >= _MAX_PART_ROWS):
            parts.append([])
            spent = 0.0
        parts[-1].append(sequence)
        spent += viennarna.seconds_to_fold(len(sequence))
    return parts


def _finished(jobs: list[tuple], *, workers: int, stop: StopRequest) -> Iterator[int]:
    """Rows of every part as it is finished, until all are or a stop is asked for."""
    if workers > 1:
        with Crew(workers) as crew:
            yield from crew.work(jobs, stop=stop)
        return
    for job in jobs:
        if stop.reason():
            return
        yield write_part(*job)
