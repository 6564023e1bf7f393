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

# Inputs rounded between two products with all errors so far, and between two products with those of the block. Within a
# group the errors are passed on one input at a time.
_BLOCK = 128
_GROUP = 8

# Neurons rounded at a time: what they need stays in the caches.
_NEURONS = 4096


@dataclass(frozen=True)
class Compensation:
    """The order in which inputs are rounded, and how their errors are passed on. The same for all neurons."""

    order: NDArray[np.intp]
    share: Matrix
    """``[n_embd, n_embd]``, lower triangular: row i holds how much of the errors at the inputs before ``order[i]`` to
    subtract from the weight there"""


def compensation(covariance: NDArray[np.float64]) -> Compensation:
    """The best compensation for inputs with this covariance ``[n_embd, n_embd]``."""
    from scipy.linalg import cholesky
    from scipy.linalg.lapack import dtrtri

    n_embd = len(covariance)
    order = np.argsort(-np.diag(covariance), kind="stable")
    # C = R Rᵀ with R upper triangular comes from the Cholesky factor of C with its rows and columns reversed.
    reverse = order[::-1]
    damped = covariance[np.ix_(reverse, reverse)]
    damped[np.diag_indices(n_embd)] += _DAMPING * float(np.trace(covariance)) / n_embd
    root = cholesky(damped, lower=True, overwrite_a=True, check_finite=False)[::-1, ::-1]
    inverse, _ = dtrtri(root, lower=0, overwrite_c=True)
    inverse /= np.diag(inverse)[:, None]
    return Compensation(order, np.ascontiguousarray(inverse.T, dtype=np.float32))


def few_bits(weight: Matrix, how: Compensation, bits: int) -> Matrix:
    """Rounds ``weight`` to levels ``[n_ff, n_embd]``: ±1 with one bit, ±1 and ±3 with two.

    Neurons are rounded independently of one another.
    """
    levels = np.empty(weight.shape, dtype=np.float32)
    where = np.argsort(how.order)
    for begin in range(0, len(weight), _NEURONS):
        some = slice(begin, begin + _NEURONS)
        levels[some] = _rounded(weight[some], how, bits)[where].T
    return levels


def _rounded(weight: Matrix, how: Compensation, bits: int) -> NDArray[np.int8]:
    """Levels ``[n_embd, n_ff]`` of the inputs in the order of ``how``."""
    n_ff, n_embd = weight.shape
    share = how.share
    half = _HALF_STEP[bits] * np.sqrt(np.einsum("ij,ij->i", weight, weight) / n_embd) + np.float32(1e-20)
    levels = np.empty((n_embd, n_ff), dtype=np.int8)
    # Weights that are not rounded yet, then their errors.
    rest = np.ascontiguousarray(weight.take(how.order, axis=1).T)
    for begin in range(0, n_embd, _BLOCK):
        block = slice(begin, min(begin + _BLOCK, n_embd))
        if begin:
            rest[block] -= share[block, :begin] @ rest[:begin]
        rounded = np.empty_like(rest[block])
        for first in range(block.start, block.stop, _GROUP):
            group = slice(first, min(first + _GROUP, block.stop))
            if first > begin:
                rest[group] -= share[group, begin:first] @ rest[begin:first]
            for i in range(group.start, group.stop):
                value = rest[i]
                if i > first:
                    value -= share[i, first:i] @ rest[first:i]
                step = half if bits == 1 else np.where(np.abs(value) < 2 * half, half, 3 * half)
                value -= np.copysign(step, value, out=rounded[i - begin])
        rounded /= half
        levels[block] = np.rint(rounded, out=rounded)
    return levels
