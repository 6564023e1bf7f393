"""Hot neurons on devices: this machine's CPU, RPC servers, and the devices named in PINFER_TEST_DEVICES.

On every device, whatever share of the neurons lies there and however long the batches are, the tokens are the dense
model's. A budget is kept where the device itself keeps account; and a device that goes leaves one line behind.
"""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.command_line import CommandLine
from support.quantised import quantise
from support.rpc_gate import RpcGate
from support.rpc_server import RpcServer
from support.runs import run, run_command
from support.shards import nmse, write_shards

from pinfer.llama.engine import ALWAYS_DENSE, NEVER_DENSE, Engine, PluginConfig
from pinfer.model import open_model

ROOT = Path(__file__).resolve().parent.parent
PROMPT = "Once upon a time there was a little"
TEXT = (ROOT / "tests" / "data" / "heldout.txt").read_text(encoding="utf-8")[:4000]
N_PREDICT = 48
SHARES = (0.0, 0.25, 0.5, 1.0)
NAMED = list(filter(None, os.environ.get("PINFER_TEST_DEVICES", "").split(",")))
DEVICES = ["CPU", "RPC0", "CPU,RPC0", "RPC0,RPC1", *NAMED, *(f"{name},RPC0" for name in NAMED)]
OWN_KERNELS = {"CPU", "RPC0", "RPC1"}
# NMSE, as in test_exact.py: the shards of Q4_0 hold their down matrices in Q8_0, and GPUs round products of F16 to F16.
TOLERANCE, ROUNDED = 1e-6, 2e-4

Logits = NDArray[np.float32]


@dataclass(frozen=True)
class Shards:
    """The model and its shards with a share of hot neurons, on a number of devices."""

    share: float
    model: Path
    hot: tuple[Path, ...]
    cold: Path


@dataclass(frozen=True)
class Case:
    """A model of one type, its shards, and its results in dense computation."""

    name: str
    type_name: str
    activation: str
    continuation: list[int]  # the prompt and its greedy continuation by the dense model
    text: list[int]
    shards: dict[int, list[Shards]]  # by the number of devices
    logits: tuple[Logits, Logits]  # of the continuation and of the text

    def pieces(self) -> list[tuple[list[int], int, int]]:
        """Tokens, how many at a time, and from how many on they are computed densely."""
        return [
            (self.continuation, 1, 0),
            (self.text[:63], 7, 0),
            (self.text, 512, 0),
            (self.text, 512, NEVER_DENSE),
        ]

    def check(self, got: Logits, device: str, what: str) -> None:
        """Checks that the logits of all pieces, and every greedily chosen token, are those of the dense model.

        F16 knows no exception where the same kernels compute it; where Q4_0 or another device's F16 rounds otherwise,
        the choice may fall between tokens that are as good.
        """
        same_kernels = self.type_name == "F16" and OWN_KERNELS.issuperset(device.split(","))
        tolerance = TOLERANCE if same_kernels else ROUNDED
        of_continuation, of_text = self.logits
        for piece, want in zip(self.pieces(), (of_continuation, of_text, of_text, of_text), strict=True):
            tokens, n_batch, n_batch_dense = piece
            label = f"{what}, batches of {n_batch}{'' if n_batch_dense == 0 else ', sparse'}"
            logits, got = got[: len(tokens)], got[len(tokens) :]
            want = want[: len(tokens)]
            error = nmse(logits, want)
            assert error <= tolerance, f"{label}: NMSE {error:.2g}"
            gap = want.max(1) - want[np.arange(len(tokens)), logits.argmax(1)]
            # stories continue clearly; the held-out text has positions where two tokens are equally likely
            near = 0.0 if same_kernels and tokens is self.continuation else 4 * np.sqrt(tolerance * (want**2).mean())
            assert gap.max() <= near, f"{label}: token {gap.argmax()} is {gap.max():.3g} below the dense choice"
        assert not len(got)


