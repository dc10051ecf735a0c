"""Both TM-scores beside US-align, or TM-align where that is not installed, one process a pair, in one run."""

import json
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numba
import numpy as np
import polars as pl
from rich.table import Table

from pipeline import runlog
from pipeline.errors import ConfigError
from pipeline.stage import versions, write_json
from pipeline.tables import open_parquet
from submissions import align, tm_score, tmalign, usalign
from submissions.score_traces import Pair, read_pairs, tables_of

_MODES = {"residue-matched": "tm_usalign_c1_byresi", "sequence-independent": "tm_usalign_c1_seqindep"}
_THREADS = 2
_SAMPLE = 120  # pairs that the peer gets: it is slow


class Peer(NamedTuple):
    """A program that scores one pair of PDB files, and its options for both modes."""

    name: str
    program: Path
    options: dict[str, tuple[str, ...]]


def run(traces: Path, *, record: Path, repeats: int = 3) -> Table:
    """Time both scores, compare them with the scores stored beside the traces, and write it as JSON.

    Args:
        traces: folder as `submissions.score_traces` reads it; ``models`` may hold US-align's scores.
        record: where the JSON goes, unless what lies there is of more pairs.
        repeats: rounds, ours and the peer's in turn; the median counts.

    Returns:
        The same as a table.

    Raises:
        DataError: a table is missing or damaged.
    """
    tables_of(traces, stage="bench-tm")
    pairs, peer = read_pairs(traces), _find_peer()
    threads = min(_THREADS, numba.config.NUMBA_NUM_THREADS)  # type: ignore[attr-defined]
    before = numba.get_num_threads()
    numba.set_num_threads(threads)
    try:
        rows = [_row(mode, pairs, traces, peer, repeats) for mode in _MODES]
    finally:
        numba.set_num_threads(before)
    facts: dict[str, Any] = {"peer": peer and peer.name, "sample": len(_sample(pairs)) if peer else 0}
    facts |= {"pairs": len(pairs), "rows": rows, "threads": threads, "repeats": repeats, "versions": versions()}
    if record.is_file() and (kept := json.loads(record.read_text())["pairs"]) > len(pairs):
        runlog.say(f"bench-tm: {record} stays: it is of {kept:,} pairs")
    else:
        write_json(record, facts)
    return _as_table(facts)


def _find_peer() -> Peer | None:
    """US-align; TM-align where it is not installed; nothing, and why, where that cannot be built."""
    if program := usalign.find_program():
        return Peer(usalign.ENGINE, program, dict(zip(_MODES, (usalign.MATCHED, ()), strict=True)))
    try:
        program = tmalign.build()
    except ConfigError as err:
        runlog.say(str(err))
        return None
    options = (*tmalign.OPTIONS, *tmalign.MATCHED), tmalign.OPTIONS
    return Peer(tmalign.NAME, program, dict(zip(_MODES, options, strict=True)))


def _sample(values: Any) -> Any:
    """The pairs that the peer gets, or what belongs to them, of all."""
    return values[:: max(len(values) // _SAMPLE, 1)]


def _row(mode: str, pairs: Sequence[Pair], traces: Path, peer: Peer | None, repeats: int) -> dict[str, Any]:
    """Times of both in turn, and how the scores differ."""
    ours = _ours(mode, pairs)
    scores, stored = ours(), _stored(traces, _MODES[mode])  # compiles, too
    row: dict[str, Any] = {"mode": mode} | ({} if stored is None else _difference(scores, stored))
    if peer is None:
        return row | {"ours_ms": _milliseconds([_timed(ours) for _ in range(repeats)], len(pairs))}
    times: dict[str, list[float]] = {"ours": [], "peer": [], "empty": []}
    theirs: list[float] = []
    with tempfile.TemporaryDirectory() as folder:
        files = _write_files(_sample(pairs), Path(folder))
        for _ in range(repeats):
            times["ours"].append(_timed(ours))
            theirs.clear()
            times["peer"].append(_timed(lambda: theirs.extend(_by_peer(peer, mode, files))))
            times["empty"].append(_timed(lambda: [subprocess.run(["true"], check=True) for _ in files]))
    counts = {"ours": len(pairs), "peer": len(files), "empty": len(files)}
    row |= {f"{what}_ms": _milliseconds(values, counts[what]) for what, values in times.items()}
    row["ratio"] = round(row["peer_ms"] / row["ours_ms"], 1)
    return row if stored is None else row | {"peer_to_stored": _difference(np.array(theirs), _sample(stored))}


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


def _by_peer(peer: Peer, mode: str, files: Sequence[tuple[Path, Path]]) -> list[float]:
    return [usalign.run_program(peer.program, *each, options=peer.options[mode]) for each in files]


def _timed(action: Callable[[], Any]) -> float:
    started = time.perf_counter()
    action()
    return time.perf_counter() - started


def _milliseconds(times: Sequence[float], count: int) -> float:
    return round(1000 * statistics.median(times) / count, 4)


def _stored(traces: Path, column: str) -> np.ndarray | None:
    """US-align's scores that lie beside the traces, by model, if there are any."""
    path = traces / "models.parquet"
    with open_parquet(path) as opened:
        if column not in opened.schema_arrow.names:
            return None
    return pl.read_parquet(path, columns=["model_id", column]).sort("model_id")[column].to_numpy()


def _difference(scores: np.ndarray, stored: np.ndarray) -> dict[str, float]:
    """How far scores are from US-align's."""
    difference = scores - stored
    return {
        "mean_absolute": round(float(np.abs(difference).mean()), 7),
        "lowest": round(float(difference.min()), 7),
        "highest": round(float(difference.max()), 7),
        "below_by_0.002": float(np.mean(difference < -0.002)),
        "within_0.02": float(np.mean(np.abs(difference) <= 0.02)),
    }


def _as_table(facts: dict[str, Any]) -> Table:
    title = f"TM-score, {facts['pairs']:,} pairs, {facts['threads']} threads"
    beside = "no peer" if facts["peer"] is None else f"one process a pair of {facts['peer']}, {facts['sample']} pairs"
    names = (
        "mode",
        "ours, ms",
        "peer, ms",
        "ratio",
        "mean |difference| to US-align",
        "lowest",
        "highest",
        "peer's mean",
    )
    table = Table(
        *names, title=f"{title}; beside {beside}", title_justify="left", box=None, pad_edge=False, header_style="bold"
    )
    for row in facts["rows"]:
        differences = [f"{row[key]:.6f}" if key in row else "" for key in ("mean_absolute", "lowest", "highest")]
        peer, ratio = (
            f"{row[key]:{form}}" if key in row else "" for key, form in (("peer_ms", ".2f"), ("ratio", ".1f"))
        )
        agreed = f"{row['peer_to_stored']['mean_absolute']:.6f}" if "peer_to_stored" in row else ""
        table.add_row(row["mode"], f"{row['ours_ms']:.4f}", peer, ratio, *differences, agreed)
    return table
