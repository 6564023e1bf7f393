"""Down types by layer: the model stays within the bound, with as few bytes as the types allow."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from support.quantised import quantise

from pinfer.artefacts import paths
from pinfer.artefacts.shards import ShardFile
from pinfer.down_rows import TYPES, DownChoice, _Program
from pinfer.errors import PinferError
from pinfer.eval import EvalOptions, evaluate
from pinfer.gguf_io.reader import row_bytes, type_name, type_number
from pinfer.model import open_model
from pinfer.split import SplitOptions, split

HELD_OUT = Path(__file__).resolve().parent / "data" / "heldout.txt"
N_TOKENS = 400


def _choose(path: Path, bound: str) -> DownChoice:
    options = SplitOptions(down_kl=bound, text=HELD_OUT, n_tokens=N_TOKENS, verify=True)
    choice = split(path, options).down_choice
    assert choice is not None
    return choice


@pytest.mark.parametrize("name", ["tiny-relu2.gguf", "tiny-moe.gguf"])
def test_the_model_stays_within_the_bound(name: str, copy_model: Callable[[str], Path], tmp_path: Path) -> None:
    path = tmp_path / "model.gguf"
    if name == "tiny-moe.gguf":
        path = copy_model(name)  # its matrices are Q8_0
    else:
        quantise(copy_model(name), "Q4_0", path)
    model = open_model(path)
    choice = _choose(path, "auto")
    assert choice.bound == pytest.approx(2 * choice.divergence_q8)
    assert 0 < choice.divergence <= choice.bound
    assert choice.row_bytes < 0.9 * choice.row_bytes_q8

    # The shard has these types, and measured by `pinfer eval` it diverges as reported.
    folder = paths.artefact_dir(path, model.fingerprint, for_writing=False)
    assert tuple(type_name(t) for t in ShardFile.read(folder / paths.COLD, "cold", model).down_type) == choice.types
    assert not list(folder.glob(".*trial*"))
    report = evaluate(path, EvalOptions(text=HELD_OUT, n_tokens=N_TOKENS, exact=True))
    assert report.kl_mean == pytest.approx(choice.divergence, rel=0.15)

    looser = _choose(path, str(8 * choice.divergence_q8))
    assert looser.divergence <= 8 * choice.divergence_q8
    assert looser.row_bytes < choice.row_bytes


def test_bad_settings_are_refused(copy_model: Callable[[str], Path]) -> None:
    path = copy_model("tiny-relu2.gguf")
    with pytest.raises(PinferError, match="on a text"):
        split(path, SplitOptions(down_kl="auto"))
    with pytest.raises(PinferError, match="on a text"):
        split(path, SplitOptions(text=HELD_OUT))
    with pytest.raises(PinferError, match="exclude each other"):
        split(path, SplitOptions(down_kl="auto", text=HELD_OUT, down_type="Q6_K"))
    for wrong in ("much", "-1", "0", "nan"):
        with pytest.raises(PinferError, match="not a valid divergence"):
            split(path, SplitOptions(down_kl=wrong, text=HELD_OUT))
    with pytest.raises(PinferError, match="with down rows of Q8_0, more than"):
        split(path, SplitOptions(down_kl="1e-9", text=HELD_OUT, n_tokens=50))
    assert not list(path.parent.rglob("*trial*"))


@pytest.mark.parametrize("seed", range(5))
def test_the_program_finds_the_cheapest_choice(seed: int) -> None:
    """Against all choices for four FFNs."""
    rng = np.random.default_rng(seed)
    sizes = np.array([float(row_bytes(type_number(kind), 256)) for kind in TYPES])
    active, harm = rng.uniform(10, 100, 4), np.cumsum(rng.uniform(0, 1, (4, len(TYPES))), axis=1)
    harm -= harm[:, :1]
    program = _Program((TYPES,) * 4, tuple(sizes * a for a in active), tuple(harm))
    for budget in (0.0, 0.5, 2.0, 5.0, 100.0):
        choices = itertools.product(range(len(TYPES)), repeat=4)
        allowed = [c for c in choices if sum(harm[i, k] for i, k in enumerate(c)) <= budget]
        cheapest = min(sum(sizes[k] * active[i] for i, k in enumerate(c)) for c in allowed)
        found = program.solve(budget)
        assert sum(harm[i, TYPES.index(kind)] for i, kind in enumerate(found)) <= budget * (1 + 1e-6)
        assert program.cost(found) == pytest.approx(cheapest, rel=1e-4)
