"""Batches of a training run, read ahead by worker processes: the same ones in the same order as without.

A batch is a pure function of ``(seed, epoch, batch)`` and of the micro-batch (`BatchSource`), so a worker that is lost
is replaced and asked again. Workers are spawned, open the memory-mapped arrays themselves and import neither torch nor
polars. Processes, not threads: what a batch costs is Python, which a thread would take from the training loop's own.
"""

import contextlib
import multiprocessing
import pickle
import queue
import signal
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable
from functools import cached_property
from multiprocessing.connection import Connection
from typing import NamedTuple

import numpy as np

from pipeline.augment import Augmentation, epoch_augmentation
from pipeline.config import RunConfig
from pipeline.dataset import ExampleSet
from pipeline.errors import DataError, StoppedError
from pipeline.packing import Packed, plan_epoch, read_packed, split_batch
from pipeline.runlog import warn
from pipeline.training.stop import SIGNALS

_AHEAD = 4  # batches that each worker prepares before they are asked for
_SLICE_S = 1.0  # of the wait for a worker, between two questions whether to stop
_PATIENCE_S = 300.0  # with a worker that says nothing; an epoch of a million sequences is planned in 0.3 s


class Place(NamedTuple):
    """Which batch, and in how large parts."""

    epoch: int
    batch: int
    micro_batch: int


