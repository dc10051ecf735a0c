"""Several processes, one for each device, that train as one. torchrun starts them, gloo and NCCL join them.

Every process takes its share of every batch, and gradients and losses are added up over all of them, so that the run
is the run of one process: the same batches, the same steps, the same decisions of the guard. Process 0 alone prints
and writes.

Gradients are added up by hand, once a step, not by DistributedDataParallel: micro-batches, gradient checkpointing, a
head without a gradient and a share without a sequence then need no special care, and nothing wraps the network whose
state dict a checkpoint holds. What that gives up is sending while the backward pass still computes: a few
milliseconds a step for ten million parameters. Where memory counts more, `pipeline.training.sharding` keeps a part of
the network in each process instead of all of it in every one.

All decisions go over the CPU (gloo), where a process that died is seen at once and one that hangs after the timeout.
"""

import contextlib
import itertools
import logging
import os
import pickle
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import distributed, nn

from pipeline import runlog
from pipeline.errors import ConfigError, PipelineError, StoppedError, StorageError
from pipeline.memory import bound_cpus, usable_cpus
from pipeline.training.checkpoint import Checkpoint, CheckpointStore, DamagedError, load_checkpoint
from pipeline.training.failures import OutOfMemoryEverywhere, is_device_lost, is_out_of_memory
from pipeline.training.stop import SIGNALS

_BUCKET = 2**24  # gradient values that are sent together: 64 MiB
_POLL_S, _HEARD_TRIES = 0.02, 1500
_GOES_ON = "the same command goes on from the last checkpoint"
_Value = TypeVar("_Value")
_Error = TypeVar("_Error", bound=Exception)


class LostProcessError(StoppedError):
    """Another process of the run died, failed or hangs; the run goes on from its last checkpoint when started again."""


