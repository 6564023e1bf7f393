"""The GPU kit: what is packed, its driver's command line, and the arithmetic of its benchmark, all without a GPU."""

from __future__ import annotations

import bz2
import hashlib
import importlib
import io
import json
import lzma
import os
import shutil
import subprocess
import sys
import tarfile
import time
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
from support.command_line import CommandLine

ROOT = Path(__file__).resolve().parent.parent
KIT = ROOT / "kit"
SDIST = next((ROOT / ".cache").glob("llama_cpp_python-*.tar.gz"), ROOT / ".cache" / "missing")


@pytest.fixture
def kit(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """The kit's modules, which are programs beside each other and no package."""
    monkeypatch.syspath_prepend(str(KIT))
    names = ("pack", "cases", "bench", "report", "meter", "train_layers")
    yield {name: importlib.import_module(name) for name in names}
    for name in names:
        sys.modules.pop(name, None)


# -- the archive -------------------------------------------------------------------------------------------------------


def _wheels(folder: Path, pack: ModuleType) -> tuple[Path, list[tuple[str, str]]]:
    """The pinned wheels where they were downloaded, else stand-ins of their names, with a compiled part in each."""
    downloaded = ROOT / ".cache" / "gpu-kit"
    pinned = pack.pinned_wheels()
    if downloaded.is_dir():
        return downloaded, pinned
    folder.mkdir()
    made = []
    for requirement, _ in pinned:
        name = requirement.partition("==")[0].replace("-", "_")
        name = {"pyyaml": "yaml"}.get(name.lower(), name)  # the others are imported by the name of their package
        file = folder / f"{name}-1-py3-none-any.whl"
        with zipfile.ZipFile(file, "w") as wheel:
            wheel.writestr(f"{name}/__init__.py", "")
            wheel.writestr(f"{name}/_native.so", "")
        made.append((requirement, hashlib.sha256(file.read_bytes()).hexdigest()))
    return folder, made


def test_archive_is_small_and_has_everything(
    kit: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = kit["pack"]
    wheels, pinned = _wheels(tmp_path / "wheels", pack)
    monkeypatch.setattr(pack, "pinned_wheels", lambda: pinned)
    out = tmp_path / "kit.tar.gz"
    assert pack.pack(out, SDIST, wheels) == out.stat().st_size <= 20_000_000

    with tarfile.open(out) as archive:
        outer = {member.name: member for member in archive}
        assert outer["kit/gpu.sh"].mode & 0o111
        packed = archive.extractfile("kit/sources.tar.bz2")
        model = archive.extractfile("kit/tiny-relu2.gguf.xz")
        assert packed is not None
        assert model is not None
        assert lzma.decompress(model.read()) == (ROOT / "models" / "tiny-relu2.gguf").read_bytes()
        with tarfile.open(fileobj=io.BytesIO(bz2.decompress(packed.read()))) as sources:
            names = set(sources.getnames())
    expected = {
        "pinfer/cli.py",
        "native/CMakeLists.txt",
        "native/plugin/backend.cpp",
        "models/synth.py",
        "tests/conftest.py",
        "tests/data/profile.txt",
        "kit/gpu.sh",
        "kit/bench.py",
        "kit/substitute/scipy/optimize.py",
        "LICENSE",
        "llama.cpp/LICENSE",
        "llama.cpp/licenses/LICENSE-jsonhpp",
        "llama.cpp/vendor/cpp-httplib/LICENSE",
        "llama.cpp/ggml/src/ggml-cuda/ggml-cuda.cu",
        "llama.cpp/ggml/src/ggml-cuda/template-instances/mmq-instance-q4_0.cu",
        "llama.cpp/ggml/src/ggml-cpu/ggml-cpu.c",
        "llama.cpp/ggml/src/ggml-rpc/ggml-rpc.cpp",
        "llama.cpp/src/llama.cpp",
        "llama.cpp/tools/llama-bench/llama-bench.cpp",
        "llama.cpp/tools/batched-bench/batched-bench.cpp",
        "site/llama_cpp/llama_cpp.py",
        "site/gguf/__init__.py",
        "site/typer/__init__.py",
        "site/yaml/__init__.py",
    }
    assert not expected - names
    assert any(name.startswith("site/llama_cpp_python-") and name.endswith("/METADATA") for name in names)
    assert not [name for name in names if name.endswith((".so", ".gguf")) or "__pycache__" in name]
    assert not [name for name in names if "ggml-vulkan/" in name or name.startswith("tests/checkpoints")]


def test_packing_is_reproducible_and_refuses_what_it_must(
    kit: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = kit["pack"]
    entries = [("b", b"two", 0o644), ("a", b"one", 0o755)]
    assert pack.tar_of(entries) == pack.tar_of(entries[::-1])
    with pytest.raises(ValueError, match="lacks the pinned wheel of annotated-doc"):
        list(pack.wheel_files(tmp_path))
    monkeypatch.setattr(pack, "LIMIT", 10)
    monkeypatch.setattr(pack, "packed_sources", lambda sdist, wheels: ("sources.tar.bz2", b"", 0o644))
    monkeypatch.setattr(pack, "MODELS", ())
    with pytest.raises(ValueError, match="the limit is 10"):
        pack.pack(tmp_path / "kit.tar.gz", SDIST, tmp_path)
    assert not (tmp_path / "kit.tar.gz").exists()


# -- the driver --------------------------------------------------------------------------------------------------------


def _driver(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """gpu.sh in a folder of its own, on a machine that has no nvidia-smi unless the folder's bin has one."""
    folder.mkdir(exist_ok=True)
    script = shutil.copy(KIT / "gpu.sh", folder)
    (folder / "bin").mkdir(exist_ok=True)
    kept = {name: value for name, value in os.environ.items() if name not in ("GPU", "CUDA_ARCH", "LIMIT", "WORK")}
    nowhere = folder / "bin" / "nvidia-smi"
    if not nowhere.exists():
        nowhere.write_text("#!/bin/sh\nexit 9\n")
        nowhere.chmod(0o755)
    path = f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    kept |= {"PATH": path, "PYTHON": sys.executable, **environment}
    return subprocess.run(["bash", script, *arguments], env=kept, capture_output=True, text=True, timeout=60)


def test_driver_parses_and_helps(tmp_path: Path) -> None:
    subprocess.run(["bash", "-n", str(KIT / "gpu.sh")], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "-S", "warning", str(KIT / "gpu.sh")], check=True)
    helped = _driver(tmp_path / "kit", "help")
    assert helped.returncode == 0
    assert "build | test | bench CASE | all" in helped.stdout
    assert _driver(tmp_path / "kit", "frobnicate").returncode == 2
    assert _driver(tmp_path / "kit", "bench").returncode == 2


def test_driver_without_a_gpu_says_what_to_type(tmp_path: Path) -> None:
    refused = _driver(tmp_path / "kit", "build")
    assert refused.returncode == 1
    assert "no NVIDIA GPU found" in refused.stderr
    assert "GPU=none" in refused.stderr
    assert not (tmp_path / "kit" / "out").exists()


def _sources(folder: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(folder / "sources.tar.bz2", "w:bz2") as sources:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            sources.addfile(entry, io.BytesIO(data))


def test_driver_goes_on_where_it_stopped(tmp_path: Path) -> None:
    """A kit whose sources are missing: the first step fails, is reported with its log, and leaves no stamp."""
    folder = tmp_path / "kit"
    failed = _driver(folder, "build", GPU="none")
    assert failed.returncode == 1
    assert "unpack failed" in failed.stderr
    assert "sources.tar.bz2" in failed.stderr
    assert not list((folder / "out" / "cpu" / "stamps").iterdir())

    stamps = folder / "out" / "cpu" / "stamps"
    _sources(folder, {"models/a": b"1", "kit/b": b"1"})
    again = _driver(folder, "build", GPU="none")
    assert "configure failed" in again.stderr
    assert [stamp.name for stamp in stamps.iterdir()] == ["unpack"]
    (stamps / "bench-smoke-model").touch()
    (stamps / "bench-smoke-round1").touch()
    first = {name: (folder / "src" / name).stat().st_mtime_ns for name in ("models/a", "kit/b")}

    _sources(folder, {"models/a": b"1", "kit/b": b"2"})
    _driver(folder, "build", GPU="none")
    assert {stamp.name for stamp in stamps.iterdir()} == {"unpack", "bench-smoke-model"}
    assert (folder / "src" / "models" / "a").stat().st_mtime_ns == first["models/a"], "or all would be compiled again"
    assert (folder / "src" / "kit" / "b").stat().st_mtime_ns > first["kit/b"]
    over = _driver(folder, "build", GPU="none", LIMIT="0")
    assert over.returncode == 75
    assert "call again to go on" in over.stderr


def test_driver_finds_the_architecture(tmp_path: Path) -> None:
    folder = tmp_path / "kit"
    (folder / "bin").mkdir(parents=True)
    smi = folder / "bin" / "nvidia-smi"
    smi.write_text("#!/bin/sh\nprintf '9.0\\n9.0\\n8.6\\n'\n")
    smi.chmod(0o755)
    _driver(folder, "build")
    assert (folder / "out" / "cuda-86-90").is_dir()


# -- the benchmark -----------------------------------------------------------------------------------------------------


def test_cases_shrink_with_the_room_and_keep_their_share(kit: dict[str, ModuleType]) -> None:
    from models.synth import size_of

    cases = kit["cases"]
    case = replace(cases.CASES["smoke"], model=replace(cases.CASES["smoke"].model, n_layer=12))
    sizes = cases.Sizes.of(case.model)
    assert sizes.model(12) == size_of(case.model)
    whole = cases.fit(case, sizes.files(12, "F16"))
    assert (whole.n_layer, whole.cap) == (12, case.cap)
    less = cases.fit(case, sizes.files(12, "F16") - 1)
    assert less.n_layer == 11
    assert less.cap / less.model_bytes == pytest.approx(case.cap / whole.model_bytes, rel=1e-6)
    with pytest.raises(ValueError, match="too little"):
        cases.fit(case, sizes.files(1, "F16"))


@pytest.mark.parametrize("limit", [0, 1, 7, 13, 40])
def test_largest_fitting_is_found_by_measuring(kit: dict[str, ModuleType], limit: int) -> None:
    """Sizes grow unevenly, and beyond a point the program does not run at all."""
    asked: list[int] = []

    def probe(n: int) -> int | None:
        asked.append(n)
        return 50 + 100 * n + 7 * (n % 3) if n < 30 else None

    most = 40
    best = max((n for n in range(most + 1) if n < 30 and 50 + 100 * n + 7 * (n % 3) <= 100 * limit), default=-1)
    assert kit["bench"].largest_fitting(most, 100, 100 * limit, probe) == best
    assert len(asked) == len(set(asked)) <= 14


def _recorded(kit: dict[str, ModuleType]) -> dict[str, object]:
    def side(speed: float, taken: int | None) -> dict[str, object]:
        return {"tokens_per_s": {"1": speed, "4": 2 * speed}, "device_bytes": taken}

    rounds = {
        str(n): {"pinfer": side(30.0 + n, 90), "layers": side(10.0, 95), "ffn": side(15.0 + n, 200)}
        for n in range(1, 4)
    }
    return {"case": "smoke", "n_layer": 4, "n_layer_full": 8, "cap": 100, "cap_full": 200, "rounds": rounds}


def test_summary_compares_with_the_best_way_that_kept_to_the_budget(kit: dict[str, ModuleType]) -> None:
    data = _recorded(kit)
    summary = kit["report"].summary(data, kit["cases"].CASES["smoke"])
    first = summary["rows"][0]
    assert first["best"] == "layers", "the other way took 200 bytes of 100"
    assert first["ratio"] == pytest.approx(3.2)
    assert (first["ratio_low"], first["ratio_high"]) == (pytest.approx(3.1), pytest.approx(3.3))
    assert summary["budget_kept"] is True
    rows = kit["report"].case_rows({**data, "summary": summary})
    assert len(rows) == 2
    assert "4 of 8" in rows[0]
    assert "**3.20** (3.10-3.30)" in rows[0]
    assert rows[0].count("|") == kit["report"].HEAD.splitlines()[0].count("|")


@pytest.fixture
def gpu(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A machine with an nvidia-smi that reports, in MiB, what the returned file holds."""
    level = tmp_path / "level"
    level.write_text("100")
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text(f"#!/bin/sh\ncat {level}\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{smi.parent}:{os.environ['PATH']}")
    return level


def test_meter_sees_the_peak(kit: dict[str, ModuleType], gpu: Path) -> None:
    with kit["meter"].Meter() as meter:
        gpu.write_text("350")
        time.sleep(1.0)
        gpu.write_text("100")
    assert meter.peak == 250 << 20
    with kit["meter"].Meter(False) as unused:
        pass
    assert unused.peak is None


# Takes 40 MiB, 20 more for each layer on the device and 5 for one without its FFN, while it runs.
_LLAMA = """#!{python}
import json, pathlib, sys, time
option = dict(zip(sys.argv[1::2], sys.argv[2::2]))
layers = min(int(option["-ngl"]), 9)
off = option["-ot"].count("|") - 1 if "-ot" in option else 0
level = pathlib.Path({level!r})
level.write_text(str(100 + 40 + 20 * layers - 15 * off))
time.sleep(0.5)
level.write_text("100")
for batch in map(int, option["-npl"].split(",")):
    print(json.dumps({{"pl": batch, "speed_tg": batch * (layers - 0.5 * off) / int(option["-t"])}}))
"""


def test_both_ways_of_llama_are_tuned_to_the_budget(
    kit: dict[str, ModuleType], gpu: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    llama = tmp_path / "bin" / "llama-batched-bench"
    llama.write_text(_LLAMA.format(python=sys.executable, level=str(gpu)))
    llama.chmod(0o755)
    folders = {"KIT_DEVICE": "CUDA0", "KIT_WORK": tmp_path, "KIT_RESULTS": tmp_path, "KIT_BIN": llama.parent}
    for name, value in folders.items():
        monkeypatch.setenv(name, str(value))
    monkeypatch.setattr(kit["bench"], "physical_cores", lambda: 2)
    monkeypatch.setattr(kit["bench"].Sizes, "of", lambda model: kit["cases"].Sizes(40 << 20, 20 << 20, 15 << 20))
    bench = kit["bench"].Bench(kit["cases"].CASES["smoke"])
    bench.store.put(n_layer=8, cap=(40 + 20 * 5) << 20, context_bytes=0)
    bench.do_layers()
    bench.do_ffn()
    found = json.loads((tmp_path / "smoke.json").read_text())
    assert (found["layers"]["n"], found["layers"]["arguments"]) == (5, ["-ngl", "5"])
    assert found["layers"]["threads"] == 1, "the fake one is slower with two"
    # All nine take 220; six FFNs on the CPU bring that to 130, five to 145 of 140.
    assert found["ffn"]["n"] == 2
    assert found["ffn"]["arguments"] == ["-ngl", "999", "-ot", r"blk\.(0|1|2|3|4|5)\.ffn_(up|gate|down)\.=CPU"]

    bench.store.put(cap=30 << 20)
    bench.do_layers()
    assert json.loads((tmp_path / "smoke.json").read_text())["layers"] is None


def test_training_by_layers_goes_on_and_is_what_train_writes(
    kit: dict[str, ModuleType], synthetic: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pinfer.artefacts import paths
    from pinfer.artefacts.predictor import PredictorFile
    from pinfer.model import open_model

    profile = str(ROOT / "tests" / "data" / "profile.txt")
    _pinfer("profile", str(synthetic), "--dataset", profile, "--tokens", "512", "--samples", "512")
    model = open_model(synthetic, None)
    folder = paths.artefact_dir(model.path, model.fingerprint, for_writing=False)
    by_layer = kit["train_layers"]
    fit = by_layer.fit_layer

    def interrupted(data: object, layer: int, *rest: object) -> object:
        if layer == 1:
            raise KeyboardInterrupt
        return fit(data, layer, *rest)

    monkeypatch.setattr(by_layer, "fit_layer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        by_layer.train_layers(synthetic)
    done: list[int] = []

    def counted(data: object, layer: int, *rest: object) -> object:
        done.append(layer)
        return fit(data, layer, *rest)

    monkeypatch.setattr(by_layer, "fit_layer", counted)
    by_layer.train_layers(synthetic)
    assert done == [1]
    ours = PredictorFile.read(folder / paths.PREDICTOR, model)
    _pinfer("train", str(synthetic))
    theirs = PredictorFile.read(folder / paths.PREDICTOR, model)
    assert (ours.kind, ours.recall, ours.candidates) == (theirs.kind, theirs.recall, theirs.candidates)


def _pinfer(*arguments: str) -> None:
    done = CommandLine(Path.cwd(), Path(os.environ["PINFER_HOME"]))(*arguments)
    assert done.code == 0, done.err


# -- without scipy -----------------------------------------------------------------------------------------------------

_SUBSTITUTE = """
import json, sys
import numpy as np
from scipy import linalg, optimize, sparse, special
rng = np.random.default_rng(0)
x = rng.standard_normal((40, 8)); c = x.T @ x
root = linalg.cholesky(c, lower=True, overwrite_a=True)
b = rng.standard_normal((8, 3))
values, vectors = linalg.eigh(c, subset_by_index=(5, 7))
print(json.dumps({
    "root": root.tolist(), "upper": linalg.cholesky(c).tolist(),
    "solved": linalg.solve_triangular(root, b, lower=True, trans="T").tolist(),
    "values": values.tolist(), "vectors": np.abs(vectors).tolist(),
    "ndtr": special.ndtr(np.array([-9.0, -1.0, 0.0, 2.5])).tolist(),
    "ndtri": special.ndtri(np.array([1e-9, 0.1, 0.5, 0.999])).tolist(),
}))
"""


def test_stand_in_for_scipy_gives_its_numbers() -> None:
    def run(*folders: Path) -> dict[str, list[float]]:
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))}
        done = subprocess.run([sys.executable, "-c", _SUBSTITUTE], env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found: dict[str, list[float]] = json.loads(done.stdout)
        return found

    real, ours = run(), run(KIT / "substitute")
    for name, expected in real.items():
        np.testing.assert_allclose(ours[name], expected, rtol=1e-9, atol=1e-12, err_msg=name)


def test_solve_without_scipy_places_greedily(synthetic: Path, tmp_path: Path) -> None:
    profile = str(ROOT / "tests" / "data" / "profile.txt")
    _pinfer("profile", str(synthetic), "--dataset", profile, "--tokens", "512", "--samples", "64")
    environment = {**os.environ, "PYTHONPATH": f"{KIT / 'substitute'}{os.pathsep}{ROOT}"}
    command = [sys.executable, "-m", "pinfer", "solve", str(synthetic), "--vram", "2M", "-c", "64", "--device", "CPU"]
    done = subprocess.run([*command, "--json"], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["status"] == "time limit"
    assert report["objective"] >= report["greedy"] > 0
