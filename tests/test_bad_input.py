"""Bad files, full disks and impossible requests: one clear line, a non-zero exit code, and nothing lost."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import json
import os
import random
import resource
import shutil
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.command_line import MODELS, ROOT, CommandLine, Outcome
from support.runs import run_command

from pinfer.artefacts import paths
from pinfer.artefacts.artefact import FORMAT_VERSION
from pinfer.artefacts.placement import PlacementFile
from pinfer.artefacts.predictor import PredictorFile
from pinfer.artefacts.profile import ProfileFile, SamplesFile
from pinfer.artefacts.shards import ShardFile
from pinfer.errors import PinferError
from pinfer.gguf_io.reader import read_gguf
from pinfer.llama.plugin import load_plugin
from pinfer.model import Model, open_model

COMMANDS: dict[str, tuple[str, ...]] = {
    "profile": ("--tokens", "256", "--dataset", "text.txt"),
    "train": (),
    "solve": ("--machine", "machine.json", "--vram", "0"),
    "split": (),
    "run": ("-p", "One", "-n", "2", "--temp", "0"),
    "eval": ("--text", "text.txt", "--tokens", "64"),
}
KINDS = {
    "profile": paths.PROFILE,
    "samples": paths.SAMPLES,
    "predictor": paths.PREDICTOR,
    "placement": paths.PLACEMENT,
    "hot": paths.HOT,
    "cold": paths.COLD,
}
MADE_BY = {
    "profile": "profile",
    "samples": "profile",
    "predictor": "train",
    "placement": "solve",
    "hot": "split",
    "cold": "split",
}
# With a given description of the machine, solve does not have to measure it every time.
MACHINE = {
    "name": "test",
    "n_threads": 2,
    "cpu_bandwidth": 2e10,
    "scattered": 0.4,
    "device": {
        "name": "CPU",
        "description": "a second CPU device",
        "kind": "cpu",
        "memory_total": 1 << 30,
        "memory_free": 1 << 30,
        "bandwidth": 2e10,
        "sync_seconds": 1e-5,
    },
}
TRUNCATIONS = 200
MODEL = "tiny-relu2.gguf"


def complains(outcome: Outcome, *words: str, after_progress: bool = False) -> None:
    """Checks that the command failed with exactly one line that contains each of ``words``."""
    assert outcome.code == 1, f"exit code {outcome.code}\n{outcome.out}\n{outcome.err}"
    assert outcome.out == ""
    lines = outcome.err_lines
    if after_progress:
        lines = [line for line in lines if line.startswith(("pinfer: ", "error: ", "Traceback"))]
    assert len(lines) == 1, outcome.err
    assert lines[0].startswith(("pinfer: ", "error: "))
    assert "internal error" not in lines[0]
    for word in words:
        assert word in lines[0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> CommandLine:
    """A folder in which the whole pipeline has run. Tests work on copies of it."""
    folder = tmp_path_factory.mktemp("finished")
    work = folder / "work"
    work.mkdir()
    shutil.copy(MODELS / MODEL, work)
    (work / "text.txt").write_text((ROOT / "docs" / "formats.md").read_text(encoding="utf-8"), encoding="utf-8")
    (work / "machine.json").write_text(json.dumps(MACHINE), encoding="utf-8")
    command = CommandLine(work, folder / "home")
    for args in (
        ("profile", MODEL, "--tokens", "512", "--dataset", "text.txt"),
        ("train", MODEL),
        ("solve", MODEL, "--machine", "machine.json", "--vram", "4M"),
        ("split", MODEL),
    ):
        outcome = command(*args)
        assert outcome.code == 0, outcome.err
    return command


@pytest.fixture
def command(finished: CommandLine, tmp_path: Path) -> CommandLine:
    """A copy of the finished folder that a test may damage."""
    work = tmp_path / "copy"
    shutil.copytree(finished.folder, work)
    return CommandLine(work, tmp_path / "home")


def artefacts_of(command: CommandLine, model: str = MODEL) -> Path:
    return command.folder / f"{model}.pinfer"


def fingerprints(folder: Path) -> dict[str, str]:
    """Every file below ``folder`` with the hash of its bytes."""
    return {
        str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def set_format_version(path: Path, version: int) -> None:
    """Change the number behind pinfer.format_version (a u32 after its type) in place."""
    key = b"pinfer.format_version"
    data = bytearray(path.read_bytes())
    at = data.index(key) + len(key)
    assert struct.unpack_from("<I", data, at)[0] == 4, "a GGUF u32"
    struct.pack_into("<I", data, at + 4, version)
    path.write_bytes(data)


# --- files that are not models --------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", COMMANDS)
def test_missing_file(command: CommandLine, name: str) -> None:
    complains(command(name, "nowhere.gguf", *COMMANDS[name]), "nowhere.gguf")


ODD = {
    "text": b"just some text\n" * 100,
    "empty": b"",
    "two bytes": b"GG",
    "zeros": b"GGUF" + bytes(60),
    "ones": b"GGUF" + b"\xff" * 60,
    "version of tomorrow": b"GGUF\x09\0\0\0" + bytes(60),
    "big endian": b"GGUF\0\0\0\3" + bytes(60),
}


@pytest.mark.parametrize(
    ("name", "content"),
    [(name, "text") for name in COMMANDS] + [(name, content) for name in ("split", "run") for content in ODD],
)
def test_not_a_gguf(command: CommandLine, name: str, content: str) -> None:
    (command.folder / "odd.gguf").write_bytes(ODD[content])
    complains(command(name, "odd.gguf", *COMMANDS[name]), "odd.gguf")
    assert not artefacts_of(command, "odd.gguf").exists()


@pytest.mark.parametrize("name", COMMANDS)
def test_a_folder_is_not_a_model(command: CommandLine, name: str) -> None:
    complains(command(name, artefacts_of(command), *COMMANDS[name]), "folder")


@pytest.mark.parametrize("name", COMMANDS)
def test_an_artefact_is_not_a_model(command: CommandLine, name: str) -> None:
    complains(command(name, artefacts_of(command) / paths.COLD, *COMMANDS[name]), paths.COLD)


# --- truncated files ------------------------------------------------------------------------------------------------


def _places(path: Path, number: int, seed: int) -> list[int]:
    """Where to cut, from the end to the beginning, so that one copy can be cut repeatedly.

    Half of the places lie in the first 64 KiB, where the header is.
    """
    gguf = read_gguf(path)
    end = max(tensor.offset + tensor.n_bytes for tensor in gguf.tensors.values())  # padding at the end may be missing
    rng = random.Random(seed)
    inside = {rng.randrange(min(end, 64 << 10) if i % 2 else end) for i in range(number - 2)}
    return sorted(inside | {0, end - 1}, reverse=True)


def test_a_model_truncated_anywhere_is_refused(tiny_relu2: Path) -> None:
    for place in _places(tiny_relu2, TRUNCATIONS, seed=1):
        os.truncate(tiny_relu2, place)
        with pytest.raises(PinferError) as caught:
            open_model(tiny_relu2)
        assert tiny_relu2.name in str(caught.value), f"cut at {place}"
        assert "\n" not in str(caught.value)


def test_the_runner_refuses_a_truncated_model(tiny_relu2: Path) -> None:
    start = run_command(tiny_relu2, "-p", "One", "-n", 1)
    for place in _places(tiny_relu2, 30, seed=2):
        os.truncate(tiny_relu2, place)
        done = subprocess.run(
            start,
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
            stdin=subprocess.DEVNULL,
        )
        complains(Outcome(done.returncode, done.stdout, done.stderr), tiny_relu2.name)


READERS: dict[str, Callable[[Path, Model], object]] = {
    "profile": ProfileFile.read,
    "samples": SamplesFile.read,
    "predictor": PredictorFile.read,
    "placement": PlacementFile.read,
    "hot": lambda path, model: ShardFile.read(path, "hot", model),
    "cold": lambda path, model: ShardFile.read(path, "cold", model),
}


@pytest.mark.parametrize("kind", KINDS)
def test_an_artefact_truncated_anywhere_is_refused(command: CommandLine, kind: str) -> None:
    model = open_model(command.folder / MODEL)
    path = artefacts_of(command) / KINDS[kind]
    for place in _places(path, TRUNCATIONS, seed=3):
        os.truncate(path, place)
        with pytest.raises(PinferError) as caught:
            READERS[kind](path, model)
        assert path.name in str(caught.value), f"cut at {place}"
        assert "pinfer " in caught.value.hint, "the hint names the command that makes it again"


@pytest.mark.parametrize("kind", ["predictor", "hot", "cold"])
def test_the_plugin_refuses_a_truncated_artefact(command: CommandLine, kind: str) -> None:
    plugin = load_plugin()
    folder = artefacts_of(command)
    path = folder / KINDS[kind]
    for place in _places(path, TRUNCATIONS, seed=4):
        os.truncate(path, place)
        with pytest.raises(PinferError) as caught:
            plugin.configure(
                model=command.folder / MODEL,
                predictor=folder / paths.PREDICTOR,
                hot=folder / paths.HOT,
                cold=folder / paths.COLD,
                device="CPU",
                activation="relu2",
            )
        assert path.name in str(caught.value), f"cut at {place}"


def test_a_damaged_header_never_ends_in_a_traceback(tiny_relu2: Path) -> None:
    whole = bytearray(tiny_relu2.read_bytes())
    rng = random.Random(5)
    with tiny_relu2.open("r+b") as file:
        for _ in range(TRUNCATIONS):
            at = rng.randrange(4096)
            file.seek(at)
            file.write(bytes([rng.randrange(256)]))
            file.flush()
            # A changed letter in a name can be harmless.
            with contextlib.suppress(PinferError):
                open_model(tiny_relu2)
            file.seek(at)
            file.write(whole[at : at + 1])


# --- artefacts that do not match ------------------------------------------------------------------------------------


READS = {
    "profile": ("solve",),
    "samples": ("train",),
    "placement": ("split", "run"),
    "predictor": ("run",),
    "hot": ("run",),
    "cold": ("run",),
}
PAIRS = [(kind, name) for kind, names in READS.items() for name in names]


def _is_refused(command: CommandLine, kind: str, name: str, *words: str) -> None:
    before = fingerprints(artefacts_of(command))
    complains(command(name, MODEL, *COMMANDS[name]), Path(KINDS[kind]).name, f"pinfer {MADE_BY[kind]}", *words)
    assert fingerprints(artefacts_of(command)) == before


@pytest.mark.parametrize(("kind", "name"), PAIRS)
def test_an_artefact_of_another_model(command: CommandLine, kind: str, name: str) -> None:
    path = artefacts_of(command) / KINDS[kind]
    data = path.read_bytes()
    own = open_model(command.folder / MODEL).fingerprint.encode()
    assert data.count(own) == 1
    path.write_bytes(data.replace(own, own[::-1]))
    _is_refused(command, kind, name, "model")


@pytest.mark.parametrize(("kind", "name"), PAIRS)
def test_an_artefact_of_another_format_version(command: CommandLine, kind: str, name: str) -> None:
    set_format_version(artefacts_of(command) / KINDS[kind], FORMAT_VERSION - 1)
    _is_refused(command, kind, name, f"version {FORMAT_VERSION - 1}")


@pytest.mark.parametrize(("kind", "name"), PAIRS)
def test_an_artefact_of_another_kind(command: CommandLine, kind: str, name: str) -> None:
    folder = artefacts_of(command)
    shutil.copy(folder / KINDS["profile" if kind != "profile" else "placement"], folder / KINDS[kind])
    _is_refused(command, kind, name)


@pytest.mark.parametrize(("kind", "name"), PAIRS)
def test_a_damaged_artefact(command: CommandLine, kind: str, name: str) -> None:
    (artefacts_of(command) / KINDS[kind]).write_bytes(b"GGUF, or so it says")
    _is_refused(command, kind, name)


@pytest.mark.parametrize("missing", ["ffn_up.weight", "ffn_down_t.weight"])
def test_a_cold_shard_without_its_rows(command: CommandLine, missing: str) -> None:
    """The neurons are listed, but their rows are stored under another name, as in another layout."""
    path = artefacts_of(command) / paths.COLD
    data, name, other = path.read_bytes(), f"blk.1.{missing}".encode(), f"blk.1.{missing[::-1]}".encode()
    assert data.count(name) == 1
    path.write_bytes(data.replace(name, other))
    for reader in ("run", "eval"):
        _is_refused(command, "cold", reader, "no tensor", name.decode())


def test_shards_of_another_placement(command: CommandLine) -> None:
    folder = artefacts_of(command)
    old = (folder / paths.COLD).read_bytes()
    for again in (("solve", MODEL, *WRITERS["solve"]), ("split", MODEL)):
        assert command(*again).code == 0
    (folder / paths.COLD).write_bytes(old)
    complains(command("run", MODEL, *COMMANDS["run"]), paths.HOT, "placement", "pinfer split")


@pytest.mark.parametrize(("name", "missing"), [("train", paths.SAMPLES), ("solve", paths.PROFILE)])
def test_a_missing_artefact_names_the_command_that_makes_it(command: CommandLine, name: str, missing: str) -> None:
    (artefacts_of(command) / missing).unlink()
    complains(command(name, MODEL, *WRITERS[name]), "pinfer profile")


# --- folders and disks ----------------------------------------------------------------------------------------------

WRITERS: dict[str, tuple[str, ...]] = {
    "profile": COMMANDS["profile"],
    "train": (),
    "solve": ("--machine", "machine.json", "--vram", "3M"),
    "split": ("--down-type", "F32"),
}


def _without_override() -> None:
    """Root may write anywhere; without this capability it is subject to a folder's mode like other users."""
    pr_capbset_drop, cap_dac_override = 24, 1
    if os.geteuid() == 0 and ctypes.CDLL(None, use_errno=True).prctl(pr_capbset_drop, cap_dac_override, 0, 0, 0) != 0:
        os._exit(99)


