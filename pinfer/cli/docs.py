"""``python -m pinfer.cli.docs [--check]``: writes docs/cli.md from the ``--help`` texts, or tells that it is stale."""

from __future__ import annotations

import sys
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "cli.md"

_HEAD = """# The command line

<!-- Written by `python -m pinfer.cli.docs` from the help texts in the package: edit those (pinfer/cli). -->

Data goes to stdout, everything else to stderr. Exit codes: 0 done, 1 an error (one line says the cause and what to
type next), 2 wrong usage, 130 Ctrl-C. Sizes read `24G`, `512M`, `7.5GiB` or plain bytes.

| variable | meaning |
|---|---|
| `PINFER_MODEL` | the model when none is named |
| `PINFER_HOME` | folder for artefacts that cannot lie beside the model, and for what pinfer remembers |
| `PINFER_RPC` | the same as `--rpc` |
| `PINFER_NATIVE_DIR` | folder of another build of plugin and runner |
| `PINFER_ISA` | forces the kernels: `scalar`, `avx2`, `avx512`, `neon` |
| `PINFER_TRACE` | file for a Chrome trace: copy, hot, cold and wait of every layer, on the CPU and each device |
| `PINFER_DEBUG` | `1`: errors come with their traceback |
| `HF_TOKEN`, `HF_HOME`, `HF_ENDPOINT` | for `-hf` and data sets: access token, folder of the shared cache, address |
| `HF_HUB_OFFLINE` | `1`: the same as `--offline` |
"""


def render() -> str:
    """The whole page as Markdown."""
    from typer.main import get_command
    from typer.testing import CliRunner

    from pinfer.cli.app import app

    runner = CliRunner()
    group = get_command(app)
    parts = [_HEAD]
    for name in ["", *getattr(group, "commands", {})]:
        words = [name] if name else []
        # A fixed width of 80 comes with the runner, whatever the terminal.
        text = runner.invoke(app, [*words, "--help"], prog_name="pinfer").stdout
        lines = "\n".join(line.rstrip() for line in text.strip().splitlines())
        parts.append(f"\n## {' '.join(['pinfer', *words])}\n\n```text\n{lines}\n```\n")
    return "".join(parts)


def main(args: list[str]) -> int:
    """Write or check the page; exit code 1 when ``--check`` finds it stale."""
    check = "--check" in args
    rest = [arg for arg in args if arg != "--check"]
    page = Path(rest[0]) if rest else PAGE
    text = render()
    if not check:
        page.write_text(text, encoding="utf-8")
        return 0
    if page.is_file() and page.read_text(encoding="utf-8") == text:
        return 0
    print(f"{page} is stale; run: python -m pinfer.cli.docs", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
