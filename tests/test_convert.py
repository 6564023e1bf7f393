"""`pinfer convert` itself: types, names, streaming, and checkpoints that are damaged, incomplete or hostile.

That what it writes says the words of the original is shown in test_families.py.
"""

from __future__ import annotations

import json
import os
import pickle
import shlex
import shutil
import signal
import struct
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from safetensors.numpy import load_file, save_file
from support.command_line import ROOT, CommandLine, Outcome
from support.powerinfer_writer import read_weights, write_powerinfer
from test_powerinfer_predictor import exact

from pinfer.conversion.checkpoint import open_checkpoint
from pinfer.convert import ConvertOptions, convert
from pinfer.errors import PinferError
from pinfer.interrupt import interruptible
from pinfer.llama import ggml
from pinfer.llama.engine import Engine, PluginConfig
from pinfer.model import Model, dequantize, open_model
from pinfer.progress import NULL_PROGRESS

CHECKPOINTS = ROOT / "tests" / "checkpoints"
ONE_FILE, SHARDED, PICKLED = "llama-gqa-tied", "llama-mha", "opt-bin"


@pytest.fixture
def command(tmp_path: Path) -> CommandLine:
    return CommandLine(tmp_path / "work", tmp_path / "home")


def copy(case: str, folder: Path) -> Path:
    return Path(shutil.copytree(CHECKPOINTS / case, folder / case))


def change_config(folder: Path, **changes: object) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def change_tensors(folder: Path, change: Callable[[dict[str, NDArray[np.float32]]], None]) -> None:
    """Rewrites the one safetensors file of a checkpoint in F32."""
    path = folder / "model.safetensors"
    tensors = {name: values.astype(np.float32) for name, values in load_file(path).items()}
    change(tensors)
    save_file(tensors, path)


def refused(outcome: Outcome, folder: Path, *words: str) -> None:
    """One line that says each of ``words``, exit code 1, and no file left."""
    assert outcome.code == 1, outcome.err
    assert outcome.out == ""
    lines = [line for line in outcome.err_lines if line.startswith("pinfer: ")]
    assert len(lines) == 1, outcome.err
    assert "Traceback" not in outcome.err
    for word in words:
        assert word in lines[0]
    assert not list(folder.glob("*.gguf"))
    assert not list(folder.glob(".*.tmp"))


def error_of(folder: Path) -> PinferError:
    """The error of converting ``folder``: one line with a fix, and no file left. `refused` checks the command."""
    with pytest.raises(PinferError) as caught:
        convert(folder, ConvertOptions(out=folder.parent / "out.gguf"), NULL_PROGRESS)
    assert caught.value.hint
    assert "\n" not in str(caught.value)
    assert not list(folder.parent.glob("*.gguf"))
    assert not list(folder.parent.glob(".*.tmp"))
    return caught.value


# --- what is written ----------------------------------------------------------------------------------------------


def tensors_of(model: Model) -> dict[str, NDArray[np.float32]]:
    return {tensor.name: dequantize(model, tensor) for tensor in model.tensors}


@pytest.mark.parametrize("type_", ["f32", "f16", "bf16", "q8_0", "q4_0", "q4_k_m"])
def test_types(type_: str, command: CommandLine) -> None:
    """libllama opens every type, and each matrix equals the F32 one quantised by ggml."""
    outcome = command("convert", CHECKPOINTS / "arcee", "--type", type_, "--json")
    assert outcome.code == 0, outcome.err
    report = json.loads(outcome.out)
    assert report["model"] == f"arcee-{type_.upper()}.gguf"
    model = open_model(command.folder / report["model"])
    assert (model.arch, report["activation"], report["type"]) == ("arcee", "relu2", type_)
    exact = convert(CHECKPOINTS / "arcee", ConvertOptions(out=command.folder / "x.gguf", type="f32"), NULL_PROGRESS)
    for name, want in tensors_of(open_model(exact.path)).items():
        tensor = model.gguf.tensors[name]
        got = dequantize(model, tensor)
        if tensor.n_rows == 1:
            assert tensor.type_name == "F32"
        raw = ggml.quantise(want, tensor.type, tensor.row_bytes)
        assert np.array_equal(got, ggml.dequantise(raw, tensor.type, tensor.row_length)), name
    with Engine(model.path, n_ctx=32) as engine:
        assert len(engine.generate([1, 2, 3], 4)) > 0


