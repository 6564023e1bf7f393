"""From scores to candidates: thresholds that keep a share of a layer's activation mass at the least cost.

A threshold says how much loss is worth a neuron's bytes. Given a score s, the true pre-activation is taken as normal
around its regression on s with the neuron's own residual deviation; so its expected share of the output, in units of
|f_i(x)| ‖d_i‖, is known, and a neuron is a candidate when that exceeds a price. The price is one number per layer,
found on held-back samples as the highest that keeps the recall asked for.

Mass is |f_i(x)| ‖d_i‖, the length of what a neuron adds to the layer's output. Measured on a small relu² model at a
recall of 99 %, |f_i(x)| alone takes 8 % more candidates for a KL divergence 6 % higher; the square of the length, at
the same number of candidates, gives three times the divergence.
"""

from __future__ import annotations

import math
from functools import cache
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from pinfer.predictors.data import relu

if TYPE_CHECKING:
    from pinfer.predictors.data import HeldBack, LayerData, Matrix

# Samples whose float64 sums are taken at a time.
_CHUNK_SAMPLES = 256

# Where the normal part of a gain no longer matters, in deviations.
_GAIN_LIMIT = 6.0
_GAIN_STEP = 0.001

# Prices are found in steps of this many logarithms, so many at most.
_PRICE_STEP = 0.004
_PRICE_STEPS = 20000


def calibrate(scores: Matrix, held: HeldBack, data: LayerData, recall: float) -> Matrix:
    """Thresholds ``[n_ff]`` for ``scores`` ``[n, n_ff]``: the fewest candidates that keep ``recall`` of the mass."""
    slope, constant, deviation = _regress(held.z, scores)
    # With a threshold a neuron begins there. That it begins with a leap is left out of what is expected of it, which
    # makes the prices less apt but not the recall: that is counted in true masses.
    constant -= data.threshold
    worth = worths(data, held) * deviation**data.power  # of a neuron whose score equals its deviation's unit
    fired = np.flatnonzero(held.mass)
    neuron = fired % held.mass.shape[1]
    standard = (scores.ravel()[fired] * (slope / deviation)[neuron] + (constant / deviation)[neuron]).astype(np.float32)
    price = _highest_price(standard, worth[neuron], held.mass.ravel()[fired], recall, data.power)
    with np.errstate(divide="ignore", over="ignore"):
        t = (inverse_gain(price / worth, data.power) * deviation - constant) / slope
        return np.nan_to_num(t.astype(np.float32), nan=3e38, posinf=3e38, neginf=-3e38)


def one_threshold(scores: Matrix, held: HeldBack, recall: float) -> float:
    """The highest threshold for all neurons at which the candidates keep ``recall`` of the mass."""
    fired = np.flatnonzero(held.mass)
    if not len(fired):
        return math.inf
    score = scores.ravel()[fired]
    order = np.argsort(-score, kind="stable")
    kept = np.cumsum(held.mass.ravel()[fired][order], dtype=np.float64)
    last = int(np.searchsorted(kept - kept[-1], -(1 - recall) * kept[-1]))
    return float(np.nextafter(score[order[min(last, len(order) - 1)]], np.float32(-np.inf)))


def _regress(z: Matrix, scores: Matrix) -> tuple[NDArray[np.float64], NDArray[np.float64], NDArray[np.float64]]:
    """Slope, constant and residual deviation of each column of ``z`` on that of ``scores``."""
    n, n_ff = z.shape
    z_mean, s_mean = z.mean(axis=0), scores.mean(axis=0)
    z_square, s_square, product = (np.zeros(n_ff) for _ in range(3))
    for begin in range(0, n, _CHUNK_SAMPLES):
        part = slice(begin, begin + _CHUNK_SAMPLES)
        z_part, s_part = z[part] - z_mean, scores[part] - s_mean
        z_square += np.einsum("ij,ij->j", z_part, z_part)
        s_square += np.einsum("ij,ij->j", s_part, s_part)
        product += np.einsum("ij,ij->j", z_part, s_part)
    # A score that says nothing, or the contrary, is taken at its word: its deviation will tell.
    told = (product > 0) & (s_square > 0)
    slope = np.where(told, product / np.where(told, s_square, 1), 1.0)
    # Where the fit is nearly exact, z² - slope² s² would be what rounding leaves.
    left = np.zeros(n_ff)
    slope_f32 = slope.astype(np.float32)
    for begin in range(0, n, _CHUNK_SAMPLES):
        part = slice(begin, begin + _CHUNK_SAMPLES)
        rest = z[part] - z_mean
        rest -= (scores[part] - s_mean) * slope_f32
        left += np.einsum("ij,ij->j", rest, rest)
    least = 1e-6 * np.maximum(np.sqrt(z_square / n), 1e-20)
    return slope, z_mean - slope * s_mean, np.maximum(np.sqrt(left / n), least)


