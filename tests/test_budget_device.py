"""The budget on a device with memory of its own: what is estimated for one, and what libllama counts when asked.

The device is an RPC server on loopback. Devices stay in the process they were added to, so a child asks.
"""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.rpc_server import RpcServer
from support.small_model import write_profile

from models.synth import SynthOptions, write_model
from pinfer.artefacts import paths
from pinfer.artefacts.placement import PlacementFile
from pinfer.model import open_model

MIB = 1 << 20
ROOT = Path(__file__).resolve().parent.parent

_COUNT = """
import json, sys
from pathlib import Path
from pinfer.llama import rpc as remote
from pinfer.placement.model_bytes import compute_bytes
from pinfer.placement.compute_buffers import Layout, count_compute_bytes
from pinfer.model import open_model

remote.connect(sys.argv[1])
rows = []
for path in map(Path, sys.argv[2:]):
    model = open_model(path)
    for n_gpu_layers in (0, 1, 2, model.n_layer + 1):
        for n_ctx, n_batch in ((256, 64), (2048, 512), (8192, 512), (4096, 32)):
            counted = count_compute_bytes(model, "RPC0", Layout(n_gpu_layers, n_ctx, n_batch, ("f16", "f16")))
            rows.append([path.name, n_gpu_layers, n_ctx, n_batch, counted, compute_bytes(model, n_ctx, n_batch)])
print(json.dumps(rows))
"""

_SOLVE = """
import json, sys
from pathlib import Path
from pinfer.llama import rpc as remote
from pinfer.solve import SolveOptions, solve

remote.connect(sys.argv[1])
reports = []
for vram in map(json.loads, sys.argv[3:]):
    device = "RPC0,CPU" if isinstance(vram, list) else "RPC0"
    reports.append(solve(Path(sys.argv[2]), SolveOptions(vram=vram, n_ctx=256, n_ubatch=64, device=device)).to_json())
print(json.dumps(reports))
"""


def _ask(script: str, *words: str) -> Any:
    command = [sys.executable, "-c", script, *words]
    done = subprocess.run(command, capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture
def large_vocabulary(tmp_path: Path) -> Path:
    """Of which the logits would be most of a buffer, were they those of more than one token."""
    path = tmp_path / "vocabulary.gguf"
    write_model(path, SynthOptions(n_vocab=32000))
    return path


def test_the_estimate_is_an_upper_bound_of_the_count(
    tiny_relu2: Path, tiny_reglu: Path, synthetic: Path, large_vocabulary: Path
) -> None:
    models = [str(path) for path in (tiny_relu2, tiny_reglu, synthetic, large_vocabulary)]
    with RpcServer() as server:
        rows = _ask(_COUNT, server.endpoint, *models)
    assert len(rows) == len(models) * 16
    for name, n_gpu_layers, n_ctx, n_batch, counted, estimated in rows:
        where = (name, n_gpu_layers, n_ctx, n_batch)
        if n_gpu_layers == 0:
            assert counted == 0, where  # or a budget of hot neurons alone would not hold
            continue
        assert counted <= estimated, where
        # Small models have much of what does not grow; the output alone needs no mask.
        if n_gpu_layers > 1:
            assert estimated < 1.25 * counted + 512 * 1024, (where, counted, estimated)
        if name == "vocabulary.gguf":
            assert max(estimated, counted) < 4 * 32000 * n_batch, where


def test_a_placement_is_made_from_what_the_device_is_asked(tiny_reglu: Path) -> None:
    model = open_model(tiny_reglu)
    folder = paths.artefact_dir(model.path, model.fingerprint, for_writing=True)
    write_profile(folder / paths.PROFILE, model)
    budgets: list[int | list[int]] = [0, MIB, 4 * MIB, 8 * MIB, 64 * MIB, [4 * MIB, 2 * MIB]]
    with RpcServer() as server:
        reports = _ask(_SOLVE, server.endpoint, str(tiny_reglu), *map(json.dumps, budgets))
        (row,) = [r for r in _ask(_COUNT, server.endpoint, str(tiny_reglu)) if r[1:4] == [model.n_layer + 1, 256, 64]]
    layers = [report["n_gpu_layers"] for report in reports[:5]]
    assert layers[0] == layers[1] == 0
    assert layers == sorted(layers)
    assert layers[-1] == model.n_layer + 1
    for vram, report in zip(budgets, reports, strict=True):
        assert sum(report["n_bytes"].values()) <= report["vram"] == (sum(vram) if isinstance(vram, list) else vram)
    assert reports[4]["n_bytes"]["compute_buffers"] == row[4]
    # The last one is of two devices: dense layers on the first, hot neurons of the CPU within its own budget.
    first, second = reports[-1]["devices"]
    assert (first["name"], second["name"], second["n_bytes"]["dense_weights"]) == ("RPC0", "CPU", 0)
    assert sum(second["n_hot"]) > 0
    assert sum(second["n_bytes"].values()) <= 2 * MIB
    assert PlacementFile.read(folder / paths.PLACEMENT, model).device == "RPC0,CPU"
