"""README and the other documents: links, pasted commands, and the picture of the speed."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
DOCUMENTS = sorted(
    path for pattern in ("*.md", "docs/*.md", "models/*.md", "tests/*/README.md") for path in ROOT.glob(pattern)
)


def _anchors(path: Path) -> set[str]:
    """The anchors of a document's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", path.read_text(encoding="utf-8"), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("document", DOCUMENTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(document: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", document.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        name, _, anchor = target.partition("#")
        path = document.parent / name if name else document
        assert path.exists(), f"{document.name} links to {target}"
        assert not anchor or anchor in _anchors(path), f"{document.name} links to {target}"


def _commands() -> list[list[str]]:
    """The pinfer commands of README's code blocks, as words."""
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    return [shlex.split(line) for line in lines if line.startswith("    pinfer ")]


def test_pasted_commands_name_files_and_flags_that_exist() -> None:
    """Flags of `run` and `exec` are left out: they are llama.cpp's."""
    commands = _commands()
    assert {command[1] for command in commands} >= {"prepare", "run", "eval"}
    sections = re.split(r"^## ", (ROOT / "docs" / "cli.md").read_text(encoding="utf-8"), flags=re.MULTILINE)
    for command in commands:
        section = next((s for s in sections if s.startswith(f"pinfer {command[1]}\n")), None)
        assert section is not None, f"README: there is no command {shlex.join(command)}"
        for word in command[2:]:
            if word.startswith("-") and command[1] not in ("run", "exec"):
                assert re.search(rf"(?<!\S){re.escape(word)}(?![\w-])", section), f"README: {shlex.join(command)}"
            if re.search(r"\.(gguf|txt)$", word):
                assert (ROOT / word).exists(), f"README: {shlex.join(command)}"


def test_readme_is_wrapped_at_100_columns() -> None:
    lines = (ROOT / "README.md").read_text(encoding="utf-8").splitlines()
    assert not [line for line in lines if len(line) > 100 and not line.startswith("|")]


def test_picture_of_the_speed_is_up_to_date() -> None:
    command = [sys.executable, str(ROOT / "tools" / "plot_speed.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
