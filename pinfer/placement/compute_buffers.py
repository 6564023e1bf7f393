"""The size of libllama's compute buffers on a device, for a model that is loaded without memory for its weights.

libllama plans its graphs for the same layers, context and batch as in a real run and logs the size of each buffer to a
hundredth of a MiB. No public function returns it.
"""

from __future__ import annotations

import ctypes
import os
import re
from dataclasses import dataclass
from typing import Any

from pinfer.errors import PinferError
from pinfer.llama import log
from pinfer.llama.cache_types import CacheTypes, cache_type_number
from pinfer.llama.engine import PluginConfig, configure_plugin, ffn_overrides
from pinfer.llama.ggml import load_library
from pinfer.model import Model

_LINE = re.compile(r"(\S+) compute buffer size = +([0-9.]+) MiB")
_STEP = 0.005 * 2**20
"""largest rounding error of a logged number, in bytes"""


@dataclass(frozen=True)
class Layout:
    """What determines the buffer sizes."""

    n_gpu_layers: int
    n_ctx: int
    n_ubatch: int
    cache_types: CacheTypes


def count_compute_bytes(model: Model, device: str, layout: Layout) -> int:
    """Bytes of libllama's compute buffer on ``device``; nothing is allocated there.

    The FFN's weights go to the plugin, as in a run, and layers on the CPU stay there whatever the batch. Raises
    PinferError when libllama refuses the model or the context, or does not log the size.
    """
    from llama_cpp import llama_cpp as llama

    plugin = PluginConfig.of(model)
    configure_plugin(model.path, plugin)
    llama.llama_backend_init()
    log.capture()
    handle = _device(device)
    devices = (ctypes.c_void_p * 2)(handle, None)
    overrides = ffn_overrides(plugin)
    params = llama.llama_model_default_params()
    params.no_alloc = True
    params.load_mode = llama.LLAMA_LOAD_MODE_NONE
    params.n_gpu_layers = layout.n_gpu_layers
    params.devices = ctypes.addressof(devices)
    params.tensor_buft_overrides = ctypes.addressof(overrides)
    loaded = llama.llama_model_load_from_file(os.fsencode(model.path), params)
    if not loaded:
        raise PinferError(f"libllama refuses {model.path}: {log.last_words()}", "check that the file is a model")
    log.capture()
    try:
        context = llama.llama_init_from_model(loaded, _context_params(llama, layout))
        if not context:
            raise PinferError(
                f"libllama makes no context of {layout.n_ctx} tokens: {log.last_words()}", "try a smaller one with -c"
            )
        llama.llama_free(context)
    finally:
        llama.llama_model_free(loaded)
    sizes = {name: float(size) for name, size in _LINE.findall(log.captured())}
    name = _buffer_type(handle)
    if name not in sizes and (layout.n_gpu_layers or not sizes):
        raise PinferError(
            f"libllama's log does not tell the compute buffer of {device}",
            "install the llama-cpp-python that pinfer requires: pip install --force-reinstall pinfer",
        )
    return int(sizes[name] * 2**20 + _STEP) + 1 if name in sizes else 0


def _context_params(llama: Any, layout: Layout) -> Any:
    params = llama.llama_context_default_params()
    params.n_ctx = layout.n_ctx
    params.n_batch = params.n_ubatch = layout.n_ubatch
    params.n_seq_max = params.n_outputs_max = 1
    params.type_k, params.type_v = map(cache_type_number, layout.cache_types)
    params.op_offload = False
    return params


def _device(name: str) -> int:
    registry = load_library("ggml")
    registry.ggml_backend_dev_by_name.restype = ctypes.c_void_p
    registry.ggml_backend_dev_by_name.argtypes = (ctypes.c_char_p,)
    handle = registry.ggml_backend_dev_by_name(name.encode())
    if not handle:
        raise PinferError(f"there is no device {name!r} here", "choose another one with --device")
    return int(handle)


def _buffer_type(handle: int) -> str:
    base = load_library("ggml-base")
    base.ggml_backend_dev_buffer_type.restype = ctypes.c_void_p
    base.ggml_backend_dev_buffer_type.argtypes = (ctypes.c_void_p,)
    base.ggml_backend_buft_name.restype = ctypes.c_char_p
    base.ggml_backend_buft_name.argtypes = (ctypes.c_void_p,)
    return str(base.ggml_backend_buft_name(base.ggml_backend_dev_buffer_type(handle)).decode())
