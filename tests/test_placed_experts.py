"""Experts without exact zeros: whole ones on devices, the others by llama.cpp's own products where it has put them.

Stock libllama is the reference, on random models of true graphs (support/silu_mixtures.py).
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.adapter import write_adapter
from support.graph_values import graph_values
from support.rewritten import rewrite
from support.rpc_server import RpcServer
from support.runs import run
from support.shards import nmse, write_shards
from support.silu_mixtures import ARCHITECTURES, SiluMixture, write_silu_mixture
from support.sparse_models import N_VOCAB

from pinfer.artefacts import paths
from pinfer.artefacts.artefact import ArtefactWriter
from pinfer.artefacts.placement import PlacementFile
from pinfer.artefacts.profile import ProfileFile
from pinfer.artefacts.shards import ShardFile
from pinfer.errors import PinferError
from pinfer.eval import EvalOptions, evaluate
from pinfer.execution import ExecutionOptions, decide
from pinfer.llama.engine import Engine, PluginConfig
from pinfer.llama.plugin import Stats, load_plugin
from pinfer.model import Model, open_model
from pinfer.plot import plot_placement, plot_profile
from pinfer.preparation import PrepareOptions, prepare
from pinfer.profile import ProfileOptions, profile
from pinfer.show import ShowOptions, show
from pinfer.solve import SolveOptions, solve
from pinfer.split import SplitOptions, split
from pinfer.train import TrainOptions, train

ROOT = Path(__file__).resolve().parent.parent
Logits = NDArray[np.float32]

N_TOKENS, PIECES = 64, (64, 5, 1)
TOKENS = np.random.default_rng(0).integers(1, N_VOCAB, N_TOKENS).tolist()
PROMPT, N_PREDICT = TOKENS[:8], 16
SHARES = (0.25, 0.5, 1.0)

# NMSE. In F32 only the order of the sums differs; ggml looks GELU up by F16 numbers, so that a last bit may become one
# of 2^-11. Other types round the input of every product, and a last bit there moves a value by a step of 1/127.
TOLERANCE = {"F32": 1e-10, "Q8_0": 1e-4, "Q4_0": 1e-4, "Q4_K": 1e-4, "MXFP4": 1e-4}
GELU_TOLERANCE = 1e-6
MODELS = [SiluMixture(arch, kind) for arch in ARCHITECTURES for kind in ("F32", "Q8_0", "Q4_0")]
MODELS += [SiluMixture("qwen3moe", "Q4_K", n_embd=256, n_ff=256), SiluMixture("gpt-oss", "MXFP4")]
EXACT = [options for options in MODELS if options.type == "F32"]


def describe(options: SiluMixture) -> str:
    return f"{options.arch}-{options.type}"


@dataclass(frozen=True)
class Case:
    """A model and what stock libllama computes."""

    options: SiluMixture
    path: Path
    logits: Logits  # of TOKENS
    continuation: list[int]  # of PROMPT, greedy

    @property
    def model(self) -> Model:
        return open_model(self.path)

    @property
    def tolerance(self) -> float:
        tolerance = TOLERANCE[self.options.type]
        return max(tolerance, GELU_TOLERANCE) if self.options.arch == "grok" else tolerance

    def copied(self, folder: Path) -> Case:
        """The same model in a folder of its own, for artefacts of its own."""
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "model.gguf"
        path.hardlink_to(self.path)
        return replace(self, path=path)


_CASES: dict[SiluMixture, Case] = {}


@pytest.fixture
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[SiluMixture], Case]:
    """Makes each model once."""

    def get(options: SiluMixture) -> Case:
        if options not in _CASES:
            path = write_silu_mixture(tmp_path_factory.mktemp("case") / "model.gguf", options)
            with Engine(path, n_ctx=128, n_threads=2, f32_attention=True) as engine:
                logits = engine.decode(TOKENS, logits=True)
                _CASES[options] = Case(options, path, logits, engine.generate(PROMPT, N_PREDICT))
        return _CASES[options]

    return get


def placed(case: Case, share: float, n_devices: int = 1) -> PluginConfig:
    """This share of the experts on as many CPU devices."""
    shards = write_shards(case.path, share, n_devices)
    assert shards.in_place
    assert not shards.cold.exists()
    return replace(PluginConfig.of(case.model), hot=shards.hot_shards, device=",".join(["CPU"] * n_devices))


def check(case: Case, config: PluginConfig, what: str, **engine_options: Any) -> Stats:
    """Logits in batches and token by token, and greedy tokens; returns the counters of batches of 5 and 1."""
    with Engine(case.path, plugin=config, n_ctx=128, n_threads=2, f32_attention=True, **engine_options) as engine:
        for n in PIECES:
            engine.clear()
            pieces = [engine.decode(TOKENS[begin : begin + n], logits=True) for begin in range(0, N_TOKENS, n)]
            error = nmse(np.concatenate(pieces), case.logits)
            assert error <= case.tolerance, f"{what}, batches of {n}: NMSE {error:.2g}"
        stats = load_plugin().stats(case.path)
        continuation = engine.generate(PROMPT, N_PREDICT)
    assert continuation == case.continuation, f"{what}: other words"
    return stats


def is_routing(name: str, operation: str) -> bool:
    """A softmax router's probabilities."""
    return name.startswith("ffn_moe_probs-") and operation == "SOFT_MAX"