def worths(data: LayerData, held: HeldBack) -> NDArray[np.float64]:
    """What one unit of the predicted factor of f_i adds to the output: ‖d_i‖, times the other factor when gated."""
    if data.partner is None:
        return data.down_norm.astype(np.float64)
    # mass = relu(z) |u| ‖d‖, so its ratio to relu(z) is the mean of the other factor where the neuron fires. Neurons
    # that hardly fire get the layer's mean: their own would be guesswork.
    positive = relu(held.z, data.threshold).sum(axis=0, dtype=np.float64)
    mass = held.mass.sum(axis=0, dtype=np.float64)
    layer_mean = mass.sum() / max(float((positive * data.down_norm).sum()), 1e-30)
    prior = positive.mean()
    other = (mass / np.maximum(data.down_norm, 1e-20) + prior * layer_mean) / (positive + prior + 1e-30)
    worth: NDArray[np.float64] = other * data.down_norm
    return worth


def _highest_price(standard: Matrix, worth: NDArray[np.float64], mass: Matrix, recall: float, power: int) -> float:
    """The highest price at which the candidates keep ``recall`` of the mass; 0 where every neuron is needed.

    The arrays hold one value for each firing of a neuron. One of worth w and standardised score s is a candidate while
    the price is below w gain(s), so the mass is summed by that value, from the dearest down; the price is rounded down
    by less than one percent.
    """
    if not len(mass):
        return math.inf
    value = np.log(np.maximum(worth, 1e-30)) + log_gain(standard, power)
    top = float(value.max())
    bins = np.minimum((top - value) / _PRICE_STEP, _PRICE_STEPS).astype(np.int64)
    by_bin = np.bincount(bins, mass.astype(np.float64))
    kept = np.cumsum(by_bin)
    # Masses first: near a recall of 1 what is lost is small, and the share kept would be rounded.
    enough = int(np.searchsorted(kept - kept[-1], -(1 - recall) * kept[-1]))
    return math.exp(top - (enough + 1) * _PRICE_STEP) if enough < _PRICE_STEPS else 0.0


def gain(u: NDArray[np.float64], power: int) -> NDArray[np.float64]:
    """E[max(0, u + e)^power] for standard normal e: u Φ(u) + φ(u), or (1 + u²) Φ(u) + u φ(u)."""
    from scipy.special import ndtr

    phi, density = ndtr(u), np.exp(-u * u / 2) / math.sqrt(2 * math.pi)
    return u * phi + density if power == 1 else (1 + u * u) * phi + u * density


@cache
def _gain_table(power: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """u between -_GAIN_LIMIT and _GAIN_LIMIT, and log(gain(u))."""
    u = np.linspace(-_GAIN_LIMIT, _GAIN_LIMIT, round(2 * _GAIN_LIMIT / _GAIN_STEP) + 1)
    return u, np.log(gain(u, power))


def log_gain(u: Matrix, power: int) -> Matrix:
    """log(gain(u)), never too high; above the table the normal part no longer matters, below it the neuron does not."""
    table = _gain_table(power)[1].astype(np.float32)
    inside = table[np.clip((u + _GAIN_LIMIT) / _GAIN_STEP, 0, len(table) - 1).astype(np.intp)]
    result: Matrix = np.where(u > _GAIN_LIMIT, power * np.log(np.maximum(u, 1.0)), inside)
    return result


def inverse_gain(value: NDArray[np.float64], power: int) -> NDArray[np.float64]:
    """u with ``gain(u) = value``; -inf, always a candidate, where the value is too small for the table."""
    at, table = _gain_table(power)
    with np.errstate(divide="ignore"):
        log_value = np.log(value)
    inside = np.interp(log_value, table, at)
    beyond = np.exp(np.minimum(log_value, 80.0) / power)
    return np.where(log_value > table[-1], beyond, np.where(log_value < table[0], -np.inf, inside))
