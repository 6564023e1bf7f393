"""Chooses the type of each FFN's down rows: as few bytes as the divergence of the whole model allows.

A type's error in one FFN changes the output by a small random amount, and the divergence grows with its square. So the
errors of all FFNs add up, and one measurement tells how sensitive the model is to an FFN: how far it moves when that
FFN's rows are coarse. The error of every type is known from the rows themselves. The cheapest choice whose sum stays
below the bound is an integer program; it is then measured, and the program solved again with what was learnt.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pinfer.artefacts.profile import ProfileFile
from pinfer.errors import PinferError
from pinfer.eval import DenseReference
from pinfer.gguf_io.reader import row_bytes, type_number, type_size
from pinfer.llama import ggml
from pinfer.llama.engine import NEVER_DENSE, PluginConfig
from pinfer.model import Ffn, Model, dequantize
from pinfer.progress import NULL_PROGRESS, Progress

# From fine to coarse. Each has kernels of its own.
TYPES = ("Q8_0", "Q6_K", "Q5_K", "Q5_0", "Q4_K", "Q4_0")

FACTOR = 2.0
"""the default bound, in divergences that the model has with Q8_0 everywhere"""

# Down rows on which the errors of the types are measured.
_SAMPLE_ROWS = 128

# Sensitivities below this share of their mean are not told from noise.
_LEAST = 0.05

# How often a choice is measured. The program aims a little below the bound, since divergences do not add up exactly.
_ATTEMPTS = 4
_AIM = 0.95

# Writes a cold shard of all neurons, with the types of the down rows by FFN.
Write = Callable[[Path, Sequence[str]], None]


@dataclass(frozen=True)
class DownChoice:
    """The types, and what they were found to cost. Divergences are KL from dense, in nats."""

    types: tuple[str, ...]
    """by FFN"""
    bound: float
    divergence: float
    divergence_q8: float
    """with Q8_0 everywhere"""
    row_bytes: float
    """bytes of down rows that a token reads, with these types"""
    row_bytes_q8: float


def choose(
    model: Model,
    profile: ProfileFile | None,
    text: Path,
    n_tokens: int,
    bound: float | None,
    write: Write,
    trial: Path,
    progress: Progress = NULL_PROGRESS,
) -> DownChoice:
    """The cheapest types whose divergence on ``text`` is at most ``bound`` (None: FACTOR times that of Q8_0).

    Each measurement writes a shard to ``trial``, which is removed at the end. Raises PinferError if even Q8_0 exceeds
    the bound.
    """
    fine, coarse = ([_candidates(ffn)[end] for ffn in model.ffns] for end in (0, -1))
    with progress.task("down types", len(model.ffns) + 1 + _ATTEMPTS, "measurements") as advance, _removed(trial):
        reference = DenseReference(model, text, n_tokens)

        def measured(types: Sequence[str]) -> float:
            write(trial, types)
            config = replace(PluginConfig.of(model), cold=trial, n_batch_dense=NEVER_DENSE)
            found = reference.divergence(config)
            advance(1)
            return found

        least = measured(fine)
        bound = FACTOR * least if bound is None else bound
        if least > bound:
            raise PinferError(
                f"the model diverges by {least:.1e} with down rows of Q8_0, more than {bound:.1e}",
                "use a larger --down-kl, or finer rows: --down-type F16",
            )
        alone = [measured([*fine[:i], kind, *fine[i + 1 :]]) - least for i, kind in enumerate(coarse)]
        program = _Program.of(model, profile, np.array(alone))
        best, at_best, budget = tuple(fine), least, _AIM * (bound - least)
        for _ in range(_ATTEMPTS):
            types = program.solve(budget)
            if program.cost(types) >= program.cost(best):
                break
            found = measured(types)
            if found <= bound:
                best, at_best = types, found
            budget *= min(2.0, _AIM * (bound - least) / max(found - least, 1e-3 * (bound - least)))
    return DownChoice(best, bound, at_best, least, program.cost(best), program.cost(fine))


@contextmanager
def _removed(path: Path) -> Iterator[None]:
    try:
        yield
    finally:
        path.unlink(missing_ok=True)


def _candidates(ffn: Ffn) -> list[str]:
    """The types whose blocks divide the rows of an FFN, from fine to coarse; if there are none, F16."""
    return [name for name in TYPES if ffn.n_embd % type_size(type_number(name))[0] == 0] or ["F16"]


def _active(ffn: Ffn, i: int, profile: ProfileFile | None) -> float:
    """Neurons of an FFN that fire for a token."""
    if profile is None:
        return float(ffn.n_neurons)
    return float(profile.count[i].sum()) / profile.tokens


def _errors(model: Model, ffn: Ffn, names: Sequence[str]) -> NDArray[np.float64]:
    """Mean square error of each type on some down rows, relative to that of the last type."""
    picked = np.linspace(0, ffn.n_ff - 1, min(_SAMPLE_ROWS, ffn.n_ff)).astype(np.int64)
    rows = np.ascontiguousarray(dequantize(model, ffn.down, slice(0, ffn.n_embd))[:, picked].T)
    squares = []
    for name in names:
        kind = type_number(name)
        rounded = ggml.dequantise(ggml.quantise(rows, kind, row_bytes(kind, ffn.n_embd)), kind, ffn.n_embd)
        squares.append(float(np.mean((rounded - rows) ** 2, dtype=np.float64)))
    return np.array(squares) / max(squares[-1], 1e-30)


@dataclass(frozen=True)
class _Program:
    """By FFN and type, what a token reads and what the model diverges by, beyond Q8_0 everywhere."""

    names: tuple[tuple[str, ...], ...]
    bytes: tuple[NDArray[np.float64], ...]
    harm: tuple[NDArray[np.float64], ...]

    @staticmethod
    def of(model: Model, profile: ProfileFile | None, alone: NDArray[np.float64]) -> _Program:
        """``alone``: the divergence that each FFN causes when its rows alone are of its coarsest type."""
        sensitivity = np.maximum(alone, _LEAST * max(float(alone.mean()), 0.0))
        names, n_bytes, harm = [], [], []
        for i, ffn in enumerate(model.ffns):
            kinds = _candidates(ffn)
            errors = _errors(model, ffn, kinds)
            names.append(tuple(kinds))
            n_bytes.append(_active(ffn, i, profile) * np.array([float(row_bytes(kind, ffn.n_embd)) for kind in kinds]))
            harm.append(sensitivity[i] * (errors - errors[0]) / max(1 - errors[0], 1e-30))
        return _Program(tuple(names), tuple(n_bytes), tuple(harm))

    def cost(self, types: Sequence[str]) -> float:
        """Bytes of down rows per token."""
        return sum(float(b[names.index(kind)]) for b, names, kind in zip(self.bytes, self.names, types, strict=True))

    def solve(self, budget: float) -> tuple[str, ...]:
        """One type for each FFN, of the fewest bytes whose harm is at most ``budget`` together."""
        from scipy.optimize import Bounds, LinearConstraint, milp

        cost, harm = np.concatenate(self.bytes), np.concatenate(self.harm)
        ends = np.cumsum([len(names) for names in self.names])
        one_each = np.zeros((len(self.names), len(cost)))
        for i, end in enumerate(ends):
            one_each[i, end - len(self.names[i]) : end] = 1
        scale = max(budget, 1e-30)
        found = milp(
            cost / max(float(cost.max()), 1e-30),
            integrality=np.ones(len(cost), dtype=np.int64),
            bounds=Bounds(0, 1),
            constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint((harm / scale)[None], -np.inf, 1)],
        )
        if found.x is None:
            return tuple(names[0] for names in self.names)
        parts = np.split(found.x, ends[:-1])
        return tuple(names[int(part.argmax())] for names, part in zip(self.names, parts, strict=True))
