"""What an error of torch means for a run: memory ran out, device or process are gone, or anomaly mode saw a NaN."""

import re

import torch
from torch import distributed

#: Errors after which nothing can be read from the device any more: CUDA's own, its libraries' and the driver's.
_DEVICE_LOST = re.compile(
    r"CUDA error|CUDA driver error|device-side assert|illegal memory access|CUBLAS_STATUS_|CUDNN_STATUS_|HIP error"
    r"|GPU is lost|uncorrectable ECC",
    re.IGNORECASE,
)
_ANOMALY = re.compile(r"Function '\w+' returned nan values in its \d+th output")


class OutOfMemoryEverywhere(MemoryError):  # noqa: N818
    """Memory ran out in a training process, and all of them know it: they can save, or try again, together."""


def is_out_of_memory(err: BaseException) -> bool:
    """Whether an error says that memory ran out, on the CPU (a plain RuntimeError) or a GPU."""
    if isinstance(err, MemoryError | torch.OutOfMemoryError):
        return True
    return "out of memory" in str(err).lower() or "can't allocate memory" in str(err)


def is_device_lost(err: BaseException) -> bool:
    """Whether an error says that the device failed: every later call to it fails too, so nothing can be saved."""
    if is_out_of_memory(err) or not isinstance(err, RuntimeError):
        return False
    return isinstance(err, torch.AcceleratorError) or bool(_DEVICE_LOST.search(str(err)))


def is_process_lost(err: BaseException) -> bool:
    """Whether an error says that another process is gone or silent; gloo raises plain RuntimeErrors, with its paths."""
    return isinstance(err, distributed.DistError) or (isinstance(err, RuntimeError) and "gloo/transport" in str(err))


def is_anomaly(err: BaseException) -> bool:
    """Whether torch's anomaly mode broke off a backward pass because of a NaN."""
    return isinstance(err, RuntimeError) and bool(_ANOMALY.search(str(err)))
