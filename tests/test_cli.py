"""The command line: parsing, picking a model, exit codes, what goes to stdout, and the whole pipeline once."""

from __future__ import annotations

import dataclasses
import importlib
import io
import json
import resource
import shlex
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any, NoReturn

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from support.command_line import MODELS, ROOT, CommandLine, Outcome

from pinfer import __version__, train
from pinfer.cli import app, docs, formats, pick, ui
from pinfer.cli import options as cli_options
from pinfer.errors import PinferError
from pinfer.execution import ExecutionOptions

COMMANDS = ("profile", "train", "solve", "split", "run", "eval", "bench", "show")


@pytest.fixture
def command(tmp_path: Path) -> CommandLine:
    return CommandLine(tmp_path / "work", tmp_path / "home")


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """The empty working folder of this process, with its PINFER_HOME beside it."""
    return tmp_path / "work"


# --- help, version, usage -------------------------------------------------------------------------------------------


def test_help_names_every_command_and_is_quick(command: CommandLine) -> None:
    # CPU time, the best of five runs: other programs on the machine must not decide this.
    seconds = []
    for _ in range(5):
        begin = resource.getrusage(resource.RUSAGE_CHILDREN)
        shown = command("--help")
        end = resource.getrusage(resource.RUSAGE_CHILDREN)
        seconds.append(end.ru_utime + end.ru_stime - begin.ru_utime - begin.ru_stime)
    assert shown.code == 0
    assert shown.err == ""
    assert all(name in shown.out for name in COMMANDS)
    assert min(seconds) < 0.3, f"pinfer --help took {min(seconds):.2f} s at best"


def test_help_imports_nothing_heavy() -> None:
    heavy = ("numpy", "scipy", "gguf", "llama_cpp", "rich", "huggingface_hub")
    code = (
        "import sys\nfrom pinfer.cli.app import run_cli\nrun_cli(['solve', '--help'])\n"
        f"sys.exit(', '.join(name for name in {heavy!r} if name in sys.modules) or None)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("name", COMMANDS)
def test_help_of_each_command_lists_its_flags(command: CommandLine, name: str) -> None:
    shown = command(name, "-h")
    assert shown.code == 0
    assert "--json" in shown.out
    assert "--activation" in shown.out
    assert "-hf, -hfr, --hf-repo USER/REPO" in shown.out
    assert "--offline" in shown.out


def test_version(command: CommandLine) -> None:
    assert command("--version") == Outcome(0, f"pinfer {__version__}\n", "")


def test_docs_are_up_to_date() -> None:
    assert docs.main(["--check"]) == 0, "docs/cli.md is stale; run: python -m pinfer.cli.docs"


def test_stale_docs_are_noticed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    page = tmp_path / "cli.md"
    assert docs.main(["--check", str(page)]) == 1
    assert docs.main([str(page)]) == 0
    assert docs.main(["--check", str(page)]) == 0
    page.write_text(page.read_text().replace("pinfer", "pincer", 1))
    assert docs.main(["--check", str(page)]) == 1
    assert "stale" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "names"),
    [
        (["sovle"], "solve"),
        (["solve", "--vrma", "1G"], "--vram"),
        (["solve", "--vram", "24X"], "24X"),
        (["solve", "--vram", "24G,x"], "'x' is not a valid size"),
        (["solve", "--vram", ""], "24G"),
        (["profile", "--tokens", "many"], "128k"),
        (["profile", "--activation", "gelu"], "relu2"),
        (["eval", "--text", "t", "-ngl", "some"], "-ngl"),
        (["split", "a.gguf", "b.gguf"], "b.gguf"),
        (["split", "a.gguf", "-m", "b.gguf"], "b.gguf"),
    ],
)
def test_usage_errors_are_one_line_and_exit_code_2(command: CommandLine, words: list[str], names: str) -> None:
    shown = command(*words)
    assert shown.code == 2
    assert shown.out == ""
    assert len(shown.err_lines) == 1, shown.err
    assert names in shown.err
    assert "--help" in shown.err


def test_no_command_prints_the_help_and_is_a_usage_error(command: CommandLine) -> None:
    shown = command()
    assert shown.code == 2
    assert "Usage: pinfer" in shown.err


