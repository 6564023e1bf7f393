"""The native part as Python sees it: where plugin and runner lie, and ``native/include/pinfer.h`` through ctypes.

The plugin serves any number of models in one process, each named by the path of its GGUF. The header gives the order
of the calls.
"""

from __future__ import annotations

import ctypes
import os
import sys
import sysconfig
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pinfer.errors import PinferError

_PLUGIN = Path("lib", "libggml-pinfer.so")
_RUNNER = Path("bin", "pinfer-runner")
_MEND = "build the native part: make build (or pip install pinfer)"

# enum pinfer_activation; None stands for PINFER_ACT_GRAPH, whatever the graph of libllama says
_ACTIVATIONS = {None: 0, "relu": 1, "relu2": 2, "reglu": 3, "drelu": 4, "reglu2": 6, "other": 5}
_ERROR_BYTES = 1024

HOT_TOKENS = 256
"""PINFER_HOT_TOKENS: a hot device computes at most this many tokens at a time"""


class _Params(ctypes.Structure):
    """``struct pinfer_params``."""

    _fields_ = (
        ("model_path", ctypes.c_char_p),
        ("predictor_path", ctypes.c_char_p),
        ("hot_paths", ctypes.POINTER(ctypes.c_char_p)),
        ("cold_path", ctypes.c_char_p),
        ("devices", ctypes.POINTER(ctypes.c_char_p)),
        ("activation", ctypes.c_int32),
        ("n_batch_dense", ctypes.c_int32),
        ("activation_threshold", ctypes.c_float),
    )


class _Stats(ctypes.Structure):
    """``struct pinfer_stats``."""

    _fields_ = (
        ("n_tokens", ctypes.c_uint64),
        ("n_tokens_dense", ctypes.c_uint64),
        ("n_neurons", ctypes.c_uint64),
        ("n_candidates", ctypes.c_uint64),
        ("n_active", ctypes.c_uint64),
        ("n_hot", ctypes.c_uint64),
        ("n_fallback", ctypes.c_uint64),
        ("hot_bytes", ctypes.c_uint64),
        ("seconds_copy", ctypes.c_double),
        ("seconds_hot", ctypes.c_double),
        ("seconds_cold", ctypes.c_double),
        ("seconds_wait", ctypes.c_double),
        ("seconds_overlap", ctypes.c_double),
    )


class _ObserverParams(ctypes.Structure):
    """``struct pinfer_observer_params``."""

    _fields_ = (("n_samples", ctypes.c_uint64), ("stride", ctypes.c_uint64))


class _ObserverFfn(ctypes.Structure):
    """``struct pinfer_observer_ffn``."""

    _fields_ = (
        ("count", ctypes.POINTER(ctypes.c_uint64)),
        ("mass", ctypes.POINTER(ctypes.c_double)),
        ("x", ctypes.POINTER(ctypes.c_uint16)),
        ("active", ctypes.POINTER(ctypes.c_uint8)),
        ("routed", ctypes.POINTER(ctypes.c_uint64)),
        ("experts", ctypes.POINTER(ctypes.c_int32)),
        ("n_neurons", ctypes.c_uint64),
        ("n_embd", ctypes.c_uint64),
        ("n_experts", ctypes.c_uint64),
        ("n_expert_used", ctypes.c_uint64),
        ("n_samples", ctypes.c_uint64),
        ("n_tokens", ctypes.c_uint64),
    )


@dataclass(frozen=True)
class Stats:
    """What the plugin counted since it was configured or the counters were reset; pairs are (layer, token)."""

    n_tokens: int  # pairs computed sparsely
    n_tokens_dense: int  # pairs computed densely
    n_neurons: int  # neurons of the sparse pairs
    n_candidates: int  # neurons whose first product was computed
    n_active: int  # neurons that fired
    n_hot: int  # neurons computed on hot devices
    n_fallback: int  # graph nodes that matched nothing and went to the CPU backend
    hot_bytes: int  # device memory of the hot part, over all devices
    # of the FFNs that have a hot part
    seconds_copy: float = 0.0  # x handed to the devices, the work queued there
    seconds_hot: float = 0.0  # from the first launch until the last device was known to be done
    seconds_cold: float = 0.0  # the CPU with its own neurons
    seconds_wait: float = 0.0  # the CPU waiting for devices
    seconds_overlap: float = 0.0  # hot and cold at the same time

    @property
    def hidden(self) -> float | None:
        """The part of the shorter side, hot or cold, that ran while the other did; None where there are not both."""
        shorter = min(self.seconds_hot, self.seconds_cold)
        return min(1.0, self.seconds_overlap / shorter) if shorter > 0 else None


