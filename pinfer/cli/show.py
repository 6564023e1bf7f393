"""``pinfer show``: flags and report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from pinfer.cli import ui
from pinfer.cli.formats import format_bytes, percent
from pinfer.cli.options import ActivationOpt, Choice, JsonOpt, settings, with_model

if TYPE_CHECKING:
    from pinfer.show import ArtefactState, ShowReport

_PART_NAMES = {"ffn": "FFN", "dense": "attention, norms, other", "embeddings": "embeddings, output"}


@with_model
def show(
    choice: Choice,
    activation: ActivationOpt = None,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare every tensor of the artefacts with its checksum.")
    ] = False,
    as_json: JsonOpt = False,
) -> None:
    """Describe a model, its artefacts and how pinfer runs it."""
    from pinfer import show as stage

    report = stage.show(choice.path(), settings(stage.ShowOptions, locals()), ui.stderr_progress())
    ui.print_json(report.to_json()) if as_json else print_show(report)
    if verify and any(artefact.state == stage.UNUSABLE for artefact in report.artefacts):
        raise typer.Exit(1)
    choice.say_next(report.next)


def print_show(report: ShowReport) -> None:
    """Print the model, its artefacts and how it will run."""
    from pinfer.show import UNUSABLE

    ui.print_facts(_facts(report))
    print()
    ui.print_table("", ("part", "size", "share", "types"), _parts(report), left=(0, 3))
    print()
    if rows := _artefacts(report):
        ui.print_table(
            f"artefacts in {report.artefact_folder}", ("artefact", "size", "state", ""), rows, left=(0, 2, 3)
        )
    else:
        print("no artefacts yet")
    if rows and report.verified and all(artefact.state != UNUSABLE for artefact in report.artefacts):
        print("Every tensor of the artefacts has its checksum.")
    print()
    print(f"{report.plan[0].upper()}{report.plan[1:]}.")
    for artefact in report.artefacts:
        if artefact.problem:
            ui.say(f"{artefact.problem}; make it again: {artefact.mend}")


def _facts(report: ShowReport) -> list[tuple[str, str]]:
    """Names and values that describe the model."""
    from pinfer.model import ACTIVATION_KEY

    source = {ACTIVATION_KEY: f"the file's {ACTIVATION_KEY}", "architecture": f"default of {report.arch}"}
    activation = f"{report.activation} ({source.get(report.activation_source, report.activation_source)})"
    if report.activation_threshold:
        activation += f", above a threshold of {report.activation_threshold:g}"
    neurons = f"{report.n_ff:,} per layer, {report.n_neurons:,} in total, {'gated' if report.gated else 'not gated'}"
    if report.n_expert:
        neurons = f"{report.n_neurons:,} in total, {report.n_expert} experts"
    return [
        ("model", str(report.model)),
        ("size", f"{format_bytes(report.size)}, {report.n_params / 1e6:,.1f} M parameters"),
        ("architecture", report.arch),
        ("activation", activation),
        ("layers", f"{report.n_layer}, width {report.n_embd:,}"),
        ("heads", _heads(report)),
        ("neurons", neurons),
        ("context", f"{report.n_ctx_train:,} tokens in training" if report.n_ctx_train else "unknown"),
        ("vocabulary", f"{report.n_vocab:,} tokens"),
    ]


def _heads(report: ShowReport) -> str:
    q, kv = _span(report.n_head), _span(report.n_head_kv)
    width = f"{report.head_dim_k}" + ("" if report.head_dim_k == report.head_dim_v else f" and {report.head_dim_v}")
    if report.n_head == report.n_head_kv:
        return f"{q}, width {width}"
    return f"{q}, {kv} for keys and values (GQA), width {width}"


def _span(values: Sequence[int]) -> str:
    """``8``, or ``4 to 8`` if layers differ."""
    low, high = min(values, default=0), max(values, default=0)
    return f"{low}" if low == high else f"{low} to {high}"


def _parts(report: ShowReport) -> list[tuple[str, str, str, str]]:
    """Rows of the table of sizes: part, size, share of the file, types."""
    rows = [
        (
            _PART_NAMES[name],
            format_bytes(part.bytes),
            percent(part.bytes / report.size),
            _types(part.types),
        )
        for name, part in report.parts.items()
    ]
    header = report.size - sum(part.bytes for part in report.parts.values())
    rows.append(("vocabulary, header", format_bytes(header), percent(header / report.size), ""))
    rows.append(("whole file", format_bytes(report.size), "", ""))
    rows.append(("KV cache, 1,024 tokens", format_bytes(report.kv_bytes_per_1k), "", "F16"))
    return rows


def _types(sizes: Mapping[str, int]) -> str:
    """Types, with the size of each if there are several."""
    if len(sizes) < 2:
        return "".join(sizes)
    return ", ".join(f"{name} {format_bytes(n)}" for name, n in sizes.items())


def _artefacts(report: ShowReport) -> list[tuple[str, str, str, str]]:
    """Rows of the table of artefacts; empty if there are none."""
    from pinfer.show import ABSENT

    if all(a.state == ABSENT for a in report.artefacts):
        return []
    return [(a.kind, format_bytes(a.bytes) if a.bytes else "", a.state, _about(a)) for a in report.artefacts]


def _about(artefact: ArtefactState) -> str:
    """The contents of an artefact, or the command that makes it."""
    from pinfer.show import ABSENT, FITS

    if artefact.state == ABSENT:
        return artefact.mend
    if artefact.state != FITS:
        return f"make it again: {artefact.mend}"
    f = artefact.facts
    match artefact.kind:
        case "profile":
            counted = f"{f['tokens']:,} tokens of {f['corpus']}"
            found = [f"{percent(f['active'])} active", f"{percent(f['most'])} make 80 %"] if "active" in f else []
            if "experts_most" in f:
                found.append(f"{percent(f['experts_most'])} of the experts take 80 %")
            return ", ".join([*found, counted])
        case "samples":
            return f"{f['n_samples']:,} tokens"
        case "predictor":
            worst = percent(f["recall_of_worst_layer"])
            return (
                f"recall {percent(f['recall'])} (worst layer {worst}), names {percent(f['candidates'])} of the neurons"
            )
        case "placement":
            budget = f"{format_bytes(f['vram'])} on {f['device']}" if f["device"] else "no device"
            return f"{percent(f['hot_share'])} of the neurons hot, {budget}, context {f['n_ctx']:,}"
        case _:
            return f"{f['n_neurons']:,} neurons" + (f", down rows {f['down_types']}" if f["n_neurons"] else "")
