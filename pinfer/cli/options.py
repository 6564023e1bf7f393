"""Shared by the commands: parsing of sizes and counts, the flags, and the choice of the model."""

from __future__ import annotations

import functools
import inspect
import os
import re
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import typer

from pinfer.cli import ui
from pinfer.cli.pick import is_gguf, pick_model, remember

ALL_LAYERS = 999

_Settings = TypeVar("_Settings")

_SIZE = re.compile(r"(?P<number>\d+(?:\.\d*)?|\.\d+)\s*(?P<unit>[kmgt]?)(?P<tail>i?b?)", re.IGNORECASE | re.ASCII)


def parse_size(text: str | int) -> int:
    """Bytes in ``24G``, ``512M``, ``7.5GiB`` or ``1073741824``. K and KiB are 1024 bytes, KB is 1000, and so on."""
    if isinstance(text, int):  # Typer parses defaults as well
        return text
    match = _SIZE.fullmatch(text.strip())
    if match is None or (match["tail"].lower() in ("i", "ib") and not match["unit"]):
        raise typer.BadParameter(f"{text!r} is not a valid size (like 24G, 512M, 7.5GiB or a number of bytes)")
    base = 1000 if match["unit"] and match["tail"].lower() == "b" else 1024
    power = " kmgt".index(match["unit"].lower() or " ")
    number = match["number"]  # whole numbers keep every digit
    return int(number) * base**power if number.isdigit() else int(float(number) * base**power)


def parse_sizes(text: str, option: str) -> tuple[int, ...]:
    """Bytes of each size in ``8G`` or ``8G,4G``."""
    try:
        return tuple(parse_size(word) for word in text.split(","))
    except typer.BadParameter as error:
        raise typer.BadParameter(str(error), param_hint=option) from None


def parse_count(text: str | int) -> int:
    """A number of tokens, where ``128k`` is 131072."""
    try:
        return parse_size(text)
    except typer.BadParameter:
        raise typer.BadParameter(f"{text!r} is not a valid number of tokens (like 2048 or 128k)") from None


def parse_list(text: str, option: str) -> tuple[int, ...]:
    """Numbers in a list like ``1,4,16``. The stage checks their range."""
    try:
        return tuple(parse_size(word) for word in text.split(","))
    except typer.BadParameter:
        raise typer.BadParameter(
            f"{text!r} is not a valid list of numbers (like 512 or 1,4,16)", param_hint=option
        ) from None


def parse_servers(text: str) -> str:
    """``host:port[,host:port]``; only the form is checked."""
    for server in text.split(","):
        host, _, port = server.partition(":")
        if not host or not (port.isascii() and port.isdigit() and 0 < int(port) < 65536):
            raise typer.BadParameter(f"{server!r} is not a valid RPC server (like 192.168.1.5:50052)")
    return text


def parse_picture(text: str | Path) -> Path:
    """A file whose name ends in .png or .svg."""
    path = Path(text)
    if path.suffix.lower() not in (".png", ".svg"):
        raise typer.BadParameter(f"{str(path)!r} is not a valid picture (name a file like picture.png or picture.svg)")
    return path


def parse_layers(text: str | int) -> int:
    """A number of layers, or ``all`` of them."""
    if isinstance(text, str) and text.strip().lower() == "all":
        return ALL_LAYERS
    try:
        return int(text)
    except ValueError:
        raise typer.BadParameter(f"{text!r} is not a valid number of layers (like 32, or all)") from None


# --- flags, each declared once; names are llama.cpp's where llama.cpp has one ----------------------------------------


def layers_option(text: str) -> Any:
    """``-ngl``, whose meaning depends on the command."""
    names = ("-ngl", "--n-gpu-layers", "--gpu-layers")
    return typer.Option(*names, parser=parse_layers, metavar="N|all", help=text, show_default=False)


