"""Models of other types for the tests, made by libllama's own quantiser."""

from __future__ import annotations

import os
from pathlib import Path

# enum llama_ftype; with `pure` every matrix gets the one type.
FTYPES = {
    "F32": 0,
    "F16": 1,
    "BF16": 32,
    "Q4_0": 2,
    "Q4_1": 3,
    "Q5_0": 8,
    "Q5_1": 9,
    "Q8_0": 7,
    "Q2_K": 10,
    "Q3_K": 12,
    "Q4_K": 15,
    "Q5_K": 17,
    "Q6_K": 18,
    "IQ3_S": 26,
    "IQ4_NL": 25,
    "IQ4_XS": 30,
}

_CALLBACKS: list[object] = []  # kept: libllama and ggml call them until the process ends


def quantise(model: Path, type_name: str, out: Path) -> Path:
    """Write ``model`` with every matrix of type ``type_name`` to ``out`` and return it."""
    from llama_cpp import llama_cpp as llama

    params = llama.llama_model_quantize_default_params()
    params.ftype = FTYPES[type_name]
    params.pure = True
    params.allow_requantize = True
    params.nthread = 2
    quiet = llama.llama_log_callback(lambda _level, _text, _data: None)
    _CALLBACKS.append(quiet)
    llama.llama_log_set(quiet, None)
    assert llama.llama_model_quantize(os.fsencode(model), os.fsencode(out), params) == 0
    return out
