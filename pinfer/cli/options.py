"""What several commands share: how sizes and counts are written, their common options, the model to work on."""

from __future__ import annotations

import os
import re
import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from pinfer.cli.pick import check_is_model, is_gguf, pick_model, remember

_SIZE = re.compile(r"(?P<number>\d+(?:\.\d*)?|\.\d+)\s*(?P<unit>[kmgt]?)(?P<tail>i?b?)", re.IGNORECASE | re.ASCII)


def parse_size(text: str | int) -> int:
    """Bytes in ``24G``, ``512M``, ``7.5GiB`` or ``1073741824``: K M G T and KiB … count by 1024, KB … by 1000."""
    if isinstance(text, int):  # Typer parses defaults as well
        return text
    match = _SIZE.fullmatch(text.strip())
    if match is None or (match["tail"].lower() in ("i", "ib") and not match["unit"]):
        raise typer.BadParameter(f"{text!r} is no size; write it like 24G, 512M, 7.5GiB or a number of bytes")
    base = 1000 if match["unit"] and match["tail"].lower() == "b" else 1024
    power = " kmgt".index(match["unit"].lower() or " ")
    number = match["number"]  # whole numbers keep every digit
    return int(number) * base**power if number.isdigit() else int(float(number) * base**power)


def parse_sizes(text: str, option: str) -> tuple[int, ...]:
    """Bytes in ``8G``, or in each of ``8G,4G``."""
    try:
        return tuple(parse_size(word) for word in text.split(","))
    except typer.BadParameter as error:
        raise typer.BadParameter(str(error), param_hint=option) from None


def parse_count(text: str | int) -> int:
    """A number of tokens, where ``128k`` is 131072."""
    try:
        return parse_size(text)
    except typer.BadParameter:
        raise typer.BadParameter(f"{text!r} is no number of tokens; write it like 2048 or 128k") from None


def parse_list(text: str, option: str) -> tuple[int, ...]:
    """``1,4,16`` as numbers; whoever asks says what they have to be."""
    try:
        return tuple(parse_size(word) for word in text.split(","))
    except typer.BadParameter:
        raise typer.BadParameter(
            f"{text!r} is no list of numbers; write it like 512 or 1,4,16", param_hint=option
        ) from None


def parse_servers(text: str) -> str:
    """``host:port[,host:port]``, checked for its form alone."""
    for server in text.split(","):
        host, _, port = server.partition(":")
        if not host or not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
            raise typer.BadParameter(f"{server!r} is no RPC server; write it like 192.168.1.5:50052")
    return text


def parse_layers(text: str | int) -> int:
    """A number of layers, or ``all`` of them."""
    if isinstance(text, str) and text.strip().lower() == "all":
        return 999  # as llama.cpp has it
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is no number of layers; write it like 32, or all") from None


# Names are llama.cpp's where llama.cpp has one.
ModelArg = Annotated[
    Path | None,
    typer.Argument(
        metavar="MODEL",
        help="GGUF model. Left out: $PINFER_MODEL, else the last one used in this folder, else the only GGUF here.",
        show_default=False,
    ),
]
ModelOpt = Annotated[Path | None, typer.Option("-m", "--model", help="The same as MODEL.", metavar="FILE")]
HubOpt = Annotated[
    str | None,
    typer.Option(
        "-hf",
        "-hfr",
        "--hf-repo",
        metavar="USER/REPO[:FILE-OR-QUANT]",
        help="Fetch the model from the Hugging Face hub, once. [default quant: Q4_K_M, else Q8_0, else the first]",
    ),
]
OfflineOpt = Annotated[bool, typer.Option("--offline", help="Take what the hub's cache has; never use the network.")]
JsonOpt = Annotated[bool, typer.Option("--json", help="Print the report as JSON.")]
ThreadsOpt = Annotated[
    int | None, typer.Option("-t", "--threads", help="CPU threads. [default: physical cores]", min=1, metavar="N")
]
DeviceOpt = Annotated[
    str | None,
    typer.Option("--device", "-dev", metavar="NAME", help="ggml device of the hot neurons. [default: as solved]"),
]
RpcOpt = Annotated[
    str | None,
    typer.Option(
        "--rpc",
        envvar="PINFER_RPC",
        parser=parse_servers,
        metavar="HOST:PORT[,…]",
        help="RPC servers whose devices to use, as RPC0, RPC1, …",
    ),
]
ActivationOpt = Annotated[
    Literal["relu", "relu2", "reglu", "drelu"] | None,
    typer.Option("--activation", help="What the FFN computes, where the GGUF does not say so."),
]


def use_servers(rpc: str | None) -> None:
    """Makes devices of the servers that ``--rpc`` names, before anything asks for devices."""
    if rpc is not None:
        from pinfer.llama.rpc import connect

        connect(rpc)


@dataclass(frozen=True)
class Choice:
    """The model as the user named it, or did not: MODEL, ``-m``, ``-hf``."""

    model: Path | None
    flag: Path | None = None
    repo: str | None = None
    offline: bool = False

    def path(self) -> Path:
        """The file to work on, fetched if need be.

        It is said on stderr when it was not typed, and remembered for the next command in this folder.
        """
        from pinfer.cli import ui

        self.check()
        if self.repo is not None:
            from pinfer.hub.models import fetch_gguf

            path = fetch_gguf(self.repo, ui.stderr_progress(), offline=self.offline)
            ui.say(f"model: {path.name} of {self.repo.partition(':')[0]}")
        else:
            pick = pick_model(self.model or self.flag)
            path = pick.path
            if pick.why:
                ui.say(f"model: {path} ({pick.why})")
        check_is_model(path)
        if is_gguf(path):
            remember(path)
        return path

    def check(self) -> None:
        """Refuses two models at once, and has everything that may ask the hub stay offline where that is wanted."""
        named = [str(name) for name in dict.fromkeys((self.model, self.flag, self.repo)) if name is not None]
        if len(named) > 1:
            raise typer.BadParameter(f"two models named, {named[0]} and {named[1]}", param_hint="MODEL")
        if self.offline:
            os.environ["HF_HUB_OFFLINE"] = "1"  # data sets come from the hub as well

    def say_next(self, command: str, rest: str = "") -> None:
        """Say the next command to type; the model is in it when it was typed this time."""
        from pinfer.cli import ui

        words = ["pinfer", command]
        if self.repo is not None:
            words += ["-hf", shlex.quote(self.repo)]
        elif model := self.model or self.flag:
            words.append(shlex.quote(str(model)))
        ui.say("next: " + " ".join(words + ([rest] if rest else [])))
