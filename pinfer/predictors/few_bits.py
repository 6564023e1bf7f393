"""A copy of the predicted matrix in one or two bits a weight, rounded so that its products with FFN inputs stay right.

Weights are rounded one input after another, the inputs of greatest variance first. What rounding one of them does to
the product is, as far as the other inputs are correlated with it, made up for in the weights that are still to be
rounded; the best correction follows from the covariance of the inputs and is the same for every neuron. A row has one
scale, and a scale changes no sign of a difference: it ends up in the neuron's threshold, and whole numbers are stored.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from pinfer.predictors.data import Matrix

# Half the distance between levels that suits normal weights best, in units of their deviation, by bits.
_HALF_STEP = {1: 0.798, 2: 0.498}

# Added to the variance of every input, in units of their mean variance: what is learnt from samples is no more certain.
_DAMPING = 0.03

# Inputs whose corrections of one another are made one by one; later inputs get those of a block by one product.
_BLOCK = 64


def few_bits(weight: Matrix, covariance: NDArray[np.float64], bits: int) -> Matrix:
    """Levels ``[n_ff, n_embd]`` for ``weight``: odd numbers, ±1 or ±1 and ±3.

    ``covariance`` ``[n_embd, n_embd]`` is that of the FFN inputs. Each neuron is rounded by itself.
    """
    from scipy.linalg import cholesky, solve_triangular

    n_ff, n_embd = weight.shape
    order = np.argsort(-np.diag(covariance), kind="stable")
    # C = R Rᵀ with R upper triangular, from the Cholesky factor of C reversed; row i of R⁻¹, over its first value, is
    # what an error at input i takes from the weights of the inputs after it.
    reverse = order[::-1]
    damped = covariance[np.ix_(reverse, reverse)]
    damped[np.diag_indices(n_embd)] += _DAMPING * float(np.trace(covariance)) / n_embd
    root = cholesky(damped, lower=True, overwrite_a=True, check_finite=False)[::-1, ::-1]
    share = solve_triangular(root, np.eye(n_embd), overwrite_b=True, check_finite=False).astype(np.float32)

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