@pytest.mark.parametrize("name", WRITERS)
def test_a_read_only_folder(command: CommandLine, name: str) -> None:
    folder = artefacts_of(command)
    before = fingerprints(folder)
    command.home.mkdir()
    locked = [folder / "samples", folder, command.home]
    for each in locked:
        each.chmod(0o555)
    try:
        outcome = command(name, MODEL, *WRITERS[name], preexec_fn=_without_override)
    finally:
        for each in locked:
            each.chmod(0o755)
    complains(outcome, "PINFER_HOME")
    assert fingerprints(folder) == before
    assert not any(command.home.iterdir())


def test_a_read_only_folder_works_with_a_writable_home(command: CommandLine) -> None:
    folder = artefacts_of(command)
    shutil.rmtree(folder)
    command.folder.chmod(0o555)
    try:
        outcome = command("profile", MODEL, *WRITERS["profile"], preexec_fn=_without_override)
        assert outcome.code == 0, outcome.err
        split = command("split", MODEL, preexec_fn=_without_override)
        assert split.code == 0, split.err
        ran = command("run", MODEL, *COMMANDS["run"], preexec_fn=_without_override)
        assert ran.code == 0, ran.err
    finally:
        command.folder.chmod(0o755)
    assert not folder.exists()
    assert list(command.home.rglob(paths.COLD))


