"""The file that is uploaded, streamed from a prediction table and checked before it gets its name.

A submission of values has one row per nucleotide of all test sequences, 269,796,671 for Ribonanza. Predictions may come
in any order of sequences, so they are first dealt to scratch files beside the output, one for every two million rows
(2.2 GB in all for Ribonanza), and each is put in order in memory. Memory is that of one scratch file, and an id, a
length and a flag for each sequence.

Letters: T rows (nucleotides), C value columns, K test sequences.
"""

import contextlib
import itertools
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import polars as pl
import pyarrow as pa
import pyarrow.parquet as pq
from rich.markup import escape
from rich.table import Table

from pipeline.competitions.base import Competition
from pipeline.errors import ConfigError, DataError
from pipeline.labels import read_labels
from pipeline.memory import peak_memory_mib
from pipeline.paths import Paths
from pipeline.runlog import Bar, amount, say, size_text, warn
from pipeline.runs import require_same_test
from pipeline.stage import Report, read_manifest, read_result, run_stage, sha256_file
from pipeline.tables import finite_values, read_batches
from submissions.check import check_file
from submissions.class_write import class_inputs, write_classes
from submissions.layout import IdRuns, Layout, TestIndex, layout_of, read_own_rows, read_test_index
from submissions.number_rows import number_inputs, write_numbers
from submissions.structure_write import write_structures
from submissions.value_fill import Medians, medians_file, read_medians, take_own_rows

VERSION = 2

#: Decimals of a value in a CSV; half of the last one, 0.00005, is below any difference of scores that means something.
#: Of a set of one's own, whose unit nobody knows, all digits of a float32 are written.
DECIMALS = 4

#: Rows of a scratch file: 16 MiB for two values.
_SCRATCH_ROWS = 1 << 21
_SHOWN = 30  # most columns whose ranges the terminal lists
#: Rows that are formatted together.
_CHUNK_ROWS = 1 << 16


def run(paths: Paths, *, competition: Competition, name: str, fmt: str = "csv", fill: bool = False) -> Report:
    """Write the submission that `Paths.submission` names, from ``ensembles/<name>/test.parquet``.

    Args:
        paths: where the artefacts are and where submissions go.
        competition: columns, range, and whether values, classes, numbers or structures are submitted.
        name: of the ensemble.
        fmt: "csv" or "parquet".
        fill: complete what is not predicted: structures with hairpin, helix and random walks, values with training's
            medians, which a notebook's bundle brings; the ensemble may be absent then. For a notebook that must have a
            file before it has predictions.

    Raises:
        ConfigError: an unknown format, or nothing to fill with.
        DataError: predictions missing, twice, of another length, not finite, of an earlier test set or of other
            classes or numbers; or the written file fails its check.
            Nothing is left under the final name then that was not there before.
    """
    if fmt not in ("csv", "parquet"):
        raise ConfigError(f"FORMAT={fmt!r}: expected csv or parquet. Next: FORMAT=csv.")
    home = paths.ensemble_dir(name)
    inputs = {"predictions": home / "test.parquet", "test": paths.clean("test")}
    if competition.task == "structure":
        inputs["sample"] = paths.clean("sample")
    elif competition.task == "values":
        inputs |= {"sample": paths.clean("sample")} if paths.clean("sample").is_file() else {}
        inputs |= {"medians": medians_file(paths, name)} if fill and read_medians(paths, competition, name) else {}
    elif fill:
        raise ConfigError(f"submit: {competition.name} has nothing to fill in here. Next: leave --fill out.")
    if competition.task == "classes":
        inputs |= class_inputs(paths, name)
    if competition.task == "numbers":
        inputs |= number_inputs(paths, competition)
    decimals = _decimals(competition)
    build = partial(_build, paths, competition, inputs["predictions"], fmt=fmt, fill=fill)
    if fill and not inputs["predictions"].is_file():
        del inputs["predictions"]
    elif inputs["test"].is_file():
        _require_current(paths, competition, name)
    return run_stage(
        "submit",
        inputs=inputs,
        outputs={"submission": paths.submission(name, suffix=fmt)},
        params={"version": VERSION, **competition.params, "format": fmt, "decimals": decimals, "fill": fill},
        build=build,
        manifest=home / f"submit-{fmt}.manifest.json",
    )


