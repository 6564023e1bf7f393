"""Writing and opening pinfer's artefacts: what every file of docs/formats.md has in common.

A file is written under a temporary name, fsynced and renamed, so that an interrupted command leaves the old one whole.
An artefact that is opened has been checked: it is whole, of this format version, of the kind asked for, of this model.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, BinaryIO, Self

from pinfer.errors import PinferError
from pinfer.gguf_file import GgufError, GgufFile, Tensor, read_gguf, type_size

if TYPE_CHECKING:
    import numpy as np
    from gguf import GGUFWriter
    from numpy.typing import NDArray

    from pinfer.model import Model

FORMAT_VERSION = 1

_MADE_BY = {
    "profile": "profile",
    "samples": "profile",
    "predictor": "train",
    "placement": "solve",
    "hot": "split",
    "cold": "split",
}
_NO_SPACE = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def fingerprint(path: Path) -> str:
    """Fingerprint of a GGUF: 32 hex digits, by the plugin's ``pinfer_fingerprint``."""
    from pinfer.native import load_plugin

    return load_plugin().fingerprint(path)


def mending_command(kind: str, model: Model) -> str:
    """What to type to get an artefact of this kind made (again)."""
    return f"pinfer {_MADE_BY[kind]} {model.path}"


def _write_error(path: Path, error: OSError) -> PinferError:
    if error.errno in _NO_SPACE:
        return PinferError(
            f"no space left while writing {path}; what was there before is untouched",
            "free some space, or name another folder: export PINFER_HOME=FOLDER",
        )
    return PinferError(
        f"cannot write {path}: {error.strerror or error}", "name another folder: export PINFER_HOME=FOLDER"
    )


def _remove_leftovers(path: Path) -> None:
    """Removes the temporary files of commands that were killed; those of living processes stay."""
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        pid = leftover.name.removesuffix(".tmp").rpartition(".")[2]
        if not pid.isdigit() or not Path("/proc", pid).exists():
            leftover.unlink(missing_ok=True)


