"""The data stage beside what other libraries need for the bare conversion of the same file.

Every run is a process of its own, from the start of the interpreter to its end; the programs of the peers stand here as
text, so that none of them has to be installed.
"""

import importlib.util
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
from rich.table import Table

from pipeline import runlog
from pipeline.errors import PipelineError
from pipeline.paths import REPOSITORY
from pipeline.schema import ALPHABET, PROBES
from pipeline.stage import versions, write_json

#: What `run` writes beside the tests.
RECORD = REPOSITORY / "tests" / "benchmarks" / "data.json"

WIDTH = 206
OURS = "this project: validated, sorted, float32 lists"
LISTS = "polars lazy scan -> float32 lists -> sink"

_CHUNK_ROWS = 5000
#: Lengths in nt and their shares: those of the training libraries, so that 100,000 rows take 194 MB.
_LENGTHS, _SHARES = (115, 170, 177, 206), (0.06, 0.16, 0.60, 0.18)

_PREPARE = """
import sys
csv, out = sys.argv[1:]
names = open(csv).readline().strip().split(",")
reactivity = [name for name in names if name.startswith("reactivity_0")]
error = [name for name in names if name.startswith("reactivity_error_")]
"""
_FINISH = """
from pipeline.memory import peak_memory_mib
print(peak_memory_mib())
"""
#: what -> (package, program)
PEERS = {
    "pandas, whole file": ("pandas", "import pandas as pd; pd.read_csv(csv).to_parquet(out, compression='zstd')"),
    "pandas, chunks of 10k, float32": (
        "pandas",
        """
import pandas as pd, pyarrow as pa, pyarrow.parquet as pq
writer = None
for chunk in pd.read_csv(csv, chunksize=10_000, dtype=dict.fromkeys(reactivity + error, "float32")):
    table = pa.Table.from_pandas(chunk, preserve_index=False)
    writer = writer or pq.ParquetWriter(out, table.schema, compression="zstd")
    writer.write_table(table)
writer.close()
""",
    ),
    "polars lazy scan -> sink, wide": (
        "polars",
        "import polars as pl; pl.scan_csv(csv).sink_parquet(out, compression='zstd')",
    ),
    LISTS: (
        "polars",
        """
import polars as pl
scan = pl.scan_csv(csv, schema_overrides=dict.fromkeys(reactivity + error, pl.Float32))
lists = [pl.concat_list(reactivity).alias("reactivity"), pl.concat_list(error).alias("reactivity_error")]
scan.select(*names[:7], *lists).sink_parquet(out, compression="zstd")
""",
    ),
    "pyarrow streaming reader, wide": (
        "pyarrow",
        """
import pyarrow as pa, pyarrow.csv as pc, pyarrow.parquet as pq
types = dict.fromkeys(reactivity + error, pa.float32())
reader = pc.open_csv(csv, convert_options=pc.ConvertOptions(column_types=types))
with pq.ParquetWriter(out, reader.schema, compression="zstd") as writer:
    for batch in reader:
        writer.write_batch(batch)
""",
    ),
    "duckdb": (
        "duckdb",
        "import duckdb; duckdb.sql(f\"copy (from read_csv('{csv}')) to '{out}' (format parquet, compression zstd)\")",
    ),
    OURS: (
        "pipeline",
        """
from pathlib import Path
from pipeline import preprocess
from pipeline.competitions.ribonanza import RIBONANZA
from pipeline.paths import Paths
preprocess.run(RIBONANZA, Path(csv).parent, Paths(comp="ribonanza", root=Path(out)), force=True)
""",
    ),
}


def run(
    *, rows: int = 100_000, repeats: int = 3, folder: Path = Path("artifacts/bench"), record: Path = RECORD
) -> list[dict[str, Any]]:
    """Time the data stage and its peers on a synthetic wide CSV; print a table and write it as JSON.

    Args:
        rows: profiles in the file; 100,000 take 194 MB.
        repeats: runs of each, in turn; the median counts.
        folder: where the CSV is kept and outputs go.
        record: where the JSON goes.

    Returns:
        One dict per contestant: what, seconds (wall), peak_mib (resident), rows, ratio_to_polars_lists.
    """
    csv = folder.resolve() / f"rows{rows}" / "train_data.csv"
    if not csv.is_file():
        write_csv(csv, rows=rows)
    contestants = [what for what, (package, _) in PEERS.items() if _installed(what, package)]
    seen: dict[str, list[tuple[float, float]]] = {what: [] for what in contestants}
    for what in runlog.track(contestants * repeats, "bench-data", unit="runs"):
        seen[what].append(measure(what, csv, folder.resolve() / "out"))
    results = _summary(seen, rows=rows)
    write_json(record, {"rows": results, "repeats": repeats, "cpus": os.cpu_count(), "versions": versions()})
    runlog.console.print(_as_table(results, csv))
    return results


