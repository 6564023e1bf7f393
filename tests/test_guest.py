"""The plugin in programs that know nothing of it, and several models in one process.

The programs are llama.cpp's own, built without a change: ``ninja -C build/native stock``.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from support.adapter import write_adapter
from support.rewritten import rewrite
from support.rpc_server import RpcServer
from support.shards import write_shards
from support.sparse_models import SparseModel, write_sparse_model
from support.split_model import split_model

from pinfer.errors import PinferError
from pinfer.llama import plugin as native
from pinfer.llama.engine import Engine, PluginConfig
from pinfer.model import open_model
from pinfer.profile import ProfileOptions, profile
from pinfer.train import TrainOptions, train

TEXT = Path(__file__).parent / "data" / "heldout.txt"
PROMPT = "Once upon a time"


def stock(program: str) -> Path:
    path = native.native_folder() / "bin" / f"llama-{program}"
    assert path.is_file(), f"{path} is not built; type: ninja -C {native.native_folder()} stock"
    return path


def environment(*, preload: bool = True, **variables: str) -> dict[str, str]:
    """The environment of a stock program; sanitizer runtimes preloaded into Python are not for it."""
    clean = {name: value for name, value in os.environ.items() if name != "LD_PRELOAD"}
    return clean | ({"LD_PRELOAD": str(native.plugin_path())} if preload else {}) | variables


def run(program: str, *arguments: str | Path, **settings: str | bool) -> subprocess.CompletedProcess[str]:
    command = [str(stock(program)), *map(str, arguments)]
    env = environment(**settings)  # type: ignore[arg-type]
    return subprocess.run(
        command, env=env, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=240, check=False
    )


def said(done: subprocess.CompletedProcess[str]) -> list[str]:
    """The plugin's own lines."""
    return [line.removeprefix("pinfer: ") for line in done.stderr.splitlines() if line.startswith("pinfer: ")]


def complete(model: Path, *arguments: str | Path, **settings: str | bool) -> subprocess.CompletedProcess[str]:
    greedy = ("-p", PROMPT, "-n", "12", "--temp", "0", "-t", "1", "-no-cnv", "--no-warmup", "--no-perf")
    # The last words can be missing (see perplexity), so the longest output of a few runs counts.
    runs = [run("completion", "-m", model, *greedy, *arguments, **settings) for _ in range(3)]
    return max(runs, key=lambda done: (done.returncode, len(done.stdout)))


def perplexity(model: Path, *arguments: str | Path, **settings: str | bool) -> float:
    options = ("-f", TEXT, "-c", "128", "-b", "128", "--chunks", "5", "-t", "1", "--no-warmup")
    for _ in range(5):  # llama.cpp logs from a thread of its own, which may end before it has written the last lines
        done = run("perplexity", "-m", model, *options, *arguments, **settings)
        assert done.returncode == 0, done.stderr[-2000:]
        if found := re.search(r"\[4\]([0-9.]+)", done.stdout):
            return float(found.group(1))
    raise AssertionError(done.stdout[-300:] + done.stderr[-2000:])


def greedy_text(model: Path, plugin: PluginConfig | None, n: int = 12) -> str:
    with Engine(model, plugin=plugin, n_ctx=256, n_threads=1) as engine:
        prompt = engine.tokenize(PROMPT)
        return PROMPT + engine.detokenize(engine.generate(prompt, n))


def last_line_starts(done: subprocess.CompletedProcess[str], text: str) -> None:
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.strip().startswith(text.strip()), (done.stdout, text)


# --- every program of llama.cpp -------------------------------------------------------------------


def test_completion_is_taken_over_by_the_header(tiny_reglu: Path) -> None:
    """ReGLU, where llama.cpp would compute SwiGLU: the text is that of an engine with the plugin."""
    expected = greedy_text(tiny_reglu, PluginConfig.of(open_model(tiny_reglu)))
    done = complete(tiny_reglu)
    last_line_starts(done, expected)
    how = "computed by pinfer as reglu, exact, without artefacts"
    assert said(done) == [f"tiny-reglu.gguf: {how}; make them with: pinfer prepare {tiny_reglu}"]


