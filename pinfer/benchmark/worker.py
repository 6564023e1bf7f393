"""``python -m pinfer.benchmark.worker``: a worker process that measures one side of `pinfer bench`.

Each side has its own process, since a process has one plugin configuration and one memory peak. Commands arrive on
stdin and answers leave on stdout, one JSON object per line: ``{"ok": ...}`` or ``{"error": ..., "hint": ...}``.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import os
import resource
import signal
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import IO, Any

from pinfer.errors import PinferError
from pinfer.llama.cache_types import DEFAULT_CACHE
from pinfer.llama.devices import list_devices, measure_bandwidth
from pinfer.llama.engine import Engine, PluginConfig
from pinfer.llama.ggml import load_library
from pinfer.llama.plugin import load_plugin
from pinfer.llama.rpc import connect

_NO_VOCABULARY = 0  # enum llama_vocab_type


class BenchEngine(Engine):
    """An engine that opens a new context for each test, with the test's number of sequences."""

    def open_context(
        self, n_ctx: int, n_seq: int, n_batch: int, n_ubatch: int, *, flash_attention: bool = True, cb_eval: int = 0
    ) -> None:
        """A context of ``n_ctx`` tokens for each of ``n_seq`` sequences."""
        n_batch = max(n_seq, min(n_batch, n_ctx))
        n_ubatch = min(n_batch, n_ubatch)
        self._on_node = self._llama.ggml_backend_sched_eval_callback(cb_eval) if cb_eval else None
        self._open_context(n_ctx * n_seq, n_batch, n_ubatch, n_seq, flash_attention=flash_attention)
        self._texts: list[list[int]] = []

    def rewind(self, texts: Sequence[Sequence[int]]) -> None:
        """Leave each sequence with its text of ``texts`` and nothing else; no texts: leave nothing.

        Texts that are there already are kept where the model can forget what follows them. Recurrent ones cannot.
        """
        memory = self._llama.llama_get_memory(self._context)
        wanted = [list(text) for text in texts if len(text)]
        kept = wanted == self._texts and all(
            self._llama.llama_memory_seq_rm(memory, s, len(text), -1) for s, text in enumerate(wanted)
        )
        if not wanted or not kept:
            self.clear()
            for s, text in enumerate(wanted):
                for at in range(0, len(text), self.n_batch):
                    self._decode([(token, at + i, s, False) for i, token in enumerate(text[at : at + self.n_batch])])
        self._texts = wanted

    def time_prompt(self, tokens: Sequence[int], depth: int = 0) -> float:
        """Seconds to process a prompt in batches after ``depth`` tokens, with logits for its last token only."""
        begin = time.perf_counter()
        for at in range(0, len(tokens), self.n_batch):
            piece = tokens[at : at + self.n_batch]
            last = len(tokens) - 1 - at
            self._decode([(token, depth + at + i, 0, i == last) for i, token in enumerate(piece)])
        self._llama.llama_synchronize(self._context)
        return time.perf_counter() - begin

    def time_decoding(self, streams: Sequence[Sequence[int]], depth: int = 0) -> float:
        """Seconds to decode the streams in parallel: one token of each per step, with logits for all."""
        begin = time.perf_counter()
        for position, step in enumerate(zip(*streams, strict=True), depth):
            self._decode([(token, position, s, True) for s, token in enumerate(step)])
            self._llama.llama_synchronize(self._context)
        return time.perf_counter() - begin

    def _decode(self, rows: Sequence[tuple[int, int, int, bool]]) -> None:
        """One batch of (token, position, sequence, whether its logits are wanted)."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence, logits) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, logits
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        status = self._llama.llama_decode(self._context, batch)
        if status != 0:
            raise PinferError(f"libllama cannot decode a batch of {len(rows)} tokens (status {status})")

    def facts(self) -> dict[str, object]:
        """What libllama reports about the model."""
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
    """The commands, one ``do_`` method each."""

    def __init__(self) -> None:
        self._engine: BenchEngine | None = None
        self._sparse = False

    def answer(self, command: dict[str, Any]) -> object:
        """Run one command. Raises PinferError if it fails."""
        name = command.pop("do")
        method = getattr(self, f"do_{name}", None)
        if method is None:
            raise PinferError(f"unknown worker command {name!r}")
        return method(**command)

    def do_load(
        self,
        model: str,
        plugin: dict[str, Any] | None,
        n_threads: int,
        n_gpu_layers: int = 0,
        cache_types: Sequence[str] = DEFAULT_CACHE,
        rpc: str | None = None,
    ) -> dict[str, object]:
        """Load the model with this plugin configuration, or without the plugin (``None``)."""
        if rpc is not None:
            connect(rpc)
        config = None if plugin is None else _plugin_config(plugin)
        self._engine = BenchEngine(
            Path(model),
            plugin=config,
            n_ctx=32,
            n_batch=32,
            n_threads=n_threads,
            n_gpu_layers=n_gpu_layers,
            cache_types=(cache_types[0], cache_types[1]),
        )
        self._sparse = plugin is not None
        isa = load_plugin().isa() if self._sparse else ""
        return {**self._engine.facts(), "isa": isa, "ggml": load_library("ggml-base").ggml_version().decode()}

    def do_tokenize(self, text: str) -> list[int]:
        return self._loaded().tokenize(text)

    def do_open(
        self,
        n_ctx: int,
        n_seq: int,
        n_batch: int = 2048,
        n_ubatch: int = 512,
        flash_attention: bool = True,
        by_node: bool = False,
    ) -> None:
        cb_eval = load_plugin().steps_eval if by_node else 0
        self._loaded().open_context(n_ctx, n_seq, n_batch, n_ubatch, flash_attention=flash_attention, cb_eval=cb_eval)

    def do_time(self, kind: str, streams: list[list[int]], texts: Sequence[list[int]] = ()) -> dict[str, object]:
        """Run a test once (``pp``: a prompt, ``tg``: decoding) with counters that start at zero.

        ``texts`` are what the sequences hold before; the time to compute them does not count.
        """
        engine = self._loaded()
        engine.rewind(texts)
        if self._sparse:
            load_plugin().reset_stats()
        depth = len(texts[0]) if texts else 0
        seconds = engine.time_prompt(streams[0], depth) if kind == "pp" else engine.time_decoding(streams, depth)
        stats = asdict(load_plugin().stats()) if self._sparse else None
        digest = hashlib.sha256(json.dumps(streams).encode()).hexdigest()
        return {"seconds": seconds, "stats": stats, "tokens_sha256": digest}

    def do_steps(self, streams: list[list[int]], texts: Sequence[list[int]] = ()) -> dict[str, object]:
        """Decode as ``do_time`` does, with the seconds of each step and the page faults."""
        self._loaded().rewind(texts)
        before = resource.getrusage(resource.RUSAGE_SELF)
        load_plugin().start_steps()
        seconds = self._loaded().time_decoding(streams, len(texts[0]) if texts else 0)
        steps = load_plugin().steps()
        after = resource.getrusage(resource.RUSAGE_SELF)
        faults = after.ru_minflt + after.ru_majflt - before.ru_minflt - before.ru_majflt
        return {"seconds": seconds, "steps": steps, "faults": faults}

    def do_usage(self) -> dict[str, object]:
        """Peak resident memory in bytes and CPU time in seconds of this process."""
        return {"peak": _peak_memory(), "cpu": time.process_time()}

    def do_bandwidth(self, n_threads: int, n_bytes: int) -> float:
        """Bytes per second that a matrix-vector product streams on the CPU."""
        cpu = next(d for d in list_devices() if d.kind == "cpu")
        room = max(min(n_bytes, cpu.memory_free // 8), 8 << 20)
        return measure_bandwidth(cpu.name, n_threads, room, 0.0)

    def _loaded(self) -> BenchEngine:
        if self._engine is None:
            raise PinferError("the worker has not loaded a model")
        return self._engine


def _plugin_config(values: dict[str, Any]) -> PluginConfig:
    """The fields of a `PluginConfig`, whose paths JSON has made strings."""
    files = {name: Path(values[name]) for name in ("predictor", "cold") if values[name] is not None}
    return PluginConfig(**values | files | {"hot": [Path(path) for path in values["hot"] or ()] or None})


def _peak_memory() -> int:
    """VmHWM: peak resident memory, mapped files included."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM:"):
            return int(line.split()[1]) * 1024
    return 0


def _apart_from_stdout() -> IO[str]:
    """A stream for the answers. Native code that prints to stdout writes to stderr from now on."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return answers


def main() -> int:
    """Answer commands until stdin closes, as it does when the parent ends for any reason."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches both processes; the parent ends this one
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
