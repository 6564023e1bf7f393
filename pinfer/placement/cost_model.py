"""Predicts the time of a token from the bytes it reads; the solver places neurons by it.

Decoding is bound by memory. Each side reads the dense part of the layers it holds. Of the FFN the device reads all of
its hot neurons while the CPU reads the predictor and the rows of the cold neurons that fire; the slower side decides.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pinfer.artefacts.shards import DownTypes, cold_neuron_bytes, hot_neuron_bytes
from pinfer.model import Model
from pinfer.placement.machine import Machine


@dataclass(frozen=True)
class PredictorCost:
    """Size and candidates of one layer's predictor. Without one every neuron is a candidate (exact mode)."""

    n_bytes: int
    candidates: float
    """share of the layer's neurons"""


@dataclass(frozen=True)
class LayerCost:
    """Seconds per token of one layer's FFN on each side, by the number of hot groups, ``[n_groups + 1]`` each."""

    cpu: NDArray[np.float64]
    """by the hot groups of all devices together"""
    devices: tuple[NDArray[np.float64], ...]
    """by the device's own hot groups; 0 for none"""

    def least_groups(self, device: int) -> int:
        """C_l,d: the fewest groups that a device computes faster than the CPU, synchronisation included; 0 if none."""
        pays = self.cpu[0] - self.cpu >= self.devices[device]
        pays[0] = False
        return int(np.argmax(pays)) if pays.any() else 0

    def most_groups(self) -> tuple[int, ...]:
        """The groups of each device after which the layer would wait for it: it reads all its neurons at every token.

        The devices and the CPU work in parallel. The best time of a layer is the smallest T such that the CPU can
        compute within T what remains after each device has taken as many groups as it can compute within T.
        """
        if not self.devices:
            return ()
        # The n-th of all these times is when n groups are done, whichever devices do them.
        done = np.sort(np.concatenate([seconds[1:] for seconds in self.devices]))[: len(self.cpu) - 1]
        n = int(np.argmin(np.maximum(self.cpu, np.append(0.0, done))))
        within = done[n - 1] if n else 0.0
        return tuple(int(np.searchsorted(seconds, within, side="right")) - 1 for seconds in self.devices)

    def most_alone(self, device: int) -> int:
        """The same if no other device has a part of the layer, for example because their memory is full."""
        return LayerCost(self.cpu, (self.devices[device],)).most_groups()[0]

    def seconds(self, n_groups: Sequence[int]) -> float:
        """All sides work in parallel; ``n_groups`` is per device."""
        on_devices = (float(seconds[n]) for seconds, n in zip(self.devices, n_groups, strict=True))
        return max(float(self.cpu[sum(n_groups)]), *on_devices, 0.0)


def layer_cost(
    model: Model,
    layer: int,
    types: DownTypes,
    frequency: NDArray[np.float64],
    predictor: PredictorCost | None,
    machine: Machine,
    group: int,
) -> LayerCost:
    """``frequency`` is ``[n_ff]``, falling: how often each neuron fires per token, in the order of placement."""
    first_matrix = model.ffn[layer].gate if model.gated else model.ffn[layer].up
    assert first_matrix is not None
    first = first_matrix.row_bytes
    rest = cold_neuron_bytes(model, layer, types) - first
    named = np.ones_like(frequency)
    if predictor is not None:
        # Candidates are assumed to be distributed like the neurons that fire.
        named = np.minimum(1.0, frequency * predictor.candidates / max(float(frequency.mean()), 1e-12))
    read = (first * named + rest * frequency) / (machine.cpu_bandwidth * machine.scattered)
    starts = np.arange(0, len(frequency), group)
    cold = np.append(np.add.reduceat(read, starts)[::-1].cumsum()[::-1], 0.0)
    if predictor is not None:
        cold[:-1] += predictor.n_bytes / machine.cpu_bandwidth
    hot_bytes = np.append(starts, len(frequency)) * hot_neuron_bytes(model, layer, types)
    devices = []
    for device in machine.devices:
        devices.append(hot_bytes / device.bandwidth + device.sync_seconds)
        devices[-1][0] = 0.0
    return LayerCost(cold, tuple(devices))


def dense_seconds(n_bytes: float, on_device: bool, machine: Machine) -> float:
    """Seconds to read dense weights or cache on one side, with a synchronisation on the (first) device."""
    if on_device and machine.devices:
        return n_bytes / machine.devices[0].bandwidth + machine.devices[0].sync_seconds
    return n_bytes / machine.cpu_bandwidth
