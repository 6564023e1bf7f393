"""``pinfer eval``: flags and report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pinfer.cli import ui
from pinfer.cli.formats import percent
from pinfer.cli.options import (
    ActivationOpt,
    ArtefactsOpt,
    CacheTypeKOpt,
    CacheTypeVOpt,
    Choice,
    DeviceOpt,
    ExactOpt,
    JsonOpt,
    LayersOpt,
    NoArtefactsOpt,
    RpcOpt,
    ThreadsOpt,
    WindowOpt,
    parse_count,
    settings,
    use_servers,
    with_model,
)

if TYPE_CHECKING:
    from pinfer.eval import EvalReport


@with_model
def evaluate(
    choice: Choice,
    *,
    text: Annotated[Path, typer.Option("--text", metavar="FILE", help="Text to measure on.")],
    n_tokens: Annotated[
        int,
        typer.Option(
            "--tokens", parser=parse_count, metavar="N", help="Tokens to measure. [default: 4k]", show_default=False
        ),
    ] = 4096,
    n_ctx: WindowOpt = 0,
    cache_type_k: CacheTypeKOpt = None,
    cache_type_v: CacheTypeVOpt = None,
    exact: ExactOpt = False,
    artefacts: ArtefactsOpt = None,
    no_artefacts: NoArtefactsOpt = False,
    n_threads: ThreadsOpt = None,
    n_gpu_layers: LayersOpt = None,
    device: DeviceOpt = None,
    rpc: RpcOpt = None,
    activation: ActivationOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Measure the quality loss of sparse computation: KL divergence from dense, top-1 agreement, perplexity."""
    from pinfer import eval as stage

    path = choice.path()
    use_servers(rpc)
    report = stage.evaluate(path, settings(stage.EvalOptions, locals()), ui.stderr_progress())
    ui.print_json(report.to_json()) if as_json else print_eval(report)
    choice.say_next("run", "-p 'Once upon a time'")


def print_eval(report: EvalReport) -> None:
    """Print the comparison with dense."""
    against = "stock llama.cpp" if report.reference == "libllama" else "pinfer's own dense computation"
    facts = [
        ("mode", f"{report.mode}, {report.tokens:,} tokens, compared with {against}"),
        ("perplexity", f"{report.perplexity_sparse:.4f} (dense {report.perplexity_dense:.4f})"),
        ("KL divergence", f"{report.kl_mean:.6f} mean, {report.kl_p99:.6f} at the 99th percentile"),
        ("top-1 agreement", percent(report.top1_agreement)),
        ("computed", f"{percent(report.computed)} of the neurons; {percent(report.active)} of the CPU's were active"),
    ]
    ui.print_facts(facts)
