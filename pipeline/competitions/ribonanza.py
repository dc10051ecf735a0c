"""Stanford Ribonanza RNA Folding (Kaggle 2023): chemical reactivity per nucleotide under two probes.

Source: DasLab/DataPrepRibonanzaKaggle2023 (MIT), output_kaggle_csv.m and score_mae_standard.m.
"""

import itertools
import json
import math
import shutil
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.competitions import base, ribonanza_hidden
from pipeline.competitions.base import PARQUET, Competition, length_counts
from pipeline.competitions.raw import (
    column_names,
    open_parquet,
    open_raw_bytes,
    read_batches,
    read_table,
    require_columns,
)
from pipeline.competitions.raw_files import find_table, kind_of, need_table
from pipeline.competitions.ribonanza_hidden import TEST_TYPES
from pipeline.competitions.wide import Choice, ProfileStore, find_layout, normalise_sequences
from pipeline.errors import DataError, StorageError
from pipeline.memory import peak_memory_mib
from pipeline.runlog import Bar
from pipeline.schema import PROBES
from pipeline.stage import sha256_file

TARGETS = tuple(f"reactivity_{probe}" for probe in PROBES)

#: Sequences of one row group of the clean table: about 28 MiB of numbers.
ROW_GROUP = 8192

_TRAIN, _TEST, _SAMPLE = "train_data", "test_sequences", "sample_submission"
_SIGNAL_EDGES = (-math.inf, 0.0, 0.5, 1.0, 2.0, 4.0, 8.0, 16.0, 32.0, math.inf)
_QUANTILES = (0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99)
_BIN_LOW, _BIN_HIGH, _BINS_PER_UNIT = -5, 15, 1000  # the organisers round reactivities to three decimals


#: The organisers' mean absolute error over one sequence that is ``scored``: positions of which either value is missing
#: have Usage = Ignored (create_Usage_column.m); the truth is clipped, the prediction is not (score_mae_standard.m).
error_sums = partial(base.error_sums, targets=TARGETS, target_range=(0.0, 1.0), power=1)
score = partial(base.mean_error, power=1)


def raw_files(raw: Path, *, test_only: bool = False) -> dict[str, Path]:
    """Raw files of the competition: ``train`` and ``test``, and those of ``sample, groups, manifest`` that are there.

    With `test_only` ``train`` is not looked for.

    - train: ``train_data``, test: ``test_sequences``, sample: ``sample_submission``, each as `find_table` takes them;
    - groups: ``library_groups.parquet`` (``sequence_id, group``), known relatives;
    - manifest: ``manifest.json``, ``{"files": {"train_data.csv": {"rows": …, "sha256": …}}}``, as a download leaves it.

    Raises:
        DataError: train or test is missing, or there are two of a kind.
    """
    files = {} if test_only else {"train": need_table(raw, _TRAIN)}
    files["test"] = need_table(raw, _TEST)
    optional = {"sample": find_table(raw, _SAMPLE), "groups": raw / "library_groups.parquet"}
    optional["manifest"] = raw / "manifest.json"
    return files | {label: path for label, path in optional.items() if path is not None and path.is_file()}


def clean(files: dict[str, Path], parts: dict[str, Path]) -> dict[str, Any]:
    """Write the clean train and test tables (test alone, if `parts` has no train); the facts are the report.

    Raises:
        DataError: a raw file is not what it should be.
        StorageError: the disk has no room for the scratch file.
    """
    if "train" not in parts:
        test, own = ribonanza_hidden.read_test(files["test"], files.get("sample"), targets=TARGETS)
        pq.write_table(test, parts["test"], row_group_size=ROW_GROUP, **PARQUET)
        if own is not None:
            pq.write_table(own, parts["sample"], **PARQUET)
        return {"test": _test_facts(test)}
    known_rows = _read_manifest(files)
    test = _clean_test(files["test"])
    test_facts = _test_facts(test)
    _check_rows(files["test"], _TEST, test.num_rows, known_rows)
    if "sample" in files:
        test_facts["sample_submission_rows"] = _check_sample(files["sample"], test)
    pq.write_table(test, parts["test"], row_group_size=ROW_GROUP, **PARQUET)
    _need_room(files["train"], parts["train"].parent)
    layout = find_layout(column_names(files["train"], _TRAIN), where=files["train"].name)
    with ProfileStore(parts["train"].parent, layout=layout, where=files["train"].name) as store:
        for batch in read_batches(files["train"], _TRAIN, layout.types):
            store.add(batch)
        _check_rows(files["train"], _TRAIN, store.rows, known_rows)
        choice = store.choose()
        groups, group_facts = _groups_of(choice.ids, files.get("groups"))
        facts = _write_train(store, choice, groups, parts["train"])
        hashes = store.index["letters_hash"][choice.rows_SP.max(axis=1)]
        test_facts["copies_of_train"] = int(
            np.isin(store.hash_sequences(test["sequence"].combine_chunks()), hashes).sum()
        )
    return facts | {"groups": group_facts, "test": test_facts, "peak_memory_mib": round(peak_memory_mib())}