def _require_current(paths: Paths, competition: Competition, name: str) -> None:
    """See that an ensemble is of the test set, and of the classes or numbers, that the clean tables hold now.

    Predictions of one that were made anew since it joined them are told.

    Raises:
        DataError: it is not, or its runs are not.
    """
    home = paths.ensemble_dir(name)
    done = read_manifest(home / "ensemble.manifest.json") or {}
    joined = {
        (found[1], int(found[2])): digest
        for label, digest in done.get("inputs", {}).items()
        if (found := re.fullmatch(r"(.+)/fold(\d+)/test", label))
    }
    require_same_test(paths, joined)
    again = f"make ensemble NAME={name}"
    if (done.get("notes") or {}).get("table") not in (None, sha256_file(paths.clean("test"))):
        raise DataError(f"{home}: {paths.clean('test')} changed since these predictions were joined. Next: {again}.")
    if (home / "weights.json").is_file() and competition.has_labels:
        told, labels = read_result(home / "weights.json", hint=again), read_labels(paths)
        names = told["classes"]["names"] if "classes" in told else told["targets"]
        if names != list(labels.names):
            raise DataError(
                f"{home}: predictions of {', '.join(names[:5])}; the {labels.kind} are {', '.join(labels.names[:5])} "
                f"by now. Next: train again, then {again}."
            )
    for (run, fold), digest in joined.items():
        made = read_manifest(paths.fold_dir(run, fold) / "predict-test.manifest.json")
        if made and digest not in made.get("outputs", {}).values():
            warn(f"{home}: {run} fold{fold} was predicted anew since it was joined. Next: {again}, then make submit.")


def _build(
    paths: Paths, competition: Competition, predictions: Path, parts: dict[str, Path], *, fmt: str, fill: bool
) -> dict[str, Any]:
    part = parts["submission"]
    started = time.monotonic()
    layout: Layout
    if competition.task == "structure":
        layout, facts = write_structures(paths, competition, predictions, part, fmt=fmt, fill=fill)
    elif competition.task == "classes":
        layout, facts = write_classes(paths, predictions, part, fmt=fmt)
    elif competition.task == "numbers":
        layout, facts = write_numbers(paths, competition, predictions, part, fmt=fmt)
    else:
        medians = read_medians(paths, competition, predictions.parent.name) if fill else None
        layout, facts = _write_values(paths, competition, predictions, part, fmt=fmt, medians=medians)
    rows, seconds = layout.keys.rows, time.monotonic() - started
    say(f"submit: {rows:,} rows in {seconds:.1f} s ({rows / max(seconds, 1e-9):,.0f} rows/s), checking them")
    checked_from = time.monotonic()
    facts |= check_file(part, layout)
    checked = time.monotonic() - checked_from
    say(f"check: {rows:,} rows in {checked:.1f} s ({rows / max(checked, 1e-9):,.0f} rows/s): accepted")
    return facts | {
        "write_seconds": round(seconds, 3),
        "check_seconds": round(checked, 3),
        "bytes": part.stat().st_size,
        "peak_memory_mib": round(peak_memory_mib()),
    }


# ------------------------------------------------------------------------------------------------------------- values


def _write_values(
    paths: Paths, competition: Competition, predictions: Path, part: Path, *, fmt: str, medians: Medians | None
) -> tuple[Layout, dict[str, Any]]:
    index = read_test_index(paths.clean("test"))
    layout = layout_of(competition, index.keys(competition))
    scratch = part.with_name(f"{part.name}.scratch")
    scratch.mkdir()
    try:
        given = _given(predictions, paths.clean("test"), index, competition.targets, medians)
        dealt = _deal(given, index, scratch)
        chunks = _clipped(_in_order(dealt, index, layout), layout)
        if fmt == "csv":
            clipped = _write_csv(chunks, layout, part, decimals=_decimals(competition))
        else:
            clipped = _write_parquet(chunks, layout, part)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    if (own := read_own_rows(paths, competition)) is not None:
        take_own_rows(own, part, fmt=fmt, medians=medians, decimals=_decimals(competition))
        layout = layout_of(competition, own)
    facts = {"clipped_values": clipped} if competition.target_range else {}  # without a range nothing is cut
    return layout, {"sequences": len(index.ids), **facts}


