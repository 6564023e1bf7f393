"""Values of the nodes of a graph, as stock libllama computes it."""

from __future__ import annotations

import ctypes
import os
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from pinfer.llama.ggml import load_library


def graph_values(
    path: Path, tokens: Sequence[int], wanted: Callable[[str, str], bool]
) -> list[tuple[str, NDArray[np.float32]]]:
    """The F32 nodes for which ``wanted(name, operation)`` holds, in order, flat, for one batch of ``tokens``.

    The operation is ggml's description of it, as RELU or MUL_MAT_ID.
    """
    from llama_cpp import llama_cpp as llama

    ggml = load_library("ggml-base")
    for function, result in (("ggml_get_name", ctypes.c_char_p), ("ggml_op_desc", ctypes.c_char_p)):
        getattr(ggml, function).argtypes = [ctypes.c_void_p]
        getattr(ggml, function).restype = result
    ggml.ggml_nelements.argtypes = [ctypes.c_void_p]
    ggml.ggml_nelements.restype = ctypes.c_int64
    ggml.ggml_backend_tensor_get.argtypes = [ctypes.c_void_p, ctypes.c_void_p, ctypes.c_size_t, ctypes.c_size_t]
    found: list[tuple[str, NDArray[np.float32]]] = []

    def see(tensor: int, ask: bool, _data: object) -> bool:
        name = ggml.ggml_get_name(tensor).decode()
        if not wanted(name, ggml.ggml_op_desc(tensor).decode()):
            return not ask
        if not ask:
            values = np.empty(ggml.ggml_nelements(tensor), np.float32)
            ggml.ggml_backend_tensor_get(tensor, values.ctypes.data, 0, values.nbytes)
            found.append((name, values))
        return True

    callback = llama.ggml_backend_sched_eval_callback(see)
    model = llama.llama_model_load_from_file(os.fsencode(path), llama.llama_model_default_params())
    params = llama.llama_context_default_params()
    params.n_ctx = params.n_batch = params.n_ubatch = len(tokens)
    params.n_threads = params.n_threads_batch = 1
    params.cb_eval = callback
    context = llama.llama_init_from_model(model, params)
    batch = llama.llama_batch_init(len(tokens), 0, 1)
    batch.n_tokens = len(tokens)
    for i, token in enumerate(tokens):
        batch.token[i], batch.pos[i], batch.n_seq_id[i], batch.seq_id[i][0] = token, i, 1, 0
        batch.logits[i] = True  # else the last layer would compute the last token only
    assert llama.llama_decode(context, batch) == 0
    llama.llama_batch_free(batch)
    llama.llama_free(context)
    llama.llama_model_free(model)
    return found
