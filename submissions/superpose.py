"""Rigid motion that brings paired points closest together. Lengths in Å.

Letters: P paired points, 3 xyz; any leading axes are batches.
"""

import numpy as np

from pipeline.structure.geometry import rotation_onto


def superpose(mobile_P3: np.ndarray, fixed_P3: np.ndarray) -> np.ndarray:
    """Move point sets rigidly onto their partners so that the RMSD is least.

    Args:
        mobile_P3: [..., P, 3] Å; NaN where a point is missing.
        fixed_P3: [..., P, 3] Å, rows paired with `mobile_P3`; NaN where a point is missing. Leading axes broadcast.

    Returns:
        [..., P, 3] float64, Å: `mobile_P3` rotated (never reflected) and shifted; points that are missing in one of
        the two have no say, and stay NaN if they are missing in `mobile_P3`.

    Raises:
        ValueError: the shapes do not pair, or a set has fewer than three points in common.

    Source:
        Kabsch 1976, Acta Cryst. A32:922.

    >>> turned = np.array([[0.0, 1.0, 0.0], [-1.0, 0.0, 0.0], [0.0, 0.0, 1.0]])
    >>> trace = np.arange(12.0).reshape(4, 3) ** 1.5
    >>> bool(np.allclose(superpose(trace @ turned + 5.0, trace), trace))
    True
    """
    mobile_P3, fixed_P3 = _paired(mobile_P3, fixed_P3)
    common_P1 = np.isfinite(mobile_P3).all(-1, keepdims=True) & np.isfinite(fixed_P3).all(-1, keepdims=True)
    count = common_P1.sum(axis=-2, keepdims=True)
    if count.size and count.min() < 3:
        raise ValueError(f"superpose: {count.min()} points in common; expected at least 3")
    mobile_centre = np.where(common_P1, mobile_P3, 0.0).sum(axis=-2, keepdims=True) / count
    fixed_centre = np.where(common_P1, fixed_P3, 0.0).sum(axis=-2, keepdims=True) / count
    rotation = rotation_onto(
        np.where(common_P1, mobile_P3 - mobile_centre, 0.0), np.where(common_P1, fixed_P3 - fixed_centre, 0.0)
    )
    return (mobile_P3 - mobile_centre) @ rotation + fixed_centre


def rmsd(mobile_P3: np.ndarray, fixed_P3: np.ndarray) -> np.ndarray:
    """Root mean square distance of the points in common after `superpose`, Å.

    Args:
        mobile_P3: [..., P, 3] Å, as in `superpose`.
        fixed_P3: [..., P, 3] Å.

    Returns:
        [...] float64, Å.
    """
    moved_P3, fixed_P3 = _paired(superpose(mobile_P3, fixed_P3), fixed_P3)
    return np.sqrt(np.nanmean(np.sum((moved_P3 - fixed_P3) ** 2, axis=-1), axis=-1))


def _paired(mobile_P3: np.ndarray, fixed_P3: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    if mobile_P3.shape[-2:] != fixed_P3.shape[-2:] or mobile_P3.shape[-1:] != (3,):
        raise ValueError(f"superpose: got {mobile_P3.shape} and {fixed_P3.shape}; expected [..., P, 3] twice, P equal")
    mobile_P3, fixed_P3 = np.broadcast_arrays(mobile_P3, fixed_P3)
    return mobile_P3.astype(np.float64), fixed_P3.astype(np.float64)
