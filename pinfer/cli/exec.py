"""The command line of ``pinfer exec``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

CONTEXT = {"allow_interspersed_args": False, "ignore_unknown_options": False}


def exec_program(
    command: Annotated[
        list[str], typer.Argument(metavar="PROGRAM ARGS...", help="Program of llama.cpp and its flags.")
    ],
    model: Annotated[
        Path | None,
        typer.Option("--model", help="Model that the other options are about; default: the first one loaded."),
    ] = None,
    artefacts: Annotated[
        Path | None, typer.Option("--artefacts", "--artifacts", help="Folder of its artefacts; default: MODEL.pinfer.")
    ] = None,
    activation: Annotated[
        str | None,
        typer.Option(
            "--activation", help="What its FFN computes: relu, relu2, reglu, drelu, reglu2, or other for llama.cpp."
        ),
    ] = None,
    device: Annotated[
        str | None,
        typer.Option("--hot-device", "--device", help="Devices of its hot neurons; default: those of the placement."),
    ] = None,
) -> None:
    """Run a program of llama.cpp with pinfer's plugin: llama-server, llama-cli, llama-perplexity, ...

    Every ReLU model that the program loads is computed by pinfer, with the artefacts found beside it. The first line on
    stderr says so, or why not.
    """
    from pinfer.exec import execute, guest_environment

    execute(command, guest_environment(model=model, artefacts=artefacts, activation=activation, device=device))
