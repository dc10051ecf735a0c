"""Processes that fold sequences for `pipeline.bpp`, each part of them into a file of its own.

This is what the processes import: standard library, numpy and pyarrow, no polars and no torch.
"""

import contextlib
import hashlib
import multiprocessing
import os
import signal
from collections.abc import Iterator
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import viennarna
from pipeline.errors import PipelineError, StorageError
from pipeline.training.stop import SIGNALS, StopRequest

#: Of a row group.
ROWS = 1024


def parquet_schema(tag: str | None = None) -> pa.Schema:
    """Columns of a part and of the result; `tag` says what a part was folded with."""
    lists = {"unpaired": pa.float32(), "i": pa.uint16(), "j": pa.uint16(), "p": pa.float32()}
    fields = [("sequence", pa.string()), *((name, pa.list_(kind)) for name, kind in lists.items())]
    return pa.schema(fields, metadata={"bpp": tag} if tag else None)


def write_part(sequences: list[str], folder: Path, tag: str) -> int:
    """Fold sequences into one part file, which gets its name when it is complete."""
    folded = [viennarna.fold(sequence) for sequence in sequences]
    schema = parquet_schema(tag)
    columns = [pa.array(sequences)]
    for field, values in zip(list(schema)[1:], zip(*folded, strict=True), strict=True):
        offsets = np.cumsum([0, *(len(value) for value in values)], dtype=np.int32)
        columns.append(pa.ListArray.from_arrays(offsets, pa.array(np.concatenate(values), field.type.value_type)))
    name = hashlib.sha256("\n".join([tag, *sequences]).encode()).hexdigest()[:16]
    unfinished = folder / f"{name}.{os.getpid()}"
    table = pa.Table.from_arrays(columns, schema=schema)
    pq.write_table(table, unfinished, compression="zstd", row_group_size=ROWS, write_page_checksum=True)
    unfinished.replace(folder / f"{name}.parquet")
    return len(sequences)


class Crew:
    """Worker processes, each on a pipe of its own: a worker whose caller is gone reads the end of it and goes too."""

    def __init__(self, size: int) -> None:
        context = multiprocessing.get_context("spawn")
        self._workers: dict[Connection, BaseProcess] = {}
        for _ in range(size):
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            self._workers[ours] = process

    def __enter__(self) -> "Crew":
        return self

    def __exit__(self, *_: object) -> None:
        for process in self._workers.values():
            process.kill()  # parts get their names when complete: nothing half-done can be taken for done
        for pipe, process in self._workers.items():
            process.join()
            pipe.close()

    def work(self, jobs: list[tuple], *, stop: StopRequest) -> Iterator[int]:
        """Results of `write_part`, in the order in which they come."""
        waiting = iter(jobs)
        busy: list[Connection] = []
        for pipe, job in zip(self._workers, waiting, strict=False):
            _send(pipe, job)
            busy.append(pipe)
        while busy and not stop.reason():
            for ready in cast(list[Connection], wait(busy, timeout=0.5)):
                yield self._receive(ready)
                if more := next(waiting, None):
                    _send(ready, more)
                else:
                    busy.remove(ready)

    def _receive(self, pipe: Connection) -> int:
        try:
            result = pipe.recv()
        except (EOFError, OSError):
            self._workers[pipe].join()
            raise StorageError(
                f"bpp: a worker ended unexpectedly (exit code {self._workers[pipe].exitcode}; -9 mostly means that "
                "memory ran out); finished parts are kept. Next: run again with fewer workers (--workers 1)."
            ) from None
        if isinstance(result, Exception):
            raise result
        return result


def _send(pipe: Connection, job: tuple) -> None:
    """Give a worker its next part; of one that is dead, `Crew._receive` tells when it is listened to."""
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        pipe.send(job)


def _serve(pipe: Connection) -> None:
    """A worker's life: parts come in, their sizes or what went wrong go out."""
    for number in SIGNALS:  # to the group: its caller stops the work
        signal.signal(number, signal.SIG_IGN)
    while True:
        try:
            job = pipe.recv()
        except EOFError:
            return
        try:
            pipe.send(write_part(*job))
        except (PipelineError, OSError, MemoryError) as err:
            pipe.send(err)
