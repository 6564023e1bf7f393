"""What every conversion is made of: metadata, and a list of tensors that load one by one."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
from gguf import GGUFWriter
from numpy.typing import NDArray

__all__ = ["ConvertPlan", "PlannedTensor"]


@dataclass(frozen=True)
class PlannedTensor:
    """One tensor of the GGUF to be written.

    Exactly one of ``load`` and ``raw`` is set. Both read from disk when called, and keep nothing.
    """

    name: str
    """as libllama looks it up: ``blk.0.ffn_up.weight``"""
    shape: tuple[int, ...]
    """GGUF's order: ``shape[0]`` is the contiguous axis"""
    n_source_bytes: int
    """bytes read from the source for it, which progress counts"""
    load: Callable[[], NDArray[Any]] | None = None
    """the values, ``[n_rows, row_length]`` or ``[row_length]``, of any floating-point type"""
    raw: Callable[[], NDArray[np.uint8]] | None = None
    """the bytes as they go into the file, of type ``type_name``"""
    type_name: str | None = None
    """the type in the file; None: the conversion's for a matrix, F32 for a vector"""

    @staticmethod
    def constant(name: str, n: int, value: float) -> PlannedTensor:
        """A vector ``[n]`` of one value, for what a graph needs and a checkpoint lacks."""
        return PlannedTensor(name, (n,), 0, load=partial(np.full, n, value, np.float32), type_name="F32")


@dataclass(frozen=True)
class ConvertPlan:
    """A model about to be written."""

    arch: str
    """GGUF's ``general.architecture``"""
    activation: str
    """``relu``, ``relu2``, ``reglu``, ``drelu`` or ``other``"""
    add_metadata: Callable[[GGUFWriter], None]
    """adds every key but ``general.architecture``, ``general.file_type`` and the ``pinfer.`` ones"""
    tensors: Sequence[PlannedTensor]
    activation_threshold: float = 0.0
    names_activation: bool = True
    """whether the GGUF needs ``pinfer.ffn.activation``, because stock libllama's graph computes another"""
    notes: Sequence[str] = field(default=())
    """what the user should know, a line each"""
    settings: Mapping[str, object] = field(default_factory=dict)
    """facts for ``--json``"""
