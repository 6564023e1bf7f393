"""Stands in for scipy.linalg; options that only save time are accepted and ignored."""

from __future__ import annotations

from typing import Any

import numpy as np


def cholesky(a: Any, lower: bool = False, **_: Any) -> Any:
    """The triangular factor."""
    factor = np.linalg.cholesky(a)
    return factor if lower else factor.T


def solve_triangular(a: Any, b: Any, trans: Any = 0, lower: bool = False, **_: Any) -> Any:
    """x of ``a x = b``, or of ``aᵀ x = b``; only the named triangle of ``a`` is looked at."""
    triangle = np.tril(a) if lower else np.triu(a)
    return np.linalg.solve(triangle.T if trans in (1, "T") else triangle, b)


def eigh(a: Any, subset_by_index: tuple[int, int] | None = None, **_: Any) -> Any:
    """Rising eigenvalues and their vectors."""
    values, vectors = np.linalg.eigh(a)
    if subset_by_index is None:
        return values, vectors
    chosen = slice(subset_by_index[0], subset_by_index[1] + 1)
    return values[chosen], vectors[:, chosen]