def _write_train(store: ProfileStore, choice: Choice, groups: pa.StringArray, path: Path) -> dict[str, Any]:
    stats = [_ProbeStats() for _ in PROBES]
    passes_SP = (choice.rows_SP >= 0) & store.index["passes"][choice.rows_SP]
    scored = passes_SP.all(axis=1)
    datasets, disagreements = _dataset_names(store, choice)
    schema = _train_schema()
    count = len(choice.ids)
    with (
        pq.ParquetWriter(path, schema, **PARQUET) as writer,
        Bar("write train", total=count, unit="sequences") as bar,
    ):
        for start in range(0, count, ROW_GROUP):
            rows_NP = choice.rows_SP[start : start + ROW_GROUP]
            here = slice(start, start + len(rows_NP))
            columns = [choice.ids[here], store.read_sequences(rows_NP.max(axis=1)), datasets[here], groups[here]]
            columns.append(pa.array(scored[here]))
            for rows_N, probe_stats in zip(rows_NP.T, stats, strict=True):
                columns += _probe_columns(store, rows_N, probe_stats)
            writer.write_table(pa.table(columns, schema=schema), row_group_size=ROW_GROUP)
            bar.advance(len(rows_NP))
    lengths_S = store.index["length"][choice.rows_SP.max(axis=1)]
    return {
        "rows": store.rows,
        "sequences": count,
        "duplicates_resolved": choice.duplicates,
        "scored": int(scored.sum()),
        "probes": {probe: stat.facts() for probe, stat in zip(PROBES, stats, strict=True)},
        "lengths": length_counts(lengths_S),
        "datasets": dict(sorted((row["values"], row["counts"]) for row in datasets.value_counts().to_pylist())),
        "dataset_names_that_differ_between_probes": disagreements,
    }


def _train_schema() -> pa.Schema:
    fields = [("sequence_id", pa.string()), ("sequence", pa.string()), ("dataset_name", pa.string())]
    fields += [("group", pa.string()), ("scored", pa.bool_())]
    for probe in PROBES:
        fields += [
            (f"reactivity_{probe}", pa.list_(pa.float32())),
            (f"reactivity_error_{probe}", pa.list_(pa.float32())),
        ]
        fields += [(f"signal_to_noise_{probe}", pa.float32()), (f"reads_{probe}", pa.int64())]
        fields += [(f"SN_filter_{probe}", pa.bool_())]
    return pa.schema(fields)


def _probe_columns(store: ProfileStore, rows_N: np.ndarray, stats: "_ProbeStats") -> list[pa.Array]:
    """Reactivity, error, signal_to_noise, reads and SN_filter of one probe; rows of -1 give nulls."""
    absent_N = rows_N < 0
    index = store.index[rows_N[~absent_N]]
    reactivity_T, error_T = store.read_values(rows_N[~absent_N])
    stats.add(reactivity_T, index["signal_to_noise"], index["passes"])
    lengths_N = np.zeros(len(rows_N), dtype=np.int32)
    lengths_N[~absent_N] = index["length"]
    offsets = pa.array(np.concatenate([[0], np.cumsum(lengths_N)]).astype(np.int32))
    absent = pa.array(absent_N)
    lists = [
        pa.ListArray.from_arrays(offsets, pa.array(x_T, from_pandas=True), mask=absent)
        for x_T in (reactivity_T, error_T)
    ]
    place = pa.array(np.where(absent_N, 0, np.cumsum(~absent_N) - 1), mask=absent_N)
    signal = pa.array(index["signal_to_noise"], from_pandas=True)
    reads = pa.array(index["reads"], from_pandas=True).cast(pa.int64())
    return [*lists, *(column.take(place) for column in (signal, reads, pa.array(index["passes"])))]


