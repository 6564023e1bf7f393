"""The runner as a user meets it: its output, its one-line errors, chat, Ctrl-C, and the Python side that starts it."""

from __future__ import annotations

import json
import os
import pty
import random
import re
import select
import signal
import subprocess
import sys
import time
from dataclasses import dataclass, fields
from pathlib import Path
from typing import IO, Any

import numpy as np
import pytest

from pinfer import run as stage
from pinfer.artefacts import paths
from pinfer.artefacts.placement import PlacementFile, new_placement_id
from pinfer.artefacts.predictor import LayerPredictor, PredictorWriter
from pinfer.errors import PinferError
from pinfer.gguf_io.reader import read_gguf
from pinfer.llama.plugin import runner_path
from pinfer.model import open_model
from pinfer.run import RunOptions, runner_arguments
from pinfer.split import SplitOptions, split

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "Once upon a time there was a little"
CHATML = (
    "{% for message in messages %}{{'<|im_start|>' + message['role'] + '\\n' + message['content'] + '<|im_end|>' "
    "+ '\\n'}}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
)
UNKNOWN = "{{ messages | something_else }}"
# Runs longer than any test waits, so that a signal always finds it at work.
ENDLESS = ("--ignore-eos", "-n", "-1", "-c", "65536", "--temp", "0")


@dataclass(frozen=True)
class Outcome:
    code: int
    raw: bytes
    err: str

    @property
    def out(self) -> str:
        return self.raw.decode("utf-8")  # strict: whatever the runner streams is UTF-8

    @property
    def json(self) -> dict[str, Any]:
        assert self.code == 0, self.err
        value = json.loads(self.out)
        assert isinstance(value, dict)
        return value

    def error(self) -> str:
        """The one line of an error."""
        assert self.code == 1, (self.code, self.err)
        assert not self.raw
        lines = self.err.splitlines()
        assert len(lines) == 1, lines
        assert lines[0].startswith("error: ")
        return lines[0]


def runner(*args: object, stdin: str | bytes = b"", timeout: float = 200) -> Outcome:
    data = stdin.encode() if isinstance(stdin, str) else stdin
    command = [str(runner_path()), *map(str, args)]
    done = subprocess.run(command, input=data, capture_output=True, timeout=timeout, check=False)
    return Outcome(done.returncode, done.stdout, done.stderr.decode("utf-8", "replace"))


def report(model: Path, *args: object) -> dict[str, Any]:
    return runner("-m", model, "-p", PROMPT, "--temp", 0, "--json", *args).json


def start(*args: object) -> subprocess.Popen[bytes]:
    command = [str(runner_path()), *map(str, args)]
    pipe = subprocess.PIPE
    return subprocess.Popen(command, stdin=pipe, stdout=pipe, stderr=pipe, bufsize=0)


def pipes(process: subprocess.Popen[bytes]) -> tuple[IO[bytes], IO[bytes], IO[bytes]]:
    """stdin, stdout and stderr of a started runner."""
    assert process.stdin is not None
    assert process.stdout is not None
    assert process.stderr is not None
    return process.stdin, process.stdout, process.stderr


def read_until(file: int, wanted: int, seconds: float = 120) -> bytes:
    """At least ``wanted`` bytes of a pipe, or whatever came before its end."""
    data = b""
    deadline = time.monotonic() + seconds
    while len(data) < wanted:
        ready, _, _ = select.select([file], [], [], max(0.0, deadline - time.monotonic()))
        assert ready, f"nothing more after {data!r}"
        try:
            piece = os.read(file, 4096)
        except OSError:  # the other end of a terminal is closed
            break
        if not piece:
            break
        data += piece
    return data


def with_template(model: Path, template: str) -> Path:
    """A copy of the model with a chat template."""
    copy = model.with_name("chat.gguf")
    command = [sys.executable, "-m", "gguf.scripts.gguf_new_metadata", "--force", "--chat-template", template]
    subprocess.run([*command, str(model), str(copy)], check=True, capture_output=True, timeout=120)
    return copy


