"""`pinfer split`: writes the FFN of a model as hot shards, one per device, and cold.gguf (docs/formats.md).

Experts without exact zeros are copied to the hot shards byte for byte; the CPU reads the others from the model itself.

Gate and up rows are copied byte for byte. A neuron's part of down is a column of the model's matrix: its values are
dequantised and quantised again along the other axis, or moved as they are where neither type has blocks.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pinfer.artefacts import paths
from pinfer.artefacts.artefact import ArtefactWriter
from pinfer.artefacts.placement import PlacementFile, new_placement_id
from pinfer.artefacts.profile import ProfileFile
from pinfer.artefacts.shards import (
    ShardPlan,
    cold_writer,
    down_name,
    down_types,
    hot_name,
    hot_writer,
    parts,
    pieces,
    stale_hot_shards,
    weight_name,
)
from pinfer.artefacts.verify import verify_shards
from pinfer.down_rows import DownChoice, choose
from pinfer.errors import PinferError
from pinfer.gguf_io.reader import row_bytes, type_name, type_size
from pinfer.gguf_io.writer import replace_together
from pinfer.llama import ggml
from pinfer.llama.devices import physical_cores
from pinfer.model import Ffn, Model, Tensor, open_model
from pinfer.progress import NULL_PROGRESS, Progress

_COLUMN_BYTES = 256 << 20
"""bytes of the model's down matrix that all threads hold together"""
_BAND = 512 << 20
"""bytes of requantised down rows held at once"""
_COLUMNS = 256
"""columns are read in multiples of this, which every block length divides"""
_WORTH_SAYING = 1 << 30
"""bytes of shards that are announced before they are written"""
_TILE = 64
"""columns transposed at once, unless the blocks of the type are longer"""


@dataclass(frozen=True)
class SplitOptions:
    """Options of ``pinfer split``."""

    down_type: str | None = None
    down_kl: str | None = None
    """choose the type for each FFN, with the model's divergence from dense up to this many nats; ``auto``: twice what
    Q8_0 costs"""
    text: Path | None = None
    """for ``down_kl``"""
    n_tokens: int = 2048
    """of ``text``"""
    verify: bool = False
    activation: str | None = None


@dataclass(frozen=True)
class SplitReport:
    """What was written."""

    hot: Path
    """of the first device"""
    hot_shards: tuple[Path, ...]
    """of all devices"""
    cold: Path
    """not written if ``in_place``"""
    in_place: bool
    """the CPU computes from the model itself"""
    hot_bytes: int
    cold_bytes: int
    n_hot: int
    n_cold: int
    order: str
    """source of the order of the neurons: ``placement``, ``profile`` or ``model``"""
    hot_down_types: tuple[str, ...]
    cold_down_types: tuple[str, ...]
    down_choice: DownChoice | None
    """with ``down_kl``: the types by FFN, and the divergence"""
    seconds: float
    verified: bool

    def to_json(self) -> dict[str, Any]:
        shards = [str(path) for path in self.hot_shards]
        cold = None if self.in_place else str(self.cold)
        return {**asdict(self), "hot": str(self.hot), "hot_shards": shards, "cold": cold}


def split(model_path: Path, options: SplitOptions, progress: Progress = NULL_PROGRESS) -> SplitReport:
    """Writes all shards beside the model, replacing older ones together and removing those of further devices.

    The placement decides what is hot. Without one every neuron is cold, ordered by the profile if there is one. With
    ``options.verify`` the new files are read back and compared with the model before they replace the old ones.
    """
    started = time.monotonic()
    bound = _bound(options)
    model = open_model(model_path, options.activation)
    model.require_placeable()
    if model.places_experts and options.down_type is not None:
        raise PinferError(f"the experts of {model.name} keep their types", "leave out --down-type")
    with paths.writing_to(model, progress) as folder:
        choice = None
        if options.text is not None:
            choice = _choose_types(model, folder, options.text, options.n_tokens, bound, progress)
        return _split(model, folder, options, choice, progress, started)


