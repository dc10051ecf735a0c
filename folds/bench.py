"""Our clustering beside MMseqs2 and cd-hit, judged by the relatives that each leaves across folds.

All programs get the same designs (`folds.similarity.find_designs`), 80 % identity and two threads. The judge is the
comparison of all pairs (of the mutants, of a sample with all): how many pairs of at least 80 % identity
have their ends in different clusters, and in different folds when five folds are filled with whole clusters.

Letters: N designs.
"""

import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numba
import numpy as np
import polars as pl
from rich.table import Table

from folds.components import find_roots, unite_pairs
from folds.edit_distance import pack
from folds.similarity import find_designs, link
from folds.split import assign_folds, parse_split
from folds.survey import PERCENTS, compare
from pipeline.errors import ConfigError, DataError
from pipeline.memory import peak_memory_mib
from pipeline.paths import REPOSITORY, Paths
from pipeline.runlog import say
from pipeline.schema import decode, encode
from pipeline.stage import versions, write_json
from pipeline.tables import open_parquet

#: Where the numbers are kept.
RECORD = REPOSITORY / "tests" / "benchmarks" / "folds.json"

_PERCENT = 80
_SPLIT = "sim80_k5"
_THREADS = 2
_TIMEOUT_S = 280
_JUDGED = 1_000  # mutants that are compared with all others
_MOST_CHANGED = 0.3  # share of a mutant's letters that may differ from its parent

#: A clustering: designs and scratch folder to the root of every design's cluster.
Clustering = Callable[[Sequence[str], Path], np.ndarray]


def run(
    paths: Paths,
    *,
    folder: Path,
    mutants: int = 100_000,
    scales: Sequence[int] = (400_000,),
    record: Path = RECORD,
    seed: int = 2026,
) -> Table:
    """Time every clustering that this machine has, judge it, and write the numbers to `record`.

    Args:
        paths: where the clean train table is.
        folder: scratch.
        mutants: size of the second data set, made of the first.
        scales: sizes at which the seeded clustering alone is timed.
        record: JSON file.
        seed: of the mutants and of the sample.

    Raises:
        DataError: no clean train table.
    """
    train = paths.clean("train")
    open_parquet(train, ("sequence_id", "sequence", "dataset_name")).close()
    table = pl.read_parquet(train, columns=["sequence", "dataset_name"])
    designs, _ = find_designs(table["sequence"].to_list(), table["dataset_name"].to_list())
    real = _in_order(designs)
    if len(real) < 2:
        raise DataError(f"{train}: {len(real)} design; expected sequences to cluster. Next: make data.")
    folder.mkdir(parents=True, exist_ok=True)
    numba.set_num_threads(min(_THREADS, numba.get_num_threads()))
    for method in ("exact", "seeded"):
        _ours(method, real[:200], Path())  # compiles
    made = make_mutants(real, mutants, seed=seed)
    some = np.sort(np.random.default_rng(seed).choice(len(made), min(_JUDGED, len(made)), replace=False))
    facts: dict[str, Any] = {"machine": {"cores": os.cpu_count(), "load_before": _load()}}
    facts |= {"versions": versions(), "threads": _THREADS, "percent": _PERCENT}
    facts["real"] = _measure(real, _clusterings(exhaustive=True), folder, queries=None, seed=seed)
    facts["mutants"] = _measure(made, _clusterings(exhaustive=False), folder, queries=some, seed=seed)
    facts["scales"] = [_scale(make_mutants(real, size, seed=seed)) for size in scales]
    facts["load_after"] = _load()
    write_json(record, facts)
    return _describe(facts)


def _in_order(texts: Sequence[str]) -> list[str]:
    return sorted(set(texts), key=lambda text: (len(text), text))


def make_mutants(parents: Sequence[str], count: int, *, seed: int) -> list[str]:
    """Mutants of random parents, sorted as the kernels want them, copies dropped.

    Each mutant has its own rate, uniform from 0 to 30 % of its letters: nine of ten changes replace a letter, the
    others insert or drop one.
    """
    rng = np.random.default_rng(seed)
    return _in_order([_mutate(parents[parent], rng) for parent in rng.integers(0, len(parents), count)])