# --- the same words ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", MODELS, ids=describe)
def test_logits_and_tokens_are_stock_libllamas(
    options: SiluMixture, cases: Callable[[SiluMixture], Case], tmp_path: Path
) -> None:
    original = cases(options)
    for n_devices, share in [*((1, share) for share in SHARES), (2, 0.5), (2, 1.0)]:
        what = f"{share:.0%} on {n_devices} devices"
        case = original.copied(tmp_path / what)
        stats = check(case, placed(case, share, n_devices), what)
        n_ffns, model = len(case.model.ffns), case.model
        assert stats.n_fallback == 0, what
        assert (stats.n_tokens, stats.n_tokens_dense) == (2 * N_TOKENS * n_ffns, N_TOKENS * n_ffns), what
        assert stats.n_neurons == stats.n_tokens * model.n_expert_used * model.n_ff, what
        assert stats.n_candidates == stats.n_neurons - stats.n_hot, what
        assert stats.hot_bytes > 0, what
        assert 0 < stats.n_hot <= stats.n_neurons, what
        assert (stats.n_hot == stats.n_neurons) == (share == 1.0), what


def test_hot_experts_are_counted_where_tokens_are_routed_to(
    cases: Callable[[SiluMixture], Case], tmp_path: Path
) -> None:
    """The counter of the plugin is that of the graph's own choices."""
    case = cases(SiluMixture()).copied(tmp_path / "counted")
    stats = check(case, placed(case, 0.5), "half")
    model = case.model
    placement = PlacementFile.read(case.path.with_name("model.gguf.pinfer") / paths.PLACEMENT, model)
    probabilities = graph_values(case.path, TOKENS, is_routing)
    n_hot = 0
    for (_, values), units in zip(probabilities, placement.hot(0), strict=True):
        chosen = np.argsort(-values.reshape(N_TOKENS, -1), axis=1)[:, : model.n_expert_used]
        n_hot += int(np.isin(chosen, units).sum()) * model.n_ff
    assert stats.n_hot == 2 * n_hot


@pytest.mark.parametrize("repack", [True, False])
def test_cold_experts_stay_where_llama_cpp_has_put_them(
    repack: bool, cases: Callable[[SiluMixture], Case], tmp_path: Path
) -> None:
    """In copies of another layout, or where the file is mapped."""
    case = cases(SiluMixture("qwen3moe", "Q4_0")).copied(tmp_path / "layout")
    assert check(case, placed(case, 0.5), "half", repack=repack).n_fallback == 0


@pytest.mark.parametrize("options", MODELS, ids=describe)
def test_without_experts_on_devices_all_is_left_to_stock_libllama(
    options: SiluMixture, cases: Callable[[SiluMixture], Case], tmp_path: Path
) -> None:
    """Not a node is taken, and the logits are the same to the last bit."""
    case = cases(options).copied(tmp_path / "none")
    execution = decide(case.model, ExecutionOptions())
    assert (execution.plugin, execution.mode) == (None, "dense")
    assert "pinfer prepare" in execution.notes[0]
    config = placed(case, 0.0)
    assert decide(case.model, ExecutionOptions()).plugin is None
    for plugin in (replace(config, hot=None), config):
        with Engine(case.path, plugin=plugin, n_ctx=128, n_threads=2, f32_attention=True) as engine:
            assert np.array_equal(engine.decode(TOKENS, logits=True), case.logits)
            stats = load_plugin().stats(case.path)
        assert (stats.n_tokens, stats.n_tokens_dense, stats.n_fallback) == (0, 0, 0)