class _ProbeStats:
    """What the report says of one probe, gathered piece by piece."""

    def __init__(self) -> None:
        self.profiles = self.passes = self.positions = self.measured = 0
        self.lowest, self.highest = math.inf, -math.inf
        self.bins = np.zeros((_BIN_HIGH - _BIN_LOW) * _BINS_PER_UNIT + 1, dtype=np.int64)
        self.signal = np.zeros(len(_SIGNAL_EDGES) - 1, dtype=np.int64)
        self.without_signal = 0

    def add(self, reactivity_T: np.ndarray, signal_N: np.ndarray, passes_N: np.ndarray) -> None:
        values = reactivity_T[~np.isnan(reactivity_T)]
        self.profiles += len(signal_N)
        self.passes += int(passes_N.sum())
        self.positions += reactivity_T.size
        self.measured += values.size
        known = signal_N[~np.isnan(signal_N)]
        self.without_signal += signal_N.size - known.size
        self.signal += np.bincount(np.digitize(known, _SIGNAL_EDGES[1:-1]), minlength=self.signal.size)
        if values.size:
            self.lowest, self.highest = min(self.lowest, float(values.min())), max(self.highest, float(values.max()))
            bins = np.rint((np.clip(values, _BIN_LOW, _BIN_HIGH) - _BIN_LOW) * _BINS_PER_UNIT).astype(np.int32)
            self.bins += np.bincount(bins, minlength=self.bins.size)

    def facts(self) -> dict[str, Any]:
        names = [f"{low:g} to {high:g}" for low, high in itertools.pairwise(_SIGNAL_EDGES)]
        return {
            "profiles": self.profiles,
            "pass_SN_filter": self.passes,
            "null_share": round(1 - self.measured / self.positions, 4) if self.positions else None,
            "reactivity": self._range(),
            "signal_to_noise": dict(zip(names, self.signal.tolist(), strict=True)) | {"not given": self.without_signal},
        }

    def _range(self) -> dict[str, float]:
        """Least, largest and quantiles to 0.001, those outside the bins counted as the outermost."""
        if not self.measured:
            return {}
        ranks = np.ceil(np.array(_QUANTILES) * self.measured)
        places = np.searchsorted(np.cumsum(self.bins), ranks)
        values = np.round(places / _BINS_PER_UNIT + _BIN_LOW, 3).tolist()
        names = [f"q{100 * quantile:02.0f}" for quantile in _QUANTILES]
        return {"min": round(self.lowest, 3)} | dict(zip(names, values, strict=True)) | {"max": round(self.highest, 3)}


def _dataset_names(store: ProfileStore, choice: Choice) -> tuple[pa.StringArray, int]:
    """[S] names without the probe's ending, the first probe's where they differ, and how many differ."""
    stems = sorted({_without_probe(name, probe) for name in store.dataset_names for probe in PROBES})
    place = {stem: code for code, stem in enumerate(stems)}
    stem_of = np.array([[place[_without_probe(name, probe)] for probe in PROBES] for name in store.dataset_names])
    code_SP = np.stack([stem_of[store.index["dataset"][choice.rows_SP[:, p]], p] for p in range(len(PROBES))], axis=1)
    code_SP[choice.rows_SP < 0] = -1
    first_S = np.where(code_SP[:, 0] >= 0, code_SP[:, 0], code_SP[:, 1])
    differ = (code_SP >= 0).all(axis=1) & (code_SP[:, 0] != code_SP[:, 1])
    return pa.array(stems).take(pa.array(first_S)), int(differ.sum())


def _without_probe(name: str, probe: str) -> str:
    """A data set's name without ``_2A3``, ``_DMS`` or the probe's long form at its end."""
    return name.removesuffix(f"_{probe}").removesuffix(f"_{probe.removesuffix('_MaP')}") or name