def _mutate(parent: str, rng: np.random.Generator) -> str:
    tokens_L = encode(parent).astype(np.int64)
    size = len(tokens_L)
    changed_L, kind_L = rng.random(size) < rng.uniform(0, _MOST_CHANGED), rng.random(size)
    inserted_L, dropped_L = changed_L & (kind_L >= 0.9) & (kind_L < 0.95), changed_L & (kind_L >= 0.95)
    replaced_L = changed_L & ~inserted_L & ~dropped_L
    here_L = np.where(replaced_L, (tokens_L + rng.integers(1, 4, size)) % 4, tokens_L)
    pieces_L2 = np.stack([here_L, rng.integers(0, 4, size)], axis=1)
    return decode(pieces_L2[np.stack([~dropped_L, inserted_L], axis=1)]) or parent


def _load() -> list[float]:
    return [round(load, 1) for load in os.getloadavg()]


def _clusterings(*, exhaustive: bool) -> dict[str, Clustering]:
    """Clusterings that this machine can run."""
    found: dict[str, Clustering] = {"exact": partial(_ours, "exact")} if exhaustive else {}
    found["seeded"] = partial(_ours, "seeded")
    if shutil.which("mmseqs"):
        for name, command, options in (
            ("MMseqs2 easy-linclust", "easy-linclust", ()),
            ("MMseqs2 easy-cluster", "easy-cluster", ()),
            ("MMseqs2 easy-cluster, connected components", "easy-cluster", ("--cluster-mode", "1")),
        ):
            found[name] = partial(_mmseqs, command, options)
    if shutil.which("cd-hit-est"):
        found["cd-hit-est -n 5"] = _cd_hit
    return found


def _ours(method: Any, texts: Sequence[str], folder: Path) -> np.ndarray:
    parent_N = np.arange(len(texts))
    link(pack(texts), parent_N, percent=_PERCENT, method=method)
    return find_roots(parent_N)


