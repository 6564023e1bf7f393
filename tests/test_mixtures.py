"""Mixtures of experts, Nemotron-H and RWKV on the plugin: logits, greedy tokens and counts are the model's own.

The models are random, of true graphs (support/sparse_models.py). Where stock libllama computes a model's activation it
is the reference, else the forward pass in models/reference.py.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray
from support.graph_values import graph_values
from support.rewritten import rewrite
from support.rpc_server import RpcServer
from support.runs import run
from support.shards import nmse, write_shards
from support.sparse_models import ARCHITECTURES, N_VOCAB, SparseModel, write_sparse_model

from models.reference import MixtureReference, MixtureResult
from pinfer.artefacts import paths
from pinfer.artefacts.placement import PlacementFile
from pinfer.artefacts.predictor import LayerPredictor, PredictorWriter
from pinfer.artefacts.profile import ProfileFile, SamplesFile
from pinfer.benchmark.worker import BenchEngine as Bench
from pinfer.errors import PinferError
from pinfer.execution import ExecutionOptions, decide
from pinfer.llama.engine import Engine, PluginConfig
from pinfer.llama.plugin import Stats, load_plugin
from pinfer.model import Ffn, Model, open_model
from pinfer.profile import ProfileOptions, profile
from pinfer.progress import NULL_PROGRESS
from pinfer.solve import SolveOptions, solve
from pinfer.split import SplitOptions, split
from pinfer.train import TrainOptions, train

ROOT = Path(__file__).resolve().parent.parent
Logits = NDArray[np.float32]

N_TOKENS, PIECES = 64, (64, 5, 1)
TOKENS = np.random.default_rng(0).integers(1, N_VOCAB, N_TOKENS).tolist()
PROMPT, N_PREDICT = TOKENS[:8], 16
SHARES = (0.0, 0.25, 0.5, 1.0)

# NMSE. In F32 only the order of the sums differs. Other types round the input of every product, and the cold shard
# holds its down rows in Q8_0.
TOLERANCE = {"F32": 1e-10, "Q8_0": 2e-4, "Q5_0": 2e-4}
TYPES = tuple(TOLERANCE)


def _options(arch: str, kind: str, activation: str | None = None) -> SparseModel:
    # Quarters of a dense FFN are groups of 64 neurons; experts have another width.
    return SparseModel(arch, kind, activation=activation, n_ff=96 if arch in REFERENCED else 256)


REFERENCED = ("nemotron_h_moe", "smallthinker", "llama")
VARIANTS = [(arch, None) for arch in ARCHITECTURES if arch != "llama"] + [("llama", "reglu"), ("llama", "drelu")]
MODELS = [_options(arch, kind, activation) for arch, activation in VARIANTS for kind in TYPES]
EXACT = [options for options in MODELS if options.type == "F32"]
MIXTURES = [options for options in EXACT if options.arch in REFERENCED]


def describe(options: SparseModel) -> str:
    return "-".join(filter(None, [options.arch, options.activation, options.type]))


@dataclass(frozen=True)
class Case:
    """A model and what it computes by itself."""

    options: SparseModel
    path: Path
    logits: Logits  # of TOKENS
    continuation: list[int]  # PROMPT and its greedy continuation
    continued: Logits  # of the continuation
    result: MixtureResult | None  # the reference's forward pass over TOKENS; None for RWKV

    @property
    def model(self) -> Model:
        return open_model(self.path)

    @property
    def tolerance(self) -> float:
        return TOLERANCE[self.options.type]

    def experts(self, ffn: Ffn) -> NDArray[np.int64]:
        """Where the reference routes TOKENS in a stack, ``[n_tokens, k]``."""
        assert self.result is not None
        routing = self.result.routing[ffn.layer]
        assert routing is not None
        return routing.experts

    def neurons(self, ffn: Ffn) -> NDArray[np.float64]:
        """The reference's outputs of an FFN's neurons for TOKENS, ``[n_tokens, n_neurons]``."""
        assert self.result is not None
        routing = self.result.routing[ffn.layer]
        if not ffn.is_stack:
            return np.asarray(self.result.neurons[ffn.layer], np.float64)
        assert routing is not None
        out = np.zeros((N_TOKENS, ffn.n_experts, ffn.n_ff))
        np.put_along_axis(out, routing.experts[:, :, None], routing.neurons, axis=1)
        return out.reshape(N_TOKENS, -1)


class BenchEngine(Bench):
    """With what the tests ask of libllama beyond that."""

    def warm_up(self, tokens: Sequence[int]) -> None:
        self._llama.llama_set_warmup(self._context, True)
        self.decode(tokens)
        self._llama.llama_set_warmup(self._context, False)

    def logits(self, n: int) -> Logits:
        """Of the last batch, ``[n, n_vocab]``."""
        return np.ctypeslib.as_array(self._llama.llama_get_logits(self._context), shape=(n, self.n_vocab)).copy()


def _greedily(decode: Callable[[list[int]], Logits]) -> list[int]:
    """PROMPT continued by ``decode``, which gets all tokens so far and returns logits, the last token's last."""
    tokens = list(PROMPT)
    for _ in range(N_PREDICT):
        tokens.append(int(decode(tokens)[-1].argmax()))
    return tokens