ModelArg = Annotated[
    Path | None,
    typer.Argument(
        metavar="MODEL",
        help="GGUF model. [default: $PINFER_MODEL, else the last one used in this folder, else the only GGUF here]",
        show_default=False,
    ),
]
ModelOpt = Annotated[Path | None, typer.Option("-m", "--model", help="Same as MODEL.", metavar="FILE")]
HubOpt = Annotated[
    str | None,
    typer.Option(
        "-hf",
        "-hfr",
        "--hf-repo",
        metavar="USER/REPO[:FILE-OR-QUANT]",
        help="Download the model from the Hugging Face hub. [default quant: Q4_K_M, else Q8_0, else the first]",
    ),
]
OfflineOpt = Annotated[bool, typer.Option("--offline", help="Use the hub's local cache only, never the network.")]
JsonOpt = Annotated[bool, typer.Option("--json", help="Print the report as JSON.")]
PictureOpt = Annotated[
    Path | None,
    typer.Option(
        "-o",
        "--output",
        parser=parse_picture,
        metavar="FILE.png|svg",
        help="Write the picture to this file. [default: draw in the terminal]",
    ),
]
PictureJsonOpt = Annotated[bool, typer.Option("--json", help="Print the data of the picture as JSON.")]
ThreadsOpt = Annotated[
    int | None, typer.Option("-t", "--threads", help="CPU threads. [default: physical cores]", min=1, metavar="N")
]
LayersOpt = Annotated[int | None, layers_option("Layers whose attention is on the GPU. [default: as solved]")]
WindowOpt = Annotated[
    int,
    typer.Option("-c", "--ctx-size", min=0, metavar="N", help="Context in tokens; 0 uses the model's, at most 2048."),
]
DatasetOpt = Annotated[
    str, typer.Option("--dataset", metavar="c4|wikitext|FILE|-", help="Text to count activations on; - is stdin.")
]
DeviceOpt = Annotated[
    str | None,
    typer.Option(
        "--hot-device",
        "--device",
        "-dev",
        metavar="NAME[,NAME]",
        help="ggml devices of the hot neurons, or none. [default: as solved]",
    ),
]
HotDeviceOpt = Annotated[
    str | None,
    typer.Option(
        "--hot-device", metavar="NAME[,NAME]", help="ggml devices of the hot neurons, or none. [default: as solved]"
    ),
]
VramOpt = Annotated[
    str | None,
    typer.Option(
        "--vram",
        metavar="SIZE[,SIZE]",
        help="Device memory to use, like 24G: the total for all devices, or one size for each (8G,4G). "
        "[default: all that is free]",
    ),
]
ReservedOpt = Annotated[
    int | None, typer.Option("-c", "--ctx-size", "--ctx", min=1, metavar="N", help="Context to reserve memory for.")
]
PlacedOnOpt = Annotated[
    str | None,
    typer.Option(
        "--device",
        "-dev",
        metavar="NAME[,NAME]",
        help="ggml devices; dense layers go to the first. [default: the first GPU]",
    ),
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
    typer.Option("--activation", help="Activation of the FFN, if the model does not name it."),
]
CacheTypeKOpt = Annotated[
    str | None,
    typer.Option("-ctk", "--cache-type-k", metavar="TYPE", help="Type of the K cache. [default: as solved, else f16]"),
]
CacheTypeVOpt = Annotated[
    str | None,
    typer.Option("-ctv", "--cache-type-v", metavar="TYPE", help="Type of the V cache. [default: as solved, else f16]"),
]
UbatchOpt = Annotated[
    int, typer.Option("-ub", "--ubatch-size", min=1, metavar="N", help="Physical batch: tokens computed together.")
]
ExactOpt = Annotated[bool, typer.Option("--exact", help="Lossless: do not use the predictor.")]
DenseOpt = Annotated[bool, typer.Option("--dense", help="Use stock libllama, for comparison.")]
ArtefactsOpt = Annotated[
    Path | None,
    typer.Option(
        "--artefacts",
        "--artifacts",
        metavar="FOLDER",
        help="Folder of the artefacts. [default: where pinfer writes them]",
    ),
]
NoArtefactsOpt = Annotated[bool, typer.Option("--no-artefacts", "--no-artifacts", help="Use only the model file.")]


# --- from flags to settings -------------------------------------------------------------------------------------------


def settings(kind: Callable[..., _Settings], flags: Mapping[str, Any]) -> _Settings:
    """The options of a stage (a dataclass), filled from the flags with the same names."""
    names = inspect.signature(kind).parameters
    return kind(**{name: flags[name] for name in names if name in flags})


def with_model(command: Callable[..., Any]) -> Callable[..., Any]:
    """Adds the flags that choose the model to a command whose first parameter is a `Choice`."""
    of_choice = {"model": ModelArg, "flag": ModelOpt, "repo": HubOpt, "offline": OfflineOpt}
    keyword = inspect.Parameter.KEYWORD_ONLY
    added = [
        inspect.Parameter(name, keyword, annotation=annotation, default=False if name == "offline" else None)
        for name, annotation in of_choice.items()
    ]
    _, *own = inspect.signature(command, eval_str=True).parameters.values()

    @functools.wraps(command)
    def chosen(**flags: Any) -> Any:
        return command(Choice(**{name: flags.pop(name) for name in of_choice}), **flags)

    parameters = [added[0], *(p.replace(kind=keyword) for p in own), *added[1:]]
    chosen.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return chosen


def use_servers(rpc: str | None) -> None:
    """Registers the devices of the servers in ``--rpc``. Call it before anything lists devices."""
    if rpc is not None:
        from pinfer.llama.rpc import connect

        connect(rpc)


@dataclass(frozen=True)
class Choice:
    """The model as the user chose it: MODEL, ``-m``, ``-hf``, or none of them."""

    model: Path | None
    flag: Path | None = None
    repo: str | None = None
    offline: bool = False

    def path(self) -> Path:
        """The file to work on, downloaded if needed, and remembered for the next command in this folder.

        Printed on stderr if the user did not type it.
        """
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
        from pinfer.model import check_is_model

        check_is_model(path)
        if is_gguf(path):
            remember(path)
        return path

    def check(self) -> None:
        """Raises a usage error for two models. With ``--offline``, keeps this process off the network."""
        named = [str(name) for name in dict.fromkeys((self.model, self.flag, self.repo)) if name is not None]
        if len(named) > 1:
            raise typer.BadParameter(f"two models were given, {named[0]} and {named[1]}", param_hint="MODEL")
        if self.offline:
            os.environ["HF_HUB_OFFLINE"] = "1"  # also for data sets

    def say_next(self, command: str, rest: str = "") -> None:
        """Print the next command to type."""
        ui.say(f"next: {self.command(command, rest)}")

    def command(self, name: str, rest: str = "") -> str:
        """A command on this model as the user would type it. It names the model if the user did."""
        words = ["pinfer", name]
        if self.repo is not None:
            words += ["-hf", shlex.quote(self.repo)]
        elif model := self.model or self.flag:
            words.append(shlex.quote(str(model)))
        return " ".join(words + ([rest] if rest else []))
