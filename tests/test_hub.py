"""Models of the hub: which file a name means, how it is downloaded, and what happens when that fails."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest
from support.command_line import MODELS, ROOT, CommandLine
from support.hub_server import Hub, clean_environment, serve_hub
from support.split_model import split_model

from pinfer.artefacts import paths
from pinfer.errors import PinferError
from pinfer.hub.models import HubName, choose_gguf, parse_name

MIB = 1 << 20
TINY = (MODELS / "tiny-relu2.gguf").read_bytes()

# huggingface_hub writes pieces of 10 MiB; a file to be resumed has to be larger. A GGUF may have trailing bytes.
LARGE = TINY + bytes(24 * MIB - len(TINY))


@pytest.fixture
def hub() -> Iterator[Hub]:
    with serve_hub() as server:
        yield server


@pytest.fixture
def cache(tmp_path: Path) -> Path:
    return tmp_path / "hf"


@pytest.fixture
def command(tmp_path: Path) -> CommandLine:
    return CommandLine(tmp_path / "work", tmp_path / "home")


# --- which file -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "repo", "wanted"),
    [
        ("user/repo", "user/repo", ""),
        ("user/repo:q4_0", "user/repo", "q4_0"),
        ("a.b-c/D_1.5:sub/model-f16.gguf", "a.b-c/D_1.5", "sub/model-f16.gguf"),
    ],
)
def test_names(text: str, repo: str, wanted: str) -> None:
    assert parse_name(text) == HubName(repo, wanted)
    assert str(parse_name(text)) == text


@pytest.mark.parametrize("text", ["", "repo", "user/repo/file", "user/", "/repo", "user/repo:", "u/r:a:b", "u r/x"])
def test_invalid_names(text: str) -> None:
    with pytest.raises(PinferError, match="-hf user/repo"):
        parse_name(text)


FILES = (
    "README.md",
    "imatrix-Q8_0.gguf",
    "m-BF16.gguf",
    "m-F16.gguf",
    "m-IQ4_XS.gguf",
    "m-Q4_0.gguf",
    "m-Q4_K_M.gguf",
    "m-Q8_0.gguf",
    "mmproj-m-F16.gguf",
)


@pytest.mark.parametrize(
    ("files", "wanted", "chosen"),
    [
        (FILES, "", "m-Q4_K_M.gguf"),
        (FILES[:6] + FILES[7:], "", "m-Q8_0.gguf"),
        (("b-f32.gguf", "a-q5_0.gguf", "mmproj-a.gguf"), "", "a-q5_0.gguf"),
        (FILES, "q4_0", "m-Q4_0.gguf"),
        (FILES, "f16", "m-F16.gguf"),
        (FILES, "bf16", "m-BF16.gguf"),
        (FILES, "Iq4_Xs", "m-IQ4_XS.gguf"),
        (FILES, "mmproj-m-f16.gguf", "mmproj-m-F16.gguf"),
        (("q8/m-Q8_0.gguf",), "M-q8_0.GGUF", "q8/m-Q8_0.gguf"),
        (("m.Q4_K_M.gguf", "m.Q4_K_S.gguf"), "q4_k_s", "m.Q4_K_S.gguf"),
    ],
)
def test_choice(files: tuple[str, ...], wanted: str, chosen: str) -> None:
    assert choose_gguf(reversed(files), HubName("u/r", wanted)) == [chosen]


PARTS = [f"Q4_0/m-Q4_0-0000{number}-of-00003.gguf" for number in (1, 2, 3)]


@pytest.mark.parametrize("wanted", ["", "q4_0", PARTS[0], "m-Q4_0-00001-of-00003.gguf"])
def test_choice_of_a_model_in_parts(wanted: str) -> None:
    assert choose_gguf([*PARTS[::-1], "m-F32.gguf"], HubName("u/r", wanted)) == PARTS


@pytest.mark.parametrize(
    ("files", "wanted", "words"),
    [
        (FILES, "Q5_K_M", ("no GGUF Q5_K_M", "BF16, F16, IQ4_XS, Q4_0, Q4_K_M, Q8_0")),
        (FILES, "other.gguf", ("no GGUF other.gguf",)),
        (("model.safetensors", "config.json"), "", ("checkpoint", "pinfer convert -hf u/r")),
        (("pytorch_model-00001-of-00002.bin", "config.json"), "", ("checkpoint", "pinfer convert -hf u/r")),
        (("README.md",), "", ("no GGUF",)),
        (PARTS, PARTS[1], (f"{PARTS[1]} of u/r is part 2 of 3", f"name the first: -hf u/r:{PARTS[0]}")),
        (PARTS, "q8_0", ("no GGUF q8_0", "it has: Q4_0")),
    ],
)
def test_no_file_fits(files: tuple[str, ...], wanted: str, words: tuple[str, ...]) -> None:
    with pytest.raises(PinferError) as caught:
        choose_gguf(files, HubName("u/r", wanted))
    assert all(word in str(caught.value) for word in words), caught.value
    assert caught.value.hint


# --- the command, from the hub to text ------------------------------------------------------------------------------


def test_run_downloads_once_and_generates_the_same_text(hub: Hub, cache: Path, command: CommandLine) -> None:
    hub.add("u/tiny-GGUF", {"tiny-q8_0.gguf": TINY, "mmproj-tiny.gguf": b"GGUF"})
    hub.token = "secret"
    words = ("-p", "Once upon a time", "-n", "8", "--temp", "0")
    here = command("run", MODELS / "tiny-relu2.gguf", "--no-artefacts", *words)
    env = hub.environment(cache) | {"HF_TOKEN": "secret"}
    first = command("run", "-hf", "u/tiny-GGUF:Q8_0", *words, env=env)
    assert (first.code, first.out) == (0, here.out), first.err
    assert hub.tokens == {"secret"}
    assert hub.ranges == [None]
    assert "fetching tiny-q8_0.gguf: 8.5 MiB in " in first.err
    assert "model: tiny-q8_0.gguf of u/tiny-GGUF" in first.err_lines
    hub.status = 500  # any request fails from here on
    for flags in (["-hf", "u/tiny-GGUF", "--offline"], []):
        again = command("run", *flags, *words, env=env)
        assert (again.code, again.out) == (0, here.out), again.err
    assert "tiny-q8_0.gguf (the last one used in this folder)" in again.err
    assert len(hub.ranges) == 1


def test_artefacts_outlive_the_cache_and_a_new_commit(hub: Hub, cache: Path, command: CommandLine) -> None:
    hub.add("u/tiny-GGUF", {"tiny.gguf": TINY})
    env = hub.environment(cache)
    text = command.folder / "text.txt"
    text.write_text((ROOT / "docs" / "formats.md").read_text(encoding="utf-8"), encoding="utf-8")
    counted = command("profile", "-hf", "u/tiny-GGUF", "--dataset", text, "--tokens", "512", "--json", env=env)
    assert counted.code == 0, counted.err
    assert "next: pinfer train -hf u/tiny-GGUF" in counted.err_lines
    folder = Path(json.loads(counted.out)["path"]).parent
    assert folder.parent == command.home
    assert folder.name.startswith("hub-")
    cut = command("split", "--json", env=env)  # the model as it was remembered
    assert Path(json.loads(cut.out)["cold"]).parent == folder, cut.err

    hub.commit = "f" * 40
    shown = command("show", "-hf", "u/tiny-GGUF", "--json", env=env)
    report = json.loads(shown.out)
    assert hub.commit in report["model"]
    states = {a["kind"]: a["state"] for a in report["artefacts"]}
    assert (states["profile"], states["hot"], states["cold"]) == ("fits", "fits", "fits")
    assert not list(cache.rglob("*.pinfer"))
    assert len(hub.ranges) == 1, "the data was there"


def test_the_runner_finds_artefacts_where_python_writes_them(hub: Hub, cache: Path, command: CommandLine) -> None:
    hub.add("u/tiny-GGUF", {"tiny.gguf": TINY})
    env = hub.environment(cache)
    report = json.loads(command("show", "-hf", "u/tiny-GGUF", "--json", env=env).out)
    folder = Path(report["artefact_folder"])
    folder.mkdir(parents=True)
    (folder / paths.PREDICTOR).write_bytes(b"GGUF")
    run = command("run", "-p", "a", "-n", "1", env=env)
    assert run.code == 1
    assert str(folder / paths.PREDICTOR) in run.err


# --- interrupted downloads ----------------------------------------------------------------------------------------

_SCRIPT = """
import json, sys
from pinfer.cli import ui
from pinfer.hub import models
from pinfer.errors import PinferError
for call in sys.argv[2:]:
    try:
        print(json.dumps({"path": str(getattr(models, sys.argv[1])(call, ui.stderr_progress()))}))
    except PinferError as error:
        print(json.dumps({"message": error.message, "hint": error.hint}))