# --- usage and errors -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("args", "says"),
    [
        ((), "no model"),
        (("-m",), "wants a value"),
        (("-m", "x.gguf", "--nonsense"), "unknown option --nonsense"),
        (("-m", "x.gguf", "stray"), "unexpected argument stray"),
        (("-m", "x.gguf", "-n", "many"), "whole number"),
        (("-m", "x.gguf", "-n", "1.5"), "whole number"),
        (("-m", "x.gguf", "-n", "99999999999999999999"), "whole number"),
        (("-m", "x.gguf", "-b", "0"), "at least 1"),
        (("-m", "x.gguf", "--temp", "-1"), "--temp"),
        (("-m", "x.gguf", "--top-p", "nan"), "a number"),
        (("-m", "x.gguf", "--json"), "give a prompt"),
        (("-m", "x.gguf", "-p", "a", "-sys", "b"), "-sys belongs to a chat"),
        (("-m", "x.gguf", "-cnv", "-no-cnv"), "exclude each other"),
        (("-m", "x.gguf", "--dense", "--exact"), "exclude each other"),
        (("-m", "x.gguf", "-fa", "on", "off"), "unexpected argument off"),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(args: tuple[str, ...], says: str) -> None:
    done = runner(*args)
    assert (done.code, done.raw) == (2, b"")
    (line,) = done.err.splitlines()
    assert line.startswith("error: ")
    assert says in line


def test_usage_that_depends_on_the_model(tiny_relu2: Path) -> None:
    for args, says in ((("--no-mmap",), "--dense"), (("-ctk", "q9"), "q8_0"), (("--activation", "silu"), "reglu")):
        done = runner("-m", tiny_relu2, "-p", "a", *args)
        assert (done.code, done.raw, len(done.err.splitlines())) == (2, b"", 1)
        assert says in done.err


def test_help_names_every_option_on_stdout() -> None:
    done = runner("--help")
    assert (done.code, done.err) == (0, "")
    for name in ("-m, --model", "-p, --prompt", "-ngl", "--min-p", "--dense", "--artefacts", "-sys", "--json"):
        assert name in done.out


def test_files_that_are_no_model(tmp_path: Path) -> None:
    empty, text, folder = tmp_path / "empty.gguf", tmp_path / "text.gguf", tmp_path / "folder.gguf"
    empty.touch()
    text.write_text("no model " * 100)
    folder.mkdir()
    assert "does not exist" in runner("-m", tmp_path / "missing.gguf", "-p", "a").error()
    assert "is empty" in runner("-m", empty, "-p", "a").error()
    assert "not a GGUF" in runner("-m", text, "-p", "a").error()
    assert "is a folder" in runner("-m", folder, "-p", "a").error()


@pytest.mark.parametrize("share", [0.0001, 0.001, 0.005, 0.3, 0.7, 0.999])
def test_a_cut_model_says_so(tiny_relu2: Path, share: float) -> None:
    os.truncate(tiny_relu2, int(tiny_relu2.stat().st_size * share))
    assert str(tiny_relu2) in runner("-m", tiny_relu2, "-p", "a").error()


def test_a_damaged_header_never_kills_the_runner(tiny_relu2: Path) -> None:
    """Numbers of the header replaced by nonsense: libllama may assert, divide by zero or read where nothing is."""
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
        done = runner("-m", tiny_relu2, "-p", "Once", "-n", 2, "-c", 128)
        assert done.code in (0, 1), (place, value, done.code, done.err)
        if done.code == 1:
            assert [line[:7] for line in done.err.splitlines()] == ["error: "], (place, value, done.err)


def test_what_does_not_fit_or_exist(tiny_relu2: Path, tmp_path: Path) -> None:
    at = ("-m", tiny_relu2, "-p", "word " * 400)
    assert "the context 128" in runner(*at, "-c", 128).error()
    assert "no device NONSENSE" in runner("-m", tiny_relu2, "-p", "a", "--device", "NONSENSE").error()
    assert "cannot be parsed" in runner("-m", tiny_relu2, "-p", "a", "--grammar", 'root ::= "').error()
    assert "No such file" in runner("-m", tiny_relu2, "-f", tmp_path / "none.txt").error()
    assert "no folder" in runner("-m", tiny_relu2, "-p", "a", "--artefacts", tmp_path / "none").error()


def test_a_full_disk_and_a_closed_pipe_at_stdout(tiny_relu2: Path) -> None:
    command = [str(runner_path()), "-m", str(tiny_relu2), "-p", PROMPT, *ENDLESS]
    with Path("/dev/full").open("wb") as full:
        done = subprocess.run(command, stdout=full, stderr=subprocess.PIPE, timeout=120, check=False)
    assert done.returncode == 1
    assert b"No space left" in done.stderr
    with start(*command[1:]) as process:
        _, out, err = pipes(process)
        read_until(out.fileno(), 10)
        out.close()
        assert process.wait(120) == 141
        assert err.read() == b""


# --- text -------------------------------------------------------------------------------------------------------------


def test_ten_runs_at_temperature_0_give_the_same_bytes(tiny_relu2: Path) -> None:
    runs = [runner("-m", tiny_relu2, "-p", PROMPT, "-n", 48, "--temp", 0) for _ in range(10)]
    assert all(done.code == 0 for done in runs)
    assert {done.raw for done in runs} == {runs[0].raw}
    assert runs[0].out.startswith(PROMPT)
    assert len(runs[0].out) > len(PROMPT) + 48


def test_exact_mode_writes_what_stock_libllama_writes(tiny_relu2: Path) -> None:
    exact, dense = report(tiny_relu2, "-n", 64), report(tiny_relu2, "-n", 64, "--dense")
    assert (exact["mode"], dense["mode"]) == ("exact", "dense")
    assert exact["tokens"] == dense["tokens"]
    assert exact["n_gen"] == 64
    assert 0 < exact["active"] < 1
    assert dense["active"] is None


def test_the_model_says_what_its_ffn_is(tiny_reglu: Path) -> None:
    known, told = report(tiny_reglu, "-n", 16), report(tiny_reglu, "-n", 16, "--activation", "reglu")
    assert known["tokens"] == told["tokens"]
    assert known["mode"] == "exact"
    assert known["n_fallback"] == 0
    dense = runner("-m", tiny_reglu, "-p", PROMPT, "-n", 4, "--dense")
    assert dense.code == 0
    assert "stock libllama does not know that this model's FFN is reglu" in dense.err


def test_a_model_without_exact_zeros_runs_dense_and_says_so(tiny_relu2: Path) -> None:
    done = runner("-m", tiny_relu2, "-p", PROMPT, "-n", 8, "--temp", 0, "--json", "--activation", "other")
    assert done.json["mode"] == "dense"
    notes = [line for line in done.err.splitlines() if "running dense" in line]
    assert len(notes) == 1
    assert done.json["tokens"] == report(tiny_relu2, "-n", 8, "--dense")["tokens"]


def test_json_holds_the_whole_run(tiny_relu2: Path) -> None:
    prompt = 'A "quoted"\tback\\slash, a é and\na line'
    done = runner("-m", tiny_relu2, "-p", prompt, "--no-escape", "-n", 12, "-s", 7, "-c", 200, "-t", 1, "--json")
    value = done.json
    assert done.raw.count(b"\n") == 1
    assert value["prompt"] == prompt
    assert value["model"] == str(tiny_relu2)
    assert (value["seed"], value["n_ctx"], value["n_threads"]) == (7, 200, 1)
    assert value["n_prompt"] == len(value["prompt_tokens"])
    assert value["n_gen"] == len(value["tokens"])
    assert (value["stop"], value["n_gen"]) == ("length", 12) or value["stop"] == "eog"
    assert value["prompt_tps"] > 0
    assert value["gen_tps"] > 0
    assert value["isa"] in ("avx512", "avx2", "neon", "scalar")
    assert value["hot"] is None
    text = runner("-m", tiny_relu2, "-p", prompt, "--no-escape", "-n", 12, "-s", 7, "-c", 200, "-t", 1)
    assert text.out.removesuffix("\n") == (prompt + value["text"]).removesuffix("\n")


def test_seeds(tiny_relu2: Path) -> None:
    def tokens(*args: object) -> list[int]:
        found = runner("-m", tiny_relu2, "-p", PROMPT, "-n", 24, "--temp", 1.5, "--ignore-eos", "--json", *args).json
        assert isinstance(found["tokens"], list)
        return found["tokens"]

    first = tokens("-s", 1)
    assert first == tokens("-s", 1)
    assert first != tokens("-s", 2)
    drawn = runner("-m", tiny_relu2, "-p", PROMPT, "-n", 24, "--temp", 1.5, "--ignore-eos")
    match = re.search(r"seed (\d+) \]$", drawn.err.strip())
    assert match, drawn.err
    again = runner("-m", tiny_relu2, "-p", PROMPT, "-n", 24, "--temp", 1.5, "--ignore-eos", "-s", match[1])
    assert again.raw == drawn.raw


def test_the_closing_line(tiny_relu2: Path) -> None:
    done = runner("-m", tiny_relu2, "-p", PROMPT, "-n", 8, "--temp", 0, "--ignore-eos")
    assert re.fullmatch(r"\[ Prompt: [\d.]+ t/s \| Generation: [\d.]+ t/s \| active [\d.]+ % \]", done.err.strip())
    dense = runner("-m", tiny_relu2, "-p", PROMPT, "-n", 8, "--temp", 0, "--ignore-eos", "--dense")
    assert re.fullmatch(r"\[ Prompt: [\d.]+ t/s \| Generation: [\d.]+ t/s \]", dense.err.strip())


def test_prompts(tiny_relu2: Path, tmp_path: Path) -> None:
    base = ("-m", tiny_relu2, "-n", 8, "--temp", 0)
    plain = runner(*base, "-p", PROMPT)
    file = tmp_path / "prompt.txt"
    file.write_text(PROMPT + "\n")
    assert runner(*base, "-f", file).raw == plain.raw
    assert runner(*base, "-f", "-", stdin=PROMPT).raw == plain.raw
    hidden = runner(*base, "-p", PROMPT, "--no-display-prompt")
    assert PROMPT + hidden.out == plain.out
    # nothing generated: the prompt alone, evaluated
    nothing = runner(*base[:2], "-n", 0, "-p", PROMPT)
    assert (nothing.code, nothing.out) == (0, PROMPT + "\n")
    assert "Generation" not in nothing.err
    # escapes, as llama.cpp has them
    assert runner(*base, "-p", "a\\nb\\x41").out.startswith("a\nbA")
    assert runner(*base, "-p", "a\\nb", "--no-escape").out.startswith("a\\nb")
    # an empty prompt begins with the token that begins a text
    assert runner(*base, "-p", "").code == 0
    # small batches, same text
    assert runner(*base, "-p", PROMPT, "-b", 3, "-ub", 2, "--dense").raw == plain.raw


def test_bytes_that_are_no_utf8_in_the_prompt(tiny_relu2: Path) -> None:
    done = runner("-m", tiny_relu2, "-f", "-", "-n", 4, "--json", stdin=b"a \xff\xfe b \xc3")
    assert done.json["prompt"] == "a �� b �"


def test_characters_are_never_cut(tiny_relu2: Path) -> None:
    """A grammar makes the model write characters of two, three and four bytes, token by token."""
    grammar = "root ::= [éñ中界😀🐑]{24}"
    with start("-m", tiny_relu2, "-p", "x", "--no-display-prompt", "--grammar", grammar, "--temp", 0) as process:
        _, out, _ = pipes(process)
        pieces = []
        while piece := os.read(out.fileno(), 65536):
            pieces.append(piece.decode("utf-8"))  # strict: a cut character would raise
        assert process.wait(120) == 0
    text = "".join(pieces).removesuffix("\n")
    assert len(text) == 24
    assert set(text) <= set("éñ中界😀🐑")
    assert len(pieces) > 4, "it was not streamed"
    # stopped in the middle of a character: replaced, and still UTF-8
    whole = runner("-m", tiny_relu2, "-p", "x", "--grammar", grammar, "--temp", 0, "--json").json
    assert whole["text"] == text
    common = ("-m", tiny_relu2, "-p", "x", "--grammar", grammar, "--temp", 0)
    lengths = range(1, 8)
    cut = next(n for n in lengths if "�" in runner(*common, "-n", n, "--json").json["text"])
    done = runner(*common, "-n", cut)
    assert done.out.rstrip("\n").endswith("�")


def test_grammar_from_a_file(tiny_relu2: Path, tmp_path: Path) -> None:
    file = tmp_path / "yes.gbnf"
    file.write_text('root ::= " yes" | " no"\n')
    done = runner("-m", tiny_relu2, "-p", "Is it?", "--no-display-prompt", "--grammar-file", file)
    assert done.out in (" yes\n", " no\n")


def test_penalties_change_the_text(tiny_relu2: Path) -> None:
    free = report(tiny_relu2, "-n", 48, "--ignore-eos")
    held = report(tiny_relu2, "-n", 48, "--ignore-eos", "--repeat-penalty", 1.8, "--repeat-last-n", -1)
    assert held["tokens"] != free["tokens"]
    assert len(set(held["tokens"])) > len(set(free["tokens"]))


def test_a_full_context_ends_the_text(tiny_relu2: Path) -> None:
    done = runner("-m", tiny_relu2, "-p", PROMPT, "-c", 40, "--temp", 0, "--ignore-eos", "--json")
    value = done.json
    assert value["stop"] == "context"
    assert value["n_prompt"] + value["n_gen"] == 41  # the last token need not lie in the cache
    assert "the context of 40 tokens is full" in done.err


# --- artefacts --------------------------------------------------------------------------------------------------------


def make_shards(path: Path, hot_share: float, device: str = "CPU", identity: str | None = None) -> Path:
    """placement.gguf, hot.gguf and cold.gguf of a random placement; returns their folder."""
    model = open_model(path)
    rng = np.random.default_rng(3)
    n_hot = int(model.n_ff * hot_share) // 64 * 64
    order = tuple(rng.permutation(model.n_ff).astype(np.int32) for _ in range(model.n_layer))
    folder = paths.artefact_dir(path, model.fingerprint, for_writing=True)
    placement = PlacementFile(
        identity or new_placement_id(), (n_hot,) * model.n_layer, device, 1 << 30, 0, 160, {}, order
    )
    placement.write(folder / paths.PLACEMENT, model, {})
    split(path, SplitOptions())
    return folder


def make_predictor(path: Path, threshold: float) -> Path:
    """predictor.gguf that names every neuron (a threshold below all scores) or none (above)."""
    model = open_model(path)
    rng = np.random.default_rng(4)
    folder = paths.artefact_dir(path, model.fingerprint, for_writing=True)
    with PredictorWriter(folder / paths.PREDICTOR, "f16") as out:
        for _ in range(model.n_layer):
            a = rng.standard_normal((32, model.n_embd), dtype=np.float32)
            b = rng.standard_normal((model.n_ff, 32), dtype=np.float32)
            out.add(LayerPredictor(32, 1.0, 1.0, a, b, np.full(model.n_ff, threshold, np.float32)))
        out.finish(model, {})
    return folder / paths.PREDICTOR


def test_artefacts_are_found_and_used(tiny_relu2: Path) -> None:
    without = report(tiny_relu2, "-n", 24)
    folder = make_shards(tiny_relu2, 0.0)
    cold = report(tiny_relu2, "-n", 24)
    assert cold["n_ctx"] == 160, "the context it was solved for"
    assert (cold["mode"], cold["hot"], cold["n_gen"]) == ("exact", None, 24)
    make_predictor(tiny_relu2, -1e30)
    every = report(tiny_relu2, "-n", 24)
    assert (every["mode"], every["candidates"]) == ("predicted", 1)
    assert every["tokens"] == cold["tokens"]
    make_predictor(tiny_relu2, 1e30)
    none = report(tiny_relu2, "-n", 24)
    assert (none["candidates"], none["active"]) == (0, 0)
    assert report(tiny_relu2, "-n", 24, "--exact")["mode"] == "exact"
    # the same folder, named; and nothing of it
    named = folder.rename(folder.with_name("elsewhere"))
    assert report(tiny_relu2, "-n", 24)["mode"] == "exact"
    assert report(tiny_relu2, "-n", 24, "--artefacts", named)["mode"] == "predicted"
    named.rename(folder)
    plain = report(tiny_relu2, "-n", 24, "--no-artefacts")
    assert plain["tokens"] == without["tokens"]
    assert plain["n_ctx"] == without["n_ctx"]
    line = runner("-m", tiny_relu2, "-p", PROMPT, "-n", 8, "--ignore-eos", "--temp", 0).err.strip()
    assert re.search(r"active 0\.0 % \| computed 0 % \]$", line)


def test_artefacts_under_pinfer_home(tiny_relu2: Path) -> None:
    folder = make_shards(tiny_relu2, 0.0)
    home = paths.pinfer_home() / f"{tiny_relu2.name}-{open_model(tiny_relu2).fingerprint[:12]}"
    home.parent.mkdir(parents=True, exist_ok=True)
    folder.rename(home)
    assert report(tiny_relu2, "-n", 1)["n_ctx"] == 160


def test_a_hot_part_runs_on_the_device(tiny_relu2: Path) -> None:
    make_shards(tiny_relu2, 0.5)
    n_ff = open_model(tiny_relu2).n_ff
    runs = [report(tiny_relu2, "-n", 24, "--device", "CPU") for _ in range(3)]
    assert all(value["tokens"] == runs[0]["tokens"] for value in runs)
    assert runs[0]["hot"] == pytest.approx((n_ff // 2 // 64 * 64) / n_ff)
    assert runs[0]["hot_bytes"] > 0
    line = runner("-m", tiny_relu2, "-p", PROMPT, "-n", 8, "--device", "CPU", "--temp", 0).err
    assert "on GPU 50 %" in line
    # the device it was solved for is the default
    assert report(tiny_relu2, "-n", 24)["tokens"] == runs[0]["tokens"]
    assert report(tiny_relu2, "-n", 24)["hot"] == runs[0]["hot"]
    # no hot part at all: the model itself
    none = report(tiny_relu2, "-n", 24, "--device", "none")
    assert (none["hot"], none["tokens"]) == (None, report(tiny_relu2, "-n", 24, "--no-artefacts")["tokens"])


def test_two_hot_devices(tiny_relu2: Path) -> None:
    folder = make_shards(tiny_relu2, 0.5, identity="0123456789abcdef")
    one = report(tiny_relu2, "-n", 24, "--device", "CPU")
    kept = {name: (folder / name).read_bytes() for name in (paths.HOT, paths.COLD, paths.PLACEMENT)}
    make_shards(tiny_relu2, 0.0, identity="0123456789abcdef")
    nothing = (folder / paths.HOT).read_bytes()
    for name, data in kept.items():
        (folder / name).write_bytes(data)
    (folder / "hot-1.gguf").write_bytes(nothing)
    for devices in ("CPU,CPU", "cpu,CPU"):
        two = report(tiny_relu2, "-n", 24, "--device", devices)
        assert [two[key] for key in ("tokens", "hot", "hot_bytes")] == [
            one[key] for key in ("tokens", "hot", "hot_bytes")
        ]
    for devices in ("CPU", "CPU,CPU,CPU"):
        line = runner("-m", tiny_relu2, "-p", "a", "--device", devices).error()
        assert "one of 2 hot shards" in line
        assert "--device" in line
    assert "there is no device CUDA99" in runner("-m", tiny_relu2, "-p", "a", "--device", "CPU,CUDA99").error()
    # half of the neurons in the place of none
    (folder / "hot-1.gguf").write_bytes(kept[paths.HOT])
    assert "exactly once" in runner("-m", tiny_relu2, "-p", "a", "--device", "CPU,CPU").error()


def test_device_memory_is_counted(tiny_relu2: Path) -> None:
    make_shards(tiny_relu2, 0.5)
    hot = report(tiny_relu2, "-n", 4, "--device", "CPU")
    assert hot["vram_loaded"] == hot["vram_used"] == hot["vram_used_counted"] == hot["hot_bytes"] > 0
    assert hot["vram_limit"] == 1 << 30  # of the placement
    line = runner("-m", tiny_relu2, "-p", PROMPT, "-n", 4, "--device", "CPU", "--temp", 0).err
    assert "VRAM 0.0/1.0 GiB" in line
    none = report(tiny_relu2, "-n", 4, "--device", "none")
    assert none["vram_used"] is None
    assert none["vram_used_counted"] is None


def test_a_hot_part_without_a_device(tiny_relu2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    folder = make_shards(tiny_relu2, 0.5, device="CUDA99")
    line = runner("-m", tiny_relu2, "-p", "a").error()
    assert "--vram 0" in line
    assert "--device" in line
    (folder / paths.COLD).unlink()
    assert "pinfer split" in runner("-m", tiny_relu2, "-p", "a", "--device", "CPU").error()
    (folder / paths.HOT).unlink()
    done = runner("-m", tiny_relu2, "-p", "a", "-n", 1)
    assert done.code == 0
    assert "not split yet" in done.err


def test_artefacts_of_another_model_are_refused(tiny_relu2: Path, tiny_reglu: Path) -> None:
    folder = make_shards(tiny_reglu, 0.0)
    for name in (paths.PLACEMENT, paths.COLD):
        line = runner("-m", tiny_relu2, "-p", "a", "--artefacts", folder).error()
        assert "another model" in line
        assert str(folder / name) in line
        assert str(tiny_relu2) in line
        (folder / name).unlink()
        (folder / paths.HOT).unlink(missing_ok=True)
    predictor = make_predictor(tiny_reglu, 0.0)
    assert str(predictor) in runner("-m", tiny_relu2, "-p", "a", "--artefacts", folder).error()


# --- chat -------------------------------------------------------------------------------------------------------------


def notes(done: Outcome) -> list[str]:
    return [line.removeprefix("note: ") for line in done.err.splitlines() if line.startswith("note: ")]


def cached(done: Outcome) -> list[tuple[int, int]]:
    """(tokens of the conversation, those that were in the KV cache) of every answer of a chat with -v."""
    found = re.findall(r"^note: (\d+) tokens in the conversation, (\d+) of them", done.err, re.MULTILINE)
    return [(int(all_of_it), int(kept)) for all_of_it, kept in found]


def chatml(*turns: tuple[str, str]) -> str:
    text = "".join(f"<|im_start|>{role}\n{content}<|im_end|>\n" for role, content in turns)
    return text + "<|im_start|>assistant\n"


def test_chat_follows_the_template_of_the_model(tiny_relu2: Path) -> None:
    model = with_template(tiny_relu2, CHATML)
    common = ("-m", model, "-n", 6, "--temp", 0, "-c", 1024)

    def answer(*turns: tuple[str, str]) -> str:
        done = runner(*common, "-p", chatml(*turns), "--no-escape", "--no-display-prompt", "--json")
        text = done.json["text"]
        assert isinstance(text, str)
        return text

    system = ("system", "You are kind.")
    first = answer(system, ("user", "Hello there"))
    second = answer(system, ("user", "Hello there"), ("assistant", first), ("user", "a\nb"))
    done = runner(*common, "-sys", "You are kind.", "-v", stdin="Hello there\na\\\nb\n")
    assert done.code == 0
    assert done.out == f"{first}\n{second}\n"
    (first_all, first_kept), (second_all, second_kept) = cached(done)
    assert first_kept == 0
    assert first_all <= second_kept < second_all, "the first turn was decoded again"


def test_chat_commands(tiny_relu2: Path) -> None:
    model = with_template(tiny_relu2, CHATML)
    common = ("-m", model, "-n", 6, "-c", 1024, "-sys", "You are kind.", "-v")
    lines = "/regen\nHello there\n/regen\n/clear\nHello there\n/nonsense\n/help\n\n/exit\nnever read\n"
    done = runner(*common, "--temp", 0, stdin=lines)
    assert done.code == 0
    answers = done.out.split("\n")
    assert len(cached(done)) == 3, "empty lines and commands are no messages"
    assert cached(done)[1][1] == cached(done)[1][0], "/regen keeps the prompt in the cache"
    assert done.out == (done.out[: len(done.out) // 3]) * 3, answers
    said = "\n".join(notes(done))
    for text in ("the model's own template", "no answer yet", "begins anew", "no command /nonsense"):
        assert text in said
    assert "/regen  another answer" in done.err
    # /regen draws again, and a seed repeats the whole chat
    warm = [runner(*common, "--temp", 1.5, "-s", 3, stdin="Hello there\n/regen\n") for _ in range(2)]
    assert warm[0].raw == warm[1].raw
    half = len(warm[0].out) // 2
    assert warm[0].out[:half] != warm[0].out[half:]


def test_chat_reads_blocks_of_lines(tiny_relu2: Path) -> None:
    model = with_template(tiny_relu2, CHATML)
    common = ("-m", model, "-n", 4, "--temp", 0, "-c", 1024)
    first = runner(*common, stdin='"""one\n/exit\n\ntwo"""\n')
    assert first.raw == runner(*common, "-cnv", "-p", "one\n/exit\n\ntwo", "--no-escape").raw
    assert runner(*common, stdin='"""one line"""\n').raw == runner(*common, stdin="one line\n").raw
    assert runner(*common, stdin="one line").raw == runner(*common, stdin="one line\r\n").raw
    assert runner(*common, stdin='"""never closed\n').raw == b""
    assert runner(*common, stdin="").code == 0


def test_chat_without_a_template_it_knows(tiny_relu2: Path) -> None:
    model = with_template(tiny_relu2, UNKNOWN)
    for path, why in ((tiny_relu2, "no chat template"), (model, "does not know")):
        done = runner("-m", path, "-n", 8, "--temp", 0, stdin=PROMPT + "\n")
        assert done.code == 0
        (note,) = notes(done)
        assert why in note
        assert "plainly continued" in note
        alone = runner("-m", path, "-n", 8, "--temp", 0, "-p", PROMPT, "--no-display-prompt")
        assert done.out.rstrip("\n") == alone.out.rstrip("\n")


def test_a_chat_that_outgrows_its_context_drops_the_oldest_turns(tiny_relu2: Path) -> None:
    model = with_template(tiny_relu2, CHATML)
    lines = "".join(f"This is message number {i} of a long conversation\n" for i in range(8))
    done = runner("-m", model, "-n", 8, "--temp", 0, "-c", 256, "--ignore-eos", "-v", stdin=lines)
    assert done.code == 0
    assert len(cached(done)) == 8, "every message was answered"
    assert all(tokens < 256 for tokens, _ in cached(done))
    assert any("dropped from its beginning" in note for note in notes(done))
    # an answer that fills the context is cut; a message that cannot fit is not sent, and the chat goes on
    full = runner("-m", model, "--temp", 0, "-c", 128, "--ignore-eos", stdin="Hello\n" + "word " * 300 + "\nHello\n")
    assert full.code == 0
    said = notes(full)
    assert sum("the answer was cut" in note for note in said) == 2
    assert sum("it was not sent" in note for note in said) == 1


# --- Ctrl-C -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["--exact", "--dense"])
def test_ctrl_c_ends_a_run_with_130(tiny_relu2: Path, mode: str) -> None:
    with start("-m", tiny_relu2, "-p", PROMPT, mode, *ENDLESS) as process:
        _, out, err = pipes(process)
        read_until(out.fileno(), len(PROMPT) + 20)
        process.send_signal(signal.SIGINT)
        assert out.read().endswith(b"\n")
        assert process.wait(60) == 130
        assert b"Generation:" in err.read(), "what was done until then is reported"


def test_ctrl_c_in_a_chat_stops_the_answer_then_leaves(tiny_relu2: Path) -> None:
    with start("-m", tiny_relu2, "-cnv", *ENDLESS[:1], "-n", 1000000, *ENDLESS[3:]) as process:
        into, out, err = pipes(process)
        for _ in range(2):
            into.write(PROMPT.encode() + b"\n")
            read_until(out.fileno(), 20)
            process.send_signal(signal.SIGINT)
            time.sleep(0.5)
            while select.select([out], [], [], 0.5)[0]:
                assert os.read(out.fileno(), 65536), "it left instead of stopping the answer"
            assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130
        assert b"Generation:" in err.read()


def test_ctrl_c_while_loading(tiny_relu2: Path, tmp_path: Path) -> None:
    """-f from a pipe nobody writes to: the runner waits before it has loaded anything."""
    with start("-m", tiny_relu2, "-f", "-") as process:
        time.sleep(0.5)
        process.send_signal(signal.SIGINT)
        assert process.wait(60) == 130


# --- pinfer.run -------------------------------------------------------------------------------------------------------


def test_every_option_reaches_the_runner(tiny_relu2: Path) -> None:
    """Each option set to something else than its default changes the command line, and the runner takes all of it."""
    other = RunOptions(
        prompt=PROMPT, prompt_file=None, n_predict=3, conversation=False, system_prompt=None, escape=False,
        display_prompt=False, n_ctx=128, n_batch=64, n_ubatch=32, n_batch_dense=16, n_threads=1, n_threads_batch=2,
        n_gpu_layers=0, flash_attn="off", cache_type_k="f32", cache_type_v="bf16", mlock=False, no_mmap=True, seed=5,
        temp=0.5, top_k=10, top_p=0.5, min_p=0.1, repeat_penalty=1.1, repeat_last_n=32, presence_penalty=0.1,
        frequency_penalty=0.1, grammar="root ::= [a-z ]*", grammar_file=None, ignore_eos=True, exact=False, dense=True,
        artefacts=None, no_artefacts=True, device="none", rpc=None, activation="relu2", verbose=False, json=True,
    )  # fmt: skip
    given = runner_arguments(tiny_relu2, other)
    default = RunOptions()
    for field in fields(RunOptions):
        value = getattr(other, field.name)
        if value != getattr(default, field.name):
            one = RunOptions(**{field.name: value})
            assert runner_arguments(tiny_relu2, one) != ["-m", str(tiny_relu2)], field.name
    assert runner(*given).json["n_gen"] <= 3
    assert runner_arguments(tiny_relu2, default) == ["-m", str(tiny_relu2)]
    for options in (
        RunOptions(prompt_file=Path("x"), conversation=True, system_prompt="y", grammar_file=Path("z"), exact=True),
        RunOptions(prompt="", artefacts=Path("x"), mlock=True, verbose=True, rpc="host:1"),
    ):
        assert len(runner_arguments(tiny_relu2, options)) > 6


def test_run_returns_the_exit_code(tiny_relu2: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert stage.run(tiny_relu2, RunOptions(prompt=PROMPT, n_predict=4, temp=0, dense=True)) == 0
    out, err = capfd.readouterr()
    assert out.startswith(PROMPT)
    assert "Prompt:" in err
    assert stage.run(tiny_relu2, RunOptions(prompt=PROMPT, cache_type_k="q9")) == 2
    assert stage.run(tiny_relu2.with_name("none.gguf"), RunOptions(prompt=PROMPT)) == 1


def test_a_runner_that_is_missing_or_killed(tiny_relu2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fake = tmp_path / "native"
    (fake / "bin").mkdir(parents=True)
    (fake / "lib").mkdir()
    (fake / "lib" / "libggml-pinfer.so").touch()
    monkeypatch.setenv("PINFER_NATIVE_DIR", str(fake))
    with pytest.raises(PinferError, match="make build"):
        stage.run(tiny_relu2, RunOptions(prompt=PROMPT))
    program = fake / "bin" / "pinfer-runner"
    for text, says in (("kill -SEGV $$", "SIGSEGV"), ("kill -KILL $$", "want of memory"), ("exit 127", "make build")):
        program.write_text(f"#!/bin/sh\n{text}\n")
        program.chmod(0o755)
        with pytest.raises(PinferError, match=says):
            stage.run(tiny_relu2, RunOptions(prompt=PROMPT))
    with pytest.raises(PinferError, match="cannot start"):
        stage.run(tiny_relu2, RunOptions(prompt="a\0b"))


SCRIPT = (
    "import sys; from pathlib import Path; from pinfer.run import *; sys.exit(run(Path(sys.argv[1]), RunOptions({})))"
)


@pytest.fixture
def script_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(ROOT))


@pytest.mark.usefixtures("script_environment")
def test_a_signal_to_the_python_process_alone_reaches_the_runner(tiny_relu2: Path) -> None:
    script = SCRIPT.format("prompt='Once', ignore_eos=True, n_ctx=65536, temp=0")
    with subprocess.Popen(
        [sys.executable, "-c", script, str(tiny_relu2)],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        start_new_session=True,
        bufsize=0,
    ) as process:
        _, out, err = pipes(process)
        read_until(out.fileno(), 30)
        process.send_signal(signal.SIGINT)
        out.read()
        assert process.wait(60) == 130
        assert b"Traceback" not in err.read()


@pytest.mark.usefixtures("script_environment")
def test_ctrl_c_at_a_terminal(tiny_relu2: Path) -> None:
    """A chat on a pseudo-terminal: Ctrl-C stops the answer, a second one at the prompt leaves."""
    script = SCRIPT.format("n_predict=1000000, ignore_eos=True, n_ctx=65536, temp=0")
    child, terminal = pty.fork()
    if child == 0:
        os.execv(sys.executable, [sys.executable, "-c", script, str(tiny_relu2)])
    seen = b""

    def wait_for(text: bytes) -> None:
        nonlocal seen
        while text not in seen:
            piece = read_until(terminal, 1)
            assert piece, seen
            seen += piece
        seen = seen[seen.index(text) + len(text) :]

    try:
        wait_for(b"> ")
        os.write(terminal, PROMPT.encode() + b"\n")
        wait_for(PROMPT.encode())  # the echo
        while len(seen) < 30:
            seen += read_until(terminal, 1)
        os.write(terminal, b"\x03")
        wait_for(b"\n> ")
        os.write(terminal, b"\x03")
        rest = b""
        while piece := read_until(terminal, 1):
            rest += piece
        _, status = os.waitpid(child, 0)
    finally:
        os.close(terminal)
    assert os.waitstatus_to_exitcode(status) == 130, rest
    assert b"Generation:" in rest
    assert b"Traceback" not in rest