def test_pickled_and_safetensors_are_the_same(tmp_path: Path) -> None:
    """The same weights in PyTorch's format and in safetensors, sharded and whole, give the same file."""
    pickled = open_checkpoint(CHECKPOINTS / PICKLED)
    assert any(tensor.file.suffix == ".bin" for tensor in pickled.tensors.values())
    whole = copy(PICKLED, tmp_path)
    for path in whole.glob("*.bin*"):
        path.unlink()
    save_file(
        {name: np.ascontiguousarray(t.load()) for name, t in pickled.tensors.items()}, whole / "model.safetensors"
    )
    first = convert(CHECKPOINTS / PICKLED, ConvertOptions(out=tmp_path / "1.gguf", name="same"), NULL_PROGRESS).path
    second = convert(whole, ConvertOptions(out=tmp_path / "2.gguf", name="same"), NULL_PROGRESS).path
    assert first.read_bytes() == second.read_bytes()


def test_activation_can_be_named(tmp_path: Path) -> None:
    """config.json does not tell ReLU on gate and up from ReLU on the gate only."""
    report = convert(CHECKPOINTS / SHARDED, ConvertOptions(out=tmp_path / "d.gguf", activation="drelu"), NULL_PROGRESS)
    assert report.activation == "drelu"
    assert open_model(report.path).activation == "drelu"


def test_silu_is_converted_with_a_note(command: CommandLine, tmp_path: Path) -> None:
    folder = copy(ONE_FILE, tmp_path)
    change_config(folder, hidden_act="silu")
    outcome = command("convert", folder, "-o", "silu.gguf")
    assert outcome.code == 0, outcome.err
    assert "no exact zeros" in outcome.err
    assert not open_model(command.folder / "silu.gguf").is_sparse


def test_existing_file_is_kept_unless_forced(command: CommandLine) -> None:
    (command.folder / "out.gguf").write_text("precious")
    outcome = command("convert", CHECKPOINTS / ONE_FILE, "-o", "out.gguf")
    assert outcome.code == 1
    assert "--force" in outcome.err
    assert (command.folder / "out.gguf").read_text() == "precious"
    assert command("convert", CHECKPOINTS / ONE_FILE, "-o", "out.gguf", "--force").code == 0
    open_model(command.folder / "out.gguf")


@pytest.mark.parametrize("rope", ["llama3", "linear", "yarn"])
def test_scaled_positions_reach_libllama(rope: str, tmp_path: Path) -> None:
    """libllama reads the keys of the scaling, and it changes the logits at far positions."""
    folder = copy(SHARDED, tmp_path)
    prompt = [1] + [5 + i % 50 for i in range(60)]

    def logits(out: str) -> NDArray[np.float32]:
        path = convert(folder, ConvertOptions(out=tmp_path / out, type="f32"), NULL_PROGRESS).path
        with Engine(path, plugin=PluginConfig.of(open_model(path)), n_ctx=64) as engine:
            return engine.decode(prompt)

    plain = logits("plain.gguf")
    change_config(folder, rope_scaling={"rope_type": rope, "factor": 8.0, "original_max_position_embeddings": 16})
    assert not np.allclose(logits("scaled.gguf"), plain, rtol=1e-3)