"""


def _fetch(
    hub: Hub,
    cache: Path,
    *names: str,
    function: str = "fetch_gguf",
    offline: bool = False,
    token: str = "",
    modules: Path = ROOT,
) -> list[dict[str, str]]:
    """Fetches in a separate process, because huggingface_hub reads its settings on import."""
    env = clean_environment() | hub.environment(cache, offline=offline) | {"PYTHONPATH": f"{modules}:{ROOT}"}
    env |= {"HF_TOKEN": token} if token else {}
    done = subprocess.run(
        [sys.executable, "-c", _SCRIPT, function, *names], env=env, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) | {"stderr": done.stderr} for line in done.stdout.splitlines()]


def test_a_broken_connection_is_resumed(hub: Hub, cache: Path) -> None:
    hub.add("u/r", {"large.gguf": LARGE})
    hub.cut = 1
    (got,) = _fetch(hub, cache, "u/r")
    assert Path(got["path"]).read_bytes() == LARGE
    assert hub.ranges == [None, f"bytes={10 * MIB}-"]


def test_a_server_that_ignores_range_leaves_the_right_file(hub: Hub, cache: Path) -> None:
    """The rest is asked for, the whole file comes: it must replace what was there, not follow it."""
    hub.add("u/r", {"large.gguf": LARGE})
    hub.cut = 1
    hub.ignores_range = True
    (got,) = _fetch(hub, cache, "u/r")
    assert hub.ranges == [None, f"bytes={10 * MIB}-"]
    assert Path(got["path"]).read_bytes() == LARGE
    assert "fetching large.gguf: 24.0 MiB in " in got["stderr"]


def test_ctrl_c_ends_a_download_at_once_and_keeps_complete_files(hub: Hub, cache: Path, command: CommandLine) -> None:
    shards = {"model-00001-of-00002.safetensors": LARGE[: 2 * MIB], "model-00002-of-00002.safetensors": LARGE}
    hub.add("u/llm", CHECKPOINT | shards)
    hub.stall = "model-00002-of-00002.safetensors"
    process = subprocess.Popen(
        [sys.executable, "-m", "pinfer", "convert", "-hf", "u/llm"],
        env=command.environment(hub.environment(cache)),
        cwd=command.folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        assert hub.stalled.wait(60)
        pressed = time.monotonic()
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=60)
        seconds = time.monotonic() - pressed
    finally:
        process.kill()
    assert process.returncode == 130, err
    assert seconds < 5, seconds
    assert "complete files are kept" in err
    assert not list(cache.rglob("*.incomplete"))
    n_asked = len(hub.ranges)
    hub.stall = ""
    hub.go_on.set()
    (got,) = _fetch(hub, cache, "u/llm", function="fetch_checkpoint")
    assert (Path(got["path"]) / "model-00002-of-00002.safetensors").read_bytes() == LARGE
    assert (Path(got["path"]) / "model-00001-of-00002.safetensors").read_bytes() == LARGE[: 2 * MIB]
    assert len(hub.ranges) == n_asked + 1, "only the second shard"


def test_a_full_disk_is_reported_before_downloading(hub: Hub, cache: Path, tmp_path: Path) -> None:
    hub.add("u/r", {"large.gguf": LARGE})
    (tmp_path / "sitecustomize.py").write_text(
        "import collections, shutil\n"
        "shutil.disk_usage = lambda folder: collections.namedtuple('Usage', 'total used free')(1000, 0, 1000)\n"
    )
    (got,) = _fetch(hub, cache, "u/r", modules=tmp_path)
    assert "the download needs 0.03 GB, " in got["message"]
    assert "has 0.00 GB free" in got["message"]
    assert "HF_HOME" in got["hint"]
    assert hub.ranges == []


# --- models in several files -----------------------------------------------------------------------------------------


@pytest.fixture
def parts(tmp_path: Path) -> dict[str, bytes]:
    (tmp_path / "tiny-Q8_0.gguf").write_bytes(TINY)
    files = split_model(tmp_path / "tiny-Q8_0.gguf", tmp_path, bare_first=True)
    return {f"Q8_0/{file.name}": file.read_bytes() for file in files}


def test_all_parts_are_downloaded_and_run(hub: Hub, cache: Path, command: CommandLine, parts: dict[str, bytes]) -> None:
    hub.add("u/tiny-GGUF", parts)
    env = hub.environment(cache)
    words = ("-p", "Once upon a time", "-n", "8", "--temp", "0")
    here = command("run", MODELS / "tiny-relu2.gguf", "--no-artefacts", *words)
    first = command("run", "-hf", "u/tiny-GGUF:Q8_0", *words, env=env)
    assert (first.code, first.out) == (0, here.out), first.err
    assert "fetching tiny-Q8_0-00001-of-00003.gguf: 8.5 MiB in " in first.err
    assert len(hub.ranges) == 3
    again = command("run", *words, env=env)  # the model as it was remembered, by its first part
    assert (again.code, again.out) == (0, here.out), again.err
    listed = command("show", "-hf", "u/tiny-GGUF", "--offline", "--json", env=env)
    assert json.loads(listed.out)["artefact_folder"].startswith(str(command.home / "hub-")), listed.err
    assert len(hub.ranges) == 3


def test_a_broken_connection_is_resumed_before_the_next_part(hub: Hub, cache: Path, parts: dict[str, bytes]) -> None:
    names = sorted(parts)
    hub.add("u/r", parts | {names[0]: LARGE})
    hub.cut = 1  # of the connection for the first
    (got,) = _fetch(hub, cache, "u/r")
    assert Path(got["path"]).read_bytes() == LARGE
    for name in names[1:]:
        assert Path(got["path"]).with_name(Path(name).name).read_bytes() == parts[name]
    assert hub.ranges == [None, f"bytes={10 * MIB}-", None, None]


def test_parts_that_are_missing(hub: Hub, cache: Path, parts: dict[str, bytes]) -> None:
    names = sorted(parts)
    hub.add("u/half", {name: parts[name] for name in names[:2]})
    hub.add("u/whole", parts)
    half, whole, later = _fetch(hub, cache, "u/half", "u/whole", f"u/whole:{names[1]}")
    assert half["message"] == f"u/half lacks {names[2]}, a part of the model"
    assert later["hint"] == f"name the first: -hf u/whole:{names[0]}"
    assert len(hub.ranges) == 3, "nothing of u/half"
    (found,) = _fetch(hub, cache, "u/whole", offline=True)
    assert found["path"] == whole["path"]
    Path(whole["path"]).with_name(Path(names[2]).name).unlink()
    (lost,) = _fetch(hub, cache, "u/whole", offline=True)
    assert lost["message"] == f"the cache lacks {names[2]} of u/whole"
    assert "--offline" in lost["hint"]
    (found,) = _fetch(hub, cache, "u/whole")
    assert found["path"] == whole["path"]


# --- refusals --------------------------------------------------------------------------------------------------------


def test_each_refusal_is_one_line_with_a_fix(hub: Hub, cache: Path) -> None:
    hub.add("u/gated", {"m.gguf": TINY})
    hub.add("u/checkpoint", {"config.json": b"{}", "model.safetensors": b""})
    hub.gated.add("u/gated")
    cases = {
        "u/gated": ("u/gated is gated", "HF_TOKEN"),
        "u/none": ("there is no u/none at http://127.0.0.1", "HF_TOKEN"),
        "u/checkpoint": ("has a checkpoint, not a GGUF", "pinfer convert -hf u/checkpoint"),
        "u": ("'u' is not the name of a model on the hub", "-hf user/repo"),
    }
    for got, (message, hint) in zip(_fetch(hub, cache, *cases), cases.values(), strict=True):
        assert message in got["message"]
        assert hint in got["hint"]
        assert "\n" not in got["message"] + got["hint"]


def test_the_token_is_required_and_sent(hub: Hub, cache: Path) -> None:
    hub.add("u/private", {"m.gguf": TINY})
    hub.token = "right"
    (refused,) = _fetch(hub, cache, "u/private", token="wrong")
    assert "HF_TOKEN" in refused["hint"]
    (got,) = _fetch(hub, cache, "u/private", token="right")
    assert Path(got["path"]).name == "m.gguf"


def test_a_hub_with_server_errors(hub: Hub, cache: Path) -> None:
    hub.status = 503
    (got,) = _fetch(hub, cache, "u/r")
    assert "HTTP 503" in got["message"]
    assert "later" in got["hint"]


def test_without_a_hub_the_cache_is_used(hub: Hub, cache: Path) -> None:
    hub.add("u/r", {"m-q4_0.gguf": TINY, "m-q8_0.gguf": LARGE})
    (fetched,) = _fetch(hub, cache, "u/r:q4_0")
    nowhere = Hub(url="http://127.0.0.1:9")
    found, missing, unknown = _fetch(nowhere, cache, "u/r", "u/r:q8_0", "u/other")
    assert found["path"] == fetched["path"]
    assert "taking m-q4_0.gguf from the cache" in found["stderr"]
    for got in (missing, unknown):
        assert "cannot download u/" in got["message"]
        assert "network" in got["hint"]
    found, missing, unknown = _fetch(hub, cache, "u/r", "u/r:q8_0", "u/other", offline=True)
    assert found["path"] == fetched["path"]
    assert "no GGUF q8_0" in missing["message"]
    assert "cache has nothing of u/other" in unknown["message"]
    assert "--offline" in unknown["hint"]


# --- checkpoints -----------------------------------------------------------------------------------------------------

INDEX = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
CHECKPOINT = {
    "config.json": b"{}",
    "tokenizer.json": b"{}",
    "model.safetensors.index.json": json.dumps(INDEX).encode(),
    "model-00001-of-00002.safetensors": b"1" * 1000,
    "model-00002-of-00002.safetensors": b"2" * 1000,
    "consolidated.safetensors": b"3" * 1000,
    "pytorch_model.bin": b"4" * 1000,
    "onnx/model.safetensors": b"5" * 1000,
    "README.md": b"6",
}


def _names(folder: str) -> set[str]:
    return {path.name for path in Path(folder).iterdir()}


def test_a_checkpoint_is_its_shards_and_its_tokenizer(hub: Hub, cache: Path) -> None:
    hub.add("u/llm", CHECKPOINT)
    (got,) = _fetch(hub, cache, "u/llm", function="fetch_checkpoint")
    wanted = {"config.json", "tokenizer.json", "model.safetensors.index.json", *INDEX["weight_map"].values()}
    assert _names(got["path"]) == wanted
    n_asked = len(hub.ranges)
    (again,) = _fetch(hub, cache, "u/llm", function="fetch_checkpoint", offline=True)
    assert again["path"] == got["path"]
    (again,) = _fetch(hub, cache, "u/llm", function="fetch_checkpoint")
    assert again["path"] == got["path"]
    assert len(hub.ranges) == n_asked
    (Path(got["path"]) / "model-00002-of-00002.safetensors").unlink()
    (missing,) = _fetch(hub, cache, "u/llm", function="fetch_checkpoint", offline=True)
    assert "lacks model-00002-of-00002.safetensors" in missing["message"]


def test_pickled_weights_only_if_there_are_no_others(hub: Hub, cache: Path) -> None:
    hub.add("u/old", {"config.json": b"{}", "pytorch_model.bin": b"1", "training_args.bin": b"2", "vocab.json": b"{}"})
    hub.add("u/new", {"config.json": b"{}", "pytorch_model.bin": b"1", "model.safetensors": b"2"})
    hub.add("u/none", {"config.json": b"{}", "m.gguf": b"GGUF"})
    old, new, none, part = _fetch(hub, cache, "u/old", "u/new", "u/none", "u/old:q4_0", function="fetch_checkpoint")
    assert _names(old["path"]) == {"config.json", "pytorch_model.bin", "vocab.json"}
    assert _names(new["path"]) == {"config.json", "model.safetensors"}
    assert "pinfer run -hf u/none" in none["hint"]
    assert "write u/old" in part["hint"]


# --- other things users type ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["run", "show"])
def test_a_source_that_can_be_converted(command: CommandLine, name: str) -> None:
    folder = command.folder / "llm"
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    old = command.folder / "m.powerinfer.gguf"
    old.write_bytes(b"PWRI" + bytes(100))
    for typed, hint in (("llm", "pinfer convert llm"), (old.name, f"pinfer convert {old.name}"), ("u/r", "-hf u/r")):
        shown = command(name, typed)
        assert shown.code == 1
        assert shown.err.startswith(f"pinfer: {typed} ")
        assert hint in shown.err
        assert len(shown.err_lines) == 1


@pytest.mark.parametrize("name", ["llm/model.gguf", "llm/other", "../a", "a/b/c", "other/model.gguf"])
def test_a_path_is_not_taken_for_a_repository(command: CommandLine, name: str) -> None:
    (command.folder / "llm").mkdir()
    assert "-hf" not in command("show", name).err


def test_a_model_and_a_repository_exclude_each_other(command: CommandLine) -> None:
    shown = command("show", "a.gguf", "-hf", "u/r")
    assert shown.code == 2
    assert "two models were given, a.gguf and u/r" in shown.err