class ArtefactWriter:
    """Writes one artefact: keys and tensors are declared first, then each tensor's data is streamed in that order.

    ``with ArtefactWriter(path, "profile", model, settings) as out`` puts the file in place when the block is left
    without an exception, and removes every trace of it otherwise. Several files that belong together are put in place
    by ``replace_together`` at the end of the block. Raises PinferError when the disk is full or cannot be written.
    """

    def __init__(
        self,
        path: Path,
        kind: str,
        model: Model,
        settings: Mapping[str, object],
        *,
        alignment: int = 32,
    ) -> None:
        from gguf import GGUFWriter

        self.path = path
        self._alignment = alignment
        self._temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
        self._file: BinaryIO | None = None
        self._finished = False
        self._in_place = False
        self._sizes: dict[str, int] = {}
        self._small: dict[str, NDArray[Any]] = {}
        self._queue: list[str] = []
        self._left = 0
        header = GGUFWriter(None, "pinfer")
        header.data_alignment = alignment
        if alignment != 32:
            header.add_custom_alignment(alignment)
        header.add_uint32("pinfer.format_version", FORMAT_VERSION)
        header.add_string("pinfer.kind", kind)
        header.add_string("pinfer.model.name", model.name)
        header.add_string("pinfer.model.fingerprint", model.fingerprint)
        header.add_uint32("pinfer.n_layer", model.n_layer)
        header.add_uint32("pinfer.n_embd", model.n_embd)
        header.add_uint32("pinfer.n_ff", model.n_ff)
        header.add_string("pinfer.activation", model.activation)
        header.add_string("pinfer.settings", json.dumps(dict(settings), sort_keys=True))
        self._header: GGUFWriter = header

    def add_str(self, key: str, value: str) -> None:
        """A string; GGUF has no place for an empty one, so that is left out and reads as ``""``."""
        self._header.add_string(key, value)

    def add_u32(self, key: str, value: int) -> None:
        self._header.add_uint32(key, value)

    def add_u64(self, key: str, value: int) -> None:
        self._header.add_uint64(key, value)

    def add_f32(self, key: str, value: float) -> None:
        self._header.add_float32(key, value)

    def add_str_array(self, key: str, values: Sequence[str]) -> None:
        self._add_array(key, values, "STRING")

    def add_u32_array(self, key: str, values: Sequence[int]) -> None:
        self._add_array(key, [int(v) for v in values], "UINT32")

    def add_f32_array(self, key: str, values: Sequence[float]) -> None:
        self._add_array(key, [float(v) for v in values], "FLOAT32")

    def _add_array(self, key: str, values: Sequence[object], item: str) -> None:
        from gguf import GGUFValueType

        self._header.add_key_value(key, list(values), GGUFValueType.ARRAY, sub_type=GGUFValueType[item])

    def declare(self, name: str, shape: Sequence[int], ggml_type: int | str) -> None:
        """A tensor whose data ``write`` will bring.

        ``shape`` is GGUF's order; the type is ggml's number or a name (``"I8"``).
        """
        import numpy as np
        from gguf import GGMLQuantizationType

        kind = GGMLQuantizationType[ggml_type] if isinstance(ggml_type, str) else GGMLQuantizationType(ggml_type)
        block, n_bytes = type_size(kind)
        if shape[0] % block:
            raise ValueError(f"{name}: rows of {shape[0]} do not fit {kind.name}")
        n_bytes *= shape[0] // block
        for n in shape[1:]:
            n_bytes *= n
        self._header.add_tensor_info(name, tuple(shape)[::-1], np.dtype(np.int8), n_bytes, raw_dtype=kind)
        self._sizes[name] = n_bytes

    def add_array(self, name: str, array: NDArray[Any]) -> None:
        """A small tensor of plain numbers, declared and kept until its turn to be written comes."""
        import numpy as np

        names = {"f4": "F32", "f2": "F16", "f8": "F64", "i1": "I8", "i2": "I16", "i4": "I32", "i8": "I64"}
        self.declare(name, array.shape[::-1], names[array.dtype.str[1:]])
        self._small[name] = np.ascontiguousarray(array)

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors declared so far, with their padding."""
        return sum(self._padded(n) for n in self._sizes.values())

    def _padded(self, n: int) -> int:
        return -(-n // self._alignment) * self._alignment

    @property
    def temporary(self) -> Path:
        """Where the file lies until it is put in place."""
        return self._temporary

    def begin(self, also: int = 0) -> None:
        """Checks the free space, makes the temporary file and writes the header; ``write`` does it where needed.

        ``also`` are bytes that another file of the same command will take.
        """
        if self._file is not None:
            return
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(self.path)
            free = shutil.disk_usage(self.path.parent).free
            needed = self.n_bytes + also
            if free < needed:
                raise PinferError(
                    f"{self.path.name} needs {needed / 1e6:.1f} MB, {self.path.parent} has {free / 1e6:.1f} MB free",
                    "free some space, or name another folder: export PINFER_HOME=FOLDER",
                )
            self._header.write_header_to_file(self._temporary)
            assert self._header.fout is not None
            self._file = self._header.fout[0]
            self._header.write_kv_data_to_file()
            self._header.write_ti_data_to_file()
            self._pad()
        except OSError as error:
            raise _write_error(self.path, error) from error
        self._queue = list(self._sizes)
        self._left = self._sizes[self._queue[0]] if self._queue else 0
        self._write_small()

    def _write_small(self) -> None:
        """Writes the tensors whose data is known as their turn comes."""
        while self._queue and (data := self._small.pop(self._queue[0], None)) is not None:
            self._append(self._queue[0], data)

    def write(self, name: str, data: NDArray[Any] | bytes) -> None:
        """The next piece of a declared tensor; tensors are filled in the order they were declared."""
        self.begin()
        if not self._queue or self._queue[0] != name:
            raise ValueError(f"{name} is not the tensor that is due ({self._queue[:1]})")
        self._append(name, data)
        self._write_small()

    def _append(self, name: str, data: NDArray[Any] | bytes) -> None:
        import numpy as np

        piece = memoryview(data if isinstance(data, bytes) else np.ascontiguousarray(data).data).cast("B")
        if piece.nbytes > self._left:
            raise ValueError(f"{name} gets {piece.nbytes - self._left} bytes too many")
        assert self._file is not None
        try:
            self._file.write(piece)
            self._left -= piece.nbytes
            if self._left == 0:
                self._pad()
                self._queue.pop(0)
                self._left = self._sizes[self._queue[0]] if self._queue else 0
        except OSError as error:
            raise _write_error(self.path, error) from error

    def _pad(self) -> None:
        assert self._file is not None
        self._file.write(bytes(-self._file.tell() % self._alignment))

    def finish(self) -> None:
        """Everything is written: flush it to the disk. The file keeps its temporary name."""
        if self._finished:
            return
        self.begin()
        if self._queue:
            raise ValueError(f"{self._queue[0]} was declared and not written")
        assert self._file is not None
        try:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
        except OSError as error:
            raise _write_error(self.path, error) from error
        self._finished = True

    def put_in_place(self) -> None:
        """Gives the finished file its name, replacing the old one."""
        self.finish()
        if self._in_place:
            return
        try:
            os.replace(self._temporary, self.path)
            self._in_place = True
            folder = os.open(self.path.parent, os.O_RDONLY)
            try:
                os.fsync(folder)
            finally:
                os.close(folder)
        except OSError as error:
            raise _write_error(self.path, error) from error

    def discard(self) -> None:
        """Removes the temporary file; the old artefact stays."""
        if self._in_place:
            return
        if self._file is not None and not self._finished:
            # A full disk makes closing fail as well, for buffered bytes are written then; they are not wanted.
            with contextlib.suppress(OSError):
                self._file.close()
        self._temporary.unlink(missing_ok=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            try:
                self.put_in_place()
            finally:
                self.discard()
        else:
            self.discard()


def replace_together(writers: Sequence[ArtefactWriter]) -> None:
    """Puts files that belong together in place, once all of them are safely on the disk."""
    for writer in writers:
        writer.finish()
    for writer in writers:
        writer.put_in_place()


@dataclass(frozen=True)
class Artefact:
    """An artefact that was opened and checked."""

    path: Path
    kind: str
    gguf: GgufFile
    settings: Mapping[str, Any]
    mend: str
    """the command that makes it again"""

    def damaged(self, cause: str) -> PinferError:
        """The error to raise when the content makes no sense."""
        return PinferError(f"{self.path} is damaged: {cause}", f"make it again: {self.mend}")

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
        """A string, ``""`` where the key is absent."""
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
        """A tensor of plain numbers where it lies, axes in numpy's order, read-only.

        ``shape`` is GGUF's order and is checked where given, as is the type.
        """
        tensor = self.tensor(name)
        if shape is not None and tensor.shape != tuple(shape):
            raise self.damaged(f"tensor {name} has shape {list(tensor.shape)} instead of {list(shape)}")
        if type_name is not None and tensor.type_name != type_name:
            raise self.damaged(f"tensor {name} is of type {tensor.type_name} instead of {type_name}")
        return self.gguf.array(tensor)

    def raw(self, name: str) -> NDArray[np.uint8]:
        """A tensor's bytes where they lie, ``[n_rows, row_bytes]``, read-only."""
        return self.gguf.raw(self.tensor(name))


