"""The runner as `pinfer run` starts it, without the seconds that Python itself takes to start."""

from __future__ import annotations

import json
import subprocess
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pinfer.execution import ExecutionOptions
from pinfer.run import LlamaFlags, choose_program, flags_of, start


@dataclass(frozen=True)
class Outcome:
    """What a run left: exit code and both streams."""

    code: int
    raw: bytes
    err: str

    @property
    def out(self) -> str:
        return self.raw.decode("utf-8")

    @property
    def json(self) -> dict[str, Any]:
        assert self.code == 0, self.err
        value = json.loads(self.out)
        assert isinstance(value, dict)
        return value

    def error(self) -> str:
        """The one line of an error."""
        assert self.code == 1, (self.code, self.err)
        assert not self.raw
        (line,) = self.err.splitlines()
        assert line.startswith("pinfer: ")
        return line


def parse_flags(*words: object) -> LlamaFlags:
    """llama.cpp's flags, each with its values."""
    texts = [str(word) for word in words]
    known = {**flags_of("completion"), **flags_of("cli"), **flags_of("server")}
    flags = []
    while texts:
        n = 1 + known[texts[0]].n_values
        flags.append(tuple(texts[:n]))
        del texts[:n]
    return LlamaFlags(tuple(flags))


def run_command(
    model: Path, *words: object, as_json: bool = False, rpc: str | None = None, **options: Any
) -> list[str]:
    """The runner's command line for `pinfer run` with llama.cpp's flags as words and pinfer's own as keywords."""
    program, flags = choose_program(parse_flags(*words))
    return start(program, model, ExecutionOptions(**options), flags, rpc=rpc, as_json=as_json).command


def run(
    model: Path,
    *words: object,
    stdin: str | bytes = b"",
    timeout: float = 200,
    as_json: bool = False,
    rpc: str | None = None,
    **options: Any,
) -> Outcome:
    """Run it to its end."""
    data = stdin.encode() if isinstance(stdin, str) else stdin
    command = run_command(model, *words, as_json=as_json, rpc=rpc, **options)
    done = subprocess.run(command, input=data, capture_output=True, timeout=timeout, check=False)
    return Outcome(done.returncode, done.stdout, done.stderr.decode("utf-8", "replace"))