def _groups_of(ids: pa.StringArray, path: Path | None) -> tuple[pa.StringArray, dict[str, int]]:
    """[S] known relatives of each sequence, null = none known."""
    if path is None:
        return pa.nulls(len(ids), pa.string()), {"joined": 0}
    require_columns(column_names(path, path.stem), ["sequence_id", "group"], where=path.name)
    table = read_table(path, path.stem, {"sequence_id": pa.string(), "group": pa.string()})
    keys = table["sequence_id"].combine_chunks()
    _refuse_twice(keys, where=path.name)
    names = table["group"].combine_chunks()
    names = pc.if_else(pc.equal(names, ""), pa.scalar(None, pa.string()), names)
    groups = names.take(pc.index_in(ids, value_set=keys))
    unknown = pc.sum(pc.invert(pc.is_in(keys, value_set=ids))).as_py() or 0
    return groups, {
        "joined": len(groups) - groups.null_count,
        "groups": len(groups.drop_null().unique()),
        "ids_not_in_train": unknown,
    }


def _refuse_twice(keys: pa.StringArray, *, where: str) -> None:
    counts = keys.value_counts()
    bad = pc.filter(counts.field(0), pc.or_(pc.greater(counts.field(1), 1), pc.equal(counts.field(0), "")))
    if len(bad):
        raise DataError(
            f"{where}: sequence_id {bad[0].as_py()!r}; expected an id, and each once. Next: repair the file."
        )


def _clean_test(path: Path) -> pa.Table:
    require_columns(column_names(path, _TEST), list(TEST_TYPES), where=path.name)
    batches: list[pa.RecordBatch] = []
    rows = 1
    for batch in read_batches(path, _TEST, TEST_TYPES):
        sequences = normalise_sequences(batch["sequence"], batch["sequence_id"], where=path.name, first_row=rows)
        batches.append(batch.set_column(1, "sequence", sequences))
        rows += batch.num_rows
    table = pa.Table.from_batches(batches)
    _check_ids(table, where=path.name)
    return table.sort_by("id_min")


def _test_facts(table: pa.Table) -> dict[str, Any]:
    lengths_S = pc.utf8_length(table["sequence"]).to_numpy()
    return {
        "sequences": table.num_rows,
        "future": int(pc.sum(table["future"]).as_py() or 0),
        "positions": int(lengths_S.sum()),
        "first_id": table["id_min"][0].as_py() if table.num_rows else None,
        "lengths": length_counts(lengths_S),
    }


def _check_ids(table: pa.Table, *, where: str) -> None:
    """Refuse double ids and row ids that do not count the positions of all sequences one after the other."""
    keys = table["sequence_id"].combine_chunks()
    _refuse_twice(keys, where=where)
    if table["id_min"].null_count or table["id_max"].null_count or table["future"].null_count:
        raise DataError(f"{where}: id_min, id_max or future has an empty cell; expected none. Next: download it again.")
    lengths_S = pc.utf8_length(table["sequence"]).to_numpy().astype(np.int64)
    low_S, high_S = table["id_min"].to_numpy(), table["id_max"].to_numpy()
    wrong = np.flatnonzero(high_S - low_S + 1 != lengths_S)
    if wrong.size:
        row = int(wrong[0])
        raise DataError(
            f"{where}: row {row + 1:,} (id {keys[row].as_py()}): id_min {low_S[row]} to id_max {high_S[row]}; expected "
            f"{lengths_S[row]} ids, one per letter. Next: download it again."
        )
    order = np.argsort(low_S, kind="stable")
    gap = np.flatnonzero(low_S[order][1:] != high_S[order][:-1] + 1)
    if gap.size:
        row = int(order[gap[0] + 1])
        raise DataError(
            f"{where}: row {row + 1:,} (id {keys[row].as_py()}): id_min {low_S[row]} comes after "
            f"id_max {high_S[order][gap[0]]}; expected no gap and no overlap. Next: download it again."
        )


def _check_sample(path: Path, test: pa.Table) -> int:
    """Number of rows of a sample submission that belongs to `test`; the file is never held in memory."""
    names = column_names(path, _SAMPLE)
    if names != ["id", *TARGETS]:
        raise DataError(
            f"{path.name}: columns {', '.join(names[:6])}; expected id, {', '.join(TARGETS)}: it is from another "
            "competition. Next: put Ribonanza's sample_submission there, or none."
        )
    first, last, rows = _parquet_ends(path) if kind_of(path) == "parquet" else _csv_ends(path)
    low, high = test["id_min"][0].as_py(), test["id_max"][-1].as_py()
    if (first, last, rows) != (str(low), str(high), high - low + 1):
        raise DataError(
            f"{path.name}: ids {first} to {last} in {rows:,} rows; expected {low} to {high}, one row each, as "
            "test_sequences has them: it is cut short or from another competition. Next: download both again."
        )
    return rows