def test_perplexity_bench_and_chat(tiny_reglu: Path) -> None:
    with_plugin, without = perplexity(tiny_reglu), perplexity(tiny_reglu, preload=False)
    assert with_plugin < 0.95 * without, "llama.cpp alone computes SwiGLU"
    taken = "tiny-reglu.gguf: computed by pinfer as reglu, exact"
    for settings in ({}, {"preload": False, "GGML_BACKEND_PATH": str(native.plugin_path())}):
        bench = run("bench", "-m", tiny_reglu, "-p", "16", "-n", "4", "-r", "1", "-t", "1", "-o", "json", **settings)  # type: ignore[arg-type]
        assert bench.returncode == 0, bench.stderr[-2000:]
        assert len(json.loads(bench.stdout)) == 2
        assert said(bench)[0].startswith(taken)
    chat = run("cli", "-m", tiny_reglu, "-p", "Hello", "-n", "4", "-t", "1", "--single-turn", "--no-warmup")
    assert chat.returncode == 0, chat.stderr[-2000:]
    assert said(chat)[0].startswith(taken)


class Server:
    """llama-server on a port of its own; ``post`` waits until it has loaded its models."""

    def __init__(self, process: subprocess.Popen[bytes], port: int, log: Path) -> None:
        self.process, self.port, self.log = process, port, log

    def post(self, **body: Any) -> Any:
        data = json.dumps({"temperature": 0, "cache_prompt": False} | body).encode()
        deadline = time.monotonic() + 120
        while True:
            try:
                request = urllib.request.Request(f"http://127.0.0.1:{self.port}/completion", data)
                with urllib.request.urlopen(request, timeout=60) as answer:
                    return json.load(answer)
            except OSError:
                assert self.process.poll() is None, self.log.read_text()[-2000:]
                assert time.monotonic() < deadline, self.log.read_text()[-2000:]
                time.sleep(0.1)


@contextmanager
def serving(log: Path, *arguments: str | Path, **settings: str | bool) -> Iterator[Server]:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ("--port", port, "-t", "1", "-c", "256", "-np", "1", "--no-warmup", *arguments)
    env = environment(**settings)  # type: ignore[arg-type]
    with log.open("wb") as file:
        process = subprocess.Popen(
            [str(stock("server")), *map(str, words)], env=env, stdin=subprocess.DEVNULL, stdout=file, stderr=file
        )
    try:
        yield Server(process, port, log)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=60) == 0
    finally:
        process.kill()
        process.wait()


def test_the_server(tiny_reglu: Path, tmp_path: Path) -> None:
    expected = greedy_text(tiny_reglu, PluginConfig.of(open_model(tiny_reglu)))
    with serving(tmp_path / "server.txt", "-m", tiny_reglu) as server:
        text = server.post(prompt=PROMPT, n_predict=12)["content"]
        assert expected.startswith(PROMPT + text) or (PROMPT + text).startswith(expected)
        assert "pinfer: tiny-reglu.gguf: computed by pinfer as reglu, exact" in server.log.read_text()


def test_a_model_without_zeros_is_left_alone(tiny_reglu: Path) -> None:
    done = complete(tiny_reglu, PINFER_ACTIVATION="other")
    assert done.returncode == 0
    assert said(done) == ["tiny-reglu.gguf: left to llama.cpp: its FFN (llama) is not of the ReLU family"]


