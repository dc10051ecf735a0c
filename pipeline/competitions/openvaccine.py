"""Stanford OpenVaccine (Kaggle 2020): reactivity and degradation rates of mRNA vaccine candidates, per nucleotide.

The first 68 of 107 nucleotides were measured (91 of 130 in the longer test constructs); a submission has rows for all.

Source: eternagame/DegScore and DasLab/KaggleOpenVaccine (MIT); Wayment-Steele et al. 2022, Nat. Mach. Intell. 4:1174.
"""

import math
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.competitions import base
from pipeline.competitions.base import PARQUET, Competition, length_counts
from pipeline.competitions.hidden_sample import own_rows
from pipeline.competitions.raw import (
    column_names,
    read_batches,
    read_json_lines,
    replace_odd_letters,
)
from pipeline.competitions.raw_files import find_table, need_table
from pipeline.errors import DataError
from pipeline.runlog import amount, warn
from pipeline.schema import normalise_sequence
from pipeline.tables import position_keys

#: In the submission's order: 1M7 reactivity, then degradation at pH 10 and at 50 °C, each with and without magnesium.
TARGETS = ("reactivity", "deg_Mg_pH10", "deg_pH10", "deg_Mg_50C", "deg_50C")
#: Columns that the organisers' metric is the mean of; the others are submitted and not looked at.
COUNTED = ("reactivity", "deg_Mg_pH10", "deg_Mg_50C")

_ROW_GROUP = 4096
_SAMPLE = "sample_submission"


def error_column(target: str) -> str:
    """Name of a target's errors in the raw file: ``deg_error_pH10`` for ``deg_pH10``.

    >>> [error_column(target) for target in ("reactivity", "deg_Mg_50C")]
    ['reactivity_error', 'deg_error_Mg_50C']
    """
    return "reactivity_error" if target == "reactivity" else target.replace("deg_", "deg_error_", 1)


#: MCRMSE: the mean over the columns that count of the root mean square error.
error_sums = partial(base.error_sums, targets=TARGETS, target_range=None, power=2)
score = partial(base.mean_error, power=2, scored_C=np.isin(TARGETS, COUNTED))


def raw_files(raw: Path, *, test_only: bool = False) -> dict[str, Path]:
    """``train``, but for `test_only`, and ``test`` (JSON lines), and the sample submission, ``sample``, if it is there.

    Raises:
        DataError: train or test is missing, or there are two of a kind.
    """
    names = ("test",) if test_only else ("train", "test")
    files = {name: need_table(raw, name, suffix=".json") for name in names}
    sample = find_table(raw, _SAMPLE)
    return files | ({"sample": sample} if sample else {})


def clean(files: dict[str, Path], parts: dict[str, Path]) -> dict[str, Any]:
    """Write the clean train and test tables (test alone, if `parts` has no train); the facts are the report.

    Beside what every competition has, train holds ``reactivity_error`` …, and per target the molecule's
    ``signal_to_noise_<target>`` and ``SN_filter_<target>``, the same for all; test holds ``seq_scored``.

    Raises:
        DataError: a raw file is not what it should be.
    """
    hidden = "train" not in parts
    records = _hidden_records(files["test"]) if hidden else _records(files["test"], "test")
    test = [_read_test(record, where) for where, record in records]
    first = 0
    for row in test:
        row |= {"id_min": first, "id_max": first + len(row["sequence"]) - 1}
        first = row["id_max"] + 1
    facts: dict[str, Any] = {"test": {"sequences": len(test), "positions": first, "lengths": _lengths(test)}}
    if "sample" in files:
        ids, lengths_K = [row["sequence_id"] for row in test], np.array([len(row["sequence"]) for row in test], int)
        if not hidden:
            facts["test"]["sample_submission_rows"] = check_sample(files["sample"], ids, lengths_K)
        elif (own := own_positions(files["sample"], ids, lengths_K)) is not None:
            pq.write_table(own, parts["sample"], **PARQUET)
    _write(parts["test"], test, _test_schema())
    if "train" not in parts:
        return facts
    train = [_read_train(record, where) for where, record in _records(files["train"], "train")]
    train.sort(key=lambda row: row["sequence_id"])
    _write(parts["train"], train, _train_schema())
    sequences = {row["sequence"] for row in train}
    facts["test"]["copies_of_train"] = sum(row["sequence"] in sequences for row in test)
    return {
        "sequences": len(train),
        "scored": sum(row["scored"] for row in train),
        "lengths": _lengths(train),
        "targets": {target: _range(train, target) for target in TARGETS},
        **facts,
    }


