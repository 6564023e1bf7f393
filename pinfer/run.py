"""Text from a model: becomes the runner, which is llama.cpp's own program with the plugin configured for this model."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Literal, NoReturn

from pinfer.errors import PinferError
from pinfer.execution import NO_DEVICE, Execution, ExecutionOptions, decide
from pinfer.llama.engine import NO_FLASH_ATTENTION
from pinfer.llama.plugin import runner_path
from pinfer.model import open_model

Program = Literal["completion", "cli", "server"]
"""llama.cpp's programs: text after a prompt, chat in the terminal, HTTP server."""

_PROMPT = ("-p", "--prompt", "-f", "--file", "-bf", "--binary-file")
_SYSTEM_PROMPT = ("-sys", "--system-prompt", "-sysf", "--system-prompt-file")
_CHAT = ("-cnv", "--conversation")
_NO_CHAT = ("-no-cnv", "--no-conversation")
_THREADS = ("-t", "--threads")
_CONTEXT = ("-c", "--ctx-size")
_LAYERS = ("-ngl", "--gpu-layers", "--n-gpu-layers")
_FLASH_ATTENTION = ("-fa", "--flash-attn")
_DEVICE = ("-dev", "--device")
_CACHE_K = ("-ctk", "--cache-type-k")
_CACHE_V = ("-ctv", "--cache-type-v")
_FILES = (
    "-f",
    "--file",
    "-bf",
    "--binary-file",
    "-sysf",
    "--system-prompt-file",
    "--grammar-file",
    "--chat-template-file",
)
_KEY_FILE = ("--api-key-file",)
_DRAFT = ("-md", "--model-draft", "--spec-draft-model")


@dataclass(frozen=True)
class Flag:
    """A flag of one of llama.cpp's programs."""

    n_values: int
    variable: str
    """environment variable that sets it as well; empty: none"""


@cache
def flags_of(program: Program) -> Mapping[str, Flag]:
    """Every spelling of every flag of the program, as the program itself lists them."""
    return _all_flags()[program]


@cache
def _all_flags() -> Mapping[str, Mapping[str, Flag]]:
    command = [str(runner_path()), "flags"]
    try:
        listed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    except (OSError, subprocess.CalledProcessError) as error:
        raise PinferError(f"{command[0]} does not work ({error})", "build it again: make build") from error
    flags: dict[str, dict[str, Flag]] = {}
    for line in listed.splitlines():
        program, name, n_values, variable = line.split("\t")
        flags.setdefault(program, {})[name] = Flag(int(n_values), variable)
    return flags


@dataclass(frozen=True)
class LlamaFlags:
    """What the user asked of llama.cpp: each flag with its values, in order."""

    flags: tuple[tuple[str, ...], ...] = ()

    def given(self, names: Iterable[str]) -> bool:
        """Whether a flag of these names was typed."""
        wanted = set(names)
        return any(flag[0] in wanted for flag in self.flags)

    def value(self, program: Program, names: Sequence[str]) -> str | None:
        """The value of a flag, typed or from its environment variable; the last one counts."""
        for flag in reversed(self.flags):
            if flag[0] in names:
                return flag[-1]
        variable = next((flag.variable for name, flag in flags_of(program).items() if name in names), "")
        return os.environ.get(variable) if variable else None

    def without(self, names: Iterable[str]) -> LlamaFlags:
        left_out = set(names)
        return LlamaFlags(tuple(flag for flag in self.flags if flag[0] not in left_out))

    def check_files(self) -> None:
        """Raises PinferError where a file cannot be read: llama.cpp would answer with its whole usage."""
        for name, *values in self.flags:
            if name in (*_FILES, *_KEY_FILE) and values and values[-1] != "-":
                try:
                    Path(values[-1]).open("rb").close()
                except (OSError, ValueError) as error:
                    cause = getattr(error, "strerror", None) or error
                    raise PinferError(f"{name} {values[-1]}: {cause}", "name a file that can be read") from error

    def words(self) -> list[str]:
        """For a command line; stdin, which llama.cpp's programs have no word for, is named by its file."""
        flags = (("-f", "/dev/stdin") if flag in (("-f", "-"), ("--file", "-")) else flag for flag in self.flags)
        return [word for flag in flags for word in flag]


def choose_program(flags: LlamaFlags) -> tuple[Program, LlamaFlags]:
    """A prompt asks for its continuation, anything else for a chat, unless a flag says which; that flag is used up."""
    wants_chat = flags.given(_CHAT) or flags.given(_SYSTEM_PROMPT) or not flags.given(_PROMPT)
    program: Program = "cli" if wants_chat and not flags.given(_NO_CHAT) else "completion"
    return program, flags.without((*_CHAT, *_NO_CHAT))


