"""Writing a GGUF file as a stream: tensors are declared first, then filled one by one.

A file is written under a temporary name, fsynced and renamed, so that an interrupted command leaves the old file whole.
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import secrets
import shutil
from collections.abc import Callable, Iterator, Sequence
from math import prod
from pathlib import Path
from types import TracebackType
from typing import Any, BinaryIO, Self

import numpy as np
from gguf import GGMLQuantizationType, GGUFValueType, GGUFWriter
from numpy.typing import NDArray

from pinfer.errors import NO_SPACE, PinferError
from pinfer.gguf_io.reader import read_gguf, row_bytes, type_number

CHECKSUMS = "pinfer.checksums"
"""key of the checksums of all tensors, in the order of the file"""

_TOKEN = secrets.token_hex(4)
"""in the names of this process's temporary files; process numbers repeat in other containers"""
_TYPE_NAMES = {"f4": "F32", "f2": "F16", "f8": "F64", "i1": "I8", "i2": "I16", "i4": "I32", "i8": "I64"}


@contextlib.contextmanager
def temporary_file(path: Path, kind: str = "") -> Iterator[Path]:
    """An empty file beside ``path`` to be renamed to it; removed at the end of the block if it is still there.

    Other commands recognise it as in use by its lock, which ends with this process even if that is killed.
    """
    name = path.with_name(f".{path.name}.{kind}{_TOKEN}.tmp")
    with contextlib.ExitStack() as stack:
        stack.callback(name.unlink, missing_ok=True)  # registered first: Ctrl-C may come as soon as the file is there
        file = stack.enter_context(name.open("ab"))
        with contextlib.suppress(OSError):  # a file system without locks
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield name


def _remove_leftovers(path: Path) -> None:
    """Removes the temporary files of commands that were killed: those that no process has locked."""
    for leftover in path.parent.glob(f".{path.name}.*.tmp"):
        with contextlib.suppress(OSError), leftover.open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            leftover.unlink(missing_ok=True)