def open_artefact(path: Path, kind: str, model: Model) -> Artefact:
    """Opens an artefact and checks that it is whole, of this format, of this kind and made from this model.

    Raises PinferError that names the file, the model and the command that mends it.
    """
    mend = mending_command(kind, model)
    again = f"make it again: {mend}"
    try:
        gguf = read_gguf(path)
    except GgufError as error:
        raise PinferError(f"{path} is damaged: {error}", again) from None
    except (FileNotFoundError, NotADirectoryError):
        raise PinferError(f"{model.name} has no {kind} yet ({path} does not exist)", f"run: {mend}") from None
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
    shape = (model.n_layer, model.n_embd, model.n_ff)
    if tuple(gguf.get(f"pinfer.{key}") for key in ("n_layer", "n_embd", "n_ff")) != shape:
        raise PinferError(f"{path} has another shape than {model.path}", again)
    if gguf.get("pinfer.activation") != model.activation:
        made_for = gguf.get("pinfer.activation")
        raise PinferError(
            f"{path} was made for activation {made_for}, {model.name} is run with {model.activation}", again
        )
    try:
        settings = json.loads(gguf.get("pinfer.settings") or "{}")
    except (TypeError, ValueError):
        raise PinferError(f"{path} is damaged: its settings cannot be read", again) from None
    return Artefact(path, kind, gguf, settings, mend)