def test_memory_is_that_of_the_largest_tensor(command: CommandLine, tmp_path: Path) -> None:
    """Converting 24 layers takes the memory of one matrix, not of the model."""
    n_layer, n_embd, n_ff, n_vocab = 24, 512, 4096, 331
    folder = copy(ONE_FILE, tmp_path)
    rng = np.random.default_rng(0)
    matrix = rng.normal(0, 0.02, (n_ff, n_embd)).astype(np.float16)
    tensors: dict[str, NDArray[np.float16]] = {
        "model.embed_tokens.weight": matrix[:n_vocab],
        "model.norm.weight": np.ones(n_embd, np.float16),
    }
    for i in range(n_layer):
        name = f"model.layers.{i}."
        tensors |= {
            name + f"{norm}_layernorm.weight": np.ones(n_embd, np.float16) for norm in ("input", "post_attention")
        }
        tensors |= {name + f"self_attn.{p}_proj.weight": matrix[:n_embd] for p in "qkvo"}
        tensors |= {name + f"mlp.{p}_proj.weight": matrix for p in ("gate", "up")}
        tensors |= {name + "mlp.down_proj.weight": np.ascontiguousarray(matrix.T)}
    save_file(tensors, folder / "model.safetensors")
    total = (folder / "model.safetensors").stat().st_size
    change_config(
        folder,
        num_hidden_layers=n_layer,
        hidden_size=n_embd,
        intermediate_size=n_ff,
        num_attention_heads=8,
        num_key_value_heads=8,
        head_dim=64,
    )
    script = (
        "import resource, sys; from pathlib import Path; from pinfer.convert import *; "
        "from pinfer.progress import NULL_PROGRESS as P; "
        "convert(Path(sys.argv[1]), ConvertOptions(out=Path('small.gguf')), P); "
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss; "
        "convert(Path(sys.argv[2]), ConvertOptions(out=Path('large.gguf')), P); "
        "print(1024 * (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before))"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, CHECKPOINTS / ONE_FILE, folder],
        cwd=command.folder,
        env=command.environment(),
        capture_output=True,
        text=True,
        check=True,
    )
    assert total > 20 * matrix.nbytes
    # mapped pages of the checkpoint's file and of libllama count as well, so this is not the tensor's size alone
    assert int(done.stdout) < total / 3


# --- what is refused ----------------------------------------------------------------------------------------------


def test_missing_shard(command: CommandLine, tmp_path: Path) -> None:
    folder = copy(SHARDED, tmp_path)
    next(folder.glob("model-00002-of-*")).unlink()
    refused(command("convert", folder), command.folder, "lacks 1 of 3 shards", "model-00002-of")


def test_index_that_names_wrong_files(command: CommandLine, tmp_path: Path) -> None:
    folder = copy(SHARDED, tmp_path)
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["model.layers.9.mlp.up_proj.weight"] = next(iter(content["weight_map"].values()))
    index.write_text(json.dumps(content))
    refused(command("convert", folder), command.folder, "does not hold model.layers.9")
    content["weight_map"]["model.norm.weight"] = "../../../etc/passwd"
    index.write_text(json.dumps(content))
    refused(command("convert", folder), command.folder, "lacks 1 of 4 shards")


def test_missing_index(command: CommandLine, tmp_path: Path) -> None:
    folder = copy(SHARDED, tmp_path)
    (folder / "model.safetensors.index.json").unlink()
    refused(command("convert", folder), command.folder, "no model.safetensors.index.json")


@pytest.mark.parametrize("keep", [0, 4, 100, 50_000])
def test_truncated_safetensors(keep: int, command: CommandLine, tmp_path: Path) -> None:
    folder = copy(ONE_FILE, tmp_path)
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:keep])
    refused(command("convert", folder), command.folder, "model.safetensors is damaged")


@pytest.mark.parametrize("keep", [0, 10, 300, 20_000])
def test_truncated_pickle(keep: int, command: CommandLine, tmp_path: Path) -> None:
    folder = copy(PICKLED, tmp_path)
    path = sorted(folder.glob("*.bin"))[0]
    path.write_bytes(path.read_bytes()[:keep])
    refused(command("convert", folder), command.folder, path.name)


class _Harm:
    """Its pickle calls os.system."""

    def __init__(self, proof: Path) -> None:
        self.proof = proof

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.system, (f"touch {self.proof}",)


def replace_pickle(path: Path, state: object) -> None:
    """Replaces the pickle in an archive written by PyTorch."""
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    index = next(name for name in members if name.endswith("data.pkl"))
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in {**members, index: pickle.dumps(state, protocol=2)}.items():
            archive.writestr(name, data)


def test_pickle_that_wants_to_run_code(command: CommandLine, tmp_path: Path) -> None:
    folder = copy(PICKLED, tmp_path)
    proof = tmp_path / "harmed"
    path = sorted(folder.glob("*.bin"))[0]
    replace_pickle(path, {"model.decoder.embed_tokens.weight": _Harm(proof)})
    refused(command("convert", folder), command.folder, "wants to run", "system", "nothing of it was run")
    assert not proof.exists()