def write_csv(path: Path, *, rows: int) -> None:
    """Write a seeded training file in the competition's wide format, and a test file beside it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    names = ["sequence_id", "sequence", "experiment_type", "dataset_name", "reads", "signal_to_noise", "SN_filter"]
    stems = ("reactivity", "reactivity_error")
    names += [f"{stem}_{position:04d}" for stem in stems for position in range(1, WIDTH + 1)]
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        file.write((",".join(names) + "\n").encode())
        for columns in _chunks(rows):
            options = pa_csv.WriteOptions(include_header=False, quoting_style="none")
            pa_csv.write_csv(pa.table(columns, names=names), file, options)
    test = "id_min,id_max,sequence_id,sequence,future\n0,3,test,ACGU,0\n"
    (path.parent / "test_sequences.csv").write_text(test)
    part.replace(path)


def _chunks(rows: int) -> Iterator[list[pa.Array]]:
    rng = np.random.default_rng(2023)
    letters = np.frombuffer(ALPHABET.encode(), dtype=np.uint8)
    position = np.arange(WIDTH)
    for start in range(0, rows, _CHUNK_ROWS):
        count = min(_CHUNK_ROWS, rows - start)
        length = np.repeat(rng.choice(_LENGTHS, count, p=_SHARES)[: (count + 1) // 2], 2)[:count]
        keys = np.repeat(rng.integers(0, 2**48, (count + 1) // 2), 2)[:count]
        drawn = rng.integers(0, len(ALPHABET), ((count + 1) // 2, WIDTH))
        sequences = [letters[drawn[row // 2, :n]].tobytes().decode() for row, n in enumerate(length)]
        reads, signal = rng.integers(50, 50_000, count), np.round(rng.gamma(2, 3, count), 3)
        blank = (position < 26) | (position >= length[:, None] - 21)
        numbers = [rng.gamma(0.6, 0.6, (count, WIDTH)) - 0.1, rng.gamma(2, 0.05, (count, WIDTH))]
        yield [
            pa.array([f"{key:012x}" for key in keys]),
            pa.array(sequences),
            pa.array(np.resize(PROBES[::-1], count)),
            pa.array(np.resize(["bench_2A3", "bench_DMS"], count)),
            pa.array(reads),
            pa.array(signal),
            pa.array(((signal > 1) & (reads > 100)).astype(np.int8)),
            *(pa.array(np.round(x[:, k], 3), mask=blank[:, k]) for x in numbers for k in range(WIDTH)),
        ]


def _installed(what: str, package: str) -> bool:
    if importlib.util.find_spec(package) is None:
        runlog.say(f"bench-data: {what!r} is left out, {package} is not installed. Next: pip install '.[bench]'.")
        return False
    return True


def measure(what: str, csv: Path, out: Path) -> tuple[float, float]:
    """Wall seconds and peak resident MiB of one process."""
    command = [sys.executable, "-c", _PREPARE + PEERS[what][1] + _FINISH]
    command += [str(csv), str(out) if what == OURS else f"{out}.parquet"]
    started = time.monotonic()
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=REPOSITORY)
    seconds = time.monotonic() - started
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise PipelineError(f"bench-data: a program ended with code {done.returncode}: {last}. Next: install it anew.")
    return seconds, float(done.stdout.split()[-1])


def _summary(seen: dict[str, list[tuple[float, float]]], *, rows: int) -> list[dict[str, Any]]:
    median = {what: [statistics.median(values) for values in zip(*runs, strict=True)] for what, runs in seen.items()}
    lists = median[LISTS][0]
    return [
        {
            "what": what,
            "seconds": round(seconds, 2),
            "peak_mib": round(peak),
            "rows": rows,
            "ratio_to_polars_lists": round(seconds / lists, 2),
        }
        for what, (seconds, peak) in median.items()
    ]


def _as_table(results: list[dict[str, Any]], csv: Path) -> Table:
    title = f"{results[0]['rows']:,} rows, {csv.stat().st_size / 1e6:.0f} MB of CSV to zstd parquet"
    table = Table("", "seconds", "peak MiB", "time / polars lists", title=title)
    for row in sorted(results, key=lambda row: row["seconds"]):
        table.add_row(row["what"], f"{row['seconds']:.2f}", str(row["peak_mib"]), f"{row['ratio_to_polars_lists']:.2f}")
    return table
