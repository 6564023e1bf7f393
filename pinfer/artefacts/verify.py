"""Proves that shards hold the whole model: each neuron once, equal rows, down within the error of its type."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pinfer.artefacts.shards import DOWN_TYPES, ShardFile, bias_name, down_name, parts, pieces, weight_name
from pinfer.errors import PinferError
from pinfer.gguf_io.reader import GgufError, type_name, type_size
from pinfer.llama import ggml
from pinfer.model import Ffn, Model, Tensor
from pinfer.progress import NULL_PROGRESS, Progress

_ROWS = 256
"""rows of down compared at once: every block length divides it"""


def verify_shards(
    model: Model, hot_paths: Sequence[Path], cold_path: Path | None, progress: Progress = NULL_PROGRESS
) -> None:
    """Compares all shards with the model and with their checksums. Raises PinferError with the first difference.

    Without a cold shard the hot ones hold some of the model, and the CPU reads the rest from the model itself.
    """
    hot = tuple(ShardFile.read(path, "hot", model) for path in hot_paths)
    cold = ShardFile.read(cold_path, "cold", model) if cold_path else None
    shards = (*hot, cold) if cold else hot
    if len({shard.placement_id for shard in shards}) > 1:
        raise _failed(model, "the hot and the cold shards come from different placements")
    with progress.task("verify", sum(shard.artefact.gguf.size for shard in shards), "bytes") as advance:
        for i, ffn in enumerate(model.ffns):
            try:
                _check_ffn(_Compared(model, ffn, i, hot, cold, advance))
            except (_Difference, GgufError) as difference:
                raise _failed(model, f"{ffn.title}: {difference}") from None
    for shard in shards:
        shard.artefact.verify()


class _Difference(Exception):
    """The difference; completes the sentence "layer N: ..."."""


def _failed(model: Model, cause: str) -> PinferError:
    return PinferError(f"the shards do not match {model.name}: {cause}", f"make them again: pinfer split {model.path}")


@dataclass(frozen=True)
class _Compared:
    """An FFN, and the shards that hold it."""

    model: Model
    ffn: Ffn
    i: int
    hot: tuple[ShardFile, ...]
    """one per device"""
    cold: ShardFile | None
    """None where the CPU computes from the model itself"""
    advance: Callable[[int], None]

    def release(self) -> None:
        self.model.gguf.release()
        for shard in (*self.hot, *([self.cold] if self.cold else [])):
            shard.artefact.gguf.release()


def _check_ffn(at: _Compared) -> None:
    cold = at.cold.units[at.i] if at.cold else np.empty(0, np.int32)
    everywhere = np.concatenate([*(shard.units[at.i] for shard in at.hot), cold])
    times = np.bincount(everywhere, minlength=at.ffn.n_units)
    wrong = times != 1 if at.cold else times > 1
    if wrong.any():
        unit = int(np.argmax(wrong))
        raise _Difference(f"{at.ffn.units[:-1]} {unit} occurs {times[unit]} times")
    for shard in at.hot:
        units = shard.units[at.i]
        if len(units) and at.ffn.is_stack:
            _check_hot_experts(at, shard, units)
        elif len(units):
            _check_rows(at, shard, units)
            _check_hot_down(at, shard, units)
    if len(cold) and at.ffn.is_stack:
        for place, expert in enumerate(cold):
            neurons = np.arange(at.ffn.n_ff, dtype=np.int32)
            _check_cold_down(at, neurons, int(expert), place * at.ffn.n_ff)
    elif at.cold and len(cold):
        _check_rows(at, at.cold, cold)
        _check_cold_down(at, cold)


def _check_hot_experts(at: _Compared, shard: ShardFile, experts: NDArray[np.int32]) -> None:
    """All matrices, byte for byte."""
    _check_biases(at, shard, experts)
    for part, tensor in parts(at.ffn).items():
        name, n = weight_name(at.ffn, part), tensor.shape[1]
        if shard.artefact.tensor(name).type != tensor.type:
            raise _Difference(f"{name} of {shard.artefact.path.name} has another type than the model")
        rows = shard.artefact.raw(name)
        for place, expert in enumerate(experts):
            wanted = at.model.raw(tensor)[expert * n : (expert + 1) * n]
            if not np.array_equal(rows[place * n : (place + 1) * n], wanted):
                raise _Difference(f"the hot {part} matrix of expert {expert} differs")
            at.advance(wanted.nbytes)
            at.release()


def _check_biases(at: _Compared, shard: ShardFile, units: NDArray[np.int32]) -> None:
    f = at.ffn
    for kind, bias in f.biases.items():
        if kind == "down" and not f.is_stack:
            continue
        found = shard.artefact.array(bias_name(f, kind), (*bias.shape[:-1], len(units)), "F32")
        if (found != at.model.gguf.array(bias)[units]).any():
            raise _Difference(f"the {kind} biases of the {shard.artefact.kind} {f.units} differ")


def _same_rows(found: NDArray[np.uint8], wanted: NDArray[np.uint8], neurons: NDArray[np.int32], what: str) -> None:
    if not np.array_equal(found, wanted):
        first = int(np.argmax((found != wanted).any(axis=1)))
        raise _Difference(f"the {what} row of neuron {neurons[first]} differs")


def _check_rows(at: _Compared, shard: ShardFile, neurons: NDArray[np.int32]) -> None:
    """Biases, gate and up rows, byte for byte."""
    model = at.model
    _check_biases(at, shard, neurons)
    for kind, tensor in parts(at.ffn).items():
        if kind == "down":
            continue
        name = weight_name(at.ffn, kind)
        entry = shard.artefact.tensor(name)
        if entry.type != tensor.type:
            raise _Difference(f"{name} of {shard.artefact.path.name} has another type than the model")
        rows = shard.artefact.raw(name)
        what = f"{shard.artefact.kind} {kind}"
        for piece in pieces(len(neurons), tensor.row_bytes):
            _same_rows(rows[piece], model.raw(tensor)[neurons[piece]], neurons[piece], what)
            at.advance((piece.stop - piece.start) * tensor.row_bytes)
            at.release()


def _down(at: _Compared, shard: ShardFile) -> tuple[Tensor, Tensor]:
    """The down matrix of the model and that of a shard."""
    entry = shard.artefact.tensor(down_name(shard.artefact.kind, at.ffn))
    if entry.type_name not in DOWN_TYPES:
        raise _Difference(f"the {shard.artefact.kind} down rows are of type {entry.type_name}")
    return at.ffn.down, entry


def _check_hot_down(at: _Compared, shard: ShardFile, neurons: NDArray[np.int32]) -> None:
    model = at.model
    down, entry = _down(at, shard)
    rows = shard.artefact.raw(entry.name)
    for start in range(0, at.ffn.n_embd, _ROWS):
        some = slice(start, min(start + _ROWS, at.ffn.n_embd))
        wanted = ggml.dequantise(model.raw(down)[some], down.type, down.row_length)[:, neurons]
        found = ggml.dequantise(rows[some], entry.type, len(neurons))
        _close(found, wanted, entry.type, "hot")
        at.advance((some.stop - some.start) * entry.row_bytes)
        at.release()


def _check_cold_down(at: _Compared, neurons: NDArray[np.int32], expert: int = 0, first: int = 0) -> None:
    """The down rows of some neurons of an expert; that of the first is row ``first`` in the shard."""
    assert at.cold is not None
    model, n_embd = at.model, at.ffn.n_embd
    down, entry = _down(at, at.cold)
    rows = at.cold.artefact.raw(entry.name)[first : first + len(neurons)]
    block, size = type_size(entry.type)
    for start in range(0, n_embd, _ROWS):
        end = min(start + _ROWS, n_embd)
        of_model = model.raw(down)[expert * n_embd + start : expert * n_embd + end]
        wanted = ggml.dequantise(of_model, down.type, down.row_length)
        columns = slice(start // block * size, end // block * size)
        for piece in pieces(len(neurons), 4 * (end - start)):
            found = ggml.dequantise(rows[piece, columns], entry.type, end - start)
            _close(found, wanted[:, neurons[piece]].T, entry.type, "cold")
            at.advance((piece.stop - piece.start) * (columns.stop - columns.start))
        at.release()


def _close(found: NDArray[np.float32], wanted: NDArray[np.float32], ggml_type: int, shard: str) -> None:
    """Checks that no value is further off than its type explains; blocks run along the last axis."""
    name = type_name(ggml_type)
    error = DOWN_TYPES[name]
    n, length = wanted.shape
    block = type_size(ggml_type)[0]
    # Differences of two float32 values are rounded themselves.
    largest = np.abs(wanted).reshape(n, length // block, block).max(axis=2)
    allowed = largest * np.float32(error.relative * 1.001) + np.float32(error.absolute)
    worst = np.abs(found - wanted).reshape(n, length // block, block).max(axis=2)
    if not (worst <= allowed).all():
        excess = np.where(np.isfinite(worst), worst - allowed, np.inf)
        row, at = np.unravel_index(int(np.argmax(excess)), excess.shape)
        raise _Difference(
            f"the {shard} down rows are off by {worst[row, at]:.3g} where {name} explains {allowed[row, at]:.3g}"
        )
