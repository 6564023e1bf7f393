"""A model loaded by libllama in this process: tokens in, logits out. Used by profile, eval and the tests."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from pinfer.errors import PinferError
from pinfer.llama import log
from pinfer.llama.cache_types import DEFAULT_CACHE, CacheTypes, cache_type_number
from pinfer.llama.devices import physical_cores
from pinfer.llama.ggml import load_library
from pinfer.llama.plugin import is_loaded, load_plugin
from pinfer.model import Model

DEVICE_NAME = b"PINFER"

# The loader gives the FFN of a layer offloaded to a GPU to that GPU, unless an override names the plugin. Experts that
# are placed as a whole stay where it puts those of the CPU.
_FFN_TENSORS = rb"\.(ffn_(up|gate|down)(_exps|_shexp)?|channel_mix_(key|value))\.(weight|bias)"
_EXPERT_TENSORS = rb"\.ffn_(up|gate|down)_exps\.(weight|bias)"

_GPU_TYPES = (1, 2)  # of enum ggml_backend_dev_type: GPU and IGPU

# Architectures whose graph aborts with flash attention; libllama would turn it on by default.
NO_FLASH_ATTENTION = ("plm",)

# Values of pinfer_params.n_batch_dense that compute every batch densely, or none.
ALWAYS_DENSE = 1
NEVER_DENSE = 2**31 - 1


@dataclass(frozen=True)
class PluginConfig:
    """What the plugin is to do in this engine; every default is the plugin's own."""

    activation: str | None = None  # one of ACTIVATIONS; None: what the architecture says
    activation_threshold: float = 0.0  # what a ReLU lets through has to exceed it
    predictor: Path | None = None  # None: exact mode
    hot: Path | Sequence[Path] | None = None  # a shard for each hot device
    cold: Path | None = None
    device: str | None = None  # of the hot part; of several, their names with commas between
    n_batch_dense: int = 0  # from this many tokens a batch is computed densely

    @property
    def places_experts(self) -> bool:
        """Whether the plugin computes whole experts alone, those of the hot shards."""
        return self.activation == "other"

    @property
    def hot_paths(self) -> tuple[Path, ...]:
        """The shards of all hot devices."""
        return (self.hot,) if isinstance(self.hot, Path) else tuple(self.hot or ())

    @staticmethod
    def of(model: Model) -> PluginConfig:
        """What ``model`` computes, in exact mode and without shards."""
        return PluginConfig(activation=model.activation, activation_threshold=model.activation_threshold)


