"""`pinfer serve` over HTTP: the same answers as stock llama.cpp whatever the load, and an end within seconds."""

from __future__ import annotations

import http.client
import json
import os
import shutil
import signal
import socket
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import pytest
from support.command_line import CommandLine
from support.runs import run
from support.server import N_PREDICT, Server, serving

ROOT = Path(__file__).resolve().parent.parent
PROMPTS = [
    "Once upon a time",
    "One day, a little girl named Lily",
    "The dog",
    "There was a big tree in the park",
    "Tom and Ben",
    "It was a sunny day and",
    "A cat",
    "In the morning the king",
]
SECONDS = float(os.environ.get("PINFER_SOAK_SECONDS", "20"))
"""How long the load test lasts; `make soak` sets 600."""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("serve")
    shutil.copy(ROOT / "models" / "tiny-relu2.gguf", folder / "tiny.gguf")
    return folder


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with serving(folder, folder / "tiny.gguf", "-np", "4", "-c", "1024", "--metrics") as server:
        yield server


@pytest.fixture(scope="module")
def answers(folder: Path) -> dict[str, str]:
    """What stock llama.cpp writes after each prompt, one at a time."""
    with serving(folder, folder / "tiny.gguf", "--dense", "-np", "1") as dense:
        assert dense.request("/pinfer") == (200, {"models": []})
        return {prompt: dense.complete(prompt) for prompt in PROMPTS}


def test_it_says_what_it_serves(server: Server, folder: Path) -> None:
    assert "serving tiny.gguf: relu2 FFN by its active neurons" in server.log.read_text()
    sockets = [line.split()[1] for line in Path("/proc/net/tcp").read_text().splitlines()[1:] if " 0A " in line]
    assert [address for address in sockets if address.endswith(f":{server.port:04X}")] == [
        f"0100007F:{server.port:04X}"
    ]


def test_it_tells_what_it_has_computed(server: Server) -> None:
    server.complete(PROMPTS[0])
    status, before = server.request("/pinfer")
    assert status == 200
    (model,) = before["models"]
    assert model["model"].endswith("tiny.gguf")
    assert (model["mode"], model["activation"], model["devices"]) == ("exact", "relu2", [])
    assert 0 < model["active"] < 0.5
    assert (model["computed"], model["hot"], model["n_fallback"]) == (1, None, 0)
    server.complete(PROMPTS[1], cache_prompt=False)
    after = server.request("/pinfer")[1]["models"][0]
    assert after["tokens"] >= model["tokens"] + N_PREDICT


def test_threads_spin_for_a_short_time_unless_the_user_says_how_long(folder: Path) -> None:
    wanted: tuple[tuple[dict[str, str], bytes], ...] = (({}, b"1000"), ({"GOMP_SPINCOUNT": "7"}, b"7"))
    for env, count in wanted:
        with serving(folder, folder / "tiny.gguf", env=env, without=("OMP_WAIT_POLICY",)) as server:
            environment = Path(f"/proc/{server.process.pid}/environ").read_bytes().split(b"\0")
            assert b"GOMP_SPINCOUNT=" + count in environment
    with serving(folder, folder / "tiny.gguf", env={"OMP_WAIT_POLICY": "passive"}) as server:
        assert b"GOMP_SPINCOUNT" not in Path(f"/proc/{server.process.pid}/environ").read_bytes()


def test_many_clients_get_the_answers_of_stock_llama_cpp(server: Server, answers: dict[str, str]) -> None:
    """8 clients on 4 slots for a while: every answer is right, and memory does not grow."""
    end = time.monotonic() + SECONDS
    counts: list[int] = []
    wrong: list[tuple[str, str]] = []

    def client(number: int) -> None:
        count = 0
        while time.monotonic() < end:
            prompt = PROMPTS[(number + count) % len(PROMPTS)]
            if (text := server.complete(prompt)) != answers[prompt]:
                wrong.append((prompt, text))
            count += 1
        counts.append(count)

    with ThreadPoolExecutor(8) as clients:
        first = [clients.submit(client, number) for number in range(8)]
        time.sleep(SECONDS / 4)
        before = server.memory()
        for done in first:
            done.result()
    assert wrong == [], f"{len(wrong)} of {sum(counts)} answers"
    assert len(counts) == 8
    assert min(counts) >= 2
    assert server.memory() - before < 16 << 20
    status, metrics = server.request("/metrics")
    assert status == 200
    assert b"llamacpp:tokens_predicted_total" in metrics


