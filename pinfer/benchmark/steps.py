"""Where the time of a decoded token goes, step by step."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from pinfer.benchmark.process import WorkerProcess
from pinfer.benchmark.report import Case, Steps

_FFN = "FFN: "


def measure(
    worker: WorkerProcess,
    test: Case,
    size: dict[str, Any],
    streams: Sequence[Sequence[Sequence[int]]],
    texts: Sequence[Sequence[int]],
) -> Steps:
    """Run a decoding test of the sparse side as it is, then node by node; ``streams`` are to warm up and to measure."""

    def run(by_node: bool) -> dict[str, Any]:
        worker.ask("open", **size, by_node=by_node)
        answers: list[dict[str, Any]] = [worker.ask("steps", streams=each, texts=texts) for each in streams]
        return answers[-1]

    whole, nodes = run(by_node=False), run(by_node=True)
    scale = 1e3 / test.n_gen
    return Steps(
        test,
        token=scale * whole["seconds"],
        ffn={name: scale * s for name, s in whole["steps"].items() if s and name.startswith(_FFN)},
        by_node={name: scale * s for name, s in nodes["steps"].items() if s and not name.startswith(_FFN)},
        faults=whole["faults"] / test.n_gen,
    )
