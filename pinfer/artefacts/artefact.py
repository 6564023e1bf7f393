"""Writes and opens pinfer's artefacts: what all files of docs/formats.md have in common.

Opening an artefact checks that it is complete, of this format version, of the right kind and of this model.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from gguf import GGUFValueType
from numpy.typing import NDArray

from pinfer.errors import PinferError
from pinfer.gguf_io.reader import GgufError, GgufFile, Tensor, read_gguf
from pinfer.gguf_io.writer import CHECKSUMS, GgufFileWriter
from pinfer.llama.plugin import load_plugin
from pinfer.model import Model, describe_activation
from pinfer.progress import NULL_PROGRESS, Progress

FORMAT_VERSION = 2

_MADE_BY = {
    "profile": "profile",
    "samples": "profile",
    "predictor": "train",
    "placement": "solve",
    "hot": "split",
    "cold": "split",
}


def made_by(kind: str, model: Model) -> str:
    """The command that makes an artefact of this kind."""
    return f"pinfer {_MADE_BY[kind]} {model.path}"


class ArtefactWriter(GgufFileWriter):
    """Writes one artefact. It begins with the keys and ends with the checksums that all artefacts have."""

    def __init__(
        self,
        path: Path,
        kind: str,
        model: Model,
        settings: Mapping[str, object],
        *,
        alignment: int = 32,
    ) -> None:
        elsewhere = "name another folder: export PINFER_HOME=FOLDER"
        super().__init__(path, "pinfer", alignment=alignment, elsewhere=elsewhere, checksum=load_plugin().checksum)
        self.header.add_uint32("pinfer.format_version", FORMAT_VERSION)
        self.header.add_string("pinfer.kind", kind)
        self.header.add_string("pinfer.model.name", model.name)
        self.header.add_string("pinfer.model.fingerprint", model.fingerprint)
        self.add_str_array("pinfer.ffns", [f.name for f in model.ffns])
        self.header.add_string("pinfer.activation", model.activation)
        self.header.add_float32("pinfer.activation_threshold", model.activation_threshold)
        self.header.add_string("pinfer.settings", json.dumps(dict(settings), sort_keys=True))

    def add_str(self, key: str, value: str) -> None:
        """A string. GGUF cannot store an empty one: it is left out and read as ``""``."""
        self.header.add_string(key, value)

    def add_u32(self, key: str, value: int) -> None:
        self.header.add_uint32(key, value)

    def add_u64(self, key: str, value: int) -> None:
        self.header.add_uint64(key, value)

    def add_f32(self, key: str, value: float) -> None:
        self.header.add_float32(key, value)

    def add_str_array(self, key: str, values: Sequence[str]) -> None:
        self._add_array(key, values, "STRING")

    def add_u32_array(self, key: str, values: Sequence[int]) -> None:
        self._add_array(key, [int(v) for v in values], "UINT32")

    def add_u64_array(self, key: str, values: Sequence[int]) -> None:
        self._add_array(key, [int(v) for v in values], "UINT64")

    def add_f32_array(self, key: str, values: Sequence[float]) -> None:
        self._add_array(key, [float(v) for v in values], "FLOAT32")

    def _add_array(self, key: str, values: Sequence[object], item: str) -> None:
        self.header.add_key_value(key, list(values), GGUFValueType.ARRAY, sub_type=GGUFValueType[item])


@dataclass(frozen=True)
class Artefact:
    """An artefact that has been opened and checked."""

    path: Path
    kind: str
    gguf: GgufFile
    settings: Mapping[str, Any]
    made_by: str
    """the command that makes it"""

    def damaged(self, cause: str) -> PinferError:
        """The error to raise for invalid content."""
        return PinferError(f"{self.path} is damaged: {cause}", f"make it again: {self.made_by}")

    def verify(self, progress: Progress = NULL_PROGRESS) -> None:
        """Reads every tensor and compares it with its checksum. Raises PinferError that names the first difference."""
        sums = self.get_list(CHECKSUMS, len(self.gguf.tensors)) if self.gguf.tensors else []
        with progress.task(f"verify {self.path.name}", self.gguf.size, "bytes") as advance:
            for tensor, wanted in zip(self.gguf.tensors.values(), sums, strict=True):
                if load_plugin().checksum(self.gguf.raw(tensor)) != wanted:
                    raise self.damaged(f"tensor {tensor.name} does not have its checksum")
                self.gguf.release()
                advance(tensor.n_bytes)

    def _get(self, key: str, kind: type | tuple[type, ...]) -> Any:
        value = self.gguf.get(key)
        if not isinstance(value, kind):
            raise self.damaged(f"its {key} is missing or of another type")
        return value

    def get_int(self, key: str) -> int:
        return int(self._get(key, int))

    def get_float(self, key: str) -> float:
        return float(self._get(key, (int, float)))

    def get_str(self, key: str) -> str:
        """A string; ``""`` if the key is missing."""
        return str(self._get(key, str)) if key in self.gguf else ""

    def get_list(self, key: str, length: int) -> list[Any]:
        """An array of exactly ``length`` items."""
        values = self._get(key, list)
        if len(values) != length:
            raise self.damaged(f"its {key} has {len(values)} items instead of {length}")
        return list(values)

    def has(self, name: str) -> bool:
        """Whether there is a tensor of that name."""
        return name in self.gguf.tensors

    def tensor(self, name: str) -> Tensor:
        """The table entry of a tensor."""
        if name not in self.gguf.tensors:
            raise self.damaged(f"it has no tensor {name}")
        return self.gguf.tensors[name]

    def array(self, name: str, shape: Sequence[int] | None = None, type_name: str | None = None) -> NDArray[Any]:
        """A tensor of plain numbers, mapped from the file, axes in numpy's order, read-only.

        ``shape``, in GGUF's order, and the type are checked if given.
        """
        tensor = self.tensor(name)
        if shape is not None and tensor.shape != tuple(shape):
            raise self.damaged(f"tensor {name} has shape {list(tensor.shape)} instead of {list(shape)}")
        if type_name is not None and tensor.type_name != type_name:
            raise self.damaged(f"tensor {name} is of type {tensor.type_name} instead of {type_name}")
        return self.gguf.array(tensor)

    def raw(self, name: str) -> NDArray[np.uint8]:
        """A tensor's bytes ``[n_rows, row_bytes]``, mapped from the file, read-only."""
        return self.gguf.raw(self.tensor(name))


