"""Packs the GPU kit: everything that builds, tests and measures pinfer on a GPU machine without a network.

    python kit/pack.py --sdist .cache/llama_cpp_python-0.3.36.tar.gz --wheels .cache/gpu-kit build/pinfer-gpu-kit.tar.gz

llama.cpp comes from llama-cpp-python's source distribution, and the Python packages come from the folder of wheels.
Neither is in the repository. docs/gpu.md explains how the archive is used.

The archive holds gpu.sh, the sources as sources.tar.xz, and each shipped model as an .xz file; gpu.sh unpacks them.
"""

from __future__ import annotations

import argparse
import fnmatch
import gzip
import hashlib
import io
import lzma
import re
import subprocess
import sys
import tarfile
import zipfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LIMIT = 20_000_000
PRESET = 9  # of LZMA
TOP = "kit"

README = "docs/gpu.md"
DRIVER = "kit/gpu.sh"

# Files of the repository. Of the tests only those that gpu.sh runs are packed. Left out is what serves conversion, the
# hub, the training of the shipped models and pictures.
OWN = (
    "LICENSE",
    "README.md",
    "pyproject.toml",
    "pinfer/*.py",
    "native/*",
    "kit/*",
    "models/*.py",
    "models/README.md",
    "tests/conftest.py",
    "tests/data/*",
    "tests/support/*.py",
    "tests/test_devices.py",
    "tests/test_exact.py",
    "tests/test_native.py",
)
OWN_LEFT_OUT = (
    "models/muon.py",
    "models/record_vectors.py",
    "models/tiny_*.py",
    "models/train_tiny.py",
    "native/fuzz/*",
    "pinfer/plot.py",
    "pinfer/plotting/*",
    "tests/support/checkpoint_*",
    "tests/support/hub_*",
    "tests/support/powerinfer_*",
    "tests/support/tokenizer_*",
)
MODELS = ("models/tiny-relu2.gguf", "models/tiny-reglu.gguf")

# Files of the source distribution: llama-cpp-python's Python part, and the sources of libggml (CPU, CUDA, RPC),
# libllama, the two benchmark programs, and the programs that the runner contains, with their licences.
SDIST = (
    "llama_cpp/[!s]*.py",
    "llama_cpp/py.typed",
    "LICENSE.md",
    "PKG-INFO",
)
LLAMA = (
    "LICENSE",
    "AUTHORS",
    "CMakeLists.txt",
    "licenses/*",
    "cmake/*",
    "include/*",
    "src/*",
    "common/*",
    "vendor/CMakeLists.txt",
    "vendor/nlohmann/*",
    "vendor/sheredom/*",
    "vendor/hash/*",
    "vendor/cpp-httplib/*",
    "vendor/stb/*",
    "vendor/miniaudio/*",
    "ggml/CMakeLists.txt",
    "ggml/cmake/*",
    "ggml/include/*",
    "ggml/src/CMakeLists.txt",
    "ggml/src/ggml*",
    "ggml/src/gguf.cpp",
    "scripts/ui-assets.cmake",
    "tools/batched-bench/*",
    "tools/cli/*",
    "tools/completion/*",
    "tools/llama-bench/*",
    "tools/mtmd/*",
    "tools/perplexity/*",
    "tools/server/*",
    "tools/ui/*.in",
)
# Large C headers, of which a third is comments.
LLAMA_STRIPPED = (
    "vendor/cpp-httplib/httplib.h",
    "vendor/hash/xxhash/xxhash.h",
    "vendor/miniaudio/miniaudio.h",
    "vendor/nlohmann/json.hpp",
    "vendor/stb/stb_image.h",
)
LLAMA_BACKENDS = ("ggml-cpu", "ggml-cuda", "ggml-rpc")
LLAMA_LEFT_OUT = (
    "ggml/src/ggml-cpu/arch/arm/*",
    "ggml/src/ggml-cpu/arch/loongarch/*",
    "ggml/src/ggml-cpu/arch/powerpc/*",
    "ggml/src/ggml-cpu/arch/riscv/*",
    "ggml/src/ggml-cpu/arch/s390/*",
    "ggml/src/ggml-cpu/arch/wasm/*",
    "ggml/src/ggml-cpu/spacemit/*",
    "ggml/src/ggml-cpu/kleidiai/*",
    "tools/*/bench/*",
    "tools/*/legacy-models/*",
    "tools/*/tests/*",
    "tools/mtmd/test*",
    "*/README*.md",
    "src/unused/*",
)