def test_artefacts_beside_the_model_are_used(tiny_relu2: Path) -> None:
    report = write_shards(tiny_relu2, 0.5)
    stock_text = complete(tiny_relu2, preload=False)
    done = complete(tiny_relu2)
    last_line_starts(done, stock_text.stdout[:40])
    folder = report.cold.parent
    assert said(done) == [
        f"tiny-relu2.gguf: computed by pinfer as relu2, exact, with shards of {folder}, hot neurons on CPU"
    ]
    # read into memory instead of mapped: the model is known all the same
    done = complete(tiny_relu2, "--load-mode", "none")
    last_line_starts(done, stock_text.stdout[:40])
    assert "with shards of" in said(done)[0]


@pytest.mark.parametrize("layout", ["plain", "hub"])
@pytest.mark.parametrize("memory", [(), ("--load-mode", "none")], ids=["mapped", "read"])
def test_a_model_in_parts(tiny_reglu: Path, tmp_path: Path, layout: str, memory: tuple[str, ...]) -> None:
    """The shards made by the commands are found, also where the parts are links to files named by their hashes."""
    config = PluginConfig.of(open_model(tiny_reglu))
    expected = greedy_text(tiny_reglu, config)
    first, *others = split_model(tiny_reglu, tmp_path)
    if layout == "hub":
        for digit, part in zip("cab", (first, *others), strict=True):
            part.rename(tmp_path / (digit * 64))
            part.symlink_to(digit * 64)
    how = "computed by pinfer as reglu, exact"
    bare = complete(first, *memory)
    last_line_starts(bare, expected)
    name, named = (first.name, str(first)) if layout == "plain" else ("c" * 64, "-hf USER/REPO")
    assert said(bare) == [f"{name}: {how}, without artefacts; make them with: pinfer prepare {named}"]
    report = write_shards(first, 0.5)
    folder = report.cold.parent
    assert folder.name.startswith("tiny-reglu.gguf" if layout == "plain" else "hub-")
    assert greedy_text(first, replace(config, cold=report.cold, hot=report.hot, device="CPU")) == expected
    done = complete(first, *memory)
    last_line_starts(done, expected)
    (line,) = said(done)
    assert line.startswith(f"{name}: {how}, with shards of {folder}")


def test_pinfer_exec(tiny_reglu: Path, tmp_path: Path) -> None:
    expected = greedy_text(tiny_reglu, PluginConfig.of(open_model(tiny_reglu)))
    pinfer = [sys.executable, "-m", "pinfer", "exec"]
    flags = ["-m", str(tiny_reglu), "-p", PROMPT, "-n", "12", "--temp", "0", "-t", "1", "-no-cnv", "--no-warmup"]

    def execute(*command: str) -> subprocess.CompletedProcess[str]:
        env = environment(preload=False)
        return subprocess.run(
            [*pinfer, *command],
            env=env,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            timeout=240,
            check=False,
        )

    # The last words can be missing (see perplexity), so the longest output of a few runs counts.
    done = max((execute(str(stock("completion")), *flags) for _ in range(3)), key=lambda run: len(run.stdout))
    last_line_starts(done, expected)
    assert said(done)[0].startswith("tiny-reglu.gguf: computed by pinfer as reglu, exact")
    done = execute("--activation", "other", str(stock("completion")), *flags)
    assert "left to llama.cpp" in said(done)[0]
    done = execute("--artefacts", str(tmp_path / "none"), "--", str(stock("completion")), *flags)
    assert done.returncode == 1
    assert "is not a folder" in done.stderr
    done = execute("llama-nothing")
    assert done.returncode == 1
    assert done.stderr.count("\n") == 1
    assert "there is no program llama-nothing" in done.stderr