def test_pickle_that_builds_objects(command: CommandLine, tmp_path: Path) -> None:
    """Only the few names of a state dict are allowed, no class of numpy's or Python's."""
    folder = copy(PICKLED, tmp_path)
    path = sorted(folder.glob("*.bin"))[0]
    for state in ({"x": Path("y")}, {"x": np.zeros(3)}, [1, 2], {"x": subprocess.Popen}):
        replace_pickle(path, state)
        refused(command("convert", folder), command.folder, path.name)


def test_tensors_that_are_not_floats(command: CommandLine, tmp_path: Path) -> None:
    folder = copy(ONE_FILE, tmp_path)
    tensors = load_file(folder / "model.safetensors")
    name = "model.layers.0.mlp.up_proj.weight"
    save_file(tensors | {name: np.ones(tensors[name].shape, np.int8)}, folder / "model.safetensors")
    refused(command("convert", folder), command.folder, "model.layers.0.mlp.up_proj.weight", "I8")


def test_quantised_checkpoint(command: CommandLine, tmp_path: Path) -> None:
    folder = copy(ONE_FILE, tmp_path)
    change_config(folder, quantization_config={"quant_method": "gptq", "bits": 4})
    refused(command("convert", folder), command.folder, "already quantised (gptq)")


def test_unknown_model_type(command: CommandLine, tmp_path: Path) -> None:
    folder = copy(ONE_FILE, tmp_path)
    change_config(folder, model_type="bert")
    refused(command("convert", folder), command.folder, "'bert'", "llama", "opt")


@pytest.mark.parametrize(
    ("changes", "word"),
    [
        ({"hidden_act": "tanh"}, "'tanh'"),
        ({"hidden_act": "fatrelu"}, "hidden_act_param"),
        ({"num_hidden_layers": 5}, "blk.2"),
        ({"num_hidden_layers": "many"}, "num_hidden_layers"),
        ({"intermediate_size": 96}, "ffn_gate"),
        ({"hidden_size": 80}, "token_embd"),
        ({"rope_parameters": {"rope_type": "spiral", "factor": 2}}, "spiral"),
        ({"hidden_size": None}, "hidden_size"),
        ({"num_hidden_layers": 3_000_000}, "3000000 layers"),
        ({"num_hidden_layers": 1 << 31}, "num_hidden_layers"),
        ({"num_hidden_layers": -1}, "num_hidden_layers"),
        ({"num_attention_heads": 4, "num_key_value_heads": 3}, "3 key-value heads"),
        ({"rms_norm_eps": -1}, "rms_norm_eps"),
        ({"rms_norm_eps": 1e300}, "rms_norm_eps"),
        ({"rms_norm_eps": "1e-6"}, "rms_norm_eps"),
        ({"hidden_act": "fatrelu", "hidden_act_param": -0.01}, "hidden_act_param"),
        ({"partial_rotary_factor": 0}, "partial_rotary_factor"),
        ({"partial_rotary_factor": -0.5}, "partial_rotary_factor"),
        ({"partial_rotary_factor": 1.5}, "rotates 1.5"),
        ({"partial_rotary_factor": 0.5}, "libllama's graph rotates all"),
        ({"head_dim": 15}, "rotates"),
        ({"rope_parameters": {"rope_theta": 0}}, "rope_theta"),
        ({"rope_parameters": {"rope_type": "linear"}}, "factor"),
        ({"rope_parameters": {"rope_type": "linear", "factor": [2]}}, "factor"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 0}}, "factor"),
        ({"rope_parameters": {"rope_type": "longrope", "long_factor": "x"}}, "long_factor"),
        ({"rope_parameters": {"rope_type": "llama3", "low_freq_factor": 4, "high_freq_factor": 4}}, "low_freq_factor"),
        ({"rope_parameters": [1, 2]}, "rope_scaling"),
        ({"model_type": ["llama"], "architectures": {"a": 1}}, "model_type"),
        ({"vocab_size": 1e6}, "vocab_size"),
    ],
)
def test_config_that_is_invalid_or_contradicts_the_weights(
    changes: dict[str, object], word: str, tmp_path: Path
) -> None:
    folder = copy(ONE_FILE, tmp_path)
    change_config(folder, **changes)
    assert word in error_of(folder).message