def make_case(name: str, type_name: str, folder: Path) -> Case:
    path = quantise(ROOT / "models" / f"{name}.gguf", type_name, folder / "model.gguf")
    model = open_model(path)
    # stock libllama would apply SiLU where the model says reglu: pinfer's own dense products are the reference
    with Engine(path, plugin=PluginConfig(model.activation, n_batch_dense=ALWAYS_DENSE), n_ctx=512) as engine:
        prompt, text = engine.tokenize(PROMPT), engine.tokenize(TEXT)[:512]
        continuation = prompt + engine.generate(prompt, N_PREDICT)
        engine.clear()
        of_continuation = engine.decode(continuation, logits=True)
        engine.clear()
        of_text = engine.decode(text, logits=True)
    shards: dict[int, list[Shards]] = {1: [], 2: []}
    for n_devices, of_so_many in shards.items():
        for share in SHARES if n_devices == 1 else SHARES[1:]:
            place = folder / f"{share:.0%} on {n_devices}" / "model.gguf"
            place.parent.mkdir()
            os.link(path, place)
            written = write_shards(place, share, n_devices)
            of_so_many.append(Shards(share, place, written.hot_shards, written.cold))
    activation = str(model.activation)
    logits = (of_continuation, of_text)
    return Case(name, type_name, activation, continuation, text, shards, logits)


@pytest.fixture(scope="module", params=["F16", "Q4_0"])
def type_name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture(scope="module", params=["tiny-relu2", "tiny-reglu"])
def case(request: pytest.FixtureRequest, type_name: str, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return make_case(request.param, type_name, tmp_path_factory.mktemp("case"))


@pytest.fixture
def server() -> Iterator[RpcServer]:
    with RpcServer() as running:
        yield running


def run_worker(folder: Path, rpc: str | None, models: list[dict[str, Any]]) -> tuple[Logits, list[dict[str, Any]]]:
    out = folder / "logits.npy"
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])}
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "support" / "device_worker.py"), str(out)],
        input=json.dumps({"rpc": rpc, "models": models}),
        capture_output=True,
        text=True,
        timeout=900,  # a software driver takes minutes to compile its shaders
        check=False,
        env=environment,
    )
    assert done.returncode == 0, done.stderr
    return np.load(out), json.loads(done.stdout)


@pytest.mark.parametrize("device", DEVICES)
def test_every_share_on_every_device_is_dense(case: Case, device: str, tmp_path: Path) -> None:
    placed = case.shards[device.count(",") + 1]
    models = [
        {
            "path": str(s.model),
            "activation": case.activation,
            "hot": [str(shard) for shard in s.hot],
            "cold": str(s.cold),
            "device": device,
            "pieces": case.pieces(),
        }
        for s in placed
    ]
    with ExitStack() as stack:
        servers = [stack.enter_context(RpcServer()).endpoint for _ in range(device.count("RPC"))]
        logits, stats = run_worker(tmp_path, ",".join(servers) or None, models)
    for shards, rows, counted in zip(placed, np.split(logits, len(models)), stats, strict=True):
        case.check(rows, device, f"{case.name} {case.type_name}, {shards.share:.0%} on {device}")
        assert counted["n_fallback"] == 0
        assert counted["n_hot"] == counted["n_neurons"] * shards.share, "not where they were placed"
        assert (counted["hot_bytes"] > 0) == (shards.share > 0)


# --- a budget of device memory ----------------------------------------------------------------------------------------


@pytest.fixture
def pinfer(tmp_path: Path) -> CommandLine:
    return CommandLine(tmp_path, tmp_path / "home")