def _small_files() -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (16 << 10, 16 << 10))


@pytest.mark.parametrize("name", ["profile", "train", "split"])
def test_a_disk_that_fills_up_while_writing(command: CommandLine, name: str) -> None:
    folder = artefacts_of(command)
    before = fingerprints(folder)
    outcome = command(name, MODEL, *WRITERS[name], preexec_fn=_small_files)
    complains(outcome, "space", after_progress=True)
    assert fingerprints(folder) == before


@pytest.fixture
def small_disk(finished: CommandLine, tmp_path: Path) -> Iterator[CommandLine]:
    """The finished folder on a file system with hardly any space left. If mounting is not allowed, a limit on file
    sizes replaces it."""
    disk = tmp_path / "disk"
    disk.mkdir()
    size = sum(path.stat().st_size for path in finished.folder.rglob("*") if path.is_file())
    mount = ["mount", "-t", "tmpfs", "-o", f"size={size + (1 << 20)}", "tmpfs", str(disk)]
    mounted = os.geteuid() == 0 and subprocess.run(mount, capture_output=True, check=False).returncode == 0
    try:
        shutil.copytree(finished.folder, disk / "copy")
        if mounted:
            with (disk / "filler").open("wb") as filler, contextlib.suppress(OSError):
                free = shutil.disk_usage(disk).free
                filler.write(bytes(max(0, free - (16 << 10))))
        yield CommandLine(disk / "copy", tmp_path / "home", None if mounted else _small_files)
    finally:
        if mounted:
            subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize("name", ["profile", "train", "split"])