@pytest.mark.parametrize(
    ("case", "changes", "words"),
    [
        ("nemotron", {"partial_rotary_factor": 0}, ("partial_rotary_factor",)),
        ("nemotron", {"partial_rotary_factor": 0.001}, ("rotates 0.001",)),
        ("nemotron", {"head_dim": 32}, ("libllama's nemotron can only compute",)),
        ("nemotron", {"norm_eps": -1e-5}, ("norm_eps",)),
        ("jais2", {"partial_rotary_factor": 0.4}, ("libllama's graph rotates all",)),
        ("plm", {"qk_rope_head_dim": 3}, ("rotates",)),
        ("falcon-7b", {"layer_norm_epsilon": -1}, ("layer_norm_epsilon",)),
        ("falcon-7b", {"alibi": "no"}, ("alibi",)),
        ("falcon-7b", {"rope_scaling": {"rope_type": "llama3"}}, ("'llama3'", "does not support")),
        ("minicpm-s", {"dim_model_base": 0}, ("dim_model_base",)),
        ("opt", {"num_hidden_layers": 3_000_000}, ("3000000 layers",)),
    ],
)
def test_settings_that_libllama_cannot_compute(
    case: str, changes: dict[str, object], words: tuple[str, ...], tmp_path: Path
) -> None:
    folder = copy(case, tmp_path)
    change_config(folder, **changes)
    error = error_of(folder)
    assert all(word in error.message for word in words), error


def test_more_layers_than_libllama_computes(tmp_path: Path) -> None:
    """libllama would end the process above 512."""
    folder = copy(ONE_FILE, tmp_path)

    def add(tensors: dict[str, NDArray[np.float32]]) -> None:
        layer = {name: values for name, values in tensors.items() if ".layers.0." in name}
        for i in range(2, 513):
            tensors |= {name.replace(".0.", f".{i}."): values[:1] for name, values in layer.items()}

    change_tensors(folder, add)
    change_config(folder, num_hidden_layers=513)
    assert "at most 512" in error_of(folder).message


@pytest.mark.parametrize(
    "name",
    [
        "config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "special_tokens_map.json",
        "generation_config.json",
        "added_tokens.json",
    ],
)
@pytest.mark.parametrize("content", ["[]", "3", "null", "[" * 100_000, '{"a": ' + "9" * 5000 + "}", "\x00"])
def test_json_that_is_not_an_object(name: str, content: str, tmp_path: Path) -> None:
    folder = copy(ONE_FILE, tmp_path)
    if name == "tokenizer.json":
        (folder / "tokenizer.model").unlink(missing_ok=True)
    (folder / name).write_text(content)
    assert name in error_of(folder).message


def test_the_size_is_said_before_writing(command: CommandLine, tmp_path: Path) -> None:
    folder = copy(ONE_FILE, tmp_path)
    plain = command("convert", folder, "--json")
    size = json.loads(plain.out)["n_bytes"]
    said = next(line for line in plain.err_lines if line.startswith("writing "))
    assert float(said.split()[-2]) == pytest.approx(size / 1e6, rel=0.2)
    quantised = command("convert", folder, "--type", "q8_0", "--json")
    assert "for a temporary file" in next(line for line in quantised.err_lines if line.startswith("writing "))


def test_a_sliding_window_is_said(tmp_path: Path) -> None:
    folder = copy(ONE_FILE, tmp_path)
    change_config(folder, sliding_window=16)
    report = convert(folder, ConvertOptions(out=tmp_path / "out.gguf"), NULL_PROGRESS)
    assert any("last 16 tokens" in note and "-c" in note for note in report.notes)
    assert open_model(report.path).n_ctx_train == 16


def test_config_that_is_not_json(command: CommandLine, tmp_path: Path) -> None:
    folder = copy(ONE_FILE, tmp_path)
    (folder / "config.json").write_text("{")
    refused(command("convert", folder), command.folder, "config.json is damaged")
    (folder / "config.json").write_text("[]")
    refused(command("convert", folder), command.folder, "config.json")


def test_tensor_too_few_or_too_many(command: CommandLine, tmp_path: Path) -> None:
    folder = copy(ONE_FILE, tmp_path)
    change_tensors(folder, lambda tensors: tensors.__delitem__("model.layers.1.mlp.up_proj.weight"))
    refused(command("convert", folder), command.folder, "blk.1.ffn_up.weight")
    shutil.rmtree(folder)
    folder = copy(ONE_FILE, tmp_path)
    change_tensors(folder, lambda tensors: tensors.update({"model.layers.0.mystery": np.ones(4, np.float32)}))
    refused(command("convert", folder), command.folder, "model.layers.0.mystery")


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_values_that_are_not_numbers(value: float, command: CommandLine, tmp_path: Path) -> None:
    folder = copy(ONE_FILE, tmp_path)
    change_tensors(folder, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].__setitem__((3, 3), value))
    refused(command("convert", folder), command.folder, "blk.1.ffn_up.weight", "NaN or infinity")


