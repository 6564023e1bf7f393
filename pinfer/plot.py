"""`pinfer plot`: the data of each picture, from the artefacts of a model or from files of measurements."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pinfer.artefacts import paths
from pinfer.artefacts.artefact import made_by
from pinfer.artefacts.placement import PlacementFile
from pinfer.artefacts.predictor import PredictorFile
from pinfer.artefacts.profile import ProfileFile
from pinfer.artefacts.shards import cold_neuron_bytes, down_types, hot_unit_bytes
from pinfer.benchmark.machine import cpu_name
from pinfer.errors import PinferError
from pinfer.model import Ffn, Model, open_model
from pinfer.placement.model_bytes import layer_bytes
from pinfer.plotting.picture import Panel, Picture, Series
from pinfer.plotting.records import bench_picture, trace_picture

_STEPS = 100  # of a curve
_UNITS = ("B", "KiB", "MiB", "GiB", "TiB")


def plot_profile(path: Path, activation: str | None = None) -> Picture:
    """How activations are spread over neurons and layers, and over the experts of a mixture."""
    model, folder = _opened(path, activation)
    return profile_picture(model, ProfileFile.read(folder / paths.PROFILE, model), cpu_name())


def plot_placement(path: Path, activation: str | None = None) -> Picture:
    """What lies where, by layer and device, and each device's budget by part."""
    model, folder = _opened(path, activation)
    file = folder / paths.PLACEMENT
    try:
        return placement_picture(model, PlacementFile.read(file, model), cpu_name())
    except (KeyError, TypeError, AttributeError):
        again = f"make it again: {made_by('placement', model)}"
        raise PinferError(f"{file} is damaged: its report cannot be read", again) from None


def plot_predictor(path: Path, activation: str | None = None) -> Picture:
    """Recall against bytes, by layer and kind."""
    model, folder = _opened(path, activation)
    model.require_sparse()
    return predictor_picture(model, PredictorFile.read(folder / paths.PREDICTOR, model), cpu_name())


def plot_bench(files: Sequence[Path]) -> Picture:
    """Ratios with their spread, against the memory limit, and over commits. Raises PinferError for other files."""
    return bench_picture(files)


def plot_trace(path: Path) -> Picture:
    """Hot, cold, copy and wait of a token. Raises PinferError if the file is not a trace."""
    return trace_picture(path, cpu_name())


def _opened(path: Path, activation: str | None) -> tuple[Model, Path]:
    """The model and the folder of its artefacts."""
    model = open_model(path, activation)
    model.require_placeable()
    return model, paths.artefact_dir(model.path, model.fingerprint, for_writing=False)


def _label(ffn: Ffn) -> str:
    return f"layer {ffn.layer}" + ("" if ffn.kind == "dense" else f" {ffn.kind}")


def _size_unit(most: float) -> tuple[float, str]:
    """The divisor and the name of the unit for sizes up to ``most`` bytes."""
    power = 0
    while most >= 1024 ** (power + 1) and power < len(_UNITS) - 1:
        power += 1
    return 1024.0**power, _UNITS[power]


# --- profile ----------------------------------------------------------------------------------------------------------


def profile_picture(model: Model, profile: ProfileFile, machine: str) -> Picture:
    """Cumulative activations by share of neurons, activity by layer, and the skew of a mixture's routing.

    Of experts without exact zeros the routing alone.
    """
    curves = [_skew(_label(f), count) for f, count in zip(model.ffns, profile.count, strict=True)]
    curves.append(_skew("whole model", np.concatenate(profile.count), emphasis=True))
    panels = [
        Panel(
            "curves",
            "Share of activations by share of neurons, the most active first",
            "% of the neurons",
            "% of the activations",
            tuple(curves),
            ordered=True,
        ),
        Panel("curves", "Activity by layer", "layer", "% of the neurons active", _activity(model, profile)),
    ]
    if model.places_experts:
        panels.clear()
    routed = [(f, r) for f, r in zip(model.ffns, profile.routed, strict=True) if r is not None]
    if routed:
        routing = [_skew(_label(f), r) for f, r in routed]
        routing.append(Series("even routing", (0.0, 100.0), (0.0, 100.0), emphasis=True))
        panels.append(
            Panel(
                "curves",
                "Routing: share of tokens by share of experts, the busiest first",
                "% of the experts",
                "% of the tokens routed",
                tuple(routing),
                ordered=True,
            )
        )
    source = f"{profile.tokens:,} tokens of {profile.corpus}; drawn on {machine}"
    return Picture(f"{model.name}: profile", source, tuple(panels))


