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
    for i, ffn in enumerate(model.ffns):
        file = done / f"{i}.pickle"
        if not file.exists():
            fitted = fit_layer(LayerData.read(model, ffn, samples), ffn, options, kinds)
            file.with_suffix(".tmp").write_bytes(pickle.dumps(fitted))
            file.with_suffix(".tmp").replace(file)
            print(f"FFN {i + 1} of {len(model.ffns)}: {fitted[1]}", file=sys.stderr)
    target = folder / paths.PREDICTOR
    reports = []
    with PredictorWriter(target, model, options.type) as writer:
        for i in range(len(model.ffns)):
            predictor, report = pickle.loads((done / f"{i}.pickle").read_bytes())
            writer.add(predictor)
            reports.append(report)
        n_bytes = writer.finish({"command": "kit/train_layers.py", "kinds": list(kinds), "type": options.type})
    for file in done.iterdir():
        file.unlink()
    done.rmdir()
    return summary(target, samples.n_samples, n_bytes, reports).to_json()
