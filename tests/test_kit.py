"""The GPU kit without a GPU: the archive, gpu.sh's command line, and the benchmark's arithmetic."""

from __future__ import annotations

import hashlib
import importlib
import io
import json
import lzma
import os
import re
import shutil
import subprocess
import sys
import tarfile
import time
import tomllib
import zipfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest
from support.command_line import CommandLine

ROOT = Path(__file__).resolve().parent.parent
KIT = ROOT / "kit"
SDIST = next((ROOT / ".cache").glob("llama_cpp_python-*.tar.gz"), ROOT / ".cache" / "missing")


@pytest.fixture
def kit(monkeypatch: pytest.MonkeyPatch) -> Iterator[dict[str, ModuleType]]:
    """The kit's modules by name. They are scripts in one folder, not a package."""
    monkeypatch.syspath_prepend(str(KIT))
    names = ("pack", "cases", "bench", "report", "meter", "train_layers")
    yield {name: importlib.import_module(name) for name in names}
    for name in names:
        sys.modules.pop(name, None)


# -- the archive -------------------------------------------------------------------------------------------------------


def _wheels(folder: Path, pack: ModuleType) -> tuple[Path, list[tuple[str, str]]]:
    """The pinned wheels if `make gpu-kit` has downloaded them, else small ones of the same names with a .so."""
    downloaded = ROOT / ".cache" / "gpu-kit"
    pinned = pack.pinned_wheels()
    if downloaded.is_dir():
        return downloaded, pinned
    folder.mkdir()
    made = []
    for requirement, _ in pinned:
        name = requirement.partition("==")[0].replace("-", "_")
        name = {"pyyaml": "yaml"}.get(name.lower(), name)  # for the others, package and module have the same name
        file = folder / f"{name}-1-py3-none-any.whl"
        with zipfile.ZipFile(file, "w") as wheel:
            wheel.writestr(f"{name}/__init__.py", "")
            wheel.writestr(f"{name}/_native.so", "")
            wheel.writestr(f"{name}/_psutil_linux.abi3.so", "")
        made.append((requirement, hashlib.sha256(file.read_bytes()).hexdigest()))
    return folder, made


def _tracked(*paths: str) -> list[str]:
    listed = subprocess.run(["git", "-C", ROOT, "ls-files", *paths], capture_output=True, text=True, check=True)
    return [name for name in listed.stdout.splitlines() if (ROOT / name).exists()]