def _skew(name: str, count: NDArray[np.int64], emphasis: bool = False) -> Series:
    """Cumulative share of the counts, the largest first, in per cent."""
    total = np.concatenate([[0], np.cumsum(np.sort(count)[::-1])])
    at = np.unique(np.linspace(0, len(count), _STEPS + 1).round().astype(int))
    shares = 100 * total[at] / max(1, total[-1])
    return Series(name, _floats(100 * at / len(count)), _floats(shares), emphasis=emphasis)


def _floats(values: NDArray[np.floating]) -> tuple[float, ...]:
    return tuple(float(value) for value in values)


def _activity(model: Model, profile: ProfileFile) -> tuple[Series, ...]:
    """Active shares by kind of FFN; those of experts count only the experts that a token is routed to."""
    series = []
    for kind in dict.fromkeys(f.kind for f in model.ffns):
        ffns = [(i, f) for i, f in enumerate(model.ffns) if f.kind == kind]
        name = {"dense": "FFN", "shared": "shared expert", "experts": "routed experts"}[kind]
        series.append(
            Series(name, tuple(float(f.layer) for _, f in ffns), tuple(100 * profile.active(i) for i, _ in ffns))
        )
    return tuple(series)


# --- placement --------------------------------------------------------------------------------------------------------


def placement_picture(model: Model, placement: PlacementFile, machine: str) -> Picture:
    """Units by FFN and device, bytes by layer and device, and the budget of each device by part."""
    names = tuple(name for name in placement.device.split(",") if name != "none")
    # Two devices of the same name exist in tests of a machine without a GPU; a hot device may be the CPU itself.
    devices = tuple(f"{name} ({i})" if names.count(name) > 1 else name for i, name in enumerate(names))
    found = placement.report.get("machine")
    where = f"solved for {found['name']}" if isinstance(found, dict) and found.get("name") else f"drawn on {machine}"
    panels = [_units_panel(model, placement, devices), _bytes_panel(model, placement, devices)]
    if budget := _budget_panel(placement, devices):
        panels.append(budget)
    source = f"devices: {', '.join(devices) or 'none'}; context {placement.n_ctx:,}; {where}"
    return Picture(f"{model.name}: placement", source, tuple(panels))


def _hot(placement: PlacementFile, device: int, i: int) -> int:
    """Units of FFN ``i`` on a device."""
    return placement.n_hot[device * len(placement.order) + i]


def _cold(placement: PlacementFile, ffn: Ffn, i: int) -> int:
    return ffn.n_units - sum(_hot(placement, device, i) for device in range(placement.n_devices))


def _units_panel(model: Model, placement: PlacementFile, devices: Sequence[str]) -> Panel:
    at = tuple(float(i) for i in range(len(model.ffns)))

    def series(name: str, units: Sequence[int]) -> Series:
        return Series(name, at, tuple(100 * n / f.n_units for n, f in zip(units, model.ffns, strict=True)))

    cold = series("cold, on the CPU", [_cold(placement, f, i) for i, f in enumerate(model.ffns)])
    hot = [series(f"hot, on {d}", [_hot(placement, k, i) for i in range(len(at))]) for k, d in enumerate(devices)]
    labels = tuple(_label(f).removeprefix("layer ") for f in model.ffns)
    return Panel(
        "columns", "Neurons and experts by layer", "layer", "% of the neurons or experts", (cold, *hot), labels
    )