_Given = Iterator[tuple[np.ndarray, np.ndarray]]


def _given(
    predictions: Path, test: Path, index: TestIndex, targets: tuple[str, ...], medians: Medians | None
) -> _Given:
    """Places of sequences in `index`, in rising order, and their values, [T, C]: predicted ones, then medians."""
    places = pl.DataFrame({"sequence_id": index.ids, "place": np.arange(len(index.ids))})
    twice = places.filter(pl.col("sequence_id").is_duplicated())
    if twice.height:
        raise DataError(f"clean test table: {twice['sequence_id'][0]} is there twice. Next: make data.")
    seen_K = np.zeros(len(index.ids), dtype=bool)
    for batch in read_batches(predictions, ["sequence_id", *targets]) if predictions.is_file() or not medians else ():
        batch = batch.join(places, on="sequence_id", how="left", validate="m:1", maintain_order="left")
        batch = batch.sort("place")
        _check_places(batch, seen_K, predictions)
        place_N = batch["place"].to_numpy()
        seen_K[place_N] = True
        yield place_N, finite_values(batch, index.length_K[place_N], targets=targets, where=str(predictions))
    if medians is None:
        _check_complete(index.ids.filter(pl.Series(~seen_K)), len(seen_K), predictions)
    elif not seen_K.all():
        (warn if seen_K.any() else say)(
            f"submit: {(~seen_K).sum():,} of {len(seen_K):,} sequences are not predicted: training's medians by letter"
        )
        before = 0
        for batch in read_batches(test, ["sequence"]):
            place_N = before + np.flatnonzero(~seen_K[before : before + batch.height])
            yield place_N, medians.of("".join(batch["sequence"].gather(place_N - before)))
            before += batch.height


def _deal(given: _Given, index: TestIndex, scratch: Path) -> list[tuple[Path, np.ndarray]]:
    """Write the values of every sequence to the scratch file that holds its rows.

    Returns:
        The files in the order of their rows, each with the sequences (places in `index`) in it, one after the other.
    """
    file_K = index.offsets // _SCRATCH_ROWS
    files = [scratch / f"{number}.values" for number in np.unique(file_K)]
    file_K = np.unique(file_K, return_inverse=True)[1]
    dealt: list[list[np.ndarray]] = [[] for _ in files]
    with contextlib.ExitStack() as stack, Bar("place predictions", total=len(file_K), unit="sequences") as bar:
        handles = [stack.enter_context(file.open("wb")) for file in files]
        for place_N, values_TC in given:
            length_N = index.length_K[place_N]
            ends_N = np.cumsum(length_N)
            for first, last in _stretches(file_K[place_N]):
                file = file_K[place_N[first]]
                handles[file].write(values_TC[ends_N[first] - length_N[first] : ends_N[last]].tobytes())
                dealt[file].append(place_N[first : last + 1])
            bar.advance(len(place_N))
    return [(file, np.concatenate(parts)) for file, parts in zip(files, dealt, strict=True)]


def _check_places(batch: pl.DataFrame, seen_K: np.ndarray, predictions: Path) -> None:
    unknown = batch.filter(pl.col("place").is_null())
    if unknown.height:
        raise DataError(
            f"{predictions}: {unknown['sequence_id'][0]!r} is not among the test sequences; the predictions are of "
            "other data. Next: make predict, then make ensemble."
        )
    again = batch.filter(pl.col("place").is_duplicated() | pl.Series(seen_K[batch["place"].to_numpy()]))
    if again.height:
        raise DataError(f"{predictions}: {again['sequence_id'][0]} is predicted twice. Next: make ensemble.")


