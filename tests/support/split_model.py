"""Models in several files, written by the gguf package as a converter writes them."""

from __future__ import annotations

from pathlib import Path

import gguf


def split_model(path: Path, folder: Path, n_parts: int = 3, *, bare_first: bool = False) -> list[Path]:
    """Writes the model in parts to ``folder``; returns their paths in order. A bare first part has no tensors."""
    reader = gguf.GGUFReader(path)
    size = -(-len(reader.tensors) // (n_parts - bare_first))
    arch = reader.fields["general.architecture"].contents()
    target = folder / path.name
    out = gguf.GGUFWriter(target, arch, split_max_tensors=size, small_first_shard=bare_first)
    for name, field in reader.fields.items():
        if not name.startswith("GGUF.") and name != "general.architecture":
            item_type = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            out.add_key_value(name, field.contents(), field.types[0], item_type)
    for tensor in reader.tensors:
        out.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    parts = [target.with_name(f"{path.stem}-{i:05d}-of-{n_parts:05d}.gguf") for i in range(1, n_parts + 1)]
    assert all(part.is_file() for part in parts), parts
    return parts
