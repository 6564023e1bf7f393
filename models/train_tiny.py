"""Trains a byte-level BPE tokenizer and a small ReLU-family decoder from text files, and writes a GGUF.

Example: ``python models/train_tiny.py train --text stories.txt.xz:0.6 --text news.txt.xz:0.4 --activation relu2
--work work/relu2 --out tiny-relu2.gguf``. Needs torch, tokenizers, gguf, numpy and typer.
"""

from __future__ import annotations

import contextlib
import math
import os
import signal
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import numpy as np
import torch
import torch.nn.functional as F
import typer
from muon import Muon
from tiny_mixture import KINDS, MixtureShape, TinyMixture, build, read_model, write_mixture
from tiny_model import ACTIVATIONS, Shape, write_gguf
from tiny_text import (
    END_OF_TEXT,
    Source,
    TokenStream,
    WindowSampler,
    encode_documents,
    is_held_out,
    load_sources,
    read_documents,
    restore_texts,
    train_tokenizer,
)

if TYPE_CHECKING:
    from tokenizers import Tokenizer

app = typer.Typer(add_completion=False, no_args_is_help=True, help=__doc__)


@dataclass(frozen=True)
class TrainOptions:
    """The options of a training run. All of them are stored in the checkpoint."""

    shape: Shape | MixtureShape
    steps: int
    minutes: float  # 0: no limit
    batch: int  # windows per step
    lr: float  # of Muon; AdamW's is lr_embd
    lr_embd: float
    weight_decay: float
    active: float  # wanted active fraction; 0: no regulariser
    sparse_by: float  # progress at which ``active`` is reached
    decay_from: float  # progress from which the learning rate falls
    seed: int


@dataclass
class RunState:
    """State of the training besides weights and optimisers."""

    step: int = 0
    seconds: float = 0.0  # training time of all runs so far
    l1_weight: float = 0.0
    active: float = 0.5  # running mean of the active fraction
    tokens: int = 0


class Training:
    """A model, its optimisers and its data. Call ``step()`` until ``progress`` is 1."""

    def __init__(self, options: TrainOptions, streams: list[TokenStream], device: str, compile_model: bool) -> None:
        self.options = options
        self.device = torch.device(device)
        self.model = build(options.shape, options.seed).to(self.device)
        self.forward: Any = torch.compile(self.model) if compile_model else self.model
        matrices, others = [], []
        for name, parameter in self.model.named_parameters():
            of_layer = parameter.ndim >= 2 and name.startswith("blk.") and "conv1d" not in name
            (matrices if of_layer else others).append(parameter)
        self.muon = Muon(matrices, options.lr, weight_decay=options.weight_decay)
        self.adamw = torch.optim.AdamW(others, options.lr_embd, betas=(0.9, 0.95), weight_decay=0.0)
        self.sampler = WindowSampler(streams, options.shape.n_ctx, options.seed)
        self.state = RunState()
        self._started = time.monotonic()

    @property
    def progress(self) -> float:
        """Share of the training that is done: by steps or by time, whichever is larger."""
        done = self.state.step / self.options.steps
        if self.options.minutes > 0:
            done = max(done, self.seconds / (60 * self.options.minutes))
        return min(1.0, done)

    @property
    def seconds(self) -> float:
        """Wall-clock seconds of training, including earlier runs."""
        return self.state.seconds + time.monotonic() - self._started

    def rate(self) -> float:
        """Learning-rate factor: a short warm-up, constant for a while, then linearly down to 2 %."""
        warm = min(1.0, (self.state.step + 1) / 60)
        return warm * min(1.0, 0.02 + 0.98 * (1 - self.progress) / (1 - self.options.decay_from))

    def target(self) -> float:
        """The target for the active fraction, which falls linearly from one half to its final value."""
        final = self.options.active
        return final + (0.5 - final) * max(0.0, 1 - self.progress / self.options.sparse_by)

    def step(self) -> tuple[float, np.ndarray[Any, np.dtype[np.float32]]]:
        """One optimiser step; returns the cross-entropy and the active fraction of each layer."""
        rows = torch.from_numpy(self.sampler.draw(self.options.batch)).to(self.device)
        with torch.autocast(self.device.type, torch.bfloat16):
            out = self.forward(rows[:, :-1].contiguous())
            loss = F.cross_entropy(out.logits.float().flatten(0, 1), rows[:, 1:].flatten())
            total = loss + self.state.l1_weight * out.l1
        total.backward()
        torch.nn.utils.clip_grad_norm_(self.adamw.param_groups[0]["params"], 1.0)
        for optimiser, base in ((self.muon, self.options.lr), (self.adamw, self.options.lr_embd)):
            for group in optimiser.param_groups:
                group["lr"] = base * self.rate()
            optimiser.step()
            optimiser.zero_grad(set_to_none=True)
        if isinstance(self.model, TinyMixture):
            self.model.balance()
        active = out.active.cpu().numpy()
        self._steer(float(active.mean()))
        self.state.step += 1
        self.state.tokens += rows.shape[0] * (rows.shape[1] - 1)
        return float(loss.detach()), active

    def _steer(self, active: float) -> None:
        """Adjusts the weight of the L1 term so that the active fraction follows its target."""
        if self.options.active <= 0:
            return
        state = self.state
        state.active += 0.1 * (active - state.active)
        error = (state.active - self.target()) / self.target()
        state.l1_weight = min(20.0, max(0.005, state.l1_weight) * math.exp(0.02 * max(-1.0, min(1.0, error))))

    def save(self, path: Path) -> None:
        """Writes everything needed to resume to a temporary name, then renames it."""
        temporary = path.with_name(path.name + ".tmp")
        torch.save(
            {
                "options": asdict(self.options),
                "state": asdict(self.state) | {"seconds": self.seconds},
                "model": self.model.state_dict(),
                "muon": self.muon.state_dict(),
                "adamw": self.adamw.state_dict(),
                "rng": self.sampler.rng.bit_generator.state,
            },
            temporary,
        )
        os.replace(temporary, path)

    def load(self, path: Path) -> None:
        """Resumes from ``save``. Shape and seed must be the same; steps and rates may differ."""
        saved = torch.load(path, map_location=self.device, weights_only=False)
        if saved["options"]["shape"] != asdict(self.options.shape):
            raise typer.BadParameter(f"{path} holds a model of another shape: {saved['options']['shape']}")
        self.model.load_state_dict(saved["model"])
        self.muon.load_state_dict(saved["muon"])
        self.adamw.load_state_dict(saved["adamw"])
        self.sampler.rng.bit_generator.state = saved["rng"]
        self.state = RunState(**saved["state"])
        self._started = time.monotonic()


