"""A copy of the predicted matrix in one or two bits per weight, rounded to preserve its products with FFN inputs.

Weights are rounded input by input, in order of decreasing variance. Each rounding error is compensated in the weights
that are not rounded yet, as far as their inputs are correlated with the rounded one. The best compensation follows from
the covariance of the inputs and is the same for every neuron. Each row has a single positive scale, which is folded
into the neuron's threshold, so only integers are stored.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from pinfer.predictors.data import Matrix

# For each number of bits, half the level spacing that is optimal for normally distributed weights, in units of their
# standard deviation.
_HALF_STEP = {1: 0.798, 2: 0.498}

# Added to the variance of every input, in units of the mean variance, because the covariance is only an estimate.
_DAMPING = 0.03

# Within a block of this many inputs, errors are passed on one input at a time. Inputs after the block receive its
# errors in one matrix product.
_BLOCK = 64


@dataclass(frozen=True)
class Compensation:
    """The order in which inputs are rounded, and how their errors are passed on. The same for all neurons."""

    order: NDArray[np.intp]
    share: Matrix
    """``[n_embd, n_embd]``: row i, divided by its diagonal, is how much of an error at input ``order[i]`` to subtract
    from the weights of later inputs"""


def compensation(covariance: NDArray[np.float64]) -> Compensation:
    """The best compensation for inputs with this covariance ``[n_embd, n_embd]``."""
    from scipy.linalg import cholesky, solve_triangular

    n_embd = len(covariance)
    order = np.argsort(-np.diag(covariance), kind="stable")
    # C = R Rᵀ with R upper triangular comes from the Cholesky factor of C with its rows and columns reversed.
    reverse = order[::-1]
    damped = covariance[np.ix_(reverse, reverse)]
    damped[np.diag_indices(n_embd)] += _DAMPING * float(np.trace(covariance)) / n_embd
    root = cholesky(damped, lower=True, overwrite_a=True, check_finite=False)[::-1, ::-1]
    share = solve_triangular(root, np.eye(n_embd), overwrite_b=True, check_finite=False).astype(np.float32)
    return Compensation(order, share)


def few_bits(weight: Matrix, how: Compensation, bits: int) -> Matrix:
    """Rounds ``weight`` to levels ``[n_ff, n_embd]``: ±1 with one bit, ±1 and ±3 with two.

    Neurons are rounded independently of one another.
    """
    n_ff, n_embd = weight.shape
    order, share = how.order, how.share
    half = _HALF_STEP[bits] * np.sqrt(np.einsum("ij,ij->i", weight, weight) / n_embd) + np.float32(1e-20)
    top = np.float32(2**bits - 1)
    rest = weight.T[order]
    levels = np.empty((n_embd, n_ff), dtype=np.float32)
    for begin in range(0, n_embd, _BLOCK):
        end = min(begin + _BLOCK, n_embd)
        errors = np.empty((end - begin, n_ff), dtype=np.float32)
        for i in range(begin, end):
            level = np.clip(2 * np.floor(rest[i] / (2 * half)) + 1, -top, top)
            levels[order[i]] = level
            error = (rest[i] - level * half) / share[i, i]
            rest[i + 1 : end] -= share[i, i + 1 : end, None] * error
            errors[i - begin] = error
        rest[end:] -= share[begin:end, end:].T @ errors
    return np.ascontiguousarray(levels.T)