class BatchSource:
    """What is in every batch of a run.

    Args:
        examples: with the loss's weights.
        train: positions of those that train.
        config: of the run.
        rank: which share of each batch to read.
        ranks: number of shares; 1 = the whole batch.
    """

    def __init__(
        self, examples: ExampleSet, train: np.ndarray, *, config: RunConfig, rank: int = 0, ranks: int = 1
    ) -> None:
        self.examples, self.train, self.config, self.rank, self.ranks = examples, train, config, rank, ranks
        self.batches = -(-len(train) // config.train.batch_size)  # of an epoch
        self.lengths_N = np.minimum(examples.lengths, config.data.max_length)
        self._epoch = -1
        self._plan: list[np.ndarray] = []
        self._augment: Augmentation

    def __call__(self, place: Place) -> list[Packed]:
        """The micro-batches of this share of a batch, augmented and padded; none if it has no sequence."""
        share = self.indices(place.epoch, place.batch)[self.rank :: self.ranks]
        parts = split_batch(share, micro_batch=place.micro_batch)
        return [read_packed(self.examples, part, change=self._augment) for part in parts]

    def tokens(self, place: Place) -> int:
        """Nucleotides of the whole batch."""
        lengths = self.lengths_N[self.indices(place.epoch, place.batch)]
        return int(np.minimum(lengths, self.config.longest(place.epoch)).sum())

    def read_until(self, step: int) -> float:
        """Nucleotides of all batches before a step of the run: what its time grows with, as stages get longer."""
        return float(np.interp(step, np.arange(len(self._read)) * self.batches, self._read))

    @cached_property
    def _read(self) -> np.ndarray:
        """Nucleotides before each epoch, and after the last one."""
        lengths_N = self.lengths_N[self.train]
        longest = [self.config.longest(epoch) for epoch in range(self.config.train.num_epochs)]
        each = {length: int(np.minimum(lengths_N, length).sum()) for length in set(longest)}
        return np.cumsum([0, *(each[length] for length in longest)])

    def indices(self, epoch: int, batch: int) -> np.ndarray:
        """Positions of the sequences of a whole batch."""
        if epoch != self._epoch:
            self._begin(epoch)
        return self.train[self._plan[batch]]

    def _begin(self, epoch: int) -> None:
        """Batches and augmentation of an epoch, from seed and epoch alone."""
        data, train, longest = self.config.data, self.config.train, self.config.longest(epoch)
        how = {"batch_size": train.batch_size, "bucket": data.length_bucket, "seed": train.seed, "epoch": epoch}
        self._plan = plan_epoch(np.minimum(self.lengths_N[self.train], longest), **how)
        draws = {"seed": train.seed, "epoch": epoch, "max_length": longest, "flip": data.flip}
        self._augment = epoch_augmentation(len(self.examples), **draws)  # type: ignore[arg-type]
        self._epoch = epoch


class _Worker:
    """A process, and a thread that takes what it sends: a pipe holds 64 KiB, and a full one would keep it waiting."""

    def __init__(self, source: BatchSource) -> None:
        context = multiprocessing.get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process = context.Process(target=_work, args=(theirs, source), daemon=True, name="loader")
        self.process.start()
        theirs.close()  # so that its end is seen
        self.received: queue.SimpleQueue[bytes | None] = queue.SimpleQueue()  # None: it sends no more
        self._thread = threading.Thread(target=self._take_in, daemon=True)
        self._thread.start()

    def _take_in(self) -> None:
        with contextlib.suppress(EOFError, OSError):
            while True:
                self.received.put(self.connection.recv_bytes())
        self.received.put(None)

    def last_words(self) -> str:
        """How it ended."""
        self.process.join(timeout=60.0)  # it has closed its pipe, so it is ending
        return f"died (exit code {self.process.exitcode}; -9 is what a machine out of memory does)"

    def stop(self) -> None:
        """End it now."""
        self.process.kill()
        self.process.join()
        self._thread.join()
        self.connection.close()


class _LostError(Exception):
    """A worker died, says nothing, or raised."""


class Loader:
    """Gives batches by their place, and prepares those that come next.

    Args:
        source: of the batches.
        workers: processes that read ahead, no more than an epoch has batches; 0 = read in this one when asked.
        patience: seconds after which a worker that says nothing is given up.
        stops: whether the run is asked to stop, which ends the wait for a worker.
    """

    def __init__(
        self,
        source: BatchSource,
        *,
        workers: int,
        patience: float = _PATIENCE_S,
        stops: Callable[[], bool] = lambda: False,
    ) -> None:
        self.source, self._count, self._patience = source, min(workers, source.batches), patience
        self._stops = stops
        self._workers: list[_Worker] = []
        self._ahead: deque[tuple[Place, _Worker]] = deque()
        self._rebuilt_at: Place | None = None

    def __enter__(self) -> "Loader":
        return self

    def __exit__(self, *_: object) -> None:
        self._stop()

    def take(self, place: Place) -> list[Packed]:
        """The micro-batches at a place.

        Raises:
            DataError: a worker died, hung or raised, and so did the one that took its place.
            StoppedError: the run was asked to stop while a worker said nothing.
        """
        if not self._count:
            return self.source(place)
        while True:
            try:
                return self._take(place)
            except _LostError as err:
                self._stop()
                if place == self._rebuilt_at:
                    raise DataError(
                        f"epoch {place.epoch}, batch {place.batch}: a loader worker {err}, twice. Next: train.workers "
                        "= 0 (with --allow-changes for a run that was begun) reads in the training process itself."
                    ) from err
                self._rebuilt_at = place
                warn(f"epoch {place.epoch}, batch {place.batch}: a loader worker {err}; all are started again")

    def _take(self, place: Place) -> list[Packed]:
        """Wait for a batch; what was prepared for other places (left out, or before a rollback) is thrown away."""
        while self._ahead and self._ahead[0][0] != place:
            self._receive(self._ahead.popleft()[1])
        if not self._ahead:
            self._ask(place)
        while len(self._ahead) <= _AHEAD * self._count:
            self._ask(self._next(self._ahead[-1][0]))
        return self._receive(self._ahead.popleft()[1])

    def _next(self, place: Place) -> Place:
        last = place.batch + 1 == self.source.batches
        return place._replace(epoch=place.epoch + 1, batch=0) if last else place._replace(batch=place.batch + 1)

    def _ask(self, place: Place) -> None:
        if not self._workers:
            self._workers = [_Worker(self.source) for _ in range(self._count)]
            for worker in self._workers:
                self._hear(worker, patience=_PATIENCE_S)  # a start takes what imports take, whatever a batch may
        worker = self._workers[place.batch % self._count]
        try:
            worker.connection.send(place)
        except OSError as err:
            raise _LostError(worker.last_words()) from err
        self._ahead.append((place, worker))

    def _receive(self, worker: _Worker) -> list[Packed]:
        answer = pickle.loads(self._hear(worker, patience=self._patience))
        if isinstance(answer, str):
            raise _LostError(f"raised {answer}")
        return answer

    def _hear(self, worker: _Worker, *, patience: float) -> bytes:
        until = time.monotonic() + patience
        while True:
            try:
                heard = worker.received.get(timeout=max(0.0, min(_SLICE_S, until - time.monotonic())))
                break
            except queue.Empty:
                if self._stops():
                    raise StoppedError(
                        "stopped while a loader worker said nothing. Next: the same command goes on."
                    ) from None
                if time.monotonic() >= until:
                    raise _LostError(f"said nothing for {patience:.0f} s") from None
        if heard is None:
            raise _LostError(worker.last_words())
        return heard

    def _stop(self) -> None:
        for worker in self._workers:
            worker.stop()
        self._workers.clear()
        self._ahead.clear()


def _work(connection: Connection, source: BatchSource) -> None:
    """Answer places with batches until the training process is gone; it alone listens to signals."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    with contextlib.suppress(EOFError, OSError):
        connection.send_bytes(b"ready")
        while True:
            place = connection.recv()
            answer: list[Packed] | str
            try:
                answer = source(place)
            except Exception as err:  # whatever it is, the training process tells of it
                answer = f"{type(err).__name__}: {err} ({traceback.format_exc(limit=-1).splitlines()[1].strip()})"
            connection.send_bytes(pickle.dumps(answer, protocol=5))