def _mmseqs(command: str, options: Sequence[str], texts: Sequence[str], folder: Path) -> np.ndarray:
    """Clusters of MMseqs2, with 80 % coverage of both."""
    fasta = _write_fasta(texts, folder)
    search = ["--min-seq-id", str(_PERCENT / 100), "-c", "0.8", "--cov-mode", "0", "--dbtype", "2", *options]
    files = [str(path) for path in (fasta, folder / "out", folder / "tmp")]
    call = ["mmseqs", command, *files, *search, "--threads", str(_THREADS), "-v", "1"]
    done = subprocess.run(call, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()[-1:]
        raise ConfigError(
            f"bench-folds: mmseqs {command} failed with code {done.returncode}: {' '.join(said)}. Next: take it off "
            "the PATH."
        )
    pairs_P2 = np.array((folder / "out_cluster.tsv").read_text().split(), dtype=np.int64).reshape(-1, 2)
    parent_N = np.arange(len(texts))
    unite_pairs(parent_N, *pairs_P2.T.copy())
    return find_roots(parent_N)


def _write_fasta(texts: Sequence[str], folder: Path) -> Path:
    path = folder / "designs.fasta"
    path.write_text("".join(f">{place}\n{text}\n" for place, text in enumerate(texts)))
    return path


def _cd_hit(texts: Sequence[str], folder: Path) -> np.ndarray:
    """cd-hit-est with 80 % coverage of the shorter, both given on the + strand."""
    options = ["-c", str(_PERCENT / 100), "-n", "5", "-aS", "0.8", "-r", "0", "-T", str(_THREADS), "-M", "0"]
    command = ["cd-hit-est", "-i", str(_write_fasta(texts, folder)), "-o", str(folder / "out"), *options]
    subprocess.run(command, check=True, capture_output=True, timeout=_TIMEOUT_S)
    parent_N, first = np.arange(len(texts)), 0
    pairs = []
    for line in (folder / "out.clstr").read_text().splitlines():
        if line.startswith(">"):
            first = -1
            continue
        place = int(line.split(">")[1].split(".")[0])
        first = place if first < 0 else first
        pairs.append((first, place))
    unite_pairs(parent_N, *np.array(pairs, dtype=np.int64).T.copy())
    return find_roots(parent_N)


def _measure(
    texts: list[str], clusterings: dict[str, Clustering], folder: Path, *, queries: np.ndarray | None, seed: int
) -> dict[str, Any]:
    """Time each clustering and judge all of them in one comparison."""
    rows: dict[str, dict[str, Any]] = {}
    labels: dict[str, np.ndarray] = {}
    for name, clustering in clusterings.items():
        say(f"{len(texts):,} designs: {name}")
        found, rows[name] = _timed(clustering, texts, folder)
        if found is not None:
            labels[name] = found
            sizes = np.bincount(found)
            rows[name] |= {"clusters": int((sizes > 0).sum()), "largest": int(sizes.max())}
    folds = [_fold_by(cluster_N, texts, seed=seed) for cluster_N in labels.values()]
    apart = np.stack([np.arange(len(texts)), *labels.values(), *folds])
    survey = compare(pack(texts), apart, np.zeros(len(texts), bool), queries=queries)
    column = PERCENTS.index(_PERCENT)
    related = int(survey.counts_SP[0, column])
    for place, name in enumerate(labels, start=1):
        split, across = int(survey.counts_SP[place, column]), int(survey.counts_SP[place + len(labels), column])
        rows[name] |= {"pairs_in_two_clusters": split, "recall": 1 - split / max(1, related)}
        rows[name] |= {"pairs_in_two_folds": across, "highest": float(survey.highest_S[place + len(labels)])}
    compared = len(texts) if queries is None else len(queries)
    return {"designs": len(texts), "compared": compared, "related_pairs": related, "clusterings": rows}


def _timed(clustering: Clustering, texts: Sequence[str], folder: Path) -> tuple[np.ndarray | None, dict[str, Any]]:
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        started, cpu = time.perf_counter(), _cpu_seconds()
        try:
            found = clustering(texts, Path(scratch))
        except subprocess.TimeoutExpired:
            return None, {"seconds": None, "stopped_after_s": _TIMEOUT_S}
        seconds = time.perf_counter() - started
    return found, {"seconds": round(seconds, 2), "cpu_seconds": round(_cpu_seconds() - cpu, 2)}


def _cpu_seconds() -> float:
    """Of this process and its finished children, all threads: what a busy machine does not distort much."""
    times = os.times()
    return times.user + times.system + times.children_user + times.children_system


def _fold_by(labels_N: np.ndarray, texts: Sequence[str], *, seed: int) -> np.ndarray:
    names = [f"{label:09d}" for label in labels_N]
    ids = [f"{place:09d}" for place in range(len(texts))]
    table = pl.DataFrame({"sequence_id": ids, "sequence": list(texts), "cluster": names})
    table = table.with_columns(pl.lit("bench").alias("dataset_name"))
    return assign_folds(table, parse_split(_SPLIT), seed=seed, where=_SPLIT)["fold"].to_numpy().astype(np.int64)


def _scale(texts: list[str]) -> dict[str, Any]:
    say(f"{len(texts):,} designs: seeded")
    labels_N, times = _timed(partial(_ours, "seeded"), texts, Path(tempfile.gettempdir()))
    assert labels_N is not None
    clusters = len(np.unique(labels_N))
    return {"designs": len(texts), "clusters": clusters, "peak_memory_mib": round(peak_memory_mib())} | times


def _describe(facts: dict[str, Any]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", title_justify="left")
    table.title = (
        f"{_PERCENT} % identity, {_THREADS} threads; pairs in two folds by comparing all, or a sample with all"
    )
    for name in ("designs", "clustering", "s", "CPU s", "clusters", "pairs joined", "pairs in two folds", "highest"):
        table.add_column(name, justify="left" if name == "clustering" else "right")
    for data in ("real", "mutants"):
        for name, row in facts[data]["clusterings"].items():
            cells = [f"{facts[data]['designs']:,}", name]
            if row["seconds"] is None:
                table.add_row(*cells, f"> {row['stopped_after_s']}")
                continue
            cells += [f"{row['seconds']:.1f}", f"{row['cpu_seconds']:.1f}", f"{row['clusters']:,}"]
            table.add_row(*cells, f"{row['recall']:.4%}", f"{row['pairs_in_two_folds']:,}", f"{row['highest']:.1%}")
    for row in facts["scales"]:
        cells = [f"{row['designs']:,}", "seeded", f"{row['seconds']:.1f}", f"{row['cpu_seconds']:.1f}"]
        table.add_row(*cells, f"{row['clusters']:,}")
    return table
