"""``pinfer convert``: flags and report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pinfer.cli import ui
from pinfer.cli.formats import format_bytes, format_seconds, percent
from pinfer.cli.options import ActivationOpt, Choice, JsonOpt, OfflineOpt, ThreadsOpt, settings

if TYPE_CHECKING:
    from pinfer.conversion.powerinfer_predictor import ImportReport
    from pinfer.convert import ConvertReport


def convert(
    source: Annotated[
        Path | None,
        typer.Argument(
            metavar="SOURCE", help="Checkpoint folder (config.json, weights, tokenizer) or PowerInfer GGUF."
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "-o", "--output", "--outfile", metavar="FILE", help="GGUF to write. [default: NAME-TYPE.gguf here]"
        ),
    ] = None,
    type: Annotated[
        Literal["f32", "f16", "bf16", "q8_0", "q4_0", "q4_k_m"] | None,
        typer.Option("--type", "--outtype", help="Type of the matrices. [default: f16, or a PowerInfer file's own]"),
    ] = None,
    activation: ActivationOpt = None,
    dataset: Annotated[
        str | None,
        typer.Option(
            "--dataset",
            metavar="c4|wikitext|FILE|-",
            help="Text to measure a PowerInfer file's predictor on. [default: wikitext]",
        ),
    ] = None,
    predictor_only: Annotated[
        bool,
        typer.Option("--predictor-only", help="Write only a PowerInfer file's predictor; its model is FILE of -o."),
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Overwrite an existing file.")] = False,
    n_threads: ThreadsOpt = None,
    repo: Annotated[
        str | None,
        typer.Option(
            "-hf", "-hfr", "--hf-repo", metavar="USER/REPO", help="Download the checkpoint from the Hugging Face hub."
        ),
    ] = None,
    offline: OfflineOpt = False,
    as_json: JsonOpt = False,
) -> None:
    """Convert a Hugging Face checkpoint or a PowerInfer file to GGUF."""
    from pinfer import convert as stage

    if (source is None) == (repo is None):
        raise typer.BadParameter("pass one checkpoint: a folder, or -hf USER/REPO", param_hint="SOURCE")
    for flag, value in (("-hf", repo), ("--activation", activation), ("--force", force)):
        if predictor_only and value:
            raise typer.BadParameter(f"it does not go with {flag}", param_hint="--predictor-only")
    Choice(source, repo=repo, offline=offline).check()
    progress = ui.stderr_progress()
    name = None
    if repo is not None:
        from pinfer.hub.models import fetch_checkpoint

        source, name = fetch_checkpoint(repo, progress, offline=offline), repo.rpartition("/")[2]
    assert source is not None
    options = settings(stage.ConvertOptions, locals())
    if predictor_only:
        imported = stage.convert_predictor(source, options, progress)
        ui.print_json(imported.to_json()) if as_json else print_import(imported)
    else:
        report = stage.convert(source, options, progress)
        ui.print_json(report.to_json()) if as_json else print_convert(report)
        ui.say(f"next: {report.next_command}")


def print_convert(report: ConvertReport) -> None:
    """Describe the converted model."""
    threshold = f" above {report.activation_threshold:g}" if report.activation_threshold else ""
    facts = [
        ("architecture", report.arch),
        ("activation", report.activation + threshold),
        ("weights", f"{report.n_weights:,} in {report.n_tensors} tensors, {report.type}"),
        ("size", format_bytes(report.n_bytes)),
        ("tokenizer", _tokenizer(report)),
        ("took", format_seconds(report.seconds)),
    ]
    if report.predictor is not None:
        facts += _predictor_facts(report.predictor)
    ui.print_facts(facts)
    for note in report.notes:
        ui.say(f"note: {note}")
    ui.print_paths(report.path)


def print_import(report: ImportReport) -> None:
    """Describe the imported predictor."""
    ui.print_facts(_predictor_facts(report))
    for note in report.notes():
        ui.say(f"note: {note}")
    ui.print_paths(report.path)


def _predictor_facts(report: ImportReport) -> list[tuple[str, str]]:
    facts = [
        ("predictor", f"{format_bytes(report.predictor_bytes)}, measured on {report.corpus}"),
        ("recall", f"{percent(report.recall)} of the activation mass, {percent(report.candidates)} computed"),
    ]
    if report.sign_recall is not None and report.sign_candidates is not None:
        facts.append(
            ("as PowerInfer used it", f"{percent(report.sign_recall)}, {percent(report.sign_candidates)} computed")
        )
    return facts


def _tokenizer(report: ConvertReport) -> str:
    if report.tokenizer is None:
        return "as in the source"
    found = report.tokenizer
    kind = found.model if found.pre == "default" else found.pre
    return f"{kind}, {found.n_tokens:,} tokens; ids of {found.n_strings} texts match {found.verified_with}"