class Engine:
    """A loaded model with one context and one sequence; a context manager that frees both at the end.

    ``plugin=None`` gives stock libllama, even in a process that has loaded the plugin. Engines of several models may be
    open at the same time, each with its own plugin settings. Two engines of one model must have the same settings.
    """

    def __init__(
        self,
        model_path: Path,
        *,
        plugin: PluginConfig | None = None,
        n_ctx: int = 0,
        n_batch: int = 512,
        n_threads: int | None = None,
        n_gpu_layers: int = 0,
        cache_types: CacheTypes = DEFAULT_CACHE,
        f32_attention: bool = False,
        repack: bool = True,
        on_node: Any = None,
    ) -> None:
        """Load ``model_path``. ``n_ctx=0`` uses the model's training context.

        ``f32_attention`` keeps keys and values in F32 and turns off flash attention, which rounds them to F16.
        ``repack=False`` uses the weights where the file is mapped, instead of copies in faster layouts. ``on_node`` is
        a ``ggml_backend_sched_eval_callback`` that sees the nodes of the graph.

        Raises PinferError with libllama's last log lines if it cannot load the model or create the context.
        """
        self._model: Any = None
        self._context: Any = None
        self._batch: Any = None
        self._f32_attention = f32_attention
        self._cache_types = ("f32", "f32") if f32_attention else cache_types
        self._n_threads = n_threads or physical_cores()
        self._hot_devices = plugin.device if plugin is not None and plugin.hot else None
        configure_plugin(model_path, plugin)
        self._configured: Path | None = model_path
        self._on_node = on_node
        from llama_cpp import llama_cpp as llama

        self._llama = llama
        llama.llama_backend_init()
        try:
            self._load(model_path, n_gpu_layers, repack, plugin)
            self._open_context(n_ctx, n_batch)
        except BaseException:
            self.close()
            raise
        self._vocab = llama.llama_model_get_vocab(self._model)
        self.n_vocab: int = llama.llama_vocab_n_tokens(self._vocab)
        self.n_layer: int = llama.llama_model_n_layer(self._model)
        self.n_embd: int = llama.llama_model_n_embd(self._model)
        # As in llama.cpp, only vocabularies that ask for it get one.
        self.bos: int | None = (
            llama.llama_vocab_bos(self._vocab) if llama.llama_vocab_get_add_bos(self._vocab) else None
        )
        self.n_past = 0

    def _load(self, model_path: Path, n_gpu_layers: int, repack: bool, plugin: PluginConfig | None) -> None:
        params = self._llama.llama_model_default_params()
        params.n_gpu_layers = n_gpu_layers
        params.use_extra_bufts = repack
        overrides = None
        if plugin is not None and n_gpu_layers != 0:
            overrides = ffn_overrides(plugin)
            params.tensor_buft_overrides = ctypes.addressof(overrides)
        devices = None
        if self._hot_devices is not None:
            devices = _dense_devices(self._hot_devices)
            params.devices = ctypes.addressof(devices)
        log.capture()
        self._model = self._llama.llama_model_load_from_file(os.fsencode(model_path), params)
        if not self._model:
            raise PinferError(
                f"libllama cannot load {model_path}: {log.last_words()}", "check that the file is a model"
            )

    def _open_context(
        self,
        n_ctx: int,
        n_batch: int,
        n_ubatch: int | None = None,
        n_seq: int = 1,
        *,
        flash_attention: bool = True,
    ) -> None:
        """A context of ``n_ctx`` tokens, shared by ``n_seq`` sequences, in place of the open one.

        ``flash_attention`` leaves the choice to libllama; False turns it off.
        """
        self._close_context()
        llama = self._llama
        params = llama.llama_context_default_params()
        params.n_ctx = n_ctx
        params.n_batch = n_batch
        params.n_ubatch = n_ubatch or n_batch
        params.n_seq_max = n_seq
        params.n_threads = params.n_threads_batch = self._n_threads
        params.no_perf = True
        if self._on_node is not None:
            params.cb_eval = self._on_node
        arch = ctypes.create_string_buffer(64)
        llama.llama_model_meta_val_str(self._model, b"general.architecture", arch, len(arch))
        params.type_k, params.type_v = map(cache_type_number, self._cache_types)
        if not flash_attention or self._f32_attention or arch.value.decode() in NO_FLASH_ATTENTION:
            params.flash_attn_type = llama.LLAMA_FLASH_ATTN_TYPE_DISABLED
        log.capture()
        self._context = llama.llama_init_from_model(self._model, params)
        if not self._context:
            raise PinferError(
                f"libllama cannot create a context of {n_ctx or 'the default number of'} tokens for {n_seq} "
                f"sequence{'s' if n_seq > 1 else ''}: {log.last_words()}",
                "try a smaller context" + (" or fewer sequences" if n_seq > 1 else ""),
            )
        self._batch = llama.llama_batch_init(n_batch, 0, 1)
        self.n_ctx: int = llama.llama_n_ctx(self._context)
        self.n_batch: int = llama.llama_n_batch(self._context)

    def tokenize(self, text: str, *, bos: bool = True, special: bool = False) -> list[int]:
        """Token ids of ``text``, with the vocabulary's BOS in front if it has one and ``bos`` is set.

        ``special`` parses control tokens in the text. Never set it for text from a file.
        """
        data = text.encode("utf-8")
        room = len(data) + 8
        while True:
            tokens = (self._llama.llama_token * room)()
            n = self._llama.llama_tokenize(self._vocab, data, len(data), tokens, room, False, special)
            if n >= 0:
                break
            room = -n
        ids = list(tokens[:n])
        return [self.bos, *ids] if bos and self.bos is not None else ids

    def detokenize(self, tokens: Sequence[int]) -> str:
        """The text of ``tokens``."""
        ids = (self._llama.llama_token * max(1, len(tokens)))(*tokens)
        room = 16 * len(tokens) + 16
        while True:
            text = ctypes.create_string_buffer(room)
            n = self._llama.llama_detokenize(self._vocab, ids, len(tokens), text, room, False, True)
            if n >= 0:
                return text.raw[:n].decode("utf-8", errors="replace")
            room = -n

    def is_end(self, token: int) -> bool:
        """Whether ``token`` ends the generation."""
        return bool(self._llama.llama_vocab_is_eog(self._vocab, token))

    def clear(self) -> None:
        """Forget the sequence: the next token is at position 0."""
        self._llama.llama_memory_clear(self._llama.llama_get_memory(self._context), False)
        self.n_past = 0

    def decode(self, tokens: Sequence[int], *, logits: bool = False) -> NDArray[np.float32]:
        """Append ``tokens`` to the sequence and return float32 logits.

        ``logits=True``: of every token, ``[len(tokens), n_vocab]``; else of the last one, ``[1, n_vocab]``.
        """
        if not len(tokens):
            raise ValueError("no tokens to decode")
        n_rows = len(tokens) if logits else 1
        out = np.empty((n_rows, self.n_vocab), dtype=np.float32)
        for begin in range(0, len(tokens), self.n_batch):
            piece = tokens[begin : begin + self.n_batch]
            is_last = begin + len(piece) == len(tokens)
            first_output = 0 if logits else (len(piece) - 1 if is_last else len(piece))
            self._decode_batch(piece, first_output)
            n_out = len(piece) - first_output
            if n_out:
                pointer = self._llama.llama_get_logits(self._context)
                row = begin if logits else 0
                out[row : row + n_out] = np.ctypeslib.as_array(pointer, shape=(n_out, self.n_vocab))
        return out

    def feed(self, tokens: Sequence[int]) -> None:
        """Append ``tokens`` and compute every layer for each of them, without returning logits.

        libllama drops tokens without an output before the last layer's FFN. Counting activations in that layer
        therefore needs outputs for all tokens.
        """
        for begin in range(0, len(tokens), self.n_batch):
            self._decode_batch(tokens[begin : begin + self.n_batch], 0)
        self._llama.llama_synchronize(self._context)

    def _decode_batch(self, tokens: Sequence[int], first_output: int) -> None:
        batch = self._batch
        batch.n_tokens = len(tokens)
        for i, token in enumerate(tokens):
            batch.token[i] = token
            batch.pos[i] = self.n_past + i
            batch.n_seq_id[i] = 1
            batch.seq_id[i][0] = 0
            batch.logits[i] = i >= first_output
        log.capture()
        status = self._llama.llama_decode(self._context, batch)
        if status == 1:
            raise PinferError(f"the context of {self.n_ctx} tokens is full", "use a larger context (-c)")
        if status != 0:
            raise PinferError(_why_not_decoded(status))
        self.n_past += len(tokens)

    def piece(self, token: int) -> bytes:
        """The bytes of one token, which may end in the middle of a character."""
        text = ctypes.create_string_buffer(256)
        n = self._llama.llama_token_to_piece(self._vocab, token, text, len(text), 0, False)
        return text.raw[: max(n, 0)]

    def sample(self, tokens: Sequence[int], n_tokens: int, *, temperature: float = 0.0, seed: int = 0) -> Iterator[int]:
        """Continue ``tokens`` from an empty sequence: at most ``n_tokens`` ids, without the end token.

        Temperature 0 is greedy; above it, llama.cpp's default top-k, top-p and min-p apply.
        """
        llama = self._llama
        chain = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
        try:
            samplers = [llama.llama_sampler_init_greedy()]
            if temperature > 0:
                samplers = [
                    llama.llama_sampler_init_top_k(40),
                    llama.llama_sampler_init_top_p(0.95, 1),
                    llama.llama_sampler_init_min_p(0.05, 1),
                    llama.llama_sampler_init_temp(temperature),
                    llama.llama_sampler_init_dist(seed),
                ]
            for sampler in samplers:
                llama.llama_sampler_chain_add(chain, sampler)
            self.clear()
            step = list(tokens)
            for _ in range(n_tokens):
                self.decode(step)
                token = int(llama.llama_sampler_sample(chain, self._context, -1))
                if self.is_end(token):
                    return
                yield token
                step = [token]
        finally:
            llama.llama_sampler_free(chain)

    def generate(self, tokens: Sequence[int], n_tokens: int) -> list[int]:
        """Greedy continuation of ``tokens`` from an empty sequence: at most ``n_tokens`` ids, up to the end token."""
        self.clear()
        answer: list[int] = []
        step = list(tokens)
        while len(answer) < n_tokens:
            token = int(self.decode(step)[0].argmax())
            answer.append(token)
            if self.is_end(token):
                break
            step = [token]
        return answer

    def _close_context(self) -> None:
        if self._batch is not None:
            self._llama.llama_batch_free(self._batch)
            self._batch = None
        if self._context:
            self._llama.llama_free(self._context)
            self._context = None

    def close(self) -> None:
        """Free the context, the model, and its part of the plugin: its counters are gone. Safe to call twice."""
        self._close_context()
        if self._model:
            self._llama.llama_model_free(self._model)
            self._model = None
        if self._configured is not None and is_loaded():
            load_plugin().release(self._configured)
        self._configured = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def require_loadable(path: Path) -> None:
    """Raises PinferError with libllama's last log lines if it rejects a GGUF's header or misses a tensor.

    No weights are read or allocated.
    """
    from llama_cpp import llama_cpp as llama

    llama.llama_backend_init()
    params = llama.llama_model_default_params()
    params.no_alloc = True
    params.load_mode = llama.LLAMA_LOAD_MODE_NONE  # there are no weights to map
    log.capture()
    model = llama.llama_model_load_from_file(os.fsencode(path), params)
    if not model:
        raise PinferError(f"libllama cannot load the model: {log.last_words()}")
    llama.llama_model_free(model)