def test_archive_is_small_and_complete(
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
        packed = archive.extractfile("kit/sources.tar.xz")
        model = archive.extractfile("kit/tiny-relu2.gguf.xz")
        assert packed is not None
        assert model is not None
        planes = lzma.decompress(model.read())
        original = (ROOT / "models" / "tiny-relu2.gguf").read_bytes()
        assert planes == original[0::2] + original[1::2]
        with tarfile.open(fileobj=io.BytesIO(lzma.decompress(packed.read()))) as sources:
            names = set(sources.getnames())
    expected = {
        *_tracked("pinfer/*.py", ":!pinfer/plot.py", ":!pinfer/plotting", "native", ":!native/fuzz", "kit"),
        *re.findall(r"tests/test_\w+\.py", (KIT / "gpu.sh").read_text()),
        "models/synth.py",
        "tests/conftest.py",
        "tests/data/profile.txt",
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
        "llama.cpp/tools/server/server-context.cpp",
        "llama.cpp/tools/mtmd/mtmd.cpp",
        "llama.cpp/scripts/ui-assets.cmake",
        "llama.cpp/tools/ui/ui.cpp.in",
        "site/llama_cpp/llama_cpp.py",
        "site/gguf/__init__.py",
        "site/typer/__init__.py",
        "site/yaml/__init__.py",
        "site/psutil/_psutil_linux.abi3.so",
        "site/platformdirs/__init__.py",
    }
    assert len(expected) > 100
    assert not expected - names
    assert any(name.startswith("site/llama_cpp_python-") and name.endswith("/METADATA") for name in names)
    compiled = [name for name in names if name.endswith(".so")]
    assert not [name for name in compiled if not name.startswith("site/psutil/")], "it would need one Python version"
    assert not [name for name in names if name.endswith(".gguf") or "__pycache__" in name]
    assert not [name for name in names if "ggml-vulkan/" in name or name.startswith("tests/checkpoints")]


def test_comments_are_removed_from_c(kit: dict[str, ModuleType]) -> None:
    source = b"""/* licence */ int a = '"' /* a */; // "b"\nconst char * s = "/* no \\" comment */"; /* c\n */ int b;"""
    assert kit["pack"].without_comments(source) == (
        b"""/* licence */ int a = '"'  ;  \nconst char * s = "/* no \\" comment */";   int b;"""
    )


def test_packing_is_reproducible_and_checks_wheels_and_size(
    kit: dict[str, ModuleType], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pack = kit["pack"]
    entries = [("b", b"two", 0o644), ("a", b"one", 0o755)]
    assert pack.tar_of(entries) == pack.tar_of(entries[::-1])
    with pytest.raises(ValueError, match=r"no wheel of annotated-doc==\S+ with the pinned hash; run: make gpu-kit"):
        list(pack.wheel_files(tmp_path))
    monkeypatch.setattr(pack, "LIMIT", 10)
    monkeypatch.setattr(pack, "packed_sources", lambda sdist, wheels: ("sources.tar.xz", b"", 0o644))
    monkeypatch.setattr(pack, "MODELS", ())
    with pytest.raises(ValueError, match="more than the limit of 10"):
        pack.pack(tmp_path / "kit.tar.gz", SDIST, tmp_path)
    assert not (tmp_path / "kit.tar.gz").exists()


# -- the driver --------------------------------------------------------------------------------------------------------


def _driver(folder: Path, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    """Runs a copy of gpu.sh in ``folder``. nvidia-smi fails unless the folder's bin has another one."""
    folder.mkdir(exist_ok=True)
    script = shutil.copy(KIT / "gpu.sh", folder)
    (folder / "bin").mkdir(exist_ok=True)
    kept = {name: value for name, value in os.environ.items() if name not in ("GPU", "CUDA_ARCH", "LIMIT", "WORK")}
    smi = folder / "bin" / "nvidia-smi"
    if not smi.exists():
        smi.write_text("#!/bin/sh\nexit 9\n")
        smi.chmod(0o755)
    path = f"{folder / 'bin'}:{Path(sys.executable).parent}:{os.environ['PATH']}"
    kept |= {"PATH": path, "PYTHON": sys.executable, **environment}
    return subprocess.run(["bash", script, *arguments], env=kept, capture_output=True, text=True, timeout=60)


def test_gpu_sh_prints_help_and_rejects_bad_usage(tmp_path: Path) -> None:
    subprocess.run(["bash", "-n", str(KIT / "gpu.sh")], check=True)
    if shutil.which("shellcheck"):
        subprocess.run(["shellcheck", "-S", "warning", str(KIT / "gpu.sh")], check=True)
    helped = _driver(tmp_path / "kit", "help")
    assert helped.returncode == 0
    assert "build | test | bench CASE | all" in helped.stdout
    assert _driver(tmp_path / "kit", "frobnicate").returncode == 2
    assert _driver(tmp_path / "kit", "bench").returncode == 2


def test_gpu_sh_without_a_gpu_names_the_alternatives(tmp_path: Path) -> None:
    refused = _driver(tmp_path / "kit", "build")
    assert refused.returncode == 1
    assert "no NVIDIA GPU found" in refused.stderr
    assert "GPU=none" in refused.stderr
    assert not (tmp_path / "kit" / "out").exists()


@pytest.mark.parametrize("missing", ["numpy", "scipy"])
def test_gpu_sh_needs_numpy_and_scipy(tmp_path: Path, missing: str) -> None:
    folder = tmp_path / "kit"
    (folder / "bin").mkdir(parents=True)
    python = folder / "bin" / "some-python"
    python.write_text(f'#!/bin/sh\ncase "$2" in "import {missing}"*) exit 1 ;; *) exec {sys.executable} "$@" ;; esac\n')
    python.chmod(0o755)
    refused = _driver(folder, "build", GPU="none", PYTHON=str(python))
    assert refused.returncode == 1
    assert len(refused.stderr.splitlines()) == 1
    assert f"has no {missing}: run {python} -m pip install {missing}" in refused.stderr
    assert not list((folder / "out" / "cpu" / "stamps").iterdir())


def _sources(folder: Path, files: dict[str, bytes]) -> None:
    with tarfile.open(folder / "sources.tar.xz", "w:xz") as sources:
        for name, data in files.items():
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            sources.addfile(entry, io.BytesIO(data))


def test_gpu_sh_continues_after_a_failed_step(tmp_path: Path) -> None:
    """Without sources the first step fails: the end of its log is printed, and it is not marked as finished."""
    folder = tmp_path / "kit"
    failed = _driver(folder, "build", GPU="none")
    assert failed.returncode == 1
    assert "unpack failed" in failed.stderr
    assert "sources.tar.xz" in failed.stderr
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
    assert (folder / "src" / "models" / "a").stat().st_mtime_ns == first["models/a"], "unchanged: not recompiled"
    assert (folder / "src" / "kit" / "b").stat().st_mtime_ns > first["kit/b"]
    over = _driver(folder, "build", GPU="none", LIMIT="0")
    assert over.returncode == 75
    assert "run the same command again to continue" in over.stderr


def test_gpu_sh_finds_the_architectures_of_all_gpus(tmp_path: Path) -> None:
    folder = tmp_path / "kit"
    (folder / "bin").mkdir(parents=True)
    smi = folder / "bin" / "nvidia-smi"
    smi.write_text("#!/bin/sh\nprintf '9.0\\n9.0\\n8.6\\n'\n")
    smi.chmod(0o755)
    _driver(folder, "build")
    assert (folder / "out" / "cuda-86-90").is_dir()


# -- the benchmark -----------------------------------------------------------------------------------------------------


def test_a_case_shrinks_to_fit_and_keeps_its_share_of_the_device(kit: dict[str, ModuleType]) -> None:
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
    with pytest.raises(ValueError, match="not enough for two of its layers"):
        cases.fit(case, sizes.files(1, "F16"))


@pytest.mark.parametrize("limit", [0, 1, 7, 13, 40])
def test_largest_fitting_is_found_by_measuring(kit: dict[str, ModuleType], limit: int) -> None:
    """Sizes grow unevenly, and from a point on the program does not run at all."""
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


def test_summary_compares_with_the_fastest_way_within_the_budget(kit: dict[str, ModuleType]) -> None:
    data = _recorded(kit)
    summary = kit["report"].summary(data, kit["cases"].CASES["smoke"])
    first = summary["rows"][0]
    assert first["best"] == "layers", "the other way took 200 bytes; the budget is 100"
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
    """Puts an nvidia-smi on PATH that reports the contents of the returned file, in MiB."""
    level = tmp_path / "level"
    level.write_text("100")
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    smi.write_text(f"#!/bin/sh\ncat {level}\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{smi.parent}:{os.environ['PATH']}")
    return level


def test_meter_reports_the_peak(kit: dict[str, ModuleType], gpu: Path) -> None:
    with kit["meter"].Meter() as meter:
        gpu.write_text("350")
        time.sleep(1.0)
        gpu.write_text("100")
    assert meter.peak == 250 << 20
    with kit["meter"].Meter(False) as unused:
        pass
    assert unused.peak is None


# While it runs it takes 40 MiB, and 20 more for each layer on the device, or 5 for a layer without its FFN.
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


def test_both_ways_of_llama_cpp_are_tuned_to_the_budget(
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
    assert found["layers"]["threads"] == 1, "the fake llama.cpp is slower with two"
    # All nine layers take 220 MiB. With six FFNs on the CPU it is 130, with five 145; the budget is 140.
    assert found["ffn"]["n"] == 2
    assert found["ffn"]["arguments"] == ["-ngl", "999", "-ot", r"blk\.(0|1|2|3|4|5)\.ffn_(up|gate|down)\.=CPU"]

    bench.store.put(cap=30 << 20)
    bench.do_layers()
    assert json.loads((tmp_path / "smoke.json").read_text())["layers"] is None


def test_training_by_layers_resumes_and_writes_what_train_writes(
    kit: dict[str, ModuleType], synthetic: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pinfer.artefacts import paths
    from pinfer.artefacts.predictor import PredictorFile
    from pinfer.model import Ffn, open_model

    profile = str(ROOT / "tests" / "data" / "profile.txt")
    _pinfer("profile", str(synthetic), "--dataset", profile, "--tokens", "512", "--samples", "512")
    model = open_model(synthetic, None)
    folder = paths.artefact_dir(model.path, model.fingerprint, for_writing=False)
    by_layer = kit["train_layers"]
    fit = by_layer.fit_layer

    def interrupted(data: object, ffn: Ffn, *rest: object) -> object:
        if ffn.layer == 1:
            raise KeyboardInterrupt
        return fit(data, ffn, *rest)

    monkeypatch.setattr(by_layer, "fit_layer", interrupted)
    with pytest.raises(KeyboardInterrupt):
        by_layer.train_layers(synthetic)
    done: list[int] = []

    def counted(data: object, ffn: Ffn, *rest: object) -> object:
        done.append(ffn.layer)
        return fit(data, ffn, *rest)

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


# -- the packages ------------------------------------------------------------------------------------------------------

_WITHOUT = """
import sys
class Missing:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {missing!r}:
            raise ModuleNotFoundError(f"No module named {{name!r}}: it is not in the GPU kit", name=name)
sys.meta_path.insert(0, Missing())
from pinfer.cli.app import main
sys.exit(main())
"""


def test_command_line_runs_with_the_packages_of_the_kit(kit: dict[str, ModuleType], tiny_relu2: Path) -> None:
    """The kit leaves out what only conversion and the hub need; the other commands must not import it."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    needed = {re.split(r"[^\w-]", requirement)[0] for requirement in project["dependencies"]}
    packed = {requirement.partition("==")[0] for requirement, _ in kit["pack"].pinned_wheels()}
    missing = needed - packed - {"numpy", "scipy", "llama-cpp-python"}
    assert {"safetensors", "huggingface_hub"} <= missing
    code = _WITHOUT.format(missing=missing)
    for command in (["show", str(tiny_relu2)], ["profile", "--help"]):
        done = subprocess.run([sys.executable, "-c", code, *command], cwd=ROOT, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