@dataclass(frozen=True)
class ObserverFfn:
    """What the observer saw in one FFN.

    The arrays are the plugin's own memory: copy what has to outlive the next start or configuration.
    """

    count: NDArray[np.uint64]  # [n_neurons] tokens in which the neuron fired
    mass: NDArray[np.float64]  # [n_neurons] sum of |f_i(x)| over the tokens
    x: NDArray[np.float16]  # [n_samples, n_embd] FFN inputs
    active: NDArray[np.uint8]  # [n_samples, ceil(n_ff/8)] neuron i at byte i/8, bit i%8; empty for a stack of experts
    routed: NDArray[np.uint64] | None  # [n_experts] tokens routed to the expert; None for an FFN that all tokens share
    experts: NDArray[np.int32] | None  # [n_samples, n_expert_used] where the samples were routed to
    n_tokens: int


def native_folder() -> Path:
    """The folder with ``lib/libggml-pinfer.so`` and ``bin/pinfer-runner``.

    ``$PINFER_NATIVE_DIR`` names one (another build, for instance with sanitizers); else it is the installed package,
    else the build folder of the source tree.
    """
    named = os.environ.get("PINFER_NATIVE_DIR")
    if named:
        return Path(named)
    package = Path(__file__).resolve().parent.parent
    in_tree = package.parent / "build" / "native"
    # An editable installation has its Python files in the source tree and the native ones in site-packages.
    installed = (package, Path(sysconfig.get_path("platlib"), "pinfer"))
    return next((folder for folder in installed if (folder / _PLUGIN).exists()), in_tree)


def plugin_path() -> Path:
    """Path of ``libggml-pinfer.so``; PinferError when it is not built."""
    return _existing(_PLUGIN)


def runner_path() -> Path:
    """Path of ``pinfer-runner``; PinferError when it is not built."""
    return _existing(_RUNNER)


def is_loaded() -> bool:
    """Whether this process has the plugin, and with it the device PINFER in every new llama_context."""
    return load_plugin.cache_info().currsize > 0


@cache
def load_plugin() -> PluginLibrary:
    """Load the plugin and register it with libllama's ggml, once per process.

    Raises PinferError when it is missing or refuses, as it does for a ggml of another version than it was built for.
    """
    from pinfer.llama.ggml import load_library

    path = plugin_path()
    # libggml.so.0 is the file libllama links; a wheel's libggml.so is a copy with a registry that nobody looks at.
    registry = load_library("ggml")
    registry.ggml_backend_load.restype = ctypes.c_void_p
    registry.ggml_backend_load.argtypes = (ctypes.c_char_p,)
    with _captured_stderr() as said:
        registered = registry.ggml_backend_load(os.fsencode(path))
    # ggml has its say in the log as well; the plugin's own lines are the ones that matter.
    own = [line.removeprefix("pinfer: ") for line in said if line.startswith("pinfer: ")]
    if not registered:
        raise PinferError(f"cannot load {path}: {'; '.join(own or said[:1]) or 'it gave no reason'}", _MEND)
    for line in own:
        print(f"pinfer: {line}", file=sys.stderr)
    return PluginLibrary(ctypes.CDLL(str(path)))


