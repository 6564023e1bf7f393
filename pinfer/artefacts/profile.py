"""profile.gguf and samples.gguf: how often each neuron fires, and FFN inputs to learn from (docs/formats.md)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from pinfer.artefacts.artefact import Artefact, ArtefactWriter, open_artefact

if TYPE_CHECKING:
    from pinfer.model import Ffn, Model


@dataclass(frozen=True)
class ProfileFile:
    """Activation statistics of every neuron, by FFN."""

    tokens: int
    corpus: str
    corpus_sha256: str
    count: tuple[NDArray[np.int64], ...]
    """per FFN ``[n_neurons]``: tokens in which the neuron fired; ``routed`` where nothing in the experts is zero"""
    mass: tuple[NDArray[np.float64], ...]
    """per FFN ``[n_neurons]``: sum of its output over the tokens; zeros where whole experts are counted"""
    routed: tuple[NDArray[np.int64] | None, ...]
    """per FFN ``[n_experts]``: tokens that were routed to the expert; None for an FFN that all tokens share"""

    @staticmethod
    def read(path: Path, model: Model) -> ProfileFile:
        """Raises PinferError when the file is missing, damaged or of another model."""
        artefact = open_artefact(path, "profile", model)
        tokens = artefact.get_int("pinfer.profile.tokens")
        routed = tuple(
            artefact.array(f"{f.name}.routed", (f.n_experts,), "I64") if f.is_stack else None for f in model.ffns
        )
        if model.places_experts:
            return _checked_routing(artefact, model, tokens, tuple(r for r in routed if r is not None))
        count = tuple(artefact.array(f"{f.name}.count", (f.n_neurons,), "I64") for f in model.ffns)
        mass = tuple(artefact.array(f"{f.name}.mass", (f.n_neurons,), "F64") for f in model.ffns)
        for f, c, r in zip(model.ffns, count, routed, strict=True):
            most = tokens if r is None else np.repeat(r, f.n_ff)
            if (
                tokens <= 0
                or c.min() < 0
                or (c > most).any()
                or (r is not None and not 0 <= r.min() <= r.max() <= tokens)
            ):
                raise artefact.damaged(f"{f.title} has counts outside 0..{tokens}")
        return ProfileFile(
            tokens,
            artefact.get_str("pinfer.profile.corpus"),
            artefact.get_str("pinfer.profile.corpus_sha256"),
            count,
            mass,
            routed,
        )

    @staticmethod
    def of_routing(tokens: int, corpus: str, corpus_sha256: str, routed: tuple[NDArray[np.int64], ...]) -> ProfileFile:
        """That of a model whose experts are placed as a whole, by how often tokens were routed to each."""
        mass = tuple(np.zeros(len(r)) for r in routed)
        return ProfileFile(tokens, corpus, corpus_sha256, routed, mass, routed)

    def pairs(self, i: int) -> int:
        """How often neurons of FFN ``i`` could have fired: each for every token, or those of experts when routed to."""
        routed, n = self.routed[i], len(self.count[i])
        return self.tokens * n if routed is None else int(routed.sum()) * (n // len(routed))

    def active(self, i: int) -> float:
        """Share of the neurons of FFN ``i`` that fire for a token; of a stack, of the experts it was routed to."""
        return float(self.count[i].sum()) / max(1, self.pairs(i))

    def order(self) -> tuple[NDArray[np.int32], ...]:
        """Per FFN ``[n_units]``: its neurons, or the experts of a stack, the most frequent first.

        Equally frequent neurons are ordered by their mass.
        """
        return tuple(
            (np.lexsort((-mass, -count)) if routed is None else np.argsort(-routed, kind="stable")).astype(np.int32)
            for count, mass, routed in zip(self.count, self.mass, self.routed, strict=True)
        )

    def mean_active(self) -> float:
        """The same over all FFNs."""
        pairs = sum(self.pairs(i) for i in range(len(self.count)))
        return float(sum(c.sum() for c in self.count)) / max(1, pairs)

    def writer(self, path: Path, model: Model, settings: Mapping[str, object]) -> ArtefactWriter:
        """A writer that holds the whole file and has not begun to write it."""
        out = ArtefactWriter(path, "profile", model, settings)
        out.add_u64("pinfer.profile.tokens", self.tokens)
        out.add_str("pinfer.profile.corpus", self.corpus)
        out.add_str("pinfer.profile.corpus_sha256", self.corpus_sha256)
        for f, count, mass, routed in zip(model.ffns, self.count, self.mass, self.routed, strict=True):
            if not model.places_experts:
                out.add_array(f"{f.name}.count", count)
                out.add_array(f"{f.name}.mass", mass)
            if routed is not None:
                out.add_array(f"{f.name}.routed", routed)
        return out

    def write(self, path: Path, model: Model, settings: Mapping[str, object]) -> None:
        """Raises PinferError when the disk is full or cannot be written; the old file is whole then."""
        with self.writer(path, model, settings):
            pass


def _checked_routing(
    artefact: Artefact, model: Model, tokens: int, routed: tuple[NDArray[np.int64], ...]
) -> ProfileFile:
    """A token is routed to an expert at most once, and to so many of them."""
    for f, r in zip(model.ffns, routed, strict=True):
        if tokens <= 0 or not 0 <= r.min() <= r.max() <= tokens:
            raise artefact.damaged(f"{f.title} has counts outside 0..{tokens}")
        if r.sum() > tokens * model.n_expert_used:
            raise artefact.damaged(f"{f.title} has more counts than {tokens} tokens with {model.n_expert_used} experts")
    corpus = artefact.get_str("pinfer.profile.corpus"), artefact.get_str("pinfer.profile.corpus_sha256")
    return ProfileFile.of_routing(tokens, *corpus, routed)


@dataclass(frozen=True)
class SamplesFile:
    """FFN inputs of sampled tokens, mapped: those of an FFN are read when they are asked for."""

    artefact: Artefact
    n_samples: int
    """the same for all FFNs"""

    @staticmethod
    def read(path: Path, model: Model) -> SamplesFile:
        """Raises PinferError when the file is missing, damaged or of another model."""
        artefact = open_artefact(path, "samples", model)
        n_samples = artefact.tensor(f"{model.ffns[0].name}.x").n_rows
        for f in model.ffns:
            artefact.array(f"{f.name}.x", (f.n_embd, n_samples), "F16")
            if not f.is_stack:
                artefact.array(f"{f.name}.active", (-(-f.n_ff // 8), n_samples), "I8")
                continue
            experts = artefact.array(f"{f.name}.experts", (model.n_expert_used, n_samples), "I32")
            if not 0 <= experts.min() <= experts.max() < f.n_experts:
                raise artefact.damaged(f"{f.title} has samples of experts that the model does not have")
        return SamplesFile(artefact, n_samples)

    def x(self, ffn: Ffn) -> NDArray[np.float16]:
        """Inputs of an FFN, ``[n_samples, n_embd]``."""
        x: NDArray[np.float16] = self.artefact.array(f"{ffn.name}.x")
        return x

    def active(self, ffn: Ffn) -> NDArray[np.bool_]:
        """Which neurons of an FFN that is not a stack fired, ``[n_samples, n_ff]``."""
        bits = self.artefact.array(f"{ffn.name}.active").view(np.uint8)
        return np.unpackbits(bits, axis=1, count=ffn.n_ff, bitorder="little").astype(bool)

    def experts(self, ffn: Ffn) -> NDArray[np.int32]:
        """The experts of a stack that each sample was routed to, ``[n_samples, n_expert_used]``."""
        experts: NDArray[np.int32] = self.artefact.array(f"{ffn.name}.experts")
        return experts


def samples_writer(
    path: Path,
    model: Model,
    settings: Mapping[str, object],
    samples: Sequence[tuple[NDArray[np.float16], NDArray[Any]]],
) -> ArtefactWriter:
    """A writer of samples.gguf, written and not yet in place.

    ``samples`` holds, for each FFN, x ``[n_samples, n_embd]`` and the activity bits ``[n_samples, ceil(n_ff/8)]``, or
    for a stack its experts ``[n_samples, n_expert_used]``; they are not copied.
    """
    out = ArtefactWriter(path, "samples", model, settings)
    tensors: list[tuple[str, NDArray[Any]]] = []
    for f, (x, second) in zip(model.ffns, samples, strict=True):
        name = f"{f.name}.{'experts' if f.is_stack else 'active'}"
        out.declare(f"{f.name}.x", x.shape[::-1], "F16")
        out.declare(name, second.shape[::-1], "I32" if f.is_stack else "I8")
        tensors += [(f"{f.name}.x", x), (name, second)]
    try:
        for name, data in tensors:
            out.write(name, data)
    except BaseException:
        out.discard()
        raise
    return out
