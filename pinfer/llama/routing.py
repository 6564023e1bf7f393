"""Counts where the tokens of a mixture of experts are routed to, in libllama's own graph.

The router's choice is a node of the graph, which a callback of the scheduler may read. So any mixture can be counted,
whatever its experts compute and wherever they lie.
"""

from __future__ import annotations

import ctypes
import re
from typing import Any

import numpy as np
from numpy.typing import NDArray

from pinfer.llama.ggml import load_library

_CHOICE = re.compile(rb"ffn_moe_topk-(\d+)")
"""libllama's name for the experts chosen in a layer"""


class _Tensor(ctypes.Structure):
    """The beginning of ``struct ggml_tensor``."""

    _fields_ = (
        ("type", ctypes.c_int),
        ("buffer", ctypes.c_void_p),
        ("ne", ctypes.c_int64 * 4),
        ("nb", ctypes.c_size_t * 4),
    )


class RoutingCounter:
    """Tokens per expert, by layer, while an engine that was made with its ``callback`` computes."""

    def __init__(self, n_experts: dict[int, int]) -> None:
        """``n_experts`` of the layers to count."""
        from llama_cpp import llama_cpp as llama

        self.routed: dict[int, NDArray[np.int64]] = {layer: np.zeros(n, np.int64) for layer, n in n_experts.items()}
        """``[n_experts]``"""
        self.tokens = dict.fromkeys(n_experts, 0)
        self._ggml = load_library("ggml-base")
        self.callback: Any = llama.ggml_backend_sched_eval_callback(self._see)
        """for ``llama_context_params.cb_eval``"""

    def _see(self, tensor: int, ask: bool, _data: object) -> bool:
        """Called for every node: first to ask whether it is wanted, then, if so, when it has been computed."""
        found = _CHOICE.fullmatch(self._ggml.ggml_get_name(tensor) or b"")
        layer = int(found[1]) if found else -1
        if layer not in self.routed:
            return not ask
        if not ask:
            experts = self._read(tensor)
            self.routed[layer] += np.bincount(experts.ravel(), minlength=len(self.routed[layer]))
            self.tokens[layer] += len(experts)
        return True

    def _read(self, tensor: int) -> NDArray[np.int32]:
        """The experts of each token ``[n_tokens, n_expert_used]``: the first of all that its row ranks."""
        head = _Tensor.from_address(tensor)
        (n_used, n_tokens, *_), (_, row, *_) = head.ne, head.nb
        data = np.empty(self._ggml.ggml_nbytes(tensor), np.uint8)
        self._ggml.ggml_backend_tensor_get(tensor, data.ctypes.data, 0, data.nbytes)
        return np.ndarray((n_tokens, n_used), np.int32, data.data, strides=(row, 4))
