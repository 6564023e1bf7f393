"""How a command ends: one line for an error, and the exit code."""

from __future__ import annotations

import errno
import os
import sys

import typer


def fail(text: str) -> int:
    """Print an error as one line on stderr, after its traceback if PINFER_DEBUG is set. Returns the exit code."""
    if os.environ.get("PINFER_DEBUG"):
        import traceback

        traceback.print_exc()
    print("pinfer: " + " ".join(text.split()), file=sys.stderr)
    return 1


def wrong_usage(error: typer.TyperException) -> int:
    """Print what is wrong with the command line, and how to get help. Returns the exit code."""
    context = getattr(error, "ctx", None)
    command = context.command_path if context is not None else "pinfer"
    text = error.format_message()
    if "\n" in text:  # `pinfer` alone: the message is the help
        print(text, file=sys.stderr)
    else:
        print(f"{command}: {text.rstrip('.')}; see {command} --help", file=sys.stderr)
    return error.exit_code


def describe_os_error(error: OSError) -> str:
    """Cause, file and remedy."""
    cause = error.strerror or str(error)
    where = f": {os.fsdecode(error.filename)}" if error.filename is not None else ""
    hints = {
        errno.ENOSPC: "; free some space, or set PINFER_HOME to a folder on another disk",
        errno.EDQUOT: "; free some space, or set PINFER_HOME to a folder on another disk",
        errno.EFBIG: "; free some space, or raise the limit on file sizes (ulimit -f)",
        errno.EACCES: "; check the file's permissions, or set PINFER_HOME to a folder you can write",
        errno.EPERM: "; check the file's permissions, or set PINFER_HOME to a folder you can write",
        errno.EROFS: "; set PINFER_HOME to a folder you can write",
    }
    return f"{cause}{where}{hints.get(error.errno or 0, '')}"


def mute() -> int:
    """Discard further output, as nothing reads stdout any more; the interpreter would fail to flush it at exit."""
    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 1
