"""Weights of a mean that make its absolute error, square error or log loss least: non-negative, summing to one.

min over the simplex of mean |P w - y| is a convex problem. It is solved by majorisation: every step replaces |r| by
the parabola that touches it at the present residuals, and minimises that exactly with an active set. The loss falls at
every step; a duality gap says how far from the optimum the last step can be at most. The square error is a parabola
from the start: one step. The log loss, mean -log(P w), has the same shape: its steps are Newton's.

Letters: T positions, M predictions (one a run).
"""

from dataclasses import dataclass
from typing import Literal

import numpy as np

#: Residuals below this count as squares (Huber), in units of the target. The loss differs from the mean absolute
#: error by at most half of it times the share of such residuals.
SMOOTHING = 1e-3
_STEPS, _LOG_STEPS = 300, 100  # at most so many; each costs T·M² operations and T·M·8 bytes
_ENOUGH = 1e-7  # gap at which they end: no weights can be better by more


@dataclass(frozen=True, kw_only=True)
class Weights:
    """Learned weights with a certificate."""

    values_M: np.ndarray  #: [M] float64, non-negative, sum 1, multiples of 1e-6
    loss: float  #: mean absolute error, square error or log loss at `values_M`
    gap: float  #: no weights have a (smoothed) loss lower by more than this


def learn_weights(predictions_TM: np.ndarray, truth_T: np.ndarray, *, power: Literal[1, 2] = 1) -> Weights:
    """Weights of the mean of predictions with the least mean absolute (power 1) or square (2) error.

    Args:
        predictions_TM: [T, M], finite.
        truth_T: [T], finite.
        power: of the absolute residuals.

    Source:
        Majorisation of |r|: Hunter and Lange 2004, Am. Stat. 58:30, section 3; here on the simplex.
    """
    residuals_TM = predictions_TM.astype(np.float64) - truth_T.astype(np.float64)[:, None]
    count, width = residuals_TM.shape
    weights_M = np.full(width, 1.0 / width)
    for _ in range(_STEPS):
        if _gap(residuals_TM, weights_M, power) <= _ENOUGH:
            break
        size_T = np.maximum(np.abs(residuals_TM @ weights_M), SMOOTHING)
        weights_M = least_square_on_simplex((residuals_TM * (size_T ** (power - 2))[:, None]).T @ residuals_TM / count)
    weights_M = _rounded(weights_M)
    loss = float((np.abs(residuals_TM @ weights_M) ** power).mean())
    return Weights(values_M=weights_M, loss=loss, gap=_gap(residuals_TM, weights_M, power))


def _gap(residuals_TM: np.ndarray, weights_M: np.ndarray, power: int) -> float:
    """By convexity, loss(w) - loss(v) <= gradient · (w - v), which is largest at a corner v of the simplex."""
    residual_T = residuals_TM @ weights_M
    slope_T = np.clip(residual_T / SMOOTHING, -1.0, 1.0) if power == 1 else 2.0 * residual_T
    gradient_M = slope_T @ residuals_TM / len(slope_T)
    return float(max(0.0, gradient_M @ weights_M - gradient_M.min()))


def learn_mixture(right_TM: np.ndarray) -> Weights:
    """Weights of the mean of probabilities with the least log loss, mean -log(P w).

    Near w the loss is, but for a constant, mean ((p / (p·w) - 2)·v)² / 2 for weights v: a square error on the simplex.

    Args:
        right_TM: [T, M] in (0, 1], what each prediction gave to what came true.
    """
    right_TM = right_TM.astype(np.float64)
    weights_M = np.full(right_TM.shape[1], 1.0 / right_TM.shape[1])
    for _ in range(_LOG_STEPS):
        relative_TM = right_TM / (right_TM @ weights_M)[:, None]
        if _mixture_gap(relative_TM) <= _ENOUGH:
            break
        target_M = least_square_on_simplex((relative_TM - 2.0).T @ (relative_TM - 2.0) / len(right_TM))
        weights_M = _downhill(right_TM, weights_M, target_M)
    weights_M = _rounded(weights_M)
    mean_T = right_TM @ weights_M
    return Weights(values_M=weights_M, loss=float(-np.log(mean_T).mean()), gap=_mixture_gap(right_TM / mean_T[:, None]))


def _mixture_gap(relative_TM: np.ndarray) -> float:
    """As `_gap`: the gradient is -mean p / (p·w), and times w it is -1."""
    return float(max(0.0, relative_TM.mean(axis=0).max() - 1.0))


def _downhill(right_TM: np.ndarray, weights_M: np.ndarray, target_M: np.ndarray) -> np.ndarray:
    """The longest of the steps 1, 1/2, 1/4 … towards `target_M` that lowers the log loss."""
    before = np.log(right_TM @ weights_M).mean()
    for halvings in range(40):
        tried_M = weights_M + 0.5**halvings * (target_M - weights_M)
        mean_T = right_TM @ tried_M
        if mean_T.min() > 0.0 and np.log(mean_T).mean() > before:
            return tried_M
    return weights_M


def _rounded(weights_M: np.ndarray) -> np.ndarray:
    """Six decimals that still sum to one: the last bits of a matrix product are not the same on every machine."""
    rounded_M = np.round(weights_M, 6)
    rounded_M[np.argmax(rounded_M)] += 1.0 - rounded_M.sum()
    return np.round(rounded_M, 6)


def least_square_on_simplex(matrix_MM: np.ndarray) -> np.ndarray:
    """The w >= 0 with sum 1 at which wᵀAw is least, for a positive semidefinite A.

    w is u / sum(u) for the u >= 0 at which uᵀAu / 2 - sum(u) is least: both have the same optimality conditions.

    Source:
        Active set of Lawson and Hanson 1974, Solving Least Squares Problems, chapter 23.
    """
    width = len(matrix_MM)
    scale = np.trace(matrix_MM) / width
    a_MM = matrix_MM / scale + 1e-10 * np.eye(width)
    solution_M, free_M = np.zeros(width), np.zeros(width, dtype=bool)
    for _ in range(10 * width):
        gain_M = np.where(free_M, -np.inf, 1.0 - a_MM @ solution_M)
        if gain_M.max() <= 1e-9:
            break
        free_M[np.argmax(gain_M)] = True
        solution_M, free_M = _solve_free(a_MM, solution_M, free_M)
    return solution_M / solution_M.sum()


def _solve_free(a_MM: np.ndarray, solution_M: np.ndarray, free_M: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Solve for the free variables; those that would become negative stop at zero and are free no longer."""
    while True:
        target_M = np.zeros_like(solution_M)
        target_M[free_M] = np.linalg.solve(a_MM[np.ix_(free_M, free_M)], np.ones(free_M.sum()))
        falling_M = free_M & (target_M <= 0.0)
        if not falling_M.any():
            return target_M, free_M
        room_M = solution_M[falling_M] / (solution_M[falling_M] - target_M[falling_M])
        solution_M = np.maximum(solution_M + room_M.min() * (target_M - solution_M), 0.0)
        stopped_M = falling_M & (solution_M <= 1e-15)
        stopped_M[np.flatnonzero(falling_M)[np.argmin(room_M)]] = True
        solution_M[stopped_M], free_M = 0.0, free_M & ~stopped_M
