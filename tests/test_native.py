"""pinfer.llama.plugin: the native part is found, loaded once into libllama's own ggml, and refuses another ggml."""

from __future__ import annotations

import ctypes
import os
import shutil
import subprocess
import sys
from pathlib import Path

import gguf
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pinfer.errors import PinferError
from pinfer.llama import plugin as native
from pinfer.llama.ggml import load_library

LOAD_AND_SAY_WHY_NOT = """
from pinfer.llama import plugin as native
from pinfer.errors import PinferError
try:
    native.load_plugin()
except PinferError as error:
    print(error)
"""


def run_python(code: str, **env: str) -> subprocess.CompletedProcess[str]:
    """Runs ``code`` in a process of its own, where nothing has been loaded yet."""
    return subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, **env}, capture_output=True, text=True, check=False
    )


def copy_native(folder: Path) -> Path:
    """A second native folder that only holds the plugin."""
    (folder / "lib").mkdir(parents=True)
    return Path(shutil.copy(native.plugin_path(), folder / "lib" / native.plugin_path().name))


def test_plugin_and_runner_are_there() -> None:
    assert native.plugin_path().name == "libggml-pinfer.so"
    assert os.access(native.runner_path(), os.X_OK)


def test_native_dir_is_obeyed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plugin = copy_native(tmp_path / "other")
    monkeypatch.setenv("PINFER_NATIVE_DIR", str(tmp_path / "other"))
    assert native.plugin_path() == plugin
    with pytest.raises(PinferError, match=r"pinfer-runner is missing.*make build"):
        native.runner_path()


def test_one_ggml_in_the_process() -> None:
    """Whichever comes first, the plugin or llama_cpp: one libggml, and libllama sees the device."""
    code = """
import sys
from pathlib import Path
from pinfer.llama import plugin as native
assert not native.is_loaded()
if sys.argv[1:] == ["llama"]:
    import llama_cpp
native.load_plugin()
assert native.is_loaded()
import llama_cpp
maps = Path("/proc/self/maps").read_text().splitlines()
files = sorted({line.split()[-1] for line in maps if "libggml" in line or "libgomp" in line})
print(*(Path(file).name.split(".so")[0] for file in files))
"""
    for first in ("plugin", "llama"):
        done = run_python(code.replace("sys.argv[1:]", f"['{first}']"))
        assert done.returncode == 0, done.stderr
        names = done.stdout.split()
        assert len(names) == len(set(names))
        # and the backends it was built with: RPC, CUDA, ...
        assert set(names) >= {"libggml", "libggml-base", "libggml-cpu", "libggml-pinfer", "libgomp"}


def test_loading_says_nothing() -> None:
    done = run_python("from pinfer.llama import plugin as native; native.load_plugin()")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_another_ggml_version_is_refused(tmp_path: Path) -> None:
    """A plugin that was built for another ggml, here by patching the version in the file, says so in one line."""
    base = load_library("ggml-base")
    base.ggml_version.restype = ctypes.c_char_p
    version: bytes = base.ggml_version()
    other = version[:-1] + (b"8" if version.endswith(b"9") else b"9")
    plugin = copy_native(tmp_path / "other")
    content = plugin.read_bytes()
    assert content.count(version + b"\0") >= 1
    plugin.write_bytes(content.replace(version + b"\0", other + b"\0"))

    done = run_python(LOAD_AND_SAY_WHY_NOT, PINFER_NATIVE_DIR=str(tmp_path / "other"))
    assert done.stdout.count("\n") == 1
    assert other.decode() in done.stdout
    assert version.decode() in done.stdout
    assert "make build" in done.stdout
    assert done.stderr == ""


def test_damaged_plugin_is_refused(tmp_path: Path) -> None:
    plugin = copy_native(tmp_path / "other")
    plugin.write_bytes(b"not a library")
    done = run_python(LOAD_AND_SAY_WHY_NOT, PINFER_NATIVE_DIR=str(tmp_path / "other"))
    assert str(plugin) in done.stdout
    assert "make build" in done.stdout


def test_architectures_have_their_activation() -> None:
    plugin = native.load_plugin()
    expected = {"arcee": "relu2", "nemotron": "relu2", "plm": "relu2", "jais2": "relu2", "llama": "other", "?": "other"}
    assert {arch: plugin.arch_activation(arch) for arch in expected} == expected