def test_a_full_disk(small_disk: CommandLine, name: str) -> None:
    folder = artefacts_of(small_disk)
    before = fingerprints(folder)
    complains(small_disk(name, MODEL, *WRITERS[name]), "space", after_progress=True)
    assert fingerprints(folder) == before


# --- killed in the middle -------------------------------------------------------------------------------------------


def _kill_while_writing(command: CommandLine, signum: signal.Signals) -> tuple[int, str]:
    """Start a split and kill it once its temporary file is there; (exit code, stderr)."""
    folder = artefacts_of(command)
    process = subprocess.Popen(
        [sys.executable, "-m", "pinfer", "split", MODEL, *WRITERS["split"], "--verify"],
        cwd=command.folder,
        env=command.environment(),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    while process.poll() is None and not any(folder.glob(".*.tmp")):
        time.sleep(0.0005)
    process.send_signal(signum)
    _, said = process.communicate(timeout=60)
    return process.returncode, said.decode()


@pytest.mark.parametrize("signum", [signal.SIGKILL, signal.SIGTERM, signal.SIGINT])
def test_a_killed_split_loses_nothing(command: CommandLine, signum: signal.Signals) -> None:
    folder = artefacts_of(command)
    before = fingerprints(folder)
    for _ in range(5):
        code, said = _kill_while_writing(command, signum)
        if code != 0:
            break
    assert code == {signal.SIGKILL: -9, signal.SIGTERM: 143, signal.SIGINT: 130}[signum], said
    assert "Traceback" not in said
    left = fingerprints(folder)
    assert {name: left[name] for name in before} == before
    if signum != signal.SIGKILL:
        assert left == before, "an interrupted command removes its temporary files"
    # The run and the next split work as if nothing had happened, and leftover files are removed.
    ran = command("run", MODEL, *COMMANDS["run"])
    assert ran.code == 0, ran.err
    again = command("split", MODEL, "--verify")
    assert again.code == 0, again.err
    assert set(fingerprints(folder)) == set(before)


# --- requests that cannot be met ------------------------------------------------------------------------------------


def test_vram_too_small_for_anything(command: CommandLine) -> None:
    outcome = command("solve", MODEL, "--vram", "64K")
    assert outcome.code == 0, outcome.err
    assert "everything stays on the CPU" in outcome.err
    assert not any(
        PlacementFile.read(artefacts_of(command) / paths.PLACEMENT, open_model(command.folder / MODEL)).n_hot
    )


@pytest.mark.parametrize(
    "words",
    [
        ("profile", "--dataset", "c5"),
        ("profile", "--dataset", "."),
        ("solve", "--device", "GPU99"),
        ("solve", "--machine", "nowhere.json"),
        ("solve", "--machine", "text.txt"),
        ("solve", "--cache-type-k", "q1"),
        ("split", "--down-type", "Q1_9"),
        ("run", "-f", "nowhere.txt"),
        ("run", "-p", "One", "--hot-device", "GPU99"),
        ("eval", "--text", "nowhere.txt"),
    ],
)
def test_missing_things_are_named(command: CommandLine, words: tuple[str, ...]) -> None:
    before = fingerprints(command.folder)
    complains(command(words[0], MODEL, *words[1:]))
    assert fingerprints(command.folder) == before


def test_a_grammar_with_a_mistake(command: CommandLine) -> None:
    """llama.cpp's parser shows the place first."""
    done = command("run", MODEL, "-p", "One", "--grammar", "root ::= (")
    assert (done.code, done.out) == (1, "")
    assert "expecting ')'" in done.err
    assert done.err_lines[-1].startswith("pinfer: ")
    assert "failed to parse grammar" in done.err_lines[-1]


def test_an_unknown_dataset_lists_the_known_ones(command: CommandLine) -> None:
    complains(command("profile", MODEL, "--dataset", "c5"), "c5", "c4", "wikitext", "file")


def test_an_empty_text(command: CommandLine) -> None:
    (command.folder / "empty.txt").write_text("")
    before = fingerprints(artefacts_of(command))
    complains(command("profile", MODEL, "--dataset", "empty.txt"), "empty.txt")
    complains(command("profile", MODEL, "--dataset", "-", stdin=""))
    assert fingerprints(artefacts_of(command)) == before


def test_a_dataset_of_the_hub_while_offline(command: CommandLine, tmp_path: Path) -> None:
    env = {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    complains(command("profile", MODEL, "--dataset", "wikitext", env=env), "--dataset", after_progress=True)
