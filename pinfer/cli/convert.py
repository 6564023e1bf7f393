"""``pinfer convert``: flags and report."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from pinfer.cli import ui
from pinfer.cli.formats import format_bytes, format_seconds, percent
from pinfer.cli.options import ActivationOpt, Choice, DatasetOpt, JsonOpt, OfflineOpt, ThreadsOpt, settings

if TYPE_CHECKING:
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
    dataset: DatasetOpt = "wikitext",
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
    Choice(source, repo=repo, offline=offline).check()
    progress = ui.stderr_progress()
    name = None
    if repo is not None:
        from pinfer.hub.models import fetch_checkpoint

        source, name = fetch_checkpoint(repo, progress, offline=offline), repo.rpartition("/")[2]
    assert source is not None
    report = stage.convert(source, settings(stage.ConvertOptions, locals()), progress)
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
    if (predictor := report.predictor) is not None:
        facts.append(("predictor", f"{format_bytes(predictor.predictor_bytes)}, measured on {predictor.corpus}"))
        facts.append(
            ("recall", f"{percent(predictor.recall)} of the activation mass, {percent(predictor.candidates)} computed")
        )
        if predictor.sign_recall is not None and predictor.sign_candidates is not None:
            facts.append(
                (
                    "as PowerInfer used it",
                    f"{percent(predictor.sign_recall)}, {percent(predictor.sign_candidates)} computed",
                )
            )
    ui.print_facts(facts)
    for note in report.notes:
        ui.say(f"note: {note}")
    ui.print_paths(report.path)


def _tokenizer(report: ConvertReport) -> str:
    if report.tokenizer is None:
        return "as in the source"
    found = report.tokenizer
    kind = found.model if found.pre == "default" else found.pre
    return f"{kind}, {found.n_tokens:,} tokens; ids of {found.n_strings} texts match {found.verified_with}"