def _csv_ends(path: Path) -> tuple[str, str, int]:
    """First id, last id and number of rows, from the lines' ends alone: 270 million rows pass at the disk's speed."""
    rows, head, tail = -1, b"", b""
    with open_raw_bytes(path, _SAMPLE) as source, Bar(f"read {_SAMPLE}", total=source.total >> 20, unit="MiB") as bar:
        shown = 0
        while block := source.read(1 << 22):
            head = head or block[:4096]
            tail = (tail + block)[-4096:]
            rows += block.count(b"\n")
            bar.advance((source.consumed >> 20) - shown)
            shown = source.consumed >> 20
    end = tail.rstrip(b"\r\n")
    rows -= tail[len(end) :].count(b"\n") - 1  # blank lines at the end are none
    lines = head.splitlines()
    first = lines[1].split(b",")[0] if len(lines) > 1 else b""
    last = end.splitlines()[-1].split(b",")[0]
    return first.decode("utf-8", "replace"), last.decode("utf-8", "replace"), rows


def _parquet_ends(path: Path) -> tuple[str, str, int]:
    first = last = None
    with open_parquet(path) as file:
        for batch in file.iter_batches(1 << 20, columns=["id"]):
            first = batch["id"][0] if first is None else first
            last = batch["id"][-1]
        return str(first), str(last), file.metadata.num_rows


def _read_manifest(files: dict[str, Path]) -> dict[str, int]:
    """File name -> number of rows, as the download counted them; files whose bytes changed since are refused."""
    path = files.get("manifest")
    if path is None:
        return {}
    try:
        entries = dict(json.loads(path.read_text())["files"])
        rows = {name: int(entry["rows"]) for name, entry in entries.items() if "rows" in entry}
    except (ValueError, KeyError, TypeError) as err:
        raise DataError(
            f'{path.name}: {err!r}; expected {{"files": {{name: {{"rows": …, "sha256": …}}}}}}. '
            "Next: download again, or remove the file."
        ) from err
    for file in set(files.values()):
        wanted = entries.get(file.name, {}).get("sha256")
        if wanted and wanted != sha256_file(file):
            raise DataError(
                f"{file.name}: its sha256 is not the manifest's: damaged or replaced. Next: download it again."
            )
    return rows


def _check_rows(path: Path, stem: str, rows: int, known: dict[str, int]) -> None:
    wanted = known.get(path.name, known.get(f"{stem}.csv", rows))
    if rows != wanted:
        raise DataError(f"{path.name}: {rows:,} rows; the manifest says {wanted:,}. Next: download it again.")


def _need_room(train: Path, folder: Path) -> None:
    """The scratch file is about as large as the unpacked CSV, the clean table a third of it."""
    kind = kind_of(train)
    if kind == "parquet":
        with open_parquet(train) as file:
            needed = file.metadata.num_rows * file.metadata.num_columns * 4
    else:
        with open_raw_bytes(train, _TRAIN) as source:
            needed = source.total * (4 if kind == "gzip" else 1)
    needed += needed // 3
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise StorageError(
            f"{folder}: {free / 1e9:.1f} GB are free; about {needed / 1e9:.1f} GB are needed for {train.name}. "
            "Next: free space, or choose another artifacts folder."
        )


RIBONANZA = Competition(
    name="ribonanza",
    title="Stanford Ribonanza RNA Folding",
    slug="stanford-ribonanza-rna-folding",
    files=("train_data.csv", "test_sequences.csv", "sample_submission.csv"),
    task="values",
    row_key="id",
    targets=TARGETS,
    target_range=(0.0, 1.0),
    shown_ranges=((0.0, 1.0),) * 2,
    meaning="Reactivity is high where a nucleotide is free to move, as unpaired ones are, and low where it is paired; "
    "DMS tells of A and C above all, 2A3 of every nucleotide.",
    signal_to_noise=tuple(f"signal_to_noise_{probe}" for probe in PROBES),
    metric="MAE",
    error_sums=error_sums,
    score=score,
    tables=("train", "test"),
    raw_files=raw_files,
    clean=clean,
    test_inputs=("test", "sample"),
    either=("sample",),  # of a hidden test set, where its rows are others
    test_tables=("test", "sample"),
)
