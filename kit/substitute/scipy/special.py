"""Stands in for scipy.special."""

from __future__ import annotations

import math
from statistics import NormalDist
from typing import Any

import numpy as np


def ndtr(x: Any) -> Any:
    """The normal distribution's cumulative probability, exact in both tails."""
    return np.vectorize(lambda v: 0.5 * math.erfc(-v / math.sqrt(2)), otypes=[np.float64])(x)


def ndtri(p: Any) -> Any:
    """Its inverse; -inf at 0 and inf at 1."""
    inverse = NormalDist().inv_cdf

    def one(v: float) -> float:
        return inverse(v) if 0 < v < 1 else math.copysign(math.inf, v - 0.5)

    return np.vectorize(one, otypes=[np.float64])(p)
