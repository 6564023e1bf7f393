"""`pinfer run` as a user meets it: its text, its one-line errors, chat at a terminal and through pipes, Ctrl-C."""

from __future__ import annotations

import os
import pty
import random
import re
import select
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest
from support.command_line import CommandLine
from support.runs import run, run_command

from pinfer import run as stage
from pinfer.artefacts import paths
from pinfer.artefacts.placement import PlacementFile, new_placement_id
from pinfer.artefacts.predictor import LayerPredictor, PredictorWriter
from pinfer.errors import PinferError
from pinfer.gguf_io.reader import read_gguf
from pinfer.llama.plugin import runner_path
from pinfer.model import open_model
from pinfer.split import SplitOptions, split

PROMPT = "Once upon a time there was a little"
# Runs longer than any test waits, so that a signal always finds it at work.
ENDLESS = ("--ignore-eos", "-c", "65536", "--override-kv", "arcee.context_length=int:65536", "--temp", "0")


@pytest.fixture
def pinfer(tmp_path: Path) -> CommandLine:
    return CommandLine(tmp_path / "work", tmp_path / "home")


def report(model: Path, *words: object, **options: Any) -> dict[str, Any]:
    return run(model, "-p", PROMPT, "--temp", 0, *words, as_json=True, **options).json


def refused(model: Path, **options: Any) -> str:
    """The one line that a run with these options ends with, whether pinfer says it or the runner."""
    try:
        return run(model, "-p", "a", **options).error()
    except PinferError as error:
        return str(error)


@contextmanager
def started(command: list[str]) -> Iterator[tuple[subprocess.Popen[bytes], IO[bytes], IO[bytes], IO[bytes]]]:
    """The process with its stdin, stdout and stderr."""
    pipe = subprocess.PIPE
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        assert process.stderr is not None
        try:
            yield process, process.stdin, process.stdout, process.stderr
        finally:
            process.kill()


