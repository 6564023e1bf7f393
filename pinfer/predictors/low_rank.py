"""Activation-aware low-rank factors of the matrix whose sign decides, in closed form.

The predicted matrix W is gate where the FFN has one, else up. On FFN inputs x with mean m and covariance C = L Lᵀ, the
rank-r matrix B A that minimises E‖W (x - m) - B A (x - m)‖² comes from the singular vectors of W L. What is left,
W m - B A m and the bias, is constant and goes into the thresholds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from pinfer.predictors.data import Matrix

# Added to the covariance in units of its mean eigenvalue, times n_embd / samples: few samples, less trust in them.
_SHRINKAGE = 0.1

# Eigenvectors are found all at once from this share of the width on, and below it in a random subspace: so many
# vectors more than wanted, multiplied by the matrix so many times.
_DENSE_SHARE = 0.5
_SPARE_VECTORS = 32
_ITERATIONS = 2


def covariance(x: Matrix) -> NDArray[np.float64]:
    """Covariance ``[n_embd, n_embd]`` of FFN inputs ``[n, n_embd]``, positive definite however few there are."""
    n, n_embd = x.shape
    centred = x - x.mean(axis=0, dtype=np.float64).astype(np.float32)
    c: NDArray[np.float64] = (centred.T @ centred).astype(np.float64) / n
    scale = max(float(np.trace(c)) / n_embd, 1e-12)
    c[np.diag_indices(n_embd)] += scale * (_SHRINKAGE * n_embd / n + 1e-6)
    return c


@dataclass(frozen=True)
class Spectrum:
    """What the factors of a layer are made from, whatever their rank."""

    weight: Matrix
    """W ``[n_ff, n_embd]``"""
    root: Matrix
    """L ``[n_embd, n_embd]``, lower triangular"""
    gram: Matrix
    """Wᵀ W ``[n_embd, n_embd]``"""

    @staticmethod
    def of(weight: Matrix, covariance: NDArray[np.float64]) -> Spectrum:
        """From the predicted matrix and the covariance of its inputs."""
        from scipy.linalg import cholesky

        root = cholesky(covariance, lower=True, check_finite=False)
        return Spectrum(weight, root.astype(np.float32), weight.T @ weight)

    def factors(self, max_rank: int) -> tuple[Matrix, Matrix]:
        """A ``[R, n_embd]`` and B ``[n_ff, R]`` of the highest rank that is of use; lower ranks are their beginnings.

        A x has variance 1 in each direction, so B holds the weights by importance and a block of it one scale. A
        common factor keeps A well inside the range of half floats.
        """
        from scipy.linalg import solve_triangular

        # The right singular vectors of W L are the eigenvectors of Lᵀ WᵀW L, which is small whatever n_ff is.
        vectors = self._eigenvectors(min(max_rank, len(self.root)))
        a = solve_triangular(self.root, vectors, lower=True, trans="T", check_finite=False).T
        factor = np.float32(np.abs(a).max())
        return np.ascontiguousarray(a / factor), self.weight @ (self.root @ vectors * factor)

    def _eigenvectors(self, k: int) -> Matrix:
        """Of Lᵀ WᵀW L those ``[n_embd, k]`` with the largest eigenvalues, these falling."""
        from scipy.linalg import eigh

        n = len(self.root)
        if k + _SPARE_VECTORS > _DENSE_SHARE * n:
            root = self.root.astype(np.float64)
            whole = root.T @ self.gram.astype(np.float64) @ root
            vectors = eigh(whole, subset_by_index=(n - k, n - 1), overwrite_a=True, check_finite=False)[1]
            return vectors[:, ::-1].astype(np.float32)

        basis = np.random.default_rng(0).standard_normal((n, k + _SPARE_VECTORS), dtype=np.float32)
        for _ in range(_ITERATIONS):
            # What rounding leaves of the first time goes with the second.
            basis = _orthonormal(_orthonormal(self._times(basis)))
        rotation = eigh((basis.T @ self._times(basis)).astype(np.float64), check_finite=False)[1]
        return basis @ rotation[:, : -k - 1 : -1].astype(np.float32)

    def _times(self, v: NDArray[np.float32]) -> Matrix:
        """Lᵀ WᵀW L v."""
        return self.root.T @ (self.gram @ (self.root @ v))


def _orthonormal(v: Matrix) -> Matrix:
    """Columns that span what those of ``v`` ``[n, k]`` span, nearly orthonormal; k much less than n."""
    from scipy.linalg import cholesky, solve_triangular

    # By the products of the columns, which is a tenth of the work of a QR decomposition. The shift is for directions
    # of which float32 holds nothing but noise.
    square = (v / np.sqrt(np.einsum("ij,ij->j", v, v) + np.float32(1e-30))).astype(np.float64)
    products = square.T @ square
    products[np.diag_indices(len(products))] += 1e-12 * len(products)
    root = cholesky(products, lower=True, overwrite_a=True, check_finite=False)
    result: Matrix = solve_triangular(root, square.T, lower=True, overwrite_b=True, check_finite=False).T
    return np.ascontiguousarray(result, dtype=np.float32)