def test_values_that_f16_cannot_hold(command: CommandLine, tmp_path: Path) -> None:
    folder = copy(ONE_FILE, tmp_path)
    change_tensors(folder, lambda tensors: tensors["model.layers.1.mlp.up_proj.weight"].__setitem__((3, 3), 1e6))
    refused(command("convert", folder), command.folder, "blk.1.ffn_up.weight", "--type bf16")
    assert command("convert", folder, "--type", "bf16").code == 0


def test_sources_that_cannot_be_converted(command: CommandLine, tmp_path: Path) -> None:
    refused(command("convert", tmp_path / "nowhere"), command.folder, "does not exist", "-hf")
    refused(command("convert", command.folder), command.folder, "config.json")
    refused(command("convert", ROOT / "models" / "tiny-relu2.gguf"), command.folder, "pinfer show")
    assert command("convert").code == 2


def test_pointer_of_git_lfs(command: CommandLine, tmp_path: Path) -> None:
    folder = copy(PICKLED, tmp_path)
    sorted(folder.glob("*.bin"))[0].write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    refused(command("convert", folder), command.folder, "git lfs pull")


def test_full_disk_leaves_nothing(command: CommandLine) -> None:
    import resource

    def limit() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)

    outcome = command("convert", CHECKPOINTS / ONE_FILE, "-o", "out.gguf", preexec_fn=limit)
    refused(outcome, command.folder, "no space left", "-o FILE")


def test_interrupt_leaves_nothing(command: CommandLine, tmp_path: Path) -> None:
    """Ctrl-C also ends the quantiser."""
    folder = copy(ONE_FILE, tmp_path)
    marker = tmp_path / "quantising"
    wrapper = (
        "import sys, time; from pathlib import Path; import pinfer.llama.quantise as q; "
        f"q._POLL = 0.01; q.subprocess.Popen = (lambda P: lambda c, **k: (Path({str(marker)!r}).touch(), "
        "P([sys.executable, '-c', 'import time; time.sleep(60)'], **k))[1])(q.subprocess.Popen); "
        "from pinfer.cli.app import main; sys.argv[0] = 'pinfer'; sys.exit(main())"
    )
    child = subprocess.Popen(
        [sys.executable, "-c", wrapper, "convert", str(folder), "--type", "q4_0"],
        cwd=command.folder,
        env=command.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = time.monotonic() + 60
    while not marker.exists() and time.monotonic() < deadline and child.poll() is None:
        time.sleep(0.05)
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=30)
    assert child.returncode == 130, err
    assert "Traceback" not in err
    assert not list(command.folder.glob("*.gguf"))
    assert not list(command.folder.glob(".*.tmp"))