def _check_complete(lost: pl.Series, expected: int, predictions: Path) -> None:
    if lost.len():
        raise DataError(
            f"{predictions}: no prediction of {', '.join(lost.head(3).to_list())} ({lost.len():,} of {expected:,} test "
            "sequences); expected all. Next: make predict, then make ensemble."
        )


def _stretches(label_N: np.ndarray) -> Iterator[tuple[int, int]]:
    """First and last index of every stretch of equal labels."""
    if len(label_N):
        cuts = np.flatnonzero(np.diff(label_N))
        yield from zip([0, *(cuts + 1).tolist()], [*cuts.tolist(), len(label_N) - 1], strict=True)


def _in_order(dealt: list[tuple[Path, np.ndarray]], index: TestIndex, layout: Layout) -> Iterator[np.ndarray]:
    """[T, C] float32 values of the scratch files, in the order of the submission's rows."""
    for file, place_N in dealt:
        values_TC = np.fromfile(file, dtype=np.float32).reshape(-1, len(layout.values))
        length_N = index.length_K[place_N]
        start_N = np.cumsum(length_N) - length_N
        order_N = np.argsort(place_N)
        shift_N = start_N[order_N] - (np.cumsum(length_N[order_N]) - length_N[order_N])
        yield values_TC[np.arange(len(values_TC)) + np.repeat(shift_N, length_N[order_N])]


def _clipped(parts: Iterator[np.ndarray], layout: Layout) -> Iterator[tuple[int, np.ndarray, int]]:
    """(rows before, [T, C] float32 within the range, how many values were outside it) from start to end."""
    rows = 0
    with Bar("write", total=layout.keys.rows, unit="rows") as bar:
        for part_TC in parts:
            for start in range(0, len(part_TC), _CHUNK_ROWS):
                values_TC = part_TC[start : start + _CHUNK_ROWS]
                inside_TC = np.clip(values_TC, np.float32(layout.low), np.float32(layout.high))
                yield rows, inside_TC, int((inside_TC != values_TC).sum())
                rows += len(values_TC)
                bar.advance(len(values_TC))


_Chunks = Iterator[tuple[int, np.ndarray, int]]


def _decimals(competition: Competition) -> int | None:
    return None if competition.is_own else DECIMALS


def _write_csv(chunks: _Chunks, layout: Layout, part: Path, *, decimals: int | None) -> int:
    clipped = 0
    fixed = isinstance(layout.keys, IdRuns) and layout.low >= 0.0 and layout.high < 10.0
    formatter = FixedWidth(layout) if fixed else partial(format_rows, decimals=decimals)
    with part.open("wb") as handle:
        handle.write((",".join(layout.columns) + "\n").encode())
        for start, values_TC, outside in chunks:
            (key_T,) = layout.keys.block(start, start + len(values_TC)).values()
            handle.write(formatter(key_T, values_TC))
            clipped += outside
    return clipped


def _write_parquet(chunks: _Chunks, layout: Layout, part: Path) -> int:
    clipped = 0
    (key,), is_number = layout.keys.names, isinstance(layout.keys, IdRuns)
    kinds = [(key, pa.uint32() if is_number else pa.string()), *((name, pa.float32()) for name in layout.values)]
    with pq.ParquetWriter(part, pa.schema(kinds), compression="zstd", write_page_checksum=True) as writer:
        for start, values_TC, outside in chunks:
            keys = pa.array(layout.keys.block(start, start + len(values_TC))[key], kinds[0][1])
            columns = [pa.array(np.ascontiguousarray(values_TC[:, place])) for place in range(values_TC.shape[1])]
            writer.write_table(pa.Table.from_arrays([keys, *columns], schema=writer.schema))
            clipped += outside
    return clipped