class GgufFileWriter:
    """Writes one GGUF file: keys and tensors are declared first, then each tensor's data is streamed in that order.

    ``with GgufFileWriter(path, "llama") as out`` puts the file in place at the end of the block, or removes every trace
    of it if the block raises. ``replace_together`` puts several files in place at once. ``elsewhere`` tells a user with
    a full disk how to write to another one. The ``checksum`` of each tensor's bytes goes into the header. Raises
    PinferError if the disk is full or cannot be written.
    """

    def __init__(
        self,
        path: Path,
        arch: str,
        *,
        alignment: int = 32,
        elsewhere: str = "name another folder",
        checksum: Callable[[NDArray[Any]], int] | None = None,
    ) -> None:
        self.path = path
        self._alignment = alignment
        self._elsewhere = elsewhere
        self._checksum = checksum
        self._temporary = path.with_name(f".{path.name}.{_TOKEN}.tmp")
        self._held = contextlib.ExitStack()
        self._file: BinaryIO | None = None
        self._finished = False
        self._in_place = False
        self._sizes: dict[str, int] = {}
        self._small: dict[str, NDArray[Any]] = {}
        self._queue: list[str] = []
        self._left = 0
        self.header: GGUFWriter = GGUFWriter(None, arch)
        """takes metadata until ``begin``"""
        self.header.data_alignment = alignment
        if alignment != 32:
            self.header.add_custom_alignment(alignment)

    def declare(self, name: str, shape: Sequence[int], ggml_type: int | str) -> None:
        """Declares a tensor. ``shape`` is in GGUF's order; the type is ggml's number or a name (``"I8"``)."""
        kind = GGMLQuantizationType(type_number(ggml_type) if isinstance(ggml_type, str) else ggml_type)
        n_bytes = row_bytes(kind, shape[0]) * prod(shape[1:])
        self.header.add_tensor_info(name, tuple(shape)[::-1], np.dtype(np.int8), n_bytes, raw_dtype=kind)
        self._sizes[name] = n_bytes

    def add_array(self, name: str, array: NDArray[Any]) -> None:
        """Declares a small tensor of plain numbers, which is kept until it is its turn to be written."""
        self.declare(name, array.shape[::-1], _TYPE_NAMES[array.dtype.str[1:]])
        self._small[name] = np.ascontiguousarray(array)

    @property
    def n_bytes(self) -> int:
        """Bytes of all tensors declared so far, with their padding."""
        return sum(self._padded(n) for n in self._sizes.values())

    def _padded(self, n: int) -> int:
        return -(-n // self._alignment) * self._alignment

    @property
    def temporary(self) -> Path:
        """Path of the file until it is put in place."""
        return self._temporary

    def begin(self, also: int = 0) -> None:
        """Checks the free space, creates the temporary file and writes the header; called by ``write`` if needed.

        ``also`` is the size of another file that the same command will write.
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
                    f"free some space, or {self._elsewhere}",
                )
            if self._checksum and self._sizes:
                zeros = [0] * len(self._sizes)
                self.header.add_key_value(CHECKSUMS, zeros, GGUFValueType.ARRAY, sub_type=GGUFValueType.UINT64)
            self._held.enter_context(temporary_file(self.path))
            self.header.write_header_to_file(self._temporary)
            assert self.header.fout is not None
            self._file = self.header.fout[0]
            self.header.write_kv_data_to_file()
            self.header.write_ti_data_to_file()
            self._pad()
        except OSError as error:
            raise self._error(error) from error
        self._queue = list(self._sizes)
        self._left = self._sizes[self._queue[0]] if self._queue else 0
        self._write_small()

    def _write_checksums(self, checksum: Callable[[NDArray[Any]], int]) -> None:
        """Reads the tensors back, mostly from the page cache, and replaces the zeros in the header."""
        assert self._file is not None
        written = read_gguf(self._temporary)
        self._file.seek(written.array_offset(CHECKSUMS))
        for tensor in written.tensors.values():
            self._file.write(checksum(written.raw(tensor)).to_bytes(8, "little"))
            written.release()
        self._file.flush()

    def reserve(self) -> None:
        """Gives the temporary file its final length, so that it can be read before its tensors are written."""
        self.begin()
        assert self._file is not None
        try:
            self._file.flush()
            os.truncate(self._temporary, self._file.tell() + self.n_bytes)
        except OSError as error:
            raise self._error(error) from error

    def _write_small(self) -> None:
        """Writes the next tensors whose data is already known."""
        while self._queue and (data := self._small.pop(self._queue[0], None)) is not None:
            self._append(self._queue[0], data)

    def write(self, name: str, data: NDArray[Any] | bytes) -> None:
        """Appends to a declared tensor. Tensors are written in the order they were declared."""
        self.begin()
        if not self._queue or self._queue[0] != name:
            raise ValueError(f"{name} is not the tensor that is due ({self._queue[:1]})")
        self._append(name, data)
        self._write_small()

    def _append(self, name: str, data: NDArray[Any] | bytes) -> None:
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
            raise self._error(error) from error

    def _error(self, error: OSError) -> PinferError:
        if error.errno in NO_SPACE:
            return PinferError(
                f"no space left while writing {self.path}; what was there before is untouched",
                f"free some space, or {self._elsewhere}",
            )
        return PinferError(f"cannot write {self.path}: {error.strerror or error}", self._elsewhere)

    def _pad(self) -> None:
        assert self._file is not None
        self._file.write(bytes(-self._file.tell() % self._alignment))

    def finish(self) -> None:
        """Flushes the complete file to the disk. It keeps its temporary name."""
        if self._finished:
            return
        self.begin()
        if self._queue:
            raise ValueError(f"{self._queue[0]} was declared but not written")
        assert self._file is not None
        try:
            self._file.flush()
            if self._checksum and self._sizes:
                self._write_checksums(self._checksum)
            os.fsync(self._file.fileno())
            self._file.close()
        except OSError as error:
            raise self._error(error) from error
        self._finished = True

    def put_in_place(self) -> None:
        """Renames the finished file, replacing the old one."""
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
            raise self._error(error) from error

    def discard(self) -> None:
        """Removes the temporary file, if it is not in place; the old file stays."""
        if self._file is not None and not self._finished:
            # Closing writes buffered bytes, which fails again on a full disk.
            with contextlib.suppress(OSError):
                self._file.close()
        self._held.close()

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


def replace_together(writers: Sequence[GgufFileWriter]) -> None:
    """Puts files that belong together in place once all of them are on the disk."""
    for writer in writers:
        writer.finish()
    for writer in writers:
        writer.put_in_place()