def test_a_budget_is_kept_as_the_device_itself_counts(
    tiny_relu2: Path, server: RpcServer, tmp_path: Path, pinfer: CommandLine
) -> None:
    """Dense layers alone, then with hot neurons; then the same on a device that has become too small."""
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    assert pinfer("profile", tiny_relu2, "--dataset", text, "--tokens", "256", "--samples", "0").code == 0
    sizes = ("-c", "256", "-ub", "64")
    for budget in (4, 12):
        with RpcGate(server.endpoint, memory=64 << 20) as gate:
            where = ("--rpc", gate.endpoint, "--vram", f"{budget}M", "--device", "RPC0")
            assert pinfer("solve", tiny_relu2, *where, *sizes).code == 0
            assert pinfer("split", tiny_relu2).code == 0
            gate.peak = 0
            words = ("-p", TEXT[:700], "-n", "16", "--temp", "0", "--json", *sizes)
            done = pinfer("run", tiny_relu2, "--rpc", gate.endpoint, *words)
        assert done.code == 0, done.err
        report = json.loads(done.out)
        assert report["n_prompt"] > 128  # so the largest batch has been used
        assert 0 < gate.peak <= budget << 20
        assert abs(report["vram_used"] - gate.peak) <= gate.peak / 100
        assert report["vram_limit"] == budget << 20
    with RpcGate(server.endpoint, memory=2 << 20) as gate:
        done = pinfer("run", tiny_relu2, "--rpc", gate.endpoint, *words)
    assert (done.code, done.out, len(done.err_lines)) == (1, "", 1), done.err
    assert "RPC0 has 2 MiB" in done.err


# --- not an RPC server ------------------------------------------------------------------------------------------------


def runner(model: Path, *args: str, timeout: float = 60, **options: Any) -> tuple[int, list[str], float]:
    """Exit code, lines on stderr, seconds."""
    begin = time.monotonic()
    done = run(model, "-p", PROMPT, "-n", 4, "--temp", 0, *args, timeout=timeout, **options)
    return done.code, done.err.splitlines(), time.monotonic() - begin


def answering(reply: bytes | None) -> str:
    """The endpoint of a socket that sends this answer to the first request and closes; None: it never answers."""
    listener = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        client, _ = listener.accept()
        if reply is None:
            client.recv(1 << 16)
            client.recv(1)  # until the other side gives up
        else:
            client.recv(33)
            client.sendall(reply)
        client.close()
        listener.close()

    threading.Thread(target=serve, daemon=True).start()
    return f"127.0.0.1:{listener.getsockname()[1]}"


def hello(major: int, minor: int) -> bytes:
    return (28).to_bytes(8, "little") + bytes([major, minor, 0, 0]) + bytes(24)


def closed_port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{free.getsockname()[1]}"


def test_not_a_server_is_a_one_line_error(tiny_relu2: Path) -> None:
    cases = [
        (closed_port(), "there is no RPC server at"),
        (answering(b"HTTP/1.1 400 Bad Request\r\nConnection: close\r\n\r\n" * 2), "is no RPC server"),
        (answering(b""), "is no RPC server"),
        (answering(hello(6, 0)), "speaks version 6.0 of the RPC protocol"),
        (answering(hello(7, 255)), "speaks version 7.255 of the RPC protocol"),
        (answering(None), "says nothing; an RPC server serves one program at a time"),
        ("nowhere.invalid:50052", "there is no host nowhere.invalid"),
        ("127.0.0.1", "is no RPC server; write host:port"),
    ]
    for endpoint, says in cases:
        code, lines, seconds = runner(tiny_relu2, rpc=endpoint)
        assert code == 1, endpoint
        assert len(lines) == 1, lines
        assert lines[0].startswith("pinfer: ")
        assert says in lines[0]
        assert endpoint.partition(":")[0] in lines[0]
        assert seconds < 20, endpoint


def test_the_first_server_that_fails_is_named(tiny_relu2: Path, server: RpcServer) -> None:
    missing = closed_port()
    code, lines, _ = runner(tiny_relu2, rpc=f"{server.endpoint},{missing}")
    assert (code, len(lines)) == (1, 1)
    assert missing in lines[0]
    assert server.endpoint not in lines[0]
    code, lines, _ = runner(tiny_relu2, rpc=server.endpoint)  # the server still works
    assert code == 0, lines


