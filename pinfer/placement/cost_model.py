"""Predicts the time of a token from the bytes it reads; the solver places neurons by it.

Decoding is bound by memory. Each side reads the dense part of the layers it holds. Of the FFN the device reads all of
its hot neurons while the CPU reads the predictor and the rows of the cold neurons that fire; the slower side decides.
Of experts without exact zeros both sides read whole ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pinfer.artefacts.placement import group
from pinfer.artefacts.shards import DownTypes, cold_neuron_bytes, hot_unit_bytes
from pinfer.model import Ffn
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


@dataclass(frozen=True)
class Use:
    """How often the units of an FFN are used for a token, in the order of placement, ``[n_units]`` each."""

    active: NDArray[np.float64]
    """neurons of the unit that fire, falling; where ``whole``, the bytes of it that are read"""
    routed: NDArray[np.float64] | None = None
    """how often a token is routed to the expert; None where every token uses all units"""
    whole: bool = False
    """nothing is zero in the experts: one that is used is read as a whole, in a stream"""


def ffn_cost(ffn: Ffn, types: DownTypes, use: Use, predictor: PredictorCost | None, machine: Machine) -> LayerCost:
    """The cost of an FFN by the groups of its units that are hot, the most used first."""
    active = use.active
    routed = np.ones_like(active) if use.routed is None else use.routed
    first = (ffn.gate or ffn.up).row_bytes
    rest = cold_neuron_bytes(ffn, types) - first
    named = routed * ffn.unit
    if predictor is not None:
        # Candidates are assumed to be distributed like the neurons that fire.
        share = predictor.candidates * float(named.sum()) / max(float(active.sum()), 1e-12)
        named = np.minimum(named, active * share)
    if use.whole:
        read = routed * hot_unit_bytes(ffn, types) / machine.cpu_bandwidth
    else:
        read = (first * named + rest * active) / (machine.cpu_bandwidth * machine.scattered)
    starts = np.arange(0, len(active), group(ffn))
    cold = np.append(np.add.reduceat(read, starts)[::-1].cumsum()[::-1], 0.0)
    if predictor is not None:
        scored = float(routed.mean()) * predictor.n_bytes
        cold[:-1] += scored / machine.cpu_bandwidth
    hot_bytes = np.append(0.0, np.add.reduceat(routed, starts).cumsum()) * hot_unit_bytes(ffn, types)
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