def say(text: str) -> None:
    """Prints one line of progress."""
    print(text, file=sys.stderr, flush=True)


def prepare(
    sources: list[Source], n_vocab: int, held_out: float, work: Path, seed: int
) -> tuple[Tokenizer, list[TokenStream]]:
    """Tokenizer and token streams; those that an earlier run left in ``work`` are used again."""
    from tokenizers import Tokenizer

    tokenizer_path = work / "tokenizer.json"
    cache = [work / f"{source.path.name}.npz" for source in sources]
    if tokenizer_path.exists() and all(path.exists() for path in cache):
        tokenizer = Tokenizer.from_file(str(tokenizer_path))
        saved = [np.load(path) for path in cache]
        return tokenizer, [TokenStream(s.weight, c["tokens"], c["starts"]) for s, c in zip(sources, saved, strict=True)]
    texts = load_sources(sources, held_out)
    if tokenizer_path.exists():
        tokenizer = Tokenizer.from_file(str(tokenizer_path))
    else:
        say("training the tokenizer")
        tokenizer = train_tokenizer(texts, n_vocab, seed)
        tokenizer.save(str(tokenizer_path))
    streams = []
    for (source, documents), path in zip(texts, cache, strict=True):
        tokens, starts = encode_documents(tokenizer, documents)
        say(f"{source.path.name}: {len(documents)} documents, {len(tokens)} tokens, weight {source.weight}")
        np.savez(path, tokens=tokens, starts=starts)
        streams.append(TokenStream(source.weight, tokens, starts))
    return tokenizer, streams