def make_case(options: SparseModel, folder: Path) -> Case:
    path = write_sparse_model(folder / "model.gguf", options)
    reference = None
    if not options.arch.startswith("rwkv"):
        reference = MixtureReference(path, activation=options.activation)
    if options.activation is None:
        with Engine(path, n_ctx=128, n_threads=2, f32_attention=True, repack=False) as engine:
            logits = engine.decode(TOKENS, logits=True)
            engine.clear()
            continuation = _greedily(lambda tokens: engine.decode(tokens[engine.n_past :]))
            engine.clear()
            continued = engine.decode(continuation, logits=True)
    else:
        assert reference is not None
        forward = reference.forward
        logits = forward(TOKENS).logits.astype(np.float32)
        continuation = _greedily(lambda tokens: forward(tokens).logits)
        continued = forward(continuation).logits.astype(np.float32)
    result = reference.forward(TOKENS) if reference else None
    return Case(options, path, logits, continuation, continued, result)


_CASES: dict[SparseModel, Case] = {}


@pytest.fixture
def cases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[SparseModel], Case]:
    """Makes each model once; its artefacts belong into copies (see ``placed``)."""

    def get(options: SparseModel) -> Case:
        if options not in _CASES:
            _CASES[options] = make_case(options, tmp_path_factory.mktemp("case"))
        return _CASES[options]

    return get


def copy_of(case: Case, folder: Path) -> Case:
    """The same model in a folder of its own, for artefacts of its own."""
    folder.mkdir(parents=True, exist_ok=True)
    os.link(case.path, folder / "model.gguf")
    return replace(case, path=folder / "model.gguf")


def placed(case: Case, share: float | None, n_devices: int = 1) -> PluginConfig:
    """Exact mode with this share of the units hot; None: without artefacts."""
    config = PluginConfig.of(case.model)
    if share is None:
        return config
    shards = write_shards(case.path, share, n_devices)
    return replace(config, hot=shards.hot_shards, cold=shards.cold, device=",".join(["CPU"] * n_devices))


def decoded(case: Case, config: PluginConfig) -> tuple[dict[int, Logits], Logits, Stats]:
    """Logits of TOKENS by the length of the batches, those of the continuation token by token, and the counters of
    the short batches."""
    with Engine(case.path, plugin=config, n_ctx=128, n_threads=2, f32_attention=True) as engine:
        plugin, logits = load_plugin(), {}
        for n in PIECES:
            engine.clear()
            logits[n] = np.concatenate(
                [engine.decode(TOKENS[begin : begin + n], logits=True) for begin in range(0, N_TOKENS, n)]
            )
        stats = plugin.stats(case.path)
        engine.clear()
        continued = np.concatenate([engine.decode([token], logits=True) for token in case.continuation])
    return logits, continued, stats


def check_logits(case: Case, config: PluginConfig, what: str) -> Stats:
    logits, continued, stats = decoded(case, config)
    for n, got in logits.items():
        error = nmse(got, case.logits)
        assert error <= case.tolerance, f"{what}, batches of {n}: NMSE {error:.2g}"
    check_greedy(case, continued, what)
    assert stats.n_fallback == 0, what
    n_ffns = len(case.model.ffns)
    assert (stats.n_tokens, stats.n_tokens_dense) == (2 * N_TOKENS * n_ffns, N_TOKENS * n_ffns), what
    return stats