def test_streaming(server: Server, answers: dict[str, str]) -> None:
    response = server.stream(PROMPTS[0])
    assert response.headers["Content-Type"].startswith("text/event-stream")
    pieces = [json.loads(line[6:]) for line in response if line.startswith(b"data: {")]
    assert len(pieces) > N_PREDICT // 2
    assert "".join(piece["content"] for piece in pieces) == answers[PROMPTS[0]]
    assert pieces[-1]["stop"] is True


def test_other_endpoints(server: Server) -> None:
    chat = {"messages": [{"role": "user", "content": "Hello"}], "max_tokens": 8, "temperature": 0}
    status, answer = server.request("/v1/chat/completions", chat)
    assert status == 200
    assert answer["choices"][0]["message"]["content"]
    status, answer = server.request("/v1/messages", chat)
    assert (status, answer["type"]) == (200, "message")
    status, answer = server.request("/v1/models")
    assert (status, answer["data"][0]["meta"]["n_ctx_train"]) == (200, 256)
    schema = {
        "type": "object",
        "properties": {"n": {"type": "integer"}},
        "required": ["n"],
        "additionalProperties": False,
    }
    assert list(json.loads(server.complete("A number", json_schema=schema, n_predict=64))) == ["n"]


def test_embeddings_are_those_of_stock_llama_cpp(folder: Path) -> None:
    vectors = []
    for mode in ("--exact", "--dense"):
        with serving(folder, folder / "tiny.gguf", mode, "--embeddings", "--pooling", "mean") as server:
            status, answer = server.request("/v1/embeddings", {"input": PROMPTS})
            assert status == 200
            vectors.append([item["embedding"] for item in answer["data"]])
    exact, dense = vectors
    assert len(exact) == len(PROMPTS)
    for one, other in zip(exact, dense, strict=True):
        assert one == pytest.approx(other, abs=1e-3)


def test_requests_that_are_wrong(server: Server, answers: dict[str, str]) -> None:
    for path, raw in (
        ("/completion", b'{"prompt": '),
        ("/completion", b"\xff\xfe"),
        ("/v1/chat/completions", b'{"messages": "none"}'),
        ("/completion", json.dumps({"prompt": "word " * 4000, "n_predict": 1}).encode()),
    ):
        status, answer = server.request(path, raw=raw)
        assert 400 <= status < 600, (path, raw[:40], answer)
        assert answer["error"]["message"]
    assert server.request("/no/such/path")[0] == 404
    assert server.complete(PROMPTS[1]) == answers[PROMPTS[1]]


def test_a_model_whose_file_disappears_is_served_to_the_end(folder: Path, answers: dict[str, str]) -> None:
    gone = Path(shutil.copy(folder / "tiny.gguf", folder / "gone.gguf"))
    with serving(folder, gone, "-np", "1") as server:
        assert server.complete(PROMPTS[0]) == answers[PROMPTS[0]]
        gone.unlink()
        assert server.complete(PROMPTS[1]) == answers[PROMPTS[1]]
        assert server.request("/pinfer")[1]["models"][0]["tokens"] > 0


def test_clients_that_leave(server: Server, answers: dict[str, str]) -> None:
    for _ in range(8):
        response = server.stream(PROMPTS[2], n_predict=-1, ignore_eos=True)
        assert response.read(64)
        response.close()
    with ThreadPoolExecutor(4) as clients:
        for prompt, text in zip(PROMPTS, clients.map(server.complete, PROMPTS), strict=True):
            assert text == answers[prompt]


