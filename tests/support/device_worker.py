"""``python device_worker.py``: runs models on devices in its own process, for tests/test_devices.py.

A device that was registered stays for the life of its process, and may end it: nothing for the tests' own. stdin is
JSON: {"rpc": endpoints or null, "models": [{"path", "activation", "hot": [paths], "cold" (or null), "device",
"pieces": [[tokens, n_batch, n_batch_dense], ...], "f32_attention", "n_gpu_layers" (both may be missing)}]}, where a
piece is tokens decoded n_batch at a time. The logits of all pieces go to the .npy file named last on the command line,
one array under the other; stdout has the
plugin's counters of each model.
"""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from pinfer.llama import plugin as native
from pinfer.llama import rpc
from pinfer.llama.engine import Engine, PluginConfig


def run_model(wanted: dict[str, Any]) -> tuple[list[Any], dict[str, Any]]:
    hot, cold = [Path(path) for path in wanted["hot"]], Path(wanted["cold"]) if wanted["cold"] else None
    plugin = PluginConfig(wanted["activation"], hot=hot, cold=cold, device=wanted["device"])
    logits, stats = [], {}
    for n_batch_dense in sorted({piece[2] for piece in wanted["pieces"]}):
        config = replace(plugin, n_batch_dense=n_batch_dense)
        f32 = bool(wanted.get("f32_attention"))
        layers = int(wanted.get("n_gpu_layers", 0))
        with Engine(
            Path(wanted["path"]), plugin=config, n_ctx=512, n_threads=1, f32_attention=f32, n_gpu_layers=layers
        ) as engine:
            for tokens, n_batch, _ in (piece for piece in wanted["pieces"] if piece[2] == n_batch_dense):
                engine.clear()
                for begin in range(0, len(tokens), n_batch):
                    logits.append(engine.decode(tokens[begin : begin + n_batch], logits=True))
            stats = asdict(native.load_plugin().stats())
    return logits, stats


def main() -> None:
    wanted = json.load(sys.stdin)
    if wanted["rpc"] is not None:
        rpc.connect(wanted["rpc"])
    logits, stats = [], []
    for model in wanted["models"]:
        rows, counted = run_model(model)
        logits += rows
        stats.append(counted)
    np.save(sys.argv[1], np.concatenate(logits))
    print(json.dumps(stats))


if __name__ == "__main__":
    main()
