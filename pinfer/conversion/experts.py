"""Mixtures of experts: a checkpoint has a matrix for each expert, a GGUF one stack for all of a layer."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pinfer.conversion.checkpoint import Checkpoint, CheckpointTensor
from pinfer.conversion.hints import DOWNLOAD_AGAIN
from pinfer.conversion.plan import PlannedTensor
from pinfer.errors import PinferError

_EXPERT = re.compile(r"(?:.*\.)?layers\.(\d+)\..*\bexperts\.(\d+)\.(w[123]|(?:gate|up|down)_proj)\.weight$")
_STACKS = {"w1": "gate", "w2": "down", "w3": "up", "gate_proj": "gate", "up_proj": "up", "down_proj": "down"}


def is_expert(name: str) -> bool:
    """Whether a checkpoint's tensor is one expert's matrix."""
    return _EXPERT.match(name) is not None


def stacked_experts(checkpoint: Checkpoint) -> list[PlannedTensor]:
    """The stacks of all layers. Raises PinferError where experts are missing or differ in shape."""
    found: defaultdict[str, dict[int, CheckpointTensor]] = defaultdict(dict)
    for name, tensor in checkpoint.tensors.items():
        if (part := _EXPERT.match(name)) is not None:
            found[f"blk.{part[1]}.ffn_{_STACKS[part[3]]}_exps.weight"][int(part[2])] = tensor
    planned = []
    for name, experts in found.items():
        n_expert = checkpoint.integer("n_routed_experts", "num_local_experts", "num_experts")
        shapes = {tensor.shape for tensor in experts.values()}
        if set(experts) != set(range(n_expert)) or len(shapes) != 1:
            raise PinferError(
                f"{checkpoint.folder} has {len(experts)} experts of {len(shapes)} shapes for {name}, "
                f"config.json says {n_expert}",
                DOWNLOAD_AGAIN,
            )
        tensors = [experts[number] for number in range(n_expert)]
        load: Callable[[], NDArray[Any]] = partial(_load_stack, tensors)
        shape = (*tensors[0].shape[::-1], n_expert)
        planned.append(PlannedTensor(name, shape, sum(tensor.n_bytes for tensor in tensors), load=load))
    return planned


def _load_stack(tensors: list[CheckpointTensor]) -> NDArray[Any]:
    first = tensors[0].load()
    stack = np.empty((len(tensors), *first.shape), first.dtype)
    for number, tensor in enumerate(tensors):
        stack[number] = tensor.load()
    return stack