def _records(path: Path, stem: str) -> list[tuple[str, dict[str, Any]]]:
    """(place for messages, record) of a raw file, every id once."""
    seen: dict[str, int] = {}
    records = []
    for row, record in read_json_lines(path, stem):
        name = str(record.get("id", ""))
        where = f"{path.name}: row {row:,} (id {name})"
        if not name:
            raise DataError(f"{path.name}: row {row:,} has no id; expected one. Next: download it again.")
        if name in seen:
            raise DataError(f"{where}: the id of row {seen[name]:,} again; expected each once. Next: repair the file.")
        seen[name] = row
        records.append((where, record))
    return records


def _hidden_records(path: Path) -> list[tuple[str, dict[str, Any]]]:
    """`_records` of a hidden test set, which nobody can repair: rows that are none are left out, and told."""
    records: dict[str, tuple[str, dict[str, Any]]] = {}
    seen = 0
    for row, record in read_json_lines(path, "test", may_be_empty=True) if path.stat().st_size else ():
        seen += 1
        name, text = str(record.get("id") or ""), str(record.get("sequence") or "").strip()
        if name and text and name not in records:
            length = len(text)
            scored = record.get("seq_scored")
            scored = scored if isinstance(scored, int) and 0 < scored <= length else length
            kept = {"id": name, "sequence": text, "seq_scored": scored}
            records[name] = f"{path.name}: row {row:,} (id {name})", kept
    if seen > len(records):
        warn(f"{path.name}: {amount(seen - len(records), 'row')} without an id of its own and a sequence left out")
    texts = pa.array([record["sequence"] for _, record in records.values()], pa.string())
    clean = replace_odd_letters(texts, where=path.name).to_pylist() if seen else []
    return [(where, record | {"sequence": text}) for (where, record), text in zip(records.values(), clean, strict=True)]


def own_positions(
    path: Path, ids: Sequence[str], lengths_K: np.ndarray, *, targets: Sequence[str] = TARGETS
) -> pa.Table | None:
    """`own_rows` of a sample submission that has a row for each position; arguments as of `check_sample`."""
    before_K = np.cumsum(lengths_K, dtype=np.int64) - lengths_K
    return own_rows(
        path,
        key="id_seqpos",
        kind=pa.string(),
        targets=targets,
        wanted=lambda start, stop: position_keys(pa.array(ids, pa.string()), before_K, start, stop),
        total=int(lengths_K.sum()),
    )


def _read_test(record: dict[str, Any], where: str) -> dict[str, Any]:
    sequence = normalise_sequence(str(record.get("sequence", "")), where=where)
    length, scored = record.get("seq_length", len(sequence)), record.get("seq_scored")
    if length != len(sequence):
        raise DataError(
            f"{where}: seq_length {length} for a sequence of {len(sequence)} letters; expected the same. "
            "Next: download it again."
        )
    if not isinstance(scored, int) or not 0 < scored <= len(sequence):
        raise DataError(f"{where}: seq_scored {scored!r}; expected 1 to {len(sequence)}. Next: download it again.")
    return {"sequence_id": str(record["id"]), "sequence": sequence, "seq_scored": scored}


def _read_train(record: dict[str, Any], where: str) -> dict[str, Any]:
    row = _read_test(record, where)
    length, scored = len(row["sequence"]), row.pop("seq_scored")
    signal, passes = record.get("signal_to_noise"), record.get("SN_filter")
    if not isinstance(signal, int | float) or not math.isfinite(signal):
        raise DataError(f"{where}: signal_to_noise {signal!r}; expected a finite number. Next: repair the row.")
    if passes not in (0, 1):
        raise DataError(f"{where}: SN_filter {passes!r}; expected 0 or 1. Next: repair the row.")
    row |= {"dataset_name": f"{length} nt", "group": None, "scored": bool(passes)}
    for target in TARGETS:
        for column in (target, error_column(target)):
            values = _floats(record.get(column), scored, where=f"{where}: {column}")
            row[column] = values + [None] * (length - scored)
        row |= {f"signal_to_noise_{target}": float(signal), f"SN_filter_{target}": bool(passes)}
    return row


def _floats(values: Any, count: int, *, where: str) -> list[float | None]:
    """A measured list; null and NaN are what was not measured."""
    got = f"{len(values)} values" if isinstance(values, list) else type(values).__name__
    if not isinstance(values, list) or len(values) != count:
        raise DataError(f"{where} is {got}; expected a list of seq_scored = {count} numbers. Next: download it again.")
    for place, value in enumerate(values, start=1):
        if value is not None and (isinstance(value, bool) or not isinstance(value, int | float) or math.isinf(value)):
            raise DataError(f"{where} holds {value!r} at position {place}; expected a number. Next: repair the row.")
    return [None if value is None or math.isnan(value) else float(value) for value in values]


