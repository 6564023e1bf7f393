"""How long a token takes, by the bytes it has to read: what the solver weighs and what it predicts.

Decoding is bound by memory. A layer's dense part is read where it lies; then the device reads its hot neurons, all of
them, while the CPU reads the rows of the cold neurons that fire (and what tells which do); the slower side decides.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from pinfer.machine import HotDevice, Machine
from pinfer.model import Model
from pinfer.shard_file import DownTypes, cold_neuron_bytes, hot_neuron_bytes

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray


@dataclass(frozen=True)
class PredictorCost:
    """What the predictor of one layer costs and names. Without one every neuron is a candidate (exact mode)."""

    n_bytes: int
    candidates: float
    """share of the layer's neurons"""


@dataclass(frozen=True)
class LayerCost:
    """Seconds that the FFN of one layer takes on either side, by the number of hot groups, ``[n_groups + 1]`` each."""

    cpu: NDArray[np.float64]
    device: NDArray[np.float64]
    """infinite where there is no device, 0 for no group"""

    def least_groups(self) -> int:
        """C_l: the fewest groups that the device does sooner than the CPU, synchronisation included; 0 if none."""
        import numpy as np

        pays = self.cpu[0] - self.cpu >= self.device
        pays[0] = False
        return int(np.argmax(pays)) if pays.any() else 0

    def most_groups(self) -> int:
        """The groups after which the device is the slower side: it reads its neurons whether they fire or not."""
        import numpy as np

        return int(np.argmin(np.maximum(self.cpu, self.device)))

    def seconds(self, n_groups: int) -> float:
        """Both sides work at the same time."""
        return float(max(self.cpu[n_groups], self.device[n_groups]))


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
    import numpy as np

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
    device = np.full(len(cold), np.inf)
    if machine.device is not None:
        n_neurons = np.append(starts, len(frequency))
        device = n_neurons * hot_neuron_bytes(model, layer, types) / machine.device.bandwidth
        device = device + machine.device.sync_seconds
    device[0] = 0.0
    return LayerCost(cold, device)


def dense_seconds(n_bytes: float, on_device: bool, machine: Machine) -> float:
    """Seconds to read dense weights or cache on one side, with the way there and back on the device."""
    device: HotDevice | None = machine.device
    if on_device and device is not None:
        return n_bytes / device.bandwidth + device.sync_seconds
    return n_bytes / machine.cpu_bandwidth