def configure_plugin(model_path: Path, config: PluginConfig | None) -> None:
    if config is None:
        # Once loaded, the plugin's device stays in the process: it has to be told to keep out of this model's way.
        if is_loaded():
            load_plugin().configure(model_path, activation="other")
        return
    load_plugin().configure(
        model_path,
        predictor=config.predictor,
        hot=config.hot,
        cold=config.cold,
        device=config.device,
        activation=config.activation,
        activation_threshold=config.activation_threshold,
        n_batch_dense=config.n_batch_dense,
    )


class _BufferOverride(ctypes.Structure):
    """``struct llama_model_tensor_buft_override``."""

    _fields_ = (("pattern", ctypes.c_char_p), ("buffer_type", ctypes.c_void_p))


def ffn_overrides(plugin: PluginConfig) -> ctypes.Array[_BufferOverride]:
    """Overrides that put the FFN tensors where the plugin computes them, terminated by a null entry."""
    placed = plugin.places_experts
    device = load_library("ggml").ggml_backend_dev_by_name(b"CPU" if placed else DEVICE_NAME)
    if not device:
        raise PinferError("the pinfer plugin is not registered with libggml", "build it again: make build")
    overrides = (_BufferOverride * 2)()
    pattern = _EXPERT_TENSORS if placed else _FFN_TENSORS
    overrides[0] = _BufferOverride(pattern, load_library("ggml-base").ggml_backend_dev_buffer_type(device))
    return overrides


def _dense_devices(hot_devices: str) -> ctypes.Array[ctypes.c_void_p]:
    """Where libllama may put dense layers beside hot neurons: on the first of ``hot_devices`` that is a GPU, if any."""
    registry, base = load_library("ggml"), load_library("ggml-base")
    found = (registry.ggml_backend_dev_by_name(name.encode()) for name in hot_devices.split(","))
    gpus = (device for device in found if device and base.ggml_backend_dev_type(device) in _GPU_TYPES)
    return (ctypes.c_void_p * 2)(next(gpus, None), None)


def _why_not_decoded(status: int) -> str:
    failure = load_plugin().last_failure() if is_loaded() else None
    return failure or f"libllama cannot decode (status {status}): {log.last_words()}"
