"""What `pinfer show` reports about a model, its artefacts, and how it will be run."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from support.command_line import ROOT, CommandLine
from support.shards import write_shards
from support.small_model import Shape, write_profile, write_small_model

from pinfer.artefacts import paths
from pinfer.artefacts.placement import PlacementFile
from pinfer.artefacts.predictor import LayerPredictor, PredictorWriter
from pinfer.cli.show import print_show
from pinfer.model import open_model
from pinfer.show import ShowOptions, ShowReport, show
from pinfer.split import SplitOptions, split

KINDS = ("profile", "samples", "predictor", "placement", "hot", "cold")


@pytest.fixture
def command(tmp_path: Path) -> CommandLine:
    return CommandLine(tmp_path / "work", tmp_path / "home")


def _show(path: Path, activation: str | None = None) -> ShowReport:
    return show(path, ShowOptions(activation=activation))


def _write(path: Path, arch: str, tensors: dict[str, tuple[int, ...]], **keys: object) -> Path:
    """A model with zeros as weights. Shapes are numpy's; the types of the keys are those of their values."""
    out = gguf.GGUFWriter(path, arch)
    out.add_block_count(1)
    out.add_embedding_length(64)
    out.add_feed_forward_length(128)
    out.add_head_count(4)
    for name, value in keys.items():
        key = name.replace("__", ".")
        if isinstance(value, str):
            out.add_string(key, value)
        elif isinstance(value, float):
            out.add_float32(key, value)
        else:
            assert isinstance(value, int)
            out.add_uint32(key, value)
    for name, shape in tensors.items():
        out.add_tensor(name, np.zeros(shape, np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    return path


GATED = {
    "token_embd.weight": (32, 64),
    "blk.0.attn_q.weight": (64, 64),
    "blk.0.ffn_norm.weight": (64,),
    "blk.0.ffn_gate.weight": (128, 64),
    "blk.0.ffn_up.weight": (128, 64),
    "blk.0.ffn_down.weight": (64, 128),
}
UNGATED = {name: shape for name, shape in GATED.items() if "gate" not in name}


# --- the model ------------------------------------------------------------------------------------------------------


def test_shape_and_sizes_are_those_of_the_file(tiny_relu2: Path) -> None:
    report = _show(tiny_relu2)
    reader = gguf.GGUFReader(tiny_relu2)
    sizes = {tensor.name: int(tensor.n_bytes) for tensor in reader.tensors}
    fields = reader.fields
    assert report.size == tiny_relu2.stat().st_size
    assert report.n_params == sum(int(tensor.n_elements) for tensor in reader.tensors)
    assert report.n_layer == fields["arcee.block_count"].contents()
    assert set(report.n_head_kv) == {fields["arcee.attention.head_count_kv"].contents()}
    assert report.n_neurons == report.n_layer * fields["arcee.feed_forward_length"].contents()
    is_ffn = {name: ".ffn_up." in name or ".ffn_down." in name for name in sizes}
    assert report.parts["ffn"].bytes == sum(n for name, n in sizes.items() if is_ffn[name])
    assert report.parts["embeddings"].bytes == sum(sizes.get(f"{n}.weight", 0) for n in ("token_embd", "output"))
    assert sum(part.bytes for part in report.parts.values()) == sum(sizes.values())
    for part in report.parts.values():
        assert sum(part.types.values()) == part.bytes
    assert list(report.parts["ffn"].types) == ["F16"]
    per_head = report.head_dim_k + report.head_dim_v
    assert report.kv_bytes_per_1k == 1024 * 2 * sum(report.n_head_kv) * per_head


def test_source_of_the_activation(tmp_path: Path) -> None:
    native = _write(tmp_path / "native.gguf", "arcee", UNGATED)
    report = _show(native)
    assert (report.activation, report.activation_source, report.gated) == ("relu2", "architecture", False)
    keyed = _write(tmp_path / "keyed.gguf", "llama", GATED, pinfer__ffn__activation="drelu")
    report = _show(keyed)
    assert (report.activation, report.activation_source) == ("drelu", "pinfer.ffn.activation")
    report = _show(keyed, "reglu")
    assert (report.activation, report.activation_source, report.gated) == ("reglu", "--activation", True)
    assert report.activation_threshold == 0


def test_a_threshold_is_reported(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    keys = {"pinfer__ffn__activation": "reglu", "pinfer__ffn__activation_threshold": 0.01}
    report = _show(_write(tmp_path / "m.gguf", "llama", GATED, **keys))
    assert report.activation_threshold == pytest.approx(0.01)
    print_show(report)
    assert "above a threshold of 0.01" in capsys.readouterr().out


def test_a_model_without_exact_zeros_runs_dense(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    report = _show(_write(tmp_path / "m.gguf", "llama", GATED))
    assert (report.activation, report.mode, report.next, report.is_sparse) == ("other", "dense", "run", False)
    assert "no exact zeros" in report.plan
    print_show(report)
    shown = capsys.readouterr().out
    assert "No exact zeros (SiLU, GELU or similar in llama): runs dense on stock libllama." in shown
    assert "no artefacts yet" in shown


@pytest.mark.parametrize("keys", [{}, {"pinfer__ffn__activation": "reglu"}])
def test_a_mixture_of_experts(tmp_path: Path, keys: dict[str, object], capsys: pytest.CaptureFixture[str]) -> None:
    experts = {
        "token_embd.weight": (32, 64),
        "blk.0.ffn_gate_inp.weight": (8, 64),
        "blk.0.ffn_gate_exps.weight": (8, 48, 64),
        "blk.0.ffn_up_exps.weight": (8, 48, 64),
        "blk.0.ffn_down_exps.weight": (8, 64, 48),
        "blk.0.ffn_up_shexp.weight": (32, 64),
    }
    report = _show(_write(tmp_path / "m.gguf", "qwen2moe", experts, qwen2moe__expert_count=8, **keys))
    assert (report.n_expert, report.n_neurons, report.mode) == (8, 8 * 48 + 32, "dense")
    assert report.parts["ffn"].bytes == 4 * (3 * 8 * 48 * 64 + 32 * 64)
    assert report.parts["dense"].bytes == 4 * 8 * 64, "the router is no neuron"
    print_show(report)
    assert "416 in total, 8 experts" in capsys.readouterr().out


def test_heads_that_differ_by_layer(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "m.gguf"
    out = gguf.GGUFWriter(path, "llama")
    out.add_block_count(2)
    out.add_embedding_length(64)
    out.add_head_count([4, 8])
    out.add_head_count_kv([2, 1])
    out.add_key_length(16)
    out.add_value_length(8)
    for name in ("token_embd.weight", "output_norm.weight"):
        out.add_tensor(name, np.zeros((32, 64), np.float32))
    out.write_header_to_file()
    out.write_kv_data_to_file()
    out.write_tensors_to_file()
    out.close()
    report = _show(path)
    assert (report.n_head, report.n_head_kv) == ((4, 8), (2, 1))
    assert report.kv_bytes_per_1k == 1024 * 2 * 3 * (16 + 8)
    print_show(report)
    assert "4 to 8, 1 to 2 for keys and values (GQA), width 16 and 8" in capsys.readouterr().out


# --- artefacts ------------------------------------------------------------------------------------------------------


@pytest.fixture
def small(tmp_path: Path) -> Path:
    return write_small_model(tmp_path / "small.gguf", Shape(n_ff=256))


def _states(report: ShowReport) -> dict[str, str]:
    return {artefact.kind: artefact.state for artefact in report.artefacts}


def _folder(model: Path) -> Path:
    opened = open_model(model)
    return paths.artefact_dir(opened.path, opened.fingerprint, for_writing=True)


def _split(path: Path, placement_id: str) -> None:
    """Places 64 neurons of each layer on the device and splits the model accordingly."""
    model = open_model(path)
    order = tuple(np.arange(model.n_ff, dtype=np.int32) for _ in range(model.n_layer))
    n_hot = (64,) * model.n_layer
    PlacementFile(placement_id, n_hot, "CPU", 1 << 20, 0, 512, {}, order).write(
        _folder(path) / paths.PLACEMENT, model, {}
    )
    split(path, SplitOptions())


def test_no_artefacts_yet(small: Path) -> None:
    report = _show(small)
    assert _states(report) == dict.fromkeys(KINDS, "absent")
    assert (report.mode, report.next) == ("exact", "profile")
    assert "skips the up projection of inactive neurons" in report.plan
    assert [a.mend.split()[1] for a in report.artefacts] == ["profile", "profile", "train", "solve", "split", "split"]
    assert not report.artefact_folder.exists(), "looking makes nothing"


def test_a_profile_is_summarised(small: Path) -> None:
    profile = write_profile(_folder(small) / paths.PROFILE, open_model(small))
    report = _show(small)
    assert _states(report)["profile"] == "fits"
    facts = report.artefacts[0].facts
    count = np.concatenate(profile.count)
    assert facts["active"] == pytest.approx(count.sum() / (count.size * profile.tokens))
    assert (facts["tokens"], facts["corpus"]) == (profile.tokens, "synthetic")
    ordered = np.sort(count)[::-1]
    n_most = round(facts["most"] * count.size)
    assert ordered[: n_most - 1].sum() < 0.8 * count.sum() <= ordered[:n_most].sum()
    assert f"({100 * (1 - facts['active']):.1f} %)" in report.plan


def test_artefacts_of_another_model_are_reported_without_an_error(
    small: Path, command: CommandLine, tmp_path: Path
) -> None:
    folder = _folder(small)
    other = write_small_model(tmp_path / "other.gguf", Shape(seed=1))
    write_profile(folder / paths.PROFILE, open_model(other))
    (folder / paths.PREDICTOR).write_bytes(b"GGUF")
    (folder / paths.PLACEMENT).write_bytes(b"")
    (folder / "samples").mkdir()
    (folder / paths.SAMPLES).write_bytes(bytes(100))
    shown = command("show", small)
    assert shown.code == 0, shown.err
    assert "made from another model (other.gguf)" in shown.err
    assert f"predictor.gguf is damaged: the header ends too early; make it again: pinfer train {small}" in shown.err
    assert shown.out.count("unusable") == 4
    assert "Run cannot use these artefacts" in shown.out
    report = json.loads(command("show", small, "--json").out)
    assert report["mode"] == "refused"
    problems = {a["kind"]: a["problem"] for a in report["artefacts"]}
    assert "another model" in problems["profile"]
    assert "not a GGUF" in problems["placement"]
    assert problems["cold"] == ""


def test_shards_that_do_not_belong_together(small: Path) -> None:
    folder = _folder(small)
    _split(small, "1" * 16)
    report = _show(small)
    assert (_states(report)["hot"], _states(report)["cold"]) == ("fits", "fits")
    assert report.artefacts[4].facts["n_neurons"] == 2 * 64
    assert "25.0 % of the neurons are hot, on CPU" in report.plan
    old = (folder / paths.HOT).read_bytes()
    _split(small, "2" * 16)
    (folder / paths.HOT).write_bytes(old)
    report = _show(small)
    assert (_states(report)["hot"], _states(report)["cold"]) == ("unusable", "unusable")
    assert report.mode == "refused"
    (folder / paths.COLD).unlink()
    report = _show(small)
    assert (_states(report)["hot"], report.mode) == ("unusable", "refused")
    assert "exists without cold.gguf" in report.artefacts[4].problem


# --- verify ---------------------------------------------------------------------------------------------------------


def _flip_last_bit(path: Path) -> None:
    """The last byte of the last tensor; behind it there is only padding."""
    last = max(gguf.GGUFReader(path).tensors, key=lambda tensor: int(tensor.data_offset))
    at = int(last.data_offset) + int(last.n_bytes) - 1
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)


def _write_predictor(path: Path) -> None:
    model = open_model(path)
    with PredictorWriter(_folder(path) / paths.PREDICTOR, model, "f16") as out:
        for ffn in model.ffns:
            a, b = np.zeros((32, ffn.n_embd), np.float32), np.zeros((ffn.n_ff, 32), np.float32)
            out.add(LayerPredictor(32, 1.0, 1.0, a, b, np.zeros(ffn.n_ff, np.float32)))
        out.finish({})


@pytest.mark.parametrize("damaged", [paths.PROFILE, paths.PREDICTOR, paths.HOT, "hot-1.gguf", paths.COLD])
def test_verify_finds_a_single_wrong_bit_in_any_artefact(small: Path, command: CommandLine, damaged: str) -> None:
    folder = _folder(small)
    write_profile(folder / paths.PROFILE, open_model(small))
    _write_predictor(small)
    write_shards(small, 0.5, n_devices=2)
    sound = command("show", small, "--verify")
    assert sound.code == 0, sound.err
    assert "Every tensor of the artefacts has its checksum." in sound.out
    for name in ("profile.gguf", "predictor.gguf", "placement.gguf", "hot.gguf", "hot-1.gguf", "cold.gguf"):
        assert f"verify {name}" in sound.err, "no progress is shown"

    _flip_last_bit(folder / damaged)
    assert set(_states(_show(small)).values()) == {"fits", "absent"}, "headers do not tell"
    report = show(small, ShowOptions(verify=True))
    kind = damaged.partition(".")[0].partition("-")[0]
    assert [a.kind for a in report.artefacts if a.state == "unusable"] == [kind]
    assert (report.mode == "refused") == (damaged != paths.PROFILE)

    shown = command("show", small, "--verify")
    assert shown.code == 1
    assert "Every tensor" not in shown.out
    problem = shown.err_lines[-1]
    assert problem.startswith(f"{folder / damaged} is damaged: tensor "), shown.err
    assert "does not have its checksum; make it again: pinfer " in problem
    as_json = command("show", small, "--verify", "--json")
    assert as_json.code == 1
    states = _states_of(json.loads(as_json.out))
    assert states == _states(report)


def test_verify_without_artefacts_has_nothing_to_do(small: Path, command: CommandLine) -> None:
    shown = command("show", small, "--verify")
    assert shown.code == 0, shown.err
    assert "no artefacts yet" in shown.out
    assert "Every tensor" not in shown.out


# --- the command, and what run does ---------------------------------------------------------------------------------


def _json(command: CommandLine, *words: str | Path) -> dict[str, Any]:
    outcome = command(*words, "--json")
    assert outcome.code == 0, outcome.err
    result = json.loads(outcome.out)
    assert isinstance(result, dict)
    return result


def test_it_predicts_what_run_does(command: CommandLine, tiny_reglu: Path) -> None:
    text = command.folder / "text.txt"
    text.write_text((ROOT / "docs" / "formats.md").read_text(encoding="utf-8"), encoding="utf-8")
    stages: dict[str, tuple[str | Path, ...]] = {
        "profile": ("--dataset", text, "--tokens", "2048"),
        "train": (),
        "solve": ("--device", "CPU", "--vram", "4M"),
        "split": (),
    }
    run = ("run", "-p", "One day", "-n", "4", "--temp", "0", "--hot-device", "CPU")
    hot = ""
    report = _json(command, "show", tiny_reglu)
    for name, flags in stages.items():
        assert report["next"] == name
        assert _json(command, *run[:-2], tiny_reglu)["mode"] == report["mode"]
        counted = _json(command, name, tiny_reglu, *flags)
        report = _json(command, "show", tiny_reglu)
        if name == "profile":
            assert report["artefacts"][0]["facts"]["active"] == pytest.approx(counted["active"])
        if name == "train":
            facts = report["artefacts"][2]["facts"]
            assert facts["recall"] == pytest.approx(counted["recall"], abs=1e-6)
            assert facts["candidates"] == pytest.approx(counted["candidates"], abs=1e-6)
        if name == "solve":
            facts = report["artefacts"][3]["facts"]
            assert facts["hot_share"] == pytest.approx(counted["hot_share"])
            assert facts["vram"] == 4 << 20
    assert report["next"] == "run"
    assert set(_states_of(report).values()) == {"fits"}
    said = _json(command, *run, tiny_reglu)
    assert said["mode"] == report["mode"] == "predicted"
    assert hot in report["plan"]
    command("solve", tiny_reglu, "--device", "CPU", "--vram", "3M")
    report = _json(command, "show", tiny_reglu)
    assert (_states_of(report)["hot"], _states_of(report)["cold"], report["next"]) == ("stale", "stale", "split")
    assert report["mode"] == "predicted", "run takes them as they are"


def _states_of(report: dict[str, Any]) -> dict[str, str]:
    return {artefact["kind"]: artefact["state"] for artefact in report["artefacts"]}


def test_the_printed_report(command: CommandLine, tiny_relu2: Path) -> None:
    shutil.copy(tiny_relu2, command.folder / "m.gguf")
    shown = command("show")
    assert shown.code == 0
    for line in (
        "model         m.gguf",
        "size          8.5 MiB, 4.4 M parameters",
        "architecture  arcee",
        "activation    relu2 (the file's pinfer.ffn.activation)",
        "heads         4, 2 for keys and values (GQA), width 64",
        "neurons       1,024 per layer, 5,120 in total, not gated",
        "no artefacts yet",
    ):
        assert line in shown.out.splitlines()
    assert shown.err_lines == ["model: m.gguf (the only GGUF in this folder)", "next: pinfer profile"]


@pytest.mark.parametrize(
    ("name", "data", "words"),
    [
        ("m.gguf", b"GGUX" + bytes(100), "not a GGUF file"),
        ("m.gguf", b"GGUF\x03\0\0\0", "the header ends too early"),
        ("m.gguf", b"PWRI" + bytes(100), "pinfer convert m.gguf"),
        ("config.json", b"{}", "pinfer convert ."),
    ],
)
def test_other_files_are_errors(command: CommandLine, name: str, data: bytes, words: str) -> None:
    (command.folder / name).write_bytes(data)
    shown = command("show", "." if name == "config.json" else name)
    assert shown.code == 1
    assert shown.out == ""
    assert len(shown.err_lines) == 1
    assert words in shown.err
