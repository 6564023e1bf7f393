"""``python -m pinfer.benchmark.worker``: one side of `pinfer bench`, a worker process driven by commands.

The plugin has one configuration per process, and so has the peak of memory; hence a process for each side. Commands and
answers are JSON objects, a line each, on stdin and stdout: ``{"ok": ...}`` or ``{"error": ..., "hint": ...}``.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from pinfer.errors import PinferError
from pinfer.llama import plugin as native
from pinfer.llama import rpc as remote
from pinfer.llama.engine import Engine, PluginConfig

N_BATCH, N_UBATCH = 2048, 512  # of a prompt; llama-bench's own
_NO_VOCABULARY = 0  # enum llama_vocab_type


class BenchEngine(Engine):
    """An engine whose context is made anew for each test, with as many sequences as the test has."""

    def __init__(self, model_path: Path, *, plugin: PluginConfig | None, n_threads: int, n_gpu_layers: int) -> None:
        self._model_path = model_path
        self._n_threads = n_threads
        self._n_seq = 1
        super().__init__(
            model_path, plugin=plugin, n_ctx=32, n_batch=32, n_threads=n_threads, n_gpu_layers=n_gpu_layers
        )

    def open_context(self, n_ctx: int, n_seq: int) -> None:
        """A context of ``n_ctx`` tokens for each of ``n_seq`` sequences."""
        self._close_context()
        self._n_seq = n_seq
        self._open(self._model_path, n_ctx * n_seq, max(n_seq, min(N_BATCH, n_ctx)), self._n_threads)
        self.n_ctx = self._llama.llama_n_ctx(self._context)
        self.n_batch = self._llama.llama_n_batch(self._context)

    def _open(self, model_path: Path, n_ctx: int, n_batch: int, n_threads: int) -> None:
        """Like an engine's, but with ``n_seq_max`` and batches cut as llama-bench cuts them."""
        llama = self._llama
        params = self._context_params()
        params.n_ctx = n_ctx
        params.n_batch = n_batch
        params.n_ubatch = min(n_batch, N_UBATCH)
        params.n_seq_max = self._n_seq
        params.n_threads = params.n_threads_batch = n_threads
        self._context = llama.llama_init_from_model(self._model, params)
        if not self._context:
            raise PinferError(
                f"libllama cannot make a context for {self._n_seq} sequences, {n_ctx} tokens in all",
                "try fewer sequences (-b) or tokens (-p, -n)",
            )
        self._batch = llama.llama_batch_init(n_batch, 0, 1)

    def time_prompt(self, tokens: Sequence[int]) -> float:
        """Seconds for a prompt in batches, logits of its last token only."""
        self.clear()
        begin = time.perf_counter()
        for at in range(0, len(tokens), self.n_batch):
            piece = tokens[at : at + self.n_batch]
            is_last = at + len(piece) == len(tokens)
            self._decode_batch(piece, len(piece) - 1 if is_last else len(piece))
        self._llama.llama_synchronize(self._context)
        return time.perf_counter() - begin

    def time_decoding(self, streams: Sequence[Sequence[int]]) -> float:
        """Seconds to decode the streams side by side, a token of each at a time, with logits of all."""
        self.clear()
        llama, context, batch = self._llama, self._context, self._batch
        batch.n_tokens = len(streams)
        for s in range(len(streams)):
            batch.n_seq_id[s] = 1
            batch.seq_id[s][0] = s
            batch.logits[s] = True
        begin = time.perf_counter()
        for position, step in enumerate(zip(*streams, strict=True)):
            for s, token in enumerate(step):
                batch.token[s] = token
                batch.pos[s] = position
            status = llama.llama_decode(context, batch)
            if status != 0:
                raise PinferError(f"libllama cannot decode {len(streams)} sequences (status {status})")
            llama.llama_synchronize(context)
        return time.perf_counter() - begin

    def facts(self) -> dict[str, object]:
        """What libllama says of the model."""
        text = ctypes.create_string_buffer(256)
        self._llama.llama_model_desc(self._model, text, len(text))
        return {
            "type": text.value.decode("utf-8", errors="replace"),
            "size": self._llama.llama_model_size(self._model),
            "n_params": self._llama.llama_model_n_params(self._model),
            "n_vocab": self.n_vocab,
            "bos": self.bos,
            "has_vocabulary": self._llama.llama_vocab_type(self._vocab) != _NO_VOCABULARY,
        }