# --- sizes ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("0", 0),
        ("1073741824", 1 << 30),
        ("24G", 24 << 30),
        ("24g", 24 << 30),
        ("512M", 512 << 20),
        ("7.5GiB", 15 << 29),
        (" 16 KiB ", 16 << 10),
        ("1T", 1 << 40),
        ("24GB", 24 * 10**9),
        (".5k", 512),
        ("12B", 12),
    ],
)
def test_sizes(text: str, size: int) -> None:
    assert cli_options.parse_size(text) == size


@pytest.mark.parametrize("text", ["", "G", "-1G", "1E", "24 G B", "1iB", "1e9", "0x10", "1,5G", "nan", "24Gi B", "٣G"])
def test_invalid_sizes(text: str) -> None:
    with pytest.raises(typer.BadParameter, match="24G"):
        cli_options.parse_size(text)


@given(st.integers(0, 1 << 60))
def test_sizes_in_bytes_are_exact(size: int) -> None:
    assert cli_options.parse_size(str(size)) == size


def test_number_of_tokens() -> None:
    assert cli_options.parse_count("128k") == 131072
    assert cli_options.parse_count("2048") == 2048
    with pytest.raises(typer.BadParameter, match="number of tokens"):
        cli_options.parse_count("lots")


@pytest.mark.parametrize(
    ("number", "text"),
    [(0, "0 B"), (1023, "1023 B"), (1024, "1.0 KiB"), (1536, "1.5 KiB"), (24 << 30, "24.0 GiB"), (1 << 50, "1.0 PiB")],
)
def test_bytes_are_written_in_binary_units(number: int, text: str) -> None:
    assert formats.format_bytes(number) == text


@pytest.mark.parametrize(("seconds", "text"), [(0, "0:00"), (75.4, "1:15"), (3675, "1:01:15"), (-3, "0:00")])
def test_seconds(seconds: float, text: str) -> None:
    assert formats.format_seconds(seconds) == text


# --- which model ----------------------------------------------------------------------------------------------------


def _gguf(path: Path) -> Path:
    path.write_bytes(b"GGUF" + bytes(32))
    return path


def test_a_given_model_is_used_unchanged(state: Path) -> None:
    assert pick.pick_model(Path("x.gguf"), state) == pick.Pick(Path("x.gguf"))


def test_the_only_gguf_here(state: Path) -> None:
    _gguf(state / "a.gguf")
    _gguf(state / "mmproj-a.gguf")
    (state / "a.gguf.pinfer").mkdir()
    picked = pick.pick_model(None, state)
    assert picked.path == Path("a.gguf")
    assert "only" in picked.why


def test_no_model_or_several_are_errors_that_explain_how_to_name_one(state: Path) -> None:
    with pytest.raises(PinferError) as none:
        pick.pick_model(None, state)
    for name in "abcdef":
        _gguf(state / f"{name}.gguf")
    with pytest.raises(PinferError) as several:
        pick.pick_model(None, state)
    for error in (none.value, several.value):
        assert "model.gguf" in error.hint
        assert "PINFER_MODEL" in error.hint
    assert "6 GGUF models" in several.value.message
    assert "a.gguf" in several.value.message


def test_artefacts_are_not_taken_for_models(state: Path) -> None:
    folder = state / "a.gguf.pinfer"
    folder.mkdir()
    _gguf(folder / "cold.gguf")
    with pytest.raises(PinferError, match="no GGUF"):
        pick.pick_model(None, folder)


def test_the_last_model_of_a_folder_comes_before_the_only_one(state: Path) -> None:
    other = state.parent / "other"
    other.mkdir()
    _gguf(state / "a.gguf")
    last = _gguf(other / "b.gguf")
    pick.remember(last, state)
    assert pick.pick_model(None, state).path == last
    assert pick.pick_model(None, other).path == Path("b.gguf"), "each folder has its own"
    last.unlink()
    assert pick.pick_model(None, state).path == Path("a.gguf"), "a model that is gone is forgotten"