def _test_schema() -> pa.Schema:
    text, whole = pa.string(), pa.int64()
    names = {"sequence_id": text, "sequence": text, "id_min": whole, "id_max": whole, "seq_scored": whole}
    return pa.schema(list(names.items()))


def _train_schema() -> pa.Schema:
    fields = [("sequence_id", pa.string()), ("sequence", pa.string()), ("dataset_name", pa.string())]
    fields += [("group", pa.string()), ("scored", pa.bool_())]
    for target in TARGETS:
        fields += [(name, pa.list_(pa.float32())) for name in (target, error_column(target))]
        fields += [(f"signal_to_noise_{target}", pa.float32()), (f"SN_filter_{target}", pa.bool_())]
    return pa.schema(fields)


def _write(path: Path, rows: list[dict[str, Any]], schema: pa.Schema) -> None:
    pq.write_table(pa.Table.from_pylist(rows, schema=schema), path, row_group_size=_ROW_GROUP, **PARQUET)


def check_sample(path: Path, ids: Sequence[str], lengths_K: np.ndarray, *, targets: Sequence[str] = TARGETS) -> int:
    """Number of rows of a sample submission, whose keys must be those of the test set, in its order.

    Args:
        path: of the sample submission; it is read in blocks.
        ids: of the K test sequences.
        lengths_K: [K] int, nt.
        targets: columns beside ``id_seqpos``.

    Raises:
        DataError: other columns, or other keys.
    """
    names = column_names(path, _SAMPLE)
    if names != ["id_seqpos", *targets]:
        raise DataError(
            f"{path.name}: columns {', '.join(names[:6])}; expected id_seqpos, {', '.join(targets)}: it is from "
            "another competition. Next: put this one's sample_submission there, or none."
        )
    texts, total, rows = pa.array(ids, pa.string()), int(np.sum(lengths_K)), 0
    before_K = np.cumsum(lengths_K, dtype=np.int64) - lengths_K
    for batch in read_batches(path, _SAMPLE, {"id_seqpos": pa.string()}):
        got = batch["id_seqpos"]
        wanted = position_keys(texts, before_K, rows, min(rows + len(got), total))
        same_T = pc.equal(got.slice(0, len(wanted)), wanted).to_numpy(zero_copy_only=False)
        at = len(wanted) if same_T.all() else int(same_T.argmin())
        if at < len(got):
            expected = wanted[at].as_py() if at < len(wanted) else "the end"
            raise DataError(
                f"{path.name}: row {rows + at + 1:,}: id_seqpos {got[at].as_py()!r}; expected {expected!r}, in the "
                "order of the test set. Next: see that both are of one set, or leave the sample out."
            )
        rows += len(got)
    if rows < total:
        left = position_keys(texts, before_K, rows, rows + 1)[0].as_py()
        raise DataError(f"{path.name}: ends after row {rows:,}; expected {left!r} next. Next: download it again.")
    return rows


def _lengths(rows: list[dict[str, Any]]) -> dict[str, int]:
    return length_counts(np.array([len(row["sequence"]) for row in rows]))


def _range(rows: list[dict[str, Any]], target: str) -> dict[str, float]:
    values = np.array([value for row in rows for value in row[target] if value is not None])
    if not values.size:
        return {}
    edges = np.quantile(values, (0.0, 0.01, 0.5, 0.99, 1.0)).round(3).tolist()
    return dict(zip(("min", "q01", "q50", "q99", "max"), edges, strict=True))


OPENVACCINE = Competition(
    name="openvaccine",
    title="OpenVaccine: COVID-19 mRNA Vaccine Degradation Prediction",
    slug="stanford-covid-vaccine",
    files=("train.json", "test.json", "sample_submission.csv"),
    task="values",
    row_key="id_seqpos",
    targets=TARGETS,
    target_range=None,
    signal_to_noise=tuple(f"signal_to_noise_{target}" for target in TARGETS),
    metric="MCRMSE",
    metric_note=f"MCRMSE is the mean over {', '.join(COUNTED)}; the other columns do not count, as at Kaggle.",
    error_power=2,
    error_sums=error_sums,
    score=score,
    tables=("train", "test"),
    raw_files=raw_files,
    clean=clean,
    test_inputs=("test", "sample"),
    either=("sample",),  # of a hidden test set, where its rows are others
    test_tables=("test", "sample"),
    shown_ranges=((0.0, 2.0),) * 5,  # 99 % of the reactivities, 97 to 98 % of the degradation rates
    meaning="Reactivity, and the rates at which the chain breaks (deg_…), are high where a nucleotide is free to move, "
    "as unpaired ones are, and low where it is paired.",
)