class World:
    """The processes of a run.

    Args:
        rank: of this one.
        size: how many.
        store: that they all see; None for one process.
    """

    def __init__(self, *, rank: int = 0, size: int = 1, store: distributed.Store | None = None) -> None:
        self.rank, self.size, self._store = rank, size, store
        self._turns = itertools.count()
        self._agreed = False  # whether every process ends now, and with the same error

    @property
    def is_alone(self) -> bool:
        """Whether there is nobody to meet."""
        return self._store is None

    @property
    def is_main(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    def sum(self, *values: float) -> list[float]:
        """Each value added up over all processes, in float64; the same bits in all of them."""
        if self.is_alone:
            return list(values)
        total = torch.tensor(values, dtype=torch.float64)
        with self._together():
            distributed.all_reduce(total)
        return total.tolist()

    def any(self, flag: bool) -> bool:
        """Whether it is true in some process."""
        return bool(self.sum(flag)[0])

    def gather(self, value: _Value) -> list[_Value]:
        """The value of every process, by rank."""
        values: list[Any] = [value] * self.size
        if not self.is_alone:
            with self._together():
                distributed.all_gather_object(values, value)
        return values

    def from_main(self, compute: Callable[[], _Value]) -> _Value:
        """What process 0 computes, for all."""
        with self.main_first():
            value = compute() if self.is_main else None
        return self.gather(value)[0]  # type: ignore[return-value]

    def together(self, work: Callable[[], _Value]) -> _Value:
        """Do something that may fail in one process alone: it fails in all of them then, with the same error.

        Raises:
            OutOfMemoryEverywhere: memory ran out in one of them; they may try again together.
            PipelineError: what the first of them failed with; an OSError likewise.
        """
        if self.is_alone:
            return work()
        failed: Exception | None = None
        try:
            result = work()
        except (PipelineError, OSError) as err:
            failed = err
        except (MemoryError, RuntimeError) as err:
            if not is_out_of_memory(err):
                raise
            failed = OutOfMemoryEverywhere(str(err) or type(err).__name__)
        if not self.any(failed is not None):
            return result
        first = next(filter(None, self.gather(failed)))
        raise first if isinstance(first, OutOfMemoryEverywhere) else self.agreed(first)

    def agreed(self, err: _Error) -> _Error:
        """An error that every process ends with now: process 0 tells it, and the others leave after it."""
        self._agreed = True
        return err

    def add_gradients(self, model: nn.Module) -> None:
        """Add up the gradients of all processes; a parameter that has one in none of them keeps none."""
        if self.is_alone:
            return
        parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
        present = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.int32)
        with self._together():
            distributed.all_reduce(present)
            chosen = [parameter for parameter, count in zip(parameters, present.tolist(), strict=True) if count]
            sent = []
            for bucket in _buckets(chosen):
                flat = torch.cat([_gradient(parameter).flatten() for parameter in bucket])
                sent.append((bucket, flat, distributed.all_reduce(flat, async_op=True)))
                for parameter in bucket:
                    parameter.grad = None
            for bucket, flat, work in sent:
                work.wait()
                parts = flat.split([parameter.numel() for parameter in bucket])
                for parameter, part in zip(bucket, parts, strict=True):
                    parameter.grad = part.view_as(parameter)

    @contextlib.contextmanager
    def main_first(self) -> Iterator[None]:
        """Process 0 goes through a block before the others enter it, however long it takes."""
        if self.is_alone:
            yield
            return
        turn = f"turn{next(self._turns)}"
        if not self.is_main:
            self._wait_for(turn)
        yield
        if self.is_main:
            self._tell(turn)

    def _leave(self, err: BaseException | None = None) -> None:
        """Go after process 0, unless this one fails alone: then say why, and the others miss it and tell."""
        together = err is None or self._agreed
        with contextlib.suppress(RuntimeError, OSError, PipelineError):  # others may be gone, and the store with them
            if err is not None and not together and not isinstance(err, LostProcessError):
                told: BaseException = err
                if not isinstance(err, PipelineError | OSError):
                    next_step = f"Next: read the traceback of process {self.rank}."
                    told = PipelineError(f"{type(err).__name__}: {err}. {next_step}")
                self._tell(f"failed{self.rank}", pickle.dumps(told).hex())
            if self.is_main:
                self._tell("left")
            elif together:
                self._wait_for("left")
            else:
                self._hear()
            if together:
                distributed.barrier()
                if err is not None and not self.is_main:  # until process 0, which tells it, is gone
                    distributed.barrier()
            elif self.is_main and isinstance(err, PipelineError | OSError) and not _is_in_a_pass(err):
                self._wait_until_heard()

    def _speaks_for_itself(self, err: BaseException) -> bool:
        """Whether process 0 may be unable to tell: it is missed itself, or hangs in what this one left unfinished."""
        if self._agreed:
            return False
        if isinstance(err, LostProcessError):
            with contextlib.suppress(RuntimeError):
                assert self._store is not None
                return self._store.add("missed", 1) == 1
            return True
        return _is_in_a_pass(err)

    def _hear(self) -> None:
        """Let process 0 go, as far as this one is concerned."""
        assert self._store is not None
        with self._together():
            self._store.add("heard", 1)

    def _wait_until_heard(self) -> None:
        """Stay until those who wait for process 0 have read its last words, or left: the store goes with it."""
        assert self._store is not None
        for _ in range(_HEARD_TRIES):  # one that is in a collective reads nothing before this process is gone
            if self._store.add("heard", 0) >= self.size - 1:
                return
            time.sleep(_POLL_S)

    def _wait_for(self, key: str) -> None:
        """Wait for process 0, in short naps: a signal is heard, and no timeout of a collective runs meanwhile."""
        assert self._store is not None
        with self._together():
            while not self._store.check([key]):
                if self._store.check(["left"]):
                    failed = self._failures().get(0)
                    self._hear()
                    raise self.agreed(failed) if failed else self.lost()
                time.sleep(_POLL_S)

    def _tell(self, key: str, value: str = "") -> None:
        assert self._store is not None
        with self._together():
            self._store.set(key, value)

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        """Name an error of the connection for what it is."""
        try:
            yield
        except RuntimeError as err:
            if is_out_of_memory(err) or isinstance(err, torch.AcceleratorError):  # of this process's own device
                raise
            raise self.lost() from err

    def lost(self) -> Exception:
        """What to raise where another process is gone: what it failed with, or that it is lost, with its last words."""
        failed: dict[int, Exception] = {}
        with contextlib.suppress(RuntimeError):  # the store may be gone as well
            failed = self._failures()
        for err in failed.values():
            if not isinstance(err, StoppedError):
                return err
        words = {rank: f"{type(err).__name__}: {err}".rstrip(".") for rank, err in failed.items()}
        said = "".join(f"; process {rank}: {words[rank]}" for rank in words)
        return LostProcessError(
            f"process {self.rank} of {self.size} has lost another one, which died, failed or did not answer in time"
            f"{said}. Next: {_GOES_ON}."
        )

    def _failures(self) -> dict[int, Exception]:
        """What other processes said that they fail with, by rank."""
        assert self._store is not None
        others = {rank: f"failed{rank}" for rank in range(self.size) if rank != self.rank}
        told = {rank: self._store.get(key) for rank, key in others.items() if self._store.check([key])}
        return {rank: pickle.loads(bytes.fromhex(words.decode())) for rank, words in told.items()}