def test_another_model_of_the_same_shape_keeps_its_words(cases: Callable[[SiluMixture], Case], tmp_path: Path) -> None:
    """Its weights lie in llama.cpp's buffers too; their products tell them apart from the configured model's."""
    ours = cases(SiluMixture()).copied(tmp_path / "ours")
    other = cases(SiluMixture(seed=1))
    with Engine(ours.path, plugin=placed(ours, 0.5), n_ctx=128, n_threads=2, f32_attention=True) as engine:
        engine.decode(TOKENS[:4])
        with Engine(other.path, n_ctx=128, n_threads=2, f32_attention=True) as beside:
            assert np.array_equal(beside.decode(TOKENS, logits=True), other.logits)
        assert load_plugin().stats(ours.path).n_fallback > 0
        engine.clear()
        assert nmse(engine.decode(TOKENS, logits=True), ours.logits) <= ours.tolerance


@pytest.mark.parametrize("device", ["RPC0", "CPU,RPC0", "RPC0,RPC1"])
def test_tokens_are_stock_libllamas_on_rpc_servers(
    device: str, cases: Callable[[SiluMixture], Case], tmp_path: Path
) -> None:
    """All models and shares in one process, which cannot forget a server; then with the dense layers there as well."""
    wanted: list[tuple[Case, str, float]] = []
    models: list[dict[str, Any]] = []
    plain = [(options, share, 0) for options in EXACT for share in SHARES]
    layers = [(options, 0.5, 99) for options in EXACT if options.arch in ("qwen3moe", "qwen2moe") and device == "RPC0"]
    for options, share, n_gpu_layers in plain + layers:
        case = cases(options).copied(tmp_path / f"{describe(options)} {share} {n_gpu_layers}")
        config = placed(case, share, 1 + device.count(","))
        wanted.append((case, f"{describe(options)}, {share:.0%} on {device}", share))
        models.append(
            {
                "path": str(case.path),
                "activation": "other",
                "hot": [str(path) for path in config.hot_paths],
                "cold": None,
                "device": device,
                "pieces": [(TOKENS, n, 0) for n in PIECES] + [(PROMPT + case.continuation[:-1], 1, 0)],
                "f32_attention": True,
                "n_gpu_layers": n_gpu_layers,
            }
        )
    with ExitStack() as stack:
        servers = [stack.enter_context(RpcServer()).endpoint for _ in range(device.count("RPC"))]
        done = subprocess.run(
            [sys.executable, str(ROOT / "tests" / "support" / "device_worker.py"), str(tmp_path / "logits.npy")],
            input=json.dumps({"rpc": ",".join(servers), "models": models}),
            capture_output=True,
            text=True,
            timeout=600,
            check=False,
        )
    assert done.returncode == 0, done.stderr
    logits, stats = np.load(tmp_path / "logits.npy"), json.loads(done.stdout)
    for (case, what, share), counted in zip(wanted, stats, strict=True):
        for n in PIECES:
            assert nmse(logits[:N_TOKENS], case.logits) <= case.tolerance, f"{what}, batches of {n}"
            logits = logits[N_TOKENS:]
        n = len(PROMPT) + len(case.continuation) - 1
        chosen = logits[len(PROMPT) - 1 : n].argmax(axis=1).tolist()
        assert chosen == case.continuation, f"{what}: other words"
        logits = logits[n:]
        assert counted["n_fallback"] == 0, what
        assert (counted["n_hot"] == counted["n_neurons"]) == (share == 1.0), what
    assert not len(logits)


@pytest.mark.parametrize("warm_up", [(), ("--no-warmup",)])
def test_the_runner_says_what_stock_libllama_says(
    warm_up: tuple[str, ...], cases: Callable[[SiluMixture], Case], tmp_path: Path
) -> None:
    """The warm-up of llama.cpp uses all experts."""
    case = cases(SiluMixture("qwen2moe")).copied(tmp_path / "run")
    flags = ("-p", "One day, a", "-n", 12, "--temp", 0, "-t", 1, *warm_up)
    stock = run(case.path, *flags, dense=True)
    assert stock.code == 0, stock.err
    placed(case, 0.5)
    said = run(case.path, *flags)
    assert (said.code, said.raw) == (0, stock.raw), said.err
    found = run(case.path, *flags, as_json=True).json
    assert 0 < found["on_device"] < 1
    assert found["active"] is None
    assert found["n_fallback"] == 0


class _WarmEngine(Engine):
    def warm_up(self, tokens: list[int]) -> None:
        self._llama.llama_set_warmup(self._context, True)
        self.decode(tokens)
        self._llama.llama_set_warmup(self._context, False)
        self.clear()