def test_the_variable_comes_before_the_last_model(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pick.remember(_gguf(state / "a.gguf"), state)
    named = _gguf(state / "b.gguf")
    monkeypatch.setenv("PINFER_MODEL", str(named))
    picked = pick.pick_model(None, state)
    assert picked.path == named
    assert "PINFER_MODEL" in picked.why
    named.unlink()
    with pytest.raises(PinferError, match="PINFER_MODEL"):
        pick.pick_model(None, state)


def test_a_read_only_home_is_not_an_error(state: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (state / "file").write_text("")
    monkeypatch.setenv("PINFER_HOME", str(state / "file" / "home"))
    pick.remember(_gguf(state / "a.gguf"), state)
    assert pick.recall(state) is None


def test_a_damaged_note_is_not_an_error(state: Path) -> None:
    pick.remember(_gguf(state / "a.gguf"), state)
    (note,) = (state.parent / "home" / "last-model").iterdir()
    for text in (b"", b"\xff\xfe\n", b"relative.gguf\n", b"/nowhere/at/all.gguf\n", b"\0\n"):
        note.write_bytes(text)
        assert pick.recall(state) is None


# --- errors ---------------------------------------------------------------------------------------------------------


def _failing(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> int:
    def fail(*args: object) -> NoReturn:
        raise error

    monkeypatch.setattr(cli_options, "pick_model", fail)
    return app.run_cli(["solve"])


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (PinferError("the file is damaged", "make it again: pinfer split"), "the file is damaged; make it again: "),
        (PinferError("one\ntwo"), "pinfer: one two"),
        (OSError(28, "No space left on device", "/some/file"), "No space left on device: /some/file; free some space"),
        (PermissionError(13, "Permission denied", "/some/file"), "Permission denied: /some/file"),
        (MemoryError(), "out of memory"),
        (ImportError("No module named 'gguf'"), "gguf"),
        (ValueError("a\nb"), "internal error: ValueError: a b; rerun with PINFER_DEBUG=1 for the traceback"),
    ],
)
def test_errors_are_one_line_and_exit_code_1(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], error: BaseException, text: str
) -> None:
    assert _failing(monkeypatch, error) == 1
    shown = capsys.readouterr()
    assert shown.out == ""
    assert shown.err.count("\n") == 1
    assert text in shown.err
    assert shown.err.startswith("pinfer: ")