def _bytes_panel(model: Model, placement: PlacementFile, devices: Sequence[str]) -> Panel:
    """Bytes of every layer: hot neurons by device, cold neurons, and its other weights, which are moved whole."""
    first_on_device = model.n_layer + 1 - placement.n_gpu_layers if devices else model.n_layer
    hot = np.zeros((len(devices), model.n_layer))
    cold, dense, dense_on_device = np.zeros(model.n_layer), np.zeros(model.n_layer), np.zeros(model.n_layer)
    for i, f in enumerate(model.ffns):
        types = down_types(f, None)
        for k in range(len(devices)):
            hot[k, f.layer] += hot_unit_bytes(f, types) * _hot(placement, k, i)
        cold_unit = hot_unit_bytes(f, types) if model.places_experts else cold_neuron_bytes(f, types) * f.unit
        cold[f.layer] += cold_unit * _cold(placement, f, i)
    for layer in range(model.n_layer):
        (dense_on_device if layer >= first_on_device else dense)[layer] = layer_bytes(model, layer)
    rows = [("CPU: cold neurons", cold)]
    rows += [(f"{d}: hot neurons", n) for d, n in zip(devices, hot, strict=True)]
    rows += [("CPU: attention, norms, other", dense)]
    rows += [(f"{d}: attention, norms, other", dense_on_device) for d in devices[:1]]
    divisor, unit = _size_unit(float(np.sum([n for _, n in rows], axis=0).max()))
    at = tuple(float(layer) for layer in range(model.n_layer))
    series = tuple(Series(name, at, _floats(n / divisor)) for name, n in rows if n.any())
    return Panel("columns", "Weights by layer", "layer", unit, series, tuple(map(str, range(model.n_layer))))


def _budget_panel(placement: PlacementFile, devices: Sequence[str]) -> Panel | None:
    """Memory of each device by part, as solved; None if the placement does not record it."""
    reports = placement.report.get("devices")
    if not devices or not isinstance(reports, list) or len(reports) != len(devices):
        return None
    divisor, unit = _size_unit(max(report["vram"] for report in reports))
    at = tuple(float(i) for i in range(len(devices)))
    parts = {part: [report["n_bytes"][part] for report in reports] for part in reports[0]["n_bytes"]}
    parts["free"] = [report["vram"] - sum(report["n_bytes"].values()) for report in reports]
    series = tuple(
        Series(part.replace("_", " "), tuple(n / divisor for n in sizes), at)
        for part, sizes in parts.items()
        if any(sizes)
    )
    return Panel("bars", "Budget by part", unit, "", series, tuple(devices))


# --- predictor --------------------------------------------------------------------------------------------------------


def predictor_picture(model: Model, predictor: PredictorFile, machine: str) -> Picture:
    """Recall against bytes, by layer and kind; recall and candidates by layer."""
    n_bytes = [predictor.n_bytes(i) for i in range(len(model.ffns))]
    divisor, unit = _size_unit(max(n_bytes))
    by_kind = {kind: [i for i, k in enumerate(predictor.kind) if k == kind] for kind in dict.fromkeys(predictor.kind)}
    points = tuple(
        Series(
            {"none": "none: every neuron"}.get(kind, kind.replace("_", " ")),
            tuple(n_bytes[i] / divisor for i in ffns),
            tuple(100 * predictor.recall[i] for i in ffns),
            labels=tuple(_label(model.ffns[i]).removeprefix("layer ") for i in ffns),
        )
        for kind, ffns in by_kind.items()
    )
    at = tuple(float(i) for i in range(len(model.ffns)))
    shares = (
        Series("recall: activation kept", at, tuple(100 * value for value in predictor.recall)),
        Series("candidates: neurons named", at, tuple(100 * value for value in predictor.candidates)),
    )
    labels = tuple(_label(f).removeprefix("layer ") for f in model.ffns)
    ffn_bytes = sum(f.n_bytes for f in model.ffns)
    source = f"{100 * sum(n_bytes) / ffn_bytes:.1f} % of the FFNs' bytes, as trained; drawn on {machine}"
    return Picture(
        f"{model.name}: predictor",
        source,
        (
            Panel("points", "Recall by size; numbers are layers", unit, "% of the activation kept", points),
            Panel("curves", "By layer", "layer", "%", shares, labels),
        ),
    )