# --- what must stop the load ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("variables", "reason"),
    [
        ({"PINFER_ACTIVATION": "typo"}, "PINFER_ACTIVATION=typo is not an activation"),
        ({"PINFER_ARTEFACTS": "nowhere"}, "PINFER_ARTEFACTS=nowhere is not a folder"),
        ({"PINFER_MODEL": "nowhere.gguf"}, "PINFER_MODEL=nowhere.gguf is not a file"),
        ({"PINFER_ACTIVATION_THRESHOLD": "-1"}, "PINFER_ACTIVATION_THRESHOLD=-1 is not a number of 0 or more"),
    ],
)
def test_wrong_settings_stop_the_load(tiny_reglu: Path, variables: dict[str, str], reason: str) -> None:
    done = complete(tiny_reglu, **variables)
    assert done.returncode == 1
    assert PROMPT not in done.stdout
    assert [line for line in said(done) if reason in line] == said(done)[:1]


def test_artefacts_of_another_model_stop_the_load(tiny_relu2: Path, tiny_reglu: Path) -> None:
    foreign = write_shards(tiny_relu2, 0.5).cold.parent
    done = complete(tiny_reglu, PINFER_ARTEFACTS=str(foreign))
    assert done.returncode == 1
    assert "was made from another model than" in said(done)[0]
    assert "pinfer split" in said(done)[0]


def test_an_ffn_on_a_device_with_another_activation_is_refused(tiny_reglu: Path) -> None:
    """-ngl without the override: llama.cpp would compute SwiGLU there."""
    with RpcServer() as server:
        server.wait_until_it_listens()
        done = complete(tiny_reglu, "-ngl", "99", "--rpc", server.endpoint, "-fit", "off")
    assert done.returncode != 0
    advised = re.search(r"with -ngl also pass: -ot '(.+=PINFER)'$", said(done)[-1])
    assert advised, done.stderr[-2000:]
    assert " was computed" not in done.stderr
    expected = greedy_text(tiny_reglu, PluginConfig.of(open_model(tiny_reglu)), 4)
    override = ("-ot", advised.group(1))
    with RpcServer() as server:
        server.wait_until_it_listens()
        done = complete(tiny_reglu, "-ngl", "99", "--rpc", server.endpoint, "-fit", "off", *override)
    last_line_starts(done, expected)


# --- adapters -------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [("down",), ("up",), ("up", "down")])
@pytest.mark.parametrize("shards", [False, True])
def test_an_adapter_is_not_overlooked(tiny_relu2: Path, tmp_path: Path, parts: tuple[str, ...], shards: bool) -> None:
    """A LoRA on ffn_down reads the activation that a sparse FFN need not write."""
    adapter = write_adapter(tmp_path / "lora.gguf", tiny_relu2, parts)
    without = perplexity(tiny_relu2, preload=False)
    expected = perplexity(tiny_relu2, "--lora", adapter, preload=False)
    assert abs(expected / without - 1) > 0.01, "the adapter changes the model"
    if shards:
        write_shards(tiny_relu2, 0.5)
    assert perplexity(tiny_relu2, "--lora", adapter) == pytest.approx(expected, rel=1e-3)
    # in short batches, too, where neurons are left out
    assert perplexity(tiny_relu2, "-ub", "8", "--lora", adapter) == pytest.approx(expected, rel=1e-3)


