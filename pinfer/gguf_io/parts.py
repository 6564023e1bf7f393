"""Reads models in one or several files.

The first part has all the metadata, every part its own tensors. llama.cpp is given the first part and finds the others
beside it by their names, and so does pinfer.
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pinfer.errors import PinferError
from pinfer.gguf_io.part_names import PartName, part_name
from pinfer.gguf_io.reader import GgufError, GgufFile, Tensor, read_gguf

_AGAIN = "download all parts of one model again"


def read_model_file(path: Path) -> GgufFile:
    """The GGUF of a model, with the tensors of all its parts if it is the first of several.

    Raises GgufError or OSError if ``path`` itself cannot be read, and PinferError if it is not the first part, or if
    the other parts are missing, damaged or of another model.
    """
    first = read_gguf(path)
    number, count = _place(first)
    if count <= 1:
        return first
    name = part_name(path.name)
    if name is None or name.count != count:
        wanted = f"NAME-{number:05d}-of-{count:05d}.gguf"
        raise PinferError(
            f"{path.name} is part {number} of {count}, which llama.cpp accepts only under a name like {wanted}",
            "give all parts the names they were published with",
        )
    if name.number != number:
        raise PinferError(f"{path} is named as part {name.number}, but it is part {number} of {count}", _AGAIN)
    if number != 1:
        raise PinferError(f"{path} is part {number} of {count}", f"name the first: {path.with_name(name.sibling(1))}")
    others = tuple(_read_part(path, name, n) for n in range(2, count + 1))
    tensors = _merge((first, *others))
    wanted_tensors = first.get("split.tensors.count")
    if isinstance(wanted_tensors, int) and wanted_tensors != len(tensors):
        raise PinferError(
            f"the parts of {path} are not of one model: they have {len(tensors)} tensors, not {wanted_tensors}", _AGAIN
        )
    return replace(first, tensors=tensors, size=first.size + sum(part.size for part in others), others=others)


def _place(gguf: GgufFile) -> tuple[int, int]:
    """Which part of how many a file is, by its keys."""
    number, count = gguf.get("split.no"), gguf.get("split.count")
    return (number if isinstance(number, int) else 0) + 1, count if isinstance(count, int) else 1


def _read_part(first: Path, name: PartName, number: int) -> GgufFile:
    path = first.with_name(name.sibling(number))
    try:
        part = read_gguf(path)
    except GgufError as error:
        raise PinferError(f"cannot use {path}: {error}", "download this part again") from None
    except FileNotFoundError:
        raise PinferError(
            f"{path} is missing: {first.name} is the first of {name.count} parts", "put all parts into one folder"
        ) from None
    except OSError as error:
        raise PinferError(f"cannot read {path}: {error.strerror or error}", "check its permissions") from None
    if _place(part) != (number, name.count):
        found, count = _place(part)
        raise PinferError(f"{path} is part {found} of {count}, not part {number} of {name.count}", _AGAIN)
    return part


def _merge(parts: tuple[GgufFile, ...]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for number, part in enumerate(parts):
        for name, tensor in part.tensors.items():
            if name in tensors:
                other = parts[tensors[name].part].path.name
                raise PinferError(f"tensor {name} is both in {other} and in {part.path.name}", _AGAIN)
            tensors[name] = replace(tensor, part=number)
    return tensors