def _is_in_a_pass(err: BaseException) -> bool:
    """Whether an error broke off what the others may be in the middle of, too."""
    cause = err.__cause__
    return cause is not None and (is_out_of_memory(cause) or is_device_lost(cause))


ALONE = World()


def load_newest(store: CheckpointStore, world: World) -> Checkpoint | None:
    """The newest undamaged checkpoint, the same one in every process; None if there never was one.

    Raises:
        StorageError: none can be read, or this process does not see what process 0 sees.
    """
    found: list[Checkpoint | None] = []

    def load() -> str | None:
        found.append(store.load_newest())
        return found[0] and str(found[0].folder)

    folder = world.from_main(load)
    if found or folder is None:
        return found[0] if found else None
    try:
        return load_checkpoint(Path(folder))
    except DamagedError as err:
        raise StorageError(
            f"{folder}: process 0 reads this checkpoint and process {world.rank} does not ({err}). "
            "Next: give all machines of a run the same artifacts folder."
        ) from err


@contextlib.contextmanager
def join(*, timeout: float) -> Iterator[World]:
    """The world that torchrun (or whoever set RANK and WORLD_SIZE) started this process in; of one without it.

    The processes leave together, process 0 first: a launcher ends the others as soon as one has gone with an error.

    Args:
        timeout: seconds after which a process that does not answer is lost.

    Raises:
        ConfigError: there are more processes than devices.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    _choose_device()
    span = timedelta(seconds=timeout)
    store, rank, size = next(iter(distributed.rendezvous("env://", timeout=span)))
    backend = "cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo"
    group = distributed.PrefixStore("group", store)
    distributed.init_process_group(backend, store=group, rank=rank, world_size=size, timeout=span)
    world = World(rank=rank, size=size, store=distributed.PrefixStore("world", store))
    before = runlog.console.quiet, runlog.output.quiet
    runlog.console.quiet = runlog.output.quiet = not world.is_main
    try:
        yield world
    except BaseException as err:
        if world._speaks_for_itself(err):
            runlog.console.quiet = before[0]
        world._leave(err)
        raise
    world._leave()
    distributed.destroy_process_group()
    runlog.console.quiet, runlog.output.quiet = before


def _choose_device() -> None:
    local = int(os.environ.get("LOCAL_RANK", "0"))
    if torch.cuda.is_available():
        if local >= torch.cuda.device_count():
            raise ConfigError(
                f"NPROC: process {local} has no device of its own; this machine has {torch.cuda.device_count()}. "
                f"Next: NPROC={torch.cuda.device_count()}."
            )
        torch.cuda.set_device(local)


def launch(arguments: Sequence[str], *, processes: int, module: str = "pipeline") -> int:
    """Run ``python -m <module> <arguments>`` in several processes of this machine, by torchrun.

    Torchrun listens to SIGHUP by default, which undoes nohup: it is told not to where a hang-up is ignored.

    Args:
        arguments: of the program.
        processes: how many; one for each GPU.
        module: the program.

    Returns:
        The exit code of the process that failed first, or 0.

    Raises:
        StoppedError: a signal stopped all, or ended one of them and with it the rest.
    """
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.run import parse_args, run

    os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")  # or each loss of a connection comes with traces of C++
    cpus, threads = usable_cpus(), os.environ.get("OMP_NUM_THREADS")
    if threads is None or (threads == str(cpus) and cpus < bound_cpus()):  # as `rna` has set it where there is a quota
        os.environ["OMP_NUM_THREADS"] = str(max(1, cpus // processes))
    hangs_up = signal.getsignal(signal.SIGHUP) is not signal.SIG_IGN
    listens = ",".join(number.name for number in SIGNALS if number is not signal.SIGHUP or hangs_up)
    options = ["--standalone", "--nproc-per-node", str(processes), "--signals-to-handle", listens]
    for name in ("agent.server.api", "multiprocessing.api"):  # what they log, the processes or the lines below say
        logging.getLogger(f"torch.distributed.elastic.{name}").setLevel(logging.CRITICAL)
    try:
        run(parse_args([*options, "-m", module, *arguments]))
    except ChildFailedError as err:
        ended = sorted(err.failures.items(), key=lambda one: one[1].timestamp)
        return _code({rank: failure.exitcode for rank, failure in ended})
    except SignalException as err:
        raise StoppedError(f"stopped ({err.sigval.name}). Next: {_GOES_ON}.") from err
    return 0


def _code(failed: Mapping[int, int]) -> int:
    """What the exit codes of processes, in the order in which they ended, come to; torch writes a signal as -number.

    A process that a signal ended takes the others with it, which leave with 75 or by torchrun's SIGTERM; what one of
    them failed with, and said so, counts more.

    Raises:
        LostProcessError: a signal ended one, and nothing else went wrong.
    """
    told = [code for code in failed.values() if code > 0]
    killed = {rank: -code for rank, code in failed.items() if code < 0}
    if all(code == LostProcessError.exit_code for code in told) and killed:
        torchruns: dict[int, int] = {signal.SIGKILL: 1, signal.SIGTERM: 2}  # how it ends the others: less to blame
        rank, number = min(killed.items(), key=lambda one: torchruns.get(one[1], 0))  # of equals the first to end
        if number != signal.SIGTERM or failed.get(0, -1) < 0:  # else process 0 has told why it left: torchrun ended it
            name = next((known.name for known in signal.Signals if known == number), f"signal {number}")
            raise LostProcessError(f"process {rank} of the run was ended by {name}. Next: {_GOES_ON}.")
    return next((code for code in told if code != LostProcessError.exit_code), told[0])


def _gradient(parameter: nn.Parameter) -> torch.Tensor:
    return torch.zeros_like(parameter) if parameter.grad is None else parameter.grad


def _buckets(parameters: Sequence[nn.Parameter]) -> Iterator[list[nn.Parameter]]:
    """Parameters in their order, in lists of about `_BUCKET` values."""
    bucket: list[nn.Parameter] = []
    count = 0
    for parameter in parameters:
        bucket.append(parameter)
        count += parameter.numel()
        if count >= _BUCKET:
            yield bucket
            bucket, count = [], 0
    if bucket:
        yield bucket