# --- mixtures -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("arch", "activation"), [("nemotron_h_moe", None), ("smallthinker", None), ("llama", "drelu")])
def test_a_mixture_in_stock_programs(arch: str, activation: str | None, tmp_path: Path) -> None:
    """With half of its experts on a device, through the preloaded plugin; then `pinfer exec` with the same program."""
    path = write_sparse_model(tmp_path / "m.gguf", SparseModel(arch, activation=activation))
    stock_value, bare = perplexity(path, preload=False), perplexity(path)
    if activation:
        assert abs(bare / stock_value - 1) > 0.01, "llama.cpp alone computes SwiGLU"
    else:
        assert bare == pytest.approx(stock_value, rel=1e-3)
    shards = write_shards(path, 0.5)
    assert perplexity(path) == pytest.approx(bare, rel=1e-3)
    assert perplexity(path, "-ub", "8") == pytest.approx(bare, rel=1e-3)
    options = ("-f", str(TEXT), "-c", "128", "-b", "128", "--chunks", "2", "-t", "1")
    done = subprocess.run(
        [sys.executable, "-m", "pinfer", "exec", str(stock("perplexity")), "-m", str(path), *options],
        env=environment(preload=False),
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    name = activation or ("relu2" if arch == "nemotron_h_moe" else "reglu")
    folder = shards.cold.parent
    assert said(done) == [f"m.gguf: computed by pinfer as {name}, exact, with shards of {folder}, hot neurons on CPU"]


def merged(path: Path, folder: Path, adapter: Path) -> Path:
    """The model with the adapter's products (alpha is its rank) added to the weights."""
    parts = {tensor.name: tensor.data for tensor in gguf.GGUFReader(adapter).tensors}
    names = sorted({name.rpartition(".lora_")[0] for name in parts})
    weights = {tensor.name: tensor.data for tensor in gguf.GGUFReader(path).tensors if tensor.name in names}
    add = {name: weights[name] + parts[f"{name}.lora_b"] @ parts[f"{name}.lora_a"] for name in names}
    folder.mkdir()
    return rewrite(path, folder / path.name, add=add, drop=names)


def test_ffns_that_are_left_out_are_counted_in_the_line(tmp_path: Path) -> None:
    """Two stacks with scales of their own: llama.cpp computes them, and the plugin the rest."""
    plain = write_sparse_model(tmp_path / "plain.gguf", SparseModel("nemotron_h_moe"))
    stacks = [f for f in open_model(plain).ffns if f.is_stack][:2]
    scales = {f"blk.{f.layer}.ffn_up_exps.scale": np.ones(f.n_experts, np.float32) for f in stacks}
    path = rewrite(plain, tmp_path / "m.gguf", add=scales)
    (line,) = said(run("perplexity", "-m", path, "-f", TEXT, "-c", "128", "-b", "128", "--chunks", "1", "-t", "1"))
    assert line.startswith("m.gguf: computed by pinfer as relu2, exact"), line
    assert (
        f"(llama.cpp computes 2 of its FFNs: the experts of layer {stacks[0].layer} with scales of their own)" in line
    )


@pytest.mark.parametrize("parts", [("down",), ("up",), ("up", "down")])
@pytest.mark.parametrize(("arch", "activation"), [("nemotron_h_moe", None), ("llama", "drelu")])
def test_an_adapter_on_experts(arch: str, activation: str | None, parts: tuple[str, ...], tmp_path: Path) -> None:
    """Its stacks are left to llama.cpp's operations, which is said once; the activation stays the model's."""
    path = write_sparse_model(tmp_path / "m.gguf", SparseModel(arch, activation=activation))
    adapter = write_adapter(tmp_path / "lora.gguf", path, tuple(f"{part}_exps" for part in parts))
    expected = perplexity(merged(path, tmp_path / "merged", adapter))
    assert abs(expected / perplexity(path) - 1) > 0.01, "the adapter changes the model"
    if activation is None:
        assert perplexity(path, "--lora", adapter, preload=False) == pytest.approx(expected, rel=1e-3)
    for share in (None, 0.5):
        if share is not None:
            write_shards(path, share)
        assert perplexity(path, "--lora", adapter) == pytest.approx(expected, rel=1e-3)
        assert perplexity(path, "-ub", "8", "--lora", adapter) == pytest.approx(expected, rel=1e-3)
    options = ("-f", TEXT, "-c", "128", "-b", "128", "--chunks", "1", "-t", "1")
    lines = said(run("perplexity", "-m", path, *options, "--lora", adapter))
    (fallback,) = (line for line in lines if "is not part of an FFN" in line)
    assert fallback.endswith("is not part of an FFN that pinfer knows; such nodes run on the plain CPU backend")


# --- several models in one process ----------------------------------------------------------------


def test_another_model_than_the_named_one(tiny_relu2: Path, tiny_reglu: Path) -> None:
    """PINFER_MODEL and its settings are about one file; another is computed by its own header."""
    foreign = write_shards(tiny_relu2, 0.5).cold.parent
    expected = greedy_text(tiny_reglu, PluginConfig.of(open_model(tiny_reglu)))
    done = complete(tiny_reglu, PINFER_MODEL=str(tiny_relu2), PINFER_ARTEFACTS=str(foreign), PINFER_ACTIVATION="relu2")
    last_line_starts(done, expected)
    assert said(done)[0].startswith("tiny-reglu.gguf: computed by pinfer as reglu, exact, without artefacts")


def write_draft(path: Path, model: Path, n_layer: int, n_ff: int) -> Path:
    """The model with its first layers and neurons alone: cheaper, and often of the same opinion."""
    source = gguf.GGUFReader(model)
    out = gguf.GGUFWriter(path, "arcee")
    changed = {"arcee.block_count": n_layer, "arcee.feed_forward_length": n_ff}
    for name, field in source.fields.items():
        if name.startswith("GGUF.") or name == "general.architecture":
            continue
        kind, *element = field.types
        out.add_key_value(name, changed.get(name, field.contents()), kind, element[0] if element else None)
    for tensor in source.tensors:
        if (layer := re.match(r"blk\.(\d+)\.", tensor.name)) and int(layer.group(1)) >= n_layer:
            continue
        data = tensor.data[:n_ff] if "ffn_up" in tensor.name else tensor.data
        out.add_tensor(tensor.name, np.ascontiguousarray(data[:, :n_ff] if "ffn_down" in tensor.name else data))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


class Drafts:
    """What llama-server answers with a draft model, and how many of its tokens it drafted and accepted."""

    prompts = (PROMPT, "The little dog ran to the")

    def __init__(self, log: Path, model: Path, draft: Path) -> None:
        self.log = log
        self.words = ("-m", model, "-md", draft, "--spec-type", "draft-simple", "--spec-draft-n-max", "4")

    def __call__(self, **settings: str | bool) -> tuple[list[str], list[tuple[int, int]]]:
        with serving(self.log, *self.words, **settings) as server:
            answers = [server.post(prompt=prompt, n_predict=48) for prompt in self.prompts]
        timings = [answer["timings"] for answer in answers]
        return [answer["content"] for answer in answers], [(t["draft_n"], t["draft_n_accepted"]) for t in timings]

    def said(self) -> list[str]:
        """The plugin's own lines, in alphabetical order."""
        lines = self.log.read_text().splitlines()
        return sorted(line.removeprefix("pinfer: ") for line in lines if line.startswith("pinfer: "))


@pytest.mark.parametrize(("n_layer", "n_ff"), [(5, 1024), (4, 512)])
@pytest.mark.parametrize("artefacts", [False, True])
def test_a_draft_model_beside_another(
    tiny_relu2: Path, tmp_path: Path, n_layer: int, n_ff: int, artefacts: bool
) -> None:
    """Of the same or another shape; the plugin on both, on the model alone, or on the draft alone."""
    draft = write_draft(tmp_path / "draft.gguf", tiny_relu2, n_layer, n_ff)
    if artefacts:
        for model, share in ((tiny_relu2, 0.5), (draft, 0.25)):
            write_shards(model, share)
    ask = Drafts(tmp_path / "server.txt", tiny_relu2, draft)
    expected, drafted = ask(preload=False)
    assert all(0 < accepted <= n for n, accepted in drafted), drafted
    how = ": computed by pinfer as relu2, exact, with" + (" shards of " if artefacts else "out artefacts; ")
    left = ": left to llama.cpp: its FFN (arcee) is not of the ReLU family"
    for other in (None, draft, tiny_relu2):
        settings = {"PINFER_MODEL": str(other), "PINFER_ACTIVATION": "other"} if other else {}
        assert ask(**settings) == (expected, drafted), other
        for line, name in zip(ask.said(), sorted(["draft.gguf", "tiny-relu2.gguf"]), strict=True):
            assert line.startswith(name + (left if other and other.name == name else how)), ask.said()


def test_a_draft_model_with_a_predictor(tiny_relu2: Path, tmp_path: Path) -> None:
    """A predictor of the draft changes what is drafted, never what is answered."""
    draft = write_draft(tmp_path / "draft.gguf", tiny_relu2, 4, 512)
    profile(draft, ProfileOptions(str(TEXT), 512, n_threads=1))
    train(draft, TrainOptions())
    write_shards(draft, 0.25)
    ask = Drafts(tmp_path / "server.txt", tiny_relu2, draft)
    expected, _ = ask(preload=False)
    answers, drafted = ask()
    assert answers == expected
    assert all(accepted > 0 for _, accepted in drafted), drafted
    assert "draft.gguf: computed by pinfer as relu2, predicted, with predictor and shards of" in ask.said()[0]


def test_a_draft_model_that_only_pinfer_computes_rightly(tiny_relu2: Path, tiny_reglu: Path, tmp_path: Path) -> None:
    """ReGLU, where llama.cpp would compute SwiGLU: the same answers, from more drafts that are accepted."""
    ask = Drafts(tmp_path / "server.txt", tiny_relu2, tiny_reglu)
    expected, drafted = ask(preload=False)
    answers, drafted_by_pinfer = ask()
    assert answers == expected
    assert sum(accepted for _, accepted in drafted_by_pinfer) > sum(accepted for _, accepted in drafted)


def test_two_engines_are_each_themselves(tiny_relu2: Path, tiny_reglu: Path) -> None:
    shards = write_shards(tiny_relu2, 0.5)
    sparse = PluginConfig("relu2", hot=shards.hot, cold=shards.cold, device="CPU")
    gated = PluginConfig.of(open_model(tiny_reglu))
    alone = [greedy_text(tiny_relu2, sparse), greedy_text(tiny_reglu, gated)]
    plugin = native.load_plugin()
    with (
        Engine(tiny_relu2, plugin=sparse, n_ctx=256, n_threads=1) as first,
        Engine(tiny_reglu, plugin=gated, n_ctx=256, n_threads=1) as second,
    ):
        texts = [PROMPT + e.detokenize(e.generate(e.tokenize(PROMPT), 12)) for e in (first, second)]
        assert texts == alone
        stats = [plugin.stats(tiny_relu2), plugin.stats(tiny_reglu)]
        assert stats[0].n_hot > 0
        assert stats[1].n_hot == 0
        assert stats[1].n_tokens > 0
        assert plugin.stats().n_tokens == stats[0].n_tokens + stats[1].n_tokens
        assert plugin.stats().hot_bytes == stats[0].hot_bytes > 0
        plugin.reset_stats(tiny_reglu)
        assert plugin.stats(tiny_reglu).n_tokens == 0
        assert plugin.stats(tiny_relu2) == stats[0]
    assert plugin.stats().hot_bytes == 0, "closing an engine frees its devices"


def test_two_engines_of_one_model_need_the_same_settings(tiny_relu2: Path) -> None:
    config = PluginConfig("relu2")
    with Engine(tiny_relu2, plugin=config, n_ctx=64, n_threads=1) as first:
        tokens = first.generate([1, 2, 3], 8)
        for other in (replace(config, n_batch_dense=1), PluginConfig("relu"), None):
            with pytest.raises(PinferError, match="in use with other settings"):
                Engine(tiny_relu2, plugin=other, n_ctx=64, n_threads=1)
        with Engine(tiny_relu2, plugin=config, n_ctx=64, n_threads=1) as second:
            assert second.generate([1, 2, 3], 8) == tokens
        assert first.generate([1, 2, 3], 8) == tokens
        assert native.load_plugin().stats(tiny_relu2).n_tokens > 0
    assert native.load_plugin().stats(tiny_relu2).n_tokens == 0


def test_a_refused_configuration_leaves_the_earlier_one(tiny_relu2: Path) -> None:
    shards = write_shards(tiny_relu2, 0.5)
    plugin = native.load_plugin()
    plugin.configure(tiny_relu2, hot=shards.hot, cold=shards.cold, device="CPU", activation="relu2")
    assert (taken := plugin.stats(tiny_relu2).hot_bytes) > 0
    with pytest.raises(PinferError, match=r"missing\.gguf"):
        plugin.configure(tiny_relu2, cold=Path("missing.gguf"), activation="relu2")
    assert plugin.stats(tiny_relu2).hot_bytes == taken
    with pytest.raises(PinferError, match="no device named NONE"):
        plugin.configure(tiny_relu2, hot=shards.hot, cold=shards.cold, device="NONE", activation="relu2")
    assert plugin.stats(tiny_relu2).hot_bytes == 0
    plugin.release(tiny_relu2)


# --- shards that are not the model's --------------------------------------------------------------


def overwrite(path: Path, name: str, *, checksum: bool) -> None:
    """Zeros in place of a tensor; with ``checksum`` its checksum is made to fit."""
    reader = gguf.GGUFReader(path)
    place = [t.name for t in reader.tensors].index(name)
    tensor = reader.tensors[place]
    sums = reader.fields["pinfer.checksums"]
    fits = native.load_plugin().checksum(np.zeros(int(tensor.n_bytes), np.uint8))
    at = sums.offset + sum(part.nbytes for part in sums.parts[: sums.data[0]]) + 8 * place
    with path.open("r+b") as file:
        if checksum:
            file.seek(at)
            file.write(fits.to_bytes(8, "little"))
        file.seek(int(tensor.data_offset))
        file.write(bytes(int(tensor.n_bytes)))


@pytest.mark.parametrize("name", ["cold.gguf", "hot.gguf", "predictor.gguf"])
def test_damage_inside_an_artefact_is_noticed(tiny_relu2: Path, name: str) -> None:
    shards = write_shards(tiny_relu2, 0.5)
    profile(tiny_relu2, ProfileOptions(str(TEXT), 512, n_threads=1))
    predictor = train(tiny_relu2, TrainOptions()).path
    tensors = {
        "cold.gguf": "blk.1.ffn_down_t.weight",
        "hot.gguf": "blk.0.ffn_down.weight",
        "predictor.gguf": "blk.1.pred_t",
    }
    path = shards.cold.parent / name
    overwrite(path, tensors[name], checksum=False)
    config = PluginConfig("relu2", hot=shards.hot, cold=shards.cold, device="CPU", predictor=predictor)
    with (
        Engine(tiny_relu2, plugin=config, n_ctx=256, n_threads=1) as engine,
        pytest.raises(
            PinferError, match=rf"{name} is damaged: tensor {tensors[name]} does not have its checksum.*pinfer "
        ),
    ):
        engine.generate([1, 2, 3], 200)
    maker = "pinfer train" if name == "predictor.gguf" else "pinfer split"
    done = complete(tiny_relu2)
    assert "does not have its checksum" in done.stderr
    assert maker in done.stderr


def test_rows_of_other_weights_are_refused(tiny_relu2: Path) -> None:
    """A shard with forged fingerprint and checksums: its rows are compared with the model's at first use."""
    shards = write_shards(tiny_relu2, 0.5)
    overwrite(shards.cold, "blk.1.ffn_up.weight", checksum=True)
    config = PluginConfig("relu2", hot=shards.hot, cold=shards.cold, device="CPU")
    with (
        Engine(tiny_relu2, plugin=config, n_ctx=64, n_threads=1) as engine,
        pytest.raises(PinferError, match=r"cold\.gguf does not hold the neurons of layer 1.*pinfer split"),
    ):
        engine.generate([1, 2, 3], 2)