def check_greedy(case: Case, logits: Logits, what: str) -> None:
    """Every token of the continuation is the one that these logits choose. Where types round, the choice may fall
    between tokens that are as good.
    """
    chosen, rows = logits.argmax(axis=1), np.arange(len(logits))
    if case.options.type == "F32":
        assert chosen[len(PROMPT) - 1 : -1].tolist() == case.continuation[len(PROMPT) :], f"{what}: other words"
    gap = case.continued.max(axis=1) - case.continued[rows, chosen]
    near = 4 * np.sqrt(case.tolerance * float((case.continued**2).mean()))
    assert gap.max() <= near, f"{what}: token {gap.argmax()} is {gap.max():.3g} below the model's choice"


def n_hot_of(case: Case, units: Sequence[NDArray[np.int32]]) -> int:
    """(neuron, token) pairs of TOKENS that are computed on devices with these units."""
    total = 0
    for ffn, ids in zip(case.model.ffns, units, strict=True):
        n = np.isin(case.experts(ffn), ids).sum() if ffn.is_stack else len(ids) * N_TOKENS
        total += int(n) * ffn.n_ff if ffn.is_stack else int(n)
    return total


def hot_units(case: Case) -> list[NDArray[np.int32]]:
    model = case.model
    folder = paths.artefact_dir(case.path, model.fingerprint, for_writing=False)
    placement = PlacementFile.read(folder / paths.PLACEMENT, model)
    devices = [placement.hot(device) for device in range(placement.n_devices)]
    return [np.concatenate(of_ffn) for of_ffn in zip(*devices, strict=True)]


# --- logits and counters ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", MODELS, ids=describe)
def test_logits_and_tokens_are_the_models_own(
    options: SparseModel, cases: Callable[[SparseModel], Case], tmp_path: Path
) -> None:
    """Without artefacts, with the cold shard alone, and with hot units on one and on two CPU devices."""
    original = cases(options)
    check_logits(original, placed(original, None), "without artefacts")
    for n_devices, share in [*((1, share) for share in SHARES), (2, 0.5), (2, 1.0)]:
        what = f"{share:.0%} on {n_devices} devices"
        case = copy_of(original, tmp_path / what)
        stats = check_logits(case, placed(case, share, n_devices), what)
        per_token = [(f.n_ff * case.model.n_expert_used if f.is_stack else f.n_ff) for f in case.model.ffns]
        assert stats.n_neurons == 2 * N_TOKENS * sum(per_token), what
        assert stats.n_candidates == stats.n_neurons - stats.n_hot, f"{what}: exact mode leaves none out"
        assert (stats.hot_bytes > 0) == (share > 0), what
        if share in (0.0, 1.0):
            assert stats.n_hot == share * stats.n_neurons, what
        if options.type == "F32" and (case.result or not case.model.has_experts):
            assert stats.n_hot == 2 * n_hot_of(case, hot_units(case)), what
        if options.type == "F32" and case.result and share == 0.0:
            fired = 2 * sum(int((case.neurons(f) != 0).sum()) for f in case.model.ffns)
            assert abs(stats.n_active - fired) <= 4, f"{what}: {stats.n_active} fired, {fired} by the reference"


