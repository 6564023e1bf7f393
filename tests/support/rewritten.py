"""A GGUF written anew with other keys or tensors, by the gguf package."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path

import gguf
import numpy as np
from numpy.typing import NDArray


def rewrite(
    path: Path,
    out: Path,
    *,
    keys: Mapping[str, int] | None = None,
    add: Mapping[str, NDArray[np.float32]] | None = None,
    drop: Collection[str] = (),
) -> Path:
    """Copies a model to ``out`` with these numbers (u32) and F32 tensors, and without the tensors in ``drop``."""
    reader = gguf.GGUFReader(path)
    numbers = dict(keys or {})
    writer = gguf.GGUFWriter(out, reader.fields["general.architecture"].contents())
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture" and name not in numbers:
            item_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(name, field.contents(), field.types[0], item_type)
    for name, value in numbers.items():
        writer.add_uint32(name, value)
    for tensor in reader.tensors:
        if tensor.name not in drop:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    for name, values in (add or {}).items():
        writer.add_tensor(name, values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return out
