"""``pinfer run`` on the command line: llama.cpp's flags, by llama.cpp's names."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from pinfer.cli.options import (
    ActivationOpt,
    Choice,
    DeviceOpt,
    HubOpt,
    JsonOpt,
    ModelArg,
    ModelOpt,
    OfflineOpt,
    RpcOpt,
    ThreadsOpt,
    parse_layers,
)


def run(
    model: ModelArg = None,
    prompt: Annotated[str | None, typer.Option("-p", "--prompt", metavar="TEXT", help="Prompt; none: chat.")] = None,
    prompt_file: Annotated[
        Path | None, typer.Option("-f", "--file", metavar="FILE", help="Prompt from a file; - is stdin.")
    ] = None,
    n_predict: Annotated[
        int,
        typer.Option("-n", "--predict", "--n-predict", min=-2, metavar="N", help="Tokens to generate; -1: no limit."),
    ] = -1,
    conversation: Annotated[
        bool | None, typer.Option("-cnv/-no-cnv", "--conversation/--no-conversation", help="Chat, or never.")
    ] = None,
    system_prompt: Annotated[
        str | None, typer.Option("-sys", "--system-prompt", metavar="TEXT", help="System prompt of the chat.")
    ] = None,
    escape: Annotated[
        bool, typer.Option("-e", "--escape/--no-escape", help="\\n and the like in -p and -sys are escapes.")
    ] = True,
    display_prompt: Annotated[
        bool, typer.Option("--display-prompt/--no-display-prompt", help="Repeat the prompt on stdout.")
    ] = True,
    n_ctx: Annotated[
        int | None,
        typer.Option("-c", "--ctx-size", min=0, metavar="N", help="Context. [default: as solved, else up to 4096]"),
    ] = None,
    n_batch: Annotated[int, typer.Option("-b", "--batch-size", min=1, metavar="N", help="Logical batch.")] = 2048,
    n_ubatch: Annotated[int, typer.Option("-ub", "--ubatch-size", min=1, metavar="N", help="Physical batch.")] = 512,
    n_batch_dense: Annotated[
        int | None,
        typer.Option(
            "--n-batch-dense", min=0, metavar="N", help="Compute batches from N tokens densely. [default: measured]"
        ),
    ] = None,
    threads: ThreadsOpt = None,
    threads_batch: Annotated[
        int | None, typer.Option("-tb", "--threads-batch", min=1, metavar="N", help="Threads for the prompt.")
    ] = None,
    n_gpu_layers: Annotated[
        int | None,
        typer.Option(
            "-ngl",
            "--n-gpu-layers",
            "--gpu-layers",
            parser=parse_layers,
            metavar="N|all",
            help="Layers whose attention lies on the GPU. [default: as solved]",
        ),
    ] = None,
    flash_attn: Annotated[
        Literal["on", "off", "auto"], typer.Option("-fa", "--flash-attn", help="Flash attention.")
    ] = "auto",
    cache_type_k: Annotated[
        str, typer.Option("-ctk", "--cache-type-k", metavar="TYPE", help="Type of the K cache.")
    ] = "f16",
    cache_type_v: Annotated[
        str, typer.Option("-ctv", "--cache-type-v", metavar="TYPE", help="Type of the V cache.")
    ] = "f16",
    mlock: Annotated[bool, typer.Option("--mlock", help="Keep the model in memory.")] = False,
    no_mmap: Annotated[bool, typer.Option("--no-mmap", help="Read the model instead of mapping it (--dense).")] = False,
    seed: Annotated[int, typer.Option("-s", "--seed", min=-1, metavar="N", help="Seed; -1: another each time.")] = -1,
    temp: Annotated[float, typer.Option("--temp", min=0, metavar="T", help="Temperature; 0: greedy.")] = 0.8,
    top_k: Annotated[int, typer.Option("--top-k", metavar="N", help="0: all.")] = 40,
    top_p: Annotated[float, typer.Option("--top-p", min=0, metavar="P", help="1: off.")] = 0.95,
    min_p: Annotated[float, typer.Option("--min-p", min=0, metavar="P", help="0: off.")] = 0.05,
    repeat_penalty: Annotated[float, typer.Option("--repeat-penalty", metavar="X", help="1: off.")] = 1.0,
    repeat_last_n: Annotated[
        int, typer.Option("--repeat-last-n", min=-1, metavar="N", help="Tokens the penalties look at; -1: the context.")
    ] = 64,
    presence_penalty: Annotated[float, typer.Option("--presence-penalty", metavar="X")] = 0.0,
    frequency_penalty: Annotated[float, typer.Option("--frequency-penalty", metavar="X")] = 0.0,
    grammar: Annotated[str | None, typer.Option("--grammar", metavar="GBNF", help="Grammar of the output.")] = None,
    grammar_file: Annotated[
        Path | None, typer.Option("--grammar-file", metavar="FILE", help="Grammar from a file.")
    ] = None,
    ignore_eos: Annotated[bool, typer.Option("--ignore-eos", help="Never end before -n.")] = False,
    exact: Annotated[bool, typer.Option("--exact", help="Without the predictor: lossless.")] = False,
    dense: Annotated[bool, typer.Option("--dense", help="Stock libllama, for comparison.")] = False,
    artefacts: Annotated[
        Path | None,
        typer.Option(
            "--artefacts", metavar="FOLDER", help="Folder of the artefacts. [default: where they are written]"
        ),
    ] = None,
    no_artefacts: Annotated[bool, typer.Option("--no-artefacts", help="Use the model alone.")] = False,
    device: DeviceOpt = None,
    rpc: RpcOpt = None,
    activation: ActivationOpt = None,
    verbose: Annotated[bool, typer.Option("-v", "--verbose", help="libllama's log on stderr.")] = False,
    as_json: JsonOpt = False,
    model_flag: ModelOpt = None,
    repo: HubOpt = None,
    offline: OfflineOpt = False,
) -> int:
    """Generate text; without a prompt, chat. Sparse where the model allows it, with whatever artefacts there are."""
    from pinfer import run as stage

    choice = Choice(model, model_flag, repo, offline)
    path = choice.path()
    options = stage.RunOptions(
        prompt=prompt,
        prompt_file=prompt_file,
        n_predict=n_predict,
        conversation=conversation,
        system_prompt=system_prompt,
        escape=escape,
        display_prompt=display_prompt,
        n_ctx=n_ctx,
        n_batch=n_batch,
        n_ubatch=n_ubatch,
        n_batch_dense=n_batch_dense,
        n_threads=threads,
        n_threads_batch=threads_batch,
        n_gpu_layers=n_gpu_layers,
        flash_attn=flash_attn,
        cache_type_k=cache_type_k,
        cache_type_v=cache_type_v,
        mlock=mlock,
        no_mmap=no_mmap,
        seed=seed,
        temp=temp,
        top_k=top_k,
        top_p=top_p,
        min_p=min_p,
        repeat_penalty=repeat_penalty,
        repeat_last_n=repeat_last_n,
        presence_penalty=presence_penalty,
        frequency_penalty=frequency_penalty,
        grammar=grammar,
        grammar_file=grammar_file,
        ignore_eos=ignore_eos,
        exact=exact,
        dense=dense,
        artefacts=artefacts,
        no_artefacts=no_artefacts,
        device=device,
        rpc=rpc,
        activation=activation,
        verbose=verbose,
        json=as_json,
    )
    return stage.run(path, options)
