"""``pinfer solve``: flags and report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from pinfer.cli import ui
from pinfer.cli.formats import ffn_label, format_bytes, percent
from pinfer.cli.options import (
    ActivationOpt,
    Choice,
    JsonOpt,
    PlacedOnOpt,
    ReservedOpt,
    RpcOpt,
    UbatchOpt,
    VramOpt,
    parse_sizes,
    settings,
    use_servers,
    with_model,
)

if TYPE_CHECKING:
    from pinfer.solve import SolveReport


@with_model
def solve(
    choice: Choice,
    vram: VramOpt = None,
    n_ctx: ReservedOpt = None,
    n_ubatch: UbatchOpt = 512,
    device: PlacedOnOpt = None,
    rpc: RpcOpt = None,
    machine: Annotated[
        Path | None, typer.Option("--machine", metavar="FILE", help="Solve for the machine described in this file.")
    ] = None,
    time_limit: Annotated[
        float, typer.Option("--time-limit", min=0.1, metavar="SECONDS", help="Time limit of the solver.")
    ] = 10.0,
    cache_type_k: Annotated[
        str, typer.Option("-ctk", "--cache-type-k", metavar="TYPE", help="Type of the K cache.")
    ] = "f16",
    cache_type_v: Annotated[
        str, typer.Option("-ctv", "--cache-type-v", metavar="TYPE", help="Type of the V cache.")
    ] = "f16",
    activation: ActivationOpt = None,
    as_json: JsonOpt = False,
) -> None:
    """Decide which neurons or experts go to the GPU, from the profile and the free memory."""
    from pinfer import solve as stage

    sizes = parse_sizes(vram, "--vram") if vram is not None else None
    path = choice.path()
    use_servers(rpc)
    options = settings(stage.SolveOptions, {**locals(), "vram": sizes})
    report = stage.solve(path, options, ui.stderr_progress())
    ui.print_json(report.to_json()) if as_json else print_solve(report)
    choice.say_next("split")


def print_solve(report: SolveReport) -> None:
    """Print where the neurons go, how good that is, and the expected speed."""
    rows = [
        (ffn_label(f.layer, f.kind), f"{f.n_hot:,}{' experts' * (f.kind == 'experts')}", percent(f.n_hot / f.n_units))
        for f in report.ffns
    ]
    n_hot = sum(f.n_hot * (1 if report.whole_experts else f.n_neurons) for f in report.ffns)
    rows.append(("whole model", f"{n_hot:,}", percent(report.hot_share)))
    ui.print_table("", ("layer", "hot experts" if report.whole_experts else "hot neurons", "share"), rows)
    if report.devices:
        _print_memory(report)
    units = "experts" if report.whole_experts else "neurons"
    used = sum(report.n_bytes.values())
    first = report.devices[0].name if report.devices else "a device"
    quality = f"objective {report.objective:.4g}, bound {report.bound:.4g} (gap {percent(report.gap)}), greedy "
    facts = [
        ("device", f"{report.device}, {format_bytes(used)} of {format_bytes(report.vram)} used"),
        ("dense layers", f"{report.n_gpu_layers} on {first}, context {report.n_ctx:,}"),
        ("used bytes", f"{percent(report.hot_activations)} of the experts' are on devices")
        if report.whole_experts
        else ("activations", f"{percent(report.hot_activations)} are of hot neurons"),
        ("solver", f"{report.status} in {report.solver_seconds:.2f} s: {quality}{report.greedy:.4g}"),
        (
            "expected",
            f"{report.tokens_per_s:.1f} tokens/s; all {units} cold {report.tokens_per_s_cold:.1f}, "
            f"dense {report.tokens_per_s_dense:.1f}",
        ),
    ]
    ui.print_facts(facts)
    ui.print_paths(report.placement)


def _print_memory(report: SolveReport) -> None:
    """Print device memory by purpose."""
    devices = report.devices
    rows = [(part.replace("_", " "), *(format_bytes(d.n_bytes[part]) for d in devices)) for part in report.n_bytes]
    rows.append(("total", *(format_bytes(sum(d.n_bytes.values())) for d in devices)))
    rows.append(("budget", *(format_bytes(d.vram) for d in devices)))
    ui.print_table("", ("memory", *(d.name for d in devices)), rows)
