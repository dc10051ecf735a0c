"""Both TM-scores beside US-align, one process a pair, on the same pairs in one run."""

import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numba
import numpy as np
import polars as pl
from rich.table import Table

from pipeline import runlog
from pipeline.paths import REPOSITORY
from pipeline.stage import versions, write_json
from pipeline.tables import open_parquet
from submissions import align, tm_score, usalign
from submissions.score_traces import Pair, read_pairs, tables_of

#: What `run` writes beside the tests.
RECORD = REPOSITORY / "tests" / "benchmarks" / "tm.json"

_MODES = {"residue-matched": "tm_usalign_c1_byresi", "sequence-independent": "tm_usalign_c1_seqindep"}
_THREADS = 2
_SAMPLE = 120  # pairs that US-align gets: it is slow


def run(traces: Path, *, repeats: int = 3, record: Path = RECORD) -> Table:
    """Time both scores, compare them with the scores stored beside the traces, and write it as JSON.

    Args:
        traces: folder as `submissions.score_traces` reads it; ``models`` may hold US-align's scores.
        repeats: rounds, ours and US-align's in turn; the median counts.
        record: where the JSON goes.

    Returns:
        The same as a table.

    Raises:
        DataError: a table is missing or damaged.
    """
    tables_of(traces, stage="bench-tm")
    pairs, program = read_pairs(traces), usalign.find_program()
    if program is None:
        runlog.say(
            "bench-tm: USalign is not on the PATH; without it there is no ratio, only our times and differences."
        )
    threads = min(_THREADS, numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
    before = numba.get_num_threads()
    numba.set_num_threads(threads)
    try:
        rows = [_row(mode, pairs, traces, program, repeats) for mode in _MODES]
    finally:
        numba.set_num_threads(before)
    facts = {"rows": rows, "pairs": len(pairs), "threads": threads, "repeats": repeats, "versions": versions()}
    write_json(record, facts)
    return _as_table(rows, len(pairs), threads)


def _row(mode: str, pairs: Sequence[Pair], traces: Path, program: Path | None, repeats: int) -> dict[str, Any]:
    """Times of both in turn, and how the scores differ."""
    ours = _ours(mode, pairs)
    scores = ours()  # compiles, too
    sample = pairs[:: max(len(pairs) // _SAMPLE, 1)]
    times: dict[str, list[float]] = {"ours": [], "usalign": [], "empty": []}
    with tempfile.TemporaryDirectory() as folder:
        files = _write_files(sample, Path(folder)) if program else []
        for _ in range(repeats):
            times["ours"].append(_timed(ours) / len(pairs))
            if program:
                run_all = _theirs(program, files, by_residue=mode == "residue-matched")
                times["usalign"].append(_timed(run_all) / len(sample))
                times["empty"].append(
                    _timed(lambda: [subprocess.run(["true"], check=True) for _ in files]) / len(files)
                )
    median = {what: statistics.median(values) if values else None for what, values in times.items()}
    row = {"mode": mode} | {f"{what}_ms": value and round(1000 * value, 4) for what, value in median.items()}
    row["ratio"] = round(median["usalign"] / median["ours"], 1) if median["usalign"] and median["ours"] else None
    return row | _difference(scores, traces, _MODES[mode])


def _ours(mode: str, pairs: Sequence[Pair]) -> Callable[[], np.ndarray]:
    if mode == "residue-matched":
        matched = [(pair.model_L3, pair.native_L3) for pair in pairs]
        return lambda: tm_score.tm_scores(matched)
    free = [(pair.model_L3, pair.native_L3, pair.names, pair.names) for pair in pairs]
    return lambda: align.tm_aligns(free)


def _write_files(pairs: Sequence[Pair], folder: Path) -> list[tuple[Path, Path]]:
    files = []
    for place, pair in enumerate(pairs):
        files.append((folder / f"{place}-model.pdb", folder / f"{place}-native.pdb"))
        usalign.write_pdb(files[-1][0], pair.model_L3, pair.names)
        usalign.write_pdb(files[-1][1], pair.native_L3, pair.names)
    return files


def _theirs(program: Path, files: Sequence[tuple[Path, Path]], *, by_residue: bool) -> Callable[[], list[float]]:
    return lambda: [usalign.run_program(program, *each, by_residue=by_residue) for each in files]


def _timed(action: Callable[[], Any]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def _difference(scores: np.ndarray, traces: Path, column: str) -> dict[str, float]:
    """How far the scores are from those stored beside the traces; nothing if there are none."""
    path = traces / "models.parquet"
    with open_parquet(path) as opened:
        if column not in opened.schema_arrow.names:
            return {}
    stored = pl.read_parquet(path, columns=["model_id", column]).sort("model_id")[column].to_numpy()
    difference = scores - stored
    return {
        "mean_absolute": round(float(np.abs(difference).mean()), 7),
        "lowest": round(float(difference.min()), 7),
        "highest": round(float(difference.max()), 7),
        "below_by_0.002": float(np.mean(difference < -0.002)),
        "within_0.02": float(np.mean(np.abs(difference) <= 0.02)),
    }


def _as_table(rows: Sequence[dict[str, Any]], pairs: int, threads: int) -> Table:
    names = ("mode", "ours, ms", "US-align, ms", "ratio", "mean |difference|", "lowest", "highest")
    table = Table(*names, title=f"TM-score, {pairs:,} pairs, {threads} threads, beside one US-align process a pair")
    for row in rows:
        differences = [f"{row[key]:.6f}" if key in row else "" for key in ("mean_absolute", "lowest", "highest")]
        peer = "" if row["usalign_ms"] is None else f"{row['usalign_ms']:.2f}"
        ratio = "" if row["ratio"] is None else f"{row['ratio']:.1f}"
        table.add_row(row["mode"], f"{row['ours_ms']:.3f}", peer, ratio, *differences)
    return table