def test_debug_shows_the_traceback(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("PINFER_DEBUG", "1")
    assert _failing(monkeypatch, ValueError("unforeseen")) == 1
    assert "Traceback" in capsys.readouterr().err


def test_ctrl_c_is_130(monkeypatch: pytest.MonkeyPatch) -> None:
    assert _failing(monkeypatch, KeyboardInterrupt()) == 130


def test_a_closed_pipe_is_quiet(command: CommandLine) -> None:
    done = subprocess.run(
        ["bash", "-c", f"{sys.executable} -m pinfer solve --help | true; exit ${{PIPESTATUS[0]}}"],
        cwd=command.folder,
        env=command.environment({"PYTHONUNBUFFERED": "1"}),
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stderr == ""
    assert done.returncode in (0, 1)  # 0 if the help was written before the reader closed the pipe


# --- progress and tables --------------------------------------------------------------------------------------------


def test_progress_without_a_terminal_is_plain_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    clock = iter(range(0, 1000, 3))
    monkeypatch.setattr("pinfer.cli.ui.time.monotonic", lambda: float(next(clock)))
    progress = ui.stderr_progress()
    with progress.task("count", 4000, "tokens") as advance:
        for _ in range(4):
            advance(1000)
        progress.note("half a thought")
    shown = capsys.readouterr()
    assert shown.out == ""
    lines = shown.err.splitlines()
    assert lines[0] == "count: 1,000 of 4,000 tokens (25 %), 333 tokens/s, ETA 0:09"
    assert "half a thought" in lines
    assert lines[-1] == "count: 4,000 tokens in 15.0 s (267 tokens/s)"


class _Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def test_progress_on_a_terminal_is_a_bar_on_stderr(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    terminal = _Terminal()
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    monkeypatch.setattr(sys, "stderr", terminal)
    progress = ui.stderr_progress()
    with progress.task("write", 3 << 20, "bytes") as advance, progress.task("layers", 0, "layers") as inner:
        advance(3 << 20)
        inner(2)
        progress.note("[a note]")
    shown = terminal.getvalue()
    assert "3.0 MiB of 3.0 MiB" in shown
    assert "[a note]" in shown
    assert "\x1b[" in shown
    assert capsys.readouterr().out == ""


def test_tables_are_not_wrapped_in_a_pipe(capsys: pytest.CaptureFixture[str]) -> None:
    ui.print_table("title", ("layer", *(f"a rather long column {i}" for i in range(6))), [("1", *["[x]"] * 6)])
    shown = capsys.readouterr().out
    assert "a rather long column 5" in shown
    assert shown.count("[x]") == 6
    ui.print_facts([("name", "a [value] in brackets")])
    assert "a [value] in brackets" in capsys.readouterr().out


def test_json_has_no_nan(capsys: pytest.CaptureFixture[str]) -> None:
    ui.print_json({"ä": 1.5, "list": [1, 2]})
    assert json.loads(capsys.readouterr().out) == {"ä": 1.5, "list": [1, 2]}
    with pytest.raises(ValueError):
        ui.print_json({"x": float("nan")})


# --- flags reach the stages, and their defaults are the stages' own -------------------------------------------------


STAGES = {
    "profile": "ProfileOptions",
    "train": "TrainOptions",
    "solve": "SolveOptions",
    "split": "SplitOptions",
}


class _Caught(Exception):
    """Raised in place of a stage, with the options it was called with."""


def _options_of(monkeypatch: pytest.MonkeyPatch, name: str, *flags: str) -> Any:
    stage = importlib.import_module(f"pinfer.{name}")

    def catch(*arguments: object, **_: object) -> NoReturn:
        raise _Caught(next(each for each in arguments if dataclasses.is_dataclass(each)))

    monkeypatch.setattr(stage, {"eval": "evaluate", "run": "start"}.get(name, name), catch)
    caught: list[object] = []

    def keep(text: str) -> int:
        caught.append(sys.exc_info()[1])
        return 1

    monkeypatch.setattr(app, "fail", keep)
    assert app.run_cli([name, "x.gguf", *flags]) == 1
    (error,) = caught
    assert isinstance(error, _Caught), error
    return error.args[0]


def _left_at_default(options: Any) -> list[str]:
    """The names of the fields that have their default value."""
    default = type(options)()
    names = [field.name for field in dataclasses.fields(options)]
    return [name for name in names if getattr(options, name) == getattr(default, name)]


@pytest.mark.parametrize("name", STAGES)
def test_defaults_are_those_of_the_stage(monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    stage = importlib.import_module(f"pinfer.{name}")
    assert _options_of(monkeypatch, name) == getattr(stage, STAGES[name])()


def test_flags_of_eval_arrive(monkeypatch: pytest.MonkeyPatch) -> None:
    stage = importlib.import_module("pinfer.eval")
    assert _options_of(monkeypatch, "eval", "--text", "a.txt") == stage.EvalOptions(text=Path("a.txt"))
    words = "--text a.txt --tokens 1k -c 3 --exact -t 4 --device CPU --activation relu"
    given = _options_of(monkeypatch, "eval", *words.split())
    assert given == stage.EvalOptions(
        text=Path("a.txt"), n_tokens=1024, n_ctx=3, exact=True, activation="relu", n_threads=4, device="CPU"
    )


@pytest.mark.parametrize("name", ["run", "serve"])
def test_flags_of_run_and_serve_arrive(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    """Ours become options of the execution; llama.cpp's are kept as they are, whatever stands between them."""
    import pinfer.run as stage

    model = tmp_path / "x.gguf"
    model.write_bytes(b"GGUF")

    def catch(*words: object, **settings: object) -> NoReturn:
        raise _Caught((*words, settings))

    monkeypatch.setattr(stage, "start", catch)
    caught: list[object] = []

    def keep(text: str) -> int:
        caught.append(sys.exc_info()[1])
        return 1

    monkeypatch.setattr(app, "fail", keep)
    port = ("--port", "0") if name == "serve" else ()
    words = (*port, "-c", "7", "--exact", str(model), "--temp", "0", "--artifacts", "d", "--ignore-eos")
    more = ("--hot-device", "CPU", "--rpc", "h:1", "--activation", "relu", "-ngl", "all", "-fa", "on")
    assert app.run_cli([name, *words, *more]) == 1
    (error,) = caught
    assert isinstance(error, _Caught), error
    program, path, options, flags, settings = error.args[0]
    assert (program, path) == ("server" if name == "serve" else "cli", model)
    assert options == ExecutionOptions(exact=True, artefacts=Path("d"), device="CPU", activation="relu")
    assert settings["rpc"] == "h:1"
    forwarded = (("-c", "7"), ("--temp", "0"), ("--ignore-eos",), ("-ngl", "all"), ("-fa", "on"))
    assert flags.flags == ((port,) if port else ()) + forwarded


def test_all_layers_go_to_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    for flag in ("-ngl", "--gpu-layers"):
        assert _options_of(monkeypatch, "bench", flag, "all").n_gpu_layers == cli_options.ALL_LAYERS


@pytest.mark.parametrize("words", [("eval", "--text", "a.txt"), ("bench",)], ids=lambda w: w[0])
def test_american_spelling_is_accepted(monkeypatch: pytest.MonkeyPatch, words: tuple[str, ...]) -> None:
    assert _options_of(monkeypatch, *words, "--artifacts", "d").artefacts == Path("d")
    assert _options_of(monkeypatch, *words, "--no-artifacts").no_artefacts


def test_every_flag_of_the_other_commands_arrives(monkeypatch: pytest.MonkeyPatch) -> None:
    other_type = {"f16": "q8_0"}.get(train.TrainOptions().type, "f16")
    words = {
        "profile": "--dataset c4 --tokens 1k -c 3 --samples 4 -t 5 -ngl 6 --activation relu --force",
        "train": f"--recall 0.9 --max-rank 7 --type {other_type} --activation relu",
        "solve": "--vram 1G --ctx 2 -ub 3 --device d --machine m --time-limit 4 -ctk q8_0 -ctv q4_0 --activation relu",
        "split": "--down-type Q8_0 --down-kl auto --text a.txt --tokens 1k --verify --activation relu",
    }
    for name, flags in words.items():
        assert _left_at_default(_options_of(monkeypatch, name, *flags.split())) == [], name
    given = _options_of(monkeypatch, "solve", "--vram", "8G,4G", "--device", "A,B")
    assert (given.vram_list, given.device_names) == ((8 << 30, 4 << 30), ("A", "B"))


# --- the whole pipeline ---------------------------------------------------------------------------------------------

WAY = {
    "profile": ("--dataset", "text.txt", "--tokens", "2048"),
    "train": (),
    "solve": ("--device", "CPU", "--vram", "4M"),
    "split": ("--verify",),
    "eval": ("--text", "text.txt", "--tokens", "256"),
    "run": ("-p", "One day", "-n", "8", "--temp", "0"),
}
NEXT = {"profile": "train", "train": "solve", "solve": "split", "split": "run", "eval": "run"}


@dataclasses.dataclass(frozen=True)
class Way:
    """The output of every command, as tables and as JSON."""

    command: CommandLine
    tables: dict[str, Outcome]
    jsons: dict[str, Outcome]


@pytest.fixture(scope="module")
def way(tmp_path_factory: pytest.TempPathFactory) -> Way:
    folder = tmp_path_factory.mktemp("way")
    work = folder / "work"
    work.mkdir()
    shutil.copy(MODELS / "tiny-relu2.gguf", work)
    (work / "text.txt").write_text((ROOT / "docs" / "formats.md").read_text(encoding="utf-8"), encoding="utf-8")
    command = CommandLine(work, folder / "home")
    tables, jsons = {}, {}
    for name, flags in WAY.items():
        tables[name] = command(name, *flags)
        jsons[name] = command(name, *flags, "--json")
    return Way(command, tables, jsons)


@pytest.mark.parametrize("name", WAY)
def test_each_command_works(way: Way, name: str) -> None:
    for outcome in (way.tables[name], way.jsons[name]):
        assert outcome.code == 0, outcome.err
        assert "Traceback" not in outcome.err
        assert outcome.err_lines[0] in (
            "model: tiny-relu2.gguf (the only GGUF in this folder)",
            "model: tiny-relu2.gguf (the last one used in this folder)",
        )


def test_the_first_command_finds_the_only_model_the_others_the_last(way: Way) -> None:
    assert "the only GGUF" in way.tables["profile"].err_lines[0]
    assert "the last one used" in way.tables["train"].err_lines[0]


@pytest.mark.parametrize("name", WAY)
def test_stdout_is_one_json_object(way: Way, name: str) -> None:
    report = json.loads(way.jsons[name].out)
    assert isinstance(report, dict)
    assert report


@pytest.mark.parametrize("name", NEXT)
def test_the_next_command_is_suggested_on_stderr(way: Way, name: str) -> None:
    for outcome in (way.tables[name], way.jsons[name]):
        assert outcome.err_lines[-1].startswith(f"next: pinfer {NEXT[name]}")
        assert "next:" not in outcome.out


def test_the_suggested_command_is_valid(way: Way) -> None:
    words = shlex.split(way.tables["split"].err_lines[-1].removeprefix("next: pinfer "))
    outcome = way.command(*words, "-n", "4")
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith("Once upon a time")


def test_profile_prints_its_table(way: Way) -> None:
    shown = way.tables["profile"].out
    assert "2,048 tokens of text.txt" in shown
    assert "make 80 %" in shown
    report = json.loads(way.jsons["profile"].out)
    assert report["tokens"] == 2048
    whole = shown.splitlines()[-1]
    assert whole.startswith("whole model")
    assert f"{100 * report['active']:.1f} %" in whole
    assert [layer["layer"] for layer in report["layers"]] == list(range(len(report["layers"])))
    assert len(shown.splitlines()) == len(report["layers"]) + 4
    assert "tokens/s" in way.tables["profile"].err


def test_train_reports_recall_and_cost(way: Way) -> None:
    report = json.loads(way.jsons["train"].out)
    assert 0.9 < report["recall"] <= 1
    assert "recall" in way.tables["train"].out


def test_solve_keeps_the_budget_and_reports_the_gap(way: Way) -> None:
    report = json.loads(way.jsons["solve"].out)
    assert report["vram"] == 4 << 20
    assert sum(report["n_bytes"].values()) <= report["vram"]
    assert report["objective"] <= report["bound"] * (1 + 1e-9)
    for word in ("objective", "bound", "gap", "greedy", "expected", "hot neurons", "of 4.0 MiB"):
        assert word in way.tables["solve"].out


def test_split_writes_the_placement_and_verifies_it(way: Way) -> None:
    solved = json.loads(way.jsons["solve"].out)
    report = json.loads(way.jsons["split"].out)
    assert report["verified"] is True
    assert report["n_hot"] == sum(solved["n_hot"]) == sum(ffn["n_hot"] for ffn in solved["ffns"])
    assert report["n_hot"] + report["n_cold"] == sum(ffn["n_units"] * ffn["n_neurons"] for ffn in solved["ffns"])
    assert "verified" in way.tables["split"].out


def test_run_writes_only_text_to_stdout(way: Way) -> None:
    shown, report = way.tables["run"], json.loads(way.jsons["run"].out)
    assert shown.out == f"One day{report['text']}\n"
    assert shown.err_lines[-1].startswith("[ Prompt: ")
    assert report["mode"] == "predicted"
    # The hot neurons run on the device they were solved for, although it is not named again.
    assert 0.3 < report["on_device"] < 1


def test_no_temporary_file_is_left(way: Way) -> None:
    assert [path for path in way.command.folder.rglob("*") if ".tmp" in path.name] == []
    assert sorted(path.name for path in way.command.folder.iterdir()) == [
        "text.txt",
        "tiny-relu2.gguf",
        "tiny-relu2.gguf.pinfer",
    ]


def test_ctrl_c_keeps_what_was_counted(way: Way, tmp_path: Path) -> None:
    # More text than any machine reads before the first line of progress.
    long = tmp_path / "long.txt"
    long.write_text((way.command.folder / "text.txt").read_text(encoding="utf-8") * 200, encoding="utf-8")
    process = subprocess.Popen(
        [sys.executable, "-m", "pinfer", "profile", "--dataset", long, "--tokens", "256k", "--json"],
        cwd=way.command.folder,
        env=way.command.environment({"PINFER_HOME": str(way.command.home)}),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stderr is not None
    assert process.stdout is not None
    # The first line of progress shows that counting has begun.
    for line in process.stderr:
        if line.startswith("profile: ") and "ETA" in line:
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130, err
    report = json.loads(out)
    assert report["interrupted"] is True
    assert 0 < report["tokens"] < report["tokens_wanted"]


def test_several_models_are_an_error_until_one_is_named(command: CommandLine) -> None:
    for name in ("a.gguf", "b.gguf"):
        shutil.copy(MODELS / "tiny-relu2.gguf", command.folder / name)
    several = command("run", "-p", "One", "-n", "1")
    assert several.code == 1
    assert len(several.err_lines) == 1
    assert "a.gguf" in several.err
    assert "PINFER_MODEL" in several.err
    assert command("run", "a.gguf", "-p", "One", "-n", "1").code == 0
    again = command("run", "-p", "One", "-n", "1")
    assert again.code == 0
    assert again.err_lines[0] == "model: a.gguf (the last one used in this folder)"
    named = command("run", "-p", "One", "-n", "1", env={"PINFER_MODEL": "b.gguf"})
    assert named.err_lines[0] == "model: b.gguf ($PINFER_MODEL)"
    flag = command("run", "-m", "b.gguf", "-p", "One", "-n", "1")
    assert flag.code == 0
    assert not flag.err_lines[0].startswith("model:"), "a model that was typed needs no mention"