def _bound(options: SplitOptions) -> float | None:
    """The divergence allowed; None: by the model's own."""
    if (options.down_kl is None) != (options.text is None):
        raise PinferError("down types are chosen on a text", "use --down-kl together with --text FILE")
    if options.down_kl is not None and options.down_type is not None:
        raise PinferError("--down-type and --down-kl exclude each other", "use one of them")
    if options.down_kl in (None, "auto"):
        return None
    try:
        bound = float(options.down_kl or "")
    except ValueError:
        bound = 0.0
    if not 0 < bound < math.inf or options.n_tokens < 1:
        raise PinferError(f"{options.down_kl!r} is not a valid divergence", "use --down-kl auto, or one above 0")
    return bound


def _choose_types(
    model: Model, folder: Path, text: Path, n_tokens: int, bound: float | None, progress: Progress
) -> DownChoice:
    """Types of the cold down rows, by trial shards in which every neuron is cold."""
    order = tuple(np.arange(f.n_units, dtype=np.int32) for f in model.ffns)
    none = tuple(neurons[:0] for neurons in order)

    def write(path: Path, kinds: Sequence[str]) -> None:
        types = tuple(down_types(ffn, kind) for ffn, kind in zip(model.ffns, kinds, strict=True))
        plan = ShardPlan(new_placement_id(), (none,), order, types)
        with cold_writer(path, model, plan, {}) as cold:
            _write_shards(model, plan, (), cold, NULL_PROGRESS)

    path = folder / paths.PROFILE
    profile = ProfileFile.read(path, model) if path.exists() else None
    return choose(model, profile, text, n_tokens, bound, write, folder / f".trial-{paths.COLD}", progress)


def _split(
    model: Model, folder: Path, options: SplitOptions, choice: DownChoice | None, progress: Progress, started: float
) -> SplitReport:
    plan, source = _plan(model, folder, options, choice, progress)
    settings = {"down_type": options.down_type, "down_kl": options.down_kl, "order": source}
    hot_paths = tuple(folder / hot_name(device) for device in range(len(plan.hot)))
    cold_path, in_place = folder / paths.COLD, model.places_experts
    with ExitStack() as stack:
        hot = [
            stack.enter_context(hot_writer(path, model, plan, device, settings))
            for device, path in enumerate(hot_paths)
        ]
        cold = None if in_place else stack.enter_context(cold_writer(cold_path, model, plan, settings))
        _write_shards(model, plan, hot, cold, progress)
        if options.verify:
            verify_shards(model, [shard.temporary for shard in hot], cold.temporary if cold else None, progress)
        replace_together((*hot, *([cold] if cold else [])))
    for path in stale_hot_shards(folder, len(hot_paths)):
        path.unlink()
    return SplitReport(
        hot=hot_paths[0],
        hot_shards=hot_paths,
        cold=cold_path,
        in_place=in_place,
        hot_bytes=sum(path.stat().st_size for path in hot_paths),
        cold_bytes=0 if in_place else cold_path.stat().st_size,
        n_hot=sum(_n_neurons(model, units) for units in plan.hot),
        n_cold=_n_neurons(model, plan.cold),
        order=source,
        hot_down_types=_names(
            plan.hot_type(device, i) for device, units in enumerate(plan.hot) for i, n in enumerate(units) if len(n)
        ),
        cold_down_types=_names(t.cold for t, n in zip(plan.types, plan.cold, strict=True) if not in_place and len(n)),
        down_choice=choice,
        seconds=time.monotonic() - started,
        verified=options.verify,
    )


def _n_neurons(model: Model, units: Sequence[NDArray[np.int32]]) -> int:
    return sum(f.unit * len(ids) for f, ids in zip(model.ffns, units, strict=True))


def _write_shards(
    model: Model, plan: ShardPlan, hot: Sequence[ArtefactWriter], cold: ArtefactWriter | None, progress: Progress
) -> None:
    shards = (*hot, *([cold] if cold else []))
    n_bytes = sum(shard.n_bytes for shard in shards)
    if n_bytes >= _WORTH_SAYING:
        progress.note(f"the shards will take {n_bytes / (1 << 30):.1f} GiB")
    for shard in shards:  # the first checks the free space for all
        shard.begin(also=n_bytes - shard.n_bytes if shard is shards[0] else 0)
    with ThreadPoolExecutor(_n_threads(model)) as threads, progress.task("split", n_bytes, "bytes") as advance:
        for i in range(len(model.ffns)):
            for device, shard in enumerate(hot):
                _write_hot(model, plan, device, i, shard, advance)
            if cold:
                _write_cold(model, plan, i, cold, threads, advance)
    for shard in shards:
        shard.finish()