def run_worker(folder: Path, rpc: str, models: list[dict[str, Any]]) -> tuple[Logits, list[dict[str, Any]]]:
    out = folder / "logits.npy"
    done = subprocess.run(
        [sys.executable, str(ROOT / "tests" / "support" / "device_worker.py"), str(out)],
        input=json.dumps({"rpc": rpc, "models": models}),
        capture_output=True,
        text=True,
        timeout=600,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return np.load(out), json.loads(done.stdout)


@pytest.mark.parametrize("device", ["RPC0", "CPU,RPC0", "RPC0,RPC1"])
def test_greedy_tokens_are_the_models_own_on_rpc_servers(
    device: str, cases: Callable[[SparseModel], Case], tmp_path: Path
) -> None:
    """All models and shares in one process, which cannot forget a server."""
    wanted: list[tuple[Case, str, float]] = []
    models: list[dict[str, Any]] = []
    for options in MODELS:
        for share in SHARES if options.type == "F32" else (0.5,):
            case = copy_of(cases(options), tmp_path / f"{describe(options)} {share}")
            config = placed(case, share, 1 + device.count(","))
            pieces = [(case.continuation, 1, 0), (TOKENS, 5, 0), (TOKENS, N_TOKENS, 0)]
            hot = [str(path) for path in config.hot_paths]
            wanted.append((case, f"{describe(options)}, {share:.0%} on {device}", share))
            models.append(
                {
                    "path": str(case.path),
                    "activation": config.activation,
                    "hot": hot,
                    "cold": str(config.cold),
                    "device": device,
                    "pieces": pieces,
                    "f32_attention": True,
                }
            )
    with ExitStack() as stack:
        servers = [stack.enter_context(RpcServer()).endpoint for _ in range(device.count("RPC"))]
        logits, stats = run_worker(tmp_path, ",".join(servers), models)
    for (case, what, share), counted in zip(wanted, stats, strict=True):
        n = len(case.continuation)
        continued, short, whole = logits[:n], logits[n : n + N_TOKENS], logits[n + N_TOKENS : n + 2 * N_TOKENS]
        logits = logits[n + 2 * N_TOKENS :]
        check_greedy(case, continued, what)
        for got in (short, whole):
            assert nmse(got, case.logits) <= case.tolerance, what
        assert counted["n_fallback"] == 0, what
        assert (counted["n_hot"] > 0) == (share > 0), what
        if share == 1.0:
            assert counted["n_hot"] == counted["n_neurons"], what
    assert not len(logits)


def test_hot_experts_alone_beside_cold_ones(cases: Callable[[SparseModel], Case], tmp_path: Path) -> None:
    """One expert on a device, and all but one: most tokens have none there, or only one elsewhere."""
    for n_hot in (1, 7):
        case = copy_of(cases(MIXTURES[0]), tmp_path / str(n_hot))
        model = case.model
        n_units = tuple(n_hot if f.is_stack else 0 for f in model.ffns)
        order = tuple(np.arange(f.n_units, dtype=np.int32)[::-1].copy() for f in model.ffns)
        folder = paths.artefact_dir(case.path, model.fingerprint, for_writing=True)
        PlacementFile("0" * 16, n_units, "CPU", 1 << 30, 0, 512, {}, order).write(folder / paths.PLACEMENT, model, {})
        shards = split(case.path, SplitOptions(verify=True))
        config = replace(PluginConfig.of(model), hot=shards.hot, cold=shards.cold, device="CPU")
        stats = check_logits(case, config, f"{n_hot} experts")
        assert stats.n_hot == 2 * n_hot_of(case, hot_units(case)) > 0


# --- predicted --------------------------------------------------------------------------------------------------------


def _name_at_random(case: Case, share: float) -> tuple[Path, dict[str, NDArray[np.bool_]]]:
    """A predictor that names each neuron always or never, by a draw; and what it names, by FFN."""
    rng = np.random.default_rng(7)
    model = case.model
    folder = paths.artefact_dir(case.path, model.fingerprint, for_writing=True)
    named = {}
    with PredictorWriter(folder / paths.PREDICTOR, model, "f16") as out:
        for ffn in model.ffns:
            chosen = rng.random(ffn.n_neurons) < share
            named[ffn.name] = chosen
            codes = rng.integers(0, 256, (ffn.n_neurons, ffn.n_embd // 8), dtype=np.uint8)
            t = np.where(chosen, -3e38, 3e38).astype(np.float32)
            out.add(LayerPredictor(ffn.n_embd, 1.0, share, None, codes, t, "one_bit"))
        out.finish({})
    return folder / paths.PREDICTOR, named


@pytest.mark.parametrize("options", [o for o in EXACT if not o.arch.startswith("rwkv")], ids=describe)
@pytest.mark.parametrize("share", [None, 0.0, 0.5])
def test_exactly_the_named_neurons_are_computed(
    options: SparseModel, share: float | None, cases: Callable[[SparseModel], Case], tmp_path: Path
) -> None:
    """The reference without the neurons that the predictor leaves out; hot ones are computed whatever it says."""
    case = copy_of(cases(options), tmp_path / "named")
    config = placed(case, share)
    predictor, named = _name_at_random(case, 0.6)
    hot = hot_units(case) if share else [np.empty(0, np.int32)] * len(case.model.ffns)
    reference = MixtureReference(case.path, activation=options.activation)
    n_candidates = 0
    for ffn, units in zip(case.model.ffns, hot, strict=True):
        computed = named[ffn.name].copy().reshape(ffn.n_units, ffn.unit)
        times = np.bincount(case.experts(ffn).ravel(), minlength=ffn.n_experts) if ffn.is_stack else N_TOKENS
        cold = computed.copy()
        cold[units] = False
        n_candidates += int((cold.sum(axis=1) * times).sum())
        computed[units] = True
        if ffn.is_stack and share is None:
            computed[:] = True  # without down rows a stack is computed whole
        name = ffn.down.name
        reference.replace(
            name, reference.tensor(name) * computed.reshape(*((ffn.n_experts, 1) if ffn.is_stack else ()), ffn.n_ff)
        )
    want = reference.forward(TOKENS)
    with Engine(
        case.path, plugin=replace(config, predictor=predictor), n_ctx=128, n_threads=2, f32_attention=True
    ) as engine:
        for n in (5, 1):
            engine.clear()
            got = np.concatenate([engine.decode(TOKENS[i : i + n], logits=True) for i in range(0, N_TOKENS, n)])
            assert nmse(got, want.logits) <= case.tolerance, f"batches of {n}"
        stats = load_plugin().stats(case.path)
    assert stats.n_fallback == 0
    same_routes = all(
        np.array_equal(a.experts, b.experts)
        for a, b in zip(want.routing, case.result.routing, strict=True)  # type: ignore[union-attr]
        if a is not None and b is not None
    )
    if share is not None and same_routes:
        assert stats.n_candidates == 2 * n_candidates


@pytest.fixture
def text(tmp_path: Path) -> Path:
    rng = np.random.default_rng(0)
    path = tmp_path / "text.txt"
    path.write_text(" ".join("".join(rng.choice(list("abcdefghijklmnop"), 4)) for _ in range(2500)))
    return path


@pytest.mark.parametrize("options", EXACT, ids=describe)
def test_the_pipeline_gives_a_predictor_that_keeps_the_words(
    options: SparseModel, cases: Callable[[SparseModel], Case], tmp_path: Path, text: Path
) -> None:
    case = copy_of(cases(options), tmp_path / "pipeline")
    profile(case.path, ProfileOptions(str(text), 4096, 128, n_threads=2, force=True))
    solve(case.path, SolveOptions(vram=0))
    split(case.path, SplitOptions(verify=True))
    trained = train(case.path, TrainOptions(recall=0.999))
    assert [(layer.layer, layer.ffn) for layer in trained.layers] == [(f.layer, f.kind) for f in case.model.ffns]
    assert {layer.kind for layer in trained.layers} - {"none"}, "no predictor pays"
    execution = decide(case.model, ExecutionOptions())
    assert execution.mode == "predicted"
    assert execution.plugin is not None
    logits, _, stats = decoded(case, execution.plugin)
    for n, got in logits.items():
        error = nmse(got, case.logits)
        assert error <= (case.tolerance if n == N_TOKENS else 0.02), f"batches of {n}: NMSE {error:.2g}"
    assert stats.n_fallback == 0
    assert stats.n_active <= stats.n_candidates < 0.7 * stats.n_neurons


# --- what is observed and reported ------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", EXACT, ids=describe)
def test_what_fires_and_where_tokens_go_is_what_the_reference_says(
    options: SparseModel, cases: Callable[[SparseModel], Case]
) -> None:
    case, stride, n_samples = cases(options), 3, 12
    plugin = load_plugin()
    with Engine(case.path, plugin=PluginConfig.of(case.model), n_ctx=128, n_threads=2, f32_attention=True) as engine:
        plugin.observer_start(case.path, n_samples=n_samples, stride=stride)
        engine.feed(TOKENS[:40])
        engine.feed(TOKENS[40:])
        plugin.observer_stop(case.path)
        seen = {ffn.name: plugin.observer_ffn(case.path, ffn.name) for ffn in case.model.ffns}
        if case.result is None:
            relus = graph_values(case.path, TOKENS, lambda _, operation: operation == "RELU")
            outputs = [np.square(values.reshape(N_TOKENS, -1)) for _, values in relus]
            inputs = None
        else:
            outputs = [case.neurons(ffn) for ffn in case.model.ffns]
            inputs = case.result.ffn_inputs
        for ffn, neurons in zip(case.model.ffns, outputs, strict=True):
            found = seen[ffn.name]
            assert found is not None, ffn.name
            fired = neurons != 0
            # A product of zero to rounding may fall on either side.
            assert np.abs(found.count.astype(np.int64) - fired.sum(axis=0)).sum() <= 2, ffn.title
            np.testing.assert_allclose(found.mass, np.abs(neurons).sum(axis=0), rtol=1e-4, atol=1e-4)
            kept = slice(0, stride * n_samples, stride)
            assert (found.n_tokens, len(found.x)) == (N_TOKENS, n_samples)
            if inputs is not None:
                np.testing.assert_allclose(found.x, inputs[ffn.layer][kept], rtol=2e-3, atol=2e-3)
            if ffn.is_stack:
                experts = case.experts(ffn)
                assert found.routed is not None
                assert found.experts is not None
                np.testing.assert_array_equal(found.routed, np.bincount(experts.ravel(), minlength=ffn.n_experts))
                np.testing.assert_array_equal(np.sort(found.experts), np.sort(experts[kept]))
            else:
                assert found.routed is None
                assert found.experts is None
                bits = np.unpackbits(found.active, axis=1, count=ffn.n_ff, bitorder="little")
                assert (bits != fired[kept]).sum() <= 2, ffn.title


def test_a_profile_reports_the_routing(cases: Callable[[SparseModel], Case], tmp_path: Path, text: Path) -> None:
    case = copy_of(cases(MIXTURES[0]), tmp_path / "profile")
    model, n_tokens = case.model, 2048
    report = profile(case.path, ProfileOptions(str(text), n_tokens, 128, n_threads=2, force=True))
    file = ProfileFile.read(report.path, model)
    assert [(layer.layer, layer.kind) for layer in report.layers] == [(f.layer, f.kind) for f in model.ffns]
    for i, (ffn, layer) in enumerate(zip(model.ffns, report.layers, strict=True)):
        routed = file.routed[i]
        assert (layer.routed is not None) == (routed is not None) == ffn.is_stack
        if layer.routed is None or routed is None:
            assert layer.active == pytest.approx(file.count[i].mean() / n_tokens)
            continue
        assert routed.sum() == n_tokens * model.n_expert_used
        assert layer.active == pytest.approx(file.count[i].sum() / (routed.sum() * ffn.n_ff))
        most = np.sort(routed)[::-1].cumsum()
        n_most = round(layer.routed.most * ffn.n_experts)
        assert most[n_most - 1] >= 0.8 * routed.sum() > (most[n_most - 2] if n_most > 1 else 0)
        assert layer.routed.busiest == pytest.approx(routed.max() / routed.mean())
        assert layer.routed.busiest > 1.2, "the router has favourites"
        assert (layer.routed.n_experts, layer.routed.never) == (ffn.n_experts, int((routed == 0).sum()))
    assert report.samples_path is not None
    samples = SamplesFile.read(report.samples_path, model)
    for ffn in model.ffns:
        if ffn.is_stack:
            experts = np.sort(samples.experts(ffn))
            assert (np.diff(experts) > 0).all(), "an expert twice for one token"


class _Noting:
    """A progress that keeps its notes."""

    def __init__(self) -> None:
        self.task = NULL_PROGRESS.task
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def test_experts_that_no_token_was_routed_to_are_counted_and_placed_last(tmp_path: Path, text: Path) -> None:
    path = write_sparse_model(tmp_path / "m.gguf", SparseModel("smallthinker", n_expert=32, n_expert_used=2))
    model, noting = open_model(path), _Noting()
    report = profile(path, ProfileOptions(str(text), 6, 128, n_threads=1), noting)
    file = ProfileFile.read(report.path, model)
    never = [np.flatnonzero(routed == 0) for routed in file.routed if routed is not None]
    n_never = sum(map(len, never))
    assert n_never > 3 * 16
    assert f"{n_never:,} experts were never routed to; they are placed last" in noting.notes[-1]
    assert "--tokens" in noting.notes[-1]
    assert [layer.routed.never for layer in report.layers if layer.routed] == [len(n) for n in never]
    solved = solve(path, SolveOptions(vram=0))
    order = PlacementFile.read(solved.placement, model).order
    for units, unseen in zip(order, never, strict=True):
        assert sorted(units[-len(unseen) :]) == unseen.tolist()


# --- as llama.cpp runs them -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("options", MIXTURES, ids=describe)
@pytest.mark.parametrize("share", [None, 0.0, 0.5, 1.0])
def test_a_warm_up_with_all_experts_changes_nothing(
    options: SparseModel, share: float | None, cases: Callable[[SparseModel], Case], tmp_path: Path
) -> None:
    """libllama routes every token of its warm-up to all experts, and adds those of a token only."""
    case = copy_of(cases(options), tmp_path / "warm")
    with BenchEngine(case.path, plugin=placed(case, share), n_ctx=128, n_threads=2, f32_attention=True) as engine:
        taken = load_plugin().stats(case.path).hot_bytes
        engine.warm_up([0, 1])
        stats = load_plugin().stats(case.path)
        assert (stats.hot_bytes, stats.n_fallback) == (taken, 0)
        engine.clear()
        got = engine.decode(TOKENS, logits=True)
        engine.clear()
        single = np.concatenate([engine.decode([token], logits=True) for token in TOKENS])
    assert nmse(got, case.logits) <= case.tolerance
    assert nmse(single, case.logits) <= case.tolerance


@pytest.mark.parametrize("options", [o for o in EXACT if o.activation is None], ids=describe)
def test_the_runner_says_what_stock_libllama_says(
    options: SparseModel, cases: Callable[[SparseModel], Case], tmp_path: Path
) -> None:
    """With its own warm-up, in batches and token by token."""
    case = copy_of(cases(options), tmp_path / "run")
    flags = ("-p", "One day, a", "-n", 12, "--temp", 0, "-t", 1)
    stock = run(case.path, *flags, dense=True)
    assert stock.code == 0, stock.err
    for share in (None, 0.5):
        placed(case, share)
        for warm_up in ((), ("--no-warmup",)):
            said = run(case.path, *flags, *warm_up)
            assert said.code == 0, said.err
            assert said.raw == stock.raw, f"{share} {warm_up}"
            assert "not part of an FFN" not in said.err


@pytest.mark.parametrize("options", EXACT, ids=describe)
def test_sequences_side_by_side_are_kept_apart(
    options: SparseModel, cases: Callable[[SparseModel], Case], tmp_path: Path
) -> None:
    """Tokens of one batch go to experts of their own, on the device and beside it."""
    case = copy_of(cases(options), tmp_path / "sequences")
    streams = [TOKENS[i : i + 6] for i in (0, 10, 20, 30)]
    config = placed(case, 0.5)
    alone = []
    with BenchEngine(case.path, plugin=config, n_threads=2, f32_attention=True) as engine:
        for stream in streams:
            engine.clear()
            alone.append(engine.decode(stream)[0])
        engine.open_context(16, len(streams), 64, 64)
        engine.time_decoding(streams)
        together = engine.logits(len(streams))
    assert nmse(alone[0], case.logits[5]) <= case.tolerance
    for one, other in zip(alone, together, strict=True):
        assert nmse(other, one) <= case.tolerance


# --- bad input --------------------------------------------------------------------------------------------------------


def _changed(case: Case, folder: Path, **changes: Any) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    return rewrite(case.path, folder / "m.gguf", **changes)


def test_experts_that_pinfer_does_not_compute_are_named(cases: Callable[[SparseModel], Case], tmp_path: Path) -> None:
    ungated, gated = cases(MIXTURES[0]), cases(MIXTURES[1])
    fused = np.zeros((8, 2 * 96, 128), np.float32)
    scales, biases = np.ones(8, np.float32), np.zeros((8, 96), np.float32)
    every_scale = {f"blk.{layer}.ffn_down_exps.scale": scales for layer in (1, 3, 4)}
    models = {
        ("experts with biases in layer 1", "1 of its 6"): _changed(
            ungated, tmp_path / "biases", add={"blk.1.ffn_up_exps.bias": biases}
        ),
        ("FFN matrices with scales of their own in layer 1", "3 of its 6"): _changed(
            ungated, tmp_path / "every", add=every_scale
        ),
        ("FFN matrices with scales of their own in layer 3", "1 of its 6"): _changed(
            ungated, tmp_path / "scales", add={"blk.3.ffn_down_exps.scale": scales}
        ),
        ("gate and up as one matrix in layer 2", f"1 of its {len(gated.model.ffns)}"): _changed(
            gated,
            tmp_path / "fused",
            add={"blk.2.ffn_gate_up_exps.weight": fused},
            drop=("blk.2.ffn_gate_exps.weight", "blk.2.ffn_up_exps.weight"),
        ),
    }
    for (why, n), path in models.items():
        model = open_model(path)
        assert (model.is_sparse, model.obstacle) == (False, f"{why}, which pinfer does not compute ({n} FFNs)")
        execution = decide(model, ExecutionOptions())
        assert execution.mode == "dense"
        assert execution.notes == (f"running dense: the model has {model.obstacle}",)
        for stage in (
            lambda p: profile(p, ProfileOptions("none.txt", 100)),
            lambda p: train(p, TrainOptions()),
            lambda p: solve(p, SolveOptions(vram=0)),
            lambda p: split(p, SplitOptions()),
        ):
            with pytest.raises(PinferError, match=why) as refused:
                stage(path)
            assert "pinfer run --dense" in (refused.value.hint or "")


def test_a_mixture_with_scales_runs_on_stock_libllama(cases: Callable[[SparseModel], Case], tmp_path: Path) -> None:
    """Scales of 2: the logits are those of stock libllama with them, in the runner and with the plugin loaded."""
    case = cases(MIXTURES[0])
    path = _changed(case, tmp_path, add={"blk.3.ffn_up_exps.scale": np.full(8, 2, np.float32)})
    with Engine(path, n_ctx=128, n_threads=1, f32_attention=True) as engine:
        want = engine.decode(TOKENS, logits=True)
    assert nmse(want, case.logits) > 1e-3, "the scales make no difference"
    flags = ("-p", "One day, a", "-n", 12, "--temp", 0, "-t", 1, "--no-warmup")
    said, stock = run(path, *flags), run(path, *flags, dense=True)
    assert (said.code, stock.code) == (0, 0), said.err
    assert said.raw == stock.raw
    with Engine(path, plugin=PluginConfig("relu2"), n_ctx=128, n_threads=1, f32_attention=True) as engine:
        got = engine.decode(TOKENS, logits=True)
        stats = load_plugin().stats(path)
        assert (stats.n_tokens_dense, stats.n_fallback) == (5 * N_TOKENS, 0), "all FFNs but that one are the plugin's"
    assert nmse(got, want) <= case.tolerance


def test_a_count_of_experts_that_the_tensors_contradict(cases: Callable[[SparseModel], Case], tmp_path: Path) -> None:
    path = _changed(cases(MIXTURES[0]), tmp_path, keys={"nemotron_h_moe.expert_count": 16})
    with pytest.raises(PinferError, match=r"holds 8 experts, but its header says 16") as refused:
        open_model(path)
    assert "convert the model again" in (refused.value.hint or "")


def test_expert_matrices_of_different_shapes(cases: Callable[[SparseModel], Case], tmp_path: Path) -> None:
    name = "blk.1.ffn_down_exps.weight"
    odd = np.zeros((8, 128, 64), np.float32)
    path = _changed(cases(MIXTURES[0]), tmp_path, add={name: odd}, drop=(name,))
    with pytest.raises(PinferError, match=r"the expert matrices of layer 1 do not have the same shape"):
        open_model(path)


def test_layers_have_ffns_of_their_own_width_or_none(cases: Callable[[SparseModel], Case]) -> None:
    """feed_forward_length is an array; layers without an FFN have 0 in it."""
    model = cases(MIXTURES[0]).model
    assert isinstance(model.gguf.get("nemotron_h_moe.feed_forward_length"), list)
    assert (model.n_layer, model.n_ff, model.n_expert_used) == (5, 160, 3)
    stack, shared = ("experts", 96, 8), ("shared", 160, 1)
    found = {f.name: (f.kind, f.n_ff, f.n_experts) for f in model.ffns}
    assert found == {f"blk.{i}{end}": f for i in (1, 3, 4) for end, f in ((".shexp", shared), (".exps", stack))}
    dense = cases(next(o for o in EXACT if o.arch == "nemotron_h")).model
    assert [(f.name, f.n_ff) for f in dense.ffns] == [(f"blk.{i}", 256) for i in (1, 3, 4)]


def test_layers_that_draft_tokens_are_left_out(cases: Callable[[SparseModel], Case], tmp_path: Path) -> None:
    """libllama does not run the last nextn_predict_layers of block_count; neither Python nor the plugin counts them."""
    case = cases(MIXTURES[0])
    stack = {"blk.5.ffn_up_exps.weight": (8, 96, 128), "blk.5.ffn_down_exps.weight": (8, 128, 96)}
    tensors = {name: np.zeros(shape, np.float32) for name, shape in stack.items()}
    numbers = {"nemotron_h_moe.block_count": 6, "nemotron_h_moe.nextn_predict_layers": 1}
    path = _changed(case, tmp_path, keys=numbers, add=tensors)
    model = open_model(path)
    assert (model.n_layer, model.is_sparse) == (5, True)
    assert [f.name for f in model.ffns] == [f.name for f in case.model.ffns]
    shards = write_shards(path, 0.0)
    load_plugin().configure(path, cold=shards.cold, activation="relu2")
    load_plugin().release(path)
