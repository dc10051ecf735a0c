"""The sample submission of a hidden test set of values per nucleotide: a rerun is to write its rows, in its order."""

from collections.abc import Callable, Sequence
from pathlib import Path

import pyarrow as pa
import pyarrow.compute as pc

from pipeline.competitions.raw import column_names, read_batches, read_table
from pipeline.errors import DataError
from pipeline.runlog import amount, warn

_SAMPLE = "sample_submission"


def own_rows(
    path: Path,
    *,
    key: str,
    kind: pa.DataType,
    targets: Sequence[str],
    wanted: Callable[[int, int], pa.Array],
    total: int,
) -> pa.Table | None:
    """The keys of a sample submission whose rows are not those of the test set, in its order; None where they are.

    What differs is told: nobody can repair the file, and it says what is scored. It is read in blocks, and held in
    memory only if it differs.

    Args:
        path: of the sample submission.
        key: its first column.
        kind: of that column.
        targets: the other columns.
        wanted: rows from and to (0-based) -> their keys, as the test set has them.
        total: how many rows the test set has.

    Raises:
        DataError: the file is damaged, or a sample of another competition or of other sequences.
    """
    names = column_names(path, _SAMPLE)
    if not {key, *targets} <= set(names):
        raise DataError(
            f"{path.name}: columns {', '.join(names[:6])}; expected {key}, {', '.join(targets)}: it is from another "
            "competition. Next: put this one's sample_submission there, or none."
        )
    rows, same = 0, True
    for batch in read_batches(path, _SAMPLE, {key: kind}, may_be_empty=True):
        got, stop = batch[key], min(rows + batch.num_rows, total)
        same = rows < stop == rows + len(got) and got.equals(wanted(rows, stop).cast(kind))
        rows += len(got)
        if not same:
            break
    if (same and rows == total) or not rows:
        if total and not rows:
            warn(f"{path.name}: no row below the header; every position of the test set is written")
        return None
    known = wanted(0, total).cast(kind) if total else pa.array([], kind)
    own = read_table(path, _SAMPLE, {key: kind}).combine_chunks()
    keys = own[key].combine_chunks()
    strange = len(keys) - pc.sum(pc.is_in(keys, value_set=known)).as_py()
    if strange == len(keys) and total:
        raise DataError(
            f"{path.name}: none of its {amount(len(keys), 'row')}, such as {key} {keys[0].as_py()!r}, is of the test "
            "set; expected the same sequences. Next: see that both are of one set, or leave the sample out."
        )
    lost = total - len(pc.unique(keys)) + len(pc.unique(pc.filter(keys, pc.invert(pc.is_in(keys, value_set=known)))))
    told = [f"with {amount(strange, 'row')} of no test sequence"] if strange else []
    told += [f"without {amount(lost, 'position')} of the test set"] if lost else []
    told = told or ["in another order than the test set"]
    warn(f"{path.name}: {amount(len(keys), 'row')} {' and '.join(told)}; these are written, in this order")
    return own
