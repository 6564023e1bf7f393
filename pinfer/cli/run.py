"""``pinfer run`` and ``pinfer serve`` on the command line: a few flags of ours, all others are llama.cpp's."""

from __future__ import annotations

import difflib
import subprocess
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from typer.core import TyperCommand

from pinfer.cli.options import (
    ActivationOpt,
    ArtefactsOpt,
    Choice,
    DenseOpt,
    ExactOpt,
    HotDeviceOpt,
    JsonOpt,
    NoArtefactsOpt,
    RpcOpt,
    settings,
    with_model,
)

if TYPE_CHECKING:
    from typer._click.core import Context, Parameter

    from pinfer.execution import Execution, ExecutionOptions
    from pinfer.run import Flag, LlamaFlags, Program

_FLAGS_OF_LLAMA = "pinfer.flags_of_llama"
_EPILOG = {
    "run": "All other flags go to llama.cpp, like -p TEXT, -f FILE, -n 128, -c 4096, -t 8, --temp 0, -sys TEXT, "
    "--grammar-file FILE; pinfer run --help-all lists them.",
    "serve": "All other flags go to llama.cpp's server, like --host ADDRESS, --port N, -np 4, -c 16384, --api-key KEY, "
    "--metrics, -md DRAFT; pinfer serve --help-all lists them.",
}
_PLACES: Mapping[Program, str] = {
    "completion": "a prompt (-p)",
    "cli": "a chat (without -p)",
    "server": "pinfer serve",
}

HelpAllOpt = Annotated[bool, typer.Option("--help-all", help="List llama.cpp's flags.")]


class ForwardingCommand(TyperCommand):
    """A command that keeps its own flags and collects llama.cpp's, with their values, for the program to come."""

    def parse_args(self, ctx: Context, args: list[str]) -> list[str]:
        own = {name: option for option in self.get_params(ctx) for name in (*option.opts, *option.secondary_opts)}
        mine: list[str] = []
        others: list[tuple[str, ...]] = []
        i = 0
        while i < len(args):
            word, has_value = args[i], False
            name = word.partition("=")[0] if word.startswith("--") else word
            if name in own:
                has_value = name == word and not getattr(own[name], "is_flag", False)
                mine += args[i : i + 1 + has_value]
                i += 1 + has_value
            elif word.startswith("-") and len(word) > 1:
                name = word.replace("_", "-") if word.startswith("--") else word  # llama.cpp takes both
                flag = _known(ctx, name, own)
                others.append((name, *args[i + 1 : i + 1 + flag.n_values]))
                i += 1 + flag.n_values
            else:
                mine.append(word)
                i += 1
        rest = super().parse_args(ctx, mine)
        from pinfer.run import LlamaFlags

        ctx.meta[_FLAGS_OF_LLAMA] = LlamaFlags(tuple(others))
        return rest


def _known(ctx: Context, name: str, own: Mapping[str, Parameter]) -> Flag:
    """The flag of any of llama.cpp's programs; a usage error names what it is close to."""
    from pinfer.run import flags_of

    known = {name: flag for program in _PLACES for name, flag in flags_of(program).items()}
    if name not in known:
        close = difflib.get_close_matches(name, [*own, *known], n=1, cutoff=0.75)
        ctx.fail(f"there is no flag {name}" + (f", did you mean {close[0]}?" if close else ""))
    return known[name]


def _check_flags(ctx: typer.Context, program: Program, flags: LlamaFlags) -> None:
    """A usage error where a flag is not one of this program, or has no value."""
    from pinfer.run import flags_of

    for name, *values in flags.flags:
        flag = flags_of(program).get(name)
        if flag is None:
            places = " and ".join(place for other, place in _PLACES.items() if name in flags_of(other))
            ctx.fail(f"{name} does not go with {_PLACES[program]}, only with {places}")
        if len(values) < flag.n_values:
            ctx.fail(f"{name} needs a value")


def _show_help_of(program: Program) -> int:
    from pinfer.llama.plugin import runner_path

    return subprocess.run([runner_path(), program, "--help"], check=False).returncode


