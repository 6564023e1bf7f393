"""prepare, list and rm: one command makes every artefact, does nothing twice, and undoes only its own."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.command_line import ROOT, CommandLine
from support.sparse_models import SparseModel, write_sparse_model

from models.synth import SynthOptions, write_model
from pinfer import Model, PrepareOptions, generate, prepare
from pinfer.errors import PinferError
from pinfer.execution import ExecutionOptions, decide
from pinfer.library import artefact_files, prepared_models, remove_artefacts
from pinfer.llama.engine import Engine
from pinfer.model import open_model
from pinfer.preparation import default_tokens, estimate, worth_preparing
from pinfer.profile import MAX_SAMPLES, ProfileOptions

TEXT = str(ROOT / "tests" / "data" / "profile.txt")
QUICK = PrepareOptions(dataset=TEXT, n_tokens=2048, n_threads=1)
STAGES = ("profile", "train", "solve", "split")
PROMPT = "Once upon a time"


@pytest.fixture
def pinfer(tmp_path: Path) -> CommandLine:
    return CommandLine(tmp_path / "work", tmp_path / "home")


def _folder(model: Path) -> Path:
    return model.with_name(model.name + ".pinfer")


def test_everything_is_made_once(tiny_relu2: Path) -> None:
    first = prepare(tiny_relu2, QUICK)
    assert first.done == STAGES
    assert first.mode == "predicted"
    assert 0 < first.active < 0.5
    assert first.recall is not None
    assert first.recall > 0.98
    assert first.n_bytes == sum(file.stat().st_size for file in artefact_files(_folder(tiny_relu2)))
    before = {file: file.stat().st_mtime_ns for file in artefact_files(_folder(tiny_relu2))}
    assert prepare(tiny_relu2, QUICK).done == ()
    assert prepare(str(tiny_relu2)).done == ()  # nothing asked for: whatever is there will do
    assert {file: file.stat().st_mtime_ns for file in artefact_files(_folder(tiny_relu2))} == before


def test_only_what_is_missing_is_made(tiny_relu2: Path) -> None:
    prepare(tiny_relu2, QUICK)
    folder = _folder(tiny_relu2)
    (folder / "cold.gguf").unlink()
    assert prepare(tiny_relu2, QUICK).done == ("split",)
    (folder / "predictor.gguf").write_bytes(b"GGUF and no more")
    assert prepare(tiny_relu2, QUICK).done == ("train", "solve", "split")
    os.utime(folder / "profile.gguf")  # counted anew
    assert prepare(tiny_relu2, QUICK).done == ("train", "solve", "split")
    other = PrepareOptions(dataset=TEXT, n_tokens=1024, n_threads=1)
    assert prepare(tiny_relu2, other).done == STAGES
    assert prepare(tiny_relu2, PrepareOptions(n_ctx=77, n_threads=1)).done == ("solve", "split")


def test_the_command_in_four_lines(tiny_relu2: Path, pinfer: CommandLine) -> None:
    done = pinfer("prepare", str(tiny_relu2), "--dataset", TEXT, "--tokens", "2k", "-t", "1")
    assert done.code == 0, done.err
    assert len(done.out.splitlines()) == 4
    assert "pinfer run is predicted" in done.out
    needs = r"about \d+ min and up to \d+ MiB of disk, \d+ MiB of memory besides the model's \d+ MiB"
    assert re.search(rf"profile \(2,048 tokens\), train, solve, split; {needs}; in ", done.err)
    assert done.err.splitlines()[-1].startswith("next: pinfer run ")
    report = json.loads(pinfer("prepare", str(tiny_relu2), "--json").out)
    assert report["done"] == []
    assert report["mode"] == "predicted"


def test_a_model_with_nothing_to_skip(synthetic: Path, pinfer: CommandLine) -> None:
    synthetic.write_bytes(synthetic.read_bytes().replace(b"pinfer.ffn.activation", b"pinfer.was.activation"))
    done = pinfer("prepare", str(synthetic))
    assert done.code == 1
    assert "ReLU" in done.err
    assert artefact_files(_folder(synthetic)) == ()


def test_a_full_disk_is_noticed_before_the_work(tiny_relu2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("shutil.disk_usage", lambda _: SimpleNamespace(free=1 << 20))
    with pytest.raises(PinferError, match=r"0\.0 GiB free"):
        prepare(tiny_relu2, QUICK)
    assert artefact_files(_folder(tiny_relu2)) == ()


def test_the_estimate_covers_what_is_written(tiny_relu2: Path) -> None:
    expected = estimate(open_model(tiny_relu2), QUICK)
    report = prepare(tiny_relu2, QUICK)
    assert report.n_bytes < 1.2 * expected.disk
    assert expected.seconds > 0
    assert expected.n_tokens == QUICK.n_tokens
    alone = [estimate(open_model(tiny_relu2), QUICK, [name]).seconds for name in ("profile", "train", "split")]
    assert all(0 < seconds < 2 * expected.seconds for seconds in alone)
    assert estimate(open_model(tiny_relu2), QUICK, ["solve"]).seconds == 0


@pytest.mark.parametrize("name", ["tiny_relu2", "mixture"])
def test_the_estimate_covers_the_memory_it_takes(name: str, tiny_relu2: Path, tmp_path: Path) -> None:
    """Measured as the peak of a process, its mapped model and libraries included."""
    path = (
        tiny_relu2 if name == "tiny_relu2" else write_sparse_model(tmp_path / "m.gguf", SparseModel("nemotron_h_moe"))
    )
    expected = estimate(open_model(path), QUICK)
    code = "import re; from pinfer import PrepareOptions, prepare; "
    code += f"prepare({str(path)!r}, PrepareOptions(dataset={TEXT!r}, n_tokens=2048, n_threads=1)); "
    # ru_maxrss would be that of the tests, if this process is the larger one
    code += "print(re.search(r'VmHWM:\\s+(\\d+)', open('/proc/self/status').read())[1])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=240)
    assert int(done.stdout) << 10 < expected.memory + expected.mapped


def test_as_much_text_as_25_minutes_allow() -> None:
    """At least what the samples need, at most what `pinfer profile` counts by default."""
    assert default_tokens(1e-6) == ProfileOptions().n_tokens
    assert default_tokens(0.09) == 16 * 1024
    assert default_tokens(10.0) == MAX_SAMPLES


def test_run_and_serve_say_once_what_preparing_would_bring(tmp_path: Path, pinfer: CommandLine) -> None:
    model = tmp_path / "wide.gguf"
    write_model(model, SynthOptions(n_embd=512, n_ff=8192, n_layer=3))
    generated = ("-p", PROMPT, "-n", "1", "-t", "1")
    told = pinfer("run", model, *generated)
    assert told.code == 0
    hint, closing = told.err_lines
    pattern = rf"note: decoding is .* after: pinfer prepare {model} \(about \d+ min and up to \d+ MiB of disk\)"
    assert re.fullmatch(pattern, hint)
    assert closing.startswith("[ Prompt: ")
    assert "prepare" not in told.out
    for words in (("--json",), ("--exact",), ("--dense",), ("--no-artefacts",)):
        done = pinfer("run", model, *generated, *words)
        assert done.code == 0
        assert "pinfer prepare" not in done.err, words
    served = pinfer("serve", model, "-t", "1", "--port", "0", "-c", "many")  # llama.cpp ends it at once
    assert served.code == 2
    assert sum(re.fullmatch(pattern, line) is not None for line in served.err_lines) == 1


def test_nothing_is_suggested_where_nothing_is_gained(
    tiny_relu2: Path, synthetic: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def suggested(path: Path, **chosen: Any) -> bool:
        options = ExecutionOptions(n_threads=1, **chosen)
        return worth_preparing(decide(open_model(path), options), options) is not None

    assert not suggested(tiny_relu2), "fixed costs decide the speed of a tiny model"
    monkeypatch.setattr("pinfer.preparation._SMALLEST_FFN", 0)
    assert suggested(tiny_relu2)
    for chosen in ({"exact": True}, {"dense": True}, {"no_artefacts": True}, {"artefacts": tiny_relu2.parent}):
        assert not suggested(tiny_relu2, **chosen), chosen
    prepare(tiny_relu2, QUICK)
    assert not suggested(tiny_relu2)
    assert suggested(synthetic)
    synthetic.write_bytes(synthetic.read_bytes().replace(b"pinfer.ffn.activation", b"pinfer.was.activation"))
    assert not suggested(synthetic), "no ReLU, no zeros to skip"


def test_list_tells_fresh_from_stale_and_orphaned(tiny_relu2: Path) -> None:
    folder = tiny_relu2.parent
    assert prepared_models(folder) == []
    prepare(tiny_relu2, QUICK)
    (fresh,) = prepared_models(folder)
    assert (fresh.name, fresh.state, fresh.model) == (tiny_relu2.name, "fresh", tiny_relu2.resolve())
    assert set(fresh.kinds) >= {"profile", "predictor", "placement", "hot", "cold"}
    damaged = _folder(tiny_relu2) / "predictor.gguf"
    damaged.write_bytes(damaged.read_bytes()[:-64])
    (stale,) = prepared_models(folder)
    assert stale.state == "stale"
    tiny_relu2.unlink()
    (orphaned,) = prepared_models(folder)
    assert (orphaned.name, orphaned.state, orphaned.model) == (tiny_relu2.name, "orphaned", None)


def test_rm_deletes_artefacts_and_nothing_else(tiny_relu2: Path) -> None:
    prepare(tiny_relu2, QUICK)
    note = _folder(tiny_relu2) / "notes.txt"
    note.write_text("mine")
    remove_artefacts(tiny_relu2)
    assert tiny_relu2.exists()
    assert [file for file in _folder(tiny_relu2).rglob("*") if file.suffix == ".gguf"] == []
    assert note.read_text() == "mine"
    with pytest.raises(PinferError, match="no artefacts"):
        remove_artefacts(tiny_relu2)


def test_rm_asks_first(tiny_relu2: Path, pinfer: CommandLine) -> None:
    prepare(tiny_relu2, QUICK)
    refused = pinfer("rm", str(tiny_relu2))
    assert refused.code == 2
    assert "--yes" in refused.err
    assert artefact_files(_folder(tiny_relu2))
    assert pinfer("rm", str(tiny_relu2), "--yes").code == 0
    assert artefact_files(_folder(tiny_relu2)) == ()


def test_python_says_what_the_engine_says(tiny_relu2: Path) -> None:
    with Engine(tiny_relu2, plugin=None, n_ctx=256, n_threads=1) as engine:
        stock = engine.detokenize(engine.generate(engine.tokenize(PROMPT), 24))
    options = ExecutionOptions(n_threads=1, n_ctx=256)
    with Model(tiny_relu2, options) as model:
        assert model.execution.mode == "exact"
        assert model.generate(PROMPT, 24).strip() == stock.strip()
        assert "".join(model.stream(PROMPT, 24)).strip() == stock.strip()
        drawn = [model.generate(PROMPT, 12, temperature=0.8, seed=seed) for seed in (1, 1, 2)]
        assert drawn[0] == drawn[1] != drawn[2]
        stats = model.stats()
        assert stats is not None
        assert stats.n_neurons > 0
    assert generate(tiny_relu2, PROMPT, 4)


def test_models_count_their_own_work(tiny_relu2: Path, tiny_reglu: Path) -> None:
    options = ExecutionOptions(n_threads=1, n_ctx=64)
    with Model(tiny_relu2, options) as one, Model(tiny_reglu, options) as other:
        one.generate(PROMPT, 2)
        before = one.stats()
        assert before is not None
        assert before.n_tokens > 0
        other.generate(PROMPT, 2)
        assert one.stats() == before