@dataclass(frozen=True)
class Start:
    """A program to become, and how it will compute the model."""

    command: list[str]
    execution: Execution


def start(
    program: Program,
    model: Path,
    options: ExecutionOptions,
    flags: LlamaFlags,
    *,
    rpc: str | None = None,
    as_json: bool = False,
) -> Start:
    """Choose what the program uses. What the user has chosen by llama.cpp's flags stays as it is.

    Raises PinferError for a model or artefacts that cannot be used.
    """
    flags.check_files()
    options = replace(
        options,
        n_threads=_number(flags.value(program, _THREADS), least=1),
        n_ctx=_number(flags.value(program, _CONTEXT), least=0),
        n_gpu_layers=_number(flags.value(program, _LAYERS), least=0),
    )
    execution = decide(open_model(model, activation=options.activation), options)
    command = [str(runner_path()), program, *_plugin_flags(execution)]
    draft = flags.value(program, _DRAFT)
    if draft is not None and not options.dense:
        beside = decide(open_model(Path(draft)), replace(options, activation=None, artefacts=None, device=None))
        command += _plugin_flags(beside)
    if rpc is not None:
        command += ["--pinfer-rpc", rpc]
    if as_json:
        command.append("--pinfer-json")

    def choose(names: Sequence[str], value: object) -> None:
        if flags.value(program, names) is None:
            command.extend((names[0], str(value)))

    command += ["-m", str(model)]
    choose(_THREADS, execution.n_threads)
    choose(_CONTEXT, execution.n_ctx)
    if execution.plugin is not None:
        choose(_LAYERS, execution.n_gpu_layers)
    for names, kind in zip((_CACHE_K, _CACHE_V), execution.cache_types, strict=True):
        if kind != "f16":
            choose(names, kind)
    if options.device == NO_DEVICE:
        choose(_DEVICE, "none")
    if execution.model.arch in NO_FLASH_ATTENTION:
        choose(_FLASH_ATTENTION, "off")
        if flags.value(program, _FLASH_ATTENTION) not in (None, "off"):
            raise PinferError(f"libllama has no flash attention for {execution.model.arch} models", "leave out -fa")
    if program == "completion":
        command.append(_NO_CHAT[0])
    return Start(command + flags.words(), execution)


def _plugin_flags(execution: Execution) -> list[str]:
    """How the runner is told what the plugin computes; none for stock libllama."""
    plugin = execution.plugin
    if plugin is None:
        return []
    words = ["--pinfer-model", str(execution.model.path)]
    if plugin.activation is not None:
        words += ["--pinfer-activation", plugin.activation]
    if plugin.activation_threshold:
        words += ["--pinfer-threshold", repr(plugin.activation_threshold)]
    for name, path in (("predictor", plugin.predictor), ("cold", plugin.cold)):
        if path is not None:
            words += [f"--pinfer-{name}", str(path)]
    for path in plugin.hot_paths:
        words += ["--pinfer-hot", str(path)]
    needed = execution.vram_needed or (0,) * len(execution.devices)
    for device, n_bytes in zip(execution.devices, needed, strict=False):
        words += ["--pinfer-device", f"{device}={n_bytes}"]
    if execution.vram:
        words += ["--pinfer-vram", str(execution.vram)]
    return words


def _number(text: str | None, least: int) -> int | None:
    """A flag's number, None where it is missing or where llama.cpp will have its own words about it."""
    try:
        number = int(text) if text is not None else None
    except ValueError:
        return None
    return number if number is None or number >= least else None


def wait_settings() -> dict[str, str]:
    """How long idle threads spin, unless the user has said so.

    Spinning for long slows a busy machine down many times over, and not spinning at all costs a third of the speed of
    a quiet one (docs/benchmarks.md has both, and what lies between).
    """
    chosen = any(name in os.environ for name in ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT"))
    return {} if chosen else {"GOMP_SPINCOUNT": "1000"}


def become(command: list[str], environment: Mapping[str, str] | None = None) -> NoReturn:
    """Replace this process by the command, which has its terminal, its signals and its exit code from then on."""
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        os.execve(command[0], command, {**wait_settings(), **os.environ, **(environment or {})})
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in an argument
        raise PinferError(f"cannot start {command[0]} ({error})", "build it again: make build") from error