@app.command()
def train(
    text: Annotated[list[str], typer.Option(help="FILE[:WEIGHT], documents each followed by a line <|endoftext|>")],
    work: Annotated[
        Path, typer.Option(help="folder for tokenizer, tokens, checkpoint; a second call goes on from there")
    ],
    out: Annotated[Path, typer.Option(help="GGUF to write")],
    activation: Annotated[str, typer.Option(help="relu, relu2, reglu or drelu")] = "relu2",
    n_embd: int = 256,
    n_ff: int = 1024,
    n_layer: int = 6,
    n_head: int = 4,
    n_head_kv: int = 2,
    n_vocab: int = 3072,
    n_ctx: int = 256,
    pattern: Annotated[
        str, typer.Option(help="train a mixture of ReLU² experts with these layers: M Mamba-2, * attention, E experts")
    ] = "",
    n_expert: Annotated[int, typer.Option(help="experts of a mixture; --n-ff is the size of one")] = 16,
    n_expert_used: int = 2,
    n_ff_shared: Annotated[int, typer.Option(help="size of its shared expert")] = 384,
    steps: int = 4000,
    minutes: Annotated[float, typer.Option(help="end by this wall-clock time at the latest; 0: no limit")] = 0.0,
    batch: Annotated[int, typer.Option(help="windows of n_ctx tokens per step")] = 16,
    lr: float = 0.02,
    lr_embd: float = 0.004,
    weight_decay: float = 0.02,
    active: Annotated[float, typer.Option(help="active fraction of neurons to reach; 0: no regulariser")] = 0.12,
    sparse_by: Annotated[float, typer.Option(help="share of the training within which it falls to that")] = 0.5,
    decay_from: Annotated[float, typer.Option(help="share of the training after which the rates fall")] = 0.45,
    held_out: Annotated[float, typer.Option(help="share of documents kept out of training")] = 0.01,
    device: str = "cuda" if torch.cuda.is_available() else "cpu",
    threads: Annotated[int, typer.Option(help="CPU threads; 0: PyTorch's own choice")] = 0,
    seed: int = 1,
    export_every: Annotated[float, typer.Option(help="minutes between checkpoints and GGUF exports")] = 10.0,
    compile_model: Annotated[bool, typer.Option("--compile", help="compile the model (needs a C++ compiler)")] = False,
) -> None:
    """Train a model, or continue training it, and write it as GGUF."""
    if activation not in ACTIVATIONS:
        raise typer.BadParameter(f"activation {activation} is none of {', '.join(ACTIVATIONS)}")
    if threads:
        torch.set_num_threads(threads)
    work.mkdir(parents=True, exist_ok=True)
    if set(pattern) - set(KINDS):
        raise typer.BadParameter(f"pattern {pattern} has letters other than {' '.join(KINDS)}")
    shape: Shape | MixtureShape
    if pattern:
        shape = MixtureShape(
            pattern=pattern,
            n_embd=n_embd,
            n_ff=n_ff,
            n_ff_shared=n_ff_shared,
            n_expert=n_expert,
            n_expert_used=n_expert_used,
            weights_scale=2.5,
            n_head=n_head,
            n_head_kv=n_head_kv,
            n_inner=n_embd,
            n_state=64,
            n_conv=4,
            n_vocab=n_vocab,
            n_ctx=n_ctx,
        )
    else:
        shape = Shape(activation, n_embd, n_ff, n_layer, n_head, n_head_kv, n_vocab, n_ctx)
    options = TrainOptions(shape, steps, minutes, batch, lr, lr_embd, weight_decay, active, sparse_by, decay_from, seed)
    tokenizer, streams = prepare([Source.parse(t) for t in text], n_vocab, held_out, work, seed)
    training = Training(options, streams, device, compile_model)
    checkpoint = work / "checkpoint.pt"
    if checkpoint.exists():
        training.load(checkpoint)
        say(f"going on from step {training.state.step}")
    n_parameters = sum(p.numel() for p in training.model.parameters())
    say(f"{shape.arch} {shape.activation}, {n_parameters / 1e6:.2f} M parameters on {device}")

    def export() -> None:
        training.save(checkpoint)
        note = f"trained by models/train_tiny.py: {training.state.step} steps, {training.state.tokens} tokens"
        if isinstance(training.model, TinyMixture):
            write_mixture(out, training.model, tokenizer, out.stem, note)
        else:
            write_gguf(out, training.model, tokenizer, out.stem, note)

    export()
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # keeps a checkpoint, as Ctrl-C does
    try:
        _loop(training, export, export_every)
    except KeyboardInterrupt:
        say("interrupted; the checkpoint is kept")
        training.save(checkpoint)
        raise typer.Exit(130) from None
    export()
    state = training.state
    say(f"wrote {out} after {state.step} steps, {state.tokens} tokens, {training.seconds / 60:.0f} minutes")