def test_warming_up_takes_all_experts(cases: Callable[[SiluMixture], Case], tmp_path: Path) -> None:
    """As llama.cpp's chat and server do it; only the first of them are summed."""
    case = cases(SiluMixture("gpt-oss")).copied(tmp_path / "warm")
    with _WarmEngine(case.path, plugin=placed(case, 0.5), n_ctx=128, n_threads=2, f32_attention=True) as engine:
        engine.warm_up(TOKENS[:2])
        assert nmse(engine.decode(TOKENS, logits=True), case.logits) <= case.tolerance
        assert load_plugin().stats(case.path).n_fallback == 0


@pytest.mark.parametrize("n_threads", [1, 3])
@pytest.mark.parametrize("n", [31, 32, 33, 57])
def test_batches_whose_pairs_fill_no_rows(
    n: int, n_threads: int, cases: Callable[[SiluMixture], Case], tmp_path: Path
) -> None:
    """Pairs of tokens and cold experts are arranged in rows, the last one filled up; in both layouts of the weights."""
    for kind in ("F32", "Q4_0"):
        case = cases(SiluMixture("qwen3moe", kind)).copied(tmp_path / kind)
        with Engine(case.path, plugin=placed(case, 0.25), n_ctx=128, n_threads=n_threads, f32_attention=True) as engine:
            got = engine.decode(TOKENS[:n], logits=True)
        assert nmse(got, case.logits[:n]) <= case.tolerance


@pytest.mark.parametrize("parts", [("down_exps",), ("up_exps", "gate_exps", "down_exps")])
def test_an_adapter_on_experts(parts: tuple[str, ...], cases: Callable[[SiluMixture], Case], tmp_path: Path) -> None:
    """Their nodes are computed as they are, and counted."""
    case = cases(SiluMixture("qwen2moe")).copied(tmp_path / "lora")
    flags = ("-p", "One day, a", "-n", 12, "--temp", 0, "-t", 1, "--no-warmup")
    plain = run(case.path, *flags, dense=True)
    with_adapter = (*flags, "--lora", write_adapter(tmp_path / "lora.gguf", case.path, parts))
    stock = run(case.path, *with_adapter, dense=True)
    assert stock.code == 0, stock.err
    assert stock.raw != plain.raw, "the adapter changes nothing"
    placed(case, 0.5)
    said = run(case.path, *with_adapter)
    assert (said.code, said.raw) == (0, stock.raw), said.err
    assert "graph nodes matched nothing that pinfer knows" in said.err


# --- the pipeline -----------------------------------------------------------------------------------------------------