def test_torch_storage_beyond_the_file(command: CommandLine, tmp_path: Path) -> None:
    """A tensor that is larger than its storage is refused before anything is read."""
    folder = copy(PICKLED, tmp_path)
    path = sorted(folder.glob("*.bin"))[0]
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    storage = max((name for name in members if "/data/" in name), key=lambda name: len(members[name]))
    members[storage] = members[storage][: len(members[storage]) // 2]
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    refused(command("convert", folder), command.folder, "does not lie in it whole")


def test_safetensors_header_that_is_huge(command: CommandLine, tmp_path: Path) -> None:
    folder = copy(ONE_FILE, tmp_path)
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", 1 << 60) + b"{}")
    refused(command("convert", folder), command.folder, "model.safetensors is damaged")


def test_python_api_raises_the_same(tmp_path: Path) -> None:
    with pytest.raises(PinferError, match="does not exist"):
        convert(tmp_path / "none", ConvertOptions(), NULL_PROGRESS)


# --- PowerInfer files ---------------------------------------------------------------------------------------------


def test_powerinfer_file_brings_its_predictor(command: CommandLine) -> None:
    """Converted, its predictor measured, and run with it."""
    weights = read_weights(ROOT / "models" / "tiny-reglu.gguf")
    write_powerinfer(command.folder / "tiny.powerinfer.gguf", weights.with_predictors(exact(weights)), "F16")
    text = ROOT / "tests" / "data" / "heldout.txt"
    outcome = command("convert", "tiny.powerinfer.gguf", "--dataset", text, "--json")
    assert outcome.code == 0, outcome.err
    assert "Duplicated" not in outcome.err
    report = json.loads(outcome.out)
    assert (report["model"], report["activation"]) == ("tiny-F16.gguf", "reglu")
    assert 0.9 < report["predictor"]["recall"] <= 1
    ran = command("run", "tiny-F16.gguf", "-p", "Once upon", "-n", "8", "--temp", "0", "--json")
    assert ran.code == 0, ran.err
    assert json.loads(ran.out)["mode"] == "predicted"
    assert "next: pinfer solve tiny-F16.gguf" in outcome.err_lines
    predictor, notes = report["predictor"], "\n".join(report["notes"])
    n, n_imported = len(predictor["layers"]), predictor["n_imported"]
    assert f"predictors of {n_imported} of {n} layers were imported" in notes
    assert n_imported == n or f"{n - n_imported} were replaced with new ones" in notes
    assert f"recall was measured on {predictor['n_test']} tokens of heldout.txt" in notes
    assert 0 < predictor["n_test"] < predictor["n_samples"]
    assert command("solve", "tiny-F16.gguf", "--vram", "4M").code == 0, "the command it named is all that was missing"


def powerinfer(folder: Path) -> Path:
    weights = read_weights(ROOT / "models" / "tiny-reglu.gguf")
    path = folder / "tiny.powerinfer.gguf"
    write_powerinfer(path, weights.with_predictors(exact(weights)), "F16")
    return path


@pytest.mark.parametrize(
    ("dataset", "content", "words"),
    [
        ("nowhere.txt", None, ("unknown data set 'nowhere.txt'", "c4, wikitext")),
        ("text.txt", b"\xff\xfe", ("not UTF-8",)),
        ("text.txt", b" \n", ("has no text",)),
    ],
)
def test_a_text_that_cannot_be_read_is_noticed_first(
    dataset: str, content: bytes | None, words: tuple[str, ...], command: CommandLine
) -> None:
    source = powerinfer(command.folder)
    if content is not None:
        (command.folder / dataset).write_bytes(content)
    outcome = command("convert", source.name, "-o", "out.gguf", "--dataset", dataset)
    source.unlink()
    refused(outcome, command.folder, *words)
    assert "writing" not in outcome.err


def test_without_the_hub_the_model_alone_is_made_and_that_is_said_first(command: CommandLine) -> None:
    source = powerinfer(command.folder)
    env = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(command.folder / "hf")}
    outcome = command("convert", source.name, "-o", "again.gguf", "--dataset", "wikitext", env=env)
    assert outcome.code == 0, outcome.err
    said = outcome.err
    assert said.index("converted without its predictor") < said.index("writing again.gguf") < said.index("left out")
    assert "next: pinfer profile again.gguf" in outcome.err_lines
    assert open_model(command.folder / "again.gguf").is_sparse
    # the command that it names, with a text that is here
    (again,) = [line.partition("to import it: pinfer ")[2] for line in outcome.err_lines if "to import it: " in line]
    outcome = command(*shlex.split(again), "--dataset", ROOT / "tests" / "data" / "heldout.txt")
    assert outcome.code == 0, outcome.err
    assert (command.folder / "again.gguf.pinfer" / "predictor.gguf").exists()


def test_the_predictor_alone(command: CommandLine) -> None:
    source, text = powerinfer(command.folder), ROOT / "tests" / "data" / "heldout.txt"
    assert command("convert", source.name, "--dataset", text).code == 0
    model, predictor = command.folder / "tiny-F16.gguf", command.folder / "tiny-F16.gguf.pinfer" / "predictor.gguf"
    before, whole = model.stat(), predictor.read_bytes()
    predictor.unlink()
    outcome = command("convert", source.name, "--predictor-only", "--json")
    assert outcome.code == 0, outcome.err
    report = json.loads(outcome.out)
    assert report["corpus"] == str(text), "the samples are those of the conversion"
    assert predictor.read_bytes() == whole
    assert model.stat().st_mtime_ns == before.st_mtime_ns
    outcome = command("convert", source.name, "--predictor-only", "--dataset", ROOT / "tests" / "data" / "profile.txt")
    assert outcome.code == 0, outcome.err
    assert "measured on profile.txt" in outcome.out
    assert "too few to rely on" not in outcome.err, "of a long text enough is read"
    assert "next:" not in outcome.err


