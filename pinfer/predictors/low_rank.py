"""Activation-aware low-rank factors of the predicted matrix, in closed form.

The predicted matrix W is the gate matrix if the FFN has one, otherwise the up matrix; the sign of its product decides
whether a neuron fires. For FFN inputs x with mean m and covariance C = L Lᵀ, the rank-r matrix B A that minimises
E‖W (x - m) - B A (x - m)‖² comes from the singular vectors of W L. The remaining terms, W m - B A m and the bias, are
constant and go into the thresholds.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

if TYPE_CHECKING:
    from pinfer.predictors.data import Matrix

# Ridge added to the covariance, in units of its mean eigenvalue times n_embd / n_samples: larger for fewer samples.
_SHRINKAGE = 0.1

# If more than this share of the eigenvectors is wanted, a dense solver computes them. Otherwise they come from subspace
# iteration with this many extra vectors and this many iterations.
_DENSE_SHARE = 0.5
_SPARE_VECTORS = 32
_ITERATIONS = 2


def covariance(x: Matrix) -> NDArray[np.float64]:
    """Covariance ``[n_embd, n_embd]`` of FFN inputs ``[n, n_embd]``, positive definite for any number of inputs."""
    n, n_embd = x.shape
    centred = x - x.mean(axis=0, dtype=np.float64).astype(np.float32)
    c: NDArray[np.float64] = (centred.T @ centred).astype(np.float64) / n
    scale = max(float(np.trace(c)) / n_embd, 1e-12)
    c[np.diag_indices(n_embd)] += scale * (_SHRINKAGE * n_embd / n + 1e-6)
    return c


@dataclass(frozen=True)
class Spectrum:
    """Matrices from which the factors of a layer are computed, for any rank."""

    weight: Matrix
    """W ``[n_ff, n_embd]``"""
    root: Matrix
    """L ``[n_embd, n_embd]``, lower triangular"""
    gram: Matrix
    """Wᵀ W ``[n_embd, n_embd]``"""

    @staticmethod
    def of(weight: Matrix, covariance: NDArray[np.float64]) -> Spectrum:
        """Builds it from the predicted matrix and the covariance of its inputs."""
        from scipy.linalg import cholesky

        root = cholesky(covariance, lower=True, check_finite=False)
        return Spectrum(weight, root.astype(np.float32), weight.T @ weight)

    def factors(self, max_rank: int) -> tuple[Matrix, Matrix]:
        """A ``[R, n_embd]`` and B ``[n_ff, R]`` with R = min(max_rank, n_embd); lower ranks are prefixes of them.

        Apart from a common factor, which keeps A well within the range of half floats, the components of A x have
        variance 1. So the columns of B are scaled by importance, and neighbouring ones suit a block with one scale.
        """
        from scipy.linalg import solve_triangular

        # The right singular vectors of W L are the eigenvectors of Lᵀ WᵀW L, whose size does not depend on n_ff.
        vectors = self._eigenvectors(min(max_rank, len(self.root)))
        a = solve_triangular(self.root, vectors, lower=True, trans="T", check_finite=False).T
        factor = np.float32(np.abs(a).max())
        return np.ascontiguousarray(a / factor), self.weight @ (self.root @ vectors * factor)

    def _eigenvectors(self, k: int) -> Matrix:
        """Eigenvectors ``[n_embd, k]`` of Lᵀ WᵀW L with the largest eigenvalues, in decreasing order."""
        from scipy.linalg import eigh

        n = len(self.root)
        if k + _SPARE_VECTORS > _DENSE_SHARE * n:
            root = self.root.astype(np.float64)
            whole = root.T @ self.gram.astype(np.float64) @ root
            vectors = eigh(whole, subset_by_index=(n - k, n - 1), overwrite_a=True, check_finite=False)[1]
            return vectors[:, ::-1].astype(np.float32)

        basis = np.random.default_rng(0).standard_normal((n, k + _SPARE_VECTORS), dtype=np.float32)
        for _ in range(_ITERATIONS):
            # The second pass removes the rounding errors of the first.
            basis = _orthonormal(_orthonormal(self._times(basis)))
        rotation = eigh((basis.T @ self._times(basis)).astype(np.float64), check_finite=False)[1]
        return basis @ rotation[:, : -k - 1 : -1].astype(np.float32)

    def _times(self, v: NDArray[np.float32]) -> Matrix:
        """Lᵀ WᵀW L v."""
        return self.root.T @ (self.gram @ (self.root @ v))


def _orthonormal(v: Matrix) -> Matrix:
    """Nearly orthonormal columns with the same span as those of ``v`` ``[n, k]``, where k is much less than n."""
    from scipy.linalg import cholesky, solve_triangular

    # Cholesky QR, a tenth of the work of a Householder QR decomposition. The shift keeps the Gram matrix positive
    # definite where float32 holds nothing but noise.
    square = (v / np.sqrt(np.einsum("ij,ij->j", v, v) + np.float32(1e-30))).astype(np.float64)
    products = square.T @ square
    products[np.diag_indices(len(products))] += 1e-12 * len(products)
    root = cholesky(products, lower=True, overwrite_a=True, check_finite=False)
    result: Matrix = solve_triangular(root, square.T, lower=True, overwrite_b=True, check_finite=False).T
    return np.ascontiguousarray(result, dtype=np.float32)
