"""Checks that a model was trained with the activation it claims, by its perplexity with that activation and with stock
llama.cpp's.

Stock llama.cpp computes SiLU or GELU for architectures that use it. A model trained with the claimed activation has the
lower perplexity with that one; a SiLU model wrongly marked reglu has it with SiLU. For some models the two hardly
differ (SiLU is nearly ReLU for large products), and for an untrained model not at all. Those pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from pinfer.errors import PinferError
from pinfer.llama.engine import Engine
from pinfer.model import ACTIVATIONS, GATED_ACTIVATIONS, Model, describe_activation

# Tokens evaluated with each activation, at most; and the fewest that allow a verdict.
MOST_TOKENS = 1024
LEAST_TOKENS = 64

# One activation is worse if its perplexity is 1.5 times the other's (more than quantisation or an unusual text causes)
# and if the mean difference per token exceeds 4 standard errors.
_WORSE = math.log(1.5)
_ERRORS = 4.0
# Nats below uniform guessing from which a model counts as trained.
_LEARNT = 1.0
# Cap on the loss of a token; also stands for NaN.
_MOST_LOSS = 100.0
# Tokens whose logits are held at a time.
_BATCH = 64


@dataclass(frozen=True)
class Readings:
    """Loss in nats of the same tokens with both activations."""

    claimed: NDArray[np.float64]
    stock: NDArray[np.float64]
    n_vocab: int

    @property
    def perplexities(self) -> tuple[float, float]:
        """With the claimed activation, and with stock llama.cpp's."""
        return math.exp(float(self.claimed.mean())), math.exp(float(self.stock.mean()))

    def is_worse(self, one: NDArray[np.float64], other: NDArray[np.float64]) -> bool:
        """Whether the losses ``one`` are clearly worse than ``other``, which must be those of a trained model."""
        if len(one) < LEAST_TOKENS or other.mean() > math.log(self.n_vocab) - _LEARNT:
            return False
        difference = one - other
        error = float(difference.std(ddof=1)) / math.sqrt(len(difference))
        return float(difference.mean()) > max(_WORSE, _ERRORS * error)


def first_tokens(windows: Sequence[list[int]], n_tokens: int = MOST_TOKENS) -> list[list[int]]:
    """The first windows, cut to ``n_tokens`` tokens to predict."""
    some: list[list[int]] = []
    for window in windows:
        if n_tokens > 0 and len(window) > 1:
            some.append(window[: n_tokens + 1])
            n_tokens -= len(some[-1]) - 1
    return some


def losses(engine: Engine, windows: Sequence[list[int]], advance: Callable[[int], None]) -> NDArray[np.float64]:
    """Loss in nats of each token in each window, except the first."""
    found: list[NDArray[np.float64]] = []
    for window in windows:
        engine.clear()
        for begin in range(0, len(window) - 1, _BATCH):
            piece = window[begin : min(begin + _BATCH, len(window) - 1)]
            logits = engine.decode(piece, logits=True)
            targets = window[begin + 1 : begin + 1 + len(piece)]
            with np.errstate(all="ignore"):
                logits -= logits.max(axis=1, keepdims=True)
                total = np.log(np.exp(logits).sum(axis=1, dtype=np.float64))
                found.append(total - logits[np.arange(len(piece)), targets])
            advance(len(piece))
    together = np.concatenate(found) if found else np.empty(0)
    return np.minimum(np.nan_to_num(together, nan=_MOST_LOSS, posinf=_MOST_LOSS), _MOST_LOSS)


def judge(model: Model, readings: Readings) -> str | None:
    """The evidence for the claimed activation in one line; None if the perplexities do not decide.

    Raises PinferError if they show that the model was trained with another activation.
    """
    claimed, stock = (_number(p) for p in readings.perplexities) if len(readings.stock) else ("", "")
    name = describe_activation(model.activation, model.activation_threshold)
    both = f"perplexity {claimed} as {name}, {stock} as stock llama.cpp computes it"
    if readings.is_worse(readings.claimed, readings.stock):
        others = [a for a in ACTIVATIONS if (a in GATED_ACTIVATIONS) == model.gated and a != model.activation]
        raise PinferError(
            f"{model.name} does not look like a {name} model: {both}",
            f"run it dense (pinfer run --dense), or pass the right activation: --activation {'|'.join(others)}; "
            "--force profiles it anyway",
        )
    return both if readings.is_worse(readings.stock, readings.claimed) else None


def _number(perplexity: float) -> str:
    return f"{perplexity:,.1f}" if perplexity < 1e6 else f"{perplexity:.0e}"