def _loop(training: Training, export: Any, export_every: float) -> None:
    """Trains to the end, with a line of progress about every ten seconds."""
    exported = spoke = time.monotonic()
    losses: list[float] = []
    tokens = training.state.tokens
    while training.progress < 1.0:
        loss, active = training.step()
        if not math.isfinite(loss):
            raise RuntimeError(f"the loss is {loss} at step {training.state.step}")
        losses.append(loss)
        now = time.monotonic()
        if now - spoke >= 10:
            rate = (training.state.tokens - tokens) / (now - spoke)
            layers = " ".join(f"{a:.2f}" for a in active)
            say(
                f"{100 * training.progress:5.1f} % step {training.state.step} loss {np.mean(losses):.3f}"
                f" {rate:.0f} tokens/s active {active.mean():.3f} [{layers}]"
                f" target {training.target():.2f} l1 {training.state.l1_weight:.3f}"
            )
            if isinstance(training.model, TinyMixture):
                loads = [load.sort(descending=True).values for load in training.model.loads()]
                say("  loads " + " | ".join(" ".join(f"{100 * x:.0f}" for x in load) for load in loads))
            losses, tokens, spoke = [], training.state.tokens, now
        if now - exported >= 60 * export_every:
            export()
            exported = time.monotonic()


@app.command()
def evaluate(
    model: Annotated[Path, typer.Argument(help="GGUF written by train")],
    text: Annotated[list[Path], typer.Option(help="text to measure on")],
    tokenizer: Annotated[Path, typer.Option(help="tokenizer.json of the work folder")],
    held_out: Annotated[float, typer.Option(help="use only this held-out share of the documents; 0: all")] = 0.0,
    max_tokens: int = 65536,
    names: Annotated[
        list[Path] | None, typer.Option(help="cased texts to learn names from, for a lower-case text")
    ] = None,
) -> None:
    """Perplexity in windows of the context length and active neurons per layer."""
    from tokenizers import Tokenizer

    net = read_model(model).eval()
    vocabulary = Tokenizer.from_file(str(tokenizer))
    texts = [(Source(p, 1.0), [d for d in read_documents(p) if not held_out or is_held_out(d, held_out)]) for p in text]
    texts += [(Source(p, 0.0), read_documents(p)) for p in names or []]
    for source, documents in restore_texts(texts)[: len(text)]:
        tokens = encode_documents(vocabulary, documents)[0][1 : max_tokens + 1].astype(np.int64)
        n_window = net.shape.n_ctx
        total, counted, active = 0.0, 0, np.zeros(1)
        with torch.no_grad():
            for low in range(0, len(tokens), n_window):
                piece = tokens[low : low + n_window]
                rows = torch.from_numpy(np.concatenate(([END_OF_TEXT], piece)))[None]
                result = net(rows[:, :-1])
                total += float(F.cross_entropy(result.logits[0], rows[0, 1:], reduction="sum"))
                active = active + result.active.numpy() * len(piece)
                counted += len(piece)
        layers = " ".join(f"{a:.3f}" for a in active / counted)
        print(
            f"{source.path.name}: perplexity {math.exp(total / counted):.2f} on {counted} tokens,"
            f" active {active.mean() / counted:.3f} [{layers}]"
        )


@app.command()
def sample(
    model: Annotated[Path, typer.Argument(help="GGUF written by train")],
    tokenizer: Annotated[Path, typer.Option(help="tokenizer.json of the work folder")],
    prompt: Annotated[list[str], typer.Option(help="beginning of the text")],
    n_predict: int = 200,
    temperature: float = 0.0,
    seed: int = 1,
) -> None:
    """Continue a prompt (greedy by default)."""
    from tokenizers import Tokenizer

    net = read_model(model).eval()
    vocabulary = Tokenizer.from_file(str(tokenizer))
    generator = torch.Generator().manual_seed(seed)
    for beginning in prompt:
        tokens = [END_OF_TEXT, *vocabulary.encode(beginning).ids]
        with torch.no_grad(), contextlib.suppress(StopIteration):
            while len(tokens) < min(net.shape.n_ctx, n_predict + 1):
                logits = net(torch.tensor([tokens])).logits[0, -1]
                if temperature > 0:
                    chosen = int(torch.multinomial((logits / temperature).softmax(-1), 1, generator=generator))
                else:
                    chosen = int(logits.argmax())
                if chosen == END_OF_TEXT:
                    break
                tokens.append(chosen)
        print(vocabulary.decode(tokens[1:]), end="\n\n")


if __name__ == "__main__":
    app()
