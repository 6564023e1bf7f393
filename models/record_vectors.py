"""Records what PyTorch computes for a shipped model, so that tests can compare with it without PyTorch.

Writes ``tests/vectors/NAME.npz``: tokenizer ids of sample strings, logits of prompts, greedy continuations and how
often every neuron fires on a held-out text. For a mixture also: how often every expert is chosen and its neurons fire,
and the text's perplexity. Example: ``python models/record_vectors.py models/tiny-reglu.gguf
--tokenizer work/tokenizer.json --text heldout.txt.xz --out tests/vectors/tiny-reglu.npz``.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from numpy.typing import NDArray
from tiny_mixture import MixtureOutput, TinyMixture, read_model
from tiny_model import Output, TinyModel
from tiny_text import END_OF_TEXT, encode_documents, is_held_out, read_documents

N_PREDICT = 128
N_PROMPTS = 4

SAMPLES = (
    "Once upon a time, there was a little girl named Lily.",
    "He said, \"I can't do that!\" and she didn't answer.",
    "  two spaces, a\ttab and\nnew lines\n\n\nthree of them   ",
    "Numbers 1 22 333 4444 and 3.14, 50% of $100; e-mail: a_b@c.org",
    "Accents é ü ñ, dashes – —, a snowman ☃ and 日本語, emoji 🙂.",
    "CAPITALS MixedCase camelCase snake_case we're they'll I'VE",
    "",
    "x",
)

PROMPTS = (
    "Once upon a time, there was a little girl named",
    "Once upon a time, there was a big dog",
    "One day, a boy named Tim went to the park",
    "Lily and her mom went to the",
    "The little bird wanted to",
    "Tom found a red ball in the",
    "There was a cat who lived in a",
    "The sun was shining and the children",
    "A frog and a fish were friends. They",
    "Sara was sad because",
    "Ben liked to play with his toy car.",
    "In the forest there was an old tree",
    "The king said to the",
    'Mom said, "Do not',
    "It was a cold day and the",
    "One morning, the rabbit",
)


def greedy(net: TinyModel | TinyMixture, prompt: list[int]) -> tuple[list[int], float]:
    """The N_PREDICT tokens of greedy decoding, and the smallest lead of a chosen token over the second best."""
    tokens, lead = list(prompt), float("inf")
    for _ in range(N_PREDICT):
        best = net(torch.tensor([tokens])).logits[0, -1].topk(2)
        lead = min(lead, float(best.values[0] - best.values[1]))
        tokens.append(int(best.indices[0]))
    return tokens[len(prompt) :], lead


def main(
    model: Annotated[Path, typer.Argument(help="GGUF written by train_tiny.py")],
    tokenizer: Annotated[Path, typer.Option(help="tokenizer.json of the training")],
    text: Annotated[Path, typer.Option(help="held-out text on which firing is counted")],
    out: Annotated[Path, typer.Option(help="file to write")],
    held_out: Annotated[float, typer.Option(help="use only this held-out share of the documents; 0: all")] = 0.0,
    n_tokens: Annotated[int, typer.Option(help="tokens to count on")] = 2048,
) -> None:
    """Record one model."""
    from tokenizers import Tokenizer

    torch.set_grad_enabled(False)
    torch.set_num_threads(1)  # a model this small is slower with more
    net = read_model(model).eval()
    vocabulary = Tokenizer.from_file(str(tokenizer))
    arrays: dict[str, NDArray[Any]] = {}

    ids = [vocabulary.encode(sample).ids for sample in SAMPLES]
    arrays["sample_text"] = np.frombuffer("\0".join(SAMPLES).encode(), np.uint8)
    arrays["sample_ids"] = np.concatenate([np.asarray(i, np.int32) for i in ids])
    arrays["sample_lengths"] = np.asarray([len(i) for i in ids], np.int32)

    # Prompts with a near-tie in any step are left out: other rounding could choose the other token.
    prompts = [[END_OF_TEXT, *vocabulary.encode(prompt).ids] for prompt in PROMPTS]
    continuations = [greedy(net, prompt) for prompt in prompts]
    chosen = sorted(range(len(prompts)), key=lambda n: -continuations[n][1])[:N_PROMPTS]
    for number, n in enumerate(sorted(chosen)):
        continuation, lead = continuations[n]
        arrays[f"prompt_{number}"] = np.asarray(prompts[n], np.int32)
        arrays[f"continuation_{number}"] = np.asarray(continuation, np.int32)
        arrays[f"logits_{number}"] = net(torch.tensor([prompts[n]])).logits[0, -1].float().numpy()
        print(f"lead {lead:.3f}: {vocabulary.decode(prompts[n][1:] + continuation)}", file=sys.stderr)
        arrays[f"lead_{number}"] = np.asarray(lead, np.float32)

    documents = [d for d in read_documents(text) if not held_out or is_held_out(d, held_out)]
    tokens = encode_documents(vocabulary, documents)[0][1 : n_tokens + 1].astype(np.int64)
    n_window = net.shape.n_ctx - 1
    windows = [np.concatenate(([END_OF_TEXT], tokens[low : low + n_window])) for low in range(0, len(tokens), n_window)]
    results = [net(torch.from_numpy(window)[None], inspect=True) for window in windows]
    arrays["text_tokens"] = np.concatenate(windows).astype(np.int32)
    arrays["text_lengths"] = np.asarray([len(w) for w in windows], np.int32)
    layers = range(len(results[0].firing))
    counts = np.stack([sum(r.firing[layer][0].sum(0).numpy() for r in results) for layer in layers])
    arrays["counts"] = counts.astype(np.int32)
    active = counts.sum(1) / counts.shape[1] / sum(len(w) for w in windows)
    print(f"{out}: active {active.mean():.3f} per layer {np.round(active, 3)}", file=sys.stderr)
    if isinstance(net, TinyMixture):
        arrays |= count_experts(results, net.shape.n_expert)
        arrays["perplexity"] = np.asarray(perplexity(results, windows), np.float32)
    np.savez_compressed(out, allow_pickle=False, **arrays)


def count_experts(results: list[MixtureOutput], n_expert: int) -> dict[str, NDArray[Any]]:
    """For each mixture how often its experts were chosen, and how often each of their neurons fired."""
    chosen, fired = [], []
    for layer in range(len(results[0].mixed)):
        mixed = [result.mixed[layer] for result in results]
        of = torch.cat([m.chosen.flatten() for m in mixed])
        rows = torch.cat([m.fired().flatten(0, 1) for m in mixed])
        chosen.append(torch.bincount(of, minlength=n_expert).numpy())
        fired.append(torch.stack([rows[of == expert].sum(0) for expert in range(n_expert)]).numpy())
        share = fired[-1].sum() / rows.numel()
        print(f"  chosen {np.sort(chosen[-1])[::-1] / len(of)}, active {share:.3f}", file=sys.stderr)
    return {"chosen": np.stack(chosen).astype(np.int32), "expert_counts": np.stack(fired).astype(np.int32)}


def perplexity(results: list[Output], windows: list[NDArray[np.int64]]) -> float:
    """Of all tokens of the windows but the first of each."""
    losses = [
        F.cross_entropy(result.logits[0, :-1], torch.from_numpy(window[1:]), reduction="none")
        for result, window in zip(results, windows, strict=True)
    ]
    return float(torch.cat(losses).mean().exp())


if __name__ == "__main__":
    typer.run(main)
