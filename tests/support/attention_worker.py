"""``python attention_worker.py OUT.npy``: logits of a model at depth, for tests/test_attention.py.

PINFER_ATTENTION is read once, when the plugin is loaded, so each setting needs a process. stdin is JSON: {"model":
path, "plugin": whether to load it, "cache": [type of K, type of V], "prompts": [tokens of each sequence], "steps":
[tokens of all sequences, for each step], "unified": whether the sequences share one cache}. Written are the logits of
all steps, [step, sequence, vocabulary].
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pinfer.errors import PinferError
from pinfer.llama.engine import Engine, PluginConfig
from pinfer.model import open_model


class Sequences(Engine):
    """An engine of several sequences."""

    def open(self, n_ctx: int, n_batch: int, n_seq: int, *, unified: bool) -> None:
        default = self._llama.llama_context_default_params

        def chosen() -> object:
            params = default()
            params.kv_unified = unified
            return params

        setattr(self._llama, default.__name__, chosen)
        self._open_context(n_ctx, n_batch, n_seq=n_seq)

    def add(self, rows: Sequence[tuple[int, int, int]]) -> NDArray[np.float32]:
        """Append (token, position, sequence) rows; the logits of all of them."""
        batch = self._batch
        batch.n_tokens = len(rows)
        for i, (token, position, sequence) in enumerate(rows):
            batch.token[i], batch.pos[i], batch.logits[i] = token, position, True
            batch.n_seq_id[i], batch.seq_id[i][0] = 1, sequence
        if self._llama.llama_decode(self._context, batch) != 0:
            raise PinferError("cannot decode")
        pointer = self._llama.llama_get_logits(self._context)
        return np.ctypeslib.as_array(pointer, shape=(len(rows), self.n_vocab)).copy()


def main() -> None:
    wanted = json.load(sys.stdin)
    path, prompts = Path(wanted["model"]), wanted["prompts"]
    config = PluginConfig.of(open_model(path)) if wanted["plugin"] else None
    cache = (wanted["cache"][0], wanted["cache"][1])
    with Sequences(path, plugin=config, n_ctx=64, n_threads=2, cache_types=cache) as engine:
        room = max(map(len, prompts)) + len(wanted["steps"])
        engine.open(room * len(prompts), 256, len(prompts), unified=wanted["unified"])
        for s, prompt in enumerate(prompts):
            for begin in range(0, len(prompt), 256):
                engine.add([(t, begin + i, s) for i, t in enumerate(prompt[begin : begin + 256])])
        steps = [
            engine.add([(t, len(prompts[s]) + i, s) for s, t in enumerate(step)])
            for i, step in enumerate(wanted["steps"])
        ]
    np.save(sys.argv[1], np.stack(steps))


if __name__ == "__main__":
    main()
