"""Training data of one layer: its weights, its samples, and the activation mass of held-back samples."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, TypeAlias

import numpy as np
from numpy.typing import NDArray

from pinfer.artefacts.profile import SamplesFile
from pinfer.model import Ffn, Model, Tensor, dequantize

if TYPE_CHECKING:
    Matrix: TypeAlias = NDArray[np.float32]

# Shares of the samples held back from the fit: for the thresholds, and for the reported recall.
_CALIBRATION_SHARE = 0.2
_TEST_SHARE = 0.1
_MAX_HELD_BACK = 2048

# Rows of a weight matrix that are dequantised to float32 at a time.
_CHUNK_ROWS = 4096


@dataclass(frozen=True)
class LayerData:
    """Weights and samples of one layer."""

    x: NDArray[np.float16]
    """FFN inputs ``[n_samples, n_embd]``"""
    weight: Matrix
    """the predicted matrix ``[n_ff, n_embd]``"""
    bias: Matrix
    """its bias ``[n_ff]``, zeros if the model has none"""
    partner: Callable[[Matrix], Matrix] | None
    """for gated FFNs, computes up·x: ``[n, n_embd]`` to ``[n, n_ff]``"""
    down_norm: Matrix
    """L2 norm of each neuron's down column ``[n_ff]``"""
    activation: str
    first_bytes: int
    """bytes of a neuron's row in the predicted matrix"""
    rest_bytes: int
    """bytes of the neuron's other rows"""
    threshold: float = 0.0
    """the activation is 0 unless the pre-activation exceeds this"""

    @property
    def power(self) -> int:
        """The FFN output is proportional to this power of the predicted pre-activation."""
        return 2 if self.activation in ("relu2", "reglu2") else 1

    def some(self, neurons: slice) -> LayerData:
        """The layer reduced to these neurons, for calibration only: ``partner`` still computes all of them."""
        return replace(self, weight=self.weight[neurons], bias=self.bias[neurons], down_norm=self.down_norm[neurons])

    @staticmethod
    def read(model: Model, ffn: Ffn, samples: SamplesFile, expert: int = 0) -> LayerData:
        """Reads an FFN of ``model``, of a stack one expert. Only the predicted matrix is kept in float32."""
        n_ff, n_embd = ffn.n_ff, ffn.n_embd
        first = ffn.gate or ffn.up
        own, own_down = slice(expert * n_ff, (expert + 1) * n_ff), slice(expert * n_embd, (expert + 1) * n_embd)
        bias = ffn.gate_bias if model.gated else ffn.up_bias
        up, up_bias = ffn.up, ffn.up_bias

        def partner(x: Matrix) -> Matrix:
            out = np.empty((len(x), n_ff), dtype=np.float32)
            for begin in range(0, n_ff, _CHUNK_ROWS):
                end = min(begin + _CHUNK_ROWS, n_ff)
                out[:, begin:end] = x @ dequantize(model, up, slice(own.start + begin, own.start + end)).T
            return out if up_bias is None else out + dequantize(model, up_bias).reshape(-1)

        neuron_bytes = ffn.n_bytes // ffn.n_neurons
        x = samples.x(ffn)
        if ffn.is_stack:
            x = x[(samples.experts(ffn) == expert).any(axis=1)]
        return LayerData(
            x=x,
            weight=dequantize(model, first, own),
            bias=np.zeros(n_ff, np.float32) if bias is None else dequantize(model, bias).reshape(-1),
            partner=partner if model.gated else None,
            down_norm=_down_norm(model, ffn, own_down),
            activation=model.activation,
            first_bytes=first.row_bytes,
            rest_bytes=neuron_bytes - first.row_bytes,
            threshold=model.activation_threshold,
        )


def _down_norm(model: Model, ffn: Ffn, of: slice) -> Matrix:
    norms = _column_norms(model, ffn.down, of)
    return norms if ffn.norm is None else norms * np.abs(model.gguf.array(ffn.norm))


def _column_norms(model: Model, down: Tensor, of: slice) -> Matrix:
    """L2 norm ``[n_ff]`` of each column of the rows ``of`` of the down matrix."""
    squares = np.zeros(down.row_length, dtype=np.float64)
    for begin in range(of.start, of.stop, _CHUNK_ROWS):
        rows = dequantize(model, down, slice(begin, min(begin + _CHUNK_ROWS, of.stop)))
        squares += np.einsum("ij,ij->j", rows, rows)
    return np.sqrt(squares).astype(np.float32)


def relu(v: Matrix, threshold: float) -> Matrix:
    """``v`` where it exceeds ``threshold``, else 0."""
    return np.where(v > np.float32(threshold), v, np.float32(0))


@dataclass(frozen=True)
class HeldBack:
    """Samples that the fit has not seen, and each neuron's contribution to the output on them."""

    x: Matrix
    """``[n, n_embd]``"""
    z: Matrix
    """true pre-activations of the predicted matrix ``[n, n_ff]``"""
    mass: Matrix
    """|f_i(x)| ‖d_i‖, the norm of the neuron's contribution to the layer's output, ``[n, n_ff]``"""

    @staticmethod
    def of(data: LayerData, part: slice) -> HeldBack:
        """Computes the held-back samples ``part`` of a layer."""
        x = data.x[part].astype(np.float32)
        z = x @ data.weight.T
        z += data.bias
        mass = relu(z, data.threshold)
        if data.power == 2:
            mass *= mass
        if data.partner is not None:
            other = data.partner(x)
            mass *= relu(other, data.threshold) if data.activation == "drelu" else np.abs(other)
        mass *= data.down_norm
        return HeldBack(x, z, mass)

    def part(self, samples: slice) -> HeldBack:
        """These samples alone, not copied."""
        return HeldBack(self.x[samples], self.z[samples], self.mass[samples])

    def some(self, step: int, neurons: slice) -> HeldBack:
        """Every ``step``-th sample, reduced to these neurons."""
        return HeldBack(self.x[::step], *(m[::step, neurons].copy() for m in (self.z, self.mass)))

    def recall(self, named: NDArray[np.bool_]) -> float:
        """Share of the mass that the candidates ``named`` ``[n, n_ff]`` keep."""
        total = float(self.mass.sum(dtype=np.float64))
        return float(self.mass.sum(where=named, dtype=np.float64)) / total if total else 1.0


def parts(n: int) -> tuple[slice, slice, slice]:
    """Splits ``n`` samples for the fit, the thresholds and the report, as contiguous, disjoint ranges."""
    n_test = max(1, int(n * _TEST_SHARE))
    n_calibration = max(1, int(n * _CALIBRATION_SHARE))
    n_fit = n - n_test - n_calibration
    return (
        slice(0, n_fit),
        slice(n_fit, n_fit + min(n_calibration, _MAX_HELD_BACK)),
        slice(n - min(n_test, _MAX_HELD_BACK), n),
    )
