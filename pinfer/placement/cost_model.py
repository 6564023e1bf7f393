"""How long a token takes, by the bytes it has to read: what the solver weighs and what it predicts.

Decoding is bound by memory. A layer's dense part is read where it lies; then the device reads its hot neurons, all of
them, while the CPU reads the rows of the cold neurons that fire (and what tells which do); the slowest side decides.
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
    """What the predictor of one layer costs and names. Without one every neuron is a candidate (exact mode)."""

    n_bytes: int
    candidates: float
    """share of the layer's neurons"""


@dataclass(frozen=True)
class LayerCost:
    """Seconds that the FFN of one layer takes on each side, by the number of hot groups, ``[n_groups + 1]`` each."""

    cpu: NDArray[np.float64]
    """by the hot groups of all devices together"""
    devices: tuple[NDArray[np.float64], ...]
    """by the device's own hot groups; 0 for none"""

    def least_groups(self, device: int) -> int:
        """C_l,d: the fewest groups that a device does sooner than the CPU, synchronisation included; 0 if none."""
        pays = self.cpu[0] - self.cpu >= self.devices[device]
        pays[0] = False
        return int(np.argmax(pays)) if pays.any() else 0

    def most_groups(self) -> tuple[int, ...]:
        """The groups of each device after which the layer would wait for it: it reads all its neurons at every token.

        The devices and the CPU work at the same time, so the best time of a layer is the smallest T in which the CPU
        does what is left by the devices after each has done as many groups as it can within T.
        """
        if not self.devices:
            return ()
        # The n-th of all these times is when n groups are done, whichever devices do them.
        done = np.sort(np.concatenate([seconds[1:] for seconds in self.devices]))[: len(self.cpu) - 1]
        n = int(np.argmin(np.maximum(self.cpu, np.append(0.0, done))))
        within = done[n - 1] if n else 0.0
        return tuple(int(np.searchsorted(seconds, within, side="right")) - 1 for seconds in self.devices)

    def most_alone(self, device: int) -> int:
        """The same where no other device has a part of the layer, as when their memory is full."""
        return LayerCost(self.cpu, (self.devices[device],)).most_groups()[0]

    def seconds(self, n_groups: Sequence[int]) -> float:
        """All sides work at the same time; ``n_groups`` is per device."""
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
        # The candidates are the neurons that fire and others like them, so they are spread as the active ones are.
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
    """Seconds to read dense weights or cache on one side, with the way there and back on the (first) device."""
    if on_device and machine.devices:
        return n_bytes / machine.devices[0].bandwidth + machine.devices[0].sync_seconds
    return n_bytes / machine.cpu_bandwidth