def read_until(file: int, wanted: int | bytes, seconds: float = 120) -> bytes:
    """So many bytes of a pipe or terminal at least, or all up to these, or whatever came before its end."""
    data = b""
    deadline = time.monotonic() + seconds
    while len(data) < wanted if isinstance(wanted, int) else wanted not in data:
        ready, _, _ = select.select([file], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"nothing more after {data[-2000:]!r}"
        try:
            piece = os.read(file, 4096)
        except OSError:  # the other end of a terminal is closed
            break
        if not piece:
            break
        data += piece
    return data


# --- usage and errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (("--exat",), "did you mean --exact?"),
        (("--tempp", "0"), "did you mean --temp?"),
        (("-p", "a", "-n"), "-n needs a value"),
        (("-p", "a", "-md", "b.gguf"), "only with a chat (without -p) and pinfer serve"),
        (("--json",), "give a prompt with -p"),
        (("-p", "a", "--dense", "--exact"), "exclude each other"),
        (("-p", "a", "--artefacts", "b", "--no-artifacts"), "exclude each other"),
        (("-p", "a", "--activation", "silu"), "silu"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(
    tiny_relu2: Path, pinfer: CommandLine, words: tuple[str, ...], says: str
) -> None:
    done = pinfer("run", tiny_relu2, *words)
    assert (done.code, done.out, len(done.err_lines)) == (2, "", 1), done.err
    assert says in done.err
    assert done.err.startswith("pinfer run: ")
    assert "pinfer run --help" in done.err


def test_a_value_that_llama_cpp_refuses(tiny_relu2: Path) -> None:
    for words, says in ((("-n", "many"), '"-n"'), (("-ctk", "q9"), '"-ctk"')):
        done = run(tiny_relu2, "-p", "a", *words)
        assert (done.code, done.raw) == (2, b"")
        assert says in done.err
    done = run(tiny_relu2, "-p", "a", "-lm", "none")
    assert (done.code, len(done.err.splitlines())) == (2, 1)
    assert "--load-mode mmap" in done.err
    assert run(tiny_relu2, "-p", "a", "-n", 1, "-lm", "none", dense=True).code == 0


def test_help(pinfer: CommandLine) -> None:
    for command, upstream in (("run", "--prompt-cache"), ("serve", "--api-key-file")):
        short, every = pinfer(command, "-h"), pinfer(command, "--help-all")
        assert (short.code, every.code, every.err) == (0, 0, "")
        assert "--hot-device" in short.out
        assert f"pinfer {command} --help-all" in short.out
        assert len(short.out.splitlines()) < 50
        assert upstream in every.out
        assert upstream not in short.out


def test_flags_that_are_read_exist_in_llama_cpp() -> None:
    for names in vars(stage).values():
        if isinstance(names, tuple) and all(isinstance(name, str) and name.startswith("-") for name in names):
            assert any(set(names) <= set(stage.flags_of(program)) for program in ("completion", "cli", "server")), names


def test_files_that_are_not_models(tmp_path: Path, pinfer: CommandLine) -> None:
    empty, text = tmp_path / "empty.gguf", tmp_path / "text.gguf"
    empty.touch()
    text.write_text("no model " * 100)
    for path in (tmp_path / "missing.gguf", empty, text, tmp_path):
        done = pinfer("run", path, "-p", "a")
        assert (done.code, done.out, len(done.err_lines)) == (1, "", 1), done.err
        assert path.name in done.err


def test_a_damaged_header_never_kills_the_runner(tiny_relu2: Path) -> None:
    """Numbers of the header replaced by nonsense: libllama may assert, divide by zero or read where nothing is."""
    command = run_command(tiny_relu2, "-p", "Once", "-n", 2, "-c", 128)
    whole = tiny_relu2.read_bytes()
    header = read_gguf(tiny_relu2).data_offset
    scalars = [
        m.end() for m in re.finditer(rb"(?:arcee|tokenizer\.ggml)\.[a-z_.]{3,40}\x04\x00\x00\x00", whole[:header])
    ]
    assert len(scalars) >= 8
    rng = random.Random(5)
    for _ in range(24):
        data = bytearray(whole)
        place = rng.choice(scalars)
        value = rng.choice([0, 1, 3, 255, 65537, 0x7FFFFFFF, 0xFFFFFFFF])
        data[place : place + 4] = value.to_bytes(4, "little")
        tiny_relu2.write_bytes(data)
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
        assert done.returncode in (0, 1), (place, value, done.returncode, done.stderr)
        if done.returncode == 1:
            assert [line[:8] for line in done.stderr.splitlines()] == ["pinfer: "], (place, value, done.stderr)


def test_what_does_not_fit_or_exist(tiny_relu2: Path, tmp_path: Path) -> None:
    line = run(tiny_relu2, "-p", "word " * 400, "-c", 128).error()
    assert "prompt is too long" in line
    assert "-c makes" in line
    for flag in ("-f", "-sysf", "--grammar-file"):
        with pytest.raises(PinferError, match=f"{flag} .*none.txt: No such file"):
            run_command(tiny_relu2, "-p", "a", flag, tmp_path / "none.txt")
    assert run(tiny_relu2, "-p", "a", "--grammar", 'root ::= "').code == 1
    assert "is not a folder" in refused(tiny_relu2, artefacts=tmp_path / "none")


def test_a_full_disk_and_a_closed_pipe_at_stdout(tiny_relu2: Path) -> None:
    command = run_command(tiny_relu2, "-p", PROMPT, *ENDLESS)
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, timeout=120, check=False)
    assert done.returncode == 1
    assert b"No space left" in done.stderr
    with started(command) as (process, _, out, err):
        read_until(out.fileno(), 10)
        out.close()
        assert process.wait(120) == 141
        assert err.read() == b""


def test_a_runner_that_is_missing(tiny_relu2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "native"
    (fake / "lib").mkdir(parents=True)
    (fake / "lib" / "libggml-pinfer.so").touch()
    monkeypatch.setenv("PINFER_NATIVE_DIR", str(fake))
    with pytest.raises(PinferError, match="make build"):
        run_command(tiny_relu2, "-p", "a")
    with pytest.raises(PinferError, match="make build"):
        stage.become([str(fake / "bin" / "pinfer-runner")])
    with pytest.raises(PinferError, match="cannot start"):
        stage.become([sys.executable, "a\0b"])


# --- text -------------------------------------------------------------------------------------------------------------


def test_ten_runs_at_temperature_0_give_the_same_bytes(tiny_relu2: Path) -> None:
    runs = [run(tiny_relu2, "-p", PROMPT, "-n", 48, "--temp", 0) for _ in range(10)]
    assert all(done.code == 0 for done in runs)
    assert {done.raw for done in runs} == {runs[0].raw}
    assert runs[0].out.startswith(PROMPT)
    assert len(runs[0].out) > len(PROMPT) + 48


def test_exact_mode_writes_what_stock_llama_cpp_writes(tiny_relu2: Path) -> None:
    exact, dense = report(tiny_relu2, "-n", 64), report(tiny_relu2, "-n", 64, dense=True)
    assert (exact["mode"], dense["mode"]) == ("exact", "dense")
    assert exact["tokens"] == dense["tokens"]
    assert exact["n_gen"] == 64
    assert 0 < exact["active"] < 1
    assert dense["active"] is None


def test_the_model_says_what_its_ffn_is(tiny_reglu: Path) -> None:
    known, told = report(tiny_reglu, "-n", 16), report(tiny_reglu, "-n", 16, activation="reglu")
    assert known["tokens"] == told["tokens"]
    assert known["mode"] == "exact"
    assert known["n_fallback"] == 0


def test_notes_and_the_closing_line_go_to_stderr(tiny_reglu: Path, pinfer: CommandLine) -> None:
    done = pinfer("run", tiny_reglu, "-p", PROMPT, "-n", "4", "--temp", "0", "--ignore-eos", "--dense")
    assert done.code == 0
    assert done.out.startswith(PROMPT)
    note, closing = done.err_lines
    assert note.startswith("note: stock libllama does not compute reglu for this model")
    assert re.fullmatch(r"\[ Prompt: [\d.]+ t/s \| Generation: [\d.]+ t/s \]", closing)
    done = pinfer("run", tiny_reglu, "-p", PROMPT, "-n", "4", "--temp", "0", "--ignore-eos")
    (closing,) = done.err_lines
    assert re.fullmatch(r"\[ Prompt: [\d.]+ t/s \| Generation: [\d.]+ t/s \| active [\d.]+ % \]", closing)


def test_json_holds_the_whole_run(tiny_relu2: Path) -> None:
    prompt = 'A "quoted"\tback\\slash, a é and\na line'
    words = ("-p", prompt, "--no-escape", "-n", 12, "-s", 7, "-c", 200, "-t", 1)
    done = run(tiny_relu2, *words, as_json=True)
    value = done.json
    assert done.raw.count(b"\n") == 1
    assert value["prompt"] == prompt
    assert value["model"] == str(tiny_relu2)
    assert value["seed"] == 7
    assert value["n_threads"] == 1
    assert 200 <= value["n_ctx"] < 512  # llama.cpp rounds it up
    assert value["n_prompt"] == len(value["prompt_tokens"])
    assert value["n_gen"] == len(value["tokens"])
    assert (value["stop"], value["n_gen"]) == ("length", 12) or value["stop"] == "eog"
    assert value["prompt_tps"] > 0
    assert value["gen_tps"] > 0
    assert value["isa"] in ("avx512", "avx2", "neon", "scalar")
    assert value["hot"] is None
    text = run(tiny_relu2, *words)
    assert text.out.removesuffix("\n") == (prompt + value["text"]).removesuffix("\n")


def test_a_seed_repeats_a_text(tiny_relu2: Path) -> None:
    first, again, other = (
        run(tiny_relu2, "-p", PROMPT, "-n", 24, "--temp", 1.5, "--ignore-eos", "-s", seed, as_json=True).json
        for seed in (1, 1, 2)
    )
    assert first["tokens"] == again["tokens"] != other["tokens"]


def test_prompts(tiny_relu2: Path, tmp_path: Path) -> None:
    base = ("-n", 8, "--temp", 0)
    plain = run(tiny_relu2, *base, "-p", PROMPT)
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT + "\n")
    assert run(tiny_relu2, *base, "-f", file).raw == plain.raw
    assert run(tiny_relu2, *base, "-f", "-", stdin=PROMPT).raw == plain.raw
    hidden = run(tiny_relu2, *base, "-p", PROMPT, "--no-display-prompt")
    assert PROMPT + hidden.out == plain.out
    assert run(tiny_relu2, *base, "-p", "a\\nb\\x41").out.startswith("a\nbA")
    assert run(tiny_relu2, *base, "-p", "a\\nb", "--no-escape").out.startswith("a\\nb")
    # an empty prompt begins with the token that begins a text
    assert run(tiny_relu2, *base, "-p", "").code == 0
    # small batches, same text
    assert run(tiny_relu2, *base, "-p", PROMPT, "-b", 3, "-ub", 2, dense=True).raw == plain.raw
    # bytes that are not UTF-8
    assert run(tiny_relu2, "-f", "-", "-n", 4, stdin=b"a \xff\xfe b \xc3", as_json=True).json["prompt"] == "a �� b �"


def test_flags_reach_llama_cpp(tiny_relu2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    grammar = tmp_path / "yes.gbnf"
    grammar.write_text('root ::= " yes" | " no"\n')
    done = run(tiny_relu2, "-p", "Is it?", "--no-display-prompt", "--grammar-file", grammar)
    assert done.out in (" yes\n", " no\n")
    free = report(tiny_relu2, "-n", 48, "--ignore-eos")
    for words in (
        ("--repeat-penalty", 1.8, "--repeat-last-n", 64),
        ("--logit-bias", "505-20"),
    ):
        assert report(tiny_relu2, "-n", 48, "--ignore-eos", *words)["tokens"] != free["tokens"], words
    # llama.cpp's environment variables decide where nothing was typed
    monkeypatch.setenv("LLAMA_ARG_CTX_SIZE", "1024")
    done = run(tiny_relu2, "-p", PROMPT, "-n", 4, as_json=True)
    assert done.json["n_ctx"] == 1024
    assert "environment variable" not in done.err


def test_characters_arrive_whole(tiny_relu2: Path) -> None:
    """A grammar makes the model write characters of two, three and four bytes, token by token."""
    words = ("-p", "x", "--grammar", "root ::= [éñ中界😀🐑]{24}", "--temp", 0)
    text = run(tiny_relu2, *words, "--no-display-prompt").out.removesuffix("\n")
    assert len(text) == 24
    assert set(text) <= set("éñ中界😀🐑")
    assert run(tiny_relu2, *words, as_json=True).json["text"] == text
    # stopped in the middle of a character
    assert any("�" in run(tiny_relu2, *words, "-n", n, as_json=True).json["text"] for n in range(1, 8))


def test_a_full_context_ends_the_text(tiny_relu2: Path) -> None:
    done = run(tiny_relu2, "-p", PROMPT, "-c", 256, "--temp", 0, "--ignore-eos", as_json=True)
    value = done.json
    assert value["stop"] == "context"
    assert 250 <= value["n_prompt"] + value["n_gen"] <= 257
    assert "the context is full; -c makes it larger" in done.err


# --- artefacts --------------------------------------------------------------------------------------------------------


def make_shards(path: Path, hot_share: float, device: str = "CPU", identity: str | None = None) -> Path:
    """placement.gguf, hot.gguf and cold.gguf of a random placement; returns their folder."""
    model = open_model(path)
    rng = np.random.default_rng(3)
    n_hot = int(model.n_ff * hot_share) // 64 * 64
    order = tuple(rng.permutation(model.n_ff).astype(np.int32) for _ in range(model.n_layer))
    folder = paths.artefact_dir(path, model.fingerprint, for_writing=True)
    placement = PlacementFile(
        identity or new_placement_id(), (n_hot,) * model.n_layer, device, 1 << 30, 0, 512, {}, order
    )
    placement.write(folder / paths.PLACEMENT, model, {})
    split(path, SplitOptions())
    return folder


def make_predictor(path: Path, threshold: float) -> Path:
    """predictor.gguf that names every neuron (a threshold below all scores) or none (above)."""
    model = open_model(path)
    rng = np.random.default_rng(4)
    folder = paths.artefact_dir(path, model.fingerprint, for_writing=True)
    with PredictorWriter(folder / paths.PREDICTOR, model, "f16") as out:
        for _ in range(model.n_layer):
            a = rng.standard_normal((32, model.n_embd), dtype=np.float32)
            b = rng.standard_normal((model.n_ff, 32), dtype=np.float32)
            out.add(LayerPredictor(32, 1.0, 1.0, a, b, np.full(model.n_ff, threshold, np.float32)))
        out.finish({})
    return folder / paths.PREDICTOR


def test_artefacts_are_found_and_used(tiny_relu2: Path) -> None:
    without = report(tiny_relu2, "-n", 24)
    folder = make_shards(tiny_relu2, 0.0)
    cold = report(tiny_relu2, "-n", 24)
    assert cold["n_ctx"] == 512, "the context it was solved for"
    assert (cold["mode"], cold["hot"], cold["n_gen"]) == ("exact", None, 24)
    make_predictor(tiny_relu2, -1e30)
    every = report(tiny_relu2, "-n", 24)
    assert (every["mode"], every["candidates"]) == ("predicted", 1)
    assert every["tokens"] == cold["tokens"]
    make_predictor(tiny_relu2, 1e30)
    none = report(tiny_relu2, "-n", 24)
    assert (none["candidates"], none["active"]) == (0, 0)
    assert report(tiny_relu2, "-n", 24, exact=True)["mode"] == "exact"
    # the same folder, named; and nothing of it
    named = folder.rename(folder.with_name("elsewhere"))
    assert report(tiny_relu2, "-n", 24)["mode"] == "exact"
    assert report(tiny_relu2, "-n", 24, artefacts=named)["mode"] == "predicted"
    named.rename(folder)
    plain = report(tiny_relu2, "-n", 24, no_artefacts=True)
    assert plain["tokens"] == without["tokens"]
    assert plain["n_ctx"] == without["n_ctx"]
    line = run(tiny_relu2, "-p", PROMPT, "-n", 8, "--ignore-eos", "--temp", 0).err.strip()
    assert re.search(r"active 0\.0 % \| computed 0 % \]$", line)


def test_artefacts_under_pinfer_home(tiny_relu2: Path) -> None:
    folder = make_shards(tiny_relu2, 0.0)
    home = paths.pinfer_home() / f"{tiny_relu2.name}-{open_model(tiny_relu2).fingerprint[:12]}"
    home.parent.mkdir(parents=True, exist_ok=True)
    folder.rename(home)
    assert report(tiny_relu2, "-n", 1)["n_ctx"] == 512


def test_a_hot_part_runs_on_the_device(tiny_relu2: Path) -> None:
    make_shards(tiny_relu2, 0.5)
    n_ff = open_model(tiny_relu2).n_ff
    runs = [report(tiny_relu2, "-n", 24, device="CPU") for _ in range(3)]
    assert all(value["tokens"] == runs[0]["tokens"] for value in runs)
    assert runs[0]["hot"] == pytest.approx((n_ff // 2 // 64 * 64) / n_ff)
    assert runs[0]["hot_bytes"] > 0
    line = run(tiny_relu2, "-p", PROMPT, "-n", 8, "--temp", 0, device="CPU").err
    assert "on GPU 50 %" in line
    # the device it was solved for is the default
    assert report(tiny_relu2, "-n", 24)["tokens"] == runs[0]["tokens"]
    assert report(tiny_relu2, "-n", 24)["hot"] == runs[0]["hot"]
    # no hot part at all: the model itself
    none = report(tiny_relu2, "-n", 24, device="none")
    assert (none["hot"], none["tokens"]) == (None, report(tiny_relu2, "-n", 24, no_artefacts=True)["tokens"])


def test_two_hot_devices(tiny_relu2: Path) -> None:
    folder = make_shards(tiny_relu2, 0.5, identity="0123456789abcdef")
    one = report(tiny_relu2, "-n", 24, device="CPU")
    kept = {name: (folder / name).read_bytes() for name in (paths.HOT, paths.COLD, paths.PLACEMENT)}
    make_shards(tiny_relu2, 0.0, identity="0123456789abcdef")
    nothing = (folder / paths.HOT).read_bytes()
    for name, data in kept.items():
        (folder / name).write_bytes(data)
    (folder / "hot-1.gguf").write_bytes(nothing)
    for devices in ("CPU,CPU", "cpu,CPU"):
        two = report(tiny_relu2, "-n", 24, device=devices)
        assert [two[key] for key in ("tokens", "hot", "hot_bytes")] == [
            one[key] for key in ("tokens", "hot", "hot_bytes")
        ]
    for devices in ("CPU", "CPU,CPU,CPU"):
        line = refused(tiny_relu2, device=devices)
        assert "one of 2 hot shards" in line
        assert "--hot-device" in line
    assert "there is no device CUDA99" in refused(tiny_relu2, device="CPU,CUDA99")
    # half of the neurons in the place of none
    (folder / "hot-1.gguf").write_bytes(kept[paths.HOT])
    assert "exactly once" in refused(tiny_relu2, device="CPU,CPU")


def test_device_memory_is_counted(tiny_relu2: Path) -> None:
    make_shards(tiny_relu2, 0.5)
    hot = report(tiny_relu2, "-n", 4, device="CPU")
    assert hot["vram_used"] == hot["vram_used_counted"] == hot["hot_bytes"] > 0
    assert hot["vram_limit"] == 1 << 30  # of the placement
    line = run(tiny_relu2, "-p", PROMPT, "-n", 4, "--temp", 0, device="CPU").err
    assert "VRAM 0.0/1.0 GiB" in line
    none = report(tiny_relu2, "-n", 4, device="none")
    assert none["vram_used"] is None
    assert none["vram_used_counted"] is None


def test_a_hot_part_without_a_device(tiny_relu2: Path, pinfer: CommandLine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    folder = make_shards(tiny_relu2, 0.5, device="CUDA99")
    line = refused(tiny_relu2)
    assert "there is no device CUDA99" in line
    assert "--vram 0" in line
    assert "--hot-device" in line
    (folder / paths.COLD).unlink()
    assert "pinfer split" in refused(tiny_relu2, device="CPU")
    (folder / paths.HOT).unlink()
    done = pinfer("run", tiny_relu2, "-p", "a", "-n", "1")
    assert done.code == 0
    assert "note: the placement has not been split yet" in done.err


def test_artefacts_of_another_model_are_refused(tiny_relu2: Path, tiny_reglu: Path) -> None:
    folder = make_shards(tiny_reglu, 0.0)
    for name in (paths.PLACEMENT, paths.COLD):
        line = refused(tiny_relu2, artefacts=folder)
        assert "another model" in line
        assert str(folder / name) in line
        assert str(tiny_relu2) in line
        (folder / name).unlink()
        (folder / paths.HOT).unlink(missing_ok=True)
    predictor = make_predictor(tiny_reglu, 0.0)
    assert str(predictor) in refused(tiny_relu2, artefacts=folder)


# --- chat -------------------------------------------------------------------------------------------------------------


def test_a_chat_through_pipes_has_nothing_but_answers_on_stdout(tiny_relu2: Path) -> None:
    done = run(tiny_relu2, "-n", 12, "--temp", 0, stdin="Hello there\nAnd then?\n/clear\nHello there\n")
    assert done.code == 0
    first, second, third = done.out.splitlines()
    assert first == third != second
    assert re.fullmatch(r"\[ active [\d.]+ % \]\n", done.err), done.err
    # -sys and -cnv ask for a chat that begins with the prompt; -st ends it after one answer
    with_prompt = run(tiny_relu2, "-n", 12, "--temp", 0, "-cnv", "-st", "-p", "Hello there")
    assert (with_prompt.code, with_prompt.out) == (0, first + "\n")
    told = run(tiny_relu2, "-n", 12, "--temp", 0, "-st", "-p", "Hello there", "-sys", "Say no")
    assert (told.code, told.out != with_prompt.out) == (0, True)
    assert run(tiny_relu2, stdin="").raw == b""


def test_a_chat_writes_what_stock_llama_cpp_writes(tiny_relu2: Path) -> None:
    lines = "Hello there\nAnd then?\n"
    exact = run(tiny_relu2, "-n", 32, "--temp", 0, stdin=lines)
    dense = run(tiny_relu2, "-n", 32, "--temp", 0, stdin=lines, dense=True)
    assert exact.raw == dense.raw != b""


class Terminal:
    """`pinfer run` at a pseudo-terminal."""

    def __init__(self, *words: str | Path) -> None:
        self.seen = b""
        self.process, self.file = pty.fork()
        if self.process == 0:
            os.execv(sys.executable, [sys.executable, "-m", "pinfer", "run", *map(str, words)])

    def type(self, text: bytes) -> None:
        # A paste comes in pieces that the terminal's buffer can hold.
        for at in range(0, len(text), 1024):
            os.write(self.file, text[at : at + 1024])
            if len(text) > 1024:
                self.seen += read_until(self.file, 1)

    def wait_for(self, text: bytes) -> bytes:
        """What was shown until then."""
        while text not in self.seen:
            piece = read_until(self.file, 1)
            assert piece, self.seen[-2000:]
            self.seen += piece
        end = self.seen.index(text) + len(text)
        shown, self.seen = self.seen[:end], self.seen[end:]
        return shown

    def end(self) -> tuple[int, bytes]:
        """Exit code and the rest of what was shown."""
        while piece := read_until(self.file, 1):
            self.seen += piece
        _, status = os.waitpid(self.process, 0)
        os.close(self.file)
        return os.waitstatus_to_exitcode(status), self.seen


def test_ctrl_c_in_a_chat_stops_the_answer_then_leaves(tiny_relu2: Path) -> None:
    chat = Terminal(tiny_relu2, *ENDLESS)
    assert b"/regen" in chat.wait_for(b"\n> ")
    chat.type(b"Hello there\n")
    chat.wait_for(b"The ")
    time.sleep(0.3)
    chat.type(b"\x03")
    assert b"Generation: " in chat.wait_for(b"\n> ")
    time.sleep(0.5)  # the prompt is there a moment before its keys are read
    chat.type(b"\x03")
    code, rest = chat.end()
    assert code == 0
    assert b"[ active " in rest
    assert b"Traceback" not in rest


def test_keys_and_commands_of_a_chat(tiny_relu2: Path) -> None:
    chat = Terminal(tiny_relu2, "-n", "8", "--temp", "0")
    chat.wait_for(b"\n> ")
    chat.type(b"Hello therX\x7fe\n")
    first = chat.wait_for(b"\n> ")
    chat.type(b"/clear\n")
    chat.wait_for(b"\n> ")
    chat.type(b"\x1b[A\x1b[A\n")  # two lines back in the history
    answer = re.compile(rb"The [^\r\n]+")
    assert answer.findall(first) == answer.findall(chat.wait_for(b"\n> ")) != []
    chat.type(b"\x04")  # Ctrl-D
    assert chat.end()[0] == 0


def test_a_pasted_line_arrives_whole(tiny_relu2: Path, tmp_path: Path) -> None:
    """Longer than the 4095 bytes that a terminal's own line editing keeps."""
    chat = Terminal(
        tiny_relu2,
        "-n",
        "1",
        "-c",
        "65536",
        "--override-kv",
        "arcee.context_length=int:65536",
        "-v",
        "--log-file",
        tmp_path / "log",
    )
    chat.wait_for(b"\n> ")
    line = b"word " * 4000 + b"the end"
    chat.type(line + b"\n")
    chat.wait_for(b"[ Prompt: ")
    chat.type(b"\x04")
    chat.end()
    tokens = max(int(n) for n in re.findall(rb"n_tokens = (\d+)", (tmp_path / "log").read_bytes()))
    assert tokens > 4000


# --- signals ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["exact", "dense"])
def test_ctrl_c_ends_a_run_with_130(tiny_relu2: Path, mode: str) -> None:
    options: dict[str, Any] = {mode: True}
    command = run_command(tiny_relu2, "-p", PROMPT, *ENDLESS, **options)
    with started(command) as (process, _, out, err):
        read_until(out.fileno(), len(PROMPT) + 20)
        process.send_signal(signal.SIGINT)
        assert out.read().endswith(b"\n")
        assert process.wait(60) == 130
        assert b"Generation:" in err.read(), "what was done until then is reported"


def test_ctrl_c_within_a_long_prompt(tiny_relu2: Path) -> None:
    command = run_command(tiny_relu2, "-f", "-", "-ub", 2048, "-b", 2048, "-t", 1, *ENDLESS)
    with started(command) as (process, into, out, err):
        into.write(b"word " * 30000)
        into.close()
        time.sleep(1)
        begin = time.monotonic()
        process.send_signal(signal.SIGINT)
        assert process.wait(60) in (130, -signal.SIGINT)
        assert time.monotonic() - begin < 4
        assert b"Traceback" not in err.read()
        del out


def test_the_command_becomes_the_runner(tiny_relu2: Path) -> None:
    """Signals reach it, and its exit code is the command's."""
    command = [sys.executable, "-m", "pinfer", "run", str(tiny_relu2), "-p", PROMPT, *ENDLESS]
    with started(command) as (process, _, out, err):
        read_until(out.fileno(), len(PROMPT) + 20)
        assert Path(f"/proc/{process.pid}/exe").resolve() == runner_path().resolve()
        process.send_signal(signal.SIGINT)
        out.read()
        assert process.wait(60) == 130
        assert b"Traceback" not in err.read()


@pytest.mark.parametrize("words", [("-n", 4), ENDLESS])
def test_sigterm_ends_a_chat(tiny_relu2: Path, words: tuple[object, ...]) -> None:
    """One that waits for a question, and one in the middle of an answer (which Ctrl-C would only cut short)."""
    with started(run_command(tiny_relu2, *words)) as (process, into, out, err):
        into.write(b"Hello\n")
        read_until(out.fileno(), b"\n" if words[0] == "-n" else 20)
        process.send_signal(signal.SIGTERM)
        assert process.wait(10) == 128 + signal.SIGTERM
        assert b"[ active " in err.read()
