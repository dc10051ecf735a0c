"""What an error of torch means for a run: memory ran out, device or process are gone, or anomaly mode saw a NaN."""

import contextlib
import re
from collections.abc import Iterator

import torch
from torch import distributed

from pipeline.errors import DataError, LostDeviceError, StorageError

_NO_MEMORY = re.compile(r"out of memory|can't allocate memory", re.IGNORECASE)
#: What CUDA's libraries say where there is no memory left for them, but also after a fault that no call has told yet.
#: PyTorch's convolutions try all that cuDNN has, keep to themselves why each failed, and find none (pytorch/pytorch
#: issue 108645). cuFFT calls it an internal error (issue 119420); where a process first needs them, so does cuSOLVER,
#: and cuBLAS and cuDNN say that they are not initialized.
_NO_MEMORY_OR_LOST = re.compile(
    r"(CUBLAS|CUDNN|CUSOLVER)_STATUS_ALLOC_FAILED|CUFFT_ALLOC_FAILED|CUDNN_STATUS_NOT_INITIALIZED"
    r"|CUFFT_INTERNAL_ERROR|CUSOLVER_STATUS_INTERNAL_ERROR, when calling `cusolverDnCreate"
    r"|CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate"
    r"|unable to find (an engine to execute this computation|a valid cuDNN algorithm)",
    re.IGNORECASE,
)
#: Errors after which nothing can be read from the device any more: CUDA's own, its libraries' and the driver's.
_DEVICE_LOST = re.compile(
    r"CUDA error|CUDA driver error|Triton Error \[CUDA\]|device-side assert|illegal memory access|HIP error"
    r"|CUBLAS_STATUS_|CUDNN_STATUS_|CUSOLVER_STATUS_EXECUTION_FAILED|CUFFT_EXEC_FAILED|GPU is lost|uncorrectable ECC",
    re.IGNORECASE,
)
_ANOMALY = re.compile(r"Function '\w+' returned nan values in its \d+th output")


class OutOfMemoryEverywhere(MemoryError):  # noqa: N818
    """Memory ran out in a training process, and all of them know it: they can save, or try again, together."""


def is_out_of_memory(err: BaseException) -> bool:
    """Whether an error says that memory ran out, on the CPU (a plain RuntimeError) or a GPU."""
    if isinstance(err, MemoryError | torch.OutOfMemoryError):
        return True
    return bool(_NO_MEMORY.search(str(err)) or (_NO_MEMORY_OR_LOST.search(str(err)) and _device_answers()))


def is_device_lost(err: BaseException) -> bool:
    """Whether an error says that the device failed: every later call to it fails too, so nothing can be saved."""
    if is_out_of_memory(err) or not isinstance(err, RuntimeError):
        return False
    told = _DEVICE_LOST.search(str(err)) or _NO_MEMORY_OR_LOST.search(str(err))
    return isinstance(err, torch.AcceleratorError) or bool(told)


def _device_answers() -> bool:
    """Whether the GPU, if one is used, still does what it is told: after an assertion or a bad access it never does."""
    try:
        if torch.cuda.is_initialized():
            torch.cuda.synchronize()
    except RuntimeError:
        return False
    return True


def is_process_lost(err: BaseException) -> bool:
    """Whether an error says that another process is gone or silent; gloo raises plain RuntimeErrors, with its paths."""
    return isinstance(err, distributed.DistError) or (isinstance(err, RuntimeError) and "gloo/transport" in str(err))


def is_anomaly(err: BaseException) -> bool:
    """Whether torch's anomaly mode broke off a backward pass because of a NaN."""
    return isinstance(err, RuntimeError) and bool(_ANOMALY.search(str(err)))


@contextlib.contextmanager
def in_one_sentence(what: str) -> Iterator[None]:
    """Say what it means where memory runs out, or the device is lost, in work that leaves nothing half-written.

    Args:
        what: is done, for the message.

    Raises:
        StorageError: memory ran out.
        LostDeviceError: the device failed.
    """
    try:
        yield
    except (MemoryError, RuntimeError) as err:
        told = (str(err).strip() or type(err).__name__).splitlines()[0]
        if is_out_of_memory(err):
            raise StorageError(
                f"{what}: out of memory ({told}); nothing is half-written. Next: close what else uses this machine's "
                "memory (nvidia-smi shows it), then run the same command again."
            ) from err
        if is_device_lost(err):
            raise LostDeviceError(
                f"{what}: the device failed ({told}); nothing is half-written. Next: the same command again; if it "
                "fails in the same place, CUDA_LAUNCH_BLOCKING=1 names the operation, otherwise look for Xid lines in "
                "dmesg."
            ) from err
        raise


@contextlib.contextmanager
def fitting(what: object) -> Iterator[None]:
    """Say what it means where the network or optimiser of today's code has no place for what an earlier one saved.

    Args:
        what: was saved, for the message.

    Raises:
        DataError: it does not fit.
    """
    try:
        yield
    except (IndexError, KeyError, RuntimeError, TypeError, ValueError) as err:
        if is_out_of_memory(err) or is_device_lost(err) or is_process_lost(err):
            raise
        raise DataError(
            f"{what}: does not fit today's code ({' '.join(str(err).split())[:200].rstrip('. ')}); expected what this "
            'version would write. Next: take the code that wrote it (commit and versions: the "start" rows of the '
            "run's metrics.jsonl), or TAG=<name> for a new run beside it."
        ) from err
