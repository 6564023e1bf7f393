"""libllama's tokenizer for a GGUF that holds only a vocabulary; used to check converted vocabularies."""

from __future__ import annotations

import ctypes
import os
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from pinfer.errors import PinferError
from pinfer.llama import log

if TYPE_CHECKING:
    from gguf import GGUFWriter

_PRE_KEY = b"tokenizer.ggml.pre"
_STRING = 8  # enum gguf_type
_N_KV_OFFSET = 16  # magic, version and the number of tensors come before it


class LlamaVocab:
    """The vocabulary of a GGUF, loaded by libllama; a context manager that frees it at the end."""

    def __init__(self, path: Path) -> None:
        """Raises PinferError with libllama's last log lines if it rejects the file."""
        from llama_cpp import llama_cpp as llama

        self._llama: Any = llama
        self._model: Any = None
        log.capture()
        llama.llama_backend_init()
        params = llama.llama_model_default_params()
        params.vocab_only = True
        self._model = llama.llama_model_load_from_file(os.fsencode(path), params)
        if not self._model:
            raise PinferError(f"libllama rejects the tokenizer: {log.last_words()}", "check the checkpoint's files")
        self._vocab = llama.llama_model_get_vocab(self._model)
        self.n_tokens: int = llama.llama_vocab_n_tokens(self._vocab)
        self._room = 256
        self._ids: Any = (llama.llama_token * self._room)()

    def tokenize(self, text: str, *, parse_special: bool = False, add_special: bool = False) -> list[int]:
        """Ids of ``text``. ``parse_special`` parses control tokens in it, ``add_special`` adds BOS and EOS."""
        data = text.encode("utf-8")
        while True:
            n = self._llama.llama_tokenize(
                self._vocab, data, len(data), self._ids, self._room, add_special, parse_special
            )
            if n >= 0:
                return list(self._ids[:n])
            self._room = 2 * -n
            self._ids = (self._llama.llama_token * self._room)()

    def piece(self, token: int) -> bytes:
        """The bytes that ``token`` stands for; for control tokens, their name."""
        room = 64
        while True:
            buffer = ctypes.create_string_buffer(room)
            n = self._llama.llama_token_to_piece(self._vocab, token, buffer, room, 0, True)
            if n >= 0:
                return buffer.raw[:n]
            room = -n

    def close(self) -> None:
        """Free the vocabulary. Safe to call twice."""
        if self._model:
            self._llama.llama_model_free(self._model)
            self._model = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class VocabFile:
    """A GGUF that holds only a tokenizer. Its pre-tokenizer can be changed without rewriting the rest."""

    def __init__(self, path: Path, header: GGUFWriter) -> None:
        """Write the keys of ``header``, which must not contain ``tokenizer.ggml.pre``."""
        self.path = path
        header.write_header_to_file(path)
        header.write_kv_data_to_file()
        header.close()
        with open(path, "rb+") as file:
            file.seek(_N_KV_OFFSET)
            n_kv = struct.unpack("<Q", file.read(8))[0]
            file.seek(_N_KV_OFFSET)
            file.write(struct.pack("<Q", n_kv + 1))
            self._end = file.seek(0, os.SEEK_END)

    def set_pre(self, name: str) -> None:
        """Make ``name`` the pre-tokenizer."""
        value = name.encode()
        with open(self.path, "rb+") as file:
            file.truncate(self._end)
            file.seek(self._end)
            file.write(struct.pack("<Q", len(_PRE_KEY)) + _PRE_KEY + struct.pack("<I", _STRING))
            file.write(struct.pack("<Q", len(value)) + value)