@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGINT])
def test_it_ends_within_seconds_in_the_middle_of_answers(folder: Path, signum: signal.Signals) -> None:
    long = ("-c", "65536", "--override-kv", "arcee.context_length=int:16384")
    with serving(folder, folder / "tiny.gguf", "-np", "4", *long) as server:
        responses = [server.stream(prompt, n_predict=-1, ignore_eos=True) for prompt in PROMPTS[:4]]
        for response in responses:
            assert response.read(64)
        waiting = threading.Thread(target=_read, args=(server, PROMPTS), daemon=True)
        waiting.start()
        begin = time.monotonic()
        server.process.send_signal(signum)
        assert server.process.wait(60) == 0
        assert time.monotonic() - begin < 5
        assert "[ active " in server.log.read_text().splitlines()[-1]


def _read(server: Server, prompts: Sequence[str]) -> None:
    for prompt in prompts:
        with suppress(OSError, http.client.HTTPException, AssertionError):  # the server has gone
            server.complete(prompt, n_predict=-1, ignore_eos=True)


def test_what_cannot_be_served_is_one_line(folder: Path, tmp_path: Path) -> None:
    pinfer = CommandLine(tmp_path / "work", tmp_path / "home")
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        for words, says in (
            ((folder / "tiny.gguf", "--port", port), "choose another port: --port"),
            ((folder / "missing.gguf",), "missing.gguf"),
            ((folder / "tiny.gguf", "--api-key-file", "nowhere"), "--api-key-file nowhere: No such file"),
            ((folder / "tiny.gguf", "--host", "256.256.256.256"), "cannot listen on 256.256.256.256"),
        ):
            done = pinfer("serve", *words, timeout=60)
            assert (done.code, done.out, len(done.err_lines)) == (1, "", 1), done.err
            assert says in done.err
    assert pinfer("serve", folder / "tiny.gguf", "--json").code == 2


def test_a_key_is_asked_for(folder: Path) -> None:
    with serving(folder, folder / "tiny.gguf", "--api-key", "secret") as server:
        assert server.request("/completion", {"prompt": "a"})[0] == 401
        assert server.request("/pinfer")[0] == 401


def test_a_draft_model_changes_nothing_but_the_speed(folder: Path, answers: dict[str, str]) -> None:
    draft = Path(shutil.copy(folder / "tiny.gguf", folder / "draft.gguf"))
    words = ("-md", draft, "--spec-draft-n-max", "4", "-np", "1")
    with serving(folder, folder / "tiny.gguf", *words) as server:
        for prompt in PROMPTS:
            body = {"prompt": prompt, "n_predict": N_PREDICT, "temperature": 0}
            status, answer = server.request("/completion", body)
            assert (status, answer["content"]) == (200, answers[prompt])
            assert answer["timings"]["draft_n_accepted"] > 0
        assert [Path(model["model"]).name for model in server.request("/pinfer")[1]["models"]] == [
            "tiny.gguf",
            "draft.gguf",
        ]
    draft.unlink()


def test_a_router_serves_many_models_each_by_its_own_configuration(folder: Path, answers: dict[str, str]) -> None:
    models = folder / "many"
    models.mkdir()
    shutil.copy(folder / "tiny.gguf", models / "one.gguf")
    shutil.copy(ROOT / "models" / "tiny-reglu.gguf", models / "two.gguf")
    with serving(folder, "--models-dir", models) as server:
        status, listed = server.request("/v1/models")
        assert (status, {model["id"] for model in listed["data"]}) == (200, {"one", "two"})
        assert server.complete(PROMPTS[0], model="one") == answers[PROMPTS[0]]
        alone = run(models / "two.gguf", "-p", PROMPTS[0], "-n", N_PREDICT, "--temp", 0, as_json=True)
        assert server.complete(PROMPTS[0], model="two") == alone.json["text"]
        for name, activation in (("one", "relu2"), ("two", "reglu")):
            (model,) = server.request(f"/pinfer?model={name}")[1]["models"]
            assert (model["model"], model["activation"]) == (str(models / f"{name}.gguf"), activation)
        log = server.log.read_text()
        assert "serving one.gguf: relu2 FFN by its active neurons" in log
        assert "serving two.gguf: reglu FFN by its active neurons" in log
        begin = time.monotonic()
        server.process.send_signal(signal.SIGTERM)
        assert server.process.wait(30) == 0
        assert time.monotonic() - begin < 5
