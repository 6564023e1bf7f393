"""Fixtures of all tests: a working folder for each test, and copies of the models outside the repository."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

# OpenMP threads that spin while they wait are fast on a quiet machine and ten times slower on a shared one. So are
# those of numpy's BLAS. Both libraries read these variables once, when they are loaded.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from models.synth import SynthOptions, write_model

# The time of an example depends more on the machine than on the code.
settings.register_profile("pinfer", deadline=None)
settings.load_profile("pinfer")

# A shell that starts the tests in the background makes them ignore Ctrl-C, which child processes would inherit.
signal.signal(signal.SIGINT, signal.default_int_handler)

ROOT = Path(__file__).resolve().parent.parent
MODELS = ROOT / "models"


@pytest.fixture(autouse=True)
def isolated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test works in its own folder, with its own PINFER_HOME, offline, untouched by the user's settings.

    PINFER_NATIVE_DIR and PINFER_ISA stay: they choose which build and which kernels are tested.
    """
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)
    monkeypatch.setenv("PINFER_HOME", str(tmp_path / "home"))
    for name in ("PINFER_MODEL", "PINFER_RPC", "PINFER_DEBUG", "GGML_BACKEND_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setenv("PYTHONPATH", str(ROOT))  # of the processes that a test starts


@pytest.fixture
def copy_model(tmp_path: Path) -> Callable[[str], Path]:
    """Copies a shipped model to the test's folder. Artefacts are written beside the file that a link points to."""

    def copy(name: str) -> Path:
        folder = tmp_path / "models"
        folder.mkdir(exist_ok=True)
        return Path(shutil.copy(MODELS / name, folder / name))

    return copy


@pytest.fixture
def tiny_relu2(copy_model: Callable[[str], Path]) -> Path:
    """A copy of models/tiny-relu2.gguf: arcee, relu² without a gate; stock libllama computes it correctly."""
    return copy_model("tiny-relu2.gguf")


@pytest.fixture
def tiny_reglu(copy_model: Callable[[str], Path]) -> Path:
    """A copy of models/tiny-reglu.gguf: llama with pinfer.ffn.activation = reglu; stock libllama would apply SiLU."""
    return copy_model("tiny-reglu.gguf")


@pytest.fixture
def tiny_moe(copy_model: Callable[[str], Path]) -> Path:
    """A copy of models/tiny-moe.gguf: nemotron_h_moe, ReLU² experts; stock libllama computes it correctly."""
    return copy_model("tiny-moe.gguf")


@pytest.fixture(scope="session")
def _synthetic_master(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("synthetic") / "synthetic.gguf"
    write_model(path, SynthOptions())
    return path


@pytest.fixture
def synthetic(_synthetic_master: Path, tmp_path: Path) -> Path:
    """A copy of a small synthetic reglu model (llama, 256 x 768, 2 layers) with planted activation frequencies."""
    folder = tmp_path / "models"
    folder.mkdir(exist_ok=True)
    return Path(shutil.copy(_synthetic_master, folder / "synthetic.gguf"))
