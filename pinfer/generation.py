"""Text from a model in Python.

from pinfer import Model, prepare

prepare("model.gguf")  # once: profile, predictor, placement, shards
with Model("model.gguf") as model:
    print(model.generate("Once upon a time", n_tokens=64))
    for piece in model.stream("Once upon a time", temperature=0.8, seed=1):
        print(piece, end="", flush=True)
"""

from __future__ import annotations

import codecs
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Self

from pinfer.execution import Execution, ExecutionOptions, decide
from pinfer.llama.engine import Engine
from pinfer.llama.plugin import Stats, load_plugin
from pinfer.model import open_model

_DEFAULTS = ExecutionOptions()


class Model:
    """A loaded model, computed as ``pinfer run`` would: with the artefacts there are, on their devices.

    A context manager. Raises PinferError where the command would print an error.
    """

    def __init__(self, path: str | Path, options: ExecutionOptions = _DEFAULTS) -> None:
        self.execution: Execution = decide(open_model(Path(path), options.activation), options)
        """mode, artefacts, devices, layers, context and threads in use"""
        self._engine = Engine(
            self.execution.model.path,
            plugin=self.execution.plugin,
            n_ctx=self.execution.n_ctx,
            n_threads=self.execution.n_threads,
            n_gpu_layers=self.execution.n_gpu_layers,
            cache_types=self.execution.cache_types,
        )

    def generate(self, prompt: str, n_tokens: int = 128, *, temperature: float = 0.0, seed: int = 0) -> str:
        """The continuation of ``prompt``: at most ``n_tokens`` tokens, fewer if the model ends. 0 is greedy."""
        return "".join(self.stream(prompt, n_tokens, temperature=temperature, seed=seed))

    def stream(self, prompt: str, n_tokens: int = 128, *, temperature: float = 0.0, seed: int = 0) -> Iterator[str]:
        """The same, piece by piece as it is generated. The same seed gives the same text."""
        decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")
        tokens = self._engine.tokenize(prompt)
        for token in self._engine.sample(tokens, n_tokens, temperature=temperature, seed=seed):
            if piece := decoder.decode(self._engine.piece(token)):
                yield piece
        if rest := decoder.decode(b"", final=True):
            yield rest

    def stats(self) -> Stats | None:
        """What the plugin has computed for this model so far; None for stock libllama."""
        is_ours = self.execution.plugin is not None
        return load_plugin().stats(self.execution.model.path) if is_ours else None

    def close(self) -> None:
        """Free the model and its devices."""
        self._engine.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: Any) -> None:
        self.close()


def generate(path: str | Path, prompt: str, n_tokens: int = 128, *, temperature: float = 0.0, seed: int = 0) -> str:
    """Load a model, continue ``prompt``, and free the model."""
    with Model(path) as model:
        return model.generate(prompt, n_tokens, temperature=temperature, seed=seed)