class Worker:
    """What the commands do; one method each."""

    def __init__(self) -> None:
        self._engine: BenchEngine | None = None
        self._sparse = False

    def answer(self, command: dict[str, Any]) -> object:
        """Do one command. Raises PinferError where it cannot be done."""
        name = command.pop("do")
        method = getattr(self, f"do_{name}", None)
        if method is None:
            raise PinferError(f"the worker knows no command {name!r}")
        return method(**command)

    def do_load(
        self, model: str, plugin: dict[str, Any] | None, n_threads: int, n_gpu_layers: int = 0, rpc: str | None = None
    ) -> dict[str, object]:
        """Load the model, with the plugin configured so or (``None``) without it."""
        if rpc is not None:
            remote.connect(rpc)
        config = None if plugin is None else _plugin_config(plugin)
        self._engine = BenchEngine(Path(model), plugin=config, n_threads=n_threads, n_gpu_layers=n_gpu_layers)
        self._sparse = plugin is not None
        isa = native.load_plugin().isa() if self._sparse else None
        return {**self._engine.facts(), "isa": isa, "ggml": _ggml_version(), "plugin_loaded": native.is_loaded()}

    def do_tokenize(self, text: str) -> list[int]:
        return self._loaded().tokenize(text)

    def do_open(self, n_ctx: int, n_seq: int) -> None:
        self._loaded().open_context(n_ctx, n_seq)

    def do_time(self, kind: str, streams: list[list[int]]) -> dict[str, object]:
        """Run a test once: ``pp`` is a prompt, ``tg`` is decoding; counters are of this run alone."""
        engine = self._loaded()
        if self._sparse:
            native.load_plugin().reset_stats()
        seconds = engine.time_prompt(streams[0]) if kind == "pp" else engine.time_decoding(streams)
        stats = asdict(native.load_plugin().stats()) if self._sparse else None
        digest = hashlib.sha256(json.dumps(streams).encode()).hexdigest()
        return {"seconds": seconds, "stats": stats, "tokens_sha256": digest}

    def do_usage(self) -> dict[str, object]:
        """Peak resident memory in bytes and the seconds of CPU that this process has used."""
        return {"peak": _peak_memory(), "cpu": time.process_time()}

    def do_bandwidth(self, n_threads: int, n_bytes: int) -> float:
        """Bytes per second that a matrix-vector product streams on the CPU."""
        from pinfer.llama.devices import list_devices, measure_bandwidth

        cpu = next(d for d in list_devices() if d.kind == "cpu")
        room = max(min(n_bytes, cpu.memory_free // 8), 8 << 20)
        return measure_bandwidth(cpu.name, n_threads, room, 0.0)

    def _loaded(self) -> BenchEngine:
        if self._engine is None:
            raise PinferError("the worker has no model yet")
        return self._engine


def _plugin_config(values: dict[str, Any]) -> PluginConfig:
    def file(name: str) -> Path | None:
        return Path(values[name]) if name in values else None

    return PluginConfig(
        activation=values["activation"],
        activation_threshold=values["activation_threshold"],
        predictor=file("predictor"),
        hot=[Path(path) for path in values["hot"]] or None,
        cold=file("cold"),
        device=values["device"],
    )


def _peak_memory() -> int:
    """VmHWM: the most that was resident at once, mapped files included."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def _ggml_version() -> str:
    from pinfer.llama.ggml import load_library

    base = load_library("ggml-base")
    base.ggml_version.restype = ctypes.c_char_p
    return str(base.ggml_version().decode())


def _apart_from_stdout() -> IO[str]:
    """The pipe of answers; what native code prints to stdout goes to stderr from now on."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def main() -> int:
    """Answer commands until stdin ends, which it does when the parent has gone, however it went."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both; the parent ends this process
    answers = _apart_from_stdout()
    worker = Worker()
    for line in sys.stdin:
        try:
            reply: dict[str, object] = {"ok": worker.answer(json.loads(line))}
        except PinferError as error:
            reply = {"error": error.message, "hint": error.hint}
        except MemoryError:
            reply = {"error": "out of memory", "hint": "use a smaller model, or fewer sequences and tokens"}
        answers.write(json.dumps(reply) + "\n")
        answers.flush()
    return 0


if __name__ == "__main__":
    sys.exit(main())