def test_errors_come_through(tmp_path: Path, tiny_relu2: Path) -> None:
    plugin = native.load_plugin()
    with pytest.raises(PinferError, match=r"missing\.gguf"):
        plugin.fingerprint(tmp_path / "missing.gguf")
    with pytest.raises(PinferError, match=r"missing\.gguf"):
        plugin.configure(model=tiny_relu2, cold=tmp_path / "missing.gguf")
    with pytest.raises(PinferError, match="unknown activation"):
        plugin.configure(tiny_relu2, activation="gelu")


def test_fingerprint_follows_the_content(tiny_relu2: Path, tmp_path: Path) -> None:
    plugin = native.load_plugin()
    first = plugin.fingerprint(tiny_relu2)
    assert len(first) == 32
    assert int(first, 16) >= 0
    moved = tiny_relu2.rename(tmp_path / "another name.gguf")
    assert plugin.fingerprint(moved) == first
    with moved.open("r+b") as file:
        content = file.read()
        file.seek(content.index(b"general.architecture"))
        file.write(b"general.architectura")
    assert plugin.fingerprint(moved) != first
    moved.write_bytes(content + b"\0")
    assert plugin.fingerprint(moved) != first


def test_fingerprint_sees_every_tensor(tiny_reglu: Path) -> None:
    plugin = native.load_plugin()
    before = plugin.fingerprint(tiny_reglu)
    for tensor in gguf.GGUFReader(tiny_reglu).tensors:
        with tiny_reglu.open("r+b") as file:
            file.seek(int(tensor.data_offset))
            byte = file.read(1)
            file.seek(int(tensor.data_offset))
            file.write(bytes([byte[0] ^ 1]))
            file.flush()
            assert plugin.fingerprint(tiny_reglu) != before, tensor.name
            file.seek(int(tensor.data_offset))
            file.write(byte)
    assert plugin.fingerprint(tiny_reglu) == before


def reference_checksum(data: bytes) -> int:
    """docs/formats.md, word for word."""
    word = 2**64 - 1

    def mix(state: int, value: int) -> int:
        product = (state ^ value) * 0x9E3779B97F4A7C15 & word
        return (product << 29 | product >> 35) & word

    lanes = list(range(8))
    padded = data + bytes(-len(data) % 64)
    for at in range(0, len(padded), 8):
        lanes[at // 8 % 8] = mix(lanes[at // 8 % 8], int.from_bytes(padded[at : at + 8], "little"))
    result = len(data)
    for lane in lanes:
        result = mix(result, lane)
    return result ^ result >> 32


@given(st.binary(max_size=300), st.integers(0, 299), st.integers(1, 255))
def test_checksum_is_the_documented_one_and_sees_every_byte(data: bytes, at: int, change: int) -> None:
    plugin = native.load_plugin()
    checksum = plugin.checksum(np.frombuffer(data, np.uint8))
    assert checksum == reference_checksum(data)
    if data:
        changed = bytearray(data)
        changed[at % len(data)] ^= change
        assert plugin.checksum(np.frombuffer(bytes(changed), np.uint8)) != checksum
    assert plugin.checksum(np.frombuffer(data + b"\0", np.uint8)) != checksum


def test_checksum_wants_contiguous_bytes() -> None:
    with pytest.raises(ValueError, match="contiguous"):
        native.load_plugin().checksum(np.zeros((4, 4), np.float32)[:, 1:])


def test_isa_can_be_forced() -> None:
    done = run_python(
        "from pinfer.llama import plugin as native; print(native.load_plugin().isa())", PINFER_ISA="scalar"
    )
    assert done.stdout == "scalar\n"
    done = run_python("from pinfer.llama import plugin as native; print(native.load_plugin().isa())", PINFER_ISA="mmx")
    assert done.stdout.strip() in ("avx512", "avx2", "neon", "scalar")
    assert "mmx" in done.stderr


def test_observer_ffn_that_never_ran() -> None:
    done = run_python(
        "from pathlib import Path; from pinfer.llama import plugin as native; "
        "print(native.load_plugin().observer_ffn(Path('none.gguf'), 'blk.0'))"
    )
    assert (done.returncode, done.stdout) == (0, "None\n"), done.stderr
