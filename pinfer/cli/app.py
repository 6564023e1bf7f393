"""Registers the commands, one for each file of this package, and turns errors into exit codes."""

from __future__ import annotations

import errno
import signal
import sys
from types import FrameType
from typing import TYPE_CHECKING, Annotated, NoReturn

import typer
from typer.core import TyperGroup

from pinfer import __version__
from pinfer.cli.bench import bench
from pinfer.cli.convert import convert
from pinfer.cli.eval import evaluate
from pinfer.cli.exec import CONTEXT, exec_program
from pinfer.cli.exits import describe_os_error, fail, mute, wrong_usage
from pinfer.cli.library import list_models, remove
from pinfer.cli.plot import plot
from pinfer.cli.prepare import prepare
from pinfer.cli.profile import profile
from pinfer.cli.run import register as register_run
from pinfer.cli.show import show
from pinfer.cli.solve import solve
from pinfer.cli.split import split
from pinfer.cli.train import train
from pinfer.errors import PinferError

if TYPE_CHECKING:
    from typer._click import Context, HelpFormatter

_GROUPS = {
    "Use a model": ("run", "serve", "exec", "show"),
    "Prepare it": ("convert", "prepare", "profile", "train", "solve", "split"),
    "Measure it": ("eval", "bench", "plot"),
    "Clean up": ("list", "rm"),
}


class _GroupedCommands(TyperGroup):
    """The list of commands in ``--help``, by what they are for."""

    def format_commands(self, ctx: Context, formatter: HelpFormatter) -> None:
        limit = formatter.width - 6 - max(map(len, self.commands))
        grouped = {name for names in _GROUPS.values() for name in names}
        others = tuple(name for name in self.commands if name not in grouped)
        for title, names in {**_GROUPS, "Other": others}.items():
            rows = [(name, self.commands[name].get_short_help_str(limit)) for name in names if name in self.commands]
            if rows:
                with formatter.section(title):
                    formatter.write_dl(rows, col_max=10)


app = typer.Typer(
    name="pinfer",
    cls=_GroupedCommands,
    help="Run ReLU language models on stock llama.cpp, computing only the active neurons.",
    epilog="Pipeline: profile → train → solve → split → run. Results go to stdout; progress and messages go to stderr.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"pinfer {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version.", callback=_version, is_eager=True)
    ] = False,
) -> None:
    pass


for _command in (convert, prepare, profile, train, solve, split):
    app.command()(_command)
register_run(app)
app.command("exec", context_settings=CONTEXT)(exec_program)
app.command("eval")(evaluate)
for _command in (bench, show):
    app.command()(_command)
app.add_typer(plot)
app.command("list")(list_models)
app.command("rm")(remove)


def run_cli(args: list[str]) -> int:
    """Run one command line and return its exit code: 0, 1 for an error, 2 for wrong usage, 130 for Ctrl-C."""
    try:
        code = app(args, prog_name="pinfer", standalone_mode=False)
        sys.stdout.flush()
        return code if isinstance(code, int) else 0
    except typer.TyperException as error:
        return wrong_usage(error)
    except typer.Abort:
        return fail("unexpected end of input")
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        return mute()
    except PinferError as error:
        return fail(str(error))
    except MemoryError:
        return fail("out of memory; close other programs, or use a smaller model, context or batch")
    except ImportError as error:
        return fail(f"a Python package is missing or broken ({error}); install pinfer again: pip install .")
    except OSError as error:
        return mute() if error.errno == errno.EPIPE else fail(describe_os_error(error))
    except Exception as error:  # the last resort: one line for the user, the traceback on request
        return fail(f"internal error: {type(error).__name__}: {error}; rerun with PINFER_DEBUG=1 for the traceback")


def main() -> NoReturn:
    """Entry point of the ``pinfer`` command."""
    # Turn signals into an exception, so that temporary files are removed.
    for signum in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(signum, _leave)
    sys.exit(run_cli(sys.argv[1:]))


def _leave(signum: int, _frame: FrameType | None) -> NoReturn:
    sys.exit(128 + signum)