@with_model
def run(
    choice: Choice,
    ctx: typer.Context,
    exact: ExactOpt = False,
    dense: DenseOpt = False,
    artefacts: ArtefactsOpt = None,
    no_artefacts: NoArtefactsOpt = False,
    activation: ActivationOpt = None,
    device: HotDeviceOpt = None,
    rpc: RpcOpt = None,
    as_json: JsonOpt = False,
    help_all: HelpAllOpt = False,
) -> int:
    """Continue a prompt (-p TEXT), or chat. Sparse where the model allows it, with whatever artefacts there are."""
    from pinfer.execution import ExecutionOptions
    from pinfer.run import become, choose_program, start

    if help_all:
        return _show_help_of("completion")
    program, flags = choose_program(ctx.meta[_FLAGS_OF_LLAMA])
    _check_flags(ctx, program, flags)
    if as_json and program == "cli":
        ctx.fail("--json reports one completion, not a chat; give a prompt with -p")
    _check_modes(ctx, exact, dense, artefacts, no_artefacts)
    path = choice.path()
    options = settings(ExecutionOptions, locals())
    begin = start(program, path, options, flags, rpc=rpc, as_json=as_json)
    _say(begin.execution.notes)
    if not as_json:
        _suggest_preparing(choice, begin.execution, options)
    become(begin.command)


@with_model
def serve(
    choice: Choice,
    ctx: typer.Context,
    exact: ExactOpt = False,
    dense: DenseOpt = False,
    artefacts: ArtefactsOpt = None,
    no_artefacts: NoArtefactsOpt = False,
    activation: ActivationOpt = None,
    device: HotDeviceOpt = None,
    rpc: RpcOpt = None,
    help_all: HelpAllOpt = False,
) -> int:
    """Serve the model over HTTP on 127.0.0.1:8080, with llama.cpp's endpoints: OpenAI's, Anthropic's and its own.

    --host and --port choose the address, -np the number of parallel answers; --models-dir FOLDER serves many models.
    """
    from pinfer import serve as stage
    from pinfer.cli import ui
    from pinfer.execution import ExecutionOptions
    from pinfer.run import become, start

    if help_all:
        return _show_help_of("server")
    flags: LlamaFlags = ctx.meta[_FLAGS_OF_LLAMA]
    _check_flags(ctx, "server", flags)
    _check_modes(ctx, exact, dense, artefacts, no_artefacts)
    if flags.given(stage.ROUTER):
        words = ["--exact"] * exact + ["--dense"] * dense + ["--no-artefacts"] * no_artefacts
        stage.check_address(flags)
        command, environment = stage.router_command(words, flags)
        become(command, environment)
    path = choice.path()
    options = settings(ExecutionOptions, locals())
    stage.check_address(flags)
    begin = start("server", path, options, flags, rpc=rpc)
    _say(begin.execution.notes)
    _suggest_preparing(choice, begin.execution, options)
    ui.say(stage.describe(begin.execution))
    become(begin.command)


def _check_modes(ctx: typer.Context, exact: bool, dense: bool, artefacts: Path | None, no_artefacts: bool) -> None:
    for one, other, both in (
        ("--exact", "--dense", exact and dense),
        ("--artefacts", "--no-artefacts", artefacts is not None and no_artefacts),
    ):
        if both:
            ctx.fail(f"{one} and {other} exclude each other")


def _say(notes: tuple[str, ...]) -> None:
    from pinfer.cli import ui

    for note in notes:
        ui.say(f"note: {note}")


def _suggest_preparing(choice: Choice, execution: Execution, options: ExecutionOptions) -> None:
    """One line about `pinfer prepare`, where it would make this model faster."""
    from pinfer.cli import ui
    from pinfer.preparation import worth_preparing

    if (expected := worth_preparing(execution, options)) is not None:
        command = choice.command("prepare", f"--activation {options.activation}" if options.activation else "")
        ui.say(f"note: decoding is typically 1.5 to 2 times as fast after: {command} ({expected})")


def register(app: typer.Typer) -> None:
    """Add both commands."""
    for function in (run, serve):
        app.command(cls=ForwardingCommand, epilog=_EPILOG[function.__name__])(function)