def test_a_predictor_that_cannot_be_had_alone_is_one_line(command: CommandLine) -> None:
    source = powerinfer(command.folder)
    plain = write_powerinfer(command.folder / "plain.gguf", read_weights(ROOT / "models" / "tiny-reglu.gguf"), "F16")
    shutil.copy(ROOT / "models" / "tiny-relu2.gguf", command.folder / "other.gguf")
    shutil.copytree(next(path for path in CHECKPOINTS.iterdir() if path.is_dir()), command.folder / "checkpoint")
    for words, code, says in (
        ((source.name,), 1, "tiny-F16.gguf does not exist"),
        ((source.name, "-o", "other.gguf"), 1, "other.gguf was not made from tiny.powerinfer.gguf"),
        ((source.name, "-o", "text.txt"), 1, "text.txt"),
        ((plain.name,), 1, "plain.gguf has no predictor"),
        (("checkpoint",), 1, "checkpoint has no predictor"),
        (("nowhere",), 1, "nowhere does not exist"),
        ((source.name, "--force"), 2, "--force"),
    ):
        (command.folder / "text.txt").write_text("no model")
        outcome = command("convert", *words, "--predictor-only")
        assert (outcome.code, outcome.out) == (code, ""), outcome.err
        assert says in outcome.err.splitlines()[-1]
        assert len(outcome.err_lines) == 1, outcome.err
    assert not list(command.folder.glob("**/predictor.gguf"))


@pytest.mark.parametrize(
    ("patch", "marker"),
    [
        ("p.ImportOptions.__init__.__defaults__ = (None, 10**7, 0.995, None, False); ", "converting: "),
        ("p.cheapest = lambda *_, **__: (print('fitting', file=sys.stderr, flush=True), time.sleep(60)); ", "fitting"),
    ],
    ids=["profile", "fit"],
)
def test_ctrl_c_while_the_predictor_is_imported(patch: str, marker: str, command: CommandLine) -> None:
    """It ends the whole command, not only the counting; the model is complete and stays."""
    source = powerinfer(command.folder)
    text = command.folder / "text.txt"
    text.write_text((ROOT / "tests" / "data" / "profile.txt").read_text(encoding="utf-8") * 20, encoding="utf-8")
    script = f"import sys, time; from pinfer.conversion import powerinfer_predictor as p; {patch}"
    script += "from pinfer.cli.app import main; sys.argv[0] = 'pinfer'; sys.exit(main())"
    child = subprocess.Popen(
        [sys.executable, "-c", script, "convert", source.name, "-o", "out.gguf", "--dataset", str(text)],
        cwd=command.folder,
        env=command.environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert child.stderr is not None
    said = ""
    while marker not in said:
        line = child.stderr.readline()
        assert line, said
        said += line
    time.sleep(2)
    begin = time.monotonic()
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert time.monotonic() - begin < 5
    assert child.returncode == 130, err
    assert "out.gguf is complete; its predictor was not imported; to import it: pinfer convert tiny.powerinfer" in err
    assert open_model(command.folder / "out.gguf").is_sparse
    assert not list(command.folder.glob("**/predictor.gguf"))
    assert not list(command.folder.glob("**/.*.tmp"))


def test_ctrl_c_is_obeyed_in_a_long_calculation() -> None:
    script = (
        "import time, numpy as np; from pinfer.interrupt import interruptible; "
        "print('go', flush=True); interruptible(lambda: np.linalg.svd(np.random.rand(3000, 3000)))"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    child = subprocess.Popen(
        [sys.executable, "-c", script], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "go\n"
    time.sleep(0.5)
    begin = time.monotonic()
    child.send_signal(signal.SIGINT)
    _, err = child.communicate(timeout=60)
    assert "KeyboardInterrupt" in err
    assert time.monotonic() - begin < 3
    assert interruptible(lambda: 7) == 7
    with pytest.raises(PinferError, match="kept"):
        interruptible(_fail)


def _fail() -> None:
    raise PinferError("kept")