def test_python_commands_print_the_same_error(tiny_relu2: Path, tmp_path: Path, pinfer: CommandLine) -> None:
    missing = closed_port()
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    for command in (("solve",), ("eval", "--text", str(text)), ("bench", "--compare", "none", "-p", "8", "-n", "0")):
        done = pinfer(command[0], tiny_relu2, *command[1:], "--rpc", missing)
        assert (done.code, done.out) == (1, "")
        assert len(done.err_lines) == 1
        assert f"there is no RPC server at {missing}" in done.err
    done = pinfer("run", tiny_relu2, "-p", "a", env={"PINFER_RPC": missing})
    assert (done.code, done.err_lines[0].startswith("pinfer: there is no RPC server at")) == (1, True)
    for words in (("run", "--rpc", "nonsense"), ("solve", "--rpc", "a:1,b:0"), ("bench", "--rpc", missing)):
        done = pinfer(words[0], tiny_relu2, *words[1:])
        assert (done.code, len(done.err_lines)) == (2, 1), done.err
        assert "--rpc" in done.err


# --- a device that fails ----------------------------------------------------------------------------------------------


def hot_half(model: Path) -> Path:
    write_shards(model, 0.5)
    return model


def generate_for_ever(model: Path, server: RpcServer, *args: str, **options: Any) -> subprocess.Popen[bytes]:
    endless = ("--ignore-eos", "-c", "65536", "--override-kv", "arcee.context_length=int:65536", "--temp", "0")
    command = run_command(model, "-p", PROMPT, *endless, *args, rpc=server.endpoint, **options)
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)


@pytest.mark.parametrize(
    ("args", "options"),
    [((), {"device": "RPC0"}), (("-ngl", "3"), {"device": "RPC0"}), (("-ngl", "all"), {"dense": True})],
)
def test_a_server_that_is_killed_ends_a_run_with_one_line(
    tiny_relu2: Path, server: RpcServer, args: tuple[str, ...], options: dict[str, Any]
) -> None:
    with generate_for_ever(hot_half(tiny_relu2), server, *args, **options) as process:
        assert process.stdout is not None
        assert len(process.stdout.read(200)) == 200  # it is running
        begin = time.monotonic()
        server.kill()
        _, err = process.communicate(timeout=30)
        assert time.monotonic() - begin < 5
    assert process.returncode == 1
    (line,) = err.decode().splitlines()
    assert line.startswith(f"pinfer: the connection to the RPC server {server.endpoint} broke off")


@pytest.mark.parametrize("after", [200, 20_000, 1_000_000])
def test_a_server_that_fails_while_the_model_is_loaded(tiny_relu2: Path, server: RpcServer, after: int) -> None:
    """After the first requests, while buffers are allocated, and in the middle of the weights."""
    with RpcGate(server.endpoint, cut_after=after) as gate:
        code, lines, seconds = runner(hot_half(tiny_relu2), "-ngl", "all", rpc=gate.endpoint, device="RPC0")
    assert (code, len(lines)) == (1, 1), lines
    assert lines[0].startswith(f"pinfer: the connection to the RPC server {gate.endpoint} broke off")
    assert seconds < 20


def test_a_server_that_fails_during_the_python_commands(
    tiny_relu2: Path, server: RpcServer, tmp_path: Path, pinfer: CommandLine
) -> None:
    text = tmp_path / "text.txt"
    text.write_text(TEXT)
    assert pinfer("profile", tiny_relu2, "--dataset", text, "--tokens", "256", "--samples", "0").code == 0
    hot_half(tiny_relu2)
    for after, command in (
        (20_000, ("solve", "--device", "RPC0", "--vram", "64M")),  # while it measures
        (2_000_000, ("eval", "--text", str(text), "--device", "RPC0")),
        (500_000, ("bench", "--compare", "none", "-p", "8", "-n", "0", "--device", "RPC0")),
    ):
        with RpcGate(server.endpoint, cut_after=after) as gate:
            done = pinfer(command[0], tiny_relu2, *command[1:], "--rpc", gate.endpoint)
        assert done.code == 1, command
        (line,) = [line for line in done.err_lines if "broke off" in line]
        assert f"the RPC server {gate.endpoint} broke off" in line
        assert "Traceback" not in done.err
        assert done.err_lines[-1] == line
