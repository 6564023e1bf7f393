"""`pinfer train`, layer by layer and resumable: training the widest models can take longer than LIMIT allows.

Finished layers are kept as files beside the model. From the width WIDE on, only low-rank predictors are tried; the
other kinds take minutes a layer there.
"""

from __future__ import annotations

import pickle
import sys
from pathlib import Path

from pinfer.artefacts import paths
from pinfer.artefacts.predictor import PredictorWriter
from pinfer.artefacts.profile import SamplesFile
from pinfer.model import open_model
from pinfer.predictors.data import LayerData
from pinfer.predictors.fitting import KINDS, TrainOptions, fit_layer, summary

WIDE = 3072


def train_layers(path: Path) -> dict[str, object]:
    """Writes predictor.gguf and returns the report of `pinfer train`."""
    model = open_model(path, None)
    options = TrainOptions()
    folder = paths.artefact_dir(model.path, model.fingerprint, for_writing=True)
    samples = SamplesFile.read(folder / paths.SAMPLES, model)
    done = folder / "trained"
    done.mkdir(exist_ok=True)
    kinds = KINDS if model.n_embd < WIDE else ("low_rank",)
    for layer in range(model.n_layer):
        file = done / f"{layer}.pickle"
        if not file.exists():
            fitted = fit_layer(LayerData.read(model, layer, samples), layer, options, kinds)
            file.with_suffix(".tmp").write_bytes(pickle.dumps(fitted))
            file.with_suffix(".tmp").replace(file)
            print(f"layer {layer + 1} of {model.n_layer}: {fitted[1]}", file=sys.stderr)
    target = folder / paths.PREDICTOR
    reports = []
    with PredictorWriter(target, options.type) as writer:
        for layer in range(model.n_layer):
            predictor, report = pickle.loads((done / f"{layer}.pickle").read_bytes())
            writer.add(predictor)
            reports.append(report)
        n_bytes = writer.finish(model, {"command": "kit/train_layers.py", "kinds": list(kinds), "type": options.type})
    for file in done.iterdir():
        file.unlink()
    done.rmdir()
    return summary(target, samples.n_samples, n_bytes, reports).to_json()