def format_rows(key_T: np.ndarray, values_TC: np.ndarray, *, decimals: int | None = DECIMALS) -> bytes:
    """CSV lines of keys and values, for any range: the reference of `FixedWidth`; None = all digits of a float32."""
    columns = {"key": key_T} | {str(place): values_TC[:, place] for place in range(values_TC.shape[1])}
    return pl.DataFrame(columns).write_csv(include_header=False, float_precision=decimals).encode()


class FixedWidth:
    """`format_rows` for values in [0, 10): every value has the same width, so that lines are gathered from tables.

    3.6 times as fast as `format_rows` on one thread (5.6 and 1.6 million rows a second).
    """

    def __init__(self, layout: Layout) -> None:
        scale = 10**DECIMALS
        texts = "".join(f",{number / scale:.{DECIMALS}f}" for number in range(round(layout.high * scale) + 1))
        self._scale = scale
        self._values = np.frombuffer(texts.encode(), dtype=np.uint8).reshape(-1, DECIMALS + 3)
        digits = "".join(f"{number:04d}" for number in range(10_000))
        self._digits = np.frombuffer(digits.encode(), dtype=np.uint8).reshape(-1, 4)

    def __call__(self, ids_T: np.ndarray, values_TC: np.ndarray) -> bytes:
        """CSV lines of rising ids >= 0 and finite values in the layout's range."""
        edges = np.searchsorted(ids_T, [10**power for power in range(1, 19)])  # rows with fewer digits come first
        cuts = [0, *edges.tolist(), len(ids_T)]
        parts = [
            self._lines(ids_T[start:stop], values_TC[start:stop], digits)
            for digits, (start, stop) in enumerate(itertools.pairwise(cuts), start=1)
            if stop > start
        ]
        return b"".join(parts)

    def _lines(self, ids_T: np.ndarray, values_TC: np.ndarray, digits: int) -> bytes:
        width = self._values.shape[1]
        lines = np.empty((len(ids_T), digits + width * values_TC.shape[1] + 1), dtype=np.uint8)
        rest_T, end = ids_T, digits
        while end > 0:
            rest_T, low_T = np.divmod(rest_T, 10_000)
            take = min(4, end)
            lines[:, end - take : end] = self._digits[low_T, 4 - take :]
            end -= take
        steps_TC = np.rint(values_TC.astype(np.float64) * self._scale).astype(np.intp)
        for place in range(values_TC.shape[1]):
            start = digits + place * width
            lines[:, start : start + width] = self._values[steps_TC[:, place]]
        lines[:, -1] = ord("\n")
        return lines.tobytes()


# ------------------------------------------------------------------------------------------------------- what it says


def describe(facts: Mapping[str, Any]) -> Table:
    """Rows, size and ranges of a written submission, as a table for the terminal."""
    table = Table(box=None, show_header=False, pad_edge=False)
    told = f"{facts['rows']:,} for {amount(facts['sequences'], 'sequence')}, {size_text(facts['bytes'])}"
    table.add_row("rows", told)
    ranges = list(_of_axes(facts["ranges"]).items())
    for name, (low, high) in ranges[:_SHOWN]:
        table.add_row(escape(name), f"{low:.4g} to {high:.4g}")
    if rest := [both for _, both in ranges[_SHOWN:]]:
        low, high = min(low for low, _ in rest), max(high for _, high in rest)
        table.add_row(f"{len(rest):,} more", f"{low:.4g} to {high:.4g}")
    if "labels" in facts:
        table.add_row("labels", escape(facts["labels"]))
    if "clipped_values" in facts:
        table.add_row("clipped", f"{facts['clipped_values']:,} values were outside the range")
    return table


def _of_axes(ranges: Mapping[str, Sequence[float]]) -> Mapping[str, Sequence[float]]:
    """Of coordinates one range for all candidates, instead of fifteen; of other values as they are."""
    axes: dict[str, list[Sequence[float]]] = {}
    for name, both in ranges.items():
        if not re.fullmatch(r"[xyz]_\d", name):
            return ranges
        axes.setdefault(f"{name[0]}, Å", []).append(both)
    return {axis: (min(low for low, _ in found), max(high for _, high in found)) for axis, found in axes.items()}
