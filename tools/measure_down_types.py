"""Measures what each type of the requantised down rows costs and saves: prints the table of docs/shards.md.

``python tools/measure_down_types.py models/tiny-relu2.gguf --text heldout.txt`` takes several minutes. The text must
not be part of the model's training data.
"""

from __future__ import annotations

import argparse
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

# libgomp reads this when it is loaded. Threads that spin while waiting make a busy machine ten times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")


from pinfer.artefacts.shards import cold_neuron_bytes, down_types
from pinfer.errors import PinferError
from pinfer.eval import EvalOptions, evaluate
from pinfer.model import open_model
from pinfer.profile import ProfileOptions, profile
from pinfer.split import SplitOptions, split

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from support.quantised import quantise

MODEL_TYPES = ("F16", "Q8_0", "Q4_K", "Q4_0")
DOWN_TYPES = ("F16", "Q8_0", "Q6_K", "Q5_K", "Q4_K", "Q4_0")
BOUNDS = ("auto", "1e-3", "2e-3", "4e-3")


@contextmanager
def as_type(model_path: Path, model_type: str) -> Iterator[Path]:
    """A copy of an F16 model in this type, in a folder of its own."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, model_path.name)
        if model_type == "F16":
            shutil.copy(model_path, path)
        else:
            quantise(model_path, model_type, path)
        yield path


def measure_bounds(model_path: Path, text: Path, n_tokens: int) -> None:
    """Prints one line per model type and bound: the down types chosen by layer, and what they save."""
    print("| model type | bound | KL mean | bytes of the down rows of a token, with Q8_0 | with these types | types |")
    print("|---|---:|---:|---:|---:|---|")
    for model_type in MODEL_TYPES:
        with as_type(model_path, model_type) as path:
            profile(path, ProfileOptions(str(text), n_tokens))
            for bound in BOUNDS:
                try:
                    found = split(path, SplitOptions(down_kl=bound, text=text, n_tokens=n_tokens)).down_choice
                except PinferError:
                    continue  # Q8_0 costs more
                assert found is not None, "asked for"
                print(
                    f"| {model_type} | {found.bound:.1e} | {found.divergence:.1e} | {found.row_bytes_q8:.0f} "
                    f"| {found.row_bytes / found.row_bytes_q8:.0%} | {' '.join(found.types)} |",
                    flush=True,
                )


def measure(model_path: Path, text: Path, n_tokens: int, n_threads: int) -> None:
    """Prints one line per model type and down type, comparing the cold shard in exact mode with dense libllama."""
    print("| model type | down type | bytes of a neuron | perplexity dense | sparse | KL mean | KL p99 | top-1 |")
    print("|---|---|---:|---:|---:|---:|---:|---:|")
    for model_type in MODEL_TYPES:
        with as_type(model_path, model_type) as path:
            model = open_model(path)
            for down_type in DOWN_TYPES:
                split(path, SplitOptions(down_type=down_type))
                options = EvalOptions(text=text, n_tokens=n_tokens, exact=True, n_threads=n_threads)
                found = evaluate(path, options)
                n_bytes = cold_neuron_bytes(model.ffns[0], down_types(model.ffns[0], down_type))
                print(
                    f"| {model_type} | {down_type} | {n_bytes} "
                    f"| {found.perplexity_dense:.2f} | {found.perplexity_sparse:.2f} "
                    f"| {found.kl_mean:.1e} | {found.kl_p99:.1e} | {100 * found.top1_agreement:.1f} % |",
                    flush=True,
                )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("model", type=Path)
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--by-layer", action="store_true", help="measure what `pinfer split --down-kl` chooses instead")
    arguments = parser.parse_args()
    if arguments.by_layer:
        measure_bounds(arguments.model, arguments.text, arguments.tokens)
    else:
        measure(arguments.model, arguments.text, arguments.tokens, arguments.threads)