@pytest.fixture
def text(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path / "text.txt"
    path.write_text(" ".join("".join(rng.choice(list("abcdefghijklmnop"), 4)) for _ in range(1500)))
    return path


@pytest.mark.parametrize("options", EXACT, ids=describe)
def test_profile_solve_split_and_run(
    options: SiluMixture, cases: Callable[[SiluMixture], Case], tmp_path: Path, text: Path
) -> None:
    """Experts that tokens are routed to most often are placed first, as many as the budget holds."""
    case = cases(options).copied(tmp_path / "pipeline")
    model = case.model
    report = profile(case.path, ProfileOptions(str(text), 2048, 128, n_threads=2))
    assert report.whole_experts
    assert report.samples_path is None
    assert [layer.layer for layer in report.layers] == [f.layer for f in model.ffns]
    counted = ProfileFile.read(report.path, model)
    for layer, routed in zip(report.layers, counted.routed, strict=True):
        assert routed is not None
        assert routed.sum() == report.tokens * model.n_expert_used
        assert layer.routed is not None
        assert layer.routed.busiest == pytest.approx(routed.max() / routed.mean())
    expert_bytes = model.ffns[0].n_bytes // model.ffns[0].n_experts
    buffers = solve(case.path, SolveOptions(vram=1 << 30, device="CPU", n_ctx=128)).n_bytes
    room = sum(n for part, n in buffers.items() if part != "hot_neurons")
    solved = solve(case.path, SolveOptions(vram=room + 9 * expert_bytes, device="CPU", n_ctx=128))
    assert 1 <= sum(solved.n_hot) <= 9
    written = split(case.path, SplitOptions(verify=True))
    assert (written.in_place, written.cold_bytes, written.to_json()["cold"]) == (True, 0, None)
    units = ShardFile.read(written.hot, "hot", model).units
    for ids, routed in zip(units, counted.routed, strict=True):
        assert routed is not None
        cold = np.setdiff1d(np.arange(len(routed)), ids)
        assert not len(ids) or routed[ids].min() >= routed[cold].max()
    execution = decide(case.model, ExecutionOptions())
    assert execution.plugin is not None
    assert (execution.plugin.cold, execution.plugin.predictor, execution.mode) == (None, None, "exact")
    stats = check(case, execution.plugin, "as solved")
    assert stats.hot_bytes <= solved.n_bytes["hot_neurons"] + solved.n_bytes["hot_buffers"]
    shown = show(case.path, ShowOptions())
    assert "the CPU computes the others at the same time" in shown.plan
    assert {a.kind for a in shown.artefacts} == {"profile", "placement", "hot"}
    assert shown.next == "run"
    (routing,) = plot_profile(case.path).panels
    assert routing.title.startswith("Routing")
    assert len(plot_placement(case.path).panels) == 3


def test_prepare_leaves_training_out(cases: Callable[[SiluMixture], Case], tmp_path: Path, text: Path) -> None:
    case = cases(SiluMixture()).copied(tmp_path / "prepare")
    options = PrepareOptions(dataset=str(text), n_tokens=1024, vram=(1 << 30,), device="CPU", n_ctx=128)
    report = prepare(case.path, options)
    assert report.done == ("profile", "solve", "split")
    assert (report.recall, report.candidates, report.hot_share) == (None, None, 1.0)
    assert prepare(case.path, options).done == ()


def test_the_choice_counted_is_the_graphs_own(cases: Callable[[SiluMixture], Case], tmp_path: Path) -> None:
    """Of a text of one batch."""
    case = cases(SiluMixture()).copied(tmp_path / "routing")
    (tmp_path / "short.txt").write_text("One day, a little girl named Lily found a needle in her room.")
    report = profile(case.path, ProfileOptions(str(tmp_path / "short.txt"), 1024, 128, n_threads=1))
    with Engine(case.path, n_ctx=128) as engine:
        tokens = engine.tokenize((tmp_path / "short.txt").read_text())
    counted = ProfileFile.read(report.path, case.model)
    values = graph_values(case.path, tokens, is_routing)
    for (_, probabilities), routed in zip(values, counted.routed, strict=True):
        chosen = np.argsort(-probabilities.reshape(len(tokens), -1), axis=1)[:, : case.model.n_expert_used]
        assert routed is not None
        assert np.array_equal(routed, np.bincount(chosen.ravel(), minlength=8))


# --- what does not apply, and what is wrong ---------------------------------------------------------------------------


def test_training_and_eval_say_that_nothing_is_predicted(cases: Callable[[SiluMixture], Case]) -> None:
    case = cases(SiluMixture())
    for stage in (lambda: train(case.path, TrainOptions()), lambda: evaluate(case.path, EvalOptions(text=case.path))):
        with pytest.raises(PinferError, match="no exact zeros, so no neuron can be skipped") as refused:
            stage()
        assert "pinfer solve" in (refused.value.hint or "")


def test_split_needs_a_placement_and_keeps_types(cases: Callable[[SiluMixture], Case], tmp_path: Path) -> None:
    case = cases(SiluMixture()).copied(tmp_path / "split")
    with pytest.raises(PinferError, match=r"no expert of model\.gguf is placed") as refused:
        split(case.path, SplitOptions())
    assert "pinfer solve" in (refused.value.hint or "")
    with pytest.raises(PinferError, match="keep their types"):
        split(case.path, SplitOptions(down_type="Q8_0"))


def test_experts_that_cannot_be_placed_are_named(cases: Callable[[SiluMixture], Case], tmp_path: Path) -> None:
    case = cases(SiluMixture())
    stack = np.zeros((8, 96, 128), np.float32)
    fused = {"blk.2.ffn_gate_up_exps.weight": np.zeros((8, 192, 128), np.float32)}
    parts = ("blk.2.ffn_gate_exps.weight", "blk.2.ffn_up_exps.weight")
    changes: dict[str, dict[str, Any]] = {
        "experts with biases in layer 1": {"add": {"blk.1.ffn_up_exps.bias": stack[:, 0, :]}},  # too many
        "FFN matrices with scales of their own in layer 1": {"add": {"blk.1.ffn_up_exps.scale": stack[:, 0, 0]}},
        "gate and up as one matrix in layer 2": {"add": fused, "drop": parts},
        "experts without a gate in layer 2": {"drop": parts[:1]},
    }
    for number, (why, change) in enumerate(changes.items()):
        path = rewrite(case.path, tmp_path / f"{number}.gguf", **change)
        model = open_model(path)
        assert not model.places_experts
        assert model.obstacle.startswith(f"{why}, which pinfer does not compute")
        execution = decide(model, ExecutionOptions())
        assert (execution.plugin, execution.notes) == (None, (f"running dense: the model has {model.obstacle}",))
        assert show(path, ShowOptions()).plan.startswith(model.obstacle)
        with pytest.raises(PinferError, match=why) as refused:
            profile(path, ProfileOptions("none.txt", 100))
        assert "pinfer run --dense" in (refused.value.hint or "")


def test_counts_that_disagree_are_refused(cases: Callable[[SiluMixture], Case], tmp_path: Path) -> None:
    case = cases(SiluMixture()).copied(tmp_path / "counts")
    model = case.model
    path = case.path.with_name("profile.gguf")
    good = [np.full(8, 30, np.int64)] * 3
    for why, first in (
        ("counts outside 0..80", np.array([81, *[0] * 7], np.int64)),
        ("more counts than 80 tokens with 3 experts", np.array([80] * 4 + [0] * 4, np.int64)),
    ):
        ProfileFile.of_routing(80, "x", "y", (first, *good[1:])).write(path, model, {})
        with pytest.raises(PinferError, match=why):
            ProfileFile.read(path, model)
    ProfileFile.of_routing(80, "x", "y", tuple(good)).write(path, model, {})
    assert ProfileFile.read(path, model).tokens == 80
    wrong = rewrite(case.path, tmp_path / "wrong.gguf", keys={"qwen3moe.expert_count": 16})
    with pytest.raises(PinferError, match="holds 8 experts, but its header says 16"):
        open_model(wrong)


def test_shards_that_disagree_are_refused(cases: Callable[[SiluMixture], Case], tmp_path: Path) -> None:
    """An expert in two shards; shards of two placements; a shard beside a predictor or a cold one."""
    case = cases(SiluMixture()).copied(tmp_path / "shards")
    two = placed(case, 1.0, 2)
    first, second = two.hot_paths
    plugin = load_plugin()
    again = case.path.with_name("again.gguf")
    again.write_bytes(first.read_bytes())
    with pytest.raises(PinferError, match="exactly once"):
        plugin.configure(case.path, hot=[first, again], device="CPU,CPU", activation="other")
    second.rename(case.path.with_name("other.gguf"))
    placed(case, 0.5, 2)
    with pytest.raises(PinferError, match="of different placements"):
        plugin.configure(
            case.path, hot=[case.path.with_name("other.gguf"), first], device="CPU,CPU", activation="other"
        )
    with pytest.raises(PinferError, match="neither a predictor nor a cold shard"):
        plugin.configure(case.path, hot=first, cold=first, device="CPU", activation="other")
    with pytest.raises(PinferError, match="made for activation other"):
        plugin.configure(case.path, hot=first, device="CPU", activation="reglu")


def test_a_damaged_shard_ends_the_run(cases: Callable[[SiluMixture], Case], tmp_path: Path) -> None:
    case = cases(SiluMixture()).copied(tmp_path / "damaged")
    config = placed(case, 0.5)
    hot = config.hot_paths[0]
    data = bytearray(hot.read_bytes())
    data[-64:] = bytes(64)
    hot.write_bytes(data)
    with Engine(case.path, plugin=config, n_ctx=512, n_threads=2) as engine:

        def decode() -> None:
            for token in TOKENS:
                engine.decode([token])

        with pytest.raises(PinferError, match="does not have its checksum"):
            decode()


def test_an_artefact_of_another_kind_of_model(cases: Callable[[SiluMixture], Case], tmp_path: Path) -> None:
    """With an activation of its own the model has neurons to skip, and its artefacts are others."""
    case = cases(SiluMixture("llama")).copied(tmp_path / "kind")
    placed(case, 0.5)
    with pytest.raises(PinferError, match="activation"):
        decide(open_model(case.path, "reglu"), ExecutionOptions(activation="reglu"))
    with ArtefactWriter(tmp_path / "other.gguf", "profile", case.model, {}) as out:
        out.add_u64("pinfer.profile.tokens", 5)
        out.add_str("pinfer.profile.corpus", "x")
        out.add_str("pinfer.profile.corpus_sha256", "y")
    with pytest.raises(PinferError, match=r"lacks|has no tensor"):
        ProfileFile.read(tmp_path / "other.gguf", case.model)
