"""numba's compiler, with threads of its own.

Left to itself numba shares OpenMP with torch and sets the number of torch's threads, and with it the last digits of
every sum; its work queue leaves torch alone.
"""

import numba
from numba import njit, prange

numba.config.THREADING_LAYER = "workqueue"  # type: ignore[attr-defined]

__all__ = ["njit", "prange"]
