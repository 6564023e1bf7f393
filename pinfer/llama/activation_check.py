"""Whether a model computes what it claims: its perplexity so read, next to that of stock llama.cpp's reading.

Stock llama.cpp reads SiLU or GELU where an architecture says so. A model that was trained with the activation it claims
is read best that way; one that was not, a SiLU model marked reglu, is read best as it stands. Some models hardly tell
the two apart (where products are large SiLU is nearly ReLU), and an untrained one not at all: those pass.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from pinfer.errors import PinferError
from pinfer.model import ACTIVATIONS, GATED_ACTIVATIONS, Model, describe_activation

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from pinfer.llama.engine import Engine

# Tokens to read both ways, at most; and the fewest to judge by.
MOST_TOKENS = 1024
LEAST_TOKENS = 64

# One reading is worse when its perplexity is so many times the other's, more than any quantisation of a trained model
# or a text of another kind does to one and not to the other, and beyond chance: so many standard errors of the
# difference, token by token.
_WORSE = math.log(1.5)
_ERRORS = 4.0
# Nats below a guess among all tokens, from which a reading shows that something was learnt.
_LEARNT = 1.0
# Stands for a token whose loss is no number, and for any worse one.
_MOST_LOSS = 100.0
# Tokens whose logits are held at a time.
_BATCH = 64


@dataclass(frozen=True)
class Readings:
    """Loss in nats of the same tokens by both readings."""

    claimed: NDArray[np.float64]
    stock: NDArray[np.float64]
    n_vocab: int

    @property
    def perplexities(self) -> tuple[float, float]:
        """As claimed, and as stock llama.cpp reads it."""
        return math.exp(float(self.claimed.mean())), math.exp(float(self.stock.mean()))

    def is_worse(self, one: NDArray[np.float64], other: NDArray[np.float64]) -> bool:
        """Whether ``one`` is clearly the worse reading of a model that has learnt something by the ``other``."""
        if len(one) < LEAST_TOKENS or other.mean() > math.log(self.n_vocab) - _LEARNT:
            return False
        difference = one - other
        error = float(difference.std(ddof=1)) / math.sqrt(len(difference))
        return float(difference.mean()) > max(_WORSE, _ERRORS * error)


def first_tokens(windows: Sequence[list[int]], n_tokens: int = MOST_TOKENS) -> list[list[int]]:
    """The beginning of ``windows``, with ``n_tokens`` tokens to predict."""
    some: list[list[int]] = []
    for window in windows:
        if n_tokens > 0 and len(window) > 1:
            some.append(window[: n_tokens + 1])
            n_tokens -= len(some[-1]) - 1
    return some


def losses(engine: Engine, windows: Sequence[list[int]], advance: Callable[[int], None]) -> NDArray[np.float64]:
    """Nats that each token but the first costs in each window."""
    import numpy as np

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
    """What there is to say in favour of the claim; None where the readings do not tell.

    Raises PinferError where they tell that the model does not compute what it claims.
    """
    claimed, stock = (_number(p) for p in readings.perplexities) if len(readings.stock) else ("", "")
    name = describe_activation(model.activation, model.activation_threshold)
    both = f"perplexity {claimed} as {name}, {stock} as stock llama.cpp reads it"
    if readings.is_worse(readings.claimed, readings.stock):
        others = [a for a in ACTIVATIONS if (a in GATED_ACTIVATIONS) == model.gated and a != model.activation]
        raise PinferError(
            f"{model.name} does not look like a {name} model: {both}",
            f"run it dense (pinfer run --dense), or name the right activation: --activation {'|'.join(others)}; "
            "--force counts all the same",
        )
    return both if readings.is_worse(readings.stock, readings.claimed) else None


def _number(perplexity: float) -> str:
    return f"{perplexity:,.1f}" if perplexity < 1e6 else f"{perplexity:.0e}"
