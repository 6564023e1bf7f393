"""Writes tests/checkpoints, tiny random checkpoints of every model family, or checks that their results still hold.

    python tools/make_checkpoints.py --check [CASE ...]    a fresh forward pass against the recorded results
    python tools/make_checkpoints.py --write [CASE ...]    new weights, tokenizers and results

Needs torch, transformers and sentencepiece. The weights are drawn, written by transformers' own `save_pretrained` and
read again for the results, so these are what the original says of the stored, rounded weights, in float32.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers
from numpy.typing import NDArray

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "tests"))

from support.checkpoint_cases import CASES, VOCAB, Case
from support.checkpoint_models import load_original, original_of
from support.checkpoint_tokenizers import TOKENIZERS

FOLDER = Path(__file__).resolve().parent.parent / "tests" / "checkpoints"
N_GREEDY = 16
PROMPT_LENGTHS = (12, 17, 24)
# A greedy step is only worth recording where no rounding can turn it: the gap between the two best, in units of the
# logits' standard deviation. 0.01 leaves room for half-precision arithmetic.
MIN_GAP = 0.01
# Different ids in a continuation: one that repeats itself tells little.
MIN_VARIED = 8
# NMSE of the logits when a tensor is left out.
MIN_EFFECT = 1e-4
# Between two machines, or two releases of torch.
MAX_NMSE = 1e-9


@dataclass(frozen=True)
class Results:
    """What reference.npz holds: for prompt i its ids `[n]`, logits `[n, VOCAB]`, and the greedy ids that follow."""

    prompts: tuple[NDArray[np.int32], ...]
    logits: tuple[NDArray[np.float32], ...]
    greedy: tuple[NDArray[np.int32], ...]

    def save(self, path: Path) -> None:
        arrays: dict[str, Any] = {}
        for i, (prompt, logits, greedy) in enumerate(zip(self.prompts, self.logits, self.greedy, strict=True)):
            arrays |= {f"prompt_{i}": prompt, f"logits_{i}": logits, f"greedy_{i}": greedy}
        np.savez_compressed(path, **arrays)

    @staticmethod
    def load(path: Path) -> Results:
        with np.load(path) as file:
            n = sum(name.startswith("prompt_") for name in file.files)
            return Results(*(tuple(file[f"{part}_{i}"] for i in range(n)) for part in ("prompt", "logits", "greedy")))


def logits_of(model: Any, ids: NDArray[np.int32]) -> NDArray[np.float32]:
    """Logits at every position, ``[n, VOCAB]``."""
    with torch.no_grad():
        made = model(input_ids=torch.from_numpy(ids.astype(np.int64))[None], use_cache=False).logits[0]
    return np.asarray(made.numpy(), np.float32)


def nmse(made: NDArray[np.float32], expected: NDArray[np.float32]) -> float:
    """Squared error over squared value."""
    difference = made.astype(np.float64) - expected
    return float((difference**2).sum() / (expected.astype(np.float64) ** 2).sum())


def prompts_of(case: Case) -> tuple[NDArray[np.int32], ...]:
    """Random ids; the first prompt begins with id 0 and contains the last id, the second begins like a text."""
    rng = np.random.default_rng(case.seed + 1000)
    prompts = [rng.integers(0, VOCAB, n).astype(np.int32) for n in PROMPT_LENGTHS]
    prompts[0][[0, 5]] = 0, VOCAB - 1
    prompts[1][0] = case.config.get("bos_token_id", 1)
    # The same id at several places: only its position tells them apart.
    prompts[2][[3, 11, 20]] = prompts[2][3]
    return tuple(prompts)


def results_of(model: Any, prompts: tuple[NDArray[np.int32], ...]) -> tuple[Results, float]:
    """The results, and the smallest gap between the two best ids of a greedy step."""
    gap = np.inf
    continuations = []
    for prompt in prompts:
        ids = prompt
        for _ in range(N_GREEDY):
            last = logits_of(model, ids)[-1]
            second, first = np.argsort(last)[-2:]
            gap = min(gap, float(last[first] - last[second]) / float(last.std()))
            ids = np.append(ids, np.int32(first))
        continuations.append(ids[len(prompt) :])
    logits = tuple(logits_of(model, prompt) for prompt in prompts)
    return Results(prompts, logits, tuple(continuations)), gap


def draw(model: Any, case: Case, seed: int) -> None:
    """Weights that all have an effect: attention that is not uniform, norms other than 1, biases other than 0."""
    generator = torch.Generator().manual_seed(seed)
    # Nemotron's norms add the 1 themselves.
    offset = 0.0 if case.config.get("model_type") == "nemotron" else 1.0
    for name, weight in model.named_parameters():
        values = torch.randn(weight.shape, generator=generator)
        if weight.ndim == 1:
            values = 0.3 * values + (offset if name.endswith("weight") else 0.0)
        elif "embed" in name:
            values = case.embedding_std * values
        else:
            gain = 2.0 if any(part in name for part in ("q_proj", "k_proj", "query_key_value")) else 1.2
            values = gain * values / weight.shape[-1 if "experts." in name else 1] ** 0.5
            values *= case.gate_scale if "gate_proj" in name else 1 / case.gate_scale if "up_proj" in name else 1.0
        weight.data = values.to(weight.dtype)
    for name, bias in model.named_buffers():
        if name.endswith("e_score_correction_bias"):  # of the router, about as large as its scores differ
            bias.data = (0.1 * torch.randn(bias.shape, generator=generator)).to(bias.dtype)


def _save_bin(model: Any, folder: Path, case: Case) -> None:
    state = {name: tensor.clone().contiguous() for name, tensor in model.state_dict().items()}
    if case.config.get("tie_word_embeddings", True):
        state.pop("lm_head.weight", None)
    for tensor in state.values():
        if case.attributes:
            tensor.tensor_model_parallel = False
    names = sorted(state)
    n_shards = case.n_shards
    if n_shards == 1:
        torch.save(state, folder / "pytorch_model.bin")
        return
    files = [f"pytorch_model-{i + 1:05}-of-{n_shards:05}.bin" for i in range(n_shards)]
    weight_map = {name: files[i * n_shards // len(names)] for i, name in enumerate(names)}
    for file in files:
        torch.save({name: state[name] for name in names if weight_map[name] == file}, folder / file)
    n_bytes = sum(tensor.nbytes for tensor in state.values())
    index = {"metadata": {"total_size": n_bytes}, "weight_map": weight_map}
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps(index, indent=2) + "\n")


def save_model(case: Case, folder: Path, seed: int) -> None:
    """Stores a random model as the case asks, with config.json as published."""
    model = original_of(case.config, case.original).new()
    draw(model, case, seed)
    model = model.to(getattr(torch, case.dtype))
    saved = model if case.prefix else model.base_model
    if case.files == "bin":
        _save_bin(saved, folder, case)
    else:
        n_bytes = sum(weight.nbytes for weight in model.parameters())
        saved.save_pretrained(folder, max_shard_size=n_bytes if case.n_shards == 1 else n_bytes // case.n_shards + 8192)
    (folder / "generation_config.json").unlink(missing_ok=True)
    (folder / "config.json").write_text(json.dumps(case.config, indent=2) + "\n")
    for path in folder.iterdir():
        path.chmod(0o644)


def _idle(model: Any, results: Results) -> Iterator[str]:
    """Names of weights that do not affect the logits."""
    expected = np.concatenate(results.logits)
    for name, weight in model.named_parameters():
        kept = weight.data.clone()
        # A norm forgotten is a norm of ones (zeros where one is added); anything else forgotten is zero.
        weight.data.fill_(1.0 if weight.ndim == 1 and name.endswith("weight") and kept.mean() > 0.5 else 0.0)
        # A bias of the keys adds the same to every score of a query, unless positions rotate the keys.
        if not (name.endswith("k_proj.bias") and model.config.model_type == "opt"):
            effect = nmse(np.concatenate([logits_of(model, prompt) for prompt in results.prompts]), expected)
            if effect < MIN_EFFECT:
                yield f"{name} ({effect:.1e})"
        weight.data.copy_(kept)


def write(case: Case) -> str:
    """Makes one folder again; returns a line about it."""
    folder = FOLDER / case.name
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if case.refused:
        (folder / "config.json").write_text(json.dumps(case.config, indent=2) + "\n")
        return f"{case.name}: config.json only"
    TOKENIZERS[case.tokenizer](folder)
    for seed in range(case.seed, case.seed + 400):
        save_model(case, folder, seed)
        model = load_original(folder, case.config, case.original)
        results, gap = results_of(model, prompts_of(case))
        varied = min(len(set(ids.tolist())) for ids in results.greedy)
        if gap < MIN_GAP or varied < MIN_VARIED:
            continue
        idle = list(_idle(model, results))
        if idle:
            raise RuntimeError(f"{case.name}: these weights do not matter: {', '.join(idle)}")
        results.save(folder / "reference.npz")
        size = sum(path.stat().st_size for path in folder.iterdir())
        return f"{case.name}: seed {seed}, smallest gap {gap:.3f}, {varied} ids, {size / 1000:.0f} kB"
    raise RuntimeError(f"{case.name}: no seed keeps the greedy ids apart")


def check(case: Case) -> str:
    """Compares one folder's results with a fresh forward pass; returns a line about it."""
    folder = FOLDER / case.name
    config = json.loads((folder / "config.json").read_text())
    if config != json.loads(json.dumps(case.config)):
        raise RuntimeError(f"{case.name}: config.json is not that of checkpoint_cases.py")
    if case.refused:
        return f"{case.name}: config.json only"
    recorded = Results.load(folder / "reference.npz")
    results, _ = results_of(load_original(folder, config, case.original), recorded.prompts)
    error = max(nmse(made, kept) for made, kept in zip(results.logits, recorded.logits, strict=True))
    same = all(np.array_equal(made, kept) for made, kept in zip(results.greedy, recorded.greedy, strict=True))
    if error > MAX_NMSE or not same:
        raise RuntimeError(f"{case.name}: NMSE {error:.1e}, greedy ids {'the same' if same else 'others'}")
    return f"{case.name}: NMSE {error:.1e}"


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description="Write or check the tiny checkpoints in tests/checkpoints.")
    what = parser.add_mutually_exclusive_group(required=True)
    what.add_argument(
        "--check", dest="act", action="store_const", const=check, help="compare with a fresh forward pass"
    )
    what.add_argument("--write", dest="act", action="store_const", const=write, help="make them anew")
    parser.add_argument("case", nargs="*", help="some cases only")
    arguments = parser.parse_args()
    known = {case.name: case for case in CASES}
    if unknown := set(arguments.case) - set(known):
        parser.error(f"no such case: {', '.join(sorted(unknown))}; there are {', '.join(known)}")
    transformers.utils.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    torch.set_num_threads(1)
    failed = 0
    for name in arguments.case or known:
        try:
            print(arguments.act(known[name]), flush=True)
        except RuntimeError as error:
            failed += 1
            print(error, file=sys.stderr)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