def _n_threads(model: Model) -> int:
    """As many as there are cores, but no more than may hold a block of columns each."""
    return max(1, min(physical_cores(), _COLUMN_BYTES // (4 * model.n_embd * _COLUMNS)))


def _names(types: Iterator[int]) -> tuple[str, ...]:
    return tuple(sorted({type_name(t) for t in types}))


def _plan(
    model: Model, folder: Path, options: SplitOptions, choice: DownChoice | None, progress: Progress
) -> tuple[ShardPlan, str]:
    """The neurons of each shard, their order and types, and the source of that order."""
    types = tuple(down_types(ffn, options.down_type) for ffn in model.ffns)
    if choice:  # devices keep the finer default
        chosen = (down_types(ffn, kind) for ffn, kind in zip(model.ffns, choice.types, strict=True))
        types = tuple(replace(t, cold=c.cold) for t, c in zip(types, chosen, strict=True))
    if options.down_type is not None:
        got = {type_name(t.cold) for t in types}
        got |= {type_name(t.hot) for t in types if not t.is_whole}
        if got != {options.down_type.upper()}:
            progress.note(f"rows that blocks of {options.down_type} do not divide are kept as {', '.join(sorted(got))}")
    if (folder / paths.PLACEMENT).exists():
        placement = PlacementFile.read(folder / paths.PLACEMENT, model)
        hot = tuple(placement.hot(device) for device in range(placement.n_devices))
        return ShardPlan(placement.id, hot, placement.cold(), types), "placement"
    if model.places_experts:
        raise PinferError(f"no expert of {model.name} is placed on a device", f"run pinfer solve {model.path}")
    order, source = _order_without_placement(model, folder)
    where = "their profile" if source == "profile" else "the model"
    progress.note(f"no placement (run pinfer solve to make one): every neuron stays cold, in the order of {where}")
    none = tuple(neurons[:0] for neurons in order)
    return ShardPlan(new_placement_id(), (none,), order, types), source


def _order_without_placement(model: Model, folder: Path) -> tuple[tuple[NDArray[np.int32], ...], str]:
    if (folder / paths.PROFILE).exists():
        return ProfileFile.read(folder / paths.PROFILE, model).order(), "profile"
    return tuple(np.arange(f.n_units, dtype=np.int32) for f in model.ffns), "model"


def _write_rows(
    model: Model,
    ffn: Ffn,
    part: str,
    rows_of: NDArray[np.integer[Any]],
    out: ArtefactWriter,
    advance: Callable[[int], None],
) -> None:
    """Some rows of a matrix, byte for byte those of the model."""
    tensor = parts(ffn)[part]
    raw = model.raw(tensor)
    for piece in pieces(len(rows_of), tensor.row_bytes):
        rows = raw[rows_of[piece]]
        out.write(weight_name(ffn, part), rows)
        model.gguf.release()
        advance(rows.nbytes)


def _rows_of(tensor: Tensor, experts: NDArray[np.int32]) -> NDArray[np.int64]:
    """Numbers of the rows of some experts in a stack."""
    n = tensor.shape[1]
    return (experts[:, None].astype(np.int64) * n + np.arange(n)).reshape(-1)


def _write_hot(
    model: Model, plan: ShardPlan, device: int, i: int, out: ArtefactWriter, advance: Callable[[int], None]
) -> None:
    ffn, units = model.ffns[i], plan.hot[device][i]
    if len(units) == 0:
        return
    for part, tensor in parts(ffn).items():
        if ffn.is_stack or part != "down":
            _write_rows(model, ffn, part, _rows_of(tensor, units) if ffn.is_stack else units, out, advance)
    if ffn.is_stack:
        return
    target = plan.hot_type(device, i)
    for piece in pieces(ffn.n_embd, 4 * ffn.n_ff):
        rows = _select_columns(model.raw(ffn.down)[piece], ffn.down, target, units)
        out.write(down_name("hot", ffn), rows)
        model.gguf.release()
        advance(rows.nbytes)


def _select_columns(
    raw: NDArray[np.uint8], tensor: Tensor, target: int, columns: NDArray[np.int32]
) -> NDArray[np.uint8]:
    """Some columns of rows ``[n, row_bytes]`` as rows of the target type."""
    if _keeps_bytes(tensor.type, target):
        picked = _elements(raw, tensor.type)[:, columns]
        return np.ascontiguousarray(picked).view(np.uint8)
    floats = ggml.dequantise(raw, tensor.type, tensor.row_length)[:, columns]
    return ggml.quantise(floats, target, row_bytes(target, len(columns)))


def _keeps_bytes(source: int, target: int) -> bool:
    """Whether elements can be moved as they are: both types are the same and have no blocks."""
    return source == target and type_size(source)[0] == 1


def _elements(raw: NDArray[np.uint8], ggml_type: int) -> NDArray[Any]:
    """Bytes of a type without blocks, seen element by element."""
    return np.ascontiguousarray(raw).view({2: np.uint16, 4: np.uint32}[type_size(ggml_type)[1]])


def _write_cold(
    model: Model,
    plan: ShardPlan,
    i: int,
    out: ArtefactWriter,
    threads: ThreadPoolExecutor,
    advance: Callable[[int], None],
) -> None:
    ffn, units, target = model.ffns[i], plan.cold[i], plan.types[i].cold
    if ffn.is_stack:
        for expert in units:
            rows = _transposed_down(model, ffn, int(expert), target, np.arange(ffn.n_ff, dtype=np.int32), threads)
            out.write(down_name("cold", ffn), rows)
            advance(rows.nbytes)
        return
    for part in parts(ffn):
        if part != "down":
            _write_rows(model, ffn, part, units, out, advance)
    band = max(_COLUMNS, _BAND // row_bytes(target, ffn.n_embd))
    for start in range(0, len(units), band):
        rows = _transposed_down(model, ffn, 0, target, units[start : start + band], threads)
        out.write(down_name("cold", ffn), rows)
        advance(rows.nbytes)


def _transposed_down(
    model: Model, ffn: Ffn, expert: int, target: int, neurons: NDArray[np.int32], threads: ThreadPoolExecutor
) -> NDArray[np.uint8]:
    """Down rows of some neurons of an expert in the target type, ``[len(neurons), row_bytes]``.

    Columns are read in the order of the file, a block at a time, and written to the rows of their neurons.
    """
    raw = model.raw(ffn.down)[expert * ffn.n_embd : (expert + 1) * ffn.n_embd]
    out = np.empty((len(neurons), row_bytes(target, ffn.n_embd)), dtype=np.uint8)
    place = np.full(ffn.n_ff, -1, dtype=np.int64)
    place[neurons] = np.arange(len(neurons))
    width = max(1, _COLUMN_BYTES // _n_threads(model) // (4 * ffn.n_embd * _COLUMNS)) * _COLUMNS

    def convert(first: int) -> None:
        _convert_columns(raw, ffn.down.type, first, min(first + width, ffn.n_ff), target, place, out)
        model.gguf.release()

    for _ in threads.map(convert, range(0, ffn.n_ff, width)):
        pass
    return out


def _convert_columns(
    matrix: NDArray[np.uint8],
    kind: int,
    first: int,
    end: int,
    target: int,
    place: NDArray[np.int64],
    out: NDArray[np.uint8],
) -> None:
    """Puts the columns ``first..end`` of down ``[n_embd, row_bytes]``, of type ``kind``, into the rows of ``out`` that
    ``place`` gives them (-1: not wanted)."""
    block, size = type_size(kind)
    keep = _keeps_bytes(kind, target)
    raw = np.ascontiguousarray(matrix[:, first // block * size : end // block * size])
    # Small tiles keep the floats and their transpose in the cache.
    width = max(_TILE, block)
    for start in range(0, end - first, width):
        n_columns = min(width, end - first - start)
        rows_of = place[first + start : first + start + n_columns]
        wanted = np.flatnonzero(rows_of >= 0)
        if len(wanted) == 0:
            continue
        tile = np.ascontiguousarray(raw[:, start // block * size : (start + n_columns) // block * size])
        values = _elements(tile, kind) if keep else ggml.dequantise(tile, kind, n_columns)
        rows = np.ascontiguousarray(values.T)[wanted]
        out[rows_of[wanted]] = rows.view(np.uint8) if keep else ggml.quantise(rows, target, out.shape[1])