# Files of the wheels. Compiled parts are left out, except psutil's, which it cannot do without. Of Pygments only the
# parts that colour a test's traceback are packed.
WHEELS_LEFT_OUT = (
    "*.so",
    "*.pyx",
    "*.pxd",
    "*.h",
    "*/sboms/*",
    "*/scripts/*",
    "hypothesis/extra/*",
    "packaging/licenses/*",
    "psutil/_ps[!lu]*.py",
    "pygments/formatters/*",
    "pygments/lexers/*",
    "pygments/styles/*",
)
WHEELS_KEPT = (
    "hypothesis/extra/__init__.py",
    "psutil/_psposix.py",
    "psutil/_psutil_linux.abi3.so",
    "pygments/formatters/__init__.py",
    "pygments/formatters/_mapping.py",
    "pygments/formatters/terminal.py",
    "pygments/lexers/__init__.py",
    "pygments/lexers/_mapping.py",
    "pygments/lexers/diff.py",
    "pygments/lexers/python.py",
    "pygments/lexers/special.py",
    "pygments/styles/__init__.py",
    "pygments/styles/_mapping.py",
    "pygments/styles/default.py",
)

_C_TOKEN = re.compile(
    rb""" "(?:\\.|[^"\\\n])*" | '(?:\\.|[^'\\\n])*' | //[^\n]* | /\*.*?\*/ """, re.DOTALL | re.VERBOSE
)

Entry = tuple[str, bytes, int]
"""Name in the archive, content, mode."""


def _matches(name: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)