class PluginLibrary:
    """The functions of ``pinfer.h``. Those that can fail raise PinferError with the plugin's own line."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        failing = (ctypes.c_char_p, ctypes.c_size_t)
        signatures: dict[str, tuple[object, tuple[object, ...]]] = {
            "pinfer_configure": (ctypes.c_bool, (ctypes.POINTER(_Params), *failing)),
            "pinfer_release": (None, (ctypes.c_char_p,)),
            "pinfer_get_stats": (None, (ctypes.c_char_p, ctypes.POINTER(_Stats))),
            "pinfer_stats_reset": (None, (ctypes.c_char_p,)),
            "pinfer_steps_start": (None, ()),
            "pinfer_steps_get": (ctypes.c_char_p, (ctypes.c_int32, ctypes.POINTER(ctypes.c_double))),
            "pinfer_hot_shard_bytes": (ctypes.c_uint64, (ctypes.c_char_p, ctypes.c_int32)),
            "pinfer_hot_compute_bytes": (ctypes.c_uint64, (ctypes.c_uint64, ctypes.c_uint64)),
            "pinfer_last_failure": (ctypes.c_bool, (ctypes.c_char_p, *failing)),
            "pinfer_devices_at_work": (ctypes.c_bool, failing),
            "pinfer_isa": (ctypes.c_char_p, ()),
            "pinfer_arch_activation": (ctypes.c_int, (ctypes.c_char_p,)),
            "pinfer_activation_name": (ctypes.c_char_p, (ctypes.c_int,)),
            "pinfer_activation_parse": (ctypes.c_int, (ctypes.c_char_p,)),
            "pinfer_fingerprint": (ctypes.c_bool, (ctypes.c_char_p, ctypes.c_char_p, *failing)),
            "pinfer_checksum": (ctypes.c_uint64, (ctypes.c_void_p, ctypes.c_size_t)),
            "pinfer_observer_start": (ctypes.c_bool, (ctypes.c_char_p, ctypes.POINTER(_ObserverParams), *failing)),
            "pinfer_observer_stop": (None, (ctypes.c_char_p,)),
            "pinfer_observer_get": (ctypes.c_bool, (ctypes.c_char_p, ctypes.c_char_p, ctypes.POINTER(_ObserverFfn))),
        }
        for name, (result, arguments) in signatures.items():
            function = getattr(library, name)
            function.restype = result
            function.argtypes = arguments

    def configure(
        self,
        model: Path,
        *,
        predictor: Path | None = None,
        hot: Path | Sequence[Path] | None = None,
        cold: Path | None = None,
        device: str | Sequence[str] | None = None,
        activation: str | None = None,
        activation_threshold: float = 0.0,
        n_batch_dense: int = 0,
    ) -> None:
        """``pinfer_configure``: check and open the artefacts of ``model``, in place of its earlier configuration.

        Raises PinferError, and keeps the earlier configuration, while a model loaded from this file is in use with
        other settings. Without a predictor the mode is exact; without an activation the graph's own is used;
        ``other`` leaves the model to llama.cpp; ``n_batch_dense=0`` is the default.
        Several hot shards go to as many devices, named in a sequence or in a list with commas; by default to the GPUs.
        With an ``activation_threshold`` what a ReLU lets through has to exceed it.
        """
        if activation not in _ACTIVATIONS:
            raise PinferError(
                f"unknown activation {activation!r}", "it is one of relu, relu2, reglu, drelu, reglu2, other"
            )
        params = _Params(
            _path_bytes(model),
            _path_bytes(predictor),
            _strings(os.fsencode(path) for path in ((hot,) if isinstance(hot, Path) else hot or ())),
            _path_bytes(cold),
            _strings(name.encode() for name in (device.split(",") if isinstance(device, str) else device or ())),
            _ACTIVATIONS[activation],
            n_batch_dense,
            activation_threshold,
        )
        error = ctypes.create_string_buffer(_ERROR_BYTES)
        _check(self._library.pinfer_configure(ctypes.byref(params), error, _ERROR_BYTES), error)

    def release(self, model: Path) -> None:
        """Forget the configuration of ``model`` and free its devices, once no loaded model uses them."""
        self._library.pinfer_release(os.fsencode(model))

    def stats(self, model: Path | None = None) -> Stats:
        """Counters of ``model`` since it was configured or they were reset; None: the sum over all models."""
        stats = _Stats()
        self._library.pinfer_get_stats(_path_bytes(model), ctypes.byref(stats))
        return Stats(**{name: getattr(stats, name) for name, _ in _Stats._fields_})

    def hot_shard_bytes(self, model: Path, shard: int) -> int:
        """Device memory that hot shard ``shard`` (from 0) of ``model`` took when it was opened."""
        return int(self._library.pinfer_hot_shard_bytes(os.fsencode(model), shard))

    def hot_compute_bytes(self, n_embd: int, n_hot: int) -> int:
        """Upper bound of the compute buffer on a device whose largest layer has ``n_hot`` neurons."""
        return int(self._library.pinfer_hot_compute_bytes(n_embd, n_hot))

    def last_failure(self, model: Path | None = None) -> str | None:
        """Why the last FFN of ``model`` (None: of any) could not be computed, in one line; None where it could."""
        text = ctypes.create_string_buffer(_ERROR_BYTES)
        failed = self._library.pinfer_last_failure(_path_bytes(model), text, _ERROR_BYTES)
        return _text(text.value) if failed else None

    def devices_at_work(self) -> str | None:
        """Devices that have not returned what they were given, as in "device RPC0 failed in layer 7".

        For a callback of ``ggml_set_abort_callback``, by which some of ggml's backends end the process.
        """
        text = ctypes.create_string_buffer(_ERROR_BYTES)
        return _text(text.value) if self._library.pinfer_devices_at_work(text, _ERROR_BYTES) else None

    def reset_stats(self, model: Path | None = None) -> None:
        """Set the counters of ``model`` (None: of all) to zero."""
        self._library.pinfer_stats_reset(_path_bytes(model))

    def start_steps(self) -> None:
        """From now on, FFNs measure where their time goes; the seconds of all steps start at zero."""
        self._library.pinfer_steps_start()

    def steps(self) -> dict[str, float]:
        """The steps of a token and their seconds since the start, as the thread that decodes saw them."""
        seconds, found = ctypes.c_double(), dict[str, float]()
        while name := self._library.pinfer_steps_get(len(found), ctypes.byref(seconds)):
            found[_text(name)] = seconds.value
        return found

    @property
    def steps_eval(self) -> int:
        """Address of a ``cb_eval``: it has nodes computed one by one, and counted among the steps."""
        return ctypes.cast(self._library.pinfer_steps_eval, ctypes.c_void_p).value or 0

    def isa(self) -> str:
        """The kernels in use: ``avx512``, ``avx2``, ``neon`` or ``scalar``."""
        return _text(self._library.pinfer_isa())

    def arch_activation(self, arch: str) -> str:
        """What llama.cpp computes for a GGUF architecture: ``relu``, ``relu2``, ``reglu``, ``drelu`` or ``other``."""
        return _text(self._library.pinfer_activation_name(self._library.pinfer_arch_activation(arch.encode())))

    def fingerprint(self, path: Path) -> str:
        """Fingerprint of a GGUF, 32 hex digits, in milliseconds whatever its size."""
        out = ctypes.create_string_buffer(33)
        error = ctypes.create_string_buffer(_ERROR_BYTES)
        _check(self._library.pinfer_fingerprint(os.fsencode(path), out, error, _ERROR_BYTES), error)
        return _text(out.value)

    def checksum(self, array: NDArray[Any]) -> int:
        """Checksum of the bytes of a C-contiguous array, as ``pinfer.checksums`` holds it (docs/formats.md)."""
        if not array.flags.c_contiguous:
            raise ValueError("the array is not contiguous")
        return int(self._library.pinfer_checksum(array.ctypes.data, array.nbytes))

    def observer_start(self, model: Path, n_samples: int = 0, stride: int = 1) -> None:
        """Count what fires in ``model``, and keep the FFN inputs of every ``stride``-th token up to ``n_samples``."""
        params = _ObserverParams(n_samples, stride)
        error = ctypes.create_string_buffer(_ERROR_BYTES)
        started = self._library.pinfer_observer_start(os.fsencode(model), ctypes.byref(params), error, _ERROR_BYTES)
        _check(started, error)

    def observer_stop(self, model: Path) -> None:
        """Stop counting; what was counted stays readable until the next start, configuration or release."""
        self._library.pinfer_observer_stop(os.fsencode(model))

    def observer_ffn(self, model: Path, name: str) -> ObserverFfn | None:
        """What was seen in an FFN of ``model`` (``blk.3``, ``blk.3.shexp``, ``blk.3.exps``); None when it never ran."""
        seen = _ObserverFfn()
        if (
            not self._library.pinfer_observer_get(os.fsencode(model), name.encode(), ctypes.byref(seen))
            or not seen.count
        ):
            return None

        def array(pointer: Any, dtype: Any, *shape: int) -> NDArray[Any]:
            return np.ctypeslib.as_array(pointer, shape=shape).view(dtype) if all(shape) else np.empty(shape, dtype)

        n_samples, is_stack = seen.n_samples, seen.n_experts > 0
        return ObserverFfn(
            count=array(seen.count, np.uint64, seen.n_neurons),
            mass=array(seen.mass, np.float64, seen.n_neurons),
            x=array(seen.x, np.float16, n_samples, seen.n_embd),
            active=array(seen.active, np.uint8, n_samples, 0 if is_stack else (seen.n_neurons + 7) // 8),
            routed=array(seen.routed, np.uint64, seen.n_experts) if is_stack else None,
            experts=array(seen.experts, np.int32, n_samples, seen.n_expert_used) if is_stack else None,
            n_tokens=seen.n_tokens,
        )


def _existing(name: Path) -> Path:
    path = native_folder() / name
    if not path.is_file():
        raise PinferError(f"{path} is missing", _MEND)
    return path


def _strings(values: Iterable[bytes]) -> ctypes.Array[ctypes.c_char_p] | None:
    """A C array of strings with NULL at the end; None where there are none."""
    texts = [*values]
    return (ctypes.c_char_p * (len(texts) + 1))(*texts, None) if texts else None


def _path_bytes(path: Path | None) -> bytes | None:
    return None if path is None else os.fsencode(path)


def _text(value: bytes | None) -> str:
    return (value or b"").decode("utf-8", errors="replace")


def _check(ok: bool, error: ctypes.Array[ctypes.c_char]) -> None:
    if not ok:
        raise PinferError(_text(error.value) or "the plugin failed without a reason")


@contextmanager
def _captured_stderr() -> Iterator[list[str]]:
    """Collect what native code writes to file descriptor 2; the lines are in the list when the block is left."""
    lines: list[str] = []
    saved = os.dup(2)
    try:
        with open(os.memfd_create("stderr"), "w+b") as file:
            os.dup2(file.fileno(), 2)
            try:
                yield lines
            finally:
                os.dup2(saved, 2)
                file.seek(0)
                lines += file.read().decode("utf-8", errors="replace").splitlines()
    finally:
        os.close(saved)