def open_artefact(path: Path, kind: str, model: Model) -> Artefact:
    """Opens an artefact and checks that it is complete, of this format, of this kind and made from this model.

    Raises PinferError that names the file, the model and the command that makes it.
    """
    command = made_by(kind, model)
    again = f"make it again: {command}"
    try:
        gguf = read_gguf(path)
    except GgufError as error:
        raise PinferError(f"{path} is damaged: {error}", again) from None
    except (FileNotFoundError, NotADirectoryError):
        raise PinferError(f"{model.name} has no {kind} yet ({path} does not exist)", f"run: {command}") from None
    except OSError as error:
        raise PinferError(f"{path} cannot be read: {error.strerror or error}", again) from None
    found = gguf.get("pinfer.kind")
    version = gguf.get("pinfer.format_version")
    if gguf.get("general.architecture") != "pinfer" or not isinstance(version, int):
        raise PinferError(f"{path} is not a {kind} of pinfer", again)
    if version != FORMAT_VERSION:
        raise PinferError(f"{path} has format version {version}, this pinfer has {FORMAT_VERSION}", again)
    if found != kind:
        raise PinferError(f"{path} holds a {found}, not a {kind}", again)
    if gguf.get("pinfer.model.fingerprint") != model.fingerprint:
        made_from = gguf.get("pinfer.model.name")
        raise PinferError(f"{path} was made from another model ({made_from}) than {model.path}", again)
    if gguf.get("pinfer.ffns") != [f.name for f in model.ffns]:
        raise PinferError(f"{path} is of other FFNs than those of {model.path}", again)
    made_for = (gguf.get("pinfer.activation"), gguf.get("pinfer.activation_threshold") or 0.0)
    run_with = (model.activation, model.activation_threshold)
    if made_for != run_with:
        made, runs = describe_activation(*made_for), describe_activation(*run_with)
        raise PinferError(f"{path} was made for activation {made}, {model.name} is run with {runs}", again)
    try:
        settings = json.loads(gguf.get("pinfer.settings") or "{}")
    except (TypeError, ValueError):
        settings = None
    artefact = Artefact(path, kind, gguf, settings, command)
    if not isinstance(settings, dict):
        raise artefact.damaged("its settings cannot be read")
    return artefact


def verify_artefact(path: Path, kind: str, model: Model, progress: Progress = NULL_PROGRESS) -> None:
    """Opens an artefact and compares all of its tensors with their checksums. Raises PinferError where they differ."""
    open_artefact(path, kind, model).verify(progress)