def own_files() -> Iterator[Entry]:
    """The repository's files as they are on disk: tracked files, and new files that are not ignored."""
    listed = subprocess.run(
        ["git", "-C", str(ROOT), "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        capture_output=True,
        check=True,
    ).stdout.decode()
    for name in sorted(set(listed.split("\0"))):
        path = ROOT / name
        if _matches(name, OWN) and not _matches(name, OWN_LEFT_OUT) and path.is_file():
            yield name, path.read_bytes(), 0o755 if path.suffix == ".sh" else 0o644


def packed_model(name: str) -> Entry:
    """A shipped model as .xz, first its even bytes and then its odd ones: the low byte of an F16 value is random."""
    data = (ROOT / name).read_bytes()
    filters = [{"id": lzma.FILTER_LZMA2, "preset": PRESET, "lc": 0, "lp": 0, "pb": 0}]
    return f"{Path(name).name}.xz", lzma.compress(data[0::2] + data[1::2], filters=filters), 0o644


def without_comments(source: bytes) -> bytes:
    """C source without comments, except for the first one, which may hold the licence."""
    first = True

    def kept(found: re.Match[bytes]) -> bytes:
        nonlocal first
        keep, first = first or not found[0].startswith(b"/"), first and not found[0].startswith(b"/")
        return found[0] if keep else b" "

    return _C_TOKEN.sub(kept, source)


def _of_llama(name: str) -> bool:
    if not _matches(name, LLAMA) or _matches(name, LLAMA_LEFT_OUT):
        return False
    backend = re.match(r"ggml/src/(ggml-[a-z0-9]+)/", name)
    return backend is None or backend[1] in LLAMA_BACKENDS


def sdist_files(sdist: Path) -> Iterator[Entry]:
    """llama.cpp's sources, llama-cpp-python's Python part, and its metadata, from which Python reads its version."""
    with tarfile.open(sdist, "r:gz") as tar:
        for member in tar:
            folder, _, name = member.name.partition("/")
            if not member.isfile():
                continue
            llama = name.removeprefix("vendor/llama.cpp/")
            if llama != name:
                target = f"llama.cpp/{llama}" if _of_llama(llama) else ""
            elif name == "PKG-INFO":
                target = f"site/{folder}.dist-info/METADATA"
            elif name == "LICENSE.md":
                target = f"site/{folder}.dist-info/licenses/LICENSE.md"
            else:
                target = f"site/{name}" if _matches(name, SDIST) else ""
            if target:
                file = tar.extractfile(member)
                assert file is not None
                data = file.read()
                yield target, without_comments(data) if llama in LLAMA_STRIPPED else data, 0o644


def wheel_files(folder: Path) -> Iterator[Entry]:
    """The files of every pinned wheel. Raises ValueError if a wheel is missing or its hash is not the pinned one."""
    found = {hashlib.sha256(path.read_bytes()).hexdigest(): path for path in sorted(folder.glob("*.whl"))}
    for name, digest in pinned_wheels():
        if digest not in found:
            raise ValueError(f"{folder} has no wheel of {name} with the pinned hash; run: make gpu-kit")
        with zipfile.ZipFile(found[digest]) as wheel:
            for info in wheel.infolist():
                dropped = _matches(info.filename, WHEELS_LEFT_OUT) and not _matches(info.filename, WHEELS_KEPT)
                if not info.is_dir() and not dropped:
                    yield f"site/{info.filename}", wheel.read(info), 0o644


def pinned_wheels() -> list[tuple[str, str]]:
    """Requirement and SHA-256 of each wheel in wheels.txt."""
    lines = (ROOT / "kit" / "wheels.txt").read_text(encoding="utf-8").splitlines()
    found = [re.fullmatch(r"(\S+) --hash=sha256:([0-9a-f]{64})", line) for line in lines if not line.startswith("#")]
    return [(m[1], m[2]) for m in found if m is not None]


def origin(sdist: Path) -> Entry:
    """The commit and the source distribution that the archive is made from; the results report them."""
    command = ["git", "-C", str(ROOT), "describe", "--always", "--dirty", "--exclude=*"]
    commit = subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()
    return "COMMIT", f"{commit} {sdist.name}\n".encode(), 0o644


def packed_sources(sdist: Path, wheels: Path) -> Entry:
    """Everything but the models and gpu.sh."""
    entries = [*own_files(), *sdist_files(sdist), *wheel_files(wheels)]
    return "sources.tar.xz", lzma.compress(tar_of(entries), preset=PRESET), 0o644


def tar_of(entries: list[Entry], folder: str = "") -> bytes:
    """A tar file. The same content always gives the same bytes."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w") as tar:
        for name, data, mode in sorted(entries):
            info = tarfile.TarInfo(folder + name)
            info.size, info.mode = len(data), mode
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def pack(out: Path, sdist: Path, wheels: Path) -> int:
    """Writes the archive to ``out``; returns its size in bytes. Above LIMIT it writes nothing and raises ValueError."""
    with ThreadPoolExecutor() as pool:
        jobs = [pool.submit(packed_sources, sdist, wheels), *(pool.submit(packed_model, name) for name in MODELS)]
        entries = [origin(sdist), *(job.result() for job in jobs)]
    entries += [("gpu.sh", (ROOT / DRIVER).read_bytes(), 0o755), ("README.md", (ROOT / README).read_bytes(), 0o644)]
    # Without mtime=0 gzip's header would hold the current time.
    archive = gzip.compress(tar_of(entries, f"{TOP}/"), mtime=0)
    if len(archive) > LIMIT:
        raise ValueError(f"the kit has {len(archive):,} bytes, more than the limit of {LIMIT:,}")
    out.parent.mkdir(parents=True, exist_ok=True)
    temporary = out.with_name(out.name + ".tmp")
    temporary.write_bytes(archive)
    temporary.replace(out)
    return len(archive)


def main() -> int:
    parser = argparse.ArgumentParser(description="Pack the GPU kit.")
    parser.add_argument("out", type=Path)
    parser.add_argument("--sdist", type=Path, required=True, help="source distribution of llama-cpp-python")
    parser.add_argument("--wheels", type=Path, required=True, help="folder with the wheels listed in wheels.txt")
    arguments = parser.parse_args()
    try:
        size = pack(arguments.out, arguments.sdist, arguments.wheels)
    except (OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    print(f"{arguments.out}: {size / 1e6:.1f} MB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
