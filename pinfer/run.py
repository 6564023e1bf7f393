"""Text from a model: starts the native runner, which streams it."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Literal

from pinfer.errors import PinferError
from pinfer.llama.plugin import runner_path


@dataclass(frozen=True)
class RunOptions:
    """Settings of ``pinfer run``; names and defaults are llama.cpp's where it has them. None: the runner decides."""

    prompt: str | None = None  # neither a prompt nor a file: chat
    prompt_file: Path | None = None  # "-" is stdin
    n_predict: int = -1  # -1: until the model ends or the context is full
    conversation: bool | None = None
    system_prompt: str | None = None
    escape: bool = True
    display_prompt: bool = True

    n_ctx: int | None = None  # 0: the model's
    n_batch: int = 2048
    n_ubatch: int = 512
    n_batch_dense: int | None = None  # from this many tokens on a batch is computed densely
    n_threads: int | None = None
    n_threads_batch: int | None = None
    n_gpu_layers: int | None = None
    flash_attn: Literal["on", "off", "auto"] = "auto"
    cache_type_k: str = "f16"
    cache_type_v: str = "f16"
    mlock: bool = False
    no_mmap: bool = False

    seed: int = -1
    temp: float = 0.8
    top_k: int = 40
    top_p: float = 0.95
    min_p: float = 0.05
    repeat_penalty: float = 1.0
    repeat_last_n: int = 64
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    grammar: str | None = None
    grammar_file: Path | None = None
    ignore_eos: bool = False

    exact: bool = False  # without the predictor
    dense: bool = False  # stock libllama
    artefacts: Path | None = None  # folder; None: where the other commands write
    no_artefacts: bool = False
    device: str | None = None  # ggml device of the hot neurons, or "none"
    rpc: str | None = None  # host:port[,host:port] of RPC servers; None: $PINFER_RPC
    activation: str | None = None
    verbose: bool = False
    json: bool = False


def runner_arguments(model_path: Path, options: RunOptions) -> list[str]:
    """The runner's command line, without the program: only what differs from its defaults."""
    default = RunOptions()
    values: list[tuple[str, object, object]] = [
        ("-p", options.prompt, default.prompt),
        ("-f", options.prompt_file, default.prompt_file),
        ("-n", options.n_predict, default.n_predict),
        ("-sys", options.system_prompt, default.system_prompt),
        ("-c", options.n_ctx, default.n_ctx),
        ("-b", options.n_batch, default.n_batch),
        ("-ub", options.n_ubatch, default.n_ubatch),
        ("--n-batch-dense", options.n_batch_dense, default.n_batch_dense),
        ("-t", options.n_threads, default.n_threads),
        ("-tb", options.n_threads_batch, default.n_threads_batch),
        ("-ngl", options.n_gpu_layers, default.n_gpu_layers),
        ("-fa", options.flash_attn, default.flash_attn),
        ("-ctk", options.cache_type_k, default.cache_type_k),
        ("-ctv", options.cache_type_v, default.cache_type_v),
        ("-s", options.seed, default.seed),
        ("--temp", options.temp, default.temp),
        ("--top-k", options.top_k, default.top_k),
        ("--top-p", options.top_p, default.top_p),
        ("--min-p", options.min_p, default.min_p),
        ("--repeat-penalty", options.repeat_penalty, default.repeat_penalty),
        ("--repeat-last-n", options.repeat_last_n, default.repeat_last_n),
        ("--presence-penalty", options.presence_penalty, default.presence_penalty),
        ("--frequency-penalty", options.frequency_penalty, default.frequency_penalty),
        ("--grammar", options.grammar, default.grammar),
        ("--grammar-file", options.grammar_file, default.grammar_file),
        ("--artefacts", options.artefacts, default.artefacts),
        ("--device", options.device, default.device),
        ("--rpc", options.rpc, default.rpc),
        ("--activation", options.activation, default.activation),
    ]
    flags = [
        ("-cnv", options.conversation is True),
        ("-no-cnv", options.conversation is False),
        ("--no-escape", not options.escape),
        ("--no-display-prompt", not options.display_prompt),
        ("--mlock", options.mlock),
        ("--no-mmap", options.no_mmap),
        ("--ignore-eos", options.ignore_eos),
        ("--exact", options.exact),
        ("--dense", options.dense),
        ("--no-artefacts", options.no_artefacts),
        ("--verbose", options.verbose),
        ("--json", options.json),
    ]
    arguments = ["-m", str(model_path)]
    for name, value, left_out in values:
        if value != left_out:
            arguments += [name, str(value)]
    return arguments + [name for name, given in flags if given]


def run(model_path: Path, options: RunOptions) -> int:
    """Run the model with the terminal's stdin, stdout and stderr; returns the runner's exit code.

    0, 1 after an error, which the runner has told, 2 for wrong usage, 130 after Ctrl-C, 141 when nobody reads stdout
    any more. Raises PinferError when the runner is missing or is killed.
    """
    command = [str(runner_path()), *runner_arguments(model_path, options)]
    sys.stdout.flush()
    sys.stderr.flush()
    try:
        runner = subprocess.Popen(command)
    except (OSError, ValueError) as error:  # ValueError: a NUL byte in an argument
        raise PinferError(f"cannot start {command[0]} ({error})", "build it again: make build") from error
    with _ctrl_c_for(runner):
        code = runner.wait()
    if code == 127:
        raise PinferError(f"{command[0]} cannot find its libraries", "build it again: make build")
    if code < 0:
        raise PinferError(f"the runner was ended by {_signal_name(-code)}{_likely_cause(-code)}", "run again with -v")
    return code


@contextmanager
def _ctrl_c_for(runner: subprocess.Popen[bytes]) -> Iterator[None]:
    """While the runner works, Ctrl-C is its business; whatever else ends this process ends the runner too.

    A terminal sends Ctrl-C to both processes. Where there is none (a service, a script), the signal may have come to
    this one alone, and is passed on.
    """

    def pass_on(signum: int, frame: FrameType | None) -> None:
        if not _in_foreground():
            runner.send_signal(signal.SIGINT)

    in_main_thread = threading.current_thread() is threading.main_thread()
    before = signal.signal(signal.SIGINT, pass_on) if in_main_thread else None
    try:
        yield
    finally:
        if runner.poll() is None:
            runner.terminate()
            runner.wait()
        if in_main_thread:
            signal.signal(signal.SIGINT, before)


def _in_foreground() -> bool:
    """Whether a terminal sends its Ctrl-C to this process."""
    try:
        terminal = os.open("/dev/tty", os.O_RDONLY | os.O_NOCTTY)
    except OSError:
        return False
    try:
        return os.tcgetpgrp(terminal) == os.getpgrp()
    except OSError:
        return False
    finally:
        os.close(terminal)


def _signal_name(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _likely_cause(number: int) -> str:
    return ", probably for want of memory" if number == signal.SIGKILL else ""
